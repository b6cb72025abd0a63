"""One upload while its bytes arrive: the consumer between a request body and the store.

**The facts.** A write to disk is fast until the kernel has too many dirty pages; then single writes block for
tens of milliseconds. A thread per write costs tens of microseconds, so small writes are dear.

**The decision.** Bytes are gathered into blocks; one block is written at a time, in the store's threads. A
block is handed over when it is full, or when the store is idle and the block is worth a write. What waits is
counted: above :data:`HIGH` the body is paused, at or below :data:`LOW` it goes on. So an upload holds at most
``HIGH`` + one delivery of waiting bytes + one block that is being written, whatever the client does and
however long the store takes. The last bytes of an upload go to the store together with the commit: a small
file costs one trip to the threads.

**The price** is one copy, from the memory that the transport lends for the length of a call into a block.
Blocks are used again. A new one is mapped, not allocated: Python fills a new ``bytearray`` with zeros, while mapped
memory counts when it is filled. A client that sends little, or slowly, gets a block as small as what came, which grows
as more comes: what an upload occupies follows what it has sent, and not what it has announced.

**Errors.** The first failure of the store ends the body, and is what :meth:`Transfer.finish` raises. A body that
is cut ends quietly for the store: :meth:`Transfer.abort` lets a write under way end, then discards the file.
"""

from __future__ import annotations

import mmap
from typing import cast
from weakref import WeakSet

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IConsumer, IProducer, IPushProducer
from zope.interface import implementer

from lwstwisted import errors
from lwstwisted.errors import Refusal, Refused
from lwstwisted.flow import Watermarks
from lwstwisted.interfaces import IBufferReceiver, PartialFile

BLOCK = 1024 * 1024
"""Bytes of a full block: larger writes gain nothing."""
WORTH_A_WRITE = 256 * 1024
"""Bytes that an idle store is given before the block is full."""
HIGH = 2 * 1024 * 1024
"""Waiting bytes above which the body is paused: two blocks, so the store never idles."""
LOW = 1024 * 1024
"""Waiting bytes at or below which it goes on."""
SPARE_BLOCKS = 8
"""Blocks kept for the next upload, in the whole process."""

SMALLEST_BLOCK = 64
"""Bytes of the first block of an upload that drips."""
GROWTH = 4
"""How much larger the next one is than the bytes that are there: each byte is copied a third of a time more for it."""
LARGEST_GROWN = 64 * 1024
"""Bytes from which on a block is a whole one: its pages count one by one."""

Block = bytearray | mmap.mmap

_spare: list[Block] = []
_under_way: WeakSet[Transfer] = WeakSet()


def waiting_bytes() -> int:
    """Bytes that uploads of this process hold in memory, because the store hasn't taken them yet."""
    return sum(transfer.waiting for transfer in _under_way)


def _new_block(here: int, expected: int) -> Block:
    """Memory for the next bytes of an upload.

    :param here: bytes that it takes now.
    :param expected: bytes that are still to come, these included.
    """
    size = min(max(here, expected), max(SMALLEST_BLOCK, GROWTH * here))
    if size <= LARGEST_GROWN and size < BLOCK:
        return bytearray(size)
    if _spare:
        return _spare.pop()
    return mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _recycle(block: Block) -> None:
    if len(block) == BLOCK and len(_spare) < SPARE_BLOCKS:
        _spare.append(block)


