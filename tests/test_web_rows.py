"""The rows of the table of cases that are about requests and their bodies, each proven by a test.

Those that have no proof elsewhere are tests here, named by their rows. The others::

  26  an unread body           test_web_channel.KeepAliveTests.test_ten_posts_to_nowhere
                               test_web_channel.RefusalTests.test_lingering
  27  refused while sending    test_web_channel.TCPTests.test_refused_while_sending
                               test_web_channel.TCPTests.test_refused_blindly_sending
                               test_web_channel.TLSTests.test_refused_blindly_sending
  28  lengths                  test_web_wire.FramingTableTests.test_heads
                               test_uploads_resource.StreamingTests.test_no_length
                               test_threats.FramingTests.test_refused
                               test_threats.FramingTests.test_refused_by_tls
  33  names                    test_uploads_form.FilenameTests.test_forms_of_names
                               test_uploads_form.FilenameTests.test_no_name_is_guessed
                               test_uploads_form.StreamingFormTests.test_names
  34  truncated forms          test_uploads_form.CutTests.test_cut_off_everywhere
                               test_uploads_form.StreamingFormTests.test_truncated
  35  trickles and stalls      test_web_limits.BodyRateTests.test_trickle
                               test_web_limits.BodyRateTests.test_stalls
                               test_slow_clients.SlowClientTests.test_slow_bodies
  36  slow, and not stalled    test_web_channel.DeadlineTests.test_progress_counts
  39  one answer               test_web_channel.RefusalTests.test_one_answer_whenever
                               test_uploads_resource.StreamingTests.test_store_fails_at_each_block
                               test_uploads_form.StreamingFormTests.test_store_fails_at_each_call
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import shutil
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast
from unittest import skipUnless

import pytest
from twisted.internet.defer import Deferred, gatherResults
from twisted.trial.unittest import SynchronousTestCase, TestCase

from lwstwisted.certificate import ensure_development_certificate
from lwstwisted.stores.local import LocalStore
from lwstwisted.uploads import transfer
from lwstwisted.uploads.parts import BOUNDARY_LENGTH, SLICE
from lwstwisted.uploads.resource import UploadResource
from lwstwisted.uploads.transfer import BLOCK, HIGH, WORTH_A_WRITE
from tests.contracts import sample
from tests.servers import (
    PATIENCE,
    serving,
    tls_endpoint,
    twistd,
    unfinished_beneath,
    visible_beneath,
    wait_until,
    write_sample,
)
from tests.test_threats import is_there, proofs
from tests.test_uploads_form import form_of, part
from tests.test_uploads_resource import KIB, MIB, SiteCase, is_whole
from tests.test_web_channel import CONTINUE, Talk, Twin, answers
from tests.tls_peer import MAX_RECORD, VERSIONS

ROWS = [*range(25, 37), 38, 39]
HOST = b"Host: localhost\r\n"
CLOSE = b"Connection: close\r\n"


def put(name: bytes, data: bytes, *lines: bytes) -> bytes:
    head = b"PUT /files/%b HTTP/1.1\r\n" % name + HOST + b"".join(lines)
    return head + b"Content-Length: %d\r\n\r\n" % len(data) + data


def post(path: bytes, boundary: bytes, form: bytes, *lines: bytes) -> bytes:
    """A form, all of it."""
    head = b"POST %b HTTP/1.1\r\n" % path + HOST + b"".join(lines)
    head += b'Content-Type: multipart/form-data; boundary="%b"\r\nContent-Length: %d\r\n\r\n' % (boundary, len(form))
    return head + form


def last_get(name: bytes) -> bytes:
    return b"GET /files/%b HTTP/1.1\r\n" % name + HOST + CLOSE + b"\r\n"


class TableTests(SynchronousTestCase):
    """The table at the begin of this module."""

    def test_every_row_is_proven(self) -> None:
        """Each row has a test here, or names tests that are there."""
        found = proofs(__doc__ or "")
        names = [name for case in (ServiceRows, MemoryRows, FormRows) for name in dir(case)]
        here = {int(row) for row in re.findall(r"\btest_row_(\d+)_", " ".join(names))}
        elsewhere = {int(row.split()[0]) for row in found}
        self.assertEqual(sorted(here | elsewhere), ROWS)
        self.assertEqual(here & elsewhere, set())
        self.assertEqual([test for tests in found.values() for test in tests if not is_there(test)], [])


class ServiceRows(SynchronousTestCase):
    """Rows that need a service of its own: TLS records, curl, and a disk that fails."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.root = self.folder / "root"
        self.certificate = ensure_development_certificate(self.folder / "pair.pem")
        listen = ["--listen", "tcp:0", "--listen", tls_endpoint(self.certificate)]
        command = twistd("--root", self.root, "--durability", "none", *listen)
        self.server = self.enterContext(serving(command, cwd=self.folder))
        self.plain, self.tls = self.server.wait_for_ports(2)

    def assert_nothing_left(self, opened: list[str]) -> None:
        wait_until(lambda: self.server.open_beneath(self.root) <= opened, "all files of the store were closed")
        self.assertEqual((visible_beneath(self.root), unfinished_beneath(self.root)), ([], []))

    def ask(self, data: bytes, ends: bool = False) -> bytes:
        """All that the server says until it closes the connection.

        :param ends: end our side behind ``data``, and not behind the answer.
        """
        with socket.create_connection(("127.0.0.1", self.plain), PATIENCE) as client:
            client.sendall(data)
            said = b""
            while not (ends or is_whole(said)) and (arrived := client.recv(65536)):
                said += arrived
            with contextlib.suppress(OSError):  # it has closed already
                client.shutdown(socket.SHUT_WR)
            return said + b"".join(iter(lambda: client.recv(65536), b""))

    def test_row_25_the_next_request_in_the_same_record(self) -> None:
        """What follows a body in its last TLS record is the next request, and no byte of it is in the file."""
        for version in VERSIONS:
            context = ssl.create_default_context(cafile=self.certificate)
            context.minimum_version = context.maximum_version = version
            data = sample(5000)
            form = form_of(part(data, "f"), boundary=b"B")
            for first in (put(b"f", data), post(b"/files/", b"B", form), post(b"/files/", b"B", form + b"epilogue")):
                for apart in (0, 1, 3000):  # bytes of the body that are in the record of what follows; 0 for all
                    cut = len(first) - apart if apart else 0
                    with (
                        socket.create_connection(("127.0.0.1", self.tls), PATIENCE) as plain,
                        context.wrap_socket(plain, server_hostname="localhost") as client,
                    ):
                        for record in filter(None, (first[:cut], first[cut:] + last_get(b"f"))):
                            self.assertLessEqual(len(record), MAX_RECORD)
                            self.assertEqual(client.send(record), len(record))
                        said = b"".join(iter(lambda client=client: client.recv(65536), b""))  # type: ignore[misc]
                    found = answers(said, at_end=True)
                    self.assertIn([answer.status for answer in found], ([201, 200], [204, 200]))
                    self.assertTrue(found[1].body == (self.root / "f").read_bytes() == data)
                (self.root / "f").unlink()

    def test_row_29_a_chunked_body_without_its_end(self) -> None:
        """A chunked body that ends at any of its bytes but the last one is told so, and nothing of it is stored."""
        head = b"PUT /files/f HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n" + CLOSE + b"\r\n"
        body = b'5;name="v;a"\r\nhello\r\n00D\r\n, chunked wor\r\n2;\r\nld\r\n0;last\r\nX-Sum: 1\r\nY:\r\n\r\n'
        opened = self.server.open_beneath(self.root)
        for end in range(len(body)):
            (answer,) = answers(self.ask(head + body[:end], ends=True), at_end=True)
            self.assertEqual((answer.status, answer.closes, answer.is_whole), (400, True, True), body[:end])
        self.assert_nothing_left(opened)
        self.assertEqual([answer.status for answer in answers(self.ask(head + body, ends=True))], [201])
        self.assertEqual((self.root / "f").read_bytes(), b"hello, chunked world")

    @skipUnless(shutil.which("curl"), "curl is not installed")
    def test_row_30_curl_is_told_to_go_on(self) -> None:
        """curl asks before it sends, would wait for a minute, and is told to go on at once: exactly one 100."""
        sent = write_sample(self.folder / "sent", 2 * MIB)
        for number, url in enumerate((f"http://localhost:{self.plain}", f"https://localhost:{self.tls}")):
            command = ["curl", "-q", "-sSv", "--ipv4", "--max-time", str(PATIENCE), "--expect100-timeout", "60"]
            command += ["--cacert", str(self.certificate), "-H", "Expect: 100-continue", "-T", str(sent)]
            for way in ([], ["-H", "Transfer-Encoding: chunked"]):
                target = [f"{url}/files/{number}{len(way)}", "-w", "%{http_code}"]
                done = subprocess.run([*command, *way, *target], capture_output=True, text=True, timeout=2 * PATIENCE)
                self.assertEqual((done.returncode, done.stdout), (0, "201"), done.stderr)
                self.assertEqual(done.stderr.count("< HTTP/1.1 100 Continue"), 1)
                self.assertEqual(done.stderr.count("< HTTP/1.1 "), 2)
                self.assertTrue((self.root / f"{number}{len(way)}").read_bytes() == sent.read_bytes())

    def let_files_grow(self, size: int) -> None:
        """Let the writes of the server fail behind so many bytes of a file (setrlimit(2), RLIMIT_FSIZE: EFBIG)."""
        resource.prlimit(self.server.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def check_writes_failing(
        self, size: int, uploads: Iterable[Callable[[bytes], bytes]], limits: Iterable[int]
    ) -> None:
        """Upload ``size`` bytes to a disk that takes fewer of them; at ``size`` it must not fail any more."""
        data = sample(size)
        opened = self.server.open_beneath(self.root)
        for upload in uploads:
            for limit in limits:
                self.let_files_grow(limit)
                said = self.ask(upload(data))
                (answer,) = answers(said.replace(CONTINUE, b""), at_end=True)
                self.assertEqual((said.count(b"HTTP/1.1 "), answer.is_whole), (1, True))
                if limit < size:
                    self.assertEqual((answer.status, answer.closes), (500, True), limit)
                    self.assert_nothing_left(opened)
                else:
                    self.assertEqual(answer.status, 201)
                    self.assertTrue((self.root / "f").read_bytes() == data)
                    (self.root / "f").unlink()

    @pytest.mark.slow
    def test_row_38_the_disk_fails_at_every_byte(self) -> None:
        """Whichever byte is the one that the disk doesn't take: one answer, and nothing visible or left."""

        def chunked(data: bytes) -> bytes:
            head = b"PUT /files/f HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n" + CLOSE + b"\r\n"
            return head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)

        def counted(data: bytes) -> bytes:
            return put(b"f", data, CLOSE)

        def form(data: bytes) -> bytes:
            return post(b"/files/", b"B", form_of(part(b"", "e"), part(data, "f"), boundary=b"B"), CLOSE)

        self.check_writes_failing(200, (counted, chunked), range(201))
        edges = {edge + by for edge in (WORTH_A_WRITE, BLOCK, 2 * BLOCK, 3 * BLOCK) for by in (-1, 0, 1)}
        self.check_writes_failing(3 * BLOCK + 1, (counted, chunked), [0, *sorted(edges)])
        self.let_files_grow(resource.RLIM_INFINITY)
        opened = self.server.open_beneath(self.root)
        statuses = []
        for limit in range(300):
            self.let_files_grow(limit)
            (answer,) = answers(self.ask(form(sample(200))), at_end=True)
            statuses.append(answer.status)
            if answer.status == 201:
                break
            self.assert_nothing_left(opened)
        # Not only the bytes of the file are written, but what the store notes about the batch.
        self.assertEqual(set(statuses[:-1]), {500})
        self.assertEqual((statuses[-1], visible_beneath(self.root)), (201, ["e", "f"]))
        self.assertGreaterEqual(len(statuses), 201)


