"""What TLS does beside carrying bytes: handshakes that are cut, KeyUpdate, renegotiation, and the ways to say goodbye.

Where an end could be told in more than one way, the same peer talks to Twisted's own transport too, and the
application must see the same.
"""

from __future__ import annotations

import _ssl
import ctypes
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from unittest import skipUnless

from OpenSSL import SSL
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.ssl import CertificateOptions, optionsForClientTLS
from zope.interface import implementer

from lwstwisted.loop.tls import READ_BUDGET, TLSFactory, TLSPort, TLSTransport
from tests.test_loop_tls_uses import (
    DOWN,
    LOOPS,
    UP,
    AnyLoop,
    DialogueTestCase,
    LoopTestCase,
    N,
    Ours,
    authority,
    issue,
    limited,
    our_trust,
    pem_file,
    records,
    their_server_context,
)
from tests.tls_peer import (
    DEADLINE,
    VERSIONS,
    ListeningSink,
    Peer,
    Sink,
    SinkFactory,
    StockTransport,
    listen_on_our_port,
    listen_on_stock_port,
    pattern,
)

TLS_1_2, TLS_1_3 = VERSIONS

PORTS = {"our port": listen_on_our_port, "stock port": listen_on_stock_port}

MIB = 1 << 20


class Boom(Exception):
    """A bug in an application."""


def take(peer: Peer, got: bytearray) -> str:
    """Take what a peer can read by now.

    :returns: how the connection has ended for it, or nothing while it goes on.
    """
    try:
        peer._fill(once=True)
        while data := peer._tls.read(1 << 16):
            got += data
    except ssl.SSLWantReadError:
        return ""
    except ssl.SSLZeroReturnError:
        pass
    except ssl.SSLEOFError:
        return "cut"
    except ConnectionResetError:
        return "reset"
    return "goodbye"


def reset(peer: Peer) -> None:
    """Close with a RST."""
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def next_flight(peer: Peer) -> bytes:
    """What the peer has to say in its handshake by now. Nothing is sent."""
    try:
        peer._tls.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return peer._outgoing.read()


class PeerTestCase(LoopTestCase):
    """With peers in lockstep with the loop."""

    def peer(self, loop: AnyLoop, port: int, version: ssl.TLSVersion) -> Peer:
        peer = Peer(port, version, loop.step)
        self.addCleanup(peer.close)
        return peer

    def meet(self, loop: AnyLoop, factory: SinkFactory, port: int, version: ssl.TLSVersion) -> tuple[Peer, Sink]:
        """A peer and our side of it, after the handshake."""
        peer = self.peer(loop, port, version)
        peer.handshake()
        loop.until(lambda: factory.sinks and factory.sinks[-1].is_shaken)
        return peer, factory.sinks[-1]

    def everywhere(self) -> Iterator[tuple[AnyLoop, Any, ssl.TLSVersion, str]]:
        """Each loop with each kind of port and each version, and how to call it."""
        for name in LOOPS:
            for kind, listen in PORTS.items():
                for version in VERSIONS:
                    with self.loop(name) as loop:
                        yield loop, listen, version, f"{name}, {kind}, {version.name}"


def leave(sink: Sink, how: str) -> None:
    """End the connection from our side."""
    getattr(sink.tls, how)()


class Traces:
    """What a reactor and this process hold; to be compared with another time.

    :ivar held: readers, writers, timers and descriptors.
    """

    def __init__(self, reactor: Any) -> None:
        self.held = (
            set(map(id, reactor.getReaders())),
            set(map(id, reactor.getWriters())),
            len(reactor.getDelayedCalls()),
            len(os.listdir("/proc/self/fd")),
        )


STAGES = ("nothing", "half a hello", "hello", "half a Finished", "Finished")


