"""Reactors that know of input pending inside TLS: on epoll, poll and select.

One turn, in this order: timers; then one wait, which does not block while a pending reader may
read; then one ``doRead`` for each reader that the kernel announced; then one for each pending reader
that has not had its turn. Nobody gets two, so a busy connection cannot starve a quiet one.

All timers run on the monotonic clock. Stock Twisted's run on the wall clock, where an administrator
who sets the time forward by an hour fires every timeout at once.
"""

from __future__ import annotations

import math
import time
from typing import Any, Self

from twisted.internet.interfaces import IListeningPort, IProtocolFactory, IReadDescriptor
from twisted.internet.main import installReactor
from twisted.internet.pollreactor import PollReactor
from twisted.internet.selectreactor import SelectReactor
from zope.interface import implementer

from lwstwisted.interfaces import IFakePollin, IPendingReads, LoopStatistics
from lwstwisted.loop.pending import PendingReads
from lwstwisted.loop.tls import TLSFactory, TLSPort, make_default

try:
    from twisted.internet.epollreactor import EPollReactor as BestReactor
except ImportError:  # no epoll(7) on this platform
    BestReactor = PollReactor  # type: ignore[assignment,misc]


def whole_milliseconds(seconds: float) -> float:
    """At least so long: for a loop that counts in milliseconds, and spins through what is less."""
    return math.ceil(seconds * 1000) / 1000


@implementer(IPendingReads, IFakePollin)
class PendingReadsReactor:
    """What is added to any stock reactor; to be named before it among the bases."""

    # A staticmethod, because the reactor's own code and applications call reactor.seconds().
    seconds = staticmethod(time.monotonic)

    def __init__(self, *args: Any) -> None:
        self._faked: dict[IReadDescriptor, None] = {}
        self._pending = PendingReads(self)
        super().__init__(*args)

    @classmethod
    def install(cls) -> Self:
        """Make a new one the global reactor, and its TLS transport the one of all TLS in this process.

        :raises twisted.internet.error.ReactorAlreadyInstalledError: if there is a reactor.
        """
        return cls._installed(cls())

    @classmethod
    def _installed(cls, reactor: Self) -> Self:
        installReactor(reactor)
        make_default()
        return reactor

    def addPending(self, reader: IReadDescriptor) -> None:
        """See :class:`~lwstwisted.interfaces.IPendingReads`."""
        self._pending.addPending(reader)

    def parkPending(self, reader: IReadDescriptor) -> None:
        """See :class:`~lwstwisted.interfaces.IPendingReads`."""
        self._pending.parkPending(reader)

    def removePending(self, reader: IReadDescriptor) -> None:
        """See :class:`~lwstwisted.interfaces.IPendingReads`."""
        self._pending.removePending(reader)

    def servicePending(self, reader: IReadDescriptor) -> None:
        """See :class:`~lwstwisted.interfaces.IPendingReads`."""
        self._pending.servicePending(reader)

    def statistics(self) -> LoopStatistics:
        """What this reactor has done so far, and what it holds now: for a look at it, and for metrics."""
        return self._pending.statistics()

    def fake_pollin(self, readers: list[IReadDescriptor]) -> bool:
        """Queue one ``doRead`` for each of the ``readers`` behind the next wait; always True."""
        self._faked.update(dict.fromkeys(readers))
        return True

    def listenSSL(
        self,
        port: int,
        factory: IProtocolFactory,
        contextFactory: Any,
        backlog: int = 50,
        interface: str = "",
    ) -> IListeningPort:
        """See ``IReactorSSL``; every ``ssl:`` endpoint comes through here."""
        wrapped = TLSFactory(contextFactory, False, factory, self)
        listening = TLSPort(port, wrapped, backlog, interface, self)
        listening.startListening()
        return listening


class MergingReactor(PendingReadsReactor):
    """What is added to a stock reactor that polls by itself: pending readers are merged behind its wait."""

    def __init__(self, *args: Any) -> None:
        self._turns = 0
        self._longest_turn = 0.0
        self._timers_took = 0.0
        self._events_took = 0.0
        self._woken: float | None = None
        self._served: set[Any] = set()
        super().__init__(*args)

    def statistics(self) -> LoopStatistics:
        """See :class:`PendingReadsReactor`."""
        return self._pending.statistics(self._turns, self._longest_turn)

    def runUntilCurrent(self) -> None:
        """Run the timers and calls from threads that are due: the first phase of a turn."""
        began = time.monotonic()
        super().runUntilCurrent()  # type: ignore[misc]
        self._timers_took = time.monotonic() - began

    def _doReadOrWrite(self, *event: Any) -> None:
        # The one name here that is not public: nothing else tells when the wait is over, and who had a turn. On a
        # Twisted without it the longest turn leaves out what the kernel announced, and a reader may get two turns.
        if self._woken is None:
            self._woken = time.monotonic()
        self._served.add(event[0])
        super()._doReadOrWrite(*event)  # type: ignore[misc]

    def doIteration(self, timeout: float | None) -> None:
        """Wait for events and serve them, then the readers that the kernel cannot announce.

        :param timeout: seconds to wait at most; None waits for an event.
        """
        # Taken out before anything is dispatched: what is queued from now on is for the next turn.
        faked, self._faked = self._faked, {}
        may_read = any(reader in self._pending for reader in faked)
        self._longest_turn = max(self._longest_turn, self._events_took + self._timers_took)
        self._events_took = self._timers_took = 0.0
        self._woken = None
        self._served.clear()
        try:
            super().doIteration(0 if may_read else timeout)  # type: ignore[misc]
        except BaseException:
            self._faked = {**faked, **self._faked}  # Twisted logs it and goes on: they are for the next turn
            raise
        woken = time.monotonic() if self._woken is None else self._woken
        for reader in faked:
            # Queued again by its own event: it had its turn, and is for the next one.
            if not (reader in self._faked and reader in self._served):
                self._pending.servicePending(reader)
        self._turns += 1
        self._events_took = time.monotonic() - woken
        self._longest_turn = max(self._longest_turn, self._events_took)


class LwsReactor(MergingReactor, BestReactor):
    """The reactor behind ``--reactor=lws``: on epoll, where there is one."""


class LwsPollReactor(MergingReactor, PollReactor):
    """The reactor behind ``--reactor=lws-poll``."""

    def doIteration(self, timeout: float | None) -> None:
        """See :class:`MergingReactor`. Stock rounds down to the milliseconds of poll(2), and spins through the rest."""
        super().doIteration(timeout and whole_milliseconds(timeout))


class LwsSelectReactor(MergingReactor, SelectReactor):
    """The reactor behind ``--reactor=lws-select``."""


install = LwsReactor.install
