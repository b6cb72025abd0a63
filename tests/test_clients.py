"""Clients that others wrote, as people use them: what they send is what is on the disk, and a refusal is a status.

Each of them uploads and downloads on TCP and TLS, with a body of known length and, if it can, with one in chunks.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import skipUnless
from urllib.parse import urlsplit

import aiohttp
import httpx
import pytest
import requests
import treq
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import staleness_of
from selenium.webdriver.support.ui import WebDriverWait
from twisted.internet.ssl import Certificate
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.client import Agent, BrowserLikePolicyForHTTPS, FileBodyProducer
from twisted.web.iweb import UNKNOWN_LENGTH

from lwstwisted.certificate import ensure_development_certificate
from tests.servers import (
    PATIENCE,
    digest,
    serving,
    tls_endpoint,
    twistd,
    unfinished_beneath,
    visible_beneath,
    wait_until,
    write_sample,
)

MIB = 1024 * 1024
SIZE = 3 * MIB + 1
MAX_SIZE = 4 * MIB
TOO_LARGE = 8 * MIB

PIECE = 100_000
"""Bytes of one piece of a body that a program makes."""

Upload = Callable[[str, Path, bool], int]
"""Uploads to a URL from a file, in chunks or not, and returns the status."""

Download = Callable[[str, Path], int]
"""Downloads from a URL to a file."""


def pieces(source: Path) -> Iterator[bytes]:
    """A body of which nobody knows the length before its end."""
    with open(source, "rb") as file:
        while piece := file.read(PIECE):
            yield piece


async def pieces_later(source: Path) -> AsyncIterator[bytes]:
    """The same for programs on asyncio."""
    for piece in pieces(source):
        yield piece


class AiohttpClient:
    """Sessions of aiohttp that end when their sockets are closed, which aiohttp itself doesn't wait for."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._sockets: list[socket.socket] = []

    def _make_socket(self, address: Any) -> socket.socket:
        made = socket.socket(*address[:3])
        self._sockets.append(made)
        return made

    async def ask(self, method: str, url: str, **options: Any) -> tuple[int, bytes]:
        """Status and content."""
        connector = aiohttp.TCPConnector(ssl=self._context, socket_factory=self._make_socket)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.request(method, url, **options) as answer,
        ):
            found = answer.status, await answer.read()
        async with asyncio.timeout(PATIENCE):
            while any(made.fileno() != -1 for made in self._sockets):
                await asyncio.sleep(0.01)
        return found


class ClientMixin:
    """The real service, on TCP and TLS, for a test case."""

    LIMITS: tuple[str, ...] = ("linger-time=30",)
    """Some clients look for the answer only when they have sent everything, however slow this machine is today."""

    def setUp(self: Any) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.root = self.folder / "root"
        self.certificate = ensure_development_certificate(self.folder / "pair.pem")
        self.context = ssl.create_default_context(cafile=self.certificate)
        self.small = write_sample(self.folder / "small", SIZE)
        self.large = write_sample(self.folder / "large", TOO_LARGE)
        command = twistd("--root", self.root, "--listen", "tcp:0", "--listen", tls_endpoint(self.certificate))
        command += ["--max-size", str(MAX_SIZE), *(f"--limit={limit}" for limit in self.LIMITS)]
        self.server = self.enterContext(serving(command, cwd=self.folder))
        plain, tls = self.server.wait_for_ports(2)
        self.plain, self.tls = f"http://127.0.0.1:{plain}/files", f"https://127.0.0.1:{tls}/files"

    def check(self: Any, upload: Upload, download: Download, in_chunks: tuple[bool, ...] = (False, True)) -> None:
        """Go there and back with what is accepted, and read the refusal of what isn't."""
        fetched = self.folder / "fetched"
        for url, is_chunked in itertools.product((self.plain, self.tls), in_chunks):
            with self.subTest(url=url, is_chunked=is_chunked):
                name = f"{urlsplit(url).scheme}-{is_chunked}"
                self.assertEqual(upload(f"{url}/{name}", self.small, is_chunked), 201)
                self.assertEqual(digest(self.root / name), digest(self.small))
                self.assertEqual(download(f"{url}/{name}", fetched), 200)
                self.assertEqual(digest(fetched), digest(self.small))
                self.assertEqual(upload(f"{url}/large", self.large, is_chunked), 413)
        self.check_end()

    def check_end(self: Any) -> None:
        """Nothing of a refused upload is there, and nothing went wrong in silence."""
        self.assertNotIn("large", visible_beneath(self.root))
        self.assertEqual(unfinished_beneath(self.root), [])
        self.assertNotIn("Traceback", self.server.text)


