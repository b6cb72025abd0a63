"""tus 1.0 over real connections, sentence by sentence, and pages of other origins that speak it."""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import socket
import tempfile
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterable
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.python.usage import UsageError
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.server import Site

from lwstwisted import errors
from lwstwisted.errors import Refusal
from lwstwisted.options import parse_span
from lwstwisted.stores.local import LocalStore
from lwstwisted.uploads import appending, tus
from lwstwisted.uploads.resumable import ResumableResource
from lwstwisted.uploads.session import Sessions
from lwstwisted.web.limits import Limits
from lwstwisted.web.site import StreamingSite
from tests.conformance import requires
from tests.contracts import sample
from tests.servers import PATIENCE, serving, tls_endpoint, twistd, wait_until
from tests.test_service import parsed
from tests.test_uploads_resource import Answer, SiteCase

KIND = "application/offset+octet-stream"
HTTP_DATE = r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT"


def base64(data: bytes | str) -> str:
    return b64encode(data if isinstance(data, bytes) else data.encode()).decode()


class SlowToLook(LocalStore):
    """A store that is slow to tell what an upload is.

    :ivar looked: how often it was asked.
    :ivar late: which time it says what it saw only when ``gate`` fires.
    """

    looked, late = 0, 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gate: Deferred[None] = Deferred()

    async def look_at_upload(self, id: str) -> Any:
        state = await super().look_at_upload(id)
        self.looked += 1
        if self.looked == self.late:
            await self.gate
        return state


class TusCase(SiteCase):
    """With uploads at /uploads/, and a client of tus."""

    def begin(self, store_class: Callable[..., LocalStore] = LocalStore, **options: Any) -> Any:
        """See ``SiteCase``; what it doesn't know is for the uploads."""
        from twisted.internet import reactor

        origins = options.pop("allowed_origins", ("*",))
        store = super().begin(store_class)
        self.sessions = Sessions(store, reactor=reactor, **options)
        self.sessions.start()
        self.addCleanup(self.sessions.stop)
        root: Any = self.site.resource
        root.putChild(b"uploads", ResumableResource(self.sessions, origins))
        return store

    async def tus(
        self, method: str, path: str, body: bytes | Iterable[bytes] | None = None, **fields: str
    ) -> Answer:
        """A request of tus. Its answer is one, too."""
        answer = await self.ask(method, path, body, **{"Tus_Resumable": "1.0.0", **fields})
        self.assertEqual(answer["Tus-Resumable"], "1.0.0", (method, path, fields))
        return answer

    async def created(self, length: int | None = None, **fields: str) -> str:
        """The path of a new upload."""
        if length is not None:
            fields["Upload_Length"] = str(length)
        answer = await self.tus("POST", "/uploads/", **fields)
        self.assertEqual((answer.status, answer.body), (201, b""), fields)
        location = answer["Location"]
        assert location is not None
        return location

    async def patch_at(self, path: str, offset: int, body: bytes | Iterable[bytes], **fields: str) -> Answer:
        return await self.tus("PATCH", path, body, Content_Type=KIND, Upload_Offset=str(offset), **fields)

    async def offset_of(self, path: str) -> int:
        answer = await self.tus("HEAD", path)
        self.assertEqual(answer.status, 200)
        return int(answer["Upload-Offset"] or "missing")

    def uploads(self) -> list[str]:
        """What the store has of uploads."""
        return sorted(path.name for path in (self.root / ".lwstwisted" / "uploads").iterdir())

    def files(self) -> dict[str, bytes]:
        """The finished files."""
        return {path.name: path.read_bytes() for path in self.root.iterdir() if path.is_file()}

    def stored_size(self) -> int:
        """Bytes of all uploads, be they counted or not."""
        return sum(path.stat().st_size for path in (self.root / ".lwstwisted" / "uploads").glob("*.data"))


