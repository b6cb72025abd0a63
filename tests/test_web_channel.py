"""A connection: when a body flows, when it waits, what is answered, and when the connection ends.

Most of these run on a transport in memory and a clock that is moved by hand; the last ones, on TCP.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import h11
from twisted.internet import reactor as global_reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IConsumer, IPullProducer, IPushProducer
from twisted.internet.ssl import DefaultOpenSSLContextFactory
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request
from twisted.web.static import File
from zope.interface import implementer

from lwstwisted import errors
from lwstwisted.certificate import ensure_development_certificate
from lwstwisted.errors import BodyCut, BodyStopped, Refusal, Refused
from lwstwisted.interfaces import IBufferReceiver, IRequestBody, IStreamingResource
from lwstwisted.web.channel import READ_AHEAD
from lwstwisted.web.limits import DEFAULT_LIMITS as LIMITS
from lwstwisted.web.limits import Limits
from lwstwisted.web.outgoing import ANSWER_SLICE
from lwstwisted.web.site import StreamingSite
from tests.test_web_wire import BODY_ROWS, HEAD_ROWS, NEXT, chunked, head

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
Receive = Callable[[Request, IRequestBody], Awaitable[None]]


def put(data: bytes, *lines: bytes, length: int | None = None) -> bytes:
    """A PUT with a counted body."""
    return head(b"Content-Length: %d" % (len(data) if length is None else length), *lines) + data


def get(path: bytes = b"/", *lines: bytes, method: bytes = b"GET") -> bytes:
    return head(*lines, first=method + b" " + path + b" HTTP/1.1")


class Answer:
    """One response, as a client reads it."""

    def __init__(self, response: h11.Response, body: bytes, is_whole: bool) -> None:
        self.status = response.status_code
        self.headers = dict(response.headers.raw_items())
        self.fields = {name.lower(): value for name, value in response.headers.raw_items()}
        self.body = body
        self.is_whole = is_whole

    @property
    def closes(self) -> bool:
        return self.fields.get(b"connection") == b"close"


def answers(data: bytes, methods: str = "", at_end: bool = False) -> list[Answer]:
    """Read the responses in ``data``; every byte must belong to one.

    :param methods: the letters G and H, where a HEAD request has no body in its response.
    :param at_end: whether the server has closed behind them.
    """
    found = []
    while data:
        if data.startswith(CONTINUE):
            data = data[len(CONTINUE) :]
            continue
        client = h11.Connection(h11.CLIENT, max_incomplete_event_size=2**20)
        method = "HEAD" if methods[len(found) : len(found) + 1] == "H" else "GET"
        client.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
        client.send(h11.EndOfMessage())
        client.receive_data(data)
        response = client.next_event()
        assert isinstance(response, h11.Response), (response, data[:200])
        body, is_whole = b"", False
        while isinstance(event := client.next_event(), h11.Data):
            body += bytes(event.data)
        if event is h11.NEED_DATA and at_end:
            client.receive_data(b"")
            try:
                event = client.next_event()
            except h11.RemoteProtocolError:
                pass
        is_whole = isinstance(event, h11.EndOfMessage)
        found.append(Answer(response, body, is_whole))
        data = client.trailing_data[0] if is_whole else b""
    return found


class Twin(StringTransport):
    """A transport in memory, which counts what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: list[str] = []

    def pauseProducing(self) -> None:
        super().pauseProducing()
        self.turns.append("pause")

    def resumeProducing(self) -> None:
        super().resumeProducing()
        self.turns.append("resume")


class BoundedTwin(Twin):
    """One whose client reads only when told, behind a buffer of 64 KiB, as a socket's transport has it."""

    limit = 64 * 1024
    unread = 0
    said_full = False

    def write(self, data: bytes) -> None:
        super().write(data)
        self.unread += len(data)
        if self.producer is not None and self.streaming and self.unread > self.limit:
            self.said_full = True
            self.producer.pauseProducing()

    def writeSequence(self, data: list[bytes]) -> None:
        for piece in data:
            self.write(piece)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        super().registerProducer(producer, streaming)
        if not streaming:
            producer.resumeProducing()

    def drain(self) -> None:
        """The client reads what was sent."""
        self.unread = 0
        if self.producer is not None and (self.said_full or not self.streaming):
            self.said_full = False
            self.producer.resumeProducing()


@implementer(IStreamingResource)
class Streaming(Resource):
    """A resource that is a function."""

    isLeaf = True

    def __init__(self, receive: Receive) -> None:
        super().__init__()
        self._receive = receive

    async def receive(self, request: Request, body: IRequestBody) -> None:
        await self._receive(request, body)


@implementer(IConsumer)
class Sink:
    """Takes a body as bytes."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.types: set[type] = set()
        self.producer: IRequestBody | None = None
        self.is_registered = False
        self.on_piece: Callable[[], object] = lambda: None

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        assert streaming
        self.producer = producer
        self.is_registered = True

    def unregisterProducer(self) -> None:
        self.is_registered = False

    def write(self, data: bytes) -> None:
        self.types.add(type(data))
        self.pieces.append(bytes(data))
        self.on_piece()


@implementer(IBufferReceiver)
class BufferSink(Sink):
    """Takes it as memoryviews."""

    def bufferReceived(self, view: memoryview) -> None:
        self.write(view)  # type: ignore[arg-type]


def ok(request: Request, body: bytes = b"ok") -> None:
    request.setHeader(b"Content-Length", b"%d" % len(body))
    request.write(body)
    request.finish()


class Talk:
    """One connection to a site with one resource, in memory."""

    def __init__(self, resource: Resource | Receive, transport: Twin | None = None, **options: Any) -> None:
        if not isinstance(resource, Resource):
            resource = Streaming(resource)
        self.clock = Clock()
        self.site = StreamingSite(resource, reactor=self.clock, **options)
        self.transport = transport or Twin()
        protocol: Any = self.site.buildProtocol(None)  # type: ignore[arg-type]
        self.channel = protocol
        self.channel.makeConnection(self.transport)

    def send(self, data: bytes, size: int = 0) -> None:
        """Bring bytes, in memory that is reused afterwards. A paused transport brings none."""
        for at in range(0, len(data), size or max(1, len(data))):
            assert self.transport.producerState == "producing", "the transport is paused"
            memory = bytearray(data[at : at + size] if size else data)
            self.channel.bufferReceived(memoryview(memory))
            memory[:] = b"\xff" * len(memory)

    def send_while_wanted(self, data: bytes, size: int) -> int:
        """Bring bytes until the transport is paused; returns how many."""
        sent = 0
        while sent < len(data) and self.transport.producerState == "producing":
            self.send(data[sent : sent + size])
            sent += size
        return min(sent, len(data))

    def lose(self) -> None:
        """The connection is lost, as far as the transport knows."""
        self.channel.connectionLost(Failure(ConnectionLost()))

    @property
    def raw(self) -> bytes:
        return self.transport.value()

    @property
    def answers(self) -> list[Answer]:
        return answers(self.raw)

    @property
    def statuses(self) -> list[int]:
        return [answer.status for answer in self.answers]

    @property
    def is_closed(self) -> bool:
        return self.transport.disconnecting and not self.transport.disconnected

    @property
    def is_aborted(self) -> bool:
        return self.transport.disconnected


class Taker:
    """A resource's function that takes the body and answers with what the test wants."""

    def __init__(self, sink: Sink | None = None) -> None:
        self.sink = sink or Sink()
        self.results: list[object] = []
        self.finishes: list[object] = []
        self.requests: list[Request] = []

    async def __call__(self, request: Request, body: IRequestBody) -> None:
        self.requests.append(request)
        request.notifyFinish().addBoth(self.finishes.append)
        try:
            await body.deliver_to(self.sink)
        except Exception as failure:
            self.results.append(failure)
            raise
        self.results.append(None)
        ok(request)


