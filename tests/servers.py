"""Real server processes for tests: started, watched through their log, and ended by their own id.

Every wait has an end. Nothing here is a test.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Condition, Thread
from unittest import SkipTest

PATIENCE = 30.0
"""Seconds that anything here may take before it counts as hanging."""

BLOCK = 1 << 20


def script(name: str) -> str:
    """A command that was installed together with this Python."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise AssertionError(f"{path} is missing: install the project into this environment (make quick does)")
    return str(path)


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Look again and again until ``condition`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"in {seconds} seconds it did not happen that {what}")
        time.sleep(0.01)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_listening(port: int) -> bool:
    """Whether somebody listens on a port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Server:
    """A process whose log is gathered; :func:`serving` makes it.

    :ivar log: lines of its standard output and standard error so far.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[str] = []
        self._changed = Condition()
        self._is_over = False
        self._gatherer = Thread(target=self._gather)
        self._gatherer.start()

    def _gather(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.log.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    @property
    def text(self) -> str:
        """The log as one text."""
        return "\n".join(self.log)

    def wait_for(self, pattern: str, count: int = 1) -> list[str]:
        """Wait for lines of the log.

        :returns: what the first ``count`` matches say: their first group.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or len(re.findall(pattern, self.text)) >= count, PATIENCE)
            found = re.findall(pattern, self.text)
        if len(found) < count:
            raise AssertionError(f"the log has no {count} lines like {pattern!r}:\n{self.text}")
        return found[:count]

    def wait_for_ports(self, count: int = 1) -> list[int]:
        """The TCP ports that it listens on, in the order of its log, as soon as there are ``count``."""
        return [int(port) for port in self.wait_for(r"starting on (\d+)", count)]

    def wait(self) -> int:
        """Wait for its end.

        :returns: its exit status.
        """
        status = self.process.wait(PATIENCE)
        self._gatherer.join(PATIENCE)
        return status

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send it a signal and wait for its end."""
        self.process.send_signal(how)
        return self.wait()

    def peak_memory(self) -> int:
        """Bytes of memory that it has had resident at most."""
        return self._status("VmHWM") * 1024

    def memory(self) -> int:
        """Bytes of memory that it has resident."""
        return self._status("VmRSS") * 1024

    def descriptors(self) -> int:
        """How many files and sockets it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def connections(self) -> int:
        """How many TCP connections it has."""
        inodes = {name[8:-1] for name in self._descriptors() if name.startswith("socket:[")}
        lines = Path(f"/proc/{self.process.pid}/net/tcp").read_text().splitlines()[1:]
        # proc_net_tcp(5): the fourth field is the state, 0A for one that listens; the tenth is the inode.
        return sum(fields[9] in inodes and fields[3] != "0A" for fields in map(str.split, lines))

    def _descriptors(self) -> list[str]:
        """What each descriptor is."""
        found = []
        for name in os.listdir(f"/proc/{self.process.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/{self.process.pid}/fd/{name}"))
        return found

    def open_beneath(self, folder: Path) -> list[str]:
        """Files that it has open beneath a folder, also those without a name."""
        return [path for path in self._descriptors() if path.startswith(f"{folder}/")]

    def _status(self, field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found is not None
        return int(found[1])


@contextmanager
def serving(
    command: Sequence[str | Path],
    *,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    descriptors: Sequence[int] = (),
) -> Iterator[Server]:
    """Run a server until the end of the block.

    :param environment: added to this process' own.
    :param descriptors: which it inherits, under the same numbers.
    """
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=descriptors,
        text=True,
        errors="backslashreplace",
        # A job in the background of a script ignores SIGINT, and so would the server.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    server = Server(process)
    try:
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        server.wait()
        assert process.stdout is not None
        process.stdout.close()


def twistd(*options: str | Path, reactor: str = "lws") -> list[str | Path]:
    """The command line of a service under twistd."""
    script("lwstwisted")  # where that is missing, twistd doesn't know us either
    # Tests call the service by many names, and some listen on all addresses.
    who = [] if "--allow" in options else ["--anonymous"]
    # And they end it while bodies are open, for which an operator would have it wait longer.
    drain = [] if "--drain-time" in options else ["--drain-time", "1"]
    return [script("twistd"), "--nodaemon", "--pidfile=", f"--reactor={reactor}", "lwstwisted", *who, *drain, *options]


@contextmanager
def traced(*options: str) -> Iterator[list[str]]:
    """Have strace look at threads, which the options name; gives the lines with what it saw, at the end.

    :raises unittest.SkipTest: where that can't be done.
    """
    program = shutil.which("strace")
    if program is None:
        raise SkipTest("needs strace")
    with tempfile.TemporaryDirectory(prefix="lwstwisted-") as folder:
        lines: list[str] = []
        log = Path(folder) / "log"
        strace = subprocess.Popen([program, "-y", "-o", log, *options], stderr=subprocess.PIPE, text=True)
        assert strace.stderr is not None
        with strace.stderr:
            said = strace.stderr.readline()
            try:
                if "attached" not in said:
                    raise SkipTest(f"strace cannot attach here: {said.strip()}")
                yield lines
            finally:
                strace.terminate()
                strace.wait()
        lines.extend(log.read_text(errors="backslashreplace").splitlines())


def tls_endpoint(certificate: Path, port: int = 0) -> str:
    """An ``ssl:`` endpoint of loopback.

    :param port: 0 for any free one.
    """
    return f"ssl:{port}:privateKey={certificate}:certKey={certificate}:interface=127.0.0.1"


def write_sample(path: Path, size: int) -> Path:
    """Make a file in which no two blocks are alike."""
    block = os.urandom(min(size, BLOCK))
    with open(path, "wb") as file:
        for offset in range(0, size, BLOCK):
            stamp = b"%016d" % offset
            file.write((stamp + block[len(stamp) :])[: size - offset])
    return path


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def everything_beneath(root: Path) -> list[str]:
    """All names beneath a folder, the store's own included."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def visible_beneath(root: Path) -> list[str]:
    """All names beneath a store's root that are not the store's own."""
    return [name for name in everything_beneath(root) if name.split("/")[0] != ".lwstwisted"]


def unfinished_beneath(root: Path) -> list[str]:
    """Temporary names in a store's root."""
    return sorted(os.listdir(root / ".lwstwisted" / "partial"))
