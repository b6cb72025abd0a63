"""A disk that is full, has no inodes left, or is slow: a real one each, under a real service.

Full ones are small file systems that are mounted for a test: ext4 on a loop device, and tmpfs. The slow one is the disk
that is there, of which strace delays every write.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import BinaryIO
from unittest import skipUnless

import pytest
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from lwstwisted.loop.tls import READ_BUDGET
from lwstwisted.uploads.transfer import BLOCK, HIGH, SPARE_BLOCKS, WORTH_A_WRITE
from lwstwisted.web.channel import READ_AHEAD
from tests.servers import PATIENCE, Server, script, serving, unfinished_beneath, visible_beneath, wait_until
from tests.test_slow_clients import Probe, status_of
from tests.test_stores_batch import batches_of

KIB, MIB = 1024, 1024 * 1024
DISK = 64 * MIB
SIZE = 8 * MIB
UPLOADS = 20
HELD = 5
"""Uploads that have nearly all of their bytes on the disk when the others come."""

SLACK = 1 * MIB
"""What a file system may need for its own account of files and free blocks."""


STEP = 64 * KIB
"""What a client sends at once."""


def contents(name: str, size: int) -> bytes:
    """Bytes that no other name has."""
    return hashlib.shake_128(name.encode()).digest(64 * KIB) * (size // (64 * KIB))


class Upload(Thread):
    """One PUT, whose client listens while it sends.

    :param announced: with a Content-Length and ``Expect: 100-continue``; else chunked, without asking.
    :param held: set when the last bytes may be sent.
    :ivar status: of the final answer; 0 for none.
    :ivar was_asked: whether there was a ``100 Continue``.
    :ivar sent: bytes of the body.
    """

    def __init__(self, port: int, name: str, size: int = SIZE, announced: bool = False, held: Event | None = None):
        super().__init__()
        self.name = name
        self.size = size
        self.status = 0
        self.was_asked = False
        self.sent = 0
        self.error: Exception | None = None
        self._port = port
        self._announced = announced
        self._held = held

    def run(self) -> None:
        try:
            client = socket.create_connection(("127.0.0.1", self._port), 4 * PATIENCE)
            with client, client.makefile("rb") as reader:
                self._upload(client, reader)
        except Exception as error:
            self.error = error

    def _upload(self, client: socket.socket, reader: BinaryIO) -> None:
        announced = f"Content-Length: {self.size}\r\nExpect: 100-continue"
        how = announced if self._announced else "Transfer-Encoding: chunked"
        client.sendall(f"PUT /files/{self.name} HTTP/1.1\r\nHost: a\r\n{how}\r\n\r\n".encode())
        if self._announced:
            self.status = self._status(reader)
            if self.status != 100:
                return
            self.was_asked, self.status = True, 0
        data = contents(self.name, self.size)
        for at in range(0, self.size, STEP):
            if self._held is not None and at + STEP >= self.size:
                self._held.wait(2 * PATIENCE)
            piece = data[at : at + STEP]
            if not self._send(client, piece if self._announced else b"%x\r\n%b\r\n" % (len(piece), piece)):
                break
            self.sent += len(piece)
        else:
            if not self._announced:
                client.sendall(b"0\r\n\r\n")
        self.status = self._status(reader)

    def _send(self, client: socket.socket, data: bytes) -> bool:
        """Send all, unless there is an answer first."""
        view = memoryview(data)
        while view:
            readable, writable, _ = select.select([client], [client], [], 4 * PATIENCE)
            if readable:
                return False
            if not writable:
                raise TimeoutError("nobody reads")
            view = view[client.send(view, socket.MSG_DONTWAIT) :]
        return True

    def _status(self, reader: BinaryIO) -> int:
        line = reader.readline()
        while reader.readline() not in (b"\r\n", b""):
            pass
        return int(line.split()[1])


def run(uploads: list[Upload]) -> list[int]:
    """Let uploads begin together, and wait for all of them."""
    for upload in uploads:
        upload.start()
    return end(uploads)


def end(uploads: list[Upload]) -> list[int]:
    for upload in uploads:
        upload.join(4 * PATIENCE)
        if upload.error is not None:
            raise upload.error
    return [upload.status for upload in uploads]


class DiskCase(SynchronousTestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.disk = self.folder / "disk"
        self.disk.mkdir()
        self.root = self.disk / "root"

    def mount(self, *command: str | Path) -> None:
        """Mount something at ``self.disk`` until the end of the test, or skip it."""
        if shutil.which("mount") is None:
            raise SkipTest("needs mount")
        done = subprocess.run(["mount", *command, self.disk], capture_output=True, text=True)
        if done.returncode:
            raise SkipTest(f"needs root to mount a small file system: {done.stderr.strip()}")
        self.addCleanup(subprocess.run, ["umount", "--lazy", self.disk], check=True)

    def mount_ext4(self) -> None:
        if shutil.which("mkfs.ext4") is None:
            raise SkipTest("needs mkfs.ext4 (e2fsprogs)")
        image = self.folder / "image"
        with open(image, "wb") as file:
            file.truncate(DISK)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True, capture_output=True)
        self.mount("-o", "loop", image)

    def mount_tmpfs(self, options: str) -> None:
        self.mount("-t", "tmpfs", "-o", options, "lwstwisted")

    def serve(self) -> tuple[Server, int]:
        command = [script("lwstwisted"), "serve", "--anonymous", "--root", self.root, "--listen", "tcp:0"]
        server = self.enterContext(serving(command, cwd=self.folder))
        (port,) = server.wait_for_ports()
        self.assertEqual(status_of(port), 200)
        return server, port

    def free(self) -> int:
        """Bytes."""
        found = os.statvfs(self.disk)
        return found.f_bavail * found.f_frsize

    def ask(self, port: int, method: str, name: str, body: bytes = b"", **fields: str) -> tuple[int, bytes]:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        with contextlib.closing(client):
            client.request(method, f"/files/{name}", body, {key.replace("_", "-"): fields[key] for key in fields})
            answer = client.getresponse()
            return answer.status, answer.read()

    def assert_stored(self, uploads: list[Upload]) -> None:
        """Exactly the uploads are there that were told so, and they are whole."""
        self.assertEqual(visible_beneath(self.root), sorted(upload.name for upload in uploads if upload.status == 201))
        for upload in uploads:
            if upload.status == 201:
                found = (self.root / upload.name).read_bytes()
                self.assertTrue(found == contents(upload.name, upload.size), upload.name)

    def assert_tidy(self, server: Server) -> None:
        wait_until(lambda: unfinished_beneath(self.root) + batches_of(self.root) == [], "nothing unfinished is left")
        wait_until(lambda: not [p for p in server.open_beneath(self.root) if "(deleted)" in p], "all files are closed")


@pytest.mark.slow
class FullDiskTests(DiskCase):
    """About 60 MB, and 20 uploads of 8 MB at the same time."""

    def test_ext4(self) -> None:
        """On a disk."""
        self.mount_ext4()
        self.fill(self.serve)

    def test_tmpfs(self) -> None:
        """In memory."""
        self.mount_tmpfs(f"size={DISK - 4 * MIB}")
        self.fill(self.serve)

    def fill(self, serve: Callable[[], tuple[Server, int]]) -> None:
        server, port = serve()
        capacity = self.free()

        # Five have nearly all of their bytes on the disk, and don't end yet; fifteen more don't fit beside them.
        may_end = Event()
        self.addCleanup(may_end.set)
        held = [Upload(port, f"held-{n}", held=may_end) for n in range(HELD)]
        for upload in held:
            upload.start()
        wait_until(lambda: capacity - self.free() >= HELD * (SIZE - WORTH_A_WRITE - 2 * STEP), "they have written")
        others = [Upload(port, f"other-{n}") for n in range(UPLOADS - HELD)]
        statuses = run(others)
        stored = statuses.count(201)
        self.assertEqual(set(statuses) - {201}, {507})
        self.assertLessEqual(stored, (capacity - HELD * SIZE) // SIZE)
        self.assertEqual(status_of(port), 200)
        self.assert_stored(others)
        may_end.set()
        self.assertEqual(end(held), [201] * HELD)
        uploads = held + others
        self.assert_stored(uploads)

        # The space of who was refused is there again, to the last byte that another file can use.
        self.assert_tidy(server)
        wait_until(lambda: self.free() >= capacity - (HELD + stored) * SIZE - SLACK, "the space was given back")
        stored += HELD + self.fill_up(port, uploads)
        self.assertGreaterEqual(stored, (capacity - SLACK) // SIZE)
        print(f"{capacity / MIB:.1f} MiB: {statuses.count(201)} of {len(others)} beside {HELD}; {stored} in the end")

        # Now nobody fits any more, and everybody is told so before sending a byte.
        late = [Upload(port, f"late-{n}", announced=True) for n in range(UPLOADS)]
        self.assertEqual(run(late), [507] * UPLOADS)
        self.assertEqual([(upload.was_asked, upload.sent) for upload in late], [(False, 0)] * UPLOADS)
        chunked = [Upload(port, f"late-{n}") for n in range(UPLOADS)]
        self.assertEqual(run(chunked), [507] * UPLOADS)
        form = b'--B\r\nContent-Disposition: form-data; name="f"; filename="in-a-form"\r\n\r\n%b\r\n--B--\r\n'
        boundary = "multipart/form-data; boundary=B"
        self.assertEqual(self.ask(port, "POST", "", form % bytes(SIZE), Content_Type=boundary)[0], 507)
        # An old file stays what it was when the new one doesn't fit.
        self.assertEqual(self.ask(port, "PUT", "held-0", bytes(SIZE))[0], 507)
        self.assert_stored(uploads)
        self.assert_tidy(server)

        # The server goes on, also when it is started on the full disk.
        self.assertEqual(self.ask(port, "GET", "held-0")[1], contents("held-0", SIZE))
        server.end()
        server, port = serve()
        self.assertEqual(self.ask(port, "GET", "held-1")[1], contents("held-1", SIZE))
        self.assertEqual(self.ask(port, "DELETE", "held-0")[0], 204)
        wait_until(lambda: self.free() >= SIZE, "the space of the deleted file came back")
        (again,) = [Upload(port, "again", announced=True)]
        self.assertEqual((run([again]), again.was_asked), ([201], True))
        self.assert_stored([*uploads[1:], again])
        self.assertEqual(server.end(), 0)

    def fill_up(self, port: int, uploads: list[Upload]) -> int:
        """Upload one file after the other until one is refused. How many were stored."""
        count = 0
        while True:
            upload = Upload(port, f"more-{count}", announced=True)
            uploads.append(upload)
            (status,) = run([upload])
            if status != 201:
                self.assertEqual((status, upload.was_asked, upload.sent), (507, False, 0))
                self.assertLess(self.free(), SIZE)
                return count
            count += 1

    def test_no_inodes_left(self) -> None:
        """There is space, and no room for another name: 507, and what is there stays and can be deleted."""
        self.mount_tmpfs("size=64m,nr_inodes=60")
        server, port = self.serve()
        names = []
        for number in range(100):
            status, _ = self.ask(port, "PUT", f"folder-{number}/{number}", b"x")
            if status != 201:
                break
            names += [f"folder-{number}", f"folder-{number}/{number}"]
        self.assertEqual(status, 507)
        self.assertGreater(number, 10)
        self.assertEqual(visible_beneath(self.root), sorted(names))
        form = b'--B\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\nx\r\n--B--\r\n'
        boundary = "multipart/form-data; boundary=B"
        self.assertEqual(self.ask(port, "POST", "folder-0/", form, Content_Type=boundary)[0], 507)
        self.assertEqual(visible_beneath(self.root), sorted(names))
        self.assert_tidy(server)
        server.end()
        server, port = self.serve()
        for count in range(3):
            self.assertEqual(self.ask(port, "DELETE", f"folder-{count}/{count}")[0], 204)
        self.assertEqual(self.ask(port, "PUT", "folder-0/again", b"x")[0], 201)
        self.assert_tidy(server)
        self.assertEqual(server.end(), 0)


TELLING = """
import atexit, dataclasses, json

