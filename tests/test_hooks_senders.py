"""Hooks are reached: programs that are really run, and servers that really answer, fail, hang and go away."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import tempfile
from collections.abc import Callable, Coroutine
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

from OpenSSL.crypto import FILETYPE_PEM, load_certificate
from twisted.internet.defer import Deferred
from twisted.internet.ssl import Certificate, trustRootFromCertificates
from twisted.internet.task import Clock, deferLater
from twisted.trial.unittest import TestCase
from twisted.web.client import BrowserLikePolicyForHTTPS

from lwstwisted.certificate import ensure_development_certificate
from lwstwisted.hooks.command import CommandSender
from lwstwisted.hooks.events import Cause, Upload
from lwstwisted.hooks.http import HttpSender
from lwstwisted.hooks.messages import message
from lwstwisted.hooks.names import Hook
from lwstwisted.hooks.senders import Unfit, Unreachable

HANG = "hang"
CUT = "cut"
Behaviour = tuple[int, bytes] | str
"""Status and content; or to be silent until the server ends, or to close the connection without an answer."""


class HookServer:
    """A server in threads of its own: the service under test may do what it likes with its reactor.

    :ivar answer: what to answer to a message; changed by tests.
    :ivar told: all messages that came, in their order.
    :ivar fields: the fields of the requests that brought them.
    """

    def __init__(self, certificate: Path | None = None) -> None:
        self.answer: Callable[[dict[str, Any]], Behaviour] = lambda told: (200, b"{}")
        self.told: list[dict[str, Any]] = []
        self.fields: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.port = 0
        self._certificate = certificate
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{'https' if self._certificate else 'http'}://127.0.0.1:{self.port}/hooks?a=b"

    def start(self) -> HookServer:
        """Listen; on the same port as before, if there was one."""
        server, ended, connections = self, Event(), set[socket.socket]()

        class Handler(BaseHTTPRequestHandler):
            """One connection."""

            def setup(self) -> None:
                super().setup()
                connections.add(self.connection)

            def do_POST(self) -> None:
                told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.told.append(told)
                server.fields.append({name: ", ".join(self.headers.get_all(name) or ()) for name in self.headers})
                server.paths.append(self.path)
                answer = server.answer(told)
                if isinstance(answer, str):
                    if answer == HANG:
                        ended.wait(60)
                    self.close_connection = True
                    return
                self.send_response(answer[0])
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer[1])))
                self.end_headers()
                self.wfile.write(answer[1])

            def log_message(self, format: str, *args: object) -> None:
                """Not to standard error."""

        class Server(ThreadingHTTPServer):
            """One that doesn't mind connections that are cut."""

            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that left is none of our business."""

        self._server = Server(("127.0.0.1", self.port), Handler)
        if self._certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._certificate)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = self._server.server_address[1]
        self._ended, self._connections = ended, connections
        self._thread = Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def stop(self) -> None:
        """Be gone, with all connections; may be repeated."""
        if self._server is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._server = None
        self._ended.set()
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def types(self) -> list[str]:
        """The events that were told."""
        return [told["Type"] for told in list(self.told)]


def deferred(work: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., Deferred[None]]:
    """A test that is a coroutine."""

    def run(case: Any) -> Deferred[None]:
        return Deferred.fromCoroutine(work(case))

    run.__name__, run.__doc__ = work.__name__, work.__doc__
    return run


class Timed:
    """A reactor whose time is a clock's."""

    def __init__(self, reactor: Any, clock: Clock) -> None:
        self.spawnProcess = reactor.spawnProcess
        self.callLater = clock.callLater


UPLOAD = Upload("abc", 7, 3, {"filename": "n"}, at=("n",))


def text(hook: Hook, cause: Cause | None = None) -> str:
    return message(hook, UPLOAD, cause or Cause(), Path("/root"))


