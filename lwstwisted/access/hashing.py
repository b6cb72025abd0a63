"""Slow hashes in threads of their own: few, and shared fairly between those who want something hashed.

A password hash costs a processor 20 to 500 ms. Were they computed in the threads of the store, a flood of wrong
passwords would hold up all uploads; in one queue, all logins. So there are as many threads as processors can be spared,
and a queue for each network that asks; the networks take turns. Whoever floods waits behind themselves. In front of all
of them is a queue for what is known to be wanted.
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from lwstwisted import errors
from lwstwisted.errors import Refused

THREADS = max(1, min(4, (os.cpu_count() or 1) // 2))

T = TypeVar("T")

_Job = tuple["Deferred[Any]", Callable[..., Any], tuple[object, ...]]


class Hashing:
    """Calls in threads, the networks in turns.

    How many may wait is up to who asks (``slowdown.py``).

    :param reactor: in whose thread the results are told.
    """

    def __init__(self, reactor: IReactorFromThreads, threads: int = THREADS) -> None:
        self._reactor = reactor
        self._threads = threads
        self._pool: ThreadPool | None = None
        self._under_way = 0
        self._queues: OrderedDict[str | None, deque[_Job]] = OrderedDict()
        self._is_stopped = False

    def run(self, network: str | None, work: Callable[..., T], *args: object) -> Deferred[T]:
        """Call ``work`` in a thread, as soon as it is the turn of ``network``; None goes first.

        :raises Refused: ``STOPPING``, as the failure of what is returned.
        """
        done: Deferred[Any] = Deferred()
        if self._is_stopped:
            done.errback(Refused(errors.STOPPING))
            return done
        self._queues.setdefault(network, deque()).append((done, work, args))
        self._go_on()
        return done

    def stop(self) -> None:
        """End the threads. What waits is refused; what is being called ends first, and this waits for it."""
        self._is_stopped = True
        while self._queues:
            for done, _, _ in self._queues.popitem()[1]:
                done.errback(Refused(errors.STOPPING))
        if self._pool is not None:
            self._pool.stop()
            self._pool = None

    def _go_on(self) -> None:
        while self._queues and self._under_way < self._threads and not self._is_stopped:
            network = None if None in self._queues else next(iter(self._queues))
            queue = self._queues.pop(network)
            done, work, args = queue.popleft()
            if queue:
                self._queues[network] = queue  # behind all others
            if self._pool is None:
                self._pool = ThreadPool(minthreads=0, maxthreads=self._threads, name="lwstwisted-access")
                self._pool.start()
            self._under_way += 1
            deferToThreadPool(self._reactor, self._pool, work, *args).addBoth(self._over, done)

    def _over(self, result: object, done: Deferred[Any]) -> None:
        self._under_way -= 1
        if isinstance(result, Failure):
            done.errback(result)
        else:
            done.callback(result)
        self._go_on()
