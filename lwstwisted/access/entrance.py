"""What the resources of uploads ask first: is the request for us, and who sends it?"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from twisted.web.server import Request

from lwstwisted.access.admission import Access
from lwstwisted.access.hosts import Hosts
from lwstwisted.access.visitor import ANYBODY, Visitor
from lwstwisted.errors import BodyCut

Answer = Coroutine[Any, Any, None]


class Entrance:
    """The way in of a service.

    :param access: None where nobody is asked who they are.
    :param hosts: None where any name is ours.
    """

    def __init__(self, access: Access | None = None, hosts: Hosts | None = None) -> None:
        self._access = access
        self._hosts = hosts

    def require_own_host(self, request: Request) -> None:
        """Refuse a request for another server.

        :raises Refused: ``WRONG_HOST``.
        """
        if self._hosts is not None:
            self._hosts.require(request)

    # Not async, where it only chooses: an upload that drips would hold a frame for that.

    def let_in(self, request: Request, answer: Callable[[Visitor], Answer], method: bytes | None = None) -> Answer:
        """Have ``answer`` called with the visitor who sends a request.

        :param method: one that a signed URL has to be for; None for a request whose URL came from us.
        :raises Refused: as :meth:`Access.admit`, and ``SIGNED_METHOD``.
        """
        if self._access is None:
            return answer(ANYBODY)
        return self._admitted(self._access, request, answer, method)

    def stop(self) -> None:
        """Give back what it has."""
        if self._access is not None:
            self._access.stop()

    async def _admitted(
        self, access: Access, request: Request, answer: Callable[[Visitor], Answer], method: bytes | None
    ) -> None:
        visitor = await access.admit(request)
        if request.channel is None:
            raise BodyCut("the client left before it was known")
        if method is not None:
            visitor.require_method(method)
        await answer(visitor)
