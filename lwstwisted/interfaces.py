"""What each floor promises the next.

zope interfaces are asked at run time (``providedBy``): where a party offers one,
it is used; where it does not, the old path works. The ``typing.Protocol`` classes
are the seams inside the project that one composition root ties together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, Self

from twisted.internet.interfaces import IPushProducer
from twisted.web.resource import IResource
from zope.interface import Attribute, Interface

# mypy-zope knows a method of an interface by its missing self.
# mypy: disable-error-code="no-untyped-def, misc"


class IPendingReads(Interface):
    """A reactor that keeps the list of readers whose input the kernel cannot announce."""

    def addPending(reader):
        """Have ``reader.doRead()`` called in the next turn, although its descriptor may be silent.

        For the code that reads, and for nobody else: after a read that gave something, when
        a full budget or a pause (over by now) kept it from reading again.
        """

    def parkPending(reader):
        """Note that ``reader`` may have input left and is paused: it gets no turn, and costs none."""

    def removePending(reader):
        """Forget ``reader``, pending or parked; nothing happens where it is neither."""

    def servicePending(reader):
        """Give ``reader`` its turn, if it is still pending.

        For a loop whose ``fake_pollin`` promised it, in the reactor's thread and behind its poll. What ``doRead()``
        returns or raises disconnects the reader, as after an event of the kernel.
        """

    def statistics():
        """What happened so far and what is held now, as :class:`LoopStatistics`."""


@dataclass(frozen=True, slots=True)
class LoopStatistics:
    """What an event loop has done since it was made, and what it holds at this moment.

    :ivar turns: how often it waited for events; None where the loop does not tell (uvloop).
    :ivar longest_turn: seconds from the end of a wait to the begin of the next, at most: so long everybody else
        had to wait. None where the loop does not tell.
    :ivar synthesised_reads: turns given to readers by the pending-read list and not by the kernel.
    :ivar pending: readers that get such a turn next.
    :ivar parked: readers that may have input left and whose consumer has paused them.
    """

    turns: int | None
    longest_turn: float | None
    synthesised_reads: int
    pending: int
    parked: int


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """What a store has met so far, and what it does at this moment.

    :ivar calls: that run in its threads, or wait for one.
    :ivar waiting: those of them that wait.
    :ivar failures: calls that failed so that an operator has to look, by code of the refusal (``errors.py``).
    :ivar promised: bytes of the disk that uploads under way were promised and have not taken yet.
    """

    calls: int
    waiting: int
    failures: Mapping[str, int]
    promised: int


class IFakePollin(Interface):
    """The optional hook of an event loop that drives itself."""

    def fake_pollin(readers) -> bool:
        """Treat each of the ``readers`` as readable, although the kernel says nothing.

        :param readers: a list of ``IReadDescriptor`` providers.
        :returns: True when the loop will run them in its next turn; False when it will
            not, and the default path has to.
        """


class IBufferReceiver(Interface):
    """A protocol or consumer that takes bytes without a copy of its own."""

    def bufferReceived(view):
        """Take input.

        :param view: a ``memoryview`` of bytes, good inside this call only.
        """


class IRequestBody(IPushProducer):
    """The body of a request while it arrives: a push producer of its bytes."""

    length = Attribute("Announced length in bytes, or None where the body is chunked.")

    trailers = Attribute("Pairs of name and value, in bytes: what a chunked body had behind its end; () before that.")

    def deliver_to(consumer):
        """Accept the body: ``100 Continue`` is sent if the client waits for it, and the bytes flow.

        :param consumer: an ``IConsumer``; one that provides :class:`IBufferReceiver` gets
            memoryviews, any other one ``bytes`` through ``write``.
        :returns: a Deferred that fires with None at the end of a whole body. It fails with
            :class:`~lwstwisted.errors.BodyCut` when the client left, with
            :class:`~lwstwisted.errors.Refused` when it broke the framing or stalled, and with
            :class:`~lwstwisted.errors.BodyStopped` when the consumer stopped it.
        """


class IStreamingResource(IResource):
    """A resource that is asked when the headers are complete and gets the body as it arrives."""

    def receive(request, body):
        """Take a request. The response is made on ``request`` as ever.

        Nothing of the body is spent before ``body.deliver_to()``: until then the resource may
        refuse by raising :class:`~lwstwisted.errors.Refused`, now or later.

        :param request: a ``twisted.web.server.Request``; its ``content`` is empty.
        :param body: an :class:`IRequestBody`.
        :returns: a coroutine or Deferred. What it fails with is answered by the channel.
        """


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder.

    :ivar name: the last segment, as text.
    :ivar is_folder: True for a folder, False for a regular file.
    :ivar size: bytes; 0 for a folder.
    :ivar modified: seconds since the epoch, as the file system has them.
    """

    name: str
    is_folder: bool
    size: int
    modified: float


