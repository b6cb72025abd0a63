"""Conditional and integrity fields: what a client believes of a file, and what its bytes hash to."""

from __future__ import annotations

import base64
import hashlib
import os
from datetime import UTC, datetime
from email.utils import formatdate, parsedate_to_datetime
from itertools import product
from typing import Any

from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.server import Site
from twisted.web.test.requesthelper import DummyRequest

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.interfaces import Found
from lwstwisted.stores.local import LocalStore
from lwstwisted.stores.tree import DIGESTS_ATTRIBUTE
from lwstwisted.uploads.conditions import Conditions, NotModified, is_range_wanted
from lwstwisted.uploads.digests import expected_digests, repr_digest
from lwstwisted.web.site import StreamingSite
from tests.test_uploads_resource import SiteCase, everything
from tests.test_uploads_transfer import GatedStore

NOW = 1_700_000_000
FILE = Found('"new"', 3, NOW + 0.5)


def request_with(method: bytes = b"PUT", **fields: str) -> Any:
    request = DummyRequest([b""])
    request.method = method
    for name, value in fields.items():
        request.requestHeaders.addRawHeader(name.replace("_", "-").encode(), value.encode())
    return request


def date(seconds: float) -> str:
    return formatdate(seconds, usegmt=True)


def outcome(found: Found | None, method: bytes = b"PUT", **fields: str) -> int:
    """The status that the conditions lead to; 200 where they are met."""
    try:
        Conditions.of(request_with(method, **fields)).check(found)
    except NotModified:
        return 304
    except Refused as refused:
        return refused.refusal.status
    return 200


class ConditionTests(SynchronousTestCase):
    """RFC 9110 section 13, as a table."""

    def test_if_match(self) -> None:
        """Strong comparison: one of the tags is the file's; ``*`` means any file."""
        for value, here, missing in (
            ('"new"', 200, 412),
            ('"old"', 412, 412),
            ('"old", "new"', 200, 412),
            ('"old","x,y" ,"new"', 200, 412),
            ('W/"new"', 412, 412),
            ("*", 200, 412),
        ):
            self.assertEqual((outcome(FILE, if_match=value), outcome(None, if_match=value)), (here, missing), value)

    def test_if_none_match(self) -> None:
        """Weak comparison: none of the tags is the file's; ``*`` means that there must be no file."""
        for value, here, missing in (
            ('"new"', 412, 200),
            ('W/"new"', 412, 200),
            ('"old"', 200, 200),
            ("*", 412, 200),
        ):
            found = (outcome(FILE, if_none_match=value), outcome(None, if_none_match=value))
            self.assertEqual(found, (here, missing), value)
            if here == 412:
                self.assertEqual(outcome(FILE, b"GET", if_none_match=value), 304)
                self.assertEqual(outcome(FILE, b"HEAD", if_none_match=value), 304)
                self.assertEqual(outcome(FILE, b"DELETE", if_none_match=value), 412)

    def test_dates(self) -> None:
        """To the second, as HTTP dates are; the fraction of a file's time doesn't count."""
        for seconds, unmodified, modified in ((NOW - 1, 412, 200), (NOW, 200, 304), (NOW + 1, 200, 304)):
            self.assertEqual(outcome(FILE, if_unmodified_since=date(seconds)), unmodified)
            self.assertEqual(outcome(FILE, b"GET", if_modified_since=date(seconds)), modified)
        self.assertEqual(outcome(None, if_unmodified_since=date(NOW)), 412)
        self.assertEqual(outcome(FILE, b"PUT", if_modified_since=date(NOW)), 200)  # for reading only

    def test_precedence(self) -> None:
        """RFC 9110 section 13.2.2: tags outrank dates, and who must match is asked before who must not."""
        self.assertEqual(outcome(FILE, if_match='"new"', if_unmodified_since=date(NOW - 9)), 200)
        self.assertEqual(outcome(FILE, b"GET", if_none_match='"old"', if_modified_since=date(NOW)), 200)
        self.assertEqual(outcome(FILE, b"GET", if_match='"old"', if_none_match='"new"'), 412)
        self.assertEqual(outcome(FILE, b"GET", if_match='"new"', if_none_match='"new"'), 304)

    def test_nonsense(self) -> None:
        """A tag that is none is refused and not ignored: an upload relies on it. A date that is none is ignored."""
        values = ("new", '"a', '"a" "b"', "*, *", '"a", b', "W/", "\x7f")
        for field, value in product(("if_match", "if_none_match"), values):
            self.assertEqual(outcome(FILE, **{field: value}), 400, value)
        date, many = "Mon, 01 Jan {} {}:00:00 +{}", "9" * 20
        huge = [date.format(*one) for one in ((many, "00", "00"), (2024, many, "00"), (2024, "00", many))]
        for value in ("yesterday", "", "Sun, 06 Nov 1994 99:49:37 GMT", "\xe9", *huge):
            self.assertEqual(outcome(FILE, if_unmodified_since=value), 200, value)

    def test_forms_of_dates(self) -> None:
        """A date has three forms (RFC 9110 section 5.6.7), and may be before 1970."""
        at = datetime(1994, 11, 6, 8, 49, 37, tzinfo=UTC).timestamp()
        for value in ("Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"):
            for modified, status in ((at, 200), (at + 1, 412)):
                self.assertEqual(outcome(Found('"x"', 3, modified), if_unmodified_since=value), status, value)
        self.assertEqual(outcome(FILE, if_unmodified_since="Thu, 25 Aug 1960 14:00:47 GMT"), 412)

    def test_if_range(self) -> None:
        """A part is sent only of the file that the client has the other part of."""
        for value, wanted in (
            ('"new"', True),
            ('"old"', False),
            ('W/"new"', False),
            (date(NOW), True),
            (date(NOW - 1), False),
            ("nonsense", False),
        ):
            self.assertEqual(is_range_wanted(request_with(b"GET", if_range=value), FILE), wanted, value)
        self.assertTrue(is_range_wanted(request_with(b"GET"), FILE))


