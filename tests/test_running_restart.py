"""Fifty uploads go on while the service is restarted, replaced or killed beneath them, and nobody is turned away.

Each upload is sent in stages. No client begins a stage before the service was ended once more, so that every upload is
in the middle of a request each time; a client that is cut asks how far it came, as clients of tus do, and goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import shutil
import signal
import socket
import sys
import tempfile
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from unittest import skipUnless

import pytest
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.certificate import ensure_development_certificate
from tests.servers import PATIENCE, Server, free_port, script, serving, tls_endpoint, wait_until
from tests.test_running_notify import Manager

CLIENTS = 50
STAGE = 48 * 1024 + 1
"""Bytes of one stage: no multiple of any block."""

RESTARTING = """
import os, signal, subprocess, sys
def serve():
    os.environ.update(LISTEN_PID=str(os.getpid()))
environment = {name: os.environ[name] for name in ("LISTEN_FDS", "LISTEN_FDNAMES")}
assert environment == {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "http"}, environment
running, is_over = None, False
def end(*_):
    global is_over
    is_over = True
    running.terminate()
signal.signal(signal.SIGTERM, end)
while not is_over:
    running = subprocess.Popen(sys.argv[1:], preexec_fn=serve, pass_fds=[3], env=None)
    print("service", running.pid, flush=True)
    status = running.wait()
