"""``Content-Disposition``: where a request (RFC 6266) or a part of a form (RFC 7578 section 4.2) says a file's name.

Both are written alike. They differ in how a quoted value is to be read, and in which of two names is the one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import unquote_to_bytes

_TOKEN = r"[0-9A-Za-z!#$%&'*+\-.^_`|~]+"
_KIND = re.compile(rf"[ \t]*({_TOKEN})[ \t]*(?=;|$)")
# A quoted value as browsers write it has no backslash escapes, as older clients do it has: both end at the same quote,
# unless a backslash is the last character of a name.
_PARAMETER = re.compile(rf'[ \t]*;[ \t]*({_TOKEN})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))[ \t]*', re.DOTALL)
_EXTENDED = re.compile(
    r"(UTF-8|ISO-8859-1)'[0-9A-Za-z-]*'((?:[0-9A-Za-z!#$&+\-.^_`|~]|%[0-9A-Fa-f]{2})*)", re.IGNORECASE
)
"""RFC 8187 section 3.2.1; ISO-8859-1 is of its predecessor, RFC 5987."""


def parse_disposition(value: str, unquote: Callable[[str], str]) -> tuple[str, dict[str, str]]:
    """Read a ``Content-Disposition``.

    :param unquote: what a quoted value means.
    :returns: its kind and its parameters, the names of both in lower case.
    :raises ValueError: if it can't be read.
    """
    kind = _KIND.match(value)
    if kind is None:
        raise ValueError("no kind of disposition")
    at, found = kind.end(), dict[str, str]()
    while at < len(value):
        parameter = _PARAMETER.match(value, at)
        if parameter is None or parameter[1].lower() in found:
            raise ValueError("parameters that can't be read")
        found[parameter[1].lower()] = parameter[3] if parameter[2] is None else unquote(parameter[2])
        at = parameter.end()
    return kind[1].lower(), found


def decode_extended(value: str) -> bytes:
    """The bytes of an extended value such as ``UTF-8''%e2%82%ac`` (RFC 8187), as UTF-8.

    :raises ValueError: if it is none.
    """
    match = _EXTENDED.fullmatch(value)
    if match is None:
        raise ValueError("no extended value")
    raw = unquote_to_bytes(match[2])
    return raw if match[1].upper() == "UTF-8" else raw.decode("latin-1").encode()
