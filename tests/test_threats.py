"""The threat model's tables "Framing" and "Exhaustion", asked of the real service on TCP and over TLS.

**Framing.** :data:`FRAMING` and :data:`SERVED` are that table; a case is one line of them. Each is sent whole, byte by
byte (over TLS in records of one byte) and cut at random, and gets the same status and leaves the same disk each time.
Behind each refused request comes another one, which nobody may see. Without a network the same is tested in
``test_web_wire.py``, and what conformance suites ask in ``test_h1spec.py``.

**Exhaustion.** Each row of that table, and what proves it here or elsewhere::

  slow heads             test_slow_clients.SlowClientTests.test_slow_heads
                         test_web_channel.DeadlineTests.test_slow_head
  slow bodies            test_slow_clients.SlowClientTests.test_slow_bodies
                         test_web_limits.BodyRateTests.test_trickle
  unread answers         test_slow_clients.SlowClientTests.test_slow_reads
                         test_slow_clients.SlowClientTests.test_trickled_reads
                         test_web_channel.UnreadTests.test_cut_when_nothing_is_read
  stalled handshakes     test_threats.ExhaustionTests.test_stalled_handshakes
                         test_web_limits.RealHandshakeTests.test_silence_on_the_tls_port
  caps of connections    test_web_limits.ConnectionsTests.test_all
                         test_web_limits.ConnectionsTests.test_of_one_address
  no descriptor left     test_slow_clients.DescriptorTests.test_no_descriptor_left
  hostile forms          test_uploads_form.RefusalTests.test_limits
                         test_uploads_form.FlowTests.test_hostile_bodies
                         test_uploads_form.StreamingFormTests.test_malformed_forms
  coded uploads          test_uploads_resource.StreamingTests.test_bad_fields
                         test_uploads_form.StreamingFormTests.test_heads
  a disk that fails      test_stores_local.NthFaultTests.test_write
                         test_stores_local.NthFaultTests.test_failed_sync_is_final
                         test_uploads_resource.StreamingTests.test_full_disk
  steps of the clock     test_clock_steps.ServiceTests.test_uploads_and_idle_connections
                         test_clock_steps.TimerTests.test_epoll
  floods of bad requests test_threats.ExhaustionTests.test_flood_of_bad_requests
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib
import itertools
import os
import random
import re
import selectors
import socket
import ssl
import statistics
import tempfile
import time
from base64 import b64encode
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from threading import Event, Thread

import pytest
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.certificate import ensure_development_certificate
from tests.servers import (
    PATIENCE,
    serving,
    tls_endpoint,
    twistd,
    unfinished_beneath,
    visible_beneath,
    wait_until,
)
from tests.test_web_channel import CONTINUE, answers

SEED = int(os.environ.get("LWSTWISTED_SEED") or random.SystemRandom().randrange(1 << 32))
"""Decides where requests are cut; a failure tells it, and the environment variable sets it."""

MAX_SIZE = 1 << 20
BODY_BYTES = 4 << 20

FOLDER = b"/files/TAG/"
"""Each sending has a folder of its own: its number stands for ``TAG``."""


def head(*lines: bytes, first: bytes = b"PUT " + FOLDER + b"f HTTP/1.1", host: bytes | None = b"Host: a") -> bytes:
    return b"\r\n".join([first, *([host] if host is not None else []), *lines, b"", b""])


def chunked(data: bytes) -> bytes:
    return head(CHUNKED) + data


def asking(*lines: bytes, first: bytes = b"PUT " + FOLDER + b"f HTTP/1.1") -> bytes:
    """A head that waits for ``100 Continue`` before it sends a long body."""
    length = () if any(line.startswith(b"Content-Length") for line in lines) else (b"Content-Length: 100000",)
    return head(b"Expect: 100-continue", *length, *lines, first=first)


HELLO = b"hello"
LENGTH = b"Content-Length: 5"
CHUNKED = b"Transfer-Encoding: chunked"
CHUNKS = b"5\r\nhello\r\n0\r\n\r\n"
CLOSE = b"Connection: close"
TRAILER = b"X: " + b"y" * 1000 + b"\r\n"
NEXT = head(b"Content-Length: 1", first=b"PUT " + FOLDER + b"smuggled HTTP/1.1") + b"x"
"""Follows each refused request; nobody may see it."""

FRAMING: list[tuple[str, bytes, tuple[int, ...]]] = [
    # Content-Length and Transfer-Encoding together
    ("length and coding", head(LENGTH, CHUNKED) + CHUNKS, (400,)),
    ("coding and length", head(CHUNKED, LENGTH) + CHUNKS, (400,)),
    # Content-Length that isn't one number
    ("two equal lengths", head(LENGTH, LENGTH) + HELLO, (400,)),
    ("two different lengths", head(LENGTH, b"content-length: 6") + HELLO, (400,)),
    ("length 5, 5", head(b"Content-Length: 5, 5") + HELLO, (400,)),
    ("length +5", head(b"Content-Length: +5") + HELLO, (400,)),
    ("length -5", head(b"Content-Length: -5") + HELLO, (400,)),
    ("length 0x5", head(b"Content-Length: 0x5") + HELLO, (400,)),
    ("length 1_0", head(b"Content-Length: 1_0") + HELLO + HELLO, (400,)),
    ("empty length", head(b"Content-Length:") + HELLO, (400,)),
    ("length with a blank before the colon", head(b"Content-Length : 5") + HELLO, (400,)),
    ("coding with a blank before the colon", head(b"Transfer-Encoding : chunked") + CHUNKS, (400,)),
    # Content-Length above the maximum: at once
    ("length above the maximum", head(b"Content-Length: %d" % (MAX_SIZE + 1)), (413,)),
    ("length 2^63", head(b"Content-Length: %d" % 2**63), (413,)),
    ("length 2^64 + 5", head(b"Content-Length: %d" % (2**64 + 5)), (413,)),
    ("length of 26 digits", head(b"Content-Length: " + b"9" * 26), (413,)),
    ("length of 5,000 digits", head(b"Content-Length: " + b"9" * 5000), (400, 413)),
    # Transfer-Encoding that isn't one "chunked"
    ("two codings", head(CHUNKED, CHUNKED) + CHUNKS, (400, 501)),
    ("coding chunked, chunked", head(b"Transfer-Encoding: chunked, chunked") + CHUNKS, (400, 501)),
    ("coding xchunked", head(b"Transfer-Encoding: xchunked") + CHUNKS, (400, 501)),
    ("coding gzip, chunked", head(b"Transfer-Encoding: gzip, chunked") + CHUNKS, (400, 501)),
    ("coding with a vertical tab", head(b"Transfer-Encoding: \x0bchunked") + CHUNKS, (400, 501)),
    ("coding identity", head(b"Transfer-Encoding: identity") + HELLO, (400, 501)),
    ("coding in HTTP/1.0", head(CHUNKED, first=b"PUT " + FOLDER + b"f HTTP/1.0") + CHUNKS, (400, 501)),
    # obs-fold
    ("folded field", head(LENGTH, b"X: a", b" b") + HELLO, (400,)),
    ("folded field with a tab", head(LENGTH, b"X: a", b"\tb") + HELLO, (400,)),
    ("folded coding", head(b"Transfer-Encoding:", b" chunked") + CHUNKS, (400,)),
    ("folded length", head(b"Content-Length: 1", b" 0") + HELLO + HELLO, (400,)),
    # bare LF
    ("bare LF everywhere", head(LENGTH).replace(b"\r", b"") + HELLO, (400,)),
    ("bare LF behind the request line", head(LENGTH).replace(b"\r", b"", 1) + HELLO, (400,)),
    ("bare LF behind a field", head(LENGTH + b"\nX: y") + HELLO, (400,)),
    ("bare LF as the empty line", head(LENGTH)[:-2] + b"\n" + HELLO, (400,)),
    # control bytes
    *(
        (f"{bad!r} in a value", head(LENGTH, b"X: a" + bad + b"b") + HELLO, (400,))
        for bad in (b"\r", b"\0", b"\x01", b"\x08", b"\x0b", b"\x0c", b"\x1b", b"\x7f")
    ),
    ("NUL in a name", head(LENGTH, b"X\0: a") + HELLO, (400,)),
    # chunk sizes
    *(
        (f"chunk size {size!r}", chunked(size + b"\r\nhello\r\n0\r\n\r\n"), (400,))
        for size in (b"0x5", b"5_", b"+5", b"-5", b"", b" 5", b"5 ", b"five", b"0" * 16 + b"5")
    ),
    ("chunk size of 17 digits in the second chunk", chunked(b"5\r\nhello\r\n" + b"1" * 17 + b"\r\n"), (400, 413)),
    ("chunk size of 16 digits", chunked(b"f" * 16 + b"\r\n"), (400, 413)),
    ("chunk size above the maximum", chunked(b"%x\r\n" % (BODY_BYTES + 1)), (413,)),
    ("chunk size with bare LF", chunked(b"5\nhello\r\n0\r\n\r\n"), (400,)),
    # chunk extensions
    ("extension with bare CR", chunked(b"5;a\rb\r\nhello\r\n0\r\n\r\n"), (400,)),
    ("extension with bare LF", chunked(b"5;a\nhello\r\n0\r\n\r\n"), (400,)),
    ("extension of 4 KiB and more", chunked(b"5;" + b"x" * 4096 + b"\r\n"), (400,)),
    ("extensions of 4 KiB and more in all", chunked((b"1;" + b"x" * 819 + b"\r\na\r\n") * 5), (400,)),
    # chunk data
    ("chunk without an end of line", chunked(b"5\r\nhelloXX0\r\n\r\n"), (400,)),
    ("chunk ended by LF", chunked(b"5\r\nhello\n0\r\n\r\n"), (400,)),
    ("chunk longer than said", chunked(b"4\r\nhello\r\n0\r\n\r\n"), (400,)),
    ("chunk shorter than said", chunked(b"6\r\nhello\r\n0\r\n\r\n"), (400,)),
    ("second chunk without an end of line", chunked(b"5\r\nhello\r\n5\r\nhelloXX0\r\n\r\n"), (400,)),
    # trailers
    ("many trailers", chunked(b"5\r\nhello\r\n0\r\n" + TRAILER * 9), (431,)),
    ("a long trailer", chunked(b"5\r\nhello\r\n0\r\nX: " + b"y" * 8192), (431,)),
    ("trailer that is none", chunked(b"5\r\nhello\r\n0\r\nGET / HTTP/1.1\r\n\r\n"), (400,)),
    # Host
    ("no host", head(LENGTH, host=None) + HELLO, (400,)),
    ("two hosts", head(LENGTH, b"Host: a") + HELLO, (400,)),
    *(
        (f"host {host!r}", head(LENGTH, host=b"Host: " + host) + HELLO, (400,))
        for host in (b"a b", b"a/b", b"a@b", b"a:b", b"a?b", b"[::1")
    ),
    # sizes of a head
    ("target over 8 KiB", head(LENGTH, first=b"PUT " + FOLDER + b"f" * 8192 + b" HTTP/1.1") + HELLO, (414,)),
    ("field over 8 KiB", head(LENGTH, b"X: " + b"y" * 8192) + HELLO, (431,)),
    ("over 100 fields", head(LENGTH, *[b"X: y"] * 99) + HELLO, (431,)),
    ("head over 32 KiB", head(LENGTH, *[b"X: " + b"y" * 4000] * 9) + HELLO, (431,)),
    # versions
    ("HTTP/0.9", b"PUT " + FOLDER + b"f\r\n\r\n" + HELLO, (400, 505)),
    *(
        (f"version {version!r}", head(LENGTH, first=b"PUT " + FOLDER + b"f " + version) + HELLO, (400, 505))
        for version in (b"HTTP/0.9", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/1.10", b"HTTP/1")
    ),
    ("preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, 505)),
    # Expect
    ("expectation 200-ok", head(b"Expect: 200-ok", LENGTH) + HELLO, (417,)),
    ("two expectations", head(*[b"Expect: 100-continue"] * 2, LENGTH) + HELLO, (417,)),
    # 100-continue that is not to be: the final status alone
    ("asking with a bad name", asking(first=b"PUT " + FOLDER + b"../f HTTP/1.1"), (400,)),
    ("asking for the store's own name", asking(first=b"PUT /files/.lwstwisted/f HTTP/1.1"), (400,)),
    ("asking where nothing is", asking(first=b"PATCH " + FOLDER + b"f HTTP/1.1"), (405,)),
    ("asking with a condition that fails", asking(b'If-Match: "x"'), (412,)),
    ("asking with too much", asking(b"Content-Length: %d" % (MAX_SIZE + 1)), (413,)),
    ("asking with a coded body", asking(b"Content-Encoding: gzip"), (415,)),
    ("asking with a bad digest", asking(b"Repr-Digest: sha-256=:AAAA:"), (400,)),
    ("asking without a form", asking(first=b"POST " + FOLDER + b" HTTP/1.1"), (415,)),
]
"""What is refused: name, bytes up to where it must be known, the statuses of which one is wanted. The connection is
closed behind each."""



@dataclass(frozen=True)
class Served:
    """Requests that are served.

    :ivar script: what is sent; before each further part the client waits for one more answer.
    :ivar statuses: of all answers, but for ``100 Continue``.
    :ivar files: what is in the folder afterwards.
    :ivar said: what the answers contain.
    :ivar methods: see :func:`~tests.test_web_channel.answers`.
    """

    name: str
    script: tuple[bytes, ...]
    statuses: list[int]
    files: dict[str, bytes] = field(default_factory=dict)
    said: bytes = b""
    methods: str = ""


def first_line(method: bytes, name: bytes = b"f", version: bytes = b"HTTP/1.1") -> bytes:
    return b"%b %b%b %b" % (method, FOLDER, name, version)


def digest_of(data: bytes) -> bytes:
    return b"Repr-Digest: sha-256=:" + b64encode(hashlib.sha256(data).digest()) + b":"


FORM = (
    b'--B\r\nContent-Disposition: form-data; name="x"; filename="one"\r\n\r\nhello\r\n'
    b'--B\r\nContent-Disposition: form-data; name="x"; filename="two"\r\n\r\n\r\n--\r\n--B--\r\n'
)
FORM_HEAD = head(
    b"Content-Type: multipart/form-data; boundary=B", b"Content-Length: %d" % len(FORM), first=first_line(b"POST", b"")
)
PUT = head(LENGTH) + HELLO
LAST_GET = head(CLOSE, first=first_line(b"GET"))
CODED = b'5;name="v;a"\r\nhello\r\n002;x\r\n, \r\n5\r\nworld\r\n0;last\r\nX-Sum: 1\r\nY:\r\n\r\n'
FOREIGN_TRAILERS = b"5\r\nhello\r\n0\r\nTransfer-Encoding: gzip\r\nHost: evil\r\nContent-Length: 9\r\n\r\n"
H2C = (b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AAMAAABkAAQAAP__")

SERVED = [
    Served("length", (head(LENGTH, CLOSE) + HELLO,), [201], {"f": HELLO}),
    Served("empty body", (head(b"Content-Length: 0", CLOSE),), [201], {"f": b""}),
    Served("chunked", (head(CHUNKED, CLOSE) + CODED,), [201], {"f": b"hello, world"}),
    Served("trailers that are never merged", (chunked(FOREIGN_TRAILERS) + LAST_GET,), [201, 200], {"f": HELLO}),
    Served("pipelined", (PUT + LAST_GET,), [201, 200], {"f": HELLO}, b"\r\n\r\nhello"),
    Served("replaced", (PUT + b"\r\n" + head(CHUNKED, CLOSE) + CODED,), [201, 204], {"f": b"hello, world"}),
    Served("HEAD", (PUT + head(first=first_line(b"HEAD")) + LAST_GET,), [201, 200, 200], {"f": HELLO}, methods="GHG"),
    Served("DELETE", (PUT + head(first=first_line(b"DELETE")) + LAST_GET,), [201, 204, 404]),
    Served("OPTIONS *", (head(CLOSE, first=b"OPTIONS * HTTP/1.1"),), [200]),
    Served("absolute form", (head(LENGTH, CLOSE, first=b"PUT http://b" + FOLDER + b"f HTTP/1.1") + HELLO,), [201],
           {"f": HELLO}),
    Served("asks and waits", (head(LENGTH, CLOSE, b"Expect: 100-continue"), HELLO), [201], {"f": HELLO}, CONTINUE),
    Served("asks and doesn't wait", (head(LENGTH, CLOSE, b"Expect: 100-continue") + HELLO,), [201], {"f": HELLO}),
    Served("form", (FORM_HEAD + FORM + head(CLOSE, first=first_line(b"GET", b"one")),), [201, 200],
           {"one": HELLO, "two": b"\r\n--"}),
    Served("HTTP/1.0", (head(LENGTH, first=first_line(b"PUT", version=b"HTTP/1.0")) + HELLO + NEXT,), [201],
           {"f": HELLO}),
    Served(
        "conditions",
        (
            head(LENGTH, b"If-None-Match: *") + HELLO
            + head(b"If-None-Match: *", first=first_line(b"GET"))
            + head(b'If-Match: "x"', first=first_line(b"GET"))
            + head(b"Content-Length: 3", CLOSE, b"If-None-Match: *") + b"new",
        ),
        [201, 304, 412, 412],
        {"f": HELLO},
    ),
    Served(
        "digests",
        (
            head(LENGTH, digest_of(HELLO)) + HELLO
            + head(LENGTH, CLOSE, digest_of(b"x"), first=first_line(b"PUT", b"g")) + HELLO,
        ),
        [201, 400],
        {"f": HELLO},
    ),
    Served("h2c", (head(b"Content-Length: %d" % len(NEXT), *H2C) + NEXT + LAST_GET,), [201, 200], {"f": NEXT}),
]  # fmt: skip
"""What is served, on a connection that ends with the last answer."""

WAYS = ("whole", "byte by byte", "cut at random")

APART = 1000
"""Pieces that wait for the one before to be read: all but the middle of what is thousands of bytes long."""


def pieces(script: tuple[bytes, ...], way: str, cuts: random.Random) -> Iterator[tuple[bytes, int]]:
    """What is sent at once, and how many answers must have come before."""
    for needed, part in enumerate(script):
        places = {"whole": set[int](), "byte by byte": set(range(1, len(part)))}.get(way)
        if places is None:
            places = {cuts.randrange(1, len(part)) for _ in range(cuts.randint(1, 12)) if len(part) > 1}
        edges = [0, *sorted(places), len(part)]
        yield from ((part[begin:end], needed) for begin, end in itertools.pairwise(edges))


class Conversation:
    """A client that sends pieces, and reads all the time.

    :ivar said: what the server sent.
    :ivar end: how that ended: "closed" or "reset"; None as long as it has not.
    """

    def __init__(self, connection: socket.socket, todo: Iterator[tuple[bytes, int]]) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self.connection = connection
        self.said = b""
        self.end: str | None = None
        self._todo = deque(todo)

    @property
    def may_send(self) -> bool:
        return bool(self._todo) and self.end is None and self.said.count(b"HTTP/1.") >= self._todo[0][1]

    def send(self) -> None:
        """Send the next piece, which is one segment, or one TLS record."""
        piece, needed = self._todo.popleft()
        try:
            sent = self.connection.send(piece)
        except (BlockingIOError, ssl.SSLWantWriteError):
            sent = 0
        except OSError:
            self._todo.clear()  # the server has closed; what it said is still there to be read
            return
        if sent < len(piece):
            self._todo.appendleft((piece[sent:], needed))

    def read(self) -> None:
        """Read what is there."""
        try:
            while data := self.connection.recv(65536):
                self.said += data
            self.end = "closed"
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except OSError:
            self.end = "reset"
        if self.end:
            self._todo.clear()


def wait_for_a_turn(probe: socket.socket) -> None:
    """Return when a server has read what was sent to it before."""
    for _ in range(2):  # the first answer may come in the middle of the turn in which the server reads it
        probe.sendall(head(first=b"OPTIONS * HTTP/1.1"))
        said = b""
        while b"\r\n\r\n" not in said:
            said += probe.recv(65536)


def converse(conversations: list[Conversation], probe: socket.socket) -> None:
    """Let all of them talk until the server has ended them: one piece of each, and so on.

    The server reads each of the first :data:`APART` pieces alone. Where nothing happens for too long, they are left.

    :param probe: one more connection to the server.
    """
    left = APART
    with selectors.DefaultSelector() as selector:
        for one in conversations:
            selector.register(one.connection, selectors.EVENT_READ, one)
        heard = time.monotonic()
        while selector.get_map() and time.monotonic() - heard < PATIENCE:
            sending = [one for one in conversations if one.may_send]
            for key, _ in selector.select(0 if sending else 0.1):
                key.data.read()
                heard = time.monotonic()
                if key.data.end:
                    selector.unregister(key.fileobj)
                    key.data.connection.close()
            for one in sending:
                if one.may_send:  # it may have been closed meanwhile
                    one.send()
                heard = time.monotonic()
            if sending and left:
                left -= 1
                wait_for_a_turn(probe)


class ThreatCase(SynchronousTestCase):
    """The service, with one listener on TCP and one with TLS."""

    limits: dict[str, float] = {}

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.root = self.folder / "root"
        self.access_log = self.folder / "access.log"
        certificate = ensure_development_certificate(self.folder / "pair.pem")
        self.context = ssl.create_default_context(cafile=certificate)
        # How long bytes take on their way through a test is not what is tested here.
        limits = {"connections-per-address": 0, "head-time": 2 * PATIENCE, "body-rate": 0, "body-bytes": BODY_BYTES}
        limits |= self.limits
        words = [word for name, value in limits.items() for word in ("--limit", f"{name}={value}")]
        words += ["--listen", "tcp:0", "--listen", tls_endpoint(certificate), "--max-size", str(MAX_SIZE)]
        command = twistd("--root", self.root, "--durability", "none", "--access-log", self.access_log, *words)
        self.server = self.enterContext(serving(command, cwd=self.folder))
        self.plain, self.tls = self.server.wait_for_ports(2)

    def connect(self, is_tls: bool = False) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.tls if is_tls else self.plain), PATIENCE)
        self.addCleanup(connection.close)
        if is_tls:
            connection = self.context.wrap_socket(connection, server_hostname="localhost")
            self.addCleanup(connection.close)
        return connection


class FramingTests(ThreatCase):
    """Each case three times at once."""

    def send_all(
        self, scripts: dict[str, dict[str, tuple[bytes, ...]]], is_tls: bool
    ) -> dict[tuple[str, str], Conversation]:
        """Send scripts, by their name and the way they are sent; returns what became of each."""
        self.tags: dict[tuple[str, str], str] = {}
        conversations = {}
        for name, ways in scripts.items():
            for way, script in ways.items():
                tag = self.tags[name, way] = f"{len(self.tags):03}"  # as long as what it stands for
                tagged = tuple([part.replace(b"TAG", tag.encode()) for part in script])
                todo = pieces(tagged, way, random.Random(f"{SEED} {name}"))
                conversations[name, way] = Conversation(self.connect(is_tls), todo)
        opened = self.server.open_beneath(self.root)
        converse(list(conversations.values()), self.connect())
        self.assertEqual(len(conversations), len(scripts) * len(WAYS))
        wait_until(lambda: self.server.open_beneath(self.root) <= opened, "all files of the store were closed")
        self.assertEqual(unfinished_beneath(self.root), [])
        self.assertNotIn("Traceback", self.server.text)
        return conversations

    def files_of(self, name: str, way: str) -> dict[str, bytes]:
        folder = self.root / self.tags[name, way]
        return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}

    def check_refused(self, is_tls: bool) -> None:
        """Each case of :data:`FRAMING`, in each way."""
        self.assertGreaterEqual(len(FRAMING), 45)
        scripts: dict[str, dict[str, tuple[bytes, ...]]] = {
            # Byte by byte, the next request waits for the answer: it must be there before.
            name: {way: (data, NEXT) if way == "byte by byte" else (data + NEXT,) for way in WAYS}
            for name, data, _ in FRAMING
        }
        self.assertEqual(len(scripts), len(FRAMING))
        conversations = self.send_all(scripts, is_tls)
        wrong = []
        for name, _, wanted in FRAMING:
            said = {conversations[name, way].said[:12] for way in WAYS}
            if len(said) > 1:
                wrong.append(f"{name}: {said}")
            for way in WAYS:
                one = conversations[name, way]
                found = answers(one.said, at_end=True)
                is_right = (
                    len(found) == 1
                    and found[0].status in wanted
                    and found[0].closes
                    and found[0].is_whole
                    and CONTINUE not in one.said
                    # What was sent at once is read before the end; more of it that comes later may meet a reset.
                    and one.end in (("closed",) if way == "whole" else ("closed", "reset"))
                )
                if not is_right:
                    wrong.append(f"{name}, {way}: wanted {wanted}, and got {one.said!r} and then {one.end}")
                if files := self.files_of(name, way):
                    wrong.append(f"{name}, {way}: left {sorted(files)}")
        self.assertEqual(wrong, [], f"with LWSTWISTED_SEED={SEED}")
        self.assertEqual(visible_beneath(self.root), [])

    def check_served(self, is_tls: bool) -> None:
        """Each case of :data:`SERVED`, in each way."""
        scripts = {case.name: dict.fromkeys(WAYS, case.script) for case in SERVED}
        self.assertEqual(len(scripts), len(SERVED))
        conversations = self.send_all(scripts, is_tls)
        wrong = []
        for case in SERVED:
            for way in WAYS:
                one = conversations[case.name, way]
                found = answers(one.said, case.methods, at_end=True)
                statuses = [answer.status for answer in found]
                is_right = (
                    statuses == case.statuses
                    and all(answer.is_whole for answer in found)
                    and case.said in one.said
                    and one.said.count(CONTINUE) <= ("asks" in case.name)
                    and one.end in (("closed",) if way == "whole" else ("closed", "reset"))
                )
                if not is_right:
                    wrong.append(f"{case.name}, {way}: wanted {case.statuses}, and got {one.said!r} and then {one.end}")
                tag = self.tags[case.name, way].encode()
                wanted = {name: data.replace(b"TAG", tag) for name, data in case.files.items()}
                if (files := self.files_of(case.name, way)) != wanted:
                    wrong.append(f"{case.name}, {way}: left {files}")
        self.assertEqual(wrong, [], f"with LWSTWISTED_SEED={SEED}")

    @pytest.mark.slow
    def test_refused(self) -> None:
        """What two parsers could read differently is refused, answered and closed, and nothing of it is stored."""
        self.check_refused(is_tls=False)

    @pytest.mark.slow
    def test_refused_by_tls(self) -> None:
        """Nor do records change an answer."""
        self.check_refused(is_tls=True)

    @pytest.mark.slow
    def test_served(self) -> None:
        """What is a request is served, however slowly it comes."""
        self.check_served(is_tls=False)

    @pytest.mark.slow
    def test_served_by_tls(self) -> None:
        """Nor do records change what is stored."""
        self.check_served(is_tls=True)


class ExhaustionTests(ThreatCase):
    """Clients that want to use the service up."""

    limits = {"handshake-time": 1, "linger-time": 0.1}

    @pytest.mark.slow
    def test_stalled_handshakes(self) -> None:
        """Who doesn't agree on TLS in time is cut, whatever it says, and is counted; who has agreed may wait."""
        polite = self.connect(is_tls=True)
        hello = ssl.MemoryBIO()
        with contextlib.suppress(ssl.SSLWantReadError):
            self.context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost").do_handshake()
        whole = hello.read()
        stalled = {"nothing": b"", "a part of a ClientHello": whole[:50], "a ClientHello": whole}
        others = {"plain text": LAST_GET, "a request line": b"GET / HTTP/1.1\r\n", "garbage": bytes(20_000)}
        before, lines = self.server.descriptors(), len(self.server.log)
        clients = []
        for said in [*stalled.values(), *others.values()] * 20:
            clients.append(socket.create_connection(("127.0.0.1", self.tls), PATIENCE))
            self.addCleanup(clients[-1].close)
            clients[-1].sendall(said)
        for client in clients:
            try:
                while client.recv(65536):
                    pass
            except ConnectionResetError:
                pass
        wait_until(lambda: self.server.descriptors() <= before, "all of their descriptors were given back")

        def counted() -> list[int]:
            return [int(count) for count in re.findall(r"(\d+) handshake_timeout", self.server.text)]

        wait_until(lambda: sum(counted()) >= 20 * len(stalled), "those who stalled were counted")
        self.assertEqual(sum(counted()), 20 * len(stalled))
        self.assertEqual(len(self.server.log) - lines, len(counted()))  # and nothing else was logged
        polite.sendall(head(CLOSE, first=b"OPTIONS * HTTP/1.1"))
        self.assertEqual([answer.status for answer in answers(polite.recv(65536))], [200])

    @pytest.mark.slow
    def test_flood_of_bad_requests(self) -> None:
        """Thousands of bad requests, each answered: somebody else is served all the time, and the log stays small."""
        took: list[float] = []
        statuses: set[int] = set()
        flooding = Event()
        flooding.set()

        def use_the_service() -> None:
            client = http.client.HTTPConnection("127.0.0.1", self.plain, timeout=PATIENCE)
            with contextlib.closing(client):
                while flooding.is_set():
                    begun = time.monotonic()
                    client.request("PUT", "/files/good", b"good")
                    response = client.getresponse()
                    response.read()
                    took.append(time.monotonic() - begun)
                    statuses.add(response.status)

        user = Thread(target=use_the_service)
        user.start()
        bad = [(name, data.replace(b"TAG", b"bad"), wanted) for name, data, wanted in FRAMING]
        wrong, sent = [], 3000
        lines, begun = len(self.server.log), time.monotonic()
        try:
            for number in range(sent):
                name, data, wanted = bad[number % len(bad)]
                with socket.create_connection(("127.0.0.1", self.plain), PATIENCE) as client:
                    client.sendall(data)
                    said = client.recv(65536)
                if not said.startswith(tuple([b"HTTP/1.1 %d " % status for status in wanted])):
                    wrong.append((name, said))
        finally:
            flooding.clear()
            user.join(2 * PATIENCE)
        seconds = time.monotonic() - begun
        self.assertEqual(wrong, [])
        self.assertEqual(statuses - {201, 204}, set[int]())
        self.assertGreater(len(took), 1)
        self.assertEqual(visible_beneath(self.root), ["good"])
        # Each is in one of the logs: those that were no request, as a number.
        wait_until(
            lambda: tallied(self.server.text) + len(self.access_log.read_bytes().splitlines()) == sent + len(took),
            "all were counted or logged",
        )
        # A line for each second, the begun one and the last one.
        self.assertLessEqual(len(self.server.log) - lines, seconds + 2)
        p99 = statistics.quantiles(took, n=100)[-1]
        print(f"{sent / seconds:.0f} bad requests a second; {len(took)} good ones, p99 {1000 * p99:.1f} ms")


def tallied(log: str) -> int:
    """How many refusals outside of requests a log tells of."""
    sums = re.findall(r"outside of requests: (.*); the last one", log)
    return sum(int(count) for line in sums for count in re.findall(r"(\d+) \w+", line))


def proofs(table: str) -> dict[str, list[str]]:
    """The tests that a table names, by its rows: a line begins with the row, or belongs to the one above."""
    found: dict[str, list[str]] = {}
    row = ""
    for begin, test in re.findall(r"(?m)^  (\S.*?)? +(test_\w+\.\w+\.test_\w+)$", table):
        row = begin or row
        found.setdefault(row, []).append(test)
    return found


def is_there(test: str) -> bool:
    """Whether a test is there, as ``module.Class.method``."""
    module, name = test.split(".", 1)
    try:
        return callable(attrgetter(name)(importlib.import_module(f"tests.{module}")))
    except (ImportError, AttributeError):
        return False


class TableTests(SynchronousTestCase):
    """The table at the begin of this module."""

    def test_proofs_exist(self) -> None:
        """Each test that it names is there."""
        found = proofs(__doc__ or "")
        self.assertEqual(len(found), 11)
        self.assertEqual([test for tests in found.values() for test in tests if not is_there(test)], [])
