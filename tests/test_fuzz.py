"""A fixed set of hostile samples for the two parsers that meet them first; ``tests/fuzz.py`` searches for more."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.uploads.parts import boundary_of
from lwstwisted.web.limits import Limits
from lwstwisted.web.wire import End
from tests.fuzz import (
    GOOD_FORMS,
    SEEDS,
    TARGETS,
    TOKENS,
    edited,
    events_of,
    failure_of,
    kind_of,
    parts_of,
    random_edits,
    smallest,
)
from tests.servers import PATIENCE
from tests.test_web_wire import NEXT, VALID

HERE = Path(__file__).parent.parent

SAMPLES = 30_000
"""For each parser, in a few seconds."""


def check(name: str, sample: bytes) -> None:
    """Fail with the shortest sample of the kind."""
    target = TARGETS[name]
    failure = failure_of(target, sample)
    if failure is not None:
        shortest = smallest(target, sample, kind_of(failure))
        raise AssertionError(f"{name}({shortest!r}): {failure_of(target, shortest)!r}") from failure


CHUNKED = b"PUT / HTTP/1.1\r\nHost:\r\nTransfer-Encoding:chunked\r\n\r\n"
FORM = b"\0multipart/form-data;boundary=B\n--B\r\n"
NAMED = b":form-data;name=a\r\n\r\n\r\n--B--"

FOUND: dict[str, dict[str, bytes]] = {
    "wire": {
        "a chunk's line exactly at its limit, its CR and LF apart": (
            b"\0" + CHUNKED + b"0000000000000001;" + b"x" * 4095 + b"\r\na\r\n0\r\n\r\n"
        ),
        "a size of 16 digits where no extension is allowed": b"\2" + CHUNKED + b"0000000000000000\r\n\r\n",
        "a size above the limit that is as long as may be": b"\2" + CHUNKED + b"8000000000000000\r\n",
        "the last CR and LF apart where no trailer is allowed": b"\2" + CHUNKED + b"0\r\n\r\n",
        "a malformed trailer of a byte too many": b"\2" + CHUNKED + b"0\r\n0\n",
        "a long line of a head whose end has not come": b"\0GET / HTTP/1.1\r\nX:" + b"x" * 8192 + b"\r\n",
        "a long line behind a bad request line": b"\1G\r\nX:" + b"x" * 50 + b"\r\n\r\n",
        "a long request line that is a bad one": b"\1" + b"x" * 60 + b"\r\n\r\n",
        "a bad byte behind what is too long": b"\1" + b"x" * 60 + b"\n",
        "a long line behind a long request line": b"\1" + b"x" * 60 + b"\r\n" + b"x" * 60,
        "a trailer that is a bad coding": b"\0" + CHUNKED + b"0\r\nTransfer-Encoding:\r\n\r\n",
        "a trailer that is a bad length": b"\0" + CHUNKED + b"0\r\nContent-Length:h\r\n\r\n" + NEXT,
        "what lies behind a refused request": b"\0\n" + bytes(100),
    },
    "form": {
        "a line end before the colon": FORM + b"Content-Disposition\n" + NAMED,
        "a CR before the name": FORM + b"\rContent-Disposition" + NAMED,
        "a control before the colon": FORM + b"Content-Disposition\x0b" + NAMED,
        "a control before the name": FORM + b"\x1fContent-Disposition" + NAMED,
        "a no-break space before the colon": FORM + "Content-Disposition\u00a0".encode() + NAMED,
        "a blank before the colon": FORM + b"Content-Disposition " + NAMED,
        "a header line of blanks at its limit": FORM + b"X:" + b" " * 8190 + b"\r\nContent-Disposition" + NAMED,
        "a malformed header line above its limit": b"\1" + FORM[1:] + b"X" * 100 + b"\r\n",
    },
}
"""What a search has found so far, by what it is."""


class FoundTests(SynchronousTestCase):
    """What went wrong once, and what the samples are made of."""

    def test_found(self) -> None:
        """Each sample that a search has found, under each of the limits and cut in several ways."""
        for name, found in FOUND.items():
            for what, sample in found.items():
                with self.subTest(what):
                    for way in (sample[0], *range(12)):
                        TARGETS[name](bytes([way]) + sample[1:])

    def test_seeds(self) -> None:
        """Each good or bad request and form, cut in each of several ways, under each of the limits."""
        for name, seeds in SEEDS.items():
            for seed in seeds:
                for way in range(12):
                    TARGETS[name](bytes([way]) + seed[1:])

    def test_good_ones(self) -> None:
        """Those that are good are not refused, or the search would be one for refusals."""
        for data in VALID:
            self.assertIsInstance(events_of([data], Limits())[-1], End, data)
        for kind, body in GOOD_FORMS:
            self.assertIsInstance(parts_of([body], boundary_of([kind])), list, body)


class SearchTests(SynchronousTestCase):
    """A search without a guide, the same in each run."""

    def search(self, name: str) -> None:
        rng = random.Random(name)
        for _ in range(SAMPLES):
            sample = edited(rng.choice(SEEDS[name]), random_edits(rng, TOKENS[name]))
            check(name, rng.randbytes(1) + sample[1:])

    @pytest.mark.slow
    def test_wire(self) -> None:
        """Whatever a client sends, and however it arrives: requests are those that h11 sees, or there is a refusal."""
        self.search("wire")

    @pytest.mark.slow
    def test_form(self) -> None:
        """Whatever a form looks like, and however it arrives: its parts are its parts, or there is a refusal."""
        self.search("form")


class CommandTests(SynchronousTestCase):
    """``python -m tests.fuzz``."""

    @pytest.mark.slow
    def test_search(self) -> None:
        """With atheris it searches for as long as one says, and without it tells what is missing."""
        command = [sys.executable, "-m", "tests.fuzz", "4"]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=6 * PATIENCE)
        if importlib.util.find_spec("atheris") is None:
            self.assertEqual(done.returncode, 2, done.stderr)
            self.assertIn("pip install", done.stderr)
        else:
            self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
            self.assertRegex(done.stdout, r"wire: #\d+\s+DONE +cov: \d+.*\nform: #\d+\s+DONE +cov: \d+")
