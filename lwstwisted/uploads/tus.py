"""tus 1.0 (https://tus.io/protocols/resumable-upload), with all of its extensions, over :class:`Sessions`.

======================  ==========================================================================================
``POST   /uploads/``    begins an upload, a part of one, or the concatenation of parts; may bring its first bytes
``HEAD   /uploads/ID``  tells its offset
``PATCH  /uploads/ID``  appends; with the last byte it becomes a file
``DELETE /uploads/ID``  cancels it; a file that it has become stays
======================  ==========================================================================================

The text leaves open what becomes of an upload that is whole. Here it is a file of the root folder, named as its
metadata says (``filename``, or else ``name``), or by its id; ``Content-Location`` and ``ETag`` of the last answer tell
of it. If the file may not be (its name is a folder's, the conditions of the creation don't hold any more, its
bytes are not what ``Repr-Digest`` said), the last PATCH and each HEAD are refused with that: a client must not take
an offset for a success.

A checksum in a trailer should be announced by ``Trailer: Upload-Checksum``: only then are the bytes in front of it kept
back, while those of any other request count as they come: if some do and are wrong, the upload is over.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from twisted.web.http import CREATED, NO_CONTENT, OK, datetimeToString
from twisted.web.server import Request

from lwstwisted import errors
from lwstwisted.access.visitor import ANYBODY, Visitor
from lwstwisted.errors import Refusal, Refused
from lwstwisted.hooks.events import NO_WISHES, Answer
from lwstwisted.interfaces import IRequestBody, Name, UploadState
from lwstwisted.stores.names import parse_name
from lwstwisted.uploads.announced import media_type, require_identity
from lwstwisted.uploads.appending import Proof, content_proof
from lwstwisted.uploads.conditions import Conditions
from lwstwisted.uploads.digests import OF_REPRESENTATION, expected_digests
from lwstwisted.uploads.plan import Plan, Role, State
from lwstwisted.uploads.session import Session, Sessions
from lwstwisted.web.limits import MAX_LENGTH
from lwstwisted.web.request import note_stored, note_upload

VERSION = b"1.0.0"
CONTENT_TYPE = b"application/offset+octet-stream"

ALGORITHMS = {"sha1": "sha1", "md5": "md5", "sha256": "sha256", "sha512": "sha512", "crc32": "crc32"}
"""Names of ``Upload-Checksum``, and what the store calls them. ``sha1`` is what each server has."""

EXTENSIONS = (
    b"creation",
    b"creation-with-upload",
    b"creation-defer-length",
    b"checksum",
    b"expiration",
    b"termination",
    b"concatenation",
    b"concatenation-unfinished",
)
"""What works under each site."""
TRAILERS = b"checksum-trailer"
"""What works only where a body has its trailers: twisted.web's own Site throws them away."""

REQUEST_FIELDS = (
    b"Tus-Resumable",
    b"Upload-Checksum",
    b"Upload-Concat",
    b"Upload-Defer-Length",
    b"Upload-Length",
    b"Upload-Metadata",
    b"Upload-Offset",
    b"X-HTTP-Method-Override",
)
RESPONSE_FIELDS = (
    b"Tus-Checksum-Algorithm",
    b"Tus-Extension",
    b"Tus-Max-Size",
    b"Tus-Resumable",
    b"Tus-Version",
    b"Upload-Concat",
    b"Upload-Defer-Length",
    b"Upload-Expires",
    b"Upload-Length",
    b"Upload-Metadata",
    b"Upload-Offset",
)

METADATA_BYTES = 4 * 1024
"""Bytes of ``Upload-Metadata``: names and types; what is longer is content."""

_OF_TUS = (b"upload-checksum", b"upload-concat", b"upload-defer-length", b"upload-metadata", b"x-http-method-override")
"""Fields that no other protocol has."""

_NAMES = ("filename", "name")
_TYPES = ("filetype", "type")
_INTEGER = re.compile(r"[0-9]{1,18}")  # less than MAX_LENGTH, whatever the digits
_KEY = re.compile(r"[!-+\--~]+")
_FINAL: Final = "final;"


# Which requests are meant

