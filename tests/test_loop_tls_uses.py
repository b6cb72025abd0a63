"""Every way in which an application of Twisted comes to TLS: servers, clients, upgrades, adopted sockets.

The peer is Python's ``ssl`` in a thread of its own. In each of these ways our transport is in use, an upload whose
records leave plaintext behind in every turn arrives whole at a consumer that pauses, and so does the answer.
"""

from __future__ import annotations

import datetime
import ipaddress
import itertools
import socket
import ssl
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet.endpoints import (
    HostnameEndpoint,
    SSL4ClientEndpoint,
    TCP4ClientEndpoint,
    TCP4ServerEndpoint,
    clientFromString,
    serverFromString,
    wrapClientTLS,
    wrapServerTLS,
)
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import ClientFactory
from twisted.internet.ssl import (
    Certificate,
    CertificateOptions,
    PrivateCertificate,
    optionsForClientTLS,
    trustRootFromCertificates,
)
from twisted.protocols import tls
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.loop.foreign import LwsAsyncioReactor
from lwstwisted.loop.reactor import LwsPollReactor, LwsReactor, LwsSelectReactor
from lwstwisted.loop.tls import TLSTransport, make_default
from tests.tls_peer import (
    DEADLINE,
    VERSIONS,
    ListeningSink,
    Loop,
    Sink,
    SinkFactory,
    discard,
    pattern,
)

N = 4096
"""Plaintext bytes that our transports take in one turn."""

UP = pattern(200_000)
"""What our side gets."""

DOWN = UP[::-1]
"""What our side answers with, when it has all of that."""

LOOPS: dict[str, Callable[[], Any]] = {
    "epoll": LwsReactor,
    "poll": LwsPollReactor,
    "select": LwsSelectReactor,
    "asyncio": LwsAsyncioReactor,
    "uvloop": lambda: LwsAsyncioReactor(uvloop.new_event_loop()),
}

ROOT = Path(__file__).parents[1]


class AnyLoop(Loop):
    """A :class:`Loop` that can also be one that drives itself."""

    def __init__(self, reactor: Any) -> None:
        self.own = getattr(reactor, "_asyncioEventloop", None)
        super().__init__(reactor)

    def turn(self, wait: float = 0) -> None:
        """Run one turn; on a loop that drives itself, as many as fit into the time."""
        if self.own is None:
            super().turn(wait)
        else:
            self.own.call_later(wait, self.own.stop)
            self.own.run_forever()

    def until(self, condition: Callable[[], object], longest: float = DEADLINE) -> int:
        """Run until then, see :meth:`Loop.until`."""
        if self.own is None:
            return super().until(condition, longest)
        given_up: list[bool] = []
        deadline = self.own.call_later(DEADLINE, given_up.append, True)
        while not condition():
            if given_up:
                raise AssertionError("hung")
            self.turn(0.001)
        deadline.cancel()
        return 0


class LoopTestCase(SynchronousTestCase):
    """Our transport is that of all TLS in this process, as ``install()`` makes it, for the time of a test."""

    def setUp(self) -> None:
        self.patch(TLSMemoryBIOFactory, "protocol", TLSMemoryBIOFactory.protocol)
        make_default()

    @contextmanager
    def loop(self, name: str = "epoll") -> Iterator[AnyLoop]:
        """One of the loops, as the global reactor that those see who don't name any."""
        loop = AnyLoop(LOOPS[name]())
        reactor, default_clock = loop.reactor, tls._get_default_clock
        tls._get_default_clock = lambda: reactor  # type: ignore[attr-defined]
        try:
            yield loop
        finally:
            tls._get_default_clock = default_clock  # type: ignore[attr-defined]
            reactor.disconnectAll()  # with their timers, before anybody takes these away
            if reactor.threadpool is not None:
                reactor._stopThreadPool()
            discard(reactor)
            if loop.own is not None:
                loop.own.close()

    def in_thread(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Let somebody else's end of a connection run beside us. Its sockets must have timeouts."""
        pool = ThreadPoolExecutor(1)
        self.addCleanup(pool.shutdown)
        return pool.submit(call, *arguments)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of pyOpenSSL about what Twisted 26.10 hands it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@cache
def authority() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate authority of these tests."""
    key = ec.generate_private_key(ec.SECP256R1())
    return issue("authority", [], key, ca=True), key


def issue(
    name: str,
    names: list[x509.GeneralName],
    key: ec.EllipticCurvePrivateKey,
    *,
    ca: bool = False,
    padding: int = 0,
) -> x509.Certificate:
    """Make a certificate, which the authority has signed.

    :param names: hosts that it is for.
    :param ca: whether it is the authority's own.
    :param padding: bytes that make it so much longer.
    """
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signer, signing_key = (None, key) if ca else authority()
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if signer is None else signer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if padding:
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), bytes(padding))
        builder = builder.add_extension(unknown, critical=False)
    return builder.sign(signing_key, hashes.SHA256())


def pem(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey | None = None) -> bytes:
    """A certificate, behind its key if that is given."""
    text = certificate.public_bytes(serialization.Encoding.PEM)
    if key is None:
        return text
    private = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption()) + text


@cache
def identity(name: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A host, or a person: with the name ``localhost`` that and 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [x509.DNSName(name)]
    if name == "localhost":
        names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    return issue(name, names, key), key


@contextmanager
def pem_file(name: str = "localhost") -> Iterator[Path]:
    """The key and the certificate of somebody, in a file that has a folder for itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "identity.pem")
        path.write_bytes(pem(*identity(name)))
        yield path


