"""Keys and certificates in files: which are found, what is said of those that are of no use, and whose they are."""

from __future__ import annotations

import os
import tempfile
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509 import ocsp
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.certificate import ensure_development_certificate
from lwstwisted.tls.certificates import BadCertificate, Identity, Source, find, load, load_staple
from lwstwisted.tls.clients import ClientAuthorities, identity_of, names_of
from lwstwisted.tls.contexts import Contexts
from tests.tls_authority import DAY, Pair, authority, issue, keep, response_for, rsa_key


class FolderTestCase(SynchronousTestCase):
    """A folder for files."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def load(self, name: str) -> Identity:
        return load(Source(self.folder / name), datetime.now(UTC))

    def keep_pair(self, name: str, pair: Pair) -> Path:
        return keep(self.folder / name, pair.pem)


class LayoutTests(FolderTestCase):
    """What ``--certificate`` may name."""

    def found(self, name: str = "") -> list[str]:
        return [str(source.chain.relative_to(self.folder)) for source in find(self.folder / name)]

    def test_file(self) -> None:
        """One file with key and chain, whichever comes first."""
        host, ca = issue("a.test", by=authority()), authority()
        for content in (host.private + host.chain + ca.chain, host.chain + ca.chain + host.private):
            keep(self.folder / "a.pem", content)
            self.assertEqual(self.found("a.pem"), ["a.pem"])
            loaded = self.load("a.pem")
            self.assertEqual(loaded.chain, (host.certificate, ca.certificate))
            self.assertEqual(loaded.key.public_key(), host.key.public_key())

    def test_development_certificate(self) -> None:
        """The file that a first start makes is one of them."""
        ensure_development_certificate(self.folder / "development.pem")
        self.assertEqual(self.load("development.pem").names, ("localhost",))

    def test_key_beside(self) -> None:
        """``server.crt`` with ``server.key``, as many guides make them, and a key as ``openssl ecparam`` writes it."""
        host = issue("a.test")
        keep(self.folder / "server.crt", host.chain, 0o644)
        parameters = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
        old_form = host.key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
        for content in (host.private, parameters + old_form):
            keep(self.folder / "server.key", content)
            self.assertEqual(self.load("server.crt").names, ("a.test",))

    def test_certbot(self) -> None:
        """A folder of certbot, with its links to elsewhere; the single files of the chain beside are left alone."""
        host, live = issue("a.test", by=authority()), self.folder / "live" / "a.test"
        archive = self.folder / "archive" / "a.test"
        live.mkdir(parents=True)
        for name, content in {
            "fullchain": host.chain + authority().chain,
            "privkey": host.private,
            "cert": host.chain,
            "chain": authority().chain,
        }.items():
            keep(archive / f"{name}1.pem", content)
            (live / f"{name}.pem").symlink_to(f"../../archive/a.test/{name}1.pem")
        keep(live / "README", b"This directory contains your keys")
        for name in ("live/a.test", "live/a.test/fullchain.pem", "live"):
            self.assertEqual(self.found(name), ["live/a.test/fullchain.pem"])
        self.assertEqual(self.load("live/a.test/fullchain.pem").names, ("a.test",))

    def test_folder_of_many(self) -> None:
        """Certificates in the order of their names; hidden files, as editors and Kubernetes leave them, are none."""
        for name in ("b.pem", "a.crt", "c/fullchain.pem", ".hidden.pem", "a.key", "notes.txt", "a.crt.ocsp"):
            keep(self.folder / name, b"")
        self.assertEqual(self.found(), ["a.crt", "b.pem", "c/fullchain.pem"])

    def test_nothing_there(self) -> None:
        """An empty folder is an error: it is no server with no certificate."""
        with self.assertRaisesRegex(BadCertificate, "no fullchain.pem, no .*pem and no .*crt"):
            find(self.folder)


class RefusalTests(FolderTestCase):
    """What can't be used is said at the start, in one sentence that names the file."""

    def assert_refused(self, name: str, sentence: str) -> None:
        with self.assertRaisesRegex(BadCertificate, sentence) as caught:
            Contexts([self.folder / name])
        self.assertIn(str(self.folder), str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))

    def test_missing(self) -> None:
        self.assert_refused("a.pem", "a.pem: No such file or directory$")

    def test_no_certificate(self) -> None:
        """Empty, garbage, the key only, or cut."""
        host = issue("a.test")
        for content in (b"", b"\xff" * 100, host.private, host.chain[: len(host.chain) // 2]):
            keep(self.folder / "a.pem", content)
            self.assert_refused("a.pem", "a.pem: no certificate in PEM")

    def test_no_key(self) -> None:
        """It says where the key was looked for."""
        keep(self.folder / "a.pem", issue("a.test").chain)
        self.assert_refused("a.pem", "a.pem: no private key in it, and no a.key beside it$")
        keep(self.folder / "fullchain.pem", issue("a.test").chain)
        self.assert_refused("fullchain.pem", "no privkey.pem beside it$")

    def test_broken_key(self) -> None:
        host = issue("a.test")
        keep(self.folder / "a.pem", host.chain + host.private[:80] + b"\n-----END PRIVATE KEY-----\n")
        self.assert_refused("a.pem", "a.pem: no private key in PEM that can be used")

    def test_key_with_a_password(self) -> None:
        """A service can't ask for it."""
        host = issue("a.test")
        locked = host.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
        keep(self.folder / "a.pem", host.chain + locked)
        self.assert_refused("a.pem", "the private key has a password")

    def test_key_of_another(self) -> None:
        keep(self.folder / "a.pem", issue("a.test").chain + issue("a.test").private)
        self.assert_refused("a.pem", "the private key in .*a.pem is not the one of this certificate")

    def test_wrong_order(self) -> None:
        """The authority's certificate first: clients would take that for the server's."""
        host = issue("a.test", by=authority())
        keep(self.folder / "a.pem", authority().chain + host.pem)
        self.assert_refused("a.pem", "the certificate of the server has to come first")

    def test_expired(self) -> None:
        """With the time of its end."""
        self.keep_pair("a.pem", issue("a.test", begin=-3 * DAY, end=-DAY))
        yesterday = datetime.now(UTC) - DAY
        self.assert_refused("a.pem", f"is valid from .* to {yesterday:%F} .* UTC, not now")

    def test_not_yet_valid(self) -> None:
        self.keep_pair("a.pem", issue("a.test", begin=DAY))
        self.assert_refused("a.pem", "is valid from .*, not now")

    def test_key_for_everybody(self) -> None:
        """A key that each user of the machine may read is nobody's secret; that of a group is left to the operator."""
        host = issue("a.test")
        keep(self.folder / "a.pem", host.pem, 0o644)
        self.assert_refused("a.pem", "everybody may read the private key; chmod o= ")
        keep(self.folder / "a.pem", host.pem, 0o640)
        self.assertEqual(self.load("a.pem").names, ("a.test",))
        keep(self.folder / "b.crt", host.chain, 0o644)
        keep(self.folder / "b.key", host.private, 0o604)
        self.assert_refused("b.crt", "b.key: everybody may read the private key")

    def test_unreadable(self) -> None:
        """Not ours to read. (To root all is readable, so this one asks for a file in a file.)"""
        self.keep_pair("a.pem", issue("a.test"))
        self.assert_refused("a.pem/b.pem", "Not a directory$")
        if os.geteuid():
            (self.folder / "a.pem").chmod(0)
            self.assert_refused("a.pem", "Permission denied$")

    def test_weak_key(self) -> None:
        """OpenSSL's own reason, in our sentence."""
        self.keep_pair("a.pem", issue("a.test", key=rsa_key(1024)))
        self.assert_refused("a.pem", "OpenSSL refuses it: ee key too small")

    def test_malformed_name(self) -> None:
        """A wildcard where none may be is an error of the authority that no browser forgives."""
        self.keep_pair("a.pem", issue("a.*.test"))
        self.assert_refused("a.pem", "the names in the certificate are malformed")

    def test_one_of_many(self) -> None:
        """The one of a folder that is broken is named."""
        self.keep_pair("a.pem", issue("a.test"))
        keep(self.folder / "b.pem", b"")
        self.assert_refused("", "b.pem: no certificate in PEM")

    def test_no_authorities(self) -> None:
        """The file of ``--client-ca``."""
        path = keep(self.folder / "ca.pem", b"nothing")
        with self.assertRaisesRegex(BadCertificate, "ca.pem: no certificates of authorities in PEM"):
            ClientAuthorities.load(path, True)
        with self.assertRaisesRegex(BadCertificate, "other.pem: No such file"):
            ClientAuthorities.load(self.folder / "other.pem", True)


class NamesOfServerTests(FolderTestCase):
    """Which hosts a certificate is for."""

    def test_names(self) -> None:
        """Those of the subjectAltName, in lower case; the common name is none."""
        self.keep_pair("a.pem", issue("A.Test", "*.b.test", x509.IPAddress(ip_address("::1")), common_name="c.test"))
        self.assertEqual(self.load("a.pem").names, ("a.test", "*.b.test"))

    def test_none(self) -> None:
        self.keep_pair("a.pem", issue(common_name="c.test"))
        self.assertEqual(self.load("a.pem").names, ())


class StapleTests(FolderTestCase):
    """The OCSP response beside a certificate."""

    def setUp(self) -> None:
        super().setUp()
        self.host = issue("a.test", by=authority())
        self.keep_pair("a.pem", self.host)

    def staple(self, response: bytes) -> object:
        keep(self.folder / "a.pem.ocsp", response)
        return load_staple(self.load("a.pem"), datetime.now(UTC))

    def assert_refused(self, response: bytes, sentence: str) -> None:
        with self.assertRaisesRegex(BadCertificate, f"a.pem.ocsp: .*{sentence}"):
            self.staple(response)

    def test_good(self) -> None:
        self.assertIsNone(load_staple(self.load("a.pem"), datetime.now(UTC)))
        self.assertIsNotNone(self.staple(response_for(self.host, authority())))

    def test_not_for_now(self) -> None:
        """Expired, or of the future."""
        self.assert_refused(response_for(self.host, authority(), -2 * DAY, -DAY / 24), "is good from .*, not now")
        self.assert_refused(response_for(self.host, authority(), DAY, 2 * DAY), "is good from .*, not now")

    def test_without_end(self) -> None:
        self.assert_refused(response_for(self.host, authority(), end=None), "does not say how long it is good")

    def test_of_another(self) -> None:
        self.assert_refused(response_for(issue("a.test", by=authority()), authority()), "no OCSP response for a.pem")

    def test_no_response(self) -> None:
        """Garbage, and a responder that was too busy."""
        self.assert_refused(b"<html>", "no OCSP response for a.pem in DER")
        busy = ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.TRY_LATER)
        self.assert_refused(busy.public_bytes(Encoding.DER), "the responder's answer is TRY_LATER")


class NamesOfClientTests(SynchronousTestCase):
    """Who a client is, by its certificate."""

    def assert_names(self, pair: Pair, *names: str) -> None:
        self.assertEqual(names_of(pair.certificate), list(names))

    def test_each_kind(self) -> None:
        """Hosts, mail addresses, URIs; what is case-insensitive of them is in lower case. The common name is none."""
        pair = issue(
            x509.UniformResourceIdentifier("spiffe://Example.test/Backup"),
            x509.RFC822Name("Alice@Example.TEST"),
            "Backup.Example.TEST",
            x509.IPAddress(ip_address("127.0.0.1")),
            common_name="root",
        )
        self.assert_names(pair, "backup.example.test", "Alice@example.test", "spiffe://Example.test/Backup")

    def test_common_name(self) -> None:
        """It counts where there is no subjectAltName, and there is one of it."""
        self.assert_names(issue(common_name="alice"), "alice")
        self.assert_names(issue(x509.IPAddress(ip_address("127.0.0.1")), common_name="alice"))
        self.assert_names(issue(common_name=None))

    def test_names_that_pass_for_others(self) -> None:
        """A host that looks like a mail address, a wildcard, and names with what ends a line or a string."""
        self.assert_names(issue("alice@example.test", "*.example.test", "a\nb", "a\0.test", "a b"))
        self.assert_names(issue(x509.UniformResourceIdentifier("alice"), x509.UniformResourceIdentifier("a:b\nc")))
        self.assert_names(issue(common_name="alice\nbob"))

    def test_no_tls(self) -> None:
        """A plain connection is nobody's."""
        self.assertEqual(identity_of(object()), [])


class WholeTests(FolderTestCase):
    """Several at once."""

    def test_in_order(self) -> None:
        """In the order of the options, each once; the first is the default."""
        for name in ("b", "a", "c"):
            self.keep_pair(f"{name}.pem", issue(f"{name}.test", key=ec.generate_private_key(ec.SECP384R1())))
        contexts = Contexts([self.folder / "b.pem", self.folder, self.folder / "b.pem"])
        self.assertEqual([one.names for one in contexts.identities], [("b.test",), ("a.test",), ("c.test",)])
        far = contexts.identities[0].chain[0].not_valid_after_utc
        self.assertGreater(far, datetime.now(UTC) + timedelta(days=29))
