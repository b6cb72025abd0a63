"""What a service tells its service manager: sd_notify(3), without a library.

A worker of several (``workers.py``) says the same things to its parent, line by line through a pipe.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, MutableMapping

from twisted.logger import Logger

PIPE = "LWSTWISTED_NOTIFY_FD"
"""Names the descriptor through which a worker speaks to its parent."""

_SOCKET, _TIMEOUT, _TIMEOUT_PID = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
PATIENCE = 1.0
"""Seconds that a change may wait for a service manager that is behind with its messages. Meanwhile the loop stands; so
what will be said again doesn't wait."""

Send = Callable[[bytes, float], object]

_log = Logger()


class Notifier:
    """Tells a service manager how a service is; nobody, where nobody wants to know.

    :param send: takes lines, and the seconds that they may wait.
    :param timeout: seconds after which somebody who has not heard :meth:`alive` ends this process; None for never.
    """

    def __init__(self, send: Send | None = None, timeout: float | None = None) -> None:
        self._send = send
        self.timeout = timeout
        self._status = ""
        self._has_failed = False

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> Notifier:
        """The one that the environment names. It is named for this process alone, so its children won't find it."""
        address, pipe = environment.pop(_SOCKET, ""), environment.pop(PIPE, "")
        microseconds, pid = environment.pop(_TIMEOUT, ""), environment.pop(_TIMEOUT_PID, "")
        is_ours = pid in ("", str(os.getpid()))
        timeout = int(microseconds) / 1e6 if is_ours and microseconds.isdecimal() and int(microseconds) else None
        if pipe:
            return cls(to_pipe(int(pipe)), timeout)
        # "@" stands for the null byte of an abstract name. What begins otherwise is of a kind that is not for us.
        return cls(to_socket(address) if address[:1] in ("/", "@") else None, timeout)

    def ready(self, status: str = "") -> None:
        """It serves, for the first time or after :meth:`reloading`."""
        self._status = status
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """It is about to look at its configuration again, from this moment on."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, seconds: float, status: str = "") -> None:
        """It is about to end, and asks for so much time to do it."""
        self._status = status
        self._tell("STOPPING=1", f"STATUS={status}", f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def alive(self) -> None:
        """Its loop turns."""
        self._tell("WATCHDOG=1", patience=0)

    def status(self, text: str) -> None:
        """What it does, in words; repeated ones are not sent."""
        if text != self._status:
            self._status = text
            self._tell(f"STATUS={text}", patience=0)

    def _tell(self, *lines: str, patience: float = PATIENCE) -> None:
        if self._send is None:
            return
        try:
            self._send("".join(f"{line}\n" for line in lines).encode(), patience)
        except OSError as error:
            if not self._has_failed:
                _log.warn("the service manager cannot be told: {error}", error=error)
            self._has_failed = True


def to_socket(address: str) -> Send:
    """Send each message as a datagram.

    :param address: a path, or an abstract name behind an ``@``.
    """
    name = "\0" + address[1:] if address.startswith("@") else address

    def send(message: bytes, patience: float) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(patience)
            sender.sendto(message, name)

    return send


def to_pipe(descriptor: int) -> Send:
    """Write each message to a pipe: whole, as it is shorter than PIPE_BUF, or not at all."""
    os.set_inheritable(descriptor, False)
    os.set_blocking(descriptor, False)

    def send(message: bytes, patience: float) -> None:
        os.write(descriptor, message)

    return send
