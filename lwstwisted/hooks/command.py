"""Hooks as commands: a folder with programs that are named after the events, as tusd runs them.

The message comes on standard input, the response goes to standard output, and standard error is that of the service.
An exit status other than 0 is a failure. A hook without a program is nobody's.

tusd waits for ever; here a program that takes too long, or says too much, is killed. Its own children are not.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from lwstwisted.hooks.names import Hook
from lwstwisted.hooks.senders import Unfit, Unreachable


class CommandSender:
    """The programs of a folder.

    :param timeout: seconds that one may take.
    :param size_limit: bytes that one may say.
    """

    def __init__(self, folder: Path, reactor: Any, timeout: float, size_limit: int) -> None:
        self._folder = folder.absolute()
        self._reactor = reactor
        self._timeout = timeout
        self._size_limit = size_limit

    def wants(self, hook: Hook) -> bool:
        """See :class:`~lwstwisted.hooks.senders.Sender`."""
        return (self._folder / hook.value).exists()

    async def send(self, hook: Hook, message: str, is_told: bool) -> bytes:
        """See :class:`~lwstwisted.hooks.senders.Sender`."""
        program = self._folder / hook.value
        if not program.exists():
            return b""
        if not os.access(program, os.X_OK):
            raise Unfit(f"{program} may not be executed")
        upload = json.loads(message)["Event"]["Upload"]
        environment = {
            **os.environ,
            "TUS_ID": upload["ID"],
            "TUS_SIZE": str(upload["Size"]),
            "TUS_OFFSET": str(upload["Offset"]),
        }
        run = _Run(message.encode(), self._size_limit)
        try:
            self._reactor.spawnProcess(
                run, str(program), [str(program)], environment, str(self._folder), childFDs={0: "w", 1: "r", 2: 2}
            )
        except OSError as error:
            raise Unreachable(f"{program} could not be started: {error.strerror}") from None
        late = self._reactor.callLater(self._timeout, run.end, f"took longer than {self._timeout:g} seconds")
        try:
            await run.ended
        finally:
            run.end("is not waited for")
            if late.active():
                late.cancel()
        if run.fault:
            raise Unreachable(f"{program} {run.fault}")
        if run.status:
            raise Unfit(f"{program} {run.status}")
        return run.said


class _Run(ProcessProtocol):
    """A program that runs.

    :ivar ended: fires when it is over.
    :ivar said: what it has said.
    :ivar fault: why it was ended; "" if it wasn't.
    :ivar status: how it ended by itself; "" for success.
    """

    def __init__(self, message: bytes, size_limit: int) -> None:
        self.ended: Deferred[None] = Deferred()
        self.said = b""
        self.fault = self.status = ""
        self._message = message
        self._size_limit = size_limit
        self._is_over = False

    def connectionMade(self) -> None:
        """See ``ProcessProtocol``."""
        assert self.transport is not None
        self.transport.write(self._message)
        self.transport.closeStdin()

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        """See ``ProcessProtocol``."""
        self.said += data
        if len(self.said) > self._size_limit:
            self.end(f"said more than {self._size_limit} bytes")

    def processExited(self, reason: Failure) -> None:
        """See ``ProcessProtocol``. A child of it that has the pipe is not waited for, once it was ended."""
        if self.fault and self.transport is not None:
            self.transport.loseConnection()

    def processEnded(self, reason: Failure) -> None:
        """See ``ProcessProtocol``."""
        self._is_over = True
        code, by = getattr(reason.value, "exitCode", None), getattr(reason.value, "signal", None)
        if by:
            self.status = f"was ended by signal {by}"
        elif code:
            self.status = f"ended with status {code}: {self.said[:200].decode(errors='replace')!r}"
        if not self.ended.called:
            self.ended.callback(None)

    def end(self, fault: str) -> None:
        """End it, and don't wait for what it has started."""
        if self._is_over or self.fault:
            return
        self.fault = fault
        assert self.transport is not None
        with suppress(ProcessExitedAlready):
            self.transport.signalProcess(signal.SIGKILL.name[3:])
        self.transport.loseConnection()
