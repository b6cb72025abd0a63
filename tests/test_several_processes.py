"""Two services on one root: what one of them promises, the other one keeps.

The clients of a race are let in first (``100 Continue``), so that every early look at the name is behind them. Then all
send the rest. Some services take longer than usual for each change of a name (:data:`UNHURRIED`): whoever looks at a
name and changes it later, with nothing that keeps others out in between, is caught in each round.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from twisted.trial.unittest import SynchronousTestCase

from tests.crash import NAMED, prepared
from tests.servers import PATIENCE, Server, serving, twistd, unfinished_beneath, visible_beneath, wait_until

ROUNDS = 20

KIB = 1024

UNHURRIED = """
import os, time
def unhurried(call):
    def change(*arguments, **keywords):
        time.sleep(0.01)
        return call(*arguments, **keywords)
    return change
for name in ("link", "rename", "unlink"):
    setattr(os, name, unhurried(getattr(os, name)))
"""
"""Run in a service before all else."""

STUCK = """
import time
from lwstwisted.stores.tree import Tree
def link(*arguments):
    print("in a commit", flush=True)
    time.sleep(1000)
Tree.link = link
"""
"""A service that never gets through a commit."""

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
BOUNDARY = b"a-boundary"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY.decode()}", "Accept": "application/json"}


class Exchange:
    """A request on a connection of its own, sent in two steps.

    :param body: None for a request without one.
    """

    def __init__(
        self, port: int, method: str, path: str, body: bytes | None, fields: Mapping[str, str] | None = None
    ) -> None:
        self.body = body or b""
        lines = [f"{method} /files/{path} HTTP/1.1", "Host: a", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in (fields or {}).items()]
        if body is not None:
            lines += [f"Content-Length: {len(body)}", "Expect: 100-continue"]
        head = "\r\n".join([*lines, "", ""]).encode()
        self._sent, self._rest = (head, self.body) if body is not None else (head[:-1], head[-1:])
        self._method, self._is_asking = method, body is not None
        self._socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self._socket.sendall(self._sent)

    def let_in(self) -> None:
        """Wait until the server wants the body."""
        if self._is_asking:
            said = self._socket.recv(len(CONTINUE), socket.MSG_WAITALL)
            assert said == CONTINUE, said

    def send(self, count: int | None = None) -> None:
        """Send the rest, or so many bytes of it."""
        piece, self._rest = (self._rest, b"") if count is None else (self._rest[:count], self._rest[count:])
        self._socket.sendall(piece)

    def answer(self) -> http.client.HTTPResponse:
        """Wait for the answer, and close."""
        response = http.client.HTTPResponse(self._socket, method=self._method)
        try:
            response.begin()
            response.content = response.read()  # type: ignore[attr-defined]
        finally:
            response.close()
            self._socket.close()
        return response

    def close(self) -> None:
        self._socket.close()


def race(exchanges: Sequence[Exchange]) -> list[int]:
    """Let everybody in, let everybody send the rest, and give the statuses."""
    for exchange in exchanges:
        exchange.let_in()
    for exchange in exchanges:
        exchange.send()
    return [exchange.answer().status for exchange in exchanges]


def ask(port: int, method: str, path: str, body: bytes | None = None) -> http.client.HTTPResponse:
    """One request."""
    exchange = Exchange(port, method, path, body)
    exchange.let_in()
    exchange.send()
    return exchange.answer()


def form_of(files: Mapping[str, bytes]) -> bytes:
    head = b'--%b\r\nContent-Disposition: form-data; name="f"; filename="%b"\r\n\r\n%b\r\n'
    parts = [head % (BOUNDARY, name.encode(), data) for name, data in files.items()]
    return b"".join(parts) + b"--%b--\r\n" % BOUNDARY


class SeveralCase(SynchronousTestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.root = self.folder / "root"
        self.root.mkdir()

    def start(self, *preludes: str) -> list[tuple[Server, int]]:
        """A service for each prelude, and its port."""
        command = twistd("--root", self.root, "--listen", "tcp:0:interface=127.0.0.1")
        servers = [
            self.enterContext(serving(prepared(command, prelude), cwd=self.folder)) for prelude in preludes
        ]
        return [(server, server.wait_for_ports()[0]) for server in servers]

    def ports(self, prelude: str) -> list[int]:
        """Two services, and where they listen."""
        return [port for _, port in self.start(prelude, prelude)]

    def contents(self, name: str) -> bytes | None:
        """What is on the disk, None for nothing."""
        with contextlib.suppress(FileNotFoundError):
            return (self.root / name).read_bytes()
        return None

    def put(self, port: int, name: str, body: bytes) -> str:
        """Upload a file; gives its entity-tag."""
        response = ask(port, "PUT", name, body)
        self.assertIn(response.status, (201, 204))
        return response.headers["ETag"]

    def rounds(self, one: Callable[[int], object]) -> None:
        """Call ``one`` for each round; it gives what is wrong, or nothing."""
        found = [(number, wrong) for number in range(ROUNDS) if (wrong := one(number))]
        self.assertEqual(found, [], f"{len(found)} of {ROUNDS} rounds")


class RaceTests(SeveralCase):
    """Exactly one of those who can't all be right wins, though they ask different processes."""

    def create_only(self, prelude: str) -> None:
        ports = self.ports(prelude)

        def one(number: int) -> object:
            name = f"new-{number}"
            exchanges = [
                Exchange(ports[client % 2], "PUT", name, b"%d of %d" % (client, number), {"If-None-Match": "*"})
                for client in range(50)
            ]
            return self.wrong(name, exchanges, race(exchanges), 201)

        self.rounds(one)

    def wrong(self, name: str, exchanges: list[Exchange], statuses: list[int], wanted: int) -> object:
        """What isn't as it has to be: one got what it wanted, the file is that one's, and all others had 412."""
        if sorted(statuses) != [wanted] + [412] * (len(statuses) - 1):
            return sorted(statuses)[:4]
        winner = exchanges[statuses.index(wanted)].body
        return None if self.contents(name) == winner else "another one's file"

    @pytest.mark.slow
    def test_create_only(self) -> None:
        """Fifty clients make one name with ``If-None-Match: *``: one 201, 49 times 412, and the file is the 201's."""
        self.create_only("")

    @pytest.mark.slow
    def test_create_only_unhurried(self) -> None:
        """The same where a name changes hands slowly."""
        self.create_only(UNHURRIED)

    def update(self, prelude: str) -> None:
        ports = self.ports(prelude)

        def one(number: int) -> object:
            etag = self.put(ports[number % 2], "file", b"before %d" % number)
            exchanges = [
                Exchange(ports[client % 2], "PUT", "file", b"%d of %d" % (client, number), {"If-Match": etag})
                for client in range(20)
            ]
            return self.wrong("file", exchanges, race(exchanges), 204)

        self.rounds(one)

    @pytest.mark.slow
    def test_update(self) -> None:
        """Twenty clients replace what they all have read: one 204, and nobody's change is lost unseen."""
        self.update("")

    @pytest.mark.slow
    def test_update_unhurried(self) -> None:
        """The same where a name changes hands slowly."""
        self.update(UNHURRIED)

    def delete_or_update(self, prelude: str) -> None:
        ports = self.ports(prelude)

        def one(number: int) -> object:
            etag = self.put(ports[0], "file", b"before %d" % number)
            body, condition = b"after %d" % number, {"If-Match": etag}
            side = number % 2
            delete = Exchange(ports[side], "DELETE", "file", None, condition)
            update = Exchange(ports[1 - side], "PUT", "file", body, condition)
            order = [delete, update] if number % 4 < 2 else [update, delete]
            answers = dict(zip(order, race(order), strict=True))
            seen = (answers[delete], answers[update], self.contents("file"))
            return None if seen in ((204, 412, None), (412, 204, body)) else seen

        self.rounds(one)

    @pytest.mark.slow
    def test_delete_or_update(self) -> None:
        """One removes what another one replaces, and both name what they have read: one is told that it's too late."""
        self.delete_or_update("")

    @pytest.mark.slow
    def test_delete_or_update_unhurried(self) -> None:
        """The same where a name changes hands slowly."""
        self.delete_or_update(UNHURRIED)

    def forms(self, prelude: str) -> None:
        ports = self.ports(prelude)
        batches = self.root / ".lwstwisted" / "batches"

        def one(number: int) -> object:
            folder, only_new = f"forms-{number}", {"If-None-Match": "*"}
            contents = [{f"{file}": b"%d %d %d" % (client, file, number) for file in range(5)} for client in range(6)]
            contents += [{f"{client % 5}": b"%d %d" % (client, number)} for client in range(10)]
            forms = [
                Exchange(ports[client % 2], "POST", f"{folder}/", form_of(files), FORM | only_new)
                for client, files in enumerate(contents[:6])
            ]
            files = [
                Exchange(ports[client % 2], "PUT", f"{folder}/{name}", data, only_new)
                for client, one in enumerate(contents[6:])
                for name, data in one.items()
            ]
            for exchange in forms + files:
                exchange.let_in()
            for form in forms:
                form.send(len(form.body) - 1)
            wait_until(lambda: len(list(batches.glob("*/4"))) == len(forms), "all files of all forms were stored")
            for form in forms:
                form.send()
            wait_until(
                lambda: list(batches.glob("*/journal")) or (self.root / folder / "4").exists(), "a form was committed"
            )
            for file in files:
                file.send()
            statuses = [exchange.answer().status for exchange in forms + files]
            winners = [files for files, status in zip(contents, statuses, strict=True) if status == 201]
            wanted = {name: data for winner in winners for name, data in winner.items()}
            is_right = {*statuses} == {201, 412} and len(wanted) == sum(map(len, winners))
            there = {name: self.contents(f"{folder}/{name}") for name in os.listdir(self.root / folder)}
            return None if is_right and there == wanted else statuses

        self.rounds(one)

    @pytest.mark.slow
    def test_forms(self) -> None:
        """Forms and files compete for names that must be new: no two win the same one, and a form wins all of its."""
        self.forms("")

    @pytest.mark.slow
    def test_forms_unhurried(self) -> None:
        """The same where a name changes hands slowly."""
        self.forms(UNHURRIED)

    @pytest.mark.slow
    def test_new_folder(self) -> None:
        """Sixty-four files at once go to a folder that isn't there yet: all of them arrive."""
        for prelude in ("", UNHURRIED):
            ports = self.ports(prelude)
            folder = f"a{len(prelude)}/b/c"
            exchanges = [
                Exchange(ports[number % 2], "PUT", f"{folder}/{number}", b"file %d" % number) for number in range(64)
            ]
            self.assertEqual(race(exchanges), [201] * 64)
            for number in range(64):
                self.assertEqual(self.contents(f"{folder}/{number}"), b"file %d" % number)
                self.assertEqual(ask(ports[number % 2], "GET", f"{folder}/{number}").status, 200)

    @pytest.mark.slow
    def test_what_one_stores_the_other_serves(self) -> None:
        """With the same entity-tag, so that conditions hold whoever is asked."""
        one, other = self.ports("")
        etag = self.put(one, "file", b"contents")
        response = ask(other, "GET", "file")
        self.assertEqual((response.content, response.headers["ETag"]), (b"contents", etag))
        self.assertEqual(ask(other, "DELETE", "file").status, 204)
        self.assertEqual(ask(one, "GET", "file").status, 404)


