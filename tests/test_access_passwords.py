"""Files of passwords and tokens."""

from __future__ import annotations

import hmac
import os
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

import argon2
import bcrypt
from twisted.cred.error import UnauthorizedLogin
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.access import passwords
from lwstwisted.access.checkers import HtpasswdChecker, TokenChecker
from lwstwisted.access.credentials import Password, Token
from lwstwisted.access.files import RereadFile
from lwstwisted.access.passwords import BadFile, decoy, matches, parse_htpasswd, parse_tokens

CHEAPEST = argon2.PasswordHasher(time_cost=1, memory_cost=passwords.LEAST_MEMORY, parallelism=1)


def bcrypt_hash(password: str) -> str:
    """As ``htpasswd -B -C 10`` writes it."""
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(passwords.LEAST_ROUNDS)).decode().replace("$2b$", "$2y$")


def at_once(work: object, *args: object) -> Deferred[bool]:
    """A thread that has done it already."""
    return maybeDeferred(work, *args)  # type: ignore[arg-type]


class FileTests(SynchronousTestCase):
    """What is taken from a file, and in which line the first mistake is."""

    def test_strong_hashes(self) -> None:
        """bcrypt and Argon2id let the right password in, and no other one."""
        found = parse_htpasswd(
            f"# who\n\nalice:{bcrypt_hash('one')}\r\njos\u00e9:{CHEAPEST.hash('two')}\nx y:{bcrypt_hash('')}\n"
        )
        self.assertEqual(list(found), ["alice", "jos\u00e9", "x y"])
        for name, right in (("alice", b"one"), ("jos\u00e9", b"two"), ("x y", b"")):
            self.assertTrue(matches(found[name], right), name)
            for wrong in (b"One", right + b"1", b"\0" + right, b"wrong"):
                self.assertFalse(matches(found[name], wrong), (name, wrong))

    def test_weak_hashes(self) -> None:
        """Each of the weak ways of htpasswd is refused with its line, as are costs that are too low or absurd."""
        strong = bcrypt_hash("x")
        for weak in (
            "rqXexS6ZhobKA",
            "$apr1$r31.....$HqJZimcKQFAMYayBlzkrA/",
            "{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g=",
            "$5$saltstring$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc8",
            "$1$abcdefgh$irWbblnpmw.5z7wgBnprh0",
            "plaintext",
            "",
            strong.replace("$10$", "$09$"),
            strong.replace("$10$", "$31$"),
            strong[:-1],
            CHEAPEST.hash("x").replace("argon2id", "argon2i"),
            CHEAPEST.hash("x").replace("m=7168", "m=8"),
            CHEAPEST.hash("x").replace("m=7168", "m=99999999"),
            CHEAPEST.hash("x").replace("t=1", "t=99999"),
        ):
            error = self.assertRaises(BadFile, parse_htpasswd, f"# one\nalice:{strong}\nbob:{weak}\n")
            self.assertEqual(error.line, 3, weak)
            self.assertTrue(str(error).startswith("line 3: "), weak)

    def test_lines_that_mean_nothing(self) -> None:
        """A line without a colon or name, or with a name that was there, is refused."""
        strong = bcrypt_hash("x")
        twice = f"jos\u00e9:{strong}\njose\u0301:{strong}\n"
        for text, line in (("alice\n", 1), (f":{strong}", 1), (f"a\tb:{strong}", 1), (twice, 2)):
            self.assertEqual(self.assertRaises(BadFile, parse_htpasswd, text).line, line, text)

    def test_a_long_password_is_not_cut(self) -> None:
        """bcrypt looks at 72 bytes: what agrees in those and isn't the password doesn't get in."""
        stored = parse_htpasswd(f"a:{bcrypt_hash('x' * 72)}")["a"]
        self.assertTrue(matches(stored, b"x" * 72))
        self.assertFalse(matches(stored, b"x" * 73))

    def test_tokens(self) -> None:
        """A token is known by its SHA-256; others are refused with their line."""
        tokens = parse_tokens(f"ci:{sha256(b'one').hexdigest()}\nbot:{sha256(b'two').hexdigest().upper()}\n")
        self.assertEqual([tokens.whose(token) for token in ("one", "two", "three", "")], ["ci", "bot", None, None])
        for stored in ("abc", "0" * 63, "0" * 65, bcrypt_hash("x"), "$argon2i$v=19$m=65536,t=3,p=4$c2FsdA$aGFzaA"):
            self.assertEqual(self.assertRaises(BadFile, parse_tokens, f"\nci:{stored}").line, 2, stored)

    def test_every_token_is_compared(self) -> None:
        """Whichever token it is, and if it is none, as many comparisons are made, each of them in constant time."""
        lines = [f"n{number}:{sha256(b'%d' % number).hexdigest()}" for number in range(20)]
        tokens, compared = parse_tokens("\n".join(lines)), []

        def counting(one: bytes, other: bytes) -> bool:
            compared.append(other)
            return one == other

        self.patch(hmac, "compare_digest", counting)
        for token in ("0", "10", "19", "none"):
            compared.clear()
            tokens.whose(token)
            self.assertEqual(len(compared), 20, token)

    def test_the_decoy(self) -> None:
        """It costs what most hashes cost, and no password is that of it."""
        self.assertEqual(decoy({}), "")
        cheap, strong = bcrypt_hash("x"), CHEAPEST.hash("x")
        for hashes, like in (({"a": cheap}, cheap[:7]), ({"a": cheap, "b": strong, "c": strong}, strong[:30])):
            self.assertEqual(decoy(hashes)[: len(like)], like)
            parse_htpasswd(f"nobody:{decoy(hashes)}")
            for password in (b"", b"x", b"\0"):
                self.assertFalse(matches(decoy(hashes), password))


