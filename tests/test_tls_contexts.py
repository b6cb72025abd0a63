"""TLS as clients meet it: OpenSSL's own client, of another version than ours, shakes hands with a server of ours.

What is refused is refused by an alert: the client did offer it (RFC 8446 section 6.2 has the numbers).
"""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from OpenSSL import SSL
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import AdoptedStreamServerEndpoint, TCP4ServerEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.threads import deferToThread
from twisted.logger import LogLevel, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase, TestCase

from lwstwisted.loop.tls import TLSServer, TLSTransport
from lwstwisted.tls.clients import identity_of
from lwstwisted.tls.contexts import LOOK_INTERVAL, Contexts
from lwstwisted.tls.listening import tls_over
from lwstwisted.tls.profiles import GROUPS, MODERN, set_groups
from lwstwisted.tls.tickets import KEY_NAME, ROTATION, ServerConnection, is_whole_record
from tests.tls_authority import (
    DAY,
    FOR_CLIENTS,
    FOR_SERVERS,
    PATIENCE,
    Pair,
    authority,
    issue,
    keep,
    response_for,
    rsa_key,
    s_client,
)

SECURITY_LEVEL_0 = "ALL:@SECLEVEL=0"
"""Suites of a client that takes everything."""

HANDSHAKE_FAILURE, CERTIFICATE_EXPIRED, UNKNOWN_CA, PROTOCOL_VERSION = 40, 45, 48, 70
NO_RENEGOTIATION, CERTIFICATE_REQUIRED, NO_APPLICATION_PROTOCOL = 100, 116, 120
UNSUPPORTED_CERTIFICATE = 43

AGREED = "I heard you"


class Answering(Protocol):
    """Says who the client is, and which protocol was agreed on, when that has said something; then it closes."""

    def dataReceived(self, data: bytes) -> None:
        transport: Any = self.transport
        protocol = transport.getHandle().get_alpn_proto_negotiated()
        self.factory.transports.append(transport)  # type: ignore[union-attr]
        transport.write(f"{AGREED}, {identity_of(transport)} {protocol!r}\n".encode())
        transport.loseConnection()


def alert(number: int) -> str:
    return f"SSL alert number {number}\n"


class ServerTestCase(TestCase):
    """A server on the global reactor.

    :ivar clock: what its contexts take for the time.
    """

    timeout = 60

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.clock = Clock()
        self.pool = ThreadPoolExecutor(4)
        self.addCleanup(self.pool.shutdown)
        self.log: list[str] = []
        globalLogPublisher.addObserver(self.note)
        self.addCleanup(globalLogPublisher.removeObserver, self.note)

    def note(self, event: Any) -> None:
        if event.get("log_namespace", "").startswith("lwstwisted.tls") and event["log_level"] is not LogLevel.info:
            self.log.append(str(event.get("text", event)))

    def keep_pair(self, name: str, pair: Pair) -> Path:
        return keep(self.folder / name, pair.pem)

    async def serve(self, *paths: Path, endpoint: Any = None, **how: Any) -> int:
        """Listen.

        :param endpoint: what TLS is put on; a port of loopback by default.
        :returns: the port.
        """
        from twisted.internet import reactor

        self.contexts = Contexts(paths, seconds=self.clock.seconds, **how)
        factory = self.factory = Factory.forProtocol(Answering)
        factory.transports = []  # type: ignore[attr-defined]
        plain = endpoint or TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
        port: Any = await tls_over(plain, self.contexts, reactor).listen(factory)
        self.addCleanup(port.stopListening)
        return int(port.getHost().port)

    async def ask(self, port: int, *options: str | Path, say: bytes = b"hello\n") -> str:
        found: Deferred[str] = deferToThread(s_client, port, *options, say=say)
        return await found

    async def ask_each(self, port: int, each: Sequence[Sequence[str]]) -> list[str]:
        """Let several clients ask, a few at a time."""

        def all_of_them() -> list[str]:
            return list(self.pool.map(lambda options: s_client(port, *options), each))

        found: Deferred[list[str]] = deferToThread(all_of_them)
        return await found


