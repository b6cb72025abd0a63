"""The examples of embedding run as programs: uploads arrive as a stream, and the other resources work as ever."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.servers import PATIENCE, Server, free_port, is_listening, serving, visible_beneath, wait_until

TOP = Path(__file__).parent.parent
MAX_SIZE = 2**20
INSTALL = "import runpy; from twisted.internet.{0} import install; install(); runpy.run_path({1!r})"
"""Runs an example on a reactor that it doesn't choose."""


class EmbeddingMixin:
    """What both examples have in common."""

    EXAMPLE = ""

    @contextmanager
    def running(self, reactor: str = "") -> Iterator[tuple[Server, int, Path]]:
        """The example as a program: the server, its port, and the folder of its files."""
        script, port = TOP / "examples" / self.EXAMPLE, free_port()
        program = ["-c", INSTALL.format(reactor, str(script))] if reactor else [str(script)]
        with tempfile.TemporaryDirectory(prefix="lwstwisted-") as name:
            folder = Path(name) / "files"
            command = [sys.executable, *program, str(port), str(folder)]
            with serving(command, cwd=Path(name), environment={"PYTHONPATH": str(TOP)}) as server:
                wait_until(lambda: server.process.poll() is not None or is_listening(port), "the example listens")
                assert server.process.poll() is None, server.text
                yield server, port, folder

    def ask(self, port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def read_answer(client: socket.socket) -> bytes:
    """The head of the next answer."""
    said = b""
    while b"\r\n\r\n" not in said:
        data = client.recv(65536)
        assert data, said
        said += data
    return said


class EmbedTests(EmbeddingMixin, SynchronousTestCase):
    """``examples/embed.py``."""

    EXAMPLE = "embed.py"

    def test_ends(self) -> None:
        """It ends when it is told to, in the middle of an upload as well, and leaves nothing of that."""
        for how in (signal.SIGINT, signal.SIGTERM):
            with (
                self.running() as (server, port, folder),
                socket.create_connection(("127.0.0.1", port), PATIENCE) as client,
            ):
                client.sendall(b"PUT /files/f HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % MAX_SIZE)
                client.sendall(bytes(MAX_SIZE // 2))
                wait_until(lambda folder=folder, server=server: server.open_beneath(folder / "."), "it was begun")
                server.end(how)
                self.assertEqual(visible_beneath(folder), [])
                self.assertNotIn("Traceback", server.text)

    def test_beside_the_application(self) -> None:
        """The application has its paths, the uploads have theirs, and what is fetched is what was sent."""
        with self.running() as (_, port, folder):
            sent = os.urandom(MAX_SIZE)
            self.assertEqual(self.ask(port, "GET", "/"), (200, b"the application\n"))
            self.assertEqual(self.ask(port, "PUT", "/files/a/b", sent)[0], 201)
            self.assertEqual((folder / "a" / "b").read_bytes(), sent)
            self.assertEqual(self.ask(port, "GET", "/files/a/b"), (200, sent))

    def test_refused_before_the_body(self) -> None:
        """Too large an upload has its answer when nothing of it was sent: nobody waits for a body to refuse it."""
        with (
            self.running() as (_, port, folder),
            socket.create_connection(("127.0.0.1", port), PATIENCE) as client,
        ):
            client.sendall(b"PUT /files/f HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (MAX_SIZE + 1))
            self.assertTrue(read_answer(client).startswith(b"HTTP/1.1 413 "))
            self.assertFalse((folder / "f").exists())

    def test_not_spooled(self) -> None:
        """While a body arrives it is in the store's own unfinished file, and in no other one."""
        with (
            self.running() as (server, port, folder),
            socket.create_connection(("127.0.0.1", port), PATIENCE) as client,
        ):
            sent = os.urandom(MAX_SIZE)
            client.sendall(b"PUT /files/f HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % MAX_SIZE)
            client.sendall(sent[: MAX_SIZE // 2])

            def written() -> int:
                return sum(path.stat().st_size for path in open_files(server) if folder in target(path).parents)

            # The store writes what is worth a write; the rest is in memory.
            wait_until(lambda: written() >= MAX_SIZE // 4, "a part of the body was in the store")
            others = [target(path) for path in open_files(server) if folder not in target(path).parents]
            self.assertEqual([path for path in others if path.is_relative_to(tempfile.gettempdir())], [])
            self.assertFalse((folder / "f").exists())
            client.sendall(sent[MAX_SIZE // 2 :])
            self.assertTrue(read_answer(client).startswith(b"HTTP/1.1 201 "))
            self.assertEqual((folder / "f").read_bytes(), sent)

    def test_on_any_reactor(self) -> None:
        """Whatever reactor the application has installed."""
        for reactor in ("pollreactor", "asyncioreactor"):
            with self.subTest(reactor), self.running(reactor) as (_, port, folder):
                self.assertEqual(self.ask(port, "PUT", "/files/f", b"contents")[0], 201)
                self.assertEqual((folder / "f").read_bytes(), b"contents")


class EmbedKleinTests(EmbedTests):
    """``examples/embed_klein.py``."""

    EXAMPLE = "embed_klein.py"

    def test_routes(self) -> None:
        """klein's routes have their bodies, methods and errors as under a stock ``Site``."""
        with self.running() as (_, port, _folder):
            self.assertEqual(self.ask(port, "POST", "/echo", b"body" * 50_000), (200, b"body" * 50_000))
            self.assertEqual(self.ask(port, "GET", "/echo")[0], 405)
            self.assertEqual(self.ask(port, "GET", "/none")[0], 404)


def open_files(server: Server) -> list[Path]:
    """The regular files that a server has open, under ``/proc``; also those without a name."""
    return [path for path in Path(f"/proc/{server.process.pid}/fd").iterdir() if path.is_file()]


def target(path: Path) -> Path:
    """What a link says, be it there or not."""
    return Path(os.readlink(path))
