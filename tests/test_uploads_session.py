"""Resumable uploads, whichever protocol speaks of them: over a store in memory, and over the one on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import shutil
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IConsumer
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from lwstwisted import errors
from lwstwisted.errors import BodyCut, BodyStopped, Refusal, Refused
from lwstwisted.interfaces import IRequestBody, Named, ResumableStore
from lwstwisted.stores.local import LocalStore
from lwstwisted.uploads import appending
from lwstwisted.uploads import session as module
from lwstwisted.uploads.appending import Proof
from lwstwisted.uploads.conditions import Conditions
from lwstwisted.uploads.plan import Plan, Role
from lwstwisted.uploads.session import Session, Sessions, State
from lwstwisted.uploads.transfer import WORTH_A_WRITE
from tests.contracts import get, names_in, put, refusal_of, sample
from tests.memory_store import Disk, MemoryStore
from tests.servers import PATIENCE
from tests.test_stores_local import LocalCase
from tests.test_stores_memory import MemoryCase

BIG = sample(3 * WORTH_A_WRITE + 5)


@implementer(IRequestBody)
class Body:
    """A body whose bytes come, and end, as a test says.

    :param length: announced, or None.
    """

    trailers: tuple[tuple[bytes, bytes], ...] = ()

    def __init__(self, length: int | None = None) -> None:
        self.length = length
        self.is_paused = False
        self.accepted: Deferred[None] = Deferred()
        self._consumer: Any = None
        self._over: Deferred[None] = Deferred()

    @classmethod
    def whole(cls, data: bytes) -> Body:
        """One that comes at once."""
        body = cls(len(data))
        body.accepted.addCallback(lambda _: body.feed(data) or body.end())
        return body

    @classmethod
    def cut_behind(cls, data: bytes) -> Body:
        """One whose client leaves behind some bytes."""
        body = cls()
        body.accepted.addCallback(lambda _: body.feed(data) or body.cut())
        return body

    def deliver_to(self, consumer: IConsumer) -> Deferred[None]:
        self._consumer = consumer
        consumer.registerProducer(self, True)
        self.accepted.callback(None)
        return self._over

    def feed(self, data: bytes) -> None:
        """Have bytes arrive."""
        assert not self._over.called
        self._consumer.write(data)

    def end(self) -> None:
        """It is whole."""
        if not self._over.called:
            self._consumer.unregisterProducer()
            self._over.callback(None)

    def cut(self) -> None:
        """Its client has left."""
        if not self._over.called:
            self._over.errback(BodyCut())

    def pauseProducing(self) -> None:
        self.is_paused = True

    def resumeProducing(self) -> None:
        self.is_paused = False

    def stopProducing(self) -> None:
        if not self._over.called:
            self._over.errback(BodyStopped())


async def begin(sessions: Sessions, plan: Plan, data: bytes = b"") -> str:
    """An upload that some bytes were sent to."""
    async with sessions.begun(plan) as session:
        if data:
            await session.append(Body.whole(data))
        return session.id


async def append(sessions: Sessions, id: str, body: Body, proof: Proof | None = None) -> int:
    """Send more bytes; the offset then."""
    async with sessions.opened(id) as session:
        await session.append(body, proof)
        return session.offset


async def finish(sessions: Sessions, id: str) -> Named:
    """Have it become a file."""
    async with sessions.opened(id) as session:
        return await session.finish()


async def cancel(sessions: Sessions, id: str) -> None:
    """Remove it."""
    async with sessions.opened(id, settle=False) as session:
        await session.cancel()


async def head(sessions: Sessions, id: str) -> tuple[State, int]:
    """What HEAD tells of it."""
    async with sessions.opened(id) as session:
        return session.state, session.offset


def proof_of(data: bytes) -> Proof:
    """A checksum of what a request sends."""
    return Proof(lambda: {"sha1": hashlib.sha1(data).digest()}, errors.CHECKSUM_MISMATCH)


def running(work: Coroutine[Any, Any, Any]) -> Deferred[Any]:
    """Begin a request that will end some time."""
    return Deferred.fromCoroutine(work)


PART = Plan((), role=Role.PART)


class SessionTests:
    """What holds over each store."""

    timeout = PATIENCE
    make_store: Callable[..., ResumableStore]
    addCleanup: Callable[..., None]
    patch: Callable[..., object]

    def make_sessions(self, store: ResumableStore | None = None, **options: Any) -> Sessions:
        sessions = Sessions(self.make_store() if store is None else store, **options)
        self.addCleanup(sessions.stop)
        return sessions

    # The table of states

    async def test_states(self) -> None:
        """OPEN takes bytes, WHOLE none, NAMED refuses them and tells the same again; each may be cancelled."""
        store = self.make_store()
        sessions = self.make_sessions(store)
        plan = Plan(("folder", "file"), 5, ends_at_length=False)
        id = await begin(sessions, plan, b"12")
        assert await head(sessions, id) == (State.OPEN, 2)
        assert await append(sessions, id, Body.whole(b"345")) == 5
        assert await head(sessions, id) == (State.WHOLE, 5)
        assert await append(sessions, id, Body.whole(b"")) == 5
        assert await refusal_of(append(sessions, id, Body.whole(b"6"))) is errors.UPLOAD_OVERRUN
        assert await names_in(store) == []
        named = await finish(sessions, id)
        assert named.created is True
        assert await head(sessions, id) == (State.NAMED, 5)
        assert await finish(sessions, id) == named
        assert await refusal_of(append(sessions, id, Body.whole(b""))) is errors.UPLOAD_FINISHED
        await cancel(sessions, id)
        assert await get(store, ("folder", "file")) == b"12345"
        for state_of, data in ((State.OPEN, b"1"), (State.WHOLE, b"12345")):
            id = await begin(sessions, plan, data)
            assert (await head(sessions, id))[0] is state_of
            await cancel(sessions, id)
            assert await refusal_of(head(sessions, id)) is errors.UPLOAD_NOT_FOUND
        assert await store.list_uploads() == []

    async def test_ends_at_length(self) -> None:
        """What only waits for its name gets it from whoever asks next; also one of no bytes, from the first request."""
        store = self.make_store()
        sessions = self.make_sessions(store)
        id = await begin(sessions, Plan(("file",), 3), b"123")
        assert await head(sessions, id) == (State.NAMED, 3)
        id = await begin(sessions, Plan(("empty",), 0))
        assert await head(sessions, id) == (State.NAMED, 0)
        id = await begin(sessions, Plan(("later",)), b"123")
        assert await head(sessions, id) == (State.OPEN, 3)
        async with sessions.opened(id) as session:
            assert await refusal_of(session.announce_length(2)) is errors.LENGTH_MISMATCH
            await session.announce_length(3)
            await session.announce_length(3)
            assert await refusal_of(session.announce_length(4)) is errors.LENGTH_MISMATCH
        assert await head(sessions, id) == (State.NAMED, 3)
        assert await names_in(store) == ["empty", "file", "later"]

    async def test_conditions_hold_at_the_end(self) -> None:
        """If-None-Match of the first request keeps the last one from a file that came meanwhile; nothing is lost."""
        store = self.make_store()
        sessions = self.make_sessions(store)
        id = await begin(sessions, Plan(("file",), 3, Conditions({"if-none-match": "*"})), b"12")
        await put(store, ("file",), b"other")
        assert await append(sessions, id, Body.whole(b"3")) == 3
        assert await head(sessions, id) == (State.WHOLE, 3)
        assert await refusal_of(finish(sessions, id)) is errors.PRECONDITION_FAILED
        await store.delete(("file",))
        assert (await finish(sessions, id)).created is True

    async def test_digest_of_the_file(self) -> None:
        """Bytes that are not what the first request announced become nothing: the upload is gone."""
        store = self.make_store()
        sessions = self.make_sessions(store)
        right = {"sha256": hashlib.sha256(b"123").digest()}
        id = await begin(sessions, Plan(("file",), 3, digests=right), b"12")
        assert await append(sessions, id, Body.whole(b"4")) == 3
        assert await refusal_of(finish(sessions, id)) is errors.DIGEST_MISMATCH
        assert await refusal_of(head(sessions, id)) is errors.UPLOAD_NOT_FOUND
        assert (await names_in(store), await store.list_uploads()) == ([], [])
        id = await begin(sessions, Plan(("file",), 3, digests=right), b"123")
        assert (await finish(sessions, id)).created is True

    # The newest request

    async def test_newest_wins(self) -> None:
        """A request under way leaves; what it brought is durable; the newcomer has the true offset and goes on."""
        store = self.make_store()
        sessions = self.make_sessions(store)
        id = await begin(sessions, Plan(("file",), len(BIG) + 4))
        old = Body()
        leaving = running(append(sessions, id, old))
        await old.accepted
        old.feed(BIG)
        assert await append(sessions, id, Body.whole(b"then")) == len(BIG) + 4
        assert await refusal_of(leaving) is errors.UPLOAD_TAKEN
        await finish(sessions, id)
        assert await get(store, ("file",)) == BIG + b"then"

    async def test_three_in_a_row(self) -> None:
        """Of three requests the last one has it, whatever the others waited for; nobody's bytes are lost or doubled."""
        store = self.make_store()
        sessions = self.make_sessions(store)
        id = await begin(sessions, Plan(("file",)), b"0")
        bodies = [Body() for _ in range(3)]
        requests = []
        for number, body in enumerate(bodies):
            requests.append(running(append(sessions, id, body)))
            if number == 0:
                await body.accepted
                body.feed(b"1")
        await bodies[2].accepted
        bodies[2].feed(b"2")
        bodies[2].end()
        assert await refusal_of(requests[0]) is errors.UPLOAD_TAKEN
        assert await refusal_of(requests[1]) is errors.UPLOAD_TAKEN
        assert await requests[2] == 3
        async with sessions.opened(id) as session:
            await session.announce_length(3)
            await session.finish()
        assert await get(store, ("file",)) == b"012"

    async def test_heads_at_once(self) -> None:
        """Requests that only ask all get an answer."""
        sessions = self.make_sessions()
        id = await begin(sessions, Plan(("file",), 9), b"123")
        asked = [running(head(sessions, id)) for _ in range(5)]
        assert [await one for one in asked] == [(State.OPEN, 3)] * 5

    async def test_cancelled_while_it_comes(self) -> None:
        """DELETE wins against an upload under way."""
        store = self.make_store()
        sessions = self.make_sessions(store)
        id = await begin(sessions, Plan(("file",), 9))
        body = Body()
        leaving = running(append(sessions, id, body))
        await body.accepted
        body.feed(b"123")
        asking = [running(cancel(sessions, id)), running(head(sessions, id))]
        assert await refusal_of(leaving) is errors.UPLOAD_TAKEN
        await asking[0]
        assert await refusal_of(asking[1]) is errors.UPLOAD_NOT_FOUND
        assert await store.list_uploads() == []

    async def test_another_process_wants_it(self) -> None:
        """The same between two services on one root."""
        here, there = self.make_sessions(), self.make_sessions()
        id = await begin(here, Plan(("file",), 9))
        body = Body()
        leaving = running(append(here, id, body))
        await body.accepted
        body.feed(b"123")
        assert await head(there, id) == (State.OPEN, 3)
        assert await refusal_of(leaving) is errors.UPLOAD_TAKEN

    async def test_a_process_that_keeps_it(self) -> None:
        """Who gets nothing from another process gives up some time, and says so."""
        store, clock = self.make_store(), Clock()
        sessions = self.make_sessions(reactor=clock)
        id = await begin(sessions, Plan(("file",), 9))
        kept = await store.open_upload(id)
        assert kept is not None
        asking = running(head(sessions, id))
        for _ in range(round(module.PATIENCE / module.ASK_AGAIN) + 5):
            await store.look_at_upload(id)  # a turn of the threads, in which the request asks
            clock.advance(module.ASK_AGAIN)
        assert await refusal_of(asking) is errors.UPLOAD_TAKEN
        await kept.release()
        assert await head(sessions, id) == (State.OPEN, 0)

    # Bodies

    async def test_cut(self) -> None:
        """A client that left finds again what had arrived, down to the last byte."""
        sessions = self.make_sessions()
        id = await begin(sessions, Plan(("file",), 10 * len(BIG)))
        offset = 0
        for data in (b"1", BIG, BIG[:WORTH_A_WRITE], b""):
            with contextlib.suppress(BodyCut):
                await append(sessions, id, Body.cut_behind(data))
                raise AssertionError("it was whole")
            offset += len(data)
            assert await head(sessions, id) == (State.OPEN, offset)

    async def test_proof(self) -> None:
        """Bytes with a checksum count all together or not at all."""
        store = self.make_store()
        sessions = self.make_sessions(store)
        id = await begin(sessions, Plan(("file",), 2 + len(BIG)), b"1")
        for data in (b"2", BIG):
            with contextlib.suppress(BodyCut):
                await append(sessions, id, Body.cut_behind(data), proof_of(data))
                raise AssertionError("it was whole")
            wrong = append(sessions, id, Body.whole(data), proof_of(b"other"))
            assert await refusal_of(wrong) is errors.CHECKSUM_MISMATCH
            assert await head(sessions, id) == (State.OPEN, 1)
        assert await append(sessions, id, Body.whole(b"2"), proof_of(b"2")) == 2
        body = Body()
        leaving = running(append(sessions, id, body, proof_of(BIG)))
        await body.accepted
        body.feed(BIG)
        assert await append(sessions, id, Body.whole(BIG), proof_of(BIG)) == 2 + len(BIG)
        assert await refusal_of(leaving) is errors.UPLOAD_TAKEN
        await finish(sessions, id)
        assert await get(store, ("file",)) == b"12" + BIG

    async def test_overrun(self) -> None:
        """A body that is longer than was announced is refused, before it comes where its length is known."""
        sessions = self.make_sessions(max_size=len(BIG))
        for length, refusal in ((10, errors.UPLOAD_OVERRUN), (None, errors.BODY_TOO_LARGE)):
            id = await begin(sessions, Plan(("file",), length), b"12")
            body = Body(len(BIG))
            assert await refusal_of(append(sessions, id, body)) is refusal
            assert not body.accepted.called
            body = Body()
            sending = running(append(sessions, id, body))
            await body.accepted
            body.feed(b"345")
            body.feed(BIG)
            assert await refusal_of(sending) is refusal
            assert await head(sessions, id) == (State.OPEN, 5)
        assert await refusal_of(begin(sessions, Plan(("file",), len(BIG) + 1))) is errors.BODY_TOO_LARGE

    async def test_checkpoints(self) -> None:
        """A long upload is made durable as it goes, after so many bytes or seconds, and its client hears of that."""
        self.patch(appending, "CHECKPOINT", 2 * WORTH_A_WRITE)
        block = BIG[:WORTH_A_WRITE]
        for seconds, blocks in ((0.0, 8), (appending.CHECKPOINT_TIME, 4)):
            clock, offsets = Clock(), []
            sessions = self.make_sessions(reactor=clock)
            async with sessions.begun(Plan(("file",), None)) as session:
                body = Body()
                sending = running(session.append(body, None, offsets.append))
                await body.accepted
                for number in range(blocks):
                    clock.advance(seconds)
                    body.feed(block)
                    # The body goes on when this one is written, and what is due then is durable.
                    is_due = seconds > 0 or number % 2 == 1
                    await self.settled(session, offsets, (number + 1) * len(block) if is_due else None)
                body.end()
                await sending
                assert session.offset == blocks * len(block)
            step = 1 if seconds else 2
            assert offsets == [len(block) * at for at in range(step, blocks + 1, step)]

    async def test_checkpoints_of_a_slow_client(self) -> None:
        """However little comes, it is durable, and its client told so, when the oldest of it is five seconds old."""
        clock, offsets = Clock(), list[int]()
        sessions = self.make_sessions(reactor=clock)
        async with sessions.begun(Plan(("file",), None)) as session:
            body = Body()
            sending = running(session.append(body, None, offsets.append))
            await body.accepted
            for second in range(1, 15):
                if second != 7:
                    body.feed(b"x")
                clock.advance(1)
                # One came in each second but the seventh.
                due = {5: 5, 10: 9}.get(second)
                await self.settled(session, offsets, due)
            clock.advance(1)
            await self.settled(session, offsets, 13)
            for _ in range(3):  # nothing new, nothing to do
                clock.advance(appending.CHECKPOINT_TIME)
                await self.settled(session, offsets, None)
            assert offsets == [5, 9, 13]
            body.feed(b"end")
            body.end()
            await sending
            assert session.offset == 16
            assert [call for call in clock.getDelayedCalls() if "Appending" in str(call.func)] == []

    async def test_half_of_it_twice(self) -> None:
        """A body that ends when as much of it is durable as is missing of the upload is not the end of that."""
        for plan, is_last in ((Plan(("file",), 10), False), (Plan(("file",), 10, ends_at_length=False), True)):
            clock, offsets, store = Clock(), list[int](), self.make_store()
            async with self.make_sessions(store, reactor=clock).begun(plan) as session:
                body = Body()
                sending = running(session.append(body, None, offsets.append, is_last))
                await body.accepted
                body.feed(b"1234")
                clock.advance(appending.CHECKPOINT_TIME)
                await self.settled(session, offsets, 4)
                body.feed(b"56")
                body.end()
                await sending
                assert (session.offset, session.state) == (6, State.OPEN)
                await session.append(Body.whole(b"7890"), None, None, is_last)
                assert session.named is not None
            assert await get(store, ("file",)) == b"1234567890"

    async def test_newer_request_ends_a_repetition(self) -> None:
        """Also one that only repeats its last word, and never ends it."""
        sessions = self.make_sessions()
        id = await begin(sessions, Plan(("file",), 3), b"123")
        async with sessions.opened(id) as session:
            newer = running(self.offset_of(sessions, id))
            assert await refusal_of(session.require_nothing(Body())) is errors.UPLOAD_TAKEN
        assert await newer == 3

    async def offset_of(self, sessions: Sessions, id: str) -> int:
        async with sessions.opened(id) as session:
            return session.offset

    async def test_no_time_with_a_proof(self) -> None:
        """Bytes that have to be proved wait for their end, however long that takes."""
        clock, offsets = Clock(), list[int]()
        sessions = self.make_sessions(reactor=clock)
        async with sessions.begun(Plan(("file",), None)) as session:
            body = Body()
            sending = running(session.append(body, proof_of(b"12"), offsets.append))
            await body.accepted
            for data in (b"1", b"2"):
                body.feed(data)
                clock.advance(2 * appending.CHECKPOINT_TIME)
                await self.settled(session, offsets, None)
            body.end()
            await sending
            assert (offsets, session.offset) == ([], 2)

    async def test_last_bytes_and_name(self) -> None:
        """With its last bytes an upload becomes a file, as soon as its length is known or its client says so; what is
        against that is told when it is asked for."""
        store = self.make_store()
        sessions = self.make_sessions(store)
        for length, ends, is_last, state in (
            (3, True, False, State.NAMED),
            (3, False, True, State.NAMED),
            (None, False, True, State.NAMED),
            (3, False, False, State.WHOLE),
            (None, True, False, State.OPEN),
            (4, False, True, State.OPEN),
        ):
            case = (length, ends, is_last)
            async with sessions.begun(Plan((f"{case}",), length, ends_at_length=ends)) as session:
                await session.append(Body.whole(b"123"), None, None, is_last)
                assert (session.state, session.offset) == (state, 3), case
            assert (f"{case}" in await names_in(store)) is (state is State.NAMED), case
        part = Plan((), 3, role=Role.PART)
        async with sessions.begun(part) as session:
            await session.append(Body.whole(b"123"), None, None, True)
            assert session.state is State.WHOLE
        await put(store, ("file",), b"other")
        async with sessions.begun(Plan(("new",), 3, digests={"sha256": bytes(32)})) as session:
            await session.append(Body.whole(b"123"), proof_of(b"123"))
            assert (session.state, session.offset) == (State.WHOLE, 3)
            assert await refusal_of(session.finish()) is errors.DIGEST_MISMATCH
            assert session.is_gone

    async def test_end_of_a_body_that_is_cut(self) -> None:
        """All bytes of a chunked body without its end are no file before somebody asks: more of them may have come."""
        store = self.make_store()
        sessions = self.make_sessions(store)
        id = await begin(sessions, Plan(("file",), None, ends_at_length=False))
        async with sessions.opened(id) as session:
            with contextlib.suppress(BodyCut):
                await session.append(Body.cut_behind(b"123"), None, None, True)
                raise AssertionError("it was whole")
            assert (session.state, session.length, session.offset) == (State.OPEN, None, 3)

    async def test_nothing_is_repeated(self) -> None:
        """Whether a body whose length nobody tells has any bytes is known with the first one, and none is kept."""
        store = self.make_store()
        sessions = self.make_sessions(store)
        id = await begin(sessions, Plan(("file",), 3), b"123")
        async with sessions.opened(id) as session:
            for body in (Body.whole(b""), Body()):
                asking = running(session.require_nothing(body))
                body.end()
                await asking
            assert await refusal_of(session.require_nothing(Body(1))) is errors.UPLOAD_FINISHED
            body = Body()
            asking = running(session.require_nothing(body))
            body.feed(b"4")
            assert await refusal_of(asking) is errors.UPLOAD_FINISHED
            assert body._over.called
            with contextlib.suppress(BodyCut):
                await session.require_nothing(Body.cut_behind(b""))
                raise AssertionError("it was whole")
        assert await get(store, ("file",)) == b"123"

    async def settled(self, session: Session, offsets: list[int], offset: int | None) -> None:
        """Wait until what came is written, and told to be durable where that is due."""
        end = time.monotonic() + PATIENCE
        transfer = session._transfer
        while transfer is None or transfer._is_writing or (offset is not None and offsets[-1:] != [offset]):
            assert time.monotonic() < end, (offsets, offset)
            await session._sessions._store.list_uploads()  # a turn of the threads

    async def test_no_checkpoint_with_a_proof(self) -> None:
        """Bytes that have to be proved are not told to be durable before."""
        self.patch(appending, "CHECKPOINT", WORTH_A_WRITE)
        sessions = self.make_sessions()
        offsets: list[int] = []
        async with sessions.begun(Plan(("file",), None)) as session:
            await session.append(Body.whole(BIG), proof_of(BIG), offsets.append)
            assert (offsets, session.offset) == ([], len(BIG))

    # Parts

    async def test_concatenation(self) -> None:
        """Parts become a file, in their order, one of them twice; they stay what they are."""
        store = self.make_store()
        sessions = self.make_sessions(store)
        one = await begin(sessions, Plan((), 4, role=Role.PART), b"one,")
        two = await begin(sessions, Plan((), len(BIG), role=Role.PART), BIG)
        parts = (one, two, one)
        id = await begin(sessions, Plan(("file",), role=Role.CONCATENATION, parts=parts))
        assert await head(sessions, id) == (State.NAMED, 8 + len(BIG))
        assert await get(store, ("file",)) == b"one," + BIG + b"one,"
        assert await head(sessions, one) == (State.WHOLE, 4)
        assert await refusal_of(append(sessions, id, Body.whole(b"x"))) is errors.UPLOAD_FINISHED

    async def test_unfinished_parts(self) -> None:
        """It becomes a file by itself, as soon as its last part is whole; nothing is appended to it before."""
        store = self.make_store()
        sessions = self.make_sessions(store)
        one = await begin(sessions, Plan((), 4, role=Role.PART), b"on")
        two = await begin(sessions, PART, b"two")
        id = await begin(sessions, Plan(("file",), role=Role.CONCATENATION, parts=(two, one)))
        assert await head(sessions, id) == (State.WAITING, 0)
        assert await refusal_of(append(sessions, id, Body.whole(b"x"))) is errors.CONCATENATED
        await append(sessions, one, Body.whole(b"e,"))
        assert await head(sessions, id) == (State.WAITING, 0)
        async with sessions.opened(two) as session:
            await session.announce_length(3)
        end = time.monotonic() + PATIENCE
        while (await store.look_at_upload(id)).named is None:
            assert time.monotonic() < end
        assert await get(store, ("file",)) == b"twoone,"

    async def test_waiting_for_parts_that_grow(self) -> None:
        """It doesn't expire before its parts; nobody is waited for who is gone."""
        clock, store = Clock(), self.make_store()
        sessions = self.make_sessions(store, reactor=clock)
        part = await begin(sessions, Plan((), 4, role=Role.PART), b"on")
        id = await begin(sessions, Plan(("file",), role=Role.CONCATENATION, parts=(part,)))
        before = (await store.look_at_upload(id)).expires
        sessions.start()
        end = time.monotonic() + PATIENCE
        while (await store.look_at_upload(id)).expires == before:
            clock.advance(module.SWEEP_TIME)
            assert time.monotonic() < end
        await cancel(sessions, part)
        await cancel(sessions, id)
        assert not sessions._waiting

    async def test_bad_parts(self) -> None:
        """What isn't there, or is no part, can't be one; nothing is left of the attempt."""
        store = self.make_store()
        sessions = self.make_sessions(store, max_size=10)
        part = await begin(sessions, Plan((), 4, role=Role.PART), b"part")
        file = await begin(sessions, Plan(("file",), 4), b"123")
        both = await begin(sessions, Plan(("both",), role=Role.CONCATENATION, parts=(part, part)))
        before = await store.list_uploads()
        for other, refusal in (
            ("0" * 32, errors.BAD_PARTS),
            ("no id", errors.BAD_PARTS),
            (file, errors.BAD_PARTS),
            (both, errors.BAD_PARTS),
            (part, errors.BODY_TOO_LARGE),
        ):
            plan = Plan(("new",), role=Role.CONCATENATION, parts=(part, part, other))
            assert await refusal_of(begin(sessions, plan)) is refusal
            assert await store.list_uploads() == before

    async def test_part_that_went(self) -> None:
        """A concatenation whose part was cancelled is of no use, and may be cancelled as well."""
        store = self.make_store()
        sessions = self.make_sessions(store)
        part = await begin(sessions, Plan((), 4, role=Role.PART), b"1")
        id = await begin(sessions, Plan(("file",), role=Role.CONCATENATION, parts=(part,)))
        await cancel(sessions, part)
        assert await refusal_of(head(sessions, id)) is errors.UPLOAD_NOT_FOUND
        await cancel(sessions, id)
        assert await store.list_uploads() == []

    # Time

    async def test_expiry(self) -> None:
        """The service looks by itself for what has expired, and leaves alone what somebody holds."""
        store, clock = self.make_store(), Clock()
        sessions = self.make_sessions(store, lifetime=-1.0, reactor=clock)
        young = await begin(self.make_sessions(store), Plan(("young",)), b"x")
        await begin(sessions, Plan(("file",)), b"x")
        async with sessions.begun(Plan(("held",))) as session:
            sessions.start()
            clock.advance(module.SWEEP_TIME)
            end = time.monotonic() + PATIENCE
            while len(left := await store.list_uploads()) > 2:
                assert time.monotonic() < end
            assert sorted(left) == sorted([young, session.id])


