"""What conformance suites for HTTP/1.1 servers (h1spec and its like) look at, asked of the real service.

Framing is tested without a network in ``test_web_wire.py``; here are the cases that its table doesn't have, and those
that only a connection can show: the server waits for the rest of a request, however much of it is there, it says
when an answer ends, and it closes what it should.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.certificate import ensure_development_certificate
from tests.servers import PATIENCE, serving, tls_endpoint, twistd

HOST = b"Host: localhost\r\n"
GET = b"GET /files/ HTTP/1.1\r\n" + HOST
LAST = b"Connection: close\r\n"
PUT = b"PUT /files/f HTTP/1.1\r\n" + HOST
CHUNKED = PUT + b"Transfer-Encoding: chunked\r\n\r\n"
NEXT = b"PUT /files/smuggled HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\n\r\nx"
"""Follows each refused request; nobody may see it."""

WHOLE = PUT + b"hoSt2:\tlocalhost\r\nX-Empty:\r\nContent-Length: 5\r\n\r\nhello"
"""A request that is cut at every byte."""

NO_TOKEN = b'"(),/;<=>?@[\\]{}'
"""Delimiters (RFC 9110 section 5.6.2) without the colon, which ends a field name."""

REFUSED = {
    "no version, but a blank": b"GET /files/ \r\n" + HOST + b"\r\n",
    "no target": b"GET HTTP/1.1\r\n" + HOST + b"\r\n",
    "nothing but a version": b"HTTP/1.1\r\n" + HOST + b"\r\n",
    "a response": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "version 9.9": b"GET /files/ HTTP/9.9\r\n" + HOST + b"\r\n",
    "version of three numbers": b"GET /files/ HTTP/1.1.1\r\n" + HOST + b"\r\n",
    "words before the method": b"some words" + GET + b"\r\n",
    "a tab behind the method": b"GET\t/files/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "a tab before the version": b"GET /files/\tHTTP/1.1\r\n" + HOST + b"\r\n",
    "blanks before the method": b"  " + GET + b"\r\n",
    "a CR at the begin of a line": GET + b"\rX: y\r\n\r\n",
    "a bell in a value": GET + b"X: y\x07\r\n\r\n",
    "a blank in a field name": GET + b"X Y: z\r\n\r\n",
    "a blank before a field name": b"GET /files/ HTTP/1.1\r\n Host: localhost\r\n\r\n",
    "length, and no host": b"GET /files/ HTTP/1.1\r\nContent-Length: 5\r\n\r\n",
    "a long negative length": GET + b"Content-Length: -123456789012345678901234567890\r\n\r\n",
    "length in letters": GET + b"Content-Length: abc\r\n\r\n",
    "length and chunks, in any case of letters": PUT
    + b"content-LENGTH: 5\r\nTransfer-ENCODING: chunked\r\n\r\nc\r\nhello, world\r\n0\r\n\r\n",
    "chunk size in letters that are no digits": CHUNKED + b"z\r\nhello\r\n0\r\n\r\n",
    "chunk data without an end of line": CHUNKED + b"5\r\nhello0\r\n\r\n",
    **{f"{bytes([c])!r} in a field name": GET + b"X%cY: z\r\n\r\n" % c for c in NO_TOKEN},
}

ANSWER = re.compile(rb"HTTP/1\.[01] (\d{3}) [^\r\n]*\r\n((?:[^\r\n]+\r\n)*)\r\n")
LENGTH = re.compile(rb"(?mi)^content-length: (\d+)\r$")


def answers(data: bytes, without_content: bool = False) -> list[int]:
    """The statuses of all answers in what a server sent.

    :param without_content: as the answers to HEAD.
    :raises AssertionError: if one of them doesn't end where it says, or says nothing of its end.
    """
    found = []
    while data:
        head = ANSWER.match(data)
        assert head is not None, data
        status = int(head[1])
        found.append(status)
        length = LENGTH.search(head[2])
        bare = without_content or status < 200 or status in (204, 304)
        assert bare or length is not None, data
        end = head.end() + (0 if bare or length is None else int(length[1]))
        assert end <= len(data), data
        data = data[end:]
    return found


class H1SpecTests(SynchronousTestCase):
    """The service on TCP and TLS."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.root = self.folder / "root"
        certificate = ensure_development_certificate(self.folder / "pair.pem")
        self.context = ssl.create_default_context(cafile=certificate)
        listen = ["--listen", "tcp:0", "--listen", tls_endpoint(certificate)]
        # A connection that was refused is closed soon, though its client doesn't close it.
        command = twistd("--root", self.root, *listen, "--limit", "linger-time=0.01")
        self.server = self.enterContext(serving(command, cwd=self.folder))
        self.plain, self.tls = self.server.wait_for_ports(2)

    @contextlib.contextmanager
    def connected(self, is_tls: bool = False) -> Iterator[socket.socket]:
        address = ("127.0.0.1", self.tls if is_tls else self.plain)
        with socket.create_connection(address, PATIENCE) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if is_tls:
                with self.context.wrap_socket(client, server_hostname="localhost") as encrypted:
                    yield encrypted
            else:
                yield client

    def ask(self, *pieces: bytes, is_tls: bool = False) -> bytes:
        """All that the server says until it closes the connection."""
        with self.connected(is_tls) as client:
            for piece in pieces:
                client.sendall(piece)
            return b"".join(iter(lambda: client.recv(65536), b""))

    def statuses(self, *pieces: bytes) -> list[int]:
        return answers(self.ask(*pieces))

    # A request that isn't there yet

    def check_waiting(self, is_tls: bool) -> None:
        with contextlib.ExitStack() as stack:
            clients = {cut: stack.enter_context(self.connected(is_tls)) for cut in range(1, len(WHOLE))}
            for cut, client in clients.items():
                client.sendall(WHOLE[:cut])
            # What was readable before this request is read before it or together with it.
            with self.connected(is_tls) as probe:
                probe.sendall(GET + LAST + b"\r\n")
                self.assertEqual(answers(b"".join(iter(lambda: probe.recv(65536), b""))), [200])
            for cut, client in clients.items():
                with self.subTest(WHOLE[:cut]):
                    client.setblocking(False)
                    # Nothing was said, and nothing was closed, which would read as b"".
                    with self.assertRaises((BlockingIOError, ssl.SSLWantReadError)):
                        client.recv(1)
                    client.settimeout(PATIENCE)
            for cut, client in clients.items():
                with self.subTest(WHOLE[:cut]):
                    client.sendall(WHOLE[cut:])
                    (status,) = answers(client.recv(65536))
                    self.assertIn(status, (201, 204))
        self.assertEqual((self.root / "f").read_bytes(), b"hello")

    def test_waits_for_the_rest(self) -> None:
        """A request that stops after any of its bytes is waited for, and served when the rest comes."""
        self.check_waiting(is_tls=False)

    def test_waits_for_the_rest_by_tls(self) -> None:
        """The same, in two records."""
        self.check_waiting(is_tls=True)

    # What is no request

    def test_refused(self) -> None:
        """A request that is malformed is refused with one sentence, and nothing behind it is a request."""
        for name, data in REFUSED.items():
            with self.subTest(name):
                said = self.ask(data + NEXT)
                (status,) = answers(said)
                self.assertIn(status, (505,) if "9.9" in name else (400,), name)
                self.assertIn(b"\r\nConnection: close\r\n", said)
                self.assertRegex(said, rb"\r\n\r\n[A-Z][^\n]+\.\n\Z")
        self.assertFalse((self.root / "smuggled").exists())
        self.assertEqual(self.statuses(NEXT + GET + LAST + b"\r\n"), [201, 200])  # it would have been served

    def test_refused_by_tls(self) -> None:
        """TLS changes no answer."""
        said = self.ask(REFUSED["a response"] + NEXT, is_tls=True)
        self.assertEqual(answers(said), [400])
        self.assertFalse((self.root / "smuggled").exists())

    # What is one

    def test_fields_of_any_form(self) -> None:
        """Field names have any case, and values may be empty or stand behind a tab."""
        head = b"GET /files/ HTTP/1.1\r\nhoST:\tlocalhost\r\nempty:\r\nX-Empty: \r\nX!#$%&'*+-.^_`|~1: y\t \r\n"
        self.assertEqual(self.statuses(head + LAST + b"\r\n"), [200])

    def test_targets_of_any_form(self) -> None:
        """A proxy's absolute form means the same file, ``OPTIONS *`` the server, and a tunnel is not to be had."""
        absolute = b"GET http://localhost/files/ HTTP/1.1\r\n" + HOST + LAST + b"\r\n"
        self.assertEqual(self.statuses(absolute), [200])
        self.assertEqual(self.statuses(b"OPTIONS * HTTP/1.1\r\n" + HOST + LAST + b"\r\n"), [200])
        (status,) = self.statuses(b"CONNECT example.com:443 HTTP/1.1\r\n" + HOST + LAST + b"\r\n")
        self.assertIn(status, range(404, 502))

    def test_bodies(self) -> None:
        """A body of known length and one in chunks are the same file."""
        self.assertEqual(self.statuses(PUT + LAST + b"Content-Length: 12\r\n\r\nhello, world"), [201])
        self.assertEqual((self.root / "f").read_bytes(), b"hello, world")
        head = PUT + LAST + b"Transfer-Encoding: chunked\r\n\r\n"
        self.assertEqual(self.statuses(head + b"C\r\nHello, world\r\n0\r\n\r\n"), [204])
        self.assertEqual((self.root / "f").read_bytes(), b"Hello, world")

    def test_expectation_without_a_body(self) -> None:
        """Who has nothing to send gets the answer itself, and nothing before it."""
        self.assertEqual(self.statuses(GET + LAST + b"Expect: 100-continue\r\n\r\n"), [200])

    def test_expectation(self) -> None:
        """Who asks first is told to go on, and has an answer behind that."""
        with self.connected() as client:
            client.sendall(PUT + LAST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
            self.assertEqual(answers(client.recv(65536)), [100])
            client.sendall(b"hello")
            self.assertEqual(answers(b"".join(iter(lambda: client.recv(65536), b""))), [201])

    def test_head_has_no_content(self) -> None:
        """HEAD tells the length that GET sends, and sends nothing of it, for a folder, a file and an error."""
        (self.root / "file").write_bytes(b"contents")
        for path in (b"/files/", b"/files/file", b"/files/none"):
            rest = b" %b HTTP/1.1\r\n" % path + HOST + LAST + b"\r\n"
            said = self.ask(b"HEAD" + rest)
            self.assertEqual(answers(said, without_content=True), self.statuses(b"GET" + rest))
            told, sent = (LENGTH.search(data) for data in (said, self.ask(b"GET" + rest)))
            assert told is not None and sent is not None
            self.assertEqual(told[1], sent[1])

    # The connection

    def test_kept(self) -> None:
        """Requests on one connection are answered in their order, whether they wait for each other or not."""
        self.assertEqual(self.statuses(GET + b"\r\n", b"\r\n" + GET + b"\r\n", GET + LAST + b"\r\n"), [200] * 3)
        refused = b"PATCH /files/ HTTP/1.1\r\n" + HOST + b"\r\n"
        self.assertEqual(self.statuses(refused + GET + b"\r\n" + refused + GET + LAST + b"\r\n"), [405, 200, 405, 200])

    def test_closed(self) -> None:
        """It is closed behind the request that says so, and behind one of HTTP/1.0 that doesn't say otherwise."""
        self.assertEqual(self.statuses(GET + LAST + b"\r\n" + NEXT), [200])
        self.assertEqual(self.statuses(GET.replace(b"1.1", b"1.0") + b"\r\n" + NEXT), [200])
        self.assertFalse((self.root / "smuggled").exists())
