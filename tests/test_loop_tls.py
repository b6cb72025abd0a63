"""The TLS transport against a real peer: a pause is exact, leftovers are never lost, and an end is an end."""

from __future__ import annotations

import hashlib
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.selectreactor import SelectReactor
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.loop.reactor import LwsReactor
from lwstwisted.loop.tls import TLSTransport
from tests.tls_peer import (
    VERSIONS,
    ListeningSink,
    Peer,
    Sink,
    SinkFactory,
    StockTransport,
    Talk,
    ViewSink,
    cut,
    is_pending,
    listen_on_our_port,
    listen_on_stock_port,
    pattern,
)

N = 4096
"""Plaintext bytes that a reader takes in one turn."""

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

    def test_pause_at_every_delivery(self) -> None:
        """Row 8: paused after each delivery and resumed turns later, nothing comes in between or gets lost."""
        sizes = [16384, N + 1, 1, 16384, N, 7 * N // 2]
        data = pattern(sum(sizes))
        for talk in self.every_talk():

            def rest(sink: Sink, talk: Talk = talk) -> None:
                sink.pause()
                talk.loop.later(3, sink.resume)

            talk.factory.on_delivery = rest
            talk.arrive(talk.peer.seal(*cut(data, sizes)))
            talk.sink.resume()
            talk.loop.until(lambda talk=talk: len(talk.sink.data) == len(data))
            self.assert_whole(talk, data)
            self.assertGreaterEqual(len(talk.sink.deliveries), len(data) // N)

    def test_pause_while_it_arrives(self) -> None:
        """Row 8: the same while the client goes on sending, piece by piece of a record."""
        sizes = [16384, N + 1, 16384]
        data = pattern(sum(sizes))
        for talk in self.every_talk(held=False):

            def rest(sink: Sink, talk: Talk = talk) -> None:
                sink.pause()
                talk.loop.later(2, sink.resume)

            talk.factory.on_delivery = rest
            sealed = talk.peer.seal(*cut(data, sizes))
            for start in range(0, len(sealed), 5000):
                talk.peer.send(sealed[start : start + 5000])
                talk.loop.turn()
            talk.loop.until(lambda talk=talk: len(talk.sink.data) == len(data))
            self.assert_whole(talk, data)

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

    def test_paused_again_while_replaying(self) -> None:
        """Row 9: paused again before any leftover was used, after one of them, and after all."""
        data = pattern(16384)
        for talk in self.every_talk():
            talk.factory.on_delivery = Sink.pause
            talk.arrive(talk.peer.seal(data))
            for delivered in range(5):
                for _ in range(3):  # none used: resumed and paused before the loop turns
                    talk.sink.resume()
                    talk.sink.pause()
                    self.assertFalse(talk.is_pending())
                    talk.loop.turn()
                    talk.loop.turn()
                    self.assertEqual(talk.sink.deliveries, delivered * [N])
                talk.sink.resume()
                if delivered < 4:
                    count = delivered + 1
                    talk.loop.until(lambda talk=talk, count=count: len(talk.sink.deliveries) == count)
            talk.loop.turn()
            talk.loop.turn()
            self.assertFalse(talk.is_pending())
            self.assert_whole(talk, data)

    def test_pausing_costs_no_turns(self) -> None:
        """Row 3: an upload that is held back with plaintext left neither spins nor stands in any list."""
        for talk in self.every_talk():
            talk.factory.on_delivery = Sink.pause
            talk.arrive(talk.peer.seal(pattern(16384)))
            talk.sink.resume()
            talk.loop.until(lambda talk=talk: talk.sink.deliveries)
            self.assertTrue(talk.sink.tls.has_leftover)

            self.assertLessEqual(talk.loop.idle_turns(), 10)

            self.assertFalse(talk.is_pending())
            self.assertFalse(talk.is_reader())
            self.assertEqual(talk.sink.deliveries, [N])

    def test_an_idle_connection_costs_no_turns(self) -> None:
        """Row 1: after everything was read, the connection is in the kernel's hands only."""
        for talk in self.every_talk():
            talk.arrive(talk.peer.seal(pattern(16384)))
            talk.sink.resume()
            talk.loop.until(lambda talk=talk: len(talk.sink.data) == 16384)
            talk.loop.turn()
            self.assertFalse(talk.is_pending())
            self.assertTrue(talk.is_reader())
            self.assertLessEqual(talk.loop.idle_turns(), 10)

    def test_resumed_by_a_timer(self) -> None:
        """Row 11: a timer that resumes leftovers is enough; the loop does not wait for the socket."""
        for talk in self.every_talk():
            talk.factory.on_delivery = Sink.pause
            talk.arrive(talk.peer.seal(pattern(2 * N)))
            talk.sink.resume()
            talk.loop.until(lambda talk=talk: talk.sink.deliveries)
            talk.reactor.callLater(0.001, talk.sink.resume)
            turns = talk.loop.until(lambda talk=talk: len(talk.sink.data) == 2 * N)
            self.assertLessEqual(turns, 5)

    def test_resumed_from_a_thread(self) -> None:
        """Row 11: a store's thread that resumes by callFromThread wakes the loop at once."""
        for talk in self.every_talk():
            talk.factory.on_delivery = Sink.pause
            talk.arrive(talk.peer.seal(pattern(2 * N)))
            talk.sink.resume()
            talk.loop.until(lambda talk=talk: talk.sink.deliveries)
            store = threading.Thread(target=talk.reactor.callFromThread, args=(talk.sink.resume,))
            store.start()
            turns = talk.loop.until(lambda talk=talk: len(talk.sink.data) == 2 * N)
            store.join()
            self.assertLessEqual(turns, 5)

    def test_writing_goes_on(self) -> None:
        """Row 12: a response streams out while the upload is held back, and then nothing spins."""
        answer = pattern(500_000)
        for talk in self.every_talk():
            talk.factory.on_delivery = Sink.pause
            talk.arrive(talk.peer.seal(pattern(16384)))
            talk.sink.resume()
            talk.loop.until(lambda talk=talk: talk.sink.deliveries)
            talk.sink.tls.write(answer)
            got = bytearray()

            def arrived(talk: Talk = talk, got: bytearray = got) -> bool:
                got.extend(talk.peer.receive())
                return len(got) == len(answer)

            talk.loop.until(arrived, longest=0.01)
            self.assertEqual(got, answer)
            self.assertEqual(talk.sink.deliveries, [N])
            self.assertLessEqual(talk.loop.idle_turns(), 10)

    def test_reading_and_writing_at_once(self) -> None:
        """Row 20: an upload and the response that echoes it both come through."""
        data = pattern(80_000)
        for talk in self.every_talk():
            talk.factory.on_delivery = lambda sink: sink.tls.write(bytes(sink.data[-sink.deliveries[-1] :]))
            talk.arrive(talk.peer.seal(*cut(data, 5 * [16000])))
            talk.sink.resume()
            got = bytearray()

            def arrived(talk: Talk = talk, got: bytearray = got) -> bool:
                got.extend(talk.peer.receive())
                return len(got) == len(data)

            talk.loop.until(arrived, longest=0.01)
            self.assertEqual(got, data)
            self.assert_whole(talk, data)


class RecordTests(TalkTestCase):
    """Records that arrive together, in parts, or with the end of the handshake."""

    def test_request_with_the_finished(self) -> None:
        """Row 17: a request in the same flight as the client's Finished is looked at, in all its slices."""
        data = pattern(16384)
        for way in WAYS:
            with self.talk(way=way, held=False) as talk:
                peer = Peer(talk.port, TLS_1_3, talk.loop.step)
                talk.peers.append(peer)
                finished = peer.handshake(finish=False)
                peer.send(finished + peer.seal(data))
                sinks = talk.factory.sinks
                talk.loop.until(lambda sinks=sinks: len(sinks) == 2 and len(sinks[1].data) == len(data))
                self.assertEqual(sinks[1].data, data)

    def test_two_records_and_a_half(self) -> None:
        """Row 18: what is whole is delivered though more is on its way; half a record makes nobody pending."""
        first, second, third = cut(pattern(3 * N + 2), [N + 1, 1, 2 * N])
        for talk in self.every_talk():
            whole, half = talk.peer.seal(first, second), talk.peer.seal(third)
            talk.arrive(whole + half[:N])
            talk.sink.resume()
            talk.loop.until(lambda talk=talk: len(talk.sink.data) == N + 2)
            talk.loop.turn()
            talk.loop.turn()
            self.assertEqual(talk.sink.data, first + second)
            self.assertFalse(talk.is_pending())
            self.assertFalse(talk.sink.tls.has_leftover)
            self.assertLessEqual(talk.loop.idle_turns(), 10)

            talk.peer.send(half[N:])
            talk.loop.until(lambda talk=talk: len(talk.sink.data) == 3 * N + 2)
            self.assert_whole(talk, first + second + third)

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

    def test_peer_leaves_while_we_pause(self) -> None:
        """Row 37: a client that sends all and goes away while we hold it back: all arrives, then one end."""
        sizes = 20 * [N]
        data = pattern(sum(sizes))
        for polite in (True, False):
            for talk in self.every_talk():
                sealed = talk.peer.seal(*cut(data, sizes))
                talk.arrive(sealed + (talk.peer.seal_end() if polite else b""))
                talk.peer.socket.shutdown(socket.SHUT_WR)
                talk.sink.resume()
                talk.loop.until(lambda talk=talk: talk.sink.lost)
                self.assert_whole(talk, data)
                talk.sink.lost[0].trap(ConnectionDone if polite else ConnectionLost)
                self.assert_gone(talk)

    def test_peer_leaves_and_we_pause_at_every_delivery(self) -> None:
        """Row 37: the end waits behind each further pause, too."""
        data = pattern(16000)  # no multiple of N: the end is met behind the last bytes, in the same read
        for talk in self.every_talk():

            def rest(sink: Sink, talk: Talk = talk) -> None:
                sink.pause()
                talk.loop.later(2, sink.resume)

            talk.factory.on_delivery = rest
            talk.factory.on_lost = lambda sink: self.assertFalse(sink.is_paused)
            talk.arrive(talk.peer.seal(data) + talk.peer.seal_end())
            talk.peer.socket.shutdown(socket.SHUT_WR)
            talk.sink.resume()
            talk.loop.until(lambda talk=talk: talk.sink.lost)
            self.assert_whole(talk, data)
            self.assert_gone(talk)

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

    def test_aborted_with_data_pending(self) -> None:
        """Row 23: an aborted connection is in no list from that moment on, and hears one end."""
        for paused in (False, True):
            for talk in self.every_talk():
                if paused:
                    talk.factory.on_delivery = Sink.pause
                self.start(talk)
                self.assertEqual(talk.is_pending(), not paused)
                talk.sink.tls.abortConnection()
                self.assertFalse(talk.is_pending())
                self.assertFalse(talk.is_reader())
                talk.sink.resume()
                self.assertFalse(talk.is_pending())
                self.assertFalse(talk.is_reader())
                talk.loop.until(lambda talk=talk: talk.sink.lost)
                talk.sink.lost[0].trap(ConnectionAborted)
                self.assertEqual(talk.sink.deliveries, [N])
                self.assert_gone(talk)

    def test_aborted_inside_a_delivery(self) -> None:
        """Row 23: the same from within."""
        for talk in self.every_talk():
            talk.factory.on_delivery = lambda sink: sink.tls.abortConnection()
            self.start(talk)
            self.assertFalse(talk.is_pending())
            self.assertFalse(talk.is_reader())
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

    def test_half_of_them_closed_in_one_turn(self) -> None:
        """Row 21: the first of a hundred pending readers aborts fifty others: those end, the rest complete."""
        data = pattern(3 * N)
        for way in ("our port on our reactor", "our port on a stock reactor"):
            with self.talk(way=way) as talk:
                for _ in range(99):
                    talk.connect()
                sinks = talk.factory.sinks
                for peer, sink in zip(talk.peers, sinks, strict=True):
                    talk.peer, talk.sink = peer, sink
                    talk.arrive(peer.seal(data))
                for sink in sinks:
                    sink.resume()
                talk.loop.until(lambda sinks=sinks: all(sink.deliveries == [N] for sink in sinks))
                self.assertTrue(all(is_pending(talk.reactor, sink.reader) for sink in sinks))
                victims: list[Sink] = []

                def abort_half(sink: Sink, sinks: list[Sink] = sinks, victims: list[Sink] = victims) -> None:
                    if not victims:
                        victims += [other for other in sinks if other is not sink][::2]
                        for victim in victims:
                            victim.tls.abortConnection()

                talk.factory.on_delivery = abort_half
                talk.loop.turn()
                self.assertEqual(len(victims), 50)
                self.assertTrue(all(len(sink.deliveries) == (1 if sink in victims else 2) for sink in sinks))
                talk.loop.until(lambda v=victims: all(sink.lost for sink in v))
                rest = [sink for sink in sinks if sink not in victims]
                talk.loop.until(lambda rest=rest: all(len(sink.data) == len(data) for sink in rest))
                for sink in sinks:
                    self.assertEqual(sink.deliveries, [N] if sink in victims else 3 * [N])
                    self.assertEqual(len(sink.lost), int(sink in victims))


STEPS = st.lists(
    st.one_of(
        st.sampled_from(["pause", "resume", "turn", "turn", "write"]),
        st.integers(1, 16384),
    ),
    max_size=40,
)


class AnyOrderTests(TalkTestCase):
    """Pauses, resumes, turns and records in any order."""

    def check(self, talk: Talk) -> None:
        """Rows 1 and 3: who is in which list, between any two steps."""
        tls, pending = talk.sink.tls, talk.is_pending()
        if talk.sink.is_paused:
            self.assertFalse(pending or talk.is_reader())
        else:
            self.assertEqual(pending, tls.has_leftover)
            if tls._reader is not tls:
                self.assertTrue(talk.is_reader())  # so whoever is pending is a reader

    @settings(max_examples=30, deadline=None, database=None, derandomize=True)
    @given(
        steps=STEPS,
        way=st.sampled_from(sorted(WAYS)),
        version=st.sampled_from(VERSIONS),
        pauses=st.sets(st.integers(1, 30)),
    )
    def test_invariants(self, steps: list[str | int], way: str, version: ssl.TLSVersion, pauses: set[int]) -> None:
        """After each step the lists are right; in the end every byte has arrived once, in order."""

        def pause_sometimes(sink: Sink) -> None:
            if len(sink.deliveries) in pauses:
                sink.pause()

        sent = bytearray()
        with self.talk(SinkFactory(pause_sometimes), way, version=version, held=False) as talk:
            for step in steps:
                if isinstance(step, int):
                    data = hashlib.sha256(len(sent).to_bytes(8, "big")).digest() * 512
                    talk.peer.send(talk.peer.seal(data[:step]))
                    sent += data[:step]
                elif step == "turn":
                    talk.loop.turn()
                elif step == "write":
                    talk.sink.tls.write(b"something")
                else:
                    getattr(talk.sink, step)()
                self.check(talk)

            def arrived() -> bool:
                self.check(talk)
                if talk.sink.is_paused:
                    talk.sink.resume()
                return len(talk.sink.data) == len(sent)

            talk.loop.until(arrived, longest=0.01)
            self.assertEqual(talk.sink.data, sent)
