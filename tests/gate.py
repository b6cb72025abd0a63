"""A resource whose uploads flow, wait and end as a test says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IConsumer
from twisted.web.resource import Resource
from zope.interface import implementer

from lwstwisted.interfaces import IStreamingResource


@implementer(IConsumer)
class Upload:
    """One request, and the consumer of its body.

    :ivar data: what has come.
    :ivar deliveries: how many bytes each time.
    :ivar violations: sentences, empty when nothing came during a pause.
    :ivar cut: what ended it before it was whole.
    """

    def __init__(self, gate: Gate, request: Any, body: Any) -> None:
        self._gate, self._body = gate, body
        self.request = request
        self.data = bytearray()
        self.deliveries: list[int] = []
        self.violations: list[str] = []
        self.cut: Exception | None = None
        self.is_whole = self.is_answered = self.is_paused = False

    def pause(self) -> None:
        self._body.pauseProducing()
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False
        self._body.resumeProducing()

    def answer(self) -> None:
        self.is_answered = True
        self.request.finish()

    async def take(self) -> None:
        try:
            await self._body.deliver_to(self)
        except Exception as failure:
            self.cut = failure
            if not self.is_answered:
                raise
        else:
            self.is_whole = True
            self._gate.on_whole(self)
            if not self.is_answered:
                self.answer()

    def write(self, data: bytes) -> None:
        if self.is_paused:
            self.violations.append(f"{len(data)} bytes while paused")
        self.data += data
        self.deliveries.append(len(data))
        self._gate.on_data(self)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        pass

    def unregisterProducer(self) -> None:
        pass


def _ignore(_: Upload) -> None:
    pass


@implementer(IStreamingResource)
class Gate(Resource):
    """Takes uploads and answers each when it is whole; a test says what else happens at each event.

    :ivar uploads: all of them, in the order of their beginnings.
    """

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.uploads: list[Upload] = []
        self.on_data: Callable[[Upload], object] = _ignore
        self.on_whole: Callable[[Upload], object] = _ignore

    async def receive(self, request: Any, body: Any) -> None:
        upload = Upload(self, request, body)
        self.uploads.append(upload)
        await upload.take()
