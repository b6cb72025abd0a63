"""What uploads may take of the disk: promises, a minimum that stays free, a quota that processes share."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import skipUnless

from twisted.logger import capturedLogs
from twisted.trial.unittest import TestCase

from lwstwisted import errors
from lwstwisted.errors import Refusal, Refused
from lwstwisted.stores import locks, space
from lwstwisted.stores.space import RESERVED_FROM, Reservation, Space, fallocate
from tests.contracts import NOTHING, put, put_into, refusal_of, together
from tests.servers import PATIENCE, serving, twistd
from tests.test_stores_local import LocalCase, open_beneath

MIB = 1024 * 1024
TOP = Path(__file__).parent.parent

DYING = """
import os, sys
from pathlib import Path
from lwstwisted.stores.tree import Tree
from lwstwisted.stores.space import Reservation, Space
tree = Tree(Path(sys.argv[1]), "none", True)
space = Space(tree.partial, 0, tree.usage(tree.count_bytes, 1000))
exec(sys.argv[2])
os.kill(os.getpid(), 9)
"""
"""A process that shares a root, does something, and dies."""

DYING_ANYWHERE = """
import json, os, sys
from pathlib import Path
from lwstwisted.interfaces import anything
from lwstwisted.stores import local
from lwstwisted.stores.batch import BatchFolder, recover_batches
from lwstwisted.stores.space import Space
from lwstwisted.stores.tree import Tree

root = Path(sys.argv[1])

def begin():
    tree = Tree(root, "none", True)
    recover_batches(tree)
    tree.space = Space(tree.partial, 0, tree.usage(tree.count_bytes, 100_000))
    return tree

