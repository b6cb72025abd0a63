"""A server that is killed again and again under load, and an oracle that knows what its clients were told.

A *life* of the server is: start, judgement of what the life before left, load by :data:`CLIENTS` clients, SIGKILL. The
moment of the kill is drawn from a seed and counted in events (:data:`EVENTS`), so that each phase of a request is hit;
to one half of the kills comes a random part of the time that answers take, as that is when names change hands. Now and
then the start behind it is killed too, at one of its own changes to the disk.

**What is allowed.** Each request that may change names is an :class:`Attempt`, with its place in the order of all
begins and ends. A name must show what some attempt would have left, be it acknowledged or cut off by the kill, that no
acknowledged one *followed*: one that began when the first had been answered. So an acknowledged file is never lost, an
acknowledged deletion never undone, and of what was under way either is right, but the files of a form come together or
not at all. What no attempt would have left is torn.

The files that a kill leaves are looked at before the restart too: all that is visible has to be whole then. Behind the
restart everything is judged on the disk and by GET, entity-tags included, and the store's own folders are empty.

SIGKILL says nothing of what is synced: that takes a power cut.

``python -m tests.crash [KILLS]`` runs it; with ``--mutants`` on stores that are broken on purpose (:data:`MUTANTS`),
each of which has to be found out.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import itertools
import json
import math
import random
import re
import ssl
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, Thread

from lwstwisted.certificate import ensure_development_certificate
from tests.servers import (
    PATIENCE,
    Server,
    digest,
    everything_beneath,
    serving,
    tls_endpoint,
    twistd,
    visible_beneath,
    wait_until,
)

CLIENTS = 12
"""Threads, half of them over TLS."""

POOL = 12
"""Names of one client that it makes, replaces and deletes over and over; each life adds others."""

EVENTS = {"begun": 100, "halfway": 60, "sent": 100, "answered": 100, "named": 2}
"""What a kill may follow, and how often that happens before at most: a head was sent, half a body, a whole one; an
answer was read; a form with many files has its first name."""

OLD_READS = 20
"""Files that nobody has touched since they were judged, fetched again after each restart."""

STATE = ".lwstwisted"
BOUNDARY = "crash-boundary"
NOTHING = None

Digest = str | None
"""SHA-256 of what a name shows; None for no file."""


# The oracle


@dataclass(eq=False)
class Attempt:
    """A request that may change names.

    :ivar states: what each of its names shows afterwards.
    :ivar begun: its place in the order of all begins and ends, from before its first byte.
    :ivar only_new: it has ``If-None-Match: *``, so it can't follow another one that made the file.
    :ivar ended: from behind its answer; infinite without one.
    :ivar etags: of its names, as far as clients were told.
    """

    states: Mapping[str, Digest]
    begun: int = -1
    only_new: bool = False
    ended: float = math.inf
    etags: dict[str, str] = field(default_factory=dict)

    @property
    def is_acknowledged(self) -> bool:
        return self.ended < math.inf


class Oracle:
    """What the names of a store may show.

    :ivar acknowledged: all names for which a client ever had a 2xx.
    """

    def __init__(self) -> None:
        self._order = itertools.count()
        self._lock = Lock()
        self._attempts: dict[str, list[Attempt]] = {}
        self._sent: dict[str, set[Digest]] = {}
        self.acknowledged: set[str] = set()

    def begin(self, states: Mapping[str, Digest], only_new: bool = False) -> Attempt:
        """Note a request before its first byte is sent."""
        with self._lock:
            attempt = Attempt(states, next(self._order), only_new)
            for name, state in states.items():
                self._attempts.setdefault(name, [Attempt({name: NOTHING}, ended=-1)]).append(attempt)
                self._sent.setdefault(name, set()).add(state)
            return attempt

    def acknowledge(self, attempt: Attempt, etags: Mapping[str, str]) -> None:
        """Note a 2xx."""
        with self._lock:
            attempt.etags.update(etags)
            attempt.ended = next(self._order)
            self.acknowledged.update(attempt.states)

    def withdraw(self, attempt: Attempt) -> None:
        """Forget a request that was refused, or whose body its client didn't finish."""
        with self._lock:
            for name in attempt.states:
                self._attempts[name].remove(attempt)

    def allowed(self, name: str) -> list[Attempt]:
        """The attempts of which a name may show the result."""
        attempts = self._attempts.get(name, [])
        known = [attempt for attempt in attempts if attempt.is_acknowledged]
        last = [one for one in known if not any(other.begun > one.ended for other in known)]
        is_there = all(attempt.states[name] is not NOTHING for attempt in last)
        open_ones = [attempt for attempt in attempts if not attempt.is_acknowledged]
        return last + [attempt for attempt in open_ones if not (attempt.only_new and is_there)]

    def expected(self, name: str) -> tuple[Digest, str]:
        """What a name shows, and its entity-tag, where only one client uses it and no answer is missing."""
        with self._lock:
            found = self.allowed(name)
            return (found[-1].states[name], found[-1].etags.get(name, "")) if found else (NOTHING, "")

    def complaint(self, name: str, seen: Digest) -> tuple[str, str] | None:
        """What is wrong with a name, as kind and sentence."""
        allowed = self.allowed(name)
        states = {attempt.states[name] for attempt in allowed}
        if seen in states or (seen is NOTHING and not allowed):
            return None
        if seen is not NOTHING and seen not in self._sent.get(name, ()):
            return "torn", f"{name} is nothing that was ever sent whole"
        if not any(one.begun >= 0 or one.states[name] is not NOTHING for one in allowed if one.is_acknowledged):
            return "stray", f"{name} shows what was refused, or cut off before its end"
        return "lost", f"{name} {'is away' if seen is NOTHING else 'has come back'}, against an acknowledged request"

    def halves(self, seen: Mapping[str, Digest]) -> Iterator[str]:
        """Forms without an answer of which some files are there and some are not."""
        forms = {id(one): one for some in self._attempts.values() for one in some if not one.is_acknowledged}
        for form in forms.values():
            there = [name for name, state in form.states.items() if seen.get(name) == state]
            if 0 < len(there) < len(form.states):
                yield f"{len(there)} of the {len(form.states)} files of a form: {there}"

    def touched(self) -> list[str]:
        """Names that may have changed since they were settled."""
        return [name for name, attempts in self._attempts.items() if len(attempts) > 1]

    def names(self) -> list[str]:
        """All names that were ever used."""
        return list(self._attempts)

    def settle(self, name: str, seen: Digest) -> dict[str, str]:
        """Make what a name shows the only thing that it may show; gives the entity-tags that go with it."""
        etags = next((one.etags for one in reversed(self.allowed(name)) if one.states[name] == seen), {})
        settled = Attempt({name: seen}, ended=-1, etags=dict(etags))
        self._attempts[name] = [settled]
        return settled.etags


