"""A disk that remembers in which order it was written to, and what it would hold had the power failed.

:func:`logged_disk` makes a file that is served by FUSE; a loop device on top of it is a disk for any file system. Each
write and each flush of that disk becomes a record of a log. :class:`Replay` makes of the log what a disk with a
volatile cache may hold after a power cut: all that was written before the last flush, and of what was written later
each sector or not. Two writes of one sector are never swapped, as no disk does that; so whatever else a disk may
reorder comes out as some of it being there and some not.

The protocol is spoken straight with ``/dev/fuse`` (``linux/fuse.h``), whose root may be a file: six operations on one
inode need no library. It runs in a process of its own, as a process that waits for its own disk waits for ever.
Nothing here is a test.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

SECTOR = 4096
"""Bytes that a disk writes in one step or not at all."""

MAX_WRITE = 1 << 20

WRITE, ZERO, FLUSH = range(3)
_RECORD = struct.Struct("<BQQ")

# linux/fuse.h
_INIT, _GETATTR, _OPEN, _READ, _WRITE, _FSYNC = 26, 3, 14, 15, 16, 20
_SETATTR, _RELEASE, _FLUSH, _FALLOCATE, _DESTROY = 4, 18, 25, 43, 38
_UNANSWERED = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET
_BIG_WRITES, _MAX_PAGES = 1 << 5, 1 << 22
_DIRECT_IO = 1
_PUNCH_HOLE, _ZERO_RANGE = 2, 16
_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTRIBUTES = struct.Struct("<QIIQQQQQQIIIIIIIIII")

# linux/loop.h
_CONFIGURE, _GET_FREE, _AUTOCLEAR = 0x4C0A, 0x4C82, 4

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: Path, kind: str, options: str = "") -> None:
    """See mount(2).

    :raises OSError: if the kernel refuses.
    """
    if _libc.mount(source.encode(), os.fsencode(target), kind.encode(), 0, options.encode()):
        code = ctypes.get_errno()
        raise OSError(code, f"mount of {kind}: {os.strerror(code)}")


def unmount(target: Path, patience: float = 10.0) -> None:
    """See umount(2). Who has just been killed may still be leaving."""
    end = time.monotonic() + patience
    while _libc.umount2(os.fsencode(target), 0):
        code = ctypes.get_errno()
        if code != errno.EBUSY or time.monotonic() > end:
            raise OSError(code, f"umount: {os.strerror(code)}")
        time.sleep(0.01)


@contextmanager
def attached(image: Path) -> Iterator[str]:
    """A loop device on top of a file until the end of the block, and until nobody uses it."""
    file = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        device, path = _attach(file)
    finally:
        os.close(file)
    try:
        yield path
    finally:
        os.close(device)


def _attach(file: int) -> tuple[int, str]:
    configuration = bytearray(304)
    struct.pack_into("<II", configuration, 0, file, SECTOR)
    struct.pack_into("<I", configuration, 60, _AUTOCLEAR)
    for _ in range(100):
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            path = f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}"
        finally:
            os.close(control)
        device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(device, _CONFIGURE, configuration)
            return device, path
        except OSError as error:
            os.close(device)
            if error.errno != errno.EBUSY:  # else somebody else was quicker
                raise
    raise OSError(errno.EBUSY, "others keep taking the loop devices")


class _Disk:
    """Answers the kernel's requests for one file."""

    def __init__(self, fuse: int, image: Path, log: Path, counter: Path) -> None:
        self._fuse = fuse
        self._image = os.open(image, os.O_RDWR)
        self._size = os.fstat(self._image).st_size
        self._log = open(log, "wb", buffering=0)  # noqa: SIM115
        with open(counter, "r+b") as file:
            self._counter = mmap.mmap(file.fileno(), 8)
        self._count = 0

    def serve(self) -> None:
        """Until it is unmounted."""
        buffer = memoryview(bytearray(MAX_WRITE + 8192))
        while True:
            try:
                length = os.readv(self._fuse, [buffer])
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                raise
            _, operation, unique, *_ = _IN.unpack_from(buffer)
            if operation in _UNANSWERED:
                continue
            code, answer = 0, b""
            try:
                answer = self._answer(operation, buffer[_IN.size : length])
            except OSError as error:
                code = error.errno or errno.EIO
            with suppress(FileNotFoundError):  # who asked was killed meanwhile
                os.writev(self._fuse, [_OUT.pack(_OUT.size + len(answer), -code, unique), answer])

    def _answer(self, operation: int, body: memoryview) -> bytes:
        if operation == _WRITE:
            _, offset, size = struct.unpack_from("<QQI", body)
            os.pwrite(self._image, body[40 : 40 + size], offset)
            self._note(WRITE, offset, size, body[40 : 40 + size])
            return struct.pack("<II", size, 0)
        if operation == _READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return os.pread(self._image, size, offset)
        if operation == _FSYNC:
            self._note(FLUSH, 0, 0)
            return b""
        if operation == _FALLOCATE:
            _, offset, size, mode = struct.unpack_from("<QQQI", body)
            if not mode & (_PUNCH_HOLE | _ZERO_RANGE):
                raise OSError(errno.EOPNOTSUPP, "fallocate")
            for at in range(offset, offset + size, MAX_WRITE):
                os.pwrite(self._image, bytes(min(MAX_WRITE, offset + size - at)), at)
            self._note(ZERO, offset, size)
            return b""
        if operation == _INIT:
            _, minor, readahead, flags = struct.unpack_from("<IIII", body)
            flags &= _BIG_WRITES | _MAX_PAGES
            pages = MAX_WRITE // mmap.PAGESIZE
            limits = (16, 12, MAX_WRITE, 1, pages, 0, 0)
            return struct.pack("<IIIIHHIIHHI28x", 7, min(minor, 31), readahead, flags, *limits)
        if operation in (_GETATTR, _SETATTR):
            mode = stat.S_IFREG | 0o600
            blocks = self._size // 512
            return _ATTRIBUTES.pack(3600, 0, 0, 1, self._size, blocks, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, SECTOR, 0)
        if operation == _OPEN:
            return struct.pack("<QII", 1, _DIRECT_IO, 0)
        if operation in (_RELEASE, _FLUSH, _DESTROY):
            return b""
        raise OSError(errno.ENOSYS, "not needed")

    def _note(self, kind: int, offset: int, size: int, data: memoryview | bytes = b"") -> None:
        """Before the kernel has its answer, so that nobody can know of a write that the log doesn't have."""
        os.writev(self._log.fileno(), [_RECORD.pack(kind, offset, size), data])
        self._count += 1
        self._counter[:] = self._count.to_bytes(8, "little")


