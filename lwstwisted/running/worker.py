"""How a process knows that it is one of several workers. It is asked before anything else, and so imports nothing."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

WORKER = "LWSTWISTED_WORKER"
"""In the environment of a worker: its number."""


def claim(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have a worker take the sockets for its own: its parent could not know its id. Before endpoints are imported."""
    if WORKER in environment:
        environment["LISTEN_PID"] = str(os.getpid())