class ProgramTests(ClientMixin, SynchronousTestCase):
    """Libraries of Python."""

    def test_http_client(self) -> None:
        """The standard library, which looks for an answer when it has sent everything."""

        def ask(method: str, url: str, body: Any, headers: dict[str, str], target: Path | None = None) -> int:
            parts = urlsplit(url)
            assert parts.hostname is not None
            connection = (
                http.client.HTTPSConnection(parts.hostname, parts.port, context=self.context, timeout=PATIENCE)
                if parts.scheme == "https"
                else http.client.HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE)
            )
            try:
                connection.request(method, parts.path, body, headers)
                response = connection.getresponse()
                content = response.read()
                if target is not None:
                    target.write_bytes(content)
                return response.status
            finally:
                connection.close()

        def upload(url: str, source: Path, is_chunked: bool) -> int:
            with open(source, "rb") as file:
                return ask("PUT", url, file, {} if is_chunked else {"Content-Length": str(source.stat().st_size)})

        self.check(upload, lambda url, target: ask("GET", url, None, {}, target))

    def test_requests(self) -> None:
        """requests, with a file or a generator as data, over kept connections."""
        with requests.Session() as session:
            session.trust_env = False  # a bundle of certificates named there would win
            session.verify = str(self.certificate)

            def upload(url: str, source: Path, is_chunked: bool) -> int:
                with open(source, "rb") as file:
                    return session.put(url, data=pieces(source) if is_chunked else file, timeout=PATIENCE).status_code

            def download(url: str, target: Path) -> int:
                with session.get(url, stream=True, timeout=PATIENCE) as response, open(target, "wb") as file:
                    file.writelines(response.iter_content(PIECE))
                    return response.status_code

            self.check(upload, download)

    def test_httpx(self) -> None:
        """httpx, with a file or a generator as content."""
        with httpx.Client(verify=self.context, timeout=PATIENCE) as client:

            def upload(url: str, source: Path, is_chunked: bool) -> int:
                with open(source, "rb") as file:
                    return client.put(url, content=pieces(source) if is_chunked else file).status_code

            def download(url: str, target: Path) -> int:
                with client.stream("GET", url) as response, open(target, "wb") as file:
                    file.writelines(response.iter_bytes())
                    return response.status_code

            self.check(upload, download)

    def test_httpx_async(self) -> None:
        """httpx on asyncio; a generator with a length of its own is no body in chunks."""

        async def upload(url: str, source: Path, is_chunked: bool) -> int:
            length = {} if is_chunked else {"Content-Length": str(source.stat().st_size)}
            async with httpx.AsyncClient(verify=self.context, timeout=PATIENCE) as client:
                return (await client.put(url, content=pieces_later(source), headers=length)).status_code

        async def download(url: str, target: Path) -> int:
            async with httpx.AsyncClient(verify=self.context, timeout=PATIENCE) as client:
                response = await client.get(url)
                target.write_bytes(response.content)
                return response.status_code

        self.check(lambda *what: asyncio.run(upload(*what)), lambda *what: asyncio.run(download(*what)))

    def test_aiohttp(self) -> None:
        """aiohttp, with a file or a generator as data."""

        async def upload(url: str, source: Path, is_chunked: bool) -> int:
            with open(source, "rb") as file:
                data = pieces_later(source) if is_chunked else file
                return (await AiohttpClient(self.context).ask("PUT", url, data=data))[0]

        async def download(url: str, target: Path) -> int:
            status, content = await AiohttpClient(self.context).ask("GET", url)
            target.write_bytes(content)
            return status

        self.check(lambda *what: asyncio.run(upload(*what)), lambda *what: asyncio.run(download(*what)))


