"""Servers and clients, each in a process of its own, and the tables that the benchmarks print.

A benchmark's server and its clients never share an interpreter: what ``getrusage`` says of a server is what
the server cost. Functions that run in such a process get their end of a pipe as the first argument.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

from twisted.internet.ssl import PrivateCertificate

from lwstwisted.certificate import ensure_development_certificate

MIB, GIB = 1 << 20, 1 << 30

PATIENCE = 120.0
"""Seconds that any one step may take before it counts as hanging."""

RECORD = 16384
"""Plaintext bytes of a full TLS record (RFC 8446 section 5.1)."""

SEND = 16 * RECORD
"""Plaintext bytes that an uploader encrypts and sends at once."""

# "spawn", because a forked child would inherit whatever reactor its parent has.
_context = multiprocessing.get_context("spawn")


def _run(target: Callable[..., None], pipe: Connection, is_server: bool, *arguments: Any) -> None:
    # A server has the first processor to itself: one that moves about, or gives way to a client, costs more.
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) > 1:
        os.sched_setaffinity(0, processors[:1] if is_server else processors[1:])
    target(pipe, *arguments)


@contextmanager
def process(target: Callable[..., None], *arguments: Any, is_server: bool = False) -> Iterator[Connection]:
    """Run ``target(pipe, *arguments)`` in a process of its own, which ends with the block.

    :returns: our end of the pipe.
    """
    ours, theirs = _context.Pipe()
    child = _context.Process(target=_run, args=(target, theirs, is_server, *arguments), daemon=True)
    child.start()
    theirs.close()
    try:
        yield ours
    finally:
        child.terminate()
        child.join()
        ours.close()


def hear(pipe: Connection) -> Any:
    """What the process at the other end says next.

    :raises TimeoutError: if it says nothing.
    :raises EOFError: if it has died.
    """
    if not pipe.poll(PATIENCE):
        raise TimeoutError(f"nothing heard in {PATIENCE:.0f} seconds")
    return pipe.recv()


def cpu_seconds() -> float:
    """User and system time that this process has used."""
    usage = getrusage(RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def certificate() -> Iterator[Path]:
    """A file with a throw-away key and certificate for localhost."""
    with tempfile.TemporaryDirectory() as folder:
        yield ensure_development_certificate(Path(folder, "development.pem"))


def server_context(pem: Path) -> Any:
    """What a Twisted server gets as its context factory."""
    return PrivateCertificate.loadPEM(pem.read_bytes()).options()


def connect(port: int, pem: Path) -> ssl.SSLSocket:
    """A TLS 1.3 connection to 127.0.0.1."""
    context = ssl.create_default_context(cafile=str(pem))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    plain = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return context.wrap_socket(plain, server_hostname="localhost")


class Uploader:
    """A TLS client that keeps its server busy: one system call for sixteen full records.

    Python's ``SSLSocket`` makes one for each, and then the server waits for the client.
    """

    def __init__(self, port: int, pem: Path) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        context = ssl.create_default_context(cafile=str(pem))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._incoming.write(self._socket.recv(1 << 16))
        self._flush()
        name, version, _ = self._tls.cipher() or ("?", "?", 0)
        self.cipher = f"{version} {name}"

    def _flush(self) -> None:
        self.send_sealed(self._outgoing.read())

    def seal(self, data: bytes) -> bytes:
        """Encrypt ``data``, to be sent in this order."""
        self._tls.write(data)
        return self._outgoing.read()

    def send_sealed(self, ciphertext: bytes) -> None:
        """Send what :meth:`seal` returned."""
        self._socket.sendall(ciphertext)

    def send(self, data: bytes) -> None:
        """Encrypt and send ``data``."""
        self.send_sealed(self.seal(data))

    def plaintext(self) -> int:
        """Take out what has been decrypted. Returns how many bytes that was."""
        count = 0
        try:
            while data := self._tls.read(1 << 16):
                count += len(data)
        except ssl.SSLWantReadError:
            pass
        return count

    def end(self) -> None:
        """Send a close_notify, and wait until the server has closed."""
        try:
            self._tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        self._flush()
        self._socket.shutdown(socket.SHUT_WR)
        while self._socket.recv(1 << 16):
            pass
        self._socket.close()


def upload(pipe: Connection, port: int, pem: Path, size: int) -> None:
    """A process that uploads ``size`` bytes once it is told to.

    All of it is encrypted before: a client that had to do it meanwhile would be as slow as its server, and a
    server that waits for its client reads less at a time and wakes up more often.
    """
    uploader = Uploader(port, pem)
    block = bytes(SEND)
    sealed = [uploader.seal(block) for _ in range(size // SEND)]
    pipe.send(uploader.cipher)
    pipe.recv()
    for ciphertext in sealed:
        uploader.send_sealed(ciphertext)
    uploader.end()
    pipe.send("done")


def upload_without_end(pipe: Connection, port: int, pem: Path) -> None:
    """A process that uploads until it is ended."""
    uploader = Uploader(port, pem)
    pipe.send(uploader.cipher)
    block = bytes(SEND)
    while True:
        uploader.send(block)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with its columns aligned; all but the first to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells), flush=True)
