"""One line for each request, for people (combined log format) or for programs (JSON)."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from twisted.web.http import combinedLogFormatter, datetimeToLogString
from twisted.web.iweb import IAccessLogFormatter
from twisted.web.server import Request
from zope.interface import provider

from lwstwisted.web.request import StreamingRequest


@provider(IAccessLogFormatter)
def combined_log(timestamp: str, request: Request) -> str:
    """Combined log format with the date of the wall clock: the reactor's clock may be another one.

    :param timestamp: what the factory made of the reactor's clock; not used.
    """
    line: str = combinedLogFormatter(datetimeToLogString(), request)
    return line


@provider(IAccessLogFormatter)
def json_log(timestamp: str, request: Request) -> str:
    """A JSON object in a line: what a client sent is in strings of it, with everything escaped that isn't ASCII.

    :param timestamp: as for :func:`combined_log`.
    """
    ours = request if isinstance(request, StreamingRequest) else None
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "client": getattr(request.getClientAddress(), "host", None),
        "method": _text(request.method),
        "target": _text(request.uri),
        "protocol": _text(request.clientproto),
        "status": request.code,
        "received": None if ours is None else ours.received,
        "sent": request.sentLength,
        "seconds": None if ours is None else ours.seconds(),
        "referer": _text(request.getHeader(b"referer")),
        "agent": _text(request.getHeader(b"user-agent")),
    }
    return json.dumps(line)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "backslashreplace")
