"""Hostile bytes for the two parsers that meet them first: the framing of requests and the parts of forms.

``wire(sample)`` and ``form(sample)`` each make one parser read one sample and raise :class:`Broken` if it does not keep
its promises, which are the sentences in their docstrings. ``tests/test_fuzz.py`` gives them a fixed set of samples;
``python -m tests.fuzz [SECONDS]`` searches for new ones with atheris (the extra ``fuzz``), which prefers samples that
reach code that none has reached before. What it finds is cut down and printed as ``wire(b"...")``, ready to be called.

The first byte of a sample tells the limits and how the rest is cut into deliveries. A sample of ``form`` goes on with
a Content-Type and a line feed; all else is what a client sends.
"""

from __future__ import annotations

import argparse
import email.message
import email.parser
import importlib.util
import random
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import h11

from lwstwisted import errors
from lwstwisted.errors import Refusal, Refused
from lwstwisted.uploads import parts
from lwstwisted.uploads.parts import Part, PartReader, boundary_of
from lwstwisted.web.limits import Limits
from lwstwisted.web.wire import End, Head, Signal, State, Wire
from tests.test_uploads_form import form_of, part
from tests.test_web_wire import BODY_ROWS, HEAD_ROWS, NEXT, VALID, chunked, head

LONGEST = 4096
"""Bytes of a sample: with the small limits below, this is far above each of them."""


LONGEST_DELIVERY = 300


class Broken(AssertionError):
    """A promise was not kept. The first argument names it, and the others tell how."""


def deliveries(data: bytes, way: int) -> Iterator[bytes]:
    """Cut ``data``: byte by byte if ``way`` is 0, at random places otherwise."""
    rng, at = random.Random(way), 0
    while at < len(data):
        size = 1 if way == 0 else rng.choice([1, 1, 2, 3, 5, 8, 13, 40, LONGEST_DELIVERY])
        yield data[at : at + size]
        at += size


# The wire

WIRE_LIMITS = [
    Limits(),
    Limits(
        line_bytes=40, header_lines=5, head_bytes=120, chunk_extension_bytes=6, trailer_bytes=20, body_bytes=30
    ),
    Limits(chunk_extension_bytes=0, trailer_bytes=0, body_bytes=100),
]
FRAMING = {value for value in vars(errors).values() if isinstance(value, Refusal) and value.status != 500}


