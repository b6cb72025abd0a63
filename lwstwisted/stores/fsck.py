"""Look at the root of a store: what crashes have left in it, and whether files are what their digests say.

A service may use the root meanwhile: what somebody holds (``flock``) is under way, and left alone.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lwstwisted.errors import Refused
from lwstwisted.interfaces import UploadState
from lwstwisted.stores import waiting
from lwstwisted.stores.batch import BatchFolder
from lwstwisted.stores.hashing import RunningDigests
from lwstwisted.stores.names import STATE_FOLDER, parse_name
from lwstwisted.stores.space import Space
from lwstwisted.stores.tree import (
    BATCH_FOLDER,
    OWN_NAME,
    PARTIAL_FOLDER,
    UPLOAD_FOLDER,
    Segments,
    Tree,
    kept_digests,
)

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_READ = 1024 * 1024
_KEPT = {"sha256", "sha512"}
_NO_QUOTA = 1 << 62


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that isn't as it should be.

    :ivar path: beneath the root.
    :ivar problem: a few words.
    :ivar is_repaired: whether it is mended now.
    """

    path: str
    problem: str
    is_repaired: bool = False


def examine(root: Path, *, repair: bool, verify: bool) -> Iterator[Finding]:
    """Look at a root.

    :param repair: take back interrupted forms and remove what crashes left, as the next start would; else nothing is
        changed.
    :param verify: read every file that has a digest.
    :raises OSError: if the root can't be read, or is none.
    """
    tree = _opened(root)
    try:
        yield from _leftovers(tree, PARTIAL_FOLDER, "an unfinished upload that nobody holds", repair)
        yield from _leftovers(tree, BATCH_FOLDER, "an interrupted form that nobody holds", repair)
        yield from _uploads(tree, repair)
        yield from _names(tree)
        if verify:
            yield from _digests(tree)
    finally:
        tree.close()


def sweep(root: Path, *, dry_run: bool) -> Iterator[tuple[str, UploadState]]:
    """Remove the resumable uploads that have expired, as a service does all the time, and tell which they are.

    :param dry_run: remove nothing.
    :raises OSError: if the root can't be read, or is none.
    """
    tree = _opened(root)
    try:
        for id, state in list(waiting.expired(tree)):
            if dry_run or waiting.sweep_one(tree, id):
                yield id.decode(), state
        if not dry_run:
            waiting.Records(tree).sweep()
    finally:
        tree.close()


def _opened(root: Path) -> Tree:
    if not (root / STATE_FOLDER).is_dir():
        raise FileNotFoundError(f"{root} is not the root of a store: it has no {STATE_FOLDER}")
    tree = Tree(root, "full", use_tmpfile=False, sweep=False)
    try:
        if (root / STATE_FOLDER / "usage").exists():  # somebody has a quota, and what is removed here counts no more
            usage = tree.usage(lambda: tree.count_bytes() + waiting.Records(tree).space_taken(), _NO_QUOTA)
            tree.space = Space(tree.partial, 0, usage)
    except BaseException:
        tree.close()
        raise
    return tree


def _uploads(tree: Tree, repair: bool) -> Iterator[Finding]:
    """What a service that runs would sweep, and what none would. An upload that has not expired is as it should be."""
    expired = {id for id, _ in waiting.expired(tree)}
    orphans = waiting.orphans(tree)
    with tree.folder(UPLOAD_FOLDER) as folder:
        for name in sorted(map(os.fsencode, os.listdir(folder))):
            where = os.fsdecode(b"/".join([*UPLOAD_FOLDER, name]))
            problem = ""
            if name in orphans:
                problem = "bytes of a resumable upload without its record"
                if repair:
                    waiting.sweep_orphan(tree, name)
            elif name in expired and not waiting.is_held(tree, name):
                problem = "a resumable upload that has expired, or whose bytes are lost"
                if repair:
                    waiting.sweep_one(tree, name)
            elif OWN_NAME.fullmatch(name):
                if not waiting.is_readable(tree, name):
                    problem = "the record of a resumable upload that says nothing; it is never touched"
            elif not OWN_NAME.fullmatch(name.removesuffix(b".data")):
                problem = "not the store's own; it is never touched"
            if problem:
                is_there = os.path.lexists(f"/proc/self/fd/{folder}/{os.fsdecode(name)}")
                yield Finding(where, problem, repair and not is_there)


def _leftovers(tree: Tree, path: Segments, problem: str, repair: bool) -> Iterator[Finding]:
    with tree.folder(path) as folder:
        for name in sorted(map(os.fsencode, os.listdir(folder))):
            where = os.fsdecode(b"/".join([*path, name]))
            if not OWN_NAME.fullmatch(name):
                yield Finding(where, "not the store's own; it is never touched")
                continue
            with tree.sweeping():
                is_left = not _is_held(folder, name)
                is_repaired = is_left and repair and _remove(tree, path, folder, name)
            if is_left:
                yield Finding(where, problem, is_repaired)


def _is_held(folder: int, name: bytes) -> bool:
    """Whether somebody uses it, or has removed it meanwhile."""
    try:
        descriptor = os.open(name, _OPEN, dir_fd=folder)
    except FileNotFoundError:
        return True
    except OSError:
        return False  # a link, say: nothing that a store has made
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _remove(tree: Tree, path: Segments, folder: int, name: bytes) -> bool:
    try:
        if path == PARTIAL_FOLDER:
            return tree.sweep_one(name)
        BatchFolder(tree).recover(folder, name)
    except (OSError, KeyError, TypeError, ValueError):
        return False
    return not os.path.lexists(f"/proc/self/fd/{folder}/{os.fsdecode(name)}")


def _names(tree: Tree) -> Iterator[Finding]:
    for path, status, folder in tree.walk():
        where = os.fsdecode(b"/".join(path))
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            yield Finding(where, "neither a file nor a folder; it is not served")
            continue
        if stat.S_ISDIR(status.st_mode):
            try:
                os.close(os.open(path[-1], _OPEN, dir_fd=folder))
            except FileNotFoundError:
                continue  # it was removed meanwhile
            except OSError as error:
                yield Finding(where, f"can't be looked into: {error.strerror}")
        try:
            is_reachable = tuple(segment.encode() for segment in parse_name(list(path))) == path
        except Refused:
            is_reachable = False
        if not is_reachable:
            yield Finding(where, "a name that nobody can ask for; it is not served")


def _digests(tree: Tree) -> Iterator[Finding]:
    for path, status, folder in tree.walk():
        if not stat.S_ISREG(status.st_mode):
            continue
        where = os.fsdecode(b"/".join(path))
        try:
            wrong = _wrong_digests(path[-1], folder)
        except FileNotFoundError:
            continue  # it was deleted meanwhile
        except OSError as error:
            yield Finding(where, f"can't be read: {error.strerror}")
            continue
        for name in wrong:
            yield Finding(where, f"its contents are not what its {name} says")


def _wrong_digests(name: bytes, folder: int) -> list[str]:
    with open(os.open(name, _OPEN, dir_fd=folder), "rb") as file:
        kept = kept_digests(file.fileno())
        known = {name: digest for name, digest in kept.items() if name in _KEPT}
        running = RunningDigests(known)
        while known and (data := file.read(_READ)):
            running.update(data)
    return [*running.wrong(), *(kept.keys() - known.keys())]
