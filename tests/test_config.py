"""Options from a file; and what is written from the options: the example, the man page, completion."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import skipUnless

from twisted.python.usage import UsageError
from twisted.trial.unittest import SynchronousTestCase

from docs import reference
from lwstwisted.config import Configurable, Mistakes
from lwstwisted.options import Options
from lwstwisted.web.limits import DEFAULT_LIMITS, Limits
from tests.servers import PATIENCE, serving, twistd
from tests.test_service import parsed

TOP = Path(__file__).resolve().parent.parent
ETC = TOP / "etc"
HERE = {"PYTHONPATH": str(TOP)}
COMMAND = [sys.executable, "-m", "lwstwisted"]


class FileTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def written(self, text: str | bytes) -> str:
        path = self.folder / "lws.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    def mistakes(self, text: str | bytes, options: type[Configurable] = Options) -> list[tuple[int, str]]:
        """The lines that a file is refused with, and what they say."""
        path = self.written(text)
        said = str(self.assertRaises(Mistakes, options().parseOptions, ["--config", path]))
        found = [re.fullmatch(re.escape(path) + r":(\d+): (.+)", line) for line in said.split("\n")]
        self.assertTrue(all(found), said)
        return [(int(one[1]), one[2]) for one in found if one]

    def run_command(self, *words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [*COMMAND, *words], cwd=self.folder, env={**os.environ, **HERE}, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout, done.stderr


class SaidTests(FileTestCase):
    """A file says what the command line says."""

    def test_the_same(self) -> None:
        """In each of its forms."""
        for text, words in {
            "": [],
            'root = "/srv"\nport = 1234': ["--root", "/srv", "--port", "1234"],
            "max-size = 1000": ["--max-size", "1000"],
            'max-size = "10G"': ["--max-size", "10G"],
            'listen = "tcp:1"': ["--listen", "tcp:1"],
            'listen = ["tcp:1", "unix:/s"]': ["--listen", "tcp:1", "--listen", "unix:/s"],
            "listen = []": [],
            'trusted-proxy = ["::1"]': ["--trusted-proxy", "::1"],
            "[limit]\nbody-rate = 0\nhead-time = 2.5": ["--limit", "body-rate=0", "--limit", "head-time=2.5"],
            "limit.body-rate = 0": ["--limit", "body-rate=0"],
            "limit = { body-rate = 0 }": ["--limit", "body-rate=0"],
            'limit = ["body-rate=0"]': ["--limit", "body-rate=0"],
            'log-format = "json"\nmetrics = "tcp:9"': ["--log-format", "json", "--metrics", "tcp:9"],
            'root = "--odd"': ["--root=--odd"],
        }.items():
            self.assertEqual(dict(parsed("--config", self.written(text))), dict(parsed(*words)), text)

    def test_the_command_line_comes_first(self) -> None:
        """What it says of an option replaces all that the file says of that, however it is spelled there."""
        path = self.written('root = "/a"\ndurability = "none"\nlisten = ["tcp:1", "tcp:2"]\n[limit]\nrequests = 5')
        options = parsed("-r", "/b", "--config", path, "-l", "tcp:3", "--limit", "body-rate=0")
        self.assertEqual(options["root"], "/b")
        self.assertEqual(options["durability"], "none")
        self.assertEqual(options["listen"], ["tcp:3:interface=127.0.0.1"])
        self.assertEqual(options["limits"], Limits(body_rate=0))
        self.assertEqual(parsed("--durab", "data", "--config", path)["durability"], "data")

    def test_once(self) -> None:
        """Which of two files comes first is nobody's guess."""
        path = self.written("")
        self.assertIn("--config", str(self.assertRaises(UsageError, parsed, "--config", path, "--config", path)))

    def test_mistakes_of_the_command_line(self) -> None:
        """They are told as ever, and no line of the file is blamed for them."""
        path = self.written("port = 5")
        for words in (["--prot", "1"], ["--durability", "x"], ["--port", "0"]):
            error = self.assertRaises(UsageError, parsed, "--config", path, *words)
            self.assertNotIsInstance(error, Mistakes)

    def test_no_file(self) -> None:
        error = str(self.assertRaises(UsageError, parsed, "--config", str(self.folder / "none")))
        self.assertIn("No such file", error)
        self.assertIn("directory", str(self.assertRaises(UsageError, parsed, "--config", str(self.folder))))


