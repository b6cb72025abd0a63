"""The log of the service: lines of text, or of JSON.

A line is an event, whatever was in its fields. What comes from others is a field of an event and never its format; in
text all but printable characters is escaped, and so are those that a terminal, an editor or a viewer would act upon:
controls, further line ends, and what turns the direction of writing. In JSON everything is that isn't ASCII.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TextIO

from twisted.logger import ILogObserver, LogEvent, formatEvent
from zope.interface import implementer

ACCESS = "lwstwisted.web.accesslog"
"""The namespace of events that are lines of the access log, which are JSON themselves if that was asked for."""

_OF_EVENTS = ("log_", "_")
_FIELD_TYPES = (str, int, float, bool, type(None))


def printable(text: str) -> str:
    """Escape what isn't printable: categories C and Z of Unicode, but for the space."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()


def _when(event: LogEvent) -> str:
    return datetime.fromtimestamp(event["log_time"], UTC).isoformat(timespec="milliseconds")


def _traceback(event: LogEvent) -> str:
    return event["log_failure"].getTraceback().rstrip("\n") if "log_failure" in event else ""


def text_line(event: LogEvent) -> str:
    """An event for people: time, level, namespace and message. A traceback stands below, each line of it indented."""
    level, namespace = event.get("log_level"), event.get("log_namespace", "-")
    message = printable(formatEvent(event))
    line = f"{_when(event)} [{namespace}#{level.name if level else 'info'}] {message}\n"
    below = _traceback(event).split("\n") if "log_failure" in event else ()
    return line + "".join(f"\t{printable(one)}\n" for one in below)


def json_line(event: LogEvent) -> str:
    """An event for programs: time, level, logger and message, and its fields beside them."""
    level, namespace = event.get("log_level"), event.get("log_namespace", "-")
    message = formatEvent(event)
    fields: dict[str, Any] = {
        name: value if isinstance(value, _FIELD_TYPES) else str(value)
        for name, value in event.items()
        if not name.startswith(_OF_EVENTS)
    }
    if namespace == ACCESS and message.startswith("{"):
        fields, message = json.loads(message), "request"
        fields.pop("time")
    if "log_failure" in event:
        fields["traceback"] = _traceback(event)
    ours = {"time": _when(event), "level": level.name if level else "info", "logger": namespace, "message": message}
    return json.dumps(ours | {name: value for name, value in fields.items() if name not in ours}) + "\n"


@implementer(ILogObserver)
class LineObserver:
    """Writes a line for each event.

    :param line: makes it.
    """

    def __init__(self, file: TextIO, line: Callable[[LogEvent], str]) -> None:
        self._file = file
        self._line = line

    def __call__(self, event: LogEvent) -> None:
        """See ``ILogObserver``."""
        if not event.get("log_format") and "log_failure" not in event and not event.get("log_text"):
            return  # nothing is said
        try:
            line = self._line(event)
        except Exception as error:  # a field that can't be written down
            told = {"format": str(event.get("log_format")), "error": repr(error)}
            line = self._line({"log_time": event["log_time"], "log_format": "{format}: {error}", **told})
        try:
            self._file.write(line)
        except UnicodeEncodeError:  # of a terminal that has only some characters
            self._file.write(line.encode("ascii", "backslashreplace").decode())
        self._file.flush()


def text_observer() -> LineObserver:
    """An observer that writes text to standard output, for ``twistd --logger``."""
    return LineObserver(sys.stdout, text_line)


def json_observer() -> LineObserver:
    """An observer that writes JSON to standard output, for ``twistd --logger``."""
    return LineObserver(sys.stdout, json_line)
