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
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TypeVar, cast

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorCore, IReactorFromThreads
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.interfaces import NO_DIGESTS, Check, Entry, Found, Name, anything
from lwstwisted.stores.batch import BatchFolder, recover_batches
from lwstwisted.stores.hashing import RunningDigests
from lwstwisted.stores.space import Reservation, Space
from lwstwisted.stores.tree import ATTEMPTS, NO_SPACE, Durability, Segments, Tree, encoded, found_of, keep_digests

__all__ = ["WRITER_THREADS", "Durability", "LocalBatch", "LocalPartial", "LocalStore"]

T = TypeVar("T")

READER_THREADS = 4
"""Further threads, for what only looks: a listing doesn't wait for the uploads of a slow disk."""

WRITER_THREADS = 8
"""Threads of a store: they wait more than they work, and a journal syncs several files at once. Commits of
4 KiB files per second with 1, 2, 4, 8, 16, 32 threads on two cores and a quick disk: 1680, 2280, 2880, 2620,
2660, 2020. A slow disk gains from more than 4."""

FILE_MODE = 0o644
"""Mode of a finished file, whatever the umask: others (a web server, a backup) may read, none may write."""

NOT_KEPT = {"md5"}
"""Digests that are checked, and too weak to be given to others."""

_ANSWERS = {
    **dict.fromkeys(NO_SPACE, errors.DISK_FULL),
    errno.ENOTDIR: errors.NOT_A_FOLDER,
    errno.ELOOP: errors.NOT_A_FILE,
    # Some file systems (eCryptfs) take less than NAME_MAX.
    errno.ENAMETOOLONG: errors.NAME_TOO_LONG,
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), errors.TOO_MANY_FILES),
}
"""What an OSError tells the client; any other one is ``STORE_FAILED``."""


class _Threads:
    """Runs blocking calls beside the reactor, maps their errors, and knows when none is left."""

    _log = Logger()

    def __init__(self, reactor: IReactorFromThreads, threads: int) -> None:
        self.stopping = False
        self._reactor = reactor
        self._pool = ThreadPool(minthreads=0, maxthreads=threads, name="lwstwisted-store")
        self._pool.start()
        self._under_way = 0
        self._idle: list[Deferred[None]] = []

    async def run(
        self, work: Callable[..., T], *args: object, undo: Callable[[T], object] | None = None
    ) -> T:
        """Call ``work`` in a thread, unless the store is stopping.

        :param undo: gets the result when nobody waits for it any more.
        """
        if self.stopping:
            raise Refused(errors.STOPPING)
        return await self.finish(work, *args, undo=undo)

    async def finish(
        self, work: Callable[..., T], *args: object, undo: Callable[[T], object] | None = None
    ) -> T:
        """The same while the store is stopping."""
        result, cancelled = await self._outcome(deferToThreadPool(self._reactor, self._pool, work, *args))
        if isinstance(result, Failure):
            if isinstance(result.value, OSError):
                raise self._told(work, result.value) from result.value
            result.raiseException()
        if cancelled is not None:
            if undo is not None:
                undo(result)
            raise cancelled
        return result

    async def _outcome(self, job: Deferred[T]) -> tuple[T | Failure, CancelledError | None]:
        """Wait for a thread, although the caller is cancelled: the thread has its memory and descriptor."""
        outcome: list[T | Failure] = []
        waiter: Deferred[None] = Deferred()

        def finished(result: T | Failure) -> None:
            outcome.append(result)
            waiter.callback(None)
            # Only now, so that who waits for an idle store sees what the caller did with the result.
            self._under_way -= 1
            while self._idle and not self._under_way:
                self._idle.pop().callback(None)

        self._under_way += 1
        job.addBoth(finished)
        cancelled = None
        while not outcome:
            try:
                await waiter
            except CancelledError as error:
                cancelled = error
                waiter = Deferred()
        return outcome[0], cancelled

    def _told(self, work: Callable[..., object], error: OSError) -> Refused:
        refusal = _ANSWERS.get(error.errno or 0, errors.STORE_FAILED)
        if refusal.status in (500, 507):  # else it is nothing that an operator can mend
            self._log.error("store: {work} failed: {error}", work=work.__name__, error=error)
        return Refused(refusal)

    async def idle(self) -> None:
        """Wait until no call is under way."""
        while self._under_way:
            self._idle.append(Deferred())
            await self._idle[-1]

    def stop(self) -> None:
        """End the threads, which are idle: this doesn't block."""
        if self._pool.started:
            self._pool.stop()


