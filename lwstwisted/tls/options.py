"""The options of TLS, for the command line of a service."""

from __future__ import annotations

from typing import Any

from twisted.python.usage import UsageError

HTTPS = "https:"
"""In front of the description of any endpoint that is to speak TLS."""

PROFILES = ("intermediate", "modern")
DEMANDS = ("required", "optional")


class TLSOptions:
    """A mixin for ``usage.Options``."""

    optParameters: list[list[Any]] = [
        ["tls-profile", None, "intermediate", "What https: agrees to: Mozilla's intermediate, or modern (TLS 1.3)."],
        ["client-ca", None, None, "PEM file of authorities that say who a client of https: is. [default: not asked]"],
        ["client-certificate", None, "required", "With --client-ca: required, or optional."],
    ]

    def opt_certificate(self: Any, path: str) -> None:
        """Certificate of https: endpoints, in PEM: a file with key and chain, or with the chain beside the key's
        (NAME.crt and NAME.key, fullchain.pem and privkey.pem), or a folder of such, as certbot's; may be repeated.
        Each is for the hosts that it names, the first one for all others. [default: self-signed, for development]"""
        self.setdefault("certificates", []).append(path)

    def check_tls(self: Any) -> None:
        """Check what can be checked before any file is read.

        :raises UsageError: with a sentence that says what to do.
        """
        self.setdefault("certificates", [])
        if self["tls-profile"] not in PROFILES:
            raise UsageError(f"--tls-profile is {' or '.join(PROFILES)}")
        if self["client-certificate"] not in DEMANDS:
            raise UsageError(f"--client-certificate is {' or '.join(DEMANDS)}")
        if self["client-certificate"] != DEMANDS[0] and not self["client-ca"]:
            raise UsageError("--client-certificate needs --client-ca, the file of the authorities that are believed")
