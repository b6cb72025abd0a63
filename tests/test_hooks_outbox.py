"""What is to be told is told, whatever breaks: notes on a real disk, other processes that die, and virtual time."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.hooks.delivery import AT_ONCE, GRACE, LONGEST, LOOK_TIME, SHORTEST, Delivery, pause
from lwstwisted.hooks.names import Hook
from lwstwisted.hooks.outbox import Note, Outbox, Proof
from lwstwisted.hooks.senders import Unfit, Unreachable
from lwstwisted.stores.tree import found_of

TOP = Path(__file__).parent.parent

WRITER = """
import sys
from pathlib import Path
from lwstwisted.hooks.outbox import Note, Outbox, Proof
root = Path(sys.argv[1])
outbox = Outbox(root, 30.0)
outbox.put([Note("sure", "post-finish", "0")])
pairs = zip(sys.argv[2::2], sys.argv[3::2])
outbox.put([Note(name, "post-finish", etag, Proof((name,), etag)) for name, etag in pairs])
print("noted", flush=True)
sys.stdin.read()
"""


def note(upload: str, message: str = "{}", proof: Proof | None = None) -> Note:
    return Note(upload, "post-finish", message, proof)


class OutboxCase(SynchronousTestCase):
    """A root with notes."""

    def setUp(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, self.root)
        self.outbox = self.opened()

    def opened(self) -> Outbox:
        outbox = Outbox(self.root, LONGEST)
        self.addCleanup(outbox.close)
        return outbox

    def file(self, name: str, content: str = "x") -> str:
        """Make a file; its entity-tag."""
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        return found_of(path.stat()).etag

    def due(self, outbox: Outbox | None = None, now: float = 0.0, without: tuple[int, ...] = ()) -> list[str]:
        """The uploads that may be told of."""
        return [one.upload for one in (outbox or self.outbox).due(now, 100, without)]


class OutboxTests(OutboxCase):
    """Notes of one process."""

    def test_order(self) -> None:
        """Of one upload the first note only; of several ones, in the order in which they were made."""
        first, _, _ = self.outbox.put([note("a", "1"), note("b"), note("a", "2")])
        self.assertEqual([(one.upload, one.message) for one in self.outbox.due(0, 9, ())], [("a", "1"), ("b", "{}")])
        self.assertEqual(self.due(without=(first,)), ["b"])
        self.outbox.taken(first)
        self.assertEqual([(one.upload, one.message) for one in self.outbox.due(0, 9, ())], [("b", "{}"), ("a", "2")])

    def test_what_has_not_happened_is_not_told(self) -> None:
        """A note with a proof waits until it is confirmed, and what comes behind it as well."""
        (begun,) = self.outbox.put([note("a", "1", Proof(("f",), '"x"'))])
        self.outbox.put([note("a", "2")])
        self.assertEqual(self.due(), [])
        self.outbox.settle([begun], [])
        self.assertEqual([one.message for one in self.outbox.due(0, 9, ())], ["1"])

    def test_doubt(self) -> None:
        """If something went wrong, the file itself says whether it has its name."""
        etag = self.file("deep/é")
        ids = self.outbox.put(
            [
                note("there", proof=Proof(("deep", "é"), etag)),
                note("replaced", proof=Proof(("deep", "é"), '"1-1-1"')),
                note("missing", proof=Proof(("deep", "none"), etag)),
                note("under a file", proof=Proof(("deep", "é", "none"), etag)),
            ]
        )
        self.outbox.settle([], ids)
        self.assertEqual((self.due(), self.outbox.count()), (["there"], 1))

    def test_all_or_none(self) -> None:
        """Notes that belong together are there together."""
        self.assertRaises(OSError, self.outbox.put, [note("a"), Note("b", "post-finish", None)])  # type: ignore[arg-type]
        self.assertEqual(self.outbox.count(), 0)

    def test_put_off(self) -> None:
        """What has failed waits until its time; what hasn't comes first."""
        (late,) = self.outbox.put([note("late")])
        self.outbox.put_off(late, 10.0)
        self.outbox.put([note("new")])
        self.assertEqual((self.due(now=9.0), self.due(now=10.0)), (["new"], ["new", "late"]))
        self.assertEqual(self.outbox.due(10.0, 9, ())[1].tries, 1)

    def test_clock_that_was_set_back(self) -> None:
        """Nothing waits for a time that a clock had which was wrong."""
        (late,) = self.outbox.put([note("late")])
        self.outbox.put_off(late, 1e9)
        self.assertEqual(self.due(now=0.0), ["late"])

    def test_only_for_us(self) -> None:
        """Others of this machine can't read what is told of clients."""
        self.outbox.put([note("a")])
        folder = self.root / ".lwstwisted" / "hooks"
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.iterdir()]}
        self.assertEqual(modes.pop("hooks"), 0o700)
        self.assertEqual(set(modes.values()), {0o600})
        self.assertIn("outbox.db-wal", modes)

    def test_synced(self) -> None:
        """A note is on disk when it is made: SQLite is told to sync each transaction."""
        base = self.outbox._base
        found = [base.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
        self.assertEqual(found, ["wal", 2])

    def test_no_space(self) -> None:
        """A disk that is full is told as such, and the note isn't there."""
        base = self.outbox._base
        base.execute(f"PRAGMA max_page_count = {base.execute('PRAGMA page_count').fetchone()[0]}")
        failure = self.assertRaises(OSError, self.outbox.put, [note("a", "x" * 100_000)])
        self.assertEqual((failure.errno, self.outbox.count()), (28, 0))

    def test_damaged(self) -> None:
        """Notes that can't be read are an error of the start."""
        self.outbox.close()
        (self.root / ".lwstwisted" / "hooks" / "outbox.db").write_bytes(b"junk" * 10_000)
        self.assertRaises(OSError, Outbox, self.root, LONGEST)


class SeveralTests(OutboxCase):
    """Processes that share the notes."""

    def test_each_tells_its_own(self) -> None:
        """A process that lives is left alone, and keeps what it has not told."""
        other = self.opened()
        self.outbox.put([note("a")])
        self.assertEqual((other.adopt(True), self.due(other), self.due()), (0, [], ["a"]))

    def test_order_across_processes(self) -> None:
        """An upload that went on in another process is told in its order all the same."""
        other = self.opened()
        (first,) = self.outbox.put([note("a", "1")])
        other.put([note("a", "2")])
        self.assertEqual(self.due(other), [])
        self.outbox.taken(first)
        self.assertEqual(self.due(other), ["a"])

    def killed(self, *proofs: str) -> None:
        """Have a process note some things, and kill it."""
        command = [sys.executable, "-c", WRITER, str(self.root), *proofs]
        process = subprocess.Popen(command, cwd=TOP, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdin is not None
        self.assertEqual(process.stdout.readline(), b"noted\n")
        self.assertEqual(self.outbox.adopt(True), 0)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stdin.close()

    def test_killed(self) -> None:
        """What a dead process has left is told by another one: what is sure, and whose file is there; nothing else."""
        self.killed("there", self.file("there"), "lost", '"1-1-1"', "replaced", self.file("replaced"), "gone", '"2"')
        os.unlink(self.root / "replaced")
        self.file("replaced", "other")
        self.assertEqual(self.outbox.adopt(True), 2)
        self.assertEqual((self.due(), self.outbox.count()), (["sure", "there"], 2))

    def test_doubtful_ones_wait_for_a_start(self) -> None:
        """A process under way leaves what is in doubt to the next start, which first undoes what has to be undone."""
        self.killed("there", self.file("there"))
        self.assertEqual((self.outbox.adopt(False), self.due()), (1, ["sure"]))
        started = self.opened()
        self.assertEqual((started.adopt(True), self.due(started)), (1, ["there"]))

    def test_two_adopt(self) -> None:
        """What is left goes to one of those who look, and to no second one."""
        dead, other = self.opened(), self.opened()
        dead.put([note("a"), note("b")])
        dead.close()
        self.assertEqual([self.outbox.adopt(False), other.adopt(False)], [2, 0])
        self.assertEqual((self.due(), self.due(other)), (["a", "b"], []))


class Taker:
    """A sender whose answers a test gives."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.waiting: list[tuple[str, Deferred[bytes]]] = []
        self.failure: Exception | None = None
        self.is_slow = False

    def wants(self, hook: Hook) -> bool:
        return True

    async def send(self, hook: Hook, message: str, is_told: bool) -> bytes:
        assert is_told and hook is Hook.POST_FINISH
        self.sent.append(message)
        if self.is_slow:
            waiting: Deferred[bytes] = Deferred()
            self.waiting.append((message, waiting))
            return await waiting
        if self.failure is not None and not (message.startswith("good") and isinstance(self.failure, Unfit)):
            raise self.failure
        return b""


class DeliveryTests(OutboxCase):
    """How it is told, by a clock that the test sets."""

    def setUp(self) -> None:
        super().setUp()
        self.clock, self.taker = Clock(), Taker()
        self.delivery = Delivery(self.outbox, self.taker, self.at_once, self.clock)
        self.addCleanup(self.stop)

    async def at_once(self, work: Any, *args: Any) -> Any:
        return work(*args)

    def stop(self) -> None:
        stopping = Deferred.fromCoroutine(self.delivery.stop())
        self.clock.advance(GRACE)
        self.successResultOf(stopping)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def put(self, *uploads: str) -> None:
        self.outbox.put([note(upload, upload) for upload in uploads])
        self.delivery.wake()

    def test_at_once(self) -> None:
        """What is noted is told without a wait, and then it is gone."""
        self.delivery.start()
        self.put("a", "b")
        self.assertEqual((self.taker.sent, self.outbox.count(), self.delivery.told), (["a", "b"], 0, 2))

    def test_some_at_a_time(self) -> None:
        """A slow server has a few to do at a time, and the next one as soon as one is done."""
        self.taker.is_slow = True
        self.delivery.start()
        self.put(*[f"{number:03}" for number in range(3 * AT_ONCE)])
        self.assertEqual(len(self.taker.waiting), AT_ONCE)
        self.taker.waiting.pop(3)[1].callback(b"")
        self.assertEqual((len(self.taker.waiting), self.taker.sent[-1]), (AT_ONCE, f"{AT_ONCE:03}"))

    def test_down(self) -> None:
        """A server that is down is asked now and then, whatever waits: 1000 uploads cost a few requests a minute."""
        self.taker.failure = Unreachable("down")
        self.delivery.start()
        self.put(*[f"{number:04}" for number in range(1000)])
        for _ in range(600):
            self.clock.advance(1)
        self.assertTrue(600 / LONGEST <= len(self.taker.sent) <= 600 / (LONGEST / 2) + 10, len(self.taker.sent))
        self.assertEqual(self.outbox.count(), 1000)

    def test_back(self) -> None:
        """Everything is told within the longest pause after the server is back."""
        self.taker.failure = Unreachable("down")
        self.delivery.start()
        self.put("a", "b", "c")
        for _ in range(300):
            self.clock.advance(1)
        self.taker.failure, sent = None, len(self.taker.sent)
        for _ in range(int(LONGEST + 2 * LOOK_TIME)):
            self.clock.advance(1)
        self.assertEqual((sorted(self.taker.sent[sent:]), self.outbox.count()), (["a", "b", "c"], 0))

    def test_one_that_is_never_taken(self) -> None:
        """An event that the server doesn't like holds up nothing but what belongs to the same upload."""
        self.taker.failure = Unfit("status 400")
        self.delivery.start()
        self.outbox.put([note("bad", "bad 1"), note("bad", "good but behind it")])
        self.delivery.wake()
        for number in range(10):
            self.put(f"good {number}")
            for _ in range(int(LONGEST)):
                self.clock.advance(1)
        self.assertEqual((self.delivery.told, self.outbox.count()), (10, 2))
        self.assertNotIn("good but behind it", self.taker.sent)
        self.assertTrue(self.delivery.failed >= 10)

    def test_after_a_start(self) -> None:
        """What was not told before the end is told after the next start, and what failed has to wait no longer."""
        self.taker.failure = Unreachable("down")
        self.delivery.start()
        self.put("a")
        self.stop()
        self.outbox.close()
        self.outbox, taker, clock = self.opened(), Taker(), Clock()
        self.outbox.adopt(True)
        delivery = Delivery(self.outbox, taker, self.at_once, clock)
        delivery.start()
        clock.advance(SHORTEST)
        clock.advance(LOOK_TIME)
        self.assertEqual((taker.sent, self.outbox.count()), (["a"], 0))
        self.successResultOf(Deferred.fromCoroutine(delivery.stop()))

    def test_stop(self) -> None:
        """The end waits a moment for what is being told, and not longer; that is told again."""
        self.taker.is_slow = True
        self.delivery.start()
        self.put("a", "b")
        stopping = Deferred.fromCoroutine(self.delivery.stop())
        self.assertNoResult(stopping)
        self.taker.waiting[0][1].callback(b"")
        self.assertNoResult(stopping)
        self.clock.advance(GRACE)
        self.successResultOf(stopping)
        self.assertEqual(self.due(), ["b"])

    def test_notes_that_cannot_be_read(self) -> None:
        """A disk that fails is told in the log, and tried again."""
        self.delivery.start()
        base, self.outbox._base = self.outbox._base, sqlite3.connect(":memory:")
        self.delivery.wake()
        self.outbox._base.close()
        self.outbox._base = base
        self.assertEqual(len(self.flushLoggedErrors(OSError)), 1)
        self.outbox.put([note("a", "a")])
        self.clock.advance(LOOK_TIME)
        self.assertEqual(self.taker.sent, ["a"])



class PauseTests(SynchronousTestCase):
    """How long a failure is waited for."""

    def test_grows(self) -> None:
        """Twice as long each time, up to the longest, and by chance up to a half less."""
        self.assertEqual([pause(n, lambda: 1.0) for n in (1, 2, 3, 4, 5, 6, 7, 10**6)], [1, 2, 4, 8, 16, 30, 30, 30])
        self.assertEqual([pause(n, lambda: 0.0) for n in (1, 6)], [0.5, 15])
        self.assertTrue(len({pause(6) for _ in range(100)}) > 50)
