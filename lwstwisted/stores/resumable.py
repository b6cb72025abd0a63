"""Uploads that outlive their requests: an unfinished file, how much of it is durable, and what it is meant to be.

Facts
    * After a crash of the process a file has every byte that was written. After a power cut it has those that were
      synced, and any others: the size alone says nothing, as blocks reach the disk in any order.
    * A failed fsync drops what it should have written, and the next one reports success.
    * Truncating a file also frees blocks that were reserved behind its end.

Decision
    Two files in ``.lwstwisted/uploads``: ``<id>.data`` has the bytes, and ``<id>`` the number of those that are
    durable, with all the rest (``record.py``). To commit is to sync the bytes, then to write the number, and then to
    sync that. Who opens an upload cuts off what is behind the number. After a sync that failed the old number is
    written again, and nothing is committed until the bytes that the kernel may have dropped are cut off.

    An upload belongs to who has locked the first byte of its record, as in ``locks.py``. Who would like to have it
    leaves a mark behind the number, for the holder to see.

    To finish it, the bytes are linked to their name as in ``local.py``, the record says so, and their own name goes.
    Each of the steps may be the last before a crash, and all of them may be repeated: a target that is the same file
    is ours already. A finished record stays until it expires, to answer who has not heard of it.

    To remove it, the record goes first: bytes without one belong to nobody, and the next sweep removes them. The record
    of an unfinished upload that has fewer bytes than it says is of one whose disk has lost them.

Price
    * Two syncs for each commit, where a file that comes in one request has one.
    * Two descriptors for each upload that is held; none for one that waits.
    * Space is reserved, and counted against the quota, for the whole announced length until the upload is finished,
      cancelled or expired. Who is killed while an upload begins, ends or is given its name may leave too much counted
      until a service starts alone (``space.py``), never too little.
    * Somebody who is told in the same moment that a file is there, and crashed before, is told that it is a new one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from threading import Lock
from typing import Any

from twisted.logger import Logger

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.interfaces import Announce, Check, Digests, Name, Named, UploadState, unannounced
from lwstwisted.stores import record
from lwstwisted.stores.hashing import RunningDigests
from lwstwisted.stores.locks import lock_byte
from lwstwisted.stores.placing import OpenPartial, finish_file
from lwstwisted.stores.space import STEP, Reservation, fallocate
from lwstwisted.stores.tree import (
    OWN_NAME,
    PARTIAL_MODE,
    UPLOAD_FOLDER,
    Segments,
    Tree,
    encoded,
    found_of,
    new_own_name,
)

_READ = 1024 * 1024
_COPY = 64 * 1024 * 1024
"""Bytes that are copied by one system call, which can't be interrupted."""

HELD = 0
"""The byte of a record that its holder locks."""

_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = _OPEN | os.O_CREAT | os.O_EXCL

_log = Logger()


def data_name(id: bytes) -> bytes:
    """The file that has the bytes of an upload."""
    return id + b".data"


