"""Is the peer of a paused connection still there?

A paused descriptor has left the event loop, so the kernel has nobody to tell that the peer has reset the
connection or vanished. A pause is ours and may be long; what it holds (a temporary file, a lock, memory) must not
outlive the peer for as long.

So a pause that lasts is interrupted by a look at the socket now and then, without reading from it. A peer that has
only ended its side is still there: it may be waiting for its answer, and both sides ended is an orderly end. One
that has reset the connection is gone: nobody is left to be answered, and what it sent before is dropped. From a
machine that has disappeared nothing comes at all, and from a process that closed its socket, nothing after the FIN:
keep-alive probes of the kernel turn both into an error, which the next look finds.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import Any

LOOK_INTERVAL = 10.0
"""Seconds between two looks; the first comes after half of that at the earliest. Most pauses are shorter: a look is
for a store that hangs."""
PROBE_IDLE = 20
"""Seconds of silence until the kernel's first probe, counted from the first look at the earliest."""
PROBE_INTERVAL = 10
"""Seconds between probes."""
PROBES = 3
"""Probes without an answer until the kernel gives up: with the looks, a vanished machine is noticed within
70 seconds, as an idle connection is."""

_KEEPIDLE = vars(socket).get("TCP_KEEPIDLE") or vars(socket)["TCP_KEEPALIVE"]  # the latter on macOS


class PeerWatch:
    """Looks at the socket of one connection while it is paused.

    :param reactor: for its timer.
    :param watched: its socket; nothing is watched where it isn't one.
    :param is_paused: whether it is.
    :param gone: called once when the peer has left for good.
    """

    __slots__ = ("_gone", "_is_paused", "_is_probing", "_next_look", "_reactor", "_socket")

    def __init__(
        self, reactor: Any, watched: object, is_paused: Callable[[], bool], gone: Callable[[], object]
    ) -> None:
        self._reactor = reactor
        self._socket = watched if isinstance(watched, socket.socket) else None
        self._is_paused = is_paused
        self._gone = gone
        self._next_look: Any = None
        self._is_probing = False

    def start(self) -> None:
        """A pause begins. Nothing has to be said of its end: a timer that is under way costs no further one."""
        if self._next_look is None and self._socket is not None:
            # At full steps of the clock, so that the looks at a thousand connections are one turn of the loop.
            step = LOOK_INTERVAL / 2
            delay = LOOK_INTERVAL - self._reactor.seconds() % step
            self._next_look = self._reactor.callLater(delay, self._look, self._socket)

    def stop(self) -> None:
        """The connection is over."""
        self._socket = None
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None

    def _look(self, watched: socket.socket) -> None:
        self._next_look = None
        if not self._is_paused():
            return
        if not self._is_probing:
            self._is_probing = True
            probe(watched)
        if events_of(watched.fileno()) & select.POLLERR:
            self.stop()
            self._gone()
        else:
            self.start()


def events_of(fd: int) -> int:
    """``POLLERR``, ``POLLHUP`` and ``POLLNVAL`` of a descriptor (poll(2)), without reading from it."""
    poller = select.poll()
    poller.register(fd, 0)  # none of the three need be asked for
    return sum(event for _, event in poller.poll(0))


def probe(watched: socket.socket) -> None:
    """Have the kernel find out whether the peer is there (tcp(7)), unless the application has asked for that.

    :param watched: a stream socket; nothing happens to one that is not TCP's.
    """
    if watched.family not in (socket.AF_INET, socket.AF_INET6):
        return
    if watched.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        return
    watched.setsockopt(socket.IPPROTO_TCP, _KEEPIDLE, PROBE_IDLE)
    watched.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_INTERVAL)
    watched.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
    watched.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
