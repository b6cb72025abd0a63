"""Resumable uploads as the IETF has them (draft-ietf-httpbis-resumable-upload), over :mod:`lwstwisted.uploads.session`.

==========================  ================================================================================
``PUT /files/a/b``          with ``Upload-Complete``: begins an upload of ``/files/a/b``
``POST /files/folder/``     likewise, of a file there; ``Content-Disposition`` says its name
``POST /uploads/``          likewise, of a file in ``/files/``
``HEAD``, ``GET``           of an upload: how far it is
``PATCH``                   goes on with it
``DELETE``                  removes it
==========================  ================================================================================

**Who speaks.** Every answer says by ``Upload-Complete`` whether it is one of the file (``?1``), which would have come
in the same way without all this, or one of the upload (``?0``), after which the client may go on. So what is wrong with
a file, such as its digest or a condition that doesn't hold, is said with ``?1``, and the upload is over; what our disk
lacks is said with ``?0``, and the last request may be repeated.

**Versions.** Clients in the field follow drafts, and name the *interop version* of theirs; :data:`VERSIONS` has what
differs. One that names none gets the final text, which we hold to be that of the last draft. It gets no interim
response 104 though: the drafts forbid that, and without one, a client that sends all in one request never learns the
URL of its upload. There a PUT stays what it is, and nothing is kept of a request that was cut.

**Space for a while.** An upload that its client has given up takes space until it expires, with or without a name.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import http_sf
from twisted.web.http import CREATED, NO_CONTENT
from twisted.web.http_headers import Headers
from twisted.web.server import Request

from lwstwisted import errors
from lwstwisted.access.visitor import ANYBODY, Visitor
from lwstwisted.errors import Refused
from lwstwisted.hooks.events import metadata_of, rename_refused
from lwstwisted.interfaces import IRequestBody, Name, Named
from lwstwisted.stores.names import parse_name
from lwstwisted.uploads.announced import media_type, require_identity, require_length
from lwstwisted.uploads.appending import Proof, content_proof
from lwstwisted.uploads.conditions import Conditions
from lwstwisted.uploads.digests import OF_CONTENT, OF_REPRESENTATION, expected_digests, repr_digest, wanted_digests
from lwstwisted.uploads.disposition import decode_extended, parse_disposition
from lwstwisted.uploads.plan import Plan, Role, State
from lwstwisted.uploads.put import answer_stored
from lwstwisted.uploads.session import Session, Sessions
from lwstwisted.web.request import StreamingRequest, note_stored, note_upload

RESUMPTION_SUPPORTED = 104
PART_TYPE = b"application/partial-upload"

LARGEST_INTEGER = 10**15 - 1
"""What a structured field can say (RFC 9651 section 3.3.1)."""

_INTEROP = b"Upload-Draft-Interop-Version"
_WANTED = "want-repr-digest"
_REFUSED = "refused"
"""Under this name, an upload's record has the refusal that its file was answered with."""


@dataclass(frozen=True, slots=True)
class Version:
    """What a client of one interop version expects.

    :ivar number: None for the final text.
    :ivar says_incomplete: ``Upload-Incomplete``, with the opposite value, instead of ``Upload-Complete``.
    :ivar has_progress: interim responses with ``Upload-Offset``.
    :ivar has_part_type: PATCH has the type :data:`PART_TYPE`.
    :ivar age: the key of ``Upload-Limit`` for the seconds that are left; "" for no ``Upload-Limit`` at all.
    """

    number: int | None
    says_incomplete: bool = False
    has_progress: bool = True
    has_part_type: bool = True
    age: str = "max-age"

    def completeness_in(self, request: Request) -> bool | None:
        """What a request says of being the last one; None if nothing."""
        said = _item(request, b"upload-incomplete" if self.says_incomplete else b"upload-complete", bool)
        return None if said is None else bool(said) != self.says_incomplete

    def completeness(self, is_complete: bool) -> tuple[bytes, bytes]:
        """A field that says it."""
        name = b"Upload-Incomplete" if self.says_incomplete else b"Upload-Complete"
        return name, b"?%d" % (is_complete != self.says_incomplete)


