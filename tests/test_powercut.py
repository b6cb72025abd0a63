"""What was acknowledged outlives a power cut, and the harness that says so would notice if it did not.

Here are as many cuts as fit in a minute; ``make powercut`` runs the others.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import SkipTest

import pytest
from twisted.trial.unittest import SynchronousTestCase

from tests.blocklog import FLUSH, SECTOR, WRITE, ZERO, Record, Replay
from tests.calllog import NOTED, PAGE, Calls, Weakest, begin_log, install, read_calls, uninstall
from tests.powercut import TOP, Outcome, Recording, judge_cuts, logged_cuts, record, replay_cut, shutdowns, where
from tests.powercut_disks import WEAKEST, missing, temporary_folder
from tests.powercut_history import History, Operation, content_of
from tests.powercut_http import Connections
from tests.powercut_load import Names, services
from tests.powercut_mutants import (
    AFTER_KILL,
    CHECKPOINT,
    HIDDEN_BY_EXT4,
    STORES,
    TOOK_EFFECT,
    environment,
    names,
    syncs,
)
from tests.powercut_recovery import FINISHED, State, look, recover, recovering, state_of
from tests.powercut_uploads import Uploader

LOAD_SECONDS = 1.0
SHUTDOWN_SECONDS = 5.0
"""In which as many cuts begin as can."""
CUTS = 100
MUTANT_CUTS = 1000
"""At most; one or two loads show a loss of nearly all."""

NOT_HERE = {"folder sync after link", "folder sync after rename", "write in place", "batch link overwrites"}
NOT_HERE |= {"bytes unlinked before the record", "offset read after the sync"}
"""Mutants that need the most cuts: ``python -m tests.powercut --mutants`` has them too. What the first three lack,
``OpenPartial._place.sync_folder`` and ``batch writes in place`` lack as well; :class:`StepTests` has the last two."""

FSYNCS = [("tree.py", "fdatasync"), ("tree.py", "fsync"), ("tree.py", "fsync")]
"""Of ``sync_file``, ``sync_file`` and ``sync_folder``."""

def require(method: str, kind: str) -> None:
    """Skip a test where there can't be power cuts."""
    reason = missing(method, kind)
    if reason:
        raise SkipTest(reason)


def scratch(case: SynchronousTestCase) -> Path:
    """A folder that goes with the test."""
    folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
    case.addCleanup(folder.cleanup)
    return Path(folder.name)


def operation(kind: str, files: dict[str, State], begun: int, ended: int | None) -> Operation:
    """One whose times are positions of the log as well."""
    return Operation(kind, files, begun, begun, ended, ended)


def verdict(found: dict[str, State], position: int, *operations: Operation) -> list[str]:
    """The first word of each problem, and the second one."""
    problems = History(operations=list(operations)).judge(found, position)
    return [" ".join(problem.split()[:2]).rstrip(",") for problem in problems]


