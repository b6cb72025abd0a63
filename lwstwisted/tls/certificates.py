"""Who we are: keys and certificates in files, found, read and checked.

A path is one of these, as the programs that write certificates leave them:

* a file with the key and the chain, the server's own certificate first;
* a file with the chain whose key lies beside it: ``NAME.key`` beside ``NAME.crt`` or ``NAME.pem``, or ``privkey.pem``
  beside ``fullchain.pem``;
* a folder that certbot made for one certificate, with the latter two in it;
* a folder of all of these: its files ``*.pem`` and ``*.crt`` and its folders of certbot, in the order of their names.

Beside each chain may lie a response of its authority's OCSP responder: ``NAME.pem.ocsp`` beside ``NAME.pem``.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import ocsp
from service_identity import CertificateError
from service_identity.hazmat import DNSPattern

CHAIN_OF_CERTBOT, KEY_OF_CERTBOT = "fullchain.pem", "privkey.pem"
SUFFIXES = (".pem", ".crt")

LONGEST = 1 << 20
"""Bytes of a file; a chain has a few KiB."""

Stamp = tuple[tuple[int, ...] | None, ...]


class BadCertificate(ValueError):
    """A key or a certificate that can't be used. Its sentence names the file."""


@dataclass(frozen=True, slots=True)
class Source:
    """The files of one certificate.

    :ivar chain: with the certificate in it.
    """

    chain: Path

    @property
    def key(self) -> Path:
        """Where the key is if it isn't in the same file."""
        if self.chain.name == CHAIN_OF_CERTBOT:
            return self.chain.with_name(KEY_OF_CERTBOT)
        return self.chain.with_suffix(".key")

    @property
    def response(self) -> Path:
        """Of OCSP."""
        return self.chain.with_name(self.chain.name + ".ocsp")

    def stamp(self) -> Stamp:
        """What changes when one of the files does."""
        return tuple(stamp_of(path) for path in (self.chain, self.key, self.response))


@dataclass(frozen=True, slots=True)
class Identity:
    """A key, and certificates that say whose it is.

    :ivar source: where it was read.
    :ivar chain: the server's certificate, and those of authorities behind it.
    :ivar names: hosts that it is for, in lower case; with ``*.`` in front, those one label below.
    """

    source: Source
    key: PrivateKeyTypes
    chain: tuple[x509.Certificate, ...]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Staple:
    """What an authority says of a certificate.

    :ivar response: of the OCSP responder, in DER.
    :ivar expires: the time of its next update.
    """

    response: bytes
    expires: datetime


def stamp_of(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is replaced or written to; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_mode


def read(path: Path) -> bytes:
    """Read a file that is small if it is what we want.

    :raises BadCertificate: if it can't be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(LONGEST)
    except OSError as error:
        raise BadCertificate(f"{path}: {error.strerror}") from None


def find(path: Path) -> list[Source]:
    """The certificates that a path stands for; at least one.

    :raises BadCertificate: if there is none.
    """
    if not path.is_dir():
        return [Source(path)]
    try:
        found = list(_in_folder(path))
    except OSError as error:
        raise BadCertificate(f"{path}: {error.strerror}") from None
    if not found:
        raise BadCertificate(f"{path}: no {CHAIN_OF_CERTBOT}, no *.pem and no *.crt in this folder")
    return found


def _in_folder(folder: Path) -> Iterator[Source]:
    if (folder / CHAIN_OF_CERTBOT).is_file():
        yield Source(folder / CHAIN_OF_CERTBOT)
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix in SUFFIXES and path.is_file():
            yield Source(path)
        elif (path / CHAIN_OF_CERTBOT).is_file():
            yield Source(path / CHAIN_OF_CERTBOT)


def load(source: Source, now: datetime) -> Identity:
    """Read a certificate and its key.

    :raises BadCertificate: if they can't be used now; it says why.
    """
    pem = read(source.chain)
    try:
        chain = tuple(x509.load_pem_x509_certificates(pem))
    except ValueError as error:
        raise BadCertificate(f"{source.chain}: no certificate in PEM ({error})") from None
    key_file, key = _find_key(source, pem)
    try:
        if os.stat(key_file).st_mode & (stat.S_IROTH | stat.S_IWOTH):
            raise BadCertificate(f"{key_file}: everybody may read the private key; chmod o= {key_file}")
    except OSError as error:
        raise BadCertificate(f"{key_file}: {error.strerror}") from None
    public = key.public_key()
    if public != chain[0].public_key():
        if any(public == other.public_key() for other in chain):
            raise BadCertificate(f"{source.chain}: the certificate of the server has to come first")
        raise BadCertificate(f"{source.chain}: the private key in {key_file} is not the one of this certificate")
    if not chain[0].not_valid_before_utc <= now <= chain[0].not_valid_after_utc:
        begin, end = chain[0].not_valid_before_utc, chain[0].not_valid_after_utc
        raise BadCertificate(f"{source.chain}: the certificate is valid from {begin:%F %T} to {end:%F %T} UTC, not now")
    try:
        names = tuple(_names(chain[0]))
    except (CertificateError, ValueError) as error:
        raise BadCertificate(f"{source.chain}: the names in the certificate are malformed ({error})") from None
    return Identity(source, key, chain, names)


def _names(certificate: x509.Certificate) -> Iterator[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:  # the common name says nothing of hosts (RFC 9525 section 2)
        return
    for name in names.get_values_for_type(x509.DNSName):
        yield DNSPattern.from_bytes(name.encode()).pattern.decode()


def _find_key(source: Source, pem: bytes) -> tuple[Path, PrivateKeyTypes]:
    path = source.chain
    if b"PRIVATE KEY-----" not in pem:
        path = source.key
        if stamp_of(path) is None:
            raise BadCertificate(f"{source.chain}: no private key in it, and no {path.name} beside it")
        pem = read(path)
    try:
        return path, load_pem_private_key(pem, None)
    except TypeError:
        raise BadCertificate(f"{path}: the private key has a password; store it without one") from None
    except Exception as error:  # ValueError, or one of several of cryptography's
        raise BadCertificate(f"{path}: no private key in PEM that can be used ({error})") from None


def load_staple(identity: Identity, now: datetime) -> Staple | None:
    """Read the OCSP response beside a certificate.

    :returns: None where there is none.
    :raises BadCertificate: if it isn't one for this certificate, or not for now.
    """
    path = identity.source.response
    if stamp_of(path) is None:
        return None
    data = read(path)
    try:
        response = ocsp.load_der_ocsp_response(data)
        if response.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
            raise BadCertificate(f"{path}: the responder's answer is {response.response_status.name}")
        (single,) = [one for one in response.responses if one.serial_number == identity.chain[0].serial_number]
    except BadCertificate:
        raise
    except ValueError as error:
        raise BadCertificate(f"{path}: no OCSP response for {identity.source.chain.name} in DER ({error})") from None
    if single.next_update_utc is None:
        raise BadCertificate(f"{path}: the response does not say how long it is good")
    if not single.this_update_utc <= now < single.next_update_utc:
        begin, end = single.this_update_utc, single.next_update_utc
        raise BadCertificate(f"{path}: the response is good from {begin:%F %T} to {end:%F %T} UTC, not now")
    return Staple(data, single.next_update_utc)