# What was found out


@dataclass
class Report:
    """What a run has seen.

    :ivar answers: how many requests of each kind were acknowledged.
    :ivar phases: how many kills came in each phase.
    :ivar happened: attempts that were under way in a kill, and are there.
    :ivar vanished: those that are not.
    :ivar left: files and folders of the store's own that kills left, for the sweep.
    :ivar killed_starts: kills of a start.
    :ivar undone: batches that a start took back.
    :ivar bare_folders: folders that were made for a file that never came.
    :ivar wrong: what may not be: kind and sentence.
    """

    kills: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    happened: int = 0
    vanished: int = 0
    left: int = 0
    killed_starts: int = 0
    undone: int = 0
    bare_folders: int = 0
    wrong: list[tuple[str, str]] = field(default_factory=list)

    def add(self, kind: str, sentence: str) -> None:
        self.wrong.append((kind, f"kill {self.kills}: {sentence}"))

    @property
    def kinds(self) -> Counter[str]:
        return Counter(kind for kind, _ in self.wrong)

    def __str__(self) -> str:
        counted = [
            f"{self.kills} kills: {dict(sorted(self.phases.items()))}, and {self.killed_starts} of starts",
            f"acknowledged: {self.answers.total()} {dict(sorted(self.answers.items()))}",
            f"under way in kills: {self.happened + self.vanished}, of which {self.happened} happened",
            f"left for the sweep: {self.left}; batches taken back: {self.undone}; bare folders: {self.bare_folders}",
            f"wrong: {len(self.wrong)} {dict(self.kinds)}",
        ]
        return "\n".join(counted + [f"  {kind}: {sentence}" for kind, sentence in self.wrong[:30]])


