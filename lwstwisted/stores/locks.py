"""Locks on names, between the threads of a process and between processes that share a root.

A name is locked while it is looked at and then changed, so that nobody changes it in between. The locks are ranges of
one byte in one file, as *open file description locks* (fcntl(2)): they end with their holder, however that dies, and
unlike POSIX' process locks they don't end because somebody closes another descriptor of the file. Names share the
bytes by a hash, which is the same in every process.

All descriptors of the file in one process would be one holder to the kernel, so threads take a lock of their own first.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from threading import Lock
from time import monotonic, sleep

BYTES = 64
"""Locks that names share: enough that two commits seldom wait for each other."""

PATIENCE = 30.0
"""Seconds to wait for the holder of a lock: longer than a slow disk needs for the syncs of a form, and shorter than a
service manager waits for our end. The holder may be a process that is stopped (SIGSTOP, a debugger)."""

_SWEEPING, _PROBE = BYTES, BYTES + 1
"""Bytes behind those of the names: of who looks for leftovers, and one to find out whether there are locks at all."""

_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_MODE = 0o600


def open_shared(name: bytes, folder: int) -> int:
    """A descriptor of one of the store's own files that processes share; it is made if it isn't there."""
    file = os.open(name, _OPEN, _MODE, dir_fd=folder)
    if os.geteuid() == 0:  # fsck may be run by root, and come before the service
        owner = os.fstat(folder)
        os.fchown(file, owner.st_uid, owner.st_gid)
    return file


def lock_byte(file: int, at: int, kind: int = fcntl.F_WRLCK, *, wait: bool = True) -> None:
    """Lock a byte of a file, or unlock it (``F_UNLCK``).

    :raises OSError: ``EAGAIN`` where another holder has it and ``wait`` is False.
    """
    # struct flock: type, whence, start, length, pid (which is 0 for these locks).
    command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
    fcntl.fcntl(file, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, at, 1, 0))


@contextmanager
def locked_until(end: float, thread: Lock, file: int, at: int) -> Iterator[None]:
    """Hold a byte of a file, for one thread of this process.

    Not by F_OFD_SETLKW, which would wait for a process that is stopped, and so would the end of this one.

    :raises OSError: ``EBUSY``, if somebody else holds it until ``end`` of the monotonic clock.
    """
    if not thread.acquire(timeout=max(0.0, end - monotonic())):
        raise OSError(errno.EBUSY, "another thread keeps a lock")
    try:
        pause = 0.0005
        while True:
            try:
                lock_byte(file, at, wait=False)
                break
            except BlockingIOError:
                if monotonic() > end:
                    raise OSError(errno.EBUSY, "another process keeps a lock") from None
            sleep(pause)
            pause = min(2 * pause, 0.02)
        try:
            yield
        finally:
            with suppress(OSError):  # what was done under the lock stands, whatever this says
                lock_byte(file, at, fcntl.F_UNLCK)
    finally:
        thread.release()


class NameLocks:
    """The locks of one root. Taking one blocks.

    :param folder: descriptor of the folder that their file is in.
    :raises OSError: if the file system has no locks, among others.
    """

    def __init__(self, folder: int) -> None:
        self._threads = [Lock() for _ in range(BYTES)]
        self._file = open_shared(b"locks", folder)
        try:
            lock_byte(self._file, _PROBE)
            lock_byte(self._file, _PROBE, fcntl.F_UNLCK)
        except BaseException:
            os.close(self._file)
            raise

    @contextmanager
    def held(self, paths: Iterable[tuple[bytes, ...]]) -> Iterator[None]:
        """Hold the locks of some names: each once, all in one order, so that nobody waits in a ring."""
        with ExitStack() as held:
            end = monotonic() + PATIENCE
            for at in sorted({zlib.crc32(b"/".join(path)) % BYTES for path in paths}):
                held.enter_context(locked_until(end, self._threads[at], self._file, at))
            yield

    @contextmanager
    def sweeping(self) -> Iterator[None]:
        """Hold the lock of those who look for what nobody holds."""
        lock_byte(self._file, _SWEEPING)
        try:
            yield
        finally:
            lock_byte(self._file, _SWEEPING, fcntl.F_UNLCK)

    def close(self) -> None:
        """Give the descriptor back; may be repeated."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)