DATA = b"what was sent"
DIGESTS = {name: hashlib.new(name, DATA).digest() for name in ("sha256", "sha512", "md5")}
SHA_256 = base64.b64encode(DIGESTS["sha256"]).decode()
SHA_512 = base64.b64encode(DIGESTS["sha512"]).decode()
MD5 = base64.b64encode(DIGESTS["md5"]).decode()
OTHER = base64.b64encode(hashlib.sha256(b"else").digest()).decode()


class DigestFieldTests(SynchronousTestCase):
    """RFC 9530: how the fields are read and written."""

    def test_read(self) -> None:
        """Either field, several algorithms, in one line or more; what is unknown is ignored."""
        sha = {"sha256": DIGESTS["sha256"]}
        for fields, expected in (
            ({"repr_digest": f"sha-256=:{SHA_256}:"}, sha),
            ({"content_digest": f"sha-256=:{SHA_256}:"}, sha),
            ({"content_digest": f"sha-256=:{SHA_256}:", "repr_digest": f"sha-256=:{SHA_256}:"}, sha),
            ({"repr_digest": f"crc32=:AAAA:, sha-256=:{SHA_256}:, x=1"}, sha),
            ({"repr_digest": f"sha-256=:{SHA_256}:;p=1"}, sha),
            ({"repr_digest": f"sha-256=:{SHA_256}:,sha-512=:{SHA_512}:"}, {**sha, "sha512": DIGESTS["sha512"]}),
            ({"content_md5": MD5}, {"md5": DIGESTS["md5"]}),
            ({}, {}),
        ):
            self.assertEqual(expected_digests(request_with(**fields)), expected, fields)

    def test_malformed(self) -> None:
        """What can't be read is refused before the body, and so are two that contradict each other."""
        for fields in (
            {"repr_digest": f"sha-256={SHA_256}"},
            {"repr_digest": "sha-256"},
            {"repr_digest": "sha-256=1"},
            {"repr_digest": "sha-256=:AAAA:"},
            {"repr_digest": "=:"},
            {"repr_digest": f"sha-256=:{SHA_256}:", "content_digest": f"sha-256=:{OTHER}:"},
            {"content_md5": "AAAA"},
            {"content_md5": "!"},
        ):
            with self.assertRaises(Refused) as caught:
                expected_digests(request_with(**fields))
            self.assertIs(caught.exception.refusal, errors.BAD_DIGEST, fields)

    def test_wanted(self) -> None:
        """The heaviest that we have; 0 means not at all; nonsense is ignored, as it asks for a favour only."""
        known = {"sha256": DIGESTS["sha256"], "sha512": DIGESTS["sha512"]}
        sha_256, sha_512 = f"sha-256=:{SHA_256}:".encode(), f"sha-512=:{SHA_512}:".encode()
        for wanted, given in (
            ("sha-256=1", sha_256),
            ("sha-256=1, sha-512=10", sha_512),
            ("md5=10, sha-256=1", sha_256),
            ("sha-256=0", None),
            ("crc32=9", None),
            ("((", None),
        ):
            self.assertEqual(repr_digest(request_with(b"GET", want_repr_digest=wanted), known), given, wanted)
        self.assertIsNone(repr_digest(request_with(b"GET", want_repr_digest="sha-256=1"), {}))
        self.assertIsNone(repr_digest(request_with(b"GET"), known))


