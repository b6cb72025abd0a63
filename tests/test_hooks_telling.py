"""Asking and telling, without a network: a sender in memory, notes on a real disk, files that are there or not."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from lwstwisted.errors import Refused
from lwstwisted.hooks.events import NO_CAUSE, Upload
from lwstwisted.hooks.names import Hook
from lwstwisted.hooks.senders import Unfit, Unreachable
from lwstwisted.hooks.telling import Telling
from lwstwisted.stores.tree import found_of
from tests.test_hooks_senders import deferred


class Sender:
    """Keeps what is sent.

    :ivar answers: by hook; an exception is raised.
    :ivar gates: what a hook waits for.
    """

    def __init__(self) -> None:
        self.sent: list[tuple[Hook, int]] = []
        self.answers: dict[Hook, bytes | Exception] = {}
        self.gates: dict[Hook, Deferred[None]] = {}

    def wants(self, hook: Hook) -> bool:
        return True

    async def send(self, hook: Hook, message: str, is_told: bool) -> bytes:
        self.sent.append((hook, json.loads(message)["Event"]["Upload"]["Offset"]))
        if hook in self.gates:
            await self.gates[hook]
        answer = self.answers.get(hook, b"")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def hooks(self) -> list[Hook]:
        return [hook for hook, _ in self.sent]


class TellingTests(TestCase):
    """What is asked and told."""

    timeout = 20

    def setUp(self) -> None:
        from twisted.internet import reactor

        self.reactor = reactor
        self.root = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, self.root)
        self.sender = Sender()
        self.telling = self.started()

    def started(self, **settings: int) -> Telling:
        telling = Telling(self.root, self.sender, self.reactor, set(Hook), interval=0.02, **settings)
        telling.start()
        self.addCleanup(lambda: Deferred.fromCoroutine(telling.stop()))
        return telling

    async def until(self, *hooks: Hook) -> None:
        while self.sender.hooks() != list(hooks):
            await deferLater(self.reactor, 0.01)

    async def until_empty(self) -> None:
        while await self.telling.call(self.telling.outbox.count):
            await deferLater(self.reactor, 0.01)

    def etag(self, name: str) -> str:
        path = self.root / name
        path.write_text("abc")
        return found_of(path.stat()).etag

    @deferred
    async def test_end_that_was_only_thought_to_fail(self) -> None:
        """A request that is cut while its file gets its name has an upload all the same: the file says so."""
        ending = self.telling.finishing(Upload("a", at=("f",)), NO_CAUSE, has_begun=False)
        ending.announce(self.etag("f"), 3)
        ending.failed()
        await self.until(Hook.POST_CREATE, Hook.POST_FINISH)
        await self.until_empty()

    @deferred
    async def test_end_that_failed(self) -> None:
        """Where there is no file nothing is told."""
        ending = self.telling.finishing(Upload("a", at=("f",)), NO_CAUSE, has_begun=True)
        ending.announce('"1-1-1"', 3)
        self.assertEqual(self.telling.outbox.count(), 1)
        ending.failed()
        await self.until_empty()
        self.assertEqual(self.sender.sent, [])

    @deferred
    async def test_finish_in_order(self) -> None:
        """``post-finish`` comes when ``pre-finish`` is over, and not before, although it was noted before."""
        gate = self.sender.gates[Hook.PRE_FINISH] = Deferred()
        ending = self.telling.finishing(Upload("a", at=("f",)), NO_CAUSE, has_begun=True)
        ending.announce(self.etag("f"), 3)
        named = Deferred.fromCoroutine(ending.named())
        self.telling.delivery.wake()
        await self.until_empty_of_looks()
        self.assertEqual(self.sender.hooks(), [Hook.PRE_FINISH])
        self.sender.answers[Hook.PRE_FINISH] = Unfit("no")
        gate.callback(None)
        try:
            await named
        except Refused as refused:
            self.assertEqual(refused.refusal.status, 500)
        else:
            self.fail("pre-finish failed, and nobody heard of it")
        await self.until(Hook.PRE_FINISH, Hook.POST_FINISH)

    async def until_empty_of_looks(self) -> None:
        """Wait for the calls that were made before this one: they share a thread."""
        for _ in range(5):
            await self.telling.call(self.telling.outbox.count)

    @deferred
    async def test_too_much_waits(self) -> None:
        """Where the notes are too many, no upload begins, and those under way end."""
        self.sender.answers[Hook.POST_CREATE] = Unreachable("down")
        telling = self.started(most_waiting=1)
        await telling.may_create(Upload(), NO_CAUSE)
        await telling.created(Upload("a"), NO_CAUSE)
        while not telling.delivery.waiting:
            await deferLater(self.reactor, 0.01)
        try:
            await telling.may_create(Upload(), NO_CAUSE)
        except Refused as refused:
            self.assertEqual((refused.refusal.code, refused.refusal.status), ("hooks_behind", 503))
        else:
            self.fail("an upload began")
        await telling.created(Upload("b"), NO_CAUSE)

    @deferred
    async def test_progress(self) -> None:
        """What is new is told every now and then; a hook that is slow hears less often, but always of the end."""
        gate = self.sender.gates[Hook.POST_RECEIVE] = Deferred()
        offsets, stopped = [0], []
        end = self.telling.receiving(Upload("a"), NO_CAUSE, lambda: offsets[0], stopped.append)
        await deferLater(self.reactor, 0.1)
        self.assertEqual(self.sender.sent, [])
        for offset in (1, 2, 3):
            offsets[0] = offset
            await self.until(Hook.POST_RECEIVE)
        gate.callback(None)
        del self.sender.gates[Hook.POST_RECEIVE]
        offsets[0] = 4
        await self.until(Hook.POST_RECEIVE, Hook.POST_RECEIVE)
        offsets[0] = 5
        self.sender.answers[Hook.POST_RECEIVE] = b'{"StopUpload": true}'
        end()
        self.assertEqual(self.sender.sent, [(Hook.POST_RECEIVE, offset) for offset in (1, self.sender.sent[1][1], 5)])
        self.assertIn(self.sender.sent[1][1], (3, 4))
        self.assertEqual(stopped, [])

    @deferred
    async def test_end_while_it_is_told(self) -> None:
        """A hook that is still busy at the end of a body hears of the end afterwards; it is too late to stop it."""
        gate = self.sender.gates[Hook.POST_RECEIVE] = Deferred()
        self.sender.answers[Hook.POST_RECEIVE] = b'{"StopUpload": true}'
        offsets, stopped = [1], []
        end = self.telling.receiving(Upload("a"), NO_CAUSE, lambda: offsets[0], stopped.append)
        await self.until(Hook.POST_RECEIVE)
        offsets[0] = 2
        end()
        self.assertEqual(self.sender.sent, [(Hook.POST_RECEIVE, 1)])
        gate.callback(None)
        self.assertEqual((self.sender.sent, stopped), ([(Hook.POST_RECEIVE, 1), (Hook.POST_RECEIVE, 2)], []))

    @deferred
    async def test_stop(self) -> None:
        """A hook that wants no more of an upload is heard once, as soon as it says so."""
        self.sender.answers[Hook.POST_RECEIVE] = b'{"StopUpload": true, "HTTPResponse": {"StatusCode": 410}}'
        stopped: list[Refused] = []
        end = self.telling.receiving(Upload("a"), NO_CAUSE, lambda: len(self.sender.sent) + 1, stopped.append)
        while not stopped:
            await deferLater(self.reactor, 0.01)
        await deferLater(self.reactor, 0.05)
        end()
        self.assertEqual([(one.refusal.code, one.refusal.status) for one in stopped], [("hook_stopped", 410)])
