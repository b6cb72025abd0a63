"""Who somebody is: credentials go to twisted.cred checkers, slowly for who guesses and quickly for who was right.

What was right is remembered for :data:`REMEMBERED` seconds, and no longer than the file behind it stays as it is. It is
remembered as its HMAC by a random key of this process, so no password lies about in memory, and nothing that is left of
the process says what they were. The same credentials on many connections at once are checked once.
"""

from __future__ import annotations

import hmac
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.error import LoginFailed
from twisted.internet.defer import Deferred, maybeDeferred
from zope.interface import providedBy

from lwstwisted.access.checkers import ISlowChecker
from lwstwisted.access.credentials import Password, Token
from lwstwisted.access.hashing import Hashing
from lwstwisted.access.slowdown import Slowdown

REMEMBERED = 300.0
"""Seconds for which the right credentials are not checked again."""
MOST_REMEMBERED = 10_000
"""Credentials that are remembered: 3 MB of memory."""


class Login:
    """Looks credentials up.

    :param checkers: of twisted.cred.
    :param reactor: for threads and time.
    """

    def __init__(self, checkers: Sequence[Any], reactor: Any) -> None:
        self._checkers = checkers
        self._clock = reactor
        self._hashing = Hashing(reactor)
        self._slowdown = Slowdown(reactor)
        self._key = secrets.token_bytes(32)
        self._right: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._checking: dict[bytes, list[Deferred[str | None]]] = {}
        self._generations: list[int] = []
        self.interfaces = {interface for checker in checkers for interface in checker.credentialInterfaces}

    async def name_of(self, credentials: Password | Token, network: str) -> str | None:
        """Whose credentials these are; None for nobody's, in the end.

        :param network: where they came from; "" if that isn't known.
        :raises Refused: ``TOO_MANY_LOGINS``.
        """
        checkers = [one for one in self._checkers if _fits(one, credentials)]
        self._forget_what_changed()
        key = hmac.digest(self._key, credentials.secret, "sha256")
        name, since = self._right.get(key, ("", 0.0))
        if name and self._clock.seconds() - since < REMEMBERED:
            return name
        if key in self._checking:
            waiter: Deferred[str | None] = Deferred()
            self._checking[key].append(waiter)
            return await waiter
        self._checking[key] = []
        try:
            found = await self._check(checkers, credentials, key, network, is_known=bool(name))
        except BaseException as failure:
            for waiter in self._checking.pop(key):
                waiter.errback(failure)
            raise
        for waiter in self._checking.pop(key):
            waiter.callback(found)
        return found

    def stop(self) -> None:
        """End the threads; who waits for an answer is refused."""
        self._slowdown.stop()
        self._hashing.stop()

    async def _check(
        self, checkers: list[Any], credentials: Password | Token, key: bytes, network: str, is_known: bool
    ) -> str | None:
        if is_known:
            return await self._ask(checkers, credentials, key, network, is_known)
        with self._slowdown.place(network, credentials.username.decode("utf-8", "replace")):
            await self._slowdown.wait(network)
            return await self._ask(checkers, credentials, key, network, is_known)

    async def _ask(
        self, checkers: list[Any], credentials: Password | Token, key: bytes, network: str, is_known: bool
    ) -> str | None:
        run = partial(self._hashing.run, None if is_known else network)
        for checker in checkers:
            is_slow = ISlowChecker.providedBy(checker)
            generations = list(self._generations)
            name = await (checker.check(credentials, run) if is_slow else _avatar_id(checker, credentials))
            if name is not None:
                self._forget_what_changed()
                if generations == self._generations:
                    # What is checked quickly is checked each time, and has its place from now on.
                    self._remember(key, name, self._clock.seconds() if is_slow else -REMEMBERED)
                return str(name)
        self._right.pop(key, None)
        self._slowdown.failed(network)
        return None

    def _remember(self, key: bytes, name: str, since: float) -> None:
        self._right[key] = (name, since)
        self._right.move_to_end(key)
        if len(self._right) > MOST_REMEMBERED:
            self._right.popitem(last=False)

    def _forget_what_changed(self) -> None:
        generations = [checker.generation for checker in self._checkers if ISlowChecker.providedBy(checker)]
        if generations != self._generations:
            self._generations = generations
            self._right.clear()


def _fits(checker: Any, credentials: Password | Token) -> bool:
    offered = providedBy(credentials)
    return any(offered.extends(interface, strict=False) for interface in checker.credentialInterfaces)


async def _avatar_id(checker: ICredentialsChecker, credentials: Password | Token) -> str | None:
    try:
        found = await maybeDeferred(checker.requestAvatarId, credentials)
    except LoginFailed:
        return None
    return found.decode("utf-8", "replace") if isinstance(found, bytes) and found else None
