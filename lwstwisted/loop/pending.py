"""The pending-read list: readers whose input lies decrypted where no kernel can see it.

**The facts.** TLS decrypts whole records of up to 16 KiB. A reader that stops early, because
its budget for this turn is used up or its consumer said "enough", has plaintext waiting
inside OpenSSL. Nothing is left in the socket for ``epoll``, ``poll``, ``select`` or ``asyncio`` to
report, and the connection sleeps until some timeout ends it.

**What it means for us.** Somebody has to keep a list of such readers and give each of them a turn
as if the kernel had spoken. libwebsockets calls that a fake POLLIN, and lets a foreign event loop
bring a callback for it.

**The rules**, each of which was a defect of somebody's once:

1. What makes a reader pending is a successful TLS read with no further one behind it, because the
   budget was full, or because of a pause that has ended since. ``WantRead`` says that nothing is left.
   ``SSL_pending()`` is not asked: it counts the current record only, and is 0 while whole records lie unread.
2. Only the code that reads edits the list. Marking a reader never removes it.
3. The loop is told *which* readers are pending, and its answer is used.
4. Between the mark and the turn a reader may have been paused, closed or read already: it is looked
   up again at its turn, by identity and never by descriptor number (those are reused).
5. A paused reader is not in the list, and costs no turn of the loop.

**The hook.** A loop that drives itself may provide
:class:`~lwstwisted.interfaces.IFakePollin`: ``fake_pollin(readers)`` returns True when it will run
:meth:`PendingReads.servicePending` for each of them in its next turn. Without the hook, or when it returns
False, the default path is ``callLater(0, …)``. There is this one copy of the logic for both.

**The price** is one turn of the loop for each budget used up. **The road not taken**: delivering all
that was decrypted, paused or not, as stock Twisted does. It needs no list, and overshoots each pause
by what one read of the socket brought in, so its flow control leaks.
"""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary, proxy

from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHalfCloseableDescriptor, IReadDescriptor
from twisted.python import log
from twisted.python.failure import Failure
from zope.interface import implementer

from lwstwisted.interfaces import IFakePollin, IPendingReads, LoopStatistics


@implementer(IPendingReads)
class PendingReads:
    """The list, for one event loop.

    :param reactor: provides ``IReactorTime`` and ``IReactorFDSet``, and perhaps ``IFakePollin``.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._has_hook = IFakePollin.providedBy(reactor)
        self._marked: dict[IReadDescriptor, None] = {}
        self._parked: set[IReadDescriptor] = set()
        self._scheduled = False
        self._synthesised = 0

    def __contains__(self, reader: IReadDescriptor) -> bool:
        return reader in self._marked

    def __len__(self) -> int:
        return len(self._marked)

    def addPending(self, reader: IReadDescriptor) -> None:
        """See :class:`~lwstwisted.interfaces.IPendingReads`."""
        if reader in self._marked:
            return
        self._parked.discard(reader)
        self._marked[reader] = None
        if not (self._has_hook and self._reactor.fake_pollin([reader])):
            self._default_path()

    def parkPending(self, reader: IReadDescriptor) -> None:
        """See :class:`~lwstwisted.interfaces.IPendingReads`."""
        self._marked.pop(reader, None)
        self._parked.add(reader)

    def removePending(self, reader: IReadDescriptor) -> None:
        """See :class:`~lwstwisted.interfaces.IPendingReads`."""
        self._marked.pop(reader, None)
        self._parked.discard(reader)

    def statistics(self, turns: int | None = None, longest_turn: float | None = None) -> LoopStatistics:
        """What this list has done and holds, beside what its loop says of its turns."""
        return LoopStatistics(turns, longest_turn, self._synthesised, len(self._marked), len(self._parked))

    def servicePending(self, reader: IReadDescriptor) -> None:
        """See :class:`~lwstwisted.interfaces.IPendingReads`."""
        if reader in self._marked:
            del self._marked[reader]
            self._synthesised += 1
            log.callWithLogger(reader, self._read, reader)

    def _read(self, reader: IReadDescriptor) -> None:
        try:
            why: BaseException | None = cast(Any, reader).doRead()
        except BaseException as raised:
            log.err()
            why = raised
        if why:
            self._reactor.removeReader(reader)
            if isinstance(why, ConnectionDone) and IHalfCloseableDescriptor.providedBy(reader):
                cast(Any, reader).readConnectionLost(Failure(why))
            else:
                self._reactor.removeWriter(reader)
                reader.connectionLost(Failure(why))

    def _default_path(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._reactor.callLater(0, self._run)

    def _run(self) -> None:
        # One call for the whole batch. A reader that is pending again after its turn is
        # marked anew, and scheduled anew: it waits for the others and for the kernel's events.
        self._scheduled = False
        for reader in list(self._marked):
            self.servicePending(reader)


_default_lists: WeakKeyDictionary[Any, PendingReads] = WeakKeyDictionary()


def pending_reads(reactor: Any) -> IPendingReads:
    """Find the list of ``reactor``: its own, or one on the default path.

    :param reactor: any Twisted reactor; one that provides
        :class:`~lwstwisted.interfaces.IPendingReads` is returned itself.
    """
    if IPendingReads.providedBy(reactor):
        return reactor
    found = _default_lists.get(reactor)
    if found is None:
        # A proxy, because a value that holds its key would keep the reactor for ever.
        found = _default_lists[reactor] = PendingReads(proxy(reactor))
    return found
