"""One Node as a process: joins over the control channel, loads its layers, serves its Stage until it is drained.

A child of `mdiq run` has the model beside it. A Node of another machine fetches its Layers from the Starter first, and
every socket of it is secured by the topology's keys; see RingPeers.
"""

import asyncio
import os
import secrets
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
import zmq.asyncio

import mdiq
from mdiq.cache import cache_directory
from mdiq.control.agent import Agent
from mdiq.control.weight_client import fetch_weights
from mdiq.core import control
from mdiq.core.stage import NO_EPOCH, StageProtocol
from mdiq.core.types import Epoch, LayerRange
from mdiq.core.weights import folder_name
from mdiq.engine.device import choose_device, free_bytes, kind_of
from mdiq.engine.formats.layer_files import LayerFiles
from mdiq.engine.kept_cost import kept_cost
from mdiq.engine.measure import SUSTAINED_S, measure_cost
from mdiq.engine.memory import peak_bytes, reset_peak, rss_bytes
from mdiq.engine.runner import StageRunner
from mdiq.errors import EngineError, LocalProtocolError, MdiqError, RingError, TransportError, first_of
from mdiq.runtime.lifecycle import Notifier
from mdiq.runtime.loops import make_worker
from mdiq.runtime.options import RingPeers
from mdiq.runtime.stage_service import StageService
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
        self._guarding: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._previous = ""  # the Node before this one; unknown before the assignment
        self._layers = ""
        self._num_links = 0
        self._stage = StageProtocol()
        self._runner: StageRunner | None = None
        self._sink: PushSink | None = None
        self._serving: asyncio.Task[None] | None = None
        self._context = zmq.asyncio.Context()
        self._source: PullSource | None = None
        self._agent: Agent | None = None
        self._service: StageService | None = None
        self._is_last = False
        self._bytes_before = (0, 0)  # in and out, when this Node began to serve

    async def run(self) -> None:
        """Serve until the Starter drains this Node.

        Raises:
            MdiqError: the port or the model cannot be used, or a loop failed.
        """
        link: DealerLink | None = None
        self._telling = asyncio.create_task(self._tell_what_it_waits_for(), name="telling")
        try:
            self._source, link = await self._open_links()
            hello = control.Hello(self._options.name, self._source.endpoint, os.getpid(), mdiq.__version__)
            self._agent = Agent(
                link,
                self._options.control_key,
                hello,
                load=self._load,
                send_burst=self._send_burst,
                begin=self._begin,
                stand_by=self._stand_by,
                heartbeat=self._heartbeat,
                spans=lambda: self._tracer.spans,
            )
            await self._until_drained(self._agent)
        finally:
            tasks = [task for task in (self._telling, self._serving, self._guarding) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for part in (self._sink, self._source, link, self._gate):
                if part is not None:
                    await part.aclose()
            await self.worker.aclose()
            self._context.term()
            self._runner = self._service = self._serving = None

    async def ask_to_leave(self) -> bool:
        """Ask the Starter to drain this Node when what is in the Ring has ended; return whether that will happen."""
        return self._agent is not None and self.has_served and await self._agent.leaving()

    async def leave(self) -> None:
        """Tell the Starter, if this Node is in its Ring, that it ends at once because it was told to here."""
        if self._agent is not None and self.is_assigned:
            await self._agent.leave(RingError("it was stopped on its device"))

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

    async def _open_links(self) -> tuple[PullSource, DealerLink]:
        options, peers = self._options, self._peers
        if peers is None:
            source = await PullSource.bind(self._context, options.listen)
            return source, await DealerLink.connect(self._context, options.control, identity=options.name)
        entrance: ServerSecurity | None = None
        if peers.secret is not None:
            self._gate = gate = Gate(self._context)
            gate.start()
            await self._admit()
            self._guarding = asyncio.create_task(_guard(gate), name="gate")
            entrance = ServerSecurity(peers.secret, DATA, gate)
        source = await PullSource.bind(
            self._context, listen_endpoint(options.listen), security=entrance, insecure=peers.insecure
        )
        try:
            return source, await self._connect_to_starter(peers, options.control)
        except BaseException:
            await source.aclose()
            raise

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

    async def _tell_what_it_waits_for(self) -> None:
        while True:
            # Waiting is no start that stands still; loading tells of its own progress.
            if self._waits_for:
                self._notifier.starting(f"waits for {self._waits_for}")
            await asyncio.sleep(TELL_S)

    async def _until_drained(self, agent: Agent) -> None:
        """Run the agent; a loop of the Stage that fails ends the Node with its error."""
        obeying = asyncio.create_task(agent.run(), name="agent")
        try:
            while not obeying.done():
                loops = {task for task in (self._telling, self._serving, self._guarding) if task is not None}
                # The Stage begins to serve while the agent obeys: look again when it does.
                done, _ = await asyncio.wait({obeying, *loops}, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
                for ended in done & loops:
                    error = first_of(ended.exception() or EngineError("a loop of the node has ended; see its log"))
                    if self._peers is not None and isinstance(error, MdiqError):
                        await agent.leave(error)  # nobody watches this process for the Starter
                    ended.result()
            obeying.result()
        finally:
            obeying.cancel()
            await asyncio.gather(obeying, return_exceptions=True)

    async def _load(self, assign: control.Assign) -> control.Ready:
        if self._serving is not None or self._agent is None or self._source is None:
            raise LocalProtocolError("assign: this version loads once; restart the node")
        agent = self._agent
        layers = LayerRange(assign.layer_start, assign.layer_stop)
        self._layers = f"layers {layers.start}-{layers.stop - 1}"
        self.is_assigned, self._waits_for = True, ""
        if self._peers is not None and assign.previous:
            self._peers.check_name(assign.previous)
        self._previous = assign.previous
        await self._admit()
        self._tracer.is_on = assign.trace
        model = await self._fetch(self._peers, layers, assign) if self._peers else Path(assign.model)
        load = partial(
            StageRunner.load,
            model,
            layers,
            is_last=assign.is_last,
            owns_embedding_and_head=False,
            kv_tokens=assign.kv_tokens or None,
            weights=assign.weights,
            wire=assign.wire,
            memory_share=assign.memory_share,
            memory_bytes=self._memory_bytes(),
            digest=assign.model_digest,
        )
        can_peak = reset_peak()
        runner = await self.worker.run_long(
            lambda progress: load(progress=progress), partial(self._progress, "loading")
        )
        measure = partial(measure_cost, min_s=SUSTAINED_S) if self._peers else kept_cost
        cost = await self.worker.run_long(
            lambda progress: measure(runner, progress=progress),
            lambda *_: self._notifier.starting(f"measures {self._layers}"),
        )
        self._runner = runner
        self._sink = await self._connect_hop(assign.next_endpoint)
        self.worker.reset_meter()
        self._stage.assign(Epoch(assign.epoch), is_last=assign.is_last)
        self._is_last = assign.is_last
        self._service = StageService(
            self._stage,
            runner,
            self._source,
            self._sink,
            receive_key=assign.receive_key,
            send_key=assign.send_key,
            limits=runner.wire_limits,
            worker=self.worker,
            clock=self._clock,
            tracer=self._tracer,
            report_gaps=agent.gaps,
            report_failure=agent.failure,
            report_burst=agent.burst_arrived,
        )
        self._serving = asyncio.create_task(self._service.run(), name="stage")
        self._waits_for = "the others of the ring"
        log.info("stage_ready", epoch=assign.epoch, layers=str(layers), kv_tokens=runner.kv_capacity_tokens)
        return control.Ready(
            epoch=assign.epoch,
            kv_tokens=runner.kv_capacity_tokens,
            weight_bytes=runner.weight_bytes,
            kv_bytes_per_token=runner.kv_bytes_per_token,
            rss_bytes=rss_bytes(),
            decode_s=cost.decode.points,
            prompt_s=cost.prompt.points,
            free_bytes=free_bytes(choose_device(assign.weights.device)),
            peak_bytes=peak_bytes() if can_peak else 0,
            cpu=kind_of(choose_device(assign.weights.device)),
        )

    def _memory_bytes(self) -> int | None:
        """Return the most that this process may take, by the topology."""
        if self._peers is None:
            return None
        return next((node.memory_bytes for node in self._peers.nodes if node.name == self._options.name), None)

    async def _fetch(self, peers: RingPeers, layers: LayerRange, assign: control.Assign) -> LayerFiles:
        """Return this machine's files of the Layers, fetched now where it lacks some."""
        self._progress("fetching", 0, 0)
        fetched = await fetch_weights(
            lambda: self._connect_to_starter(peers, peers.weights_endpoint),
            cache_directory() / "weights" / folder_name(assign.model_digest, assign.weights.format),
            assign.model_digest,
            layers,
            clock=self._clock,
            progress=partial(self._progress, "fetching"),
        )
        log.info(
            "weights_here",
            layers_fetched=fetched.num_fetched,
            num_bytes=fetched.num_bytes,
            layers_mended=fetched.num_mended,
        )
        return LayerFiles(fetched.paths, fetched.in_use)

    def _progress(self, what: str, done: int, total: int) -> None:
        share = f": {100 * done // total} %" if total else ""
        self._notifier.starting(f"{what} {self._layers}{share}")
        if self._agent is not None:
            self._agent.loading(done, total)

    async def _connect_hop(self, endpoint: str) -> PushSink:
        if self._peers is None:
            return await PushSink.connect(self._context, endpoint)
        security = self._client_security(self._peers.public_key(endpoint))
        return await PushSink.connect(self._context, endpoint, security=security, insecure=self._peers.insecure)

    async def _send_burst(self, burst: control.SendBurst) -> control.BurstSent:
        if self._service is None:
            raise LocalProtocolError("burst: there is no hop before an assignment; restart the ring")
        return control.BurstSent(burst.epoch, burst.number, await self._service.send_burst(burst))

    async def _begin(self, begin: control.Begin) -> control.Begun:
        runner = self._runner
        if runner is None or self._source is None or self._sink is None:
            raise LocalProtocolError("begin: there is nothing to serve before an assignment; restart the ring")
        self._stage.assign(Epoch(begin.epoch), is_last=self._is_last)
        runner.set_wire(begin.wire)
        # In the worker's turn: a Batch of the old Epoch may still run.
        await self.worker.run_uncounted(runner.reset)
        self.worker.reset_meter()
        self._tracer.clear()
        self._bytes_before = self._source.bytes_in, self._sink.bytes_out
        self._waits_for, self.has_served = "", True
        self._notifier.ready(f"serves {self._layers}")
        log.info("epoch_began", epoch=begin.epoch, wire=begin.wire)
        return control.Begun(begin.epoch)

    def _stand_by(self, reason: str) -> None:
        if self.is_assigned:
            return  # it is in the Ring
        self._waits_for = ""
        self._notifier.ready(f"stands by: {reason}")
        log.info("stands_by", reason=reason)

    def _heartbeat(self) -> control.Heartbeat:
        meter, (bytes_in, bytes_out) = self.worker.meter, self._bytes_before
        return control.Heartbeat(
            epoch=self._stage.epoch or NO_EPOCH,
            rss_bytes=rss_bytes(),
            busy_s=meter.busy_s,
            waiting_s=meter.waiting_s,
            bytes_in=self._source.bytes_in - bytes_in if self._source else 0,
            bytes_out=self._sink.bytes_out - bytes_out if self._sink else 0,
            frames_dropped=dict(meter.dropped),
            kv_tokens_in_use=self._runner.kv_tokens_in_use if self._runner else 0,
            queue_depth=self._stage.num_waiting,
        )


async def _guard(gate: Gate) -> None:
    """Answer for keys; without that nobody is let in, so the Ring ends and the next one has a new Gate."""
    try:
        await gate.run()
    except Exception as error:
        raise TransportError(f"its gate failed, and lets nobody in any more: {error!r}; see its log") from error
