"""How a service ends while it is busy: real clients, a real service, its messages on a real socket."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from twisted.trial.unittest import SynchronousTestCase

from tests.crash import prepared
from tests.servers import PATIENCE, Server, script, serving, twistd, visible_beneath, wait_until
from tests.test_running_notify import Manager

BLOCKING = """
import signal, sys, time
def block(number, frame):
    print("blocked", flush=True)
    time.sleep(1000)
signal.signal(signal.SIGUSR1, block)
"""
"""A service whose loop stands from SIGUSR1 on."""


class RunningCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.stack = ExitStack()
        self.addCleanup(self.stack.close)
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="lwstwisted-")))
        self.root = self.folder / "root"
        self.manager = Manager()
        self.addCleanup(self.manager.socket.close)

    def serve(self, *options: str | Path, **environment: str) -> Server:
        """A service of which somebody hears."""
        command = [script("lwstwisted"), "serve", "--root", self.root, *options]
        told = {"NOTIFY_SOCKET": self.manager.address, **environment}
        return self.stack.enter_context(serving(command, cwd=self.folder, environment=told))

    def hear(self, word: str) -> list[list[str]]:
        """Wait for a message that begins so; gives all up to then."""
        heard: list[list[str]] = []

        def has_come() -> bool:
            heard.extend(self.manager.heard())
            return any(message[0].startswith(word) for message in heard)

        wait_until(has_come, f"{word} was heard")
        return heard

    def connect(self, port: int) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.addCleanup(client.close)
        return client

    def begin_put(self, port: int, name: str, length: int) -> socket.socket:
        """A PUT whose body is wanted, and has not come."""
        client = self.connect(port)
        fields = f"Host: localhost\r\nContent-Length: {length}\r\nExpect: 100-continue\r\n"
        client.sendall(f"PUT /files/{name} HTTP/1.1\r\n{fields}\r\n".encode())
        self.assertIn(b" 100 ", client.recv(1000))
        return client

    def answer(self, client: socket.socket) -> http.client.HTTPResponse:
        response = http.client.HTTPResponse(client, method="PUT")
        self.addCleanup(response.close)
        response.begin()
        return response

    def wait_until_refused(self, port: int) -> None:
        def is_refused() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) != 0

        wait_until(is_refused, "nobody listened any more")


class DrainTests(RunningCase):
    """SIGTERM."""

    def test_upload_ends(self) -> None:
        """A plain PUT goes on, and is stored and answered, with word that it is the last; nobody new is let in."""
        server = self.serve("--listen", "tcp:0")
        (port,) = server.wait_for_ports()
        client = self.begin_put(port, "file", 6)
        client.sendall(b"abc")
        server.process.send_signal(signal.SIGTERM)
        self.hear("STOPPING=1")
        self.wait_until_refused(port)
        client.sendall(b"def")
        answer = self.answer(client)
        self.assertEqual((answer.status, answer.headers["Connection"]), (201, "close"))
        self.assertEqual(server.wait(), 0, server.text)
        self.assertEqual((self.root / "file").read_bytes(), b"abcdef")
        self.assertEqual(len(re.findall('"PUT /files/file HTTP/1.1" 201', server.text)), 1, "it is in the log as well")

    def test_access_log(self) -> None:
        """A request that ends while the service stops is in the access log, though nobody listens any more."""
        log = self.folder / "log"
        server = self.serve("--listen", "tcp:0", "--access-log", log)
        (port,) = server.wait_for_ports()
        client = self.begin_put(port, "file", 1)
        server.process.send_signal(signal.SIGTERM)
        self.wait_until_refused(port)
        client.sendall(b"x")
        self.assertEqual(self.answer(client).status, 201)
        self.assertEqual(server.wait(), 0, server.text)
        self.assertIn('"PUT /files/file HTTP/1.1" 201', log.read_text())

    def test_reload(self) -> None:
        """SIGHUP: the access log goes on in a new file, when its old one was moved away."""
        log = self.folder / "log"
        server = self.serve("--listen", "tcp:0", "--access-log", log)
        (port,) = server.wait_for_ports()
        self.hear("READY=1")
        log.rename(self.folder / "old")
        server.process.send_signal(signal.SIGHUP)
        words = [message[0] for message in self.hear("READY=1")]
        self.assertEqual([word for word in words if "STATUS" not in word], ["RELOADING=1", "READY=1"])
        client = self.begin_put(port, "file", 1)
        client.sendall(b"x")
        self.assertEqual(self.answer(client).status, 201)
        wait_until(lambda: "PUT /files/file" in log.read_text(), "it was in the new file")

    def test_limit(self) -> None:
        """What takes longer is refused: its client hears when to come again, and nothing of it is left."""
        server = self.serve("--listen", "tcp:0", "--drain-time", "0.2")
        (port,) = server.wait_for_ports()
        client = self.begin_put(port, "file", 6)
        client.sendall(b"abc")
        server.process.send_signal(signal.SIGTERM)
        answer = self.answer(client)
        self.assertEqual((answer.status, answer.headers["Retry-After"]), (503, "1"))
        client.close()
        self.assertEqual(server.wait(), 0, server.text)
        self.assertEqual(visible_beneath(self.root), [])
        self.assertNotIn("Traceback", server.text)

    def test_second_signal(self) -> None:
        """Whoever asks again doesn't wait: as at the limit."""
        server = self.serve("--listen", "tcp:0", "--drain-time", "3600")
        (port,) = server.wait_for_ports()
        client = self.begin_put(port, "file", 6)
        server.process.send_signal(signal.SIGTERM)
        self.wait_until_refused(port)
        server.process.send_signal(signal.SIGINT)
        self.assertEqual(self.answer(client).status, 503)
        client.close()
        self.assertEqual(server.wait(), 0, server.text)

    def test_connections_without_a_request(self) -> None:
        """A request on its way is answered, on a new connection and on one that is kept alive; then all are closed."""
        server = self.serve("--listen", "tcp:0", "--drain-time", "3600")
        (port,) = server.wait_for_ports()
        fresh, kept, idle = self.connect(port), self.connect(port), self.connect(port)
        request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for client in (kept, idle):  # and the one that came before them is accepted as well
            client.sendall(request)
            self.assertIn(b"alive\n", client.recv(1000))
        server.process.send_signal(signal.SIGSTOP)  # so that all of this is on its way when it hears of its end
        server.process.send_signal(signal.SIGTERM)
        fresh.sendall(request)
        kept.sendall(request)
        server.process.send_signal(signal.SIGCONT)
        for client in (fresh, kept):
            self.assertEqual(self.answer(client).status, 200)
            self.assertEqual(client.recv(100), b"")
        self.assertEqual(idle.recv(100), b"")
        self.assertEqual(server.wait(), 0, server.text)


