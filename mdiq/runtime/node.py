"""One Node as a process: joins over the control channel, loads its layers, serves its Stage until it is drained."""

import asyncio
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
import zmq.asyncio

import mdiq
from mdiq.control.agent import Agent
from mdiq.core import control
from mdiq.core.stage import NO_EPOCH, StageProtocol
from mdiq.core.types import Epoch, LayerRange
from mdiq.engine.device import rss_bytes
from mdiq.engine.measure import measure_cost
from mdiq.engine.runner import StageRunner
from mdiq.errors import LocalProtocolError
from mdiq.runtime.engine_worker import make_worker, wire_limits
from mdiq.runtime.stage_service import StageService
from mdiq.telemetry.trace import Tracer
from mdiq.transport.push_pull import PullSource, PushSink
from mdiq.transport.router_dealer import DealerLink

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """How a Node process is started.

    control: the Starter's control endpoint; listen: where this Node takes activations, e.g. tcp://127.0.0.1:0.
    control_key: shared with the Starter; it tags every control message.
    """

    name: str
    control: str
    listen: str
    control_key: bytes
    threads: int = 1


class NodeProcess:
    """The parts of a Node and their order of starting and ending."""

    def __init__(self, options: NodeOptions) -> None:
        self._options = options
        self._clock = time.monotonic
        self._tracer = Tracer(is_on=False)
        self._worker = make_worker(self._clock, self._tracer, options.threads)
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
        try:
            self._source = await PullSource.bind(self._context, self._options.listen)
            link = await DealerLink.connect(self._context, self._options.control, identity=self._options.name)
            hello = control.Hello(self._options.name, self._source.endpoint, os.getpid(), mdiq.__version__)
            self._agent = Agent(
                link,
                self._options.control_key,
                hello,
                load=self._load,
                send_burst=self._send_burst,
                begin=self._begin,
                heartbeat=self._heartbeat,
                spans=lambda: self._tracer.spans,
            )
            await self._until_drained(self._agent)
        finally:
            if self._serving is not None:
                self._serving.cancel()
                await asyncio.gather(self._serving, return_exceptions=True)
            for part in (self._sink, self._source, link):
                if part is not None:
                    await part.aclose()
            self._worker.close()
            self._context.term()

    async def _until_drained(self, agent: Agent) -> None:
        """Run the agent; a loop of the Stage that fails ends the Node with its error."""
        obeying = asyncio.create_task(agent.run(), name="agent")
        try:
            while not obeying.done():
                waited_for = {obeying} if self._serving is None else {obeying, self._serving}
                # The Stage begins to serve while the agent obeys: look again when it does.
                done, _ = await asyncio.wait(waited_for, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
                if self._serving in done and self._serving is not None:
                    self._serving.result()
            obeying.result()
        finally:
            obeying.cancel()
            await asyncio.gather(obeying, return_exceptions=True)

    async def _load(self, assign: control.Assign) -> control.Ready:
        if self._serving is not None or self._agent is None or self._source is None:
            raise LocalProtocolError("assign: this version loads once; restart the node")
        agent, loop = self._agent, asyncio.get_running_loop()
        layers = LayerRange(assign.layer_start, assign.layer_stop)
        self._tracer.is_on = assign.trace
        runner = await self._worker.run_uncounted(
            partial(
                StageRunner.load,
                Path(assign.model),
                layers,
                is_last=assign.is_last,
                owns_embedding_and_head=False,
                dtype=assign.dtype,
                device=assign.device,
                kv_tokens=assign.kv_tokens or None,
                weights=assign.weights,
                exact=assign.exact,
                wire=assign.wire,
                memory_share=assign.memory_share,
                digest=assign.model_digest,
                progress=lambda done, total: loop.call_soon_threadsafe(agent.loading, done, total),
            )
        )
        cost = await self._worker.run_uncounted(partial(measure_cost, runner))
        self._runner = runner
        self._sink = await PushSink.connect(self._context, assign.next_endpoint)
        self._worker.reset_meter()
        self._stage.assign(Epoch(assign.epoch), is_last=assign.is_last)
        self._is_last = assign.is_last
        self._service = StageService(
            self._stage,
            runner,
            self._source,
            self._sink,
            receive_key=assign.receive_key,
            send_key=assign.send_key,
            limits=wire_limits(runner),
            worker=self._worker,
            clock=self._clock,
            tracer=self._tracer,
            report_gaps=agent.gaps,
            report_failure=agent.failure,
            report_burst=agent.burst_arrived,
        )
        self._serving = asyncio.create_task(self._service.run(), name="stage")
        log.info("stage_ready", epoch=assign.epoch, layers=str(layers), kv_tokens=runner.kv_capacity_tokens)
        return control.Ready(
            epoch=assign.epoch,
            kv_tokens=runner.kv_capacity_tokens,
            weight_bytes=runner.weight_bytes,
            kv_bytes_per_token=runner.kv_bytes_per_token,
            rss_bytes=rss_bytes(),
            decode_s=cost.decode.points,
            prompt_s=cost.prompt.points,
        )

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
        await self._worker.run_uncounted(runner.reset)
        self._worker.reset_meter()
        self._tracer.clear()
        self._bytes_before = self._source.bytes_in, self._sink.bytes_out
        log.info("epoch_began", epoch=begin.epoch, wire=begin.wire)
        return control.Begun(begin.epoch)

    def _heartbeat(self) -> control.Heartbeat:
        meter, (bytes_in, bytes_out) = self._worker.meter, self._bytes_before
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
