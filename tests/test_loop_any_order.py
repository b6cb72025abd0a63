"""Pauses, resumes, writes, ends and records in any order: on real sockets and in memory, in lockstep.

Both get the same steps. After each of them the rules are checked on either, and both must have delivered the same.
"""

from __future__ import annotations

import hashlib
import ssl
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.tls_peer import DEADLINE, REAL_WORLDS, VERSIONS, N, Sink, SinkFactory, Talk, World, pending_list
from tests.virtual_peer import VIRTUAL_WORLDS

PAIRS = {
    "Lws": ("Lws", "VirtualLws"),
    "LwsStockPort": ("LwsStockPort", "VirtualLwsStockPort"),
    "LwsPoll": ("LwsPoll", "VirtualLwsPoll"),
    "LwsAsyncio": ("LwsAsyncio", "VirtualLwsAsyncio"),
    "LwsUvloop": ("LwsUvloop", "VirtualLwsAsyncio"),
    "StockEPoll": ("StockEPoll", "VirtualEPoll"),
    "StockAsyncio": ("StockAsyncio", "VirtualAsyncio"),
}


class Side:
    """One of the two: a talk, and what its peer has sealed and not sent."""

    def __init__(self, world: World, version: ssl.TLSVersion) -> None:
        self.pause_in = 0
        self.waits: list[tuple[float | None, int]] = []
        reactor = world.make_reactor()
        self.talk = Talk(reactor, world.listen, version, SinkFactory(self.delivered), budget=N, held=False)
        self.sink = self.talk.sink
        self.waiting = bytearray()
        self.is_cut_off = False
        self.settle()
        if world.merges and hasattr(reactor, "kernel"):
            kernel = reactor.kernel
            kernel.on_wait = lambda: self.waits.append((kernel.waits[-1], len(pending_list(reactor))))

    def settle(self) -> None:
        """Have the last bytes of the handshake sent."""
        while self.sink.descriptor in self.talk.reactor.getWriters():
            self.talk.loop.turn()

    def delivered(self, sink: Sink) -> None:
        if self.pause_in:
            self.pause_in -= 1
            if not self.pause_in:
                sink.pause()

    def send(self, size: int) -> None:
        """Send so many bytes of what waits, and see them arrive."""
        if self.is_cut_off or self.sink.lost:
            return
        piece = bytes(self.waiting[:size])
        try:
            before = self.sink.unread()
            self.talk.peer.send(piece)
            end = time.monotonic() + DEADLINE
            while self.sink.unread() < before + len(piece) and time.monotonic() < end:
                pass
        except OSError:  # we have closed our side
            self.is_cut_off = True
        del self.waiting[:size]


