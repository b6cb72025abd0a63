"""Uploads that outlive requests, on disk: their contract, and each way in which a disk or a process fails them.

A process that dies does nothing more: :class:`Fate` ends it before any of its system calls, and keeps all that come
behind, as those of clean-ups, from happening. Its descriptors are closed then, as the kernel does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import ModuleType
from typing import Any, TypeVar
from unittest.mock import patch

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import LogLevel, formatEvent, globalLogPublisher

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.interfaces import StoredUpload, anything
from lwstwisted.stores import locks, placing, record, resumable, space, tree, waiting
from lwstwisted.stores.local import LocalStore
from lwstwisted.stores.resumable import UploadFile
from lwstwisted.stores.space import Space
from lwstwisted.stores.tree import Tree
from tests.contracts import (
    DAY,
    EDGE,
    NOTHING,
    ResumableStoreContract,
    contents_of,
    get,
    held,
    is_room,
    names_in,
    put,
    refusal_of,
    refuse_all,
    require_room,
    sample,
    uploaded,
)
from tests.servers import PATIENCE, serving
from tests.test_stores_local import WATCHED, LocalCase, open_beneath, partials_of, steps_in, traced, tree_of

T = TypeVar("T")

MIB = 1024 * 1024
DATA = sample(MIB + 3)
QUOTA = 10 * MIB


class UnnamedContractTests(LocalCase, ResumableStoreContract):
    """The contract."""

    timeout = PATIENCE


class NamedContractTests(LocalCase, ResumableStoreContract):
    """The contract, as on a file system without ``O_TMPFILE``."""

    timeout = PATIENCE
    use_tmpfile = False


class Died(BaseException):
    """A process is no more."""


ERRORS = {
    "open": errno.EMFILE,
    "dup": errno.EMFILE,
    "pwrite": errno.ENOSPC,
    "link": errno.EDQUOT,
    "mkdir": errno.ENOSPC,
    "fcntl": errno.ENOLCK,
    "flock": errno.ENOLCK,
    **dict.fromkeys(("pread", "fsync", "ftruncate", "fstat", "lstat", "listdir", "rename", "unlink"), errno.EIO),
    **dict.fromkeys(("fchmod", "fstatvfs", "copy_file_range"), errno.EIO),
}
"""Calls, and what each of them may fail with."""

MODULES = (placing, record, resumable, tree, waiting)
COUNTING = (locks, space)


class Fate:
    """What becomes of the system calls that modules of the store make.

    :param nth: the call that fails, counted from 1; 0 for none.
    :param is_death: whether the process is dead from there on; else the call fails, and nothing else does.
    :ivar count: calls so far.
    :ivar hit: the call that failed.
    """

    def __init__(self, nth: int, is_death: bool) -> None:
        self.count = 0
        self.hit = ""
        self._nth = nth
        self._is_death = is_death

    def step(self, name: str) -> None:
        if self.hit and self._is_death:
            raise Died
        if name not in ERRORS:
            return
        self.count += 1
        if self.count == self._nth:
            self.hit = name
            if self._is_death:
                raise Died
            raise OSError(ERRORS[name], os.strerror(ERRORS[name]))

    @contextmanager
    def ruling(self, modules: tuple[ModuleType, ...]) -> Iterator[None]:
        """Have it happen to some modules."""
        patches = [
            patch.object(module, name, Ruled(self, sys.modules[name]))
            for module in modules
            for name in ("os", "fcntl")
            if hasattr(module, name)
        ]
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()


class Ruled:
    """A module whose system calls are ruled by a :class:`Fate`."""

    def __init__(self, fate: Fate, module: ModuleType) -> None:
        self._fate = fate
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name not in ERRORS and name != "close":
            return found

        def call(*arguments: Any, **keywords: Any) -> Any:
            self._fate.step(name)
            # What a process leaves when it dies doesn't depend on what is synced, which takes time.
            return None if name == "fsync" else found(*arguments, **keywords)

        return call


def again(work: Callable[[], T], between: Callable[[], object] = bool) -> T:
    """Do something that a single fault may keep from being done."""
    with contextlib.suppress(OSError):
        return work()
    between()
    return work()


class Life:
    """One upload from its beginning to its end, and what its client was told.

    :param length: announced at the beginning, or None.
    :param path: what it becomes.
    :param is_cancelled: whether it is removed before it has a name.
    :ivar id: of the upload, as soon as that was told.
    :ivar told: bytes that were said to be durable.
    :ivar written: bytes that were sent at most.
    """

    def __init__(self, length: int | None, path: tuple[bytes, ...], is_cancelled: bool = False) -> None:
        self.length = length
        self.path = path
        self.is_cancelled = is_cancelled
        self.id = b""
        self.told = self.written = 0
        self.is_named = self.is_ending = self.is_removed = False

    def live(self, tree: Tree) -> None:
        file = again(lambda: UploadFile.begin(tree, {"a": 1}, self.length, DAY, self.path, anything))
        self.id = file.id
        self.reach(file, 100_000)
        file.close()
        opened = again(lambda: UploadFile.open(tree, self.id))
        assert opened is not None
        file = opened
        if self.length is None:
            again(lambda: file.keep({"a": 2}, len(DATA)))
        self.reach(file, len(DATA))
        if not self.is_cancelled:
            # What replaced a file and could not be synced is for the next process.
            again(lambda: file.name_it(self.path, anything, {}), tree.doubtful.clear)
            self.is_named = True
        self.end(tree, file)

    def end(self, tree: Tree, file: UploadFile) -> None:
        """Nobody needs it any more."""
        self.is_ending = True
        with contextlib.suppress(OSError):
            file.remove()
        file.close()
        with contextlib.suppress(Refused):
            found = again(lambda: UploadFile.open(tree, self.id))
            assert found is not None
            found.remove()
        self.is_removed = True

    def reach(self, file: UploadFile, end: int) -> None:
        """Append up to an offset."""
        for _ in range(3):
            at = file.state.offset
            assert self.told <= at <= self.written
            self.told, self.written = at, max(self.written, end)
            half = (at + end) // 2
            try:
                file.append(memoryview(DATA[at:half]))
                file.checkpoint()
                self.told = file.state.offset
                file.append(memoryview(b"x" * (end - half)))
                file.discard()
                file.commit(memoryview(DATA[half:end]))
            except (OSError, Refused):
                again(file.discard)
            else:
                self.told = end
                return
        raise AssertionError("one fault costs more than one request")


class QuickLife(Life):
    """One whose last bytes become durable together with its name."""

    def live(self, tree: Tree) -> None:
        file = again(lambda: UploadFile.begin(tree, {"target": self.target}, self.length, DAY, self.path, anything))
        self.id = file.id
        self.reach(file, 100_000)
        for _ in range(3):
            self.written = len(DATA)
            try:
                file.append(memoryview(DATA[file.state.offset :]))
                file.name_it(self.path, anything, {})
            except (OSError, Refused):
                self.told = file.state.offset
                again(file.discard)
                tree.doubtful.clear()
                if file.state.offset == len(DATA):
                    again(lambda: file.name_it(self.path, anything, {}), tree.doubtful.clear)
            if file.state.named is not None:
                break
        assert file.state.named is not None, "one fault costs more than one request"
        self.told, self.is_named = len(DATA), True
        self.end(tree, file)

    @property
    def target(self) -> list[str]:
        return [segment.decode() for segment in self.path]


LIVES: list[Callable[[], Life]] = [
    lambda: Life(len(DATA), (b"new", b"deep", b"file")),
    lambda: Life(None, (b"replaced",)),
    lambda: Life(None, (b"new",), is_cancelled=True),
    lambda: QuickLife(len(DATA), (b"new", b"deep", b"file")),
    lambda: QuickLife(None, (b"replaced",)),
]


class FaultCase(LocalCase):
    """Uploads that live in a process of their own, which shares the root with nobody, or with a store that lives on."""

    def prepared(self) -> Path:
        root = self.new_folder()
        (root / "replaced").write_bytes(b"old")
        return root

    @contextmanager
    def process(self, root: Path, use_tmpfile: bool = True) -> Iterator[Tree]:
        """A process of its own, whose descriptors are closed in the end."""
        before = open_beneath(root)
        try:
            with Fate(0, is_death=False).ruling(MODULES):
                own = Tree(root, "full", use_tmpfile)
            usage = own.usage(lambda: own.count_bytes() + waiting.Records(own).space_taken(), QUOTA)
            own.space = Space(own.partial, 0, usage)
            yield own
        finally:
            for descriptor in open_beneath(root) - before:
                os.close(descriptor)

    async def require_recovered(self, root: Path, life: Life, case: object, is_alone: bool = True) -> None:
        """What a new process finds keeps what was told, and can be finished.

        :param is_alone: whether that process counts the bytes anew.
        """
        store = self.make_store(root, quota=QUOTA, durability="none")
        name = tuple(segment.decode() for segment in life.path)
        ids = await store.list_uploads()
        if life.id and not life.is_ending:
            assert ids == [life.id.decode()], case
        visible = {path: data for path, data in tree_of(root).items() if data is not None}
        old = {"replaced": b"old"}
        whole = {**old, "/".join(name): DATA}
        assert visible == (whole if life.is_named else old) or (visible == whole and not life.is_cancelled), case
        for id in ids:
            try:
                upload = await held(store, id)
            except Refused as refused:
                assert refused.refusal is errors.UPLOAD_NOT_FOUND and not (life.id and not life.is_ending), case
                continue
            state = upload.state
            assert life.told <= state.offset <= life.written, (case, state)
            assert state.named is not None or not life.is_named, case
            assert state.named is None or visible == whole, case
            if state.named is None:
                if state.length is None:
                    await upload.keep({}, len(DATA))
                await upload.commit(memoryview(DATA)[state.offset :])
                await upload.name_it(name)
                visible = whole
                assert await get(store, name) == DATA, case
            await upload.remove()
        await store.sweep_uploads()
        assert os.listdir(root / ".lwstwisted" / "uploads") == [], case
        assert partials_of(root) == [], case
        room = QUOTA - sum(map(len, visible.values()))
        if is_alone:
            await require_room(store, room)
        else:
            assert not await is_room(store, room + 1), case
        await store.stop()

    async def kill_at_each(
        self, make: Callable[[], Life], use_tmpfile: bool, step: int = 1, is_alone: bool = True
    ) -> int:
        nth = 0
        while True:
            nth += step
            root, life, fate = self.prepared(), make(), Fate(nth, is_death=True)
            witness = None if is_alone else self.make_store(root, quota=QUOTA)
            with contextlib.suppress(Died), self.process(root, use_tmpfile) as own, fate.ruling((*MODULES, *COUNTING)):
                life.live(own)
            await self.require_recovered(root, life, (nth, fate.hit, vars(life)), is_alone)
            if witness is not None:
                await witness.stop()
            assert open_beneath(root) == set(), nth
            if not fate.hit:
                return fate.count

    async def fail_each(self, make: Callable[[], Life], modules: tuple[ModuleType, ...], use_tmpfile: bool) -> int:
        nth = 0
        while True:
            nth += 1
            root, life, fate = self.prepared(), make(), Fate(nth, is_death=False)
            case = (nth, use_tmpfile)
            with self.process(root, use_tmpfile) as own:
                idle = open_beneath(root)
                with fate.ruling(modules):
                    life.live(own)
                case += (fate.hit, vars(life))
                assert open_beneath(root) == idle, case
                assert (own.failure is not None) == (fate.hit == "fsync"), case
                waiting.Records(own).sweep()
                visible = {path: data for path, data in tree_of(root).items() if data is not None}
                name = b"/".join(life.path).decode()
                assert visible == {"replaced": b"old", **({} if life.is_cancelled else {name: DATA})}, case
                assert os.listdir(root / ".lwstwisted" / "uploads") == [], case
                # Only a name that could not be removed stays, until the next start.
                assert fate.hit == "unlink" or partials_of(root) == [], case
                counted, true = self.counted(own), sum(map(len, visible.values()))
                assert counted == true if modules == MODULES else counted >= true, (case, counted, true)
            if not fate.hit:
                return fate.count

    def counted(self, own: Tree) -> int:
        """Bytes that count against the quota."""
        usage = own.space._usage
        assert usage is not None
        return usage._read()[0]


class FaultTests(FaultCase):
    """A single system call that fails, or comes too late."""

    async def test_death_before_each_call(self) -> None:
        """A process that is killed anywhere: what was told to be durable is there, nothing else is left in the end."""
        assert await self.kill_at_each(LIVES[0], True, step=3) > 50

    @pytest.mark.slow
    async def test_death_before_each_call_of_all(self) -> None:
        """The same for each call, of uploads without a length, that replace, or that are cancelled."""
        for make in LIVES:
            for use_tmpfile in (True, False):
                await self.kill_at_each(make, use_tmpfile)

    @pytest.mark.slow
    async def test_death_beside_another_process(self) -> None:
        """The one that lives on counts on: perhaps too much, never too little."""
        for make in LIVES:
            await self.kill_at_each(make, True, is_alone=False)

    async def test_each_call_fails(self) -> None:
        """One call that fails costs one request: the client goes on from the offset, and the file is whole."""
        assert await self.fail_each(LIVES[1], MODULES, True) > 50

    @pytest.mark.slow
    async def test_each_call_fails_of_all(self) -> None:
        """The same for all kinds of uploads; also where bytes are counted: never too few because of a fault."""
        for make in LIVES:
            for use_tmpfile in (True, False):
                await self.fail_each(make, MODULES, use_tmpfile)
        await self.fail_each(LIVES[0], COUNTING, True)


class OrderTests(LocalCase):
    """What is asked of the kernel, and in which order, as strace sees it."""

    async def reopened(self, store: LocalStore, upload: StoredUpload) -> StoredUpload:
        """The same upload, whose record was opened by its name."""
        await upload.release()
        return await held(store, upload.id)

    def seen(self, lines: list[str], id: str) -> list[str]:
        steps = [step.replace(f"/.lwstwisted/uploads/{id}", "RECORD") for step in steps_in(lines, self.root)]
        return [step.replace("RECORD.data", "DATA").replace("/.lwstwisted/uploads", "UPLOADS") for step in steps]

    async def test_begin(self) -> None:
        """Nobody hears of an upload before its record and both names are on disk."""
        store = self.make_store()
        with traced("-e", WATCHED) as lines:
            upload = await store.begin_upload({}, 1, DAY)
        assert self.seen(lines, upload.id) == [
            *("pwrite PARTIAL", "pwrite PARTIAL", "fsync PARTIAL"),
            *("link RECORD", "fsync UPLOADS"),
        ]

    async def test_commit(self) -> None:
        """The number is written when the bytes that it counts are on disk, and told when it is there itself."""
        store = self.make_store()
        upload = await self.reopened(store, await uploaded(store, b"x", 3))
        append, count = ["pwrite DATA"], ["fsync DATA", "pwrite RECORD", "fsync RECORD"]
        for make, expected in (
            (lambda: upload.commit(memoryview(b"y")), append + count),
            (lambda: upload.append(memoryview(b"z")), append),
            (lambda: upload.checkpoint(), count),
        ):
            with traced("-e", WATCHED) as lines:
                await make()
            assert self.seen(lines, upload.id) == expected

    async def test_name(self) -> None:
        """The record says so when file and name are on disk; the bytes lose their own name last."""
        store = self.make_store()
        link = ["fchmod DATA", "fsync DATA", "flock DATA", "link PARTIAL"]
        noted = ["pwrite RECORD", "pwrite RECORD", "fsync RECORD", "unlink DATA"]
        upload = await self.reopened(store, await uploaded(store, b"x", 1))
        with traced("-e", WATCHED) as lines:
            await upload.name_it(("a", "file"))
        assert self.seen(lines, upload.id) == [
            *link,
            *("mkdir /a", "fsync /", "link /a/file", "fsync /a", "unlink PARTIAL"),
            *noted,
        ]
        upload = await self.reopened(store, await uploaded(store, b"", 1))
        await upload.append(memoryview(b"x"))
        with traced("-e", WATCHED) as lines:
            await upload.name_it(("a", "file"))
        # Bytes that were not committed cost no sync of their own.
        assert self.seen(lines, upload.id) == [
            *link,
            *("mkdir /a", "link /a/file", "rename /a/file", "fsync /a"),
            *noted,
        ]

    async def test_remove(self) -> None:
        """The record goes first, and a removed upload doesn't come back after a power cut."""
        store = self.make_store()
        upload = await uploaded(store, b"x", 1)
        with traced("-e", WATCHED) as lines:
            await upload.remove()
        assert self.seen(lines, upload.id) == ["unlink RECORD", "unlink DATA", "fsync UPLOADS"]

    @pytest.mark.slow
    async def test_interrupted_calls(self) -> None:
        """A signal that interrupts a call of the kernel costs nothing: it is made again."""
        for call in ("pwrite64", "fsync", "openat", "ftruncate", "flock", "pread64"):
            store = self.make_store(threads=1)
            await store.list_folder(())
            with traced("-e", f"trace={call}", "-e", f"inject={call}:error=EINTR:when=1+2") as lines:
                part = await uploaded(store, sample(EDGE))
                upload = await store.begin_upload({}, 2 * EDGE, DAY)
                await upload.append(memoryview(sample(EDGE)))
                await upload.checkpoint()
                await upload.append(memoryview(b"x"))
                await upload.discard()
                await upload.take_from(part)
                await upload.commit(NOTHING)
                await upload.name_it((call, "file"))
            assert sum("(INJECTED)" in line for line in lines) > 0, call
            assert await get(store, (call, "file")) == sample(EDGE) * 2
            await store.stop()


