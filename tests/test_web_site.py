"""StreamingSite is a ``Site``: what works on the one works on the other.

One contract, run on both; then what only ours does.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Any

from klein import Klein
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.twisted import MetricsResource
from twisted.cred.checkers import InMemoryUsernamePasswordDatabaseDontUse
from twisted.cred.portal import IRealm, Portal
from twisted.internet import reactor as global_reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.guard import BasicCredentialFactory, HTTPAuthSessionWrapper
from twisted.web.http import datetimeToString
from twisted.web.iweb import IRequest
from twisted.web.resource import IResource, Resource
from twisted.web.server import NOT_DONE_YET, Request, Site
from twisted.web.static import Data, File
from twisted.web.util import Redirect
from twisted.web.vhost import NameVirtualHost
from zope.interface import implementer

from lwstwisted.errors import Refused
from lwstwisted.interfaces import IRequestBody
from lwstwisted.web.site import FAREWELL_TIME, LAST_CHANCE, StreamingSite
from tests.test_web_channel import Answer, Sink, Streaming, Talk, Twin, answers, exchange, get, ok, put
from tests.test_web_wire import head

CLOSE = b"Connection: close"


class Seen(Resource):
    """Says what a request looks like to a resource, and counts how it was found."""

    def __init__(self) -> None:
        super().__init__()
        self.lookups: list[bytes] = []

    def getChild(self, path: bytes, request: Request) -> Resource:
        self.lookups.append(path)
        return self

    def render(self, request: Request) -> bytes:
        assert request.content is not None
        shown = {
            "method": request.method.decode(),
            "uri": request.uri.decode(),
            "path": request.path.decode(),
            "prepath": [part.decode() for part in request.prepath or []],
            "postpath": [part.decode() for part in request.postpath or []],
            "args": {name.decode(): [v.decode() for v in values] for name, values in (request.args or {}).items()},
            "content": request.content.read().decode(),
            "cookie": (request.getCookie(b"a") or b"").decode(),
            "host": request.getRequestHostname().decode(),
            "secure": request.isSecure(),
            "client": getattr(request.getClientAddress(), "host", None),
        }
        return json.dumps(shown).encode()


def page(body: bytes) -> Data:
    """A page that is the same at every path."""
    found = Data(body, "text/plain")
    found.isLeaf = True
    return found


@implementer(IRealm)
class OneResource:
    """A realm in which everybody sees the same."""

    def requestAvatar(self, avatarId: Any, mind: Any, *interfaces: Any) -> Any:
        return IResource, page(avatarId), lambda: None


class SiteContract:
    """What twisted.web's own resources and klein promise, whichever site they are on."""

    make_site: Callable[[IResource], Site]
    addCleanup: Callable[..., None]
    assertEqual: Callable[..., None]
    assertIn: Callable[..., None]
    flushLoggedErrors: Callable[..., list[Any]]

    async def ask(self, resource: IResource, *requests: bytes, methods: str = "") -> list[Answer]:
        """Send ``requests`` on one connection, whose last one closes it."""
        reactor: Any = global_reactor
        port = reactor.listenTCP(0, self.make_site(resource), interface="127.0.0.1")
        try:
            found = await deferToThread(exchange, port.getHost().port, b"".join(requests))
        finally:
            await port.stopListening()
        return answers(found, methods, at_end=True)

    async def seen(self, data: bytes) -> Any:
        (answer,) = await self.ask(Seen(), data)
        return json.loads(answer.body)

    def folder(self) -> str:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        os.mkdir(f"{folder.name}/deep")
        with open(f"{folder.name}/file.txt", "wb") as file:
            file.write(b"0123456789" * 20_000)
        os.utime(f"{folder.name}/file.txt", (1_000_000_000, 1_000_000_000))
        return folder.name

    # static.File

    async def test_file(self) -> None:
        """A file is fetched whole, with its type and date, and the connection serves the next request."""
        first, second = await self.ask(File(self.folder()), get(b"/file.txt"), get(b"/file.txt", CLOSE))
        self.assertEqual((first.status, first.body), (200, b"0123456789" * 20_000))
        self.assertEqual(first.body, second.body)
        self.assertEqual(first.fields[b"content-type"], b"text/plain")
        self.assertEqual(first.fields[b"last-modified"], b"Sun, 09 Sep 2001 01:46:40 GMT")
        self.assertEqual((first.closes, second.closes), (False, True))

    async def test_file_head(self) -> None:
        """HEAD tells the size and sends nothing of the file."""
        requests = get(b"/file.txt", method=b"HEAD"), get(b"/file.txt", CLOSE, method=b"HEAD")
        for answer in await self.ask(File(self.folder()), *requests, methods="HH"):
            self.assertEqual((answer.status, answer.body), (200, b""))
            self.assertEqual(answer.fields[b"content-length"], b"200000")

    async def test_file_range(self) -> None:
        """A part of a file, several parts, and a part that isn't there."""
        one, two, none = await self.ask(
            File(self.folder()),
            get(b"/file.txt", b"Range: bytes=15-19"),
            get(b"/file.txt", b"Range: bytes=0-1,5-6"),
            get(b"/file.txt", b"Range: bytes=300000-", CLOSE),
        )
        self.assertEqual((one.status, one.body), (206, b"56789"))
        self.assertEqual(one.fields[b"content-range"], b"bytes 15-19/200000")
        self.assertEqual((two.status, two.body.count(b"Content-range: bytes")), (206, 2))
        self.assertEqual(none.status, 416)

    async def test_file_not_modified(self) -> None:
        """A client that has the file is told so."""
        since = b"If-Modified-Since: " + datetimeToString(1_000_000_000)
        same, next_one = await self.ask(File(self.folder()), get(b"/file.txt", since), get(b"/file.txt", CLOSE))
        self.assertEqual((same.status, same.body), (304, b""))
        self.assertEqual(next_one.status, 200)

    async def test_file_not_found(self) -> None:
        """404 for what isn't there, also to a POST with a body."""
        request = head(b"Content-Length: 3", first=b"POST /none HTTP/1.1") + b"abc"
        found = await self.ask(File(self.folder()), get(b"/none"), request, get(b"/none", CLOSE))
        self.assertEqual([a.status for a in found], [404, 404, 404])

    async def test_folder(self) -> None:
        """A folder is listed, and without its slash it redirects."""
        listing, redirect = await self.ask(File(self.folder()), get(b"/"), get(b"/deep", CLOSE))
        self.assertEqual(listing.status, 200)
        self.assertIn(b'<a href="file.txt">', listing.body)
        self.assertEqual(redirect.status, 302)
        self.assertIn(b"/deep/", redirect.fields[b"location"])

    # What a request looks like

    async def test_get(self) -> None:
        """Path, query, cookie and host are where they always were."""
        shown = await self.seen(get(b"/a%20b/c?x=1&x=2&y=", b"Cookie: b=2; a=1", CLOSE))
        self.assertEqual(shown["args"], {"x": ["1", "2"], "y": [""]})
        self.assertEqual((shown["prepath"], shown["postpath"]), (["a b", "c"], []))
        self.assertEqual((shown["uri"], shown["path"]), ("/a%20b/c?x=1&x=2&y=", "/a%20b/c"))
        self.assertEqual((shown["cookie"], shown["host"], shown["secure"]), ("1", "a", False))
        self.assertEqual((shown["content"], shown["client"]), ("", "127.0.0.1"))

    async def test_one_lookup(self) -> None:
        """The tree of resources is asked once for a GET."""
        resource = Seen()
        await self.ask(resource, get(b"/a/b", CLOSE))
        self.assertEqual(resource.lookups, [b"a", b"b"])

    async def test_form(self) -> None:
        """The fields of a form are in ``args``, beside those of the query."""
        form = b"Content-Type: application/x-www-form-urlencoded"
        data = head(form, b"Content-Length: 10", CLOSE, first=b"POST /f?q=0 HTTP/1.1") + b"a=1&a=2&b="
        shown = await self.seen(data)
        self.assertEqual(shown["args"], {"q": ["0"], "a": ["1", "2"], "b": [""]})

    async def test_multipart_form(self) -> None:
        """So are those of a multipart form."""
        form = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\none\r\n--b--\r\n'
        data = head(
            b"Content-Type: multipart/form-data; boundary=b",
            b"Content-Length: %d" % len(form),
            CLOSE,
            first=b"POST /f HTTP/1.1",
        )
        self.assertEqual((await self.seen(data + form))["args"], {"a": ["one"]})

    async def test_bad_multipart_form(self) -> None:
        """A form without a boundary is a bad request."""
        lines = b"Content-Type: multipart/form-data", b"Content-Length: 3", CLOSE
        (answer,) = await self.ask(Seen(), head(*lines, first=b"POST /f HTTP/1.1") + b"abc")
        self.assertEqual(answer.status, 400)

    async def test_content(self) -> None:
        """A body is in ``content``, whether it was counted or chunked, small or large."""
        self.assertEqual((await self.seen(put(b"hello", CLOSE)))["content"], "hello")
        sent = head(b"Transfer-Encoding: chunked", CLOSE) + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
        self.assertEqual((await self.seen(sent))["content"], "abcde")
        self.assertEqual((await self.seen(put(b"x" * 300_000, CLOSE)))["content"], "x" * 300_000)

    # Resources

    async def test_klein(self) -> None:
        """A klein application: JSON in and out, form fields, parts of the path, 404, and coroutines."""
        reactor: Any = global_reactor
        app = Klein()

        @app.route("/json", methods=["POST"])
        def echo(request: IRequest) -> bytes:
            request.setHeader(b"Content-Type", b"application/json")
            return json.dumps({"got": json.load(request.content)}).encode()

        @app.route("/form", methods=["POST"])
        def form(request: IRequest) -> bytes:
            return b",".join(request.args[b"a"])

        @app.route("/user/<name>/<int:age>")
        async def user(request: IRequest, name: str, age: int) -> str:
            await deferLater(reactor, 0)
            return f"{name} is {age + 1}"

        form_type = b"Content-Type: application/x-www-form-urlencoded"
        found = await self.ask(
            app.resource(),
            head(b"Content-Length: 13", first=b"POST /json HTTP/1.1") + b'{"a": [1, 2]}',
            head(form_type, b"Content-Length: 7", first=b"POST /form HTTP/1.1") + b"a=1&a=2",
            get(b"/user/ann/41"),
            get(b"/none", CLOSE),
        )
        self.assertEqual([a.status for a in found], [200, 200, 200, 404])
        self.assertEqual([a.body for a in found[:3]], [b'{"got": {"a": [1, 2]}}', b"1,2", b"ann is 42"])

    async def test_metrics(self) -> None:
        """prometheus_client's page, a WSGI application in the reactor's threads: all of it, chosen, and compressed."""
        registry = CollectorRegistry()
        for name in ("first", "second"):
            Counter(name, "Of this test.", registry=registry).inc(7)
        found = await self.ask(
            MetricsResource(registry),
            get(),
            get(b"/?name%5B%5D=second_total"),
            get(b"/", b"Accept-Encoding: gzip"),
            get(b"/", CLOSE, b"Accept: application/openmetrics-text; version=1.0.0"),
        )
        self.assertEqual([a.status for a in found], [200] * 4)
        self.assertIn(b"first_total 7.0\n", found[0].body)
        self.assertIn(b"second_total 7.0\n", found[1].body)
        self.assertEqual(found[1].body.count(b"first"), 0)
        self.assertEqual(gzip.decompress(found[2].body), found[0].body)
        self.assertIn(b"application/openmetrics-text", found[3].fields[b"content-type"])

    async def test_guard(self) -> None:
        """Basic authentication: refused without, let in with, for a GET and a POST."""
        portal = Portal(OneResource(), [InMemoryUsernamePasswordDatabaseDontUse(ann=b"secret")])
        resource = HTTPAuthSessionWrapper(portal, [BasicCredentialFactory(b"realm")])
        right = b"Authorization: Basic " + b64encode(b"ann:secret")
        wrong = b"Authorization: Basic " + b64encode(b"ann:guess")
        post = head(right, b"Content-Length: 3", first=b"POST / HTTP/1.1") + b"abc"
        found = await self.ask(resource, get(), get(b"/", wrong), get(b"/", right), post, get(b"/", right, CLOSE))
        self.assertEqual([a.status for a in found], [401, 401, 200, 405, 200])
        self.assertEqual(found[0].fields[b"www-authenticate"], b'basic realm="realm"')
        self.assertEqual((found[2].body, found[4].body), (b"ann", b"ann"))

    async def test_virtual_hosts_and_redirects(self) -> None:
        """Each host has its own tree; a redirect is one."""
        hosts = NameVirtualHost()
        hosts.addHost(b"one", page(b"first"))
        hosts.default = Redirect(b"http://one/")
        first = head(host=b"Host: one", first=b"GET / HTTP/1.1")
        found = await self.ask(hosts, first, get(b"/x", CLOSE))
        self.assertEqual([a.status for a in found], [200, 302])
        self.assertEqual((found[0].body, found[1].fields[b"location"]), (b"first", b"http://one/"))

    async def test_later(self) -> None:
        """A resource may answer later, in pieces; they are chunked, and the next answer waits for its turn."""
        reactor: Any = global_reactor

        class Later(Resource):
            isLeaf = True

            def render_GET(self, request: Request) -> int:
                request.write(b"one ")
                reactor.callLater(0.01, request.write, b"two")
                reactor.callLater(0.02, request.finish)
                return NOT_DONE_YET

        found = await self.ask(Later(), get(), get(b"/", CLOSE))
        self.assertEqual([(a.status, a.body, a.is_whole) for a in found], [(200, b"one two", True)] * 2)
        self.assertEqual(found[0].fields[b"transfer-encoding"], b"chunked")

    async def test_method_not_allowed(self) -> None:
        """A resource without the method says which it has; HEAD is made out of GET."""

        class Page(Resource):
            isLeaf = True

            def render_GET(self, request: Request) -> bytes:
                return b"page"

        post = head(b"Content-Length: 3", first=b"POST / HTTP/1.1") + b"abc"
        post_answer, put_answer, head_answer, get_answer = await self.ask(
            Page(), post, put(b"abc"), get(method=b"HEAD"), get(b"/", CLOSE), methods="GGHG"
        )
        self.assertEqual((post_answer.status, put_answer.status), (405, 501))
        self.assertIn(b"GET", post_answer.fields[b"allow"])
        self.assertEqual((head_answer.status, head_answer.fields[b"content-length"]), (200, b"4"))
        self.assertEqual(get_answer.body, b"page")

    async def test_a_resource_that_raises(self) -> None:
        """500, logged, and no traceback for the client; from ``render`` and from ``getChild``."""

        class Broken(Resource):
            def getChild(self, path: bytes, request: Request) -> Resource:
                if path == b"lookup":
                    raise ValueError("secret")
                return self

            def render(self, request: Request) -> bytes:
                raise ValueError("secret")

        for path in (b"/lookup", b"/render"):
            first, second = await self.ask(Broken(), get(path), get(path, CLOSE))
            self.assertEqual((first.status, second.status), (500, 500))
            self.assertEqual(b"secret" in first.body, False)
            self.assertEqual(len(self.flushLoggedErrors(ValueError)), 2)

    async def test_options_star(self) -> None:
        """``OPTIONS *`` concerns the server, not a resource."""
        (answer,) = await self.ask(Seen(), get(b"*", CLOSE, method=b"OPTIONS"))
        self.assertEqual(answer.status, 200)

    async def test_session(self) -> None:
        """A session is found again by its cookie."""

        class Counting(Resource):
            isLeaf = True

            def render(self, request: Request) -> bytes:
                session: Any = request.getSession()
                session.count = getattr(session, "count", 0) + 1
                if session.count == 2:
                    session.expire()
                return b"%d" % session.count

        site = self.make_site(Counting())
        reactor: Any = global_reactor
        port = reactor.listenTCP(0, site, interface="127.0.0.1")
        try:
            (first,) = answers(await deferToThread(exchange, port.getHost().port, get(b"/", CLOSE)))
            cookie = b"Cookie: " + first.fields[b"set-cookie"].partition(b";")[0]
            (second,) = answers(await deferToThread(exchange, port.getHost().port, get(b"/", cookie, CLOSE)))
        finally:
            await port.stopListening()
        self.assertEqual((first.body, second.body), (b"1", b"2"))


