"""Reactors that know of input pending inside TLS: on epoll, poll and select.

One turn, in this order: timers; then one wait, which does not block while a pending reader may
read; then one ``doRead`` for each reader that the kernel announced; then one for each pending reader
that has not had its turn. Nobody gets two, so a busy connection cannot starve a quiet one.

Where more than a few are ready, the others come in the next turns, before anybody has another one. A hundred full
budgets in one turn would keep timers, and the store's threads with their results, waiting for 30 ms.

All timers run on the monotonic clock. Stock Twisted's run on the wall clock, where an administrator
who sets the time forward by an hour fires every timeout at once.
"""

from __future__ import annotations

import math
import select
import time
from typing import Any, Self

from twisted.internet import tcp
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


AT_ONCE = 8
"""In one turn, at most: descriptors that epoll announces, pending readers, and accepted connections. A full budget of
TLS takes 0.3 ms, a new connection 0.15 ms, a handshake more. Longer turns gain nothing: another wait takes 10 us."""


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
        if isinstance(event[0], tcp.Port):
            # Stock begins with 100, and adds 20 whenever as many have come.
            event[0].numberAccepts = min(event[0].numberAccepts, AT_ONCE)
        super()._doReadOrWrite(*event)  # type: ignore[misc]

    def doIteration(self, timeout: float | None) -> None:
        """Wait for events and serve them, then the readers that the kernel cannot announce.

        :param timeout: seconds to wait at most; None waits for an event.
        """
        # Taken out before anything is dispatched: what is queued from now on is for the next turn.
        waiting = [reader for reader in self._faked if reader in self._pending]
        self._faked = {}
        self._longest_turn = max(self._longest_turn, self._events_took + self._timers_took)
        self._events_took = self._timers_took = 0.0
        self._woken = None
        self._served.clear()
        try:
            super().doIteration(0 if waiting else timeout)  # type: ignore[misc]
        except BaseException:
            # Twisted logs it and goes on: they are for the next turn.
            self._faked = dict.fromkeys(waiting) | self._faked
            raise
        woken = time.monotonic() if self._woken is None else self._woken
        for reader in waiting[:AT_ONCE]:
            # Queued again by its own event: it had its turn, and is for the next one.
            if not (reader in self._faked and reader in self._served):
                self._pending.servicePending(reader)
        self._faked = dict.fromkeys(waiting[AT_ONCE:]) | self._faked
        self._turns += 1
        self._events_took = time.monotonic() - woken
        self._longest_turn = max(self._longest_turn, self._events_took)


class FewAtOnce:
    """An epoll object that announces :data:`AT_ONCE` descriptors at most.

    Nobody is left out: the kernel puts those that it has announced behind all others that are ready.
    """

    def __init__(self, poller: Any) -> None:
        self.register, self.modify, self.unregister = poller.register, poller.modify, poller.unregister
        self.close = poller.close
        self._poll = poller.poll

    def poll(self, timeout: float, most: int) -> Any:
        """See ``select.epoll``."""
        return self._poll(timeout, min(most, AT_ONCE))


class LwsReactor(MergingReactor, BestReactor):
    """The reactor behind ``--reactor=lws``: on epoll, where there is one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # Not public, either. Without it a turn is as long as there are descriptors that are ready.
        poller = getattr(self, "_poller", None)
        if isinstance(poller, getattr(select, "epoll", ())):
            self._poller = FewAtOnce(poller)


class LwsPollReactor(MergingReactor, PollReactor):
    """The reactor behind ``--reactor=lws-poll``."""

    def doIteration(self, timeout: float | None) -> None:
        """See :class:`MergingReactor`. Stock rounds down to the milliseconds of poll(2), and spins through the rest."""
        super().doIteration(timeout and whole_milliseconds(timeout))


class LwsSelectReactor(MergingReactor, SelectReactor):
    """The reactor behind ``--reactor=lws-select``."""


install = LwsReactor.install
