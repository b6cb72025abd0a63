"""What uploads may take of the disk: promises, a minimum that stays free, a quota that processes share."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest import skipUnless

from twisted.trial.unittest import TestCase

from lwstwisted import errors
from lwstwisted.errors import Refusal, Refused
from lwstwisted.stores import locks
from lwstwisted.stores.space import RESERVED_FROM, Reservation, Space, fallocate
from tests.contracts import NOTHING, put, put_into, refusal_of, together
from tests.test_stores_local import LocalCase, open_beneath

MIB = 1024 * 1024
TOP = Path(__file__).parent.parent


class PromiseTests(LocalCase):
    """Announced bytes are kept for who announced them."""

    def say_free(self, count: int) -> None:
        """Let a disk have so many bytes free, whatever else happens on it."""
        disk = SimpleNamespace(f_blocks=1 << 40, f_frsize=1, f_bavail=count)
        self.patch(os, "fstatvfs", lambda _: disk)

    async def test_promised_once(self) -> None:
        """Two uploads that fit alone and not together: the second one is refused, until the first is over."""
        self.say_free(600 * MIB)
        store = self.make_store(minimum_free=88 * MIB)
        first = await store.create(("first",), 300 * MIB)
        assert await refusal_of(store.create(("second",), 300 * MIB)) is errors.DISK_FULL
        small = await store.create(("small",), MIB)
        await first.discard()
        second = await store.create(("second",), 300 * MIB)
        for part in (small, second):
            await part.discard()

    async def test_given_back_once(self) -> None:
        """However an upload ends, what it was promised is there again, and not twice."""
        store = self.make_store(minimum_free=0)
        for name, announced, sent in (("whole", 3, 3), ("large", 2 * RESERVED_FROM, 2 * RESERVED_FROM)):
            part = await store.create((name,), announced)
            await part.append(memoryview(bytes(sent // 2)))
            await part.commit(memoryview(bytes(sent - sent // 2)))
            await part.discard()
        cut = await store.create(("cut",), 2 * RESERVED_FROM)
        await cut.append(memoryview(bytes(1000)))
        await cut.discard()
        await cut.discard()
        await (await store.create(("never",), 1000)).discard()
        assert await refusal_of(store.create(("huge",), 1 << 60)) is errors.DISK_FULL
        unknown = await store.create(("unknown",), None)
        await unknown.append(memoryview(bytes(1000)))
        await unknown.commit(NOTHING)
        assert store._tree.space._promised == 0

    async def test_minimum(self) -> None:
        """What has to stay free stays, also from an upload that doesn't say how long it is; nothing of that is left."""
        self.say_free(100)
        store = self.make_store(minimum_free=100)
        assert await refusal_of(store.create(("file",), 1)) is errors.DISK_FULL
        part = await store.create(("file",), None)
        assert await refusal_of(part.append(memoryview(b"x"))) is errors.DISK_FULL
        assert await refusal_of(part.commit(NOTHING)) is errors.STORE_FAILED
        assert await put(store, ("empty",), b"")
        assert os.listdir(self.root / ".lwstwisted" / "partial") == []

    async def test_blocks_are_reserved(self) -> None:
        """A long upload has its blocks from its first bytes on, and its size grows with what was written."""
        with tempfile.TemporaryFile(dir=self.root) as probe:
            if not fallocate(probe.fileno(), 1):
                self.skipTest("this file system has no fallocate")
        store = self.make_store(use_tmpfile=False)
        part = await store.create(("file",), 8 * MIB)
        await part.append(memoryview(bytes(1000)))
        (name,) = os.listdir(self.root / ".lwstwisted" / "partial")
        found = (self.root / ".lwstwisted" / "partial" / name).stat()
        assert (found.st_size, found.st_blocks * 512 >= 8 * MIB) == (1000, True)
        await part.discard()


