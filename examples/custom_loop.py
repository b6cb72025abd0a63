"""An event loop of your own, on which no decrypted TLS byte is stranded.

A reactor written by hand on ``selectors``. It serves TLS on loopback, and says what each client has sent::

    python examples/custom_loop.py [--hook]
    openssl s_client -connect 127.0.0.1:8444 -quiet -nocommands -no_ign_eof <FILE

:class:`CustomLoop` knows nothing of TLS: the pending-read list finds no hook, and uses ``callLater(0, ...)``.
:class:`HookedLoop` offers the hook, and gives pending readers their turn itself, behind what the kernel announced.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections import Counter
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import Any

from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor
from twisted.internet.main import installReactor
from twisted.internet.posixbase import PosixReactorBase
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import DefaultOpenSSLContextFactory
from twisted.python import log
from zope.interface import implementer

from lwstwisted.certificate import ensure_development_certificate
from lwstwisted.interfaces import IFakePollin
from lwstwisted.loop.pending import pending_reads
from lwstwisted.loop.tls import TLSFactory, TLSPort


@implementer(IReactorFDSet)
class CustomLoop(PosixReactorBase):
    """A reactor on the best selector of this platform."""

    seconds = staticmethod(time.monotonic)  # whoever sets the time moves no timer

    def __init__(self) -> None:
        self._selector = DefaultSelector()
        self._events: Counter[Any] = Counter()  # by reader or writer: a descriptor number may soon be another's
        super().__init__()

    def _watch(self, selectable: Any, events: int) -> None:
        before = self._events[selectable]
        if before and not events:
            self._selector.unregister(selectable)  # finds one that is closed, too
            del self._events[selectable]
        elif events != before:
            change = self._selector.modify if before else self._selector.register
            change(selectable, events)
            self._events[selectable] = events

    def addReader(self, reader: Any) -> None:
        self._watch(reader, self._events[reader] | EVENT_READ)

    def addWriter(self, writer: Any) -> None:
        self._watch(writer, self._events[writer] | EVENT_WRITE)

    def removeReader(self, reader: Any) -> None:
        self._watch(reader, self._events[reader] & ~EVENT_READ)

    def removeWriter(self, writer: Any) -> None:
        self._watch(writer, self._events[writer] & ~EVENT_WRITE)

    def removeAll(self) -> list[Any]:
        removed = [each for each in self._events if each not in self._internalReaders]
        for each in removed:
            self._watch(each, 0)
        return removed

    def getReaders(self) -> list[Any]:
        return [each for each, events in self._events.items() if events & EVENT_READ]

    def getWriters(self) -> list[Any]:
        return [each for each, events in self._events.items() if events & EVENT_WRITE]

    def doIteration(self, timeout: float | None) -> None:
        for key, events in self._selector.select(timeout):
            log.callWithLogger(key.fileobj, self._serve, key.fileobj, events)

    def _serve(self, selectable: Any, events: int) -> None:
        for event, method in ((EVENT_READ, "doRead"), (EVENT_WRITE, "doWrite")):
            if events & event & self._events[selectable]:  # who was served before may have paused or closed this one
                try:
                    why = getattr(selectable, method)()
                except BaseException as raised:
                    log.err()
                    why = raised
                if why:
                    self._disconnectSelectable(selectable, why, event == EVENT_READ)  # type: ignore[no-untyped-call]


@implementer(IFakePollin)
class HookedLoop(CustomLoop):
    """The same loop, and it is told of readers with input that no selector sees; the list knows who still is one."""

    def __init__(self) -> None:
        self._faked: dict[IReadDescriptor, None] = {}
        super().__init__()

    def fake_pollin(self, readers: list[IReadDescriptor]) -> bool:
        self._faked.update(dict.fromkeys(readers))
        return True

    def doIteration(self, timeout: float | None) -> None:
        faked, self._faked = self._faked, {}  # before the poll: who becomes pending from now on is for the next turn
        super().doIteration(0 if faked else timeout)
        for reader in faked:
            if reader not in self._faked:  # else it had its turn by the kernel's word, and is for the next one again
                pending_reads(self).servicePending(reader)


class Upload(Protocol):
    """All that comes on one connection."""

    def connectionMade(self) -> None:
        self.size, self.digest = 0, hashlib.sha256()

    def dataReceived(self, data: bytes) -> None:
        self.size += len(data)
        self.digest.update(data)

    def connectionLost(self, reason: Any) -> None:  # type: ignore[override]
        print(f"{self.size} bytes, SHA-256 {self.digest.hexdigest()}. {reason.getErrorMessage()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hook", action="store_true", help="use the loop with the hook")
    parser.add_argument("--port", type=int, default=8444)
    options = parser.parse_args()
    log.startLogging(sys.stderr, setStdout=False)
    installReactor(reactor := HookedLoop() if options.hook else CustomLoop())
    pem = str(ensure_development_certificate(Path("development.pem")))
    # A turn delivers 4 KiB of one connection, so that a full record takes four turns: good to look at, not fast.
    tls = TLSFactory(DefaultOpenSSLContextFactory(pem, pem), False, Factory.forProtocol(Upload), reactor, budget=4096)
    port: Any = TLSPort(options.port, tls, interface="127.0.0.1", reactor=reactor)
    port.startListening()
    print(f"listening on port {port.getHost().port}", flush=True)
    reactor.run()


if __name__ == "__main__":
    main()
