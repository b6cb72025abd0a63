"""Digests of bytes that pass by, and what they should be in the end."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from typing import Protocol


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...

    def digest(self) -> bytes: ...


class _Crc32:
    """As ``hashlib`` would have it: four bytes, the highest first."""

    def __init__(self) -> None:
        self._sum = 0

    def update(self, data: bytes | memoryview, /) -> None:
        self._sum = zlib.crc32(data, self._sum)

    def digest(self) -> bytes:
        return self._sum.to_bytes(4, "big")


def new_hash(name: str) -> _Hash:
    """A hash by its ``hashlib`` name, or ``crc32``."""
    # A client may ask for MD5, which no one relies on here.
    return _Crc32() if name == "crc32" else hashlib.new(name, usedforsecurity=False)


class RunningDigests:
    """Hashes bytes as they come.

    :param expected: what all of them together should hash to, by ``hashlib`` name, or ``crc32``; None for anything.
    """

    __slots__ = ("_expected", "_hashes")

    def __init__(self, expected: Mapping[str, bytes | None]) -> None:
        self._expected = expected
        self._hashes = {name: new_hash(name) for name in expected}

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        for running in self._hashes.values():
            running.update(data)

    def wrong(self) -> list[str]:
        """The digests that aren't what they should be."""
        return [name for name, digest in self.found().items() if self._expected[name] not in (None, digest)]

    def found(self) -> dict[str, bytes]:
        """What the bytes hash to, by each name."""
        return {name: running.digest() for name, running in self._hashes.items()}
