"""Digests of bytes that pass by, and what they should be in the end."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


class RunningDigests:
    """Hashes bytes as they come.

    :param expected: what all of them together should hash to, by ``hashlib`` name.
    """

    __slots__ = ("_expected", "_hashes")

    def __init__(self, expected: Mapping[str, bytes]) -> None:
        self._expected = expected
        # A client may ask for MD5, which no one relies on here.
        self._hashes = {name: hashlib.new(name, usedforsecurity=False) for name in expected}

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        for running in self._hashes.values():
            running.update(data)

    def wrong(self) -> list[str]:
        """The digests that aren't what they should be."""
        return [name for name, running in self._hashes.items() if running.digest() != self._expected[name]]
