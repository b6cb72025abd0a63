"""A TLS client that decides on every record, and loops that a test can take apart.

Whether an upload hangs depends on the layout of its TLS records and on what arrives together, never on
its size alone. So :class:`Peer` is Python's ``ssl`` over memory: one ``seal()`` is one record, and what
is sealed goes out when, and in the pieces, that a test says. It works in a thread of its own or in lockstep
with a :class:`Loop`, which runs the turns of a reactor one at a time. A :class:`World` says which reactor that is,
and whether the sockets are real (``virtual_peer.py`` has others).
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import re
import socket
import ssl
import struct
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import uvloop
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificate
from twisted.internet.asyncioreactor import AsyncioSelectorReactor
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.interfaces import IHandshakeListener, IReadDescriptor
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import CertificateOptions
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.protocols.tls import BufferingTLSTransport
from twisted.python.failure import Failure
from zope.interface import implementer

from lwstwisted.certificate import ensure_development_certificate
from lwstwisted.interfaces import IBufferReceiver, IFakePollin
from lwstwisted.loop.foreign import LwsAsyncioReactor
from lwstwisted.loop.pending import PendingReads, pending_reads
from lwstwisted.loop.reactor import LwsPollReactor, LwsReactor, LwsSelectReactor, PendingReadsReactor
from lwstwisted.loop.tls import TLSFactory, TLSPort

DEADLINE = 10.0
"""Seconds after which a run has hung; each takes milliseconds."""

MAX_RECORD = 16384
"""Plaintext bytes that fit into one record (RFC 8446 section 5.1)."""

VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)

N = 4096
"""Plaintext bytes that a reader takes in one turn."""

CORPUS: dict[str, list[int]] = {
    "N": [N],
    "N+1": [N + 1],
    "2N": [2 * N],
    "16384": [16384],
    "16384, N+1": [16384, N + 1],
    "16384, 1": [16384, 1],
    "20 x N": 20 * [N],
}
"""Layouts of records, of which all but one strand a reader that takes N bytes a turn."""

HANGING = [name for name in CORPUS if name != "N"]
"""[N] ends exactly where the first turn does: nothing is left behind, and it completes on any loop."""

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


@contextmanager
def logging_context(version: ssl.TLSVersion) -> Iterator[tuple[ssl.SSLContext, Callable[[], dict[str, bytes]]]]:
    """A client's context of its own, and what tells its secrets after the handshake, by their labels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "keys")
        context = client_context.__wrapped__(version)
        context.keylog_filename = str(path)

        def secrets() -> dict[str, bytes]:
            fields = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
            return {label: bytes.fromhex(secret) for label, _, secret in fields}

        yield context, secrets


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


def connect_to(port: int) -> Any:
    """A socket that is connected to a port of 127.0.0.1."""
    return socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)


