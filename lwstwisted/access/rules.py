"""Rules: who may do what where.

A rule allows, and none forbids: what no rule allows is refused. So their order means nothing, and who reads one of them
knows what it does whatever the others say. On a command line one is written ``WHO:ACTIONS:PATH``::

    alice,bob:put,get,list:/files/team/**
    @staff:put,get,list,delete,overwrite:/files/**
    any-user:put,get,list,overwrite:/files/home/{user}/**
    anonymous:put:/files/inbox/*

**Who**: names of users, ``@GROUP``, ``any-user`` for everybody who has said who they are, ``anonymous`` for everybody.

**Actions**: ``put`` stores a file under a name that is free, ``overwrite`` lets it replace one (and means nothing
without ``put``), ``get`` reads files, ``list`` reads folders, ``delete`` removes files.

**Path**: segments of a path below ``/files/``, as they are, not percent-encoded. ``*`` is any one segment, ``{user}``
the one that is the user's own name, and ``**`` at the end everything beneath, with the folder in front of it. A name
that would be no segment (``a/b``, ``..``) is never equal to one, so it opens nothing.

Pure; names are those of ``stores/names.py``, so they are compared as they will be used.
"""

from __future__ import annotations

import enum
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

Name = tuple[str, ...]

FILES = "files"
"""The first segment of each path."""

ANONYMOUS = "anonymous"
ANY_USER = "any-user"
_GROUP = "@"

UNKNOWN = "\0"
"""A segment that nobody knows yet: no name has it, so only what allows every name allows it."""

_ANY = "*"
_ALL = "**"
_USER = "{user}"


class Action(enum.Enum):
    """What a rule may allow."""

    PUT = "put"
    GET = "get"
    LIST = "list"
    DELETE = "delete"
    OVERWRITE = "overwrite"


@dataclass(frozen=True, slots=True)
class Rule:
    """What somebody may do somewhere. :func:`parse_rule` makes it.

    :ivar actions: what is allowed.
    :ivar path: the segments, ``**`` not among them.
    :ivar is_deep: whether all beneath is meant as well.
    :ivar users: by name.
    :ivar groups: by name, without the ``@``.
    :ivar is_for_users: whether it holds for each user.
    :ivar is_for_all: whether it holds for who hasn't said who they are, too.
    """

    actions: frozenset[Action]
    path: Name
    is_deep: bool
    # Apart from each other: a user who is called "@staff" or "anonymous" is none of these.
    users: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()
    is_for_users: bool = False
    is_for_all: bool = False

    def is_for(self, user: str, groups: Collection[str]) -> bool:
        """Whether it is about somebody.

        :param user: "" for nobody known.
        :param groups: the user's.
        """
        if self.is_for_all:
            return True
        return bool(user) and (self.is_for_users or user in self.users or not self.groups.isdisjoint(groups))

    def covers(self, name: Name, user: str) -> bool:
        """Whether it is about a file or folder."""
        if len(name) != len(self.path) and not (self.is_deep and len(name) > len(self.path)):
            return False
        return all(_fits(pattern, segment, user) for pattern, segment in zip(self.path, name, strict=False))

    def reaches_into(self, folder: Name, user: str) -> bool:
        """Whether it is about any file that may lie right in a folder."""
        depth = len(folder) + 1
        if depth != len(self.path) and not (self.is_deep and depth > len(self.path)):
            return False
        return all(_fits(pattern, segment, user) for pattern, segment in zip(self.path, folder, strict=False))

    def reaches_beneath(self, folder: Name, user: str) -> bool:
        """Whether it is about anything that may lie in a folder, or deeper."""
        if not self.is_deep and len(folder) >= len(self.path):
            return False
        return all(_fits(pattern, segment, user) for pattern, segment in zip(self.path, folder, strict=False))