class Core:
    """The core protocol. A mixin, for a streaming site and a stock one."""

    @requires("tus", "Core: HEAD", "MUST", "An answer to HEAD has Upload-Offset, be it 0 or the length.", 1)
    @requires("tus", "Core: HEAD", "MUST", "It has Upload-Length, if the length is known.", 2)
    @requires("tus", "Core: HEAD", "MUST", "It is not to be cached: Cache-Control: no-store.", 5)
    @requires("tus", "Core: HEAD", "SHOULD", "Its status is 200 or 204.", 4)
    @requires("tus", "Core: PATCH", "SHOULD", "The content is applied at the offset that the request names.", 1)
    @requires("tus", "Core: PATCH", "MUST", "Success is 204 with Upload-Offset: the old one and what came.", 7, 8, 9)
    async def test_resume(self: Any) -> None:
        """An upload goes on where it stood, and is a file when it is whole, also for who asks again."""
        data = sample(300_000)
        path = await self.created(len(data), Upload_Metadata=f"filename {base64('a file')}")
        at = 0
        for end in (0, 1, 100_000, 299_999, 300_000):
            answer = await self.patch_at(path, at, data[at:end])
            self.assertEqual((answer.status, answer.body, answer["Upload-Offset"]), (204, b"", str(end)))
            at = end
            head = await self.tus("HEAD", path)
            self.assertEqual((head.status, head["Upload-Offset"], head["Upload-Length"]), (200, str(end), "300000"))
            self.assertEqual(head["Cache-Control"], "no-store")
            self.assertEqual(self.files(), {"a file": data} if end == len(data) else {})
        download = await self.ask("GET", answer["Content-Location"])
        self.assertEqual((download.status, download.body == data), (200, True))
        self.assertEqual(answer["ETag"], download["ETag"])
        for again in (head, await self.patch_at(path, at, b""), await self.tus("GET", path)):
            self.assertEqual(again["Upload-Offset"], "300000")
            self.assertEqual((again["Content-Location"], again["ETag"]), ("/files/a%20file", download["ETag"]))
        self.assert_problem(await self.patch_at(path, at, b"more"), errors.UPLOAD_FINISHED)
        self.assertEqual(self.files(), {"a file": data})

    def assert_problem(self: Any, answer: Answer, refusal: Refusal) -> None:
        self.assertEqual(answer.status, refusal.status, answer.body)
        self.assertIn(refusal.sentence.encode(), answer.body)

    @requires("tus", "Core: PATCH", "MUST", "Another offset than that of the upload is 409, and changes nothing.", 3, 5)
    @requires("tus", "Core: Upload-Offset", "MUST", "It is a non-negative integer.", 1)
    async def test_offsets(self: Any) -> None:
        path = await self.created(10)
        await self.patch_at(path, 0, b"abc")
        for wrong in (0, 2, 4, 10, 11, 10**17):
            answer = await self.patch_at(path, wrong, b"xyz")
            self.assert_problem(answer, errors.OFFSET_MISMATCH)
            self.assertEqual(answer["Upload-Offset"], "3")
        arabic = "٣".encode().decode("latin-1")
        for no_offset in ("-1", "+3", "3.0", "0x3", "three", "", " ", "3,3", "3;a=1", "1" * 19, arabic):
            answer = await self.tus("PATCH", path, b"xyz", Content_Type=KIND, Upload_Offset=no_offset)
            self.assert_refused(answer, errors.BAD_UPLOAD_FIELD, no_offset)
        self.assert_refused(await self.tus("PATCH", path, b"xyz", Content_Type=KIND), errors.BAD_UPLOAD_FIELD)
        self.assertEqual(await self.offset_of(path), 3)
        self.assertEqual(self.stored_size(), 3)

    @requires("tus", "Core: PATCH", "SHOULD", "Another media type than application/offset+octet-stream is 415.", 2)
    async def test_media_type(self: Any) -> None:
        path = await self.created(3)
        for kind in ("application/octet-stream", "text/plain", "application/offset", "application/partial-upload"):
            answer = await self.tus("PATCH", path, b"abc", Content_Type=kind, Upload_Offset="0")
            self.assert_refused(answer, errors.NOT_A_PART, kind)
        self.assert_refused(await self.tus("PATCH", path, b"abc", Upload_Offset="0"), errors.NOT_A_PART)
        coded = await self.patch_at(path, 0, b"abc", Content_Encoding="gzip")
        self.assert_refused(coded, errors.CONTENT_ENCODING)
        self.assertEqual(await self.offset_of(path), 0)
        answer = await self.tus("PATCH", path, b"abc", Content_Type=KIND.upper() + "; a=b", Upload_Offset="0")
        self.assertEqual(answer.status, 204)

    @requires("tus", "Core: HEAD", "SHOULD", "An upload that isn't there is 404, without Upload-Offset.", 3)
    @requires("tus", "Core: PATCH", "SHOULD", "One that isn't there is 404.", 10)
    async def test_unknown(self: Any) -> None:
        """Also where the id is none, or one that somebody tries to make a path of."""
        path = await self.created(10)
        known, own = self.uploads(), path.rpartition("/")[2]
        beneath = (f"{own}/", f"{own}/x", f"{own}.data")
        none = "0" * 32
        for id in (*beneath, none, "x", "0" * 33, "F" * 32, "%2e%2e", f"{none}/", f"{none}/x", f"{none[1:]}%2f"):
            for method in ("HEAD", "GET", "PATCH", "DELETE"):
                fields = {"Content_Type": KIND, "Upload_Offset": "0"}
                answer = await self.tus(method, f"/uploads/{id}", **fields)
                self.assertEqual((answer.status, answer["Upload-Offset"]), (404, None), (method, id))
                if method != "HEAD":
                    self.assert_refused(answer, errors.UPLOAD_NOT_FOUND, (method, id))
        self.assertEqual(self.uploads(), known)

    @requires("tus", "Core: Tus-Resumable", "MUST", "Each answer has it, with the version of the protocol.", 1, 2)
    async def test_every_answer_says_the_version(self: Any) -> None:
        """Refusals too, whoever refuses."""
        path = await self.created(3)
        for method, target, fields, status in (
            ("PUT", "/uploads/", {}, 405),
            ("GET", "/uploads/", {}, 405),
            ("POST", path, {}, 405),
            ("PATCH", "/uploads/", {}, 405),
            ("POST", "/uploads/", {"Origin": "null", "Sec_Fetch_Site": "cross-site", "Upload_Length": "x"}, 400),
            ("PATCH", path, {"Content_Type": KIND, "Upload_Offset": "0", "Content_Length": "4"}, 413),
            ("PATCH", path, {"Content_Type": KIND, "Upload_Offset": "0", "Content_Digest": "sha-256=x"}, 400),
        ):
            answer = await self.tus(method, target, b"four" if "Content_Length" in fields else None, **fields)
            self.assertEqual(answer.status, status, (method, target, fields))

    @requires("tus", "Core: Tus-Resumable", "MUST", "Another version is 412 with Tus-Version; nothing is done.", 3, 4)
    async def test_other_version(self: Any) -> None:
        path = await self.created(3)
        for version in ("0.2.2", "1.0.1", "1.0", "", "1.0.0, 1.0.0"):
            for method, target in (("POST", "/uploads/"), ("HEAD", path), ("PATCH", path), ("DELETE", path)):
                fields = {"Upload_Length": "3", "Upload_Offset": "0", "Content_Type": KIND, "Tus_Resumable": version}
                answer = await self.tus(method, target, b"abc" if method == "PATCH" else None, **fields)
                self.assertEqual((answer.status, answer["Tus-Version"]), (412, "1.0.0"), (version, method))
        unsaid = await self.ask("PATCH", path, b"abc", Content_Type=KIND, Upload_Offset="0")
        self.assert_refused(unsaid, errors.TUS_VERSION)
        for fields in (
            {"Upload_Length": "3"},
            {"Upload_Metadata": ""},
            {"Upload_Defer_Length": "1"},
            {"X_HTTP_Method_Override": "DELETE"},
        ):
            unsaid = await self.ask("POST", "/uploads/", **fields)
            self.assertEqual((unsaid.status, unsaid["Tus-Version"]), (412, "1.0.0"), fields)
        self.assertEqual((await self.ask("GET", "/uploads/", X_HTTP_Method_Override="OPTIONS")).status, 200)
        self.assertEqual((await self.offset_of(path), len(self.uploads())), (0, 2))

    @requires("tus", "Core: X-HTTP-Method-Override", "MUST", "It is the method, and the actual one is ignored.", 1, 2)
    async def test_method_override(self: Any) -> None:
        """Who can't send PATCH or DELETE sends POST, or whatever else he can."""
        path = await self.created(6)
        fields = {"Content_Type": KIND, "X_HTTP_Method_Override": "PATCH"}
        for method, at in (("POST", 0), ("PUT", 2), ("GET", 4)):
            answer = await self.tus(method, path, b"ab", Upload_Offset=str(at), **fields)
            self.assertEqual((answer.status, answer["Upload-Offset"]), (204, str(at + 2)))
        for spelled in ("head", "Head"):  # as programs write it; a method itself is in capitals
            self.assertEqual((await self.tus("POST", path, X_HTTP_Method_Override=spelled)).status, 200)
        answer = await self.tus("POST", path, X_HTTP_Method_Override="HEAD")
        self.assertEqual((answer.status, answer["Upload-Offset"], answer.body), (200, "6", b""))
        self.assertEqual((await self.tus("POST", path, X_HTTP_Method_Override="DELETE")).status, 204)
        self.assertEqual((await self.tus("HEAD", path)).status, 404)
        self.assertEqual((await self.tus("POST", path, X_HTTP_Method_Override="POST")).status, 405)
        self.assertEqual((await self.tus("POST", path, X_HTTP_Method_Override="OPTIONS")).status, 200)

    @requires("tus", "Core: OPTIONS", "MUST", "Its answer is 200 or 204 and has Tus-Version.", 2)
    @requires("tus", "Core: OPTIONS", "MUST", "The Tus-Resumable of the request is ignored.", 4)
    @requires("tus", "Core: Tus-Version", "MUST", "It is a list of versions with commas, the preferred first.", 1, 2)
    @requires("tus", "Core: Tus-Extension", "MUST", "It is a list of the extensions, with commas.", 1)
    @requires("tus", "Core: Tus-Max-Size", "SHOULD", "It tells the limit of an upload in bytes, if there is one.", 2)
    @requires("tus", "Checksum", "MUST", "OPTIONS is answered with Tus-Checksum-Algorithm.", 9)
    @requires("tus", "Checksum", "MUST", "The names of algorithms are of ASCII without capitals.", 8)
    @requires("tus", "Core: OPTIONS", "MAY", "It has Tus-Extension and Tus-Max-Size.", 3)
    @requires("tus", "Core: Tus-Max-Size", "MUST", "It is a number that is not negative.", 1)
    @requires("tus", "Extensions", "SHOULD", "An answer to OPTIONS tells by Tus-Extension what there is.", 1)
    @requires("tus", "Checksum: Tus-Checksum-Algorithm", "MUST", "It is a list with commas.", 1)
    async def test_options(self: Any) -> None:
        self.begin(max_size=12345)
        path = await self.created(6)
        for target in ("/uploads/", "/uploads", path, "/uploads/" + "0" * 32):
            for fields in ({}, {"Tus_Resumable": "1.0.0"}, {"Tus_Resumable": "0.2.2"}):
                answer = await self.ask("OPTIONS", target, **fields)
                self.assertEqual((answer.status, answer.body, answer["Tus-Version"]), (200, b"", "1.0.0"))
                self.assertEqual(answer["Tus-Max-Size"], "12345")
                self.assertEqual(set((answer["Tus-Extension"] or "").split(",")), self.extensions)
                algorithms = (answer["Tus-Checksum-Algorithm"] or "").split(",")
                self.assertEqual(set(algorithms), {"sha1", "md5", "sha256", "sha512", "crc32"})
                self.assertTrue("OPTIONS" in (answer["Allow"] or ""))
        self.begin()
        self.assertIsNone((await self.ask("OPTIONS", "/uploads/"))["Tus-Max-Size"])

    extensions = {
        "creation",
        "creation-with-upload",
        "creation-defer-length",
        "checksum",
        "expiration",
        "termination",
        "concatenation",
        "concatenation-unfinished",
    }

    async def test_neither_protocol(self: Any) -> None:
        """A POST that says nothing of an upload is told how one begins."""
        self.assert_refused(await self.ask("POST", "/uploads/", b"x"), errors.NOT_AN_UPLOAD)
        self.assertEqual(self.uploads(), [])