class StreamingTests(SynchronousTestCase):
    """A streaming resource sees its body arrive."""

    def test_bytes_as_they_come(self) -> None:
        """Each packet of an upload reaches the resource when it comes, and the answer follows the last one."""
        taker = Taker()
        talk = Talk(taker)
        talk.send(put(b"", length=6))
        for piece in (b"ab", b"cd", b"ef"):
            self.assertEqual(taker.results, [])
            talk.send(piece)
        self.assertEqual(taker.sink.pieces, [b"ab", b"cd", b"ef"])
        self.assertEqual(taker.sink.types, {bytes})
        self.assertEqual((taker.results, taker.finishes), ([None], [None]))
        self.assertEqual([(a.status, a.body, a.closes) for a in talk.answers], [(200, b"ok", False)])
        self.assertFalse(taker.sink.is_registered)

    def test_views_as_they_come(self) -> None:
        """A consumer that can take memoryviews gets them."""
        taker = Taker(BufferSink())
        talk = Talk(taker)
        talk.send(put(b"abc") + put(b"def"), size=7)
        self.assertEqual(taker.sink.data, b"abcdef")
        self.assertEqual(taker.sink.types, {memoryview})
        self.assertEqual(talk.statuses, [200, 200])

    def test_chunked(self) -> None:
        """lws-cases 29: a chunked upload arrives decoded, and its length is not known beforehand."""
        lengths = []

        async def receive(request: Request, body: IRequestBody) -> None:
            lengths.append(body.length)
            await taker(request, body)

        taker = Taker()
        talk = Talk(receive)
        talk.send(chunked(b"3\r\nabc\r\n", b"2;x\r\nde\r\n0\r\nT: 1\r\n\r\n"), size=1)
        self.assertEqual((lengths, taker.sink.data, talk.statuses), ([None], b"abcde", [200]))

    def test_nothing_before_it_is_wanted(self) -> None:
        """The body waits until the resource has decided; then it has all of it, in order."""
        bodies = []

        async def receive(request: Request, body: IRequestBody) -> None:
            bodies.append(body)

        sink = Sink()
        talk = Talk(receive)
        talk.send(put(b"abc", length=6))
        talk.send(b"def" + get())
        self.assertEqual(sink.pieces, [])
        done = bodies[0].deliver_to(sink)
        self.assertEqual(sink.data, b"abcdef")
        self.assertIsNone(self.successResultOf(done))
        self.assertRaises(RuntimeError, bodies[0].deliver_to, sink)

    def test_surplus_is_the_next_request(self) -> None:
        """lws-cases 25: POST and GET in one record. What follows a counted body is never a part of it."""
        taker = Taker()
        talk = Talk(taker)
        talk.send(put(b"hello") + get(b"/next"))
        self.assertEqual(taker.sink.data, b"hello")
        self.assertEqual([request.path for request in taker.requests], [b"/f", b"/next"])
        self.assertEqual(talk.statuses, [200, 200])

    def test_a_request_without_a_body(self) -> None:
        """A GET to a streaming resource is answered, whether it looks at the body or not; the connection stays."""

        async def ignores(request: Request, body: IRequestBody) -> None:
            ok(request)

        for receive in (ignores, Taker()):
            talk = Talk(receive)
            talk.send(get() + get())
            self.assertEqual([(a.status, a.closes) for a in talk.answers], [(200, False)] * 2)

    def test_the_answer_may_begin_before_the_end(self) -> None:
        """An echo gives back all that it gets, although it pauses the body while it answers."""

        async def receive(request: Request, body: IRequestBody) -> None:
            def echo() -> None:
                sink.producer.pauseProducing()  # type: ignore[union-attr]
                request.write(sink.pieces[-1])

            sink.on_piece = echo
            await body.deliver_to(sink)
            request.finish()

        sink = Sink()
        talk = Talk(receive)
        talk.send(chunked(b"3\r\nabc\r\n3\r\ndef\r\n", b"3\r\nghi\r\n0\r\n\r\n"))
        for _ in range(3):
            sink.producer.resumeProducing()  # type: ignore[union-attr]
        self.assertEqual([(a.status, a.body, a.is_whole) for a in talk.answers], [(200, b"abcdefghi", True)])


class ContinueTests(SynchronousTestCase):
    """``Expect: 100-continue`` (lws-cases 30): 100 only when the body is wanted."""

    EXPECT = b"Expect: 100-continue"

    def test_after_acceptance(self) -> None:
        """A client that waits hears 100 when the resource takes the body, and not before."""
        bodies = []

        async def receive(request: Request, body: IRequestBody) -> None:
            bodies.append(body)

        talk = Talk(receive)
        talk.send(put(b"", self.EXPECT, length=3))
        self.assertEqual(talk.raw, b"")
        bodies[0].deliver_to(Sink())
        self.assertEqual(talk.raw, CONTINUE)
        talk.send(b"abc")
        self.assertEqual(talk.raw, CONTINUE)

    def test_not_to_a_client_that_did_not_wait(self) -> None:
        """A body that comes with its head needs no 100; nor does one of no bytes, nor a client that did not ask."""
        for data in (
            put(b"abc", self.EXPECT),
            put(b"a", self.EXPECT, length=3),
            put(b"", self.EXPECT),
            put(b"", length=3),
            head(self.EXPECT, b"Content-Length: 3", first=b"PUT /f HTTP/1.0"),
        ):
            talk = Talk(Taker())
            talk.send(data)
            self.assertNotIn(b"100 Continue", talk.raw, data)

    def test_not_after_a_refusal(self) -> None:
        """A refused client hears the final status alone."""

        async def receive(request: Request, body: IRequestBody) -> None:
            raise Refused(errors.BODY_TOO_LARGE)

        talk = Talk(receive)
        talk.send(put(b"", self.EXPECT, length=3))
        self.assertTrue(talk.raw.startswith(b"HTTP/1.1 413 "))
        self.assertEqual([(a.status, a.closes) for a in talk.answers], [(413, True)])

    def test_not_after_a_refused_head(self) -> None:
        """Nor is a head that is refused by itself continued."""
        talk = Talk(Taker())
        talk.send(head(b"Content-Length: 99999999999999999999", self.EXPECT))
        self.assertTrue(talk.raw.startswith(b"HTTP/1.1 413 "))

    def test_not_after_the_answer_began(self) -> None:
        """A resource that answers and then takes the body sends no 100 into its answer."""

        async def receive(request: Request, body: IRequestBody) -> None:
            request.write(b"early")
            await body.deliver_to(Sink())
            request.finish()

        talk = Talk(receive)
        talk.send(put(b"", self.EXPECT, length=3))
        talk.send(b"abc")
        self.assertEqual([(a.status, a.body) for a in answers(talk.raw)], [(200, b"early")])
        self.assertNotIn(b"100 Continue", talk.raw)

    def test_for_stock_resources(self) -> None:
        """A stock resource wants its body always."""
        talk = Talk(File("/nonexistent"))
        talk.send(put(b"", self.EXPECT, length=3))
        self.assertEqual(talk.raw, CONTINUE)
        talk.send(b"abc")
        self.assertEqual(talk.statuses, [404])


