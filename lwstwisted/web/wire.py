"""HTTP/1.1 framing of requests, without I/O: bytes in, events out, and events are *pulled*.

``receive(data)`` gives bytes, ``next_event()`` takes one event. Not pulling is the pause: nothing is
called back, so nothing can be entered twice. The rules are RFC 9112's; where it lets a recipient be
lenient, this one refuses, because two parsers that repair the same bytes differently are how requests
are smuggled.

The states, and what leads from one to the next::

    HEAD ──head, no body──> END ──> DONE ──next_request()──> HEAD
      ├──Content-Length───> LENGTH ──counted to 0──> END
      └──chunked──────────> CHUNK_SIZE ⇄ CHUNK_DATA ⇄ CHUNK_END;  size 0 ──> TRAILERS ──> END
    any ──refusal──> CLOSED

A head is parsed by llhttp (through httptools), after one search for the bytes that llhttp would let
pass. A body never goes through it: a counted one needs no parser, and httptools tells neither the size
of a chunk nor where in its input a message ended, so it cannot say where the next request begins.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass

import httptools

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.web.limits import DEFAULT_LIMITS, MAX_LENGTH, Limits

_REQUEST_LINE_FRAME = len("CONNECT  HTTP/1.1")  # what a request line has beside its target
_SHORT_LINE = 32  # what is copied first for a line of a chunked body: its lines are short, its limits are not
_LENGTH_DIGITS = len(str(MAX_LENGTH))
_BLANK_LINE = b"\r\n\r\n"
_CRLF = b"\r\n"
_NOTHING = memoryview(b"")  # one for all: a connection that waits holds no buffer
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# Controls but tab, CR without LF, LF without CR, and a line that begins with white space (obs-fold).
_BAD_BYTES = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)|(?<!\r)\n|\n[ \t]")
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/([0-9]\.[0-9])\r\n")
_ABSOLUTE_FORM = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)
_HOST = re.compile(rb"(?:[A-Za-z0-9\-._~!$&'()*+,;=%]*|\[[0-9A-Za-z:.%]+\])(?::[0-9]{0,5})?")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(;[\t\x20-\x7e\x80-\xff]*)?\r\n")
_HEADER_LINE = re.compile(rb"(" + _TOKEN + rb"):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*\r\n")


class State(enum.Enum):
    """Where in a request the next byte lies."""

    HEAD = enum.auto()
    LENGTH = enum.auto()
    CHUNK_SIZE = enum.auto()
    CHUNK_DATA = enum.auto()
    CHUNK_END = enum.auto()
    TRAILERS = enum.auto()
    END = enum.auto()
    DONE = enum.auto()
    CLOSED = enum.auto()


class Signal(enum.Enum):
    """Answers of :meth:`Wire.next_event` that are not events."""

    NEED_DATA = enum.auto()
    """Give more bytes, or the end of the stream."""
    PAUSED = enum.auto()
    """The request is over (call :meth:`Wire.next_request`), or the wire is closed."""


@dataclass(frozen=True, slots=True)
class Head:
    """A complete request head.

    :ivar target: in origin form, ``*``, or authority form for CONNECT.
    :ivar version: ``b"HTTP/1.1"`` or ``b"HTTP/1.0"``.
    :ivar headers: names as sent, values without white space around them.
    :ivar length: bytes of the body; 0 without one; None for a chunked one.
    :ivar has_content: whether the client announced content, were it of 0 bytes (RFC 9110 section 6.4).
    :ivar keep_alive: whether the client lets another request follow.
    :ivar expects_continue: whether it waits for ``100 Continue``.
    """

    method: bytes
    target: bytes
    version: bytes
    headers: list[tuple[bytes, bytes]]
    length: int | None
    has_content: bool
    keep_alive: bool
    expects_continue: bool


@dataclass(frozen=True, slots=True)
class End:
    """The end of a request.

    :ivar trailers: trailer fields, never merged into the header (RFC 9110 section 6.5.1).
    """

    trailers: list[tuple[bytes, bytes]]


Event = Head | memoryview | End | Signal
"""A memoryview is a piece of the body, good until the next call of :meth:`Wire.receive` or :meth:`Wire.keep`."""


class Wire:
    """One connection's requests.

    :param limits: the longest that it takes; what is announced to be longer is refused at once.
    """

    __slots__ = (
        "_announced",
        "_borrowed",
        "_extensions",
        "_input",
        "_left",
        "_limits",
        "_may_skip_blank",
        "_scanned",
        "_trailer_bytes",
        "_trailers",
        "state",
    )

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._input = _NOTHING
        self._borrowed = False
        self.state = State.HEAD
        self._scanned = 0
        self._may_skip_blank = True
        self._left = 0
        self._announced = 0  # bytes of a chunked body so far
        self._extensions = 0
        self._trailer_bytes = 0
        self._trailers: list[tuple[bytes, bytes]] = []

    @property
    def buffered(self) -> int:
        """Bytes received and not yet pulled."""
        return len(self._input)

    @property
    def has_begun(self) -> bool:
        """Whether a part of a head has arrived."""
        return self.state is State.HEAD and bool(self._input)

    def receive(self, data: bytes | memoryview) -> None:
        """Take bytes. A memoryview is borrowed until :meth:`keep`.

        :param data: what the transport brought.
        """
        if self._input:
            self._input = memoryview(b"".join((self._input, data)))
            self._borrowed = False
        else:
            self._input = memoryview(data)
            self._borrowed = True

    def keep(self) -> None:
        """Copy what is left of a borrowed memoryview; to be called before its owner reuses it."""
        if self._borrowed:
            self._borrowed = False
            self._input = memoryview(bytes(self._input)) if self._input else _NOTHING

    def next_request(self) -> None:
        """Go on with the request behind the one that is over."""
        if self.state is not State.DONE:
            raise RuntimeError("the request is not over")
        self.state = State.HEAD
        self._scanned = 0
        self._may_skip_blank = True

    def next_event(self) -> Event:
        """Pull one event.

        :raises Refused: for bytes that are no request; the wire is closed then.
        """
        try:
            while True:
                event = _STEPS[self.state](self)
                if event is not None:
                    return event
        except Refused:
            self.state = State.CLOSED
            self._input = memoryview(b"")  # a connection that lingers has no use for it
            raise

    def _take(self, count: int) -> memoryview:
        taken = self._input[:count]
        # An empty slice would hold the memory that it was cut from.
        self._input = self._input[count:] if count < len(self._input) else _NOTHING
        return taken

    # The head

    def _head(self) -> Event | None:
        raw = bytes(self._input[: self._limits.head_bytes + len(_BLANK_LINE)])
        if self._may_skip_blank and raw.startswith(_CRLF):
            # RFC 9112 section 2.2: one empty line before a request is ignored.
            self._may_skip_blank = False
            self._take(len(_CRLF))
            return None
        end = raw.find(_BLANK_LINE, max(0, self._scanned - len(_BLANK_LINE)))
        known = len(raw) - raw.endswith(b"\r") if end < 0 else end + len(_BLANK_LINE)
        bad = _BAD_BYTES.search(raw, max(0, self._scanned - 1), known)
        # Whatever comes first decides, as it does for a head that comes byte by byte.
        _check_sizes(raw[: bad.end() - 1 if bad else known], self._scanned, self._limits)
        if bad:
            raise Refused(errors.BAD_BYTES)
        if end < 0:
            self._scanned = known
            return Signal.NEED_DATA
        head = _parse_head(raw[:known], self._limits)
        self._take(known)
        self._begin_body(head)
        return head

    def _begin_body(self, head: Head) -> None:
        self._trailers = []
        self._trailer_bytes = 0
        self._extensions = 0
        self._announced = 0
        if head.length is None:
            self.state = State.CHUNK_SIZE
            return
        if head.length > self._limits.body_bytes:
            raise Refused(errors.BODY_TOO_LARGE)
        self._left = head.length
        self.state = State.LENGTH if head.length else State.END

    # The body

    def _counted(self) -> Event | None:
        if not self._input:
            return Signal.NEED_DATA
        piece = self._take(self._left)
        self._left -= len(piece)
        if not self._left:
            self.state = State.END if self.state is State.LENGTH else State.CHUNK_END
        return piece

    def _line(self, limit: int, refusal: errors.Refusal) -> bytes | None:
        """Take a line with its CRLF, or None if it has not arrived whole; ``limit`` is without CRLF."""
        raw = bytes(self._input[:_SHORT_LINE])
        end = raw.find(b"\n") + 1
        if not end and len(self._input) > _SHORT_LINE:
            raw = bytes(self._input[: limit + len(_CRLF)])
            end = raw.find(b"\n") + 1
        if len(raw[: end or None].removesuffix(b"\n").removesuffix(b"\r")) > limit:
            raise Refused(refusal)
        if not end:
            return None
        self._take(end)
        return raw[:end]

    def _chunk_size(self) -> Event | None:
        line = self._line(16 + self._limits.chunk_extension_bytes, errors.BAD_CHUNK)
        if line is None:
            return Signal.NEED_DATA
        match = _CHUNK_SIZE.fullmatch(line)
        if match is None:
            raise Refused(errors.BAD_CHUNK)
        self._extensions += len(match[2] or b"")
        if self._extensions > self._limits.chunk_extension_bytes:
            raise Refused(errors.BAD_CHUNK)
        self._left = int(match[1], 16)
        self._announced += self._left
        if self._announced > self._limits.body_bytes:
            raise Refused(errors.BODY_TOO_LARGE)
        self.state = State.CHUNK_DATA if self._left else State.TRAILERS
        return None

    def _chunk_end(self) -> Event | None:
        if len(self._input) < len(_CRLF):
            return Signal.NEED_DATA
        if self._take(len(_CRLF)) != _CRLF:
            raise Refused(errors.BAD_CHUNK)
        self.state = State.CHUNK_SIZE
        return None

    def _trailer_section(self) -> Event | None:
        line = self._line(self._limits.trailer_bytes, errors.TRAILERS_TOO_LARGE)
        if line is None:
            return Signal.NEED_DATA
        if line == _CRLF:
            self.state = State.END
            return None
        match = _HEADER_LINE.fullmatch(line)
        if match is None:
            raise Refused(errors.BAD_CHUNK)
        # A running count: adding up the list for each line would cost a second of CPU for 32 KiB of lines.
        self._trailer_bytes += len(line)
        if self._trailer_bytes > self._limits.trailer_bytes:
            raise Refused(errors.TRAILERS_TOO_LARGE)
        self._trailers.append((match[1], match[2]))
        return None

    def _end(self) -> Event:
        self.state = State.DONE
        return End(self._trailers)

    def _paused(self) -> Event:
        return Signal.PAUSED


_STEPS: dict[State, Callable[[Wire], Event | None]] = {
    State.HEAD: Wire._head,
    State.LENGTH: Wire._counted,
    State.CHUNK_SIZE: Wire._chunk_size,
    State.CHUNK_DATA: Wire._counted,
    State.CHUNK_END: Wire._chunk_end,
    State.TRAILERS: Wire._trailer_section,
    State.END: Wire._end,
    State.DONE: Wire._paused,
    State.CLOSED: Wire._paused,
}
# Not in the instance, where each method would be an object for each connection.


def _check_sizes(raw: bytes, scanned: int, limits: Limits) -> None:
    """Refuse a head that is too large, or will be; what was scanned before has been checked but for its last line."""
    begin = raw.rfind(_CRLF, 0, scanned) + len(_CRLF)
    is_first = begin < len(_CRLF)
    lines = raw[0 if is_first else begin :].split(_CRLF)
    if is_first and len(lines.pop(0)) > limits.line_bytes + _REQUEST_LINE_FRAME:
        raise Refused(errors.TARGET_TOO_LONG)
    if len(raw) > limits.head_bytes or any(len(line) > limits.line_bytes for line in lines):
        raise Refused(errors.HEAD_TOO_LARGE)


class _Collector:
    """What llhttp calls back."""

    __slots__ = ("headers",)

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value.strip(b" \t")))


def _parse_head(raw: bytes, limits: Limits) -> Head:
    """Parse a head that ends in an empty line, has no bad bytes, and is not too large."""
    match = _REQUEST_LINE.match(raw)
    if match is None:
        raise Refused(errors.BAD_REQUEST_LINE)
    method, target, version = match.groups()
    if version not in (b"1.1", b"1.0"):
        raise Refused(errors.BAD_VERSION)
    if len(target) > limits.line_bytes:
        raise Refused(errors.TARGET_TOO_LONG)
    lines = raw[match.end() : -len(_CRLF)]
    count = lines.count(_CRLF)
    if count > limits.header_lines:
        raise Refused(errors.HEAD_TOO_LARGE)
    version = b"HTTP/" + version
    collector = _Collector()
    # A parser for each head: one that has seen a Content-Length would take what follows for the body.
    try:
        httptools.HttpRequestParser(collector).feed_data(raw)
    except httptools.HttpParserUpgrade:
        pass  # a server that does not switch protocols ignores Upgrade (RFC 9110 section 7.8)
    except httptools.HttpParserInvalidMethodError:
        raise Refused(errors.UNKNOWN_METHOD) from None
    except httptools.HttpParserError:
        # llhttp does not say which line it dislikes; if it is the framing, we can.
        _framed(method, target, version, _HEADER_LINE.findall(lines))
        raise Refused(errors.BAD_HEADER) from None
    if len(collector.headers) != count:
        raise Refused(errors.BAD_HEADER)
    return _framed(method, target, version, collector.headers)


def _framed(method: bytes, target: bytes, version: bytes, headers: list[tuple[bytes, bytes]]) -> Head:
    """Read the fields that say how long the request is, and who may send another one."""
    fields: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        fields.setdefault(name.lower(), []).append(value)
    is_current = version == b"HTTP/1.1"
    _check_host(fields.get(b"host", []), is_current)
    lengths = fields.get(b"content-length")
    codings = fields.get(b"transfer-encoding")
    if codings is not None and (not is_current or len(codings) > 1 or codings[0].lower() != b"chunked"):
        raise Refused(errors.BAD_CODING)
    if lengths is not None and codings is not None:
        raise Refused(errors.LENGTH_AND_CODING)
    connection = b",".join(fields.get(b"connection", [])).lower()
    expectations = fields.get(b"expect")
    if expectations is not None and [value.lower() for value in expectations] != [b"100-continue"]:
        raise Refused(errors.UNKNOWN_EXPECTATION)
    if target[:1] != b"/" and (prefix := _ABSOLUTE_FORM.match(target)):
        # RFC 9112 section 3.2.2: the absolute form is accepted, and its authority is not ours to check.
        rest = target[prefix.end() :]
        target = rest if rest[:1] == b"/" else b"/" + rest
    return Head(
        method=method,
        target=target,
        version=version,
        headers=headers,
        length=None if codings else _length(lengths),
        has_content=lengths is not None or codings is not None,
        # HTTP/1.0's keep-alive is not offered: RFC 9112 appendix C.2.2 tells what goes wrong.
        keep_alive=is_current and b"close" not in [token.strip() for token in connection.split(b",")],
        # RFC 9110 section 10.1.1: an HTTP/1.0 client cannot wait for it.
        expects_continue=expectations is not None and is_current,
    )


def _check_host(hosts: list[bytes], is_required: bool) -> None:
    if len(hosts) > 1 or (is_required and not hosts):
        raise Refused(errors.BAD_HOST)
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise Refused(errors.BAD_HOST)


def _length(values: list[bytes] | None) -> int:
    if values is None:
        return 0
    if len(values) > 1 or not values[0].isdigit():
        raise Refused(errors.BAD_LENGTH)
    # The digits are counted before int(), which fails in its own way on thousands of them.
    if len(values[0]) > _LENGTH_DIGITS or int(values[0]) > MAX_LENGTH:
        raise Refused(errors.BODY_TOO_LARGE)
    return int(values[0])