class CutHandshakeTests(PeerTestCase):
    """Handshakes that end early: one connectionLost, and nothing is left behind."""

    def reach(self, loop: AnyLoop, peer: Peer, factory: SinkFactory, stage: str) -> Sink:
        """Have a peer do its part of the handshake as far as this. Returns our side, when that has read it all."""
        count = len(factory.sinks)
        if stage == "half a hello":
            hello = next_flight(peer)
            peer.send(hello[: len(hello) // 2])
        elif stage != "nothing":
            peer.send(next_flight(peer))
        if stage.endswith("Finished"):
            while not (flight := next_flight(peer)):
                peer._fill()
            peer.send(flight[:-10] if stage == "half a Finished" else flight)
        loop.until(lambda: len(factory.sinks) > count)
        sink = factory.sinks[-1]
        loop.until(lambda: sink.lost or not sink.unread())
        return sink

    def assert_gone(self, loop: AnyLoop, sink: Sink, before: Traces, where: str) -> None:
        loop.until(lambda: sink.lost)
        for _ in range(3):
            loop.turn()
        self.assertEqual(len(sink.lost), 1, where)
        self.assertEqual(sink.deliveries, [], where)
        self.assertEqual(sink.violations, [], where)
        self.assertNotIn(sink.reader, loop.reactor._pending, where)
        self.assertEqual(Traces(loop.reactor).held, before.held, where)

    def test_peer_leaves(self) -> None:
        """The peer closes or resets at every stage; until the end of the handshake a pause does not hide it."""
        for loop, listen, version, where in self.everywhere():
            for on_made in (None, Sink.pause):
                factory = SinkFactory(**{} if on_made is None else {"on_made": on_made})
                listening = listen(loop.reactor, factory, N)
                before = Traces(loop.reactor)
                for stage in STAGES if on_made is None else STAGES[:-1]:
                    for end in (Peer.close, reset):
                        peer = self.peer(loop, listening.getHost().port, version)
                        sink = self.reach(loop, peer, factory, stage)
                        end(peer)
                        self.assert_gone(loop, sink, before, f"{where}, {stage}, {end.__name__}, {on_made}")
                        self.assertEqual(sink.is_shaken, stage == "Finished", where)
                        self.assertIn(sink.lost[0].type, (ConnectionLost, ConnectionDone, SSL.Error), where)
                listening.stopListening()
                loop.turn()

    def test_peer_leaves_as_on_stock(self) -> None:
        """What the application is told of each of these ends is what it is told on Twisted's own transport."""
        for version in VERSIONS:
            for stage in STAGES:
                for end in (Peer.close, reset):
                    reasons = []
                    for tls in ({"base": StockTransport}, {}):
                        with self.loop() as loop:
                            factory = SinkFactory()
                            port = listen_on_stock_port(loop.reactor, factory, N, **tls).getHost().port
                            peer = self.peer(loop, port, version)
                            sink = self.reach(loop, peer, factory, stage)
                            self.assertEqual(isinstance(sink.tls, TLSTransport), not tls)
                            end(peer)
                            loop.until(lambda sink=sink: sink.lost)
                            reasons.append([reason.type for reason in sink.lost])
                    self.assertEqual(reasons[0], reasons[1], (version, stage, end.__name__))
                    self.assertEqual(len(reasons[1]), 1)

    def test_we_leave(self) -> None:
        """Our protocol aborts or closes in connectionMade, in handshakeCompleted, and from a timer between them."""
        for loop, listen, version, where in self.everywhere():
            for how in ("abortConnection", "loseConnection"):
                for moment in ("made", *STAGES[:-1], "shaken"):
                    factory = SinkFactory()
                    if moment == "made":
                        factory.on_made = lambda sink, how=how: leave(sink, how)
                    elif moment == "shaken":
                        factory.on_handshake = lambda sink, how=how: leave(sink, how)
                    listening = listen(loop.reactor, factory, N)
                    before = Traces(loop.reactor)
                    peer = self.peer(loop, listening.getHost().port, version)
                    stage = {"made": "nothing", "shaken": "Finished"}.get(moment, moment)
                    sink = self.reach(loop, peer, factory, stage)
                    if moment in STAGES:
                        loop.reactor.callLater(0, leave, sink, how)
                    got = bytearray()

                    def over(peer: Peer = peer, sink: Sink = sink, got: bytearray = got) -> object:
                        if peer.socket.fileno() >= 0 and take(peer, got) == "goodbye":
                            peer.send(peer.seal_end())
                        return sink.lost

                    loop.until(over, longest=0.01)
                    peer.close()
                    self.assert_gone(loop, sink, before, f"{where}, {how}, {moment}")
                    self.assertEqual(sink.is_shaken, moment == "shaken")
                    polite = moment == "shaken" and how == "loseConnection"
                    self.assertIs(sink.lost[0].type, ConnectionDone if polite else ConnectionAborted)
                    listening.stopListening()
                    loop.turn()

    def test_last_words_before_the_handshake(self) -> None:
        """What was written before a loseConnection in connectionMade still arrives, with a proper goodbye."""

        def say(sink: Sink) -> None:
            sink.tls.write(DOWN)
            sink.tls.loseConnection()

        for loop, listen, version, where in self.everywhere():
            factory = SinkFactory(on_made=say)
            peer = self.peer(loop, listen(loop.reactor, factory, N).getHost().port, version)
            peer.handshake()
            got = bytearray()
            loop.until(lambda peer=peer, got=got: take(peer, got) == "goodbye", longest=0.01)
            self.assertEqual(bytes(got), DOWN, where)
            peer.send(peer.seal_end())
            (sink,) = factory.sinks
            loop.until(lambda sink=sink: sink.lost)
            self.assertEqual([reason.type for reason in sink.lost], [ConnectionDone], where)

    def test_server_leaves_our_client(self) -> None:
        """The same at the client's end: the server closes or resets before, amid and behind its flight."""
        for name in LOOPS:
            for version in VERSIONS:
                for end in ("close", "reset"):
                    for share in (0.0, 0.5, 1.0):
                        with self.loop(name) as loop, socket.create_server(("127.0.0.1", 0)) as listening:
                            before = Traces(loop.reactor)
                            ours = Ours(loop)
                            trust = optionsForClientTLS("localhost", trustRoot=our_trust())
                            loop.reactor.connectSSL("127.0.0.1", listening.getsockname()[1], ours, trust)
                            listening.setblocking(False)
                            theirs = self.accepted(loop, listening)
                            flight = self.server_flight(loop, theirs, version) if share else b""
                            theirs.sendall(flight[: int(len(flight) * share)])
                            loop.turn()
                            if end == "reset":
                                theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                            theirs.close()
                            (sink,) = ours.sinks
                            where = f"{name}, {version.name}, {end}, {share}"
                            self.assertIsInstance(sink.tls, TLSTransport)
                            self.assert_gone(loop, sink, before, where)

    def accepted(self, loop: AnyLoop, listening: socket.socket) -> socket.socket:
        """The next connection, on which our client has said something."""
        found: list[socket.socket] = []

        def accept() -> object:
            try:
                found.append(listening.accept()[0])
            except BlockingIOError:
                pass
            return found

        loop.until(accept, longest=0.01)
        self.addCleanup(found[0].close)
        found[0].setblocking(False)
        return found[0]

    def server_flight(self, loop: AnyLoop, theirs: socket.socket, version: ssl.TLSVersion) -> bytes:
        """All that a server answers to the hello of our client."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = their_server_context(version).wrap_bio(incoming, outgoing, server_side=True)

        def answered() -> object:
            try:
                incoming.write(theirs.recv(1 << 16))
                server.do_handshake()
            except (BlockingIOError, ssl.SSLWantReadError):
                pass
            return outgoing.pending

        loop.until(answered, longest=0.01)
        return outgoing.read()


class GoodbyeTests(PeerTestCase):
    """Both ends, in every order, as on Twisted's own transport."""

    def outcome(
        self,
        play: Callable[[AnyLoop, Peer, Sink], object],
        kind: type[Sink] = ListeningSink,
        stock_logs: type[Exception] | None = None,
    ) -> Any:
        """Play a scene over each version and on each kind of port, on stock's transport and on ours.

        :param stock_logs: an error of stock's own, which ours has not.
        :returns: how it ended on ours: what our side got, the reasons it was told, what else it noted, what the
            peer got, and how it ended for that.
        """
        outcomes = []
        for version in VERSIONS:
            for listen in PORTS.values():
                for tls in ({"base": StockTransport}, {}):
                    with self.loop() as loop:
                        factory = SinkFactory(kind=kind)
                        port = listen(loop.reactor, factory, READ_BUDGET, **tls).getHost().port
                        peer, sink = self.meet(loop, factory, port, version)
                        self.assertEqual(isinstance(sink.tls, TLSTransport), not tls)
                        play(loop, peer, sink)
                        got, end = bytearray(), ""

                        def over(peer: Peer = peer, sink: Sink = sink, got: bytearray = got) -> bool:
                            nonlocal end
                            if peer.socket.fileno() < 0:
                                end = "left"
                            end = end or take(peer, got)
                            return bool(end and sink.lost)

                        loop.until(over, longest=0.01)
                        for _ in range(3):
                            loop.turn()
                        if tls and stock_logs is not None:
                            self.flushLoggedErrors(stock_logs)
                        reasons = [reason.type for reason in sink.lost]
                        self.assertEqual(len(reasons), 1)
                        self.assertEqual(sink.violations, [])
                        outcomes.append((bytes(sink.data), reasons[0], getattr(sink, "notes", []), bytes(got), end))
        for outcome in outcomes:
            self.assertEqual(outcome, outcomes[0])
        return outcomes[0]

    def test_theirs_first(self) -> None:
        """A peer that says goodbye and goes on reading: it gets what we wrote before, and our goodbye."""

        def play(loop: AnyLoop, peer: Peer, sink: Sink) -> None:
            sink.factory.on_delivery = lambda sink: sink.tls.write(DOWN)
            peer.send(peer.seal(b"question") + peer.seal_end())

        self.assertEqual(self.outcome(play), (b"question", ConnectionDone, [], DOWN, "goodbye"))

    def test_theirs_while_much_is_queued(self) -> None:
        """The same with more on its way than fits into the kernel: a half-closed peer gets all of it."""
        answer = pattern(8 * MIB)

        def play(loop: AnyLoop, peer: Peer, sink: Sink) -> None:
            sink.tls.write(answer)
            peer.send(peer.seal(b"question") + peer.seal_end())
            for _ in range(5):
                loop.turn()

        self.assertEqual(self.outcome(play), (b"question", ConnectionDone, [], answer, "goodbye"))

    def test_small_write_in_the_same_turn_as_theirs(self) -> None:
        """A short answer to a question that came together with the goodbye: sent or not, as stock does."""

        def play(loop: AnyLoop, peer: Peer, sink: Sink) -> None:
            sink.factory.on_delivery = lambda sink: sink.tls.write(b"answer")
            peer.send(peer.seal(b"question") + peer.seal_end())

        self.assertEqual(self.outcome(play)[:2], (b"question", ConnectionDone))

    def test_write_behind_theirs(self) -> None:
        """What we write after the peer's goodbye was taken in goes nowhere, and harms nothing."""

        def play(loop: AnyLoop, peer: Peer, sink: Sink) -> None:
            peer.send(peer.seal_end())
            loop.turn()
            sink.tls.write(DOWN)

        self.assertEqual(self.outcome(play), (b"", ConnectionDone, [], b"", "goodbye"))

    def test_ours_first(self) -> None:
        """We write, and say goodbye; the peer reads it all and answers."""

        def play(loop: AnyLoop, peer: Peer, sink: Sink) -> None:
            sink.tls.write(DOWN)
            sink.tls.loseConnection()
            loop.until(lambda: take(peer, got) == "goodbye", longest=0.01)
            self.assertEqual(bytes(got), DOWN)
            got.clear()
            self.assertEqual(sink.lost, [])  # it takes two
            peer.send(peer.seal_end())

        got = bytearray()
        self.assertEqual(self.outcome(play), (b"", ConnectionDone, [], b"", "goodbye"))

    def test_ours_first_and_they_go_on(self) -> None:
        """What the peer still had to say behind our goodbye is delivered, up to its own."""

        def play(loop: AnyLoop, peer: Peer, sink: Sink) -> None:
            sink.tls.loseConnection()
            loop.turn()
            for record in records(UP):
                peer.send(peer.seal(record))
            peer.send(peer.seal_end())

        self.assertEqual(self.outcome(play), (UP, ConnectionDone, [], b"", "goodbye"))

    def test_both_at_once(self) -> None:
        """Two goodbyes that cross."""

        def play(loop: AnyLoop, peer: Peer, sink: Sink) -> None:
            peer.send(peer.seal(b"last words") + peer.seal_end())
            sink.tls.loseConnection()

        self.assertEqual(self.outcome(play), (b"last words", ConnectionDone, [], b"", "goodbye"))

    def test_ours_answered_by_a_fin(self) -> None:
        """A peer that answers our goodbye by closing its socket."""

        def play(loop: AnyLoop, peer: Peer, sink: Sink) -> None:
            sink.tls.loseConnection()
            loop.until(lambda: take(peer, bytearray()) == "goodbye", longest=0.01)
            peer.close()

        self.assertEqual(self.outcome(play)[2:], ([], b"", "left"))

    def test_fin_alone(self) -> None:
        """An end without a goodbye is no end that one may trust: it is told as a loss."""

        def play(loop: AnyLoop, peer: Peer, sink: Sink) -> None:
            peer.send(peer.seal(b"x"))
            peer.socket.shutdown(socket.SHUT_WR)

        self.assertEqual(self.outcome(play)[:2], (b"x", ConnectionLost))

    def test_reset(self) -> None:
        """So is a reset, behind what arrived before."""

        def play(loop: AnyLoop, peer: Peer, sink: Sink) -> None:
            peer.send(peer.seal(b"x"))
            loop.until(lambda: sink.data)
            reset(peer)

        self.assertEqual(self.outcome(play)[:2], (b"x", ConnectionLost))

    def test_half_closeable_protocol(self) -> None:
        """``IHalfCloseableProtocol`` above TLS: a FIN of the peer is what it is on stock."""

        def play(loop: AnyLoop, peer: Peer, sink: Sink) -> None:
            peer.send(peer.seal(b"x"))
            peer.socket.shutdown(socket.SHUT_WR)

        data, _, notes, _, _ = self.outcome(play, HalfCloseableSink)
        self.assertEqual((data, notes), (b"x", []))  # TLS has no half-open connections, says stock

    def test_half_closeable_and_a_goodbye(self) -> None:
        """The same for a close_notify."""

        def play(loop: AnyLoop, peer: Peer, sink: Sink) -> None:
            peer.send(peer.seal(b"x") + peer.seal_end())

        self.assertEqual(self.outcome(play, HalfCloseableSink), (b"x", ConnectionDone, [], b"", "goodbye"))

    def test_lose_write_connection(self) -> None:
        """``loseWriteConnection`` closes our half of the socket behind what was sent; the other half goes on."""

        def play(loop: AnyLoop, peer: Peer, sink: Sink) -> None:
            sink.tls.write(DOWN)
            sink.tls.loseWriteConnection()
            sealed = peer.seal(*records(UP)) + peer.seal_end()
            loop.until(lambda: take(peer, got) == "cut", longest=0.01)
            self.assertEqual(bytes(got), DOWN)
            got.clear()
            peer.send(sealed)

        got = bytearray()
        # Stock's transport goes on with a connection that ended inside a call of its own.
        ended = self.outcome(play, HalfCloseableSink, AttributeError)
        self.assertEqual(ended, (UP, ConnectionDone, [], b"", "cut"))


@implementer(IHalfCloseableProtocol)
class HalfCloseableSink(ListeningSink):
    """A sink that wants to hear of each half."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def readConnectionLost(self) -> None:
        self.notes.append("read")

    def writeConnectionLost(self) -> None:
        self.notes.append("write")


class EarlyWriteTests(PeerTestCase):
    """Writes that need a read while nothing may be delivered, and more output than one buffer holds."""

    def start(self, sink: Sink) -> None:
        sink.pause()
        sink.tls.write(DOWN)

    def test_server(self) -> None:
        """A protocol that pauses and writes in connectionMade: the handshake is done, DOWN arrives, nothing comes."""
        for loop, listen, version, where in self.everywhere():
            factory = SinkFactory(on_made=self.start)
            peer = self.peer(loop, listen(loop.reactor, factory, N).getHost().port, version)
            peer.handshake()
            for record in records(UP):
                peer.send(peer.seal(record))
            got = bytearray()
            loop.until(lambda peer=peer, got=got: take(peer, got) or len(got) == len(DOWN), longest=0.01)
            self.assertEqual(bytes(got), DOWN, where)
            (sink,) = factory.sinks
            self.assertEqual((sink.is_shaken, sink.deliveries), (True, []), where)
            sink.resume()
            loop.until(lambda sink=sink: len(sink.data) == len(UP))
            self.assertEqual(bytes(sink.data), UP, where)
            self.assertEqual(sink.violations, [], where)

    def test_client(self) -> None:
        """The same where ours is the client."""

        def far_end(listening: socket.socket, version: ssl.TLSVersion) -> bytes:
            plain, _ = listening.accept()
            with plain:
                plain.settimeout(DEADLINE)
                with their_server_context(version).wrap_socket(plain, server_side=True) as connection:
                    for record in records(UP):
                        connection.sendall(record)
                    got = b""
                    while len(got) < len(DOWN):
                        got += connection.recv(1 << 16)
                    arrived.set()
                    may_close.wait(DEADLINE)
                    return got

        for name in LOOPS:
            for version in VERSIONS:
                arrived, may_close = threading.Event(), threading.Event()
                with self.loop(name) as loop, socket.create_server(("127.0.0.1", 0)) as listening:
                    listening.settimeout(DEADLINE)
                    far = self.in_thread(far_end, listening, version)
                    ours = Ours(loop)
                    ours.on_made = self.start
                    trust = optionsForClientTLS("localhost", trustRoot=our_trust())
                    loop.reactor.connectSSL("127.0.0.1", listening.getsockname()[1], ours, trust)
                    loop.until(lambda a=arrived, far=far: a.is_set() or far.done(), longest=0.01)
                    (sink,) = ours.sinks
                    self.assertIsInstance(sink.tls, TLSTransport)
                    self.assertEqual((sink.is_shaken, sink.deliveries), (True, []))
                    ours.on_delivery = lambda sink: None
                    sink.resume()
                    loop.until(lambda sink=sink: len(sink.data) == len(UP))
                    may_close.set()
                    loop.until(far.done, longest=0.01)
                    self.assertEqual((far.result(), bytes(sink.data), sink.violations), (DOWN, UP, []))
                    sink.tls.abortConnection()
                    loop.until(lambda sink=sink: sink.lost)

    def count_output(self, sink: Sink) -> list[int]:
        """Sizes of the writes that the transport below is given from now on."""
        below, given = sink.tls.transport, []
        write = below.write
        below.write = lambda data: (given.append(len(data)), write(data))
        return given

    def test_a_large_write(self) -> None:
        """A write of 1 MiB is with the transport below before write() returns, and arrives whole."""
        answer = pattern(MIB)
        for loop, listen, version, where in self.everywhere():
            factory = SinkFactory()
            peer, sink = self.meet(loop, factory, listen(loop.reactor, factory, N).getHost().port, version)
            given = self.count_output(sink)
            sink.tls.write(answer)
            self.assertGreater(sum(given), MIB, where)
            got = bytearray()
            loop.until(lambda peer=peer, got=got: take(peer, got) or len(got) == MIB, longest=0.01)
            self.assertEqual(bytes(got), answer, where)

    def test_a_large_write_before_the_handshake(self) -> None:
        """Written before the handshake, it is there in the very turn in which that is done."""
        answer = pattern(MIB)
        for loop, listen, version, where in self.everywhere():
            after_turn: list[int] = []

            def made(sink: Sink, loop: AnyLoop = loop, after_turn: list[int] = after_turn) -> None:
                sink.tls.write(answer)

                def shaken(sink: Sink) -> None:
                    given = self.count_output(sink)
                    loop.reactor.callLater(0, lambda: after_turn.append(sum(given)))

                sink.factory.on_handshake = shaken

            factory = SinkFactory(on_made=made)
            peer, _ = self.meet(loop, factory, listen(loop.reactor, factory, N).getHost().port, version)
            got = bytearray()
            loop.until(lambda peer=peer, got=got: take(peer, got) or len(got) == MIB, longest=0.01)
            self.assertEqual(bytes(got), answer, where)
            self.assertGreater(after_turn[0], MIB, where)

    def test_a_large_certificate(self) -> None:
        """A server whose certificate is larger than any one read of the sending side: the handshake is done."""
        key = authority()[1]
        large = issue("localhost", [], key, padding=80_000)
        context = CertificateOptions(key, large)
        theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        theirs.check_hostname, theirs.verify_mode = False, ssl.CERT_NONE
        for loop, listen, version, where in self.everywhere():
            factory = SinkFactory()
            wrapped = TLSFactory(context, False, factory, loop.reactor)
            if listen is listen_on_our_port:
                port: Any = TLSPort(0, wrapped, 50, "127.0.0.1", loop.reactor)
                port.startListening()
            else:
                port = loop.reactor.listenTCP(0, wrapped, 50, "127.0.0.1")
            peer = self.peer(loop, port.getHost().port, version)
            theirs.minimum_version = theirs.maximum_version = version
            peer._tls = theirs.wrap_bio(peer._incoming, peer._outgoing, server_hostname="localhost")
            peer.handshake()
            peer.send(peer.seal(b"x"))
            loop.until(lambda factory=factory: factory.sinks[0].data)
            self.assertEqual(bytes(factory.sinks[0].data), b"x", where)


class FailingDeliveryTests(PeerTestCase):
    """Deliveries that end a connection with plaintext left, on every loop."""

    def start(self, loop: AnyLoop, listen: Any, factory: SinkFactory, version: ssl.TLSVersion) -> tuple[Peer, Sink]:
        """Have four budgets arrive at once, and the first delivered."""
        factory.on_handshake = Sink.pause
        peer, sink = self.meet(loop, factory, listen(loop.reactor, factory, N).getHost().port, version)
        before = sink.unread()  # nothing, or the end of a handshake
        sealed = peer.seal(pattern(4 * N))
        peer.send(sealed)
        loop.until(lambda: sink.unread() == before + len(sealed), longest=0.01)
        sink.resume()
        return peer, sink

    def test_protocol_raises(self) -> None:
        """A bug in dataReceived, in the first delivery or in a later one: logged, one end, and no delivery more."""
        for at in (1, 2):
            for loop, listen, version, where in self.everywhere():

                def fail(sink: Sink, at: int = at) -> None:
                    if len(sink.deliveries) == at:
                        raise Boom

                _, sink = self.start(loop, listen, SinkFactory(fail), version)
                loop.until(lambda sink=sink: sink.lost)
                for _ in range(3):
                    loop.turn()
                self.assertEqual((sink.deliveries, len(sink.lost)), (at * [N], 1), where)
                self.assertEqual(len(self.flushLoggedErrors(Boom)), 1, where)

    def test_protocol_closes(self) -> None:
        """loseConnection() inside a delivery stops the deliveries at once; the peer gets a goodbye."""
        for at in (1, 2):
            for loop, listen, version, where in self.everywhere():

                def close(sink: Sink, at: int = at) -> None:
                    if len(sink.deliveries) == at:
                        sink.tls.loseConnection()

                peer, sink = self.start(loop, listen, SinkFactory(close), version)
                loop.until(lambda peer=peer: take(peer, bytearray()) == "goodbye", longest=0.01)
                peer.send(peer.seal_end())
                loop.until(lambda sink=sink: sink.lost)
                self.assertEqual(sink.deliveries, at * [N], where)
                self.assertEqual([reason.type for reason in sink.lost], [ConnectionDone], where)


@cache
def bare_openssl() -> Any:
    """The OpenSSL beneath Python's ``ssl``, or None where it is hidden inside of that."""
    try:
        library = ctypes.CDLL(_ssl.__file__)
        for name in ("TLS_client_method", "TLS_server_method", "SSL_CTX_new", "SSL_new"):
            getattr(library, name).restype = ctypes.c_void_p
        assert library.SSL_key_update and library.SSL_renegotiate and library.SSL_set_msg_callback
    except (AttributeError, OSError):
        return None
    return library


MESSAGE_SEEN = ctypes.CFUNCTYPE(
    None, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p
)

HANDSHAKE_RECORD, KEY_UPDATE, ALERT_RECORD, NO_RENEGOTIATION = 22, 24, 21, 100
"""RFC 8446 appendix B, RFC 5246 section 7.2."""


class BarePeer:
    """OpenSSL itself on a socket, in a thread: for what Python's ``ssl`` has no call for.

    :ivar key_updates: KeyUpdate messages received.
    :ivar refusals: no_renegotiation alerts received.
    """

    def __init__(self, plain: socket.socket, version: ssl.TLSVersion, certificate: Any = None) -> None:
        self.library = library = bare_openssl()
        self.socket = plain
        plain.setblocking(True)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            plain.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(DEADLINE), 0))
        method = library.TLS_client_method() if certificate is None else library.TLS_server_method()
        self.context = ctypes.c_void_p(library.SSL_CTX_new(ctypes.c_void_p(method)))
        for limit in (123, 124):  # SSL_CTRL_SET_MIN_PROTO_VERSION and _MAX_
            assert library.SSL_CTX_ctrl(self.context, limit, ctypes.c_long(version), None) == 1
        if certificate is not None:
            path = os.fsencode(certificate)
            assert library.SSL_CTX_use_certificate_chain_file(self.context, path) == 1
            assert library.SSL_CTX_use_PrivateKey_file(self.context, path, 1) == 1
        self.tls = ctypes.c_void_p(library.SSL_new(self.context))
        self.key_updates = self.refusals = 0
        self._seen = MESSAGE_SEEN(self.seen)
        library.SSL_set_msg_callback(self.tls, self._seen)
        assert library.SSL_set_fd(self.tls, plain.fileno()) == 1
        assert (library.SSL_connect if certificate is None else library.SSL_accept)(self.tls) == 1

    def seen(self, sent: int, version: int, kind: int, data: int, size: int, *_: object) -> None:
        if not sent and kind in (HANDSHAKE_RECORD, ALERT_RECORD):
            message = ctypes.string_at(data, size)
            self.key_updates += kind == HANDSHAKE_RECORD and message[0] == KEY_UPDATE
            self.refusals += kind == ALERT_RECORD and message[1] == NO_RENEGOTIATION

    def write(self, data: bytes) -> None:
        """Send one record."""
        assert self.library.SSL_write(self.tls, data, len(data)) == len(data)

    def read(self, size: int) -> bytes:
        """Receive so much."""
        got, buffer = bytearray(), ctypes.create_string_buffer(1 << 16)
        while len(got) < size:
            count = self.library.SSL_read(self.tls, buffer, len(buffer))
            assert count > 0, f"the connection ended after {len(got)} bytes"
            got += buffer.raw[:count]
        return bytes(got)

    def update_keys(self) -> None:
        """Change our keys, and ask the other side to change its."""
        assert self.library.SSL_key_update(self.tls, 1) == 1
        assert self.library.SSL_do_handshake(self.tls) == 1

    def renegotiate(self) -> bool:
        """Ask for another handshake. Returns whether there was one."""
        assert self.library.SSL_renegotiate(self.tls) == 1
        if self.library.SSL_do_handshake(self.tls) != 1:
            return False
        return bool(self.library.SSL_read(self.tls, ctypes.create_string_buffer(1), 1) == 1)

    def close(self, politely: bool = True) -> None:
        """End it."""
        if politely:
            self.library.SSL_shutdown(self.tls)
        self.library.SSL_free(self.tls)
        self.library.SSL_CTX_free(self.context)
        self.library.ERR_clear_error()
        self.socket.close()


