"""Asking and telling an application about uploads: the :class:`~lwstwisted.hooks.events.Events` of a service.

When the hook of an event that is asked about fails:

====================================================  ===  =====================================
no connection, no answer in time, status 5xx          503  trying again may help
another status than 2xx, an exit status that isn't 0  500  somebody has to mend the hook
a response that makes no sense, or that wants what    500  the same; going on without it would
can't be had (an ID or a place of its own)                 store what the application didn't mean
====================================================  ===  =====================================

Of what is told, none of this reaches the client.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.hooks.delivery import LONGEST, Delivery
from lwstwisted.hooks.events import Answer, Cause, Finishing, Upload
from lwstwisted.hooks.messages import Response, message, response, without_secrets
from lwstwisted.hooks.names import Hook
from lwstwisted.hooks.outbox import Note, Outbox, Proof
from lwstwisted.hooks.senders import Sender, Unfit, Unreachable

WAITING = 100_000
"""Notes above which no upload begins: some hundred megabytes on disk. Those under way may end."""

INTERVAL = 1.0
"""Seconds between two ``post-receive`` of an upload."""

T = TypeVar("T")

_log = Logger()


class Telling:
    """Asks and tells through ``sender``.

    :param root: of the store, which has to be recovered: what it has undone of a crash is not told of.
    :param enabled: of which events.
    :param forwarded: names of fields that are handed on, in lower case: these may be noted on the disk.
    :param interval: seconds between two ``post-receive`` of an upload.
    :param most_waiting: notes above which no upload begins.
    :raises OSError: if the notes can't be opened. This blocks; it is meant for the start.
    """

    def __init__(
        self,
        root: Path,
        sender: Sender,
        reactor: Any,
        enabled: Collection[Hook],
        forwarded: Collection[str] = (),
        interval: float = INTERVAL,
        most_waiting: int = WAITING,
    ) -> None:
        self.root = root.absolute()
        self._sender = sender
        self._reactor = reactor
        self._enabled = frozenset(enabled)
        self._forwarded = forwarded
        self._interval = interval
        self._most_waiting = most_waiting
        self.outbox = Outbox(self.root, LONGEST)
        self._pool = ThreadPool(minthreads=0, maxthreads=1, name="lwstwisted-hooks")
        self.delivery = Delivery(self.outbox, sender, self.call, reactor)
        self._confirmed: list[int] = []
        self._doubtful: list[int] = []
        self._settling: Deferred[None] | None = None
        try:
            self.outbox.adopt(judges=True)
        except BaseException:
            self.outbox.close()
            raise

    def start(self) -> None:
        """Begin to tell what is noted."""
        self._pool.start()
        self.delivery.start()

    async def stop(self) -> None:
        """Note what is settled, and give everything back. What isn't told is told after the next start."""
        if self._pool.started:
            await self.delivery.stop()
            if self._settling is not None:
                await self._settling
            self._pool.stop()
        self.outbox.close()

    async def call(self, work: Callable[..., T], *args: object) -> T:
        """Call what blocks in the thread of the notes."""
        return cast(T, await deferToThreadPool(self._reactor, self._pool, work, *args))

    def wants(self, hook: Hook) -> bool:
        """Whether anybody hears of an event."""
        return hook in self._enabled and self._sender.wants(hook)

    # What is asked

    async def may_create(self, upload: Upload, cause: Cause) -> Answer:
        """See :class:`~lwstwisted.hooks.events.Events`."""
        if self.delivery.waiting >= self._most_waiting:
            raise Refused(errors.HOOKS_BEHIND, {b"Retry-After": b"60"})
        said = await self._ask(Hook.PRE_CREATE, upload, cause)
        if said.rejects:
            raise said.answer.refusing(errors.HOOK_REJECTED)
        if said.unfit:
            self._blame(Hook.PRE_CREATE, upload, f"it wants what can't be had: {', '.join(said.unfit)}")
            raise Refused(errors.HOOK_FAILED)
        return said.answer

    async def may_terminate(self, upload: Upload, cause: Cause) -> None:
        """See :class:`~lwstwisted.hooks.events.Events`."""
        said = await self._ask(Hook.PRE_TERMINATE, upload, cause)
        if said.keeps:
            raise said.answer.refusing(errors.HOOK_KEPT)

    async def _ask(self, hook: Hook, upload: Upload, cause: Cause) -> Response:
        if not self.wants(hook):
            return Response()
        try:
            content = await self._sender.send(hook, message(hook, upload, cause, self.root), False)
            # A command may have nothing to say; over HTTP something has to come.
            return response(content) if content else Response()
        except Unreachable as error:
            self._blame(hook, upload, str(error))
            raise Refused(errors.HOOK_UNREACHABLE, {b"Retry-After": b"5"}) from None
        except (Unfit, ValueError) as error:
            self._blame(hook, upload, str(error))
            raise Refused(errors.HOOK_FAILED) from None

    def _blame(self, hook: Hook, upload: Upload, why: str) -> None:
        _log.error("hook {hook} of upload {upload} failed: {why}", hook=hook.value, upload=upload.id or "-", why=why)

    # What is told

    def note(self, hook: Hook, upload: Upload, cause: Cause, proof: Proof | None = None) -> list[Note]:
        """What has to be noted of an event: nothing, if nobody hears of it."""
        if not self.wants(hook):
            return []
        text = message(hook, upload, without_secrets(cause, self._forwarded), self.root)
        return [Note(upload.id, hook.value, text, proof)]

    async def created(self, upload: Upload, cause: Cause) -> None:
        """See :class:`~lwstwisted.hooks.events.Events`."""
        await self._put(self.note(Hook.POST_CREATE, upload, cause))

    async def terminated(self, upload: Upload, cause: Cause) -> None:
        """See :class:`~lwstwisted.hooks.events.Events`."""
        await self._put(self.note(Hook.POST_TERMINATE, upload, cause))

    async def completed(self, upload: Upload, cause: Cause) -> Answer:
        """See :class:`~lwstwisted.hooks.events.Events`."""
        notes = self.note(Hook.POST_FINISH, upload, cause)
        try:
            return (await self._ask(Hook.PRE_FINISH, upload, cause)).answer
        finally:
            await self._put(notes)

    async def _put(self, notes: Sequence[Note]) -> list[int]:
        if not notes:
            return []
        try:
            ids = await self.call(self.outbox.put, notes)
        except OSError as error:
            _log.error("{error}", error=error)
            raise Refused(errors.DISK_FULL if error.errno == errno.ENOSPC else errors.STORE_FAILED) from None
        self.delivery.wake()
        return ids

    def finishing(self, upload: Upload, cause: Cause, has_begun: bool) -> Finishing:
        """See :class:`~lwstwisted.hooks.events.Events`."""
        return _Finishing(self, upload, cause, has_begun)

    async def announce(self, endings: Sequence[tuple[Finishing, str, int]]) -> None:
        """See :class:`~lwstwisted.hooks.events.Events`."""
        mine = [(cast(_Finishing, ending), etag, size) for ending, etag, size in endings]
        notes = [ending.notes(etag, size) for ending, etag, size in mine]
        ids = await self._put([note for some in notes for note in some])
        for (ending, _, _), some in zip(mine, notes, strict=True):
            ending.ids, ids = ids[: len(some)], ids[len(some) :]

    async def ask_at_end(self, upload: Upload, cause: Cause) -> Answer:
        """Ask ``pre-finish``."""
        return (await self._ask(Hook.PRE_FINISH, upload, cause)).answer

    def settle(self, confirmed: Sequence[int] = (), doubtful: Sequence[int] = ()) -> None:
        """Note soon whether what was announced has happened. Nobody has to wait for it: a crash loses nothing."""
        self._confirmed += confirmed
        self._doubtful += doubtful
        if self._settling is None and (self._confirmed or self._doubtful):
            self._settling = Deferred.fromCoroutine(self._settle_all())

    async def _settle_all(self) -> None:
        while self._confirmed or self._doubtful:
            confirmed, self._confirmed = self._confirmed, []
            doubtful, self._doubtful = self._doubtful, []
            try:
                await self.call(self.outbox.settle, confirmed, doubtful)
            except OSError as error:
                # They stay announced, and the next start looks at their proofs.
                _log.error("{error}", error=error)
        self._settling = None
        self.delivery.wake()

    # What may be told

    def receiving(
        self, upload: Upload, cause: Cause, offset: Callable[[], int], stop: Callable[[Refused], None]
    ) -> Callable[[], None]:
        """See :class:`~lwstwisted.hooks.events.Events`."""
        if not self.wants(Hook.POST_RECEIVE):
            return _nothing
        receiving = _Receiving(self, upload, cause, offset, stop)
        looking = LoopingCall(receiving.look)
        looking.clock = self._reactor
        looking.start(self._interval, now=False)

        def end() -> None:
            if looking.running:
                looking.stop()
            receiving.end()

        return end

    async def tell_progress(self, upload: Upload, cause: Cause) -> Response | None:
        """Tell of ``post-receive``, once; None if that failed."""
        try:
            return await self._ask(Hook.POST_RECEIVE, upload, cause)
        except Refused:
            return None  # it was logged