class ProfileTests(ServerTestCase):
    """What is agreed on, and what is not."""

    async def serve_both(self, **how: Any) -> tuple[int, int]:
        """Servers with a certificate of each kind."""
        ec = await self.serve(self.keep_pair("ec.pem", issue("a.test")), **how)
        return ec, await self.serve(self.keep_pair("rsa.pem", issue("a.test", key=rsa_key())), **how)

    @pytest.mark.slow
    async def test_old_protocols(self) -> None:
        """TLS 1.0 and 1.1 are refused, 1.2 and 1.3 are not; with "modern" 1.3 alone is left."""
        port = await self.serve(self.keep_pair("a.pem", issue("a.test")))
        old = ["-cipher", SECURITY_LEVEL_0]
        said = await self.ask_each(port, [["-tls1", *old], ["-tls1_1", *old], ["-tls1_2"], ["-tls1_3"]])
        self.assertEqual([alert(PROTOCOL_VERSION) in one for one in said], [True, True, False, False])
        self.assertEqual([AGREED in one for one in said], [False, False, True, True])
        port = await self.serve(self.folder / "a.pem", profile=MODERN)
        said = await self.ask_each(port, [["-tls1_2"], ["-tls1_3"]])
        self.assertEqual([alert(PROTOCOL_VERSION) in one for one in said], [True, False])
        self.assertEqual([AGREED in one for one in said], [False, True])

    @pytest.mark.slow
    async def test_suites(self) -> None:
        """Each of Mozilla's suites works, with the kind of certificate that it is for; the others are refused."""
        for port, kind in zip(await self.serve_both(), ("ECDSA", "RSA"), strict=True):
            names = [f"ECDHE-{kind}-{rest}" for rest in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")]
            said = await self.ask_each(port, [["-tls1_2", "-cipher", name] for name in names])
            for one, name in zip(said, names, strict=True):
                self.assertIn(AGREED, one)
                self.assertRegex(one, rf"Cipher is {name}\n")
            weak = [f"ECDHE-{kind}-AES256-SHA384", f"ECDHE-{kind}-AES128-SHA"]
            weak += ["AES128-GCM-SHA256", "DHE-RSA-AES128-GCM-SHA256"] if kind == "RSA" else []
            said = await self.ask_each(port, [["-tls1_2", "-cipher", f"{name}:@SECLEVEL=0"] for name in weak])
            self.assertEqual([alert(HANDSHAKE_FAILURE) in one for one in said], [True] * len(weak))
            suites = ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"]
            said = await self.ask_each(port, [["-tls1_3", "-ciphersuites", name] for name in suites])
            self.assertEqual([f"Cipher is {name}" in one for one, name in zip(said, suites, strict=True)], [True] * 3)
            (ccm,) = await self.ask_each(port, [["-tls1_3", "-ciphersuites", "TLS_AES_128_CCM_SHA256"]])
            self.assertIn(alert(HANDSHAKE_FAILURE), ccm)

    async def test_preference(self) -> None:
        """The client's first choice wins: a phone without AES in hardware gets ChaCha20."""
        port = await self.serve(self.keep_pair("a.pem", issue("a.test")))
        names = ["ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES128-GCM-SHA256"]
        for order in (names, names[::-1]):
            said = await self.ask(port, "-tls1_2", "-cipher", ":".join(order))
            self.assertIn(f"Cipher is {order[0]}\n", said)

    @pytest.mark.slow
    async def test_groups(self) -> None:
        """X25519 and the two curves of NIST, in both protocols; none of the others that OpenSSL has."""
        # With a key of RSA: in TLS 1.2 the list also says for which keys of EC the client has a use.
        port = await self.serve(self.keep_pair("a.pem", issue("a.test", key=rsa_key())))
        good, bad = ["X25519", "P-256", "P-384"], ["P-521", "X448", "ffdhe2048"]
        for version in ("-tls1_2", "-tls1_3"):
            said = await self.ask_each(port, [[version, "-groups", name] for name in good + bad])
            self.assertEqual([AGREED in one for one in said], [True] * 3 + [False] * 3, version)
            self.assertEqual([alert(HANDSHAKE_FAILURE) in one for one in said], [False] * 3 + [True] * 3, version)

    async def test_post_quantum_group(self) -> None:
        """A client that has ML-KEM gets it, where our OpenSSL has it."""
        port = await self.serve(self.keep_pair("a.pem", issue("a.test")))

        def group() -> str | None:
            client = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD), socket.create_connection(("127.0.0.1", port)))
            client.set_connect_state()
            client.do_handshake()
            found = client.get_group_name()
            client.close()
            return found

        self.assertEqual(await deferToThread(group), "X25519MLKEM768")

    def test_groups_without_the_names_beneath(self) -> None:
        """On a pyOpenSSL that is built otherwise it is the curve that every client has, and nothing weaker."""
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        set_groups(context, object())
        self.assertEqual(agreed_group(context), "secp256r1")

    def test_groups_of_an_older_openssl(self) -> None:
        """One that does not know ML-KEM gets the list without it, and forgets that it complained."""
        known, asked = set(GROUPS[1:]), []

        class Library:
            complaints = 0

            @classmethod
            def SSL_CTX_set1_curves_list(cls, context: Any, names: bytes) -> int:
                asked.append(names.decode().split(":"))
                cls.complaints += not known.issuperset(asked[-1])
                return int(known.issuperset(asked[-1]))

            @classmethod
            def ERR_clear_error(cls) -> None:
                cls.complaints = 0

        class Module:
            _lib = Library

        set_groups(SSL.Context(SSL.TLS_SERVER_METHOD), Module)
        self.assertEqual(asked, [list(GROUPS), list(GROUPS[1:])])
        self.assertEqual(Library.complaints, 0)

    async def test_no_renegotiation_and_no_compression(self) -> None:
        """A client that asks for another handshake in the middle of TLS 1.2 is told no."""
        port = await self.serve(self.keep_pair("a.pem", issue("a.test")))
        # Without -ign_eof a line "R" is the command to renegotiate.
        said = await deferToThread(renegotiate, port)
        self.assertIn("RENEGOTIATING", said)
        self.assertRegex(said, "no renegotiation")
        self.assertNotIn(AGREED, said)
        said = await self.ask(port, "-tls1_2", "-comp")
        self.assertIn("Secure Renegotiation IS supported", said)
        self.assertIn("Compression: NONE", said)

    async def test_alpn(self) -> None:
        """HTTP/1.1 where it is offered; who offers others only gets an alert, and who offers nothing is served."""
        port = await self.serve(self.keep_pair("a.pem", issue("a.test")))
        said = await self.ask_each(port, [["-alpn", "h2,http/1.1"], ["-alpn", "h2,ftp"], []])
        self.assertIn("ALPN protocol: http/1.1", said[0])
        self.assertIn("b'http/1.1'", said[0])
        self.assertIn(alert(NO_APPLICATION_PROTOCOL), said[1])
        self.assertIn(f"{AGREED}, [] b''", said[2])

    async def test_our_transport(self) -> None:
        """The transport that stops reading exactly, on a descriptor that reads for it; also on a socket of others."""
        from twisted.internet import reactor

        path = self.keep_pair("a.pem", issue("a.test"))
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        for endpoint in (None, AdoptedStreamServerEndpoint(reactor, listening.detach(), socket.AF_INET)):
            await self.ask(await self.serve(path, endpoint=endpoint))
            (transport,) = self.factory.transports  # type: ignore[attr-defined]
            self.assertIsInstance(transport, TLSTransport)
            self.assertIsInstance(transport.transport, TLSServer)


