"""The pending-read list by itself: who gets a turn, how many, and what comes of a reader that fails."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

from twisted.internet.epollreactor import EPollReactor
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHalfCloseableDescriptor, IReadDescriptor
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from lwstwisted.interfaces import IFakePollin
from lwstwisted.loop.pending import PendingReads, pending_reads
from lwstwisted.loop.reactor import LwsReactor
from tests.tls_peer import Loop, discard


@implementer(IReadDescriptor)
class Reader:
    """A reader that counts its turns.

    :param answer: what ``doRead`` does.
    """

    def __init__(self, answer: Callable[[], object] = lambda: None) -> None:
        self.answer = answer
        self.turns = 0
        self.lost: list[Failure] = []

    def doRead(self) -> object:
        self.turns += 1
        return self.answer()

    def logPrefix(self) -> str:
        return "reader"

    def fileno(self) -> int:
        return -1

    def connectionLost(self, reason: Failure) -> None:
        self.lost.append(reason)


@implementer(IHalfCloseableDescriptor)
class HalfCloseableReader(Reader):
    """A reader that can go on writing after the end of its input."""

    def __init__(self, answer: Callable[[], object]) -> None:
        super().__init__(answer)
        self.read_ends: list[Failure] = []

    def readConnectionLost(self, reason: Failure) -> None:
        self.read_ends.append(reason)

    def writeConnectionLost(self, reason: Failure) -> None:
        raise AssertionError("nobody closed this side")


@implementer(IFakePollin)
class HookedReactor(MemoryReactorClock):
    """A loop of somebody's own.

    :ivar told: what the hook was given.
    """

    answer = True

    def __init__(self) -> None:
        super().__init__()
        self.told: list[list[IReadDescriptor]] = []

    def fake_pollin(self, readers: list[IReadDescriptor]) -> bool:
        self.told.append(list(readers))
        return self.answer


class DefaultPathTests(SynchronousTestCase):
    """A loop without the hook."""

    def setUp(self) -> None:
        self.reactor = MemoryReactorClock()
        self.pending = PendingReads(self.reactor)

    def turn(self) -> None:
        self.reactor.advance(0)

    def test_marked_twice_is_one_turn(self) -> None:
        """However often a reader is marked, it gets one turn, and not before the loop turns."""
        reader = Reader()
        self.pending.addPending(reader)
        self.pending.addPending(reader)
        self.assertEqual(reader.turns, 0)
        self.assertEqual((len(self.pending), reader in self.pending), (1, True))
        self.turn()
        self.turn()
        self.assertEqual(reader.turns, 1)
        self.assertEqual((len(self.pending), reader in self.pending), (0, False))

    def test_one_call_for_all(self) -> None:
        """A hundred pending readers are one delayed call, served in the order of their marks."""
        order: list[int] = []
        for number in range(100):
            self.pending.addPending(Reader(lambda number=number: order.append(number)))
        self.assertEqual(len(self.reactor.getDelayedCalls()), 1)
        self.turn()
        self.assertEqual(order, list(range(100)))
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_removed(self) -> None:
        """A reader whose mark was taken away gets no turn; taking away what is not there is harmless."""
        reader = Reader()
        self.pending.removePending(reader)
        self.pending.addPending(reader)
        self.pending.removePending(reader)
        self.turn()
        self.pending.servicePending(reader)
        self.assertEqual(reader.turns, 0)

    def test_removed_by_an_earlier_one(self) -> None:
        """Row 21: a reader that an earlier one of the same turn closed or paused is not touched."""
        later = Reader()
        earlier = Reader(lambda: self.pending.removePending(later))
        self.pending.addPending(earlier)
        self.pending.addPending(later)
        self.turn()
        self.assertEqual((earlier.turns, later.turns), (1, 0))

    def test_returns_a_failure(self) -> None:
        """What doRead returns disconnects the reader, as after an event of the kernel."""
        for answer, expected in ((CONNECTION_DONE, ConnectionDone), (CONNECTION_LOST, ConnectionLost)):
            reader = Reader(lambda answer=answer: answer)
            self.reactor.addReader(reader)
            self.reactor.addWriter(reader)
            self.pending.addPending(reader)
            self.turn()
            self.turn()
            self.assertEqual([reason.type for reason in reader.lost], [expected])
            self.assertEqual(self.reactor.getReaders(), [])
            self.assertEqual(self.reactor.getWriters(), [])

    def test_returns_the_end_of_its_input(self) -> None:
        """A reader that can be half closed keeps its other half, as after an event of the kernel."""
        reader = HalfCloseableReader(lambda: CONNECTION_DONE)
        self.reactor.addReader(reader)
        self.reactor.addWriter(reader)
        self.pending.addPending(reader)
        self.turn()
        self.assertEqual([reason.type for reason in reader.read_ends], [ConnectionDone])
        self.assertEqual(reader.lost, [])
        self.assertEqual(self.reactor.getReaders(), [])
        self.assertEqual(self.reactor.getWriters(), [reader])

    def test_raises(self) -> None:
        """A reader that raises is disconnected, its error is logged, and the others get their turns."""

        def fail() -> None:
            raise ZeroDivisionError

        broken, other = Reader(fail), Reader()
        self.reactor.addReader(broken)
        self.pending.addPending(broken)
        self.pending.addPending(other)
        self.turn()
        self.turn()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual([reason.type for reason in broken.lost], [ZeroDivisionError])
        self.assertEqual(self.reactor.getReaders(), [])
        self.assertEqual((broken.turns, other.turns), (1, 1))

    def test_raises_in_connection_lost(self) -> None:
        """Not even that takes a turn from the others."""

        def fail(reason: Failure) -> None:
            raise ZeroDivisionError

        broken, other = Reader(lambda: CONNECTION_LOST), Reader()
        broken.connectionLost = fail  # type: ignore[method-assign]
        self.pending.addPending(broken)
        self.pending.addPending(other)
        self.turn()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(other.turns, 1)


class NextTurnTests(SynchronousTestCase):
    """A stock reactor, which unlike a ``Clock`` has turns."""

    def setUp(self) -> None:
        reactor = EPollReactor()
        self.addCleanup(discard, reactor)
        self.pending = pending_reads(reactor)
        self.turn = Loop(reactor).turn

    def test_marked_again_in_its_turn(self) -> None:
        """Row 7: a reader that is pending again waits for the next turn, and does get it."""
        reader = Reader(lambda: self.pending.addPending(reader) if reader.turns < 3 else None)
        self.pending.addPending(reader)
        for expected in (1, 2, 3, 3):
            self.turn()
            self.assertEqual(reader.turns, expected)

    def test_marked_by_an_earlier_one(self) -> None:
        """A reader that comes in during a turn is for the next one."""
        later = Reader()
        self.pending.addPending(Reader(lambda: self.pending.addPending(later)))
        self.turn()
        self.assertEqual(later.turns, 0)
        self.turn()
        self.assertEqual(later.turns, 1)


class HookTests(SynchronousTestCase):
    """A loop with the hook (row 4)."""

    def test_told_who(self) -> None:
        """The loop is told which reader is pending, once for each mark, and nothing else is scheduled."""
        reactor = HookedReactor()
        pending = PendingReads(reactor)
        first, second = Reader(), Reader()
        for reader in (first, second, first):
            pending.addPending(reader)
        self.assertEqual(reactor.told, [[first], [second]])
        self.assertEqual(reactor.getDelayedCalls(), [])

        reactor.advance(0)
        self.assertEqual((first.turns, second.turns), (0, 0))
        for reader in (first, second):
            pending.servicePending(reader)
            pending.servicePending(reader)
        self.assertEqual((first.turns, second.turns), (1, 1))

    def test_ignored_for_a_while(self) -> None:
        """Row 22: marking does not remove; a loop that comes late finds the reader still marked."""
        reactor = HookedReactor()
        pending = PendingReads(reactor)
        reader = Reader()
        pending.addPending(reader)
        reactor.advance(1)
        self.assertIn(reader, pending)
        pending.servicePending(reader)
        self.assertEqual(reader.turns, 1)

    def test_answer_is_used(self) -> None:
        """A loop that says False gets the default path."""
        reactor = HookedReactor()
        reactor.answer = False
        pending = PendingReads(reactor)
        reader = Reader()
        pending.addPending(reader)
        reactor.advance(0)
        self.assertEqual(reactor.told, [[reader]])
        self.assertEqual(reader.turns, 1)

    def test_answer_may_change(self) -> None:
        """Each answer counts for the readers it was given for."""
        reactor = HookedReactor()
        pending = PendingReads(reactor)
        taken, refused = Reader(), Reader()
        pending.addPending(taken)
        reactor.answer = False
        pending.addPending(refused)
        reactor.advance(0)
        self.assertEqual(refused.turns, 1)
        pending.servicePending(taken)
        self.assertEqual(taken.turns, 1)


class WhichListTests(SynchronousTestCase):
    """Each loop has one list."""

    def test_stock_reactor(self) -> None:
        """Everything on one stock reactor shares a list; another reactor has its own."""
        first, second = MemoryReactorClock(), MemoryReactorClock()
        self.assertIs(pending_reads(first), pending_reads(first))
        self.assertIsNot(pending_reads(first), pending_reads(second))

    def test_our_reactor(self) -> None:
        """Ours is its own list."""
        reactor = LwsReactor()
        self.addCleanup(discard, reactor)
        self.assertIs(pending_reads(reactor), reactor)

    def test_reactor_is_forgotten(self) -> None:
        """A program that makes one reactor after the other does not keep them all."""
        for make in (EPollReactor, MemoryReactorClock):
            reactor: Any = make()
            pending_reads(reactor)
            if make is EPollReactor:
                discard(reactor)
            gone = weakref.ref(reactor)
            del reactor
            gc.collect()
            self.assertIsNone(gone())
