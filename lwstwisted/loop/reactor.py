"""LwsReactor: an epoll reactor whose turn includes the readers that only TLS knows of.

One turn, in this order: timers; then one wait, which does not block while a pending reader may
read; then one ``doRead`` for each reader that the kernel announced; then one for each pending reader
that has not had its turn. Nobody gets two, so a busy connection cannot starve a quiet one.

All timers run on the monotonic clock. Stock Twisted's run on the wall clock, where an administrator
who sets the time forward by an hour fires every timeout at once.
"""

from __future__ import annotations

import time
from typing import Any

from twisted.internet.interfaces import IListeningPort, IProtocolFactory, IReadDescriptor
from twisted.internet.main import installReactor
from zope.interface import implementer

from lwstwisted.interfaces import IFakePollin, IPendingReads
from lwstwisted.loop.pending import PendingReads
from lwstwisted.loop.tls import TLSFactory, TLSPort

try:
    from twisted.internet.epollreactor import EPollReactor as PollingReactor
except ImportError:  # no epoll(7) on this platform
    from twisted.internet.pollreactor import PollReactor as PollingReactor  # type: ignore[assignment]


@implementer(IPendingReads, IFakePollin)
class LwsReactor(PollingReactor):
    """The reactor behind ``--reactor=lws``."""

    # A staticmethod, because the reactor's own code and applications call reactor.seconds().
    seconds = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self._faked: dict[IReadDescriptor, None] = {}
        self._pending = PendingReads(self)
        super().__init__()  # type: ignore[no-untyped-call]

    def addPending(self, reader: IReadDescriptor) -> None:
        """See :class:`~lwstwisted.interfaces.IPendingReads`."""
        self._pending.addPending(reader)

    def removePending(self, reader: IReadDescriptor) -> None:
        """See :class:`~lwstwisted.interfaces.IPendingReads`."""
        self._pending.removePending(reader)

    def fake_pollin(self, readers: list[IReadDescriptor]) -> bool:
        """Queue one ``doRead`` for each of the ``readers`` behind the next wait; always True."""
        self._faked.update(dict.fromkeys(readers))
        return True

    def doIteration(self, timeout: float | None) -> None:
        """Wait for events and serve them, then the readers that the kernel cannot announce.

        :param timeout: seconds to wait at most; None waits for an event.
        """
        # Taken out before anything is dispatched: what is queued from now on is for the next turn.
        faked, self._faked = self._faked, {}
        may_read = any(reader in self._pending for reader in faked)
        self.doPoll(0 if may_read else timeout)  # type: ignore[no-untyped-call]
        for reader in faked:
            # Queued again: it had its turn by the kernel's word, and is still pending.
            if reader not in self._faked:
                self._pending.service(reader)

    def listenSSL(
        self,
        port: int,
        factory: IProtocolFactory,
        contextFactory: Any,
        backlog: int = 50,
        interface: str = "",
    ) -> IListeningPort:
        """See ``IReactorSSL``; every ``ssl:`` endpoint comes through here."""
        listening = TLSPort(port, TLSFactory(contextFactory, factory, self), backlog, interface, self)
        listening.startListening()
        return listening


def install() -> LwsReactor:
    """Make a new LwsReactor the global reactor.

    :raises twisted.internet.error.ReactorAlreadyInstalledError: if there is one.
    """
    reactor = LwsReactor()
    installReactor(reactor)
    return reactor
