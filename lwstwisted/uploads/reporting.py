"""What one request for a resumable upload asks and tells an application, if there is one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from lwstwisted.errors import Refused
from lwstwisted.hooks.events import NO_WISHES, Answer, Cause, Events, Upload
from lwstwisted.interfaces import Announce, Name, Named, unannounced
from lwstwisted.stores.names import STATE_FOLDER


def place_of(id: str) -> Name:
    """Where the bytes of an upload are before it is a file (``stores/resumable.py``)."""
    return STATE_FOLDER, "uploads", f"{id}.data"


def _nothing() -> None:
    """The end of what nobody hears of."""


class Reporting:
    """Asks and tells for one request.

    :param events: None where nobody is asked or told.
    :param cause: the request.
    :ivar said: what the application wants of the answer.
    """

    def __init__(self, events: Events | None, cause: Cause) -> None:
        self.said = NO_WISHES
        self._events = events
        self._cause = cause
        self._failure: Refused | None = None

    async def may_create(self, upload: Upload) -> Answer:
        """See :class:`~lwstwisted.hooks.events.Events`."""
        if self._events is not None:
            self.said = await self._events.may_create(upload, self._cause)
        return self.said

    async def created(self, upload: Upload) -> None:
        """See :class:`~lwstwisted.hooks.events.Events`."""
        if self._events is not None:
            await self._events.created(upload, self._cause)

    def receiving(
        self, upload: Upload, offset: Callable[[], int], stop: Callable[[Refused], None]
    ) -> Callable[[], None]:
        """See :class:`~lwstwisted.hooks.events.Events`; here ``offset`` is that within the request."""
        if self._events is None:
            return _nothing
        return self._events.receiving(upload, self._cause, lambda: upload.offset + offset(), stop)

    async def naming(self, upload: Upload, name_it: Callable[[Announce], Awaitable[Named]]) -> Named:
        """Tell of the end of an upload.

        :param upload: ``at`` is the name of the file.
        :param name_it: gives the name.
        """
        if self._events is None:
            return await name_it(unannounced)
        ending = self._events.finishing(upload, self._cause, has_begun=True)
        try:
            named = await name_it(ending.announce)
        except BaseException:
            ending.failed()
            raise
        try:
            self.said = self.said.followed_by(await ending.named())
        except Refused as refused:
            self._failure = refused
        return named

    def ended(self, named: Named) -> Named:
        """Raise what ``pre-finish`` was refused with, once: the file is there, and whoever asks again hears that."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return named

    async def completed(self, upload: Upload) -> None:
        """See :class:`~lwstwisted.hooks.events.Events`."""
        if self._events is not None:
            self.said = self.said.followed_by(await self._events.completed(upload, self._cause))

    async def may_terminate(self, upload: Upload) -> None:
        """See :class:`~lwstwisted.hooks.events.Events`."""
        if self._events is not None:
            await self._events.may_terminate(upload, self._cause)

    async def terminated(self, upload: Upload) -> None:
        """See :class:`~lwstwisted.hooks.events.Events`."""
        if self._events is not None:
            await self._events.terminated(upload, self._cause)
