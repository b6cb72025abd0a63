"""``docs/conformance.md`` is what the tests say."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.conformance import SPECS, TABLE, marked_tests, requires, table


class TableTests(SynchronousTestCase):
    """A reader of the table can rely on it."""

    def test_is_up_to_date(self) -> None:
        """It has each requirement that a test is marked with, and no other."""
        self.assertEqual(TABLE.read_text(encoding="utf-8"), table(), "run: python -m tests.conformance")

    def test_every_protocol_is_in_it(self) -> None:
        """And there are tests for each of them that must hold."""
        must = {requirement.spec for requirement, _ in marked_tests() if requirement.level == "MUST"}
        self.assertEqual(must, set(SPECS))

    def test_marks_that_mean_nothing(self) -> None:
        """A protocol or level that nobody knows is refused where it is written."""
        for words in (("http", "1", "MUST", "x"), ("tus", "1", "must", "x"), ("tus", "", "MUST", "x")):
            self.assertRaises(ValueError, requires, *words)
