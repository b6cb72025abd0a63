"""The way in of a service, as its options say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from lwstwisted.access.admission import Access, IdentityOf, nobody
from lwstwisted.access.entrance import Entrance
from lwstwisted.access.exposure import loopback_names, stays_on_loopback
from lwstwisted.access.files import RereadFile
from lwstwisted.access.hosts import Hosts
from lwstwisted.access.signing import parse_keys


def entrance_of(
    options: Mapping[str, Any], reactor: Any, network_of: Callable[[Any], str], identity_of: IdentityOf = nobody
) -> Entrance:
    """Build it.

    :param options: parsed; see :class:`~lwstwisted.access.options.AccessOptions`.
    :param network_of: what is slowed down together, by the address of a client.
    :param identity_of: see :class:`~lwstwisted.access.admission.Access`.
    :raises OSError: if the keys can't be read.
    :raises ValueError: if they can't be understood.
    """
    hosts = Hosts(options["hosts"]) if options["hosts"] else None
    path = options["signing-keys"]
    if options["allow"] or path:
        keys = None
        if path:
            try:
                keys = RereadFile(path, parse_keys, is_secret=True)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        access = Access(options["rules"], reactor, options["auth"], keys, identity_of, network_of)
        return Entrance(access, hosts)
    is_ours = not options["anonymous"] and not options["trusted-proxies"]
    if hosts is None and is_ours and stays_on_loopback(options["listen"]):
        names = loopback_names(options["listen"])
        if (public := urlsplit(options["public-url"]).hostname) is not None:
            names.add(f"[{public}]" if ":" in public else public)
        hosts = Hosts(names)
    return Entrance(None, hosts)