class RefusalTests(SynchronousTestCase):
    """Exactly one answer, whenever a resource refuses (lws-cases 39), and time to read it (27)."""

    def refusing(self, after: int, sink: Sink | None = None) -> Receive:
        """A resource that refuses after so many bytes; at once for 0."""
        sink = sink or Sink()

        async def receive(request: Request, body: IRequestBody) -> None:
            if not after:
                raise Refused(errors.BODY_TOO_LARGE, {b"X-Limit": b"%d" % after})

            def count() -> None:
                if len(sink.data) >= after:
                    body.stopProducing()

            sink.on_piece = count
            try:
                await body.deliver_to(sink)
            except BodyStopped:
                pass
            raise Refused(errors.BODY_TOO_LARGE, {b"X-Limit": b"%d" % after})

        return receive

    def test_one_answer_whenever(self) -> None:
        """Before the body, in it, at its last byte and after it: one 413, with the refusal's own fields."""
        body = bytes(100)
        for after in (0, 1, 50, 99, 100, 101):
            talk = Talk(self.refusing(after))
            for byte in put(body):
                if talk.transport.producerState == "producing":
                    talk.send(bytes([byte]))
            (answer,) = talk.answers
            self.assertEqual((answer.status, answer.fields[b"x-limit"]), (413, b"%d" % after))
            self.assertEqual(answer.body, b"The upload is larger than this server accepts.\n")
            self.assertEqual(answer.closes, after < 100, after)

    def test_a_small_body_keeps_the_connection(self) -> None:
        """A refused request that has arrived wholly costs no connection; what follows it is served."""
        for after in (0, 1, 2, 3):
            talk = Talk(self.refusing(after))
            talk.send(put(b"abc") + put(b"", b"X: second"))
            self.assertEqual([(a.status, a.closes) for a in talk.answers], [(413, False)] * 2)
            talk.send(chunked(b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n"))
            self.assertEqual(talk.statuses, [413] * 3)
            self.assertFalse(talk.is_closed)

    def test_lingering(self) -> None:
        """The rest of a refused body is read for a while, so that no reset overtakes the answer."""
        talk = Talk(self.refusing(0))
        talk.send(put(b"x", length=10**9))
        self.assertEqual(talk.statuses, [413])
        self.assertFalse(talk.is_closed)
        self.assertEqual(talk.send_while_wanted(bytes(10**6), 8192), 10**6)
        talk.clock.advance(LIMITS.linger_time - 0.1)
        self.assertFalse(talk.is_closed)
        talk.clock.advance(0.2)
        self.assertTrue(talk.is_closed)
        self.assertEqual(talk.statuses, [413])

    def test_a_client_that_never_stops(self) -> None:
        """Over TLS a transport that closes goes on reading until the peer says goodbye: the next bytes end that."""
        talk = Talk(self.refusing(0))
        talk.send(put(b"x", length=10**9))
        talk.clock.advance(LIMITS.linger_time)
        self.assertTrue(talk.is_closed)
        self.assertFalse(talk.is_aborted)
        talk.channel.bufferReceived(memoryview(b"more"))
        self.assertTrue(talk.is_aborted)

    def test_refused_during_a_pause(self) -> None:
        """A resource that refuses while its body is paused and more of it is here: one answer, and the end."""
        taken: list[object] = []
        gates: list[Deferred[None]] = []

        async def receive(request: Request, body: IRequestBody) -> None:
            sink = Sink()
            sink.on_piece = lambda: sink.producer.pauseProducing()  # type: ignore[union-attr]
            body.deliver_to(sink).addBoth(taken.append)
            gates.append(Deferred())
            await gates[0]
            raise Refused(errors.DISK_FULL)

        for end in (b"", b"0\r\n\r\n"):
            talk = Talk(receive)
            talk.send(chunked(b"4\r\nabcd\r\n" * 50 + end))
            gates.pop().callback(None)
            self.assertEqual(talk.statuses, [507])
            self.assertIsInstance(taken.pop().value, BodyCut)  # type: ignore[attr-defined]
            talk.clock.advance(LIMITS.linger_time + 1)
            self.assertTrue(talk.is_closed)

    def test_lingering_takes_no_request(self) -> None:
        """Nothing behind an early answer is read as a request."""
        talk = Talk(self.refusing(0))
        talk.send(put(b"x", length=10))
        talk.send(NEXT * 5)
        self.assertEqual(talk.statuses, [413])

    def test_a_silent_client_is_let_go(self) -> None:
        """Lingering ends by time alone, and a client that does not say goodbye is cut."""
        talk = Talk(self.refusing(0))
        talk.send(put(b"", length=10))
        talk.clock.advance(LIMITS.linger_time)
        self.assertTrue(talk.is_closed)
        talk.clock.advance(LIMITS.close_time - 0.1)
        self.assertFalse(talk.is_aborted)
        talk.clock.advance(0.2)
        self.assertTrue(talk.is_aborted)
        talk.lose()
        self.assertEqual(talk.clock.getDelayedCalls(), [])

    def test_later(self) -> None:
        """A resource may think before it refuses; the body waits, and not more of it than the read-ahead."""
        decision: Deferred[None] = Deferred()

        async def receive(request: Request, body: IRequestBody) -> None:
            await decision
            raise Refused(errors.DISK_FULL)

        talk = Talk(receive)
        talk.send(put(b"", length=10**9))
        sent = talk.send_while_wanted(bytes(10**6), 8192)
        self.assertLessEqual(sent, READ_AHEAD + 8192)
        self.assertEqual(talk.transport.turns, ["pause"])
        talk.clock.advance(10 * LIMITS.body_time)
        self.assertEqual(talk.raw, b"")
        decision.callback(None)
        self.assertEqual([(a.status, a.closes) for a in talk.answers], [(507, True)])
        self.assertEqual(talk.transport.turns, ["pause", "resume"])

    def test_answer_without_refusing(self) -> None:
        """A resource that answers and forgets the body is a refusal too, as far as the connection goes."""

        async def receive(request: Request, body: IRequestBody) -> None:
            ok(request)

        talk = Talk(receive)
        talk.send(put(b"abc") + put(b"abc", length=9))
        self.assertEqual([(a.status, a.closes) for a in talk.answers], [(200, False), (200, True)])

    def test_refused_twice(self) -> None:
        """A resource that fails after it has answered is logged, and answers no second time."""

        async def receive(request: Request, body: IRequestBody) -> None:
            ok(request)
            raise ValueError("after the answer")

        talk = Talk(receive)
        talk.send(put(b"abc"))
        self.assertEqual(talk.statuses, [200])
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)

    def test_framing_table(self) -> None:
        """Each row of the framing table over a connection: one answer with the status, and then the end."""
        for case in HEAD_ROWS + BODY_ROWS:
            with self.subTest(case.name):
                talk = Talk(Taker())
                talk.send(case.data + NEXT)
                self.assertIn(talk.statuses, [[refusal.status] for refusal in case.wanted], case.name)
                self.assertTrue(talk.answers[0].closes, case.name)
                talk.clock.advance(LIMITS.linger_time)
                self.assertTrue(talk.is_closed, case.name)
                talk.lose()
                self.assertEqual(talk.clock.getDelayedCalls(), [])

    def test_framing_broken_in_the_body(self) -> None:
        """A chunked body that goes wrong ends the upload: the resource is told, the client gets one 400."""
        taker = Taker()
        talk = Talk(taker)
        talk.send(chunked(b"3\r\nabc\r\n"))
        talk.send(b"rubbish\r\n" + NEXT)
        self.assertEqual([(a.status, a.closes) for a in talk.answers], [(400, True)])
        self.assertEqual([str(result) for result in taker.results], ["bad_chunk"])
        self.assertFalse(taker.sink.is_registered)

    def test_framing_broken_while_the_resource_works(self) -> None:
        """A resource that is busy elsewhere is answered for at once; what it says later is no second answer."""
        works: Deferred[None] = Deferred()

        async def receive(request: Request, body: IRequestBody) -> None:
            body.deliver_to(Sink()).addErrback(lambda _: None)
            await works
            raise Refused(errors.DISK_FULL)

        talk = Talk(receive)
        talk.send(chunked(b"3\r\nabc\r\n", b"rubbish\r\n"))
        self.assertEqual([(a.status, a.closes) for a in talk.answers], [(400, True)])
        works.callback(None)
        self.assertEqual(talk.statuses, [400])

    def test_late_failure_of_an_earlier_request(self) -> None:
        """What a request fails with behind its answer does not touch the one that is being served now."""
        late: Deferred[None] = Deferred()
        held: list[Request] = []

        async def receive(request: Request, body: IRequestBody) -> None:
            if request.path == b"/held":
                held.append(request)
                return
            ok(request)
            await late
            raise Refused(errors.DISK_FULL)

        talk = Talk(receive)
        talk.send(get() + get(b"/held"))
        late.callback(None)
        self.assertFalse(talk.is_aborted)
        ok(held[0])
        self.assertEqual(talk.statuses, [200, 200])
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_framing_broken_in_a_stock_resource(self) -> None:
        """The same for a resource that knows nothing of it."""
        talk = Talk(File("/nonexistent"))
        talk.send(chunked(b"3\r\nabc\r\n", b"rubbish\r\n") + NEXT)
        self.assertEqual([(a.status, a.closes) for a in talk.answers], [(400, True)])


class PauseTests(SynchronousTestCase):
    """After a pause not one byte, and after it every byte, in order."""

    def test_exact(self) -> None:
        """lws-cases 8: a consumer that pauses gets nothing until it resumes, though bytes are there."""
        sink = BufferSink()
        talk = Talk(Taker(sink))
        sink.on_piece = lambda: sink.producer.pauseProducing()  # type: ignore[union-attr]
        data = b"".join(b"1\r\n%c\r\n" % i for i in range(200))
        talk.send(chunked(data, b"0\r\n\r\n"))
        for count in range(1, 200):
            self.assertEqual(len(sink.data), count)
            sink.producer.resumeProducing()  # type: ignore[union-attr]
        self.assertEqual(sink.data, bytes(range(200)))
        self.assertEqual(talk.raw, b"")
        sink.producer.resumeProducing()  # type: ignore[union-attr]
        self.assertEqual(talk.statuses, [200])

    def test_drained_before_the_transport_goes_on(self) -> None:
        """lws-cases 9: what is held comes first, a pause in it counts, and the transport resumes once."""
        sink = Sink()
        talk = Talk(Taker(sink))
        talk.send(chunked(b"1\r\na\r\n"))
        body = sink.producer
        assert body is not None
        body.pauseProducing()
        body.pauseProducing()
        self.assertEqual(talk.transport.turns, ["pause"])
        talk.channel.bufferReceived(memoryview(b"1\r\nb\r\n1\r\nc\r\n"))  # was under way
        seen = []

        def note() -> None:
            seen.append(talk.transport.producerState)
            if sink.data == b"ab":
                body.pauseProducing()

        sink.on_piece = note
        body.resumeProducing()
        self.assertEqual((sink.data, seen, talk.transport.turns), (b"ab", ["paused"], ["pause"]))
        body.resumeProducing()
        body.resumeProducing()
        self.assertEqual((sink.data, seen), (b"abc", ["paused"] * 2))
        self.assertEqual(talk.transport.turns, ["pause", "resume"])
        talk.send(b"0\r\n\r\n")
        self.assertEqual(talk.statuses, [200])

    def test_two_reasons(self) -> None:
        """lws-cases 10: paused by the consumer and because much is held, the transport waits for both."""
        sink = Sink()
        talk = Talk(Taker(sink))
        talk.send(put(b"a", length=3 * READ_AHEAD))
        body = sink.producer
        assert body is not None
        body.pauseProducing()
        talk.channel.bufferReceived(memoryview(bytes(2 * READ_AHEAD)))  # was under way
        self.assertEqual(talk.channel._valve.reasons, {"consumer", "buffered"})
        sink.on_piece = body.pauseProducing
        body.resumeProducing()
        self.assertEqual(talk.channel._valve.reasons, {"consumer"})
        self.assertEqual(talk.transport.turns, ["pause"])
        body.resumeProducing()
        self.assertEqual(talk.transport.turns, ["pause", "resume"])

    def test_a_pause_ends_with_its_request(self) -> None:
        """lws-cases 14: paused at the last byte and never resumed; the next request on the connection is served."""
        sink = Sink()

        async def receive(request: Request, body: IRequestBody) -> None:
            def answer() -> None:
                sink.producer.pauseProducing()  # type: ignore[union-attr]
                ok(request)

            sink.on_piece = answer
            try:
                await body.deliver_to(sink)
            except BodyCut:
                pass
            else:
                ok(request)

        talk = Talk(receive)
        for data in (put(b"a"), chunked(b"1\r\na\r\n0\r\n\r\n")):
            talk.send(data)
        self.assertEqual(talk.statuses, [200, 200])
        self.assertEqual(talk.transport.producerState, "producing")
        self.assertFalse(talk.answers[0].closes)

    def test_paused_and_lost(self) -> None:
        """A connection that is lost during a pause resumes nothing; a dead transport is not called."""
        sink = Sink()
        taker = Taker(sink)
        talk = Talk(taker)
        talk.send(put(b"a", length=9))
        sink.producer.pauseProducing()  # type: ignore[union-attr]
        talk.lose()
        self.assertEqual(talk.transport.turns, ["pause"])
        self.assertIsInstance(taker.results[0], BodyCut)

    def test_stopped_while_paused(self) -> None:
        """A store that gives up while it is behind: the answer comes, and the rest is drained."""
        sink = Sink()
        taker = Taker(sink)
        talk = Talk(taker)
        talk.send(put(b"a", length=9))
        sink.producer.pauseProducing()  # type: ignore[union-attr]
        sink.producer.stopProducing()  # type: ignore[union-attr]
        self.assertIsInstance(taker.results[0], BodyStopped)
        self.assertEqual([(a.status, a.closes) for a in talk.answers], [(500, True)])
        self.assertEqual(talk.transport.turns, ["pause", "resume"])

    def test_read_ahead_is_bounded(self) -> None:
        """A client that sends requests ahead is paused while the first one is served, and served afterwards."""
        requests: list[Request] = []

        async def receive(request: Request, body: IRequestBody) -> None:
            requests.append(request)

        talk = Talk(receive)
        talk.send(get())
        data = get(b"/%d" % 7) * 3000
        sent = talk.send_while_wanted(data, 4096)
        self.assertLessEqual(sent, READ_AHEAD + 4096)
        self.assertEqual(talk.transport.turns, ["pause"])
        while requests:
            ok(requests.pop())
        self.assertEqual(talk.transport.turns, ["pause", "resume"])
        self.assertEqual(len(talk.answers), 1 + sent // len(get(b"/7")))


class KeepAliveTests(SynchronousTestCase):
    """Requests one behind the other."""

    def test_answers_in_order(self) -> None:
        """Pipelined requests are answered in their order, though the first one takes longest."""
        requests: list[Request] = []

        async def receive(request: Request, body: IRequestBody) -> None:
            requests.append(request)
            if request.path != b"/slow":
                ok(request, request.path)

        talk = Talk(receive)
        talk.send(get(b"/a") + get(b"/slow") + get(b"/b") + get(b"/c"))
        self.assertEqual([request.path for request in requests], [b"/a", b"/slow"])
        ok(requests[1], b"/slow")
        self.assertEqual([a.body for a in talk.answers], [b"/a", b"/slow", b"/b", b"/c"])

    def test_ten_posts_to_nowhere(self) -> None:
        """lws-cases 26: POST to a path that does not exist, ten times on one connection: ten times 404."""
        talk = Talk(File("/nonexistent"))
        for _ in range(10):
            talk.send(head(b"Content-Length: 1000", first=b"POST /f HTTP/1.1") + bytes(1000), size=300)
        self.assertEqual([(a.status, a.closes) for a in talk.answers], [(404, False)] * 10)

    def test_close_when_asked(self) -> None:
        """``Connection: close`` from the client, or HTTP/1.0: the connection ends with the answer."""
        for data in (get(b"/", b"Connection: Close"), get(b"/", b"Connection: x, close"), b"GET / HTTP/1.0\r\n\r\n"):
            talk = Talk(Taker())
            talk.send(data + NEXT)
            (answer,) = answers(talk.raw)
            self.assertTrue(answer.closes)
            self.assertTrue(talk.is_closed)

    def test_close_when_the_resource_says_so(self) -> None:
        """A resource may end the connection, however it spells it."""
        for value in (b"close", b"Close", b"x, close"):

            async def receive(request: Request, body: IRequestBody, value: bytes = value) -> None:
                request.setHeader(b"Connection", value)
                ok(request)

            talk = Talk(receive)
            talk.send(get() + get())
            self.assertEqual([(a.status, a.closes) for a in talk.answers], [(200, True)])
            self.assertTrue(talk.is_closed)

    def test_http_1_0(self) -> None:
        """An old client gets an answer in its own version, ended by the end of the connection."""

        async def receive(request: Request, body: IRequestBody) -> None:
            request.write(b"as long ")
            request.write(b"as it is")
            request.finish()

        talk = Talk(receive)
        talk.send(b"GET / HTTP/1.0\r\n\r\n")
        self.assertTrue(talk.raw.startswith(b"HTTP/1.0 200 OK\r\n"))
        self.assertTrue(talk.raw.endswith(b"\r\n\r\nas long as it is"))
        self.assertNotIn(b"chunked", talk.raw)
        self.assertTrue(talk.is_closed)

    def test_head(self) -> None:
        """HEAD has no body, also when it is refused; the next answer begins right behind it."""

        async def receive(request: Request, body: IRequestBody) -> None:
            if request.path == b"/no":
                raise Refused(errors.NOT_FOUND)
            ok(request)

        talk = Talk(receive)
        talk.send(get(method=b"HEAD") + get(b"/no", method=b"HEAD") + get())
        found = answers(talk.raw, "HHG")
        self.assertEqual([(a.status, a.body) for a in found], [(200, b""), (404, b""), (200, b"ok")])

    def test_empty_line_between(self) -> None:
        """A client that sends an empty line behind its body is understood."""
        talk = Talk(Taker())
        talk.send(put(b"abc") + b"\r\n" + put(b"abc") + b"\r\n")
        self.assertEqual(talk.statuses, [200, 200])


class FailureTests(SynchronousTestCase):
    """Things break; what is told to whom."""

    def test_client_leaves_in_the_body(self) -> None:
        """The resource hears that the body was cut, ``notifyFinish`` fails, and nobody is left registered."""
        taker = Taker()
        talk = Talk(taker)
        talk.send(put(b"abc", length=9))
        talk.lose()
        self.assertIsInstance(taker.results[0], BodyCut)
        self.assertIsInstance(taker.finishes[0], Failure)
        self.assertFalse(taker.sink.is_registered)
        self.assertEqual((talk.raw, talk.clock.getDelayedCalls(), talk.site.channels), (b"", [], set()))

    def test_client_leaves_before_the_body_is_wanted(self) -> None:
        """A resource that asks for the body of a client that has left is told at once."""
        bodies = []

        async def receive(request: Request, body: IRequestBody) -> None:
            bodies.append(body)

        talk = Talk(receive)
        talk.send(put(b"abc", length=9))
        talk.lose()
        sink = Sink()
        self.failureResultOf(bodies[0].deliver_to(sink), BodyCut)
        self.assertEqual((sink.pieces, sink.is_registered), ([], False))

    def test_client_leaves_a_stock_resource(self) -> None:
        """A body that was cut is never processed by a stock resource."""

        class Never(Resource):
            isLeaf = True

            def render(self, request: Request) -> bytes:
                raise AssertionError("rendered")

        for data in (put(b"abc", length=9), chunked(b"1\r\na\r\n")):
            talk = Talk(Never())
            talk.send(data)
            talk.lose()
            self.assertEqual(talk.raw, b"")

    def test_client_leaves_while_it_is_served(self) -> None:
        """A resource that is still at work hears that nobody will read its answer."""
        gone: list[Any] = []

        class Slow(Resource):
            isLeaf = True

            def render(self, request: Request) -> int:
                request.notifyFinish().addBoth(gone.append)
                return NOT_DONE_YET

        talk = Talk(Slow())
        talk.send(get())
        talk.clock.advance(1000)
        self.assertEqual(gone, [])
        talk.lose()
        gone[0].trap(ConnectionLost)

    def test_consumer_raises(self) -> None:
        """A consumer's bug ends its own request with 500, is logged, and unregisters it."""
        taker = Taker()
        talk = Talk(taker)

        def fail() -> None:
            raise ValueError("bug")

        taker.sink.on_piece = fail
        talk.send(put(b"abc", length=9))
        self.assertEqual([(a.status, a.closes) for a in talk.answers], [(500, True)])
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)
        self.assertFalse(taker.sink.is_registered)

    def test_resource_raises(self) -> None:
        """So does a resource's; the client learns no more than that."""

        async def receive(request: Request, body: IRequestBody) -> None:
            raise ValueError("secret")

        talk = Talk(receive)
        talk.send(put(b"abc") + put(b"abc"))
        self.assertEqual([(a.status, a.closes) for a in talk.answers], [(500, False)] * 2)
        self.assertNotIn(b"secret", talk.raw)
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 2)

    def test_failure_after_the_answer_began(self) -> None:
        """Half an answer is cut off: neither a length that isn't kept nor a clean end of chunks hides the failure."""
        for length in (None, b"100"):

            async def receive(request: Request, body: IRequestBody, length: bytes | None = length) -> None:
                if length:
                    request.setHeader(b"Content-Length", length)
                request.write(b"half")
                raise ValueError("bug")

            talk = Talk(receive)
            talk.send(get() + get())
            self.assertEqual([(a.body, a.is_whole) for a in answers(talk.raw, at_end=True)], [(b"half", False)])
            self.assertTrue(talk.is_aborted)
            self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)

    def test_transport_is_told_nothing_after_the_end(self) -> None:
        """A resource may go on with a request whose connection is lost; nothing comes of it."""
        sink = Sink()
        talk = Talk(Taker(sink))
        talk.send(put(b"abc", length=9))
        body = sink.producer
        assert body is not None
        talk.lose()
        for call in (body.pauseProducing, body.resumeProducing, body.stopProducing):
            call()
        self.assertEqual(talk.transport.turns, [])


