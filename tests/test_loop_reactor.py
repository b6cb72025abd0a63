"""LwsReactor: the order of a turn, one turn for each reader, a clock that nobody can set, and ``listenSSL``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import uvloop
from twisted.internet.abstract import FileDescriptor
from twisted.internet.endpoints import serverFromString
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.error import ConnectionLost, ReactorNotRunning
from twisted.internet.interfaces import IReactorSSL
from twisted.internet.main import CONNECTION_LOST
from twisted.internet.protocol import DatagramProtocol, Factory, Protocol
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from lwstwisted.interfaces import IFakePollin, IPendingReads
from lwstwisted.loop import reactor as loop_reactor
from lwstwisted.loop.foreign import CountingEventLoop, LwsAsyncioReactor
from lwstwisted.loop.reactor import AT_ONCE, LwsPollReactor, LwsReactor, LwsSelectReactor, MergingReactor
from lwstwisted.loop.tls import READ_BUDGET, TLSPort, TLSTransport
from tests.tls_peer import (
    DEADLINE,
    VERSIONS,
    ListeningSink,
    Loop,
    Peer,
    SinkFactory,
    certificate_file,
    cut,
    discard,
    pattern,
    server_context,
)


class RecordingWait(EPollReactor):
    """A stock reactor that writes down how long it was told to wait."""

    events: list[Any]

    def doIteration(self, timeout: float | None) -> None:
        self.events.append(("wait", timeout))
        self.doPoll(DEADLINE if timeout is None else timeout)


class RecordingReactor(MergingReactor, RecordingWait):
    """Writes down what its turns do.

    :ivar events: names of readers and timers, and ("wait", seconds).
    """

    def __init__(self) -> None:
        self.events = []
        super().__init__()


class Reader(FileDescriptor):
    """One end of a socket pair that notes its turns and takes one byte in each."""

    def __init__(self, reactor: Any, name: str, then: Callable[[], object] = lambda: None) -> None:
        super().__init__(reactor)
        self.reactor, self.name, self.then = reactor, name, then
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.far.setblocking(False)
        self.fileno = self.near.fileno  # type: ignore[method-assign]
        self.lost = 0
        self.startReading()

    def doRead(self) -> object:
        self.reactor.events.append(self.name)
        try:
            self.near.recv(1)
        except BlockingIOError:
            pass
        return self.then()

    def connectionLost(self, reason: Any) -> None:
        super().connectionLost(reason)
        self.lost += 1
        self.near.close()
        self.far.close()


class RecordingTestCase(SynchronousTestCase):
    """A recording reactor, and readers that end with the test."""

    def setUp(self) -> None:
        self.reactor = RecordingReactor()
        self.addCleanup(discard, self.reactor)
        self.loop = Loop(self.reactor)
        self.reactor.events.clear()

    def reader(self, name: str, then: Callable[[], object] = lambda: None) -> Reader:
        reader = Reader(self.reactor, name, then)
        self.addCleanup(lambda: reader.lost or reader.connectionLost(None))
        return reader


class TurnTests(RecordingTestCase):
    """What happens in a turn, and in which order."""

    def events(self, wait: float | None = 0) -> list[Any]:
        """What one more turn does."""
        self.reactor.events.clear()
        self.loop.turns += 1
        self.reactor.runUntilCurrent()
        self.reactor.doIteration(wait)
        return list(self.reactor.events)

    def test_interfaces(self) -> None:
        """It says that it keeps a list and has the hook, and ``ssl:`` endpoints find it."""
        for interface in (IPendingReads, IFakePollin, IReactorSSL):
            verifyObject(interface, self.reactor)

    def test_order(self) -> None:
        """Row 6: timers, one wait that does not block, readers that the kernel announced, pending readers."""
        pending, ready = self.reader("pending"), self.reader("ready")
        ready.far.send(b"x")
        self.reactor.addPending(pending)
        self.reactor.callLater(0, self.reactor.events.append, "timer")
        self.assertEqual(self.events(None), ["timer", ("wait", 0), "ready", "pending"])

    def test_nobody_gets_two(self) -> None:
        """A reader that is pending and announced by the kernel gets one turn, by the kernel's word."""
        both, pending = self.reader("both"), self.reader("pending")
        self.reactor.addPending(both)
        self.reactor.addPending(pending)
        both.far.send(b"x")
        both.then = lambda: self.reactor.removePending(both)  # as every reader does that finds nothing left
        self.assertEqual(self.events(), [("wait", 0), "both", "pending"])
        self.assertEqual(self.events(), [("wait", 0)])

    def test_nobody_gets_two_though_it_stays_pending(self) -> None:
        """The same for one that is pending again afterwards: its next turn is in the next turn of the loop."""
        both = self.reader("both")

        def still_pending() -> None:
            self.reactor.removePending(both)
            self.reactor.addPending(both)

        both.then = still_pending
        self.reactor.addPending(both)
        both.far.send(b"xx")
        for _ in range(3):
            self.assertEqual(self.events(), [("wait", 0), "both"])

    def test_pending_again(self) -> None:
        """Row 7: a pending reader that is pending again gets one turn in each turn, as long as it wants."""
        reader = self.reader("reader")
        reader.then = lambda: self.reactor.addPending(reader)
        self.reactor.addPending(reader)
        for _ in range(5):
            self.assertEqual(self.events(None), [("wait", 0), "reader"])

    def test_marked_by_another(self) -> None:
        """A reader that another one's turn marks has its turn in the next, which does not block."""
        second = self.reader("second")
        first = self.reader("first", lambda: self.reactor.addPending(second))
        first.far.send(b"x")
        self.assertEqual(self.events(), [("wait", 0), "first"])
        self.assertEqual(self.events(None), [("wait", 0), "second"])

    def test_marked_by_a_timer(self) -> None:
        """Row 11: a timer that marks a reader is in time for this turn."""
        reader = self.reader("reader")
        self.reactor.callLater(0, self.reactor.addPending, reader)
        self.assertEqual(self.events(None), [("wait", 0), "reader"])

    def test_unmarked_by_another(self) -> None:
        """Row 21: who was closed or paused by an earlier reader of this turn is left alone."""
        second = self.reader("second")
        first = self.reader("first", lambda: self.reactor.removePending(second))
        self.reactor.addPending(second)
        first.far.send(b"x")
        self.assertEqual(self.events(), [("wait", 0), "first"])
        self.assertEqual(self.events(), [("wait", 0)])

    def test_a_mark_taken_away_does_not_wake_the_loop(self) -> None:
        """Row 3: nothing pending any more, so the wait may be as long as the timers allow."""
        reader = self.reader("reader")
        self.reactor.addPending(reader)
        self.reactor.removePending(reader)
        self.assertEqual(self.events(0.001), [("wait", 0.001)])

    def test_waits_with_nothing_pending(self) -> None:
        """An idle loop blocks until the next timer, or for an event if there is none."""
        reader = self.reader("reader")
        self.assertEqual(self.events(0.001), [("wait", 0.001)])
        reader.far.send(b"x")
        self.assertEqual(self.events(None), [("wait", None), "reader"])

    def test_a_failure_disconnects(self) -> None:
        """What a pending reader's turn returns ends its connection, once."""
        reader = self.reader("reader", lambda: CONNECTION_LOST)
        self.assertIsInstance(CONNECTION_LOST, ConnectionLost)
        self.reactor.addPending(reader)
        self.events()
        self.assertEqual(self.events(), [("wait", 0)])
        self.assertEqual(reader.lost, 1)
        self.assertNotIn(reader, self.reactor.getReaders())

    def test_short_timer(self) -> None:
        """Row 24: a timer of less than a millisecond is waited for, not polled for."""
        over: list[bool] = []
        self.reactor.callLater(0.0004, over.append, True)
        self.assertLessEqual(self.loop.until(lambda: over), 3)


