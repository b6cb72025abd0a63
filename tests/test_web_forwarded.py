"""Proxies in front of the service: who is believed, and what of it."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import closing
from http.client import HTTPConnection
from ipaddress import ip_network
from pathlib import Path

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IAddress
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http_headers import Headers

from lwstwisted.web.forwarded import Forwarded
from tests.servers import PATIENCE, serving, twistd, wait_until

PROXIES = [ip_network("127.0.0.0/8"), ip_network("10.1.0.0/16"), ip_network("2001:db8:1::/48")]
PROXY = IPv4Address("TCP", "127.0.0.1", 40000)
STRANGER = IPv4Address("TCP", "192.0.2.99", 40000)


def forwarded(fields: dict[str, str | list[str]], peer: IAddress = PROXY) -> Forwarded:
    headers = Headers({name: [value] if isinstance(value, str) else value for name, value in fields.items()})
    return Forwarded(peer, headers, PROXIES)


def client(fields: dict[str, str | list[str]], peer: IAddress = PROXY) -> str:
    """The host of the client."""
    return str(getattr(forwarded(fields, peer).client, "host", ""))


class ForwardedTests(SynchronousTestCase):
    """Fields that anybody can send are believed from named proxies only."""

    def test_nothing_said(self) -> None:
        """Without the fields the client is who is connected."""
        self.assertEqual(client({}), "127.0.0.1")
        self.assertIsNone(forwarded({}).host)

    def test_said_by_a_proxy(self) -> None:
        """The client's address and the host that it asked for come from the proxy."""
        for fields in (
            {"Forwarded": 'for=192.0.2.60;proto=https;host="up.example:8443"'},
            {"Forwarded": 'For="192.0.2.60:4711" ; Host="up.example:8443"'},
            {"X-Forwarded-For": "192.0.2.60", "X-Forwarded-Host": "up.example:8443"},
        ):
            found = forwarded(fields)
            self.assertEqual(found.client, IPv4Address("TCP", "192.0.2.60", 0), fields)
            self.assertEqual(found.host, b"up.example:8443", fields)

    def test_said_by_a_stranger(self) -> None:
        """Whoever is no proxy of ours can claim what it likes."""
        for fields in (
            {"Forwarded": "for=10.0.0.1;host=up.example"},
            {"X-Forwarded-For": "10.0.0.1", "X-Forwarded-Host": "up.example"},
        ):
            found = forwarded(fields, STRANGER)
            self.assertEqual(found.client, STRANGER)
            self.assertIsNone(found.host)

    def test_the_last_stranger_is_the_client(self) -> None:
        """What a client has written in front of what the proxies add is not believed."""
        for fields in (
            {"X-Forwarded-For": "6.6.6.6, 192.0.2.60, 10.1.2.3"},
            {"X-Forwarded-For": ["6.6.6.6", "192.0.2.60", "10.1.2.3"]},
            {"Forwarded": "for=6.6.6.6;host=evil.example, for=192.0.2.60;host=up.example, for=10.1.2.3"},
            {"Forwarded": "For=6.6.6.6;Host=evil.example;,, for=192.0.2.60;;host=up.example;, ;for=10.1.2.3;"},
            {"Forwarded": ['for=6.6.6.6;host="evil.example"', "for=192.0.2.60;host=up.example", "for=10.1.2.3"]},
        ):
            self.assertEqual(client(fields), "192.0.2.60", fields)
        self.assertEqual(forwarded(fields).host, b"up.example")

    def test_only_proxies(self) -> None:
        """A request that a proxy made itself has that as its client."""
        self.assertEqual(client({"X-Forwarded-For": "10.1.0.9, 10.1.2.3"}), "10.1.0.9")

    def test_both_kinds(self) -> None:
        """A proxy sets one of them, so the other one may be the client's: neither is believed."""
        self.assertEqual(client({"Forwarded": "for=6.6.6.6", "X-Forwarded-For": "192.0.2.60"}), "127.0.0.1")
        self.assertIsNone(forwarded({"Forwarded": "host=evil.example", "X-Forwarded-For": "192.0.2.60"}).host)
        self.assertIsNone(forwarded({"Forwarded": "for=192.0.2.60", "X-Forwarded-Host": "evil.example"}).host)

    def test_hidden_or_nonsense(self) -> None:
        """What is no address ends the search: what stands in front of it is nobody's word."""
        for node in ("unknown", "_hidden", '"_hidden:80"', "", "1.2.3", "999.1.1.1", "[::1", "evil"):
            self.assertEqual(client({"Forwarded": f"for=6.6.6.6, for={node}"}), "127.0.0.1", node)
            self.assertEqual(client({"X-Forwarded-For": f"6.6.6.6, {node}"}), "127.0.0.1", node)

    def test_malformed(self) -> None:
        """A comma in an open quote doesn't make an element of what the client has written."""
        for value in ('for="192.0.2.60', 'for=192.0.2.60, for="x, for=6.6.6.6', "for", "=x", ";;", 'for=6.6.6.6"'):
            self.assertEqual(client({"Forwarded": value}), "127.0.0.1", value)

    def test_ipv6(self) -> None:
        """Addresses of version 6, with brackets and ports, and mapped ones of version 4."""
        mapped = IPv6Address("TCP", "::ffff:127.0.0.1", 1)
        for fields in (
            {"Forwarded": 'for="[2001:db8:cafe::17]:4711"'},
            {"X-Forwarded-For": "2001:db8:cafe::17"},
            {"X-Forwarded-For": "[2001:db8:cafe::17]:4711, 2001:db8:1::5"},
        ):
            self.assertEqual(client(fields), "2001:db8:cafe::17", fields)
            self.assertEqual(client(fields, mapped), "2001:db8:cafe::17", fields)

    def test_unix_socket(self) -> None:
        """A proxy that is connected by a UNIX socket has no address, and isn't believed by one."""
        self.assertEqual(forwarded({"X-Forwarded-For": "6.6.6.6"}, UNIXAddress("/run/x")).client, UNIXAddress("/run/x"))

    def test_many_and_long(self) -> None:
        """A field as long as a head may be is read in a moment, whatever it says."""
        for value in ('for="' + "\\" * 60_000, "for=" + "a" * 60_000, "a=b;" * 15_000, 'x="' + '\\"' * 30_000):
            self.assertEqual(client({"Forwarded": value}), "127.0.0.1")