class WakingTwin(Twin):
    """A transport in memory that tells when it may be looked at again: it reads again, or has something to send."""

    def __init__(self) -> None:
        super().__init__()
        self._woken: Deferred[None] = Deferred()

    def changed(self) -> Deferred[None]:
        self._woken = Deferred()
        return self._woken

    def _wake(self) -> None:
        from twisted.internet import reactor

        # Not inside the call: no transport delivers there.
        woken, self._woken = self._woken, Deferred()
        reactor.callLater(0, woken.callback, None)  # type: ignore[attr-defined]

    def resumeProducing(self) -> None:
        super().resumeProducing()
        self._wake()

    def write(self, data: bytes) -> None:
        super().write(data)
        self._wake()


class MemoryRows(TestCase):
    """Rows that are about cuts: a real site and a real store, and between them and us no network that changes any."""

    timeout = 2 * PATIENCE

    def setUp(self) -> None:
        from twisted.internet import reactor

        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name) / "root"
        self.store = LocalStore(self.root, reactor, durability="none")
        self.addCleanup(lambda: Deferred.fromCoroutine(self.store.stop()))

    async def deliver(self, talk: Talk, *deliveries: bytes) -> None:
        """Bring bytes in these pieces, each when the one before was taken, and wait for the answer: it is one 201."""
        transport = cast(WakingTwin, talk.transport)
        for data in deliveries:
            while transport.producerState != "producing":
                await transport.changed()
            talk.send(data)
        while not talk.raw:
            await transport.changed()
        self.assertEqual([(answer.status, answer.is_whole) for answer in talk.answers], [(201, True)])
        transport.clear()

    async def check_cuts(self, name: str, boundary: bytes, contents: bytes) -> None:
        """Send ``contents`` as a file, with a field behind it, whole, byte by byte and cut at every point."""
        talk = Talk(UploadResource(self.store), WakingTwin())
        form = form_of(part(contents, name), part(b"a field"), boundary=boundary)
        head = post(b"/", boundary, form, b"Accept: application/json\r\n")[: -len(form)]
        first = form.index(b"\r\n\r\n")
        cuts = [[form], [form[at : at + 1] for at in range(len(form))]]
        cuts += [[form[:at], form[at:]] for at in range(first, len(form))]
        for deliveries in cuts:
            await self.deliver(talk, head, *deliveries)
            self.assertEqual((self.root / name).read_bytes(), contents, [len(one) for one in deliveries])
            (self.root / name).unlink()

    @pytest.mark.slow
    async def test_row_32_near_boundaries_cut_at_every_point(self) -> None:
        """What only begins like a boundary is in the file, to the byte, wherever the form was cut on its way."""
        checks = []
        for number, boundary in enumerate((b"B", b"----Boundary7MA4YWxkTrZu0gW", b"x" * BOUNDARY_LENGTH)):
            near = [
                b"\r\n--" + boundary[:-1] + b"X",
                b"\r\r\n--" + boundary[:-1],
                b"\r\n-" + boundary,
                b"\n--" + boundary,
                b"\r--" + boundary,
                b"\r\n--\r\n--",
                b"\r\n--" + boundary[:-1] + b"\r\n--",
                b"--" + boundary + b"--",
                b"\r\n",
                b"\r",
            ]
            # test_uploads_form.py has each of them alone, at the begin and at the end, where no store has to keep up.
            checks.append((str(number), boundary, b"X".join(near)))
        await gatherResults([Deferred.fromCoroutine(self.check_cuts(*check)) for check in checks])
        self.assertEqual((visible_beneath(self.root), unfinished_beneath(self.root)), ([], []))


