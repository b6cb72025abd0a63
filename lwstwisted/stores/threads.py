"""Blocking calls beside the reactor, and what their errors tell a client."""

from __future__ import annotations

import errno
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Generic, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.stores.tree import NO_SPACE

T = TypeVar("T")

_ANSWERS = {
    **dict.fromkeys(NO_SPACE, errors.DISK_FULL),
    errno.ENOTDIR: errors.NOT_A_FOLDER,
    errno.ELOOP: errors.NOT_A_FILE,
    # Some file systems (eCryptfs) take less than NAME_MAX.
    errno.ENAMETOOLONG: errors.NAME_TOO_LONG,
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), errors.TOO_MANY_FILES),
}
"""What an OSError tells the client; any other one is ``STORE_FAILED``."""


class Lane:
    """Whose calls they are.

    :ivar is_urgent: whether they don't wait for others that aren't; :meth:`Threads.hurry` says so.
    """

    __slots__ = ("is_urgent",)

    def __init__(self) -> None:
        self.is_urgent = False


@dataclass(slots=True, eq=False)
class _Call(Generic[T]):
    work: Callable[..., T]
    arguments: tuple[object, ...]
    lane: Lane | None
    outcome: Deferred[T] = field(default_factory=Deferred)


class Threads:
    """Runs blocking calls beside the reactor, maps their errors, and knows when none is left.

    :param threads: calls at once.
    :param for_urgent: urgent ones at once, beside those.
    :ivar failures: how often a call failed in a way that an operator has to mend, by the code of its refusal.
    """

    _log = Logger()

    def __init__(self, reactor: IReactorFromThreads, threads: int, for_urgent: int = 0) -> None:
        self.stopping = False
        self.failures: Counter[str] = Counter()
        self._reactor = reactor
        self._pool = ThreadPool(minthreads=0, maxthreads=threads, name="lwstwisted-store")
        self._urgent_pool = ThreadPool(minthreads=0, maxthreads=for_urgent, name="lwstwisted-store-urgent")
        self._pool.start()
        self._urgent_pool.start()
        self._waiting: deque[_Call[Any]] = deque()
        self._urgent: deque[_Call[Any]] = deque()
        self._moving = Lock()
        self._under_way = 0
        self._idle: list[Deferred[None]] = []

    async def run(
        self,
        work: Callable[..., T],
        *args: object,
        undo: Callable[[T], object] | None = None,
        lane: Lane | None = None,
    ) -> T:
        """Call ``work`` in a thread, unless the store is stopping.

        :param undo: gets the result when nobody waits for it any more.
        :param lane: whose call it is.
        """
        if self.stopping:
            raise Refused(errors.STOPPING)
        return await self.finish(work, *args, undo=undo, lane=lane)

    def hurry(self, lane: Lane) -> None:
        """Have no call of ``lane`` wait for others that aren't urgent, also if it waits already."""
        lane.is_urgent = True
        with self._moving:
            moved = [call for call in self._waiting if call.lane is lane]
            for call in moved:
                self._waiting.remove(call)
            self._urgent += moved
        for _ in moved:
            self._urgent_pool.callInThread(self._work, self._urgent)

    def _submit(self, call: _Call[T]) -> Deferred[T]:
        is_urgent = call.lane is not None and call.lane.is_urgent
        pool, queue = (self._urgent_pool, self._urgent) if is_urgent else (self._pool, self._waiting)
        queue.append(call)
        pool.callInThread(self._work, queue)
        return call.outcome

    def _work(self, queue: deque[_Call[Any]]) -> None:
        with self._moving:
            if not queue:
                return  # it has become urgent
            call = queue.popleft()
        try:
            result = call.work(*call.arguments)
        except BaseException:
            self._reactor.callFromThread(call.outcome.errback, Failure())
        else:
            self._reactor.callFromThread(call.outcome.callback, result)

    async def finish(
        self,
        work: Callable[..., T],
        *args: object,
        undo: Callable[[T], object] | None = None,
        lane: Lane | None = None,
    ) -> T:
        """The same while the store is stopping."""
        result, cancelled = await self._outcome(self._submit(_Call(work, args, lane)))
        if isinstance(result, Failure):
            if isinstance(result.value, OSError):
                raise self._told(work, result.value) from result.value
            result.raiseException()
        if cancelled is not None:
            if undo is not None:
                undo(result)
            raise cancelled
        return result

    async def _outcome(self, job: Deferred[T]) -> tuple[T | Failure, CancelledError | None]:
        """Wait for a thread, although the caller is cancelled: the thread has its memory and descriptor."""
        outcome: list[T | Failure] = []
        waiter: Deferred[None] = Deferred()

        def finished(result: T | Failure) -> None:
            outcome.append(result)
            waiter.callback(None)
            # Only now, so that who waits for an idle store sees what the caller did with the result.
            self._under_way -= 1
            while self._idle and not self._under_way:
                self._idle.pop().callback(None)

        self._under_way += 1
        job.addBoth(finished)
        cancelled = None
        while not outcome:
            try:
                await waiter
            except CancelledError as error:
                cancelled = error
                waiter = Deferred()
        return outcome[0], cancelled

    def _told(self, work: Callable[..., object], error: OSError) -> Refused:
        refusal = _ANSWERS.get(error.errno or 0, errors.STORE_FAILED)
        if refusal.status in (500, 507):  # else it is nothing that an operator can mend
            self.failures[refusal.code] += 1
            self._log.error("store: {work} failed: {error}", work=work.__name__, error=error)
        return Refused(refusal)

    @property
    def under_way(self) -> int:
        """How many calls run, or wait for a thread."""
        return self._under_way

    @property
    def waiting(self) -> int:
        """How many calls wait for a thread."""
        return len(self._waiting) + len(self._urgent)

    async def idle(self) -> None:
        """Wait until no call is under way."""
        while self._under_way:
            self._idle.append(Deferred())
            await self._idle[-1]

    def stop(self) -> None:
        """End the threads, which are idle: this doesn't block."""
        for pool in (self._pool, self._urgent_pool):
            if pool.started:
                pool.stop()
