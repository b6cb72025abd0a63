"""Who may do what, by every way to do it: a real service, and rows of rules, protocols and visitors."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.access.signing import make_grant
from tests.conformance import requires
from tests.servers import PATIENCE, script, serving, twistd, visible_beneath

KEY = bytes(range(32))
ACTIONS = {
    "alice": "put,get,list,delete,overwrite",
    "putter": "put",
    "replacer": "put,overwrite",
    "getter": "get",
    "lister": "list",
    "deleter": "delete",
}
"""Who may do what everywhere."""

RIGHT = "$2y$10$ECN7VpHqWtcuY2MLiugYfeWRLTrhwwQU/LPrKSo0eLkU1Kdr/DQsK"
"""What ``htpasswd -B -C 10`` makes of ``right``."""

TUS = {"Tus-Resumable": "1.0.0"}
APPEND = {**TUS, "Content-Type": "application/offset+octet-stream"}
DRAFT = {"Upload-Draft-Interop-Version": "6", "Upload-Complete": "?1"}
FORM = {"Content-Type": "multipart/form-data; boundary=b"}


class Final(http.client.HTTPResponse):
    """Skips interim responses, of which Python's own knows 100 only."""

    def _read_status(self) -> tuple[str, int, str]:
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 < status < 200:
                return version, status, reason
            http.client.parse_headers(self.fp)  # type: ignore[attr-defined]


@dataclass
class Answer:
    status: int
    fields: http.client.HTTPMessage
    body: bytes