@contextmanager
def trust_folder() -> Iterator[Path]:
    """A folder with the authority's certificate."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "authority.pem").write_bytes(pem(authority()[0]))
        yield Path(folder)


def our_trust() -> Any:
    """Twisted's way to say that the authority is trusted, and nobody else."""
    return trustRootFromCertificates([Certificate.loadPEM(pem(authority()[0]))])


def our_server_context(**options: Any) -> Any:
    """A context for servers of ours."""
    certificate, key = identity("localhost")
    return CertificateOptions(key, certificate, **options)


def their_server_context(version: ssl.TLSVersion, name: str = "localhost") -> ssl.SSLContext:
    """Python's context for a server that speaks one version."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    with pem_file(name) as path:
        context.load_cert_chain(path)
    context.load_verify_locations(cadata=pem(authority()[0]).decode())
    return context


def their_client_context(version: ssl.TLSVersion, name: str | None = None) -> ssl.SSLContext:
    """Python's context for a client that speaks one version.

    :param name: whose certificate it shows; None for none.
    """
    context = ssl.create_default_context(cadata=pem(authority()[0]).decode())
    context.minimum_version = context.maximum_version = version
    if name is not None:
        with pem_file(name) as path:
            context.load_cert_chain(path)
    return context


def records(data: bytes) -> Iterator[bytes]:
    """Cut into records that leave something behind when N bytes are taken at a time."""
    sizes = itertools.cycle([16384, N + 1, 1, 12_000])
    while data:
        size = next(sizes)
        yield data[:size]
        data = data[size:]


def exchange(connection: ssl.SSLSocket, at_end: Callable[[ssl.SSLSocket], object] = lambda _: None) -> bytes:
    """The other side of a dialogue with :class:`Ours`.

    :param at_end: what to do before it says goodbye.
    :returns: the answer.
    """
    with connection:
        for record in records(UP):
            connection.sendall(record)
        got = bytearray()
        while len(got) < len(DOWN):
            data = connection.recv(1 << 16)
            if not data:
                raise AssertionError(f"the answer ended after {len(got)} bytes")
            got += data
        at_end(connection)
        connection.unwrap().close()
        return bytes(got)


def dial(port: int, command: bytes = b"") -> socket.socket:
    """Connect. With a command, send it and wait for the answer to that."""
    plain = socket.create_connection(("127.0.0.1", port), DEADLINE)
    if command:
        plain.sendall(command)
        assert plain.recv(len(GO), socket.MSG_WAITALL) == GO
    return plain


def visit(port: int, context: ssl.SSLContext, command: bytes = b"") -> bytes:
    """Be the client of a whole dialogue."""
    return exchange(context.wrap_socket(dial(port, command), server_hostname="localhost"))


def answer_one(listening: socket.socket, context: ssl.SSLContext, command: bytes = b"") -> bytes:
    """Be the server of a whole dialogue.

    :param command: what the client says before TLS, and is answered.
    """
    plain, _ = listening.accept()
    with plain:
        plain.settimeout(DEADLINE)
        if command:
            assert plain.recv(len(command), socket.MSG_WAITALL) == command
            plain.sendall(GO)
        return exchange(context.wrap_socket(plain, server_side=True))


COMMAND, GO = b"STARTTLS\r\n", b"go ahead\r\n"


class Ours(SinkFactory, ClientFactory):
    """Our side: takes UP with a rest after each delivery, answers with DOWN.

    :ivar left: for each rest, whether plaintext was waiting.
    :ivar layers: types of the transports in use.
    """

    def __init__(self, loop: AnyLoop, kind: type[Sink] = ListeningSink) -> None:
        super().__init__(self.taken, kind=kind)
        self.loop = loop
        self.left: list[bool] = []
        self.layers: set[type] = set()

    def taken(self, sink: Sink) -> None:
        layer = layer_of(sink)
        self.layers.add(type(layer))
        sink.pause()
        if len(sink.data) == len(UP):
            sink.tls.write(DOWN)

        def go_on() -> None:
            self.left.append(layer.has_leftover)
            sink.resume()

        self.loop.later(2, go_on)


def layer_of(sink: Sink) -> Any:
    """The TLS layer, which after ``startTLS`` is hidden behind the transport."""
    return sink.transport if isinstance(sink.transport, TLSTransport) else sink.tls.protocol


def limited(factory: Any) -> Any:
    """Have at most N bytes taken in one turn on each connection of a TLS factory. Returns the factory."""
    factory.budget = N
    return factory


class DialogueTestCase(LoopTestCase):
    """Whole dialogues, and what must be true of each."""

    has_leftovers = True

    def assert_whole(self, ours: Ours, far: Future[Any], where: object) -> None:
        """Let the dialogue of one connection come to its end."""
        ours.loop.until(far.done, longest=0.01)
        self.assertEqual(far.result(), DOWN, where)
        (sink,) = ours.sinks
        ours.loop.until(lambda: sink.lost, longest=0.01)
        self.assertEqual(bytes(sink.data), UP, where)
        self.assertEqual(sink.violations, [], where)
        self.assertEqual(ours.layers, {TLSTransport}, where)
        self.assertTrue(sink.is_shaken, where)
        self.assertEqual([reason.type for reason in sink.lost], [ConnectionDone], where)
        if self.has_leftovers:
            self.assertGreater(sum(ours.left), 10, where)
            self.assertLessEqual(max(sink.deliveries), N, where)

    def serve(
        self, name: str, listen: Callable[[Any, Ours], Any], command: bytes = b"", kind: type[Sink] = ListeningSink
    ) -> None:
        """Be a server on this loop, over both versions.

        :param listen: is given a reactor and a factory, and returns a port.
        """
        for version in VERSIONS:
            with self.loop(name) as loop:
                ours = Ours(loop, kind)
                port = listen(loop.reactor, ours)
                context = their_client_context(version)
                far = self.in_thread(visit, port.getHost().port, context, command)
                self.assert_whole(ours, far, (name, version))

    def connect(
        self, name: str, connect: Callable[[Any, Ours, int], object], command: bytes = b"", kind: Any = ListeningSink
    ) -> None:
        """Be a client on this loop, over both versions.

        :param connect: is given a reactor, a factory and a port to connect to.
        """
        for version in VERSIONS:
            with self.loop(name) as loop, socket.create_server(("127.0.0.1", 0)) as listening:
                listening.settimeout(DEADLINE)
                ours = Ours(loop, kind)
                far = self.in_thread(answer_one, listening, their_server_context(version), command)
                connect(loop.reactor, ours, listening.getsockname()[1])
                self.assert_whole(ours, far, (name, version))


class BudgetTestCase(DialogueTestCase):
    """With a small budget for factories that the application makes without a word about us."""

    def setUp(self) -> None:
        super().setUp()
        TLSMemoryBIOFactory.budget = N  # type: ignore[attr-defined]
        self.addCleanup(delattr, TLSMemoryBIOFactory, "budget")


class ServerTests(BudgetTestCase):
    """Servers."""

    def test_listen_ssl(self) -> None:
        """``reactor.listenSSL``, on every loop."""

        def listen(reactor: Any, ours: Ours) -> Any:
            port = reactor.listenSSL(0, ours, our_server_context(), interface="127.0.0.1")
            limited(port.factory)
            return port

        for name in LOOPS:
            self.serve(name, listen)

    def test_ssl_description(self) -> None:
        """``ssl:`` in the description of an endpoint."""

        def listen(reactor: Any, ours: Ours) -> Any:
            description = f"ssl:0:privateKey={path}:certKey={path}:interface=127.0.0.1"
            port: Any = self.successResultOf(serverFromString(reactor, description).listen(ours))
            limited(port.factory)
            return port

        with pem_file() as path, quiet():
            self.serve("epoll", listen)

    def test_tls_description(self) -> None:
        """``tls:`` in the description, which finds the certificate of a host in a folder."""

        def listen(reactor: Any, ours: Ours) -> Any:
            description = f"tls:{path.parent}:0:interface=127.0.0.1"
            return self.successResultOf(serverFromString(reactor, description).listen(ours))

        with pem_file() as path, quiet():
            self.serve("epoll", listen)

    def test_wrapped_endpoint(self) -> None:
        """``wrapServerTLS`` around an endpoint."""

        def listen(reactor: Any, ours: Ours) -> Any:
            plain = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
            return self.successResultOf(wrapServerTLS(our_server_context(), plain, reactor).listen(ours))

        for name in LOOPS:
            self.serve(name, listen)

    def test_adopted_port(self) -> None:
        """A listening socket that somebody else made, with TLS put on it."""

        def listen(reactor: Any, ours: Ours) -> Any:
            with socket.create_server(("127.0.0.1", 0)) as listening:
                listening.setblocking(False)
                wrapped = TLSMemoryBIOFactory(our_server_context(), False, ours, reactor)
                return reactor.adoptStreamPort(listening.fileno(), socket.AF_INET, wrapped)

        for name in LOOPS:
            self.serve(name, listen)

    def test_socket_of_systemd(self) -> None:
        """A service whose listening socket is handed over as descriptor 3: TLS goes around its factory."""
        with pem_file() as path, socket.create_server(("127.0.0.1", 0)) as listening:
            descriptor = listening.fileno()
            for version in VERSIONS:
                far = self.in_thread(visit, listening.getsockname()[1], their_client_context(version))
                done = subprocess.run(
                    [sys.executable, "-c", HAND_OVER, str(descriptor), ADOPTED, str(path)],
                    cwd=ROOT,
                    pass_fds=[descriptor],
                    capture_output=True,
                    text=True,
                    timeout=3 * DEADLINE,
                )
                self.assertEqual((done.stdout, done.stderr), ("well\n", ""))
                self.assertEqual(far.result(), DOWN)


HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="https")
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[2:]])
"""
"""What systemd does: the socket is descriptor 3, and the process is the one that is named."""

