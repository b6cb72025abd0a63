"""Clients of a service that loses its power, and what they know afterwards.

:class:`Client` sends; :class:`History` keeps what was sent, when, and what was acknowledged, and judges what is there
after a cut. Nothing here is a test.
"""

from __future__ import annotations

import hashlib
import http.client
import itertools
import os
import random
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, Thread

from tests.powercut_mutants import environment
from tests.servers import PATIENCE, Server, serving

TOP = Path(__file__).parent.parent

PROCESSES = 2
"""Services on one root."""
LAST = sys.maxsize
"""A position behind all others."""
NO_HEADERS: Mapping[str, str] = {}

OLD_FOLDERS = 3
HOT_NAMES = 4
"""Names of each old folder that all clients replace and delete."""
SMALL_FORM, LARGE_FORM = 8, 60
"""Files of most forms, and of some."""


# What the clients know

State = str | None
"""What a name has: the digest of a file, or no file."""


@dataclass(eq=False)
class Operation:
    """Something that a client asked for.

    :ivar files: what it leaves: for each name the state.
    :ivar begun: before it was sent, in the common time of all clients.
    :ivar begun_at: before it was sent, as a position of the log.
    :ivar ended: after it was acknowledged; None if it never was.
    :ivar ended_at: likewise.
    """

    kind: str
    files: dict[str, State]
    begun: int = 0
    begun_at: int = 0
    ended: int | None = None
    ended_at: int | None = None

    def is_acknowledged(self, position: int) -> bool:
        return self.ended_at is not None and self.ended_at <= position

    def is_before(self, other: Operation) -> bool:
        return self.ended is not None and self.ended < other.begun


@dataclass
class History:
    """All operations of a load.

    :ivar position: of the log, now; always 0 where there is none.
    """

    position: Callable[[], int] = lambda: 0
    operations: list[Operation] = field(default_factory=list)
    refused: int = 0
    problems: list[str] = field(default_factory=list)
    _time: Iterator[int] = field(default_factory=itertools.count)

    def begin(self, operation: Operation) -> None:
        """It is about to be sent."""
        operation.begun_at = self.position()
        operation.begun = next(self._time)
        self.operations.append(operation)

    def end(self, operation: Operation) -> None:
        """It was acknowledged."""
        operation.ended_at = self.position()
        operation.ended = next(self._time)

    def refuse(self, operation: Operation) -> None:
        """It was refused, so it must not leave anything."""
        self.refused += 1
        self.operations.remove(operation)

    def count(self, position: int = LAST) -> int:
        """Operations acknowledged before a position."""
        return sum(operation.is_acknowledged(position) for operation in self.operations)

    def go_on_from(self, found: Mapping[str, State]) -> None:
        """Forget all but what is there: the next load begins with it."""
        self.operations = []
        for name, state in found.items():
            operation = Operation("found", {name: state})
            self.begin(operation)
            self.end(operation)

    def judge(self, found: Mapping[str, State], position: int = LAST) -> list[str]:
        """What is wrong with the files that are there after a cut at a position of the log."""
        begun = [operation for operation in self.operations if operation.begun_at < position]
        by_name: dict[str, list[Operation]] = {}
        for operation in begun:
            for name in operation.files:
                by_name.setdefault(name, []).append(operation)
        problems = [f"nobody sent {name}" for name in found if name not in by_name]
        for name, operations in by_name.items():
            problems += _judge_name(name, found.get(name), operations, position)
        for operation in begun:
            if operation.kind == "form":
                problems += _judge_form(operation, found, by_name)
        return problems


def _judge_name(name: str, state: State, operations: list[Operation], position: int) -> list[str]:
    acknowledged = [operation for operation in operations if operation.is_acknowledged(position)]
    possible = {
        operation.files[name]
        for operation in operations
        if not any(operation.is_before(later) for later in acknowledged)
    }
    if not acknowledged:
        possible.add(None)
    claims = [operation for operation in acknowledged if operation.kind == "claim"]
    if len(claims) > 1:
        return [f"lost: {name}, which was created {len(claims)} times"]
    if claims:
        possible = {claims[0].files[name]}
    if state in possible:
        return []
    if state is None:
        return [f"lost: {name}, of {' or '.join(sorted({o.kind for o in acknowledged}))}"]
    if not any(operation.files[name] == state for operation in operations):
        return [f"torn: {name} has bytes that nobody sent"]
    return [f"lost: {name} has gone back to an older file"]


def _judge_form(form: Operation, found: Mapping[str, State], by_name: Mapping[str, list[Operation]]) -> list[str]:
    there = [name for name, state in form.files.items() if found.get(name) == state]
    if not there:
        return []
    problems = []
    for name in form.files:
        state = found.get(name)
        causes = [operation for operation in by_name[name] if operation.files[name] == state]
        if all(cause.is_before(form) for cause in causes):
            problems.append(f"torn: of a form with {len(form.files)} files {there[0]} is there and {name} is not")
    return problems


