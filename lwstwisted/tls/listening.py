"""TLS on top of any endpoint: of TCP, of a socket that systemd holds, of one behind a proxy that speaks PROXY."""

from __future__ import annotations

from typing import Any

from twisted.internet import tcp
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IListeningPort,
    IOpenSSLServerConnectionCreator,
    IProtocolFactory,
    IStreamServerEndpoint,
)
from zope.interface import implementer

from lwstwisted.loop.tls import TLSFactory, TLSServer


@implementer(IStreamServerEndpoint)
class TLSEndpoint:
    """See :func:`tls_over`."""

    def __init__(self, below: IStreamServerEndpoint, creator: IOpenSSLServerConnectionCreator, reactor: Any) -> None:
        self._below = below
        self._creator = creator
        self._reactor = reactor

    def listen(self, protocolFactory: IProtocolFactory) -> Deferred[IListeningPort]:
        """See ``IStreamServerEndpoint``."""
        wrapped = TLSFactory(self._creator, False, protocolFactory, self._reactor)
        listening: Deferred[IListeningPort] = self._below.listen(wrapped)
        return listening.addCallback(_read_as_our_own)


def tls_over(
    endpoint: IStreamServerEndpoint, creator: IOpenSSLServerConnectionCreator, reactor: Any
) -> IStreamServerEndpoint:
    """Let an endpoint speak TLS, by the transport that stops reading exactly when it is told.

    :param endpoint: what listens.
    :param creator: of the connections, such as :class:`~lwstwisted.tls.contexts.Contexts`.
    :param reactor: which listens.
    """
    return TLSEndpoint(endpoint, creator, reactor)


def _read_as_our_own(port: Any) -> Any:
    """Let a port that any endpoint made, or systemd, read for TLS as :class:`~lwstwisted.loop.tls.TLSPort` does."""
    if isinstance(port, tcp.Port) and port.transport is tcp.Server:
        port.transport = TLSServer
    return port