class PromiseTests(RecordingTestCase):
    """A reader that was noted gets its turn, whatever happens in between."""

    def test_the_wait_raises(self) -> None:
        """A signal handler that raises in the wait costs nobody the turn."""
        quiet = self.reader("quiet")
        self.reactor.addPending(quiet)

        def interrupted(timeout: float) -> None:
            del self.reactor.doPoll
            raise KeyboardInterrupt

        self.reactor.doPoll = interrupted  # type: ignore[method-assign]
        with self.assertRaises(KeyboardInterrupt):
            self.reactor.doIteration(0)
        self.reactor.doIteration(0)
        self.assertIn("quiet", self.reactor.events)

    def test_paused_and_resumed_by_another(self) -> None:
        """Who is paused and resumed in every turn by somebody else's event still gets one."""
        quiet = self.reader("quiet")

        def meddle() -> None:
            self.reactor.removePending(quiet)
            self.reactor.addPending(quiet)

        busy = self.reader("busy", meddle)
        busy.far.send(b"x" * 5)
        self.reactor.addPending(quiet)
        for _ in range(3):
            self.reactor.doIteration(0)
        self.assertGreaterEqual(self.reactor.events.count("quiet"), 2)


class RecordingLwsReactor(LwsReactor):
    """The reactor of the service, which writes down who is read."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        super().__init__()


class ShortTurnTests(SynchronousTestCase):
    """A hundred busy connections do not keep timers and results of threads waiting for all of them."""

    ROUNDS = 3

    def setUp(self) -> None:
        self.reactor = RecordingLwsReactor()
        self.addCleanup(discard, self.reactor)
        self.loop = Loop(self.reactor)

    def readers(self, count: int) -> list[Reader]:
        made = [Reader(self.reactor, str(number)) for number in range(count)]
        for reader in made:
            self.addCleanup(lambda reader=reader: reader.lost or reader.connectionLost(None))
        return made

    def turn(self) -> list[Any]:
        """Who is read in one turn."""
        self.reactor.events.clear()
        self.loop.turn()
        return list(self.reactor.events)

    def test_announced(self) -> None:
        """A few are read in each turn, and nobody again before all others that are ready have had theirs."""
        readers = self.readers(5 * AT_ONCE)
        for reader in readers:
            reader.far.send(b"x" * (self.ROUNDS + 1))
        for _ in range(self.ROUNDS):
            turns = [self.turn() for _ in range(5)]
            self.assertEqual([len(read) for read in turns], 5 * [AT_ONCE])
            self.assertEqual(sorted(chain(*turns)), sorted(reader.name for reader in readers))

    def test_pending(self) -> None:
        """The same for readers that the kernel cannot announce: who stays pending goes to the end."""
        readers = self.readers(5 * AT_ONCE)
        for reader in readers:
            reader.then = lambda reader=reader: self.reactor.addPending(reader)
            self.reactor.addPending(reader)
        names = [reader.name for reader in readers]
        for _ in range(self.ROUNDS):
            turns = [self.turn() for _ in range(5)]
            self.assertEqual([len(read) for read in turns], 5 * [AT_ONCE])
            self.assertEqual(list(chain(*turns)), names)

    def test_both(self) -> None:
        """Neither those that the kernel announces nor those that it cannot announce wait for the others to end."""
        pending, announced = (self.readers(3 * AT_ONCE) for _ in range(2))
        for number, reader in enumerate(pending):
            reader.name = f"pending {number}"
            self.reactor.addPending(reader)
        for reader in announced:
            reader.far.send(b"x")
        for _ in range(3):
            read = self.turn()
            self.assertEqual(len(read), 2 * AT_ONCE)
            self.assertEqual(sum(name.startswith("pending") for name in read), AT_ONCE)
        self.assertEqual(self.reactor.statistics().pending, 0)

    def test_timer(self) -> None:
        """A timer is due behind the readers of one turn, however many more there are."""
        for reader in self.readers(5 * AT_ONCE):
            reader.far.send(b"x")
        self.turn()
        self.reactor.callLater(0, self.reactor.events.append, "timer")
        self.assertEqual(self.turn()[0], "timer")
        self.assertEqual(len(self.reactor.events), 1 + AT_ONCE)

    def test_accepted(self) -> None:
        """Who comes together with many others is accepted with a few of them; the others follow in the next turns."""
        factory = Factory.forProtocol(Protocol)
        made: list[Any] = []
        factory.buildProtocol = lambda address: made.append(Protocol()) or made[-1]  # type: ignore[func-returns-value]
        path = f"\0lwstwisted-{os.getpid()}"  # a name without a file (unix(7))
        tcp: Any = self.reactor.listenTCP(0, factory, 1024, "127.0.0.1")
        ssl: Any = self.reactor.listenSSL(0, factory, server_context(), 1024, "127.0.0.1")
        self.reactor.listenUNIX(path, factory, 1024)
        for address in (("127.0.0.1", tcp.getHost().port), ("127.0.0.1", ssl.getHost().port), path):
            made.clear()
            for _ in range(6 * AT_ONCE):
                client = socket.socket(socket.AF_UNIX if address == path else socket.AF_INET)
                self.addCleanup(client.close)
                client.connect(address)
            counts = [len(made)]
            while len(made) < 6 * AT_ONCE:
                self.loop.turn()
                counts.append(len(made))
                self.assertLess(len(counts), 20)
            self.assertEqual(counts, [AT_ONCE * turn for turn in range(7)], address)


class LongTurnTests(SynchronousTestCase):
    """A Twisted whose reactor keeps its epoll object under another name."""

    def test_all_are_read(self) -> None:
        """Turns are longer then, and nobody is left out."""
        self.patch(loop_reactor, "select", object())
        reactor = RecordingLwsReactor()
        self.addCleanup(discard, reactor)
        readers = [Reader(reactor, str(number)) for number in range(5 * AT_ONCE)]
        for reader in readers:
            self.addCleanup(lambda reader=reader: reader.lost or reader.connectionLost(None))
            reader.far.send(b"x")
        Loop(reactor).turn()
        self.assertEqual(sorted(reactor.events), sorted(reader.name for reader in readers))


class ClockTests(SynchronousTestCase):
    """An administrator sets the time while uploads run."""

    def test_timers_are_monotonic(self) -> None:
        """Neither a step forward nor one back moves a timer: they count on the clock that nobody can set."""
        reactor = LwsReactor()
        self.addCleanup(discard, reactor)
        self.assertIs(reactor.seconds, time.monotonic)
        before = time.monotonic()
        call = reactor.callLater(10, lambda: None)
        after = time.monotonic()
        self.assertTrue(before + 10 <= call.getTime() <= after + 10)


class ListenTests(SynchronousTestCase):
    """``ssl:`` endpoints and ``listenSSL`` on our reactor."""

    def setUp(self) -> None:
        self.reactor = LwsReactor()
        self.addCleanup(discard, self.reactor)
        self.loop = Loop(self.reactor)
        self.factory = SinkFactory()

    def upload(self, port: int) -> None:
        """Upload more than a budget, which ends in the middle of a record."""
        sizes = 20 * [16384]
        data = pattern(sum(sizes))
        self.assertGreater(len(data), READ_BUDGET)
        sinks = self.factory.sinks
        for version in VERSIONS:
            peer = Peer(port, version, self.loop.step)
            self.addCleanup(peer.close)
            peer.handshake()
            peer.send(peer.seal(*cut(data, sizes)))
            self.loop.until(lambda: sinks and len(sinks[-1].data) == len(data))
            sink = sinks.pop()
            self.assertEqual(sink.data, data)
            self.assertIsInstance(sink.tls, TLSTransport)
            sink.tls.abortConnection()

    def test_listen_ssl(self) -> None:
        """It returns a port of ours, as IReactorSSL says, and uploads arrive whole."""
        port = self.reactor.listenSSL(0, self.factory, server_context(), interface="127.0.0.1")
        self.assertIsInstance(port, TLSPort)
        self.assertEqual(port.getHost().host, "127.0.0.1")
        self.upload(port.getHost().port)

    def test_endpoint(self) -> None:
        """So does an ``ssl:`` endpoint, without a word about us in its description."""
        with certificate_file() as pem, warnings.catch_warnings():
            # Twisted 26.10 hands pyOpenSSL objects that pyOpenSSL 26 deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            endpoint = serverFromString(self.reactor, f"ssl:0:privateKey={pem}:certKey={pem}:interface=127.0.0.1")
            port: Any = self.successResultOf(endpoint.listen(self.factory))
            self.assertIsInstance(port, TLSPort)
            self.upload(port.getHost().port)

    def test_stops_listening(self) -> None:
        """A port that stopped refuses the next client."""
        port: Any = self.reactor.listenSSL(0, self.factory, server_context(), interface="127.0.0.1")
        address = ("127.0.0.1", port.getHost().port)
        stopped: list[object] = []
        port.stopListening().addCallback(stopped.append)
        self.loop.until(lambda: stopped)
        self.assertRaises(ConnectionRefusedError, socket.create_connection, address)

    def test_shutdown_with_data_pending(self) -> None:
        """reactor.stop() amid an upload ends it once; nothing of it is left to run."""
        ended: list[bool] = []

        class Slow(ListeningSink):
            def dataReceived(self, data: bytes) -> None:
                super().dataReceived(data)
                self.tls.pauseProducing()
                self.tls.resumeProducing()

        self.factory.kind = Slow
        port: Any = self.reactor.listenSSL(0, self.factory, server_context(), interface="127.0.0.1")
        peer = Peer(port.getHost().port, VERSIONS[1], self.loop.step)
        self.addCleanup(peer.close)
        peer.handshake()
        peer.send(peer.seal(pattern(16384)))
        self.loop.until(lambda: self.factory.sinks and self.factory.sinks[0].data)
        self.reactor.addSystemEventTrigger("after", "shutdown", ended.append, True)
        self.reactor.stop()
        self.loop.until(lambda: ended)
        self.assertEqual(len(self.factory.sinks[0].lost), 1)
        self.assertRaises(ReactorNotRunning, self.reactor.stop)


class InstallTests(SynchronousTestCase):
    """``lwstwisted.loop.reactor.install()``, in a process of its own."""

    def run_script(self, script: str, **environment: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.assertEqual((done.stdout, done.stderr), ("well\n", ""))

    def test_install(self) -> None:
        """It makes ours the global reactor; where there is one already it says so."""
        self.run_script("""
