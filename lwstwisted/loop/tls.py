"""A TLS transport that stops reading exactly when its consumer says so.

**The facts** (Twisted 26.10, pyOpenSSL 26.4). ``TLSMemoryBIOProtocol`` puts what it received into a memory
BIO and delivers everything that comes out as plaintext, whether the consumer paused meanwhile or not. A
transport that honours the pause keeps plaintext back, which nobody else can see.

**The decision.** We keep the memory BIO and everything that Twisted built around it (handshake, writes,
shutdown), and replace the one loop that takes plaintext out. It fills a buffer with up to a budget of
plaintext, delivers once, and looks at the pause after each delivery. When it stops with the last TLS read
successful, the connection has *leftovers*: it is a pending reader (``pending.py``), and not one byte more
of ciphertext is read before they are used up.

Two ways to be read, the optional one and the default one:

* on a port of ours, :class:`TLSServer` is the reader. It receives up to 256 KiB of ciphertext into a
  buffer that all connections share, and its ``doRead`` serves leftovers before it looks at the socket;
* on any other transport (a stock reactor, a wrapped endpoint), ciphertext comes by ``dataReceived`` as
  ever. While there are leftovers that transport is paused, so an end of file cannot overtake them.

**The price**: names of Twisted and pyOpenSSL that are not public. All of them are in the first section below,
they are looked up at import, and without them there is a way back that tests walk: stock Twisted's transport,
and pyOpenSSL's ``recv``.

**Roads not taken**: OpenSSL directly on the socket costs as much as it saves (two ``read()`` for each
record), and breaks tests of Twisted's own suites. A pause by dropping out of the loop alone, as if the
plaintext were not there, is the hang that this project is about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from OpenSSL import SSL
from twisted.internet import tcp
from twisted.internet.interfaces import IProtocolFactory
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.tls import BufferingTLSTransport, TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.python import log
from twisted.python.failure import Failure

from lwstwisted.interfaces import IBufferReceiver
from lwstwisted.loop.pending import pending_reads
from lwstwisted.loop.presence import PeerWatch

READ_BUDGET = 256 * 1024
"""Plaintext bytes of one connection in one turn: what other connections wait for."""

CIPHERTEXT_READ = READ_BUDGET - 16 * 1024
"""Ciphertext bytes of one read of the socket: one system call for fifteen records. With the rest of a record that was
cut by the read before, they decrypt to less than the budget. If they filled it, each read would cost a second turn,
only to find out that nothing is left."""

DELIVERY = 96 * 1024
"""Plaintext bytes of one ``dataReceived``, at most. glibc maps a block of 128 KiB or more anew each time (mallopt(3),
M_MMAP_THRESHOLD), and each of its pages is then faulted in. Behind startTLS an application pauses the socket and not
us: what one read of a stock transport brings (64 KiB, and the rest of a record) is delivered at once, so that nothing
is left that would come after the pause."""

SEND_READ = 64 * 1024
"""Ciphertext bytes taken out of the sending BIO at once: four records and their frames."""

_log = Logger()

# --- Names that are not public -------------------------------------------------------------------

_TRANSPORT_NAMES = (
    "_aborted",
    "_flushReceiveBIO",
    "_flushSendBIO",
    "_handshakeDone",
    "_lostTLSConnection",
    "_shutdownTLS",
    "_tlsShutdownFinished",
)


def has_transport_names(base: type) -> bool:
    """Whether ``base`` can be driven by :class:`TLSTransport`."""
    return all(hasattr(base, name) for name in _TRANSPORT_NAMES)


@dataclass(frozen=True, slots=True)
class Binding:
    """Calls beneath pyOpenSSL: its own make an exception of what is usual, and a new block of memory for each call.

    :ivar from_buffer: cffi's.
    :ivar ssl_read: OpenSSL's ``SSL_read``.
    :ivar get_error: ``SSL_get_error``.
    :ivar want_read: ``SSL_ERROR_WANT_READ``.
    :ivar bio_read: ``BIO_read``.
    """

    from_buffer: Any
    ssl_read: Any
    get_error: Any
    want_read: int
    bio_read: Any


def find_binding(module: Any) -> Binding | None:
    """Look for the binding beneath pyOpenSSL.

    :param module: ``OpenSSL.SSL``.
    :returns: None where one of the names is missing.
    """
    try:
        library = module._lib
        return Binding(
            module._ffi.from_buffer,
            library.SSL_read,
            library.SSL_get_error,
            library.SSL_ERROR_WANT_READ,
            library.BIO_read,
        )
    except AttributeError:
        return None


_binding = find_binding(SSL)

_WANT_READ = SSL.WantReadError()
# One for all connections: it is looked at and never raised.

# -------------------------------------------------------------------------------------------------


class PlaintextBuffer:
    """Memory that plaintext is read into, and used again for the next connection.

    Reused because glibc returns big freed blocks to the kernel at once: a fresh one for each read
    costs a page fault for every 4 KiB of it.

    :param size: bytes.
    :param binding: what :func:`find_binding` found.
    """

    def __init__(self, size: int, binding: Binding | None) -> None:
        memory = bytearray(size)
        self.view = memoryview(memory)
        self.fill: Callable[[SSL.Connection, int], tuple[int, SSL.Error | None]] = self._fill_by_recv
        if binding is not None:
            self._ssl_read, self._get_error, self._want_read = binding.ssl_read, binding.get_error, binding.want_read
            self._memory = binding.from_buffer(memory)
            self.fill = self._fill_by_binding

    def _fill_by_binding(self, connection: SSL.Connection, limit: int) -> tuple[int, SSL.Error | None]:
        """Read plaintext until the ``limit`` or an error.

        :param connection: the connection.
        :param limit: bytes, at most the size of the buffer.
        :returns: how many bytes were read, and what stopped it before the limit.
        """
        ssl = getattr(connection, "_ssl", None)
        if ssl is None:
            return self._fill_by_recv(connection, limit)
        count = 0
        read = self._ssl_read
        while count < limit:
            got = read(ssl, self._memory + count, limit - count)
            if got <= 0:
                # The usual end costs no exception. For any other the public call meets the same condition, and
                # knows its name. (Errors that somebody left in OpenSSL's queue give another answer, too.)
                if self._get_error(ssl, got) == self._want_read:
                    return count, _WANT_READ
                return self._fill_by_recv(connection, limit, count)
            count += got
        return count, None

    def _fill_by_recv(
        self, connection: SSL.Connection, limit: int, count: int = 0
    ) -> tuple[int, SSL.Error | None]:
        try:
            while count < limit:
                data = connection.recv(limit - count)
                self.view[count : count + len(data)] = data
                count += len(data)
        except SSL.Error as stopped:
            return count, stopped
        return count, None


class Buffers:
    """Memory that all connections take turns with.

    :param binding: what :func:`find_binding` found.
    """

    def __init__(self, binding: Binding | None) -> None:
        self._binding = binding
        self._spare: list[PlaintextBuffer] = []
        self._output = memoryview(bytearray(SEND_READ))
        self._output_memory = None if binding is None else binding.from_buffer(self._output)

    def borrow(self) -> PlaintextBuffer:
        """Take one for plaintext: the spare one, or a new one where a delivery leads to another delivery."""
        return self._spare.pop() if self._spare else PlaintextBuffer(READ_BUDGET, self._binding)

    def give_back(self, buffer: PlaintextBuffer) -> None:
        """Leave it to the next connection."""
        self._spare.append(buffer)

    def output(self, connection: SSL.Connection) -> bytes:
        """Ciphertext that is to be sent, at most :data:`SEND_READ` bytes; none where there is none left."""
        bio = getattr(connection, "_from_ssl", None)
        if self._binding is not None and bio is not None:
            count = self._binding.bio_read(bio, self._output_memory, SEND_READ)
            return bytes(self._output[:count]) if count > 0 else b""
        try:
            return connection.bio_read(SEND_READ)
        except SSL.WantReadError:
            return b""


_buffers = Buffers(_binding)


def _reactor_below(transport: Any) -> Any:
    """The reactor that reads for a transport; the global one for a transport that doesn't tell."""
    found = getattr(transport, "reactor", None)
    if found is None:
        from twisted.internet import reactor as found
    return found