sys.exit(status)
"""
"""What a service manager does with ``Restart=always``. It holds the socket, which it has from systemd itself."""


class Upload(Thread):
    """One client.

    :ivar counts: of what happened to it.
    """

    def __init__(self, port: int, number: int, stages: list[Event]) -> None:
        super().__init__(daemon=True)
        self.name_of_file = f"file-{number}"
        self.content = os.urandom(STAGE * len(stages))
        self.counts: Counter[str] = Counter()
        self.sent = 0
        self.failure: BaseException | None = None
        self._port = port
        self._stages = stages
        self._path = ""
        self._offset = 0

    def run(self) -> None:
        try:
            self._path = self._begin()
            while not self._go_on():
                pass
        except BaseException as failure:
            self.failure = failure

    def _request(self, method: str, path: str, **fields: str) -> http.client.HTTPConnection:
        client = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        client.putrequest(method, path)
        for name, value in {"Tus-Resumable": "1.0.0", **fields}.items():
            client.putheader(name.replace("_", "-"), value)
        client.endheaders()
        return client

    def _ask(self, method: str, path: str, **fields: str) -> http.client.HTTPResponse:
        """A request without content, until somebody answers it."""
        while True:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError, http.client.HTTPException):
                client = self._request(method, path, **fields)
                with contextlib.closing(client):
                    answer = client.getresponse()
                    answer.read()
                if answer.status != 503:
                    return answer
            self.counts["asked again"] += 1

    def _begin(self) -> str:
        name = "filename " + b64encode(self.name_of_file.encode()).decode()
        fields = {"Upload_Length": str(len(self.content)), "Upload_Metadata": name, "Content_Length": "0"}
        answer = self._ask("POST", "/uploads/", **fields)
        assert answer.status == 201, answer.status
        return str(answer.headers["Location"])

    def _go_on(self) -> bool:
        """Send what is missing. Returns whether the upload is whole."""
        answer = self._ask("HEAD", self._path)
        assert answer.status == 200, answer.status
        offset = int(answer.headers["Upload-Offset"])
        assert offset >= self._offset, "an offset went down"
        self.counts["kept"] += offset > self._offset
        self._offset = offset
        if offset == len(self.content):
            return True
        client = self._request(
            "PATCH",
            self._path,
            Content_Type="application/offset+octet-stream",
            Content_Length=str(len(self.content) - offset),
            Upload_Offset=str(offset),
        )
        with contextlib.closing(client):
            try:
                self._send(client, offset)
            except (ConnectionResetError, BrokenPipeError):
                pass  # there may be an answer none the less
            try:
                status = client.getresponse().status
            except (ConnectionError, http.client.HTTPException):
                self.counts["cut"] += 1
                return False
        self.counts[str(status)] += 1
        assert status in (204, 409, 423, 503), status
        return status == 204

    def _send(self, client: http.client.HTTPConnection, offset: int) -> None:
        while offset < len(self.content):
            stage = offset // STAGE
            assert self._stages[stage].wait(4 * PATIENCE)
            end = STAGE * (stage + 1)
            client.send(self.content[offset:end])
            offset = end
            self.sent = max(self.sent, offset)


class RestartCase(SynchronousTestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.root = self.folder / "root"
        self.manager = Manager()
        self.addCleanup(self.manager.socket.close)

    def upload_through(self, port: int, changes: list[Callable[[], object]]) -> Counter[str]:
        """Run all clients, with a change in the middle of their requests behind each stage but the last.

        :returns: what happened to them.
        """
        stages = [Event() for _ in range(len(changes) + 1)]
        stages[0].set()
        clients = [Upload(port, number, stages) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        for number, change in enumerate(changes, 1):
            sent = number * STAGE
            wait_until(
                lambda sent=sent: all(client.sent >= sent or client.failure for client in clients),
                f"all had sent {number} stages",
                4 * PATIENCE,
            )
            change()
            stages[number].set()
        for client in clients:
            client.join(4 * PATIENCE)
        self.assertEqual([client.failure for client in clients if client.failure or client.is_alive()], [])
        for client in clients:
            stored = hashlib.sha256((self.root / client.name_of_file).read_bytes()).digest()
            self.assertEqual(stored, hashlib.sha256(client.content).digest())
        self.assertEqual(os.listdir(self.root / ".lwstwisted" / "partial"), [])
        return sum((client.counts for client in clients), Counter())

    def wait_for_words(self, *words: str) -> None:
        """Hear these words, in this order, behind whatever was said before."""
        left = list(words)

        def have_come() -> bool:
            for message in self.manager.heard():
                if left and message[0] == left[0]:
                    left.pop(0)
            return not left

        wait_until(have_come, f"{words} were heard", 4 * PATIENCE)


@pytest.mark.slow
@skipUnless(shutil.which("systemd-socket-activate"), "systemd-socket-activate is not installed")
class SystemdTests(RestartCase):
    """The socket is systemd's."""

    def test_restarts(self) -> None:
        """Five restarts: nobody is refused, and no upload is lost."""
        port = free_port()
        service = [script("lwstwisted"), "serve", "--root", self.root, "--listen", "systemd:domain=INET:name=http"]
        activate = ["systemd-socket-activate", f"--listen=127.0.0.1:{port}", "--fdname=http"]
        activate += [f"--setenv={name}={value}" for name, value in os.environ.items() if name.startswith("PYTHON")]
        activate += [f"--setenv=NOTIFY_SOCKET={self.manager.address}", "--setenv=PATH=" + os.environ["PATH"]]
        command = [*activate, sys.executable, "-c", RESTARTING, *service, "--drain-time", "0.1"]
        with serving(command, cwd=self.folder) as server:
            server.wait_for(r"Listening on")

            def restart() -> None:
                pid = int(server.wait_for(r"service (\d+)", self.restarts + 1)[-1])
                self.restarts += 1
                self.wait_for_words("READY=1")
                os.kill(pid, signal.SIGTERM)
                self.wait_for_words("STOPPING=1")  # whoever comes from now on waits for the next one

            self.restarts = 0
            counts = self.upload_through(port, [restart] * 5)
            self.assertEqual(server.end(), 0, server.text)
        self.assertNotIn("Traceback", server.text)
        # All but those whose connection still waited for the next service: it has the bytes that they sent.
        self.assertGreater(counts["503"] + counts["cut"], CLIENTS, counts)
        # And so is what those sent that were told to come again: they go on behind it.
        self.assertGreater(counts["kept"], CLIENTS, counts)
        self.assertEqual(counts["204"], CLIENTS)


