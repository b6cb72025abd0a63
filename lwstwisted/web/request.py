"""The request of a :class:`~lwstwisted.web.site.StreamingSite`: twisted.web's own, and what that lacks."""

from __future__ import annotations

from typing import Any, cast

from twisted.internet.interfaces import IAddress
from twisted.python.failure import Failure
from twisted.web.http import RESPONSES
from twisted.web.http_headers import Headers
from twisted.web.server import Request

from lwstwisted.web.forwarded import Forwarded

_REASONS = {103: b"Early Hints", 104: b"Upload Resumption Supported"}
"""Of interim responses that Twisted doesn't know: RFC 8297, and draft-ietf-httpbis-resumable-upload."""

CONTINUE = 100
CLIENT_CLOSED = 499
"""What the access log says of a request that got no answer because its connection was lost, as nginx' does."""
_SWITCHING_PROTOCOLS = 101


class StreamingRequest(Request):
    """A ``Request`` that can say something before its response, and knows what it took.

    :ivar arrived: when its head was complete, in seconds of the reactor's clock.
    :ivar received: bytes of its body that were delivered.
    """

    arrived = 0.0
    received = 0
    _forwarded: Forwarded | None = None

    def forwarded(self) -> Forwarded:
        """What proxies that are believed say of the client."""
        if self._forwarded is None:
            trusted = getattr(self.site, "trusted_proxies", ())
            self._forwarded = Forwarded(self.client, self.requestHeaders, trusted)
        return self._forwarded

    def getClientAddress(self) -> IAddress:
        """See ``Request``; behind a proxy that is believed it's the client of that."""
        return self.forwarded().client

    def seconds(self) -> float:
        """How long it took since its head was complete, in seconds to the microsecond."""
        return round(float(cast(Any, self.site).reactor.seconds()) - self.arrived, 6)

    def connectionLost(self, reason: Failure) -> None:
        """See ``Request``; what was cut is in the access log as well."""
        if not self.finished:
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
