"""Hooks of a whole service: what an application hears of uploads, and what it can do about them, also after crashes."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import signal
import socket
import sys
import tempfile
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from twisted.python.usage import UsageError
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.hooks.names import Hook
from lwstwisted.options import Options
from tests.servers import Server, serving, twistd, visible_beneath, wait_until
from tests.test_hooks_senders import CUT, HANG, HookServer

TOP = Path(__file__).parent.parent
LISTEN = "--listen=tcp:0:interface=127.0.0.1"
ALL = "--hooks-enabled-events=" + ",".join(hook.value for hook in Hook)

# A service that ends by SIGKILL at one point: before or after a call of one method.
DYING = """
import os, signal, sys
from importlib import import_module
where, module, owner, method = sys.argv.pop(1).split(":")
kind = getattr(import_module(module), owner)
inner = getattr(kind, method)
def call(*args, **named):
    if where == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = inner(*args, **named)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(kind, method, call)
from twisted.scripts.twistd import run
run()
"""

# One that tries again soon. How long the pauses are in earnest is a matter of virtual time (test_hooks_outbox.py).
HASTY = """
from lwstwisted.hooks import delivery
delivery.SHORTEST, delivery.LONGEST, delivery.LOOK_TIME, delivery.GRACE = 0.05, 0.4, 0.1, 0.5
from twisted.scripts.twistd import run
run()
"""

NOTED = "lwstwisted.hooks.outbox:Outbox:put"
NAMED = "lwstwisted.stores.placing:OpenPartial:publish"
CONFIRMED = "lwstwisted.hooks.outbox:Outbox:settle"
TAKEN = "lwstwisted.hooks.outbox:Outbox:taken"
BATCH = "lwstwisted.stores.batch:BatchFolder:commit"


class ServiceCase(SynchronousTestCase):
    """A server for hooks, and a folder for uploads."""

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, self.folder)
        self.root = self.folder / "root"
        self.hooks = HookServer().start()
        self.addCleanup(self.hooks.stop)

    @contextmanager
    def service(self, *options: str, dies: str = "", is_hasty: bool = False) -> Iterator[Server]:
        """A service, whose port is ``self.port``."""
        has_folder = any(option.startswith("--hooks-dir") for option in options)
        hooks = () if has_folder else (f"--hooks-http={self.hooks.url}",)
        command = twistd("--root", self.root, LISTEN, "--hooks-http-backoff=50ms", *hooks, *options)
        if dies:
            command = [sys.executable, "-c", DYING, dies, *command[1:]]
        elif is_hasty:
            command = [sys.executable, "-c", HASTY, *command[1:]]
        with serving(command, cwd=TOP) as server:
            (self.port,) = server.wait_for_ports()
            yield server
            if not dies:
                self.assertEqual(server.end(), -signal.SIGTERM, server.text)
                self.assertNotIn("Traceback", server.text)

    def ask(
        self, method: str, path: str, body: bytes = b"", fields: Mapping[str, str] | None = None
    ) -> http.client.HTTPResponse:
        """A request on a connection of its own; the response, read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, dict(fields or {}))
            response = connection.getresponse()
            response.content = response.read()  # type: ignore[attr-defined]
            return response
        finally:
            connection.close()

    def tus(self, method: str, path: str, body: bytes = b"", **fields: str) -> http.client.HTTPResponse:
        """A request of tus."""
        said = {name.replace("_", "-"): value for name, value in fields.items()}
        if body:
            said["Content-Type"] = "application/offset+octet-stream"
        return self.ask(method, path, body, {"Tus-Resumable": "1.0.0", **said})

    def begun(self, length: int, **metadata: str) -> str:
        """Begin an upload of tus; its path."""
        text = ",".join(f"{key} {b64encode(value.encode()).decode()}" for key, value in metadata.items())
        response = self.tus("POST", "/uploads/", Upload_Length=str(length), Upload_Metadata=text)
        self.assertEqual(response.status, 201)
        return response.headers["Location"]

    def wait_for(self, *types: str) -> None:
        """Wait until all of these events were told."""
        wait_until(lambda: set(types) <= set(self.hooks.types()), f"{types} are told", 10)

    def events(self, hook: str) -> list[dict[str, Any]]:
        """The events of a name that were told."""
        return [told["Event"] for told in list(self.hooks.told) if told["Type"] == hook]


