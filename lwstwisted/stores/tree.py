"""Folders beneath a root, by descriptor: what ``local.py`` does to the file system.

Everything here blocks and belongs to threads. Paths are tuples of bytes, as the file system has
them, and are walked from one descriptor of the root. Why it's done this way is told in ``local.py``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Literal

from twisted.logger import Logger

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.interfaces import Check, Entry, Found, Name
from lwstwisted.stores.locks import NameLocks
from lwstwisted.stores.names import STATE_FOLDER, parse_name
from lwstwisted.stores.space import Space, Usage

Durability = Literal["full", "data", "none"]
"""What is on disk before a commit returns: contents and names, contents, or nothing."""

FOLDER_MODE = 0o755
"""Mode of a folder made for a file, less the umask."""

PARTIAL_MODE = 0o600
"""Mode of a file that is not finished: for nobody else, as it was not checked yet."""

STATE_MODE = 0o700
"""Mode of the store's own folders."""

ATTEMPTS = 16
"""How often a race against other threads and processes may be lost before it counts as a failure."""

DIGESTS_ATTRIBUTE = "user.lwstwisted.repr-digest"
"""Extended attribute (xattr(7)) of a finished file: its digests as ``name=hex``, separated by blanks."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_UNNAMED = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
_NAMED = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

OWN_NAME = re.compile(rb"[0-9a-f]{32}")
"""What :func:`new_own_name` gives: of the store's own folders, only such names are ever removed."""

PARTIAL_FOLDER = (STATE_FOLDER.encode(), b"partial")
"""Where the temporary names of unfinished files are."""

BATCH_FOLDER = (STATE_FOLDER.encode(), b"batches")
"""Where batches are (``batch.py``)."""

UPLOAD_FOLDER = (STATE_FOLDER.encode(), b"uploads")
"""Where uploads are that may be resumed (``resumable.py``)."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""What a file system says when it is full, or the user's share of it."""

Segments = tuple[bytes, ...]
"""A path beneath the root, as the file system has it; () is the root."""


def new_own_name() -> bytes:
    """A name beneath the store's own folders that nobody else has or will have."""
    return secrets.token_hex(16).encode()


def encoded(name: Name) -> Segments:
    """The segments as the file system has them. The last gate for a name that nobody checked."""
    path = tuple([segment.encode() for segment in name])
    if path[:1] == PARTIAL_FOLDER[:1] or any(s in (b"", b".", b"..") or b"/" in s for s in path):
        raise ValueError(f"unchecked name: {name!r}")
    return path


def found_of(status: os.stat_result, digests: Mapping[str, bytes] | None = None) -> Found:
    """A finished file. It is never written to again, so inode, size and time tell one from the next."""
    etag = f'"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"'
    return Found(etag, status.st_size, status.st_mtime, digests or {})


def keep_digests(descriptor: int, digests: Mapping[str, bytes]) -> None:
    """Note digests beside the contents of a file, where the file system can."""
    value = " ".join(f"{name}={digest.hex()}" for name, digest in digests.items())
    with suppress(OSError):
        os.setxattr(descriptor, DIGESTS_ATTRIBUTE, value.encode())


def kept_digests(descriptor: int) -> dict[str, bytes]:
    """What :func:`keep_digests` noted."""
    try:
        value = os.getxattr(descriptor, DIGESTS_ATTRIBUTE).decode()
        return {name: bytes.fromhex(digest) for name, _, digest in (item.partition("=") for item in value.split())}
    except (OSError, ValueError):
        return {}


def close_folder(descriptor: int) -> None:
    """Close a folder. What was done in it stands, whatever this says, so nobody is told otherwise."""
    with suppress(OSError):
        os.close(descriptor)