from lwstwisted.loop.reactor import LwsReactor, install
from twisted.internet.error import ReactorAlreadyInstalledError
made = install()
from twisted.internet import reactor
assert reactor is made and isinstance(made, LwsReactor)
try:
    install()
except ReactorAlreadyInstalledError:
    print("well")
""")

    def test_all_tls_of_the_process(self) -> None:
        """What wraps connections by itself (connectSSL, startTLS, endpoints) pauses as exactly."""
        self.run_script("""
from twisted.protocols.tls import TLSMemoryBIOFactory
from lwstwisted.loop.tls import TLSTransport
assert not issubclass(TLSMemoryBIOFactory.protocol, TLSTransport)  # importing us changes nothing
from lwstwisted.loop.reactor import install
install()
assert TLSMemoryBIOFactory.protocol is TLSTransport
print("well")
""")

    def test_uvloop_when_told_to(self) -> None:
        """``--reactor=lws-asyncio`` runs on the loop that the environment names, and on no unknown one."""
        script = """
from lwstwisted.loop.foreign import EVENT_LOOP, install, new_event_loop
import os, uvloop
wanted = os.environ[EVENT_LOOP]
assert isinstance(new_event_loop(), uvloop.Loop) == (wanted == "uvloop")
os.environ[EVENT_LOOP] = "libuv"
try:
    install()
