"""Resumable uploads of the IETF over real connections: what a client of each draft sees, interim responses too."""

from __future__ import annotations

import errno
import hashlib
import json
import random
import shutil
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import h11
import http_sf
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase
from twisted.web.resource import Resource
from twisted.web.server import Site

from lwstwisted import errors
from lwstwisted.certificate import ensure_development_certificate
from lwstwisted.stores import resumable
from lwstwisted.stores.local import LocalStore
from lwstwisted.uploads import appending
from lwstwisted.uploads.resource import UploadResource
from lwstwisted.uploads.resumable import ResumableResource
from lwstwisted.uploads.session import Sessions
from lwstwisted.web.site import StreamingSite
from tests.conformance import requires
from tests.contracts import sample
from tests.servers import PATIENCE

KIB, MIB = 1024, 1024 * 1024
MAX_SIZE = 16 * MIB
LIFETIME = 3600

PART = "application/partial-upload"
PROBLEMS = "https://iana.org/assignments/http-problem-types#"


@dataclass(frozen=True)
class Draft:
    """What the drafts say that a client of one interop version sends and gets."""

    number: int | None
    field: str = "Upload-Complete"
    progress: bool = True
    part_type: bool = True
    age: str | None = "max-age"

    def says(self, is_complete: bool) -> str:
        return "?1" if is_complete == (self.field == "Upload-Complete") else "?0"

    def fields(self, is_complete: bool | None = None) -> dict[str, str]:
        """The fields of a request."""
        found = {} if self.number is None else {"Upload-Draft-Interop-Version": str(self.number)}
        return found if is_complete is None else {**found, self.field: self.says(is_complete)}


DRAFTS = (
    Draft(3, "Upload-Incomplete", progress=False, part_type=False, age=None),
    Draft(4, progress=False, part_type=False, age=None),
    Draft(5, part_type=False, age=None),
    Draft(6, age="expires"),
    Draft(7),
    Draft(8),
)
LAST = DRAFTS[-1]
FINAL = Draft(None)


@dataclass
class Response:
    status: int
    fields: list[tuple[str, str]]
    body: bytes = b""

    def __getitem__(self, name: str) -> str | None:
        found = [value for key, value in self.fields if key == name.lower()]
        assert len(found) < 2, found
        return found[0] if found else None


@dataclass
class Answer(Response):
    """A final response, and the interim ones before it."""

    interim: tuple[Response, ...] = ()

    @property
    def problem(self) -> dict[str, Any]:
        assert self["Content-Type"] == "application/problem+json", self
        return cast(dict[str, Any], json.loads(self.body))


class Client:
    """A connection whose requests are sent piece by piece. Its methods block."""

    def __init__(self, address: tuple[str, int], context: ssl.SSLContext | None) -> None:
        self._socket = socket.create_connection(address, PATIENCE)
        if context is not None:
            self._socket = context.wrap_socket(self._socket, server_hostname="127.0.0.1")
        self._h11 = h11.Connection(h11.CLIENT)

    def begin(
        self, method: str, path: str, fields: Mapping[str, str], first: bytes = b"", length: int | None = 0
    ) -> None:
        """Send the head and the first bytes of the content, at once.

        :param length: of the content; None for a chunked one.
        """
        framing = ("Transfer-Encoding", "chunked") if length is None else ("Content-Length", str(length))
        head = h11.Request(method=method, target=path, headers=[("Host", "localhost"), framing, *fields.items()])
        data = self._h11.send(head) or b""
        if first:
            data += self._h11.send(h11.Data(data=first)) or b""
        self._socket.sendall(data)

    def end(self, rest: bytes = b"") -> None:
        """Send the rest of the content."""
        data = (self._h11.send(h11.Data(data=rest)) or b"") if rest else b""
        self._socket.sendall(data + (self._h11.send(h11.EndOfMessage()) or b""))

    def event(self) -> Any:
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            self._h11.receive_data(self._socket.recv(65536))
        return event

    def interim(self) -> Response:
        """The next interim response."""
        event = self.event()
        assert isinstance(event, h11.InformationalResponse), event
        return _response(event)

    def answer(self) -> Answer:
        interim, event = [], self.event()
        while isinstance(event, h11.InformationalResponse):
            interim.append(_response(event))
            event = self.event()
        assert isinstance(event, h11.Response), event
        head, body = _response(event), b""
        while isinstance(event := self.event(), h11.Data):
            body += bytes(event.data)
        return Answer(head.status, head.fields, body, tuple(interim))

    def close(self) -> None:
        self._socket.close()


def _response(event: Any) -> Response:
    return Response(event.status_code, [(name.decode(), value.decode("latin-1")) for name, value in event.headers])


def limits(answer: Response) -> dict[str, Any]:
    """What Upload-Limit says."""
    said = answer["Upload-Limit"]
    assert said, answer
    return {key: value for key, (value, _) in cast(Any, http_sf.parse(said.encode(), tltype="dictionary")).items()}


def digest_field(data: bytes, algorithm: str = "sha-256") -> str:
    digest = hashlib.new(algorithm.replace("-", ""), data).digest()
    return str(http_sf.ser({algorithm: digest}))


class RufhCase(TestCase):
    """A site with /files and /uploads, on a port of loopback."""

    timeout = 2 * PATIENCE
    site_class: Callable[..., Site] = StreamingSite
    is_tls = False
    max_size = MAX_SIZE
    allowed_origins: Sequence[str] = ("*",)

    def setUp(self) -> None:
        from twisted.internet import reactor

        self.folder = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.root = self.folder / "root"
        self.store = LocalStore(self.root, cast(Any, reactor), durability="none")
        self.addCleanup(lambda: Deferred.fromCoroutine(self.store.stop()))
        self.sessions = Sessions(self.store, self.max_size, lifetime=LIFETIME, reactor=reactor)
        self.sessions.start()
        self.addCleanup(self.sessions.stop)
        root = Resource()
        root.putChild(b"files", UploadResource(self.store, self.max_size, self.sessions, self.allowed_origins))
        root.putChild(b"uploads", ResumableResource(self.sessions, self.allowed_origins))
        site = self.site_class(root, reactor=reactor, logPath=str(self.folder / "log"))
        if isinstance(site, StreamingSite):
            self.addCleanup(lambda: Deferred.fromCoroutine(site.stop()))
        self.lost = 0
        self.patch(site, "buildProtocol", self._counted(site.buildProtocol))
        self.context: ssl.SSLContext | None = None
        port = self._listen(cast(Any, reactor), site)
        self.addCleanup(port.stopListening)
        self.address = ("127.0.0.1", port.getHost().port)

    def _listen(self, reactor: Any, site: Site) -> Any:
        return reactor.listenTCP(0, site, interface="127.0.0.1")

    def _counted(self, build: Any) -> Any:
        def counted(address: Any) -> Any:
            protocol = build(address)
            lost = protocol.connectionLost

            def connection_lost(*reason: Any) -> None:
                self.lost += 1
                lost(*reason)

            protocol.connectionLost = connection_lost
            return protocol

        return counted

    # Clients

    async def exchange(self, data: bytes) -> bytes:
        """Send bytes as they are, and nothing more; read until the server closes."""

        def run() -> bytes:
            with socket.create_connection(self.address, PATIENCE) as client:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                received = b""
                while arrived := client.recv(65536):
                    received += arrived
                return received

        received: bytes = await deferToThread(run)
        return received

    async def connect(self) -> Client:
        client: Client = await deferToThread(Client, self.address, self.context)
        self.addCleanup(client.close)
        return client

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        fields: Mapping[str, str] | None = None,
        *,
        chunked: bool = False,
    ) -> Answer:
        """One request on a connection of its own."""

        def run() -> Answer:
            client = Client(self.address, self.context)
            try:
                client.begin(method, path, fields or {}, body, None if chunked else len(body))
                client.end()
                return client.answer()
            finally:
                client.close()

        answer: Answer = await deferToThread(run)
        return answer

    async def begin(self, fields: Mapping[str, str] | None = None, body: bytes = b"", name: str = "file") -> str:
        """Begin an upload that goes on later; gives the path of its resource."""
        answer = await self.ask("PUT", f"/files/{name}", body, {**LAST.fields(False), **(fields or {})})
        self.assertEqual(answer.status, 201, answer)
        return answer["Location"] or ""

    async def go_on(
        self,
        path: str,
        offset: int,
        body: bytes,
        is_complete: bool,
        draft: Draft = LAST,
        chunked: bool = False,
        **more: str,
    ) -> Answer:
        """Append."""
        fields = {**draft.fields(is_complete), "Upload-Offset": str(offset), "Content-Type": PART}
        fields.update({name.replace("_", "-"): value for name, value in more.items()})
        return await self.ask("PATCH", path, body, fields, chunked=chunked)

    async def look(self, path: str, draft: Draft = LAST) -> Answer:
        return await self.ask("HEAD", path, fields=draft.fields())

    async def until_lost(self, count: int) -> None:
        """Let the reactor turn until the server has seen so many clients leave."""
        from twisted.internet import reactor

        for _ in range(int(PATIENCE * 100)):
            if self.lost >= count:
                return
            await deferLater(cast(Any, reactor), 0.01)
        raise AssertionError(f"{self.lost} of {count} clients were seen to leave")

    async def until_swept(self, count: int) -> None:
        """Have uploads removed that have expired, until these were so many."""
        from twisted.internet import reactor

        for _ in range(int(PATIENCE * 100)):
            count -= await self.store.sweep_uploads()
            if count <= 0:
                return
            await deferLater(cast(Any, reactor), 0.01)
        raise AssertionError("no upload has expired")

    async def until_no_upload(self) -> None:
        """Let the threads of the store work until it has no upload."""
        from twisted.internet import reactor

        for _ in range(int(PATIENCE * 100)):
            if not await self.store.list_uploads():
                return
            await deferLater(cast(Any, reactor), 0.01)
        raise AssertionError("an upload was kept")

    async def cut(self, method: str, path: str, fields: Mapping[str, str], body: bytes, length: int | None) -> Response:
        """Send a part of a request, leave, and wait until that was seen; gives the first interim response."""
        client, before = await self.connect(), self.lost
        await deferToThread(client.begin, method, path, fields, body, length)
        first = await deferToThread(client.interim)
        await deferToThread(client.close)
        await self.until_lost(before + 1)
        return first

    def stored(self, name: str = "file") -> bytes:
        return (self.root / name).read_bytes()

    def is_there(self, name: str = "file") -> bool:
        return (self.root / name).exists()

    def assert_says(self, answer: Response, is_complete: bool, draft: Draft = LAST, what: object = None) -> None:
        self.assertEqual(answer[draft.field], draft.says(is_complete), what or answer)