class DeadlineTests(SynchronousTestCase):
    """How long a client may take."""

    def test_timeout_of_the_site(self) -> None:
        """``timeout`` is how long a connection may be idle, as for a stock ``Site``; None is for ever."""
        talk = Talk(Taker(), timeout=2)
        talk.clock.advance(1.9)
        self.assertFalse(talk.is_closed)
        talk.clock.advance(0.2)
        self.assertTrue(talk.is_closed)
        talk = Talk(Taker(), timeout=None)
        talk.clock.advance(10**6)
        self.assertFalse(talk.is_closed)

    def test_idle(self) -> None:
        """A connection on which nothing happens is closed, before the first request and between two."""
        for data in (b"", put(b"abc")):
            talk = Talk(Taker())
            talk.send(data)
            talk.clock.advance(LIMITS.idle_time - 1)
            self.assertFalse(talk.is_closed)
            talk.clock.advance(1)
            self.assertTrue(talk.is_closed)

    def test_idle_is_counted_from_the_last_request(self) -> None:
        """Each request starts the time anew."""
        talk = Talk(Taker())
        for _ in range(5):
            talk.clock.advance(LIMITS.idle_time - 1)
            talk.send(put(b"abc"))
        self.assertFalse(talk.is_closed)

    def test_slow_head(self) -> None:
        """A head that drips byte by byte is answered 408 at a deadline for the whole."""
        talk = Talk(Taker())
        data = get(b"/" + b"x" * 1000)
        for at in range(int(LIMITS.head_time) - 1):
            talk.send(data[at : at + 1])
            talk.clock.advance(1)
        self.assertEqual(talk.raw, b"")
        talk.send(data[100:101])
        talk.clock.advance(1)
        self.assertEqual([(a.status, a.closes) for a in talk.answers], [(408, True)])
        talk.clock.advance(LIMITS.linger_time)
        self.assertTrue(talk.is_closed)

    def test_slow_second_head(self) -> None:
        """So is the head behind another request, of which a part was sent ahead."""
        talk = Talk(Taker())
        talk.clock.advance(LIMITS.head_time - 1)
        talk.send(put(b"abc") + b"GET ")
        talk.clock.advance(LIMITS.head_time - 1)
        self.assertEqual(talk.statuses, [200])
        talk.clock.advance(1)
        self.assertEqual(talk.statuses, [200, 408])

    def test_stalled_body(self) -> None:
        """A body that stops arriving is answered 408 after a minute, and the resource is told."""
        taker = Taker()
        talk = Talk(taker)
        talk.send(put(b"abc", length=9))
        talk.clock.advance(LIMITS.body_time - 1)
        self.assertEqual(talk.raw, b"")
        talk.clock.advance(1)
        self.assertEqual([(a.status, a.closes) for a in talk.answers], [(408, True)])
        self.assertEqual([str(result) for result in taker.results], ["body_timeout"])

    def test_stalled_body_of_a_stock_resource(self) -> None:
        """The same for a resource that knows nothing of it."""
        talk = Talk(File("/nonexistent"))
        talk.send(put(b"abc", length=9))
        talk.clock.advance(LIMITS.body_time)
        self.assertEqual([(a.status, a.closes) for a in talk.answers], [(408, True)])

    def test_progress_counts(self) -> None:
        """lws-cases 36: an upload may take for ever, as long as it goes on."""
        taker = Taker()
        talk = Talk(taker, limits=replace(LIMITS, body_rate=0))
        talk.send(put(b"", length=10))
        for _ in range(10):
            talk.clock.advance(LIMITS.body_time - 1)
            talk.send(b"x")
        self.assertEqual((taker.results, talk.statuses), ([None], [200]))

    def test_our_pause_does_not_count(self) -> None:
        """lws-cases 13: while we pause, the client's clock stands still; afterwards it has its whole time."""
        sink = Sink()
        talk = Talk(Taker(sink), limits=replace(LIMITS, body_rate=0))
        talk.send(put(b"a", length=3))
        sink.producer.pauseProducing()  # type: ignore[union-attr]
        talk.clock.advance(10 * LIMITS.body_time)
        sink.producer.resumeProducing()  # type: ignore[union-attr]
        talk.clock.advance(LIMITS.body_time - 1)
        talk.send(b"b")
        talk.clock.advance(LIMITS.body_time - 1)
        talk.send(b"c")
        self.assertEqual(talk.statuses, [200])

    def test_a_slow_resource_does_not_count(self) -> None:
        """The whole body is there and the resource thinks: nobody is blamed."""
        done: Deferred[None] = Deferred()

        async def receive(request: Request, body: IRequestBody) -> None:
            await body.deliver_to(Sink())
            await done
            ok(request)

        talk = Talk(receive)
        talk.send(put(b"abc"))
        talk.clock.advance(1000)
        done.callback(None)
        self.assertEqual(talk.statuses, [200])

    def test_one_timer(self) -> None:
        """However often a deadline moves, there is one timer, and one for the rate; a lost connection leaves none."""
        talk = Talk(Taker())
        talk.send(put(bytes(1000)) * 3, size=1)
        self.assertEqual(len(talk.clock.getDelayedCalls()), 2)
        talk.lose()
        self.assertEqual(talk.clock.getDelayedCalls(), [])


