"""Several processes that serve as one: a parent opens the sockets, starts workers, watches and replaces them.

===========  ======================================================================================================
``SIGTERM``  to the parent: each worker stops as a service alone does; a second one is passed on as well
``SIGHUP``   each worker reloads
``SIGUSR2``  each worker is replaced by a new one, which reads program and configuration anew. The old one stops when
             the new one is ready. If that doesn't become ready, everything stays as it is
===========  ======================================================================================================

A worker is the same service with the same words on its command line. It finds the sockets open (``sockets.py``) and
speaks to its parent as any service speaks to its manager (``notify.py``), through a pipe; when its standard input ends,
the parent is gone, and it stops.

**A worker that ends unasked** is replaced, at once the first time, and later and later while they don't last. One whose
loop hangs is killed. But as long as no worker has ever been ready, the first one that ends takes the parent with it:
somebody is there to read why.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from lwstwisted.running.lifecycle import Lifecycle
from lwstwisted.running.notify import PIPE, Notifier
from lwstwisted.running.sockets import FIRST, Opening, listen_environment
from lwstwisted.running.worker import WORKER

HANG_TIME = 60.0
"""Seconds in which a worker's loop has to turn, unless the service manager says so of ours."""
START_TIME = 600.0
"""Seconds in which it has to say something at all: with a quota the first one counts all files."""
LASTING = 10.0
"""Seconds after which a worker that was ready has been worth its start."""
LONGEST_PAUSE = 30.0
"""Seconds between two starts at most."""
SLACK = 45.0
"""Seconds that a worker may take to stop beyond its time to drain: longer than it waits for a lock of the store."""
RELOAD_TIME = 10.0
"""Seconds in which a worker has to reload."""

METRICS = "PROMETHEUS_MULTIPROC_DIR"
"""Names the folder in which workers sum up their metrics."""

_log = Logger()
_COUNTS = re.compile(r"(\d+) (\w+(?: \w+)*)")


def pause_before(failures: int) -> float:
    """Seconds to wait with the next start, when so many workers in a row did not last."""
    return 0.0 if failures < 2 else min(LONGEST_PAUSE, 0.25 * 2.0 ** min(failures, 20))


def summed(statuses: Sequence[str]) -> str:
    """What workers do together: ``2 of this, 1 of that`` of each, added up."""
    sums: dict[str, int] = {}
    for status in statuses:
        for count, what in _COUNTS.findall(status):
            sums[what] = sums.get(what, 0) + int(count)
    return ", ".join(f"{count} {what}" for what, count in sums.items())


class Worker(ProcessProtocol):
    """One worker.

    :ivar ready: fires when it serves, or fails when it ends before that.
    :ivar over: fires when it has ended.
    :ivar status: what it does, in its own words.
    :ivar pid: its process.
    """

    def __init__(self, number: int, clock: Any, timeout: float, ended: Callable[[Worker], object]) -> None:
        self.number = number
        self.ready: Deferred[None] = Deferred()
        self.over: Deferred[None] = Deferred()
        self.reloaded: Deferred[None] | None = None
        self.status = ""
        self.was_ready = self.is_spare = self.is_retired = self.is_over = False
        self.started = clock.seconds()
        self.pid = 0
        self.how = ""
        self._clock = clock
        self._ended = ended
        self._timeout = timeout
        self._unread = b""
        self._alarm: Any = None
        self._kill: Any = None

    def connectionMade(self) -> None:
        """See ``ProcessProtocol``."""
        self.pid = int(self.transport.pid)  # type: ignore[union-attr]
        _log.info("worker {number} started: process {pid}", number=self.number, pid=self.pid)
        self._alarm = self._clock.callLater(START_TIME, self._hangs)

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        """See ``ProcessProtocol``."""
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            name, _, value = line.decode(errors="replace").partition("=")
            if name == "READY":
                self._is_ready()
            elif name == "STATUS":
                self.status = value
            if self._alarm is not None:
                self._alarm.reset(self._timeout)

    def _is_ready(self) -> None:
        if not self.was_ready:
            self.was_ready = True
            self.ready.callback(None)
        reloaded, self.reloaded = self.reloaded, None
        if reloaded is not None:
            reloaded.callback(None)

    def _hangs(self) -> None:
        self._alarm = None
        _log.error("worker {number} hangs: process {pid} is killed", number=self.number, pid=self.pid)
        self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        try:
            self.transport.signalProcess(int(number))  # type: ignore[union-attr]
        except ProcessExitedAlready:
            pass

    def reload(self) -> Deferred[None]:
        """Have it reload; fires when it has, or has ended, or has had its time for it."""
        if self.reloaded is None:
            self.reloaded = Deferred()
            self.reloaded.addTimeout(RELOAD_TIME, self._clock)
            self.reloaded.addErrback(lambda _: setattr(self, "reloaded", None))
        self.send(signal.SIGHUP)
        return self.reloaded

    def retire(self, patience: float) -> None:
        """Let it stop; said again, let it hurry.

        :param patience: seconds until it is killed.
        """
        self.is_retired = True
        if self._kill is None:
            self._kill = self._clock.callLater(patience, self.send, signal.SIGKILL)
        self.send(signal.SIGTERM)

    def processEnded(self, reason: Failure) -> None:
        """See ``ProcessProtocol``."""
        self.is_over = True
        for call in (self._alarm, self._kill):
            if call is not None and call.active():
                call.cancel()
        self._alarm = self._kill = None
        ended: Any = reason.value
        self.how = f"signal {ended.signal}" if ended.signal else f"status {ended.exitCode}"
        if not self.was_ready:
            self.ready.errback(reason)
        if self.reloaded is not None:
            self._is_ready()
        self._ended(self)
        self.over.callback(None)


