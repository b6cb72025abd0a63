"""What becomes of the descriptions of endpoints where a parent listens for its workers."""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet.error import CannotListenError
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.running.sockets import Opening, inherited, listen_environment
from lwstwisted.running.workers import LONGEST_PAUSE, pause_before, summed


class DescriptionTests(SynchronousTestCase):
    """A worker is told the same as its parent, and finds the same sockets."""

    def test_inherited(self) -> None:
        """Only what systemd handed over has another number; TLS and proxies' lines in front of it stay."""
        for description, told in {
            "tcp:8080:interface=127.0.0.1": "tcp:8080:interface=127.0.0.1",
            "systemd:domain=INET:name=http": "systemd:domain=INET:index=2",
            "systemd:domain=INET6:index=0": "systemd:domain=INET6:index=2",
            "https:systemd:domain=INET:name=https": "https:systemd:domain=INET:index=2",
            "https:haproxy:systemd:domain=UNIX:name=x": "https:haproxy:systemd:domain=UNIX:index=2",
            "unix:/run/systemd:x": "unix:/run/systemd:x",
        }.items():
            self.assertEqual(inherited(description, 2), told)

    def test_environment(self) -> None:
        """Sockets of systemd keep their names, which the options are looked up by."""
        told = listen_environment(["tcp:0", "https:systemd:domain=INET:name=web", "systemd:domain=INET:index=0"])
        self.assertEqual(told, {"LISTEN_FDS": "3", "LISTEN_FDNAMES": "listen-0:web:listen-2"})


class OpeningTests(SynchronousTestCase):
    """The parent."""

    def test_clients_wait(self) -> None:
        """A client that comes while nobody accepts is not refused; after the close it is."""
        clock: Any = Clock()
        opening = Opening(clock)
        opening.listen(["tcp:0:interface=127.0.0.1:backlog=7", "tcp:0:interface=127.0.0.1"])
        self.assertEqual(len(opening.ports), 2)
        address = ("127.0.0.1", opening.ports[0].getHost().port)
        with socket.create_connection(address, 10):
            pass
        closing = opening.close()
        for _ in range(2):
            try:
                closing.send(None)
            except StopIteration:
                break
            clock.advance(0)
        with socket.socket() as client:
            self.assertNotEqual(client.connect_ex(address), 0)

    def test_taken(self) -> None:
        """It is told by the parent, before there is a worker."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            opening = Opening(Clock())
            self.assertRaises(CannotListenError, opening.listen, [f"tcp:{port}:interface=127.0.0.1"])


class SumTests(SynchronousTestCase):
    """What a parent makes of its workers."""

    def test_statuses(self) -> None:
        one, other = "3 connections, 2 requests under way", "the disk has failed: 1 connections, 0 requests under way"
        self.assertEqual(summed([one, other, ""]), "4 connections, 2 requests under way")
        self.assertEqual(summed([]), "")

    def test_pauses(self) -> None:
        """At once the first time; then each time longer, up to a limit that has no end."""
        pauses = [pause_before(failures) for failures in range(12)]
        self.assertEqual(pauses[:2], [0.0, 0.0])
        self.assertEqual(pauses, sorted(pauses))
        self.assertGreater(pauses[2], 0)
        self.assertEqual(pauses[-1], LONGEST_PAUSE)
        self.assertEqual(pause_before(5000), LONGEST_PAUSE)