class TlsCase(RufhCase):
    """The same over TLS."""

    def _listen(self, reactor: Any, site: Site) -> Any:
        from twisted.internet.ssl import DefaultOpenSSLContextFactory

        pair = str(ensure_development_certificate(self.folder / "pair.pem"))
        self.context = ssl.create_default_context(cafile=pair)
        factory = DefaultOpenSSLContextFactory(pair, pair)
        return reactor.listenSSL(0, site, factory, interface="127.0.0.1")


class Conversations:
    """Whole uploads, for each of the drafts. A mixin, for TCP and TLS."""

    @requires("rufh", "4.2.2", "SHOULD", "An upload resource is announced by a 104, where it can be sent.", 1)
    @requires("rufh", "4.2.2", "MUST", "That 104 has the Location of the upload resource, and its Upload-Limit.", 2)
    @requires("rufh", "4.2.2", "SHOULD", "The answer says by Upload-Complete that the file is what it is about.", 10)
    @requires("rufh", "B", "MUST", "A 104 repeats the interop version of the request.", 3)
    async def test_in_one_request(self: Any) -> None:
        """The client is told where it could go on, and then what any PUT is told."""
        data = sample(200 * KIB)
        for draft in DRAFTS:
            name = f"one-{draft.number}"
            answer = await self.ask("PUT", f"/files/{name}", data, draft.fields(True))
            first, *more = answer.interim
            self.assertEqual((first.status, more), (104, []), draft)
            self.assertRegex(first["Location"], r"^/uploads/[0-9a-f]{32}$")
            self.assertEqual(first["Upload-Draft-Interop-Version"], str(draft.number))
            self.assertEqual(answer["Upload-Draft-Interop-Version"], str(draft.number))
            if draft.age is None:
                self.assertEqual((first["Upload-Limit"], answer["Upload-Limit"]), (None, None), draft)
            else:
                self.assertEqual(set(limits(first)), {"max-size", draft.age}, draft)
            self.assertEqual((answer.status, answer["Location"]), (201, f"/files/{name}"), draft)
            self.assertRegex(answer["ETag"] or "", '^".+"$')
            self.assert_says(answer, True, draft)
            self.assertEqual(answer["Upload-Offset"], str(len(data)), draft)
            self.assertEqual(self.stored(name), data)
            again = await self.ask("PUT", f"/files/{name}", b"new", draft.fields(True))
            self.assertEqual((again.status, again.body, again["Location"]), (204, b"", None), draft)
            self.assertEqual(self.stored(name), b"new")

    @requires("rufh", "4.2.2", "MUST", "An unfinished creation is answered with Location and Upload-Limit.", 3)
    @requires("rufh", "4.2.2", "MUST", "Interim and final responses of a request have the same Location.", 7)
    @requires("rufh", "4.2.2", "MUST", "A length that was announced at the creation is recorded.", 5)
    @requires("rufh", "4.3.2", "MUST", "The offset is retrieved by HEAD: Upload-Offset, and Upload-Complete.", 1, 2)
    @requires("rufh", "4.3.2", "MUST", "It comes with Upload-Length, if that is known, and with Upload-Limit.", 3, 4)
    @requires("rufh", "4.3.2", "SHOULD", "It comes with Cache-Control: no-store.", 5)
    @requires("rufh", "4.4.2", "-", "An append that doesn't complete the upload is answered 2xx with ?0.")
    @requires("rufh", "4.4.2", "MUST", "The answer to what completes an upload says ?1.", 6)
    @requires("rufh", "4.4.2", "SHOULD", "It is the answer that the resource of the creation would have given.", 5)
    @requires("rufh", "4.1.2", "-", "An upload is complete by ?1 with content that was fully processed.")
    @requires("rufh", "4.2.2", "SHOULD", "That answer is 201.", 4)
    @requires("rufh", "4.4.2", "SHOULD", "All answers say by Upload-Complete whether they are those of the file.", 11)
    async def test_in_parts(self: Any) -> None:
        """Begun without an end, looked at, continued, and ended: the file is there only then, and whole."""
        data = sample(100_000)
        for draft in (*DRAFTS, FINAL):
            name = f"parts-{draft.number}"
            fields = {**draft.fields(False), "Upload-Length": str(len(data))}
            begun = await self.ask("PUT", f"/files/{name}", data[:30_000], fields)
            self.assertEqual((begun.status, begun["Upload-Offset"]), (201, "30000"), draft)
            self.assert_says(begun, False, draft)
            path = begun["Location"]
            self.assertEqual([one["Location"] for one in begun.interim], [path] if draft.number else [], draft)
            for method in ("HEAD", "GET"):
                seen = await self.ask(method, path, fields=draft.fields())
                self.assertEqual((seen.status, seen["Upload-Offset"], seen.body), (204, "30000", b""), draft)
                self.assertEqual((seen["Upload-Length"], seen["Cache-Control"]), (str(len(data)), "no-store"))
                self.assert_says(seen, False, draft)
            answers = [begun, seen]
            more = await self.go_on(path, 30_000, data[30_000:60_000], False, draft)
            self.assertEqual((more.status, more["Upload-Offset"]), (204, "60000"), draft)
            self.assert_says(more, False, draft)
            self.assertFalse(self.is_there(name))
            last = await self.go_on(path, 60_000, data[60_000:], True, draft)
            self.assertEqual((last.status, last["Location"]), (201, f"/files/{name}"), draft)
            self.assertEqual((last["Content-Location"], last["Upload-Offset"]), (f"/files/{name}", str(len(data))))
            self.assert_says(last, True, draft)
            self.assertEqual(self.stored(name), data)
            done = await self.look(path, draft)
            self.assertEqual((done["Upload-Offset"], done["Upload-Length"]), (str(len(data)),) * 2)
            self.assert_says(done, True, draft)
            for answer in (*answers, more, last, done):
                self.assertEqual(answer["Upload-Draft-Interop-Version"], draft.number and str(draft.number))
                if draft.age is None:
                    self.assertIsNone(answer["Upload-Limit"], draft)
                else:
                    self.assertEqual(limits(answer)["max-size"], MAX_SIZE)
                    self.assertTrue(0 < limits(answer)[draft.age] <= LIFETIME, answer)

    @requires("rufh", "4.2.2", "SHOULD", "What arrived of a creation that was cut is kept.", 11)
    @requires("rufh", "4.4.2", "SHOULD", "What arrived of an append that was cut is kept, without gaps.", 1)
    @requires("rufh", "4.4.2", "MUST", "An upload whose last request was cut is not complete.", 2)
    @requires("rufh", "4.2.2", "MUST", "An upload whose creation was cut is not complete.", 12)
    async def test_cut_and_resumed(self: Any) -> None:
        """A client that lost its connection goes on where the server says, and the file is what it was meant to be."""
        data = sample(500_000)
        for draft in DRAFTS:
            name = f"cut-{draft.number}"
            first = await self.cut("POST", "/files/", {
                **draft.fields(True), "Content-Disposition": f'inline; filename="{name}"'
            }, data[:150_000], len(data))  # fmt: skip
            path = first["Location"]
            seen = await self.look(path, draft)
            self.assertEqual((seen["Upload-Offset"], seen["Upload-Length"]), ("150000", "500000"), draft)
            self.assert_says(seen, False, draft)
            client, before = await self.connect(), self.lost
            fields = {**draft.fields(True), "Upload-Offset": "150000", "Content-Type": PART, "Expect": "100-continue"}
            await deferToThread(client.begin, "PATCH", path, fields, b"", 350_000)
            self.assertEqual((await deferToThread(client.interim)).status, 100)
            await deferToThread(client._socket.sendall, data[150_000:250_000])
            await deferToThread(client.close)
            await self.until_lost(before + 1)
            seen = await self.look(path, draft)
            self.assertEqual(seen["Upload-Offset"], "250000", draft)
            self.assert_says(seen, False, draft)
            self.assertFalse(self.is_there(name))
            last = await self.go_on(path, 250_000, data[250_000:], True, draft)
            self.assertEqual(last.status, 201, draft)
            self.assertEqual(self.stored(name), data)

    @requires("rufh", "5", "MUST", "A 100 Continue is not left out because of a 104.", 2)
    async def test_100_continue(self: Any) -> None:
        """A client that waits for 100 gets the 104 first, and then its 100."""
        client = await self.connect()
        fields = {**LAST.fields(True), "Expect": "100-continue"}
        await deferToThread(client.begin, "PUT", "/files/waits", fields, b"", 4)
        self.assertEqual((await deferToThread(client.interim)).status, 104)
        self.assertEqual((await deferToThread(client.interim)).status, 100)
        await deferToThread(client.end, b"text")
        answer = await deferToThread(client.answer)
        self.assertEqual((answer.status, self.stored("waits")), (201, b"text"))

    @requires("rufh", "4.2.2", "MAY", "Further 104s tell the offset while the creation goes on.", 6)
    @requires("rufh", "4.4.2", "SHOULD", "104s tell the offset while an append goes on.", 9)
    @requires("rufh", "4.4.2", "MUST", "They have no Location.", 10)
    async def test_progress(self: Any) -> None:
        """While a large body arrives, the client is told what it needn't keep any longer."""
        self.patch(appending, "CHECKPOINT", 64 * KIB)
        data = sample(2 * MIB)
        for draft in (*DRAFTS, FINAL):
            name = f"large-{draft.number}"
            begun = await self.ask("PUT", f"/files/{name}", data, draft.fields(False))
            more = await self.go_on(begun["Location"], len(data), data, True, draft)
            self.assertEqual((begun.status, more.status), (201, 201), draft)
            self.assertEqual(self.stored(name), 2 * data)
            if not draft.progress or draft.number is None:
                self.assertEqual(len(begun.interim), 0 if draft.number is None else 1, draft)
                self.assertEqual(more.interim, (), draft)
                continue
            for interim, low in ((begun.interim[1:], 0), (more.interim, len(data))):
                self.assertTrue(interim, draft)
                offsets = [int(one["Upload-Offset"]) for one in interim]
                self.assertEqual(offsets, sorted(set(offsets)), draft)
                self.assertTrue(low < offsets[0] and offsets[-1] <= low + len(data), offsets)
                for one in interim:
                    self.assertEqual((one.status, one["Location"]), (104, None), draft)
                    self.assertEqual(one["Upload-Draft-Interop-Version"], str(draft.number))


