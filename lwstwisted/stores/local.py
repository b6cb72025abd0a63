"""A store that is a folder on this machine.

Facts
    * A name that appears before its file is durable may be empty or torn after a power cut; a file
      whose folder was not synced may have no name at all. ``kill -9`` shows neither of the two.
    * ``O_TMPFILE`` opens a file without a name, so that a crash leaves nothing; ``linkat`` names it in
      one step and refuses to overwrite; ``rename`` overwrites in one step, and needs a name to begin with.
    * A single write may block for 100 ms under writeback, an fsync for 300 ms and more.
    * A failed fsync drops the dirty pages: the next one reports success about data that are gone.
    * Between two looks at a path anybody else who may write to the tree can put a symbolic link there.

Decision
    A file is written without a name and gets one when it is whole: write, fchmod, fsync(file), mkdir and
    fsync(parent) for each missing folder, ``linkat``, fsync(folder), answer. To replace a file: ``linkat``
    to a temporary name in ``.lwstwisted/partial``, ``rename`` over the old one, fsync(folder). The whole
    commit is one hop to a thread. Where the file system has no ``O_TMPFILE``, the file has its temporary
    name from the beginning. A temporary name belongs to whoever holds its ``flock``; what nobody holds
    was left by a crash, and the next start removes it.

    Every path is walked from one descriptor of the root, held for life, segment by segment with
    ``O_NOFOLLOW``. So no symbolic link is followed, whenever it was put there, and no file system entered
    that is mounted inside.

    Files that belong together get their names together: how, is told in ``batch.py``.

    Whatever fails makes the partial file final: it is closed at once, which frees its space, and any
    further call fails too. No fsync is tried twice.

Price
    * A descriptor for each upload, from the first bytes on that are worth a write.
    * A lock of the name in each commit, and of all its names in each form, which other processes see as well
      (``locks.py``): one system call to take it, one to give it back.
    * One lock around each making of a folder: who finds a folder may rely on its name being durable. Between
      processes that share a root this relies on the file system keeping a folder's own entry when the folder is
      synced, as ext4, XFS and btrfs do.
    * A cancelled call returns only when its thread has finished, as the thread uses its memory.
    * When the fsync of the folder fails after a *replace*, the old file cannot come back. The answer is a
      failure, and the new file is visible, whole. A file that was *created* loses its name again.
    * The file system must have hard links.

Roads not taken
    * Writing in the reactor's thread: stalls of 10-117 ms, and fsync stops the loop for 310-340 ms.
    * The reactor's own pool: ten threads that DNS shares, so that a slow disk delays name look-ups.
    * A temporary file beside its target and ``rename``: visible to listings, and a crash leaves it anywhere.
    * ``openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)``: the same guarantee, but Python does not offer it.
    * ``os.fsync`` of ``partial`` after a replace: it would only save the sweep some work.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorCore, IReactorFromThreads

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.interfaces import (
    NO_DIGESTS,
    Announce,
    Check,
    Digests,
    Entry,
    Found,
    Name,
    StoreStatistics,
    UploadState,
    anything,
    unannounced,
)
from lwstwisted.stores import waiting
from lwstwisted.stores.batch import BatchFolder, recover_batches
from lwstwisted.stores.hashing import RunningDigests
from lwstwisted.stores.holding import LocalUpload
from lwstwisted.stores.placing import OpenPartial, finish_file
from lwstwisted.stores.resumable import UploadFile
from lwstwisted.stores.space import Reservation, Space
from lwstwisted.stores.threads import Threads
from lwstwisted.stores.tree import Durability, Segments, Tree, encoded

__all__ = ["WRITER_THREADS", "Durability", "LocalBatch", "LocalPartial", "LocalStore"]

READER_THREADS = 4
"""Further threads, for what needs no sync: a listing, or who asks how far his upload is, doesn't wait for the uploads
of a slow disk."""

URGENT_THREADS = 32
"""Further threads, for uploads that a newer request waits for. They are made durable beside all others, which may be
hundreds: where a sync takes 50 ms, 200 that are wanted at once are so within 0.7 s."""

WRITER_THREADS = 8
"""Threads of a store: they wait more than they work, and a journal syncs several files at once. Commits of
4 KiB files per second with 1, 2, 4, 8, 16, 32 threads on two cores and a quick disk: 1680, 2280, 2880, 2620,
2660, 2020. A slow disk gains from more than 4."""


class _Draft:
    """A file that isn't finished, opened for its first bytes. Every method blocks; one thread at a time is let in."""

    def __init__(
        self, tree: Tree, path: Segments, check: Check, digests: Digests, announce: Announce = unannounced
    ) -> None:
        self.is_over = False
        self.etag = ""
        self._tree = tree
        self._path = path
        self._check = check
        self._announce = announce
        self.digests: dict[str, bytes] = {}
        self._running = RunningDigests(digests)
        self._file: OpenPartial | None = None
        self._offset = 0
        self._reservation: Reservation | None = None
        # A descriptor number that was closed may be another upload's by the next write.
        self._entered = Lock()

    def begin(self, length: int | None) -> None:
        self._tree.check_target(self._path, self._check)
        self._reservation = Reservation(self._tree.space, length)

    def _open(self) -> OpenPartial:
        if self.is_over:
            raise OSError(errno.EBADF, "the file was given up")
        if self._file is None:
            self._file = OpenPartial(self._tree, *self._tree.open_partial())
            if self._reservation is not None:
                self._reservation.allocate(self._file.descriptor)
        return self._file

    def append(self, data: memoryview) -> None:
        with self._entered:
            try:
                self._write(self._open().descriptor, data)
            except BaseException:
                self._close()
                raise

    def commit(self, data: memoryview) -> bool:
        with self._entered:
            try:
                descriptor = self._open().descriptor
                self._write(descriptor, data)
                if self._running.wrong():
                    raise Refused(errors.DIGEST_MISMATCH)
                self.digests = self._running.found()
                self.etag = finish_file(self._tree, descriptor, self.digests)
                self._announce(self.etag, self._offset)
                return self._publish()
            finally:
                self._close()

    def close(self) -> None:
        with self._entered:
            self._close()

    def _close(self) -> None:
        self.is_over = True
        file, self._file = self._file, None
        reservation, self._reservation = self._reservation, None
        if file is not None:
            file.close()
        if reservation is not None:
            if file is not None and file.is_named:
                reservation.keep()
                self._tree.space.count(-file.replaced)
            reservation.give_back()

    def _write(self, descriptor: int, data: memoryview) -> None:
        assert self._reservation is not None
        self._reservation.before_write(len(data))
        while data:
            written = os.pwrite(descriptor, data, self._offset)
            self._offset += written
            self._reservation.written(written)
            self._running.update(data[:written])
            data = data[written:]

    def _publish(self) -> bool:
        assert self._file is not None and self._reservation is not None
        self._reservation.settle()
        return self._file.publish(self._path, self._check)


