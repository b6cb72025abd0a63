"""Listening sockets that outlive the process that accepts from them.

A parent opens what the descriptions of endpoints say and accepts nothing (:class:`Opening`); its workers listen by the
same descriptions and find the sockets there (:class:`Inheriting`): the first description has descriptor 3, the next
one 4, as sd_listen_fds(3) counts. So a worker may come, go or be killed, and a client that knocks meanwhile waits in
the queue of the socket.

**One socket for all workers.** With a socket for each of them (SO_REUSEPORT) the kernel would hand out connections
evenly, also to a worker that is busy, and reset those that wait for one that dies. With one socket whoever is idle
takes the next one. All idle ones are woken for it, and all but one in vain: of four workers 2.7 for a connection that
comes alone, and 0.6 when sixteen clients keep them busy, who then find them about equally loaded.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from typing import Any, cast

from twisted.internet import tcp, unix
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory
from twisted.python.failure import Failure

from lwstwisted.loop.tls import TLSFactory

FIRST = 3
"""The first descriptor that is handed over (sd_listen_fds(3))."""

_OF_SYSTEMD = re.compile(r"(^|:)systemd:domain=(\w+):(?:name=(.+)|.*)")


def listen_environment(descriptions: Sequence[str]) -> dict[str, str]:
    """What a worker has to find in its environment, to which the sockets of these are handed over.

    Those of systemd keep their names: what the options say of them is looked up by name.
    """
    found = [_OF_SYSTEMD.search(description) for description in descriptions]
    names = [match[3] if match and match[3] else f"listen-{number}" for number, match in enumerate(found)]
    return {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}


def inherited(description: str, number: int) -> str:
    """What a worker listens on, where a parent was told ``description`` as its ``number``-th one, from 0 on."""
    return _OF_SYSTEMD.sub(rf"\1systemd:domain=\2:index={number}", description)


class Opening:
    """A reactor whose listening sockets are opened, and nothing is accepted from them.

    :ivar ports: they, in the order in which they were opened.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self.ports: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def addReader(self, reader: Any) -> None:
        """See ``IReactorFDSet``: nobody reads here, so everybody waits."""

    def removeReader(self, reader: Any) -> None:
        """See ``IReactorFDSet``."""

    removeWriter = removeReader

    def listenTCP(self, port: int, factory: Any, backlog: int = 50, interface: str = "") -> Any:
        """See ``IReactorTCP``."""
        return self._opened(tcp.Port(port, factory, backlog, interface, self))

    def listenSSL(
        self, port: int, factory: Any, contextFactory: Any, backlog: int = 50, interface: str = ""
    ) -> Any:
        """See ``IReactorSSL``; TLS is for those who accept."""
        return self.listenTCP(port, factory, backlog, interface)

    def listenUNIX(
        self, address: str, factory: Any, backlog: int = 50, mode: int = 0o666, wantPID: bool = False
    ) -> Any:
        """See ``IReactorUNIX``."""
        return self._opened(unix.Port(cast(Any, address), factory, backlog, mode, self, wantPID))

    def adoptStreamPort(self, descriptor: int, family: int, factory: Any) -> Any:
        """See ``IReactorSocket``; the service manager's socket is only passed on."""
        self.ports.append(_Kept(descriptor))
        return self.ports[-1]

    def _opened(self, port: Any) -> Any:
        port.startListening()
        port._shouldShutdown = False  # Twisted would shut down what workers still have
        self.ports.append(port)
        return port

    def listen(self, descriptions: Sequence[str]) -> None:
        """Open a socket for each description of an endpoint.

        :raises OSError: and what Twisted raises, as if they were listened on.
        """
        failures: list[Failure] = []
        for number, description in enumerate(descriptions):
            serverFromString(self, description).listen(Factory()).addErrback(failures.append)
            if failures:
                failures[0].raiseException()
            if len(self.ports) != number + 1:
                raise ValueError(f"workers can't share {description!r}: it is not one socket")

    async def close(self) -> None:
        """Let nobody wait any more. What workers hold stays open for them."""
        ports, self.ports = self.ports, []
        for port in ports:
            await port.stopListening()


class _Kept:
    """A socket of the service manager."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=os.dup(descriptor))

    def fileno(self) -> int:
        return self._socket.fileno()

    async def stopListening(self) -> None:
        self._socket.close()


class Inheriting:
    """A reactor that listens on sockets that somebody else opened.

    :param inherits: whether all are inherited; else only what a description calls so (``systemd:``) is.
    """

    def __init__(self, reactor: Any, inherits: bool) -> None:
        self._reactor = reactor
        self._next = FIRST
        if inherits:  # else they are the reactor's
            self.listenTCP = self.listenUNIX = self._listen
            self.listenSSL = self._listen_tls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def _listen(self, address: Any, factory: Any, *args: Any, **options: Any) -> IListeningPort:
        descriptor = self._next
        with socket.socket(fileno=os.dup(descriptor)) as opened:
            family = opened.family
        port = self.adoptStreamPort(descriptor, family, factory)
        os.close(descriptor)
        return port

    def _listen_tls(
        self, address: Any, factory: Any, contextFactory: Any, *args: Any, **options: Any
    ) -> IListeningPort:
        return self._listen(address, TLSFactory(contextFactory, False, factory, self._reactor))

    def adoptStreamPort(self, descriptor: int, family: int, factory: Any) -> IListeningPort:
        """See ``IReactorSocket``."""
        self._next += 1
        if family != socket.AF_UNIX:
            port: IListeningPort = self._reactor.adoptStreamPort(descriptor, family, factory)
            return port
        port = InheritedUNIXPort(socket.socket(fileno=os.dup(descriptor)), factory, self._reactor)
        port.startListening()
        return port


class InheritedUNIXPort(unix.Port):
    """A UNIX socket that is not ours: Twisted's own one would change the mode of its name, remove it at the end, and
    shut the socket down for everybody else who has it."""

    _shouldShutdown = False

    def __init__(self, listening: socket.socket, factory: Any, reactor: Any) -> None:
        super().__init__(listening.getsockname(), factory, reactor=reactor)
        self.socket = listening

    def startListening(self) -> None:
        """See ``IListeningPort``."""
        cast(Any, self.factory).doStart()
        self.connected = True
        self.numberAccepts = 1  # Twisted's own code goes on from there
        self.fileno = self.socket.fileno  # type: ignore[method-assign]
        self.startReading()  # type: ignore[no-untyped-call]

    def connectionLost(self, reason: Any) -> None:
        """See ``IReadDescriptor``."""
        tcp.Port.connectionLost(self, reason)
