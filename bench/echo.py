"""How long a quiet connection waits beside busy uploads.

Uploads run at full speed into a sink, and beside them one connection on the same loop plays ping-pong with 64 bytes.
The server is ours with several budgets (what one connection may take in one turn), and stock Twisted.

There may be two processors only, and then the uploaders crowd the client of the echo out. So there are two figures:
until the client sees the answer, and until the answer has arrived at the client's socket, by the kernel's time
stamp. The second is what the server made it wait. The target is for that one, at the default budget.
"""

from __future__ import annotations

import argparse
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from bench.processes import (
    MIB,
    Uploader,
    certificate,
    hear,
    print_table,
    process,
    server_context,
    upload_without_end,
)
from lwstwisted.interfaces import IBufferReceiver
from lwstwisted.loop import tls
from lwstwisted.loop.reactor import LwsReactor

UPLOADS = 4
PING = 64
"""Bytes."""

SECONDS = 5.0
"""For how long each figure is gathered."""

BUDGETS = (64, 128, 256, 1024)
"""KiB. Both buffers grow with one above the default, or it would have no effect."""

SO_TIMESTAMPNS = 35
"""From Linux' asm-generic/socket.h; Python's ``socket`` does not name it."""

TARGET = 15.0
"""Milliseconds: 99 of 100 answers beside the uploads, at the default budget."""


@implementer(IBufferReceiver)
class Sink(Protocol):
    """Takes bytes and forgets them."""

    def dataReceived(self, data: bytes) -> None:
        pass

    def bufferReceived(self, view: memoryview) -> None:
        pass


class Echo(Protocol):
    """Sends back what it gets."""

    def dataReceived(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)


def serve(pipe: Connection, pem: Path, budget: int | None) -> None:
    """The process of the server.

    :param budget: bytes; None is stock Twisted.
    """
    if budget is None:
        from twisted.internet import epollreactor

        epollreactor.install()
    else:
        LwsReactor.install()
        if budget > tls.READ_BUDGET:
            tls.READ_BUDGET = budget
            tls._ciphertext = memoryview(bytearray(budget))
    from twisted.internet import reactor

    running: Any = reactor
    context = server_context(pem)
    ports = []
    for protocol in (Sink, Echo):
        factory = Factory.forProtocol(protocol)
        factory.noisy = False
        if budget is None:
            port = running.listenSSL(0, factory, context, interface="127.0.0.1")
        else:
            wrapped = tls.TLSFactory(context, False, factory, running, budget)
            port = tls.TLSPort(0, wrapped, 50, "127.0.0.1", running)
            port.startListening()
        ports.append(port.getHost().port)
    pipe.send(ports)
    running.run()


class Pinger(Uploader):
    """The client of the echo."""

    def __init__(self, port: int, pem: Path) -> None:
        super().__init__(port, pem)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)

    def round_trip(self) -> tuple[float, float]:
        """One ping.

        :returns: seconds until the answer was seen, and until it had arrived.
        """
        # The kernel's stamps are of this clock.
        began = time.clock_gettime(time.CLOCK_REALTIME)
        self.send(bytes(PING))
        left = PING
        arrived = began
        while left:
            data, ancillary, _, _ = self._socket.recvmsg(1 << 16, 64)
            assert data, "the server has closed"
            for level, kind, stamp in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
                    seconds, nanoseconds = struct.unpack("ll", stamp)
                    arrived = seconds + nanoseconds / 1e9
            self._incoming.write(data)
            left -= self.plaintext()
        return time.clock_gettime(time.CLOCK_REALTIME) - began, arrived - began


def ping(pipe: Connection, port: int, pem: Path) -> None:
    """The process of the echo's client: told a number of seconds, it says what the round trips took."""
    pinger = Pinger(port, pem)
    pinger.round_trip()
    while True:
        seconds = pipe.recv()
        end = time.monotonic() + seconds
        found = []
        while time.monotonic() < end:
            found.append(pinger.round_trip())
        pipe.send(found)


def percentiles(seconds: Sequence[float]) -> list[float]:
    """The median, the 99th percentile and the longest, in milliseconds."""
    ordered = sorted(seconds)
    return [1000 * ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.99, 1)]


def measure(pem: Path, budget: int | None, uploads: int, seconds: float) -> list[list[tuple[float, float]]]:
    """Round trips without uploads, and beside them."""
    with ExitStack() as stack:
        server = stack.enter_context(process(serve, pem, budget, is_server=True))
        sink, echo = hear(server)
        client = stack.enter_context(process(ping, echo, pem))
        client.send(seconds / 2)
        alone = hear(client)
        uploaders = [stack.enter_context(process(upload_without_end, sink, pem)) for _ in range(uploads)]
        for uploader in uploaders:
            hear(uploader)
        client.send(seconds)
        return [alone, hear(client)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--uploads", type=int, default=UPLOADS)
    parser.add_argument("--budgets", type=int, nargs="*", default=BUDGETS, help="KiB")
    options = parser.parse_args()
    rows = []
    with certificate() as pem:
        for budget in [*options.budgets, None]:
            name = "stock" if budget is None else f"{budget} KiB"
            size = None if budget is None else budget * 1024
            found = measure(pem, size, options.uploads, options.seconds)
            for label, trips in zip(["no uploads", f"{options.uploads} uploads"], found, strict=True):
                seen, arrived = (percentiles([trip[which] for trip in trips]) for which in (0, 1))
                rows.append([name, label, str(len(trips)), *(f"{value:.2f}" for value in [*arrived, *seen])])
    print_table(["budget", "beside", "pings", "p50 ms", "p99", "max", "seen p50", "p99", "max"], rows)
    print(f"target: p99 at most {TARGET} ms beside uploads at the default of {tls.READ_BUDGET * 4 // MIB / 4} MiB")


if __name__ == "__main__":
    main()