except ValueError:
    print("well")
"""
        for loop in ("uvloop", "asyncio"):
            self.run_script(script, LWSTWISTED_EVENT_LOOP=loop)


class ShortTimerTests(SynchronousTestCase):
    """Row 24: what is less than the unit of a wait is rounded up, and not spun through."""

    DELAYS = (0.0004, 0.0014, 0.0109)

    def test_loops_that_poll(self) -> None:
        """A timer of a fraction of a millisecond is one wait, and at most one more."""
        for kind in (LwsReactor, LwsPollReactor, LwsSelectReactor):
            reactor = kind()
            loop = Loop(reactor)
            for delay in self.DELAYS:
                over: list[bool] = []
                reactor.callLater(delay, over.append, True)
                self.assertLessEqual(loop.until(lambda over=over: over), 3, (kind, delay))
            discard(reactor)

    def test_loops_that_drive_themselves(self) -> None:
        """The timers are looked at once, or a few times where the loop counts in milliseconds of its own."""
        for new_loop in (CountingEventLoop, uvloop.new_event_loop):
            for delay in self.DELAYS:
                self.assertLessEqual(self.looks(new_loop(), delay), 5, (new_loop, delay))

    def looks(self, loop: Any, delay: float) -> int:
        reactor = LwsAsyncioReactor(loop)
        looks: list[bool] = []
        run = reactor.runUntilCurrent

        def counted() -> None:
            looks.append(True)
            run()

        reactor.runUntilCurrent = counted  # type: ignore[method-assign]

        def begin() -> None:
            looks.clear()
            reactor.callLater(delay, loop.stop)

        reactor.callLater(0, begin)
        loop.run_forever()
        discard(reactor)
        loop.close()
        return len(looks)


class Refused(DatagramProtocol):
    """A connected UDP port whose peer isn't there at first."""

    def __init__(self, peer: tuple[str, int], answer: Callable[[], object], done: Callable[[], object]) -> None:
        self.peer, self.answer, self.done = peer, answer, done
        self.received = b""

    def startProtocol(self) -> None:
        self.transport.connect(*self.peer)
        self.transport.write(b"ping")

    def connectionRefused(self) -> None:
        self.answer()

    def datagramReceived(self, datagram: bytes, addr: object) -> None:
        self.received = datagram
        self.done()


class FailedDescriptorTests(SynchronousTestCase):
    """libuv drops a descriptor that has failed."""

    def test_refused_datagram(self) -> None:
        """A UDP port that heard of a missing peer still hears the peer when it comes."""
        loop = uvloop.new_event_loop()
        reactor = LwsAsyncioReactor(loop)
        peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.addCleanup(peer.close)
        peer.bind(("127.0.0.1", 0))
        address = peer.getsockname()
        peer.close()
        found: list[socket.socket] = []

        def answer() -> None:
            late = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            found.append(late)
            late.bind(address)
            late.sendto(b"pong", ("127.0.0.1", port.getHost().port))

        protocol = Refused(address, answer, loop.stop)
        port: Any = reactor.listenUDP(0, protocol, interface="127.0.0.1")
        deadline = reactor.callLater(DEADLINE, loop.stop)
        loop.run_forever()
        deadline.cancel()
        self.assertEqual(protocol.received, b"pong")
        for each in found:
            each.close()
        port.stopListening()
        discard(reactor)
        loop.close()
