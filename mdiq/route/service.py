"""A router as a service: the servers of its file, the one address, and an operator's socket."""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import structlog

from mdiq.api.certificate import Certificate
from mdiq.api.keys import ApiKey, read_keys
from mdiq.api.server import ApiRunner, listening
from mdiq.api.tls import TlsFiles
from mdiq.config.routes import LoadedRoutes, RouteServer, load_routes
from mdiq.errors import ConfigError
from mdiq.route.app import RouteApi
from mdiq.route.links import Link
from mdiq.route.pool import Pool
from mdiq.route.servers import State
from mdiq.runtime.admin import AdminServer, socket_path
from mdiq.runtime.lifecycle import Notifier, serve_until_signal, watchdog_loops

log = structlog.get_logger()

STOP_S = 25.0  # the unit's TimeoutStopSec is 30
TELL_S = 5.0
DRAIN_S = 600.0
MAX_KEY_BYTES = 4_096


class Secrets(NamedTuple):
    """What a server is asked with. ca: what ca_file holds. tls: what checks its certificate; None: it has no https."""

    key: str | None
    ca: bytes
    tls: ssl.SSLContext | None


class RouteService:
    """The parts of a router's service and their order of starting and ending.

    Raises:
        ConfigError: a file that it needs cannot be used.
    """

    def __init__(self, loaded: LoadedRoutes, notifier: Notifier) -> None:
        self._loaded, self._notifier = loaded, notifier
        self._secrets = {each.name: secrets_of(loaded, each) for each in loaded.routes.servers}
        self._keys = keys_of(loaded)
        self._certificate = certificate_of(loaded)
        self._watching: dict[str, asyncio.Task[NoReturn]] = {}

    async def run(self) -> None:
        """Serve until a signal comes."""
        routes = self._loaded.routes
        self._pool = Pool(routes.outage_tolerance_s)
        if self._certificate is not None:
            self._pool.figures.registry.register(self._certificate)
        self._api = RouteApi(
            self._pool,
            self._keys,
            max_requests=routes.max_requests,
            cors_origins=routes.api.cors_origins,
            allowed_hosts=routes.api.allowed_hosts,
            client_timeout_s=routes.api.client_timeout_s,
        )
        commands = {"status": self._status, "drain": self._drain, "reload": self._reload_asked}
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(AdminServer(socket_path(self._loaded.file), commands, self._loaded.file))
            stack.push_async_callback(self._close_links)
            self._group = await stack.enter_async_context(asyncio.TaskGroup())
            stack.callback(self._end_tasks)
            for server in routes.servers:
                self._open(server)
            await stack.enter_async_context(self._listening())
            self._notifier.ready(self._pool.state)
            await serve_until_signal(
                self._tell(),
                notifier=self._notifier,
                drain=self._until_idle,
                drain_s=STOP_S,
                reload=self._reload,
                beside=watchdog_loops(self._notifier, lambda: False, lambda: 0.0),
            )
        self._notifier.stopping("ends")

    async def _tell(self) -> None:
        while True:
            self._notifier.status(self._pool.state)
            await self._pool.news(TELL_S)

    async def _until_idle(self) -> None:
        while self._api.num_open:
            await self._pool.news(0.2)

    @asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        wanted = self._loaded.routes.api
        runner = ApiRunner(self._api.application(), client_timeout_s=wanted.client_timeout_s)
        context = None if self._certificate is None else self._certificate.context
        async with listening(runner, self._loaded.file, wanted.host, wanted.port, context):
            log.info("route_listens", host=wanted.host, port=wanted.port, servers=list(self._pool.links))
            yield

    # Servers that come and go

    def _open(self, wanted: RouteServer) -> None:
        key, _, tls = self._secrets[wanted.name]
        silence_s = self._loaded.routes.silence_s
        passes_keys = wanted.pass_keys
        link = Link(wanted.name, wanted.url, key, tls, silence_s, self._pool.changed, passes_keys=passes_keys)
        link.server.is_drained = wanted.drained
        self._pool.links[wanted.name] = link
        self._pool.figures.known(wanted.name)
        self._watching[wanted.name] = self._group.create_task(link.watch(), name=f"watch {wanted.name}")

    async def _retire(self, link: Link, watching: "asyncio.Task[NoReturn]") -> None:
        """Let what a server has come to its end."""
        while link.server.num_running:
            await self._pool.news(1.0)
        watching.cancel()
        await link.aclose()

    def _end_tasks(self) -> None:
        for watching in self._watching.values():
            watching.cancel()

    async def _close_links(self) -> None:
        for link in self._pool.links.values():
            await link.aclose()

    # What an operator asks

    async def _status(self, _: Mapping[str, Any]) -> Any:
        return self._api.status()

    async def _drain(self, question: Mapping[str, Any]) -> str:
        name, undo = str(question.get("node")), question.get("undo") is True
        link = self._pool.links.get(name)
        if link is None:
            raise ConfigError(f"{name}: no server of {self._loaded.file}; these are: {', '.join(self._pool.links)}")
        link.server.is_drained = not undo
        self._pool.tell()
        if undo:
            return f"{name} gets requests again"
        loop = asyncio.get_running_loop()
        end_s = loop.time() + DRAIN_S
        while link.server.num_running and link.server.is_drained:
            if loop.time() >= end_s:
                return f"{name} gets no new requests; {link.server.num_running} are still running there"
            await self._pool.news(0.5)
        text = f"{name} is drained: it gets no new requests, and none of this router's clients waits for one there"
        if not (num_others := link.server.num_all) or link.server.state not in (State.SERVES, State.WAITS):
            return text
        return f"{text}; {num_others} still run there, in the background or for others"

    async def _reload_asked(self, _: Mapping[str, Any]) -> str:
        self._notifier.reloading()
        try:
            return self._reload_all()
        finally:
            self._notifier.reloaded()

    async def _reload(self) -> None:
        log.info("reload_done", result=self._reload_all())

    def _reload_all(self) -> str:
        """Take over what the file says now; what runs goes on.

        Raises:
            ConfigError: it cannot be used, or changes what only a restart can change; nothing has changed.
        """
        loaded = load_routes(self._loaded.file)
        old, new = self._loaded.routes, loaded.routes
        if old.api != new.api:
            raise ConfigError(f"{loaded.file}: api: a reload does not change it; restart mdiq route")
        keys = keys_of(loaded)
        secrets = {each.name: secrets_of(loaded, each) for each in new.servers}
        if self._certificate is not None:
            self._certificate.read_again()
        self._api.replace_keys(keys)
        self._api.max_requests, self._pool.outage_tolerance_s = new.max_requests, new.outage_tolerance_s
        before = {each.name: (each, *self._secrets[each.name][:2]) for each in old.servers}
        now = {each.name: (each, *secrets[each.name][:2]) for each in new.servers}
        self._loaded, self._secrets = loaded, secrets
        urls = {each.name: each.url for each in new.servers}
        gone = [each.name for each in old.servers if each.url != urls.get(each.name)]
        come = [name for name in now if name in gone or name not in before]
        changed = [name for name in now if now[name] != before.get(name)]
        drained = {name for name in gone if self._pool.links[name].server.is_drained}
        for name in gone:
            self._group.create_task(self._retire(self._pool.links.pop(name), self._watching.pop(name)), name="retire")
        for server in new.servers:
            if server.name in come:
                self._open(server)
                self._pool.links[server.name].server.is_drained |= server.name in drained
            else:
                key, _, tls = secrets[server.name]
                link = self._pool.links[server.name]
                link.take_over(key, tls, new.silence_s, passes_keys=server.pass_keys)
            if server.name in before and before[server.name][0].drained != server.drained:
                self._pool.links[server.name].server.is_drained = server.drained
        self._pool.links = {each.name: self._pool.links[each.name] for each in new.servers}
        self._pool.tell()
        return f"{len(new.servers)} servers; new or changed: {', '.join(changed) or 'none'}"