def is_spoken(request: Request) -> bool:
    """Whether a request is one of tus, be it that it doesn't say of which version."""
    has = request.requestHeaders.hasHeader
    if has(b"tus-resumable"):
        return True
    if has(b"upload-complete") or has(b"upload-incomplete"):
        return False
    is_creating = request.method == b"POST" and has(b"upload-length")
    return is_creating or _is_appending(request) or any(map(has, _OF_TUS))


def method_of(request: Request) -> bytes:
    """The method that a request of tus means, be the actual one what it may."""
    override = request.getHeader(b"x-http-method-override")
    return override.upper() if override else request.method


def require_version(request: Request) -> None:
    """Have each answer say which protocol it is of.

    :raises Refused: ``TUS_VERSION`` if the request isn't of that.
    """
    request.setHeader(b"Tus-Resumable", VERSION)
    if request.getHeader(b"tus-resumable") != VERSION:
        raise Refused(errors.TUS_VERSION, {b"Tus-Version": VERSION})


# What is asked for

def limits(request: Request, sessions: Sessions, has_trailers: bool) -> None:
    """Set the fields of an answer to OPTIONS.

    :param has_trailers: whether trailers of a body can be seen.
    """
    request.setHeader(b"Tus-Resumable", VERSION)
    request.setHeader(b"Tus-Version", VERSION)
    request.setHeader(b"Tus-Extension", b",".join((*EXTENSIONS, TRAILERS) if has_trailers else EXTENSIONS))
    request.setHeader(b"Tus-Checksum-Algorithm", ",".join(ALGORITHMS).encode())
    if sessions.max_size < MAX_LENGTH:
        request.setHeader(b"Tus-Max-Size", b"%d" % sessions.max_size)


async def create(request: Request, body: IRequestBody, sessions: Sessions, visitor: Visitor = ANYBODY) -> None:
    """Begin an upload, take what bytes there are, and answer 201 with its place.

    :raises Refused: and nothing is left then, as nobody knows where it would be.
    :raises lwstwisted.errors.BodyCut: likewise, when the client left.
    """
    plan = _plan_of(request, sessions)
    visitor.require_content(plan.length, _type_in(request))
    has_content = body.length != 0
    if has_content and plan.role is Role.CONCATENATION:
        raise Refused(errors.CONCATENATED)
    proof = _require_content(request, body) if has_content else None
    async with sessions.begun(plan, visitor, sessions.cause(request), _changed) as session:
        note_upload(request, "tus", session.id)
        try:
            if has_content:
                await session.append(body, proof)
            await _finish(request, session, sessions)
        except BaseException:
            await session.cancel()
            raise
        request.setHeader(b"Location", session.url.encode("ascii"))
        if _is_appending(request):
            request.setHeader(b"Upload-Offset", b"%d" % session.offset)
    _answer(request, CREATED, session.reporting.said)


async def head(
    request: Request, body: IRequestBody, sessions: Sessions, id: str, visitor: Visitor = ANYBODY
) -> None:
    """Tell the offset of an upload, and what was said of it.

    :raises Refused: ``UPLOAD_NOT_FOUND``; and what is in the way of an upload that is whole.
    """
    request.setHeader(b"Cache-Control", b"no-store")
    async with sessions.opened(id, visitor, cause=sessions.cause(request)) as session:
        plan = session.plan
        if session.state is not State.WAITING:
            request.setHeader(b"Upload-Offset", b"%d" % session.offset)
        if session.length is not None:
            request.setHeader(b"Upload-Length", b"%d" % session.length)
        elif plan.role is not Role.CONCATENATION:
            request.setHeader(b"Upload-Defer-Length", b"1")
        for name in ("Upload-Metadata", "Upload-Concat"):
            if (said := plan.said.get(name)) is not None:
                request.setHeader(name.encode(), said.encode("ascii"))
        await _finish(request, session, sessions)
    _answer(request, OK)


