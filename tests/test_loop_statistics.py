"""What a reactor tells of itself: counts of turns and synthesised reads, and a line that says why there was one."""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
from typing import Any

import uvloop
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.error import ConnectionLost
from twisted.internet.posixbase import PosixReactorBase
from twisted.internet.tcp import Connection
from twisted.logger import LogLevel, capturedLogs, formatEvent
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from lwstwisted.interfaces import IPendingReads, LoopStatistics
from lwstwisted.loop import foreign, reactor
from lwstwisted.loop.foreign import LwsAsyncioReactor
from lwstwisted.loop.pending import PendingReads, pending_reads
from lwstwisted.loop.reactor import LwsPollReactor, LwsReactor, LwsSelectReactor, MergingReactor
from lwstwisted.loop.tls import CIPHERTEXT_READ, DELIVERY, READ_BUDGET
from tests.tls_peer import (
    MAX_RECORD,
    VERSIONS,
    ListeningSink,
    Sink,
    SinkFactory,
    Talk,
    ViewSink,
    cut,
    discard,
    listen_on_our_port,
    listen_on_stock_port,
    pattern,
)

N = 4096
"""Plaintext bytes that a reader takes in one turn."""


class HandTime:
    """A clock for the modules that measure turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


class SlowWait(PosixReactorBase):
    """A stock reactor whose wait takes an hour, and announces one event."""

    clock: HandTime
    event: Any = None

    def doIteration(self, timeout: float | None) -> None:
        self.clock.pass_by(3600)
        if self.event is not None:
            self._doReadOrWrite(self.event)

    def _doReadOrWrite(self, event: Any) -> None:
        event()

    def installWaker(self) -> None:
        pass


class SlowWaitReactor(MergingReactor, SlowWait):
    """The same with our part before it."""


class SlowReader:
    """A pending reader whose turn takes some seconds."""

    def __init__(self, clock: HandTime, seconds: float) -> None:
        self.doRead = lambda: clock.pass_by(seconds)

    def logPrefix(self) -> str:
        return "slow"


class CountedReader:
    """A reader that stays pending for five turns."""

    def __init__(self, reactor: Any, done: Any) -> None:
        self.reactor, self.done = reactor, done
        self.turns = 0

    def doRead(self) -> None:
        self.turns += 1
        if self.turns < 5:
            self.reactor.addPending(self)
        else:
            self.done()

    def logPrefix(self) -> str:
        return "counted"


class TurnTests(SynchronousTestCase):
    """How long others had to wait."""

    def setUp(self) -> None:
        self.clock = HandTime()
        self.patch(reactor, "time", self.clock)
        self.reactor = SlowWaitReactor()
        self.reactor.clock = self.clock

    def turn(self) -> LoopStatistics:
        self.reactor.runUntilCurrent()
        self.reactor.doIteration(None)
        return self.reactor.statistics()

    def test_waiting_is_not_work(self) -> None:
        """A loop that has nothing to do for hours has had no long turn."""
        self.turn()
        said = self.turn()
        self.assertEqual((said.turns, said.longest_turn), (2, 0.0))

    def test_all_phases_count(self) -> None:
        """From one wait to the next: events of the kernel, synthesised reads, and the timers that are due then."""
        self.reactor.callLater(0, self.clock.pass_by, 3)  # before the wait, so it is not added to what follows it
        self.reactor.event = lambda: self.clock.pass_by(5)
        self.reactor.addPending(SlowReader(self.clock, 7))  # type: ignore[arg-type]
        self.assertEqual(self.turn().longest_turn, 12)
        self.reactor.event = None
        self.reactor.callLater(0, self.clock.pass_by, 4)
        self.assertEqual(self.turn().longest_turn, 16)

    def test_the_longest_stays(self) -> None:
        """A shorter turn afterwards does not hide it."""
        self.reactor.event = lambda: self.clock.pass_by(5)
        self.turn()
        self.reactor.event = lambda: self.clock.pass_by(4)
        self.assertEqual(self.turn().longest_turn, 5)

    def test_twisted_without_that_name(self) -> None:
        """Where Twisted tells us nothing of its events the rest is still counted, and everything works."""

        class Renamed(SlowWait):
            def doIteration(self, timeout: float | None) -> None:
                self.clock.pass_by(3600)
                self.event()

        class RenamedReactor(MergingReactor, Renamed):
            pass

        self.reactor = RenamedReactor()
        self.reactor.clock = self.clock
        self.reactor.event = lambda: self.clock.pass_by(5)
        self.reactor.addPending(SlowReader(self.clock, 7))  # type: ignore[arg-type]
        self.assertEqual(self.turn().longest_turn, 7)

    def test_asyncio(self) -> None:
        """The same on asyncio, from the end of one wait to the begin of the next."""
        self.patch(foreign, "time", self.clock)
        ours = LwsAsyncioReactor()
        self.addCleanup(ours._loop.close)
        self.addCleanup(discard, ours)
        loop = ours._loop

        def turn(*calls: Any) -> LoopStatistics:
            for call in calls:
                loop.call_soon(call)
            loop.call_soon(loop.stop)
            loop.run_forever()
            return ours.statistics()

        before = turn().turns
        assert before is not None
        turn(lambda: self.clock.pass_by(5), lambda: self.clock.pass_by(6))
        said = turn()
        self.assertEqual((said.turns, said.longest_turn), (before + 2, 11.0))


class CountTests(SynchronousTestCase):
    """What a connection adds to the counts."""

    def test_the_record(self) -> None:
        """It cannot be changed by who looks at it, and any list gives one."""
        self.assertTrue(verifyObject(IPendingReads, PendingReads(EPollReactor)))
        ours = LwsReactor()
        self.addCleanup(discard, ours)
        said = ours.statistics()
        self.assertEqual(said, LoopStatistics(0, 0.0, 0, 0, 0))
        with self.assertRaises(dataclasses.FrozenInstanceError):
            said.pending = 1  # type: ignore[misc]

    def test_uvloop(self) -> None:
        """uvloop tells nobody of its turns, so they are unknown and not zero."""
        loop = uvloop.new_event_loop()
        self.addCleanup(loop.close)
        ours = LwsAsyncioReactor(loop)
        self.addCleanup(discard, ours)
        self.assertEqual(ours.statistics(), LoopStatistics(None, None, 0, 0, 0))

    def test_parked_and_pending(self) -> None:
        """An upload held back with plaintext left is parked; resumed it is pending; at its end, neither."""
        for make_reactor in (LwsReactor, LwsPollReactor, LwsSelectReactor, EPollReactor):
            for listen in (listen_on_our_port, listen_on_stock_port):
                self.check_parked_and_pending(make_reactor(), listen)

    def check_parked_and_pending(self, loop: Any, listen: Any) -> None:
        factory = SinkFactory(lambda sink: sink.pause())
        with Talk(loop, listen, ssl.TLSVersion.TLSv1_3, factory, budget=N, held=False) as talk:

            def counts() -> tuple[int, int, int]:
                said = pending_reads(loop).statistics()
                return said.synthesised_reads, said.pending, said.parked

            self.assertEqual(counts(), (0, 0, 0))
            talk.peer.send(talk.peer.seal(pattern(3 * N)))
            talk.loop.until(lambda: talk.sink.deliveries)
            self.assertEqual(counts(), (0, 0, 1))
            talk.sink.resume()
            self.assertEqual(counts(), (0, 1, 0))
            talk.sink.pause()
            self.assertEqual(counts(), (0, 0, 1))
            talk.sink.resume()
            talk.loop.until(lambda: len(talk.sink.deliveries) == 2)
            self.assertEqual(counts(), (1, 0, 1))
            talk.sink.tls.abortConnection()
            self.assertEqual(counts(), (1, 0, 0))

    def test_lost_while_parked(self) -> None:
        """A connection that ends by itself while it is parked is no longer counted."""
        ours = LwsReactor()
        factory = SinkFactory(lambda sink: sink.pause())
        with Talk(ours, listen_on_our_port, ssl.TLSVersion.TLSv1_3, factory, budget=N, held=False) as talk:
            talk.peer.send(talk.peer.seal(pattern(2 * N)))
            talk.loop.until(lambda: talk.sink.deliveries)
            self.assertEqual(ours.statistics().parked, 1)
            talk.sink.descriptor.connectionLost(Failure(ConnectionLost()))
            self.assertEqual(ours.statistics().parked, 0)

    def test_synthesised_reads(self) -> None:
        """One record of five budgets: the kernel announces the first, and four reads are ours."""
        for make_reactor in (LwsReactor, LwsPollReactor, LwsSelectReactor):
            ours = make_reactor()
            with Talk(ours, listen_on_our_port, ssl.TLSVersion.TLSv1_3, budget=1024, held=False) as talk:
                talk.peer.send(talk.peer.seal(pattern(5 * 1024)))
                talk.loop.until(lambda talk=talk: len(talk.sink.data) == 5 * 1024)
                self.assertEqual(ours.statistics().synthesised_reads, 4)

    def test_on_asyncio_and_uvloop(self) -> None:
        """The same count on loops that drive themselves."""
        for new_loop in (asyncio.SelectorEventLoop, uvloop.new_event_loop):
            loop = new_loop()
            self.addCleanup(loop.close)
            ours = LwsAsyncioReactor(loop)
            self.addCleanup(discard, ours)
            ours.addPending(CountedReader(ours, loop.stop))  # type: ignore[arg-type]
            loop.run_forever()
            self.assertEqual(ours.statistics().synthesised_reads, 5)


class FullSpeedTests(SynchronousTestCase):
    """What an upload at full speed costs, in turns and deliveries."""

    SIZE = 45 * MAX_RECORD
    READS = -(-45 * (MAX_RECORD + 22) // CIPHERTEXT_READ)  # RFC 8446 section 5.2: header, type and tag are 22 bytes

    def upload(self, kind: type[Sink]) -> tuple[list[int], int]:
        """Have everything arrive before the first byte is read, and then read it. Returns deliveries and turns."""
        with Talk(LwsReactor(), listen_on_our_port, VERSIONS[1], SinkFactory(kind=kind), budget=READ_BUDGET) as talk:
            data = pattern(self.SIZE)
            talk.arrive(talk.peer.seal(*cut(data, 45 * [MAX_RECORD])))
            talk.sink.resume()
            turns = talk.loop.until(lambda: len(talk.sink.data) == self.SIZE)
            self.assertEqual(bytes(talk.sink.data), data)
            self.assertEqual(talk.sink.violations, [])
            self.assertEqual(talk.reactor.statistics().synthesised_reads, 0)
            # But for the one in which the end of the pause made it look for something left.
            return talk.sink.deliveries, turns - 1

    def test_views(self) -> None:
        """Each read of the socket is one turn and one delivery; none is spent on finding that nothing is left."""
        deliveries, turns = self.upload(ViewSink)
        self.assertEqual(len(deliveries), turns)
        self.assertEqual(turns, self.READS)

    def test_bytes(self) -> None:
        """Blocks of memory stay so small that the allocator reuses them; that costs deliveries, and no turns."""
        deliveries, turns = self.upload(ListeningSink)
        self.assertEqual(max(deliveries), DELIVERY)
        self.assertLess(DELIVERY, 128 * 1024)
        self.assertEqual(turns, self.READS)

    def test_startTLS_delivers_at_once(self) -> None:
        """What one read of a stock transport brings is one delivery, as its pause is told to nobody but the socket."""
        self.assertGreaterEqual(DELIVERY, Connection.bufferSize + MAX_RECORD)


class WhyTests(SynchronousTestCase):
    """The debug line that tells why a read was synthesised."""

    def setUp(self) -> None:
        self.events = self.enterContext(capturedLogs())

    @property
    def lines(self) -> list[str]:
        """What the transport has logged, all of it for debugging."""
        events = [event for event in self.events if event["log_namespace"] == "lwstwisted.loop.tls"]
        self.assertEqual({event["log_level"] for event in events} - {LogLevel.debug}, set())
        return [formatEvent(event) for event in events]

    def talk(self) -> Talk:
        return Talk(LwsReactor(), listen_on_our_port, ssl.TLSVersion.TLSv1_3, budget=N, held=False)

    def test_budget(self) -> None:
        """Twenty records larger than the budget: one line for the connection, with its peer and the reason."""
        with self.talk() as talk:
            data = pattern(20 * 2 * N)
            talk.peer.send(talk.peer.seal(*cut(data, 20 * [2 * N])))
            talk.loop.until(lambda: len(talk.sink.data) == len(data))
            (line,) = self.lines
            self.assertIn("the budget of its turn was used up", line)
            self.assertIn(str(talk.peer.socket.getsockname()[1]), line)

    def test_resumed(self) -> None:
        """A consumer that pauses and resumes: one further line, however often it does."""
        with self.talk() as talk:
            data = pattern(4 * 2 * N)
            talk.factory.on_delivery = lambda sink: sink.pause()
            talk.peer.send(talk.peer.seal(*cut(data, 4 * [2 * N])))

            def arrived() -> bool:
                if talk.sink.is_paused:
                    talk.sink.resume()
                return len(talk.sink.data) == len(data)

            talk.loop.until(arrived)
            self.assertEqual(len(self.lines), 1)
            self.assertIn("its consumer resumed", self.lines[0])

    def test_nothing_to_tell(self) -> None:
        """A connection whose reads were all announced by the kernel says nothing."""
        with self.talk() as talk:
            talk.peer.send(talk.peer.seal(pattern(N // 2)))
            talk.loop.until(lambda: talk.sink.data)
            self.assertEqual(self.lines, [])
