"""A loop that drives itself: asyncio's, or uvloop's, with the same pending-read list.

There is no wait of ours to merge anything behind. Here ``fake_pollin`` asks the loop for a call in
its next turn: one for a whole batch of readers, however many become pending in one turn. It runs before that turn's
events of the kernel, so a reader may have both in one turn.
"""

# Most of Twisted's reactors is not annotated.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import asyncio
import os
import selectors
import time
from typing import Any, Self

from twisted.internet.asyncioreactor import AsyncioSelectorReactor
from twisted.internet.interfaces import IReadDescriptor, IWriteDescriptor

from lwstwisted.interfaces import LoopStatistics
from lwstwisted.loop.presence import events_of
from lwstwisted.loop.reactor import PendingReadsReactor, whole_milliseconds

EVENT_LOOP = "LWSTWISTED_EVENT_LOOP"
"""Environment variable: ``uvloop`` runs ``--reactor=lws-asyncio`` on that; unset or ``asyncio``, on asyncio's own."""


class _CountingSelector(selectors.DefaultSelector):
    """Where asyncio waits: the end of one turn, and the begin of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = 0
        self.longest_turn = 0.0
        self._woken: float | None = None

    def select(self, timeout: float | None = None) -> Any:
        if self._woken is not None:
            self.longest_turn = max(self.longest_turn, time.monotonic() - self._woken)
        self.turns += 1
        try:
            return super().select(timeout)
        finally:
            self._woken = time.monotonic()


class CountingEventLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop, and how many turns it took."""

    def __init__(self) -> None:
        self.waits = _CountingSelector()
        super().__init__(self.waits)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A loop as :data:`EVENT_LOOP` wants it.

    :raises ValueError: if it names another one.
    :raises ImportError: if uvloop is wanted and not installed.
    """
    wanted = os.environ.get(EVENT_LOOP, "asyncio")
    if wanted == "uvloop":
        import uvloop

        loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        return loop
    if wanted != "asyncio":
        raise ValueError(f"{EVENT_LOOP} is asyncio or uvloop, not {wanted}")
    return CountingEventLoop()


class LwsAsyncioReactor(PendingReadsReactor, AsyncioSelectorReactor):
    """The reactor behind ``--reactor=lws-asyncio``.

    :param loop: the event loop; a new one of asyncio's by default.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = CountingEventLoop() if loop is None else loop
        # libuv announces a failed descriptor once and then drops it, whatever is left to be read from it.
        self._drops_failed = not isinstance(self._loop, asyncio.SelectorEventLoop)
        super().__init__(self._loop)

    @classmethod
    def install(cls) -> Self:
        """See :class:`~lwstwisted.loop.reactor.PendingReadsReactor`; :data:`EVENT_LOOP` says which loop."""
        loop = new_event_loop()
        asyncio.set_event_loop(loop)
        return cls._installed(cls(loop))

    def _readOrWrite(self, selectable: Any, read: bool) -> None:
        # The one name here that is not public: an event is when the loop may have dropped a descriptor. On a
        # Twisted without it a reset is as on stock: what did not fit into one read is lost.
        # Looked at first, because a read may take the error away, and the descriptor is dropped all the same.
        is_dropped = self._drops_failed and (fd := selectable.fileno()) >= 0 and events_of(fd)
        super()._readOrWrite(selectable, read)
        if is_dropped:
            self._loop.call_soon(self._watch_again, selectable)

    def _watch_again(self, selectable: Any) -> None:
        reads, writes = selectable in self.getReaders(), selectable in self.getWriters()
        self.removeReader(selectable)
        self.removeWriter(selectable)
        if reads:
            super().addReader(selectable)
        if writes:
            super().addWriter(selectable)

    def addReader(self, reader: IReadDescriptor) -> None:
        """See ``IReactorFDSet``; also of a descriptor that the loop has dropped."""
        try:
            super().addReader(reader)
        except RuntimeError:
            self._watch_again(reader)
            super().addReader(reader)

    def addWriter(self, writer: IWriteDescriptor) -> None:
        """See ``IReactorFDSet``; also of a descriptor that the loop has dropped."""
        try:
            super().addWriter(writer)
        except RuntimeError:
            self._watch_again(writer)
            super().addWriter(writer)

    def timeout(self) -> float | None:
        """Seconds until the next timer, in whole milliseconds: uvloop counts in them, and spins through the rest."""
        left: float | None = super().timeout()
        return left and whole_milliseconds(left)

    def statistics(self) -> LoopStatistics:
        """See ``PendingReadsReactor``; turns are counted on a :class:`CountingEventLoop`."""
        if isinstance(self._loop, CountingEventLoop):
            return self._pending.statistics(self._loop.waits.turns, self._loop.waits.longest_turn)
        return self._pending.statistics()

    def fake_pollin(self, readers: list[IReadDescriptor]) -> bool:
        """Ask the loop for one call for all that become pending before it; always True."""
        if not self._faked:
            self._loop.call_soon(self._run_faked)
        return super().fake_pollin(readers)

    def _run_faked(self) -> None:
        faked, self._faked = self._faked, {}
        for reader in faked:
            self._pending.servicePending(reader)


install = LwsAsyncioReactor.install
