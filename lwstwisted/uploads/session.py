"""Resumable uploads: one state, whichever protocol speaks of it.

An upload is a resource of its own, with an id that nobody guesses. It is begun by one request, grows by others, and
becomes a file in the tree when it is whole. tus (``tus.py``) and the protocol of the IETF (``rufh.py``) are two ways to
say that; this is what they say it to. The states, and what may be done in them:

========  ======================================  =============  ============================  =========  ========
state     what it is                              append         finish                        HEAD       cancel
========  ======================================  =============  ============================  =========  ========
OPEN      bytes are missing, or nobody knows      yes            --                            offset     removed
WHOLE     all bytes are there, and no name yet    nothing        NAMED, or WHOLE and refused   offset     removed
NAMED     it has become a file                    refused: 400   the same answer again         length     forgotten
WAITING   a concatenation whose parts are not     refused: 403   WHOLE, with the last part     no offset  removed
          all whole
========  ======================================  =============  ============================  =========  ========

A part of a concatenation stays WHOLE, until it expires.

**The offset** that a client is told is what is durable, and never goes down: bytes count when they and their number are
synced. That happens at the end of each request, however it ends, and now and then within it (``appending.py``). Bytes
that come with a checksum count all together or not at all.

**The newest request wins.** A client that lost its connection asks again before anybody here has noticed. So whoever
opens an upload makes the one that holds it leave: its body ends, what has arrived is made durable, and the newcomer
gets the true offset. Between processes a lock that dies with its holder does the same, which the holder looks at five
times a second.

**Whose it is.** An upload belongs to who began it, and isn't there for anybody else. That is looked at before its
holder is asked to leave. What its creator may do is asked again at each request that appends to it or finishes it.

**Time.** An upload expires a while after the last byte that counted. The running service sweeps.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IConsumer
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.server import Request

from lwstwisted import errors
from lwstwisted.access.visitor import ANYBODY, Visitor
from lwstwisted.errors import Refused
from lwstwisted.hooks.events import NO_CAUSE, Cause, Events, Upload
from lwstwisted.interfaces import IRequestBody, Named, ResumableStore, StoredUpload, UploadState
from lwstwisted.uploads.appending import Appending, Proof
from lwstwisted.uploads.places import Places
from lwstwisted.uploads.plan import Plan, Role, State, plan_of, record_of
from lwstwisted.uploads.reporting import Reporting, place_of
from lwstwisted.uploads.transfer import Transfer
from lwstwisted.web.limits import MAX_LENGTH

LIFETIME = 24 * 3600.0
"""Seconds that an unfinished upload is kept after its last byte: a night, and a morning to notice."""

SWEEP_TIME = 60.0
"""Seconds between two looks for uploads that have expired."""

WANTED_TIME = 0.2
"""Seconds between two looks whether another process wants an upload that this one holds."""
PATIENCE = 10.0
"""Seconds to wait for another process to let go of an upload; it may be stopped, or its disk slow."""
ASK_AGAIN = 0.05
"""Seconds between two tries meanwhile."""

_log = Logger()


class Session:
    """An upload that one request holds; :class:`Sessions` opens it.

    :ivar id: its id.
    :ivar plan: what it is meant to be; a file without a name has its id for one.
    :ivar is_gone: whether it has been removed.
    :ivar was_named: whether it had become a file before this request.
    :ivar reporting: what its request asks and tells.
    """

    def __init__(self, sessions: Sessions, id: str, visitor: Visitor, reporting: Reporting) -> None:
        self.id = id
        self.reporting = reporting
        self._visitor = visitor
        self.plan = Plan(())
        self._sessions = sessions
        self._stored: StoredUpload | None = None
        self._transfer: Transfer | None = None
        self.is_gone = self.was_named = False
        self._is_unwanted = self._is_stopped = False
        self._is_released = False
        self._refused: Refused | None = None
        self._waiters: list[Deferred[None]] = []

    # What it is

    @property
    def stored(self) -> StoredUpload:
        """The upload in the store."""
        assert self._stored is not None, "the upload is not held"
        return self._stored

    @property
    def url(self) -> str:
        """Where its owner goes on with it."""
        return self._sessions.url_of(self.id) + self._visitor.query

    @property
    def offset(self) -> int:
        """Bytes that are durable."""
        return self.stored.state.offset

    @property
    def length(self) -> int | None:
        """Announced bytes, or None."""
        return self.stored.state.length

    @property
    def expires(self) -> float:
        """When it may be removed, if it doesn't go on: seconds since the epoch."""
        return self.stored.state.expires

    @property
    def state(self) -> State:
        """Where it is in the table."""
        if self.named is not None:
            return State.NAMED
        if self.offset == self.length:
            return State.WHOLE
        return State.WAITING if self.plan.role is Role.CONCATENATION else State.OPEN

    @property
    def named(self) -> Named | None:
        """The file that it has become, if it is NAMED."""
        return self.stored.state.named

    # What may be done to it

    async def announce_length(self, length: int) -> None:
        """Note how many bytes it will have.

        :raises Refused: ``LENGTH_MISMATCH`` if something else was announced, or more bytes are there;
            ``BODY_TOO_LARGE``; and what the store refuses for want of space.
        """
        if length == self.length:
            return
        if self.length is not None or length < self.offset:
            raise Refused(errors.LENGTH_MISMATCH)
        if length > self._max_size:
            raise Refused(errors.BODY_TOO_LARGE)
        await self.stored.keep(self.stored.state.record, length)

    async def append(
        self,
        body: IRequestBody,
        proof: Proof | None = None,
        progress: Callable[[int], None] | None = None,
        is_last: bool = False,
    ) -> None:
        """Append the content of a request, and make it durable; with the last bytes it becomes a file.

        What that is refused with is told by :meth:`finish`, which is to be asked next.

        However this ends: what has arrived is kept as far as the store took it, unless there is a proof to it.

        :param proof: what the content has to hash to.
        :param progress: is told each offset that has become durable before the end.
        :param is_last: whether the client has said that nothing comes behind it.
        :raises Refused: ``UPLOAD_FINISHED``, ``CONCATENATED``; ``UPLOAD_OVERRUN`` or ``BODY_TOO_LARGE``;
            ``UPLOAD_TAKEN``; what the proof, the store or the body says.
        :raises lwstwisted.errors.BodyCut: when the client left.
        """
        if self.state is State.NAMED:
            raise Refused(errors.UPLOAD_FINISHED)
        if self.plan.role is Role.CONCATENATION:
            raise Refused(errors.CONCATENATED)
        if self._is_unwanted:
            raise Refused(errors.UPLOAD_TAKEN)
        self._require_right()
        begin = self.offset  # which a checkpoint moves while the body comes
        most = (self._max_size if self.length is None else self.length) - begin
        overrun = errors.BODY_TOO_LARGE if self.length is None else errors.UPLOAD_OVERRUN
        if body.length is not None and body.length > most:
            raise Refused(overrun)
        part = Appending(self.stored, self._sessions.clock, proof, progress)
        transfer = self._transfer = Transfer(part, body.length, most, overrun)
        part.begin(transfer.flush)
        end = self.reporting.receiving(self.told, lambda: transfer.received, self._stop)
        try:
            await body.deliver_to(cast(IConsumer, transfer))
            if self._ends_with(begin + transfer.received, is_last):
                part.name = self._name
            await transfer.finish()
            self._refused = part.refused
        except BaseException as cut:
            cause = transfer.failure or cut
            try:
                if self._is_stopped or (proof is not None and proof.is_announced):
                    raise
                await transfer.keep()
            except BaseException:
                await transfer.abort()
            if self._is_stopped:
                await self.cancel()
            raise cause from None
        finally:
            part.end()
            self._transfer = None
            end()
        if self.plan.role is Role.PART and self.state is State.WHOLE:
            await self.reporting.completed(self.told)

    def _stop(self, refused: Refused) -> None:
        if self._transfer is not None:
            self._is_stopped = True
            self._transfer.stop(refused)

    async def require_nothing(self, body: IRequestBody) -> None:
        """Take the content of a request that repeats the last one; it ends with its first byte.

        :raises Refused: ``UPLOAD_FINISHED``, if there is any.
        :raises lwstwisted.errors.BodyCut: when the client left.
        """
        if body.length:
            raise Refused(errors.UPLOAD_FINISHED)
        if self._is_unwanted:
            raise Refused(errors.UPLOAD_TAKEN)
        transfer = self._transfer = Transfer(Appending(self.stored, self._sessions.clock), 0, 0, errors.UPLOAD_FINISHED)
        try:
            await body.deliver_to(cast(IConsumer, transfer))
        except BaseException as cut:
            raise transfer.failure or cut from None
        finally:
            self._transfer = None

    def _ends_with(self, end: int, is_last: bool) -> bool:
        """Whether so many bytes are all of them, and nobody has to say so any more."""
        is_whole = end == self.length or (is_last and self.length is None)
        return is_whole and (is_last or self.plan.ends_at_length) and self.plan.role is Role.FILE

    async def _name(self) -> Named:
        plan = self.plan
        name_it = partial(self.stored.name_it, plan.target, plan.check, plan.digests)
        return await self.reporting.naming(replace(self.told, at=plan.target), name_it)

    async def finish(self) -> Named:
        """Make it a file, if it is WHOLE and no part; say which one it is, if it is NAMED.

        :raises Refused: what the store refuses; it is WHOLE then, as before. With ``DIGEST_MISMATCH`` it is removed:
            no other bytes can come.
        """
        if self.named is not None:
            return self.reporting.ended(self.named)
        assert self.state is State.WHOLE and self.plan.role is not Role.PART
        self._require_right()
        try:
            if self._refused is not None:
                refused, self._refused = self._refused, None
                raise refused
            return self.reporting.ended(await self._name())
        except Refused as refused:
            if refused.refusal is errors.DIGEST_MISMATCH:
                await self.cancel()
            raise

    async def cancel(self, is_wanted: bool = False) -> None:
        """Remove it; may be repeated. A file that it has become stays.

        :param is_wanted: whether its client wants that. Then the application may refuse it.
        """
        if not self.is_gone:
            told = self.told if self.named is None else None
            if is_wanted and told:
                await self.reporting.may_terminate(told)
            self.is_gone = True
            await self.stored.remove()
            if told:
                await self.reporting.terminated(told)

    @property
    def told(self) -> Upload:
        """What is told of it."""
        return self.plan.told(self.id, self.offset, self.length, place_of(self.id))

    @property
    def _max_size(self) -> int:
        return min(self._sessions.max_size, self.plan.max_size)

    def _require_right(self) -> None:
        self._visitor.require_going_on(None if self.plan.role is Role.PART else self.plan.target)

    # For Sessions

    def leave(self) -> None:
        """Let a newer request have it, as soon as what has arrived is durable."""
        self._is_unwanted = True
        if self._stored is not None:
            self._stored.hurry()
        if self._transfer is not None:
            self._transfer.stop(Refused(errors.UPLOAD_TAKEN))

    def hold(self, stored: StoredUpload) -> None:
        """The upload is this request's."""
        self._stored = stored
        self.was_named = stored.state.named is not None
        plan = plan_of(stored.state)
        self.plan = plan if plan.target or plan.role is Role.PART else replace(plan, target=(self.id,))

    @property
    def is_held(self) -> bool:
        """Whether the upload is this request's."""
        return self._stored is not None

    async def release(self, heir: Session | None) -> None:
        """Let others have it.

        :param heir: the next request for it, which then need not open it.
        """
        try:
            if self._stored is not None:
                handed_over = None if heir is None else self._stored.hand_over()
                if heir is not None and handed_over is not None:
                    heir.hold(handed_over)
                else:
                    await self._stored.release()
        finally:
            self._is_released = True
            while self._waiters:
                self._waiters.pop().callback(None)

    async def wait_for_release(self) -> None:
        """Wait until this request is over."""
        if not self._is_released:
            self._waiters.append(Deferred())
            await self._waiters[-1]


