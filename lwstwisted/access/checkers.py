"""twisted.cred checkers for ``--auth htpasswd:PATH`` and ``--auth tokens:PATH``.

Others come from twisted.cred itself, such as ``file:PATH``. That one keeps passwords as they are, reads its file at
each login, and takes no colon in a password: good for a trial, and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import IUsernamePassword
from twisted.cred.error import UnauthorizedLogin
from twisted.internet.defer import Deferred
from zope.interface import Attribute, Interface, implementer

from lwstwisted.access.credentials import IBearerToken, Password, Token
from lwstwisted.access.files import RereadFile
from lwstwisted.access.passwords import Tokens, decoy, matches, parse_htpasswd, parse_tokens

RunInThread = Callable[..., "Deferred[bool]"]


# mypy-zope knows a method of an interface by its missing self.
class ISlowChecker(Interface):
    """A checker whose answers cost something, and hold until its file changes."""

    generation = Attribute("A number; another one as soon as an answer may be another one.")

    def check(credentials: Any, run: RunInThread):  # type: ignore[no-untyped-def]
        """Whose ``credentials`` these are.

        :param run: calls a function with arguments in a thread.
        :returns: a coroutine that ends with a name, or None.
        """


class _FileChecker:
    """What both have in common: a file, and the seam of twisted.cred."""

    _file: RereadFile[Any]

    @property
    def generation(self) -> int:
        """See :class:`ISlowChecker`."""
        self._file.refresh()
        return self._file.generation

    async def check(self, credentials: Any, run: RunInThread) -> str | None:
        """See :class:`ISlowChecker`."""
        raise NotImplementedError

    def requestAvatarId(self, credentials: Any) -> Deferred[bytes | tuple[()]]:
        """See ``ICredentialsChecker``, for who uses it without us: in the threads of the reactor."""
        from twisted.internet.threads import deferToThread

        async def avatar_id() -> bytes | tuple[()]:
            name = await self.check(credentials, deferToThread)
            if name is None:
                raise UnauthorizedLogin
            return name.encode()

        return Deferred.fromCoroutine(avatar_id())


@implementer(ICredentialsChecker, ISlowChecker)
class HtpasswdChecker(_FileChecker):
    """Names and passwords of a file.

    :param path: of it; see :func:`~lwstwisted.access.passwords.parse_htpasswd`.
    :raises OSError: if it can't be read.
    :raises ValueError: if it can't be understood, with the number of the line.
    """

    credentialInterfaces = (IUsernamePassword,)

    def __init__(self, path: str) -> None:
        self._file: RereadFile[dict[str, str]] = RereadFile(path, parse_htpasswd)

    async def check(self, credentials: Password, run: RunInThread) -> str | None:
        """See :class:`ISlowChecker`."""
        hashes, name = self._file.content, credentials.username.decode("utf-8", "replace")
        stored = hashes.get(name)
        is_right = await run(matches, stored or decoy(hashes), credentials.password) if hashes else False
        return name if is_right and stored is not None else None


@implementer(ICredentialsChecker, ISlowChecker)
class TokenChecker(_FileChecker):
    """Tokens of a file.

    :param path: of it; see :func:`~lwstwisted.access.passwords.parse_tokens`.
    :raises OSError: if it can't be read.
    :raises ValueError: if it can't be understood, with the number of the line.
    """

    credentialInterfaces = (IBearerToken,)

    def __init__(self, path: str) -> None:
        self._file: RereadFile[Tokens] = RereadFile(path, parse_tokens)

    async def check(self, credentials: Token, run: RunInThread) -> str | None:
        """See :class:`ISlowChecker`."""
        tokens = self._file.content
        found = tokens.whose(credentials.token)
        if found is not None or not tokens.hashes:
            return found
        name = credentials.token.rpartition(".")[0]
        stored = tokens.hashes.get(name)
        is_right = await run(matches, stored or decoy(tokens.hashes), credentials.token.encode())
        return name if is_right and stored is not None else None
