"""Clients whose uploads take several requests, by tus and by the IETF's protocol.

Each of them does one thing after another, for one of some uploads: begins it, sends more of it, asks how far it is,
leaves in the middle of a request, cancels it, or forgets it. Some bytes come with a digest, and some of those are not
what it says. Nothing here is a test.
"""

from __future__ import annotations

import hashlib
import http.client
import itertools
import random
import socket
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from typing import Protocol

from tests.powercut_history import History, Operation, content_of
from tests.powercut_http import NO_HEADERS, Connections, Hear, deaf
from tests.powercut_recovery import UPLOAD
from tests.servers import PATIENCE

UPLOADS = 4
"""That a client has under way at most; then it forgets one."""
PARTS = 3
"""Of a concatenation, at most."""

TUS = {"Tus-Resumable": "1.0.0"}
TUS_BYTES = {**TUS, "Content-Type": "application/offset+octet-stream"}
IETF = {"Upload-Draft-Interop-Version": "8"}
IETF_BYTES = {**IETF, "Content-Type": "application/partial-upload"}

CHECKSUM_MISMATCH, DIGEST_MISMATCH = 460, 400


@dataclass
class Upload:
    """One of several requests, as the client knows it.

    :ivar name: of the file that it becomes; "" for a part of a concatenation.
    :ivar size: of the whole.
    :ivar begun: the operation that began it.
    :ivar is_ietf: of the IETF's protocol.
    :ivar is_deferred: whether its length is told with its last bytes.
    :ivar is_spoilt: whether it was said to have other bytes than it will get, so that it never becomes a file.
    :ivar offset: of the next byte; None if the client has to ask.
    :ivar exactly: what the offset has to be when the client asks, if that is certain.
    :ivar sent: bytes that are on their way, or were.
    :ivar was_left: whether a request was cut whose bytes count, whenever they are read.
    """

    name: str
    size: int
    begun: Operation
    is_ietf: bool = False
    is_deferred: bool = False
    is_spoilt: bool = False
    offset: int | None = 0
    exactly: int | None = None
    sent: int = 0
    was_left: bool = False

    @property
    def url(self) -> str:
        return f"/uploads/{self.begun.upload.removeprefix(UPLOAD)}"

    @property
    def fields(self) -> Mapping[str, str]:
        """Of each request that brings no bytes."""
        return IETF if self.is_ietf else TUS

    def content(self, begin: int, end: int) -> bytes:
        """Some of its bytes."""
        first = self.begun.first
        return content_of(self.begun.seed, first + end)[first + begin :]

    def about(self, kind: str) -> Operation:
        """Something to ask of it that brings no bytes."""
        begun = self.begun
        return Operation(
            kind, {}, upload=begun.upload, seed=begun.seed, first=begun.first, since=self.sent, sent=self.sent
        )

    def bringing(self, begin: int, end: int, is_last: bool, is_proven: bool = False) -> Operation:
        """What sends some of its bytes."""
        self.sent = max(self.sent, end)
        operation = self.about("append")
        operation.since, operation.sent, operation.is_proven = begin, end, is_proven
        if is_last and self.is_spoilt:
            operation.kind = "spoil"
        elif is_last and self.name:
            operation.kind = "finish"
            operation.files = {self.name: hashlib.sha256(self.content(0, self.size)).hexdigest()}
        return operation


@dataclass
class Concatenation:
    """An upload that has the bytes of others, one behind another.

    :ivar seed: of all bytes.
    :ivar sizes: of the parts.
    :ivar parts: those that were begun.
    :ivar whole: what they become, once that was begun.
    :ivar finish: the operation that ends it.
    """

    seed: str
    sizes: Sequence[int]
    parts: list[Upload] = field(default_factory=list)
    whole: Upload | None = None
    finish: Operation | None = None

    @property
    def next_part(self) -> Upload | None:
        """One that lacks bytes, as far as the client knows."""
        return next((part for part in self.parts if part.offset != part.size), None)