class QueueTests(LocalCase):
    """A disk that is so slow that calls wait for each other."""

    @contextmanager
    def busy(self, store: LocalStore) -> Iterator[None]:
        """All threads that write do so, and don't come back."""
        over = Event()
        writing: Deferred[bool] = Deferred.fromCoroutine(store._threads.finish(over.wait, PATIENCE))
        try:
            yield
            assert not writing.called, "somebody has waited for them"
        finally:
            over.set()

    async def test_who_only_asks(self) -> None:
        """Who opens an upload that nobody holds, and lets it go, waits for nobody's syncs."""
        store = self.make_store(threads=1)
        upload = await uploaded(store, b"123")
        await upload.release()
        with self.busy(store):
            upload = await held(store, upload.id)
            assert upload.state.offset == 3
            await upload.release()
            await (await held(store, upload.id)).release()

    async def test_who_is_waited_for(self) -> None:
        """What is wanted is made durable at once, also if it was asked for before; the others keep their order."""
        store = self.make_store(threads=1)
        wanted, later, other = [await uploaded(store, b"") for _ in range(3)]
        with self.busy(store):
            writing: Deferred[bool] = Deferred.fromCoroutine(wanted.commit(memoryview(b"12")))
            waiting: Deferred[bool] = Deferred.fromCoroutine(other.commit(memoryview(b"1")))
            wanted.hurry()
            await writing
            later.hurry()
            await later.commit(memoryview(b"1234"))
            assert [one.state.offset for one in (wanted, later, other)] == [2, 4, 0]
            assert not waiting.called
        await waiting
        assert other.state.offset == 1

    async def test_nothing_new(self) -> None:
        """Who leaves without having brought anything waits for no thread."""
        store = self.make_store(threads=1)
        upload = await uploaded(store, b"123")
        with self.busy(store):
            await upload.commit(NOTHING)

    async def test_urgent_calls_at_the_end(self) -> None:
        """A store that stops waits for them."""
        store = self.make_store(threads=1)
        upload = await uploaded(store, b"")
        upload.hurry()
        writing: Deferred[bool] = Deferred.fromCoroutine(upload.commit(memoryview(b"123")))
        await store.stop()
        assert writing.called
        store = self.make_store()
        assert (await store.look_at_upload(upload.id)).offset == 3


