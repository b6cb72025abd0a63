"""What happens to uploads, for whoever is asked before and told afterwards: the seam between uploads and hooks.

=================  ========================================  ================================================
``pre-create``     before a byte of the body is accepted     may refuse; may change the metadata
``post-create``    there is an upload that can be resumed    told at least once
``post-receive``   bytes have come, every now and then       told if it can be; may stop the upload
``pre-finish``     the file is there, the answer isn't sent  may change the answer
``post-finish``    the same, after ``pre-finish``            told at least once
``pre-terminate``  before an upload is cancelled             may refuse
``post-terminate`` an upload has been cancelled              told at least once
=================  ========================================  ================================================

Who sends a file by a plain PUT, or in a form, has an upload too, which begins and ends in one request: it is told of
when it is finished, ``post-create`` first, and one that was cut is told of by nobody.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from twisted.logger import Logger
from twisted.web.http import NO_CONTENT, NOT_MODIFIED
from twisted.web.server import Request

from lwstwisted import errors
from lwstwisted.errors import Refusal, Refused
from lwstwisted.interfaces import Name

FRAMING = frozenset({"connection", "content-length", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"})
"""Fields that say where an answer ends; only who sends it may set them."""


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload as it is told of.

    :ivar id: "" before it is created.
    :ivar size: bytes; None if nobody knows yet.
    :ivar offset: bytes that are there.
    :ivar metadata: what the client says of it.
    :ivar is_partial: whether it is a part of a concatenation.
    :ivar parts: ids of what is concatenated; () for any other upload.
    :ivar at: where its bytes are beneath the root of the store; None before it is created.
    """

    id: str = ""
    size: int | None = None
    offset: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    is_partial: bool = False
    parts: Sequence[str] = ()
    at: Name | None = None


@dataclass(frozen=True, slots=True)
class Cause:
    """The request that caused an event; an empty one if none did.

    :ivar headers: by names as Go writes them, since that is what programs for tusd look for: ``Etag``.
    """

    method: str = ""
    uri: str = ""
    address: str = ""
    headers: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Request) -> Cause:
        """What there is to say of a request."""
        return cls(
            _text(request.method),
            _text(request.uri),
            _address(request.getClientAddress()),
            {
                "-".join(word.capitalize() for word in _text(name).split("-")): [_text(value) for value in values]
                for name, values in request.requestHeaders.getAllRawHeaders()
            },
        )


_log = Logger()

NO_CAUSE = Cause()
"""Of what nobody has asked for: a concatenation that goes on by itself."""


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _address(address: Any) -> str:
    host = getattr(address, "host", None)
    if host is None:
        return ""
    return f"[{host}]:{address.port}" if ":" in host else f"{host}:{address.port}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What somebody who was asked wants to be different.

    :ivar status: of the response to the client; 0 for the usual one.
    :ivar body: of that; "" for the usual one.
    :ivar headers: fields that it gets.
    :ivar metadata: instead of what the client said; None for no change.
    """

    status: int = 0
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] | None = None

    def refusing(self, refusal: Refusal) -> Refused:
        """A refusal that says to the client what the answer says, and else what ``refusal`` does."""
        said = Refusal(refusal.code, self.status or refusal.status, self.body or refusal.sentence)
        return Refused(said, {name.encode(): value.encode() for name, value in self._fields()})

    def followed_by(self, later: Answer) -> Answer:
        """Both; where they differ, the later one."""
        headers = {**self.headers, **later.headers}
        return Answer(later.status or self.status, later.body or self.body, headers, later.metadata or self.metadata)

    @property
    def has_content(self) -> bool:
        """Whether another response is wanted, and not only further fields."""
        return bool(self.status or self.body)

    def amend(self, request: Request) -> None:
        """Change a response that is ready but for its end: the last thing before ``request.finish()``."""
        if request.channel is None or request.startedWriting:
            return
        for name, value in self._fields():
            request.setHeader(name.encode(), value.encode())
        may_have_content = request.code not in (NO_CONTENT, NOT_MODIFIED)
        if self.status:
            request.setResponseCode(self.status)
            may_have_content = self.status not in (NO_CONTENT, NOT_MODIFIED)
        if not may_have_content:
            request.responseHeaders.removeHeader(b"content-length")
        elif self.has_content:
            body = b"" if request.method == b"HEAD" else self.body.encode()
            request.setHeader(b"Content-Length", b"%d" % len(body))
            request.write(body)

    def _fields(self) -> list[tuple[str, str]]:
        return [(name, value) for name, value in self.headers.items() if name.lower() not in FRAMING]


NO_WISHES = Answer()


class Finishing(Protocol):
    """The end of one upload, which is told of if the file has got its name, and else isn't."""

    def announce(self, etag: str, size: int) -> None:
        """Note, durably, that a file is about to get its name. It blocks, and belongs to a thread.

        :param etag: of the whole, durable file.
        :raises OSError: if it can't be noted. Then the file must not get its name.
        """

    async def named(self) -> Answer:
        """Tell that the file has its name.

        :raises Refused: ``HOOK_FAILED``, ``HOOK_UNREACHABLE``, for ``pre-finish``; the file stays.
        """

    def failed(self) -> None:
        """Forget it, because something went wrong; unless the file has got its name all the same, as a look tells."""


