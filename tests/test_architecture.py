"""The folders show the architecture, and go on showing it.

The map in the docstring of ``lwstwisted/__init__.py`` is what a newcomer reads first; these
tests hold it against the tree, and the imports against its floors.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import TestCase

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lwstwisted"
PLUGIN = ROOT / "twisted" / "plugins" / "lwstwisted_plugin.py"

LONGEST_MODULE = 600
"""Lines. A longer module is split along its own headings."""

FOLDER_LINE = re.compile(r"(?P<indent> *)(?P<name>\w+)/(\s|$)")
MODULE_LINE = re.compile(r"(?P<indent> *)(?P<name>\w+)\.py +(?P<floor>\d+) +\S")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def read_map(text: str) -> dict[str, int]:
    """Read the map: the floor of each dotted module name."""
    floors: dict[str, int] = {}
    folders: list[tuple[int, str]] = []  # the open folders and how far each is indented
    for line in text.splitlines():
        if match := MODULE_LINE.match(line) or FOLDER_LINE.match(line):
            indent = len(match["indent"])
            while folders and folders[-1][0] >= indent:
                folders.pop()
            if match.re is FOLDER_LINE:
                folders.append((indent, match["name"]))
                continue
            above = [name for _, name in folders if name != "lwstwisted"]
            module = ".".join(["lwstwisted", *above, match["name"]])
            assert module not in floors, f"{module} is in the map twice"
            floors[module] = int(match["floor"])
    return floors


def dotted(path: Path) -> str:
    """The dotted name of a module of ours; that of its package for an ``__init__.py``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of_ours(path: Path, modules: set[str]) -> Iterator[str]:
    """The modules and packages of ours that a module imports anywhere in its text."""
    package = dotted(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "lwstwisted")
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            if source.split(".")[0] == "lwstwisted":
                for alias in node.names:
                    submodule = f"{source}.{alias.name}"
                    yield submodule if submodule in modules else source


def statements_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: all but what is in functions."""
    for statement in body:
        yield statement
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            for child in ast.iter_child_nodes(statement):
                inner = [child] if isinstance(child, ast.stmt) else getattr(child, "body", [])
                if isinstance(inner, list):
                    yield from statements_at_import(inner)


def is_reactor_import(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Import):
        return any(alias.name == "twisted.internet.reactor" for alias in statement.names)
    if isinstance(statement, ast.ImportFrom):
        return statement.module == "twisted.internet.reactor" or (
            statement.module == "twisted.internet" and any(a.name == "reactor" for a in statement.names)
        )
    return False


class MapReadingTests(TestCase):
    """The tests below are worth something only if they read the map and the imports aright."""

    def test_nested_folders_and_other_text(self) -> None:
        """Modules are found at any depth, and neither prose nor files without a floor count."""
        text = (
            "A map of lwstwisted/ and web.py 3 times::\n"
            "  lwstwisted/\n    __init__.py  docstring only\n    flow.py  0  valve\n"
            "    web/      bytes\n      wire.py 1 framing\n      deep/\n        er.py 12 x\n"
            "    service.py 6 all\n"
        )
        self.assertEqual(
            read_map(text),
            {
                "lwstwisted.flow": 0,
                "lwstwisted.web.wire": 1,
                "lwstwisted.web.deep.er": 12,
                "lwstwisted.service": 6,
            },
        )

    def test_every_form_of_a_reactor_import(self) -> None:
        """The reactor import is seen in every place that runs at import, and allowed in functions."""
        bad = [
            "from twisted.internet import reactor",
            "from twisted.internet import defer, reactor as r",
            "import twisted.internet.reactor",
            "if 1:\n  from twisted.internet import reactor",
            "try:\n  pass\nexcept E:\n  from twisted.internet import reactor",
            "class C:\n  from twisted.internet.reactor import callLater",
        ]
        for text in bad:
            with self.subTest(text):
                found = [s for s in statements_at_import(ast.parse(text).body) if is_reactor_import(s)]
                self.assertEqual(len(found), 1)
        text = "from twisted.internet import defer\ndef f():\n  from twisted.internet import reactor\n"
        self.assertFalse([s for s in statements_at_import(ast.parse(text).body) if is_reactor_import(s)])


class ArchitectureTests(TestCase):
    """What a reader may rely on."""

    def setUp(self) -> None:
        self.sources = sorted(PACKAGE.rglob("*.py"))
        self.floors = read_map(ast.get_docstring(parse(PACKAGE / "__init__.py")) or "")

    def test_the_map_shows_the_tree(self) -> None:
        """Each module is in the map, and nothing else is."""
        tree = {dotted(path) for path in self.sources if path.name != "__init__.py"}
        self.assertEqual(sorted(tree - self.floors.keys()), [], "not in the map of lwstwisted/__init__.py")
        self.assertEqual(sorted(self.floors.keys() - tree), [], "in the map, but not in the tree")

    def test_imports_point_down(self) -> None:
        """Imports go downwards only, and an ``__init__.py`` nothing of ours."""
        modules = {dotted(path) for path in self.sources}
        wrong = []
        for path in self.sources:
            importer = dotted(path)
            floor = self.floors.get(importer, -1)
            for imported in sorted(set(imports_of_ours(path, modules))):
                # The package itself holds the version only; any floor may ask for that.
                if imported != "lwstwisted" and self.floors.get(imported, floor) >= floor:
                    wrong.append(f"{importer} (floor {floor}) imports {imported}")
        self.assertEqual(wrong, [])

    def test_modules_are_short(self) -> None:
        """A module can be read in one go."""
        lengths = {dotted(path): len(path.read_text(encoding="utf-8").splitlines()) for path in self.sources}
        self.assertEqual({name: n for name, n in lengths.items() if n > LONGEST_MODULE}, {})

    def test_names_say_something(self) -> None:
        """No module is a drawer for things that have no place."""
        drawers = {"utils", "util", "constants", "base", "helpers", "common", "misc"}
        self.assertEqual([dotted(path) for path in self.sources if path.stem in drawers], [])

    def test_the_reactor_is_not_imported_at_module_level(self) -> None:
        """Whoever imports us may still choose a reactor."""
        wrong = [
            f"{dotted(path)}:{statement.lineno}"
            for path in self.sources
            for statement in statements_at_import(parse(path).body)
            if is_reactor_import(statement)
        ]
        self.assertEqual(wrong, [])

    def test_importing_everything_installs_no_reactor(self) -> None:
        """Nor does anything that we import choose one behind our back."""
        lines = [f"import {dotted(path)}" for path in self.sources]
        lines += ["import sys", "sys.exit('twisted.internet.reactor' in sys.modules)"]
        command = [sys.executable, "-c", "\n".join(lines)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_the_plugin_imports_nothing_of_ours(self) -> None:
        """``twistd --help`` costs nothing and never fails because of us."""
        self.assertEqual(list(imports_of_ours(PLUGIN, set())), [])

    def test_twisted_is_no_package_of_ours(self) -> None:
        """An ``__init__.py`` there would hide Twisted itself."""
        self.assertEqual(list((ROOT / "twisted").rglob("__init__.py")), [])
