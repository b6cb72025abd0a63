"""Power cuts: what a client was told is stored must be there when the power comes back.

``python -m tests.powercut [--method shutdown|log|calls] [--fs ext4|xfs|btrfs] [--cuts N] [--seconds S] [--seed SEED]``
runs services on one root under load, cuts the power, mounts what is left, starts the store again and judges. It ends
with status 1 if anything was lost. ``--mutants`` judges the harness instead: with each precaution of the store taken
out in turn (``tests/powercut_mutants.py``) it must report a loss.

Three methods
    * *shutdown*: the file system is told to stop without writing anything more (``FS_IOC_SHUTDOWN``), while the
      services are stopped by a signal. Nothing is dropped that the kernel has written by itself.
    * *log*: the disk notes all writes and flushes (``tests/blocklog.py``). From one load come many cuts, each at
      another position of the log; what was not flushed is there or not, sector by sector, at random.
    * *calls*: one service notes what it does to files (``tests/calllog.py``), and what it didn't sync is there or not,
      name by name and page by page. No file system is so bad; but each promises no more.

    With a log, a start that has a form to take back is cut as well, three times: somewhere, before something is
    settled, and behind it. The next start has to find what the first one has left.

The judge
    Clients keep what they sent, when, and what they were told. A name may have what one of the uploads or deletions of
    it left, whole, unless another one was acknowledged that began after that one was; so it may be newer than the last
    acknowledgement, never older. A form is there with all its files or with none. A name that is only ever created
    (``If-None-Match: *``) is acknowledged once, and stays what it was; of those who replace what they have seen
    (``If-Match``) one is. Nobody is told that a name is new that must have been there. An upload of several requests,
    by either protocol, is there until it is finished or cancelled, with all bytes that any answer has told of, be it an
    interim one, and no others than were sent. Bytes with a digest are there all together or not at all, and never
    if they are others than it says. A concatenation has the bytes of all its parts, and is a file as soon as they are
    whole. The store's own folders have nothing else when it has started again, and what can't be mounted is a failure
    too.

A cut by a log that failed leaves a recording, and its seed: ``--replay FOLDER SEED`` does exactly that cut again.
What the load does depends on its seed and on who came first.

Needs root, loop devices and, for the log, FUSE; for the calls only a file system in memory. All of it lives beneath one
temporary folder and goes with it.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import NamedTuple

from tests.powercut_disks import (
    FILE_SYSTEMS,
    WEAKEST,
    copy_disk,
    logged,
    make_disk,
    missing,
    mounted,
    opened,
    remove_disk,
    replay,
    temporary_folder,
)
from tests.powercut_history import History, Operation
from tests.powercut_load import PROCESSES, load, services
from tests.powercut_mutants import HIDDEN_BY_EXT4, TOOK_EFFECT, names
from tests.powercut_recovery import Recovery, State, is_interrupted, look, recover, recovering
from tests.servers import Server

TOP = Path(__file__).parent.parent

SHUTDOWN = 0x8004587D
"""``FS_IOC_SHUTDOWN`` of ioctl_xfs_goingdown(2), which ext4 has under another name, and btrfs does not have."""
NOTHING_MORE = 2
"""Its argument: write nothing more, not even the journal."""

CLIENTS = 6
CUTS_A_LOAD = 100
"""By a log."""
JUDGES = 4
"""Threads that judge: mounting is mostly waiting."""
STARTS = 2
"""Processes that start stores for them: that is mostly computing."""


_interrupted = Event()
"""Nothing new begins."""


# The first method


def cut_by_shutdown(root: Path, servers: Iterable[Server]) -> None:
    """Stop the services, then the file system: what was acknowledged was so before."""
    for server in servers:
        server.process.send_signal(signal.SIGSTOP)
    for server in servers:
        _, status = os.waitpid(server.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), "a service ended before the cut"
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", NOTHING_MORE))
    finally:
        os.close(descriptor)


@dataclass
class Outcome:
    """What some cuts led to.

    :ivar cuts: how many.
    :ivar acknowledged: operations that had to be there, over all cuts.
    :ivar failures: for each cut with problems its seed, and the problems.
    :ivar again: how many times the power was cut once more, while the store started.
    :ivar took_effect: whether a mutant lacked what it was without.
    :ivar recording: a folder for ``--replay``, if any was kept.
    """

    cuts: int = 0
    acknowledged: int = 0
    failures: dict[str, list[str]] = field(default_factory=dict)
    again: int = 0
    took_effect: bool = False
    recording: Path | None = None

    def add(self, other: Outcome) -> None:
        """What further cuts led to."""
        self.cuts += other.cuts
        self.again += other.again
        self.acknowledged += other.acknowledged
        self.failures.update(other.failures)
        self.took_effect |= other.took_effect


def shutdowns(kind: str, cuts: int, seed: str, mutant: str = "", deadline: float = float("inf")) -> Outcome:
    """Cut the power by shutting a file system down.

    :param cuts: how many, unless one fails.
    :param deadline: no cut begins later.
    """
    outcome, history = Outcome(), History()
    file_system = FILE_SYSTEMS[kind]
    with temporary_folder() as folder:
        image, at = folder / "image", folder / "mounted"
        file_system.make(image)
        for number in range(cuts + 1):
            rng = random.Random(f"{seed}:{number}")
            with mounted(image, file_system, at), services(at / "root", mutant, folder) as (servers, ports):
                found, problems = _look(at / "root")
                problems += history.problems + history.judge_answers() + history.judge(found)
                outcome.acknowledged += history.count()
                outcome.took_effect |= any(TOOK_EFFECT in server.text for server in servers)
                outcome.cuts = number
                if problems:
                    outcome.failures[f"{seed}:{number - 1}"] = problems
                if problems or number == cuts or time.monotonic() > deadline or _interrupted.is_set():
                    return outcome
                _make_room(at / "root", found)
                history.go_on_from(found)
                clients = rng.randint(1, CLIENTS)
                with load(f"{seed}:{number}", ports, at / "root", history, number, clients) as under_way:
                    time.sleep(rng.uniform(0.02, 0.3))
                    # A sync under way while a file system stops may succeed, and what it should keep be gone.
                    under_way.stop_person()
                    under_way.stop.set()
                    cut_by_shutdown(at / "root", servers)
                    outcome.took_effect |= any(TOOK_EFFECT in server.text for server in servers)
                    for server in servers:
                        server.process.kill()
                    under_way.finish()
    raise AssertionError("not reached")


def _look(root: Path) -> tuple[dict[str, State], list[str]]:
    try:
        recover(root)  # beside the services, which have taken back what was interrupted
        return look(root)
    except OSError as error:
        return {}, [f"what is left can't be read: {error!r}"]


def _make_room(root: Path, found: dict[str, State]) -> None:
    """Remove what earlier loads left, now and then."""
    if len(found) > 400:
        for path in root.iterdir():
            if path.is_file():
                path.unlink()
            elif path.name != ".lwstwisted":
                shutil.rmtree(path)
        for path in (root / ".lwstwisted" / "uploads").iterdir():
            path.unlink()
        os.sync()
        found.clear()


# The other methods


@dataclass
class Recording:
    """A load on a disk with a log.

    :ivar folder: with the disk ``start`` and the file ``log``.
    :ivar kind: of the disk.
    :ivar end: the position where the load was over.
    :ivar mutant: or "".
    """

    folder: Path
    kind: str
    history: History
    end: int
    mutant: str = ""
    took_effect: bool = False

    def save(self, folder: Path) -> None:
        """Copy all that is needed to do its cuts again."""
        folder.mkdir(parents=True, exist_ok=True)
        copy_disk(self.folder / "start", folder / "start")
        shutil.copy(self.folder / "log", folder / "log")
        operations = [vars(operation) for operation in self.history.operations]
        told = {"kind": self.kind, "end": self.end, "mutant": self.mutant, "operations": operations}
        (folder / "recording.json").write_text(json.dumps(told))

    @classmethod
    def saved(cls, folder: Path) -> Recording:
        """What :meth:`save` wrote."""
        told = json.loads((folder / "recording.json").read_text())
        history = History(operations=[Operation(**operation) for operation in told["operations"]])
        return cls(folder, told["kind"], history, told["end"], told["mutant"])


def record(kind: str, folder: Path, seed: str, seconds: float, clients: int, mutant: str = "") -> Recording:
    """Run a load on a disk with a log."""
    disk, start = folder / "disk", folder / "start"
    make_disk(kind, disk)
    copy_disk(disk, start)
    # The weakest file system has no journal that orders what two processes do.
    processes = 1 if kind == WEAKEST else PROCESSES
    with ExitStack() as stack:
        at, log = stack.enter_context(logged(kind, disk, folder / "log"))
        servers, ports = stack.enter_context(services(at / "root", mutant, folder, processes, log.calls))
        history = History(log.position)
        begin = log.position()
        with load(seed, ports, at / "root", history, 0, clients, log.calls) as under_way:
            time.sleep(seconds)
            under_way.finish()
        recording = Recording(folder, kind, history, log.position(), mutant)
        recording.took_effect = any(TOOK_EFFECT in server.text for server in servers)
        if recording.end <= begin:
            history.problems.append("the load wrote nothing")
        history.problems += history.judge_answers()
        for server in servers:
            server.process.kill()
    return recording


def positions(recording: Recording, settled: Sequence[int], seeds: Sequence[str]) -> list[tuple[int, str]]:
    """Where each cut of a recording is, in the order of the log.

    Some are right behind an acknowledgement, where what should have been durable before it may be missing; some right
    before something is settled, where most is unsettled; the others anywhere.
    """
    acknowledged = [
        operation.ended_at for operation in recording.history.operations if operation.ended_at is not None
    ]
    first = min(operation.begun_at for operation in recording.history.operations)
    settled = [at for at in settled if first <= at < recording.end]
    found = []
    for seed in seeds:
        rng = random.Random(seed)
        choice = rng.random()
        if choice < 0.4 and acknowledged:
            position = rng.choice(acknowledged)
        elif choice < 0.6 and settled:
            position = rng.choice(settled)
        else:
            position = rng.randint(first, recording.end)
        found.append((position, seed))
    return sorted(found)


class Cut(NamedTuple):
    """A disk after a cut.

    :ivar position: of the cut, in the log of the load.
    """

    disk: Path
    position: int
    seed: str


class Verdict(NamedTuple):
    """What is wrong after a cut.

    :ivar again: how many times the power was cut while the store started.
    """

    problems: list[str]
    again: int = 0


def judge_cuts(recording: Recording, seeds: Sequence[str], folder: Path, recovery: Recovery) -> Outcome:
    """Cut the power at many positions of a recording; with a mutant until there is a loss.

    :param folder: for files.
    """
    outcome = Outcome(took_effect=recording.took_effect)
    if recording.history.problems:
        outcome.failures["load"] = recording.history.problems
        if recording.mutant:
            return outcome
    disks, settled = replay(recording.kind, recording.folder / "start", recording.folder / "log", folder / "stable")
    planned = positions(recording, settled, seeds)
    with ThreadPoolExecutor(JUDGES) as pool:
        for first in range(0, len(planned), JUDGES):
            some = [
                Cut(folder / f"cut{number}", position, seed)
                for number, (position, seed) in enumerate(planned[first : first + JUDGES])
            ]
            for cut in some:
                disks.cut(cut.position, random.Random(f"{cut.seed} sectors"), cut.disk)
            verdicts = pool.map(_judge_disk, itertools.repeat(recording), some, itertools.repeat(recovery))
            for cut, verdict in zip(some, verdicts, strict=True):
                remove_disk(cut.disk)
                outcome.cuts += 1
                outcome.again += verdict.again
                outcome.acknowledged += recording.history.count(cut.position)
                if verdict.problems:
                    outcome.failures[cut.seed] = [f"behind {cut.position} records", *verdict.problems]
            if (recording.mutant and outcome.failures) or _interrupted.is_set():
                break
    outcome.took_effect |= recovery.took_effect
    return outcome


def _judge_disk(recording: Recording, cut: Cut, recovery: Recovery) -> Verdict:
    before = cut.disk.with_suffix(".before")
    copy_disk(cut.disk, before)
    try:
        with opened(recording.kind, cut.disk) as at:
            needs_care = is_interrupted(at / "root")
            found, problems = recovery(at / "root")
        problems += recording.history.judge(found, cut.position)
        if problems or not needs_care:
            return Verdict(problems)
        return _cut_again(recording, cut._replace(disk=before), recovery)
    except Exception as error:
        return Verdict([f"what is left can't be used: {error!r}"])
    finally:
        remove_disk(before)


def _cut_again(recording: Recording, cut: Cut, recovery: Recovery) -> Verdict:
    """Cut the power while a store takes back what was interrupted, and behind that.

    What is there afterwards has to be what was there the first time: somebody may have seen it.
    """
    kind, rng = recording.kind, random.Random(f"{cut.seed} again")
    start, log, disk = cut.disk.with_suffix(".start"), cut.disk.with_suffix(".log"), cut.disk.with_suffix(".again")
    copy_disk(cut.disk, start)
    try:
        with logged(kind, cut.disk, log) as (at, noted):
            first, problems = recovery(at / "root", noted.calls)
            end = noted.position()
        disks, settled = replay(kind, start, log, cut.disk.with_suffix(".stable"))
        settled = [position for position in settled if position < end]
        cuts = [rng.choice(settled or [end]), rng.randint(1, end), end]
        for position in sorted(cuts):
            disks.cut(position, rng, disk)
            try:
                with opened(kind, disk) as at:
                    found, more = recovery(at / "root")
            finally:
                remove_disk(disk)
            problems += more + recording.history.judge(found, cut.position)
            if found != first:
                changed = sorted(name for name in {*found, *first} if found.get(name) != first.get(name))
                problems.append(f"lost: {changed[0]} is another one than after the first start")
            if problems:
                return Verdict([f"and behind {position} of {end} records of the start", *problems], len(cuts))
        return Verdict([], len(cuts))
    finally:
        remove_disk(start)


def logged_cuts(
    kind: str,
    cuts: int,
    seed: str,
    seconds: float,
    mutant: str = "",
    keep: Path | None = None,
    deadline: float = float("inf"),
) -> Outcome:
    """Cut the power by the log, until some cut fails.

    :param cuts: how many.
    :param keep: where a recording goes of which a cut failed.
    :param deadline: no load begins later.
    """
    total = Outcome()
    with temporary_folder() as site, recovering(mutant, site, STARTS) as recovery:
        for number in itertools.count():
            count = min(CUTS_A_LOAD, cuts - total.cuts)
            if count <= 0 or time.monotonic() > deadline or _interrupted.is_set():
                return total
            name = f"{seed}:{number}"
            clients = random.Random(name).choice([1, 1, 2, 4, CLIENTS])
            with temporary_folder() as folder:
                recording = record(kind, folder, name, seconds, clients, mutant)
                total.add(judge_cuts(recording, [f"{name}:{cut}" for cut in range(count)], folder, recovery))
                if total.failures:
                    if keep is not None:
                        recording.save(keep)
                        total.recording = keep
                    return total
    raise AssertionError("not reached")


# The command line


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    :returns: exit status.
    """
    parser = argparse.ArgumentParser(prog="tests.powercut", description="Cut the power under two services.")
    parser.add_argument("--method", choices=list(DEFAULT_FILE_SYSTEMS), action="append", help="default: all")
    parser.add_argument("--fs", choices=list(FILE_SYSTEMS), action="append", help="default: ext4, and xfs by shutdown")
    parser.add_argument("--cuts", type=int, help="on each; default: 250, 2000, 2000, mutants 1000")
    parser.add_argument("--seconds", type=float, default=1.5, help="of one load with a log, default 1.5")
    parser.add_argument("--seed", default=str(int(time.time())))
    parser.add_argument("--keep", type=Path, help="folder for the recording of a cut that failed")
    parser.add_argument("--mutants", nargs="*", metavar="NAME", help="judge the harness: all of them, or these")
    parser.add_argument("--replay", nargs=2, metavar=("FOLDER", "SEED"), help="do a cut of a recording again")
    options = parser.parse_args(arguments)
    options.keep = options.keep or Path(tempfile.gettempdir()) / f"powercut-{options.seed}"
    print(f"seed {options.seed}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all is unmounted
    if options.replay:
        outcome = replay_cut(Path(options.replay[0]), options.replay[1])
        _print("replay", outcome)
        return int(bool(outcome.failures))
    if options.mutants is not None:
        wanted = options.mutants or names()
        kinds = [WEAKEST] if options.method == ["calls"] else options.fs
        return _two_at_once(judge_mutant, [(name, kind, options) for name in wanted for kind in kinds or [where(name)]])
    jobs = [
        (method, kind, options)
        for method in options.method or DEFAULT_FILE_SYSTEMS
        for kind in (method != "calls" and options.fs) or DEFAULT_FILE_SYSTEMS[method]
    ]
    return _two_at_once(_run, jobs)


def _two_at_once(work: Callable[..., int], jobs: Iterable[tuple[object, ...]]) -> int:
    """Whoever is interrupted ends what is under way, so that all is unmounted."""
    with ThreadPoolExecutor(2) as pool:
        try:
            return max(pool.map(lambda job: work(*job), jobs))
        except BaseException:
            _interrupted.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


DEFAULT_FILE_SYSTEMS = {"shutdown": ["ext4", "xfs"], "log": ["ext4"], "calls": [WEAKEST]}
DEFAULT_CUTS = {"shutdown": 250, "log": 2000, "calls": 2000}
MUTANT_CUTS = 1000


def _run(method: str, kind: str, options: argparse.Namespace) -> int:
    reason = missing(method, kind)
    if reason:
        print(f"{method} {kind}: not done, {reason}", flush=True)
        return 1
    cuts = options.cuts or DEFAULT_CUTS[method]
    if method == "shutdown":
        outcome = shutdowns(kind, cuts, options.seed)
    else:
        outcome = logged_cuts(kind, cuts, options.seed, options.seconds, keep=options.keep)
    _print(kind if kind == WEAKEST else f"{method} {kind}", outcome)
    return 1 if outcome.failures else 0


def _print(what: str, outcome: Outcome) -> None:
    print(
        f"{what}: {outcome.cuts} cuts, {outcome.again} more of the starts behind them, "
        f"{outcome.acknowledged} acknowledged operations looked for, {len(outcome.failures)} cuts with a loss",
        flush=True,
    )
    for seed, problems in outcome.failures.items():
        print("\n  ".join([f"seed {seed}", *problems[:10]]), flush=True)
    if outcome.recording is not None:
        print(f"again: python -m tests.powercut --replay {outcome.recording} SEED", flush=True)


def replay_cut(folder: Path, seed: str) -> Outcome:
    """Do a cut of a recording again."""
    recording = Recording.saved(folder)
    with temporary_folder() as scratch, recovering(recording.mutant, scratch, 1) as recovery:
        return judge_cuts(recording, [seed], scratch, recovery)


def where(mutant: str) -> str:
    """The disk on which a mutant is seen to lose something."""
    return WEAKEST if mutant in HIDDEN_BY_EXT4 else "ext4"


def judge_mutant(name: str, kind: str, options: argparse.Namespace) -> int:
    """Print whether a mutant loses anything.

    :returns: 1 if it doesn't, where it should.
    """
    outcome = logged_cuts(kind, options.cuts or MUTANT_CUTS, options.seed, options.seconds, name)
    told = next(iter(outcome.failures.values()), ["no loss"])
    effect = "" if outcome.took_effect else "never took effect; "
    print(f"{kind:7} {name:42} {outcome.cuts:5} cuts: {effect}{'; '.join(told[:3])}", flush=True)
    if kind == "ext4" and name in HIDDEN_BY_EXT4 and not outcome.failures:
        print(f"        as {HIDDEN_BY_EXT4[name]}", flush=True)
    return int(kind == where(name) and not outcome.failures)


if __name__ == "__main__":
    sys.exit(main())
