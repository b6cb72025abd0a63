"""What every provider of an interface must do, whoever provides it.

A suite here is a mixin without a base class, so that no runner takes it for a test by itself::

    class MyStoreTests(MyCase, StoreContract):
        ...

where ``MyCase`` comes first, because it has ``make_store()``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Awaitable, Coroutine, Iterator
from typing import Any

from twisted.internet.defer import Deferred, gatherResults

from lwstwisted import errors
from lwstwisted.errors import Refusal, Refused
from lwstwisted.interfaces import Batch, Check, Found, Name, PartialFile, Store, anything

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
