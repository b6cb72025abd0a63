"""Forms: what is read of them however they are cut, what is refused, and what becomes of their files."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multipart import PushMultipartParser
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SkipTest, SynchronousTestCase
from twisted.web.server import Site
from zope.interface import implementer

from lwstwisted import errors
from lwstwisted.errors import BodyStopped, Refusal, Refused
from lwstwisted.interfaces import Batch, Name, anything
from lwstwisted.stores.local import LocalStore
from lwstwisted.uploads import parts, transfer
from lwstwisted.uploads.form import FIELD_BYTES, Form
from lwstwisted.uploads.parts import (
    BOUNDARY_LENGTH,
    HEADER_BYTES,
    HEADER_LINES,
    PARTS,
    SLICE,
    SURROUNDINGS,
    Part,
    PartReader,
    boundary_of,
)
from lwstwisted.uploads.transfer import BLOCK, HIGH
from tests.contracts import EDGE, sample
from tests.servers import PATIENCE, serving, twistd, visible_beneath, wait_until
from tests.test_uploads_resource import KIB, MIB, FailingFile, SiteCase, everything
from tests.test_uploads_transfer import HeldFile

BOUNDARY = b"----Boundary7MA4YWxkTrZu0gW"
STATE_FOLDERS = [".lwstwisted", *(f".lwstwisted/{name}" for name in ("batches", "locks", "partial", "uploads"))]


def part(data: bytes, filename: str | bytes | None = None, *lines: bytes) -> bytes:
    """A part as a browser writes it, but for its boundary."""
    raw = filename.encode() if isinstance(filename, str) else filename
    named = b"" if raw is None else b'; filename="%b"' % raw
    head = b'Content-Disposition: form-data; name="field"%b\r\n' % named
    return head + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + data


def form_of(*parts: bytes, boundary: bytes = BOUNDARY) -> bytes:
    """A whole form."""
    return b"".join(b"--%b\r\n%b\r\n" % (boundary, part) for part in parts) + b"--%b--\r\n" % boundary


def pieces(data: bytes, cuts: Iterable[int]) -> Iterator[bytes]:
    """``data``, cut at some offsets."""
    edges = [0, *sorted(cuts), len(data)]
    for begin, end in itertools.pairwise(edges):
        if begin < end:
            yield data[begin:end]


def read(deliveries: Iterable[bytes], boundary: bytes = BOUNDARY) -> list[tuple[bytes | None, bytes]]:
    """The parts of a form: file names and contents. Each must begin and end once."""
    reader, found, is_open = PartReader(boundary), list[tuple[bytes | None, bytes]](), False
    for delivery in deliveries:
        for event in reader.feed(delivery):
            if isinstance(event, Part):
                assert not is_open, "a part in a part"
                is_open = True
                found.append((event.filename, b""))
            elif event is None:
                assert is_open, "ended twice"
                is_open = False
            else:
                assert is_open and event, "content without a part"
                found[-1] = (found[-1][0], found[-1][1] + event)
    reader.end()
    assert not is_open, "no end"
    return found


def refusal_in(deliveries: Iterable[bytes], boundary: bytes = BOUNDARY) -> Refusal | None:
    """What a form is refused with."""
    try:
        read(deliveries, boundary)
    except Refused as refused:
        return refused.refusal
    return None


def each_byte(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


class CutTests(SynchronousTestCase):
    """Contents are exact, whatever they look like and however they are cut (rows 31 and 32)."""

    def test_sizes_and_boundary_lengths(self) -> None:
        """Row 31: each file begins and ends once, also an empty one, for every length of the boundary."""
        sizes = [0, 1, *(edge + by for edge in (64, 1024, 4096, SLICE) for by in (-1, 0, 1))]
        for length in range(1, BOUNDARY_LENGTH + 1):
            boundary = sample(length).hex().encode()[:length]
            # The edge of a slice comes to lie at each place in and around the boundary.
            around = [SLICE - by for by in range(-length - 6, length + 6, 7)] if length in (1, 35, 70) else []
            for size in (*sizes, *around):
                data = sample(size)
                body = form_of(part(b"v"), part(data, "a"), part(b"", "b"), boundary=boundary)
                found = read(pieces(body, range(0, len(body), SLICE)), boundary)
                self.assertTrue(found == [(None, b"v"), (b"a", data), (b"b", b"")], (length, size))

    def test_near_boundaries_cut_everywhere(self) -> None:
        """Row 32: what only begins like a boundary is content, wherever the deliveries are cut."""
        for boundary in (b"B", BOUNDARY, b"x" * BOUNDARY_LENGTH):
            near = [b"\r\n--" + boundary[:-1] + b"X", b"\r\r\n--" + boundary[:-1], b"\r\n-" + boundary, b"\r", b"\r\n"]
            near += [b"\n--" + boundary, b"--" + boundary, b"\r\n--\r\n--", b"\r\n--" + boundary[:-1] + b"\r\n--"]
            for literal in near:
                for data in (literal, b"a" + literal + b"b"):
                    # Right behind the head, a boundary without its CRLF is content as well.
                    body = form_of(part(data, "a"), part(data, "b"), boundary=boundary)
                    wanted = [(b"a", data), (b"b", data)]
                    self.assertEqual(read([body], boundary), wanted)
                    self.assertEqual(read(each_byte(body), boundary), wanted)
                    for cut in range(1, len(body)):
                        self.assertEqual(read(pieces(body, [cut]), boundary), wanted, (literal, cut))

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def test_random_contents_and_cuts(self, data: Any) -> None:
        boundary = data.draw(st.sampled_from([b"B", b"--", b"BOUNDARY"]))
        crumbs = [b"\r", b"\n", b"-", b"--", b"\r\n--", boundary, boundary[:-1], b"\r\n--" + boundary[:-1], b"x"]
        content = st.lists(st.sampled_from(crumbs), max_size=30).map(b"".join)
        # The boundary of a form is one that its contents don't have.
        content = content.filter(lambda one: b"\r\n--" + boundary not in b"\r\n" + one + b"\r\n")
        files = data.draw(st.lists(st.tuples(st.sampled_from([None, b"", b"name"]), content), max_size=5))
        body = form_of(*(part(one, name) for name, one in files), boundary=boundary)
        cuts = data.draw(st.sets(st.integers(0, len(body)), max_size=20))
        around = data.draw(st.sampled_from([b"", b"\r\n", b"preamble\r\n"]))
        body = around + body + data.draw(st.sampled_from([b"", b"\r\n", b"epilogue"]))
        self.assertEqual(read(pieces(body, cuts), boundary), files)
        self.assertEqual(read(each_byte(body), boundary), files)

    def test_cut_off_everywhere(self) -> None:
        """Row 34: a form that ends before its last boundary is refused, wherever it ends."""
        body = form_of(part(b"value"), part(b"content", "a"), part(b"", "b"))
        complete = len(body) - len(b"\r\n")
        for end in range(len(body)):
            for deliveries in ([body[:end]], each_byte(body[:end])):
                refusal = refusal_in([one for one in deliveries if one])
                self.assertIs(refusal, errors.FORM_CUT if end < complete else None, end)

    def test_what_is_around(self) -> None:
        """A preamble and an epilogue are ignored up to a limit, the same however they are cut."""
        form = form_of(part(b"x", "a"))
        for size in (0, 1, 100, SURROUNDINGS - 2):
            body = bytes(size) + b"\r\n" + form + bytes(size)
            for step in (1, 3, 1000, SLICE):
                if step > 1 or size < 1000:
                    self.assertEqual(read(pieces(body, range(0, len(body), step))), [(b"a", b"x")], (size, step))
        long = bytes(SURROUNDINGS - 1) + b"\r\n"
        for body in (long + form, b"\r" * len(long) + form, 2 * long):
            for step in (7, 1000, SLICE):
                refusal = refusal_in(pieces(body, range(0, len(body), step)))
                self.assertIs(refusal, errors.FORM_TOO_LARGE, step)
        body = form + bytes(3 * SURROUNDINGS)
        self.assertIs(refusal_in(pieces(body, range(0, len(body), SLICE))), errors.FORM_TOO_LARGE)


class RefusalTests(SynchronousTestCase):
    """What a form must not be."""

    def test_malformed(self) -> None:
        """Each is refused, in one delivery and byte by byte."""
        good = part(b"x", "a")
        table = [
            (b"x" + form_of(good), errors.BAD_FORM),
            (b"preamble\r" + form_of(good), errors.BAD_FORM),
            (b"preamble\n" + form_of(good, good), errors.BAD_FORM),
            (b"--" + BOUNDARY + b"x\r\n" + good, errors.BAD_FORM),
            (b"--" + BOUNDARY + b"\n" + good, errors.BAD_FORM),
            (form_of(good).replace(b"--\r\n", b"-x\r\n"), errors.BAD_FORM),
            (form_of(part(b"\r\n--" + BOUNDARY + b"X", "a")), errors.BAD_FORM),
            (form_of(b"\r\nx"), errors.BAD_FORM),
            (form_of(b"no colon\r\n" + good), errors.BAD_FORM),
            (form_of(b"bad name: x\r\n" + good), errors.BAD_FORM),
            (form_of(b"Content-Type: text/plain\r\n\r\nx"), errors.BAD_FORM),
            (form_of(part(b"x", "a", b" folded: line")), errors.BAD_FORM),
            (form_of(part(b"x", "a", b"X: a\nb")), errors.BAD_FORM),
            (form_of(part(b"x", "a", b"X: a\rb")), errors.BAD_FORM),
            (form_of(part(b"x", "a", b"X: a\0b")), errors.BAD_FORM),
            (form_of(part(b"x", "a", b"X: \xff")), errors.BAD_FORM),
            (form_of(part(b"x", "a", b"X: 1", b"x: 2")), errors.BAD_FORM),
            (form_of(part(b"x", "a", b"Content-Length: 2")), errors.BAD_FORM),
            (form_of(part(b"x", "a", b"Content-Disposition: form-data; name=x")), errors.BAD_FORM),
            (form_of(good.replace(b"form-data", b"attachment")), errors.BAD_FORM),
            (form_of(good.replace(b' name="field";', b"")), errors.BAD_FORM),
            (form_of(part(b"x", None, b"Content-Type: multipart/mixed; boundary=y")), errors.BAD_FORM),
            (form_of(part(b"x", "a", b"Content-Transfer-Encoding: base64")), errors.PART_ENCODING),
            (form_of(part(b"x", "a", b"Content-Encoding: gzip")), errors.PART_ENCODING),
        ]
        for body, refusal in table:
            self.assertIs(refusal_in([body]), refusal, body)
            self.assertIs(refusal_in(each_byte(body)), refusal, body)
        for line in (b"Content-Transfer-Encoding: Binary", b"Content-Encoding: identity", b"Content-Length: 1"):
            self.assertIsNone(refusal_in([form_of(part(b"x", "a", line))]), line)

    def test_limits(self) -> None:
        """Exactly as much as the limit is good, one more is not, however it is cut."""
        head = len(part(b"", "a")) - 2
        line = b"X-" + b"n" * 98 + b": "

        def lines(total: int) -> list[bytes]:
            """Two lines that make a head of so many bytes."""
            left = total - head - len(line) - 2 - len(b"Y: \r\n")
            return [line, b"Y: " + b"v" * left]

        for make, limit in (
            (lambda count: form_of(*[part(b"x")] * count), PARTS),
            (lambda count: form_of(part(b"x", "a", *[b"X-%d: y" % at for at in range(count - 1)])), HEADER_LINES),
            (lambda count: form_of(part(b"x", "a", *lines(count))), HEADER_BYTES),
            (lambda count: form_of(part(b"x", "a", b"X: " + b"v" * (count - head - 5))), HEADER_BYTES),
        ):
            for count in (limit, limit + 1, 2 * limit):
                body, refusal = make(count), None if count == limit else errors.FORM_TOO_LARGE
                self.assertIs(refusal_in(pieces(body, range(0, len(body), SLICE))), refusal, (limit, count))
                self.assertIs(refusal_in(pieces(body, range(0, len(body), 1))), refusal, (limit, count))

    def test_content_type(self) -> None:
        """A boundary of 1 to 70 characters, quoted or not; anything else is refused."""
        for value, boundary in (
            ("multipart/form-data; boundary=x", "x"),
            ("Multipart/Form-Data;BOUNDARY=x;charset=utf-8", "x"),
            ('multipart/form-data ; charset="utf-8" ; boundary="a b:c"', "a b:c"),
            ("multipart/form-data; boundary=----=_Part_1:2/3", "----=_Part_1:2/3"),
            ("multipart/form-data; boundary=x;", "x"),
            (f"multipart/form-data; boundary={'x' * 70}", "x" * 70),
            ("multipart/form-data; boundary=\"'()+_,-./:=?\"", "'()+_,-./:=?"),
        ):
            self.assertEqual(boundary_of([value.encode()]), boundary.encode(), value)
        table = {
            errors.BAD_BOUNDARY: [
                *("multipart/form-data", "multipart/form-data; boundary", "multipart/form-data; boundary="),
                *('multipart/form-data; boundary=""', 'multipart/form-data; boundary="x'),
                *('multipart/form-data; boundary="x "', 'multipart/form-data; boundary="a\\b"'),
                *('multipart/form-data; boundary="a;b"', "multipart/form-data; boundary=a b"),
                *("multipart/form-data; boundary=x; boundary=x", "multipart/form-data; boundary=é"),
                *(f"multipart/form-data; boundary={'x' * 71}", 'multipart/form-data; boundary="a\tb"'),
            ],
            errors.NOT_A_FORM: [
                *("", "text/plain", "multipart/mixed; boundary=x", "multipart/form-database; boundary=x"),
                *("application/x-www-form-urlencoded", "xmultipart/form-data; boundary=x"),
            ],
        }
        for refusal, values in table.items():
            for value in values:
                with self.assertRaises(Refused, msg=value) as caught:
                    boundary_of([value.encode()])
                self.assertIs(caught.exception.refusal, refusal, value)
        for values in ([], [b"multipart/form-data; boundary=x"] * 2):
            with self.assertRaises(Refused):
                boundary_of(values)


class OtherParserTests(RefusalTests):
    """With a version of the parser that doesn't show its lines to us."""

    def setUp(self) -> None:
        self.patch(parts, "_Parser", PushMultipartParser)


