"""From ready to stopped: what signals mean to a service, and what its service manager hears of it.

===========  ======================================================================================================
``SIGTERM``  stop: what is under way may end, new work is not taken; a second one: don't wait for it. So ``SIGINT``
``SIGHUP``   reload: what was read from files is read again, and logs are opened again
===========  ======================================================================================================

**The watchdog** hears of the loop, and of nothing else: a loop that doesn't turn can't be mended from within. A store
whose disk has failed is told by ``/readyz`` and by the status instead. To be killed for that would cut the uploads
under way, and the next process would know nothing of the failure and call itself ready.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

from twisted.internet.defer import Deferred, DeferredLock, maybeDeferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from lwstwisted.running.notify import Notifier

STATUS_TIME = 5.0
"""Seconds between two looks at what is to be told."""

_STOP = (signal.SIGTERM, signal.SIGINT)
_log = Logger()


class Lifecycle:
    """Of one service, in a process that it has for itself or shares with others.

    :param notifier: who is told.
    :param status: gives what the service does at the moment, in words.
    :param hasten: called for each signal to stop behind the first one. That does what it did before: it stops the
        reactor, which stops the service.
    :param signals: further signals, or other meanings of these, and what to call for them.
    :ivar reloads: what is called to reload; a Deferred is waited for. One that fails is logged, and
        keeps no other back.
    """

    def __init__(
        self,
        reactor: Any,
        notifier: Notifier,
        status: Callable[[], str],
        hasten: Callable[[], object],
        signals: Mapping[signal.Signals, Callable[[], object]] | None = None,
    ) -> None:
        self._reactor = reactor
        self._notifier = notifier
        self._status = status
        self._hasten = hasten
        self.reloads: list[Callable[[], object]] = []
        self._actions = {signal.SIGHUP: self.reload, **(signals or {})}
        self._before: dict[signal.Signals, Any] = {}
        self._is_signalled = self._is_stopping = False
        self._reloading = DeferredLock()
        self._calls = [(LoopingCall(lambda: notifier.status(status())), STATUS_TIME)]
        if notifier.timeout is not None:
            self._calls.append((LoopingCall(notifier.alive), notifier.timeout / 2))
        for call, _ in self._calls:
            call.clock = reactor

    def start(self, ready: bool = True) -> None:
        """Take signals and tell the service manager, as soon as the reactor runs.

        :param ready: whether the service serves then; else :meth:`ready` is to be called.
        """
        self._reactor.callWhenRunning(self._begin, ready)

    def _begin(self, ready: bool) -> None:
        if self._is_stopping:
            return
        if current_thread() is main_thread():
            for number in {*_STOP, *self._actions}:
                self._before[number] = signal.signal(number, self._caught)
        for call, seconds in self._calls:
            call.start(seconds, now=False)
        if ready:
            self.ready()

    def ready(self) -> None:
        """The service serves."""
        if not self._is_stopping:
            self._notifier.ready(self._status())

    def _caught(self, number: int, frame: FrameType | None) -> None:
        # The interpreter may be anywhere: whatever is to be done is done by the loop.
        which = signal.Signals(number)
        action = self._actions.get(which)
        if action is None and self._is_signalled:
            action = self._hasten
        elif action is None:
            self._is_signalled = True
            action = self._reactor.stop
            before = self._before[which]
            if callable(before) and before is not signal.default_int_handler:
                before(number, frame)  # Twisted's own one: it stops the reactor, and keeps which signal it was
                return
        self._reactor.callFromThread(action)

    def reload(self) -> Deferred[None]:
        """Reload, and say so."""
        return self._reloading.run(lambda: Deferred.fromCoroutine(self._reload()))

    async def _reload(self) -> None:
        if self._is_stopping:
            return
        self._notifier.reloading()
        for call in list(self.reloads):
            try:
                await maybeDeferred(call)
            except Exception:
                _log.failure("a part of the service could not be reloaded, and stays as it was")
        self.ready()

    def stopping(self, seconds: float) -> None:
        """The service stops, which may take so long."""
        if not self._is_stopping:
            self._is_stopping = True
            self._notifier.stopping(seconds, self._status())

    def stop(self) -> None:
        """The service has stopped: signals mean again what they meant before. May be repeated."""
        self._is_stopping = True
        for call, _ in self._calls:
            if call.running:
                call.stop()
        for number, before in self._before.items():
            if signal.getsignal(number) == self._caught:
                signal.signal(number, before)
        self._before.clear()
