"""Somebody sets the clock while uploads run: NTP after a long sleep, or an administrator.

The server's process sees another wall clock than the rest of the machine (libfaketime, told by a file that may change
at any moment) and the true monotonic one, as after a step. The clients have the machine's own time. Nothing that
the server waits for may come earlier or later for it.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Thread
from unittest import TestCase, skipUnless

import pytest

from lwstwisted.certificate import ensure_development_certificate
from tests.servers import PATIENCE, free_port, script, serving, tls_endpoint, twistd, wait_until, write_sample

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))

HOUR, DAY = 3600, 86400

STEPS = (HOUR, -HOUR, 10 * DAY, -10 * DAY)

MIB = 1024 * 1024

TIMER = 2.0
"""Seconds; long enough to step the clock meanwhile."""

LATE = 1.0
"""Seconds that a timer may be late on a busy machine. One that follows a step is two seconds early, or an hour late."""

TIMER_SCRIPT = f"""
import sys, threading, time
from twisted.application.reactors import installReactor
reactor = installReactor(sys.argv[1])

def say(what):
    print(what, time.time(), flush=True)

def fire():
    say("fired")
    reactor.stop()

def obey():
    sys.stdin.readline()
    reactor.callFromThread(lambda: (reactor.callLater({TIMER}, fire), say("set")))
    sys.stdin.readline()
    reactor.callFromThread(say, "woken")

reactor.callWhenRunning(lambda: (threading.Thread(target=obey, daemon=True).start(), say("ready")))
reactor.run()
"""
"""Sets a timer at the first line that it is sent, and has a turn at the second: a loop that sleeps sees no step."""


class WallClock:
    """The wall clock of some processes.

    :param file: where they look for it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.offset = 0
        self.step(0)

    def step(self, seconds: int) -> None:
        """Set it forward, or back."""
        self.offset += seconds
        written = self._file.with_suffix(".new")
        written.write_text(f"{self.offset:+d}\n")
        written.rename(self._file)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to see it."""
        return {
            "LD_PRELOAD": str(LIBRARIES[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def is_shown_by(self, seconds: float) -> bool:
        """Whether this is its time, give or take a minute."""
        return abs(seconds - time.time() - self.offset) < 60


@skipUnless(LIBRARIES, "libfaketime is not installed")
class ClockCase(TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)


class ServiceTests(ClockCase):
    """The whole service, over TLS."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = WallClock(self.folder / "clock")
        self.root = self.folder / "root"
        self.certificate = ensure_development_certificate(self.folder / "pair.pem")

    def connect(self, port: int) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=self.certificate)
        connection = http.client.HTTPSConnection("localhost", port, timeout=PATIENCE, context=context)
        self.addCleanup(connection.close)
        connection.connect()
        return connection

    def get(self, connection: http.client.HTTPSConnection, path: str = "/files/") -> bytes:
        """Ask for something on a connection that is open. The answer bears the date of the server's clock."""
        connection.request("GET", path)
        answer = connection.getresponse()
        self.assertEqual(answer.status, 200)
        date = parsedate_to_datetime(answer.headers["Date"]).timestamp()
        self.assertTrue(self.clock.is_shown_by(date), "the step has not reached the server")
        return answer.read()

    @pytest.mark.slow
    def test_uploads_and_idle_connections(self) -> None:
        """An upload, an idle connection and a download whose client pauses outlive steps in both directions."""
        self.root.mkdir()
        # More than the kernel's buffers hold, so that the server has to wait for the client.
        large = write_sample(self.root / "large", 48 * MIB)
        data = write_sample(self.folder / "data", (1 + len(STEPS)) * MIB).read_bytes()
        pieces = [data[start : start + MIB] for start in range(0, len(data), MIB)]
        port = free_port()
        command = [script("lwstwisted"), "serve", "--anonymous", "--root", self.root, "--port", str(port)]
        with serving(command, cwd=self.folder, environment=self.clock.environment) as server:
            server.wait_for_ports()
            self.certificate = self.root / ".lwstwisted" / "development.pem"
            idle, upload, paused = self.connect(port), self.connect(port), self.connect(port)
            self.get(idle)
            upload.putrequest("PUT", "/files/upload")
            upload.putheader("Content-Length", str(len(data)))
            upload.endheaders()
            upload.send(pieces[0])
            paused.request("GET", "/files/large")
            download = paused.getresponse()
            wait_until(lambda: server.open_beneath(self.root / ".lwstwisted" / "partial"), "the upload had begun")
            for step, piece in zip(STEPS, pieces[1:], strict=True):
                self.clock.step(step)
                # The loop has had turns after the step when a new client has its answer.
                self.get(self.connect(port))
                self.get(idle)
                upload.send(piece)
            answer = upload.getresponse()
            answer.read()
            self.assertEqual(answer.status, 201)
            self.assertEqual(self.get(idle, "/files/upload"), data)
            expected = hashlib.sha256(large.read_bytes()).hexdigest()
            self.assertEqual(hashlib.sha256(download.read()).hexdigest(), expected)
            self.assertEqual(server.end(), 0)

    def test_stock_reactor_hangs_up(self) -> None:
        """The negative control: on a reactor whose timers follow the wall clock, a step ends an idle connection."""
        command = twistd("--root", self.root, "--listen", tls_endpoint(self.certificate), reactor="epoll")
        with serving(command, cwd=self.folder, environment=self.clock.environment) as server:
            (port,) = server.wait_for_ports()
            idle = self.connect(port)
            self.get(idle)
            self.clock.step(HOUR)
            self.get(self.connect(port))
            self.assertRaises((ConnectionError, ssl.SSLError), self.get, idle)


