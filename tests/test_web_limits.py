"""What one client may take: bytes, time, requests and connections; and who is told when it takes more."""

from __future__ import annotations

import socket
import ssl
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import ISSLTransport
from twisted.internet.ssl import DefaultOpenSSLContextFactory
from twisted.internet.task import Clock
from twisted.internet.threads import deferToThread
from twisted.logger import capturedLogs, formatEvent
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.server import Request
from twisted.web.static import File
from zope.interface import directlyProvides, providedBy

from lwstwisted.certificate import ensure_development_certificate
from lwstwisted.interfaces import IRequestBody
from lwstwisted.web.deadline import MinimumRate
from lwstwisted.web.limits import DEFAULT_LIMITS, Limits
from lwstwisted.web.site import LINGERING, StreamingSite, network_of
from lwstwisted.web.tally import TALLY_TIME, Tally
from tests.test_web_channel import Sink, Streaming, Taker, Talk, Twin, answers, get, ok, put
from tests.test_web_wire import chunked

RATE, SPAN = DEFAULT_LIMITS.body_rate, DEFAULT_LIMITS.body_rate_time


class RecordTests(SynchronousTestCase):
    """The record of all limits."""

    def test_nothing_could_be_served(self) -> None:
        """A limit of 0 or less is refused when it is set, and the sentence names it."""
        for field in fields(Limits):
            with self.assertRaises(ValueError) as caught:
                replace(DEFAULT_LIMITS, **{field.name: -1})
            self.assertIn(field.name, str(caught.exception))
        with self.assertRaises(ValueError):
            Limits(connections=0)
        Limits(body_rate=0, connections_per_address=0)

    def test_every_limit_is_explained(self) -> None:
        """Each has a line in the documentation."""
        for field in fields(Limits):
            self.assertIn(f":ivar {field.name}:", Limits.__doc__ or "")