class JudgeTests(SynchronousTestCase):
    """What counts as a loss. Times are positions of the log: 1-2 is an upload sent at 1 and acknowledged at 2."""

    def test_acknowledged_is_there(self) -> None:
        """A file that was acknowledged before the cut has to be there; one that was not may be."""
        put = operation("new", {"a": "A"}, 1, 5)
        self.assertEqual(verdict({"a": "A"}, 5, put), [])
        self.assertEqual(verdict({}, 5, put), ["lost: a"])
        self.assertEqual(verdict({}, 4, put), [])
        self.assertEqual(verdict({"a": "A"}, 4, put), [])

    def test_from_the_future(self) -> None:
        """A file that nobody had sent yet at the time of the cut can't be there."""
        put = operation("new", {"a": "A"}, 5, 6)
        self.assertEqual(verdict({"a": "A"}, 5, put), ["nobody sent"])
        self.assertEqual(verdict({"a": "A"}, 6, put), [])

    def test_never_older(self) -> None:
        """A file that was replaced may be newer than the last acknowledgement, never older."""
        first, second = operation("replace", {"a": "A"}, 1, 2), operation("replace", {"a": "B"}, 3, 4)
        third = operation("replace", {"a": "C"}, 5, None)
        self.assertEqual(verdict({"a": "A"}, 9, first, second, third), ["lost: a"])
        self.assertEqual(verdict({"a": "B"}, 9, first, second, third), [])
        self.assertEqual(verdict({"a": "C"}, 9, first, second, third), [])
        self.assertEqual(verdict({"a": "A"}, 3, first, second, third), [])

    def test_at_the_same_time(self) -> None:
        """Of two uploads under way at the same time either may be the last one."""
        first, second = operation("replace", {"a": "A"}, 1, 4), operation("replace", {"a": "B"}, 2, 3)
        for state in "AB":
            self.assertEqual(verdict({"a": state}, 9, first, second), [])
        self.assertEqual(verdict({}, 9, first, second), ["lost: a"])

    def test_deleted(self) -> None:
        """A file whose deletion was acknowledged stays away, unless somebody uploads it again."""
        put, deletion = operation("new", {"a": "A"}, 1, 2), operation("delete", {"a": None}, 3, 4)
        self.assertEqual(verdict({"a": "A"}, 9, put, deletion), ["lost: a"])
        self.assertEqual(verdict({}, 9, put, deletion), [])
        self.assertEqual(verdict({}, 3, put, deletion), ["lost: a"])
        self.assertEqual(verdict({"a": "B"}, 9, put, deletion, operation("replace", {"a": "B"}, 5, None)), [])

    def test_torn(self) -> None:
        """Bytes that nobody sent are torn, also where nothing was acknowledged."""
        self.assertEqual(verdict({"a": "half"}, 9, operation("new", {"a": "A"}, 1, None)), ["torn: a"])
        self.assertEqual(verdict({"b": "half"}, 9, operation("new", {"a": "A"}, 1, None)), ["nobody sent"])

    def test_form(self) -> None:
        """A form is there with all of its files or with none, acknowledged or not."""
        form = operation("form", {"a": "A", "b": "B"}, 3, None)
        self.assertEqual(verdict({"a": "A", "b": "B"}, 9, form), [])
        self.assertEqual(verdict({}, 9, form), [])
        self.assertEqual(verdict({"a": "A"}, 9, form), ["torn: of"])
        acknowledged = operation("form", {"a": "A", "b": "B"}, 3, 4)
        self.assertEqual(verdict({}, 9, acknowledged), ["lost: a", "lost: b"])

    def test_form_with_others(self) -> None:
        """A file of a form may have been replaced or deleted by somebody else, but not be what was there before."""
        form = operation("form", {"a": "A", "b": "B"}, 3, None)
        later, earlier = operation("replace", {"b": "C"}, 4, None), operation("replace", {"b": "C"}, 1, 2)
        self.assertEqual(verdict({"a": "A", "b": "C"}, 9, form, later), [])
        self.assertEqual(verdict({"a": "A"}, 9, form, operation("delete", {"b": None}, 4, 5)), [])
        self.assertEqual(verdict({"a": "A", "b": "C"}, 9, form, earlier), ["torn: of"])

    def test_created_twice(self) -> None:
        """Only one of those who create a file is told that it is theirs, and it stays so."""
        one, other = operation("claim", {"a": "A"}, 1, 3), operation("claim", {"a": "B"}, 2, 4)
        self.assertEqual(verdict({"a": "A"}, 4, one, other), ["lost: a"])
        self.assertEqual(verdict({"a": "B"}, 4, one, other), ["lost: a"])
        self.assertEqual(verdict({"a": "B"}, 3, one, other), ["lost: a"])
        self.assertEqual(verdict({"a": "A"}, 3, one, other), [])

    def test_new_twice(self) -> None:
        """Nobody is told that a name is new if its file must have been there: that one has been overwritten."""

        def told(*operations: Operation) -> list[str]:
            operations[-1].is_new = True
            return History(operations=list(operations)).judge_answers()

        first = operation("replace", {"a": "A"}, 1, 2)
        self.assertEqual(len(told(first, operation("replace", {"a": "B"}, 3, 4))), 1)
        self.assertEqual(told(first, operation("replace", {"b": "B"}, 3, 4)), [])
        self.assertEqual(told(operation("replace", {"a": "A"}, 1, 3), operation("replace", {"a": "B"}, 2, 4)), [])
        self.assertEqual(told(operation("replace", {"a": "A"}, 1, None), operation("replace", {"a": "B"}, 2, 4)), [])

    def test_new_again(self) -> None:
        """A name is new again once it was deleted, also if nobody knows when that was."""

        def told(begun: int, ended: int | None) -> int:
            put, again = operation("new", {"a": "A"}, 3, 4), operation("replace", {"a": "B"}, 7, 8)
            again.is_new = True
            return len(History(operations=[put, operation("delete", {"a": None}, begun, ended), again]).judge_answers())

        self.assertEqual([told(5, 6), told(5, None), told(2, 5), told(6, 9)], [0, 0, 0, 0])
        self.assertEqual([told(1, 2), told(9, 10)], [1, 1])

    def test_matched_twice(self) -> None:
        """Of those who replace the same file, and nothing else, one is told that he did."""
        first, other = operation("match", {"a": "A"}, 1, 3), operation("match", {"a": "B"}, 2, 4)
        self.assertEqual(len(History(operations=[first, other]).judge_answers()), 1)
        other.ended = other.ended_at = None
        self.assertEqual(History(operations=[first, other]).judge_answers(), [])


def request(kind: str, begun: int, ended: int | None, sent: int = 0, offset: int | None = None) -> Operation:
    """One of an upload of 9 bytes, which becomes the file ``a``."""
    found = operation(kind, {"a": "A"} if kind == "finish" else {}, begun, ended)
    found.upload, found.seed, found.sent, found.offset = "upload/1", "seed", sent, offset
    return found


def stored(offset: int, seed: str = "seed") -> State:
    """What an upload has of which so many bytes are there."""
    return state_of(offset, hashlib.sha256(content_of(seed, offset)).hexdigest())


