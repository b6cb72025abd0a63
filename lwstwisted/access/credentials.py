"""What a request says of who sends it: ``Authorization`` with Basic (RFC 7617) or Bearer (RFC 6750)."""

from __future__ import annotations

import hmac
import re
import unicodedata
from base64 import b64decode
from binascii import Error as NotBase64
from collections.abc import Collection, Sequence

from twisted.cred.credentials import ICredentials, IUsernamePassword
from zope.interface import Attribute, Interface, implementer

from lwstwisted import errors
from lwstwisted.errors import Refused

REALM = "lwstwisted"

_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) +([0-9A-Za-z\-._~+/]+=*) *")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class IBearerToken(ICredentials):
    """Credentials that are a token and nothing else."""

    token = Attribute("The token, as text of ASCII.")


@implementer(IUsernamePassword)
class Password:
    """A name and a password.

    :ivar username: in UTF-8, NFC.
    :ivar password: in UTF-8, as it came.
    """

    def __init__(self, username: bytes, password: bytes) -> None:
        self.username = username
        self.password = password

    @property
    def secret(self) -> bytes:
        """All of it, so that no two credentials have the same."""
        return b"password\0%d\0%b%b" % (len(self.username), self.username, self.password)

    def checkPassword(self, password: bytes) -> bool:
        """See ``IUsernamePassword``. It takes as long for a wrong one, which twisted.cred's own doesn't."""
        return hmac.compare_digest(self.password, password)


@implementer(IBearerToken)
class Token:
    """A token; see :class:`IBearerToken`."""

    username = b""

    def __init__(self, token: str) -> None:
        self.token = token

    @property
    def secret(self) -> bytes:
        """As :attr:`Password.secret`."""
        return b"token\0" + self.token.encode()


def credentials_in(fields: Sequence[bytes]) -> Password | Token | None:
    """Read ``Authorization``.

    :param fields: its values.
    :returns: None without any.
    :raises Refused: ``BAD_CREDENTIALS``: who sends something means it, and isn't taken for nobody.
    """
    if not fields:
        return None
    match = _FIELD.fullmatch(fields[0]) if len(fields) == 1 else None
    scheme = b"" if match is None else match[1].lower()
    if match is not None and scheme == b"bearer":
        return Token(match[2].decode("ascii"))
    if match is not None and scheme == b"basic":
        try:
            text = b64decode(match[2], validate=True).decode()
        except (NotBase64, ValueError):
            raise Refused(errors.BAD_CREDENTIALS) from None
        name, colon, password = text.partition(":")
        if colon and not _CONTROL.search(text):
            return Password(unicodedata.normalize("NFC", name).encode(), password.encode())
    raise Refused(errors.BAD_CREDENTIALS)


def challenges(interfaces: Collection[type[Interface]], is_wrong: bool) -> dict[bytes, bytes]:
    """The field of a 401 that says what would be looked at.

    :param interfaces: of the credentials that something here can check.
    :param is_wrong: whether the request had credentials.
    """
    found = []
    if IUsernamePassword in interfaces:
        # First: a browser takes the first one that it knows.
        found.append(f'Basic realm="{REALM}", charset="UTF-8"')
    if IBearerToken in interfaces:
        found.append(f'Bearer realm="{REALM}"' + (', error="invalid_token"' if is_wrong else ""))
    return {b"WWW-Authenticate": ", ".join(found).encode("ascii")} if found else {}
