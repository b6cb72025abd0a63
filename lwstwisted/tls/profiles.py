"""What is agreed on with a client: Mozilla's server side TLS, version 6.0 (https://ssl-config.mozilla.org/guidelines/).

All suites have forward secrecy and are AEADs, so the order is the client's: it knows best whether it computes AES in
hardware. Of 5.7 the finite-field suites are left out, as 6.0 does: every client that has them has those on curves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL

SUITES_OF_1_3 = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")

GROUPS = ("X25519MLKEM768", "X25519", "prime256v1", "secp384r1")
"""For the key exchange. The first keeps what is recorded today from the quantum computers of later on; OpenSSL has it
from 3.5 on."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What a server agrees to.

    :ivar oldest: protocol version, as ``set_min_proto_version`` takes it.
    :ivar suites: of TLS 1.2, as OpenSSL calls them.
    """

    oldest: int
    suites: tuple[str, ...]


INTERMEDIATE = Profile(
    SSL.TLS1_2_VERSION,
    (
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-RSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-RSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        "ECDHE-RSA-CHACHA20-POLY1305",
    ),
)

MODERN = Profile(SSL.TLS1_3_VERSION, ())

PROFILES = {"intermediate": INTERMEDIATE, "modern": MODERN}


def new_context(profile: Profile) -> SSL.Context:
    """Make a server's context. It has no certificate, and tells no client to show one.

    Renegotiation and compression are off. So is the cache of sessions: a client keeps its own, in a ticket. Early data
    (0-RTT) is off as long as nobody switches it on, which pyOpenSSL can't.
    """
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(profile.oldest)
    context.set_options(SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # while a connection is idle, as Twisted's own contexts do
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_session_id(b"lwstwisted")  # without one, who showed a certificate can't resume
    context.set_tls13_ciphersuites(":".join(SUITES_OF_1_3).encode())
    if profile.suites:
        context.set_cipher_list(":".join(profile.suites).encode())
    set_groups(context, SSL)
    return context


def set_groups(context: SSL.Context, module: Any) -> None:
    """Allow :data:`GROUPS` only.

    That takes names beneath pyOpenSSL, for it sets one curve and no more. Without them it is the one curve that every
    client has.

    :param module: ``OpenSSL.SSL``.
    """
    try:
        set_list, forget = module._lib.SSL_CTX_set1_curves_list, module._lib.ERR_clear_error
        raw = context._context
    except AttributeError:
        context.set_tmp_ecdh(ec.SECP256R1())
        return
    if set_list(raw, ":".join(GROUPS).encode()) != 1:
        forget()  # else the next call of a connection would find the complaint, and fail
        set_list(raw, ":".join(GROUPS[1:]).encode())