class FreeNames(Protocol):
    """Where names of new files come from."""

    def whole(self, rng: random.Random) -> str: ...

    def new(self, rng: random.Random) -> str: ...

    def new_below(self, rng: random.Random) -> str: ...

    def note(self, operation: Operation) -> None: ...


class Uploader:
    """What one client does for its uploads, one request after another.

    :param name: which no other one has.
    """

    def __init__(
        self,
        name: str,
        rng: random.Random,
        ports: Sequence[int],
        connections: Connections,
        history: History,
        names: FreeNames,
    ) -> None:
        self._name = name
        self._rng = rng
        self._ports = ports
        self._connections = connections
        self._history = history
        self._names = names
        self._number = itertools.count()
        self._uploads: list[Upload] = []
        self._concatenation: Concatenation | None = None

    def one(self) -> None:
        """Do one thing for one upload."""
        rng = self._rng
        if rng.random() < 0.3:
            self._concatenate()
        elif len(self._uploads) < rng.randint(1, UPLOADS):
            upload = self._begin_ietf() if rng.random() < 0.5 else self._begin_tus()
            if upload is not None:
                self._uploads.append(upload)
        else:
            upload = rng.choice(self._uploads)
            if self._is_over(upload):
                self._uploads.remove(upload)

    def _is_over(self, upload: Upload) -> bool:
        """Do something for an upload; whether that was all."""
        choice = self._rng.random()
        if choice < 0.04:
            return True
        if choice < 0.18:
            self._cancel(upload)
            return True
        return self._go_on(upload)

    def _go_on(self, upload: Upload) -> bool:
        choice = self._rng.random()
        if upload.offset is None or choice < 0.05:
            self._look(upload)
        elif choice < 0.15 and upload.size - upload.offset > 1:
            self._leave(upload, upload.offset)
        elif choice < 0.25 and upload.offset < upload.size:
            self._damage(upload, upload.offset)
        else:
            return self._append(upload, upload.offset)
        return False

    # How they begin

    def _new(self, name: str, is_ietf: bool) -> Upload:
        rng = self._rng
        size = rng.choice([1, 300, 20_000, 100_000]) if rng.random() < 0.85 else 600_000
        begun = Operation("begin", {}, seed=self._seed(), ends_itself=not is_ietf)
        return Upload(name, rng.randint(1, size), begun, is_ietf, is_deferred=rng.random() < 0.2)

    def _seed(self) -> str:
        return f"{self._name} {next(self._number)}"

    def _announced(self, upload: Upload) -> dict[str, str]:
        """What is said at first of the bytes of the whole; now and then it's wrong."""
        rng = self._rng
        if rng.random() > 0.3:
            return {}
        upload.is_spoilt = rng.random() < 0.2
        content = upload.content(0, upload.size) + (b"!" if upload.is_spoilt else b"")
        return {"Repr-Digest": _digest(content)}

    def _begin_tus(self) -> Upload:
        rng = self._rng
        upload = self._new(self._names.whole(rng), is_ietf=False)
        operation, body = upload.begun, b""
        headers = {**TUS, "Upload-Metadata": f"filename {_base64(upload.name.encode())}", **self._announced(upload)}
        headers |= {"Upload-Defer-Length": "1"} if upload.is_deferred else {"Upload-Length": f"{upload.size}"}
        if rng.random() < 0.2:
            operation.sent = upload.sent = rng.randrange(upload.size)
            body = upload.content(0, upload.sent)
            headers |= TUS_BYTES
            if rng.random() < 0.3:
                operation.is_proven = True
                headers |= self._proof(upload, body)
        self._create_tus(upload, headers, body)
        return upload

    def _create_tus(
        self, upload: Upload, headers: Mapping[str, str], body: bytes = b"", finish: Operation | None = None
    ) -> None:
        operation = upload.begun

        def told(response: http.client.HTTPResponse) -> None:
            self._expect(operation, response, 201)
            operation.upload = _named(response.headers)
            # Nobody tells it of an upload that has begun without bytes.
            operation.offset = upload.offset = int(response.headers.get("Upload-Offset", "0"))
            if operation.offset != operation.sent:
                self._problem(f"{operation} was told another offset than {operation.sent}")
            self._history.end(operation)
            if finish is not None:
                finish.upload = operation.upload
                if "Content-Location" in response.headers:
                    self._end(finish)

        self._ask([operation, *filter(None, [finish])], "POST", "/uploads/", told, body, headers)

    def _begin_ietf(self) -> Upload | None:
        """None if one request has brought all of it."""
        rng = self._rng
        is_put = rng.random() < 0.5
        name = rng.choice([self._names.new, self._names.new_below])(rng) if is_put else self._names.whole(rng)
        upload = self._new(name, is_ietf=True)
        begun, is_last = upload.begun, rng.random() < 0.3
        begun.sent = upload.size if is_last else rng.randint(0, upload.size)
        body = upload.content(0, begun.sent)
        headers = {**IETF, "Upload-Complete": f"?{is_last:d}", **self._announced(upload)}
        if not upload.is_deferred:
            headers["Upload-Length"] = f"{upload.size}"
        if not is_last and rng.random() < 0.2:
            begun.is_proven = True
            headers |= self._proof(upload, body)
        if not is_put:
            headers["Content-Disposition"] = f'attachment; filename="{name}"'
        operation = upload.bringing(0, begun.sent, is_last, begun.is_proven)

        def hear(fields: Message) -> None:
            if not begun.upload and "Location" in fields:
                begun.upload = operation.upload = _named(fields)
                begun.offset = 0
                self._history.end(begun)
            self._hear(upload, fields)

        def told(response: http.client.HTTPResponse) -> None:
            if not begun.upload:
                self._problem(f"{operation} was told nothing of its upload before the end")
            if not is_last:
                self._expect(operation, response, 201)
                if _named(response.headers) != begun.upload:
                    self._problem(f"{operation} has two uploads")
            self._note_end(upload, operation, response)

        path = f"/files/{name}" if is_put else "/uploads/"
        self._ask([begun, operation], "PUT" if is_put else "POST", path, told, body, headers, hear)
        return None if is_last else upload

    # How they go on

    def _append(self, upload: Upload, offset: int) -> bool:
        """Send some of it, or the rest; whether that was all."""
        rng = self._rng
        end = upload.size if rng.random() < 0.4 or offset == upload.size else rng.randint(offset + 1, upload.size)
        # By the IETF's protocol all of the bytes may come before anybody says so.
        is_last = end == upload.size and (not upload.is_ietf or offset == end or rng.random() < 0.7)
        body = upload.content(offset, end)
        is_proven = rng.random() < 0.25
        operation = upload.bringing(offset, end, is_last, is_proven)
        headers = self._fields(upload, offset, is_last) | (self._proof(upload, body) if is_proven else {})
        if end == upload.size and upload.is_deferred and not upload.is_ietf:
            headers["Upload-Length"] = f"{upload.size}"

        def told(response: http.client.HTTPResponse) -> None:
            if response.status == 409:
                upload.offset = None  # what was left has been read only now
            else:
                self._note_end(upload, operation, response)

        self._ask([operation], "PATCH", upload.url, told, body, headers, lambda fields: self._hear(upload, fields))
        return is_last and upload.offset is not None and upload.name != ""

    def _note_end(self, upload: Upload, operation: Operation, response: http.client.HTTPResponse) -> None:
        """Of a request with bytes."""
        if operation.kind == "spoil":
            self._expect(operation, response, DIGEST_MISMATCH)
            self._history.end(operation)
            return
        self._expect(operation, response, 201, 204)
        # tus doesn't tell whether the file is new.
        operation.is_new = upload.is_ietf and operation.kind == "finish" and response.status == 201
        operation.offset = upload.offset = int(response.headers["Upload-Offset"])
        if operation.offset != operation.sent:
            self._problem(f"{operation} was told another offset than {operation.sent}: {operation.offset}")
        self._end(operation)

    def _end(self, operation: Operation) -> None:
        self._history.end(operation)
        self._names.note(operation)

    def _hear(self, upload: Upload, fields: Message) -> None:
        """What was told in the middle of a request."""
        if "Upload-Offset" in fields:
            operation = upload.about("told")
            self._history.begin(operation)
            operation.offset = int(fields["Upload-Offset"])
            if operation.offset > upload.sent:
                self._problem(f"{operation} was told an offset that nobody has sent")
            self._history.end(operation)

    def _look(self, upload: Upload) -> None:
        """Ask how far it is."""
        operation = upload.about("ask")

        def told(response: http.client.HTTPResponse) -> None:
            self._expect(operation, response, 200, 204)
            operation.offset = upload.offset = int(response.headers["Upload-Offset"])
            if operation.offset > upload.sent or upload.exactly not in (None, operation.offset):
                self._problem(f"{operation} was told another offset than {upload.exactly or upload.sent}")
            upload.exactly = None
            self._history.end(operation)

        self._ask([operation], "HEAD", upload.url, told, headers=upload.fields)

    def _damage(self, upload: Upload, offset: int) -> None:
        """Send bytes that are not what their digest says."""
        rng = self._rng
        end = rng.randint(offset + 1, upload.size)
        content = upload.content(offset, end)
        at = rng.randrange(len(content))
        body = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        headers = self._fields(upload, offset, end == upload.size) | self._proof(upload, content)
        operation = upload.about("damaged")

        def told(response: http.client.HTTPResponse) -> None:
            upload.exactly = offset
            if response.status != 409:
                self._expect(operation, response, DIGEST_MISMATCH if upload.is_ietf else CHECKSUM_MISMATCH)
                self._history.end(operation)
            if response.status == 409 or upload.was_left:
                upload.exactly = None

        upload.offset = None
        self._ask([operation], "PATCH", upload.url, told, body, headers)

    def _leave(self, upload: Upload, offset: int) -> None:
        """Send less than was announced, and close the connection."""
        rng = self._rng
        announced = rng.randint(offset + 2, upload.size)
        sent = rng.randrange(offset + 1, announced)
        headers = {"Host": "localhost", "Content-Length": f"{announced - offset}"}
        headers |= self._fields(upload, offset, is_last=False)
        upload.offset = None
        if rng.random() < 0.25:
            headers |= self._proof(upload, upload.content(offset, announced))
            operation = upload.about("left")  # of which nothing may stay
            upload.exactly = None if upload.was_left else offset
        else:
            operation = upload.bringing(offset, sent, is_last=False)
            upload.was_left = True
        self._history.begin(operation)
        with socket.create_connection(("127.0.0.1", rng.choice(self._ports)), timeout=PATIENCE) as connection:
            lines = [f"PATCH {upload.url} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            connection.sendall(upload.content(offset, sent))

    def _cancel(self, upload: Upload) -> None:
        operation = upload.about("cancel")

        def told(response: http.client.HTTPResponse) -> None:
            self._expect(operation, response, 204)
            self._history.end(operation)

        self._ask([operation], "DELETE", upload.url, told, headers=upload.fields)

    # Concatenations

    def _concatenate(self) -> None:
        """Go on with the one that is under way."""
        rng, all = self._rng, self._concatenation
        if all is None:
            sizes = [rng.choice([1, 300, 20_000, 50_000]) for _ in range(rng.randint(1, PARTS))]
            all = self._concatenation = Concatenation(self._seed(), sizes)
        if len(all.parts) < len(all.sizes):
            self._begin_part(all)
        elif all.whole is None and (all.next_part is None or rng.random() < 0.3):
            self._begin_whole(all)
        elif all.next_part is not None:
            self._go_on(all.next_part)
        elif all.whole is not None and all.finish is not None and all.finish.ended is None:
            self._look_at_whole(all.whole, all.finish)
        else:
            self._clean_up(all)

    def _begin_part(self, all: Concatenation) -> None:
        number = len(all.parts)
        begun = Operation("begin", {}, seed=all.seed, first=sum(all.sizes[:number]))
        part = Upload("", all.sizes[number], begun)
        headers = {**TUS, "Upload-Length": f"{part.size}", "Upload-Concat": "partial"}
        self._create_tus(part, headers)
        all.parts.append(part)

    def _begin_whole(self, all: Concatenation) -> None:
        """Its parts may lack bytes."""
        name, size, is_due = self._names.whole(self._rng), sum(all.sizes), all.next_part is None
        begun = Operation("begin", {}, seed=all.seed, parts=[part.begun.upload for part in all.parts])
        whole = all.whole = Upload(name, size, begun)
        all.finish = whole.bringing(0, size, is_last=True, is_proven=True)
        concat = "final;" + " ".join(part.url for part in all.parts)
        headers = {**TUS, "Upload-Metadata": f"filename {_base64(name.encode())}", "Upload-Concat": concat}
        self._create_tus(whole, headers, finish=all.finish)
        if is_due and all.finish.ended is None:
            self._problem(f"{all.finish} has all of its parts, and its answer tells of no file")

    def _look_at_whole(self, whole: Upload, finish: Operation) -> None:
        """Whose parts have all of their bytes."""
        operation = whole.about("ask")

        def told(response: http.client.HTTPResponse) -> None:
            self._expect(operation, response, 200)
            if response.headers["Upload-Offset"] != f"{whole.size}" or "Content-Location" not in response.headers:
                self._problem(f"{finish} has all of its parts, and is none: {response.headers.items()}")
            self._history.end(operation)
            self._end(finish)

        self._ask([operation], "HEAD", whole.url, told, headers=TUS)

    def _clean_up(self, all: Concatenation) -> None:
        """The whole doesn't need its parts any more, nor the file what made it."""
        for upload in (*all.parts, all.whole):
            if upload is not None and self._rng.random() < 0.5:
                self._cancel(upload)
        self._concatenation = None

    # What all have in common

    def _fields(self, upload: Upload, offset: int, is_last: bool) -> dict[str, str]:
        """Of a request that brings bytes."""
        if upload.is_ietf:
            return {**IETF_BYTES, "Upload-Offset": f"{offset}", "Upload-Complete": f"?{is_last:d}"}
        return {**TUS_BYTES, "Upload-Offset": f"{offset}"}

    def _proof(self, upload: Upload, content: bytes) -> dict[str, str]:
        """A field that says what the bytes of a request are."""
        if upload.is_ietf:
            return {"Content-Digest": _digest(content)}
        algorithm = self._rng.choice(["sha1", "sha256"])
        return {"Upload-Checksum": f"{algorithm} {_base64(hashlib.new(algorithm, content).digest())}"}

    def _ask(
        self,
        operations: Sequence[Operation],
        method: str,
        path: str,
        told: Callable[[http.client.HTTPResponse], None],
        body: bytes = b"",
        headers: Mapping[str, str] = NO_HEADERS,
        hear: Hear = deaf,
    ) -> None:
        port = self._rng.choice(self._ports)
        for operation in operations:
            self._history.begin(operation)
        self._connections.send(port, method, path, body, headers, hear)
        response = self._connections.answer(port, hear)
        # Before the rest of the answer is read: what the disk is told meanwhile doesn't count.
        told(response)
        response.read()

    def _expect(self, operation: Operation, response: http.client.HTTPResponse, *statuses: int) -> None:
        if response.status not in statuses:
            raise WrongAnswer(f"{operation} was answered {response.status}: {response.read()!r}")

    def _problem(self, text: str) -> None:
        self._history.problems.append(text)


class WrongAnswer(Exception):
    """An answer that no client of an intact service gets."""


def _named(fields: Message) -> str:
    """The upload that an answer tells of."""
    return UPLOAD + str(fields["Location"]).rpartition("/")[2]


def _base64(data: bytes) -> str:
    return b64encode(data).decode()


def _digest(content: bytes) -> str:
    return f"sha-256=:{_base64(hashlib.sha256(content).digest())}:"
