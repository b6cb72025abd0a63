"""UploadResource over real connections: what is stored and sent, and what bad input gets."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SkipTest, TestCase
from twisted.web.resource import Resource
from twisted.web.server import Site

from lwstwisted import errors
from lwstwisted.errors import Refusal, Refused
from lwstwisted.interfaces import Name, PartialFile
from lwstwisted.loop import presence
from lwstwisted.stores.local import LocalStore
from lwstwisted.uploads import transfer
from lwstwisted.uploads.resource import UploadResource
from lwstwisted.uploads.transfer import BLOCK, WORTH_A_WRITE
from lwstwisted.web.site import StreamingSite
from tests.contracts import sample
from tests.servers import PATIENCE
from tests.test_uploads_transfer import GatedStore

KIB, MIB = 1024, 1024 * 1024


@dataclass
class Answer:
    status: int
    fields: http.client.HTTPMessage
    body: bytes

    def __getitem__(self, name: str) -> str | None:
        return self.fields[name]


def is_whole(received: bytes) -> bool:
    """Whether a whole answer has arrived."""
    head, end, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return bool(end) and len(body) >= int(length[1] if length else 0)


def everything(root: Path) -> dict[str, object]:
    """All beneath a root, the store's own folder included: kind, target or digest, and mode."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        if path.is_symlink():
            what: object = os.readlink(path)
        else:
            what = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[str(path.relative_to(root))] = (mode, what)
    return found


class FailingStore(LocalStore):
    """A store on disk of which one call fails.

    :ivar fail_at: which append or commit of an upload, counted from 0.
    """

    fail_at = -1

    async def create(self, name: Name, length: int | None, *options: Any) -> Any:
        return FailingFile(await super().create(name, length, *options), self.fail_at)


class FailingFile:
    def __init__(self, part: PartialFile, fail_at: int) -> None:
        self._part = part
        self._left = fail_at

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise Refused(errors.DISK_FULL)

    @property
    def etag(self) -> str:
        return self._part.etag

    @property
    def digests(self) -> Mapping[str, bytes]:
        return self._part.digests

    async def append(self, data: memoryview) -> None:
        self._count()
        await self._part.append(data)

    async def commit(self, data: memoryview) -> bool:
        self._count()
        return await self._part.commit(data)

    async def discard(self) -> None:
        await self._part.discard()


