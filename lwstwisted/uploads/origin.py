"""Requests that a page of another site has made a browser send (cross-site request forgery).

A browser sends a form of any page to any server that it reaches, with whatever lets its user in there: cookies, a
password, or only a place inside a network. It also says where the request comes from, and a page can't change that.
Programs that are no browsers say nothing, and have no user to be abused.

What this can't see is a name that leads to us though it isn't ours (DNS rebinding): to the browser, a page of that name
is our own. ``access/hosts.py`` keeps those out, or a proxy in front that knows its names and hands the Host field on.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from twisted.web.server import Request

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.web.request import asked_host

_OWN_SITES = (b"same-origin", b"none")  # "none" is the user, by an address bar or a bookmark


def require_own_origin(request: Request) -> None:
    """Refuse a request of another origin.

    :raises Refused: ``CROSS_ORIGIN``, by ``Sec-Fetch-Site`` (Fetch Metadata, section 2.4) or, of a browser without it,
        where ``Origin`` (RFC 6454 section 7) isn't the host that was asked.
    """
    site = request.getHeader(b"sec-fetch-site")
    origin = request.getHeader(b"origin")
    if site is not None:
        is_own = site in _OWN_SITES
    else:
        is_own = origin is None or _host_of(origin) == asked_host(request)
    if not is_own:
        raise Refused(errors.CROSS_ORIGIN)


def _host_of(origin: bytes) -> bytes | None:
    """Host and port as a Host field has them; None for an origin without, such as ``null``."""
    try:
        return urlsplit(origin.lower()).netloc or None
    except ValueError:
        return None
