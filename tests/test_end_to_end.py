"""Real servers, started as users start them, and curl: what was sent is what is on the disk."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import TestCase, skipUnless
from urllib.parse import quote

import pytest

from lwstwisted.certificate import ensure_development_certificate
from tests.servers import (
    PATIENCE,
    Server,
    digest,
    free_port,
    script,
    serving,
    tls_endpoint,
    twistd,
    unfinished_beneath,
    visible_beneath,
    wait_until,
    write_sample,
)

KIB, MIB = 1024, 1024 * 1024

CURL = ["--silent", "--show-error", "--max-time", "120"]

TREE_FILES = 400
"""Files of the tree that is uploaded."""

HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="http")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""What systemd does: the socket is descriptor 3, and the process is the one that is named."""


@skipUnless(shutil.which("curl"), "curl is not installed")
class EndToEndCase(TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.root = self.folder / "root"
        self.certificate = ensure_development_certificate(self.folder / "pair.pem")

    @contextlib.contextmanager
    def tls_server(self, *options: str, reactor: str = "lws") -> Iterator[tuple[Server, str]]:
        """A server on an ``ssl:`` endpoint under twistd, and the address of its files."""
        command = twistd("--root", self.root, "--listen", tls_endpoint(self.certificate), *options, reactor=reactor)
        with serving(command, cwd=self.folder) as server:
            (port,) = server.wait_for_ports()
            yield server, f"https://127.0.0.1:{port}/files"

    def curl(self, *options: str | Path) -> subprocess.CompletedProcess[str]:
        command = ["curl", *CURL, "--cacert", self.certificate, *options]
        done = subprocess.run([str(word) for word in command], cwd=self.folder, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def start_curl(self, *options: str | Path) -> subprocess.Popen[bytes]:
        """Let curl run beside the test, and end it in the end."""
        command = ["curl", *CURL, "--cacert", self.certificate, *options]
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def end() -> None:
            process.kill()
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()

        self.addCleanup(end)
        return process

    def round_trip(self, url: str, *options: str | Path, size: int = 300_000, name: str = "file") -> None:
        """Upload a file, compare what is on the disk, fetch it back."""
        sent = write_sample(self.folder / "sent", size)
        code = self.curl(*options, "-T", sent, "-w", "%{http_code}", f"{url}/{name}").stdout
        self.assertIn(code, ("201", "204"))
        self.assertEqual(digest(self.root / name), digest(sent))
        self.curl(*options, "-o", self.folder / "fetched", f"{url}/{name}")
        self.assertEqual(digest(self.folder / "fetched"), digest(sent))

    def upload_without_end(self, server: Server, url: str) -> subprocess.Popen[bytes]:
        """Begin an upload that waits for more bytes, and return when the server has a file for it."""
        client = self.start_curl("-T", "-", f"{url}/new/file")
        assert client.stdin is not None
        client.stdin.write(bytes(3 * MIB))
        client.stdin.flush()
        wait_until(lambda: server.open_beneath(self.root / ".lwstwisted" / "partial"), "the upload had begun")
        return client

    def assert_nothing_left(self) -> None:
        """Nothing is visible, and nothing unfinished either, as soon as the server has noticed."""
        wait_until(lambda: not unfinished_beneath(self.root), "unfinished files were removed")
        self.assertEqual(visible_beneath(self.root), [])


class UploadTests(EndToEndCase):
    """Over TLS, on our reactor."""

    def sizes(self, sizes: Sequence[int]) -> None:
        versions = {"TLSv1.2": ["--tlsv1.2", "--tls-max", "1.2"], "TLSv1.3": ["--tlsv1.3"]}
        with self.tls_server() as (_, url):
            for size in sizes:
                sent = write_sample(self.folder / "sent", size)
                wanted = digest(sent)
                for version, options in versions.items():
                    name = f"{version}-{size}"
                    done = self.curl(*options, "-v", "-w", "%{http_code}", "-T", sent, f"{url}/{name}")
                    self.assertEqual(done.stdout, "201")
                    self.assertIn(f"SSL connection using {version}", done.stderr)
                    self.assertEqual(digest(self.root / name), wanted)
                    self.curl(*options, "-o", self.folder / "fetched", f"{url}/{name}")
                    self.assertEqual(digest(self.folder / "fetched"), wanted)
            self.assertEqual(unfinished_beneath(self.root), [])

    def test_sizes(self) -> None:
        """From one byte to the edges of a TLS record and of a block, by TLS 1.2 and 1.3."""
        self.sizes([1, 16384, 16385, MIB + 1])

    @pytest.mark.slow
    def test_large_sizes(self) -> None:
        """16 and 256 MiB."""
        self.sizes([16 * MIB, 256 * MIB])

    @pytest.mark.slow
    def test_tree(self) -> None:
        """A folder of real files goes up over one connection, and comes back over several."""
        library = Path(os.__file__).parent
        files = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)[:TREE_FILES]
        self.assertGreaterEqual(len(files), 300)
        names = [str(path.relative_to(library)) for path in files]
        with self.tls_server() as (_, url):
            up = [f'upload-file = "{library}/{name}"\nurl = "{url}/{quote(name)}"\n' for name in names]
            (self.folder / "up").write_text("".join(up))
            done = self.curl("-K", "up", "-w", "%{http_code} %{num_connects}\\n")
            codes = done.stdout.splitlines()
            self.assertEqual(codes, ["201 1"] + ["201 0"] * (len(names) - 1))
            down = [f'output = "fetched/{name}"\nurl = "{url}/{quote(name)}"\n' for name in names]
            (self.folder / "down").write_text("".join(down))
            self.curl("-K", "down", "--create-dirs", "--parallel", "--parallel-max", "8", "--fail")
        for name, path in zip(names, files, strict=True):
            self.assertEqual(digest(self.root / name), digest(path), name)
            self.assertEqual(digest(self.folder / "fetched" / name), digest(path), name)

    @pytest.mark.slow
    def test_eight_at_once(self) -> None:
        """Uploads beside each other do not mix."""
        sent = [write_sample(self.folder / f"sent{number}", 32 * MIB) for number in range(8)]
        with self.tls_server() as (_, url):
            pairs = "".join(f'upload-file = "{path}"\nurl = "{url}/{path.name}"\n' for path in sent)
            (self.folder / "up").write_text(pairs)
            done = self.curl("-K", "up", "--parallel", "--parallel-max", "8", "-w", "%{http_code}\\n")
            self.assertEqual(done.stdout.split(), ["201"] * 8)
        for path in sent:
            self.assertEqual(digest(self.root / path.name), digest(path))

    @pytest.mark.slow
    def test_memory_is_flat(self) -> None:
        """An upload of eight times the size takes no more memory."""
        peaks = []
        for size in (64 * MIB, 512 * MIB):
            sent = write_sample(self.folder / "sent", size)
            with self.tls_server() as (server, url):
                self.curl("-T", sent, f"{url}/{size}")
                peaks.append(server.peak_memory())
            self.assertEqual((self.root / str(size)).stat().st_size, size)
            (self.root / str(size)).unlink()
        self.assertLess(abs(peaks[1] - peaks[0]), 8 * MIB, peaks)

    @skipUnless(shutil.which("strace"), "strace is not installed")
    def test_durability(self) -> None:
        """The option decides what is synced before the answer: file and folder, the file's data, nothing."""
        for level, wanted in (("full", {"fsync"}), ("data", {"fdatasync"}), ("none", set())):
            trace = self.folder / f"trace-{level}"
            command = ["strace", "-D", "-f", "-qq", "-o", trace, "-e", "trace=fsync,fdatasync"]
            command += twistd("--root", self.root, "--listen", "tcp:0", "--durability", level)
            with serving(command, cwd=self.folder) as server:
                (port,) = server.wait_for_ports()
                trace.write_bytes(b"")  # the root itself was made durable at the start
                self.round_trip(f"http://127.0.0.1:{port}/files", name=level)
            calls = set(re.findall(r"(\w+)\(", trace.read_text(errors="replace")))
            self.assertEqual(calls & {"fsync", "fdatasync"}, wanted, level)

    def test_from_a_pipe(self) -> None:
        """A body of unknown length is sent in chunks."""
        sent = write_sample(self.folder / "sent", 3 * MIB + 1)
        with self.tls_server() as (_, url), open(sent, "rb") as data:
            command = ["curl", *CURL, "-v", "--cacert", str(self.certificate), "-T", "-", f"{url}/file"]
            done = subprocess.run(command, stdin=data, capture_output=True, text=True, timeout=PATIENCE)
            self.assertIn("Transfer-Encoding: chunked", done.stderr)
            self.assertEqual(digest(self.root / "file"), digest(sent))

    def test_refused_before_the_body(self) -> None:
        """curl asks before it sends a large body, is refused, and sends none of it; the connection is not reset."""
        sent = write_sample(self.folder / "sent", 2 * MIB)
        with self.tls_server("--max-size", "1M") as (_, url):
            for target, code in ((f"{url}/file", "413"), (f"{url}/.lwstwisted/file", "400")):
                asking = ["-v", "-T", sent, "-H", "Expect: 100-continue"]
                done = self.curl(*asking, "-w", "%{http_code} %{size_upload}", target)
                self.assertRegex(done.stdout, rf"^[A-Z][^\n]+\.\n{code} 0$")
                self.assertNotIn("100 Continue", done.stderr)
            self.assert_nothing_left()
            # Without the question the answer arrives, too, in the middle of the body: curl is content with it.
            sent = write_sample(sent, 16 * MIB)
            for version in ("1.2", "1.3"):
                done = self.curl("--tls-max", version, "-T", sent, "-H", "Expect:", "-w", "%{http_code}", f"{url}/file")
                self.assertRegex(done.stdout, r"\n413$")
            self.assert_nothing_left()

    def test_client_is_killed(self) -> None:
        """Nothing of its upload is left, and the server goes on, with no descriptor more."""
        with self.tls_server() as (server, url):
            self.round_trip(url, name="before")
            (self.root / "before").unlink()
            open_before = server.descriptors()
            self.upload_without_end(server, url).kill()
            wait_until(lambda: server.descriptors() <= open_before, "the upload was given up")
            self.assert_nothing_left()
            self.round_trip(url, name="after")
            self.assertNotIn("Traceback", server.text)

    def test_full_log(self) -> None:
        """Lines that can't be written harm nobody: requests are served, what is cut leaves nothing, and it can end."""
        with self.tls_server("--access-log", "/dev/full", "--drain-time", "1") as (server, url):
            self.round_trip(url)
            (self.root / "file").unlink()
            open_before = server.descriptors()
            self.upload_without_end(server, url).kill()
            self.assert_nothing_left()
            wait_until(lambda: server.descriptors() <= open_before, "the upload was given up")
            server.wait_for(r"(could not be written)")
            self.upload_without_end(server, url)
            server.end()
            self.assertNotIn("Traceback", server.text)
        self.assert_nothing_left()

    def test_server_is_killed(self) -> None:
        """After the restart nothing of the upload is visible or left, and the rest is there."""
        with self.tls_server() as (server, url):
            self.round_trip(url, name="kept")
            self.upload_without_end(server, url)
            server.end(signal.SIGKILL)
        # What a file system without O_TMPFILE leaves.
        (self.root / ".lwstwisted" / "partial" / ("0" * 32)).write_bytes(b"left")
        self.assertEqual(visible_beneath(self.root), ["kept"])
        with self.tls_server() as (_, url):
            self.assertEqual(unfinished_beneath(self.root), [])
            self.assertEqual(visible_beneath(self.root), ["kept"])
            self.round_trip(url, name="kept")


class EndpointTests(EndToEndCase):
    """Any endpoint that Twisted knows."""

    def test_tcp_unix_and_ssl_at_once(self) -> None:
        """One server may listen on several, and all of them serve the same files."""
        path = self.folder / "socket"
        options = ["--listen", "tcp:0", "--listen", f"unix:{path}", "--listen", tls_endpoint(self.certificate)]
        with serving(twistd("--root", self.root, *options), cwd=self.folder) as server:
            server.wait_for(r"starting on (\S*/socket)")
            plain, tls = server.wait_for_ports(2)
            self.round_trip(f"http://127.0.0.1:{plain}/files", name="tcp")
            self.round_trip("http://localhost/files", "--unix-socket", path, name="unix")
            self.round_trip(f"https://127.0.0.1:{tls}/files", name="ssl")
            self.assertEqual(listening_addresses(plain, tls), {"127.0.0.1"})
        self.assertEqual(visible_beneath(self.root), ["ssl", "tcp", "unix"])

    def test_tls_with_a_folder_of_certificates(self) -> None:
        """``tls:`` finds the certificate by the name that the client asks for."""
        pems = self.folder / "pems"
        pems.mkdir()
        shutil.copy(self.certificate, pems / "localhost.pem")
        command = twistd("--root", self.root, "--listen", f"tls:{pems}:0")
        with serving(command, cwd=self.folder) as server:
            (port,) = server.wait_for_ports()
            self.round_trip(f"https://localhost:{port}/files", "--resolve", f"localhost:{port}:[::1]")
            self.assertEqual(listening_addresses(port), {"::1"})

    def test_systemd(self) -> None:
        """A socket that systemd opened, handed over as the units in ``etc/`` say."""
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            command = twistd("--root", self.root, "--listen", "systemd:domain=INET:name=http")
            hand_over = [sys.executable, "-c", HAND_OVER, str(listening.fileno()), *command]
            with serving(hand_over, cwd=self.folder, descriptors=[listening.fileno()]) as server:
                self.assertEqual(server.wait_for_ports(), [port])
                self.round_trip(f"http://127.0.0.1:{port}/files")


class StockReactorTests(EndToEndCase):
    """Without our reactor the same files are served, by the default path."""

    @pytest.mark.slow
    def test_stock_reactors(self) -> None:
        for reactor in ("epoll", "poll", "asyncio"):
            with self.subTest(reactor), self.tls_server(reactor=reactor) as (_, url):
                self.round_trip(url, size=3 * MIB + 1, name=reactor)


class ServeTests(EndToEndCase):
    """``lwstwisted serve``."""

    @contextlib.contextmanager
    def serve(self, *options: str | Path) -> Iterator[Server]:
        with serving([script("lwstwisted"), "serve", *options], cwd=self.folder) as server:
            yield server

    def test_zero_options(self) -> None:
        """One command, and two more that it prints; they work as they stand."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", 8443))
            except OSError:
                self.skipTest("port 8443 is in use")
        with self.serve() as server:
            self.follow_hints(server, self.folder / "uploads")
            self.assertEqual(server.wait_for_ports(), [8443])
            self.assertEqual(listening_addresses(8443), {"127.0.0.1"})
            self.assertEqual(server.end(), 0)

    def test_port_and_root(self) -> None:
        """The same elsewhere, in a folder whose name the shell would take apart."""
        with self.serve("--port", str(free_port()), "--root", "my $up:loads") as server:
            self.follow_hints(server, self.folder / "my $up:loads")

    def follow_hints(self, server: Server, root: Path) -> None:
        upload, fetch = server.wait_for(r"(?m)^(?:upload|fetch): +(curl .*)$", 2)
        server.wait_for_ports()
        sent = write_sample(self.folder / "some-file", 100_000)
        wanted = digest(sent)
        self.run_in_shell(upload.replace("FILE", "some-file"))
        self.assertEqual(digest(root / "some-file"), wanted)
        sent.unlink()
        self.run_in_shell(fetch.replace("FILE", "some-file"))
        self.assertEqual(digest(sent), wanted)

    def run_in_shell(self, command: str) -> None:
        done = subprocess.run(command, shell=True, cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE)
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_end_during_an_upload(self) -> None:
        """SIGTERM ends it well and soon, whatever a client does; nothing of the upload is left."""
        for how in (signal.SIGTERM, signal.SIGINT):
            options = ("--root", self.root, "--listen", tls_endpoint(self.certificate), "--drain-time", "1")
            with self.serve(*options) as server:
                (port,) = server.wait_for_ports()
                self.upload_without_end(server, f"https://127.0.0.1:{port}/files")
                started = time.monotonic()
                self.assertEqual(server.end(how), 0, server.text)
                self.assertLess(time.monotonic() - started, 10)
                self.assertNotIn("Traceback", server.text)
            self.assertEqual(visible_beneath(self.root), [])
            self.assertEqual(unfinished_beneath(self.root), [])

    def test_end_while_idle(self) -> None:
        """A client that keeps its connection open doesn't keep the server from ending."""
        with self.serve("--root", self.root, "--listen", "tcp:0") as server:
            (port,) = server.wait_for_ports()
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
                client.sendall(b"GET /files/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
                self.assertTrue(client.recv(1000).startswith(b"HTTP/1.1 200 "))
                self.assertEqual(server.end(), 0, server.text)

    @pytest.mark.slow
    def test_mistakes(self) -> None:
        """One line on stderr, and a status: 2 for how it was called, 1 for what did not work."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            busy = str(taken.getsockname()[1])
            (self.folder / "file").write_bytes(b"")
            running: list[tuple[subprocess.Popen[str], int, str]] = []
            for status, part, words in (
                (1, busy, ["serve", "--root", "root", "--port", busy]),
                (1, "file", ["serve", "--root", "file"]),
                (1, "nonsense", ["serve", "--root", "root", "--listen", "nonsense:1", "--anonymous"]),
                (2, "--anonymous", ["serve", "--root", "root", "--listen", "tcp:0:interface=0.0.0.0"]),
                (1, "missing.pem", ["serve", "--root", "root", "--listen", "ssl:0:privateKey=missing.pem"]),
                (2, "--max-size", ["serve", "--max-size", "much"]),
            ):
                command = [script("lwstwisted"), *words]
                pipe = subprocess.PIPE
                running.append(
                    (subprocess.Popen(command, cwd=self.folder, stdout=pipe, stderr=pipe, text=True), status, part)
                )
            for process, status, part in running:
                with self.subTest(part), process:
                    said = process.communicate(timeout=PATIENCE)[1]
                    self.assertEqual(process.returncode, status, said)
                    self.assertRegex(said, r"\Alwstwisted: [^\n]+\n\Z")
                    self.assertIn(part, said)


def listening_addresses(*ports: int) -> set[str]:
    """The addresses that anybody listens on, of some ports."""
    found = set()
    for table, family in (("/proc/net/tcp", socket.AF_INET), ("/proc/net/tcp6", socket.AF_INET6)):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            address, _, port = fields[1].partition(":")
            if fields[3] == "0A" and int(port, 16) in ports:
                # Words of four bytes in the machine's own order.
                words = [bytes.fromhex(address[at : at + 8]) for at in range(0, len(address), 8)]
                in_order = words if sys.byteorder == "big" else [word[::-1] for word in words]
                found.add(socket.inet_ntop(family, b"".join(in_order)))
    return found