@implementer(IPushProducer)
class Push:
    """A response that is pushed."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def resumeProducing(self) -> None:
        self.calls.append("resume")

    def stopProducing(self) -> None:
        self.calls.append("stop")


@implementer(IPullProducer)
class Pull:
    """A response that is pulled, in so many pieces."""

    def __init__(self, request: Request, pieces: int, piece: bytes) -> None:
        self.request = request
        self.left = pieces
        self.piece = piece
        self.is_stopped = False
        request.registerProducer(self, False)

    def resumeProducing(self) -> None:
        if self.left:
            self.left -= 1
            self.request.write(self.piece)
        else:
            self.request.unregisterProducer()
            self.request.finish()

    def stopProducing(self) -> None:
        self.is_stopped = True


class UnreadTests(SynchronousTestCase):
    """A client that does not read its answers, or slowly."""

    def setUp(self) -> None:
        self.size = 4 * ANSWER_SLICE
        self.requests: list[Request] = []
        self.transport = BoundedTwin()

    async def large(self, request: Request, body: IRequestBody) -> None:
        self.requests.append(request)
        await body.deliver_to(Sink())
        ok(request, bytes(self.size))

    async def held(self, request: Request, body: IRequestBody) -> None:
        self.requests.append(request)

    def test_no_further_request(self) -> None:
        """While answers are not read no further request is taken: neither they nor the requests pile up."""
        talk = Talk(self.large, self.transport)
        talk.send(get() * 1000)
        self.assertEqual(len(self.requests), 1)
        self.assertEqual(talk.transport.producerState, "paused")
        self.assertLess(len(talk.raw), 3 * ANSWER_SLICE)
        for _ in range(20):
            self.transport.drain()
        self.assertGreater(len(self.requests), 2)
        self.assertLess(len(self.requests), 20)

    def test_cut_when_nothing_is_read(self) -> None:
        """A client that reads nothing for half a minute is cut."""
        talk = Talk(self.large, self.transport)
        talk.send(get())
        talk.clock.advance(LIMITS.unread_time - 1)
        self.assertFalse(talk.is_aborted)
        talk.clock.advance(1)
        self.assertTrue(talk.is_aborted)

    def test_not_cut_when_something_is_read(self) -> None:
        """One that reads slowly gets all of it, though that takes long."""
        self.size = 40 * ANSWER_SLICE
        talk = Talk(self.large, self.transport)
        talk.send(get())
        while self.transport.unread:
            talk.clock.advance(LIMITS.unread_time - 1)
            self.transport.drain()
        self.assertFalse(talk.is_aborted)
        self.assertEqual([(a.status, len(a.body), a.is_whole) for a in talk.answers], [(200, self.size, True)])

    def test_closed_behind_the_last_byte(self) -> None:
        """Nor is the answer to ``Connection: close`` cut short by the time that closing may take."""
        self.size = 40 * ANSWER_SLICE
        talk = Talk(self.large, self.transport)
        talk.send(get(b"/", b"Connection: close"))
        while not talk.is_closed:
            talk.clock.advance(LIMITS.close_time + 1)
            self.assertFalse(talk.is_aborted)
            self.transport.drain()
        self.assertEqual([(len(a.body), a.is_whole) for a in talk.answers], [(self.size, True)])

    def test_closing_is_cut_when_nothing_is_read(self) -> None:
        """But closing doesn't wait for a client that reads nothing."""
        talk = Talk(self.large, self.transport)
        talk.send(get(b"/", b"Connection: close"))
        self.assertFalse(talk.is_closed)
        talk.clock.advance(LIMITS.unread_time)
        self.assertTrue(talk.is_aborted)

    def test_a_long_early_answer(self) -> None:
        """A long answer to a body that is still coming is read whole, however slowly, and then there is a clean end."""

        async def receive(request: Request, body: IRequestBody) -> None:
            ok(request, bytes(10 * ANSWER_SLICE))

        talk = Talk(receive, self.transport)
        talk.send(put(b"", length=9))
        while self.transport.unread:
            talk.clock.advance(LIMITS.linger_time + 1)
            self.assertFalse(talk.is_aborted)
            self.transport.drain()
        talk.clock.advance(LIMITS.linger_time)
        self.assertTrue(talk.is_closed)
        self.assertEqual([(len(a.body), a.is_whole, a.closes) for a in talk.answers], [(10 * ANSWER_SLICE, True, True)])

    def test_a_short_linger_behind_a_full_transport(self) -> None:
        """If the client reads at once, it has its time to stop sending, and is not cut for reading late."""

        async def receive(request: Request, body: IRequestBody) -> None:
            ok(request, bytes(10 * ANSWER_SLICE))

        talk = Talk(receive, self.transport)
        talk.send(put(b"", length=9))
        while self.transport.unread:
            self.transport.drain()
        self.assertFalse(talk.is_closed)
        talk.send(b"more")
        talk.clock.advance(LIMITS.linger_time)
        self.assertTrue(talk.is_closed)

    def test_push_producer(self) -> None:
        """A resource that pushes its answer is told to pause and to go on, and not for somebody else's bytes."""
        talk = Talk(self.held, self.transport)
        talk.send(get())
        (request,) = self.requests
        producer = Push()
        request.registerProducer(producer, True)
        request.write(bytes(ANSWER_SLICE + 1))
        self.assertEqual(producer.calls, ["pause"])
        request.write(b"more")
        self.transport.drain()
        self.assertEqual(producer.calls, ["pause", "resume"])
        talk.clock.advance(10 * LIMITS.unread_time)
        self.assertFalse(talk.is_aborted)
        request.write(bytes(ANSWER_SLICE + 1))
        request.unregisterProducer()
        self.assertEqual(talk.transport.producerState, "paused")
        request.finish()
        self.transport.drain()
        talk.send(get())
        self.assertEqual(len(self.requests), 2)
        self.assertEqual(len(talk.answers[0].body), 2 * ANSWER_SLICE + 6)

    def test_push_producer_is_paused_at_once(self) -> None:
        """One that registers when the client is behind already begins with a pause."""
        talk = Talk(self.held, self.transport)
        talk.send(get())
        self.requests[0].write(bytes(3 * ANSWER_SLICE))
        producer = Push()
        self.requests[0].registerProducer(producer, True)
        self.assertEqual(producer.calls, ["pause"])
        self.assertRaises(RuntimeError, talk.channel.registerProducer, Push(), True)
        self.transport.drain()
        self.transport.drain()
        self.assertEqual(producer.calls, ["pause", "resume"])

    def test_unread_push(self) -> None:
        """A download that is pushed is cut when nothing of it is read, and its producer is stopped."""
        talk = Talk(self.held, self.transport)
        talk.send(get())
        producer = Push()
        self.requests[0].registerProducer(producer, True)
        self.requests[0].write(bytes(2 * ANSWER_SLICE))
        talk.clock.advance(LIMITS.unread_time)
        self.assertTrue(talk.is_aborted)
        talk.transport.producer.stopProducing()
        self.assertEqual(producer.calls, ["pause", "stop"])

    def test_pull_producer(self) -> None:
        """A resource that is asked for each piece is asked when the client has read the last one."""
        talk = Talk(self.held, self.transport)
        talk.send(get() + get())
        self.assertEqual(len(self.requests), 1)
        producer = Pull(self.requests[0], 5, bytes(ANSWER_SLICE))
        self.assertEqual(producer.left, 4)
        for _ in range(5):
            talk.clock.advance(LIMITS.unread_time - 1)
            self.transport.drain()
        self.assertEqual([len(a.body) for a in talk.answers], [5 * ANSWER_SLICE])
        self.assertEqual(len(self.requests), 2)
        self.assertEqual(self.transport.streaming, True)
        talk.clock.advance(10 * LIMITS.unread_time)
        self.assertFalse(talk.is_aborted)

    def test_idle_behind_a_pull(self) -> None:
        """A download whose last piece and end come together leaves an idle connection, which is not cut early."""
        talk = Talk(self.held, self.transport)
        talk.send(get())
        Pull(self.requests[0], 2, b"x")
        talk.clock.advance(0)
        talk.clock.advance(LIMITS.idle_time - 1)
        self.assertFalse(talk.is_aborted)
        self.assertEqual([(a.body, a.closes) for a in talk.answers], [(b"xx", False)])
        talk.clock.advance(1)
        self.assertTrue(talk.is_closed)

    def test_pull_that_writes_nothing(self) -> None:
        """The answer to HEAD swallows what a pulled producer writes; the next request is answered all the same."""
        talk = Talk(self.held, self.transport)
        talk.send(get().replace(b"GET", b"HEAD") + get())
        self.requests[0].setHeader(b"Content-Length", b"3")
        Pull(self.requests[0], 3, b"x")
        for _ in range(10):
            talk.clock.advance(1)
        self.assertEqual(len(self.requests), 2)

    def test_unread_pull(self) -> None:
        """A download that is pulled is cut when nothing of it is read."""
        talk = Talk(self.held, self.transport)
        talk.send(get())
        Pull(self.requests[0], 5, bytes(ANSWER_SLICE))
        talk.clock.advance(LIMITS.unread_time - 1)
        self.assertFalse(talk.is_aborted)
        talk.clock.advance(1)
        self.assertTrue(talk.is_aborted)

    def test_slow_pull_is_our_own_time(self) -> None:
        """A source that has nothing to give yet is no fault of the client's."""
        talk = Talk(self.held, self.transport)
        talk.send(get())
        producer = Pull(self.requests[0], 5, b"")
        producer.piece = b"x"
        self.transport.drain()
        talk.channel._producer = Push()  # from now on it is asked, and has nothing
        self.transport.drain()
        talk.clock.advance(10 * LIMITS.unread_time)
        self.assertFalse(talk.is_aborted)

    def test_resource_closes_while_it_produces(self) -> None:
        """``request.loseConnection()`` in the middle of a download ends it; nothing is registered behind it."""
        for streaming in (True, False):
            self.requests.clear()
            talk = Talk(self.held, BoundedTwin())
            talk.send(get())
            if streaming:
                self.requests[0].registerProducer(Push(), True)
            else:
                Pull(self.requests[0], 5, b"x")
            self.requests[0].loseConnection()
            self.assertTrue(talk.is_closed)
            self.requests[0].unregisterProducer()
            self.assertIsNone(talk.transport.producer)


