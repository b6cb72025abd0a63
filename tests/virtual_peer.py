"""A kernel in memory: sockets, readiness and time, beneath Twisted's own reactors and real TLS.

The reactors and transports are the real ones; what they ask the operating system for, they get from here. So
thousands of connections take seconds, time passes when nobody has anything to do, and each wait is on record.
A test runs here as it does on real sockets: the reactors of this module have a place in a ``World``.
"""

from __future__ import annotations

import asyncio
import errno
import math
import selectors
from collections import deque
from collections.abc import Callable, Mapping
from select import POLLERR, POLLHUP, POLLIN, POLLOUT
from typing import Any

from twisted.internet import tcp
from twisted.internet.address import IPv4Address
from twisted.internet.asyncioreactor import AsyncioSelectorReactor
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.protocol import Factory

from lwstwisted.loop.foreign import LwsAsyncioReactor
from lwstwisted.loop.reactor import LwsPollReactor, LwsReactor
from lwstwisted.loop.tls import TLSFactory, TLSServer
from tests.tls_peer import (
    CountsCalls,
    OwnQueue,
    RefusingHook,
    World,
    listen_on_stock_port,
    listen_wrapped,
    server_context,
)

RECEIVE_BUFFER, SEND_BUFFER = 1 << 20, 1 << 16
"""Bytes that fit on the way to the server, and on the way back."""

MOST_SPINS = 20_000
"""Waits of no length in which nothing happened, one after another, that are taken for an endless loop."""