class MemorySessionTests(MemoryCase, SessionTests):
    """Over the store in memory, which fails and waits as it is told."""

    async def test_failed_checkpoint(self) -> None:
        """A checkpoint that fails ends the request with that; what was durable before stays, nothing else counts."""
        self.patch(appending, "CHECKPOINT", WORTH_A_WRITE)

        async def fail(call: str) -> None:
            if call == "sync":
                raise Refused(errors.STORE_FAILED)

        store = self.make_store()
        sessions = self.make_sessions(store)
        id = await begin(sessions, Plan(("file",), 10 * len(BIG)), b"1")
        body = Body()
        offsets: list[int] = []
        async with sessions.opened(id) as session:
            store.hook = fail
            sending = running(session.append(body, None, offsets.append))
            for _ in range(3):
                body.feed(BIG[:WORTH_A_WRITE]) if not body._over.called else None
            assert await refusal_of(sending) is errors.STORE_FAILED
            assert (session.offset, offsets) == (1, [])
        assert await head(sessions, id) == (State.OPEN, 1)

    async def test_refused_once(self) -> None:
        """What the last bytes were refused with is told as it was, and not tried once more; a later request tries."""
        names = 0

        async def count(call: str) -> None:
            nonlocal names
            names += call == "name_it"

        sessions = self.make_sessions(self.make_store(before=count))
        plan = Plan(("file",), 3, digests={"sha256": bytes(32)})
        async with sessions.begun(plan) as session:
            await session.append(Body.whole(b"123"))
            assert await refusal_of(session.finish()) is errors.DIGEST_MISMATCH
        assert names == 1

    async def test_failed_write(self) -> None:
        """A disk that fills up in the middle: what was written counts, and the answer says why."""
        writes = 0

        async def fail(call: str) -> None:
            nonlocal writes
            writes += call == "append"
            if call == "append" and writes == 2:
                raise Refused(errors.DISK_FULL)

        store = self.make_store(before=fail)
        sessions = self.make_sessions(store)
        id = await begin(sessions, Plan(("file",), 10 * len(BIG)))
        body = Body()
        sending = running(append(sessions, id, body))
        body.feed(BIG[:WORTH_A_WRITE])
        body.feed(BIG[:WORTH_A_WRITE])
        assert await refusal_of(sending) is errors.DISK_FULL
        assert await head(sessions, id) == (State.OPEN, WORTH_A_WRITE)

    async def test_checkpoint_under_way_at_the_end(self) -> None:
        """A request that ends, or leaves, while a checkpoint is under way waits for that, and loses nothing."""
        self.patch(appending, "CHECKPOINT", WORTH_A_WRITE)
        for is_cut in (False, True):
            syncing: Deferred[None] = Deferred()
            waiting = [syncing]

            async def wait(call: str) -> None:
                if call == "sync" and waiting:  # noqa: B023
                    await waiting.pop()  # noqa: B023

            sessions = self.make_sessions(self.make_store(before=wait))
            id = await begin(sessions, Plan(("file",)))
            body = Body()
            sending = running(append(sessions, id, body))
            body.feed(BIG[:WORTH_A_WRITE])
            body.feed(b"end")
            body.cut() if is_cut else body.end()
            asking = running(head(sessions, id))
            assert not sending.called and not asking.called
            syncing.callback(None)
            with contextlib.suppress(BodyCut):
                await sending
            assert await asking == (State.OPEN, WORTH_A_WRITE + 3)


