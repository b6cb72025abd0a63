"""Resumable uploads by clients that others wrote: each is cut again and again, and the file arrives whole.

A :class:`Line` is between a client and the service. It counts the bytes of bodies that it carries, and at a random one
of them it resets the connections, kills the client, or kills the service. The client, or its next process, finds out
how far it was and goes on; nobody helps it.

The environment tells more: ``RESUME_MIB`` how large the file is, ``RESUME_CUTS`` how often each kind of cut happens to
each client, ``RESUME_SEED`` which bytes are hit; each test prints its seed. ``make resume`` is the long form.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import os
import random
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, Protocol
from unittest import skipUnless

import pytest
from httptools import HttpRequestParser
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from twisted.trial.unittest import SynchronousTestCase
from urllib3.exceptions import HTTPError

from lwstwisted.certificate import ensure_development_certificate
from tests.servers import (
    PATIENCE,
    digest,
    free_port,
    serving,
    tls_endpoint,
    twistd,
    visible_beneath,
    wait_until,
    write_sample,
)

CLIENTS = Path(__file__).with_name("clients")

MIB = 1024 * 1024
SIZE = int(os.environ.get("RESUME_MIB", 16)) * MIB
CUTS = int(os.environ.get("RESUME_CUTS", 1))
"""Of each kind."""
SEED = int(os.environ.get("RESUME_SEED", random.SystemRandom().randrange(2**32)))

LONG = (2 + CUTS) * PATIENCE
"""Seconds for one upload, with all its cuts."""

PIECE = 64 * 1024

Cut = tuple[int, Callable[[], None]]
"""After how many further bytes of bodies something happens, and what."""


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection as a broken network would: what is under way is lost, and the peer is told so."""
    ends = writer.get_extra_info("socket")
    if ends is not None and ends.fileno() != -1:
        ends.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Requests:
    """What the requests of one connection say; httptools calls its methods.

    :ivar body: bytes of bodies so far.
    """

    def __init__(self, line: Line) -> None:
        self.body = 0
        self._line = line
        self._parser = HttpRequestParser(self)
        self._url = b""
        self._fields: dict[bytes, bytes] = {}

    def feed(self, data: bytes) -> int:
        """Look at more bytes.

        :returns: how many of them are of bodies.
        """
        before = self.body
        self._parser.feed_data(data)
        return self.body - before

    @property
    def path(self) -> str:
        """Of the request that came last."""
        return self._url.decode()

    def on_message_begin(self) -> None:
        self._url, self._fields = b"", {}

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields[name.lower()] = value

    def on_headers_complete(self) -> None:
        offset = self._fields.get(b"upload-offset")
        asked = (self._parser.get_method().decode(), self.path, None if offset is None else int(offset))
        self._line.asked.append(asked)

    def on_body(self, data: bytes) -> None:
        self.body += len(data)


