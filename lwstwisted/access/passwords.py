"""Files of passwords and tokens, as text; and what it takes to compare with them.

``htpasswd`` knows many ways to store a password. Two of them are taken: bcrypt and Argon2id, which are slow on purpose.
Anything that a graphics card guesses by the billion (crypt, MD5, SHA-1) is refused, with its line, when the file is
read: to find that out behind a theft is too late. A token may be kept as its plain SHA-256, if it is as random as it
should be (32 bytes of it): nobody guesses that, be the hash as fast as it likes.

Nothing here tells by its time whether a name is known: an unknown one is compared with a hash of nobody.
"""

from __future__ import annotations

import hmac
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256

import argon2
import bcrypt

LEAST_ROUNDS = 10
"""Cost of bcrypt at least (2^10 rounds): what OWASP's password storage cheat sheet asks for."""
MOST_ROUNDS = 15
"""At most: 2 s of a processor for each login, which is an invitation."""
LEAST_MEMORY, MOST_MEMORY = 7 * 1024, 1024 * 1024
"""KiB of Argon2: of the smallest of the parameters that the cheat sheet names; and what a few threads may take."""
MOST_PASSES = 64

BCRYPT_LENGTH = 72
"""Bytes that bcrypt looks at; what is longer would be cut in silence."""

_BCRYPT = re.compile(r"\$2[aby]\$([0-9]{2})\$[./A-Za-z0-9]{53}")
_ARGON2 = re.compile(r"\$argon2id\$v=19\$m=([0-9]{1,9}),t=([0-9]{1,5}),p=([0-9]{1,3})\$[A-Za-z0-9+/]+\$[A-Za-z0-9+/]+")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

_argon2 = argon2.PasswordHasher()


class BadFile(ValueError):
    """A file that can't be used.

    :param line: its number, from 1.
    """

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(f"line {line}: {problem}")
        self.line = line


def _entries(text: str) -> Iterator[tuple[int, str, str]]:
    """Line numbers, names, and what stands behind them."""
    seen: set[str] = set()
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, stored = line.partition(":")
        name = unicodedata.normalize("NFC", name)
        if not colon or not name or _CONTROL.search(name):
            raise BadFile(number, "a line is NAME:HASH, without a control character in the name")
        if name in seen:
            raise BadFile(number, "the name was in an earlier line")
        seen.add(name)
        yield number, name, stored


def _require_strong(number: int, stored: str) -> None:
    if match := _BCRYPT.fullmatch(stored):
        if not LEAST_ROUNDS <= int(match[1]) <= MOST_ROUNDS:
            raise BadFile(number, f"the cost of bcrypt is from {LEAST_ROUNDS} to {MOST_ROUNDS} (htpasswd -B -C 12)")
    elif match := _ARGON2.fullmatch(stored):
        memory, passes, _ = map(int, match.groups())
        if not (LEAST_MEMORY <= memory <= MOST_MEMORY and 1 <= passes <= MOST_PASSES):
            raise BadFile(number, f"Argon2 has {LEAST_MEMORY} to {MOST_MEMORY} KiB and up to {MOST_PASSES} passes")
    else:
        raise BadFile(number, "only bcrypt ($2y$, by htpasswd -B) and $argon2id$ are taken; anything else is too weak")


def parse_htpasswd(text: str) -> dict[str, str]:
    """Read a file of passwords: lines of ``NAME:HASH``, empty ones, and comments that begin with ``#``.

    :returns: the hash of each name.
    :raises BadFile: for a line that is malformed, doubled, or too weak.
    """
    found = {}
    for number, name, stored in _entries(text):
        _require_strong(number, stored)
        found[name] = stored
    return found


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens that let somebody in.

    :ivar digests: names, and the SHA-256 of each token.
    :ivar hashes: names, and the Argon2 hash of a token that begins with the name and a dot.
    """

    digests: tuple[tuple[str, bytes], ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)

    def whose(self, token: str) -> str | None:
        """Whose token it is, by its SHA-256. Each line is looked at, whatever the one before it said."""
        found, digest = None, sha256(token.encode()).digest()
        for name, expected in self.digests:
            if hmac.compare_digest(digest, expected):
                found = name
        return found


def parse_tokens(text: str) -> Tokens:
    """Read a file of tokens: lines of ``NAME:SHA256`` in hex, or of ``NAME:$argon2id$...``.

    One with an Argon2 hash has to begin with the name and a dot: else each line would have to be tried.

    :raises BadFile: as :func:`parse_htpasswd`.
    """
    digests, hashes = [], {}
    for number, name, stored in _entries(text):
        if _SHA256.fullmatch(stored):
            digests.append((name, bytes.fromhex(stored)))
        elif stored.startswith("$argon2"):
            _require_strong(number, stored)
            hashes[name] = stored
        else:
            raise BadFile(number, "a token is kept as its SHA-256 in 64 hex digits, or as $argon2id$")
    return Tokens(tuple(digests), hashes)


def matches(stored: str, password: bytes) -> bool:
    """Whether a password is the one of a hash. It takes a while: for a thread.

    :param stored: checked by one of the functions above.
    """
    if stored.startswith("$2"):
        is_cut = len(password) > BCRYPT_LENGTH or b"\0" in password
        # Hashed all the same, as the time would tell else that the name is known.
        is_right = bcrypt.checkpw(password[:BCRYPT_LENGTH].replace(b"\0", b""), stored.encode())
        return is_right and not is_cut
    try:
        return _argon2.verify(stored, password)
    except argon2.exceptions.VerificationError:
        return False


def decoy(hashes: Mapping[str, str]) -> str:
    """A hash that takes as long as most of the others, and that no password has; "" where there are no others."""
    likes: dict[str, int] = {}
    for stored in hashes.values():
        like = stored[: stored.rindex("$", 0, stored.rindex("$"))] if stored.startswith("$a") else stored[:7]
        likes[like] = likes.get(like, 0) + 1
    return _of_nobody(max(likes, key=likes.__getitem__)) if likes else ""


@cache
def _of_nobody(like: str) -> str:
    """A hash with some parameters that no password has: what comes out of a hash function isn't chosen."""
    if like.startswith("$2"):
        return f"{like}{'.' * 53}"
    return f"{like}${'A' * 22}${'A' * 43}"