class TimerProcess:
    """A process with one timer.

    :param reactor: as ``--reactor`` has it.
    :ivar begin: when it was told to set it, by the test's clock.
    :ivar said: what it said last about itself, with the time of the test's clock and of its own wall clock.
    """

    def __init__(self, reactor: str, clock: WallClock, environment: Mapping[str, str]) -> None:
        self.clock = clock
        self.begin = 0.0
        self.said: dict[str, tuple[float, float]] = {}
        self.process = subprocess.Popen(
            [sys.executable, "-c", TIMER_SCRIPT, reactor],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, **environment, **clock.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._listener = Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            what, wall = line.split()
            self.said[what] = time.monotonic(), float(wall)

    def wait_for(self, what: str) -> None:
        wait_until(lambda: what in self.said, f"it was {what}")

    def command(self) -> None:
        """Send it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._listener.join()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.mark.slow
class TimerTests(ClockCase):
    """A timer of two seconds, by the clock of the one who waits for it."""

    def fire(self, reactor: str, environment: Mapping[str, str] | None = None) -> dict[int, float | None]:
        """Step the clock while a timer runs, in a process of its own for each of the steps.

        :returns: by step, the seconds that the timer took, or None if it did not fire in time.
        """
        processes = []
        for step in STEPS:
            process = TimerProcess(reactor, WallClock(self.folder / f"clock{step}"), environment or {})
            self.addCleanup(process.end)
            processes.append(process)
        for process in processes:
            process.wait_for("ready")
        took: dict[int, float | None] = {}
        for step, process in zip(STEPS, processes, strict=True):
            process.begin = time.monotonic()
            process.command()
            process.wait_for("set")
            self.assertTrue(process.clock.is_shown_by(process.said["set"][1]))
            process.clock.step(step)
            process.command()
            process.wait_for("woken")
            self.assertTrue(process.clock.is_shown_by(process.said["woken"][1]), "the step has not reached it")
        for step, process in zip(STEPS, processes, strict=True):
            end = process.begin + TIMER + LATE
            while "fired" not in process.said and time.monotonic() < end:
                time.sleep(0.01)
            took[step] = process.said["fired"][0] - process.begin if "fired" in process.said else None
        return took

    def assert_punctual(self, reactor: str, **environment: str) -> None:
        for step, took in self.fire(reactor, environment).items():
            assert took is not None, f"a step by {step} s: the timer did not fire in time"
            self.assertGreaterEqual(took, TIMER, f"a step by {step} s")
            self.assertLessEqual(took, TIMER + LATE, f"a step by {step} s")

    def test_epoll(self) -> None:
        """A step forward fires nothing early, a step back holds nothing up."""
        self.assert_punctual("lws")

    def test_poll(self) -> None:
        """The same on poll(2)."""
        self.assert_punctual("lws-poll")

    def test_select(self) -> None:
        """The same on select(2)."""
        self.assert_punctual("lws-select")

    def test_asyncio(self) -> None:
        """The same on asyncio."""
        self.assert_punctual("lws-asyncio")

    def test_uvloop(self) -> None:
        """The same on uvloop."""
        self.assert_punctual("lws-asyncio", LWSTWISTED_EVENT_LOOP="uvloop")

    def test_stock_reactor(self) -> None:
        """The negative control: on a wall clock it is at once after a step forward, and an hour late after one back."""
        for step, took in self.fire("epoll").items():
            if step > 0:
                assert took is not None
                self.assertLess(took, TIMER)
            else:
                self.assertIsNone(took)
