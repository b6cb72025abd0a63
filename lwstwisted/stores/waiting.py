"""Uploads as they lie there, whoever holds them: what they are, what they take, and which have expired.

Every function blocks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.interfaces import UploadState
from lwstwisted.stores import record
from lwstwisted.stores.locks import lock_byte
from lwstwisted.stores.resumable import HELD, UploadFile, data_name, open_record
from lwstwisted.stores.tree import OWN_NAME, UPLOAD_FOLDER, Tree, encoded

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


def ids(tree: Tree) -> list[bytes]:
    """The ids of all uploads."""
    with tree.folder(UPLOAD_FOLDER) as folder:
        return sorted(name for name in map(os.fsencode, os.listdir(folder)) if OWN_NAME.fullmatch(name))


def space_taken(tree: Tree) -> int:
    """Bytes that unfinished uploads take, or will; one that has got its name counts as a file."""
    taken = 0
    for id in ids(tree):
        with suppress(Refused), _seen(tree, id) as (file, folder):
            state, _ = record.read(file)
            data = _status(id, folder)
            if state.named is None and (data is None or data.st_nlink == 1):
                taken += state.length if state.length is not None else data.st_size if data is not None else 0
    return taken


def expired(tree: Tree) -> Iterator[tuple[bytes, UploadState]]:
    """The uploads that have expired, or whose bytes are lost, also if somebody holds them."""
    for id in ids(tree):
        with suppress(Refused), _seen(tree, id) as (file, folder):
            state, _ = record.read(file)
            if _is_lost(state, _status(id, folder)) or state.expires < _now():
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
                    upload.adopt(encoded(tuple(upload.state.record.get("target", ())) or (id.decode(),)))
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
        names = [os.fsencode(name) for name in os.listdir(folder)]
        found = [name for name in names if OWN_NAME.fullmatch(name[:-5]) and name == data_name(name[:-5])]
        return [name for name in found if not os.path.lexists(b"/proc/self/fd/%d/%b" % (folder, name[:-5]))]


def sweep_orphan(tree: Tree, name: bytes) -> None:
    """Remove bytes without a record."""
    with tree.folder(UPLOAD_FOLDER) as folder, suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def sweep(tree: Tree) -> int:
    """Remove what has expired; how many uploads that were."""
    swept = sum(sweep_one(tree, id) for id, _ in list(expired(tree)))
    for name in orphans(tree):
        sweep_orphan(tree, name)
    return swept