FINAL = Version(None)
_8 = Version(8)
_7 = replace(_8, number=7)
_6 = replace(_7, number=6, age="expires")
_5 = replace(_6, number=5, age="", has_part_type=False)
_4 = replace(_5, number=4, has_progress=False)
_3 = replace(_4, number=3, says_incomplete=True)
VERSIONS = {version.number: version for version in (_3, _4, _5, _6, _7, _8)}
"""3 is draft-ietf-httpbis-resumable-upload-01, 4 is -02, 5 is -03, 6 is -04 and -05, 7 is -06 to -08, 8 is -09 to -12.

``Upload-Length`` came with -05, and nobody sent it before.
"""


def is_spoken(request: Request) -> bool:
    """Whether a request says that it is of this protocol, in whichever version."""
    has = request.requestHeaders.hasHeader
    return has(b"upload-complete") or has(b"upload-incomplete")


def is_form(request: Request) -> bool:
    """Whether a request brings the files of a form."""
    return request.method == b"POST" and media_type(request) == b"multipart/form-data"


def version_of(request: Request) -> Version:
    """What the client of a request speaks; :data:`FINAL` if it doesn't say so, or something unknown."""
    return VERSIONS.get(_item(request, _INTEROP, int), FINAL)


def upload_limit(sessions: Sessions, session: Session | None = None, version: Version = FINAL) -> bytes:
    """The value of ``Upload-Limit``; b"" for a client that doesn't know it.

    :param session: an upload; without one, what a new one would have.
    """
    if not version.age:
        return b""
    left = sessions.lifetime if session is None else session.expires - time.time()
    limits = [b"%b=%d" % (version.age.encode(), max(0, round(left)))]
    if sessions.max_size <= LARGEST_INTEGER:
        limits.insert(0, b"max-size=%d" % sessions.max_size)
    return b", ".join(limits)


def tell_limit(request: Request, sessions: Sessions) -> None:
    """Set what the answer to an OPTIONS says of uploads that may begin there."""
    _Talk(request, sessions).say_limit()


def begins_upload(request: Request, body: IRequestBody, sessions: Sessions) -> bool:
    """Whether a request for a file or a folder is one for :func:`create`.

    Else it is what it would be without ``Upload-Complete``. Where a client sent that with a single file and might have
    had an upload, the answer will say that it's the file's.

    :raises Refused: ``LENGTH_MISMATCH``.
    """
    talk = _Talk(request, sessions)
    if talk.is_complete is None:
        return False
    if is_form(request):
        return not talk.is_complete  # to be refused there
    is_cheaper = request.method == b"PUT" and talk.is_complete and not talk.has_interim and body.length is not None
    if is_cheaper:
        talk.say_limit()
        talk.say(True)
        talk.length_from(body, 0)
    return not is_cheaper


async def create(
    request: Request,
    body: IRequestBody,
    sessions: Sessions,
    visitor: Visitor = ANYBODY,
    name: Name | None = None,
    folder: Name | None = None,
) -> None:
    """Begin an upload, and finish it if all of it is in ``request``.

    :param visitor: whose it is.
    :param name: of the file, if the request says that by its path; else ``Content-Disposition`` does.
    :param folder: where it will be, if it has to have a name; without both it is in the root, by its id if need be.
    """
    talk = _Talk(request, sessions)
    talk.say_limit()
    talk.say(True)  # until there is an upload, only its file can have something against it
    if talk.is_complete is None:
        raise Refused(errors.NOT_AN_UPLOAD)
    _require_file(request, talk.is_complete)
    plan = _plan(request, talk.is_complete, _name_in(folder, request) if name is None else name)
    proof = None if talk.is_complete else content_proof(request)
    plan = replace(plan, length=talk.length_from(body, 0))
    visitor.require_content(plan.length, request.getHeader(b"content-type"))
    if plan.length is not None and plan.length > sessions.max_size:
        talk.say(False)
        raise Refused(errors.BODY_TOO_LARGE)
    async with sessions.begun(plan, visitor, sessions.cause(request), _changed) as session:
        note_upload(request, "ietf", session.id)
        url = session.url.encode("ascii")
        talk.say(False, session)
        try:
            talk.send_interim({b"Location": url, b"Upload-Limit": upload_limit(sessions, session, talk.version)})
            await _take(session, talk, body, proof)
        except BaseException:
            if not talk.has_interim:
                await session.cancel()  # nobody knows its URL
            raise
        if not talk.is_complete and request.channel is not None:
            request.setResponseCode(CREATED)
            request.setHeader(b"Location", url)
            request.setHeader(b"Content-Length", b"0")
            talk.finish(session)


