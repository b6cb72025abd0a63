"""How a hook is reached: what both ways have in common."""

from __future__ import annotations

from typing import Protocol

from lwstwisted.hooks.names import Hook


class Unreachable(Exception):
    """Nobody could be asked: no connection, no answer in time, or one that says that it is the other side's fault."""


class Unfit(Exception):
    """There was an answer, and it is none that could be gone by."""


class Sender(Protocol):
    """A way to reach hooks."""

    def wants(self, hook: Hook) -> bool:
        """Whether anybody would hear of it. It does not block."""

    async def send(self, hook: Hook, message: str, is_told: bool) -> bytes:
        """Send a message and wait for what is answered, for a bounded time.

        :param is_told: whether the event was, and is not asked about. Then any answer that is a success will do, and it
            is tried once: whoever tells tries again later.
        :returns: the response; b"" if nothing is said.
        :raises Unreachable: and trying again may help.
        :raises Unfit: and it won't, until somebody mends the hook.
        """
