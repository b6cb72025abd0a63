"""A file system that keeps nothing but what it was told to keep, and what a power cut leaves of it.

Real file systems keep more than they promise: with ext4 each fsync writes all names of all folders that were changed
before. A store that relies on it loses nothing there, and files elsewhere. Here the calls of a process that change
files (:class:`Calls`) become records of a log, in the order in which they took effect, and :class:`Weakest` makes of
the log what may be there after a power cut:

* A name that was given or taken away is so for certain when its folder was synced; until then it is so or not, each
  for itself. A rename is both of its changes or none, as all file systems with a journal have it.
* What was written to a file is there when the file was synced; until then each page of it is there or not.
* That a folder was synced says nothing of its own name, which belongs to the folder above.

Nobody has to be root for that, and nothing is mounted. What isn't seen are the calls of a process that doesn't make
them by this class: this is for one service, which :func:`install` is called in. Nothing here is a test.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import pickle
import random
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

PAGE = 4096

START, NAMES, FOLDER, WRITE, TRUNCATE, SYNC = range(6)


class Record(NamedTuple):
    """One entry of a log.

    :ivar kind: SYNC settles what others have changed.
    :ivar inode: of the file or folder; of NAMES nothing.
    :ivar told: of NAMES the changes that go together, each a folder's inode, a name and an inode or None; of WRITE the
        offset and the data; of TRUNCATE the size; of START all folders, and all files.
    """

    kind: int
    inode: int = 0
    told: Any = None


NOTED = ["open", "link", "rename", "unlink", "rmdir", "mkdir"]
NOTED += ["pwrite", "copy_file_range", "ftruncate", "fsync", "fdatasync"]
"""What :class:`Calls` has of ``os``."""

Change = tuple[int, bytes, int | None]


class Calls:
    """The calls of ``os`` that change files, noted when they have succeeded.

    :param log: which :func:`begin_log` made.
    """

    def __init__(self, log: Path) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._count = _Count(log)
        self._lock = Lock()
        self._real = {name: getattr(os, name) for name in NOTED}

    def close(self) -> None:
        """Note nothing more."""
        os.close(self._log)

    @contextmanager
    def _noting(self, name: str) -> Iterator[tuple[Callable[..., Any], Callable[..., None]]]:
        # What happens and what is noted come in one order, for all threads and processes.
        with self._lock:
            fcntl.flock(self._log, fcntl.LOCK_EX)
            try:
                yield self._real[name], self._note
            finally:
                fcntl.flock(self._log, fcntl.LOCK_UN)

    def _note(self, *told: Any) -> None:
        data = pickle.dumps(tuple(Record(*told)))
        assert _write(self._log, data) == len(data)
        self._count.add()

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if not flags & os.O_CREAT and not flags & os.O_TRUNC:
            return int(self._real["open"](path, flags, mode, dir_fd=dir_fd))
        with self._noting("open") as (real, note):
            descriptor = int(real(path, flags, mode, dir_fd=dir_fd))
            inode = os.fstat(descriptor).st_ino
            if flags & os.O_CREAT:
                note(NAMES, 0, [(*_place(path, dir_fd), inode)])
            if flags & os.O_TRUNC:
                note(TRUNCATE, inode, 0)
            return descriptor

    def link(self, src: Any, dst: Any, *, dst_dir_fd: int | None = None, **where: Any) -> None:
        with self._noting("link") as (real, note):
            real(src, dst, dst_dir_fd=dst_dir_fd, **where)
            note(NAMES, 0, [(*_place(dst, dst_dir_fd), os.lstat(dst, dir_fd=dst_dir_fd).st_ino)])

    def rename(self, src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        with self._noting("rename") as (real, note):
            inode = os.lstat(src, dir_fd=src_dir_fd).st_ino
            real(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            note(NAMES, 0, [(*_place(src, src_dir_fd), None), (*_place(dst, dst_dir_fd), inode)])

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("unlink", path, dir_fd)

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("rmdir", path, dir_fd)

    def _remove(self, name: str, path: Any, dir_fd: int | None) -> None:
        with self._noting(name) as (real, note):
            real(path, dir_fd=dir_fd)
            note(NAMES, 0, [(*_place(path, dir_fd), None)])

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        with self._noting("mkdir") as (real, note):
            real(path, mode, dir_fd=dir_fd)
            inode = os.lstat(path, dir_fd=dir_fd).st_ino
            note(FOLDER, inode)
            note(NAMES, 0, [(*_place(path, dir_fd), inode)])

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        with self._noting("pwrite") as (real, note):
            size = int(real(fd, data, offset))
            note(WRITE, os.fstat(fd).st_ino, (offset, bytes(memoryview(data)[:size])))
            return size

    def copy_file_range(self, src: int, dst: int, count: int, offset_src: int, offset_dst: int) -> int:
        with self._noting("copy_file_range") as (real, note):
            size = int(real(src, dst, count, offset_src, offset_dst))
            note(WRITE, os.fstat(dst).st_ino, (offset_dst, os.pread(src, size, offset_src)))
            return size

    def ftruncate(self, fd: int, length: int) -> None:
        with self._noting("ftruncate") as (real, note):
            real(fd, length)
            note(TRUNCATE, os.fstat(fd).st_ino, length)

    def fsync(self, fd: int) -> None:
        self._sync("fsync", fd)

    def fdatasync(self, fd: int) -> None:
        self._sync("fdatasync", fd)

    def _sync(self, name: str, fd: int) -> None:
        with self._noting(name) as (real, note):
            real(fd)
            note(SYNC, os.fstat(fd).st_ino)


_write = os.write


def install(log: Path) -> Calls:
    """Note all calls of this process from now on; :func:`uninstall` ends that."""
    calls = Calls(log)
    for name in NOTED:
        setattr(os, name, getattr(calls, name))
    return calls


def uninstall(calls: Calls) -> None:
    """The calls are what they were."""
    for name in NOTED:
        setattr(os, name, calls._real[name])
    calls.close()


def _place(path: Any, dir_fd: int | None) -> tuple[int, bytes]:
    """The folder's inode, and the name in it."""
    above, last = os.path.split(os.fsencode(path))
    return os.stat(above or b".", dir_fd=dir_fd).st_ino, last