def token(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer token-of-{name}"}


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {b64encode(f'{name}:{password}'.encode()).decode()}"}


def form(name: str, data: bytes) -> bytes:
    head = f'--b\r\nContent-Disposition: form-data; name="f"; filename="{name}"\r\n\r\n'
    return head.encode() + data + b"\r\n--b--\r\n"


def metadata(name: str, kind: str = "") -> dict[str, str]:
    said = f"filename {b64encode(name.encode()).decode()}"
    return {"Upload-Metadata": f"{said},filetype {b64encode(kind.encode()).decode()}" if kind else said}


class AccessCase(SynchronousTestCase):
    """A service with users and rules."""

    rules = (
        *(f"{name}:{actions}:/files/**" for name, actions in ACTIONS.items()),
        "zoe:put,list:/files/z/**",
        "viewer:list:/files/",
        "viewer:list:/files/z/deep/*",
        "any-user:put,get:/files/home/{user}/**",
        "anonymous:get:/files/public/**",
    )

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.root, self.tokens = self.folder / "root", self.folder / "tokens"
        names = [*ACTIONS, "zoe", "viewer", "stranger"]
        self.tokens.write_text("".join(f"{n}:{sha256(f'token-of-{n}'.encode()).hexdigest()}\n" for n in names))
        htpasswd, keys = self.folder / "htpasswd", self.folder / "keys"
        htpasswd.write_text(f"alice:{RIGHT}\n")
        keys.touch(0o600)
        keys.write_text(f"k1:{KEY.hex()}\n")
        options = ["--root", self.root, "--listen", "tcp:0", "--durability", "none", "--signing-keys", keys]
        options += ["--auth", f"tokens:{self.tokens}", "--auth", f"htpasswd:{htpasswd}"]
        for rule in self.rules:
            options += ["--allow", rule]
        running = serving(twistd(*options), cwd=self.folder)
        self.server = running.__enter__()
        self.addCleanup(running.__exit__, None, None, None)
        (self.port,) = self.server.wait_for_ports()

    def ask(self, method: str, path: str, body: bytes | None = None, *fields: dict[str, str]) -> Answer:
        """One request."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        client.response_class = Final
        try:
            client.request(method, path, body, {name: value for some in fields for name, value in some.items()})
            answer = client.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            client.close()

    def first_line(self, *lines: str) -> str:
        """What a client hears that sends the head of a request and waits."""
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as client:
            client.sendall("\r\n".join([*lines, "Host: 127.0.0.1", "", ""]).encode())
            return client.makefile().readline().strip()

    def write(self, name: str, data: bytes = b"old") -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


# The ways to store a file: a name in the root, what is in it, the query and further fields of the request.

Store = Callable[[AccessCase, str, bytes, str, dict[str, str]], Answer]


def by_put(case: AccessCase, name: str, data: bytes, query: str, fields: dict[str, str]) -> Answer:
    return case.ask("PUT", f"/files/{name}{query}", data, fields)


def by_form(case: AccessCase, name: str, data: bytes, query: str, fields: dict[str, str]) -> Answer:
    return case.ask("POST", f"/files/{query}", form(name, data), {**fields, **FORM})


def by_tus(case: AccessCase, name: str, data: bytes, query: str, fields: dict[str, str]) -> Answer:
    length = {"Upload-Length": str(len(data))}
    return case.ask("POST", f"/uploads/{query}", data, APPEND, length, metadata(name), fields)


def by_tus_in_two(case: AccessCase, name: str, data: bytes, query: str, fields: dict[str, str]) -> Answer:
    length = {"Upload-Length": str(len(data))}
    begun = case.ask("POST", f"/uploads/{query}", None, TUS, length, metadata(name), fields)
    if begun.status != 201:
        return begun
    return case.ask("PATCH", begun.fields["Location"], data, APPEND, {"Upload-Offset": "0"}, fields)


def by_draft(case: AccessCase, name: str, data: bytes, query: str, fields: dict[str, str]) -> Answer:
    return case.ask("PUT", f"/files/{name}{query}", data, DRAFT, fields)


def by_draft_post(case: AccessCase, name: str, data: bytes, query: str, fields: dict[str, str]) -> Answer:
    said = {"Content-Disposition": f'attachment; filename="{name}"'}
    return case.ask("POST", f"/uploads/{query}", data, DRAFT, said, fields)


def by_draft_in_two(case: AccessCase, name: str, data: bytes, query: str, fields: dict[str, str]) -> Answer:
    begun = case.ask("PUT", f"/files/{name}{query}", b"", {**DRAFT, "Upload-Complete": "?0"}, fields)
    if begun.status != 201:
        return begun
    rest = {"Content-Type": "application/partial-upload", "Upload-Offset": "0"}
    return case.ask("PATCH", begun.fields["Location"], data, DRAFT, {**fields, **rest})


BY_PUT: tuple[Store, ...] = (by_put, by_draft, by_draft_in_two)
BY_POST: tuple[Store, ...] = (by_form, by_tus, by_tus_in_two, by_draft_post)


class RuleTests(AccessCase):
    """Every rule, every method, every protocol."""

    def test_storing(self) -> None:
        """A new name takes put, one that is there takes overwrite as well; a refusal leaves all as it was."""
        for store in (*BY_PUT, *BY_POST):
            for user, actions in ACTIONS.items():
                for is_there in (False, True):
                    name, where = f"{store.__name__}-{user}-{is_there}", (store.__name__, user, is_there)
                    if is_there:
                        self.write(name)
                    answer = store(self, name, b"new", "", token(user))
                    needed = {"put", "overwrite"} if is_there else {"put"}
                    if needed <= set(actions.split(",")):
                        self.assertIn(answer.status, (201, 204), where)
                        self.assertEqual((self.root / name).read_bytes(), b"new", where)
                    else:
                        self.assertEqual(answer.status, 403, where)
                        before = b"old" if is_there else None
                        now = (self.root / name).read_bytes() if (self.root / name).exists() else None
                        self.assertEqual(now, before, where)

    def test_reading_and_removing(self) -> None:
        """Each takes its action, with HEAD as with GET."""
        for user, actions in ACTIONS.items():
            self.write("file")
            for action, method, path, status in (
                ("get", "GET", "/files/file", 200),
                ("get", "HEAD", "/files/file", 200),
                ("list", "GET", "/files/", 200),
                ("list", "HEAD", "/files/", 200),
                ("delete", "DELETE", "/files/file", 204),
            ):
                answer = self.ask(method, path, None, token(user))
                self.assertEqual(answer.status, status if action in actions else 403, (user, method, path))
            self.assertIs((self.root / "file").exists(), "delete" not in actions, user)

    def test_elsewhere(self) -> None:
        """Who may do all that in one folder may do none of it in another one."""
        self.write("file")
        for store in (*BY_PUT, *BY_POST):
            self.assertEqual(store(self, "new", b"new", "", token("zoe")).status, 403, store.__name__)
        self.assertEqual(self.ask("PUT", "/files/z/deep/new", b"new", token("zoe")).status, 201)
        self.assertEqual(self.ask("POST", "/files/z/", form("a", b"1"), token("zoe"), FORM).status, 201)
        self.assertEqual(self.ask("GET", "/files/", None, token("zoe")).status, 403)
        self.assertEqual(self.ask("GET", "/files/z/", None, token("zoe")).status, 200)
        self.assertEqual(self.ask("GET", "/files/z/a", None, token("zoe")).status, 403)

    def test_strangers(self) -> None:
        """Nobody gets 401 and hears what would help; somebody without any rule gets 403."""
        self.write("file")
        for store in (*BY_PUT, *BY_POST):
            for fields, status in (({}, 401), (token("stranger"), 403)):
                answer = store(self, "new", b"new", "", fields)
                self.assertEqual(answer.status, status, (store.__name__, fields))
                self.assertIs("WWW-Authenticate" in answer.fields, status == 401, (store.__name__, fields))
        for method, path in (("GET", "/files/file"), ("GET", "/files/"), ("DELETE", "/files/file")):
            for fields, status in (({}, 401), (token("stranger"), 403)):
                self.assertEqual(self.ask(method, path, None, fields).status, status, (method, path, fields))
        challenge = self.ask("GET", "/files/", None).fields["WWW-Authenticate"]
        self.assertIn('Basic realm="lwstwisted", charset="UTF-8"', challenge)
        self.assertIn('Bearer realm="lwstwisted"', challenge)
        self.assertEqual(visible_beneath(self.root), ["file"])

    def test_nobody(self) -> None:
        """What anonymous may, everybody may; wrong credentials are not taken for none."""
        self.write("public/file")
        self.assertEqual(self.ask("GET", "/files/public/file").status, 200)
        self.assertEqual(self.ask("GET", "/files/public/file", None, token("stranger")).status, 200)
        self.assertEqual(self.ask("GET", "/files/public/file", None, token("wrong")).status, 401)
        self.assertEqual(self.ask("GET", "/files/public/file", None, {"Authorization": "Nonsense"}).status, 400)

    def test_own_folders(self) -> None:
        """Each user has one, and no other one's."""
        self.assertEqual(self.ask("PUT", "/files/home/stranger/a", b"1", token("stranger")).status, 201)
        self.assertEqual(self.ask("GET", "/files/home/stranger/a", None, token("stranger")).status, 200)
        self.assertEqual(self.ask("GET", "/files/home/stranger/a", None, token("zoe")).status, 403)
        self.assertEqual(self.ask("PUT", "/files/home/zoe/a", b"1", token("stranger")).status, 403)

    def test_passwords(self) -> None:
        """A name and password do what a token does; unknown names and wrong passwords get the same answer."""
        self.assertEqual(self.ask("PUT", "/files/a", b"1", basic("alice", "right")).status, 201)
        wrong, unknown = (self.ask("GET", "/files/a", None, basic(*who)) for who in (("alice", "x"), ("eve", "right")))
        self.assertEqual((wrong.status, wrong.body), (401, unknown.body))
        self.assertEqual(wrong.fields["WWW-Authenticate"], unknown.fields["WWW-Authenticate"])

    def test_the_refusal_comes_in_place_of_100(self) -> None:
        """No byte of a body is asked for that would be refused."""
        self.write("file")
        wait = ["Content-Length: 3", "Expect: 100-continue"]
        put, tus = "PUT /files/new HTTP/1.1", ["POST /uploads/ HTTP/1.1", *(f"{n}: {v}" for n, v in APPEND.items())]
        tus += ["Upload-Length: 3", "Upload-Metadata: filename bmV3"]
        by_form = ["POST /files/ HTTP/1.1", f"Content-Type: {FORM['Content-Type']}"]
        by_draft = [put, *(f"{name}: {value}" for name, value in DRAFT.items())]
        for begin, welcome in (([put], "100"), (by_form, "100"), (tus, "100"), (by_draft, "104")):
            for who, status in (("", "401"), ("getter", "403"), ("alice", welcome)):
                said = [f"Authorization: {token(who)['Authorization']}"] if who else []
                heard = self.first_line(*begin, *wait, *said)
                self.assertEqual(heard[:12], f"HTTP/1.1 {status}", (begin, who))
        for who in ("wrong", "putter"):
            line = self.first_line("PUT /files/file HTTP/1.1", *wait, f"Authorization: {token(who)['Authorization']}")
            self.assertEqual(line[:12], {"wrong": "HTTP/1.1 401", "putter": "HTTP/1.1 403"}[who])

    def test_preflights(self) -> None:
        """A browser asks without saying who its user is; pages of elsewhere may bring a token of their own."""
        origin = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
        answer = self.ask("OPTIONS", "/uploads/", None, origin)
        self.assertEqual(answer.status, 200)
        self.assertIn("Authorization", answer.fields["Access-Control-Allow-Headers"])
        self.assertNotIn("Access-Control-Allow-Credentials", answer.fields)
        refused = self.ask("POST", "/uploads/", None, TUS, {"Upload-Length": "1"}, {"Origin": "https://example.org"})
        self.assertEqual((refused.status, refused.fields["Access-Control-Allow-Origin"]), (401, "*"))

    def test_listings_show_what_may_be_listed(self) -> None:
        """And the folders on the way there, which can't be listed themselves for that."""
        for name in ("home/zoe/a", "z/deep/a", "z/b", "b"):
            self.write(name)
        for user, wanted in (("lister", [b"b", b"home", b"z"]), ("viewer", [b"z"])):
            names = re.findall(rb'"name": "(\w+)"', self.ask("GET", "/files/", None, token(user), JSON).body)
            self.assertEqual(sorted(names), wanted, user)
        self.assertEqual(self.ask("GET", "/files/z/", None, token("viewer"), JSON).status, 403)

    def test_a_user_is_taken_away(self) -> None:
        """From then on the token is wrong, also for what it let in before; a new one works at once."""
        text = self.tokens.read_text()
        self.addCleanup(self.replace, text)
        self.assertEqual(self.ask("PUT", "/files/a", b"1", token("putter")).status, 201)
        line = f"late:{sha256(b'token-of-late').hexdigest()}\n"
        self.replace(line + "".join(one for one in text.splitlines(True) if not one.startswith("putter")))
        self.assertEqual(self.ask("PUT", "/files/b", b"1", token("putter")).status, 401)
        self.assertEqual(self.ask("PUT", "/files/home/late/b", b"1", token("late")).status, 201)

    def replace(self, text: str) -> None:
        """Replace the file of tokens, as an editor does."""
        other = self.folder / "other"
        other.write_text(text)
        os.replace(other, self.tokens)


JSON = {"Accept": "application/json"}


class WrongTests(AccessCase):
    """Credentials that are not right."""

    def test_wrong_tokens(self) -> None:
        """They get 401 by each protocol, slower in the end; who was right before doesn't wait with them."""
        self.assertEqual(self.ask("PUT", "/files/one", b"1", token("alice")).status, 201)
        for store in (*BY_PUT, *BY_POST):
            answer = store(self, "new", b"new", "", token("wrong"))
            self.assertEqual((answer.status, "WWW-Authenticate" in answer.fields), (401, True), store.__name__)
        self.assertEqual(self.ask("PUT", "/files/two", b"1", token("alice")).status, 201)
        self.assertEqual(visible_beneath(self.root), ["one", "two"])


class OwnerTests(AccessCase):
    """A resumable upload belongs to who began it."""

    def begin(self, user: str, name: str = "file", **more: str) -> str:
        fields = {name.replace("_", "-"): value for name, value in more.items()}
        answer = self.ask("POST", "/uploads/", None, TUS, metadata(name), {"Upload-Length": "4"}, fields, token(user))
        self.assertEqual(answer.status, 201)
        return answer.fields["Location"]

    def append(self, url: str, user: str, data: bytes = b"data") -> int:
        return self.ask("PATCH", url, data, APPEND, {"Upload-Offset": "0"}, token(user)).status

    @requires("rufh", "13", "SHOULD", "Only who began an upload has access to it.", 1)
    def test_nobody_else_has_it(self) -> None:
        """To others it isn't there, whatever they may do with files, by each method of both protocols."""
        url = self.begin("putter")
        part = {"Content-Type": "application/partial-upload", "Upload-Offset": "0"}
        for who in (token("alice"), token("zoe"), {}):
            for method, fields in (
                ("HEAD", TUS),
                ("PATCH", {**APPEND, "Upload-Offset": "0"}),
                ("PATCH", APPEND),  # which is refused for want of an offset by who has it
                ("DELETE", TUS),
                ("HEAD", DRAFT),
                ("GET", DRAFT),
                ("PATCH", {**DRAFT, **part}),
                ("DELETE", DRAFT),
            ):
                body = b"evil" if method == "PATCH" else None
                answer = self.ask(method, url, body, fields, who)
                self.assertEqual(answer.status, 404, (method, fields, who))
                self.assertNotIn("Upload-Expires", answer.fields)
        self.assertEqual(self.ask("HEAD", url, None, TUS, token("putter")).fields["Upload-Offset"], "0")
        self.assertEqual(self.append(url, "putter"), 204)
        self.assertEqual((self.root / "file").read_bytes(), b"data")

    def test_others_do_not_interrupt_it(self) -> None:
        """Who asks for an upload that isn't theirs doesn't make the request that holds it leave."""
        url = self.begin("putter")
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as client:
            fields = {**APPEND, **token("putter"), "Upload-Offset": "0"}
            fields |= {"Content-Length": "4", "Expect": "100-continue"}
            lines = [f"PATCH {url} HTTP/1.1", "Host: 127.0.0.1", *(f"{n}: {v}" for n, v in fields.items()), "", ""]
            client.sendall("\r\n".join(lines).encode())
            reader = client.makefile()
            self.assertEqual(reader.readline().strip(), "HTTP/1.1 100 Continue")
            self.assertEqual(self.ask("HEAD", url, None, TUS, token("alice")).status, 404)
            client.sendall(b"data")
            reader.readline()
            self.assertEqual(reader.readline().strip(), "HTTP/1.1 204 No Content")

    def test_foreign_parts(self) -> None:
        """What somebody else began can't be concatenated; what one began oneself can."""
        mine, foreign = (self.begin(user, Upload_Concat="partial") for user in ("putter", "alice"))
        for parts, status in (((mine, foreign), 403), ((mine, mine), 201)):
            concat = {"Upload-Concat": f"final;{' '.join(parts)}"}
            answer = self.ask("POST", "/uploads/", None, TUS, concat, metadata("whole"), token("putter"))
            self.assertEqual(answer.status, status, parts)

    def test_a_file_that_appears_meanwhile(self) -> None:
        """Who may not overwrite gets 403 at the end, and the other one's file stays."""
        url = self.begin("putter")
        self.write("file", b"other")
        self.assertEqual(self.append(url, "putter"), 403)
        self.assertEqual((self.root / "file").read_bytes(), b"other")
        url = self.begin("replacer")
        self.assertEqual(self.append(url, "replacer"), 204)
        self.assertEqual((self.root / "file").read_bytes(), b"data")

    def test_a_file_that_appears_during_a_put(self) -> None:
        """The same in one request."""
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as client:
            lines = ["PUT /files/new HTTP/1.1", "Host: 127.0.0.1", "Content-Length: 4", "Expect: 100-continue"]
            lines += [f"Authorization: {token('putter')['Authorization']}", "", ""]
            client.sendall("\r\n".join(lines).encode())
            reader = client.makefile()
            self.assertEqual(reader.readline().strip(), "HTTP/1.1 100 Continue")
            self.write("new", b"other")
            client.sendall(b"data")
            reader.readline()
            self.assertEqual(reader.readline()[:12], "HTTP/1.1 403")
        self.assertEqual((self.root / "new").read_bytes(), b"other")

    def test_a_right_that_is_not_for_every_name(self) -> None:
        """An upload that gets its id for a name takes a right to any name there."""
        for user, status in (("putter", 201), ("zoe", 403), ("getter", 403)):
            answer = self.ask("POST", "/uploads/", None, TUS, {"Upload-Length": "4"}, token(user))
            self.assertEqual(answer.status, status, user)


class SignedTests(AccessCase):
    """Signed URLs."""

    rules = ("nobody-at-all:get:/files/x",)

    def query(
        self,
        path: str,
        method: str,
        seconds: int = 600,
        max_size: int | None = None,
        content_type: str = "",
        may_replace: bool = False,
        key: bytes = KEY,
    ) -> str:
        grant = make_grant(path, [method], int(time.time()) + seconds, max_size, content_type, may_replace)
        return f"?{grant.query('k1', key)}"

    def each(self) -> list[tuple[Store, str]]:
        return [*((store, "PUT") for store in BY_PUT), *((store, "POST") for store in BY_POST)]

    def test_storing(self) -> None:
        """By each protocol, and nothing but what was signed; each refusal says which part it is."""
        for store, method in self.each():
            where = store.__name__
            path = f"/files/{where}"
            good = self.query(path, method)
            answer = store(self, where, b"data", good, {})
            self.assertIn(answer.status, (201, 204), where)
            self.assertEqual((self.root / where).read_bytes(), b"data", where)
            # Once more: it is there now.
            refused = store(self, where, b"more", good, {})
            self.assertEqual((refused.status, b"replace" in refused.body), (403, True), where)
            replacing = self.query(path, method, may_replace=True)
            self.assertIn(store(self, where, b"more", replacing, {}).status, (201, 204), where)
            (self.root / where).unlink()
            for query, said in (
                (self.query(path, method, seconds=-1), b"time"),
                (self.query("/files/other", method), b"another path"),
                (self.query(path, "GET"), b"other methods"),
                (self.query(path, "POST" if method == "PUT" else "PUT"), b"other methods"),
                (self.query(path, method, key=bytes(32)), b"signature does not fit"),
                (good.replace("expires=", "expires=1"), b"signature does not fit"),
                (good.replace("methods=", "methods=DELETE%2C"), b"signature does not fit"),
                (good[:-1] + ("0" if good[-1] != "0" else "1"), b"signature does not fit"),
            ):
                refused = store(self, where, b"data", query, {})
                self.assertEqual(refused.status, 403, (where, query))
                self.assertIn(said, refused.body, where)
                self.assertNotIn(query.rpartition("=")[2].encode(), refused.body)
            self.assertFalse((self.root / where).exists(), where)

    def test_sizes(self) -> None:
        """As many bytes as were signed, and not one more; a size that was changed makes the signature wrong."""
        for store, method in self.each():
            where = store.__name__
            query = self.query(f"/files/{where}", method, max_size=4, may_replace=True)
            self.assertIn(store(self, where, b"data", query, {}).status, (201, 204), where)
            refused = store(self, where, b"datas", query, {})
            self.assertIn(refused.status, (403, 413), where)
            changed = query.replace("max-size=4", "max-size=5")
            self.assertNotEqual(changed, query)
            self.assertEqual(store(self, where, b"datas", changed, {}).status, 403, where)
            self.assertEqual((self.root / where).read_bytes(), b"data", where)

    def test_sizes_that_are_told_late(self) -> None:
        """A chunked body and an upload of unknown length end where the size does."""
        query = self.query("/files/chunked", "PUT", max_size=4)
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        client.request("PUT", f"/files/chunked{query}", iter([b"da", b"tas"]), encode_chunked=True)
        self.assertEqual(client.getresponse().status, 413)
        client.close()
        query, later = self.query("/files/late", "POST", max_size=4), {"Upload-Defer-Length": "1"}
        begun = self.ask("POST", f"/uploads/{query}", None, TUS, later, metadata("late"))
        url = begun.fields["Location"]
        for fields, body in (({}, b"datas"), ({"Upload-Length": "5"}, b"data")):
            answer = self.ask("PATCH", url, body, APPEND, {"Upload-Offset": "0"}, fields)
            self.assertEqual(answer.status, 413, fields)
        self.assertEqual(visible_beneath(self.root), [])

    def test_types(self) -> None:
        """The type that was signed has to be said, in the way of the protocol."""
        put, post = (self.query("/files/picture", method, content_type="image/png") for method in ("PUT", "POST"))
        png, html = {"Content-Type": "image/png"}, {"Content-Type": "text/html"}
        for store in (by_put, by_draft):
            for fields, status in ((html, 403), ({}, 403), (png, 201)):
                self.assertEqual(store(self, "picture", b"1", put, fields).status, status, (store.__name__, fields))
            (self.root / "picture").unlink()
        self.assertEqual(by_form(self, "picture", b"1", post, {}).status, 403)
        for kind, status in (("text/html", 403), ("", 403), ("image/png", 201)):
            fields = metadata("picture", kind)
            answer = self.ask("POST", f"/uploads/{post}", None, TUS, {"Upload-Length": "1"}, fields)
            self.assertEqual(answer.status, status, kind)

    def test_reading_and_removing(self) -> None:
        """GET with HEAD, a folder, DELETE."""
        self.write("a/b")
        get, delete = (self.query("/files/a/b", method) for method in ("GET", "DELETE"))
        folder = self.query("/files/a/", "GET")
        for method, path, query, status in (
            ("GET", "/files/a/b", get, 200),
            ("HEAD", "/files/a/b", get, 200),
            ("GET", "/files/a/", get, 403),
            ("DELETE", "/files/a/b", get, 403),
            ("GET", "/files/a/", folder, 200),
            ("GET", "/files/a/b", folder, 200),
            ("GET", "/files/", folder, 403),
            ("GET", "/files/a/b", delete, 403),
            ("DELETE", "/files/a/b", delete, 204),
        ):
            self.assertEqual(self.ask(method, f"{path}{query}").status, status, (method, path, query))

    def test_going_on(self) -> None:
        """The place of the upload has the query: with it the client goes on, without it or with another one nobody."""
        query, other = self.query("/files/long", "POST"), self.query("/files/long", "POST", seconds=601)
        begun = self.ask("POST", f"/uploads/{query}", None, TUS, {"Upload-Length": "4"}, metadata("long"))
        url = begun.fields["Location"]
        place, _, rest = url.partition("?")
        self.assertEqual(f"?{rest}", query)
        for wrong in (place, f"{place}{other}", f"{place}{query[:-1]}"):
            for method, fields in (("HEAD", TUS), ("PATCH", {**APPEND, "Upload-Offset": "0"}), ("DELETE", TUS)):
                status = self.ask(method, wrong, b"evil" if method == "PATCH" else None, fields).status
                self.assertEqual(status, 403 if wrong.endswith(query[:-1]) else 404, (method, wrong))
        self.assertEqual(self.ask("HEAD", url, None, TUS).fields["Upload-Offset"], "0")
        for data, offset in ((b"da", 0), (b"ta", 2)):
            self.assertEqual(self.ask("PATCH", url, data, APPEND, {"Upload-Offset": str(offset)}).status, 204)
        self.assertEqual((self.root / "long").read_bytes(), b"data")

    @pytest.mark.slow  # it waits until a time is over that is told in whole seconds
    def test_going_on_when_the_time_is_over(self) -> None:
        """An upload that began in time is finished; with the same URL none begins any more."""
        query, late = self.query("/files/long", "POST", seconds=2), {"Upload-Length": "4"}
        url = self.ask("POST", f"/uploads/{query}", None, TUS, late, metadata("long")).fields["Location"]
        end = time.monotonic() + PATIENCE
        while self.ask("POST", f"/uploads/{query}", None, TUS, late, metadata("long")).status != 403:
            self.assertLess(time.monotonic(), end)
            time.sleep(0.1)
        self.assertEqual(self.ask("PATCH", url, b"data", APPEND, {"Upload-Offset": "0"}).status, 204)
        self.assertEqual((self.root / "long").read_bytes(), b"data")

    def test_the_log_does_not_give_it_away(self) -> None:
        """The access log has the request, and no signature that works."""
        query = self.query("/files/logged", "PUT")
        self.ask("PUT", f"/files/logged{query}", b"1")
        self.server.wait_for(r"(PUT /files/logged\?)")
        self.assertNotIn(query.rpartition("=")[2], self.server.text)

    def test_the_command(self) -> None:
        """``lwstwisted sign`` prints a URL that curl could use as it is."""
        public = f"http://127.0.0.1:{self.port}"
        command = [script("lwstwisted"), "sign", "--key", self.folder / "keys", "--path", "/files/a%20b"]
        command += ["--expires", "1h", "--method", "PUT", "--max-size", "1K", "--type", "image/png"]
        command += ["--public-url", public]
        made = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE)
        self.assertEqual((made.returncode, made.stderr), (0, ""))
        url = made.stdout.strip()
        self.assertTrue(url.startswith(f"{public}/files/a%20b?"), url)
        path = url.removeprefix(public)
        self.assertEqual(self.ask("PUT", path, b"1", {"Content-Type": "image/png"}).status, 201)
        self.assertEqual((self.root / "a b").read_bytes(), b"1")
        for words, status, said in (
            (["--key", "missing", "--path", "/files/a", "--expires", "1h"], 1, "No such file"),
            (["--key", "keys", "--path", "/a", "--expires", "1h"], 1, "/files/"),
            (["--key", "keys", "--path", "/files/a"], 2, "--expires"),
        ):
            command = [script("lwstwisted"), "sign", *words]
            made = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE)
            self.assertEqual((made.returncode, said in made.stderr), (status, True), made.stderr)


