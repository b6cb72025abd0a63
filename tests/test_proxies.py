"""Proxies that operators put in front, as ``examples/proxies/`` has them: uploads go through them as they come."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import SkipTest

import h11
import pytest
from twisted.trial.unittest import SynchronousTestCase

from lwstwisted.certificate import ensure_development_certificate
from tests.servers import PATIENCE, Server, digest, free_port, is_listening, script, serving, wait_until, write_sample

TOP = Path(__file__).parent.parent
EXAMPLES = TOP / "examples" / "proxies"
KIB, MIB = 1024, 1024 * 1024
TUS = {"Tus-Resumable": "1.0.0"}


def adapted(name: str, changes: dict[str, str]) -> str:
    """An example with other ports and paths."""
    text = (EXAMPLES / name).read_text()
    for old, new in changes.items():
        assert old in text, f"{name} has no {old!r} any more"
        text = text.replace(old, new)
    return text


class Exchange:
    """A connection through TLS, on which requests are sent piece by piece."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        plain = socket.create_connection(("127.0.0.1", port), PATIENCE, source_address=("127.0.0.2", 0))
        self._socket = context.wrap_socket(plain, server_hostname="127.0.0.1")
        self._h11 = h11.Connection(h11.CLIENT)

    def send(self, method: str, path: str, fields: dict[str, str], first: bytes = b"", length: int = 0) -> None:
        """Send a head and the first bytes of its content."""
        headers = [("Content-Length", str(length)), *fields.items()]
        data = self._h11.send(h11.Request(method=method, target=path, headers=headers)) or b""
        self._socket.sendall(data + ((self._h11.send(h11.Data(data=first)) or b"") if first else b""))

    def event(self) -> h11.Event:
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            self._h11.receive_data(self._socket.recv(64 * KIB))
        assert isinstance(event, h11.Event)
        return event

    def answer(self) -> tuple[int, dict[str, str]]:
        """The final answer: its status and its fields."""
        while isinstance(event := self.event(), h11.InformationalResponse):
            pass
        assert isinstance(event, h11.Response)
        return event.status_code, {name.decode(): value.decode() for name, value in event.headers}

    def close(self) -> None:
        self._socket.close()

    def reset(self) -> None:
        """Leave as a client does whose machine is gone."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self._socket.close()


class Proxied:
    """What holds behind each of them. A mixin."""

    program: str
    has_interim = True

    def setUp(self: Any) -> None:
        program = shutil.which(self.program) or shutil.which(f"/usr/sbin/{self.program}")
        if program is None:
            raise SkipTest(f"needs {self.program}")
        self.command = program
        self.folder = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, self.folder)
        self.root = self.folder / "root"
        # Where a daemon that gives up its rights can read it.
        self.folder.chmod(0o755)
        self.certificate = ensure_development_certificate(self.folder / "up.pem")
        self.certificate.chmod(0o644)
        self.context = ssl.create_default_context(cafile=str(self.certificate))

    def arguments(self, port: int, backend: int) -> Sequence[str | Path]:
        """Write the configuration, and say how the proxy is started with it."""
        raise NotImplementedError

    @contextmanager
    def proxied(self, *options: str) -> Iterator[int]:
        """A service behind the proxy; gives the port of that."""
        port, log = free_port(), self.folder / "access.log"
        command = [script("lwstwisted"), "serve", "--root", self.root, "--trusted-proxy", "127.0.0.1"]
        command += ["--listen", "tcp:0", "--access-log", log, "--access-log-format", "json", *options]
        with serving(command, cwd=self.folder) as service:
            backend = service.wait_for_ports()[0]
            words = [self.command, *self.arguments(port, backend)]
            with serving(words, cwd=self.folder, environment=self.home) as proxy:
                wait_until(lambda: is_listening(port) or self.is_over(proxy), "the proxy listens")
                yield port

    @property
    def home(self) -> dict[str, str]:
        """Where a proxy keeps what it wants to keep."""
        return {"HOME": str(self.folder), "XDG_DATA_HOME": str(self.folder), "XDG_CONFIG_HOME": str(self.folder)}

    def is_over(self, proxy: Server) -> bool:
        if proxy.process.poll() is not None:
            raise AssertionError(f"{self.program} has ended:\n{proxy.text}")
        return False

    def clients(self) -> list[str]:
        """Whom the requests of the access log came from."""
        return [json.loads(line)["client"] for line in (self.folder / "access.log").read_text().splitlines()]

    def connect(self: Any, port: int) -> Exchange:
        exchange = Exchange(port, self.context)
        self.addCleanup(exchange.close)
        return exchange

    def test_upload_and_download(self: Any) -> None:
        """A real client uploads and fetches back, and is known by its own address, whatever it says."""
        sample = write_sample(self.folder / "sample", 16 * MIB + 1)
        with self.proxied() as port:
            url = f"https://127.0.0.1:{port}/files/a/b"
            curl = ["curl", "-sS", "--fail", "--cacert", self.certificate, "--interface", "127.0.0.2"]
            said = ("X-Forwarded-For: 192.0.2.6", "Forwarded: for=192.0.2.6", "X-Forwarded-Host: evil")
            lies = [word for field in said for word in ("-H", field)]
            subprocess.run([*curl, *lies, "-T", sample, url], check=True, timeout=PATIENCE)
            subprocess.run([*curl, "-o", self.folder / "back", url], check=True, timeout=PATIENCE)
            page = ["-H", f"Origin: https://127.0.0.1:{port}", "-F", f"f=@{self.certificate}"]
            subprocess.run([*curl, *lies, *page, f"https://127.0.0.1:{port}/files/"], check=True, timeout=PATIENCE)
        self.assertEqual(digest(self.folder / "back"), digest(sample))
        self.assertTrue((self.root / self.certificate.name).exists())
        self.assertEqual([client for client in self.clients() if client != "127.0.0.1"], ["127.0.0.2"] * 3)

    def test_cut_upload_goes_on(self: Any) -> None:
        """What a client sent before it was cut has arrived, though the request never ended; the rest comes later."""
        data = os.urandom(4 * MIB)
        host = {"Host": "127.0.0.1"}
        with self.proxied() as port:
            client = self.connect(port)
            plan = {"Upload-Length": str(len(data)), "Upload-Metadata": "name eA=="}
            client.send("POST", "/uploads/", {**host, **TUS, **plan})
            status, fields = client.answer()
            self.assertEqual(status, 201)
            path = fields["location"]
            part = {**host, **TUS, "Content-Type": "application/offset+octet-stream"}
            client = self.connect(port)
            client.send("PATCH", path, {**part, "Upload-Offset": "0"}, data[: 3 * MIB], len(data))

            def some_arrived() -> bool:
                """Whoever asks ends the older request, so what is under way is asked of the disk."""
                sizes = [file.stat().st_size for file in (self.root / ".lwstwisted").rglob("*") if file.is_file()]
                return max(sizes) >= 2 * MIB

            wait_until(some_arrived, "what was sent has come to the disk while the request goes on")
            client.reset()
            looking = self.connect(port)
            looking.send("HEAD", path, {**host, **TUS})
            status, fields = looking.answer()
            offset = int(fields["upload-offset"])
            self.assertGreaterEqual(offset, 2 * MIB)
            client = self.connect(port)
            client.send("PATCH", path, {**part, "Upload-Offset": str(offset)}, data[offset:], len(data) - offset)
            self.assertEqual(client.answer()[0], 204)
        self.assertEqual((self.root / "x").read_bytes(), data)

    def test_interim_responses(self: Any) -> None:
        """Who understands 104 gets it where the proxy hands it on, and in any case the answer behind it."""
        with self.proxied() as port:
            client = self.connect(port)
            draft = {"Host": "127.0.0.1", "Upload-Draft-Interop-Version": "8", "Upload-Complete": "?1"}
            client.send("PUT", "/files/x", draft, b"all", 3)
            self.assertEqual(client.event().status_code, 104 if self.has_interim else 201)
            if self.has_interim:
                self.assertEqual(client.answer()[0], 201)
        self.assertEqual((self.root / "x").read_bytes(), b"all")

    def test_refusal_arrives(self: Any) -> None:
        """Who sends too much hears why, with the words of the service."""
        sample = write_sample(self.folder / "sample", 8 * MIB)
        with self.proxied("--max-size", "1M") as port:
            curl = ["curl", "-sS", "--http1.1", "--cacert", self.certificate, "-w", "%{http_code}", "-T", sample]
            done = subprocess.run(
                [*curl, f"https://127.0.0.1:{port}/files/x"], capture_output=True, timeout=PATIENCE, text=True
            )
        self.assertIn("413", done.stdout)
        self.assertFalse((self.root / "x").exists())


@pytest.mark.slow
class NginxTests(Proxied, SynchronousTestCase):
    """``examples/proxies/nginx.conf``."""

    program = "nginx"
    has_interim = False

    def arguments(self, port: int, backend: int) -> Sequence[str | Path]:
        site = adapted(
            "nginx.conf",
            {
                "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
                "127.0.0.1:8080": f"127.0.0.1:{backend}",
                "/etc/ssl/up.example.org.pem": str(self.certificate),
                "/etc/ssl/up.example.org.key": str(self.certificate),
            },
        )
        paths = "".join(
            f"{kind}_temp_path {self.folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        configuration = self.folder / "nginx.conf"
        configuration.write_text(
            f"daemon off;\nmaster_process off;\npid {self.folder}/pid;\nerror_log stderr;\n"
            f"events {{}}\nhttp {{\naccess_log off;\n{paths}{site}}}\n"
        )
        return ["-p", self.folder, "-c", configuration]


@pytest.mark.slow
class HaproxyTests(Proxied, SynchronousTestCase):
    """``examples/proxies/haproxy.cfg``."""

    program = "haproxy"

    def arguments(self, port: int, backend: int) -> Sequence[str | Path]:
        configuration = self.folder / "haproxy.cfg"
        configuration.write_text(
            adapted(
                "haproxy.cfg",
                {
                    "bind :443": f"bind 127.0.0.1:{port}",
                    "127.0.0.1:8080": f"127.0.0.1:{backend}",
                    "/etc/ssl/up.example.org.pem": str(self.certificate),
                },
            )
        )
        return ["-db", "-f", configuration]


@pytest.mark.slow
class CaddyTests(Proxied, SynchronousTestCase):
    """``examples/proxies/Caddyfile``."""

    program = "caddy"

    def arguments(self, port: int, backend: int) -> Sequence[str | Path]:
        configuration = self.folder / "Caddyfile"
        site = adapted(
            "Caddyfile",
            {
                "https://up.example.org:443": f"https://127.0.0.1:{port}",
                "127.0.0.1:8080": f"127.0.0.1:{backend}",
                "/etc/ssl/up.example.org.pem": str(self.certificate),
                "/etc/ssl/up.example.org.key": str(self.certificate),
            },
        )
        configuration.write_text("{\n\tadmin off\n\tauto_https disable_redirects\n}\n" + site)
        return ["run", "--config", configuration, "--adapter", "caddyfile"]
