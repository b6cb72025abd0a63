"""Uploads whose records leave plaintext behind, on every loop, as ``reactor.run()`` runs it, from another thread.

The corpus of record layouts is the one that strands a reader which takes N bytes a turn: all records lie in
the kernel before the first of them is read, and then the client is silent. Nothing the kernel has to say can
help any more. The same corpus on a loop whose list is switched off hangs, and the last tests see that it does.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from types import ModuleType
from typing import Any

import uvloop
from twisted.internet.asyncioreactor import AsyncioSelectorReactor
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.pollreactor import PollReactor
from twisted.internet.selectreactor import SelectReactor
from twisted.protocols.tls import BufferingTLSTransport
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from lwstwisted.interfaces import IPendingReads
from lwstwisted.loop.foreign import LwsAsyncioReactor
from lwstwisted.loop.reactor import LwsPollReactor, LwsReactor, LwsSelectReactor
from lwstwisted.loop.tls import TLSTransport, find_binding, has_transport_names
from tests.tls_peer import (
    CORPUS,
    DEADLINE,
    HANGING,
    VERSIONS,
    ListeningSink,
    N,
    OwnQueue,
    Peer,
    RefusingHook,
    Sink,
    SinkFactory,
    StockTransport,
    ViewSink,
    cut,
    discard,
    listen_on_our_port,
    listen_on_stock_port,
    pattern,
)


@implementer(IPendingReads)
class Forgetful:
    """The negative control of the default path: whoever is pending is forgotten. For a loop without a list."""

    def addPending(self, reader: IReadDescriptor) -> None:
        pass

    def parkPending(self, reader: IReadDescriptor) -> None:
        pass

    def removePending(self, reader: IReadDescriptor) -> None:
        pass


class WithoutDefaultPath(Forgetful, EPollReactor):
    """A stock reactor on which nobody is served."""


class WithoutList(LwsReactor):
    """The negative control of our reactor."""

    def addPending(self, reader: IReadDescriptor) -> None:
        pass


class Exchange:
    """One upload to one reactor, which ends complete or not.

    :param listen: one of the ways to listen in ``tls_peer``.
    :param records: sizes; each is sent by one ``sendall``.
    :param held: whether the server reads nothing before all has arrived.
    :param turns: when the client has sent everything and the server was resumed, stop after this many more
        turns, complete or not; None waits for completion.
    """

    def __init__(
        self,
        reactor: Any,
        listen: Any,
        version: ssl.TLSVersion,
        records: list[int],
        turns: int | None = None,
        kind: type[Sink] = ListeningSink,
        held: bool = True,
        **tls: Any,
    ) -> None:
        self.reactor = reactor
        self.data = pattern(sum(records))
        self.pieces = cut(self.data, records)
        self.version = version
        self.turns_left = turns
        self.turns = 0  # from the resume on
        self.sink: Sink | None = None
        self.failure: BaseException | None = None
        self.may_send, self.over = threading.Event(), threading.Event()
        self.held = held
        factory = SinkFactory(self.delivered, on_handshake=self.shaken, kind=kind)
        self.port = listen(reactor, factory, N, **tls)

    def run(self) -> Exchange:
        """Run the reactor until it is over."""
        if hasattr(self.reactor, "doIteration"):
            self.reactor.doIteration = self.count(self.reactor.doIteration)
        client = threading.Thread(target=self.client, args=(self.port.getHost().port,))
        deadline = self.reactor.callLater(DEADLINE, self.fail, AssertionError("hung: the deadline stopped it"))
        self.reactor.callWhenRunning(client.start)
        self.reactor.run(installSignalHandlers=False)
        client.join(DEADLINE)
        if deadline.active():
            deadline.cancel()
        discard(self.reactor)
        if self.failure is not None:
            raise self.failure
        return self

    def count(self, iterate: Any) -> Any:
        def counted(timeout: float | None) -> None:
            self.turns += 1
            iterate(timeout)

        return counted

    # In the client's thread

    def client(self, port: int) -> None:
        try:
            peer = Peer(port, self.version)
            try:
                peer.handshake()
                if not self.may_send.wait(DEADLINE):
                    raise AssertionError("the server did not finish its handshake")
                sent = sum(peer.send(peer.seal(piece)) for piece in self.pieces)
                self.reactor.callFromThread(self.all_sent, sent)
                self.over.wait(DEADLINE)  # silent, and still connected
            finally:
                peer.close()
        except BaseException as raised:
            self.reactor.callFromThread(self.fail, raised)

    # In the reactor's

    def shaken(self, sink: Sink) -> None:
        self.sink = sink
        if self.held:
            sink.pause()
        self.turns = 0
        self.may_send.set()

    def all_sent(self, sent: int) -> None:
        assert self.sink is not None
        if not self.held:
            return
        if self.sink.unread() < sent:
            self.reactor.callLater(0, self.all_sent, sent)
            return
        self.turns = 0
        self.sink.resume()
        if self.turns_left is not None:
            self.reactor.callLater(0, self.one_turn_less)

    def one_turn_less(self) -> None:
        assert self.turns_left is not None
        self.turns_left -= 1
        if self.turns_left:
            self.reactor.callLater(0, self.one_turn_less)
        else:
            self.stop()

    def delivered(self, sink: Sink) -> None:
        if len(sink.data) >= len(self.data):
            self.stop()

    def fail(self, failure: BaseException) -> None:
        self.failure = failure
        self.stop()

    def stop(self) -> None:
        if not self.over.is_set():
            self.over.set()
            if self.sink is not None:
                self.sink.tls.abortConnection()  # what is left must not be delivered by the shutdown
            self.reactor.stop()


class Completes:
    """Every layout arrives whole, on this loop."""

    make_reactor: Any
    listen = staticmethod(listen_on_our_port)
    kind: type[Sink] = ListeningSink
    tls: dict[str, Any] = {}
    counts_turns = True

    def complete(self: Any, version: ssl.TLSVersion, name: str) -> Any:
        """Upload one layout. Returns the reactor."""
        exchange = Exchange(self.make_reactor(), self.listen, version, CORPUS[name], kind=self.kind, **self.tls).run()
        sink, where = exchange.sink, f"[{name}] over {version.name}"
        assert sink is not None
        self.assertEqual(bytes(sink.data), exchange.data, where)
        self.assertEqual(sink.violations, [], where)
        self.assertLessEqual(max(sink.deliveries), N, where)
        if self.counts_turns:
            # One for each budget, and a few for the reads of the socket: 16 to 64 KiB of ciphertext each.
            self.assertLessEqual(exchange.turns, len(sink.data) // N + 6, where)
        return exchange.reactor

    def test_tls_1_2(self: Any) -> None:
        """Row 2: an upload over TLS 1.2 arrives whole, whatever its records are, though the client is silent."""
        for name in CORPUS:
            self.complete(ssl.TLSVersion.TLSv1_2, name)

    def test_tls_1_3(self: Any) -> None:
        """Row 2: the same over TLS 1.3."""
        for name in CORPUS:
            self.complete(ssl.TLSVersion.TLSv1_3, name)


class LwsReactorTests(Completes, SynchronousTestCase):
    """Row 2 on our reactor."""

    make_reactor = LwsReactor


class LwsReactorViewTests(Completes, SynchronousTestCase):
    """Row 2 on our reactor, for a protocol that takes memoryviews."""

    make_reactor = LwsReactor
    kind = ViewSink


class EPollReactorTests(Completes, SynchronousTestCase):
    """Row 2 on a stock epoll reactor: the default path."""

    make_reactor = EPollReactor


class PollReactorTests(Completes, SynchronousTestCase):
    """Row 2 on a stock poll reactor."""

    make_reactor = PollReactor


class SelectReactorTests(Completes, SynchronousTestCase):
    """Row 2 on a stock select reactor."""

    make_reactor = SelectReactor


class AsyncioReactorTests(Completes, SynchronousTestCase):
    """Row 2 on Twisted's asyncio reactor."""

    counts_turns = False  # its turns are asyncio's

    def make_reactor(self) -> Any:
        loop = asyncio.new_event_loop()
        self.addCleanup(loop.close)
        return AsyncioSelectorReactor(loop)