class ConversationTests(RufhCase, Conversations):
    """Over TCP."""


class TlsConversationTests(TlsCase, Conversations):
    """Over TLS."""


class VersionTests(RufhCase):
    """Versions that nobody knows, and what differs between those that are known."""

    @requires("rufh", "B", "MUST", "There is no 104 where the interop version is missing or unknown.", 2)
    @requires("rufh", "11.1.1", "-", "Without an upload resource, Upload-Complete: ?1 changes nothing of a request.")
    async def test_missing_or_unknown(self) -> None:
        """The client gets no interim response, and else the final text."""
        for number, said in enumerate((None, "0", "2", "9", '"8"', "8.0", "?1", "eight", "8, 8")):
            fields = {} if said is None else {"Upload-Draft-Interop-Version": said}
            whole = await self.ask("PUT", f"/files/{number}", b"data", {"Upload-Complete": "?1", **fields})
            self.assertEqual((whole.status, whole.interim, self.stored(str(number))), (201, (), b"data"), said)
            self.assert_says(whole, True)
            begun = await self.ask("PUT", "/files/x", b"da", {"Upload-Complete": "?0", **fields})
            self.assertEqual((begun.status, begun.interim), (201, ()), said)
            self.assertEqual(set(limits(begun)), {"max-size", "max-age"}, said)
            for answer in (whole, begun):
                self.assertIsNone(answer["Upload-Draft-Interop-Version"], said)

    async def test_known_with_parameters(self) -> None:
        """What a structured field may carry besides its value isn't held against it."""
        answer = await self.ask("PUT", "/files/x", b"data", {
            "Upload-Draft-Interop-Version": "8;a=1", "Upload-Complete": "?1;b"
        })  # fmt: skip
        self.assertEqual([one["Upload-Draft-Interop-Version"] for one in answer.interim], ["8"])
        self.assert_says(answer, True)

    async def test_field_of_another_version(self) -> None:
        """Upload-Incomplete means nothing but to the version that had it, and there Upload-Complete means nothing."""
        for draft in (*DRAFTS[1:], FINAL):
            fields = {**draft.fields(), "Upload-Incomplete": "?1"}
            answer = await self.ask("PUT", "/files/x", b"data", fields)
            self.assertEqual((answer.interim, answer["Upload-Complete"]), ((), None), draft)
            self.assertEqual(answer.status, 201 if draft is DRAFTS[1] else 204)
            self.assertEqual(self.stored("x"), b"data")
        answer = await self.ask("PUT", "/files/x", b"data", {**DRAFTS[0].fields(), "Upload-Complete": "?0"})
        self.assertEqual((answer.status, answer.interim, answer["Upload-Incomplete"]), (204, (), None))

    @requires("rufh", "6", "-", "What is appended has the type application/partial-upload.")
    async def test_type_of_a_part(self) -> None:
        """Drafts before -04 take any type; since then, another one is refused, and says what would do."""
        for draft in (*DRAFTS, FINAL):
            path = await self.begin(name=f"type-{draft.number}")
            for kind in (None, "application/octet-stream", "text/plain; type=application/partial-upload"):
                fields = {**draft.fields(False), "Upload-Offset": "0", **({"Content-Type": kind} if kind else {})}
                answer = await self.ask("PATCH", path, b"", fields)
                if draft.part_type:
                    self.assertEqual((answer.status, answer["Accept-Patch"]), (415, PART), (draft, kind))
                    self.assert_says(answer, False, draft)
                else:
                    self.assertEqual(answer.status, 204, (draft, kind))
            fields = {**draft.fields(False), "Upload-Offset": "0", "Content-Type": "Application/Partial-Upload; a=b"}
            self.assertEqual((await self.ask("PATCH", path, b"", fields)).status, 204, draft)

    async def test_ios_17(self) -> None:
        """What URLSession of that time sends, with Upload-Incomplete: ?0 for all in one request."""
        fields = {"Upload-Draft-Interop-Version": "3", "Upload-Incomplete": "?0", "Content-Type": "image/heic"}
        named = {**fields, "Content-Disposition": "inline; filename=a.heic"}
        answer = await self.ask("POST", "/files/photos/", b"photo", named)
        self.assertEqual([one.status for one in answer.interim], [104])
        self.assertEqual((answer.status, answer["Upload-Incomplete"], answer["Upload-Complete"]), (201, "?0", None))
        self.assertEqual(self.stored("photos/a.heic"), b"photo")
        first = await self.cut("PUT", "/files/b.heic", fields, b"pho", 5)
        path = first["Location"] or ""
        seen = await self.ask("HEAD", path, fields={"Upload-Draft-Interop-Version": "3"})
        self.assertEqual((seen.status, seen["Upload-Offset"], seen["Upload-Incomplete"]), (204, "3", "?1"))
        fields = {"Upload-Draft-Interop-Version": "3", "Upload-Offset": "3", "Upload-Incomplete": "?0"}
        last = await self.ask("PATCH", path, b"to", fields)
        self.assertEqual((last.status, last["Upload-Incomplete"], self.stored("b.heic")), (201, "?0", b"photo"))


