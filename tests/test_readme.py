"""The README tells the truth: its promises have their tests, and its example runs."""

from __future__ import annotations

import http.client
import importlib
import re
import sys
import tempfile
from pathlib import Path
from unittest import TestCase

from tests.servers import free_port, is_listening, serving, wait_until

TOP = Path(__file__).parent.parent
README = (TOP / "README.md").read_text()


def section(title: str) -> str:
    """The text under a heading of the second level."""
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def classes_in(file: str) -> dict[str, set[str]]:
    """Test classes of a file and the tests that each has, also those that a table has made."""
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    classes = {name: kind for name, kind in vars(module).items() if isinstance(kind, type)}
    marks = ("test_", "runTest")
    return {name: {test for test in dir(kind) if test.startswith(marks)} for name, kind in classes.items()}


class PromiseTests(TestCase):
    """Who doubts a promise can run its test by the name that stands behind it."""

    def test_each_promise_has_its_tests(self) -> None:
        promises = section("What it promises").split("\n* ")[1:]
        self.assertGreater(len(promises), 5)
        for promise in promises:
            file, name, found = "", "", 0
            for word in re.findall(r"`([\w/.:]+)`", promise):
                # A name without a file is in the file named last; a method alone in the class named last.
                path, _, rest = word.rpartition(".py::")
                file = f"{path}.py" if path else file
                if not file or not re.fullmatch(r"[A-Z]\w*Tests(::test_\w+)?|test_\w+", rest):
                    continue
                tests = classes_in(file)
                head, _, method = rest.partition("::")
                name, method = (name, head) if head.startswith("test_") else (head, method)
                self.assertTrue(tests.get(name), f"{word} in: {promise}")
                self.assertTrue(not method or method in tests[name], f"{word} in: {promise}")
                found += 1
            self.assertTrue(found, f"no test is named in: {promise}")


class ExampleTests(TestCase):
    """A stranger pastes the example, and it serves."""

    def test_embedding(self) -> None:
        code = re.search(r"```python\n(.*?)```", section("Running it"), re.DOTALL)
        assert code is not None
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            port = free_port()
            script = folder / "example.py"
            script.write_text(code[1].replace("tcp:8080", f"tcp:{port}"))
            with serving([sys.executable, script], cwd=folder, environment={"PYTHONPATH": str(TOP)}):
                wait_until(lambda: is_listening(port), "the example listens")
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request("PUT", "/files/a/b", b"contents")
                self.assertEqual(connection.getresponse().status, 201)
                connection.close()
            self.assertEqual((folder / "uploads/a/b").read_bytes(), b"contents")
