"""The store on disk: its contract, what it asks of the kernel in which order, and each fault at each step."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import itertools
import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import weakref
from pathlib import Path
from threading import Event, Thread
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure
from twisted.trial.unittest import SkipTest, TestCase

from lwstwisted import errors
from lwstwisted.errors import Refusal, Refused
from lwstwisted.interfaces import Found
from lwstwisted.stores.local import LocalStore
from lwstwisted.stores.names import parse_name
from lwstwisted.stores.placing import FILE_MODE
from tests import servers
from tests.contracts import EDGE, StoreContract, get, names_in, put, refusal_of, sample, together

NOTHING = memoryview(b"")


def partials_of(root: Path) -> list[str]:
    """The temporary names beneath a root."""
    return sorted(os.listdir(root / ".lwstwisted" / "partial"))


def tree_of(root: Path) -> dict[str, bytes | None]:
    """All that is public beneath a root: folders as None, files with their contents."""
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.relative_to(root).parts[0] != ".lwstwisted"
    }


def open_beneath(root: Path) -> set[int]:
    """This process' descriptors of anything beneath a folder."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        # The one that lists is closed by now.
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{name}").startswith(str(root)):
                found.add(int(name))
    return found


class LocalCase(TestCase):
    """A folder for each test, and stores in it that are stopped afterwards."""

    use_tmpfile = True

    def setUp(self) -> None:
        self.root = self.new_folder()

    def new_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def make_store(self, root: Path | None = None, **options: Any) -> LocalStore:
        from twisted.internet import reactor

        options.setdefault("use_tmpfile", self.use_tmpfile)
        store = LocalStore(root or self.root, reactor, **options)  # type: ignore[arg-type]
        self.addCleanup(lambda: Deferred.fromCoroutine(store.stop()))
        return store

    def mount(self, folder: Path, options: str) -> None:
        """Mount a tmpfs until the end of the test, or skip it."""
        if shutil.which("mount") is None:
            raise SkipTest("needs mount")
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "lwstwisted", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            raise SkipTest(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        self.addCleanup(subprocess.run, ["umount", "--lazy", str(folder)], check=True)


class UnnamedContractTests(LocalCase, StoreContract):
    """The contract, with files that have no name until they are finished."""


class NamedContractTests(LocalCase, StoreContract):
    """The contract, as on a file system without ``O_TMPFILE``."""

    use_tmpfile = False


class PartialTests(LocalCase):
    """Files under way."""

    async def test_modes(self) -> None:
        """Nobody else reads an unfinished file; everybody may read a finished one; no umask changes that."""
        for umask in (0, 0o077):
            self.addCleanup(os.umask, os.umask(umask))
            store = self.make_store(use_tmpfile=False)
            partial = await store.create(("file",), None)
            await partial.append(memoryview(b"x"))
            (name,) = partials_of(self.root)
            assert stat.S_IMODE((self.root / ".lwstwisted" / "partial" / name).stat().st_mode) == 0o600
            await partial.commit(memoryview(b"x"))
            assert stat.S_IMODE((self.root / "file").stat().st_mode) == FILE_MODE == 0o644
        assert stat.S_IMODE((self.root / ".lwstwisted").stat().st_mode) == 0o700

    async def test_unnamed_modes(self) -> None:
        """The same where an unfinished file has no name: the kernel's link to it tells its mode."""
        store = self.make_store()
        before = open_beneath(self.root)
        partial = await store.create(("file",), None)
        await partial.append(memoryview(b"x"))
        (descriptor,) = open_beneath(self.root) - before
        found = os.fstat(descriptor)
        assert (stat.S_IMODE(found.st_mode), found.st_nlink) == (0o600, 0)
        await partial.commit(memoryview(b"x"))
        assert stat.S_IMODE((self.root / "file").stat().st_mode) == FILE_MODE

    async def test_descriptors(self) -> None:
        """An upload holds one descriptor from its first bytes on, and whatever became of it, none is left."""
        for use_tmpfile in (True, False):
            store = self.make_store(use_tmpfile=use_tmpfile)
            idle = open_beneath(self.root)
            partials = [await store.create((f"{number}",), None) for number in range(5)]
            assert open_beneath(self.root) == idle
            for partial in partials:
                await partial.append(memoryview(b"x"))
            assert len(open_beneath(self.root) - idle) == 5
            await partials[0].commit(NOTHING)
            await partials[1].discard()
            assert len(open_beneath(self.root) - idle) == 3
            await put(store, ("a", "b", "c"), b"x")
            await put(store, ("a", "b", "c"), b"y")
            await store.list_folder(("a",))
            for name in ((), ("a",), ("a", "b", "c", "d"), ("missing", "x")):
                for work in (store.create(name, 1 << 60), store.open_file(name), store.delete(name)):
                    await refusal_of(work)
            assert len(open_beneath(self.root) - idle) == 3
            await store.delete(("a", "b", "c"))
            await store.stop()
            assert open_beneath(self.root) == set()
            assert partials_of(self.root) == []

    async def test_cancelled_append_waits_for_its_thread(self) -> None:
        """Cancelling doesn't give memory back that a thread still reads, and nothing is left in the end."""
        store = self.make_store()
        partial = await store.create(("file",), None)
        append = Deferred.fromCoroutine(partial.append(memoryview(bytes(64 * EDGE))))
        ended: list[object] = []
        append.addBoth(ended.append)
        append.cancel()
        append.cancel()
        # The thread's result needs a turn of the reactor: whatever ends here ends too early.
        assert ended == []
        await append
        (failure,) = ended
        assert isinstance(failure, Failure) and isinstance(failure.value, CancelledError)
        await partial.discard()
        assert tree_of(self.root) == {}

    async def test_cancelled_calls_leak_nothing(self) -> None:
        """What a thread opened for a caller who has left is closed."""
        store = self.make_store()
        await put(store, ("file",), b"x")
        before = open_beneath(self.root)
        for work in (store.create(("other",), None), store.open_file(("file",))):
            call = Deferred.fromCoroutine(work)
            call.cancel()
            await self.assertFailure(call, CancelledError)
        assert open_beneath(self.root) == before

    async def test_discard_during_append(self) -> None:
        """A client leaves while its bytes are written: no descriptor is closed under a write."""
        store = self.make_store()
        partial = await store.create(("file",), None)
        partials = self.root / ".lwstwisted" / "partial"

        async def append() -> None:
            # It may also come second, and is refused then.
            with contextlib.suppress(Refused):
                await partial.append(memoryview(bytes(EDGE)))

        with traced("-e", "trace=pwrite64,close", "-e", "inject=pwrite64:delay_enter=20000") as lines:
            await together(append(), partial.discard())
        ours = [line for line in lines if f"<{partials}/" in line or "pwrite64 resumed" in line]
        assert not any("unfinished" in one and "close(" in two for one, two in itertools.pairwise(ours)), ours
        assert open_beneath(partials / "#") == set()
        assert tree_of(self.root) == {}

    async def test_finished_files_are_forgotten(self) -> None:
        """A store that runs for months doesn't keep what it needs no more."""
        store = self.make_store()
        committed, discarded = [await store.create((name,), None) for name in ("a", "b")]
        await committed.commit(NOTHING)
        await discarded.discard()
        left = [weakref.ref(committed), weakref.ref(discarded)]
        del committed, discarded
        gc.collect()
        assert [ref() for ref in left] == [None, None]

    async def test_stop_during_create(self) -> None:
        """An upload that begins while the server stops is dropped as well."""
        store = self.make_store()
        create = Deferred.fromCoroutine(store.create(("file",), None))
        await store.stop()
        await (await create).discard()
        assert open_beneath(self.root) == set()

    async def test_stop_drops_unfinished_files(self) -> None:
        """What nobody finished or discarded before the end leaves neither descriptor nor name."""
        store = self.make_store(use_tmpfile=False)
        for number in range(3):
            await (await store.create((f"{number}",), None)).append(memoryview(b"x"))
        assert len(partials_of(self.root)) == 3
        await store.stop()
        assert partials_of(self.root) == []
        assert open_beneath(self.root) == set()


    async def test_put_there_by_hand(self) -> None:
        """A file that somebody puts there between the check and the name is one that the check has to see."""
        store, target = self.make_store(), self.root / "file"
        is_ending = False

        def only_new(found: Found | None) -> None:
            if found is not None:
                raise Refused(errors.PRECONDITION_FAILED)
            if is_ending:
                target.write_bytes(b"by hand")

        partial = await store.create(("file",), None, only_new)
        is_ending = True
        assert await refusal_of(partial.commit(memoryview(b"uploaded"))) is errors.PRECONDITION_FAILED
        assert target.read_bytes() == b"by hand"


class StartTests(LocalCase):
    """What a new store finds and makes."""

    async def test_root_is_made(self) -> None:
        """An operator may name a folder that isn't there."""
        store = self.make_store(self.root / "a" / "b", durability="full")
        await put(store, ("file",), b"x")
        assert (self.root / "a" / "b" / "file").read_bytes() == b"x"

    def test_root_is_no_folder(self) -> None:
        """Nor does a store start on a file, and it keeps no descriptor then."""
        (self.root / "file").write_bytes(b"")
        with contextlib.suppress(OSError):
            raise AssertionError(self.make_store(self.root / "file"))
        (self.root / ".lwstwisted").symlink_to(self.new_folder())
        with contextlib.suppress(Refused):
            raise AssertionError(self.make_store())
        assert open_beneath(self.root) == set()

    def test_leftovers_are_swept(self) -> None:
        """What a crash left is removed at the next start: only our own names, only what nobody holds."""
        self.make_store()
        partial = self.root / ".lwstwisted" / "partial"
        dead, held = "0" * 32, "1" * 32
        foreign = ["0" * 31, "0" * 33, "G" * 32, "A" * 32, "notes.txt", "0" * 32 + "\n"]
        for name in (dead, held, *foreign):
            (partial / name).write_bytes(b"x")
        (partial / ("2" * 32)).mkdir()
        (partial / ("3" * 32)).symlink_to(partial / "notes.txt")
        with open(partial / held, "rb") as holder:
            fcntl.flock(holder, fcntl.LOCK_EX)
            self.make_store()
        assert partials_of(self.root) == sorted([held, *foreign, "2" * 32, "3" * 32])
        assert (partial / "notes.txt").exists()

    async def test_second_store_spares_the_first(self) -> None:
        """Another process that starts on the same root doesn't sweep what this one is writing."""
        first = self.make_store(use_tmpfile=False)
        partial = await first.create(("file",), None)
        await partial.append(memoryview(b"first, "))
        second = self.make_store()
        await put(second, ("other",), b"x")
        assert await partial.commit(memoryview(b"then")) is True
        assert await get(second, ("file",)) == b"first, then"


class TreeTests(LocalCase):
    """A tree that others write to as well."""

    def setUp(self) -> None:
        super().setUp()
        self.outside = self.new_folder()
        (self.outside / "secret").write_bytes(b"secret")

    def outside_is_untouched(self) -> bool:
        return tree_of(self.outside) == {"secret": b"secret"}

    async def test_links_are_not_followed(self) -> None:
        """Neither as a folder on the way nor as the file, whether they lead out, in, or nowhere."""
        store = self.make_store()
        await put(store, ("real",), b"real")
        targets = (self.outside, self.outside / "secret", Path("real"), Path("nowhere"), Path())
        for at, target in enumerate(targets):
            link = f"link{at}"
            (self.root / link).symlink_to(target)
            for name in ((link,), (link, "secret"), (link, "new")):
                for work in (store.create(name, 1), store.open_file(name), store.delete(name)):
                    assert await refusal_of(work) is errors.NOT_A_FILE, (target, name)
                assert await refusal_of(store.list_folder(name)) is errors.NOT_A_FILE
        assert await names_in(store) == ["real"]
        assert self.outside_is_untouched()

    async def test_special_files(self) -> None:
        """A FIFO doesn't hang a thread, a socket isn't opened, and neither is listed or replaced."""
        store = self.make_store()
        os.mkfifo(self.root / "fifo")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.root / "socket"))
            for last in ("fifo", "socket"):
                for work in (store.create((last,), 1), store.open_file((last,)), store.delete((last,))):
                    assert await refusal_of(work) is errors.NOT_A_FILE
                assert await refusal_of(store.create((last, "below"), 1)) is errors.NOT_A_FILE
            assert await names_in(store) == []

    async def test_folder_swapped_during_upload(self) -> None:
        """A folder that became a link between the first byte and the last: nothing is written through it."""
        store = self.make_store()
        for name in (("folder", "file"), ("folder", "deep", "file")):
            (self.root / "folder").mkdir()
            partial = await store.create(name, None)
            (self.root / "folder").rmdir()
            (self.root / "folder").symlink_to(self.outside)
            assert await refusal_of(partial.commit(memoryview(b"x"))) is errors.NOT_A_FILE
            (self.root / "folder").unlink()
        assert self.outside_is_untouched()

    async def test_name_swapped_during_upload(self) -> None:
        """The same for the name itself."""
        store = self.make_store()
        partial = await store.create(("file",), None)
        (self.root / "file").symlink_to(self.outside / "secret")
        assert await refusal_of(partial.commit(memoryview(b"x"))) is errors.NOT_A_FILE
        assert self.outside_is_untouched()

    async def test_flipping_racer(self) -> None:
        """Somebody turns a folder into a link and back all the time; no upload lands outside."""
        store = self.make_store(durability="none")
        folder, attic, link = (self.root / name for name in ("folder", "attic", "link"))
        folder.mkdir()
        attic.mkdir()
        link.symlink_to(self.outside)
        ended = Event()

        def flip() -> None:
            for number in itertools.count():
                # Any of these fails where the store has made the folder meanwhile.
                with contextlib.suppress(OSError):
                    folder.rename(attic / f"{number}")
                    link.rename(folder)
                    folder.rename(link)
                    (attic / f"{number}").rename(folder)
                if ended.is_set():
                    break

        racer = Thread(target=flip)
        racer.start()
        answers: set[str] = set()
        try:
            for number in range(300):
                try:
                    await put(store, ("folder", "deep", f"{number}"), b"x")
                    answers.add("stored")
                except Refused as refused:
                    answers.add(refused.refusal.code)
        finally:
            ended.set()
            racer.join()
        assert self.outside_is_untouched()
        assert answers <= {"stored", errors.NOT_A_FILE.code, errors.STORE_FAILED.code}, answers

    async def test_old_file_deleted_in_between(self) -> None:
        """Somebody deletes the old file between our look at it and its replacement: the name is new then."""
        store = self.make_store()
        await put(store, ("file",), b"old")
        partial = await store.create(("file",), None)

        async def delete_by_hand() -> None:
            await deferToThread(os.unlink, self.root / "file")

        with traced("-e", "trace=linkat", "-e", "inject=linkat:delay_exit=100000:when=1") as lines:
            created, _ = await together(partial.commit(memoryview(b"new")), delete_by_hand())
        assert created is True, lines
        assert tree_of(self.root) == {"file": b"new"}

    async def test_folder_removed_during_upload(self) -> None:
        """Somebody tidies empty folders away: the upload makes them again."""
        store = self.make_store()
        (self.root / "a" / "b").mkdir(parents=True)
        partial = await store.create(("a", "b", "file"), None)
        shutil.rmtree(self.root / "a")
        assert await partial.commit(memoryview(b"x")) is True
        assert tree_of(self.root) == {"a": None, "a/b": None, "a/b/file": b"x"}

    async def test_mounts_are_not_entered(self) -> None:
        """What is mounted inside the tree is another file system, where no link could lead."""
        mounted = self.root / "mounted"
        self.mount(mounted, "size=64k")
        (mounted / "file").write_bytes(b"x")
        store = self.make_store()
        for work in (store.create(("mounted", "new"), 1), store.open_file(("mounted", "file"))):
            assert await refusal_of(work) is errors.OTHER_FILE_SYSTEM
        assert await names_in(store) == []
        await store.stop()

    async def test_unreachable_names_are_not_listed(self) -> None:
        """What no request path can name isn't offered."""
        store = self.make_store()
        for raw in (b"\xff", b"a\nb", "e\u0301".encode(), b"%2e", b"back\\slash", b"good"):
            (self.root / os.fsdecode(raw)).write_bytes(b"x")
        entries = await store.list_folder(())
        assert [entry.name for entry in entries] == ["good"]
        for entry in entries:
            assert await get(store, parse_name([entry.name.encode()])) == b"x"