class UploadJudgeTests(SynchronousTestCase):
    """What counts as a loss of an upload of several requests."""

    def test_content(self) -> None:
        """How many bytes one asks for doesn't change those in front."""
        whole = content_of("seed", 20000)
        self.assertEqual(len(whole), 20000)
        for size in (0, 1, 4095, 4096, 4097, 12345):
            self.assertEqual(content_of("seed", size), whole[:size])
        self.assertNotEqual(content_of("other", 100), whole[:100])

    def test_begun(self) -> None:
        """An upload whose beginning was acknowledged is there, and one that was not may be."""
        begin = request("begin", 1, 3, 0, 0)
        self.assertEqual(verdict({"upload/1": stored(0)}, 3, begin), [])
        self.assertEqual(verdict({}, 3, begin), ["lost: upload/1"])
        self.assertEqual(verdict({}, 2, begin), [])
        self.assertEqual(verdict({"upload/1": stored(0)}, 1, begin), ["nobody sent"])

    def test_nobody_was_told(self) -> None:
        """An upload may be there whose client never heard of it, if somebody sent its bytes."""
        begin = request("begin", 1, None, 5)
        begin.upload = ""
        self.assertEqual(verdict({}, 9, begin), [])
        self.assertEqual(verdict({"upload/2": stored(5)}, 9, begin), [])
        self.assertEqual(verdict({"upload/2": stored(5, "other")}, 9, begin), ["nobody sent"])
        self.assertEqual(verdict({"upload/2": stored(6)}, 9, begin), ["nobody sent"])
        self.assertEqual(verdict({"upload/2": FINISHED}, 9, begin), ["nobody sent"])
        self.assertEqual(verdict({"file": stored(5)}, 9, begin), ["nobody sent"])

    def test_offset(self) -> None:
        """It has what was acknowledged by then, and may have what was on its way."""
        requests = request("begin", 1, 2, 0, 0), request("append", 3, 4, 3, 3), request("append", 5, 7, 6, 6)
        for position, offsets in ((2, [0]), (4, [3]), (6, range(3, 7)), (7, [6])):
            fine = [offset for offset in range(10) if not verdict({"upload/1": stored(offset)}, position, *requests)]
            self.assertEqual(fine, list(offsets), position)
        self.assertEqual(verdict({"upload/1": stored(2)}, 4, *requests), ["lost: upload/1"])
        self.assertEqual(verdict({"upload/1": stored(4)}, 4, *requests), ["torn: upload/1"])
        self.assertEqual(verdict({}, 4, *requests), ["lost: upload/1"])

    def test_told_offset(self) -> None:
        """What a client was told when it asked counts too."""
        requests = request("begin", 1, 2, 0, 0), request("append", 3, None, 6), request("ask", 4, 5, 6, 4)
        fine = [offset for offset in range(10) if not verdict({"upload/1": stored(offset)}, 5, *requests)]
        self.assertEqual(fine, [4, 5, 6])

    def test_other_bytes(self) -> None:
        """The bytes are those that were sent."""
        requests = request("begin", 1, 2, 0, 0), request("append", 3, 4, 3, 3)
        self.assertEqual(verdict({"upload/1": stored(3, "other")}, 9, *requests), ["torn: upload/1"])

    def test_finished(self) -> None:
        """What was finished is a file, and what says that it is one has it."""
        begin, finish = request("begin", 1, 2, 0, 0), request("finish", 3, 5, 9, 9)
        self.assertEqual(verdict({"upload/1": FINISHED, "a": "A"}, 5, begin, finish), [])
        self.assertEqual(verdict({"upload/1": FINISHED}, 5, begin, finish), ["lost: a", "lost: a"])
        self.assertEqual(verdict({"upload/1": stored(4), "a": "A"}, 5, begin, finish), ["lost: the"])
        self.assertEqual(verdict({"a": "A"}, 5, begin, finish), ["lost: upload/1"])
        self.assertEqual(verdict({"upload/1": stored(4)}, 4, begin, finish), [])
        self.assertEqual(verdict({"upload/1": FINISHED, "a": "A"}, 4, begin, finish), [])
        self.assertEqual(verdict({"upload/1": FINISHED}, 4, begin, finish), ["lost: a"])
        self.assertEqual(verdict({"upload/1": stored(9)}, 4, begin, finish), ["torn: upload/1"])
        self.assertEqual(verdict({"upload/1": FINISHED, "a": "A"}, 3, begin, finish), ["nobody sent", "torn: upload/1"])

    def test_finished_and_replaced(self) -> None:
        """The file may have been replaced or deleted since, but not be what was there before."""
        begin, finish = request("begin", 1, 2, 0, 0), request("finish", 5, None, 9)
        earlier, later = operation("new", {"a": "B"}, 3, 4), operation("delete", {"a": None}, 6, 7)
        found: dict[str, State] = {"upload/1": FINISHED}
        self.assertEqual(verdict(found, 9, begin, finish, earlier, later), [])
        self.assertEqual(verdict({**found, "a": "A"}, 9, begin, finish, earlier), [])
        self.assertEqual(verdict({**found, "a": "B"}, 9, begin, finish, earlier), ["lost: a"])

    def test_proven(self) -> None:
        """Bytes with a checksum are there all together or not at all."""
        requests = request("begin", 1, 2, 0, 0), request("append", 3, 4, 3, 3), request("append", 5, 7, 6, 6)
        requests[2].since, requests[2].is_proven = 3, True
        fine = [offset for offset in range(10) if not verdict({"upload/1": stored(offset)}, 6, *requests)]
        self.assertEqual(fine, [3, 6])

    def test_damaged(self) -> None:
        """Bytes that are not what their checksum says leave nothing, whether that was answered or not."""
        requests = request("begin", 1, 2, 0, 0), request("append", 3, 4, 3, 3), request("damaged", 5, 7, 3)
        requests[2].since = 3
        for position in (6, 7):
            fine = [offset for offset in range(10) if not verdict({"upload/1": stored(offset)}, position, *requests)]
            self.assertEqual(fine, [3], position)
        self.assertEqual(verdict({}, 6, *requests), ["lost: upload/1"])

    def test_spoilt(self) -> None:
        """An upload that isn't what was said of it is no file, and gone when that was answered."""
        requests = request("begin", 1, 2, 0, 0), request("append", 3, 4, 3, 3), request("spoil", 5, 7, 9)
        requests[2].since = 3
        self.assertEqual(verdict({}, 7, *requests), [])
        self.assertEqual(verdict({"upload/1": stored(3)}, 7, *requests), ["lost: the"])
        self.assertEqual(verdict({"upload/1": stored(3)}, 6, *requests), [])
        self.assertEqual(verdict({}, 6, *requests), [])
        self.assertEqual(verdict({"upload/1": stored(9)}, 6, *requests), ["torn: upload/1"])
        self.assertEqual(verdict({"upload/1": FINISHED, "a": "A"}, 6, *requests), ["nobody sent", "torn: upload/1"])

    def test_ended_by_its_client(self) -> None:
        """An upload may have all bytes and be no file, if its client has to say first that these are all."""
        begin, append = request("begin", 1, 2, 0, 0), request("append", 3, 4, 9, 9)
        finish = request("finish", 5, 7, 9, 9)
        begin.ends_itself, finish.since = False, 9
        self.assertEqual(verdict({"upload/1": stored(9)}, 6, begin, append, finish), [])
        self.assertEqual(verdict({"upload/1": stored(9)}, 7, begin, append, finish), ["lost: a", "lost: the"])
        self.assertEqual(verdict({"upload/1": FINISHED, "a": "A"}, 7, begin, append, finish), [])
        begin.ends_itself = True
        self.assertEqual(verdict({"upload/1": stored(9)}, 6, begin, append, finish), ["torn: upload/1"])

    def test_whole_and_nobody_was_told(self) -> None:
        """One request that brings all may leave a file, and an upload of which nobody was told."""
        begin, finish = request("begin", 1, None, 9), request("finish", 2, None, 9)
        begin.upload = finish.upload = ""
        found: dict[str, State] = {"upload/2": FINISHED}
        self.assertEqual(verdict({**found, "a": "A"}, 9, begin, finish), [])
        self.assertEqual(verdict(found, 9, begin, finish), ["nobody sent"])
        self.assertEqual(verdict({**found, "a": "A"}, 2, begin, finish), ["nobody sent", "nobody sent"])

    def test_concatenated(self) -> None:
        """A concatenation has all bytes or none, and is a file as soon as its parts are whole."""
        parts = [request("begin", 1, 2, 0, 0), request("append", 3, 4, 4, 4)]
        parts += [request("begin", 1, 2, 0, 0), request("append", 5, 6, 5, 5)]
        for operation in parts[2:]:
            operation.upload, operation.first = "upload/2", 4
        begin, finish = request("begin", 7, 9, 0, 0), request("finish", 7, 9, 9, 9)
        begin.parts, finish.is_proven = ["upload/1", "upload/2"], True
        begin.upload = finish.upload = "upload/3"
        second = state_of(5, hashlib.sha256(content_of("seed", 9)[4:]).hexdigest())
        found = {"upload/1": stored(4), "upload/2": second}
        all = [*parts, begin, finish]
        self.assertEqual(verdict(found, 8, *all), [])
        self.assertEqual(verdict(found, 9, *all), ["lost: a", "lost: upload/3"])
        self.assertEqual(verdict({**found, "upload/3": FINISHED, "a": "A"}, 9, *all), [])
        self.assertEqual(verdict({**found, "upload/3": stored(0)}, 8, *all), ["torn: upload/3"])
        self.assertEqual(verdict({**found, "upload/3": stored(4)}, 8, *all), ["torn: upload/3"])
        self.assertEqual(verdict({**found, "upload/2": stored(5)}, 8, *all), ["torn: upload/2"])
        # As long as they aren't, it waits.
        found["upload/2"] = state_of(0, hashlib.sha256(b"").hexdigest())
        parts[3].ended = parts[3].ended_at = finish.ended = finish.ended_at = None
        self.assertEqual(verdict({**found, "upload/3": stored(0)}, 9, *all), [])
        self.assertEqual(verdict(found, 9, *all), ["lost: upload/3"])

    def test_cancelled(self) -> None:
        """What was cancelled stays away, and may be away before that is acknowledged."""
        requests = request("begin", 1, 2, 0, 0), request("append", 3, 4, 3, 3), request("cancel", 5, 7)
        self.assertEqual(verdict({}, 7, *requests), [])
        self.assertEqual(verdict({"upload/1": stored(3)}, 7, *requests), ["lost: the"])
        self.assertEqual(verdict({}, 6, *requests), [])
        self.assertEqual(verdict({"upload/1": stored(3)}, 6, *requests), [])
        self.assertEqual(verdict({"upload/1": stored(2)}, 6, *requests), ["lost: upload/1"])
        self.assertEqual(verdict({}, 5, *requests), ["lost: upload/1"])

    def test_next_load(self) -> None:
        """What is there when the next load begins is there after it, as it was."""
        history = History(operations=[request("begin", 1, 2, 0, 0)])
        history.go_on_from({"upload/1": stored(3), "upload/2": FINISHED})
        self.assertEqual(history.judge({"upload/1": stored(3), "upload/2": FINISHED}), [])
        self.assertEqual(len(history.judge({"upload/1": stored(2)})), 2)


