"""The options of the service, checked before anything is built; and what an endpoint description leaves unsaid.

Nothing of the service itself is imported here: ``lwstwisted --help`` is quick.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from ipaddress import ip_network
from typing import Any

from twisted.python.usage import UsageError

from lwstwisted.access.exposure import WRAPPERS
from lwstwisted.access.options import AccessOptions
from lwstwisted.config import Configurable
from lwstwisted.hooks.options import HookOptions
from lwstwisted.tls.options import TLSOptions
from lwstwisted.web.limits import DEFAULT_LIMITS, MAX_LENGTH, Limits

DEFAULT_PORT = 8443
DEFAULT_ROOT = "uploads"

BACKLOG = 1024
"""Connections that the kernel holds for us while we are busy. With Twisted's 50, one of 1,000 that come together waits
for as long as 17 s: its client knocks again after 1, 2, 4, ... seconds (tcp(7), tcp_syn_retries)."""

ANY_ORIGIN = "*"
NO_ORIGIN = "none"
"""What --allow-origin says for none but our own."""

ACCESS_LOG_FORMATS = ("combined", "json")
LOG_FORMATS = ("text", "json")
LOG_OBSERVERS = {"text": "lwstwisted.logs.text_observer", "json": "lwstwisted.logs.json_observer"}

_SPAN = re.compile(r"([0-9]{1,6})([mhd]?)")
_SECONDS = {"m": 60, "": 3600, "h": 3600, "d": 24 * 3600}
_ORIGIN = re.compile(r"https?://(?:[0-9A-Za-z.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?", re.IGNORECASE)
_PUBLIC = re.compile(_ORIGIN.pattern + r"(?:/[0-9A-Za-z._~-]+)*", re.IGNORECASE)
_SIZE = re.compile(r"([0-9]+)([KMGT]?)", re.IGNORECASE)
_LOOPBACK = {"tcp": "127.0.0.1", "ssl": "127.0.0.1", "tcp6": "::1", "tls": "::1"}
_BEFORE_BACKLOG = {"tcp": 3, "ssl": 2, "tcp6": 2, "tls": 3, "unix": 2}
"""How many fields there may be by position, the kind included, in front of one that would be the backlog."""
_FIELD_END = re.compile(r"(?<!\\):")
_NAMED_FIELD = re.compile(r"(?<!\\)=")


class Options(AccessOptions, HookOptions, TLSOptions, Configurable):
    """The command line, or a file (``config.py``). Each option says what happens without it."""

    longdesc = (
        "Serve file uploads: PUT, GET, HEAD and DELETE of /files/NAME, and listings of folders;"
        " resumable uploads at /uploads/ (tus 1.0, and Resumable Uploads for HTTP)."
    )
    optParameters = [
        ["root", "r", DEFAULT_ROOT, "Folder of the uploaded files; it is made if it isn't there."],
        ["durability", "d", "full", "What is synced before an answer: full (file and folder), data (file), none."],
        ["max-size", "m", None, "Bytes of the largest upload; 10G is understood. [default: no limit]"],
        ["min-free", None, "0", "Bytes of the disk that no upload takes; 5G is understood."],
        ["quota", "q", None, "Bytes that all files may take together. [default: no limit]"],
        ["upload-lifetime", None, "24h", "Time that an unfinished upload is kept after its last byte: 90m, 36h, 7d."],
        ["public-url", None, "", "What clients have in front of our paths: https://up.example.org [default: none]"],
        ["port", "p", DEFAULT_PORT, "Port of the default listener; not together with --listen.", int],
        ["workers", "w", 1, "Processes that serve together, with one more that watches them.", int],
        ["drain-time", None, 30.0, "Seconds that requests under way may take to end, when the service stops.", float],
        ["access-log", "a", None, "File that each request is written to. [default: the log of the service]"],
        ["access-log-format", None, "combined", "combined, as other web servers have it, or json: an object a line."],
        ["log-format", None, "text", "text, or json: an object a line; the log of the service on standard output."],
        ["metrics", None, None, "Endpoint of /metrics for Prometheus, such as 'tcp:9100'. [default: there is none]"],
    ]
    rows = {"allow": "{who}:{actions}:{path}"}
    separators = {"group": ":"}

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self["listen"] = []
        self["limits"] = {}
        self["allowed-origins"] = []
        self["trusted-proxies"] = []

    def parseOptions(self, options: Any = None) -> None:
        """See ``usage.Options``; the words are kept, for workers."""
        self.words = list(sys.argv[1:] if options is None else options)
        super().parseOptions(self.words)

    def opt_listen(self, description: str) -> None:
        """Twisted endpoint to listen on, such as 'tcp:8080'; with 'https:' in front for TLS, such as
        'https:tcp:443:interface=0.0.0.0' or 'https:systemd:domain=INET:name=https'; may be repeated. Without
        interface=... it binds loopback only. [default: https:tcp:8443]"""
        self["listen"].append(on_loopback(description))

    opt_l = opt_listen

    def opt_limit(self, setting: str) -> None:
        """A limit of what one client may take, as NAME=NUMBER; may be repeated. Their names, meanings and defaults
        are those of lwstwisted.web.limits.Limits, such as connections-per-address=100 or body-rate=0."""
        name, _, value = setting.partition("=")
        name = name.replace("-", "_")
        parse_limits({name: value})
        self["limits"][name] = value

    def opt_allow_origin(self, origin: str) -> None:
        """Origin of pages that may begin resumable uploads here, such as https://example.org, or '*' for any, or
        'none'; may be repeated. They never replace a file, and a browser sends no passwords or cookies with them.
        [default: *]"""
        if origin not in (ANY_ORIGIN, NO_ORIGIN) and not _ORIGIN.fullmatch(origin):
            raise UsageError("--allow-origin is an origin such as https://example.org, without a path; or '*', or none")
        self["allowed-origins"].append(origin)

    def opt_trusted_proxy(self, network: str) -> None:
        """Address or network of a proxy, such as 127.0.0.1 or 10.1.0.0/16, that is believed what it says of its
        clients (Forwarded, or X-Forwarded-For and X-Forwarded-Host); may be repeated. [default: none]"""
        try:
            self["trusted-proxies"].append(ip_network(network))
        except ValueError as error:
            raise UsageError(f"--trusted-proxy is an address or a network: {error}") from None

    def postOptions(self) -> None:
        """Check what can be checked before anything is built.

        :raises UsageError: with a sentence that says what to do.
        """
        if self["durability"] not in ("full", "data", "none"):
            raise UsageError("--durability is full, data or none")
        self["max-size"] = MAX_LENGTH if self["max-size"] is None else parse_size("--max-size", self["max-size"])
        self["min-free"] = parse_size("--min-free", self["min-free"])
        self["quota"] = None if self["quota"] is None else parse_size("--quota", self["quota"])
        self["upload-lifetime"] = parse_span("--upload-lifetime", self["upload-lifetime"])
        url = self["public-url"].rstrip("/")
        if url and not _PUBLIC.fullmatch(url):
            raise UsageError("--public-url is a URL such as https://up.example.org, without a query")
        self["public-url"] = url
        self["allowed-origins"] = [one for one in self["allowed-origins"] or [ANY_ORIGIN] if one != NO_ORIGIN]
        if self["quota"] == 0:
            raise UsageError("--quota is above 0; without it there is no limit")
        if self["listen"] and self["port"] != DEFAULT_PORT:
            raise UsageError("--port is for the default listener; with --listen, name the port there")
        if not 1 <= self["port"] <= 65535:
            raise UsageError("--port is a number from 1 to 65535")
        self["limits"] = parse_limits(self["limits"])
        if self["workers"] < 1:
            raise UsageError("--workers is a number above 0")
        if not 0 <= self["drain-time"] < float("inf"):
            raise UsageError("--drain-time is a number of seconds, or 0")
        self.check_tls()
        if self["access-log-format"] not in ACCESS_LOG_FORMATS:
            raise UsageError(f"--access-log-format is {' or '.join(ACCESS_LOG_FORMATS)}")
        if self["log-format"] not in LOG_FORMATS:
            raise UsageError(f"--log-format is {' or '.join(LOG_FORMATS)}")
        self.check_access()
        self.check_hooks()
        self._observe()
        if self["metrics"]:
            self["metrics"] = on_loopback(self["metrics"])
        if not self["root"]:
            raise UsageError("--root is the name of a folder; '.' is the current one")

    def _observe(self) -> None:
        """Have twistd write its log as it is asked for here, unless it was told itself."""
        daemon: Any = self.parent or {}
        if "logger" not in daemon:
            return
        if daemon["logger"] is None and daemon["nodaemon"] and not (daemon["logfile"] or daemon["syslog"]):
            daemon["logger"] = LOG_OBSERVERS[self["log-format"]]
        elif self["log-format"] != "text":
            raise UsageError(
                "--log-format is for standard output; to twistd, say --nodaemon, and neither --logfile nor --logger"
            )


def parse_size(option: str, text: str) -> int:
    """Read a number of bytes, such as ``512`` or ``10G`` (powers of 1024).

    :param option: the name of the option, for the error.
    :raises UsageError: if it is none.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{option} is a number of bytes, with K, M, G or T behind it if you like")
    digits, power = match.groups()
    if len(digits) > len(str(MAX_LENGTH)):
        return MAX_LENGTH
    return min(int(digits) << 10 * " KMGT".index(power.upper() or " "), MAX_LENGTH)


