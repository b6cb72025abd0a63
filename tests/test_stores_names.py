"""Which paths are names, and which are refused, and how."""

from __future__ import annotations

import unicodedata
from urllib.parse import unquote_to_bytes

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted import errors
from lwstwisted.errors import Refusal, Refused
from lwstwisted.interfaces import Name
from lwstwisted.stores.names import parse_name

TAKEN: list[tuple[list[bytes], Name]] = [
    ([], ()),
    ([b"file"], ("file",)),
    ([b"a", b"b c", b"d"], ("a", "b c", "d")),
    ([b".hidden"], (".hidden",)),
    ([b"..."], ("...",)),
    ([b"..a"], ("..a",)),
    ([b"a.."], ("a..",)),
    ([b";x"], (";x",)),
    ([b"a;b=c"], ("a;b=c",)),
    # A '%' that decodes to nothing is a character of the name.
    ([b"100%"], ("100%",)),
    ([b"%"], ("%",)),
    ([b"50%z"], ("50%z",)),
    ([b"~root"], ("~root",)),
    ([b"-rf"], ("-rf",)),
    ([b"CON"], ("CON",)),
    (["日本語".encode()], ("日本語",)),
    (["🎉".encode()], ("🎉",)),
    # Composed and decomposed are one file.
    (["\u00e9".encode()], ("\u00e9",)),
    (["e\u0301".encode()], ("\u00e9",)),
    # Dots and slashes of other scripts are no dots and slashes here: NFC, not NFKC.
    (["\uff0e\uff0e".encode()], ("\uff0e\uff0e",)),
    (["a\uff0fb".encode()], ("a\uff0fb",)),
    (["a\u2215b".encode()], ("a\u2215b",)),
    # Reserved at the top only.
    ([b"a", b".lwstwisted"], ("a", ".lwstwisted")),
    ([b".lwstwisted2"], (".lwstwisted2",)),
    ([b"x" * 255], ("x" * 255,)),
]

REFUSED: list[tuple[list[bytes], Refusal]] = [
    ([b""], errors.NAME_EMPTY),
    ([b"", b"etc", b"passwd"], errors.NAME_EMPTY),
    ([b"a", b"", b"b"], errors.NAME_EMPTY),
    ([b"a", b""], errors.NAME_EMPTY),
    ([b"."], errors.NAME_DOTS),
    ([b".."], errors.NAME_DOTS),
    ([b"a", b"..", b"b"], errors.NAME_DOTS),
    ([b"..;"], errors.NAME_DOTS),
    ([b"..;x=y"], errors.NAME_DOTS),
    ([b".;"], errors.NAME_DOTS),
    ([b".;a;b"], errors.NAME_DOTS),
    # The Greek question mark is a semicolon in NFC.
    (["..\u037ex".encode()], errors.NAME_DOTS),
    ([b"a/b"], errors.NAME_ENCODING),
    ([b"/"], errors.NAME_ENCODING),
    ([b"../x"], errors.NAME_ENCODING),
    ([b"..\\x"], errors.NAME_ENCODING),
    ([b"a\\b"], errors.NAME_ENCODING),
    ([b"%2e%2e"], errors.NAME_ENCODING),
    ([b"%2E."], errors.NAME_ENCODING),
    ([b"a%2fb"], errors.NAME_ENCODING),
    ([b"a%5Cb"], errors.NAME_ENCODING),
    ([b"a%00"], errors.NAME_ENCODING),
    ([b"%252e"], errors.NAME_ENCODING),
    ([b"a%20b"], errors.NAME_ENCODING),
    # Not UTF-8; overlong slash, dot and NUL; a surrogate; beyond Unicode; cut short.
    ([b"\xff"], errors.NAME_ENCODING),
    ([b"caf\xe9"], errors.NAME_ENCODING),
    ([b"\xc0\xaf"], errors.NAME_ENCODING),
    ([b"\xc0\xae\xc0\xae"], errors.NAME_ENCODING),
    ([b"\xe0\x80\xaf"], errors.NAME_ENCODING),
    ([b"\xc0\x80"], errors.NAME_ENCODING),
    ([b"\xed\xa0\x80"], errors.NAME_ENCODING),
    ([b"\xf4\x90\x80\x80"], errors.NAME_ENCODING),
    ([b"a\xe6\x97"], errors.NAME_ENCODING),
    ([b"a\x00"], errors.NAME_CONTROL),
    ([b"\n"], errors.NAME_CONTROL),
    ([b"a\r\nSet-Cookie: x"], errors.NAME_CONTROL),
    ([b"\x1b[31m"], errors.NAME_CONTROL),
    ([b"a\x7f"], errors.NAME_CONTROL),
    (["a\x80".encode()], errors.NAME_CONTROL),
    (["\x85".encode()], errors.NAME_CONTROL),
    (["\x9f".encode()], errors.NAME_CONTROL),
    (["a\u2028b".encode()], errors.NAME_CONTROL),
    (["a\u2029b".encode()], errors.NAME_CONTROL),
    ([b"x" * 256], errors.NAME_TOO_LONG),
    # 86 characters of three bytes.
    (["日".encode() * 86], errors.NAME_TOO_LONG),
    # Three bytes a character as sent, six in NFC, which takes this one apart.
    (["\ufb2c".encode() * 60], errors.NAME_TOO_LONG),
    ([b".lwstwisted"], errors.NAME_RESERVED),
    ([b".lwstwisted", b"partial", b"x"], errors.NAME_RESERVED),
    ([b".LWStwisted"], errors.NAME_RESERVED),
    # The long s is an s to a file system that folds case.
    ([".lw\u017ftwi\u017fted".encode()], errors.NAME_RESERVED),
]