@implementer(IConsumer, IBufferReceiver)
class Transfer:
    """The bytes of one upload on their way to the store.

    :param part: the unfinished file.
    :param length: announced bytes, or None.
    :param max_size: bytes; more of them are refused.
    :param overrun: what they are refused with.
    """

    __slots__ = (
        "__weakref__",
        "_block",
        "_failure",
        "_filled",
        "_is_writing",
        "_length",
        "_marks",
        "_max_size",
        "_overrun",
        "_part",
        "_producer",
        "_settling",
        "_waiting",
        "received",
    )

    def __init__(
        self, part: PartialFile, length: int | None, max_size: int, overrun: Refusal = errors.BODY_TOO_LARGE
    ) -> None:
        self._part = part
        self._length = length
        self._max_size = max_size
        self._overrun = overrun
        self._producer: IPushProducer | None = None
        self._block: Block | None = None
        self._filled = 0
        self._waiting: list[tuple[Block, int]] = []  # a few at most
        self._marks = Watermarks(LOW, HIGH)
        self._is_writing = False
        self._settling: Deferred[None] | None = None
        self._failure: BaseException | None = None
        self.received = 0
        _under_way.add(self)

    @property
    def waiting(self) -> int:
        """Bytes that the store hasn't taken yet."""
        return self._marks.level

    # The body calls these

    def registerProducer(self, producer: IProducer, streaming: bool) -> None:
        """See ``IConsumer``."""
        self._producer = cast(IPushProducer, producer)

    def unregisterProducer(self) -> None:
        """See ``IConsumer``."""
        self._producer = None

    def write(self, data: bytes) -> None:
        """See ``IConsumer``."""
        self.bufferReceived(memoryview(data))

    def bufferReceived(self, view: memoryview) -> None:
        """See :class:`~lwstwisted.interfaces.IBufferReceiver`."""
        self.received += len(view)
        if self.received > self._max_size:
            self._fail(Refused(self._overrun))
        if self._failure is not None:
            return
        is_full = self._marks.add(len(view))
        while view:
            # A full block waits for the byte behind it: the last one goes to the store with the commit.
            if self._block is not None and self._filled == len(self._block) == BLOCK:
                self._close_block()
            if self._block is None or self._filled == len(self._block):
                self._grow_block(len(view))
            assert self._block is not None
            taken = min(len(self._block) - self._filled, len(view))
            self._block[self._filled : self._filled + taken] = view[:taken]
            self._filled += taken
            view = view[taken:]
        # Before the write: a store that answers at once resumes the body inside it.
        if is_full and self._producer is not None:
            self._producer.pauseProducing()
        if not self._is_writing and (self._waiting or self._filled >= WORTH_A_WRITE):
            self._is_writing = True
            Deferred.fromCoroutine(self._write_all())

    def _expected(self) -> int:
        """How many bytes are still to come."""
        return BLOCK if self._length is None else self._length - self.received

    def _grow_block(self, count: int) -> None:
        """Make room for some of ``count`` bytes that are here."""
        here = self._filled + count
        block = _new_block(here, here + self._expected())
        if self._block is not None:
            block[: self._filled] = self._block
        self._block = block

    def _close_block(self) -> None:
        if self._block is not None:
            self._waiting.append((self._block, self._filled))
            self._block = None
            self._filled = 0

    async def _write_all(self) -> None:
        """Write what is worth it, one block at a time, until nothing is."""
        try:
            while self._failure is None:
                if not self._waiting and self._filled >= WORTH_A_WRITE:
                    self._close_block()
                if not self._waiting:
                    break
                block, filled = self._waiting.pop(0)
                await self._part.append(memoryview(block)[:filled])
                _recycle(block)
                if self._marks.remove(filled) and self._producer is not None:
                    self._producer.resumeProducing()
        except Exception as failure:
            # What the store didn't take is lost, and nothing may be written behind the gap.
            self._waiting.clear()
            self._block = None
            self._fail(failure)
        self._is_writing = False
        if self._settling is not None:
            self._settling.callback(None)

    def _fail(self, failure: Exception) -> None:
        if self._failure is None:
            self._failure = failure
            if self._producer is not None:
                self._producer.stopProducing()

    # The protocol of the upload calls these

    async def finish(self) -> bool:
        """Write the rest and give the file its name. The body must be over.

        :returns: True if the name is new.
        :raises Refused: what the store failed with, now or before.
        """
        await self._settled()
        if self._failure is not None:
            raise self._failure
        # Fewer bytes than are worth a write are left, and no write is under way.
        block, filled = self._block, self._filled
        self._block, self._filled = None, 0
        if block is None:
            return await self._part.commit(memoryview(b""))
        created = await self._part.commit(memoryview(block)[:filled])
        _recycle(block)
        return created

    def flush(self) -> int:
        """Have what waits written, although it may not be worth it.

        :returns: the bytes that came so far: when so many are written, it is done.
        """
        if self._failure is None:
            self._close_block()
            if self._waiting and not self._is_writing:
                self._is_writing = True
                Deferred.fromCoroutine(self._write_all())
        return self.received

    def stop(self, failure: Exception) -> None:
        """End the body; ``failure`` is why, unless something else has ended it before."""
        self._fail(failure)

    async def keep(self) -> None:
        """Have what arrived stored and committed, although the body is not whole. The body must be over.

        :raises Refused: what the store fails with; :meth:`abort` is all that is left then.
        """
        await self._settled()
        self._close_block()
        while self._waiting:
            block, filled = self._waiting.pop(0)
            # The last one goes to the store together with the commit, as at the end of a whole body.
            await (self._part.append if self._waiting else self._part.commit)(memoryview(block)[:filled])
            _recycle(block)
            if not self._waiting:
                return
        await self._part.commit(memoryview(b""))

    async def abort(self) -> None:
        """Forget the upload; nothing of it is left."""
        if self._failure is None:
            self._failure = errors.BodyStopped()
        await self._settled()
        self._waiting.clear()
        self._block = None
        await self._part.discard()

    @property
    def failure(self) -> BaseException | None:
        """What ended the upload, if anything did."""
        return self._failure

    async def _settled(self) -> None:
        """Wait for the write under way."""
        if self._is_writing:
            self._settling = Deferred()
            await self._settling
            self._settling = None
