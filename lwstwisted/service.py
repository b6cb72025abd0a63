"""The composition root: everything is built, named, started and stopped here.

``twistd lwstwisted`` and ``lwstwisted serve`` both end in :func:`makeService`.
"""

from __future__ import annotations

import gc
import resource
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from lwstwisted.options import Options, on_loopback, with_backlog
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

    :ivar hints: lines for a person that tell how to try the service.
    :ivar others: sites that stop with the first one.
    :ivar is_stopping: whether nothing should be sent here any more.
    """

    def __init__(
        self,
        site: StreamingSite,
        sessions: Sessions,
        store: LocalStore,
        entrance: Entrance,
        contexts: Contexts | None,
        hints: list[str],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._contexts = contexts
        self._site = site
        self._sessions = sessions
        self._store = store
        self._entrance = entrance
        self.hints = hints
        self.is_stopping = False
        self.others: list[StreamingSite] = []

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
        self._sessions.start()
        if self._contexts is not None:
            self._contexts.start(self._site.reactor)
        super().startService()  # type: ignore[no-untyped-call]

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
        if self._contexts is not None:
            self._contexts.stop()
        await maybeDeferred(super().stopService)
        self._entrance.stop()
        for site in (self._site, *self.others):
            await site.stop()
        self._sessions.stop()
        await self._store.stop()


def makeService(options: Options, reactor: Any = None) -> UploadService:
    """Build the service.

    :param options: parsed.
    :param reactor: the global one by default.
    :raises OSError: if the root cannot be used.
    :raises ValueError: if a file of the options can't be understood.
    """
    if reactor is None:
        from twisted.internet import reactor
    store = LocalStore(
        options["root"],
        reactor,
        durability=options["durability"],
        minimum_free=options["min-free"],
        quota=options["quota"],
        stops_with_reactor=False,  # else it would refuse what the uploads under way still have to write
    )
    sessions = Sessions(
        store,
        options["max-size"],
        lifetime=options["upload-lifetime"],
        reactor=reactor,
        path=f"/{UPLOADS_PATH.decode()}/",
        files_path=f"/{FILES_PATH.decode()}/",
        public_url=options["public-url"],
    )
    entrance, origins = entrance_of(options, reactor, network_of, identity_of), options["allowed-origins"]
    root = Paths()  # type: ignore[no-untyped-call]
    root.putChild(b"", redirection(b"/" + FILES_PATH + b"/"))
    root.putChild(FILES_PATH, UploadResource(store, options["max-size"], sessions, origins, entrance))
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
            if not options["listen"]:
                hints = curl_hints(options["port"], paths[0])
        contexts = Contexts(
            paths,
            PROFILES[options["tls-profile"]],
            Path(options["client-ca"]) if options["client-ca"] else None,
            options["client-certificate"] == "required",
            site.acceptableProtocols(),
        )
    service = UploadService(site, sessions, store, entrance, contexts, hints)
    for description in endpoints:
        listening = listening_service(with_backlog(description).removeprefix(HTTPS), site, reactor)
        if contexts is not None and description.startswith(HTTPS):
            listening.endpoint = tls_over(listening.endpoint, contexts, reactor)
        listening.setServiceParent(service)
    if options["metrics"]:
        from lwstwisted.metrics import Measurements, scrape_site

        expiries = contexts.expiries if contexts is not None else tuple
        measurements = Measurements(site, store, reactor, options["root"], options["min-free"], expiries)
        measurements.setServiceParent(service)  # type: ignore[no-untyped-call]
        scraped = scrape_site(measurements, reactor)
        listening_service(with_backlog(options["metrics"]), scraped, reactor).setServiceParent(service)
        service.others.append(scraped)
    return service


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