class DiskFullTests(LocalCase):
    """A disk of 1 MiB."""

    def setUp(self) -> None:
        super().setUp()
        self.mount(self.root, "size=1m")

    async def test_known_before(self) -> None:
        """An upload that can't fit is refused before its body is sent."""
        store = self.make_store()
        assert await refusal_of(store.create(("file",), 2 << 20)) is errors.DISK_FULL
        await put(store, ("file",), bytes(EDGE))
        await store.stop()

    async def test_noticed_in_the_middle(self) -> None:
        """An upload of unknown length that fills the disk gives all of it back at once."""
        for use_tmpfile in (True, False):
            store = self.make_store(use_tmpfile=use_tmpfile)
            free = os.statvfs(self.root).f_bavail
            partial = await store.create(("new", "file"), None)
            await partial.append(memoryview(bytes(600_000)))
            assert await refusal_of(partial.append(memoryview(bytes(600_000)))) is errors.DISK_FULL
            assert os.statvfs(self.root).f_bavail == free
            await partial.discard()
            assert (tree_of(self.root), partials_of(self.root)) == ({}, [])
            await store.stop()

    async def test_noticed_at_the_end(self) -> None:
        """The same when the last bytes come with the commit; an old file of that name stays."""
        store = self.make_store()
        await put(store, ("file",), b"old")
        partial = await store.create(("file",), None)
        assert await refusal_of(partial.commit(memoryview(bytes(2 << 20)))) is errors.DISK_FULL
        assert (tree_of(self.root), partials_of(self.root)) == ({"file": b"old"}, [])
        await put(store, ("other",), bytes(600_000))
        await store.stop()


