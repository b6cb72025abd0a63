"""Signed URLs: who has one may do what it says, and needs no name here.

Whoever has a key makes them (``lwstwisted sign``, or a program of their own, by this recipe) and hands them to somebody
who has none: *this path, these methods, at most so many bytes, of this type, until then*. The query of such a URL::

    path       a file (/files/a/b), or a folder and all beneath (/files/a/)
    methods    some of DELETE, GET, POST, PUT, with commas; HEAD comes with GET
    max-size   bytes of a file at most; empty for no limit of its own
    type       the Content-Type that the file has to be sent with; empty for any
    overwrite  1 if a file may be replaced, else empty
    expires    seconds since the epoch
    key        which key it is signed with
    signature  HMAC-SHA-256 in hex, by that key, over the text below in UTF-8

The text is ``lwstwisted-signed-url-1`` and the values of the first seven in the order above, each with a line feed at
its end. None of them can have one in it. What isn't in a query counts as empty, so nothing can be left out unnoticed;
and what is there twice is refused.

**Resumable uploads.** The query works at ``/uploads/`` too (POST), for the same files. The ``Location`` of the answer
has it as well, so a client that goes on there has what lets it: an id of 128 random bits, and the same query behind
it. The upload belongs to this one signature, and to no other one, of whichever key. Until *expires* uploads can be
begun; one that was is continued for as long as uploads are kept, or a link of an hour would be too short for a film on
a slow line. Whoever takes the key away ends that as well.

**A secret in a URL** ends up in logs. Ours have the query without its signature.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from urllib.parse import quote, unquote_to_bytes

from lwstwisted import errors
from lwstwisted.access.rules import FILES, Name
from lwstwisted.errors import Refused
from lwstwisted.stores.names import parse_name

SIGNATURE = "signature"
_FIELDS = ("path", "methods", "max-size", "type", "overwrite", "expires", "key")
_VERSION = "lwstwisted-signed-url-1"

METHODS = ("DELETE", "GET", "POST", "PUT")

LEAST_KEY = 32
"""Bytes of a key: those of the hash (RFC 2104 section 3)."""

_KEY_LINE = re.compile(r"([0-9A-Za-z._-]{1,64}):((?:[0-9a-fA-F]{2})+)")
_NUMBER = re.compile(r"[0-9]{1,18}")
_TYPE = re.compile(r"[0-9a-z!#$&^_.+-]{1,127}/[0-9a-z!#$&^_.+-]{1,127}")

Keys = Mapping[str, bytes]


def parse_keys(text: str) -> dict[str, bytes]:
    """Read a file of keys: lines of ``ID:SECRET``, the secret in hex. The first one signs, and all are believed.

    :raises ValueError: with the number of the line.
    """
    found: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _KEY_LINE.fullmatch(line.strip())
        if match is None or len(match[2]) < 2 * LEAST_KEY:
            raise ValueError(f"line {number}: a key is ID:SECRET, the secret {LEAST_KEY} bytes or more in hex")
        if match[1] in found:
            raise ValueError(f"line {number}: there is another key with this id")
        found[match[1]] = bytes.fromhex(match[2])
    if not found:
        raise ValueError("there is no key in it; one is made by: echo \"k1:$(openssl rand -hex 32)\"")
    return found


@dataclass(frozen=True, slots=True)
class Grant:
    """What a signed URL allows.

    :ivar path: segments below ``/files/``.
    :ivar is_folder: whether everything beneath is meant.
    :ivar methods: of HTTP, sorted.
    :ivar expires: seconds since the epoch.
    :ivar max_size: bytes, or None.
    :ivar content_type: in lower case; "" for any.
    :ivar may_replace: whether it may replace a file.
    """

    path: Name
    is_folder: bool
    methods: tuple[str, ...]
    expires: int
    max_size: int | None = None
    content_type: str = ""
    may_replace: bool = False

    def query(self, key_id: str, key: bytes) -> str:
        """The query of a URL, signed."""
        fields = _fields_of(self, key_id)
        said = [f"{name}={quote(fields[name], safe='/,.')}" for name in _FIELDS if fields[name]]
        return "&".join([*said, f"{SIGNATURE}={_signature(fields, key)}"])

    def covers(self, name: Name) -> bool:
        """Whether a file or folder is meant."""
        return name[: len(self.path)] == self.path if self.is_folder else name == self.path


def make_grant(
    path: str,
    methods: Sequence[str],
    expires: int,
    max_size: int | None = None,
    content_type: str = "",
    may_replace: bool = False,
) -> Grant:
    """Check what is to be signed.

    :param path: as in a URL, percent-encoded; one that ends with a slash means all beneath.
    :raises ValueError: with a sentence that says what is wrong.
    """
    grant = _grant_of(
        {
            "path": unquote_to_bytes(path).decode(),
            "methods": ",".join(sorted({method.upper() for method in methods})),
            "max-size": "" if max_size is None else str(max_size),
            "type": content_type.lower(),
            "overwrite": "1" if may_replace else "",
            "expires": str(expires),
        }
    )
    if grant is None:
        raise ValueError(
            f"a signed URL has a path below /{FILES}/, some of the methods {', '.join(METHODS)}, a time, and maybe"
            " a number of bytes and a media type"
        )
    return grant


def url_of(grant: Grant, key_id: str, key: bytes, public_url: str = "") -> str:
    """A signed URL: of the file or folder, or of ``/uploads/`` if a file is to be uploaded by POST.

    :param public_url: what stands in front of our paths; without it the URL is a path.
    """
    path = _fields_of(grant, key_id)["path"]
    if grant.methods == ("POST",) and not grant.is_folder:
        path = "/uploads/"
    return f"{public_url.rstrip('/')}{quote(path, safe='/')}?{grant.query(key_id, key)}"


@dataclass(frozen=True, slots=True)
class Signed:
    """A signature that fits.

    :ivar grant: what it allows.
    :ivar identity: what tells it from all others; it isn't secret.
    :ivar query: that of the URL, as it is handed on.
    """

    grant: Grant
    identity: str
    query: str


def is_signed(args: Mapping[bytes, Sequence[bytes]]) -> bool:
    """Whether the query of a request has a signature."""
    return SIGNATURE.encode() in args


def verify(args: Mapping[bytes, Sequence[bytes]], keys: Keys) -> Signed:
    """Look whether a signature fits.

    :param args: the query, decoded; what is not of the signature is of somebody else's.
    :raises Refused: ``BAD_SIGNATURE``, which says nothing else before it fits.
    """
    try:
        fields = {name: _one(args.get(name.encode(), (b"",))) for name in _FIELDS}
        said = _one(args[SIGNATURE.encode()])
    except ValueError:
        raise Refused(errors.BAD_SIGNATURE) from None
    key = keys.get(fields["key"])
    right = _signature(fields, key if key is not None else bytes(LEAST_KEY))
    is_right = hmac.compare_digest(right.encode(), said.encode("utf-8", "replace"))
    grant = _grant_of(fields)
    # What could be written in another way would have another signature, and be another creator of uploads.
    if not is_right or key is None or grant is None or _fields_of(grant, fields["key"]) != fields:
        raise Refused(errors.BAD_SIGNATURE)
    return Signed(grant, sha256(said.encode()).hexdigest()[:32], grant.query(fields["key"], key))


def without_signature(uri: bytes) -> bytes:
    """A URI that may be logged."""
    return re.sub(rb"([?&]signature=)[^&#]*", rb"\1-", uri)


def _signature(fields: Mapping[str, str], key: bytes) -> str:
    text = "".join(f"{value}\n" for value in (_VERSION, *(fields[name] for name in _FIELDS)))
    return hmac.digest(key, text.encode(), "sha256").hex()


def _fields_of(grant: Grant, key_id: str) -> dict[str, str]:
    return {
        "path": "/".join(["", FILES, *grant.path, *([""] if grant.is_folder else [])]),
        "methods": ",".join(grant.methods),
        "max-size": "" if grant.max_size is None else str(grant.max_size),
        "type": grant.content_type,
        "overwrite": "1" if grant.may_replace else "",
        "expires": str(grant.expires),
        "key": key_id,
    }


def _grant_of(fields: Mapping[str, str]) -> Grant | None:
    """What the fields of a query mean; None if nothing."""
    segments = fields["path"].split("/")
    is_folder = segments[-1] == ""
    try:
        if segments[:2] != ["", FILES] or len(segments) < 3:
            return None
        path = parse_name([segment.encode() for segment in (segments[2:-1] if is_folder else segments[2:])])
    except (Refused, ValueError):
        return None
    methods = tuple(fields["methods"].split(","))
    numbers = [fields["expires"], *([fields["max-size"]] if fields["max-size"] else [])]
    if not all(_NUMBER.fullmatch(number) for number in numbers) or not set(methods) <= set(METHODS):
        return None
    if fields["overwrite"] not in ("", "1") or not _TYPE.fullmatch(fields["type"] or "a/b"):
        return None
    size = int(fields["max-size"]) if fields["max-size"] else None
    return Grant(path, is_folder, methods, int(fields["expires"]), size, fields["type"], bool(fields["overwrite"]))


def _one(values: Sequence[bytes]) -> str:
    if len(values) != 1 or b"\n" in values[0]:
        raise ValueError
    return values[0].decode()
