"""The options of hooks, under the names that they have for tusd."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from twisted.python.usage import UsageError

from lwstwisted.hooks.names import Hook

ENABLED = "pre-create,post-create,post-receive,post-terminate,post-finish"
"""Those that tusd has enabled."""

_SPAN = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h)?")
_SECONDS = {"ms": 0.001, "s": 1.0, None: 1.0, "m": 60.0, "h": 3600.0}
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True, slots=True)
class HookSettings:
    """What an operator has said of hooks.

    :ivar folder: of commands, or None.
    :ivar url: that events are sent to, or "".
    :ivar forwarded: names of fields that are handed on.
    :ivar tries: how often an answer is asked for.
    :ivar backoff: seconds between two tries.
    :ivar timeout: seconds for all of them, or for a command.
    :ivar size_limit: bytes of an answer.
    :ivar enabled: the events that anybody hears of.
    :ivar interval: seconds between two ``post-receive``.
    """

    folder: Path | None
    url: str
    forwarded: tuple[str, ...]
    tries: int
    backoff: float
    timeout: float
    size_limit: int
    enabled: Collection[Hook]
    interval: float


class HookOptions:
    """A mixin for ``usage.Options``."""

    optParameters: list[list[Any]] = [
        ["hooks-dir", None, None, "Folder of programs named after events (pre-create, ...), which are run for them."],
        ["hooks-http", None, None, "URL that events are sent to by POST."],
        ["hooks-http-forward-headers", None, "", "Fields of a client's request that are handed on: Cookie,X-Me."],
        ["hooks-http-retry", None, "3", "How often an answer is asked for that an upload waits for."],
        ["hooks-http-backoff", None, "1s", "Pause between two tries to get an answer: 500ms, 2s."],
        ["hooks-http-timeout", None, "15s", "Time for all tries to get an answer together, or for a program."],
        ["hooks-http-size-limit", None, "5120", "Bytes that the answer to an event may have."],
        ["hooks-enabled-events", None, ENABLED, "Which events are asked about and told."],
        ["progress-hooks-interval", None, "1s", "Time between two post-receive of an upload."],
    ]

    def check_hooks(self: Any) -> None:
        """Check all of them; ``self["hooks"]`` is a :class:`HookSettings` then, or None.

        :raises UsageError: with a sentence that says what to do.
        """
        folder, url = self["hooks-dir"], self["hooks-http"]
        if folder and url:
            raise UsageError("--hooks-dir and --hooks-http are two ways for the same events; take one of them")
        if folder:
            try:
                os.scandir(folder).close()
            except OSError as error:
                raise UsageError(f"--hooks-dir: {folder}: {error.strerror}") from None
        if url:
            _check_url(url)
        forwarded = tuple(name.strip() for name in self["hooks-http-forward-headers"].split(",") if name.strip())
        if not all(map(_TOKEN.fullmatch, forwarded)):
            raise UsageError("--hooks-http-forward-headers is a list of field names, such as Cookie,X-Request-Id")
        settings = HookSettings(
            folder=Path(folder) if folder else None,
            url=url or "",
            forwarded=forwarded,
            tries=_number("--hooks-http-retry", self["hooks-http-retry"]),
            backoff=_seconds("--hooks-http-backoff", self["hooks-http-backoff"]),
            timeout=_seconds("--hooks-http-timeout", self["hooks-http-timeout"]),
            size_limit=_number("--hooks-http-size-limit", self["hooks-http-size-limit"]),
            enabled=_events(self["hooks-enabled-events"] or ENABLED),
            interval=_seconds("--progress-hooks-interval", self["progress-hooks-interval"]),
        )
        if not settings.timeout or not settings.interval:
            raise UsageError("--hooks-http-timeout and --progress-hooks-interval are above 0")
        self["hooks"] = settings if folder or url else None


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_right = url.isascii() and parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_right = False
    if not is_right or not url.isprintable() or " " in url:
        raise UsageError("--hooks-http is a URL such as https://app.example.org/hooks")
    if "@" in parts.netloc:
        raise UsageError("--hooks-http: a URL with a password would be seen in lists of processes; leave it out")


def _events(text: str) -> frozenset[Hook]:
    try:
        return frozenset(Hook(name.strip()) for name in text.split(","))
    except ValueError as error:
        names = ", ".join(hook.value for hook in Hook)
        raise UsageError(f"--hooks-enabled-events is a list of {names}: {error}") from None


def _number(option: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UsageError(f"{option} is a number")
    return int(text)


def _seconds(option: str, text: str) -> float:
    match = _SPAN.fullmatch(text)
    if match is None:
        raise UsageError(f"{option} is a time such as 500ms, 2s or 1m")
    return float(match[1]) * _SECONDS[match[2]]