class ReplayTests(SynchronousTestCase):
    """What a disk holds after a cut."""

    def setUp(self) -> None:
        self.folder = scratch(self)
        (self.folder / "start").write_bytes(b"-" * 4 * SECTOR)
        self.records = [
            Record(WRITE, 0, SECTOR, b"a" * SECTOR),
            Record(FLUSH, 0, 0, b""),
            Record(WRITE, SECTOR, 2 * SECTOR, b"b" * SECTOR + b"c" * SECTOR),
            Record(ZERO, 3 * SECTOR, SECTOR, b""),
            Record(WRITE, SECTOR, SECTOR, b"d" * SECTOR),
            Record(FLUSH, 0, 0, b""),
        ]
        self.replay = Replay(self.folder / "start", self.records, self.folder / "stable")

    def disks(self, position: int) -> set[str]:
        """All that come out of many seeds: one letter a sector."""
        found = set()
        for seed in range(200):
            self.replay.cut(position, random.Random(seed), self.folder / "cut")
            data = (self.folder / "cut").read_bytes()
            sectors = [set(data[at : at + SECTOR]) for at in range(0, len(data), SECTOR)]
            self.assertEqual([len(sector) for sector in sectors], [1] * 4)
            found.add("".join("0" if sector == {0} else chr(sector.pop()) for sector in sectors))
        return found

    def test_flushed(self) -> None:
        """All that was written before the last flush is there, and nothing that was written behind the cut."""
        self.assertEqual(self.disks(2), {"a---"})
        self.assertEqual(self.disks(6), {"adc0"})

    def test_back(self) -> None:
        """An earlier cut may follow a later one."""
        self.assertEqual(self.disks(6), {"adc0"})
        self.assertEqual(self.disks(2), {"a---"})

    def test_not_flushed(self) -> None:
        """Each sector written since is there or not, and never older than one that was there before."""
        self.assertEqual(self.disks(1), {"----", "a---"})
        self.assertEqual(self.disks(5), {f"a{b}{c}{d}" for b in "-bd" for c in "-c" for d in "-0"})

    def test_again(self) -> None:
        """The same seed gives the same disk."""
        disks = []
        for _ in range(2):
            self.replay.cut(5, random.Random("seed"), self.folder / "cut")
            disks.append((self.folder / "cut").read_bytes())
        self.assertEqual(*disks)


