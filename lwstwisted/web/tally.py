"""What was refused outside of any request, in one line of the log per second: a flood must not fill the disk."""

from __future__ import annotations

from collections import Counter
from typing import Any

from twisted.logger import Logger

TALLY_TIME = 1.0
"""Seconds that one line of the log is about."""

_log = Logger()


class Tally:
    """Counts refusals and logs their sums.

    :param clock: an ``IReactorTime``.
    :ivar totals: all that was counted, by code.
    """

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self.totals: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._last: Any = None
        self._call: Any = None

    def count(self, code: str, peer: Any) -> None:
        """Note one.

        :param code: of the refusal (see ``errors.py``), or a word of the same kind where a client can't be told.
        :param peer: the address of the client.
        """
        self._counts[code] += 1
        self.totals[code if code.isidentifier() else "access_log"] += 1
        self._last = peer
        if self._call is None:
            self._call = self._clock.callLater(TALLY_TIME, self._say)

    def stop(self) -> None:
        """Log what is left."""
        if self._call is not None:
            self._call.cancel()
            self._say()

    def _say(self) -> None:
        self._call = None
        counts, self._counts = self._counts, Counter()
        sums = ", ".join(f"{count} {code}" for code, count in counts.most_common())
        _log.info("outside of requests: {sums}; the last one from {peer}", sums=sums, peer=self._last)