class QuotaTests(LocalCase):
    """Bytes that all files may take together."""

    async def test_counted(self) -> None:
        """New files count, a replacement counts for the difference, and a deletion gives back."""
        store = self.make_store(quota=1000)
        await put(store, ("a",), bytes(600))
        assert await refusal_of(store.create(("b",), 401)) is errors.QUOTA_EXCEEDED
        await put(store, ("b",), bytes(400))
        assert await refusal_of(store.create(("c",), 1)) is errors.QUOTA_EXCEEDED
        await store.delete(("b",))
        await put(store, ("a",), bytes(300))  # both are there for a moment: 600 and 300
        await put(store, ("c",), bytes(700))
        assert await refusal_of(store.create(("d",), 1)) is errors.QUOTA_EXCEEDED
        await put(store, ("d",), b"")

    async def test_never(self) -> None:
        """What could never be stored is too large, and not only too much now."""
        store = self.make_store(quota=1000)
        assert await refusal_of(store.create(("a",), 1001)) is errors.BODY_TOO_LARGE

    async def test_unannounced(self) -> None:
        """An upload that doesn't say how long it is counts with each write, and gives all back when it is refused."""
        store = self.make_store(quota=1000)
        part = await store.create(("a",), None)
        await part.append(memoryview(bytes(900)))
        assert await refusal_of(store.create(("b",), 101)) is errors.QUOTA_EXCEEDED
        assert await refusal_of(part.append(memoryview(bytes(101)))) is errors.QUOTA_EXCEEDED
        await put(store, ("b",), bytes(1000))

    async def test_race(self) -> None:
        """64 uploads of nine tenths of the quota at once: one of them is stored."""
        store = self.make_store(quota=1_000_000)

        async def upload(number: int) -> Refusal | None:
            try:
                await put(store, (f"{number}",), bytes(900_000))
            except Refused as refused:
                return refused.refusal
            return None

        answers = await together(*(upload(number) for number in range(64)))
        assert (answers.count(None), answers.count(errors.QUOTA_EXCEEDED)) == (1, 63)

    async def test_form(self) -> None:
        """A batch counts like single files, and one that is refused or forgotten gives everything back."""
        store = self.make_store(quota=1000)
        await put(store, ("old",), bytes(100))
        for commits in (False, True):
            batch = store.batch()
            await put_into(batch, ("old",), bytes(200))
            await put_into(batch, ("new",), bytes(600))
            assert await refusal_of(store.create(("x",), 101)) is errors.QUOTA_EXCEEDED
            if commits:
                assert await batch.commit() == [False, True]
            await batch.discard()
        assert await refusal_of(store.create(("x",), 201)) is errors.QUOTA_EXCEEDED
        await put(store, ("x",), bytes(200))

    async def test_name_withdrawn(self) -> None:
        """A name that is taken back, as its folder can't be synced, is not counted."""
        store = self.make_store(quota=1000)
        sync, broken = store._tree.sync_folder, True

        def fail(descriptor: int) -> None:
            if broken:
                raise OSError(5, "the disk is broken")
            sync(descriptor)

        self.patch(store._tree, "sync_folder", fail)
        assert await refusal_of(put(store, ("a",), bytes(900))) is errors.STORE_FAILED
        broken = False
        await put(store, ("a",), bytes(900))

    async def test_start(self) -> None:
        """Whoever starts alone counts what is there, however it came; who starts beside another one relies on that."""
        (self.root / "a" / "b").mkdir(parents=True)
        (self.root / "a" / "b" / "file").write_bytes(bytes(500))
        (self.root / "link").symlink_to("a/b/file")
        first = self.make_store(quota=1000)
        second = self.make_store(quota=1000)
        held = await first.create(("held",), 300)
        assert await refusal_of(second.create(("x",), 201)) is errors.QUOTA_EXCEEDED
        third = self.make_store(quota=1000)
        assert await refusal_of(third.create(("x",), 201)) is errors.QUOTA_EXCEEDED
        for store in (first, second, third):
            await store.stop()
        await held.discard()
        (self.root / "by hand").write_bytes(bytes(100))
        store = self.make_store(quota=1000)
        assert await refusal_of(store.create(("x",), 401)) is errors.QUOTA_EXCEEDED
        await put(store, ("x",), bytes(400))

    async def test_killed(self) -> None:
        """What a process had taken when it was killed is free again for who starts alone."""
        code = (
            "import os, sys\n"
            "from lwstwisted.stores.tree import Tree\n"
            "from lwstwisted.stores.space import Reservation, Space\n"
            "from pathlib import Path\n"
            "tree = Tree(Path(sys.argv[1]), 'none', True)\n"
            "Reservation(Space(tree.partial, 0, tree.usage(1000)), 900)\n"
            "os.kill(os.getpid(), 9)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(self.root)], cwd=TOP, timeout=30)
        assert done.returncode == -9
        store = self.make_store(quota=1000)
        await put(store, ("x",), bytes(1000))


    async def test_not_counted(self) -> None:
        """What can't be given back stays counted, and changes no answer: the files are there."""
        store = self.make_store(quota=10_000)
        await put(store, ("a",), bytes(100))
        usage = store._tree.space._usage
        assert usage is not None
        add = usage.add

        def fail(count: int) -> None:
            if count < 0:
                raise OSError(28, "the disk is full")
            add(count)

        self.patch(usage, "add", fail)
        assert await put(store, ("a",), bytes(50)) is False
        batch = store.batch()
        await put_into(batch, ("a",), bytes(60))
        assert await batch.commit() == [False]
        await batch.discard()
        await store.delete(("a",))
        assert (store._partials, store._batches) == (set(), set())

    async def test_a_stopped_process(self) -> None:
        """Who waits for a lock that somebody keeps gives up, and does nothing under it."""
        self.patch(locks, "PATIENCE", 0.3)
        store = self.make_store(quota=1000)
        for name, at in (("usage", 0), ("locks", zlib.crc32(b"file") % locks.BYTES)):
            holder = os.open(self.root / ".lwstwisted" / name, os.O_RDWR)
            try:
                locks.lock_byte(holder, at)
                assert await refusal_of(put(store, ("file",), b"x")) is errors.STORE_FAILED
                assert await put(store, ("other" if name == "locks" else "empty",), b"") in (True, False)
            finally:
                os.close(holder)
        assert await put(store, ("file",), b"x")

    def test_no_locks(self) -> None:
        """A file system without locks is told at the start, and not to each client."""

        def refuse(*_: object, **__: object) -> None:
            raise OSError(37, "No locks available")

        self.patch(locks, "lock_byte", refuse)
        error = self.assertRaises(OSError, self.make_store, quota=None)
        self.assertEqual(error.errno, 37)
        self.assertEqual(open_beneath(self.root), set())


class FallocateTests(TestCase):
    """The system call."""

    @skipUnless(os.path.ismount("/dev/shm"), "there is no /dev/shm")
    def test_too_much(self) -> None:
        """More than there is fails as a write would."""
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            error = self.assertRaises(OSError, fallocate, file.fileno(), 1 << 60)
            self.assertIn(error.errno, (27, 28))  # EFBIG, ENOSPC

    def test_memory_without_limit(self) -> None:
        """A tmpfs that may take all of the memory isn't asked to."""
        asked: list[int] = []
        self.patch(sys.modules[Reservation.__module__], "fallocate", lambda descriptor, length: asked.append(length))
        self.patch(os, "fstatvfs", lambda _: SimpleNamespace(f_blocks=0, f_frsize=4096, f_bavail=0))
        reservation = Reservation(Space(-1, 0, None), 1 << 50)
        reservation.allocate(-1)
        self.assertEqual(asked, [])

    def test_not_there(self) -> None:
        """Where it isn't supported an upload goes on without."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, writer)
        self.patch(sys.modules[Reservation.__module__], "fallocate", lambda descriptor, length: False)
        space = Space(os.open("/", os.O_RDONLY), 0, None)
        self.addCleanup(os.close, space._disk)
        reservation = Reservation(space, RESERVED_FROM)
        reservation.allocate(writer)
        self.assertEqual(space._promised, RESERVED_FROM)
        reservation.written(RESERVED_FROM)
        self.assertEqual(space._promised, 0)


