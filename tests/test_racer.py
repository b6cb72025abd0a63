"""The threat model's table "Names and disk", asked of the real service; and somebody who swaps links while it works.

Each row of the table, and what proves it here or elsewhere::

  dots, slashes, encodings    test_stores_names.TableTests.test_refused
                              test_stores_names.PropertyTests.test_names_are_safe
                              test_uploads_resource.StreamingTests.test_bad_names
  controls, lengths, own name test_stores_names.TableTests.test_every_control
                              test_stores_names.TableTests.test_whole_path_is_limited
                              test_uploads_resource.StreamingTests.test_bad_names
  composed and decomposed     test_uploads_resource.StreamingTests.test_composed_and_decomposed_are_one_name
                              test_uploads_form.StreamingFormTests.test_names
  names in forms              test_uploads_form.StreamingFormTests.test_names
                              test_uploads_form.FilenameTests.test_forms_of_names
                              test_uploads_form.FilenameTests.test_no_name_is_guessed
  links                       test_stores_local.TreeTests.test_links_are_not_followed
                              test_stores_local.TreeTests.test_folder_swapped_during_upload
                              test_stores_local.TreeTests.test_name_swapped_during_upload
                              test_stores_batch.BatchTests.test_links_are_not_followed
                              test_racer.RacerTests.test_folder_and_link
  one name, many writers      test_stores_local.UnnamedContractTests.test_last_commit_wins_whole
                              test_stores_local.UnnamedContractTests.test_reader_sees_old_or_new_whole
                              test_racer.ReplaceTests.test_readers_see_old_or_new_whole
  leftovers of a crash        test_stores_local.StartTests.test_leftovers_are_swept
                              test_stores_local.StartTests.test_second_store_spares_the_first
                              test_stores_batch.CrashTests.test_only_our_own_is_removed
                              test_stores_batch.CrashTests.test_owner_lives
  temporary files             test_stores_local.PartialTests.test_modes
                              test_stores_local.PartialTests.test_unnamed_modes
                              test_racer.ModeTests.test_unfinished_files_are_private
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import random
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import pytest
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from tests.servers import PATIENCE, Server, script, serving, unfinished_beneath, wait_until
from tests.test_stores_batch import batches_of
from tests.test_threats import is_there, proofs

PUTS = int(os.environ.get("LWSTWISTED_RACER_PUTS") or 1_200)
"""How many there are at least; 10,000 of them and 100,000 flips take some minutes."""

FLIPS = int(os.environ.get("LWSTWISTED_RACER_FLIPS") or 4_000)
"""How often the folder becomes a link at least, and a folder again."""

RACER = """
import ctypes, os, random, sys

libc = ctypes.CDLL(None, use_errno=True)
root, attic, outside, least = sys.argv[1], sys.argv[2], sys.argv[3].encode(), int(sys.argv[4])
CWD, EXCHANGE = -100, 2

