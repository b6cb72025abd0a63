"""Services that lose files: each mutant is ``lwstwisted`` with one of its precautions taken out.

A service becomes a mutant by its environment alone: :func:`environment` puts a ``sitecustomize`` in front of its path,
which calls :func:`install`. Every call of ``sync_file`` and ``sync_folder`` in the source of the store is found by
itself, so that a new one has its mutant without anybody thinking of it; what replaces an exclusive link or a rename,
or changes the order of two steps, is written down here. A mutant prints :data:`TOOK_EFFECT` when what was taken out
would have been needed for the first time. Nothing here is a test.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from tests import calllog

TOP = Path(__file__).parent.parent
STORES = TOP / "lwstwisted" / "stores"
VARIABLE, LOG_VARIABLE = "POWERCUT_MUTANT", "POWERCUT_LOG"
TOOK_EFFECT = "the mutant took effect"

CHECKPOINT = 32 * 1024
"""Bytes after which a service makes an upload durable while more of them come: else no load would see it."""
WORTH_A_WRITE = 8 * 1024
"""Bytes that a service writes while more of them come, likewise."""


HIDDEN_BY_EXT4 = {
    "BatchFolder._write_journal.sync_folder": "the batch's name is older than its journal, whose folder is synced next",
    "BatchFolder._write_journal.sync_folder.2": "the names are given later than the journal, and one journal of the "
    "file system has all of it, in this order",
    "BatchFolder._place.sync_folder": "the journal goes later than the names were given, and that is synced",
    "BatchFolder._undo.sync_folder": "the journal goes later than the names were taken back, and that is synced",
    "Tree._make_root.sync_folder": "the root is older than all that is synced in it",
    "Tree._make.sync_folder": "the folder is older than the name in it, which is synced next",
    "bytes unlinked before the record": "the name goes with the journal, and what is written to the record before that",
    "batch without journal": "all names that a form gives in a folder are one commit of the journal, but for chance",
}
"""Mutants without a loss on ext4, and why. Its fsync of a folder is a commit of the one journal that all folders share
(jbd2), which has all that was done before in the order in which it was done; so what is synced later makes durable what
is older. POSIX promises none of that, and the store does not rely on it: ``tests/calllog.py`` shows a loss of each."""


AFTER_KILL = {
    "UploadFile._already.sync_folder": "an upload whose service is killed between its name and the record of that, and "
    "which is asked for before the power fails: no service is killed under load",
}
"""Mutants that the load can't notice, and when they lose something; ``KilledTests`` of ``tests/test_powercut.py`` does
that to them."""


class Sync(NamedTuple):
    """A call of the store that makes something durable.

    :ivar where: the function around it.
    :ivar nth: which one in that function, from 1 on.
    :ivar called: ``sync_file`` or ``sync_folder``.
    :ivar lines: of the source.
    """

    where: str
    nth: int
    called: str
    lines: range

    @property
    def name(self) -> str:
        """What the mutant without this call is named."""
        return f"{self.where}.{self.called}" + (f".{self.nth}" if self.nth > 1 else "")


def syncs(folder: Path = STORES) -> list[Sync]:
    """All such calls in the source of the store."""
    found: list[Sync] = []
    for path in sorted(folder.glob("*.py")):
        for where, function in _functions(ast.parse(path.read_text())):
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            calls.sort(key=lambda node: node.lineno)
            seen: dict[str, int] = {}
            for call in calls:
                called = call.func.attr if isinstance(call.func, ast.Attribute) else ""
                if called in ("sync_file", "sync_folder"):
                    seen[called] = seen.get(called, 0) + 1
                    lines = range(call.lineno, (call.end_lineno or call.lineno) + 1)
                    found.append(Sync(where, seen[called], called, lines))
    return found


def _functions(tree: ast.AST, outer: str = "") -> Iterator[tuple[str, ast.AST]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{outer}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield outer + node.name, node


_said: list[bool] = []


def _took_effect() -> None:
    if not _said:
        _said.append(True)
        os.write(1, f"{TOOK_EFFECT}\n".encode())


def _without(sync: Sync, applies: Callable[[FrameType], bool] = lambda caller: True) -> None:
    from lwstwisted.stores.tree import Tree

    original = getattr(Tree, sync.called)

    def skipping(tree: Tree, descriptor: int) -> None:
        caller = sys._getframe(1)
        if caller.f_code.co_qualname == sync.where and caller.f_lineno in sync.lines and applies(caller):
            _took_effect()
        else:
            original(tree, descriptor)

    setattr(Tree, sync.called, skipping)


def _after_link() -> None:
    """The folder isn't synced when a file was given a new name."""
    _without(_named("OpenPartial._place.sync_folder"), lambda caller: bool(caller.f_locals["is_new"]))


