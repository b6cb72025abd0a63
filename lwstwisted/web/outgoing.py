"""The answers of one connection on their way to the client.

The transport has one producer, this one; a resource's producer is paused and resumed through it. A long answer is
given to the transport slice by slice, so that a client which reads slowly is told from one which does not
read at all: the transport says that it is full, and says again when it is not.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from twisted.internet.interfaces import IPushProducer
from twisted.logger import Logger
from twisted.web.http_headers import Headers
from zope.interface import implementer

ANSWER_SLICE = 64 * 1024
"""Bytes of an answer given to the transport at once; what is behind them waits for the client to read."""
PULL_AGAIN = 0.01
"""Seconds until a producer that had nothing to give (the answer to HEAD, say) is asked again."""

_log = Logger()


class AnswerSource(Protocol):
    """What the answers ask of their channel."""

    def client_is_behind(self) -> None:
        """The transport takes nothing more until the client has read."""

    def client_has_read(self) -> None:
        """It does again."""

    def forceAbortClient(self) -> None:
        """An answer can't go on."""


@implementer(IPushProducer)
class Outgoing:
    """Between the resources of one connection and its transport.

    :param channel: who is told of the client.
    :param transport: a consumer; this object becomes its producer.
    :param clock: an ``IReactorTime``.
    :ivar is_full: the transport takes nothing until the client has read.
    """

    __slots__ = (
        "_channel",
        "_clock",
        "_has_written",
        "_is_over",
        "_is_producer_paused",
        "_is_pulled",
        "_producer",
        "_transport",
        "_unsent",
        "_will_pull",
        "is_full",
    )

    def __init__(self, channel: AnswerSource, transport: Any, clock: Any) -> None:
        self._channel = channel
        self._transport = transport
        self._clock = clock
        self.is_full = False
        self._unsent: deque[memoryview] | None = None  # a deque takes 760 bytes, and few answers wait
        self._producer: Any = None
        self._is_pulled = False  # the producer is asked for each piece
        self._will_pull = False
        self._has_written = False
        self._is_producer_paused = False
        self._is_over = False
        transport.registerProducer(self, True)

    @property
    def has_producer(self) -> bool:
        """Whether a resource produces the answer; it is paused then, instead of its client."""
        return self._producer is not None

    def write(self, data: bytes) -> None:
        """Send a piece of an answer."""
        self._has_written = True
        if self.is_full or len(data) > ANSWER_SLICE:
            if self._unsent is None:
                self._unsent = deque()
            self._unsent.append(memoryview(data))
            self._send()
        else:
            self._transport.write(data)

    def _send(self) -> None:
        """Give the transport as much as it takes."""
        while self._unsent and not self.is_full:
            view = self._unsent.popleft()
            if len(view) > ANSWER_SLICE:
                self._unsent.appendleft(view[ANSWER_SLICE:])
            self._transport.write(bytes(view[:ANSWER_SLICE]))
        if not self._unsent:
            self._unsent = None

    def register(self, producer: Any, streaming: bool) -> None:
        """Let a resource produce its answer.

        :param streaming: True for a push producer; one that is pulled is asked for each piece.
        """
        self._producer = producer
        self._is_pulled = not streaming
        if self._is_pulled:
            self._pull()
        elif self.is_full:
            self._pause_producer()

    def unregister(self) -> None:
        """The resource has written what it had."""
        self._producer = None
        self._is_producer_paused = self._is_pulled = False

    def go_on(self) -> None:
        """Let the producer produce, if there is one."""
        if self._is_pulled:
            self._pull()
        elif self._is_producer_paused:
            self._is_producer_paused = False
            self._producer.resumeProducing()

    def _pause_producer(self) -> None:
        if not self._is_pulled and not self._is_producer_paused:
            self._is_producer_paused = True
            self._producer.pauseProducing()

    def _pull_in(self, seconds: float) -> None:
        if not self._will_pull:
            self._will_pull = True
            self._clock.callLater(seconds, self._pull)

    def _pull(self) -> None:
        """Ask the producer for a piece, and again later, also when it had none to give."""
        self._will_pull = False
        if not self._is_pulled or self.is_full or self._is_over:
            return
        self._has_written = False
        try:
            self._producer.resumeProducing()
        except Exception:
            _log.failure("a producer of an answer failed")
            self._channel.forceAbortClient()
            return
        if self._is_pulled and not self.is_full:
            self._pull_in(0 if self._has_written else PULL_AGAIN)

    # What the transport calls

    def pauseProducing(self) -> None:
        """The client is behind: nothing more is sent."""
        if self.is_full:
            return
        self.is_full = True
        self._channel.client_is_behind()
        if self._producer is not None:
            self._pause_producer()

    def resumeProducing(self) -> None:
        """The client has read what the transport had."""
        self.is_full = False
        self._send()
        if not self.is_full:
            self._channel.client_has_read()

    def stopProducing(self) -> None:
        """The transport is gone."""
        self._is_over = True
        self._unsent = None
        producer, self._producer = self._producer, None
        self._is_pulled = False
        if producer is not None:
            producer.stopProducing()


def head_lines(version: bytes, code: bytes, reason: bytes, headers: Headers) -> list[bytes]:
    """The pieces of the head of a response."""
    parts = [version, b" ", code, b" ", reason, b"\r\n"]
    for name, values in headers.getAllRawHeaders():
        for value in values:
            parts += (name, b": ", value, b"\r\n")
    parts.append(b"\r\n")
    return parts