class AnyOptions(Configurable):
    """Options of another program."""

    optFlags = [["anonymous", "a", "..."]]
    optParameters = [["size", None, "1", "..."], ["workers", None, 1, "...", int]]
    rows = {"allow": "{who}:{actions}:{path}"}
    separators = {"group": ":"}

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self["allow"] = []
        self["group"] = []

    def opt_allow(self, rule: str) -> None:
        """..."""
        if "?" in rule:
            raise UsageError("--allow has a question mark")
        self["allow"].append(rule)

    def opt_group(self, group: str) -> None:
        """..."""
        self["group"].append(group)

    def postOptions(self) -> None:
        if self["workers"] > 1 and self["size"] == "0":
            raise UsageError("--workers want a --size")
        if self["size"] == "0":
            raise UsageError("a --size is above 0")


class AnyOptionsTests(FileTestCase):
    """Options that nobody has thought of here are understood as well."""

    def read(self, text: str) -> AnyOptions:
        options = AnyOptions()
        options.parseOptions(["--config", self.written(text)])
        return options

    def test_flags(self) -> None:
        self.assertEqual([self.read(text)["anonymous"] for text in ("anonymous = true", "anonymous = false")], [1, 0])

    def test_rows(self) -> None:
        """A list of tables is the same option again and again, with its parts by their names."""
        text = (
            '[[allow]]\nwho = ["alice", "@staff"]\nactions = "put"\npath = "/a"\n'
            '[[allow]]\npath = "/b"\nwho = "bob"\nactions = ["get", "list"]\n'
        )
        self.assertEqual(self.read(text)["allow"], ["alice,@staff:put:/a", "bob:get,list:/b"])
        twice = 2 * '[[allow]]\nwho = "a?"\nactions = "b"\npath = "c"\n'
        self.assertEqual([line for line, _ in self.mistakes(twice, AnyOptions)], [1, 5])
        self.assertEqual(self.read('allow = ["a:b:c"]')["allow"], ["a:b:c"])
        self.assertEqual(self.read('allow = { who = "a", actions = "b", path = "c" }')["allow"], ["a:b:c"])

    def test_tables(self) -> None:
        self.assertEqual(self.read('[group]\nstaff = ["a", "b"]\nx = "c"')["group"], ["staff:a,b", "x:c"])

    def test_mistakes(self) -> None:
        for text, line, part in (
            ('\n[[allow]]\nwho = "a"\nactions = "b"', 2, "path"),
            ('[[allow]]\nwho = "a"\nactoins = "b"\npath = "c"', 3, "actions"),
            (2 * '[[allow]]\nwho = "a?"\nactions = "b"\npath = "c"\n', 1, "question"),
            ('[[allow]]\nwho = true\nactions = "b"\npath = "c"', 2, "true or false"),
            ('\nanonymous = "yes"', 2, "true or false"),
            ('workers = "2"', 1, "whole number"),
            ("workers = true", 1, "whole number"),
            ('size = "5"\nworkers = 2.0', 2, "whole number"),
            ('size = "0"\n\n# more\nworkers = 2', 4, "--workers"),
            ('# none\nsize = "0"', 2, "above 0"),
        ):
            self.assertEqual(self.mistakes(text, AnyOptions)[0][0], line, text)
            self.assertIn(part, self.mistakes(text, AnyOptions)[0][1])


class MistakeTests(FileTestCase):
    """Each mistake is told with its line, before anything is started."""

    def test_lines(self) -> None:
        for text, line, part in (
            ('\n\nrott = "x"', 3, "root"),
            ('max_size = "1G"', 1, "max-size"),
            ("zzz = 1", 1, "'zzz'"),
            ("config = 'other'", 1, "'config'"),
            ("help = true", 1, "'help'"),
            ('root = "a"\nroot = "b"', 2, "verwrite"),
            ("[limit]\nbody-rate = 1\n[limit]\n", 3, "Cannot declare"),
            ("root = ", 1, "Invalid value"),
            ('port = 1\nroot = "a', 2, "(at the end)"),
            ("port = 1\nroot : 2", 2, "column 6"),
            ("root = 2026-01-01", 1, "date"),
            ("root = ['a']", 1, "list"),
            ("listen = [['a']]", 1, "list"),
            ("root = true", 1, "true or false"),
            ("listen = true", 1, "true or false"),
            ('port = "8443"', 1, "whole number"),
            ("port = 1.5", 1, "whole number"),
            ('# a\n\ndurability = "ful" # b', 3, "full, data or none"),
            ("port = 65536", 1, "--port"),
            ('listen = "tcp:1"\nport = 7', 2, "--listen"),
            ('public-url = "x"', 1, "--public-url"),
            ('upload-lifetime = "1w"', 1, "--upload-lifetime"),
            ('allow-origin = [\n  "https://a",\n  "https://a/b",\n]', 1, "--allow-origin"),
            ("[limit]\nbody-rate = 0\nbodyrate = 1", 3, "body-rate"),
            ("[limit]\nbody_rate = 0", 2, "body-rate"),
            ("[limit]\nconnections = 0", 2, "connections is a number above 0"),
            ('[limit]\nhead-time = "soon"', 2, "not a number"),
            ("[limit]\nhead-time = nan", 2, "head-time"),
            ("limit.x = 1", 1, "body-rate"),
        ):
            found = self.mistakes(text)
            self.assertEqual([one[0] for one in found], [line], (text, found))
            self.assertIn(part, found[0][1], text)

    def test_lines_behind_other_statements(self) -> None:
        """What looks like a statement and is the inside of a text is none."""
        text = 'root = """\n/a\nport = 1\n[limit]\n# b """\nallow-origin = [ # c\n  "*",\n\n]\r\n\nport = 0\n'
        self.assertEqual([line for line, _ in self.mistakes(text)], [11])

    def test_all_at_once(self) -> None:
        """Who has made three mistakes need not start three times."""
        found = self.mistakes('rot = 1\nport = "1"\n[limit]\nrequests = 0\n')
        self.assertEqual([line for line, _ in found], [1, 2, 4])

    def test_bytes(self) -> None:
        """What isn't UTF-8 is found, too."""
        self.assertEqual(self.mistakes(b'port = 1\n# \xe4\nroot = "a"')[0][0], 2)
        self.assertEqual(self.mistakes(b"\xef\xbb\xbfport = 1")[0][0], 1)
        self.assertEqual(self.mistakes(b"port = 1\nroot = 'a\0'")[0][0], 2)

    def test_no_escape(self) -> None:
        """Names of a file can't move the cursor of who reads about them."""
        for text in ('"\\u001b[2J" = 1', '"a\\nb" = 1', '"\\u202e" = 1'):
            self.assertTrue(self.mistakes(text)[0][1].isprintable(), text)
        self.assertEqual(self.mistakes('"ro\\u001bot" = 1'), [(1, "there is no option 'ro\\x1bot'; do you mean root?")])


