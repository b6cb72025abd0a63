"""Files that become visible together or not at all.

Facts
    * No file system gives several names in one step. A crash between two of them leaves the first without the second.
    * What one folder was told before an fsync of it is durable together; what two folders were told is so in any order.
    * A name that was made has to go again if the next one fails, and a file that was replaced has to come back.

Decision
    Names are given under an undo journal. Each batch has a folder of its own, ``.lwstwisted/batches/<id>``, and in it

    ============  =====================================================================================
    ``0``, ``1``  a whole file, synced; its link stays until the end, and tells our file from any other
    ``0.old``     a link to the file that is going to be replaced, if there is one
    ``0.swap``    a link that is renamed over that file
    ``journal``   the targets, and the folders that have to be made for them
    ============  =====================================================================================

    A commit looks at all targets and asks all checks, links the old files, writes the journal and syncs the folder.
    From here on, whatever happens, there is a way back: a target that is our file (the same inode as ``0``) becomes
    the old one again, or none. Then the names are given and their folders synced. *The commit point is the removal of
    the journal*, synced as well; the answer comes after it. The same undo serves a failure in the running process
    and, at the next start, a crash: there is one direction only, and it may be interrupted and repeated at will.

    A batch belongs to whoever holds the ``flock`` of its folder. The next start takes back and removes what nobody
    holds; the batch of another process that lives is left alone.

    The locks of all its names are held from the checks to the commit point, so nobody sees a check outdated or a
    rollback overtaken. Who changes a target without asking for its lock, as a person may by hand, is noticed: the whole
    is taken back and tried again.

Price
    * Beside the syncs of the files and of their folders: four, and one write. 1000 files of 4 KiB take that once.
    * Others see the first names some microseconds before the last ones; after a crash, until the next start.
    * Two descriptors for each batch under way, however many files it has: its folder, and the file that is written.
    * The file system must know ``flock`` for folders, as all local ones do and NFS doesn't.
    * To replace a file its owner or somebody who may write to it is needed (proc(5), ``protected_hardlinks``).
    * An fsync that fails while names are given *and* a power cut before the next start may leave some of the names.

Roads not taken
    * A redo journal, carried out at the next start: it needs an undo all the same, for the failure of a single step.
    * A folder for each batch that is swapped in by one ``rename``: files go to folders that have other files.
    * A temporary name and an open descriptor for each file until the end: a form of 1000 files would take them all.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from threading import Lock
from typing import Any

from twisted.logger import Logger

from lwstwisted.errors import Refused
from lwstwisted.interfaces import Check, Found
from lwstwisted.stores.space import Reservation
from lwstwisted.stores.tree import (
    ATTEMPTS,
    BATCH_FOLDER,
    OWN_NAME,
    STATE_MODE,
    Segments,
    Tree,
    close_folder,
    encoded,
    new_own_name,
)

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC

_JOURNAL = b"journal"
_DRAFT = b"journal.new"
_CONTENTS = re.compile(rb"\d+(\.old|\.swap)?|journal(\.new)?")

# A race against another process was lost: a name came, went, or became another's.
_RACE = (FileNotFoundError, FileExistsError, IsADirectoryError)


def _numbered(number: int, what: bytes = b"") -> bytes:
    return b"%d%b" % (number, what)


class BatchFolder:
    """The files of one batch on their way to their names. Every method blocks; one thread at a time is let in.

    :param tree: where the names will be.
    :ivar space: what was reserved for files to come, and what those have that are here.
    """

    _log = Logger()

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._name = b""
        self._descriptor = -1
        self._targets: list[Segments] = []
        self._checks: list[Check] = []
        self.space = Reservation(tree.space)
        self._entered = Lock()

    @property
    def is_open(self) -> bool:
        """Whether there is anything to commit, to remove or to give back."""
        return self._descriptor >= 0 or not self.space.is_empty

    def reserve(self, length: int) -> None:
        """Have space for files of so many bytes together.

        :raises Refused: if there isn't.
        """
        with self._entered:
            self.space.take(length)

    def open(self) -> None:
        """Make the folder, unless that is done."""
        with self._entered:
            if self._name:
                return
            for _ in range(ATTEMPTS):
                name = new_own_name()
                with self._tree.folder(BATCH_FOLDER) as parent:
                    os.mkdir(name, STATE_MODE, dir_fd=parent)
                    # Another process' start may come between any two of these steps.
                    try:
                        self._own(parent, name)
                        return
                    except (FileNotFoundError, BlockingIOError):
                        continue
                    except OSError:
                        with suppress(OSError):
                            os.rmdir(name, dir_fd=parent)
                        raise
            raise OSError(errno.EBUSY, "other processes keep sweeping new batches")

    def _own(self, parent: int, name: bytes) -> None:
        """Open and hold the folder, if nobody else does and it is still there."""
        descriptor = os.open(name, _FOLDER, dir_fd=parent)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.lstat(name, dir_fd=parent)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor, self._name = descriptor, name

    def keep(
        self, target: Segments, check: Check, link: Callable[[int, bytes], object], reservation: Reservation
    ) -> None:
        """Take a file that is whole and synced.

        :param link: links the file into a folder, under a name.
        :param reservation: its space.
        """
        with self._entered:
            if target in self._targets:
                raise ValueError(f"two files of one name in a batch: {target!r}")
            link(self._descriptor, _numbered(len(self._targets)))
            self._targets.append(target)
            self._checks.append(check)
            reservation.hand_over(self.space)

    def commit(self) -> list[bool]:
        """Give all files their names.

        :returns: for each whether its name is new.
        """
        with self._entered:
            try:
                if not self._targets:
                    return []
                with self._tree.naming(self._targets):
                    for _ in range(ATTEMPTS):
                        with suppress(*_RACE):
                            return self._commit()
                raise OSError(errno.EBUSY, "others keep changing the names")
            finally:
                self._close()

    def _commit(self) -> list[bool]:
        replaced = [self._prepare(number) for number in range(len(self._targets))]
        are_new = [found is None for found in replaced]
        made = self._missing_folders()
        self._write_journal(made)
        try:
            for folder, numbers in self._by_folder().items():
                self._place(folder, numbers, are_new)
            self.space.settle()
            self._remove_journal()
        except BaseException:
            with suppress(OSError):
                self._require_journal(made)
            self._undo(made)
            raise
        self.space.keep()
        self._tree.space.count(-sum(found.size for found in replaced if found is not None))
        return are_new

    # The way there

    def _prepare(self, number: int) -> Found | None:
        """Look at a target, ask its check, and link the file that will be replaced, which is returned."""
        target, old = self._targets[number], _numbered(number, b".old")
        found: Found | None = None
        with suppress(FileNotFoundError):
            os.unlink(old, dir_fd=self._descriptor)  # of an attempt that was taken back
        with suppress(FileNotFoundError), self._tree.folder(target[:-1]) as folder:
            found = self._tree.look(folder, target[-1])
            os.link(target[-1], old, src_dir_fd=folder, dst_dir_fd=self._descriptor, follow_symlinks=False)
            found = self._tree.look(self._descriptor, old)
        self._checks[number](found)
        return found

    def _missing_folders(self) -> list[Segments]:
        """All folders on the way to the targets that are not there, the upper ones first."""
        return [folder for target in self._by_folder() for folder in self._missing_on(target)]

    def _missing_on(self, path: Segments) -> Iterable[Segments]:
        for depth in range(1, len(path) + 1):
            try:
                with self._tree.folder(path[:depth]):
                    pass
            except FileNotFoundError:
                return [path[:below] for below in range(depth, len(path) + 1)]
        return ()

    def _by_folder(self) -> dict[Segments, list[int]]:
        numbers: dict[Segments, list[int]] = {}
        for number, target in enumerate(self._targets):
            numbers.setdefault(target[:-1], []).append(number)
        return numbers

    def _write_journal(self, made: list[Segments]) -> None:
        with self._tree.folder(BATCH_FOLDER) as parent:
            self._tree.sync_folder(parent)
        written = json.dumps({"folders": _text(made), "targets": _text(self._targets)}, ensure_ascii=False).encode()
        with suppress(FileNotFoundError):
            os.unlink(_DRAFT, dir_fd=self._descriptor)
        journal = os.open(_DRAFT, _NEW, 0o600, dir_fd=self._descriptor)
        try:
            at = 0
            while at < len(written):
                at += os.pwrite(journal, written[at:], at)
            self._tree.sync_file(journal)
        finally:
            os.close(journal)
        os.rename(_DRAFT, _JOURNAL, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        try:
            self._tree.sync_folder(self._descriptor)
        except OSError:
            # No name was given yet, so there is nothing to take back: not now, and not at the next start.
            os.unlink(_JOURNAL, dir_fd=self._descriptor)
            raise

    def _place(self, path: Segments, numbers: list[int], are_new: list[bool]) -> None:
        with self._tree.folder(path, made=[]) as folder:
            for number in numbers:
                last = self._targets[number][-1]
                if are_new[number]:
                    os.link(_numbered(number), last, src_dir_fd=self._descriptor, dst_dir_fd=folder)
                else:
                    self._replace(number, folder, last)
            self._tree.sync_folder(folder)

    def _replace(self, number: int, folder: int, last: bytes) -> None:
        swap, old = _numbered(number, b".swap"), os.lstat(_numbered(number, b".old"), dir_fd=self._descriptor)
        if not os.path.samestat(old, os.lstat(last, dir_fd=folder)):
            raise FileExistsError(errno.EEXIST, "another process has replaced the file meanwhile")
        with suppress(FileNotFoundError):
            os.unlink(swap, dir_fd=self._descriptor)
        os.link(_numbered(number), swap, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        os.rename(swap, last, src_dir_fd=self._descriptor, dst_dir_fd=folder)

    def _remove_journal(self) -> None:
        os.unlink(_JOURNAL, dir_fd=self._descriptor)
        self._tree.sync_folder(self._descriptor)

    # The way back

    def _require_journal(self, made: list[Segments]) -> None:
        """Have the journal again if all that failed was the sync behind its removal: the way back may fail as well."""
        try:
            os.lstat(_JOURNAL, dir_fd=self._descriptor)
        except FileNotFoundError:
            self._write_journal(made)

    def _undo(self, made: list[Segments]) -> None:
        """Make everything as it was before the journal.

        :raises OSError: if that fails; the journal stays for the next start then.
        """
        try:
            for path, numbers in self._by_folder().items():
                # What others have changed is theirs: another kind of thing on the way, or nothing any more.
                with suppress(Refused, FileNotFoundError, NotADirectoryError), self._tree.folder(path) as folder:
                    for number in numbers:
                        self._take_back(number, folder, self._targets[number][-1])
                    self._tree.sync_folder(folder)
            self._tree.unmake(made)
            with suppress(FileNotFoundError):
                self._remove_journal()
        except OSError as error:
            # Of a class of its own, so that nobody takes it for a race and begins anew.
            raise OSError(errno.EIO, f"a batch stays half done until the next start: {error}") from error

    def _take_back(self, number: int, folder: int, last: bytes) -> None:
        ours = os.lstat(_numbered(number), dir_fd=self._descriptor)
        try:
            if not os.path.samestat(ours, os.lstat(last, dir_fd=folder)):
                return
        except FileNotFoundError:
            return
        try:
            os.rename(_numbered(number, b".old"), last, src_dir_fd=self._descriptor, dst_dir_fd=folder)
        except FileNotFoundError:
            os.unlink(last, dir_fd=folder)

    def recover(self, parent: int, name: bytes) -> bool:
        """Take back what a crash left, and remove it; whether there was a journal.

        :raises OSError: if it belongs to a process that lives, among others.
        :raises ValueError: if the journal is none of ours.
        """
        self._own(parent, name)
        try:
            journal = self._read_journal()
            if journal is not None:
                self._targets = _segments(journal["targets"])
                with self._tree.naming(self._targets):
                    self._undo(_segments(journal["folders"]))
        finally:
            self._close()
        return journal is not None

    def _read_journal(self) -> Any:
        try:
            descriptor = os.open(_JOURNAL, _READ, dir_fd=self._descriptor)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as journal:
            return json.load(journal)

    # The end

    def close(self) -> None:
        """Forget the batch; nothing of it is left."""
        with self._entered:
            self._close()

    def _close(self) -> None:
        """Remove the folder, unless its journal is still needed. A failure here is for the log."""
        self.space.give_back()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        try:
            names = [os.fsencode(name) for name in os.listdir(descriptor)]
            if _JOURNAL not in names:
                for name in filter(_CONTENTS.fullmatch, names):
                    os.unlink(name, dir_fd=descriptor)
                with self._tree.folder(BATCH_FOLDER) as parent:
                    os.rmdir(self._name, dir_fd=parent)
        except OSError as error:
            self._log.warn("store: a batch stays until the next start: {error}", error=error)
        finally:
            close_folder(descriptor)


def recover_batches(tree: Tree) -> None:
    """Take back and remove the batches that nobody holds."""
    log = BatchFolder._log
    with tree.sweeping(), tree.folder(BATCH_FOLDER) as parent:
        for name in map(os.fsencode, os.listdir(parent)):
            if not OWN_NAME.fullmatch(name):
                continue
            try:
                if BatchFolder(tree).recover(parent, name):
                    log.warn("store: took back a batch that had been interrupted")
            except BlockingIOError:
                pass  # its process lives
            except (OSError, KeyError, TypeError, ValueError) as error:
                log.error("store: a batch of an earlier run can't be taken back: {error}", error=error)


def _text(paths: Iterable[Segments]) -> list[list[str]]:
    return [[segment.decode() for segment in path] for path in paths]


def _segments(paths: list[list[str]]) -> list[Segments]:
    return [encoded(tuple(path)) for path in paths]
