"""Session tickets whose keys are replaced, while clients go on resuming with those that they have.

**The facts** (pyOpenSSL 26.4, OpenSSL 4.0). A server that keeps no sessions seals each into a ticket that its client
keeps. Who steals the keys of the tickets reads every connection that was resumed with them, so they have to be
replaced. OpenSSL makes them with the context, never replaces them, and pyOpenSSL has no call that sets them. The
context whose keys count is the one that a connection was made with: a switch to another one, as for SNI, leaves them.

**The decision.** A connection is made with a *front*: a context without a certificate, which switches to the one for
the client's host, and whose ticket keys are the only ones in use. Every :data:`ROTATION` there is a new front. The
former one stays as long as a ticket of its own is good: OpenSSL puts 16 random bytes that name its keys at the begin of
each ticket, in the open, so if they occur in a client's first record, its connection is made with that front.

**The price**: a connection waits for the whole first record before OpenSSL sees any of it, and where it belongs to the
former front, a connection that nothing was done with is thrown away. A front lives on while it has connections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import unpack_from
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL

ROTATION = 2 * 3600.0
"""Seconds that tickets are sealed with the same keys."""

LIFETIME = int(ROTATION)
"""Seconds that a ticket is good. Its keys are kept for so long after the last one was sealed, and no longer."""

KEY_NAME = 16
"""Bytes at the begin of a ticket."""

_HANDSHAKE = 22
_RECORD_HEADER = 5
_PRE_SHARED_KEY = 41


class Front:
    """What connections are made with for some time.

    :param context: without a certificate.
    :param choose: called when a client has said which host it wants, if it does; it switches the context.
    :param born: the time of now, in seconds.
    """

    def __init__(self, context: SSL.Context, choose: Callable[[SSL.Connection], None], born: float) -> None:
        context.set_timeout(LIFETIME)
        context.set_tlsext_servername_callback(choose)
        self.context = context
        self.born = born
        self.key_name = _key_name(context)


class ServerConnection(SSL.Connection):
    """A connection that is made with the front of its client's ticket.

    :param fronts: the newest one first.
    """

    def __init__(self, fronts: Sequence[Front]) -> None:
        super().__init__(fronts[0].context, None)
        # Kept for their callbacks, too: after the switch OpenSSL still calls what pyOpenSSL would have freed.
        self._fronts = fronts
        self._first_record: bytearray | None = bytearray() if len(fronts) > 1 else None

    def bio_write(self, buf: Any) -> int:
        """See ``SSL.Connection``."""
        if self._first_record is None:
            return super().bio_write(buf)
        self._first_record += buf
        if is_whole_record(self._first_record):
            first, self._first_record = bytes(self._first_record), None
            self._choose(first)
            super().bio_write(first)
        return len(buf)

    def _choose(self, first: bytes) -> None:
        chosen = next((front for front in self._fronts[1:] if front.key_name and front.key_name in first), None)
        if chosen is not None:
            protocol = self.get_app_data()
            super().__init__(chosen.context, None)
            self.set_accept_state()
            self.set_app_data(protocol)
        self._fronts = [chosen or self._fronts[0]]


def is_whole_record(data: bytes | bytearray) -> bool:
    """Whether a record of a handshake is there to its end, or will never be."""
    if data[:1] and data[0] != _HANDSHAKE:
        return True
    return len(data) >= _RECORD_HEADER and len(data) >= _RECORD_HEADER + int.from_bytes(data[3:5], "big")


def _key_name(front: SSL.Context) -> bytes:
    """Find out what a front's tickets begin with: by being its client, and looking at what one has to say then.

    :returns: nothing where that fails; its tickets are forgotten at the next rotation then.
    """
    ours = SSL.Context(SSL.TLS_CLIENT_METHOD)
    ours.set_min_proto_version(SSL.TLS1_3_VERSION)
    ours.set_tmp_ecdh(ec.SECP256R1())
    client, server = SSL.Connection(ours), SSL.Connection(front)
    client.set_connect_state()
    server.set_accept_state()
    server.set_verify(SSL.VERIFY_NONE)
    try:
        for sender, receiver in (client, server), (server, client), (client, server), (server, client):
            _go_on(sender)
            receiver.bio_write(sender.bio_read(1 << 16))
        _go_on(client)  # reads the ticket
        session = client.get_session()
        if session is None:
            return b""
        again = SSL.Connection(ours)
        again.set_connect_state()
        again.set_session(session)
        _go_on(again)
        return _ticket(again.bio_read(1 << 16))[:KEY_NAME]
    except SSL.Error:
        return b""


def _go_on(connection: SSL.Connection) -> None:
    try:
        connection.do_handshake()
        connection.recv(1)
    except SSL.WantReadError:
        pass


def _ticket(hello: bytes) -> bytes:
    """The first ticket in a ClientHello of our own (RFC 8446 section 4.1.2 and 4.2.11)."""
    at = _RECORD_HEADER + 4 + 2 + 32  # headers, version, random
    at += 1 + hello[at]  # session id
    at += 2 + int.from_bytes(hello[at : at + 2], "big")  # suites
    at += 1 + hello[at] + 2  # compression; how long the extensions are
    while at < len(hello):
        kind, size = unpack_from(">HH", hello, at)
        if kind == _PRE_SHARED_KEY:
            return hello[at + 8 : at + 4 + size]  # behind the lengths of the list and of its first entry
        at += 4 + size
    return b""