ADOPTED = """
import sys
from lwstwisted.loop.reactor import install
install()
from twisted.internet import reactor
from tests.test_loop_tls_uses import serve_adopted
serve_adopted(reactor, sys.argv[1])
"""
"""A service of one connection, in a process with our reactor."""


def serve_adopted(reactor: Any, path: str) -> None:
    """Serve one dialogue on the socket of systemd."""
    text = Path(path).read_bytes()
    context = CertificateOptions(serialization.load_pem_private_key(text, None), x509.load_pem_x509_certificate(text))
    loop = AnyLoop(reactor)
    ours = Ours(loop)
    wrapped = limited(TLSMemoryBIOFactory(context, False, ours))
    serverFromString(reactor, "systemd:domain=INET:index=0").listen(wrapped)
    loop.until(lambda: ours.sinks and ours.sinks[0].lost)
    (sink,) = ours.sinks
    assert bytes(sink.data) == UP and not sink.violations
    assert ours.layers == {TLSTransport} and any(ours.left)
    print("well")


class ClientTests(BudgetTestCase):
    """Clients."""

    def trust(self) -> Any:
        """What a client of ours is made with: the certificate must be signed, and for localhost."""
        return optionsForClientTLS("localhost", trustRoot=our_trust())

    def test_connect_ssl(self) -> None:
        """``reactor.connectSSL``, on every loop."""

        def connect(reactor: Any, ours: Ours, port: int) -> None:
            reactor.connectSSL("127.0.0.1", port, ours, self.trust())

        for name in LOOPS:
            self.connect(name, connect)

    def test_tls_description(self) -> None:
        """``tls:`` in the description of an endpoint."""

        def connect(reactor: Any, ours: Ours, port: int) -> None:
            clientFromString(reactor, f"tls:localhost:{port}:trustRoots={folder}").connect(ours)

        with trust_folder() as folder, quiet():
            self.connect("epoll", connect)

    def test_ssl_endpoint(self) -> None:
        """``SSL4ClientEndpoint``."""

        def connect(reactor: Any, ours: Ours, port: int) -> None:
            SSL4ClientEndpoint(reactor, "127.0.0.1", port, self.trust()).connect(ours)

        self.connect("epoll", connect)

    def test_wrapped_endpoint(self) -> None:
        """``wrapClientTLS`` around an endpoint, on every loop."""

        def connect(reactor: Any, ours: Ours, port: int) -> None:
            plain = TCP4ClientEndpoint(reactor, "127.0.0.1", port)
            wrapClientTLS(self.trust(), plain, reactor).connect(ours)

        for name in LOOPS:
            self.connect(name, connect)

    def test_wrapped_host_name(self) -> None:
        """The same around an endpoint that looks up a name and tries its addresses."""

        def connect(reactor: Any, ours: Ours, port: int) -> None:
            wrapClientTLS(self.trust(), HostnameEndpoint(reactor, b"localhost", port), reactor).connect(ours)

        self.connect("epoll", connect)


