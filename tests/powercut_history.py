"""What the clients of a service know that loses its power, and what has to be there afterwards.

:class:`History` keeps what was sent, when, and what was acknowledged, and judges what is there after a cut. What else
than the state of a name has to be as it was told is a function in :data:`RULES`, by the kind of the operation. Nothing
here is a test.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from tests.powercut_recovery import FINISHED, UPLOAD, State, state_of

LAST = sys.maxsize
"""A position behind all others."""


@dataclass(eq=False)
class Operation:
    """Something that a client asked for.

    :ivar files: what it leaves: for each name the state.
    :ivar begun: before it was sent, in the common time of all clients.
    :ivar begun_at: before it was sent, as a position of the log.
    :ivar ended: after it was acknowledged; None if it never was.
    :ivar ended_at: likewise.
    :ivar is_new: whether the answer was that the name had not been there.
    :ivar upload: the resumable upload that it is about, as :func:`~tests.powercut_recovery.look` names it; "" if it is
        about none, or nobody was told yet which one.
    :ivar seed: of its bytes, for :func:`content_of`.
    :ivar first: how many of those bytes are in front of the upload's own, if it is a part of something.
    :ivar since: how many were sent before it.
    :ivar sent: how many of them may have been sent by now, by it and before it.
    :ivar is_proven: whether what it brings counts all together or not at all.
    :ivar offset: what it was told is stored of them; None if nothing was told.
    :ivar ends_itself: whether the upload that it begins is a file as soon as all bytes are there.
    :ivar parts: the uploads whose bytes make the one that it begins.
    """

    kind: str
    files: dict[str, State]
    begun: int = 0
    begun_at: int = 0
    ended: int | None = None
    ended_at: int | None = None
    is_new: bool = False
    upload: str = ""
    seed: str = ""
    first: int = 0
    since: int = 0
    sent: int = 0
    is_proven: bool = False
    offset: int | None = None
    ends_itself: bool = True
    parts: list[str] = field(default_factory=list)

    def may_leave(self, offset: int) -> bool:
        """Whether so many bytes of an upload may be there by what it brings."""
        return offset in (self.since, self.sent) or (not self.is_proven and self.since < offset < self.sent)

    def is_acknowledged(self, position: int) -> bool:
        return self.ended_at is not None and self.ended_at <= position

    def is_before(self, other: Operation) -> bool:
        return self.ended is not None and self.ended < other.begun


def content_of(seed: str, size: int) -> bytes:
    """The bytes of an upload from its beginning; more of them begin with the same ones."""
    # By whole blocks: how the generator makes bytes depends on how many there are.
    rng = random.Random(seed)
    return b"".join(rng.randbytes(_BLOCK) for _ in range(0, size, _BLOCK))[:size]


_BLOCK = 4096


@dataclass
class History:
    """All operations of a load.

    :ivar position: of the log, now; always 0 where there is none.
    """

    position: Callable[[], int] = lambda: 0
    operations: list[Operation] = field(default_factory=list)
    refused: int = 0
    problems: list[str] = field(default_factory=list)
    _time: Iterator[int] = field(default_factory=itertools.count)

    def begin(self, operation: Operation) -> None:
        """It is about to be sent."""
        operation.begun_at = self.position()
        operation.begun = next(self._time)
        self.operations.append(operation)

    def end(self, operation: Operation) -> None:
        """It was acknowledged."""
        operation.ended_at = self.position()
        operation.ended = next(self._time)

    def refuse(self, operation: Operation) -> None:
        """It was refused, so it must not leave anything."""
        self.refused += 1
        self.operations.remove(operation)

    def count(self, position: int = LAST) -> int:
        """Operations acknowledged before a position."""
        return sum(operation.is_acknowledged(position) for operation in self.operations)

    def go_on_from(self, found: Mapping[str, State]) -> None:
        """Forget all but what is there: the next load begins with it."""
        self.operations = []
        for name, state in found.items():
            operation = Operation("found", {name: state})
            self.begin(operation)
            self.end(operation)

    def judge(self, found: Mapping[str, State], position: int = LAST) -> list[str]:
        """What is wrong with the files that are there after a cut at a position of the log."""
        begun = [operation for operation in self.operations if operation.begun_at < position]
        by_name = _by_name(begun)
        problems = [
            f"nobody sent {name}"
            for name, state in found.items()
            if name not in by_name and not _is_unanswered(name, state, begun, found)
        ]
        for name, operations in by_name.items():
            if name in operations[0].files:
                problems += _judge_name(name, found.get(name), operations, position)
        for operation in begun:
            if operation.kind in RULES:
                problems += RULES[operation.kind](operation, found, by_name, position)
        return problems

    def judge_answers(self) -> list[str]:
        """Who has overwritten a file without having asked for that.

        He was told that a name is new, although another one had been told that there is a file; or two have replaced
        the one that both had seen.
        """
        matched = Counter(name for one in self.operations if one.kind == "match" and one.ended for name in one.files)
        twice = [name for name, count in matched.items() if count > 1]
        return [f"lost: {name}, which two have replaced, and both had seen the same file" for name in twice] + [
            f"lost: {name} was there, and then new for {later.kind}"
            for name, operations in _by_name(self.operations).items()
            for later in operations
            if later.is_new and name in later.files
            if any(_must_be_there(name, earlier, later, operations) for earlier in operations)
        ]


def _by_name(operations: Iterable[Operation]) -> dict[str, list[Operation]]:
    found: dict[str, list[Operation]] = {}
    for operation in operations:
        for name in (*operation.files, *filter(None, [operation.upload])):
            found.setdefault(name, []).append(operation)
    return found


def _must_be_there(name: str, earlier: Operation, later: Operation, operations: Iterable[Operation]) -> bool:
    """Whether ``later`` must have found what ``earlier`` left: nobody can have deleted it."""
    deletions = [operation for operation in operations if operation.files[name] is None]
    return (
        earlier.files[name] is not None
        and earlier.is_before(later)
        and all(deletion.is_before(earlier) or later.is_before(deletion) for deletion in deletions)
    )


def _judge_name(name: str, state: State, operations: list[Operation], position: int) -> list[str]:
    acknowledged = [operation for operation in operations if operation.is_acknowledged(position)]
    possible = {
        operation.files[name]
        for operation in operations
        if not any(operation.is_before(later) for later in acknowledged)
    }
    if not acknowledged:
        possible.add(None)
    claims = [operation for operation in acknowledged if operation.kind == "claim"]
    if len(claims) > 1:
        return [f"lost: {name}, which was created {len(claims)} times"]
    if claims:
        possible = {claims[0].files[name]}
    if state in possible:
        return []
    if state is None:
        return [f"lost: {name}, of {' or '.join(sorted({o.kind for o in acknowledged}))}"]
    if not any(operation.files[name] == state for operation in operations):
        return [f"torn: {name} has bytes that nobody sent"]
    return [f"lost: {name} has gone back to an older file"]


def _judge_form(
    form: Operation, found: Mapping[str, State], by_name: Mapping[str, list[Operation]], position: int
) -> list[str]:
    there = [name for name, state in form.files.items() if found.get(name) == state]
    if not there:
        return []
    return [
        f"torn: of a form with {len(form.files)} files {there[0]} is there and {name} is not"
        for name in form.files
        if _is_older(name, form, found, by_name)
    ]


def _is_older(
    name: str, operation: Operation, found: Mapping[str, State], by_name: Mapping[str, list[Operation]]
) -> bool:
    """Whether a name has what it had before an operation."""
    state = found.get(name)
    return all(cause.is_before(operation) for cause in by_name[name] if cause.files[name] == state)


# Uploads of several requests: "begin", then what brings bytes ("append"), tells of them ("ask", "told") or must not
# change them ("damaged", "left"), and the end: "finish", or "spoil" where the bytes are not what was said of them, or
# "cancel" at any time. The finish of a concatenation begins with it.


def _judge_upload(
    begin: Operation, found: Mapping[str, State], by_name: Mapping[str, list[Operation]], position: int
) -> list[str]:
    name = begin.upload
    if not name:
        return []  # what there is of it is judged by _is_unanswered
    operations, state = by_name[name], found.get(name)
    acknowledged = {operation.kind: operation for operation in operations if operation.is_acknowledged(position)}
    ends = {operation.kind: operation for operation in operations if operation.kind in ("finish", "spoil", "cancel")}
    finish = ends.get("finish")
    if "cancel" in acknowledged or "spoil" in acknowledged:
        return [] if state is None else [f"lost: the end of {name}, which was cancelled, or refused"]
    if state is None:
        may_be_gone = not acknowledged or "cancel" in ends or "spoil" in ends
        return [] if may_be_gone else [f"lost: {name}, of {' and '.join(sorted(acknowledged))}"]
    if state == FINISHED:
        if finish is None:
            return [f"torn: {name} is a file, and nobody has sent all of it"]
        lost = [file for file in finish.files if _is_older(file, finish, found, by_name)]
        return [f"lost: {file}, which {name} says it has become" for file in lost]
    if "finish" in acknowledged:
        return [f"lost: the end of {name}, which was finished"]
    offset = _offset(state)
    told = max((o.offset for o in operations if o.is_acknowledged(position) and o.offset is not None), default=0)
    if offset < told:
        return [f"lost: {name} has {offset} bytes of {told} that were acknowledged"]
    if not any(operation.may_leave(offset) for operation in operations) or not _is_content(state, begin):
        return [f"torn: {name} has {offset} bytes, and nobody sent them like that"]
    if begin.ends_itself and any(offset == end.sent for kind, end in ends.items() if kind != "cancel"):
        return [f"torn: {name} has all bytes and is no file"]
    if finish is not None and begin.parts and sum(_offset(found.get(part)) for part in begin.parts) == finish.sent:
        return [f"torn: {name} has all parts and is no file"]
    return []


def _offset(state: State) -> int:
    """The bytes of an upload that is no file."""
    return int(state.partition(" ")[0]) if state not in (None, FINISHED) else 0


def _is_content(state: State, begin: Operation) -> bool:
    """Whether an upload has the bytes that its client has for it."""
    offset = _offset(state)
    content = content_of(begin.seed, begin.first + offset)[begin.first :]
    return state == state_of(offset, hashlib.sha256(content).hexdigest())


def _is_unanswered(name: str, state: State, operations: Iterable[Operation], found: Mapping[str, State]) -> bool:
    """Whether it may be an upload of whose id nobody was told."""
    if not name.startswith(UPLOAD):
        return False
    unanswered = [operation for operation in operations if operation.seed and not operation.upload]
    if state == FINISHED:
        finished = [operation for operation in unanswered if operation.kind == "finish"]
        return any(found.get(file) is not None for operation in finished for file in operation.files)
    begun = [operation for operation in unanswered if operation.kind == "begin"]
    return any(operation.may_leave(_offset(state)) and _is_content(state, operation) for operation in begun)


Rule = Callable[[Operation, Mapping[str, State], Mapping[str, list[Operation]], int], list[str]]
RULES: dict[str, Rule] = {"form": _judge_form, "begin": _judge_upload}
"""For each kind of operation what is wrong, given all that was found, all operations by name, and the position."""