class TreqTests(ClientMixin, TestCase):
    """treq, on the reactor of the tests."""

    async def test_treq(self) -> None:
        """Files and bodies of unknown length, each on a connection of its own."""
        from twisted.internet import reactor

        trusted = Certificate.loadPEM(self.certificate.read_text())
        agent = Agent(reactor, BrowserLikePolicyForHTTPS(trustRoot=trusted))
        client = treq.client.HTTPClient(agent)
        fetched = self.folder / "fetched"
        for url, is_chunked in itertools.product((self.plain, self.tls), (False, True)):
            name = f"{urlsplit(url).scheme}-{is_chunked}"
            for source, target, status in ((self.small, name, 201), (self.large, "large", 413)):
                file = self.enterContext(open(source, "rb"))  # it may be read after an early answer
                body = FileBodyProducer(file)
                if is_chunked:
                    body.length = UNKNOWN_LENGTH
                response = await client.put(f"{url}/{target}", body)
                self.assertEqual(response.code, status, (url, is_chunked))
                await response.content()
            self.assertEqual(digest(self.root / name), digest(self.small))
            response = await client.get(f"{url}/{name}")
            with open(fetched, "wb") as file:
                await response.collect(file.write)
            self.assertEqual(digest(fetched), digest(self.small))
        self.check_end()


