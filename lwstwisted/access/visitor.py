"""Who sends a request, as far as uploads want to know it: what they may do, and which uploads are theirs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lwstwisted import errors
from lwstwisted.access.rules import UNKNOWN, Action, Allowed, Name
from lwstwisted.access.signing import Signed
from lwstwisted.errors import Refusal, Refused
from lwstwisted.interfaces import Check, Found
from lwstwisted.web.limits import MAX_LENGTH


class Visitor:
    """Somebody who may do everything: what there is where nothing is looked at.

    :ivar name: for people and logs; "" for nobody known.
    :ivar owner: what is kept with an upload that they begin, and has to be the same when it goes on; "" for nobody.
    :ivar max_size: bytes of a file at most.
    :ivar query: what the URL of an upload of theirs ends with, for requests that bring nothing else.
    """

    name = ""
    owner = ""
    max_size = MAX_LENGTH
    query = ""

    def may(self, action: Action, name: Name) -> bool:
        """Whether they may do something to a file or folder."""
        return True

    def require(self, action: Action, name: Name) -> None:
        """Refuse what they may not do.

        :raises Refused: 401 where it might help to say who they are, else 403.
        """

    def require_some(self, action: Action, folder: Name) -> None:
        """Refuse what they may do to no file that is right in a folder; which one it is will be known later.

        :raises Refused: as :meth:`require`.
        """

    def require_going_on(self, name: Name | None) -> None:
        """Refuse to go on with an upload of their own, which they were allowed to begin.

        :param name: of the file that it becomes; None for a part of one.
        :raises Refused: as :meth:`require`.
        """

    def require_method(self, method: bytes) -> None:
        """Refuse a method, whatever it would be for.

        :raises Refused: ``SIGNED_METHOD``.
        """

    def require_content(self, length: int | None, content_type: bytes | None) -> None:
        """Refuse what they may not store, by what is known before it comes.

        :param length: bytes of the file, or None.
        :param content_type: as it was sent, or None.
        :raises Refused: ``SIGNED_SIZE``, ``SIGNED_TYPE``.
        """

    def may_replace(self, name: Name) -> bool:
        """Whether a file of theirs may take the place of another one."""
        return self.may(Action.OVERWRITE, name)

    def shows(self, name: Name, is_folder: bool) -> bool:
        """Whether they see something in the listing of a folder that they may list."""
        return True

    def checking(self, name: Name, check: Check) -> Check:
        """A check of what has a name, which refuses as well what they may not replace."""
        return check if self.may_replace(name) else replacing_nothing(check)


def replacing_nothing(check: Check) -> Check:
    """A check that refuses whatever is there, and else asks ``check``."""

    def refusing(found: Found | None) -> None:
        if found is not None:
            raise Refused(errors.REPLACE_FORBIDDEN)
        check(found)

    return refusing


ANYBODY = Visitor()
"""The visitor where nothing is looked at."""


class RuledVisitor(Visitor):
    """Somebody for whom there are rules.

    :param allowed: what they may do.
    :param challenges: fields of a 401, for who hasn't said who they are and could.
    """

    def __init__(self, allowed: Allowed, challenges: Mapping[bytes, bytes] = MappingProxyType({})) -> None:
        self.name = allowed.user
        self.owner = f"user:{allowed.user}" if allowed.user else ""
        self._allowed = allowed
        self._challenges = challenges

    def may(self, action: Action, name: Name) -> bool:
        """See :class:`Visitor`."""
        return self._allowed.may(action, name)

    def require(self, action: Action, name: Name) -> None:
        """See :class:`Visitor`."""
        if not self._allowed.may(action, name):
            self._refuse()

    def require_some(self, action: Action, folder: Name) -> None:
        """See :class:`Visitor`."""
        if not self._allowed.may_in(action, folder):
            self._refuse()

    def require_going_on(self, name: Name | None) -> None:
        """See :class:`Visitor`."""
        if name is None:
            self.require_some(Action.PUT, ())
        else:
            self.require(Action.PUT, name)

    def shows(self, name: Name, is_folder: bool) -> bool:
        """See :class:`Visitor`."""
        return self._allowed.may(Action.LIST, name) or (
            is_folder and self._allowed.may_beneath(Action.LIST, name)
        )

    def _refuse(self) -> None:
        if self.name or not self._challenges:
            raise Refused(errors.FORBIDDEN)
        raise Refused(errors.UNAUTHORIZED, self._challenges)


class SignedVisitor(Visitor):
    """Somebody with a signed URL. The rules say nothing about them: whoever signed it did.

    :param signed: what the URL says.
    :param now: seconds since the epoch.
    """

    def __init__(self, signed: Signed, now: float) -> None:
        grant = signed.grant
        self._grant = grant
        self._is_expired = now >= grant.expires
        self.owner = f"signature:{signed.identity}"
        self.query = f"?{signed.query}"
        if grant.max_size is not None:
            self.max_size = grant.max_size

    def may(self, action: Action, name: Name) -> bool:
        """See :class:`Visitor`."""
        return self._refusal_of(action, name) is None

    def require(self, action: Action, name: Name) -> None:
        """See :class:`Visitor`."""
        if (refusal := self._refusal_of(action, name)) is not None:
            raise Refused(refusal)

    def require_some(self, action: Action, folder: Name) -> None:
        """See :class:`Visitor`."""
        grant = self._grant
        if grant.path[:-1] != folder and not (grant.is_folder and grant.covers(folder)):
            raise Refused(errors.SIGNED_PATH)
        self.require(action, (*grant.path, UNKNOWN) if grant.is_folder else grant.path)

    def require_going_on(self, name: Name | None) -> None:
        """See :class:`Visitor`. The time says only when something may begin."""
        if name is not None and not self._grant.covers(name):
            raise Refused(errors.SIGNED_PATH)

    def require_method(self, method: bytes) -> None:
        """See :class:`Visitor`."""
        if {b"HEAD": "GET"}.get(method, method.decode("ascii", "replace")) not in self._grant.methods:
            raise Refused(errors.SIGNED_METHOD)

    def require_content(self, length: int | None, content_type: bytes | None) -> None:
        """See :class:`Visitor`."""
        if length is not None and length > self.max_size:
            raise Refused(errors.SIGNED_SIZE)
        wanted, said = self._grant.content_type, (content_type or b"").partition(b";")[0].strip().lower()
        if wanted and said != wanted.encode("ascii"):
            raise Refused(errors.SIGNED_TYPE)

    def shows(self, name: Name, is_folder: bool) -> bool:
        """See :class:`Visitor`."""
        return self.may(Action.LIST, name)

    def _refusal_of(self, action: Action, name: Name) -> Refusal | None:
        grant = self._grant
        if self._is_expired:
            return errors.SIGNATURE_EXPIRED
        methods = {
            Action.PUT: {"PUT", "POST"},
            Action.OVERWRITE: {"PUT", "POST"} if grant.may_replace else set(),
            Action.DELETE: {"DELETE"},
        }.get(action, {"GET"})
        if methods.isdisjoint(grant.methods):
            return errors.SIGNED_METHOD
        return None if grant.covers(name) else errors.SIGNED_PATH