class UpgradingServer(ListeningSink):
    """Starts TLS on command, and hands on what came behind the command, as part of the handshake.

    :ivar handed_on: what that was.
    """

    plaintext, handed_on = b"", b""

    def begin(self, rest: bytes) -> None:
        self.tls.write(GO)
        self.tls.startTLS(our_server_context())
        self.hand_on(rest)

    def hand_on(self, rest: bytes) -> None:
        self.handed_on = rest
        if rest:
            self.tls.protocol.dataReceived(rest)

    def dataReceived(self, data: bytes) -> None:
        if self.tls.TLS:
            super().dataReceived(data)
            return
        self.plaintext += data
        if b"\n" in self.plaintext:
            line, _, rest = self.plaintext.partition(b"\n")
            assert line + b"\n" in (COMMAND, GO), line
            self.begin(rest)


class UpgradingClient(UpgradingServer):
    """Asks for TLS, and starts it when the answer comes."""

    def connectionMade(self) -> None:
        super().connectionMade()
        self.tls.write(COMMAND)

    def begin(self, rest: bytes) -> None:
        self.tls.startTLS(optionsForClientTLS("localhost", trustRoot=our_trust()))
        self.hand_on(rest)


class CarelessServer(UpgradingServer):
    """Throws away what came behind the command."""

    def hand_on(self, rest: bytes) -> None:
        self.handed_on = rest


