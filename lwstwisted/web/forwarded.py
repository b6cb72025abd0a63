"""What proxies in front of us say of their clients: ``Forwarded`` (RFC 7239), or ``X-Forwarded-For`` and ``-Host``.

Anybody can send these fields. So they are believed only from networks that the operator has named, and read from the
end: each proxy adds the address that it got a request from, and the last one that isn't a proxy of ours is the client.
Both kinds in one request contradict each other as soon as a proxy sets one and hands on the other, which is the
client's word: then neither is believed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address as IPv4
from ipaddress import IPv4Network, IPv6Network, ip_address
from ipaddress import IPv6Address as IPv6

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import IAddress
from twisted.web.http_headers import Headers

Networks = Sequence[IPv4Network | IPv6Network]

_PAIR = re.compile(r'\s*(?:([!#$%&\'*+.^_`|~0-9a-z-]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s";,]*)))?\s*(;|,|$)', re.IGNORECASE)
_NODE = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+)|([0-9a-fA-F:]+))(?::[0-9]+)?")

Hop = dict[str, str]
"""What one proxy says: ``for``, ``host``, ``proto``, ``by``, as far as it does."""


class Forwarded:
    """What is known of the client of one request.

    :param peer: the other end of the connection.
    :param headers: of the request.
    :param trusted: networks of the proxies that are believed.
    :ivar client: the address of the client, as far as it's known.
    :ivar host: what the client asked for, or None if no proxy tells.
    """

    def __init__(self, peer: IAddress, headers: Headers, trusted: Networks) -> None:
        self.client = peer
        self.host: bytes | None = None
        hops = _hops(headers)
        while hops and is_trusted(self.client, trusted):
            hop = hops.pop()
            if "host" in hop:
                self.host = hop["host"].encode("latin-1")
            address = _address(hop.get("for", ""))
            if address is None:
                break  # hidden on purpose, or nonsense: what is in front of it is nobody's word
            self.client = address


def is_trusted(address: IAddress, trusted: Networks) -> bool:
    """Whether what comes from an address is believed."""
    try:
        host: IPv4 | IPv6 = ip_address(address.host)  # type: ignore[attr-defined]
    except (AttributeError, ValueError):
        return False
    if isinstance(host, IPv6) and host.ipv4_mapped is not None:
        host = host.ipv4_mapped
    return any(host in network for network in trusted)


def _hops(headers: Headers) -> list[Hop]:
    """What each proxy says, in the order in which they got the request."""
    standard = _joined(headers, b"forwarded")
    client, host = _joined(headers, b"x-forwarded-for"), _joined(headers, b"x-forwarded-host")
    if standard is not None:
        return [] if client is not None or host is not None else list(_elements(standard))
    hops: list[Hop] = [{"for": node.strip()} for node in (client or "").split(",")]
    if host is not None:
        hops[-1]["host"] = host.rpartition(",")[2].strip()
    return hops


def _joined(headers: Headers, name: bytes) -> str | None:
    values = headers.getRawHeaders(name)
    return None if values is None else b",".join(values).decode("latin-1")


def _elements(value: str) -> Iterator[Hop]:
    """The elements of a ``Forwarded`` field (RFC 7239 section 4), up to what is none."""
    at, hop = 0, Hop()
    while at < len(value):
        match = _PAIR.match(value, at)
        if match is None:
            yield {}  # whatever stands behind it can't be told from what the client wrote
            return
        name, quoted, token, end = match.groups()
        if name is not None:  # pairs and elements may be empty
            hop[name.lower()] = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else token
        at = match.end()
        if end != ";" and hop:
            yield hop
            hop = Hop()
    if hop:
        yield hop


def _address(node: str) -> IAddress | None:
    """An address without its port; None for an obfuscated or unknown one (RFC 7239 section 6)."""
    match = _NODE.fullmatch(node.strip())
    try:
        host = ip_address("" if match is None else match[1] or match[2] or match[3])
    except ValueError:
        return None
    return (IPv4Address if host.version == 4 else IPv6Address)("TCP", str(host), 0)