class Pipe:
    """One direction of a connection."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.data = bytearray()
        self.is_ended = False


class MemorySocket:
    """One end of a stream, as much of a socket as Twisted's transports and a TLS peer ask for."""

    def __init__(self, kernel: Kernel, incoming: Pipe, outgoing: Pipe) -> None:
        self._kernel = kernel
        self._in, self._out = incoming, outgoing
        self._lingers = True
        self.far: MemorySocket
        self.is_reset = False
        self.number = kernel.number(self)

    def recv(self, size: int) -> bytes:
        if self._in.data:
            data = bytes(memoryview(self._in.data)[:size])
            del self._in.data[: len(data)]
            return data
        if self.is_reset:
            raise ConnectionResetError(errno.ECONNRESET, "reset")
        if self._in.is_ended:
            return b""
        raise BlockingIOError(errno.EAGAIN, "nothing there")

    def recv_into(self, buffer: memoryview) -> int:
        data = self.recv(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def send(self, data: bytes) -> int:
        if self.is_reset or self.far.number < 0:
            raise BrokenPipeError(errno.EPIPE, "nobody reads")
        size = min(len(data), self._out.capacity - len(self._out.data))
        if not size:
            raise BlockingIOError(errno.EAGAIN, "full")
        self._out.data += data[:size]
        return size

    def readiness(self) -> int:
        ready = POLLIN if self._in.data or self._in.is_ended or self.is_reset else 0
        if self.is_reset:
            return ready | POLLOUT | POLLERR | POLLHUP
        if self._in.is_ended and self._out.is_ended:
            ready |= POLLHUP
        if len(self._out.data) < self._out.capacity:
            ready |= POLLOUT
        return ready

    def unread(self) -> int:
        return len(self._in.data)

    def shutdown(self, how: int) -> None:
        if self.is_reset:
            raise OSError(errno.ENOTCONN, "reset")
        self._out.is_ended = True

    def close(self) -> None:
        if self.number >= 0:
            self._kernel.give_back(self.number)
            self.number = -1
            self._out.is_ended = True
            if self._in.data or not self._lingers:
                self.far.is_reset = True

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        if isinstance(value, bytes):  # SO_LINGER with no time
            self._lingers = False

    def setblocking(self, flag: bool) -> None:
        assert not flag

    def fileno(self) -> int:
        return self.number

    def getsockname(self) -> tuple[str, int]:
        return ("memory", 0)


class Kernel:
    """What a reactor asks.

    :ivar now: seconds; only a wait moves it.
    :ivar waits: how long each of the last waits was told to be at most; None waits for an event.
    :ivar on_wait: called at each of them.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: deque[float | None] = deque(maxlen=1000)
        self.on_wait: Callable[[], object] = lambda: None
        self.is_woken = False
        self._sockets: dict[int, MemorySocket] = {}
        self._spins = 0

    def seconds(self) -> float:
        return self.now

    def number(self, of: MemorySocket) -> int:
        """The lowest one that is free, as kernels do; those of real descriptors are below."""
        number = next(number for number in range(1000, 2000) if number not in self._sockets)
        self._sockets[number] = of
        return number

    def give_back(self, number: int) -> None:
        del self._sockets[number]

    def pair(self) -> tuple[MemorySocket, MemorySocket]:
        """A connection: the client's end and the server's."""
        there, back = Pipe(RECEIVE_BUFFER), Pipe(SEND_BUFFER)
        client, server = MemorySocket(self, back, there), MemorySocket(self, there, back)
        client.far, server.far = server, client
        return client, server

    def wait(self, interest: Mapping[int, int], timeout: float | None) -> list[tuple[int, int]]:
        """Say what is ready, or let time pass."""
        self.waits.append(timeout)
        self.on_wait()
        events = []
        for number, mask in interest.items():
            if number in self._sockets:
                ready = self._sockets[number].readiness() & (mask | POLLERR | POLLHUP)
                if ready:
                    events.append((number, ready))
        if events or self.is_woken or timeout != 0:
            self._spins = 0
        else:
            self._spins += 1
            if self._spins > MOST_SPINS:
                raise AssertionError("spins")
        if not events and not self.is_woken:
            if timeout is None:
                raise AssertionError("hung: nothing will ever wake the loop")
            self.now += timeout
        self.is_woken = False
        return events


class MemoryPoller:
    """``select.epoll`` and ``select.poll`` on that kernel.

    :param is_poll: whether the timeout is in milliseconds; epoll takes seconds and rounds them up to these.
    """

    def __init__(self, kernel: Kernel, is_poll: bool) -> None:
        self._kernel = kernel
        self._is_poll = is_poll
        self._interest: dict[int, int] = {}

    def register(self, number: int, mask: int) -> None:
        self._interest[number] = mask

    modify = register

    def unregister(self, number: int) -> None:
        del self._interest[number]

    def poll(self, timeout: float | None = None, most: int = -1) -> list[tuple[int, int]]:
        if timeout is not None:
            timeout = None if timeout < 0 else timeout / 1000 if self._is_poll else math.ceil(timeout * 1000) / 1000
        return self._kernel.wait(self._interest, timeout)


class MemorySelector(selectors.SelectSelector):
    """The same for asyncio."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self._kernel = kernel

    def select(self, timeout: float | None = None) -> Any:
        keys = self.get_map()
        interest = {
            number: (POLLIN if key.events & selectors.EVENT_READ else 0)
            | (POLLOUT if key.events & selectors.EVENT_WRITE else 0)
            for number, key in keys.items()
        }
        found = []
        for number, ready in self._kernel.wait(interest, timeout):
            read = selectors.EVENT_READ if ready & (POLLIN | POLLHUP | POLLERR) else 0
            write = selectors.EVENT_WRITE if ready & (POLLOUT | POLLERR) else 0
            found.append((keys[number], (read | write) & keys[number].events))
        return found


class MemoryEventLoop(CountsCalls, asyncio.SelectorEventLoop):
    """asyncio's own loop on that kernel."""

    def __init__(self) -> None:
        self.kernel = Kernel()
        super().__init__(MemorySelector(self.kernel))

    def time(self) -> float:
        return self.kernel.now


class InMemory:
    """Named before a reactor among the bases: its kernel is one in memory.

    :ivar port: what was listened on.
    """

    kernel: Kernel
    port: MemoryPort

    def installWaker(self) -> None:
        pass

    def wakeUp(self) -> None:
        self.kernel.is_woken = True

    def seconds(self) -> float:
        return self.kernel.now

    def connect(self, _: int) -> MemorySocket:
        return self.port.connect()

    def listenTCP(self, port: int, factory: Factory, *_: object) -> MemoryPort:
        self.port = MemoryPort(self, factory, tcp.Server)
        return self.port


class InMemoryPolling(InMemory):
    def __init__(self) -> None:
        self.kernel = Kernel()
        super().__init__()
        poller = self._poller  # type: ignore[has-type]
        if is_epoll := hasattr(poller, "close"):
            poller.close()
        self._poller = MemoryPoller(self.kernel, not is_epoll)


class InMemoryAsyncio(InMemory):
    def __init__(self) -> None:
        loop = MemoryEventLoop()
        self.kernel = loop.kernel
        super().__init__(loop)  # type: ignore[call-arg]

    def seconds(self) -> float:
        # Twisted's asyncio reactor runs a timer of no length in the turn in which it is made, if time stands still.
        self.kernel.now += 1e-9
        return self.kernel.now

    def callFromThread(self, call: Callable[..., object], *args: object) -> None:
        # The event loop's own way writes into a pipe, which is none of this kernel's.
        self._asyncioEventloop.call_soon(lambda: self.callLater(0, call, *args))  # type: ignore[attr-defined]
        self.wakeUp()


class VirtualLws(InMemoryPolling, LwsReactor):
    pass


class VirtualLwsPoll(InMemoryPolling, LwsPollReactor):
    pass


class VirtualEPoll(InMemoryPolling, EPollReactor):
    pass


class VirtualLwsAsyncio(InMemoryAsyncio, LwsAsyncioReactor):
    pass


class VirtualAsyncio(InMemoryAsyncio, AsyncioSelectorReactor):
    pass


class VirtualRefusing(InMemoryPolling, RefusingHook):
    pass


class VirtualOwnQueue(InMemoryPolling, OwnQueue):
    pass


class MemoryPort:
    """What ``listen`` returns: clients connect to it without a turn of the loop."""

    _realPortNumber = 0

    def __init__(self, reactor: Any, factory: Factory, transport: type[tcp.Server]) -> None:
        self._reactor, self._factory, self._transport = reactor, factory, transport
        self._connections = 0
        factory.doStart()
        self.socket = self  # whose buffer is large enough

    def setsockopt(self, *_: int) -> None:
        pass

    def getHost(self) -> IPv4Address:
        return IPv4Address("TCP", "memory", 0)

    def connect(self) -> MemorySocket:
        client, server = self._reactor.kernel.pair()
        self._connections += 1
        address = ("memory", self._connections)
        protocol: Any = self._factory.buildProtocol(IPv4Address("TCP", *address))
        transport = self._transport(server, protocol, address, self, self._connections, self._reactor)  # type: ignore[arg-type]
        protocol.makeConnection(transport)
        return client


def listen_on_our_memory(reactor: Any, factory: Factory, budget: int, **tls: Any) -> MemoryPort:
    """Our port's descriptors, on sockets in memory."""
    wrapped = TLSFactory(server_context(), False, factory, reactor, budget, **tls)
    port = reactor.port = MemoryPort(reactor, wrapped, TLSServer)
    return port


VIRTUAL_WORLDS = {
    "VirtualLws": World(VirtualLws, listen_on_our_memory, merges=True),
    "VirtualLwsStockPort": World(VirtualLws, listen_on_stock_port, merges=True),
    "VirtualLwsWrapped": World(VirtualLws, listen_wrapped, merges=True),
    "VirtualLwsPoll": World(VirtualLwsPoll, listen_on_our_memory, merges=True),
    "VirtualLwsAsyncio": World(VirtualLwsAsyncio, listen_on_our_memory, drives_itself=True),
    "VirtualRefusing": World(VirtualRefusing, listen_on_our_memory),
    "VirtualOwnQueue": World(VirtualOwnQueue, listen_on_stock_port),
    "VirtualEPoll": World(VirtualEPoll, listen_on_stock_port),
    "VirtualEPollOurPort": World(VirtualEPoll, listen_on_our_memory),
    "VirtualAsyncio": World(VirtualAsyncio, listen_on_stock_port, drives_itself=True),
}