EVIL = b"DELETE everything\r\n"


class UpgradeTests(DialogueTestCase):
    """``startTLS`` in the middle of a plaintext dialogue."""

    has_leftovers = False  # with stock's reads of 64 KiB and our budget there are none

    def listen(self, reactor: Any, ours: Any) -> Any:
        return reactor.listenTCP(0, ours, interface="127.0.0.1")

    def test_server(self) -> None:
        """Our server is told STARTTLS, on every loop."""
        for name in LOOPS:
            self.serve(name, self.listen, COMMAND, UpgradingServer)

    def test_client(self) -> None:
        """Our client says it, on every loop."""

        def connect(reactor: Any, ours: Ours, port: int) -> None:
            reactor.connectTCP("127.0.0.1", port, ours)

        for name in LOOPS:
            self.connect(name, connect, COMMAND, UpgradingClient)

    def test_hello_in_the_same_segment(self) -> None:
        """A client that does not wait for the answer: its ClientHello comes with the command."""

        def hasty(port: int, version: ssl.TLSVersion) -> bytes:
            with dial(port) as plain:
                incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
                context = their_client_context(version)
                session = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
                self.assertRaises(ssl.SSLWantReadError, session.do_handshake)
                plain.sendall(COMMAND + outgoing.read())
                assert plain.recv(len(GO), socket.MSG_WAITALL) == GO

                def step(operation: Callable[[], Any]) -> Any:
                    while True:
                        try:
                            return operation()
                        except ssl.SSLWantReadError:
                            plain.sendall(outgoing.read())
                            incoming.write(plain.recv(1 << 16))
                        finally:
                            plain.sendall(outgoing.read())

                step(session.do_handshake)
                for record in records(UP):
                    session.write(record)
                plain.sendall(outgoing.read())
                got = b""
                while len(got) < len(DOWN):
                    got += step(lambda: session.read(1 << 16))
                step(session.unwrap)
                return got

        for name in LOOPS:
            for version in VERSIONS:
                with self.loop(name) as loop:
                    ours = Ours(loop, UpgradingServer)
                    port = self.listen(loop.reactor, ours).getHost().port
                    self.assert_whole(ours, self.in_thread(hasty, port, version), (name, version))
                    self.assertIn(b"\x16\x03", ours.sinks[0].handed_on[:2])

    def test_command_injected_before_a_server(self) -> None:
        """Plaintext that somebody put behind the command is never read as if it had come over TLS."""
        for version in VERSIONS:
            for kind in (UpgradingServer, CarelessServer):
                with self.loop() as loop:
                    ours = Ours(loop, kind)
                    port = self.listen(loop.reactor, ours).getHost().port
                    far = self.in_thread(visit, port, their_client_context(version), COMMAND + EVIL)
                    if kind is CarelessServer:  # it is gone
                        self.assert_whole(ours, far, version)
                        (sink,) = ours.sinks
                    else:  # it breaks the handshake
                        loop.until(far.done, longest=0.01)
                        self.assertIsInstance(far.exception(), OSError)
                        (sink,) = ours.sinks
                        loop.until(lambda sink=sink: sink.lost)
                        self.assertEqual([reason.type for reason in sink.lost], [SSL.Error])
                        self.assertEqual((sink.deliveries, sink.is_shaken), ([], False))
                    self.assertEqual(sink.handed_on, EVIL)

    def test_answer_injected_before_a_client(self) -> None:
        """The same for our client, and what is put behind the server's answer."""

        def lie(listening: socket.socket) -> None:
            plain, _ = listening.accept()
            with plain:
                plain.settimeout(DEADLINE)
                assert plain.recv(len(COMMAND), socket.MSG_WAITALL) == COMMAND
                plain.sendall(GO + EVIL)
                while plain.recv(1 << 16):
                    pass

        with self.loop() as loop, socket.create_server(("127.0.0.1", 0)) as listening:
            listening.settimeout(DEADLINE)
            ours = Ours(loop, UpgradingClient)
            far = self.in_thread(lie, listening)
            loop.reactor.connectTCP("127.0.0.1", listening.getsockname()[1], ours)
            loop.until(far.done, longest=0.01)
            far.result()
            (sink,) = ours.sinks
            loop.until(lambda: sink.lost)
            self.assertEqual([reason.type for reason in sink.lost], [SSL.Error])
            self.assertEqual((sink.deliveries, sink.is_shaken, sink.handed_on), ([], False, EVIL))


