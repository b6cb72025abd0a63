"""Space on the disk: what uploads may take of it, and what those under way have been promised.

Facts
    * What the file system says to be free is promised to nobody: ten uploads of all that is free are all accepted, and
      all fail in the middle.
    * fallocate(2) reserves blocks for a file, where the file system can (ext4, XFS, btrfs, tmpfs). Its emulation by
      posix_fallocate(3) elsewhere writes to every block, which takes minutes.
    * A process that is killed gives nothing back.

Decision
    An announced length is promised when the upload begins, and kept as a sum in this process; it leaves the sum when
    blocks are reserved for it or its bytes are written. What isn't announced is asked for with each write. Either has
    to fit into what is free, less a minimum that stays free for others: logs, a database.

    With a quota, one number in a file of the root counts the bytes of all finished files and of all uploads under way,
    for all processes that share the root. Whoever starts alone counts anew, so that what a crash has left there, or a
    person has changed by hand, is right again. Without a quota nothing is counted.

Price
    * Who announces much and sends little keeps the difference from others, for as long as the minimum rate lets them.
    * A start with a quota looks at every file, if no other process of the root is alive.
    * What other processes have promised and not reserved yet is not known here: their uploads may meet a full disk.
    * What a killed process had announced stays counted until all processes of the root have ended once.
    * While an old file is replaced both are counted: what is larger than its quota already takes deletions only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from threading import Lock
from time import monotonic

from twisted.logger import Logger

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.stores import locks
from lwstwisted.stores.locks import lock_byte, locked_until, open_shared

RESERVED_FROM = 1024 * 1024
"""Announced bytes from which on blocks are reserved; fewer come with the first writes anyway."""

_NUMBER = struct.Struct("<q")
_COUNTING, _ALIVE = 0, 1
"""Bytes of the file that are locked: while the number is changed, and by every process that counts."""

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE (linux/falloc.h)
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)
_libc = ctypes.CDLL(None, use_errno=True)


def fallocate(descriptor: int, length: int) -> bool:
    """Reserve blocks from the begin of a file, whose size stays as it is (fallocate(2)).

    :returns: False where the file system can't.
    :raises OSError: if there are not so many.
    """
    while _libc.fallocate(descriptor, _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(length)):
        error = ctypes.get_errno()
        if error in _UNSUPPORTED:
            return False
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))
    return True


class Usage:
    """Bytes that are taken beneath a root, counted by all processes that share it.

    :param folder: descriptor of the folder that the count is kept in.
    :param count: counts the bytes of all finished files; called if nobody else counts now.
    :param quota: bytes.
    """

    def __init__(self, folder: int, count: Callable[[], int], quota: int) -> None:
        self._quota = quota
        self._threads = Lock()
        self._file = open_shared(b"usage", folder)
        try:
            lock_byte(self._file, _COUNTING)
            if self._is_alone():
                os.pwrite(self._file, _NUMBER.pack(count()), 0)
            lock_byte(self._file, _ALIVE, fcntl.F_RDLCK)
            lock_byte(self._file, _COUNTING, fcntl.F_UNLCK)
        except BaseException:
            os.close(self._file)
            raise

    def _is_alone(self) -> bool:
        try:
            lock_byte(self._file, _ALIVE, wait=False)
        except BlockingIOError:
            return False
        return True

    def add(self, count: int) -> None:
        """Take so many bytes, or give them back if there are fewer than none.

        :raises Refused: ``BODY_TOO_LARGE`` for more than could ever be had, ``QUOTA_EXCEEDED``.
        """
        if count > self._quota:
            raise Refused(errors.BODY_TOO_LARGE)
        with locked_until(monotonic() + locks.PATIENCE, self._threads, self._file, _COUNTING):
            (taken,) = _NUMBER.unpack(os.pread(self._file, _NUMBER.size, 0))
            if count > 0 and taken + count > self._quota:
                raise Refused(errors.QUOTA_EXCEEDED)
            os.pwrite(self._file, _NUMBER.pack(max(0, taken + count)), 0)

    def close(self) -> None:
        """Stop counting; may be repeated."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


class Space:
    """What uploads may take.

    :param disk: descriptor of a folder on the disk.
    :param minimum_free: bytes that no upload takes.
    :param usage: the quota, or None.
    """

    _log = Logger()

    def __init__(self, disk: int, minimum_free: int, usage: Usage | None) -> None:
        self._disk = disk
        self._minimum_free = minimum_free
        self._usage = usage
        self._promised = 0
        self._threads = Lock()

    def promise(self, count: int) -> None:
        """Keep ``count`` bytes of the disk for somebody; fewer than none are given back.

        :raises Refused: ``DISK_FULL``.
        """
        with self._threads:
            if count > 0:
                disk = os.fstatvfs(self._disk)
                free = disk.f_bavail * disk.f_frsize - self._promised - self._minimum_free
                # No blocks at all (a tmpfs without a limit, some of FUSE): the file system doesn't tell.
                if disk.f_blocks and count > free:
                    raise Refused(errors.DISK_FULL)
            self._promised += count

    def count(self, count: int) -> None:
        """Count bytes against the quota; fewer than none are given back.

        :raises Refused: see :meth:`Usage.add`.
        """
        if self._usage is None or not count:
            return
        try:
            self._usage.add(count)
        except OSError as error:
            # What is given back was decided before: too much stays counted, and the answer stands.
            if count > 0:
                raise
            self._log.error("store: {count} bytes stay counted against the quota: {error}", count=-count, error=error)

    def close(self) -> None:
        """Stop counting; may be repeated."""
        if self._usage is not None:
            self._usage.close()


class Reservation:
    """The space of one upload. One thread at a time is let in.

    :param length: announced bytes, or None; then each write asks for its own.
    :raises Refused: ``DISK_FULL``, ``QUOTA_EXCEEDED``, ``BODY_TOO_LARGE``.
    """

    def __init__(self, space: Space, length: int | None) -> None:
        self._space = space
        self._is_announced = length is not None
        self._promised = self._counted = 0
        self._take(length or 0)

    def _take(self, count: int) -> None:
        self._space.count(count)
        self._counted += count
        try:
            self._space.promise(count)
        except BaseException:
            self.give_back()
            raise
        self._promised += count

    def _redeem(self, count: int) -> None:
        self._space.promise(-count)
        self._promised -= count

    def allocate(self, descriptor: int) -> None:
        """Reserve blocks of the file for what is announced, where that is worth it and can be done."""
        # Without a limit (no blocks) a tmpfs would take all of the memory.
        is_limited = self._promised >= RESERVED_FROM and os.fstatvfs(descriptor).f_blocks
        if is_limited and fallocate(descriptor, self._promised):
            self._redeem(self._promised)

    def before_write(self, count: int) -> None:
        """Ask for the space of a write that was not announced."""
        if not self._is_announced:
            self._take(count)

    def written(self, count: int) -> None:
        """So many bytes are on the disk now."""
        self._redeem(min(count, self._promised))

    def keep(self) -> int:
        """The bytes have a name: they stay counted. Returns how many."""
        kept, self._counted = self._counted, 0
        return kept

    def give_back(self) -> None:
        """Give back what isn't kept; may be repeated."""
        self._redeem(self._promised)
        self._space.count(-self.keep())
