"""Uploads as they lie there, whoever holds them: what they are, what they take, and which have expired.

Every function blocks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from threading import Lock

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.interfaces import UploadState
from lwstwisted.stores import record
from lwstwisted.stores.locks import lock_byte
from lwstwisted.stores.resumable import HELD, UploadFile, data_name, open_record
from lwstwisted.stores.tree import OWN_NAME, UPLOAD_FOLDER, Tree, encoded

_TICK = 1.0
"""Seconds that two changes of a file are apart at most which leave it the same time: far more than on any disk."""

_started = time.time() - time.monotonic()


def _now() -> float:
    """The time of day, not later than it can be: to set the clock forward removes nothing from a running service."""
    return min(time.time(), _started + time.monotonic())


def _status(id: bytes, folder: int) -> os.stat_result | None:
    """The file that has the bytes of an upload, or None."""
    try:
        return os.lstat(data_name(id), dir_fd=folder)
    except FileNotFoundError:
        return None


def _is_lost(state: UploadState, data: os.stat_result | None) -> bool:
    """Whether fewer bytes are there than the record says."""
    return state.named is None and (data is None or data.st_size < state.offset)


def _is_over(state: UploadState, data: os.stat_result | None) -> bool:
    """Whether it may be removed, if nobody holds it."""
    return _is_lost(state, data) or state.expires < _now()


def _is_kept(id: bytes, folder: int) -> bool:
    """Whether a record says by its time alone that its upload is a file and hasn't expired (``UploadFile._end_as``)."""
    with suppress(FileNotFoundError):
        return os.lstat(id, dir_fd=folder).st_mtime > _now() and _status(id, folder) is None
    return True


@contextmanager
def _seen(tree: Tree, id: bytes) -> Iterator[tuple[int, int]]:
    """Descriptors of a record, and of the folder of all."""
    with tree.folder(UPLOAD_FOLDER) as folder:
        file = open_record(id, folder)
        try:
            yield file, folder
        finally:
            os.close(file)


def look(tree: Tree, id: bytes) -> UploadState:
    """What an upload is at the moment, whoever holds it.

    :raises Refused: ``UPLOAD_NOT_FOUND``.
    """
    with _seen(tree, id) as (file, folder):
        for _ in range(2):  # it may be given its name between the two looks
            state, _lifetime = record.read(file)
            if not _is_lost(state, _status(id, folder)):
                return state
    raise Refused(errors.UPLOAD_NOT_FOUND)


def _names(folder: int) -> Iterator[bytes]:
    """What is in a folder, one after the other: there may be very many."""
    with os.scandir(folder) as entries:
        for entry in entries:
            yield os.fsencode(entry.name)


def _ids(folder: int) -> Iterator[bytes]:
    return (name for name in _names(folder) if OWN_NAME.fullmatch(name))


def ids(tree: Tree) -> list[bytes]:
    """The ids of all uploads."""
    with tree.folder(UPLOAD_FOLDER) as folder:
        return sorted(_ids(folder))


class Records:
    """What the records say. Each is read when it is asked for, and once more when it has changed.

    The start needs them to count the bytes, to find concatenations and for the first sweep, and each later sweep again.
    Those of uploads that have become files are neither read nor remembered until they expire: they are the most by far.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._known: dict[bytes, tuple[tuple[int, int], UploadState]] = {}
        self._reading = Lock()
        self.stopping = False

    def states(self) -> list[tuple[bytes, UploadState]]:
        """The ids of uploads and what they are, less files that are to be kept; of their records only ``parts``."""
        # One thread reads, and the other one then finds that it has been done.
        with self._reading, self._tree.folder(UPLOAD_FOLDER) as folder:
            left = sorted(id for id in _ids(folder) if not _is_kept(id, folder))
            found = [(id, self._state(id, folder)) for id in left]
            states = [(id, state) for id, state in found if state is not None]
            if len(self._known) > len(states):
                there = {id for id, _ in states}
                self._known = {id: known for id, known in self._known.items() if id in there}
            return states

    def _state(self, id: bytes, folder: int) -> UploadState | None:
        with suppress(Refused, FileNotFoundError):
            status = os.lstat(id, dir_fd=folder)
            stamp = status.st_ino, status.st_mtime_ns
            known = self._known.get(id)
            if known is not None and known[0] == stamp:
                return known[1]
            file = open_record(id, folder)
            try:
                state, _lifetime = record.read(file)
            finally:
                os.close(file)
            parts = state.record.get("parts")
            state = replace(state, record={"parts": parts} if parts else {})
            # What was written in the same tick of the clock, and after this, would have the same time.
            if status.st_mtime + _TICK < time.time():
                self._known[id] = stamp, state
            return state
        return None

    def space_taken(self) -> int:
        """Bytes that unfinished uploads take, or will; one that has got its name counts as a file."""
        taken = 0
        with self._tree.folder(UPLOAD_FOLDER) as folder:
            for id, state in self.states():
                data = _status(id, folder)
                if state.named is None and (data is None or data.st_nlink == 1):
                    taken += state.length if state.length is not None else data.st_size if data is not None else 0
        return taken

    def sweep(self) -> int:
        """Remove what has expired; how many uploads that were."""
        with self._tree.folder(UPLOAD_FOLDER) as folder:
            left = [id for id, state in self.states() if _is_over(state, _status(id, folder))]
        swept = 0
        for id in left:
            if self.stopping:
                return swept  # each costs a sync, and the next start sweeps as well
            swept += sweep_one(self._tree, id)
        for name in orphans(self._tree):
            sweep_orphan(self._tree, name)
        return swept

    def with_parts(self) -> list[bytes]:
        """The ids of uploads that are made of others, and aren't files yet."""
        return [id for id, state in self.states() if state.named is None and "parts" in state.record]


