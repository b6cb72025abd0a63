"""Each system call that an upload needs fails in turn, in a real service: the first one, the second, and so on.

strace hangs on to the thread of the store while one request is served, and lets the n-th call of one kind fail. Then
it is asked what the client was told, what is on the disk, what is open, and whether the same request works without the
fault. The same is done to the store alone, without requests, in ``test_stores_local.py`` and ``test_stores_batch.py``.

What strace can't do: a call that it fails is not made at all. So a ``close`` that "fails" leaves its descriptor open,
which the kernel never does (close(2)); these are counted and allowed. And it can't shorten a write: for that the
service may write files up to some size only (setrlimit(2), RLIMIT_FSIZE), where the kernel writes what still fits.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import pytest
from twisted.trial.unittest import SynchronousTestCase

from tests.servers import PATIENCE, Server, script, serving, traced, unfinished_beneath, wait_until
from tests.test_stores_batch import batches_of
from tests.test_stores_local import tree_of

Tree = dict[str, bytes | None]

ONE_THREAD = """
from lwstwisted.__main__ import main
from lwstwisted.stores import local
local.LocalStore.__init__.__kwdefaults__["threads"] = 1
local.READER_THREADS = 1
main()
"""
"""The service with one thread that writes, and one that reads: strace counts the calls of each thread on their own."""

NEW = os.urandom(1_300_000)
"""More than the store is given at once: one write while it arrives, and one at the end, at least."""

MANY = 200
"""Faults in front of which no request is known to fail any more."""


def form_of(files: dict[str, bytes]) -> bytes:
    head = b'--B\r\nContent-Disposition: form-data; name="f"; filename="%b"\r\n\r\n%b\r\n'
    return b"".join(head % (name.encode(), data) for name, data in files.items()) + b"--B--\r\n"


@dataclass(frozen=True)
class Request:
    """One request, and what is public before it and after it.

    :ivar status: of its success.
    :ivar may_be_done: whether it may have been done though the last fsync of a folder failed: nobody can take it back.
    """

    method: str
    path: str
    status: int
    after: Tree
    body: bytes = b""
    fields: dict[str, str] = field(default_factory=dict)
    may_be_done: bool = False


BEFORE: Tree = {"kept": None, "kept/old": b"old", "kept/other": b"other"}
FORM = {"old": b"new 1", "made": NEW, "empty": b""}
REQUESTS = {
    "new": Request("PUT", "new/deep/file", 201, {**BEFORE, "new": None, "new/deep": None, "new/deep/file": NEW}, NEW),
    "replace": Request("PUT", "kept/old", 204, {**BEFORE, "kept/old": NEW}, NEW, may_be_done=True),
    "form": Request(
        "POST",
        "kept/",
        201,
        {**BEFORE, **{f"kept/{name}": data for name, data in FORM.items()}},
        form_of(FORM),
        {"Content-Type": "multipart/form-data; boundary=B"},
    ),
    "delete": Request(
        "DELETE", "kept/old", 204, {name: data for name, data in BEFORE.items() if name != "kept/old"}, may_be_done=True
    ),
}


def write_before(root: Path) -> None:
    """Make the tree what it is in front of each request."""
    for path in root.iterdir():
        if path.name != ".lwstwisted":
            shutil.rmtree(path)
    (root / "kept").mkdir()
    for name in ("old", "other"):
        (root / "kept" / name).write_bytes(name.encode())


def ask(port: int, request: Request) -> int:
    """Send a request on a connection of its own; the status that it got."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        client.request(request.method, f"/files/{request.path}", request.body, request.fields)
        answer = client.getresponse()
        answer.read()
        return answer.status
    finally:
        client.close()


def connections(port: int) -> list[str]:
    """The sockets of a server's clients that it hasn't closed yet (proc_pid_net(5))."""
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ours = [fields for fields in sockets if fields[1].endswith(f":{port:04X}")]
    return [fields[9] for fields in ours if fields[3] != "0A" and fields[9] != "0"]


