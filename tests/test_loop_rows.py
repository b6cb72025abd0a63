"""The rows of the table of cases, each a test: on every loop, over TLS 1.2 and 1.3, on real sockets and in memory.

Every test here runs once for each class at the end of this module, whose name tells the loop, the port and the
version. Those with ``Virtual`` in their names run on the kernel of ``virtual_peer.py``: there each wait is on record,
and nothing but the TLS between the two ends is real.
"""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.flow import Valve
from lwstwisted.web.limits import DEFAULT_LIMITS
from lwstwisted.web.site import StreamingSite
from tests.gate import Gate, Upload
from tests.tls_peer import (
    CORPUS,
    HANGING,
    REAL_WORLDS,
    VERSIONS,
    KeyUpdates,
    N,
    Sink,
    SinkFactory,
    Talk,
    ViewSink,
    World,
    cut,
    is_pending,
    logging_context,
    pattern,
    pending_list,
)
from tests.virtual_peer import VIRTUAL_WORLDS

KIB, MIB = 1024, 1024 * 1024


class Rows:
    """All rows, for one world and one version."""

    world: World
    version: ssl.TLSVersion

    @contextmanager
    def talk(self: Any, *, budget: int = N, **how: Any) -> Iterator[Talk]:
        with Talk(self.world.make_reactor(), self.world.listen, self.version, budget=budget, **how) as talk:
            yield talk
            for sink in talk.factory.sinks:
                self.assertEqual(sink.violations, [])
                self.assertLessEqual(len(sink.lost), 1)

    def is_virtual(self: Any) -> bool:
        return self.world in VIRTUAL_WORLDS.values()

    def assert_whole(self: Any, sink: Sink, data: bytes, where: str = "") -> None:
        self.assertEqual(hashlib.sha256(sink.data).hexdigest(), hashlib.sha256(data).hexdigest(), where)

    def assert_lists(self: Any, talk: Talk, sink: Sink) -> None:
        talk.check_lists(sink)
        if not (sink.lost or sink.is_paused):
            # Whoever may read is in one list at least.
            self.assertTrue(is_pending(talk.reactor, sink.reader) or sink.descriptor in talk.reactor.getReaders())

    def assert_gone(self: Any, talk: Talk, sink: Sink) -> None:
        """The connection is over, once, and whatever its owner still does with it, it comes back to no list."""
        self.assertEqual(len(sink.lost), 1)
        deliveries = list(sink.deliveries)
        for late in (sink.tls.resumeProducing, sink.tls.pauseProducing, sink.tls.resumeProducing):
            late()
            self.assert_lists(talk, sink)
        sink.tls.loseConnection()
        sink.tls.abortConnection()
        for _ in range(3):
            talk.loop.turn()
            self.assert_lists(talk, sink)
        self.assertEqual(sink.deliveries, deliveries)
        self.assertEqual(len(sink.lost), 1)

    def assert_sleeps(self: Any, talk: Talk) -> None:
        """Nobody has anything to do, and nothing is done."""
        before = talk.synthesised()
        if self.is_virtual():
            waits = talk.reactor.kernel.waits
            waits.clear()
            talk.loop.idle_turns()
            if self.world.drives_itself:
                # The timer of the test itself takes asyncio a turn without a wait.
                self.assertLessEqual(len(waits), 4)
            else:
                self.assertEqual([wait for wait in waits if wait is not None and wait <= 0], [])
        self.assertLessEqual(talk.loop.idle_turns(), 4)
        self.assertEqual(talk.synthesised(), before)

    def leave_some(self: Any, talk: Talk, size: int = 16384) -> bytes:
        """Have the first budget of one upload delivered and the consumer paused, so that the rest is left."""
        data = pattern(size)
        talk.factory.on_delivery = Sink.pause
        talk.arrive(talk.peer.seal(data))
        talk.sink.resume()
        talk.loop.until(lambda: talk.sink.deliveries)
        self.assertEqual(talk.sink.deliveries, [N])
        return data

    def complete(self: Any, talk: Talk, data: bytes) -> None:
        talk.loop.until(lambda: len(talk.sink.data) >= len(data))
        self.assert_whole(talk.sink, data)

    def test_row_01_who_is_in_the_list(self: Any) -> None:
        """An upload is pending when, and only when, plaintext may be left that its consumer may have."""
        for name, sizes in CORPUS.items():
            for pauses in (0, 3):
                with self.talk() as talk:
                    sink, data = talk.sink, pattern(sum(sizes))

                    def rest(sink: Sink, talk: Talk = talk, pauses: int = pauses) -> None:
                        if pauses and len(sink.deliveries) % pauses == 0:
                            sink.pause()
                            talk.loop.later(2, sink.resume)

                    def done(talk: Talk = talk, data: bytes = data) -> bool:
                        self.assert_lists(talk, talk.sink)
                        left = talk.sink.deliveries and len(talk.sink.data) < len(data)
                        if left and not talk.sink.is_paused and not talk.sink.unread():
                            self.assertTrue(talk.is_pending())
                        return len(talk.sink.data) == len(data)

                    talk.factory.on_delivery = rest
                    talk.arrive(talk.peer.seal(*cut(data, sizes)))
                    sink.resume()
                    talk.loop.until(done)
                    talk.loop.until(lambda sink=sink: not sink.is_paused)
                    talk.loop.turn()
                    talk.loop.turn()
                    self.assertFalse(talk.is_pending(), name)
                    self.assertTrue(talk.is_reader(), name)
                    self.assert_whole(sink, data, name)
                    if not pauses:
                        self.assert_sleeps(talk)

    def test_row_02_every_layout_of_records(self: Any) -> None:
        """An upload arrives whole, whatever its records are, though its client is silent ever after."""
        for name, sizes in CORPUS.items():
            with self.talk() as talk:
                data = pattern(sum(sizes))
                talk.arrive(talk.peer.seal(*cut(data, sizes)))
                talk.sink.resume()
                turns = talk.loop.until(lambda talk=talk, data=data: len(talk.sink.data) == len(data))
                self.assert_whole(talk.sink, data, name)
                self.assertLessEqual(max(talk.sink.deliveries), N)
                # One for each budget, and one for each read of the socket, which finds 64 KiB at least.
                most = len(data) // N + 4
                self.assertLessEqual(talk.synthesised(), most, name)
                if not self.world.drives_itself:
                    self.assertLessEqual(turns, most, name)

    def test_row_03_a_pause_costs_nothing(self: Any) -> None:
        """An upload that is held back with plaintext left neither spins nor stands in any list."""
        with self.talk() as talk:
            data = self.leave_some(talk)
            self.assert_sleeps(talk)
            self.assert_lists(talk, talk.sink)
            self.assertEqual(talk.sink.deliveries, [N])
            if self.world.merges:
                # Nor does a mark that is gone again wake the loop.
                talk.sink.resume()
                talk.sink.pause()
                self.assert_sleeps(talk)
            talk.factory.on_delivery = lambda sink: None
            talk.sink.resume()
            self.complete(talk, data)

    def test_row_04_the_hook_is_told_who(self: Any) -> None:
        """A loop with the hook is told which reader is pending, and not called again while it knows."""
        with self.talk() as talk:
            if not hasattr(talk.reactor, "fake_pollin"):
                self.assertFalse(pending_list(talk.reactor)._has_hook)
                return
            told: list[Any] = []
            hook = talk.reactor.fake_pollin
            talk.reactor.fake_pollin = lambda readers: (told.append(list(readers)), hook(readers))[1]
            data = pattern(16384)
            talk.arrive(talk.peer.seal(data))
            talk.sink.resume()
            self.complete(talk, data)
            # The last budget ends with the record: that nothing is left, only one turn more can tell.
            self.assertIn(told, ([[talk.sink.reader]] * 3, [[talk.sink.reader]] * 4, [[talk.sink.reader]] * 5))

    def test_row_04_without_the_list(self: Any) -> None:
        """With the mechanism switched off the same uploads hang: it is what makes them complete."""
        for name in HANGING:
            with self.talk() as talk:
                pending_list(talk.reactor).addPending = lambda reader: None
                data = pattern(sum(CORPUS[name]))
                talk.arrive(talk.peer.seal(*cut(data, CORPUS[name])))
                talk.sink.resume()
                for _ in range(len(data) // N + 50):
                    talk.loop.turn()
                # On a stock port the loop does not even look at the socket, before it has looked at what may be left.
                self.assertEqual(talk.sink.deliveries, [N] if talk.sink.reader is talk.sink.descriptor else [], name)

    def test_row_05_a_mark_survives_the_poll(self: Any) -> None:
        """A kernel that says nothing at all takes no mark away: what is decrypted arrives without it."""
        data = pattern(16384)
        with self.talk() as talk:
            talk.factory.on_delivery = lambda sink: sink.descriptor.stopReading()
            talk.arrive(talk.peer.seal(data))
            talk.sink.resume()
            self.complete(talk, data)

    def test_row_05_hang_up_with_plaintext_left(self: Any) -> None:
        """A client that resets its connection: what was decrypted arrives first, then one end."""
        data = pattern(16384)
        with self.talk() as talk:
            talk.factory.on_delivery = lambda sink: talk.peer.reset() if len(sink.deliveries) == 1 else None
            talk.arrive(talk.peer.seal(data))
            talk.sink.resume()
            talk.loop.until(lambda: talk.sink.lost)
            self.assert_whole(talk.sink, data)
            talk.sink.lost[0].trap(ConnectionLost)
            self.assert_gone(talk, talk.sink)

    def test_row_06_the_order_of_a_turn(self: Any) -> None:
        """Timers, one wait that does not block, what the kernel announced, and only then the pending ones."""
        with self.talk() as talk:
            events: list[str] = []
            names: dict[int, str] = {}
            talk.factory.on_delivery = lambda sink: events.append(names[id(sink)])
            second, ready = talk.connect()
            names.update({id(talk.sink): "pending", id(ready): "ready"})
            talk.arrive(talk.peer.seal(pattern(16384)))
            talk.sink.resume()
            ready.resume()
            talk.loop.turn_by_turn(lambda: events)
            self.assertTrue(talk.is_pending())
            second.send(second.seal(b"x"))
            talk.loop.until(lambda: ready.unread(), longest=0.0)
            talk.reactor.callLater(0, events.append, "timer")
            if self.is_virtual():
                talk.reactor.kernel.on_wait = lambda: events.append(f"wait {float(talk.reactor.kernel.waits[-1])}")
            events.clear()
            talk.loop.blocking_turn()
            if self.world.merges:
                waits = ["wait 0.0"] if self.is_virtual() else []
                self.assertEqual(events, ["timer", *waits, "ready", "pending"])
            else:
                # The order is the loop's. A turn of libuv's has two places for calls that were asked for.
                self.assertEqual({event for event in events if "wait" not in event}, {"pending", "ready", "timer"})
                self.assertEqual(events.count("ready"), 1)
                self.assertLessEqual(events.count("pending"), 3)

    def test_row_06_nobody_has_two_turns(self: Any) -> None:
        """An upload of which more lies in the socket than in OpenSSL takes one budget in a turn, not two."""
        with self.talk() as talk:
            talk.arrive(talk.peer.seal(pattern(16384)))
            talk.sink.resume()
            talk.loop.turn_by_turn(lambda: talk.sink.deliveries)
            talk.arrive(talk.peer.seal(pattern(16384)))  # so the kernel announces it, too
            counts: list[int] = []

            def done() -> bool:
                counts.append(len(talk.sink.deliveries))
                return len(talk.sink.data) == 2 * 16384

            talk.loop.turn_by_turn(done)
            # Where nobody merges, one turn is the kernel's and one the list's; libuv has two places for the list's.
            most = 1 if self.world.merges else 3
            self.assertLessEqual(max(after - before for before, after in pairwise(counts)), most)

    def test_row_07_a_train_of_records(self: Any) -> None:
        """1 MiB in one train of records, taken in slices of 4 KiB, then silence: the list stays armed to the end."""
        data = pattern(MIB)
        with self.talk(held=False) as talk:
            talk.peer.send(b"".join(talk.peer.seal(piece) for piece in cut(data, 64 * [16384])))
            self.complete(talk, data)
            self.assertLessEqual(max(talk.sink.deliveries), N)
            # One for each slice, and at worst two more for each record: one that finds a part of it only.
            self.assertLessEqual(talk.synthesised(), len(data) // N + 2 * 64)

    def test_row_08_paused_at_every_delivery(self: Any) -> None:
        """Paused after each delivery and resumed 5 ms later, nothing comes in between and nothing gets lost."""
        sizes = [16384, N + 1, 1, 16384, N, 7 * N // 2]
        data = pattern(sum(sizes))
        with self.talk() as talk:

            def rest(sink: Sink) -> None:
                sink.pause()
                self.assert_lists(talk, sink)
                talk.reactor.callLater(0.005, sink.resume)

            talk.factory.on_delivery = rest
            talk.arrive(talk.peer.seal(*cut(data, sizes)))
            talk.sink.resume()
            self.complete(talk, data)
            self.assertGreaterEqual(len(talk.sink.deliveries), len(data) // N)

    def test_row_08_paused_while_it_arrives(self: Any) -> None:
        """The same while the client goes on sending, piece by piece of a record."""
        sizes = [16384, N + 1, 16384]
        data = pattern(sum(sizes))
        with self.talk(held=False) as talk:

            def rest(sink: Sink) -> None:
                sink.pause()
                talk.loop.later(2, sink.resume)

            talk.factory.on_delivery = rest
            sealed = talk.peer.seal(*cut(data, sizes))
            for start in range(0, len(sealed), 5000):
                talk.peer.send(sealed[start : start + 5000])
                talk.loop.turn()
            self.complete(talk, data)

    def test_row_09_paused_again_while_replaying(self: Any) -> None:
        """Paused again before any leftover was used, after one budget of it, after each, and after all."""
        with self.talk() as talk:
            data = self.leave_some(talk)
            for delivered in range(1, 5):
                for _ in range(3):  # none used: resumed and paused before the loop turns
                    talk.sink.resume()
                    talk.sink.pause()
                    self.assert_lists(talk, talk.sink)
                    talk.loop.turn()
                    talk.loop.turn()
                    self.assertEqual(talk.sink.deliveries, delivered * [N])
                talk.sink.resume()
                if delivered < 4:
                    count = delivered + 1
                    talk.loop.until(lambda count=count: len(talk.sink.deliveries) == count)
            talk.loop.turn()
            talk.loop.turn()
            self.assertFalse(talk.is_pending())
            self.assert_whole(talk.sink, data)

    def test_row_09_paused_at_every_kth_byte(self: Any) -> None:
        """A pause behind every k-th byte: nothing twice, nothing lost, for slices that end anywhere."""
        sizes = [61, 1, 34]
        data = pattern(sum(sizes))
        for k in range(1, 97) if self.is_virtual() else (1, 33, 61, 62, 96):
            with self.talk(budget=k) as talk:

                def rest(sink: Sink, talk: Talk = talk) -> None:
                    sink.pause()
                    talk.loop.later(len(sink.deliveries) % 2, sink.resume)

                talk.factory.on_delivery = rest
                talk.arrive(talk.peer.seal(*cut(data, sizes)))
                talk.sink.resume()
                self.complete(talk, data)
                self.assertLessEqual(max(talk.sink.deliveries), k)

    def test_row_10_two_reasons(self: Any) -> None:
        """Paused for two reasons, an upload goes on when both are gone, whichever goes first."""
        for first, last in (("store", "answer"), ("answer", "store")):
            with self.talk() as talk:
                valve = Valve(talk.sink.pause, talk.sink.resume)
                data = pattern(16384)
                talk.factory.on_delivery = lambda sink, valve=valve: (valve.close("store"), valve.close("answer"))
                talk.arrive(talk.peer.seal(data))
                talk.sink.resume()
                talk.loop.until(lambda talk=talk: talk.sink.deliveries)
                valve.open(first)
                talk.loop.turn()
                talk.loop.turn()
                self.assert_lists(talk, talk.sink)
                self.assertEqual(talk.sink.deliveries, [N])
                talk.factory.on_delivery = lambda sink: None
                valve.open(last)
                self.complete(talk, data)

    def test_row_11_resumed_by_a_timer(self: Any) -> None:
        """A timer that resumes leftovers is enough; the loop does not wait for the socket."""
        with self.talk() as talk:
            data = self.leave_some(talk, 2 * N)
            talk.reactor.callLater(0.001, talk.sink.resume)
            turns = talk.loop.until(lambda: len(talk.sink.data) == 2 * N)
            self.assert_whole(talk.sink, data)
            if not self.world.drives_itself:
                self.assertLessEqual(turns, 6)

    def test_row_11_resumed_from_a_thread(self: Any) -> None:
        """A store's thread that resumes by callFromThread wakes the loop at once."""
        with self.talk() as talk:
            data = self.leave_some(talk, 2 * N)
            store = threading.Thread(target=talk.reactor.callFromThread, args=(talk.sink.resume,))
            store.start()
            turns = talk.loop.until(lambda: len(talk.sink.data) == 2 * N)
            store.join()
            self.assert_whole(talk.sink, data)
            if not self.world.drives_itself:
                self.assertLessEqual(turns, 6)

    def test_row_12_writing_goes_on(self: Any) -> None:
        """A response streams out while the upload is held back, and then nothing spins."""
        answer = pattern(500_000)
        with self.talk() as talk:
            self.leave_some(talk)
            talk.sink.tls.write(answer)
            self.assertEqual(talk.answer(len(answer)), answer)
            self.assertEqual(talk.sink.deliveries, [N])
            self.assert_sleeps(talk)
            self.assert_lists(talk, talk.sink)

    def test_row_13_our_pause_is_not_the_clients_time(self: Any) -> None:
        """A store that hangs for twice the time limit of a body costs no upload; a client that does, its own."""
        body = pattern(3 * N)
        for paused in (True, False):
            with self.web() as (talk, gate, clock):
                talk.arrive(talk.peer.seal(put(len(body)), body[:N]))
                talk.sink.resume()
                talk.loop.until(lambda gate=gate: gate.uploads and gate.uploads[0].data)
                (upload,) = gate.uploads
                if paused:
                    upload.pause()
                for _ in range(20):
                    clock.advance(DEFAULT_LIMITS.body_time / 10)
                    talk.loop.turn()
                if paused:
                    talk.peer.send(talk.peer.seal(body[N:]))
                    upload.resume()
                    self.assertIn(b" 200 OK", talk.answer(1))
                    self.assertEqual(upload.data, body)
                else:
                    talk.loop.until(lambda upload=upload: upload.cut)
                    self.assertEqual(upload.data, body[:N])

    def test_row_14_a_pause_ends_with_its_request(self: Any) -> None:
        """A consumer that pauses at the last bytes and never resumes holds up no further request."""
        body = pattern(2 * N)
        with self.web() as (talk, gate, _):

            def pause_and_answer(upload: Upload) -> None:
                if len(upload.data) == len(body):
                    upload.pause()
                    upload.answer()

            gate.on_data = pause_and_answer
            talk.sink.resume()
            for count in (1, 2, 3):
                talk.peer.send(talk.peer.seal(put(len(body)), body))
                self.assertIn(b" 200 OK", talk.answer(1))
                self.assertEqual([upload.data for upload in gate.uploads], count * [body])

    def test_row_15_the_peer_leaves_during_a_pause(self: Any) -> None:
        """A client that goes away amid an upload we hold back: on resume all that came whole, then one end."""
        whole, part = pattern(5 * N), pattern(N)
        for way in ("end", "reset"):
            with self.talk() as talk:
                sealed = talk.peer.seal(whole[:16384], whole[16384:]) + talk.peer.seal(part)[:-1]
                talk.factory.on_delivery = Sink.pause
                talk.arrive(sealed)
                talk.sink.resume()
                talk.loop.until(lambda talk=talk: talk.sink.deliveries)
                getattr(talk.peer, way)()
                for _ in range(3):
                    talk.loop.turn()
                self.assertEqual((talk.sink.deliveries, talk.sink.lost), ([N], []))
                talk.factory.on_delivery = lambda sink: None
                talk.sink.resume()
                talk.loop.until(lambda talk=talk: talk.sink.lost)
                self.assert_whole(talk.sink, whole, way)
                talk.sink.lost[0].trap(ConnectionLost)
                self.assert_gone(talk, talk.sink)

    def test_row_16_key_update_amid_an_upload(self: Any) -> None:
        """New keys amid an upload, while the client reads nothing of our answer: both come through whole."""
        before, after = pattern(16384), pattern(3 * N)
        with self.talk(held=False) as talk, logging_context(self.version) as (context, secrets):
            talk.peer, talk.sink = talk.connect(context=context)
            answer, piece = bytearray(), pattern(256 * KIB)
            while talk.sink.descriptor not in talk.reactor.getWriters():
                talk.sink.tls.write(piece)
                answer += piece
                talk.loop.turn()
                self.assertLess(len(answer), 64 * MIB)
            sealed = talk.peer.seal(before)
            if self.version is ssl.TLSVersion.TLSv1_3:
                keys = KeyUpdates(talk.peer, secrets, records=1)
                sealed += keys.seal_update() + keys.seal(after)
            else:  # which has no such message
                sealed += talk.peer.seal(after)
            talk.peer.send(sealed)
            self.complete(talk, before + after)
            talk.sink.tls.write(b"end")
            self.assertEqual(talk.answer(len(answer) + 3), bytes(answer) + b"end")

    def test_row_17_a_request_with_the_finished(self: Any) -> None:
        """A request in the same flight as the client's Finished is looked at, in all its slices."""
        data = pattern(16384)
        with self.talk(held=False) as talk:
            peer = talk.new_peer()
            finished = peer.handshake(finish=False)
            peer.send(finished + peer.seal(data))
            sinks = talk.factory.sinks
            talk.loop.until(lambda: len(sinks) == 2 and len(sinks[1].data) == len(data))
            self.assert_whole(sinks[1], data)

    def test_row_18_two_records_and_a_half(self: Any) -> None:
        """What is whole is delivered though more is on its way; half a record makes nobody pending."""
        first, second, third = cut(pattern(3 * N + 2), [N + 1, 1, 2 * N])
        with self.talk() as talk:
            whole, half = talk.peer.seal(first, second), talk.peer.seal(third)
            talk.arrive(whole + half[:N])
            talk.sink.resume()
            talk.loop.until(lambda: len(talk.sink.data) == N + 2)
            talk.loop.turn()
            talk.loop.turn()
            self.assert_whole(talk.sink, first + second)
            self.assertFalse(talk.is_pending())
            self.assert_sleeps(talk)
            talk.peer.send(half[N:])
            self.complete(talk, first + second + third)

    def test_row_18_cut_everywhere(self: Any) -> None:
        """An upload whose ciphertext comes in two parts, whatever the parts are, and byte by byte."""
        sizes = [37, 1, 21]
        data = pattern(sum(sizes))
        with self.talk(budget=16, held=False) as talk:
            sealed = talk.peer.seal(*cut(data, sizes))
            places = range(len(sealed) + 1) if self.is_virtual() else (0, 4, 5, len(sealed) - 1)
            for count, place in enumerate(places):
                if count:
                    sealed = talk.peer.seal(*cut(data, sizes))
                talk.peer.send(sealed[:place])
                talk.loop.turn()
                talk.loop.turn()
                talk.peer.send(sealed[place:])
                talk.loop.until(lambda count=count: len(talk.sink.data) == (count + 1) * len(data))
            for byte in talk.peer.seal(*cut(data, sizes)):
                talk.peer.send(bytes([byte]))
                talk.loop.turn()
            self.complete(talk, (len(places) + 1) * data)
            self.assertFalse(talk.is_pending())

    @pytest.mark.slow
    def test_row_19_fair_beside_a_large_one(self: Any) -> None:
        """Beside 100 MiB on one connection, each of fifty small uploads is done within a few budgets of it."""
        budget, small = 64 * KIB, pattern(100 * KIB)
        size = 16 * MIB if self.is_virtual() else 100 * MIB
        with self.talk(budget=budget) as talk:
            peer, large = talk.peer, talk.sink
            others = [talk.connect() for _ in range(50)]
            for other, sink in others:
                talk.arrive(b"".join(other.seal(piece) for piece in cut(small, [16384] * 6 + [4096])), other, sink)
            taken = hashlib.sha256()
            counts = {"large": 0, "begin": -1}
            done_at: dict[int, int] = {}

            def count(sink: Sink) -> None:
                if sink is large:
                    counts["large"] += sink.deliveries[-1]
                    taken.update(sink.data)
                    sink.data.clear()
                    if counts["begin"] < 0 and counts["large"] > size // 2:
                        counts["begin"] = counts["large"]
                        for _, each in others:
                            each.resume()
                elif len(sink.data) == len(small):
                    done_at[id(sink)] = counts["large"] - counts["begin"]

            talk.factory.on_delivery = count
            large.resume()
            block = pattern(MIB)
            pieces = cut(block, 64 * [16384])
            for _ in range(size // MIB):
                peer.send(peer.seal(*pieces))
            talk.loop.until(lambda: counts["large"] == size and len(done_at) == 50)
            self.assertEqual(taken.digest(), hashlib.sha256(block * (size // MIB)).digest())
            for _, sink in others:
                self.assert_whole(sink, small)
            # Three turns with plaintext and two without; in each the large one may have two where nobody merges.
            self.assertLessEqual(max(done_at.values()), 10 * budget)
            self.assertEqual([sink.lost for sink in talk.factory.sinks], [[]] * 51)

    def test_row_20_reading_and_writing_at_once(self: Any) -> None:
        """An upload and the response that echoes it both come through."""
        data = pattern(80_000)
        with self.talk() as talk:
            talk.factory.on_delivery = lambda sink: sink.tls.write(bytes(sink.data[-sink.deliveries[-1] :]))
            talk.arrive(talk.peer.seal(*cut(data, 5 * [16000])))
            talk.sink.resume()
            self.assertEqual(talk.answer(len(data)), data)
            self.assert_whole(talk.sink, data)

    def test_row_20_neither_starves_the_other(self: Any) -> None:
        """A pending upload does not keep what was written from being sent, turn by turn."""
        with self.talk(held=False) as talk:
            answer = pattern(400 * KIB)
            talk.sink.tls.write(answer)
            talk.peer.send(b"".join(talk.peer.seal(piece) for piece in cut(pattern(512 * KIB), 32 * [16384])))
            at_end: list[int] = []
            got = bytearray()

            def arrived() -> bool:
                got.extend(talk.peer.receive())
                if len(got) == len(answer):
                    at_end.append(len(talk.sink.data))
                return bool(at_end)

            talk.loop.until(arrived, longest=0.01)
            self.complete(talk, pattern(512 * KIB))
            self.assertEqual(got, answer)
            if not self.world.drives_itself:  # a slice of its time is no turn
                self.assertLess(at_end[0], 512 * KIB)

    def test_row_21_half_of_them_closed_in_one_turn(self: Any) -> None:
        """The first of a hundred pending readers aborts fifty others: those end, the rest complete."""
        data = pattern(3 * N)
        with self.talk() as talk:
            for _ in range(99):
                talk.connect()
            sinks = talk.factory.sinks
            for peer, sink in zip(talk.peers, sinks, strict=True):
                talk.arrive(peer.seal(data), peer, sink)
            victims: list[Sink] = []

            def abort_half(sink: Sink) -> None:
                if len(sink.deliveries) == 2 and not victims:
                    victims.extend([other for other in sinks if other is not sink and len(other.deliveries) == 1][:50])
                    for victim in victims:
                        victim.tls.abortConnection()

            talk.factory.on_delivery = lambda sink: sink.pause()
            for sink in sinks:
                sink.resume()
            talk.loop.until(lambda: all(sink.deliveries for sink in sinks))
            talk.factory.on_delivery = abort_half
            for sink in sinks:
                sink.resume()
            talk.loop.until(lambda: victims)
            self.assertEqual(len(victims), 50)
            talk.loop.until(lambda: all(sink.lost for sink in victims))
            rest = [sink for sink in sinks if sink not in victims]
            talk.loop.until(lambda: all(len(sink.data) == len(data) for sink in rest))
            for sink in sinks:
                self.assertEqual(sink.deliveries, [N] if sink in victims else 3 * [N])
                self.assertEqual(len(sink.lost), int(sink in victims))

    def test_row_22_an_event_that_is_ignored(self: Any) -> None:
        """A loop that drops one event leaves the reader marked; when it comes back to it, all the data is there."""
        with self.talk() as talk:
            data = self.leave_some(talk)
            talk.factory.on_delivery = lambda sink: None
            listed = pending_list(talk.reactor)
            serve, ignored = listed.servicePending, []
            listed.servicePending = ignored.append
            talk.sink.resume()
            talk.loop.until(lambda: ignored)
            for _ in range(3):
                talk.loop.turn()
            self.assertTrue(talk.is_pending())
            self.assertEqual(talk.sink.deliveries, [N])
            listed.servicePending = serve
            serve(talk.sink.reader)
            self.assertEqual(talk.sink.deliveries, [N, N])
            self.complete(talk, data)

    def test_row_22_marked_twice(self: Any) -> None:
        """An upload that is pending while we close: a second mark is no end of the first, and the rest arrives."""
        with self.talk() as talk:
            data = self.leave_some(talk)
            talk.factory.on_delivery = lambda sink: None
            talk.sink.resume()
            self.assertTrue(talk.is_pending())
            talk.sink.tls.loseConnection()
            self.assertTrue(talk.is_pending())
            self.complete(talk, data)
            talk.loop.until(lambda: talk.peer.receive() or talk.peer.closed_by_server, longest=0.01)
            talk.peer.send(talk.peer.seal_end())
            talk.loop.until(lambda: talk.sink.lost)
            talk.sink.lost[0].trap(ConnectionDone)
            self.assert_gone(talk, talk.sink)

    def test_row_23_aborted_with_data_pending(self: Any) -> None:
        """An aborted connection is in no list from that moment on, and hears one end."""
        for paused, inside in ((False, False), (True, False), (False, True)):
            with self.talk() as talk:

                def first(sink: Sink, paused: bool = paused, inside: bool = inside) -> None:
                    if paused:
                        sink.pause()
                    if inside:
                        sink.tls.abortConnection()

                talk.factory.on_delivery = first
                talk.arrive(talk.peer.seal(pattern(16384)))
                talk.sink.resume()
                talk.loop.until(lambda talk=talk: talk.sink.deliveries)
                deliveries = list(talk.sink.deliveries)
                talk.sink.tls.abortConnection()
                self.assertFalse(talk.is_pending() or talk.is_reader())
                talk.sink.resume()
                self.assertFalse(talk.is_pending() or talk.is_reader())
                talk.loop.until(lambda talk=talk: talk.sink.lost)
                talk.sink.lost[0].trap(ConnectionAborted)
                self.assertEqual(talk.sink.deliveries, deliveries)
                self.assert_gone(talk, talk.sink)

    def test_row_23_its_number_is_used_again(self: Any) -> None:
        """A pending connection that is lost leaves nothing behind for the next one with the same descriptor."""
        with self.talk() as talk:
            old, data = talk.sink, pattern(16384)
            talk.arrive(talk.peer.seal(data))
            old.resume()
            talk.loop.turn_by_turn(lambda: old.deliveries)
            self.assertTrue(talk.is_pending())
            number = old.descriptor.fileno()
            old.descriptor.connectionLost(Failure(ConnectionLost()))
            self.assert_whole(old, data)
            talk.reactor.removeReader(old.descriptor)
            talk.peer.close()
            talk.peer, talk.sink = talk.connect()
            self.assertEqual(talk.sink.descriptor.fileno(), number)
            talk.arrive(talk.peer.seal(data))
            talk.sink.resume()
            self.complete(talk, data)
            self.assert_gone(talk, old)

    def test_row_23_lost_during_a_pause(self: Any) -> None:
        """What a pause held back when the loop gave the connection up is not delivered, then or later."""
        with self.talk() as talk:
            self.leave_some(talk)
            talk.sink.descriptor.connectionLost(Failure(ConnectionLost()))
            self.assertEqual((talk.sink.deliveries, len(talk.sink.lost)), ([N], 1))
            self.assert_gone(talk, talk.sink)

    def test_row_24_a_timer_below_a_millisecond(self: Any) -> None:
        """A timer of 0.4 ms is waited for, not polled for."""
        with self.talk() as talk:
            over: list[bool] = []
            asked = talk.loop.events.asked if self.world.drives_itself else 0
            talk.reactor.callLater(0.0004, over.append, True)
            turns = talk.loop.until(lambda: over)
            if self.world.drives_itself:
                # A look at the timers asks the loop for two or three things, and uvloop looks early once or twice: its
                # time is that of the begin of a turn. Polling is a hundred.
                self.assertLessEqual(talk.loop.events.asked - asked - turns, 16)
            else:
                self.assertLessEqual(turns, 3)

    def test_row_37_the_peer_sends_all_and_closes(self: Any) -> None:
        """A client that sends all and goes away while we hold it back: all arrives, then one end."""
        sizes = 20 * [N]
        data = pattern(sum(sizes))
        ends: dict[str, Callable[[Talk], object]] = {
            "goodbye and FIN": lambda talk: talk.peer.end(),
            "FIN": lambda talk: talk.peer.end(),
            "close": lambda talk: talk.peer.close(),
            "RST": lambda talk: talk.peer.reset(),
        }
        for way, end in ends.items():
            with self.talk() as talk:
                sealed = talk.peer.seal(*cut(data, sizes))
                talk.arrive(sealed + (talk.peer.seal_end() if "goodbye" in way else b""))
                talk.loop.turn()  # the session tickets of TLS 1.3 are sent, and will be unread when the client closes
                end(talk)
                for _ in range(3):
                    talk.loop.turn()
                self.assertEqual((talk.sink.deliveries, talk.sink.lost), ([], []))
                talk.sink.resume()
                talk.loop.until(lambda talk=talk: talk.sink.lost)
                self.assert_whole(talk.sink, data, way)
                talk.sink.lost[0].trap(ConnectionDone if "goodbye" in way else ConnectionLost)
                self.assert_gone(talk, talk.sink)

    def test_row_37_and_we_pause_at_every_delivery(self: Any) -> None:
        """The end waits behind each further pause, too."""
        data = pattern(16000)  # no multiple of N: the end is met behind the last bytes, in the same read
        for goodbye in (True, False):
            with self.talk() as talk:

                def rest(sink: Sink, talk: Talk = talk) -> None:
                    sink.pause()
                    talk.loop.later(2, sink.resume)

                talk.factory.on_delivery = rest
                talk.factory.on_lost = lambda sink: self.assertFalse(sink.is_paused)
                talk.arrive(talk.peer.seal(data) + (talk.peer.seal_end() if goodbye else b""))
                talk.peer.end()
                talk.sink.resume()
                talk.loop.until(lambda talk=talk: talk.sink.lost)
                self.assert_whole(talk.sink, data)
                self.assert_gone(talk, talk.sink)

    @contextmanager
    def web(self: Any) -> Iterator[tuple[Talk, Gate, Clock]]:
        """A site above the transport, whose deadlines are on a clock that is moved by hand."""
        gate, clock = Gate(), Clock()
        factory = SinkFactory(kind=ChannelSink)
        factory.site = StreamingSite(gate, clock)  # type: ignore[attr-defined]
        with self.talk(factory=factory) as talk:
            yield talk, gate, clock


class ChannelSink(ViewSink):
    """A sink that hands everything on to a channel of ``factory.site``."""

    def connectionMade(self) -> None:
        super().connectionMade()
        site: StreamingSite = self.factory.site  # type: ignore[attr-defined]
        self.channel: Any = site.buildProtocol(None)  # type: ignore[arg-type]
        self.channel.makeConnection(self.transport)

    def bufferReceived(self, view: memoryview) -> None:
        super().bufferReceived(view)
        self.channel.bufferReceived(view)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        super().connectionLost(reason)
        self.channel.connectionLost(reason)


def put(length: int) -> bytes:
    """The head of an upload."""
    return b"PUT /file HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % length


# One class for each world and version: for pytest and trial as if it were written out.
for _place, _world in {**REAL_WORLDS, **VIRTUAL_WORLDS}.items():
    for _version in VERSIONS:
        _name = f"{_place}{_version.name}Tests"
        _body = {
            "__doc__": f"The rows on {_place}, over {_version.name}.",
            "__module__": __name__,
            "world": _world,
            "version": _version,
        }
        globals()[_name] = type(_name, (Rows, SynchronousTestCase), _body)