class Creation:
    """Creation, with and without content, of a known length or not. A mixin."""

    @requires("tus", "Creation", "MUST", "It is announced as creation.", 2)
    @requires("tus", "Creation: POST", "MUST", "A creation is answered by 201 with the Location of the upload.", 12, 13)
    @requires("tus", "Core: Upload-Length", "MUST", "It is a non-negative integer.", 1)
    @requires("tus", "Creation: POST", "MUST", "It has Upload-Length, or Upload-Defer-Length: 1, or it is 400.", 2)
    @requires("tus", "Creation: Upload-Defer-Length", "MUST", "Its value is 1.", 1)
    @requires("tus", "Creation: POST", "-", "An Upload-Defer-Length that isn't 1 is 400.")
    @requires("tus", "Creation", "SHOULD", "Uploads can be created by the protocol itself.", 1)
    async def test_create(self: Any) -> None:
        """The answer leads to an empty upload; what says nothing clear of its length makes none."""
        self.assertIn("creation", (await self.ask("OPTIONS", "/uploads/"))["Tus-Extension"].split(","))
        for target in ("/uploads/", "/uploads"):
            answer = await self.tus("POST", target, Upload_Length="5")
            self.assertEqual((answer.status, answer.body), (201, b""))
            self.assertRegex(answer["Location"], r"^/uploads/[0-9a-f]{32}$")
            self.assertEqual(await self.offset_of(answer["Location"]), 0)
        before = self.uploads()
        for fields in (
            {},
            {"Upload_Length": "5", "Upload_Defer_Length": "1"},
            {"Upload_Defer_Length": "0"},
            {"Upload_Defer_Length": "2"},
            {"Upload_Defer_Length": "true"},
            {"Upload_Defer_Length": ""},
            *({"Upload_Length": bad} for bad in ("-1", "", "5.0", "five", "0x5", "1_000", "1" * 19, "5, 5")),
            {"Upload_Length": "5", "Upload_Concat": "whole"},
            {"Upload_Length": "5", "Upload_Concat": "partial;/a"},
        ):
            self.assert_refused(await self.tus("POST", "/uploads/", **fields), errors.BAD_UPLOAD_FIELD, fields)
        self.assertEqual(self.uploads(), before)

    @requires("tus", "Creation: POST", "MUST", "A length above the maximum is 413.", 11)
    async def test_too_large(self: Any) -> None:
        """Known before, when it is told later, and where it shows only while bytes come."""
        self.begin(max_size=10)
        self.assert_refused(await self.tus("POST", "/uploads/", Upload_Length="11"), errors.BODY_TOO_LARGE)
        self.assertEqual(self.uploads(), [])
        path = await self.created(Upload_Defer_Length="1")
        self.assert_refused(await self.patch_at(path, 0, b"", Upload_Length="11"), errors.BODY_TOO_LARGE)
        self.assert_refused(await self.patch_at(path, 0, b"x" * 11), errors.BODY_TOO_LARGE)
        self.assertEqual((await self.patch_at(path, 0, b"x" * 10, Upload_Length="10")).status, 204)
        self.assertEqual((await self.tus("POST", "/uploads/", Upload_Length="10")).status, 201)

    async def test_longer_than_announced(self: Any) -> None:
        """413, with a length and chunked, and not a byte is kept of what is too much."""
        path = await self.created(10)
        await self.patch_at(path, 0, b"abcd")
        for body in (b"x" * 7, b"x" * 1_000_000, [b"xxxxxxx"], [b"x" * 70_000] * 5):
            answer = await self.patch_at(path, 4, body if isinstance(body, bytes) else iter(body))
            self.assert_refused(answer, errors.UPLOAD_OVERRUN)
            self.assertEqual(await self.offset_of(path), 4)
            self.assertEqual(self.stored_size(), 4)
        self.assertEqual((await self.patch_at(path, 4, b"efghij")).status, 204)
        self.assertEqual(list(self.files().values()), [b"abcdefghij"])

    @requires("tus", "Creation: POST", "MAY", "Upload-Length: 0 is complete at once.", 7)
    async def test_empty(self: Any) -> None:
        answer = await self.tus("POST", "/uploads/", Upload_Length="0", Upload_Metadata=f"filename {base64('empty')}")
        self.assertEqual((answer.status, answer["Content-Location"]), (201, "/files/empty"))
        self.assertEqual(self.files(), {"empty": b""})
        self.assertEqual(await self.offset_of(answer["Location"]), 0)

    @requires("tus", "Creation: POST", "MUST", "HEAD says Upload-Defer-Length: 1 until the length is known.", 5)
    @requires("tus", "Creation: Upload-Defer-Length", "MUST", "It is left out when the length is known.", 2)
    @requires("tus", "Creation: POST", "MUST", "A PATCH sets the length; from then on it never changes.", 3, 4)
    @requires("tus", "Creation: POST", "MUST", "This is announced as creation-defer-length.", 6)
    async def test_deferred_length(self: Any) -> None:
        self.assertIn("creation-defer-length", (await self.ask("OPTIONS", "/uploads/"))["Tus-Extension"])
        path = await self.created(Upload_Defer_Length="1", Upload_Metadata=f"filename {base64('late')}")
        await self.patch_at(path, 0, b"abc")
        head = await self.tus("HEAD", path)
        self.assertEqual((head["Upload-Defer-Length"], head["Upload-Length"], head["Upload-Offset"]), ("1", None, "3"))
        self.assert_problem(await self.patch_at(path, 3, b"", Upload_Length="2"), errors.LENGTH_MISMATCH)
        self.assert_problem(await self.patch_at(path, 9, b"", Upload_Length="9"), errors.OFFSET_MISMATCH)
        self.assertEqual((await self.tus("HEAD", path))["Upload-Length"], None)
        self.assertEqual((await self.patch_at(path, 3, b"d", Upload_Length="6")).status, 204)
        head = await self.tus("HEAD", path)
        self.assertEqual((head["Upload-Defer-Length"], head["Upload-Length"], head["Upload-Offset"]), (None, "6", "4"))
        for other in ("5", "7"):
            self.assert_problem(await self.patch_at(path, 4, b"ef", Upload_Length=other), errors.LENGTH_MISMATCH)
        self.assertEqual((await self.patch_at(path, 4, b"ef", Upload_Length="6")).status, 204)
        self.assertEqual(self.files(), {"late": b"abcdef"})

    async def test_length_behind_the_last_byte(self: Any) -> None:
        """Who learns only at the end that it was the end says so in a PATCH of no bytes."""
        path = await self.created(Upload_Defer_Length="1", Upload_Metadata=f"name {base64('late')}")
        await self.patch_at(path, 0, b"abc")
        self.assertEqual(self.files(), {})
        self.assertEqual((await self.patch_at(path, 3, b"", Upload_Length="3"))["Content-Location"], "/files/late")
        self.assertEqual(self.files(), {"late": b"abc"})

    @requires("tus", "Creation: POST", "MUST", "HEAD repeats Upload-Metadata as it was at the creation.", 10)
    @requires("tus", "Creation: Upload-Metadata", "MUST", "Pairs with commas: key, space, Base64.", 1, 2, 4)
    @requires("tus", "Creation: Upload-Metadata", "MAY", "A value may be empty, with or without the space.", 6, 7)
    @requires("tus", "Creation: POST", "MAY", "The metadata is used: it names the file.", 9)
    async def test_metadata(self: Any) -> None:
        """It is repeated as it came, and a file is named by filename, or else name, or else the id."""
        name, other = base64("é.txt"), base64("other")
        for said, target in (
            (f"filename {name},is_confidential", "é.txt"),
            (f"name {other},filename {name}", "é.txt"),
            (f"name {other}", "other"),
            (f"filename,name {other}", "other"),
            (f"filename ,name {other}, type {base64('text/plain')}", "other"),
            ("filetype dGV4dA==", None),
            ("", None),
        ):
            path = await self.created(1, Upload_Metadata=said)
            head = await self.tus("HEAD", path)
            self.assertEqual(head["Upload-Metadata"], said or None)
            self.assertEqual((await self.patch_at(path, 0, b"x")).status, 204)
            self.assertEqual(self.files(), {target or path.rpartition("/")[2]: b"x"}, said)
            self.assertEqual((await self.tus("HEAD", path))["Upload-Metadata"], said or None)
            for file in self.root.glob("*"):
                if file.is_file():
                    file.unlink()
        self.assertIsNone((await self.tus("HEAD", await self.created(1)))["Upload-Metadata"])

    @requires("tus", "Creation: Upload-Metadata", "MUST", "Keys are unique, not empty, without space and comma.", 3, 5)
    @requires("tus", "Creation: Upload-Metadata", "SHOULD", "Its values are validated before they are used.", 8)
    async def test_bad_metadata(self: Any) -> None:
        """400 for what can't be read, and for names that lead elsewhere; nothing is begun."""
        for said in (
            "filename ***",
            "filename YQ",
            "filename YQ==YQ==",
            "filename  YQ==",
            "filename YQ== YQ==",
            "filename YQ==,filename Yg==",
            "a YQ==,b,a",
            "a YQ==,",
            ",a YQ==",
            "a YQ==,,b YQ==",
            ",",
            "\xe9 YQ==",
            "a \xe9\xe9\xe9\xe9",
            "a " + base64(b"x" * 3100),
        ):
            refusal = errors.BAD_UPLOAD_FIELD if not said.isascii() else errors.BAD_METADATA
            answer = await self.tus("POST", "/uploads/", Upload_Length="1", Upload_Metadata=said)
            self.assert_refused(answer, refusal, said)
        for name, refusal in (
            (b"../x", errors.NAME_ENCODING),
            (b"a/b", errors.NAME_ENCODING),
            (b"a\\b", errors.NAME_ENCODING),
            (b"%2e%2e", errors.NAME_ENCODING),
            (b"..", errors.NAME_DOTS),
            (b".", errors.NAME_DOTS),
            (b"a\r\nSet-Cookie: b", errors.NAME_CONTROL),
            (b"a\0b", errors.NAME_CONTROL),
            (b"\xff", errors.NAME_ENCODING),
            (b"x" * 256, errors.NAME_TOO_LONG),
            (b".lwstwisted", errors.NAME_RESERVED),
        ):
            for key in ("filename", "name"):
                answer = await self.tus("POST", "/uploads/", Upload_Length="1", Upload_Metadata=f"{key} {base64(name)}")
                self.assert_refused(answer, refusal, name)
        largest = "a " + base64(b"x" * 3069)
        self.assertEqual(len(largest), 4094)
        self.assertEqual((await self.tus("POST", "/uploads/", Upload_Length="1", Upload_Metadata=largest)).status, 201)
        self.assertEqual((len(self.uploads()), self.files()), (2, {}))

    @requires("tus", "Creation With Upload", "MUST", "It is announced as creation-with-upload, with creation.", 2, 3)
    @requires("tus", "Creation With Upload", "MUST", "The answer has Upload-Offset, with what was accepted.", 6)
    @requires("tus", "Creation With Upload", "SHOULD", "As many bytes as possible are accepted.", 6)
    async def test_creation_with_upload(self: Any) -> None:
        self.assertIn("creation-with-upload", (await self.ask("OPTIONS", "/uploads/"))["Tus-Extension"])
        data = sample(200_000)
        for name, body in (("whole", data), ("chunked", iter([data[:70_000], data[70_000:]]))):
            fields = {"Content_Type": KIND, "Upload_Metadata": f"filename {base64(name)}"}
            answer = await self.tus("POST", "/uploads/", body, Upload_Length=str(len(data)), **fields)
            self.assertEqual((answer.status, answer["Upload-Offset"]), (201, "200000"))
            self.assertEqual(answer["Content-Location"], f"/files/{name}")
        answer = await self.tus("POST", "/uploads/", data[:5], Upload_Defer_Length="1", Content_Type=KIND)
        self.assertEqual((answer.status, answer["Upload-Offset"], answer["Content-Location"]), (201, "5", None))
        self.assertEqual(await self.offset_of(answer["Location"]), 5)
        self.assertTrue(self.files() == {"whole": data, "chunked": data})

    @requires("tus", "Creation With Upload", "MUST", "Content comes as application/offset+octet-stream.", 5)
    async def test_bad_creation_with_upload(self: Any) -> None:
        """What is refused leaves no upload that nobody knows of."""
        for kind in ("application/octet-stream", "text/plain"):
            answer = await self.tus("POST", "/uploads/", b"abc", Upload_Length="3", Content_Type=kind)
            self.assert_refused(answer, errors.NOT_A_PART, kind)
        for body in (b"abcd", [b"ab", b"cd"]):
            content = body if isinstance(body, bytes) else iter(body)
            answer = await self.tus("POST", "/uploads/", content, Upload_Length="3", Content_Type=KIND)
            self.assert_refused(answer, errors.UPLOAD_OVERRUN)
        fields = {"Upload_Length": "3", "Content_Type": KIND, "Upload_Checksum": f"md5 {base64(b'x' * 16)}"}
        answer = await self.tus("POST", "/uploads/", b"abc", **fields)
        self.assert_refused(answer, errors.CHECKSUM_MISMATCH)
        self.assertEqual((self.uploads(), self.files()), ([], {}))


