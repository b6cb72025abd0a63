"""The TLS transport against a real peer: what the rows of ``test_loop_rows.py`` leave to say."""

from __future__ import annotations

import hashlib
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from twisted.internet.epollreactor import EPollReactor
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.selectreactor import SelectReactor
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.loop.reactor import LwsReactor
from lwstwisted.loop.tls import TLSTransport
from tests.tls_peer import (
    VERSIONS,
    ListeningSink,
    N,
    Sink,
    SinkFactory,
    StockTransport,
    Talk,
    ViewSink,
    listen_on_our_port,
    listen_on_stock_port,
    pattern,
)

WAYS: dict[str, tuple[Any, Any]] = {
    "our port on our reactor": (LwsReactor, listen_on_our_port),
    "stock port on our reactor": (LwsReactor, listen_on_stock_port),
    "our port on a stock reactor": (EPollReactor, listen_on_our_port),
    "stock port on a stock reactor": (SelectReactor, listen_on_stock_port),
}

TLS_1_3 = ssl.TLSVersion.TLSv1_3


class Boom(Exception):
    """A bug in an application."""


class TalkTestCase(SynchronousTestCase):
    @contextmanager
    def talk(
        self, factory: SinkFactory | None = None, way: str = "our port on our reactor", **how: Any
    ) -> Iterator[Talk]:
        make_reactor, listen = WAYS[way]
        how.setdefault("budget", N)
        how.setdefault("version", TLS_1_3)
        with Talk(make_reactor(), listen, factory=factory, **how) as talk:
            yield talk
            for sink in talk.factory.sinks:
                self.assertEqual(sink.violations, [])
                self.assertLessEqual(len(sink.lost), 1)

    def every_talk(self, events: dict[str, Any] | None = None, **how: Any) -> Iterator[Talk]:
        """One talk for each way to listen and each version; ``how`` is as for ``talk``."""
        for way in WAYS:
            for version in VERSIONS:
                with self.talk(SinkFactory(**events or {}), way, version=version, **how) as talk:
                    yield talk

    def assert_whole(self, talk: Talk, data: bytes) -> None:
        self.assertEqual(hashlib.sha256(talk.sink.data).hexdigest(), hashlib.sha256(data).hexdigest())


class PauseTests(TalkTestCase):
    """An upload whose consumer says "not now"."""

    def test_paused_from_the_start(self) -> None:
        """A protocol that pauses in connectionMade: the handshake goes on, the body waits."""
        for talk in self.every_talk(held=False, events={"on_made": Sink.pause}):
            data = pattern(3 * N)
            talk.arrive(talk.peer.seal(data))
            talk.loop.turn()
            self.assertFalse(talk.is_reader())
            self.assertEqual(talk.sink.deliveries, [])

            talk.sink.resume()
            talk.loop.until(lambda talk=talk: len(talk.sink.data) == 3 * N)
            self.assert_whole(talk, data)

    def test_paused_and_resumed_within_a_delivery(self) -> None:
        """Both at once are as good as neither."""
        for talk in self.every_talk():

            def both(sink: Sink) -> None:
                sink.pause()
                sink.resume()

            talk.factory.on_delivery = both
            data = pattern(16384)
            talk.arrive(talk.peer.seal(data))
            talk.sink.resume()
            talk.loop.until(lambda talk=talk: len(talk.sink.data) == 16384)
            self.assert_whole(talk, data)
            self.assertEqual(talk.sink.deliveries, 4 * [N])

class BytesTests(TalkTestCase):
    """What the protocol and the peer are given."""

    def test_who_gets_views(self) -> None:
        """A protocol that provides IBufferReceiver gets memoryviews, any other one bytes."""
        for kind, expected in ((ViewSink, memoryview), (ListeningSink, bytes)):
            for talk in self.every_talk(events={"kind": kind}):
                talk.arrive(talk.peer.seal(pattern(16384)))
                talk.sink.resume()
                talk.loop.until(lambda talk=talk: len(talk.sink.data) == 16384)
                self.assertEqual(talk.sink.kinds, {expected})
                self.assert_whole(talk, pattern(16384))

    def test_all_output_is_flushed(self) -> None:
        """Whatever OpenSSL wants to send goes out at once; stock sends 32 KiB, and the rest at the next event."""
        for talk in self.every_talk(held=False):
            for _ in range(10):
                talk.sink.tls.getHandle().send(bytes(16384))
            talk.peer.send(talk.peer.seal(b"anything"))
            got = bytearray()

            def arrived(talk: Talk = talk, got: bytearray = got) -> bool:
                got.extend(talk.peer.receive())
                return len(got) == 10 * 16384

            talk.loop.until(arrived, longest=0.01)