def traced(*options: str) -> contextlib.AbstractContextManager[list[str]]:
    """Have strace look at this process."""
    return servers.traced("-f", *options, "-p", str(os.getpid()))


WATCHED = (
    "trace=pwrite64,flock,fchmod,fsync,fdatasync,sync,syncfs,mkdir,mkdirat,link,linkat,rename,renameat,renameat2,"
    "unlink,unlinkat"
)


def steps_in(lines: list[str], root: Path) -> list[str]:
    """What strace saw, in the order of beginning: calls and the paths beneath the root they were for."""
    steps = []
    for line in lines:
        call = re.match(r"\d+ +(\w+)\((.*)", line)
        if call is None:
            continue
        name, rest = call.groups()
        where = re.search(rf"<{re.escape(str(root))}([^>]*)>", rest)
        path = where.group(1) if where else "?"
        if name in ("linkat", "renameat", "renameat2", "mkdirat", "unlinkat"):
            # The last pair of folder and name is what the call makes or removes.
            folder, last = re.findall(rf"<{re.escape(str(root))}([^>]*)>, \"([^\"]*)\"", rest)[-1]
            path = f"{folder}/{last}"
        path = re.sub(r"/\.lwstwisted/partial/.+", "PARTIAL", path)
        steps.append(f"{name.removesuffix('64').removesuffix('at').removesuffix('at2')} {path or '/'}")
    return steps