class ReadingTests(LocalCase):
    """Thousands of uploads that nobody continues."""

    async def left(self, count: int) -> list[str]:
        """Uploads of an earlier run."""
        store = self.make_store(durability="none", quota=QUOTA)
        uploads = [await uploaded(store, b"123", 9) for _ in range(count)]
        await store.stop()
        for upload in uploads:
            os.utime(self.root / ".lwstwisted" / "uploads" / upload.id, (0, 0))
        return [upload.id for upload in uploads]

    async def test_read_once(self) -> None:
        """To count bytes, to look for concatenations and to sweep, each record is opened once; and again when it has
        changed."""
        ids = await self.left(5)
        with traced("-e", "trace=openat") as lines:
            store = self.make_store(durability="none", quota=QUOTA)
            await store.list_with_parts()
            await store.sweep_uploads()
            await store.sweep_uploads()
        opened = [id for line in lines for id in ids if f'"{id}"' in line]
        assert sorted(opened) == sorted(ids)
        await (await held(store, ids[0])).keep({"parts": ["x"]}, 9)
        assert await store.list_with_parts() == [ids[0]]
        os.unlink(self.root / ".lwstwisted" / "uploads" / ids[1])
        await store.sweep_uploads()
        assert ids[1].encode() not in store._records._known

    async def test_files_are_not_remembered(self) -> None:
        """What has become a file costs a sweep neither a look into its record nor memory, until it has expired."""
        store = self.make_store(durability="none")
        kept, expired = await uploaded(store, b"123", 3), await store.begin_upload({}, 3, 1)
        await expired.commit(memoryview(b"123"))
        for upload in (kept, expired):
            await upload.name_it((upload.id,))
            await upload.release()
        path = self.root / ".lwstwisted" / "uploads"
        os.utime(path / expired.id, (0, 0))  # as it has no other time after a crash behind the name
        now = time.time()
        self.patch(waiting, "_now", lambda: now + 60)
        with traced("-e", "trace=openat") as lines:
            assert await store.sweep_uploads() == 1
        assert [line for line in lines if f'"{kept.id}"' in line] == []
        assert os.listdir(path) == [kept.id]
        assert kept.id.encode() not in store._records._known
        self.patch(waiting, "_now", lambda: now + 2 * DAY)
        assert await store.sweep_uploads() == 1
        assert os.listdir(path) == []

    async def test_changes_in_one_tick(self) -> None:
        """A record that was read just when it was written is read again: its time says nothing of what came behind."""
        store = self.make_store(durability="none")
        upload = await uploaded(store, b"123", 9)
        path = self.root / ".lwstwisted" / "uploads" / upload.id
        assert await store.list_with_parts() == []
        status = os.stat(path)
        await upload.keep({"parts": ["x"]}, 9)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert await store.list_with_parts() == [upload.id]


