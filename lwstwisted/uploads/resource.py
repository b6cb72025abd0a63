"""UploadResource: the files of a store as a twisted.web resource, at any path.

=========  =====================================================================================
``PUT``    stores a file (``put.py``), or begins a resumable upload of one (``rufh.py``)
``POST``   stores the files of a form in a folder, whose path ends with a slash (``form.py``), or
           begins a resumable upload of one file there
``GET``    sends a file, with ranges, by ``twisted.web.static``; of a folder, its listing
``HEAD``   the same without content
``DELETE`` removes a file
=========  =====================================================================================

Under a :class:`~lwstwisted.web.site.StreamingSite` a body arrives as it comes; under a stock ``Site`` it
has been spooled by then, and the same code reads it from there.

What users uploaded is never shown as a page of this site: it is sent as an attachment, with a policy under
which no script in it runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote

from twisted.web.http import NO_CONTENT, NOT_MODIFIED
from twisted.web.resource import Resource
from twisted.web.server import Request
from twisted.web.static import File, getTypeAndEncoding
from zope.interface import implementer

from lwstwisted import errors
from lwstwisted.access.entrance import Entrance
from lwstwisted.access.rules import Action
from lwstwisted.access.visitor import ANYBODY, Visitor
from lwstwisted.errors import Refused
from lwstwisted.hooks.events import Events
from lwstwisted.interfaces import Found, IRequestBody, IStreamingResource, Name, Store
from lwstwisted.stores.names import parse_name
from lwstwisted.uploads import rufh
from lwstwisted.uploads.conditions import Conditions, NotModified, is_range_wanted, satisfiable_range
from lwstwisted.uploads.cors import ANY, CrossOrigin
from lwstwisted.uploads.digests import repr_digest
from lwstwisted.uploads.form import post_form
from lwstwisted.uploads.origin import require_own_origin
from lwstwisted.uploads.pages import send_listing
from lwstwisted.uploads.put import put
from lwstwisted.uploads.session import Sessions
from lwstwisted.uploads.spooled import receive_spooled
from lwstwisted.web.limits import MAX_LENGTH
from lwstwisted.web.request import note_upload

SAFE_METHODS = {b"GET", b"HEAD", b"OPTIONS"}
"""They change nothing (RFC 9110 section 9.2.1), so a page of another site may cause them."""

_BEGINNING = (b"POST", b"PUT")
"""Methods that begin a resumable upload."""

_ISOLATED = b"sandbox; default-src 'none'"


@implementer(IStreamingResource)
class UploadResource(Resource):
    """The files of ``store``.

    :param store: where they live.
    :param max_size: bytes of one file at most.
    :param sessions: the resumable uploads of the store; None for a service without any.
    :param allowed_origins: pages of which other origins may begin those, such as ``https://example.org``.
    :param entrance: who may do what; everybody everything by default.
    :param events: who is asked and told of uploads that come in one request.
    """

    isLeaf = True

    def __init__(
        self,
        store: Store,
        max_size: int = MAX_LENGTH,
        sessions: Sessions | None = None,
        allowed_origins: Sequence[str] = (ANY,),
        entrance: Entrance | None = None,
        events: Events | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._store = store
        self._max_size = max_size
        self._sessions = sessions
        self._events = events
        self._cross_origin = CrossOrigin(allowed_origins)
        self._entrance = entrance or Entrance()
        self._methods: dict[bytes, Callable[[Request, IRequestBody, Visitor], Coroutine[Any, Any, None]]] = {
            b"DELETE": self._delete,
            b"GET": self._get,
            b"HEAD": self._get,
            b"OPTIONS": self._options,
            b"POST": self._post,
            b"PUT": self._put,
        }

    def receive(self, request: Request, body: IRequestBody) -> Coroutine[Any, Any, None]:
        """See :class:`~lwstwisted.interfaces.IStreamingResource`."""
        self._entrance.require_own_host(request)
        begins = request.method in _BEGINNING and self._sessions is not None and rufh.is_spoken(request)
        if request.method in _BEGINNING:
            note_upload(request, "put" if request.method == b"PUT" else "form")
        if begins:
            self._cross_origin.tell(request)
        allowed = self._allowed(request)
        if request.method not in allowed:
            raise Refused(errors.METHOD_NOT_ALLOWED, {b"Allow": b", ".join(allowed)})
        if begins and not rufh.is_form(request):
            self._cross_origin.restrain(request, has_preflight=True)
        elif request.method not in SAFE_METHODS:
            require_own_origin(request)
        answer = partial(self._methods[request.method], request, body)
        if request.method == b"OPTIONS":
            return answer(ANYBODY)  # a browser asks before it would say who its user is
        return self._entrance.let_in(request, answer, request.method)

    def _allowed(self, request: Request) -> list[bytes]:
        unfit = (b"DELETE", b"PUT") if _is_folder(request) else (b"POST",)
        return [method for method in self._methods if method not in unfit]

    def render(self, request: Request) -> int:
        """Take a request whose body a stock ``Site`` has spooled."""
        return receive_spooled(self, request)

    # Not async, where they only choose: an upload that drips would hold a frame for each.

    def _put(self, request: Request, body: IRequestBody, visitor: Visitor) -> Coroutine[Any, Any, None]:
        name = parse_name(request.postpath or [])
        visitor.require(Action.PUT, name)
        if self._sessions is not None and rufh.begins_upload(request, body, self._sessions):
            return rufh.create(request, body, self._sessions, visitor, name)
        return put(request, body, self._store, name, self._max_size, visitor, self._events)

    def _post(self, request: Request, body: IRequestBody, visitor: Visitor) -> Coroutine[Any, Any, None]:
        folder = parse_name((request.postpath or [])[:-1])
        visitor.require_some(Action.PUT, folder)
        if self._sessions is not None and rufh.begins_upload(request, body, self._sessions):
            return rufh.create(request, body, self._sessions, visitor, folder=folder)
        return post_form(request, body, self._store, folder, self._max_size, visitor, self._events)

    async def _delete(self, request: Request, body: IRequestBody, visitor: Visitor) -> None:
        name = parse_name(request.postpath or [])
        visitor.require(Action.DELETE, name)
        await self._store.delete(name, Conditions.of(request).check)
        if request.channel is None:
            return  # the client left meanwhile
        request.setResponseCode(NO_CONTENT)
        request.finish()

    async def _options(self, request: Request, body: IRequestBody, visitor: Visitor) -> None:
        request.setResponseCode(NO_CONTENT)
        request.setHeader(b"Allow", b", ".join(self._allowed(request)))
        if self._sessions is not None:
            rufh.tell_limit(request, self._sessions)
            if request.getHeader(b"access-control-request-method") in _BEGINNING:
                # What doesn't begin an upload is refused none the less; and no page of elsewhere reads a file.
                self._cross_origin.tell(request)
                self._cross_origin.tell_allowed(request, _BEGINNING)
        request.finish()

    async def _get(self, request: Request, body: IRequestBody, visitor: Visitor) -> None:
        segments = list(request.postpath or [])
        is_folder = _is_folder(request)
        name = parse_name(segments[:-1] if is_folder else segments)
        if is_folder or not visitor.may(Action.LIST, name):
            # Who may list sees in any case whether it is a file.
            visitor.require(Action.LIST if is_folder else Action.GET, name)
        if not is_folder:
            Conditions.of(request)  # one that can't be read is refused whatever has the name
            try:
                fd = await self._store.open_file(name)
            except Refused as refused:
                if refused.refusal is not errors.IS_FOLDER:
                    raise
            else:
                try:
                    visitor.require(Action.GET, name)
                except Refused:
                    os.close(fd)
                    raise
                _send_file(request, name, fd, self._store.describe(fd))
                return
            visitor.require(Action.LIST, name)
        entries = await self._store.list_folder(name)
        entries = [entry for entry in entries if visitor.shows((*name, entry.name), entry.is_folder)]
        if request.channel is not None:  # else the client left meanwhile
            send_listing(request, request.path.rstrip(b"/").decode("ascii") + "/", entries)


def _is_folder(request: Request) -> bool:
    """Whether a path means a folder, be it there or not."""
    return not request.postpath or request.postpath[-1] == b""


def _send_file(request: Request, name: Name, fd: int, found: Found) -> None:
    """Let twisted.web send what ``fd`` is, whatever its name has become meanwhile; closes ``fd``."""
    try:
        if request.channel is None:
            return  # the client left while the file was being opened
        request.setHeader(b"X-Content-Type-Options", b"nosniff")
        request.setHeader(b"ETag", found.etag.encode("ascii"))
        if (digest := repr_digest(request, found.digests)) is not None:
            request.setHeader(b"Repr-Digest", digest)
        try:
            Conditions.of(request).check(found)
        except NotModified:
            request.setResponseCode(NOT_MODIFIED)
            request.finish()
            return
        wanted = b",".join(request.requestHeaders.getRawHeaders(b"range", []))
        ranges = satisfiable_range(wanted, found.size) if is_range_wanted(request, found) else None
        request.requestHeaders.setRawHeaders(b"range", [] if ranges is None else [ranges])
        for field in (b"if-none-match", b"if-modified-since"):
            request.requestHeaders.removeHeader(field)  # judged, and twisted.web would judge them again
        file = _Download(f"/proc/self/fd/{fd}")
        file.type, file.encoding = getTypeAndEncoding(
            name[-1], File.contentTypes, {}, "application/octet-stream"
        )
        request.setHeader(b"Content-Disposition", b"attachment; filename*=UTF-8''" + _quoted(name[-1]))
        request.setHeader(b"Content-Security-Policy", _ISOLATED)
        request.render(file)
    finally:
        os.close(fd)


class _Download(File):
    """Rounds the time of the file down, as the conditions do. Rounded up it may lie in the future."""

    def getModificationTime(self) -> int:
        return int(super().getModificationTime())


def _quoted(name: str) -> bytes:
    return quote(name, safe="").encode("ascii")
