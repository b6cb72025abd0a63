"""Rules: who may do what where."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.access.rules import UNKNOWN, Action, Rules, make_rule, parse_rule

PUT, GET, LIST, DELETE, OVERWRITE = Action.PUT, Action.GET, Action.LIST, Action.DELETE, Action.OVERWRITE
NOBODY = ""


def rules_of(*texts: str, **groups: set[str]) -> Rules:
    return Rules(tuple(map(parse_rule, texts)), groups)


class RulesTests(SynchronousTestCase):
    """A rule is a row: what it allows, and what is as near to that as can be and isn't allowed."""

    def look(self, rules: Rules, *rows: tuple[str, Action, str, bool]) -> None:
        for user, action, path, wanted in rows:
            name = tuple(path.split("/")) if path else ()
            self.assertIs(rules.of(user).may(action, name), wanted, (user, action, path))

    def test_nothing_is_allowed_by_default(self) -> None:
        """Without a rule nobody may do anything, wherever."""
        for action in Action:
            self.look(rules_of(), ("alice", action, "a", False), (NOBODY, action, "", False))

    def test_a_rule_allows_what_it_says_and_nothing_else(self) -> None:
        """The user, the action and the path all have to be the rule's."""
        self.look(
            rules_of("alice,bob:put,get:/files/team/**"),
            ("alice", PUT, "team/a", True),
            ("bob", GET, "team/a/b/c", True),
            ("alice", LIST, "team", False),
            ("alice", DELETE, "team/a", False),
            ("alice", OVERWRITE, "team/a", False),
            ("eve", PUT, "team/a", False),
            (NOBODY, PUT, "team/a", False),
            ("alice", PUT, "teams/a", False),
            ("alice", PUT, "tea", False),
            ("alice", PUT, "", False),
            ("alice", PUT, "x/team/a", False),
            ("Alice", PUT, "team/a", False),
        )

    def test_paths(self) -> None:
        """``*`` is one segment, ``**`` all beneath with the folder itself, and anything else only what it says."""
        self.look(
            rules_of("any-user:get:/files/a/*/c", "any-user:list:/files/b/**", "any-user:put:/files/d"),
            ("u", GET, "a/b/c", True),
            ("u", GET, "a/c", False),
            ("u", GET, "a/b/b/c", False),
            ("u", GET, "a/b", False),
            ("u", GET, "a/b/c/d", False),
            ("u", LIST, "b", True),
            ("u", LIST, "b/x/y", True),
            ("u", LIST, "", False),
            ("u", PUT, "d", True),
            ("u", PUT, "d/e", False),
        )
        self.look(rules_of("any-user:list:/files/"), ("u", LIST, "", True), ("u", LIST, "a", False))
        self.look(rules_of("any-user:list:/files/**"), ("u", LIST, "", True), ("u", LIST, "a/b", True))
        self.look(rules_of("any-user:list:/files/a/"), ("u", LIST, "a", True), ("u", LIST, "a/b", False))

    def test_everybody_and_every_user(self) -> None:
        """What anonymous may, each user may as well; any-user is nobody who hasn't said who they are."""
        self.look(
            rules_of("anonymous:put:/files/inbox/*", "any-user:get:/files/inbox/*"),
            (NOBODY, PUT, "inbox/a", True),
            ("alice", PUT, "inbox/a", True),
            ("alice", GET, "inbox/a", True),
            (NOBODY, GET, "inbox/a", False),
        )

    def test_the_union_counts(self) -> None:
        """Each rule adds something, in whatever order they are."""
        texts = ["alice:put:/files/a", "alice:get:/files/a", "any-user:list:/files/"]
        for order in (texts, texts[::-1]):
            self.look(
                rules_of(*order), ("alice", PUT, "a", True), ("alice", GET, "a", True), ("alice", LIST, "", True)
            )

    def test_groups(self) -> None:
        """A group's rule is for its members; one that nobody has defined is a mistake."""
        rules = rules_of("@staff:get:/files/**", staff={"alice"})
        self.look(rules, ("alice", GET, "a", True), ("bob", GET, "a", False), (NOBODY, GET, "a", False))
        error = self.assertRaises(ValueError, rules_of, "@staff:get:/files/**")
        self.assertIn("@staff", str(error))

    def test_names_that_look_like_something_else(self) -> None:
        """Whoever is called like a group or a keyword isn't what they are called."""
        rules = rules_of("@staff:get:/files/**", "any-user:list:/files/", "anonymous:put:/files/x", staff={"alice"})
        self.look(rules, ("@staff", GET, "a", False), ("staff", GET, "a", False))
        self.look(rules_of("alice:get:/files/**"), ("any-user", GET, "a", False), ("anonymous", GET, "a", False))

    def test_own_folders(self) -> None:
        """``{user}`` is the user's own name, compared and never expanded; it is nobody's without one."""
        rules = rules_of("any-user:put,get:/files/home/{user}/**", "anonymous:get:/files/of/{user}")
        self.look(
            rules,
            ("alice", PUT, "home/alice/a", True),
            ("alice", GET, "home/alice", True),
            ("alice", PUT, "home/bob/a", False),
            ("alice", PUT, "home/{user}/a", False),
            (NOBODY, GET, "of/", False),
            ("alice", GET, "of/alice", True),
        )
        # Names that would be something else to a pattern or a path.
        for user in ("*", "**", "..", ".", "a/b", "bob/..", "{user}", "home/bob"):
            self.look(rules, (user, PUT, "home/bob/a", False), (user, PUT, "home/a/b", False))

    def test_unicode_is_compared_as_it_is_stored(self) -> None:
        """The two ways to write é are one name, in the rule for a user as in the path."""
        rules = rules_of("jose\u0301:get:/files/caf\u00e9")
        self.look(rules, ("jos\u00e9", GET, "caf\u00e9", True))

    def test_a_name_that_nobody_knows_yet(self) -> None:
        """Only what allows every name there allows it."""
        name = (UNKNOWN,)
        self.assertTrue(rules_of("a:put:/files/*").of("a").may(PUT, name))
        self.assertTrue(rules_of("a:put:/files/**").of("a").may(PUT, name))
        self.assertFalse(rules_of("a:put:/files/x").of("a").may(PUT, name))
        self.assertFalse(rules_of("a:put:/files/{user}").of("a").may(PUT, name))

    def test_what_may_lie_beneath(self) -> None:
        """Whether a folder leads to anything that is allowed."""
        allowed = rules_of("alice:put:/files/a/{user}/c", "alice:get:/files/b/**").of("alice")
        for action, folder, wanted in (
            (PUT, (), True),
            (PUT, ("a",), True),
            (PUT, ("a", "alice"), True),
            (PUT, ("a", "bob"), False),
            (PUT, ("a", "alice", "c"), False),
            (PUT, ("b",), False),
            (GET, ("b",), True),
            (GET, ("b", "c", "d"), True),
            (GET, ("a",), False),
        ):
            self.assertIs(allowed.may_beneath(action, folder), wanted, (action, folder))

    def test_what_may_lie_in_a_folder(self) -> None:
        """Whether some file right there is allowed, whichever; not what only leads to one."""
        allowed = rules_of("alice:put:/files/a/{user}/c", "alice:get:/files/b/**", "alice:list:/files/*").of("alice")
        for action, folder, wanted in (
            (PUT, (), False),
            (PUT, ("a",), False),
            (PUT, ("a", "alice"), True),
            (PUT, ("a", "bob"), False),
            (PUT, ("a", "alice", "c"), False),
            (GET, ("b",), True),
            (GET, ("b", "c"), True),
            (GET, ("c",), False),
            (LIST, (), True),
            (LIST, ("x",), False),
        ):
            self.assertIs(allowed.may_in(action, folder), wanted, (action, folder))

    def test_mistakes(self) -> None:
        """A rule that means nothing is refused, with a sentence about what is wrong with it."""
        for text, said in (
            ("alice", "WHO:ACTIONS:PATH"),
            ("alice:put", "WHO:ACTIONS:PATH"),
            (":put:/files/a", "somebody"),
            ("alice,,bob:put:/files/a", "somebody"),
            ("@:put:/files/a", "somebody"),
            ("alice:write:/files/a", "no action"),
            ("alice::/files/a", "no action"),
            ("alice:overwrite:/files/a", "put as well"),
            ("alice:put:files/a", "begins with /files/"),
            ("alice:put:/uploads/a", "begins with /files/"),
            ("alice:put:/files", "begins with /files/"),
            ("alice:put:/files/**/a", "only at the end"),
            ("alice:put:/files/a//b", "only at the end"),
            ("alice:put:/files/../a", "only at the end"),
            ("alice:put:/files/a*", "whole segments"),
            ("alice:put:/files/x{user}", "whole segments"),
            ("alice:put:/files/{group}/a", "whole segments"),
        ):
            error = self.assertRaises(ValueError, parse_rule, text)
            self.assertIn(said, str(error), text)

    def test_rules_from_tables(self) -> None:
        """A configuration has lists in place of commas."""
        made = make_rule(["alice", "@staff"], ["put", "get"], "/files/a/**")
        self.assertEqual(made, parse_rule("alice,@staff:put,get:/files/a/**"))