@pytest.mark.slow
class WorkersTests(RestartCase):
    """The socket is a parent's."""

    @contextlib.contextmanager
    def workers(self) -> Iterator[tuple[Server, int]]:
        command = [script("lwstwisted"), "serve", "--root", self.root, "--listen", "tcp:0", "--workers", "2"]
        environment = {"NOTIFY_SOCKET": self.manager.address}
        with serving([*command, "--drain-time", "0.1"], cwd=self.folder, environment=environment) as server:
            self.wait_for_words("READY=1")
            yield server, server.wait_for_ports()[0]

    def pids(self, server: Server, count: int) -> list[int]:
        return [int(pid) for pid in server.wait_for(r"worker \d+ started: process (\d+)", count)]

    def test_hand_over(self) -> None:
        """All workers are replaced, three times over; and with a worker that is killed there is another one."""
        with self.workers() as (server, port):
            started = 2

            def replace() -> None:
                nonlocal started
                server.process.send_signal(signal.SIGUSR2)
                started += 2
                gone = self.pids(server, started)[started - 4 : started - 2]
                wait_until(lambda: not any(map(is_alive, gone)), "the old ones had ended", 4 * PATIENCE)

            def kill() -> None:
                nonlocal started
                started += 1
                os.kill(self.pids(server, started - 1)[-1], signal.SIGKILL)
                self.pids(server, started)

            counts = self.upload_through(port, [replace, kill, replace])
            self.assertEqual(server.end(), 0, server.text)
        self.assertEqual(server.text.count("ended by itself"), 1)
        self.assertNotIn("Traceback", server.text)
        self.assertEqual(counts["204"], CLIENTS)

    def test_worker_that_hangs(self) -> None:
        """One whose loop stands is killed and replaced; the other one serves meanwhile."""
        command = [script("lwstwisted"), "serve", "--root", self.root, "--listen", "tcp:0", "--workers", "2"]
        environment = {"NOTIFY_SOCKET": self.manager.address, "WATCHDOG_USEC": "5000000"}
        with serving(command, cwd=self.folder, environment=environment) as server:
            self.wait_for_words("READY=1")
            hanging = self.pids(server, 2)[0]
            os.kill(hanging, signal.SIGSTOP)
            self.pids(server, 3)
            self.assertFalse(is_alive(hanging))
            self.assertIn(f"hangs: process {hanging} is killed", server.text)
            port = server.wait_for_ports()[0]
            for _ in range(10):
                self.serves(port)
            self.assertEqual(server.end(), 0, server.text)


    def test_new_one_is_broken(self) -> None:
        """A new program or configuration that doesn't start changes nothing: the old workers stay, and serve."""
        pair = ensure_development_certificate(self.folder / "pair.pem")
        listen = ("--listen", "tcp:0", "--listen", tls_endpoint(pair))
        command = [script("lwstwisted"), "serve", "--root", self.root, *listen, "--workers", "2"]
        with serving(command, cwd=self.folder, environment={"NOTIFY_SOCKET": self.manager.address}) as server:
            self.wait_for_words("READY=1")
            pids = self.pids(server, 2)
            pair.unlink()
            server.process.send_signal(signal.SIGUSR2)
            server.wait_for("worker 1 stays")
            server.process.send_signal(signal.SIGHUP)
            self.wait_for_words("RELOADING=1", "READY=1")
            self.assertEqual(server.text.count("started: process"), 3, "the first one that is broken is the last")
            self.assertTrue(all(map(is_alive, pids)))
            self.serves(server.wait_for_ports()[0])
            self.assertEqual(server.end(), 0, server.text)

    def serves(self, port: int) -> None:
        """A request is answered."""
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            self.assertIn(b" 200 ", client.recv(1000))


def is_alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