class LoggedDisk:
    """A file that is written to through a log; :func:`logged_disk` makes it.

    :ivar path: for a loop device.
    """

    def __init__(self, path: Path, counter: mmap.mmap) -> None:
        self.path = path
        self._counter = counter

    @property
    def position(self) -> int:
        """How many records the log has by now."""
        return int.from_bytes(self._counter[:], "little")


@contextmanager
def logged_disk(image: Path, log: Path) -> Iterator[LoggedDisk]:
    """Serve ``image`` under another name until the end of the block.

    :param image: what the disk holds, and will hold.
    :param log: where the records go.
    :raises OSError: where there is no FUSE, or no right to mount.
    """
    path, counter = image.with_suffix(".disk"), image.with_suffix(".count")
    path.touch()
    counter.write_bytes(bytes(8))
    with ExitStack() as stack:
        file = stack.enter_context(open(counter, "r+b"))
        count = stack.enter_context(mmap.mmap(file.fileno(), 8))
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        try:
            mount("powercut", path, "fuse", f"fd={fuse},rootmode=100000,user_id=0,group_id=0")
            # In this order: it ends when its file is unmounted.
            served = stack.enter_context(ExitStack())
            stack.callback(unmount, path)
            command = [sys.executable, "-m", __name__, str(fuse), str(image), str(log), str(counter)]
            served.callback(_wait, subprocess.Popen(command, cwd=Path(__file__).parent.parent, pass_fds=[fuse]))
        finally:
            os.close(fuse)
        yield LoggedDisk(path, count)


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Record(NamedTuple):
    """One entry of a log."""

    kind: int
    offset: int
    size: int
    data: bytes

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """What of it a disk writes in one step, with its offset."""
        for at in range(0, self.size, SECTOR):
            size = min(SECTOR - (self.offset + at) % SECTOR, self.size - at)
            yield self.offset + at, self.data[at : at + size] if self.kind == WRITE else bytes(size)


def read_log(path: Path) -> list[Record]:
    """All records, the first one first."""
    text, at, records = path.read_bytes(), 0, []
    while at + _RECORD.size <= len(text):
        kind, offset, size = _RECORD.unpack_from(text, at)
        at += _RECORD.size
        length = size if kind == WRITE else 0
        records.append(Record(kind, offset, size, text[at : at + length]))
        at += length
    return records


class Replay:
    """Disks after power cuts.

    :param start: what the disk held before the first record.
    :param stable: a file that is made: what the disk holds for certain.
    """

    def __init__(self, start: Path, records: list[Record], stable: Path) -> None:
        self.records = records
        self._start = start
        self._stable = stable
        self._done = 0
        copy_sparse(start, stable)

    def cut(self, position: int, rng: random.Random, image: Path) -> None:
        """Write what the disk may hold when the power fails behind ``position`` records.

        :param rng: tells which of the sectors since the last flush are there.
        :param image: a file that is made.
        """
        flushed = position
        while flushed and self.records[flushed - 1].kind != FLUSH:
            flushed -= 1
        self._settle(flushed)
        copy_sparse(self._stable, image)
        kept = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        with open(image, "r+b") as file:
            for record in self.records[flushed:position]:
                for offset, data in record.pieces():
                    if rng.random() < kept:
                        os.pwrite(file.fileno(), data, offset)

    def _settle(self, position: int) -> None:
        if position < self._done:
            copy_sparse(self._start, self._stable)
            self._done = 0
        with open(self._stable, "r+b") as file:
            for record in self.records[self._done : position]:
                if record.kind != FLUSH:
                    for offset, data in record.pieces():
                        os.pwrite(file.fileno(), data, offset)
        self._done = position


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file that has holes."""
    with open(source, "rb") as read, open(target, "wb") as written:
        size, at = os.fstat(read.fileno()).st_size, 0
        written.truncate(size)
        while at < size:
            try:
                begin = os.lseek(read.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                break
            at = os.lseek(read.fileno(), begin, os.SEEK_HOLE)
            read.seek(begin)
            written.seek(begin)
            written.write(read.read(at - begin))


if __name__ == "__main__":
    _Disk(int(sys.argv[1]), *map(Path, sys.argv[2:])).serve()
