"""What an installation gives: plugin, command, units. Install first: ``make quick`` or ``make test`` does."""

from __future__ import annotations

import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from typing import Any
from unittest import TestCase, skipUnless

import httpx
import pytest

from lwstwisted.certificate import ensure_development_certificate
from lwstwisted.service import STOP_TIME
from tests.servers import PATIENCE, serving, tls_endpoint

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
        used = set(re.findall(r"\$\{?(LWSTWISTED_\w+)", commands))
        given = set(re.findall(r"(?m)^(\w+)=", (ETC / "lwstwisted.env").read_text()))
        self.assertTrue(used)
        self.assertEqual(used, given)

    @skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    def test_systemd_accepts_the_units(self) -> None:
        """``systemd-analyze verify`` has nothing to say about them."""
        for is_sealed in (False, True):
            service = self.copy_service(is_sealed)
            sockets = [shutil.copy(path, self.folder) for path in sorted(ETC.glob("*.socket"))]
            self.assertEqual(len(sockets), 2)
            command = ["systemd-analyze", "verify", "--man=no", service, *sockets]
            done = subprocess.run(command, capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout + done.stderr), (0, ""))

    def copy_service(self, is_sealed: bool) -> Path:
        """The service as systemd would see it, but with the program that is here, as it looks for that."""
        text = (ETC / "lwstwisted.service").read_text()
        self.assertIn("ExecStart=/opt/lwstwisted/bin/lwstwisted serve ", text)
        service = self.folder / "lwstwisted.service"
        service.write_text(text.replace("/opt/lwstwisted/bin/lwstwisted", str(SCRIPTS / "lwstwisted")))
        if is_sealed:
            shutil.copytree(ETC / "lwstwisted.service.d", self.folder / "lwstwisted.service.d")
        return service

    @skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    def test_exposure(self) -> None:
        """What somebody could do who has taken over the service, in points of ``systemd-analyze security``."""
        for is_sealed, most in ((False, 1.3), (True, 0.9)):
            service = self.copy_service(is_sealed)
            told = self.run_command("systemd-analyze", "security", "--offline=true", "--no-pager", service)
            found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
            assert found is not None, told
            self.assertLessEqual(float(found[1]), most, told)

    def test_times_fit(self) -> None:
        """systemd waits for the end longer than the service takes for it."""
        service = (ETC / "lwstwisted.service").read_text()
        (patience,) = re.findall(r"(?m)^TimeoutStopSec=(\d+)s$", service)
        (drain,) = re.findall(r"(?m)^LWSTWISTED_DRAIN_TIME=(\d+)$", (ETC / "lwstwisted.env").read_text())
        self.assertGreater(int(patience), int(drain) + STOP_TIME)

    @pytest.mark.slow
    @skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    def test_system_calls(self) -> None:
        """The service, its parent and its workers get along with the system calls that the unit leaves them.

        From the start over uploads and a reload to the end. Root's one beyond them gives what it makes in the folder
        of somebody else to that one; the service is not root.
        """
        strace = shutil.which("strace")
        if strace is None:
            self.skipTest("needs strace")
        calls = self.folder / "calls"
        calls.mkdir()
        tracing = [strace, "-f", "-ff", "-qq", "-o", calls / "of"]
        pair = ensure_development_certificate(self.folder / "pair.pem")
        command = [*tracing, SCRIPTS / "lwstwisted", "serve", "--root", "root", "--workers", "2", "--drain-time", "1"]
        command += ["--listen", tls_endpoint(pair), "--listen", "tcp:0", "--access-log", "log"]
        with serving(command, cwd=self.folder) as server:
            ports = server.wait_for_ports(2)
            parent = int(server.wait_for(r"worker \d started: process (\d+)", 2)[0])
            (parent,) = (int(pid) for pid in re.findall(r"PPid:\s(\d+)", Path(f"/proc/{parent}/status").read_text()))
            for scheme, port in zip(("https", "http"), ports, strict=True):
                url = f"{scheme}://127.0.0.1:{port}/files/{scheme}"
                verify: Any = ssl.create_default_context(cafile=str(pair)) if scheme == "https" else True
                with httpx.Client(verify=verify, trust_env=False, timeout=PATIENCE) as client:
                    self.assertEqual(client.put(url, content=bytes(3 << 20)).status_code, 201)
                    self.assertEqual(len(client.get(url).content), 3 << 20)
                    self.assertEqual(client.delete(url).status_code, 204)
            os.kill(parent, signal.SIGHUP)
            os.kill(parent, signal.SIGTERM)
            self.assertEqual(server.wait(), 0, server.text)
        used = {
            name
            for path in calls.iterdir()
            for name in re.findall(r"(?m)^(\w+)\(", path.read_text(errors="backslashreplace"))
        }
        self.assertGreater(len(used), 40)
        allowed = self.calls_of("@system-service") - self.calls_of("@privileged") - self.calls_of("@resources")
        self.assertLessEqual(used - allowed, {"fchown"} if os.geteuid() == 0 else set())

    def calls_of(self, group: str) -> set[str]:
        """The system calls of one of systemd's groups."""
        told = self.run_command("systemd-analyze", "--no-pager", "syscall-filter", group)
        words = {line.strip() for line in told.splitlines()[1:] if not line.strip().startswith("#")}
        inner = {word for word in words if word.startswith("@")}
        return (words - inner).union(*(self.calls_of(one) for one in inner))
