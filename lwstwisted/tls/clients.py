"""Whom we believe: certificates that clients show."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from OpenSSL import SSL, crypto

from lwstwisted.tls.certificates import BadCertificate, read

_DNS = re.compile(r"[0-9a-z_-]+(\.[0-9a-z_-]+)*", re.IGNORECASE)
_EMAIL = re.compile(r"[^@\s:]+@[^@\s:]+")
_URI = re.compile(r"[a-z][0-9a-z+.-]*:[!-~]+", re.IGNORECASE)
# No name of one kind looks like one of another: who may have a certificate for a host can't pass for a person.


@dataclass(frozen=True, slots=True)
class ClientAuthorities:
    """Who may say who a client is.

    :ivar certificates: of the authorities; each is believed by itself, be it a root or not.
    :ivar is_required: whether a client without a certificate is turned away.
    """

    certificates: tuple[x509.Certificate, ...]
    is_required: bool

    @classmethod
    def load(cls, path: Path, is_required: bool) -> ClientAuthorities:
        """Read a file.

        :raises BadCertificate: if it can't be read, or has none in it.
        """
        try:
            certificates = x509.load_pem_x509_certificates(read(path))
        except ValueError as error:
            raise BadCertificate(f"{path}: no certificates of authorities in PEM ({error})") from None
        return cls(tuple(certificates), is_required)

    def apply(self, context: SSL.Context) -> None:
        """Let a context verify certificates. One that says what it is for has to be for clients.

        Whether a client is asked for one is decided by what its connection is made with: see :attr:`mode`.
        """
        store = context.get_cert_store()
        assert store is not None
        store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
        for certificate in self.certificates:
            store.add_cert(crypto.X509.from_cryptography(certificate))
            context.add_client_ca(certificate)

    @property
    def mode(self) -> int:
        """For ``set_verify``."""
        return SSL.VERIFY_PEER | (SSL.VERIFY_FAIL_IF_NO_PEER_CERT if self.is_required else 0)


def identity_of(transport: Any) -> list[str]:
    """Who is at the other end of a TLS connection, by the certificate that was verified in its handshake.

    :param transport: as a protocol above TLS has it.
    :returns: what :func:`names_of` finds; nothing where no certificate was shown, or no TLS is spoken.
    """
    try:
        connection = transport.getHandle()
    except AttributeError:
        return []
    if not isinstance(connection, SSL.Connection):
        return []
    certificate = connection.get_peer_certificate(as_cryptography=True)
    return [] if certificate is None else names_of(certificate)


def names_of(certificate: x509.Certificate) -> list[str]:
    """The names of a client: hosts, mail addresses and URIs of its subjectAltName, in that order.

    The common name counts only where there is no such extension at all (RFC 6125 section 6.4.4). Hosts, and those of
    mail addresses, are in lower case. A wildcard is nobody's name.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return _common_name(certificate)
    except ValueError:  # an extension that can't be parsed says nothing
        return []
    found = [name.lower() for name in names.get_values_for_type(x509.DNSName) if _DNS.fullmatch(name)]
    for name in names.get_values_for_type(x509.RFC822Name):
        if _EMAIL.fullmatch(name):
            local, _, host = name.partition("@")
            found.append(f"{local}@{host.lower()}")
    found += [name for name in names.get_values_for_type(x509.UniformResourceIdentifier) if _URI.fullmatch(name)]
    return found


def _common_name(certificate: x509.Certificate) -> list[str]:
    found = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    name = found[0].value if len(found) == 1 else None
    return [name] if isinstance(name, str) and name and name.isprintable() else []
