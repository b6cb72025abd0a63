"""Rows of the table of cases as curl shows them: uploads through the real site, on every loop, over TLS 1.2 and 1.3.

curl decides on the records; the transport's budget is so small that each of its records leaves plaintext behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import skipUnless

import pytest
from twisted.internet.asyncioreactor import AsyncioSelectorReactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource

from lwstwisted.stores.local import LocalStore
from lwstwisted.uploads.resource import UploadResource
from lwstwisted.web.limits import DEFAULT_LIMITS
from lwstwisted.web.site import StreamingSite
from tests.gate import Gate, Upload
from tests.tls_peer import (
    CORPUS,
    REAL_WORLDS,
    VERSIONS,
    DrivenLoop,
    Loop,
    N,
    World,
    certificate_file,
    discard,
    pattern,
    pending_list,
)

KIB, MIB = 1024, 1024 * 1024

LARGE = 32 * MIB
"""Bytes of the upload that fifty others run beside."""


def sha(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


class CurlRows:
    """The rows that an upload by curl can show, for one loop and one version."""

    world: World
    version: ssl.TLSVersion

    def setUp(self: Any) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.root = self.folder / "root"
        certificate = contextlib.ExitStack()
        self.addCleanup(certificate.close)
        self.certificate = certificate.enter_context(certificate_file())
        self.processes: list[subprocess.Popen[bytes]] = []

    @contextlib.contextmanager
    def serving(self: Any, clock: Any = None, budget: int = N) -> Iterator[Gate]:
        """A site with a store at ``/files`` and a gate at ``/gate``.

        :param clock: for its deadlines; the reactor by default.
        """
        reactor = self.reactor = self.world.make_reactor()
        self.loop = DrivenLoop(reactor) if isinstance(reactor, AsyncioSelectorReactor) else Loop(reactor)
        store = LocalStore(str(self.root), reactor, durability="none")
        gate, root = Gate(), Resource()
        root.putChild(b"files", UploadResource(store, 1 << 40))
        root.putChild(b"gate", gate)
        site = StreamingSite(root, clock or reactor)
        self.port = self.world.listen(reactor, site, budget).getHost().port
        try:
            yield gate
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
            stopped: list[object] = []
            for stop in (site.stop, store.stop):
                stopped.clear()
                Deferred.fromCoroutine(stop()).addBoth(stopped.append)
                self.loop.until(lambda: stopped)
            self.loop.turn()
            self.loop.turn()
            discard(reactor)

    def curl(self: Any, *words: str | Path) -> subprocess.Popen[bytes]:
        """Start curl; what it prints is in :meth:`said`."""
        version = self.version.name[-3:].replace("_", ".")
        options = [f"--tlsv{version}", "--tls-max", version, "--cacert", self.certificate]
        command = ["curl", "-q", "--silent", "--show-error", "--max-time", "60", *options, *words]
        number = len(self.processes)
        # Apart, because --parallel shows its progress on standard error.
        with open(self.folder / f"said {number}", "wb") as said, open(self.folder / f"error {number}", "wb") as error:
            process = subprocess.Popen(
                [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=said, stderr=error, cwd=self.folder
            )
        self.processes.append(process)
        return process

    def said(self: Any, process: subprocess.Popen[bytes]) -> str:
        """What it has printed, after its end."""
        self.loop.until(lambda: process.poll() is not None, longest=0.01)
        number = self.processes.index(process)
        self.assertEqual(process.returncode, 0, (self.folder / f"error {number}").read_text())
        return str((self.folder / f"said {number}").read_text())

    def url(self: Any, path: str) -> str:
        return f"https://localhost:{self.port}/{path}"

    def file(self: Any, size: int, name: str = "file") -> tuple[Path, bytes]:
        data = os.urandom(size)
        path = self.folder / name
        path.write_bytes(data)
        return path, data

    def upload(self: Any, gate: Gate, size: int, **events: Any) -> tuple[Upload, bytes, subprocess.Popen[bytes]]:
        """Have curl begin an upload to the gate. Returns when some of it has come."""
        path, data = self.file(size)
        process = self.curl("-T", path, "-w", "%{http_code}", "-H", "Expect:", self.url("gate"))
        self.loop.until(lambda: gate.uploads and gate.uploads[0].data, longest=0.01)
        return gate.uploads[0], data, process

    def test_row_02_every_size_to_the_disk(self: Any) -> None:
        """Files of all the sizes that hang without the list are on the disk, whole, when curl has its answers."""
        with self.serving():
            sent = [self.file(sum(sizes), f"{number}") for number, sizes in enumerate(CORPUS.values())]
            names = ",".join(path.name for path, _ in sent)
            answers = self.said(self.curl("-T", "{" + names + "}", "-w", "%{http_code} ", self.url("files/")))
            self.assertEqual(answers.split(), len(sent) * ["201"])
            for path, data in sent:
                self.assertEqual(sha((self.root / path.name).read_bytes()), sha(data))
            self.assertGreater(pending_list(self.reactor).statistics().synthesised_reads, len(sent))

    def test_row_03_a_pause_costs_nothing(self: Any) -> None:
        """While the store hangs, curl's upload costs the loop no turns, and then it completes."""
        with self.serving() as gate:
            gate.on_data = Upload.pause
            upload, data, process = self.upload(gate, 100_000)
            size = len(upload.data)
            self.loop.idle_turns()  # in which the last timer of the beginning is over
            reads = pending_list(self.reactor).statistics().synthesised_reads
            self.assertLessEqual(self.loop.idle_turns(), 10)
            self.assertEqual(pending_list(self.reactor).statistics().synthesised_reads, reads)
            self.assertEqual(len(upload.data), size)
            gate.on_data = lambda upload: None
            upload.resume()
            self.assertEqual(self.said(process), "200")
            self.assertEqual(sha(upload.data), sha(data))

    def test_row_07_in_slices(self: Any) -> None:
        """1 MiB from curl arrives in slices of 4 KiB to the last byte."""
        with self.serving() as gate:
            upload, data, process = self.upload(gate, MIB)
            self.assertEqual(self.said(process), "200")
            self.assertEqual(sha(upload.data), sha(data))
            self.assertLessEqual(max(upload.deliveries), N)

    def test_row_08_paused_at_every_delivery(self: Any) -> None:
        """A store that says "not now" after each piece gets every byte once, and none while it waits."""

        def rest(upload: Upload) -> None:
            upload.pause()
            self.reactor.callLater(0.002, upload.resume)

        with self.serving() as gate:
            gate.on_data = rest
            upload, data, process = self.upload(gate, 100_000)
            self.assertEqual(self.said(process), "200")
            self.assertEqual(sha(upload.data), sha(data))
            self.assertEqual(upload.violations, [])
            self.assertGreaterEqual(len(upload.deliveries), 100_000 // N)

    def test_row_13_our_pause_is_not_curls_time(self: Any) -> None:
        """A store that hangs for twice the time limit of a body costs curl no upload."""
        clock = Clock()
        with self.serving(clock) as gate:
            gate.on_data = Upload.pause
            upload, data, process = self.upload(gate, 3 * MIB)
            for _ in range(20):
                clock.advance(DEFAULT_LIMITS.body_time / 10)
                self.loop.turn()
            gate.on_data = lambda upload: None
            upload.resume()
            self.assertEqual(self.said(process), "200")
            self.assertEqual(sha(upload.data), sha(data))

    @pytest.mark.slow
    def test_row_19_fifty_beside_a_large_one(self: Any) -> None:
        """Fifty small uploads beside a large one are done long before it, and all are answered."""
        with self.serving(budget=256 * KIB) as gate:
            path, small = self.file(20_000, "small")
            taken = hashlib.sha256()
            count = 0
            begin: list[int] = []
            ends: list[int] = []

            def on_data(upload: Upload) -> None:
                nonlocal count
                if upload is gate.uploads[0]:
                    taken.update(upload.data)
                    count += len(upload.data)
                    upload.data.clear()
                    if not begin and count >= LARGE // 2:
                        upload.pause()  # until all others have begun
                elif not begin:
                    upload.pause()

            def on_whole(upload: Upload) -> None:
                ends.append(count)

            gate.on_data, gate.on_whole = on_data, on_whole
            block = pattern(MIB)
            large = self.folder / "large"
            with open(large, "wb") as file:
                file.writelines(LARGE // MIB * [block])
            first = self.curl("-T", large, "-w", "%{http_code}", self.url("gate"))
            self.loop.until(lambda: gate.uploads and gate.uploads[0].is_paused, longest=0.01)
            urls = [word for _ in range(50) for word in ("-T", path, self.url("gate"))]
            second = self.curl("-Z", "--parallel-max", "50", "-w", "%{http_code} ", *urls)
            self.loop.until(
                lambda: len(gate.uploads) == 51 and all(upload.is_paused for upload in gate.uploads), longest=0.01
            )
            begin.append(count)
            for upload in gate.uploads:
                upload.resume()
            self.assertEqual(self.said(second).split(), 50 * ["200"])
            self.assertEqual(self.said(first), "200")
            self.assertEqual(taken.hexdigest(), sha(LARGE // MIB * block))
            self.assertEqual({sha(upload.data) for upload in gate.uploads[1:]}, {sha(small)})
            # The fifty files lie in the kernel, so each takes turns, not time.
            self.assertEqual(len(ends), 51)
            self.assertLessEqual(ends[-2] - begin[0], LARGE // 4)

    def test_row_37_curl_sends_all_and_dies(self: Any) -> None:
        """curl is killed when it has sent all and waits for the answer of a store that hangs: the upload is whole."""
        with self.serving() as gate:
            gate.on_data = Upload.pause
            upload, data, process = self.upload(gate, 100_000)
            self.loop.until(lambda: has_sent_all(process, self.folder / "file", len(data)), longest=0.01)
            process.kill()
            process.wait()
            self.loop.turn(0.01)
            self.assertIsNone(upload.cut)
            gate.on_data = lambda upload: None
            upload.resume()
            self.loop.until(lambda: upload.is_whole)
            self.assertEqual(sha(upload.data), sha(data))


def has_sent_all(process: subprocess.Popen[bytes], path: Path, size: int) -> bool:
    """Whether a client has read the whole file and sleeps: it waits for its answer."""
    folder = Path(f"/proc/{process.pid}")
    for name in os.listdir(folder / "fd"):
        if os.readlink(folder / "fd" / name) == str(path):
            position = (folder / "fdinfo" / name).read_text().split()[1]
            return int(position) == size and (folder / "stat").read_text().rpartition(")")[2].split()[0] == "S"
    return False


# One class for each loop and version, for pytest and trial as if it were written out.
for _place in ("Lws", "LwsPoll", "LwsSelect", "LwsAsyncio", "LwsUvloop", "StockEPoll", "StockAsyncio"):
    for _version in VERSIONS:
        _name = f"{_place}{_version.name}CurlTests"
        _body = {
            "__doc__": f"curl on {_place}, over {_version.name}.",
            "__module__": __name__,
            "world": REAL_WORLDS[_place],
            "version": _version,
        }
        globals()[_name] = skipUnless(shutil.which("curl"), "curl is not installed")(
            type(_name, (CurlRows, SynchronousTestCase), _body)
        )