def _fits(pattern: str, segment: str, user: str) -> bool:
    if pattern == _ANY:
        return True
    # Compared with the name, which is nowhere read as a pattern.
    return bool(user) and segment == user if pattern == _USER else segment == pattern


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules together.

    :ivar rules: each allows something.
    :ivar groups: the users in each group.
    """

    rules: tuple[Rule, ...]
    groups: Mapping[str, Collection[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """:raises ValueError: for a group that nobody has defined."""
        for group in sorted({group for rule in self.rules for group in rule.groups} - self.groups.keys()):
            raise ValueError(f"@{group} is used in a rule, and who is in it is not said")

    def of(self, user: str) -> Allowed:
        """What somebody may do; "" for nobody known."""
        groups = [group for group, users in self.groups.items() if user in users]
        return Allowed(user, tuple([rule for rule in self.rules if rule.is_for(user, groups)]))


@dataclass(frozen=True, slots=True)
class Allowed:
    """What one user may do: the union of the rules that are about them."""

    user: str
    rules: tuple[Rule, ...]

    def may(self, action: Action, name: Name) -> bool:
        """Whether something is allowed to be done to a file or folder."""
        return any(action in rule.actions and rule.covers(name, self.user) for rule in self.rules)

    def may_in(self, action: Action, folder: Name) -> bool:
        """Whether it is allowed for any file that may lie right in a folder."""
        return any(action in rule.actions and rule.reaches_into(folder, self.user) for rule in self.rules)

    def may_beneath(self, action: Action, folder: Name) -> bool:
        """Whether it is allowed for anything that may lie beneath a folder."""
        return any(action in rule.actions and rule.reaches_beneath(folder, self.user) for rule in self.rules)


def parse_rule(text: str) -> Rule:
    """Read a rule in the notation of the command line.

    :raises ValueError: with a sentence that says what is wrong.
    """
    who, colon, rest = text.partition(":")
    actions, second, path = rest.partition(":")
    if not colon or not second:
        raise ValueError(f"{text!r}: a rule is WHO:ACTIONS:PATH, such as alice,bob:put,get,list:/files/team/**")
    return make_rule(who.split(","), actions.split(","), path)


def make_rule(who: Iterable[str], actions: Iterable[str], path: str) -> Rule:
    """Make a rule.

    :param who: names, ``@GROUP``, ``any-user``, ``anonymous``.
    :param actions: their names.
    :param path: a pattern.
    :raises ValueError: with a sentence that says what is wrong.
    """
    whos = [unicodedata.normalize("NFC", one.strip()) for one in who]
    if not whos or not all(one.removeprefix(_GROUP) for one in whos):
        raise ValueError("a rule is for somebody: names of users, @GROUP, any-user or anonymous")
    segments, is_deep = _parse_path(unicodedata.normalize("NFC", path))
    special = {ANONYMOUS, ANY_USER}
    rule = Rule(
        frozenset(_parse_action(action.strip()) for action in actions),
        segments,
        is_deep,
        users=frozenset(one for one in whos if one not in special and not one.startswith(_GROUP)),
        groups=frozenset(one.removeprefix(_GROUP) for one in whos if one.startswith(_GROUP)),
        is_for_users=ANY_USER in whos,
        is_for_all=ANONYMOUS in whos,
    )
    if Action.OVERWRITE in rule.actions and Action.PUT not in rule.actions:
        raise ValueError("who may overwrite has to be allowed to put as well")
    return rule


def _parse_action(text: str) -> Action:
    try:
        return Action(text)
    except ValueError:
        raise ValueError(f"{text!r} is no action; those are {', '.join(one.value for one in Action)}") from None


def _parse_path(path: str) -> tuple[Name, bool]:
    first, *segments = path.removeprefix("/").split("/")
    if not path.startswith("/") or first != FILES or not segments:
        raise ValueError(f"{path!r}: the path of a rule begins with /{FILES}/")
    is_deep = segments[-1] == _ALL
    if is_deep or segments[-1] == "":  # a folder may be written with its slash
        segments.pop()
    for segment in segments:
        if segment in ("", ".", "..") or _ALL in segment:
            raise ValueError(f"{path!r}: '**' is only at the end of a path, and no segment is empty, '.' or '..'")
        if segment not in (_ANY, _USER) and any(sign in segment for sign in (_ANY, "{", "}")):
            raise ValueError(f"{path!r}: '*' and '{{user}}' stand for whole segments")
    return tuple(segments), is_deep
