"""Twisted's own suites, on a stock reactor and on ours, side by side.

``make suites`` runs the two of a pair at the same time, in processes of their own, and prints a table of the counts.
What one test says on ours it has to say on the stock reactor too: passed, failed or skipped. A few of Twisted's tests
depend on the speed of the machine, so one that differs is run again alone, on both. It counts if it differs each time.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

SUITES = [
    "twisted.internet.test",
    "twisted.protocols.test.test_tls",
    "twisted.test.test_ssl",
    "twisted.test.test_sslverify",
    "twisted.test.test_tcp",
    "twisted.web.test",
]


class Pair(NamedTuple):
    """Two classes of reactors, each with the module it is in, and the event loop beneath both where they need one."""

    stock_module: str
    stock: str
    our_module: str
    ours: str
    event_loop: str = "asyncio"


PAIRS = {
    "epoll": Pair("twisted.internet.epollreactor", "EPollReactor", "lwstwisted.loop.reactor", "LwsReactor"),
    "poll": Pair("twisted.internet.pollreactor", "PollReactor", "lwstwisted.loop.reactor", "LwsPollReactor"),
    "select": Pair("twisted.internet.selectreactor", "SelectReactor", "lwstwisted.loop.reactor", "LwsSelectReactor"),
    "asyncio": Pair(
        "twisted.internet.asyncioreactor", "AsyncioSelectorReactor", "lwstwisted.loop.foreign", "LwsAsyncioReactor"
    ),
    "uvloop": Pair(
        "twisted.internet.asyncioreactor",
        "AsyncioSelectorReactor",
        "lwstwisted.loop.foreign",
        "LwsAsyncioReactor",
        "uvloop",
    ),
}

EXPLAINED: dict[str, str] = {
    "twisted.internet.test.test_tcp.AbortConnectionTests_AsyncioSelectorReactorTests.test_resumeProducingThrows": (
        "libuv drops a descriptor that has failed, and only ours watches it again"
    ),
}
"""Tests that may differ, and why each does."""

AGAIN = 2
"""How often a test that differs is run again, alone."""

LEFT_OUT = {
    "uvloop": dict.fromkeys(
        [
            "twisted.internet.test.test_process.ProcessTestsBuilderBase",
            "twisted.web.test.test_cgi.CGITests",
            "twisted.web.test.test_cgi.CGIScriptTests.test_urlParameters",
        ],
        "uvloop keeps the signals' wakeup descriptor to itself, so neither reactor hears of a child's end",
    ),
}
"""Tests, by class or alone, that would hang on an event loop, on both reactors, and why; they count as skipped."""

HANGS = 20.0
"""Seconds after which a test has hung; the longest takes one."""

TIME_LIMIT = 300
"""Seconds for one process; each takes a good half minute."""

Outcomes = dict[str, str]
"""What became of each test, by its id."""


def main(wanted: Sequence[str]) -> int:
    """Compare the pairs that are named, or all.

    :returns: 1 if a test differs, and nothing explains it.
    """
    status = 0
    print(f"{'reactor':<32}{'run':>6}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for name in wanted or PAIRS:
        begin = time.monotonic()
        theirs, ours = run_both(PAIRS[name], SUITES)
        settled = settle(PAIRS[name], theirs, ours)
        for label, outcomes in ((PAIRS[name].stock, theirs), (PAIRS[name].ours, ours)):
            counts = Counter(outcomes.values())
            print(
                f"{name + ': ' + label:<32}{len(outcomes):>6}{counts['passed']:>8}{counts['failed']:>8}"
                f"{counts['skipped']:>9}{time.monotonic() - begin:>9.0f}"
            )
        different = sorted(differing(theirs, ours))
        lines = {
            "failed on both": [test for test in ours if "failed" == ours[test] == theirs.get(test)],
            "the same on both when run again alone": settled,
            "differs, explained": [f"{test}: {EXPLAINED[test]}" for test in different if test in EXPLAINED],
            "DIFFERS": [
                f"{test}: {theirs.get(test, 'missing')} on stock, {ours.get(test, 'missing')} on ours"
                for test in different
                if test not in EXPLAINED
            ],
        }
        for title, found in lines.items():
            if found:
                print(f"  {title}:", *sorted(found), sep="\n    ")
        sys.stdout.flush()
        status |= bool(lines["DIFFERS"])
    return status


def differing(theirs: Outcomes, ours: Outcomes) -> set[str]:
    """The ids of tests whose outcome is not the same, or that only one of them has."""
    return {test for test in theirs.keys() | ours.keys() if theirs.get(test) != ours.get(test)}


def settle(pair: Pair, theirs: Outcomes, ours: Outcomes) -> list[str]:
    """Run what differs again, and put the outcomes in place that are the same on both at last.

    :returns: a line for each of these tests.
    """
    settled: list[str] = []
    for _ in range(AGAIN):
        again = sorted((differing(theirs, ours) & theirs.keys() & ours.keys()) - EXPLAINED.keys())
        if not again:
            break
        theirs_again, ours_again = run_both(pair, again)
        for test in set(again) - differing(theirs_again, ours_again):
            settled.append(f"{test}: at first {theirs[test]} on stock, {ours[test]} on ours")
            theirs[test] = ours[test] = ours_again[test]
    return settled


def run_both(pair: Pair, tests: Sequence[str]) -> tuple[Outcomes, Outcomes]:
    """Run tests on both reactors of a pair, at the same time.

    :raises SystemExit: if a process does not get to its end.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {}
        for module, kind in ((pair.stock_module, pair.stock), (pair.our_module, pair.ours)):
            (folder / kind).mkdir()
            command = [sys.executable, "-P", __file__, "--run", pair.stock, module, kind, *tests]
            with open(folder / kind / "log", "wb") as log:
                runs[kind] = subprocess.Popen(
                    command,
                    cwd=folder / kind,
                    env={**os.environ, "LWSTWISTED_EVENT_LOOP": pair.event_loop},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        try:
            end = time.monotonic() + TIME_LIMIT
            return (
                outcomes_of(pair.stock, runs[pair.stock], folder, end),
                outcomes_of(pair.ours, runs[pair.ours], folder, end),
            )
        finally:
            for process in runs.values():
                process.kill()
                process.wait()


def outcomes_of(kind: str, process: subprocess.Popen[bytes], folder: Path, end: float) -> Outcomes:
    """Wait for one process, and read what it reports."""
    report, log = folder / kind / "report", folder / kind / "log"
    try:
        process.wait(max(0, end - time.monotonic()))
        found: Outcomes = json.loads(report.read_text())
    except (subprocess.TimeoutExpired, FileNotFoundError):
        raise SystemExit(f"{kind} did not finish:\n{log.read_text(errors='replace')[-3000:]}") from None
    return found


def run(stock: str, module: str, name: str, tests: Sequence[str]) -> None:
    """In a process of its own: run tests on one reactor, and write a report of their outcomes.

    :param stock: the class name that the reactor bears while it is tested.
    """
    from twisted.internet.asyncioreactor import AsyncioSelectorReactor
    from twisted.internet.main import installReactor
    from twisted.python.reflect import namedAny

    from lwstwisted.loop.foreign import new_event_loop
    from lwstwisted.loop.reactor import PendingReadsReactor

    kind: Any = namedAny(f"{module}.{name}")
    # Twisted's tests know by the name of its class what a reactor can't do, so ours runs under the stock one's.
    renamed: Any = type(stock, (kind,), {})
    factory = renamed
    on_asyncio = issubclass(kind, AsyncioSelectorReactor)
    if on_asyncio:

        def factory(test: Any) -> Any:
            # As Twisted's own factory does it, which knows no other loop than the policy's.
            before, loop = asyncio.get_event_loop(), new_event_loop()
            asyncio.set_event_loop(loop)
            test.addCleanup(asyncio.set_event_loop, before)
            test.addCleanup(loop.close)
            return renamed(loop)

    if issubclass(kind, PendingReadsReactor):
        kind.install()
    elif on_asyncio:
        loop = new_event_loop()
        asyncio.set_event_loop(loop)
        installReactor(kind(loop))
    else:
        installReactor(kind())

    from twisted.trial import util

    util.DEFAULT_TIMEOUT_DURATION = HANGS  # before anything else imports it
    from twisted.internet.test.reactormixins import ReactorBuilder
    from twisted.trial.reporter import VerboseTextReporter
    from twisted.trial.runner import ErrorHolder, TestLoader, TrialRunner

    # The names that test classes are made of are dotted ones, to be looked up.
    holder: Any = type(sys)("reactor_under_test")
    setattr(holder, stock, factory)
    sys.modules[holder.__name__] = holder
    ReactorBuilder._reactors = [f"{holder.__name__}.{stock}"]

    for left_out, why in LEFT_OUT.get(os.environ["LWSTWISTED_EVENT_LOOP"], {}).items():
        namedAny(left_out).skip = why

    outcomes: Outcomes = {}
    unloaded: list[str] = []

    class Recorder(VerboseTextReporter):
        """Writes down what becomes of each test; one that was not skipped and did not fail has passed."""

        def startTest(self, test: Any) -> None:
            super().startTest(test)
            outcomes[test.id()] = "passed"
            if isinstance(test, ErrorHolder):
                unloaded.append(test.id())

        def addError(self, test: Any, error: Any) -> None:
            super().addError(test, error)
            outcomes[test.id()] = "failed"

        def addFailure(self, test: Any, failure: Any) -> None:
            super().addFailure(test, failure)
            outcomes[test.id()] = "failed"

        def addUnexpectedSuccess(self, test: Any, todo: Any = None) -> None:
            super().addUnexpectedSuccess(test, todo)
            outcomes[test.id()] = "failed"

        def addSkip(self, test: Any, reason: Any) -> None:
            super().addSkip(test, reason)
            outcomes[test.id()] = "skipped"

    result = TrialRunner(Recorder).run(TestLoader().loadByNames(tests, recurse=True))
    if unloaded:
        # Alike on both reactors, and yet no comparison: a package that the suites need is missing.
        raise SystemExit(f"could not be imported: {', '.join(unloaded)}")
    assert len(outcomes) == result.testsRun, "an id is that of two tests"
    Path("report").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(*sys.argv[2:5], sys.argv[5:])
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that its processes end with it
        sys.exit(main(sys.argv[1:]))