class CommandTests(FileTestCase):
    """``check-config`` and ``--config``, as they are typed."""

    def test_good(self) -> None:
        self.assertEqual(self.run_command("check-config", str(ETC / "lwstwisted.toml")), (0, "", ""))

    def test_bad(self) -> None:
        """The lines are as compilers write them, so that an editor finds the place."""
        path = self.written("port = 0\n")
        status, out, said = self.run_command("check-config", path)
        self.assertEqual((status, out), (1, ""))
        self.assertRegex(said, rf"^{re.escape(path)}:1: --port [^\n]*\n$")

    def test_no_file(self) -> None:
        status, _, said = self.run_command("check-config", "none")
        self.assertEqual((status, said.count("\n"), "none" in said), (1, 1, True))
        self.assertEqual(self.run_command("check-config")[0], 2)

    def test_serve_refuses(self) -> None:
        """A service with a mistake in its file doesn't start, and says both mistakes."""
        path = self.written("prot = 1\nport = 'a'\n")
        status, out, said = self.run_command("serve", "--config", path)
        self.assertEqual((status, out), (2, ""))
        self.assertEqual([line.split(": ")[1] for line in said.splitlines()], [f"{path}:1", f"{path}:2"])
        self.assertEqual(os.listdir(self.folder), ["lws.toml"])

    def test_serves(self) -> None:
        """By our own command and by twistd."""
        for name, command in (("serve", [*COMMAND, "serve"]), ("twistd", twistd())):
            root = self.folder / name
            path = self.written(f'root = "{root}"\nlisten = "tcp:0"\ndurability = "none"\nmax-size = 4\n')
            with serving([*command, "--config", path], cwd=self.folder, environment=HERE) as server:
                (port,) = server.wait_for_ports()
                for body, status in ((b"body", 201), (b"longer", 413)):
                    client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
                    client.request("PUT", "/files/x", body)
                    self.assertEqual(client.getresponse().status, status)
                    client.close()
                server.end()
            self.assertEqual((root / "x").read_bytes(), b"body")


