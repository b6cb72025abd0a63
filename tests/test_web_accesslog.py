"""What is written down of requests, and of the service: that each line is what it seems to be."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import socket
import sys
import tempfile
from base64 import b64encode
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

from twisted.logger import Logger, LogPublisher
from twisted.python.usage import UsageError
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.logs import LineObserver, json_line, printable, text_line
from lwstwisted.options import Options
from lwstwisted.web.accesslog import AccessLog
from lwstwisted.web.site import StreamingSite
from tests.servers import PATIENCE, Server, serving, twistd, wait_until
from tests.test_web_channel import Sink, Streaming, ok

TOP = Path(__file__).resolve().parent.parent
HERE = {"PYTHONPATH": str(TOP)}
COMMAND = [sys.executable, "-m", "lwstwisted", "serve"]

CONTROLS = [chr(number) for number in (*range(0x20), 0x7F, *range(0x80, 0xA0))]
"""C0, DEL and C1."""
TURNS = [chr(number) for number in (0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF, 0xE0001)]
"""Further line ends, what turns the direction of writing, and what can't be seen."""
EVIL = [character.encode() for character in (*CONTROLS, *TURNS)]
EVIL += [b"\x9b", b"\xff", b"\xed\xa0\x80", b"\\", b'"', b"{}"]

