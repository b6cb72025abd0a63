"""``lwstwisted fsck``: what crashes have left, and files that changed by themselves."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted import errors
from lwstwisted.stores.holding import LocalUpload
from lwstwisted.stores.local import LocalStore
from lwstwisted.stores.tree import DIGESTS_ATTRIBUTE
from tests.contracts import put, refusal_of
from tests.servers import PATIENCE, script, serving, twistd, unfinished_beneath, visible_beneath, wait_until
from tests.test_stores_local import LocalCase

OWN = "0123456789abcdef" * 2


def fsck(root: Path, *options: str) -> tuple[int, list[str]]:
    """Exit status and lines."""
    command = [script("lwstwisted"), "fsck", "--root", str(root), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    return done.returncode, (done.stdout + done.stderr).splitlines()


class FsckCase(SynchronousTestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.root = self.folder / "root"
        with serving(twistd("--root", self.root, "--listen", "tcp:0"), cwd=self.folder) as server:
            server.wait_for_ports()
            server.end()
        self.partial = self.root / ".lwstwisted" / "partial"
        self.batches = self.root / ".lwstwisted" / "batches"


class LeftoverTests(FsckCase):
    """What a crash leaves."""

    def test_clean(self) -> None:
        """Nothing is said of a root in order, and nothing is changed."""
        (self.root / "file").write_bytes(b"x")
        before = sorted(self.root.rglob("*"))
        for options in ((), ("--dry-run",), ("--repair",), ("--verify",)):
            self.assertEqual(fsck(self.root, *options), (0, []))
        self.assertEqual(sorted(self.root.rglob("*")), before)

    def test_unfinished(self) -> None:
        """An unfinished upload is found, and removed when that is asked for; what isn't the store's own stays."""
        (self.partial / OWN).write_bytes(b"x" * 1000)
        for options in ((), ("--dry-run",)):
            status, lines = fsck(self.root, *options)
            self.assertEqual((status, len(lines)), (4, 1))
            self.assertIn(f"partial/{OWN}", lines[0])
            self.assertTrue((self.partial / OWN).exists())
        status, lines = fsck(self.root, "--repair")
        self.assertEqual((status, "(repaired)" in lines[0]), (1, True))
        self.assertEqual(fsck(self.root), (0, []))
        (self.partial / "notes").write_bytes(b"mine")
        self.assertEqual(fsck(self.root, "--repair")[0], 4)
        self.assertEqual((self.partial / "notes").read_bytes(), b"mine")

    def test_interrupted_form(self) -> None:
        """A form that was cut between its names is taken back: what it replaced is there again."""
        batch = self.batches / OWN
        batch.mkdir()
        (batch / "0").write_bytes(b"new")
        (batch / "0.old").write_bytes(b"old")
        os.link(batch / "0", self.root / "file")
        (batch / "journal").write_text('{"folders": [], "targets": [["file"]]}')
        status, lines = fsck(self.root)
        self.assertEqual((status, len(lines), (self.root / "file").read_bytes()), (4, 1, b"new"))
        self.assertEqual(fsck(self.root, "--repair")[0], 1)
        self.assertEqual((self.root / "file").read_bytes(), b"old")
        self.assertEqual(list(self.batches.iterdir()), [])

    def test_unreadable_journal(self) -> None:
        """A journal that is none is not acted on, and said to be left."""
        (self.batches / OWN).mkdir()
        (self.batches / OWN / "journal").write_text("[]")
        status, lines = fsck(self.root, "--repair")
        self.assertEqual((status, len(lines), "(repaired)" in lines[0]), (4, 1, False))
        self.assertTrue((self.batches / OWN / "journal").exists())

    def test_held(self) -> None:
        """What somebody holds is under way, and no finding."""
        (self.batches / OWN).mkdir()
        (self.partial / OWN).write_bytes(b"x")
        for path in (self.batches / OWN, self.partial / OWN):
            descriptor = os.open(path, os.O_RDONLY)
            self.addCleanup(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        self.assertEqual(fsck(self.root, "--repair"), (0, []))
        self.assertTrue((self.partial / OWN).exists())

    def test_beside_a_service(self) -> None:
        """The uploads of a service that runs are left alone; what others left is not."""
        with serving(twistd("--root", self.root, "--listen", "tcp:0"), cwd=self.folder) as server:
            (port,) = server.wait_for_ports()
            command = ["curl", "-sS", "-T", "-", f"http://127.0.0.1:{port}/files/new", "-w", "%{http_code}"]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
                assert client.stdin is not None
                client.stdin.write(bytes(3_000_000))
                client.stdin.flush()
                wait_until(lambda: server.open_beneath(self.partial), "the upload was begun")
                (self.partial / OWN).write_bytes(b"x")
                self.assertEqual(fsck(self.root, "--repair")[0], 1)
                out, _ = client.communicate(timeout=PATIENCE)
            self.assertEqual(out, b"201")
        self.assertEqual(visible_beneath(self.root), ["new"])
        self.assertEqual((self.root / "new").stat().st_size, 3_000_000)
        self.assertEqual(unfinished_beneath(self.root), [])


class TreeTests(FsckCase):
    """What is in the tree."""

    def test_not_served(self) -> None:
        """Links, special files and names that no request can say are named; nothing is done to them."""
        (self.root / "deep").mkdir()
        (self.root / "deep" / "link").symlink_to("/etc/passwd")
        os.mkfifo(self.root / "pipe")
        (self.root / "e\u0301").write_bytes(b"decomposed")
        with open(os.fsencode(self.root) + b"/\xff", "wb"):
            pass
        status, lines = fsck(self.root, "--repair")
        self.assertEqual((status, len(lines)), (4, 4), lines)
        self.assertTrue((self.root / "pipe").exists())

    def test_digests(self) -> None:
        """A file whose bytes changed under its digest is found by reading it, and only then."""
        data = b"x" * 3_000_000
        for name, content in (("good", data), ("bad", data[:-1] + b"y"), ("folder/bad", b"")):
            path = self.root / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            os.setxattr(path, DIGESTS_ATTRIBUTE, b"sha256=" + hashlib.sha256(data).hexdigest().encode())
        (self.root / "none").write_bytes(b"no digest")
        self.assertEqual(fsck(self.root), (0, []))
        status, lines = fsck(self.root, "--verify")
        self.assertEqual((status, len(lines)), (4, 2))
        self.assertTrue(all("sha256" in line and "bad" in line for line in lines), lines)

    def test_not_to_be_understood(self) -> None:
        """What can't be looked at is a finding, and what can't go on is no success."""
        (self.root / "file").write_bytes(b"x")
        for value in (b"nosuch=00", b"shake_128=00"):
            os.setxattr(self.root / "file", DIGESTS_ATTRIBUTE, value)
            status, lines = fsck(self.root, "--verify")
            self.assertEqual((status, len(lines)), (4, 1), lines)
        self.partial.rmdir()
        self.partial.symlink_to(self.folder)
        status, lines = fsck(self.root)
        self.assertEqual((status, len(lines)), (8, 1), lines)

    def test_no_root(self) -> None:
        """A folder that is no root is not made one, and options that contradict each other are told."""
        status, lines = fsck(self.folder)
        self.assertEqual((status, len(lines)), (8, 1))
        self.assertIn("not the root of a store", lines[0])
        self.assertFalse((self.folder / ".lwstwisted").exists())
        self.assertEqual(fsck(self.root, "--repair", "--dry-run")[0], 2)


class RealTreeTests(LocalCase):
    """What the store itself makes."""

    @pytest.mark.slow
    async def test_deep(self) -> None:
        """As many folders in each other as a path can name keep no service from its start."""
        store = self.make_store()
        await put(store, (*["d"] * 1100, "file"), b"x")
        await store.stop()
        again = self.make_store(quota=1000)
        assert await refusal_of(again.create(("y",), 1000)) is errors.QUOTA_EXCEEDED
        await put(again, ("y",), bytes(999))
        await again.stop()
        self.assertEqual(fsck(self.root), (0, []))
        # No path is so long that it can be removed at once.
        subprocess.run(["rm", "-rf", str(self.root / "d")], check=True)

    async def test_kept(self) -> None:
        """The digest of an upload is what fsck compares with."""
        store = self.make_store()
        digest = hashlib.sha256(b"contents").digest()
        part = await store.create(("file",), 8, digests={"sha256": digest})
        await part.commit(memoryview(b"contents"))
        await put(store, ("other",), b"x")
        await store.stop()
        self.assertEqual(fsck(self.root, "--verify"), (0, []), base64.b64encode(digest))
        (self.root / "file").chmod(0o600)
        (self.root / "file").write_bytes(b"Contents")
        self.assertEqual(fsck(self.root, "--verify")[0], 4)


class ResumableTests(LocalCase):
    """Uploads that wait to be continued."""

    def setUp(self) -> None:
        super().setUp()
        self.uploads = self.root / ".lwstwisted" / "uploads"

    def command(self, *options: str) -> tuple[int, list[str]]:
        """``lwstwisted sweep``."""
        command = [script("lwstwisted"), "sweep", "--root", str(self.root), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        return done.returncode, (done.stdout + done.stderr).splitlines()

    async def upload(self, store: LocalStore, lifetime: float, length: int | None = 9) -> LocalUpload:
        upload = await store.begin_upload({"target": ["folder", "file\n"]}, length, lifetime)
        await upload.commit(memoryview(b"12345"))
        return upload

    async def test_waiting(self) -> None:
        """An upload that has not expired is as it should be; one that somebody holds is under way."""
        store = self.make_store()
        await (await self.upload(store, 1000)).release()
        await self.upload(store, -1)
        before = sorted(self.uploads.iterdir())
        self.assertEqual(fsck(self.root, "--repair"), (0, []))
        self.assertEqual(self.command(), (0, []))
        self.assertEqual(sorted(self.uploads.iterdir()), before)

    async def test_expired(self) -> None:
        """What no service has swept is found, and removed when that is asked for, with lost and orphaned bytes."""
        store = self.make_store()
        young, expired, lost = [await self.upload(store, lifetime) for lifetime in (1000, -1, 1000)]
        for upload in (young, expired, lost):
            await upload.release()
        (self.uploads / f"{lost.id}.data").unlink()
        (self.uploads / f"{OWN}.data").write_bytes(b"nobody's")
        for options in ((), ("--dry-run",)):
            status, lines = fsck(self.root, *options)
            self.assertEqual((status, len(lines)), (4, 3), lines)
        self.assertEqual(len(list(self.uploads.iterdir())), 6)
        status, lines = fsck(self.root, "--repair")
        self.assertEqual((status, sum("(repaired)" in line for line in lines)), (1, 3), lines)
        self.assertEqual(sorted(path.name for path in self.uploads.iterdir()), [young.id, f"{young.id}.data"])
        self.assertEqual(fsck(self.root), (0, []))

    async def test_not_ours(self) -> None:
        """What nobody can understand is told, and left."""
        self.make_store()
        (self.uploads / OWN).write_bytes(b"?")
        (self.uploads / "notes").write_bytes(b"mine")
        status, lines = fsck(self.root, "--repair")
        self.assertEqual((status, len(lines), len(list(self.uploads.iterdir()))), (4, 2, 2), lines)

    async def test_sweep(self) -> None:
        """It tells what it removes, or would, in one line each, whatever is in the name; their space is free again."""
        store = self.make_store(quota=100)
        young, known, unknown = [await self.upload(store, *what) for what in ((1000,), (-1,), (-1, None))]
        for upload in (young, known, unknown):
            await upload.release()
        expected = sorted([f"{known.id} 5 9 'folder/file\\n'", f"{unknown.id} 5 ? 'folder/file\\n'"])
        for _ in range(2):
            status, lines = self.command("--dry-run")
            self.assertEqual((status, sorted(lines)), (0, expected))
        status, lines = self.command()
        self.assertEqual((status, sorted(lines)), (0, expected))
        self.assertEqual(await store.list_uploads(), [young.id])
        self.assertEqual(self.command(), (0, []))
        self.assertEqual(await refusal_of(store.create(("x",), 92)), errors.QUOTA_EXCEEDED)
        await put(store, ("x",), bytes(91))

    async def test_no_root(self) -> None:
        """A folder that is no root is not made one."""
        status, lines = self.command()
        self.assertEqual((status, len(lines)), (1, 1))
        self.assertIn("not the root of a store", lines[0])
