"""Options from a file, in TOML, under the same names as on the command line.

=====================================  ===================================================================
in the file                            on the command line
=====================================  ===================================================================
``root = "/srv"``, ``port = 8443``     ``--root /srv``, ``--port 8443``
``anonymous = true``                   ``--anonymous``; ``false`` says nothing
``listen = ["tcp:80", "tcp:81"]``      ``--listen tcp:80 --listen tcp:81``; a single one needs no brackets
``[limit]``, ``body-rate = 0``         ``--limit body-rate=0`` (:attr:`Configurable.separators`)
``[[allow]]``, a table for each        ``--allow WHO:ACTIONS:PATH`` (:attr:`Configurable.rows`)
=====================================  ===================================================================

Nothing here knows an option by its name: what an ``Options`` class has may be in its file. What the command line says
of an option replaces all that the file says of it.

**Lines.** A mistake is told as ``FILE:LINE: sentence``, and all of them at once, as far as they don't hide each other.
TOML's parser keeps no lines of what it has read. But a text that ends where a statement ends can be parsed, and any
other can't; so what appears in the result with a further line has been said by the statement that ends there. That
takes a parse for each line, and only after a mistake.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from getopt import GetoptError, getopt
from string import Formatter
from typing import Any

from twisted.python.usage import CoerceParameter, UsageError
from twisted.python.usage import Options as UsageOptions

_NO_SETTINGS = {"config", "help", "version"}
_POSITION = re.compile(r" \(at line (\d+), column (\d+)\)$")
_AT_END = " (at end of document)"
_MENTIONED = re.compile(r"--([a-z0-9-]+):?(?: ([a-z0-9-]+))?")

Path = tuple[str | int, ...]
"""Keys and indices that lead to a value."""


class Mistakes(UsageError):
    """What is wrong with a file: a line of text for each mistake."""


class _Mistake(Exception):
    def __init__(self, path: Path, sentence: str) -> None:
        super().__init__(sentence)
        self.path = path


class Configurable(UsageOptions):
    """Options that may be in a file as well."""

    rows: Mapping[str, str] = {}
    """For options whose value has parts: how it is made of a table, such as ``{"allow": "{users}:{actions}:{path}"}``.
    A list in such a table is joined by commas."""
    separators: Mapping[str, str] = {}
    """What is between name and value of an option that is a table with names of its own, where that isn't ``=``."""

    def opt_config(self, file: str) -> None:
        """File with options, in TOML: the same names, without the dashes. The command line comes before it."""
        # It is read before anything else is looked at.

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """See ``Options``.

        :raises Mistakes: for what is in the file.
        """
        words = list(sys.argv[1:] if options is None else options)
        said = self._said(words)
        files = [value for name, value in said if name == "config"]
        if len(files) > 1:
            raise UsageError("--config is said once")
        if not files:
            super().parseOptions(words)  # type: ignore[no-untyped-call]
            return
        source = _Source(files[0])
        paths = self._apply(source, {name for name, _ in said})
        try:
            super().parseOptions(words)  # type: ignore[no-untyped-call]
        except UsageError as error:
            path = _mentioned(str(error), paths)
            if path is None:
                raise
            raise Mistakes(source.told(path, str(error))) from None

    def _said(self, words: list[str]) -> list[tuple[str, str]]:
        """The options in some words, by their long names; none if the words can't be read, to be refused later."""
        try:
            found, _ = getopt(words, self.shortOpt, self.longOpt)
        except GetoptError:
            return []
        names = ((name.lstrip("-"), value) for name, value in found)
        return [(self.synonyms.get(name, name), value) for name, value in names]

    @property
    def settings(self) -> dict[str, bool]:
        """The names of all options that a file may have, and whether they take a value."""
        names = {name.removesuffix("="): name.endswith("=") for name in self.longOpt}
        return {name: takes for name, takes in names.items() if name not in _NO_SETTINGS}

    def _apply(self, source: _Source, replaced: set[str]) -> list[Path]:
        """Set what a file says.

        :param replaced: names of which the command line says something.
        :returns: where in the file that was.
        """
        mistakes: list[_Mistake] = []
        applied: list[Path] = []
        for name, value in source.values.items():
            if name not in self.settings:
                mistakes.append(_Mistake((name,), f"there is no option {_suggested(name, self.settings)}"))
                continue
            try:
                for path, word in self._words(name, value):
                    if name in replaced:
                        continue
                    applied.append(path)
                    try:
                        self._set(name, word)
                    except UsageError as error:
                        sentence = str(error)
                        mistakes.append(_Mistake(path, sentence if name in sentence else f"{name}: {sentence}"))
            except _Mistake as mistake:
                mistakes.append(mistake)
        if mistakes:
            raise Mistakes("\n".join(source.told(mistake.path, str(mistake)) for mistake in mistakes))
        return applied

    def _set(self, name: str, word: str | None) -> None:
        # Not public, but what its own parseOptions() calls for each word; there is no other way to set one option.
        dispatch = self._dispatch[name]
        if isinstance(dispatch, CoerceParameter):
            dispatch.dispatch(name, word)
        else:
            dispatch(name, word)

    def _words(self, name: str, value: object) -> Iterator[tuple[Path, str | None]]:
        """What the command line would say instead."""
        if not self.settings[name]:
            if not isinstance(value, bool):
                raise _Mistake((name,), f"{name} is true or false")
            if value:
                yield (name,), None
        elif name in self.defaults:
            dispatch = self._dispatch[name]
            is_number = isinstance(dispatch, CoerceParameter) and dispatch.coerce is int
            if is_number and type(value) is not int:
                raise _Mistake((name,), f"{name} is a whole number, without quotes")
            yield (name,), _word((name,), name, value)
        elif isinstance(value, dict) and name not in self.rows:
            for key, one in value.items():
                if "_" in key:  # else one thing could be said twice
                    raise _Mistake((name, key), f"{name} has names with dashes: {key.replace('_', '-')}")
                yield (name, key), f"{key}{self.separators.get(name, '=')}{_joined((name, key), key, one)}"
        else:
            for at, one in enumerate(value) if isinstance(value, list) else [(None, value)]:
                path: Path = (name,) if at is None else (name, at)
                if isinstance(one, dict) and name in self.rows:
                    yield path, self._row(path, self.rows[name], one)
                else:
                    yield path, _word(path, name, one)

    def _row(self, path: Path, form: str, table: Mapping[str, object]) -> str:
        fields = [field for _, field, _, _ in Formatter().parse(form) if field]
        found = {}
        for key, value in table.items():
            if key not in fields:
                raise _Mistake((*path, key), f"{path[0]} has no {_suggested(key, fields)}")
            found[key] = _joined((*path, key), key, value)
        for field in fields:
            if field not in found:
                raise _Mistake(path, f"{path[0]} has to say its {field}")
        return form.format(**found)