class Workers(Service):
    """The parent.

    :param words: of the command line behind ``lwstwisted serve``, for each worker.
    :param descriptions: of the endpoints that are listened on, in the order in which a worker listens on them.
    :param count: how many workers there are.
    :param patience: seconds in which a worker that is told to stop does so by itself.
    :param is_measured: whether they sum up their metrics.
    :ivar exit_status: of the whole, when it has ended.
    :ivar hints: none; the first worker has them.
    """

    def __init__(
        self,
        reactor: Any,
        notifier: Notifier,
        words: Sequence[str],
        descriptions: Sequence[str],
        count: int,
        patience: float,
        is_measured: bool = False,
    ) -> None:
        self._reactor = reactor
        self._words = words
        self._descriptions = descriptions
        self._count = count
        self._patience = patience + SLACK
        self._timeout = notifier.timeout or HANG_TIME
        self._opening = Opening(reactor)
        self._workers: list[Worker] = []
        self._failures = 0
        self._started = 0
        self._is_up = self._is_stopping = self._is_replacing = False
        self._is_measured = is_measured
        self._metrics = ""
        self.exit_status = 0
        self.hints: Sequence[str] = ()
        self._lifecycle = Lifecycle(
            reactor, notifier, self._status, self._hasten, {signal.SIGUSR2: self._replace_all}
        )
        self._lifecycle.reloads.append(self._reload)

    # Its life

    def privilegedStartService(self) -> None:
        """See ``IService``."""
        self._opening.listen(self._descriptions)
        super().privilegedStartService()  # type: ignore[no-untyped-call]

    def startService(self) -> None:
        """See ``IService``."""
        super().startService()  # type: ignore[no-untyped-call]
        if not self._opening.ports:
            self._opening.listen(self._descriptions)
        if self._is_measured:
            self._metrics = tempfile.mkdtemp(prefix="lwstwisted-metrics-")
        self._lifecycle.start(ready=False)
        self._reactor.callWhenRunning(self._start_all)

    def _start_all(self) -> None:
        if self._is_stopping:
            return
        began = [self._start() for _ in range(self._count)]
        DeferredList([worker.ready for worker in began], consumeErrors=True).addCallback(self._have_begun)

    def _have_begun(self, outcomes: list[tuple[bool, Any]]) -> None:
        self._is_up = all(success for success, _ in outcomes)
        if self._is_up:
            self._lifecycle.ready()

    def stopService(self) -> Deferred[None]:
        """See ``IService``."""
        super().stopService()  # type: ignore[no-untyped-call]
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        self._is_stopping = True
        self._lifecycle.stopping(self._patience)
        await self._opening.close()
        for worker in self._workers:
            if not worker.is_retired:  # else it stops already
                worker.retire(self._patience)
        await DeferredList([worker.over for worker in self._workers])
        self._lifecycle.stop()
        if self._metrics:
            shutil.rmtree(self._metrics, ignore_errors=True)

    def _hasten(self) -> None:
        for worker in self._workers:
            worker.retire(self._patience)

    def _status(self) -> str:
        told = summed([worker.status for worker in self._workers])
        ready = sum(worker.was_ready and not worker.is_retired for worker in self._workers)
        return ", ".join(filter(None, [f"{ready} of {self._count} workers", told]))

    def _reload(self) -> Deferred[Any]:
        return DeferredList([worker.reload() for worker in self._workers if worker.was_ready])

    # Workers

    def _start(self, number: int = 0) -> Worker:
        """Start a worker, with the number of the one that it follows."""
        self._started += 1
        worker = Worker(number or self._started, self._reactor, self._timeout, self._ended)
        sockets = {FIRST + at: port.fileno() for at, port in enumerate(self._opening.ports)}
        pipe = FIRST + len(sockets)
        environment = {
            **os.environ,
            **listen_environment(self._descriptions),
            WORKER: str(worker.number),
            PIPE: str(pipe),
            "WATCHDOG_USEC": str(int(self._timeout * 1e6)),
        }
        if self._metrics:
            environment[METRICS] = self._metrics
        # -P: the current folder may be one that everybody may put modules into.
        command = [sys.executable, "-P", "-m", "lwstwisted", "serve", *self._words]
        self._workers.append(worker)
        self._reactor.spawnProcess(
            worker, sys.executable, command, environment, childFDs={0: "w", 1: 1, 2: 2, **sockets, pipe: "r"}
        )
        return worker

    def _ended(self, worker: Worker) -> None:
        self._workers.remove(worker)
        if self._metrics:
            from prometheus_client.multiprocess import mark_process_dead

            mark_process_dead(worker.pid, self._metrics)  # type: ignore[no-untyped-call]
        if worker.is_retired or self._is_stopping:
            return
        how = {"number": worker.number, "pid": worker.pid, "how": worker.how}
        _log.error("worker {number} ended by itself: process {pid}, {how}", **how)
        if worker.is_spare and not worker.was_ready:
            return  # the one that it was to follow is still there
        if not self._is_up:
            self.exit_status = 1
            self._is_stopping = True
            self._reactor.callLater(0, self._reactor.stop)
            return
        has_lasted = worker.was_ready and self._reactor.seconds() - worker.started >= LASTING
        self._failures = 0 if has_lasted else self._failures + 1
        self._reactor.callLater(pause_before(self._failures), self._start_again, worker.number)

    def _start_again(self, number: int) -> None:
        if not self._is_stopping:
            self._start(number).ready.addErrback(lambda _: None)  # its end is told where it is noticed

    def _replace_all(self) -> None:
        if not (self._is_replacing or self._is_stopping):
            self._is_replacing = True
            Deferred.fromCoroutine(self._replace())

    async def _replace(self) -> None:
        try:
            for old in [worker for worker in self._workers if not worker.is_retired]:
                new = self._start(old.number)
                new.is_spare = True
                try:
                    await new.ready
                except Exception:
                    _log.error("worker {number} stays: the new one was never ready", number=old.number)
                    return
                if self._is_stopping:
                    return
                # One that ended by itself meanwhile has a follower.
                (new if old.is_over else old).retire(self._patience)
        finally:
            self._is_replacing = False


@implementer(IReadDescriptor)
class _ParentsEnd:
    """The standard input of a worker: it ends when the parent does."""

    def fileno(self) -> int:
        """See ``IFileDescriptor``."""
        return 0

    def logPrefix(self) -> str:
        """See ``ILoggingContext``."""
        return "parent"

    def doRead(self) -> Any:
        """See ``IReadDescriptor``."""
        return None if os.read(0, 1024) else CONNECTION_DONE

    def connectionLost(self, reason: Failure) -> None:
        """See ``IFileDescriptor``. It is called as well when the reactor stops."""
        poll = select.poll()
        poll.register(0, 0)
        if not poll.poll(0):
            return
        _log.error("the parent is gone: process {pid} stops", pid=os.getpid())
        os.kill(os.getpid(), signal.SIGTERM)


def watch_parent(reactor: Any) -> None:
    """Stop this worker when its parent is gone."""
    reactor.callWhenRunning(reactor.addReader, _ParentsEnd())