async def head(
    request: Request, body: IRequestBody, sessions: Sessions, id: str, visitor: Visitor = ANYBODY
) -> None:
    """Say how far an upload is."""
    talk = _Talk(request, sessions)
    request.setHeader(b"Cache-Control", b"no-store")
    async with sessions.opened(id, visitor, cause=sessions.cause(request)) as session:
        if request.channel is None:
            return
        talk.say(_is_answered(session), session)
        if session.length is not None:
            request.setHeader(b"Upload-Length", b"%d" % session.length)
        request.setResponseCode(NO_CONTENT)
        talk.finish(session)


async def append(
    request: Request, body: IRequestBody, sessions: Sessions, id: str, visitor: Visitor = ANYBODY
) -> None:
    """Go on with an upload, and finish it if the client says that this is all."""
    talk = _Talk(request, sessions)
    talk.say(False)
    offset = _unsigned(request, b"upload-offset")
    if offset is None or talk.is_complete is None:
        raise Refused(errors.BAD_UPLOAD_FIELD)
    if talk.version.has_part_type and media_type(request) != PART_TYPE:
        raise Refused(errors.NOT_A_PART, {b"Accept-Patch": PART_TYPE})
    require_identity(request)
    proof = content_proof(request)
    async with sessions.opened(id, visitor, cause=sessions.cause(request)) as session:
        talk.say(False, session)
        if session.plan.role is not Role.FILE:
            raise Refused(errors.CONCATENATED)
        if offset != session.offset:
            raise Refused(
                errors.OFFSET_MISMATCH,
                {b"Upload-Offset": b"%d" % session.offset},
                {"expected-offset": session.offset, "provided-offset": offset},
            )
        is_again = _is_answered(session)
        # Only what was the last request, and had no answer that arrived, makes sense to say again.
        if is_again and not talk.is_complete:
            raise Refused(errors.UPLOAD_FINISHED)
        if is_again:
            await session.require_nothing(body)
        if (length := talk.length_from(body, offset)) is not None:
            await session.announce_length(length)
        await _take(session, talk, None if is_again else body, proof)
        if not talk.is_complete and request.channel is not None:
            request.setResponseCode(NO_CONTENT)
            talk.finish(session)


async def cancel(
    request: Request, body: IRequestBody, sessions: Sessions, id: str, visitor: Visitor = ANYBODY
) -> None:
    """Remove an upload."""
    _Talk(request, sessions)  # which says the version
    async with sessions.opened(id, visitor, settle=False, cause=sessions.cause(request)) as session:
        await session.cancel(is_wanted=True)
    if request.channel is not None:
        request.setResponseCode(NO_CONTENT)
        request.finish()


def _require_file(request: Request, is_complete: bool) -> None:
    """:raises Refused: for a request whose content is no file, or not one that can be stored as it comes."""
    if is_form(request):
        raise Refused(errors.FORM_IN_PARTS)
    if request.requestHeaders.hasHeader(b"content-range"):
        raise Refused(errors.CONTENT_RANGE)
    require_identity(request)
    if is_complete:
        require_length(request)