def _word(path: Path, name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        kind = "true or false" if isinstance(value, bool) else "a list" if isinstance(value, list) else "a table"
        if not isinstance(value, bool | list | dict):
            kind = "a date or time"
        raise _Mistake(path, f"{name} is a text in quotes or a number, and not {kind}")
    return str(value)


def _joined(path: Path, name: str, value: object) -> str:
    return ",".join(_word(path, name, part) for part in (value if isinstance(value, list) else [value]))


def _suggested(name: str, names: Iterator[str] | Sequence[str] | Mapping[str, object]) -> str:
    """A name that isn't known, and which one may be meant."""
    from difflib import get_close_matches

    meant = get_close_matches(name.replace("_", "-"), list(names), 1)
    return f"{name!a}; do you mean {meant[0]}?" if meant else ascii(name)


def _mentioned(sentence: str, paths: list[Path]) -> Path | None:
    """Where the first option that a sentence names is in the file, if it is there."""
    for name, key in _MENTIONED.findall(sentence):
        for path in ((name, key), (name,)):
            for known in paths:
                if known[: len(path)] == path:
                    return known
    return None


def _paths(value: object, above: Path = ()) -> Iterator[Path]:
    """Where something is said."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*above, key)
        yield from _paths(one, (*above, key))


class _Source:
    """A file that was read.

    :ivar values: what it says.
    :raises Mistakes: if it can't be read, or isn't TOML.
    """

    def __init__(self, file: str) -> None:
        import tomllib

        self._file = file
        try:
            with open(file, "rb") as opened:
                read = opened.read()
            self._text = read.decode()
            self.values: dict[str, Any] = tomllib.loads(self._text)
        except OSError as error:
            raise UsageError(f"--config: {error}") from None
        except UnicodeDecodeError as error:
            line = read.count(b"\n", 0, error.start) + 1
            raise Mistakes(f"{file}:{line}: there is something that isn't UTF-8") from None
        except tomllib.TOMLDecodeError as error:
            line, sentence = self._where(str(error))
            raise Mistakes(f"{file}:{line}: {sentence}") from None

    def _where(self, sentence: str) -> tuple[int, str]:
        """Take the line out of what the parser says."""
        if found := _POSITION.search(sentence):
            return int(found[1]), f"{sentence[: found.start()]} (column {found[2]})"
        return len(self._text.rstrip("\n").split("\n")), sentence.removesuffix(_AT_END) + " (at the end)"

    def told(self, path: Path, sentence: str) -> str:
        """A line of text about something in the file."""
        lines = self._lines()
        known = next((path[:length] for length in range(len(path), 0, -1) if path[:length] in lines), ())
        return f"{self._file}:{lines.get(known, 1)}: {sentence}"

    def _lines(self) -> dict[Path, int]:
        """The line in which each statement begins, by what it says."""
        import tomllib

        found: dict[Path, int] = {}
        text = ""
        begins: int | None = None
        for number, line in enumerate(self._text.split("\n"), 1):
            text += line + "\n"
            if begins is None:
                if not line.strip() or line.lstrip().startswith("#"):
                    continue
                begins = number
            try:
                said = tomllib.loads(text)
            except tomllib.TOMLDecodeError:
                continue  # it goes on in the next line
            for path in _paths(said):
                found.setdefault(path, begins)
            begins = None
        return found
