"""A peer that leaves while it is paused is noticed, and one that only waits is left in peace."""

from __future__ import annotations

import os
import select
import socket
import struct
import unittest
from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.loop import presence
from lwstwisted.loop.presence import LOOK_INTERVAL, PROBE_IDLE, PROBE_INTERVAL, PROBES, PeerWatch
from lwstwisted.loop.reactor import LwsReactor
from tests.tls_peer import DEADLINE, VERSIONS, Talk, listen_on_our_port, listen_on_stock_port, pattern

TCP_REPAIR = 19
"""linux/tcp.h: a socket under repair is closed without a word to its peer, as if its machine had vanished."""


def reset(connection: socket.socket) -> None:
    """End a connection by a RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


class WatchTests(SynchronousTestCase):
    """The looks, on a clock of our own and real sockets."""

    def setUp(self) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listening.close)
        self.far = socket.create_connection(listening.getsockname())
        self.near, _ = listening.accept()
        self.addCleanup(self.near.close)
        self.addCleanup(self.far.close)
        self.clock = Clock()
        self.is_paused = True
        self.gone = 0
        self.watch = self.watch_of(self.near)

    def watch_of(self, handle: object) -> PeerWatch:
        return PeerWatch(self.clock, handle, lambda: self.is_paused, self.note)

    def note(self) -> None:
        self.gone += 1

    def test_reset(self) -> None:
        """A peer that resets the connection is noticed at the next look, once."""
        self.watch.start()
        reset(self.far)
        self.clock.advance(LOOK_INTERVAL)
        self.assertEqual(self.gone, 1)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_not_between_the_looks(self) -> None:
        """A short pause costs no look."""
        for at in (0, 1.3, 4.9):
            self.clock.rightNow = 1000 + at
            self.watch.start()
            before = self.probing()
            self.clock.advance(LOOK_INTERVAL / 2 - 0.1)
            self.assertEqual(self.probing(), before)
            self.assertEqual(len(self.clock.getDelayedCalls()), 1)
            self.watch.stop()
            self.watch = self.watch_of(self.near)

    def test_together(self) -> None:
        """However many connections are paused, and whenever that was, all are looked at in one turn."""
        pairs = [socket.socketpair() for _ in range(20)]
        for near, far in pairs:
            self.addCleanup(near.close)
            self.addCleanup(far.close)
            self.watch_of(near).start()
            self.clock.advance(0.2)
        self.assertEqual({call.getTime() for call in self.clock.getDelayedCalls()}, {LOOK_INTERVAL})
        self.clock.pump([LOOK_INTERVAL] * 10)
        self.assertEqual(len({call.getTime() for call in self.clock.getDelayedCalls()}), 1)

    def test_every_look(self) -> None:
        """A pause may be long: the peer may leave at any time of it."""
        self.watch.start()
        for _ in range(100):
            self.clock.advance(LOOK_INTERVAL)
        self.assertEqual(self.gone, 0)
        reset(self.far)
        self.clock.advance(LOOK_INTERVAL)
        self.assertEqual(self.gone, 1)

    def test_waits_for_its_answer(self) -> None:
        """A peer that has sent all and ended its side is not gone."""
        self.far.sendall(b"all of it")
        self.far.shutdown(socket.SHUT_WR)
        self.watch.start()
        for _ in range(100):
            self.clock.advance(LOOK_INTERVAL)
        self.assertEqual(self.gone, 0)
        self.assertEqual(self.near.recv(100), b"all of it")  # and looking has taken nothing

    def test_pause_is_over(self) -> None:
        """While it is read nobody looks, and the timer ends by itself."""
        self.watch.start()
        self.is_paused = False
        reset(self.far)
        self.clock.advance(LOOK_INTERVAL)
        self.assertEqual((self.gone, self.clock.getDelayedCalls()), (0, []))

    def test_many_pauses(self) -> None:
        """However often an upload is paused, there is one timer."""
        for _ in range(1000):
            self.watch.start()
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)

    def test_stop(self) -> None:
        """A connection that is over leaves no timer, also if its consumer pauses it once more."""
        self.watch.start()
        self.watch.stop()
        self.watch.start()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_without_a_socket(self) -> None:
        """A transport above another one has no socket of its own; whoever has it looks."""
        self.watch_of(object()).start()
        self.watch_of(None).start()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_orderly_end(self) -> None:
        """Both sides ended, or a UNIX peer that has closed: everything was sent, and is not thrown away."""
        self.far.sendall(b"all of it")
        self.near.shutdown(socket.SHUT_WR)
        self.far.shutdown(socket.SHUT_WR)
        near, far = socket.socketpair()
        self.addCleanup(near.close)
        far.sendall(b"all of it")
        far.close()
        for each in (self.near, near):
            self.watch_of(each).start()
            self.clock.pump([LOOK_INTERVAL] * 3)
            self.assertEqual(self.gone, 0)
            self.assertEqual(each.recv(100), b"all of it")

    def probing(self) -> list[int]:
        return [
            self.near.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            self.near.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
            self.near.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
            self.near.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
        ]

    def test_probes(self) -> None:
        """From the first look on the kernel probes, and gives up within 75 seconds of the pause, looks included."""
        before = self.probing()
        self.watch.start()
        self.assertEqual(self.probing(), before)
        self.clock.advance(LOOK_INTERVAL)
        self.assertEqual(self.probing(), [1, PROBE_IDLE, PROBE_INTERVAL, PROBES])
        self.assertLessEqual(LOOK_INTERVAL + PROBE_IDLE + PROBE_INTERVAL * PROBES + LOOK_INTERVAL, 75)

    def test_an_application_that_probes(self) -> None:
        """Who has asked for keep-alive has chosen the times, too."""
        self.near.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.near.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1234)
        before = self.probing()
        self.watch.start()
        self.clock.advance(LOOK_INTERVAL)
        self.assertEqual(self.probing(), before)

    @unittest.skipUnless(os.geteuid() == 0, "only root may have a socket vanish (TCP_REPAIR)")
    def test_vanished(self) -> None:
        """Of a machine that has lost its power nothing is heard: the kernel asks, and the next look knows."""
        self.patch(presence, "PROBE_IDLE", 1)
        self.far.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        self.far.close()
        self.watch.start()
        self.clock.advance(LOOK_INTERVAL)
        self.assertEqual(self.gone, 0)
        poller = select.poll()
        poller.register(self.near, 0)
        self.assertTrue(poller.poll(DEADLINE * 1000))
        self.clock.advance(LOOK_INTERVAL)
        self.assertEqual(self.gone, 1)


class PausedTLSTests(SynchronousTestCase):
    """The same of a TLS connection in a real loop."""

    def setUp(self) -> None:
        self.patch(presence, "LOOK_INTERVAL", 0.01)

    def every_talk(self) -> Any:
        for version in VERSIONS:
            for listen in (listen_on_our_port, listen_on_stock_port):
                with Talk(LwsReactor(), listen, version, budget=4096) as talk:
                    yield talk

    def test_reset(self) -> None:
        """Row 15: a peer that vanishes while we pause ends the connection, without a byte more and with all freed."""
        for talk in self.every_talk():
            talk.arrive(talk.peer.seal(pattern(10000)))
            reset(talk.peer.socket)
            talk.loop.until(lambda talk=talk: talk.sink.lost)
            self.assertEqual((len(talk.sink.lost), bytes(talk.sink.data)), (1, b""))
            self.assertEqual(talk.reactor.statistics().parked, 0)
            self.assertEqual(talk.reactor.getDelayedCalls(), [])

    def test_leftovers(self) -> None:
        """The same where a part was delivered and the rest lies decrypted."""
        for talk in self.every_talk():
            talk.factory.on_delivery = lambda sink: sink.pause()
            talk.arrive(talk.peer.seal(pattern(10000)))
            talk.sink.resume()
            talk.loop.until(lambda talk=talk: talk.sink.deliveries)
            self.assertEqual(talk.reactor.statistics().parked, 1)
            reset(talk.peer.socket)
            talk.loop.until(lambda talk=talk: talk.sink.lost)
            self.assertEqual((len(talk.sink.lost), talk.sink.deliveries), (1, [4096]))
            self.assertEqual(talk.reactor.statistics().parked, 0)

    def test_still_there(self) -> None:
        """However often it is looked at, a client that waits loses nothing, though it has ended its side."""
        for talk in self.every_talk():
            data = pattern(10000)
            talk.arrive(talk.peer.seal(data) + talk.peer.seal_end())
            talk.peer.socket.shutdown(socket.SHUT_WR)
            looks: list[bool] = []
            talk.reactor.callLater(0.05, looks.append, True)
            talk.loop.until(lambda looks=looks: looks)
            self.assertEqual((talk.sink.lost, talk.sink.deliveries), ([], []))
            talk.sink.resume()
            talk.loop.until(lambda talk=talk: talk.sink.lost)
            self.assertEqual(bytes(talk.sink.data), data)

