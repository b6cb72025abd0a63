"""An upload on disk as a request holds it: calls go to the threads of the store, urgent ones first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lwstwisted.interfaces import NO_DIGESTS, Announce, Check, Digests, Name, Named, UploadState, anything, unannounced
from lwstwisted.stores.resumable import UploadFile
from lwstwisted.stores.threads import Lane, Threads
from lwstwisted.stores.tree import encoded


class LocalUpload:
    """A :class:`~lwstwisted.interfaces.StoredUpload` on disk.

    :param threads: for what writes.
    :param others: for what needs no sync.
    :param siblings: the uploads of the store that are held, which it leaves when it is released.
    """

    def __init__(self, file: UploadFile, threads: Threads, others: Threads, siblings: set[LocalUpload]) -> None:
        self.id = file.id.decode()
        self._file = file
        self._threads = threads
        self._others = others
        self._siblings = siblings
        self._lane = Lane()
        siblings.add(self)

    @property
    def state(self) -> UploadState:
        """See :class:`~lwstwisted.interfaces.StoredUpload`."""
        return self._file.state

    @property
    def etag(self) -> str:
        """See :class:`~lwstwisted.interfaces.PartialFile`."""
        return "" if self.state.named is None else self.state.named.etag

    @property
    def digests(self) -> Mapping[str, bytes]:
        """See :class:`~lwstwisted.interfaces.PartialFile`; nobody knows after the next request."""
        return self._file.digests

    async def append(self, data: memoryview) -> None:
        """See :class:`~lwstwisted.interfaces.PartialFile`."""
        await self._threads.run(self._file.append, data, lane=self._lane)

    async def commit(self, data: memoryview) -> bool:
        """See :class:`~lwstwisted.interfaces.StoredUpload`."""
        if not data and self.state.named is None and self._file.is_settled:
            return True
        return await self._threads.run(self._file.commit, data, lane=self._lane)

    async def checkpoint(self) -> None:
        """See :class:`~lwstwisted.interfaces.StoredUpload`."""
        await self._threads.run(self._file.checkpoint, lane=self._lane)

    async def verify(self, digests: Mapping[str, bytes], begin: int | None = None) -> bool:
        """See :class:`~lwstwisted.interfaces.StoredUpload`."""
        begin = self.state.offset if begin is None else begin
        return await self._threads.run(self._file.verify, digests, begin, lane=self._lane)

    async def discard(self) -> None:
        """See :class:`~lwstwisted.interfaces.StoredUpload`."""
        if self._file.is_open:
            await self._threads.finish(self._file.discard, lane=self._lane)

    async def keep(self, record: Mapping[str, Any], length: int | None) -> None:
        """See :class:`~lwstwisted.interfaces.StoredUpload`."""
        await self._threads.run(self._file.keep, record, length, lane=self._lane)

    async def take_from(self, other: Any) -> None:
        """See :class:`~lwstwisted.interfaces.StoredUpload`."""
        await self._threads.run(self._file.take_from, cast(LocalUpload, other)._file, lane=self._lane)

    async def name_it(
        self,
        name: Name,
        check: Check = anything,
        digests: Digests = NO_DIGESTS,
        announce: Announce = unannounced,
    ) -> Named:
        """See :class:`~lwstwisted.interfaces.StoredUpload`."""
        return await self._threads.run(self._file.name_it, encoded(name), check, digests, announce, lane=self._lane)

    async def remove(self) -> None:
        """See :class:`~lwstwisted.interfaces.StoredUpload`."""
        await self._threads.run(self._file.remove, lane=self._lane)

    def is_wanted(self) -> bool:
        """See :class:`~lwstwisted.interfaces.StoredUpload`."""
        return self._file.is_wanted()

    async def release(self) -> None:
        """See :class:`~lwstwisted.interfaces.StoredUpload`."""
        if self not in self._siblings:
            return  # it is another one's by now
        self._siblings.discard(self)
        if self._file.is_open:
            await self._others.finish(self._file.close)

    def hurry(self) -> None:
        """Go ahead of other uploads from now on: somebody waits for this one."""
        self._threads.hurry(self._lane)

    def hand_over(self) -> LocalUpload | None:
        """The same upload for another request, as if that had opened it; this one is released.

        :returns: None if it has to be opened for that: another process waits, or not all of it is as it was noted.
        """
        if not self._file.is_settled or self._file.is_wanted():
            return None
        self._siblings.discard(self)
        return LocalUpload(self._file, self._threads, self._others, self._siblings)
