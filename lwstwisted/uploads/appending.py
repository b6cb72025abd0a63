"""What one request appends to an upload: durable in steps while it arrives, or all together if it has to be proven."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.web.server import Request

from lwstwisted import errors
from lwstwisted.errors import Refusal, Refused
from lwstwisted.interfaces import StoredUpload
from lwstwisted.uploads.digests import OF_CONTENT, expected_digests

CHECKPOINT = 16 * 1024 * 1024
"""Bytes after which an upload under way is made durable: what a crash costs at most."""
CHECKPOINT_TIME = 5.0
"""Seconds after which it is, for slow clients: what has come by then is written first, however little it is."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What the content of one request has to hash to.

    :ivar expected: tells it by name of the algorithm, when the body has ended: it may be in a trailer.
    :ivar refusal: if it doesn't.
    :ivar is_announced: whether the head has told of it. What is only in a trailer, and can't be known of before, costs
        nobody whose body is cut what had come.
    """

    expected: Callable[[], Mapping[str, bytes]]
    refusal: Refusal
    is_announced: bool = True


def content_proof(request: Request) -> Proof | None:
    """What ``Content-Digest`` says of the content of a request.

    :raises Refused: ``BAD_DIGEST``.
    """
    digests = expected_digests(request, OF_CONTENT)
    return Proof(lambda: digests, errors.DIGEST_MISMATCH) if digests else None


class Appending:
    """The part of an upload that one request brings: what a :class:`Transfer` writes to.

    :ivar name: names the upload, for a body that is whole and has the last bytes. So these are made durable together
        with the name: two syncs less than one after the other.
    :ivar refused: what that was refused with, although all bytes are durable.
    """

    etag = ""
    digests: Mapping[str, bytes] = MappingProxyType({})
    name: Callable[[], Awaitable[object]] | None = None
    refused: Refused | None = None

    def __init__(
        self,
        stored: StoredUpload,
        clock: IReactorTime,
        proof: Proof | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._stored = stored
        self._clock = clock
        self._proof = proof
        self._progress = progress
        self._total = self._counted = self._wanted = 0
        self._since = clock.seconds()
        self._flush: Callable[[], int] | None = None
        self._timer: Any = None
        self._checkpoint: Deferred[None] | None = None
        self._failure: Exception | None = None
        self._begin = stored.state.offset

    async def append(self, data: memoryview) -> None:
        """See ``PartialFile``."""
        if self._failure is not None:
            raise self._failure
        await self._stored.append(data)
        self._total += len(data)
        self._look_what_is_due()

    @property
    def _is_kept_back(self) -> bool:
        """Whether bytes don't count before all of them are proven."""
        return self._proof is not None and self._proof.is_announced

    def _look_what_is_due(self) -> None:
        if self._is_kept_back or self._checkpoint is not None or self._failure is not None:
            return
        new, age = self._total - self._counted, self._clock.seconds() - self._since
        is_late = age >= CHECKPOINT_TIME or self._counted < self._wanted <= self._total
        if new >= CHECKPOINT or (new and is_late):
            self._counted, self._since = self._total, self._clock.seconds()
            if self._timer is not None:
                self._timer.reset(CHECKPOINT_TIME)
            self._checkpoint = Deferred()
            Deferred.fromCoroutine(self._make_durable())

    def begin(self, flush: Callable[[], int]) -> None:
        """Look at the time, until :meth:`end`.

        :param flush: has all written that came, and tells how many bytes these are.
        """
        if not self._is_kept_back:
            self._flush = flush
            self._timer = self._clock.callLater(CHECKPOINT_TIME, self._time_is_up)

    def end(self) -> None:
        """No more bytes come."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _time_is_up(self) -> None:
        assert self._flush is not None
        self._timer = self._clock.callLater(CHECKPOINT_TIME, self._time_is_up)
        self._wanted = self._flush()
        self._look_what_is_due()

    async def _make_durable(self) -> None:
        try:
            await self._stored.checkpoint()
            # It counts also what was written before it began.
            self._counted = max(self._counted, self._stored.state.offset - self._begin)
            if self._progress is not None:
                self._progress(self._stored.state.offset)
        except Exception as failure:
            self._failure = failure
        done, self._checkpoint = self._checkpoint, None
        if self._timer is not None:
            self._look_what_is_due()
        assert done is not None
        done.callback(None)

    async def commit(self, data: memoryview) -> bool:
        """See ``PartialFile``."""
        await self._settled()
        if self._failure is not None:
            raise self._failure
        name, self.name = self.name, None
        expected = {} if self._proof is None else self._proof.expected()
        if not expected and name is None:
            return await self._stored.commit(data)
        await self._stored.append(data)
        self._total += len(data)
        if self._proof is not None and expected and not await self._stored.verify(expected, self._begin):
            raise Refused(self._proof.refusal)
        if name is None:
            return await self._stored.commit(memoryview(b""))
        try:
            await name()
        except Refused as refused:
            if self._stored.state.offset < self._begin + self._total:
                raise
            self.refused = refused
        return True

    async def discard(self) -> None:
        """See ``PartialFile``."""
        await self._settled()
        await self._stored.discard()

    async def _settled(self) -> None:
        self.end()
        if self._checkpoint is not None:
            await self._checkpoint