class FilenameTests(SynchronousTestCase):
    """Row 33: a name comes whole and decoded, or the form is refused."""

    def name_in(self, parameters: str) -> bytes | None:
        head = f"Content-Disposition: form-data; name=field{parameters}\r\n\r\nx".encode()
        ((name, _),) = read([form_of(head)])
        return name

    def test_forms_of_names(self) -> None:
        """As browsers, old and new clients write them; ``filename`` wins over ``filename*`` (RFC 7578 section 4.2)."""
        long_name = "é" * 127
        for parameters, name in (
            ("", None),
            ('; filename=""', ""),
            ('; filename="a b.txt"', "a b.txt"),
            ("; filename=a.txt", "a.txt"),
            ('; FileName="a"', "a"),
            ('  ;  filename = "a"  ', "a"),
            (f'; filename="{long_name}"', long_name),
            ('; filename="日本語.txt"', "日本語.txt"),
            ('; filename="100%.txt"', "100%.txt"),
            ('; filename="a%22b%22"', 'a"b"'),
            ('; filename="a%0D%0Ab"', "a\r\nb"),
            ('; filename="a\\"b"', 'a"b'),
            ('; filename="a\\\\b"', "a\\b"),
            ('; filename="C:\\dir\\x"', "C:\\dir\\x"),
            ('; filename="a;b=c"; x="y"', "a;b=c"),
            ("; filename*=UTF-8''%e2%82%ac%20rates", "€ rates"),
            ("; filename*=utf-8'en'a%2Fb", "a/b"),
            ("; filename*=iso-8859-1'en'%A3%20rates", "£ rates"),
            ("; filename*=UTF-8''", ""),
            ("; filename=\"plain\"; filename*=UTF-8''extended", "plain"),
            ("; filename*=UTF-8''extended; filename=\"plain\"", "plain"),
            ('; filename*=nonsense; filename="plain"', "plain"),
        ):
            self.assertEqual(self.name_in(parameters), None if name is None else name.encode(), parameters)
        self.assertEqual(self.name_in("; filename*=UTF-8''%ff"), b"\xff")

    def test_no_name_is_guessed(self) -> None:
        """What can't be read, or only in pieces, is refused and not taken for a field."""
        for parameters, refusal in (
            ("; filename*=a", errors.NAME_ENCODING),
            ("; filename*=UTF-16''a", errors.NAME_ENCODING),
            ("; filename*=UTF-8''%zz", errors.NAME_ENCODING),
            ("; filename*=\"UTF-8''a b\"", errors.NAME_ENCODING),
            ("; filename*0=a; filename*1=b", errors.BAD_FORM),
            ("; filename*0*=UTF-8''a", errors.BAD_FORM),
            ('; filename="a"; filename="b"', errors.BAD_FORM),
            ('; filename="a', errors.BAD_FORM),
            ('; filename="a"b', errors.BAD_FORM),
            ("; filename=a b", errors.BAD_FORM),
            ("; filename=é", errors.BAD_FORM),
            ("; filename", errors.BAD_FORM),
        ):
            with self.assertRaises(Refused, msg=parameters) as caught:
                self.name_in(parameters)
            self.assertIs(caught.exception.refusal, refusal, parameters)


