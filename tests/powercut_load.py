"""Clients of a service that loses its power.

:class:`Client` sends, :class:`Person` has the root for himself and asks no service; what they know is told in
``tests/powercut_history.py``. Who writes in another way is a method of :class:`Client` with a row in :data:`WAYS`;
uploads of several requests are in ``tests/powercut_uploads.py``.
Nothing here is a test.
"""

from __future__ import annotations

import hashlib
import http.client
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

from tests.calllog import Calls
from tests.powercut_history import History, Operation
from tests.powercut_http import NO_HEADERS, Connections
from tests.powercut_mutants import environment
from tests.powercut_uploads import Uploader, WrongAnswer
from tests.servers import PATIENCE, Server, serving

TOP = Path(__file__).parent.parent

PROCESSES = 2
"""Services on one root."""

OLD_FOLDERS = 3
HOT_NAMES = 4
"""Names of each old folder that all clients replace and delete."""
SMALL_FORM, LARGE_FORM = 8, 60
"""Files of most forms, and of some."""


class Client(Thread):
    """Sends one thing after another until it is stopped or the service is gone.

    :param ports: of services on one root; it changes between them.
    :param names: common to all clients.
    """

    def __init__(self, seed: str, ports: Sequence[int], history: History, names: Names, stop: Event) -> None:
        super().__init__(name=seed)
        self._rng = random.Random(seed)
        self._ports = ports
        self._history = history
        self._names = names
        self._stop_event = stop
        self._connections = Connections()
        self._uploader = Uploader(seed, self._rng, ports, self._connections, history, names)
        self._number = itertools.count()
        self._etag = ""

    def run(self) -> None:
        try:
            while not self._stop_event.is_set():
                self._one()
        except (OSError, http.client.HTTPException) as error:
            if not self._stop_event.is_set():
                self._history.problems.append(f"a connection failed before the cut: {error!r}")
        except WrongAnswer as wrong:
            self._history.problems.append(str(wrong))
        finally:
            self._connections.close()

    def _one(self) -> None:
        [way] = self._rng.choices([way for way, _ in WAYS], [weight for _, weight in WAYS])
        way(self)

    def put_new(self) -> None:
        self._put("new", self._names.new(self._rng))

    def put_below_new(self) -> None:
        self._put("new folder", self._names.new_below(self._rng))

    def replace(self) -> None:
        self._put("replace", self._names.hot(self._rng))

    def _put(self, kind: str, name: str) -> None:
        body = self._content()
        self._ask(Operation(kind, {name: hashlib.sha256(body).hexdigest()}), "PUT", f"/files/{name}", body)

    def delete(self) -> None:
        name = self._names.any_known(self._rng)
        self._ask(Operation("delete", {name: None}), "DELETE", f"/files/{name}")

    def claim(self) -> None:
        """Create a file on all services at once: one of them may."""
        name, asked = self._names.claim(), []
        for port in self._rng.sample(self._ports, len(self._ports)):
            body = self._content()
            operation = Operation("claim", {name: hashlib.sha256(body).hexdigest()})
            asked.append((port, operation))
            self._send(port, operation, "PUT", f"/files/{name}", body, {"If-None-Match": "*"})
        for port, operation in asked:
            self._receive(port, operation)

    def match(self) -> None:
        """Replace a file on all services at once, as it was seen: one of them may."""
        name, body, asked = self._names.claim(), self._content(), []
        self._ask(Operation("seen", {name: hashlib.sha256(body).hexdigest()}), "PUT", f"/files/{name}", body)
        headers = {"If-Match": self._etag}
        for port in self._rng.sample(self._ports, len(self._ports)):
            body = self._content()
            operation = Operation("match", {name: hashlib.sha256(body).hexdigest()})
            asked.append((port, operation))
            self._send(port, operation, "PUT", f"/files/{name}", body, headers)
        for port, operation in asked:
            self._receive(port, operation)

    def _content(self) -> bytes:
        """No two are alike."""
        size = self._rng.choice([0, 100, 5000, 20000]) if self._rng.random() < 0.97 else 300_000
        return f"{self.name} {next(self._number)} ".encode() + self._rng.randbytes(self._rng.randrange(size + 1))

    def form(self) -> None:
        rng, names = self._rng, self._names
        folder = names.new_folder(rng) if rng.random() < 0.3 else names.old_folder(rng)
        count = rng.randint(1, SMALL_FORM if rng.random() < 0.8 else LARGE_FORM)
        files = {names.form_file(folder, rng): self._content() for _ in range(count)}
        boundary = "b0undary" + rng.randbytes(8).hex()
        body = b"".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="f"; filename="{name.rpartition("/")[2]}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n".encode() + content + b"\r\n"
            for name, content in files.items()
        )
        body += f"--{boundary}--\r\n".encode()
        operation = Operation("form", {name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        names.wanted = list(files)
        self._ask(operation, "POST", f"/files/{folder}/", body, headers)

    def resume(self) -> None:
        """Do one thing for an upload of several requests."""
        self._uploader.one()

    def _ask(
        self, operation: Operation, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = NO_HEADERS
    ) -> None:
        port = self._rng.choice(self._ports)
        self._send(port, operation, method, path, body, headers)
        self._receive(port, operation)

    def _send(
        self, port: int, operation: Operation, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> None:
        self._history.begin(operation)
        self._connections.send(port, method, path, body, headers)

    def _receive(self, port: int, operation: Operation) -> None:
        response = self._connections.answer(port)
        self._etag = response.headers.get("ETag", "")
        if response.status in (200, 201, 204):
            # Before the rest of the answer is read: what the disk is told meanwhile doesn't count.
            operation.is_new = response.status == 201 and operation.kind != "form"
            self._history.end(operation)
            self._names.note(operation)
        elif response.status in (404, 412):
            self._history.refuse(operation)
        else:
            self._history.problems.append(f"{operation.kind} of {operation.files} was answered {response.status}")
        response.read()


WAYS: Sequence[tuple[Callable[[Client], None], int]] = [
    (Client.put_new, 18),
    (Client.put_below_new, 8),
    (Client.replace, 20),
    (Client.delete, 14),
    (Client.claim, 18),
    (Client.match, 12),
    (Client.form, 22),
    (Client.resume, 100),
]
"""What clients do, and how often."""


class Person(Thread):
    """Puts files where forms are about to put theirs, with no service in between, and overwrites nothing.

    :param root: of the services.
    :param log: where his calls are noted, if they have to be.
    :ivar leave: ends it.
    """

    def __init__(self, seed: str, root: Path, history: History, names: Names, log: Path | None = None) -> None:
        super().__init__(name=seed)
        self._rng = random.Random(seed)
        self._root = root
        self._history = history
        self._names = names
        self.leave = Event()
        self._calls: Any = os if log is None else Calls(log)

    def run(self) -> None:
        try:
            while not self.leave.wait(self._rng.uniform(0.001, 0.005)):
                self._one()
        except OSError as error:
            self._history.problems.append(f"a file failed before the cut: {error!r}")
        finally:
            if isinstance(self._calls, Calls):
                self._calls.close()

    def _one(self) -> None:
        wanted = self._names.wanted
        if not wanted:
            return
        name = self._rng.choice(wanted)
        try:
            folder = os.open((self._root / name).parent, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return
        try:
            self._put(folder, name)
        finally:
            os.close(folder)

    def _put(self, folder: int, name: str) -> None:
        calls, body = self._calls, self._rng.randbytes(100)
        operation = Operation("by hand", {name: hashlib.sha256(body).hexdigest()})
        file = calls.open(".", os.O_WRONLY | os.O_TMPFILE, 0o644, dir_fd=folder)
        try:
            calls.pwrite(file, body, 0)
            calls.fsync(file)
            self._history.begin(operation)
            target = name.rpartition("/")[2]
            calls.link(f"/proc/self/fd/{file}", target, dst_dir_fd=folder, follow_symlinks=True)
            calls.fsync(folder)
            self._history.end(operation)
        except (FileExistsError, FileNotFoundError):  # of a folder that is gone
            self._history.refuse(operation)
        finally:
            os.close(file)


class Names:
    """Names to upload to.

    :param load: a number that no other load of this file system has.
    :ivar wanted: by the last form.
    """

    def __init__(self, load: int) -> None:
        self._load = load
        self._number = itertools.count()
        self._known: list[str] = []
        self.wanted: Sequence[str] = ()
        self._lock = Lock()

    def _unique(self) -> str:
        return f"{self._load}-{next(self._number)}"

    def old_folder(self, rng: random.Random) -> str:
        return f"old{rng.randrange(OLD_FOLDERS)}"

    def new_folder(self, rng: random.Random) -> str:
        above = rng.choice(["", f"{self.old_folder(rng)}/"])
        return above + "/".join(f"f{self._unique()}" for _ in range(rng.randint(1, 3)))

    def hot(self, rng: random.Random) -> str:
        return f"{self.old_folder(rng)}/hot{rng.randrange(HOT_NAMES)}"

    def new(self, rng: random.Random) -> str:
        return f"{self.old_folder(rng)}/n{self._unique()}"

    def new_below(self, rng: random.Random) -> str:
        return f"{self.new_folder(rng)}/n{self._unique()}"

    def form_file(self, folder: str, rng: random.Random) -> str:
        return f"{folder}/hot{rng.randrange(HOT_NAMES)}" if rng.random() < 0.3 else f"{folder}/n{self._unique()}"

    def claim(self) -> str:
        return f"claims/c{self._unique()}"

    def whole(self, rng: random.Random) -> str:
        """Of an upload of several requests: without a folder."""
        return f"hot{rng.randrange(HOT_NAMES)}" if rng.random() < 0.2 else f"w{self._unique()}"

    def any_known(self, rng: random.Random) -> str:
        with self._lock:
            if self._known and rng.random() < 0.5:
                return self._known.pop(rng.randrange(len(self._known)))
        return self.hot(rng)

    def note(self, operation: Operation) -> None:
        if operation.kind in ("new", "new folder", "form", "finish"):
            with self._lock:
                self._known += [name for name in operation.files if not name.rpartition("/")[2].startswith("hot")]


@contextmanager
def services(
    root: Path, mutant: str, folder: Path, processes: int = PROCESSES, calls: Path | None = None
) -> Iterator[tuple[list[Server], list[int]]]:
    """Run services on one root, with their ports.

    :param mutant: or "".
    :param folder: for files of the mutant.
    :param calls: a log of their calls, if they have to note them.
    """
    extra = environment(folder / "site", mutant, calls)
    command = [sys.executable, "-m", "lwstwisted", "serve", "--root", root, "--durability", "full"]
    command += ["--listen", "tcp:0:interface=127.0.0.1", "--access-log", os.devnull]
    with ExitStack() as stack:
        found = [
            stack.enter_context(serving([str(word) for word in command], cwd=TOP, environment=extra))
            for _ in range(processes)
        ]
        yield found, [server.wait_for_ports()[0] for server in found]


@dataclass
class Load:
    """Clients under way; :func:`load` starts them.

    :ivar stop: is set when what fails from now on is no failure.
    """

    stop: Event
    clients: Sequence[Client]
    person: Person

    def finish(self) -> None:
        """Stop all, and wait for what they are doing."""
        self.stop.set()
        self.stop_person()
        for client in self.clients:
            _join(client)

    def stop_person(self) -> None:
        """Nobody changes the files any more but the services."""
        self.person.leave.set()
        _join(self.person)


def _join(thread: Thread) -> None:
    thread.join(PATIENCE)
    if thread.is_alive():
        raise AssertionError("a client hangs")


@contextmanager
def load(
    seed: str, ports: Sequence[int], root: Path, history: History, number: int, clients: int, calls: Path | None = None
) -> Iterator[Load]:
    """Start clients, and a person; whatever happens, nobody uses the root behind the block.

    :param number: of this load, on this file system.
    :param calls: a log of what the person does, if that has to be noted.
    """
    stop, names = Event(), Names(number)
    started = [Client(f"{seed}.{client}", ports, history, names, stop) for client in range(clients)]
    person = Person(f"{seed}.person", root, history, names, calls)
    for thread in (*started, person):
        thread.start()
    under_way = Load(stop, started, person)
    try:
        yield under_way
    finally:
        stop.set()
        under_way.stop_person()