def look(root: Path) -> tuple[dict[str, State], list[str]]:
    """All files that are visible, and what is wrong with the store's own folders."""
    found: dict[str, State] = {}
    problems = []
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if path.is_dir():
            continue
        if not name.startswith(".lwstwisted/"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for kind in ("partial", "batches"):
        problems += [f"left over: {kind}/{name}" for name in os.listdir(root / ".lwstwisted" / kind)]
    return found, problems


# The load


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
        self._connections: dict[int, http.client.HTTPConnection] = {}
        self._number = itertools.count()

    def run(self) -> None:
        try:
            while not self._stop_event.is_set():
                self._one()
        except (OSError, http.client.HTTPException) as error:
            if not self._stop_event.is_set():
                self._history.problems.append(f"a connection failed before the cut: {error!r}")
        finally:
            for connection in self._connections.values():
                connection.close()

    def _one(self) -> None:
        rng, names = self._rng, self._names
        choice = rng.choices(["new", "new folder", "replace", "delete", "claim", "form"], [18, 8, 20, 14, 18, 22])[0]
        if choice == "form":
            self._form()
        elif choice == "claim":
            self._claim()
        elif choice == "delete":
            name = names.any_known(rng)
            self._ask(Operation(choice, {name: None}), "DELETE", name)
        else:
            name = {"new": names.new, "new folder": names.new_below, "replace": names.hot}[choice](rng)
            body = self._content()
            self._ask(Operation(choice, {name: hashlib.sha256(body).hexdigest()}), "PUT", name, body)

    def _claim(self) -> None:
        """Create a file on all services at once: one of them may."""
        name, asked = self._names.claim(), []
        for port in self._rng.sample(self._ports, len(self._ports)):
            body = self._content()
            operation = Operation("claim", {name: hashlib.sha256(body).hexdigest()})
            asked.append((port, operation))
            self._send(port, operation, "PUT", name, body, {"If-None-Match": "*"})
        for port, operation in asked:
            self._receive(port, operation)

    def _content(self) -> bytes:
        """No two are alike."""
        size = self._rng.choice([0, 100, 5000, 20000]) if self._rng.random() < 0.97 else 300_000
        return f"{self.name} {next(self._number)} ".encode() + self._rng.randbytes(self._rng.randrange(size + 1))

    def _form(self) -> None:
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
        self._ask(operation, "POST", f"{folder}/", body, headers)

    def _ask(
        self, operation: Operation, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = NO_HEADERS
    ) -> None:
        port = self._rng.choice(self._ports)
        self._send(port, operation, method, path, body, headers)
        self._receive(port, operation)

    def _send(
        self, port: int, operation: Operation, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> None:
        connection = self._connections.get(port)
        if connection is None:
            connection = self._connections[port] = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._history.begin(operation)
        connection.request(method, f"/files/{path}", body, dict(headers))

    def _receive(self, port: int, operation: Operation) -> None:
        response = self._connections[port].getresponse()
        if response.status in (201, 204):
            # Before the rest of the answer is read: what the disk is told meanwhile doesn't count.
            self._history.end(operation)
            self._names.note(operation)
        elif response.status in (404, 412):
            self._history.refuse(operation)
        else:
            self._history.problems.append(f"{operation.kind} of {operation.files} was answered {response.status}")
        response.read()


class Names:
    """Names to upload to.

    :param load: a number that no other load of this file system has.
    """

    def __init__(self, load: int) -> None:
        self._load = load
        self._number = itertools.count()
        self._known: list[str] = []
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

    def any_known(self, rng: random.Random) -> str:
        with self._lock:
            if self._known and rng.random() < 0.5:
                return self._known.pop(rng.randrange(len(self._known)))
        return self.hot(rng)

    def note(self, operation: Operation) -> None:
        if operation.kind in ("new", "new folder", "form"):
            with self._lock:
                self._known += [name for name in operation.files if "/hot" not in name]


@contextmanager
def services(root: Path, mutant: str, folder: Path) -> Iterator[tuple[list[Server], list[int]]]:
    """Run services on one root, with their ports.

    :param mutant: or "".
    :param folder: for files of the mutant.
    """
    extra = environment(folder / "site", mutant) if mutant else {}
    command = [sys.executable, "-m", "lwstwisted", "serve", "--root", root, "--durability", "full"]
    command += ["--listen", "tcp:0:interface=127.0.0.1", "--access-log", os.devnull]
    with ExitStack() as stack:
        found = [
            stack.enter_context(serving([str(word) for word in command], cwd=TOP, environment=extra))
            for _ in range(PROCESSES)
        ]
        yield found, [server.wait_for_ports()[0] for server in found]


def load(seed: str, ports: Sequence[int], history: History, number: int, clients: int) -> tuple[Event, list[Client]]:
    """Start clients.

    :param number: of this load, on this file system.
    """
    stop, names = Event(), Names(number)
    started = [Client(f"{seed}.{client}", ports, history, names, stop) for client in range(clients)]
    for client in started:
        client.start()
    return stop, started


def finish(stop: Event, clients: Iterable[Client]) -> None:
    """Stop clients, and wait for what they are doing."""
    stop.set()
    for client in clients:
        client.join(PATIENCE)
        if client.is_alive():
            raise AssertionError("a client hangs")
