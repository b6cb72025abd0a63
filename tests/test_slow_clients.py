"""A thousand clients that are slow on purpose, and more clients than descriptors: they lose, and nobody else does.

The slow ones are slowhttptest, which others wrote, and for an answer that nobody reads plain sockets. The limits are
short, as an operator sets them by ``--limit``; beside the flood somebody asks for a page all the time.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from unittest import skipUnless

import pytest
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.service import OWN_DESCRIPTORS
from lwstwisted.web.answers import UNSENT
from tests.servers import (
    PATIENCE,
    Server,
    free_port,
    is_listening,
    serving,
    twistd,
    unfinished_beneath,
    visible_beneath,
    wait_until,
    write_sample,
)

TOP = Path(__file__).parent.parent
MIB = 1024 * 1024
SLOW = 1000
LIMITS = {
    "body-rate-time": 1,
    "close-time": 1,
    "connections-per-address": 0,
    "head-time": 2,
    "idle-time": 2,
    "linger-time": 0.5,
    "unread-time": 2,
}
TEST_TIME = 15
"""Seconds after which slowhttptest gives up and says so; each of the deadlines above is over long before."""


def status_of(port: int) -> int:
    """Ask for a page on a new connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", "/files/")
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


def rest_of(client: socket.socket) -> int:
    """How many bytes are still to be read from a connection that is over."""
    count = 0
    try:
        while data := client.recv(MIB):
            count += len(data)
    except ConnectionResetError:
        pass
    return count


class Probe(Thread):
    """Somebody who wants a page ten times a second.

    :ivar said: a status for each time, or what went wrong.
    """

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port
        self._is_over = Event()
        self.said: list[object] = []

    def run(self) -> None:
        while not self._is_over.wait(0.1):
            try:
                self.said.append(status_of(self._port))
            except (OSError, http.client.HTTPException) as error:
                self.said.append(error)

    def stop(self) -> None:
        """End it, after the answer that it waits for."""
        self._is_over.set()
        self.join(2 * PATIENCE)


