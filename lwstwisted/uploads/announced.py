"""What the head of a request says of the bytes that are to be stored, whatever protocol brings them."""

from __future__ import annotations

from twisted.web.server import Request

from lwstwisted import errors
from lwstwisted.errors import Refused


def require_length(request: Request) -> None:
    """:raises Refused: ``LENGTH_REQUIRED`` if no content is announced, were it of 0 bytes (RFC 9110 section 8.6)."""
    fields = request.requestHeaders
    if not fields.hasHeader(b"content-length") and not fields.hasHeader(b"transfer-encoding"):
        raise Refused(errors.LENGTH_REQUIRED)


def require_identity(request: Request) -> None:
    """:raises Refused: ``CONTENT_ENCODING`` if the bytes are coded (RFC 9110 section 8.4): they are stored as sent."""
    encodings = request.requestHeaders.getRawHeaders(b"content-encoding") or []
    if any(value.strip().lower() != b"identity" for value in encodings):
        raise Refused(errors.CONTENT_ENCODING)


def media_type(request: Request) -> bytes:
    """The media type of the bytes, without its parameters and in lower case; b"" if it isn't told."""
    return (request.getHeader(b"content-type") or b"").partition(b";")[0].strip().lower()
