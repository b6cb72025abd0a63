"""The seam between requests and access: a request comes in, and who sends it comes out.

What a request brings is looked at in this order, and the first that is there counts: a signature in its query, an
``Authorization`` field, a client certificate. What is there and isn't right is refused, and never taken for nobody. All
of that happens before the body is accepted, so a client that waits for 100 (Continue) hears the refusal in its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from twisted.web.server import Request

from lwstwisted import errors
from lwstwisted.access.credentials import challenges, credentials_in
from lwstwisted.access.files import RereadFile
from lwstwisted.access.login import Login
from lwstwisted.access.rules import Rules
from lwstwisted.access.signing import Keys, is_signed, verify, without_signature
from lwstwisted.access.visitor import RuledVisitor, SignedVisitor, Visitor
from lwstwisted.errors import Refused

IdentityOf = Callable[[Any], Sequence[str]]


def nobody(transport: Any) -> Sequence[str]:
    """What a transport says of its client where there are no client certificates."""
    return ()


class Access:
    """Who may do what in a service.

    :param rules: what is allowed.
    :param reactor: for threads and time.
    :param checkers: of twisted.cred, for names and passwords and for tokens.
    :param keys: of signed URLs.
    :param identity_of: the names in the client certificate of a transport, the one that counts first.
    :param network_of: what is slowed down together, by the address of a client.
    :param now: seconds since the epoch.
    """

    def __init__(
        self,
        rules: Rules,
        reactor: Any,
        checkers: Sequence[Any] = (),
        keys: RereadFile[dict[str, bytes]] | None = None,
        identity_of: IdentityOf = nobody,
        network_of: Callable[[Any], str] = str,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._rules = rules
        self._login = Login(checkers, reactor)
        self._keys = keys
        self._identity_of = identity_of
        self._network_of = network_of
        self._now = now
        self._challenges = challenges(self._login.interfaces, is_wrong=False)
        self._challenges_again = challenges(self._login.interfaces, is_wrong=True)

    async def admit(self, request: Request) -> Visitor:
        """Find out who sends a request.

        :raises Refused: ``BAD_SIGNATURE``; ``BAD_CREDENTIALS``, ``WRONG_CREDENTIALS``, ``TOO_MANY_LOGINS``.
        """
        if is_signed(request.args or {}):
            return self._signed(request)
        credentials = credentials_in(request.requestHeaders.getRawHeaders(b"authorization") or ())
        if credentials is None:
            names = self._identity_of(request.channel.transport)
            return RuledVisitor(self._rules.of(names[0] if names else ""), self._challenges)
        name = await self._login.name_of(credentials, self._network_of(request.getClientAddress()))
        if name is None:
            # Without a challenge nobody could ever be right, and 401 has to have one (RFC 9110 section 15.5.2).
            raise Refused(errors.WRONG_CREDENTIALS if self._challenges else errors.FORBIDDEN, self._challenges_again)
        return RuledVisitor(self._rules.of(name))

    def stop(self) -> None:
        """End the threads."""
        self._login.stop()

    def _signed(self, request: Request) -> SignedVisitor:
        request.uri = without_signature(request.uri)  # as it is going to be logged
        keys: Keys = {} if self._keys is None else self._keys.content
        return SignedVisitor(verify(request.args or {}, keys), self._now())
