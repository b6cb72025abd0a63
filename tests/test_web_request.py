"""What our request can do beside twisted.web's, and what is written down of it."""

from __future__ import annotations

import json
import socket
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource
from twisted.web.server import Request

from lwstwisted.errors import BODY_TOO_LARGE, Refused
from lwstwisted.interfaces import IRequestBody
from lwstwisted.web.accesslog import combined_log, json_log
from lwstwisted.web.request import StreamingRequest
from lwstwisted.web.site import StreamingSite
from tests.test_web_channel import CONTINUE, Sink, Streaming, Talk, answers, get, ok, put
from tests.test_web_wire import head

HINT = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n"


def hint(request: Any) -> None:
    request.send_interim(103, Headers({b"Link": [b"</style.css>; rel=preload"]}))


class InterimTests(SynchronousTestCase):
    """Interim responses (RFC 9110 section 15.2)."""

    def test_before_the_response(self) -> None:
        """They come before the response, each whole, and change nothing of it."""

        async def receive(request: Request, body: IRequestBody) -> None:
            hint(request)
            hint(request)
            ok(request)

        talk = Talk(receive)
        talk.send(get() + get())
        once = 2 * HINT
        self.assertTrue(talk.raw.startswith(once + b"HTTP/1.1 200 "))
        self.assertEqual(talk.raw.count(once), 2)
        self.assertEqual(talk.raw.replace(HINT, b"").count(b"HTTP/1.1 200 "), 2)
        self.assertNotIn(b"Link", talk.raw.replace(HINT, b""))

    def test_104(self) -> None:
        """A status that nobody has named yet is sent as well."""

        async def receive(request: Any, body: IRequestBody) -> None:
            request.send_interim(104)
            ok(request)

        talk = Talk(receive)
        talk.send(get())
        self.assertTrue(talk.raw.startswith(b"HTTP/1.1 104 Upload Resumption Supported\r\n\r\nHTTP/1.1 200 "))

    def test_with_100_continue(self) -> None:
        """The client that waits for 100 gets it when the body is accepted, behind the others."""

        async def receive(request: Request, body: IRequestBody) -> None:
            hint(request)
            await body.deliver_to(Sink())
            ok(request)

        talk = Talk(receive)
        talk.send(put(b"", b"Expect: 100-continue", length=3))
        self.assertEqual(talk.raw, HINT + CONTINUE)
        talk.send(b"abc")
        self.assertTrue(talk.raw.startswith(HINT + CONTINUE + b"HTTP/1.1 200 "))

    def test_not_understood(self) -> None:
        """An HTTP/1.0 client would take it for the response, so it gets none."""

        async def receive(request: Request, body: IRequestBody) -> None:
            hint(request)
            ok(request)

        talk = Talk(receive)
        talk.send(head(first=b"GET / HTTP/1.0"))
        self.assertNotIn(b"103", talk.raw)
        self.assertIn(b" 200 ", talk.raw)

    def test_too_late(self) -> None:
        """Inside a response it would be read as content, so nothing is sent; nor behind the end of the connection."""
        requests: list[Any] = []
        may_end: Deferred[None] = Deferred()

        async def receive(request: Request, body: IRequestBody) -> None:
            requests.append(request)
            request.write(b"part")
            hint(request)
            await may_end

        talk = Talk(receive)
        talk.send(get())
        self.assertNotIn(HINT, talk.raw)
        talk.lose()
        hint(requests[0])
        self.assertNotIn(HINT, talk.raw)
        may_end.callback(None)

    def test_other_statuses(self) -> None:
        """What isn't an interim status, or has a meaning for the connection, is a mistake of the resource."""

        async def receive(request: Any, body: IRequestBody) -> None:
            for status in (100, 101, 99, 200, 404):
                with self.assertRaises(ValueError):
                    request.send_interim(status)
            ok(request)

        talk = Talk(receive)
        talk.send(get())
        self.assertTrue(talk.raw.startswith(b"HTTP/1.1 200 "))

    def test_no_splitting(self) -> None:
        """A field value with a line end in it can't begin a response of its own."""

        async def receive(request: Any, body: IRequestBody) -> None:
            request.send_interim(103, Headers({b"Link": [b"a\r\n\r\nHTTP/1.1 200 Evil"]}))
            ok(request)

        talk = Talk(receive)
        talk.send(get())
        self.assertNotIn(b"\r\nHTTP/1.1 200 Evil", talk.raw)