class CommandTests(TestCase):
    """Programs of a folder."""

    timeout = 20

    def setUp(self) -> None:
        from twisted.internet import reactor

        self.folder = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, self.folder)
        self.reactor = reactor
        self.sender = CommandSender(self.folder, reactor, 10.0, 5120)

    def write(self, hook: Hook, script: str, mode: int = 0o755) -> None:
        path = self.folder / hook.value
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(mode)

    async def assert_fails(self, kind: type[Exception], why: str) -> None:
        try:
            said = await self.sender.send(Hook.PRE_CREATE, text(Hook.PRE_CREATE), False)
        except kind as failure:
            self.assertIn(why, str(failure))
        else:
            self.fail(f"it succeeded, with {said!r}")

    @deferred
    async def test_what_a_program_gets(self) -> None:
        """The message on standard input, three variables, the folder of hooks to work in, and the rest of our own."""
        self.write(Hook.POST_FINISH, 'cat > got; echo "$TUS_ID $TUS_SIZE $TUS_OFFSET $PWD $PATH" > env; printf "{}"')
        said = await self.sender.send(Hook.POST_FINISH, text(Hook.POST_FINISH), True)
        self.assertEqual(said, b"{}")
        self.assertEqual((self.folder / "got").read_text(), text(Hook.POST_FINISH))
        self.assertEqual((self.folder / "env").read_text(), f"abc 7 3 {self.folder} {os.environ['PATH']}\n")

    @deferred
    async def test_no_program(self) -> None:
        """An event without a program is nobody's, and not a failure."""
        self.write(Hook.PRE_CREATE, "exit 0")
        self.assertEqual([self.sender.wants(hook) for hook in (Hook.PRE_CREATE, Hook.PRE_FINISH)], [True, False])
        self.assertEqual(await self.sender.send(Hook.PRE_FINISH, text(Hook.PRE_FINISH), False), b"")

    @deferred
    async def test_failures(self) -> None:
        """An exit status, a signal, a file that is no program: each is told as what it is."""
        self.write(Hook.PRE_CREATE, "echo because; exit 3")
        await self.assert_fails(Unfit, "ended with status 3: 'because\\n'")
        self.write(Hook.PRE_CREATE, "kill -9 $$")
        await self.assert_fails(Unfit, "signal 9")
        self.write(Hook.PRE_CREATE, "exit 0", 0o644)
        await self.assert_fails(Unfit, "may not be executed")

    @deferred
    async def test_hangs(self) -> None:
        """A program that takes too long is killed, and what it has started is not waited for."""
        self.write(Hook.PRE_CREATE, "sleep 60 & echo $$ $! > pids.new; mv pids.new pids; wait")
        clock = Clock()
        self.sender._reactor = Timed(self.reactor, clock)
        failing = Deferred.fromCoroutine(self.assert_fails(Unreachable, "took longer than 10 seconds"))
        while not (self.folder / "pids").exists():
            await deferLater(self.reactor, 0.01)
        clock.advance(9.9)
        self.assertNoResult(failing)
        clock.advance(0.2)
        await failing
        pid, child = map(int, (self.folder / "pids").read_text().split())
        os.kill(child, 9)
        self.assertRaises(ProcessLookupError, os.kill, pid, 0)

    @deferred
    async def test_says_too_much(self) -> None:
        """A program that doesn't stop talking is killed."""
        self.write(Hook.PRE_CREATE, "while :; do echo aaaaaaaaaaaaaaaa; done")
        await self.assert_fails(Unreachable, "said more than 5120 bytes")

    @deferred
    async def test_reads_nothing(self) -> None:
        """A program that doesn't care for a long message may close its standard input."""
        self.write(Hook.PRE_CREATE, 'exec 0<&-; printf "{}"')
        long = message(Hook.PRE_CREATE, Upload(metadata={"a": "x" * 1_000_000}), Cause(), Path("/"))
        self.assertEqual(await self.sender.send(Hook.PRE_CREATE, long, False), b"{}")