def parse_span(option: str, text: str) -> float:
    """Read a time above 0, such as ``90m``, ``36h`` or ``7d``; a number alone means hours.

    :param option: the name of the option, for the error.
    :returns: seconds.
    :raises UsageError: if it is none.
    """
    match = _SPAN.fullmatch(text)
    if match is None or not int(match[1]):
        raise UsageError(f"{option} is a number of hours, or one with m, h or d behind it: minutes, hours, days")
    return float(int(match[1]) * _SECONDS[match[2]])


def parse_limits(settings: Mapping[str, str]) -> Limits:
    """Read limits.

    :param settings: names and numbers.
    :raises UsageError: for a name that isn't known, or a number that is none or can't be meant.
    """
    kinds = {field.name: type(getattr(DEFAULT_LIMITS, field.name)) for field in fields(Limits)}
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in kinds:
            raise UsageError(f"--limit is NAME=NUMBER; the names are {', '.join(kinds)}".replace("_", "-"))
        try:
            found[name] = kinds[name](value)
        except ValueError:
            raise UsageError(f"--limit {name.replace('_', '-')}={value}: {value!r} is not a number") from None
    try:
        return Limits(**found)
    except ValueError as error:
        raise UsageError(f"--limit: {str(error).replace('_', '-')}") from None