def certificate_of(loaded: LoadedRoutes) -> Certificate | None:
    """Return the router's own certificate; None: it serves without TLS.

    Raises:
        ConfigError: a file cannot be used.
    """
    api = loaded.routes.api
    if api.tls_cert is None or api.tls_key is None:
        return None
    return Certificate(TlsFiles(loaded.path(api.tls_cert), loaded.path(api.tls_key)))


def keys_of(loaded: LoadedRoutes) -> list[ApiKey]:
    """Return the keys of the router's clients.

    Raises:
        ConfigError: their file cannot be used.
    """
    file = loaded.routes.api.keys_file
    return [] if file is None else read_keys(loaded.path(file))


def secrets_of(loaded: LoadedRoutes, server: RouteServer) -> Secrets:
    """Return the key that a server gets, and what its certificate is checked with, as their files are now.

    Raises:
        ConfigError: a file cannot be used.
    """
    key = None if server.key_file is None else read_key(loaded.path(server.key_file), server.name)
    if not server.url.startswith("https:"):
        return Secrets(key, b"", None)
    if server.ca_file is None:
        return Secrets(key, b"", ssl.create_default_context())
    file = loaded.path(server.ca_file)
    try:
        ca = file.read_bytes()  # first: a change in between is seen the next time
        return Secrets(key, ca, ssl.create_default_context(cafile=file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{file}: {error.strerror or error}; ca_file of {server.name} names it, in PEM") from None


def read_key(file: Path, server: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the key in a file, or in systemd's credential SERVER.key if there is one.

    Raises:
        ConfigError: it cannot be read, others can read it, or it is no key.
    """
    is_credential = False
    if directory := environ.get("CREDENTIALS_DIRECTORY"):
        credential = Path(directory, f"{server}.key")
        is_credential = credential.exists()
        file = credential if is_credential else file
    try:
        mode = file.stat().st_mode
        with file.open("rb") as stream:
            data = stream.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; key_file of {server} names it, and it holds one key") from None
    if mode & 0o077 and not is_credential:
        raise ConfigError(f"{file}: others can read it; run chmod 600 {file}")
    text = data.decode("ascii", errors="replace").strip()
    if not text.isprintable() or not text.isascii() or " " in text or not 1 <= len(text) <= MAX_KEY_BYTES:
        raise ConfigError(f"{file}: it holds no key; write into it the one that mdiq api-key has shown for {server}")
    return text
