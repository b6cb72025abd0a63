"""One timer for one connection: moved with every byte, fired hardly ever."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime


class Deadline:
    """One timer that is moved often and fires rarely.

    Moving it costs an assignment: the timer that is under way looks up the time when it fires.

    :param clock: where time comes from.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._at: float | None = None
        self._meaning: Callable[[], object] = lambda: None
        self._call: IDelayedCall | None = None

    def set(self, seconds: float, meaning: Callable[[], object]) -> None:
        """Call ``meaning`` in ``seconds``, instead of what was set before."""
        self._at = self._clock.seconds() + seconds
        self._meaning = meaning
        if self._call is not None and self._call.getTime() > self._at:
            self._call.cancel()
            self._call = None
        if self._call is None:
            self._call = self._clock.callLater(seconds, self._fire)

    def clear(self) -> None:
        """Call nothing."""
        self._at = None

    def stop(self) -> None:
        """Call nothing, and give back the timer."""
        self._at = None
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _fire(self) -> None:
        self._call = None
        if self._at is None:
            return
        left = self._at - self._clock.seconds()
        if left > 0:
            self._call = self._clock.callLater(left, self._fire)
        else:
            self._at = None
            self._meaning()