class Events(Protocol):
    """Who is asked and told. Where there is nobody, there is None instead."""

    async def may_create(self, upload: Upload, cause: Cause) -> Answer:
        """Ask before an upload is created.

        :raises Refused: if it may not be; ``HOOK_FAILED``, ``HOOK_UNREACHABLE``; ``HOOKS_BEHIND``.
        """

    async def created(self, upload: Upload, cause: Cause) -> None:
        """Tell of an upload that may outlive its request. It is durable that this will be told.

        :raises Refused: ``STORE_FAILED``, ``DISK_FULL``.
        """

    def receiving(
        self, upload: Upload, cause: Cause, offset: Callable[[], int], stop: Callable[[Refused], None]
    ) -> Callable[[], None]:
        """Tell how an upload goes on, from now on.

        :param offset: tells how far it is.
        :param stop: is called, at most once, if it is not to go on.
        :returns: what is to be called at the end of the body.
        """

    def finishing(self, upload: Upload, cause: Cause, has_begun: bool) -> Finishing:
        """Get ready for the end of an upload.

        :param upload: as it will be; ``at`` is the name of the file.
        :param has_begun: whether it was told of by :meth:`created`.
        """

    async def completed(self, upload: Upload, cause: Cause) -> Answer:
        """Tell that all bytes are there of an upload that doesn't become a file: a part of a concatenation.

        :raises Refused: ``HOOK_FAILED``, ``HOOK_UNREACHABLE``, for ``pre-finish``; ``STORE_FAILED``, ``DISK_FULL``.
        """

    async def announce(self, endings: Sequence[tuple[Finishing, str, int]]) -> None:
        """Call :meth:`Finishing.announce` for several files, with their entity-tags and sizes, and all or nothing.

        :raises Refused: ``STORE_FAILED``, ``DISK_FULL``.
        """

    async def may_terminate(self, upload: Upload, cause: Cause) -> None:
        """Ask before an upload is cancelled.

        :raises Refused: if it may not be; ``HOOK_FAILED``, ``HOOK_UNREACHABLE``.
        """

    async def terminated(self, upload: Upload, cause: Cause) -> None:
        """Tell of an upload that was cancelled. It is durable that this will be told.

        :raises Refused: ``STORE_FAILED``, ``DISK_FULL``.
        """


def rename_refused(hook_said: Mapping[str, str], names: Mapping[str, str]) -> None:
    """Refuse metadata by which a file would have another name than its client has given it by the URL.

    :raises Refused: ``HOOK_FAILED``.
    """
    for key, name in names.items():
        if hook_said.get(key, name) != name:
            _log.error("hook pre-create wants {key!r} to be changed, but the URL says it", key=key)
            raise Refused(errors.HOOK_FAILED)


def new_id() -> str:
    """An id for an upload that lives as long as its request."""
    return secrets.token_hex(16)


def metadata_of(name: Name, kind: bytes) -> Mapping[str, str]:
    """What an upload says of itself whose client has no words for metadata, in those of tus clients.

    :param kind: its media type, or b"".
    """
    metadata = {"filename": name[-1], "path": "/".join(name)} if name else {}
    if kind:
        metadata["filetype"] = kind.decode("utf-8", "replace")
    return metadata
