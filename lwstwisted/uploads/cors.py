"""Pages of other origins that upload (CORS, https://fetch.spec.whatwg.org/#http-cors-protocol).

A browser lets a page speak to another server only as far as that allows it. Here pages may begin resumable uploads,
at ``/uploads/`` and at the place of a file, continue them, and read all that the two protocols say, in refusals too.
Files they can't read. What keeps that harmless:

* No answer allows credentials, so no cookie, password or certificate of a user goes along with such a request. A page
  that has a token of its own, or a signed URL, may send that: it got it from somebody, and not from the browser.
* The protocols have fields that a plain form can't send, so a browser asks by a preflight first.
* An upload of another origin never replaces a file. That it is refused tells its page that there is one.
* ``Access-Control-Allow-Private-Network`` is never sent. Browsers that know of it then keep pages of the internet
  off a service that is inside a network.
"""

from __future__ import annotations

from collections.abc import Sequence

from twisted.web.server import Request

from lwstwisted.errors import Refused
from lwstwisted.uploads import tus
from lwstwisted.uploads.origin import require_own_origin

ANY = "*"

MAX_AGE = 24 * 3600
"""Seconds that a browser may remember what was allowed: Firefox takes no more, others less."""

_ALLOWED = (
    *tus.REQUEST_FIELDS,
    b"Authorization",
    b"Content-Digest",
    b"Content-Disposition",
    b"Content-Type",
    b"If-Match",
    b"If-None-Match",
    b"If-Unmodified-Since",
    b"Repr-Digest",
    b"Upload-Complete",
    b"Upload-Draft-Interop-Version",
    b"Upload-Incomplete",
    b"Want-Repr-Digest",
    b"X-Request-ID",
    b"X-Requested-With",
)
"""Fields of requests; the last two are what tus-js-client and many frameworks add."""

_EXPOSED = (
    *tus.RESPONSE_FIELDS,
    b"Accept-Patch",
    b"Content-Location",
    b"ETag",
    b"Location",
    b"Repr-Digest",
    b"Upload-Complete",
    b"Upload-Draft-Interop-Version",
    b"Upload-Incomplete",
    b"Upload-Limit",
)
"""Fields of answers that a page may read beside those that it always may."""


class CrossOrigin:
    """Which pages may upload from elsewhere.

    :param allowed: origins such as ``https://example.org``, or :data:`ANY`; none: only our own.
    """

    def __init__(self, allowed: Sequence[str] = (ANY,)) -> None:
        self._allows_any = ANY in allowed
        self._allowed = {origin.lower().encode("ascii") for origin in allowed}

    def tell(self, request: Request) -> None:
        """Set the fields that each answer to a page has, be it a refusal."""
        if not self._allows_any:
            request.setHeader(b"Vary", b"Origin")
        if self._allows(request):
            origin = request.getHeader(b"origin") or b""
            request.setHeader(b"Access-Control-Allow-Origin", b"*" if self._allows_any else origin)
            request.setHeader(b"Access-Control-Expose-Headers", b", ".join(_EXPOSED))

    def tell_allowed(self, request: Request, methods: Sequence[bytes]) -> None:
        """Set the fields of an answer to a preflight."""
        if self._allows(request):
            request.setHeader(b"Access-Control-Allow-Methods", b", ".join(methods))
            request.setHeader(b"Access-Control-Allow-Headers", b", ".join(_ALLOWED))
            request.setHeader(b"Access-Control-Max-Age", b"%d" % MAX_AGE)

    def restrain(self, request: Request, has_preflight: bool) -> None:
        """Refuse a request of another origin that may not be, and let one that may replace nothing.

        :param has_preflight: whether the request has what no page can send without a preflight.
        :raises Refused: ``CROSS_ORIGIN``.
        """
        try:
            require_own_origin(request)
        except Refused:
            if not (has_preflight and self._allows(request)):
                raise
            request.requestHeaders.setRawHeaders(b"if-none-match", [b"*"])

    def _allows(self, request: Request) -> bool:
        origin = request.getHeader(b"origin")
        return origin is not None and (self._allows_any or origin.lower() in self._allowed)