class CertificateTests(DialogueTestCase):
    """Who is who."""

    has_leftovers = False

    def refused(self, ours: Ours, far: Future[Any], why: type[BaseException]) -> None:
        """Both ends of a dialogue that must not begin."""
        ours.loop.until(far.done, longest=0.01)
        self.assertIsInstance(far.exception(), OSError)  # a reset, or an alert: ssl.SSLError is an OSError
        (sink,) = ours.sinks
        ours.loop.until(lambda: sink.lost, longest=0.01)
        self.assertEqual([reason.type for reason in sink.lost], [why])
        self.assertEqual(sink.deliveries, [])

    def test_server_demands_a_certificate(self) -> None:
        """A client whose certificate the authority signed is served and known by name; one without is turned away."""
        context = our_server_context(trustRoot=our_trust())
        for version in VERSIONS:
            for name in ("alice", None):
                with self.loop() as loop:
                    ours = Ours(loop)
                    seen: list[str] = []

                    def shaken(sink: Sink, seen: list[str] = seen) -> None:
                        seen.append(sink.tls.getPeerCertificate().get_subject().CN)

                    ours.on_handshake = shaken
                    port = loop.reactor.listenSSL(0, ours, context, interface="127.0.0.1").getHost().port
                    far = self.in_thread(visit, port, their_client_context(version, name))
                    if name is None:
                        self.refused(ours, far, SSL.Error)
                        self.assertEqual(seen, [])
                    else:
                        with quiet():
                            self.assert_whole(ours, far, (name, version))
                        self.assertEqual(seen, ["alice"])

    def test_server_demands_one_of_our_client(self) -> None:
        """The other way about: our client shows its certificate, or is turned away."""
        certificate = PrivateCertificate.loadPEM(pem(*identity("alice")))
        for version in VERSIONS:
            context = their_server_context(version)
            context.verify_mode = ssl.CERT_REQUIRED
            for shown in (certificate, None):
                with self.loop() as loop, socket.create_server(("127.0.0.1", 0)) as listening, quiet():
                    listening.settimeout(DEADLINE)
                    ours = Ours(loop)
                    far = self.in_thread(answer_one, listening, context)
                    trust = optionsForClientTLS("localhost", trustRoot=our_trust(), clientCertificate=shown)
                    loop.reactor.connectSSL("127.0.0.1", listening.getsockname()[1], ours, trust)
                    if shown is None:
                        self.refused(ours, far, SSL.Error)
                    else:
                        self.assert_whole(ours, far, version)

    def test_service_identity(self) -> None:
        """Our client talks to the host and the address that a certificate is for, and to no other."""
        for version in VERSIONS:
            for asked, shown, fits in (
                ("localhost", "localhost", True),
                ("127.0.0.1", "localhost", True),
                ("localhost", "other.example", False),
                ("127.0.0.1", "other.example", False),
                ("127.0.0.2", "localhost", False),
            ):
                with self.loop() as loop, socket.create_server(("127.0.0.1", 0)) as listening:
                    listening.settimeout(DEADLINE)
                    ours = Ours(loop)
                    far = self.in_thread(answer_one, listening, their_server_context(version, shown))
                    trust = optionsForClientTLS(asked, trustRoot=our_trust())
                    loop.reactor.connectSSL("127.0.0.1", listening.getsockname()[1], ours, trust)
                    if fits:
                        self.assert_whole(ours, far, (asked, shown, version))
                    else:
                        self.refused(ours, far, VerificationError)

    def test_authority(self) -> None:
        """Our client refuses a certificate that nobody it trusts has signed."""
        for version in VERSIONS:
            with self.loop() as loop, socket.create_server(("127.0.0.1", 0)) as listening:
                listening.settimeout(DEADLINE)
                ours = Ours(loop)
                far = self.in_thread(answer_one, listening, their_server_context(version))
                trust = optionsForClientTLS("localhost", trustRoot=trustRootFromCertificates([]))
                loop.reactor.connectSSL("127.0.0.1", listening.getsockname()[1], ours, trust)
                self.refused(ours, far, SSL.Error)


