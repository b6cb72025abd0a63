"""The protocol of one HTTP connection: it pumps between transport, wire and twisted.web.

**One request at a time.** The wire is asked for the next request when the response to the last one is
complete. What a client sends ahead stays in the wire, and when that holds more than :data:`READ_AHEAD`,
the transport is paused.

**The resource is found when the headers are complete.** One that provides
:class:`~lwstwisted.interfaces.IStreamingResource` is asked at once and may refuse before a byte of the
body (and before ``100 Continue``) is spent. For any other resource the body is spooled into
``request.content`` and the request is processed as ever.

**Pausing.** Three parties may close the valve: the consumer of the body ("consumer"), the wire when it holds
too much ("buffered"), and the transport while the client does not read its answers ("unread"). Only the
first reason and the last one touch the transport. On resume the wire is drained first, which may pause
again, and only then is the transport resumed; so the order of the bytes is the order of the buffers.

**An answer before the end of the body.** If the rest of the body has arrived already, it is thrown away and
the connection goes on. Otherwise the answer says ``Connection: close``, and the client gets ``linger_time`` to
read it, while what it still sends is thrown away. Closed at once, the kernel would answer the unread bytes with a
reset, and a client may drop an answer that it has not read yet; and one that looks for the answer only when it has
sent everything would wait for a full socket.

**Deadlines.** One timer for each connection, with one meaning at a time, and one more for the rate of a body. The
client's clock stops while we are the ones who pause.
"""

from __future__ import annotations

import enum
from io import BytesIO
from typing import Any, cast
from urllib.parse import unquote_to_bytes

