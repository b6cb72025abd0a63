"""What a service manager hears, and what signals do: on real sockets and pipes, with a virtual clock."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.running.lifecycle import STATUS_TIME, Lifecycle
from lwstwisted.running.notify import PIPE, Notifier
from lwstwisted.running.worker import WORKER, claim


class Manager:
    """The socket of a service manager.

    :param address: a path; "" for an abstract name that the kernel chooses.
    """

    def __init__(self, address: str = "") -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        name = self.socket.getsockname()
        self.address = address or "@" + name[1:].decode()

    def heard(self) -> list[list[str]]:
        """The messages that have come: their lines."""
        messages = []
        while True:
            try:
                message = self.socket.recv(4096, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return messages
            messages.append(message.decode().splitlines())


class ManagedCase(SynchronousTestCase):
    def manager(self, address: str = "") -> Manager:
        manager = Manager(address)
        self.addCleanup(manager.socket.close)
        return manager


class NotifierTests(ManagedCase):
    """sd_notify(3)."""

    def test_kinds_of_addresses(self) -> None:
        """A path, and an abstract name."""
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        for address in ("", f"{folder.name}/notify"):
            manager = self.manager(address)
            environment = {"NOTIFY_SOCKET": manager.address, "OTHER": "stays"}
            Notifier.from_environment(environment).ready("fine")
            self.assertEqual(manager.heard(), [["READY=1", "STATUS=fine"]])
            self.assertEqual(environment, {"OTHER": "stays"}, "children must not speak in our name")

    def test_messages(self) -> None:
        """Each says what systemd knows, and a status is said once."""
        manager = self.manager()
        notifier = Notifier.from_environment({"NOTIFY_SOCKET": manager.address})
        notifier.reloading()
        ((word, moment),) = manager.heard()
        self.assertEqual(word, "RELOADING=1")
        name, _, microseconds = moment.partition("=")
        self.assertEqual(name, "MONOTONIC_USEC")
        self.assertLess(abs(int(microseconds) / 1e6 - time.clock_gettime(time.CLOCK_MONOTONIC)), 10)
        notifier.status("two")
        notifier.status("two")
        notifier.alive()
        notifier.stopping(7.5, "three")
        self.assertEqual(
            manager.heard(),
            [["STATUS=two"], ["WATCHDOG=1"], ["STOPPING=1", "STATUS=three", "EXTEND_TIMEOUT_USEC=7500000"]],
        )

    def test_nobody_wants_to_know(self) -> None:
        """Without a service manager, or with one behind a kind of socket that we don't have, nothing happens."""
        for environment in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1234"}):
            Notifier.from_environment(environment).ready()

    def test_manager_is_gone(self) -> None:
        """It is logged once, and the service goes on."""
        notifier = Notifier.from_environment({"NOTIFY_SOCKET": "/nonexistent/notify"})
        notifier.ready()
        notifier.alive()

    def test_timeout(self) -> None:
        """WATCHDOG_USEC is in force for the process that it is meant for."""
        for environment, seconds in (
            ({}, None),
            ({"WATCHDOG_USEC": "3000000"}, 3.0),
            ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
            ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
            ({"WATCHDOG_USEC": "0"}, None),
            ({"WATCHDOG_USEC": "soon"}, None),
        ):
            self.assertEqual(Notifier.from_environment(dict(environment)).timeout, seconds, environment)

    def test_pipe(self) -> None:
        """A worker speaks to its parent alone, and no child of its own gets the pipe."""
        ours, its = os.pipe()
        self.addCleanup(os.close, ours)
        self.addCleanup(os.close, its)
        os.set_inheritable(its, True)
        manager = self.manager()
        Notifier.from_environment({PIPE: str(its), "NOTIFY_SOCKET": manager.address}).alive()
        self.assertEqual(os.read(ours, 100), b"WATCHDOG=1\n")
        self.assertEqual(manager.heard(), [])
        self.assertFalse(os.get_inheritable(its))

    def test_claim(self) -> None:
        """Sockets are a worker's own, and nobody else's."""
        environment = {WORKER: "2", "LISTEN_FDS": "1"}
        claim(environment)
        self.assertEqual(environment["LISTEN_PID"], str(os.getpid()))
        alone = {"LISTEN_FDS": "1", "LISTEN_PID": "1"}
        claim(alone)
        self.assertEqual(alone["LISTEN_PID"], "1")


