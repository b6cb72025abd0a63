"""TLS of the whole service: listeners, options, uploads while certificates are renewed, and Mozilla's verdict."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any
from unittest import skipUnless

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from twisted.internet.threads import deferToThread
from twisted.python.usage import UsageError
from twisted.trial.unittest import SynchronousTestCase, TestCase

from lwstwisted.options import on_loopback, with_backlog
from lwstwisted.service import makeService
from tests.servers import PATIENCE, Server, digest, free_port, script, serving, twistd, write_sample
from tests.test_end_to_end import HAND_OVER
from tests.test_service import parsed
from tests.tls_authority import DAY, FOR_SERVERS, Pair, authority, issue, keep, rsa_key, s_client

ROOT = Path(__file__).resolve().parent.parent
SSLYZE = shutil.which("sslyze") or str(ROOT / ".venv" / "sslyze" / "bin" / "sslyze")


def host(key: Any = None) -> Pair:
    """A certificate for this machine, as an authority of our days issues it."""
    return issue("localhost", by=authority(), usage=[FOR_SERVERS], end=80 * DAY, key=key)


class OptionsTests(SynchronousTestCase):
    """The command line."""

    def test_unless_told(self) -> None:
        """What is behind https: is bound to loopback, and has our backlog, as without it."""
        self.assertEqual(on_loopback("https:tcp:8443"), "https:tcp:8443:interface=127.0.0.1")
        self.assertEqual(on_loopback("https:haproxy:tcp:1"), "https:haproxy:tcp:1:interface=127.0.0.1")
        self.assertEqual(on_loopback("https:tcp:1:interface=0.0.0.0"), "https:tcp:1:interface=0.0.0.0")
        self.assertEqual(with_backlog("https:tcp:8443"), f"https:{with_backlog('tcp:8443')}")
        self.assertEqual(with_backlog("https:systemd:domain=INET:name=https"), "https:systemd:domain=INET:name=https")

    def test_defaults(self) -> None:
        options = parsed()
        self.assertEqual(options["certificates"], [])
        self.assertEqual((options["tls-profile"], options["client-ca"]), ("intermediate", None))
        self.assertEqual(parsed("--certificate", "a", "--certificate", "b")["certificates"], ["a", "b"])

    def test_mistakes(self) -> None:
        for words, sentence in (
            (["--tls-profile", "old"], "--tls-profile is intermediate or modern"),
            (["--client-ca", "x", "--client-certificate", "maybe"], "--client-certificate is required or optional"),
            (["--client-certificate", "optional"], "--client-certificate needs --client-ca"),
        ):
            with self.assertRaisesRegex(UsageError, sentence):
                parsed(*words)


class ServiceTestCase(TestCase):
    """A folder with a certificate for this machine."""

    timeout = 90

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.root = self.folder / "root"
        self.host = host()
        self.pem = keep(self.folder / "host.pem", self.host.pem)
        self.ca = keep(self.folder / "ca.pem", authority().chain)

    @contextlib.contextmanager
    def server(self, *options: str | Path, listen: Sequence[str] = ("https:tcp:0",)) -> Iterator[Server]:
        words = [word for description in listen for word in ("--listen", description)]
        command = twistd("--root", self.root, "--certificate", self.pem, *words, *options)
        with serving(command, cwd=self.folder) as server:
            yield server

    def round_trip(self, url: str, *options: str) -> None:
        """Upload a file, and fetch it back."""
        sent = write_sample(self.folder / "sent", 3_000_000)
        for words in (["-T", sent], ["-o", self.folder / "fetched"]):
            command = ["curl", "-sS", "--fail", "--noproxy", "*", "--cacert", self.ca, *options, *words, f"{url}/file"]
            done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=PATIENCE)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(digest(self.folder / "fetched"), digest(sent))


class ListenerTests(ServiceTestCase):
    """https: in front of any endpoint."""

    @pytest.mark.slow
    def test_endpoints(self) -> None:
        """Of TCP, behind a proxy that speaks PROXY, and of a UNIX socket."""
        path = self.folder / "socket"
        listen = ("https:tcp:0", "https:haproxy:tcp:0", f"https:unix:{path}")
        with self.server(listen=listen) as server:
            plain, proxied = server.wait_for_ports(2)
            server.wait_for(r"starting on (\S*/socket)")
            self.round_trip(f"https://localhost:{plain}/files")
            self.round_trip(f"https://localhost:{proxied}/files", "--haproxy-protocol")
            self.round_trip("https://localhost/files", "--unix-socket", str(path))

    @pytest.mark.slow
    def test_systemd(self) -> None:
        """A socket that systemd opened gets TLS on top."""
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            words = ["--listen", "https:systemd:domain=INET:name=http", "--certificate", self.pem]
            command = twistd("--root", self.root, *words)
            hand_over = [sys.executable, "-c", HAND_OVER, str(listening.fileno()), *command]
            with serving(hand_over, cwd=self.folder, descriptors=[listening.fileno()]) as server:
                self.assertEqual(server.wait_for_ports(), [port])
                self.round_trip(f"https://localhost:{port}/files")

    @pytest.mark.slow
    def test_port_in_use(self) -> None:
        """A start that can't listen fails, with TLS as without."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            command = [script("lwstwisted"), "serve", "--root", self.root, "--certificate", self.pem]
            command += ["--listen", f"https:tcp:{other.getsockname()[1]}"]
            with serving(command, cwd=self.folder) as server:
                self.assertEqual(server.wait(), 1)
                self.assertIn("lwstwisted: Couldn't listen on", server.text)


