"""An authority that signs what tests of TLS need, the files that it is kept in, and clients that look at a server.

Nothing here is a test.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID

DAY = timedelta(days=1)
PATIENCE = 20
"""Seconds that a client may take."""

FOR_SERVERS, FOR_CLIENTS = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: Any

    @property
    def chain(self) -> bytes:
        """The certificate in PEM."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def private(self) -> bytes:
        """The key in PEM."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())  # type: ignore[no-any-return]

    @property
    def pem(self) -> bytes:
        """Both."""
        return self.chain + self.private

    @property
    def serial(self) -> str:
        """As ``openssl x509 -serial`` prints it."""
        text = f"{self.certificate.serial_number:X}"
        return text.zfill(len(text) + len(text) % 2)


def issue(
    *names: str | x509.GeneralName,
    by: Pair | None = None,
    begin: timedelta = -DAY,
    end: timedelta = 30 * DAY,
    common_name: str | None = "somebody",
    usage: Sequence[x509.ObjectIdentifier] = (),
    key: Any = None,
    ca: bool = False,
) -> Pair:
    """Make a certificate.

    :param names: of its subjectAltName; a text is a host.
    :param by: who signs it; itself if nobody is named.
    :param begin: from now.
    :param end: from now.
    :param usage: what it is for.
    """
    key = key or ec.generate_private_key(ec.SECP256R1())
    signing = by.key if by else key
    parts = [] if common_name is None else [x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)]
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(parts))
        .issuer_name(by.certificate.subject if by else x509.Name(parts))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begin)
        .not_valid_after(now + end)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
    )
    if ca:
        signs = dict.fromkeys(("key_cert_sign", "crl_sign"), True)
        others = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
        nothing = dict.fromkeys((*others, "encipher_only", "decipher_only"), False)
        builder = builder.add_extension(x509.KeyUsage(**signs, **nothing), critical=True)
    if names:
        general = [x509.DNSName(name) if isinstance(name, str) else name for name in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False)
    if usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
    return Pair(builder.sign(signing, hashes.SHA256()), key)


@cache
def authority(name: str = "authority") -> Pair:
    """An authority of these tests; each name is one of its own."""
    return issue(common_name=name, ca=True)


@cache
def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    """A key that takes long to make."""
    return rsa.generate_private_key(65537, bits)


def keep(path: Path, content: bytes, mode: int = 0o600) -> Path:
    """Put a file in the place of another, as careful programs do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
    new.replace(path)
    return path


def response_for(pair: Pair, by: Pair, begin: timedelta = -DAY, end: timedelta | None = DAY) -> bytes:
    """What the OCSP responder of an authority says of a certificate that is good."""
    now = datetime.now(UTC)
    return (
        ocsp.OCSPResponseBuilder()
        .add_response(
            pair.certificate,
            by.certificate,
            hashes.SHA256(),
            ocsp.OCSPCertStatus.GOOD,
            now + begin,
            None if end is None else now + end,
            None,
            None,
        )
        .responder_id(ocsp.OCSPResponderEncoding.HASH, by.certificate)
        .sign(by.key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )


def s_client(port: int, *options: str | Path, say: bytes = b"hello\n") -> str:
    """Let OpenSSL's own client connect, say something and read up to the end.

    :returns: all that it says of the handshake, and what the server said.
    """
    words = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-ign_eof", *map(str, options)]
    done = subprocess.run(words, input=say, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
    return done.stdout.decode("ascii", "replace")