def tell():
    from twisted.internet import reactor
    print("statistics", json.dumps(dataclasses.asdict(reactor.statistics())), flush=True)

atexit.register(tell)
from lwstwisted.__main__ import main
main()
"""
"""The service, which says at its end how its loop went."""


@skipUnless(shutil.which("strace"), "needs strace")
class SlowDiskTests(DiskCase):
    """Each write takes a fifth of a second, and a hundred clients upload at once."""

    CLIENTS = 100
    SIZE = 4 * MIB
    DELAY = 0.2

    CONNECTION = 64 * KIB
    """Bytes that a connection takes beside those of its upload: objects of Python, for the most part."""
    ALLOCATOR = 16 * MIB
    """What malloc(3) and Python keep for themselves."""

    @pytest.mark.slow
    def test_memory_and_other_clients(self) -> None:
        """Who uploads waits, in no more memory than can be written down; who wants a page gets it meanwhile."""
        log = self.folder / "strace"
        trace = ["strace", "-D", "-q", "-f", "--seccomp-bpf", "-o", log, "-e", "trace=pwrite64"]
        trace += ["-e", f"inject=pwrite64:delay_enter={int(self.DELAY * 1e6)}"]
        service = [sys.executable, "-c", TELLING, "serve", "--anonymous", "--root", self.root]
        service += ["--listen", "tcp:0", "-d", "none"]
        server = self.enterContext(serving([*trace, *service], cwd=self.folder))
        try:
            (port,) = server.wait_for_ports()
        except AssertionError:
            raise SkipTest(f"strace cannot run a server here: {server.text}") from None
        self.assertEqual(self.ask(port, "PUT", "first", bytes(MIB))[0], 201)
        self.assertEqual(status_of(port), 200)
        before = server.peak_memory()

        begin = time.monotonic()
        uploads = [Upload(port, f"{n}", self.SIZE) for n in range(self.CLIENTS)]
        listing, document = Probe(port), Reader(port, "/openapi.json")
        listing.start()
        document.start()
        try:
            statuses = run(uploads)
        finally:
            document.stop()
            listing.stop()
        took = time.monotonic() - begin
        self.assertEqual(statuses, [201] * self.CLIENTS)
        for upload in uploads:
            self.assertTrue((self.root / upload.name).read_bytes() == contents(upload.name, self.SIZE), upload.name)

        # One upload: what waits for the store, up to HIGH and one delivery above it; the block that the store has; and
        # what its connection holds ahead.
        one = HIGH + READ_BUDGET + BLOCK + READ_AHEAD + self.CONNECTION
        most = self.CLIENTS * one + SPARE_BLOCKS * BLOCK + self.ALLOCATOR
        grown = server.peak_memory() - before
        self.assertLessEqual(grown, most)
        self.assertLess(most, self.CLIENTS * self.SIZE)  # else it would say nothing

        for probe in (listing, document):
            self.assertGreater(len(probe.said), 1)
            self.assertEqual(set(probe.said), {200})
        self.assertEqual(server.end(), 0)
        (told,) = server.wait_for("statistics (.*)")
        found = json.loads(told)
        writes = log.read_text().count("pwrite64(")
        print(
            f"{took:.1f} s, {writes} writes; memory grew by {grown / MIB:.0f} of {most / MIB:.0f} MiB; longest turn "
            f"{1000 * found['longest_turn']:.1f} ms of {found['turns']}; pages meanwhile: {len(listing.said)} that "
            f"wait for the store, {len(document.said)} that don't"
        )
        self.assertGreaterEqual(writes, self.CLIENTS * self.SIZE // BLOCK)
        # A single write in the loop's thread would take that long, and there are hundreds.
        self.assertLess(found["longest_turn"], 10)


class Reader(Thread):
    """Somebody who wants a page ten times a second that no store is asked for.

    :ivar said: a status for each time, or what went wrong.
    """

    def __init__(self, port: int, path: str) -> None:
        super().__init__()
        self._port, self._path = port, path
        self._is_over = Event()
        self.said: list[object] = []

    def run(self) -> None:
        while not self._is_over.wait(0.1):
            client = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
            try:
                client.request("GET", self._path)
                answer = client.getresponse()
                answer.read()
                self.said.append(answer.status)
            except (OSError, http.client.HTTPException) as error:
                self.said.append(error)
            finally:
                client.close()

    def stop(self) -> None:
        """End it, after the answer that it waits for."""
        self._is_over.set()
        self.join(2 * PATIENCE)
