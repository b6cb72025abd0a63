"""What every provider of an interface must do, whoever provides it.

A suite here is a mixin without a base class, so that no runner takes it for a test by itself::

    class MyStoreTests(MyCase, StoreContract):
        ...

where ``MyCase`` comes first, because it has ``make_store()``.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Awaitable, Coroutine, Iterator
from typing import Any

from twisted.internet.defer import Deferred, gatherResults

from lwstwisted import errors
from lwstwisted.errors import Refusal, Refused
from lwstwisted.interfaces import (
    Batch,
    Check,
    Found,
    Name,
    PartialFile,
    ResumableStore,
    Store,
    StoredUpload,
    anything,
)

EDGE = 1 << 16
"""A size that blocks of file systems, pipes and buffers divide: one less and one more are the edges."""


NOTHING = memoryview(b"")


async def refusal_of(work: Awaitable[object]) -> Refusal:
    """What ``work`` was refused with; a failure if it was not refused."""
    try:
        result = await work
    except Refused as refused:
        return refused.refusal
    raise AssertionError(f"was not refused, but gave {result!r}")


async def together(*work: Coroutine[Deferred[Any], Any, Any]) -> list[Any]:
    """Run coroutines at the same time, and give their results in order."""
    return await gatherResults([Deferred.fromCoroutine(one) for one in work], consumeErrors=True)


async def put(store: Store, name: Name, data: bytes, block: int = EDGE) -> bool:
    """Upload ``data`` in blocks, the last one with the commit."""
    partial = await store.create(name, len(data))
    view = memoryview(data)
    while len(view) > block:
        await partial.append(view[:block])
        view = view[block:]
    return await partial.commit(view)


async def get(store: Store, name: Name) -> bytes:
    """The contents of a finished file."""
    with os.fdopen(await store.open_file(name), "rb") as file:
        return file.read()


async def names_in(store: Store, name: Name = ()) -> list[str]:
    """What a folder lists."""
    return [entry.name for entry in await store.list_folder(name)]


def every_call(store: Store, name: Name) -> Iterator[Awaitable[object]]:
    """Each call that takes a name."""
    yield store.create(name, 1)
    yield store.open_file(name)
    yield store.list_folder(name)
    yield store.delete(name)
    yield store.batch().create(name, 1)


async def put_into(batch: Batch, name: Name, data: bytes, check: Check = anything) -> PartialFile:
    """Make ``data`` a file of a batch."""
    partial = await batch.create(name, None, check)
    await partial.append(memoryview(data))
    await partial.commit(NOTHING)
    return partial


def refuse_all(found: Found | None) -> None:
    """A check that nothing passes."""
    raise Refused(errors.PRECONDITION_FAILED)


def sample(size: int) -> bytes:
    """Bytes of which no two blocks are alike."""
    return hashlib.shake_128(b"lwstwisted").digest(size)


class StoreContract:
    """What a store and its partial files promise (``interfaces.Store``, ``interfaces.PartialFile``)."""

    def make_store(self) -> Store:
        """A new, empty store, which the test case stops in a clean-up."""
        raise NotImplementedError

    async def begun(self, store: Store, name: Name, data: bytes = b"begun") -> PartialFile:
        partial = await store.create(name, None)
        await partial.append(memoryview(data))
        return partial

    # A body becomes a file.

    async def test_upload_is_whole(self) -> None:
        """What was sent is what one gets, also when it came in odd blocks."""
        store = self.make_store()
        data = sample(1_000_003)
        assert await put(store, ("file.bin",), data, block=99_991) is True
        assert hashlib.sha256(await get(store, ("file.bin",))).digest() == hashlib.sha256(data).digest()

    async def test_sizes_around_edges(self) -> None:
        """No byte is lost or doubled at the edge of a block, and an empty file is a file."""
        store = self.make_store()
        for size in (0, 1, EDGE - 1, EDGE, EDGE + 1, 2 * EDGE - 1, 2 * EDGE, 2 * EDGE + 1):
            await put(store, (f"{size}",), sample(size))
            assert await get(store, (f"{size}",)) == sample(size), size

    async def test_memory_may_be_reused(self) -> None:
        """The caller fills the same buffer again for the next block."""
        store = self.make_store()
        buffer = bytearray(b"a" * EDGE)
        partial = await store.create(("file",), None)
        await partial.append(memoryview(buffer))
        buffer[:] = b"b" * EDGE
        await partial.append(memoryview(buffer))
        buffer[:] = b"c" * EDGE
        await partial.commit(memoryview(b""))
        assert await get(store, ("file",)) == b"a" * EDGE + b"b" * EDGE

    async def test_commit_without_append(self) -> None:
        """A small body comes with the commit alone."""
        store = self.make_store()
        partial = await store.create(("file",), 5)
        assert await partial.commit(memoryview(b"small")) is True
        assert await get(store, ("file",)) == b"small"

    async def test_deep_folders_are_made(self) -> None:
        """A path may name folders that nobody made."""
        store = self.make_store()
        name = tuple(f"level {depth}" for depth in range(40))
        assert await put(store, name, b"deep") is True
        assert await put(store, (*name[:-1], "other"), b"beside") is True
        assert await get(store, name) == b"deep"
        assert await names_in(store, name[:-1]) == [name[-1], "other"]

    async def test_names_are_kept(self) -> None:
        """Spaces, percent signs, quotes and scripts of the world are names like others."""
        store = self.make_store()
        for last in ("a b", "100%", "it's \"quoted\"", "日本語", "é", "-rf", ".hidden", "..."):
            await put(store, ("folder", last), last.encode())
            assert await get(store, ("folder", last)) == last.encode()

    # Nothing is visible before.

    async def test_invisible_before_commit(self) -> None:
        """Half an upload can't be seen, read or deleted, nor can the folders that it will make."""
        store = self.make_store()
        partial = await self.begun(store, ("new", "file"))
        assert await names_in(store) == []
        assert await refusal_of(store.open_file(("new", "file"))) is errors.NOT_FOUND
        assert await refusal_of(store.delete(("new", "file"))) is errors.NOT_FOUND
        await partial.commit(memoryview(b""))
        assert await names_in(store) == ["new"]

    async def test_discard_leaves_nothing(self) -> None:
        """An upload that was cut leaves no file and no folder."""
        store = self.make_store()
        partial = await self.begun(store, ("new", "file"))
        await partial.discard()
        assert await names_in(store) == []
        assert await refusal_of(store.list_folder(("new",))) is errors.NOT_FOUND

    async def test_discard_may_be_repeated(self) -> None:
        """Whoever cleans up needn't know who did before."""
        partial = await self.begun(self.make_store(), ("file",))
        await partial.discard()
        await partial.discard()

    async def test_discard_after_commit_is_harmless(self) -> None:
        """A ``finally: discard()`` doesn't take back what was committed."""
        store = self.make_store()
        partial = await self.begun(store, ("file",))
        await partial.commit(memoryview(b""))
        await partial.discard()
        assert await get(store, ("file",)) == b"begun"

    async def test_no_use_after_discard(self) -> None:
        """Late bytes of a discarded upload go nowhere."""
        store = self.make_store()
        partial = await self.begun(store, ("file",))
        await partial.discard()
        assert await refusal_of(partial.append(memoryview(b"late"))) is errors.STORE_FAILED
        assert await refusal_of(partial.commit(memoryview(b"late"))) is errors.STORE_FAILED
        assert await names_in(store) == []

    # One name, several uploads.

    async def test_created_or_replaced(self) -> None:
        """The client is told 201 or 204 by this answer."""
        store = self.make_store()
        assert await put(store, ("file",), sample(3 * EDGE)) is True
        assert await put(store, ("file",), b"short") is False
        assert await get(store, ("file",)) == b"short"
        await store.delete(("file",))
        assert await put(store, ("file",), b"again") is True

    async def test_old_file_stays_until_commit(self) -> None:
        """A replacement that is under way, or was cut, doesn't hurt the old file."""
        store = self.make_store()
        await put(store, ("file",), b"old")
        partial = await self.begun(store, ("file",), b"new")
        assert await get(store, ("file",)) == b"old"
        await partial.discard()
        assert await get(store, ("file",)) == b"old"

    async def test_last_commit_wins_whole(self) -> None:
        """Of two uploads to one name the one that ends last is what remains, not a mixture."""
        store = self.make_store()
        first = await self.begun(store, ("file",), b"1" * EDGE)
        second = await self.begun(store, ("file",), b"2" * 10)
        assert await second.commit(memoryview(b"2")) is True
        assert await first.commit(memoryview(b"1")) is False
        assert await get(store, ("file",)) == b"1" * (EDGE + 1)

    async def test_reader_sees_old_or_new_whole(self) -> None:
        """Who downloads while others replace gets one of the files, never parts of two."""
        store = self.make_store()
        versions = {digit.encode() * 3 * EDGE for digit in "0123456789"}
        await put(store, ("file",), b"0" * 3 * EDGE)

        async def replace() -> None:
            for version in sorted(versions):
                await put(store, ("file",), version)

        async def read() -> None:
            for _ in range(30):
                assert await get(store, ("file",)) in versions

        await together(replace(), read(), replace(), read())

    async def test_open_file_outlives_its_name(self) -> None:
        """A download that has begun ends well, although the file is replaced or deleted."""
        store = self.make_store()
        await put(store, ("file",), b"old")
        replaced = await store.open_file(("file",))
        await put(store, ("file",), b"new")
        deleted = await store.open_file(("file",))
        await store.delete(("file",))
        for descriptor, data in ((replaced, b"old"), (deleted, b"new")):
            with os.fdopen(descriptor, "rb") as file:
                assert file.read() == data

    async def test_twenty_at_once(self) -> None:
        """Uploads at the same time, into the same new folders, don't mix."""
        store = self.make_store()
        names = [("new", f"folder {number % 3}", f"{number}") for number in range(20)]
        created = await together(
            *(put(store, name, sample(EDGE + at), block=10_007) for at, name in enumerate(names))
        )
        assert created == [True] * 20
        for at, name in enumerate(names):
            assert await get(store, name) == sample(EDGE + at)

    async def test_one_name_twenty_times_at_once(self) -> None:
        """Exactly one of them is told that the name is new."""
        store = self.make_store()
        bodies = [bytes([65 + at]) * EDGE for at in range(20)]
        created = await together(*(put(store, ("new", "file"), body) for body in bodies))
        assert sorted(created) == [False] * 19 + [True]
        assert await get(store, ("new", "file")) in bodies
        assert await names_in(store, ("new",)) == ["file"]

    async def test_replaced_while_deleted(self) -> None:
        """An upload never fails because somebody deletes the old file at the same time."""
        store = self.make_store()

        async def replace() -> None:
            for _ in range(40):
                await put(store, ("file",), b"x")

        async def delete() -> None:
            for _ in range(80):
                try:
                    await store.delete(("file",))
                except Refused as refused:
                    assert refused.refusal is errors.NOT_FOUND

        await together(replace(), delete(), replace(), delete())

    # Refusals.

    async def test_folder_where_a_file_is_meant(self) -> None:
        """A folder can't be replaced, read or deleted as a file; the root neither."""
        store = self.make_store()
        await put(store, ("folder", "file"), b"x")
        for name in ((), ("folder",)):
            assert await refusal_of(store.create(name, 1)) is errors.IS_FOLDER
            assert await refusal_of(store.open_file(name)) is errors.IS_FOLDER
            assert await refusal_of(store.delete(name)) is errors.IS_FOLDER

    async def test_file_where_a_folder_is_meant(self) -> None:
        """Nothing can be beneath a file."""
        store = self.make_store()
        await put(store, ("file",), b"x")
        for name in (("file", "below"), ("file", "far", "below")):
            assert await refusal_of(store.create(name, 1)) is errors.NOT_A_FOLDER
            assert await refusal_of(store.open_file(name)) is errors.NOT_FOUND
            assert await refusal_of(store.delete(name)) is errors.NOT_FOUND
            assert await refusal_of(store.list_folder(name)) is errors.NOT_A_FOLDER
        assert await refusal_of(store.list_folder(("file",))) is errors.NOT_A_FOLDER

    async def test_name_became_a_folder(self) -> None:
        """What was free at the beginning may be taken at the end: nothing of the upload is left then."""
        store = self.make_store()
        partial = await self.begun(store, ("name",))
        await put(store, ("name", "file"), b"x")
        assert await refusal_of(partial.commit(memoryview(b""))) is errors.IS_FOLDER
        assert await names_in(store) == ["name"]
        assert await names_in(store, ("name",)) == ["file"]

    async def test_folder_became_a_file(self) -> None:
        """The same for a folder on the way."""
        store = self.make_store()
        partial = await self.begun(store, ("name", "new", "file"))
        await put(store, ("name",), b"x")
        assert await refusal_of(partial.commit(memoryview(b""))) is errors.NOT_A_FOLDER
        assert await get(store, ("name",)) == b"x"

    async def test_missing(self) -> None:
        """What isn't there can't be read, listed or deleted."""
        store = self.make_store()
        for name in (("missing",), ("missing", "file")):
            assert await refusal_of(store.open_file(name)) is errors.NOT_FOUND
            assert await refusal_of(store.list_folder(name)) is errors.NOT_FOUND
            assert await refusal_of(store.delete(name)) is errors.NOT_FOUND

    async def test_unchecked_names_are_a_bug(self) -> None:
        """A name that nobody checked never reaches the storage, whatever it asks for."""
        store = self.make_store()
        for name in (("..", "x"), ("a", ".."), (".",), ("",), ("a/b",), (".lwstwisted", "partial")):
            for work in every_call(store, name):
                try:
                    await work
                except ValueError:
                    continue
                raise AssertionError(f"{name} was taken")

    # Folders.

    async def test_list(self) -> None:
        """Sorted, with sizes; the store's own things are not shown."""
        store = self.make_store()
        assert await store.list_folder(()) == []
        await put(store, ("b",), b"12345")
        await put(store, ("c", "below"), b"")
        await put(store, ("a",), b"")
        entries = await store.list_folder(())
        assert [(entry.name, entry.is_folder, entry.size) for entry in entries] == [
            ("a", False, 0),
            ("b", False, 5),
            ("c", True, 0),
        ]
        assert all(entry.modified > 0 for entry in entries)
        assert await names_in(store, ("c",)) == ["below"]

    async def test_delete(self) -> None:
        """A deleted file is gone for every call; its neighbours stay."""
        store = self.make_store()
        await put(store, ("folder", "file"), b"x")
        await put(store, ("folder", "other"), b"x")
        await store.delete(("folder", "file"))
        assert await names_in(store, ("folder",)) == ["other"]
        assert await refusal_of(store.open_file(("folder", "file"))) is errors.NOT_FOUND
        assert await refusal_of(store.delete(("folder", "file"))) is errors.NOT_FOUND

    # Batches.

    async def test_batch_appears_together(self) -> None:
        """Nothing is visible before, everything afterwards, and each file says whether it's new."""
        store = self.make_store()
        await put(store, ("old",), b"old")
        batch = store.batch()
        bodies = {("new", "a"): sample(EDGE + 1), ("old",): b"replaced", ("new", "deep", "b"): b"", ("c",): b"c"}
        parts = [await put_into(batch, name, data) for name, data in bodies.items()]
        assert await names_in(store) == ["old"]
        assert await get(store, ("old",)) == b"old"
        assert await batch.commit() == [True, False, True, True]
        assert {name: await get(store, name) for name in bodies} == bodies
        for name, part in zip(bodies, parts, strict=True):
            descriptor = await store.open_file(name)
            assert store.describe(descriptor).etag == part.etag
            os.close(descriptor)

    async def test_batch_discarded(self) -> None:
        """A batch that was cut leaves neither files nor folders, and may be discarded again."""
        store = self.make_store()
        await put(store, ("old",), b"old")
        batch = store.batch()
        await put_into(batch, ("new", "a"), b"a")
        await put_into(batch, ("old",), b"b")
        await (await batch.create(("c",), None)).discard()
        await batch.discard()
        await batch.discard()
        assert await names_in(store) == ["old"]
        assert await get(store, ("old",)) == b"old"
        late = await batch.create(("late",), None)
        assert await refusal_of(late.commit(NOTHING)) is errors.STORE_FAILED
        assert await names_in(store) == ["old"]

    async def test_batch_has_what_was_committed(self) -> None:
        """A file of the batch that was discarded is no part of it."""
        store = self.make_store()
        batch = store.batch()
        await (await batch.create(("a",), None)).discard()
        await put_into(batch, ("b",), b"b")
        assert await batch.commit() == [True]
        await batch.discard()
        assert await names_in(store) == ["b"]

    async def test_empty_batch(self) -> None:
        """It gives nothing and costs nothing."""
        store = self.make_store()
        assert await store.batch().commit() == []
        await store.batch().discard()

    async def test_batch_is_refused_whole(self) -> None:
        """One file that can't have its name keeps all the others from theirs; replaced files stay as they were."""
        for at in range(3):
            store = self.make_store()
            await put(store, (f"{at}", "old"), b"old")
            batch = store.batch()
            names: list[Name] = [(f"{at}", "old"), (f"{at}", "new", "a"), (f"{at}", "b")]
            names.insert(at, (f"{at}", "taken"))
            for name in names:
                await put_into(batch, name, b"new")
            await put(store, (f"{at}", "taken", "x"), b"x")
            assert await refusal_of(batch.commit()) is errors.IS_FOLDER
            assert await names_in(store, (f"{at}",)) == ["old", "taken"]
            assert await get(store, (f"{at}", "old")) == b"old"

    async def test_batch_with_a_file_where_a_folder_is_meant(self) -> None:
        """The same for what is on the way."""
        store = self.make_store()
        batch = store.batch()
        for name in (("a",), ("way", "b"), ("c",)):
            await put_into(batch, name, b"new")
        await put(store, ("way",), b"x")
        assert await refusal_of(batch.commit()) is errors.NOT_A_FOLDER
        assert await names_in(store) == ["way"]

    async def test_batch_asks_all_checks(self) -> None:
        """A condition that holds no more at the end keeps the whole batch back."""
        store = self.make_store()
        await put(store, ("old",), b"old")
        seen: list[int | None] = []

        def once(found: Found | None) -> None:
            seen.append(None if found is None else found.size)
            if len(seen) > 1:
                raise Refused(errors.PRECONDITION_FAILED)

        batch = store.batch()
        await put_into(batch, ("a",), b"a")
        await put_into(batch, ("old",), b"b", once)
        await put(store, ("old",), b"other")
        assert await refusal_of(batch.commit()) is errors.PRECONDITION_FAILED
        assert seen == [3, 5]
        assert await names_in(store) == ["old"]
        assert await get(store, ("old",)) == b"other"
        assert await refusal_of(store.batch().create(("x",), None, refuse_all)) is errors.PRECONDITION_FAILED

    async def test_batch_names_are_different(self) -> None:
        """Two files of one name are a bug of the caller."""
        batch = self.make_store().batch()
        await put_into(batch, ("a",), b"1")
        try:
            await put_into(batch, ("a",), b"2")
        except ValueError:
            return
        raise AssertionError("both were taken")

    async def test_batches_at_once_do_not_mix(self) -> None:
        """Of two forms with the same names all files of one remain, and each name was new once."""
        store = self.make_store()
        names: list[Name] = [("folder", f"{number}") for number in range(8)]

        async def upload(data: bytes) -> list[bool]:
            batch = store.batch()
            # Each in an order of its own: who waits for whom must not close to a ring.
            for name in sorted(names, key=lambda name: hashlib.md5(data + name[1].encode()).digest()):
                await put_into(batch, name, data)
            return await batch.commit()

        answers = await together(*(upload(b"%d" % number) for number in range(6)))
        assert sorted(answers) == [[False] * 8] * 5 + [[True] * 8]
        assert len({await get(store, name) for name in names}) == 1

    async def test_batch_beside_single_files(self) -> None:
        """Files come and go under the names of a batch: it's never half there when it succeeds."""
        store = self.make_store()

        async def upload() -> None:
            for _ in range(10):
                batch = store.batch()
                for number in range(3):
                    await put_into(batch, ("new", f"{number}"), b"batch")
                assert len(await batch.commit()) == 3

        async def disturb() -> None:
            for number in range(30):
                await put(store, ("new", f"{number % 3}"), b"single")
                try:
                    await store.delete(("new", f"{number % 3}"))
                except Refused as refused:
                    assert refused.refusal is errors.NOT_FOUND

        await together(upload(), disturb(), upload())

    # The end.

    async def test_stop_drops_batches(self) -> None:
        """A batch that nobody committed before the end is refused then, and leaves nothing."""
        store = self.make_store()
        batch = store.batch()
        await put_into(batch, ("a",), b"a")
        await store.stop()
        assert await refusal_of(batch.commit()) is errors.STOPPING
        await batch.discard()

    async def test_stop_waits_for_a_batch(self) -> None:
        """One that is being committed is not lost."""
        store = self.make_store()
        batch = store.batch()
        await put_into(batch, ("a",), b"a")
        commit = Deferred.fromCoroutine(batch.commit())
        await store.stop()
        assert await commit == [True]

    async def test_stop_waits(self) -> None:
        """A commit that is under way when the server stops is not lost."""
        store = self.make_store()
        partial = await store.create(("file",), None)
        commit = Deferred.fromCoroutine(partial.commit(memoryview(sample(16 * EDGE))))
        await store.stop()
        assert commit.called
        assert await commit is True

    async def test_stop_waits_for_every_call(self) -> None:
        """The same for calls that no upload stands behind."""
        store = self.make_store()
        await put(store, ("file",), b"x")
        calls = [Deferred.fromCoroutine(work) for work in (store.list_folder(()), store.delete(("file",)))]
        await together(store.stop(), store.stop())
        assert all(call.called for call in calls)

    async def test_stopped(self) -> None:
        """Afterwards everything is refused, except to clean up; stopping again does nothing."""
        store = self.make_store()
        partial = await self.begun(store, ("file",))
        await together(store.stop(), store.stop())
        assert await refusal_of(partial.append(memoryview(b"x"))) is errors.STOPPING
        assert await refusal_of(partial.commit(memoryview(b"x"))) is errors.STOPPING
        await partial.discard()
        for work in every_call(store, ("file",)):
            assert await refusal_of(work) is errors.STOPPING
        await store.stop()