class _Draft:
    """A file that isn't finished, opened for its first bytes. Every method blocks; one thread at a time is let in."""

    def __init__(self, tree: Tree, path: Segments, check: Check, digests: Mapping[str, bytes]) -> None:
        self.is_over = False
        self.etag = ""
        self._tree = tree
        self._path = path
        self._check = check
        self._digests = digests
        self._running = RunningDigests(digests)
        self._descriptor = -1
        self._name: bytes | None = None
        self._offset = 0
        self._reservation: Reservation | None = None
        self._is_named = False
        self._replaced = 0
        # A descriptor number that was closed may be another upload's by the next write.
        self._entered = Lock()

    def begin(self, length: int | None) -> None:
        self._tree.check_target(self._path, self._check)
        self._reservation = Reservation(self._tree.space, length)

    def _open(self) -> None:
        if self.is_over:
            raise OSError(errno.EBADF, "the file was given up")
        if self._descriptor < 0:
            self._descriptor, self._name = self._tree.open_partial()
            if self._reservation is not None:
                self._reservation.allocate(self._descriptor)

    def append(self, data: memoryview) -> None:
        with self._entered:
            try:
                self._open()
                self._write(data)
            except BaseException:
                self._close()
                raise

    def commit(self, data: memoryview) -> bool:
        with self._entered:
            try:
                self._open()
                self._write(data)
                self._check_digests()
                os.fchmod(self._descriptor, FILE_MODE)
                self._tree.sync_file(self._descriptor)
                self.etag = found_of(os.fstat(self._descriptor)).etag
                return self._publish()
            finally:
                self._close()

    def close(self) -> None:
        with self._entered:
            self._close()

    def _close(self) -> None:
        self.is_over = True
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self._tree.close_partial(descriptor, self._name)
        reservation, self._reservation = self._reservation, None
        if reservation is not None:
            if self._is_named:
                reservation.keep()
                self._tree.space.count(-self._replaced)
            reservation.give_back()

    def _write(self, data: memoryview) -> None:
        assert self._reservation is not None
        self._reservation.before_write(len(data))
        while data:
            written = os.pwrite(self._descriptor, data, self._offset)
            self._offset += written
            self._reservation.written(written)
            self._running.update(data[:written])
            data = data[written:]

    def _check_digests(self) -> None:
        if self._running.wrong():
            raise Refused(errors.DIGEST_MISMATCH)
        kept = {name: digest for name, digest in self._digests.items() if name not in NOT_KEPT}
        if kept:
            keep_digests(self._descriptor, kept)

    def _publish(self) -> bool:
        made: list[Segments] = []
        try:
            for _ in range(ATTEMPTS):
                # A race was lost: a folder removed, the old file deleted or turned into a folder.
                race = suppress(FileNotFoundError, FileExistsError, IsADirectoryError)
                with race, self._tree.folder(self._path[:-1], made) as folder:
                    return self._place(folder, self._path[-1])
            raise OSError(errno.EBUSY, "others keep changing the name")
        except BaseException:
            self._tree.unmake(made)
            raise

    def _place(self, folder: int, last: bytes) -> bool:
        is_new = self._link(folder, last)
        try:
            self._tree.sync_folder(folder)
        except OSError:
            if is_new:
                self._withdraw(folder, last)
            raise
        return is_new

    def _link(self, folder: int, last: bytes) -> bool:
        with self._tree.naming([self._path]):
            if self._check is not anything:
                found = None
                with suppress(FileNotFoundError):
                    found = self._tree.look(folder, last)
                self._check(found)
            return self._link_unchecked(folder, last)

    def _link_unchecked(self, folder: int, last: bytes) -> bool:
        try:
            self._link_new(folder, last)
            self._is_named = True
            return True
        except FileExistsError:
            old = os.lstat(last, dir_fd=folder)
            self._tree.require_file(old)
        if self._name is None:
            self._name = self._tree.link_partial(self._descriptor)
        os.rename(self._name, last, src_dir_fd=self._tree.partial, dst_dir_fd=folder)
        self._name = None
        self._is_named, self._replaced = True, old.st_size
        return False

    def _link_new(self, folder: int, last: bytes) -> None:
        if self._name is None:
            self._tree.link(self._descriptor, last, folder)
        else:
            os.link(self._name, last, src_dir_fd=self._tree.partial, dst_dir_fd=folder)

    def _withdraw(self, folder: int, last: bytes) -> None:
        """Take the name back, unless it is another upload's by now."""
        with suppress(OSError):
            if os.path.samestat(os.lstat(last, dir_fd=folder), os.fstat(self._descriptor)):
                os.unlink(last, dir_fd=folder)
                self._is_named = False