def renegotiate(port: int) -> str:
    words = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_2"]
    done = subprocess.run(words, input=b"R\n", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
    return done.stdout.decode("ascii", "replace")


def agreed_group(context: SSL.Context) -> str | None:
    """What a client of the same OpenSSL agrees on with a server's context, in memory."""
    pair = issue("a.test")
    leaf = SSL.Context(SSL.TLS_SERVER_METHOD)
    leaf.use_certificate(pair.certificate)
    leaf.use_privatekey(pair.key)
    context.set_tlsext_servername_callback(lambda connection: connection.set_context(leaf))
    client, server = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD)), SSL.Connection(context)
    client.set_connect_state()
    server.set_accept_state()
    for _ in range(3):
        for sender, receiver in ((client, server), (server, client)):
            try:
                sender.do_handshake()
            except SSL.WantReadError:
                pass
            try:
                receiver.bio_write(sender.bio_read(1 << 16))
            except SSL.WantReadError:
                pass
    return client.get_group_name()


class NameTests(ServerTestCase):
    """Which certificate a client gets, by the host that it names."""

    async def assert_shown(self, port: int, host: str, pair: Pair) -> None:
        options = ["-servername", host] if host else ["-noservername"]
        self.assertEqual(serial_of(await self.ask(port, *options)), pair.serial, host)

    @pytest.mark.slow
    async def test_names(self) -> None:
        """The name itself before a wildcard, a wildcard for one label, the first that fits, or the first of all."""
        first, exact, wild = issue("first.test"), issue("a.wild.test", "b.test"), issue("*.wild.test")
        again = issue("b.test", "first.test", "c.test")
        paths = [self.keep_pair(f"{i}.pem", pair) for i, pair in enumerate((first, wild, exact, again))]
        port = await self.serve(*paths)
        for host, pair in {
            "first.test": first,
            "b.test": exact,
            "a.wild.test": exact,
            "B.TEST": exact,
            "c.wild.test": wild,
            "c.d.wild.test": first,
            "wild.test": first,
            "*.wild.test": wild,
            "c.test": again,
            "unknown": first,
            "": first,
        }.items():
            await self.assert_shown(port, host, pair)

    async def test_chain(self) -> None:
        """The authority's certificate comes along, and a client that trusts the root alone is content."""
        middle = issue(common_name="middle", by=authority(), ca=True)
        host = issue("a.test", by=middle)
        keep(self.folder / "a.pem", host.pem + middle.chain)
        root = keep(self.folder / "root.pem", authority().chain)
        port = await self.serve(self.folder / "a.pem")
        options = ["-servername", "a.test", "-verify_hostname", "a.test", "-verify_return_error", "-CAfile", str(root)]
        self.assertIn("Verify return code: 0 (ok)", await self.ask(port, *options))


