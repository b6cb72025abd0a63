"""What Prometheus is told, by its own parsers."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any

from cryptography.x509 import load_pem_x509_certificate
from prometheus_client.multiprocess import mark_process_dead
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.resource import Resource

from lwstwisted.loop.reactor import LwsReactor
from lwstwisted.metrics import BUCKETS, METRICS, TICK, Measurements
from lwstwisted.options import Options
from lwstwisted.service import makeService
from lwstwisted.stores.local import LocalStore
from lwstwisted.web.request import StreamingRequest, UploadNote
from lwstwisted.web.site import StreamingSite
from tests.servers import PATIENCE, Server, serving, wait_until

TOP = Path(__file__).resolve().parent.parent
HERE = {"PYTHONPATH": str(TOP)}
OF_LOOP = {name for name in METRICS if name.startswith("loop_t") or name.startswith("loop_longest")} | {
    "synthesised_reads", "pending_readers", "parked_readers",
}
"""What only our own reactors tell."""

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(port: int, accept: str = "text/plain") -> tuple[str, str]:
    """What is told, and its media type."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    client.request("GET", "/metrics", headers={"Accept": accept})
    answer = client.getresponse()
    assert answer.status == 200, answer.status
    kind, text = answer.getheader("Content-Type") or "", answer.read().decode()
    client.close()
    return text, kind


