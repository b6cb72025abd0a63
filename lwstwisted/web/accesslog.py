"""One line for each request, for people (combined log format) or for programs (JSON).

Each line has the id of its request, and of the resumable upload that it is about: all requests of one upload, and all
that a proxy in front, or a client, says of a request, are found by these. All that is not printable ASCII is escaped.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime

from twisted.logger import Logger
from twisted.web.http import combinedLogFormatter, datetimeToLogString
from twisted.web.iweb import IAccessLogFormatter
from twisted.web.server import Request
from zope.interface import provider

from lwstwisted.logs import ACCESS
from lwstwisted.web.request import StreamingRequest

_log = Logger(ACCESS)


@provider(IAccessLogFormatter)
def combined_log(timestamp: str, request: Request) -> str:
    """Combined log format with the date of the wall clock: the reactor's clock may be another one.

    Behind its fields are two more, in quotes: the id of the request, and that of its upload, or a dash.

    :param timestamp: what the factory made of the reactor's clock; not used.
    """
    line: str = combinedLogFormatter(datetimeToLogString(), request)
    if not isinstance(request, StreamingRequest):
        return line
    return f'{line} "{request.id}" "{(request.upload and request.upload.id) or "-"}"'


@provider(IAccessLogFormatter)
def json_log(timestamp: str, request: Request) -> str:
    """A JSON object in a line: what a client sent is in strings of it, with everything escaped that isn't ASCII.

    :param timestamp: as for :func:`combined_log`.
    """
    ours = request if isinstance(request, StreamingRequest) else None
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": None if ours is None else ours.id,
        "upload": (ours and ours.upload and ours.upload.id) or None,
        "client": getattr(request.getClientAddress(), "host", None),
        "method": _text(request.method),
        "target": _text(request.uri),
        "protocol": _text(request.clientproto),
        "status": request.code,
        "refusal": (ours and ours.refusal) or None,
        "received": None if ours is None else ours.received,
        "sent": request.sentLength,
        "seconds": None if ours is None else ours.seconds(),
        "referer": _text(request.getHeader(b"referer")),
        "agent": _text(request.getHeader(b"user-agent")),
    }
    return json.dumps(line)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "backslashreplace")


class AccessLog:
    """A file with lines, for whoever else appends to it as well: each is one call of write(2).

    :raises OSError: if it can't be opened.
    """

    def __init__(self, path: str | bytes) -> None:
        self._path = path
        self._file = self._opened()

    def _opened(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def write(self, line: str) -> None:
        """Append a line.

        :raises OSError: if it can't be, or not as a whole.
        """
        data = line.encode("ascii", "backslashreplace")
        if os.write(self._file, data) < len(data):
            raise OSError("the line was cut")

    def reopen(self) -> None:
        """Go on in a new file, if somebody has moved the old one away; in the old one, if there can't be a new one.

        :raises OSError: if there can't.
        """
        new = self._opened()
        os.close(self._file)
        self._file = new

    def close(self) -> None:
        """Append nothing any more."""
        os.close(self._file)


class AccessEvents:
    """Lines that are events of the log of the service."""

    def write(self, line: str) -> None:
        """Log a line."""
        _log.info("{line}", line=line.rstrip("\n"))

    def close(self) -> None:
        """Nothing is open."""