def serial_of(said: str) -> str:
    """The serial number of the certificate that a client was shown."""
    found = re.search(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", said, re.DOTALL)
    assert found, said
    certificate = x509.load_pem_x509_certificate(found[0].encode())
    text = f"{certificate.serial_number:X}"
    return text.zfill(len(text) + len(text) % 2)


class ReloadTests(ServerTestCase):
    """Certificates that are renewed while the service runs."""

    async def test_changed_file(self) -> None:
        """A new file is taken into use at the next look; what hasn't changed isn't read again."""
        old, new, other = issue("a.test"), issue("a.test"), issue("b.test")
        path = self.keep_pair("a.pem", old)
        port = await self.serve(path, self.keep_pair("b.pem", other))
        before = self.contexts.identities
        self.contexts.start(self.clock)
        self.addCleanup(self.contexts.stop)
        self.clock.advance(LOOK_INTERVAL)
        self.assertEqual([id(one) for one in self.contexts.identities], [id(one) for one in before])
        self.keep_pair("a.pem", new)
        self.assertEqual(serial_of(await self.ask(port)), old.serial)
        self.clock.advance(LOOK_INTERVAL)
        self.assertEqual(serial_of(await self.ask(port)), new.serial)
        self.assertIs(self.contexts.identities[1], before[1])

    async def test_broken_file(self) -> None:
        """The old certificate stays, one line says why, and the next good file is taken."""
        old, new = issue("a.test"), issue("a.test")
        path = self.keep_pair("a.pem", old)
        port = await self.serve(path)
        for broken, why in ((b"", "no certificate"), (new.chain, "no private key"), (new.chain + old.private, "not")):
            self.log.clear()
            keep(path, broken)
            for _ in range(3):
                self.contexts.look()
            self.assertEqual(len(self.log), 1, self.log)
            self.assertRegex(self.log[0], rf"a\.pem: .*{why}.*; what was read before stays in use$")
            self.assertEqual(serial_of(await self.ask(port)), old.serial)
        path.unlink()
        self.contexts.look()
        self.assertEqual(serial_of(await self.ask(port)), old.serial)
        self.keep_pair("a.pem", new)
        self.contexts.look()
        self.assertEqual(serial_of(await self.ask(port)), new.serial)

    async def test_reload_reads_all(self) -> None:
        """On a signal everything is read, and what is wrong is said again."""
        path = self.keep_pair("a.pem", issue("a.test"))
        await self.serve(path)
        keep(path, b"")
        self.log.clear()
        self.contexts.reload()
        self.contexts.reload()
        self.assertEqual(len(self.log), 2, self.log)

    async def test_all_or_nothing_of_each(self) -> None:
        """A good file beside a broken one is taken; each keeps its place."""
        self.keep_pair("a.pem", issue("a.test"))
        self.keep_pair("b.pem", issue("b.test"))
        port = await self.serve(self.folder)
        new = issue("b.test")
        keep(self.folder / "a.pem", b"")
        self.keep_pair("b.pem", new)
        self.contexts.look()
        self.assertEqual(serial_of(await self.ask(port, "-servername", "b.test")), new.serial)
        self.assertEqual([one.names for one in self.contexts.identities], [("a.test",), ("b.test",)])

    async def test_folder(self) -> None:
        """A file that comes into a folder is served, one that is removed is not; with none left all stay."""
        a, b = issue("a.test"), issue("b.test")
        self.keep_pair("a.pem", a)
        port = await self.serve(self.folder)
        self.keep_pair("b.pem", b)
        self.contexts.look()
        self.assertEqual(serial_of(await self.ask(port, "-servername", "b.test")), b.serial)
        (self.folder / "a.pem").unlink()
        self.contexts.look()
        self.assertEqual(serial_of(await self.ask(port, "-servername", "a.test")), b.serial)
        (self.folder / "b.pem").unlink()
        self.contexts.look()
        self.assertEqual(serial_of(await self.ask(port)), b.serial)

    async def test_nothing_of_use(self) -> None:
        """A folder in which the only certificate is replaced by a broken one of another name: the old one stays."""
        pair = issue("a.test")
        self.keep_pair("folder/a.pem", pair)
        port = await self.serve(self.folder / "folder")
        (self.folder / "folder" / "a.pem").rename(self.folder / "folder" / "b.pem")
        keep(self.folder / "folder" / "b.pem", b"")
        self.contexts.look()
        self.assertEqual(serial_of(await self.ask(port, "-servername", "a.test")), pair.serial)
        self.assertEqual(len(self.log), 1, self.log)
        self.assertEqual([one.names for one in self.contexts.identities], [("a.test",)])

    async def test_connection_goes_on(self) -> None:
        """What was agreed on before goes on: bytes come and go behind a reload, and even behind two rotations."""
        old, new = issue("a.test"), issue("a.test")
        path = self.keep_pair("a.pem", old)
        port = await self.serve(path)
        context = ssl.create_default_context(cadata=old.chain.decode())
        connected = await deferToThread(connect, port, context, "a.test")
        with connected:
            self.keep_pair("a.pem", new)
            self.contexts.look()
            for _ in range(2):
                self.clock.advance(ROTATION)
                self.contexts.look()
            self.assertEqual(serial_of(await self.ask(port)), new.serial)

            def say() -> bytes:
                connected.sendall(b"still here\n")
                return connected.recv(100)

            self.assertIn(AGREED.encode(), await deferToThread(say))


def connect(port: int, context: ssl.SSLContext, host: str) -> ssl.SSLSocket:
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), PATIENCE), server_hostname=host)