@pytest.mark.slow
class EventTests(ServiceCase):
    """What is told of uploads, and what can be said to it."""

    def test_put(self) -> None:
        """A plain PUT is an upload with one id and all events: the application hears of its file when it is there."""
        with self.service(ALL):
            fields = {"Content-Type": "text/plain", "Authorization": "Bearer secret"}
            self.assertEqual(self.ask("PUT", "/files/deep/a%20b.txt?x=1", b"hello", fields).status, 201)
            self.wait_for("post-finish")
        self.assertEqual(self.hooks.types(), ["pre-create", "post-receive", "pre-finish", "post-create", "post-finish"])
        metadata = {"filename": "a b.txt", "path": "deep/a b.txt", "filetype": "text/plain"}
        (asked,), (told,) = self.events("pre-create"), self.events("post-finish")
        self.assertEqual(asked["HTTPRequest"]["Header"]["Authorization"], ["Bearer secret"])
        self.assertNotIn("Authorization", told["HTTPRequest"]["Header"])
        request = told["HTTPRequest"]
        self.assertEqual((request["Method"], request["URI"]), ("PUT", "/files/deep/a%20b.txt?x=1"))
        host, _, port = request["RemoteAddr"].rpartition(":")
        self.assertEqual((host, port.isdigit()), ("127.0.0.1", True))
        ids = {one["Event"]["Upload"]["ID"] for one in self.hooks.told[1:]}
        self.assertEqual(len(ids), 1)
        self.assertEqual(
            told["Upload"],
            {
                "ID": ids.pop(), "Size": 5, "SizeIsDeferred": False, "Offset": 5, "MetaData": metadata,
                "IsPartial": False, "IsFinal": False, "PartialUploads": None,
                "Storage": {"Type": "filestore", "Path": str(self.root / "deep" / "a b.txt")},
            },
        )  # fmt: skip
        self.assertEqual(asked["Upload"]["ID"], "")
        self.assertEqual(Path(told["Upload"]["Storage"]["Path"]).read_bytes(), b"hello")

    def test_tus(self) -> None:
        """An upload in two requests, and one that is cancelled: the events of tusd, with the metadata of the client."""
        with self.service(ALL):
            path = self.begun(10, filename="t.bin", project="7")
            self.assertEqual(self.tus("PATCH", path, b"01234", Upload_Offset="0").status, 204)
            self.assertEqual(self.tus("PATCH", path, b"56789", Upload_Offset="5").status, 204)
            other = self.begun(10)
            self.assertEqual(self.tus("DELETE", other).status, 204)
            self.assertEqual(self.tus("DELETE", path).status, 204)  # its file stays, and so does what was told of it
            self.wait_for("post-finish", "post-terminate")
        mine, others = path.rpartition("/")[2], other.rpartition("/")[2]
        uploads = [(one["Type"], one["Event"]["Upload"]) for one in self.hooks.told]
        told = [(hook, upload["ID"], upload["Offset"]) for hook, upload in uploads]
        self.assertEqual(
            [one[::2] for one in told if one[1] == mine and one[0] != "post-receive"],
            [("post-create", 0), ("pre-finish", 10), ("post-finish", 10)],
        )
        self.assertEqual(
            [one[0] for one in told if one[1] == others], ["post-create", "pre-terminate", "post-terminate"]
        )
        self.assertEqual([one[2] for one in told if one[0] == "post-receive"], [5, 10])
        (finished,) = self.events("post-finish")
        self.assertEqual(finished["Upload"]["MetaData"], {"filename": "t.bin", "project": "7"})
        self.assertEqual(finished["Upload"]["Storage"]["Path"], str(self.root / "t.bin"))

    def test_ietf(self) -> None:
        """An upload of the IETF's protocol is told of likewise, while its size isn't known as well."""
        with self.service():
            begun = self.ask("PUT", "/files/i.bin", b"abc", {"Upload-Complete": "?0"})
            self.assertEqual(begun.status, 201)
            fields = {"Upload-Complete": "?1", "Upload-Offset": "3", "Content-Type": "application/partial-upload"}
            self.assertEqual(self.ask("PATCH", begun.headers["Location"], b"def", fields).status, 201)
            self.wait_for("post-finish")
        (asked,), (told,) = self.events("pre-create"), self.events("post-finish")
        self.assertEqual((asked["Upload"]["Size"], asked["Upload"]["SizeIsDeferred"]), (0, True))
        self.assertEqual((told["Upload"]["Size"], told["Upload"]["SizeIsDeferred"]), (6, False))
        self.assertEqual(told["Upload"]["MetaData"]["filename"], "i.bin")

    def form(self, *names: str) -> http.client.HTTPResponse:
        head = '--b\r\nContent-Disposition: form-data; name="f"; filename='
        body = "".join([*[f'{head}"{name}"\r\n\r\n{name}\r\n' for name in names], "--b--\r\n"]).encode()
        return self.ask("POST", "/files/", body, {"Content-Type": "multipart/form-data; boundary=b"})

    def test_form(self) -> None:
        """Each file of a form is an upload; one that is refused refuses the form; the application may rename them."""

        def answer(told: dict[str, Any]) -> Any:
            name = told["Event"]["Upload"]["MetaData"]["filename"]
            if told["Type"] == "pre-create" and name == "old":
                return 200, b'{"ChangeFileInfo": {"MetaData": {"filename": "new"}}}'
            return 200, b'{"RejectUpload": true}' if name == "bad" else b"{}"

        self.hooks.answer = answer
        with self.service():
            self.assertEqual(self.form("one", "old").status, 201)
            self.assertEqual(self.form("three", "bad").status, 400)
            wait_until(lambda: len(self.events("post-finish")) == 2, "both files are told of", 10)
        found = {(one["Upload"]["MetaData"]["filename"], one["Upload"]["Size"]) for one in self.events("post-finish")}
        self.assertEqual(found, {("one", 3), ("new", 3)})
        self.assertEqual(visible_beneath(self.root), ["new", "one"])

    def test_concatenation(self) -> None:
        """Parts are told of as such, and what they become as final."""
        with self.service():
            paths = []
            for data in (b"ab", b"cd"):
                response = self.tus("POST", "/uploads/", data, Upload_Length="2", Upload_Concat="partial")
                paths.append(response.headers["Location"])
            self.tus("POST", "/uploads/", Upload_Concat=f"final;{' '.join(paths)}")
            wait_until(lambda: len(self.events("post-finish")) == 3, "parts and whole are told of", 10)
        ends = sorted(self.events("post-finish"), key=lambda told: bool(told["Upload"]["IsFinal"]))
        self.assertEqual([one["Upload"]["IsPartial"] for one in ends], [True, True, False])
        self.assertEqual(ends[2]["Upload"]["PartialUploads"], [path.rpartition("/")[2] for path in paths])
        self.assertEqual(Path(ends[2]["Upload"]["Storage"]["Path"]).read_bytes(), b"abcd")

    def test_refusals(self) -> None:
        """The application refuses in its own words, and nothing of the upload is left; so it does a cancellation."""
        answer = {
            "RejectUpload": True,
            "RejectTermination": True,
            "HTTPResponse": {"StatusCode": 403, "Body": '{"no": 1}', "Header": {"Content-Type": "application/json"}},
        }
        said = json.dumps(answer).encode()
        with self.service(ALL):
            path = self.begun(1)
            self.hooks.answer = lambda told: (200, said if told["Type"].startswith("pre-") else b"{}")
            for response in (
                self.ask("PUT", "/files/no", b"x"), self.tus("POST", "/uploads/", Upload_Length="1"),
                self.form("no"), self.tus("DELETE", path),
            ):  # fmt: skip
                self.assertEqual(response.status, 403)
                self.assertEqual(json.loads(response.content), {"no": 1})  # type: ignore[attr-defined]
                self.assertEqual(response.headers["Content-Type"], "application/json")
            self.hooks.answer = lambda told: (200, b'{"RejectUpload": true, "RejectTermination": true}')
            self.assertEqual(self.ask("PUT", "/files/no", b"x").status, 400)
            self.assertEqual(self.tus("HEAD", path).status, 200)
        self.assertEqual(visible_beneath(self.root), [])
        self.assertEqual(len(list((self.root / ".lwstwisted" / "uploads").iterdir())), 2)

    def test_changes(self) -> None:
        """The application gives an upload of tus another name, and adds to the answers of its begin and its end."""

        def answer(told: dict[str, Any]) -> Any:
            if told["Type"] == "pre-create":
                changes = {"MetaData": {"filename": "chosen.bin", "by": "us"}}
                return 200, json.dumps({"ChangeFileInfo": changes, "HTTPResponse": {"Header": {"X-A": "1"}}}).encode()
            if told["Type"] == "pre-finish":
                return 200, b'{"HTTPResponse": {"StatusCode": 200, "Body": "done", "Header": {"Link": "<x>"}}}'
            return 200, b"{}"

        self.hooks.answer = answer
        with self.service(ALL):
            begun = self.tus("POST", "/uploads/", Upload_Length="3", Upload_Metadata="filename YQ==")
            self.assertEqual((begun.status, begun.headers["X-A"]), (201, "1"))
            path = begun.headers["Location"]
            head = self.tus("HEAD", path)
            self.assertEqual(head.headers["Upload-Metadata"], "filename Y2hvc2VuLmJpbg==,by dXM=")
            end = self.tus("PATCH", path, b"abc", Upload_Offset="0")
            self.assertEqual((end.status, end.headers["Link"], end.headers["Upload-Offset"]), (200, "<x>", "3"))
            self.assertEqual(end.content, b"done")  # type: ignore[attr-defined]
            refused = self.ask("PUT", "/files/other", b"x")
            self.assertEqual(refused.status, 500)
        self.assertEqual(visible_beneath(self.root), ["chosen.bin"])

    def test_renamed_past_the_rules(self) -> None:
        """The application can't give a file a name that its client may not put."""
        said = {"ChangeFileInfo": {"MetaData": {"filename": "theirs"}}}
        self.hooks.answer = lambda told: (200, json.dumps(said).encode() if told["Type"] == "pre-create" else b"{}")
        with self.service("--allow", "anonymous:put:/files/mine"):
            begun = self.tus("POST", "/uploads/", Upload_Length="1", Upload_Metadata="filename bWluZQ==")
            self.assertEqual([begun.status, self.form("mine").status], [403, 403])
        self.assertEqual(len(self.hooks.told), 2)
        self.assertEqual(visible_beneath(self.root), [])

    def test_what_cannot_be_had(self) -> None:
        """An id or a place that the application wants is refused, as what it would look for isn't where it looks."""
        for wish in ({"ID": "mine"}, {"Storage": {"Path": "/elsewhere"}}):
            said = json.dumps({"ChangeFileInfo": wish}).encode()
            self.hooks.answer = lambda told, said=said: (200, said)  # type: ignore[misc]
            with self.service() as server:
                self.assertEqual(self.tus("POST", "/uploads/", Upload_Length="1").status, 500)
                self.assertEqual(self.ask("PUT", "/files/a", b"x").status, 500)
                server.wait_for(f"it wants what can't be had: ChangeFileInfo.{next(iter(wish))}")
        self.assertEqual(visible_beneath(self.root), [])

    def test_stopped(self) -> None:
        """The application stops uploads under way: their clients hear it, and nothing of them is left."""

        def answer(told: dict[str, Any]) -> Any:
            stops = told["Type"] == "post-receive"
            return 200, b'{"StopUpload": true, "HTTPResponse": {"Body": "enough"}}' if stops else b"{}"

        self.hooks.answer = answer
        with self.service("--progress-hooks-interval=50ms"):
            path = self.begun(1000, filename="t")
            patch = f"PATCH {path} HTTP/1.1\r\nHost: h\r\nTus-Resumable: 1.0.0\r\nUpload-Offset: 0\r\n"
            patch += "Content-Type: application/offset+octet-stream\r\nContent-Length: 1000\r\n\r\nabc"
            put = "PUT /files/p HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\nabc"
            for request in (patch, put):
                with socket.create_connection(("127.0.0.1", self.port), timeout=10) as client:
                    client.sendall(request.encode())
                    self.assertIn(b"400 Bad Request", client.recv(65536))
            self.wait_for("post-terminate")
            self.assertEqual(self.tus("HEAD", path).status, 404)
        self.assertEqual(visible_beneath(self.root), [])
        self.assertEqual(self.events("post-finish"), [])

    def test_commands(self) -> None:
        """Programs instead of a server: one refuses, one hangs, one says junk, and one takes what is told."""
        hooks = self.folder / "hooks"
        hooks.mkdir()

        def write(name: str, script: str) -> None:
            (hooks / name).write_text(f"#!/bin/sh\n{script}\n")
            (hooks / name).chmod(0o755)

        write("post-finish", 'cat >> told; echo "$TUS_ID" >> told')
        with self.service(f"--hooks-dir={hooks}"):
            self.assertEqual(self.ask("PUT", "/files/a", b"x").status, 201)
            for script, status in (
                ("exit 0", 201), ("exit 1", 500), ("echo junk", 500),
                ("""echo '{"RejectUpload": true, "HTTPResponse": {"StatusCode": 418}}'""", 418),
            ):  # fmt: skip
                write("pre-create", script)
                self.assertEqual(self.ask("PUT", "/files/b", b"x").status, status, script)
            wait_until(lambda: (hooks / "told").read_text().count("post-finish") == 2, "both files are told of", 10)
        write("pre-create", "exec sleep 30")
        with self.service(f"--hooks-dir={hooks}", "--hooks-http-timeout=300ms"):
            self.assertEqual(self.ask("PUT", "/files/b", b"x").status, 503)
        told, id = (hooks / "told").read_text().split("\n")[0].rsplit("}", 1)
        self.assertEqual(json.loads(told + "}")["Event"]["Upload"]["ID"], id)

    def test_nobody_is_asked(self) -> None:
        """Without hooks nothing of them is there."""
        with serving(twistd("--root", self.root, LISTEN), cwd=TOP) as server:
            (self.port,) = server.wait_for_ports()
            self.assertEqual(self.ask("PUT", "/files/a", b"x").status, 201)
        self.assertFalse((self.root / ".lwstwisted" / "hooks").exists())


