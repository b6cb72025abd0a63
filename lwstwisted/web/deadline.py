"""One timer for one connection: moved with every byte, fired hardly ever."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime


class Deadline:
    """One timer that is moved often and fires rarely.

    Moving it costs an assignment: the timer that is under way looks up the time when it fires.

    :param clock: where time comes from.
    """

    __slots__ = ("_at", "_call", "_clock", "_meaning")

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._at: float | None = None
        self._meaning: Callable[[], object] | None = None
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
            assert self._meaning is not None
            self._meaning()


class MinimumRate:
    """Judges whether a body arrives fast enough. Its clock runs only while somebody listens.

    The first span is not judged: a client may have to read its disk, and its network to learn the bandwidth.

    :param clock: where time comes from.
    :param rate: bytes per second at least; 0 for none.
    :param span: seconds over which it is averaged.
    :param too_slow: called when it was less.
    """

    __slots__ = ("_bytes", "_clock", "_deadline", "_is_judged", "_least", "_left", "_since", "_span", "_too_slow")

    def __init__(self, clock: IReactorTime, rate: int, span: float, too_slow: Callable[[], object]) -> None:
        self._clock = clock
        self._least = rate * span
        self._span = span
        self._too_slow = too_slow
        self._deadline = Deadline(clock)
        self._bytes = 0
        self._is_judged = False
        self._left = span
        self._since: float | None = None

    def begin(self) -> None:
        """A body begins; nobody listens yet."""
        self.hold()
        self._bytes = 0
        self._is_judged = False
        self._left = self._span

    def count(self, size: int) -> None:
        """So many bytes of it came."""
        self._bytes += size

    def listen(self) -> None:
        """From now on the client is to be heard; harmless when repeated."""
        if self._since is None and self._least:
            self._since = self._clock.seconds()
            self._deadline.set(self._left, self._judge)

    def hold(self) -> None:
        """We pause, or the body is over; harmless when repeated."""
        if self._since is not None:
            self._left -= self._clock.seconds() - self._since
            self._since = None
            self._deadline.clear()

    def stop(self) -> None:
        """Give back the timer."""
        self._deadline.stop()

    def _judge(self) -> None:
        is_slow = self._is_judged and self._bytes < self._least
        self._since = None
        self.begin()
        self._is_judged = True
        if is_slow:
            self._too_slow()
        else:
            self.listen()
