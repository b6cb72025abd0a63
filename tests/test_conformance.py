"""``docs/conformance.md`` is what the tests say, and they leave out no sentence of the protocols."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.conformance import LEFT_OUT, SPECS, TABLE, every_sentence, in_doubt, marked_tests, requires, table


class TableTests(SynchronousTestCase):
    """A reader of the table can rely on it."""

    def test_is_up_to_date(self) -> None:
        """It has each requirement that a test is marked with, and no other."""
        self.assertEqual(TABLE.read_text(encoding="utf-8"), table(), "run: python -m tests.conformance")

    def test_every_protocol_is_in_it(self) -> None:
        """And there are tests for each of them that must hold."""
        must = {requirement.spec for requirement, _ in marked_tests() if requirement.level == "MUST"}
        self.assertEqual(must, set(SPECS))

    def test_every_sentence_is_accounted_for(self) -> None:
        """What a protocol wants of a server is held by a test, or there is a reason why not; never both."""
        self.assertEqual(in_doubt(), [])
        self.assertEqual(set(LEFT_OUT) - set(every_sentence()), set())

    def test_marks_that_mean_nothing(self) -> None:
        """A protocol, level, section or sentence that nobody knows is refused where it is written."""
        requires("tus", "Core: HEAD", "MUST", "x", 1)
        for words in (
            ("http", "4", "MUST", "x", 1),
            ("tus", "Core: HEAD", "must", "x", 1),
            ("tus", "", "MUST", "x", 1),
            ("tus", "Core: HEAD", "MUST", "", 1),
            ("tus", "Core: HEAD", "MUST", "x"),
            ("tus", "Core: HEAD", "-", "x", 1),
            ("tus", "Core: HEAD", "SHOULD", "x", 1),
            ("tus", "Core: HEAD", "MUST", "x", 6),
        ):
            self.assertRaises(ValueError, requires, *words)