@pytest.mark.slow
class OutageTests(ServiceCase):
    """A server for hooks that fails, hangs, goes away and comes back."""

    def put(self, *names: str) -> None:
        for name in names:
            self.assertEqual(self.ask("PUT", f"/files/{name}", name.encode()).status, 201)

    def finished(self) -> set[str]:
        return {told["Upload"]["MetaData"]["filename"] for told in self.events("post-finish")}

    def test_told_in_the_end(self) -> None:
        """Every finished upload is told of, though the server failed, hung, cut, and was gone, and the service too."""
        only = "--hooks-enabled-events=post-finish"
        names = [f"f{number}" for number in range(8)]
        with self.service(only, "--hooks-http-timeout=300ms", is_hasty=True):
            self.hooks.answer = lambda told: (500, b"{}")
            self.put(*names[:2])
            self.wait_for("post-finish")
            self.hooks.answer = lambda told: CUT
            self.put(*names[2:4])
            self.hooks.answer = lambda told: HANG
            self.put(*names[4:6])
        self.hooks.stop()
        with self.service(only, "--hooks-http-timeout=300ms", is_hasty=True):
            self.put(*names[6:])
            self.hooks.answer = lambda told: (200, b"{}")
            self.hooks.told.clear()
            self.hooks.start()
            wait_until(lambda: self.finished() == set(names), "all are told", 10)

    def test_asked_while_it_is_down(self) -> None:
        """What has to be asked about is refused in bounded time, and nothing of it is left."""
        with self.service("--hooks-http-timeout=300ms"):
            self.hooks.answer = lambda told: HANG
            self.assertEqual(self.ask("PUT", "/files/a", b"x").status, 503)
        with self.service():
            for answer, status in (((404, b""), 500), ((200, b"junk"), 500), ((500, b""), 503), (CUT, 503)):
                self.hooks.answer = lambda told, answer=answer: answer  # type: ignore[misc]
                response = self.ask("PUT", "/files/a", b"x")
                self.assertEqual(response.status, status, answer)
                self.assertEqual(response.headers["Retry-After"], "5" if status == 503 else None)
            self.hooks.stop()
            self.assertEqual(self.tus("POST", "/uploads/", Upload_Length="1").status, 503)
            self.hooks.answer = lambda told: (200, b"{}")
            self.hooks.start()
            self.put("b")
            self.wait_for("post-finish")
        self.assertEqual(visible_beneath(self.root), ["b"])

    def test_pre_finish_fails(self) -> None:
        """A file whose ``pre-finish`` fails is there, and its end is told; its client hears of the failure."""
        self.hooks.answer = lambda told: (404 if told["Type"] == "pre-finish" else 200, b"{}")
        with self.service(ALL):
            self.assertEqual(self.ask("PUT", "/files/a", b"x").status, 500)
            self.wait_for("post-finish")
        self.assertEqual(visible_beneath(self.root), ["a"])


