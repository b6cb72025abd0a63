"""Starts a store on what a power cut has left, asks for each upload as its client would, and tells what is there then.

This happens in a process of its own, :class:`Recovery`: so a store that is a mutant under load is the same one
afterwards. Nothing here is a test.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.interfaces import UploadState
from lwstwisted.stores import record, waiting
from lwstwisted.stores.local import LocalStore
from lwstwisted.stores.tree import Tree
from lwstwisted.uploads.session import Sessions
from tests import calllog
from tests.powercut_mutants import TOOK_EFFECT, environment

TOP = Path(__file__).parent.parent

PATIENCE = 30.0
_TICK = 0.05

State = str | None
"""What a name has: the digest of a file, or no file; what an upload has: :func:`state_of`, or :data:`FINISHED`."""
FINISHED = "finished"
"""It has become a file."""

UPLOAD = "upload/"
"""In front of the id of an upload: no file is named like that."""


def state_of(offset: int, digest: str) -> str:
    """What an upload has of which so many bytes are stored."""
    return f"{offset} {digest}"


def look(root: Path) -> tuple[dict[str, State], list[str]]:
    """All files that are visible, and what is wrong with the store's own folders."""
    found: dict[str, State] = {}
    problems = []
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if path.is_dir():
            continue
        if not name.startswith(".lwstwisted/"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for kind in ("partial", "batches"):
        problems += [f"left over: {kind}/{name}" for name in os.listdir(root / ".lwstwisted" / kind)]
    tree = Tree(root, "full", use_tmpfile=True, sweep=False)
    try:
        problems += [f"left over: {os.fsdecode(name)} without a record" for name in waiting.orphans(tree)]
        for id in waiting.ids(tree):
            found[UPLOAD + id.decode()], more = _look_at_upload(tree, root, id)
            problems += more
    finally:
        tree.close()
    return found, problems


def _look_at_upload(tree: Tree, root: Path, id: bytes) -> tuple[State, list[str]]:
    """What the store says of an upload, with the bytes that are really there."""
    data = root / ".lwstwisted" / "uploads" / f"{id.decode()}.data"
    try:
        state = waiting.look(tree, id)
    except Refused as refused:
        return None, [f"left over: {id.decode()}, {refused.refusal.code}"]
    if state.named is not None:
        return FINISHED, [f"left over: the bytes of {id.decode()}, which is a file"] if data.exists() else []
    content = data.read_bytes()
    problems = [] if len(content) == state.offset else [f"left over: bytes behind the {state.offset} of {id.decode()}"]
    return state_of(state.offset, hashlib.sha256(content[: state.offset]).hexdigest()), problems


class _Reactor(MemoryReactorClock):  # type: ignore[misc]
    """Has the results of threads."""

    def __init__(self) -> None:
        super().__init__()
        self._results: SimpleQueue[Callable[[], object]] = SimpleQueue()

    def callFromThread(self, call: Callable[..., Any], *args: Any, **more: Any) -> None:
        self._results.put(lambda: call(*args, **more))

    def complete(self, work: Coroutine[Any, Any, object]) -> None:
        """Wait until it is done."""
        outcome: list[object] = []
        done = Deferred.fromCoroutine(work)
        done.addBoth(outcome.append)
        waited = 0.0
        while not outcome:
            try:
                self._results.get(timeout=_TICK)()
            except Empty:
                waited += _TICK
                assert waited < PATIENCE, "the store hangs"
                self.advance(_TICK)  # who waits for a service that is running asks again
        if isinstance(outcome[0], Failure):
            outcome[0].raiseException()


def recover(root: Path) -> None:
    """Start a store, ask for all uploads, and end it."""
    reactor = _Reactor()
    store = LocalStore(root, reactor)
    try:
        reactor.complete(_ask_for_all(store, reactor))
    finally:
        reactor.complete(store.stop())


async def _ask_for_all(store: LocalStore, reactor: _Reactor) -> None:
    """Clients come back: whatever upload has all of its bytes becomes a file now."""
    sessions = Sessions(store, reactor=reactor)
    await store.sweep_uploads()
    for id in await store.list_uploads():
        try:
            async with sessions.opened(id):
                pass
        except Refused as refused:
            # It is gone, now at the latest; whether it may be is for the judge to say.
            if refused.refusal not in (errors.UPLOAD_NOT_FOUND, errors.DIGEST_MISMATCH):
                raise
    sessions.stop()


def is_interrupted(root: Path) -> bool:
    """Whether a store has something to take back there, or to finish."""
    if any(root.glob(".lwstwisted/batches/*/journal")):
        return True
    return any(_becomes_file(path) for path in root.glob(f".lwstwisted/uploads/{'[0-9a-f]' * 32}"))


def _becomes_file(path: Path) -> bool:
    """Whether an upload does so when a store starts, or when it is asked for then."""
    state = _state(path)
    if state is None or state.named is not None or state.record["role"] == "part":
        return False
    data = path.with_suffix(".data")
    if data.exists() and data.stat().st_nlink > 1:
        return True
    if state.record["role"] == "concatenation" and state.offset != state.length:
        parts = [_state(path.with_name(part)) for part in state.record["parts"]]
        return all(part is not None and part.offset == part.length for part in parts)
    return state.offset == state.length and bool(state.record["ends_at_length"])


def _state(path: Path) -> UploadState | None:
    """What the record of an upload says, if there is one that says anything."""
    with suppress(FileNotFoundError, Refused), open(path, "rb") as file:
        return record.read(file.fileno())[0]
    return None


class Recovery:
    """Processes that start stores, one after another.

    :ivar took_effect: whether a mutant lacked what it was without.
    """

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self.took_effect = False
        self._idle: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
        for process in processes:
            self._idle.put(process)

    def __call__(self, root: Path, log: Path | None = None) -> tuple[dict[str, State], list[str]]:
        """Start a store, and look at what is there.

        :param log: where the calls of the start are noted.
        """
        process = self._idle.get()
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps([str(root), log and str(log)]) + "\n")
            process.stdin.flush()
            told = process.stdout.readline()
            if told.strip() == TOOK_EFFECT:
                self.took_effect = True
                told = process.stdout.readline()
        finally:
            self._idle.put(process)
        found, problems = json.loads(told)
        return found, problems


@contextmanager
def recovering(mutant: str, folder: Path, processes: int) -> Iterator[Recovery]:
    """Have some such processes until the end of the block.

    :param mutant: or "".
    :param folder: for files of the mutant.
    """
    extra = environment(folder / "site", mutant) if mutant else {}
    started: list[subprocess.Popen[str]] = []
    try:
        for _ in range(processes):
            process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                cwd=TOP,
                env={**os.environ, **extra},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            started.append(process)
        yield Recovery(started)
    finally:
        for process in started:
            process.kill()
            process.communicate()


def main() -> None:
    """Answer each line with what is there and what is wrong."""
    for line in sys.stdin:
        root, log = json.loads(line)
        calls = calllog.install(Path(log)) if log else None
        try:
            recover(Path(root))
        except Exception as error:
            answer: object = [{}, [f"the store doesn't start: {error!r}"]]
        else:
            answer = None
        finally:
            if calls is not None:
                calllog.uninstall(calls)
        print(json.dumps(answer or look(Path(root))), flush=True)


if __name__ == "__main__":
    main()