class HostTests(SynchronousTestCase):
    """Names that lead here without being ours."""

    def statuses(self, *options: str) -> dict[str, str]:
        folder = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        base = [script("twistd"), "--nodaemon", "--pidfile=", "--reactor=lws", "lwstwisted", "--root", folder / "root"]
        with serving([*base, "--listen", "tcp:0", *options], cwd=folder) as server:
            (port,) = server.wait_for_ports()
            found = {}
            for path in ("/files/", "/uploads/", "/healthz"):
                for host in (f"127.0.0.1:{port}", f"localhost:{port}", "evil.example", "up.example.org"):
                    client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
                    client.request("OPTIONS", path, headers={"Host": host})
                    found[f"{path} {host.partition(':')[0]}"] = str(client.getresponse().status)
                    client.close()
            return {name: status for name, status in found.items() if status == "421"}

    def test_on_loopback(self) -> None:
        """Without rules only the names of loopback are served files; a probe for life may call us anything."""
        refused = self.statuses()
        wanted = {f"{path} {host}" for path in ("/files/", "/uploads/") for host in ("evil.example", "up.example.org")}
        self.assertEqual(set(refused), wanted)

    def test_by_name(self) -> None:
        """What the operator names is ours, and nothing else."""
        refused = self.statuses("--host", "up.example.org")
        others = ("evil.example", "127.0.0.1", "localhost")
        wanted = {f"{path} {host}" for path in ("/files/", "/uploads/") for host in others}
        self.assertEqual(set(refused), wanted)

    def test_anybody(self) -> None:
        """Who says --anonymous means everybody."""
        self.assertEqual(self.statuses("--anonymous"), {})