# The kill


class Trigger:
    """Kills a server in a moment that was drawn beforehand.

    :param usual: how long a client usually waits for its answer, by kind of request.
    :param root: of its store.
    :ivar has_fired: from just before the kill on.
    """

    def __init__(self, rng: random.Random, server: Server, usual: dict[str, float], root: Path) -> None:
        self.kind, most = rng.choice(list(EVENTS.items()))
        self._left = rng.randint(1, most)
        self._fraction = rng.choice([0.0, rng.random()])
        self._server = server
        self._usual = usual
        self._root = root
        self._lock = Lock()
        self.has_fired = Event()
        self._expected: list[str] = []
        if self.kind == "named":
            Thread(target=self._watch).start()

    def expect(self, name: str) -> None:
        """A form is going to be sent; ``name`` is the first one that it will make."""
        self._expected.append(name)

    def _watch(self) -> None:
        """See names come."""
        while not self.has_fired.wait(0.0001):
            for name in list(self._expected):
                if (self._root / name).exists():
                    self._expected.remove(name)
                    self.event("named", "named")

    def event(self, kind: str, request: str) -> None:
        """Something that a client saw, in a kind of request."""
        if kind != self.kind:
            return
        with self._lock:
            self._left -= 1
            if self._left:
                return
        if self._fraction:
            time.sleep(self._fraction * self._usual.get(request, 0.001))
        self.fire()

    def fire(self) -> None:
        self.has_fired.set()
        self._server.process.kill()


# The clients