class CreationTests(RufhCase):
    """How uploads begin."""

    @requires("rufh", "4", "SHOULD", "The URI of an upload resource is unique, and isn't used again.", 1, 2)
    @requires("rufh", "13", "SHOULD", "Nobody can guess the URI of an upload resource.", 2)
    @requires("rufh", "13", "MUST", "That URI tells nothing of where and how the upload is stored.", 3)
    async def test_urls(self) -> None:
        """Each upload has another one, with 128 random bits."""
        paths = [await self.begin() for _ in range(20)]
        self.assertEqual(len(set(paths)), 20)
        ids = [int(path.removeprefix("/uploads/"), 16) for path in paths]
        common = ids[0]
        for id in ids:
            common &= id
        self.assertTrue(common.bit_count() < 8, "bits that are the same in each")
        await self.ask("DELETE", paths[0])
        self.assertNotIn(paths[0], [await self.begin() for _ in range(20)])

    async def test_careful(self) -> None:
        """An upload may begin without content, and end without."""
        path = await self.begin()
        self.assertEqual((await self.go_on(path, 0, b"data", False)).status, 204)
        answer = await self.go_on(path, 4, b"", True)
        self.assertEqual((answer.status, self.stored()), (201, b"data"))
        self.assert_says(answer, True)

    async def test_empty_file(self) -> None:
        """An empty file is one."""
        answer = await self.ask("PUT", "/files/empty", b"", LAST.fields(True))
        self.assertEqual((answer.status, self.stored("empty")), (201, b""))
        path = await self.begin(name="other")
        self.assertEqual((await self.go_on(path, 0, b"", True)).status, 201)
        self.assertEqual(self.stored("other"), b"")

    @requires("rufh", "4.1.2", "MUST", "An Upload-Complete that is no Boolean is ignored.", 1)
    async def test_no_boolean(self) -> None:
        """So the request is what it would be without it."""
        for said in ("1", "true", '"?1"', "?2", "", "?0, ?1", "(?1)"):
            fields = {**LAST.fields(), "Upload-Complete": said}
            answer = await self.ask("PUT", f"/files/{quote(said, safe='')}x", b"data", fields)
            self.assertEqual((answer.status, answer.interim, answer["Upload-Complete"]), (201, (), None), said)
            answer = await self.ask("POST", "/uploads/", b"data", fields)
            self.assertEqual((answer.status, answer.interim), (400, ()), said)
            self.assertEqual(answer.body.decode(), errors.NOT_AN_UPLOAD.sentence + "\n")

    async def test_names_from_content_disposition(self) -> None:
        """POST takes the name from there, in each form of RFC 6266, and says where the file is."""
        for number, (disposition, name) in enumerate((
            ('inline; filename="a b.txt"', "a b.txt"),
            ("inline; filename=plain", "plain"),
            ("attachment;FileName*=UTF-8''%e2%82%ac.txt", "€.txt"),
            ("inline; filename=\"file name.jpg\"; filename*=UTF-8''f%C3%BCr.jpg", "für.jpg"),
            ("inline; filename*=iso-8859-1'de'%FC; filename=\"u\"", "ü"),
            ('form-data; name="x"; filename="q\\"\\\\r"'.replace("\\\\r", "r"), 'q"r'),
        )):  # fmt: skip
            fields = {**LAST.fields(True), "Content-Disposition": disposition}
            data = b"%d" % number
            answer = await self.ask("POST", "/uploads/", data, fields)
            quoted = quote(name, safe="")
            self.assertEqual((answer.status, answer["Location"]), (201, f"/files/{quoted}"), disposition)
            self.assertEqual(self.stored(name), data)
            for status in (201, 204):  # new, and replaced
                answer = await self.ask("POST", "/files/deep/er/", data, fields)
                self.assertEqual((answer.status, answer["Location"]), (status, f"/files/deep/er/{quoted}"))
            self.assertEqual(self.stored(f"deep/er/{name}"), data)

    @requires("rufh", "13", "MUST", "A name in the metadata is validated before it is used.", 4)
    async def test_names_that_nobody_may_have(self) -> None:
        """A filename is one segment, and no path to elsewhere; nothing is made of it."""
        for disposition in (
            'inline; filename="../x"', 'inline; filename=".."', "inline; filename*=UTF-8''..%2fx",
            'inline; filename="C:\\\\x"', "inline; filename*=UTF-8''a%00b", 'inline; filename=""',
            "inline; filename*=UTF-8''%FF", 'inline; filename=".lwstwisted"', "inline; filename*=x''y",
            'inline; filename="a"; filename="b"', "filename=a", "inline; filename", f'inline; filename="{"n" * 256}"',
        ):  # fmt: skip
            for path in ("/uploads/", "/files/folder/"):
                if path != "/uploads/" and ".lwst" in disposition:
                    continue  # only the first segment of a path is the store's own
                fields = {**LAST.fields(True), "Content-Disposition": disposition}
                answer = await self.ask("POST", path, b"data", fields)
                self.assertEqual((answer.status, answer.interim), (400, ()), (path, disposition))
        self.assertEqual([path.name for path in self.root.iterdir()], [".lwstwisted"])
        self.assertEqual(await self.store.list_uploads(), [])

    async def test_no_name(self) -> None:
        """At /uploads/ the file gets the id of the upload; in a folder a name is wanted."""
        begun = await self.ask("POST", "/uploads/", b"da", LAST.fields(False))
        path = begun["Location"] or ""
        last = await self.go_on(path, 2, b"ta", True)
        id = path.removeprefix("/uploads/")
        self.assertEqual((last.status, last["Location"], self.stored(id)), (201, f"/files/{id}", b"data"))
        answer = await self.ask("POST", "/files/folder/", b"data", LAST.fields(True))
        self.assertEqual((answer.status, answer.body.decode()), (400, errors.BAD_DISPOSITION.sentence + "\n"))

    async def test_forms(self) -> None:
        """A form is what it is with ?1, without being resumable; a part of one is refused."""
        form = (
            b'--b\r\nContent-Disposition: form-data; name="f"; filename="in-form"\r\n\r\n'
            b"text\r\n--b--\r\n"
        )
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        answer = await self.ask("POST", "/files/", form, {**LAST.fields(True), **kind})
        self.assertEqual((answer.status, answer.interim, self.stored("in-form")), (201, (), b"text"))
        for path in ("/files/", "/uploads/"):
            answer = await self.ask("POST", path, form, {**LAST.fields(False), **kind})
            self.assertEqual((answer.status, answer.body.decode()), (415, errors.FORM_IN_PARTS.sentence + "\n"))

    @requires("rufh", "8", "-", "A coded representation is refused, as in a conventional upload.")
    async def test_what_put_refuses(self) -> None:
        """Codings, ranges, conditions and names are refused as by PUT, before a 104; the file says so."""
        (self.root / "taken").mkdir()
        (self.root / "there").write_bytes(b"old")
        for is_complete in (True, False):
            for path, fields, status in (
                ("/files/x", {"Content-Encoding": "gzip"}, 415),
                ("/files/x", {"Content-Range": "bytes 0-3/10"}, 400),
                ("/files/x", {"If-Match": "*"}, 412),
                ("/files/there", {"If-None-Match": "*"}, 412),
                ("/files/taken", {}, 409),
                ("/files/there/under", {}, 409),
                ("/files/x", {"Repr-Digest": "sha-256=:AA==:"}, 400),
            ):
                answer = await self.ask("PUT", path, b"data", {**LAST.fields(is_complete), **fields})
                self.assertEqual((answer.status, answer.interim), (status, ()), (path, fields))
                self.assert_says(answer, True)
        self.assertEqual(await self.store.list_uploads(), [])
        self.assertEqual(self.stored("there"), b"old")

    async def test_nobody_knows_the_url(self) -> None:
        """Nothing is kept of a request that was cut before its client could learn where to go on."""
        for fields, method, path, length in (
            (FINAL.fields(True), "PUT", "/files/x", 10),
            ({**FINAL.fields(True), "Upload-Length": "10"}, "PUT", "/files/x", None),
            (FINAL.fields(False), "PUT", "/files/x", 10),
            ({**FINAL.fields(True), "Content-Disposition": "inline; filename=x"}, "POST", "/uploads/", 10),
        ):
            client, before = await self.connect(), self.lost
            fields = {**fields, "Expect": "100-continue"}
            await deferToThread(client.begin, method, path, fields, b"", length)
            self.assertEqual((await deferToThread(client.interim)).status, 100)
            await deferToThread(client.close)
            await self.until_lost(before + 1)
            await self.until_no_upload()
            self.assertFalse(self.is_there("x"), fields)

    async def test_http_1_0(self) -> None:
        """An interim response would be taken for the answer there, so there is none, and nothing that nobody knows."""
        head = b"PUT /files/x HTTP/1.0\r\nUpload-Draft-Interop-Version: 8\r\nUpload-Complete: ?1\r\n"
        answer = await self.exchange(head + b"Content-Length: 4\r\n\r\ndata")
        self.assertRegex(answer, rb"^HTTP/1\.[01] 201 ")
        self.assertIn(b"\r\nUpload-Complete: ?1\r\n", answer)
        self.assertEqual(self.stored("x"), b"data")
        await self.exchange(head + b"Content-Length: 40\r\n\r\nother")
        await self.until_no_upload()
        self.assertEqual(self.stored("x"), b"data")

    async def test_no_length(self) -> None:
        """A client that says that this is all has to say how much; one that only begins needn't have content."""
        for said, status in ((b"?1", b"411"), (b"?0", b"201")):
            head = b"PUT /files/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nUpload-Draft-Interop-Version: 8\r\n"
            answer = await self.exchange(head + b"Upload-Complete: %b\r\n\r\n" % said)
            self.assertIn(b"HTTP/1.1 %b " % status, answer)
        self.assertFalse(self.is_there("x"))

    async def test_post_without_interim(self) -> None:
        """All in one POST, for a client that has no interop version, is stored as well."""
        fields = {**FINAL.fields(True), "Content-Disposition": "inline; filename=x"}
        for path in ("/uploads/", "/files/"):
            answer = await self.ask("POST", path, path.encode(), fields)
            self.assertEqual((answer.interim, self.stored("x")), ((), path.encode()))
            self.assert_says(answer, True)