class Extensions:
    """Expiration, checksum, termination. A mixin."""

    @requires("tus", "Expiration", "MUST", "It is announced as expiration.", 2)
    @requires("tus", "Expiration: Upload-Expires", "MUST", "An answer to PATCH says when the upload expires.", 3)
    @requires("tus", "Expiration: Upload-Expires", "MUST", "So does the answer to its creation.", 4)
    @requires("tus", "Expiration: Upload-Expires", "MUST", "That is a date as of RFC 9110.", 9)
    async def test_expires(self: Any) -> None:
        """The time is that of the last byte and what the service was told; a finished upload expires no more."""
        self.begin(lifetime=5000.0)
        self.assertIn("expiration", (await self.ask("OPTIONS", "/uploads/"))["Tus-Extension"])
        before = int(time.time())
        creation = await self.tus("POST", "/uploads/", Upload_Length="9")
        path = creation["Location"]
        for answer in (
            creation,
            await self.patch_at(path, 0, b"abc"),
            await self.patch_at(path, 0, b"abc"),
            await self.patch_at(path, 3, b"abcdefghi"),
            await self.patch_at(path, 3, b"abc", Upload_Checksum=f"md5 {base64(b'x' * 16)}"),
            await self.tus("HEAD", path),
        ):
            self.assertRegex(answer["Upload-Expires"], HTTP_DATE)
            expires = parsedate_to_datetime(answer["Upload-Expires"]).timestamp()
            self.assertTrue(before + 4999 <= expires <= time.time() + 5000, (before, expires))
        for answer in (await self.patch_at(path, 3, b"defghi"), await self.tus("HEAD", path)):
            self.assertIsNone(answer["Upload-Expires"])

    @requires("tus", "Expiration: Upload-Expires", "SHOULD", "An upload that was removed then is 404.", 6)
    @requires("tus", "Expiration", "MAY", "Unfinished uploads that have expired are removed.", 1)
    @requires("tus", "Expiration: Upload-Expires", "MAY", "They take no space then.", 1)
    async def test_expired(self: Any) -> None:
        """Nothing is left of it."""
        store = self.begin(lifetime=-10.0)
        path = await self.created(9)
        # The service looks by itself, and nobody knows who comes first.
        await store.sweep_uploads()
        self.assertEqual(self.uploads(), [])
        self.assertEqual((await self.tus("HEAD", path)).status, 404)
        self.assert_refused(await self.patch_at(path, 0, b"abc"), errors.UPLOAD_NOT_FOUND)

    @requires("tus", "Checksum", "MUST", "It is announced as checksum.", 2)
    @requires("tus", "Checksum", "MUST", "The content is verified by the named algorithm when all of it is there.", 4)
    @requires("tus", "Checksum", "MUST", "If the sum is another one (460), nothing is kept and the offset stays.", 6)
    @requires("tus", "Checksum", "MUST", "sha1 is supported.", 7)
    @requires("tus", "Checksum", "MAY", "A PATCH may have a checksum, and is answered by 204, 400 or 460.", 1, 5)
    async def test_checksum(self: Any) -> None:
        self.assertIn("checksum", (await self.ask("OPTIONS", "/uploads/"))["Tus-Extension"])
        piece = sample(70_000)
        sums = {name: hashlib.new(name, piece).digest() for name in ("sha1", "md5", "sha256", "sha512")}
        sums["crc32"] = zlib.crc32(piece).to_bytes(4, "big")
        self.assertEqual(set(sums), set(tus.ALGORITHMS))
        path = await self.created(len(sums) * len(piece), Upload_Metadata=f"filename {base64('sum')}")
        for number, (name, right) in enumerate(sums.items()):
            at = number * len(piece)
            for wrong in (bytes([right[0] ^ 1]) + right[1:], right[:-1], right + b"x"):
                answer = await self.patch_at(path, at, piece, Upload_Checksum=f"{name} {base64(wrong)}")
                self.assert_refused(answer, errors.CHECKSUM_MISMATCH, (name, wrong))
                self.assertEqual((await self.offset_of(path), self.stored_size()), (at, at))
            answer = await self.patch_at(path, at, piece, Upload_Checksum=f"{name} {base64(right)}")
            self.assertEqual((answer.status, answer["Upload-Offset"]), (204, str(at + len(piece))))
        self.assertTrue(self.files() == {"sum": piece * len(sums)})

    @requires("tus", "Checksum", "MUST", "Nor is anything kept where the algorithm isn't known (400).", 6)
    @requires("tus", "Checksum: Upload-Checksum", "MUST", "It is the algorithm, a space and the sum as Base64.", 1)
    async def test_bad_checksum(self: Any) -> None:
        path = await self.created(3)
        right = base64(hashlib.sha1(b"abc").digest())
        not_known, cut = (f"SHA1 {right}", f"sha3 {right}", right), f"sha1 {right[:-1]}"
        for said in ("", "sha1", "sha1 ", *not_known, cut, f"sha1  {right}", f"sha1 {right},"):
            answer = await self.patch_at(path, 0, b"abc", Upload_Checksum=said)
            self.assert_refused(answer, errors.BAD_CHECKSUM, said)
        answer = await self.patch_at(path, 0, b"abc", Content_Digest=f"sha-256=:{base64(b'x' * 32)}:")
        self.assert_refused(answer, errors.DIGEST_MISMATCH)
        self.assertEqual((await self.offset_of(path), self.stored_size()), (0, 0))

    @requires("tus", "Termination", "MUST", "It is announced as termination.", 1)
    @requires("tus", "Termination: DELETE", "MUST", "DELETE of an upload is answered by 204.", 1)
    @requires("tus", "Termination: DELETE", "SHOULD", "What it took is free again.", 1)
    @requires("tus", "Termination: DELETE", "SHOULD", "Later requests get 404.", 2)
    async def test_termination(self: Any) -> None:
        """An unfinished upload is gone; the file of a finished one stays."""
        self.assertIn("termination", (await self.ask("OPTIONS", "/uploads/"))["Tus-Extension"])
        begun = await self.created(9)
        await self.patch_at(begun, 0, b"abc")
        finished = await self.created(3, Upload_Metadata=f"filename {base64('stays')}")
        await self.patch_at(finished, 0, b"abc")
        for path in (begun, finished):
            answer = await self.tus("DELETE", path)
            self.assertEqual((answer.status, answer.body), (204, b""))
            for method in ("HEAD", "PATCH", "DELETE"):
                fields = {"Content_Type": KIND, "Upload_Offset": "3"}
                self.assertEqual((await self.tus(method, path, **fields)).status, 404)
        self.assertEqual((self.uploads(), self.files()), ([], {"stays": b"abc"}))


    @requires("tus", "Expiration: Upload-Expires", "MUST", "Each answer to a PATCH has it, be it a refusal.", 3)
    async def test_expires_on_every_patch(self: Any) -> None:
        """Whatever is wrong with a request, its answer tells how long the upload is kept."""
        path = await self.created(10)
        checksum = {"Content_Type": KIND, "Upload_Offset": "0", "Upload_Checksum": "sha3 AAAA"}
        for fields, status in (({"Content_Type": "a/b"}, 415), ({"Content_Type": KIND}, 400), (checksum, 400)):
            answer = await self.tus("PATCH", path, b"abc", **fields)
            self.assertEqual(answer.status, status)
            self.assertIsNotNone(answer["Upload-Expires"], fields)
        answer = await self.tus("PATCH", "/uploads/" + "0" * 32, b"abc", Content_Type="a/b")
        self.assertEqual((answer.status, answer["Upload-Expires"]), (404, None))

    async def test_problem_of_a_wrong_offset(self: Any) -> None:
        """It says both offsets, as its type has it."""
        answer = await self.patch_at(await self.created(10), 4, b"x")
        problem = json.loads(answer.body)
        self.assertEqual((problem["expected-offset"], problem["provided-offset"]), (0, 4))