class Line:
    """Carries connections to a service, and cuts them: from a cut on nothing is carried on those that are there.

    :ivar port: where clients connect.
    :ivar cuts: those to come, in their order.
    :ivar carried: bytes of bodies that were sent on to the service.
    :ivar asked: method, path and ``Upload-Offset`` of all requests.
    :ivar told: path of the request, and ``Upload-Offset`` of an answer to it, interim ones included.
    """

    def __init__(self, target: int) -> None:
        self.port = 0
        self.cuts: list[Cut] = []
        self.carried = 0
        self.asked: list[tuple[str, str, int | None]] = []
        self.told: list[tuple[str, int]] = []
        self._since = 0
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._stop: Callable[[], object] | None = None
        self._failures: list[BaseException] = []
        self._ready = Event()
        self._thread = Thread(target=asyncio.run, args=[self._serve()])

    def __enter__(self) -> Line:
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        return self

    def __exit__(self, *failure: object) -> None:
        assert self._stop is not None
        self._stop()
        self._thread.join(PATIENCE)
        if self._failures:
            raise self._failures[0]

    async def _serve(self) -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        self._stop = partial(loop.call_soon_threadsafe, over.set)
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await over.wait()
        server.close()
        self.reset()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=PATIENCE)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            service = socket.socket()
            # What is in its buffer is lost with a reset.
            service.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)
            service.setblocking(False)
            with contextlib.closing(service):
                await asyncio.get_running_loop().sock_connect(service, ("127.0.0.1", self._target))
                service_reader, service_writer = await asyncio.open_connection(sock=service)
                self._writers |= {writer, service_writer}
                requests = Requests(self)
                try:
                    await asyncio.gather(
                        self._carry(requests, reader, service_writer), self._return(requests, service_reader, writer)
                    )
                finally:
                    self._writers -= {writer, service_writer}
                    reset(service_writer)
        except OSError:
            pass  # somebody is gone, so nobody is there for the other
        except Exception as failure:
            self._failures.append(failure)
        finally:
            reset(writer)

    async def _carry(self, requests: Requests, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cuts_left = len(self.cuts)
        while (data := await reader.read(PIECE)) and len(self.cuts) == cuts_left:
            body = requests.feed(data)
            if self.cuts and self._since + body >= self.cuts[0][0]:
                count, action = self.cuts.pop(0)
                # What ends with bytes of a body begins with the head of it, if at all.
                late = self._since + body - count
                writer.write(data[: len(data) - late])
                self.carried += body - late
                self._since = 0
                action()
                break
            writer.write(data)
            self.carried += body
            self._since += body
            await writer.drain()
        writer.write_eof()

    async def _return(self, requests: Requests, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = b""
        while data := await reader.read(PIECE):
            *lines, line = (line + data).split(b"\r\n")
            for one in lines:
                if one.lower().startswith(b"upload-offset:"):
                    self.told.append((requests.path, int(one.split(b":")[1])))
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    def reset(self) -> None:
        """Reset all connections."""
        for writer in self._writers:
            reset(writer)


class Client(Protocol):
    """Uploads a file, and may be killed and started again.

    :ivar is_killed: since it was started last.
    """

    is_killed: bool

    def start(self) -> None:
        """Upload, or go on with it."""

    def kill(self) -> None:
        """End it in the middle of what it does."""

    def end(self) -> None:
        """Leave nothing behind."""

    def outcome(self) -> str | None:
        """None while it uploads, "" when it has, or what went wrong."""


class Program:
    """A client that is a command.

    :param log: for what it says.
    """

    def __init__(self, log: Path, *command: str | Path) -> None:
        self.is_killed = False
        self._command = command
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """See :class:`Client`."""
        self.end()
        self.is_killed = False
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=CLIENTS,
                start_new_session=True,
            )

    def kill(self) -> None:
        """See :class:`Client`."""
        assert self._process is not None
        self.is_killed = True
        os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """See :class:`Client`."""
        if self._process is not None:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(PATIENCE)

    def outcome(self) -> str | None:
        """See :class:`Client`."""
        assert self._process is not None
        status = self._process.poll()
        return status if status is None else "" if status == 0 else f"status {status}: {self._log.read_text()}"


def descendants(pid: int) -> Iterator[int]:
    """The processes that a process has started, and those that they have."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name of the command, in parentheses, may have spaces.
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                yield int(stat.parent.name)
                yield from descendants(int(stat.parent.name))


class Uppy:
    """Uppy on a page in Chromium, which comes from another site than the service.

    :param folder: for the profile of the browser, which a killed one leaves to the next.
    """

    def __init__(self, folder: Path, page: str, file: Path) -> None:
        self.is_killed = False
        self._profile = folder / "profile"
        self._page = page
        self._file = file
        self._browser: Any = None

    def start(self) -> None:
        """See :class:`Client`."""
        self.end()
        self.is_killed = False
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-proxy-server"):
            options.add_argument(word)
        options.add_argument(f"--user-data-dir={self._profile}")
        self._browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        self._browser.set_page_load_timeout(PATIENCE)
        self._browser.get(self._page)
        self._browser.find_element(By.TAG_NAME, "input").send_keys(str(self._file))

    def kill(self) -> None:
        """See :class:`Client`. A browser keeps what pages store for seconds in memory; before that is on the disk
        nobody could go on."""
        wait_until(lambda: b"/uploads/" in self._stored(), "the URL was stored")
        self.is_killed = True
        for pid in list(descendants(self._browser.service.process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _stored(self) -> bytes:
        stored = b""
        for path in (self._profile / "Default" / "Local Storage" / "leveldb").glob("*"):
            with contextlib.suppress(FileNotFoundError):
                stored += path.read_bytes()
        return stored

    def end(self) -> None:
        """See :class:`Client`."""
        if self._browser is not None:
            with contextlib.suppress(WebDriverException, HTTPError):
                self._browser.quit()
            self._browser = None

    def outcome(self) -> str | None:
        """See :class:`Client`."""
        try:
            found: str | None = self._browser.execute_script("return window.outcome")
        except (WebDriverException, HTTPError) as failure:
            return f"the browser is gone: {failure}"
        return found


class Pages(SimpleHTTPRequestHandler):
    """Uppy, and the page that shows it."""

    FILES = {"/": CLIENTS / "uppy.html", "/uppy.min.js": CLIENTS / "node_modules/uppy/dist/uppy.min.js"}

    def translate_path(self, path: str) -> str:
        return str(self.FILES.get(path.partition("?")[0], CLIENTS / "missing"))

    def guess_type(self, path: Any) -> str:
        return "text/javascript" if str(path).endswith(".js") else "text/html"

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def pages() -> Iterator[str]:
    """Serve them; gives their origin."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://localhost:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(PATIENCE)


class ServiceMixin:
    """The real service, which may be killed and started again, for a test case."""

    def setUp(self: Any) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.root = self.folder / "root"
        self.port = free_port()
        self.logs: list[str] = []
        self.running = ExitStack()
        self.addCleanup(self.stop)
        self.seed = f"{SEED}/{self.id()}"
        self.random = random.Random(self.seed)
        self.start()

    def start(self: Any) -> None:
        """Start it on the same folder and port as always."""
        command = twistd("--root", self.root, "--listen", f"tcp:{self.port}:interface=127.0.0.1", *self.more_options())
        self.server = self.running.enter_context(serving(command, cwd=self.folder))
        self.server.wait_for_ports()

    def more_options(self: Any) -> list[str]:
        return []

    def stop(self: Any) -> None:
        """Kill it, if it runs."""
        self.running.close()
        self.logs.append(self.server.text)

    def check_logs(self: Any) -> None:
        """Nothing went wrong in silence."""
        self.stop()
        for log in self.logs:
            self.assertNotIn("Traceback", log)
            self.assertNotIn("[critical]", log)


class CutMixin(ServiceMixin):
    """A client and the line to the service, for a test case."""

    PATH = "/uploads/"
    CREATIONS = 1
    """Requests that create an upload, which only happens once however often it is cut."""

    def setUp(self: Any) -> None:
        super().setUp()
        self.file = write_sample(self.folder / "sample.bin", SIZE)
        self.line = self.enterContext(Line(self.port))
        self.url = f"http://127.0.0.1:{self.line.port}{self.PATH}"

    def check(self: Any, client: Client) -> None:
        """Upload with all cuts, in a random order."""
        self.addCleanup(client.end)
        kinds = {"a reset": self.line.reset, "no client": client.kill, "no service": self.kill_service}
        names = [*kinds] * CUTS
        self.random.shuffle(names)
        # All of them come before the end: together they take less than the whole.
        counts = [int(self.random.uniform(0.3, 0.9) * SIZE / len(names)) for _ in names]
        self.line.cuts = [(count, kinds[name]) for name, count in zip(names, counts, strict=True)]
        plan = ", ".join(f"{name} after {count}" for name, count in zip(names, counts, strict=True))
        print(f"\n{self.id()}: RESUME_SEED={SEED} RESUME_MIB={SIZE // MIB} RESUME_CUTS={CUTS}: {plan}")

        began = time.monotonic()
        client.start()
        while (outcome := client.outcome()) is None or client.is_killed:
            if client.is_killed:
                client.start()
            if self.server.process.poll() is not None:
                self.stop()
                self.start()
            if time.monotonic() > began + LONG:
                self.fail(f"it hangs: {self.line.asked[-20:]}\n" + "\n".join(self.server.log[-20:]))
            time.sleep(0.02)
        self.assertEqual(outcome, "")
        taken, twice = time.monotonic() - began, self.line.carried - SIZE
        print(f"{taken:.1f} s, {len(self.line.asked)} requests, {twice} bytes went to the service twice")

        self.assertEqual(self.line.cuts, [])
        self.assertEqual(visible_beneath(self.root), [self.file.name], self.line.asked)
        self.assertEqual(digest(self.root / self.file.name), digest(self.file))
        creations = [asked for asked in self.line.asked if self.is_creation(*asked)]
        self.assertEqual(len(creations), self.CREATIONS, creations)
        self.check_offsets()
        self.check_logs()

    def is_creation(self: Any, method: str, path: str, offset: int | None) -> bool:
        return method in ("POST", "PUT") and path.rstrip("/") == self.PATH.rstrip("/")

    def check_offsets(self: Any) -> None:
        """What a client was told is never taken back, not even by a kill; and it went on from there."""
        known: dict[str, int] = {}
        for path, offset in self.line.told:
            self.assertGreaterEqual(offset, known.get(path, 0), path)
            known[path] = offset
        resumed = [offset for method, _, offset in self.line.asked if method == "PATCH" and offset]
        self.assertTrue(resumed, "no upload went on where it had been cut")

    def kill_service(self: Any) -> None:
        """Kill it in the middle of what it does."""
        self.server.process.send_signal(signal.SIGKILL)


def is_installed(*commands: str, npm: bool = False) -> bool:
    """Whether commands, and what npm installs for these tests, are there."""
    return all(map(shutil.which, commands)) and (not npm or (CLIENTS / "node_modules" / ".installed").exists())


@pytest.mark.slow
class TuspyTests(CutMixin, SynchronousTestCase):
    """tuspy, in chunks of 6 MB."""

    @skipUnless(importlib.util.find_spec("tusclient"), "tuspy is not installed")
    def test_tus(self) -> None:
        """The library goes on after a cut, and a process with the URL that the one before has stored."""
        storage = self.folder / "storage"
        program = CLIENTS / "tuspy_upload.py"
        self.check(Program(self.folder / "log", sys.executable, program, self.url, self.file, storage))


@pytest.mark.slow
class ParallelTests(CutMixin, SynchronousTestCase):
    """resumable-upload: four parts at once, in chunks with checksums, and a concatenation."""

    CREATIONS = 5

    @skipUnless(importlib.util.find_spec("resumable_upload"), "resumable-upload is not installed")
    def test_tus(self) -> None:
        """Each part goes on by itself, and the parts become one file."""
        storage = self.folder / "storage"
        program = CLIENTS / "parallel_upload.py"
        self.check(Program(self.folder / "log", sys.executable, program, self.url, self.file, storage))


@skipUnless(is_installed("node", npm=True), "node, or tus-js-client by tests/clients/install-npm.sh, is not installed")
@pytest.mark.slow
class TusJsTests(CutMixin, SynchronousTestCase):
    """tus-js-client in Node, each upload in one request if nothing happens."""

    def check_protocol(self, protocol: str) -> None:
        storage = self.folder / "storage"
        program = CLIENTS / "tus.cjs"
        self.check(Program(self.folder / "log", "node", program, self.url, self.file, storage, protocol))

    def test_tus(self) -> None:
        """tus 1.0, with the URL in a file for the next process."""
        self.check_protocol("tus-v1")

    def test_ietf_draft_03(self) -> None:
        """The protocol of the IETF as of iOS 18.0 (interop version 5)."""
        self.check_protocol("ietf-draft-03")

    def test_ietf_draft_05(self) -> None:
        """The protocol of the IETF as of iOS 18.1 (interop version 6)."""
        self.check_protocol("ietf-draft-05")


@skipUnless(is_installed("curl"), "curl is not installed")
@pytest.mark.slow
class CurlTusTests(CutMixin, SynchronousTestCase):
    """curl in a shell script that speaks tus."""

    def test_tus(self) -> None:
        """POST, then HEAD and PATCH until everything is there."""
        self.check(Program(self.folder / "log", CLIENTS / "tus.sh", self.url, self.file, self.folder / "heads"))


@skipUnless(is_installed("curl"), "curl is not installed")
@pytest.mark.slow
class CurlIetfTests(CutMixin, SynchronousTestCase):
    """curl in a shell script that speaks the protocol of the IETF (interop version 8)."""

    PATH = "/files/sample.bin"

    def test_ietf(self) -> None:
        """A PUT of the file to its name, and where it was cut PATCH to the URL of the interim answer."""
        self.check(Program(self.folder / "log", CLIENTS / "ietf.sh", self.url, self.file, self.folder / "heads"))


@skipUnless(
    is_installed("chromium", "chromedriver", npm=True),
    "Chromium, its driver, or Uppy by tests/clients/install-npm.sh, is not installed",
)
@pytest.mark.slow
class UppyTests(CutMixin, SynchronousTestCase):
    """Uppy in Chromium, on a page of another site."""

    def test_tus(self) -> None:
        """Somebody chooses a file; when the browser crashes, the same page goes on with the same file."""
        page = self.enterContext(pages())
        self.check(Uppy(self.folder, f"{page}/?endpoint={self.url}", self.file))


MANY = 200
MANY_SIZE = 256 * 1024
MANY_CUTS = 5
TOLD_IN = 20.0
"""Seconds until a client that is back has to be told its offset: a third of what a service waits for one that is silent
(``body_time``). It takes a fraction of a second where nothing else runs."""


class Answer:
    """The head of an answer.

    :ivar status: its status.
    """

    def __init__(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1])
        self._fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def __getitem__(self, name: str) -> str:
        return self._fields[name]