def samples_of(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get(("lwstwisted_" + name, tuple(sorted(labels.items()))), 0.0)


def request(port: int, method: str, path: str, body: bytes = b"", **fields: str) -> tuple[int, dict[str, str]]:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    client.request(method, path, body, {name.replace("_", "-"): said for name, said in fields.items()})
    answer = client.getresponse()
    answer.read()
    client.close()
    return answer.status, {name.lower(): said for name, said in answer.getheaders()}


def documented() -> dict[str, tuple[str, set[str]]]:
    """Kind and labels of each name in ``docs/metrics.md``."""
    rows = re.findall(r"(?m)^\| `(\w+)` \| (\w+) \| ([^|]*) \|", (TOP / "docs" / "metrics.md").read_text())
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


class Peer:
    """A service in a process of its own."""

    def __init__(self, server: Server) -> None:
        self.server = server
        (metrics,) = server.wait_for(r"ScrapeSite starting on (\d+)")
        self.port, self.metrics = server.wait_for_ports()[0], int(metrics)

    def samples(self) -> Samples:
        return samples_of(scrape(self.metrics)[0])


class PeerTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.stack = ExitStack()
        self.addCleanup(self.stack.close)

    def start(self, *words: str, **environment: str) -> Peer:
        command = [sys.executable, "-m", "lwstwisted", "serve", "--root", str(self.folder / "root")]
        command += ["--listen", "tcp:0", "--metrics", "tcp:0", "--durability", "none", *words]
        return Peer(self.stack.enter_context(serving(command, cwd=self.folder, environment=HERE | environment)))

    def assert_documented(self, text: str) -> set[str]:
        """What is told is as ``docs/metrics.md`` says. Returns the names."""
        names = set()
        lines = [line.rpartition(" ")[0] for line in text.splitlines()]
        self.assertEqual(len(set(lines)), len(lines), "something is told twice")
        for family in text_string_to_metric_families(text):
            if family.name.startswith("process_"):
                continue  # those of prometheus_client
            kind = family.type
            name = f"{family.name}_total" if kind == "counter" else family.name
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            self.assertEqual(documented().get(name), (kind, labels), name)
            names.add(name)
        return names


class TableTests(PeerTestCase):
    """``docs/metrics.md`` and the names in it."""

    def test_names(self) -> None:
        """They follow Prometheus' rules, so that nobody has to look up which unit it is."""
        for name, (kind, labels) in documented().items():
            self.assertRegex(name, r"^lwstwisted_[a-z][a-z_]*[a-z]$")
            self.assertEqual(name.endswith("_total"), kind == "counter", name)
            self.assertNotRegex(name, r"_(ms|milliseconds|minutes|hours|kib|mib|kilobytes|count|sum|bucket)\b")
            self.assertTrue(kind in ("counter", "gauge") or name.endswith("_seconds"), name)
            self.assertFalse(labels & {"le", "pid", "instance", "job"}, name)
        self.assertEqual(set(documented()), {metric.exposed for metric in METRICS.values()})

    def test_both_formats(self) -> None:
        """Also that of OpenMetrics, whose parser is the stricter one."""
        peer = self.start()
        request(peer.port, "PUT", "/files/x", b"body")
        text, _ = scrape(peer.metrics)
        self.assert_documented(text)
        text, kind = scrape(peer.metrics, "application/openmetrics-text; version=1.0.0")
        self.assertIn("openmetrics", kind)
        families = {family.name: family for family in openmetrics_families(text)}
        self.assertEqual(families["lwstwisted_uploads"].type, "counter")
        (sample,) = families["lwstwisted_build_info"].samples
        self.assertEqual(set(sample.labels), {"version"})
        peer.server.end()
        self.assertNotIn("/metrics", peer.server.text)  # four times a minute, for ever
        self.assertIn("/files/x", peer.server.text)

    def test_loopback(self) -> None:
        """Nobody else sees it, unless somebody says so."""
        for said, bound in (
            ("tcp:9100", "tcp:9100:interface=127.0.0.1"),
            ("tcp:9100:interface=0.0.0.0", "tcp:9100:interface=0.0.0.0"),
        ):
            options = Options()
            options.parseOptions(["--metrics", said])
            self.assertEqual(options["metrics"], bound)

    def test_nothing_else_is_there(self) -> None:
        """No uploads where Prometheus asks, and no metrics where clients upload."""
        peer = self.start()
        self.assertEqual(request(peer.metrics, "PUT", "/files/x", b"body")[0], 404)
        self.assertEqual(request(peer.port, "GET", "/metrics")[0], 404)


TUS = {"Tus_Resumable": "1.0.0"}
OFFSETS = "application/offset+octet-stream"


class ResultTests(PeerTestCase):
    """What becomes of uploads, by protocol."""

    def test_results(self) -> None:
        """Each request that brings an upload, or a piece of one, is counted once."""
        peer = self.start("--max-size", "100")
        self.assertEqual(request(peer.port, "PUT", "/files/a", b"body")[0], 201)
        self.assertEqual(request(peer.port, "PUT", "/files/a", b"body")[0], 204)
        self.assertEqual(request(peer.port, "PUT", "/files/b", bytes(101))[0], 413)
        form = b'--x\r\nContent-Disposition: form-data; name="f"; filename="c"\r\n\r\nbody\r\n--x--\r\n'
        fields = {"Content_Type": "multipart/form-data; boundary=x"}
        self.assertEqual(request(peer.port, "POST", "/files/", form, **fields)[0], 201)
        self.assertEqual(request(peer.port, "POST", "/files/", form[:20], **fields)[0], 400)
        status, said = request(peer.port, "POST", "/uploads/", Upload_Length="8", **TUS)
        self.assertEqual(status, 201)
        for offset, expected in ((0, 204), (0, 409), (4, 204)):
            piece = {"Upload_Offset": str(offset), "Content_Type": OFFSETS}
            self.assertEqual(request(peer.port, "PATCH", said["location"], b"body", **piece, **TUS)[0], expected)
        self.assertEqual(request(peer.port, "HEAD", said["location"], **TUS)[0], 200)
        status, said = request(peer.port, "POST", "/uploads/", b"body", Upload_Complete="?0")
        self.assertEqual(status, 201)
        last = {"Upload_Offset": "4", "Upload_Complete": "?1", "Content_Type": "application/partial-upload"}
        self.assertEqual(request(peer.port, "PATCH", said["location"], b"body", **last)[0], 201)
        before = value(peer.samples(), "received_bytes_total")
        with socket.create_connection(("127.0.0.1", peer.port), PATIENCE) as client:
            client.sendall(b"PUT /files/cut HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\nbody")
            wait_until(lambda: value(peer.samples(), "received_bytes_total") > before, "the upload runs")
        cut = {"protocol": "put", "result": "cut"}
        wait_until(lambda: value(peer.samples(), "uploads_total", **cut), "it is noticed that the client left")
        with socket.create_connection(("127.0.0.1", peer.port), PATIENCE) as client:
            client.sendall(b"nonsense\r\n\r\n")
            self.assertIn(b" 400 ", client.recv(1000))
        samples = peer.samples()
        found = {
            tuple(label for _, label in labels): count
            for (name, labels), count in samples.items()
            if name == "lwstwisted_uploads_total"
        }
        self.assertEqual(
            found,
            {
                ("put", "stored"): 2, ("put", "refused_4xx"): 1, ("put", "cut"): 1,
                ("form", "stored"): 1, ("form", "refused_4xx"): 1,
                ("tus", "continued"): 2, ("tus", "refused_4xx"): 1, ("tus", "stored"): 1,
                ("ietf", "continued"): 1, ("ietf", "stored"): 1,
            },
        )
        self.assertEqual(value(samples, "upload_duration_seconds_count", protocol="tus"), 3)
        self.assertEqual(value(samples, "upload_duration_seconds_bucket", protocol="put", le="+Inf"), 2)
        self.assertEqual(value(samples, "requests_total", method="PATCH", code="409"), 1)
        self.assertEqual(value(samples, "refusals_total", code="body_too_large"), 1)
        self.assertEqual(value(samples, "refusals_total", code="offset_mismatch"), 1)
        self.assertEqual(value(samples, "turned_away_total", code="bad_request_line"), 1)
        whole = 4 + 4 + len(form) + 20 + 3 * 4 + 4 + 4
        # Of the refused ones some bytes may have been taken on the way.
        self.assertGreaterEqual(value(samples, "received_bytes_total"), whole - 20 - 4)
        self.assertLessEqual(value(samples, "received_bytes_total"), whole + 101 + 4)

    def test_methods(self) -> None:
        """A client can't make time series by thinking of methods."""
        peer = self.start()
        for method in ("BREW", "PROPFIND", "TRACE", "x-1"):
            request(peer.port, method, "/files/x")
        samples = peer.samples()
        methods = {dict(labels)["method"] for name, labels in samples if name == "lwstwisted_requests_total"}
        self.assertEqual(methods, {"other"})

    def test_bytes_under_way(self) -> None:
        """A long upload is seen before its end, and what was seen is never taken back."""
        peer = self.start()
        with socket.create_connection(("127.0.0.1", peer.port), PATIENCE) as client:
            client.sendall(b"PUT /files/x HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 300000\r\n\r\n")
            client.sendall(bytes(200_000))
            wait_until(lambda: value(peer.samples(), "received_bytes_total") == 200_000, "the bytes are seen")
            samples = peer.samples()
            self.assertEqual(value(samples, "connections"), 1)
            self.assertEqual(value(samples, "waiting_bytes"), 200_000)  # less than is worth a write
            self.assertEqual(value(samples, "promised_bytes"), 300_000)
            client.sendall(bytes(100_000))
            self.assertIn(b" 201 ", client.recv(1000))
            samples = peer.samples()
        self.assertEqual(value(samples, "received_bytes_total"), 300_000)
        self.assertEqual((value(samples, "waiting_bytes"), value(samples, "promised_bytes")), (0, 0))

    def test_root(self) -> None:
        """Disk, and what unfinished uploads hold of it."""
        peer = self.start("--min-free", "7K")
        fields = {"Upload_Length": "2000000", "Content_Type": OFFSETS}
        _, said = request(peer.port, "POST", "/uploads/", bytes(1_000_000), **fields, **TUS)
        samples = peer.samples()
        self.assertEqual(value(samples, "unfinished_uploads"), 1)
        self.assertGreaterEqual(value(samples, "unfinished_bytes"), 1_000_000)
        request(peer.port, "DELETE", said["location"], **TUS)
        disk = os.statvfs(self.folder)
        samples = peer.samples()
        self.assertEqual((value(samples, "unfinished_uploads"), value(samples, "unfinished_bytes")), (0, 0))
        self.assertEqual(value(samples, "disk_min_free_bytes"), 7 * 1024)
        self.assertLess(abs(value(samples, "disk_free_bytes") - disk.f_bavail * disk.f_frsize), 1 << 30)

    def test_certificate(self) -> None:
        """When the certificate in use ends."""
        peer = self.start("--listen", "https:tcp:0")
        pem = (self.folder / "root" / ".lwstwisted" / "development.pem").read_bytes()
        expiry = load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()
        name = "certificate_expiry_timestamp_seconds"
        told = [value for (exposed, _), value in peer.samples().items() if exposed == f"lwstwisted_{name}"]
        self.assertEqual(told, [expiry])

    def test_loop(self) -> None:
        """The turns of our own reactor."""
        peer = self.start()
        text, _ = scrape(peer.metrics)
        names = {METRICS[name].exposed for name in OF_LOOP}
        self.assertEqual(names - self.assert_documented(text), set())
        first = value(samples_of(text), "loop_turns_total")
        self.assertGreater(value(peer.samples(), "loop_turns_total"), first)
        self.assertGreater(value(samples_of(text), "loop_longest_turn_seconds"), 0)


class SeveralProcessesTests(PeerTestCase):
    """Processes that share a folder for their numbers (prometheus_client's multiprocess mode)."""

    def test_together(self) -> None:
        """Any of them tells the sums of all; who is killed keeps what he has counted, and has no connections."""
        shared = self.folder / "numbers"
        shared.mkdir()
        one, other = [self.start(PROMETHEUS_MULTIPROC_DIR=str(shared)) for _ in range(2)]
        for port in (one.port, one.port, other.port):
            request(port, "PUT", "/files/x", b"body")
        kept = socket.create_connection(("127.0.0.1", other.port), PATIENCE)
        self.addCleanup(kept.close)

        def stored() -> float:
            return sum(value(one.samples(), "requests_total", method="PUT", code=code) for code in ("201", "204"))

        wait_until(lambda: stored() == 3, "the other process tells")
        wait_until(lambda: value(one.samples(), "connections") == 1, "its connection is counted")
        text, _ = scrape(one.metrics)
        self.assert_documented(text)
        samples = samples_of(text)
        self.assertEqual(value(samples, "upload_duration_seconds_count", protocol="put"), 3)
        self.assertEqual(value(samples, "upload_duration_seconds_bucket", protocol="put", le="+Inf"), 3)
        self.assertEqual(value(samples, "received_bytes_total"), 12)
        self.assertEqual(value(samples, "build_info", version="0.1.0"), 1)
        other.server.end(signal.SIGKILL)
        mark_process_dead(other.server.process.pid, str(shared))
        samples = one.samples()
        self.assertEqual(stored(), 3)
        self.assertEqual(value(samples, "connections"), 0)

    def test_the_last_second(self) -> None:
        """What a process has counted is not lost when it ends as it should."""
        shared = self.folder / "numbers"
        shared.mkdir()
        one, other = [self.start(PROMETHEUS_MULTIPROC_DIR=str(shared)) for _ in range(2)]
        request(other.port, "PUT", "/files/x", b"body")
        other.server.end()
        self.assertEqual(value(one.samples(), "received_bytes_total"), 4)


class InThisProcessTests(TestCase):
    """What can be seen only with a hand on the disk."""

    timeout = 2 * PATIENCE

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    async def start(self, *words: str) -> tuple[Any, int, int]:
        from twisted.internet import reactor

        options = Options()
        base = ["--root", str(self.folder / "root"), "--listen", "tcp:0", "--metrics", "tcp:0"]
        options.parseOptions([*base, *words])
        made: Any = makeService(options, reactor)
        made.privilegedStartService()
        made.startService()
        self.addCleanup(made.stopService)
        ports = []
        for service in made:
            waiting = getattr(service, "_waitingForPort", None)
            if waiting is not None:
                port = await waiting
                service._waitingForPort = Deferred()
                service._waitingForPort.callback(port)
                ports.append(port.getHost().port)
        return made, ports[0], ports[1]

    async def test_store(self) -> None:
        """A disk that is slow pauses clients; one that fails is counted, and somebody is called."""
        _, port, metrics = await self.start()
        may_write = Event()
        self.addCleanup(may_write.set)
        really: Callable[..., int] = os.pwrite

        def slow(*arguments: Any) -> int:
            may_write.wait(PATIENCE)
            return really(*arguments)

        patch = self.patch(os, "pwrite", slow)
        before = samples_of((await deferToThread(scrape, metrics))[0])
        uploading = deferToThread(request, port, "PUT", "/files/x", bytes(8_000_000))

        def paused() -> bool:
            samples = samples_of(scrape(metrics)[0])
            pauses = [value(one, "pauses_total", reason="consumer") for one in (before, samples)]
            return pauses[1] == pauses[0] + 1 and value(samples, "store_calls") == 1

        await deferToThread(wait_until, paused, "the client is paused")
        samples = samples_of((await deferToThread(scrape, metrics))[0])
        self.assertGreater(value(samples, "waiting_bytes"), 2 * 1024 * 1024)
        self.assertLess(value(samples, "waiting_bytes"), 4 * 1024 * 1024)
        may_write.set()
        self.assertEqual((await uploading)[0], 201)
        patch.restore()

        def broken(descriptor: int) -> None:
            raise OSError(5, "broken")

        patch = self.patch(os, "fsync", broken)
        self.assertEqual((await deferToThread(request, port, "PUT", "/files/x", b"body"))[0], 500)
        patch.restore()
        samples = samples_of((await deferToThread(scrape, metrics))[0])
        self.assertEqual(value(samples, "store_errors_total", code="store_failed"), 1)
        self.assertEqual(value(samples, "store_failed"), 1)
        self.assertEqual(value(samples, "uploads_total", protocol="put", result="failed"), 1)
        self.flushLoggedErrors()

    async def test_ready(self) -> None:
        """A load balancer sends uploads elsewhere while none would be taken here, and when the service stops."""
        made, port, _ = await self.start("--min-free", "8192T")
        self.assertEqual((await deferToThread(request, port, "GET", "/readyz"))[0], 507)
        self.assertEqual((await deferToThread(request, port, "GET", "/healthz"))[0], 200)
        made.is_stopping = True
        self.assertEqual((await deferToThread(request, port, "GET", "/readyz"))[0], 503)


class CostTests(SynchronousTestCase):
    """What it takes."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lwstwisted-")
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.clock = Clock()
        self.site = StreamingSite(Resource(), self.clock)  # type: ignore[no-untyped-call]
        self.store = LocalStore(self.folder, LwsReactor())
        self.addCleanup(lambda: self.store.stop().close())

    def measurements(self, **more: Any) -> Measurements:
        return Measurements(self.site, self.store, self.clock, self.folder, **more)

    def test_lag(self) -> None:
        """A loop that was late is told for a quarter of a minute."""
        made = self.measurements()
        made.startService()

        def lag() -> float:
            return next(value for metric, _, value in made._readings() if metric is METRICS["loop_lag_seconds"])

        self.clock.advance(TICK)
        self.assertEqual(lag(), 0)
        self.clock.advance(TICK + 0.25)
        self.assertEqual(lag(), 0.25)
        for _ in range(14):
            self.clock.advance(TICK)
        self.assertEqual(lag(), 0.25)
        self.clock.advance(TICK)
        self.assertEqual(lag(), 0)
        made.stopService()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_certificates(self) -> None:
        """Of two that have one name the one that ends first is told: Prometheus takes one number for a name."""
        made = self.measurements(certificates=lambda: [("up.example.org", 1.6e9), ("up.example.org", 1.5e9)])
        made.look()
        (family,) = [one for one in made.collect() if one.name == METRICS["certificate_expiry_timestamp_seconds"].name]
        self.assertEqual([(one.labels, one.value) for one in family.samples], [({"name": "up.example.org"}, 1.5e9)])

    def test_buckets(self) -> None:
        """A time on a bound counts as that (``le``), and one above all bounds is in the last bucket."""
        from lwstwisted.metrics import _Durations

        durations = _Durations()
        for seconds in (0.0, BUCKETS[0], BUCKETS[0] + 1e-9, BUCKETS[-1], BUCKETS[-1] + 1):
            durations.add(seconds)
        self.assertEqual(durations.counts[:2] + durations.counts[-2:], [2, 1, 1, 1])

    def test_bytes_once(self) -> None:
        """A request that has its answer, and still gives back what it held, is counted once."""
        made = self.measurements()

        def received() -> float:
            return next(value for metric, _, value in made._readings() if metric is METRICS["received_bytes"])

        one = self.request_over()
        one.is_over = False
        self.site.watch(Deferred(), lambda *_: None, one)
        self.assertEqual(received(), 4096)
        one.is_over = True
        made.request_over(one)
        self.assertEqual(received(), 4096)

    def request_over(self) -> StreamingRequest:
        over = StreamingRequest.__new__(StreamingRequest)
        over.method, over.code, over.upload, over.received = b"PUT", 201, UploadNote("put"), 4096
        over.site = self.site
        return over

    def test_calls(self) -> None:
        """An upload pays for a dozen calls, most of them C: some microseconds."""
        made = self.measurements()
        over = self.request_over()
        made.request_over(over)
        calls = []
        sys.setprofile(lambda frame, event, argument: calls.append((event, frame.f_code.co_name)))
        try:
            made.request_over(over)
        finally:
            sys.setprofile(None)
        began = [name for event, name in calls if event in ("call", "c_call")]
        self.assertLessEqual(len(began), 16, began)

    def test_not_asked_for(self) -> None:
        """Without --metrics nothing is counted, and the library isn't loaded."""
        program = (
            "import sys; from lwstwisted.loop.reactor import install; reactor = install()\n"
            "from lwstwisted.options import Options; from lwstwisted.service import makeService\n"
            "options = Options(); options.parseOptions(['--root', sys.argv[1], '--listen', 'tcp:0'])\n"
            "makeService(options, reactor); print('prometheus_client' in sys.modules)"
        )
        command = [sys.executable, "-c", program, self.folder]
        done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=60)
        self.assertEqual((done.stdout, done.stderr), ("False\n", ""))
