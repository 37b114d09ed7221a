"""One Node as a process: joins over the control channel, loads its layers, serves its Stage until it is drained.

A child of `mdiq run` has the model beside it. A Node of another machine fetches its Layers from the Starter first, and
every socket of it is secured by the topology's keys; see RingPeers.
"""

import asyncio
import os
import secrets
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import structlog
import zmq.asyncio

import mdiq
from mdiq.cache import Use, cache_directory
from mdiq.control.agent import Agent
from mdiq.control.weight_client import Fetched, fetch_weights
from mdiq.control.weight_store import stored_layers
from mdiq.core import control
from mdiq.core.types import LayerRange
from mdiq.core.weights import folder_name
from mdiq.engine.formats.layer_files import LayerFiles
from mdiq.errors import ConfigError, MdiqError, NodeDiedError
from mdiq.runtime.lifecycle import Notifier
from mdiq.runtime.loops import Progress, Supervisor, make_worker
from mdiq.runtime.options import RingPeers
from mdiq.runtime.stage_host import StageHost
from mdiq.runtime.warm_up import StoredLayer, WarmUp
from mdiq.telemetry.trace import Tracer
from mdiq.transport.curve import DATA, ClientSecurity, Gate, ServerSecurity
from mdiq.transport.push_pull import PullSource, PushSink
from mdiq.transport.router_dealer import DealerLink
from mdiq.transport.sockets import listen_endpoint

log = structlog.get_logger()

TELL_S = 10.0


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """How a Node process is started.

    control: the Starter's control endpoint; listen: where this Node takes activations, e.g. tcp://127.0.0.1:0.
    control_key: shared with the Starter; it tags every control message.
    peers: the others, in a Ring over several machines.
    """

    name: str
    control: str
    listen: str
    control_key: bytes
    threads: int = 1
    peers: RingPeers | None = None