class SyncTests(LocalCase):
    """A disk that fails to keep what it was given."""

    async def failing(self, nth: int, store: LocalStore, work: Callable[[], Any], error: str = "EIO") -> list[str]:
        with traced("-e", "trace=fsync", "-e", f"inject=fsync:error={error}:when={nth}") as lines:
            assert await refusal_of(work()) in (errors.STORE_FAILED, errors.DISK_FULL)
        return [line for line in lines if "fsync(" in line]

    async def test_never_told(self) -> None:
        """What a failed sync was for is not told to be durable: not now, not by others, not by the next one."""
        for nth in (1, 2):
            store = self.make_store(threads=1)
            upload = await uploaded(store, b"kept, ", 10)
            lines = await self.failing(nth, store, lambda: upload.commit(memoryview(b"lost")))  # noqa: B023
            assert len(lines) == nth
            assert isinstance(store.failure, OSError)
            with traced("-e", "trace=fsync") as lines:
                for work in (upload.commit(NOTHING), upload.checkpoint(), upload.append(memoryview(b"x"))):
                    assert await refusal_of(work) is errors.STORE_FAILED
            assert not any("fsync(" in line for line in lines)
            assert upload.state.offset == (await store.look_at_upload(upload.id)).offset == 6
            await upload.release()
            upload = await held(store, upload.id)
            assert upload.state.offset == 6
            await upload.commit(memoryview(b"then"))
            assert await contents_of(store, upload) == b"kept, then"

    async def test_after_discard(self) -> None:
        """The same request may go on, when what may be lost is cut off and sent again."""
        store = self.make_store(threads=1)
        upload = await uploaded(store, b"kept, ", 10)
        await self.failing(1, store, lambda: upload.commit(memoryview(b"lost")), "ENOSPC")
        assert store.failure is None
        await upload.discard()
        await upload.commit(memoryview(b"then"))
        assert await contents_of(store, upload) == b"kept, then"

    async def test_record(self) -> None:
        """A record that could not be synced is what it was, for this process and the next one."""
        store = self.make_store(threads=1, quota=1000)
        upload = await uploaded(store, b"12345")
        await self.failing(1, store, lambda: upload.keep({"changed": 1}, 500))
        await upload.release()
        state = await store.look_at_upload(upload.id)
        assert (state.record, state.length) == ({}, None)
        await require_room(store, 995)

    async def test_birth(self) -> None:
        """An upload that could not be made durable never was."""
        store = self.make_store(threads=1, quota=1000)
        for nth in (1, 2):
            await self.failing(nth, store, lambda: store.begin_upload({}, 10, DAY))
            assert await store.list_uploads() == []
            assert os.listdir(self.root / ".lwstwisted" / "uploads") == []
        await require_room(store, 1000)

    async def test_name(self) -> None:
        """A file whose name could not be made durable has none, and gets it the next time."""
        store = self.make_store(threads=1, quota=1000)
        for nth, is_visible in ((1, False), (2, False), (3, True)):
            upload = await uploaded(store, b"file", 4)
            await self.failing(nth, store, lambda: upload.name_it((f"{nth}",)))  # noqa: B023
            assert upload.state.named is None
            assert (f"{nth}" in await names_in(store)) is is_visible
            await upload.release()
            upload = await held(store, upload.id)
            with traced("-e", "trace=fsync") as lines:
                await upload.name_it((f"{nth}",))
            # A name that a crash, or a failure, has left is synced before anybody is told of it.
            assert any(f"<{self.root}>" in line for line in lines), lines
            assert await get(store, (f"{nth}",)) == b"file"
            await require_room(store, 1000 - 4 * nth)

    async def test_replacement(self) -> None:
        """A replacement whose folder could not be synced is never told to be durable by this process."""
        store = self.make_store(threads=1)
        await put(store, ("file",), b"old")
        upload = await uploaded(store, b"file", 4)
        await self.failing(2, store, lambda: upload.name_it(("file",)))
        assert await get(store, ("file",)) == b"file"
        await upload.release()
        upload = await held(store, upload.id)
        with traced("-e", "trace=fsync") as lines:
            assert await refusal_of(upload.name_it(("file",))) is errors.STORE_FAILED
        assert not any("fsync(" in line for line in lines)

    async def test_name_beyond_the_number(self) -> None:
        """Bytes that are a file already are never cut off, though their number could not be noted: the next one to ask
        finds the file."""
        for is_new in (True, False):
            store = self.make_store(threads=1)
            if not is_new:
                await put(store, ("file",), b"old")
            upload = await uploaded(store, b"1", 3, target=("file",))
            await upload.append(memoryview(b"23"))
            # The record fails, and so does what would be noted instead.
            with traced("-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=3+"):
                assert await refusal_of(upload.name_it(("file",))) is errors.STORE_FAILED
            assert upload.state.offset == 1
            assert await get(store, ("file",)) == b"123"
            assert await refusal_of(upload.discard()) is errors.STORE_FAILED
            await upload.release()
            assert await get(store, ("file",)) == b"123"
            upload = await held(store, upload.id)
            assert upload.state.named is not None
            assert await get(store, ("file",)) == b"123"
            await store.delete(("file",))

    async def test_unsynced_name(self) -> None:
        """Last bytes whose sync fails, together with the name or before, are no file and don't count."""
        store = self.make_store(threads=1)
        upload = await uploaded(store, b"1", 3)
        await upload.append(memoryview(b"23"))
        lines = await self.failing(1, store, lambda: upload.name_it(("file",)))
        assert len(lines) == 1
        assert (upload.state.offset, await names_in(store)) == (1, [])
        assert await refusal_of(upload.name_it(("file",))) is errors.STORE_FAILED
        await upload.discard()
        await upload.append(memoryview(b"45"))
        await upload.name_it(("file",))
        assert await get(store, ("file",)) == b"145"

    async def test_name_that_a_crash_has_left(self) -> None:
        """A start notes it, before others change the name: an old upload never comes back in their place."""
        for at, is_deleted in enumerate((False, True)):
            store, name = self.make_store(threads=1), (f"{at}",)
            upload = await uploaded(store, b"old", 3, target=name)
            await self.failing(3, store, lambda: upload.name_it(name))  # noqa: B023
            await store.stop()
            store = self.make_store(threads=1)
            if is_deleted:
                await store.delete(name)
            else:
                await put(store, name, b"newer")
            upload = await held(store, upload.id)
            assert upload.state.named is not None
            await upload.name_it(name)
            assert tree_of(self.root).get(f"{at}") == (None if is_deleted else b"newer")

    async def test_named_and_cancelled(self) -> None:
        """Cancelled between its name and the note of that, an upload leaves a file, which counts as one."""
        store = self.make_store(threads=1, quota=1000)
        upload = await uploaded(store, b"file", 4)
        await self.failing(3, store, lambda: upload.name_it(("file",)))
        await upload.release()
        await (await held(store, upload.id)).remove()
        assert await get(store, ("file",)) == b"file"
        await require_room(store, 996)
        await store.delete(("file",))
        await require_room(store, 1000)