class WeakestTests(SynchronousTestCase):
    """What is there after a cut where nothing is kept but what was synced."""

    def setUp(self) -> None:
        if missing("calls", WEAKEST):
            raise SkipTest(missing("calls", WEAKEST))
        scratch = temporary_folder()
        self.folder = scratch.__enter__()
        self.addCleanup(scratch.__exit__, None, None, None)
        self.top, self.log = self.folder / "top", self.folder / "log"
        self.top.mkdir()
        (self.top / "below").mkdir()
        (self.top / "old").write_text("old")
        self.position = begin_log(self.log, self.top)
        self.calls = Calls(self.log)
        self.addCleanup(self.calls.close)
        self.here, self.below = self.enter("."), self.enter("below")

    def enter(self, name: str) -> int:
        """A descriptor of a folder."""
        descriptor = os.open(self.top / name, os.O_RDONLY | os.O_DIRECTORY)
        self.addCleanup(os.close, descriptor)
        return descriptor

    def write(self, name: str, data: bytes, at: int = 0) -> int:
        """Write to a file, which is made; gives its descriptor."""
        descriptor = self.calls.open(name, os.O_WRONLY | os.O_CREAT, dir_fd=self.here)
        self.addCleanup(os.close, descriptor)
        self.calls.pwrite(descriptor, data, at)
        return descriptor

    def left(self, position: int | None = None) -> set[str]:
        """All that comes out of many seeds: the files with what they have, and folders."""
        weakest, found = Weakest(read_calls(self.log)), set()
        for seed in range(200):
            cut = self.folder / f"cut{seed}"
            weakest.cut(self.position() if position is None else position, random.Random(seed), cut)
            paths = sorted(cut.rglob("*"))
            texts = [f"{path.relative_to(cut)}{'/' if path.is_dir() else '=' + path.read_text()}" for path in paths]
            found.add(" ".join(texts))
            shutil.rmtree(cut)
        return found

    def test_beginning(self) -> None:
        """What was there before is there."""
        self.assertEqual(self.left(), {"below/ old=old"})

    def test_new(self) -> None:
        """Name and contents are each there when they were synced, and no sync is one of the other."""
        file = self.write("a", b"new")
        self.assertEqual(self.left(), {"below/ old=old", "a= below/ old=old", "a=new below/ old=old"})
        self.calls.fsync(file)
        self.assertEqual(self.left(), {"below/ old=old", "a=new below/ old=old"})
        self.calls.fsync(self.below)
        self.assertEqual(self.left(), {"below/ old=old", "a=new below/ old=old"})
        self.calls.fsync(self.here)
        self.assertEqual(self.left(), {"a=new below/ old=old"})
        self.assertEqual(self.left(1), {"below/ old=old"})

    def test_without_contents(self) -> None:
        """A name that is durable may belong to a file that is not."""
        self.write("a", b"new")
        self.calls.fsync(self.here)
        self.assertEqual(self.left(), {"a= below/ old=old", "a=new below/ old=old"})

    def test_pages(self) -> None:
        """Of what was written each page is there or not; what was cut off is."""
        file = self.write("old", b"n" * (PAGE + 2), 1)
        self.calls.fsync(self.here)
        whole, first, second = "o" + "n" * (PAGE + 2), "o" + "n" * (PAGE - 1), "old" + "\0" * (PAGE - 3) + "nnn"
        self.assertEqual(self.left(), {f"below/ old={text}" for text in ("old", whole, first, second)})
        self.calls.fdatasync(file)
        self.calls.ftruncate(file, 2)
        self.assertEqual(self.left(), {f"below/ old={text}" for text in (whole, "on")})

    def test_names(self) -> None:
        """Of several names each is there or not, whichever came first."""
        for name in ("a", "b"):
            self.calls.link("old", name, src_dir_fd=self.here, dst_dir_fd=self.here)
        self.calls.unlink("old", dir_fd=self.here)
        some = itertools.product(["", "a=old"], ["", "b=old"], ["below/"], ["", "old=old"])
        expected = {" ".join(filter(None, paths)) for paths in some}
        self.assertEqual(self.left(), expected)
        self.calls.fsync(self.here)
        self.assertEqual(self.left(), {"a=old b=old below/"})

    def test_rename(self) -> None:
        """A rename has happened or not, in both folders, also if only one of them was synced."""
        self.calls.rename("old", "new", src_dir_fd=self.here, dst_dir_fd=self.below)
        moved = "below/ below/new=old"
        self.assertEqual(self.left(), {"below/ old=old", moved})
        self.calls.fsync(self.below)
        self.assertEqual(self.left(), {moved})

    def test_rename_of_a_new_name(self) -> None:
        """A name that a durable rename has taken away doesn't come back with the change that gave it."""
        self.calls.link("old", "a", src_dir_fd=self.here, dst_dir_fd=self.here)
        self.calls.rename("a", "b", src_dir_fd=self.here, dst_dir_fd=self.below)
        self.calls.fsync(self.below)
        self.assertEqual(self.left(), {"below/ below/b=old old=old"})

    def test_folder(self) -> None:
        """What is in a new folder is lost with it, until the folder above was synced."""
        self.calls.mkdir("made", dir_fd=self.here)
        made = self.enter("made")
        self.calls.link("old", "a", src_dir_fd=self.here, dst_dir_fd=made)
        self.calls.fsync(made)
        self.assertEqual(self.left(), {"below/ old=old", "below/ made/ made/a=old old=old"})
        self.calls.fsync(self.here)
        self.assertEqual(self.left(), {"below/ made/ made/a=old old=old"})
        self.calls.rmdir("below", dir_fd=self.here)
        self.assertEqual(self.left(), {"below/ made/ made/a=old old=old", "made/ made/a=old old=old"})

    def test_one_file_with_two_names(self) -> None:
        """Two names of one file are that afterwards."""
        self.calls.link("old", "a", src_dir_fd=self.here, dst_dir_fd=self.here)
        self.calls.fsync(self.here)
        Weakest(read_calls(self.log)).cut(self.position(), random.Random(1), self.folder / "cut")
        self.assertTrue((self.folder / "cut" / "old").samefile(self.folder / "cut" / "a"))

    def test_failed_calls(self) -> None:
        """What was refused has changed nothing, and its caller hears of it."""
        self.assertRaises(FileExistsError, self.calls.mkdir, "below", dir_fd=self.here)
        self.assertRaises(FileNotFoundError, self.calls.unlink, "a", dir_fd=self.here)
        self.assertEqual(self.position(), 1)

    def test_installed(self) -> None:
        """A process whose calls are noted has its own ones back afterwards."""
        own = [getattr(os, name) for name in NOTED]
        calls = install(self.log)
        try:
            (self.top / "made").mkdir()
        finally:
            uninstall(calls)
        self.assertEqual(self.left(), {"below/ old=old", "below/ made/ old=old"})
        self.assertEqual([getattr(os, name) for name in NOTED], own)


