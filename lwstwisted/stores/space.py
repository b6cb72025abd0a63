"""Space on the disk: what uploads may take of it, and what those under way have been promised.

Facts
    * What the file system says to be free is promised to nobody: ten uploads of all that is free are all accepted, and
      all fail in the middle.
    * fallocate(2) reserves blocks for a file, where the file system can (ext4, XFS, btrfs, tmpfs). Its emulation by
      posix_fallocate(3) elsewhere writes to every block, which takes minutes.
    * A process that is killed gives nothing back. Its locks on a file end with it.
    * A write inside one page of a file is there as a whole or not at all, whenever its process is killed.

Decision
    An announced length is promised when the upload begins, and kept as a sum in this process; it leaves the sum when
    blocks are reserved for it or its bytes are written. What isn't announced is asked for with each write. Either has
    to fit into what is free, less a minimum that stays free for others: logs, a database. The length of a form is an
    upper bound of its files together: it is promised to the form, and the files take from that.

    With a quota, a file of the root holds the sum of the bytes of all finished files and of all uploads under way, for
    all processes that share the root, and behind it a *slot* for each process: how much of the sum is its uploads
    under way. A process holds the lock of its slot while it lives. Whoever starts, and whoever would have to refuse,
    first takes from the sum what is in slots that nobody holds. All numbers are written at once, so that sum and slots
    fit together however a process dies.

    Bytes leave the slot *before* their file gets its name, and the sum *after* a name is gone: who is killed between
    the two leaves the sum too high by these files, never too low. Whoever starts alone counts anew, so that this, and
    what a person has changed by hand, is right again. Without a quota nothing is counted.

Price
    * Who announces much and sends little keeps the difference from others, for as long as the minimum rate lets them.
    * A start with a quota looks at every file, if no other process of the root is alive. Where there is no space for
      the numbers, the first upload that finds some does so.
    * What other processes have promised and not reserved yet is not known here: their uploads may meet a full disk.
    * While blocks are reserved one step of them, at most, is counted as taken and as promised.
    * The files whose names a process was giving or taking when it was killed, one for each of its threads, stay counted
      until all processes of the root have ended once. So does all that the 65th process had under way: it has no slot.
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

STEP = 64 * 1024 * 1024
"""Bytes that are reserved at once: what others see twice meanwhile, as promised and as taken from the disk."""

SLOTS = 64
"""Processes of a root whose uploads under way are known apart: more than anybody has cores for, and one page."""

_NUMBERS = struct.Struct(f"<{1 + SLOTS}q")
"""The sum, and what is in each slot."""

_COUNTING, _ALIVE = 0, 1
"""Bytes of the file that are locked: while the numbers are changed, and by every process that counts."""
_SLOT = 1
"""A slot is locked by the byte that is so much behind the number of the slot, which counts from 1."""

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE (linux/falloc.h)
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_libc = ctypes.CDLL(None, use_errno=True)


def fallocate(descriptor: int, offset: int, length: int) -> bool:
    """Reserve blocks of a file, whose size stays as it is (fallocate(2)).

    :returns: False where the file system can't.
    :raises OSError: if there are not so many.
    """
    while _libc.fallocate(descriptor, _KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(length)):
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

    _log = Logger()

    def __init__(self, folder: int, count: Callable[[], int], quota: int) -> None:
        self.quota = quota
        self._count = count
        self._slot: int | None = None
        self._threads = Lock()
        self._file = open_shared(b"usage", folder)
        try:
            lock_byte(self._file, _COUNTING)
            self._begin(is_alone=self._try(_ALIVE))
            lock_byte(self._file, _ALIVE, fcntl.F_RDLCK)
            lock_byte(self._file, _COUNTING, fcntl.F_UNLCK)
        except BaseException:
            os.close(self._file)
            raise

    def _begin(self, is_alone: bool) -> None:
        try:
            numbers = self._counted() if is_alone else self._read()
            self._take_back(numbers)
            self._write(numbers)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            # Downloads and deletions need no count, and uploads have no space now.
            self._log.error("store: there is no space for the count of the quota: {error}", error=error)
            if is_alone:
                os.ftruncate(self._file, 0)  # what an earlier run has left there is wrong
        self._slot = next(filter(lambda slot: self._try(_SLOT + slot), range(1, 1 + SLOTS)), None)

    def _try(self, at: int) -> bool:
        """Lock a byte that nobody holds."""
        try:
            lock_byte(self._file, at, wait=False)
        except BlockingIOError:
            return False
        return True

    def _counted(self) -> list[int]:
        return [self._count(), *[0] * SLOTS]

    def _read(self) -> list[int]:
        # Shorter, if it was made without slots; empty, if there was no space for it.
        found = os.pread(self._file, _NUMBERS.size, 0)
        return list(_NUMBERS.unpack(found.ljust(_NUMBERS.size, b"\0"))) if found else self._counted()

    def _write(self, numbers: list[int]) -> None:
        os.pwrite(self._file, _NUMBERS.pack(*[max(0, number) for number in numbers]), 0)

    def _take_back(self, numbers: list[int]) -> None:
        """Take from the sum what processes had under way that have ended."""
        for slot in range(1, 1 + SLOTS):
            if numbers[slot] and slot != self._slot and self._try(_SLOT + slot):
                lock_byte(self._file, _SLOT + slot, fcntl.F_UNLCK)
                numbers[0] -= numbers[slot]
                numbers[slot] = 0

    def change(self, taken: int, under_way: int) -> None:
        """Add to the bytes that are taken, and to those of them that are uploads under way; either may be negative.

        :raises Refused: ``QUOTA_EXCEEDED``.
        """
        with locked_until(monotonic() + locks.PATIENCE, self._threads, self._file, _COUNTING):
            if taken <= 0 and not os.fstat(self._file).st_size:
                return  # whoever counts will find it as it is now
            numbers = self._read()
            if taken > 0 and numbers[0] + taken > self.quota:
                self._take_back(numbers)
                if numbers[0] + taken > self.quota:
                    raise Refused(errors.QUOTA_EXCEEDED)
            numbers[0] += taken
            if self._slot is not None:
                numbers[self._slot] += under_way
            self._write(numbers)

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

    @property
    def promised(self) -> int:
        """Bytes that are kept for somebody."""
        return self._promised

    @property
    def has_room(self) -> bool:
        """Whether an upload would find some of the disk left that it may take."""
        disk = os.fstatvfs(self._disk)
        return not disk.f_blocks or disk.f_bavail * disk.f_frsize > self._minimum_free

    def promise(self, count: int) -> None:
        """Keep ``count`` bytes of the disk for somebody; fewer than none are given back.

        :raises Refused: ``DISK_FULL``; ``BODY_TOO_LARGE`` for more than could ever be had.
        """
        if self._usage is not None and count > self._usage.quota:
            raise Refused(errors.BODY_TOO_LARGE)
        with self._threads:
            if count > 0:
                disk = os.fstatvfs(self._disk)
                free = disk.f_bavail * disk.f_frsize - self._promised - self._minimum_free
                # No blocks at all (a tmpfs without a limit, some of FUSE): the file system doesn't tell.
                if disk.f_blocks and count > free:
                    raise Refused(errors.DISK_FULL)
            self._promised += count

    def count(self, count: int, under_way: int = 0) -> None:
        """Count bytes against the quota; fewer than none are given back.

        :param under_way: how many of them are of uploads under way.
        :raises Refused: see :meth:`Usage.change`.
        """
        try:
            self.change(count, under_way)
        except OSError as error:
            # What is given back was decided before: too much stays counted, and the answer stands.
            if count > 0:
                raise
            self._log.error("store: {count} bytes stay counted against the quota: {error}", count=-count, error=error)

    def change(self, count: int, under_way: int) -> None:
        """The same for who can still go back: an error is raised, whatever the sign.

        :raises OSError: if the count can't be changed.
        """
        if self._usage is not None and (count or under_way):
            self._usage.change(count, under_way)

    def close(self) -> None:
        """Stop counting; may be repeated."""
        if self._usage is not None:
            self._usage.close()


class Reservation:
    """The space of one upload, or of a form and its files. One thread at a time is let in.

    :param length: announced bytes, or None; then each write asks for its own.
    :param source: the space of the form that the upload belongs to, which it takes from as long as there is any.
    :raises Refused: ``DISK_FULL``, ``QUOTA_EXCEEDED``, ``BODY_TOO_LARGE``.
    """

    def __init__(self, space: Space, length: int | None = None, source: Reservation | None = None) -> None:
        self._space = space
        self._source = source
        self._promised = self._counted = self._under_way = self._written = 0
        self.take(length or 0)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to give back."""
        return not (self._promised or self._counted)

    def take(self, count: int) -> None:
        """Have so many bytes more, or none at all any more.

        :raises Refused: as the constructor.
        """
        if self._source is not None:
            lent = min(count, self._source._promised)
            self._source._move(self, lent, lent)
            count -= lent
        try:
            self._space.promise(count)
            self._promised += count
            self._space.count(count, count)
            self._counted += count
            self._under_way += count
        except BaseException:
            self.give_back()
            raise

    def _move(self, other: Reservation, promised: int, counted: int) -> None:
        """Let another one have so many bytes that are under way."""
        for one, sign in ((self, -1), (other, 1)):
            one._promised += sign * promised
            one._counted += sign * counted
            one._under_way += sign * counted

    def hand_over(self, other: Reservation) -> None:
        """Let another one have all of it."""
        self._move(other, self._promised, self._counted)
        other._written += self._written
        self._written = 0

    def _redeem(self, count: int) -> None:
        self._space.promise(-count)
        self._promised -= count

    def allocate(self, descriptor: int, least: int = RESERVED_FROM) -> None:
        """Reserve blocks of the file for what is announced, where that is worth it and can be done.

        :param least: bytes from which on it is worth it.
        """
        length = self._promised
        # Without a limit (no blocks) a tmpfs would take all of the memory.
        if length < least or not os.fstatvfs(descriptor).f_blocks:
            return
        for offset in range(0, length, STEP):
            step = min(STEP, length - offset)
            if not fallocate(descriptor, offset, step):
                return
            self._redeem(step)

    def before_write(self, count: int) -> None:
        """Ask for the space of a write, as far as it was not announced."""
        missing = self._written + count - self._counted
        if missing > 0:
            self.take(missing)

    def written(self, count: int) -> None:
        """So many bytes are on the disk now."""
        self._written += count
        self._redeem(min(count, self._promised))

    def settle(self) -> None:
        """To be called before the bytes get a name: who is killed from now on leaves them counted.

        :raises OSError: if that can't be done.
        """
        self._space.change(self._written - self._counted, -self._under_way)
        self._counted, self._under_way = self._written, 0

    def keep(self) -> None:
        """The bytes have a name: they stay counted."""
        self._space.count(0, -self._under_way)
        self._counted = self._under_way = 0

    def give_back(self) -> None:
        """Give back what isn't kept; may be repeated."""
        self._redeem(self._promised)
        self._space.count(-self._counted, -self._under_way)
        self._counted = self._under_way = 0