def held(tree: Tree) -> tuple[int, int]:
    """How many unfinished uploads there are, and the bytes of the disk that they hold, reserved ones included."""
    count = bytes_ = 0
    with tree.folder(UPLOAD_FOLDER) as folder:
        for id in ids(tree):
            data = _status(id, folder)
            if data is not None and data.st_nlink == 1:
                count, bytes_ = count + 1, bytes_ + data.st_blocks * 512
    return count, bytes_


def expired(tree: Tree) -> Iterator[tuple[bytes, UploadState]]:
    """The uploads that have expired, or whose bytes are lost, also if somebody holds them."""
    for id in ids(tree):
        with suppress(Refused), _seen(tree, id) as (file, folder):
            state, _ = record.read(file)
            if _is_over(state, _status(id, folder)):
                yield id, state


def recover(tree: Tree) -> None:
    """Note which uploads have their names, where a crash has kept that from being noted.

    Before anybody is served: who replaces or deletes such a file would else see it come back with the upload.
    """
    # Their bytes have two names; to look at those is quicker than to read each record.
    with tree.folder(UPLOAD_FOLDER) as folder:
        left = [id for id in ids(tree) if (data := _status(id, folder)) is not None and data.st_nlink > 1]
    for id in left:
        with suppress(Refused, OSError, TypeError, ValueError):
            upload = UploadFile.open(tree, id)
            if upload is not None:
                try:
                    upload.adopt(encoded(upload.target))
                finally:
                    upload.close()


def is_held(tree: Tree, id: bytes) -> bool:
    """Whether somebody has an upload open, or has removed it meanwhile; nobody is told of the look."""
    try:
        with _seen(tree, id) as (file, _):
            lock_byte(file, HELD, wait=False)
            return False
    except (BlockingIOError, Refused):
        return True


def is_readable(tree: Tree, id: bytes) -> bool:
    """Whether a record says anything, or has been removed meanwhile."""
    try:
        with _seen(tree, id) as (file, _), suppress(Refused):
            record.read(file)
            return True
    except Refused:
        return True
    return False


def sweep_one(tree: Tree, id: bytes) -> bool:
    """Remove an upload, if it has expired and nobody holds it; whether that was so."""
    if is_held(tree, id):
        return False  # to open it would make its holder leave
    try:
        upload = UploadFile.open(tree, id)
    except Refused:
        return False  # it is gone, also if its bytes were lost
    if upload is None:
        return False
    try:
        is_expired = upload.state.expires < _now()
        if is_expired:
            upload.remove()
        return is_expired
    finally:
        upload.close()


def orphans(tree: Tree) -> list[bytes]:
    """The names of bytes without a record, which comes first and goes first."""
    with tree.folder(UPLOAD_FOLDER) as folder:
        found = [name for name in _names(folder) if OWN_NAME.fullmatch(name[:-5]) and name == data_name(name[:-5])]
        return [name for name in found if not os.path.lexists(b"/proc/self/fd/%d/%b" % (folder, name[:-5]))]


def sweep_orphan(tree: Tree, name: bytes) -> None:
    """Remove bytes without a record."""
    with tree.folder(UPLOAD_FOLDER) as folder, suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
