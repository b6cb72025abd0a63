"""Requests whose body a stock ``Site`` has spooled, for resources that want it as it arrives."""

from __future__ import annotations

import os
from typing import IO, Any, cast

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IConsumer
from twisted.python.failure import Failure
from twisted.web.server import NOT_DONE_YET, Request
from zope.interface import implementer

from lwstwisted.errors import BodyStopped
from lwstwisted.interfaces import IRequestBody, IStreamingResource
from lwstwisted.web.answers import answer_refusal, refusal_for

SPOOL_READ = 256 * 1024
"""Bytes read at once from a body that a stock ``Site`` has spooled."""


def receive_spooled(resource: IStreamingResource, request: Request) -> int:
    """Have a resource ``receive`` what a stock ``Site`` renders; what it fails with is answered."""

    def failed(reason: Failure) -> None:
        if request.channel is not None:
            answer_refusal(request, refusal_for(reason, request))

    maybeDeferred(resource.receive, request, SpooledBody(cast(IO[bytes], request.content))).addErrback(failed)
    return NOT_DONE_YET


@implementer(IRequestBody)
class SpooledBody:
    """A body that is there already.

    :param content: a file, read from its current position.
    """

    def __init__(self, content: IO[bytes]) -> None:
        self._content = content
        self.trailers: list[tuple[bytes, bytes]] = []  # which a stock Site has thrown away
        position = content.tell()
        self.length: int | None = content.seek(0, os.SEEK_END) - position
        content.seek(position)
        self._consumer: Any = None
        self._finished: Deferred[None] = Deferred()
        self._is_paused = False
        self._is_over = False

    def deliver_to(self, consumer: IConsumer) -> Deferred[None]:
        """See :class:`~lwstwisted.interfaces.IRequestBody`."""
        self._consumer = consumer
        consumer.registerProducer(self, True)
        self._pump()
        return self._finished

    def _pump(self) -> None:
        while not (self._is_paused or self._is_over):
            data = self._content.read(SPOOL_READ)
            if data:
                self._consumer.write(data)
            else:
                self._end().callback(None)

    def _end(self) -> Deferred[None]:
        self._is_over = True
        self._consumer.unregisterProducer()
        return self._finished

    def pauseProducing(self) -> None:
        """See ``IPushProducer``."""
        self._is_paused = True

    def resumeProducing(self) -> None:
        """See ``IPushProducer``."""
        if self._is_paused:
            self._is_paused = False
            self._pump()

    def stopProducing(self) -> None:
        """See ``IPushProducer``."""
        if not self._is_over:
            self._end().errback(Failure(BodyStopped()))
