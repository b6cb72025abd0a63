"""Integrity fields (RFC 9530): a client says what its bytes hash to, and a file with other bytes never gets a name.

``Content-Digest`` and ``Repr-Digest`` mean the same here: an upload has no content coding and is no part of anything.
``Content-MD5`` (RFC 1864) is obsolete, and old clients still send it; it is checked, and not kept.
"""

from __future__ import annotations

import hashlib
from base64 import b64decode
from binascii import Error as NotBase64
from collections.abc import Mapping, Sequence
from typing import Any, cast

import http_sf
from twisted.web.server import Request

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.interfaces import Digests

ALGORITHMS = {"sha-256": "sha256", "sha-512": "sha512"}
"""The active algorithms of the registry (RFC 9530 section 5), and what ``hashlib`` calls them."""

_MD5 = b"content-md5"
OF_CONTENT = (b"content-digest", _MD5)
"""Fields of what is in one message."""
OF_REPRESENTATION = (b"repr-digest",)
"""Fields of the whole file, however many messages it takes."""

_MD5_SIZE = 16
_WANTED = b"want-repr-digest"


def expected_digests(request: Request, fields: Sequence[bytes] = OF_CONTENT + OF_REPRESENTATION) -> dict[str, bytes]:
    """What the body of a request must hash to: digests by ``hashlib`` name.

    Algorithms that are not :data:`ALGORITHMS` are ignored, as RFC 9530 section 2 allows.

    :param fields: those that are looked at.
    :raises Refused: ``BAD_DIGEST`` for a field that can't be read, or two that contradict each other.
    """
    expected: dict[str, bytes] = {}
    for field in [field for field in fields if field != _MD5]:
        for name, digest in _dictionary(request.requestHeaders.getRawHeaders(field)).items():
            if name in ALGORITHMS:
                if not isinstance(digest, bytes) or len(digest) != hashlib.new(ALGORITHMS[name]).digest_size:
                    raise Refused(errors.BAD_DIGEST)
                if expected.setdefault(ALGORITHMS[name], digest) != digest:
                    raise Refused(errors.BAD_DIGEST)
    md5 = request.getHeader(_MD5) if _MD5 in fields else None
    if md5 is not None:
        try:
            expected["md5"] = b64decode(md5, validate=True)
        except NotBase64:
            raise Refused(errors.BAD_DIGEST) from None
        if len(expected["md5"]) != _MD5_SIZE:
            raise Refused(errors.BAD_DIGEST)
    return expected


def _dictionary(values: Sequence[bytes] | None) -> dict[str, object]:
    if values is None:
        return {}
    try:
        parsed = cast(dict[str, Any], http_sf.parse(b", ".join(values), tltype="dictionary"))
    except http_sf.StructuredFieldError:
        raise Refused(errors.BAD_DIGEST) from None
    return {name: member[0] for name, member in parsed.items()}


def repr_digest(request: Request, digests: Mapping[str, bytes], wanted_before: bytes = b"") -> bytes | None:
    """The value of ``Repr-Digest`` for an answer, if ``request`` wants one that we know.

    :param digests: of the file, by ``hashlib`` name.
    :param wanted_before: the ``Want-Repr-Digest`` of a request that began what this one goes on with.
    """
    for name in _wanted(request.requestHeaders.getRawHeaders(_WANTED) or [wanted_before]):
        if (digest := digests.get(ALGORITHMS[name])) is not None:
            return http_sf.ser({name: digest}).encode("ascii")
    return None


def wanted_digests(request: Request) -> Digests:
    """The digest of the file that a request likes best to hear in its answer, to be computed."""
    return {ALGORITHMS[name]: None for name in _wanted(request.requestHeaders.getRawHeaders(_WANTED))[:1]}


def _wanted(values: Sequence[bytes] | None) -> list[str]:
    """The algorithms of ``Want-Repr-Digest`` that we know, the best one first (RFC 9530 section 4)."""
    try:
        wanted = _dictionary(values)
    except Refused:
        return []  # a preference, and nothing that the client relies on
    weights = {name: weight for name, weight in wanted.items() if isinstance(weight, int) and weight > 0}
    return sorted(weights.keys() & ALGORITHMS.keys(), key=lambda name: (-weights[name], name))
