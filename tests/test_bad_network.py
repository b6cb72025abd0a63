"""Uploads over a network that is late, loses packets and resets connections.

It runs alone as well, with other numbers: ``python -m tests.test_bad_network 50 20`` uploads 50 files of 20 MB.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import sys
import tempfile
from base64 import b64encode
from pathlib import Path
from typing import NamedTuple

import pytest
from twisted.trial.unittest import SynchronousTestCase

from tests.bad_network import SERVER, bad_network
from tests.servers import digest, script, serving, visible_beneath

RATE, DELAY, LOSS, RESET_AFTER = 12_500_000, 0.05, 0.02, 1_000_000
"""Bytes a second, seconds, share of the packets, bytes."""
SENT_TWICE = 0.15
"""Share of the bytes, at most, that may go over the line again because a connection was reset."""

HEADS = 0.01
"""Share of the bytes that heads of requests take."""

FILES, MEGABYTES = 10, 4
SEED = int(os.environ.get("LWSTWISTED_SEED", "20261123"))
LIMIT = 600.0
"""Seconds after which an upload hangs."""


class Answer(NamedTuple):
    """An answer, as far as it matters here."""

    status: int
    fields: dict[str, str]


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: str, body: bytes = b"") -> Answer:
    """Send a request of tus, and read its answer, which has no content."""
    writer.write(f"{head}\r\nHost: {SERVER}\r\nTus-Resumable: 1.0.0\r\n\r\n".encode())
    writer.write(body)
    answer = (await reader.readuntil(b"\r\n\r\n")).decode()
    fields = dict(re.findall(r"^([^:\r\n]+): *([^\r\n]*)\r$", answer, re.MULTILINE))
    return Answer(int(answer.split()[1]), {name.lower(): value for name, value in fields.items()})


async def upload(port: int, number: int, content: bytes) -> int:
    """Upload a file however often the connection is reset. Returns how often it began."""
    place, offset, attempts = "", 0, 0
    while offset < len(content) or not place:
        attempts += 1
        try:
            reader, writer = await asyncio.open_connection(SERVER, port)
        except OSError:
            continue
        try:
            if not place:
                metadata = f"name {b64encode(b'%d.bin' % number).decode()}"
                fields = f"Upload-Length: {len(content)}\r\nUpload-Metadata: {metadata}\r\nContent-Length: 0"
                created = await ask(reader, writer, f"POST /uploads/ HTTP/1.1\r\n{fields}")
                assert created.status == 201, created
                place = created.fields["location"]
            found = await ask(reader, writer, f"HEAD {place} HTTP/1.1")
            assert found.status == 200, found
            assert int(found.fields["upload-offset"]) >= offset, "an offset went back"
            offset = int(found.fields["upload-offset"])
            if offset == len(content):
                break
            fields = (
                f"Upload-Offset: {offset}\r\nContent-Length: {len(content) - offset}\r\n"
                "Content-Type: application/offset+octet-stream"
            )
            done = await ask(reader, writer, f"PATCH {place} HTTP/1.1\r\n{fields}", content[offset:])
            assert done.status == 204, done
            offset = int(done.fields["upload-offset"])
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()
    return attempts


def content_of(number: int, size: int) -> bytes:
    """What is in a file: never twice the same."""
    return hashlib.shake_128(b"%d of %d" % (number, SEED)).digest(size)


async def upload_all(port: int, files: int, size: int) -> None:
    """Upload all files at once. It runs in the client's namespace."""
    uploads = (asyncio.wait_for(upload(port, number, content_of(number, size)), LIMIT) for number in range(files))
    attempts = await asyncio.gather(*uploads)
    print(f"connections: {sum(attempts)}")


class Traffic(NamedTuple):
    """What went over the line, for each byte of the files.

    :ivar sent: bytes that the clients have sent.
    :ivar arrived: bytes that have arrived in order, before their connection was reset.
    :ivar resets: connections that were reset.
    """

    sent: float
    arrived: float
    resets: int


def run(files: int, size: int) -> Traffic:
    """Upload files over a bad network into a new root, and compare them."""
    with (
        tempfile.TemporaryDirectory(prefix="lwstwisted-") as folder,
        bad_network(rate=RATE, delay=DELAY, loss=LOSS, reset_after=RESET_AFTER, seed=SEED) as (servers, clients, line),
    ):
        root = Path(folder) / "root"
        endpoint = f"tcp:0:interface={SERVER}"
        enter = ["ip", "netns", "exec"]
        serve = [*enter, servers, script("lwstwisted"), "serve", "--anonymous", "--root", root, "--listen", endpoint]
        with serving(serve, cwd=Path(folder)) as server:
            (port,) = server.wait_for_ports()
            program = [sys.executable, "-m", "tests.test_bad_network", "--port", str(port), str(files), str(size)]
            top = Path(__file__).parent.parent
            with serving([*enter, clients, *program], cwd=top) as client:
                status = client.process.wait(LIMIT)
            assert status == 0, client.text
            assert sorted(visible_beneath(root)) == sorted(f"{number}.bin" for number in range(files))
            for number in range(files):
                wanted = hashlib.sha256(content_of(number, size)).hexdigest()
                assert digest(root / f"{number}.bin") == wanted, number
        flows = line.flows.values()
        sent, arrived = sum(flow.sent for flow in flows), sum(flow.arrived for flow in flows)
        return Traffic(sent / (files * size), arrived / (files * size), line.resets)


@pytest.mark.slow
class BadNetworkTests(SynchronousTestCase):
    """A late, lossy line that resets each connection after a megabyte."""

    def test_all_arrive(self) -> None:
        """All uploads arrive whole, little is sent twice, and of what arrived nothing has to arrive again."""
        traffic = run(FILES, MEGABYTES * 1_000_000)
        self.assertGreaterEqual(traffic.resets, FILES * (MEGABYTES - 1))
        self.assertLess(traffic.sent, 1 + SENT_TWICE)
        self.assertLess(traffic.arrived, 1 + HEADS)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--port"]:
        asyncio.run(upload_all(*map(int, sys.argv[2:5])))
    else:
        files, megabytes = map(int, sys.argv[1:3])
        traffic = run(files, megabytes * 1_000_000)
        print(f"{files} files of {megabytes} MB, all whole; {traffic.resets} connections were reset")
        print(f"for each byte {traffic.sent:.3f} were sent, and {traffic.arrived:.4f} arrived in order")