def _nothing() -> None:
    """The end of what nobody hears of."""


class _Finishing:
    """See :class:`~lwstwisted.hooks.events.Finishing`."""

    def __init__(self, telling: Telling, upload: Upload, cause: Cause, has_begun: bool) -> None:
        self.ids: list[int] = []
        self._telling = telling
        self._upload = upload
        self._cause = cause
        self._has_begun = has_begun

    def notes(self, etag: str, size: int) -> list[Note]:
        """What has to be noted."""
        upload = self._upload = replace(self._upload, size=size, offset=size)
        assert upload.at is not None
        proof, note = Proof(upload.at, etag), self._telling.note
        begun = [] if self._has_begun else note(Hook.POST_CREATE, replace(upload, offset=0), self._cause, proof)
        return [*begun, *note(Hook.POST_FINISH, upload, self._cause, proof)]

    def announce(self, etag: str, size: int) -> None:
        if notes := self.notes(etag, size):
            self.ids = self._telling.outbox.put(notes)

    async def named(self) -> Answer:
        try:
            return await self._telling.ask_at_end(self._upload, self._cause)
        finally:
            self._telling.settle(confirmed=self.ids)

    def failed(self) -> None:
        self._telling.settle(doubtful=self.ids)


class _Receiving:
    """An upload that goes on."""

    def __init__(
        self,
        telling: Telling,
        upload: Upload,
        cause: Cause,
        offset: Callable[[], int],
        stop: Callable[[Refused], None],
    ) -> None:
        self._telling = telling
        self._upload = upload
        self._cause = cause
        self._offset = offset
        self._stop = stop
        self._told = upload.offset
        self._is_telling = self._has_more = self._is_over = False

    def look(self) -> None:
        """Tell, if there is something new, and nothing is being told: a hook that is slow hears less often."""
        offset = self._offset()
        self._has_more = self._is_telling
        if offset != self._told and not self._is_telling:
            self._told, self._is_telling = offset, True
            telling = Deferred.fromCoroutine(self._tell(replace(self._upload, offset=offset)))
            telling.addErrback(self._failed)

    async def _tell(self, upload: Upload) -> None:
        try:
            said = await self._telling.tell_progress(upload, self._cause)
        finally:
            self._is_telling = False
        if said is not None and said.stops and not self._is_over:
            self._is_over = True
            self._stop(said.answer.refusing(errors.HOOK_STOPPED))
        elif self._is_over and self._has_more:
            self.look()

    def _failed(self, reason: Any) -> None:
        if not reason.check(CancelledError):
            _log.failure("telling how an upload goes on failed", failure=reason)

    def end(self) -> None:
        """Tell how far it came; it can't be stopped any more."""
        self._is_over = True
        self.look()


