"""Files that users uploaded and that would be programs in a browser: none of them runs as a page of this site.

Each file, if it ran, would tell so by a request of its own to the server that it came from. That the same files do run
where a stock ``File`` serves them is looked at first, else all of this would show nothing.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import skipUnless

import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.support.ui import WebDriverWait
from twisted.trial.unittest import SynchronousTestCase

from tests.servers import PATIENCE, Server, script, serving

RUN = "fetch('/ran/{name}'); document.title = 'ran';"
PDF = (
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R/OpenAction<</S/JavaScript/JS(app.launchURL('/ran/file.pdf'))>>>>"
    b"endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>"
    b"endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"
)
FILES = {
    "page.html": f"<!doctype html><script>{RUN.format(name='page.html')}</script>".encode(),
    "page.xhtml": (
        f'<html xmlns="http://www.w3.org/1999/xhtml"><script>{RUN.format(name="page.xhtml")}</script></html>'
    ).encode(),
    "image.svg": (
        f'<svg xmlns="http://www.w3.org/2000/svg"><script>{RUN.format(name="image.svg")}</script></svg>'
    ).encode(),
    "no-type": f"<!doctype html><script>{RUN.format(name='no-type')}</script>".encode(),
    "program.js": RUN.format(name="program.js").encode(),
    "file.pdf": PDF,
}
"""What they are, and what each does if it runs."""

RUNS = {"page.html", "page.xhtml", "image.svg"}
"""Those of them that run when a stock server sends them, and they are opened."""

STOCK = """
import sys
from twisted.internet import reactor
from twisted.python import log
from twisted.web.server import Site
from twisted.web.static import File
log.startLogging(sys.stdout, setStdout=False)
reactor.listenTCP(0, Site(File(sys.argv[1])), interface="127.0.0.1")
reactor.run()
"""


@pytest.mark.slow
@skipUnless(shutil.which("chromium"), "chromium is not installed")
@skipUnless(shutil.which("chromedriver"), "chromedriver (chromium-driver) is not installed")
class HostileFileTests(SynchronousTestCase):
    """Chromium opens them, and puts them into pages."""

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.root = self.folder / "root"
        self.root.mkdir()
        for name, content in FILES.items():
            (self.root / name).write_bytes(content)

    def browse(self) -> Any:
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-proxy-server"):
            options.add_argument(word)
        options.add_argument(f"--user-data-dir={self.folder / 'profile'}")
        options.add_experimental_option("prefs", {"download.default_directory": str(self.folder / "saved")})
        browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        self.addCleanup(browser.quit)
        browser.set_page_load_timeout(PATIENCE)
        return browser

    def opened(self, server: Server, browser: Any, url: str) -> set[str]:
        """Open each file; gives the names of those that ran, by what the server logged.

        A marker behind each of them is asked for by the browser's address bar: when that is in the log, anything that
        ran before has had its turn.
        """
        for name in FILES:
            try:
                browser.get(f"{url}/{name}")
                WebDriverWait(browser, 1).until(lambda seen: seen.title == "ran")
            except WebDriverException:
                pass  # a download loads no page, and what doesn't run sets no title
        return self.ran(server, browser, url)

    def ran(self, server: Server, browser: Any, url: str) -> set[str]:
        marker = f"marker{time.monotonic_ns()}"
        browser.get(f"{url.removesuffix('/files')}/{marker}")
        server.wait_for(marker)
        return {name for name in FILES if f"/ran/{name}" in server.text}

    def test_none_runs(self) -> None:
        """Neither when it is opened, nor in a frame of a page of ours, nor as an object there."""
        command = [script("lwstwisted"), "serve", "--anonymous", "--root", self.root, "--listen", "tcp:0"]
        browser = self.browse()
        with serving(command, cwd=self.folder) as server:
            (port,) = server.wait_for_ports()
            url = f"http://127.0.0.1:{port}/files"
            self.assertEqual(self.opened(server, browser, url), set())
            browser.get(f"{url}/")
            for tag, attribute in (("iframe", "src"), ("object", "data"), ("embed", "src"), ("script", "src")):
                for name in FILES:
                    browser.execute_script(
                        "const it = document.createElement(arguments[0]); it[arguments[1]] = arguments[2];"
                        " document.body.append(it);",
                        *(tag, attribute, f"{url}/{name}"),
                    )
            self.assertEqual(self.ran(server, browser, url), set())
            self.assertNotIn("/ran/", server.text)

    def test_they_would(self) -> None:
        """Where nothing is done against it, they run: the test above can fail."""
        browser = self.browse()
        with serving([sys.executable, "-c", STOCK, self.root], cwd=self.folder) as server:
            (port,) = server.wait_for_ports()
            self.assertLessEqual(RUNS, self.opened(server, browser, f"http://127.0.0.1:{port}"))
