"""Signed URLs: what may be changed of one without a key, which is nothing."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http import parse_qs

from lwstwisted import errors
from lwstwisted.access.rules import UNKNOWN, Action
from lwstwisted.access.signing import Grant, Signed, make_grant, parse_keys, url_of, verify, without_signature
from lwstwisted.access.visitor import SignedVisitor
from lwstwisted.errors import Refusal, Refused

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
KEYS = {"k1": KEY, "k2": OTHER}
NOW = 1_000_000
PUT, GET, LIST, DELETE, OVERWRITE = Action.PUT, Action.GET, Action.LIST, Action.DELETE, Action.OVERWRITE


def granted(path: str = "/files/a/b", methods: tuple[str, ...] = ("PUT",), **more: Any) -> Grant:
    return make_grant(path, methods, more.pop("expires", NOW + 60), **more)


def verified(query: str, keys: dict[str, bytes] = KEYS) -> Signed:
    return verify(parse_qs(query.encode(), 1), keys)  # as a request's args are read


def visitor_of(grant: Grant, now: float = NOW) -> SignedVisitor:
    return SignedVisitor(verified(grant.query("k1", KEY)), now)


class SignatureTests(SynchronousTestCase):
    """The signature itself."""

    def refusal_of(self, call: Callable[..., object], *args: object) -> Refusal:
        error = self.assertRaises(Refused, call, *args)
        assert isinstance(error, Refused)
        return error.refusal

    def test_what_is_signed_comes_back(self) -> None:
        """Every kind of grant, with each sort of character in its path."""
        for grant in (
            granted(),
            granted("/files/", ("GET", "PUT"), max_size=0),
            granted("/files/%C3%A9%20%26%3D%2B%25/x,y;z", ("DELETE",), content_type="image/svg+xml"),
            granted("/files/a/", ("POST",), max_size=2**50, may_replace=True),
        ):
            query = grant.query("k1", KEY)
            self.assertEqual(verified(query).grant, grant)
            self.assertEqual(verified(query).query, query)

    def test_the_recipe(self) -> None:
        """Another program can make them, by what the documentation says."""
        fields = {
            "path": "/files/a b/\u00e9",
            "methods": "GET,PUT",
            "max-size": "10",
            "type": "image/png",
            "overwrite": "1",
            "expires": str(NOW + 60),
            "key": "k2",
        }
        text = "lwstwisted-signed-url-1\n" + "".join(f"{value}\n" for value in fields.values())
        signature = hmac.new(OTHER, text.encode(), sha256).hexdigest()
        found = verified(urlencode({**fields, "signature": signature})).grant
        wanted = Grant(("a b", "\u00e9"), False, ("GET", "PUT"), NOW + 60, 10, "image/png", True)
        self.assertEqual(found, wanted)

    def test_nothing_can_be_changed(self) -> None:
        """Each field changed, left out, added, doubled or moved; another key; a signature that is cut."""
        query = granted(max_size=10, content_type="image/png").query("k1", KEY)
        verified(query)
        fields = dict(parse_qsl(query))
        changed = [
            {**fields, "path": "/files/a/c"},
            {**fields, "path": "/files/a/"},
            {**fields, "methods": "DELETE,PUT"},
            {**fields, "max-size": "100"},
            {**fields, "max-size": "010"},
            {**fields, "type": "text/html"},
            {**fields, "overwrite": "1"},
            {**fields, "expires": str(NOW + 61)},
            {**fields, "key": "k2"},
            {**fields, "key": "k3"},
            {**fields, "max-size": "image/png", "type": "10"},
            {**fields, "path": "/files/a/b\nPUT", "methods": ""},
            {**fields, "signature": fields["signature"][:-1]},
            {**fields, "signature": fields["signature"].upper()},
            {**fields, "signature": ""},
            {**fields, "signature": "\u00e9"},
            {**fields, "signature": "0" * 64},
        ]
        changed += [{name: value for name, value in fields.items() if name != gone} for gone in fields]
        for bad in changed:
            if "signature" in bad:
                self.assertIs(self.refusal_of(verified, urlencode(bad)), errors.BAD_SIGNATURE, bad)
        for name in fields:
            twice = f"{query}&{name}={quote(fields[name])}"
            self.assertIs(self.refusal_of(verified, twice), errors.BAD_SIGNATURE, name)
        self.assertIs(self.refusal_of(verified, query.replace("=", "=%FF", 1)), errors.BAD_SIGNATURE)
        verified(f"{query}&utm_source=mail")  # which is nobody's business

    def test_nothing_else_is_said_before_the_signature_fits(self) -> None:
        """Neither that the time is over, nor what the path or the key would be."""
        for grant in (granted(expires=1), granted("/files/other")):
            query = grant.query("k1", OTHER)
            self.assertIs(self.refusal_of(verified, query), errors.BAD_SIGNATURE)

    def test_it_is_compared_in_constant_time(self) -> None:
        """Once for each request, with a right one of full length, also where the key isn't known."""
        compared: list[bytes] = []

        def counting(right: bytes, said: bytes) -> bool:
            compared.append(right)
            return right == said

        query = granted().query("k1", KEY)
        self.patch(hmac, "compare_digest", counting)
        verified(query)
        for bad in (query[:-1] + "x", query.replace("key=k1", "key=k9"), query.replace("path=", "path=x")):
            self.refusal_of(verified, bad)
        self.assertEqual([len(right) for right in compared], [64] * 4)

    def test_keys_are_rotated(self) -> None:
        """What an older key has signed holds until that is taken away."""
        old, new = granted().query("k1", KEY), granted().query("k2", OTHER)
        for query in (old, new):
            verified(query, KEYS)
        self.assertIs(self.refusal_of(verified, old, {"k2": OTHER}), errors.BAD_SIGNATURE)
        verified(new, {"k2": OTHER})

    def test_a_path_that_could_be_written_in_another_way(self) -> None:
        """It is refused though somebody signed it: who signs it has to write it as it is stored."""
        for path in ("/files/e\u0301", "/files/a//b", "/files/../a", "/uploads/a", "/files", "/files/.lwstwisted/a"):
            fields = {"path": path, "methods": "PUT", "expires": str(NOW), "key": "k1"}
            values = [path, "PUT", "", "", "", str(NOW), "k1"]
            text = "lwstwisted-signed-url-1\n" + "".join(f"{value}\n" for value in values)
            signature = hmac.new(KEY, text.encode(), sha256).hexdigest()
            query = urlencode({**fields, "signature": signature})
            self.assertIs(self.refusal_of(verified, query), errors.BAD_SIGNATURE, path)

    def test_what_cannot_be_signed(self) -> None:
        """A mistake is told when the URL is made."""
        for path, methods, more in (
            ("/elsewhere/a", ("PUT",), {}),
            ("/files/a/../b", ("PUT",), {}),
            ("/files/%FF", ("PUT",), {}),
            ("/files/a%0Ab", ("PUT",), {}),
            ("/files/a", ("PATCH",), {}),
            ("/files/a", (), {}),
            ("/files/a", ("PUT",), {"content_type": "nonsense"}),
            ("/files/a", ("PUT",), {"max_size": -1}),
            ("/files/a", ("PUT",), {"expires": -1}),
        ):
            self.assertRaises(ValueError, granted, path, methods, **more)

    def test_urls(self) -> None:
        """A URL is of what it is for; one for a resumable upload of a file is where those begin."""
        for grant, path in (
            (granted(), "/files/a/b"),
            (granted("/files/a%20b/", ("POST",)), "/files/a%20b/"),
            (granted("/files/a", ("POST",)), "/uploads/"),
        ):
            parts = urlsplit(url_of(grant, "k1", KEY, "https://up.example.org/"))
            self.assertEqual((parts.netloc, parts.path), ("up.example.org", path))
            self.assertEqual(verified(parts.query).grant, grant)

    def test_the_log_has_no_signature(self) -> None:
        """Whoever reads it can't use the URL."""
        self.assertEqual(without_signature(b"/a?x=1&signature=abc&y=2"), b"/a?x=1&signature=-&y=2")
        self.assertEqual(without_signature(b"/a?signature=abc"), b"/a?signature=-")
        self.assertEqual(without_signature(b"/signature=abc?x"), b"/signature=abc?x")