@dataclass(frozen=True, slots=True)
class Found:
    """A finished file as it is at one moment.

    :ivar etag: strong entity-tag with its quotes (RFC 9110 section 8.8.3); another one after each replacement.
    :ivar size: bytes.
    :ivar modified: seconds since the epoch.
    :ivar digests: what its bytes are known to hash to, by ``hashlib`` name; may be empty.
    """

    etag: str
    size: int
    modified: float
    digests: Mapping[str, bytes] = field(default_factory=dict)


Check = Callable[[Found | None], None]
"""Looks at what has a name at the moment, None for nothing, and raises if that is not what it should be. It is
called in threads, perhaps more than once."""

Name = tuple[str, ...]
"""A checked path beneath a store's root: its segments (see ``stores/names.py``); () is the root."""


Digests = Mapping[str, bytes | None]
"""What a file has to hash to, by ``hashlib`` name; None for what is only to be computed."""

NO_DIGESTS: Digests = MappingProxyType({})


def anything(found: Found | None) -> None:
    """The check that lets everything pass."""


Announce = Callable[[str, int], None]
"""Is told the entity-tag and the bytes of a file that is whole and durable, before that gets its name. What it raises
keeps the name from it. It is called in threads."""


def unannounced(etag: str, size: int) -> None:
    """The one for which nobody waits."""


class PartialFile(Protocol):
    """A file that is being written, under no name yet. One call at a time."""

    @property
    def etag(self) -> str:
        """Its entity-tag, once it is committed; "" before."""

    @property
    def digests(self) -> Mapping[str, bytes]:
        """What it hashes to, once it is committed, by each name that was asked for."""

    async def append(self, data: memoryview) -> None:
        """Write ``data`` behind what was written; the memory may be reused afterwards.

        :raises Refused: ``DISK_FULL``, ``QUOTA_EXCEEDED``, ``TOO_MANY_FILES`` or ``STORE_FAILED``; the file is then
            good for :meth:`discard` only.
        """

    async def commit(self, data: memoryview) -> bool:
        """Append ``data``, make the file durable and give it its name, which becomes visible whole.

        :returns: True if the name is new, False if it replaced another file.
        :raises Refused: as :meth:`append`; ``DIGEST_MISMATCH``; what the check of :meth:`Store.create` raises;
            or because the name turned into something that cannot be replaced. A new name is not visible then;
            a replaced file may be, whole, if all that failed was making the replacement durable.
        """

    async def discard(self) -> None:
        """Forget the file; nothing of it is left. Harmless after :meth:`commit` and when repeated."""


