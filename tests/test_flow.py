"""Valve and Watermarks."""

from __future__ import annotations

from unittest import TestCase

from hypothesis import given
from hypothesis import strategies as st

from lwstwisted.flow import Valve, Watermarks

REASONS = ("store", "client", "shutdown")


class ValveTests(TestCase):
    def setUp(self) -> None:
        self.edges: list[str] = []
        self.valve = Valve(lambda: self.edges.append("closed"), lambda: self.edges.append("opened"))

    def test_is_open_at_first(self) -> None:
        """Nothing speaks against it, and nobody is called."""
        self.assertTrue(self.valve.is_open)
        self.assertEqual(self.valve.reasons, frozenset())
        self.assertEqual(self.edges, [])

    def test_two_reasons_cleared_in_both_orders(self) -> None:
        """Row 10: the one who resumes first does not undo the other's pause."""
        for first, second in (("store", "client"), ("client", "store")):
            self.edges.clear()
            self.valve.close("store")
            self.valve.close("client")
            self.assertEqual(self.valve.reasons, {"store", "client"})
            self.valve.open(first)
            self.assertFalse(self.valve.is_open)
            self.assertEqual(self.edges, ["closed"])
            self.valve.open(second)
            self.assertTrue(self.valve.is_open)
            self.assertEqual(self.edges, ["closed", "opened"])

    def test_same_reason_twice(self) -> None:
        """Closing twice for one reason is undone by opening once."""
        self.valve.close("store")
        self.valve.close("store")
        self.valve.open("store")
        self.assertTrue(self.valve.is_open)
        self.assertEqual(self.edges, ["closed", "opened"])

    def test_opened_for_a_reason_that_is_not_there(self) -> None:
        """It neither opens the valve nor tells anybody that it did."""
        self.valve.open("store")
        self.valve.close("client")
        self.valve.open("store")
        self.assertFalse(self.valve.is_open)
        self.assertEqual(self.edges, ["closed"])

    def test_closed_again_while_opening(self) -> None:
        """Row 9: what opening releases may close it again at once."""
        valve = Valve(lambda: self.edges.append("closed"), lambda: valve.close("replay"))
        valve.close("store")
        valve.open("store")
        self.assertFalse(valve.is_open)
        self.assertEqual(valve.reasons, {"replay"})
        self.assertEqual(self.edges, ["closed", "closed"])

    def test_state_is_set_before_the_call(self) -> None:
        """Whoever is told of an edge finds the valve as told."""
        seen: list[bool] = []
        valve = Valve(lambda: seen.append(valve.is_open), lambda: seen.append(valve.is_open))
        valve.close("store")
        valve.open("store")
        self.assertEqual(seen, [False, True])

    @given(st.lists(st.tuples(st.booleans(), st.sampled_from(REASONS))))
    def test_any_order(self, steps: list[tuple[bool, str]]) -> None:
        """Open if and only if no reason is left; the edges alternate, and each is told once."""
        edges: list[str] = []
        valve = Valve(lambda: edges.append("closed"), lambda: edges.append("opened"))
        expected: set[str] = set()
        for closes, reason in steps:
            before = len(expected)
            if closes:
                valve.close(reason)
                expected.add(reason)
            else:
                valve.open(reason)
                expected.discard(reason)
            self.assertEqual(valve.reasons, expected)
            self.assertEqual(valve.is_open, not expected)
            if bool(before) != bool(expected):
                self.assertEqual(edges.pop(), "closed" if expected else "opened")
            self.assertEqual(edges, [])


class WatermarksTests(TestCase):
    def test_marks(self) -> None:
        """The high mark itself is not full yet; the low mark itself has caught up."""
        queue = Watermarks(2, 5)
        self.assertFalse(queue.add(5))
        self.assertTrue(queue.add(1))
        self.assertTrue(queue.is_full)
        self.assertFalse(queue.add(10))
        self.assertFalse(queue.remove(13))
        self.assertTrue(queue.is_full)
        self.assertTrue(queue.remove(1))
        self.assertFalse(queue.is_full)
        self.assertFalse(queue.remove(2))
        self.assertEqual(queue.level, 0)

    def test_one_piece_larger_than_both(self) -> None:
        """Even a piece far above the high mark fills it once and empties it once."""
        queue = Watermarks(0, 1)
        self.assertTrue(queue.add(1000))
        self.assertTrue(queue.remove(1000))

    def test_marks_must_be_in_order(self) -> None:
        """Equal or swapped marks would tell of an edge at every byte: refused."""
        for low, high in ((1, 1), (2, 1), (-1, 1)):
            with self.assertRaises(ValueError):
                Watermarks(low, high)

    @given(st.integers(0, 50), st.integers(1, 50), st.lists(st.integers(-40, 40)))
    def test_hysteresis(self, low: int, distance: int, steps: list[int]) -> None:
        """Full from above the high mark until the low one is reached, and each edge is told once."""
        high = low + distance
        queue = Watermarks(low, high)
        level, full = 0, False
        for step in steps:
            if step >= 0:
                level += step
                told = queue.add(step)
                expected = not full and level > high
                full = full or expected
            else:
                taken = min(-step, level)
                level -= taken
                told = queue.remove(taken)
                expected = full and level <= low
                full = full and not expected
            self.assertEqual((queue.level, queue.is_full, told), (level, full, expected))
