"""What the service tells Prometheus, at an endpoint of its own.

**Counted anyway.** Nearly all of it is read when it is asked for: statistics of reactor and store, tallies of the site.
What has to be noted is noted once for each request, when it is over (:meth:`Measurements.request_over`): two or three
additions. Without ``--metrics`` there isn't even that.

**Several processes.** Where ``PROMETHEUS_MULTIPROC_DIR`` is set before the start, each process writes its numbers there
once a second, into the files of ``prometheus_client``'s multiprocess mode, and whichever of them is asked adds up those
of all. What its counters have counted stays there when a process ends; whoever started it says so to
``prometheus_client.multiprocess.mark_process_dead``, which ends its gauges. Collectors of one's own have no place in
that mode, so their numbers go through its values. What belongs to the root and not to a process (disk, unfinished
uploads, certificates) is looked at by the process that is asked.

The names below are those of ``docs/metrics.md``, and :data:`METRICS` is where both come from.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol

from twisted.application.service import Service
from twisted.web.resource import Resource
from twisted.web.server import Request

from lwstwisted import __version__, errors
from lwstwisted.flow import pauses
from lwstwisted.interfaces import IPendingReads, StoreStatistics
from lwstwisted.uploads.transfer import waiting_bytes
from lwstwisted.web.request import StreamingRequest
from lwstwisted.web.site import StreamingSite

TICK = 1.0
"""Seconds between two looks at how late the loop is, and between two reports of a process to the others."""
LAGS = 15
"""Ticks of which the worst is told: Prometheus looks four times a minute, and once in a while."""

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)
"""Seconds of a small file on a quick disk, up to those of a film on a slow line."""

METHODS = frozenset((b"DELETE", b"GET", b"HEAD", b"OPTIONS", b"PATCH", b"POST", b"PUT"))
"""The methods that are told apart; a client may think of others, and each would be a time series."""

MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"


@dataclass(frozen=True, slots=True)
class Metric:
    """What is told.

    :ivar name: without the suffix ``_total`` that each counter has.
    :ivar kind: ``counter``, ``gauge`` or ``histogram``.
    :ivar help: one sentence.
    :ivar labels: names of its labels.
    :ivar together: what the gauge of several processes is: their ``sum``, ``max`` or ``min``; "" for what is no
        process' own.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    together: str = "sum"

    @property
    def exposed(self) -> str:
        """The name that it has in Prometheus."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


_ALL = (
    Metric(
        "lwstwisted_uploads", "counter",
        "Requests that brought an upload or a piece of one, by protocol (put, form, tus, ietf) and result: stored (it"
        " is a file now), continued (there is more to come), cut (the client left), refused_4xx (the client can mend"
        " it), refused_5xx (no space, no room, or stopping), failed (500).",
        ("protocol", "result"),
    ),
    Metric(
        "lwstwisted_upload_duration_seconds", "histogram",
        "Time of those that were stored or continued, from the end of the head to the answer.", ("protocol",),
    ),
    Metric("lwstwisted_requests", "counter", "Requests that are over, by method and status code; 499: the client left"
           " before there was an answer.", ("method", "code")),
    Metric("lwstwisted_refusals", "counter", "Requests that were refused, by code.", ("code",)),
    Metric("lwstwisted_received_bytes", "counter", "Bytes of request bodies, as they arrive."),
    Metric("lwstwisted_turned_away", "counter", "Connections and requests that were refused outside of any request, by"
           " code.", ("code",)),
    Metric("lwstwisted_pauses", "counter", "Pauses of clients, by reason: consumer (the store is behind), buffered"
           " (the client sends ahead), unread (the client does not read its answers).", ("reason",)),
    Metric("lwstwisted_synthesised_reads", "counter", "Reads of TLS connections that the kernel could not announce."),
    Metric("lwstwisted_loop_turns", "counter", "Turns of the event loop."),
    Metric("lwstwisted_loop_longest_turn_seconds", "gauge", "The longest turn of the event loop since the start.",
           together="max"),
    Metric("lwstwisted_loop_lag_seconds", "gauge", f"How late a timer of the event loop was: the worst of the last"
           f" {LAGS} seconds.", together="max"),
    Metric("lwstwisted_pending_readers", "gauge", "TLS connections that get a turn next without an event."),
    Metric("lwstwisted_parked_readers", "gauge", "TLS connections that are paused with input left."),
    Metric("lwstwisted_connections", "gauge", "Connections of clients."),
    Metric("lwstwisted_requests_under_way", "gauge", "Requests whose body arrives or is being stored."),
    Metric("lwstwisted_waiting_bytes", "gauge", "Bytes of uploads in memory that the store has not taken yet."),
    Metric("lwstwisted_store_calls", "gauge", "Calls of the store that run or wait for a thread."),
    Metric("lwstwisted_store_calls_waiting", "gauge", "Calls of the store that wait for a thread."),
    Metric("lwstwisted_store_errors", "counter", "Calls of the store that failed so that somebody has to look, by"
           " code.", ("code",)),
    Metric("lwstwisted_store_failed", "gauge", "1 if a sync has failed, and nobody should rely on the store.",
           together="max"),
    Metric("lwstwisted_promised_bytes", "gauge", "Bytes of the disk that were promised to uploads under way and are"
           " not taken yet."),
    Metric("lwstwisted_unfinished_uploads", "gauge", "Resumable uploads that are unfinished, whoever holds them.",
           together=""),
    Metric("lwstwisted_unfinished_bytes", "gauge", "Bytes of the disk that they hold.", together=""),
    Metric("lwstwisted_disk_free_bytes", "gauge", "Bytes of the disk that are free, those of --min-free included.",
           together=""),
    Metric("lwstwisted_disk_min_free_bytes", "gauge", "Bytes of the disk that no upload takes (--min-free).",
           together=""),
    Metric("lwstwisted_certificate_expiry_timestamp_seconds", "gauge", "When a certificate ends, by its first name.",
           ("name",), together=""),
    Metric("lwstwisted_build_info", "gauge", "1, with the version.", ("version",), together=""),
)

METRICS: Mapping[str, Metric] = {metric.name.removeprefix("lwstwisted_"): metric for metric in _ALL}

Reading = tuple[Metric, tuple[str, ...], Any]
"""A metric, the values of its labels, and a number; for a histogram the numbers in its buckets, and the sum."""


class _Durations:
    """How long uploads of one protocol took."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds


