"""Thousands of connections that drip: what does one cost the server, and what others that it serves meanwhile?

``python -m bench.drip [CONNECTIONS]`` starts the service, opens so many connections (10,000 by default), begins a
request on each of them, and sends a little more of it on each in turn for as long as SECONDS. That is done with heads
and with uploads of unknown length, plain and by TLS. It prints the server's memory, what that is for each connection,
and the processor time it took. Then one client uploads as fast as it can, alone and beside 2,000 that drip once a
second.

The server has to be allowed two descriptors for each connection: ``ulimit -n 25000``, or root.
"""

from __future__ import annotations

import resource
import selectors
import socket
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from bench.processes import PATIENCE, hear, process
from lwstwisted.certificate import ensure_development_certificate
from tests.servers import Server, serving, tls_endpoint, twistd

SECONDS = 10.0
BATCH = 100
"""Connections that are begun together."""
REQUESTS = {
    "heads": (b"GET /files/%d HTTP/1.1\r\nHost: localhost\r\n", b"X: y\r\n"),
    "uploads": (
        b"PUT /files/%d HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n",
        b"1\r\nx\r\n",
    ),
}
"""How each begins, and how it goes on."""
SPARE = 500
BESIDE = 2000
RUNS = 5
BLOCK = 256 * 1024
UPLOAD = 1024 * BLOCK
"""Bytes of the fast upload."""
LIMITS = (
    "body-rate=0",
    "body-time=600",
    "connections-per-address=0",
    "connections=100000",
    "handshake-time=600",
    "head-bytes=1000000",
    "head-time=600",
    "header-lines=100000",
)


def raise_limit(wanted: int) -> int:
    """Allow this process, and the server that it starts, so many descriptors. Returns how many there are."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, hard)))
    except (ValueError, PermissionError):
        wanted = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def memory(server: Server) -> int:
    """Bytes that a server has resident now."""
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()


def ticks(server: Server) -> int:
    """Processor time of a server so far, in ticks of the system."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def open_batch(port: int, head: bytes, context: ssl.SSLContext | None, numbers: range) -> list[socket.socket]:
    """Connections with a request each."""
    clients = []
    for number in numbers:
        client = socket.create_connection(("127.0.0.1", port), 60)
        if context is not None:
            client = context.wrap_socket(client, server_hostname="localhost")
        client.sendall(head % number)
        clients.append(client)
    return clients


def drip(clients: list[socket.socket], data: bytes, until: float) -> int:
    """Send ``data`` on each connection in turn. Returns how often."""
    count = 0
    while time.monotonic() < until:
        for client in clients:
            client.sendall(data)
            count += 1
    return count


def still_open(clients: list[socket.socket]) -> int:
    """How many connections the server has neither answered nor closed."""
    selector = selectors.DefaultSelector()
    for client in clients:
        selector.register(client, selectors.EVENT_READ)
    gone = 0
    for key, _ in selector.select(0):
        client = key.fileobj
        assert isinstance(client, socket.socket)
        client.setblocking(False)
        try:
            client.recv(1)
            gone += 1
        except (BlockingIOError, ssl.SSLWantReadError):
            pass  # the tickets of a TLS session
        except OSError:
            gone += 1
    selector.close()
    return len(clients) - gone


def measure(kind: str, count: int, start: Callable[[Path], list[str | Path]], context: ssl.SSLContext | None) -> None:
    """Flood one server, and print what it cost."""
    head, more = REQUESTS[kind]
    name = f"{kind}, {'plain' if context is None else 'TLS'}"
    with tempfile.TemporaryDirectory(prefix="lwstwisted-") as folder:
        root = Path(folder)
        with serving(start(root), cwd=root) as server:
            (port,) = server.wait_for_ports()
            clients = open_batch(port, head, context, range(1))
            before, started = memory(server), ticks(server)
            try:
                while len(clients) < count:
                    end = min(len(clients) + BATCH, count)
                    clients += open_batch(port, head, context, range(len(clients), end))
                opened = ticks(server)
                dripped = drip(clients, more, time.monotonic() + SECONDS)
                used, spent, alive = memory(server), ticks(server), still_open(clients)
            finally:
                for client in clients:
                    client.close()
    each = (used - before) / max(1, len(clients) - 1) / 1024
    print(
        f"{name}: {alive} of {count} connections open, {used / 1e6:.0f} MB resident, {(used - before) / 1e6:.0f} MB"
        f" for them, {each:.1f} KiB each; {(opened - started) / 100:.1f} s of processor to open them,"
        f" {(spent - opened) / 100:.1f} s for {dripped} drips",
        flush=True,
    )