class CheckerTests(SynchronousTestCase):
    """The checkers that twisted.cred knows."""

    def setUp(self) -> None:
        folder = tempfile.mkdtemp(prefix="lwstwisted-")
        self.addCleanup(shutil.rmtree, folder)
        self.path = Path(folder) / "file"
        self.hashed: list[str] = []
        real = passwords.matches

        def counting(stored: str, password: bytes) -> bool:
            self.hashed.append(stored)
            return real(stored, password)

        from lwstwisted.access import checkers

        self.patch(checkers, "matches", counting)

    def ask(self, checker: HtpasswdChecker | TokenChecker, credentials: Password | Token) -> str | None:
        return self.successResultOf(Deferred.fromCoroutine(checker.check(credentials, at_once)))  # type: ignore

    def test_an_unknown_name_costs_what_a_wrong_password_costs(self) -> None:
        """In both cases one hash of the same kind is computed."""
        self.path.write_text(f"alice:{bcrypt_hash('right')}\n")
        checker = HtpasswdChecker(str(self.path))
        for name, password, wanted in (
            (b"alice", b"right", "alice"),
            (b"alice", b"wrong", None),
            (b"eve", b"right", None),
            (b"", b"", None),
        ):
            self.hashed.clear()
            self.assertEqual(self.ask(checker, Password(name, password)), wanted)
            self.assertEqual([stored[:7] for stored in self.hashed], ["$2y$10$"], name)

    def test_an_empty_file_lets_nobody_in(self) -> None:
        """Which is how to lock everybody out."""
        self.path.write_text("")
        self.assertIsNone(self.ask(HtpasswdChecker(str(self.path)), Password(b"", b"")))
        self.assertIsNone(self.ask(TokenChecker(str(self.path)), Token("x")))

    def test_slow_tokens(self) -> None:
        """A token with an Argon2 hash begins with its name; any other one costs as much where there is such a hash."""
        fast = sha256(b"fast").hexdigest()
        self.path.write_text(f"ci.bot:{CHEAPEST.hash('ci.bot.secret')}\nalice:{fast}\n")
        checker = TokenChecker(str(self.path))
        for token, wanted, hashes in (
            ("ci.bot.secret", "ci.bot", 1),
            ("ci.bot.wrong", None, 1),
            ("eve.secret", None, 1),
            ("fast", "alice", 0),
        ):
            self.hashed.clear()
            self.assertEqual(self.ask(checker, Token(token)), wanted, token)
            self.assertEqual(len(self.hashed), hashes, token)

    def test_the_seam_of_twisted_cred(self) -> None:
        """A portal can use them as any other checker."""
        self.path.write_text(f"alice:{sha256(b'right').hexdigest()}\n")
        checker = TokenChecker(str(self.path))
        self.assertEqual(self.successResultOf(checker.requestAvatarId(Token("right"))), b"alice")
        self.failureResultOf(checker.requestAvatarId(Token("wrong")), UnauthorizedLogin)

    def test_a_file_that_cannot_be_used(self) -> None:
        """It is told at the start."""
        self.assertRaises(FileNotFoundError, HtpasswdChecker, str(self.path))
        self.path.write_text("alice:plain\n")
        self.assertIn("line 1", str(self.assertRaises(ValueError, HtpasswdChecker, str(self.path))))
        self.path.write_bytes(b"\xff")
        self.assertIn("UTF-8", str(self.assertRaises(ValueError, HtpasswdChecker, str(self.path))))
        self.path.write_text("")
        self.path.chmod(0o666)
        self.assertIn("everybody", str(self.assertRaises(ValueError, HtpasswdChecker, str(self.path))))
        self.assertIn("not a file", str(self.assertRaises(ValueError, RereadFile, "/dev/null", str)))