@pytest.mark.slow
class KilledTests(ServiceCase):
    """The service is killed at each step of an end, and started again."""

    def assert_told(self, where: str, is_there: bool, how: str) -> None:
        self.hooks.told.clear()
        shutil.rmtree(self.root, ignore_errors=True)
        with self.service(dies=where) as server:
            with contextlib.suppress(ConnectionError, http.client.HTTPException):
                if how == "tus":
                    self.tus("PATCH", self.begun(3, filename="f"), b"abc", Upload_Offset="0")
                elif how == "put":
                    self.ask("PUT", "/files/f", b"abc")
                else:
                    EventTests.form(self, "f")  # type: ignore[arg-type]
            self.assertEqual(server.wait(), -signal.SIGKILL, where)
        with self.service():
            if is_there:
                self.wait_for("post-create", "post-finish")
            else:
                # What comes later is told, and by then so would be what came before.
                self.assertEqual(self.ask("PUT", "/files/later", b"x").status, 201)
                self.wait_for("post-finish")
            self.assertEqual("f" in visible_beneath(self.root), is_there, where)
        finished = [told["Upload"]["MetaData"]["filename"] for told in self.events("post-finish")]
        self.assertEqual(set(finished), {"f"} if is_there else {"later"}, where)

    def test_put(self) -> None:
        """A file that is there is told of, and one that isn't is not, whenever the power of the process ended."""
        for where, is_there in (
            (f"before:{NOTED}", False), (f"after:{NOTED}", False), (f"after:{NAMED}", True),
            (f"before:{CONFIRMED}", True), (f"after:{CONFIRMED}", True), (f"before:{TAKEN}", True),
        ):  # fmt: skip
            self.assert_told(where, is_there, "put")

    def test_tus(self) -> None:
        """Likewise for an upload that could be resumed. Here the first thing to be noted is its begin."""
        self.assert_told(f"after:{NAMED}", True, "tus")
        self.assert_told(f"before:{CONFIRMED}", True, "tus")

    def test_form(self) -> None:
        """Likewise for the files of a form, which have their names together."""
        self.assert_told(f"before:{BATCH}", False, "form")
        self.assert_told(f"after:{BATCH}", True, "form")