def drip_once_a_second(pipe: Connection, port: int, kind: str, pem: Path | None) -> None:
    """The process of clients that drip until they are ended."""
    raise_limit(BESIDE + SPARE)
    head, more = REQUESTS[kind]
    context = None if pem is None else ssl.create_default_context(cafile=pem)
    clients = []
    for begin in range(0, BESIDE, BATCH):
        clients += open_batch(port, head, context, range(begin, begin + BATCH))
    pipe.send("ready")
    while True:
        begin_at = time.monotonic()
        for number, client in enumerate(clients):
            client.sendall(more)
            if number % BATCH == 0:
                time.sleep(max(0.0, begin_at + number / BESIDE - time.monotonic()))


def upload_seconds(port: int, context: ssl.SSLContext | None) -> float:
    """How long one upload takes that has the line to itself."""
    block, began = bytes(BLOCK), time.monotonic()
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as plain:
        client = plain if context is None else context.wrap_socket(plain, server_hostname="localhost")
        client.sendall(b"PUT /files/fast HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % UPLOAD)
        for _ in range(UPLOAD // BLOCK):
            client.sendall(block)
        answer = client.recv(12)
        client.close()
    assert answer[9:10] == b"2", answer
    return time.monotonic() - began


def measure_beside(
    kind: str, start: Callable[[Path], list[str | Path]], context: ssl.SSLContext | None, pem: Path
) -> None:
    """Upload alone and beside the drip, and print how much slower that was."""
    with tempfile.TemporaryDirectory(prefix="lwstwisted-") as folder:
        root = Path(folder)
        with serving(start(root), cwd=root) as server:
            (port,) = server.wait_for_ports()
            upload_seconds(port, context)  # the first one grows the file and the memory
            alone = [upload_seconds(port, context) for _ in range(RUNS)]
            with process(drip_once_a_second, port, kind, None if context is None else pem) as dripping:
                hear(dripping)
                beside = [upload_seconds(port, context) for _ in range(RUNS)]
    kept = statistics.median(alone) / statistics.median(beside)
    print(
        f"an upload beside {BESIDE} dripping {kind}, {'plain' if context is None else 'TLS'}: {kept:.0%} of its speed"
        f" alone, {UPLOAD / statistics.median(alone) / 1e6:.0f} MB/s (target 80 %)",
        flush=True,
    )


def main() -> None:
    """Measure plain connections and TLS."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    affordable = (raise_limit(2 * count + SPARE) - SPARE) // 2
    if affordable < count:
        print(f"the limit of descriptors allows {affordable} connections instead of {count}")
        count = affordable
    with tempfile.TemporaryDirectory(prefix="lwstwisted-") as folder:
        certificate = ensure_development_certificate(Path(folder) / "pair.pem")
        context = ssl.create_default_context(cafile=certificate)
        options = ["--durability=none", *(f"--limit={limit}" for limit in LIMITS)]

        def plain(root: Path) -> list[str | Path]:
            return twistd("--root", root / "files", "--listen", "tcp:0", *options)

        def tls(root: Path) -> list[str | Path]:
            return twistd("--root", root / "files", "--listen", tls_endpoint(certificate), *options)

        for kind in REQUESTS:
            measure(kind, count, plain, None)
            measure(kind, count, tls, context)
        for kind in REQUESTS:
            measure_beside(kind, plain, None, certificate)
            measure_beside(kind, tls, context, certificate)


if __name__ == "__main__":
    main()
