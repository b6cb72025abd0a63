"""The names by which browsers may know this server.

A page of ``evil.example`` may have that name lead to 127.0.0.1 (DNS rebinding): for the browser, what it gets from here
is then of the page's own origin, and no rule about other origins helps. What the page can't change is the Host field.

The names of a server that others reach are its operator's to say. Where they aren't, a server without access rules that
only this machine reaches (a developer's) goes by the names of loopback: there is nothing else that keeps a page out.
With a proxy in front the Host field is that proxy's name for us, or what it was asked for: whoever puts one there says
either which names those are, or which proxies are believed (whose ``X-Forwarded-Host`` counts then, as everywhere).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from twisted.internet.address import UNIXAddress
from twisted.web.server import Request

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.web.request import asked_host

_NAME = re.compile(r"[0-9A-Za-z_-]+(?:\.[0-9A-Za-z_-]+)*|\[[0-9A-Fa-f:.]+\]")
_PORT = re.compile(rb":[0-9]*$")


class Hosts:
    """Names that lead here, for whatever port.

    :param names: of hosts; IPv6 addresses in brackets.
    :raises ValueError: for one that is none.
    """

    def __init__(self, names: Iterable[str]) -> None:
        found = list(names)
        for name in found:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no host name, without a port; IPv6 addresses are in brackets")
        self._names = {name.lower().encode("ascii") for name in found}

    def require(self, request: Request) -> None:
        """Refuse a request for another server.

        No page sends a request without Host, or on a UNIX socket.

        :raises Refused: ``WRONG_HOST``.
        """
        asked = asked_host(request)
        name = _PORT.sub(b"", asked).removesuffix(b".")
        if asked and name not in self._names and not isinstance(request.getHost(), UNIXAddress):
            raise Refused(errors.WRONG_HOST)
