"""When to stop and when to go on, without I/O: a valve with reasons, a queue with two marks.

A boolean cannot say *who* paused, so the second to resume undoes the first one's
pause. With a set of reasons only the edge between "none" and "some" touches the
transport (libwebsockets keeps a bitmap for the same purpose).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

_NO_REASONS: frozenset[str] = frozenset()
# One for all: most valves are open, and a set of their own would take 216 bytes.

pauses: Counter[str] = Counter()
"""How often each reason has come to a valve that it did not hold yet, in this process."""


class Valve:
    """Open while no reason speaks against it.

    :param on_close: called once when the first reason comes.
    :param on_open: called once when the last reason goes.
    """

    __slots__ = ("_on_close", "_on_open", "_reasons")

    def __init__(self, on_close: Callable[[], object], on_open: Callable[[], object]) -> None:
        self._reasons = _NO_REASONS
        self._on_close = on_close
        self._on_open = on_open

    @property
    def is_open(self) -> bool:
        """Whether anything may flow."""
        return not self._reasons

    @property
    def reasons(self) -> frozenset[str]:
        """What holds it closed."""
        return self._reasons

    def close(self, reason: str) -> None:
        """Add a reason; adding it twice is the same as once."""
        if reason in self._reasons:
            return
        pauses[reason] += 1
        was_open = not self._reasons
        self._reasons |= {reason}
        if was_open:
            self._on_close()

    def open(self, reason: str) -> None:
        """Take a reason away; the valve opens if it was the last one."""
        if reason in self._reasons:
            self._reasons = self._reasons - {reason} or _NO_REASONS
            if not self._reasons:
                self._on_open()


class Watermarks:
    """A count of queued bytes with hysteresis.

    :param low: at or below this many bytes a full queue has caught up.
    :param high: above this many bytes the queue is full.
    """

    __slots__ = ("high", "is_full", "level", "low")

    def __init__(self, low: int, high: int) -> None:
        if not 0 <= low < high:
            raise ValueError("the low mark must lie below the high one")
        self.low = low
        self.high = high
        self.level = 0
        self.is_full = False

    def add(self, count: int) -> bool:
        """Count bytes in.

        :returns: True if this filled the queue (once, at the edge).
        """
        self.level += count
        if not self.is_full and self.level > self.high:
            self.is_full = True
            return True
        return False

    def remove(self, count: int) -> bool:
        """Count bytes out.

        :returns: True if a full queue has caught up (once, at the edge).
        """
        self.level -= count
        if self.is_full and self.level <= self.low:
            self.is_full = False
            return True
        return False