class HeldStore:
    """A store that answers when the test says so; a batch of it is itself."""

    def __init__(self, is_held: bool = True) -> None:
        self.is_held = is_held
        self.opening: Deferred[None] | None = None
        self.files: dict[Name, HeldFile] = {}
        self.committed = self.discarded = 0

    def batch(self) -> Any:
        return self

    async def create(self, name: Name, *options: Any) -> Any:
        if self.is_held:
            self.opening = Deferred()
            await self.opening
            self.opening = None
        file = self.files[name] = HeldFile(at_once=not self.is_held)
        file.etag = f'"{name[-1]}"'  # type: ignore[attr-defined]
        return file

    async def commit(self) -> list[bool]:
        self.committed += 1
        return [True] * len(self.files)

    async def discard(self) -> None:
        self.discarded += 1

    def answer(self) -> bool:
        """Answer one call; False if none waits."""
        if self.opening is not None:
            self.opening.callback(None)
            return True
        for file in self.files.values():
            if file.held is not None:
                file.answer()
                return True
        return False


@implementer(IPushProducer)
class HeldBody:
    """A body that delivers while it isn't paused, as exactly as ours."""

    DELIVERY = 256 * KIB

    def __init__(self, form: Form, data: bytes) -> None:
        self.form = form
        self.left = memoryview(data)
        self.is_paused = self.is_stopped = False
        self.pauses = 0
        form.registerProducer(self, True)

    def pump(self) -> None:
        while self.left and not self.is_paused and not self.is_stopped:
            piece, self.left = self.left[: self.DELIVERY], self.left[self.DELIVERY :]
            # The memory is lent for the length of the call only.
            lent = bytearray(piece)
            self.form.bufferReceived(memoryview(lent))
            lent[:] = bytes(len(lent))

    def pauseProducing(self) -> None:
        assert not self.is_paused
        self.is_paused = True
        self.pauses += 1

    def resumeProducing(self) -> None:
        assert self.is_paused
        self.is_paused = False
        self.pump()

    def stopProducing(self) -> None:
        self.is_stopped = True
        self.form.unregisterProducer()


