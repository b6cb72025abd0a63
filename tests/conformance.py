"""Which test holds the service to which sentence of a protocol, and the table of it in ``docs/conformance.md``.

A test says what it holds us to, and by which sentences of a section, counted from 1, the text wants that::

    @requires("tus", "Core: PATCH", "MUST", "Another offset than that of the upload is answered by 409.", 3, 5)
    async def test_wrong_offset(self) -> None:

once for each requirement. ``python -m tests.conformance`` writes the table; ``tests/test_conformance.py`` fails where
it isn't what would be written, and where a sentence has neither a test nor a reason. Nothing here is a test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar
from unittest import TestCase

TABLE = Path(__file__).parent.parent / "docs" / "conformance.md"
MODULES = ("tests.test_uploads_tus", "tests.test_uploads_rufh", "tests.test_access_protocols")
LEVELS = {"MUST": "M", "SHOULD": "S", "MAY": "O", "-": ""}
"""How strongly something is wanted, as RFC 2119 has it, and the letter of that in :data:`SENTENCES`."""
SPECS = {
    "tus": ("tus 1.0.0", "https://tus.io/protocols/resumable-upload"),
    "rufh": (
        "Resumable Uploads for HTTP (draft 12)",
        "https://datatracker.ietf.org/doc/draft-ietf-httpbis-resumable-upload/12/",
    ),
}
"""What may be named as ``spec``: title, and where the text is. A section of ``rufh`` is its number."""

SENTENCES = {
    "tus": {
        "Core": "M",
        "Core: Upload-Offset": "M",
        "Core: Upload-Length": "M",
        "Core: Tus-Version": "M M",
        "Core: Tus-Resumable": "M M M M",
        "Core: Tus-Extension": "M M",
        "Core: Tus-Max-Size": "M S",
        "Core: X-HTTP-Method-Override": "M M Sc",
        "Core: HEAD": "M M S S M",
        "Core: PATCH": "S MS M Oc M SOc M M M S S O S S",
        "Core: OPTIONS": "Oc M O SM",
        "Extensions": "S",
        "Creation": "S M",
        "Creation: Upload-Defer-Length": "M M",
        "Creation: Upload-Metadata": "M M M SM M O O S",
        "Creation: POST": "Mc M M M M M O Oc O M OM M M O Mc",
        "Creation With Upload": "Oc M M Oc M SM Sc Sc",
        "Expiration": "O M",
        "Expiration: Upload-Expires": "O Sc M M O S S Sc M",
        "Checksum": "O M Oc M O M M M M O M",
        "Checksum: Tus-Checksum-Algorithm": "M",
        "Checksum: Upload-Checksum": "M",
        "Termination": "M",
        "Termination: DELETE": "SM S",
        "Concatenation": "M S M M M M Sc M Oc M M Sc O O O M S M M M M",
        "Concatenation: Upload-Concat": "M M M OM",
    },
    "rufh": {
        "4": "S S",
        "4.1.1": "M M M",
        "4.1.2": "M Sc",
        "4.1.3": "Sc M M M",
        "4.1.4": "O Mc Mc Mc Sc S Sc S S S Mc Mc M S M S S Sc",
        "4.2.1": "Sc Sc Sc Sc Sc Oc",
        "4.2.2": "S M M S M O M Sc Sc S S M",
        "4.3.1": "Sc Mc MSc Mc Oc Sc Oc",
        "4.3.2": "M M M M S S",
        "4.4.1": "M Sc M Oc Sc Oc Oc",
        "4.4.2": "S M M M S M M M S M S",
        "4.5.2": "S S S",
        "4.6": "Mc M M M S S O",
        "5": "Oc M",
        "6": "",
        "7.1": "S",
        "7.2": "",
        "8": "",
        "9": "",
        "10.1": "S S S",
        "10.2": "S",
        "11.1.1": "Sc",
        "12": "Sc",
        "13": "S S M M S S S",
        "B": "Mc M M Mc",
    },
}
"""All sentences of a section with a word of RFC 2119, in their order: the letters of those words, NOT or not, and c
where only a client can obey or use it. An item of a list counts as a sentence. Sections without any are listed where a
test is marked with them."""

LEFT_OUT = {
    ("tus", "Core", 1): "that there is the core protocol is what its sections say",
    ("tus", "Core: Tus-Extension", 2): "the list of extensions is never empty",
    ("tus", "Expiration: Upload-Expires", 5): "a permission",
    ("tus", "Expiration: Upload-Expires", 7): "410 needs a memory of uploads that have expired; there is none",
    ("tus", "Concatenation", 13): "parts stay until they expire",
    ("rufh", "4.1.4", 9): "there is no least size",
    ("rufh", "4.1.4", 14): "not all resources can begin an upload, so OPTIONS * says nothing of limits",
    ("rufh", "4.1.4", 15): "there is always a limit of time",
    ("rufh", "4.6", 7): "the previous request is told, by 409",
    ("rufh", "13", 5): "nothing looks for harm in what is uploaded",
}
"""What no test is for, and why."""

_Test = TypeVar("_Test", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Requirement:
    """One sentence of a protocol, in our words.

    :ivar spec: a key of :data:`SPECS`.
    :ivar section: where it stands: a number such as ``4.2.1``, or a title.
    :ivar level: one of :data:`LEVELS`; ``-`` for what the text says without a word of RFC 2119, and clients rely on.
    :ivar text: what is wanted.
    :ivar sentences: numbers of the sentences that want it.
    """

    spec: str
    section: str
    level: str
    text: str
    sentences: tuple[int, ...]


def requires(spec: str, section: str, level: str, text: str, *sentences: int) -> Callable[[_Test], _Test]:
    """Mark a test as the one that holds us to a requirement; may be stacked. See :class:`Requirement`."""
    try:
        words, letter = SENTENCES[spec][section].split(), LEVELS[level]
        if not text or bool(letter) != bool(sentences) or not all(letter in words[number - 1] for number in sentences):
            raise ValueError
    except (LookupError, ValueError):
        raise ValueError(f"no requirement: {spec!r}, {section!r}, {level!r}, {text!r}, {sentences}") from None

    def mark(test: _Test) -> _Test:
        # The lowest decorator comes first, and the text is read from the top.
        marked: Any = test
        marked.requirements = (Requirement(spec, section, level, text, sentences), *getattr(test, "requirements", ()))
        return test

    return mark


def marked_tests() -> Iterator[tuple[Requirement, str]]:
    """All requirements, each with the name of a test, in the order of the modules' text.

    A mixin's test has one for each class that runs it.
    """
    for name in MODULES:
        found = vars(import_module(name)).values()
        classes = [kind for kind in found if inspect.isclass(kind) and kind.__module__ == name]
        for kind in classes:
            running = [one for one in classes if issubclass(one, kind) and issubclass(one, TestCase)]
            for method, test in vars(kind).items():
                for requirement in getattr(test, "requirements", ()):
                    assert running, f"no class of {name} runs {kind.__name__}.{method}"
                    for one in running:
                        yield requirement, f"{name.rpartition('.')[2]}.py::{one.__name__}::{method}"


def is_left_out(spec: str, section: str, number: int) -> bool:
    """Whether a sentence is one for clients, or of :data:`LEFT_OUT`."""
    return SENTENCES[spec][section].split()[number - 1].endswith("c") or (spec, section, number) in LEFT_OUT


def in_doubt() -> list[tuple[str, str, int]]:
    """Sentences that have neither a test nor a reason, or both of them."""
    held = {(one.spec, one.section, number) for one, _ in marked_tests() for number in one.sentences}
    return [where for where in every_sentence() if (where in held) == is_left_out(*where)]


def every_sentence() -> Iterator[tuple[str, str, int]]:
    """Where there is one: spec, section, number."""
    for spec, sections in SENTENCES.items():
        for section, words in sections.items():
            for number in range(1, len(words.split()) + 1):
                yield spec, section, number


def table() -> str:
    """The text of :data:`TABLE`."""
    found: dict[tuple[str, str], dict[Requirement, list[str]]] = {}
    for requirement, test in marked_tests():
        section = found.setdefault((requirement.spec, requirement.section), {})
        section.setdefault(requirement, []).append(test)
    lines = [
        "# What the protocols want, and which test holds us to it",
        "",
        "Written by `python -m tests.conformance` from the tests themselves, in our words. The numbers are those of",
        "the sentences of a section that have a word of RFC 2119; what has none, and clients rely on, has no number.",
        "What is tested more than once is tested under another kind of site, or of connection.",
    ]
    for spec, (title, place) in SPECS.items():
        lines += ["", f"## [{title}]({place})"]
        for section, words in SENTENCES[spec].items():
            rows = found.get((spec, section), {})
            lines += ["", f"### {section}"]
            if rows:
                lines += ["", "| | level | what is wanted | test |", "| --- | --- | --- | --- |"]
            for requirement in sorted(rows, key=lambda row: row.sentences or (len(SENTENCES[row.spec][row.section]),)):
                numbers, text = ", ".join(map(str, requirement.sentences)), requirement.text.replace("|", "\\|")
                tests = ", ".join(f"`{test}`" for test in rows[requirement])
                lines.append(f"| {numbers} | {requirement.level} | {text} | {tests} |")
            left = [f"{number}: {why}." for (*where, number), why in LEFT_OUT.items() if where == [spec, section]]
            clients = [str(number) for number, word in enumerate(words.split(), 1) if word.endswith("c")]
            if clients:
                left.append(f"For clients: {', '.join(clients)}.")
            if left:
                lines += ["", "Without a test: " + " ".join(left)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
