"""Who reaches a listener, and by which name."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http_headers import Headers
from twisted.web.test.requesthelper import DummyRequest

from lwstwisted import errors
from lwstwisted.access.exposure import loopback_names, stays_on_loopback
from lwstwisted.access.hosts import Hosts
from lwstwisted.errors import Refused


class ExposureTests(SynchronousTestCase):
    """What somebody wrote for --listen, and whether it is reached from elsewhere."""

    def test_descriptions(self) -> None:
        """Loopback is what says so by an address; whatever isn't understood is for everybody."""
        for description, is_private in (
            ("tcp:8080:interface=127.0.0.1", True),
            ("tcp:8080:interface=127.9.9.9", True),
            ("tcp:8080:127.0.0.1", True),
            ("tcp:port=8080:interface=127.0.0.1:backlog=5", True),
            (r"tcp6:8080:interface=\:\:1", True),
            (r"ssl:8443:privateKey=a:certKey=b:interface=127.0.0.1", True),
            (r"haproxy:tcp:8080:interface=127.0.0.1", True),
            ("https:tcp:8080:interface=127.0.0.1", True),
            ("unix:/run/lwstwisted.sock", True),
            ("https:unix:/run/lwstwisted.sock", True),
            ("tcp:8080", False),
            ("tcp:8080:interface=", False),
            ("tcp:8080:interface=0.0.0.0", False),
            ("tcp:8080:0.0.0.0", False),
            (r"tcp6:8080:interface=\:\:", False),
            (r"tcp6:8080:interface=fe80\:\:1%eth0", False),
            ("tcp:8080:interface=192.0.2.1", False),
            ("tcp:8080:interface=localhost", False),
            ("tcp:8080:interface=127.0.0.1.example.org", False),
            ("ssl:8443:privateKey=a:certKey=interface=127.0.0.1", False),
            ("haproxy:tcp:8080", False),
            ("https:haproxy:tcp:443:interface=0.0.0.0", False),
            ("onion:80", False),
            ("fd:3", False),
            ("systemd:domain=INET:name=https", False),  # none was handed over
            ("", False),
        ):
            self.assertIs(stays_on_loopback([description], {}), is_private, description)

    def test_all_of_them_count(self) -> None:
        """One listener for others is enough; none is none."""
        private, public = "tcp:1:interface=127.0.0.1", "tcp:2:interface=0.0.0.0"
        self.assertTrue(stays_on_loopback([private, private], {}))
        self.assertFalse(stays_on_loopback([private, public], {}))
        self.assertTrue(stays_on_loopback([], {}))

    def test_sockets_of_systemd(self) -> None:
        """A real socket is asked where it is bound, by number and by name."""
        folder = tempfile.mkdtemp(prefix="lwstwisted-")
        self.addCleanup(shutil.rmtree, folder)
        for family, address, wanted in (
            (socket.AF_INET, ("127.0.0.1", 0), True),
            (socket.AF_INET, ("0.0.0.0", 0), False),
            (socket.AF_INET6, ("::1", 0), True),
            (socket.AF_INET6, ("::", 0), False),
            (socket.AF_UNIX, str(Path(folder) / "socket"), True),
        ):
            with socket.socket(family) as bound:
                try:
                    bound.bind(address)
                except OSError:  # a machine without IPv6 has no such listener either
                    self.assertIs(family, socket.AF_INET6)
                    continue
                # The first one that systemd hands over is descriptor 3: ours is moved there as far as anybody can see.
                environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(bound.fileno() - 2)}
                environment["LISTEN_FDNAMES"] = ":".join([*("x" * (bound.fileno() - 3)), "web"])
                by_number = f"systemd:domain=INET:index={bound.fileno() - 3}"
                named = "systemd:domain=INET:name=web"
                for description in (by_number, named, f"https:{named}"):
                    self.assertIs(stays_on_loopback([description], environment), wanted, (address, description))
                for description in ("systemd:domain=INET:name=other", "systemd:domain=INET:index=999", "systemd:x=y"):
                    self.assertFalse(stays_on_loopback([description], environment))
                self.assertIn("LISTEN_FDS", environment)  # the listener itself will look for it
                bound.getsockname()  # and it is open still

    def test_names(self) -> None:
        """Those of loopback, and the addresses that are listened on."""
        own = {"localhost", "127.0.0.1", "[::1]"}
        self.assertEqual(loopback_names([], {}), own)
        self.assertEqual(loopback_names(["tcp:1:interface=127.0.0.2", "unix:/a"], {}), own | {"127.0.0.2"})


class HostsTests(SynchronousTestCase):
    """Requests for names that are ours, and for others."""

    def request(self, host: bytes | None, is_unix: bool = False) -> DummyRequest:
        request = DummyRequest([b""])  # type: ignore[no-untyped-call]
        request.requestHeaders = Headers({} if host is None else {b"Host": [host]})
        request.getHost = lambda: UNIXAddress("/a") if is_unix else IPv4Address("TCP", "127.0.0.1", 80)
        return request

    def test_names(self) -> None:
        """With whatever port, in any case and with a dot at the end; nothing is ours that only looks like it."""
        hosts = Hosts(["up.example.org", "[::1]", "127.0.0.1"])
        for host, is_ours in (
            (b"up.example.org", True),
            (b"UP.example.org:8443", True),
            (b"up.example.org.", True),
            (b"[::1]:8443", True),
            (b"127.0.0.1", True),
            (None, True),  # HTTP/1.0, which no browser speaks
            (b"example.org", False),
            (b"up.example.org.evil.example", False),
            (b"evil.example:80@up.example.org", False),
            (b"evil-up.example.org", False),
            (b"127.0.0.2", False),
            (b"localhost", False),
            (b"[::2]", False),
        ):
            if is_ours:
                hosts.require(self.request(host))
            else:
                error = self.assertRaises(Refused, hosts.require, self.request(host))
                self.assertIs(error.refusal, errors.WRONG_HOST, host)
                self.assertEqual(error.refusal.status, 421)

    def test_unix_sockets(self) -> None:
        """No page reaches one, and a proxy that does so calls us anything."""
        Hosts(["localhost"]).require(self.request(b"anything", is_unix=True))

    def test_what_is_no_name(self) -> None:
        """A port, a URL or nothing is refused at the start."""
        for name in ("", "a:80", "https://a", "::1", "a b", "a/", "*.example.org"):
            self.assertRaises(ValueError, Hosts, [name])