class UploadFile:
    """An upload that is held. Every method blocks; one thread at a time is let in, and another one to checkpoint."""

    def __init__(self, tree: Tree, id: bytes, record: int) -> None:
        self.id = id
        self.state = UploadState(0, None, {}, 0.0, None)
        self._tree = tree
        self._record = record
        self._data = -1
        self._end = 0
        self._lifetime = 0.0
        self.digests: dict[str, bytes] = {}
        self._has_lost = False
        self._entered = Lock()
        self._syncing = Lock()

    @property
    def is_open(self) -> bool:
        """Whether it is held."""
        return self._record >= 0

    @property
    def is_settled(self) -> bool:
        """Whether it is held, and all of it is durable."""
        is_noted = self.state.named is not None or (self._data >= 0 and self._end == self.state.offset)
        return self._record >= 0 and is_noted and not self._has_lost

    # How it begins

    @classmethod
    def begin(
        cls,
        tree: Tree,
        plan: Mapping[str, Any],
        length: int | None,
        lifetime: float,
        path: Segments | None,
        check: Check,
    ) -> UploadFile:
        """Make an upload, durably."""
        if path is not None:
            tree.check_target(path, check)
        space = Reservation(tree.space, length)
        try:
            with tree.folder(UPLOAD_FOLDER) as folder:
                descriptor, temporary = tree.open_partial()
                upload = cls(tree, new_own_name(), descriptor)
                upload._lifetime = lifetime
                upload._make(folder, temporary, UploadState(0, length, plan, 0.0, None), space)
                return upload
        finally:
            space.give_back()

    def _make(self, folder: int, temporary: bytes | None, state: UploadState, space: Reservation) -> None:
        tree, counted = self._tree, 0
        try:
            lock_byte(self._record, HELD, wait=False)  # before anybody can see it
            self._note(state, has_changed=True)
            # Who is killed from now on leaves it counted.
            space.keep()
            counted = state.length or 0
            if temporary is None:
                tree.link(self._record, self.id, folder)
            else:
                os.rename(temporary, self.id, src_dir_fd=tree.partial, dst_dir_fd=folder)
                temporary = None
            self._data = os.open(data_name(self.id), _NEW, PARTIAL_MODE, dir_fd=folder)
            space.allocate(self._data, 1)  # between its requests nothing else keeps its space
            tree.sync_folder(folder)
        except BaseException:
            for name, where in ((self.id, folder), (data_name(self.id), folder), (temporary, tree.partial)):
                if name is not None:
                    with suppress(OSError):
                        os.unlink(name, dir_fd=where)
            self._close()
            tree.space.count(-counted)
            raise

    @classmethod
    def open(cls, tree: Tree, id: bytes) -> UploadFile | None:
        """Hold an upload, unless somebody else does.

        :raises Refused: ``UPLOAD_NOT_FOUND``.
        """
        with tree.folder(UPLOAD_FOLDER) as folder:
            upload = cls(tree, id, open_record(id, folder))
            try:
                try:
                    lock_byte(upload._record, HELD, wait=False)
                except BlockingIOError:
                    record.mark(upload._record, is_wanted=True)
                    upload._close()
                    return None
                if not os.fstat(upload._record).st_nlink:
                    raise Refused(errors.UPLOAD_NOT_FOUND)
                if upload.is_wanted():
                    record.mark(upload._record, is_wanted=False)
                upload._load(folder)
            except BaseException:
                upload._close()
                raise
        return upload

    def _load(self, folder: int) -> None:
        self.state, self._lifetime = record.read(self._record)
        if self.state.named is not None:
            with suppress(OSError):
                os.unlink(data_name(self.id), dir_fd=folder)  # a crash has kept that from being done
            return
        size = -1
        with suppress(FileNotFoundError):
            self._data = os.open(data_name(self.id), _OPEN, dir_fd=folder)
            size = os.fstat(self._data).st_size
        self._end = max(size, 0)
        if size < self.state.offset:
            # Without an offset it is none but one whose birth was cut short.
            if self.state.offset:
                _log.error("store: the bytes of an upload are lost: {id}", id=self.id.decode())
            self._remove(folder)
            raise Refused(errors.UPLOAD_NOT_FOUND)
        if size > self.state.offset and self._is_being_named():
            self._go_on_naming()
        else:
            self._cut_off()

    def _is_being_named(self) -> bool:
        """Whether its bytes have the name that they are meant for, or the one on the way there.

        Any further link may be a backup's, and says nothing of the bytes.
        """
        ours, path = os.fstat(self._data), encoded(self.target)
        if ours.st_nlink > 1:
            with suppress(FileNotFoundError):
                return os.path.samestat(ours, os.lstat(self.id, dir_fd=self._tree.partial))
            with suppress(FileNotFoundError, NotADirectoryError), self._tree.folder(path[:-1]) as folder:
                return os.path.samestat(ours, os.lstat(path[-1], dir_fd=folder))
        return False

    def _go_on_naming(self) -> None:
        """Note what a crash behind the sync of all bytes has kept from that. They may be a file: not one is cut off."""
        named = self._already(encoded(self.target))
        if named is not None:
            self._end_as(named)
        else:
            self.checkpoint()

    @property
    def target(self) -> Name:
        """The name that it is meant to have."""
        return tuple(self.state.record.get("target", ())) or (self.id.decode(),)

    # Its bytes

    def append(self, data: memoryview) -> None:
        with self._entered, self._room(len(data)):
            while data:
                written = os.pwrite(self._data, data, self._end)
                self._end += written
                data = data[written:]

    @contextmanager
    def _room(self, count: int) -> Iterator[None]:
        """Have room for bytes that are appended; what isn't written of them is given back."""
        self._require_open()
        if self.state.length is not None and self._end + count > self.state.length:
            raise Refused(errors.UPLOAD_OVERRUN)
        space, before = self._tree.space, self._end
        is_counted = self.state.length is None
        if is_counted:
            space.count(count)
        try:
            # As far as no blocks are reserved for them.
            missing = min(count, before + count - 512 * os.fstat(self._data).st_blocks)
            if missing > 0:
                space.promise(missing)
                space.promise(-missing)
            yield
        finally:
            if is_counted:
                space.count(self._end - before - count)

    def _require_open(self) -> None:
        if self._data < 0:
            raise OSError(errno.EBADF, "the upload is not held, or is a file already")
        if self._has_lost:
            raise OSError(errno.EIO, "a sync failed, and what it may have dropped was not discarded yet")

    def commit(self, data: memoryview) -> bool:
        self.append(data)
        self.checkpoint()
        return True

    def checkpoint(self) -> None:
        with self._syncing:
            self._require_open()
            end = self._end
            if end == self.state.offset:
                return
            try:
                self._tree.sync_file(self._data)
                self._note(replace(self.state, offset=end))
            except BaseException:
                self._has_lost = True
                raise

    def verify(self, digests: Mapping[str, bytes], begin: int) -> bool:
        with self._entered:
            self._require_open()
            return not self._hashed(digests, begin).wrong()

    def _hashed(self, digests: Digests, begin: int) -> RunningDigests:
        running = RunningDigests(digests)
        at = begin
        while digests and at < self._end:
            data = os.pread(self._data, min(_READ, self._end - at), at)
            at += _some(len(data))
            running.update(data)
        return running

    def discard(self) -> None:
        with self._entered, self._syncing:
            if self._data >= 0:
                self._cut_off()

    def _cut_off(self) -> None:
        """Forget what isn't committed."""
        if (surplus := self._end - self.state.offset) > 0:
            if self._is_being_named():
                raise OSError(errno.EBUSY, "the bytes may be a file already")
            os.ftruncate(self._data, self.state.offset)
            self._end = self.state.offset
            if self.state.length is None:
                self._tree.space.count(-surplus)
            else:
                with suppress(OSError):
                    self._reserve(self.state.length)
        self._has_lost = False

    def _reserve(self, length: int) -> None:
        """Reserve blocks for what is still to come."""
        if length > self._end and os.fstatvfs(self._data).f_blocks:
            for at in range(self._end, length, STEP):
                if not fallocate(self._data, at, min(STEP, length - at)):
                    break

    def take_from(self, other: UploadFile) -> None:
        at, end = 0, other.state.offset
        with self._entered, self._room(end):
            while at < end:
                copied = _some(_copy(other._data, self._data, min(_COPY, end - at), at, self._end))
                at += copied
                self._end += copied

    # Its record

    def keep(self, plan: Mapping[str, Any], length: int | None) -> None:
        with self._entered:
            had, space, counted = self.state.length, Reservation(self._tree.space), 0
            if length != had and (had is not None or length is None or length < self._end):
                raise Refused(errors.LENGTH_MISMATCH)
            try:
                if length is not None and had is None:
                    space.take(length - self._end)
                    space.keep()
                    counted = length - self._end
                    self._reserve(length)
                # Who only renews it adds nothing to its record, which has an end.
                has_changed = length != had or plan != self.state.record
                self._note(replace(self.state, record=plan, length=length), has_changed)
            except BaseException:
                self._tree.space.count(-counted)
                raise
            finally:
                space.give_back()

    def _note(self, state: UploadState, has_changed: bool = False) -> None:
        """Write down what it is, durably, or leave it as it was.

        :param has_changed: whether there is more to write than the number.
        """
        now, end = round(time.time(), 3), -1
        try:
            if has_changed:
                end = record.add_line(self._record, state, self._lifetime)
            record.write_head(self._record, state.offset, now)
            self._tree.sync_file(self._record)
        except BaseException:
            # Nobody may read what isn't durable.
            with suppress(OSError):
                record.write_head(self._record, self.state.offset, self.state.expires - self._lifetime)
                if end >= 0:
                    os.ftruncate(self._record, end)
            raise
        self.state = replace(state, expires=now + self._lifetime)

    def is_wanted(self) -> bool:
        with suppress(OSError):  # somebody closes it in this moment
            return self._record >= 0 and record.is_marked(self._record)
        return False

    # Its end

    def name_it(self, path: Segments, check: Check, digests: Digests, announce: Announce = unannounced) -> Named:
        with self._entered:
            if self.state.named is not None:
                return self.state.named
            self._require_open()
            if self.state.length not in (None, self._end):
                raise OSError(errno.EINVAL, "bytes of the upload are missing")
            try:
                named = self._already(path)
                if named is None:
                    self._tree.check_target(path, check)  # who asks in vain costs no look at all the bytes
                hashed = self._hashed(digests, 0)
                if hashed.wrong():
                    raise Refused(errors.DIGEST_MISMATCH)
                self.digests = hashed.found()
                named = named or self._publish(path, check, self.digests, announce)
                self._end_as(named)
                return named
            except BaseException:
                if self.state.named is None and not self._has_lost:
                    self.checkpoint()
                raise

    def adopt(self, path: Segments) -> None:
        """Note that it has its name, if a crash has kept that from being done."""
        with self._entered:
            if self.state.named is None and (named := self._already(path)) is not None:
                self._end_as(named)

    def _end_as(self, named: Named) -> None:
        """Note its name, and with that the bytes since the last commit, which were synced before it got one."""
        length = self._end if self.state.length is None else self.state.length
        self._note(replace(self.state, named=named, offset=self._end, length=length), has_changed=True)
        with suppress(OSError, Refused), self._tree.folder(UPLOAD_FOLDER) as folder:
            os.unlink(data_name(self.id), dir_fd=folder)
        with suppress(OSError):  # for who sweeps, who else has to read the record
            os.utime(self._record, (self.state.expires, self.state.expires))
        data, self._data = self._data, -1
        os.close(data)

    def _already(self, path: Segments) -> Named | None:
        """What a crash behind the name has left."""
        ours = os.fstat(self._data)
        if ours.st_nlink > 1:
            with suppress(FileNotFoundError, NotADirectoryError), self._tree.folder(path[:-1]) as folder:
                if os.path.samestat(ours, os.lstat(path[-1], dir_fd=folder)):
                    if ours.st_ino in self._tree.doubtful:
                        raise OSError(errno.EIO, "the sync of this name has failed, and none is tried twice")
                    self._tree.sync_folder(folder)
                    return Named(True, found_of(ours).etag)
        return None

    def _publish(self, path: Segments, check: Check, digests: Mapping[str, bytes], announce: Announce) -> Named:
        try:
            etag = finish_file(self._tree, self._data, digests)
        except BaseException:
            self._has_lost = self._end > self.state.offset
            raise
        announce(etag, self._end)
        fcntl.flock(self._data, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file = OpenPartial(self._tree, os.dup(self._data), self.id)  # under its id it is found again
        try:
            with self._tree.folder(UPLOAD_FOLDER) as folder, suppress(FileExistsError):  # a crash has left it
                os.link(data_name(self.id), self.id, src_dir_fd=folder, dst_dir_fd=self._tree.partial)
            return Named(file.publish(path, check), etag)
        finally:
            self._tree.space.count(-file.replaced)
            file.close()

    def remove(self) -> None:
        with self._entered, self._syncing, self._tree.folder(UPLOAD_FOLDER) as folder:
            if self._record < 0:
                raise OSError(errno.EBADF, "the upload is not held")
            self._remove(folder)
            self._tree.sync_folder(folder)

    def _remove(self, folder: int) -> None:
        taken = self._end if self.state.length is None else self.state.length
        # With two names it is a file that counts as one, and only the record doesn't know yet.
        if self.state.named is not None or (self._data >= 0 and os.fstat(self._data).st_nlink > 1):
            taken = 0
        os.unlink(self.id, dir_fd=folder)
        try:
            with suppress(FileNotFoundError):
                os.unlink(data_name(self.id), dir_fd=folder)
        finally:
            self._tree.space.count(-taken)
            self._close()

    def close(self) -> None:
        """Let others have it; may be repeated."""
        with self._entered, self._syncing:
            self._close()

    def _close(self) -> None:
        data, record, self._data, self._record = self._data, self._record, -1, -1
        for descriptor in (data, record):
            if descriptor >= 0:
                with suppress(OSError):
                    os.close(descriptor)


def _some(count: int) -> int:
    """Bytes that were read, of those that have to be there."""
    if not count:
        raise OSError(errno.EIO, "the bytes of an upload are gone")
    return count


def _copy(source: int, target: int, count: int, at: int, to: int) -> int:
    try:
        return os.copy_file_range(source, target, count, at, to)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return os.pwrite(target, os.pread(source, min(_READ, count), at), to)


def open_record(id: bytes, folder: int) -> int:
    """The record of an upload.

    :raises Refused: ``UPLOAD_NOT_FOUND``.
    """
    if not OWN_NAME.fullmatch(id):
        raise Refused(errors.UPLOAD_NOT_FOUND)
    try:
        return os.open(id, _OPEN, dir_fd=folder)
    except FileNotFoundError:
        raise Refused(errors.UPLOAD_NOT_FOUND) from None
