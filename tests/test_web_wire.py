"""HTTP/1.1 framing: what is a request, what is refused and how soon, however the bytes are cut.

The rows are those of the threat model's framing table; here without I/O, in ``test_web_channel.py`` over a
connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import h11
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted import errors
from lwstwisted.errors import Refusal, Refused
from lwstwisted.web.limits import DEFAULT_LIMITS, MAX_LENGTH, Limits
from lwstwisted.web.wire import (
    End,
    Head,
    Signal,
    State,
    Wire,
)

steady = settings(deadline=None, derandomize=True, database=None, max_examples=60)
"""The same examples in each run, and as many as a second allows."""

Summary = list[Any]


def cut(data: bytes, places: Iterable[int]) -> Iterator[bytes]:
    """Cut ``data`` at ``places``."""
    last = 0
    for place in [*sorted({p for p in places if 0 < p < len(data)}), len(data)]:
        yield data[last:place]
        last = place


def summary(pieces: Iterable[bytes], max_length: int = MAX_LENGTH, until_close: bool = False) -> Summary:
    """What a wire says to ``pieces``: heads, whole bodies, ends, and how it ended.

    Each piece is lent in memory that is overwritten afterwards, as a transport does. Views of the body are
    overwritten with it, so they are copied at once, as a consumer must.
    """
    wire = Wire(Limits(body_bytes=max_length))
    found: Summary = []
    memory = bytearray()
    try:
        for piece in pieces:
            memory = bytearray(piece)
            wire.receive(memoryview(memory))
            while (event := wire.next_event()) is not Signal.NEED_DATA:
                if event is Signal.PAUSED:
                    if until_close and not [e for e in found if isinstance(e, Head)][-1].keep_alive:
                        return found
                    wire.next_request()
                elif isinstance(event, memoryview):
                    if found and isinstance(found[-1], bytes):
                        found[-1] += bytes(event)
                    else:
                        found.append(bytes(event))
                else:
                    found.append(event)
            wire.keep()
            memory[:] = b"\xff" * len(memory)
    except Refused as refused:
        found.append(refused.refusal)
    return found


def whole(data: bytes, max_length: int = MAX_LENGTH) -> Summary:
    return summary([data], max_length)


def bytewise(data: bytes, max_length: int = MAX_LENGTH) -> Summary:
    return summary((data[i : i + 1] for i in range(len(data))), max_length)


def head(*lines: bytes, first: bytes = b"PUT /f HTTP/1.1", host: bytes | None = b"Host: a") -> bytes:
    return b"\r\n".join([first, *([host] if host is not None else []), *lines, b"", b""])


def chunked(*rest: bytes) -> bytes:
    return head(b"Transfer-Encoding: chunked") + b"".join(rest)


@dataclass(frozen=True)
class Row:
    """One line of the table: what is sent, and which refusals are an answer to it."""

    name: str
    data: bytes
    wanted: tuple[Refusal, ...]


def row(name: str, data: bytes, *wanted: Refusal) -> Row:
    return Row(name, data, wanted)


NEXT = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
"""Follows each refused request; nobody may see it."""

LONG = b"x" * DEFAULT_LIMITS.line_bytes

HEAD_ROWS = [
    row("length and coding", head(b"Content-Length: 5", b"Transfer-Encoding: chunked"), errors.LENGTH_AND_CODING),
    row("coding and length", head(b"Transfer-Encoding: chunked", b"Content-Length: 5"), errors.LENGTH_AND_CODING),
    *(
        row(f"length {value!r}", head(b"Content-Length:" + value), errors.BAD_LENGTH)
        for value in (b" 5, 5", b" +5", b" -5", b" 0x5", b" 1_0", b"", b" ", b" 5 5", b" 5;", b" \xb2", b" five")
    ),
    row("two equal lengths", head(b"Content-Length: 5", b"Content-Length: 5"), errors.BAD_LENGTH),
    row("two lengths", head(b"Content-Length: 5", b"content-length: 6"), errors.BAD_LENGTH),
    row("blank before the colon", head(b"Content-Length : 5"), errors.BAD_HEADER),
    row("blank before the colon of a coding", head(b"Transfer-Encoding : chunked"), errors.BAD_HEADER),
    row("length 2^63", head(b"Content-Length: %d" % 2**63), errors.BODY_TOO_LARGE),
    row("length 2^64 + 5", head(b"Content-Length: %d" % (2**64 + 5)), errors.BODY_TOO_LARGE),
    row("length of 26 digits", head(b"Content-Length: " + b"9" * 26), errors.BODY_TOO_LARGE),
    row("length of 5,000 digits", head(b"Content-Length: " + b"9" * 5000), errors.BODY_TOO_LARGE, errors.BAD_LENGTH),
    row("two codings", head(*[b"Transfer-Encoding: chunked"] * 2), errors.BAD_CODING),
    *(
        row(f"coding {value!r}", head(b"Transfer-Encoding: " + value), errors.BAD_CODING)
        for value in (b"chunked, chunked", b"xchunked", b"gzip, chunked", b"chunked, gzip", b"identity", b"", b"gzip")
    ),
    row("coding with a vertical tab", head(b"Transfer-Encoding: \x0bchunked"), errors.BAD_BYTES),
    row("coding in HTTP/1.0", head(b"Transfer-Encoding: chunked", first=b"PUT /f HTTP/1.0"), errors.BAD_CODING),
    row("folded line", head(b"X: a", b" b"), errors.BAD_BYTES),
    row("folded line with a tab", head(b"X: a", b"\tb"), errors.BAD_BYTES),
    row("folded coding", head(b"Transfer-Encoding:", b" chunked"), errors.BAD_BYTES),
    row("folded first line", b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", errors.BAD_BYTES),
    row("bare LF everywhere", b"GET / HTTP/1.1\nHost: a\n\n", errors.BAD_BYTES),
    row("bare LF in the request line", b"GET / HTTP/1.1\nHost: a\r\n\r\n", errors.BAD_BYTES),
    row("bare LF after a field", b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n", errors.BAD_BYTES),
    row("bare LF as blank line", b"GET / HTTP/1.1\r\nHost: a\r\n\n", errors.BAD_BYTES),
    *(
        row(f"{bad!r} in a value", head(b"X: a" + bad + b"b"), errors.BAD_BYTES)
        for bad in (b"\r", b"\0", b"\x01", b"\x0b", b"\x0c", b"\x1b", b"\x7f")
    ),
    row("NUL in a name", head(b"X\0: a"), errors.BAD_BYTES),
    row("no host", head(host=None), errors.BAD_HOST),
    row("two hosts", head(b"Host: a"), errors.BAD_HOST),
    *(
        row(f"host {value!r}", head(host=b"Host: " + value), errors.BAD_HOST)
        for value in (b"a b", b"a/b", b"a@b", b"a:b", b"a:1:2", b"a#", b"a?b", b"[::1", b"<a>", b"a\\b")
    ),
    row("two hosts in HTTP/1.0", head(b"Host: b", first=b"GET / HTTP/1.0"), errors.BAD_HOST),
    row("long target", head(first=b"GET /" + LONG + b" HTTP/1.1"), errors.TARGET_TOO_LONG),
    row("long method and target", head(first=b"UNSUBSCRIBE /" + LONG[1:] + b" HTTP/1.1"), errors.TARGET_TOO_LONG),
    row("long field", head(b"X: " + LONG), errors.HEAD_TOO_LARGE),
    row("too many fields", head(*[b"X: y"] * DEFAULT_LIMITS.header_lines), errors.HEAD_TOO_LARGE),
    row("long head", head(*[b"X: " + b"y" * 4000] * 9), errors.HEAD_TOO_LARGE),
    row("HTTP/0.9 without a version", b"GET /\r\n\r\n", errors.BAD_REQUEST_LINE),
    *(
        row(f"version {version!r}", b"GET / " + version + b"\r\nHost: a\r\n\r\n", *wanted)
        for version, *wanted in (
            (b"HTTP/0.9", errors.BAD_VERSION),
            (b"HTTP/1.2", errors.BAD_VERSION),
            (b"HTTP/2.0", errors.BAD_VERSION),
            (b"HTTP/1.10", errors.BAD_REQUEST_LINE),
            (b"HTTP/1", errors.BAD_REQUEST_LINE),
            (b"http/1.1", errors.BAD_REQUEST_LINE),
            (b"HTTP/1.1 ", errors.BAD_REQUEST_LINE),
            (b"ICE/1.0", errors.BAD_REQUEST_LINE),
        )
    ),
    row("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", errors.BAD_VERSION),
    row("two blanks", b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", errors.BAD_REQUEST_LINE),
    row("blank in the target", b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", errors.BAD_REQUEST_LINE),
    row("target that is none", b"GET foo HTTP/1.1\r\nHost: a\r\n\r\n", errors.BAD_HEADER),
    row("unknown method", b"FROB / HTTP/1.1\r\nHost: a\r\n\r\n", errors.UNKNOWN_METHOD),
    row("method in small letters", b"get / HTTP/1.1\r\nHost: a\r\n\r\n", errors.UNKNOWN_METHOD),
    row("field without a colon", head(b"X"), errors.BAD_HEADER),
    row("field without a name", head(b": x"), errors.BAD_HEADER),
    row("name that is no token", head(b"X\x80: y"), errors.BAD_HEADER),
    row("two blank lines first", b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", errors.BAD_REQUEST_LINE),
    row("other expectation", head(b"Expect: 200-ok", b"Content-Length: 5"), errors.UNKNOWN_EXPECTATION),
    row("two expectations", head(*[b"Expect: 100-continue"] * 2), errors.UNKNOWN_EXPECTATION),
]

TRAILER = b"X: " + b"y" * 1000 + b"\r\n"
BODY_ROWS = [
    *(
        row(f"chunk size {size!r}", chunked(size + b"\r\nhello\r\n0\r\n\r\n"), errors.BAD_CHUNK)
        for size in (b"0x5", b"5_", b"+5", b"-5", b"", b" 5", b"5 ", b"0" * 16 + b"5", b"5\t", b"five", b"5,")
    ),
    row("chunk size of 16 digits", chunked(b"f" * 16 + b"\r\n"), errors.BODY_TOO_LARGE, errors.BAD_CHUNK),
    row("chunk size 2^63", chunked(b"%x\r\n" % 2**63), errors.BODY_TOO_LARGE),
    row("chunk size with bare LF", chunked(b"5\nhello\r\n0\r\n\r\n"), errors.BAD_CHUNK),
    row("extension with bare CR", chunked(b"5;a\rb\r\nhello\r\n0\r\n\r\n"), errors.BAD_CHUNK),
    row("extension with bare LF", chunked(b"5;a\nhello\r\n0\r\n\r\n"), errors.BAD_CHUNK),
    row("extension with NUL", chunked(b"5;\0\r\nhello\r\n0\r\n\r\n"), errors.BAD_CHUNK),
    row("long extension", chunked(b"5;" + b"x" * DEFAULT_LIMITS.chunk_extension_bytes + b"\r\n"), errors.BAD_CHUNK),
    row("extensions that add up", chunked(*[b"1;" + b"x" * 1000 + b"\r\na\r\n"] * 5), errors.BAD_CHUNK),
    row("data not ended by CRLF", chunked(b"5\r\nhelloXX0\r\n\r\n"), errors.BAD_CHUNK),
    row("data ended by LF", chunked(b"5\r\nhello\n0\r\n\r\n"), errors.BAD_CHUNK),
    row("data longer than said", chunked(b"4\r\nhello\r\n0\r\n\r\n"), errors.BAD_CHUNK),
    row("many trailers", chunked(b"0\r\n", *[TRAILER] * 9), errors.TRAILERS_TOO_LARGE),
    row("very many trailers", chunked(b"0\r\n", *[b"a:\r\n"] * 3000), errors.TRAILERS_TOO_LARGE),
    row("long trailer", chunked(b"0\r\nX: ", b"y" * DEFAULT_LIMITS.trailer_bytes), errors.TRAILERS_TOO_LARGE),
    row("folded trailer", chunked(b"0\r\nX: a\r\n b\r\n\r\n"), errors.BAD_CHUNK),
    row("trailer with bare LF", chunked(b"0\r\nX: a\n\r\n"), errors.BAD_CHUNK),
    row("trailer that is none", chunked(b"0\r\nGET / HTTP/1.1\r\n\r\n"), errors.BAD_CHUNK),
    row("trailer with a blank before the colon", chunked(b"0\r\nX : a\r\n\r\n"), errors.BAD_CHUNK),
]

VALID = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /a?b=c HTTP/1.1\r\nHost: a:80\r\nConnection: keep-alive, Upgrade\r\nUpgrade: h2c\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost:\r\n\r\n",
    b"GET http://other/x HTTP/1.1\r\nHost: [::1]:8443\r\n\r\n",
    b"PUT /f HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhello",
    b"PUT /f HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    b"PUT /f HTTP/1.1\r\nhOST: a\r\nTransfer-Encoding: Chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"PUT /f HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'5;name="v;a"\r\nhello\r\n00A\r\n, world...\r\n0;last\r\nX-Sum: 1\r\nY:\r\n\r\n',
    b"POST / HTTP/1.1\r\nHost: a\r\nX-Empty:\r\nX-Bytes: \x80\xff\tz\r\nConnection: close\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
]


class FramingTableTests(SynchronousTestCase):
    """Each row of the framing table, with the wanted refusal."""

    def check(self, rows: list[Row]) -> None:
        for case in rows:
            with self.subTest(case.name):
                found = whole(case.data + NEXT)
                self.assertIn(found[-1], case.wanted, case.name)
                self.assertFalse([e for e in found if isinstance(e, Head) and e.target == b"/smuggled"], case.name)

    def test_heads(self) -> None:
        """A head that two parsers could read differently is refused, and nothing behind it is a request."""
        self.check(HEAD_ROWS)
        for case in HEAD_ROWS:
            self.assertEqual(len(whole(case.data + NEXT)), 1, case.name)

    def test_bodies(self) -> None:
        """A chunked body that is malformed is refused where it is, and nothing behind it is a request."""
        self.check(BODY_ROWS)

    def test_byte_by_byte(self) -> None:
        """A slow network changes no answer."""
        for case in HEAD_ROWS + BODY_ROWS:
            with self.subTest(case.name):
                self.assertEqual(bytewise(case.data + NEXT), whole(case.data + NEXT), case.name)

    @steady
    @given(st.sampled_from(HEAD_ROWS + BODY_ROWS), st.lists(st.integers(1, 400), max_size=8))
    def test_cut_at_random(self, case: Row, places: list[int]) -> None:
        """Nor does the way the bytes are cut into packets."""
        self.assertEqual(summary(cut(case.data + NEXT, places)), whole(case.data + NEXT))

    def test_closed_for_good(self) -> None:
        """After a refusal nothing is parsed any more, whatever comes."""
        for case in HEAD_ROWS + BODY_ROWS:
            wire = Wire()
            wire.receive(case.data)
            with self.assertRaises(Refused):
                while not isinstance(wire.next_event(), Signal):
                    pass
            wire.receive(NEXT)
            self.assertIs(wire.state, State.CLOSED)
            self.assertIs(wire.next_event(), Signal.PAUSED)

    def test_length_above_the_maximum(self) -> None:
        """A body that is announced larger than allowed is refused before it comes; at the limit it is not."""
        self.assertEqual(whole(head(b"Content-Length: 11"), 10), [errors.BODY_TOO_LARGE])
        self.assertEqual(whole(head(b"Content-Length: 10") + b"0123456789", 10)[1], b"0123456789")
        self.assertEqual(whole(chunked(b"b\r\n"), 10)[1:], [errors.BODY_TOO_LARGE])
        self.assertEqual(whole(head(b"Content-Length: %d" % MAX_LENGTH))[0].length, MAX_LENGTH)

    def test_trailers_are_never_merged(self) -> None:
        """A length, a coding or a host in a trailer changes nothing about any request."""
        data = chunked(b"1\r\na\r\n0\r\nContent-Length: 9\r\nTransfer-Encoding: gzip\r\nHost: evil\r\n\r\n")
        first, body, end, second, last = whole(data + NEXT)
        self.assertEqual((first.headers, body), ([(b"Host", b"a"), (b"Transfer-Encoding", b"chunked")], b"a"))
        self.assertEqual([name for name, _ in end.trailers], [b"Content-Length", b"Transfer-Encoding", b"Host"])
        self.assertEqual((second.headers, second.length, last), ([(b"Host", b"a")], 0, End([])))

    def test_trailers_cost_little(self) -> None:
        """8 KiB of the shortest trailers are taken or refused by a count, not by adding up the list each time."""
        lines = DEFAULT_LIMITS.trailer_bytes // 4
        self.assertEqual(len(whole(chunked(b"0\r\n", *[b"a:\r\n"] * lines, b"\r\n"))[-1].trailers), lines)
        refused = whole(chunked(b"0\r\n", *[b"a:\r\n"] * (lines + 1), b"\r\n"))
        self.assertEqual(refused[-1], errors.TRAILERS_TOO_LARGE)

    def test_upgrade_is_ignored(self) -> None:
        """``Upgrade: h2c`` with a body: the body is the body, and what follows is the next request."""
        data = head(b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: %d" % len(NEXT))
        found = whole(data + NEXT + NEXT)
        self.assertEqual([type(e) for e in found], [Head, bytes, End, Head, End])
        self.assertEqual(found[1], NEXT)


class EarlyRefusalTests(SynchronousTestCase):
    """What will be refused is refused as soon as that is known; nobody waits for the rest."""

    def consumed(self, data: bytes) -> tuple[int, Refusal]:
        wire = Wire()
        for count in range(1, len(data) + 1):
            wire.receive(data[count - 1 : count])
            try:
                wire.next_event()
            except Refused as refused:
                return count, refused.refusal
        raise AssertionError("was not refused")

    def test_bare_lf_at_once(self) -> None:
        """A client that ends lines with a bare LF hears so at the first one, instead of hanging."""
        line = b"GET / HTTP/1.1\n"
        self.assertEqual(self.consumed(line), (len(line), errors.BAD_BYTES))

    def test_bare_cr_at_once(self) -> None:
        """A CR is judged when the next byte is there."""
        line = b"GET /\rX"
        self.assertEqual(self.consumed(line), (len(line), errors.BAD_BYTES))

    def test_fold_at_once(self) -> None:
        """A folded line is seen at its blank."""
        line = b"GET / HTTP/1.1\r\nA: b\r\n "
        self.assertEqual(self.consumed(line), (len(line), errors.BAD_BYTES))

    def test_long_target(self) -> None:
        """A target without end is refused at its limit."""
        count, refusal = self.consumed(b"GET /" + b"x" * 20_000)
        self.assertEqual(refusal, errors.TARGET_TOO_LONG)
        self.assertLess(count, DEFAULT_LIMITS.line_bytes + 32)

    def test_long_line(self) -> None:
        """So is a field."""
        start = b"GET / HTTP/1.1\r\n"
        count, refusal = self.consumed(start + b"X: " + b"x" * 20_000)
        self.assertEqual(refusal, errors.HEAD_TOO_LARGE)
        self.assertEqual(count, len(start) + DEFAULT_LIMITS.line_bytes + 1)

    def test_long_head(self) -> None:
        """And a head of many fields that never ends."""
        wire = Wire()
        wire.receive(b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * (DEFAULT_LIMITS.head_bytes // 6))
        with self.assertRaises(Refused) as caught:
            wire.next_event()
        self.assertEqual(caught.exception.refusal, errors.HEAD_TOO_LARGE)

    def test_at_the_limits(self) -> None:
        """What is exactly as long as allowed is taken, whole and byte by byte."""
        target = b"GET /" + b"x" * (DEFAULT_LIMITS.line_bytes - 1) + b" HTTP/1.1"
        field = b"X: " + b"x" * (DEFAULT_LIMITS.line_bytes - 3)
        filler = b"F: " + b"f" * 4000
        long_head = head(*[filler] * 8)
        long_head = head(*[filler] * 8, b"L:" + b"l" * (DEFAULT_LIMITS.head_bytes - len(long_head) - 4))
        self.assertEqual(len(long_head), DEFAULT_LIMITS.head_bytes)
        for name, data in {
            "target": head(first=target),
            "field": head(field),
            "field in the middle": head(field, b"Y: z"),
            "fields": head(*[b"X: y"] * (DEFAULT_LIMITS.header_lines - 1)),
            "head": long_head,
            "extension": chunked(b"0;" + b"x" * (DEFAULT_LIMITS.chunk_extension_bytes - 1) + b"\r\n\r\n"),
            "trailer": chunked(b"0\r\nX:" + b"x" * (DEFAULT_LIMITS.trailer_bytes - 4) + b"\r\n\r\n"),
        }.items():
            with self.subTest(name):
                self.assertEqual([type(e) for e in whole(data)], [Head, End], name)
                self.assertEqual(bytewise(data), whole(data), name)


class RequestTests(SynchronousTestCase):
    """What is a request, and where it ends."""

    def test_valid_however_cut(self) -> None:
        """Valid requests are seen whole, alone and one behind the other."""
        for data in [*VALID, b"".join(VALID)]:
            self.assertEqual(bytewise(data), whole(data))
            self.assertEqual(sum(isinstance(e, Refusal) for e in whole(data)), 0, data)
        self.assertEqual(sum(isinstance(e, End) for e in whole(b"".join(VALID))), len(VALID))

    @steady
    @given(st.lists(st.sampled_from(VALID), max_size=4), st.lists(st.integers(1, 900), max_size=20))
    def test_valid_cut_at_random(self, requests: list[bytes], places: list[int]) -> None:
        """The way the bytes are cut into packets shows nowhere."""
        data = b"".join(requests)
        self.assertEqual(summary(cut(data, places)), whole(data))

    def test_post_and_get_in_one_record(self) -> None:
        """lws-cases 25: what lies behind a counted body is the next request, never the body."""
        data = b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhelloGET /b HTTP/1.1\r\nHost: a\r\n\r\n"
        first, body, _, second, _ = whole(data)
        self.assertEqual((first.target, body, second.target, second.method), (b"/a", b"hello", b"/b", b"GET"))

    def test_nothing_is_parsed_ahead(self) -> None:
        """The next request waits, unread, until the one before it is over."""
        wire = Wire()
        wire.receive(NEXT + b"rubbish that is no request\n")
        self.assertIsInstance(wire.next_event(), Head)
        self.assertIsInstance(wire.next_event(), End)
        self.assertIs(wire.next_event(), Signal.PAUSED)
        self.assertEqual(wire.buffered, 27)
        wire.next_request()
        self.assertTrue(wire.has_begun)
        self.assertRaises(Refused, wire.next_event)

    def test_chunked(self) -> None:
        """lws-cases 29: chunks of one byte, extensions and trailers; the body is what the client meant."""
        body = b"".join(b"1;e=%d\r\n%c\r\n" % (i, i) for i in range(256))
        found = bytewise(chunked(body, b"0\r\nX-Sum:  abc \r\n\r\n"))
        self.assertEqual(found[1:], [bytes(range(256)), End([(b"X-Sum", b"abc")])])

    def test_chunked_without_an_end(self) -> None:
        """lws-cases 29: a chunked body whose last chunk is missing never ends."""
        self.assertEqual(whole(chunked(b"5\r\nhello\r\n"))[1:], [b"hello"])
        self.assertEqual(whole(chunked(b"5\r\nhello\r\n0\r\n"))[1:], [b"hello"])

    def test_head_fields(self) -> None:
        """What a head says is found in it."""
        data = head(b"Content-Length: 5", b"Expect: 100-Continue", b"Connection: x, Close", b"X:\t a b \t")
        (found,) = whole(data)
        self.assertEqual(
            found,
            Head(
                b"PUT",
                b"/f",
                b"HTTP/1.1",
                [
                    (b"Host", b"a"),
                    (b"Content-Length", b"5"),
                    (b"Expect", b"100-Continue"),
                    (b"Connection", b"x, Close"),
                    (b"X", b"a b"),
                ],
                length=5,
                has_content=True,
                keep_alive=False,
                expects_continue=True,
            ),
        )

    def test_http_1_0(self) -> None:
        """An old client is served without keep-alive, and isn't told to continue: it could not wait."""
        first = b"PUT /f HTTP/1.0"
        (found,) = whole(head(b"Expect: 100-continue", b"Connection: keep-alive", b"Content-Length: 1", first=first))
        self.assertEqual((found.keep_alive, found.expects_continue, found.length), (False, False, 1))

    def test_absolute_form(self) -> None:
        """A client that believes in a proxy gets the same file (RFC 9112 section 3.2.2)."""
        for target, wanted in (
            (b"http://a/x?y", b"/x?y"),
            (b"HTTPS://a:1/", b"/"),
            (b"http://a", b"/"),
            (b"http://a?y", b"/?y"),
            (b"/http://a", b"/http://a"),
        ):
            (found, _) = whole(head(first=b"GET " + target + b" HTTP/1.1"))
            self.assertEqual(found.target, wanted)

    def test_no_content_and_content_of_nothing(self) -> None:
        """A request without content is told from one with an empty one: only the latter is an upload."""
        for lines, wanted in ((), False), ((b"Content-Length: 0",), True), ((b"Transfer-Encoding: chunked",), True):
            self.assertEqual(whole(head(*lines))[0].has_content, wanted)