class Client:
    """Sends one request after the other until the server is gone.

    :param number: of its names, which nobody else uses.
    :param life: of the server.
    """

    def __init__(self, number: int, life: int, address: Address, oracle: Oracle, trigger: Trigger, run: Run) -> None:
        self._own = f"c{number}"
        self._life = life
        self._numbers = itertools.count()
        self._rng = random.Random(f"{run.seed} {number} {life}")
        self._connection = address.connect()
        self._oracle, self._trigger, self._run = oracle, trigger, run
        self.failure: Exception | None = None
        self._works = [
            *[self._new] * 4, *[self._replace] * 4, *[self._delete] * 2, *[self._form] * 3,
            self._contested, self._large, self._chunked, self._stale, self._cut,
        ]  # fmt: skip

    def run(self) -> None:
        try:
            self._contested()  # all of them, on one name
            while True:
                self._rng.choice(self._works)()
        except (OSError, http.client.HTTPException) as error:
            if not self._trigger.has_fired.is_set():
                self._run.complain("answer", f"a connection broke while the server lived: {error!r}")
        except Exception as error:
            self.failure = error
        finally:
            self._connection.close()

    # Names

    def _pool_name(self, is_there: bool) -> str:
        names = [f"{self._own}/{number}" for number in range(POOL)]
        self._rng.shuffle(names)
        fits = [name for name in names if (self._oracle.expected(name)[0] is not NOTHING) == is_there]
        return fits[0] if fits else self._fresh_name()

    def _fresh_name(self) -> str:
        """In a folder that may be made for it: one that several clients use, or one of its own."""
        number = f"{self._life}-{next(self._numbers)}"
        folder = self._rng.choice([f"new/{self._life}", f"{self._own}/{number}", f"{self._own}/{number}/a/b"])
        return f"{folder}/{self._own}-{number}"

    # Requests

    def _new(self) -> None:
        name = self._rng.choice([self._pool_name(False), self._fresh_name()])
        fields = self._rng.choice([{}, {"If-None-Match": "*"}])
        self._put("new", name, self._data(20_000), fields)

    def _large(self) -> None:
        self._put("large", self._pool_name(self._rng.random() < 0.5), self._data(4_000_000))

    def _chunked(self) -> None:
        self._put("chunked", self._pool_name(self._rng.random() < 0.5), self._data(500_000), is_chunked=True)

    def _replace(self) -> None:
        name = self._pool_name(True)
        etag = self._oracle.expected(name)[1]
        fields = self._rng.choice([{}, {"If-Match": etag}]) if etag else {}
        self._put("replace", name, self._data(self._rng.choice([2_000, 400_000])), fields)

    def _stale(self) -> None:
        """A condition that doesn't hold."""
        name, data = self._pool_name(True), self._data(500)
        attempt = self._oracle.begin({name: _digest(data)})
        self._oracle.withdraw(attempt)
        status, _, _ = self._send("stale", "PUT", name, [data], {"If-Match": '"0"', "Content-Length": str(len(data))})
        self._judge_answer("refused", name, status, 412)

    def _contested(self) -> None:
        """One name that everybody wants to make."""
        name, data = f"contested/{self._life}-{next(self._numbers) // 8}", self._data(9_000)
        fields = {"If-None-Match": "*", "Content-Length": str(len(data))}
        attempt = self._oracle.begin({name: _digest(data)}, only_new=True)
        status, headers, _ = self._send("contested", "PUT", name, [data], fields)
        if status == 201:
            self._oracle.acknowledge(attempt, {name: headers["ETag"]})
            self._run.count_created(name)
        else:
            self._judge_answer("refused", name, status, 412)
            self._oracle.withdraw(attempt)

    def _cut(self) -> None:
        """A client that leaves."""
        name, data = self._pool_name(self._rng.random() < 0.5), self._data(600_000)
        self._oracle.withdraw(self._oracle.begin({name: _digest(data)}))
        self._connection.putrequest("PUT", f"/files/{name}")
        self._connection.putheader("Content-Length", str(len(data)))
        self._connection.endheaders()
        self._connection.send(data[: len(data) // 2])
        self._trigger.event("halfway", "cut")
        self._connection.close()

    def _put(
        self, kind: str, name: str, data: bytes, fields: Mapping[str, str] | None = None, is_chunked: bool = False
    ) -> None:
        before = self._oracle.expected(name)[0]
        attempt = self._oracle.begin({name: _digest(data)})
        pieces = [data[: len(data) // 2], data[len(data) // 2 :]]
        framing = {"Content-Length": str(len(data))}
        if is_chunked:
            pieces = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece] + [b"0\r\n\r\n"]
            framing = {"Transfer-Encoding": "chunked"}
        status, headers, _ = self._send(kind, "PUT", name, pieces, {**framing, **(fields or {})})
        if self._judge_answer(kind, name, status, 201 if before is NOTHING else 204):
            self._oracle.acknowledge(attempt, {name: headers["ETag"]})

    def _delete(self) -> None:
        name = self._pool_name(True)
        before, etag = self._oracle.expected(name)
        if before is NOTHING:
            return
        attempt = self._oracle.begin({name: NOTHING})
        status, _, _ = self._send("delete", "DELETE", name, [], {"If-Match": etag} if etag else {})
        if self._judge_answer("delete", name, status, 204):
            self._oracle.acknowledge(attempt, {})

    def _form(self) -> None:
        """Some files that are new and some that are there; now and then many."""
        is_large = self._rng.random() < 0.3
        if self._rng.random() < 0.3:
            folder = f"{self._own}/form-{self._life}-{next(self._numbers)}"
            names = [f"{folder}/{number}" for number in range(60 if is_large else 3)]
        else:
            names = [f"{self._own}/{number}" for number in self._rng.sample(range(POOL), POOL if is_large else 4)]
        files = {name: self._data(3_000 if is_large else self._rng.choice([5_000, 300_000])) for name in names}
        body = b"".join(_part(name.rpartition("/")[2], data) for name, data in files.items()) + b"--%b--\r\n" % (
            BOUNDARY.encode()
        )
        fields = {
            "Accept": "application/json",
            "Content-Type": f"multipart/form-data; boundary={BOUNDARY}",
            "Content-Length": str(len(body)),
        }
        attempt = self._oracle.begin({name: _digest(data) for name, data in files.items()})
        if len(names) > POOL:
            self._trigger.expect(names[0])
        folder = names[0].rpartition("/")[0] + "/"
        half = len(body) // 2
        kind = "large form" if is_large else "form"
        status, _, text = self._send(kind, "POST", folder, [body[:half], body[half:]], fields)
        if self._judge_answer(kind, folder, status, 201):
            self._oracle.acknowledge(attempt, {folder + file["name"]: file["etag"] for file in json.loads(text)})

    def _send(
        self, kind: str, method: str, path: str, pieces: list[bytes], fields: Mapping[str, str]
    ) -> tuple[int, Mapping[str, str], bytes]:
        self._connection.putrequest(method, f"/files/{path}")
        for name, value in fields.items():
            self._connection.putheader(name, value)
        self._connection.endheaders()
        for number, piece in enumerate(pieces):
            self._trigger.event("halfway" if number else "begun", kind)
            self._connection.send(piece)
        sent = time.monotonic()
        self._trigger.event("sent", kind)
        response = self._connection.getresponse()
        content = response.read()
        self._trigger.event("answered", kind)
        self._run.usual[kind] = time.monotonic() - sent
        return response.status, response.headers, content

    def _judge_answer(self, kind: str, name: str, status: int, wanted: int) -> bool:
        if status == wanted:
            self._run.count(kind)
            return True
        self._run.complain("answer", f"{kind} {name}: {status} and not {wanted}")
        return False

    def _data(self, size: int) -> bytes:
        """So much at most, and no two alike."""
        return self._rng.randbytes(self._rng.randint(16, size))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _part(name: str, data: bytes) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="f"; filename="{name}"\r\n\r\n'
    return head.encode() + data + b"\r\n"


@dataclass
class Address:
    """Where a server listens.

    :ivar context: of TLS; None for plain TCP.
    """

    port: int
    context: ssl.SSLContext | None

    def connect(self) -> http.client.HTTPConnection:
        if self.context is None:
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=PATIENCE, context=self.context)


# The run

RUN = "\nimport sys\nfrom twisted.scripts.twistd import run\nsys.argv[0] = 'twistd'\nrun()\n"

NAMED = "from lwstwisted.stores.local import LocalStore\nLocalStore.__init__.__kwdefaults__['use_tmpfile'] = False\n"
"""Unfinished files have names from the beginning, as on a file system without O_TMPFILE."""

DYING = """
import os, signal
def dying(call, left=[%d]):
    def changes(*arguments, **keywords):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return call(*arguments, **keywords)
    return changes
for name in ("unlink", "rename", "rmdir"):
    setattr(os, name, dying(getattr(os, name)))
"""
"""The process dies at one of the changes that it makes to names."""


def prepared(command: Sequence[str | Path], prelude: str) -> Sequence[str | Path]:
    """The command line of a service under twistd that runs some Python first."""
    return [sys.executable, "-c", prelude + RUN, *command[1:]] if prelude else command


class Run:
    """Lives of a server on one root.

    :param folder: an empty one, where all of it happens.
    :param seed: of the moments, and of what clients do.
    :param mutation: Python that is run in the server before all else.
    :ivar usual: seconds from the end of a body to its answer, by kind of request.
    """

    def __init__(self, folder: Path, seed: int, mutation: str = "") -> None:
        self.seed = seed
        self.usual: dict[str, float] = {}
        self.report = Report()
        self._folder = folder
        self._root = folder / "root"
        self._mutation = mutation
        self._rng = random.Random(seed)
        self._oracle = Oracle()
        self._certificate = ensure_development_certificate(folder / "pair.pem")
        self._context = ssl.create_default_context(cafile=self._certificate)
        self._known: dict[str, tuple[tuple[int, ...], str]] = {}
        self._created: Counter[str] = Counter()
        self._at_first: set[str] = set()
        self._open_at_first = 0
        self._lock = Lock()

    def complain(self, kind: str, sentence: str) -> None:
        with self._lock:
            self.report.add(kind, sentence)

    def count(self, kind: str) -> None:
        with self._lock:
            self.report.answers[kind] += 1

    def count_created(self, name: str) -> None:
        """Note a 201 for a name that nobody ever deletes."""
        self.count("contested")
        with self._lock:
            self._created[name] += 1
            if self._created[name] > 1:
                self.report.add("answer", f"{name} was created twice")

    def live(self, kills: int, until: str | None = None) -> Report:
        """Go through so many lives, and judge each.

        :param until: stop as soon as something of this kind is wrong.
        """
        for life in range(kills):
            with self._server() as (server, addresses):
                self._judge(server, addresses)
                if until in self.report.kinds:
                    return self.report
                self._load(life, server, addresses)
            self._look_at_the_dead()
            if self._rng.random() < 0.3:
                self._kill_a_start()
        with self._server() as (server, addresses):
            self._judge(server, addresses)
            self._fetch(addresses, self._seen())
            server.end()
        self._look_for_leftovers()
        used = {str(above) for name in {*self._oracle.acknowledged, *self._seen()} for above in Path(name).parents}
        folders = {name for name in visible_beneath(self._root) if (self._root / name).is_dir()}
        self.report.bare_folders = len(folders - used)
        return self.report

    @contextmanager
    def _server(self, prelude: str = "") -> Iterator[tuple[Server, list[Address]]]:
        listen = ["--listen", "tcp:0:interface=127.0.0.1", "--listen", tls_endpoint(self._certificate)]
        command = twistd("--root", self._root, *listen)
        prelude += self._mutation + self._rng.choice(["", NAMED])
        with serving(prepared(command, prelude), cwd=self._folder) as server:
            plain, tls = server.wait_for_ports(2)
            yield server, [Address(plain, None), Address(tls, self._context)]
        self.report.undone += len(re.findall("took back a batch", server.text))
        for line in server.log:
            if re.search(r"Traceback|Unhandled|can't be taken back|half done", line):
                self.complain("log", line)

    def _load(self, life: int, server: Server, addresses: list[Address]) -> None:
        trigger = Trigger(self._rng, server, self.usual, self._root)
        clients = [
            Client(number, life, addresses[number % 2], self._oracle, trigger, self) for number in range(CLIENTS)
        ]
        threads = [Thread(target=client.run) for client in clients]
        for thread in threads:
            thread.start()
        if not trigger.has_fired.wait(PATIENCE):
            self.complain("answer", f"{trigger.kind} did not happen often enough in {PATIENCE} s")
            trigger.fire()
        server.wait()
        for thread in threads:
            thread.join(2 * PATIENCE)
        for client in clients:
            if client.failure is not None:
                raise client.failure
        self.report.kills += 1
        self.report.phases[trigger.kind] += 1

    def _kill_a_start(self) -> None:
        """Start it, and let it die amidst its sweep, if that is long enough."""
        changes = self._rng.randrange(2 + 2 * len(self._own_names()))
        try:
            with self._server(DYING % changes):
                pass
        except AssertionError:
            self.report.killed_starts += 1

    # Judgement

    def _seen(self) -> dict[str, str]:
        """Digest by name of all that is visible on the disk. What has the same inode, size and time is not read."""
        seen = {}
        for name in visible_beneath(self._root) if self._root.exists() else []:
            path = self._root / name
            if not path.is_dir():
                status = path.lstat()
                key = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode)
                if name not in self._known or self._known[name][0] != key:
                    self._known[name] = (key, digest(path))
                seen[name] = self._known[name][1]
        return seen

    def _own_names(self) -> set[str]:
        """What is in the store's own folders and wasn't there before the first upload."""
        return set(everything_beneath(self._root / STATE)) - self._at_first

    def _look_at_the_dead(self) -> None:
        self.report.left += len(self._own_names())
        for name, seen in self._seen().items():
            # A batch that was interrupted is taken back by the restart only: what is there must be whole, no more.
            wrong = self._oracle.complaint(name, seen)
            if wrong is not None and wrong[0] == "torn":
                self.complain("torn", f"{wrong[1]}, before the restart")

    def _judge(self, server: Server, addresses: list[Address]) -> None:
        if not self._at_first:
            self._at_first = set(everything_beneath(self._root / STATE))
            self._open_at_first = len(server.open_beneath(self._root))
        self._look_for_leftovers()
        seen = self._seen()
        for sentence in self._oracle.halves(seen):
            self.complain("half", sentence)
        for name in {*self._oracle.names(), *seen}:
            wrong = self._oracle.complaint(name, seen.get(name))
            if wrong is not None:
                self.complain(*wrong)
        touched = self._oracle.touched()
        pending = {id(a): a for name in touched for a in self._oracle.allowed(name) if not a.is_acknowledged}
        happened = [one for one in pending.values() if all(seen.get(name) == s for name, s in one.states.items())]
        self.report.happened += len(happened)
        self.report.vanished += len(pending) - len(happened)
        for name in touched:
            self._oracle.settle(name, seen.get(name))
        untouched = sorted(set(seen) - set(touched))
        self._fetch(addresses, [*touched, *self._rng.sample(untouched, min(OLD_READS, len(untouched)))])

        def is_closed() -> bool:
            return len(server.open_beneath(self._root)) == self._open_at_first

        wait_until(is_closed, "all files of the store were closed")

    def _look_for_leftovers(self) -> None:
        for name in self._own_names():
            self.complain("leftover", name)

    def _fetch(self, addresses: list[Address], names: Iterable[str]) -> None:
        """Compare what GET says with what is settled."""
        connections = [address.connect() for address in addresses]
        for connection, name in zip(itertools.cycle(connections), names, strict=False):
            connection.request("GET", f"/files/{name}")
            response = connection.getresponse()
            content = response.read()
            wanted, etag = self._oracle.expected(name)
            seen = _digest(content) if response.status == 200 else NOTHING
            if seen != wanted or response.status not in (200, 404):
                self.complain("get", f"GET {name}: {response.status}, and it is not what is on the disk")
            elif seen is not NOTHING and response.headers["ETag"] != etag and etag:
                self.complain("etag", f"GET {name}: {response.headers['ETag']}, and it was {etag}")
            elif seen is not NOTHING:
                self._oracle.settle(name, seen)[name] = response.headers["ETag"]
        for connection in connections:
            connection.close()


# Stores that are broken on purpose

MUTANTS: dict[str, tuple[str, str]] = {
    "a PUT is answered before its file has the name": (
        "lost",
        """
from threading import Thread
from lwstwisted.stores.local import _Draft
from lwstwisted.stores.placing import finish_file
commit = _Draft.commit
def early(self, data):
    if type(self) is not _Draft:
        return commit(self, data)
    descriptor = self._open().descriptor
    self._write(descriptor, data)
    self.etag = finish_file(self._tree, descriptor, self._digests)
    found = []
    self._tree.check_target(self._path, found.append)
    self._check(found[0])
    def later():
        try:
            self._publish()
        finally:
            self._close()
    Thread(target=later).start()
    return found[0] is None
_Draft.commit = early
""",
    ),
    "a DELETE is answered before the name is gone": (
        "lost",
        """
from threading import Timer
from lwstwisted.stores.tree import Tree
delete = Tree.delete
Tree.delete = lambda self, path, check: Timer(0.01, delete, (self, path, check)).start()
""",
    ),
    "a file has its name before it is whole": (
        "torn",
        """
from lwstwisted.stores.local import _Draft
opened, publish = _Draft._open, _Draft._publish
def early(self):
    is_first = self._file is None
    file = opened(self)
    if is_first and type(self) is _Draft:
        self.is_new = publish(self)
    return file
_Draft._open = early
_Draft._publish = lambda self: self.is_new
""",
    ),
    "the journal goes before the names come": (
        "half",
        """
from lwstwisted.stores.batch import BatchFolder
write, remove = BatchFolder._write_journal, BatchFolder._remove_journal
def early(self, *arguments):
    write(self, *arguments)
    remove(self)
BatchFolder._write_journal = early
def again(self):
    try:
        remove(self)
    except FileNotFoundError:
        pass
BatchFolder._remove_journal = again
""",
    ),
    "a batch that is taken back does not restore what it replaced": (
        "lost",
        """
import os
from lwstwisted.stores.batch import BatchFolder
def forgetful(self, number, folder, last):
    ours = os.lstat(b"%d" % number, dir_fd=self._descriptor)
    try:
        if os.path.samestat(ours, os.lstat(last, dir_fd=folder)):
            os.unlink(last, dir_fd=folder)
    except FileNotFoundError:
        pass
BatchFolder._take_back = forgetful
""",
    ),
    "unfinished files are not swept": (
        "leftover",
        "from lwstwisted.stores.tree import Tree\nTree._sweep = lambda self: None\n",
    ),
    "batches are not taken back": (
        "leftover",
        "import lwstwisted.stores.local as local\nlocal.recover_batches = lambda tree: None\n",
    ),
    "entity-tags change with each start": (
        "etag",
        """
import os
import lwstwisted.stores.local as local, lwstwisted.stores.tree as tree
from dataclasses import replace
found_of = tree.found_of
salted = lambda *known: replace(found_of(*known), etag=found_of(*known).etag[:-1] + f'-{os.getpid()}"')
local.found_of = tree.found_of = salted
""",
    ),
}
"""What is wrong, which kind of finding tells it, and how the server becomes so."""


def crash(kills: int, seed: int, mutation: str = "", until: str | None = None) -> Report:
    """Kill a new server on a new root so many times.

    :param until: ends it with the first finding of this kind.
    """
    with tempfile.TemporaryDirectory(prefix="lwstwisted-") as folder:
        return Run(Path(folder), seed, mutation).live(kills, until)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description="Kill a server under load.")
    parser.add_argument("kills", nargs="?", type=int, default=300, help="how many times (300)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--mutants", action="store_true", help="break the store, and see each break found out")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    if not options.mutants:
        report = crash(options.kills, options.seed)
        print(report)
        return min(1, len(report.wrong))
    survivors = 0
    for mutant, (kind, mutation) in MUTANTS.items():
        report = crash(options.kills, options.seed, mutation, kind)
        survivors += kind not in report.kinds
        verdict = f"{kind} after {report.kills} kills" if kind in report.kinds else "SURVIVED"
        print(f"{mutant}: {verdict}; in all {dict(report.kinds)}", flush=True)
    return min(1, survivors)


if __name__ == "__main__":
    sys.exit(main())