def begin(store: Any, data: bytes, max_size: int = 1 << 60) -> tuple[Form, HeldBody]:
    form = Form(store, ("folder",), BOUNDARY, max_size, anything)
    return form, HeldBody(form, data)


class FlowTests(SynchronousTestCase):
    """What waits while the store is busy, and what becomes of a form that ends early."""

    def test_body_waits_for_each_call(self) -> None:
        """While a file is opened, written or made durable nothing more is taken than a delivery."""
        data = sample(3 * HIGH)
        body = form_of(part(b"small", "a"), part(data, "b"), part(b"", "c"))
        store = HeldStore()
        form, source = begin(store, body)
        source.pump()
        self.assertIsNotNone(store.opening)
        self.assertEqual((source.is_paused, len(body) - len(source.left)), (True, source.DELIVERY))
        while store.answer():
            taken = len(body) - len(source.left)
            blocks = sum(len(block) for file in store.files.values() for block in file.blocks)
            self.assertLessEqual(taken - blocks, HIGH + SLICE + BLOCK + source.DELIVERY)
            self.assertLessEqual(sum(map(len, form._slices)), source.DELIVERY)
        self.assertGreater(source.pauses, 3)
        finished = Deferred.fromCoroutine(form.finish())
        while store.answer():
            pass
        stored = self.successResultOf(finished)
        self.assertEqual([(file.name, file.size) for file in stored], [("a", 5), ("b", len(data)), ("c", 0)])
        self.assertTrue(store.files[("folder", "b")].committed == data)
        self.assertEqual((store.committed, store.discarded), (1, 0))

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        sizes=st.lists(st.tuples(st.booleans(), st.integers(0, 3 * KIB)), max_size=8),
        delivery=st.integers(1, 5 * KIB),
        is_held=st.booleans(),
    )
    def test_contents_are_exact(self, sizes: list[tuple[bool, int]], delivery: int, is_held: bool) -> None:
        parts = [part(sample(size), f"{at}" if is_file else None) for at, (is_file, size) in enumerate(sizes)]
        store = HeldStore(is_held)
        form, source = begin(store, form_of(*parts))
        source.DELIVERY = delivery  # type: ignore[misc]
        source.pump()
        while store.answer():
            pass
        self.assertEqual(len(source.left), 0)
        finished = Deferred.fromCoroutine(form.finish())
        while store.answer():
            pass
        wanted = {f"{at}": sample(size) for at, (is_file, size) in enumerate(sizes) if is_file}
        if wanted:
            self.successResultOf(finished)
            self.assertEqual({name[-1]: file.committed for name, file in store.files.items()}, wanted)
        else:
            self.assertIs(self.failureResultOf(finished, Refused).value.refusal, errors.FORM_WITHOUT_FILE)

    def test_cut_at_each_call(self) -> None:
        """A client that leaves, whatever the store is doing: that is waited for, and all is dropped."""
        body = form_of(part(b"small", "a"), part(sample(HIGH), "b"), part(b"", "c"))
        for calls in range(100):
            store = HeldStore()
            form, source = begin(store, body)
            source.pump()
            if not all(store.answer() for _ in range(calls)):
                break
            source.stopProducing()
            aborted = Deferred.fromCoroutine(form.abort())
            while not aborted.called and store.answer():
                pass
            self.successResultOf(aborted)
            self.assertIsInstance(form.failure, BodyStopped)
            self.assertEqual((store.committed, store.discarded), (0, 1), calls)
            self.assertTrue(all(file.committed is not None or file.discarded for file in store.files.values()))
        self.assertGreater(calls, 6)

    def test_failure_between_deliveries(self) -> None:
        """A write that fails while nothing arrives ends the body at once, not with the next delivery."""
        store = HeldStore()
        form, source = begin(store, form_of(part(sample(2 * MIB), "a"))[: MIB])
        source.pump()
        store.answer()
        (file,) = store.files.values()
        file._fail_at = 0
        self.assertFalse(source.is_stopped)
        while store.answer():
            pass
        self.assertTrue(source.is_stopped)
        self.assertIs(form.failure, file.refusal)

    def test_store_that_answers_at_once(self) -> None:
        """A body that delivers inside ``resumeProducing`` is neither lost, doubled nor nested."""
        data = sample(5 * HIGH)
        store = HeldStore(is_held=False)
        form, source = begin(store, form_of(part(data, "a"), part(data, "b")))
        source.pump()
        self.successResultOf(Deferred.fromCoroutine(form.finish()))
        self.assertTrue(all(file.committed == data for file in store.files.values()))

    def test_hostile_bodies(self) -> None:
        """8 MB of what parsers stumble over: bounded slices, bounded events for each, and a definite end."""
        fields = form_of(*[part(b"")] * (PARTS + 1))
        for content, refusal in (
            (form_of(part(b"\r" * 8_000_000, "a")), None),
            (form_of(part(b"\r\n" * 4_000_000, "a")), None),
            (form_of(part((b"\r\n--" + BOUNDARY[:-1]) * 250_000, "a")), None),
            (form_of(part(b"\r" * 8_000_000)), errors.FORM_TOO_LARGE),
            (fields, errors.FORM_TOO_LARGE),
            (b"\r\n" * 4_000_000, errors.FORM_TOO_LARGE),
            (form_of(part(b"", "a")) + b"\r\n" * 4_000_000, errors.FORM_TOO_LARGE),
        ):
            store = HeldStore(is_held=False)
            form, source = begin(store, content)
            fed: list[int] = []
            events: list[int] = []
            feed = form._parts.feed

            def counted(
                data: bytes, feed: Callable[[bytes], Any] = feed, fed: list[int] = fed, events: list[int] = events
            ) -> Any:
                fed.append(len(data))
                events.append(0)
                for event in feed(data):
                    events[-1] += 1
                    yield event

            form._parts.feed = counted  # type: ignore[method-assign]
            source.pump()
            self.assertLessEqual(max(fed), SLICE)
            self.assertLessEqual(max(events), 3 * PARTS + 1)
            if refusal is None:
                self.successResultOf(Deferred.fromCoroutine(form.finish()))
            else:
                self.assertTrue(source.is_stopped)
                assert isinstance(form.failure, Refused)
                self.assertIs(form.failure.refusal, refusal)
                self.assertLessEqual(sum(fed), 4 * SLICE)