class MemoryTests(SynchronousTestCase):
    """Memory that is lent is not held."""

    def test_lent_memory_is_given_back(self) -> None:
        """After ``keep()`` the transport may reuse its buffer, and even change its size."""
        wire = Wire()
        data = bytearray(NEXT[:20])
        wire.receive(memoryview(data))
        self.assertIs(wire.next_event(), Signal.NEED_DATA)
        wire.keep()
        data[:] = b"\xff" * 20
        data.clear()  # BufferError if a view of it were held
        wire.receive(NEXT[20:])
        self.assertEqual(wire.next_event().target, b"/smuggled")  # type: ignore[union-attr]

    def test_body_is_not_copied(self) -> None:
        """A piece of the body is the transport's own memory."""
        wire = Wire()
        wire.receive(head(b"Content-Length: 4"))
        wire.next_event()
        data = bytearray(b"body")
        wire.receive(memoryview(data))
        piece = wire.next_event()
        assert isinstance(piece, memoryview)
        data[0:1] = b"B"
        self.assertEqual(bytes(piece), b"Body")

    def test_buffered(self) -> None:
        """What is received and not yet pulled is counted."""
        wire = Wire()
        wire.receive(head(b"Content-Length: 4"))
        wire.next_event()
        wire.receive(b"bodyGET")
        self.assertEqual(wire.buffered, 7)
        wire.next_event()
        self.assertEqual(wire.buffered, 3)


