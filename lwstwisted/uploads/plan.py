"""What a resumable upload is meant to be, whose it is, and the record of that which is kept with it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lwstwisted.access.rules import UNKNOWN, Action
from lwstwisted.access.visitor import ANYBODY, Visitor, replacing_nothing
from lwstwisted.hooks.events import Upload
from lwstwisted.interfaces import Check, Digests, Name, UploadState
from lwstwisted.uploads.conditions import Conditions
from lwstwisted.web.limits import MAX_LENGTH


class Role(enum.Enum):
    """What an upload is for."""

    FILE = "file"
    PART = "part"
    CONCATENATION = "concatenation"


class State(enum.Enum):
    """Where an upload is in the table of ``session.py``."""

    OPEN = enum.auto()
    WHOLE = enum.auto()
    NAMED = enum.auto()
    WAITING = enum.auto()


@dataclass(frozen=True, slots=True)
class Plan:
    """What an upload is meant to be. It is kept with it, as JSON.

    :ivar target: the file that it becomes; () for a part, and for what is to be named by its id.
    :ivar length: bytes; None if nobody knows yet.
    :ivar conditions: those of the request that began it, which hold when it gets its name.
    :ivar digests: of the file, which it has to have, or which are to be computed.
    :ivar role: what it is for.
    :ivar parts: ids of what is concatenated.
    :ivar said: fields of the request that began it, to be repeated by HEAD.
    :ivar ends_at_length: whether it is finished as soon as all bytes are there, and nobody has to say so.
    :ivar owner: whose it is (``access/visitor.py``).
    :ivar max_size: bytes that its owner may put there.
    :ivar may_replace: whether it may replace a file.
    :ivar metadata: what an application is told of it (``hooks/events.py``).
    """

    target: Name
    length: int | None = None
    conditions: Conditions = field(default_factory=Conditions)
    digests: Digests = field(default_factory=dict)
    role: Role = Role.FILE
    parts: tuple[str, ...] = ()
    said: Mapping[str, str] = field(default_factory=dict)
    ends_at_length: bool = True
    owner: str = ""
    max_size: int = MAX_LENGTH
    may_replace: bool = True
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def check(self) -> Check:
        """What has to hold for the file that it becomes."""
        return self.conditions.check if self.may_replace else replacing_nothing(self.conditions.check)

    def owned_by(self, visitor: Visitor) -> Plan:
        """The same as one of a visitor's.

        :raises Refused: if they may not have it.
        """
        if visitor is ANYBODY:
            return self
        target = self.target or (UNKNOWN,)
        if self.role is Role.PART:
            visitor.require_some(Action.PUT, ())
        else:
            visitor.require(Action.PUT, target)
        may_replace = visitor.may_replace(target)
        return replace(self, owner=visitor.owner, max_size=visitor.max_size, may_replace=may_replace)

    def told(self, id: str, offset: int, length: int | None, at: Name | None) -> Upload:
        """The upload as an application is told of it.

        :param at: where its bytes are.
        """
        return Upload(id, length, offset, self.metadata, self.role is Role.PART, self.parts, at)

    def is_of(self, visitor: Visitor) -> bool:
        """Whether it is a visitor's, or nobody asks."""
        return visitor is ANYBODY or self.owner == visitor.owner


def record_of(plan: Plan) -> dict[str, Any]:
    """A plan as a store keeps it."""
    return {
        "target": plan.target,
        "conditions": dict(plan.conditions.fields),
        "digests": {name: None if digest is None else digest.hex() for name, digest in plan.digests.items()},
        "role": plan.role.value,
        "parts": plan.parts,
        "said": dict(plan.said),
        "ends_at_length": plan.ends_at_length,
        "owner": plan.owner,
        "max_size": plan.max_size,
        "may_replace": plan.may_replace,
        "metadata": dict(plan.metadata),
    }


def plan_of(state: UploadState) -> Plan:
    """The plan of an upload."""
    record = state.record
    return Plan(
        target=tuple(record["target"]),
        length=state.length,
        conditions=Conditions(record["conditions"]),
        digests={name: None if text is None else bytes.fromhex(text) for name, text in record["digests"].items()},
        role=Role(record["role"]),
        parts=tuple(record["parts"]),
        said=record["said"],
        ends_at_length=record["ends_at_length"],
        # What was begun before anybody asked for these has none of them.
        owner=record.get("owner", ""),
        max_size=record.get("max_size", MAX_LENGTH),
        may_replace=record.get("may_replace", True),
        metadata=record.get("metadata", {}),
    )