class Loop(Clock):
    """A reactor that runs; what threads and signals ask for waits until :meth:`turn`."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self.stops = 0

    def callWhenRunning(self, call: Callable[..., object], *args: Any) -> None:
        call(*args)

    def callFromThread(self, call: Callable[..., object], *args: Any) -> None:
        self.asked.append((call, args))

    def turn(self) -> None:
        asked, self.asked = self.asked, []
        for call, args in asked:
            call(*args)

    def stop(self) -> None:
        self.stops += 1


class LifecycleTests(ManagedCase):
    """A service from its start to its end."""

    def setUp(self) -> None:
        self.before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        self.called: list[object] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            self.addCleanup(signal.signal, number, self.before[number])
            signal.signal(number, lambda which, frame: self.called.append(which))  # Twisted's place
        self.loop = Loop()
        self.told = self.manager()

    def lifecycle(self, **environment: str) -> Lifecycle:
        notifier = Notifier.from_environment({"NOTIFY_SOCKET": self.told.address, **environment})
        lifecycle = Lifecycle(self.loop, notifier, lambda: "busy", lambda: self.called.append("hasten"))
        self.addCleanup(lifecycle.stop)
        return lifecycle

    def send(self, number: signal.Signals) -> None:
        signal.raise_signal(number)
        self.loop.turn()

    def words(self) -> list[str]:
        return [message[0] for message in self.told.heard()]

    def test_order(self) -> None:
        """READY when it serves; RELOADING, and READY when it has; STOPPING."""
        lifecycle = self.lifecycle()
        done: Deferred[None] = Deferred()
        lifecycle.reloads.append(lambda: done)
        self.assertEqual(self.words(), [])
        lifecycle.start()
        self.assertEqual(self.words(), ["READY=1"])
        self.send(signal.SIGHUP)
        self.assertEqual(self.words(), ["RELOADING=1"])
        done.callback(None)
        self.assertEqual(self.words(), ["READY=1"])
        lifecycle.stopping(3)
        lifecycle.stopping(3)
        self.assertEqual(self.words(), ["STOPPING=1"])
        self.send(signal.SIGHUP)
        self.assertEqual(self.words(), [], "who stops is not ready again")

    def test_not_ready_yet(self) -> None:
        """A parent whose workers start says nothing, and takes signals."""
        lifecycle = self.lifecycle()
        lifecycle.start(ready=False)
        self.assertEqual(self.words(), [])
        self.send(signal.SIGTERM)
        self.assertEqual(self.called, [signal.SIGTERM])

    def test_reload_that_fails(self) -> None:
        """The others are reloaded none the less, and the service goes on as it was."""
        lifecycle = self.lifecycle()

        def fail() -> None:
            raise ValueError("a broken file")

        lifecycle.reloads += [fail, lambda: self.called.append("reloaded")]
        lifecycle.start()
        self.send(signal.SIGHUP)
        self.assertEqual(self.called, ["reloaded"])
        self.assertEqual(self.words(), ["READY=1", "RELOADING=1", "READY=1"])
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)

    def test_reloads_follow_each_other(self) -> None:
        """A second SIGHUP during a reload is another one behind it: what it is about may have been read before."""
        lifecycle = self.lifecycle()
        waiting: list[Deferred[None]] = []

        def reload() -> Deferred[None]:
            waiting.append(Deferred())
            return waiting[-1]

        lifecycle.reloads.append(reload)
        lifecycle.start()
        self.send(signal.SIGHUP)
        self.send(signal.SIGHUP)
        self.assertEqual(len(waiting), 1)
        waiting[0].callback(None)
        self.assertEqual(len(waiting), 2)
        waiting[1].callback(None)
        self.assertEqual(self.words(), ["READY=1", *["RELOADING=1", "READY=1"] * 2])

    def test_signals_to_stop(self) -> None:
        """The first one is Twisted's, be it SIGTERM or SIGINT; whoever sends another one is in a hurry."""
        for first, second in ((signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)):
            self.called.clear()
            lifecycle = self.lifecycle()
            lifecycle.start()
            self.send(first)
            self.assertEqual(self.called, [first])
            self.send(second)
            self.send(second)
            self.assertEqual(self.called, [first, "hasten", "hasten"])
            lifecycle.stop()

    def test_signals_are_given_back(self) -> None:
        """A process that goes on after its service has the signals that it had."""
        lifecycle = self.lifecycle()
        mine = signal.getsignal(signal.SIGTERM)
        lifecycle.start()
        self.assertNotEqual(signal.getsignal(signal.SIGTERM), mine)
        lifecycle.stop()
        lifecycle.stop()
        self.assertEqual(signal.getsignal(signal.SIGTERM), mine)
        self.assertEqual(signal.getsignal(signal.SIGHUP), self.before[signal.SIGHUP])
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_watchdog(self) -> None:
        """Twice in its time, from the loop; and a status when there is a new one."""
        lifecycle = self.lifecycle(WATCHDOG_USEC="4000000")
        lifecycle.start()
        self.told.heard()
        for _ in range(8):
            self.loop.advance(1)
        self.assertEqual(self.words(), ["WATCHDOG=1"] * 4)
        self.assertGreater(8, STATUS_TIME, "it was looked at, and was the same")
        lifecycle.stop()
        self.loop.advance(100)
        self.assertEqual(self.words(), [])