class StateTableTests(SynchronousTestCase):
    """Each state and each kind of input: what comes of it is written in one table."""

    REACH = {
        State.HEAD: b"",
        State.LENGTH: head(b"Content-Length: 4") + b"ab",
        State.CHUNK_SIZE: chunked(),
        State.CHUNK_DATA: chunked(b"4\r\nab"),
        State.CHUNK_END: chunked(b"4\r\nabcd"),
        State.TRAILERS: chunked(b"0\r\n"),
        State.END: None,
        State.DONE: NEXT,
        State.CLOSED: b"\n",
    }
    INPUTS = {
        "nothing": b"",
        "half a line": b"PU",
        "CRLF": b"\r\n",
        "LF": b"\n",
        "request": NEXT,
        "zero": b"0\r\n",
        "chunk": b"2\r\nxy\r\n",
        "field": b"X: y\r\n",
        "bytes": b"\xff\xfe",
    }
    # Where an input is missing, the state stays as it is.
    TABLE: dict[State, dict[str, State]] = {
        State.HEAD: {"LF": State.CLOSED, "request": State.DONE},
        State.LENGTH: dict.fromkeys(("half a line", "CRLF", "request", "zero", "chunk", "field", "bytes"), State.DONE),
        State.CHUNK_SIZE: {
            "CRLF": State.CLOSED,
            "LF": State.CLOSED,
            "request": State.CLOSED,
            "zero": State.TRAILERS,
            "chunk": State.CHUNK_SIZE,
            "field": State.CLOSED,
        },
        State.CHUNK_DATA: {
            "half a line": State.CHUNK_END,
            "CRLF": State.CHUNK_END,
            "request": State.CLOSED,
            "zero": State.CHUNK_END,
            "chunk": State.CLOSED,
            "field": State.CLOSED,
            "bytes": State.CHUNK_END,
        },
        State.CHUNK_END: {
            "half a line": State.CLOSED,
            "CRLF": State.CHUNK_SIZE,
            "request": State.CLOSED,
            "zero": State.CLOSED,
            "chunk": State.CLOSED,
            "field": State.CLOSED,
            "bytes": State.CLOSED,
        },
        State.TRAILERS: {
            "CRLF": State.DONE,
            "LF": State.CLOSED,
            "request": State.CLOSED,
            "zero": State.CLOSED,
            "chunk": State.CLOSED,
        },
        State.END: dict.fromkeys(INPUTS, State.DONE),
        State.DONE: {},
        State.CLOSED: {},
    }

    def reach(self, state: State) -> Wire:
        wire = Wire()
        if (data := self.REACH[state]) is None:
            wire.receive(head(b"Content-Length: 1") + b"a")
            wire.next_event()
            wire.next_event()
        else:
            wire.receive(data)
            self.pull(wire)
        self.assertIs(wire.state, state)
        return wire

    def pull(self, wire: Wire) -> None:
        try:
            while not isinstance(wire.next_event(), Signal):
                pass
        except Refused:
            self.assertIs(wire.state, State.CLOSED)

    def test_every_state_and_input(self) -> None:
        """No input leads anywhere but where the table says."""
        self.assertEqual(set(self.REACH), set(State))
        self.assertEqual(set(self.TABLE), set(State))
        for state in State:
            for name, data in self.INPUTS.items():
                with self.subTest(state=state, input=name):
                    wire = self.reach(state)
                    wire.receive(data)
                    self.pull(wire)
                    self.assertIs(wire.state, self.TABLE[state].get(name, state), (state, name))

    def test_next_request_is_for_done_only(self) -> None:
        """Nobody can skip the rest of a request by asking for the next one."""
        for state in State:
            wire = self.reach(state)
            if state is State.DONE:
                wire.next_request()
                self.assertIs(wire.state, State.HEAD)
            else:
                self.assertRaises(RuntimeError, wire.next_request)


