"""Telling what is noted, until it is taken.

While nothing fails, :data:`AT_ONCE` notes are told at a time. What fails is tried again, later each time; and after a
failure that nothing else has contradicted by a success, one note at a time is tried, and not before a pause that grows
likewise. So a server that is down is asked now and then, whatever waits for it; one event that it doesn't like holds up
its own upload only; and :data:`LONGEST` after it is back, everything flows. The pauses differ by chance, so that
several services don't knock together.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger

from lwstwisted.hooks.names import Hook
from lwstwisted.hooks.outbox import Due, Outbox
from lwstwisted.hooks.senders import Sender, Unfit, Unreachable

AT_ONCE = 8
"""Notes that are told at a time: enough for a server some milliseconds away, and no attack on it."""

SHORTEST, LONGEST = 1.0, 30.0
"""Seconds of the first pause behind a failure, and of the longest."""

LOOK_TIME = 1.0
"""Seconds between two looks for what is due, and for what other processes have left."""

GRACE = 5.0
"""Seconds that what is being told may take when the service stops; else the next start tells it again."""

Call = Callable[..., Awaitable[Any]]

_log = Logger()


def pause(failures: int, chance: Callable[[], float] = random.random) -> float:
    """Seconds to wait after so many failures in a row, 1 or more.

    :param chance: gives a number from 0 to 1.
    """
    full: float = min(LONGEST, SHORTEST * 2 ** min(failures - 1, 16))
    return full * (1 + chance()) / 2


class Delivery:
    """Tells the notes of ``outbox`` through ``sender``.

    :param call: calls what blocks beside the reactor.
    :param clock: for time.
    :ivar waiting: how many notes there are, as of the last look.
    :ivar told: how many were taken.
    :ivar failed: how many tries have failed.
    """

    def __init__(self, outbox: Outbox, sender: Sender, call: Call, clock: Any) -> None:
        self.waiting = 0
        self.told = self.failed = 0
        self._outbox = outbox
        self._sender = sender
        self._call = call
        self._clock = clock
        self._under_way: dict[int, Deferred[None]] = {}
        self._failures = 0
        self._not_before = 0.0
        self._next_round = 0.0
        self._is_running = False
        self._is_looking = False
        self._look_done: Deferred[None] | None = None
        self._again = False
        self._later: Any = None

    def start(self) -> None:
        """Begin to tell."""
        self._is_running = True
        self.wake()

    def wake(self) -> None:
        """Look for what is due now."""
        if not self._is_running:
            return
        if self._is_looking:
            self._again = True
            return
        if self._later is not None and self._later.active():
            self._later.cancel()
        self._is_looking = True
        looking = self._look_done = Deferred.fromCoroutine(self._look())
        looking.addBoth(self._looked)

    def _looked(self, result: Any) -> None:
        if result is not None:
            _log.failure("the notes of hooks can't be read", failure=result)
        self._is_looking, again, self._again = False, self._again, False
        if again and result is None:
            self.wake()
        elif self._is_running:
            self._later = self._clock.callLater(LOOK_TIME, self.wake)

    async def _look(self) -> None:
        now = self._clock.seconds()
        if now >= self._next_round or now < self._next_round - LOOK_TIME:
            self._next_round = now + LOOK_TIME
            await self._call(self._outbox.adopt, False)
            self.waiting = await self._call(self._outbox.count)
        room = (1 if self._failures else AT_ONCE) - len(self._under_way)
        if room <= 0 or (self._failures and 0 < self._not_before - now <= LONGEST):
            return
        for note in await self._call(self._outbox.due, now, room, list(self._under_way)):
            if self._is_running:
                work = self._under_way[note.id] = Deferred.fromCoroutine(self._tell(note))
                work.addBoth(self._over, note.id)

    def _over(self, result: Any, id: int) -> None:
        if result is not None:
            _log.failure("a hook could not be noted as told", failure=result)
        del self._under_way[id]
        self.wake()

    async def _tell(self, note: Due) -> None:
        try:
            await self._sender.send(Hook(note.hook), note.message, True)
        except CancelledError:
            return
        except (Unreachable, Unfit) as error:
            await self._put_off(note, str(error))
        except Exception as error:
            _log.failure("a hook failed in an unforeseen way")
            await self._put_off(note, repr(error))
        else:
            self.told += 1
            self._failures = 0
            await self._call(self._outbox.taken, note.id)

    async def _put_off(self, note: Due, why: str) -> None:
        self.failed += 1
        self._failures += 1
        now = self._clock.seconds()
        self._not_before = now + pause(self._failures)
        wait = pause(note.tries + 1)
        _log.warn(
            "hook {hook} of upload {upload} was not taken, the next try is in {wait:.0f} s: {why}",
            hook=note.hook, upload=note.upload, wait=wait, why=why,
        )
        await self._call(self._outbox.put_off, note.id, now + wait)

    async def stop(self) -> None:
        """Let what is being told come to its end, for a while; what isn't told stays noted."""
        self._is_running = False
        if self._later is not None and self._later.active():
            self._later.cancel()
        if self._look_done is not None:
            await self._look_done
        late = self._clock.callLater(GRACE, self._cancel)
        for work in list(self._under_way.values()):
            await work
        if late.active():
            late.cancel()

    def _cancel(self) -> None:
        for work in list(self._under_way.values()):
            work.cancel()
