"""The body of one request, between the channel that receives it and the consumer that wants it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IConsumer
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.server import Request
from zope.interface import implementer

from lwstwisted.errors import BodyStopped
from lwstwisted.interfaces import IBufferReceiver, IRequestBody
from lwstwisted.web.wire import Head

_log = Logger()


class BodySource(Protocol):
    """What a body asks of its channel."""

    def send_continue(self) -> None:
        """Tell a client that waits for it to send its body."""

    def pump(self) -> None:
        """Hand over what has arrived, as long as it is wanted."""

    def body_paused(self) -> None:
        """The consumer wants no more."""

    def body_resumed(self) -> None:
        """It wants more: first what has arrived, then what the transport brings."""


@implementer(IRequestBody)
class RequestBody:
    """See :class:`~lwstwisted.interfaces.IRequestBody`."""

    __slots__ = (
        "_channel",
        "_consumer",
        "_deliver",
        "_expects_continue",
        "_failure",
        "_finished",
        "is_over",
        "is_paused",
        "length",
        "trailers",
    )

    def __init__(self, channel: BodySource, head: Head) -> None:
        self._channel = channel
        self._expects_continue = head.expects_continue
        self._consumer: Any = None
        self._deliver: Callable[[memoryview], object] | None = None
        self._finished: Deferred[None] | None = None
        self._failure: Failure | None = None
        self.length = head.length
        self.trailers: Sequence[tuple[bytes, bytes]] = ()
        self.is_paused = False
        self.is_over = False

    def deliver_to(self, consumer: IConsumer) -> Deferred[None]:
        """See :class:`~lwstwisted.interfaces.IRequestBody`."""
        if self._finished is not None:
            raise RuntimeError("the body has a consumer already")
        finished: Deferred[None] = Deferred()
        self._finished = finished
        if self._failure is not None:
            self._finished.errback(self._failure)
            return finished
        self._consumer = consumer
        if IBufferReceiver.providedBy(consumer):
            self._deliver = cast(IBufferReceiver, consumer).bufferReceived
        else:
            self._deliver = lambda view: consumer.write(bytes(view))
        consumer.registerProducer(self, True)
        if self._expects_continue and self.length != 0:
            self._channel.send_continue()
        self._channel.pump()
        return finished

    @property
    def is_wanted(self) -> bool:
        """Whether the next piece may be pulled."""
        return self.is_taken and not self.is_paused

    @property
    def is_taken(self) -> bool:
        """Whether there is a consumer that wants the rest, now or later."""
        return self._deliver is not None

    def pauseProducing(self) -> None:
        """See ``IPushProducer``."""
        if not self.is_over:
            self.is_paused = True
            self._channel.body_paused()

    def resumeProducing(self) -> None:
        """See ``IPushProducer``."""
        if self.is_paused:
            self.is_paused = False
            self._channel.body_resumed()

    def stopProducing(self) -> None:
        """See ``IPushProducer``."""
        self.fail(Failure(BodyStopped()))

    # For the channel

    def receive(self, piece: memoryview) -> None:
        """Hand over a piece; what the consumer raises ends its body, not the connection's other duties."""
        assert self._deliver is not None
        try:
            self._deliver(piece)
        except Exception:
            self.fail(Failure())

    def end(self, trailers: Sequence[tuple[bytes, bytes]]) -> None:
        """The body is whole."""
        if not self.is_over:
            self.trailers = trailers
            self._close().callback(None)

    def fail(self, reason: Failure) -> None:
        """The body will not be delivered whole."""
        if self.is_over:
            return
        if self._finished is None:
            self.is_over = True
            self._failure = reason
            return
        self._close().errback(reason)

    def _close(self) -> Deferred[None]:
        self.is_over = True
        self._deliver = None
        if self.is_paused:
            self.resumeProducing()
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            try:
                consumer.unregisterProducer()
            except Exception:
                _log.failure("a consumer of a request body failed at its end")
        assert self._finished is not None
        return self._finished


@implementer(IConsumer)
class Spool:
    """Gathers a body in ``request.content``, for resources that know nothing of streaming."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """See ``IConsumer``; memory and temporary files keep up."""

    def unregisterProducer(self) -> None:
        """See ``IConsumer``."""

    def write(self, data: bytes) -> None:
        """See ``IConsumer``."""
        self._request.handleContentChunk(data)