def _plan(request: Request, is_complete: bool, name: Name) -> Plan:
    """What a request begins.

    :param is_complete: whether it means to bring all of it. Then the digest of its content is that of the file, and
        a cut doesn't cost what came before it, as it does where the content has to be what it is or nothing.
    """
    wanted = b", ".join(request.requestHeaders.getRawHeaders(_WANTED.encode()) or ())
    expected = expected_digests(request, (*OF_CONTENT, *OF_REPRESENTATION) if is_complete else OF_REPRESENTATION)
    return Plan(
        target=name,
        conditions=Conditions.of(request),
        digests={**wanted_digests(request), **expected},
        said={_WANTED: wanted.decode("latin-1")} if wanted else {},
        ends_at_length=False,
        metadata=metadata_of(name, media_type(request)),
    )


def _changed(plan: Plan, metadata: Mapping[str, str]) -> Plan:
    """The plan for other metadata than the client's, who has said the name."""
    rename_refused(metadata, {key: plan.metadata[key] for key in ("filename", "path") if key in plan.metadata})
    return plan


class _Talk:
    """A request and its answers.

    :ivar version: what its client speaks.
    :ivar is_complete: whether nothing comes behind its content; None if it isn't about an upload.
    :ivar has_interim: whether an interim response would be understood.
    """

    def __init__(self, request: Request, sessions: Sessions) -> None:
        self.request = request
        self.version = version_of(request)
        self.is_complete = self.version.completeness_in(request)
        can_send = isinstance(request, StreamingRequest) and request.clientproto == b"HTTP/1.1"
        self.has_interim = can_send and self.version.number is not None
        self.sessions = sessions
        if self.version.number is not None:
            request.setHeader(_INTEROP, b"%d" % self.version.number)

    def say(self, is_complete: bool, session: Session | None = None) -> None:
        """Set the fields of the answer, whichever it will be.

        :param is_complete: whether it's one of the file.
        :param session: the upload that has limits.
        """
        self.request.setHeader(*self.version.completeness(is_complete))
        if session is not None:
            self.say_limit(session)

    def say_limit(self, session: Session | None = None) -> None:
        """Set what the answer says of the limits of an upload, or else of those that may begin here."""
        if limit := upload_limit(self.sessions, session, self.version):
            self.request.setHeader(b"Upload-Limit", limit)

    def send_interim(self, fields: dict[bytes, bytes]) -> None:
        """Send a 104, if it would be understood."""
        if self.has_interim and self.version.number is not None:
            said = {_INTEROP: b"%d" % self.version.number, **fields}
            request = cast(StreamingRequest, self.request)
            request.send_interim(RESUMPTION_SUPPORTED, Headers({name: [said[name]] for name in said if said[name]}))

    def send_progress(self, offset: int) -> None:
        """Say how much is durable while more is coming."""
        if self.version.has_progress:
            self.send_interim({b"Upload-Offset": b"%d" % offset})

    def finish(self, session: Session) -> None:
        """Answer for an upload that can go on, with how far it is."""
        self.say_limit(session)
        self.request.setHeader(b"Upload-Offset", b"%d" % session.offset)
        if self.request.method != b"HEAD":
            session.reporting.said.amend(self.request)
        self.request.finish()

    def length_from(self, body: IRequestBody, offset: int) -> int | None:
        """What a request tells of the bytes of the whole file, one way or the other.

        :raises Refused: ``LENGTH_MISMATCH`` if it does so in two ways that differ.
        """
        told: int | None = _unsigned(self.request, b"upload-length")
        if not self.is_complete or body.length is None:
            return told
        length: int = offset + body.length
        if told not in (None, length):
            self.say(False)
            raise Refused(errors.LENGTH_MISMATCH)
        return length