class NodeProcess:
    """The parts of a Node and their order of starting and ending.

    worker: computes; for a watchdog. is_assigned: whether a Starter has told this Node what to load. has_served:
    whether the Ring began; one that only measures its Nodes does not.
    """

    def __init__(self, options: NodeOptions, notifier: Notifier | None = None) -> None:
        self._options = options
        self._peers = options.peers
        self._notifier = notifier or Notifier(None)
        self._clock = time.monotonic
        self._tracer = Tracer(is_on=False)
        self.worker = make_worker(self._clock, self._tracer, options.threads)
        self.is_assigned = self.has_served = False
        self._waits_for = "the starter"  # or for nothing
        self._gate: Gate | None = None
        self._loops = Supervisor(self._on_failed)
        self._hops = Supervisor(self._on_failed)  # of the assignment that counts now
        self._is_serving = False
        self._failed: asyncio.Future[MdiqError] | None = None
        self._previous = ""  # the Node before this one; unknown before the assignment
        self._layers = ""
        self._num_links = 0
        self._stage = StageHost(self.worker, is_rationed=self._peers is not None)
        self._warm_up = WarmUp(self._stage, is_idle=lambda: not self.is_assigned, max_bytes=self._memory_bytes)
        self._loaded: tuple[control.Assign, control.Ready] | None = None
        self._ahead_in_use: Use | None = None  # while it is held, nobody makes room of what was fetched ahead
        self._sink: PushSink | None = None
        self._next_key: str | None = None  # of the Node that it sends to, as it was when they were connected
        self._source: PullSource | None = None
        self._agent: Agent | None = None

    async def run(self) -> None:
        """Serve until the Starter drains this Node.

        Raises:
            MdiqError: the port or the model cannot be used, or a loop failed.
        """
        link: DealerLink | None = None
        self._context = zmq.asyncio.Context()
        self._failed = failed = asyncio.get_running_loop().create_future()
        self._loops.run(self._tell_what_it_waits_for(), "telling")
        self._loops.run(self._warm_up.run(), "warm up")
        try:
            self._source = source = await self._open_source()
            link = await self._connect_control()
            hello = control.Hello(self._options.name, source.endpoint, os.getpid(), mdiq.__version__)
            self._agent = Agent(
                link,
                self._options.control_key,
                hello,
                load=self._load,
                send_burst=self._stage.send_burst,
                begin=self._begin,
                fetch=self._fetch_ahead,
                stand_by=self._stand_by,
                heartbeat=self._stage.heartbeat,
                spans=lambda: self._tracer.spans,
            )
            await self._until_drained(self._agent, failed)
        finally:
            await self._loops.aclose()
            await self._hops.aclose()
            for part in (self._sink, self._source, link, self._gate):
                if part is not None:
                    await part.aclose()
            await self.worker.aclose()
            self._context.term()
            self._stage.free()

    async def ask_to_leave(self) -> bool:
        """Ask the Starter to drain this Node when what is in the Ring has ended; return whether that will happen."""
        return self._agent is not None and self.has_served and await self._agent.leaving()

    async def leave(self) -> None:
        """Tell the Starter, if this Node is in its Ring, that it ends at once because it was told to here."""
        if self._agent is not None and self.is_assigned:
            await self._agent.leave(NodeDiedError("it was stopped on its device"))

    async def renew(self, options: NodeOptions) -> None:
        """Take over, in the midst of a Ring, who may send to this Node: whose key is revoked loses its connection."""
        if self._peers is not None and options.peers is not None:
            self._peers = options.peers
            await self._admit()

    async def _admit(self) -> None:
        """Let in the Node before this one; while it is unknown, every Node of the topology."""
        if self._gate is not None and self._peers is not None:
            nodes = [node for node in self._peers.nodes if self._previous in ("", node.name)]
            await self._gate.replace(DATA, {node.public_key or "": node.name for node in nodes})

    async def _open_source(self) -> PullSource:
        options, peers = self._options, self._peers
        if peers is None:
            return await PullSource.bind(self._context, options.listen)
        entrance: ServerSecurity | None = None
        if peers.secret is not None:
            self._gate = gate = Gate(self._context)
            gate.start()
            await self._admit()
            self._loops.run(gate.run(), "gate")
            entrance = ServerSecurity(peers.secret, DATA, gate)
        return await PullSource.bind(
            self._context, listen_endpoint(options.listen), security=entrance, insecure=peers.insecure
        )

    async def _connect_control(self) -> DealerLink:
        options = self._options
        if self._peers is None:
            return await DealerLink.connect(self._context, options.control, identity=options.name)
        return await self._connect_to_starter(self._peers, options.control)

    async def _connect_to_starter(self, peers: RingPeers, endpoint: str) -> DealerLink:
        # Another identity each time: nothing that was meant for an earlier link arrives on this one.
        self._num_links += 1
        return await DealerLink.connect(
            self._context,
            endpoint,
            identity=f"{self._options.name}/{self._num_links}-{secrets.token_hex(4)}",
            security=self._client_security(peers.nodes[0].public_key),
            insecure=peers.insecure,
        )

    def _client_security(self, public_key: str | None) -> ClientSecurity | None:
        secret = self._peers.secret if self._peers else None
        return None if secret is None else ClientSecurity(secret, public_key or "")

    async def _tell_what_it_waits_for(self) -> NoReturn:
        while True:
            # Waiting is no start that stands still; loading tells of its own progress.
            if self._waits_for:
                self._notifier.starting(f"waits for {self._waits_for}")
            await asyncio.sleep(TELL_S)

    async def _until_drained(self, agent: Agent, failed: "asyncio.Future[MdiqError]") -> None:
        """Run the agent; a loop that fails ends the Node with its error."""
        obeying = asyncio.create_task(agent.run(), name="agent")
        try:
            waited_for: set[asyncio.Future[Any]] = {obeying, failed}
            await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                if self._peers is not None:
                    await agent.leave(failed.result())  # nobody watches this process for the Starter
                raise failed.result()
            obeying.result()
        finally:
            obeying.cancel()
            await asyncio.gather(obeying, return_exceptions=True)

    def _on_failed(self, error: MdiqError) -> None:
        if self._failed is not None and not self._failed.done():
            self._failed.set_result(error)

    async def _load(self, assign: control.Assign) -> control.Ready:
        agent, source = self._agent, self._source
        if self._loaded is not None:
            before, ready = self._loaded
            like_it = replace(assign, epoch=before.epoch, kv_tokens=before.kv_tokens, measures=before.measures)
            if like_it == before and assign.kv_tokens <= ready.kv_tokens:  # the link was down, and all is still there
                return replace(ready, epoch=assign.epoch, on_disk=await self._on_disk(assign))
        assert agent is not None and source is not None  # an Agent calls this
        await self._stop_serving()
        layers = LayerRange(assign.layer_start, assign.layer_stop)
        self._layers = f"layers {layers.start}-{layers.stop - 1}"
        self.is_assigned, self._waits_for = True, ""
        if self._peers is not None and assign.previous:
            self._peers.check_name(assign.previous)
        self._previous = assign.previous
        await self._admit()
        self._tracer.is_on = assign.trace
        model: LayerFiles | Path | None = Path(assign.model)
        if self._peers is not None:
            model = await self._fetch(self._peers, layers, assign) if self._stage.lacks(assign) else None
        ready = await self._stage.load(
            assign,
            model,
            memory_bytes=self._memory_bytes(),
            on_loading=partial(self._progress, "loading"),
            on_measuring=lambda: self._notifier.starting(f"measures {self._layers}"),
        )
        ready = replace(ready, on_disk=await self._on_disk(assign))
        self._waits_for = "the others of the ring"
        self._loaded = assign, ready
        if assign.measures:  # the Hops too, before the first Epoch; else the next Node may not let this one in yet
            await self._serve()
        log.info("stage_ready", epoch=assign.epoch, layers=str(layers), kv_tokens=ready.kv_tokens)
        return ready

    async def _serve(self) -> None:
        """Serve as the newest assignment says."""
        assert self._loaded is not None and self._agent is not None and self._source is not None  # it was loaded
        assign, _ = self._loaded
        self._sink = await self._connect_hop(assign.next_endpoint)
        self._hops = Supervisor(self._on_failed)
        self._hops.run(self._stage.serve(assign, self._source, self._sink, self._agent), "stage")
        self._is_serving = True

    async def _stop_serving(self) -> None:
        """End what served an earlier assignment; Frames that still come are of an Epoch that is over."""
        self._loaded = None
        await self._disconnect()

    async def _disconnect(self) -> None:
        """Serve nothing until ``_serve`` connects the Hop to the next Node anew."""
        self._is_serving = False
        await self._hops.aclose()
        if self._sink is not None:
            await self._sink.aclose()
            self._sink = None

    def _memory_bytes(self) -> int | None:
        """Return the most that this process may take, by the topology."""
        if self._peers is None:
            return None
        return next((node.memory_bytes for node in self._peers.nodes if node.name == self._options.name), None)

    async def _fetch(self, peers: RingPeers, layers: LayerRange, assign: control.Assign) -> LayerFiles:
        """Return this machine's files of the Layers, fetched now where it lacks some."""
        self._progress("fetching", 0, 0)
        progress = partial(self._progress, "fetching")
        fetched = await self._fetched(peers, assign.model_digest, assign.weights.format, layers, progress)
        log.info(
            "weights_here",
            layers_fetched=fetched.num_fetched,
            num_bytes=fetched.num_bytes,
            layers_mended=fetched.num_mended,
        )
        return await asyncio.to_thread(LayerFiles, fetched.paths, fetched.in_use)

    async def _fetch_ahead(self, fetch: control.Fetch) -> control.Fetched:
        """Bring Layers to this machine that it may have to load later; what it does meanwhile goes on."""
        layers = LayerRange(fetch.layer_start, fetch.layer_stop)
        error = ""
        try:
            if self._peers is None:
                raise ConfigError("this node has the model beside it")
            fetched = await self._fetched(
                self._peers, fetch.model_digest, fetch.weights.format, layers, self._tell_starter
            )
            self._ahead_in_use = fetched.in_use
            log.info("standby_layers_here", layers=str(layers), num_bytes=fetched.num_bytes)
            stored = [
                StoredLayer(path, layer, fetch.model_digest, fetch.weights, fetched.in_use)
                for layer, path in fetched.paths.items()
            ]
            self._warm_up.want(*stored)
        except MdiqError as raised:
            error = str(raised)
            log.warning("layers_not_fetched", layers=str(layers), error=error)
        on_disk = await asyncio.to_thread(stored_layers, _folder(fetch.model_digest, fetch.weights.format))
        return control.Fetched(fetch.number, on_disk, error)

    def _tell_starter(self, done: int, total: int) -> None:
        if self._agent is not None:
            self._agent.loading(done, total)

    async def _on_disk(self, assign: control.Assign) -> tuple[int, ...]:
        """Return the Layers of a model that this machine has fetched."""
        if self._peers is None:
            return ()
        return await asyncio.to_thread(stored_layers, _folder(assign.model_digest, assign.weights.format))

    async def _fetched(
        self, peers: RingPeers, digest: str, weight_format: str, layers: LayerRange, progress: Progress
    ) -> Fetched:
        return await fetch_weights(
            lambda: self._connect_to_starter(peers, peers.weights_endpoint),
            _folder(digest, weight_format),
            digest,
            layers,
            clock=self._clock,
            progress=progress,
        )

    def _progress(self, what: str, done: int, total: int) -> None:
        share = f": {100 * done // total} %" if total else ""
        self._notifier.starting(f"{what} {self._layers}{share}")
        self._tell_starter(done, total)

    async def _connect_hop(self, endpoint: str) -> PushSink:
        if self._peers is None:
            return await PushSink.connect(self._context, endpoint)
        self._next_key = self._peers.public_key(endpoint)
        security = self._client_security(self._next_key)
        return await PushSink.connect(self._context, endpoint, security=security, insecure=self._peers.insecure)

    def _is_next_rekeyed(self) -> bool:
        """Whether the Node that this one sends to has another key now than the connection expects."""
        if self._peers is None or self._loaded is None:
            return False
        keys = {node.data_endpoint: node.public_key for node in self._peers.nodes}
        return keys.get(self._loaded[0].next_endpoint, self._next_key) != self._next_key

    async def _begin(self, begin: control.Begin) -> control.Begun:
        if self._is_serving and (begin.reconnects or self._is_next_rekeyed()):
            await self._disconnect()
        if self._loaded is not None and not self._is_serving:
            await self._serve()
        begun = await self._stage.begin(begin)
        self._waits_for, self.has_served = "", True
        self._notifier.ready(f"serves {self._layers}")
        return begun

    async def _stand_by(self, message: control.StandBy) -> None:
        """Have no Layers any more, if there were some: the Ring goes without this Node."""
        self.is_assigned = self.has_served = False
        self._waits_for = self._previous = ""
        await self._stop_serving()
        await self.worker.run_uncounted(self._stage.free)  # in its turn: a Batch may still run
        await self._admit()
        self._warm_up.want()
        self._notifier.ready(f"stands by: {message.reason}")
        log.info("stands_by", reason=message.reason)


def _folder(digest: str, weight_format: str) -> Path:
    """Return where this device keeps the files of a model's Layers."""
    return cache_directory() / "weights" / folder_name(digest, weight_format)