class LostTests(LocalCase):
    """What is not there as it was written."""

    def setUp(self) -> None:
        super().setUp()
        self.uploads = self.root / ".lwstwisted" / "uploads"

    async def let_go(self, store: LocalStore, data: bytes = b"12345", length: int | None = 9) -> Path:
        """The record of an upload that nobody holds."""
        upload = await uploaded(store, data, length, a=1)
        await upload.keep({"a": 2}, length)
        await upload.release()
        return self.uploads / upload.id

    async def test_bytes(self) -> None:
        """An upload whose bytes the disk has lost is gone, and an operator is told; no offset speaks of them."""
        store = self.make_store(quota=1000)
        for lose in (lambda data: os.truncate(data, 4), os.unlink):
            path = await self.let_go(store)
            lose(f"{path}.data")
            assert await refusal_of(store.look_at_upload(path.name)) is errors.UPLOAD_NOT_FOUND
            with self.logged() as logged:
                assert await refusal_of(store.open_upload(path.name)) is errors.UPLOAD_NOT_FOUND
            assert path.name in str(logged), logged
            assert list(self.uploads.iterdir()) == []
            await require_room(store, 1000)

    @contextmanager
    def logged(self) -> Iterator[list[str]]:
        """Gather what the store complains of."""
        lines: list[str] = []

        def gather(event: dict[str, Any]) -> None:
            if event["log_level"] >= LogLevel.error:
                lines.append(formatEvent(event))

        globalLogPublisher.addObserver(gather)
        try:
            yield lines
        finally:
            globalLogPublisher.removeObserver(gather)

    async def test_lost_bytes_are_swept(self) -> None:
        """Nobody has to ask for such an upload."""
        store = self.make_store()
        path = await self.let_go(store)
        os.unlink(f"{path}.data")
        with self.logged() as logged:
            await store.sweep_uploads()
        assert (len(logged), list(self.uploads.iterdir())) == (1, [])

    async def test_surplus(self) -> None:
        """Bytes behind the offset were never counted: they are cut off."""
        store = self.make_store()
        path = await self.let_go(store)
        with open(f"{path}.data", "ab") as data:
            data.write(b"surplus")
        upload = await held(store, path.name)
        await upload.commit(memoryview(b"6789"))
        assert await contents_of(store, upload) == b"123456789"

    async def test_torn_lines(self) -> None:
        """A line of the record that a power cut has torn is none: the one before counts, and the next one is whole."""
        line = b'{"record": {"a": 3}, "length": 9, "lifetime": 100.0, "named": null}\n'
        whole_but_torn = [bytes(len(line) - 20) + line[-20:], b"[]\n", b"\n", b"1\n", b'{"record": {}}\n', b"\xff\n"]
        for torn in (*(line[:at] for at in range(1, len(line))), *whole_but_torn):
            store = self.make_store(durability="none")
            path = await self.let_go(store)
            with open(path, "ab") as record:
                record.write(torn)
            assert (await store.look_at_upload(path.name)).record == {"a": 2}, torn
            upload = await held(store, path.name)
            await upload.keep({"a": 4}, 9)
            await upload.release()
            assert (await store.look_at_upload(path.name)).record == {"a": 4}, torn
            await store.stop()

    async def test_no_record(self) -> None:
        """A record that says nothing is none, and is not touched; bytes without a record are nobody's."""
        store = self.make_store(quota=1000)
        for text in (b"", b"0", b"\0" * 100, b"x" * 21 + b"\n{}\n", b"\xff" * 4096):
            path = await self.let_go(store)
            path.write_bytes(text)
            assert await refusal_of(store.look_at_upload(path.name)) is errors.UPLOAD_NOT_FOUND
            assert await refusal_of(store.open_upload(path.name)) is errors.UPLOAD_NOT_FOUND
            assert await store.sweep_uploads() == 0
            assert path.read_bytes() == text
            path.unlink()
            await store.sweep_uploads()
            assert list(self.uploads.iterdir()) == []

    async def test_what_is_not_ours(self) -> None:
        """Other names beside the uploads are left alone."""
        store = self.make_store()
        for name in ("notes", "0" * 31, "A" * 32, f"{'0' * 32}.old", "notes.data"):
            (self.uploads / name).write_bytes(b"mine")
        before = sorted(self.uploads.iterdir())
        await store.sweep_uploads()
        assert (await store.list_uploads(), sorted(self.uploads.iterdir())) == ([], before)

    async def test_links(self) -> None:
        """A link in place of a record or of the bytes is not followed."""
        store = self.make_store()
        (self.root / "secret").write_bytes(b"secret")
        (self.uploads / ("0" * 32)).symlink_to(self.root / "secret")
        assert await refusal_of(store.open_upload("0" * 32)) is errors.NOT_A_FILE
        path = await self.let_go(store)
        os.unlink(f"{path}.data")
        Path(f"{path}.data").symlink_to(self.root / "secret")
        assert await refusal_of(store.open_upload(path.name)) is errors.NOT_A_FILE
        assert (self.root / "secret").read_bytes() == b"secret"


