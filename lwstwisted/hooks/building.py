"""Hooks as the options say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lwstwisted.hooks.command import CommandSender
from lwstwisted.hooks.http import HttpSender
from lwstwisted.hooks.options import HookSettings
from lwstwisted.hooks.senders import Sender
from lwstwisted.hooks.telling import Telling


def telling_of(settings: HookSettings | None, root: Path, reactor: Any) -> Telling | None:
    """What asks and tells; None where nobody is asked or told.

    :param root: of the store, which has to be recovered.
    :raises OSError: if what is to be told can't be opened.
    """
    if settings is None:
        return None
    sender: Sender
    if settings.folder is not None:
        sender = CommandSender(settings.folder, reactor, settings.timeout, settings.size_limit)
    else:
        sender = HttpSender(
            settings.url,
            reactor,
            settings.forwarded,
            settings.tries,
            settings.backoff,
            settings.timeout,
            settings.size_limit,
        )
    forwarded = [name.lower() for name in settings.forwarded]
    return Telling(root, sender, reactor, settings.enabled, forwarded, settings.interval)