def outcome(segments: list[bytes]) -> Name | Refusal:
    try:
        return parse_name(segments)
    except Refused as refused:
        return refused.refusal


def path_of(length: int) -> list[bytes]:
    """Segments that make a path of so many bytes with the slashes between them."""
    whole, rest = divmod(length, 101)
    return [b"x" * 100] * whole + ([b"x" * rest] if rest else [])


class TableTests(SynchronousTestCase):
    """Paths by example."""

    def test_taken(self) -> None:
        """These are names, and this is what the file is called."""
        for segments, name in TAKEN:
            assert outcome(segments) == name, segments

    def test_refused(self) -> None:
        """These are refused, each with the sentence that helps its sender."""
        for segments, refusal in REFUSED:
            assert outcome(segments) == refusal, segments
            assert refusal.status == 400

    def test_every_control(self) -> None:
        """No control character of Unicode gets through, wherever it stands."""
        for code in [*range(0x20), *range(0x7F, 0xA0)]:
            for text in (chr(code), f"a{chr(code)}", f"{chr(code)}b"):
                assert outcome([text.encode()]) is errors.NAME_CONTROL, code

    def test_whole_path_is_limited(self) -> None:
        """A path that the kernel wouldn't take is refused at once."""
        assert len(b"/".join(path_of(4095))) == 4095
        assert isinstance(outcome(path_of(4095)), tuple)
        assert outcome(path_of(4096)) is errors.NAME_TOO_LONG

    def test_as_twisted_web_splits(self) -> None:
        """Attacks as they stand in a request line; twisted.web splits at slashes, then decodes once."""
        for path in (
            *(b"../etc/passwd", b"..%2fetc", b"%2e%2e/etc", b"..%5cetc", b"..;/etc", b"%2e%2e;/etc"),
            *(b"a//b", b"//etc", b"%c0%ae%c0%ae/etc", b"%252e%252e/etc", b"a%00.txt", b"a%0d%0ab"),
            *(b".lwstwisted/x", b"%2elwstwisted/x"),
        ):
            assert isinstance(outcome([unquote_to_bytes(part) for part in path.split(b"/")]), Refusal), path


PIECES = st.sampled_from(
    [
        *(b".", b"..", b"/", b"\\", b"%", b"%2e", b"%2F", b";", b"\x00", b"\n", b"a", b"0", b".lwstwisted"),
        # C1, overlong, surrogate, combining acute, Greek question mark, line separator, long s.
        *(b"\xc2\x85", b"\xc0\xae", b"\xed\xa0\x80", b"e\xcc\x81", b"\xcd\xbe", b"\xe2\x80\xa8", b"\xc5\xbf"),
    ]
)
SEGMENTS = st.one_of(
    st.lists(PIECES, max_size=6).map(b"".join),
    st.binary(max_size=300),
    st.text(max_size=100).map(str.encode),
)


class PropertyTests(SynchronousTestCase):
    """Whatever is sent."""

    @settings(max_examples=300, deadline=None, database=None)
    @given(st.lists(SEGMENTS, max_size=5))
    def test_names_are_safe(self, segments: list[bytes]) -> None:
        """A name never leaves the root, is one spelling, and says the same after another round trip."""
        name = outcome(segments)
        if isinstance(name, Refusal):
            assert name.code.startswith("name_")
            return
        assert len(name) == len(segments)
        for text in name:
            assert text not in ("", ".", "..")
            assert not set(text) & {"/", "\\", "\x00", "\n", "\r", "\x7f", "\x85", "\u2028", "\u2029"}
            assert unicodedata.is_normalized("NFC", text)
            assert unquote_to_bytes(text) == text.encode()
            assert len(text.encode()) <= 255
        assert name[:1] != (".lwstwisted",)
        assert parse_name([text.encode() for text in name]) == name
