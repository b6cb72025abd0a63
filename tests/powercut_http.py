"""What the clients of ``tests/powercut_load.py`` speak, with interim responses. Nothing here is a test."""

from __future__ import annotations

import http.client
import io
import select
import socket
from collections.abc import Callable, Iterator, Mapping
from email.message import Message

from tests.servers import PATIENCE

PIECE = 16 * 1024
"""Bytes that are sent before a client looks whether it was told something."""

NO_HEADERS: Mapping[str, str] = {}

Hear = Callable[[Message], None]
"""Is given the fields of each 104 as soon as it is seen."""

_INTERIM = b"HTTP/1.1 104 "
_HEAD = 1 << 16
_END = b"\r\n\r\n"


def deaf(fields: Message) -> None:
    """For a request that has no 104."""
    raise AssertionError(f"a 104 that nobody has asked for: {fields}")


class Connections:
    """Connections to services, each of them kept until the end."""

    def __init__(self) -> None:
        self._open: dict[int, http.client.HTTPConnection] = {}

    def close(self) -> None:
        """Close all of them."""
        for connection in self._open.values():
            connection.close()

    def send(
        self,
        port: int,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = NO_HEADERS,
        hear: Hear = deaf,
    ) -> None:
        """Send a request; :meth:`answer` has to come next."""
        connection = self._open.get(port)
        if connection is None:
            connection = self._open[port] = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(body) <= PIECE:
            connection.request(method, path, body, dict(headers))
            return

        def pieces() -> Iterator[bytes]:
            for at in range(0, len(body), PIECE):
                for fields in _interim(connection.sock):
                    hear(fields)
                yield body[at : at + PIECE]

        connection.request(method, path, pieces(), {**headers, "Content-Length": f"{len(body)}"})

    def answer(self, port: int, hear: Hear = deaf) -> http.client.HTTPResponse:
        """Wait for an answer, whose body is still to be read."""
        connection = self._open[port]
        while _waits_for_more(connection.sock):
            for fields in _interim(connection.sock):
                hear(fields)
        return connection.getresponse()


def _waits_for_more(connection: socket.socket) -> bool:
    """Whether the final answer isn't next; waits until something is."""
    if not select.select([connection], [], [], PATIENCE)[0]:
        raise TimeoutError("no answer")
    begin = connection.recv(len(_INTERIM), socket.MSG_PEEK)
    return bool(begin) and _INTERIM.startswith(begin)


def _interim(connection: socket.socket) -> Iterator[Message]:
    """The 104s that are there by now. http.client would take the first one for the answer."""
    while select.select([connection], [], [], 0)[0]:
        head, end, _ = connection.recv(_HEAD, socket.MSG_PEEK).partition(_END)
        if not head.startswith(_INTERIM) or not end:
            return
        connection.recv(len(head) + len(end))
        yield http.client.parse_headers(io.BytesIO(head.partition(b"\r\n")[2] + end))
