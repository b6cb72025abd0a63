"""Who can reach a listener: this machine alone, or others."""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from ipaddress import ip_address

from twisted.python.systemd import ListenFDs

from lwstwisted.tls.options import HTTPS

WRAPPERS = (HTTPS, "haproxy:")
"""What stands in front of another description, and listens on that."""
_END = re.compile(r"(?<!\\):")
_ESCAPED = re.compile(r"\\(.)")


def stays_on_loopback(descriptions: Iterable[str], environment: Mapping[str, str] | None = None) -> bool:
    """Whether nobody beyond this machine reaches any of some listeners.

    A UNIX socket is reached by nobody else, and its folder says by whom. One that systemd hands over is asked where
    it is bound. Whatever isn't known is reached by everybody, as is a name: ``localhost`` is another machine wherever
    somebody says so. A proxy on this machine that hands on what others send is its operator's own decision.

    :param descriptions: of server endpoints.
    :param environment: of this process, which has the sockets of systemd.
    """
    return all(_bound_to(one, environment) is not None for one in descriptions)


def loopback_names(descriptions: Iterable[str], environment: Mapping[str, str] | None = None) -> set[str]:
    """What a browser on this machine has in its address bar when it reaches such listeners, without the port."""
    found = {"localhost", "127.0.0.1", "[::1]"}
    for host in filter(None, (_bound_to(one, environment) for one in descriptions)):
        found.add(f"[{host}]" if ":" in host else host)
    return found


def _bound_to(description: str, environment: Mapping[str, str] | None) -> str | None:
    """The loopback address of a listener, "" for a UNIX socket; None for any other one."""
    for prefix in WRAPPERS:
        if description.startswith(prefix):
            return _bound_to(description.removeprefix(prefix), environment)
    kind, *fields = _END.split(description)
    named = {name: _ESCAPED.sub(r"\1", value) for name, sign, value in (f.partition("=") for f in fields) if sign}
    if kind == "unix":
        return ""
    if kind == "systemd":
        return _inherited(named, environment)
    if kind not in ("tcp", "tcp6", "ssl", "tls"):
        return None
    positional = [field for field in fields if "=" not in field]
    by_position = positional[1] if kind == "tcp" and len(positional) > 1 else ""
    return _loopback(named.get("interface", _ESCAPED.sub(r"\1", by_position)))


def _loopback(host: str) -> str | None:
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return str(address) if address.is_loopback else None


def _inherited(named: Mapping[str, str], environment: Mapping[str, str] | None) -> str | None:
    # A copy: what it has found it takes out of the environment, and the endpoint would find nothing.
    sockets = ListenFDs.fromEnvironment(dict(os.environ if environment is None else environment))
    with suppress(LookupError, ValueError, OSError):
        if "name" in named:
            number = sockets.inheritedNamedDescriptors()[named["name"]]
        else:
            number = sockets.inheritedDescriptors()[int(named["index"])]
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            return None
        with socket.socket(fileno=os.dup(number)) as bound:
            if bound.family == socket.AF_UNIX:
                return ""
            return _loopback(bound.getsockname()[0])
    return None
