"""The examples run, and show what they say: a loop of one's own, and the documentation for whoever writes one."""

from __future__ import annotations

import doctest
import hashlib
import importlib.util
import io
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

import lwstwisted.loop
from lwstwisted.interfaces import IFakePollin
from lwstwisted.loop.pending import pending_reads
from tests.servers import serving
from tests.test_loop_corpus import CORPUS, HANGING, Completes, Exchange, Forgetful, N
from tests.test_loop_reactor import Reader
from tests.tls_peer import (
    DEADLINE,
    VERSIONS,
    Loop,
    cut,
    discard,
    listen_on_our_port,
    listen_on_stock_port,
    pattern,
)

TOP = Path(__file__).parent.parent
CUSTOM_LOOP = TOP / "examples" / "custom_loop.py"


def load(path: Path) -> ModuleType:
    """Import a file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example: Any = load(CUSTOM_LOOP)


class ForgetfulHook(example.HookedLoop):  # type: ignore[misc]
    """The negative control of the hook: it says that it will do it, and does not."""

    def fake_pollin(self, readers: list[IReadDescriptor]) -> bool:
        return True


class WithoutDefaultPath(Forgetful, example.CustomLoop):  # type: ignore[misc]
    """The same of the loop without the hook: whoever is pending is forgotten."""


class CountingHook(example.HookedLoop):  # type: ignore[misc]
    """Counts how often it was told of somebody."""

    told = 0

    def fake_pollin(self, readers: list[IReadDescriptor]) -> bool:
        self.told += len(readers)
        answer: bool = super().fake_pollin(readers)
        return answer


def make(case: SynchronousTestCase, kind: Any) -> Any:
    """A loop whose selector is closed after the test."""
    reactor = kind()
    case.addCleanup(reactor._selector.close)
    return reactor


class CustomLoopTests(Completes, SynchronousTestCase):
    """Row 2 on the loop that knows nothing of TLS."""

    def make_reactor(self) -> Any:
        return make(self, example.CustomLoop)


class CustomLoopStockPortTests(CustomLoopTests):
    """The same beneath a port of Twisted's own."""

    listen = staticmethod(listen_on_stock_port)


class HookedLoopTests(Completes, SynchronousTestCase):
    """Row 2 on the loop with the hook."""

    def make_reactor(self) -> Any:
        return make(self, CountingHook)

    def test_was_told(self) -> None:
        """The hook is what did it: the loop was told after every budget but the last."""
        self.assertGreaterEqual(self.complete(ssl.TLSVersion.TLSv1_3, "20 x N").told, 19)


class HookedLoopStockPortTests(HookedLoopTests):
    """The same beneath a port of Twisted's own."""

    listen = staticmethod(listen_on_stock_port)


class HangsWithoutTheListTests(SynchronousTestCase):
    """The negative control: with the list switched off an upload to the same loop hangs."""

    TURNS = 100
    """After the client has sent everything and the server may read: four times what the corpus needs."""

    def assert_hangs(self, kind: Any) -> None:
        for version in VERSIONS:
            for name in HANGING:
                exchange = Exchange(make(self, kind), listen_on_our_port, version, CORPUS[name], self.TURNS).run()
                assert exchange.sink is not None
                self.assertEqual((exchange.turns_left, exchange.sink.deliveries), (0, [N]), name)

    def test_custom_loop(self) -> None:
        """After one budget nothing more comes, though the loop goes on turning."""
        self.assert_hangs(WithoutDefaultPath)

    def test_hooked_loop(self) -> None:
        """Nor on a loop whose hook forgets what it promised."""
        self.assert_hangs(ForgetfulHook)