class LwsPollReactorTests(Completes, SynchronousTestCase):
    """Row 2 on our reactor, on poll(2)."""

    make_reactor = LwsPollReactor


class LwsSelectReactorTests(Completes, SynchronousTestCase):
    """Row 2 on our reactor, on select(2)."""

    make_reactor = LwsSelectReactor


class LwsAsyncioReactorTests(Completes, SynchronousTestCase):
    """Row 2 on asyncio, with the hook."""

    counts_turns = False
    new_loop = staticmethod(asyncio.SelectorEventLoop)

    def make_reactor(self) -> Any:
        loop = self.new_loop()
        self.addCleanup(loop.close)
        return LwsAsyncioReactor(loop)


class LwsUvloopReactorTests(LwsAsyncioReactorTests):
    """Row 2 on uvloop, with the hook."""

    new_loop = staticmethod(uvloop.new_event_loop)


class RefusingHookTests(Completes, SynchronousTestCase):
    """Row 4: a hook that answers False is asked, and then the default path does the work."""

    make_reactor = RefusingHook

    def test_was_asked(self) -> None:
        """The answer was used: the loop said no, and the upload went on."""
        self.assertGreaterEqual(self.complete(ssl.TLSVersion.TLSv1_3, "20 x N").asked, 19)


class OwnQueueTests(Completes, SynchronousTestCase):
    """Row 4: a loop with a hook and a queue of its own."""

    make_reactor = OwnQueue

    def test_was_asked(self) -> None:
        """The loop was told which reader is pending, and ran it by itself."""
        self.assertGreaterEqual(self.complete(ssl.TLSVersion.TLSv1_3, "20 x N").asked, 19)


