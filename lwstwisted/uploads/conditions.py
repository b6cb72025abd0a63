"""Conditional requests (RFC 9110 section 13): what a client believes of a file, compared with what is there.

They are read from the head once. A store asks :meth:`Conditions.check` before the body, and again in the moment in
which a name changes hands, from a thread of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import NoReturn

from twisted.web.server import Request

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.interfaces import Found

_ENTITY_TAG = re.compile(rb'[ \t]*(W/)?("[\x21\x23-\x7e\x80-\xff]*")[ \t]*(?:,|$)')
_RANGE = re.compile(rb"[ \t]*(?:([0-9]{1,99})-([0-9]{0,99})|-([0-9]{1,99}))[ \t]*")
_RANGES = 100
"""Ranges of one request; who asks for more gets the whole file, which is less than they may add up to."""
_READS = (b"GET", b"HEAD")
_FIELDS = (b"if-match", b"if-none-match", b"if-unmodified-since", b"if-modified-since")


class NotModified(Exception):
    """The client has what is there already: 304."""


class Conditions:
    """The conditions of one request.

    :param fields: its conditional fields, by their names in lower case.
    :param is_read: whether it is a GET or HEAD, which may be answered by 304.
    :raises Refused: ``BAD_CONDITION`` for a field that means nothing: a client that sends one relies on it.
    :ivar fields: those that are there.
    """

    def __init__(self, fields: Mapping[str, str] = MappingProxyType({}), is_read: bool = False) -> None:
        self.fields = fields
        self._is_read = is_read
        self._match = _entity_tags(fields.get("if-match"))
        self._none_match = _entity_tags(fields.get("if-none-match"))
        self._unmodified_since = None if self._match is not None else _date(fields.get("if-unmodified-since"))
        self._modified_since = None
        if is_read and self._none_match is None:
            self._modified_since = _date(fields.get("if-modified-since"))

    @classmethod
    def of(cls, request: Request) -> Conditions:
        """The conditions of ``request``."""
        said = ((name, request.requestHeaders.getRawHeaders(name)) for name in _FIELDS)
        fields = {name.decode(): b",".join(values).decode("latin-1") for name, values in said if values is not None}
        return cls(fields, request.method in _READS)

    def check(self, found: Found | None) -> None:
        """Compare, in the order of RFC 9110 section 13.2.2.

        :param found: what has the name at the moment, or None.
        :raises Refused: ``PRECONDITION_FAILED``.
        :raises NotModified: if nothing has to be sent.
        """
        if self._match is not None and not _matches(self._match, found, is_strong=True):
            self._fail()
        if self._unmodified_since is not None and (found is None or int(found.modified) > self._unmodified_since):
            self._fail()
        if self._none_match is not None and _matches(self._none_match, found, is_strong=False):
            if self._is_read:
                raise NotModified
            self._fail()
        if self._modified_since is not None and found is not None and int(found.modified) <= self._modified_since:
            raise NotModified

    def _fail(self) -> NoReturn:
        raise Refused(errors.PRECONDITION_FAILED)


def is_range_wanted(request: Request, found: Found) -> bool:
    """Whether a part of the file makes sense to the client (RFC 9110 section 13.1.5: If-Range)."""
    value = request.getHeader(b"if-range")
    if value is None:
        return True
    if value.strip().startswith((b'"', b"W/")):
        return value.strip() == found.etag.encode()
    return _date(value.decode("latin-1")) == int(found.modified)


def satisfiable_range(value: bytes, size: int) -> bytes | None:
    """A Range field (RFC 9110 section 14.1.2) without what is not in the file.

    ``twisted.web.static`` fails where a suffix is longer than the file, and where several ranges are behind its end.

    :param size: bytes of the file.
    :returns: None for a field that is to be ignored; a range behind the end where no byte is in the file.
    """
    unit, _, ranges = value.partition(b"=")
    if unit.strip().lower() != b"bytes" or ranges.count(b",") >= _RANGES:
        return None
    found = []
    for match in map(_RANGE.fullmatch, ranges.split(b",")):
        if match is None:
            return None
        first, last = (int(match[1]), int(match[2] or size)) if match[1] else (max(0, size - int(match[3])), size)
        if match[2] and last < first:
            return None
        if first < size:
            found.append(b"%d-%d" % (first, min(last, size - 1)))
    return b"bytes=" + (b",".join(found) or b"%d-" % size)


def _matches(tags: list[tuple[bool, bytes]], found: Found | None, is_strong: bool) -> bool:
    if found is None:
        return False
    tag = found.etag.encode()
    return any(value == b"*" or (value == tag and not (is_weak and is_strong)) for is_weak, value in tags)


def _entity_tags(value: str | None) -> list[tuple[bool, bytes]] | None:
    """The tags of a field, weak or not; None where it isn't there."""
    if value is None:
        return None
    if value.strip() == "*":
        return [(False, b"*")]
    return list(_each_tag(value.encode("latin-1")))


def _each_tag(value: bytes) -> Iterator[tuple[bool, bytes]]:
    at = 0
    while at < len(value):
        match = _ENTITY_TAG.match(value, at)
        if match is None:
            raise Refused(errors.BAD_CONDITION)
        yield match[1] is not None, match[2]
        at = match.end()


def _date(value: str | None) -> int | None:
    """Seconds since the epoch; None where the field isn't there or no date, which RFC 9110 wants ignored."""
    if value is None:
        return None
    try:
        date = parsedate_to_datetime(value)
    except (OverflowError, ValueError):
        return None
    # Without a zone it is asctime's form, which means UTC here (RFC 9110 section 5.6.7).
    return int((date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp())
