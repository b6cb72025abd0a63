"""Blocking calls beside the reactor, and what their errors tell a client."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.internet.threads import deferToThreadPool
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


class Threads:
    """Runs blocking calls beside the reactor, maps their errors, and knows when none is left."""

    _log = Logger()

    def __init__(self, reactor: IReactorFromThreads, threads: int) -> None:
        self.stopping = False
        self._reactor = reactor
        self._pool = ThreadPool(minthreads=0, maxthreads=threads, name="lwstwisted-store")
        self._pool.start()
        self._under_way = 0
        self._idle: list[Deferred[None]] = []

    async def run(
        self, work: Callable[..., T], *args: object, undo: Callable[[T], object] | None = None
    ) -> T:
        """Call ``work`` in a thread, unless the store is stopping.

        :param undo: gets the result when nobody waits for it any more.
        """
        if self.stopping:
            raise Refused(errors.STOPPING)
        return await self.finish(work, *args, undo=undo)

    async def finish(
        self, work: Callable[..., T], *args: object, undo: Callable[[T], object] | None = None
    ) -> T:
        """The same while the store is stopping."""
        result, cancelled = await self._outcome(deferToThreadPool(self._reactor, self._pool, work, *args))
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
            self._log.error("store: {work} failed: {error}", work=work.__name__, error=error)
        return Refused(refusal)

    async def idle(self) -> None:
        """Wait until no call is under way."""
        while self._under_way:
            self._idle.append(Deferred())
            await self._idle[-1]

    def stop(self) -> None:
        """End the threads, which are idle: this doesn't block."""
        if self._pool.started:
            self._pool.stop()