class FormRows(SiteCase):
    """Rows that are about sizes."""

    async def check_sizes(self, boundary: bytes, sizes: Iterable[int]) -> None:
        """Send a form with a file of each size, and see each of them told, and on the disk, once."""
        files = {f"{number} of {size}": sample(size) for number, size in enumerate(sizes)}
        form = form_of(*(part(data, name) for name, data in files.items()), boundary=boundary)
        content_type = f'multipart/form-data; boundary="{boundary.decode()}"'
        answer = await self.ask("POST", "/files/in/", form, Content_Type=content_type, Accept="application/json")
        self.assertEqual(answer.status, 201, boundary)
        told = [(file["name"], file["size"]) for file in json.loads(answer.body)]
        self.assertEqual(told, [(name, len(data)) for name, data in files.items()])
        self.assertEqual(visible_beneath(self.root), sorted(["in", *(f"in/{name}" for name in files)]))
        wrong = [name for name, data in files.items() if (self.root / "in" / name).read_bytes() != data]
        self.assertEqual(wrong, [], boundary)
        shutil.rmtree(self.root / "in")

    @pytest.mark.slow
    async def test_row_31_every_size_with_every_boundary(self) -> None:
        """Each file of a form begins and ends once, be it empty or as long as any buffer, give or take a byte."""
        boundaries = [sample(length).hex().encode()[:length] for length in range(1, BOUNDARY_LENGTH + 1)]
        large = {edge + by for edge in (WORTH_A_WRITE, BLOCK, HIGH) for by in (-1, 0, 1)}
        for boundary in boundaries[::23]:
            await self.check_sizes(boundary, sorted(large))
        # The other buffers are made small, so that their edges are among the sizes that all boundaries have.
        marks = {"WORTH_A_WRITE": 4 * KIB, "BLOCK": 8 * KIB, "LOW": 8 * KIB, "HIGH": 16 * KIB}
        for name, size in marks.items():
            self.patch(transfer, name, size)
        self.patch(transfer, "_spare", [])
        powers = [1 << n for n in range(18)]
        self.assertLessEqual({SLICE, *marks.values()}, set(powers))
        sizes = sorted({0, 1, *(size + by for size in powers for by in (-1, 0, 1))})
        for boundary in boundaries:
            await self.check_sizes(boundary, sizes)
        self.assertEqual([len(boundary) for boundary in boundaries], list(range(1, 71)))