class TLSTransport(BufferingTLSTransport):
    """The TLS layer of one connection.

    It is an ``IPushProducer`` towards its protocol: after ``pauseProducing()`` has returned, not one
    byte more is delivered before ``resumeProducing()``. A protocol that provides
    :class:`~lwstwisted.interfaces.IBufferReceiver` gets memoryviews.
    """

    _paused = False
    _leftover = False
    _delivering = False
    _deaf = False  # closed by us at a place from which the rest of the stream can't be delivered whole
    _broken = False  # the protocol raised: it gets nothing more but its connectionLost
    _ending = False  # the transport below is gone
    _reading_below = True
    _explained: frozenset[str] = frozenset()  # why a read was synthesised, as far as it is in the log

    def makeConnection(self, transport: Any) -> None:
        """See ``IProtocol``."""
        self._budget = getattr(self.factory, "budget", READ_BUDGET)
        self._buffers = getattr(self.factory, "buffers", _buffers)
        reactor = _reactor_below(transport)
        self._pending = pending_reads(reactor)
        self._reader: Any = transport if isinstance(transport, TLSServer) else self
        self._takes_views = IBufferReceiver.providedBy(self.wrappedProtocol)
        # Not getHandle(): behind startTLS that is ours already, and asks for the connection that is being made.
        below = getattr(transport, "socket", None)
        self._watch = PeerWatch(reactor, below, lambda: self._paused, self._peer_has_gone)
        super().makeConnection(transport)  # type: ignore[no-untyped-call]
        self._settle()

    @property
    def has_leftover(self) -> bool:
        """Whether plaintext may be waiting that the kernel does not know of."""
        return self._leftover

    # IPushProducer, for the protocol above

    def pauseProducing(self) -> None:
        """Deliver nothing from now on."""
        self._paused = True
        self._deaf = self._deaf or bool(self.disconnecting)
        self._list()
        self._settle()
        self._watch.start()

    def resumeProducing(self) -> None:
        """Deliver again: leftovers first, in the next turn, then what the socket brings."""
        if not self._paused:
            return
        self._paused = False
        self._list("its consumer resumed")
        self._settle()

    def stopProducing(self) -> None:
        """Close the connection."""
        self.loseConnection()

    # What the pending-read list calls where the transport below is not a TLSServer

    def doRead(self) -> None:
        """Deliver leftovers."""
        try:
            self._flushReceiveBIO()
        except BaseException:
            if self._reader is not self:
                raise  # the reactor's business, as for any event of the descriptor
            log.err()
            self.abortConnection()

    # Closing

    def loseConnection(self) -> None:
        """Close after what was written is sent, and the peer has ended its side.

        Called inside a delivery or during a pause it ends the deliveries: what the peer still sends is thrown
        away. Otherwise that is delivered, as stock does.
        """
        self._deaf = self._deaf or self._delivering or self._paused
        super().loseConnection()
        if self.disconnecting and not self._ending:
            self._list("it is closing, and the peer's goodbye may be behind what is left")
        self._settle()

    def abortConnection(self) -> None:
        """Close at once; harmless when it has ended already, where stock raises AttributeError."""
        if self._ending:
            self._aborted = True
            return
        self._leftover = False  # so that a late resumeProducing() finds nothing to come back for
        self._pending.removePending(self._reader)
        self._watch.stop()
        super().abortConnection()  # type: ignore[no-untyped-call]

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """See ``IProtocol``; what is decrypted and not held back by a pause is delivered first."""
        self._ending = True
        self._leftover = False
        self._pending.removePending(self._reader)
        self._watch.stop()
        super().connectionLost(reason)

    def _peer_has_gone(self) -> None:
        _log.debug("{peer} left during a pause", peer=cast(Any, self).getPeer())
        self.abortConnection()

    # The loop that takes plaintext out

    def _flushReceiveBIO(self) -> None:
        self._pending.removePending(self._reader)
        if self._delivering:
            # Called from below while the protocol is being called: this loop goes on anyway.
            return
        buffer = self._buffers.borrow()
        try:
            self._leftover = self._take_out(buffer) and not self._ending
        finally:
            self._buffers.give_back(buffer)
        if not self._ending:
            self._flushSendBIO()
            if self._leftover:
                self._list("the budget of its turn was used up")
            self._settle()

    def _take_out(self, buffer: PlaintextBuffer) -> bool:
        """Deliver plaintext. Returns whether some may be left."""
        left = self._budget
        at_once = len(buffer.view) if self._takes_views else DELIVERY
        while not (self._lostTLSConnection or self._aborted or self._broken):
            if self._holds_back():
                return True
            count, stopped = buffer.fill(self._connection(), min(left, at_once))
            if count:
                self._deliver(buffer.view[:count])
            if self._lostTLSConnection or self._aborted or isinstance(stopped, SSL.WantReadError):
                return False
            if stopped is None:
                if not self._ending:
                    left -= count
                    if not left:
                        return True
                continue
            if self._holds_back():
                # The end of the stream waits behind the pause; the next read meets it again.
                return True
            if isinstance(stopped, SSL.ZeroReturnError):
                self._shutdownTLS()  # type: ignore[no-untyped-call]
                self._tlsShutdownFinished(None)  # type: ignore[no-untyped-call]
            else:
                self._tlsShutdownFinished(Failure(stopped))  # type: ignore[no-untyped-call]
        return False

    def _list(self, why: str = "") -> None:
        """Bring the pending-read list up to date: pending if plaintext is left, parked if a pause holds it back.

        :param why: what makes it pending; each reason is logged once for a connection.
        """
        if self._delivering:
            return  # the loop that delivers does it when it stops
        if not self._leftover:
            self._pending.removePending(self._reader)
        elif self._holds_back():
            self._pending.parkPending(self._reader)
        else:
            if why not in self._explained:
                self._explained |= {why}
                peer = cast(Any, self).getPeer()
                _log.debug("{peer} is read without an event of its socket: {why}", peer=peer, why=why)
            self._pending.addPending(self._reader)

    def _connection(self) -> SSL.Connection:
        return cast(SSL.Connection, self.getHandle())  # type: ignore[no-untyped-call]

    def _holds_back(self) -> bool:
        """Whether plaintext must stay where it is."""
        return self._paused and not self._deaf

    def _deliver(self, view: memoryview) -> None:
        if self._deaf or self._aborted:
            return
        self._delivering = True
        try:
            if self._takes_views:
                cast(IBufferReceiver, self.wrappedProtocol).bufferReceived(view)
            else:
                assert self.wrappedProtocol is not None
                self.wrappedProtocol.dataReceived(bytes(view))
        except BaseException:
            self._broken = True
            if not self._ending:
                raise
            log.err()  # raised into connectionLost() it would keep the protocol from hearing of the end
        finally:
            self._delivering = False

    def _flushSendBIO(self) -> None:
        if self._ending:
            return  # the transport below ended inside a call that is only now on its way back
        # All of it: stock takes 32 KiB at most, and what is left waits for the next event.
        connection = self._connection()
        sent = SEND_READ
        while sent == SEND_READ:
            data = self._buffers.output(connection)
            sent = len(data)
            if data:
                assert self.transport is not None
                self.transport.write(data)

    def _settle(self) -> None:
        """Let the transport below read, or not."""
        if self._ending or self._aborted or self._lostTLSConnection:
            return
        # A handshake needs to read whatever its consumer says; it delivers nothing.
        wanted = not (self._holds_back() and self._handshakeDone)
        if self._reader is self and self._leftover:
            wanted = False
        if wanted != self._reading_below:
            self._reading_below = wanted
            below = cast(Any, self.transport)
            if wanted:
                below.resumeProducing()
            else:
                below.pauseProducing()