class FieldsContract:
    """The same over HTTP. A mixin, so that no runner takes it alone."""

    async def test_create_only(self: Any) -> None:
        """``If-None-Match: *`` creates and never replaces; the body of the second one isn't even asked for."""
        self.assertEqual((await self.ask("PUT", "/files/a/x", b"one", If_None_Match="*")).status, 201)
        answer = await self.ask("PUT", "/files/a/x", b"two", If_None_Match="*")
        self.assertEqual(answer.status, 412)
        self.assertEqual((self.root / "a" / "x").read_bytes(), b"one")

    async def test_replace_what_i_know(self: Any) -> None:
        """An upload answers its tag; with it the file can be replaced once, and then not again."""
        tag = (await self.ask("PUT", "/files/x", b"one"))["ETag"]
        self.assertEqual((await self.ask("GET", "/files/x"))["ETag"], tag)
        second = await self.ask("PUT", "/files/x", b"two", If_Match=tag)
        self.assertEqual(second.status, 204)
        self.assertNotEqual(second["ETag"], tag)
        self.assertEqual((await self.ask("PUT", "/files/x", b"six", If_Match=tag)).status, 412)
        self.assertEqual((await self.ask("PUT", "/files/y", b"six", If_Match="*")).status, 412)
        self.assertEqual((self.root / "x").read_bytes(), b"two")
        self.assertFalse((self.root / "y").exists())

    async def test_lost_update(self: Any) -> None:
        """Two clients replace what both have seen: one of them hears that it is no longer so."""
        tag = (await self.ask("PUT", "/files/x", b"one"))["ETag"]
        store = self.begin(GatedStore, is_open=False)
        from twisted.internet.defer import DeferredList, ensureDeferred

        both = [ensureDeferred(self.ask("PUT", "/files/x", body, If_Match=tag)) for body in (b"two", b"six")]
        await self.until(lambda: store.arrived == 2, "both uploads were about to be committed")
        store.open_gate()
        results = await DeferredList(both)
        self.assertEqual(sorted(answer.status for _, answer in results), [204, 412])

    async def test_delete_what_i_know(self: Any) -> None:
        """So can it be deleted."""
        tag = (await self.ask("PUT", "/files/x", b"one"))["ETag"]
        self.assertEqual((await self.ask("DELETE", "/files/x", If_Match='"other"')).status, 412)
        self.assertEqual((await self.ask("DELETE", "/files/x", If_Unmodified_Since=date(0))).status, 412)
        self.assertEqual((await self.ask("DELETE", "/files/x", If_Match=tag)).status, 204)
        self.assertFalse((self.root / "x").exists())

    async def test_digest_is_wanted(self: Any) -> None:
        """Who wants to know what arrived is told so, and so is who fetches it later."""
        of_all = {name: base64.b64encode(hashlib.new(name, b"data").digest()).decode() for name in ("sha256", "sha512")}
        for wanted, said in (
            ("sha-256=1", f"sha-256=:{of_all['sha256']}:"),
            ("sha-256=1, sha-512=2", f"sha-512=:{of_all['sha512']}:"),
            ("sha-256=0, md5=9", None),
            ("?", None),
        ):
            put = await self.ask("PUT", "/files/x", b"data", Want_Repr_Digest=wanted)
            self.assertEqual((put.status in (201, 204), put["Repr-Digest"]), (True, said), wanted)
            self.assertEqual((await self.ask("GET", "/files/x", Want_Repr_Digest=wanted))["Repr-Digest"], said)

    async def test_of_another_origin(self: Any) -> None:
        """What a page of another site makes a browser send changes nothing; reading is harmless, as it sees nothing."""
        (host, port), own = self.address, f"{self.address[0]}:{self.address[1]}"
        await self.ask("PUT", "/files/x", b"here")
        foreign: list[dict[str, str]] = [
            {"Sec_Fetch_Site": "cross-site", "Origin": f"http://{own}"},
            {"Sec_Fetch_Site": "same-site"},
            {"Sec_Fetch_Site": ""},
            {"Origin": "https://example.com"},
            {"Origin": f"http://example.com:{port}"},
            {"Origin": f"http://{host}:{port + 1}"},
            {"Origin": f"http://{own}.example.com"},
            {"Origin": "http://[::1"},
            {"Origin": "null"},
            {"Origin": ""},
        ]
        form = b'--b\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\nx\r\n--b--\r\n'
        kind = {"Content_Type": "multipart/form-data; boundary=b"}
        for fields in foreign:
            for answer in (
                await self.ask("POST", "/files/", form, **fields, **kind),
                await self.ask("PUT", "/files/x", b"there", **fields),
                await self.ask("DELETE", "/files/x", **fields),
            ):
                self.assertEqual((answer.status, b"another site" in answer.body), (403, True), fields)
            self.assertEqual((await self.ask("GET", "/files/x", **fields)).body, b"here")
        self.assertFalse((self.root / "f").exists())
        for own_fields in (
            {"Sec_Fetch_Site": "same-origin", "Origin": f"http://{own}"},
            {"Sec_Fetch_Site": "same-origin", "Origin": "https://name-behind-a-proxy.example"},
            {"Sec_Fetch_Site": "none"},
            {"Origin": f"http://{own}"},
            {"Origin": f"https://{own}"},
        ):
            answer = await self.ask("POST", "/files/", form, **own_fields, **kind)
            self.assertEqual(answer.status, 201, own_fields)

    async def test_read_if_new(self: Any) -> None:
        """Who has the file already gets 304 with the tag and no content; a part of an older one is sent whole."""
        tag = (await self.ask("PUT", "/files/x", b"0123456789"))["ETag"]
        for method in ("GET", "HEAD"):
            answer = await self.ask(method, "/files/x", If_None_Match=f'"other", {tag}')
            self.assertEqual((answer.status, answer["ETag"], answer.body), (304, tag, b""))
        self.assertEqual((await self.ask("GET", "/files/x", Range="bytes=2-3", If_Range=tag)).body, b"23")
        self.assertEqual((await self.ask("GET", "/files/x", Range="bytes=2-3", If_Range='"other"')).body, b"0123456789")
        modified = (await self.ask("GET", "/files/x"))["Last-Modified"]
        self.assertEqual((await self.ask("GET", "/files/x", Range="bytes=2-3", If_Range=modified)).body, b"23")
        self.assertEqual((await self.ask("GET", "/files/x", Range="bytes=2-3", If_Range=date(0))).body, b"0123456789")
        self.assertEqual((await self.ask("GET", "/files/x", If_Unmodified_Since=modified)).status, 200)
        self.assertEqual(parsedate_to_datetime(modified).timestamp(), int((self.root / "x").stat().st_mtime))
        self.assertEqual((await self.ask("GET", "/files/x", If_Modified_Since=modified)).status, 304)
        self.assertEqual((await self.ask("GET", "/files/x", If_Match='"other"')).status, 412)

    async def test_digest(self: Any) -> None:
        """Bytes that hash to what was said are stored, and who wants to know is told the digest."""
        for field in ("Content_Digest", "Repr_Digest"):
            answer = await self.ask("PUT", f"/files/{field}", DATA, **{field: f"sha-256=:{SHA_256}:"})
            self.assertEqual(answer.status, 201)
            answer = await self.ask("GET", f"/files/{field}", Want_Repr_Digest="sha-256=1")
            self.assertEqual((answer.body, answer["Repr-Digest"]), (DATA, f"sha-256=:{SHA_256}:"))
            self.assertIsNone((await self.ask("GET", f"/files/{field}"))["Repr-Digest"])
        self.assertEqual((await self.ask("PUT", "/files/m", DATA, Content_MD5=MD5)).status, 201)
        self.assertNotIn(DIGESTS_ATTRIBUTE, os.listxattr(self.root / "m"))  # too weak to be passed on

    async def test_digest_mismatch(self: Any) -> None:
        """Bytes that were damaged on their way never get the name, large or small, and nothing is left of them."""
        await self.ask("PUT", "/files/x", b"before")
        before = everything(self.root)
        large = bytes(3_000_000)
        for path, body, fields in (
            ("/files/x", DATA + b"!", {"Repr_Digest": f"sha-256=:{SHA_256}:"}),
            ("/files/y", large, {"Content_Digest": f"sha-512=:{SHA_512}:"}),
            ("/files/z", DATA, {"Repr_Digest": f"sha-256=:{SHA_256}:, sha-512=:{'A' * 86}==:"}),
            ("/files/z", DATA[:-1], {"Content_MD5": MD5}),
            ("/files/new/z", iter([DATA, b"!"]), {"Repr_Digest": f"sha-256=:{SHA_256}:"}),
        ):
            answer = await self.ask("PUT", path, body, **fields)
            self.assertEqual((answer.status, b"send it again" in answer.body), (400, True), path)
        self.assertEqual(everything(self.root), before)

    async def test_large_with_digest(self: Any) -> None:
        """A body of many blocks is hashed in order."""
        body = os.urandom(5_000_001)
        field = base64.b64encode(hashlib.sha512(body).digest()).decode()
        self.assertEqual((await self.ask("PUT", "/files/x", body, Repr_Digest=f"sha-512=:{field}:")).status, 201)
        answer = await self.ask("HEAD", "/files/x", Want_Repr_Digest="sha-512=1")
        self.assertEqual(answer["Repr-Digest"], f"sha-512=:{field}:")

    async def test_replaced_digest(self: Any) -> None:
        """A file that replaces another doesn't inherit its digest, and a spoilt note of one is none."""
        await self.ask("PUT", "/files/x", DATA, Repr_Digest=f"sha-256=:{SHA_256}:")
        os.setxattr(self.root / "x", DIGESTS_ATTRIBUTE, b"sha256=zz")
        self.assertIsNone((await self.ask("GET", "/files/x", Want_Repr_Digest="sha-256=1"))["Repr-Digest"])
        await self.ask("PUT", "/files/x", b"else")
        self.assertIsNone((await self.ask("GET", "/files/x", Want_Repr_Digest="sha-256=1"))["Repr-Digest"])

    async def test_file_system_without_attributes(self: Any) -> None:
        """Where digests can't be kept they are checked all the same."""

        def refuse(*_: object) -> None:
            raise OSError(95, "not supported")

        self.patch(os, "setxattr", refuse)
        self.patch(os, "getxattr", refuse)
        answer = await self.ask("PUT", "/files/x", DATA, Repr_Digest=f"sha-256=:{SHA_256}:")
        self.assertEqual(answer.status, 201)
        self.assertIsNone((await self.ask("GET", "/files/x", Want_Repr_Digest="sha-256=1"))["Repr-Digest"])
        self.assertEqual((await self.ask("PUT", "/files/x", b"!", Repr_Digest=f"sha-256=:{SHA_256}:")).status, 400)


class StreamingFieldsTests(FieldsContract, SiteCase, TestCase):
    """On a StreamingSite."""

    site_class = StreamingSite

    async def test_refused_on_the_head(self) -> None:
        """A condition that fails, or a field that can't be read, costs no byte of the body and no 100."""
        self.begin(LocalStore)
        await self.ask("PUT", "/files/x", b"here")
        for field, status in (
            (b"If-None-Match: *", b"412"),
            (b'If-Match: "other"', b"412"),
            (b"If-Match: nonsense", b"400"),
            (b"Repr-Digest: nonsense!", b"400"),
        ):
            lines = (b"PUT /files/x HTTP/1.1", b"Host: x", b"Content-Length: 9", b"Expect: 100-continue", field)
            self.assertEqual((await self.exchange(b"\r\n".join(lines) + b"\r\n\r\n"))[:12], b"HTTP/1.1 " + status)


class StockSiteFieldsTests(FieldsContract, SiteCase, TestCase):
    """On twisted.web's own Site."""

    site_class = Site