def ticks(server: Server) -> int:
    """Processor time of a server so far, in hundredths of a second."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


class FloodCase(SynchronousTestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.root = self.folder / "root"

    def serve(self, descriptors: int, **limits: float) -> tuple[Server, int]:
        """A server that may have so many descriptors, and its port."""
        command = ["prlimit", f"--nofile={descriptors}", *twistd("--root", self.root, "--listen", "tcp:0:backlog=1024")]
        command += [f"--limit={name}={value}" for name, value in limits.items()]
        server = self.enterContext(serving(command, cwd=self.folder))
        (port,) = server.wait_for_ports()
        # Threads and files of the store, which are opened when they are wanted first.
        self.assertEqual(status_of(port), 200)
        return server, port

    def connect(self, port: int, count: int) -> list[socket.socket]:
        """Connections that are made without waiting for the server."""
        clients = []
        for _ in range(count):
            client = socket.socket()
            self.addCleanup(client.close)
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            clients.append(client)
        return clients


SPARE_IS_GONE = "Could not reserve EMFILE recovery file descriptor."


@skipUnless(shutil.which("prlimit"), "prlimit (util-linux) is not installed")
class SlowClientTests(FloodCase):
    """1,000 connections, each of which costs its client next to nothing."""

    @contextmanager
    def flooded(self) -> Iterator[tuple[Server, int]]:
        """Whatever happens inside: pages are served meanwhile, and no descriptor is left behind."""
        server, port = self.serve(4 * SLOW, **LIMITS)
        before = server.descriptors()
        probe = Probe(port)
        probe.start()
        try:
            yield server, port
        finally:
            probe.stop()
        self.assertGreater(len(probe.said), 10)
        self.assertEqual(set(probe.said), {200})
        wait_until(lambda: server.descriptors() <= before, "all connections were given back")
        self.assertNotIn("Traceback", server.text)

    def slowhttptest(self, *options: str) -> str:
        """Attack until all connections are closed, or the time is over. Returns how it ended."""
        command = ["slowhttptest", "-c", str(SLOW), "-r", str(SLOW), "-l", str(TEST_TIME), "-p", "5", *options]
        # It wants a descriptor for each connection and doesn't ask for them.
        command = ["prlimit", f"--nofile={4 * SLOW}", *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=4 * TEST_TIME)
        said = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", done.stdout)
        self.assertRegex(said, r"service available: +YES")
        ends = re.findall(r"Exit status: (.*)", said)
        self.assertEqual(len(ends), 1, said + done.stderr)
        return str(ends[0])

    @pytest.mark.slow
    @skipUnless(shutil.which("slowhttptest"), "slowhttptest is not installed")
    def test_slow_heads(self) -> None:
        """A field now and then doesn't extend the time that a head may take."""
        with self.flooded() as (server, port):
            end = self.slowhttptest("-H", "-i", "1", "-x", "10", "-u", f"http://127.0.0.1:{port}/files/")

            def counted() -> list[int]:
                return [int(count) for count in re.findall(r"(\d+) head_timeout", server.text)]

            # What they sent was no request, so it is counted, and told in a line a second at most.
            wait_until(lambda: sum(counted()) >= SLOW, "all of them were counted")
            self.assertLess(len(counted()), TEST_TIME)
        self.assertEqual(end, "No open connections left")

    @pytest.mark.slow
    @skipUnless(shutil.which("slowhttptest"), "slowhttptest is not installed")
    def test_slow_bodies(self) -> None:
        """Some bytes of a body a second are too few, and nothing of such uploads is left."""
        with self.flooded() as (server, port):
            url = f"http://127.0.0.1:{port}/files/slow"
            end = self.slowhttptest("-B", "-i", "1", "-x", "10", "-s", str(MIB), "-t", "PUT", "-u", url)
            self.assertEqual(server.text.count('"PUT /files/slow HTTP/1.1" 408 '), SLOW)
        self.assertEqual(end, "No open connections left")
        self.assertEqual(visible_beneath(self.root), [])
        self.assertEqual(unfinished_beneath(self.root), [])

    @pytest.mark.slow
    def test_slow_reads(self) -> None:
        """Who asks for a file and doesn't read it is cut."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4 * SLOW, hard), hard))
        with self.flooded() as (server, port):
            write_sample(self.root / "file", 8 * MIB)
            before = server.descriptors()
            clients = []
            for _ in range(SLOW):
                client = socket.create_connection(("127.0.0.1", port), PATIENCE)
                self.addCleanup(client.close)
                client.sendall(b"GET /files/file HTTP/1.1\r\nHost: localhost\r\n\r\n")
                clients.append(client)
            wait_until(lambda: server.descriptors() <= before, "all of them were cut")
            for client in clients:
                self.assertEqual(client.recv(12), b"HTTP/1.1 200")
                self.assertLess(rest_of(client), 8 * MIB)

    @pytest.mark.slow
    @skipUnless(shutil.which("slowhttptest"), "slowhttptest is not installed")
    def test_trickled_reads(self) -> None:
        """Nor do some bytes a second make a reader of whoever asks for a file."""
        command = ["slowhttptest", "-X", "-c", str(SLOW), "-r", str(SLOW), "-l", str(4 * TEST_TIME)]
        command += ["-w", "512", "-y", "1024", "-n", "1", "-z", "16"]
        with self.flooded() as (server, port):
            write_sample(self.root / "file", 8 * MIB)
            before = server.descriptors()
            url = f"http://127.0.0.1:{port}/files/file"
            attacker = subprocess.Popen(
                ["prlimit", f"--nofile={4 * SLOW}", *command, "-u", url], stdout=subprocess.DEVNULL
            )
            try:
                wait_until(lambda: server.descriptors() > before + 100, "they had come")
                # It reads on in what is there, and doesn't notice; so the server is looked at.
                wait_until(lambda: server.descriptors() <= before, "all of them were cut")
                self.assertIsNone(attacker.poll())
            finally:
                attacker.kill()
                attacker.wait()


def waiting_for(client: socket.socket) -> int:
    """Bytes that the kernel holds for a client on this machine (proc_pid_net(5), tx_queue)."""
    (_, port), (_, server) = client.getsockname(), client.getpeername()
    for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(f":{server:04X}") and fields[2].endswith(f":{port:04X}"):
            return int(fields[4].partition(":")[0], 16)
    raise AssertionError("there is no such connection")


class UnreadTests(FloodCase):
    """A client that doesn't read costs little, also in the kernel."""

    def test_unsent(self) -> None:
        """Of a long answer hardly more waits in the kernel than two slices."""
        server, port = self.serve(1024)
        write_sample(self.root / "file", 16 * MIB)
        with socket.socket() as client:
            client.settimeout(PATIENCE)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(b"GET /files/file HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            wait_until(lambda: waiting_for(client) >= UNSENT, "the kernel held what it may")
            # Another one has its whole answer meanwhile, so the server has had time for more.
            self.assertEqual(status_of(port), 200)
            self.assertLess(waiting_for(client), 2 * UNSENT)
            self.assertGreater(rest_of(client), 16 * MIB)  # it is slow, and gets everything
        self.assertNotIn("Traceback", server.text)


    def slow_reader(self, port: int, name: str, *fields: bytes) -> socket.socket:
        """A connection with small buffers and packets, as of a slow line, that has asked for a file."""
        client = socket.socket()
        self.addCleanup(client.close)
        client.settimeout(PATIENCE)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
        client.connect(("127.0.0.1", port))
        lines = [b"GET /files/%b HTTP/1.1" % name.encode(), b"Host: localhost", *fields, b"", b""]
        client.sendall(b"\r\n".join(lines))
        return client

    @pytest.mark.slow
    def test_honest_reader(self) -> None:
        """Who reads three times as fast as he has to gets everything, whatever waits in which buffer meanwhile."""
        _, port = self.serve(1024, **{"unread-time": 3, "body-rate": 10_000})
        write_sample(self.root / "file", 300_000)
        client = self.slow_reader(port, "file", b"Connection: close")
        got, began = 0, time.monotonic()
        while data := client.recv(3000):
            got += len(data)
            time.sleep(max(0.0, began + got / 30_000 - time.monotonic()))  # the rate of the line
        self.assertGreater(got, 300_000)

    @pytest.mark.slow
    def test_pause_before_the_end(self) -> None:
        """The last bytes of an answer have as long as all others, though the connection is closed behind them."""
        _, port = self.serve(1024, **{"unread-time": 20, "close-time": 0.5})
        # Of one of them the kernel holds all but a little, and the server has written everything.
        sizes = range(140_000, 190_000, 10_000)
        clients = {}
        for size in sizes:
            write_sample(self.root / f"{size}", size)
            clients[size] = self.slow_reader(port, f"{size}", b"Connection: close")
        wait_until(lambda: all(waiting_for(client) > 0 for client in clients.values()), "the kernel held some of each")
        time.sleep(2)  # the pause of a person who changes trains
        for size, client in clients.items():
            self.assertGreater(rest_of(client), size)


@skipUnless(shutil.which("prlimit"), "prlimit (util-linux) is not installed")
class DescriptorTests(FloodCase):
    """More clients than the server may have descriptors."""

    CLIENTS = 200

    def test_only_a_socket(self) -> None:
        """An upload has no file before its bytes are worth a write."""
        server, port = self.serve(1024)
        # Its locks, and the folder of files under way: a start looks for uploads as well.
        wait_until(lambda: len(server.open_beneath(self.root)) == 2, "the start was over")
        before, files = server.descriptors(), server.open_beneath(self.root)
        clients = []
        for number in range(50):
            client = socket.create_connection(("127.0.0.1", port), PATIENCE)
            self.addCleanup(client.close)
            client.sendall(b"PUT /files/%d HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (number, MIB))
            client.sendall(bytes(MIB // 8))
            clients.append(client)
        # The connection by which we asked may be among those before.
        wait_until(lambda: server.descriptors() >= before + len(clients) - 1, "all of them were accepted")
        self.assertEqual(status_of(port), 200)
        self.assertEqual(server.open_beneath(self.root), files)
        for client in clients:
            client.sendall(bytes(MIB // 2))
        wait_until(lambda: len(server.open_beneath(self.root)) == len(files) + len(clients), "each had a file")
        for client in clients:
            client.sendall(bytes(MIB - MIB // 2 - MIB // 8))
            self.assertEqual(client.recv(12), b"HTTP/1.1 201")

    def send_parts(self, port: int, count: int, first: Callable[[int], bytes], rest: bytes) -> Counter[bytes]:
        """Let so many clients send the first part of a request each, and then the rest. Counts their answers."""
        clients = self.connect(port, count)
        for number, client in enumerate(clients):
            client.settimeout(PATIENCE)
            wait_until(lambda client=client: client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0, "it came")
            with contextlib.suppress(ConnectionError):
                client.sendall(first(number))
        said: Counter[bytes] = Counter()
        for client in clients:
            try:
                client.sendall(rest)
                said[client.recv(12)] += 1
            except ConnectionError:
                said[b""] += 1
        return said

    @pytest.mark.slow
    def test_forms_under_way(self) -> None:
        """A form takes most of all: its socket, a folder and a file. All that were let in are stored."""
        server, port = self.serve(400, **{"connections-per-address": 0})
        head = b"POST /files/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        part = b'--b\r\nContent-Disposition: form-data; name="f"; filename="%03d"\r\n\r\n'
        rest = bytes(MIB // 2) + b"\r\n--b--\r\n"
        head += b"Content-Length: %d\r\n\r\n" % (len(part % 0) + MIB // 2 + len(rest))
        said = self.send_parts(port, 150, lambda number: head + part % number + bytes(MIB // 2), rest)
        self.check_under_way(server, said)

    def test_uploads_under_way(self) -> None:
        """Who was let in has descriptors for all of an upload, and the others are told to come again."""
        server, port = self.serve(400, **{"connections-per-address": 0})
        head = b"PUT /files/%d HTTP/1.1\r\nHost: localhost\r\n" + b"Content-Length: %d\r\n\r\n" % MIB
        said = self.send_parts(port, 150, lambda number: head % number + bytes(MIB // 2), bytes(MIB // 2))
        self.check_under_way(server, said)

    def check_under_way(self, server: Server, said: Counter[bytes]) -> None:
        taken = (400 - OWN_DESCRIPTORS) // 3
        # The connection by which we asked first may have been there still.
        self.assertIn(said[b"HTTP/1.1 201"], (taken - 1, taken), said)
        self.assertEqual(len(visible_beneath(self.root)), said[b"HTTP/1.1 201"])
        self.assertEqual(set(said) - {b"HTTP/1.1 201", b"HTTP/1.1 503", b""}, set())
        self.assertGreater(said[b"HTTP/1.1 503"], 0)
        self.assertNotIn("Traceback", server.text)

    @pytest.mark.slow
    def test_no_descriptor_left(self) -> None:
        """In an application that doesn't look after its descriptors: who is connected stays so, and it all passes.

        Uploads are told to come again, the log stays small, and the processor idle.
        """
        port = free_port()
        command = ["prlimit", "--nofile=64", sys.executable, TOP / "examples" / "embed.py", str(port), self.root]
        server = self.enterContext(serving(command, cwd=self.folder, environment={"PYTHONPATH": str(TOP)}))
        kept = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self.addCleanup(kept.close)

        def ask(method: str, path: str, body: bytes | None = None) -> int:
            kept.request(method, path, body)
            response = kept.getresponse()
            response.read()
            return response.status

        wait_until(lambda: server.process.poll() is not None or is_listening(port), "the example listens")
        self.assertEqual(ask("PUT", "/files/first", b"contents"), 201)
        before, lines = server.descriptors(), len(server.log)
        clients = self.connect(port, self.CLIENTS)
        wait_until(lambda: server.descriptors() >= 63, "there was no descriptor left")
        first = ticks(server)
        time.sleep(1)  # over which the processor time is taken
        self.assertLess(ticks(server) - first, os.sysconf("SC_CLK_TCK") / 2)
        self.assertEqual(ask("OPTIONS", "/files/"), 204)
        self.assertEqual(ask("PUT", "/files/second", b"contents"), 503)
        self.assertLess(len(server.log) - lines, 4 * self.CLIENTS)
        for client in clients:
            client.close()
        # A handshake that found no room in the backlog is repeated by the kernel, later and later.
        wait_until(lambda: server.descriptors() <= before, "those of who left were given back", 4 * PATIENCE)
        self.assertEqual(status_of(port), 200)
        self.assertEqual(ask("PUT", "/files/second", b"contents"), 201)
        self.assertEqual(visible_beneath(self.root), ["first", "second"])
        # Twisted's spare descriptor may be taken by a thread in the moment in which it is given away; it goes on.
        self.assertNotIn("Traceback", server.text.replace(f"{SPARE_IS_GONE}\nTraceback", ""))
