"""A bad network between two network namespaces: packets are late, some get lost, and connections are reset.

Two TUN devices, one in each namespace, are read and written by :class:`Line`, so every packet passes through here. It
needs root. Nothing here is a test.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Thread
from unittest import SkipTest

SERVER, CLIENT = "10.77.0.1", "10.77.0.2"
MTU = 1500

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_TCP = 6
_FIN, _SYN, _RST, _ACK = 0x01, 0x02, 0x04, 0x10
_WORD = 1 << 32


@dataclass
class Flow:
    """One connection from the client's port on.

    :ivar sent: distinct bytes that the client has sent, lost ones included.
    :ivar arrived: those that have arrived without a gap.
    """

    first: int
    sent: int = 0
    arrived: int = 0
    is_reset: bool = False
    behind_gaps: dict[int, int] = field(default_factory=dict)

    def arrive(self, begin: int, end: int) -> None:
        """A segment gets through."""
        self.behind_gaps[begin] = max(end, self.behind_gaps.get(begin, 0))
        for begin in sorted(self.behind_gaps):
            if begin > self.arrived:
                break
            self.arrived = max(self.arrived, self.behind_gaps.pop(begin))


@dataclass
class Line:
    """What happens between the two devices.

    :ivar rate: bytes a second, from the client to the server, which queue for it.
    :ivar delay: seconds that a packet takes then; back it takes none.
    :ivar loss: share of the packets that get lost, in each direction.
    :ivar reset_after: bytes after which a connection is reset.
    :ivar flows: by the client's port and its first sequence number.
    """

    client: int
    server: int
    rate: float
    delay: float
    loss: float
    reset_after: int
    chance: random.Random
    flows: dict[tuple[int, int], Flow] = field(default_factory=dict)
    now: dict[int, Flow] = field(default_factory=dict)
    resets: int = 0
    lost: int = 0

    def run(self, stop: int) -> None:
        """Carry packets until ``stop`` can be read."""
        waiting: list[tuple[float, int, bytes]] = []
        number, free = 0, 0.0
        while True:
            timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            readable, _, _ = select.select([self.client, self.server, stop], [], [], timeout)
            if stop in readable:
                return
            if self.client in readable:
                for packet in self._of_client(os.read(self.client, MTU)):
                    number += 1
                    free = max(free, time.monotonic()) + len(packet) / self.rate
                    heapq.heappush(waiting, (free + self.delay, number, packet))
            if self.server in readable:
                packet = os.read(self.server, MTU)
                if not self._is_lost():
                    os.write(self.client, packet)
            while waiting and waiting[0][0] <= time.monotonic():
                os.write(self.server, heapq.heappop(waiting)[2])

    def _is_lost(self) -> bool:
        is_lost = self.chance.random() < self.loss
        self.lost += is_lost
        return is_lost

    def _of_client(self, packet: bytes) -> Iterator[bytes]:
        if packet[0] >> 4 != 4 or packet[9] != _TCP:
            return
        header = (packet[0] & 15) * 4
        port, _, sequence, _, offset, flags = struct.unpack_from("!HHIIBB", packet, header)
        payload = len(packet) - header - (offset >> 4) * 4
        if flags & _SYN:
            flow = self.now[port] = self.flows.setdefault((port, sequence), Flow(sequence + 1))
        elif (known := self.now.get(port)) is None:
            return
        else:
            flow = known
        if flow.is_reset:
            return
        behind = (sequence - flow.first) % _WORD + payload
        if payload and behind < _WORD // 2:
            flow.sent = max(flow.sent, behind)
        if flow.sent > self.reset_after:
            flow.is_reset = True
            self.resets += 1
            to_server, to_client = _resets(packet, header)
            os.write(self.client, to_client)
            yield to_server
        elif not self._is_lost():
            if payload:
                flow.arrive(behind - payload, behind)
            yield packet


def _resets(packet: bytes, header: int) -> tuple[bytes, bytes]:
    """A reset in the place of a packet, for its receiver, and one for its sender."""
    source, target = packet[12:16], packet[16:20]
    port, to, sequence, acknowledged = struct.unpack_from("!HHII", packet, header)
    return (
        _packet(source, target, struct.pack("!HHIIBBHHH", port, to, sequence, 0, 5 << 4, _RST, 0, 0, 0)),
        _packet(target, source, struct.pack("!HHIIBBHHH", to, port, acknowledged, 0, 5 << 4, _RST, 0, 0, 0)),
    )


def _packet(source: bytes, target: bytes, segment: bytes) -> bytes:
    pseudo = source + target + struct.pack("!BBH", 0, _TCP, len(segment))
    segment = segment[:16] + _checksum(pseudo + segment) + segment[18:]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0, 64, _TCP, 0) + source + target
    return head[:10] + _checksum(head) + head[12:] + segment


def _checksum(data: bytes) -> bytes:
    """RFC 1071."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def bad_network(
    *, rate: float, delay: float, loss: float, reset_after: int, seed: int
) -> Iterator[tuple[str, str, Line]]:
    """Two network namespaces with a bad line between them.

    :returns: the name of the server's, whose address is :data:`SERVER`, that of the client's, and the line.
    :raises unittest.SkipTest: where there can't be any.
    """
    if os.geteuid() or shutil.which("ip") is None or not os.path.exists("/dev/net/tun"):
        raise SkipTest("a bad network needs root, ip and /dev/net/tun")
    with ExitStack() as exits:
        devices = []
        names = [f"lws{os.getpid()}{side}" for side in "sc"]
        for name, address in zip(names, (SERVER, CLIENT), strict=True):
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            exits.callback(os.close, device)
            try:
                fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
                _ip("netns", "add", name)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SkipTest(f"network namespaces cannot be made here: {error}") from None
            exits.callback(_ip, "netns", "delete", name)
            _ip("link", "set", name, "mtu", str(MTU), "netns", name)
            _ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            _ip("-n", name, "link", "set", name, "up")
            devices.append(device)
        # What a sender makes of a loss differs between machines; each kernel has this one (RFC 5681).
        reno = "echo reno > /proc/sys/net/ipv4/tcp_congestion_control"
        _ip("netns", "exec", names[1], "sh", "-c", reno)
        line = Line(devices[1], devices[0], rate, delay, loss, reset_after, random.Random(seed))
        stopped, stop = os.pipe()
        exits.callback(os.close, stopped)
        thread = Thread(target=line.run, args=(stopped,))
        thread.start()
        exits.callback(thread.join)
        exits.callback(os.close, stop)  # its other end can be read then
        yield names[0], names[1], line