class _Count:
    """How many records a log has, for all processes."""

    def __init__(self, log: Path) -> None:
        with open(log.with_suffix(".count"), "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8)

    def get(self) -> int:
        return int.from_bytes(self._memory[:], "little")

    def add(self) -> None:
        self._memory[:] = (self.get() + 1).to_bytes(8, "little")


def begin_log(log: Path, top: Path) -> Callable[[], int]:
    """Make a log of what happens to a folder from now on.

    :returns: tells how many records there are.
    """
    folders: dict[int, dict[bytes, int]] = {}
    files: dict[int, bytes] = {}
    for folder, _, _ in os.walk(os.fsencode(top)):
        entries = {name: os.lstat(os.path.join(folder, name)) for name in os.listdir(folder)}
        folders[os.stat(folder).st_ino] = {name: status.st_ino for name, status in entries.items()}
        for name, status in entries.items():
            if stat.S_ISREG(status.st_mode) and status.st_ino not in files:
                files[status.st_ino] = Path(os.fsdecode(os.path.join(folder, name))).read_bytes()
    log.write_bytes(pickle.dumps(tuple(Record(START, top.stat().st_ino, (folders, files)))))
    log.with_suffix(".count").write_bytes((1).to_bytes(8, "little"))
    return position_in(log)


def position_in(log: Path) -> Callable[[], int]:
    """What tells how many records a log has."""
    return _Count(log).get


def read_calls(log: Path) -> list[Record]:
    """All records, the first one first; without what a killed process had not written whole."""
    records = []
    with open(log, "rb") as file:
        while True:
            try:
                records.append(Record(*pickle.load(file)))
            except (EOFError, pickle.UnpicklingError):
                return records


class Weakest:
    """What is there after power cuts."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        self._begin()

    def _begin(self) -> None:
        self._done = 1
        start = self.records[0]
        folders, files = start.told
        self._top = start.inode
        self._folders: dict[int, dict[bytes, int]] = {inode: dict(names) for inode, names in folders.items()}
        self._files: dict[int, bytes] = dict(files)
        self._named: list[list[Change]] = []
        self._written: dict[int, list[Record]] = {}

    def cut(self, position: int, rng: random.Random, folder: Path) -> None:
        """Make the files that may be there when the power fails behind ``position`` records.

        :param rng: tells which changes are there that were not synced.
        :param folder: it is made.
        """
        if position < self._done:
            self._begin()
        for record in self.records[self._done : position]:
            self._follow(record)
        self._done = max(self._done, position)
        # Each for itself: names may be ahead of what is written, or behind it.
        kept, kept_names = (rng.choice([0.0, 0.1, 0.5, 0.9, 1.0]) for _ in range(2))
        folders = {inode: dict(names) for inode, names in self._folders.items()}
        for changes in self._named:
            if rng.random() < kept_names:
                _change(folders, changes)
        files = dict(self._files)
        for inode, records in self._written.items():
            pieces = [piece for record in records for piece in _pieces(record) if rng.random() < kept]
            files[inode] = _content(files.get(inode, b""), pieces)
        _make(folder, self._top, folders, files)

    def _follow(self, record: Record) -> None:
        if record.kind == FOLDER:
            self._folders[record.inode] = {}
        elif record.kind == NAMES:
            self._named.append(record.told)
        elif record.kind == SYNC and record.inode in self._folders:
            self._settle_names(record.inode)
        elif record.kind == SYNC:
            pieces = [piece for written in self._written.pop(record.inode, []) for piece in _pieces(written)]
            self._files[record.inode] = _content(self._files.get(record.inode, b""), pieces)
        else:
            self._written.setdefault(record.inode, []).append(record)

    def _settle_names(self, folder: int) -> None:
        waiting: list[list[Change]] = []
        for changes in self._named:
            if all(changed != folder for changed, _, _ in changes):
                waiting.append(changes)
                continue
            _change(self._folders, changes)
            # What comes later on the disk than it has happened would undo the other half of a rename.
            places = {change[:2] for change in changes}
            waiting = [earlier for earlier in waiting if places.isdisjoint(change[:2] for change in earlier)]
        self._named = waiting


def _change(folders: dict[int, dict[bytes, int]], changes: list[Change]) -> None:
    for folder, name, inode in changes:
        if inode is None:
            folders.get(folder, {}).pop(name, None)
        elif folder in folders:
            folders[folder][name] = inode


def _pieces(record: Record) -> Iterator[tuple[int, bytes | None]]:
    """What is there or not in one step: an offset and data, or a size and None."""
    if record.kind == TRUNCATE:
        yield record.told, None
        return
    offset, data = record.told
    ends = itertools.chain(range(offset - offset % PAGE + PAGE, offset + len(data), PAGE), [offset + len(data)])
    begin = offset
    for end in ends:
        yield begin, data[begin - offset : end - offset]
        begin = end


def _content(content: bytes, pieces: list[tuple[int, bytes | None]]) -> bytes:
    if not pieces:
        return content
    found = bytearray(content)
    for offset, data in pieces:
        end = offset + len(data or b"")
        found.extend(bytes(max(0, end - len(found))))
        if data is None:
            del found[offset:]
        else:
            found[offset:end] = data
    return bytes(found)


def _make(top: Path, inode: int, folders: Mapping[int, Mapping[bytes, int]], files: Mapping[int, bytes]) -> None:
    made: dict[int, str] = {}
    waiting = [(inode, os.fspath(top))]
    while waiting:
        inode, path = waiting.pop()
        if inode in folders:
            os.mkdir(path)
            waiting += [(below, os.path.join(path, os.fsdecode(name))) for name, below in folders[inode].items()]
        elif inode in made:
            os.link(made[inode], path)
        else:
            with open(path, "wb") as file:
                file.write(files.get(inode, b""))
            made[inode] = path
