"""One upload while its bytes arrive: what waits, when it pauses, and what becomes of failures."""

from __future__ import annotations

import hashlib
import resource
import shutil
import socket
import ssl
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, TypeVar, cast
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from OpenSSL import SSL
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.ssl import DefaultOpenSSLContextFactory
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.resource import Resource
from zope.interface import implementer

from lwstwisted import errors
from lwstwisted.certificate import ensure_development_certificate
from lwstwisted.errors import BodyStopped, Refused
from lwstwisted.interfaces import Entry, Name, PartialFile
from lwstwisted.loop.reactor import LwsReactor
from lwstwisted.loop.tls import CIPHERTEXT_READ, READ_BUDGET
from lwstwisted.stores.local import LocalStore
from lwstwisted.uploads import transfer as module
from lwstwisted.uploads.resource import UploadResource
from lwstwisted.uploads.transfer import BLOCK, HIGH, LOW, SPARE_BLOCKS, WORTH_A_WRITE, Transfer
from lwstwisted.web.channel import READ_AHEAD
from lwstwisted.web.site import StreamingSite
from tests.contracts import StoreContract, sample
from tests.servers import PATIENCE, visible_beneath

T = TypeVar("T")

NO_LIMIT = 1 << 60
DELIVERY = 64 * 1024


class HeldFile:
    """A partial file that answers when the test says so.

    It takes its bytes at the answer, as a thread may, and knows whether they changed meanwhile.

    :param fail_at: which call fails, counted from 0; the commit is a call too.
    :param at_once: answer each call at once, before it returns.
    """

    def __init__(self, fail_at: int | None = None, at_once: bool = False) -> None:
        self.blocks: list[bytes] = []
        self.committed: bytes | None = None
        self.discarded = 0
        self.held: Deferred[None] | None = None
        self.refusal = Refused(errors.DISK_FULL)
        self._fail_at = fail_at
        self._at_once = at_once
        self._calls = 0

    async def _call(self, data: memoryview) -> bytes:
        assert self.held is None, "two calls at once"
        assert not self.discarded, "used after discard"
        number, self._calls = self._calls, self._calls + 1
        before = bytes(data)
        if not self._at_once:
            self.held = Deferred()
            await self.held
            self.held = None
        assert bytes(data) == before, "the memory was used again too early"
        if number == self._fail_at:
            raise self.refusal
        return before

    async def append(self, data: memoryview) -> None:
        self.blocks.append(await self._call(data))

    async def commit(self, data: memoryview) -> bool:
        last = await self._call(data)
        self.committed = b"".join([*self.blocks, last])
        return True

    async def discard(self) -> None:
        assert self.held is None, "discarded during a write"
        self.discarded += 1

    def answer(self) -> None:
        assert self.held is not None, "no call to answer"
        self.held.callback(None)

    def answer_all(self) -> None:
        while self.held is not None:
            self.answer()


@implementer(IPushProducer)
class Body:
    """A request body: it notes what is asked of it."""

    def __init__(self, transfer: Transfer) -> None:
        self.asked: list[str] = []
        self.transfer = transfer
        transfer.registerProducer(self, True)

    @property
    def is_paused(self) -> bool:
        return bool(self.asked) and self.asked[-1] == "pause"

    def pauseProducing(self) -> None:
        self.asked.append("pause")

    def resumeProducing(self) -> None:
        self.asked.append("resume")

    def stopProducing(self) -> None:
        self.asked.append("stop")
        self.transfer.unregisterProducer()

    def send(self, size: int) -> None:
        self.transfer.bufferReceived(memoryview(bytes(size)))

    def send_until_paused(self) -> int:
        """Deliver piece by piece. Returns how many bytes that took."""
        for count in range(1, 1000):
            self.send(DELIVERY)
            if self.is_paused:
                return count * DELIVERY
        raise AssertionError("was never paused")


def start(part: HeldFile, max_size: int = NO_LIMIT, length: int | None = None) -> tuple[Transfer, Body]:
    transfer = Transfer(part, length, max_size)
    return transfer, Body(transfer)