class DescriptorTests(LocalCase):
    """What uploads hold of this process."""

    async def test_backup_by_links(self) -> None:
        """A backup that links all files, those of uploads too, doesn't make bytes count that were taken back."""
        store = self.make_store()
        upload = await uploaded(store, b"good", 100)
        backup = self.root.parent / f"{self.root.name}-backup"
        self.addCleanup(shutil.rmtree, backup)
        shutil.copytree(self.root, backup, copy_function=os.link)
        await upload.append(memoryview(b"bad"))
        await upload.discard()
        assert upload.state.offset == 4
        await upload.append(memoryview(b"lost with its holder"))
        await upload.release()
        again = await held(store, upload.id)
        await again.append(memoryview(b"!"))
        await again.commit(memoryview(b""))
        assert again.state.offset == 5

    async def test_missing_bytes(self) -> None:
        """What isn't whole can't have a name, whoever asks for it."""
        store = self.make_store()
        upload = await uploaded(store, b"123", 5)
        assert await refusal_of(upload.name_it(("a",))) is errors.STORE_FAILED
        assert await names_in(store) == []

    async def test_renewed_again_and_again(self) -> None:
        """A record that is only renewed grows by nothing."""
        store = self.make_store()
        upload = await uploaded(store, b"123", 5, said="x" * 1000)
        record = self.root / ".lwstwisted" / "uploads" / upload.id
        before, size = upload.state.expires, record.stat().st_size
        for _ in range(10):
            await upload.keep(upload.state.record, 5)
        assert record.stat().st_size == size
        assert upload.state.expires >= before

    async def test_asked_in_vain(self) -> None:
        """Who may not have the name is refused without a look at the bytes, however often he asks."""
        store = self.make_store()
        upload = await uploaded(store, b"12345", 5)
        reads, pread = [], os.pread
        self.patch(os, "pread", lambda *what: reads.append(what) or pread(*what))
        for _ in range(3):
            refused = upload.name_it(("a",), refuse_all, {"sha256": b"?"})
            assert await refusal_of(refused) is errors.PRECONDITION_FAILED
        assert [what for what in reads if what[1] == 5] == []

    async def test_stopped_in_a_sweep(self) -> None:
        """A store that stops leaves the rest of what has expired to its next start."""
        store = self.make_store()
        for _ in range(20):
            await (await store.begin_upload({}, 5, -1)).release()
        removed, sweep_one = list[bytes](), waiting.sweep_one

        def stop_behind_three(tree: Tree, id: bytes) -> int:
            removed.append(id)
            store._records.stopping = len(removed) == 3
            return sweep_one(tree, id)

        self.patch(waiting, "sweep_one", stop_behind_three)
        assert await store.sweep_uploads() == len(removed) == 3

    async def test_descriptors(self) -> None:
        """One that is held has two, one that waits has none; whatever is refused leaves none."""
        store = self.make_store()
        idle = open_beneath(self.root)
        uploads = [await uploaded(store, b"12345", 5) for _ in range(3)]
        assert len(open_beneath(self.root) - idle) == 6
        for upload in uploads:
            assert await store.open_upload(upload.id) is None
            await refusal_of(upload.name_it(("a", "b"), refuse_all))
        assert len(open_beneath(self.root) - idle) == 6
        await uploads[0].release()
        await uploads[1].remove()
        await uploads[2].name_it(("named",))
        assert len(open_beneath(self.root) - idle) == 1
        for work in (store.open_upload("0" * 32), store.look_at_upload("0" * 32), store.begin_upload({}, 1, DAY, ())):
            await refusal_of(work)
        await store.look_at_upload(uploads[0].id)
        await store.sweep_uploads()
        assert len(open_beneath(self.root) - idle) == 1
        await store.stop()
        assert open_beneath(self.root) == set()

    async def test_cancelled_calls(self) -> None:
        """Of an upload that nobody hears of nothing is left; one that was opened for nobody is free."""
        store = self.make_store()
        upload = await uploaded(store, b"x")
        await upload.release()
        idle = open_beneath(self.root)
        for work in (store.begin_upload({}, 1, DAY), store.open_upload(upload.id)):
            call = Deferred.fromCoroutine(work)
            call.cancel()
            await self.assertFailure(call, CancelledError)
        assert open_beneath(self.root) == idle
        assert await store.list_uploads() == [upload.id]
        assert await store.open_upload(upload.id) is not None


