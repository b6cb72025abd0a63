"""What a resumable upload is meant to be, and the record of that which is kept with it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lwstwisted.interfaces import Digests, Name, UploadState
from lwstwisted.uploads.conditions import Conditions


class Role(enum.Enum):
    """What an upload is for."""

    FILE = "file"
    PART = "part"
    CONCATENATION = "concatenation"


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
    """

    target: Name
    length: int | None = None
    conditions: Conditions = field(default_factory=Conditions)
    digests: Digests = field(default_factory=dict)
    role: Role = Role.FILE
    parts: tuple[str, ...] = ()
    said: Mapping[str, str] = field(default_factory=dict)
    ends_at_length: bool = True


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
    )