class WatermarkTests(SynchronousTestCase):
    """A store that is behind pauses the body; one that has caught up resumes it."""

    def test_no_pause_at_the_mark(self) -> None:
        """HIGH bytes may wait."""
        _, body = start(HeldFile())
        body.send(HIGH)
        self.assertEqual(body.asked, [])

    def test_pause_above_the_mark(self) -> None:
        """One byte more pauses the body."""
        _, body = start(HeldFile())
        body.send(HIGH)
        body.send(1)
        self.assertEqual(body.asked, ["pause"])

    def test_pause_once(self) -> None:
        """What was on its way when the pause came is kept, and does not pause again."""
        part = HeldFile()
        transfer, body = start(part)
        for _ in range(HIGH // DELIVERY + 10):
            body.send(DELIVERY)
        self.assertEqual(body.asked, ["pause"])
        part.answer_all()
        self.successResultOf(Deferred.fromCoroutine(self._finish(transfer, part)))
        self.assertEqual(len(part.committed or b""), HIGH + 10 * DELIVERY)

    async def _finish(self, transfer: Transfer, part: HeldFile) -> bool:
        finished = Deferred.fromCoroutine(transfer.finish())
        part.answer_all()
        return await finished

    def test_resume_at_the_low_mark_once(self) -> None:
        """The body goes on when LOW bytes wait, not before, and is told once."""
        part = HeldFile()
        _, body = start(part)
        waiting = body.send_until_paused()
        while waiting:
            if part.held is None:
                break
            before = len(b"".join(part.blocks))
            part.answer()
            waiting -= len(b"".join(part.blocks)) - before
            self.assertEqual(body.asked, ["pause", "resume"] if waiting <= LOW else ["pause"], waiting)
        self.assertLessEqual(waiting, LOW)
        self.assertEqual(body.asked, ["pause", "resume"])

    def test_pauses_again(self) -> None:
        """A slow store pauses a fast client once for each time it is behind."""
        part = HeldFile()
        _, body = start(part)
        for _ in range(5):
            body.send_until_paused()
            while body.is_paused:
                part.answer()
        self.assertEqual(body.asked, ["pause", "resume"] * 5)

    def test_bytes_in_memory(self) -> None:
        """A client that respects the pause has at most HIGH, one delivery and one block in memory."""
        part = HeldFile()
        transfer, body = start(part)
        body.send_until_paused()
        self.assertLessEqual(transfer.received, HIGH + DELIVERY + BLOCK)

    def test_store_that_answers_at_once(self) -> None:
        """A delivery above the mark that is written before it is counted doesn't stay paused for ever."""
        _, body = start(HeldFile(at_once=True))
        body.send(HIGH + 1)
        self.assertFalse(body.is_paused, body.asked)

    def test_sends_at_resume(self) -> None:
        """A body that delivers inside ``resumeProducing`` is neither lost nor nested into a second write."""
        part = HeldFile()
        transfer, body = start(part)
        body.send_until_paused()
        body.resumeProducing = lambda: (body.asked.append("resume"), body.send(HIGH + DELIVERY))  # type: ignore
        while "resume" not in body.asked:
            part.answer()
        self.assertEqual(body.asked, ["pause", "resume", "pause"])
        body.resumeProducing = lambda: body.asked.append("resume")  # type: ignore
        part.answer_all()
        finished = Deferred.fromCoroutine(transfer.finish())
        part.answer_all()
        self.assertTrue(self.successResultOf(finished))
        self.assertEqual(len(part.committed or b""), transfer.received)


class BlockTests(SynchronousTestCase):
    """How deliveries become writes."""

    def test_one_write_at_a_time(self) -> None:
        """A second write waits for the first; HeldFile would notice."""
        part = HeldFile()
        _, body = start(part)
        body.send(3 * BLOCK)
        self.assertEqual(part.blocks, [])
        part.answer_all()
        self.assertEqual([len(block) for block in part.blocks], [BLOCK] * 3)

    def test_small_bodies_wait_for_the_commit(self) -> None:
        """Less than is worth a write goes to the store together with the commit."""
        part = HeldFile()
        transfer, body = start(part)
        body.send(WORTH_A_WRITE - 1)
        self.assertIsNone(part.held)
        finished = Deferred.fromCoroutine(transfer.finish())
        part.answer()
        self.assertTrue(self.successResultOf(finished))
        self.assertEqual((part.blocks, len(part.committed or b"")), ([], WORTH_A_WRITE - 1))

    def test_an_idle_store_is_given_work(self) -> None:
        """The disk works while the client sends, from 256 KiB on."""
        part = HeldFile()
        _, body = start(part)
        body.send(WORTH_A_WRITE - 1)
        body.send(1)
        part.answer()
        self.assertEqual([len(block) for block in part.blocks], [WORTH_A_WRITE])

    def test_a_busy_store_is_given_full_blocks(self) -> None:
        """While one write lasts, the next block fills up."""
        part = HeldFile()
        _, body = start(part)
        for _ in range(24):
            body.send(DELIVERY)
        part.answer_all()
        self.assertEqual([len(block) for block in part.blocks], [4 * DELIVERY, BLOCK, 4 * DELIVERY])

    def test_memory_is_used_again(self) -> None:
        """Blocks are kept for the next upload, but only some of them."""
        self.patch(module, "_spare", [])
        part = HeldFile(at_once=True)
        for _ in range(2 * SPARE_BLOCKS):
            start(part)[1].send(BLOCK)
        self.assertEqual(len(module._spare), 1)
        held = HeldFile()
        start(held)[1].send(2 * SPARE_BLOCKS * BLOCK)
        held.answer_all()
        self.assertEqual(len(module._spare), SPARE_BLOCKS)

    def test_empty_body(self) -> None:
        """An empty file is one commit."""
        for at_once in (True, False):
            part = HeldFile(at_once=at_once)
            transfer, _ = start(part)
            finished = Deferred.fromCoroutine(transfer.finish())
            part.answer_all()
            self.assertTrue(self.successResultOf(finished))
            self.assertEqual(part.committed, b"")

    def test_write_takes_bytes(self) -> None:
        """A body that knows no memoryviews writes bytes."""
        part = HeldFile(at_once=True)
        transfer, _ = start(part)
        for piece in (b"one ", b"", b"two"):
            transfer.write(piece)
        self.successResultOf(Deferred.fromCoroutine(transfer.finish()))
        self.assertEqual(part.committed, b"one two")


@contextmanager
def small_blocks() -> Iterator[tuple[int, int]]:
    """Blocks of 64 bytes, so that many of them fit into a test: (size of a block, worth a write)."""
    with (
        mock.patch.multiple(module, SMALLEST_BLOCK=2, BLOCK=64, WORTH_A_WRITE=16, HIGH=128, LOW=64),
        mock.patch.object(module, "_spare", []),
    ):
        yield 64, 16


def resident() -> int:
    """Bytes of this process in memory (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class SmallAndSlowTests(SynchronousTestCase):
    """What an upload costs that is small, or that takes its time."""

    def test_a_small_upload_is_one_call(self) -> None:
        """One trip to the store's threads: the bytes go with the commit."""
        part = HeldFile(at_once=True)
        transfer, body = start(part, length=100_000)
        body.send(60_000)
        body.send(40_000)
        self.successResultOf(Deferred.fromCoroutine(transfer.finish()))
        self.assertEqual((part.blocks, len(part.committed or b"")), ([], 100_000))

    def test_slow_uploads_occupy_what_they_sent(self) -> None:
        """200 big uploads of which 4 KiB have arrived occupy less than 16 MiB together, not 200 blocks."""
        start(HeldFile(), length=1)[1].send(1)
        before = resident()
        slow = [start(HeldFile(), length=2**30) for _ in range(200)]
        for _, body in slow:
            body.send(4096)
        self.assertLess(resident() - before, 16 * 2**20)

    def test_an_announcement_occupies_nothing(self) -> None:
        """1,000 uploads of which 1 byte has arrived occupy less than 4 MiB together, whatever they announce."""
        for length in (1000, WORTH_A_WRITE - 1, 2**30, None):
            before = resident()
            slow = [start(HeldFile(), length=length) for _ in range(1000)]
            for _, body in slow:
                body.send(1)
            self.assertLess(resident() - before, 4 * 2**20, length)


class CutTests(SynchronousTestCase):
    """Every byte once, however the body is cut and whenever the store answers."""

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        # True: the store answers. A number: a delivery of so many bytes.
        steps=st.lists(st.one_of(st.just(True), st.integers(0, 200)), max_size=40),
        at_once=st.booleans(),
        is_announced=st.booleans(),
    )
    def test_bytes_are_exact(self, steps: list[Any], at_once: bool, is_announced: bool) -> None:
        part = HeldFile(at_once=at_once)
        data = sample(sum(step for step in steps if step is not True))
        sent = 0
        with small_blocks() as (block, worth):
            transfer, body = start(part, length=len(data) if is_announced else None)
            for step in steps:
                if step is True:
                    if part.held is not None:
                        part.answer()
                else:
                    # The memory is lent for the length of the call only.
                    lent = bytearray(data[sent : sent + step])
                    transfer.bufferReceived(memoryview(lent))
                    lent[:] = b"?" * step
                    sent += step
            finished = Deferred.fromCoroutine(transfer.finish())
            part.answer_all()
            self.assertTrue(self.successResultOf(finished))
        self.assertEqual(part.committed, data)
        self.assertEqual(transfer.received, len(data))
        self.assertTrue(all(worth <= len(piece) <= block for piece in part.blocks))
        # Pauses and resumes alternate, and nothing stays paused when all is written.
        self.assertEqual(body.asked, ["pause", "resume"] * (len(body.asked) // 2))

    def test_block_edges(self) -> None:
        """Sizes around blocks and marks, in deliveries of several sizes."""
        with small_blocks() as (block, worth):
            for edge in (1, worth, block, 2 * block, 4 * block):
                for size in (edge - 1, edge, edge + 1):
                    for delivery in (1, 7, 16, 63, 64, 65, 1000):
                        part = HeldFile(at_once=True)
                        data = sample(size)
                        transfer, _ = start(part, length=size if delivery % 2 else None)
                        for at in range(0, size, delivery):
                            transfer.bufferReceived(memoryview(data[at : at + delivery]))
                        self.successResultOf(Deferred.fromCoroutine(transfer.finish()))
                        self.assertEqual(part.committed, data, (size, delivery))


class FailureTests(SynchronousTestCase):
    """What ends an upload before its end."""

    def test_store_fails_at_each_call(self) -> None:
        """Whichever write fails: the body is stopped once, its refusal is raised, nothing is committed."""
        data = sample(1000)
        for at_once in (True, False):
            fail_at, ended_by_finish = 0, False
            while not ended_by_finish:
                part = HeldFile(fail_at=fail_at, at_once=at_once)
                with small_blocks():
                    transfer, body = start(part)
                    for at in range(0, len(data), 50):
                        transfer.write(data[at : at + 50])
                        if part.held is not None and at % 100:
                            part.answer()
                    part.answer_all()
                    finished = Deferred.fromCoroutine(transfer.finish())
                    part.answer_all()
                    failure = self.failureResultOf(finished, Refused)
                    self.assertIs(failure.value, part.refusal)
                    ended_by_finish = "stop" not in body.asked
                    if not ended_by_finish:
                        self.assertEqual(body.asked.count("stop"), 1)
                        self.assertEqual(body.asked[-1], "stop")
                        self.assertIs(transfer.failure, part.refusal)
                    self.successResultOf(Deferred.fromCoroutine(transfer.abort()))
                self.assertIsNone(part.committed)
                self.assertEqual(part.discarded, 1)
                self.assertEqual(b"".join(part.blocks), data[: len(b"".join(part.blocks))])
                fail_at += 1
            self.assertGreater(fail_at, 10, "the commit was the only call")

    def test_late_bytes_are_dropped(self) -> None:
        """After a failure a body may still bring what was on its way."""
        part = HeldFile(fail_at=0)
        transfer, body = start(part)
        body.send(WORTH_A_WRITE)
        part.answer()
        transfer.write(bytes(BLOCK))
        self.assertIsNone(part.held)
        self.assertEqual(body.asked, ["stop"])

    def test_longer_than_allowed(self) -> None:
        """A body without a length is stopped at the first byte too many, and nothing of that piece is written."""
        part = HeldFile(at_once=True)
        transfer, body = start(part, max_size=100)
        body.send(100)
        self.assertEqual(body.asked, [])
        body.send(1)
        self.assertEqual(body.asked, ["stop"])
        failure = self.failureResultOf(Deferred.fromCoroutine(transfer.finish()), Refused)
        self.assertIs(failure.value.refusal, errors.BODY_TOO_LARGE)
        self.assertIsNone(part.committed)

    def test_exactly_as_long_as_allowed(self) -> None:
        part = HeldFile(at_once=True)
        transfer, body = start(part, max_size=100)
        body.send(100)
        self.assertTrue(self.successResultOf(Deferred.fromCoroutine(transfer.finish())))

    def test_abort_waits_for_the_write(self) -> None:
        """The file isn't discarded under a thread that writes to it, and nothing is written afterwards."""
        part = HeldFile()
        transfer, body = start(part)
        body.send(3 * BLOCK)
        aborted = Deferred.fromCoroutine(transfer.abort())
        self.assertNoResult(aborted)
        self.assertEqual(part.discarded, 0)
        part.answer()
        self.successResultOf(aborted)
        self.assertEqual((part.discarded, len(part.blocks), part.held), (1, 1, None))
        self.assertIsInstance(transfer.failure, BodyStopped)

    def test_abort_at_once(self) -> None:
        """Without a write under way there is nothing to wait for."""
        part = HeldFile()
        transfer, body = start(part)
        body.send(100)
        self.successResultOf(Deferred.fromCoroutine(transfer.abort()))
        self.assertEqual(part.discarded, 1)

    def test_finish_waits_for_the_write(self) -> None:
        """The commit comes behind all writes."""
        part = HeldFile()
        transfer, body = start(part)
        body.send(BLOCK + 10)
        finished = Deferred.fromCoroutine(transfer.finish())
        self.assertNoResult(finished)
        part.answer()
        self.assertNoResult(finished)
        part.answer()
        self.assertTrue(self.successResultOf(finished))
        self.assertEqual(len(part.committed or b""), BLOCK + 10)

    def test_a_failing_write_is_not_used_again(self) -> None:
        """Memory that the store may still look at isn't given to another upload."""
        self.patch(module, "_spare", [])
        part = HeldFile(fail_at=0)
        _, body = start(part)
        body.send(BLOCK)
        part.answer()
        self.assertEqual(module._spare, [])


class GatedStore(LocalStore):
    """A store on disk whose calls, but the first of an upload, wait at a gate.

    :ivar appended: bytes that came to the gate.
    :ivar arrived: calls that did.
    :ivar finished: calls that have come through and ended.
    """

    def __init__(self, *args: Any, is_open: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        self._is_open = is_open
        self._waiting: deque[Deferred[None]] = deque()
        self.appended = 0
        self.arrived = 0
        self.finished = 0

    async def create(self, name: Name, length: int | None, *options: Any) -> Any:
        return GatedFile(await super().create(name, length, *options), self)

    async def open_file(self, name: Name) -> int:
        return await self.gated(super().open_file, name)

    async def list_folder(self, name: Name) -> list[Entry]:
        return await self.gated(super().list_folder, name)

    async def delete(self, name: Name, *options: Any) -> None:
        await self.gated(super().delete, name, *options)

    async def gated(self, call: Callable[..., Awaitable[T]], *args: Any) -> T:
        self.arrived += 1
        if not self._is_open:
            self._waiting.append(Deferred())
            await self._waiting[-1]
        try:
            return await call(*args)
        finally:
            self.finished += 1

    def close_gate(self) -> None:
        self._is_open = False

    def open_gate(self) -> None:
        self._is_open = True
        while self._waiting:
            self._waiting.popleft().callback(None)


class GatedFile:
    def __init__(self, part: PartialFile, store: GatedStore) -> None:
        self._part = part
        self._store = store

    @property
    def etag(self) -> str:
        return self._part.etag

    @property
    def digests(self) -> Mapping[str, bytes]:
        return self._part.digests

    async def append(self, data: memoryview) -> None:
        self._store.appended += len(data)
        await self._store.gated(self._part.append, data)

    async def commit(self, data: memoryview) -> bool:
        self._store.appended += len(data)
        return await self._store.gated(self._part.commit, data)

    async def discard(self) -> None:
        await self._part.discard()


class FolderCase(TestCase):
    timeout = PATIENCE

    def setUp(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, self.root, ignore_errors=True)

    def make_store(self, is_open: bool = True) -> GatedStore:
        from twisted.internet import reactor

        store = GatedStore(self.root / "store", reactor, durability="none", is_open=is_open)
        self.addCleanup(lambda: Deferred.fromCoroutine(store.stop()))
        return store


class GatedStoreTests(StoreContract, FolderCase):
    """The store of the next test is a store."""

    def make_store(self) -> GatedStore:
        return FolderCase.make_store(self)


class MemoryTests(FolderCase):
    """A store that never answers, beneath the whole of the way: kernel, TLS, channel, wire, transfer."""

    SIZE = 64 * 1024 * 1024
    SOCKET_BUFFER = 128 * 1024
    STUCK = 0.5
    """Seconds without a byte after which the client counts as stopped."""

    @pytest.mark.slow
    async def test_bytes_taken_from_the_client(self) -> None:
        """Not more than the sum of the buffers that we know; and the upload ends well when the store answers."""
        from twisted.internet import reactor

        if not isinstance(reactor, LwsReactor):
            self.skipTest("needs --reactor=lws")
        store = self.make_store(is_open=False)
        files = Resource()
        files.putChild(b"files", UploadResource(store))
        certificate = ensure_development_certificate(self.root / "pair.pem")
        context = DefaultOpenSSLContextFactory(str(certificate), str(certificate), SSL.TLS_METHOD)
        site = StreamingSite(files, reactor, logPath=str(self.root / "log"))
        port = reactor.listenSSL(0, site, context, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        self.addCleanup(lambda: Deferred.fromCoroutine(site.stop()))
        self.addCleanup(store.open_gate)
        # Fixed sizes on both sides: the kernel doubles them, and grows no buffer that was given one.
        listening = cast(Any, port).socket
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.SOCKET_BUFFER)

        data = sample(1 << 20)
        stuck: Deferred[tuple[int, int]] = Deferred()
        may_go_on = Event()
        self.addCleanup(may_go_on.set)

        def announce(sent: int, kernel: int) -> None:
            reactor.callFromThread(stuck.callback, (sent, kernel))
            may_go_on.wait(PATIENCE)

        uploaded = deferToThread(self._upload, port.getHost().port, data, announce)
        uploaded.addErrback(lambda reason: stuck.errback(reason) if not stuck.called else reason)
        sent, kernel = await stuck
        kernel += listening.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        block_in_flight, delivery, leftover = BLOCK, READ_BUDGET, CIPHERTEXT_READ
        bound = kernel + CIPHERTEXT_READ + leftover + READ_AHEAD + HIGH + delivery + block_in_flight
        self.assertLess(bound, self.SIZE // 8, "the test would not notice")
        self.assertLessEqual(sent, bound)
        self.assertGreater(sent, HIGH)
        self.assertLessEqual(store.appended, BLOCK)
        self.assertEqual(visible_beneath(self.root / "store"), [])

        store.open_gate()
        may_go_on.set()
        answer = await uploaded
        self.assertEqual(answer.split(b"\r\n")[0], b"HTTP/1.1 201 Created")
        expected = hashlib.sha256(data * (self.SIZE // len(data))).hexdigest()
        with open(self.root / "store" / "file", "rb") as file:
            self.assertEqual(hashlib.file_digest(file, "sha256").hexdigest(), expected)

    def _upload(self, port: int, data: bytes, stuck: Callable[[int, int], None]) -> bytes:
        """Send until nothing is taken any more, say so, then send the rest. In a thread."""
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        plain = socket.socket()
        with plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.SOCKET_BUFFER)
            plain.settimeout(PATIENCE)
            plain.connect(("127.0.0.1", port))
            with context.wrap_socket(plain, server_hostname="localhost") as client:
                kernel = client.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
                head = b"PUT /files/file HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
                client.sendall(head % self.SIZE)
                client.settimeout(self.STUCK)
                sent, view, was_stuck = 0, memoryview(data), False
                while sent < self.SIZE:
                    at = sent % len(data)
                    try:
                        sent += client.send(view[at : at + 16384])
                    except (TimeoutError, ssl.SSLWantWriteError):
                        if was_stuck:
                            raise
                        was_stuck = True
                        stuck(sent, kernel)
                        client.settimeout(PATIENCE)
                if not was_stuck:
                    raise AssertionError("a store that never answers did not stop the client")
                return client.recv(65536)
