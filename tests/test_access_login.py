"""Who somebody is: what was right is quick, what guesses is slow, and nobody stands in another one's way."""

from __future__ import annotations

import hmac
from base64 import b64encode
from collections.abc import Sequence
from threading import Event
from typing import Any

from twisted.cred.checkers import InMemoryUsernamePasswordDatabaseDontUse
from twisted.cred.credentials import IUsernamePassword
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface import implementer

from lwstwisted import errors
from lwstwisted.access import login as login_module
from lwstwisted.access import slowdown
from lwstwisted.access.checkers import ISlowChecker
from lwstwisted.access.credentials import IBearerToken, Password, Token, challenges, credentials_in
from lwstwisted.access.hashing import Hashing
from lwstwisted.access.login import REMEMBERED, Login
from lwstwisted.access.slowdown import FREE, LONGEST, PLACES, PLACES_OF_NAME, Slowdown
from lwstwisted.errors import Refusal, Refused


def basic(text: str | bytes) -> bytes:
    return b"Basic " + b64encode(text if isinstance(text, bytes) else text.encode())


class CredentialsTests(SynchronousTestCase):
    """The Authorization field."""

    def test_passwords(self) -> None:
        """Name and password are UTF-8; the password may have colons, and the name is composed."""
        for text, name, password in (
            ("alice:secret", "alice", "secret"),
            ("alice:a:b:", "alice", "a:b:"),
            (":", "", ""),
            ("jose\u0301:\u00fc\u0308", "jos\u00e9", "\u00fc\u0308"),
        ):
            found = credentials_in([basic(text)])
            assert isinstance(found, Password)
            self.assertEqual((found.username, found.password), (name.encode(), password.encode()))

    def test_tokens(self) -> None:
        """The scheme is written in any case."""
        for field in (b"Bearer abc-._~+/=", b"bEARER  abc-._~+/="):
            found = credentials_in([field])
            assert isinstance(found, Token)
            self.assertEqual(found.token, "abc-._~+/=")

    def test_nothing(self) -> None:
        """Who sends none is nobody."""
        self.assertIsNone(credentials_in([]))

    def test_nonsense(self) -> None:
        """Who sends something that can't be read is told so, and isn't nobody."""
        for fields in (
            [b""],
            [b"Basic"],
            [b"Basic !"],
            [basic("nocolon")],
            [basic(b"a:\xff")],
            [basic("a\n:b")],
            [basic("a:b\x00")],
            [b"Bearer a b"],
            [b"Digest abc"],
            [basic("a:b"), basic("a:b")],
            [basic("a:b") + b", Bearer x"],
        ):
            error = self.assertRaises(Refused, credentials_in, fields)
            self.assertIs(error.refusal, errors.BAD_CREDENTIALS, fields)

    def test_challenges(self) -> None:
        """A 401 names what would be looked at: passwords in UTF-8 (RFC 7617), tokens (RFC 6750)."""
        field = b"WWW-Authenticate"
        self.assertEqual(challenges([], True), {})
        self.assertEqual(challenges([IUsernamePassword], True), {field: b'Basic realm="lwstwisted", charset="UTF-8"'})
        both = b'Basic realm="lwstwisted", charset="UTF-8", Bearer realm="lwstwisted"'
        interfaces = [IBearerToken, IUsernamePassword]
        self.assertEqual(challenges(interfaces, False), {field: both})
        self.assertEqual(challenges(interfaces, True), {field: both + b', error="invalid_token"'})

    def test_plain_passwords_are_compared_in_constant_time(self) -> None:
        """Also by the checkers of twisted.cred that know the password itself."""
        compared = []

        def counting(one: bytes, other: bytes) -> bool:
            compared.append((one, other))
            return one == other

        self.patch(hmac, "compare_digest", counting)
        self.assertTrue(Password(b"a", b"right").checkPassword(b"right"))
        self.assertFalse(Password(b"a", b"wrong").checkPassword(b"right"))
        self.assertEqual(len(compared), 2)

    def test_no_two_credentials_are_the_same(self) -> None:
        """Wherever the name ends, and whether it is a token."""
        some = [Password(b"a", b"bc"), Password(b"ab", b"c"), Password(b"", b"abc"), Token("abc"), Token("a")]
        self.assertEqual(len({one.secret for one in some}), len(some))


