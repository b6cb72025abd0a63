"""The last steps of a file: what makes it whole, durable and visible."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import suppress

from lwstwisted.interfaces import Check, anything
from lwstwisted.stores.tree import ATTEMPTS, Segments, Tree, found_of, keep_digests

FILE_MODE = 0o644
"""Mode of a finished file, whatever the umask: others (a web server, a backup) may read, none may write."""

NOT_KEPT = {"md5"}
"""Digests that are checked, and too weak to be given to others."""


def finish_file(tree: Tree, descriptor: int, digests: Mapping[str, bytes]) -> str:
    """Make a file what it is going to be under its name, durably; only the name is missing then.

    :param digests: what it hashes to, by ``hashlib`` name.
    :returns: its entity-tag.
    """
    if kept := {name: digest for name, digest in digests.items() if name not in NOT_KEPT}:
        keep_digests(descriptor, kept)
    os.fchmod(descriptor, FILE_MODE)
    tree.sync_file(descriptor)
    return found_of(os.fstat(descriptor)).etag


class OpenPartial:
    """An open file without a name of its own. Every method blocks.

    :param descriptor: of the file.
    :param name: its temporary name, if it has one.
    :ivar is_named: whether it has got its name.
    :ivar replaced: bytes of the file that had the name before.
    """

    def __init__(self, tree: Tree, descriptor: int, name: bytes | None) -> None:
        self.descriptor = descriptor
        self.is_named = False
        self.replaced = 0
        self._tree = tree
        self._name = name

    def publish(self, path: Segments, check: Check) -> bool:
        """Give it a name, durably.

        :param check: asked in the moment before.
        :returns: whether the name is new.
        """
        made: list[Segments] = []
        try:
            for _ in range(ATTEMPTS):
                # A race was lost: a folder removed, the old file deleted or turned into a folder.
                race = suppress(FileNotFoundError, FileExistsError, IsADirectoryError)
                with race, self._tree.folder(path[:-1], made) as folder:
                    return self._place(folder, path, check)
            raise OSError(errno.EBUSY, "others keep changing the name")
        except BaseException:
            self._tree.unmake(made)
            raise

    def _place(self, folder: int, path: Segments, check: Check) -> bool:
        is_new = self._link(folder, path, check)
        try:
            self._tree.sync_folder(folder)
        except OSError:
            if is_new:
                self._withdraw(folder, path[-1])
            else:
                self._tree.doubtful.add(os.fstat(self.descriptor).st_ino)
            raise
        return is_new

    def _link(self, folder: int, path: Segments, check: Check) -> bool:
        with self._tree.naming([path]):
            if check is not anything:
                found = None
                with suppress(FileNotFoundError):
                    found = self._tree.look(folder, path[-1])
                check(found)
                if found is None:
                    # Who asks for no lock may put a file there by now: that one is for the check to judge.
                    return self._link_new(folder, path[-1])
            return self._link_unchecked(folder, path[-1])

    def _link_unchecked(self, folder: int, last: bytes) -> bool:
        try:
            return self._link_new(folder, last)
        except FileExistsError:
            old = os.lstat(last, dir_fd=folder)
            self._tree.require_file(old)
        if self._name is None:
            self._name = self._tree.link_partial(self.descriptor)
        os.rename(self._name, last, src_dir_fd=self._tree.partial, dst_dir_fd=folder)
        self._name = None
        self.is_named, self.replaced = True, old.st_size
        return False

    def _link_new(self, folder: int, last: bytes) -> bool:
        self.link_new(folder, last)
        self.is_named = True
        return True

    def link_new(self, folder: int, last: bytes) -> None:
        """Give it a name that nobody has.

        :raises FileExistsError: if somebody has.
        """
        if self._name is None:
            self._tree.link(self.descriptor, last, folder)
        else:
            os.link(self._name, last, src_dir_fd=self._tree.partial, dst_dir_fd=folder)

    def _withdraw(self, folder: int, last: bytes) -> None:
        """Take the name back, unless it is another upload's by now."""
        with suppress(OSError):
            if os.path.samestat(os.lstat(last, dir_fd=folder), os.fstat(self.descriptor)):
                os.unlink(last, dir_fd=folder)
                self.is_named = False

    def close(self) -> None:
        """Give back the descriptor, and the temporary name."""
        self._tree.close_partial(self.descriptor, self._name)