def h11_requests(data: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Method, target and body of the requests that h11 sees whole in ``data``."""
    found = []
    while True:
        # A connection for each request: what follows is the trailing data of the one before. h11 refuses
        # the one empty line before a request that RFC 9112 section 2.2 lets a server skip.
        data = data.removeprefix(b"\r\n")
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=DEFAULT_LIMITS.head_bytes)
        connection.receive_data(data)
        request: h11.Request | None = None
        body = b""
        try:
            while not isinstance(event := connection.next_event(), h11.EndOfMessage):
                if isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                else:
                    return found
        except h11.RemoteProtocolError:
            return found
        assert request is not None
        found.append((request.method, request.target, body))
        data = connection.trailing_data[0]
        if connection.their_state is h11.MUST_CLOSE:
            return found


def our_requests(data: bytes) -> list[tuple[bytes, bytes, bytes]]:
    found = []
    method = target = body = b""
    for event in summary([data], until_close=True):
        if isinstance(event, Head):
            method, target, body = event.method, event.target, b""
        elif isinstance(event, bytes):
            body = event
        elif isinstance(event, End):
            found.append((method, target, body))
    return found


SPLICES = [
    b"\r\n", b"\n", b"\r", b" ", b"\t", b"\0", b":", b",", b";", b"0", b"5", b"chunked", b"\r\n\r\n", b"0\r\n\r\n",
    b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: b\r\n", b"Connection: close\r\n", NEXT,
    b"HTTP/1.0", b"\x0b", b"\xff",
]  # fmt: skip


class DifferentialTests(SynchronousTestCase):
    """A second parser beside ours, as a proxy before us would be."""

    def test_they_agree_on_valid_requests(self) -> None:
        """h11 sees the same requests, so the tests below compare something."""
        for data in VALID:
            wanted = [(m, t.removeprefix(b"http://other"), b) for m, t, b in h11_requests(data + NEXT)]
            self.assertEqual(our_requests(data + NEXT), wanted)
            self.assertEqual(len(wanted), 1 if b"close" in data or b"/1.0" in data else 2)

    @settings(steady, max_examples=600)
    @given(st.data())
    def test_we_never_see_a_request_that_h11_does_not(self, draw: st.DataObject) -> None:
        """Whatever is done to valid requests: ours are h11's, up to where we refuse."""
        requests = draw.draw(st.lists(st.sampled_from(VALID), min_size=1, max_size=3))
        data = b"".join(requests)
        for _ in range(draw.draw(st.integers(1, 3))):
            at = draw.draw(st.integers(0, len(data)))
            width = draw.draw(st.integers(0, 6))
            data = data[:at] + draw.draw(st.sampled_from(SPLICES)) + data[at + width :]
        data += NEXT
        ours = our_requests(data)
        theirs = [
            (m, t if not t.startswith(b"http://") else b"/" + t[7:].partition(b"/")[2], b)
            for m, t, b in h11_requests(data)
        ]
        if any(t.startswith((b"http", b"/?")) for _, t, _ in ours):
            self.assertLessEqual(len(ours), len(theirs))  # absolute forms are normalised by us only
        else:
            self.assertEqual(ours, theirs[: len(ours)], data)