def _after_rename() -> None:
    """The folder isn't synced when a file was replaced."""
    _without(_named("OpenPartial._place.sync_folder"), lambda caller: not caller.f_locals["is_new"])


def _link_overwrites() -> None:
    """A new name is given by a rename, which takes it from whoever has had it."""
    from lwstwisted.stores.placing import OpenPartial

    def overwriting(file: Any, folder: int, last: bytes) -> bool:
        _took_effect()
        name = file._tree.link_partial(file.descriptor)
        os.rename(name, last, src_dir_fd=file._tree.partial, dst_dir_fd=folder)
        file.is_named = True
        return True

    OpenPartial._link_new = overwriting


def _write_in_place() -> None:
    """A file that is replaced is opened and written to."""
    from lwstwisted.stores.placing import OpenPartial

    def in_place(file: Any, folder: int, last: bytes) -> bool:
        file.is_named = True
        try:
            file.link_new(folder, last)
            return True
        except FileExistsError:
            file._tree.require_file(os.lstat(last, dir_fd=folder))
        _took_effect()
        _overwrite(file.descriptor, last, folder)
        return False

    OpenPartial._link_unchecked = in_place


def _overwrite(source: int, last: bytes, folder: int) -> None:
    # Without O_TRUNC, behind which ext4 suspects what is done here and makes up for it (auto_da_alloc, ext4(5)).
    target = os.open(last, os.O_WRONLY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        at = 0
        while data := os.pread(source, 1 << 16, at):
            at += os.pwrite(target, data, at)
        os.ftruncate(target, at)
        os.fsync(target)
    finally:
        os.close(target)


def _batch_link_overwrites() -> None:
    """A file of a form gets its name by a rename, new or not."""
    from lwstwisted.stores import batch

    real = batch.os.link

    def overwriting(source: Any, target: Any, **where: Any) -> None:
        caller = sys._getframe(1)
        if caller.f_code.co_qualname != "BatchFolder._place":
            real(source, target, **where)
            return
        _took_effect()
        here = where["src_dir_fd"]
        real(source, b"%b.swap" % source, src_dir_fd=here, dst_dir_fd=here)
        os.rename(b"%b.swap" % source, target, src_dir_fd=here, dst_dir_fd=where["dst_dir_fd"])

    batch.os = _Instead(batch.os, link=overwriting)


def _batch_writes_in_place() -> None:
    """A file that a form replaces is opened and written to."""
    from lwstwisted.stores import batch

    def in_place(folder_of_batch: Any, number: int, folder: int, last: bytes) -> None:
        _took_effect()
        source = os.open(b"%d" % number, os.O_RDONLY, dir_fd=folder_of_batch._descriptor)
        try:
            _overwrite(source, last, folder)
        finally:
            os.close(source)

    batch.BatchFolder._replace = in_place


def _without_journal() -> None:
    """The files of a form get their names with no way back."""
    from lwstwisted.stores import batch

    def nothing(*_: object) -> None:
        _took_effect()

    batch.BatchFolder._write_journal = nothing
    batch.BatchFolder._remove_journal = nothing


def _unlocked() -> None:
    """Nobody waits until another one is through with a name."""
    from lwstwisted.stores.tree import Tree

    def naming(tree: Tree, paths: object) -> AbstractContextManager[None]:
        _took_effect()
        return nullcontext()

    Tree.naming = naming


def _unlinked_before_named() -> None:
    """The bytes of an upload lose their own name before the record says that they have got another one."""
    from lwstwisted.stores.resumable import UploadFile, data_name
    from lwstwisted.stores.tree import UPLOAD_FOLDER

    real = UploadFile._note

    def note(upload: Any, state: Any, has_changed: bool = False) -> None:
        if sys._getframe(1).f_code.co_qualname == "UploadFile._end_as":
            with upload._tree.folder(UPLOAD_FOLDER) as folder:
                os.unlink(data_name(upload.id), dir_fd=folder)
            _took_effect()
        real(upload, state, has_changed)

    UploadFile._note = note


def _offset_after_sync() -> None:
    """An offset counts what was appended while the bytes were synced."""
    from lwstwisted.stores.resumable import UploadFile

    real = UploadFile._note

    def note(upload: Any, state: Any, has_changed: bool = False) -> None:
        if sys._getframe(1).f_code.co_qualname == "UploadFile.checkpoint" and state.offset != upload._end:
            _took_effect()
            state = replace(state, offset=upload._end)
        real(upload, state, has_changed)

    UploadFile._note = note


def _checkpoint_of_unproven() -> None:
    """Bytes that have to be proven count as they come."""
    from lwstwisted.uploads.appending import Appending

    real = Appending.append

    async def append(part: Any, data: memoryview) -> None:
        proof, part._proof = part._proof, None
        try:
            await real(part, data)
            if proof is not None and part._checkpoint is not None:
                _took_effect()
        finally:
            part._proof = proof

    Appending.append = append


def _anything_is_proven() -> None:
    """Nobody looks whether bytes are what their digest says."""
    from lwstwisted.stores import resumable

    class Believing(resumable.RunningDigests):
        def wrong(self) -> list[str]:
            _took_effect()
            return []

    resumable.RunningDigests = Believing


class _Instead:
    """A module with some of its functions replaced."""

    def __init__(self, module: Any, **functions: Any) -> None:
        self._module = module
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


OTHERS: dict[str, Callable[[], None]] = {
    "folder sync after link": _after_link,
    "folder sync after rename": _after_rename,
    "link overwrites": _link_overwrites,
    "write in place": _write_in_place,
    "batch link overwrites": _batch_link_overwrites,
    "batch writes in place": _batch_writes_in_place,
    "batch without journal": _without_journal,
    "names unlocked": _unlocked,
    "bytes unlinked before the record": _unlinked_before_named,
    "offset read after the sync": _offset_after_sync,
    "checkpoint of unproven bytes": _checkpoint_of_unproven,
    "nothing is proven": _anything_is_proven,
}


def _named(name: str) -> Sync:
    return next(sync for sync in syncs() if sync.name == name)


def names() -> list[str]:
    """All mutants that the load is able to notice."""
    return [sync.name for sync in syncs() if sync.name not in AFTER_KILL] + list(OTHERS)


def install(name: str) -> None:
    """Turn this process into a mutant."""
    if name in OTHERS:
        OTHERS[name]()
    else:
        _without(_named(name))


def environment(folder: Path, name: str, log: Path | None = None) -> dict[str, str]:
    """What a service needs in its environment to be a mutant, and to have many checkpoints.

    :param folder: for files; empty.
    :param name: "" for the store as it is.
    :param log: where its calls are noted (``tests/calllog.py``).
    """
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(f"from {__name__} import begin\nbegin()\n")
    found = {"PYTHONPATH": f"{folder}{os.pathsep}{TOP}", VARIABLE: name}
    return found if log is None else {**found, LOG_VARIABLE: str(log)}


def begin() -> None:
    """Become what the environment says."""
    # Only now: those who make mutants need no service.
    from lwstwisted.uploads import appending, transfer

    for module, name, value in ((appending, "CHECKPOINT", CHECKPOINT), (transfer, "WORTH_A_WRITE", WORTH_A_WRITE)):
        assert hasattr(module, name), f"{module.__name__} has no {name} any more"
        setattr(module, name, value)
    if LOG_VARIABLE in os.environ:
        calllog.install(Path(os.environ[LOG_VARIABLE]))
    if os.environ[VARIABLE]:
        install(os.environ[VARIABLE])