FORGED = b'2026-01-01T00:00:00.000+00:00 [forged#info] 127.0.0.1 - - "PUT /forged HTTP/1.1" 201'
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 \[[\w.]+#\w+\] ")
COMBINED = re.compile(
    r'"127\.0\.0\.1" - - \[[^]]+\] "[A-Z]+ (?:[^"\\]|\\.)* HTTP/1\.1" \d{3} (?:\d+|-)'
    r' "(?:[^"\\]|\\.)*" "(?:[^"\\]|\\.)*" "([0-9A-Za-z._~+/=-]+)" "(-|[0-9a-f]{32})"'
)


def talk(port: int, data: bytes) -> bytes:
    """Send some bytes, and gather what comes back until the end."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: client.recv(65536), b""))
        except ConnectionError:
            return b""


def request(method: bytes, target: bytes, body: bytes = b"", *lines: bytes) -> bytes:
    fields = (b"Host: 127.0.0.1", b"Connection: close", b"Content-Length: %d" % len(body), *lines)
    return b"%b %b HTTP/1.1\r\n%b\r\n\r\n%b" % (method, target, b"\r\n".join(fields), body)


def attacks(evil: bytes) -> list[bytes]:
    """Requests with something evil in each place that a client can fill."""
    text = b"a" + evil + FORGED
    quoted = b"".join(b"%%%02X" % byte for byte in text)
    form = (
        b'--x\r\nContent-Disposition: form-data; name="' + text + b'"; filename="' + text + b'"\r\n'
        b"Content-Type: " + text + b"\r\n\r\nbody\r\n--x--\r\n"
    )
    return [
        request(b"GET", b"/files/" + text.replace(b" ", b"")),
        request(b"GET", b"/files/x?" + text.replace(b" ", b"")),
        request(b"PUT", b"/files/" + quoted[:200], b"body"),
        request(b"DELETE", b"/" + quoted[:200]),
        request(b"GE" + evil + b"T", b"/"),
        request(b"GET", b"/", b"", b"User-Agent: " + text, b"Referer: " + text),
        request(b"GET", b"/", b"", b"X-Request-ID: " + text, b"X-Forwarded-For: " + text, b"Forwarded: for=" + text),
        request(b"GET", b"/", b"", b"Authorization: Basic " + b64encode(text + b":" + text)),
        request(b"GET", b"/", b"", b"X" + evil + b"Y: z"),
        request(b"GET", b"/", b"", b"Cookie: " + text, b"Range: " + text, b"If-Match: " + text, b"Origin: " + text),
        request(b"POST", b"/files/", form, b"Content-Type: multipart/form-data; boundary=x"),
        request(b"POST", b"/files/", form, b"Content-Type: multipart/form-data; boundary=" + text),
        request(
            b"POST", b"/uploads/", b"", b"Tus-Resumable: 1.0.0", b"Upload-Length: 1",
            b"Upload-Metadata: filename " + b64encode(text) + b",b" + evil + b" " + b64encode(text),
        ),
        request(b"POST", b"/uploads/", b"b", b"Upload-Complete: ?1", b'Content-Disposition: a; filename="%b"' % text),
        request(b"PATCH", b"/uploads/" + quoted[:90], b"b", b"Upload-Complete: ?1", b"Upload-Offset: 0" + evil),
    ]


class ForgingTests(SynchronousTestCase):
    """Whatever a client sends, a line of a log is one event, and shows it."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.stack = ExitStack()
        self.addCleanup(self.stack.close)

    def attack(self, *words: str) -> Server:
        """A service that has been through all of them, and has ended."""
        options = ["--root", str(self.folder / "root"), "--listen", "tcp:0", "--durability", "none", *words]
        # The proxy that is believed is the attacker as well: nobody guards what passes through it.
        options += ["--trusted-proxy", "127.0.0.1"]
        server = self.stack.enter_context(serving([*COMMAND, *options], cwd=self.folder, environment=HERE))
        (port,) = server.wait_for_ports()
        jobs = [data for evil in EVIL for data in attacks(evil)]
        self.answered = 0

        def run() -> None:
            while jobs:
                if talk(port, jobs.pop()):
                    self.answered += 1

        threads = [Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(server.end(), 0)
        return server

    def assert_text(self, lines: list[str]) -> None:
        for line in lines:
            self.assertTrue(line.removeprefix("\t").isprintable(), ascii(line))
            self.assertTrue(line.startswith("\t") or LINE.match(line), line)
            self.assertFalse(line.startswith("2026-01-01"), line)

    def assert_access(self, entries: list[str]) -> None:
        """There is a line for each request that was one, and the ids of our own are all different."""
        self.assertGreater(len(entries), len(EVIL) * 8)
        self.assertLessEqual(len(entries), self.answered)

    def test_text(self) -> None:
        """As text, with the requests in the log of the service."""
        lines = self.attack().log
        self.assert_text(lines)
        entries = [line for line in lines if "[lwstwisted.web.accesslog#info]" in line]
        for line in entries:
            self.assertRegex(line, rf"{LINE.pattern}{COMBINED.pattern}$")
        self.assert_access(entries)

    def test_text_and_a_file(self) -> None:
        """As text, with the requests in a file of their own."""
        path = self.folder / "access.log"
        lines = self.attack("--access-log", str(path)).log
        self.assert_text(lines)
        self.assertFalse([line for line in lines if "accesslog" in line])
        data = path.read_bytes()
        self.assertTrue(data.isascii() and data.endswith(b"\n"))
        entries = data.decode()[:-1].split("\n")
        for line in entries:
            self.assertTrue(line.isprintable(), line)
            self.assertIsNotNone(COMBINED.fullmatch(line), line)
        self.assert_access(entries)

    def assert_objects(self, lines: list[str]) -> list[dict[str, Any]]:
        found = []
        for line in lines:
            self.assertTrue(line.isascii() and line.isprintable(), ascii(line))
            one = json.loads(line, object_pairs_hook=list)
            self.assertEqual(len({name for name, _ in one}), len(one), line)
            found.append(dict(one))
            self.assertRegex(found[-1]["time"], r"^20\d\d-\d\d-\d\dT[\d:.]+\+00:00$")
            self.assertFalse(found[-1]["time"].startswith("2026-01-01"), line)
        return found

    def test_json(self) -> None:
        """As JSON, all of it on standard output: one object a line, and none has a name twice."""
        found = self.assert_objects(self.attack("--log-format", "json", "--access-log-format", "json").log)
        for one in found:
            self.assertEqual(list(one)[:4], ["time", "level", "logger", "message"])
            self.assertNotIn("forged", one["logger"])
        requests = [one for one in found if one["message"] == "request"]
        self.assertTrue(all(one["client"] and one["id"] and one["status"] for one in requests))
        self.assert_access([one["id"] for one in requests])

    def test_json_and_a_file(self) -> None:
        path = self.folder / "access.log"
        log = self.attack("--log-format", "json", "--access-log-format", "json", "--access-log", str(path)).log
        self.assertFalse([one for one in self.assert_objects(log) if one["message"] == "request"])
        self.assert_access([one["id"] for one in self.assert_objects(path.read_text().splitlines())])


class LineTests(SynchronousTestCase):
    """The lines of the service's own log."""

    def lines(self, line: Any, say: Any) -> list[str]:
        file = io.StringIO(newline="\n")
        say(Logger(observer=LogPublisher(LineObserver(file, line)), namespace="test"))
        self.assertTrue(file.getvalue().endswith("\n"))
        return file.getvalue()[:-1].split("\n")

    def test_fields(self) -> None:
        """A field of an event, whatever it contains, is one part of one line."""
        for character in (*CONTROLS, *TURNS, "\ud800"):
            name = f"a{character}2026-01-01T00:00:00.000+00:00 [x#info] forged"

            def say(log: Logger, name: str = name) -> None:
                log.error("{name} is gone", name=name, log=3, time="x", path=Path(name))

            (line,) = self.lines(text_line, say)
            self.assertTrue(line.isprintable() and " [test#error] a" in line, ascii(line))
            (line,) = self.lines(json_line, say)
            self.assertTrue(line.isascii() and line.isprintable())
            one = json.loads(line)
            self.assertEqual((one["name"], one["message"]), (name, f"{name} is gone"))
            self.assertEqual((one["level"], one["logger"], one["path"]), ("error", "test", name))
            self.assertNotEqual(one["time"], "x")

    def test_failures(self) -> None:
        """A traceback is below its event, and what the exception says can't leave it."""

        def say(log: Logger) -> None:
            try:
                raise ValueError("a\n2026-01-01T00:00:00.000+00:00 [x#info] forged\r\x1b[2J\u2028")
            except ValueError:
                log.failure("it failed")

        first, *below = self.lines(text_line, say)
        self.assertTrue(first.endswith("[test#critical] it failed"), first)
        self.assertTrue(all(line.startswith("\t") and line[1:].isprintable() for line in below), below)
        self.assertTrue(any("forged" in line for line in below))
        (line,) = self.lines(json_line, say)
        self.assertIn("forged", json.loads(line)["traceback"])

    def test_format_is_no_field(self) -> None:
        """What comes from others is never a format."""
        (line,) = self.lines(text_line, lambda log: log.info("{name}", name="{log_source} {0} %s"))
        self.assertTrue(line.endswith("{log_source} {0} %s"), line)

    def test_fields_that_fail(self) -> None:
        """An event that can't be written down is told of, and nothing is lost behind it."""

        class Bad:
            def __str__(self) -> str:
                raise ValueError("no")

            __repr__ = __str__

        def say(log: Logger) -> None:
            log.info("{bad}", bad=Bad())
            log.info("good")

        for line in (text_line, json_line):
            found = self.lines(line, say)
            self.assertEqual((len(found), "good" in found[1]), (2, True), found)

    def test_terminals(self) -> None:
        """Where a terminal has few characters, the others are escaped."""
        raw = io.BytesIO()
        file = io.TextIOWrapper(raw, "ascii", newline="\n")
        LineObserver(file, text_line)({"log_time": 0.0, "log_format": "{name}", "name": "\xe9\u4e2d"})
        self.assertIn(b"\\xe9\\u4e2d\n", raw.getvalue())

    def test_printable(self) -> None:
        """What can be read stays."""
        for text in ("", "plain", "Grüße, 世界 ✓", "a\\b"):
            self.assertEqual(printable(text), text)


class IdTests(SynchronousTestCase):
    """Each request has an id, and those of one upload have its id."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.path = self.folder / "access.log"
        self.stack = ExitStack()
        self.addCleanup(self.stack.close)

    def start(self, *words: str) -> int:
        options = ["--root", str(self.folder / "root"), "--listen", "tcp:0", "--durability", "none"]
        options += ["--access-log", str(self.path), "--access-log-format", "json", *words]
        server = self.stack.enter_context(serving([*COMMAND, *options], cwd=self.folder, environment=HERE))
        return server.wait_for_ports()[0]

    def ask(self, port: int, method: str, path: str, body: bytes = b"", **fields: str) -> http.client.HTTPResponse:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        client.request(method, path, body, {name.replace("_", "-"): value for name, value in fields.items()})
        answer = client.getresponse()
        answer.read()
        client.close()
        return answer

    def entries(self, count: int) -> list[dict[str, Any]]:
        wait_until(lambda: self.path.read_text().count("\n") >= count, "the lines are there")
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def test_answers(self) -> None:
        """Who complains about an answer can say its id, also of a refusal."""
        port = self.start()
        said = [self.ask(port, *what).getheader("X-Request-ID") for what in
                (("PUT", "/files/x", b"body"), ("GET", "/files/x"), ("GET", "/files/none"), ("PUT", "/files/"))]
        entries = self.entries(4)
        self.assertEqual(sorted(filter(None, said)), sorted(entry["id"] for entry in entries))
        self.assertEqual(len(set(said)), 4)
        self.assertEqual({entry["refusal"] for entry in entries}, {None, "not_found", "method_not_allowed"})

    def test_proxies(self) -> None:
        """The id that a proxy gave is taken over, if the proxy is believed and the id is one."""
        for words, is_believed in (((), False), (("--trusted-proxy", "127.0.0.0/8"), True)):
            port = self.start(*words)
            for id in ("f47ac10b-58cc-4372-a567-0e02b2c3d479", "1-67891233-abcdef012345678912345678", "a" * 128):
                answer = self.ask(port, "GET", "/healthz", X_Request_ID=id)
                self.assertEqual(answer.getheader("X-Request-ID") == id, is_believed)
            for id in ("", "a b", "a" * 129, 'a"', "\xe9", "a,b", "a\tb"):
                self.assertRegex(self.ask(port, "GET", "/healthz", X_Request_ID=id).getheader("X-Request-ID") or "",
                                 r"^[0-9a-f]{16}$")

    def test_uploads(self) -> None:
        """All requests of an upload are found by its id, whichever protocol they speak, and no others."""
        port = self.start()
        tus = {"Tus_Resumable": "1.0.0", "Content_Type": "application/offset+octet-stream"}
        begun = self.ask(port, "POST", "/uploads/", b"ab", Upload_Length="6", **tus)
        url = begun.getheader("Location") or ""
        self.ask(port, "PATCH", url, b"cd", Upload_Offset="2", **tus)
        self.ask(port, "HEAD", url, Upload_Complete="?0")
        self.ask(port, "PATCH", url, b"cd", Upload_Offset="3", **tus)
        self.ask(port, "PATCH", url, b"ef", Upload_Offset="4", **tus)
        whole = self.ask(port, "POST", "/uploads/", b"ab", Upload_Complete="?1")
        self.ask(port, "PUT", "/files/other", b"ab")
        self.ask(port, "GET", f"/files{url}")
        entries = self.entries(8)
        id = url.rpartition("/")[2]
        self.assertRegex(id, "^[0-9a-f]{32}$")
        methods = sorted(entry["method"] for entry in entries if entry["upload"] == id)
        self.assertEqual(methods, ["HEAD", "PATCH", "PATCH", "PATCH", "POST"])
        other = {entry["upload"] for entry in entries} - {id, None}
        self.assertEqual(len(other), 1)
        self.assertEqual(whole.getheader("Location"), f"/files/{other.pop()}")


class FileTests(SynchronousTestCase):
    """The file of an access log."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name) / "log"

    def test_reopen(self) -> None:
        """After a rotation lines go to the new file; none is lost."""

        async def receive(request: Any, body: Any) -> None:
            await body.deliver_to(Sink())
            ok(request)

        site = StreamingSite(Streaming(receive), logPath=str(self.path))  # type: ignore[no-untyped-call]
        site.startFactory()
        log: Any = site._logFile
        log.write("one\n")
        moved = self.path.rename(self.path.with_suffix(".1"))
        log.write("two\n")
        site.reopen_log()
        log.write("three\n")
        site.stopFactory()
        self.assertEqual((moved.read_text(), self.path.read_text()), ("one\ntwo\n", "three\n"))

    def test_reopen_fails(self) -> None:
        """Lines go where they went, if there can't be a new file."""
        log = AccessLog(str(self.path))
        self.addCleanup(log.close)
        os.rename(self.path, self.path.with_suffix(".1"))
        self.path.mkdir()
        self.assertRaises(OSError, log.reopen)
        log.write("one\n")
        self.assertEqual(self.path.with_suffix(".1").read_text(), "one\n")

    def test_no_log(self) -> None:
        """Without a file there is nothing to open again."""
        site = StreamingSite(Streaming(ok))  # type: ignore[no-untyped-call]
        site.startFactory()
        site.reopen_log()
        site.stopFactory()

    def test_several_processes(self) -> None:
        """Lines of two that append to one file are whole, and none overwrites another."""
        logs = [AccessLog(str(self.path)) for _ in range(2)]
        for number in range(100):
            logs[number % 2].write(f"{number} {'x' * 5000}\n")
        for log in logs:
            log.close()
        lines = self.path.read_text().splitlines()
        self.assertEqual([line.partition(" ")[0] for line in lines], [str(number) for number in range(100)])

    def test_mode(self) -> None:
        """Others don't read who uploaded what."""
        AccessLog(str(self.path)).close()
        self.assertEqual(self.path.stat().st_mode & 0o007, 0)

    def test_full(self) -> None:
        """A line that the disk cut is noticed, and told by the site's tally."""
        log = AccessLog("/dev/full")
        self.addCleanup(log.close)
        self.assertRaises(OSError, log.write, "one\n")


class DaemonTests(SynchronousTestCase):
    """The same logs under twistd."""

    def test_formats(self) -> None:
        """--log-format is heard; without it the lines are those of our own command."""
        for words, pattern in (((), LINE.pattern), (("--log-format", "json"), r"\{")):
            with tempfile.TemporaryDirectory(prefix="lwstwisted-") as folder:
                command = twistd("--root", folder, "--listen", "tcp:0", *words)
                with serving(command, cwd=Path(folder), environment=HERE) as server:
                    server.wait_for_ports()
                    server.end()
            for line in server.log:
                self.assertRegex(line, "^" + pattern)

    def test_contradictions(self) -> None:
        """What twistd was told to log to is not overridden, and what can't be done is said."""

        def told(**daemon: Any) -> dict[str, Any]:
            options = Options()
            options.parent = {"logger": None, "nodaemon": 1, "logfile": None, "syslog": 0} | daemon
            options.parseOptions(["--log-format", said])
            return dict(options.parent)

        said = "json"
        self.assertEqual(told()["logger"], "lwstwisted.logs.json_observer")
        for daemon in ({"logger": "my.own"}, {"logfile": "x"}, {"syslog": 1}, {"nodaemon": 0}):
            self.assertIn("twistd", str(self.assertRaises(UsageError, told, **daemon)))
        said = "text"
        self.assertEqual(told()["logger"], "lwstwisted.logs.text_observer")
        self.assertEqual(told(logger="my.own")["logger"], "my.own")
        self.assertEqual(told(logfile="x")["logger"], None)