class HookOptionTests(SynchronousTestCase):
    """The options, as tusd has them."""

    def parsed(self, *words: str) -> Any:
        options = Options()
        options.parseOptions(words)  # type: ignore[no-untyped-call]
        return options["hooks"]

    def test_defaults(self) -> None:
        """Those of tusd: three tries with a second between them, 15 s for all, 5 KiB, and five of the events."""
        self.assertIsNone(self.parsed())
        settings = self.parsed("--hooks-http=https://a.example/h")
        found = settings.tries, settings.backoff, settings.timeout, settings.size_limit, settings.interval
        self.assertEqual(found, (3, 1.0, 15.0, 5120, 1.0))
        self.assertEqual(set(Hook) - settings.enabled, {Hook.PRE_FINISH, Hook.PRE_TERMINATE})
        url = "--hooks-http=http://a"
        self.assertEqual(self.parsed(url, "--hooks-enabled-events="), self.parsed(url))

    def test_settings(self) -> None:
        """Times as Go writes them, lists with commas."""
        settings = self.parsed(
            "--hooks-http=http://[::1]:8081/x", "--hooks-http-forward-headers=Cookie, X-Me",
            "--hooks-http-backoff=1.5s", "--hooks-http-timeout=2m",
            "--hooks-enabled-events=post-finish, pre-create", "--hooks-http-retry=0",
        )  # fmt: skip
        self.assertEqual((settings.forwarded, settings.backoff, settings.timeout), (("Cookie", "X-Me"), 1.5, 120.0))
        self.assertEqual((settings.enabled, settings.tries), ({Hook.POST_FINISH, Hook.PRE_CREATE}, 0))

    def test_mistakes(self) -> None:
        """Each is told with the name of its option, before anything is built."""
        for word in (
            "--hooks-dir=/nonexistent", "--hooks-http=ftp://a", "--hooks-http=http://", "--hooks-http=http://a:b",
            "--hooks-http=http://u:p@a/", "--hooks-http=http://a b", "--hooks-http-forward-headers=a b",
            "--hooks-http-retry=-1", "--hooks-http-backoff=1x", "--hooks-http-timeout=0", "--hooks-http-size-limit=5K",
            "--hooks-enabled-events=post-Finish", "--progress-hooks-interval=0s",
        ):  # fmt: skip
            failure = self.assertRaises(UsageError, self.parsed, word)
            self.assertIn(word.partition("=")[0], str(failure))
        self.assertRaises(UsageError, self.parsed, "--hooks-dir=/tmp", "--hooks-http=http://a")
