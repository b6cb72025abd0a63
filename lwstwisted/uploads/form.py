"""``POST /files/folder/``: a form with files (multipart/form-data, RFC 7578), as browsers and ``curl -F`` send it.

All files of a form become visible together or not at all. Each goes to the store while it arrives, as one
:class:`~lwstwisted.uploads.transfer.Transfer`, and becomes whole and durable there without a name; when the form has
ended as it should, they get their names in one commit (``stores/batch.py``). Conditions of the request (If-Match and
its like) hold for each of the files, its digests for the form as it was sent. Fields that are no files are limited, and
otherwise ignored.

**Space.** The announced length of a form is an upper bound of the bytes of its files. A store that can reserves that
before the body is accepted, and the files take from it; what boundaries and fields had of it is free again when the
form is over. The files of a chunked form ask for space as they are written.

**Flow.** Events are *pulled* out of the parser, as everywhere here: the reader of a form is a coroutine that goes on to
the next event when the store has taken the last one. While it waits (for a file to be opened, to be made durable, or
for a store that is behind) the body is paused. So there is no queue of events, and a form holds at most::

    what the transport had on its way when the pause came   one delivery, 256 KiB
    the slice that is parsed, and its pieces                4 x 64 KiB, less in the common case
    the transfer of one file                                HIGH + one piece + one block = 3 MiB + 64 KiB
    names of its files, up to PARTS                         1000 x 255 bytes, in some objects each

and two descriptors, however many files there are.

**Stalls.** Everything between two waits is bounded: a delivery is at most as long as the transport's budget, and
contains at most PARTS parts with HEADER_LINES lines each.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from html import escape
from typing import Protocol, cast, runtime_checkable
from urllib.parse import quote

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IConsumer, IProducer, IPushProducer
from twisted.web.http import CREATED
from twisted.web.server import Request
from zope.interface import implementer

from lwstwisted import errors
from lwstwisted.access.rules import Action
from lwstwisted.access.visitor import ANYBODY, Visitor
from lwstwisted.errors import BodyStopped, Refused
from lwstwisted.hooks.events import NO_WISHES, Answer, Cause, Events, Finishing, Upload, metadata_of, new_id
from lwstwisted.interfaces import NO_DIGESTS, Check, Digests, IBufferReceiver, IRequestBody, Name, PartialFile, Store
from lwstwisted.stores.hashing import RunningDigests
from lwstwisted.stores.names import parse_name
from lwstwisted.uploads.announced import require_identity, require_length
from lwstwisted.uploads.conditions import Conditions
from lwstwisted.uploads.digests import expected_digests
from lwstwisted.uploads.pages import link, send_json, send_page, wants_json
from lwstwisted.uploads.parts import SLICE, Part, PartReader, boundary_of
from lwstwisted.uploads.transfer import Transfer

FIELD_BYTES = 64 * 1024
"""Bytes of a field that is no file: a long text that somebody typed. Larger things are files."""


@runtime_checkable
class Reserving(Protocol):
    """What a :class:`~lwstwisted.interfaces.Batch` may offer beside its own."""

    async def reserve(self, length: int) -> None:
        """Have space for files of so many bytes together, before any of them begins. The end of the batch ends it.

        :raises Refused: ``DISK_FULL``, ``QUOTA_EXCEEDED``; ``BODY_TOO_LARGE`` for more than could ever be had.
        """


async def post_form(
    request: Request,
    body: IRequestBody,
    store: Store,
    folder: Name,
    max_size: int,
    visitor: Visitor = ANYBODY,
    events: Events | None = None,
) -> None:
    """Store the files of a form in ``folder`` and answer 201 with a list of them.

    :param max_size: bytes of one file.
    :param visitor: is asked about each file.
    :param events: who is asked and told of each file.
    :raises Refused: and nothing of the form is left then.
    :raises lwstwisted.errors.BodyCut: likewise, when the client left.
    """
    boundary = boundary_of(list(request.requestHeaders.getRawHeaders(b"content-type") or []))
    require_length(request)
    require_identity(request)
    conditions, digests = Conditions.of(request), expected_digests(request)
    visitor.require_content(None, request.getHeader(b"content-type"))
    told = None if events is None else (events, Cause.of(request))
    form = Form(store, folder, boundary, min(max_size, visitor.max_size), conditions.check, digests, visitor, told)
    try:
        if body.length is not None:
            await form.reserve(body.length)
        await body.deliver_to(cast(IConsumer, form))
        stored = await form.finish()
    except BaseException as cut:
        cause = form.failure or cut
        await form.abort()
        form.tell_of_failure()
        raise cause from None
    said = await form.tell_of_names()
    if request.channel is not None:  # else the client left when all was sent
        _answer(request, folder, stored, said)


@dataclass(frozen=True, slots=True)
class Stored:
    """A file of a form that has its name.

    :ivar name: the last segment.
    :ivar size: bytes.
    :ivar etag: its entity-tag, with quotes.
    :ivar created: False if it replaced another file.
    """

    name: str
    size: int
    etag: str
    created: bool


@implementer(IConsumer, IBufferReceiver, IPushProducer)
class Form:
    """The consumer of a form, and to each of its transfers the producer.

    :param folder: where its files go.
    :param boundary: of its parts.
    :param max_size: bytes of one file.
    :param check: what has to hold for the name of each file.
    :param digests: what the whole form has to hash to, by ``hashlib`` name.
    :param visitor: who sends it.
    :param told: who is asked and told of each file, and of which request.
    """

    def __init__(
        self,
        store: Store,
        folder: Name,
        boundary: bytes,
        max_size: int,
        check: Check,
        digests: Digests = NO_DIGESTS,
        visitor: Visitor = ANYBODY,
        told: tuple[Events, Cause] | None = None,
    ) -> None:
        self._told = told
        self._endings: list[Finishing] = []
        self._said = NO_WISHES
        self._batch = store.batch()
        self._folder = tuple([segment.encode() for segment in folder])
        self._max_size = max_size
        self._check = check
        self._visitor = visitor
        self._running = RunningDigests(digests)
        self._parts = PartReader(boundary)
        self._producer: IPushProducer | None = None
        self._is_paused = False
        # What has arrived and isn't parsed: at most one delivery, as the body is paused with it.
        self._slices: deque[bytes] = deque()
        self._is_over = False
        self._failure: BaseException | None = None
        # The reader waits for one thing at a time, and looks again whenever it is woken.
        self._waiter: Deferred[None] | None = None
        self._is_hungry = False
        self._is_behind = False
        self._part: PartialFile | None = None
        self._transfer: Transfer | None = None
        self._field_left = 0
        self._overrun = errors.FORM_TOO_LARGE
        self._names: dict[Name, tuple[int, str]] = {}
        self._done: Deferred[None] = Deferred(lambda _: self._reading.cancel())
        self._reading = Deferred.fromCoroutine(self._run())

    @property
    def failure(self) -> BaseException | None:
        """What ended the form, if anything did."""
        return self._failure

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
        if self._failure is not None:
            return
        self._running.update(view)
        self._slices.extend([bytes(view[at : at + SLICE]) for at in range(0, len(view), SLICE)])
        if self._is_hungry:
            self._is_hungry = False
            self._wake()
        if not self._is_hungry and not self._is_paused and self._producer is not None:
            self._is_paused = True
            self._producer.pauseProducing()

    # The transfer calls these

    def pauseProducing(self) -> None:
        """See ``IPushProducer``: the store is behind."""
        self._is_behind = True

    def resumeProducing(self) -> None:
        """See ``IPushProducer``: the store has caught up."""
        self._is_behind = False
        self._wake()

    def stopProducing(self) -> None:
        """See ``IPushProducer``: the file failed, as the reader finds out when it looks again."""
        self.resumeProducing()

    # The protocol of the upload calls these

    async def reserve(self, length: int) -> None:
        """Have space for a form of so many bytes. To be called before the body is accepted.

        :raises Refused: if there isn't; the form is good for :meth:`abort` only then.
        """
        if isinstance(self._batch, Reserving):
            await self._batch.reserve(length)

    async def finish(self) -> list[Stored]:
        """Give all files their names. The body must be over.

        :raises Refused: what the form or the store failed with, now or before.
        """
        self._is_over = True
        self._wake()
        await self._done
        if self._failure is not None:
            raise self._failure
        if not self._names:
            raise Refused(errors.FORM_WITHOUT_FILE)
        if self._running.wrong():
            raise Refused(errors.DIGEST_MISMATCH)
        if self._told is not None:
            files = zip(self._endings, self._names.values(), strict=True)
            await self._told[0].announce([(ending, etag, size) for ending, (size, etag) in files])
        are_new = await self._batch.commit()
        found = zip(self._names.items(), are_new, strict=True)
        return [Stored(name[-1], size, etag, is_new) for (name, (size, etag)), is_new in found]

    async def tell_of_names(self) -> Answer:
        """Tell that all files have their names.

        :returns: what the application wants of the answer.
        :raises Refused: ``HOOK_FAILED``, ``HOOK_UNREACHABLE``; the files stay.
        """
        failure: Refused | None = None
        for ending in self._endings:
            try:
                self._said = self._said.followed_by(await ending.named())
            except Refused as refused:
                failure = failure or refused
        if failure is not None:
            raise failure
        return self._said

    def tell_of_failure(self) -> None:
        """Tell that they have not."""
        for ending in self._endings:
            ending.failed()

    async def abort(self) -> None:
        """Forget the form; nothing of it is left."""
        if self._failure is None:
            self._failure = BodyStopped()
        self._wake()
        await self._done
        if self._transfer is not None:
            await self._transfer.abort()
        await self._batch.discard()

    # The reader

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.callback(None)

    async def _run(self) -> None:
        try:
            await self._read()
        except Exception as failure:
            self._failure = self._failure or failure
            self._slices.clear()
        # First this: a body that is stopped has the form aborted inside the call.
        self._done.callback(None)
        if self._failure is not None and self._producer is not None:
            self._producer.stopProducing()

    async def _read(self) -> None:
        while data := await self._next_slice():
            for event in self._parts.feed(data):
                if isinstance(event, Part):
                    await self._begin(event)
                elif event is not None:
                    await self._take(event)
                else:
                    await self._end()
        self._parts.end()

    async def _next_slice(self) -> bytes:
        """What has arrived; b"" at the end."""
        while not self._slices and not self._is_over:
            waiter = self._waiter = Deferred()
            self._is_hungry = True
            if self._is_paused and self._producer is not None:
                self._is_paused = False
                # It may deliver inside the call, and even end.
                self._producer.resumeProducing()
            await waiter
            self._go_on()
        return self._slices.popleft() if self._slices else b""

    def _go_on(self) -> None:
        """Raise what has happened to the form, or to its file, while the reader waited."""
        failure = self._failure or (self._transfer and self._transfer.failure)
        if failure:
            raise failure

    async def _begin(self, part: Part) -> None:
        if not part.filename:
            # An empty name with content is no field, but a file that nobody could store.
            self._field_left = FIELD_BYTES if part.filename is None else 0
            self._overrun = errors.FORM_TOO_LARGE if part.filename is None else errors.NAME_EMPTY
            return
        name = parse_name([*self._folder, part.filename])
        self._visitor.require(Action.PUT, name)
        if self._told is not None:
            name = await self._approved(name, *self._told)
            self._visitor.require(Action.PUT, name)
            self._go_on()
        if name in self._names:
            raise Refused(errors.FORM_NAME_TWICE)
        self._part = await self._batch.create(name, None, self._visitor.checking(name, self._check))
        self._transfer = Transfer(self._part, None, self._max_size)
        self._transfer.registerProducer(cast(IProducer, self), True)
        self._names[name] = (0, "")
        self._go_on()

    async def _approved(self, name: Name, events: Events, cause: Cause) -> Name:
        """Ask whether a file may come; the name that it gets."""
        metadata = metadata_of(name, b"")
        said = await events.may_create(Upload(metadata=metadata), cause)
        if said.metadata is not None:
            name = parse_name([*self._folder, said.metadata.get("filename", name[-1]).encode()])
            metadata = dict(said.metadata)
        self._said = self._said.followed_by(said)
        self._endings.append(events.finishing(Upload(new_id(), metadata=metadata, at=name), cause, has_begun=False))
        return name

    async def _take(self, data: bytes) -> None:
        if self._transfer is None:
            self._field_left -= len(data)
            if self._field_left < 0:
                raise Refused(self._overrun)
            return
        self._transfer.write(data)
        while self._is_behind:
            self._waiter = Deferred()
            await self._waiter
            self._go_on()
        self._go_on()

    async def _end(self) -> None:
        if self._transfer is None or self._part is None:
            return
        await self._transfer.finish()
        self._names[next(reversed(self._names))] = (self._transfer.received, self._part.etag)
        self._transfer = self._part = None
        self._go_on()


def _answer(request: Request, folder: Name, stored: list[Stored], said: Answer) -> None:
    path = quote(b"/".join([b"", *(request.prepath or []), *[segment.encode() for segment in folder], b""]))
    request.setResponseCode(CREATED)
    said.amend(request)
    if said.has_content:
        request.finish()
    elif wants_json(request):
        send_json(
            request,
            [
                {
                    "name": file.name,
                    "path": path + quote(file.name, safe=""),
                    "size": file.size,
                    "etag": file.etag,
                    "created": file.created,
                }
                for file in stored
            ],
        )
    else:
        rows = "".join(f"<li>{link(path, file.name)} {file.size:,} bytes</li>\n" for file in stored)
        send_page(request, "Stored", f'<ul>\n{rows}</ul>\n<p><a href="{escape(path)}">The folder</a></p>\n')