class StapleTests(ServerTestCase):
    """OCSP stapling."""

    NOTHING = "OCSP response: no response sent"

    async def status(self, port: int, *options: str) -> str:
        return await self.ask(port, "-status", *options)

    async def test_staple(self) -> None:
        """A response beside the certificate is sent to who asks, and one that comes later, too."""
        host = issue("a.test", by=authority())
        path = self.keep_pair("a.pem", host)
        port = await self.serve(path)
        self.assertIn(self.NOTHING, await self.status(port))
        keep(self.folder / "a.pem.ocsp", response_for(host, authority()))
        self.contexts.look()
        for version in ("-tls1_2", "-tls1_3"):
            said = await self.status(port, version)
            self.assertIn("OCSP Response Status: successful", said)
            self.assertIn("Cert Status: good", said)
            self.assertIn(host.serial, said.partition("Serial Number:")[2][:60])
        self.assertNotIn("OCSP Response", await self.ask(port))

    async def test_of_the_host(self) -> None:
        """Each host has the response of its own certificate."""
        first, second = (issue(f"{name}.test", by=authority()) for name in "ab")
        paths = [self.keep_pair("a.pem", first), self.keep_pair("b.pem", second)]
        keep(self.folder / "b.pem.ocsp", response_for(second, authority()))
        port = await self.serve(*paths)
        self.assertIn(self.NOTHING, await self.status(port, "-servername", "a.test"))
        self.assertIn("Cert Status: good", await self.status(port, "-servername", "b.test"))

    async def test_expired(self) -> None:
        """A response is not sent any more from its end on, and the log says so, once; a broken one is not sent."""
        host = issue("a.test", by=authority())
        path = self.keep_pair("a.pem", host)
        keep(self.folder / "a.pem.ocsp", response_for(host, authority(), end=DAY))
        time = [datetime.now(UTC)]
        port = await self.serve(path, now=lambda: time[0])
        self.assertIn("Cert Status: good", await self.status(port))
        time[0] += DAY
        self.assertIn(self.NOTHING, await self.status(port))
        self.log.clear()
        self.contexts.look()
        self.contexts.look()
        self.assertEqual(self.log, [f"{path}.ocsp: the response has expired, and is not stapled any more"])
        keep(self.folder / "a.pem.ocsp", b"garbage")
        self.contexts.look()
        self.assertRegex(self.log[1], r"no OCSP response for a.pem in DER .*; nothing is stapled")
        self.assertIn(self.NOTHING, await self.status(port))


