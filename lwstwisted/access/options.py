"""The options of access, for the command line of a service.

What is large is imported by the options that need it: ``lwstwisted --help`` is quick.
"""

from __future__ import annotations

import warnings
from typing import Any

from twisted.python.usage import UsageError

from lwstwisted.access.exposure import stays_on_loopback
from lwstwisted.access.rules import Rules, parse_rule


class AccessOptions:
    """A mixin for ``usage.Options``."""

    optFlags = [
        ["anonymous", None, "Let everybody who reaches the service do everything; without rules, that has to be said."],
    ]
    optParameters: list[list[Any]] = [
        ["signing-keys", None, None, "File with keys of signed URLs: lines of ID:SECRET, 32 bytes or more in hex."],
    ]

    def opt_auth(self: Any, description: str) -> None:
        """Who there is, by a checker of twisted.cred: htpasswd:PATH (bcrypt or Argon2), tokens:PATH, file:PATH and
        others; may be repeated. What they may do is said by --allow."""
        from twisted.cred.credentials import IUsernamePassword
        from twisted.cred.strcred import InvalidAuthType, makeChecker

        from lwstwisted.access.credentials import IBearerToken

        kind, _, argument = description.partition(":")
        try:
            with warnings.catch_warnings():
                # Twisted looks at all checkers that there are, and some of its own import what Python gives up (spwd).
                warnings.simplefilter("ignore", DeprecationWarning)
                checker: Any = makeChecker(description)
        except InvalidAuthType:
            raise UsageError(f"--auth {kind}: there is no such checker; take htpasswd:PATH or tokens:PATH") from None
        except OSError as error:
            raise UsageError(f"--auth {kind}: {argument}: {error.strerror}") from None
        except Exception as error:
            raise UsageError(f"--auth {kind}: {argument}: {error}") from None
        if {IUsernamePassword, IBearerToken}.isdisjoint(checker.credentialInterfaces):
            raise UsageError(f"--auth {kind}: it checks neither passwords nor tokens")
        self.setdefault("auth", []).append(checker)

    def opt_allow(self: Any, rule: str) -> None:
        """Who may do what: 'WHO:ACTIONS:PATH', such as 'alice,@staff:put,get,list:/files/team/**'; may be repeated.
        WHO is names, @GROUP, any-user, or anonymous; ACTIONS are put, get, list, delete and overwrite; in PATH, *
        is any segment, {user} the user's name, ** all beneath. What no rule allows is refused."""
        try:
            self.setdefault("allow", []).append(parse_rule(rule))
        except ValueError as error:
            raise UsageError(f"--allow: {error}") from None

    def opt_group(self: Any, text: str) -> None:
        """Who is in a group: 'NAME:USER,USER'; may be repeated."""
        name, _, users = text.partition(":")
        groups = self.setdefault("groups", {})
        if not name or not all(users.split(",")) or name in groups:
            raise UsageError("--group is NAME:USER,USER, once for each name")
        groups[name] = frozenset(users.split(","))

    def opt_host(self: Any, name: str) -> None:
        """Name that leads here; may be repeated. Requests for other ones are refused. [default: without rules, on
        loopback and with no trusted proxy, those of loopback and of --public-url; else any]"""
        from lwstwisted.access.hosts import Hosts

        try:
            Hosts([name])
        except ValueError as error:
            raise UsageError(f"--host: {error}") from None
        self.setdefault("hosts", []).append(name)

    def check_access(self: Any) -> None:
        """Check what belongs together.

        :raises UsageError: with a sentence that says what to do.
        """
        for name, nothing in (("auth", []), ("allow", []), ("groups", {}), ("hosts", [])):
            self.setdefault(name, nothing)
        try:
            self["rules"] = Rules(tuple(self["allow"]), self["groups"])
        except ValueError as error:
            raise UsageError(f"--allow: {error} (--group)") from None
        has_rules = bool(self["allow"] or self["signing-keys"])
        if self["auth"] and not self["allow"]:
            raise UsageError("--auth says who there is; say what they may do by --allow")
        if self["anonymous"] and has_rules:
            raise UsageError("--anonymous lets everybody do everything; --allow anonymous:... is for less than that")
        if not has_rules and not self["anonymous"] and not stays_on_loopback(self["listen"]):
            raise UsageError(
                "others than this machine can reach the service, and may do everything there; say who may do what by"
                " --allow and --auth, or say --anonymous"
            )