class AnyOrder(RuleBasedStateMachine):
    """The steps, and what holds after each."""

    real: World
    virtual: World
    version: ssl.TLSVersion

    def __init__(self) -> None:
        super().__init__()
        self.sides = [Side(self.virtual, self.version), Side(self.real, self.version)]
        self.sent = bytearray()
        self.pieces: list[tuple[int, int]] = []  # ciphertext until the end of a record, and its plaintext
        self.sealed = self.left_peer = 0
        self.is_ended = self.said_goodbye = self.is_closed = False

    def seal(self, size: int) -> None:
        data = (hashlib.sha256(len(self.sent).to_bytes(8, "big")).digest() * 512)[:size]
        for side in self.sides:
            side.waiting += side.talk.peer.seal(data)
        self.sent += data
        self.sealed = self.left_peer + len(self.sides[0].waiting)
        self.pieces.append((self.sealed, len(self.sent)))

    def send(self, size: int) -> None:
        self.left_peer += min(size, len(self.sides[0].waiting))
        for side in self.sides:
            side.send(size)

    def may_send(self) -> bool:
        return not (self.is_ended or self.said_goodbye)

    @precondition(may_send)
    @rule(size=st.integers(1, 16384))
    def send_a_record(self, size: int) -> None:
        self.seal(size)
        self.send(len(self.sides[0].waiting))

    @precondition(may_send)
    @rule(size=st.integers(1, 16384), part=st.integers(1, 16384))
    def send_a_part(self, size: int, part: int) -> None:
        self.seal(size)
        self.send(part)

    @precondition(lambda self: self.may_send() and self.sides[0].waiting)
    @rule()
    def send_the_rest(self) -> None:
        self.send(len(self.sides[0].waiting))

    # One rule for all ends: with one each, most runs would be over before they have begun.
    @rule(how=st.sampled_from(["say goodbye", "end the stream", "close", "abort"]))
    def end(self, how: str) -> None:
        if how == "say goodbye":
            self.say_goodbye()
        elif how == "end the stream":
            self.end_the_stream()
        else:
            self.close(how)

    def say_goodbye(self) -> None:
        if self.may_send():
            self.said_goodbye = True
            for side in self.sides:
                side.waiting += side.talk.peer.seal_end()
            self.send(len(self.sides[0].waiting))

    def end_the_stream(self) -> None:
        if not self.is_ended:
            self.is_ended = True
            for side in self.sides:
                try:
                    side.talk.peer.end()
                except OSError:
                    side.is_cut_off = True

    def close(self, how: str) -> None:
        self.is_closed = True
        for side in self.sides:
            if how == "close":
                side.sink.tls.loseConnection()
            else:
                side.sink.tls.abortConnection()
                assert not side.talk.is_pending() and not side.talk.is_reader()

    @rule(repeats=st.integers(1, 3))
    def turn(self, repeats: int) -> None:
        for side in self.sides:
            for _ in range(repeats):
                side.talk.loop.turn(0.001)
            for timeout, pending in side.waits:
                assert (timeout == 0) == bool(pending), (timeout, pending)
            side.waits.clear()

    @rule()
    def pause(self) -> None:
        for side in self.sides:
            side.sink.pause()

    @rule()
    def resume(self) -> None:
        for side in self.sides:
            side.sink.resume()

    @rule(deliveries=st.integers(1, 3))
    def pause_inside(self, deliveries: int) -> None:
        for side in self.sides:
            side.pause_in = deliveries

    @rule(size=st.integers(1, 3000))
    def write(self, size: int) -> None:
        for side in self.sides:
            side.sink.tls.write(bytes(size))

    @invariant()
    def rules_hold(self) -> None:
        for side in self.sides:
            sink = side.sink
            assert sink.violations == []
            assert len(sink.lost) <= 1
            assert max(sink.deliveries, default=0) <= N
            assert self.sent.startswith(sink.data)
            if not self.is_closed:
                side.talk.check_lists(sink)
            elif sink.lost:
                assert not side.talk.is_pending() and not side.talk.is_reader()
        first, second = (side.sink for side in self.sides)
        if self.real is not REAL_WORLDS["LwsUvloop"]:  # which orders the calls of a turn in its own way
            assert first.deliveries == second.deliveries
            assert len(first.lost) == len(second.lost)

    def teardown(self) -> None:
        try:
            if not self.is_closed:
                self.all_arrives()
        finally:
            for side in self.sides:
                side.talk.close()
        for side in self.sides:
            assert side.sink.violations == []
            assert len(side.sink.lost) == 1

    def all_arrives(self) -> None:
        if self.may_send():
            self.send(len(self.sides[0].waiting))
        whole = max([plain for cipher, plain in self.pieces if cipher <= self.left_peer], default=0)
        for side in self.sides:
            sink = side.sink
            side.pause_in = 0
            sink.resume()
            side.talk.loop.until(lambda sink=sink: len(sink.data) == whole)
            if self.is_ended:
                side.talk.loop.until(lambda sink=sink: sink.lost)
            assert self.sent[:whole] == sink.data


# One class for each pair and version, for pytest and trial as if it were written out.
for _place, (_real, _virtual) in PAIRS.items():
    for _version in VERSIONS:
        _name = f"{_place}{_version.name}AnyOrder"
        _machine: Any = type(
            _name,
            (AnyOrder,),
            {"real": REAL_WORLDS[_real], "virtual": VIRTUAL_WORLDS[_virtual], "version": _version},
        )
        _case = _machine.TestCase
        _case.settings = settings(
            max_examples=25,
            stateful_step_count=40,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # to shrink a run that hangs takes ten seconds for each attempt
        )
        _case.__name__ = _case.__qualname__ = f"{_name}Tests"
        _case.__module__ = __name__
        _case.__doc__ = f"{_place} over {_version.name}: no order of steps breaks a rule."
        globals()[_case.__name__] = pytest.mark.slow(_case)
del _case, _machine