class ClientTests(ServerTestCase):
    """Certificates of clients."""

    def setUp(self) -> None:
        super().setUp()
        self.host = self.keep_pair("a.pem", issue("a.test"))
        self.ca = keep(self.folder / "ca.pem", authority().chain)

    def as_client(self, pair: Pair) -> list[str]:
        path = str(self.keep_pair("client.pem", pair))
        return ["-cert", path, "-key", path]

    async def test_right_one(self) -> None:
        """The names of who shows a certificate of the authority reach the application, in both protocols."""
        port = await self.serve(self.host, client_ca=self.ca)
        for usage in ((), (FOR_CLIENTS,)):
            pair = issue(x509.RFC822Name("alice@example.test"), by=authority(), usage=usage)
            for version in ("-tls1_2", "-tls1_3"):
                said = await self.ask(port, version, *self.as_client(pair))
                self.assertIn(f"{AGREED}, ['alice@example.test']", said)
                self.assertIn("Acceptable client certificate CA names\nCN = authority\n", said)

    @pytest.mark.slow
    async def test_refused(self) -> None:
        """None, one of another authority, an expired one, for servers, signed by itself: each has its alert."""
        both = "-tls1_2", "-tls1_3"
        for required in (True, False):
            port = await self.serve(self.host, client_ca=self.ca, client_required=required)
            for pair, number in (
                (issue("c.test", by=authority("other")), UNKNOWN_CA),
                (issue("c.test", by=authority(), begin=-2 * DAY, end=-DAY), CERTIFICATE_EXPIRED),
                (issue("c.test", by=authority(), usage=[FOR_SERVERS]), UNSUPPORTED_CERTIFICATE),
                (issue("c.test"), UNKNOWN_CA),
            ):
                for version in both:
                    said = await self.ask(port, version, *self.as_client(pair))
                    self.assertIn(alert(number), said)
                    self.assertNotIn(AGREED, said)
            none = [await self.ask(port, version) for version in both]
            if required:
                self.assertIn(alert(HANDSHAKE_FAILURE), none[0])
                self.assertIn(alert(CERTIFICATE_REQUIRED), none[1])
            self.assertEqual([f"{AGREED}, []" in said for said in none], [not required] * 2)

    async def test_authority_below_the_root(self) -> None:
        """An authority is believed though nobody knows who signed it; the root above it is not, for it isn't named."""
        middle = issue(common_name="middle", by=authority(), ca=True)
        port = await self.serve(self.host, client_ca=keep(self.folder / "ca.pem", middle.chain))
        self.assertIn("['c.test']", await self.ask(port, *self.as_client(issue("c.test", by=middle))))
        said = await self.ask(port, *self.as_client(issue("c.test", by=authority())))
        self.assertIn(alert(UNKNOWN_CA), said)

    async def test_not_asked(self) -> None:
        """Without authorities nobody is asked, so nobody can pretend."""
        port = await self.serve(self.host)
        said = await self.ask(port, *self.as_client(issue("c.test", by=authority())))
        self.assertIn(f"{AGREED}, []", said)
        self.assertIn("No client certificate CA names sent", said)

    async def test_authority_that_is_gone(self) -> None:
        """Nobody is let in by it any more, also while the certificate of the server can't be read again."""
        port = await self.serve(self.host, client_ca=self.ca)
        client = self.as_client(issue("c.test", by=authority()))
        self.assertIn("['c.test']", await self.ask(port, *client))
        keep(self.ca, authority("other").chain)
        keep(self.host, b"")
        self.contexts.look()
        self.assertIn(alert(UNKNOWN_CA), await self.ask(port, *client))
        self.assertIn("['d.test']", await self.ask(port, *self.as_client(issue("d.test", by=authority("other")))))

    @pytest.mark.slow
    async def test_other_authorities(self) -> None:
        """When the file changes others are let in, and no session of before is resumed; a broken file is not used."""
        port = await self.serve(self.host, client_ca=self.ca)
        session = self.folder / "session"
        client = self.as_client(issue("c.test", by=authority()))
        said = await self.ask(port, *client, "-sess_out", session)
        self.assertIn("['c.test']", said)
        self.assertIn("['c.test']", await self.ask(port, "-sess_in", session))  # not even asked: the ticket says it
        keep(self.ca, b"")
        self.contexts.look()
        self.assertIn("ca.pem: no certificates of authorities", self.log[-1])
        self.assertIn("['c.test']", await self.ask(port, *client))
        keep(self.ca, authority("other").chain)
        self.contexts.look()
        said = await self.ask(port, *client, "-sess_in", session)
        self.assertIn(alert(UNKNOWN_CA), said)
        self.assertNotIn(AGREED, said)
        said = await self.ask(port, *self.as_client(issue("d.test", by=authority("other"))))
        self.assertIn("['d.test']", said)


