"""The parts of a form (RFC 7578, RFC 2046 section 5.1): bytes in, events out; no I/O.

``multipart`` finds the boundaries. What is added here is what it leaves open: limits on everything that it does not
limit, the same answer however the bytes were cut on their way, and names that are never mended in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from multipart import MultipartError, MultipartSegment, ParserError, ParserLimitReached, PushMultipartParser

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.uploads.disposition import decode_extended, parse_disposition

SLICE = 64 * 1024
"""Bytes that are parsed at once: 0.1 ms of the loop, and a few copies of so much are all that parsing holds."""

PARTS = 1000
"""Parts of one form. A browser sends one for each file and field; Tomcat and Django draw the line at 10 to 1000."""

HEADER_LINES = 16
"""Header lines of a part; RFC 7578 section 4.8 knows three."""

HEADER_BYTES = 8 * 1024
"""Bytes of all header lines of a part: a name of 255 characters takes less than 3 KiB in any encoding."""

SURROUNDINGS = 64 * 1024
"""Bytes before the first boundary, which old mail programs greet with, and about as many behind the last one."""

BOUNDARY_LENGTH = 70
"""RFC 2046 section 5.1.1."""

_CHARACTERS = rb"[0-9A-Za-z'()+_,\-./:=?]"
_BOUNDARY = re.compile(rb"(?:%b| (?=.))+" % _CHARACTERS, re.DOTALL)
# Outside of quotes many clients write what is no token: "----=_Part_1:2".
_TYPE_PARAMETER = re.compile(
    rb'[ \t]*;[ \t]*(?:([0-9A-Za-z!#$%%&\'*+\-.^_`|~]+)=(?:"([^"\\]*)"|(%b+))[ \t]*)?'
    % _CHARACTERS.replace(b",", b"")
)
_FORM_TYPE = re.compile(rb"[ \t]*multipart/form-data[ \t]*(?=;|$)", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_HEADER_LINE = re.compile(rb"[0-9A-Za-z!#$%&'*+\-.^_`|~]+:[^\x00-\x08\x0a-\x1f\x7f]*")
_AS_IT_IS = {"7bit", "8bit", "binary"}


@dataclass(frozen=True, slots=True)
class Part:
    """The head of a part.

    :ivar filename: bytes of the name, as the user knows it and not checked; b"" for a file input that was left empty,
        None for any other field.
    """

    filename: bytes | None


def boundary_of(content_types: list[bytes]) -> bytes:
    """The boundary of a form.

    :param content_types: the values of all ``Content-Type`` fields of the request.
    :raises Refused: ``NOT_A_FORM``, ``BAD_BOUNDARY``.
    """
    value = content_types[0] if len(content_types) == 1 else b""
    kind = _FORM_TYPE.match(value)
    if kind is None:
        raise Refused(errors.NOT_A_FORM)
    at, found = kind.end(), []
    while at < len(value):
        parameter = _TYPE_PARAMETER.match(value, at)
        if parameter is None:
            raise Refused(errors.BAD_BOUNDARY)
        if (parameter[1] or b"").lower() == b"boundary":
            found.append(parameter[3] if parameter[2] is None else parameter[2])
        at = parameter.end()
    if len(found) != 1 or len(found[0]) > BOUNDARY_LENGTH or not _BOUNDARY.fullmatch(found[0]):
        raise Refused(errors.BAD_BOUNDARY)
    return found[0]


class _Parser(PushMultipartParser):  # type: ignore[misc]
    """Looks at each header line before blanks, other white space and line ends around its name are taken away.

    The parser has no public way to see a line as it came. Where a version of it has other methods, these are never
    called, and what it made of a line is all that is checked (:func:`_part_of`).
    """

    _head_bytes = 0

    def _on_segment_headerline(self, line: bytes) -> None:
        self._head_bytes += len(line) + len(b"\r\n")
        if self._head_bytes > HEADER_BYTES:
            raise ParserLimitReached("Maximum segment header length exceeded")
        if not _HEADER_LINE.fullmatch(line):
            raise ParserError("Malformed segment header")
        super()._on_segment_headerline(line)

    def _create_segment(self, headerlist: list[tuple[str, str]]) -> MultipartSegment:
        self._head_bytes = 0
        return super()._create_segment(headerlist)


class PartReader:
    """Reads one form.

    :param boundary: see :func:`boundary_of`.
    """

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        # What the parser would look at first is cut off here: it wants the boundary in its first chunk.
        self._preamble: bytes | None = b"\r\n"
        self._skipped = 0
        self._epilogue = 0
        self._is_complete = False
        # A line of HEADER_BYTES is too long together with its end, so this limit never decides alone.
        self._parser = _Parser(
            boundary,
            max_header_size=HEADER_BYTES,
            max_header_count=HEADER_LINES,
            max_segment_count=PARTS,
            strict=True,
        )

    def feed(self, data: bytes) -> Iterator[Part | bytes | None]:
        """Parse the next bytes; the events must be used up before the next call.

        :param data: at most :data:`SLICE` bytes.
        :returns: for each part its head, some pieces of its content, and None at its end.
        :raises Refused: ``BAD_FORM``, ``FORM_TOO_LARGE``, ``PART_ENCODING``; ``NAME_ENCODING`` for a file name.
        """
        if self._preamble is not None:
            data = self._without_preamble(self._preamble + data)
        if self._is_complete:
            self._skip_epilogue(data)
        elif data:
            try:
                for event in self._parser.parse(data):
                    yield _part_of(event) if isinstance(event, MultipartSegment) else event
            except ParserLimitReached:
                raise Refused(errors.FORM_TOO_LARGE) from None
            except MultipartError:
                # It dislikes whatever comes behind the last boundary, if only that came in another piece.
                if not self._has_ended():
                    raise Refused(errors.BAD_FORM) from None
                self._is_complete = True
                self._skip_epilogue(data)

    def end(self) -> None:
        """The body is over.

        :raises Refused: ``FORM_CUT`` if the form is not.
        """
        if not self._is_complete and not self._has_ended():
            raise Refused(errors.FORM_CUT)

    def _has_ended(self) -> bool:
        """Whether the last boundary was seen; nothing can be parsed afterwards."""
        try:
            self._parser.close()
        except MultipartError:
            return False
        return True

    def _without_preamble(self, data: bytes) -> bytes:
        """What is not in front of the first boundary."""
        at = data.find(self._delimiter[2:])
        # Where it isn't, it may still begin with the last bytes, and wants to know the two in front of it.
        skipped = at - 2 if at >= 0 else max(0, len(data) - len(self._delimiter) + 1)
        self._skipped += skipped
        if self._skipped > SURROUNDINGS:
            raise Refused(errors.FORM_TOO_LARGE)
        if at < 0:
            self._preamble = data[skipped:]
            return b""
        if data[at - 2 : at] != b"\r\n":
            raise Refused(errors.BAD_FORM)  # else the first part would pass for a preamble, and be lost
        self._preamble = None
        return data[at:]

    def _skip_epilogue(self, data: bytes) -> None:
        self._epilogue += len(data)
        if self._epilogue > SURROUNDINGS:
            raise Refused(errors.FORM_TOO_LARGE)


def _part_of(segment: MultipartSegment) -> Part:
    lines: list[tuple[str, str]] = segment.headerlist
    # Both have been looked at in the lines as they came, unless the parser doesn't let us (see _Parser).
    if sum(len(name) + len(value.encode()) + len(b": \r\n") for name, value in lines) > HEADER_BYTES:
        raise Refused(errors.FORM_TOO_LARGE)
    fields = {name.lower(): value for name, value in lines}
    if len(fields) < len(lines) or any(_CONTROL.search(value) for _, value in lines):
        raise Refused(errors.BAD_FORM)
    if fields.get("content-transfer-encoding", "binary").strip().lower() not in _AS_IT_IS:
        raise Refused(errors.PART_ENCODING)
    if fields.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refused(errors.PART_ENCODING)
    filename = _filename(_parameters(fields["content-disposition"]))
    if filename is None and fields.get("content-type", "").strip().lower().startswith("multipart/"):
        raise Refused(errors.BAD_FORM)  # files within a field (RFC 2388), which RFC 7578 section 4.3 has ended
    return Part(filename)


def _parameters(disposition: str) -> dict[str, str]:
    """The parameters of a Content-Disposition (RFC 7578 section 4.2)."""
    try:
        kind, found = parse_disposition(disposition, _unquoted)
    except ValueError:
        raise Refused(errors.BAD_FORM) from None
    if kind != "form-data":
        raise Refused(errors.BAD_FORM)
    return found


def _unquoted(value: str) -> str:
    r"""A quoted value, in either of the two ways: \" and \\, or %22, %0D and %0A (HTML, "multipart/form-data")."""
    if "\\" in value:
        return value.replace('\\"', '"').replace("\\\\", "\\")
    return value.replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n")


def _filename(parameters: dict[str, str]) -> bytes | None:
    if "filename" in parameters:
        return parameters["filename"].encode()
    extended = parameters.get("filename*")
    if extended is None:
        if any(name.startswith("filename*") for name in parameters):
            raise Refused(errors.BAD_FORM)  # a name in pieces (RFC 2231 section 3), which no form may have
        return None
    try:
        return decode_extended(extended)
    except ValueError:
        raise Refused(errors.NAME_ENCODING) from None
