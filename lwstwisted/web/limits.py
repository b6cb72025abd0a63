"""What one client may take of a server: bytes, time and connections."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite

MAX_LENGTH = 2**63 - 1
"""Bytes of a body; what file systems and file offsets can say."""

_MAY_BE_ZERO = {"body_bytes", "body_rate", "chunk_extension_bytes", "connections_per_address", "trailer_bytes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a :class:`~lwstwisted.web.site.StreamingSite`; times in seconds. None of the times runs while we pause.

    :ivar line_bytes: of the request target, or of a header line; RFC 9112 section 3 wants 8000 at least.
    :ivar header_lines: Apache's default.
    :ivar head_bytes: of a whole head. nginx and Apache allow 32 KiB and more; cookies fill it, uploads do not.
    :ivar chunk_extension_bytes: in one body; nobody uses them but attackers.
    :ivar trailer_bytes: of a chunked body: a few digests.
    :ivar body_bytes: of any request; an upload may have a smaller limit of its own.
    :ivar handshake_time: from the connect until TLS is agreed.
    :ivar head_time: for a whole head, from its first byte; a byte now and then does not extend it.
    :ivar body_time: without a byte of the body, while we want one (nginx' client_body_timeout).
    :ivar body_rate: bytes per second of a body at least, 0 for none: less than any modem, more than an attacker
        wants to spend on thousands of connections.
    :ivar body_rate_time: over which the rate is averaged; the first such span is not judged.
    :ivar idle_time: between requests (nginx' keepalive_timeout).
    :ivar unread_time: in which a client has to read of its answer what ``body_rate`` brings in that time, or all.
    :ivar linger_time: for reading an early answer, while the rest of the body is thrown away.
    :ivar close_time: from the decision to close until the connection is aborted: a TLS peer may never say goodbye.
    :ivar requests: on one connection (nginx' keepalive_requests): what a request may leave behind is freed then.
    :ivar connections: of all clients. One costs a descriptor and 5 KiB of memory, with TLS 30 KiB, of which 24 are
        OpenSSL's; from the begin of an upload on 10 and 35 KiB (10,000 that drip), and more while it is fast.
    :ivar connections_per_address: of one IPv4 address or one IPv6 /64, which is what a customer gets; 0 for no such
        limit, as behind a proxy that doesn't tell the address of its clients.
    """

    line_bytes: int = 8 * 1024
    header_lines: int = 100
    head_bytes: int = 32 * 1024
    chunk_extension_bytes: int = 4 * 1024
    trailer_bytes: int = 8 * 1024
    body_bytes: int = MAX_LENGTH
    handshake_time: float = 10.0
    head_time: float = 10.0
    body_time: float = 60.0
    body_rate: int = 1024
    body_rate_time: float = 30.0
    idle_time: float = 75.0
    unread_time: float = 30.0
    linger_time: float = 2.0
    close_time: float = 10.0
    requests: int = 10_000
    connections: int = 10_000
    connections_per_address: int = 1_000

    def __post_init__(self) -> None:
        """:raises ValueError: for a limit under which nothing could be served."""
        for field in fields(self):
            may_be_zero = field.name in _MAY_BE_ZERO
            value = getattr(self, field.name)
            if not isfinite(value) or value < (0 if may_be_zero else 1e-3):
                raise ValueError(f"{field.name} is a number above 0{', or 0' if may_be_zero else ''}")


DEFAULT_LIMITS = Limits()
"""For a hostile network."""
