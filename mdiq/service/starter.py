"""The Starter of a topology as a service: a ring that is kept up, its API, and an operator's socket."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

import structlog

from mdiq.api.app import Api
from mdiq.api.server import ApiRunner, listening
from mdiq.config.load import LoadedTopology, load_topology
from mdiq.core.sequence import Sequence
from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.formats.model_source import find_model
from mdiq.engine.model_config import ModelConfig
from mdiq.engine.text.grammar import Grammars
from mdiq.engine.text.tokenizer import Tokenizer
from mdiq.errors import ConfigError, MdiqError
from mdiq.plan.drift import Factors
from mdiq.runtime.admin import AdminServer, socket_path
from mdiq.runtime.lifecycle import Notifier, serve_until_signal, watchdog_loops
from mdiq.runtime.options import RingOptions
from mdiq.runtime.ring_host import RingHost
from mdiq.runtime.ring_keeper import Form, KeeperState, RingKeeper
from mdiq.service.api_files import ApiFiles
from mdiq.service.replanning import Replanning
from mdiq.service.response_journal import ServiceJournal, journal_file
from mdiq.service.ring_backend import RingBackend
from mdiq.service.same_tokens import SameTokens
from mdiq.service.text_pipe import TokenizerPipe
from mdiq.service.topology_rings import TopologyRings
from mdiq.service.topology_values import model_of, remote_nodes

log = structlog.get_logger()

JOIN_S = 24 * 3600.0  # a service waits for its nodes; what it waits for is in its status
TELL_S = 5.0
STOP_S = 25.0  # the unit's TimeoutStopSec is 30


def name_of(path: str) -> str:
    """Return what a model is called after its path: without the ending, and without the number of a part."""
    return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", Path(path).name)


class _Topologies:
    """What the topology file says, read when it is asked for; see RingKeeper."""

    def __init__(
        self, loaded: LoadedTopology, model: Path, config: ModelConfig, threads: int, *, even_split: bool
    ) -> None:
        self._even_split = even_split
        self._first = loaded
        self._rings: TopologyRings | None = None
        self._model = model
        self._config = config
        self._threads = threads
        self.cpus: frozenset[str] = frozenset()  # kinds of the last Ring's

    def read(self) -> Form:
        """Raises ConfigError when the file cannot be used, or changes what only a restart can change."""
        file = self._first.file
        loaded = load_topology(file)
        old, new = self._first.topology, loaded.topology
        for what in ("model.path", "model.name", "api", "journal"):
            value_of = attrgetter(what)
            if value_of(old) != value_of(new):
                raise ConfigError(f"{file}: {what}: a reload does not change it; restart mdiq serve")
        rings = TopologyRings(
            loaded,
            self._model,
            self._config,
            threads=self._threads,
            join_wait_s=JOIN_S,
            even_split=self._even_split,
            on_note=lambda note: log.info("ring_planned", note=note),
            before=self._rings,
        )
        rings.options()  # errors in it are raised now

        def form(drained: frozenset[str]) -> RingOptions:
            options = rings.options(drained)
            self._rings = rings  # it is in use from now on
            return options

        return form

    def prepare(self) -> None:
        """Compute the noise of the file as it is now, which ``read`` needs. It takes seconds: call it in a thread."""
        with contextlib.suppress(MdiqError):  # ``read`` raises it
            topology = load_topology(self._first.file).topology
            remote_nodes(topology, topology.nodes, with_noise=True)

    @property
    def rings(self) -> TopologyRings | None:
        """The Rings of the file as it is now; None before it is read."""
        return self._rings

    async def keep_measured(self, ring: RingHost) -> None:
        """Keep what the Nodes of a Ring measured: see TopologyRings."""
        assert self._rings is not None  # a Ring has been formed
        measured = await ring.measured()
        self.cpus = frozenset(stage.cpu for stage in measured.stages)
        self._rings.keep(measured, is_survey=ring.is_survey)

    def note_failure(self, options: RingOptions, error: MdiqError) -> None:
        """Learn from a Ring that could not be formed: see TopologyRings."""
        assert self._rings is not None  # the keeper has read the file
        self._rings.note_failure(options, error)

    def note_not_changed(self, options: RingOptions) -> None:
        """Learn from a Ring that could not become this one: see TopologyRings."""
        assert self._rings is not None  # the keeper has read the file
        self._rings.note_not_changed(options)


class _LocalRing:
    """A ring of processes of this machine, which is what it is: nothing of it is measured or planned again."""

    rings = None
    cpus: frozenset[str] = frozenset()

    def __init__(self, options: RingOptions) -> None:
        self._options = options

    def read(self) -> Form:
        """Return what gives the same ring each time."""

        def form(drained: frozenset[str]) -> RingOptions:
            if drained:
                raise ConfigError(f"{', '.join(sorted(drained))}: a ring without a topology has no device to drain")
            return self._options

        return form

    def prepare(self) -> None:
        """It has no noise."""

    async def keep_measured(self, _: RingHost) -> None:
        """There is no plan that it could be of use for."""

    def note_failure(self, options: RingOptions, error: MdiqError) -> None:
        """It is formed again as it was."""

    def note_not_changed(self, options: RingOptions) -> None:
        """It never changes."""


class TopologyService:
    """The parts of a Starter's service and their order of starting and ending.

    local_ring: returns the ring of a model where there is no topology, but for its sections model and api.
    """

    def __init__(
        self,
        loaded: LoadedTopology,
        threads: int,
        notifier: Notifier,
        *,
        even_split: bool = False,
        local_ring: Callable[[Path, ModelConfig], RingOptions] | None = None,
    ) -> None:
        """Find the model, and read what of it the service needs before a Ring is up."""
        model = find_model(model_of(loaded), progress=lambda text: notifier.starting(text))
        self._tokenizer = Tokenizer.load(model)
        with open_checkpoint(model) as checkpoint:
            self._config = checkpoint.config
            self._same = SameTokens(checkpoint, self._tokenizer)
            self._journal_file = journal_file(loaded)
            self._digest = checkpoint.digest[:32] if self._journal_file is not None else ""
        self._topologies: _Topologies | _LocalRing
        if local_ring is not None:
            self._topologies = _LocalRing(local_ring(model, self._config))
        else:
            self._topologies = _Topologies(loaded, model, self._config, threads, even_split=even_split)
        named = loaded.topology.model
        self._model_name = named.name or name_of(named.path)  # as clients name it
        self._grammars = Grammars(self._tokenizer)
        if self._tokenizer.eos_token_ids:
            self._grammars.prepare()  # later it would hold up the ring
        self._notifier = notifier
        self._file, self._topology = loaded.file, loaded.topology
        self._wanted_api = loaded.topology.api  # a reload does not change it
        self._api_files = ApiFiles(loaded)

    async def run(self) -> None:
        """Serve until a signal comes."""

        def open_ring(options: RingOptions, on_loading: Callable[[str, int, int], None]) -> RingHost:
            self._same.options = options
            return RingHost(options, make_pipe=self._pipe, on_loading=on_loading, grammars=self._grammars)

        self._keeper = keeper = RingKeeper(
            self._topologies.read,
            open_ring,
            on_state=self._tell,
            on_formed=self._topologies.keep_measured,
            on_not_formed=self._topologies.note_failure,
            on_not_changed=self._topologies.note_not_changed,
        )
        wanted = self._wanted_api
        self._backend = backend = RingBackend(
            keeper,
            self._tokenizer,
            self._grammars,
            self._config,
            self._model_name,
            wanted.max_waiting,
            self._under_load,
            lambda: self._same.mark(self._topologies.cpus, keeper.wanted),
        )
        journal = self._journal(keeper.wanted)
        self._api = Api(
            backend,
            self._api_files.keys,
            cors_origins=wanted.cors_origins,
            allowed_hosts=wanted.allowed_hosts,
            client_timeout_s=wanted.client_timeout_s,
            journal=journal,
        )
        if self._api_files.certificate is not None:
            self._api.registry.register(self._api_files.certificate)
        replanning = Replanning(keeper, lambda: self._topologies.rings)
        commands = {"status": self._status, "drain": self._drain, "reload": self._reload_asked}
        async with (
            AdminServer(socket_path(self._file), commands, self._file),
            self._keeping(journal) as writing,
            self._listening(),
        ):
            watchdog = watchdog_loops(self._notifier, keeper.has_work, keeper.last_progress_s)
            await serve_until_signal(
                keeper.run(),
                notifier=self._notifier,
                drain=keeper.finish,
                drain_s=STOP_S,
                reload=self._reload,
                beside={"telling": self._keep_telling(), "replanning": replanning.run()} | writing | watchdog,
            )
        self._notifier.stopping("ends")

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        wanted, api = self._wanted_api, self._api
        runner = ApiRunner(api.application(), client_timeout_s=wanted.client_timeout_s, on_cut_off=api.note_cut_off)
        certificate = self._api_files.certificate
        scheme, context = ("http", None) if certificate is None else ("https", certificate.context)
        async with listening(runner, self._file, wanted.host, wanted.port, context):
            log.info("api_listens", scheme=scheme, host=wanted.host, port=wanted.port, model=self._model_name)
            yield

    def _journal(self, options: RingOptions) -> ServiceJournal | None:
        if self._journal_file is None:
            return None
        topology, weights = self._topology, options.weights
        about = {
            "the model (by SHA-256)": self._digest,
            "weights": weights.format,
            "dtype": weights.dtype,
            "mode": "exact" if weights.exact else "fast",
            "wire": ",".join(sorted({topology.wire_of(*hop) for hop in topology.hops})),
        }
        return ServiceJournal(self._journal_file, about, setting="journal")

    @contextlib.asynccontextmanager
    async def _keeping(self, journal: ServiceJournal | None) -> AsyncIterator[dict[str, Coroutine[Any, Any, NoReturn]]]:
        """Have the responses of an earlier process before anyone asks; yield the loop that writes them."""
        if journal is None:
            yield {}
            return
        self._api.take_up(await journal.open())
        try:
            yield {"journal": journal.run(self._api.take_up)}
        finally:
            await journal.aclose()

    def _pipe(self, sequence: Sequence) -> TokenizerPipe:
        return self._backend.pipe(sequence)

    def _tell(self, state: KeeperState) -> None:
        self._backend.note_state()
        if state.is_serving:
            self._notifier.ready(state.text)
        else:
            self._notifier.status(state.text)

    async def _keep_telling(self) -> NoReturn:
        # A start that waits for nodes is not stuck: without this the service manager would end it.
        while True:
            if self._keeper.state.is_serving:
                self._tell(self._keeper.state)  # a node that was silent speaks again
            else:
                self._notifier.starting(self._keeper.describe())
            await asyncio.sleep(TELL_S)

    async def _status(self, _: Mapping[str, Any]) -> Any:
        return self._api.status()

    def _under_load(self) -> Factors:
        rings = self._topologies.rings
        return {} if rings is None else rings.under_load()

    async def _drain(self, question: Mapping[str, Any]) -> str:
        return await self._keeper.drain_node(str(question.get("node")), undo=question.get("undo") is True)

    async def _reload_asked(self, _: Mapping[str, Any]) -> str:
        self._notifier.reloading()
        try:
            return await self._reload_all()
        finally:
            self._notifier.reloaded()

    async def _reload(self) -> None:
        log.info("reload_done", result=await self._reload_all())

    async def _reload_all(self) -> str:
        """Read keys and certificate again, then the topology."""
        self._api_files.read_again()
        # Before what may wait for requests: a key that is gone is gone at once.
        self._api.replace_keys(keys := self._api_files.keys)
        # The first noise imports dp-accounting, for which no token should wait.
        await asyncio.to_thread(self._topologies.prepare)
        result = await self._keeper.reload()
        return f"{result}; API keys: {len(keys)}" if keys else result