class OrderTests(LocalCase):
    """What is asked of the kernel, and in which order, as strace sees it."""

    async def steps(self, store: LocalStore, name: tuple[str, ...]) -> list[str]:
        partial = await store.create(name, 1)
        with traced("-e", WATCHED) as lines:
            await partial.commit(memoryview(b"x"))
        return steps_in(lines, self.root)

    FULL_FILE = ["pwrite PARTIAL", "fchmod PARTIAL", "fsync PARTIAL"]

    async def test_full(self) -> None:
        """Nothing has a name before it's on disk, and nobody gets an answer before the name is."""
        store = self.make_store()
        assert await self.steps(store, ("file",)) == [*self.FULL_FILE, "link /file", "fsync /"]
        assert await self.steps(store, ("a", "b", "file")) == [
            *self.FULL_FILE,
            *("mkdir /a", "fsync /", "mkdir /a/b", "fsync /a"),
            *("link /a/b/file", "fsync /a/b"),
        ]
        assert await self.steps(store, ("a", "b", "file")) == [
            *self.FULL_FILE,
            *("mkdir /a", "mkdir /a/b"),
            *("link /a/b/file", "flock PARTIAL", "link PARTIAL", "rename /a/b/file", "fsync /a/b"),
        ]

    async def test_full_named(self) -> None:
        """The same where a file has a temporary name; that one goes last."""
        store = self.make_store(use_tmpfile=False)
        assert await self.steps(store, ("file",)) == [
            *("flock PARTIAL", *self.FULL_FILE),
            *("link /file", "fsync /", "unlink PARTIAL"),
        ]
        assert await self.steps(store, ("file",)) == [
            *("flock PARTIAL", *self.FULL_FILE),
            *("link /file", "rename /file", "fsync /"),
        ]

    async def test_folder_of_another(self) -> None:
        """On a slow disk: nobody relies on a folder that another upload made and has not synced yet."""
        store = self.make_store()
        partials = [await store.create(("new", f"{number}"), None) for number in range(2)]
        with traced("-e", "trace=fsync,linkat", "-e", "inject=fsync:delay_exit=20000") as lines:
            await together(*(partial.commit(memoryview(b"x")) for partial in partials))
        begin = next(at for at, line in enumerate(lines) if f"<{self.root}>" in line and "fsync(" in line)
        thread = lines[begin].split()[0]
        end = begin
        while not re.match(rf"{thread} .*= 0", lines[end]):
            end += 1
        assert not any("linkat(" in line for line in lines[:end]), lines

    async def test_delete(self) -> None:
        """A file that was deleted doesn't come back after a power cut."""
        store = self.make_store()
        await put(store, ("a", "file"), b"x")
        with traced("-e", WATCHED) as lines:
            await store.delete(("a", "file"))
        assert steps_in(lines, self.root) == ["unlink /a/file", "fsync /a"]

    async def test_data(self) -> None:
        """Contents are synced, names are not."""
        store = self.make_store(durability="data")
        assert await self.steps(store, ("a", "file")) == [
            *("pwrite PARTIAL", "fchmod PARTIAL", "fdatasync PARTIAL"),
            *("mkdir /a", "link /a/file"),
        ]

    async def test_none(self) -> None:
        """Nothing is synced."""
        store = self.make_store(durability="none")
        assert await self.steps(store, ("a", "file")) == [
            *("pwrite PARTIAL", "fchmod PARTIAL"),
            *("mkdir /a", "link /a/file"),
        ]

    async def test_root_is_durable(self) -> None:
        """A root that had to be made is on disk before the first upload is."""
        with traced("-e", WATCHED) as lines:
            self.make_store(self.root / "new")
        steps = steps_in(lines, self.root)
        # The root itself is made by its path, not by a descriptor.
        assert steps[:2] == ["mkdir ?", "fsync /"]


