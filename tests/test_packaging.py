"""What an installation gives: plugin, command, units. Install first: ``make quick`` or ``make test`` does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from unittest import TestCase, skipUnless

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(sysconfig.get_path("scripts"))
ETC = ROOT / "etc"


class PackagingTestCase(TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def run_command(self, *command: str | Path) -> str:
        """Run a command away from the source tree, where only what is installed is found.

        :returns: its standard output.
        """
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout


class CommandTests(PackagingTestCase):
    """The commands of the README exist."""

    def test_twistd_knows_the_reactor(self) -> None:
        self.assertRegex(self.run_command(SCRIPTS / "twistd", "--help-reactors"), r"(?m)^\s*lws\s")

    def test_twistd_knows_the_service(self) -> None:
        self.assertRegex(self.run_command(SCRIPTS / "twistd", "--help"), r"(?m)^\s*lwstwisted\s")

    def test_twistd_shows_the_options_of_the_service(self) -> None:
        """Every option that the unit passes is one."""
        out = self.run_command(SCRIPTS / "twistd", "--reactor=lws", "lwstwisted", "--help")
        for option in ("--root", "--listen", "--durability", "--max-size"):
            self.assertIn(option, out)

    def test_console_script(self) -> None:
        self.assertIn("serve", self.run_command(SCRIPTS / "lwstwisted", "--help"))


class WheelTests(PackagingTestCase):
    """What ``pip install`` takes along. The packages are listed by hand, so one may be forgotten."""

    @pytest.mark.slow
    def test_contents(self) -> None:
        """All modules, the plugin, and no ``twisted/__init__.py`` that would hide Twisted."""
        source = self.folder / "source"
        source.mkdir()
        for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        for name in ("lwstwisted", "twisted"):
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"]
        self.run_command(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", self.folder, source)
        (wheel,) = self.folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        ours = {str(path.relative_to(ROOT)) for path in (ROOT / "lwstwisted").rglob("*.py")}
        self.assertEqual(packed, ours | {"twisted/plugins/lwstwisted_plugin.py"})


class UnitTests(PackagingTestCase):
    """The systemd units in ``etc/``."""

    def test_the_example_sets_what_the_service_uses(self) -> None:
        """Every variable of the service is in the example, and the example has no other."""
        service = (ETC / "lwstwisted.service").read_text()
        commands = "\n".join(line for line in service.splitlines() if not line.startswith("#"))
        used = set(re.findall(r"\$\{?(\w+)", commands))
        given = set(re.findall(r"(?m)^(\w+)=", (ETC / "lwstwisted.env").read_text()))
        self.assertTrue(used)
        self.assertEqual(used, given)

    @skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    def test_systemd_accepts_the_units(self) -> None:
        """``systemd-analyze verify`` has nothing to say about them."""
        text = (ETC / "lwstwisted.service").read_text()
        self.assertIn("ExecStart=/opt/lwstwisted/bin/twistd ", text)
        # systemd looks for the program, so the unit that it sees names the one that is here.
        service = self.folder / "lwstwisted.service"
        service.write_text(text.replace("/opt/lwstwisted/bin/twistd", str(SCRIPTS / "twistd")))
        listening = shutil.copy(ETC / "lwstwisted.socket", self.folder)
        command = ["systemd-analyze", "verify", "--man=no", service, listening]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout + done.stderr), (0, ""))