class TicketTests(ServerTestCase):
    """Sessions that are resumed, and keys of tickets that are replaced."""

    async def first_time(self, port: int, version: str, *options: str) -> Path:
        session = self.folder / f"session{version}{len(options)}"
        said = await self.ask(port, version, "-sess_out", session, *options)
        self.assertIn("New, TLSv1", said)
        return session

    async def is_resumed(self, port: int, session: Path, *options: str) -> bool:
        said = await self.ask(port, "-sess_in", session, *options)
        self.assertIn(AGREED, said)
        return "Reused, TLSv1" in said

    def rotate(self) -> None:
        fronts = self.contexts._fronts
        self.clock.advance(ROTATION - 1)
        self.contexts.look()
        self.assertIs(self.contexts._fronts, fronts)
        self.clock.advance(1)
        self.contexts.look()
        self.assertIsNot(self.contexts._fronts, fronts)

    @pytest.mark.slow
    async def test_rotation(self) -> None:
        """A ticket is good through one rotation of keys, and its keys are gone with the next one."""
        port = await self.serve(self.keep_pair("a.pem", issue("a.test")))
        for version in ("-tls1_2", "-tls1_3"):
            named = [version, "-servername", "a.test"]
            session = await self.first_time(port, version)
            self.assertTrue(await self.is_resumed(port, session, version))
            self.rotate()
            self.assertTrue(await self.is_resumed(port, session, version), "after a rotation")
            newer = await self.first_time(port, *named)
            self.assertTrue(await self.is_resumed(port, newer, *named))
            self.rotate()
            self.assertFalse(await self.is_resumed(port, session, version), "after two")
            self.assertTrue(await self.is_resumed(port, newer, *named))

    async def test_who_must_show_a_certificate(self) -> None:
        """It is the same where clients are asked for certificates."""
        ca = keep(self.folder / "ca.pem", authority().chain)
        client = str(self.keep_pair("client.pem", issue("c.test", by=authority())))
        port = await self.serve(self.keep_pair("a.pem", issue("a.test")), client_ca=ca)
        session = await self.first_time(port, "-tls1_3", "-cert", client, "-key", client)
        self.rotate()
        self.assertTrue(await self.is_resumed(port, session))

    async def test_reload(self) -> None:
        """A new certificate costs nobody a session."""
        port = await self.serve(self.keep_pair("a.pem", issue("a.test")))
        session = await self.first_time(port, "-tls1_3")
        self.keep_pair("a.pem", issue("a.test"))
        self.contexts.look()
        self.assertTrue(await self.is_resumed(port, session))

    async def test_no_early_data(self) -> None:
        """0-RTT: a ticket allows none of it, so what a thief recorded can't be played back as a request."""
        port = await self.serve(self.keep_pair("a.pem", issue("a.test")))
        session = self.folder / "session"
        said = await self.ask(port, "-tls1_3", "-sess_out", session)
        self.assertIn("Max Early Data: 0", said)
        early = keep(self.folder / "early", b"DELETE / HTTP/1.1\r\n\r\n")
        said = await self.ask(port, "-tls1_3", "-sess_in", session, "-early_data", early)
        self.assertIn("Reused, TLSv1.3", said)
        self.assertIn("Early data was not sent", said)

    async def test_any_cut(self) -> None:
        """A hello that comes in pieces is understood, with a ticket of the former keys as with none."""
        port = await self.serve(self.keep_pair("a.pem", issue("a.test")))
        for resumes in (False, True):
            for size in (1, 3, 100, 500):
                session = await deferToThread(resume_in_pieces, port, size, self.rotate_in_reactor if resumes else None)
                self.assertEqual(session, resumes, size)

    def rotate_in_reactor(self) -> None:
        from twisted.internet import reactor
        from twisted.internet.threads import blockingCallFromThread

        blockingCallFromThread(reactor, self.rotate)


