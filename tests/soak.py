"""A service under mixed traffic for a long time: it must not grow, by memory or by descriptors, and must not complain.

Clients come and go over TCP and TLS: whole and cut uploads of every protocol, downloads, listings, deletions, requests
that are refused, slow bodies, broken handshakes. The names are few, so the disk doesn't fill. What the service takes
in the first third of the time is its own: until then each kind of request came at each size. From then on its memory is
looked at once a second, and judged by the slope of a line through these samples.

``python -m tests.soak [MINUTES]`` runs it, 30 minutes without an argument.
"""

from __future__ import annotations

import http.client
import os
import random
import re
import socket
import ssl
import sys
import tempfile
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression
from threading import Event, Lock, Thread

from lwstwisted.certificate import ensure_development_certificate
from tests.servers import PATIENCE, Server, script, serving, tls_endpoint, wait_until

CLIENTS = 8
"""Threads; every second one uses TLS."""
NAMES = 40
KIB, MIB = 1024, 1024 * 1024
LARGE = 4 * MIB
WARM_UP = 1 / 3
"""Part of the time in which the service may grow."""
MOST_GROWTH = MIB / 600
"""Bytes of memory a second: 1 MiB in ten minutes."""
COMPLAINT = re.compile(r"Traceback|Unhandled|Error\b|error:|WARNING", re.IGNORECASE)

_DATA = os.urandom(LARGE)
_TUS = {"Tus-Resumable": "1.0.0"}
_PART = {**_TUS, "Content-Type": "application/offset+octet-stream"}


@dataclass
class Sample:
    """What the service held at one moment.

    :ivar at: seconds since the begin.
    :ivar memory: resident bytes.
    """

    at: float
    memory: int


@dataclass
class Report:
    """What a soak has seen.

    :ivar samples: behind the warm-up.
    :ivar done: how often each kind of request was made.
    :ivar wrong: answers that were not the wanted ones.
    :ivar complaints: lines of the log.
    :ivar before: descriptors of the service that has no client, behind the warm-up.
    :ivar after: and at the end.
    """

    samples: list[Sample] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    before: int = 0
    after: int = 0
    lock: Lock = field(default_factory=Lock)

    @property
    def growth(self) -> float:
        """Bytes of memory a second."""
        times, memory = [sample.at for sample in self.samples], [sample.memory for sample in self.samples]
        return linear_regression(times, memory).slope

    def __str__(self) -> str:
        first, last = self.samples[0].memory / MIB, self.samples[-1].memory / MIB
        return (
            f"{sum(self.done.values())} requests {dict(self.done)}\n"
            f"memory {first:.1f} -> {last:.1f} MiB behind the warm-up,"
            f" {self.growth * 600 / MIB:+.2f} MiB in 10 minutes\n"
            f"descriptors {self.before} -> {self.after}; wrong answers {dict(self.wrong)};"
            f" {len(self.complaints)} complaints {self.complaints[:5]}"
        )


