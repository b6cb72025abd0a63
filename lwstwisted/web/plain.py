"""Resources that are only looked at."""

from __future__ import annotations

from collections.abc import Callable

from twisted.web.http import NO_CONTENT
from twisted.web.resource import Resource
from twisted.web.server import Request
from zope.interface import implementer

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.interfaces import IRequestBody, IStreamingResource


@implementer(IStreamingResource)
class Paths(Resource):
    """A resource for some paths, and 404 for all others, in plain text."""

    async def receive(self, request: Request, body: IRequestBody) -> None:
        """See :class:`~lwstwisted.interfaces.IStreamingResource`."""
        raise Refused(errors.NOT_FOUND)

    def getChild(self, path: bytes, request: Request) -> Resource:
        """See ``Resource``."""
        return Paths()  # type: ignore[no-untyped-call]


class ReadOnly(Paths):
    """What is only looked at.

    :param send: makes the answer to GET and HEAD, and finishes it.
    """

    _ALLOWED = b"GET, HEAD, OPTIONS"

    def __init__(self, send: Callable[[Request], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._send = send

    async def receive(self, request: Request, body: IRequestBody) -> None:
        """See :class:`~lwstwisted.interfaces.IStreamingResource`."""
        if request.method in (b"GET", b"HEAD"):
            self._send(request)
        elif request.method == b"OPTIONS":
            request.setResponseCode(NO_CONTENT)
            request.setHeader(b"Allow", self._ALLOWED)
            request.finish()
        else:
            raise Refused(errors.METHOD_NOT_ALLOWED, {b"Allow": self._ALLOWED})


def redirection(target: bytes) -> ReadOnly:
    """A resource that leads to another one."""

    def send(request: Request) -> None:
        request.redirect(target)
        request.setHeader(b"Content-Length", b"0")
        request.finish()

    return ReadOnly(send)


def send_content(request: Request, kind: bytes, data: bytes) -> None:
    """Finish a request with some content.

    :param kind: its media type.
    """
    request.setHeader(b"Content-Type", kind)
    request.setHeader(b"Content-Length", b"%d" % len(data))
    request.setHeader(b"X-Content-Type-Options", b"nosniff")
    request.write(data)
    request.finish()