class FailingBatchStore(LocalStore):
    """A store of which one call for a batch fails: its reservation, a create, an append, a commit of a file or of all.

    :ivar fail_at: which, counted from 0.
    """

    fail_at = -1
    calls = 0

    def batch(self) -> Any:
        self.calls = 0
        return FailingBatch(super().batch(), self)

    def count(self) -> None:
        self.calls += 1
        if self.calls > self.fail_at:
            raise Refused(errors.DISK_FULL)


class FailingBatch:
    def __init__(self, batch: Batch, store: FailingBatchStore) -> None:
        self._batch = batch
        self._store = store

    async def reserve(self, length: int) -> None:
        self._store.count()
        await self._batch.reserve(length)  # type: ignore[attr-defined]

    async def create(self, *options: Any) -> Any:
        self._store.count()
        return CountedFile(await self._batch.create(*options), self._store)

    async def commit(self) -> list[bool]:
        self._store.count()
        return await self._batch.commit()

    async def discard(self) -> None:
        await self._batch.discard()


class CountedFile(FailingFile):
    def __init__(self, file: Any, store: FailingBatchStore) -> None:
        super().__init__(file, 0)
        self._count = store.count  # type: ignore[method-assign]


CONTENT_TYPE = "multipart/form-data; boundary=" + BOUNDARY.decode()