class SiteCase(TestCase):
    """A site with an UploadResource at /files, on a port of loopback."""

    timeout = 2 * PATIENCE
    site_class: Callable[..., Site] = StreamingSite

    def setUp(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        self.folder = folder
        self.root = folder / "root"
        self.came = self.gone = 0
        self.begin(LocalStore)

    def begin(self, store_class: Callable[..., LocalStore], **options: Any) -> Any:
        """Serve ``self.root``; called again, serve it by another store or with other options."""
        from twisted.internet import reactor

        store_options = {"is_open": options.pop("is_open")} if "is_open" in options else {}
        store = store_class(self.root, reactor, durability="none", **store_options)
        site = Resource()
        site.putChild(b"files", UploadResource(store, **options))
        self.site = self.site_class(site, reactor=reactor, logPath=str(self.folder / "log"))
        build = self.site.buildProtocol

        def counted(address: Any) -> Any:
            protocol: Any = build(address)
            lost = protocol.connectionLost
            self.came += 1

            def connection_lost(*reason: Any) -> None:
                self.gone += 1
                lost(*reason)

            protocol.connectionLost = connection_lost
            return protocol

        self.patch(self.site, "buildProtocol", counted)
        port = reactor.listenTCP(0, self.site, interface="127.0.0.1")  # type: ignore[attr-defined]
        self.address = ("127.0.0.1", port.getHost().port)
        self.addCleanup(lambda: Deferred.fromCoroutine(store.stop()))
        if isinstance(self.site, StreamingSite):
            self.addCleanup(lambda: Deferred.fromCoroutine(self.site.stop()))
        self.addCleanup(port.stopListening)
        if isinstance(store, GatedStore):
            self.addCleanup(store.open_gate)
        return store

    def descriptors(self) -> int:
        """How many sockets, and files beneath our folder, this process has open."""
        found = 0
        for name in os.listdir("/proc/self/fd"):
            # The one that lists is closed by now.
            with contextlib.suppress(FileNotFoundError):
                found += os.readlink(f"/proc/self/fd/{name}").startswith(("socket:", str(self.folder)))
        return found

    # Clients, in threads

    async def ask(
        self, method: str, path: str, body: bytes | Iterable[bytes] | None = None, **fields: str
    ) -> Answer:
        """One request on a connection of its own."""
        return await deferToThread(self._ask, method, path, body, fields)

    def _ask(self, method: str, path: str, body: bytes | Iterable[bytes] | None, fields: dict[str, str]) -> Answer:
        client = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
        try:
            headers = {name.replace("_", "-"): value for name, value in fields.items()}
            client.request(method, path, body, headers, encode_chunked=not isinstance(body, bytes | None))
            answer = client.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            client.close()

    async def exchange(self, *pieces: bytes) -> bytes:
        """Send bytes as they are until there is an answer; then say no more, and read until the server closes."""
        return await deferToThread(self._exchange, b"".join(pieces))

    def _exchange(self, data: bytes) -> bytes:
        with socket.create_connection(self.address, PATIENCE) as client:
            view, received = memoryview(data), b""
            while view and not select.select([client], [client], [], PATIENCE)[0]:
                view = view[client.send(view[:65536], socket.MSG_DONTWAIT) :]
            while arrived := client.recv(65536):
                received += arrived
                if is_whole(received):
                    with contextlib.suppress(OSError):  # it has closed already
                        client.shutdown(socket.SHUT_WR)
            return received

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Let the reactor turn until ``condition`` holds."""
        from twisted.internet import reactor

        for _ in range(int(PATIENCE * 100)):
            if condition():
                return
            await deferLater(reactor, 0.01, lambda: None)  # type: ignore[arg-type]
        raise AssertionError(f"it did not happen that {what}")

    async def until_lost(self, number: int) -> None:
        """Let the reactor turn until so many clients have come and gone."""
        await self.until(lambda: self.came == self.gone == number, "the client was seen to come and go")

    def assert_refused(self, answer: Answer, refusal: Refusal, what: object = None) -> None:
        self.assertEqual((answer.status, answer.body), (refusal.status, refusal.sentence.encode() + b"\n"), what)
        self.assertEqual(answer["Content-Type"], "text/plain; charset=utf-8")
        self.assertEqual(answer["X-Content-Type-Options"], "nosniff")


class Uploading:
    """What every site must do. A mixin, for a streaming site and a stock one."""

    async def test_new_and_replaced(self: Any) -> None:
        """201 with the place of a new file, 204 for a replaced one; the folders are made."""
        answer = await self.ask("PUT", "/files/a/b%20c", b"one")
        self.assertEqual((answer.status, answer["Location"], answer.body), (201, "/files/a/b%20c", b""))
        answer = await self.ask("PUT", "/files/a/b%20c", b"two")
        self.assertEqual((answer.status, answer["Location"], answer.body), (204, None, b""))
        self.assertEqual((self.root / "a" / "b c").read_bytes(), b"two")

    async def test_sizes(self: Any) -> None:
        """Every size around the edges of buffers and blocks comes and goes whole, with a length and chunked."""
        edges = (4 * KIB, 16 * KIB, 64 * KIB, 100_000, WORTH_A_WRITE, BLOCK, 2 * BLOCK)
        sizes = sorted({0, 1, 2, *(edge + by for edge in edges for by in (-1, 0, 1))})
        data = sample(max(sizes))

        def run() -> None:
            client = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
            try:
                for size in sizes:
                    whole = data[:size]
                    cuts = [whole[at : at + 70_001] for at in range(0, size, 70_001)]
                    # An object that is no bytes is sent chunked.
                    for body, chunked in ((whole, False), (iter(cuts), True)):
                        client.request("PUT", f"/files/{size}{chunked}", body, encode_chunked=chunked)
                        answer = client.getresponse()
                        self.assertEqual((answer.status, answer.read()), (201, b""), (size, chunked))
                        client.request("GET", f"/files/{size}{chunked}")
                        answer = client.getresponse()
                        self.assertEqual(answer.headers["Content-Length"], str(size))
                        self.assertTrue(answer.read() == whole, (size, chunked))
            finally:
                client.close()

        await deferToThread(run)
        self.assertEqual(len(list(self.root.iterdir())), 2 * len(sizes) + 1)

    async def test_download(self: Any) -> None:
        """GET and HEAD tell the same; a part of a file can be had; an unchanged one need not be sent again."""
        data = sample(100_000)
        await self.ask("PUT", "/files/file.bin", data)
        whole = await self.ask("GET", "/files/file.bin")
        self.assertEqual((whole.status, whole.body == data, whole["Content-Length"]), (200, True, "100000"))
        head = await self.ask("HEAD", "/files/file.bin")
        self.assertEqual((head.status, head.body, head["Content-Length"]), (200, b"", "100000"))
        for wanted, content, span in (
            ("bytes=10-19", data[10:20], "bytes 10-19/100000"),
            ("bytes=99990-", data[99_990:], "bytes 99990-99999/100000"),
            ("bytes=-5", data[-5:], "bytes 99995-99999/100000"),
        ):
            part = await self.ask("GET", "/files/file.bin", Range=wanted)
            self.assertEqual((part.status, part.body, part["Content-Range"]), (206, content, span))
        part = await self.ask("GET", "/files/file.bin", Range="bytes=100000-")
        self.assertEqual((part.status, part["Content-Range"]), (416, "bytes */100000"))
        again = await self.ask("GET", "/files/file.bin", If_Modified_Since=whole["Last-Modified"])
        self.assertEqual((again.status, again.body), (304, b""))

    async def test_what_users_uploaded_is_no_page_of_ours(self: Any) -> None:
        """A browser saves it, guesses no type, and runs no script in it."""
        for name, kind in (
            ("page.html", "text/html"),
            ("image.svg", "image/svg+xml"),
            ("no type", "application/octet-stream"),
            ("archive.tar.gz", "application/gzip"),
        ):
            await self.ask("PUT", "/files/" + quote(name), b"<script>alert(1)</script>")
            answer = await self.ask("GET", "/files/" + quote(name))
            self.assertEqual(answer["Content-Disposition"], f"attachment; filename*=UTF-8''{quote(name)}")
            self.assertEqual(answer["Content-Security-Policy"], "sandbox; default-src 'none'")
            self.assertEqual(answer["X-Content-Type-Options"], "nosniff")
            self.assertIn(answer["Content-Type"], (kind, "application/octet-stream"), name)
            self.assertIsNone(answer["Content-Encoding"], name)

    async def test_delete(self: Any) -> None:
        """204, and then it is gone; the folder stays."""
        await self.ask("PUT", "/files/a/b", b"x")
        answer = await self.ask("DELETE", "/files/a/b")
        self.assertEqual((answer.status, answer.body), (204, b""))
        for method in ("GET", "DELETE"):
            self.assert_refused(await self.ask(method, "/files/a/b"), errors.NOT_FOUND)
        self.assertEqual(list((self.root / "a").iterdir()), [])

    async def test_listing_for_people(self: Any) -> None:
        """Whatever a name is, the page shows it as text, and its link leads to it."""
        names = ["<script>", '"><img src=x onerror=alert(1)>', "a&amp;b", "100%", "50%25", "a?b#c", "é ü", "'q'"]
        for name in names:
            await self.ask("PUT", f"/files/folder/{quote(name, safe='').replace('%25', '%')}", name.encode())
        await self.ask("PUT", "/files/folder/below/x", b"1")
        stored = sorted(path.name for path in (self.root / "folder").iterdir())
        for path in ("/files/folder", "/files/folder/"):
            answer = await self.ask("GET", path)
            self.assertEqual((answer.status, answer["Content-Type"]), (200, "text/html; charset=utf-8"))
            self.assertIn("default-src 'none'", answer["Content-Security-Policy"])
            page = answer.body.decode()
            known = "html meta title style h1 form input button table tr td a"
            self.assertEqual(set(re.findall(r"<(\w+)", page)), set(known.split()))
            links = re.findall(r'<a href="([^"]*)">', page)
            self.assertEqual(sorted(unquote(link).rstrip("/").rpartition("/")[2] for link in links), stored)
            for link in links:
                self.assertEqual((await self.ask("GET", link)).status, 200, link)

    async def test_listing_for_programs(self: Any) -> None:
        """The same as JSON, where it's asked for; the store's own folder isn't in it."""
        await self.ask("PUT", "/files/b", b"12345")
        await self.ask("PUT", "/files/%C3%A9/x", b"")
        answer = await self.ask("GET", "/files/", Accept="application/json")
        self.assertEqual((answer.status, answer["Content-Type"]), (200, "application/json"))
        listing = json.loads(answer.body)
        self.assertEqual(
            [(one["name"], one["type"], one["size"]) for one in listing], [("b", "file", 5), ("é", "folder", 0)]
        )
        head = await self.ask("HEAD", "/files/", Accept="application/json")
        self.assertEqual((head.status, head.body, head["Content-Length"]), (200, b"", answer["Content-Length"]))
        self.assert_refused(await self.ask("GET", "/files/missing/"), errors.NOT_FOUND)

    async def test_composed_and_decomposed_are_one_name(self: Any) -> None:
        """An é from a Mac and one from Linux look alike, and are one file."""
        composed = unicodedata.normalize("NFC", "é")
        decomposed = unicodedata.normalize("NFD", "é")
        self.assertEqual((await self.ask("PUT", f"/files/{quote(composed)}", b"1")).status, 201)
        self.assertEqual((await self.ask("PUT", f"/files/{quote(decomposed)}", b"2")).status, 204)
        self.assertEqual((await self.ask("GET", f"/files/{quote(composed)}")).body, b"2")
        self.assertEqual([path.name for path in self.root.iterdir() if path.name[0] != "."], [composed])

    async def test_methods(self: Any) -> None:
        """What can be done is told, also to who asks for something else."""
        allowed = "DELETE, GET, HEAD, OPTIONS, PUT"
        answer = await self.ask("OPTIONS", "/files/x")
        self.assertEqual((answer.status, answer["Allow"], answer.body), (204, allowed, b""))
        for method in ("POST", "PATCH"):
            answer = await self.ask(method, "/files/x", b"body")
            self.assert_refused(answer, errors.METHOD_NOT_ALLOWED)
            self.assertEqual(answer["Allow"], allowed)

    # What bad input gets

    async def test_bad_names(self: Any) -> None:
        """Each gets its status and a sentence, whatever is asked for, and changes nothing."""
        outside = self.folder / "outside"
        outside.mkdir()
        (outside / "secret").write_bytes(b"secret")
        await self.ask("PUT", "/files/folder/file", b"inside")
        (self.root / "link").symlink_to(outside / "secret")
        (self.root / "linked").symlink_to(outside)
        (self.root / "inner").symlink_to("folder")
        (self.root / "dangling").symlink_to(outside / "new")
        os.mkfifo(self.root / "pipe")
        before = everything(self.folder / "root"), everything(outside)
        long_path = "/".join(["x" * 250] * 17)
        every = ("PUT", "GET", "HEAD", "DELETE")
        table: list[tuple[Refusal, tuple[str, ...], list[str]]] = [
            (errors.NAME_DOTS, every, ["..", "../x", "a/../x", ".", "./x", "..;/x", "..;a=b/x"]),
            (errors.NAME_DOTS, every, ["%2e%2e/x", "%2E%2e", ".%2e/x", "%2e", "..%3b/x", "a/%2e%2e/%2e%2e/x"]),
            (errors.NAME_ENCODING, every, ["a%2fb", "a%2Fb", "%2fetc%2fpasswd", "..%2fx", "a%5cb", "..%5Cx"]),
            (errors.NAME_ENCODING, every, ["%252e%252e/x", "%252e", "a%252fb", "a%255cb", "a%2500", "%25252e"]),
            (errors.NAME_ENCODING, every, ["%c0%ae%c0%ae/x", "%c0%af", "%e0%80%af", "%ff", "%ed%a0%80", "a%80"]),
            (errors.NAME_CONTROL, every, ["a%00b", "%00", "a%00/x", "a%0ab", "a%0d%0ab", "a%7f", "a%1b%5b1m"]),
            (errors.NAME_CONTROL, every, ["%c2%85", "%e2%80%a8"]),
            (errors.NAME_EMPTY, every, ["/x", "a//x", "//etc/passwd"]),
            (errors.NAME_EMPTY, ("GET", "HEAD"), ["/"]),
            (errors.METHOD_NOT_ALLOWED, ("PUT", "DELETE"), ["", "/", "a/", "folder/"]),
            (errors.NAME_TOO_LONG, every, ["x" * 256, "%c3%a9" * 128, "a/" + "x" * 256, long_path]),
            (errors.NAME_RESERVED, every, [".lwstwisted", ".lwstwisted/partial/x", ".LWSTwisted/x"]),
            (errors.NAME_RESERVED, every, ["%2elwstwisted/x"]),
            (errors.IS_FOLDER, ("PUT", "DELETE"), ["folder"]),
            (errors.NOT_A_FOLDER, ("PUT",), ["folder/file/x", "folder/file/x/y"]),
            (errors.NOT_FOUND, ("GET", "HEAD", "DELETE"), ["folder/file/x", "missing", "missing/x"]),
            (errors.NOT_A_FILE, every, ["link", "linked/secret", "linked/new", "inner/file", "dangling", "pipe"]),
        ]
        for refusal, methods, paths in table:
            for path in paths:
                for method in methods:
                    answer = await self.ask(method, "/files/" + path, b"evil" if method == "PUT" else None)
                    if method == "HEAD":
                        self.assertEqual((answer.status, answer.body), (refusal.status, b""), (method, path))
                    else:
                        self.assert_refused(answer, refusal, (method, path))
        self.assert_refused(await self.ask("PUT", "/files", b"evil"), errors.METHOD_NOT_ALLOWED)
        self.assertEqual((everything(self.folder / "root"), everything(outside)), before)

    async def test_bad_fields(self: Any) -> None:
        """What this server would have to ignore or undo is refused."""
        before = everything(self.root)
        for refusal, fields in (
            (errors.CONTENT_ENCODING, {"Content_Encoding": "gzip"}),
            (errors.CONTENT_ENCODING, {"Content_Encoding": "identity, br"}),
            (errors.CONTENT_RANGE, {"Content_Range": "bytes 0-3/10"}),
        ):
            self.assert_refused(await self.ask("PUT", "/files/x", b"evil", **fields), refusal, fields)
        self.assertEqual(everything(self.root), before)
        answer = await self.ask("PUT", "/files/x", b"good", Content_Encoding="Identity")
        self.assertEqual(answer.status, 201)

    async def test_no_length(self: Any) -> None:
        """A PUT that says nothing of its body isn't taken for an empty file."""
        before = everything(self.root)
        answer = await self.exchange(b"PUT /files/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        self.assertTrue(answer.startswith(b"HTTP/1.1 411 "), answer)
        self.assertTrue(answer.endswith(errors.LENGTH_REQUIRED.sentence.encode() + b"\n"), answer)
        self.assertEqual(everything(self.root), before)

    async def test_too_large(self: Any) -> None:
        """One byte more than --max-size is refused, with a length or chunked; exactly as much is not."""
        self.begin(LocalStore, max_size=1000)
        before = everything(self.root)
        for size in (1001, 100_000):
            self.assert_refused(await self.ask("PUT", "/files/x", bytes(size)), errors.BODY_TOO_LARGE)
            answer = await self.ask("PUT", "/files/x", iter([bytes(500)] * (size // 500) + [b"1"]))
            self.assert_refused(answer, errors.BODY_TOO_LARGE)
        self.assertEqual(everything(self.root), before)
        self.assertEqual((await self.ask("PUT", "/files/x", bytes(1000))).status, 201)
        self.assertEqual((await self.ask("PUT", "/files/y", iter([bytes(500)] * 2))).status, 201)

    async def test_store_fails_at_each_block(self: Any) -> None:
        """Whichever write fails: one answer, nothing visible, nothing left; and then it works."""
        for name, size in {"BLOCK": 8 * KIB, "WORTH_A_WRITE": 4 * KIB, "HIGH": 16 * KIB, "LOW": 8 * KIB}.items():
            self.patch(transfer, name, size)
        self.patch(transfer, "_spare", [])
        calls = await self.fail_at_each_call(sample(50_001))
        self.assertGreater(calls, 5)

    @pytest.mark.slow
    async def test_store_fails_early_in_a_long_body(self: Any) -> None:
        """A client that is in the middle of its body gets the answer, too."""
        await self.fail_at_each_call(sample(8 * MIB + 1), only=1)

    async def fail_at_each_call(self: Any, data: bytes, only: int | None = None) -> int:
        """Upload ``data`` until no call is left to fail. Returns how many there were."""
        store = self.begin(FailingStore)
        before = everything(self.root)
        open_before = self.descriptors()
        head = b"PUT /files/folder/file HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        for store.fail_at in [only, 1000] if only is not None else range(1000):
            answer = await self.exchange(head % len(data), data)
            self.assertEqual(answer.count(b"HTTP/1.1 "), 1)
            if answer.startswith(b"HTTP/1.1 201 "):
                break
            self.assertTrue(answer.startswith(b"HTTP/1.1 507 "), answer)
            self.assertTrue(answer.endswith(errors.DISK_FULL.sentence.encode() + b"\n"), answer)
            await self.until(lambda: self.descriptors() <= open_before, "all descriptors were closed")
            self.assertEqual(everything(self.root), before)
        self.assertTrue((self.root / "folder" / "file").read_bytes() == data)
        return int(store.fail_at)

    async def test_full_disk(self: Any) -> None:
        """507, before the body where its length tells, and later where it doesn't; all of the space comes back."""
        self.root = self.folder / "small"
        self.root.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(self.root)], capture_output=True, text=True
        )
        if mounted.returncode:
            raise SkipTest(f"needs root to mount a small file system: {mounted.stderr.strip()}")
        self.addCleanup(subprocess.run, ["umount", "--lazy", str(self.root)], check=True)
        store = self.begin(LocalStore)
        before = everything(self.root), os.statvfs(self.root).f_bfree
        answer = await self.ask("PUT", "/files/a/x", bytes(3 * MIB))
        self.assert_refused(answer, errors.DISK_FULL)
        # Few enough bytes behind the failing write that the client has sent all before it is answered.
        answer = await self.ask("PUT", "/files/a/x", iter([bytes(256 * KIB)] * 9))
        self.assert_refused(answer, errors.DISK_FULL)
        await self.until(
            lambda: (everything(self.root), os.statvfs(self.root).f_bfree) == before, "all was removed"
        )
        self.flushLoggedErrors()
        self.assertEqual((await self.ask("PUT", "/files/a/x", bytes(MIB))).status, 201)
        await store.stop()

    # Clients that leave

    async def test_shorter_than_announced(self: Any) -> None:
        """A client that leaves in the middle leaves nothing, wherever that is and however it goes."""
        before = everything(self.root)
        await self.ask("GET", "/files/")
        open_before = self.descriptors()
        for size in (0, 1, 100_000, WORTH_A_WRITE, 3 * MIB):
            for head in (b"Content-Length: 10000000", b"Transfer-Encoding: chunked"):
                for is_reset in (False, True):
                    number = self.came + 1
                    await deferToThread(self._leave, size, head, is_reset)
                    await self.until_lost(number)
                    await self.until(lambda: self.descriptors() <= open_before, "all descriptors were closed")
                    self.assertEqual(everything(self.root), before, (size, head, is_reset))
        self.assertEqual(self.flushLoggedErrors(), [])

    def _leave(self, size: int, head: bytes, is_reset: bool) -> None:
        with socket.create_connection(self.address, PATIENCE) as client:
            client.sendall(b"PUT /files/a/x HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
            client.sendall((b"1000000\r\n" if b"chunked" in head else b"") + bytes(size))
            if is_reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def test_client_leaves_before_the_answer(self: Any) -> None:
        """All was sent: what was asked for is done, nobody is told, and nothing is logged as an error."""
        store = self.begin(GatedStore, is_open=False)
        open_before = self.descriptors()
        for request in (
            b"PUT /files/a/x HTTP/1.1\r\nContent-Length: 4\r\n",
            b"GET /files/a/x HTTP/1.1\r\n",
            b"GET /files/a/ HTTP/1.1\r\n",
            b"DELETE /files/a/x HTTP/1.1\r\n",
        ):
            number, arrived = self.came + 1, store.arrived
            with socket.create_connection(self.address, PATIENCE) as client:
                client.sendall(request + b"Host: x\r\n\r\n" + (b"body" if request[0] == b"P"[0] else b""))
                await self.until(lambda: store.arrived > arrived, "the store was asked")  # noqa: B023
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await self.until_lost(number)
            store.open_gate()
            await self.until(lambda: store.finished == store.arrived, "the store has done it")
            await self.until(lambda: self.descriptors() <= open_before, "all descriptors were closed")
            self.assertEqual((self.root / "a" / "x").exists(), not request.startswith(b"DELETE"))
            store.close_gate()
        store.open_gate()
        self.assertEqual(self.flushLoggedErrors(), [])


class StreamingTests(Uploading, SiteCase):
    """Under a StreamingSite a body arrives as it comes."""

    async def test_refused_before_the_body(self) -> None:
        """Who asks before sending gets the final answer, and no 100 first; others needn't send to be answered."""
        self.begin(LocalStore, max_size=1000)
        before = everything(self.root)
        for path, head, status in (
            ("x", "Content-Length: 1001", 413),
            ("x", f"Content-Length: {1 << 62}", 413),
            ("x", "Content-Length: 10\r\nContent-Encoding: gzip", 415),
            ("x", "Content-Length: 10\r\nContent-Range: bytes 0-9/20", 400),
            ("../x", "Content-Length: 10", 400),
            (".lwstwisted/x", "Content-Length: 10", 400),
        ):
            for expectation in ("", "Expect: 100-continue\r\n"):
                raw = f"PUT /files/{path} HTTP/1.1\r\nHost: x\r\n{expectation}{head}\r\n\r\n".encode()
                answer = await self.exchange(raw)
                self.assertRegex(answer, rf"^HTTP/1.1 {status} ".encode())
                self.assertEqual(answer.count(b"HTTP/1.1 "), 1, answer)
                self.assertIn(b"\r\nConnection: close\r\n", answer)
                self.assertEqual(answer.partition(b"\r\n\r\n")[2].count(b"\n"), 1)
        self.assertEqual(everything(self.root), before)

    async def test_continue_when_accepted(self) -> None:
        """Who asks before sending is told to, once."""
        raw = b"PUT /files/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        raw += b"Content-Length: 4\r\nExpect: 100-continue\r\n\r\n"

        def run() -> bytes:
            with socket.create_connection(self.address, PATIENCE) as client:
                client.sendall(raw)
                first = client.recv(65536)
                client.sendall(b"body")
                while data := client.recv(65536):
                    first += data
                return first

        answer = await deferToThread(run)
        self.assertRegex(answer, rb"^HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 ")
        self.assertEqual((self.root / "x").read_bytes(), b"body")

    async def test_longer_than_announced(self) -> None:
        """What is behind the body is no part of the file: it's the next request, and a bad one."""
        head = b"PUT /files/x HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n"
        answer = await self.exchange(head + b"abc surplus\r\n\r\n")
        self.assertEqual(re.findall(rb"HTTP/1.1 (\d+)", answer), [b"201", b"400"])
        self.assertTrue(answer.endswith(errors.BAD_REQUEST_LINE.sentence.encode() + b"\n"), answer)
        self.assertEqual((self.root / "x").read_bytes(), b"abc")
        self.assertEqual([name for name in everything(self.root) if name[0] != "."], ["x"])

    async def test_client_leaves_during_a_pause(self) -> None:
        """A reset is seen while the store is still behind; when that has caught up, nothing is left of the upload."""
        self.patch(presence, "LOOK_INTERVAL", 0.05)
        store = self.begin(GatedStore, is_open=False)
        before = everything(self.root)
        open_before = self.descriptors()
        for is_reset in (False, True):

            def run(is_reset: bool = is_reset) -> None:
                with socket.create_connection(self.address, PATIENCE) as client:
                    client.sendall(b"PUT /files/a/x HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
                    client.settimeout(0.3)
                    try:
                        while True:
                            client.send(bytes(MIB))
                    except TimeoutError:
                        pass  # nobody takes any more
                    if is_reset:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

            await deferToThread(run)
            self.assertGreater(store.appended, 0)
            if is_reset:
                await self.until_lost(self.came)
            store.open_gate()
            await self.until(lambda: self.descriptors() <= open_before, "all descriptors were closed")
            self.assertEqual(everything(self.root), before)
            store.close_gate()
        store.open_gate()


class StockSiteTests(Uploading, SiteCase):
    """Under twisted.web's own Site the body has been spooled when the resource is asked."""

    site_class = Site