class SlowdownTests(SynchronousTestCase):
    """By a clock that stands still in between."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.slowdown = Slowdown(self.clock)

    def test_the_delay_grows_and_is_bounded(self) -> None:
        """Some failures are free, the next ones double the wait up to the longest; other networks wait for nothing."""
        delays = []
        for _ in range(100):
            delays.append(self.slowdown.delay("one"))
            self.slowdown.failed("one")
        self.assertEqual(delays[: FREE + 3], [0.0] * FREE + [0.25, 0.5, 1.0])
        self.assertEqual((max(delays), delays[-1]), (LONGEST, LONGEST))
        self.assertEqual(self.slowdown.delay("two"), 0.0)

    def test_failures_are_forgiven(self) -> None:
        """One by one, and all of them after a while."""
        for _ in range(FREE + 2):
            self.slowdown.failed("one")
        self.assertEqual(self.slowdown.delay("one"), 1.0)
        self.clock.advance(slowdown.FORGIVEN)
        self.assertEqual(self.slowdown.delay("one"), 0.5)
        self.clock.advance(slowdown.FORGIVEN * slowdown.MOST)
        self.assertEqual(self.slowdown.delay("one"), 0.0)

    def test_the_wait(self) -> None:
        """Those who wait do so side by side: each of them as long as the delay says."""
        for _ in range(FREE + 2):
            self.slowdown.failed("one")
        waits = [Deferred.fromCoroutine(self.slowdown.wait("one")) for _ in range(50)]
        self.clock.advance(0.99)
        for wait in waits:
            self.assertNoResult(wait)
        self.clock.advance(0.01)
        for wait in waits:
            self.successResultOf(wait)

    def refusal_of_place(self, network: str, name: str) -> Refused | None:
        try:
            with self.slowdown.place(network, name):
                return None
        except Refused as refused:
            return refused

    def test_places(self) -> None:
        """A name, a network and all of them together have so many; they are given back."""
        held: list[Any] = []

        def hold(network: str, name: str) -> None:
            held.append(self.slowdown.place(network, name))
            held[-1].__enter__()

        for _ in range(PLACES_OF_NAME):
            hold("one", "alice")
        refused = self.refusal_of_place("one", "alice")
        assert refused is not None
        self.assertIs(refused.refusal, errors.TOO_MANY_LOGINS)
        self.assertEqual(refused.headers, {b"Retry-After": b"1"})
        self.assertIsNone(self.refusal_of_place("one", "bob"))
        for number in range(PLACES - PLACES_OF_NAME):
            hold("one", str(number))
        self.assertIsNotNone(self.refusal_of_place("one", "bob"))
        self.assertIsNone(self.refusal_of_place("two", "bob"))
        for number in range(slowdown.ALL_PLACES - PLACES):
            hold(f"n{number}", "x")
        self.assertIsNotNone(self.refusal_of_place("two", "bob"))
        for one in held:
            one.__exit__(None, None, None)
        self.assertIsNone(self.refusal_of_place("one", "alice"))
        self.assertEqual((len(self.slowdown._places), len(self.slowdown._of_name)), (0, 0))

    def test_memory_is_bounded(self) -> None:
        """A flood from ever new networks makes the oldest be forgotten, not the last."""
        self.patch(slowdown, "NETWORKS", 100)
        for number in range(1000):
            for _ in range(FREE + 1):
                self.slowdown.failed(str(number))
        self.assertEqual(len(self.slowdown._failures), 100)
        self.assertEqual((self.slowdown.delay("0"), self.slowdown.delay("999")), (0.0, 0.5))


class HashingTests(TestCase):
    """Real threads."""

    def make(self, threads: int) -> Hashing:
        from twisted.internet import reactor

        hashing = Hashing(reactor, threads)  # type: ignore[arg-type]
        self.addCleanup(hashing.stop)
        return hashing

    async def test_networks_take_turns(self) -> None:
        """Who asks a hundred times waits behind who asks once; what is known to be right goes first of all."""
        hashing, gate, order = self.make(1), Event(), []
        jobs: list[Deferred[Any]] = [hashing.run("flood", gate.wait, 10)]
        for number in range(100):
            jobs.append(hashing.run("flood", order.append, f"flood {number}"))
        jobs.append(hashing.run("good", order.append, "good"))
        jobs.append(hashing.run(None, order.append, "known"))
        gate.set()
        await gatherResults(jobs)
        self.assertEqual(order[:4], ["known", "flood 0", "good", "flood 1"])
        self.assertEqual(len(order), 102)

    async def test_few_threads(self) -> None:
        """However much is asked for, so many calls run at once."""
        hashing, gate, begun = self.make(2), Event(), []

        def work() -> None:
            begun.append(1)
            gate.wait(10)

        jobs = [hashing.run(str(number), work) for number in range(20)]
        first = hashing._pool
        assert first is not None
        self.assertEqual((first.max, hashing._under_way), (2, 2))
        gate.set()
        await gatherResults(jobs)
        self.assertEqual(len(begun), 20)

    async def test_the_end(self) -> None:
        """What is being called has its result, what waits or comes later is refused: nobody waits for ever."""
        hashing, gate = self.make(1), Event()
        running, waiting = hashing.run("one", gate.wait, 10), hashing.run("two", gate.wait, 10)
        gate.set()
        hashing.stop()
        for refused in (waiting, hashing.run("three", gate.wait, 10)):
            failure = await self.assertFailure(refused, Refused)
            self.assertIs(failure.refusal, errors.STOPPING)
        self.assertIs(await running, True)

    async def test_what_fails_is_told(self) -> None:
        """And the next call has its thread."""
        hashing = self.make(1)
        await self.assertFailure(hashing.run("one", lambda: 1 // 0), ZeroDivisionError)
        self.assertEqual(await hashing.run("one", lambda: 5), 5)


@implementer(ISlowChecker)
class Checker:
    """Knows one password, and counts how often it is asked.

    :ivar gate: answers come when it fires, if it is there.
    """

    credentialInterfaces = (IUsernamePassword,)

    def __init__(self) -> None:
        self.generation = 1
        self.right = b"right"
        self.asked: list[bytes] = []
        self.gate: Deferred[None] | None = None
        self.failure: Exception | None = None

    async def check(self, credentials: Any, run: Any) -> str | None:
        self.asked.append(credentials.username)
        is_right = credentials.password == self.right
        if self.gate is not None:
            waiting: Deferred[None] = Deferred()
            self.gate.addCallback(lambda _: waiting.callback(None))
            await waiting
        if self.failure is not None:
            raise self.failure
        return credentials.username.decode() if is_right else None


class LoginTests(SynchronousTestCase):
    """A login with a checker that costs something."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.checker = Checker()
        self.login = self.make([self.checker])

    def make(self, checkers: Sequence[Any]) -> Login:
        made = Login(checkers, self.clock)
        self.addCleanup(made.stop)
        return made

    def begin(self, name: str, password: str, network: str = "one") -> Deferred[str | None]:
        credentials = Password(name.encode(), password.encode())
        return Deferred.fromCoroutine(self.login.name_of(credentials, network))

    def ask(self, name: str, password: str, network: str = "one") -> str | None:
        return self.successResultOf(self.begin(name, password, network))

    def fail_often(self, network: str = "one", times: int = 20) -> None:
        for number in range(times):
            waiting = self.begin(f"guess{number}", "wrong", network)
            self.clock.advance(LONGEST)
            self.assertIsNone(self.successResultOf(waiting))

    def refused(self, waiting: Deferred[str | None]) -> Refusal:
        failure = self.failureResultOf(waiting, Refused)
        assert isinstance(failure.value, Refused)
        return failure.value.refusal

    def test_what_was_right_is_remembered(self) -> None:
        """For a while; the checker isn't asked again. Nothing wrong is, and no other password is taken for it."""
        self.assertEqual([self.ask("alice", "right") for _ in range(3)], ["alice"] * 3)
        self.assertEqual(len(self.checker.asked), 1)
        self.assertIsNone(self.ask("alice", "wrong"))
        self.assertEqual(self.ask("bob", "right"), "bob")
        self.assertEqual(len(self.checker.asked), 3)
        self.clock.advance(REMEMBERED)
        self.assertEqual(self.ask("alice", "right"), "alice")
        self.assertEqual(len(self.checker.asked), 4)

    def test_a_change_of_the_file_ends_it(self) -> None:
        """What was right before it is looked at again."""
        self.ask("alice", "right")
        self.checker.right, self.checker.generation = b"other", 2
        self.assertIsNone(self.ask("alice", "right"))

    def test_a_change_meanwhile(self) -> None:
        """What was right by the old file, and comes out of the thread behind the change, isn't remembered."""
        self.checker.gate = Deferred()
        waiting = self.begin("alice", "right")
        self.checker.right, self.checker.generation = b"other", 2
        self.checker.gate.callback(None)
        self.successResultOf(waiting)
        self.checker.gate = None
        self.assertIsNone(self.ask("alice", "right"))

    def test_no_password_is_kept(self) -> None:
        """What is remembered is an HMAC by a key that another process doesn't have."""
        self.ask("alice", "right")
        other = self.make([self.checker])
        self.successResultOf(Deferred.fromCoroutine(other.name_of(Password(b"alice", b"right"), "one")))
        (one,), (another,) = self.login._right, other._right
        self.assertEqual((len(one), len(another)), (32, 32))
        self.assertNotEqual(one, another)

    def test_memory_is_bounded(self) -> None:
        """The oldest are forgotten."""
        self.patch(login_module, "MOST_REMEMBERED", 10)
        for number in range(50):
            self.ask(f"user{number}", "right")
        self.assertEqual(len(self.login._right), 10)
        self.ask("user0", "right")
        self.assertEqual(len(self.checker.asked), 51)

    def test_the_same_at_once_is_checked_once(self) -> None:
        """Forty connections of one client cost one hash, and all of them hear the same."""
        self.checker.gate = Deferred()
        waiting = [self.begin("alice", "right") for _ in range(40)]
        self.assertEqual(len(self.checker.asked), 1)
        self.checker.gate.callback(None)
        self.assertEqual([self.successResultOf(one) for one in waiting], ["alice"] * 40)

    def test_a_guesser_waits_before_the_check(self) -> None:
        """The checker isn't asked before the wait is over, so to hang up early tells nothing."""
        self.fail_often()
        asked = len(self.checker.asked)
        waiting = self.begin("alice", "wrong")
        self.clock.advance(LONGEST - 0.01)
        self.assertEqual(len(self.checker.asked), asked)
        self.assertNoResult(waiting)
        self.clock.advance(0.01)
        self.assertIsNone(self.successResultOf(waiting))
        self.assertEqual(len(self.checker.asked), asked + 1)

    def test_who_was_right_lately_passes_at_once(self) -> None:
        """However much fails at the same address, and also when all places there are taken."""
        self.ask("alice", "right")
        self.fail_often(times=10)  # less than what is remembered lasts
        flood = [self.begin(f"guess{number}", "wrong") for number in range(PLACES)]
        self.assertEqual(self.refused(self.begin("bob", "right")), errors.TOO_MANY_LOGINS)
        self.assertEqual(self.ask("alice", "right"), "alice")
        self.clock.advance(REMEMBERED)
        for one in flood:
            self.assertIsNone(self.successResultOf(one))

    def test_who_was_right_once_waits_for_no_failures_of_others(self) -> None:
        """Behind the time for which it is remembered it is checked again, at once."""
        self.ask("alice", "right")
        self.clock.advance(REMEMBERED)
        self.fail_often()
        asked = len(self.checker.asked)
        self.assertEqual(self.ask("alice", "right"), "alice")
        self.assertEqual(len(self.checker.asked), asked + 1)

    def test_who_was_never_right_waits_a_bounded_time(self) -> None:
        """A first login beside a flood from the same address: in, and after the longest delay."""
        self.fail_often(times=100)
        flood = [self.begin(f"guess{number}", "wrong") for number in range(PLACES - 1)]
        waiting = self.begin("alice", "right")
        self.clock.advance(LONGEST)
        self.assertEqual(self.successResultOf(waiting), "alice")
        for one in flood:
            self.assertIsNone(self.successResultOf(one))

    def test_other_addresses_do_not_wait(self) -> None:
        """Not for a failure of elsewhere."""
        self.fail_often("one", 100)
        self.assertEqual(self.ask("alice", "right", "two"), "alice")

    def test_a_failure_is_that_of_all_who_asked_the_same(self) -> None:
        """Nobody is told that a password is wrong because the check of another connection broke."""
        self.checker.gate = Deferred()
        self.checker.failure = OSError("no thread")
        waiting = [self.begin("alice", "right") for _ in range(3)]
        self.checker.gate.callback(None)
        for one in waiting:
            self.failureResultOf(one, OSError)
        self.checker.gate = self.checker.failure = None
        self.assertEqual(self.ask("alice", "right"), "alice")

    def test_a_checker_of_twisted_cred(self) -> None:
        """One that is quick is asked each time, and who was right once has its place with it as well."""
        database = InMemoryUsernamePasswordDatabaseDontUse(alice=b"right")
        self.login = self.make([database])
        self.assertEqual(self.ask("alice", "right"), "alice")
        self.assertIsNone(self.ask("alice", "wrong"))
        self.assertIsNone(self.ask("eve", "right"))
        self.fail_often()
        self.assertEqual(self.ask("alice", "right"), "alice")
        database.users[b"alice"] = b"other"
        self.assertIsNone(self.ask("alice", "right"))

    def test_the_end(self) -> None:
        """Whoever waits for their turn when the service stops is refused, and keeps it from stopping no longer."""
        self.fail_often()
        waiting = [self.begin("alice", "wrong"), self.begin("alice", "wrong"), self.begin("bob", "wrong")]
        self.login.stop()
        self.assertEqual([self.refused(one) for one in waiting], [errors.STOPPING] * 3)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_credentials_that_nobody_checks(self) -> None:
        """A token where there are only passwords is nobody's."""
        found = Deferred.fromCoroutine(self.login.name_of(Token("right"), "one"))
        self.assertIsNone(self.successResultOf(found))
        self.assertEqual(self.checker.asked, [])