from twisted.internet.defer import maybeDeferred
from twisted.internet.interfaces import (
    IConsumer,
    IHalfCloseableProtocol,
    IHandshakeListener,
    ISSLTransport,
    ITCPTransport,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import datetimeToString, parse_qs
from twisted.web.http_headers import Headers
from twisted.web.server import Request
from twisted.web.server import version as server_version
from zope.interface import implementer

from lwstwisted import errors
from lwstwisted.errors import BodyCut, BodyStopped, Refused
from lwstwisted.flow import Valve
from lwstwisted.interfaces import IBufferReceiver, IStreamingResource
from lwstwisted.loop.presence import PeerWatch
from lwstwisted.loop.tls import TLSTransport
from lwstwisted.web.answers import answer_refusal, bare_answer, bytes_read, limit_unsent, refusal_for, unread_bytes
from lwstwisted.web.body import RequestBody, Spool
from lwstwisted.web.deadline import Deadline, MinimumRate
from lwstwisted.web.outgoing import Outgoing, head_lines
from lwstwisted.web.request import CONTINUE, StreamingRequest, interim_response
from lwstwisted.web.wire import End, Head, Signal, State, Wire

READ_AHEAD = 64 * 1024
"""Bytes that the wire may hold while nobody takes them: more than any head, and a small upload whole."""
_CONTINUE = interim_response(CONTINUE)
_log = Logger()


class _Life(enum.Enum):
    """What a connection is doing."""

    OPEN = enum.auto()
    LINGERING = enum.auto()
    CLOSING = enum.auto()
    LOST = enum.auto()


@implementer(IBufferReceiver, IHalfCloseableProtocol, IHandshakeListener)
class StreamingChannel(Protocol):
    """One HTTP/1.1 connection of a :class:`~lwstwisted.web.site.StreamingSite`.

    Towards ``twisted.web.server.Request`` it is the channel that ``HTTPChannel`` is under a stock ``Site``.
    """

    factory: Any  # the StreamingSite, one floor up
    site: Any  # the same, by the name that Request knows
    requestFactory: Any = StreamingRequest

    def connectionMade(self) -> None:
        """See ``Protocol``."""
        self._below = cast(Any, self.transport)
        # Asked for by each request, also when the socket is gone.
        self._peer, self._host = self._below.getPeer(), self._below.getHost()
        self._limits = self.factory.limits
        self._wire = Wire(self._limits)
        self._life = _Life.OPEN
        self._requests_left = self._limits.requests
        self._request: Request | None = None
        self._body: RequestBody | None = None
        self._is_streaming = False
        self._found: tuple[Any, Any, Any] = (None, None, None)  # resource, prepath, postpath
        self._head_began = self._pumping = False
        self._keep_alive = True
        self._is_ended = False  # the client has ended its side
        self._has_lingered = False  # it had its time to read an early answer
        self._valve = Valve(self._pause_below, self._below.resumeProducing)
        self._watch: PeerWatch | None = None  # most connections are never paused
        self._deadline = Deadline(self.factory.reactor)
        self._rate: MinimumRate | None = None
        self._is_shaking = ISSLTransport.providedBy(self._below)
        if ITCPTransport.providedBy(self._below):
            self._below.setTcpNoDelay(True)
            limit_unsent(self._below)
        self._out = Outgoing(self, self._below, self.factory.reactor)
        if not self.factory.admit(self):
            self._turn_away()
        elif self._is_shaking:
            self._deadline.set(self._limits.handshake_time, self._not_shaken)
        else:
            self._set_idle()

    def handshakeCompleted(self) -> None:
        """See ``IHandshakeListener``."""
        if self._is_shaking and self._life is _Life.OPEN:
            self._is_shaking = False
            self._set_idle()

    def _not_shaken(self) -> None:
        self.factory.tally.count("handshake_timeout", self._peer)
        self.forceAbortClient()

    def _turn_away(self) -> None:
        """There are too many connections. A handshake would be too dear for saying so."""
        self.factory.tally.count(errors.TOO_MANY_CONNECTIONS.code, self._peer)
        if self._is_shaking or not self.factory.may_linger:
            self._life = _Life.CLOSING
            self.forceAbortClient()
        else:
            self._below.write(bare_answer(errors.TOO_MANY_CONNECTIONS))
            self._linger()

    # Bytes

    def dataReceived(self, data: bytes) -> None:
        """See ``IProtocol``."""
        self.bufferReceived(memoryview(data))

    def bufferReceived(self, view: memoryview) -> None:
        """See :class:`~lwstwisted.interfaces.IBufferReceiver`."""
        if self._has_lingered and not self._out.is_full and not unread_bytes(self._below):
            self.forceAbortClient()  # TLS waits for its goodbye, and it goes on sending instead
        elif self._life is _Life.OPEN:
            self._is_shaking = False  # a protocol between us and TLS may not tell
            self._wire.receive(view)
            self.pump()
            self._wire.keep()

    def pump(self) -> None:
        """Pull events while somebody wants them; then let the transport read, or not."""
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._wants_event():
                if not self._dispatch(self._wire.next_event()):
                    if self._is_ended:
                        self._cut_short()
                    break
        except Refused as refused:
            self._refuse(refused)
        finally:
            self._pumping = False
        if self._life is _Life.OPEN:
            self._settle()

    def _wants_event(self) -> bool:
        if self._life is not _Life.OPEN:
            return False
        if self._request is None:
            # Behind an early answer the rest of its body is still there, which is not the next request.
            return self._body is None and "unread" not in self._valve.reasons
        return self._body is not None and self._body.is_wanted

    def _dispatch(self, event: Any) -> bool:
        """Serve one event of the wire. Returns whether there may be another."""
        if isinstance(event, Signal):
            return False
        if isinstance(event, Head):
            self._begin(event)
        elif isinstance(event, End):
            self._end_body(event)
        else:
            assert self._body is not None
            self._count(len(event))
            self._body.receive(event)
        return True

    def _count(self, size: int) -> None:
        if self._rate is not None:
            self._rate.count(size)
        if isinstance(self._request, StreamingRequest):
            self._request.received += size

    def _pause_below(self) -> None:
        self._below.pauseProducing()
        if self._life is _Life.LOST:
            return  # a consumer may pause its body after the end
        if self._watch is None:
            # Ours looks at its socket itself; of a stock TLS transport this is the one beneath it.
            watched = None if isinstance(self._below, TLSTransport) else getattr(self._below, "socket", None)
            clock, end = self.factory.reactor, self.forceAbortClient
            self._watch = PeerWatch(clock, watched, lambda: not self._valve.is_open, end)
        self._watch.start()

    def _settle(self) -> None:
        if self._wire.buffered > READ_AHEAD:
            self._valve.close("buffered")
        else:
            self._valve.open("buffered")
        self._set_deadline()

    def _set_deadline(self) -> None:
        is_open = self._life is _Life.OPEN and not self._out.is_full
        is_listening = is_open and self._request is not None and self._body is not None and self._body.is_wanted
        if self._rate is not None:
            (self._rate.listen if is_listening else self._rate.hold)()
        if not is_open:
            return  # the client's deadline was set when it began
        if self._request is None:
            if not self._wire.has_begun:
                self._head_began = False
                self._set_idle()
            elif not self._head_began:
                self._head_began = True
                self._deadline.set(self._limits.head_time, self._head_late)
        elif is_listening:
            self._deadline.set(self._limits.body_time, self._body_late)
        else:
            self._deadline.clear()

    # Methods and no closures, of which each connection would hold one.

    def _head_late(self) -> None:
        self._refuse(Refused(errors.HEAD_TIMEOUT))

    def _body_late(self) -> None:
        self._cut_body(Failure(Refused(errors.BODY_TIMEOUT)))

    def _body_slow(self) -> None:
        self._cut_body(Failure(Refused(errors.BODY_TOO_SLOW)))

    def _set_idle(self) -> None:
        if self.factory.timeOut is None:
            self._deadline.clear()
        else:
            self._deadline.set(self.factory.timeOut, self._close)

    # A request

    def _begin(self, head: Head) -> None:
        if self._requests_left == self._limits.requests:
            # Known only now where a proxy tells it in front of the first request.
            self._peer, self._host = self._below.getPeer(), self._below.getHost()
        request = self.requestFactory(self)
        self._request = request
        if isinstance(request, StreamingRequest):
            request.arrived = self.factory.reactor.seconds()
        self._requests_left -= 1
        self._keep_alive = head.keep_alive and self._requests_left > 0 and not self.factory.is_draining
        for name, value in head.headers:
            request.requestHeaders.addRawHeader(name, value)
        request.parseCookies()
        request.method, request.uri, request.clientproto = head.method, head.target, head.version
        path, _, query = head.target.partition(b"?")
        request.path = path
        request.args = parse_qs(query, 1) if query else {}
        self._body = body = RequestBody(self, head)
        if head.length != 0:
            self._expect_rate()
        resource = self._find(request)
        self._is_streaming = IStreamingResource.providedBy(resource)
        if self._is_streaming:
            self.factory.watch(maybeDeferred(resource.receive, request, body), self._failed, request)
        else:
            if not head.has_content:
                self._found = (resource, request.prepath, request.postpath)
            self._spool(request, body, head)

    def _expect_rate(self) -> None:
        rate, seconds = self._limits.body_rate, self._limits.body_rate_time
        if self._rate is None and rate:
            self._rate = MinimumRate(self.factory.reactor, rate, seconds, self._body_slow)
        if self._rate is not None:
            self._rate.begin()

    def _find(self, request: Request) -> Any:
        """The resource for a request, as ``Request.process`` will find it; None if that has to fail itself."""
        request.site = self.site
        request.prepath = []
        request.postpath = [unquote_to_bytes(segment) for segment in request.path[1:].split(b"/")]
        request.setHeader(b"Server", server_version)
        request.setHeader(b"Date", datetimeToString())
        request.content = BytesIO()  # empty for a streaming resource, and replaced for any other
        if request.path == b"*":
            return None
        try:
            return self.site.getResourceFor(request)
        except Exception:
            return None

    def take_found(self, request: Request) -> Any:
        """The resource that was found for a request without content, once; else None.

        So ``getChild`` is called once for such a request, as under a stock ``Site``. With content it is called
        again when that is there, because it may want to look at it.
        """
        (resource, prepath, postpath), self._found = self._found, (None, None, None)
        if resource is not None:
            request.prepath, request.postpath = prepath, postpath
        return resource

    def _spool(self, request: Request, body: RequestBody, head: Head) -> None:
        """Process a request as a stock ``Site`` does: when its body is whole."""
        request.gotLength(head.length)

        def process(_: None) -> None:
            request.requestReceived(head.method, head.target, head.version)

        body.deliver_to(cast(IConsumer, Spool(request))).addCallback(process).addErrback(self._failed, request)

    def _failed(self, reason: Failure, request: Request) -> None:
        if request is self._request and self._life is _Life.OPEN:
            answer_refusal(request, refusal_for(reason, request))
        elif not reason.check(Refused, BodyCut, BodyStopped):
            _log.failure("a request failed after it was lost ({id})", failure=reason, id=getattr(request, "id", "-"))

    def _end_body(self, end: End) -> None:
        body, self._body = self._body, None
        if body is not None:
            body.end(end.trailers)

    def _cut_body(self, reason: Failure) -> None:
        if self._body is not None:
            self._body.fail(reason)

    def send_continue(self) -> None:
        """Tell a client that waits for it to send its body."""
        if self._life is not _Life.OPEN or self._request is None or self._request.startedWriting:
            return
        if not self._wire.buffered:  # else it did not wait
            self._below.write(_CONTINUE)

    def send_interim(self, response: bytes) -> None:
        """Send an interim response (see ``web/request.py``)."""
        if self._life is _Life.OPEN:
            self._below.write(response)

    def body_paused(self) -> None:
        """The consumer of the body wants no more."""
        self._valve.close("consumer")
        self._set_deadline()

    def body_resumed(self) -> None:
        """It wants more: first what the wire holds, then what the transport brings."""
        self.pump()
        if self._life is _Life.OPEN and (self._body is None or not self._body.is_paused):
            self._valve.open("consumer")

    def _refuse(self, refused: Refused) -> None:
        """Answer something that is no request, or no longer one."""
        self._cut_body(Failure(refused))
        if self._life is not _Life.OPEN:
            return
        if self._request is not None:
            # A resource that holds the body has answered by now; another one is answered for.
            answer_refusal(self._request, refused)
            return
        self._keep_alive = False
        self.factory.tally.count(refused.refusal.code, self._peer)
        self._below.write(bare_answer(refused.refusal))
        self._linger()

    # What twisted.web.server.Request calls

    def writeHeaders(self, version: bytes, code: bytes, reason: bytes, headers: Headers) -> None:
        """Send the head of the response."""
        self._discard_arrived_body()
        if self._body is not None and self._wire.state is not State.END:
            self._keep_alive = False
        said = b",".join(headers.getRawHeaders(b"connection") or ()).lower()
        if not self._keep_alive or b"close" in [token.strip() for token in said.split(b",")]:
            self._keep_alive = False
            headers.setRawHeaders(b"connection", [b"close"])
        self._below.writeSequence(head_lines(version, code, reason, headers))

    def _discard_arrived_body(self) -> None:
        """Throw away the rest of an unwanted body, as far as it is here."""
        if self._body is None or self._body.is_taken:
            return
        try:
            while self._body is not None:
                event = self._wire.next_event()
                if isinstance(event, Signal):
                    break
                if isinstance(event, End):
                    self._cut_body(Failure(BodyCut("answered before its end")))
                    self._body = None
        except Refused:
            pass  # it is answered already, and the connection is closed for it

    def write(self, data: bytes) -> None:
        """Send a piece of the response."""
        self._out.write(data)

    def writeSequence(self, pieces: list[bytes]) -> None:
        """Send pieces of the response."""
        for piece in pieces:
            self._out.write(piece)

    def requestDone(self, request: Request) -> None:
        """The response is complete."""
        self._request = None
        self._head_began = False
        self._cut_body(Failure(BodyCut("answered before its end")))
        self._discard_arrived_body()
        body, self._body = self._body, None
        if self._life is not _Life.OPEN:
            return
        if body is not None:
            self._linger()
        elif not self._keep_alive:
            self._close()
        else:
            self._wire.next_request()
            self._valve.open("consumer")
            self.pump()

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Let a resource stream its response: it is paused instead of its client."""
        if self._out.has_producer:
            raise RuntimeError("the response has a producer already")
        self._valve.open("unread")
        self._out.register(producer, streaming)

    def unregisterProducer(self) -> None:
        """The resource has written what it had."""
        if self._out.has_producer:
            self._out.unregister()
            if self._out.is_full:
                self._valve.close("unread")

    def getPeer(self) -> Any:
        """The client's address."""
        return self._peer

    def getHost(self) -> Any:
        """Our address."""
        return self._host

    def isSecure(self) -> bool:
        """Whether the connection is encrypted."""
        return ISSLTransport(self.transport, None) is not None

    def loseConnection(self) -> None:
        """Close once what was written is sent."""
        self._close()

    def _respondToBadRequestAndDisconnect(self) -> None:
        # Request.requestReceived calls it where a form that it parses is malformed.
        if self._request is not None:
            answer_refusal(self._request, Refused(errors.BAD_FORM))

    # The client reads its answers, or does not

    def client_is_behind(self) -> None:
        """No further request is taken from a client that is behind, unless a resource can be paused for it."""
        self._await_client()
        if not self._out.has_producer:
            self._valve.close("unread")

    def client_has_read(self) -> None:
        """The client has read what the transport had."""
        if self._life is _Life.CLOSING:
            self._say_goodbye()
        elif self._life is _Life.LINGERING:
            self._valve.open("unread")
            self._deadline.set(self._limits.linger_time, self._end_linger)
        elif self._out.has_producer:
            self._set_deadline()
            self._out.go_on()
        else:
            self._valve.open("unread")
            self.pump()

    def _await_client(self) -> None:
        self._head_began = False
        self._expect_reading(self._limits.unread_time)

    def _expect_reading(self, seconds: float) -> None:
        """Abort in ``seconds``, unless the client has read enough of its answer by then."""
        # Not what is unread: that grows as well, while the transport hands over what it holds.
        before = bytes_read(self._below)
        # A client may not read more slowly than it may send; a little that is left has to be read at all.
        least = max(1, min(unread_bytes(self._below), int(self._limits.body_rate * seconds)))

        def look() -> None:
            # The kernel tells us of room when a third of its buffer is free: minutes, for a slow line.
            if unread_bytes(self._below) and bytes_read(self._below) - before >= least:
                self._expect_reading(seconds)
            else:
                self.forceAbortClient()

        self._deadline.set(seconds, look)

    # The end

    def readConnectionLost(self) -> None:
        """See ``IHalfCloseableProtocol``: the client sends no more, and an upload that is whole gets its answer.

        For other requests it is the end, as under a stock ``Site``: most clients that end their side have gone.
        """
        self._is_ended = True
        self._keep_alive = False
        if self._life is _Life.OPEN and self._request is not None and self._is_streaming:
            self.pump()
        else:
            self._close()

    def writeConnectionLost(self) -> None:
        """See ``IHalfCloseableProtocol``; we never end our side alone."""

    def _cut_short(self) -> None:
        """The client ended its side and the wire wants more."""
        if self._request is None:
            self._close()
        else:
            self._refuse(Refused(errors.BODY_SHORT))

    def _linger(self) -> None:
        if self._is_ended:
            return self._close()  # nothing can come that would be answered by a reset
        self._life = _Life.LINGERING
        self._valve.open("consumer")
        self._valve.open("buffered")
        self._deadline.set(self._limits.linger_time, self._end_linger)

    def _end_linger(self) -> None:
        self._has_lingered = True
        self._close()

    def _close(self) -> None:
        if self._life in (_Life.OPEN, _Life.LINGERING):
            self._life = _Life.CLOSING
            if self._out.is_full:
                self._await_client()
            else:
                self._say_goodbye()

    def _say_goodbye(self) -> None:
        # A TLS peer says goodbye when it has read everything, which may take its time.
        late = self._limits.unread_time if unread_bytes(self._below) else self._limits.close_time
        self._expect_reading(late)
        self._below.unregisterProducer()
        self._below.loseConnection()

    def drain(self) -> None:
        """The service will stop: what is here or on its way is the last request."""
        self._keep_alive = False
        if not self._is_shaking:
            self._set_deadline()

    def stop(self) -> None:
        """The service stops: a body is refused, for now; a download is cut; what is whole gets its answer."""
        if self._request is None:
            self._close()
        elif self._request.startedWriting:
            self.forceAbortClient()
        else:
            self._cut_body(Failure(Refused(errors.STOPPING, {b"Retry-After": b"1"})))

    def forceAbortClient(self) -> None:
        """Close at once."""
        self._below.abortConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """See ``IProtocol``."""
        self._life = _Life.LOST
        self._deadline.stop()
        if self._rate is not None:
            self._rate.stop()
        if self._watch is not None:
            self._watch.stop()
        self._out.stopProducing()
        self.factory.leave(self)
        request, self._request = self._request, None
        if request is not None:
            request.connectionLost(reason)
        self._cut_body(Failure(BodyCut("connection lost")))
        self._body = None