class StockSiteTests(RufhCase):
    """Under twisted.web's own Site, which has no interim responses."""

    site_class = Site

    async def test_without_104(self) -> None:
        """Uploads in parts work; one in a single request is a plain one."""
        whole = await self.ask("PUT", "/files/whole", b"data", LAST.fields(True))
        self.assertEqual((whole.status, whole.interim, self.stored("whole")), (201, (), b"data"))
        self.assert_says(whole, True)
        path = await self.begin(body=b"da")
        self.assertEqual((await self.look(path))["Upload-Offset"], "2")
        last = await self.go_on(path, 2, b"ta", True)
        self.assertEqual((last.status, last.interim, self.stored()), (201, (), b"data"))


class OffsetTests(RufhCase):
    """Where an upload is."""

    @requires("rufh", "4.4.2", "MUST", "Another offset than that of the upload is refused by 409 with ?0.", 3)
    @requires("rufh", "4.4.2", "MUST", "That answer has the right Upload-Offset.", 4)
    @requires("rufh", "7.1", "SHOULD", "Its problem has expected-offset and provided-offset.", 1)
    async def test_mismatch(self) -> None:
        """Nothing is appended, and the client learns both offsets; of a finished upload too."""
        path = await self.begin(body=b"da")
        for offset in (0, 1, 3, 999_999_999_999_999):
            answer = await self.go_on(path, offset, b"xy", False)
            self.assertEqual((answer.status, answer["Upload-Offset"]), (409, "2"))
            self.assert_says(answer, False)
            self.assertEqual(answer.problem["type"], PROBLEMS + "mismatching-upload-offset")
            self.assertEqual((answer.problem["expected-offset"], answer.problem["provided-offset"]), (2, offset))
            self.assertTrue(answer.problem["title"])
        self.assertEqual((await self.go_on(path, 2, b"ta", True)).status, 201)
        self.assertEqual(self.stored(), b"data")
        answer = await self.go_on(path, 2, b"ta", True)
        self.assertEqual((answer.status, answer["Upload-Offset"]), (409, "4"))
        self.assert_says(answer, False)

    @requires("rufh", "4.1.1", "MUST", "An Upload-Offset that is no unsigned Integer is ignored.", 3)
    @requires("rufh", "4.4.1", "MUST", "An append has Upload-Offset and Upload-Complete.", 1, 3)
    async def test_fields_that_are_missing(self) -> None:
        """An append without its two fields, or with values that mean nothing, is refused, and changes nothing."""
        path = await self.begin(body=b"da")
        for offset in (None, "", "-2", "2.0", '"2"', "?1", "two", "2, 2", "1000000000000000"):
            fields = {**LAST.fields(True), "Content-Type": PART}
            fields.update({} if offset is None else {"Upload-Offset": offset})
            answer = await self.ask("PATCH", path, b"ta", fields)
            self.assertEqual(answer.status, 400, offset)
            self.assert_says(answer, False)
        for said in (None, "1", "yes"):
            fields = {**LAST.fields(), "Content-Type": PART, "Upload-Offset": "2"}
            fields.update({} if said is None else {"Upload-Complete": said})
            answer = await self.ask("PATCH", path, b"ta", fields)
            self.assertEqual(answer.status, 400, said)
        self.assertEqual((await self.look(path))["Upload-Offset"], "2")

    async def test_coded(self) -> None:
        """What is appended isn't coded either."""
        path = await self.begin(body=b"da")
        self.assertEqual((await self.go_on(path, 2, b"ta", True, Content_Encoding="gzip")).status, 415)
        self.assertEqual((await self.look(path))["Upload-Offset"], "2")

    @requires("rufh", "4.1.1", "MUST", "An upload of which something is lost is deactivated.", 2)
    async def test_lost_bytes(self) -> None:
        """Where the disk has lost bytes that were promised, the upload is gone."""
        path = await self.begin(body=b"data")
        [data] = (self.root / ".lwstwisted" / "uploads").glob("*.data")
        data.write_bytes(b"da")
        self.assertEqual((await self.look(path)).status, 404)
        self.flushLoggedErrors()
        self.assertEqual((await self.go_on(path, 2, b"ta", True)).status, 404)

    @requires("rufh", "4.3.2", "SHOULD", "An upload is never redirected by 301 or 302.", 6)
    @requires("rufh", "4.5.2", "SHOULD", "Nor is its DELETE.", 3)
    async def test_unknown(self) -> None:
        """What isn't an upload is 404, by any method; so is one that was finished and removed."""
        for path in ("/uploads/" + "0" * 32, "/uploads/x", "/uploads/" + "0" * 32 + "/x"):
            for method in ("HEAD", "GET", "DELETE"):
                self.assertEqual((await self.ask(method, path, fields=LAST.fields())).status, 404, path)
            self.assertEqual((await self.go_on(path, 0, b"", False)).status, 404, path)


