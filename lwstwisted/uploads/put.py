"""``PUT /files/a/b``: one request, one file (RFC 9110 section 9.3.4).

Everything that can be known from the head is decided before a byte of the body is accepted: the name, the
length, the encodings, the conditions. The file becomes visible when it is whole and durable, and then the
answer is sent.
"""

from __future__ import annotations

from twisted.web.http import CREATED, NO_CONTENT
from twisted.web.server import Request

from lwstwisted import errors
from lwstwisted.access.visitor import ANYBODY, Visitor
from lwstwisted.errors import Refused
from lwstwisted.hooks.events import NO_WISHES, Answer, Cause, Events, Upload, metadata_of, new_id, rename_refused
from lwstwisted.interfaces import Check, Digests, IRequestBody, Name, PartialFile, Store
from lwstwisted.uploads.announced import media_type, require_identity, require_length
from lwstwisted.uploads.conditions import Conditions
from lwstwisted.uploads.digests import expected_digests, repr_digest, wanted_digests
from lwstwisted.uploads.transfer import Transfer


async def put(
    request: Request,
    body: IRequestBody,
    store: Store,
    name: Name,
    max_size: int,
    visitor: Visitor = ANYBODY,
    events: Events | None = None,
) -> None:
    """Store the body of ``request`` as ``name`` and answer 201 (new) or 204 (replaced).

    :param max_size: bytes.
    :param visitor: who may put it there, and is asked for the rest.
    :param events: who is asked and told of it.
    :raises Refused: and nothing of the upload is left then.
    :raises lwstwisted.errors.BodyCut: likewise, when the client left.
    """
    require_length(request)
    if request.requestHeaders.hasHeader(b"content-range"):
        raise Refused(errors.CONTENT_RANGE)
    require_identity(request)
    if body.length is not None and body.length > max_size:
        raise Refused(errors.BODY_TOO_LARGE)
    visitor.require_content(body.length, request.getHeader(b"content-type"))
    check = visitor.checking(name, Conditions.of(request).check)
    digests = {**wanted_digests(request), **expected_digests(request)}
    most, said = min(max_size, visitor.max_size), NO_WISHES
    if events is not None:
        part, created, said = await _store_telling(request, body, store, name, most, check, digests, events)
    else:
        part = await store.create(name, body.length, check, digests)
        created = await _store(body, Transfer(part, body.length, most))
    if (digest := repr_digest(request, part.digests)) is not None:
        request.setHeader(b"Repr-Digest", digest)
    answer_stored(request, created, part.etag, request.path, said)


async def _store(body: IRequestBody, transfer: Transfer) -> bool:
    try:
        await body.deliver_to(transfer)
        return await transfer.finish()
    except BaseException as cut:
        cause = transfer.failure or cut
        await transfer.abort()
        raise cause from None


async def _store_telling(
    request: Request,
    body: IRequestBody,
    store: Store,
    name: Name,
    most: int,
    check: Check,
    digests: Digests,
    events: Events,
) -> tuple[PartialFile, bool, Answer]:
    """Store the body, and ask and tell of it."""
    cause, metadata = Cause.of(request), metadata_of(name, media_type(request))
    said = await events.may_create(Upload(size=body.length, metadata=metadata), cause)
    if said.metadata is not None:
        rename_refused(said.metadata, {"filename": metadata["filename"], "path": metadata["path"]})
        metadata = dict(said.metadata)
    upload = Upload(new_id(), body.length, 0, metadata, at=name)
    ending = events.finishing(upload, cause, has_begun=False)
    part = await store.create(name, body.length, check, digests, ending.announce)
    transfer = Transfer(part, body.length, most)
    end = events.receiving(upload, cause, lambda: transfer.received, transfer.stop)
    try:
        created = await _store(body, transfer)
    except BaseException:
        ending.failed()
        raise
    finally:
        end()
    return part, created, said.followed_by(await ending.named())


def answer_stored(request: Request, created: bool, etag: str, location: bytes, said: Answer = NO_WISHES) -> None:
    """Answer 201 (new) or 204 (replaced).

    :param etag: of the file, with quotes; "" if nobody knows.
    :param location: where the file is.
    :param said: what the application wants to be different.
    """
    if request.channel is None:
        return  # the client left when all was sent
    request.setResponseCode(CREATED if created else NO_CONTENT)
    if etag:
        request.setHeader(b"ETag", etag.encode("ascii"))
    if created:
        request.setHeader(b"Location", location)
        request.setHeader(b"Content-Length", b"0")
    said.amend(request)
    request.finish()
