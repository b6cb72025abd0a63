"""A TLS client that decides on every record, and loops that a test can take apart.

Whether an upload hangs depends on the layout of its TLS records and on what arrives together, never on
its size alone. So :class:`Peer` is Python's ``ssl`` over memory: one ``seal()`` is one record, and what
is sealed goes out when, and in the pieces, that a test says. It works in a thread of its own or in lockstep
with a :class:`Loop`, which runs the turns of a reactor one at a time.
"""

from __future__ import annotations

import array
import fcntl
import re
import socket
import ssl
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificate
from twisted.internet.interfaces import IHandshakeListener
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import CertificateOptions
from twisted.protocols.tls import BufferingTLSTransport
from twisted.python.failure import Failure
from zope.interface import implementer

from lwstwisted.certificate import ensure_development_certificate
from lwstwisted.interfaces import IBufferReceiver
from lwstwisted.loop.pending import pending_reads
from lwstwisted.loop.reactor import LwsReactor
from lwstwisted.loop.tls import TLSFactory, TLSPort

DEADLINE = 10.0
"""Seconds after which a run has hung; each takes milliseconds."""

MAX_RECORD = 16384
"""Plaintext bytes that fit into one record (RFC 8446 section 5.1)."""

VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)

RECEIVE_BUFFER = 1 << 20
"""Asked for on the listening socket, so that a whole train of records fits into it while nobody reads."""


@cache
def _pem() -> str:
    with tempfile.TemporaryDirectory() as folder:
        return ensure_development_certificate(Path(folder, "development.pem")).read_text()


@cache
def server_context() -> Any:
    """Twisted's ``CertificateOptions`` with a throw-away certificate for localhost."""
    pem = _pem().encode()
    return CertificateOptions(load_pem_private_key(pem, None), load_pem_x509_certificate(pem))


@cache
def client_context(version: ssl.TLSVersion) -> ssl.SSLContext:
    """A client that speaks exactly one version, and trusts that certificate only."""
    found = re.search("-----BEGIN CERTIFICATE-----.*-----END CERTIFICATE-----", _pem(), re.DOTALL)
    assert found is not None
    context = ssl.create_default_context(cadata=found[0])
    context.minimum_version = context.maximum_version = version
    return context


@contextmanager
def certificate_file() -> Iterator[Path]:
    """The same certificate in a file, for an endpoint description."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "development.pem")
        path.write_text(_pem())
        yield path


def pattern(size: int) -> bytes:
    """Bytes in which nothing can be lost, doubled or moved without a difference."""
    return b"".join(i.to_bytes(4, "big") for i in range(size // 4 + 1))[:size]


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """Cut ``data`` into pieces of these sizes."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(data[start : start + size])
        start += size
    assert start == len(data)
    return pieces


