"""The uploads under way as resources: ``/uploads/`` begins one, ``/uploads/ID`` is one.

Two protocols share them. A request of tus says so (``Tus-Resumable``, or its media type); any other one is of the
IETF's protocol. An upload that was begun by one of them may be looked at, continued and cancelled by the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from twisted.web.http import OK
from twisted.web.resource import Resource
from twisted.web.server import Request
from zope.interface import implementer

from lwstwisted import errors
from lwstwisted.access.entrance import Entrance
from lwstwisted.access.rules import Action
from lwstwisted.access.visitor import Visitor
from lwstwisted.errors import Refused
from lwstwisted.interfaces import IRequestBody, IStreamingResource
from lwstwisted.uploads import rufh, tus
from lwstwisted.uploads.cors import ANY, CrossOrigin
from lwstwisted.uploads.session import Sessions
from lwstwisted.uploads.spooled import SpooledBody, receive_spooled
from lwstwisted.web.request import note_upload

_ID = re.compile(rb"[0-9a-f]{32}")
_OF_ALL = (b"OPTIONS", b"POST")
_OF_ONE = (b"DELETE", b"GET", b"HEAD", b"OPTIONS", b"PATCH")

_Call = Callable[[Request, IRequestBody, Sessions, str, Visitor], Coroutine[Any, Any, None]]
_TUS: tuple[_Call, _Call, _Call] = tus.head, tus.append, tus.cancel
_RUFH: tuple[_Call, _Call, _Call] = rufh.head, rufh.append, rufh.cancel


@implementer(IStreamingResource)
class ResumableResource(Resource):
    """The uploads of ``sessions``.

    :param allowed_origins: pages of which other origins may upload, such as ``https://example.org``.
    :param entrance: who may do what; everybody everything by default.
    """

    isLeaf = True

    def __init__(
        self, sessions: Sessions, allowed_origins: Sequence[str] = (ANY,), entrance: Entrance | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sessions = sessions
        self._cross_origin = CrossOrigin(allowed_origins)
        self._entrance = entrance or Entrance()

    def render(self, request: Request) -> int:
        """Take a request whose body a stock ``Site`` has spooled."""
        return receive_spooled(self, request)

    def receive(self, request: Request, body: IRequestBody) -> Coroutine[Any, Any, None]:
        """See :class:`~lwstwisted.interfaces.IStreamingResource`."""
        self._entrance.require_own_host(request)
        self._cross_origin.tell(request)
        if tus.method_of(request) == b"OPTIONS":  # which needs no version
            return self._options(request, body)
        path = request.postpath or [b""]
        is_tus = tus.is_spoken(request)
        note_upload(request, "tus" if is_tus else "ietf", path[0].decode() if _ID.fullmatch(path[0]) else "")
        if is_tus:
            tus.require_version(request)
        method = tus.method_of(request) if is_tus else request.method
        allowed = _OF_ALL if path == [b""] else _OF_ONE
        if method not in allowed:
            raise Refused(errors.METHOD_NOT_ALLOWED, {b"Allow": b", ".join(allowed)})
        if method == b"POST":
            return self._create(request, body, is_tus)
        # Nobody who can name an upload has guessed it; and to change one takes a preflight.
        self._cross_origin.restrain(request, has_preflight=True)
        if len(path) != 1 or not _ID.fullmatch(path[0]):
            raise Refused(errors.UPLOAD_NOT_FOUND)
        head, append, cancel = _TUS if is_tus else _RUFH
        call = {b"DELETE": cancel, b"PATCH": append}.get(method, head)
        return self._entrance.let_in(request, partial(call, request, body, self._sessions, path[0].decode()))

    def _create(self, request: Request, body: IRequestBody, is_tus: bool) -> Coroutine[Any, Any, None]:
        is_ietf = not is_tus and rufh.is_spoken(request)
        self._cross_origin.restrain(request, has_preflight=is_tus or is_ietf)
        if not (is_tus or is_ietf):
            raise Refused(errors.NOT_AN_UPLOAD)
        create = tus.create if is_tus else rufh.create

        def begin(visitor: Visitor) -> Coroutine[Any, Any, None]:
            visitor.require_some(Action.PUT, ())
            return create(request, body, self._sessions, visitor)

        return self._entrance.let_in(request, begin, b"POST")

    async def _options(self, request: Request, body: IRequestBody) -> None:
        allowed = _OF_ALL if (request.postpath or [b""]) == [b""] else _OF_ONE
        tus.limits(request, self._sessions, has_trailers=not isinstance(body, SpooledBody))
        rufh.tell_limit(request, self._sessions)
        request.setHeader(b"Accept-Patch", b"application/partial-upload, " + tus.CONTENT_TYPE)
        request.setHeader(b"Allow", b", ".join(allowed))
        self._cross_origin.tell_allowed(request, [*allowed, b"POST"] if allowed is _OF_ONE else allowed)
        # 204 would do as well, but there are clients that look for 200.
        request.setResponseCode(OK)
        request.setHeader(b"Content-Length", b"0")
        request.finish()
