"""File systems whose power can be cut, and whether that can be done here. Nothing here is a test."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.blocklog import FLUSH as DISK_FLUSH
from tests.blocklog import Replay, attached, copy_sparse, logged_disk, mount, read_log, unmount
from tests.calllog import SYNC, Weakest, begin_log, read_calls

MEMORY = Path("/dev/shm")

WEAKEST = "weakest"
"""What keeps nothing but what it was told to keep: no file system, but ``tests/calllog.py``."""


@dataclass(frozen=True)
class FileSystem:
    """How one is made.

    :ivar size: bytes; the smallest that its tool allows, and a little more.
    :ivar options: for mount(2): copies of one file system are mounted beside each other.
    """

    kind: str
    size: int
    command: Sequence[str]
    options: str = ""

    def make(self, image: Path) -> None:
        """Make one in a new file."""
        with open(image, "wb") as file:
            file.truncate(self.size)
        subprocess.run([*self.command, image], check=True, stdout=subprocess.DEVNULL)

    @property
    def is_there(self) -> bool:
        """Whether there is a tool to make it."""
        return shutil.which(self.command[0]) is not None


_AT_ONCE = "lazy_itable_init=0,lazy_journal_init=0"  # else the kernel writes tables whenever it likes
FILE_SYSTEMS = {
    found.kind: found
    for found in [
        FileSystem("ext4", 96 << 20, ["mkfs.ext4", "-q", "-F", "-b", "4096", "-E", _AT_ONCE]),
        FileSystem("xfs", 320 << 20, ["mkfs.xfs", "-q", "-f", "-s", "size=4096"], "nouuid"),
        FileSystem("btrfs", 160 << 20, ["mkfs.btrfs", "-q", "-f", "-s", "4096", "-M"]),
    ]
}


@cache
def missing(method: str, kind: str) -> str:
    """Why there can't be power cuts here; "" if there can, as was tried."""
    if method == "calls":
        return "" if MEMORY.is_dir() else "no file system in memory here, which gives no inode's number twice"
    if os.geteuid() != 0:
        return "only root can mount"
    if not os.path.exists("/dev/loop-control"):
        return "no loop devices here"
    if (method, kind) == ("shutdown", "btrfs"):
        return "btrfs has no such shutdown"
    if method == "log" and not os.path.exists("/dev/fuse"):
        return "no FUSE here"
    if not FILE_SYSTEMS[kind].is_there:
        return f"no {FILE_SYSTEMS[kind].command[0]} here"
    with temporary_folder() as folder, ExitStack() as stack:
        image = folder / "image"
        FILE_SYSTEMS[kind].make(image)
        try:
            if method == "log":
                image = stack.enter_context(logged_disk(image, folder / "log")).path
            stack.enter_context(mounted(image, FILE_SYSTEMS[kind], folder / "mounted"))
        except OSError as error:
            return f"no {kind} by {method} here: {error}"
    return ""


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Where all of it lives: in memory, if there is a file system for that."""
    with tempfile.TemporaryDirectory(prefix="powercut-", dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder)


@contextmanager
def mounted(image: Path, file_system: FileSystem, at: Path) -> Iterator[Path]:
    """Mount a file until the end of the block.

    :param at: where; it is made.
    """
    at.mkdir(exist_ok=True)
    with attached(image) as device:
        mount(device, at, file_system.kind, file_system.options)
        try:
            yield at
        finally:
            unmount(at)


# With a log: a file with a file system in it, or a folder whose calls are noted


def make_disk(kind: str, disk: Path) -> None:
    """Make a disk with nothing on it."""
    if kind == WEAKEST:
        disk.mkdir()
    else:
        FILE_SYSTEMS[kind].make(disk)


def copy_disk(source: Path, target: Path) -> None:
    """Copy a file, or a folder with all files that have several names."""
    if source.is_dir():
        # Not by shutil, which makes two files of one with two names.
        subprocess.run(["cp", "-a", source, target], check=True)
    else:
        copy_sparse(source, target)


def remove_disk(disk: Path) -> None:
    """Remove a file or a folder."""
    if disk.is_dir():
        shutil.rmtree(disk)
    else:
        disk.unlink()


@contextmanager
def opened(kind: str, disk: Path) -> Iterator[Path]:
    """A folder with what is on a disk, until the end of the block."""
    if kind == WEAKEST:
        yield disk
    else:
        with mounted(disk, FILE_SYSTEMS[kind], disk.with_suffix(".mounted")) as at:
            yield at


@dataclass
class Log:
    """What is written to a disk.

    :ivar position: how many records there are now.
    :ivar calls: the log that those who write have to tell; None if it is noted without them.
    """

    position: Callable[[], int]
    calls: Path | None = None


@contextmanager
def logged(kind: str, disk: Path, log: Path) -> Iterator[tuple[Path, Log]]:
    """The same, with a log of what is written meanwhile.

    :param log: a file that is made.
    """
    if kind == WEAKEST:
        yield disk, Log(begin_log(log, disk), log)
    else:
        with logged_disk(disk, log) as writes, opened(kind, writes.path) as at:
            yield at, Log(lambda: writes.position)


def replay(kind: str, start: Path, log: Path, scratch: Path) -> tuple[Replay | Weakest, list[int]]:
    """What makes disks of a log, and where in the log something is settled.

    :param start: the disk as it was before.
    :param scratch: a file that is made.
    """
    if kind == WEAKEST:
        calls = read_calls(log)
        return Weakest(calls), [at for at, call in enumerate(calls) if call.kind == SYNC]
    writes = read_log(log)
    return Replay(start, writes, scratch), [at for at, write in enumerate(writes) if write.kind == DISK_FLUSH]
