"""The names of the events, which are those of tusd. What they mean is told in ``events.py``."""

from __future__ import annotations

import enum


class Hook(enum.Enum):
    """An event."""

    PRE_CREATE = "pre-create"
    POST_CREATE = "post-create"
    POST_RECEIVE = "post-receive"
    PRE_FINISH = "pre-finish"
    POST_FINISH = "post-finish"
    PRE_TERMINATE = "pre-terminate"
    POST_TERMINATE = "post-terminate"