@skipUnless(bare_openssl(), "Python's ssl hides its OpenSSL, which these tests call")
class KeyUpdateTests(DialogueTestCase):
    """New keys in the middle of an upload, in both directions (RFC 8446 section 4.6.3)."""

    def upload(self, peer: BarePeer) -> int:
        """Send UP with new keys before every other record. Returns how often."""
        updates = 0
        for number, record in enumerate(records(UP)):
            if number % 2:
                peer.update_keys()
                updates += 1
            peer.write(record)
        return updates

    def converse(self, plain: socket.socket, certificate: Any = None) -> bytes:
        peer = BarePeer(plain, TLS_1_3, certificate)
        updates = self.upload(peer)
        answer = peer.read(len(DOWN))
        assert updates > 5 and peer.key_updates == updates, (peer.key_updates, updates)
        peer.close()
        return answer

    def test_server(self) -> None:
        """Our server, on every loop and kind of port."""
        for name in LOOPS:
            for listen in PORTS.values():
                with self.loop(name) as loop:
                    ours = Ours(loop)
                    port = listen(loop.reactor, ours, N).getHost().port
                    plain = socket.create_connection(("127.0.0.1", port), DEADLINE)
                    self.assert_whole(ours, self.in_thread(self.converse, plain), name)

    def test_client(self) -> None:
        """Our client, on every loop."""

        def answer(listening: socket.socket) -> bytes:
            return self.converse(listening.accept()[0], path)

        for name in LOOPS:
            with self.loop(name) as loop, pem_file() as path, socket.create_server(("127.0.0.1", 0)) as listening:
                listening.settimeout(DEADLINE)
                far = self.in_thread(answer, listening)
                ours = Ours(loop)
                wrapped = limited(TLSFactory(optionsForClientTLS("localhost", our_trust()), True, ours, loop.reactor))
                loop.reactor.connectTCP("127.0.0.1", listening.getsockname()[1], wrapped)
                self.assert_whole(ours, far, name)

    def test_full_send_buffer(self) -> None:
        """Row 16: it comes while megabytes wait to be sent to a peer that does not read.

        The upload behind it arrives all the same. When the peer reads at last it gets what was queued, and the
        answer in the new keys behind that.
        """
        queued = pattern(4 * MIB)
        taken = threading.Event()

        def far_end(plain: socket.socket) -> bytes:
            peer = BarePeer(plain, TLS_1_3)
            updates = self.upload(peer)
            assert taken.wait(DEADLINE)
            assert peer.read(len(queued)) == queued
            answer = peer.read(len(DOWN))
            assert peer.key_updates == updates, (peer.key_updates, updates)
            peer.close()
            return answer

        def fill(sink: Sink) -> None:
            sink.descriptor.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            sink.tls.write(queued)

        def unsent(sink: Sink) -> int:
            below = sink.descriptor
            return len(below.dataBuffer) - below.offset + sum(map(len, below._tempDataBuffer))

        for name in LOOPS:
            for listen in PORTS.values():
                taken.clear()
                with self.loop(name) as loop, socket.socket() as plain:
                    ours = Ours(loop)
                    ours.on_handshake = fill
                    port = listen(loop.reactor, ours, N).getHost().port
                    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
                    plain.connect(("127.0.0.1", port))
                    far = self.in_thread(far_end, plain)
                    loop.until(lambda o=ours, f=far: f.done() or (o.sinks and len(o.sinks[0].data) == len(UP)))
                    self.assertGreater(unsent(ours.sinks[0]), 3 * MIB, name)
                    taken.set()
                    self.assert_whole(ours, far, name)