def put(tree, name, size):
    draft = local._Draft(tree, (name,), anything, {})
    draft.begin(size)
    draft.append(memoryview(bytes(size // 2)))
    draft.commit(memoryview(bytes(size - size // 2)))

def form(tree, name, size):
    batch = BatchFolder(tree)
    batch.reserve(size + 500)
    for last, part in ((name, size - 100), (name + b"2", 100)):
        draft = local._BatchDraft(tree, (last,), anything, {}, batch)
        draft.begin(None)
        draft.commit(memoryview(bytes(part)))
    batch.commit()

def mortal(call, left):
    def die_or_call(*arguments, **keywords):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), 9)
        result = call(*arguments, **keywords)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), 9)
        return result
    return die_or_call

def there():
    return sum(path.stat().st_size for path in root.iterdir() if path.is_file())

def counted():
    return int.from_bytes((root / ".lwstwisted" / "usage").read_bytes()[:8], "little")

seen = []
work = {
    "new": lambda tree: put(tree, b"new", 1000),
    "old": lambda tree: put(tree, b"replaced", 700),
    "form": lambda tree: form(tree, b"replaced", 1000),
    "delete": lambda tree: tree.delete((b"replaced",), anything),
}
for what, run in work.items():
    at, ended = 0, False
    while not ended:
        at += 1
        before = begin()
        for name in (b"new", b"replaced", b"replaced2"):
            try:
                before.delete((name,), anything)
            except Exception:
                pass
        put(before, b"replaced", 700)
        before.close()
        base = counted() - there()
        child = os.fork()
        if not child:
            tree = begin()
            left = [at]
            for name in ("pwrite", "link", "rename", "unlink"):
                setattr(os, name, mortal(getattr(os, name), left))
            run(tree)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        ended = status == 0
        begin().close()  # whoever starts takes back
        seen.append((what, at, there(), counted() - base))
print(json.dumps(seen))
"""
"""Kills processes at each call that changes something; what is there and what is counted, behind the next start."""


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
            if not fallocate(probe.fileno(), 0, 1):
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
            "Reservation(Space(tree.partial, 0, tree.usage(tree.count_bytes, 1000)), 900)\n"
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
        change = usage.change

        def fail(count: int, under_way: int) -> None:
            if count < 0:
                raise OSError(28, "the disk is full")
            change(count, under_way)

        self.patch(usage, "change", fail)
        assert await put(store, ("a",), bytes(50)) is False
        batch = store.batch()
        await put_into(batch, ("a",), bytes(60))
        assert await batch.commit() == [False]
        await batch.discard()
        await store.delete(("a",))
        assert (store._partials, store._batches) == (set(), set())

    async def test_form_reserves(self) -> None:
        """What a form has reserved is its files': nobody else gets it, and what they don't need is there again."""
        store = self.make_store(quota=1000)
        batch = store.batch()
        await batch.reserve(900)
        assert await refusal_of(store.create(("x",), 101)) is errors.QUOTA_EXCEEDED
        await put_into(batch, ("a",), bytes(300))
        known = await batch.create(("b",), 200)
        assert await refusal_of(store.create(("x",), 101)) is errors.QUOTA_EXCEEDED
        await known.commit(memoryview(bytes(200)))
        await put_into(batch, ("c",), b"")
        assert await batch.commit() == [True, True, True]
        assert store._tree.space._promised == 0
        assert await refusal_of(store.create(("x",), 501)) is errors.QUOTA_EXCEEDED
        await put(store, ("x",), bytes(500))

    async def test_form_reserves_too_little(self) -> None:
        """A form that turns out to be larger than it said asks for the rest."""
        store = self.make_store(quota=1000)
        batch = store.batch()
        await batch.reserve(100)
        await put_into(batch, ("a",), bytes(300))
        assert await refusal_of(put_into(batch, ("b",), bytes(701))) is errors.QUOTA_EXCEEDED
        await put_into(batch, ("b",), bytes(600))
        assert await batch.commit() == [True, True]
        await put(store, ("x",), bytes(100))
        assert await refusal_of(store.create(("y",), 1)) is errors.QUOTA_EXCEEDED

    async def test_form_is_forgotten(self) -> None:
        """A form that ends before its first file, or whose store is stopped, gives back what it had reserved."""
        beside = self.make_store(quota=1000)
        for ends in ("discard", "stop"):
            store = self.make_store(quota=1000)
            batch = store.batch()
            await batch.reserve(1000)
            assert await refusal_of(beside.create(("x",), 1)) is errors.QUOTA_EXCEEDED
            await (batch.discard() if ends == "discard" else store.stop())
            assert store._batches == set()
            # Not only because somebody took it back from a process that had ended.
            assert not any((self.root / ".lwstwisted" / "usage").read_bytes())
            part = await beside.create(("x",), 1000)
            await part.discard()
            await batch.discard()
        assert await refusal_of(beside.batch().reserve(1001)) is errors.BODY_TOO_LARGE

    async def test_form_of_many_files(self) -> None:
        """However many files a form has, the count that processes share is changed for all of them at once."""
        store = self.make_store(quota=100_000)
        usage = store._tree.space._usage
        assert usage is not None
        change, changes = usage.change, list[tuple[int, int]]()

        def note(*numbers: int) -> None:
            changes.append(numbers)  # type: ignore[arg-type]
            change(*numbers)

        self.patch(usage, "change", note)
        batch = store.batch()
        await batch.reserve(90_000)
        for number in range(100):
            await put_into(batch, (f"{number}",), bytes(100))
        await batch.commit()
        assert changes == [(90_000, 90_000), (-80_000, -90_000)]

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


class FullDiskTests(LocalCase):
    """A disk that has no space for the count itself."""

    async def test_first_start(self) -> None:
        """The service starts, deletes, and takes uploads again as soon as there is space, all counted."""
        self.mount(self.root, "size=1m")
        await self.make_store().stop()
        (self.root / "old").write_bytes(bytes(100_000))
        with open(self.root / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        filled = (self.root / "filler").stat().st_size
        with capturedLogs() as log:
            store, beside = self.make_store(quota=800_000), self.make_store(quota=800_000)
        assert ["no space for the count" in event["log_format"] for event in log] == [True, True]
        assert await refusal_of(put(store, ("new",), bytes(10))) is errors.DISK_FULL
        assert await refusal_of(beside.create(("huge",), 800_001)) is errors.BODY_TOO_LARGE
        assert (os.stat(self.root / ".lwstwisted" / "usage").st_size, filled > 800_000) == (0, True)
        await store.delete(("filler",))
        assert await refusal_of(beside.create(("new",), 700_001)) is errors.QUOTA_EXCEEDED
        await put(beside, ("new",), bytes(700_000))
        await store.delete(("old",))
        assert await refusal_of(store.create(("more",), 100_001)) is errors.QUOTA_EXCEEDED
        part = await store.create(("more",), 100_000)
        await part.discard()

    def test_other_errors(self) -> None:
        """A count that fails for another reason is told at the start."""

        def fail(*_: object) -> int:
            raise OSError(5, "the disk is broken")

        self.patch(os, "pwrite", fail)
        error = self.assertRaises(OSError, self.make_store, quota=1000)
        self.assertEqual(error.errno, 5)
        self.assertEqual(open_beneath(self.root), set())


class SlotTests(LocalCase):
    """What each process has under way is known, so that it doesn't stay counted when the process is killed."""

    def test_killed_beside(self) -> None:
        """One of two services is killed: what it had been promised is at once the other one's, and nothing else is."""
        for kind in ("file", "form"):
            options = ("--root", self.root / kind, "--quota", "1000M", "--listen", "tcp:0:interface=127.0.0.1")
            with ExitStack() as stack:
                dying, living = (stack.enter_context(serving(twistd(*options), cwd=self.root)) for _ in range(2))
                (there,), (here,) = dying.wait_for_ports(), living.wait_for_ports()
                self.assertEqual(self.announce(stack, there, "kept", MIB, send=True), 201)
                self.assertEqual(self.announce(stack, here, "own", 9 * MIB), 100)
                if kind == "file":
                    self.assertEqual(self.announce(stack, there, "lost", 900 * MIB), 100)
                else:
                    self.assertEqual(self.announce(stack, there, "", 900 * MIB, method="POST"), 100)
                self.assertEqual(self.announce(stack, here, "next", 90 * MIB + 1), 507)
                dying.end(signal.SIGKILL)
                self.assertEqual(self.announce(stack, here, "next", 990 * MIB + 1), 507)
                self.assertEqual(self.announce(stack, here, "next", 990 * MIB), 100)

    def announce(
        self, stack: ExitStack, port: int, name: str, size: int, *, method: str = "PUT", send: bool = False
    ) -> int:
        """Announce an upload, which stays open as long as the stack; gives the status of the first answer.

        :param send: wait for the last answer instead.
        """
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
        reader = stack.enter_context(client.makefile("rb"))
        head = f"{method} /files/{name} HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\nExpect: 100-continue\r\n"
        client.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode())
        status = int(reader.readline().split()[1])
        if not send:
            return status
        self.assertEqual((status, reader.readline()), (100, b"\r\n"))
        client.sendall(bytes(size))
        return int(reader.readline().split()[1])

    async def test_started_beside(self) -> None:
        """A service that is started takes back what a dead one had, and the slot as well."""
        store = self.make_store(quota=1000)
        for _ in range(3):
            self.assertEqual(self.die_with("Reservation(space, 900)"), [900, 0, 900])
            beside = self.make_store(quota=1000)
            self.assertEqual(self.numbers(), [0, 0, 0])
            await beside.stop()
        await put(store, ("x",), bytes(1000))

    async def test_no_slot(self) -> None:
        """More processes than slots: the others count as well, and give back what they don't need."""
        self.patch(space, "SLOTS", 1)
        self.patch(space, "_NUMBERS", struct.Struct("<2q"))
        first, second = self.make_store(quota=1000), self.make_store(quota=1000)
        await put(second, ("a",), bytes(100))
        held = await second.create(("b",), 500)
        assert await refusal_of(first.create(("c",), 401)) is errors.QUOTA_EXCEEDED
        await held.discard()
        await put(first, ("c",), bytes(900))
        assert await refusal_of(second.create(("b",), 1)) is errors.QUOTA_EXCEEDED
        self.assertEqual(self.numbers()[:2], [1000, 0])

    async def test_without_slots(self) -> None:
        """A count that was made without slots goes on with them."""
        first = self.make_store(quota=1000)
        await put(first, ("a",), bytes(300))
        os.truncate(self.root / ".lwstwisted" / "usage", 8)
        second = self.make_store(quota=1000)
        held = await second.create(("b",), 700)
        self.assertEqual(self.numbers(), [1000, 0, 700])
        assert await refusal_of(first.create(("c",), 1)) is errors.QUOTA_EXCEEDED
        await held.discard()

    def numbers(self) -> list[int]:
        """The sum, and the first two slots."""
        found = (self.root / ".lwstwisted" / "usage").read_bytes()
        return list(struct.unpack_from("<3q", found.ljust(24, b"\0")))

    def die_with(self, code: str) -> list[int]:
        """Have another process do something with its ``tree`` and its ``space``, and die; what is counted then."""
        done = subprocess.run([sys.executable, "-c", DYING, str(self.root), code], cwd=TOP, timeout=PATIENCE)
        self.assertEqual(done.returncode, -9)
        return self.numbers()

    async def test_killed_anywhere(self) -> None:
        """At whatever call a process dies, what is there is counted, and no more beside it than was being named."""
        store = self.make_store(quota=100_000)
        await put(store, ("old",), bytes(10))
        done = subprocess.run(
            [sys.executable, "-c", DYING_ANYWHERE, str(self.root)], cwd=TOP, timeout=PATIENCE, capture_output=True
        )
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        seen = json.loads(done.stdout)
        self.assertGreater(len(seen), 40)
        # Each: the work, at which call it died, the bytes that are there, the bytes that are counted.
        self.assertEqual([one for one in seen if not one[2] <= one[3] <= one[2] + 1000], [])
        inexact = [one[0] for one in seen if one[2] != one[3]]
        # The calls between those that take the bytes out of the slot and name them; at the end of each, and before the
        # next. To replace takes a link that fails, another one and a rename, and gives back what the old file had.
        calls = {"new": 2, "old": 7, "form": 4, "delete": 2}
        self.assertEqual({what: inexact.count(what) for what in calls}, calls)


class StepTests(LocalCase):
    """Blocks are reserved in steps, so that others don't see them twice: as promised, and as taken from the disk."""

    def begin(self, capacity: int, length: int, call: Callable[..., bool]) -> None:
        """Reserve blocks; whoever asks meanwhile for all that is left, but for one step, gets it."""
        steps: list[tuple[int, int]] = []
        disk = os.open(self.root, os.O_RDONLY)
        self.addCleanup(os.close, disk)
        kept = Space(disk, 0, None)

        def fallocate(descriptor: int, offset: int, count: int) -> bool:
            assert call(descriptor, offset, count)
            steps.append((offset, count))
            Reservation(kept, capacity - length - space.STEP).give_back()
            return True

        self.patch(space, "fallocate", fallocate)
        with tempfile.TemporaryFile(dir=self.root) as file:
            reservation = Reservation(kept, length)
            reservation.allocate(file.fileno())
            ends = [offset + count for offset, count in steps]
            self.assertEqual([offset for offset, _ in steps], [0, *ends[:-1]])
            self.assertEqual((ends[-1], max(count for _, count in steps)), (length, space.STEP))
            self.assertEqual(kept._promised, 0)
            reservation.give_back()

    def test_counted(self) -> None:
        """A disk of 1 TiB, of which one upload takes all but a little."""
        taken = 0

        def take(descriptor: int, offset: int, count: int) -> bool:
            nonlocal taken
            taken += count
            return True

        free = SimpleNamespace(f_blocks=1, f_frsize=1)
        self.patch(os, "fstatvfs", lambda _: SimpleNamespace(**vars(free), f_bavail=(1 << 40) - taken))
        self.begin(1 << 40, (1 << 40) - 100 * MIB - 1, take)

    def test_real(self) -> None:
        """The same on a small file system."""
        self.mount(self.root, "size=16m")
        self.patch(space, "STEP", MIB)
        self.begin(os.statvfs(self.root).f_bavail * 4096, 12 * MIB + 1, fallocate)

    async def test_ends_in_between(self) -> None:
        """The disk is full after some steps: the upload is refused, and leaves nothing."""
        self.mount(self.root, "size=8m")
        self.patch(space, "STEP", MIB)
        store = self.make_store()
        part = await store.create(("file",), 7 * MIB)
        (self.root / "other").write_bytes(bytes(4 * MIB))
        assert await refusal_of(part.append(memoryview(b"x"))) is errors.DISK_FULL
        await part.discard()
        assert store._tree.space._promised == 0
        await put(store, ("file",), bytes(3 * MIB))


class FallocateTests(TestCase):
    """The system call."""

    @skipUnless(os.path.ismount("/dev/shm"), "there is no /dev/shm")
    def test_too_much(self) -> None:
        """More than there is fails as a write would."""
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            error = self.assertRaises(OSError, fallocate, file.fileno(), 0, 1 << 60)
            self.assertIn(error.errno, (27, 28))  # EFBIG, ENOSPC

    def test_memory_without_limit(self) -> None:
        """A tmpfs that may take all of the memory isn't asked to."""
        asked: list[tuple[int, ...]] = []
        self.patch(sys.modules[Reservation.__module__], "fallocate", lambda *call: asked.append(call))
        self.patch(os, "fstatvfs", lambda _: SimpleNamespace(f_blocks=0, f_frsize=4096, f_bavail=0))
        reservation = Reservation(Space(-1, 0, None), 1 << 50)
        reservation.allocate(-1)
        self.assertEqual(asked, [])

    def test_not_there(self) -> None:
        """Where it isn't supported an upload goes on without."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, writer)
        self.patch(sys.modules[Reservation.__module__], "fallocate", lambda descriptor, offset, length: False)
        space = Space(os.open("/", os.O_RDONLY), 0, None)
        self.addCleanup(os.close, space._disk)
        reservation = Reservation(space, RESERVED_FROM)
        reservation.allocate(writer)
        self.assertEqual(space._promised, RESERVED_FROM)
        reservation.written(RESERVED_FROM)
        self.assertEqual(space._promised, 0)