async def _take(session: Session, talk: _Talk, body: IRequestBody | None, proof: Proof | None) -> None:
    """Append a body, and if the client says that this is all, finish the upload and answer for the file.

    :param body: None for an upload that is finished already.
    """
    if body is not None:
        try:
            await session.append(body, proof, talk.send_progress, bool(talk.is_complete))
        except Refused as refused:
            if refused.refusal is errors.UPLOAD_OVERRUN:
                await session.cancel()
            raise
    if not talk.is_complete:
        return
    if session.length is None:
        await session.announce_length(session.offset)
    if session.state is State.OPEN:
        raise Refused(errors.LENGTH_MISMATCH)
    try:
        named = await session.finish()
    except Refused as refused:
        if refused.refusal.is_clients_fault:
            await _note_refusal(session, refused)
            talk.say(True)
        raise
    if not session.was_named:
        note_stored(talk.request)
    talk.say(True, session)
    _answer_for_file(session, talk, named)


async def _note_refusal(session: Session, refused: Refused) -> None:
    """Let whoever didn't get this answer learn that there was one."""
    if refused.refusal is errors.DIGEST_MISMATCH:
        await session.cancel()  # it won't ever be what it should have been
    elif not _is_answered(session):
        stored = session.stored
        await stored.keep({**stored.state.record, _REFUSED: refused.refusal.code}, session.length)


def _is_answered(session: Session) -> bool:
    """Whether the file has been answered for, be it there or refused."""
    return session.named is not None or _REFUSED in session.stored.state.record


def _answer_for_file(session: Session, talk: _Talk, named: Named) -> None:
    plan, request, location = session.plan, talk.request, talk.request.path
    wanted = plan.said.get(_WANTED, "").encode("latin-1")
    known = {name: digest for name, digest in plan.digests.items() if digest is not None}
    if (digest := repr_digest(request, {**known, **session.stored.digests}, wanted)) is not None:
        request.setHeader(b"Repr-Digest", digest)
    # The drafts up to -05 want an offset in every answer, and a Location in every one to what begins an upload.
    request.setHeader(b"Upload-Offset", b"%d" % session.offset)
    if request.method != b"PUT":
        location = talk.sessions.url_of_file(plan.target).encode("ascii")
        request.setHeader(b"Content-Location", location)
    if request.method == b"POST":
        request.setHeader(b"Location", location)
    answer_stored(request, named.created, named.etag, location, session.reporting.said)


def _item(request: Request, name: bytes, kind: type) -> Any:
    """The value of a structured field; None if it isn't there, or is something else."""
    values = request.requestHeaders.getRawHeaders(name)
    if values is None:
        return None
    try:
        value = cast(tuple[Any, Any], http_sf.parse(b", ".join(values), tltype="item"))[0]
    except http_sf.StructuredFieldError:
        return None
    return value if type(value) is kind else None  # True is an int as well


def _unsigned(request: Request, name: bytes) -> int | None:
    value: int | None = _item(request, name, int)
    return value if value is not None and value >= 0 else None


def _name_in(folder: Name | None, request: Request) -> Name:
    disposition = request.getHeader(b"content-disposition")
    filename = None if disposition is None else filename_in(disposition)
    if filename is not None:
        return parse_name([*[segment.encode() for segment in folder or ()], filename])
    if folder is not None:
        raise Refused(errors.BAD_DISPOSITION)
    return ()


def filename_in(disposition: bytes) -> bytes | None:
    """The file name in a ``Content-Disposition`` (RFC 6266), unchecked; None if there isn't any.

    :raises Refused: ``BAD_DISPOSITION``.
    """
    try:
        _, found = parse_disposition(disposition.decode("utf-8", "surrogateescape"), _unquoted)
        if "filename*" in found:
            return decode_extended(found["filename*"])
    except ValueError:
        raise Refused(errors.BAD_DISPOSITION) from None
    filename = found.get("filename")
    return None if filename is None else filename.encode("utf-8", "surrogateescape")


def _unquoted(value: str) -> str:
    r"""A quoted-string (RFC 9110 section 5.6.4): \" and \\."""
    return re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL)
