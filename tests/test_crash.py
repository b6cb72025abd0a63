"""The service is killed under load, and what clients were told is still true afterwards (``crash.py``).

The oracle is tested first: what it lets pass nobody else finds.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from twisted.trial.unittest import SynchronousTestCase

from tests.crash import EVENTS, MUTANTS, Oracle, crash
from tests.servers import PATIENCE

SEED = int(os.environ.get("LWSTWISTED_SEED") or random.SystemRandom().randrange(1 << 32))
"""Decides what clients send and when the server is killed; a failure tells it, and the environment variable sets it."""

KILLS = 20

TOP = Path(__file__).parent.parent


class OracleTests(SynchronousTestCase):
    """What a name may show, and what not."""

    def setUp(self) -> None:
        self.oracle = Oracle()

    def done(self, state: str | None, name: str = "n") -> None:
        self.oracle.acknowledge(self.oracle.begin({name: state}), {})

    def kinds(self, *states: str | None) -> list[str | None]:
        """What kind of complaint there is about each state."""
        found = [self.oracle.complaint("n", state) for state in states]
        return [wrong and wrong[0] for wrong in found]

    def test_acknowledged(self) -> None:
        """Only the file that was acknowledged last."""
        self.assertEqual(self.kinds(None, "one"), [None, "torn"])
        self.done("one")
        self.assertEqual(self.kinds("one", None, "piece"), [None, "lost", "torn"])
        self.done("two")
        self.assertEqual(self.kinds("two", "one", None), [None, "lost", "lost"])
        self.done(None)
        self.assertEqual(self.kinds(None, "two", "piece"), [None, "lost", "torn"])

    def test_under_way(self) -> None:
        """The old one or the new one, and no other."""
        self.oracle.begin({"n": "one"})
        self.assertEqual(self.kinds(None, "one", "piece"), [None, None, "torn"])
        self.oracle = Oracle()
        self.done("one")
        self.oracle.begin({"n": "two"})
        self.assertEqual(self.kinds("one", "two", None), [None, None, "lost"])
        self.oracle.begin({"n": None})
        self.assertEqual(self.kinds("one", "two", None), [None] * 3)

    def test_at_once(self) -> None:
        """Of two that overlap either may be the last one; a third one that followed both leaves neither."""
        one, two = self.oracle.begin({"n": "one"}), self.oracle.begin({"n": "two"})
        self.oracle.acknowledge(two, {})
        self.assertEqual(self.kinds("one", "two", None), [None, None, "lost"])
        self.oracle.acknowledge(one, {})
        self.assertEqual(self.kinds("one", "two", None), [None, None, "lost"])
        self.done("three")
        self.assertEqual(self.kinds("one", "two", "three"), ["lost", "lost", None])

    def test_create_only(self) -> None:
        """Who makes a name only if it is new can't follow an acknowledged one, but a deletion."""
        self.oracle.begin({"n": "one"}, only_new=True)
        two = self.oracle.begin({"n": "two"}, only_new=True)
        self.assertEqual(self.kinds("one", "two", None), [None, None, None])
        self.oracle.acknowledge(two, {})
        self.assertEqual(self.kinds("one", "two", None), ["lost", None, "lost"])
        self.done(None)
        self.oracle.begin({"n": "three"}, only_new=True)
        self.assertEqual(self.kinds("three", None, "two"), [None, None, "lost"])

    def test_refused(self) -> None:
        """What was refused or cut off isn't there."""
        self.oracle.withdraw(self.oracle.begin({"n": "one"}))
        self.assertEqual(self.kinds(None, "one"), [None, "stray"])

    def test_settled(self) -> None:
        """What was seen after one restart is what there has to be after the next one, with its entity-tag."""
        self.oracle.acknowledge(self.oracle.begin({"n": "one"}), {"n": '"1"'})
        self.oracle.begin({"n": "two"})
        self.oracle.settle("n", "one")
        self.assertEqual(self.kinds("one", "two", None), [None, "lost", "lost"])
        self.assertEqual(self.oracle.expected("n"), ("one", '"1"'))
        self.assertEqual(self.oracle.touched(), [])

    def test_forms(self) -> None:
        """All files of a form or none of them."""
        self.done("a0", "a")
        self.oracle.begin({"a": "a1", "b": "b1"})
        for seen, halves in (
            ({"a": "a0"}, 0),
            ({"a": "a1", "b": "b1"}, 0),
            ({"a": "a1"}, 1),
            ({"a": "a0", "b": "b1"}, 1),
        ):
            self.assertEqual(len(list(self.oracle.halves(seen))), halves, seen)


class CrashTests(SynchronousTestCase):
    """Real servers, real kills."""

    @pytest.mark.slow
    def test_kills(self) -> None:
        """Nothing that was acknowledged is lost, nothing is torn, nothing is left over."""
        report = crash(KILLS, SEED)
        self.assertEqual(report.wrong, [], f"LWSTWISTED_SEED={SEED}\n{report}")
        # Else it would have judged nothing.
        self.assertEqual(report.kills, KILLS)
        self.assertGreater(len(report.phases), 1, report)
        self.assertGreater(report.answers.total(), 10 * KILLS, report)
        self.assertGreater(min(report.happened, report.vanished, report.left), 0, report)

    @pytest.mark.slow
    def test_mutants(self) -> None:
        """A store that gives names too early, and one that never tidies up, are found out at once."""
        for mutant in ("a file has its name before it is whole", "unfinished files are not swept"):
            kind, mutation = MUTANTS[mutant]
            report = crash(KILLS, SEED, mutation, kind)
            self.assertIn(kind, report.kinds, f"LWSTWISTED_SEED={SEED}, {mutant}\n{report}")

    @pytest.mark.slow
    def test_command(self) -> None:
        """``python -m tests.crash`` says what it saw, and its status whether anything was wrong."""
        command = [sys.executable, "-m", "tests.crash", "1", "--seed", f"{SEED}"]
        done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=4 * PATIENCE)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
        self.assertRegex(done.stdout, rf"\Aseed {SEED}\n1 kills: {{'({'|'.join(EVENTS)})': 1}}(.|\n)*\nwrong: 0 {{}}\n")