class NthFaultTests(LocalCase):
    """Each system call of an upload fails in turn, the first time it is made, the second, and so on."""

    async def upload(self, store: LocalStore, name: tuple[str, ...]) -> Refusal | None:
        """An upload with all its calls; None when it succeeded."""
        try:
            partial = await store.create(name, None)
            try:
                await partial.append(memoryview(sample(EDGE)))
                await partial.commit(memoryview(b"end"))
            finally:
                await partial.discard()
        except Refused as refused:
            return refused.refusal
        return None

    async def inject(self, call: str, error: str, nth: int, use_tmpfile: bool, refusal: Refusal) -> bool:
        """Whether the call was made so often. The faults count for each thread: a new store has new ones."""
        old: dict[str, bytes | None] = {"replaced": b"old"}
        new: dict[str, bytes | None] = {"replaced": sample(EDGE) + b"end"}
        made: dict[str, bytes | None] = {"a": None, "a/b": None, "a/b/file": sample(EDGE) + b"end"}
        hit = False
        for name in (("replaced",), ("a", "b", "file")):
            root = self.new_folder()
            (root / "replaced").write_bytes(b"old")
            store = self.make_store(root, use_tmpfile=use_tmpfile, threads=1)
            # The reactor begins to run with the first wait, and makes calls of its own then.
            await store.list_folder(())
            with traced("-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={nth}") as lines:
                answer = await self.upload(store, name)
            hit = hit or any("(INJECTED)" in line for line in lines)
            await store.stop()
            case = (call, nth, use_tmpfile, name, answer)
            assert open_beneath(root) == set(), case
            public = tree_of(root)
            if answer is None:
                assert public == (new if name == ("replaced",) else {**old, **made}), case
            else:
                # Only a folder's fsync comes after the old file was replaced.
                assert public == old or (call == "fsync" and public == new), case
                assert answer is refusal, case
            # Only a name that could not be removed stays, and that only until the next start.
            assert call == "unlinkat" or partials_of(root) == [], case
            await self.make_store(root).stop()
            assert partials_of(root) == [], case
        return hit

    async def fail_each(self, call: str, error: str, refusal: Refusal, least: int) -> None:
        for use_tmpfile in (True, False):
            nth = 1
            while await self.inject(call, error, nth, use_tmpfile, refusal):
                nth += 1
            if use_tmpfile:
                assert nth > least, f"{call} was seen {nth - 1} times"

    async def test_write(self) -> None:
        """The disk is full."""
        await self.fail_each("pwrite64", "ENOSPC", errors.DISK_FULL, 2)

    async def test_write_quota(self) -> None:
        """The user's share of it is."""
        await self.fail_each("pwrite64", "EDQUOT", errors.DISK_FULL, 2)

    async def test_sync(self) -> None:
        """The disk lost what it had promised to keep. The answer is never a success."""
        await self.fail_each("fsync", "EIO", errors.STORE_FAILED, 4)

    async def test_link(self) -> None:
        """The name can't be made."""
        await self.fail_each("linkat", "EIO", errors.STORE_FAILED, 2)

    async def test_rename(self) -> None:
        """The old file can't be replaced."""
        await self.fail_each("/^rename", "EIO", errors.STORE_FAILED, 1)

    async def test_folder(self) -> None:
        """A folder can't be made."""
        await self.fail_each("mkdirat", "ENOSPC", errors.DISK_FULL, 2)

    async def test_mode(self) -> None:
        """The mode can't be set."""
        await self.fail_each("fchmod", "EIO", errors.STORE_FAILED, 1)

    async def test_lock(self) -> None:
        """A temporary name can't be held."""
        await self.fail_each("flock", "ENOLCK", errors.STORE_FAILED, 1)

    async def test_open(self) -> None:
        """There are no descriptors left."""
        await self.fail_each("openat", "EMFILE", errors.TOO_MANY_FILES, 5)

    async def test_look(self) -> None:
        """The disk can't be read."""
        await self.fail_each("newfstatat", "EIO", errors.STORE_FAILED, 2)

    async def test_unlink(self) -> None:
        """A temporary name can't be removed: the upload is good all the same."""
        await self.fail_each("unlinkat", "EIO", errors.STORE_FAILED, 0)

    async def test_failed_sync_is_final(self) -> None:
        """After a failed fsync the next one would report success about lost data: there is none."""
        store = self.make_store(threads=1)
        partial = await store.create(("file",), None)
        with traced("-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=1") as lines:
            assert await refusal_of(partial.commit(memoryview(b"x"))) is errors.STORE_FAILED
            assert await refusal_of(partial.commit(NOTHING)) is errors.STORE_FAILED
        assert sum("fsync(" in line for line in lines) == 1
        assert tree_of(self.root) == {}

    async def test_no_tmpfile(self) -> None:
        """A file system or container that can't name an unnamed file is noticed at the start."""
        with traced("-e", "trace=linkat", "-e", "inject=linkat:error=ENOENT:when=1"):
            store = self.make_store()
        partial = await store.create(("file",), None)
        await partial.append(memoryview(b"x"))
        assert len(partials_of(self.root)) == 1
        await partial.commit(NOTHING)
        assert (tree_of(self.root), partials_of(self.root)) == ({"file": b"x"}, [])