class TurnTests(SynchronousTestCase):
    """The rules that a loop of one's own has to keep, on the loop that shows them."""

    def setUp(self) -> None:
        self.reactor = make(self, example.HookedLoop)
        self.addCleanup(discard, self.reactor)
        self.reactor.events = []
        self.pending: Any = pending_reads(self.reactor)
        Loop(self.reactor)
        select = self.reactor._selector.select

        def noted(timeout: float | None) -> Any:
            self.reactor.events.append(("wait", timeout))
            return select(DEADLINE if timeout is None else timeout)

        self.reactor._selector.select = noted

    def reader(self, name: str, *then: Any) -> Reader:
        reader = Reader(self.reactor, name, *then)
        self.addCleanup(lambda: reader.lost or reader.connectionLost(None))
        return reader

    def events(self, wait: float | None = 0) -> list[Any]:
        """What one more turn does."""
        self.reactor.events.clear()
        self.reactor.doIteration(wait)
        return list(self.reactor.events)

    def test_interfaces(self) -> None:
        """A reactor in Twisted's sense, and one with the hook in ours."""
        verifyObject(IReactorFDSet, self.reactor)
        verifyObject(IFakePollin, self.reactor)
        self.assertIs(self.reactor.seconds, time.monotonic)
        self.assertFalse(IFakePollin.providedBy(make(self, example.CustomLoop)))

    def test_merged_behind_the_poll(self) -> None:
        """One wait that does not block, who the kernel announced, then who is pending: no event is lost."""
        pending, ready = self.reader("pending"), self.reader("ready")
        self.pending.addPending(pending)
        ready.far.send(b"x")
        self.assertEqual(self.events(None), [("wait", 0), "ready", "pending"])
        self.assertEqual(self.events(0.001), [("wait", 0.001)])

    def test_nobody_gets_two(self) -> None:
        """Who is pending and announced by the kernel, and pending again afterwards, gets one turn in each."""
        both = self.reader("both")

        def still_pending() -> None:
            self.pending.removePending(both)
            self.pending.addPending(both)

        both.then = still_pending
        self.pending.addPending(both)
        both.far.send(b"xx")
        for _ in range(3):
            self.assertEqual(self.events(None), [("wait", 0), "both"])

    def test_pending_again(self) -> None:
        """Who is marked while others are served waits for the next turn, which does not block."""
        again = self.reader("again", lambda: self.pending.addPending(again))
        self.pending.addPending(again)
        for _ in range(3):
            self.assertEqual(self.events(None), [("wait", 0), "again"])

    def test_paused_by_an_earlier_one(self) -> None:
        """Who is not pending any more at its turn is left alone."""
        second = self.reader("second")
        first = self.reader("first", lambda: self.pending.removePending(second))
        self.pending.addPending(second)
        first.far.send(b"x")
        self.assertEqual(self.events(), [("wait", 0), "first"])

    def test_closed_by_an_earlier_one(self) -> None:
        """Of two readers with an event each, the one that is served first closes the other, which is not touched."""
        readers = [self.reader("one"), self.reader("two")]
        for reader, other in (readers, reversed(readers)):
            reader.then = lambda other=other: other.connectionLost(None)
            reader.far.send(b"x")
        self.assertEqual(len(self.events()), 2)  # the wait, and one of them
        self.assertEqual(sum(reader.lost for reader in readers), 1)
        (left,) = (reader for reader in readers if not reader.lost)
        self.assertIn(left, self.reactor.getReaders())
        self.assertEqual(len(self.reactor.getReaders()), 1 + len(self.reactor._internalReaders))


class ProgramTests(SynchronousTestCase):
    """The example as its user runs it, with clients that fall silent after their last record."""

    def upload(self, port: int, certificate: Path, version: ssl.TLSVersion, pieces: list[bytes]) -> None:
        """Send records and close_notify at once, and wait until the server ends its side, too."""
        context = ssl.create_default_context(cafile=certificate)
        context.minimum_version = context.maximum_version = version
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:

            def finish(step: Any) -> None:
                while True:
                    try:
                        step()
                        break
                    except ssl.SSLWantReadError:
                        connection.sendall(outgoing.read())
                        incoming.write(connection.recv(1 << 16))

            finish(tls.do_handshake)
            for piece in pieces:
                tls.write(piece)
            finish(tls.unwrap)

    def serve(self, *options: str) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            command = [sys.executable, "-W", "error", CUSTOM_LOOP, "--port", "0", *options]
            with serving(command, cwd=folder, environment={"PYTHONPATH": str(TOP)}) as server:
                (port,) = server.wait_for(r"listening on port (\d+)")
                for version in VERSIONS:
                    for records in CORPUS.values():
                        self.upload(int(port), folder / "development.pem", version, cut(pattern(sum(records)), records))
                for records in CORPUS.values():
                    said = rf"\b{sum(records)} bytes, SHA-256 (\w+)\. Connection was closed cleanly"
                    expected = hashlib.sha256(pattern(sum(records))).hexdigest()
                    self.assertEqual(server.wait_for(said, len(VERSIONS)), len(VERSIONS) * [expected])
                self.assertEqual(server.end(), 0)
                self.assertNotIn("Traceback", server.text)

    def test_without_hook(self) -> None:
        """It prints size and digest of each upload, whatever the records are, and ends when it is told to."""
        self.serve()

    def test_with_hook(self) -> None:
        """So it does with ``--hook``."""
        self.serve("--hook")


class FormTests(SynchronousTestCase):
    """An example is read more often than it is run."""

    def check(self, *command: str | Path) -> None:
        done = subprocess.run([sys.executable, "-m", *command], cwd=TOP, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_it_is_short(self) -> None:
        """It can be read in one go."""
        self.assertLess(len(CUSTOM_LOOP.read_text().splitlines()), 150)

    def test_linter(self) -> None:
        """The linter has nothing to say."""
        self.check("ruff", "check", CUSTOM_LOOP)

    @pytest.mark.slow
    def test_types(self) -> None:
        """Nor have the type checks, which are strict."""
        self.check("mypy", CUSTOM_LOOP)


class DocumentationTests(SynchronousTestCase):
    """What the documentation for authors of loops shows is what happens."""

    def test_its_code_runs(self) -> None:
        """Who pastes it gets what it says."""
        (shown,) = (test for test in doctest.DocTestFinder(recurse=False).find(lwstwisted.loop) if test.examples)
        report = io.StringIO()
        result = doctest.DocTestRunner().run(shown, out=report.write, clear_globs=False)
        for value in list(shown.globs.values()):
            if IReactorFDSet.providedBy(value):
                discard(value)
        self.assertEqual(result.failed, 0, report.getvalue())
        self.assertGreater(result.attempted, 5)