DAY = 24 * 3600.0


async def uploaded(store: ResumableStore, data: bytes, length: int | None = None, **record: object) -> StoredUpload:
    """An upload that is held, and has some bytes that are durable."""
    upload = await store.begin_upload(record, length, DAY)
    await upload.commit(memoryview(data))
    return upload


async def held(store: ResumableStore, id: str) -> StoredUpload:
    """Hold an upload that nobody holds."""
    upload = await store.open_upload(id)
    assert upload is not None
    return upload


async def contents_of(store: ResumableStore, upload: StoredUpload) -> bytes:
    """The bytes of an upload, which becomes a file for that."""
    await upload.name_it(("the contents", upload.id))
    return await get(store, ("the contents", upload.id))


async def is_room(store: ResumableStore, length: int) -> bool:
    """Whether an upload of so many bytes would be taken."""
    try:
        upload = await store.begin_upload({}, length, DAY)
    except Refused as refused:
        assert refused.refusal in (errors.QUOTA_EXCEEDED, errors.BODY_TOO_LARGE)
        return False
    await upload.remove()
    return True


async def require_room(store: ResumableStore, length: int) -> None:
    """Have the next upload be as large as this at most, to the byte."""
    room = (await is_room(store, length), await is_room(store, length + 1))
    assert room == (True, False), f"room for {length}: {room}"


