"""Batches on disk: what is asked of the kernel, each fault at each step, and a crash at each step."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from threading import Event
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.threads import deferToThread

from lwstwisted import errors
from lwstwisted.errors import Refusal, Refused
from lwstwisted.interfaces import Name
from lwstwisted.stores.local import LocalBatch, LocalStore
from tests.contracts import NOTHING, get, put, put_into, refusal_of
from tests.servers import PATIENCE
from tests.test_stores_local import WATCHED, LocalCase, open_beneath, partials_of, steps_in, traced, tree_of

Tree = dict[str, bytes | None]

FILES: dict[Name, bytes] = {
    ("replaced",): b"new 1",
    ("new",): b"new 2",
    ("folder", "replaced"): b"new 3",
    ("made", "deep", "file"): b"",
    ("folder", "new"): b"new 4",
}
"""A batch with files of every kind."""

OLD: Tree = {"folder": None, "folder/replaced": b"old 3", "replaced": b"old 1"}
NEW: Tree = {
    "folder": None,
    "folder/new": b"new 4",
    "folder/replaced": b"new 3",
    "made": None,
    "made/deep": None,
    "made/deep/file": b"",
    "new": b"new 2",
    "replaced": b"new 1",
}


def batches_of(root: Path) -> list[str]:
    """The batches that are under way, or were left."""
    return sorted(os.listdir(root / ".lwstwisted" / "batches"))


def write_old(root: Path) -> None:
    (root / "folder").mkdir(parents=True)
    (root / "replaced").write_bytes(b"old 1")
    (root / "folder" / "replaced").write_bytes(b"old 3")


class BatchTests(LocalCase):
    """Batches under way."""

    async def test_descriptors(self) -> None:
        """A form of 200 files takes two descriptors while it arrives, and none afterwards."""
        for use_tmpfile in (True, False):
            store = self.make_store(use_tmpfile=use_tmpfile)
            idle = open_beneath(self.root)
            committed, discarded = store.batch(), store.batch()
            for number in range(100):
                await put_into(committed, (f"{number}",), b"x")
                await put_into(discarded, (f"{number}",), b"x")
            assert len(open_beneath(self.root) - idle) == 2
            part = await committed.create(("last",), None)
            await part.append(memoryview(b"x"))
            assert len(open_beneath(self.root) - idle) == 3
            await part.commit(NOTHING)
            await discarded.discard()
            assert len(await committed.commit()) == 101
            assert open_beneath(self.root) == idle
            assert (batches_of(self.root), partials_of(self.root)) == ([], [])
            await store.stop()

    async def test_files_look_as_single_ones(self) -> None:
        """Mode, number of links and contents are those of a file that came alone; the old one is gone."""
        store = self.make_store()
        write_old(self.root)
        await put(store, ("single",), b"x")
        batch = store.batch()
        for name, data in FILES.items():
            await put_into(batch, name, data)
        await batch.commit()
        single = (self.root / "single").stat()
        for name, data in FILES.items():
            found = self.root.joinpath(*name)
            assert found.read_bytes() == data
            assert (found.stat().st_mode, found.stat().st_nlink) == (single.st_mode, 1), name

    async def test_cancelled_calls_leak_nothing(self) -> None:
        """Who leaves while the store works for a batch leaves nothing behind."""
        store = self.make_store()
        idle = open_beneath(self.root)
        batch = store.batch()
        call = Deferred.fromCoroutine(batch.create(("a",), None))
        call.cancel()
        await self.assertFailure(call, CancelledError)
        await batch.discard()
        assert open_beneath(self.root) == idle
        assert batches_of(self.root) == []

    async def test_stop_removes_batches(self) -> None:
        """What nobody finished before the end is gone with it."""
        store = self.make_store()
        batch = store.batch()
        await put_into(batch, ("a",), b"a")
        await batch.create(("b",), None)
        assert len(batches_of(self.root)) == 1
        await store.stop()
        assert (batches_of(self.root), partials_of(self.root), open_beneath(self.root)) == ([], [], set())

    async def test_links_are_not_followed(self) -> None:
        """A symbolic link that comes up during the upload keeps the batch back, and what it leads to is not touched."""
        outside = self.new_folder()
        (outside / "secret").write_bytes(b"secret")
        for name, link, target in (
            (("link",), "link", outside / "secret"),
            (("way", "x"), "way", outside),
        ):
            store = self.make_store()
            batch = store.batch()
            await put_into(batch, ("a",), b"a")
            await put_into(batch, name, b"evil")
            (self.root / link).symlink_to(target)
            assert await refusal_of(batch.commit()) is errors.NOT_A_FILE
            (self.root / link).unlink()
            assert tree_of(self.root) == {}
        assert tree_of(outside) == {"secret": b"secret"}

    def put_by_hand(self, name: str, data: bytes) -> None:
        """What a person or a program does that knows of no locks."""
        (self.root / ".hand").write_bytes(data)
        (self.root / ".hand").rename(self.root / name)

    async def test_somebody_changes_a_name(self) -> None:
        """A file that is put there by hand between the look and the replacement is noticed: all begins anew."""
        write_old(self.root)
        store = self.make_store()
        for name in (("replaced",), ("new",)):
            batch = store.batch()
            await put_into(batch, ("first", name[0]), b"first")
            await put_into(batch, name, b"batch")
            commit, go_on = await self.held_commit(store, batch)
            self.put_by_hand(name[0], b"other")
            go_on.set()
            assert await commit == [True, False]
            assert await get(store, name) == b"batch"
        assert batches_of(self.root) == []

    async def test_others_are_not_undone(self) -> None:
        """What somebody replaced in between is what comes back when the batch fails, not the file before it."""
        write_old(self.root)
        store = self.make_store()
        batch = store.batch()
        await put_into(batch, ("replaced",), b"batch")
        await put_into(batch, ("way", "x"), b"batch")
        commit, go_on = await self.held_commit(store, batch)
        self.put_by_hand("replaced", b"other")
        self.put_by_hand("way", b"other")
        go_on.set()
        assert await refusal_of(commit) is errors.NOT_A_FOLDER
        assert tree_of(self.root) == {**OLD, "replaced": b"other", "way": b"other"}

    async def test_others_wait(self) -> None:
        """A file that comes under a name of the batch during its commit comes after it, and is not lost.

        Another process' store is another one on the same root: the kernel tells them apart by their descriptors.
        """
        store = self.make_store()
        for comer in (store, self.make_store()):
            batch = store.batch()
            await put_into(batch, ("a",), b"batch")
            await put_into(batch, ("b",), b"batch")
            part = await comer.create(("b",), None)
            commit, go_on = await self.held_commit(store, batch)
            asks, naming = Event(), comer._tree.naming

            def ask(paths: Any, asks: Event = asks, naming: Any = naming) -> Any:
                asks.set()
                return naming(paths)

            self.patch(comer._tree, "naming", ask)
            name = Deferred.fromCoroutine(part.commit(memoryview(b"single")))
            await deferToThread(asks.wait, PATIENCE)
            go_on.set()
            assert (len(await commit), await name) == (2, False)
            assert tree_of(self.root) == {"a": b"batch", "b": b"single"}

    async def test_taking_back_fails_too(self) -> None:
        """The batch is refused then, and not tried again over its own remains; the next start takes back the rest."""
        write_old(self.root)
        store = self.make_store()
        batch = store.batch()
        await put_into(batch, ("first",), b"batch")
        await put_into(batch, ("replaced",), b"batch")
        commit, go_on = await self.held_commit(store, batch)
        self.put_by_hand("replaced", b"other")

        def fail(*arguments: object) -> None:
            raise OSError(errno.EIO, "the disk is broken")

        self.patch(store._tree, "unmake", fail)
        go_on.set()
        assert await refusal_of(commit) is errors.STORE_FAILED
        assert len(batches_of(self.root)) == 1
        await store.stop()
        self.make_store()
        assert tree_of(self.root) == {**OLD, "replaced": b"other"}
        assert batches_of(self.root) == []

    async def held_commit(self, store: LocalStore, batch: LocalBatch) -> tuple[Deferred[list[bool]], Event]:
        """A commit whose journal is on disk, and that changes the first name when it may go on."""
        held, go_on, sync = Event(), Event(), store._tree.sync_folder

        def hold(descriptor: int) -> None:
            sync(descriptor)
            if not held.is_set() and "journal" in os.listdir(descriptor):
                held.set()
                go_on.wait(PATIENCE)

        self.patch(store._tree, "sync_folder", hold)
        self.addCleanup(go_on.set)
        commit = Deferred.fromCoroutine(batch.commit())
        assert await deferToThread(held.wait, PATIENCE), "the commit never came to its journal"
        return commit, go_on


Disk = dict[str, dict[str, int]]
"""What each folder has: names, and the inodes they lead to."""


class Recorder:
    """Notes what is asked of a file system, and tells what a power cut may leave of it.

    Each folder keeps what it was told up to its last fsync. Of the rest any part may be there or not, whatever other
    folders kept: no file system is worse. A file whose contents were not synced is empty.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[int, bytes | None] = {}
        self.durable: Disk = {str(folder): self.look(folder) for folder in [root, *root.rglob("*")] if folder.is_dir()}
        self.pending: list[tuple[str, dict[str, int | None]]] = []

    def look(self, folder: Path) -> dict[str, int]:
        found = {}
        for path in folder.iterdir():
            found[path.name] = path.stat().st_ino
            self.contents[path.stat().st_ino] = None if path.is_dir() else path.read_bytes()
        return found

    def note(self, folder: int, *names: bytes) -> None:
        """One step has changed these names of a folder."""
        path = Path(os.readlink(f"/proc/self/fd/{folder}"))
        step: dict[str, int | None] = {}
        for name in names:
            one = path / os.fsdecode(name)
            step[one.name] = one.stat().st_ino if one.exists() else None
            if one.is_dir():
                self.contents[one.stat().st_ino] = None
                self.durable.setdefault(str(one), {})
            elif one.exists():
                self.contents.setdefault(one.stat().st_ino, b"" if "journal" in one.name else one.read_bytes())
        self.pending.append((str(path), step))

    def synced(self, folder: int) -> None:
        path = os.readlink(f"/proc/self/fd/{folder}")
        for at, step in self.pending:
            if at == path:
                self.apply(self.durable, at, step)
        self.pending = [(at, step) for at, step in self.pending if at != path]

    def synced_file(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.contents[os.fstat(descriptor).st_ino] = path.read_bytes()

    @staticmethod
    def apply(disk: Disk, folder: str, step: dict[str, int | None]) -> None:
        for name, inode in step.items():
            if inode is None:
                disk[folder].pop(name, None)
            else:
                disk[folder][name] = inode

    def states(self) -> Iterator[Disk]:
        """What may be there after a power cut now: each combination, or many of them."""
        count = len(self.pending)
        choices = range(1 << count) if count <= 6 else [*((1 << n) - 1 for n in range(count + 1)), *self.some(count)]
        for chosen in choices:
            disk = {folder: dict(names) for folder, names in self.durable.items()}
            for at, (folder, step) in enumerate(self.pending):
                if chosen >> at & 1:
                    self.apply(disk, folder, step)
            yield disk

    @staticmethod
    def some(count: int) -> list[int]:
        seeded = Random(count)
        return [seeded.getrandbits(count) for _ in range(30)]

    def write(self, disk: Disk, root: Path) -> None:
        """Make a real tree of a state."""
        written: dict[int, Path] = {}

        def write(folder: str, to: Path) -> None:
            to.mkdir()
            for name, inode in disk[folder].items():
                content = self.contents[inode]
                if content is None:
                    write(f"{folder}/{name}", to / name)
                elif inode in written:
                    os.link(written[inode], to / name)
                else:
                    written[inode] = to / name
                    (to / name).write_bytes(content)

        write(str(self.root), root)


class PowerTests(LocalCase):
    """The power fails in front of each step, and what was not synced is there or not."""

    def record(self, store: LocalStore, recorder: Recorder, cut: Callable[[], object]) -> list[Any]:
        """Have a recorder see each change; ``cut`` is called in front of each and of each sync."""
        link, mkdir, rename, unlink, rmdir = os.link, os.mkdir, os.rename, os.unlink, os.rmdir

        def linked(source: Any, to: Any, **where: Any) -> None:
            cut()
            link(source, to, **where)
            recorder.note(where["dst_dir_fd"], to)

        def made(name: Any, *mode: Any, dir_fd: int) -> None:
            cut()
            mkdir(name, *mode, dir_fd=dir_fd)
            recorder.note(dir_fd, name)

        def renamed(source: Any, to: Any, *, src_dir_fd: int, dst_dir_fd: int) -> None:
            cut()
            rename(source, to, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            if src_dir_fd == dst_dir_fd:
                recorder.note(dst_dir_fd, source, to)
            else:
                recorder.note(dst_dir_fd, to)
                recorder.note(src_dir_fd, source)

        def unlinked(name: Any, *, dir_fd: int) -> None:
            cut()
            unlink(name, dir_fd=dir_fd)
            recorder.note(dir_fd, name)

        def removed(name: Any, *, dir_fd: int) -> None:
            cut()
            rmdir(name, dir_fd=dir_fd)
            recorder.note(dir_fd, name)

        sync_folder, sync_file = store._tree.sync_folder, store._tree.sync_file

        def folder_synced(descriptor: int) -> None:
            cut()
            sync_folder(descriptor)
            recorder.synced(descriptor)

        def file_synced(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            is_journal = path.endswith("/journal.new")
            if is_journal:
                folder = os.open(os.path.dirname(path), os.O_RDONLY)
                recorder.note(folder, b"journal.new")
                os.close(folder)
                cut()
            sync_file(descriptor)
            if is_journal:
                recorder.synced_file(descriptor)

        return [
            self.patch(os, "link", linked),
            self.patch(os, "mkdir", made),
            self.patch(os, "rename", renamed),
            self.patch(os, "unlink", unlinked),
            self.patch(os, "rmdir", removed),
            self.patch(store._tree, "sync_folder", folder_synced),
            self.patch(store._tree, "sync_file", file_synced),
        ]

    @pytest.mark.slow
    async def test_power_cut_at_each_step(self) -> None:
        """All files of a form are there after the next start, or none; once it was answered, all."""
        write_old(self.root)
        store = self.make_store(threads=1)
        recorder = Recorder(self.root)
        cuts: list[tuple[bool, Disk]] = []
        is_answered = False

        def cut() -> None:
            cuts.extend((is_answered, state) for state in recorder.states())

        patches = self.record(store, recorder, cut)
        batch = store.batch()
        for name, data in FILES.items():
            await put_into(batch, name, data)
        await batch.commit()
        is_answered = True
        cut()
        for patch in patches:
            patch.restore()
        assert len(cuts) > 200
        half_done = 0
        above = self.new_folder()
        for number, (was_answered, state) in enumerate(cuts):
            root = above / f"{number}"
            recorder.write(state, root)
            before = tree_of(root)
            half_done += before not in (OLD, NEW)
            await self.make_store(root, durability="none").stop()
            assert tree_of(root) in ([NEW] if was_answered else [OLD, NEW]), (number, before, tree_of(root))
            assert batches_of(root) == []
            shutil.rmtree(root)
        assert half_done > 20


class BatchOrderTests(LocalCase):
    """What is asked of the kernel, and in which order, as strace sees it."""

    async def steps(self, durability: str) -> list[str]:
        root = self.new_folder()
        (root / "replaced").write_bytes(b"old")
        store = self.make_store(root, durability=durability)
        batch = store.batch()
        for name in (("replaced",), ("made", "a"), ("made", "b")):
            await put_into(batch, name, b"x")
        with traced("-e", WATCHED) as lines:
            await batch.commit()
        steps = [re.sub(r"/\.lwstwisted/batches/[0-9a-f]{32}", "BATCH", step) for step in steps_in(lines, root)]
        return [re.sub(r"/\.lwstwisted/batches", "BATCHES", step) for step in steps]

    PREPARED = ["link BATCH/0.old"]
    NAMED = [*("link BATCH/0.swap", "rename /replaced"), *("mkdir /made", "link /made/a", "link /made/b")]
    CLEANED = {"unlink BATCH/0", "unlink BATCH/1", "unlink BATCH/2", "unlink BATCH/0.old"}

    async def test_full(self) -> None:
        """Old files and journal are on disk before a name changes, all names before the journal goes."""
        steps = await self.steps("full")
        steps = [step for step in steps if "ENOENT" not in step]
        assert steps[:-5] == [
            *("unlink BATCH/0.old", "link BATCH/0.old", "unlink BATCH/1.old", "unlink BATCH/2.old"),
            *("fsync BATCHES", "unlink BATCH/journal.new", "pwrite BATCH/journal.new", "fsync BATCH/journal.new"),
            *("rename BATCH/journal", "fsync BATCH"),
            *("unlink BATCH/0.swap", "link BATCH/0.swap", "rename /replaced", "fsync /"),
            *("mkdir /made", "fsync /", "link /made/a", "link /made/b", "fsync /made"),
            *("unlink BATCH/journal", "fsync BATCH"),
        ]
        assert set(steps[-5:]) == {*self.CLEANED, "unlink BATCH"}

    async def test_without_syncs(self) -> None:
        """The same order for the crash of a process, where nothing has to be waited for."""
        steps = await self.steps("none")
        assert not any("sync" in step for step in steps)
        synced = await self.steps("data")
        assert [step for step in synced if "sync" in step] == ["fdatasync BATCH/journal.new"]
        assert [step for step in synced if "sync" not in step][:-5] == steps[:-5]


class BatchFaultTests(LocalCase):
    """Each system call of a batch fails in turn, the first time it is made, the second, and so on."""

    async def upload(self, store: LocalStore) -> Refusal | None:
        """A batch with all its calls; None when it succeeded."""
        batch = store.batch()
        try:
            for name, data in FILES.items():
                part = await batch.create(name, None)
                try:
                    await part.commit(memoryview(data))
                finally:
                    await part.discard()
            assert await batch.commit() == [False, True, False, True, True]
        except Refused as refused:
            return refused.refusal
        finally:
            await batch.discard()
        return None

    async def inject(self, call: str, error: str, nth: int, refusal: Refusal) -> bool:
        """Whether the call was made so often. The faults count for each thread: a new store has new ones."""
        root = self.new_folder()
        write_old(root)
        store = self.make_store(root, threads=1)
        # The reactor begins to run with the first wait, and makes calls of its own then.
        await store.list_folder(())
        with traced("-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={nth}") as lines:
            answer = await self.upload(store)
        await store.stop()
        case = (call, nth, answer)
        assert open_beneath(root) == set(), case
        assert tree_of(root) == (OLD if answer else NEW), case
        assert answer in (None, refusal), case
        await self.make_store(root).stop()
        assert tree_of(root) == (OLD if answer else NEW), case
        assert (partials_of(root), batches_of(root)) == ([], []), case
        return any("(INJECTED)" in line for line in lines)

    async def fail_each(self, call: str, error: str, refusal: Refusal, least: int) -> None:
        nth = 1
        while await self.inject(call, error, nth, refusal):
            nth += 1
        assert nth > least, f"{call} was seen {nth - 1} times"

    @pytest.mark.slow
    async def test_sync(self) -> None:
        """The disk lost what it had promised to keep. All is as before, and the answer is no success."""
        await self.fail_each("fsync", "EIO", errors.STORE_FAILED, 5 + 3 + 5 + 1)

    @pytest.mark.slow
    async def test_link(self) -> None:
        """A name can't be made."""
        await self.fail_each("linkat", "EIO", errors.STORE_FAILED, 5 + 2 + 5)

    async def test_rename(self) -> None:
        """An old file can't be replaced."""
        await self.fail_each("/^rename", "EIO", errors.STORE_FAILED, 3)

    async def test_folder(self) -> None:
        """A folder can't be made."""
        await self.fail_each("mkdirat", "ENOSPC", errors.DISK_FULL, 3)

    async def test_write(self) -> None:
        """The disk is full."""
        await self.fail_each("pwrite64", "ENOSPC", errors.DISK_FULL, 5)

    async def test_mode(self) -> None:
        """A mode can't be set."""
        await self.fail_each("fchmod", "EIO", errors.STORE_FAILED, 5)

    async def test_lock(self) -> None:
        """A batch can't be held."""
        await self.fail_each("flock", "ENOLCK", errors.STORE_FAILED, 1)

    @pytest.mark.slow
    async def test_unlink(self) -> None:
        """What is not needed any more can't be removed: that matters for the journal alone."""
        await self.fail_each("unlinkat", "EIO", errors.STORE_FAILED, 10)

    @pytest.mark.slow
    async def test_look(self) -> None:
        """The disk can't be read."""
        await self.fail_each("newfstatat", "EIO", errors.STORE_FAILED, 10)

    @pytest.mark.slow
    async def test_open(self) -> None:
        """There are no descriptors left."""
        await self.fail_each("openat", "EMFILE", errors.TOO_MANY_FILES, 30)


CRASHES = """
import json, os, signal, sys
from twisted.internet.defer import Deferred
from lwstwisted.loop.reactor import install
from lwstwisted.stores.local import LocalStore

CHANGES = ("os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir")

def crash_at(step):
    # CPython tells a hook of each such call before it makes it.
    def hook(event, arguments):
        nonlocal step
        if event in CHANGES or (event == "open" and arguments[2] & os.O_CREAT):
            step -= 1
            if step < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def upload(root, step, use_tmpfile, files):
    install()
    from twisted.internet import reactor
    store = LocalStore(root, reactor, use_tmpfile=use_tmpfile)
    async def work():
        batch = store.batch()
        for name, data in files:
            part = await batch.create(tuple(name), None)
            await part.commit(memoryview(data.encode()))
        crash_at(step)
        await batch.commit()
        await store.stop()
        os._exit(0)
    def failed(reason):
        reason.printTraceback()
        os._exit(1)
    reactor.callWhenRunning(lambda: Deferred.fromCoroutine(work()).addErrback(failed))
    reactor.run()

def start(root, step):
    install()
    from twisted.internet import reactor
    crash_at(step)
    LocalStore(root, reactor)
    os._exit(0)

task = json.load(sys.stdin)
ends = []
for root, step in task["crashes"]:
    pid = os.fork()
    if pid == 0:
        try:
            if task["files"]:
                upload(root, step, task["use_tmpfile"], task["files"])
            else:
                start(root, step)
        finally:
            os._exit(2)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(ends))
"""
"""Processes that kill themselves (SIGKILL) in front of a change of the file system: one fork for each step."""


class CrashTests(LocalCase):
    """``kill -9`` in the middle."""

    def crash(self, crashes: list[tuple[Path, int]], files: dict[Name, bytes], use_tmpfile: bool = True) -> list[int]:
        """Run a process for each pair of root and step.

        :param files: what it commits; without any, it only starts.
        :returns: how each ended: 0 if there were fewer steps.
        """
        task = {
            "crashes": [(str(root), step) for root, step in crashes],
            "files": [(name, data.decode()) for name, data in files.items()],
            "use_tmpfile": use_tmpfile,
        }
        done = subprocess.run(
            [sys.executable, "-c", CRASHES],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=120,
            cwd=Path(__file__).parent.parent,
        )
        assert done.returncode == 0, done.stderr
        ends: list[int] = json.loads(done.stdout)
        assert set(ends) <= {0, -9}, (ends, done.stderr)
        return ends

    def roots(self, count: int) -> list[Path]:
        roots = [self.new_folder() for _ in range(count)]
        for root in roots:
            write_old(root)
        return roots

    STEPS = 50
    """More than a commit has."""

    @pytest.mark.slow
    async def test_commit_crashes_at_each_step(self) -> None:
        """Either all files of a form are there after the next start, or everything is as it was before."""
        for use_tmpfile in (True, False):
            roots = self.roots(self.STEPS)
            ends = self.crash(list(zip(roots, range(self.STEPS), strict=True)), FILES, use_tmpfile)
            steps = ends.index(0)
            assert 20 < steps < self.STEPS and set(ends[steps:]) == {0}, ends
            seen = []
            half_done = 0
            for root in roots[: steps + 1]:
                half_done += tree_of(root) not in (OLD, NEW)
                await self.make_store(root).stop()
                assert tree_of(root) in (OLD, NEW), root
                assert (partials_of(root), batches_of(root)) == ([], [])
                seen.append(tree_of(root) == NEW)
            # Nothing up to the commit point and everything behind it; and there was something to take back.
            assert seen == sorted(seen)
            assert (seen[0], seen[-1]) == (False, True)
            assert half_done >= 5

    @pytest.mark.slow
    async def test_recovery_crashes_at_each_step(self) -> None:
        """A start that is interrupted in the middle of taking back is followed by one that takes back the rest."""
        roots = self.half_done(self.STEPS)
        ends = self.crash(list(zip(roots, range(self.STEPS), strict=True)), {})
        steps = ends.index(0)
        assert steps > 8, ends
        for root in roots[: steps + 1]:
            await self.make_store(root).stop()
            assert tree_of(root) == OLD
            assert (partials_of(root), batches_of(root)) == ([], [])

    async def test_what_others_did_since_stays(self) -> None:
        """Between the crash and the next start somebody replaced one file and deleted another: that holds."""
        (root,) = self.half_done()
        (root / "aside").write_bytes(b"other")
        (root / "aside").rename(root / "replaced")
        (root / "new").unlink()
        await self.make_store(root).stop()
        assert tree_of(root) == {**OLD, "replaced": b"other"}
        assert batches_of(root) == []

    async def test_link_on_the_way_stays(self) -> None:
        """A folder that became a link since the crash is not walked through."""
        (root,), outside = self.half_done(), self.new_folder()
        (root / "folder").rename(outside / "folder")
        (root / "folder").symlink_to(outside / "folder")
        before = tree_of(outside)
        await self.make_store(root).stop()
        assert tree_of(outside) == before
        assert (root / "replaced").read_bytes() == b"old 1"

    async def test_owner_lives(self) -> None:
        """A second process that starts takes nothing back from one that is in the middle of a commit."""
        (root,) = self.half_done()
        (left,) = (root / ".lwstwisted" / "batches").iterdir()
        before = tree_of(root)
        descriptor = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            await self.make_store(root).stop()
            assert tree_of(root) == before
        finally:
            os.close(descriptor)
        await self.make_store(root).stop()
        assert tree_of(root) == OLD

    async def test_only_our_own_is_removed(self) -> None:
        """A folder of another name, a foreign file in ours and a journal that can't be read stay where they are."""
        await self.make_store().stop()
        batches = self.root / ".lwstwisted" / "batches"
        for name in ("notes", "0" * 32, "1" * 32, "2" * 32):
            (batches / name).mkdir()
        (batches / ("0" * 32) / "0").write_bytes(b"left")
        (batches / ("1" * 32) / "notes").write_bytes(b"foreign")
        (batches / ("2" * 32) / "journal").write_bytes(b'{"folders": [], "targets": [["..", "x"]]}')
        store = self.make_store()
        assert batches_of(self.root) == ["1" * 32, "2" * 32, "notes"]
        await put(store, ("file",), b"x")

    def half_done(self, count: int = 1) -> list[Path]:
        """Roots whose store was killed when all names were given, in front of the commit point."""
        probes = self.roots(self.STEPS)
        self.crash(list(zip(probes, range(self.STEPS), strict=True)), FILES)
        step = max(at for at, root in enumerate(probes) if list(root.glob(".lwstwisted/batches/*/journal")))
        assert tree_of(probes[step]) == NEW
        roots = self.roots(count)
        self.crash([(root, step) for root in roots], FILES)
        return roots
