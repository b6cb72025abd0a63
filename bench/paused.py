"""What a pause costs: uploads that wait with plaintext inside OpenSSL, where the kernel cannot see it.

Each of many connections sends an upload in full. Its protocol pauses inside the first delivery, which is smaller than
a record, so the rest of that record is decrypted and stays behind, and so does the ciphertext after it. Then nobody
does anything. A loop that knew of pending input and could not get rid of it would spin; ours should sleep. What it
may wake up for are timers: the transport looks now and then whether the peer of a paused connection is still there.

Memory is the growth of the server's resident set for each connection, its unread ciphertext included.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from twisted.internet.protocol import Factory, Protocol

from bench.processes import RECORD, Uploader, certificate, cpu_seconds, hear, print_table, process, server_context
from lwstwisted.loop.presence import LOOK_INTERVAL
from lwstwisted.loop.reactor import LwsReactor
from lwstwisted.loop.tls import TLSFactory, TLSPort

CONNECTIONS = 1000
UPLOAD = 4 * RECORD
"""Plaintext bytes that each connection sends. All of it must fit into one read of the server."""

BUDGET = 4096
"""Bytes of the delivery that pauses: less than a record."""

SECONDS = 2.0
"""Of silence. Shorter than the interval in which paused peers are looked at, unless asked for."""

DESCRIPTORS = 2 * CONNECTIONS + 100


class Pausing(Protocol):
    """Pauses inside its first delivery, for good."""

    factory: PausingFactory

    def dataReceived(self, data: bytes) -> None:
        transport: Any = self.transport
        transport.pauseProducing()
        self.factory.paused += 1
        self.factory.bytes += len(data)
        if self.factory.paused == self.factory.connections:
            self.factory.all_paused()


class PausingFactory(Factory):
    """Tells when all connections have paused."""

    noisy = False
    paused = bytes = 0

    def __init__(self, connections: int, all_paused: Callable[[], object]) -> None:
        self.connections = connections
        self.all_paused = all_paused

    def buildProtocol(self, addr: object) -> Pausing:
        pausing = Pausing()
        pausing.factory = self
        return pausing


def resident() -> int:
    """Bytes of memory that this process has now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def allow_descriptors() -> None:
    """Have this process open more descriptors than is usual."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(DESCRIPTORS, hard), hard))


def serve(pipe: Connection, pem: Path, connections: int, seconds: float) -> None:
    """The process of the server; tells its port, and in the end what the silence cost."""
    allow_descriptors()
    LwsReactor.install()
    from twisted.internet import reactor

    running: Any = reactor

    def look() -> tuple[Any, float, float, float]:
        return running.statistics(), cpu_seconds(), time.monotonic(), resident()

    def begin() -> None:
        # Once more than the loop needs to finish the turn that paused the last one.
        began = look()
        running.callLater(seconds, lambda: pipe.send((empty, began, look(), factory.bytes)))

    factory = PausingFactory(connections, lambda: running.callLater(0.5, begin))
    wrapped = TLSFactory(server_context(pem), False, factory, running, BUDGET)
    port: Any = TLSPort(0, wrapped, connections, "127.0.0.1", running)
    port.startListening()
    empty = resident()
    pipe.send(port.getHost().port)
    running.run()


def connect_all(pipe: Connection, port: int, pem: Path, connections: int) -> None:
    """The process of the clients: each sends its upload whole, and waits."""
    allow_descriptors()
    clients = []
    for _ in range(connections):
        client = Uploader(port, pem)
        client.send(bytes(UPLOAD))
        clients.append(client)
    pipe.send("sent")
    pipe.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args()
    with (
        certificate() as pem,
        process(serve, pem, options.connections, options.seconds, is_server=True) as server,
        process(connect_all, hear(server), pem, options.connections) as clients,
    ):
        hear(clients)
        empty, began, ended, delivered = hear(server)
    (before, cpu_before, time_before, _), (after, cpu_after, time_after, memory) = began, ended
    cpu, elapsed = cpu_after - cpu_before, time_after - time_before
    looks = options.connections if options.seconds >= LOOK_INTERVAL else 0
    rows = [
        ["connections paused with leftovers", str(after.parked), str(options.connections)],
        ["bytes delivered before the pauses", str(delivered), str(options.connections * BUDGET)],
        ["synthesised reads", str(after.synthesised_reads - before.synthesised_reads), "0"],
        ["pending readers", str(after.pending), "0"],
        ["turns of the loop", str(after.turns - before.turns), f"1 (a timer ends the silence), {looks} looks"],
        ["CPU", f"{cpu / elapsed:.2%}", "0 %"],
        ["memory for a connection", f"{(memory - empty) / options.connections / 1024:.0f} KiB", "-"],
    ]
    print(f"{options.connections} uploads of {UPLOAD // 1024} KiB each, {elapsed:.1f} s of silence")
    print_table(["", "measured", "target"], rows)


if __name__ == "__main__":
    main()