class EndTests(TalkTestCase):
    """Connections that end with plaintext left, in every way they can."""

    def start(self, talk: Talk, size: int = 16384) -> None:
        """Have the first budget delivered, so that the rest is left."""
        talk.arrive(talk.peer.seal(pattern(size)))
        talk.sink.resume()
        talk.loop.until(lambda: talk.sink.deliveries)

    def assert_gone(self, talk: Talk) -> None:
        self.assertFalse(talk.is_pending())
        self.assertFalse(talk.is_reader())
        self.assertEqual(len(talk.sink.lost), 1)
        # Whatever its owner does with it from now on, it comes back to no list.
        talk.sink.tls.resumeProducing()
        talk.sink.tls.pauseProducing()
        talk.sink.tls.resumeProducing()
        self.assertFalse(talk.is_pending())
        self.assertFalse(talk.is_reader())
        talk.sink.tls.loseConnection()
        talk.sink.tls.abortConnection()
        self.assertFalse(talk.is_pending())
        deliveries = list(talk.sink.deliveries)
        for _ in range(3):
            talk.loop.turn()
        self.assertEqual(talk.sink.deliveries, deliveries)
        self.assertEqual(len(talk.sink.lost), 1)

    def test_lost_with_data_pending(self) -> None:
        """A connection that the loop gives up (a reset, its own shutdown): what was decrypted arrives first."""
        for talk in self.every_talk():
            self.start(talk)
            talk.sink.descriptor.connectionLost(Failure(ConnectionLost()))
            self.assert_whole(talk, pattern(16384))
            self.assert_gone(talk)

    def test_same_reason_as_stock(self) -> None:
        """An application sees the same reason for an end as on Twisted's own transport."""
        for version in VERSIONS:
            for polite in (True, False):
                reasons = []
                for tls in ({"base": StockTransport}, {}, {"binding": None}):
                    with self.talk(version=version, held=False, **tls) as talk:
                        self.assertEqual(isinstance(talk.sink.tls, TLSTransport), "base" not in tls)
                        talk.peer.send(talk.peer.seal(b"x") + (talk.peer.seal_end() if polite else b""))
                        talk.peer.socket.shutdown(socket.SHUT_WR)
                        talk.loop.until(lambda talk=talk: talk.sink.lost)
                        reasons.append(talk.sink.lost[0].type)
                self.assertEqual(reasons, 3 * [ConnectionDone if polite else ConnectionLost])

    def test_garbage(self) -> None:
        """A record that fails its check ends the connection once, behind what was good before it."""
        for talk in self.every_talk():
            talk.arrive(talk.peer.seal(pattern(N + 1)) + b"\x17\x03\x03\x00\x20" + bytes(32))
            talk.sink.resume()
            talk.loop.until(lambda talk=talk: talk.sink.lost)
            self.assert_whole(talk, pattern(N + 1))
            self.assertIn("SSL", talk.sink.lost[0].type.__module__)
            self.assert_gone(talk)

    def test_protocol_raises(self) -> None:
        """A bug in dataReceived with plaintext left brings one logged error and exactly one connectionLost.

        On stock Twisted 26.10 the protocol is never told of the end.
        """
        for at in (1, 2):  # by the kernel's word; as a pending reader
            for talk in self.every_talk():

                def fail(sink: Sink, at: int = at) -> None:
                    if len(sink.deliveries) == at:
                        raise Boom

                talk.factory.on_delivery = fail
                self.start(talk)
                talk.loop.until(lambda talk=talk: talk.sink.lost)
                self.assertEqual(talk.sink.deliveries, at * [N])
                self.assertEqual(len(self.flushLoggedErrors(Boom)), 1)
                self.assert_gone(talk)

    def test_protocol_raises_at_the_loss(self) -> None:
        """A bug that shows when the rest arrives after the connection is lost: logged, and the end is told."""
        for talk in self.every_talk():
            self.start(talk)

            def fail(sink: Sink) -> None:
                raise Boom

            talk.factory.on_delivery = fail
            talk.sink.descriptor.connectionLost(Failure(ConnectionLost()))
            self.assertEqual(len(self.flushLoggedErrors(Boom)), 1)
            self.assert_gone(talk)

    def test_protocol_closes(self) -> None:
        """loseConnection() inside a delivery: the rest is thrown away, and the peer gets a proper goodbye."""
        for talk in self.every_talk():
            talk.factory.on_delivery = lambda sink: sink.tls.loseConnection()
            self.start(talk)
            talk.loop.until(lambda talk=talk: talk.peer.receive() or talk.peer.closed_by_server, longest=0.01)
            talk.peer.send(talk.peer.seal_end())
            talk.loop.until(lambda talk=talk: talk.sink.lost)
            self.assertEqual(talk.sink.deliveries, [N])
            talk.sink.lost[0].trap(ConnectionDone)
            self.assert_gone(talk)

    def test_closed_while_paused(self) -> None:
        """loseConnection() while the upload is held back does not wait for a resume that never comes."""
        for talk in self.every_talk():
            talk.factory.on_delivery = Sink.pause
            self.start(talk)
            talk.sink.tls.write(b"413")
            talk.sink.tls.loseConnection()
            got = bytearray()

            def said_goodbye(talk: Talk = talk, got: bytearray = got) -> bool:
                got.extend(talk.peer.receive())
                return talk.peer.closed_by_server

            talk.loop.until(said_goodbye, longest=0.01)
            self.assertEqual(got, b"413")
            talk.peer.send(talk.peer.seal_end())
            talk.loop.until(lambda talk=talk: talk.sink.lost)
            self.assertEqual(talk.sink.deliveries, [N])
            self.assert_gone(talk)

    def test_reset_while_paused(self) -> None:
        """A connection that is lost while it is held back delivers nothing more, not even on a late resume."""
        for talk in self.every_talk():
            talk.factory.on_delivery = Sink.pause
            self.start(talk)
            talk.peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            talk.peer.close()  # a RST, which shows when we write

            def noticed(talk: Talk = talk) -> object:
                talk.sink.tls.write(b"still there?")
                return talk.sink.lost

            talk.loop.until(noticed, longest=0.01)
            self.assertEqual(talk.sink.deliveries, [N])
            self.assert_gone(talk)