class ResumptionTests(DialogueTestCase):
    """A client that comes back with the session of its last connection."""

    has_leftovers = False

    def visits(self, version: ssl.TLSVersion, **options: Any) -> list[bool]:
        """Two dialogues of one client. Returns whether each resumed a session."""
        client = their_client_context(version)
        context = our_server_context(**options)
        reused: list[bool] = []
        session: ssl.SSLSession | None = None

        def visit_again(port: int) -> bytes:
            nonlocal session
            connection = client.wrap_socket(dial(port), server_hostname="localhost", session=session)
            reused.append(bool(connection.session_reused))
            return exchange(connection, keep)

        def keep(connection: ssl.SSLSocket) -> None:
            nonlocal session
            session = connection.session

        for _ in range(2):
            with self.loop() as loop:
                ours = Ours(loop)
                port = loop.reactor.listenSSL(0, ours, context, interface="127.0.0.1").getHost().port
                self.assert_whole(ours, self.in_thread(visit_again, port), version)
        return reused

    def test_resumed(self) -> None:
        """With sessions allowed the second connection resumes, and its upload arrives whole."""
        for version in VERSIONS:
            for options in ({"enableSessions": True}, {"enableSessionTickets": True}):
                self.assertEqual(self.visits(version, **options), [False, True], (version, options))

    def test_not_resumed(self) -> None:
        """Stock's default allows none: the second connection shakes hands anew, and works as well."""
        for version in VERSIONS:
            self.assertEqual(self.visits(version), [False, False], version)