class Batch(Protocol):
    """Files that become visible together or not at all, also where the power fails in between. One call at a time."""

    async def create(
        self, name: Name, length: int | None, check: Check = anything, digests: Digests = NO_DIGESTS
    ) -> PartialFile:
        """Begin a file of the batch, under a name of its own.

        As :meth:`Store.create`, except for the commit of what it returns: that makes the file whole and durable,
        and gives it no name yet. It returns True, which tells nothing.
        """

    async def commit(self) -> list[bool]:
        """Give the names to all files that were committed, and end the batch.

        The checks of :meth:`create` are asked for all of them before the first name changes hands.

        :returns: for each file, in the order of their commits, whether its name is new.
        :raises Refused: as :meth:`PartialFile.commit`; everything is then as it was before.
        """

    async def discard(self) -> None:
        """Forget all files; nothing of them is left. Harmless after :meth:`commit` and when repeated."""


class Store(Protocol):
    """Where finished uploads live. All names are checked (:data:`Name`).

    Beside what a method names, any of them may raise ``STORE_FAILED``, ``STOPPING``, and refusals of
    what lies on the way to the name: ``NOT_A_FILE`` (a link), ``NAME_TOO_LONG``, ``OTHER_FILE_SYSTEM``.
    """

    async def create(
        self,
        name: Name,
        length: int | None,
        check: Check = anything,
        digests: Digests = NO_DIGESTS,
        announce: Announce = unannounced,
    ) -> PartialFile:
        """Begin a file.

        :param name: where it will be; folders are made when it is committed, not before.
        :param length: announced bytes, or None.
        :param check: asked now, and again in the moment in which the name changes hands.
        :param digests: of the whole file; they are kept with it.
        :param announce: called when it is committed, before it has its name.
        :raises Refused: if it could not become visible there, or there is no space for it.
        """

    @property
    def failure(self) -> OSError | None:
        """Why nobody should rely on the store any more, until somebody has looked at it; None as a rule.

        A sync that failed: the kernel may have dropped what it had promised to write, of any file.
        """

    def batch(self) -> Batch:
        """Begin a batch of files. It costs nothing before its first file."""

    async def open_file(self, name: Name) -> int:
        """Open a finished file for reading.

        :returns: a descriptor, which the caller closes.
        :raises Refused: ``NOT_FOUND``, ``IS_FOLDER``, ``NOT_A_FILE``.
        """

    async def list_folder(self, name: Name) -> list[Entry]:
        """What is in a folder, sorted by name, without what is not served.

        :raises Refused: ``NOT_FOUND``, ``NOT_A_FOLDER``.
        """

    def describe(self, fd: int) -> Found:
        """What :meth:`open_file` opened. It does not block."""

    async def delete(self, name: Name, check: Check = anything) -> None:
        """Remove a finished file, durably.

        :param check: asked in the moment before.
        :raises Refused: ``NOT_FOUND``, ``IS_FOLDER``, ``NOT_A_FILE``.
        """

    async def stop(self) -> None:
        """Finish what is under way and give back threads and descriptors."""


@dataclass(frozen=True, slots=True)
class Named:
    """What became of an upload that is a file now.

    :ivar created: False if it replaced another file.
    :ivar etag: of the file, with quotes; "" if a crash has kept that from us.
    """

    created: bool
    etag: str


@dataclass(frozen=True, slots=True)
class UploadState:
    """An unfinished upload as it is at one moment.

    :ivar offset: bytes that are durable.
    :ivar length: announced bytes, or None.
    :ivar record: what was kept with it last.
    :ivar expires: when it may be removed, if nothing is written to it until then: seconds since the epoch.
    :ivar named: the file that it has become, if it has; it takes no more bytes then.
    """

    offset: int
    length: int | None
    record: Mapping[str, Any]
    expires: float
    named: Named | None


