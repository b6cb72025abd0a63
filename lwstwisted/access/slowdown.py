"""Guessing is slow: who fails waits before the next try is looked at, longer each time.

**Before, and not behind.** An answer that is held back slows nobody down: a right guess would be told by coming at
once, and so a client hangs up on each that doesn't. So the wait is in front of the check, whatever it will find.

**The good client of the same address** (a colleague behind the same router, the user whose phone has an old password)
can't be told from the guesser before the check. Three things let it through:

* What was right a short while ago is known to be right without a check (``login.py``): it never gets here, and passes
  at once, however much is failing around it.
* What was right once, since this process runs, has its place: it waits for no failures of others, and is checked next.
* Anything else waits at most :data:`LONGEST` and is checked then. The tries of one network wait side by side and not in
  a line, so what comes with the flood and what comes behind it wait equally long.

**Bounded.** A network has :data:`PLACES` for tries that wait or are checked, and one name at a network fewer; all
networks together :data:`ALL_PLACES`. What finds no place is refused at once with 429, and told when to come again. That
is the price: a client that was never let in may find all places of its address taken by somebody who tries many names.
The networks that are remembered are bounded as well; the one that failed longest ago is forgotten first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from lwstwisted import errors
from lwstwisted.errors import Refused

FREE = 5
"""Failures that cost nothing: somebody looks for the right one of their own passwords."""
FIRST = 0.25
"""Seconds before the try behind those; they double with each failure."""
LONGEST = 8.0
"""Seconds at most: what a client that is told nothing meanwhile waits without giving up."""
FORGIVEN = 60.0
"""Seconds after which one failure is forgotten, and after as many more the next."""
MOST = 16
"""Failures that are counted: more would only take longer to be forgiven."""

PLACES = 64
PLACES_OF_NAME = 16
ALL_PLACES = 1024
NETWORKS = 10_000
"""Networks that are remembered: 2 MB of memory."""

T = TypeVar("T")


class Slowdown:
    """The failures of networks.

    :param clock: for the waits.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._places: Counter[str] = Counter()
        self._of_name: Counter[tuple[str, str]] = Counter()
        self._waits: set[Deferred[None]] = set()

    def delay(self, network: str) -> float:
        """How long the next try of a network waits, in seconds."""
        beyond = self._count(network) - FREE
        return 0.0 if beyond < 0 else min(LONGEST, FIRST * 2.0**beyond)

    def failed(self, network: str) -> None:
        """A try of a network was wrong."""
        count = self._count(network)
        self._failures[network] = (min(MOST, count + 1), self._clock.seconds())
        self._failures.move_to_end(network)
        if len(self._failures) > NETWORKS:
            self._failures.popitem(last=False)

    async def wait(self, network: str) -> None:
        """Wait as long as a network has to.

        :raises Refused: ``STOPPING``.
        """
        delay = self.delay(network)
        if not delay:
            return
        wait: Deferred[None] = deferLater(self._clock, delay)
        self._waits.add(wait)
        try:
            await wait
        except CancelledError:
            raise Refused(errors.STOPPING) from None
        finally:
            self._waits.discard(wait)

    def stop(self) -> None:
        """Refuse whoever waits."""
        for wait in list(self._waits):
            wait.cancel()

    @contextmanager
    def place(self, network: str, name: str) -> Iterator[None]:
        """Have a place for a try.

        :raises Refused: ``TOO_MANY_LOGINS`` if there is none.
        """
        of_name = (network, name)
        is_full = self._places[network] >= PLACES or self._of_name[of_name] >= PLACES_OF_NAME
        if is_full or self._places.total() >= ALL_PLACES:
            again = max(1, ceil(self.delay(network)))
            raise Refused(errors.TOO_MANY_LOGINS, {b"Retry-After": b"%d" % again})
        self._places[network] += 1
        self._of_name[of_name] += 1
        try:
            yield
        finally:
            _give_back(self._places, network)
            _give_back(self._of_name, of_name)

    def _count(self, network: str) -> int:
        count, since = self._failures.get(network, (0, 0.0))
        return max(0, count - int((self._clock.seconds() - since) / FORGIVEN))


def _give_back(places: Counter[T], key: T) -> None:
    places[key] -= 1
    if not places[key]:
        del places[key]  # a counter keeps what is 0