class Concatenation:
    """Parts that become one file. A mixin."""

    async def parts(self: Any, *contents: bytes) -> list[str]:
        """Whole parts."""
        paths = []
        for content in contents:
            paths.append(await self.created(len(content), Upload_Concat="partial"))
            self.assertEqual((await self.patch_at(paths[-1], 0, content)).status, 204)
        return paths

    async def join(self: Any, *parts: str, **fields: str) -> Answer:
        answer: Answer = await self.tus("POST", "/uploads/", Upload_Concat=f"final;{' '.join(parts)}", **fields)
        return answer

    @requires("tus", "Concatenation", "MUST", "It is announced as concatenation.", 1)
    @requires("tus", "Concatenation", "SHOULD", "Parts are not processed before they are concatenated.", 2)
    @requires("tus", "Concatenation", "MUST", "Parts are concatenated in the order of the list.", 6)
    @requires("tus", "Concatenation", "MUST", "The length is the sum of those of the parts.", 3)
    @requires("tus", "Concatenation", "MUST", "When it is done, HEAD has Upload-Offset and an equal Upload-Length.", 18)
    @requires("tus", "Concatenation", "MUST", "HEAD of a part has Upload-Offset.", 19)
    @requires("tus", "Concatenation", "MUST", "HEAD of a part and of the whole repeats Upload-Concat as it came.", 21)
    @requires("tus", "Concatenation", "MAY", "A part may be used more than once, in one list or in several.", 14, 15)
    @requires("tus", "Concatenation: Upload-Concat", "MAY", "The URLs of parts are absolute or relative.", 4)
    async def test_concatenation(self: Any) -> None:
        self.assertIn("concatenation", (await self.ask("OPTIONS", "/uploads/"))["Tus-Extension"])
        one, two, empty = await self.parts(b"hello", b" world", b"")
        self.assertEqual(self.files(), {})
        head = await self.tus("HEAD", one)
        self.assertEqual((head["Upload-Concat"], head["Upload-Offset"], head["Upload-Length"]), ("partial", "5", "5"))
        for name, parts, content in (
            ("both", (one, two), b"hello world"),
            ("turned", (two, one), b" worldhello"),
            ("twice", (one, empty, one, two), b"hellohello world"),
            ("absolute", (f"http://example.org{one}", two), b"hello world"),
        ):
            answer = await self.join(*parts, Upload_Metadata=f"filename {base64(name)}")
            self.assertEqual((answer.status, answer["Content-Location"]), (201, f"/files/{name}"))
            self.assertEqual(self.files()[name], content)
            head = await self.tus("HEAD", answer["Location"])
            size = str(len(content))
            self.assertEqual((head.status, head["Upload-Offset"], head["Upload-Length"]), (200, size, size))
            self.assertEqual(head["Upload-Concat"], f"final;{' '.join(parts)}")

    @requires("tus", "Concatenation", "MUST", "PATCH of a concatenation is 403; it and its parts stay as they are.", 16)
    async def test_nothing_is_appended(self: Any) -> None:
        """Be it done, or waiting for a part."""
        (whole,) = await self.parts(b"abc")
        open_part = await self.created(3, Upload_Concat="partial")
        for parts in ((whole, whole), (whole, open_part)):
            path = (await self.join(*parts, Upload_Metadata=f"filename {base64('x')}"))["Location"]
            for offset in (0, 3, 6):
                self.assert_refused(await self.patch_at(path, offset, b"x"), errors.CONCATENATED)
                self.assert_refused(await self.patch_at(path, offset, b""), errors.CONCATENATED)
        self.assertEqual([await self.offset_of(part) for part in (whole, open_part)], [3, 0])
        self.assertEqual(self.files(), {"x": b"abcabc"})
        fields = {"Content_Type": KIND, "Upload_Concat": f"final;{whole}"}
        self.assert_refused(await self.tus("POST", "/uploads/", b"x", **fields), errors.CONCATENATED)

    @requires("tus", "Concatenation", "MUST", "That parts may be unfinished is told as concatenation-unfinished.", 10)
    @requires("tus", "Concatenation", "SHOULD", "HEAD has no Upload-Offset before the concatenation is done.", 17)
    @requires("tus", "Concatenation", "MUST", "HEAD has Upload-Length as soon as it can be calculated.", 20)
    async def test_unfinished(self: Any) -> None:
        """The last byte of the last part makes the file, without another request."""
        self.assertIn("concatenation-unfinished", (await self.ask("OPTIONS", "/uploads/"))["Tus-Extension"])
        one = await self.created(5, Upload_Concat="partial")
        two = await self.created(Upload_Concat="partial", Upload_Defer_Length="1")
        answer = await self.join(one, two, Upload_Metadata=f"filename {base64('late')}")
        self.assertEqual((answer.status, answer["Content-Location"]), (201, None))
        path = answer["Location"]

        async def head() -> tuple[str | None, ...]:
            found = await self.tus("HEAD", path)
            self.assertEqual((found.status, found["Upload-Concat"]), (200, f"final;{one} {two}"))
            return found["Upload-Offset"], found["Upload-Length"], found["Upload-Defer-Length"]

        self.assertEqual(await head(), (None, None, None))
        await self.patch_at(two, 0, b" world")
        self.assertEqual(await head(), (None, None, None))
        await self.patch_at(two, 6, b"", Upload_Length="6")
        self.assertEqual(await head(), (None, "11", None))
        await self.patch_at(one, 0, b"he")
        self.assertEqual((await head(), self.files()), ((None, "11", None), {}))
        await self.patch_at(one, 2, b"llo")
        await self.until(self.files, "the file was there")
        self.assertEqual(self.files(), {"late": b"hello world"})
        self.assertEqual(await head(), ("11", "11", None))

    async def test_part_that_becomes_whole_meanwhile(self: Any) -> None:
        """The last byte may come while the concatenation is looking, and isn't overlooked."""
        store = self.begin(SlowToLook)
        part = await self.created(3, Upload_Concat="partial")
        await self.patch_at(part, 0, b"ab")
        store.late = store.looked + 2  # first whether it is a part, then how far it is
        joining = Deferred.fromCoroutine(self.join(part, Upload_Metadata=f"filename {base64('x')}"))
        await self.until(lambda: store.looked == store.late, "it has looked")
        self.assertEqual((await self.patch_at(part, 2, b"c")).status, 204)
        store.gate.callback(None)
        self.assertEqual((await joining).status, 201)
        await self.until(self.files, "the file was there")
        self.assertEqual(self.files(), {"x": b"abc"})

    @requires("tus", "Concatenation", "MUST", "A final upload is created without Upload-Length.", 8)
    @requires("tus", "Concatenation: Upload-Concat", "MUST", "It is partial, or final; and URLs of parts.", 1, 2, 3)
    @requires("tus", "Concatenation", "MUST", "A whole is created by Upload-Concat: final; and URLs of parts.", 4, 5)
    async def test_bad_parts(self: Any) -> None:
        """What isn't there, or is no part, is 400, and nothing is begun."""
        (one,) = await self.parts(b"abc")
        whole = await self.created(3)
        final = (await self.join(one, Upload_Metadata=f"filename {base64('x')}"))["Location"]
        before = self.uploads()
        for parts in (
            (),
            (one, whole),
            (final,),
            (one, "/uploads/" + "0" * 32),
            (one, "/elsewhere/" + one.rpartition("/")[2]),
            ("/files/x",),
            (one + "/",),
            ("../uploads/x",),
            (one, "/uploads/%2e%2e"),
            ("http://[", one),
        ):
            self.assert_refused(await self.join(*parts), errors.BAD_PARTS, parts)
        for fields in ({"Upload_Length": "3"}, {"Upload_Defer_Length": "1"}):
            self.assert_refused(await self.join(one, **fields), errors.BAD_UPLOAD_FIELD)
        for wrong in ("final", "", "Partial", f"finally;{one}", f"partial;{one}"):
            answer = await self.tus("POST", "/uploads/", Upload_Concat=wrong, Upload_Length="3")
            self.assert_refused(answer, errors.BAD_UPLOAD_FIELD, wrong)
        self.assertEqual(self.uploads(), before)

    @requires("tus", "Concatenation", "MUST", "The metadata of parts is not that of the whole.", 11)
    async def test_metadata_of_parts(self: Any) -> None:
        """A part gets no name, so one that a file couldn't have is nothing to a part."""
        await self.ask("PUT", "/files/part/x", b"")
        said = f"filename {base64('part')}"
        part = await self.created(0, Upload_Concat="partial", Upload_Metadata=said)
        self.assertEqual((await self.tus("HEAD", part))["Upload-Metadata"], said)
        answer = await self.join(part)
        path = answer["Location"]
        self.assertIsNone((await self.tus("HEAD", path))["Upload-Metadata"])
        self.assertEqual(self.files(), {path.rpartition("/")[2]: b""})

    async def test_part_that_is_gone(self: Any) -> None:
        """A concatenation that can't come about any more is 404, and can be cancelled."""
        part = await self.created(3, Upload_Concat="partial")
        path = (await self.join(part))["Location"]
        await self.tus("DELETE", part)
        self.assertEqual((await self.tus("HEAD", path)).status, 404)
        self.assertEqual((await self.tus("DELETE", path)).status, 204)
        self.assertEqual(self.uploads(), [])