class Posting:
    """What every site must do. A mixin, for a streaming site and a stock one."""

    async def post(self: Any, path: str, body: bytes | Iterable[bytes], **fields: str) -> Any:
        return await self.ask("POST", path, body, **{"Content_Type": CONTENT_TYPE, **fields})

    def visible(self: Any) -> dict[str, bytes]:
        return {
            name: (self.root / name).read_bytes()
            for name in visible_beneath(self.root)
            if (self.root / name).is_file()
        }

    async def test_several_files(self: Any) -> None:
        """All of them are in the folder, and the answer says so for a program."""
        await self.ask("PUT", "/files/new%20folder/old", b"old")
        data = sample(3 * MIB + 1)
        body = form_of(part(b"value"), part(data, "big.bin"), part(b"", "empty"), part(b"x", "old"), part(b"end"))
        for is_chunked in (False, True):
            sent = iter([body[at : at + 70_001] for at in range(0, len(body), 70_001)]) if is_chunked else body
            answer = await self.post("/files/new%20folder/", sent, Accept="application/json")
            self.assertEqual((answer.status, answer["Content-Type"]), (201, "application/json"))
            files = json.loads(answer.body)
            self.assertEqual([file["name"] for file in files], ["big.bin", "empty", "old"])
            self.assertEqual([file["size"] for file in files], [len(data), 0, 1])
            self.assertEqual([file["created"] for file in files], [not is_chunked, not is_chunked, False])
            for file in files:
                found = await self.ask("GET", file["path"])
                self.assertEqual((found.status, found["ETag"]), (200, file["etag"]))
            self.assertTrue(
                self.visible() == {"new folder/big.bin": data, "new folder/empty": b"", "new folder/old": b"x"}
            )

    async def test_digest(self: Any) -> None:
        """A form that was damaged on its way stores nothing, though it may look like one."""
        body = form_of(part(b"content", "a"), part(b"x", "b"))
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        for field in ("Content_Digest", "Repr_Digest"):
            damaged = body.replace(b"content", b"contemt")
            answer = await self.post("/files/", damaged, **{field: f"sha-256=:{digest}:"})
            self.assertEqual((answer.status, b"send it again" in answer.body), (400, True))
            self.assertEqual(self.visible(), {})
        self.assertEqual((await self.post("/files/", body, Content_Digest="sha-256=nonsense")).status, 400)
        self.assertEqual((await self.post("/files/", body, Content_Digest=f"sha-256=:{digest}:")).status, 201)
        self.assertEqual(self.visible(), {"a": b"content", "b": b"x"})

    async def test_page_for_people(self: Any) -> None:
        """Whatever the names are, the page shows them as text, and its links lead to them."""
        names = ["<script>", "a&amp;b", "100%", "a?b#c", "é ü", "'q'", "日本語"]
        body = form_of(*(part(name.encode(), name) for name in names), part(b"q", '%22><img src=x onerror=alert(1)>'))
        for path in ("/files/f%C3%B6/", "/files/", "/files"):
            answer = await self.post(path, body)
            self.assertEqual((answer.status, answer["Content-Type"]), (201, "text/html; charset=utf-8"))
            self.assertIn("default-src 'none'", answer["Content-Security-Policy"])
            self.assertEqual(answer["X-Content-Type-Options"], "nosniff")
            page = answer.body.decode()
            self.assertFalse({"script", "img"} & set(re.findall(r"<(\w+)", page)))
            links = re.findall(r'<a href="([^"]*)">', page)
            self.assertEqual(len(links), len(names) + 2)
            for link in links:
                self.assertEqual((await self.ask("GET", link)).status, 200, link)

    async def test_names(self: Any) -> None:
        """Row 33: a name is stored whole, in its composed form, or the whole form is refused."""
        before = everything(self.root)
        for name, refusal in (
            ("", errors.NAME_EMPTY),
            (".", errors.NAME_DOTS),
            ("..", errors.NAME_DOTS),
            ("a/b", errors.NAME_ENCODING),
            ("../a", errors.NAME_ENCODING),
            ("a\\b", errors.NAME_ENCODING),
            ("C:\\a", errors.NAME_ENCODING),
            ("a%2fb", errors.NAME_ENCODING),
            ("a%0Ab", errors.NAME_CONTROL),
            ("a%0Db", errors.NAME_CONTROL),
            ("a\u0085b", errors.NAME_CONTROL),
            (".lwstwisted", errors.NAME_RESERVED),
            ("x" * 256, errors.NAME_TOO_LONG),
            ("é" * 128, errors.NAME_TOO_LONG),
        ):
            # Good files before and after it are not stored either.
            answer = await self.post("/files/", form_of(part(b"x", "good"), part(b"x", name), part(b"x", "also")))
            self.assert_refused(answer, refusal, name)
            self.assertEqual(everything(self.root), before, name)
        for name in ("x" * 255, "é" * 127, unicodedata.normalize("NFD", "é"), "-rf", "a b", "a%22b"):
            stored = unicodedata.normalize("NFC", name.replace("%22", '"'))
            answer = await self.post("/files/", form_of(part(b"x", name)))
            self.assertEqual((answer.status, (self.root / stored).read_bytes()), (201, b"x"), name)
        decomposed = part(b"x", unicodedata.normalize("NFD", "ö"))
        answer = await self.post("/files/", form_of(part(b"x", "ö"), decomposed))
        self.assert_refused(answer, errors.FORM_NAME_TWICE)
        self.assertFalse((self.root / "ö").exists())

    async def test_nothing_to_store(self: Any) -> None:
        """A form without a file is refused; an input that was left empty is no file."""
        before = everything(self.root)
        empty = part(b"", "", b"Content-Type: application/octet-stream")
        for body in (form_of(), form_of(part(b"value")), form_of(empty, empty), form_of(part(b"x"), empty)):
            answer = await self.post("/files/folder/", body)
            if self.site_class is Site and body == form_of():
                self.assertEqual(answer.status, 400)  # twisted.web, which reads forms too
            else:
                self.assert_refused(answer, errors.FORM_WITHOUT_FILE)
        self.assertEqual(everything(self.root), before)
        self.assertEqual((await self.post("/files/", form_of(empty, part(b"x", "a")))).status, 201)
        self.assertEqual(self.visible(), {"a": b"x"})

    async def test_limits(self: Any) -> None:
        """A file of --max-size and a field of its limit are good; one byte more keeps the whole form back."""
        self.begin(LocalStore, max_size=1000)
        before = everything(self.root)
        for bad, refusal in (
            (part(bytes(1001), "b"), errors.BODY_TOO_LARGE),
            (part(bytes(3 * MIB), "b"), errors.BODY_TOO_LARGE),
            (part(bytes(FIELD_BYTES + 1)), errors.FORM_TOO_LARGE),
        ):
            body = form_of(part(b"x", "a"), bad)
            for sent in (body, iter([body[at : at + 5000] for at in range(0, len(body), 5000)])):
                self.assert_refused(await self.post("/files/folder/", sent), refusal)
            self.assertEqual(everything(self.root), before)
        body = form_of(part(bytes(1000), "a"), part(bytes(1000), "b"), part(bytes(FIELD_BYTES)))
        self.assertEqual((await self.post("/files/folder/", body)).status, 201)

    async def test_truncated(self: Any) -> None:
        """Row 34: the length is right and the last boundary missing: 400, and nothing of the form is left."""
        before = everything(self.root)
        body = form_of(part(sample(100_000), "a"), part(b"x" * 1000, "b"))
        for end in (0, 10, 100, 50_000, 100_000, len(body) - 500, len(body) - 5, len(body) - 3):
            answer = await self.post("/files/folder/", body[:end])
            self.assertEqual(answer.status, 400, end)
            if self.site_class is not Site:
                self.assert_refused(answer, errors.FORM_CUT, end)
            self.assertEqual(everything(self.root), before)

    async def test_heads(self: Any) -> None:
        """What is no form, or an encoded one, is refused before its body."""
        before = everything(self.root)
        body = form_of(part(b"x", "a"))
        self.assert_refused(await self.ask("POST", "/files/", body), errors.NOT_A_FORM)
        for fields, refusal in (
            ({"Content_Type": "text/plain"}, errors.NOT_A_FORM),
            ({"Content_Encoding": "gzip"}, errors.CONTENT_ENCODING),
            ({"If_Match": '"x"'}, errors.PRECONDITION_FAILED),
            ({"If_Match": "x"}, errors.BAD_CONDITION),
        ):
            self.assert_refused(await self.post("/files/", body, **fields), refusal, fields)
        for path, refusal in (
            ("/files/../", errors.NAME_DOTS),
            ("/files/a//", errors.NAME_EMPTY),
            ("/files/.lwstwisted/", errors.NAME_RESERVED),
            ("/files/a%2fb/", errors.NAME_ENCODING),
            ("/files/a", errors.METHOD_NOT_ALLOWED),
        ):
            self.assert_refused(await self.post(path, body), refusal, path)
        self.assertEqual(everything(self.root), before)
        await self.ask("PUT", "/files/file", b"x")
        self.assert_refused(await self.post("/files/file/", body), errors.NOT_A_FOLDER)

    async def test_methods_of_a_folder(self: Any) -> None:
        """That forms can be sent there is told."""
        for path in ("/files", "/files/", "/files/a/b/"):
            self.assertIn("POST", (await self.ask("OPTIONS", path))["Allow"].split(", "), path)
            self.assertIn("POST", (await self.ask("PATCH", path, b""))["Allow"].split(", "), path)
        self.assertNotIn("POST", (await self.ask("OPTIONS", "/files/a"))["Allow"].split(", "))

    async def test_conditions_hold_for_each_file(self: Any) -> None:
        """Who sends ``If-None-Match: *`` replaces nothing: one name that is taken keeps the others back."""
        await self.ask("PUT", "/files/b", b"old")
        body = form_of(*(part(b"new", name) for name in "abc"))
        answer = await self.post("/files/", body, If_None_Match="*")
        self.assert_refused(answer, errors.PRECONDITION_FAILED)
        self.assertEqual(self.visible(), {"b": b"old"})
        await self.ask("DELETE", "/files/b")
        self.assertEqual((await self.post("/files/", body, If_None_Match="*")).status, 201)

    async def test_store_fails_at_each_call(self: Any) -> None:
        """Rows 38 and 39: whichever call fails, there is one answer and nothing is left; and then it works."""
        for name, size in {"BLOCK": 8 * KIB, "WORTH_A_WRITE": 4 * KIB, "HIGH": 16 * KIB, "LOW": 8 * KIB}.items():
            self.patch(transfer, name, size)
        self.patch(transfer, "_spare", [])
        store = self.begin(FailingBatchStore)
        await self.ask("PUT", "/files/folder/b", b"old")
        before, open_before = everything(self.root), self.descriptors()
        body = form_of(part(sample(50_001), "a"), part(b"", "b"), part(b"x" * 5000, "c"))
        head = b"POST /files/folder/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: %b\r\n"
        head = head % CONTENT_TYPE.encode() + b"Content-Length: %d\r\n\r\n" % len(body)
        for store.fail_at in range(100):
            answer = await self.exchange(head, body)
            self.assertEqual(answer.count(b"HTTP/1.1 "), 1)
            if answer.startswith(b"HTTP/1.1 201 "):
                break
            self.assertTrue(answer.startswith(b"HTTP/1.1 507 "), answer)
            await self.until(lambda: self.descriptors() <= open_before, "all descriptors were closed")
            self.assertEqual(everything(self.root), before)
        # The reservation, three creates and commits, the appends of the first, and the commit of the batch.
        self.assertGreater(store.fail_at, 8 + 4)
        self.assertTrue(
            self.visible() == {"folder/a": sample(50_001), "folder/b": b"", "folder/c": b"x" * 5000}
        )

    async def test_curl(self: Any) -> None:
        """What ``curl -F`` sends is stored: several files, names in other scripts, fields beside them."""
        curl = shutil.which("curl")
        if curl is None:
            raise SkipTest("needs curl")
        names = ["big.bin", "empty", "é ü.txt", "日本語", 'a"b', "x" * 255]
        sent = self.folder / "sent"
        sent.mkdir()
        for at, name in enumerate(names):
            (sent / name).write_bytes(sample([2 * MIB + 1, 0, 1, EDGE, EDGE + 1, 5][at]))
        url = f"http://{self.address[0]}:{self.address[1]}/files/from%20curl/"
        quoted = [f'file{at}=@"{sent / name}"'.replace('a"b', 'a\\"b') for at, name in enumerate(names)]
        options = [word for one in quoted for word in ("-F", one)]
        command = [curl, "-sS", "-m", f"{PATIENCE}", "-H", "Accept: application/json", "--form-string", "a=@b;c"]
        done = await deferToThread(
            subprocess.run, [*command, "-F", "text=value", *options, url], capture_output=True, text=True
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual([file["name"] for file in json.loads(done.stdout)], names)
        found = self.root / "from curl"
        self.assertEqual(sorted(os.listdir(found)), sorted(names))
        self.assertTrue(all((found / name).read_bytes() == (sent / name).read_bytes() for name in names))

    async def test_client_leaves(self: Any) -> None:
        """Wherever a client stops in the middle of its form, nothing is left."""
        before = everything(self.root)
        await self.ask("GET", "/files/")
        await self.until_lost(self.came)  # else our end of that connection counts as open before
        open_before = self.descriptors()
        body = form_of(part(sample(3 * MIB), "a"), part(b"x", "b"), part(sample(MIB), "c"))
        head = b"POST /files/folder/ HTTP/1.1\r\nHost: x\r\nContent-Type: %b\r\n" % CONTENT_TYPE.encode()
        head += b"Content-Length: %d\r\n\r\n" % len(body)
        for size in (0, 10, 200, MIB, 3 * MIB + 300, len(body) - 1):
            number = self.came + 1

            def leave(size: int = size) -> None:
                with socket.create_connection(self.address, PATIENCE) as client:
                    client.sendall(head + body[:size])

            await deferToThread(leave)
            await self.until_lost(number)
            await self.until(lambda: self.descriptors() <= open_before, "all descriptors were closed")
            self.assertEqual(everything(self.root), before, size)
        self.assertEqual(self.flushLoggedErrors(), [])


class StreamingFormTests(Posting, SiteCase):
    """Under a StreamingSite a form arrives as it comes."""

    async def test_malformed_forms(self) -> None:
        """Each gets its sentence."""
        before = everything(self.root)
        for body, refusal in (
            (b"--" + BOUNDARY + b"x\r\n", errors.BAD_FORM),
            (form_of(part(b"x", "a"), b"no head\r\n\r\n"), errors.BAD_FORM),
            (bytes(SURROUNDINGS + 100), errors.FORM_TOO_LARGE),
            (form_of(*[part(b"x")] * (PARTS + 1)), errors.FORM_TOO_LARGE),
            (form_of(part(b"x", "a", b"Content-Transfer-Encoding: base64")), errors.PART_ENCODING),
        ):
            self.assert_refused(await self.post("/files/", body), refusal)
            self.assertEqual(everything(self.root), before)

    async def test_next_request(self) -> None:
        """Behind a form the connection goes on with the next request, also when the form was in one segment."""
        body = form_of(part(b"x", "a"))
        head = b"POST /files/ HTTP/1.1\r\nHost: x\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n"
        request = head % (CONTENT_TYPE.encode(), len(body)) + body
        last = b"GET /files/a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

        def run() -> bytes:
            with socket.create_connection(self.address, PATIENCE) as client:
                client.sendall(request + request + last)
                return b"".join(iter(lambda: client.recv(65536), b""))

        answer = await deferToThread(run)
        self.assertEqual(re.findall(rb"HTTP/1.1 (\d+)", answer), [b"201", b"201", b"200"])

    @pytest.mark.slow
    async def test_many_files(self) -> None:
        """1000 files in one form, by two clients at once, take few descriptors and come out as one of the two."""
        bodies = [form_of(*(part(b"%d" % client, f"{number}") for number in range(PARTS))) for client in range(2)]
        idle, peak = self.descriptors(), 0
        posts = [Deferred.fromCoroutine(self.post("/files/many/", body)) for body in bodies]

        def look() -> bool:
            nonlocal peak
            peak = max(peak, self.descriptors())
            return all(post.called for post in posts)

        await self.until(look, "both were answered")
        self.assertEqual([(await post).status for post in posts], [201, 201])
        # For each client: both ends of its connection, the batch, a file, and folders for the length of a call.
        self.assertLessEqual(peak - idle, 2 * 10)
        contents = {path.read_bytes() for path in (self.root / "many").iterdir()}
        self.assertEqual((len(contents), len(list((self.root / "many").iterdir()))), (1, PARTS))
        self.assertEqual([name for name in everything(self.root) if name.startswith(".")], STATE_FOLDERS)


class SpaceTests(SynchronousTestCase):
    """A form has its space when its body is accepted, or is refused before. Each is a real service."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.root = self.folder / "root"

    def start(self, *options: str) -> int:
        """A service; gives its port."""
        command = twistd("--root", self.root, "--listen", "tcp:0:interface=127.0.0.1", *options)
        return self.enterContext(serving(command, cwd=self.folder)).wait_for_ports()[0]

    def announce(self, port: int, size: int | None) -> socket.socket:
        """Begin a form, and ask whether it is wanted.

        :param size: announced bytes; None for a chunked form.
        """
        client = self.enterContext(socket.create_connection(("127.0.0.1", port), PATIENCE))
        length = "Transfer-Encoding: chunked" if size is None else f"Content-Length: {size}"
        head = ["POST /files/ HTTP/1.1", "Host: a", f"Content-Type: {CONTENT_TYPE}", length, "Expect: 100-continue"]
        client.sendall("\r\n".join([*head, "", ""]).encode())
        return client

    def told(self, client: socket.socket) -> bytes:
        """The first answer to a request."""
        with client.makefile("rb") as reader:
            lines = list(iter(reader.readline, b"\r\n"))
            length = [int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:")]
            return b"".join([*lines, b"\r\n", reader.read(sum(length))])

    def assert_told(self, client: socket.socket, refusal: Refusal) -> None:
        """A form is refused, and wasn't asked for its body."""
        said = self.told(client)
        self.assertEqual(said[:13], b"HTTP/1.1 %d " % refusal.status)
        self.assertIn(refusal.sentence.encode(), said)

    def assert_wanted(self, client: socket.socket) -> None:
        self.assertEqual(self.told(client), b"HTTP/1.1 100 Continue\r\n\r\n")

    def finish(self, client: socket.socket, body: bytes) -> int:
        """Send a form and wait for the answer; gives its status."""
        client.sendall(body)
        return int(client.recv(65536).split()[1])

    def test_disk(self) -> None:
        """Larger than what is free on the disk: 507 instead of 100; a form that fits is stored."""
        port = self.start()
        free = os.statvfs(self.root)
        self.assert_told(self.announce(port, 2 * free.f_bavail * free.f_frsize), errors.DISK_FULL)
        body = form_of(part(b"x", "a"))
        client = self.announce(port, len(body))
        self.assert_wanted(client)
        self.assertEqual(self.finish(client, body), 201)

    def test_quota(self) -> None:
        """Larger than the quota: 413. Larger than what is left of it: 507. Both before the body."""
        port = self.start("--quota", "100K")
        self.assert_told(self.announce(port, 100 * KIB + 1), errors.BODY_TOO_LARGE)
        body = form_of(part(bytes(20 * KIB), "a"), part(b"a field"), part(bytes(30 * KIB), "b"))
        first = self.announce(port, len(body))
        self.assert_wanted(first)
        self.assert_told(self.announce(port, len(body)), errors.QUOTA_EXCEEDED)
        self.assertEqual(self.finish(first, body), 201)
        # What the form had beside its files is there again: to the byte.
        self.assert_told(self.announce(port, 50 * KIB + 1), errors.QUOTA_EXCEEDED)
        second = self.announce(port, 50 * KIB)
        self.assert_wanted(second)
        self.assert_told(self.announce(port, 1), errors.QUOTA_EXCEEDED)
        # A client that leaves gives back.
        second.close()
        wait_until(lambda: self.told(self.announce(port, 50 * KIB))[:12] == b"HTTP/1.1 100", "the space came back")

    def test_refused_in_the_middle(self) -> None:
        """A form that fails, or that has no file, gives back all that it had."""
        port = self.start("--quota", "10K")
        for body, status in (
            (form_of(part(bytes(9 * KIB))), 400),
            (form_of(part(bytes(4 * KIB), "a"), part(bytes(4 * KIB), "a")), 400),
            (form_of(part(bytes(8 * KIB), "a"), part(b"x", "..")), 400),
            (form_of(part(bytes(9 * KIB), "a")), 201),
        ):
            client = self.announce(port, len(body))
            self.assert_wanted(client)
            self.assertEqual(self.finish(client, body), status, body[-100:])

    def test_chunked(self) -> None:
        """A form that doesn't say how long it is asks for its files as they come."""
        port = self.start("--quota", "10K")
        body = form_of(part(bytes(8 * KIB), "a"), part(bytes(2 * KIB), "b"))
        for extra, status in ((1, 507), (0, 201)):
            sent = body.replace(b'"b"\r\n\r\n', b'"b"\r\n\r\n' + extra * b"x")
            client = self.announce(port, None)
            self.assert_wanted(client)
            self.assertEqual(self.finish(client, b"%x\r\n%b\r\n0\r\n\r\n" % (len(sent), sent)), status)


class StockFormTests(Posting, SiteCase):
    """Under twisted.web's own Site the form has been spooled when the resource is asked."""

    site_class = Site
