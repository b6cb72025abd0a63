"""Twisted's own suites, on a stock reactor and on ours, side by side.

``make suites`` runs each pair in processes of their own and prints a table of the counts. It fails if a test fails on
ours and not on the stock reactor; a few of Twisted's tests depend on the speed of the machine, on both.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SUITES = [
    "twisted.internet.test",
    "twisted.protocols.test.test_tls",
    "twisted.test.test_ssl",
    "twisted.test.test_sslverify",
    "twisted.test.test_tcp",
    "twisted.web.test",
]

PAIRS = {
    "epoll": ("twisted.internet.epollreactor", "EPollReactor", "lwstwisted.loop.reactor", "LwsReactor"),
    "poll": ("twisted.internet.pollreactor", "PollReactor", "lwstwisted.loop.reactor", "LwsPollReactor"),
    "select": ("twisted.internet.selectreactor", "SelectReactor", "lwstwisted.loop.reactor", "LwsSelectReactor"),
    "asyncio": (
        "twisted.internet.asyncioreactor",
        "AsyncioSelectorReactor",
        "lwstwisted.loop.foreign",
        "LwsAsyncioReactor",
    ),
}
"""Stock module and class, our module and class."""

TIME_LIMIT = 600
"""Seconds for one process; each takes about one minute."""

RUN = """
import json, sys
stock, module, name, report, *suites = sys.argv[1:]
from twisted.python.reflect import namedAny
kind = namedAny(module + "." + name)
# Tests skip what a reactor can't do by the name of its class, so ours runs under the stock one's.
renamed = type(stock, (kind,), {"__module__": "suites_reactor"})
holder = type(sys)("suites_reactor")
setattr(holder, stock, renamed)
sys.modules["suites_reactor"] = holder
namedAny(module).install()
from twisted.internet.test.reactormixins import ReactorBuilder
ReactorBuilder._reactors = ["suites_reactor." + stock]
from twisted.trial.reporter import Reporter
from twisted.trial.runner import TestLoader, TrialRunner
result = TrialRunner(Reporter, workingDirectory=report + ".trial").run(TestLoader().loadByNames(suites, recurse=True))
with open(report, "w") as file:
    json.dump({
        "run": result.testsRun,
        "passed": result.successes,
        "failed": sorted({test.id() for test, _ in [*result.failures, *result.errors]}),
        "skipped": len(result.skips),
    }, file)
"""


def run(stock: str, module: str, name: str) -> dict[str, Any]:
    """Run the suites on one reactor.

    :returns: counts, and the ids of what failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report")
        command = [sys.executable, "-c", RUN, stock, module, name, str(report), *SUITES]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, cwd=folder)
        if not report.exists():
            raise SystemExit(f"{name} did not finish:\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(report.read_text())
        return found


def main(wanted: list[str]) -> int:
    """Compare the pairs that are named, or all.

    :returns: 1 if a test fails on ours alone.
    """
    status = 0
    print(f"{'reactor':<24}{'run':>6}{'passed':>8}{'failed':>8}{'skipped':>9}")
    for pair in wanted or PAIRS:
        stock_module, stock, module, name = PAIRS[pair]
        theirs, ours = run(stock, stock_module, stock), run(stock, module, name)
        for label, counts in ((stock, theirs), (name, ours)):
            print(
                f"{label:<24}{counts['run']:>6}{counts['passed']:>8}{len(counts['failed']):>8}{counts['skipped']:>9}",
                flush=True,
            )
        ours_alone = sorted(set(ours["failed"]) - set(theirs["failed"]))
        if ours_alone:
            status = 1
            print("  failed on ours alone:", *ours_alone, sep="\n    ")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