async def append(
    request: Request, body: IRequestBody, sessions: Sessions, id: str, visitor: Visitor = ANYBODY
) -> None:
    """Append the content of a request and answer 204 with the new offset.

    :raises Refused: what has arrived is kept, as far as the offset says, unless it came with a checksum.
    :raises lwstwisted.errors.BodyCut: likewise, when the client left.
    """
    try:
        proof = _require_content(request, body)
        offset, length = _integer(request, b"upload-offset"), _integer(request, b"upload-length")
        if offset is None:
            raise Refused(errors.BAD_UPLOAD_FIELD)
    except Refused:
        _tell_expiry(request, await sessions.look(id, visitor))
        raise
    async with sessions.opened(id, visitor, cause=sessions.cause(request)) as session:
        _tell_expiry(request, session.stored.state)
        if session.plan.role is Role.CONCATENATION:
            raise Refused(errors.CONCATENATED)
        if offset != session.offset:
            raise Refused(
                errors.OFFSET_MISMATCH,
                {b"Upload-Offset": b"%d" % session.offset},
                {"expected-offset": session.offset, "provided-offset": offset},
            )
        if length is not None:
            await session.announce_length(length)
        # Who hasn't heard that his upload is finished asks again, without any bytes.
        if session.state is not State.NAMED or body.length != 0:
            try:
                await session.append(body, proof)
            except Refused as refused:
                is_wrong = refused.refusal in (errors.BAD_CHECKSUM, errors.CHECKSUM_MISMATCH)
                if is_wrong and session.offset != offset:
                    await session.cancel()  # bytes that count already can't be taken back
                raise
        await _finish(request, session, sessions)
        request.setHeader(b"Upload-Offset", b"%d" % session.offset)
    _answer(request, NO_CONTENT, session.reporting.said)


async def cancel(
    request: Request, body: IRequestBody, sessions: Sessions, id: str, visitor: Visitor = ANYBODY
) -> None:
    """Remove an upload and answer 204.

    :raises Refused: ``UPLOAD_NOT_FOUND``.
    """
    async with sessions.opened(id, visitor, settle=False, cause=sessions.cause(request)) as session:
        await session.cancel(is_wanted=True)
    _answer(request, NO_CONTENT)


# What a request says

def _plan_of(request: Request, sessions: Sessions) -> Plan:
    """What the upload is meant to be that a request begins."""
    length, role = _integer(request, b"upload-length"), Role.FILE
    parts: tuple[str, ...] = ()
    concat, deferred = _field(request, b"upload-concat"), _field(request, b"upload-defer-length")
    if concat is not None and concat.startswith(_FINAL):
        role, parts = Role.CONCATENATION, _parts_of(concat, sessions)
    elif concat is not None:
        role = Role.PART
        if concat != "partial":
            raise Refused(errors.BAD_UPLOAD_FIELD)
    if deferred not in (None, "1"):
        raise Refused(errors.BAD_UPLOAD_FIELD)
    if (length is not None) + (deferred is not None) != (role is not Role.CONCATENATION):
        raise Refused(errors.BAD_UPLOAD_FIELD)
    metadata = _field(request, b"upload-metadata") or None
    found = parse_metadata(metadata or "")
    target = _target_of(found)
    said = {"Upload-Metadata": metadata, "Upload-Concat": concat}
    return Plan(
        target=() if role is Role.PART else target,
        length=length,
        conditions=Conditions.of(request),
        digests=expected_digests(request, OF_REPRESENTATION),
        role=role,
        parts=parts,
        said={name: value for name, value in said.items() if value is not None},
        metadata={key: value.decode("utf-8", "replace") for key, value in found.items()},
    )


def _changed(plan: Plan, metadata: Mapping[str, str]) -> Plan:
    """The plan for other metadata than the client's."""
    text = ",".join(f"{key} {b64encode(value.encode()).decode()}".rstrip() for key, value in metadata.items())
    target = () if plan.role is Role.PART else _target_of(parse_metadata(text))
    return replace(plan, target=target, said={**plan.said, "Upload-Metadata": text})


def _parts_of(concat: str, sessions: Sessions) -> tuple[str, ...]:
    parts = tuple(sessions.id_of(url) for url in concat.removeprefix(_FINAL).split())
    if not all(parts) or not parts:
        raise Refused(errors.BAD_PARTS)
    return parts


def parse_metadata(value: str) -> dict[str, bytes]:
    """Read ``Upload-Metadata``.

    :raises Refused: ``BAD_METADATA``.
    """
    if len(value) > METADATA_BYTES:
        raise Refused(errors.BAD_METADATA)
    found: dict[str, bytes] = {}
    for pair in value.split(",") if value else ():
        key, _, coded = pair.strip().partition(" ")
        if not _KEY.fullmatch(key) or key in found:
            raise Refused(errors.BAD_METADATA)
        try:
            found[key] = b64decode(coded, validate=True)
        except (NotBase64, ValueError):
            raise Refused(errors.BAD_METADATA) from None
    return found


