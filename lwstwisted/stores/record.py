"""The record of an upload that outlives requests: how much of it is durable, and what it is meant to be.

It begins with digits at fixed places, which one sector of a disk holds: the number of durable bytes, and when that was
noted. A byte follows that is a mark if somebody waits for the upload, and then a line of JSON for each change of the
rest. The last one that is whole counts.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.interfaces import Named, UploadState

_OFFSET, _TIME = 20, 15
"""Digits of the number of durable bytes, and of the milliseconds since the epoch when that was noted."""
_MARK = _OFFSET + 1 + _TIME
_BEHIND = _MARK + 1

_LARGEST = 1024 * 1024
"""Bytes of a record at most: far more than the fields of a request, some times."""


def _write(descriptor: int, data: bytes, at: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, at)
        at, data = at + written, data[written:]


def write_head(record: int, offset: int, now: float) -> None:
    """Note how many bytes are durable, and that this is so since ``now``."""
    _write(record, b"%0*d %0*d" % (_OFFSET, offset, _TIME, max(0, round(now * 1000))), 0)


def add_line(record: int, state: UploadState, lifetime: float) -> int:
    """Note all the rest.

    :returns: how long the record was before, for who has to take it back.
    """
    named = state.named and [state.named.created, state.named.etag]
    found = {"record": state.record, "length": state.length, "lifetime": lifetime, "named": named}
    line = json.dumps(found, ensure_ascii=False).encode() + b"\n"
    # Behind the last whole line: a torn one would swallow this one.
    end = max(_BEHIND, os.pread(record, _LARGEST, 0).rfind(b"\n") + 1)
    if end + len(line) > _LARGEST:
        raise OSError(errno.EFBIG, "the record of an upload is too large")
    try:
        _write(record, line, end)
        os.ftruncate(record, end + len(line))
    except OSError:
        with suppress(OSError):
            os.ftruncate(record, end)
        raise
    return end


def read(record: int) -> tuple[UploadState, float]:
    """What a record says, and the lifetime of the upload.

    :raises Refused: ``UPLOAD_NOT_FOUND``, if it says nothing.
    """
    text = b""
    while text != (text := os.pread(record, _LARGEST, 0)):
        pass  # its holder may have been writing
    for line in reversed(text[_BEHIND:].split(b"\n")[:-1]):
        # After a power cut a line may be torn, and still have its end.
        with suppress(ValueError, TypeError, KeyError):
            found = json.loads(line)
            named = Named(*found["named"]) if found["named"] else None
            expires = int(text[_OFFSET:_MARK]) / 1000 + found["lifetime"]
            state = UploadState(int(text[:_OFFSET]), found["length"], found["record"], expires, named)
            return state, found["lifetime"]
    raise Refused(errors.UPLOAD_NOT_FOUND)


def mark(record: int, is_wanted: bool) -> None:
    """Say to the holder whether somebody waits."""
    _write(record, b"!" if is_wanted else b"\n", _MARK)


def is_marked(record: int) -> bool:
    """Whether somebody waits."""
    return os.pread(record, 1, _MARK) == b"!"