class _BatchDraft(_Draft):
    """A draft whose finished file goes to a batch, and gets its name with that."""

    def __init__(
        self, tree: Tree, path: Segments, check: Check, digests: Digests, batch: BatchFolder
    ) -> None:
        super().__init__(tree, path, check, digests)
        self._batch = batch

    def begin(self, length: int | None) -> None:
        self._tree.check_target(self._path, self._check)
        self._reservation = Reservation(self._tree.space, length, self._batch.space)

    def _open(self) -> OpenPartial:
        if not self.is_over:
            self._batch.open()
        return super()._open()

    def _publish(self) -> bool:
        assert self._file is not None and self._reservation is not None
        self._batch.keep(self._path, self._check, self._file.link_new, self._reservation)
        self._reservation = None
        return True


class LocalPartial:
    """A :class:`~lwstwisted.interfaces.PartialFile` on disk; :meth:`LocalStore.create` makes it.

    :param siblings: the unfinished files of the store, which it leaves when it's finished.
    """

    def __init__(self, draft: _Draft, threads: Threads, siblings: set[LocalPartial]) -> None:
        self._draft = draft
        self._threads = threads
        self._siblings = siblings

    @property
    def etag(self) -> str:
        """See :class:`~lwstwisted.interfaces.PartialFile`."""
        return self._draft.etag

    @property
    def digests(self) -> Mapping[str, bytes]:
        """See :class:`~lwstwisted.interfaces.PartialFile`."""
        return self._draft.digests

    async def append(self, data: memoryview) -> None:
        """Write ``data`` behind what was written. See :class:`~lwstwisted.interfaces.PartialFile`."""
        await self._threads.run(self._draft.append, data)

    async def commit(self, data: memoryview) -> bool:
        """Append ``data`` and give the file its name. See :class:`~lwstwisted.interfaces.PartialFile`."""
        try:
            return await self._threads.run(self._draft.commit, data)
        finally:
            self._forget_if_over()

    async def discard(self) -> None:
        """Forget the file. See :class:`~lwstwisted.interfaces.PartialFile`."""
        if not self._draft.is_over:
            await self._threads.finish(self._draft.close)
        self._forget_if_over()

    def _forget_if_over(self) -> None:
        # A commit that was refused because the store is stopping leaves the file open, for stop() to close.
        if self._draft.is_over:
            self._siblings.discard(self)


