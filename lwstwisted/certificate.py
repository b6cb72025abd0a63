"""A self-signed certificate for trying things out on one's own machine.

What makes it acceptable to ``curl --cacert`` and to Python's ``ssl`` alike (RFC 5280
section 4.2): it names ``localhost`` and both loopback addresses in subjectAltName, and
it is an end entity (``CA:FALSE``), because strict verifiers refuse a CA as a server. It
has no keyUsage: without keyCertSign some verifiers see no self-signed certificate in it,
and with keyCertSign it would have to be a CA.
"""

from __future__ import annotations

import os
import tempfile
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFETIME = timedelta(days=365)
"""Verifiers refuse far longer lives; Apple's limit, the shortest so far, is 398 days."""

CLOCK_SKEW = timedelta(days=1)
"""How far back it starts to be valid, for clients whose clock is behind, such as containers and VMs."""

RENEW_BEFORE = timedelta(days=1)
"""What must be left of its life for it to be used again: a server started now may run for a day."""


def ensure_development_certificate(path: Path) -> Path:
    """Make sure that ``path`` holds a private key and a certificate for localhost.

    A pair that is good for another :data:`RENEW_BEFORE` is left alone. Anything else there
    is replaced, atomically: a reader sees the old file or the new one. The file can be
    read by its owner only.

    :param path: a PEM file; missing folders are made.
    :returns: ``path``, for use as both private key and certificate.
    :raises OSError: if it cannot be read or written.
    """
    now = datetime.now(UTC)
    if not _is_usable(path, now):
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, _make_pair(now))
    return path


def _is_usable(path: Path, now: datetime) -> bool:
    try:
        pem = path.read_bytes()
    except FileNotFoundError:
        return False
    try:
        key = serialization.load_pem_private_key(pem, password=None)
        certificate = x509.load_pem_x509_certificate(pem)
    except (ValueError, TypeError):  # no PEM, one half missing; a key with a password
        return False
    return (
        key.public_key() == certificate.public_key()
        and certificate.not_valid_before_utc <= now
        and certificate.not_valid_after_utc - now >= RENEW_BEFORE
    )


def _make_pair(now: datetime) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lwstwisted development")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + LIFETIME)
        .add_extension(
            x509.SubjectAlternativeName(
                [
                    x509.DNSName("localhost"),
                    x509.IPAddress(ip_address("127.0.0.1")),
                    x509.IPAddress(ip_address("::1")),
                ]
            ),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ) + certificate.public_bytes(serialization.Encoding.PEM)


def _replace(path: Path, content: bytes) -> None:
    # mkstemp opens with O_EXCL and mode 0600. No fsync: a file lost to a power cut is made anew.
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