def resume_in_pieces(port: int, size: int, between: Any) -> bool:
    """Connect twice, the second time with the session of the first, and byte by byte.

    :param size: of the pieces of the first flight.
    :param between: called between the two connections; without it the second one has no session to resume.
    :returns: whether it was resumed.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    session = None
    resumed = False
    for again in (False, True):
        plain = socket.create_connection(("127.0.0.1", port), PATIENCE)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="a.test", session=session)
        said = b""
        with plain:
            while True:
                try:
                    tls.do_handshake()
                    tls.write(b"hello\n") if not said else None
                    said += tls.read(100)
                    break
                except ssl.SSLWantReadError:
                    flight = outgoing.read()
                    for at in range(0, len(flight), size if again else len(flight) or 1):
                        plain.sendall(flight[at : at + (size if again else len(flight))])
                    got = plain.recv(1 << 16)
                    assert got, "closed in the handshake"
                    incoming.write(got)
        assert AGREED.encode() in said
        resumed = bool(tls.session_reused)
        if not again and between is not None:
            session = tls.session
            between()
    return resumed


class FirstRecordTests(SynchronousTestCase):
    """How long a connection waits for its client's first record."""

    def test_whole(self) -> None:
        """To its end; what is no record of a handshake isn't waited for."""
        record = b"\x16\x03\x01\x00\x05hello"
        for end in range(len(record)):
            self.assertFalse(is_whole_record(record[:end]), end)
        self.assertTrue(is_whole_record(record))
        self.assertTrue(is_whole_record(record + b"more"))
        self.assertTrue(is_whole_record(b"G"))
        self.assertTrue(is_whole_record(b"\x15"))

    def test_bounded(self) -> None:
        """Whatever the client says of its length, no more is held back than two bytes can say."""
        connection = self.connection()
        for _ in range(70_000):
            if connection._first_record is None:
                break
            connection.bio_write(b"\x16" if not connection._first_record else b"\xff")
            self.assertLessEqual(len(connection._first_record or b""), 5 + 65535)
        self.assertIsNone(connection._first_record)

    def connection(self) -> ServerConnection:
        with tempfile.TemporaryDirectory() as folder:
            clock = Clock()
            contexts = Contexts([keep(Path(folder, "a.pem"), issue("a.test").pem)], seconds=clock.seconds)
            clock.advance(ROTATION)
            contexts.look()
            self.assertEqual([len(front.key_name) for front in contexts._fronts], [KEY_NAME] * 2)
            self.assertNotEqual(contexts._fronts[0].key_name, contexts._fronts[1].key_name)
            return ServerConnection(contexts._fronts)
