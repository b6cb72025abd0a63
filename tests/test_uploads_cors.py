"""Pages of other origins that begin uploads at the place of a file: what a browser asks, sends, and may read."""

from __future__ import annotations

from typing import Any

from tests.test_uploads_rufh import FINAL, LAST, MAX_SIZE, RufhCase

PAGE = {"Origin": "https://example.org", "Sec-Fetch-Site": "cross-site"}


class FilePathTests(RufhCase):
    """``PUT`` and ``POST`` below ``/files/`` with ``Upload-Complete``."""

    def stored(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    async def preflight(self, path: str, method: str) -> Any:
        fields = {**PAGE, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": "upload-complete"}
        return await self.ask("OPTIONS", path, fields=fields)

    async def test_upload_by_a_page(self) -> None:
        """A page of another origin is let through by the preflight, uploads, and may read where it goes on."""
        for path, method in (("/files/x", "PUT"), ("/files/", "POST")):
            allowed = await self.preflight(path, method)
            self.assertEqual(allowed["Access-Control-Allow-Origin"], "*")
            self.assertIn(method, (allowed["Access-Control-Allow-Methods"] or "").split(", "))
            said = (allowed["Access-Control-Allow-Headers"] or "").lower().split(", ")
            for field in ("upload-complete", "upload-draft-interop-version", "content-disposition", "upload-length"):
                self.assertIn(field, said)
            self.assertIsNone(allowed["Access-Control-Allow-Credentials"])
        begun = await self.ask("PUT", "/files/x", b"abc", {**LAST.fields(False), **PAGE})
        self.assertEqual((begun.status, begun["Access-Control-Allow-Origin"]), (201, "*"))
        exposed = (begun["Access-Control-Expose-Headers"] or "").lower().split(", ")
        self.assertLessEqual({"location", "upload-offset", "upload-limit", "etag"}, set(exposed))
        ended = await self.go_on(begun["Location"] or "", 3, b"def", True, **PAGE)
        self.assertEqual((ended.status, self.stored("x")), (201, b"abcdef"))
        at_once = await self.ask("PUT", "/files/y", b"all", {**FINAL.fields(True), **PAGE})
        self.assertEqual((at_once.status, at_once["Access-Control-Allow-Origin"]), (201, "*"))

    async def test_refusals_can_be_read(self) -> None:
        """So is what is refused, as soon as it is one that begins an upload."""
        fields = {**LAST.fields(False), "Upload-Length": str(MAX_SIZE + 1), **PAGE}
        answer = await self.ask("PUT", "/files/x", b"", fields)
        self.assertEqual((answer.status, answer["Access-Control-Allow-Origin"]), (413, "*"))

    async def test_replaces_nothing(self) -> None:
        """Files that are there stay as they are, in one request or in several."""
        await self.ask("PUT", "/files/x", b"old")
        for fields in (LAST.fields(False), LAST.fields(True), FINAL.fields(True)):
            answer = await self.ask("PUT", "/files/x", b"new", {**fields, **PAGE, "If-None-Match": '"other"'})
            self.assertEqual((answer.status, answer["Access-Control-Allow-Origin"]), (412, "*"))
        self.assertEqual(self.stored("x"), b"old")

    async def test_all_else_stays_closed(self) -> None:
        """No page reads, deletes or stores a file in another way, whatever fields it adds."""
        await self.ask("PUT", "/files/x", b"old")
        form = b'--b\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\nx\r\n--b--\r\n'
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        for said in ({}, LAST.fields(True), LAST.fields(False)):
            read = await self.ask("GET", "/files/x", fields={**PAGE, **said})
            self.assertEqual((read.status, read["Access-Control-Allow-Origin"]), (200, None))
            self.assertEqual((await self.ask("DELETE", "/files/x", fields={**PAGE, **said})).status, 403)
            self.assertEqual((await self.ask("POST", "/files/", form, {**PAGE, **kind, **said})).status, 403)
        self.assertEqual((await self.ask("PUT", "/files/z", b"new", PAGE)).status, 403)
        for method in ("GET", "DELETE", "PATCH"):
            self.assertIsNone((await self.preflight("/files/x", method))["Access-Control-Allow-Origin"])
        self.assertEqual(self.stored("x"), b"old")


class SomeOriginsTests(RufhCase):
    """``--allow-origin https://example.org``."""

    allowed_origins = ("https://example.org",)

    async def test_others_are_refused(self) -> None:
        """Where some are allowed, others are not."""
        own = await self.ask("PUT", "/files/x", b"abc", {**LAST.fields(True), **PAGE})
        self.assertEqual((own.status, own["Access-Control-Allow-Origin"]), (201, "https://example.org"))
        self.assertEqual(own["Vary"], "Origin")
        other = {**PAGE, "Origin": "https://example.com"}
        refused = await self.ask("PUT", "/files/y", b"abc", {**LAST.fields(True), **other})
        self.assertEqual((refused.status, refused["Access-Control-Allow-Origin"]), (403, None))
