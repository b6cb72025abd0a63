"""What was acknowledged outlives a power cut, and the harness that says so would notice if it did not.

Here are as many cuts as fit in a minute; ``make powercut`` runs the others.
"""

from __future__ import annotations

import ast
import random
import re
import tempfile
import time
from pathlib import Path
from unittest import SkipTest

import pytest
from twisted.trial.unittest import SynchronousTestCase

from tests.blocklog import FLUSH, SECTOR, WRITE, ZERO, Record, Replay
from tests.powercut import Recording, judge_cuts, logged_cuts, missing, record, shutdowns, temporary_folder
from tests.powercut_load import History, Operation, State
from tests.powercut_mutants import CANNOT_LOSE, STORES, environment, names, syncs

LOAD_SECONDS = 1.0
SHUTDOWN_SECONDS = 6.0
"""In which as many cuts begin as can."""
CUTS = 100
MUTANT_CUTS = 600

FSYNCS = [("tree.py", "fdatasync"), ("tree.py", "fsync"), ("tree.py", "fsync")]
"""Of ``sync_file``, ``sync_file`` and ``sync_folder``."""

QUICKLY_CAUGHT = [
    "BatchFolder._write_journal.sync_file",
    "BatchFolder._remove_journal.sync_folder",
    "_Draft.commit.sync_file",
    "Tree.delete.sync_folder",
    "folder sync after link",
    "folder sync after rename",
    "write in place",
    "batch writes in place",
    "names unlocked",
]
"""Mutants of which one or two loads show a loss. ``python -m tests.powercut --mutants`` tries all."""


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


class MutantTests(SynchronousTestCase):
    """The list of mutants is complete."""

    def test_each_sync(self) -> None:
        """Each call in the source of the store that makes something durable has its mutant."""
        text = "".join(path.read_text() for path in STORES.glob("*.py"))
        self.assertEqual(len(syncs()), len(re.findall(r"(?<!def )\bsync_(?:file|folder)\(", text)))
        self.assertEqual(len(names()), len(set(names())))

    def test_known(self) -> None:
        """What is said of a mutant is said of one that exists."""
        self.assertEqual({*CANNOT_LOSE, *QUICKLY_CAUGHT} - set(names()), set())
        self.assertEqual(set(CANNOT_LOSE) & set(QUICKLY_CAUGHT), set())

    def test_no_other_fsync(self) -> None:
        """The store has no other way to make something durable, which would have no mutant."""
        found = []
        for path in STORES.glob("*.py"):
            asked = [node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
            found += [(path.name, name) for name in asked if name in ("fsync", "fdatasync")]
        self.assertEqual(sorted(found), FSYNCS)

    def test_environment(self) -> None:
        """A mutant lives in its environment alone: a service without that is none."""
        folder = scratch(self)
        extra = environment(folder, "write in place")
        self.assertIn(str(folder), extra["PYTHONPATH"])
        self.assertEqual([path.name for path in folder.iterdir()], ["sitecustomize.py"])


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

    def test_unsynced_writes_are_dropped(self) -> None:
        """A disk that loses or reorders all that it was not told to keep loses nothing that was acknowledged."""
        require("log", "ext4")
        outcome = logged_cuts("ext4", CUTS, "test log", LOAD_SECONDS)
        self.assertEqual(outcome.failures, {})
        self.assertEqual(outcome.cuts, CUTS)
        self.assertGreater(outcome.acknowledged, CUTS)

    def test_mutants(self) -> None:
        """A store without one of its precautions is caught."""
        require("log", "ext4")
        for name in QUICKLY_CAUGHT:
            outcome = logged_cuts("ext4", MUTANT_CUTS, "test mutants", LOAD_SECONDS, name)
            self.assertTrue(outcome.took_effect, name)
            self.assertNotEqual(outcome.failures, {}, f"nothing was lost in {outcome.cuts} cuts by: {name}")

    def test_again(self) -> None:
        """A cut that failed fails again in the same way, as often as one likes, and nothing stays mounted."""
        require("log", "ext4")
        with temporary_folder() as folder:
            recording = record("ext4", folder, "test again", LOAD_SECONDS, 2, "_Draft.commit.sync_file")
            seeds = [f"test again:{number}" for number in range(8)]
            failures = judge_cuts(recording, seeds, folder).failures
            self.assertNotEqual(failures, {})
            recording.save(folder / "saved")
            for seed, problems in failures.items():
                again = judge_cuts(Recording.saved(folder / "saved"), [seed], folder)
                self.assertEqual(again.failures, {seed: problems})
            mounts = Path("/proc/mounts").read_text()
            self.assertNotIn(str(folder), mounts)