def wait_for_the_clock() -> None:
    """Let the time of day go on by some milliseconds."""
    end = time.time() + 0.005
    while time.time() < end:
        pass


class ResumableStoreContract:
    """What a store promises of uploads that outlive requests (``interfaces.ResumableStore``, ``StoredUpload``)."""

    def make_store(self, **options: Any) -> ResumableStore:
        """A store, which the test case stops in a clean-up.

        All stores of one test share their files, as the processes of one root do.

        :param options: ``quota`` in bytes.
        """
        raise NotImplementedError

    # Bytes

    async def test_bytes_become_a_file(self) -> None:
        """What several requests sent is one file in the end, also if each of them opens the upload anew."""
        store = self.make_store()
        data = sample(3 * EDGE + 11)
        upload = await store.begin_upload({"a": ["b", 1]}, len(data), DAY)
        assert (upload.state.offset, upload.state.length, upload.state.named) == (0, len(data), None)
        buffer = bytearray(data[:EDGE])
        await upload.append(memoryview(buffer))
        assert upload.state.offset == 0
        buffer[:] = bytes(EDGE)
        assert await upload.commit(memoryview(data[EDGE : EDGE + 1])) is True
        assert upload.state.offset == EDGE + 1
        await upload.release()
        upload = await held(store, upload.id)
        assert (upload.state.offset, upload.state.record) == (EDGE + 1, {"a": ["b", 1]})
        await upload.commit(memoryview(data[EDGE + 1 :]))
        assert upload.state.offset == len(data)
        assert await upload.name_it(("new", "file")) == upload.state.named
        assert await get(store, ("new", "file")) == data

    async def test_invisible_until_named(self) -> None:
        """Nobody sees an upload that is under way, nor one that is whole."""
        store = self.make_store()
        upload = await uploaded(store, b"whole", 5)
        assert await names_in(store) == []
        await upload.name_it(("file",))
        assert await names_in(store) == ["file"]

    async def test_memory_may_be_reused(self) -> None:
        """The caller fills the same buffer again."""
        store = self.make_store()
        buffer = bytearray(b"a" * EDGE)
        upload = await store.begin_upload({}, None, DAY)
        for letter in b"ab":
            buffer[:] = bytes([letter]) * EDGE
            await upload.append(memoryview(buffer))
        buffer[:] = bytes(EDGE)
        await upload.commit(NOTHING)
        assert await contents_of(store, upload) == b"a" * EDGE + b"b" * EDGE

    async def test_uncommitted_is_lost_with_its_holder(self) -> None:
        """What was never told to be durable may be gone: the offset says so, and nothing of it is in the file."""
        store = self.make_store()
        upload = await uploaded(store, b"kept, ")
        await upload.append(memoryview(b"lost, and longer than what comes then"))
        await upload.release()
        upload = await held(store, upload.id)
        assert upload.state.offset == 6
        await upload.commit(memoryview(b"then"))
        assert await contents_of(store, upload) == b"kept, then"

    async def test_discard(self) -> None:
        """What was appended since the last commit is forgotten, and the upload goes on from there."""
        store = self.make_store()
        for length in (None, 10):
            upload = await uploaded(store, b"kept, ", length)
            await upload.append(memoryview(b"bad"))
            await upload.discard()
            await upload.discard()
            assert upload.state.offset == 6
            await upload.commit(memoryview(b"then"))
            await upload.discard()
            assert upload.state.offset == 10
            assert await contents_of(store, upload) == b"kept, then"
            await upload.discard()

    async def test_checkpoint(self) -> None:
        """What is appended by then counts, and no discard takes it back."""
        store = self.make_store()
        upload = await uploaded(store, b"1")
        await upload.append(memoryview(b"2"))
        await upload.checkpoint()
        assert upload.state.offset == 2
        await upload.append(memoryview(b"3"))
        await upload.discard()
        await upload.checkpoint()
        assert upload.state.offset == 2
        await upload.release()
        upload = await held(store, upload.id)
        assert upload.state.offset == 2
        assert await contents_of(store, upload) == b"12"

    async def test_checkpoint_beside_append(self) -> None:
        """An upload under way is made durable while it goes on: the offset never goes down, nor beyond what came."""
        store = self.make_store()
        block, blocks = sample(EDGE), 64
        upload = await store.begin_upload({}, blocks * EDGE, DAY)
        appended, offsets = 0, []

        async def append() -> None:
            nonlocal appended
            for _ in range(blocks):
                await upload.append(memoryview(block))
                appended += EDGE

        async def checkpoint() -> None:
            while appended < blocks * EDGE:
                at_least = appended
                await upload.checkpoint()
                assert at_least <= upload.state.offset <= appended + EDGE
                offsets.append(upload.state.offset)

        await together(append(), checkpoint())
        assert offsets == sorted(offsets)
        await upload.commit(NOTHING)
        assert await contents_of(store, upload) == block * blocks

    async def test_verify(self) -> None:
        """The bytes of one request are compared with its checksums, without those before."""
        store = self.make_store()
        upload = await uploaded(store, b"before")
        data = sample(2 * EDGE)
        await upload.append(memoryview(data[:EDGE]))
        await upload.append(memoryview(data[EDGE:]))
        right = {"sha256": hashlib.sha256(data).digest(), "crc32": zlib.crc32(data).to_bytes(4, "big")}
        assert await upload.verify(right) is True
        assert await upload.verify({}) is True
        for name in right:
            assert await upload.verify({**right, name: b"wrong"}) is False
        await upload.discard()
        assert await upload.verify({"md5": hashlib.md5(b"").digest()}) is True
        await upload.append(memoryview(data))
        await upload.commit(NOTHING)
        assert await upload.verify(right) is False
        assert upload.state.offset == 6 + len(data)

    async def test_never_longer_than_announced(self) -> None:
        """A byte too many is refused, and those before it are good."""
        store = self.make_store()
        upload = await uploaded(store, b"12", 3)
        assert await refusal_of(upload.append(memoryview(b"34"))) is errors.UPLOAD_OVERRUN
        await upload.commit(memoryview(b"3"))
        assert await refusal_of(upload.append(memoryview(b"4"))) is errors.UPLOAD_OVERRUN
        assert await contents_of(store, upload) == b"123"

    # What is kept with it

    async def test_record(self) -> None:
        """What an upload is meant to be is kept with it, through all changes, whatever characters it has."""
        store = self.make_store()
        upload = await store.begin_upload({"name": "\u65e5\n\u2028\0", "n": None}, None, DAY)
        assert upload.state.record == {"name": "\u65e5\n\u2028\0", "n": None}
        for number in range(20):
            await upload.keep({"number": number, "much": "x" * 1000}, None)
            await upload.commit(memoryview(b"x"))
            assert upload.state.record["number"] == number
        await upload.release()
        state = (await held(store, upload.id)).state
        assert (state.record, state.offset, state.length) == ({"number": 19, "much": "x" * 1000}, 20, None)

    async def test_length_announced_later(self) -> None:
        """Once, and never less than what is there."""
        store = self.make_store()
        upload = await uploaded(store, b"12345")
        assert await refusal_of(upload.keep({}, 4)) is errors.LENGTH_MISMATCH
        assert upload.state.length is None
        await upload.keep({"more": 1}, 6)
        for length in (None, 5, 7):
            assert await refusal_of(upload.keep({}, length)) is errors.LENGTH_MISMATCH
        await upload.release()
        upload = await held(store, upload.id)
        assert (upload.state.length, upload.state.offset, upload.state.record) == (6, 5, {"more": 1})
        await upload.keep({}, 6)
        assert await refusal_of(upload.append(memoryview(b"67"))) is errors.UPLOAD_OVERRUN

    # Uploads of uploads

    async def test_take_from(self) -> None:
        """Parts become one, in the order of taking, one of them twice, and stay what they were."""
        store = self.make_store()
        one, two = [await uploaded(store, data, len(data)) for data in (sample(5 * EDGE + 3), b"two")]
        whole = await store.begin_upload({}, None, DAY)
        for part in (one, two, one):
            await whole.take_from(part)
        assert whole.state.offset == 0
        await whole.commit(memoryview(b"."))
        expected = sample(5 * EDGE + 3) + b"two" + sample(5 * EDGE + 3) + b"."
        assert whole.state.offset == len(expected)
        assert await contents_of(store, whole) == expected
        assert await contents_of(store, one) == sample(5 * EDGE + 3)
        assert await contents_of(store, two) == b"two"

    async def test_take_what_is_durable(self) -> None:
        """Of a part only what counts is taken; of one that was let go, or has been removed, nothing."""
        store = self.make_store()
        part, whole = await uploaded(store, b"part"), await uploaded(store, b"whole ", 10)
        await part.append(memoryview(b"lost"))
        await whole.take_from(part)
        assert await refusal_of(whole.take_from(part)) is errors.UPLOAD_OVERRUN
        await part.release()
        assert await refusal_of(whole.take_from(part)) is not None
        await whole.commit(NOTHING)
        assert await contents_of(store, whole) == b"whole part"

    # Its name

    async def test_named(self) -> None:
        """It is a file: new or in place of another one, and says so again as often as it is asked."""
        store = self.make_store()
        for data in (b"first", b"second"):
            upload = await uploaded(store, data, len(data))
            named = await upload.name_it(("file",))
            assert named.created is (data == b"first")
            assert await get(store, ("file",)) == data
            descriptor = await store.open_file(("file",))
            assert store.describe(descriptor).etag == named.etag == upload.etag
            os.close(descriptor)
            assert await upload.name_it(("other",)) == named == upload.state.named
            await upload.release()
            assert (await store.look_at_upload(upload.id)).named == named
            upload = await held(store, upload.id)
            assert (await upload.name_it(("other",)), upload.state.offset) == (named, len(data))
        assert await names_in(store) == ["file"]

    async def test_named_with_its_last_bytes(self) -> None:
        """The bytes since the last commit are in the file as well; if it is refused they count all the same."""
        store = self.make_store()
        right = {"sha256": hashlib.sha256(b"12345").digest()}
        for length in (5, None):
            upload = await uploaded(store, b"12", length)
            await upload.append(memoryview(b"345"))
            if length is None:
                assert await refusal_of(upload.name_it(("file",), refuse_all)) is errors.PRECONDITION_FAILED
            else:
                wrong = {"sha256": bytes(32)}
                assert await refusal_of(upload.name_it(("file",), anything, wrong)) is errors.DIGEST_MISMATCH
            assert (upload.state.offset, upload.state.length) == (5, length)
            upload = await uploaded(store, b"12", length)
            await upload.append(memoryview(b"345"))
            await upload.name_it(("file",), anything, right)
            assert (upload.state.offset, upload.state.length) == (5, 5)
            assert await get(store, ("file",)) == b"12345"

    async def test_handed_over(self) -> None:
        """One request may leave an upload to the next one, and nobody comes between; what isn't durable is in the way,
        and so is somebody else who waits."""
        store, other = self.make_store(), self.make_store()
        upload: Any = await uploaded(store, b"12", 9)
        await upload.append(memoryview(b"3"))
        assert upload.hand_over() is None
        await upload.discard()
        heir = upload.hand_over()
        await upload.release()
        assert heir.state.offset == 2
        assert await other.open_upload(heir.id) is None
        assert heir.hand_over() is None
        await heir.commit(memoryview(b"34"))
        await heir.release()
        upload = await held(other, heir.id)
        assert upload.state.offset == 4
        await upload.remove()
        assert upload.hand_over() is None

    async def test_list_with_parts(self) -> None:
        """Uploads that wait for others are known apart, from their begin until they are files or gone."""
        store: Any = self.make_store()
        plain = await uploaded(store, b"1", 1)
        first, second = [await uploaded(store, b"12", 2, parts=[plain.id]) for _ in range(2)]
        assert sorted(await store.list_with_parts()) == sorted([first.id, second.id])
        await first.name_it(("file",))
        assert await store.list_with_parts() == [second.id]
        await second.remove()
        assert await store.list_with_parts() == []

    async def test_named_takes_no_more(self) -> None:
        """Late bytes go nowhere: not into the file, and not beside it."""
        store = self.make_store()
        upload = await uploaded(store, b"file")
        await upload.name_it(("file",))
        for _ in range(2):
            assert await refusal_of(upload.append(memoryview(b"late"))) is errors.STORE_FAILED
            await upload.discard()
            await upload.release()
            upload = await held(store, upload.id)
        assert upload.state.offset == 4
        assert await get(store, ("file",)) == b"file"

    async def test_empty(self) -> None:
        """An upload of no bytes is an empty file."""
        store = self.make_store()
        upload = await store.begin_upload({}, 0, DAY)
        await upload.release()
        upload = await held(store, upload.id)
        assert (await upload.name_it(("empty",))).created is True
        assert await get(store, ("empty",)) == b""
        assert (await store.look_at_upload(upload.id)).named is not None

    async def test_uncommitted_bytes_are_named_too(self) -> None:
        """All its bytes become the file."""
        store = self.make_store()
        upload = await uploaded(store, b"committed, ")
        await upload.append(memoryview(b"or not"))
        await upload.name_it(("file",))
        assert upload.state.offset == 17
        assert await get(store, ("file",)) == b"committed, or not"

    async def test_refused_by_its_check(self) -> None:
        """A condition that doesn't hold any more keeps it from its name; the upload and the old file stay."""
        store = self.make_store()
        await put(store, ("file",), b"old!!")
        upload = await uploaded(store, b"new", 3)
        seen: list[int | None] = []

        def check(found: Found | None) -> None:
            seen.append(None if found is None else found.size)
            refuse_all(found)

        for name in (("file",), ("deep", "file")):
            assert await refusal_of(upload.name_it(name, check)) is errors.PRECONDITION_FAILED
        assert seen == [5, None]
        assert (upload.state.offset, upload.state.named) == (3, None)
        assert await names_in(store) == ["file"]
        assert await get(store, ("file",)) == b"old!!"
        assert (await upload.name_it(("file",))).created is False
        assert await get(store, ("file",)) == b"new"

    async def test_name_is_taken(self) -> None:
        """A folder where the file should be, or a file on the way: refused, and to be tried again."""
        store = self.make_store()
        upload = await uploaded(store, b"new", 3)
        await put(store, ("name", "file"), b"x")
        assert await refusal_of(upload.name_it(("name",))) is errors.IS_FOLDER
        assert await refusal_of(upload.name_it(("name", "file", "below"))) is errors.NOT_A_FOLDER
        await upload.release()
        upload = await held(store, upload.id)
        assert (await upload.name_it(("name", "other"))).created is True

    async def test_wrong_digest(self) -> None:
        """The file must hash to what was announced; the right digests are kept with it."""
        store = self.make_store()
        upload = await uploaded(store, b"data", 4)
        await upload.release()
        upload = await held(store, upload.id)
        right = {name: hashlib.new(name, b"data").digest() for name in ("sha256", "md5")}
        for name in right:
            wrong = {**right, name: bytes(len(right[name]))}
            assert await refusal_of(upload.name_it(("file",), anything, wrong)) is errors.DIGEST_MISMATCH
        assert await names_in(store) == []
        await upload.name_it(("file",), anything, right)
        descriptor = await store.open_file(("file",))
        assert store.describe(descriptor).digests == {"sha256": right["sha256"]}
        os.close(descriptor)

    async def test_digest_of_all_parts(self) -> None:
        """What nobody has told is computed over all requests that brought something, and kept."""
        store = self.make_store()
        upload = await uploaded(store, b"da", 4)
        await upload.release()
        upload = await held(store, upload.id)
        await upload.commit(memoryview(b"ta"))
        await upload.name_it(("file",), anything, {"sha512": None})
        digests = {"sha512": hashlib.sha512(b"data").digest()}
        assert upload.digests == digests
        descriptor = await store.open_file(("file",))
        assert store.describe(descriptor).digests == digests
        os.close(descriptor)

    async def test_refused_at_the_beginning(self) -> None:
        """What could not be named is refused before a byte is sent, and nothing is left of it."""
        store = self.make_store()
        await put(store, ("folder", "file"), b"x")
        for name, check, refusal in (
            ((), anything, errors.IS_FOLDER),
            (("folder",), anything, errors.IS_FOLDER),
            (("folder", "file", "below"), anything, errors.NOT_A_FOLDER),
            (("free",), refuse_all, errors.PRECONDITION_FAILED),
        ):
            assert await refusal_of(store.begin_upload({}, 1, DAY, name, check)) is refusal
        for name in (("..", "x"), ("a", "."), ("",), ("a/b",), (".lwstwisted", "uploads")):
            try:
                await store.begin_upload({}, 1, DAY, name)
            except ValueError:
                continue
            raise AssertionError(f"{name} was taken")
        assert await store.list_uploads() == []

    # Who holds it

    async def test_one_holder(self) -> None:
        """Nobody else has what is held, be it in another process; the holder hears that somebody waits."""
        first, second = self.make_store(), self.make_store()
        upload = await uploaded(first, b"held")
        assert upload.is_wanted() is False
        for store in (first, second):
            other = await uploaded(store, b"other")
            assert await store.open_upload(upload.id) is None
            assert (upload.is_wanted(), other.is_wanted()) == (True, False)
        await upload.commit(memoryview(b", still"))
        await upload.release()
        await upload.release()
        taken = await held(second, upload.id)
        assert (taken.state.offset, taken.is_wanted(), upload.is_wanted()) == (11, False, False)
        await upload.release()
        assert await first.open_upload(upload.id) is None
        assert await refusal_of(upload.append(memoryview(b"late"))) is errors.STORE_FAILED

    async def test_many_at_once(self) -> None:
        """Of all that want it in one moment one has it."""
        stores = [self.make_store() for _ in range(2)]
        upload = await uploaded(stores[0], b"held")
        await upload.release()
        found = await together(*(stores[at % 2].open_upload(upload.id) for at in range(8)))
        (holder,) = [one for one in found if one is not None]
        assert holder.state.offset == 4

    async def test_look(self) -> None:
        """To look holds nothing, and disturbs nobody, whoever holds it or not."""
        first, second = self.make_store(), self.make_store()
        upload = await uploaded(first, b"held", 9, a=1)
        for store in (first, second):
            assert await store.look_at_upload(upload.id) == upload.state
        assert upload.is_wanted() is False
        await upload.append(memoryview(b"more"))
        assert (await second.look_at_upload(upload.id)).offset == 4
        await upload.release()
        assert (await second.look_at_upload(upload.id)).offset == 4
        assert await first.open_upload(upload.id) is not None

    # Its id

    async def test_ids(self) -> None:
        """Nobody guesses an id: there are 128 bits in it, none of which is fixed; and it is good for a URL."""
        store = self.make_store()
        ids = [(await store.begin_upload({}, None, DAY)).id for _ in range(40)]
        assert sorted(await store.list_uploads()) == sorted(ids)
        numbers = [int(id, 16) for id in ids if len(id) == 32 and id == id.lower()]
        for bit in range(128):
            assert {number >> bit & 1 for number in numbers} == {0, 1}, bit

    async def test_unknown_ids(self) -> None:
        """What is no id of an upload is not found, whatever it looks like."""
        store = self.make_store()
        upload = await uploaded(store, b"x")
        await upload.release()
        id = upload.id
        for other in (
            *("", ".", "..", "/", "\0", "*", "0", "0" * 32, id[:-1], id + "0", id + "\n", f"{id}.data"),
            *(f"../uploads/{id}", f"./{id}", f"{id}/", "\udcff", "\u0660" * 32, "x" * 100_000),
        ):
            assert await refusal_of(store.open_upload(other)) is errors.UPLOAD_NOT_FOUND, other
            assert await refusal_of(store.look_at_upload(other)) is errors.UPLOAD_NOT_FOUND, other
        assert await store.list_uploads() == [id]

    # Its end

    async def test_remove(self) -> None:
        """A cancelled upload is gone at once for everybody; a file that it has become stays."""
        store, other = self.make_store(), self.make_store()
        for is_named in (False, True):
            upload = await uploaded(store, b"data")
            if is_named:
                await upload.name_it(("file",))
            await upload.remove()
            await upload.release()
            for one in (store, other):
                assert await refusal_of(one.open_upload(upload.id)) is errors.UPLOAD_NOT_FOUND
                assert await refusal_of(one.look_at_upload(upload.id)) is errors.UPLOAD_NOT_FOUND
                assert await one.list_uploads() == []
            assert await refusal_of(upload.append(memoryview(b"late"))) is errors.STORE_FAILED
        assert await get(store, ("file",)) == b"data"

    async def test_expiry(self) -> None:
        """The time counts from the last byte that counted, or change of the record: to look or open adds nothing."""
        store = self.make_store()
        before = time.time()
        upload = await store.begin_upload({}, None, DAY)
        seen = [before + DAY - 0.001, upload.state.expires]
        for step in (upload.commit(memoryview(b"x")), upload.keep({}, 1)):
            wait_for_the_clock()
            await step
            seen.append(upload.state.expires)
        seen.append(time.time() + DAY + 0.001)
        assert seen == sorted(set(seen))
        wait_for_the_clock()
        await store.look_at_upload(upload.id)
        await store.open_upload(upload.id)
        await upload.release()
        wait_for_the_clock()
        upload = await held(store, upload.id)
        await upload.append(NOTHING)
        await upload.discard()
        assert upload.state.expires == seen[-2]

    async def test_sweep(self) -> None:
        """What has expired is removed, but for what somebody holds; a file that one has become stays."""
        store, other = self.make_store(), self.make_store()
        uploads = {}
        for what, lifetime in {"held": -1.0, "free": -1.0, "named": -1.0, "young": DAY}.items():
            uploads[what] = upload = await store.begin_upload({}, None, lifetime)
            await upload.commit(memoryview(what.encode()))
            if what == "named":
                await upload.name_it(("file",))
            if what != "held":
                await upload.release()
        assert await other.sweep_uploads() == 2
        assert not uploads["held"].is_wanted()  # else its holder would leave
        assert sorted(await store.list_uploads()) == sorted([uploads["held"].id, uploads["young"].id])
        await uploads["held"].commit(memoryview(b" still"))
        await uploads["held"].release()
        assert await store.sweep_uploads() == 1
        assert await store.sweep_uploads() == 0
        assert await store.list_uploads() == [uploads["young"].id]
        assert await get(store, ("file",)) == b"named"

    async def test_stop_lets_go(self) -> None:
        """A store that stops lets go of its uploads, which another one finds as they were committed."""
        store = self.make_store()
        uploads = [await uploaded(store, b"%d, " % number) for number in range(3)]
        for upload in uploads:
            await upload.append(memoryview(b"lost"))
        await store.stop()
        for work in (uploads[0].append(memoryview(b"late")), uploads[1].checkpoint(), store.open_upload("0" * 32)):
            assert await refusal_of(work) is errors.STOPPING
        for work in (store.begin_upload({}, 1, DAY), store.list_uploads(), store.look_at_upload(uploads[0].id)):
            assert await refusal_of(work) is errors.STOPPING
        for upload in uploads:
            await upload.discard()
            await upload.release()
        again = self.make_store()
        for number, upload in enumerate(uploads):
            found = await held(again, upload.id)
            assert found.state.offset == 3
            assert await contents_of(again, found) == b"%d, " % number

    async def test_stop_waits(self) -> None:
        """What is being committed when the store stops is not lost."""
        store = self.make_store()
        upload = await store.begin_upload({}, None, DAY)
        commit = Deferred.fromCoroutine(upload.commit(memoryview(sample(16 * EDGE))))
        await store.stop()
        assert await commit is True
        assert upload.state.offset == 16 * EDGE

    # Space

    async def test_quota_of_what_is_announced(self) -> None:
        """The whole announced length counts from the beginning, whatever has come, until the upload is removed."""
        store = self.make_store(quota=10_000)
        await put(store, ("file",), bytes(1000))
        upload = await store.begin_upload({}, 3000, DAY)
        await require_room(store, 6000)
        await upload.commit(memoryview(bytes(2000)))
        await upload.append(memoryview(bytes(500)))
        await require_room(store, 6000)
        await upload.discard()
        await upload.release()
        upload = await held(store, upload.id)
        await require_room(store, 6000)
        assert await refusal_of(store.begin_upload({}, 6001, DAY)) is errors.QUOTA_EXCEEDED
        assert await refusal_of(store.begin_upload({}, 10_001, DAY)) is errors.BODY_TOO_LARGE
        await upload.remove()
        await require_room(store, 9000)

    async def test_quota_of_what_comes(self) -> None:
        """Without a length the bytes count as they come, and are given back when they are forgotten."""
        store = self.make_store(quota=10_000)
        upload = await uploaded(store, bytes(2000))
        await upload.append(memoryview(bytes(3000)))
        await require_room(store, 5000)
        assert await refusal_of(upload.append(memoryview(bytes(5001)))) is errors.QUOTA_EXCEEDED
        await require_room(store, 5000)
        await upload.discard()
        await require_room(store, 8000)
        await upload.append(memoryview(bytes(1000)))
        await upload.release()
        upload = await held(store, upload.id)
        await require_room(store, 8000)
        await upload.remove()
        await require_room(store, 10_000)

    async def test_quota_of_a_late_length(self) -> None:
        """When the length is told the rest of it counts as well; one that is too large changes nothing."""
        store = self.make_store(quota=10_000)
        upload = await uploaded(store, bytes(2000))
        assert await refusal_of(upload.keep({}, 10_001)) is errors.QUOTA_EXCEEDED
        assert await refusal_of(upload.keep({}, 12_001)) is errors.BODY_TOO_LARGE
        assert upload.state.length is None
        await require_room(store, 8000)
        await upload.keep({}, 7000)
        await require_room(store, 3000)
        await upload.keep({"other": 1}, 7000)
        await require_room(store, 3000)
        await upload.remove()
        await require_room(store, 10_000)

    async def test_quota_of_parts(self) -> None:
        """What is taken from others counts a second time, as it is there twice."""
        store = self.make_store(quota=10_000)
        part, whole = await uploaded(store, bytes(3000), 3000), await store.begin_upload({}, None, DAY)
        await whole.take_from(part)
        await require_room(store, 4000)
        await whole.take_from(part)
        assert await refusal_of(whole.take_from(part)) is errors.QUOTA_EXCEEDED
        await require_room(store, 1000)
        await part.remove()
        await require_room(store, 4000)
        await whole.remove()
        await require_room(store, 10_000)

    async def test_quota_of_files(self) -> None:
        """A finished file counts once, with or without its record, and no longer than it is there."""
        store = self.make_store(quota=10_000)
        for length in (3000, None):
            upload = await uploaded(store, bytes(3000), length)
            assert await refusal_of(upload.name_it(("file",), refuse_all)) is errors.PRECONDITION_FAILED
            await require_room(store, 7000)
            await upload.name_it(("file",))
            await require_room(store, 7000)
            await upload.release()
            upload = await held(store, upload.id)
            await upload.remove()
            await require_room(store, 7000)
            await store.delete(("file",))
            await require_room(store, 10_000)

    async def test_quota_of_a_replaced_file(self) -> None:
        """The old file counts until it is replaced."""
        store = self.make_store(quota=10_000)
        await put(store, ("file",), bytes(1000))
        upload = await uploaded(store, bytes(3000), 3000)
        await require_room(store, 6000)
        await upload.name_it(("file",))
        await require_room(store, 7000)

    async def test_quota_of_what_expired(self) -> None:
        """To sweep gives back what it removed."""
        store = self.make_store(quota=10_000)
        for length in (3000, None):
            upload = await store.begin_upload({}, length, -1.0)
            await upload.commit(memoryview(bytes(1000)))
            await upload.release()
        await require_room(store, 6000)
        await store.sweep_uploads()
        await require_room(store, 10_000)

    async def test_quota_after_a_restart(self) -> None:
        """Whoever counts anew counts the same."""
        store = self.make_store(quota=20_000)
        announced = await uploaded(store, bytes(1000), 3000)
        unknown = await uploaded(store, bytes(2000))
        await unknown.append(memoryview(bytes(500)))
        named, removed = [await uploaded(store, bytes(4000), 4000) for _ in range(2)]
        await named.name_it(("file",))
        await removed.remove()
        await require_room(store, 20_000 - 3000 - 2500 - 4000)
        await store.stop()
        again = self.make_store(quota=20_000)
        room = 20_000 - 3000 - 2000 - 4000
        found = await held(again, unknown.id)
        await require_room(again, room)
        await found.remove()
        await require_room(again, room + 2000)
        await (await held(again, named.id)).remove()
        await require_room(again, room + 2000)
        await (await held(again, announced.id)).remove()
        await require_room(again, room + 5000)
