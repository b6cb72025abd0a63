"""The composition root: what options mean, and what is built from them."""

from __future__ import annotations

import contextlib
import errno
import gc
import http.client
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from ipaddress import ip_network
from pathlib import Path
from threading import Event
from typing import Any

from twisted.application.service import IServiceMaker
from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.plugin import getPlugins
from twisted.python.usage import UsageError
from twisted.trial.unittest import SynchronousTestCase, TestCase

from lwstwisted import service
from lwstwisted.access.rules import Rules
from lwstwisted.options import BACKLOG, Options, on_loopback, parse_size, with_backlog
from lwstwisted.service import OWN_DESCRIPTORS, curl_hints, makeService
from lwstwisted.web.limits import MAX_LENGTH, Limits
from tests.servers import PATIENCE, free_port, serving, twistd
from tests.test_uploads_transfer import GatedStore

TOP = Path(__file__).parent.parent

NO_HOOKS = {
    "hooks": None,
    "hooks-dir": None,
    "hooks-http": None,
    "hooks-http-forward-headers": "",
    "hooks-http-retry": "3",
    "hooks-http-backoff": "1s",
    "hooks-http-timeout": "15s",
    "hooks-http-size-limit": "5120",
    "hooks-enabled-events": "pre-create,post-create,post-receive,post-terminate,post-finish",
    "progress-hooks-interval": "1s",
}

NO_ACCESS = {
    "allow": [],
    "anonymous": 0,
    "auth": [],
    "groups": {},
    "hosts": [],
    "rules": Rules(()),
    "signing-keys": None,
}
"""The options of access, where nobody asks for any (test_access_options.py)."""


def parsed(*words: str) -> Options:
    options = Options()
    options.parseOptions(words)  # type: ignore[no-untyped-call]
    return options


class SizeTests(SynchronousTestCase):
    """``--max-size``."""

    def test_sizes(self) -> None:
        """Powers of 1024; what no file can reach is no limit."""
        for text, size in {
            "0": 0,
            "1": 1,
            "512": 512,
            "0010": 10,
            "1K": 1024,
            "1k": 1024,
            "3M": 3 * 1024**2,
            "10G": 10 * 1024**3,
            "2t": 2 * 1024**4,
            str(MAX_LENGTH): MAX_LENGTH,
            str(MAX_LENGTH + 1): MAX_LENGTH,
            "8388608T": MAX_LENGTH,
            "9" * 30: MAX_LENGTH,
            "9" * 5000: MAX_LENGTH,
        }.items():
            self.assertEqual(parse_size("--max-size", text), size, text)

    def test_no_sizes(self) -> None:
        for text in ("", "K", "-1", "+1", "1.5G", "10 G", " 10", "10\n", "10GB", "10P", "0x10", "1_0", "1e3", "٣"):
            error = self.assertRaises(UsageError, parse_size, "--quota", text)
            self.assertIn("--quota", str(error), text)


class LoopbackTests(SynchronousTestCase):
    """Nothing is open to others, unless somebody says so."""

    def test_loopback_unless_told(self) -> None:
        for description, bound in {
            "tcp:8080": "tcp:8080:interface=127.0.0.1",
            "tcp:port=8080": "tcp:port=8080:interface=127.0.0.1",
            "tcp:8080:backlog=5": "tcp:8080:backlog=5:interface=127.0.0.1",
            "tcp:8080:interface=": "tcp:8080:interface=:interface=127.0.0.1",
            "tcp6:8080": r"tcp6:8080:interface=\:\:1",
            "ssl:1:privateKey=k:certKey=c": "ssl:1:privateKey=k:certKey=c:interface=127.0.0.1",
            "ssl:1:k:c": "ssl:1:k:c:interface=127.0.0.1",
            r"ssl:1:privateKey=a\:interface=b": r"ssl:1:privateKey=a\:interface=b:interface=127.0.0.1",
            r"ssl:1:certKey=C\:\\k.pem": r"ssl:1:certKey=C\:\\k.pem:interface=127.0.0.1",
            "tls:/pems:443": r"tls:/pems:443:interface=\:\:1",
            r"tls:a\:b:443": r"tls:a\:b:443:interface=\:\:1",
            "haproxy:tcp:8080": "haproxy:tcp:8080:interface=127.0.0.1",
        }.items():
            self.assertEqual(on_loopback(description), bound)

    def test_as_told(self) -> None:
        for description in (
            "tcp:8080:0.0.0.0",
            "tcp:8080:interface=0.0.0.0",
            "tcp:interface=192.0.2.1:port=8080",
            r"tcp6:8080:interface=\:\:",
            "ssl:1:privateKey=k:certKey=c:interface=0.0.0.0",
            r"tls:/pems:443:interface=\:\:",
            "haproxy:tcp:8080:interface=0.0.0.0",
            "unix:/run/x.socket",
            r"unix:a\:b",
            "systemd:domain=INET:index=0",
            "systemd:domain=UNIX:name=http",
        ):
            self.assertEqual(on_loopback(description), description)

    def test_empty_position(self) -> None:
        """A colon too many is a mistake; it doesn't open the port to all."""
        self.assertIn("127.0.0.1", on_loopback("tcp:8080:"))