class TLSFactory(TLSMemoryBIOFactory):
    """A ``TLSMemoryBIOFactory`` with :class:`TLSTransport`, on any reactor.

    :param context_factory: what ``TLSMemoryBIOFactory`` takes, such as ``CertificateOptions``.
    :param is_client: whether it begins the handshake.
    :param wrapped: the factory of the protocols above.
    :param reactor: for the writes that are gathered.
    :param budget: plaintext bytes of one connection in one turn, at most :data:`READ_BUDGET`.
    :param base: the stock transport; a test's way to one without the names that we need.
    :param binding: what :func:`find_binding` found; None for the public calls only.
    """

    def __init__(
        self,
        context_factory: Any,
        is_client: bool,
        wrapped: IProtocolFactory,
        reactor: Any,
        budget: int = READ_BUDGET,
        base: type[TLSMemoryBIOProtocol] = BufferingTLSTransport,
        binding: Binding | None = _binding,
    ) -> None:
        super().__init__(context_factory, is_client, wrapped, clock=reactor)
        self.protocol = TLSTransport if has_transport_names(base) else base
        self.budget = budget
        self.buffers = _buffers if binding is _binding else Buffers(binding)


def make_default() -> None:
    """Let everything in this process that wraps connections in TLS use :class:`TLSTransport`.

    So do ``connectSSL``, ``startTLS`` and the endpoints of client and server: all of them ask
    ``TLSMemoryBIOFactory.protocol``.
    """
    if has_transport_names(BufferingTLSTransport):
        TLSMemoryBIOFactory.protocol = TLSTransport


_ciphertext = memoryview(bytearray(CIPHERTEXT_READ))
# Shared by all connections: its bytes are in the BIO of one of them before the next one reads.


class TLSServer(tcp.Server):
    """The descriptor beneath a :class:`TLSTransport`: a reader that knows of leftovers."""

    def doRead(self) -> Any:
        """Serve leftovers, or read ciphertext if there are none: never both in one turn."""
        tls = self.protocol
        if not isinstance(tls, TLSTransport):
            return super().doRead()
        if tls.has_leftover:
            return tls.doRead()
        try:
            count = self.socket.recv_into(_ciphertext)
        except BlockingIOError:
            return None
        except OSError:
            return CONNECTION_LOST
        if not count:
            return CONNECTION_DONE
        tls.dataReceived(_ciphertext[:count])  # type: ignore[no-untyped-call]
        return None


class TLSPort(tcp.Port):
    """A TCP port whose connections are :class:`TLSServer`."""

    transport = TLSServer
    _type = "TLS"  # what tcp.Port logs of itself, nothing else