class Client:
    """One of those who come and go; each request has a connection of its own or goes on with one."""

    def __init__(self, number: int, port: int, context: ssl.SSLContext | None, report: Report) -> None:
        self._random = random.Random(number)
        self._port = port
        self._context = context
        self._report = report
        self._kept: http.client.HTTPConnection | None = None
        self._kinds: list[Callable[[], None]] = [
            self._put, self._put, self._put_large, self._chunked, self._form, self._tus, self._draft, self._interim,
            self._get, self._get, self._list, self._delete, self._refused, self._cut, self._drip, self._noise,
        ]  # fmt: skip

    def run(self, over: Event) -> None:
        """Make requests until it's over."""
        while not over.is_set():
            kind = self._random.choice(self._kinds)
            try:
                kind()
            except (OSError, http.client.HTTPException) as error:
                self._count(self._report.wrong, f"{kind.__name__}: {error!r}")
                self._leave()
            self._count(self._report.done, kind.__name__.lstrip("_"))
            if self._random.random() < 0.2:
                self._leave()
        self._leave()

    def _count(self, counter: Counter[str], kind: str) -> None:
        with self._report.lock:
            counter[kind] += 1

    def _leave(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def _ask(
        self, method: str, path: str, body: object = None, wanted: Sequence[int] = (200, 201, 204), **fields: str
    ) -> http.client.HTTPResponse:
        if self._kept is None:
            if self._context is None:
                self._kept = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
            else:
                self._kept = http.client.HTTPSConnection(
                    "127.0.0.1", self._port, timeout=PATIENCE, context=self._context
                )
        headers = {name.replace("_", "-"): value for name, value in fields.items()}
        self._kept.request(method, path, body, headers, encode_chunked=not isinstance(body, bytes | None))  # type: ignore[arg-type]
        answer = self._kept.getresponse()
        answer.read()
        if answer.status not in wanted:
            self._count(self._report.wrong, f"{method} {path}: {answer.status}")
        if answer.will_close:
            self._leave()
        return answer

    def _raw(self) -> socket.socket:
        plain = socket.create_connection(("127.0.0.1", self._port), PATIENCE)
        return plain if self._context is None else self._context.wrap_socket(plain, server_hostname="127.0.0.1")

    def _name(self) -> str:
        return f"f{self._random.randrange(NAMES)}"

    def _some(self, most: int) -> bytes:
        return _DATA[: self._random.randrange(most)]

    def _put(self) -> None:
        self._ask("PUT", f"/files/{self._name()}", self._some(64 * KIB))

    def _put_large(self) -> None:
        self._ask("PUT", f"/files/{self._name()}", self._some(LARGE))

    def _chunked(self) -> None:
        pieces = (self._some(64 * KIB) or b"x" for _ in range(8))
        self._ask("PUT", f"/files/{self._name()}", pieces, Transfer_Encoding="chunked")

    def _form(self) -> None:
        head = f'--b\r\nContent-Disposition: form-data; name="f"; filename="{self._name()}"\r\n\r\n'
        body = head.encode() + b64encode(self._some(256 * KIB)) + b"\r\n--b--\r\n"
        self._ask("POST", "/files/", body, Content_Type="multipart/form-data; boundary=b")

    def _tus(self) -> None:
        data, name = self._some(MIB), b64encode(self._name().encode()).decode()
        fields = {"Upload-Length": str(len(data)), "Upload-Metadata": f"filename {name}"}
        url = self._ask("POST", "/uploads/", b"", **_TUS, **fields).headers["Location"]
        half = len(data) // 2
        self._ask("PATCH", url, data[:half], **_PART, Upload_Offset="0")
        if self._random.random() < 0.2:
            self._ask("DELETE", url, **_TUS)
        elif self._ask("HEAD", url, **_TUS).headers["Upload-Offset"] == str(half):
            self._ask("PATCH", url, data[half:], **_PART, Upload_Offset=str(half))

    def _draft(self) -> None:
        data = self._some(MIB)
        half = len(data) // 2
        begun = self._ask("PUT", f"/files/{self._name()}", data[:half], Upload_Complete="?0")
        fields = {"Upload-Complete": "?1", "Content-Type": "application/partial-upload"}
        self._ask("PATCH", begun.headers["Location"], data[half:], **fields, Upload_Offset=str(half))

    def _interim(self) -> None:
        """A draft's client, which gets 104 first; http.client would take that for the answer."""
        data = self._some(MIB)
        draft = "Upload-Draft-Interop-Version: 8\r\nUpload-Complete: ?1\r\nConnection: close"
        head = f"PUT /files/{self._name()} HTTP/1.1\r\nHost: x\r\n{draft}\r\nContent-Length: {len(data)}\r\n\r\n"
        with self._raw() as client:
            client.sendall(head.encode() + data)
            answer = b""
            while came := client.recv(64 * KIB):
                answer += came
        if not re.match(rb"HTTP/1\.1 104 .*HTTP/1\.1 20[14] ", answer, re.DOTALL):
            self._count(self._report.wrong, f"interim: {answer[:60]!r}")

    def _get(self) -> None:
        span = {"Range": "bytes=100-200"} if self._random.random() < 0.3 else {}
        self._ask("GET", f"/files/{self._name()}", None, (200, 206, 404, 416), **span)

    def _list(self) -> None:
        self._ask("GET", "/files/", None, Accept=self._random.choice(("application/json", "text/html")))

    def _delete(self) -> None:
        self._ask("DELETE", f"/files/{self._name()}", None, (204, 404))

    def _refused(self) -> None:
        self._ask("PUT", "/files/%2e%2e/x", b"x", (400,))
        self._ask("PATCH", "/uploads/" + 32 * "0", b"x", (404,), **_PART, Upload_Offset="0")
        self._ask("PUT", "/files/x", b"x", (412,), If_Match='"none"')

    def _cut(self) -> None:
        with self._raw() as client:
            client.sendall(b"PUT /files/cut HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n" + self._some(MIB))
            if self._random.random() < 0.5:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")

    def _drip(self) -> None:
        with self._raw() as client:
            client.sendall(b"PUT /files/drip HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\nConnection: close\r\n\r\n")
            for _ in range(20):
                client.sendall(b"x")
                time.sleep(0.01)
            client.recv(KIB)

    def _noise(self) -> None:
        """Bytes that are no request, and a TLS handshake that isn't one."""
        with socket.create_connection(("127.0.0.1", self._port), PATIENCE) as client:
            client.sendall(self._random.choice((b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\0" * 100)))
            client.settimeout(0.1)
            with suppress(OSError):
                client.recv(KIB)


def soak(folder: Path, seconds: float) -> Report:
    """Run a service under load, and look at it.

    :param folder: for its files.
    """
    report = Report()
    certificate = ensure_development_certificate(folder / "server.pem")
    context = ssl.create_default_context(cafile=str(certificate))
    options = ["--listen", tls_endpoint(certificate), "--listen", "tcp:0", "--limit", "connections-per-address=0"]
    log = folder / "access.log"
    command = [script("lwstwisted"), "serve", "--anonymous", "--root", folder / "root", "--access-log", log, *options]
    with serving(command, cwd=folder) as server:
        tls, plain = server.wait_for_ports(2)
        clients = [
            Client(number, tls if number % 2 else plain, context if number % 2 else None, report)
            for number in range(CLIENTS)
        ]
        _load(server, clients, seconds * WARM_UP)
        report.before = _idle_descriptors(server)
        report.samples = _load(server, clients, seconds * (1 - WARM_UP))
        report.after = _idle_descriptors(server)
        server.end()
        report.complaints = [line for line in server.log if COMPLAINT.search(line)]
    return report


def _load(server: Server, clients: Sequence[Client], seconds: float) -> list[Sample]:
    over, samples = Event(), list[Sample]()
    threads = [Thread(target=client.run, args=(over,)) for client in clients]
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    try:
        while (now := time.monotonic() - begin) < seconds:
            samples.append(Sample(now, server.memory()))
            over.wait(1)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    return samples


def _idle_descriptors(server: Server) -> int:
    """The descriptors of a service whose clients are gone, as soon as it has noticed."""
    wait_until(lambda: not server.connections(), "the service noticed that all have left")
    return server.descriptors()


def main() -> None:
    """Soak, print the report, and exit with 1 if the service has grown or complained."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
    with tempfile.TemporaryDirectory(prefix="lwstwisted-") as folder:
        report = soak(Path(folder), minutes * 60)
    print(report)
    is_wrong = report.wrong or report.complaints or report.after > report.before or report.growth > MOST_GROWTH
    sys.exit(1 if is_wrong else 0)


if __name__ == "__main__":
    main()