def connect(port: int, context: ssl.SSLContext | None = None, **options: int) -> socket.socket:
    """A blocking client's connection, over TLS if there is a context for it."""
    client = socket.socket()
    client.settimeout(10)
    for name, value in options.items():
        client.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    client.connect(("127.0.0.1", port))
    return context.wrap_socket(client) if context else client


def exchange(port: int, data: bytes, until: bytes | None = None, context: ssl.SSLContext | None = None) -> bytes:
    """A blocking client: send all, then read until ``until`` has come, or the end."""
    with connect(port, context) as client:
        client.sendall(data)
        return read(client, until)


def read(client: socket.socket, until: bytes | None = None) -> bytes:
    found = b""
    while until is None or until not in found:
        piece = client.recv(65536)
        if not piece:
            break
        found += piece
    return found


def until_it_ends(taker: Taker) -> tuple[Receive, Deferred[None]]:
    """A taker as a resource's function, and what fires when it has returned or raised."""
    ended: Deferred[None] = Deferred()

    async def receive(request: Request, body: IRequestBody) -> None:
        try:
            await taker(request, body)
        finally:
            ended.callback(None)

    return receive, ended


class SocketContract:
    """The same with real clients, on the reactor that runs the tests. A mixin, so that no runner takes it alone."""

    timeout = 20
    context: ssl.SSLContext | None = None
    addCleanup: Callable[..., None]
    assertEqual: Callable[..., None]
    assertIsInstance: Callable[..., None]
    assertLess: Callable[..., None]
    assertTrue: Callable[..., None]
    patch: Callable[..., object]

    def listen(self, site: StreamingSite) -> Any:
        raise NotImplementedError

    def serve(self, resource: Resource | Receive, **limits: Any) -> int:
        if not isinstance(resource, Resource):
            resource = Streaming(resource)
        site = StreamingSite(resource, limits=Limits(**limits))
        port = self.listen(site)

        def stop() -> Deferred[Any]:
            work: Coroutine[Deferred[Any], Any, Any] = site.stop()
            for channel in list(site.channels):
                channel.forceAbortClient()
            done = Deferred.fromCoroutine(work)
            done.addCallback(lambda _: port.stopListening())
            return done

        self.addCleanup(stop)
        self.site = site
        number: int = port.getHost().port
        return number

    def refuse(self, refusal: Refusal = errors.BODY_TOO_LARGE) -> Receive:
        async def receive(request: Request, body: IRequestBody) -> None:
            raise Refused(refusal)

        return receive

    async def test_upload(self) -> None:
        """A real upload of 8 MiB arrives whole, with pauses in it, and nothing comes while it is paused."""
        reactor: Any = global_reactor
        taker = Taker(BufferSink())
        sink = taker.sink
        paused: list[int] = []
        late: list[int] = []

        def go_on(size: int) -> None:
            paused.pop()
            if len(sink.pieces) != size:
                late.append(size)
            sink.producer.resumeProducing()  # type: ignore[union-attr]

        def pause() -> None:
            if paused:
                late.append(len(sink.pieces))
            elif len(sink.pieces) % 7 == 0:
                paused.append(1)
                sink.producer.pauseProducing()  # type: ignore[union-attr]
                reactor.callLater(0.002, go_on, len(sink.pieces))

        sink.on_piece = pause
        port = self.serve(taker)
        data = bytes(range(256)) * 32768
        answer = await deferToThread(exchange, port, put(data), b"ok", self.context)
        self.assertEqual([a.status for a in answers(answer)], [200])
        self.assertEqual(late, [])
        self.assertTrue(sink.data == data)

    async def test_small_body_refused_without_a_reset(self) -> None:
        """A client whose whole body fits into the drain reads the answer and a clean end."""
        port = self.serve(self.refuse(), linger_time=0.3)

        def client() -> bytes:
            with connect(port, self.context) as connection:
                connection.sendall(put(b"", length=40_000))
                first = read(connection, b"accepts.\n")
                connection.sendall(bytes(40_000))
                return first + read(connection)  # ConnectionResetError if it were one

        self.assertEqual([a.status for a in answers(await deferToThread(client))], [413])

    async def test_refused_blindly_sending(self) -> None:
        """lws-cases 27: one that sends 50 MB without looking gets rid of all of it, and then finds the 413."""
        port = self.serve(self.refuse())

        def client() -> bytes:
            with connect(port, self.context) as connection:
                connection.sendall(put(bytes(50_000_000)))
                return read(connection, b"accepts.\n")

        self.assertEqual([(a.status, a.closes) for a in answers(await deferToThread(client))], [(413, True)])

    async def test_slow_reader(self) -> None:
        """One that reads its answer slowly has it whole, though it takes longer than a client may read nothing."""
        size = 4_000_000

        async def receive(request: Request, body: IRequestBody) -> None:
            ok(request, b"x" * size)

        port = self.serve(receive, close_time=1.0, unread_time=1.0)

        def client() -> int:
            with connect(port, self.context) as connection:
                connection.sendall(get().replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
                found = read(connection, b"\r\n\r\n").partition(b"\r\n\r\n")[2]
                count = len(found)
                while count < size and (piece := connection.recv(100_000)):
                    count += len(piece)
                    time.sleep(len(piece) / 1_600_000)  # the line is slow
                return count

        self.assertEqual(await deferToThread(client), size)

    async def test_continue(self) -> None:
        """lws-cases 30: a client that waits for 100 before it sends gets it; without it this would wait for ever."""
        port = self.serve(Taker())

        def client() -> bytes:
            with connect(port, self.context) as connection:
                connection.sendall(put(b"", b"Expect: 100-continue", length=3))
                first = read(connection, CONTINUE)
                connection.sendall(b"abc")
                return first + read(connection, b"ok")

        found = await deferToThread(client)
        self.assertTrue(found.startswith(CONTINUE))
        self.assertEqual([a.status for a in answers(found)], [200])

    async def test_client_sends_all_and_closes(self) -> None:
        """lws-cases 37: all of it was sent before the client closed, so the upload is whole."""
        taker = Taker()
        receive, ended = until_it_ends(taker)
        port = self.serve(receive)

        def client() -> None:
            with connect(port, self.context) as connection:
                connection.sendall(put(bytes(300_000)))
                # Closed with a TLS session ticket unread, the client's own kernel would drop what it has not sent.
                connection.shutdown(socket.SHUT_WR)
                read(connection)

        await deferToThread(client)
        await ended
        self.assertEqual((len(taker.sink.data), taker.results), (300_000, [None]))

    async def test_client_resets_in_the_body(self) -> None:
        """A reset in the middle is told to the resource, and the connection is forgotten."""
        taker = Taker()
        receive, ended = until_it_ends(taker)
        port = self.serve(receive)

        def client() -> None:
            with connect(port, self.context) as connection:
                connection.sendall(put(b"", b"Expect: 100-continue", length=9))
                read(connection, CONTINUE)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        await deferToThread(client)
        await ended
        self.assertIsInstance(taker.results[0], BodyCut)
        self.assertEqual(self.site.channels, set())

    async def test_download(self) -> None:
        """A file of 5 MB by twisted.web's own code, fast and slowly read, and the connection kept."""
        data = bytes(range(250)) * 20_000
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        with open(f"{folder.name}/file", "wb") as file:
            file.write(data)
        port = self.serve(File(folder.name))

        def client(slowly: bool) -> bytes:
            options = {"SO_RCVBUF": 16384} if slowly else {}
            with connect(port, self.context, **options) as connection:
                connection.sendall(get(b"/file") + get(b"/file", b"Connection: close"))
                found = bytearray()
                while piece := connection.recv(20_000 if slowly else 65536):
                    found += piece
                    if slowly and len(found) % 50 == 0:
                        select.select([], [], [], 0.001)
                return bytes(found)

        for slowly in (False, True):
            first, second = answers(await deferToThread(client, slowly))
            self.assertTrue(first.body == second.body == data)
            self.assertEqual((first.status, first.closes, second.closes), (200, False, True))

    async def test_large_answer(self) -> None:
        """An answer of 5 MB that a resource writes at once arrives whole, and the connection closes behind it."""

        async def receive(request: Request, body: IRequestBody) -> None:
            ok(request, bytes(5_000_000))

        port = self.serve(receive)
        found = await deferToThread(exchange, port, get(b"/", b"Connection: close"), None, self.context)
        self.assertEqual([(len(a.body), a.is_whole) for a in answers(found)], [(5_000_000, True)])


class TCPTests(SocketContract, TestCase):
    """Without encryption."""

    def listen(self, site: StreamingSite) -> Any:
        reactor: Any = global_reactor
        return reactor.listenTCP(0, site, interface="127.0.0.1")

    async def test_refused_while_sending(self) -> None:
        """lws-cases 27: a client that looks for an answer while it sends sees the 413 long before any reset."""
        port = self.serve(self.refuse())

        def client() -> tuple[bytes, float]:
            with connect(port) as connection:
                connection.sendall(put(b"", length=50_000_000))
                block = bytes(65536)
                begun = time.monotonic()
                while not select.select([connection], [], [], 0)[0]:
                    if select.select([connection], [connection], [], 5)[1]:
                        connection.send(block)
                return read(connection, b"accepts.\n"), time.monotonic() - begun

        found, took = await deferToThread(client)
        self.assertEqual([(a.status, a.closes) for a in answers(found)], [(413, True)])
        self.assertLess(took, LIMITS.linger_time)

    async def test_ends_its_side_behind_a_whole_request(self) -> None:
        """A client that says "that was all" behind its upload (``nc -N``) gets its answer."""
        port = self.serve(Taker())

        def client() -> bytes:
            with connect(port) as connection:
                connection.sendall(put(b"whole"))
                connection.shutdown(socket.SHUT_WR)
                return read(connection)

        self.assertEqual([a.status for a in answers(await deferToThread(client))], [200])

    async def test_ends_its_side_inside_a_body(self) -> None:
        """One that ends its side before the announced length is told so."""
        port = self.serve(Taker())

        def client() -> bytes:
            with connect(port) as connection:
                connection.sendall(put(b"short", length=500))
                connection.shutdown(socket.SHUT_WR)
                return read(connection)

        self.assertEqual([(a.status, a.closes) for a in answers(await deferToThread(client))], [(400, True)])


class TLSTests(SocketContract, TestCase):
    """With TLS, as users run it; on our reactor that is our own transport."""

    def listen(self, site: StreamingSite) -> Any:
        reactor: Any = global_reactor
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        pem = str(ensure_development_certificate(Path(folder.name) / "pair.pem"))
        self.context = ssl.create_default_context()
        self.context.check_hostname = False
        self.context.verify_mode = ssl.CERT_NONE
        return reactor.listenSSL(0, site, DefaultOpenSSLContextFactory(pem, pem), interface="127.0.0.1")