class HttpTests(TestCase):
    """A server."""

    timeout = 30

    def setUp(self) -> None:
        from twisted.internet import reactor

        self.reactor = reactor
        self.server = HookServer().start()
        self.addCleanup(self.server.stop)

    def sender(self, **settings: Any) -> HttpSender:
        wanted = {"forwarded": (), "tries": 3, "backoff": 0.01, "timeout": 10.0, "size_limit": 5120, **settings}
        return HttpSender(wanted.pop("url", self.server.url), self.reactor, **wanted)

    async def assert_fails(self, kind: type[Exception], why: str, is_told: bool = False, **settings: Any) -> None:
        try:
            said = await self.sender(**settings).send(Hook.PRE_CREATE, text(Hook.PRE_CREATE), is_told)
        except kind as failure:
            self.assertIn(why, str(failure))
        else:
            self.fail(f"it succeeded, with {said!r}")

    def answers(self, *behaviours: Behaviour) -> None:
        left = list(behaviours)
        self.server.answer = lambda told: left.pop(0) if len(left) > 1 else left[0]
        self.server.told.clear()

    @deferred
    async def test_what_a_server_gets(self) -> None:
        """A POST of the message to the whole URL, as JSON, and what it answers."""
        self.answers((200, b'{"RejectUpload": true}'))
        said = await self.sender().send(Hook.PRE_CREATE, text(Hook.PRE_CREATE), False)
        self.assertEqual(said, b'{"RejectUpload": true}')
        self.assertEqual((self.server.told, self.server.paths), ([json.loads(text(Hook.PRE_CREATE))], ["/hooks?a=b"]))
        self.assertEqual(self.server.fields[0]["Content-Type"], "application/json")

    @deferred
    async def test_forwarded_fields(self) -> None:
        """Fields that are to be forwarded come with the request of the event as well, each value; no other one does,
        and none that would break that request."""
        headers = {"Cookie": ["a=b"], "X-Me": ["1", "2"], "X-Other": ["3"], "Content-Length": ["99"], "Host": ["evil"]}
        sender = self.sender(forwarded=("cookie", "X-ME", "Content-Length", "Host", "X-Missing"))
        await sender.send(Hook.PRE_CREATE, text(Hook.PRE_CREATE, Cause(headers=headers)), False)
        fields = self.server.fields[0]
        self.assertEqual((fields["Cookie"], fields["X-Me"]), ("a=b", "1, 2"))
        self.assertEqual(fields["Host"], f"127.0.0.1:{self.server.port}")
        self.assertFalse({"X-Other", "X-Missing"} & fields.keys())

    @deferred
    async def test_tries(self) -> None:
        """5xx, and a connection that is cut, are tried three times in all; who only tells tries once."""
        self.answers((500, b"x"), CUT, (200, b"{}"))
        self.assertEqual(await self.sender().send(Hook.PRE_CREATE, text(Hook.PRE_CREATE), False), b"{}")
        self.assertEqual(len(self.server.told), 3)
        self.answers((503, b"down"))
        await self.assert_fails(Unreachable, "status 503: 'down'")
        self.assertEqual(len(self.server.told), 3)
        self.answers((500, b""))
        await self.assert_fails(Unreachable, "status 500", is_told=True)
        self.assertEqual(len(self.server.told), 1)

    @deferred
    async def test_wrong_answers(self) -> None:
        """Another status, a redirection, an empty or endless response can't be gone by, and are not tried again."""
        for answer, why in (
            ((404, b"where?"), "status 404: 'where?'"), ((302, b""), "status 302"),
            ((200, b""), "empty"), ((200, b" " * 5121), "more than 5120 bytes"),
        ):  # fmt: skip
            self.answers(answer)
            await self.assert_fails(Unfit, why)
            self.assertEqual(len(self.server.told), 1, why)
        self.answers((200, b" " * 5120))
        self.assertEqual(len(await self.sender().send(Hook.PRE_CREATE, text(Hook.PRE_CREATE), False)), 5120)

    @deferred
    async def test_any_success_does_for_what_is_told(self) -> None:
        """Who was told says so by the status; what else it says doesn't matter."""
        for answer in ((200, b""), (202, b"junk"), (200, b"x" * 50_000)):
            self.answers(answer)
            await self.sender().send(Hook.POST_FINISH, text(Hook.POST_FINISH), True)

    @deferred
    async def test_hangs(self) -> None:
        """A server that says nothing costs one time limit, however many tries there would be."""
        self.answers(HANG)
        sender, clock = self.sender(), Clock()
        sender._reactor = clock
        sending = Deferred.fromCoroutine(sender.send(Hook.PRE_CREATE, text(Hook.PRE_CREATE), False))
        while not self.server.told:
            await deferLater(self.reactor, 0.01)
        clock.advance(9.9)
        self.assertNoResult(sending)
        clock.advance(0.2)
        failure = await self.assertFailure(sending, Unreachable)
        self.assertIn("no answer came in 10 seconds", str(failure))
        self.assertEqual((len(self.server.told), clock.getDelayedCalls()), (1, []))

    @deferred
    async def test_nobody_listens(self) -> None:
        """A server that isn't there is told from one that is wrong."""
        self.server.stop()
        await self.assert_fails(Unreachable, "refused")

    @deferred
    async def test_certificates(self) -> None:
        """https:// is for servers whose certificate is trusted, and for no other one."""
        folder = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, folder)
        path = ensure_development_certificate(folder / "c.pem")
        server = HookServer(path).start()
        self.addCleanup(server.stop)
        await self.assert_fails(Unreachable, "certificate verify failed", url=server.url, tries=1)
        self.assertEqual(server.told, [])
        root = Certificate(load_certificate(FILETYPE_PEM, path.read_bytes()))
        policy = BrowserLikePolicyForHTTPS(trustRootFromCertificates([root]))
        sender = self.sender(url=server.url, policy=policy)
        self.assertEqual(await sender.send(Hook.PRE_CREATE, text(Hook.PRE_CREATE), False), b"{}")