class Becoming:
    """What becomes of an upload that is whole. A mixin."""

    async def test_conditions(self: Any) -> None:
        """They hold when it is begun and when it is named; until they do, nobody is told that it's done."""
        named = {"Upload_Metadata": f"filename {base64('x')}", "If_None_Match": "*"}
        path = await self.created(3, **named)
        await self.ask("PUT", "/files/x", b"other")
        self.assert_refused(await self.tus("POST", "/uploads/", Upload_Length="3", **named), errors.PRECONDITION_FAILED)
        self.assert_refused(await self.patch_at(path, 0, b"abc"), errors.PRECONDITION_FAILED)
        head = await self.tus("HEAD", path)
        self.assertEqual((head.status, head["Upload-Offset"], head["Upload-Length"]), (412, "3", "3"))
        self.assert_refused(await self.patch_at(path, 3, b""), errors.PRECONDITION_FAILED)
        self.assertEqual(self.files(), {"x": b"other"})
        await self.ask("DELETE", "/files/x")
        self.assertEqual((await self.patch_at(path, 3, b"")).status, 204)
        self.assertEqual(self.files(), {"x": b"abc"})
        answer = await self.tus("POST", "/uploads/", Upload_Length="3", If_Match="nonsense")
        self.assert_refused(answer, errors.BAD_CONDITION)

    async def test_folder_of_that_name(self: Any) -> None:
        """It is refused before the first byte."""
        await self.ask("PUT", "/files/folder/x", b"")
        answer = await self.tus("POST", "/uploads/", Upload_Length="3", Upload_Metadata=f"name {base64('folder')}")
        self.assert_refused(answer, errors.IS_FOLDER)
        self.assertEqual(self.uploads(), [])

    async def test_digest_of_the_whole(self: Any) -> None:
        """What the creation said of it holds at the end, and is kept with the file."""
        right = f"sha-256=:{base64(hashlib.sha256(b'abcdef').digest())}:"
        path = await self.created(6, Repr_Digest=right, Upload_Metadata=f"filename {base64('x')}")
        await self.patch_at(path, 0, b"abc")
        self.assertEqual((await self.patch_at(path, 3, b"def")).status, 204)
        answer = await self.ask("GET", "/files/x", Want_Repr_Digest="sha-256=1")
        self.assertEqual(answer["Repr-Digest"], right)
        path = await self.created(6, Repr_Digest=right)
        await self.patch_at(path, 0, b"abc")
        self.assert_refused(await self.patch_at(path, 3, b"xyz"), errors.DIGEST_MISMATCH)
        self.assertEqual((await self.tus("HEAD", path)).status, 404)
        wrong = await self.tus("POST", "/uploads/", Upload_Length="0", Repr_Digest=right)
        self.assert_refused(wrong, errors.DIGEST_MISMATCH)
        self.assertEqual((list(self.files()), len(self.uploads())), (["x"], 1))

    @requires("tus", "Creation: POST", "MAY", "The URL is relative, or absolute if the service is told of one.", 14)
    async def test_public_url(self: Any) -> None:
        """Where a client has to be told absolute URLs, it is, and may use them."""
        self.begin(public_url="https://up.example.org/there/")
        answer = await self.tus("POST", "/uploads/", Upload_Length="0", Upload_Metadata=f"name {base64('x')}")
        self.assertRegex(answer["Location"], r"^https://up\.example\.org/there/uploads/[0-9a-f]{32}$")
        self.assertEqual(answer["Content-Location"], "https://up.example.org/there/files/x")
        url = (await self.tus("POST", "/uploads/", Upload_Length="0", Upload_Concat="partial"))["Location"]
        self.assertEqual((await self.tus("POST", "/uploads/", Upload_Concat=f"final;{url}")).status, 201)


class CrossOrigin:
    """Pages of other origins. A mixin."""

    page = {"Origin": "https://example.org", "Sec_Fetch_Site": "cross-site"}

    async def test_preflight(self: Any) -> None:
        """All that the protocols need is allowed, and nothing that would bring a user's rights along."""
        path = await self.created(3)
        asked = {"Access_Control_Request_Method": "PATCH", "Access_Control_Request_Private_Network": "true"}
        for target, methods in (("/uploads/", {"POST"}), (path, {"HEAD", "PATCH", "DELETE", "POST"})):
            answer = await self.ask("OPTIONS", target, **self.page, **asked)
            self.assertEqual((answer.status, answer["Access-Control-Allow-Origin"]), (200, "*"))
            self.assertLessEqual(methods, set((answer["Access-Control-Allow-Methods"] or "").split(", ")))
            allowed = (answer["Access-Control-Allow-Headers"] or "").lower().split(", ")
            for field in (*tus.REQUEST_FIELDS, b"Upload-Complete", b"Upload-Draft-Interop-Version", b"Content-Type"):
                self.assertIn(field.decode().lower(), allowed)
            self.assertEqual(answer["Access-Control-Max-Age"], "86400")
            self.assertIsNone(answer["Access-Control-Allow-Credentials"])
            self.assertIsNone(answer["Access-Control-Allow-Private-Network"])

    async def test_answers_can_be_read(self: Any) -> None:
        """Also refusals, with all of their fields."""
        path = await self.created(3)
        for method, target, fields, status in (
            ("POST", "/uploads/", {"Upload_Length": "3"}, 201),
            ("POST", "/uploads/", {"Upload_Length": "x"}, 400),
            ("POST", "/uploads/", {"Tus_Resumable": "2"}, 412),
            ("HEAD", path, {}, 200),
            ("HEAD", "/uploads/x", {}, 404),
            ("PATCH", path, {}, 415),
            ("PATCH", path, {"Content_Type": KIND, "Upload_Offset": "2"}, 409),
            ("PUT", path, {}, 405),
            ("DELETE", path, {}, 204),
        ):
            answer = await self.tus(method, target, **self.page, **fields)
            self.assertEqual((answer.status, answer["Access-Control-Allow-Origin"]), (status, "*"), (method, fields))
            exposed = (answer["Access-Control-Expose-Headers"] or "").lower().split(", ")
            for field in (*tus.RESPONSE_FIELDS, b"Location", b"ETag", b"Upload-Complete", b"Upload-Limit"):
                self.assertIn(field.decode().lower(), exposed)
            self.assertIsNone(answer["Access-Control-Allow-Credentials"])

    async def test_replaces_nothing(self: Any) -> None:
        """A page of another origin makes new files only, whatever it says of the old ones."""
        put = await self.ask("PUT", "/files/x", b"old")
        fields = {"Upload_Length": "3", "Upload_Metadata": f"filename {base64('x')}", **self.page}
        for condition in ({}, {"If_Match": put["ETag"]}, {"If_None_Match": '"other"'}):
            answer = await self.tus("POST", "/uploads/", **fields, **condition)
            self.assert_refused(answer, errors.PRECONDITION_FAILED, condition)
        fields["Upload_Metadata"] = f"filename {base64('y')}"
        path = (await self.tus("POST", "/uploads/", **fields))["Location"]
        await self.ask("PUT", "/files/y", b"old")
        self.assert_refused(await self.patch_at(path, 0, b"new"), errors.PRECONDITION_FAILED)
        self.assertEqual(self.files(), {"x": b"old", "y": b"old"})
        own = {**fields, "Origin": f"http://127.0.0.1:{self.address[1]}", "Sec_Fetch_Site": "same-origin"}
        self.assertEqual((await self.tus("POST", "/uploads/", **own)).status, 201)

    async def test_forms_of_other_sites(self: Any) -> None:
        """What a page can send without asking first stays refused."""
        form = b'--b\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\nx\r\n--b--\r\n'
        for kind, body in (
            ("multipart/form-data; boundary=b", form),
            ("text/plain", b"x"),
            ("application/x-www-form-urlencoded", b"x=y"),
        ):
            answer = await self.ask("POST", "/uploads/", body, Content_Type=kind, **self.page)
            self.assert_refused(answer, errors.CROSS_ORIGIN)
            self.assertEqual(answer["Access-Control-Allow-Origin"], "*")
        # Who doesn't say where he comes from, but that it's not from here, is no page that may.
        answer = await self.tus("POST", "/uploads/", Upload_Length="3", Sec_Fetch_Site="cross-site")
        self.assert_refused(answer, errors.CROSS_ORIGIN)
        self.assertEqual(self.uploads(), [])

    async def test_some_origins(self: Any) -> None:
        """Of the others, nothing is done, and nothing can be read."""
        self.begin(allowed_origins=["https://example.org", "http://localhost:8000"])
        path = await self.created(3)
        for origin, is_allowed in (
            ("https://example.org", True),
            ("http://localhost:8000", True),
            ("http://example.org", False),
            ("https://example.org:8443", False),
            ("https://evil.example.org", False),
            ("null", False),
        ):
            page = {**self.page, "Origin": origin}
            for method, target in (("POST", "/uploads/"), ("HEAD", path), ("OPTIONS", path)):
                answer = await self.tus(method, target, Upload_Length="3", **page)
                done = {"POST": 201, "HEAD": 200, "OPTIONS": 200}[method]
                refused = 200 if method == "OPTIONS" else 403
                self.assertEqual(answer.status, done if is_allowed else refused, (method, origin))
                self.assertEqual(answer["Access-Control-Allow-Origin"], origin if is_allowed else None)
                self.assertEqual(answer["Vary"], "Origin")
                self.assertEqual(answer["Access-Control-Allow-Methods"] is not None, is_allowed and method == "OPTIONS")
        self.assertEqual(len(self.uploads()), 6)


