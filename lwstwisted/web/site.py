"""The factory of :class:`~lwstwisted.web.channel.StreamingChannel`: what an application listens with."""

from __future__ import annotations

from typing import Any, cast

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web.http import combinedLogFormatter, datetimeToLogString
from twisted.web.iweb import IAccessLogFormatter
from twisted.web.resource import IResource
from twisted.web.server import Request, Site
from zope.interface import provider

from lwstwisted.web.channel import IDLE_TIME, StreamingChannel

_log = Logger()


@provider(IAccessLogFormatter)
def combined_log(timestamp: str, request: Request) -> str:
    """Combined log format with the date of the wall clock: the reactor's clock may be another one.

    :param timestamp: what the factory made of the reactor's clock; not used.
    """
    line: str = combinedLogFormatter(datetimeToLogString(), request)
    return line


class StreamingSite(Site):
    """A ``Site`` on which resources that provide
    :class:`~lwstwisted.interfaces.IStreamingResource` get request bodies as they arrive.

    :param resource: the root of the resources; all others than streaming ones work as ever.
    :param reactor: for deadlines; the global one by default.
    :param options: what ``Site`` takes.
    """

    protocol = StreamingChannel  # type: ignore[assignment]

    def __init__(self, resource: IResource, reactor: IReactorTime | None = None, **options: Any) -> None:
        options.setdefault("logFormatter", combined_log)
        options.setdefault("timeout", IDLE_TIME)
        super().__init__(resource, reactor=reactor, **options)  # type: ignore[no-untyped-call]
        self.channels: set[StreamingChannel] = set()
        self._under_way: set[Deferred[None]] = set()

    def getResourceFor(self, request: Request) -> IResource:
        """See ``Site``."""
        channel = cast(StreamingChannel, request.channel)
        found: IResource | None = channel.take_found(request)
        return found if found is not None else super().getResourceFor(request)  # type: ignore[no-untyped-call]

    def watch(self, work: Deferred[None]) -> None:
        """Keep account of something under way, for :meth:`stop` to wait for."""
        self._under_way.add(work)
        work.addErrback(lambda reason: _log.failure("a request failed behind its answer", failure=reason))
        work.addBoth(lambda _: self._under_way.discard(work))

    async def stop(self) -> None:
        """Close all connections, and wait until their requests have cleaned up."""
        for channel in list(self.channels):
            channel.stop()
        while self._under_way:
            await DeferredList(list(self._under_way))

    def acceptableProtocols(self) -> list[bytes]:
        """HTTP/1.1 only, also where the h2 package is installed."""
        return [b"http/1.1"]
