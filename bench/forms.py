"""How long everybody else waits while somebody sends a form that is made to be dear.

Bodies of 8 MB that a parser may spend seconds on go to our service and to stock Twisted, which parses a form in one
go when it is whole; beside them a probe asks for a page every 10 ms. It prints the longest that the probe waited.

``python -m bench.forms [--runs N]``
"""

from __future__ import annotations

import argparse
import http.client
import re
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

from twisted.web.resource import Resource
from twisted.web.server import Site
from twisted.web.static import Data

from bench.processes import PATIENCE, hear, print_table, process
from lwstwisted.loop.reactor import LwsReactor
from lwstwisted.stores.local import LocalStore
from lwstwisted.uploads.resource import UploadResource
from lwstwisted.web.site import StreamingSite

SIZE = 8_000_000
BOUNDARY = b"boundary"
PART = b'--boundary\r\nContent-Disposition: form-data; name="a"; filename="%d"\r\n\r\n'
END = b"\r\n--boundary--\r\n"
EVERY = 0.01
"""Seconds between two questions of the probe."""
AT_LEAST = 30
"""Questions from the begin of a form on, though it may be refused before the second."""

TARGET = 50.0
"""Milliseconds that a form may make others wait."""


def filled(before: bytes, with_what: bytes) -> bytes:
    """A body of :data:`SIZE` bytes, but for its end."""
    return before + with_what * ((SIZE - len(before)) // len(with_what)) + END


BODIES: dict[str, Callable[[], bytes]] = {
    "all CR in a file": lambda: filled(PART % 0, b"\r"),
    "all CRLF in a file": lambda: filled(PART % 0, b"\r\n"),
    "almost boundaries in a file": lambda: filled(PART % 0, b"\r\n--boundar"),
    "all CR": lambda: filled(b"", b"\r"),
    "all CRLF": lambda: filled(b"", b"\r\n"),
    "a preamble": lambda: filled(b"", b"x"),
    "tiny parts": lambda: b"".join(PART % n + b"x\r\n" for n in range(SIZE // len(PART))) + END,
    "tiny fields": lambda: b'--boundary\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n' * (SIZE // 64) + END,
    "a header without end": lambda: filled(b"--boundary\r\n", b"x"),
}


class Posted(Resource):
    """What an application on stock Twisted has."""

    isLeaf = True

    def render_POST(self, request: Any) -> bytes:
        return b"%d fields" % len(request.args)


def serve(pipe: Connection, is_ours: bool) -> None:
    """The process of the server."""
    if is_ours:
        LwsReactor.install()
    else:
        from twisted.internet import epollreactor

        epollreactor.install()
    from twisted.internet import reactor

    running: Any = reactor
    root = Resource()
    root.putChild(b"probe", Data(b"here", "text/plain"))
    with tempfile.TemporaryDirectory(prefix="lwstwisted-") as folder:
        root.putChild(b"files", UploadResource(LocalStore(folder, running)) if is_ours else Posted())
        port = running.listenTCP(0, StreamingSite(root) if is_ours else Site(root), interface="127.0.0.1")
        pipe.send(port.getHost().port)
        running.run()


def probe(pipe: Connection, port: int) -> None:
    """The process of the probe: from one word to the next it asks, and then says how long it waited at most."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    pipe.send("ready")
    while True:
        pipe.recv()
        longest, left = 0.0, AT_LEAST
        while not pipe.poll(EVERY) or left > 0:
            left -= 1
            began = time.monotonic()
            connection.request("GET", "/probe")
            connection.getresponse().read()
            longest = max(longest, time.monotonic() - began)
        pipe.recv()
        pipe.send(longest)


def post(port: int, body: bytes) -> str:
    """Send a form. Returns the status, or what happened instead."""
    head = b"POST /files/ HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=%b\r\n" % BOUNDARY
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        try:
            client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        except ConnectionError:
            pass  # the answer may be there all the same
        try:
            said = re.match(rb"HTTP/1\.1 (\d+)", client.recv(4096))
        except ConnectionError:
            return "reset"
    return "closed" if said is None else said[1].decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for name, make in BODIES.items():
        body, row = make(), [name]
        for is_ours in (True, False):
            with ExitStack() as stack:
                port = hear(stack.enter_context(process(serve, is_ours, is_server=True)))
                probing = stack.enter_context(process(probe, port))
                hear(probing)
                waits, statuses = [], set()
                for _ in range(options.runs):
                    probing.send("begin")
                    statuses.add(post(port, body))
                    probing.send("end")
                    waits.append(hear(probing))
            row += [" ".join(sorted(statuses)), f"{1000 * min(waits):.1f}", f"{1000 * max(waits):.1f}"]
        rows.append(row)
    print_table(["8 MB of", "ours", "ms, best", "worst", "stock", "ms, best", "worst"], rows)
    print(f"target: ours at most {TARGET:.0f} ms")


if __name__ == "__main__":
    main()