class FaultCase(SynchronousTestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.root = self.folder / "root"
        self.root.mkdir()
        write_before(self.root)

    @contextmanager
    def served(self, *command: str | Path) -> Iterator[tuple[Server, int]]:
        """A service on the tree, and its port."""
        options = ("--root", self.root, "--listen", "tcp:0", "--anonymous", "--drain-time", "1")
        with serving([*command, *options], cwd=self.folder) as server:
            (port,) = server.wait_for_ports()
            # The threads of the store begin when they are wanted: first the one that reads, then the one that writes.
            self.assertEqual(ask(port, Request("GET", "", 200, {})), 200)
            tasks = f"/proc/{server.process.pid}/task"
            others = set(os.listdir(tasks))
            self.assertEqual(ask(port, Request("DELETE", "none", 204, {})), 404)
            (self.writer,) = set(os.listdir(tasks)) - others
            wait_until(lambda: not connections(port), "the connection is over")
            self.idle = server.descriptors()
            yield server, port
            self.assertEqual(server.end(), 0, server.text)

    def one_thread(self) -> contextlib.AbstractContextManager[tuple[Server, int]]:
        return self.served(sys.executable, "-c", ONE_THREAD, "serve")

    def leftovers(self) -> list[str]:
        return unfinished_beneath(self.root) + batches_of(self.root)


@pytest.mark.slow
class NthFaultTests(FaultCase):
    """The n-th call of a kind fails, for each n up to the last one; for uploads, replacements, forms and deletions."""

    def fail_each(self, call: str, errors: dict[str, int], **least: int) -> None:
        """Let each call fail with each error.

        :param errors: the status that each one gets; 0 where it must do no harm.
        :param least: how often it is made for the requests of :data:`REQUESTS`, at least.
        """
        count: dict[str, int] = {}
        with self.one_thread() as (server, port):
            for error, refusal in errors.items():
                for kind, request in REQUESTS.items():
                    for nth in range(1, MANY):
                        if not self.fail_once(server, port, request, call, error, nth, refusal):
                            break
                    self.assertLess(nth, MANY)
                    count[kind] = nth - 1
        print(f"{call}: {count}")
        for kind, number in least.items():
            self.assertGreaterEqual(count[kind], number, (call, kind))
        # What could not be removed goes with the next start.
        with self.one_thread():
            self.assertEqual(self.leftovers(), [])
            self.assertEqual(tree_of(self.root), BEFORE)

    def fail_once(
        self, server: Server, port: int, request: Request, call: str, error: str, nth: int, refusal: int
    ) -> bool:
        """Whether there was an n-th call."""
        write_before(self.root)
        left_before, told_before = self.leftovers(), self.told(server)
        inject = ("-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={nth}")
        with traced(*inject, "-p", self.writer) as lines:
            status = ask(port, request)
        injected = [line for line in lines if "(INJECTED)" in line]
        case = (request.method, request.path, call, error, nth, status, lines)

        found = tree_of(self.root)
        if status == request.status:
            self.assertEqual(found, request.after, case)
        else:
            self.assertTrue(injected, case)
            # A call that was interrupted is made again by Python, or isn't.
            self.assertEqual(status, 500 if error == "EINTR" else refusal, case)
            self.assertIn(found, [BEFORE, request.after] if call == "fsync" and request.may_be_done else [BEFORE], case)
        if call == "fsync" and injected and error != "EINTR":
            self.assert_final(lines, case)
            self.assertNotEqual(status, request.status, case)
        if self.leftovers() != left_before:
            # An operator is told of what could not be removed.
            wait_until(lambda: self.told(server) > told_before, f"the log tells what stays: {case}")
        if call == "close":
            self.idle += len(injected)
        wait_until(lambda: server.descriptors() == self.idle, f"all descriptors were closed: {case}")

        write_before(self.root)
        self.assertEqual(ask(port, request), request.status, case)
        self.assertEqual(tree_of(self.root), request.after, case)
        write_before(self.root)
        return bool(injected)

    def told(self, server: Server) -> int:
        return len(re.findall("stays until the next start|stays half done until the next start", server.text))

    def assert_final(self, lines: list[str], case: object) -> None:
        """No file is synced again whose fsync failed. A folder may be, behind what takes the changes in it back."""
        synced = [re.search(r"fsync\(\d+<([^>]*)>", line) for line in lines]
        paths = [found[1] for found in synced if found]
        self.assertEqual(len(paths), len(lines), case)
        (at,) = [at for at, line in enumerate(lines) if "(INJECTED)" in line]
        if "/partial/" in paths[at] or paths[at].endswith("/journal.new"):
            self.assertNotIn(paths[at], paths[at + 1 :], case)

    FULL = {"ENOSPC": 507, "EDQUOT": 507}

    def test_open(self) -> None:
        """There are no descriptors left, or there is no space for another name."""
        self.fail_each("openat", {"EMFILE": 503, "ENOSPC": 507}, new=6, replace=5, form=25, delete=2)

    def test_reserve(self) -> None:
        """The announced bytes can't be reserved; where that can't be done at all, the upload goes on without."""
        self.fail_each("fallocate", {**self.FULL, "EIO": 500, "EINTR": 500, "EOPNOTSUPP": 0}, new=1, replace=1)

    def test_write(self) -> None:
        """The disk is full, or broken; a signal comes."""
        self.fail_each("pwrite64", {**self.FULL, "EIO": 500, "EINTR": 500}, new=2, replace=2, form=3)

    def test_sync(self) -> None:
        """The disk lost what it had promised to keep, or finds only now that it is full. It's never asked again."""
        self.fail_each("fsync", {"EIO": 500, **self.FULL, "EINTR": 500}, new=4, replace=2, form=7, delete=1)

    def test_link(self) -> None:
        """A name can't be made."""
        self.fail_each("linkat", {"EIO": 500, "ENOSPC": 507, "EINTR": 500}, new=1, replace=2, form=7)

    def test_rename(self) -> None:
        """An old file can't be replaced, or the journal of a form not begun."""
        self.fail_each("/^renameat", {"EIO": 500, "EDQUOT": 507, "EINTR": 500}, replace=1, form=2)

    def test_unlink(self) -> None:
        """A file can't be removed; where that was only to tidy up, the upload is good all the same."""
        self.fail_each("unlinkat", {"EIO": 500, "EINTR": 500}, form=5, delete=1)

    def test_close(self) -> None:
        """What a close says matters to nobody: what had to be durable is synced by then."""
        self.fail_each("close", {"EIO": 500, "EINTR": 500}, new=5, replace=5, form=20, delete=2)

    def test_make_folder(self) -> None:
        """A folder can't be made."""
        self.fail_each("mkdirat", {**self.FULL, "EIO": 500, "EINTR": 500}, new=2, form=1)

    def test_mode(self) -> None:
        """The mode of a file can't be set."""
        self.fail_each("fchmod", {"EIO": 500, "EINTR": 500}, new=1, replace=1, form=3)

    def test_lock(self) -> None:
        """A temporary name, or a batch, can't be held."""
        self.fail_each("flock", {"EIO": 500, "ENOLCK": 500, "EINTR": 500}, replace=1, form=1)


class ShortWriteTests(FaultCase):
    """The kernel takes less than it was given."""

    def limit(self, server: Server, size: int) -> None:
        """How large a file the service may write from now on."""
        _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size, hard))

    def test_rest_fails(self) -> None:
        """Half a block was written, and the rest can't be: no success, and nothing is visible."""
        with self.served(script("lwstwisted"), "serve") as (server, port):
            for kind, request in REQUESTS.items():
                if not request.body:
                    continue
                # In the first write, in the last one, in a file of a form, and in the journal of a form.
                for size in (1, 10, 100_000, len(NEW) - 1):
                    write_before(self.root)
                    self.limit(server, size)
                    status = ask(port, request)
                    self.assertGreaterEqual(status, 400, (kind, size))
                    self.assertEqual(tree_of(self.root), BEFORE, (kind, size))
                    self.limit(server, resource.RLIM_INFINITY)
                    wait_until(lambda: server.descriptors() == self.idle, "all was closed")
                    self.assertEqual(self.leftovers(), [], (kind, size))
                    self.assertEqual(ask(port, request), request.status, (kind, size))
                    self.assertEqual(tree_of(self.root), request.after, (kind, size))

    def test_journal_is_short(self) -> None:
        """The files of a form fit, and what is noted to take them back doesn't."""
        request = Request(
            "POST", "kept/", 201, {**BEFORE, "kept/a": b"1", "kept/b": b"2"}, form_of({"a": b"1", "b": b"2"}),
            {"Content-Type": "multipart/form-data; boundary=B"},
        )  # fmt: skip
        with self.served(script("lwstwisted"), "serve") as (server, port):
            self.limit(server, 8)
            self.assertEqual(ask(port, request), 500)
            self.assertEqual((tree_of(self.root), self.leftovers()), (BEFORE, []))
            self.limit(server, resource.RLIM_INFINITY)
            self.assertEqual(ask(port, request), 201)
            self.assertEqual(tree_of(self.root), request.after)

    def test_rest_is_written(self) -> None:
        """Half a block was written, and the rest is behind it: the file is whole.

        The service is stopped in its first write, which is short, and there is room when it goes on.
        """
        for kind in ("new", "replace", "form"):
            request = REQUESTS[kind]
            write_before(self.root)
            with self.one_thread() as (server, port):
                self.limit(server, 4)
                statuses: list[int] = []
                client = Thread(target=lambda: statuses.append(ask(port, request)))  # noqa: B023
                options = ("-e", "trace=pwrite64", "-e", "inject=pwrite64:signal=SIGSTOP:when=1")
                with traced(*options, "-p", self.writer) as lines:
                    client.start()
                    stat = Path(f"/proc/{server.process.pid}/stat")
                    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] in "Tt", "it stopped")  # noqa: B023
                    self.limit(server, resource.RLIM_INFINITY)
                    server.process.send_signal(signal.SIGCONT)
                    client.join(PATIENCE)
                self.assertEqual(statuses, [request.status], lines)
                self.assertEqual(tree_of(self.root), request.after, kind)
                self.assertRegex(lines[0], r"= 4$")
                self.assertRegex("\n".join(lines), r", 4\) = \d+")