class Sessions(Places):
    """The resumable uploads of a store, for all protocols.

    :param store: where they live.
    :param max_size: bytes of one file at most.
    :param lifetime: seconds that an upload is kept after its last byte.
    :param reactor: for time; the global one by default.
    :param path: the URL path of uploads, with a slash at both ends.
    :param files_path: that of the files that they become.
    :param public_url: what stands in front of both where a client has to be told an absolute URL, such as
        ``https://up.example.org``; without it the URLs are paths.
    :param events: who is asked and told of uploads.
    """

    def __init__(
        self,
        store: ResumableStore,
        max_size: int = MAX_LENGTH,
        *,
        lifetime: float = LIFETIME,
        reactor: Any = None,
        path: str = "/uploads/",
        files_path: str = "/files/",
        public_url: str = "",
        events: Events | None = None,
    ) -> None:
        if reactor is None:
            from twisted.internet import reactor
        super().__init__(path, files_path, public_url)
        self.max_size = max_size
        self._events = events
        self.clock: Any = reactor
        self._store = store
        self.lifetime = lifetime
        self._requests: dict[str, deque[Session]] = {}
        self._waiting: defaultdict[str, set[str]] = defaultdict(set)
        self._looking, self._sweeping = LoopingCall(self._look_who_waits), LoopingCall(self._sweep)
        self._looking.clock = self._sweeping.clock = self.clock

    def cause(self, request: Request) -> Cause:
        """What is told of a request, if anybody is told."""
        return NO_CAUSE if self._events is None else Cause.of(request)

    # Life

    def start(self) -> None:
        """Begin to look for uploads that have expired, and go on with concatenations that a restart has left."""
        self._sweeping.start(SWEEP_TIME)
        Deferred.fromCoroutine(self._look_at_concatenations()).addErrback(_failed)

    def stop(self) -> None:
        """The opposite of :meth:`start`."""
        for call in (self._looking, self._sweeping):
            if call.running:
                call.stop()

    # What requests ask for

    @asynccontextmanager
    async def begun(
        self,
        plan: Plan,
        visitor: Visitor = ANYBODY,
        cause: Cause = NO_CAUSE,
        changed: Callable[[Plan, Mapping[str, str]], Plan] | None = None,
    ) -> AsyncIterator[Session]:
        """Begin an upload, durably, and hold it.

        :param visitor: whose it is.
        :param cause: the request that wants it.
        :param changed: gives the plan for metadata that the application wants instead of the client's.
        :raises Refused: what the visitor may not; ``BODY_TOO_LARGE``, ``BAD_PARTS``, ``FOREIGN_PARTS``; what could not
            be named as it is planned, or has no space.
        """
        plan = plan.owned_by(visitor)
        if plan.length is not None and plan.length > min(self.max_size, plan.max_size):
            raise Refused(errors.BODY_TOO_LARGE)
        for part in plan.parts:
            await self._require_part(part, visitor)
        reporting = Reporting(self._events, cause)
        if (metadata := (await reporting.may_create(plan.told("", 0, plan.length, None))).metadata) is not None:
            plan = replace(changed(plan, metadata) if changed else plan, metadata=metadata).owned_by(visitor)
        name = plan.target or None
        stored = await self._store.begin_upload(record_of(plan), plan.length, self.lifetime, name, plan.check)
        session = Session(self, stored.id, visitor, reporting)
        session.hold(stored)
        self._requests[session.id] = deque([session])
        async with self._leaving(session):
            try:
                await reporting.created(session.told)
                await self._settle(session)
            except BaseException:
                await session.cancel()  # nobody knows its id
                raise
            yield session

    async def _require_part(self, id: str, visitor: Visitor) -> None:
        try:
            plan = plan_of(await self._store.look_at_upload(id))
        except Refused as refused:
            raise Refused(errors.BAD_PARTS) if refused.refusal is errors.UPLOAD_NOT_FOUND else refused from None
        if not plan.is_of(visitor):
            raise Refused(errors.FOREIGN_PARTS)
        if plan.role is not Role.PART:
            raise Refused(errors.BAD_PARTS)

    async def look(self, id: str, visitor: Visitor = ANYBODY) -> UploadState:
        """How an upload is; whoever holds it goes on.

        :raises Refused: ``UPLOAD_NOT_FOUND``, also for one of somebody else.
        """
        state = await self._store.look_at_upload(id)
        if not plan_of(state).is_of(visitor):
            raise Refused(errors.UPLOAD_NOT_FOUND)
        return state

    @asynccontextmanager
    async def opened(
        self, id: str, visitor: Visitor = ANYBODY, settle: bool = True, cause: Cause = NO_CAUSE
    ) -> AsyncIterator[Session]:
        """Hold an upload; whoever holds it is asked to leave.

        :param visitor: whose it has to be.
        :param settle: whether to do first what only waits for bytes that are there: to concatenate, to give a name.
        :param cause: the request that wants it.
        :raises Refused: ``UPLOAD_NOT_FOUND``; ``UPLOAD_TAKEN`` if another process doesn't let go.
        """
        if visitor is not ANYBODY:
            await self.look(id, visitor)
        session = Session(self, id, visitor, Reporting(self._events, cause))
        requests = self._requests.setdefault(id, deque())
        earlier = list(requests)
        requests.append(session)
        async with self._leaving(session):
            for one in earlier:
                one.leave()
            for one in earlier:
                await one.wait_for_release()
            if not session.is_held:
                session.hold(await self._open(id))
            if settle:
                await self._settle(session)
            yield session

    @asynccontextmanager
    async def _leaving(self, session: Session) -> AsyncIterator[None]:
        if not self._looking.running:
            self._looking.start(WANTED_TIME, now=False)
        try:
            yield
        finally:
            is_whole = session.is_held and session.state is State.WHOLE
            if session.is_gone:
                self._forget(session)
            requests = self._requests[session.id]
            try:
                behind = requests.index(session) + 1
                await session.release(requests[behind] if behind < len(requests) else None)
            finally:
                requests.remove(session)
                if not requests:
                    del self._requests[session.id]
            if is_whole:
                for waiting in self._waiting.pop(session.id, ()):
                    Deferred.fromCoroutine(self._look_again(waiting))

    def _forget(self, session: Session) -> None:
        """Nobody waits for an upload that is gone any more, nor does it wait for others."""
        self._waiting.pop(session.id, None)
        for part in session.plan.parts:
            if part in self._waiting:
                self._waiting[part].discard(session.id)
                if not self._waiting[part]:
                    del self._waiting[part]

    async def _open(self, id: str) -> StoredUpload:
        end = self.clock.seconds() + PATIENCE
        while (stored := await self._store.open_upload(id)) is None:
            if self.clock.seconds() > end:
                raise Refused(errors.UPLOAD_TAKEN)
            await deferLater(self.clock, ASK_AGAIN)
        return stored

    async def _settle(self, session: Session) -> None:
        """Do what only waits for bytes that are there: concatenate, and give a name."""
        if session.state is State.WAITING:
            await self._concatenate(session)
        # What a crash has kept from its name; whoever is refused it hears that when it asks to finish.
        if session.state is State.WHOLE and session.plan.ends_at_length and session.plan.role is not Role.PART:
            try:
                await session.finish()
            except Refused:
                if session.is_gone:
                    raise

    async def _concatenate(self, session: Session) -> None:
        """Append the parts, if all of them are whole."""
        parts = session.plan.parts
        for part in parts:  # before they are looked at: one may become whole meanwhile
            self._waiting[part].add(session.id)
        states = [await self._store.look_at_upload(part) for part in parts]
        lengths = [state.length for state in states]
        if None not in lengths:
            await session.announce_length(sum(cast(list[int], lengths)))
        if any(state.length is None or state.offset < state.length for state in states):
            return
        for part in parts:
            self._waiting[part].discard(session.id)
            async with self.opened(part) as opened:
                await session.stored.take_from(opened.stored)
        await session.stored.commit(memoryview(b""))

    async def _look_at_concatenations(self) -> None:
        for id in await self._store.list_with_parts():
            await self._look_again(id)

    async def _look_again(self, id: str) -> None:
        """Go on with a concatenation whose part has become whole."""
        try:
            async with self.opened(id):
                pass
        except Refused:
            pass  # it was cancelled, or waits for another part
        except Exception:
            _log.failure("a concatenation failed")

    def _look_who_waits(self) -> None:
        if not self._requests:
            self._looking.stop()
        # Who leaves may be gone before the next one is looked at.
        for session in [session for requests in self._requests.values() for session in requests]:
            if session.is_held and session.stored.is_wanted():
                session.leave()

    def _sweep(self) -> Deferred[int]:
        return Deferred.fromCoroutine(self._renew_and_sweep()).addErrback(_failed)

    async def _renew_and_sweep(self) -> int:
        for id in {waiting for all_waiting in self._waiting.values() for waiting in all_waiting}:
            # As long as its parts are there: one that is gone refuses it.
            with suppress(Refused):
                async with self.opened(id) as session:
                    await session.stored.keep(session.stored.state.record, session.length)
        return await self._store.sweep_uploads()


def _failed(reason: Failure) -> int:
    """What nobody asked for has failed; the store's refusals are told where it fails."""
    if not reason.check(Refused):
        _log.failure("a look at the uploads of the store failed", failure=reason)
    return 0
