"""What connections are made with: a context for each certificate, chosen by the name of the host that a client wants.

They are made anew when a file has changed, and all of them change together. A connection keeps what it was made with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from OpenSSL import SSL
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from zope.interface import implementer

from lwstwisted.tls.certificates import (
    BadCertificate,
    Identity,
    Source,
    Stamp,
    Staple,
    find,
    load,
    load_staple,
    stamp_of,
)
from lwstwisted.tls.clients import ClientAuthorities
from lwstwisted.tls.profiles import INTERMEDIATE, Profile, new_context
from lwstwisted.tls.tickets import ROTATION, Front, ServerConnection

LOOK_INTERVAL = 10.0
"""Seconds between looks at the files; a look is a few system calls for each."""

HTTP_1_1 = (b"http/1.1",)

_log = Logger()


@dataclass(frozen=True, slots=True)
class Held:
    """A certificate in use.

    :ivar stamp: of its files, when they were read.
    """

    stamp: Stamp
    identity: Identity
    staple: Staple | None
    context: SSL.Context


@implementer(IOpenSSLServerConnectionCreator)
class Contexts:
    """Makes the server's end of TLS connections.

    :param paths: of certificates, see ``certificates.py``; the first is for clients that name no host of ours.
    :param profile: what is agreed on.
    :param client_ca: file with the authorities that may say who a client is; without it nobody is asked.
    :param client_required: whether a client without a certificate is turned away.
    :param protocols: for ALPN, the best one first.
    :param seconds: a monotonic clock.
    :param now: the time of day.
    :raises BadCertificate: for any that can't be used.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        profile: Profile = INTERMEDIATE,
        client_ca: Path | None = None,
        client_required: bool = True,
        protocols: Sequence[bytes] = HTTP_1_1,
        seconds: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._paths = list(paths)
        self._profile = profile
        self._client_ca = client_ca
        self._client_required = client_required
        self._protocols = protocols
        self._seconds = seconds
        self._now = now
        self._call: LoopingCall | None = None
        self._found: dict[Path, list[Source]] = {}
        self._held: dict[Source, Held] = {}
        self._clients: ClientAuthorities | None = None
        self._clients_in_use: ClientAuthorities | None = None
        self._clients_stamp: tuple[int, ...] | None = None
        self._by_name: dict[str, SSL.Context] = {}
        self._fronts: list[Front] = []
        self._complaints: set[str] = set()
        self._is_strict = True
        self._gather(anew=True)
        self._is_strict = False

    @property
    def identities(self) -> list[Identity]:
        """What is in use, the default one first."""
        return [held.identity for held in self._held.values()]

    def expiries(self) -> list[tuple[str, float]]:
        """The first name of each certificate in use, or its file, and when it ends, in seconds since the epoch."""
        return [
            (one.names[0] if one.names else str(one.source.chain), one.chain[0].not_valid_after_utc.timestamp())
            for one in self.identities
        ]

    def serverConnectionForTLS(self, tlsProtocol: Any) -> SSL.Connection:
        """See ``IOpenSSLServerConnectionCreator``."""
        return ServerConnection(self._fronts)

    def start(self, reactor: Any) -> None:
        """Look at the files from time to time."""
        self._call = LoopingCall(self.look)
        self._call.clock = reactor
        self._call.start(LOOK_INTERVAL, now=False)

    def stop(self) -> None:
        """Look no more."""
        if self._call is not None:
            self._call.stop()
            self._call = None

    def reload(self) -> None:
        """Read all files again. What can't be used any more is logged, and stays as it was."""
        self._complaints.clear()
        self._go_over(anew=True)

    def look(self) -> None:
        """Read files that have changed, as :meth:`reload` does, and replace the keys of tickets that are old."""
        self._go_over(anew=False)
        if self._seconds() - self._fronts[0].born >= ROTATION:
            self._fronts = [self._new_front(), self._fronts[0]]

    def _go_over(self, anew: bool) -> None:
        try:
            self._gather(anew)
        except Exception:  # a file that nobody foresaw must not end the looks at all others
            _log.failure("certificates could not be read again; those in use stay")

    def _gather(self, anew: bool) -> None:
        """Bring everything up to date, and take it into use at once.

        :param anew: also what has not changed.
        """
        complaints: list[str] = []
        self._look_at_clients(anew, complaints)
        held: dict[Source, Held] = {}
        for source in self._look_for_sources(complaints):
            former = self._held.get(source)
            stamp = source.stamp()
            if former is None or anew or stamp != former.stamp:
                try:
                    held[source] = self._load(source, stamp, complaints)
                except BadCertificate as error:
                    self._complain(error, complaints)
                    if former is not None:
                        held[source] = former
            else:
                held[source] = former
                if former.staple is not None and former.staple.expires <= self._now():
                    complaints.append(f"{source.response}: the response has expired, and is not stapled any more")
        for text in complaints:
            if text not in self._complaints:
                _log.error("{text}", text=text)
        self._complaints = set(complaints)
        held = held or self._held  # a folder may have nothing but new files, none of them of use
        clients_changed = self._clients != self._clients_in_use
        if clients_changed:  # also for what could not be read again: nobody is let in by those of before
            held = {source: self._hold(one.stamp, one.identity, one.staple) for source, one in held.items()}
        self._held = held
        self._by_name = {}
        for one in held.values():
            for name in one.identity.names:
                self._by_name.setdefault(name, one.context)
        self._default = next(iter(held.values())).context
        if clients_changed or not self._fronts:
            # Not one ticket of before: whether a session is resumed, and with it who its client was, is decided by
            # the context that a connection is made with, before the switch to that of its host.
            self._fronts = [self._new_front()]
        self._clients_in_use = self._clients

    def _look_at_clients(self, anew: bool, complaints: list[str]) -> None:
        if self._client_ca is None:
            return
        stamp = stamp_of(self._client_ca)
        if not anew and stamp == self._clients_stamp:
            return
        try:
            self._clients = ClientAuthorities.load(self._client_ca, self._client_required)
            self._clients_stamp = stamp
        except BadCertificate as error:
            self._complain(error, complaints)

    def _look_for_sources(self, complaints: list[str]) -> list[Source]:
        for path in self._paths:
            try:
                self._found[path] = find(path)
            except BadCertificate as error:
                self._complain(error, complaints)
        # Each once, in the order of the paths.
        return list(dict.fromkeys(source for path in self._paths for source in self._found[path]))

    def _complain(self, error: BadCertificate, complaints: list[str]) -> None:
        if self._is_strict:
            raise error
        complaints.append(f"{error}; what was read before stays in use")

    def _load(self, source: Source, stamp: Stamp, complaints: list[str]) -> Held:
        now = self._now()
        identity = load(source, now)
        staple = None
        try:
            staple = load_staple(identity, now)
        except BadCertificate as error:
            complaints.append(f"{error}; nothing is stapled")
        found = self._hold(stamp, identity, staple)
        _log.info(
            "{path}: for {names}, until {end} UTC",
            path=str(source.chain),
            names=", ".join(identity.names) or "no host in particular",
            end=f"{identity.chain[0].not_valid_after_utc:%F %T}",
        )
        return found

    def _hold(self, stamp: Stamp, identity: Identity, staple: Staple | None) -> Held:
        context = new_context(self._profile)
        self._dress(context, identity, staple)
        return Held(stamp, identity, staple, context)

    def _new_front(self) -> Front:
        context = new_context(self._profile)
        if self._clients is not None:
            context.set_verify(self._clients.mode)
        return Front(context, self._choose, self._seconds())

    def _choose(self, connection: SSL.Connection) -> None:
        name = (connection.get_servername() or b"").decode("ascii", "replace").lower()
        context = self._by_name.get(name)
        if context is None:
            # A wildcard stands for the whole first label, and for one label only (RFC 9525 section 6.3).
            context = self._by_name.get("*." + name.partition(".")[2], self._default)
        connection.set_context(context)

    def _dress(self, context: SSL.Context, identity: Identity, staple: Staple | None) -> None:
        """Give a context all that depends on its certificate."""
        key, chain = identity.key, identity.chain
        if not isinstance(key, RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey | Ed448PrivateKey):
            raise BadCertificate(f"{identity.source.chain}: a key of this kind can't sign; make one of EC or RSA")
        try:
            context.use_certificate(chain[0])
            for certificate in chain[1:]:
                context.add_extra_chain_cert(certificate)
            context.use_privatekey(key)
            context.check_privatekey()
        except SSL.Error as error:
            why = ", ".join(reason for *_, reason in error.args[0]) if error.args else "unknown"
            raise BadCertificate(f"{identity.source.chain}: OpenSSL refuses it: {why}") from None
        if self._clients is not None:
            self._clients.apply(context)
        context.set_alpn_select_callback(self._select_protocol)
        if staple is not None:
            kept = staple
            context.set_ocsp_server_callback(lambda _, __: kept.response if self._now() < kept.expires else b"")

    def _select_protocol(self, _: SSL.Connection, offered: list[bytes]) -> bytes:
        for protocol in self._protocols:
            if protocol in offered:
                return protocol
        # RFC 7301 section 3.2: who speaks none of ours gets an alert, and not an answer that it can't read.
        raise SSL.Error([("ALPN", "", "no application protocol in common")])
