"""Makes lwstwisted known to Twisted: ``--reactor=lws`` and ``twistd lwstwisted``.

Twisted loads this file to list its plugins, so it imports nothing of ours.
"""

from twisted.application.reactors import Reactor
from twisted.application.service import ServiceMaker
from twisted.cred.credentials import IUsernamePassword
from twisted.cred.strcred import ICheckerFactory
from twisted.plugin import IPlugin
from twisted.python.reflect import namedAny
from zope.interface import implementer

lws = Reactor("lws", "lwstwisted.loop.reactor", "epoll that also knows of input pending inside TLS.")
lws_poll = Reactor("lws-poll", "lwstwisted.loop.reactor.LwsPollReactor", "The same on poll(2).")
lws_select = Reactor("lws-select", "lwstwisted.loop.reactor.LwsSelectReactor", "The same on select(2).")
lws_asyncio = Reactor(
    "lws-asyncio", "lwstwisted.loop.foreign", "The same on asyncio; LWSTWISTED_EVENT_LOOP=uvloop on that."
)


@implementer(ICheckerFactory, IPlugin)
class CheckerOfFile:
    """``--auth KIND:PATH``; the checker is imported when somebody asks for it."""

    argStringFormat = "Path of a file."

    def __init__(self, kind, help, credentials, checker):  # type: ignore[no-untyped-def]
        self.authType = kind
        self.authHelp = help
        self._credentials = credentials
        self._checker = checker

    @property
    def credentialInterfaces(self):  # type: ignore[no-untyped-def]
        """See ``ICheckerFactory``."""
        return [namedAny(one) if isinstance(one, str) else one for one in self._credentials]

    def generateChecker(self, argstring):  # type: ignore[no-untyped-def]
        """See ``ICheckerFactory``."""
        return namedAny(self._checker)(argstring)


htpasswd = CheckerOfFile(  # type: ignore[no-untyped-call]
    "htpasswd",
    "Lines of NAME:HASH, as htpasswd -B writes them (bcrypt), or with $argon2id$ hashes. Others are refused.",
    [IUsernamePassword],
    "lwstwisted.access.checkers.HtpasswdChecker",
)
tokens = CheckerOfFile(  # type: ignore[no-untyped-call]
    "tokens",
    "Lines of NAME:HASH: the SHA-256 of a random token in hex, or the $argon2id$ hash of one that begins with 'NAME.'.",
    ["lwstwisted.access.credentials.IBearerToken"],
    "lwstwisted.access.checkers.TokenChecker",
)
service = ServiceMaker("lwstwisted", "lwstwisted.service", "An upload service over HTTP(S).", "lwstwisted")