class LogTests(SynchronousTestCase):
    """The access log."""

    def lines(self, formatter: Any, *requests: bytes) -> list[str]:
        async def receive(request: Request, body: IRequestBody) -> None:
            if request.path == b"/refused":
                raise Refused(BODY_TOO_LARGE)
            await body.deliver_to(Sink())
            talk.clock.advance(1.25)
            ok(request)

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "log")
            talk = Talk(receive, logPath=str(path), logFormatter=formatter)
            talk.site.startFactory()
            for request in requests:
                talk.send(request)
            talk.site.stopFactory()
            return path.read_text(encoding="ascii").splitlines()

    def test_json(self) -> None:
        """One object a line, with the bytes both ways, and how long it took."""
        (line,) = self.lines(json_log, put(b"abcde", b"User-Agent: curl/8", b"Referer: http://x/"))
        entry = json.loads(line)
        when = datetime.fromisoformat(entry.pop("time"))
        self.assertLess(abs(when - datetime.now(UTC)), timedelta(minutes=1))
        self.assertRegex(entry.pop("id"), "^[0-9a-f]{16}$")
        self.assertEqual(
            entry,
            {
                "client": "192.168.1.1",
                "method": "PUT",
                "target": "/f",
                "protocol": "HTTP/1.1",
                "status": 200,
                "refusal": None,
                "upload": None,
                "received": 5,
                "sent": 2,
                "seconds": 1.25,
                "referer": "http://x/",
                "agent": "curl/8",
            },
        )

    def test_cut(self) -> None:
        """A request whose client left is told as well: 499 where it had no answer yet, and once in any case."""

        async def receive(request: Request, body: IRequestBody) -> None:
            if request.path == b"/half":
                request.write(b"12345")
            await body.deliver_to(Sink())
            ok(request)

        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log")
            head = b"PUT %b HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
            for request, told in (
                (head % b"/none" + b"1234", [("/none", 499, 4, 0)]),
                (head % b"/half" + b"1234", [("/half", 200, 0, 5)]),
                (head % b"/whole" + b"123456789", [("/whole", 200, 9, 2)]),
                (b"PUT /head HTTP/1.1\r\nHost:", []),
            ):
                log.unlink(missing_ok=True)
                talk = Talk(receive, logPath=str(log), logFormatter=json_log)
                talk.site.startFactory()
                talk.send(request)
                talk.lose()
                talk.site.stopFactory()
                entries = [json.loads(line) for line in log.read_text().splitlines()]
                keys = ("target", "status", "received", "sent")
                self.assertEqual([tuple(entry[key] for key in keys) for entry in entries], told)

    def test_forging(self) -> None:
        """Whatever a client sends, it gets one line, which can't look like another or move a terminal's cursor."""
        evil = b'User-Agent: x" 200 \xff\xc3\xa9 \t\\n{"status": 200}'
        for formatter in (json_log, combined_log):
            lines = self.lines(formatter, get(b"/%0a%1b[2J", evil), get(b"/refused"))
            self.assertEqual(len(lines), 2, lines)
            for line in lines:
                self.assertTrue(line.isprintable() and line.isascii(), line)
        self.assertEqual(json.loads(self.lines(json_log, get(b"/", evil))[0])["status"], 200)
        self.assertEqual(json.loads(self.lines(json_log, get(b"/refused"))[0])["status"], 413)

    def test_stock_request(self) -> None:
        """With a request class of the application's own the line lacks what only ours knows."""

        class Own(Request):
            pass

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "log")
            talk = Talk(Resource(), logPath=str(path), logFormatter=json_log, requestFactory=Own)
            talk.site.startFactory()
            talk.send(get())
            talk.site.stopFactory()
            entry = json.loads(path.read_text())
        self.assertEqual((entry["status"], entry["received"], entry["seconds"]), (404, None, None))
        self.assertFalse(issubclass(Own, StreamingRequest))


class ProxyTests(TestCase):
    """Behind a proxy that speaks the PROXY protocol."""

    timeout = 20

    async def test_address(self) -> None:
        """The client's address is the one that the proxy tells, in front of the first request."""
        from twisted.internet import reactor

        async def receive(request: Request, body: IRequestBody) -> None:
            ok(request, f"{request.getClientAddress().host} {request.getHost().port}".encode())

        site = StreamingSite(Streaming(receive))
        endpoint = serverFromString(reactor, "haproxy:tcp:0:interface=127.0.0.1")
        port = await endpoint.listen(site)
        self.addCleanup(lambda: Deferred.fromCoroutine(site.stop()))
        self.addCleanup(port.stopListening)

        def client() -> bytes:
            with socket.create_connection(("127.0.0.1", port.getHost().port), timeout=10) as connection:
                connection.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 1234 443\r\n" + get())
                return connection.recv(1000)

        self.assertEqual(answers(await deferToThread(client))[0].body, b"192.0.2.1 443")