@contextmanager
def _closed_if_refused(descriptor: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise


class Tree:
    """The folders beneath the root, by descriptor. Every method blocks."""

    _log = Logger()

    def __init__(self, root: Path, durability: Durability, use_tmpfile: bool, sweep: bool = True) -> None:
        self.failure: OSError | None = None
        self.doubtful: set[int] = set()  # inodes that replaced others under names that could not be synced
        self._durability = durability
        self._making = Lock()
        self._locks: NameLocks | None = None
        self._make_root(root)
        self.partial = -1
        self.space = Space(-1, 0, None)
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._device = os.fstat(self._root).st_dev
            self._open_state()
            with self.folder(PARTIAL_FOLDER[:1]) as state:
                self._locks = NameLocks(state)
            if sweep:
                with self._locks.sweeping():
                    self._sweep()
            self._use_tmpfile = use_tmpfile and self._has_tmpfile()
        except BaseException:
            self.close()
            raise

    def _make_root(self, root: Path) -> None:
        missing = [folder for folder in (root, *root.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(FOLDER_MODE, exist_ok=True)
            parent = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self.sync_folder(parent)
            finally:
                os.close(parent)

    def _open_state(self) -> None:
        for path in (PARTIAL_FOLDER, BATCH_FOLDER, UPLOAD_FOLDER):
            for depth, segment in enumerate(path):
                with self.folder(path[:depth]) as folder:
                    self._make(folder, segment, STATE_MODE)
        with self.folder(PARTIAL_FOLDER) as folder:
            self.partial = os.dup(folder)

    def close(self) -> None:
        """Give back the descriptors; may be repeated."""
        for descriptor in (self._root, self.partial):
            if descriptor >= 0:
                os.close(descriptor)
        self._root = self.partial = -1
        self.space.close()
        if self._locks is not None:
            self._locks.close()

    # Durability.

    def sync_file(self, descriptor: int) -> None:
        if self._durability == "full":
            self._sync(os.fsync, descriptor)
        elif self._durability == "data":
            self._sync(os.fdatasync, descriptor)

    def sync_folder(self, descriptor: int) -> None:
        if self._durability == "full":
            self._sync(os.fsync, descriptor)

    def _sync(self, call: Callable[[int], None], descriptor: int) -> None:
        try:
            call(descriptor)
        except OSError as error:
            if error.errno not in NO_SPACE:
                # Nobody knows what else the kernel has dropped: not this store's word alone is in doubt any more.
                self.failure = error
            raise

    # Walking.

    @contextmanager
    def folder(self, path: Segments, made: list[Segments] | None = None) -> Iterator[int]:
        """A descriptor of the folder ``path``.

        :param made: where it is given, missing folders are made and noted in it.
        """
        here = os.open(b".", _FOLDER, dir_fd=self._root)
        try:
            for depth, segment in enumerate(path, 1):
                if made is not None and self._make(here, segment, FOLDER_MODE):
                    made.append(path[:depth])
                above, here = here, self._enter(here, segment)
                close_folder(above)
            yield here
        finally:
            close_folder(here)

    def _enter(self, parent: int, segment: bytes) -> int:
        try:
            descriptor = os.open(segment, _FOLDER, dir_fd=parent)
        except NotADirectoryError:
            if stat.S_ISREG(os.lstat(segment, dir_fd=parent).st_mode):
                raise
            raise Refused(errors.NOT_A_FILE) from None
        with _closed_if_refused(descriptor):
            if os.fstat(descriptor).st_dev != self._device:
                raise Refused(errors.OTHER_FILE_SYSTEM)
        return descriptor

    def _make(self, parent: int, segment: bytes, mode: int) -> bool:
        """Make a folder, unless it is there, and make its name durable before anyone else relies on it."""
        with self._making:
            try:
                os.mkdir(segment, mode, dir_fd=parent)
            except FileExistsError:
                return False
            try:
                self.sync_folder(parent)
            except OSError:
                os.rmdir(segment, dir_fd=parent)
                raise
            return True

    def unmake(self, made: list[Segments]) -> None:
        """Remove folders that :meth:`folder` made, where nobody else has used them."""
        for path in reversed(made):
            with suppress(OSError, Refused), self.folder(path[:-1]) as parent:
                os.rmdir(path[-1], dir_fd=parent)

    def require_file(self, found: os.stat_result) -> None:
        """Refuse what is not a regular file of this file system."""
        if found.st_dev != self._device:
            raise Refused(errors.OTHER_FILE_SYSTEM)
        if stat.S_ISDIR(found.st_mode):
            raise Refused(errors.IS_FOLDER)
        if not stat.S_ISREG(found.st_mode):
            raise Refused(errors.NOT_A_FILE)

    # Finished files.

    @contextmanager
    def _folder_of_file(self, path: Segments) -> Iterator[int]:
        """The folder of a finished file, which is there."""
        if not path:
            raise Refused(errors.IS_FOLDER)
        try:
            with self.folder(path[:-1]) as folder:
                self.require_file(os.lstat(path[-1], dir_fd=folder))
                yield folder
        except (FileNotFoundError, NotADirectoryError):
            raise Refused(errors.NOT_FOUND) from None

    def open_file(self, path: Segments) -> int:
        with self._folder_of_file(path) as folder:
            descriptor = os.open(path[-1], _READ, dir_fd=folder)
            with _closed_if_refused(descriptor):
                self.require_file(os.fstat(descriptor))
            return descriptor

    def describe(self, descriptor: int) -> Found:
        return found_of(os.fstat(descriptor), kept_digests(descriptor))

    def delete(self, path: Segments, check: Check) -> None:
        with self._folder_of_file(path) as folder:
            with self.naming([path]):
                found = os.lstat(path[-1], dir_fd=folder)
                check(found_of(found))
                os.unlink(path[-1], dir_fd=folder)
            self.space.count(-found.st_size)
            self.sync_folder(folder)

    def naming(self, paths: Iterable[Segments]) -> AbstractContextManager[None]:
        """To be held while names are looked at and then changed, so that nobody changes them in between."""
        assert self._locks is not None
        return self._locks.held(paths)

    def sweeping(self) -> AbstractContextManager[None]:
        """To be held while it is found out what nobody holds, as two who try at once take each other for the holder."""
        assert self._locks is not None
        return self._locks.sweeping()

    def list_folder(self, path: Segments) -> list[Entry]:
        try:
            with self.folder(path) as folder, os.scandir(folder) as found:
                entries = [entry for item in found if (entry := self._entry(path, item)) is not None]
        except FileNotFoundError:
            raise Refused(errors.NOT_FOUND) from None
        return sorted(entries, key=lambda entry: entry.name)

    def _entry(self, path: Segments, item: os.DirEntry[str]) -> Entry | None:
        """None for what cannot be asked for: links, special files, mounts, and names that no path reaches."""
        raw = os.fsencode(item.name)
        try:
            name = parse_name((*path, raw))[-1]
            found = item.stat(follow_symlinks=False)
        except (Refused, FileNotFoundError):
            return None
        is_folder = stat.S_ISDIR(found.st_mode)
        is_served = found.st_dev == self._device and (is_folder or stat.S_ISREG(found.st_mode))
        if not is_served or name.encode() != raw:
            return None
        return Entry(name, is_folder, 0 if is_folder else found.st_size, found.st_mtime)

    # Space.

    def usage(self, count: Callable[[], int], quota: int) -> Usage:
        """The count of what all files take, for a quota."""
        with self.folder(PARTIAL_FOLDER[:1]) as state:
            return Usage(state, count, quota)

    def count_bytes(self) -> int:
        """What all finished files take."""
        return sum(status.st_size for _, status, _ in self.walk() if stat.S_ISREG(status.st_mode))

    def walk(self) -> Iterator[tuple[Segments, os.stat_result, int]]:
        """All that is beneath the root, but the store's own and what is mounted: path, status, folder's descriptor.

        Not ``os.fwalk``: it recurses and keeps a descriptor for each level, and clients may nest 2,000 of them.
        """
        waiting: list[Segments] = [()]
        while waiting:
            above = waiting.pop()
            # It was removed meanwhile, or turned into something else, or is not for us.
            gone = suppress(FileNotFoundError, NotADirectoryError, PermissionError, Refused)
            with gone, self.folder(above) as folder:
                for name in map(os.fsencode, os.listdir(folder)):
                    path = (*above, name)
                    if path == PARTIAL_FOLDER[:1]:
                        continue
                    try:
                        status = os.lstat(name, dir_fd=folder)
                    except FileNotFoundError:
                        continue
                    if stat.S_ISDIR(status.st_mode) and status.st_dev == self._device:
                        waiting.append(path)
                    yield path, status, folder

    # Partial files.

    def check_target(self, path: Segments, check: Check) -> None:
        """Refuse early what could not be committed. It's looked at again then."""
        if not path:
            raise Refused(errors.IS_FOLDER)
        found = None
        with suppress(FileNotFoundError), self.folder(path[:-1]) as folder:
            found = self.look(folder, path[-1])
        check(found)

    def look(self, folder: int, last: bytes) -> Found:
        """The finished file of a name.

        :raises FileNotFoundError: if there is none.
        """
        found = os.lstat(last, dir_fd=folder)
        self.require_file(found)
        return found_of(found)

    def open_partial(self) -> tuple[int, bytes | None]:
        """A new file to write to, and its temporary name if it has one."""
        if self._use_tmpfile:
            return os.open(b".", _UNNAMED, PARTIAL_MODE, dir_fd=self.partial), None
        for _ in range(ATTEMPTS):
            name = new_own_name()
            descriptor = os.open(name, _NAMED, PARTIAL_MODE, dir_fd=self.partial)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another process' sweep may have come between open and flock.
                if os.fstat(descriptor).st_nlink:
                    return descriptor, name
            except BlockingIOError:
                pass
            except OSError:
                self.close_partial(descriptor, name)
                raise
            self.close_partial(descriptor, name)
        raise OSError(errno.EBUSY, "other processes keep sweeping new files")

    def link_partial(self, descriptor: int) -> bytes:
        """Give an unnamed file a temporary name, owned before it can be seen."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        name = new_own_name()
        self.link(descriptor, name, self.partial)
        return name

    def link(self, descriptor: int, name: bytes, folder: int) -> None:
        # Without dst_dir_fd Python calls link(), which doesn't follow /proc's link: EXDEV.
        os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=folder, follow_symlinks=True)

    def close_partial(self, descriptor: int, name: bytes | None) -> None:
        """Drop what is not needed any more. A failure here is for the log: no client can mend it."""
        try:
            if name is not None:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self.partial)
        except OSError as error:
            self._log.warn("store: a temporary file stays until the next start: {error}", error=error)
        try:
            os.close(descriptor)
        except OSError as error:
            self._log.warn("store: closing a file failed: {error}", error=error)

    def _has_tmpfile(self) -> bool:
        """Whether files can be opened without a name here and get one later, which needs /proc as well."""
        try:
            descriptor = os.open(b".", _UNNAMED, PARTIAL_MODE, dir_fd=self.partial)
        except OSError as error:
            return error.errno in NO_SPACE
        name = None
        try:
            name = self.link_partial(descriptor)
            return True
        except OSError as error:
            return error.errno in NO_SPACE
        finally:
            self.close_partial(descriptor, name)

    def _sweep(self) -> None:
        names = [os.fsencode(name) for name in os.listdir(self.partial)]
        swept = sum(self.sweep_one(name) for name in names if OWN_NAME.fullmatch(name))
        if swept:
            self._log.info("store: removed {swept} unfinished files of an earlier run", swept=swept)

    def sweep_one(self, name: bytes) -> bool:
        """Remove an unfinished file that nobody holds; whether it is gone."""
        try:
            descriptor = os.open(name, _READ, dir_fd=self.partial)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name, dir_fd=self.partial)
            return True
        except OSError:
            return False
        finally:
            os.close(descriptor)