def wire(sample: bytes) -> None:
    """Check what a wire makes of ``sample``.

    All that it raises is :class:`~lwstwisted.errors.Refused`, and then it is closed for good. How the bytes are cut
    changes nothing. It holds no more than a head that may still be good, or a line of a chunked body, and nothing once
    it is closed; no event is above the limits. What it calls a request is one to h11 as well, with the same fields and
    the same body.
    """
    way, data = (sample[0] if sample else 0), sample[1:]
    limits = WIRE_LIMITS[way % len(WIRE_LIMITS)]
    whole = events_of([data], limits)
    for pieces in (deliveries(data, way // len(WIRE_LIMITS)), _gathered(data, way)):
        found = events_of(pieces, limits)
        if found != whole:
            raise Broken("the cuts change the events", whole, found)
    _compare_with_h11(whole, data)


def _gathered(data: bytes, way: int) -> Iterator[bytes]:
    """Deliveries, some of which the channel does not look at before the next one; b"" is a look."""
    rng = random.Random(~way)
    for piece in deliveries(data, way | 1):
        yield piece
        if rng.random() < 0.5:
            yield b""
    yield b""


def events_of(pieces: Iterable[bytes], limits: Limits) -> list[Any]:
    """Heads, whole bodies, ends, and the refusal. A piece is lent, and overwritten afterwards."""
    one, found = Wire(limits), list[Any]()
    pieces = list(pieces)
    is_gathered = b"" in pieces
    try:
        for piece in pieces:
            lent = bytearray(piece)
            if piece:
                one.receive(memoryview(lent))
            if not is_gathered or not piece:
                _pull(one, limits, found)
            one.keep()
            lent[:] = b"\xff" * len(lent)
    except Refused as refused:
        if refused.refusal not in FRAMING:
            raise Broken("a refusal that is none of the framing", refused.refusal) from None
        one.keep()
        found.append(refused.refusal)
        one.receive(NEXT)
        if one.next_event() is not Signal.PAUSED or one.state is not State.CLOSED:
            raise Broken("it goes on after a refusal", found) from None
        if one.buffered > len(NEXT):
            raise Broken("a closed wire holds bytes", one.buffered) from None
    return found


def _pull(one: Wire, limits: Limits, found: list[Any]) -> None:
    while True:
        left, event = one.buffered, one.next_event()
        if event is Signal.NEED_DATA:
            if one.buffered > max(
                limits.head_bytes + 1, len("\r") + 16 + limits.chunk_extension_bytes, len("\r") + limits.trailer_bytes
            ):
                raise Broken("it holds more than it may", one.state, one.buffered)
            return
        if event is Signal.PAUSED:
            if not [each for each in found if isinstance(each, Head)][-1].keep_alive:
                return
            one.next_request()
        elif isinstance(event, memoryview):
            if not event or one.buffered + len(event) > left:
                raise Broken("a piece of the body that was not received", bytes(event), left)
            if found and isinstance(found[-1], bytes):
                found[-1] += bytes(event)
            else:
                found.append(bytes(event))
            if len(found[-1]) > limits.body_bytes:
                raise Broken("a body longer than may be", found[-1])
        else:
            found.append(event)
            _check_size(event, limits)


def _check_size(event: Head | End, limits: Limits) -> None:
    fields = event.headers if isinstance(event, Head) else event.trailers
    size = sum(len(name) + len(b":\r\n") + len(value) for name, value in fields)
    if isinstance(event, End):
        is_above = size > limits.trailer_bytes
    else:
        is_above = size > limits.head_bytes or len(fields) > limits.header_lines
        is_above = is_above or len(event.target) > limits.line_bytes or (event.length or 0) > limits.body_bytes
    if is_above:
        raise Broken("more than may be", event)


class Seen(NamedTuple):
    """A request; ``body`` is None where its end was not seen."""

    method: bytes
    target: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytes | None
    trailers: list[tuple[bytes, bytes]]


def _lowered(fields: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    # The value as well: h11 writes the name of a coding in small letters.
    return [(bytes(name).lower(), bytes(value).lower()) for name, value in fields]


def _compare_with_h11(events: list[Any], data: bytes) -> None:
    ours = list[Seen]()
    body = b""
    for event in events:
        if isinstance(event, Head):
            ours.append(Seen(event.method, event.target, _lowered(event.headers), None, []))
            body = b""
            names = [name for name, _ in ours[-1].fields]
            framing = names.count(b"content-length") + names.count(b"transfer-encoding")
            if framing > 1 or (event.version == b"HTTP/1.0" and b"transfer-encoding" in names):
                raise Broken("framing that RFC 9112 lets a server refuse, and h11 does not", event)
        elif isinstance(event, bytes):
            body = event
        elif isinstance(event, End):
            ours[-1] = ours[-1]._replace(body=body, trailers=_lowered(event.trailers))
            length = [each for each in events if isinstance(each, Head)][len(ours) - 1].length
            if length is not None and length != len(body):
                raise Broken("a body is not as long as its head says", length, body)
    # h11 refuses a trailer that tells a length or a coding, if it tells it wrong. We believe none, right or wrong.
    for at, our in enumerate(ours):
        if any(name in (b"content-length", b"transfer-encoding") for name, _ in our.trailers):
            ours[at:] = [our._replace(body=None)]
            break
    theirs = _h11_requests(data)
    if len(ours) > len(theirs):
        raise Broken("a request that h11 does not see", ours[len(theirs)], theirs)
    for our, their in zip(ours, theirs, strict=False):
        # Of an absolute form we keep what is behind the authority, and of a request that we refuse only the head.
        target = re.sub(rb"(?i)^https?://[^/?#]*/?", b"/", their.target)
        if our._replace(body=None, trailers=[]) != their._replace(target=target, body=None, trailers=[]):
            raise Broken("a head that h11 reads differently", our, their)
        if our.body is not None and (our.body, our.trailers) != (their.body, their.trailers):
            raise Broken("a body that h11 reads differently", our, their)


def _h11_requests(data: bytes) -> list[Seen]:
    """The requests that h11 sees, as a server that answers each."""
    found = list[Seen]()
    while True:
        # h11 refuses the one empty line before a request that RFC 9112 section 2.2 lets a server skip.
        data = data.removeprefix(b"\r\n")
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=len(data))
        connection.receive_data(data)
        body = b""
        try:
            while not isinstance(event := connection.next_event(), h11.EndOfMessage):
                if isinstance(event, h11.Request):
                    found.append(Seen(event.method, event.target, _lowered(event.headers), None, []))
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                else:
                    return found
        except h11.RemoteProtocolError:
            return found
        found[-1] = found[-1]._replace(body=body, trailers=_lowered(event.headers))
        data = connection.trailing_data[0]
        if connection.their_state is h11.MUST_CLOSE:
            return found


# The form

FORM_LIMITS: list[dict[str, int]] = [
    {name: getattr(parts, name) for name in ("PARTS", "HEADER_LINES", "HEADER_BYTES", "SURROUNDINGS")},
    {"PARTS": 3, "HEADER_LINES": 3, "HEADER_BYTES": 90, "SURROUNDINGS": 20},
]
FORM = {errors.BAD_FORM, errors.FORM_CUT, errors.FORM_TOO_LARGE, errors.PART_ENCODING, errors.NAME_ENCODING}
FORM_TYPE = {errors.NOT_A_FORM, errors.BAD_BOUNDARY}
Parts = list[tuple[bytes | None, bytes]]


def form(sample: bytes) -> None:
    """Check what becomes of a form.

    It is read, or there is a :class:`~lwstwisted.errors.Refused` that is declared for forms. How the bytes are cut
    changes nothing. No limit is passed, and no more bytes come out than went in. The boundary, and the parts of a form
    that is taken, are what RFC 2046 says, and what the ``email`` package makes of the same bytes. (``multipart`` has a
    parser for whole forms too, but inside it is the one that ``PartReader`` uses.)
    """
    way, (kind, _, body) = (sample[0] if sample else 0), sample[1:].partition(b"\n")
    try:
        boundary = boundary_of([kind])
    except Refused as refused:
        if refused.refusal not in FORM_TYPE:
            raise Broken("a refusal that is none of a boundary", refused.refusal) from None
        return
    message = email.message.Message()
    message["Content-Type"] = kind.decode("latin-1")
    if (theirs := message.get_boundary()) != boundary.decode():
        raise Broken("a boundary that the email package reads differently", boundary, theirs)
    limits = FORM_LIMITS[way % len(FORM_LIMITS)]
    with mock.patch.multiple(parts, **limits):
        whole = parts_of([body], boundary)
        found = parts_of(deliveries(body, way // len(FORM_LIMITS)), boundary)
        if found != whole and not _may_differ(whole, found, body, boundary):
            raise Broken("the cuts change the parts", whole, found)
        behind = len(body) - body.rfind(b"--" + boundary + b"--")
        if isinstance(found, list) and behind > 2 * len(boundary) + parts.SURROUNDINGS + LONGEST_DELIVERY:
            raise Broken("more behind the form than may be", behind)
        if isinstance(whole, list):
            framed = _framed(body, boundary)
            preamble = body.find(b"--" + boundary) - len(b"\r\n")
            if preamble > parts.SURROUNDINGS or any(
                len(top) > parts.HEADER_BYTES or top.count(b"\r\n") > parts.HEADER_LINES for top, _ in framed
            ):
                raise Broken("more than may be", preamble, framed)
    if isinstance(whole, list):
        if [content for _, content in whole] != [content for _, content in framed]:
            raise Broken("contents that are not what RFC 2046 says", whole, framed)
        _compare_with_email(whole, framed, kind, body, boundary)


def _may_differ(whole: Parts | Refusal, found: Parts | Refusal, body: bytes, boundary: bytes) -> bool:
    """Where the parser lets a cut show: neither can make a form of what is none, nor another form of what is one."""
    # How much of the delivery in which a form ends lies behind the form is not told, so up to one more is let pass.
    surplus = len(body.partition(b"--" + boundary + b"--")[2])
    is_cut_off = found is errors.FORM_TOO_LARGE and surplus > parts.SURROUNDINGS
    # A bare LF ends a head as soon as it is seen, unless the CRLF behind it is there already.
    is_refused = isinstance(whole, Refusal) and isinstance(found, Refusal)
    return is_cut_off or (is_refused and re.search(rb"(?<!\r)\n", body) is not None)


def parts_of(pieces: Iterable[bytes], boundary: bytes) -> Parts | Refusal:
    reader, found, is_open, came, went = PartReader(boundary), Parts(), False, 0, 0
    try:
        for piece in pieces:
            came += len(piece)
            for event in reader.feed(piece):
                if isinstance(event, Part) != (not is_open) or event == b"":
                    raise Broken("events out of order", event)
                if isinstance(event, Part):
                    found.append((event.filename, b""))
                    is_open = True
                elif event is None:
                    is_open = False
                else:
                    found[-1] = (found[-1][0], found[-1][1] + event)
                    went += len(event)
            if went > came or len(found) > parts.PARTS:
                raise Broken("more than came, or than may be", came, went, len(found))
        reader.end()
    except Refused as refused:
        if refused.refusal not in FORM:
            raise Broken("a refusal that is none of a form", refused.refusal) from None
        return refused.refusal
    if is_open:
        raise Broken("a part without an end", found)
    return found


def _framed(body: bytes, boundary: bytes) -> list[tuple[bytes, bytes]]:
    """Heads and contents by RFC 2046 section 5.1.1, where a delimiter is nothing but CRLF, hyphens and boundary."""
    delimiter, found = b"\r\n--" + boundary, list[tuple[bytes, bytes]]()
    rest = (b"\r\n" + body).partition(delimiter)[2]
    while not rest.startswith(b"--"):
        # Between the empty line behind a head and a delimiter that ends an empty content there is a second CRLF.
        top, separator, behind = rest.partition(b"\r\n\r\n")
        content, end, rest = behind.partition(delimiter)
        if not top.startswith(b"\r\n") or not separator or not end:
            raise Broken("a form that RFC 2046 does not know", found, top, content)
        found.append((top, content))
    return found


def _compare_with_email(
    ours: Parts, framed: list[tuple[bytes, bytes]], kind: bytes, body: bytes, boundary: bytes
) -> None:
    # The email package also ends lines at a bare CR or LF, allows blanks behind a boundary but nothing else, has heads
    # without an empty line, and looks into messages.
    literal = b"--" + re.escape(boundary)
    if re.search(rb"(?:\r(?!\n)|(?<!\r)\n)%b|%b(?!\r\n|--\r\n|--\Z)" % (literal, literal), body):
        return
    if any(content.startswith(b"--" + boundary) for _, content in framed):
        return
    if any(re.search(rb"(?i)content-type[ \t]*:[ \t]*(?:multipart|message)/", top) for top, _ in framed):
        return
    message = email.parser.BytesParser().parsebytes(b"Content-Type: " + kind + b"\r\n\r\n" + body)
    theirs: Any = message.get_payload() if message.is_multipart() else []
    contents = [each.get_payload(decode=True) for each in theirs]
    if contents != [content for _, content in ours]:
        raise Broken("contents that the email package reads differently", ours, contents)
    for (name, _), each, (top, _) in zip(ours, theirs, framed, strict=True):
        # Escapes are a matter of taste, and so is all that is not ASCII.
        if top.isascii() and not re.search(rb"[\\%*]", top):
            plain = each.get_param("filename", header="content-disposition")
            if name != (None if plain is None else plain.encode()):
                raise Broken("a name that the email package reads differently", name, plain)


TARGETS: dict[str, Callable[[bytes], None]] = {"wire": wire, "form": form}

# Samples

PLAIN = b"multipart/form-data; boundary=B"
GOOD_FORMS = [
    (PLAIN, form_of(part(b"value"), part(b"x\r\ny", "a"), boundary=b"B")),
    (b'Multipart/Form-Data; charset=utf-8; boundary="a b"', form_of(part(b"", "a"), boundary=b"a b")),
    (PLAIN, b"hello\r\n" + form_of(part(b"\r\n--", "a"), part(b"\r\n--B"[:-1], ""), boundary=b"B") + b"bye"),
    (PLAIN, form_of(part(b"1", "a", b"Content-Type: text/plain", b"Content-Length: 1"), boundary=b"B")),
    (PLAIN, form_of(b"content-disposition:form-data;name=f;filename*=UTF-8''%e2%82%ac\r\n\r\nx", boundary=b"B")),
    (PLAIN, form_of(part(b"x", b'a%22\\"', b"Content-Transfer-Encoding: binary"), boundary=b"B")),
    (PLAIN, form_of(boundary=b"B")),
    (PLAIN, form_of(*[part(b"x")] * 4, boundary=b"B")),
]
BAD_FORMS = [
    (PLAIN, form_of(part(b"x", "n" * 60), boundary=b"B")),
    (PLAIN, form_of(part(b"x", "a", b"X: a\nb"), boundary=b"B")),
    (PLAIN, form_of(part(b"x", "a", b" folded"), boundary=b"B")),
    (PLAIN, form_of(part(b"x", "a", b"Content-Encoding: gzip"), boundary=b"B")),
    (PLAIN, form_of(part(b"x", None, b"X: y", b"Y: z", b"Z: z"), boundary=b"B")),
    (PLAIN, form_of(part(b"x", "a"), boundary=b"B") + b"e" * 400),
    (PLAIN, b"--B\n\n--B--"),
    (b"text/plain", b""),
]  # fmt: skip

SEEDS: dict[str, list[bytes]] = {
    "wire": [
        bytes([way]) + data + NEXT
        for way, data in enumerate(
            [
                *VALID,
                *[row.data for row in HEAD_ROWS + BODY_ROWS if len(row.data) < 500],
                chunked(b"3;a\r\nabc\r\n0\r\nA: b\r\n\r\n"),
                chunked(b"100000005\r\nhello\r\n0\r\n\r\n"),
                chunked(b"10000000000000005\r\nhello\r\n0\r\n\r\n"),
                chunked(b"0\r\n", b"A: b\r\n" * 4, b"\r\n"),
                head(b"Connection: x, Close"),
                head(b"Content-Length: 12"),
                head(b"Content-Length: " + b"9" * 4400),  # more than int() takes
            ]
        )
    ],
    "form": [bytes([way]) + kind + b"\n" + body for way, (kind, body) in enumerate(GOOD_FORMS + BAD_FORMS)],
}

_SHARED = [
    b"", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\n\n", b"\0", b" ", b"\t", b"\x0b", b"\x7f", b"\x85", b"\xff",
    b"\xc3\xa9", b":", b";", b",", b"=", b'"', b"\\", b"%", b"+5", b"-1", b"0", b"5", b"05", b"0x5", b"1_0", b"5, 5",
    b"99999999999999999999", b"9223372036854775807", b"Content-Length: 5\r\n", b"Content-Length: 1\r\n",
    b"Content-Length:\r\n", b"x" * 20, b"y" * 60, b" " * 30,
]  # fmt: skip
TOKENS: dict[str, list[bytes]] = {
    "wire": [
        *_SHARED, b"\r\n ", b"\r\n\t", b"chunked", b"identity", b"gzip, chunked", b"chunked, chunked", b"\x0bchunked",
        b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding : chunked\r\n", b"transfer-encoding:chunked\r\n",
        b"Host: b\r\n", b"Connection: close\r\n", b"Connection: ,Close ,\r\n", b"Connection: keep-alive\r\n",
        b"Connection: Upgrade\r\nUpgrade: h2c\r\n", b"Expect: 100-continue\r\n", b"Trailer: X\r\n", b"0\r\n\r\n",
        b"0\r\n", b"5\r\nhello\r\n", b"0000000000000005", b"ffffffffffffffff", b"100000005", b"10000000000000005",
        b"10000000000000000", b"a;b=c", b"0;a=b", b";aaaaa", b";aaaaaa", b"A: b\r\n", b"GET", b"CONNECT a:1",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"HTTP/1.0", b"HTTP/1.1", b"HTTP/1.2", b"http://a/b", b"https://a?b",
        b"*", NEXT,
    ],
    "form": [
        *_SHARED, b"--", b"-", b"--B", b"--B--", b"\r\n--B", b"\r\n--B\r\n", b"\r\n--B--", b"\r\n--B--\r\n",
        b"\n--B\r\n", b"\r\r\n--B", b"\r\n--", b"--B\n", b"--BB", b"form-data", b"attachment", b"; name=a",
        b'; name="a"', b'; filename="', b'; filename="b"', b"; filename=b", b"; filename*=UTF-8''%41",
        b"; filename*0=a", b"; filename*=", b"%22", b"%0D%0A", b'\\"', b"; boundary=B", b"; boundary=C",
        b'; boundary="', b"boundary", b"Content-Disposition: form-data; name=a\r\n",
        b"Content-Type: multipart/mixed\r\n", b"Content-Type: message/rfc822\r\n",
        b"Content-Transfer-Encoding: base64\r\n", b"Content-Encoding: identity\r\n", b"X: y\r\n", b"x: z\r\n",
        b"X" * 60 + b": y\r\n", b"multipart/form-data", b"--B\r\n" + part(b"x", "b") + b"\r\n",
    ],
}  # fmt: skip
"""What a change may put in: what means something to one parser or another."""

_JOINT = re.compile(rb"\r\n|\r|\n|[ \t:;,=\"%]|--|[0-9]+")

Edit = tuple[int, int, bytes | tuple[int, int]]
"""Where, how much is taken away, and what is put there: bytes, or what is found somewhere else."""


def edited(sample: bytes, edits: Iterable[Edit]) -> bytes:
    """``sample`` with some changes, most of them at the joints of its grammar."""
    for at, width, new in edits:
        joints = [place for match in _JOINT.finditer(sample) for place in match.span()]
        place = joints[at // 4 % len(joints)] if joints and at % 4 else at % (len(sample) + 1)
        if isinstance(new, tuple):
            begin = new[0] % (len(sample) + 1)
            new = sample[begin : begin + new[1]]
        sample = (sample[:place] + new + sample[place + width :])[:LONGEST]
    return sample


def random_edits(rng: random.Random, tokens: Sequence[bytes]) -> Iterator[Edit]:
    """One to four changes."""
    for _ in range(rng.choice([1, 1, 2, 3, 4])):
        dice = rng.random()
        new: bytes | tuple[int, int] = rng.choice(tokens)
        if dice < 0.25:
            copy = (rng.randrange(1 << 16), rng.choice([1, 2, 8, 40]))
            new = copy if dice < 0.2 else rng.randbytes(rng.randint(1, 3))
        yield rng.randrange(1 << 16), rng.choice([0, 0, 1, 1, 2, 3, 5, 9, 30]), new


# The search


def kind_of(failure: BaseException) -> str:
    """What two failures have in common that have the same cause, as far as one can tell."""
    if isinstance(failure, Broken):
        # Refusals tell causes apart, the bytes do not.
        return " ".join([str(failure.args[0]), *[_refusal(each) for each in failure.args[1:]]])
    last = traceback.extract_tb(failure.__traceback__)[-1]
    return f"{type(failure).__name__} in {Path(last.filename).name}:{last.lineno}"


def _refusal(found: Any) -> str:
    last = found[-1] if isinstance(found, list) and found else found
    return last.code if isinstance(last, Refusal) else ""


def failure_of(target: Callable[[bytes], None], sample: bytes) -> Exception | None:
    """What a target raises for ``sample``."""
    try:
        target(sample)
    except Exception as failure:
        return failure
    return None


def smallest(target: Callable[[bytes], None], sample: bytes, kind: str) -> bytes:
    """Take away whatever is not needed for a failure of this kind, in a bounded number of tries."""
    size, tries = len(sample), 5000
    while size:
        at = 0
        while at < len(sample) and tries:
            tries -= 1
            shorter = sample[:at] + sample[at + size :]
            failure = failure_of(target, shorter)
            if failure is not None and kind_of(failure) == kind:
                sample = shorter
            else:
                at += size
        size //= 2
    return sample


INSTRUMENTED = ["lwstwisted.web.wire", "lwstwisted.uploads.parts", "multipart"]
CHILD = f"""\
import sys
import atheris
with atheris.instrument_imports(include={INSTRUMENTED}):
    import tests.fuzz
tests.fuzz.search(*sys.argv[1:])
"""
"""A module is instrumented when it is imported for the first time, so this has to come before all else."""


def search(name: str, folder: str, *options: str) -> None:
    """In a process of its own: look for samples that break a promise of a target, until atheris ends the process.

    :param folder: with the corpus; the findings are written there, a line for each.
    :param options: of libFuzzer.
    """
    import atheris

    target, known = TARGETS[name], set[str]()

    def one(sample: bytes) -> None:
        failure = failure_of(target, sample)
        if failure is None or (kind := kind_of(failure)) in known:
            return
        known.add(kind)
        with open(f"{folder}/findings", "a") as findings:
            print(f"{name}({smallest(target, sample, kind)!r})  # {kind}", file=findings)

    def mutated(sample: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.3:
            return bytes(atheris.Mutate(sample, longest))
        return edited(sample, random_edits(rng, TOKENS[name]))[:longest]

    atheris.Setup([sys.argv[0], f"-max_len={LONGEST}", *options, f"{folder}/corpus"], one, custom_mutator=mutated)
    atheris.Fuzz()


def search_for(name: str, seconds: int) -> int:
    """Search for so many seconds, print what is found, and count it."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        for at, seed in enumerate(SEEDS[name]):
            (corpus / f"{at}").write_bytes(seed)
        options = [f"-max_total_time={seconds}", "-timeout=10", f"-artifact_prefix={folder}/crash-"]
        with open(f"{folder}/log", "w+") as log:
            child = [sys.executable, "-c", CHILD, name, folder, *options]
            status = subprocess.run(child, stdout=log, stderr=log).returncode
            log.seek(0)
            lines = log.read().splitlines()
        print(f"{name}:", next((line for line in reversed(lines) if "cov:" in line), "did not begin"))
        findings = Path(folder, "findings")
        found = findings.read_text().splitlines() if findings.exists() else []
        # What ends the process itself: a crash of an extension module, a sample that takes forever.
        found += [f"{name}({path.read_bytes()!r})  # {path.name}" for path in Path(folder).glob("crash-*")]
        print(*found, sep="\n", end="\n" * bool(found))
        if status and not found:
            print(*lines[-20:], sep="\n")
        return len(found) or status


def main() -> int:
    """Search, half of the time for each target."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Search for bytes that break a parser.")
    parser.add_argument("seconds", nargs="?", type=int, default=600, help="in all (600)")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one; the time is all its own")
    options = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is missing: pip install '.[fuzz]', with a Python that it has a wheel for")
    targets = options.target or list(TARGETS)
    return min(1, sum([search_for(target, options.seconds // len(targets)) for target in targets]))


if __name__ == "__main__":
    sys.exit(main())
