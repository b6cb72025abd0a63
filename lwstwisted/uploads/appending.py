"""What one request appends to an upload: durable in steps while it arrives, or all together if it has to be proven."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
"""Seconds after which it is, for slow clients."""


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
    """The part of an upload that one request brings: what a :class:`Transfer` writes to."""

    etag = ""

    def __init__(
        self,
        stored: StoredUpload,
        clock: IReactorTime,
        proof: Proof | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._stored = stored
        self._clock = clock
        self._proof = proof
        self._progress = progress
        self._appended = 0
        self._since = clock.seconds()
        self._checkpoint: Deferred[None] | None = None
        self._failure: Exception | None = None
        self._begin = stored.state.offset

    async def append(self, data: memoryview) -> None:
        """See ``PartialFile``."""
        if self._failure is not None:
            raise self._failure
        await self._stored.append(data)
        self._appended += len(data)
        is_due = self._appended >= CHECKPOINT or self._clock.seconds() - self._since >= CHECKPOINT_TIME
        is_free = self._proof is None or not self._proof.is_announced
        if is_due and is_free and self._checkpoint is None:
            self._appended, self._since = 0, self._clock.seconds()
            self._checkpoint = Deferred()
            Deferred.fromCoroutine(self._make_durable())

    async def _make_durable(self) -> None:
        try:
            await self._stored.checkpoint()
            if self._progress is not None:
                self._progress(self._stored.state.offset)
        except Exception as failure:
            self._failure = failure
        done, self._checkpoint = self._checkpoint, None
        assert done is not None
        done.callback(None)

    async def commit(self, data: memoryview) -> bool:
        """See ``PartialFile``."""
        await self._settled()
        if self._failure is not None:
            raise self._failure
        expected = {} if self._proof is None else self._proof.expected()
        if self._proof is None or not expected:
            return await self._stored.commit(data)
        if self._stored.state.offset != self._begin:
            raise Refused(errors.BAD_CHECKSUM)  # it comes too late for what is durable
        await self._stored.append(data)
        if not await self._stored.verify(expected):
            raise Refused(self._proof.refusal)
        return await self._stored.commit(memoryview(b""))

    async def discard(self) -> None:
        """See ``PartialFile``."""
        await self._settled()
        await self._stored.discard()

    async def _settled(self) -> None:
        if self._checkpoint is not None:
            await self._checkpoint