class LocalBatch:
    """A :class:`~lwstwisted.interfaces.Batch` on disk; :meth:`LocalStore.batch` makes it.

    :param siblings: the batches of the store under way, which it leaves when it's finished.
    """

    def __init__(
        self, tree: Tree, threads: Threads, partials: set[LocalPartial], siblings: set[LocalBatch]
    ) -> None:
        self._tree = tree
        self._threads = threads
        self._partials = partials
        self._siblings = siblings
        self._folder = BatchFolder(tree)

    async def reserve(self, length: int) -> None:
        """Have space for files of so many bytes together; what they don't need is given back at the end of the batch.

        :raises Refused: ``DISK_FULL``, ``QUOTA_EXCEEDED``, ``BODY_TOO_LARGE``, ``STORE_FAILED``, ``STOPPING``.
        """
        self._siblings.add(self)
        await self._threads.run(self._folder.reserve, length)

    async def create(
        self, name: Name, length: int | None, check: Check = anything, digests: Digests = NO_DIGESTS
    ) -> LocalPartial:
        """Begin a file. See :class:`~lwstwisted.interfaces.Batch`."""
        draft = _BatchDraft(self._tree, encoded(name), check, digests, self._folder)
        self._siblings.add(self)
        return await _begin(draft, length, self._threads, self._partials)

    async def commit(self) -> list[bool]:
        """Give all files their names. See :class:`~lwstwisted.interfaces.Batch`."""
        try:
            return await self._threads.run(self._folder.commit)
        finally:
            self._forget_if_closed()

    async def discard(self) -> None:
        """Forget all files. See :class:`~lwstwisted.interfaces.Batch`."""
        if self._folder.is_open:
            await self._threads.finish(self._folder.close)
        self._forget_if_closed()

    def _forget_if_closed(self) -> None:
        if not self._folder.is_open:
            self._siblings.discard(self)


async def _begin(draft: _Draft, length: int | None, threads: Threads, partials: set[LocalPartial]) -> LocalPartial:
    partial = LocalPartial(draft, threads, partials)
    await threads.run(draft.begin, length, undo=lambda _: draft.close())
    partials.add(partial)
    return partial