class PublicCallsTests(Completes, SynchronousTestCase):
    """Row 2 where the binding beneath pyOpenSSL is not found: its public ``recv``."""

    make_reactor = LwsReactor
    tls = {"binding": None}

    def test_no_binding_is_found(self) -> None:
        """On another pyOpenSSL, whose private names went away, we know it before it is called."""
        self.assertIsNone(find_binding(ModuleType("SSL")))

        other = ModuleType("SSL")
        other._lib = ModuleType("lib")  # type: ignore[attr-defined]
        self.assertIsNone(find_binding(other))


class StockTransportTests(SynchronousTestCase):
    """On another Twisted, whose private names went away, uploads run on its own transport."""

    def test_which_transports_can_be_driven(self) -> None:
        """The Twisted that we require has the names, and a transport without one of them is recognised."""
        self.assertTrue(has_transport_names(BufferingTLSTransport))
        self.assertFalse(has_transport_names(StockTransport))

    def test_the_upload_completes(self) -> None:
        """Every layout arrives whole; only a pause is not exact, as ever on stock Twisted."""
        for version in VERSIONS:
            for name, records in CORPUS.items():
                exchange = Exchange(LwsReactor(), listen_on_our_port, version, records, base=StockTransport).run()
                assert exchange.sink is not None
                self.assertNotIsInstance(exchange.sink.tls, TLSTransport)
                self.assertEqual(bytes(exchange.sink.data), exchange.data, name)


class HangsWithoutTheListTests(SynchronousTestCase):
    """The negative control: with the mechanism off the same corpus hangs. So what the tests above show is its work."""

    TURNS = 100
    """After the client has sent everything and the server may read: four times what the corpus needs."""

    def assert_hangs(self, make_reactor: Any, listen: Any, deliveries: list[int]) -> None:
        for version in VERSIONS:
            for name in HANGING:
                exchange = Exchange(make_reactor(), listen, version, CORPUS[name], turns=self.TURNS).run()
                where = f"[{name}] over {version.name}"
                assert exchange.sink is not None
                self.assertEqual(exchange.turns_left, 0, where)
                self.assertEqual(exchange.sink.deliveries, deliveries, where)

    def test_our_reactor(self) -> None:
        """Without the list an upload stops after its first budget, though the loop goes on turning."""
        self.assert_hangs(WithoutList, listen_on_our_port, [N])

    def test_stock_reactor(self) -> None:
        """Without the default path so does one on a stock reactor."""
        self.assert_hangs(WithoutDefaultPath, listen_on_our_port, [N])

    def test_stock_port(self) -> None:
        """And one on a stock port, which stays paused until what may be left is looked at."""
        self.assert_hangs(WithoutDefaultPath, listen_on_stock_port, [])

    def test_the_layout_that_cannot_hang(self) -> None:
        """A lone record of just N bytes completes even so: a test of this size alone would prove nothing."""
        exchange = Exchange(WithoutList(), listen_on_our_port, VERSIONS[1], CORPUS["N"], turns=self.TURNS).run()
        assert exchange.sink is not None
        self.assertEqual(bytes(exchange.sink.data), exchange.data)
