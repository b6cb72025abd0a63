"""The composition root: everything is built, named, started and stopped here.

``twistd lwstwisted`` and ``lwstwisted serve`` both end in :func:`makeService`.
"""

from __future__ import annotations

import gc
import os
import resource
import shlex
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, cast

from twisted.application.service import MultiService
from twisted.application.strports import service as listening_service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.selectreactor import SelectReactor
from twisted.logger import Logger
from twisted.web.server import Request

from lwstwisted import errors
from lwstwisted.access.building import entrance_of
from lwstwisted.access.entrance import Entrance
from lwstwisted.certificate import ensure_development_certificate
from lwstwisted.errors import Refused
from lwstwisted.hooks.building import telling_of
from lwstwisted.hooks.telling import Telling
from lwstwisted.options import Options, on_loopback, with_backlog
from lwstwisted.running.lifecycle import Lifecycle
from lwstwisted.running.notify import Notifier
from lwstwisted.running.sockets import Inheriting, inherited
from lwstwisted.running.worker import WORKER
from lwstwisted.running.workers import Workers, watch_parent
from lwstwisted.stores.local import LocalStore
from lwstwisted.stores.names import STATE_FOLDER
from lwstwisted.tls.clients import identity_of
from lwstwisted.tls.contexts import Contexts
from lwstwisted.tls.listening import tls_over
from lwstwisted.tls.options import HTTPS
from lwstwisted.tls.profiles import PROFILES
from lwstwisted.uploads.openapi import describe, published
from lwstwisted.uploads.resource import UploadResource
from lwstwisted.uploads.resumable import ResumableResource
from lwstwisted.uploads.session import Sessions
from lwstwisted.web.accesslog import combined_log, json_log
from lwstwisted.web.limits import Limits
from lwstwisted.web.plain import Paths, ReadOnly, redirection, send_content
from lwstwisted.web.site import LINGERING, StreamingSite, network_of

FILES_PATH = b"files"
"""Where the files are: ``/files/…``."""
UPLOADS_PATH = b"uploads"
"""Where the resumable uploads under way are: ``/uploads/…``."""

OWN_DESCRIPTORS = 64 + LINGERING
"""Of the reactor, the listeners, the store with a folder for each of its threads, and of clients that are turned away.
Each other client has three at most: a socket, a file, and the folder of a form."""

SELECTABLE = 1024
"""Descriptors that select(2) can wait for."""

_log = Logger()

STOP_TIME = 45.0
"""Seconds that the end may take when all requests are over: longer than the store waits for a lock."""

LOG_FORMATTERS = {"combined": combined_log, "json": json_log}