class LocalSessionTests(LocalCase, SessionTests):
    """Over the store on disk."""

    async def test_heirs(self) -> None:
        """Requests that wait for one that holds an upload get it from that: it is opened once."""
        store = self.make_store()
        sessions = self.make_sessions(store)
        id, opened, open_upload = await begin(sessions, Plan(("file",), 9)), [], store.open_upload

        def counting(id: str) -> Any:
            opened.append(id)
            return open_upload(id)

        self.patch(store, "open_upload", counting)
        body = Body()
        leaving = running(append(sessions, id, body))
        await body.accepted
        body.feed(b"123")
        asked = [running(head(sessions, id)) for _ in range(3)]
        assert [await one for one in asked] == [(State.OPEN, 3)] * 3
        assert await refusal_of(leaving) is errors.UPLOAD_TAKEN
        assert opened == [id]
        assert await head(sessions, id) == (State.OPEN, 3)
        await cancel(sessions, id)
        assert await store.list_uploads() == []


class Turns:
    """A reactor that only brings back what threads have done."""

    def __init__(self) -> None:
        self.clock = Clock()
        self._calls: queue.Queue[tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]]] = queue.Queue()

    def callFromThread(self, call: Callable[..., object], *arguments: Any, **keywords: Any) -> None:
        self._calls.put((call, arguments, keywords))

    def run(self, work: Coroutine[Any, Any, Any], is_busy: Callable[[], bool] = bool) -> Any:
        """Run a coroutine to its end, and what it has begun as well."""
        outcome: list[Any] = []
        Deferred.fromCoroutine(work).addBoth(outcome.append)
        idle = 0
        while not outcome or is_busy():
            try:
                call, arguments, keywords = self._calls.get(timeout=0.05)
                call(*arguments, **keywords)
            except queue.Empty:
                idle += 1
                assert idle < 200, "a request hangs"
                self.clock.advance(module.ASK_AGAIN)
        if hasattr(outcome[0], "raiseException"):
            outcome[0].raiseException()
        return outcome[0]


