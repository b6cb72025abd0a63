"""What a TLS upload costs the server before anybody looks at its bytes.

A server receives, decrypts and counts. Beside ours stands stock Twisted, which says what is gained, and an epoll
loop in C (``sink.c``) on the very OpenSSL that pyOpenSSL has linked in, which says how much there was to gain.
The C loop comes in the two ordinary shapes, and the cheaper one is "C" in the ratios: reads of 256 KiB into a memory
BIO, and OpenSSL on the socket itself (where it makes two system calls for each record).

The figure is CPU seconds, user and system, of the server process for each GiB, from the end of the handshake to the
end of the connection. One run after the other, the kinds taking turns; medians.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

from OpenSSL import SSL
from twisted.internet.interfaces import IHandshakeListener
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from bench.processes import GIB, MIB, certificate, cpu_seconds, hear, print_table, process, server_context, upload
from lwstwisted.interfaces import IBufferReceiver
from lwstwisted.loop.reactor import LwsReactor

SIZE = GIB
"""Plaintext bytes of a run, divided among its connections."""

RUNS = 5
MANY = 4
"""Connections of the second table."""

STOCK_TARGET, C_TARGET = 0.75, 1.25
"""Ours to stock Twisted's, and ours to C's: at most."""


@implementer(IHandshakeListener)
class Sink(Protocol):
    """Takes bytes and counts them."""

    factory: SinkFactory

    def handshakeCompleted(self) -> None:
        self.factory.begun = self.factory.begun or cpu_seconds()

    def dataReceived(self, data: bytes) -> None:
        self.factory.bytes += len(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.ended += 1
        if self.factory.ended == self.factory.connections:
            self.factory.report(cpu_seconds() - self.factory.begun, self.factory.bytes)


@implementer(IBufferReceiver)
class ViewSink(Sink):
    """The same, without a copy."""

    def bufferReceived(self, view: memoryview) -> None:
        self.factory.bytes += len(view)


class SinkFactory(Factory):
    """Counts what all connections of a run bring."""

    noisy = False
    bytes = ended = 0
    begun = 0.0

    def __init__(self, kind: type[Sink], connections: int, report: Callable[[float, int], object]) -> None:
        self.kind = kind
        self.connections = connections
        self.report = report

    def buildProtocol(self, addr: object) -> Sink:
        sink = self.kind()
        sink.factory = self
        return sink


def serve_twisted(pipe: Connection, pem: Path, connections: int, is_ours: bool, protocol: type[Sink]) -> None:
    """The process of a Twisted server."""
    if is_ours:
        LwsReactor.install()
    else:
        from twisted.internet import epollreactor

        epollreactor.install()
    from twisted.internet import reactor

    running: Any = reactor
    factory = SinkFactory(protocol, connections, lambda seconds, count: pipe.send((seconds, count)))
    port = running.listenSSL(0, factory, server_context(pem), interface="127.0.0.1")
    pipe.send((SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode(), port.getHost().port))
    running.run()


# The C loop

FUNCTIONS = (
    "SSL_new",
    "SSL_free",
    "SSL_set_accept_state",
    "SSL_do_handshake",
    "SSL_read",
    "SSL_set_fd",
    "SSL_set_bio",
    "BIO_new",
    "BIO_s_mem",
    "BIO_read",
    "BIO_write",
    "ERR_clear_error",
)
"""In the order of ``struct openssl`` in ``sink.c``."""


class Result(ctypes.Structure):
    """``struct result`` in ``sink.c``."""

    _fields_ = [("cpu_seconds", ctypes.c_double), ("bytes", ctypes.c_int64)]


def openssl_addresses() -> list[int]:
    """Where the functions are that pyOpenSSL calls.

    ``SSL._lib`` is cryptography's selection from the library object that cffi made; only the latter has addresses.
    """
    library, ffi = SSL._lib._original_lib, SSL._ffi  # type: ignore[attr-defined]
    return [int(ffi.cast("uintptr_t", ffi.addressof(library, name))) for name in FUNCTIONS]


def serve_c(pipe: Connection, pem: Path, connections: int, library: Path, mode: int) -> None:
    """The process of the C loop."""
    addresses = openssl_addresses()
    functions = (ctypes.c_void_p * len(addresses))(*addresses)
    context = server_context(pem).getContext()
    pointer = ctypes.c_void_p(int(SSL._ffi.cast("uintptr_t", context._context)))  # type: ignore[attr-defined]
    listening = socket.create_server(("127.0.0.1", 0))
    pipe.send((SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode(), listening.getsockname()[1]))
    result = Result()
    error = ctypes.CDLL(str(library)).sink(
        functions, pointer, listening.fileno(), mode, connections, ctypes.byref(result)
    )
    if error:
        raise OSError(error, "the C loop failed")
    pipe.send((result.cpu_seconds, result.bytes))
    pipe.recv()


def compile_c(folder: Path) -> Path | None:
    """Compile ``sink.c``; None, and a reason printed, where that is not possible."""
    compiler = shutil.which("cc")
    if compiler is None:
        print("no C loop: there is no cc (apt-get install gcc)")
        return None
    try:
        openssl_addresses()
    except AttributeError as missing:
        print(f"no C loop: this pyOpenSSL does not show its OpenSSL: {missing}")
        return None
    library = folder / "sink.so"
    source = Path(__file__).with_name("sink.c")
    subprocess.run([compiler, "-O2", "-Wall", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


# The measurement

Kind = tuple[Callable[..., None], tuple[Any, ...]]


def kinds(library: Path | None) -> dict[str, Kind]:
    """The servers by name."""
    found: dict[str, Kind] = {
        "stock": (serve_twisted, (False, Sink)),
        "ours, bytes": (serve_twisted, (True, Sink)),
        "ours, views": (serve_twisted, (True, ViewSink)),
    }
    if library is not None:
        found["C, memory BIO"] = (serve_c, (library, 0))
        found["C, SSL_set_fd"] = (serve_c, (library, 1))
    return found


def measure(kind: Kind, pem: Path, connections: int, size: int) -> tuple[float, float, str]:
    """One run.

    :returns: the server's CPU seconds for each GiB, the share of the time that it worked, and what was spoken.
    """
    serve, arguments = kind
    with ExitStack() as stack:
        server = stack.enter_context(process(serve, pem, connections, *arguments, is_server=True))
        version, port = hear(server)
        clients = [stack.enter_context(process(upload, port, pem, size // connections)) for _ in range(connections)]
        ciphers = {hear(client) for client in clients}
        begun = monotonic()
        for client in clients:
            client.send("go")
        seconds, count = hear(server)
        elapsed = monotonic() - begun
        assert count == size, f"{count} of {size} bytes arrived"
        return seconds * GIB / size, seconds / elapsed, f"{version}; {' and '.join(sorted(ciphers))}"


def print_figures(connections: int, size: int, runs: int) -> None:
    """Measure everything, and print the table."""
    with certificate() as pem, tempfile.TemporaryDirectory() as folder:
        servers = kinds(compile_c(Path(folder)))
        results: dict[str, list[tuple[float, float, str]]] = {name: [] for name in servers}
        for _ in range(runs):
            for name, kind in servers.items():
                results[name].append(measure(kind, pem, connections, size))
    costs = {name: median(cost for cost, _, _ in found) for name, found in results.items()}
    of_c = min((cost for name, cost in costs.items() if name.startswith("C")), default=None)
    rows = []
    for name, found in results.items():
        all_costs = [cost for cost, _, _ in found]
        rows.append(
            [
                name,
                f"{costs[name]:.3f}",
                f"{min(all_costs):.3f} to {max(all_costs):.3f}",
                f"{costs[name] / costs['stock']:.2f}",
                f"{costs[name] / of_c:.2f}" if of_c else "-",
                f"{median(busy for _, busy, _ in found):.0%}",
            ]
        )
    print(f"\n{connections} connection(s), {size // MIB} MiB in all, {runs} runs of each")
    print_table(["server", "CPU s/GiB", "range", "of stock", "of C", "busy"], rows)
    print(f"targets for ours: {STOCK_TARGET} of stock, {C_TARGET} of C")
    for name, found in results.items():
        print(f"{name}: {', '.join(sorted({spoken for _, _, spoken in found}))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=SIZE // MIB, help="plaintext MiB of a run, a multiple of 4")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, MANY])
    options = parser.parse_args()
    for connections in options.connections:
        print_figures(connections, options.mib * MIB, options.runs)


if __name__ == "__main__":
    main()