class Peer:
    """A TLS client on 127.0.0.1.

    :param port: where the server listens.
    :param version: the version to speak.
    :param wait: what to do while nothing has arrived; None blocks, as a thread may.
    :param connect: makes the socket.
    :param context: another one than :func:`client_context` makes.
    """

    def __init__(
        self,
        port: int,
        version: ssl.TLSVersion,
        wait: Callable[[], object] | None = None,
        connect: Callable[[int], Any] = connect_to,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.socket = connect(port)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._wait = wait
        if wait is not None:
            self.socket.setblocking(False)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = context or client_context(version)
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self._deadline = time.monotonic() + 2 * DEADLINE  # of all that this peer does in lockstep
        self.closed_by_server = False
        self.received = 0  # bytes of ciphertext

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

    def cipher(self) -> str:
        """Name of the cipher suite."""
        found = self._tls.cipher()
        assert found is not None
        return found[0]

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
                self.received += len(data)
                self._incoming.write(data)
            else:
                self._incoming.write_eof()
            return

    def _wait_for_them(self) -> None:
        assert self._wait is not None
        if time.monotonic() > self._deadline:
            raise AssertionError("hung: the server does not go on")
        self._wait()

    def end(self) -> None:
        """Send a FIN, and go on reading."""
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Send a RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        """Close the socket; the kernel sends a FIN, or a RST if something is unread."""
        self.socket.close()


class KeyUpdates:
    """Seals records of a TLS 1.3 client behind a KeyUpdate, which Python's ``ssl`` cannot send.

    :param secrets: see :func:`logging_context`.
    :param records: how many records the peer has sealed since its handshake.
    """

    def __init__(self, peer: Peer, secrets: Callable[[], dict[str, bytes]], records: int) -> None:
        cipher = peer.cipher()
        self._hash: hashes.HashAlgorithm = hashes.SHA384() if cipher.endswith("SHA384") else hashes.SHA256()
        self._aead: Any = ChaCha20Poly1305 if "CHACHA" in cipher else AESGCM
        self._key_size = 16 if "AES_128" in cipher else 32
        self._use(secrets()["CLIENT_TRAFFIC_SECRET_0"], records)

    def _expand(self, label: bytes, size: int) -> bytes:
        # HKDF-Expand-Label, RFC 8446 section 7.1
        label = b"tls13 " + label
        info = size.to_bytes(2, "big") + bytes([len(label)]) + label + b"\0"
        return HKDFExpand(self._hash, size, info).derive(self._secret)

    def _use(self, secret: bytes, count: int) -> None:
        self._secret, self._count = secret, count
        self._key, self._iv = self._expand(b"key", self._key_size), self._expand(b"iv", 12)

    def _record(self, data: bytes, kind: int) -> bytes:
        # Section 5.2: the true type is inside, the nonce counts.
        head = b"\x17\x03\x03" + (len(data) + 17).to_bytes(2, "big")
        nonce = (int.from_bytes(self._iv, "big") ^ self._count).to_bytes(12, "big")
        self._count += 1
        return head + bytes(self._aead(self._key).encrypt(nonce, data + bytes([kind]), head))

    def seal_update(self) -> bytes:
        """A KeyUpdate that asks for one in return (section 4.6.3); what follows has the next key."""
        sealed = self._record(b"\x18\0\0\x01\x01", 22)
        self._use(self._expand(b"traffic upd", self._hash.digest_size), 0)
        return sealed

    def seal(self, piece: bytes) -> bytes:
        """Encrypt one record with the key in use."""
        return self._record(piece, 23)


def unread(of: Any) -> int:
    """Bytes that a socket has received and nobody has read."""
    if not isinstance(of, socket.socket):
        count: int = of.unread()
        return count
    found = array.array("i", [0])
    fcntl.ioctl(of.fileno(), termios.FIONREAD, found)
    return found[0]


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
        below = self.tls.transport
        while isinstance(below, ProtocolWrapper):
            below = below.transport
        return below

    @property
    def reader(self) -> Any:
        """What stands in the pending-read list for this connection."""
        return self.tls._reader

    def unread(self) -> int:
        """Bytes of ciphertext that lie in the kernel."""
        return unread(self.descriptor.socket)


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


def listen_wrapped(reactor: Any, factory: Factory, budget: int, **tls: Any) -> Any:
    """A stock port with one layer more below TLS, as ``haproxy:`` endpoints put there."""
    wrapped = WrappingFactory(TLSFactory(server_context(), False, factory, reactor, budget, **tls))
    wrapped.noisy = False
    return reactor.listenTCP(0, wrapped, 200, "127.0.0.1")


def pending_list(reactor: Any) -> PendingReads:
    """The list of ``reactor``."""
    found: Any = reactor._pending if isinstance(reactor, PendingReadsReactor) else pending_reads(reactor)
    return cast(PendingReads, found)


def is_pending(reactor: Any, reader: Any) -> bool:
    """Whether ``reader`` stands in the list of ``reactor``."""
    return reader in pending_list(reactor)


def discard(reactor: Any) -> None:
    """Give back the descriptors of a reactor that was made for one test."""
    reactor.runUntilCurrent()  # aborted connections close their sockets in a call of their own
    reactor.disconnectAll()  # before the timers: a connection cancels its own
    for call in reactor.getDelayedCalls():
        call.cancel()
    for reader in list(reactor._internalReaders):
        reactor.removeReader(reader)
        reader.connectionLost(None)
    reactor._internalReaders.clear()
    poller = getattr(reactor, "_poller", None)
    if hasattr(poller, "close"):
        poller.close()
    if isinstance(reactor, AsyncioSelectorReactor):
        reactor._asyncioEventloop.close()


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

    MOST_TURNS = 20_000

    def __init__(self, reactor: Any) -> None:
        self.reactor = reactor
        self.turns = 0
        # A reactor in memory has its own time, of which ten seconds pass at once.
        self.clock: Callable[[], float] = reactor.seconds
        reactor.startRunning(installSignalHandlers=False)
        self.turn()

    def turn(self, wait: float = 0) -> None:
        """Run one turn, which waits for an event for ``wait`` seconds at most."""
        self.turns += 1
        self.reactor.iterate(wait)

    def blocking_turn(self) -> None:
        """Run one turn as ``reactor.run()`` does."""
        self.turns += 1
        self.reactor.runUntilCurrent()
        timeout = self.reactor.timeout()
        self.reactor.doIteration(DEADLINE if timeout is None else timeout)

    def turn_by_turn(self, condition: Callable[[], object]) -> None:
        """Run whole turns, also where the loop drives itself, until the ``condition`` holds behind one of them."""
        end, last = self.clock() + DEADLINE, self.turns + 10_000
        while not condition():
            if self.clock() > end or self.turns > last:
                raise AssertionError("hung")
            self.blocking_turn()

    def until(self, condition: Callable[[], object], longest: float = DEADLINE) -> int:
        """Run turns as ``reactor.run()`` does, each of which blocks until there is something to do.

        :param longest: seconds that one turn may block; less than the deadline where a peer in
            lockstep has something to do that only ``condition`` gives it the time for.
        :returns: how many turns.
        :raises AssertionError: if nothing woke the loop any more: for a user, the upload hangs.
        """
        start, end = self.turns, self.clock() + DEADLINE
        while not condition():
            left = min(longest, end - self.clock())
            if left <= 0:
                raise AssertionError(f"hung after {self.turns - start} turns")
            if self.turns - start > self.MOST_TURNS:
                raise AssertionError("spins")
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


class DrivenLoop(Loop):
    """The same for a reactor whose event loop drives itself: asyncio's, or uvloop's.

    It cannot be told to wait until something happens, only to run for a while. The turns in which nothing but our own
    ``stop`` happened hide no stranded byte: the pending-read list is served by a call that somebody asked the loop
    for, or not at all.
    """

    SLICE = 0.002
    """Seconds of one run."""

    def __init__(self, reactor: Any) -> None:
        self.events = reactor._asyncioEventloop
        super().__init__(reactor)

    def turn(self, wait: float = 0) -> None:
        """Run one turn; with a ``wait``, as many as fit into it."""
        self.turns += 1
        if wait:
            self.events.call_later(wait, self.events.stop)
        else:
            self.events.call_soon(self.events.stop)
        self.events.run_forever()

    blocking_turn = turn

    def until(self, condition: Callable[[], object], longest: float = DEADLINE) -> int:
        """Run slices until the ``condition`` holds. Returns how many, which means nothing."""
        start, end = self.turns, self.clock() + DEADLINE
        while not condition():
            if self.clock() > end:
                raise AssertionError("hung")
            self.turn(self.SLICE)
        return self.turns - start

    def idle_turns(self) -> int:
        """How many calls somebody asks the loop for in a fiftieth of a second."""
        before: int = self.events.asked
        self.turn(0.02)
        asked: int = self.events.asked
        return asked - before - 1

    def step(self) -> None:
        """See :class:`Loop`; a slice does not end when something has happened, so it is a short one."""
        self.turn(0.0005)


class CountsCalls:
    """An event loop of asyncio's kind that counts what it is asked to call.

    :ivar asked: how often, except from other threads.
    """

    asked = 0

    def call_soon(self, *args: Any, **context: Any) -> Any:
        self.asked += 1
        return super().call_soon(*args, **context)  # type: ignore[misc]

    def call_later(self, delay: float, *args: Any, **context: Any) -> Any:
        self.asked += 1
        return super().call_later(delay, *args, **context)  # type: ignore[misc]

    def call_at(self, when: float, *args: Any, **context: Any) -> Any:
        self.asked += 1
        return super().call_at(when, *args, **context)  # type: ignore[misc]


class AsyncioLoop(CountsCalls, asyncio.SelectorEventLoop):
    """asyncio's own."""


class UvLoop(CountsCalls, uvloop.Loop):
    """uvloop's."""


class RefusingHook(LwsReactor):
    """A loop whose hook says that it will not do it."""

    asked = 0

    def fake_pollin(self, readers: list[IReadDescriptor]) -> bool:
        self.asked += 1
        return False


@implementer(IFakePollin)
class OwnQueue(EPollReactor):
    """A loop of somebody's own, with a queue of its own behind the hook."""

    asked = 0

    def __init__(self) -> None:
        self.queue: list[IReadDescriptor] = []
        super().__init__()

    def fake_pollin(self, readers: list[IReadDescriptor]) -> bool:
        self.asked += 1
        self.queue += readers
        return True

    def doIteration(self, timeout: float | None) -> None:
        queue, self.queue = self.queue, []
        self.doPoll(0 if queue else timeout)
        for reader in queue:
            pending_list(self).servicePending(reader)


@dataclass(frozen=True)
class World:
    """Where a test runs.

    :ivar make_reactor: makes a reactor for one test.
    :ivar listen: one of the ways to listen.
    :ivar merges: whether pending readers have their turns behind the wait, and nobody has two.
    :ivar drives_itself: whether its turns are those of an event loop of asyncio's kind.
    """

    make_reactor: Callable[[], Any]
    listen: Callable[..., Any]
    merges: bool = False
    drives_itself: bool = False


REAL_WORLDS = {
    "Lws": World(LwsReactor, listen_on_our_port, merges=True),
    "LwsStockPort": World(LwsReactor, listen_on_stock_port, merges=True),
    "LwsPoll": World(LwsPollReactor, listen_on_our_port, merges=True),
    "LwsSelect": World(LwsSelectReactor, listen_on_our_port, merges=True),
    "LwsAsyncio": World(lambda: LwsAsyncioReactor(AsyncioLoop()), listen_on_our_port, drives_itself=True),
    "LwsUvloop": World(lambda: LwsAsyncioReactor(UvLoop()), listen_on_our_port, drives_itself=True),
    "StockEPoll": World(EPollReactor, listen_on_stock_port),
    "StockAsyncio": World(lambda: AsyncioSelectorReactor(AsyncioLoop()), listen_on_stock_port, drives_itself=True),
}


class Talk:
    """One server and one peer in lockstep, after their handshake.

    :param listen: one of the ways to listen.
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
        self.reactor = reactor
        self.loop = DrivenLoop(reactor) if isinstance(reactor, AsyncioSelectorReactor) else Loop(reactor)
        self.factory = SinkFactory() if factory is None else factory
        if held:
            self.factory.on_handshake = Sink.pause
        self.port = listen(reactor, self.factory, budget, **tls).getHost().port
        self.version = version
        self.peers: list[Peer] = []
        self.peer, self.sink = self.connect()

    def new_peer(self, **how: Any) -> Peer:
        """A client that is connected, and has not shaken hands."""
        peer = Peer(self.port, self.version, self.loop.step, getattr(self.reactor, "connect", connect_to), **how)
        self.peers.append(peer)
        return peer

    def connect(self, **how: Any) -> tuple[Peer, Sink]:
        """Make one connection more."""
        peer = self.new_peer(**how)
        peer.handshake()
        sinks, count = self.factory.sinks, len(self.peers)
        self.loop.until(lambda: len(sinks) == count and sinks[-1].is_shaken)
        return peer, sinks[-1]

    def arrive(self, sealed: bytes, peer: Peer | None = None, sink: Sink | None = None) -> None:
        """Send, and wait until all of it lies in the kernel of a server that does not read."""
        peer, sink = peer or self.peer, sink or self.sink
        before = sink.unread()
        peer.send(sealed)
        self.loop.until(lambda: sink.unread() == before + len(sealed), longest=0.01)

    def answer(self, size: int) -> bytes:
        """What the server sends, as soon as it is so many bytes."""
        got = bytearray()

        def arrived() -> bool:
            got.extend(self.peer.receive())
            return len(got) >= size

        self.loop.until(arrived, longest=0.01)
        return bytes(got)

    def is_pending(self) -> bool:
        """Whether the connection stands in the pending-read list."""
        return is_pending(self.reactor, self.sink.reader)

    def is_reader(self) -> bool:
        """Whether the loop looks at its socket."""
        return self.sink.descriptor in self.reactor.getReaders()

    def check_lists(self, sink: Sink) -> None:
        """Who is in which list, as far as one can tell from outside.

        :raises AssertionError: if somebody is where nobody should be.
        """
        pending = is_pending(self.reactor, sink.reader)
        reads = sink.descriptor in self.reactor.getReaders()
        if sink.lost or sink.is_paused:
            assert not pending and not reads, (pending, reads)
        elif sink.reader is sink.descriptor:
            assert reads or not pending
        else:
            assert not (reads and pending)  # while it is pending no end of file overtakes it

    def synthesised(self) -> int:
        """How many turns the pending-read list has given so far."""
        return pending_list(self.reactor).statistics().synthesised_reads

    def close(self) -> None:
        """End all connections and give back the reactor."""
        for peer in self.peers:
            peer.close()
        for sink in self.factory.sinks:
            if not sink.lost:
                sink.tls.abortConnection()
        self.loop.turn()
        self.loop.turn()
        discard(self.reactor)

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