class DeathTests(SeveralCase):
    """One process is killed, and another one lives."""

    def uploads(self, port: int, tag: str) -> list[Exchange]:
        """Five files and three forms that are under way: their bytes are with the store, and some are missing."""
        data = os.urandom(600 * KIB)
        files = [Exchange(port, "PUT", f"{tag}/{number}", data) for number in range(5)]
        forms = [
            Exchange(port, "POST", f"{tag}-form/", form_of({f"{number}a": data, f"{number}b": data}), FORM)
            for number in range(3)
        ]
        for exchange in files + forms:
            exchange.let_in()
            exchange.send(len(exchange.body) - 100 * KIB)
            self.addCleanup(exchange.close)
        return files + forms

    def own_names(self) -> set[str]:
        """Unfinished files and batches."""
        return {*unfinished_beneath(self.root), *os.listdir(self.root / ".lwstwisted" / "batches")}

    def wait_for_uploads(self, server: Server, files: int, forms: int) -> None:
        """Wait until a service holds :meth:`uploads`: each form has its first file, and the second one is open.

        :param files: that are unfinished in all services and have a name.
        :param forms: in all services.
        """
        state = self.root / ".lwstwisted"

        def is_so() -> bool:
            batches = [state / "batches" / name for name in os.listdir(state / "batches")]
            # The only link: the name that the first file had before is gone.
            firsts = [batch for batch in batches if (batch / "0").exists() and (batch / "0").stat().st_nlink == 1]
            is_open = len(server.open_beneath(state / "partial")) == 8
            return is_open and len(firsts) == forms and len(unfinished_beneath(self.root)) == files

        wait_until(is_so, "the uploads were on the disk")

    def kill_one(self, prelude: str, files: int) -> None:
        (living, here), (dying, there) = self.start(prelude, prelude)
        survivors = self.uploads(here, "living")
        self.wait_for_uploads(living, files, 3)
        owned = self.own_names()
        victims = self.uploads(there, "dying")
        self.wait_for_uploads(dying, 2 * files, 6)
        dying.end(signal.SIGKILL)
        self.put(here, "beside", b"goes on")

        ((_, third),) = self.start(prelude)
        self.assertEqual(self.own_names(), owned)
        self.assertEqual(visible_beneath(self.root), ["beside"])
        self.put(third, "later", b"goes on")
        self.assertEqual(race_to_the_end(survivors), [201] * 8)
        for exchange, name in zip(survivors, [f"living/{number}" for number in range(5)], strict=False):
            self.assertEqual(self.contents(name), exchange.body)
        names = sorted(f"{number}{letter}" for number in range(3) for letter in "ab")
        self.assertEqual(sorted(os.listdir(self.root / "living-form")), names)
        self.assertFalse((self.root / "dying").exists() or (self.root / "dying-form").exists())
        wait_until(lambda: not self.own_names(), "nothing unfinished is left")
        for exchange in victims:
            exchange.close()

    @pytest.mark.slow
    def test_kill(self) -> None:
        """The next start sweeps what the dead one left; what the living one has under way is completed."""
        self.kill_one("", 0)

    @pytest.mark.slow
    def test_kill_with_names(self) -> None:
        """The same on a file system where unfinished files have names."""
        self.kill_one(NAMED, 8)

    @pytest.mark.slow
    def test_kill_inside_a_commit(self) -> None:
        """Who dies with a name in its hands doesn't keep it."""
        (dying, there), (_, here) = self.start(STUCK + "Tree._has_tmpfile = lambda self: True\n", "")
        stuck = Exchange(there, "PUT", "file", b"never")
        self.addCleanup(stuck.close)
        stuck.let_in()
        stuck.send()
        dying.wait_for("in a commit")
        waiting = Exchange(here, "PUT", "file", b"contents", {"If-None-Match": "*"})
        waiting.let_in()
        waiting.send()
        dying.end(signal.SIGKILL)
        self.assertEqual(waiting.answer().status, 201)
        self.assertEqual(self.contents("file"), b"contents")


def race_to_the_end(exchanges: Sequence[Exchange]) -> list[int]:
    """Send what is missing, and give the statuses."""
    for exchange in exchanges:
        exchange.send()
    return [exchange.answer().status for exchange in exchanges]