class RereadFileTests(SynchronousTestCase):
    """A file that changes while the service runs."""

    def setUp(self) -> None:
        folder = tempfile.mkdtemp(prefix="lwstwisted-")
        self.addCleanup(shutil.rmtree, folder)
        self.path = Path(folder) / "file"
        self.path.write_text("1")
        self.read: list[str] = []

    def parse(self, text: str) -> int:
        self.read.append(text)
        return int(text)

    def change(self, text: str) -> None:
        """Replace it as an editor does, so that it is another one whatever its time and size are."""
        other = self.path.with_name("new")
        other.write_text(text)
        os.replace(other, self.path)

    def test_a_change_is_seen(self) -> None:
        """What is in it now counts; while nothing changes it isn't read again."""
        file = RereadFile(str(self.path), self.parse)
        self.assertEqual((file.content, file.content, file.generation, self.read), (1, 1, 1, ["1"]))
        self.change("2")
        self.assertEqual((file.content, file.content, file.generation, self.read), (2, 2, 2, ["1", "2"]))

    def test_a_broken_change_is_not_taken(self) -> None:
        """What was in it still holds, and the log says once what is wrong; then the next change counts."""
        from twisted.logger import globalLogPublisher

        said: list[str] = []
        observer = lambda event: said.append(str(event.get("problem")))  # noqa: E731
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        file = RereadFile(str(self.path), self.parse)
        self.change("x")
        self.assertEqual([file.content, file.content, file.generation], [1, 1, 1])
        self.assertEqual(len(said), 1, said)
        self.path.unlink()
        self.assertEqual([file.content, file.content], [1, 1])
        self.assertEqual(said[1:], ["No such file or directory"])
        self.change("3")
        self.assertEqual([file.content, file.generation], [3, 2])

    def test_a_secret_of_its_own(self) -> None:
        """A file that everybody may read is refused where it is to be secret."""
        self.path.chmod(0o644)
        self.assertRaises(ValueError, RereadFile, str(self.path), self.parse, is_secret=True)
        self.path.chmod(0o640)
        self.assertEqual(RereadFile(str(self.path), self.parse, is_secret=True).content, 1)
