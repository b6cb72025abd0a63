"""What a refused client is told, and whether it has read it."""

from __future__ import annotations

import fcntl
import json
import socket
import sys
import termios
from contextlib import suppress
from typing import Any, cast

from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper
from twisted.python.failure import Failure
from twisted.web.http import RESPONSES, datetimeToString
from twisted.web.server import Request

from lwstwisted import errors
from lwstwisted.errors import BodyCut, BodyStopped, Refusal, Refused

UNSENT = 128 * 1024
"""Bytes that wait in the kernel for room on the line: two slices of an answer, so that it never idles."""

_REASONS = {460: b"Checksum Mismatch"}
"""Of statuses that Twisted doesn't know: tus 1.0."""

_ACKNOWLEDGED = slice(120, 128)
"""tcpi_bytes_acked in struct tcp_info (linux/tcp.h)."""

_log = Logger()


def answer_refusal(request: Request, refused: Refused) -> None:
    """Make a refusal the response to ``request``. One that has begun is cut, so that it can't pass for whole."""
    if request.startedWriting:
        request.channel.forceAbortClient()
        return
    refusal = refused.refusal
    cast(Any, request).refusal = refusal.code
    kind, content = b"text/plain; charset=utf-8", refusal.sentence.encode() + b"\n"
    if refusal.problem:
        problem = {"type": refusal.problem, "title": refusal.sentence, "status": refusal.status, **refused.members}
        kind, content = b"application/problem+json", json.dumps(problem).encode() + b"\n"
    request.setResponseCode(refusal.status, RESPONSES.get(refusal.status) or _REASONS.get(refusal.status, b"Refused"))
    request.setHeader(b"Content-Type", kind)
    request.setHeader(b"Content-Length", b"%d" % len(content))
    request.setHeader(b"X-Content-Type-Options", b"nosniff")
    for name, value in refused.headers.items():
        request.setHeader(name, value)
    request.write(content)
    request.finish()


def unread_bytes(transport: Any) -> int:
    """How many bytes the kernel holds that the peer has not taken (tcp(7), SIOCOUTQ).

    :param transport: a transport, or protocols wrapped around one.
    """
    try:
        count = fcntl.ioctl(_socket_beneath(transport), termios.TIOCOUTQ, bytes(4))
    except (AttributeError, TypeError, OSError):
        return 0  # no socket, or no longer one
    return int.from_bytes(count, sys.byteorder)


def bytes_read(transport: Any) -> int:
    """How many bytes the peer has acknowledged, from any origin: only differences mean something.

    :param transport: as for :func:`unread_bytes`.
    """
    with suppress(AttributeError, OSError):
        told = _socket_beneath(transport).getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKNOWLEDGED.stop)
        if len(told) == _ACKNOWLEDGED.stop:
            return int.from_bytes(told[_ACKNOWLEDGED], sys.byteorder)
    return -unread_bytes(transport)  # of a UNIX socket


def limit_unsent(transport: Any) -> None:
    """Let the kernel hold at most :data:`UNSENT` bytes that could not be sent yet (tcp(7), TCP_NOTSENT_LOWAT).

    Else it takes megabytes for each client that doesn't read. What is under way on a long line isn't limited.

    :param transport: as for :func:`unread_bytes`.
    """
    with suppress(AttributeError, OSError):
        _socket_beneath(transport).setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)


def _socket_beneath(transport: Any) -> Any:
    while isinstance(transport, ProtocolWrapper):
        transport = transport.transport
    return transport.getHandle()


def refusal_for(reason: Failure, request: Request) -> Refused:
    """What to answer to a failure; one that is nobody's declared refusal is ours, and is logged."""
    if isinstance(reason.value, Refused):
        return reason.value
    if not isinstance(reason.value, (BodyCut, BodyStopped)):
        id = getattr(request, "id", "-")
        _log.failure("a request failed in an unforeseen way ({id})", failure=reason, id=id)
    return Refused(errors.INTERNAL)


def bare_answer(refusal: Refusal) -> bytes:
    """The bytes of a refusal where there is no request to make it on."""
    sentence = refusal.sentence.encode() + b"\n"
    return (
        b"HTTP/1.1 %d %b\r\nDate: %b\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n"
        b"X-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n%b"
        % (refusal.status, RESPONSES.get(refusal.status, b"Refused"), datetimeToString(), len(sentence), sentence)
    )
