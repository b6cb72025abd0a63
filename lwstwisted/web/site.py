"""The factory of :class:`~lwstwisted.web.channel.StreamingChannel`: what an application listens with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any, cast

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import IResource
from twisted.web.server import Request, Site

from lwstwisted.web.accesslog import AccessEvents, AccessLog, combined_log
from lwstwisted.web.channel import StreamingChannel
from lwstwisted.web.forwarded import Networks, is_trusted
from lwstwisted.web.limits import DEFAULT_LIMITS, Limits
from lwstwisted.web.request import StreamingRequest
from lwstwisted.web.tally import Tally

LAST_CHANCE = 1.0
"""Seconds that an idle connection has for another request when the site begins to drain: it may be on its way."""
FAREWELL_TIME = 5.0
"""Seconds in which clients have to read their last answers when the site stops."""

LINGERING = 100
"""Connections above the limits that are told why they are turned away; further ones are closed at once."""

_log = Logger()


def network_of(address: Any) -> str:
    """Who is behind an address: an IPv4 address, or the /64 that one customer's IPv6 addresses are taken from.

    :returns: "" where it is neither, as of a UNIX socket.
    """
    try:
        host = ip_address(address.host)
    except (AttributeError, ValueError):
        return ""
    if isinstance(host, IPv6Address):
        host = host.ipv4_mapped or ip_network((host, 64), strict=False).network_address
    return str(host)


class StreamingSite(Site):
    """A ``Site`` on which resources that provide
    :class:`~lwstwisted.interfaces.IStreamingResource` get request bodies as they arrive.

    :param resource: the root of the resources; all others than streaming ones work as ever.
    :param reactor: for deadlines; the global one by default.
    :param limits: what one client may take. ``Site``'s ``timeout`` overrides its ``idle_time``.
    :param trusted_proxies: networks of proxies whose word of their clients is believed (``forwarded.py``).
    :param options: what ``Site`` takes.
    :ivar on_end: called with each request that is over, in front of its line in the access log.
    """

    protocol = StreamingChannel  # type: ignore[assignment]
    requestFactory = StreamingRequest

    def __init__(
        self,
        resource: IResource,
        reactor: IReactorTime | None = None,
        limits: Limits = DEFAULT_LIMITS,
        trusted_proxies: Networks = (),
        **options: Any,
    ) -> None:
        options.setdefault("logFormatter", combined_log)
        options.setdefault("timeout", limits.idle_time)
        super().__init__(resource, reactor=reactor, **options)  # type: ignore[no-untyped-call]
        self.limits = limits
        self.trusted_proxies = trusted_proxies
        self.tally = Tally(self.reactor)
        self.channels: set[StreamingChannel] = set()
        self._admitted: dict[StreamingChannel, str] = {}
        self._of_network: Counter[str] = Counter()
        self._under_way: dict[Deferred[None], Request] = {}
        self.on_end: Callable[[Request], object] = lambda request: None
        self.is_draining = False
        self._empty: Deferred[None] | None = None

    def getResourceFor(self, request: Request) -> IResource:
        """See ``Site``."""
        channel = cast(StreamingChannel, request.channel)
        found: IResource | None = channel.take_found(request)
        return found if found is not None else super().getResourceFor(request)  # type: ignore[no-untyped-call]

    def admit(self, channel: StreamingChannel) -> bool:
        """Take account of a new connection. Returns whether the limits have room for it."""
        self.channels.add(channel)
        network = network_of(channel.getPeer())
        at_most = 0 if is_trusted(channel.getPeer(), self.trusted_proxies) else self.limits.connections_per_address
        if len(self._admitted) >= self.limits.connections:
            return False
        if at_most and network and self._of_network[network] >= at_most:
            return False
        self._admitted[channel] = network
        self._of_network[network] += 1
        return True

    @property
    def requests_under_way(self) -> list[Request]:
        """The requests whose resources take the body as it arrives."""
        return list(self._under_way.values())

    def startFactory(self) -> None:
        """See ``Factory``."""
        super().startFactory()
        if self.logPath is None:
            self._logFile = AccessEvents()

    def _openLogFile(self, path: str | bytes) -> AccessLog:
        # The hook of Site, whose own file moves itself away when it is large: of many processes only one can do that.
        return AccessLog(path)

    def reopen_log(self) -> None:
        """Go on in a new file, if there is an access log that somebody has moved away."""
        if isinstance(self._logFile, AccessLog):
            self._logFile.reopen()

    def log(self, request: Any) -> None:
        """See ``HTTPFactory``. A line that can't be written is lost, but the request ends, and gives all back."""
        request.is_over = True
        self.on_end(request)
        try:
            super().log(request)
        except Exception as error:
            self.tally.count(f"lines of the access log that could not be written ({error})", request.getClientAddress())

    def leave(self, channel: StreamingChannel) -> None:
        """A connection is over."""
        self.channels.discard(channel)
        if not self.channels:
            self.hasten()
        network = self._admitted.pop(channel, None)
        if network is not None:
            self._of_network[network] -= 1
            if not self._of_network[network]:
                del self._of_network[network]

    @property
    def may_linger(self) -> bool:
        """Whether a connection that is turned away may stay for the moment in which it reads why."""
        return len(self.channels) - len(self._admitted) <= LINGERING

    def watch(self, work: Deferred[None], failed: Callable[[Failure, Request], object], request: Request) -> None:
        """Keep account of a request under way, for :meth:`stop` to wait for.

        :param failed: called when it fails.
        """
        self._under_way[work] = request
        # One callback for all: each pair of them takes 450 bytes for as long as an upload drips.
        work.addBoth(self._over, work, failed, request)

    def _over(
        self, result: object, work: Deferred[None], failed: Callable[[Failure, Request], object], request: Request
    ) -> None:
        try:
            if isinstance(result, Failure):
                failed(result, request)
        except Exception:
            _log.failure("a request failed behind its answer ({id})", id=getattr(request, "id", "-"))
        finally:
            self._under_way.pop(work, None)

    async def drain(self, seconds: float) -> None:
        """Let each connection have the request that it has begun, and wait for that as long as it may take."""
        self.is_draining = True
        self.timeOut = LAST_CHANCE if self.timeOut is None else min(self.timeOut, LAST_CHANCE)
        for channel in list(self.channels):
            channel.drain()
        await self._until_empty(seconds)

    def hasten(self) -> None:
        """Wait no longer."""
        empty, self._empty = self._empty, None
        if empty is not None:
            empty.callback(None)

    async def _until_empty(self, seconds: float) -> None:
        if self.channels:
            empty: Deferred[None] = Deferred()
            self._empty = empty
            call = self.reactor.callLater(seconds, self.hasten)
            await empty
            if call.active():
                call.cancel()

    async def stop(self) -> None:
        """End all connections, and wait until their requests have cleaned up.

        Bodies are refused: their clients hear that they should go on in a moment. What is whole gets its answer.
        """
        self.is_draining = True
        for channel in list(self.channels):
            channel.drain()
            channel.stop()
        self.tally.stop()
        while self._under_way:
            await DeferredList(list(self._under_way))
        await self._until_empty(FAREWELL_TIME)
        for channel in list(self.channels):
            channel.forceAbortClient()

    def acceptableProtocols(self) -> list[bytes]:
        """HTTP/1.1 only, also where the h2 package is installed."""
        return [b"http/1.1"]