class LocalStore:
    """A :class:`~lwstwisted.interfaces.Store` that is a folder on this machine.

    :param root: the folder; it is made if it is missing. May be a symbolic link, unlike what is in it.
    :param reactor: where the results of the threads come back; the global one by default.
    :param durability: ``"full"`` is what this module's docstring promises. ``"data"`` syncs the contents
        only: a power cut may take back names. ``"none"`` leaves all to the kernel.
    :param threads: how many calls that write may block at once.
    :param minimum_free: bytes of the disk that no upload takes.
    :param quota: bytes that all files may take together, counted for all processes that share the root; None for no
        such limit. To count them is to look at each file, when the first of these processes starts.
    :param use_tmpfile: False gives every file a temporary name from the beginning, as on a file system
        without ``O_TMPFILE``.
    :param stops_with_reactor: False for one whose owner calls :meth:`stop`, when the uploads under way have ended.
    :raises OSError: if the root cannot be made or written to. This blocks; it is meant for the start.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        reactor: IReactorFromThreads | None = None,
        *,
        durability: Durability = "full",
        threads: int = WRITER_THREADS,
        minimum_free: int = 0,
        quota: int | None = None,
        use_tmpfile: bool = True,
        stops_with_reactor: bool = True,
    ) -> None:
        if reactor is None:
            from twisted.internet import reactor  # type: ignore[assignment]
        self._tree = Tree(Path(root).absolute(), durability, use_tmpfile)
        self._records = waiting.Records(self._tree)
        try:
            recover_batches(self._tree)
            usage = None if quota is None else self._tree.usage(self._count_bytes, quota)
            self._tree.space = Space(self._tree.partial, minimum_free, usage)
            waiting.recover(self._tree)
        except BaseException:
            self._tree.close()
            raise
        self._threads = Threads(cast(IReactorFromThreads, reactor), threads, URGENT_THREADS)
        self._readers = Threads(cast(IReactorFromThreads, reactor), READER_THREADS)
        self._partials: set[LocalPartial] = set()
        self._batches: set[LocalBatch] = set()
        self._uploads: set[LocalUpload] = set()
        # A process whose threads go on doesn't end.
        self._core = IReactorCore(reactor, None) if stops_with_reactor else None
        self._at_shutdown = self._core and self._core.addSystemEventTrigger("before", "shutdown", self._shut_down)

    def _count_bytes(self) -> int:
        return self._tree.count_bytes() + self._records.space_taken()

    def _shut_down(self) -> Deferred[None]:
        self._at_shutdown = None
        return Deferred.fromCoroutine(self.stop())

    async def create(
        self,
        name: Name,
        length: int | None,
        check: Check = anything,
        digests: Digests = NO_DIGESTS,
        announce: Announce = unannounced,
    ) -> LocalPartial:
        """Begin a file. See :class:`~lwstwisted.interfaces.Store`.

        :raises Refused: ``IS_FOLDER``, ``NOT_A_FOLDER``, ``NOT_A_FILE`` (a symbolic link anywhere in
            the path), ``OTHER_FILE_SYSTEM``, ``DISK_FULL``, ``STORE_FAILED``, ``STOPPING``.
        """
        draft = _Draft(self._tree, encoded(name), check, digests, announce)
        return await _begin(draft, length, self._threads, self._partials)

    @property
    def failure(self) -> OSError | None:
        """See :class:`~lwstwisted.interfaces.Store`."""
        return self._tree.failure

    def batch(self) -> LocalBatch:
        """Begin a batch. See :class:`~lwstwisted.interfaces.Store`."""
        return LocalBatch(self._tree, self._threads, self._partials, self._batches)

    async def open_file(self, name: Name) -> int:
        """Open a finished file for reading. See :class:`~lwstwisted.interfaces.Store`."""
        return await self._readers.run(self._tree.open_file, encoded(name), undo=os.close)

    async def list_folder(self, name: Name) -> list[Entry]:
        """What is in a folder. See :class:`~lwstwisted.interfaces.Store`.

        Names that :func:`~lwstwisted.stores.names.parse_name` would not give are left out, as nobody could
        ask for them; so are links, special files and what is mounted.
        """
        return await self._readers.run(self._tree.list_folder, encoded(name))

    def describe(self, fd: int) -> Found:
        """What is open. See :class:`~lwstwisted.interfaces.Store`."""
        return self._tree.describe(fd)

    async def delete(self, name: Name, check: Check = anything) -> None:
        """Remove a finished file. See :class:`~lwstwisted.interfaces.Store`."""
        await self._threads.run(self._tree.delete, encoded(name), check)

    async def begin_upload(
        self,
        record: Mapping[str, Any],
        length: int | None,
        lifetime: float,
        name: Name | None = None,
        check: Check = anything,
    ) -> LocalUpload:
        """Begin an upload. See :class:`~lwstwisted.interfaces.ResumableStore`."""
        path = None if name is None else encoded(name)

        def undo(file: UploadFile) -> None:
            with suppress(OSError):
                file.remove()  # nobody will ever hear of its id
            file.close()

        work = UploadFile.begin
        file = await self._threads.run(work, self._tree, record, length, lifetime, path, check, undo=undo)
        return LocalUpload(file, self._threads, self._readers, self._uploads)

    async def open_upload(self, id: str) -> LocalUpload | None:
        """Hold an upload. See :class:`~lwstwisted.interfaces.ResumableStore`."""

        def close(file: UploadFile | None) -> None:
            if file is not None:
                file.close()

        file = await self._readers.run(UploadFile.open, self._tree, id.encode(errors="replace"), undo=close)
        return None if file is None else LocalUpload(file, self._threads, self._readers, self._uploads)

    async def look_at_upload(self, id: str) -> UploadState:
        """Look at an upload. See :class:`~lwstwisted.interfaces.ResumableStore`."""
        return await self._readers.run(waiting.look, self._tree, id.encode(errors="replace"))

    async def list_uploads(self) -> list[str]:
        """The ids of all uploads. See :class:`~lwstwisted.interfaces.ResumableStore`."""
        return [id.decode() for id in await self._readers.run(waiting.ids, self._tree)]

    async def sweep_uploads(self) -> int:
        """Remove the uploads that have expired. See :class:`~lwstwisted.interfaces.ResumableStore`."""
        return await self._readers.run(self._records.sweep)

    async def list_with_parts(self) -> list[str]:
        """The ids of uploads that aren't files yet, and whose records have ``parts``: others that they need."""
        return [id.decode() for id in await self._readers.run(self._records.with_parts)]

    def statistics(self) -> StoreStatistics:
        """What happened so far and what is under way, for metrics."""
        both = self._threads, self._readers
        return StoreStatistics(
            calls=sum(threads.under_way for threads in both),
            waiting=sum(threads.waiting for threads in both),
            failures=self._threads.failures + self._readers.failures,
            promised=self._tree.space.promised,
        )

    def unfinished(self) -> tuple[int, int]:
        """How many uploads that outlive requests are unfinished, and the bytes of the disk that they hold. It blocks.

        :raises OSError: if it can't be seen.
        """
        return waiting.held(self._tree)

    @property
    def has_room(self) -> bool:
        """Whether there is more free than the minimum that no upload takes."""
        return self._tree.space.has_room

    async def stop(self) -> None:
        """Refuse new calls, wait for those under way, drop unfinished files, end the threads.

        It happens by itself when the reactor shuts down, and may be repeated.
        """
        trigger, self._at_shutdown = self._at_shutdown, None
        if trigger is not None and self._core is not None:
            self._core.removeSystemEventTrigger(trigger)
        self._threads.stopping = self._readers.stopping = self._records.stopping = True
        await self._readers.idle()
        await self._threads.idle()
        for partial in list(self._partials):
            await partial.discard()
        for batch in list(self._batches):
            await batch.discard()
        for upload in list(self._uploads):
            await upload.release()
        self._readers.stop()
        self._threads.stop()
        self._tree.close()