class _BatchDraft(_Draft):
    """A draft whose finished file goes to a batch, and gets its name with that."""

    def __init__(
        self, tree: Tree, path: Segments, check: Check, digests: Mapping[str, bytes], batch: BatchFolder
    ) -> None:
        super().__init__(tree, path, check, digests)
        self._batch = batch

    def _open(self) -> None:
        if not self.is_over:
            self._batch.open()
        super()._open()

    def _publish(self) -> bool:
        assert self._reservation is not None
        self._batch.keep(self._path, self._check, self._link_new, self._reservation)
        self._reservation = None
        return True


class LocalPartial:
    """A :class:`~lwstwisted.interfaces.PartialFile` on disk; :meth:`LocalStore.create` makes it.

    :param siblings: the unfinished files of the store, which it leaves when it's finished.
    """

    def __init__(self, draft: _Draft, threads: _Threads, siblings: set[LocalPartial]) -> None:
        self._draft = draft
        self._threads = threads
        self._siblings = siblings

    @property
    def etag(self) -> str:
        """See :class:`~lwstwisted.interfaces.PartialFile`."""
        return self._draft.etag

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
        self, tree: Tree, threads: _Threads, partials: set[LocalPartial], siblings: set[LocalBatch]
    ) -> None:
        self._tree = tree
        self._threads = threads
        self._partials = partials
        self._siblings = siblings
        self._folder = BatchFolder(tree)

    async def create(
        self, name: Name, length: int | None, check: Check = anything, digests: Mapping[str, bytes] = NO_DIGESTS
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


async def _begin(draft: _Draft, length: int | None, threads: _Threads, partials: set[LocalPartial]) -> LocalPartial:
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
    ) -> None:
        if reactor is None:
            from twisted.internet import reactor  # type: ignore[assignment]
        self._tree = Tree(Path(root).absolute(), durability, use_tmpfile)
        try:
            recover_batches(self._tree)
            usage = None if quota is None else self._tree.usage(quota)
            self._tree.space = Space(self._tree.partial, minimum_free, usage)
        except BaseException:
            self._tree.close()
            raise
        self._threads = _Threads(cast(IReactorFromThreads, reactor), threads)
        self._readers = _Threads(cast(IReactorFromThreads, reactor), READER_THREADS)
        self._partials: set[LocalPartial] = set()
        self._batches: set[LocalBatch] = set()
        # A process whose threads go on doesn't end.
        self._core = IReactorCore(reactor, None)
        self._at_shutdown = self._core and self._core.addSystemEventTrigger("before", "shutdown", self._shut_down)

    def _shut_down(self) -> Deferred[None]:
        self._at_shutdown = None
        return Deferred.fromCoroutine(self.stop())

    async def create(
        self, name: Name, length: int | None, check: Check = anything, digests: Mapping[str, bytes] = NO_DIGESTS
    ) -> LocalPartial:
        """Begin a file. See :class:`~lwstwisted.interfaces.Store`.

        :raises Refused: ``IS_FOLDER``, ``NOT_A_FOLDER``, ``NOT_A_FILE`` (a symbolic link anywhere in
            the path), ``OTHER_FILE_SYSTEM``, ``DISK_FULL``, ``STORE_FAILED``, ``STOPPING``.
        """
        return await _begin(_Draft(self._tree, encoded(name), check, digests), length, self._threads, self._partials)

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

    async def stop(self) -> None:
        """Refuse new calls, wait for those under way, drop unfinished files, end the threads.

        It happens by itself when the reactor shuts down, and may be repeated.
        """
        trigger, self._at_shutdown = self._at_shutdown, None
        if trigger is not None:
            self._core.removeSystemEventTrigger(trigger)
        self._threads.stopping = self._readers.stopping = True
        await self._readers.idle()
        await self._threads.idle()
        for partial in list(self._partials):
            await partial.discard()
        for batch in list(self._batches):
            await batch.discard()
        self._readers.stop()
        self._threads.stop()
        self._tree.close()