class ReserveTests(LocalCase):
    """Space on a small disk."""

    def setUp(self) -> None:
        super().setUp()
        self.mount(self.root, "size=8m")

    async def test_announced_bytes_are_reserved(self) -> None:
        """Who was let in has its space, whoever comes then; also after bytes were taken back, or another request."""
        store = self.make_store()
        upload = await store.begin_upload({}, 5 * MIB, DAY)
        assert await refusal_of(store.begin_upload({}, 5 * MIB, DAY)) is errors.DISK_FULL
        await upload.append(memoryview(bytes(MIB)))
        await upload.discard()
        await upload.append(memoryview(bytes(MIB)))
        await upload.release()
        upload = await held(store, upload.id)
        while True:
            filling = await store.create((f"{os.urandom(8).hex()}",), None)
            try:
                await filling.commit(memoryview(bytes(MIB // 4)))
            except Refused as refused:
                assert refused.refusal is errors.DISK_FULL
                break
        await upload.commit(memoryview(bytes(5 * MIB)))
        assert (await upload.name_it(("file",))).created is True
        await store.stop()

    async def test_minimum_free(self) -> None:
        """No upload takes the last of the disk, whether its length is known or not; removed ones give it back."""
        minimum = 4 * MIB
        store = self.make_store(minimum_free=minimum)
        for length in (3 * MIB, None):
            upload = await store.begin_upload({}, length, DAY)
            await upload.append(memoryview(bytes(2 * MIB)))
            assert await refusal_of(store.begin_upload({}, 2 * MIB, DAY)) is errors.DISK_FULL
            if length is None:
                assert await refusal_of(upload.append(memoryview(bytes(3 * MIB)))) is errors.DISK_FULL
                assert await refusal_of(upload.keep({}, 5 * MIB)) is errors.DISK_FULL
                await upload.keep({}, 3 * MIB)
                assert await refusal_of(store.begin_upload({}, 2 * MIB, DAY)) is errors.DISK_FULL
            await upload.remove()
            disk = os.statvfs(self.root)
            assert disk.f_bavail * disk.f_frsize > minimum + 3 * MIB
        # Small ones as well: whoever was told that there is space has it.
        small: list[StoredUpload] = []
        with contextlib.suppress(Refused):
            while True:
                small.append(await store.begin_upload({}, 60_000, DAY))
        assert 0 < len(small) < disk.f_bavail * disk.f_frsize / 60_000
        for upload in small:
            await upload.commit(memoryview(bytes(60_000)))
        disk = os.statvfs(self.root)
        assert disk.f_bavail * disk.f_frsize >= minimum
        await store.stop()

    async def test_disk_full(self) -> None:
        """What fits is kept, and the upload goes on when there is space again."""
        store = self.make_store()
        upload = await uploaded(store, bytes(4 * MIB))
        other = await store.create(("other",), None)
        await other.commit(memoryview(bytes(3 * MIB)))
        assert await refusal_of(upload.append(memoryview(bytes(2 * MIB)))) is errors.DISK_FULL
        await upload.discard()
        assert upload.state.offset == 4 * MIB
        await store.delete(("other",))
        await upload.commit(memoryview(bytes(2 * MIB)))
        assert await contents_of(store, upload) == bytes(6 * MIB)
        await store.stop()


HOLDER = """
import sys, time
from pathlib import Path
from lwstwisted.stores.resumable import UploadFile
from lwstwisted.stores.tree import Tree
from lwstwisted.stores.space import Space
tree = Tree(Path(sys.argv[1]), "full", True)
tree.space = Space(tree.partial, 0, None)
upload = UploadFile.open(tree, sys.argv[2].encode())
upload.commit(memoryview(b"from another process"))
upload.append(memoryview(b", and more"))
print("holding", flush=True)
while not upload.is_wanted() or sys.argv[3] == "stubborn":
    time.sleep(0.01)
upload.commit(memoryview(b""))
upload.close()
print("let go", flush=True)
"""
"""A process that holds an upload until somebody wants it, or, if it is stubborn, until it is killed."""


class ProcessTests(LocalCase):
    """Two processes and one upload."""

    async def test_polite_holder(self) -> None:
        """The holder sees that it is wanted, makes durable what it has, and lets go."""
        store = self.make_store()
        upload = await uploaded(store, b"")
        await upload.release()
        command = [sys.executable, "-c", HOLDER, str(self.root), upload.id, "polite"]
        with serving(command, cwd=Path(__file__).parent.parent) as process:
            process.wait_for("holding")
            assert (await store.look_at_upload(upload.id)).offset == 20
            assert await store.open_upload(upload.id) is None
            process.wait_for("let go")
        upload = await held(store, upload.id)
        assert await contents_of(store, upload) == b"from another process, and more"

    async def test_killed_holder(self) -> None:
        """A holder that is killed holds nothing from that moment on, and what it had told to be durable is there."""
        store = self.make_store()
        upload = await uploaded(store, b"")
        await upload.release()
        command = [sys.executable, "-c", HOLDER, str(self.root), upload.id, "stubborn"]
        with serving(command, cwd=Path(__file__).parent.parent) as process:
            process.wait_for("holding")
            assert await store.open_upload(upload.id) is None
            assert await store.sweep_uploads() == 0
            process.end(signal.SIGKILL)
            upload = await held(store, upload.id)
        assert (upload.state.offset, upload.is_wanted()) == (20, False)
        assert await contents_of(store, upload) == b"from another process"