def _target_of(metadata: Mapping[str, bytes]) -> Name:
    """The file that an upload becomes; () for one that is named by its id."""
    name = next(filter(None, map(metadata.get, _NAMES)), None)
    return () if name is None else parse_name([name])


def _type_in(request: Request) -> bytes | None:
    """The media type of the file, as clients have it in their metadata."""
    metadata = parse_metadata(_field(request, b"upload-metadata") or "")
    return next(filter(None, map(metadata.get, _TYPES)), None)


def _require_content(request: Request, body: IRequestBody) -> Proof | None:
    """What the bytes of a request have to hash to.

    :raises Refused: for bytes that nobody may append.
    """
    if not _is_appending(request):
        raise Refused(errors.NOT_A_PART)
    require_identity(request)
    said = _field(request, b"upload-checksum")
    if said is not None:
        checksum = _checksum(said)
        return Proof(lambda: checksum, errors.CHECKSUM_MISMATCH)
    announced = b",".join(request.requestHeaders.getRawHeaders(b"trailer") or ()).lower()
    if b"upload-checksum" in [name.strip() for name in announced.split(b",")]:
        return Proof(lambda: _checksum(_trailer(body)), errors.CHECKSUM_MISMATCH)
    if (proof := content_proof(request)) is None and body.length is None:
        proof = Proof(lambda: _checksum(_trailer(body)) if _in_trailer(body) else {}, errors.CHECKSUM_MISMATCH, False)
    return proof


def _in_trailer(body: IRequestBody) -> list[bytes]:
    """The checksums behind a body that has ended."""
    return [value for name, value in body.trailers if name.lower() == b"upload-checksum"]


def _trailer(body: IRequestBody) -> str:
    found = _in_trailer(body)
    if len(found) != 1:
        raise Refused(errors.BAD_CHECKSUM)
    return _text(found[0], errors.BAD_CHECKSUM)


def _checksum(said: str) -> dict[str, bytes]:
    algorithm, _, coded = said.partition(" ")
    if algorithm not in ALGORITHMS or not coded:
        raise Refused(errors.BAD_CHECKSUM)
    try:
        return {ALGORITHMS[algorithm]: b64decode(coded, validate=True)}
    except (NotBase64, ValueError):
        raise Refused(errors.BAD_CHECKSUM) from None


def _is_appending(request: Request) -> bool:
    return media_type(request) == CONTENT_TYPE


def _field(request: Request, name: bytes) -> str | None:
    values = request.requestHeaders.getRawHeaders(name)
    if values is None:
        return None
    if len(values) != 1:
        raise Refused(errors.BAD_UPLOAD_FIELD)
    return _text(values[0], errors.BAD_UPLOAD_FIELD)


def _text(value: bytes, refusal: Refusal) -> str:
    try:
        return value.strip().decode("ascii")
    except UnicodeDecodeError:
        raise Refused(refusal) from None


def _integer(request: Request, name: bytes) -> int | None:
    value = _field(request, name)
    if value is None:
        return None
    if not _INTEGER.fullmatch(value):
        raise Refused(errors.BAD_UPLOAD_FIELD)
    return int(value)


# What an answer says

async def _finish(request: Request, session: Session, sessions: Sessions) -> None:
    """Make an upload that is whole a file, and tell what became of it."""
    if session.state in (State.WHOLE, State.NAMED) and session.plan.role is not Role.PART:
        named = await session.finish()
        if not session.was_named:
            note_stored(request)
        request.setHeader(b"Content-Location", sessions.url_of_file(session.plan.target).encode("ascii"))
        if named.etag:
            request.setHeader(b"ETag", named.etag.encode("ascii"))
    _tell_expiry(request, session.stored.state)


def _tell_expiry(request: Request, state: UploadState) -> None:
    if state.named is not None:
        request.responseHeaders.removeHeader(b"Upload-Expires")
    else:
        request.setHeader(b"Upload-Expires", datetimeToString(state.expires))


def _answer(request: Request, status: int, said: Answer = NO_WISHES) -> None:
    if request.channel is None:
        return  # the client left meanwhile
    request.setResponseCode(status)
    if status != NO_CONTENT:
        request.setHeader(b"Content-Length", b"0")
    said.amend(request)
    request.finish()
