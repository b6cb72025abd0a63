"""Power cuts: what a client was told is stored must be there when the power comes back.

``python -m tests.powercut [--method shutdown|log] [--fs ext4|xfs|btrfs] [--cuts N] [--seconds S] [--seed SEED]`` runs
two services on one root under load, cuts the power, mounts what is left, starts the store again and judges. It ends
with status 1 if anything was lost. ``--mutants`` judges the harness instead: with each precaution of the store taken
out in turn (``tests/powercut_mutants.py``) it must report a loss.

Two methods
    * *shutdown*: the file system is told to stop without writing anything more (``FS_IOC_SHUTDOWN``), while the
      services are stopped by a signal. Nothing is dropped that the kernel has written by itself.
    * *log*: the disk notes all writes and flushes (``tests/blocklog.py``). From one load come many cuts, each at
      another position of the log; what was not flushed is there or not, sector by sector, at random.

The judge
    Clients keep what they sent, when, and what they were told. A name may have what one of the uploads or deletions of
    it left, whole, unless another one was acknowledged that began after that one was; so it may be newer than the last
    acknowledgement, never older. A form is there with all its files or with none. A name that is only ever created
    (``If-None-Match: *``) is acknowledged once, and stays what it was. The store's own folders are empty when it has
    started again, and what can't be mounted is a failure too.

A cut by the log that failed leaves a recording, and its seed: ``--replay FOLDER SEED`` does exactly that cut again.
What the load does depends on its seed and on who came first.

Needs root, loop devices and, for the log, FUSE. All of it lives beneath one temporary folder and goes with it.
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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Event

from twisted.internet.defer import Deferred
from twisted.internet.testing import MemoryReactorClock

from lwstwisted.stores.local import LocalStore
from tests.blocklog import (
    FLUSH,
    LoggedDisk,
    Record,
    Replay,
    attached,
    copy_sparse,
    logged_disk,
    mount,
    read_log,
    unmount,
)
from tests.powercut_load import History, Operation, State, finish, load, look, services
from tests.powercut_mutants import CANNOT_LOSE, TOOK_EFFECT, names
from tests.servers import Server

TOP = Path(__file__).parent.parent

SHUTDOWN = 0x8004587D
"""``FS_IOC_SHUTDOWN`` of ioctl_xfs_goingdown(2), which ext4 has under another name, and btrfs does not have."""
NOTHING_MORE = 2
"""Its argument: write nothing more, not even the journal."""

CLIENTS = 6
CUTS_A_LOAD = 100
"""By the log."""
JUDGES = 4
"""Threads that judge: mounting is mostly waiting."""


@dataclass(frozen=True)
class FileSystem:
    """How one is made.

    :ivar size: bytes; the smallest that its tool allows, and a little more.
    :ivar options: for mount(2): copies of one file system are mounted beside each other.
    """

    kind: str
    size: int
    command: Sequence[str]
    options: str = ""

    def make(self, image: Path) -> None:
        """Make one in a new file."""
        with open(image, "wb") as file:
            file.truncate(self.size)
        subprocess.run([*self.command, image], check=True, stdout=subprocess.DEVNULL)

    @property
    def is_there(self) -> bool:
        """Whether there is a tool to make it."""
        return shutil.which(self.command[0]) is not None


_AT_ONCE = "lazy_itable_init=0,lazy_journal_init=0"  # else the kernel writes tables whenever it likes
FILE_SYSTEMS = {
    found.kind: found
    for found in [
        FileSystem("ext4", 96 << 20, ["mkfs.ext4", "-q", "-F", "-b", "4096", "-E", _AT_ONCE]),
        FileSystem("xfs", 320 << 20, ["mkfs.xfs", "-q", "-f", "-s", "size=4096"], "nouuid"),
        FileSystem("btrfs", 160 << 20, ["mkfs.btrfs", "-q", "-f", "-s", "4096", "-M"]),
    ]
}


@cache
def missing(method: str, kind: str) -> str:
    """Why there can't be power cuts here; "" if there can, as was tried."""
    if os.geteuid() != 0:
        return "only root can mount"
    if not os.path.exists("/dev/loop-control"):
        return "no loop devices here"
    if (method, kind) == ("shutdown", "btrfs"):
        return "btrfs has no such shutdown"
    if method == "log" and not os.path.exists("/dev/fuse"):
        return "no FUSE here"
    if not FILE_SYSTEMS[kind].is_there:
        return f"no {FILE_SYSTEMS[kind].command[0]} here"
    with temporary_folder() as folder, ExitStack() as stack:
        image = folder / "image"
        FILE_SYSTEMS[kind].make(image)
        try:
            if method == "log":
                image = stack.enter_context(logged_disk(image, folder / "log")).path
            stack.enter_context(mounted(image, FILE_SYSTEMS[kind], folder / "mounted"))
        except OSError as error:
            return f"no {kind} by {method} here: {error}"
    return ""


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Where all of it lives: in memory, if there is a file system for that."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="powercut-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@contextmanager
def mounted(image: Path, file_system: FileSystem, at: Path) -> Iterator[Path]:
    """Mount a file until the end of the block.

    :param at: where; it is made.
    """
    at.mkdir(exist_ok=True)
    with attached(image) as device:
        mount(device, at, file_system.kind, file_system.options)
        try:
            yield at
        finally:
            unmount(at)


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
    :ivar took_effect: whether a mutant lacked what it was without.
    :ivar recording: a folder for ``--replay``, if any was kept.
    """

    cuts: int = 0
    acknowledged: int = 0
    failures: dict[str, list[str]] = field(default_factory=dict)
    took_effect: bool = False
    recording: Path | None = None


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
                found, problems = look(at / "root")
                problems += history.problems + history.judge(found)
                outcome.acknowledged += history.count()
                outcome.took_effect |= any(TOOK_EFFECT in server.text for server in servers)
                outcome.cuts = number
                if problems:
                    outcome.failures[f"{seed}:{number - 1}"] = problems
                if problems or number == cuts or time.monotonic() > deadline or _interrupted.is_set():
                    return outcome
                _make_room(at / "root", found)
                history.go_on_from(found)
                stop, clients = load(f"{seed}:{number}", ports, history, number, rng.randint(1, CLIENTS))
                time.sleep(rng.uniform(0.02, 0.3))
                stop.set()
                cut_by_shutdown(at / "root", servers)
                outcome.took_effect |= any(TOOK_EFFECT in server.text for server in servers)
                for server in servers:
                    server.process.kill()
                finish(stop, clients)
    raise AssertionError("not reached")


def _make_room(root: Path, found: dict[str, State]) -> None:
    """Remove what earlier loads left, now and then."""
    if len(found) > 400:
        for path in root.iterdir():
            if path.name != ".lwstwisted":
                shutil.rmtree(path)
        os.sync()
        found.clear()


# The second method


@dataclass
class Recording:
    """A load on a disk with a log.

    :ivar folder: with the files ``start`` and ``log``.
    :ivar end: the position where the load was over.
    """

    folder: Path
    kind: str
    history: History
    end: int
    took_effect: bool = False

    def save(self, folder: Path) -> None:
        """Copy all that is needed to do its cuts again."""
        folder.mkdir(parents=True, exist_ok=True)
        copy_sparse(self.folder / "start", folder / "start")
        shutil.copy(self.folder / "log", folder / "log")
        operations = [vars(operation) for operation in self.history.operations]
        text = json.dumps({"kind": self.kind, "end": self.end, "operations": operations})
        (folder / "recording.json").write_text(text)

    @classmethod
    def saved(cls, folder: Path) -> Recording:
        """What :meth:`save` wrote."""
        told = json.loads((folder / "recording.json").read_text())
        history = History(operations=[Operation(**operation) for operation in told["operations"]])
        return cls(folder, told["kind"], history, told["end"])


def record(kind: str, folder: Path, seed: str, seconds: float, clients: int, mutant: str = "") -> Recording:
    """Run a load on a disk with a log."""
    file_system = FILE_SYSTEMS[kind]
    image, start, log = folder / "image", folder / "start", folder / "log"
    file_system.make(image)
    copy_sparse(image, start)
    with ExitStack() as stack:
        disk: LoggedDisk = stack.enter_context(logged_disk(image, log))
        at = stack.enter_context(mounted(disk.path, file_system, folder / "mounted"))
        servers, ports = stack.enter_context(services(at / "root", mutant, folder))
        history = History(lambda: disk.position)
        begin = disk.position
        stop, started = load(seed, ports, history, 0, clients)
        time.sleep(seconds)
        finish(stop, started)
        recording = Recording(folder, kind, history, disk.position)
        recording.took_effect = any(TOOK_EFFECT in server.text for server in servers)
        if recording.end <= begin:
            history.problems.append("the load wrote nothing")
        for server in servers:
            server.process.kill()
    return recording


def positions(recording: Recording, records: Sequence[Record], seeds: Sequence[str]) -> list[tuple[int, str]]:
    """Where each cut of a recording is, in the order of the log.

    Some are right behind an acknowledgement, where what should have been durable before it may be missing; some right
    before a flush, where most is unsettled; the others anywhere.
    """
    acknowledged = [
        operation.ended_at for operation in recording.history.operations if operation.ended_at is not None
    ]
    first = min(operation.begun_at for operation in recording.history.operations)
    flushes = [at for at in range(first, recording.end) if records[at].kind == FLUSH]
    found = []
    for seed in seeds:
        rng = random.Random(seed)
        choice = rng.random()
        if choice < 0.4 and acknowledged:
            position = rng.choice(acknowledged)
        elif choice < 0.6 and flushes:
            position = rng.choice(flushes)
        else:
            position = rng.randint(first, recording.end)
        found.append((position, seed))
    return sorted(found)


def judge_cuts(recording: Recording, seeds: Sequence[str], folder: Path, stop_early: bool = False) -> Outcome:
    """Cut the power at many positions of a recording.

    :param folder: for files.
    :param stop_early: at the first loss.
    """
    outcome = Outcome(took_effect=recording.took_effect)
    records = read_log(recording.folder / "log")
    replay = Replay(recording.folder / "start", records, folder / "stable")
    planned = positions(recording, records, seeds)
    with ThreadPoolExecutor(JUDGES) as pool:
        for first in range(0, len(planned), JUDGES):
            some = planned[first : first + JUDGES]
            images = [folder / f"cut{number}" for number in range(len(some))]
            for (position, seed), image in zip(some, images, strict=True):
                replay.cut(position, random.Random(f"{seed} sectors"), image)
            verdicts = pool.map(_judge_disk, itertools.repeat(recording), [position for position, _ in some], images)
            for (position, seed), problems in zip(some, verdicts, strict=True):
                outcome.cuts += 1
                outcome.acknowledged += recording.history.count(position)
                if problems:
                    outcome.failures[seed] = [f"behind {position} records", *problems]
            if stop_early and outcome.failures:
                break
    if recording.history.problems:
        outcome.failures["load"] = recording.history.problems
    return outcome


def _judge_disk(recording: Recording, position: int, image: Path) -> list[str]:
    at = image.with_suffix(".mounted")
    try:
        with mounted(image, FILE_SYSTEMS[recording.kind], at):
            recover(at / "root")
            found, problems = look(at / "root")
            return problems + recording.history.judge(found, position)
    except Exception as error:
        return [f"what is left can't be used: {error!r}"]


def recover(root: Path) -> None:
    """Start a store, and end it."""
    store = LocalStore(root, MemoryReactorClock())
    stopped: list[object] = []
    Deferred.fromCoroutine(store.stop()).addBoth(stopped.append)
    assert stopped == [None]


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
    for number in itertools.count():
        count = min(CUTS_A_LOAD, cuts - total.cuts)
        if count <= 0 or time.monotonic() > deadline or _interrupted.is_set():
            return total
        name = f"{seed}:{number}"
        clients = random.Random(name).choice([1, 1, 2, 4, CLIENTS])
        with temporary_folder() as folder:
            recording = record(kind, folder, name, seconds, clients, mutant)
            outcome = judge_cuts(recording, [f"{name}:{cut}" for cut in range(count)], folder, bool(mutant))
            total.cuts += outcome.cuts
            total.acknowledged += outcome.acknowledged
            total.took_effect |= outcome.took_effect
            total.failures.update(outcome.failures)
            if outcome.failures:
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
    parser.add_argument("--method", choices=["shutdown", "log"], action="append", help="default: both")
    parser.add_argument("--fs", choices=list(FILE_SYSTEMS), action="append", help="default: ext4, and xfs by shutdown")
    parser.add_argument("--cuts", type=int, help="on each; default: 250, 2000, mutants 1000")
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
        return _replay(Path(options.replay[0]), options.replay[1])
    if options.mutants is not None:
        wanted = [(name, kind, options) for kind in options.fs or ["ext4"] for name in options.mutants or names()]
        return _two_at_once(judge_mutant, wanted)
    methods = options.method or ["shutdown", "log"]
    jobs = [(method, kind, options) for method in methods for kind in options.fs or DEFAULT_FILE_SYSTEMS[method]]
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


DEFAULT_FILE_SYSTEMS = {"shutdown": ["ext4", "xfs"], "log": ["ext4"]}
DEFAULT_CUTS = {"shutdown": 250, "log": 2000}
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
    _print(f"{method} {kind}", outcome)
    return 1 if outcome.failures else 0


def _print(what: str, outcome: Outcome) -> None:
    print(
        f"{what}: {outcome.cuts} cuts, {outcome.acknowledged} acknowledged operations looked for, "
        f"{len(outcome.failures)} cuts with a loss",
        flush=True,
    )
    for seed, problems in outcome.failures.items():
        print("\n  ".join([f"seed {seed}", *problems[:10]]), flush=True)
    if outcome.recording is not None:
        print(f"again: python -m tests.powercut --replay {outcome.recording} SEED", flush=True)


def _replay(folder: Path, seed: str) -> int:
    with temporary_folder() as scratch:
        outcome = judge_cuts(Recording.saved(folder), [seed], scratch)
    _print("replay", outcome)
    return 1 if outcome.failures else 0


def judge_mutant(name: str, kind: str, options: argparse.Namespace) -> int:
    """Print whether a mutant loses anything.

    :returns: 1 if that is another answer than the one expected on ext4.
    """
    outcome = logged_cuts(kind, options.cuts or MUTANT_CUTS, options.seed, options.seconds, name)
    told = next(iter(outcome.failures.values()), ["no loss"])
    effect = "" if outcome.took_effect else "never took effect; "
    print(f"{kind} {name:42} {outcome.cuts:5} cuts: {effect}{'; '.join(told[:3])}", flush=True)
    if name in CANNOT_LOSE and not outcome.failures:
        print(f"     it cannot, as {CANNOT_LOSE[name]}")
    return int(kind == "ext4" and bool(outcome.failures) == (name in CANNOT_LOSE))


if __name__ == "__main__":
    sys.exit(main())