def on_loopback(description: str) -> str:
    """Bind an endpoint that says nothing of its interface to loopback.

    :param description: a server endpoint description.
    """
    for wrapper in WRAPPERS:
        if description.startswith(wrapper):
            return wrapper + on_loopback(description.removeprefix(wrapper))
    fields = _FIELD_END.split(description)
    loopback = _LOOPBACK.get(fields[0])
    positional = [field for field in fields[1:] if not _NAMED_FIELD.search(field)]
    # tcp:PORT:INTERFACE is the only one of them that people write by position; an empty one says nothing.
    is_told = any(re.match("interface=.", field) for field in fields) or (fields[0] == "tcp" and any(positional[1:]))
    if loopback is None or is_told:
        return description
    return f"{description}:interface={loopback.replace(':', chr(92) + ':')}"


def with_backlog(description: str) -> str:
    """Let an endpoint that doesn't say how many connections may wait for us have :data:`BACKLOG` of them.

    :param description: a server endpoint description.
    """
    for wrapper in WRAPPERS:
        if description.startswith(wrapper):
            return wrapper + with_backlog(description.removeprefix(wrapper))
    fields = _FIELD_END.split(description)
    positional = [field for field in fields if not _NAMED_FIELD.search(field)]
    is_told = any(field.startswith("backlog=") for field in fields)
    if is_told or len(positional) > _BEFORE_BACKLOG.get(fields[0], 0):
        return description
    return f"{description}:backlog={BACKLOG}"