class BacklogTests(SynchronousTestCase):
    """Many clients that come together are not lost on the way."""

    def test_unless_told(self) -> None:
        for description in (
            "tcp:8080",
            "tcp:8080:127.0.0.1",
            "tcp6:8080",
            r"tcp6:8080:interface=\:\:1",
            "ssl:1:privateKey=k:certKey=c",
            "tls:/pems",
            "tls:/pems:443",
            "unix:/run/x.socket",
            "haproxy:tcp:8080",
        ):
            self.assertEqual(with_backlog(description), f"{description}:backlog={BACKLOG}")

    def test_as_told(self) -> None:
        """Also by position, and where others have opened the socket."""
        for description in (
            "tcp:8080:127.0.0.1:5",
            "tcp:8080:backlog=5:interface=127.0.0.1",
            "tcp6:8080:5",
            "tls:/pems:443:5",
            "unix:/run/x.socket:666",
            "systemd:domain=INET:index=0",
            "haproxy:tcp:8080:backlog=5",
        ):
            self.assertEqual(with_backlog(description), description)

    def test_kernel(self) -> None:
        """The kernel has it: ss(8) reads the same file, or somebody's maximum (tcp(7), somaxconn)."""
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        with serving(twistd("--root", folder.name, "--listen", "tcp:0"), cwd=Path(folder.name)) as server:
            (port,) = server.wait_for_ports()
            most = int(Path("/proc/sys/net/core/somaxconn").read_text())
            clients = []
            server.process.send_signal(signal.SIGSTOP)  # so that it accepts nobody
            try:
                for _ in range(min(BACKLOG, most) // 2):
                    client = socket.create_connection(("127.0.0.1", port), PATIENCE)
                    self.addCleanup(client.close)
                    clients.append(client)
            finally:
                server.process.send_signal(signal.SIGCONT)
        self.assertGreater(len(clients), 100)


class DescriptorTests(SynchronousTestCase):
    """As many connections as there are descriptors for."""

    PROGRAM = """
import sys
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from twisted.internet import epollreactor, selectreactor
from lwstwisted.service import within_descriptors
from lwstwisted.web.limits import Limits
soft, hard, kind = sys.argv[1:]
setrlimit(RLIMIT_NOFILE, (int(soft), int(hard)))
reactor = {"epoll": epollreactor.EPollReactor, "select": selectreactor.SelectReactor}[kind]()
limits = within_descriptors(Limits(connections=400, requests=7), reactor)
print(limits.connections, limits.requests, *getrlimit(RLIMIT_NOFILE))
"""

    def limited(self, soft: int, hard: int, reactor: str) -> list[int]:
        """In a process that may have so many descriptors: connections, requests, and how many it may have then."""
        command = [sys.executable, "-c", self.PROGRAM, str(soft), str(hard), reactor]
        done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=PATIENCE)
        self.assertEqual(done.stderr, "")
        return [int(word) for word in done.stdout.split()]

    def test_enough(self) -> None:
        """The soft limit, which is low for the sake of programs that use select(2), is raised as far as it may be."""
        self.assertEqual(self.limited(256, 4096, "epoll"), [400, 7, 4096, 4096])

    def test_few(self) -> None:
        """Each connection may want a socket and a file."""
        self.assertEqual(self.limited(512, 512, "epoll"), [(512 - OWN_DESCRIPTORS) // 3, 7, 512, 512])
        self.assertEqual(self.limited(64, 64, "epoll"), [1, 7, 64, 64])

    def test_select(self) -> None:
        """A descriptor that select(2) can't wait for is of no use."""
        self.assertEqual(self.limited(256, 4096, "select"), [(1024 - OWN_DESCRIPTORS) // 3, 7, 1024, 4096])


class OptionsTests(SynchronousTestCase):
    """The command line."""

    def test_zero_options(self) -> None:
        """There is a default for everything."""
        self.assertEqual(
            dict(parsed()),
            {
                "root": "uploads",
                "durability": "full",
                "max-size": MAX_LENGTH,
                "min-free": 0,
                "quota": None,
                "upload-lifetime": 24 * 3600.0,
                "public-url": "",
                "allowed-origins": ["*"],
                "trusted-proxies": [],
                "port": 8443,
                "workers": 1,
                "drain-time": 30.0,
                "listen": [],
                "limits": Limits(),
                "access-log": None,
                "access-log-format": "combined",
                "tls-profile": "intermediate",
                "certificates": [],
                "client-ca": None,
                "client-certificate": "required",
                **NO_ACCESS,
                **NO_HOOKS,
                "log-format": "text",
                "metrics": None,
            },
        )

    def test_all_options(self) -> None:
        limits = ("--limit", "body-rate=0", "--limit", "head_time=2.5", "--limit", "connections-per-address=7")
        log = ("--access-log", "/l", "--access-log-format", "json", "--log-format", "json", "--metrics", "tcp:9100")
        tls = ("--tls-profile", "modern", "--certificate", "/c")
        clients = ("--client-ca", "/a", "--client-certificate", "optional")
        space = ("--min-free", "2K", "--quota", "3K")
        listen = ("-l", "tcp:1", "--listen", "unix:/s")
        resumable = ("--upload-lifetime", "36h", "--public-url", "https://a/b/", "--allow-origin", "https://c")
        proxies = ("--trusted-proxy", "10.1.0.0/16", "--trusted-proxy", "::1")
        running = ("--workers", "3", "--drain-time", "1.5")
        space = (*running, *space)
        options = parsed(
            "-r", "/r", "-d", "none", "-m", "1K", *space, *resumable, *proxies, *listen, *limits, *log, *tls, *clients
        )
        self.assertEqual(
            dict(options),
            {
                "root": "/r",
                "durability": "none",
                "max-size": 1024,
                "min-free": 2048,
                "quota": 3072,
                "upload-lifetime": 36 * 3600.0,
                "public-url": "https://a/b",
                "allowed-origins": ["https://c"],
                "trusted-proxies": [ip_network("10.1.0.0/16"), ip_network("::1/128")],
                "port": 8443,
                "workers": 3,
                "drain-time": 1.5,
                "listen": ["tcp:1:interface=127.0.0.1", "unix:/s"],
                "limits": Limits(body_rate=0, head_time=2.5, connections_per_address=7),
                "access-log": "/l",
                "access-log-format": "json",
                "tls-profile": "modern",
                "certificates": ["/c"],
                "client-ca": "/a",
                "client-certificate": "optional",
                **NO_ACCESS,
                **NO_HOOKS,
                "log-format": "json",
                "metrics": "tcp:9100:interface=127.0.0.1",
            },
        )
        self.assertEqual(parsed("--port", "1234")["port"], 1234)

    def test_mistakes(self) -> None:
        """Each is told in one sentence that names the option."""
        for words, part in (
            (["--durability", "ful"], "--durability"),
            (["--quota", "0"], "--quota"),
            (["--limit", "bodyrate=1"], "body-rate"),
            (["--limit", "body-rate"], "--limit body-rate"),
            (["--limit", "body-rate=fast"], "--limit body-rate"),
            (["--limit", "connections=0"], "connections is a number above 0"),
            (["--limit", "connections=1.5"], "--limit connections"),
            (["--limit", "head-time=nan"], "head-time is a number above 0"),
            (["--limit", "head-time=inf"], "head-time is a number above 0"),
            (["--access-log-format", "xml"], "--access-log-format"),
            (["--log-format", "xml"], "--log-format"),
            (["--max-size", "much"], "--max-size"),
            (["--upload-lifetime", "1w"], "--upload-lifetime"),
            (["--public-url", "up.example.org"], "--public-url"),
            (["--allow-origin", "https://a/b"], "--allow-origin"),
            (["--trusted-proxy", "10.1.2.3/16"], "--trusted-proxy"),
            (["--workers", "0"], "--workers"),
            (["--drain-time", "-1"], "--drain-time"),
            (["--drain-time", "nan"], "--drain-time"),
            (["--port", "0"], "--port"),
            (["--port", "65536"], "--port"),
            (["--port", "-1"], "--port"),
            (["--port", "http"], "http"),
            (["--port", "1", "--listen", "tcp:2"], "--listen"),
            (["--root", ""], "--root"),
            (["--rot", "x"], "--rot"),
            (["--listen"], "--listen"),
            (["surplus"], "arguments"),
        ):
            message = str(self.assertRaises(UsageError, parsed, *words))
            self.assertIn(part, message, words)
            self.assertNotIn("\n", message, words)

    def test_plugin(self) -> None:
        """``twistd lwstwisted`` ends here."""
        found = [maker for maker in getPlugins(IServiceMaker) if maker.tapname == "lwstwisted"]
        self.assertEqual([maker.options for maker in found], [Options])


class DefaultTests(SynchronousTestCase):
    """What is served without --listen."""

    def test_hints_are_shell_words(self) -> None:
        """What is printed can be pasted."""
        for hint in curl_hints(1234, Path("my uploads/$x.pem")):
            words = shlex.split(hint.partition(":")[2])
            self.assertEqual(words[:3], ["curl", "--cacert", "my uploads/$x.pem"])
            self.assertTrue(words[-1].startswith("https://127.0.0.1:1234/files/"))


class ServiceTests(TestCase):
    """What is built works, and ends well."""

    timeout = 2 * PATIENCE

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def make(self, *words: str) -> Any:
        from twisted.internet import reactor

        made = makeService(parsed("--root", str(self.folder / "root"), *words), reactor)
        self.addCleanup(lambda: Deferred.fromCoroutine(made._store.stop()))
        return made

    async def start(self, *words: str) -> Any:
        made = self.make(*words)
        made.privilegedStartService()
        made.startService()
        self.addCleanup(made.stopService)
        return made

    def open_beneath(self) -> list[str]:
        """What this process has open beneath our folder."""
        found = []
        for name in os.listdir("/proc/self/fd"):
            # The one that lists is closed by now.
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/self/fd/{name}"))
        return [path for path in found if path.startswith(str(self.folder))]

    def ask(self, port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        try:
            client.request(method, path, body)
            answer = client.getresponse()
            return answer.status, answer.read()
        finally:
            client.close()

    async def test_serves(self) -> None:
        """Files at /files/, and / leads there."""
        port = free_port()
        await self.start("--listen", f"tcp:{port}", "--durability", "none")
        self.assertEqual(await deferToThread(self.ask, port, "PUT", "/files/x", b"body"), (201, b""))
        self.assertEqual(await deferToThread(self.ask, port, "GET", "/files/x"), (200, b"body"))
        self.assertEqual((await deferToThread(self.ask, port, "GET", "/"))[0], 302)
        for path in ("/none", "/none/<b>", "/openapi.json/x"):
            status, said = await deferToThread(self.ask, port, "PUT", path)
            self.assertEqual((status, said), (404, b"There is no such file.\n"), path)
        self.assertEqual((self.folder / "root" / "x").read_bytes(), b"body")

    async def test_readiness(self) -> None:
        """A sync that fails is not believed in again: the upload is refused, and others are sent elsewhere."""
        port = free_port()
        await self.start("--listen", f"tcp:{port}")

        def health() -> list[int]:
            return [self.ask(port, "GET", path)[0] for path in ("/healthz", "/readyz")]

        self.assertEqual(await deferToThread(health), [200, 200])

        def broken(error: int) -> Any:
            def fail(descriptor: int) -> None:
                raise OSError(error, os.strerror(error))

            return fail

        for error, status, then in ((errno.ENOSPC, 507, 200), (errno.EIO, 500, 503)):
            patch = self.patch(os, "fsync", broken(error))
            self.assertEqual((await deferToThread(self.ask, port, "PUT", "/files/x", b"body"))[0], status)
            patch.restore()
            self.assertEqual(await deferToThread(health), [200, then])
        # It does what it can, for who doesn't ask.
        self.assertEqual((await deferToThread(self.ask, port, "PUT", "/files/x", b"body"))[0], 201)
        status, said = await deferToThread(self.ask, port, "GET", "/readyz")
        self.assertEqual((status, b"look at it" in said), (503, True))

    async def test_max_size(self) -> None:
        """The option reaches the resource."""
        port = free_port()
        await self.start("--listen", f"tcp:{port}", "--max-size", "3")
        self.assertEqual((await deferToThread(self.ask, port, "PUT", "/files/x", b"body"))[0], 413)

    async def test_stop_waits_for_work(self) -> None:
        """A commit that is under way isn't lost, and afterwards nothing of ours runs or is open."""
        from twisted.internet import reactor

        self.patch(service, "LocalStore", lambda *args, **options: GatedStore(*args, is_open=False, **options))
        port = free_port()
        made = await self.start("--listen", f"tcp:{port}")
        store = made._store
        self.addCleanup(store.open_gate)
        left = Event()

        def upload() -> None:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            try:
                client.request("PUT", "/files/x", b"body")
                self.assertEqual(client.getresponse().status, 201)
            finally:
                client.close()
                left.set()

        uploading = deferToThread(upload)
        while not store.arrived:
            await deferLater(reactor, 0.01, lambda: None)  # type: ignore[arg-type]
        stopped = made.stopService()
        self.assertNoResult(stopped)
        store.open_gate()
        await uploading
        await stopped
        self.assertEqual((self.folder / "root" / "x").read_bytes(), b"body")
        self.assertEqual(list((self.folder / "root" / ".lwstwisted" / "partial").iterdir()), [])
        self.assertEqual(self.open_beneath(), [])
        with self.assertRaises(ConnectionRefusedError):
            await deferToThread(self.ask, port, "GET", "/")

    async def test_what_stays_is_no_garbage(self) -> None:
        """While it serves, a collection of garbage looks at what it serves, and not at every module again."""
        before = len(gc.get_objects())
        self.assertEqual(gc.get_freeze_count(), 0)
        made = await self.start("--listen", f"tcp:{free_port()}")
        self.assertLess(len(gc.get_objects()), before / 10)
        await made.stopService()
        self.assertEqual(gc.get_freeze_count(), 0)

    async def test_stop_twice(self) -> None:
        made = await self.start("--listen", f"tcp:{free_port()}")
        await made.stopService()
        await made.stopService()

    async def test_port_in_use(self) -> None:
        """It's told where the service is started, for the command to say."""
        from twisted.internet import reactor
        from twisted.internet.protocol import Factory

        taken: IListeningPort = reactor.listenTCP(0, Factory(), interface="127.0.0.1")  # type: ignore[attr-defined]
        self.addCleanup(taken.stopListening)
        made = self.make("--listen", f"tcp:{taken.getHost().port}")  # type: ignore[attr-defined]
        self.assertRaises(CannotListenError, made.privilegedStartService)
        await made.stopService()

    async def test_root_is_a_file(self) -> None:
        (self.folder / "root").write_bytes(b"")
        self.assertRaises(OSError, self.make)

    async def test_default_listener(self) -> None:
        """Without --listen there is TLS, with a certificate that is made for it, and hints how to use it."""
        made = self.make("--port", str(free_port()))
        self.assertEqual(len(made.hints), 2)
        certificate = self.folder / "root" / ".lwstwisted" / "development.pem"
        self.assertEqual(certificate.stat().st_mode & 0o777, 0o600)
        self.assertEqual(self.make("--listen", "tcp:0").hints, [])