class Connection:
    """One connection for one request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    def send(self, method: str, path: str, fields: Sequence[str]) -> None:
        """Send a head."""
        head = [f"{method} {path} HTTP/1.1", "Host: localhost", "Tus-Resumable: 1.0.0", "Connection: close", *fields]
        self.writer.write("".join(f"{line}\r\n" for line in [*head, ""]).encode())

    async def answer(self, seconds: float = PATIENCE) -> Answer:
        """Wait for the head of the answer."""
        async with asyncio.timeout(seconds):
            return Answer((await self._reader.readuntil(b"\r\n\r\n")).removesuffix(b"\r\n\r\n"))


class Crowd:
    """Uploads that are cut again and again, all at once.

    :param ports: of TCP and of TLS.
    :ivar longest: seconds from the connect of a client that is back until it is told its offset, by the way in which
        it had left; and, to compare, from the connect until an upload is created.
    :ivar twice: bytes that were sent more than once.
    """

    WAYS = ("reset", "closed", "silent")
    PATCH = "Content-Type: application/offset+octet-stream"

    def __init__(self, ports: tuple[int, int], context: ssl.SSLContext) -> None:
        self.longest = dict.fromkeys((*self.WAYS, "created"), 0.0)
        self.twice = 0
        self._ports = ports
        self._context = context
        self._connections: list[Connection] = []

    async def connected(self, is_tls: bool) -> Connection:
        """Connect."""
        options: dict[str, Any] = {"ssl": self._context, "server_hostname": "localhost"} if is_tls else {}
        async with asyncio.timeout(PATIENCE):
            connection = Connection(*await asyncio.open_connection("127.0.0.1", self._ports[is_tls], **options))
        self._connections.append(connection)
        return connection

    def leave(self) -> None:
        """Leave nothing open."""
        for connection in self._connections:
            reset(connection.writer)

    def note(self, what: str, began: float) -> None:
        self.longest[what] = max(self.longest[what], time.monotonic() - began)

    async def upload(self, name: str, content: bytes, is_tls: bool, randomness: random.Random) -> None:
        """One of them: it is created, each of its requests but the last one is cut, and it ends."""
        word = b64encode(name.encode()).decode()
        began = time.monotonic()
        asking = await self.connected(is_tls)
        asking.send("POST", "/uploads/", [f"Upload-Length: {len(content)}", f"Upload-Metadata: filename {word}"])
        created = await asking.answer()
        self.note("created", began)
        assert created.status == 201, created.status
        reset(asking.writer)
        path, offset = created["location"], 0
        for _ in range(MANY_CUTS):
            sending = await self.connected(is_tls)
            left = content[offset:]
            sending.send("PATCH", path, [self.PATCH, f"Upload-Offset: {offset}", f"Content-Length: {len(left)}"])
            sent = randomness.randrange(len(left))
            sending.writer.write(left[:sent])
            async with asyncio.timeout(PATIENCE):
                await sending.writer.drain()
            way = randomness.choice(self.WAYS)
            if way == "reset":
                reset(sending.writer)
            elif way == "closed":
                sending.writer.close()
            began = time.monotonic()
            asking = await self.connected(is_tls)
            asking.send("HEAD", path, [])
            told = await asking.answer(TOLD_IN)
            self.note(way, began)
            assert told.status == 200, (way, told.status)
            assert offset <= int(told["upload-offset"]) <= offset + sent, (way, offset, sent, told["upload-offset"])
            self.twice += offset + sent - int(told["upload-offset"])
            offset = int(told["upload-offset"])
            reset(asking.writer)
            reset(sending.writer)
        sending = await self.connected(is_tls)
        left = content[offset:]
        sending.send("PATCH", path, [self.PATCH, f"Upload-Offset: {offset}", f"Content-Length: {len(left)}"])
        sending.writer.write(left)
        ended = await sending.answer()
        assert (ended.status, ended["upload-offset"]) == (204, str(len(content))), ended.status
        reset(sending.writer)


@pytest.mark.slow
class ManyTests(ServiceMixin, SynchronousTestCase):
    """A crowd whose network is bad."""

    def more_options(self) -> list[str]:
        self.certificate = ensure_development_certificate(self.folder / "pair.pem")
        return ["--listen", tls_endpoint(self.certificate)]

    def test_all_complete(self) -> None:
        """200 uploads at once, half of them over TLS, each cut five times. Whoever comes back is told a true offset at
        once, also where nothing says that the connection before has gone."""
        print(f"\n{self.id()}: RESUME_SEED={SEED}")
        plain, tls = self.server.wait_for_ports(2)
        crowd = Crowd((plain, tls), ssl.create_default_context(cafile=self.certificate))
        contents = {f"{number}.bin": self.random.randbytes(MANY_SIZE) for number in range(MANY)}

        async def upload_all() -> list[Any]:
            uploads = (
                crowd.upload(name, content, number % 2 == 1, random.Random(f"{self.seed}/{number}"))
                for number, (name, content) in enumerate(contents.items())
            )
            try:
                return await asyncio.gather(*uploads, return_exceptions=True)
            finally:
                crowd.leave()

        began = time.monotonic()
        failures = [failure for failure in asyncio.run(upload_all()) if failure is not None]
        longest = ", ".join(f"{way} {seconds:.2f}" for way, seconds in crowd.longest.items())
        print(f"{time.monotonic() - began:.1f} s, {crowd.twice} bytes sent twice; seconds at most: {longest}")
        self.assertEqual(failures[:5], [], f"{len(failures)} uploads failed")
        for name, content in contents.items():
            self.assertEqual(digest(self.root / name), hashlib.sha256(content).hexdigest())
        self.check_logs()