@skipUnless(bare_openssl(), "Python's ssl hides its OpenSSL, which these tests call")
class RenegotiationTests(LoopTestCase):
    """A client of TLS 1.2 that wants to shake hands again."""

    def test_refused(self) -> None:
        """It is told no; what it had sent is delivered, and the connection ends once, as on stock."""

        def far_end(plain: socket.socket) -> tuple[bool, int]:
            peer = BarePeer(plain, TLS_1_2)
            for record in records(UP):
                peer.write(record)
            again = peer.renegotiate()
            peer.close(politely=False)
            return again, peer.refusals

        for name in LOOPS:
            for listen in PORTS.values():
                reasons = []
                for tls in ({"base": StockTransport}, {}):
                    with self.loop(name) as loop:
                        times: list[int] = []
                        shaken: list[Sink] = []
                        factory = SinkFactory(
                            lambda sink, times=times: times.append(sink.tls.getHandle().total_renegotiations()),
                            on_handshake=shaken.append,
                        )
                        port = listen(loop.reactor, factory, N, **tls).getHost().port
                        far = self.in_thread(far_end, socket.create_connection(("127.0.0.1", port), DEADLINE))
                        loop.until(lambda f=factory, far=far: far.done() and f.sinks[0].lost, longest=0.01)
                        self.assertEqual(far.result(), (False, 1))
                        (sink,) = factory.sinks
                        self.assertEqual(isinstance(sink.tls, TLSTransport), not tls)
                        self.assertEqual(bytes(sink.data), UP)
                        self.assertEqual((len(shaken), set(times), sink.violations), (1, {0}, []))
                        reasons.append([reason.type for reason in sink.lost])
                self.assertEqual(reasons[0], reasons[1], name)
                self.assertEqual(len(reasons[1]), 1)