class Peer:
    """A TLS client on 127.0.0.1.

    :param port: where the server listens.
    :param version: the version to speak.
    :param wait: what to do while nothing has arrived; None blocks, as a thread may.
    """

    def __init__(self, port: int, version: ssl.TLSVersion, wait: Callable[[], object] | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._wait = wait
        if wait is not None:
            self.socket.setblocking(False)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = client_context(version).wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self._deadline = time.monotonic() + 2 * DEADLINE  # of all that this peer does in lockstep
        self.closed_by_server = False

    def handshake(self, finish: bool = True) -> bytes:
        """Shake hands.

        :param finish: False keeps the last flight back.
        :returns: the last flight, if it was kept back.
        """
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.send(self._outgoing.read())
                self._fill()
        last = self._outgoing.read()
        if finish:
            self.send(last)
            return b""
        return last

    def seal(self, *pieces: bytes) -> bytes:
        """Encrypt: each piece, which must fit, is one record. Nothing is sent."""
        for piece in pieces:
            assert 0 < len(piece) <= MAX_RECORD
            self._tls.write(piece)
        return self._outgoing.read()

    def seal_end(self) -> bytes:
        """Encrypt a close_notify. Nothing is sent."""
        try:
            self._tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        return self._outgoing.read()

    def send(self, sealed: bytes) -> int:
        """Send; in a thread each call is one ``sendall``. Returns how many bytes that was."""
        rest = memoryview(sealed)
        while rest:
            try:
                rest = rest[self.socket.send(rest) :]
            except BlockingIOError:
                self._wait_for_them()
        return len(sealed)

    def receive(self) -> bytes:
        """Plaintext that has arrived by now; may be empty."""
        self._fill(once=True)
        data = bytearray()
        try:
            while piece := self._tls.read(1 << 16):
                data += piece
        except ssl.SSLWantReadError:
            return bytes(data)
        except ssl.SSLZeroReturnError:
            pass
        self.closed_by_server = True
        return bytes(data)

    def _fill(self, once: bool = False) -> None:
        while True:
            try:
                data = self.socket.recv(1 << 18)
            except BlockingIOError:
                if once:
                    return
                self._wait_for_them()
                continue
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()
            return

    def _wait_for_them(self) -> None:
        assert self._wait is not None
        if time.monotonic() > self._deadline:
            raise AssertionError("hung: the server does not go on")
        self._wait()

    def close(self) -> None:
        """Close the socket; the kernel sends a FIN, or a RST if something is unread."""
        self.socket.close()


class Sink(Protocol):
    """A server's protocol that keeps what it gets, and notes whatever it should not have got.

    :ivar violations: sentences, empty when the transport kept its word.
    """

    factory: SinkFactory

    def __init__(self) -> None:
        self.data = bytearray()
        self.deliveries: list[int] = []
        self.kinds: set[type] = set()
        self.lost: list[Failure] = []
        self.violations: list[str] = []
        self.is_paused = False
        self.is_shaken = False

    def connectionMade(self) -> None:
        self.factory.on_made(self)

    def handshakeCompleted(self) -> None:
        self.is_shaken = True
        self.factory.on_handshake(self)

    def dataReceived(self, data: bytes) -> None:
        self._take(data)

    def _take(self, data: bytes | memoryview) -> None:
        if self.is_paused:
            self.violations.append(f"{len(data)} bytes while paused")
        if self.lost:
            self.violations.append(f"{len(data)} bytes after connectionLost")
        self.data += data
        self.deliveries.append(len(data))
        self.kinds.add(type(data))
        self.factory.on_delivery(self)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        self.lost.append(reason)
        self.factory.on_lost(self)

    def pause(self) -> None:
        """Pause the transport; from when this returns nothing may come."""
        self.tls.pauseProducing()
        self.is_paused = True

    def resume(self) -> None:
        """Let it come again."""
        self.is_paused = False
        self.tls.resumeProducing()

    @property
    def tls(self) -> Any:
        """The TLS transport."""
        return self.transport

    @property
    def descriptor(self) -> Any:
        """The socket's descriptor."""
        return self.tls.transport

    @property
    def reader(self) -> Any:
        """What stands in the pending-read list for this connection."""
        return self.tls._reader

    def unread(self) -> int:
        """Bytes of ciphertext that lie in the kernel."""
        count = array.array("i", [0])
        fcntl.ioctl(self.descriptor.socket.fileno(), termios.FIONREAD, count)
        return count[0]


@implementer(IHandshakeListener)
class ListeningSink(Sink):
    """A sink that is told of the end of the handshake."""


@implementer(IHandshakeListener, IBufferReceiver)
class ViewSink(Sink):
    """A sink that takes memoryviews."""

    def bufferReceived(self, view: memoryview) -> None:
        self._take(view)

    def dataReceived(self, data: bytes) -> None:
        self.violations.append("bytes for a protocol that takes views")


def _ignore(_: Sink) -> None:
    pass


class SinkFactory(Factory):
    """Makes sinks; a test says what happens at each event of theirs."""

    noisy = False

    def __init__(
        self,
        on_delivery: Callable[[Sink], object] = _ignore,
        *,
        on_made: Callable[[Sink], object] = _ignore,
        on_handshake: Callable[[Sink], object] = _ignore,
        on_lost: Callable[[Sink], object] = _ignore,
        kind: type[Sink] = ListeningSink,
    ) -> None:
        self.on_made, self.on_handshake = on_made, on_handshake
        self.on_delivery, self.on_lost = on_delivery, on_lost
        self.kind = kind
        self.sinks: list[Sink] = []

    def buildProtocol(self, addr: object) -> Sink:
        sink = self.kind()
        sink.factory = self
        self.sinks.append(sink)
        return sink


def listen_on_our_port(reactor: Any, factory: Factory, budget: int, **tls: Any) -> Any:
    """Our port, whose descriptors read for the TLS layer."""
    port = TLSPort(0, TLSFactory(server_context(), False, factory, reactor, budget, **tls), 200, "127.0.0.1", reactor)
    port.startListening()
    port.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    return port


def listen_on_stock_port(reactor: Any, factory: Factory, budget: int, **tls: Any) -> Any:
    """A port of Twisted's own, as a wrapping endpoint uses it: ciphertext comes by ``dataReceived``."""
    wrapped = TLSFactory(server_context(), False, factory, reactor, budget, **tls)
    port = reactor.listenTCP(0, wrapped, 200, "127.0.0.1")
    port.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    return port


def is_pending(reactor: Any, reader: Any) -> bool:
    """Whether ``reader`` stands in the list of ``reactor``."""
    return reader in (reactor._pending if isinstance(reactor, LwsReactor) else pending_reads(reactor))


def discard(reactor: Any) -> None:
    """Give back the descriptors of a reactor that was made for one test."""
    reactor.runUntilCurrent()  # aborted connections close their sockets in a call of their own
    for call in reactor.getDelayedCalls():
        call.cancel()
    reactor.disconnectAll()
    for reader in list(reactor._internalReaders):
        reactor.removeReader(reader)
        reader.connectionLost(None)
    reactor._internalReaders.clear()
    poller = getattr(reactor, "_poller", None)
    if hasattr(poller, "close"):
        poller.close()


class _Hidden(type):
    """To ``hasattr(class, name)`` one of the names that we need is gone; instances work as before."""

    def __getattribute__(cls, name: str) -> Any:
        if name == "_flushReceiveBIO":
            raise AttributeError(name)
        return super().__getattribute__(name)


StockTransport = _Hidden("StockTransport", (BufferingTLSTransport,), {})
"""Twisted's own TLS transport as another version might have it: without a name that ours needs."""


class Loop:
    """Runs a reactor turn by turn, in the test's own hands.

    :ivar turns: how many it was.
    """

    def __init__(self, reactor: Any) -> None:
        self.reactor = reactor
        self.turns = 0
        reactor.startRunning(installSignalHandlers=False)
        self.turn()

    def turn(self, wait: float = 0) -> None:
        """Run one turn, which waits for an event for ``wait`` seconds at most."""
        self.turns += 1
        self.reactor.iterate(wait)

    def until(self, condition: Callable[[], object], longest: float = DEADLINE) -> int:
        """Run turns as ``reactor.run()`` does, each of which blocks until there is something to do.

        :param longest: seconds that one turn may block; less than the deadline where a peer in
            lockstep has something to do that only ``condition`` gives it the time for.
        :returns: how many turns.
        :raises AssertionError: if nothing woke the loop any more: for a user, the upload hangs.
        """
        start, end = self.turns, time.monotonic() + DEADLINE
        while not condition():
            left = min(longest, end - time.monotonic())
            if left <= 0:
                raise AssertionError(f"hung after {self.turns - start} turns")
            self.turns += 1
            self.reactor.runUntilCurrent()
            if condition():  # a timer of this turn has done it
                break
            timeout = self.reactor.timeout()
            self.reactor.doIteration(left if timeout is None else min(timeout, left))
        return self.turns - start

    def later(self, turns: int, call: Callable[[], object]) -> None:
        """Have something called after some more turns."""
        if turns:
            self.reactor.callLater(0, self.later, turns - 1, call)
        else:
            call()

    def idle_turns(self) -> int:
        """How many turns it takes to do nothing for a fiftieth of a second."""
        over: list[bool] = []
        self.reactor.callLater(0.02, over.append, True)
        return self.until(lambda: over)

    def step(self) -> None:
        """Let a peer in lockstep wait: it needs us to move first, and the kernel to carry it."""
        self.turn(0.01)


class Talk:
    """One server and one peer in lockstep, after their handshake.

    :param held: whether the sink is paused from the end of the handshake on, so that everything can arrive
        before the first byte is read.
    """

    def __init__(
        self,
        reactor: Any,
        listen: Callable[..., Any],
        version: ssl.TLSVersion,
        factory: SinkFactory | None = None,
        *,
        budget: int,
        held: bool = True,
        **tls: Any,
    ) -> None:
        self.loop = Loop(reactor)
        self.reactor = reactor
        self.factory = SinkFactory() if factory is None else factory
        if held:
            self.factory.on_handshake = Sink.pause
        self.port = listen(reactor, self.factory, budget, **tls).getHost().port
        self.version = version
        self.peers: list[Peer] = []
        self.peer, self.sink = self.connect()

    def connect(self) -> tuple[Peer, Sink]:
        """Make one connection more."""
        peer = Peer(self.port, self.version, self.loop.step)
        self.peers.append(peer)
        peer.handshake()
        count = len(self.peers)
        self.loop.until(lambda: len(self.factory.sinks) == count and self.factory.sinks[-1].is_shaken)
        return peer, self.factory.sinks[-1]

    def arrive(self, sealed: bytes) -> None:
        """Send, and wait until all of it lies in the kernel of a server that does not read."""
        before = self.sink.unread()
        self.peer.send(sealed)
        self.loop.until(lambda: self.sink.unread() == before + len(sealed), longest=0.01)

    def is_pending(self) -> bool:
        """Whether the connection stands in the pending-read list."""
        return is_pending(self.reactor, self.sink.reader)

    def is_reader(self) -> bool:
        """Whether the loop looks at its socket."""
        return self.sink.descriptor in self.reactor.getReaders()

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self.peers:
            peer.close()
        for sink in self.factory.sinks:
            if not sink.lost:
                sink.tls.abortConnection()
        discard(self.reactor)