@dataclass
class Known:
    """What a client may know of an upload."""

    id: str
    length: int | None
    role: Role
    name: str
    is_mortal: bool
    data: bytes = b""
    parts: list[Known] = field(default_factory=list)
    is_gone: bool = False

    @property
    def is_whole(self) -> bool:
        return len(self.data) == self.length

    @property
    def is_named(self) -> bool:
        return self.is_whole and self.role is not Role.PART


class Uploads(RuleBasedStateMachine):
    """Clients that do what they like; after each step server and model agree."""

    make_store: Callable[[Uploads], ResumableStore]

    def __init__(self) -> None:
        super().__init__()
        self.known: list[Known] = []
        self.count = 0
        self.turns = Turns()
        self.root = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.disk = Disk()
        self.start()

    @rule()
    def restart(self) -> None:
        self.stop()
        self.start()

    def start(self) -> None:
        self.store = type(self).make_store(self)
        self.sessions = Sessions(self.store, reactor=self.turns.clock)

    def is_busy(self) -> bool:
        """Whether threads have something to do."""
        store = self.store
        return isinstance(store, LocalStore) and store._threads._under_way + store._readers._under_way > 0

    def stop(self) -> None:
        self.sessions.stop()
        self.turns.run(self.store.stop())

    def teardown(self) -> None:
        self.stop()
        shutil.rmtree(self.root)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The outcome of a request: a result, or what it was refused with."""
        try:
            return self.turns.run(work, self.is_busy)
        except Refused as refused:
            return refused.refusal
        except BodyCut:
            return BodyCut

    def begin(self, plan: Plan, is_mortal: bool, parts: list[Known] | None = None) -> Known | Refusal:
        self.count += 1
        self.sessions.lifetime = -1.0 if is_mortal else 1000.0
        outcome = self.run(begin(self.sessions, plan))
        if isinstance(outcome, Refusal):
            return outcome
        self.known.append(Known(outcome, plan.length, plan.role, f"{self.count}", is_mortal, parts=parts or []))
        return self.known[-1]

    @rule(length=st.none() | st.integers(0, 40), is_part=st.booleans(), is_mortal=st.booleans())
    def create(self, length: int | None, is_part: bool, is_mortal: bool) -> None:
        target = () if is_part else (f"{self.count + 1}",)
        assert isinstance(self.begin(Plan(target, length, role=Role.PART if is_part else Role.FILE), is_mortal), Known)
        self.agree()

    @precondition(lambda self: self.known)
    @rule(data=st.data(), how=st.sampled_from(["whole", "cut", "proved", "disproved"]), size=st.integers(0, 30))
    def append(self, data: st.DataObject, how: str, size: int) -> None:
        upload = data.draw(st.sampled_from(self.known))
        content = os.urandom(size)
        body = Body.cut_behind(content) if how == "cut" else Body.whole(content)
        proof = proof_of(content if how == "proved" else b"other") if "proved" in how else None
        outcome = self.run(append(self.sessions, upload.id, body, proof))
        if upload.is_gone:
            assert outcome is errors.UPLOAD_NOT_FOUND
        elif upload.is_named:
            assert outcome is errors.UPLOAD_FINISHED
        elif upload.role is Role.CONCATENATION:
            assert outcome in (errors.CONCATENATED, errors.UPLOAD_NOT_FOUND)
        elif upload.length is not None and len(upload.data) + size > upload.length:
            assert outcome is errors.UPLOAD_OVERRUN
        elif how == "disproved":
            assert outcome is errors.CHECKSUM_MISMATCH
        else:
            upload.data += content
            assert outcome is BodyCut if how == "cut" else outcome == len(upload.data)
        self.agree()

    @precondition(lambda self: self.known)
    @rule(data=st.data(), more=st.integers(0, 10))
    def announce(self, data: st.DataObject, more: int) -> None:
        upload = data.draw(st.sampled_from(self.known))
        if upload.length is None and upload.role is not Role.CONCATENATION and not upload.is_gone:
            upload.length = len(upload.data) + more

            async def announce() -> None:
                async with self.sessions.opened(upload.id) as session:
                    await session.announce_length(len(upload.data) + more)

            assert self.run(announce()) is None
        self.agree()

    @precondition(lambda self: self.known)
    @rule(data=st.data(), is_mortal=st.booleans())
    def concatenate(self, data: st.DataObject, is_mortal: bool) -> None:
        parts = data.draw(st.lists(st.sampled_from(self.known), min_size=1, max_size=3))
        plan = Plan((f"{self.count + 1}",), role=Role.CONCATENATION, parts=tuple(part.id for part in parts))
        made = self.begin(plan, is_mortal, parts)
        if any(part.is_gone or part.role is not Role.PART for part in parts):
            assert made is errors.BAD_PARTS
        else:
            assert isinstance(made, Known)
        self.agree()

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        upload = data.draw(st.sampled_from(self.known))
        outcome = self.run(cancel(self.sessions, upload.id))
        assert outcome is (errors.UPLOAD_NOT_FOUND if upload.is_gone else None)
        self.agree_on_concatenations()
        upload.is_gone = True
        self.agree()

    @rule()
    def expire(self) -> None:
        self.run(self.store.sweep_uploads())
        for upload in self.known:
            upload.is_gone = upload.is_gone or upload.is_mortal
        self.agree()

    def agree_on_concatenations(self) -> None:
        """What was concatenated is so, once all parts are whole at one time."""
        for upload in self.known:
            parts = upload.parts
            if parts and not upload.is_gone and not any(part.is_gone or not part.is_whole for part in parts):
                upload.data = b"".join(part.data for part in parts)
                upload.length = len(upload.data)

    def agree(self) -> None:
        """Ask for each upload, and read each file."""
        self.agree_on_concatenations()
        for upload in self.known:
            outcome = self.run(head(self.sessions, upload.id))
            is_useless = bool(upload.parts) and not upload.is_named and any(part.is_gone for part in upload.parts)
            if upload.is_gone or is_useless:
                assert outcome is errors.UPLOAD_NOT_FOUND
                continue
            state, offset = outcome
            assert offset == len(upload.data)
            assert (state in (State.WHOLE, State.NAMED)) == upload.is_whole
            assert (state is State.NAMED) == upload.is_named
            if upload.is_named:
                assert self.run(get(self.store, (upload.name,))) == upload.data


class OnDisk(Uploads):
    """The real store."""

    def make_store(self) -> ResumableStore:
        return LocalStore(self.root, self.turns, durability="none")  # type: ignore[arg-type]


class InMemory(Uploads):
    """The fake."""

    def make_store(self) -> ResumableStore:
        return MemoryStore(self.disk)


class AgreementTests(SynchronousTestCase):
    """Hypothesis makes the clients."""

    def play(self, machine: type[Uploads], examples: int, steps: int) -> None:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )

    def test_in_memory(self) -> None:
        """Whatever clients do, in whatever order, offsets and files are what they should be."""
        self.play(InMemory, 15, 20)

    def test_on_disk(self) -> None:
        """The same on disk."""
        self.play(OnDisk, 6, 12)

    @pytest.mark.slow
    def test_longer(self) -> None:
        """The same with more clients."""
        for machine in (InMemory, OnDisk):
            self.play(machine, 100, 30)