@skipUnless(shutil.which("curl"), "curl is not installed")
class CurlTests(ClientMixin, SynchronousTestCase):
    """curl, with the options that change what it sends."""

    def curl(self, *options: str | Path, stdin: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = ["curl", "--silent", "--show-error", "--max-time", str(PATIENCE), "--cacert", self.certificate]
        with open(stdin or "/dev/null", "rb") as data:
            done = subprocess.run(
                [str(word) for word in [*command, *options]],
                stdin=data,
                cwd=self.folder,
                capture_output=True,
                text=True,
                timeout=2 * PATIENCE,
            )
        self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def status(self, *options: str | Path, stdin: Path | None = None) -> int:
        return int(self.curl(*options, "-o", "said", "-w", "%{http_code}", stdin=stdin).stdout)

    def download(self, url: str, target: Path) -> int:
        return int(self.curl("-o", target, "-w", "%{http_code}", url).stdout)

    def test_file_and_pipe(self) -> None:
        """``-T file`` has a length, and ``-T -`` comes in chunks."""

        def upload(url: str, source: Path, is_chunked: bool) -> int:
            return self.status("-T", "-", url, stdin=source) if is_chunked else self.status("-T", source, url)

        self.check(upload, self.download)

    def test_data(self) -> None:
        """``--data-binary`` with PUT: curl says that it is a form, and the bytes are stored as they are."""

        def upload(url: str, source: Path, is_chunked: bool) -> int:
            coding = ["-H", "Transfer-Encoding: chunked"] if is_chunked else []
            return self.status("-X", "PUT", *coding, "--data-binary", f"@{source}", url)

        self.check(upload, self.download)

    def test_with_and_without_a_question(self) -> None:
        """``Expect: 100-continue`` is answered at once, and only then; without it curl doesn't wait either."""
        for url in (self.plain, self.tls):
            done = self.curl("-v", "-H", "Expect: 100-continue", "--expect100-timeout", "20", "-T", "small", f"{url}/a")
            self.assertRegex(done.stderr, r"(?s)< HTTP/1\.1 100 Continue.*< HTTP/1\.1 20[14] ")
            done = self.curl("-v", "-H", "Expect:", "-T", "small", f"{url}/b")
            self.assertNotIn("100 Continue", done.stderr)
            self.assertRegex(done.stderr, r"< HTTP/1\.1 20[14] ")
            for name in ("a", "b"):
                self.assertEqual(digest(self.root / name), digest(self.small))

    def test_slowly(self) -> None:
        """``--limit-rate``: a slow client is a client."""
        sent = write_sample(self.folder / "slow", 64 * 1024)
        for url in (self.plain, self.tls):
            self.assertIn(self.status("--limit-rate", "128K", "-T", sent, f"{url}/slow"), (201, 204))
            self.assertEqual(digest(self.root / "slow"), digest(sent))

    def test_resumed_download(self) -> None:
        """``-C -`` fetches what is missing, and nothing else."""
        for url in (self.plain, self.tls):
            self.assertIn(self.status("-T", self.small, f"{url}/file"), (201, 204))
            fetched = self.folder / "fetched"
            fetched.write_bytes(self.small.read_bytes()[: 2 * MIB])
            done = self.curl("-C", "-", "-o", fetched, "-w", "%{http_code} %{size_download}", f"{url}/file")
            self.assertEqual(done.stdout, f"206 {SIZE - 2 * MIB}")
            self.assertEqual(digest(fetched), digest(self.small))

    def test_resumed_upload(self) -> None:
        """``-C -`` with an upload is no PUT of the whole file: it is refused before its body, not stored as a whole."""
        for url, offset in itertools.product((self.plain, self.tls), ("-", "1000")):
            asking = ["-v", "-C", offset, "-H", "Expect: 100-continue", "--expect100-timeout", "20"]
            done = self.curl(*asking, "-o", "said", "-w", "%{http_code} %{size_upload}", "-T", "small", f"{url}/large")
            self.assertEqual(done.stdout, "400 0")
            self.assertRegex(done.stderr, r"> Content-Range: bytes \d+-")
            self.assertNotIn("100 Continue", done.stderr)
            self.assertIn("Content-Range", (self.folder / "said").read_text())
        self.check_end()

    def test_ranges_head_and_delete(self) -> None:
        """``-r``, ``-I`` and ``-X DELETE``."""
        for url in (self.plain, self.tls):
            self.assertEqual(self.status("-T", self.small, f"{url}/file"), 201)
            self.assertEqual(self.status("-r", "100-199", f"{url}/file"), 206)
            self.assertEqual((self.folder / "said").read_bytes(), self.small.read_bytes()[100:200])
            self.assertEqual(self.status("-r", "-5", f"{url}/file"), 206)
            self.assertEqual((self.folder / "said").read_bytes(), self.small.read_bytes()[-5:])
            self.assertEqual(self.status("-r", f"{SIZE}-", f"{url}/file"), 416)
            said = self.curl("-I", f"{url}/file").stdout
            self.assertRegex(said, rf"(?i)\AHTTP/1\.1 200 OK\n(?s:.*)\ncontent-length: {SIZE}\n")
            self.assertEqual(self.status("-X", "DELETE", f"{url}/file"), 204)
            self.assertEqual(self.status(f"{url}/file"), 404)

    def test_form(self) -> None:
        """``-F``: the files of a form are stored under their names, its other fields are not."""
        other = write_sample(self.folder / "other", 100_000)
        for scheme, url in (("http", self.plain), ("https", self.tls)):
            fields = ["comment=for you", f"file=@{self.small}", f"file=@{other};filename=gr\u00fcn.bin"]
            asking = [*[f"-F{field}" for field in fields], "-H", "Accept: application/json"]
            done = self.curl(*asking, "-w", "\n%{http_code}", f"{url}/{scheme}/")
            answer, _, status = done.stdout.rpartition("\n")
            self.assertEqual(status, "201", answer)
            stored = {file["name"]: file["size"] for file in json.loads(answer)}
            self.assertEqual(stored, {"small": SIZE, "gr\u00fcn.bin": 100_000})
            self.assertEqual(sorted(visible_beneath(self.root / scheme)), ["gr\u00fcn.bin", "small"])
            self.assertEqual(digest(self.root / scheme / "small"), digest(self.small))
            self.assertEqual(digest(self.root / scheme / "gr\u00fcn.bin"), digest(other))

    def test_refused_form(self) -> None:
        """One file that is too large, and nothing of the form is stored."""
        for url in (self.plain, self.tls):
            self.assertEqual(self.status("-F", f"a=@{self.small}", "-F", f"b=@{self.large}", f"{url}/"), 413)
            self.assertEqual(visible_beneath(self.root), [])
        self.check_end()


@skipUnless(shutil.which("wget"), "wget is not installed")
class WgetTests(ClientMixin, SynchronousTestCase):
    """wget, which can send a file by PUT."""

    def wget(self, *options: str | Path) -> tuple[int, int]:
        """Its exit status and the last status of HTTP."""
        command = ["wget", "-d", "-nv", "--tries=1", f"--timeout={PATIENCE}", f"--ca-certificate={self.certificate}"]
        done = subprocess.run(
            [str(word) for word in [*command, *options]],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
        )
        found = re.findall(r"(?m)^HTTP/1\.1 (\d+) ", done.stderr)
        self.assertTrue(found, done.stderr)
        return done.returncode, int(found[-1])

    def test_wget(self) -> None:
        """A refusal is exit status 8, an answer with an error, and not a broken pipe."""

        def upload(url: str, source: Path, is_chunked: bool) -> int:
            code, status = self.wget("--method=PUT", f"--body-file={source}", "-O", "said", url)
            self.assertEqual(code, 0 if status < 400 else 8)
            return status

        self.check(upload, lambda url, target: self.wget("-O", target, url)[1], in_chunks=(False,))


@skipUnless(shutil.which("chromium"), "chromium is not installed")
@skipUnless(shutil.which("chromedriver"), "chromedriver (chromium-driver) is not installed")
class BrowserTests(ClientMixin, SynchronousTestCase):
    """Chromium, driven as a person would do it: choose files, press the button, look at the page, save the link."""

    def browse(self) -> Any:
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        options.set_capability("acceptInsecureCerts", True)
        profile = self.folder / "profile"
        for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-proxy-server"):
            options.add_argument(word)
        options.add_argument(f"--user-data-dir={profile}")
        options.add_experimental_option("prefs", {"download.default_directory": str(self.folder / "saved")})
        browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        self.addCleanup(browser.quit)
        browser.set_page_load_timeout(PATIENCE)
        return browser

    def submit(self, browser: Any, *files: Path) -> None:
        old = browser.find_element(By.TAG_NAME, "html")
        browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys("\n".join(map(str, files)))
        browser.find_element(By.TAG_NAME, "button").click()
        WebDriverWait(browser, PATIENCE).until(staleness_of(old))

    def check_form(self, url: str) -> None:
        other = write_sample(self.folder / "gr\u00fcn & \"fein\".bin", 100_000)
        browser = self.browse()
        browser.get(f"{url}/")
        self.submit(browser, self.small, other)
        links = browser.find_elements(By.CSS_SELECTOR, "li a")
        self.assertEqual([link.text for link in links], ["small", other.name])
        for sent in (self.small, other):
            self.assertEqual(digest(self.root / sent.name), digest(sent))
        # The page works under its own policy, which the browser would tell in its console.
        self.assertEqual(browser.get_log("browser"), [])
        links[1].click()
        saved = self.folder / "saved"
        wait_until(lambda: [path.suffix for path in saved.glob("*")] == [".bin"], "the link was saved as a file")
        self.assertEqual(digest(next(saved.iterdir())), digest(other))
        browser.get(f"{url}/")
        rows = browser.find_elements(By.CSS_SELECTOR, "td a")
        self.assertEqual(sorted(row.text for row in rows), sorted(["small", other.name]))
        self.submit(browser, self.large)
        self.assertIn("larger than this server accepts", browser.find_element(By.TAG_NAME, "body").text)
        self.check_end()

    @pytest.mark.slow
    def test_form(self) -> None:
        """The form of a folder stores what was chosen; too large a file is refused with a sentence on the page."""
        self.check_form(self.plain)

    @pytest.mark.slow
    def test_form_by_tls(self) -> None:
        """The same over TLS."""
        self.check_form(self.tls)


class EndlessTests(ClientMixin, SynchronousTestCase):
    """A body without end: a client that looks for the answer while it sends finds it, and the server moves on."""

    LIMITS = ("linger-time=0.1",)

    def endless(self) -> Iterator[bytes]:
        piece, end = bytes(PIECE), time.monotonic() + PATIENCE
        while time.monotonic() < end:
            yield piece
        raise AssertionError(f"nobody minded in {PATIENCE} seconds")

    async def endless_later(self) -> AsyncIterator[bytes]:
        for piece in self.endless():
            await asyncio.sleep(0)
            yield piece

    def test_httpx(self) -> None:
        """httpx looks when it can't send any more."""
        with httpx.Client(verify=self.context, timeout=PATIENCE) as client:
            for url in (self.plain, self.tls):
                self.assertEqual(client.put(f"{url}/large", content=self.endless()).status_code, 413)
        self.check_end()

    def test_aiohttp(self) -> None:
        """aiohttp looks all the time."""

        for url in (self.plain, self.tls):
            asking = AiohttpClient(self.context).ask("PUT", f"{url}/large", data=self.endless_later())
            self.assertEqual(asyncio.run(asking)[0], 413)
        self.check_end()

    def test_requests(self) -> None:
        """So does requests, but not over TLS, where it takes the broken connection for the answer."""
        with requests.Session() as session:
            session.trust_env = False
            status = session.put(f"{self.plain}/large", data=self.endless(), timeout=PATIENCE).status_code
        self.assertEqual(status, 413)
        self.check_end()

    @skipUnless(shutil.which("curl"), "curl is not installed")
    def test_curl(self) -> None:
        """curl looks all the time, and calls it a success of its own."""
        command = ["curl", "-sS", "--cacert", str(self.certificate), "-T", "-", "-o", "/dev/null", "-w", "%{http_code}"]
        for url in (self.plain, self.tls):
            with open("/dev/zero", "rb") as zeros:
                whole = [*command, f"{url}/large"]
                done = subprocess.run(whole, stdin=zeros, capture_output=True, text=True, timeout=PATIENCE)
            self.assertEqual((done.stdout, done.returncode), ("413", 0), done.stderr)
        self.check_end()