class MinimumRateTests(SynchronousTestCase):
    """The clock of a body that may be slow, but not too slow."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.cut: list[float] = []
        self.rate = MinimumRate(self.clock, 10, 30, lambda: self.cut.append(self.clock.seconds()))
        self.rate.begin()
        self.rate.listen()

    def run_for(self, seconds: int, per_second: int) -> None:
        for _ in range(seconds):
            self.rate.count(per_second)
            self.clock.advance(1)

    def test_first_span(self) -> None:
        """The first span is not judged, the second is."""
        self.run_for(59, 0)
        self.assertEqual(self.cut, [])
        self.run_for(1, 0)
        self.assertEqual(self.cut, [60])

    def test_a_fast_start_does_not_pay_for_later(self) -> None:
        """Each span is judged alone."""
        self.run_for(30, 100_000)
        self.run_for(30, 9)
        self.assertEqual(self.cut, [60])

    def test_fast_enough(self) -> None:
        """Just the least rate may go on for ever, evenly or in bursts."""
        self.run_for(600, 10)
        for _ in range(20):
            self.run_for(1, 300)
            self.run_for(29, 0)
        self.assertEqual(self.cut, [])

    def test_pauses(self) -> None:
        """Only the time in which we listen counts, however it is cut into pieces."""
        for _ in range(118):
            self.clock.advance(0.5)
            self.rate.hold()
            self.clock.advance(100)
            self.rate.listen()
        self.assertEqual(self.cut, [])
        self.clock.advance(1)
        self.assertEqual(len(self.cut), 1)

    def test_next_body(self) -> None:
        """The next body on the connection begins anew."""
        self.run_for(45, 0)
        self.rate.hold()
        self.rate.begin()
        self.rate.listen()
        self.run_for(59, 0)
        self.assertEqual(self.cut, [])

    def test_none(self) -> None:
        """A rate of 0 costs no timer."""
        self.rate.stop()
        MinimumRate(self.clock, 0, 30, lambda: None).listen()
        self.assertEqual(self.clock.getDelayedCalls(), [])


class BodyRateTests(SynchronousTestCase):
    """Bodies that trickle."""

    def trickle(self, talk: Talk, seconds: int, size: int, every: int) -> None:
        for at in range(seconds):
            if not talk.answers and at % every == 0:
                talk.send(bytes(size))
            talk.clock.advance(1)

    def test_trickle(self) -> None:
        """lws-cases 35: a byte every two seconds is cut after a minute, and the resource is told."""
        taker = Taker()
        talk = Talk(taker)
        talk.send(put(b"", length=1_000_000))
        self.trickle(talk, 59, 1, 2)
        self.assertEqual(talk.raw, b"")
        self.trickle(talk, 1, 1, 2)
        self.assertEqual([(a.status, a.closes) for a in talk.answers], [(408, True)])
        self.assertEqual([str(result) for result in taker.results], ["body_too_slow"])

    def test_chunked_trickle(self) -> None:
        """So is a chunked one, and a body that is spooled for a stock resource."""
        for resource in (Taker(), File("/nonexistent")):
            talk = Talk(resource)
            talk.send(chunked())
            for _ in range(60):
                talk.send(b"1\r\nx\r\n")
                talk.clock.advance(1)
            self.assertEqual([a.status for a in talk.answers], [408])

    def test_stalls(self) -> None:
        """lws-cases 35: one that stalls for a second now and then, or sends all of a span at once, goes on."""
        taker = Taker()
        talk = Talk(taker)
        talk.send(put(b"", length=20 * 4 * RATE * 30 + 1))
        for _ in range(20):
            self.trickle(talk, 30, 4 * RATE, 2)
            self.trickle(talk, 30, 120 * RATE // 2, 30)
        self.assertEqual(talk.raw, b"")

    def test_our_pause(self) -> None:
        """While the consumer holds the body back, its client is not slow."""
        sink = Sink()
        taker = Taker(sink)
        talk = Talk(taker)
        talk.send(put(b"a", length=3))
        sink.producer.pauseProducing()  # type: ignore[union-attr]
        talk.clock.advance(100 * SPAN)
        sink.producer.resumeProducing()  # type: ignore[union-attr]
        talk.clock.advance(SPAN)
        talk.send(b"bc")
        self.assertEqual(talk.statuses, [200])

    def test_small_uploads(self) -> None:
        """An upload that is smaller than the least of a span is not slow when it is whole."""
        talk = Talk(Taker())
        for _ in range(10):
            talk.send(put(b"abc"))
            talk.clock.advance(DEFAULT_LIMITS.idle_time - 1)
        self.assertEqual(talk.statuses, [200] * 10)


class BodyBytesTests(SynchronousTestCase):
    """How large the body of any request may be."""

    def test_announced(self) -> None:
        """One byte more than the limit is refused on the head."""
        limits = Limits(body_bytes=10)
        talk = Talk(Taker(), limits=limits)
        talk.send(put(b"", length=11))
        self.assertEqual(talk.statuses, [413])
        talk = Talk(Taker(), limits=limits)
        talk.send(put(bytes(10)))
        self.assertEqual(talk.statuses, [200])

    def test_chunked(self) -> None:
        """The chunks are added up, so that many small ones are not let through either."""
        limits = Limits(body_bytes=10)
        talk = Talk(Taker(), limits=limits)
        talk.send(chunked(b"5\r\n12345\r\n" * 2, b"0\r\n\r\n"))
        self.assertEqual(talk.statuses, [200])
        talk.send(chunked(b"5\r\n12345\r\n" * 2, b"1\r\n6\r\n0\r\n\r\n"))
        self.assertEqual(talk.statuses, [200, 413])


class RequestsTests(SynchronousTestCase):
    """How many requests one connection may bring."""

    def test_the_last_one(self) -> None:
        """Its answer says that the connection is closed, and it is; no request is lost without a word."""
        talk = Talk(Taker(), limits=Limits(requests=3))
        talk.send(put(b"a") + put(b"b") + put(b"c") + put(b"d"))
        self.assertEqual([(a.status, a.closes) for a in talk.answers], [(200, False), (200, False), (200, True)])
        self.assertTrue(talk.transport.disconnecting)


class TLSTwin(Twin):
    """A transport whose handshake is still to come."""

    def __init__(self) -> None:
        super().__init__()
        directlyProvides(self, providedBy(self), ISSLTransport)

    def setTcpNoDelay(self, enabled: bool) -> None:
        """See ``ITCPTransport``."""


def is_aborted(protocol: Any) -> bool:
    """Whether its connection was closed at once."""
    return bool(protocol.transport.disconnected)


class ConnectionsTests(SynchronousTestCase):
    """How many connections there may be, in all and of one client."""

    def setUp(self) -> None:
        self.events = self.enterContext(capturedLogs())

    @property
    def lines(self) -> list[str]:
        """What the tally has logged."""
        return [formatEvent(event) for event in self.events if event["log_namespace"] == "lwstwisted.web.tally"]

    def begin(self, **limits: Any) -> None:
        self.clock = Clock()
        self.site = StreamingSite(Streaming(self.receive), reactor=self.clock, limits=Limits(**limits))  # type: ignore

    async def receive(self, request: Request, body: IRequestBody) -> None:
        ok(request)

    def connect(self, host: Any = "192.0.2.1", transport: Twin | None = None) -> Any:
        transport = Twin() if transport is None else transport
        address = host
        if isinstance(host, str):
            address = (IPv6Address if ":" in host else IPv4Address)("TCP", host, 1234)
        transport.peerAddr = address
        protocol: Any = self.site.buildProtocol(address)  # type: ignore[arg-type]
        protocol.makeConnection(transport)
        return protocol

    def serves(self, protocol: Any) -> bool:
        """Whether a request on it is answered."""
        if protocol.transport.disconnecting or is_aborted(protocol):
            return False
        protocol.transport.clear()
        protocol.dataReceived(get())
        return [answer.status for answer in answers(protocol.transport.value())] == [200]

    def lose(self, protocol: Any) -> None:
        protocol.connectionLost(Failure(ConnectionDone()))

    def test_all(self) -> None:
        """One too many is told so, the others go on, and when one leaves the next is served."""
        self.begin(connections=3)
        served = [self.connect(f"192.0.2.{n}") for n in range(3)]
        late = self.connect("192.0.2.9")
        late.dataReceived(get())  # it is not looked at
        (answer,) = answers(late.transport.value())
        self.assertEqual((answer.status, answer.closes), (503, True))
        self.clock.advance(DEFAULT_LIMITS.linger_time)
        self.assertTrue(late.transport.disconnecting)
        self.assertTrue(all(self.serves(protocol) for protocol in served))
        self.lose(late)
        self.assertFalse(self.serves(self.connect("192.0.2.9")))
        self.lose(served[0])
        self.assertTrue(self.serves(self.connect("192.0.2.9")))

    def test_of_one_address(self) -> None:
        """One client's connections are no other's; a /64 of IPv6 is one client."""
        self.begin(connections_per_address=2)
        for one, other in (
            (["192.0.2.1"] * 3, "192.0.2.2"),
            (["2001:db8::1", "2001:db8::2", "2001:db8::ffff:1"], "2001:db8:0:1::1"),
            (["::ffff:192.0.2.7", "192.0.2.7", "::ffff:192.0.2.7"], "::ffff:192.0.2.8"),
        ):
            self.assertEqual([self.serves(self.connect(host)) for host in one], [True, True, False], one)
            self.assertTrue(self.serves(self.connect(other)))

    def test_left(self) -> None:
        """Who comes and goes a thousand times is served each time, and nothing is remembered."""
        self.begin(connections_per_address=1)
        for _ in range(1000):
            protocol = self.connect()
            self.assertTrue(self.serves(protocol))
            self.lose(protocol)
        self.assertFalse(self.site._of_network or self.site._admitted or self.site.channels)

    def test_without_an_address(self) -> None:
        """Clients of a UNIX socket have none: they count for the sum only."""
        self.begin(connections_per_address=1, connections=3)
        self.assertEqual(network_of(UNIXAddress("/run/x")), "")
        self.assertTrue(all(self.serves(self.connect(UNIXAddress(None))) for _ in range(3)))
        self.assertFalse(self.serves(self.connect(UNIXAddress(None))))

    def test_no_limit_per_address(self) -> None:
        """0 switches it off, for a server behind a proxy."""
        self.begin(connections_per_address=0)
        self.assertTrue(all(self.serves(self.connect()) for _ in range(1100)))

    def test_tls(self) -> None:
        """One too many over TLS is closed before a handshake is spent on it."""
        self.begin(connections=1)
        self.connect()
        late = self.connect(transport=TLSTwin())
        self.assertTrue(is_aborted(late))
        self.assertEqual(late.transport.value(), b"")

    def test_flood(self) -> None:
        """A thousand too many are closed at once, but for the first hundred; the log has one line for them."""
        self.begin(connections=1)
        self.connect()
        late = [self.connect() for _ in range(1000)]
        self.assertEqual(sum(not is_aborted(protocol) for protocol in late), LINGERING)
        self.clock.advance(TALLY_TIME)
        (line,) = self.lines
        self.assertIn("1000 too_many_connections", line)
        self.assertIn("192.0.2.1", line)

    def test_bad_requests(self) -> None:
        """So has it for a thousand requests that were none."""
        self.begin()
        for _ in range(1000):
            self.connect().dataReceived(b"GET / HTTP/1.1\r\n\r\n")
        self.clock.advance(TALLY_TIME)
        (line,) = self.lines
        self.assertIn("1000 bad_host", line)

    def test_tally_stops(self) -> None:
        """What was refused in the last second is logged when the service stops."""
        clock = Clock()
        tally = Tally(clock)
        tally.count("bad_host", "somebody")
        tally.stop()
        tally.stop()
        self.assertEqual((len(self.lines), clock.getDelayedCalls()), (1, []))

    def test_handshake_time(self) -> None:
        """A client that connects and never agrees on TLS is cut at its deadline, and counted."""
        self.begin()
        protocol = self.connect(transport=TLSTwin())
        self.clock.advance(DEFAULT_LIMITS.handshake_time - 0.1)
        self.assertFalse(is_aborted(protocol))
        self.clock.advance(0.1)
        self.assertTrue(is_aborted(protocol))
        self.clock.advance(TALLY_TIME)
        self.assertIn("1 handshake_timeout", self.lines[0])

    def test_handshake_in_time(self) -> None:
        """One that agrees in time may be idle as long as any."""
        self.begin()
        protocol = self.connect(transport=TLSTwin())
        self.clock.advance(DEFAULT_LIMITS.handshake_time - 0.1)
        protocol.handshakeCompleted()
        self.clock.advance(DEFAULT_LIMITS.idle_time - 0.1)
        self.assertTrue(self.serves(protocol))

    def test_handshake_without_a_word(self) -> None:
        """A protocol between us and TLS may not tell of the handshake: then the first byte does."""
        self.begin()
        protocol = self.connect(transport=TLSTwin())
        self.assertTrue(self.serves(protocol))
        self.clock.advance(DEFAULT_LIMITS.idle_time - 0.1)
        self.assertTrue(self.serves(protocol))


class RealHandshakeTests(TestCase):
    """The same with a real TLS port."""

    timeout = 20

    async def test_silence_on_the_tls_port(self) -> None:
        """A client that says nothing, half a ClientHello or plain HTTP to a TLS port is cut, and no other is."""
        from twisted.internet import reactor

        site = StreamingSite(Streaming(self.receive), limits=Limits(handshake_time=0.5))
        with tempfile.TemporaryDirectory() as folder:
            pair = str(ensure_development_certificate(Path(folder, "pair.pem")))
            context = DefaultOpenSSLContextFactory(pair, pair)
            port: Any = reactor.listenSSL(0, site, context, interface="127.0.0.1")  # type: ignore[attr-defined]
            trusted = ssl.create_default_context(cafile=pair)
        self.addCleanup(lambda: Deferred.fromCoroutine(site.stop()))
        self.addCleanup(port.stopListening)
        address = ("127.0.0.1", port.getHost().port)

        def silent(said: bytes) -> bool:
            with socket.create_connection(address, timeout=10) as client:
                client.sendall(said)
                try:
                    while client.recv(1000):
                        pass
                except ConnectionResetError:
                    pass
                return True

        def polite() -> bytes:
            client = socket.create_connection(address, timeout=10)
            with trusted.wrap_socket(client, server_hostname="localhost") as connection:
                time.sleep(1)  # longer than the handshake may take
                connection.sendall(get())
                return connection.recv(1000)

        others = deferToThread(polite)
        for said in (b"", b"\x16\x03\x01\x02\x00\x01", get()):
            self.assertTrue(await deferToThread(silent, said))
        self.assertEqual(answers(await others)[0].status, 200)

    async def receive(self, request: Request, body: IRequestBody) -> None:
        ok(request)