@pytest.mark.slow
class ManyFaultsTests(FaultCase):
    """Eight clients at once, all threads of the store, and a disk of which every few calls fail."""

    CLIENTS = 8
    ROUNDS = 25
    FAULTS = ("pwrite64:error=ENOSPC:when=3+7", "fsync:error=EIO:when=5+7", "linkat:error=EIO:when=4+7",
              "/^renameat:error=EDQUOT:when=2+7", "mkdirat:error=ENOSPC:when=2+3", "flock:error=ENOLCK:when=4+5",
              "fchmod:error=EIO:when=9+9")  # fmt: skip

    def test_many(self) -> None:
        """Who was told that a file is stored finds it whole; who was refused finds what was there before.

        A form of which a step fails *and* the way back is what it should be at the next start, and the log says so.
        """
        self.wrong: list[object] = []
        self.statuses: list[int] = []
        self.half_done: list[tuple[Path, Tree]] = []
        with self.served(script("lwstwisted"), "serve") as (server, port):
            clients = [
                Thread(target=self.run_client, args=(port, self.root / f"{number}")) for number in range(self.CLIENTS)
            ]
            calls = ",".join(fault.partition(":")[0] for fault in self.FAULTS)
            inject = [f"--inject={fault}" for fault in self.FAULTS]
            with traced("-f", f"--trace={calls}", *inject, "-p", str(server.process.pid)) as lines:
                for client in clients:
                    client.start()
                for client in clients:
                    client.join(2 * PATIENCE)
            self.assertEqual(self.wrong, [])
            self.assertEqual(set(self.statuses), {201, 204, 500, 507})
            self.assertGreater(sum("(INJECTED)" in line for line in lines), self.CLIENTS)
            wait_until(lambda: server.descriptors() == self.idle, "all was closed")
            wait_until(lambda: server.text.count("half done") >= len(self.half_done), "the log tells what is half done")
            self.assertEqual(ask(port, REQUESTS["form"]), 201)
        print(f"{len(self.statuses)} requests, {len(self.half_done)} forms half done until the next start")
        with self.served(script("lwstwisted"), "serve"):
            self.assertEqual(self.leftovers(), [])
            self.assertEqual([files_in(folder) for folder, _ in self.half_done], [old for _, old in self.half_done])

    def run_client(self, port: int, folder: Path) -> None:
        """Files of one folder, written over and over again by one client."""
        try:
            for number in range(self.ROUNDS):
                old, data = files_in(folder), b"%d:" % number + bytes(50_000)
                status = ask(port, Request("PUT", f"{folder.name}/{number % 5}", 0, {}, data))
                self.statuses.append(status)
                new = {**old, f"{number % 5}": data}
                found = files_in(folder)
                if found not in ([new] if status < 300 else [old, new]):
                    self.wrong.append((status, folder, sorted(old), sorted(found)))

                old = files_in(folder)
                files = {f"{number % 3}": data + b"1", f"form {number}": b"", "x": data + b"2"}
                fields = {"Content-Type": "multipart/form-data; boundary=B"}
                status = ask(port, Request("POST", f"{folder.name}/", 0, {}, form_of(files), fields))
                self.statuses.append(status)
                found = files_in(folder)
                if status < 300 and found != {**old, **files}:
                    self.wrong.append((status, folder, sorted(old), sorted(found)))
                if status >= 300 and found != old:
                    self.half_done.append((folder, old))
                    return
        except Exception as error:
            self.wrong.append(error)


def files_in(folder: Path) -> Tree:
    """The files of a folder, which may not be there."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}