def exchange(a, b):
    if libc.renameat2(CWD, os.fsencode(a), CWD, os.fsencode(b), EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

folder, link = os.path.join(root, "folder"), os.path.join(attic, "link")
leaf, new = os.path.join(root, "leaf", "secret"), os.path.join(attic, "new")

def swap_leaf():
    os.symlink(os.path.join(outside, b"secret"), new)
    os.rename(new, leaf)
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    os.rename(new, leaf)

try:
    exchange(folder, link)
    exchange(folder, link)
except (OSError, AttributeError) as error:
    print("cannot", error, flush=True)
    sys.exit()
print("begun", flush=True)
os.set_blocking(0, False)
flips = 0
is_asked_to_end = False
while flips < least or not is_asked_to_end:
    exchange(folder, link)  # a link
    swap_leaf()
    exchange(folder, link)  # a folder, for about as long as it takes to find one and to use it
    for _ in range(random.randrange(20)):
        swap_leaf()
    flips += 1
    if flips % 100 == 0 and not is_asked_to_end:
        try:
            is_asked_to_end = os.read(0, 1) == b""
        except BlockingIOError:
            pass
print("flips", flips, flush=True)
"""
"""Turns ``folder`` into a link and back, each in one step; and the file ``leaf/secret``, by renaming over it."""

SECRET = b"from outside"
FORM_TYPE = "multipart/form-data; boundary=B"


def form_of(files: dict[str, bytes]) -> bytes:
    head = b'--B\r\nContent-Disposition: form-data; name="f"; filename="%b"\r\n\r\n%b\r\n'
    return b"".join(head % (name.encode(), data) for name, data in files.items()) + b"--B--\r\n"


def look_of(folder: Path) -> dict[str, object]:
    """All that could be seen to change beneath a folder, the times of reading aside."""
    found: dict[str, object] = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.lstat()
        data = path.read_bytes() if path.is_file() else b""
        times = status.st_mtime_ns, status.st_ctime_ns
        found[str(path)] = (status.st_ino, status.st_mode, status.st_nlink, times, data)
    return found


class ServiceCase(SynchronousTestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.root = self.folder / "root"
        self.root.mkdir()

    def serve(self) -> tuple[Server, int]:
        log = self.folder / "access.log"
        command = [script("lwstwisted"), "serve", "--anonymous", "--root", self.root]
        command += ["--listen", "tcp:0", "-d", "none", "-a", log]
        server = self.enterContext(serving(command, cwd=self.folder))
        (port,) = server.wait_for_ports()
        return server, port


class Client:
    """Requests on one connection, which is made anew when the server has closed it."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

    def ask(
        self, method: str, path: str, body: bytes = b"", **fields: str
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        headers = {name.replace("_", "-"): value for name, value in fields.items()}
        try:
            self._connection.request(method, f"/files/{path}", body, headers)
            answer = self._connection.getresponse()
        except (http.client.RemoteDisconnected, ConnectionError):
            self._connection.close()
            self._connection.request(method, f"/files/{path}", body, headers)
            answer = self._connection.getresponse()
        return answer.status, answer.read(), answer.headers

    def close(self) -> None:
        self._connection.close()


class Visitor(Thread):
    """A client in a thread.

    :ivar error: what went wrong.
    """

    def __init__(self, port: int) -> None:
        super().__init__()
        self.client = Client(port)
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.visit()
        except BaseException as error:
            self.error = error
        finally:
            self.client.close()

    def visit(self) -> None:
        raise NotImplementedError


class Swapped(Visitor):
    """Uploads, reads and deletes where somebody swaps links.

    :ivar stored: files that were acknowledged, and not deleted since.
    :ivar refused: names that weren't.
    :ivar read: bodies that came for names that are there on both sides.
    """

    def __init__(self, port: int, number: int, puts: int, seed: int) -> None:
        super().__init__(port)
        self._number, self._puts = number, puts
        self._random = random.Random(seed + number)
        self.stored: dict[str, bytes] = {}
        self.refused: set[str] = set()
        self.read: list[bytes] = []
        self.statuses: Counter[tuple[str, int]] = Counter()

    def ask(self, method: str, path: str, body: bytes = b"", **fields: str) -> tuple[int, bytes]:
        status, said, _ = self.client.ask(method, path, body, **fields)
        self.statuses[method, status] += 1
        return status, said

    def visit(self) -> None:
        for number in range(self._puts):
            name = f"{self._number}-{number}"
            self._upload(name, b"mine " + name.encode())
            choice = self._random.randrange(6)
            if choice == 0:
                self._form(name)
            elif choice == 1:
                self._remove(self._random.choice(["secret", name]))
            elif choice == 2:
                self.ask("PUT", "leaf/secret", b"public")
            elif choice == 3:
                self.read.append(self.ask("GET", "folder/")[1])
            else:
                for path in ("folder/secret", *["leaf/secret"] * 4):
                    self.read.append(self.ask("GET", path)[1])

    def _upload(self, name: str, data: bytes) -> None:
        status, _ = self.ask("PUT", f"folder/{name}", data)
        if status < 300:
            self.stored[name] = data
        else:
            self.refused.add(name)

    def _form(self, name: str) -> None:
        files = {f"{name}-a": b"mine", f"{name}-b": b"mine too"}
        # A name that is there on both sides as well, to be replaced.
        status, _ = self.ask("POST", "folder/", form_of({**files, "both": b"public"}), Content_Type=FORM_TYPE)
        if status < 300:
            self.stored.update(files)
        else:
            self.refused.update(files)

    def _remove(self, name: str) -> None:
        status, _ = self.ask("DELETE", f"folder/{name}")
        if status < 300:
            self.stored.pop(name, None)


@pytest.mark.slow
class RacerTests(ServiceCase):
    """Another process turns a folder into a link to the outside and back, thousands of times a second."""

    CLIENTS = 4

    def test_folder_and_link(self) -> None:
        """Nothing is written, removed or read outside; and what was acknowledged is in the folder."""
        outside, attic = self.folder / "outside", self.folder / "attic"
        for place in (outside, attic, self.root / "folder", self.root / "leaf"):
            place.mkdir()
        for name in ("secret", "both"):
            (outside / name).write_bytes(SECRET)
            (self.root / "folder" / name).write_bytes(b"public")
        (self.root / "leaf" / "secret").write_bytes(b"public")
        (attic / "link").symlink_to(outside)
        before = look_of(outside)
        seed = int(os.environ.get("LWSTWISTED_SEED") or random.SystemRandom().randrange(1 << 32))
        server, port = self.serve()
        visitors = [Swapped(port, number, -(-PUTS // self.CLIENTS), seed) for number in range(self.CLIENTS)]
        with self.racing(attic, outside) as flips:
            for visitor in visitors:
                visitor.start()
            for visitor in visitors:
                visitor.join(20 * PATIENCE)
        for visitor in visitors:
            if visitor.error is not None:
                raise visitor.error
        statuses: Counter[tuple[str, int]] = sum((visitor.statuses for visitor in visitors), Counter())
        print(f"seed {seed}: {flips[0]} flips; {dict(sorted(statuses.items()))}")

        self.assertEqual(look_of(outside), before)
        answers = {method: {status for of, status in statuses if of == method} for method, _ in statuses}
        self.assertLessEqual(answers["PUT"], {201, 204, 403})
        self.assertLessEqual(answers["POST"], {201, 403})
        self.assertLessEqual(answers["GET"], {200, 403, 404})
        self.assertLessEqual(answers["DELETE"], {204, 403, 404})
        # The race was one: they met the folder as well as the link.
        self.assertGreater(statuses["PUT", 201], PUTS // 100)
        self.assertGreater(statuses["PUT", 403], PUTS // 100)
        for visitor in visitors:
            self.assertEqual([body for body in visitor.read if SECRET in body], [])
            found = {name: self.contents(name) for name in visitor.stored}
            self.assertEqual(found, visitor.stored)
            self.assertEqual([name for name in visitor.refused if self.contents(name) is not None], [])
        self.assertEqual(unfinished_beneath(self.root) + batches_of(self.root), [])
        self.assertEqual(server.end(), 0)
        self.assertNotIn("Traceback", server.text)

    def contents(self, name: str) -> bytes | None:
        path = self.root / "folder" / name
        return path.read_bytes() if path.exists() else None

    @contextmanager
    def racing(self, attic: Path, outside: Path) -> Iterator[list[int]]:
        """Flip until the end of the block, and so often at least; gives the number of flips, which is there then."""
        flips: list[int] = []
        racer = subprocess.Popen(
            [sys.executable, "-c", RACER, self.root, attic, outside, str(FLIPS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert racer.stdin is not None and racer.stdout is not None
        try:
            said = racer.stdout.readline().split(maxsplit=1)
            if said[0] == "cannot":
                raise SkipTest(f"a folder and a link can't be exchanged here: {said[1]}")
            yield flips
            racer.stdin.close()
            flips.append(int(racer.stdout.readline().split()[1]))
        finally:
            racer.kill()
            racer.wait()
            with contextlib.suppress(OSError):
                racer.stdin.close()
            racer.stdout.close()


class Versions:
    """What may be in a file: numbered contents of different lengths, each of which is known as a whole."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._next = 0

    def new(self) -> bytes:
        with self._lock:
            self._next += 1
            number = self._next
        return self.of(number)

    def of(self, number: int) -> bytes:
        line = b"%08d" % number + hashlib.sha256(b"%d" % number).digest()
        return line * (1 + 997 * (number % 7))

    def is_whole(self, data: bytes) -> bool:
        return bool(data) and data == self.of(int(data[:8]))


class Writer(Visitor):
    def __init__(self, port: int, versions: Versions, rounds: int) -> None:
        super().__init__(port)
        self._versions, self._rounds = versions, rounds
        self.etags: dict[str, bytes] = {}
        self.statuses: Counter[int] = Counter()

    def visit(self) -> None:
        for _ in range(self._rounds):
            data = self._versions.new()
            status, _, fields = self.client.ask("PUT", "shared", data)
            self.statuses[status] += 1
            self.etags[str(fields["ETag"])] = data


class Watcher(Visitor):
    def __init__(self, port: int, versions: Versions, is_over: Any) -> None:
        super().__init__(port)
        self._versions, self._is_over = versions, is_over
        self.torn: list[bytes] = []
        self.found: dict[str, bytes] = {}
        self.statuses: Counter[int] = Counter()

    def visit(self) -> None:
        while not self._is_over():
            status, data, fields = self.client.ask("GET", "shared")
            self.statuses[status] += 1
            if not self._versions.is_whole(data):
                self.torn.append(data[:100])
            self.found[str(fields["ETag"])] = data


class ReplaceTests(ServiceCase):
    """Several clients replace one file, and others read it."""

    ROUNDS = 150

    def test_readers_see_old_or_new_whole(self) -> None:
        """Each reader gets one version from its first byte to its last, and the entity-tag of that one."""
        versions = Versions()
        (self.root / "shared").write_bytes(versions.new())
        server, port = self.serve()
        writers = [Writer(port, versions, self.ROUNDS) for _ in range(3)]
        readers = [Watcher(port, versions, lambda: not any(w.is_alive() for w in writers)) for _ in range(2)]
        for visitor in [*writers, *readers]:
            visitor.start()
        for visitor in [*writers, *readers]:
            visitor.join(4 * PATIENCE)
            if visitor.error is not None:
                raise visitor.error
        written = {etag: data for writer in writers for etag, data in writer.etags.items()}
        for writer in writers:
            self.assertEqual(set(writer.statuses), {204})
        for reader in readers:
            self.assertEqual(set(reader.statuses), {200})
            self.assertEqual(reader.torn, [])
            self.assertGreater(len(reader.found), 1)
            for etag, data in reader.found.items():
                self.assertTrue(written.get(etag, data) == data, etag)
        self.assertIn((self.root / "shared").read_bytes(), [list(writer.etags.values())[-1] for writer in writers])
        self.assertEqual(server.end(), 0)


class ModeTests(ServiceCase):
    """What isn't finished is nobody else's business."""

    def test_unfinished_files_are_private(self) -> None:
        """Neither the file of an upload under way nor its folder can be opened by another user, whatever the umask."""
        self.addCleanup(os.umask, os.umask(0))
        server, port = self.serve()
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self.addCleanup(client.close)
        client.putrequest("PUT", "/files/file")
        client.putheader("Content-Length", str(2 << 20))
        client.endheaders(bytes((2 << 20) - 1))
        wait_until(lambda: self.unfinished(server), "the file is open")
        for status in self.unfinished(server):
            self.assertEqual(stat.S_IMODE(status.st_mode), 0o600)
        for folder in (self.root / ".lwstwisted").rglob("*"):
            if folder.is_dir():
                self.assertEqual(stat.S_IMODE(folder.stat().st_mode), 0o700)
            else:
                self.assertEqual(stat.S_IMODE(folder.stat().st_mode) & 0o077, 0, folder)
        client.send(b"x")
        self.assertEqual(client.getresponse().status, 201)
        self.assertEqual(stat.S_IMODE((self.root / "file").stat().st_mode), 0o644)
        self.assertEqual(server.end(), 0)

    def unfinished(self, server: Server) -> list[os.stat_result]:
        """The regular files without a public name that a server has open beneath the store's own folder."""
        found = []
        for name in os.listdir(f"/proc/{server.process.pid}/fd"):
            path = f"/proc/{server.process.pid}/fd/{name}"
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(path).startswith(str(self.root / ".lwstwisted" / "partial") + "/"):
                    found.append(os.stat(path))
        return found


class TableTests(SynchronousTestCase):
    """The table at the begin of this module."""

    def test_proofs_exist(self) -> None:
        """Each test that it names is there."""
        found = proofs(__doc__ or "")
        self.assertEqual(len(found), 8)
        self.assertEqual([test for tests in found.values() for test in tests if not is_there(test)], [])
