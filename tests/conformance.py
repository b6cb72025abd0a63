"""Which test holds the service to which sentence of a protocol, and the table of it in ``docs/conformance.md``.

A test says what it holds us to::

    @requires("tus", "PATCH", "MUST", "Another offset than that of the upload is answered by 409.")
    async def test_wrong_offset(self) -> None:

once for each requirement. ``python -m tests.conformance`` writes the table; ``tests/test_conformance.py`` fails where
it isn't what would be written. Nothing here is a test.
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
MODULES = ("tests.test_uploads_tus", "tests.test_uploads_rufh")
LEVELS = ("MUST", "SHOULD", "MAY")
SPECS = {
    "tus": ("tus 1.0.0", "https://tus.io/protocols/resumable-upload"),
    "rufh": (
        "Resumable Uploads for HTTP (draft 12)",
        "https://datatracker.ietf.org/doc/draft-ietf-httpbis-resumable-upload/12/",
    ),
}
"""What may be named as ``spec``: title, and where the text is. A section of ``rufh`` is its number."""

_Test = TypeVar("_Test", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Requirement:
    """One sentence of a protocol, in our words.

    :ivar spec: a key of :data:`SPECS`.
    :ivar section: where it stands: a number such as ``4.2.1``, or a title.
    :ivar level: one of :data:`LEVELS`: how strongly it is wanted; a negation counts as the same.
    :ivar text: what is wanted.
    """

    spec: str
    section: str
    level: str
    text: str


def requires(spec: str, section: str, level: str, text: str) -> Callable[[_Test], _Test]:
    """Mark a test as the one that holds us to a requirement; may be stacked. See :class:`Requirement`."""
    if spec not in SPECS or level not in LEVELS or not section or not text:
        raise ValueError(f"no requirement: {spec!r}, {section!r}, {level!r}, {text!r}")

    def mark(test: _Test) -> _Test:
        # The lowest decorator comes first, and the text is read from the top.
        marked: Any = test
        marked.requirements = (Requirement(spec, section, level, text), *getattr(test, "requirements", ()))
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


def table() -> str:
    """The text of :data:`TABLE`."""
    found: dict[str, dict[str, dict[Requirement, list[str]]]] = {spec: {} for spec in SPECS}
    for requirement, test in marked_tests():
        section = found[requirement.spec].setdefault(requirement.section, {})
        section.setdefault(requirement, []).append(test)
    lines = [
        "# What the protocols want, and which test holds us to it",
        "",
        "Written by `python -m tests.conformance` from the tests themselves. The sentences are in our words. What is",
        "tested more than once is tested under another kind of site, or of connection.",
    ]
    for spec, (title, place) in SPECS.items():
        lines += ["", f"## [{title}]({place})"]
        order = sorted(found[spec], key=_number_of)  # titles stay in the order of the tests
        for section in order:
            lines += ["", f"### {section}", "", "| level | what is wanted | test |", "| --- | --- | --- |"]
            for requirement, tests in found[spec][section].items():
                text = requirement.text.replace("|", "\\|")
                lines.append(f"| {requirement.level} | {text} | {', '.join(f'`{test}`' for test in tests)} |")
    return "\n".join(lines) + "\n"


def _number_of(section: str) -> list[int]:
    numbers = section.split(" ")[0].split(".")
    return [int(number) for number in numbers] if all(number.isdecimal() for number in numbers) else []


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