class ServiceTests(SynchronousTestCase):
    """The service behind a proxy."""

    def ask(self, *options: str) -> tuple[int, dict[str, object]]:
        """Have a page of ``up.example`` delete a file through a proxy. Returns the status, and the line of the log."""
        folder = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, folder)
        log = folder / "access.log"
        asked = [*options, "--access-log", str(log), "--access-log-format", "json"]
        with serving(twistd("--root", folder / "root", "--listen", "tcp:0", *asked), cwd=folder) as server:
            (port,) = server.wait_for_ports()
            with closing(HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as client:
                fields = {"Origin": "https://up.example", "X-Forwarded-For": "192.0.2.60"}
                fields["X-Forwarded-Host"] = "up.example"
                client.request("DELETE", "/files/x", headers=fields)
                status = client.getresponse().status
            wait_until(lambda: log.exists() and log.read_text().endswith("\n"), "the request is in the log")
        return status, json.loads(log.read_text())

    def test_trusted(self) -> None:
        """The page is our own to the user, and the log has the client."""
        status, line = self.ask("--trusted-proxy", "127.0.0.0/8")
        self.assertEqual((status, line["client"]), (404, "192.0.2.60"))

    def test_not_trusted(self) -> None:
        """Without the option anybody could say so: the page is another site's, and the log has who is connected."""
        status, line = self.ask()
        self.assertEqual((status, line["client"]), (403, "127.0.0.1"))