class StreamingSiteTests(SiteContract, TestCase):
    """Ours."""

    timeout = 10

    def make_site(self, resource: IResource) -> Site:  # type: ignore[override]
        site = StreamingSite(resource)
        self.addCleanup(lambda: Deferred.fromCoroutine(site.stop()))
        return site


class StockSiteTests(SiteContract, TestCase):
    """Twisted's, so that the contract says what is so and not what we would like."""

    timeout = 10

    def make_site(self, resource: IResource) -> Site:  # type: ignore[override]
        return Site(resource)


class OnlyOursTests(SynchronousTestCase):
    """What a ``Site`` doesn't do."""

    def test_log(self) -> None:
        """A line of the access log is in the combined format, with the date of the wall clock.

        The reactor's own clock counts from the start of the machine, or from nothing, as here.
        """
        talk = Talk(Data(b"page", "text/plain"))
        log = io.StringIO()
        talk.site.startFactory()
        talk.site.logFile = log
        self.addCleanup(talk.site.stopFactory)
        before = int(time.time())
        talk.send(get(b"/a?b=c", b"Referer: http://x/\x80", b'User-Agent: "q" \\ \x9b'))
        match = re.fullmatch(
            r'"192\.168\.1\.1" - - \[([^]]+)\] "GET /a\?b=c HTTP/1\.1" 404 \d+ "http://x/\\x80" "\\"q\\" \\\\ \\x9b"'
            r' "[0-9a-f]{16}" "-"\n',
            log.getvalue(),
        )
        self.assertIsNotNone(match, log.getvalue())
        assert match is not None
        day, month, rest = match[1].split("/")
        months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
        written = datetime.strptime(f"{day} {months.index(month) + 1} {rest}", "%d %m %Y:%H:%M:%S %z").timestamp()
        self.assertLessEqual(before, written)
        self.assertLessEqual(written, time.time())

    def test_no_h2(self) -> None:
        """HTTP/2 is never offered, though Twisted offers it where h2 is installed."""
        self.assertEqual(Talk(Resource()).site.acceptableProtocols(), [b"http/1.1"])

    def test_lookup_twice_with_content(self) -> None:
        """With content the tree is asked when the head is there and when the content is; the answer is one."""
        resource = Seen()
        talk = Talk(resource)
        talk.send(put(b"abc"))
        self.assertEqual(resource.lookups, [b"f", b"f"])
        shown = json.loads(talk.answers[0].body)
        self.assertEqual((shown["content"], shown["prepath"], shown["postpath"]), ("abc", ["f"], []))