class LengthTests(RufhCase):
    """How long an upload will be."""

    def assert_inconsistent(self, answer: Answer) -> None:
        self.assertEqual(answer.status, 400, answer)
        self.assertEqual(answer.problem["type"], PROBLEMS + "inconsistent-upload-length")
        self.assert_says(answer, False)

    @requires("rufh", "4.1.3", "MUST", "Content-Length with ?1, and Upload-Length, agree in one request.", 3)
    @requires("rufh", "7.2", "-", "Lengths that don't are a problem of the type inconsistent-upload-length.")
    async def test_two_in_one_request(self) -> None:
        """A request that contradicts itself is refused before anything is made."""
        for draft in (LAST, FINAL):
            fields = {**draft.fields(True), "Upload-Length": "5"}
            self.assert_inconsistent(await self.ask("PUT", "/files/x", b"data", fields))
        self.assertEqual(await self.store.list_uploads(), [])
        path = await self.begin(body=b"da")
        self.assert_inconsistent(await self.go_on(path, 2, b"ta", True, Upload_Length="5"))
        self.assertEqual((await self.look(path))["Upload-Offset"], "2")
        self.assertEqual((await self.go_on(path, 2, b"ta", True, Upload_Length="4")).status, 201)
        self.assertFalse(self.is_there("x"))

    @requires("rufh", "4.1.3", "MUST", "The lengths of all requests agree.", 4)
    @requires("rufh", "4.4.2", "MUST", "A length that is announced by an append is recorded.", 7)
    async def test_in_two_requests(self) -> None:
        """An upload keeps to the length that was told first, whichever request that was."""
        path = await self.begin({"Upload-Length": "6"}, b"da")
        self.assert_inconsistent(await self.go_on(path, 2, b"ta", False, Upload_Length="7"))
        self.assert_inconsistent(await self.go_on(path, 2, b"ta", True))
        self.assert_inconsistent(await self.go_on(path, 2, b"ta", True, chunked=True))
        later = await self.begin(body=b"da", name="later")
        self.assertIsNone((await self.look(later))["Upload-Length"])
        self.assertEqual((await self.go_on(later, 2, b"ta", False, Upload_Length="6")).status, 204)
        self.assertEqual((await self.look(later))["Upload-Length"], "6")
        self.assert_inconsistent(await self.go_on(later, 4, b"a", True))
        self.assert_inconsistent(await self.go_on(later, 4, b"", False, Upload_Length="3"))
        self.assertEqual((await self.go_on(later, 4, b"no", True)).status, 201)

    @requires("rufh", "4.1.3", "MUST", "An Upload-Length that is no unsigned Integer is ignored.", 2)
    async def test_no_integer(self) -> None:
        """It is as if it were not there."""
        for said in ("-1", "4.0", '"9"', "", "9, 9"):
            answer = await self.ask("PUT", "/files/x", b"data", {**LAST.fields(True), "Upload-Length": said})
            self.assertIn(answer.status, (201, 204), said)
            path = await self.begin({"Upload-Length": said}, name="y")
            self.assertIsNone((await self.look(path))["Upload-Length"], said)

    @requires("rufh", "9", "-", "Offset and length count what is in the chunks of a chunked body.")
    async def test_chunked(self) -> None:
        """An upload whose length nobody knew has the one that came."""
        data = sample(70_000)
        begun = await self.ask("PUT", "/files/x", data[:50_000], LAST.fields(False), chunked=True)
        path = begun["Location"] or ""
        self.assertEqual((begun["Upload-Offset"], (await self.look(path))["Upload-Length"]), ("50000", None))
        last = await self.go_on(path, 50_000, data[50_000:], True, chunked=True)
        self.assertEqual((last.status, self.stored("x")), (201, data))
        self.assertEqual((await self.look(path))["Upload-Length"], "70000")

    @requires("rufh", "4.4.2", "MUST", "What is longer than announced is refused, and the upload is invalid then.", 8)
    async def test_too_long(self) -> None:
        """Whether the request says so or only does it, the upload is gone, and no file is made."""
        for chunked in (False, True):
            path = await self.begin({"Upload-Length": "6"}, b"da")
            answer = await self.go_on(path, 2, b"tatat", False, chunked=chunked)
            self.assertEqual(answer.status, 413, chunked)
            self.assert_says(answer, False)
            self.assertEqual((await self.look(path)).status, 404, chunked)
            self.assertEqual((await self.go_on(path, 2, b"tata", True)).status, 404)
        fields = {**LAST.fields(False), "Upload-Length": "4"}
        answer = await self.ask("PUT", "/files/file", b"12345", fields, chunked=True)
        self.assertEqual(answer.status, 413)
        self.assertEqual((await self.look(answer.interim[0]["Location"] or "")).status, 404)
        self.assertFalse(self.is_there())

    async def test_length_alone_completes_nothing(self) -> None:
        """With all bytes there, the upload isn't complete until the client says so."""
        path = await self.begin({"Upload-Length": "4"}, b"data")
        seen = await self.look(path)
        self.assertEqual((seen["Upload-Offset"], seen["Upload-Length"]), ("4", "4"))
        self.assert_says(seen, False)
        self.assertFalse(self.is_there())
        self.assertEqual((await self.go_on(path, 4, b"", True)).status, 201)
        self.assertEqual(self.stored(), b"data")


class LimitTests(RufhCase):
    """What is announced, and what is refused."""

    max_size = 1000

    @requires("rufh", "4.1.4", "MUST", "OPTIONS of what can begin an upload has its limits, never an empty field.", 13)
    @requires("rufh", "4.1.4", "SHOULD", "They are not less restrictive than those of an upload.", 16)
    @requires("rufh", "4.1.4", "SHOULD", "max-size doesn't decrease; the end by max-age comes no earlier.", 6, 8, 10)
    async def test_options(self) -> None:
        """Files, folders and uploads announce what an upload there will have."""
        for path in ("/files/x", "/files/folder/", "/uploads/"):
            announced = await self.ask("OPTIONS", path)
            self.assertIn(announced.status, (200, 204), path)
            self.assertEqual(limits(announced), {"max-size": 1000, "max-age": LIFETIME}, path)
        upload = await self.begin()
        for _ in range(3):
            seen = limits(await self.look(upload))
            self.assertEqual(seen["max-size"], 1000)
            self.assertTrue(LIFETIME - 60 < seen["max-age"] <= LIFETIME, seen)
        now = time.time
        self.patch(time, "time", lambda: now() + LIFETIME / 2)
        seen = limits(await self.look(upload))
        self.assertTrue(0 < seen["max-age"] <= LIFETIME / 2, seen)
        self.patch(time, "time", now)
        for draft, path in product(DRAFTS, ("/files/x", "/uploads/")):
            announced = await self.ask("OPTIONS", path, fields=draft.fields())
            wanted = None if draft.age is None else {"max-size": 1000, draft.age: LIFETIME}
            self.assertEqual(limits(announced) if announced["Upload-Limit"] else None, wanted, (draft, path))

    @requires("rufh", "4.1.4", "SHOULD", "A 413 because of the limits has Upload-Limit.", 17)
    @requires("rufh", "4.1.4", "MAY", "Files have a largest size.", 1)
    async def test_too_large(self) -> None:
        """By what is announced, or by what comes."""
        large = b"x" * 1001
        for draft in (LAST, FINAL):
            for fields, body, chunked in (
                (draft.fields(True), large, False),
                (draft.fields(False), large, False),
                ({**draft.fields(False), "Upload-Length": "1001"}, b"", False),
                (draft.fields(False), large, True),
            ):
                answer = await self.ask("PUT", "/files/x", body, fields, chunked=chunked)
                self.assertEqual(answer.status, 413, (fields, chunked))
                self.assertEqual(limits(answer)["max-size"], 1000, fields)
                # A plain PUT is the file's; any other one may be tried again with less.
                self.assert_says(answer, draft is FINAL and fields == draft.fields(True), what=(fields, chunked))
        path = await self.begin(body=b"x" * 500)
        for chunked in (False, True):
            answer = await self.go_on(path, 500, b"x" * 501, False, chunked=chunked)
            self.assertEqual((answer.status, limits(answer)["max-size"]), (413, 1000))
            self.assert_says(answer, False)
        self.assertFalse(self.is_there("x"))


class UnlimitedTests(RufhCase):
    """Without a limit of size."""

    max_size = 2**63 - 1

    async def test_no_number_that_cannot_be_said(self) -> None:
        """A structured field has fifteen digits, so what is beyond them isn't said."""
        for path in ("/files/x", "/uploads/"):
            self.assertEqual(limits(await self.ask("OPTIONS", path)), {"max-age": LIFETIME}, path)