class StoredUpload(PartialFile, Protocol):
    """An unfinished file that outlives requests and processes, with a record of what it is meant to be.

    Whoever opened it holds it, and nobody else has it, until :meth:`release`. What isn't committed is lost with its
    holder. One call at a time, except for :meth:`checkpoint` and :meth:`is_wanted`.

    :ivar id: unguessable, and good for a URL.
    """

    id: str

    @property
    def state(self) -> UploadState:
        """As it is durable; the offset never goes down."""

    async def commit(self, data: memoryview) -> bool:
        """Append ``data`` and make all of it durable: the offset counts it now.

        :returns: True.
        :raises Refused: as :meth:`PartialFile.append`.
        """

    async def checkpoint(self) -> None:
        """Make durable, and count in the offset, what is appended by now. Appending may go on meanwhile."""

    async def verify(self, digests: Mapping[str, bytes], begin: int | None = None) -> bool:
        """Whether the bytes from ``begin`` on hash to ``digests``, by name of the algorithm.

        :param begin: an offset; None for what was appended since the last commit or checkpoint.
        """

    async def discard(self) -> None:
        """Forget what was appended since the last commit or checkpoint."""

    async def keep(self, record: Mapping[str, Any], length: int | None) -> None:
        """Replace record and announced length, durably.

        :param record: what ``json`` can write.
        :raises Refused: as :meth:`ResumableStore.begin_upload`, if the length is known only now.
        """

    async def take_from(self, other: StoredUpload) -> None:
        """Append all bytes of another upload that is held as well, without a trip through this process."""

    async def name_it(
        self,
        name: Name,
        check: Check = anything,
        digests: Digests = NO_DIGESTS,
        announce: Announce = unannounced,
    ) -> Named:
        """Make all its bytes the file ``name``. It may be repeated, also after a crash in its middle.

        What was appended since the last commit is made durable with it, or without it if it is refused.

        :param digests: of the whole file; they are kept with it.
        :param announce: called before it has its name, unless a crash has kept only its record from saying that.
        :raises Refused: as :meth:`PartialFile.commit`; the upload is what it was before then.
        """

    async def remove(self) -> None:
        """Remove it: bytes, if they are no file yet, and record. Its id is never used again."""

    def is_wanted(self) -> bool:
        """Whether somebody in another process waits for it. It does not block."""

    async def release(self) -> None:
        """Let others have it; harmless when repeated, and after :meth:`remove`."""

    def hurry(self) -> None:
        """Go ahead of other uploads from now on: somebody waits for this one. It does not block."""

    def hand_over(self) -> Self | None:
        """The same upload for another request, as if that had opened it; this one is released. It does not block.

        :returns: None if it has to be released and opened: another process waits, or not all of it is durable.
        """


class ResumableStore(Store, Protocol):
    """A store whose uploads may be continued by another request."""

    async def begin_upload(
        self,
        record: Mapping[str, Any],
        length: int | None,
        lifetime: float,
        name: Name | None = None,
        check: Check = anything,
    ) -> StoredUpload:
        """Begin an upload, durably, and hold it.

        :param record: what ``json`` can write; kept with it. The segments of its ``target`` are the name that it will
            have, unless that is its id: after a crash the store looks whether it has it.
        :param length: announced bytes, which are reserved; or None.
        :param lifetime: seconds after which it expires, from the last time on that something was written to it.
        :param name: what it is going to be named, if anything: what could not be named is refused now.
        :param check: asked now.
        :raises Refused: ``DISK_FULL``, ``QUOTA_EXCEEDED``, ``BODY_TOO_LARGE``, and as :meth:`Store.create`.
        """

    async def open_upload(self, id: str) -> StoredUpload | None:
        """Hold an upload.

        :returns: None if another process holds it, which is told by this that somebody waits: ask again soon.
        :raises Refused: ``UPLOAD_NOT_FOUND``.
        """

    async def look_at_upload(self, id: str) -> UploadState:
        """Look at an upload without holding it.

        :raises Refused: ``UPLOAD_NOT_FOUND``.
        """

    async def list_uploads(self) -> list[str]:
        """The ids of all uploads."""

    async def list_with_parts(self) -> list[str]:
        """The ids of uploads that aren't files yet, and whose records have ``parts``: others that they need."""

    async def sweep_uploads(self) -> int:
        """Remove the uploads that have expired and that nobody holds. Returns how many."""
