"""Hooks over HTTP: each event is a POST of its message to one URL, as tusd sends it.

A status of 2xx is a success. Of what is asked the response is JSON, and short. A connection that fails and a status of
5xx are tried again, after the same pause each time; all tries together have one time limit.

This is ``twisted.web.client.Agent``, which is there anyway, and not treq. Each request has a connection of its own: one
that was kept, and is closed by the other side in that moment, would be a failure that nobody can tell from a true one.
Redirections are not followed: an event goes where the operator has said, or nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.error import ConnectingCancelledError
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from twisted.web.client import Agent, BrowserLikePolicyForHTTPS, HTTPConnectionPool, ResponseDone
from twisted.web.http import INTERNAL_SERVER_ERROR, MULTIPLE_CHOICE, OK, PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import IBodyProducer
from zope.interface import implementer

from lwstwisted.hooks.events import FRAMING
from lwstwisted.hooks.names import Hook
from lwstwisted.hooks.senders import Unfit, Unreachable

_OWN = FRAMING | {"content-type", "content-encoding", "host", "expect"}
"""Fields that are ours to set, whatever is forwarded."""


class HttpSender:
    """A URL that hooks are sent to.

    :param url: http:// or https://, whose certificate has to be one that the system trusts.
    :param forwarded: names of fields of the client's request that ours gets as well.
    :param tries: how often an answer is asked for.
    :param backoff: seconds between two tries.
    :param timeout: seconds for all tries together.
    :param size_limit: bytes of a response.
    :param policy: which certificates are trusted; those that the system trusts by default.
    """

    def __init__(
        self,
        url: str,
        reactor: Any,
        forwarded: Sequence[str],
        tries: int,
        backoff: float,
        timeout: float,
        size_limit: int,
        policy: Any = None,
    ) -> None:
        self._url = url.encode("ascii")
        self._reactor = reactor
        self._forwarded = [name for name in forwarded if name.lower() not in _OWN]
        self._tries = max(1, tries)
        self._backoff = backoff
        self._timeout = timeout
        self._size_limit = size_limit
        pool: Any = HTTPConnectionPool(reactor, persistent=False)
        pool._factory = _QuietFactory
        self._agent: Any = Agent(reactor, policy or BrowserLikePolicyForHTTPS(), pool=pool)

    def wants(self, hook: Hook) -> bool:
        """See :class:`~lwstwisted.hooks.senders.Sender`."""
        return True

    async def send(self, hook: Hook, message: str, is_told: bool) -> bytes:
        """See :class:`~lwstwisted.hooks.senders.Sender`."""
        waiting = Deferred.fromCoroutine(self._send(message, 1 if is_told else self._tries, is_told))
        waiting.addTimeout(self._timeout, self._reactor)
        try:
            return await waiting
        except TimeoutError:
            raise Unreachable(f"no answer came in {self._timeout:g} seconds") from None

    async def _send(self, message: str, tries: int, is_told: bool) -> bytes:
        for left in reversed(range(tries)):
            try:
                return await self._post(message, is_told)
            except Unreachable:
                if not left:
                    raise
            await deferLater(self._reactor, self._backoff)
        raise AssertionError("there is one try at least")

    async def _post(self, message: str, is_told: bool) -> bytes:
        fields = json.loads(message)["Event"]["HTTPRequest"]["Header"]
        headers = Headers({"Content-Type": ["application/json"], "User-Agent": ["lwstwisted"]})
        for name in self._forwarded:
            for key, values in fields.items():
                if key.lower() == name.lower():
                    headers.setRawHeaders(name, values)
        try:
            response = await self._agent.request(b"POST", self._url, headers, _Content(message.encode()))
            collected = _Collected(self._size_limit)
            response.deliverBody(collected)
            body: bytes = await collected.done
        except CancelledError:
            raise
        except Exception as error:
            reasons = getattr(error, "reasons", None) or [Failure(error)]
            if any(reason.check(CancelledError, ConnectingCancelledError) for reason in reasons):
                raise CancelledError from None  # which the client of twisted.web tells in other words
            raise Unreachable(f"{reasons[0].type.__name__}: {reasons[0].getErrorMessage()}") from None
        if response.code >= INTERNAL_SERVER_ERROR:
            raise Unreachable(f"status {response.code}: {body[:200].decode(errors='replace')!r}")
        if not OK <= response.code < MULTIPLE_CHOICE:
            raise Unfit(f"status {response.code}: {body[:200].decode(errors='replace')!r}")
        if collected.is_too_long and not is_told:
            raise Unfit(f"the response has more than {self._size_limit} bytes")
        if not body and not is_told:
            raise Unfit("the response is empty")
        return body


_Factory: Any = HTTPConnectionPool._factory


class _QuietFactory(_Factory):  # type: ignore[misc]
    """Each connection would be four lines in the log."""

    noisy = False


@implementer(IBodyProducer)
class _Content:
    """Bytes that are sent at once."""

    def __init__(self, content: bytes) -> None:
        self.length = len(content)
        self._content = content

    def startProducing(self, consumer: Any) -> Deferred[None]:
        consumer.write(self._content)
        done: Deferred[None] = Deferred()
        done.callback(None)
        return done

    def pauseProducing(self) -> None:
        """It is over."""

    def resumeProducing(self) -> None:
        """It is over."""

    def stopProducing(self) -> None:
        """It is over."""


class _Collected(Protocol):
    """The content of a response, and no more of it than is wanted."""

    def __init__(self, size_limit: int) -> None:
        self.done: Deferred[bytes] = Deferred(lambda _: self._abort())
        self.is_too_long = False
        self._size_limit = size_limit
        self._content = b""

    def dataReceived(self, data: bytes) -> None:
        """See ``Protocol``."""
        self._content += data
        if len(self._content) > self._size_limit and not self.is_too_long:
            self.is_too_long = True
            self._abort()
            self.done.callback(self._content[: self._size_limit])

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """See ``Protocol``."""
        if self.done.called:
            return
        if reason.check(ResponseDone, PotentialDataLoss):
            self.done.callback(self._content)
        else:
            self.done.errback(reason)

    def _abort(self) -> None:
        if self.transport is not None:
            getattr(self.transport, "abortConnection", self.transport.loseConnection)()