async def spool_and_answer(request: Request, body: IRequestBody) -> None:
    await body.deliver_to(Sink())
    ok(request)


class StopTests(SynchronousTestCase):
    """The service stops."""

    def connect(self, talk: Talk) -> Talk:
        """Another connection to the same site."""
        other = Talk.__new__(Talk)
        other.clock, other.site, other.transport = talk.clock, talk.site, Twin()
        other.channel = talk.site.buildProtocol(None)  # type: ignore[arg-type]
        other.channel.makeConnection(other.transport)
        return other

    def stop(self, talk: Talk) -> Deferred[None]:
        work: Coroutine[Deferred[Any], Any, None] = talk.site.stop()
        return Deferred.fromCoroutine(work)

    def test_idle(self) -> None:
        """Idle connections are closed, the new one and the one that has been served."""
        fresh = Talk(Data(b"page", "text/plain"))
        served = self.connect(fresh)
        served.send(get())
        stopped = self.stop(fresh)
        self.assertTrue(fresh.is_closed)
        self.assertTrue(served.is_closed)
        self.assertNoResult(stopped)
        fresh.lose()
        served.lose()
        self.successResultOf(stopped)

    def test_busy(self) -> None:
        """Bodies are refused, and ``stop`` waits until their requests have cleaned up and their clients know it."""
        cleaned: Deferred[None] = Deferred()
        seen: list[object] = []

        async def receive(request: Request, body: IRequestBody) -> None:
            try:
                await body.deliver_to(Sink())
            except Refused as refused:
                seen.append(refused)
                await cleaned
                raise

        busy = Talk(receive)
        lingering = self.connect(busy)
        lingering.send(b"rubbish\n")
        busy.send(put(b"abc", length=9))
        stopped = self.stop(busy)
        self.assertTrue(lingering.is_closed)
        self.assertEqual(len(seen), 1)
        self.assertEqual(busy.statuses, [])
        cleaned.callback(None)
        self.assertEqual(busy.statuses, [503])
        self.assertEqual(busy.answers[0].fields[b"retry-after"], b"1")
        self.assertNoResult(stopped)
        busy.clock.advance(FAREWELL_TIME)  # nobody reads it, nor leaves
        self.assertTrue(busy.is_aborted)
        self.successResultOf(stopped)

    def drain(self, talk: Talk, seconds: float = 30.0) -> Deferred[None]:
        work: Coroutine[Deferred[Any], Any, None] = talk.site.drain(seconds)
        return Deferred.fromCoroutine(work)

    def test_drain(self) -> None:
        """What has begun ends, with word that it is the last; who is idle has a moment, and then is closed."""
        going = Talk(Streaming(spool_and_answer))
        idle, late = self.connect(going), self.connect(going)
        idle.send(get())
        going.send(put(b"abc", length=6))
        drained = self.drain(going)
        late.send(get() + get())
        self.assertEqual(late.answers[0].fields[b"connection"], b"close")
        self.assertEqual(late.statuses, [200])
        self.assertFalse(idle.is_closed)
        idle.clock.advance(LAST_CHANCE)
        self.assertTrue(idle.is_closed)
        for talk in (idle, late):
            talk.lose()
        self.assertNoResult(drained)
        going.send(b"def")
        self.assertEqual(going.statuses, [200])
        self.assertEqual(going.answers[0].fields[b"connection"], b"close")
        going.lose()
        self.successResultOf(drained)
        self.assertEqual(going.clock.getDelayedCalls(), [])

    def test_drain_has_an_end(self) -> None:
        """A client that takes its time doesn't keep the service from stopping, nor does an impatient operator."""
        talk = Talk(Streaming(spool_and_answer))
        talk.send(put(b"abc", length=6))
        drained = self.drain(talk)
        for _ in range(29):
            talk.clock.advance(1)
        self.assertNoResult(drained)
        talk.clock.advance(1)
        self.successResultOf(drained)
        hastened = self.drain(talk)
        self.assertNoResult(hastened)
        talk.site.hasten()
        self.successResultOf(hastened)

    def test_work_behind_the_answer(self) -> None:
        """A request that still works though it has answered is waited for too."""
        done: Deferred[None] = Deferred()

        async def receive(request: Request, body: IRequestBody) -> None:
            ok(request)
            await done

        talk = Talk(Streaming(receive))
        talk.send(get() + get())
        self.assertEqual(talk.statuses, [200, 200])
        stopped = self.stop(talk)
        self.assertTrue(talk.is_closed)
        talk.lose()
        self.assertNoResult(stopped)
        done.callback(None)
        self.successResultOf(stopped)