class KeyFileTests(SynchronousTestCase):
    """The file of keys."""

    def test_keys(self) -> None:
        """The first one signs, so their order is kept."""
        found = parse_keys(f"# new first\nk2:{OTHER.hex()}\n\nk1:{KEY.hex().upper()}\n")
        self.assertEqual(list(found.items()), [("k2", OTHER), ("k1", KEY)])

    def test_mistakes(self) -> None:
        """A key that is too short, malformed, or there twice; a file without any."""
        good = f"k1:{KEY.hex()}"
        for text, said in (
            ("k1:" + "00" * 31, "line 1"),
            (good + "0", "line 1"),
            (f"{good}\nk 2:{KEY.hex()}", "line 2"),
            (f"{good}\n{good}", "line 2"),
            ("", "no key"),
        ):
            self.assertIn(said, str(self.assertRaises(ValueError, parse_keys, text)), text)


class SignedVisitorTests(SynchronousTestCase):
    """What somebody with a signed URL may do, as rows: what is asked for, and what it is refused with."""

    def test_actions(self) -> None:
        """A method is for what it does; HEAD comes with GET; the path has to be the signed one."""
        rows = [
            (("PUT",), PUT, ("a", "b"), None),
            (("POST",), PUT, ("a", "b"), None),
            (("PUT",), PUT, ("a", "c"), errors.SIGNED_PATH),
            (("PUT",), PUT, ("a",), errors.SIGNED_PATH),
            (("PUT",), PUT, ("a", "b", "c"), errors.SIGNED_PATH),
            (("PUT",), GET, ("a", "b"), errors.SIGNED_METHOD),
            (("PUT",), DELETE, ("a", "b"), errors.SIGNED_METHOD),
            (("PUT",), LIST, ("a", "b"), errors.SIGNED_METHOD),
            (("GET",), GET, ("a", "b"), None),
            (("GET",), PUT, ("a", "b"), errors.SIGNED_METHOD),
            (("DELETE",), DELETE, ("a", "b"), None),
            (("PUT",), OVERWRITE, ("a", "b"), errors.SIGNED_METHOD),
        ]
        for methods, action, name, wanted in rows:
            visitor = visitor_of(granted(methods=methods))
            self.assertIs(visitor.may(action, name), wanted is None, (methods, action, name))
            if wanted is not None:
                error = self.assertRaises(Refused, visitor.require, action, name)
                self.assertIs(error.refusal, wanted, (methods, action, name))

    def test_methods(self) -> None:
        """The method of the request is one of those that were signed."""
        visitor = visitor_of(granted(methods=("GET",)))
        visitor.require_method(b"GET")
        visitor.require_method(b"HEAD")
        for method in (b"PUT", b"POST", b"DELETE", b"\xff"):
            error = self.assertRaises(Refused, visitor.require_method, method)
            self.assertIs(error.refusal, errors.SIGNED_METHOD)

    def test_folders(self) -> None:
        """A folder means all beneath, and nothing beside it."""
        visitor = visitor_of(granted("/files/a/", ("PUT",)))
        for name, is_allowed in ((("a", "b"), True), (("a", "b", "c"), True), (("ab",), False), (("b",), False)):
            self.assertIs(visitor.may(PUT, name), is_allowed, name)
        for folder in ((), ("a",), ("a", "b")):
            visitor.require_some(PUT, folder)
        for folder in (("b",), ("b", "a")):
            self.assertRaises(Refused, visitor.require_some, PUT, folder)
        self.assertRaises(Refused, visitor_of(granted("/files/a/b/")).require_some, PUT, ())
        self.assertTrue(visitor.may(PUT, ("a", UNKNOWN)))
        self.assertFalse(visitor.may(PUT, (UNKNOWN,)))

    def test_replacing(self) -> None:
        """It has to be said when the URL is made."""
        self.assertFalse(visitor_of(granted()).may_replace(("a", "b")))
        self.assertTrue(visitor_of(granted(may_replace=True)).may_replace(("a", "b")))
        self.assertFalse(visitor_of(granted(may_replace=True, methods=("GET",))).may_replace(("a", "b")))

    def test_time(self) -> None:
        """From the second that is named on nothing begins; what began goes on, for the same file."""
        for now, wanted in ((NOW + 59.9, None), (NOW + 60, errors.SIGNATURE_EXPIRED)):
            visitor = visitor_of(granted(), now)
            if wanted is None:
                visitor.require(PUT, ("a", "b"))
            else:
                self.assertIs(self.assertRaises(Refused, visitor.require, PUT, ("a", "b")).refusal, wanted)
            visitor.require_going_on(("a", "b"))
            visitor.require_going_on(None)
            self.assertRaises(Refused, visitor.require_going_on, ("a", "c"))

    def test_content(self) -> None:
        """Size and type, as far as they are known."""
        visitor = visitor_of(granted(max_size=10, content_type="Image/PNG"))
        self.assertEqual(visitor.max_size, 10)
        for length, kind, wanted in (
            (10, b"image/png", None),
            (None, b"IMAGE/png; x=1", None),
            (11, b"image/png", errors.SIGNED_SIZE),
            (1, b"text/html", errors.SIGNED_TYPE),
            (1, None, errors.SIGNED_TYPE),
        ):
            if wanted is None:
                visitor.require_content(length, kind)
            else:
                error = self.assertRaises(Refused, visitor.require_content, length, kind)
                self.assertIs(error.refusal, wanted, (length, kind))
        visitor_of(granted()).require_content(2**60, None)

    def test_creators(self) -> None:
        """Each URL is somebody of its own, and no user is called so; who knows who it was can't make the signature."""
        owners = {visitor_of(granted(expires=NOW + number)).owner for number in range(10)}
        self.assertEqual(len(owners), 10)
        signature = granted().query("k1", KEY).rpartition("=")[2]
        self.assertNotIn(visitor_of(granted()).owner.partition(":")[2], signature)
