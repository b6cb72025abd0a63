"""A request path becomes a checked name, or a refusal.

A path is never normalised in silence: whoever sends ``a//b`` or ``a/../b`` means something that
two parties may read differently (a proxy's access rule here, our file system there), so it is
refused. The one exception is Unicode: the same é may be sent composed or decomposed, no user can
see which, and it has to be one file; the name is its NFC form.

Pure, and the only place where bytes of a path become text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.interfaces import Name

STATE_FOLDER = ".lwstwisted"
"""The store's own folder beneath its root. Reserved in any case, as file systems may fold case."""

SEGMENT_LIMIT = 255
"""Bytes of UTF-8 in a segment: NAME_MAX of Linux and of its common file systems."""

PATH_LIMIT = 4095
"""Bytes of a whole path with its slashes: PATH_MAX of Linux, less the closing NUL."""

# Percent-encoded once more, or a separator that came in encoded: "%2e%2e", "a%2fb" and "a\b" are paths
# to some other reader. A '%' that nobody could decode is an ordinary character.
_AMBIGUOUS = re.compile(rb"[/\\]|%[0-9A-Fa-f]{2}")

# C0, DEL, C1, and the two separators that end a line for some readers of logs and listings.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")

# Some servers cut ";parameters" off a segment before they look for dots.
_DOTS = re.compile(r"\.{1,2}(;.*)?")


def parse_name(segments: Sequence[bytes]) -> Name:
    """Check the path of a file or folder beneath a store's root.

    :param segments: what is left of the path below the mount point (``request.postpath``): split at
        slashes, percent-decoded once. An empty sequence is the root.
    :returns: the segments as text in NFC.
    :raises Refused: one of ``errors.NAME_*``.
    """
    name = tuple([_parse_segment(segment) for segment in segments])
    if name and name[0].casefold() == STATE_FOLDER:
        raise Refused(errors.NAME_RESERVED)
    if len("/".join(name).encode()) > PATH_LIMIT:
        raise Refused(errors.NAME_TOO_LONG)
    return name


def _parse_segment(segment: bytes) -> str:
    if not segment:
        raise Refused(errors.NAME_EMPTY)
    if _AMBIGUOUS.search(segment):
        raise Refused(errors.NAME_ENCODING)
    try:
        # The strict decoder refuses overlong forms and surrogates too.
        text = unicodedata.normalize("NFC", segment.decode())
    except UnicodeDecodeError:
        raise Refused(errors.NAME_ENCODING) from None
    if _CONTROL.search(text):
        raise Refused(errors.NAME_CONTROL)
    # After NFC, which turns U+037E, the Greek question mark, into a semicolon.
    if _DOTS.fullmatch(text):
        raise Refused(errors.NAME_DOTS)
    # After NFC too, which lengthens some characters.
    if len(text.encode()) > SEGMENT_LIMIT:
        raise Refused(errors.NAME_TOO_LONG)
    return text