class StreamingTusTests(Core, Creation, Extensions, Concatenation, Becoming, CrossOrigin, TusCase):
    """Under a StreamingSite a body arrives as it comes."""

    extensions = {*Core.extensions, "checksum-trailer"}

    def _patch_head(self, path: str, *fields: str) -> bytes:
        lines = [f"PATCH {path} HTTP/1.1", "Host: x", "Tus-Resumable: 1.0.0", f"Content-Type: {KIND}", *fields, "", ""]
        return "\r\n".join(lines).encode()

    async def test_checksum_in_a_trailer_of_which_nobody_told(self) -> None:
        """It is looked at all the same: nobody is told of success for other bytes than he meant."""
        await self._try_trailers("X: y", without=(204, 11))

    async def _try_trailers(self, announcement: str, without: tuple[int, int]) -> None:
        """Append with each kind of trailer.

        :param announcement: a field of the head.
        :param without: status and offset of a body without any trailer.
        """
        data = b"hello world"
        right, wrong = base64(hashlib.sha1(data).digest()), base64(b"x" * 20)
        for trailers, status, offset in (
            (f"Upload-Checksum: sha1 {wrong}\r\n", 460, 0),
            (f"Upload-Checksum: sha3 {right}\r\n", 400, 0),
            (f"Upload-Checksum: sha1 {right}\r\n" * 2, 400, 0),
            ("", *without),
            (f"upload-checksum: sha1 {right}\r\nX: y\r\n", 204, len(data)),
        ):
            path = await self.created(2 * len(data))
            fields = "Upload-Offset: 0", "Transfer-Encoding: chunked", "Connection: close", announcement
            body = b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(data), data, trailers.encode())
            answer = await self.exchange(self._patch_head(path, *fields) + body)
            self.assertRegex(answer, rf"^HTTP/1.1 {status} ".encode(), trailers)
            self.assertEqual((await self.offset_of(path), self.stored_size()), (offset, offset))
            self.assertEqual((await self.tus("DELETE", path)).status, 204)

    async def test_checksum_that_comes_late(self) -> None:
        """Bytes that count already when their checksum comes are looked at all the same; they never become a file if it
        is wrong, as they can't be taken back."""
        self.patch(appending, "CHECKPOINT", 64 * 1024)
        data = sample(2_000_000)
        for digest, status in ((hashlib.sha1(data).digest(), 204), (bytes(20), 460)):
            path = await self.created(2 * len(data), Upload_Metadata=f"filename {base64('sum')}")
            head = self._patch_head(path, "Upload-Offset: 0", "Transfer-Encoding: chunked", "Connection: close")
            trailer = f"0\r\nUpload-Checksum: sha1 {base64(digest)}\r\n\r\n"
            answer = await self.exchange(head + b"%x\r\n%b\r\n" % (len(data), data) + trailer.encode())
            self.assertRegex(answer, rf"^HTTP/1.1 {status} ".encode())
            self.assertEqual((await self.tus("HEAD", path)).status, 200 if status == 204 else 404)
            await self.tus("DELETE", path)
        self.assertEqual((self.uploads(), self.files()), ([], {}))

    @requires("tus", "Checksum", "MUST", "That a checksum may be a trailer is announced as checksum-trailer.", 11)
    @requires("tus", "Checksum", "MAY", "A checksum may be in a trailer that the head has announced.", 10)
    async def test_checksum_in_a_trailer(self) -> None:
        self.assertIn("checksum-trailer", str((await self.ask("OPTIONS", "/uploads/"))["Tus-Extension"]))
        await self._try_trailers("Trailer: X, Upload-Checksum", without=(400, 0))

    async def test_every_byte_of_a_checksum_counts_or_none(self) -> None:
        """A client that leaves in the middle of content that it has a checksum of finds the offset as it was."""
        path = await self.created(1_000_000)
        came = self.came
        checksum = f"Upload-Checksum: md5 {base64(b'x' * 16)}"
        head = self._patch_head(path, "Upload-Offset: 0", "Content-Length: 1000000", checksum)
        await deferToThread(self._send_and_leave, head + bytes(600_000))
        await self.until_lost(came + 1)
        self.assertEqual((await self.offset_of(path), self.stored_size()), (0, 0))

    def _send_and_leave(self, data: bytes) -> None:
        with socket.create_connection(self.address, PATIENCE) as client:
            client.sendall(data)

    @requires("tus", "Core: PATCH", "SHOULD", "As much as possible is stored of what was received.", 14)
    @requires("tus", "Core: PATCH", "SHOULD", "Network errors are detected, and handled predictably.", 11)
    async def test_cut(self) -> None:
        """All that arrived in front of the cut is kept, with a length and chunked; the upload goes on from there."""
        data = sample(1_000_000)
        path = await self.created(len(data), Upload_Metadata=f"filename {base64('cut')}")
        came = self.came
        head = self._patch_head(path, "Upload-Offset: 0", "Content-Length: 1000000")
        await deferToThread(self._send_and_leave, head + data[:600_001])
        await self.until_lost(came + 1)
        self.assertEqual(await self.offset_of(path), 600_001)
        came = self.came
        head = self._patch_head(path, "Upload-Offset: 600001", "Transfer-Encoding: chunked")
        await deferToThread(self._send_and_leave, head + b"%x\r\n%b" % (200_000, data[600_001:700_000]))
        await self.until_lost(came + 1)
        self.assertEqual(await self.offset_of(path), 700_000)
        self.assertEqual((await self.patch_at(path, 700_000, data[700_000:])).status, 204)
        self.assertTrue(self.files() == {"cut": data})
        self.assertEqual(self.flushLoggedErrors(), [])

    @requires("tus", "Core: PATCH", "MAY", "A connection on which nothing comes any more is noticed.", 12)
    @requires("tus", "Core: PATCH", "SHOULD", "It is closed then.", 13)
    async def test_silence(self) -> None:
        """A client that stops in the middle is told so and loses its connection; what it has sent counts."""
        self.site_class = partial(StreamingSite, limits=Limits(body_time=0.2, linger_time=0.2))
        self.begin()
        path = await self.created(10)

        def stop_sending() -> bytes:
            with socket.create_connection(self.address, PATIENCE) as client:
                client.sendall(self._patch_head(path, "Upload-Offset: 0", "Content-Length: 10") + b"abc")
                return b"".join(iter(lambda: client.recv(65536), b""))

        answer = await deferToThread(stop_sending)
        self.assertRegex(answer, b"^HTTP/1.1 408 ")
        self.assertIn(b"\r\nTus-Resumable: 1.0.0\r\n", answer)
        self.assertEqual(await self.offset_of(path), 3)

    async def test_creation_is_cut(self) -> None:
        """Nobody knows the upload, so nothing is left of it."""
        came = self.came
        head = self._patch_head("/uploads/", "Upload-Length: 1000000", "Content-Length: 1000000")
        await deferToThread(self._send_and_leave, head.replace(b"PATCH", b"POST", 1) + bytes(600_000))
        await self.until_lost(came + 1)
        await self.until(lambda: not self.uploads(), "it was removed")

    async def test_newest_request_wins(self) -> None:
        """A request that holds the upload though nobody is there any more makes way, and what came by it counts."""
        path = await self.created(10, Upload_Metadata=f"filename {base64('x')}")

        def hold() -> socket.socket:
            client = socket.create_connection(self.address, PATIENCE)
            client.sendall(self._patch_head(path, "Upload-Offset: 0", "Content-Length: 10", "Expect: 100-continue"))
            self.assertEqual(client.recv(1000), b"HTTP/1.1 100 Continue\r\n\r\n")
            client.sendall(b"abc")
            return client

        def received() -> int:
            requests = [channel._request for channel in self.site.channels]  # type: ignore[attr-defined]
            return max(getattr(request, "received", 0) for request in requests)

        with await deferToThread(hold) as client:
            await self.until(lambda: received() == 3, "the three bytes had come")
            self.assertEqual(await self.offset_of(path), 3)
            answer = await deferToThread(client.recv, 65536)
            self.assertRegex(answer, b"^HTTP/1.1 409 ")
            self.assertIn(errors.UPLOAD_TAKEN.sentence.encode(), answer)
        self.assertEqual((await self.patch_at(path, 3, b"defghij")).status, 204)
        self.assertEqual(self.files(), {"x": b"abcdefghij"})

    async def test_refused_before_the_body(self) -> None:
        """Who asks before sending isn't told to send what would be refused."""
        path = await self.created(10)
        for fields, status in (
            (("Upload-Offset: 1", "Content-Length: 5"), 409),
            (("Upload-Offset: 0", "Content-Length: 11"), 413),
            (("Upload-Offset: 0", "Content-Length: 5", "Upload-Checksum: x y"), 400),
            (("Content-Length: 5",), 400),
        ):
            answer = await self.exchange(self._patch_head(path, *fields, "Expect: 100-continue"))
            self.assertRegex(answer, rf"^HTTP/1.1 {status} ".encode(), fields)
        self.assertEqual(await self.offset_of(path), 0)