class EndTests(RufhCase):
    """How uploads end."""

    @requires("rufh", "4.1.2", "-", "Nothing is appended to a complete upload.")
    @requires("rufh", "4.4.2", "-", "The last answer is repeated to who asks for it in the same way.")
    async def test_completed(self) -> None:
        """Only an empty last request is answered, as before; the file stays as it is."""
        path = await self.begin(body=b"da")
        first = await self.go_on(path, 2, b"ta", True)
        for is_chunked in (False, True):
            again = await self.go_on(path, 4, b"", True, chunked=is_chunked)
            same = ("ETag", "Location", "Content-Location", "Upload-Complete")
            self.assertEqual([again[name] for name in same], [first[name] for name in same])
            self.assertEqual((again.status, again["Location"]), (201, "/files/file"))
        self.assertEqual((await self.go_on(path, 4, b"x", True, chunked=True)).status, 400)
        for body, is_complete, more in ((b"x", True, {}), (b"x", False, {}), (b"", False, {})):
            answer = await self.go_on(path, 4, body, is_complete, **more)
            self.assertEqual(answer.status, 400, (body, is_complete))
            self.assertEqual(answer.problem["type"], PROBLEMS + "completed-upload")
            self.assert_says(answer, False)
        self.assertEqual((await self.go_on(path, 4, b"", True, Upload_Length="5")).status, 400)
        self.assertEqual(self.stored(), b"data")

    @requires("rufh", "13", "SHOULD", "What allowed an upload at its begin is looked at again at its end.", 6)
    @requires("rufh", "4.3.2", "MUST", "HEAD says ?1 if the file was answered for, be it by a refusal.", 2)
    async def test_refused_at_the_end(self) -> None:
        """A condition that held at the begin must hold at the end; that refusal is the file's, and final."""
        path = await self.begin({"If-None-Match": "*"}, b"da")
        (self.root / "file").write_bytes(b"another")
        for _ in range(2):
            answer = await self.go_on(path, 2, b"ta", True)
            self.assertEqual(answer.status, 412)
            self.assert_says(answer, True)
            seen = await self.look(path)
            self.assertEqual(seen["Upload-Offset"], "4")
            self.assert_says(seen, True)
            self.assertEqual((await self.go_on(path, 4, b"more", False)).status, 400)
            expires = (await self.store.look_at_upload(path.removeprefix("/uploads/"))).expires
            answer = await self.go_on(path, 4, b"", True)
            self.assertEqual(answer.status, 412)
            self.assert_says(answer, True)
            again = await self.store.look_at_upload(path.removeprefix("/uploads/"))
            self.assertEqual(again.expires, expires, "who asks doesn't keep it")
            path = await self.begin({"If-Match": (await self.ask("HEAD", "/files/file"))["ETag"] or ""}, b"da")
            (self.root / "file").write_bytes(b"a third")
        self.assertEqual(self.stored(), b"a third")

    async def test_disk_full_at_the_end(self) -> None:
        """What the server lacks is no answer of the file, so the last request may be repeated when there is more."""

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "no space left on device")

        path, working = await self.begin(body=b"da"), resumable.UploadFile.name_it
        self.patch(resumable.UploadFile, "name_it", full)
        for body, offset in ((b"ta", 2), (b"", 4)):
            answer = await self.go_on(path, offset, body, True)
            self.assertEqual(answer.status, 507)
            self.assert_says(answer, False)
            seen = await self.look(path)
            self.assertEqual(seen["Upload-Offset"], "4")
            self.assert_says(seen, False)
        self.patch(resumable.UploadFile, "name_it", working)
        self.assertEqual((await self.go_on(path, 4, b"", True)).status, 201)
        self.assertEqual(self.stored(), b"data")

    async def test_folder_in_the_way(self) -> None:
        """A folder that came meanwhile is the file's concern as well."""
        first = await self.cut("PUT", "/files/file", LAST.fields(True), b"da", 4)
        (self.root / "file").mkdir()
        answer = await self.go_on(first["Location"] or "", 2, b"ta", True)
        self.assertEqual(answer.status, 409)
        self.assert_says(answer, True)

    @requires("rufh", "13", "SHOULD", "The time for which an upload resource can exist is limited.", 7)
    async def test_expired(self) -> None:
        """An upload that nobody goes on with is gone after its max-age."""
        path = await self.begin(body=b"da")
        self.assertEqual(await self.store.sweep_uploads(), 0)
        self.assertEqual((await self.look(path)).status, 204)
        self.patch(self.sessions, "lifetime", 0)
        late = await self.begin(body=b"da")
        self.assertEqual(limits(await self.look(late))["max-age"], 0)
        await self.until_swept(1)
        self.assertEqual(((await self.look(late)).status, (await self.look(path)).status), (404, 204))

    @requires("rufh", "4.5.2", "SHOULD", "DELETE deactivates the upload.", 1)
    async def test_cancelled(self) -> None:
        """It is 204, and then 404; a finished file stays."""
        for is_complete in (False, True):
            path = await self.begin(body=b"da")
            if is_complete:
                await self.go_on(path, 2, b"ta", True)
            answer = await self.ask("DELETE", path, fields=LAST.fields())
            self.assertEqual((answer.status, answer.body), (204, b""))
            for method in ("HEAD", "DELETE"):
                self.assertEqual((await self.ask(method, path, fields=LAST.fields())).status, 404)
            self.assertEqual((await self.go_on(path, 2, b"ta", True)).status, 404)
        self.assertEqual(self.stored(), b"data")
        self.assertEqual(await self.store.list_uploads(), [])


class WalkTests(RufhCase):
    """Requests in any order."""

    @requires("rufh", "4.1.1", "MUST", "The offset doesn't decrease.", 1)
    async def test_any_order(self) -> None:
        """After each of them the upload is what the text says, and the file at its end is what was acknowledged."""
        met = set()
        for seed in range(5):
            walk = random.Random(seed)
            path, data, length, is_done = await self.begin(), b"", None, False
            for step in range(40):
                what = f"seed {seed}, step {step}"
                body, is_last = walk.randbytes(walk.choice((0, 0, 1, 7, 50))), walk.random() < 0.3
                chunked, offset = walk.random() < 0.5, max(0, len(data) + walk.choice((0, 0, 0, 0, 1, -1)))
                told = walk.choice((None, None, None, length, len(data), len(data) + len(body), 120))
                more = {} if told is None else {"Upload-Length": str(told)}
                said = ({told, offset + len(body)} if is_last and not chunked else {told}) - {None}
                answer = await self.go_on(path, offset, body, is_last, chunked=chunked, **more)
                if offset != len(data):
                    expected = 409
                elif is_done:
                    is_again = is_last and not body and not chunked and said <= {length}
                    expected = 201 if is_again else 400
                elif len({*said, length} - {None}) > 1 or any(one < len(data) for one in said):
                    expected = 400
                else:
                    length = max(said, default=length)
                    if length is not None and len(data) + len(body) > length:
                        expected = 413
                    else:
                        data += body
                        is_whole = length in (None, len(data))
                        is_done = is_last and is_whole
                        length = len(data) if is_done else length
                        expected = 204 if not is_last else 201 if is_whole else 400
                self.assertEqual(answer.status, expected, what)
                self.assert_says(answer, expected == 201, what=what)
                met.add((expected, is_last, chunked))
                seen = await self.look(path)
                if expected == 413:
                    self.assertEqual(seen.status, 404, what)
                    path, data, length = await self.begin(), b"", None
                    continue
                self.assertEqual(seen["Upload-Offset"], str(len(data)), what)
                self.assertEqual(seen["Upload-Length"], None if length is None else str(length), what)
                self.assert_says(seen, is_done, what=what)
                self.assertEqual(self.is_there(), is_done, what)
                if is_done:
                    self.assertEqual(self.stored(), data, what)
                if is_done and walk.random() < 0.3:
                    (self.root / "file").unlink()
                    path, data, length, is_done = await self.begin(), b"", None, False
            (self.root / "file").unlink(missing_ok=True)
        # All but 204 to what should have been the end, 201 to what shouldn't, and a last request that is too long: with
        # a length of its own it contradicts that of the upload, which is 400.
        every = {(status, *how) for status in (201, 204, 400, 409, 413) for how in product((False, True), repeat=2)}
        never = {(status, status == 204, chunked) for status in (201, 204) for chunked in (False, True)}
        self.assertEqual(every - never - met, {(413, True, False)})


class TusTests(RufhCase):
    """Uploads that tus has begun."""

    async def test_continued(self) -> None:
        """A file that was begun by tus may be ended by this protocol."""
        fields = {"Tus-Resumable": "1.0.0", "Upload-Length": "4", "Upload-Metadata": "filename ZmlsZQ=="}
        begun = await self.ask("POST", "/uploads/", b"", fields)
        path = begun["Location"] or ""
        self.assertEqual((await self.look(path))["Upload-Length"], "4")
        last = await self.go_on(path, 0, b"data", True)
        self.assertEqual((last.status, last["Content-Location"], self.stored()), (201, "/files/file", b"data"))

    async def test_parts_and_concatenations(self) -> None:
        """They aren't files, so this protocol can't end them; it refuses to."""
        fields = {"Tus-Resumable": "1.0.0", "Upload-Length": "4", "Upload-Concat": "partial"}
        part = (await self.ask("POST", "/uploads/", b"", fields))["Location"] or ""
        fields = {"Tus-Resumable": "1.0.0", "Upload-Concat": f"final;{part}"}
        whole = (await self.ask("POST", "/uploads/", b"", fields))["Location"] or ""
        for path in (part, whole):
            for is_complete in (False, True):
                answer = await self.go_on(path, 0, b"data", is_complete)
                self.assertEqual(answer.status, 403)
                self.assert_says(answer, False)
            self.assertEqual((await self.look(path))["Upload-Offset"], "0")