class MeasuredStore(Protocol):
    """What is asked of a store."""

    @property
    def failure(self) -> OSError | None:
        """See :class:`~lwstwisted.interfaces.Store`."""

    def statistics(self) -> StoreStatistics:
        """What it has met, and what it does."""

    def unfinished(self) -> tuple[int, int]:
        """How many uploads are unfinished, and the bytes that they hold. It blocks."""


class Measurements(Service):
    """What is counted in this process, and what can be looked at.

    :param root: the folder of the store, or any on its disk.
    :param minimum_free: bytes of the disk that no upload takes.
    :param certificates: tells names of certificates in use, and when they end, in seconds since the epoch.
    """

    def __init__(
        self,
        site: StreamingSite,
        store: MeasuredStore,
        reactor: Any,
        root: str | os.PathLike[str],
        minimum_free: int = 0,
        certificates: Callable[[], Iterable[tuple[str, float]]] = tuple,
    ) -> None:
        self._site = site
        self._store = store
        self._reactor = reactor
        self._root = root
        self._minimum_free = minimum_free
        self._certificates = certificates
        self._requests: Counter[tuple[bytes, int]] = Counter()
        self._refusals: Counter[str] = Counter()
        self._uploads: Counter[tuple[str, str]] = Counter()
        self._durations: dict[str, _Durations] = {}
        self._received = 0
        self._lags: deque[float] = deque([0.0], LAGS)
        self._due = 0.0
        self._call: Any = None
        self._published: dict[tuple[str, ...], Any] = {}
        self._read: list[Reading] = []
        self._expiries: dict[str, float] = {}
        self.is_shared = MULTIPROCESS in os.environ

    # What is noted

    def request_over(self, request: Request) -> None:
        """Note a request that is over. Called by the site, for each."""
        self._requests[request.method if request.method in METHODS else b"other", request.code] += 1
        if isinstance(request, StreamingRequest):
            self._received += request.received
            if request.refusal:
                self._refusals[request.refusal] += 1
            if request.upload is not None and request.method not in (b"HEAD", b"GET", b"DELETE"):
                result = result_of(request)
                self._uploads[request.upload.protocol, result] += 1
                if result in ("stored", "continued"):
                    self._durations.setdefault(request.upload.protocol, _Durations()).add(request.seconds())

    def startService(self) -> None:
        """See ``IService``."""
        super().startService()  # type: ignore[no-untyped-call]
        self._site.on_end = self.request_over
        self._wait()

    def stopService(self) -> None:
        """See ``IService``."""
        super().stopService()  # type: ignore[no-untyped-call]
        if self._call is not None:
            self._call.cancel()
            self._call = None
        if self.is_shared:
            self._publish()

    def _wait(self) -> None:
        self._due = self._reactor.seconds() + TICK
        self._call = self._reactor.callLater(TICK, self._tick)

    def _tick(self) -> None:
        self._lags.append(self._reactor.seconds() - self._due)
        if self.is_shared:
            self._publish()
        self._wait()

    # What is read

    def look(self) -> None:
        """Read what belongs to the loop; in its thread."""
        self._read = list(self._readings())
        self._expiries = {}
        for name, expiry in self._certificates():  # of two with one name, the one that ends first
            self._expiries[name] = min(expiry, self._expiries.get(name, inf))
        if self.is_shared:
            self._publish()

    def _readings(self) -> Iterator[Reading]:
        loop = self._reactor.statistics() if IPendingReads.providedBy(self._reactor) else None
        store = self._store.statistics()
        under_way = self._site.requests_under_way
        running = sum(r.received for r in under_way if isinstance(r, StreamingRequest) and not r.is_over)
        for (method, code), count in self._requests.items():
            yield METRICS["requests"], (method.decode(), str(code)), count
        for labels, count in self._uploads.items():
            yield METRICS["uploads"], labels, count
        for protocol, durations in self._durations.items():
            yield METRICS["upload_duration_seconds"], (protocol,), (list(durations.counts), durations.sum)
        for name, of_label in (
            ("refusals", self._refusals),
            ("turned_away", self._site.tally.totals),
            ("pauses", pauses),
            ("store_errors", store.failures),
        ):
            for label, count in of_label.items():
                yield METRICS[name], (label,), count
        numbers: dict[str, float | None] = {
            "received_bytes": self._received + running,
            "connections": len(self._site.channels),
            "requests_under_way": len(under_way),
            "loop_lag_seconds": max(self._lags),
            "waiting_bytes": waiting_bytes(),
            "store_calls": store.calls,
            "store_calls_waiting": store.waiting,
            "store_failed": self._store.failure is not None,
            "promised_bytes": store.promised,
        }
        if loop is not None:
            numbers |= {
                "synthesised_reads": loop.synthesised_reads,
                "loop_turns": loop.turns,
                "loop_longest_turn_seconds": loop.longest_turn,
                "pending_readers": loop.pending,
                "parked_readers": loop.parked,
            }
        for name, number in numbers.items():
            if number is not None:
                yield METRICS[name], (), float(number)

    def _of_root(self) -> Iterator[Reading]:
        """What is no process' own. It blocks."""
        disk = os.statvfs(self._root)
        count, held = self._store.unfinished()
        yield METRICS["unfinished_uploads"], (), count
        yield METRICS["unfinished_bytes"], (), held
        yield METRICS["disk_free_bytes"], (), disk.f_bavail * disk.f_frsize
        yield METRICS["disk_min_free_bytes"], (), self._minimum_free
        yield METRICS["build_info"], (__version__,), 1
        for name, expiry in self._expiries.items():
            yield METRICS["certificate_expiry_timestamp_seconds"], (name,), expiry

    # What is told

    def collect(self) -> Iterator[Any]:
        """See ``prometheus_client.registry.Collector``; called in a thread, behind :meth:`look`."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
        from prometheus_client.utils import floatToGoString

        kinds: dict[str, Any] = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
        kinds["histogram"] = HistogramMetricFamily
        families: dict[str, Any] = {}
        for metric, labels, value in [*(() if self.is_shared else self._read), *self._of_root()]:
            family = families.get(metric.name)
            if family is None:
                family = families[metric.name] = kinds[metric.kind](metric.name, metric.help, labels=metric.labels)
            if metric.kind == "histogram":
                counts, total = value
                bounds = [floatToGoString(bound) for bound in (*BUCKETS, inf)]  # type: ignore[no-untyped-call]
                below = [sum(counts[: at + 1]) for at in range(len(counts))]
                family.add_metric(labels, list(zip(bounds, below, strict=True)), total)
            else:
                family.add_metric(labels, value)
        yield from families.values()

    def _publish(self) -> None:
        """Write what belongs to this process where the others see it."""
        from prometheus_client.utils import floatToGoString

        for metric, labels, value in self._readings():
            if metric.kind == "histogram":
                counts, total = value
                self._put(metric, "_sum", metric.labels, labels, total)
                for bound, count in zip((*BUCKETS, inf), counts, strict=True):
                    below = floatToGoString(bound)  # type: ignore[no-untyped-call]
                    self._put(metric, "_bucket", (*metric.labels, "le"), (*labels, below), count)
            else:
                self._put(metric, "_total" if metric.kind == "counter" else "", metric.labels, labels, value)

    def _put(self, metric: Metric, suffix: str, names: tuple[str, ...], labels: tuple[str, ...], value: float) -> None:
        from prometheus_client.values import ValueClass

        name = metric.name + suffix
        cell = self._published.get((name, *labels))
        if cell is None:
            mode = f"live{metric.together}" if metric.kind == "gauge" else ""
            cell = ValueClass(metric.kind, metric.name, name, names, labels, metric.help, multiprocess_mode=mode)
            self._published[name, *labels] = cell
        cell.set(float(value))


def result_of(request: StreamingRequest) -> str:
    """What became of an upload by a request that is over; see :data:`METRICS`."""
    if request.is_cut or request.refusal == errors.BODY_SHORT.code:
        return "cut"
    code = request.code
    if code >= 500:
        return "failed" if code == 500 else "refused_5xx"
    if code >= 400:
        return "refused_4xx"
    note = request.upload
    return "stored" if note is not None and (note.is_stored or note.protocol in ("put", "form")) else "continued"


def scrape_site(measurements: Measurements, reactor: Any) -> StreamingSite:
    """A site whose ``/metrics`` is for Prometheus."""
    from prometheus_client import CollectorRegistry, ProcessCollector, multiprocess
    from prometheus_client import twisted as resources

    untyped_multiprocess: Any = multiprocess
    untyped_resources: Any = resources
    registry = CollectorRegistry()
    registry.register(measurements)
    if measurements.is_shared:
        untyped_multiprocess.MultiProcessCollector(registry)
    else:
        ProcessCollector(registry=registry)
    root = Resource()
    root.putChild(b"metrics", _Scraped(measurements, untyped_resources.MetricsResource(registry)))
    return _ScrapeSite(root, reactor)


class _Scraped(Resource):
    """Looks at what belongs to the loop, before a thread writes all of it down."""

    isLeaf = True

    def __init__(self, measurements: Measurements, resource: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._measurements = measurements
        self._resource = resource

    def render(self, request: Request) -> int:
        self._measurements.look()
        answer: int = self._resource.render(request)
        return answer


class _ScrapeSite(StreamingSite):
    """Its requests are in no access log: there are four a minute, for ever."""

    def log(self, request: Any) -> None:
        """See ``StreamingSite``."""
