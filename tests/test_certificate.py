"""The development certificate: what ``make run`` shows to curl."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import stat
import subprocess
import tempfile
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import TestCase, mock, skipUnless

from cryptography import x509

from lwstwisted import certificate
from lwstwisted.certificate import ensure_development_certificate

DAY = timedelta(days=1)


class CertificateTestCase(TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.path = self.folder / "new" / "development.pem"


class FileTests(CertificateTestCase):
    """What lies on the disk, and when it is made anew."""

    def make_at(self, when: datetime) -> bytes:
        """Put a pair there as it would have been made at another time."""
        self.path.parent.mkdir(exist_ok=True)
        content = certificate._make_pair(when)
        self.path.write_bytes(content)
        return content

    def is_kept(self) -> bool:
        """Whether the file is left alone; if it is not, there has to be a good one now."""
        before = self.path.read_bytes()
        self.assertEqual(ensure_development_certificate(self.path), self.path)
        after = self.path.read_bytes()
        self.assertTrue(certificate._is_usable(self.path, datetime.now(UTC)))
        return after == before

    def test_new(self) -> None:
        """One PEM with the key and a P-256 certificate, folders included, for the owner's eyes only."""
        umask = os.umask(0)
        self.addCleanup(os.umask, umask)
        self.assertEqual(ensure_development_certificate(self.path), self.path)
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o600)
        self.assertEqual(os.listdir(self.path.parent), [self.path.name])
        made = x509.load_pem_x509_certificate(self.path.read_bytes())
        self.assertEqual(made.subject.rfc4514_string(), "CN=lwstwisted development")
        self.assertEqual(made.public_key().curve.name, "secp256r1")
        self.assertAlmostEqual(made.not_valid_before_utc, datetime.now(UTC) - DAY, delta=DAY / 24)
        self.assertAlmostEqual(made.not_valid_after_utc, datetime.now(UTC) + 365 * DAY, delta=DAY / 24)

    def test_kept_while_it_is_good(self) -> None:
        """A restart shows the same certificate, so a client's ``--cacert`` copy goes on working."""
        ensure_development_certificate(self.path)
        self.assertTrue(self.is_kept())

    def test_kept_up_to_the_day_before_its_end(self) -> None:
        self.make_at(datetime.now(UTC) - 364 * DAY + timedelta(minutes=1))
        self.assertTrue(self.is_kept())

    def test_renewed_within_a_day_of_its_end(self) -> None:
        self.make_at(datetime.now(UTC) - 364 * DAY - timedelta(minutes=1))
        self.assertFalse(self.is_kept())

    def test_renewed_when_not_valid_yet(self) -> None:
        """Made while the machine's clock was wrong."""
        self.make_at(datetime.now(UTC) + 2 * DAY)
        self.assertFalse(self.is_kept())

    def test_renewed_when_it_is_no_pair(self) -> None:
        """Cut, empty, garbage, one half only, or the halves of two pairs."""
        whole = self.make_at(datetime.now(UTC))
        middle = whole.index(b"-----BEGIN CERTIFICATE")
        key, cert = whole[:middle], whole[middle:]
        other_key = certificate._make_pair(datetime.now(UTC)).partition(b"-----BEGIN CERTIFICATE")[0]
        for content in (whole[: len(whole) // 2], b"", b"\xff" * 100, key, cert, other_key + cert):
            with self.subTest(content=content[:40]):
                self.path.write_bytes(content)
                self.assertFalse(self.is_kept())

    def test_a_failure_leaves_nothing(self) -> None:
        """The old file stays, and no temporary one."""
        old = self.make_at(datetime.now(UTC) - 400 * DAY)
        with mock.patch("os.replace", side_effect=OSError("disk")), self.assertRaises(OSError):
            ensure_development_certificate(self.path)
        self.assertEqual(os.listdir(self.path.parent), [self.path.name])
        self.assertEqual(self.path.read_bytes(), old)

    def test_a_folder_is_an_error(self) -> None:
        """What cannot be read is not silently replaced."""
        with self.assertRaises(OSError):
            ensure_development_certificate(self.folder)


class HandshakeTests(CertificateTestCase):
    """Real clients accept it, for each of its names, and for no other."""

    def setUp(self) -> None:
        super().setUp()
        ensure_development_certificate(self.path)

    def serve(self, family: socket.AddressFamily, host: str) -> int:
        """Answer one HTTPS connection in a thread.

        :returns: the port.
        """
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.path)
        listening = socket.socket(family)
        self.addCleanup(listening.close)
        try:
            listening.bind((host, 0))
        except OSError as error:
            self.skipTest(f"no {host} here: {error}")
        listening.listen()
        listening.settimeout(30)

        def answer() -> None:
            plain, _ = listening.accept()
            plain.settimeout(30)
            try:
                with context.wrap_socket(plain, server_side=True) as connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nhello")
            except OSError:  # a client that refuses the certificate
                plain.close()

        thread = threading.Thread(target=answer)
        thread.start()
        self.addCleanup(thread.join)
        return int(listening.getsockname()[1])

    def ask(self, name: str, family: socket.AddressFamily = socket.AF_INET, host: str = "127.0.0.1") -> None:
        """Connect as a strict client that trusts nothing but the file."""
        context = ssl.create_default_context(cafile=str(self.path))
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        port = self.serve(family, host)
        with (
            socket.create_connection((host, port), 30) as plain,
            context.wrap_socket(plain, server_hostname=name) as connection,
        ):
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            self.assertTrue(connection.recv(65536).endswith(b"hello"))

    def curl(self, url: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "30", *options, url]
        return subprocess.run(command, capture_output=True, text=True)

    def test_python_localhost(self) -> None:
        self.ask("localhost")

    def test_python_ipv4(self) -> None:
        self.ask("127.0.0.1")

    def test_python_ipv6(self) -> None:
        self.ask("::1", socket.AF_INET6, "::1")

    def test_python_refuses_another_name(self) -> None:
        """It is no certificate for anything but this machine."""
        with self.assertRaises(ssl.SSLCertVerificationError):
            self.ask("example.org")

    @skipUnless(shutil.which("curl"), "curl is not installed")
    def test_curl(self) -> None:
        """The command that ``make run`` prints works: curl with ``--cacert``."""
        for name in ("localhost", "127.0.0.1"):
            port = self.serve(socket.AF_INET, "127.0.0.1")
            done = self.curl(f"https://{name}:{port}/", "--cacert", str(self.path), "--ipv4")
            self.assertEqual((done.returncode, done.stdout), (0, "hello"), done.stderr)

    @skipUnless(shutil.which("curl"), "curl is not installed")
    def test_curl_ipv6(self) -> None:
        port = self.serve(socket.AF_INET6, "::1")
        done = self.curl(f"https://[::1]:{port}/", "--cacert", str(self.path))
        self.assertEqual((done.returncode, done.stdout), (0, "hello"), done.stderr)

    @skipUnless(shutil.which("curl"), "curl is not installed")
    def test_curl_without_cacert(self) -> None:
        """The negative control: curl does look at the certificate (exit status 60)."""
        port = self.serve(socket.AF_INET, "127.0.0.1")
        self.assertEqual(self.curl(f"https://127.0.0.1:{port}/").returncode, 60)