class Concurrency:
    """Requests for an upload that another one holds. A mixin, for TCP and TLS."""

    async def held(self: Any, method: str) -> tuple[str, Client]:
        """An upload of 1000 bytes, 500 of which came, whose request waits for the others."""
        client = await self.connect()
        if method == "PUT":
            await deferToThread(client.begin, "PUT", "/files/file", LAST.fields(True), b"a" * 500, 1000)
            # What came with the head is taken before anything else is looked at.
            return (await deferToThread(client.interim))["Location"], client
        path = await self.begin({"Upload-Length": "1000"}, b"a" * 300)
        fields = {**LAST.fields(True), "Upload-Offset": "300", "Content-Type": PART, "Expect": "100-continue"}
        await deferToThread(client.begin, "PATCH", path, fields, b"", 700)
        self.assertEqual((await deferToThread(client.interim)).status, 100)
        return path, client

    @requires("rufh", "4.6", "MUST", "A retrieved offset is true, and the next append is taken at it.", 3, 4)
    @requires("rufh", "4.6", "SHOULD", "A newer request ends the older one, be that a creation or an append.", 5, 6)
    @requires("rufh", "4.1.1", "MUST", "The offset doesn't decrease.", 1)
    async def test_newest_wins(self: Any) -> None:
        """A client that comes back isn't kept waiting, and goes on at the offset that it is told."""
        for method, offset in (("PUT", 500), ("PATCH", 300)):
            path, older = await self.held(method)
            seen = await self.look(path)
            self.assertEqual((seen.status, seen["Upload-Offset"]), (204, str(offset)), method)
            self.assert_says(seen, False)
            ended = await deferToThread(older.answer)
            self.assertEqual((ended.status, ended.body.decode()), (409, errors.UPLOAD_TAKEN.sentence + "\n"))
            self.assert_says(ended, False)
            last = await self.go_on(path, offset, b"b" * (1000 - offset), True)
            self.assertIn(last.status, (201, 204), method)
            self.assertEqual(self.stored(), b"a" * offset + b"b" * (1000 - offset), method)

    @requires("rufh", "4.6", "MUST", "Concurrent appends don't mix, and lose nothing that was acknowledged.", 2)
    async def test_append_while_appending(self: Any) -> None:
        """An append takes over at the offset that is true then, or is told the true one."""
        path, older = await self.held("PUT")
        refused = await self.go_on(path, 0, b"c" * 1000, True)
        self.assertEqual((refused.status, refused["Upload-Offset"]), (409, "500"))
        self.assertEqual((await deferToThread(older.answer)).status, 409)
        path, older = await self.held("PUT")
        last = await self.go_on(path, 500, b"b" * 500, True)
        self.assertIn(last.status, (201, 204))
        self.assertEqual((await deferToThread(older.answer)).status, 409)
        self.assertEqual(self.stored(), b"a" * 500 + b"b" * 500)

    @requires("rufh", "4.5.2", "SHOULD", "DELETE ends the requests under way before it is answered.", 2)
    async def test_delete_while_appending(self: Any) -> None:
        """The upload is gone, and so is the request that brought it."""
        for method in ("PUT", "PATCH"):
            path, older = await self.held(method)
            self.assertEqual((await self.ask("DELETE", path, fields=LAST.fields())).status, 204)
            self.assertEqual((await deferToThread(older.answer)).status, 409)
            self.assertEqual((await self.look(path)).status, 404)
            self.assertFalse(self.is_there())


class ConcurrencyTests(RufhCase, Concurrency):
    """Over TCP."""


class TlsConcurrencyTests(TlsCase, Concurrency):
    """Over TLS."""


class DigestTests(RufhCase):
    """Integrity, of the file and of each request."""

    @requires("rufh", "10.1", "-", "Repr-Digest of the creation is compared when the upload is complete.")
    @requires("rufh", "10.1", "SHOULD", "If it differs, the upload has failed, and the client learns it.", 1)
    async def test_of_the_file(self) -> None:
        """A file with other bytes gets no name; one with those bytes does, and keeps the digest."""
        for digest, status in ((digest_field(b"data"), 201), (digest_field(b"other"), 400)):
            (self.root / "file").unlink(missing_ok=True)
            path = await self.begin({"Repr-Digest": digest}, b"da")
            answer = await self.go_on(path, 2, b"ta", True)
            self.assertEqual((answer.status, self.is_there()), (status, status == 201))
            self.assert_says(answer, True)
            seen = await self.look(path)
            self.assertEqual(seen.status, 204 if status == 201 else 404)
        path = await self.begin({"Repr-Digest": digest_field(b"data")}, b"da")
        await self.go_on(path, 2, b"ta", True)
        kept = await self.ask("GET", "/files/file", fields={"Want-Repr-Digest": "sha-256=1"})
        self.assertEqual(kept["Repr-Digest"], digest_field(b"data"))

    @requires("rufh", "10.1", "SHOULD", "A digest that the creation wants is told.", 2, 3)
    async def test_wanted(self) -> None:
        """By the algorithm that is preferred, be it one that the client told or not."""
        digests = f"{digest_field(b'data')}, {digest_field(b'data', 'sha-512')}"
        table = {"sha-256=1, sha-512=9": "sha-512", "sha-256=3, md5=9": "sha-256", "md5=1": None}
        for wanted, algorithm in table.items():
            path = await self.begin({"Repr-Digest": digests, "Want-Repr-Digest": wanted}, b"da")
            for body, offset in ((b"ta", 2), (b"", 4)):
                answer = await self.go_on(path, offset, body, True)
                self.assertEqual(answer["Repr-Digest"], algorithm and digest_field(b"data", algorithm), wanted)
        fields = {**LAST.fields(True), "Repr-Digest": digests, "Want-Repr-Digest": "sha-256=1"}
        answer = await self.ask("PUT", "/files/x", b"data", fields)
        self.assertEqual(answer["Repr-Digest"], digest_field(b"data"))
        for wanted, algorithm in table.items():
            path = await self.begin({"Want-Repr-Digest": wanted}, b"da")
            answer = await self.go_on(path, 2, b"ta", True)
            self.assertEqual(answer["Repr-Digest"], algorithm and digest_field(b"data", algorithm), wanted)
        kept = await self.ask("GET", "/files/file", fields={"Want-Repr-Digest": "sha-256=1"})
        self.assertIsNone(kept["Repr-Digest"])  # of the last one, which wanted none that we have

    @requires("rufh", "10.2", "SHOULD", "Content that isn't what Content-Digest says is not appended, and refused.", 1)
    async def test_of_a_request(self) -> None:
        """Damaged content leaves the upload where it was, and may be sent again."""
        data = sample(MIB)
        fields = {**LAST.fields(False), "Content-Digest": digest_field(b"no")}
        begun = await self.ask("PUT", "/files/file", data[:9], fields)
        self.assertEqual(begun.status, 400)
        self.assert_says(begun, False)
        path = begun.interim[0]["Location"] or ""
        self.assertEqual((await self.look(path))["Upload-Offset"], "0")
        wrong = await self.go_on(path, 0, data, False, Content_Digest=digest_field(data + b"x"))
        self.assertEqual((wrong.status, (await self.look(path))["Upload-Offset"]), (400, "0"))
        self.assertEqual((await self.go_on(path, 0, data, False, Content_Digest=digest_field(data))).status, 204)
        wrong = await self.go_on(path, MIB, b"end", True, Content_Digest=digest_field(b"END"))
        self.assertEqual(wrong.status, 400)
        self.assert_says(wrong, False)
        self.assertFalse(self.is_there())
        last = await self.go_on(path, MIB, b"end", True, Content_Digest=digest_field(b"end"))
        self.assertEqual((last.status, self.stored()), (201, data + b"end"))

    async def test_all_in_one_request_and_cut(self) -> None:
        """Where one request was to bring all, its digest is that of the file, and a cut doesn't cost what had come."""
        for digest, status in ((digest_field(b"data"), 201), (digest_field(b"DATA"), 400)):
            (self.root / "file").unlink(missing_ok=True)
            fields = {**LAST.fields(True), "Content-Digest": digest}
            first = await self.cut("PUT", "/files/file", fields, b"da", 4)
            path = first["Location"] or ""
            self.assertEqual((await self.look(path))["Upload-Offset"], "2")
            self.assertEqual((await self.go_on(path, 2, b"ta", True)).status, status)
            self.assertEqual(self.is_there(), status == 201)

    async def test_malformed(self) -> None:
        """A digest that nobody can read is refused before anything is appended."""
        path = await self.begin(body=b"da")
        answer = await self.go_on(path, 2, b"ta", True, Content_Digest="sha-256=x")
        self.assertEqual((answer.status, (await self.look(path))["Upload-Offset"]), (400, "2"))


