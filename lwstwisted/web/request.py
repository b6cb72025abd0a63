"""The request of a :class:`~lwstwisted.web.site.StreamingSite`: twisted.web's own, and what that lacks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import getrandbits
from typing import Any, cast

from twisted.internet.interfaces import IAddress
from twisted.python.failure import Failure
from twisted.web.http import RESPONSES
from twisted.web.http_headers import Headers
from twisted.web.server import Request

from lwstwisted.web.forwarded import Forwarded, is_trusted

_REASONS = {103: b"Early Hints", 104: b"Upload Resumption Supported"}
"""Of interim responses that Twisted doesn't know: RFC 8297, and draft-ietf-httpbis-resumable-upload."""

CONTINUE = 100
CLIENT_CLOSED = 499
"""What the access log says of a request that got no answer because its connection was lost, as nginx' does."""
_SWITCHING_PROTOCOLS = 101

REQUEST_ID = b"X-Request-ID"
_ID = re.compile(rb"[0-9A-Za-z._~+/=-]{1,128}")
"""What of a proxy's ids is taken over: more than any proxy makes, and nothing that a line of a log would trip over."""


@dataclass(slots=True)
class UploadNote:
    """What a request has to do with an upload.

    :ivar protocol: ``put``, ``form``, ``tus`` or ``ietf``.
    :ivar id: of a resumable upload, which other requests are about as well; else "".
    :ivar is_stored: whether this request has made it a file.
    """

    protocol: str
    id: str = ""
    is_stored: bool = False


def note_upload(request: Request, protocol: str, id: str = "") -> None:
    """Note that a request is about an upload, for logs and metrics.

    :param protocol: see :class:`UploadNote`.
    """
    cast(Any, request).upload = UploadNote(protocol, id)


def note_stored(request: Request) -> None:
    """Note that the upload of a request has become a file by it."""
    note: UploadNote | None = getattr(request, "upload", None)
    if note is not None:
        note.is_stored = True


class StreamingRequest(Request):
    """A ``Request`` that can say something before its response, and knows what it took.

    :ivar arrived: when its head was complete, in seconds of the reactor's clock.
    :ivar received: bytes of its body that were delivered.
    :ivar refusal: code of what it was refused with (``errors.py``), or "".
    :ivar upload: the upload that it is about, if any.
    :ivar is_cut: whether its client left before the end of its answer.
    :ivar is_over: whether it was logged.
    """

    arrived = 0.0
    received = 0
    refusal = ""
    upload: UploadNote | None = None
    is_cut = is_over = False
    _id = ""
    _forwarded: Forwarded | None = None

    def forwarded(self) -> Forwarded:
        """What proxies that are believed say of the client."""
        if self._forwarded is None:
            trusted = getattr(self.site, "trusted_proxies", ())
            self._forwarded = Forwarded(self.client, self.requestHeaders, trusted)
        return self._forwarded

    @property
    def id(self) -> str:
        """What it's called in logs, and in its answer: as a proxy that is believed calls it, or by a name of ours."""
        if not self._id:
            told = self.getHeader(REQUEST_ID)
            if told and _ID.fullmatch(told) and is_trusted(self.client, getattr(self.site, "trusted_proxies", ())):
                self._id = told.decode("ascii")
            else:
                self._id = f"{getrandbits(64):016x}"
        return self._id

    def write(self, data: bytes) -> None:
        """See ``Request``; the head of the answer says the id."""
        if not self.startedWriting:
            self.setHeader(REQUEST_ID, self.id.encode("ascii"))  # type: ignore[no-untyped-call]
        super().write(data)  # type: ignore[no-untyped-call]

    def getClientAddress(self) -> IAddress:
        """See ``Request``; behind a proxy that is believed it's the client of that."""
        return self.forwarded().client

    def seconds(self) -> float:
        """How long it took since its head was complete, in seconds to the microsecond."""
        return round(float(cast(Any, self.site).reactor.seconds()) - self.arrived, 6)

    def connectionLost(self, reason: Failure) -> None:
        """See ``Request``; what was cut is in the access log as well."""
        if not self.finished:
            self.is_cut = True
            if not self.startedWriting:
                self.code = CLIENT_CLOSED
            cast(Any, self.site).log(self)
        super().connectionLost(reason)  # type: ignore[no-untyped-call]

    def send_interim(self, status: int, headers: Headers | None = None) -> None:
        """Send an interim response (RFC 9110 section 15.2), as often as you like, before the response begins.

        Nothing is sent where it could not be understood: to an HTTP/1.0 client, or behind the begin of the response.

        :param status: 102 to 199. 100 is sent when a body is accepted, and 101 would change the protocol.
        :param headers: fields of this interim response alone.
        :raises ValueError: for another status.
        """
        if not CONTINUE < status < 200 or status == _SWITCHING_PROTOCOLS:
            raise ValueError(f"{status} is no interim status that a resource may send")
        if self.channel is None or self.startedWriting or self.clientproto != b"HTTP/1.1":
            return
        channel = cast(Any, self.channel)
        channel.send_interim(interim_response(status, headers))


def asked_host(request: Request) -> bytes:
    """The host that the client asked for, with its port, in lower case."""
    told = request.forwarded().host if isinstance(request, StreamingRequest) else None
    return (told or request.getHeader(b"host") or b"").lower()


def interim_response(status: int, headers: Headers | None = None) -> bytes:
    """The bytes of an interim response."""
    reason = _REASONS.get(status) or RESPONSES.get(status, b"Interim")
    fields = [] if headers is None else headers.getAllRawHeaders()
    lines = [b"%b: %b\r\n" % (name, value) for name, values in fields for value in values]
    return b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, reason, b"".join(lines))
