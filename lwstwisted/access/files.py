"""A small file that is read again whenever it has changed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Generic, TypeVar

from twisted.logger import Logger

LARGEST = 4 * 1024 * 1024
"""Bytes: 50,000 users. It is read between two turns of the loop."""

T = TypeVar("T")

_log = Logger()

_Stamp = tuple[int, int, int, int]


class RereadFile(Generic[T]):
    """What is in a file.

    When the file has become one that can't be read, what was in it before still holds, and the log says so once: an
    editor may be writing it. Who wants to lock everybody out leaves it empty.

    :param path: of the file.
    :param parse: makes something of its text.
    :param is_secret: whether nobody but its owner and group may read it; others may write to none.
    :raises OSError: if it can't be read.
    :raises ValueError: if it can't be understood.
    :ivar generation: how often it has been read; 1 at first.
    """

    def __init__(self, path: str, parse: Callable[[str], T], is_secret: bool = False) -> None:
        self._path = path
        self._parse = parse
        self._is_secret = is_secret
        self._refused: _Stamp | str | None = None
        self.generation = 0
        self._read()

    @property
    def content(self) -> T:
        """As it is now."""
        self.refresh()
        return self._content

    def refresh(self) -> None:
        """Read it again, if it has changed."""
        try:
            stamp: _Stamp | str = _stamp_of(os.stat(self._path))
            if stamp in (self._stamp, self._refused):
                return
            self._read()
            self._refused = None
            return
        except OSError as error:
            problem = error.strerror or str(error)
            stamp = problem
        except ValueError as error:
            problem = str(error)
        if self._refused != stamp:
            self._refused = stamp
            _log.error("{path}: {problem}; what was in it before still holds", path=self._path, problem=problem)

    def _read(self) -> None:
        with open(self._path, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a file")
            if status.st_mode & (stat.S_IRWXO if self._is_secret else stat.S_IWOTH):
                raise ValueError("everybody on this machine may read or change it (chmod o= would do)")
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise ValueError("it is not UTF-8") from None
        self._content = self._parse(text)
        self._stamp = _stamp_of(status)
        self.generation += 1


def _stamp_of(status: os.stat_result) -> _Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
