"""What an operator may say of access, and what is refused at the start."""

from __future__ import annotations

import shutil
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from twisted.cred import strcred
from twisted.internet.task import Clock
from twisted.plugins.cred_file import theFileCheckerFactory
from twisted.python.usage import Options as UsageOptions
from twisted.python.usage import UsageError
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.access.building import entrance_of
from lwstwisted.access.checkers import TokenChecker
from lwstwisted.access.options import AccessOptions
from lwstwisted.access.rules import Action


class Parsed(AccessOptions, UsageOptions):
    """The options of a service that has no others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.update({"listen": [], "trusted-proxies": [], "public-url": ""})

    def opt_listen(self, description: str) -> None:
        """Endpoint."""
        self["listen"].append(description)

    def postOptions(self) -> None:
        """Check."""
        self.check_access()


class OptionsTests(SynchronousTestCase):
    """Command lines."""

    def setUp(self) -> None:
        folder = tempfile.mkdtemp(prefix="lwstwisted-")
        self.addCleanup(shutil.rmtree, folder)
        self.path = Path(folder) / "file"
        self.patch(strcred, "makeChecker", self.make_checker)

    def make_checker(self, description: str) -> Any:
        """What strcred does, with the checkers that these tests are about."""
        kind, _, argument = description.partition(":")
        makers: dict[str, Any] = {"tokens": TokenChecker, "file": theFileCheckerFactory.generateChecker}
        if kind not in makers:
            raise strcred.InvalidAuthType(kind)
        return makers[kind](argument)

    def parse(self, *words: str) -> Parsed:
        options = Parsed()
        options.parseOptions(words)  # type: ignore[no-untyped-call]
        return options

    def complaint(self, *words: str) -> str:
        return str(self.assertRaises(UsageError, self.parse, *words))

    def test_rules_and_users(self) -> None:
        """Rules, groups and checkers, each as often as somebody likes."""
        self.path.write_text(f"ci:{sha256(b'x').hexdigest()}\n")
        words = ["--auth", f"tokens:{self.path}", "--allow", "@bots:put:/files/**", "--allow", "anonymous:list:/files/"]
        options = self.parse(*words, "--group", "bots:ci,cd")
        self.assertIsInstance(options["auth"][0], TokenChecker)
        self.assertTrue(options["rules"].of("cd").may(Action.PUT, ("a",)))
        self.assertFalse(options["rules"].of("").may(Action.PUT, ("a",)))

    def test_beyond_loopback(self) -> None:
        """Without rules nobody else gets in unless somebody says so."""
        public = ("--listen", "tcp:80:interface=0.0.0.0")
        self.assertIn("--anonymous", self.complaint(*public))
        self.parse(*public, "--anonymous")
        self.parse(*public, "--allow", "anonymous:get:/files/**")
        self.parse(*public, "--signing-keys", "keys")
        self.parse("--listen", "tcp:80:interface=127.0.0.1")
        self.parse()

    def test_contradictions(self) -> None:
        """Users who may do nothing, rules beside a free-for-all, groups that aren't there or are there twice."""
        self.path.write_text("")
        self.assertIn("--allow", self.complaint("--auth", f"tokens:{self.path}"))
        self.assertIn("--anonymous", self.complaint("--anonymous", "--allow", "anonymous:get:/files/**"))
        self.assertIn("@staff", self.complaint("--allow", "@staff:get:/files/**"))
        self.assertIn("--group", self.complaint("--group", "staff"))
        self.assertIn("--group", self.complaint("--group", "a:b", "--group", "a:c"))
        self.assertIn("no action", self.complaint("--allow", "a:write:/files/**"))
        self.assertIn("--host", self.complaint("--host", "https://example.org"))

    def test_files_that_cannot_be_used(self) -> None:
        """The complaint has the file, and the line."""
        self.assertIn("No such file", self.complaint("--auth", f"tokens:{self.path}"))
        self.path.write_text("ci:short\n")
        complaint = self.complaint("--auth", f"tokens:{self.path}")
        self.assertIn("line 1", complaint)
        self.assertIn(str(self.path), complaint)
        self.assertIn("no such checker", self.complaint("--auth", "nonsense:x"))

    def test_host_names(self) -> None:
        """Which names are ours by default: those of loopback, where nothing else keeps a page out."""
        public = ("--listen", "tcp:80:interface=0.0.0.0")
        rules = ("--allow", "anonymous:get:/files/**")
        for words, has_names in (
            ((), True),
            (("--listen", "tcp:80:interface=127.0.0.1"), True),
            ((*public, "--anonymous"), False),
            (("--anonymous",), False),
            (rules, False),
            ((*rules, "--host", "up.example.org"), True),
            ((*public, "--anonymous", "--host", "up.example.org"), True),
        ):
            entrance = entrance_of(self.parse(*words), Clock(), str)
            self.assertIs(entrance._hosts is not None, has_names, words)
        behind_a_proxy = self.parse()
        behind_a_proxy["trusted-proxies"] = ["127.0.0.1"]
        self.assertIsNone(entrance_of(behind_a_proxy, Clock(), str)._hosts)
        named = self.parse()
        named["public-url"] = "https://up.example.org:8443/x"
        hosts = entrance_of(named, Clock(), str)._hosts
        assert hosts is not None
        self.assertEqual(hosts._names, {b"localhost", b"127.0.0.1", b"[::1]", b"up.example.org"})

    def test_nothing_is_looked_at_without_rules(self) -> None:
        """On loopback, a request is let in by the same call that answers it, and no coroutine of ours around it."""
        entrance = entrance_of(self.parse(), Clock(), str)
        given: list[Any] = []
        answer: Any = object()
        found = entrance.let_in(object(), lambda visitor: given.append(visitor) or answer)  # type: ignore
        self.assertIs(found, answer)
        self.assertEqual((given[0].owner, given[0].may(Action.DELETE, ("a",))), ("", True))

    def test_keys(self) -> None:
        """A file of keys that others may read, or that means nothing, is refused at the start."""
        options = self.parse("--signing-keys", str(self.path))
        self.assertRaises(OSError, entrance_of, options, Clock(), str)
        self.path.write_text("k1:00\n")
        self.path.chmod(0o600)
        self.assertIn("line 1", str(self.assertRaises(ValueError, entrance_of, options, Clock(), str)))
        self.path.write_text(f"k1:{'00' * 32}\n")
        entrance_of(options, Clock(), str)
        self.path.chmod(0o604)
        self.assertIn("everybody", str(self.assertRaises(ValueError, entrance_of, options, Clock(), str)))