class StartTests(ServiceTestCase):
    """What is wrong is said at the start."""

    @pytest.mark.slow
    def test_one_line(self) -> None:
        """One line with the file and the reason, and exit status 1."""
        keep(self.pem, self.host.chain)
        command = [script("lwstwisted"), "serve", "--root", self.root, "--certificate", self.pem]
        with serving([*command, "--port", str(free_port())], cwd=self.folder) as server:
            self.assertEqual(server.wait(), 1)
            line = f"lwstwisted: {self.pem}: no private key in it, and no host.key beside it"
            self.assertEqual(server.log, [line])

    @pytest.mark.slow
    def test_development_certificate(self) -> None:
        """Without options TLS is spoken with a certificate that a first start makes, and with Mozilla's suites."""
        port = free_port()
        command = [script("lwstwisted"), "serve", "--root", self.root, "--port", str(port)]
        with serving(command, cwd=self.folder) as server:
            server.wait_for_ports()
            shutil.copy(self.root / ".lwstwisted" / "development.pem", self.ca)
            self.round_trip(f"https://127.0.0.1:{port}/files")
            self.assertIn("SSL alert number 70\n", s_client(port, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"))
            self.assertIn("SSL alert number 40\n", s_client(port, "-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA"))


class RenewalTests(ServiceTestCase):
    """Certificates are renewed under load."""

    async def test_running_upload(self) -> None:
        """An upload that is under way goes on, and is stored whole; who comes next gets the new certificate."""
        from twisted.internet import reactor

        port, half, renewed = free_port(), Event(), Event()
        words = ["--root", str(self.root), "--certificate", str(self.pem), "--listen", f"https:tcp:{port}"]
        service = makeService(parsed(*words), reactor)
        service.privilegedStartService()  # type: ignore[no-untyped-call]
        service.startService()
        self.addCleanup(service.stopService)
        content = os.urandom(4 << 20)

        def shown(context: ssl.SSLContext) -> x509.Certificate:
            plain = socket.create_connection(("127.0.0.1", port), PATIENCE)
            with context.wrap_socket(plain, server_hostname="localhost") as connection:
                der = connection.getpeercert(True)
            assert der is not None
            return x509.load_der_x509_certificate(der)

        def upload(context: ssl.SSLContext) -> bytes:
            plain = socket.create_connection(("127.0.0.1", port), PATIENCE)
            with context.wrap_socket(plain, server_hostname="localhost") as connection:
                head = f"PUT /files/new HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
                connection.sendall(head.encode() + content[: len(content) // 2])
                half.set()
                assert renewed.wait(PATIENCE)
                connection.sendall(content[len(content) // 2 :])
                return connection.recv(1000)

        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = ssl.create_default_context(cafile=str(self.ca))
            context.minimum_version = context.maximum_version = version
            half.clear()
            renewed.clear()
            uploading = deferToThread(upload, context)
            self.assertTrue(await deferToThread(half.wait, PATIENCE))
            new = host()
            keep(self.pem, new.pem)
            service.reload()
            self.assertEqual(await deferToThread(shown, context), new.certificate)
            renewed.set()
            answer = await uploading
            self.assertRegex(answer, rb"^HTTP/1.1 20[14] ")
            stored = hashlib.sha256((self.root / "new").read_bytes()).digest()
            self.assertEqual(stored, hashlib.sha256(content).digest())


@skipUnless(Path(SSLYZE).exists(), "needs sslyze: tests/install-sslyze.sh")
class MozillaTests(ServiceTestCase):
    """The verdict of sslyze, by the guidelines that it brings along."""

    def judge(self, port: int, profile: str) -> subprocess.CompletedProcess[str]:
        words = [SSLYZE, f"--mozilla_config={profile}", "--certinfo_ca_file", str(self.ca), f"localhost:{port}"]
        return subprocess.run(words, capture_output=True, text=True, timeout=40)

    def assert_compliant(self, port: int, profile: str) -> None:
        done = self.judge(port, profile)
        verdict = done.stdout.partition("COMPLIANCE AGAINST")[2]
        self.assertIn(f"localhost:{port}: OK - Compliant", verdict, done.stdout + done.stderr)
        self.assertEqual(done.returncode, 0)

    @pytest.mark.slow
    def test_intermediate(self) -> None:
        """Compliant without an option, with a key of either kind."""
        for key in (ec.generate_private_key(ec.SECP256R1()), rsa_key()):
            keep(self.pem, host(key).pem)
            with self.server() as server:
                (port,) = server.wait_for_ports()
                self.assert_compliant(port, "intermediate")
                self.assertIn("TLS versions", self.judge(port, "modern").stdout)  # sslyze does look

    @pytest.mark.slow
    def test_modern(self) -> None:
        with self.server("--tls-profile", "modern") as server:
            (port,) = server.wait_for_ports()
            self.assert_compliant(port, "modern")