class NotifyTests(RunningCase):
    """What systemd would hear."""

    def test_order(self) -> None:
        """Ready when it listens, stopping before it doesn't, and what it does in between."""
        for options in ((), ("--workers", "2")):
            server = self.serve("--listen", "tcp:0", *options)
            heard = self.hear("READY=1")
            self.assertEqual([message[0] for message in heard], ["READY=1"], options)
            (port,) = server.wait_for_ports()
            self.connect(port).close()
            server.process.send_signal(signal.SIGHUP)
            heard = self.hear("READY=1")
            server.process.send_signal(signal.SIGTERM)
            self.assertEqual(server.wait(), 0, server.text)
            heard += self.manager.heard()
            words = [message[0] for message in heard if not message[0].startswith("STATUS=")]
            self.assertEqual(words, ["RELOADING=1", "READY=1", "STOPPING=1"], options)
            self.assertRegex(heard[-1][1], r"^STATUS=(2 of 2 workers, )?\d connections, 0 requests under way$")

    def test_never_ready(self) -> None:
        """One that can't serve never says that it does, and its status tells: alone, and with workers."""
        (self.folder / "root").write_bytes(b"")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            busy = f"tcp:{taken.getsockname()[1]}"
            for options in ((), ("--workers", "2")):
                for listen in ("tcp:0", busy):
                    server = self.serve("--listen", listen, *options)
                    self.assertEqual(server.wait(), 1, server.text)
                    self.assertNotIn("READY=1", [message[0] for message in self.manager.heard()])

    def test_watchdog(self) -> None:
        """It is fed while the loop turns, and from the moment on in which it stands it is not."""
        command = prepared(twistd("--root", self.root, "--listen", "tcp:0"), BLOCKING)
        environment = {"NOTIFY_SOCKET": self.manager.address, "WATCHDOG_USEC": "40000"}
        server = self.stack.enter_context(serving(command, cwd=self.folder, environment=environment))
        for _ in range(3):
            self.hear("WATCHDOG=1")
        server.process.send_signal(signal.SIGUSR1)
        server.wait_for("blocked")
        self.manager.heard()
        self.manager.socket.settimeout(0.5)
        self.assertRaises(TimeoutError, self.manager.socket.recv, 1000)


class SocketTests(RunningCase):
    """A socket of systemd outlives the service, be it one with a name in the file system."""

    HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="http")
os.execv(sys.argv[2], sys.argv[2:])
"""

    def test_unix_socket(self) -> None:
        """Its name, mode and queue are as before when the service ends, and the next one serves on it."""
        path = self.folder / "socket"
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            path.chmod(0o620)
            listening.listen(200)
            for options in ((), ("--workers", "2"), ()):
                words = [script("lwstwisted"), "serve", "--root", self.root]
                words += ["--listen", "systemd:domain=UNIX:name=http", *options]
                command = [sys.executable, "-c", self.HAND_OVER, str(listening.fileno()), *words]
                environment = {"NOTIFY_SOCKET": self.manager.address}
                descriptors = [listening.fileno()]
                with serving(command, cwd=self.folder, environment=environment, descriptors=descriptors) as server:
                    self.hear("READY=1")
                    with socket.socket(socket.AF_UNIX) as client:
                        client.settimeout(PATIENCE)
                        client.connect(str(path))
                        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                        self.assertIn(b" 200 ", client.recv(1000))
                    self.assertEqual(server.end(), 0, server.text)
                self.manager.heard()
                self.assertEqual(path.stat().st_mode & 0o777, 0o620)
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(path))  # it waits for the next service
                listening.setblocking(False)
                listening.accept()[0].close()


@pytest.mark.slow
class OrphanTests(RunningCase):
    """Nobody serves behind the back of a service manager."""

    def test_parent_is_killed(self) -> None:
        """Workers whose parent has died stop by themselves."""
        server = self.serve("--listen", "tcp:0", "--workers", "2")
        (port,) = server.wait_for_ports()
        pids = [int(pid) for pid in server.wait_for(r"worker \d started: process (\d+)", 2)]
        self.hear("READY=1")
        os.kill(server.process.pid, signal.SIGKILL)
        self.wait_until_refused(port)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the workers had ended")