class StockTusTests(Core, Creation, Extensions, Concatenation, Becoming, CrossOrigin, TusCase):
    """Under twisted.web's own Site the body has been spooled when the resource is asked."""

    site_class = Site


class OptionTests(SynchronousTestCase):
    """The command line."""

    def test_lifetimes(self) -> None:
        for text, seconds in (("1m", 60), ("90m", 5400), ("24h", 86400), ("36", 129600), ("7d", 604800)):
            self.assertEqual(parse_span("--upload-lifetime", text), seconds)
        self.assertEqual(parsed()["upload-lifetime"], 86400)
        for text in ("", "0h", "0", "h", "-1h", "1.5h", "1w", "1H", "1 h", "1h30m", "9" * 20 + "d", "٣h"):
            self.assertRaises(UsageError, parse_span, "--upload-lifetime", text)

    def test_public_urls(self) -> None:
        for text in ("https://up.example.org", "http://127.0.0.1:8080", "https://[::1]:8443", "https://example.org/a/b"):
            self.assertEqual(parsed("--public-url", text)["public-url"], text)
            self.assertEqual(parsed("--public-url", text + "/")["public-url"], text)
        bad = ("up.example.org", "ftp://example.org", "https://", "//a")
        for text in (*bad, "https://a b", "https://a?b", "https://a#b", "https://a//b"):
            self.assertRaises(UsageError, parsed, "--public-url", text)

    def test_origins(self) -> None:
        self.assertEqual(parsed()["allowed-origins"], ["*"])
        self.assertEqual(parsed("--allow-origin", "none")["allowed-origins"], [])
        two = ["https://example.org", "http://localhost:8000"]
        self.assertEqual(parsed(*(word for one in two for word in ("--allow-origin", one)))["allowed-origins"], two)
        bad = ("example.org", "null", "", "https://*.example.org")
        for text in (*bad, "https://example.org/", "https://example.org/a"):
            self.assertRaises(UsageError, parsed, "--allow-origin", text)


def unread_bytes(port: int) -> int:
    """What the kernel holds on both sides of connections to a port of 127.0.0.1 (proc_pid_net(5))."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    queues = [line[4] for line in lines if f":{port:04X}" in line[1] + line[2] and line[3] == "01"]
    return sum(int(size, 16) for queue in queues for size in queue.split(":"))


class ServiceTests(SynchronousTestCase):
    """The service as it is started."""

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, self.folder)

    def test_stopped_while_it_comes(self) -> None:
        """What has arrived when the service is told to stop is there when it is back."""
        options = ("--root", self.folder / "root", "--listen", "tcp:0")
        for sent in (1000, 3_000_000):
            with serving(twistd(*options), cwd=self.folder) as server:
                port = server.wait_for_ports()[0]
                client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
                self.addCleanup(client.close)
                client.request("POST", "/uploads/", headers={"Tus-Resumable": "1.0.0", "Upload-Length": "9000000"})
                path = str(client.getresponse().headers["Location"])
                client.putrequest("PATCH", path)
                fields = {"Tus-Resumable": "1.0.0", "Upload-Offset": "0", "Content-Type": KIND}
                for name, value in {**fields, "Content-Length": "9000000"}.items():
                    client.putheader(name, value)
                client.endheaders(bytes(sent))
                wait_until(lambda: not unread_bytes(port), "the service had read it")  # noqa: B023
                server.end()
            with serving(twistd(*options), cwd=self.folder) as server:
                client = http.client.HTTPConnection("127.0.0.1", server.wait_for_ports()[0], timeout=PATIENCE)
                self.addCleanup(client.close)
                client.request("HEAD", path, headers={"Tus-Resumable": "1.0.0"})
                self.assertEqual(client.getresponse().headers["Upload-Offset"], str(sent))
                client.close()

    def test_upload_over_restart(self) -> None:
        """Over TLS, an upload goes on in another process where the first was killed; options reach the answers."""
        import ssl

        from lwstwisted.certificate import ensure_development_certificate

        certificate = ensure_development_certificate(self.folder / "cert.pem")
        context = ssl.create_default_context(cafile=str(certificate))
        root = self.folder / "root"
        options = ("--root", root, "--listen", tls_endpoint(certificate), "--upload-lifetime", "2h")
        options += ("--public-url", "https://up.example.org", "--allow-origin", "https://example.org")
        data = sample(3_000_000)

        def ask(port: int, method: str, path: str, body: bytes | None = None, **fields: str) -> Answer:
            client = http.client.HTTPSConnection("127.0.0.1", port, timeout=PATIENCE, context=context)
            headers = {name.replace("_", "-"): value for name, value in fields.items()}
            client.request(method, path, body, {"Tus-Resumable": "1.0.0", **headers})
            answer = client.getresponse()
            found = Answer(answer.status, answer.headers, answer.read())
            client.close()
            return found

        with serving(twistd(*options), cwd=self.folder) as server:
            port = server.wait_for_ports()[0]
            told = ask(port, "OPTIONS", "/uploads/", Origin="https://example.org")
            self.assertEqual(told["Access-Control-Allow-Origin"], "https://example.org")
            self.assertIsNone(ask(port, "OPTIONS", "/uploads/", Origin="https://example.com")["Access-Control-Allow-Origin"])
            begun = ask(port, "POST", "/uploads/", Upload_Length="3000000", Upload_Metadata=f"name {base64('x')}")
            self.assertRegex(str(begun["Location"]), "^https://up.example.org/uploads/")
            expires = parsedate_to_datetime(str(begun["Upload-Expires"])).timestamp()
            self.assertLess(abs(expires - time.time() - 7200), 60)
            path = urlsplit(str(begun["Location"])).path
            fields = {"Content_Type": KIND, "Upload_Offset": "0"}
            self.assertEqual(ask(port, "PATCH", path, data[:1_234_567], **fields).status, 204)
            server.process.kill()
            server.wait()
        with serving(twistd(*options), cwd=self.folder) as server:
            port = server.wait_for_ports()[0]
            self.assertEqual(ask(port, "HEAD", path)["Upload-Offset"], "1234567")
            fields["Upload_Offset"] = "1234567"
            answer = ask(port, "PATCH", path, data[1_234_567:], **fields)
            self.assertEqual((answer.status, answer["Content-Location"]), (204, "https://up.example.org/files/x"))
            self.assertTrue(ask(port, "GET", "/files/x").body == data)
            server.end()
            self.assertNotIn("Traceback", server.text)