class ExampleTests(FileTestCase):
    """``etc/lwstwisted.toml`` says every option, with its default."""

    def setUp(self) -> None:
        super().setUp()
        self.text = (ETC / "lwstwisted.toml").read_text()

    def paragraphs(self) -> dict[tuple[str, ...], tuple[str, str]]:
        """For each setting that is commented out: what is said of it, and the setting alone."""
        found = {}
        table: tuple[str, ...] = ()
        for paragraph in self.text.split("\n\n"):
            lines = paragraph.splitlines()
            table = next((tuple(line.strip("[]").split(".")) for line in lines if line.startswith("[")), table)
            said = [line[2:] for line in lines if line.startswith("# ")]
            setting = [line[1:] for line in lines if re.match(r"#[^ ]", line)]
            if setting:
                name = re.match(r"\[*([a-z-]+)", setting[0])
                assert name is not None
                above = "" if not table or setting[0].startswith("[") else f"[{table[0]}]\n"
                found[(*(table if above else ()), name[1])] = (" ".join(said), above + "\n".join(setting))
        return found

    def test_as_it_is(self) -> None:
        """Nothing in it changes anything."""
        self.assertEqual(dict(parsed("--config", str(ETC / "lwstwisted.toml"))), dict(parsed()))

    def test_complete(self) -> None:
        """No option and no limit is missing, and none is there twice."""
        names = set(Options().settings) - {"limit"}
        limits = {("limit", name.replace("_", "-")) for name in DEFAULT_LIMITS.__dataclass_fields__}
        self.assertEqual(set(self.paragraphs()), {(name,) for name in names} | limits)

    def test_defaults(self) -> None:
        """What is said to be a default is one; what has none has an example that is understood."""
        for name, (said, setting) in self.paragraphs().items():
            try:
                options = dict(parsed("--config", self.written(setting)))
            except Mistakes as mistakes:
                self.assertRegex(str(mistakes), r"No such file or directory$", setting)  # it was understood
                continue
            without = re.search(r"\[default: ([^]]*)\]", said)
            has_value = without is None or (name[-1] in setting and f'"{without[1]}"' in setting)
            has_value = has_value or (without is not None and setting.endswith(f"= {without[1]}"))
            self.assertEqual(options == dict(parsed()), has_value, setting)


class WrittenTests(FileTestCase):
    """What is written from the options is what they are now: ``python -m docs.reference`` writes it."""

    def test_current(self) -> None:
        for path, text in reference.documents().items():
            self.assertEqual(path.read_text(), text, path)

    @skipUnless(shutil.which("man"), "man is not installed")
    def test_manual(self) -> None:
        """man(1) shows it, without a complaint."""
        environment = {**os.environ, "MANWIDTH": "100", "LC_ALL": "C.UTF-8"}
        command = ["man", "--warnings", "-l", str(TOP / "docs" / "lwstwisted.1")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        shown = re.sub(r".\x08", "", done.stdout)
        for name in ("--durability=VALUE", "check-config", "connections-per-address=1000", "--dry-run"):
            self.assertIn(name, shown)

    def completed(self, *words: str) -> set[str]:
        """What bash offers for the last word."""
        program = (
            'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _lwstwisted'
            '; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        script = str(ETC / "completion" / "lwstwisted.bash")
        command = ["bash", "-c", program, "bash", script, "lwstwisted", *words]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=60, check=True)
        self.assertEqual(done.stderr, "")
        return set(done.stdout.split("\n")) - {""}

    @skipUnless(shutil.which("bash"), "bash is not installed")
    def test_bash(self) -> None:
        """Commands, their options, and files with any name."""
        commands = [name for name, _, _ in reference.commands()]
        self.assertEqual(self.completed("s"), {name for name in commands if name.startswith("s")})
        self.assertEqual(self.completed("serve", "--du"), {"--durability"})
        self.assertEqual(self.completed("fsck", "--r"), {"--repair", "--root"})
        (self.folder / "a b.toml").touch()
        self.assertEqual(self.completed("serve", "--config", "a"), {"a b.toml"})

    def test_zsh(self) -> None:
        """The command says it to the shell."""
        for words, part in ((["s"], "sweep"), (["serve", "--du"], "--durability=")):
            _, said, _ = self.run_command(*words, "--_shell-completion", f"zsh:{len(words) + 1}")
            self.assertTrue(said.startswith("#compdef "), said)
            self.assertIn(part, said)

    @skipUnless(shutil.which("zsh"), "zsh is not installed")
    def test_zsh_reads_it(self) -> None:
        command = ["zsh", "-n", str(ETC / "completion" / "_lwstwisted")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        self.assertEqual((done.returncode, done.stderr), (0, ""))


class ImportTests(FileTestCase):
    """Who asks what there is need not wait for all of it to be loaded."""

    HEAVY = (
        "OpenSSL", "asyncio", "cryptography", "lwstwisted.service", "lwstwisted.stores", "lwstwisted.uploads",
        "prometheus_client", "tomllib", "twisted.cred", "twisted.internet.reactor", "twisted.internet.tcp",
        "twisted.logger", "twisted.plugin", "twisted.web", "zope.interface",
    )

    def test_help(self) -> None:
        for words in (["--help"], ["serve", "--help"], ["--version"]):
            program = "import sys; from lwstwisted.__main__ import main\ntry: main()\nfinally: print(*sys.modules)"
            command = [sys.executable, "-c", program, *words]
            done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=60)
            loaded = done.stdout.splitlines()[-1].split()
            self.assertIn("twisted.python.usage", loaded)
            heavy = [name for name in loaded if any(name == one or name.startswith(one + ".") for one in self.HEAVY)]
            self.assertEqual(heavy, [], words)