class MutantTests(SynchronousTestCase):
    """The list of mutants is complete."""

    def test_each_sync(self) -> None:
        """Each call in the source of the store that makes something durable has its mutant."""
        text = "".join(path.read_text() for path in STORES.glob("*.py"))
        self.assertEqual(len(syncs()), len(re.findall(r"(?<!def )\bsync_(?:file|folder)\(", text)))
        self.assertEqual(len(names()), len(set(names())))

    def test_known(self) -> None:
        """What is said of a mutant is said of one that exists."""
        self.assertEqual(set(HIDDEN_BY_EXT4) - set(names()), set())
        self.assertEqual(NOT_HERE - set(names()), set())
        self.assertEqual(set(AFTER_KILL) - {sync.name for sync in syncs()}, set())

    def test_no_other_fsync(self) -> None:
        """The store has no other way to make something durable, which would have no mutant."""
        found = []
        for path in STORES.glob("*.py"):
            asked = [node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
            found += [(path.name, name) for name in asked if name in ("fsync", "fdatasync")]
        self.assertEqual(sorted(found), FSYNCS)

    def test_all_calls_are_noted(self) -> None:
        """The store changes files by no call that isn't noted."""
        changing = {"open", "link", "rename", "renames", "replace", "symlink", "mknod", "unlink", "remove"}
        changing |= {"mkdir", "makedirs", "rmdir", "removedirs", "write", "writev", "pwrite", "pwritev", "truncate"}
        changing |= {"ftruncate", "copy_file_range", "sendfile", "splice", "fsync", "fdatasync"}
        asked = {
            f"{node.value.id}.{node.attr}"
            for path in STORES.glob("*.py")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        self.assertIn("os.link", asked)
        self.assertEqual({f"os.{name}" for name in changing} & asked - {f"os.{name}" for name in NOTED}, set())

    def test_environment(self) -> None:
        """A mutant lives in its environment alone: a service without that is none."""
        folder = scratch(self)
        extra = environment(folder, "write in place")
        self.assertIn(str(folder), extra["PYTHONPATH"])
        self.assertEqual([path.name for path in folder.iterdir()], ["sitecustomize.py"])
        asked = "from lwstwisted.uploads import appending; print(appending.CHECKPOINT)"
        told = subprocess.check_output([sys.executable, "-c", asked], env={**os.environ, **extra}, text=True)
        self.assertEqual(told, f"{CHECKPOINT}\n")


KILLED = """
import os, signal, sys
from pathlib import Path
from lwstwisted.interfaces import anything
from lwstwisted.stores.resumable import UploadFile
from lwstwisted.stores.space import Space
from lwstwisted.stores.tree import Tree
from lwstwisted.uploads.plan import Plan, record_of
from tests import calllog

def sync_folder(tree, descriptor):
    if sys._getframe(1).f_code.co_qualname == "OpenPartial._place":
        os.kill(os.getpid(), signal.SIGKILL)
    real(tree, descriptor)

root, log = map(Path, sys.argv[1:3])
calllog.install(log)
real, Tree.sync_folder = Tree.sync_folder, sync_folder
tree, name = Tree(root, "full", True), (b"a",)
tree.space = Space(tree.partial, 0, None)
upload = UploadFile.begin(tree, record_of(Plan(("a",), 5)), 5, 3600.0, name, anything)
getattr(upload, sys.argv[3])(memoryview(b"hello"))
upload.name_it(name, anything, {})
"""


@pytest.mark.slow
class KilledTests(SynchronousTestCase):
    """A service is killed when an upload has its name, and nothing says so yet; then the power fails as well."""

    def left(self, mutant: str, bring: str = "append") -> set[str]:
        """All that comes out of many cuts, when somebody has asked for the upload between the two.

        :param bring: how the bytes come: ``append``, to be synced with the name, or ``commit``, before it.
        """
        require("calls", WEAKEST)
        found = set()
        with temporary_folder() as folder, recovering(mutant, folder, 1) as recovery:
            root, log = folder / "root", folder / "log"
            root.mkdir()
            begin_log(log, root)
            killed = subprocess.run([sys.executable, "-c", KILLED, root, log, bring], cwd=TOP)
            self.assertEqual(killed.returncode, -signal.SIGKILL)
            first, problems = recovery(root, log)
            self.assertEqual(problems, [])
            self.assertEqual(sorted(first.values(), key=str), [hashlib.sha256(b"hello").hexdigest(), FINISHED])
            records = read_calls(log)
            weakest = Weakest(records)
            for seed in range(50):
                cut = folder / "cut"
                weakest.cut(len(records), random.Random(seed), cut)
                states, problems = recovery(cut)
                found |= {"same" if states == first else "lost", *problems}
                shutil.rmtree(cut)
            self.assertEqual(recovery.took_effect, bool(mutant))
        return found

    def test_name_before_record(self) -> None:
        """The file that the next one was told of is there."""
        for bring in ("append", "commit"):
            self.assertEqual(self.left("", bring), {"same"}, bring)

    def test_mutant(self) -> None:
        """And it isn't, where nobody makes sure of that."""
        for mutant in AFTER_KILL:
            self.assertIn("lost", self.left(mutant))


STEPS = """
import json, sys
from pathlib import Path
from lwstwisted.interfaces import anything
from lwstwisted.stores.resumable import UploadFile
from lwstwisted.stores.space import Space
from lwstwisted.stores.tree import Tree
from lwstwisted.uploads.plan import Plan, record_of
from tests.calllog import position_in
from tests.powercut_history import content_of

def tell(kind, sent):
    print(json.dumps([kind, upload.id.decode(), begun, position(), sent, upload.state.offset]), flush=True)
    return position()

def sync_file(tree, descriptor):
    real(tree, descriptor)
    if sys._getframe(1).f_code.co_qualname == "UploadFile.checkpoint" and upload._end < 10000:
        upload.append(content[5000:10000])

root, log = map(Path, sys.argv[1:])
position = position_in(log)
content = memoryview(content_of("seed", 15000))
tree, name = Tree(root, "full", True), (b"a",)
tree.space = Space(tree.partial, 0, None)
begun = position()
upload = UploadFile.begin(tree, record_of(Plan(("a",), 15000)), 15000, 3600.0, name, anything)
begun = tell("begin", 0)
real, Tree.sync_file = Tree.sync_file, sync_file
upload.append(content[:5000])
upload.checkpoint()
begun = tell("append", 10000)
upload.append(content[10000:])
upload.name_it(name, anything, {})
tell("finish", 15000)
"""


@pytest.mark.slow
class StepTests(SynchronousTestCase):
    """One upload, to which bytes come while others are synced; and the power fails behind each of its steps."""

    def problems(self, mutant: str) -> list[str]:
        """What is wrong behind some step; that of a mutant is enough behind one of them."""
        require("calls", WEAKEST)
        with temporary_folder() as folder, recovering("", folder, 1) as recovery:
            root, log = folder / "root", folder / "log"
            root.mkdir()
            begin_log(log, root)
            extra = environment(folder / "site", mutant, log)
            text = subprocess.check_output(
                [sys.executable, "-c", STEPS, root, log], cwd=TOP, env={**os.environ, **extra}, text=True
            )
            self.assertEqual(TOOK_EFFECT in text, bool(mutant))
            digest = hashlib.sha256(content_of("seed", 15000)).hexdigest()
            history = History()
            for line in text.splitlines():
                if line != TOOK_EFFECT:
                    kind, upload, begun, ended, sent, offset = json.loads(line)
                    asked = operation(kind, {"a": digest} if kind == "finish" else {}, begun, ended)
                    asked.upload, asked.seed, asked.sent, asked.offset = f"upload/{upload}", "seed", sent, offset
                    history.operations.append(asked)
            self.assertEqual([one.kind for one in history.operations], ["begin", "append", "finish"])
            records = read_calls(log)
            weakest = Weakest(records)
            for position in range(history.operations[0].begun_at, len(records) + 1):
                for seed in range(12):
                    cut = folder / "cut"
                    weakest.cut(position, random.Random(f"{position}:{seed}"), cut)
                    found, problems = recovery(cut)
                    problems += history.judge(found, position)
                    shutil.rmtree(cut)
                    if problems:
                        return problems
        return []

    def test_each_step(self) -> None:
        """Whatever was told is there, wherever that is."""
        self.assertEqual(self.problems(""), [])

    def test_mutants(self) -> None:
        """And it isn't with a store whose steps come in another order."""
        for mutant in ("bytes unlinked before the record", "offset read after the sync"):
            self.assertTrue(any(problem.startswith(("lost", "torn")) for problem in self.problems(mutant)), mutant)


STEPS_OF_A_CLIENT = 500


@pytest.mark.slow
class LoadTests(SynchronousTestCase):
    """What clients do whose power is cut."""

    def test_uploads(self) -> None:
        """A client of uploads of several requests does all that there is to do, by both protocols."""
        history, rng, connections = History(), random.Random("test uploads"), Connections()
        with temporary_folder() as folder, services(folder / "root", "", folder, 1) as (_, ports):
            uploader = Uploader("test", rng, ports, connections, history, Names(0))
            try:
                for _ in range(STEPS_OF_A_CLIENT):
                    uploader.one()
            finally:
                connections.close()
            recover(folder / "root")
            found, problems = look(folder / "root")
        self.assertEqual(history.problems + history.judge_answers() + problems + history.judge(found), [])
        of = {one.upload: one for one in history.operations if one.kind == "begin"}
        done = {(one.kind, of[one.upload].ends_itself) for one in history.operations if one.ended is not None}
        each = {"begin", "append", "ask", "damaged", "cancel", "finish", "spoil"}
        self.assertEqual({(kind, is_tus) for kind in each for is_tus in (True, False)} - done, set())
        self.assertIn(("told", False), done)
        whole = {one.upload for one in history.operations if one.kind == "finish" and one.ended is not None}
        self.assertGreater(sum(bool(of[upload].parts) for upload in whole), 3)
        self.assertGreater(sum(one.is_proven for one in history.operations if one.kind == "append"), 3)


@pytest.mark.slow
class PowerCutTests(SynchronousTestCase):
    """Two services on one root, under load, and then no power."""

    def shut_down(self, kind: str) -> None:
        require("shutdown", kind)
        outcome = shutdowns(kind, 1000, f"test {kind}", deadline=time.monotonic() + SHUTDOWN_SECONDS)
        self.assertEqual(outcome.failures, {})
        self.assertGreater(outcome.cuts, 0)
        self.assertGreater(outcome.acknowledged, 0)

    def test_ext4(self) -> None:
        """When ext4 stops, all that was acknowledged is there afterwards, whole, and the store has cleaned up."""
        self.shut_down("ext4")

    def test_xfs(self) -> None:
        """And when XFS stops."""
        self.shut_down("xfs")

    def cut_by_log(self, method: str, kind: str) -> None:
        require(method, kind)
        outcome = logged_cuts(kind, CUTS, f"test {method}", LOAD_SECONDS)
        self.assertEqual(outcome.failures, {})
        self.assertEqual(outcome.cuts, CUTS)
        self.assertGreater(outcome.again, 0)
        self.assertGreater(outcome.acknowledged, CUTS)

    def test_unsynced_writes_are_dropped(self) -> None:
        """A disk that loses or reorders all that it was not told to keep loses nothing that was acknowledged.

        The power may fail once more while the store starts.
        """
        self.cut_by_log("log", "ext4")

    def test_nothing_but_what_was_synced(self) -> None:
        """A file system that keeps no name and no byte but those that were synced loses nothing either."""
        self.cut_by_log("calls", WEAKEST)

    def test_mutants(self) -> None:
        """A store without any one of its precautions is caught, but for a few that take too long here."""
        require("log", "ext4")
        require("calls", WEAKEST)

        def judged(name: str) -> Outcome:
            return logged_cuts(where(name), MUTANT_CUTS, "test mutants", LOAD_SECONDS, name)

        here = [name for name in names() if name not in NOT_HERE]
        with ThreadPoolExecutor(2) as pool:
            for name, outcome in zip(here, pool.map(judged, here), strict=True):
                self.assertTrue(outcome.took_effect, name)
                self.assertNotEqual(outcome.failures, {}, f"nothing was lost in {outcome.cuts} cuts by: {name}")

    def test_again(self) -> None:
        """A cut that failed fails again in the same way, as often as one likes, and nothing stays mounted."""
        require("log", "ext4")
        with temporary_folder() as folder, recovering("finish_file.sync_file", folder, 1) as recovery:
            recording = record("ext4", folder, "test again", LOAD_SECONDS, 2, "finish_file.sync_file")
            seeds = [f"test again:{number}" for number in range(8)]
            failures = judge_cuts(recording, seeds, folder, recovery).failures
            self.assertNotEqual(failures, {})
            recording.save(folder / "saved")
            saved = [vars(operation) for operation in Recording.saved(folder / "saved").history.operations]
            self.assertEqual(saved, [vars(operation) for operation in recording.history.operations])
            self.assertTrue(any(operation["offset"] for operation in saved))
            for seed, problems in failures.items():
                self.assertEqual(replay_cut(folder / "saved", seed).failures, {seed: problems})
            mounts = Path("/proc/mounts").read_text()
            self.assertNotIn(str(folder), mounts)