def within_descriptors(limits: Limits, reactor: Any) -> Limits:
    """Take no more connections than there are descriptors for: where they run out, uploads under way would fail.

    The limit of this process is raised as far as it may be.
    """
    now, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(hard, SELECTABLE) if isinstance(reactor, SelectReactor) else hard
    if now < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return replace(limits, connections=max(1, min(limits.connections, (most - OWN_DESCRIPTORS) // 3)))


class UploadService(MultiService):
    """Listeners, site, uploads under way and store; waits for each when it stops.

    :param drain_time: seconds that requests under way may take to end when it stops.
    :ivar hints: lines for a person that tell how to try the service.
    :ivar others: sites that stop with the first one.
    :ivar is_stopping: whether nothing should be sent here any more.
    :ivar lifecycle: its signals, and what is reloaded.
    """

    def __init__(
        self,
        site: StreamingSite,
        sessions: Sessions,
        store: LocalStore,
        entrance: Entrance,
        contexts: Contexts | None,
        telling: Telling | None,
        hints: list[str],
        reactor: Any,
        notifier: Notifier,
        drain_time: float,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._contexts = contexts
        self._site = site
        self._sessions = sessions
        self._store = store
        self._entrance = entrance
        self._drain_time = drain_time
        self._telling = telling
        self.hints = hints
        self.is_stopping = False
        self.others: list[StreamingSite] = []
        # What reaches a whole group of processes is the parent's to tell its workers.
        signals = {signal.SIGINT: lambda: None} if WORKER in os.environ else None
        self.lifecycle = Lifecycle(reactor, notifier, self._status, self._hasten, signals)
        self.lifecycle.reloads += [self.reload, self.reopen_logs]

    def reopen_logs(self) -> None:
        """Go on in a new access log, if somebody has moved the old one away."""
        try:
            self._site.reopen_log()
        except OSError as error:
            _log.error("the access log stays as it is: {error}", error=error)

    def startService(self) -> None:
        """See ``IService``. What is there now stays, and the garbage collector need not look at it again and again.

        All modules together are 50,000 objects. To look at them stops the loop for 10 to 40 ms.
        """
        gc.collect()
        gc.freeze()
        if self._telling is not None:
            self._telling.start()
        self._sessions.start()
        if self._contexts is not None:
            self._contexts.start(self._site.reactor)
        super().startService()  # type: ignore[no-untyped-call]
        self.lifecycle.start()

    def stopService(self) -> Deferred[None]:
        """See ``IService``."""
        self.is_stopping = True
        gc.unfreeze()
        return Deferred.fromCoroutine(self._stop())

    def reload(self) -> None:
        """Read certificates again, as on SIGHUP."""
        if self._contexts is not None:
            self._contexts.reload()

    async def _stop(self) -> None:
        self.lifecycle.stopping(self._drain_time + STOP_TIME)
        self._site.doStart()  # type: ignore[no-untyped-call]  # else its log would be closed with the last listener
        await maybeDeferred(super().stopService)
        await self._site.drain(self._drain_time)
        self._entrance.stop()
        if self._contexts is not None:
            self._contexts.stop()
        for site in (self._site, *self.others):
            await site.stop()
        self._site.doStop()  # type: ignore[no-untyped-call]
        self._sessions.stop()
        await self._store.stop()
        if self._telling is not None:
            await self._telling.stop()
        self.lifecycle.stop()

    def _hasten(self) -> None:
        self._drain_time = 0.0
        self._site.hasten()

    def _status(self) -> str:
        doing = f"{len(self._site.channels)} connections, {len(self._site.requests_under_way)} requests under way"
        return f"the disk has failed: {doing}" if self._store.failure is not None else doing


def makeService(options: Options, reactor: Any = None) -> UploadService | Workers:
    """Build the service, or the parent of several that are the same service.

    :param options: parsed.
    :param reactor: the global one by default.
    :raises OSError: if the root cannot be used.
    :raises ValueError: if a file of the options can't be understood.
    """
    if reactor is None:
        from twisted.internet import reactor
    notifier = Notifier.from_environment()
    is_worker = WORKER in os.environ
    if options["workers"] > 1 and not is_worker:
        # What is wrong with the root is told here, and once.
        Deferred.fromCoroutine(LocalStore(options["root"], reactor, stops_with_reactor=False).stop())
        listened, is_measured = listeners(options), bool(options["metrics"])
        return Workers(
            reactor, notifier, options.words, listened, options["workers"], options["drain-time"], is_measured
        )
    store = LocalStore(
        options["root"],
        reactor,
        durability=options["durability"],
        minimum_free=options["min-free"],
        quota=options["quota"],
        stops_with_reactor=False,  # else it would refuse what the uploads under way still have to write
    )
    # When the store has undone what crashes have left, and before anything is served.
    telling = telling_of(options["hooks"], Path(options["root"]), reactor)
    sessions = Sessions(
        store,
        options["max-size"],
        lifetime=options["upload-lifetime"],
        reactor=reactor,
        path=f"/{UPLOADS_PATH.decode()}/",
        files_path=f"/{FILES_PATH.decode()}/",
        public_url=options["public-url"],
        events=telling,
    )
    entrance, origins = entrance_of(options, reactor, network_of, identity_of), options["allowed-origins"]
    root = Paths()  # type: ignore[no-untyped-call]
    root.putChild(b"", redirection(b"/" + FILES_PATH + b"/"))
    root.putChild(FILES_PATH, UploadResource(store, options["max-size"], sessions, origins, entrance, telling))
    root.putChild(UPLOADS_PATH, ResumableResource(sessions, origins, entrance))
    document = describe(
        f"/{FILES_PATH.decode()}/", options["max-size"], options["limits"], f"/{UPLOADS_PATH.decode()}/"
    )
    root.putChild(b"openapi.json", published(document))
    root.putChild(b"healthz", ReadOnly(lambda request: send_content(request, b"text/plain", b"alive\n")))
    root.putChild(b"readyz", ReadOnly(lambda request: send_readiness(request, store, service)))
    site = StreamingSite(
        root,
        reactor,
        within_descriptors(options["limits"], reactor),
        options["trusted-proxies"],
        logPath=options["access-log"],
        logFormatter=LOG_FORMATTERS[options["access-log-format"]],
    )
    contexts, hints = None, []
    endpoints = options["listen"] or [default_endpoint(options["port"])]
    if any(description.startswith(HTTPS) for description in endpoints):
        paths = [Path(path) for path in options["certificates"]]
        if not paths:
            paths = [ensure_development_certificate(Path(options["root"]) / STATE_FOLDER / "development.pem")]
            if not options["listen"] and os.environ.get(WORKER, "1") == "1":
                hints = curl_hints(options["port"], paths[0])
        contexts = Contexts(
            paths,
            PROFILES[options["tls-profile"]],
            Path(options["client-ca"]) if options["client-ca"] else None,
            options["client-certificate"] == "required",
            site.acceptableProtocols(),
        )
    service = UploadService(
        site, sessions, store, entrance, contexts, telling, hints, reactor, notifier, options["drain-time"]
    )
    inheriting, numbers = Inheriting(reactor, is_worker), count()

    def listen(description: str, factory: Any) -> Any:
        here = with_backlog(description).removeprefix(HTTPS)
        here = inherited(here, next(numbers)) if is_worker else here
        return listening_service(here, factory, cast(Any, inheriting))

    for description in endpoints:
        listening = listen(description, site)
        if contexts is not None and description.startswith(HTTPS):
            listening.endpoint = tls_over(listening.endpoint, contexts, reactor)
        listening.setServiceParent(service)
    if options["metrics"]:
        from lwstwisted.metrics import Measurements, scrape_site

        expiries = contexts.expiries if contexts is not None else tuple
        measurements = Measurements(site, store, reactor, options["root"], options["min-free"], expiries)
        measurements.setServiceParent(service)  # type: ignore[no-untyped-call]
        scraped = scrape_site(measurements, reactor)
        listen(options["metrics"], scraped).setServiceParent(service)
        service.others.append(scraped)
    if is_worker:
        watch_parent(reactor)
    return service


def listeners(options: Options) -> list[str]:
    """Descriptions of all endpoints that are listened on, in this order; without what TLS has in front of them."""
    endpoints = options["listen"] or [default_endpoint(options["port"])]
    measured = [options["metrics"]] if options["metrics"] else []
    return [with_backlog(description).removeprefix(HTTPS) for description in (*endpoints, *measured)]


def send_readiness(request: Request, store: LocalStore, service: UploadService) -> None:
    """Answer 200 while uploads should be sent here.

    :raises Refused: ``NOT_READY``; ``STOPPING``; ``DISK_FULL`` if no upload would be taken.
    """
    if store.failure is not None:
        raise Refused(errors.NOT_READY)
    if service.is_stopping:
        raise Refused(errors.STOPPING)
    if not store.has_room:
        raise Refused(errors.DISK_FULL)
    send_content(request, b"text/plain", b"ready\n")


def default_endpoint(port: int) -> str:
    """The endpoint that is listened on where no other is named."""
    return on_loopback(f"{HTTPS}tcp:{port}")


def curl_hints(port: int, certificate: Path) -> list[str]:
    """Commands that upload a file and fetch it back."""
    trusted = shlex.quote(str(certificate))
    url = f"https://127.0.0.1:{port}/{FILES_PATH.decode()}"
    return [
        f"upload: curl --cacert {trusted} -T FILE {url}/",
        f"fetch:  curl --cacert {trusted} -O {url}/FILE",
    ]

