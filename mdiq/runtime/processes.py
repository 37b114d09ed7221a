"""Nodes as child processes of the Starter, joined over loopback sockets: the very code that a device runs.

A child holds a pipe from its parent as standard input: the control key comes down it, and its end tells the child that
the parent is gone, however it went.
"""

import asyncio
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence

import structlog
import zmq.asyncio

import mdiq
from mdiq.control.coordinator import Coordinator
from mdiq.core import control
from mdiq.core.types import Epoch, NodeId
from mdiq.core.wire import hop_key
from mdiq.errors import MdiqError, NodeDiedError
from mdiq.runtime.cpu_quota import CpuQuota
from mdiq.runtime.options import NodeFigures, RingOptions
from mdiq.runtime.placement import core_of
from mdiq.telemetry.trace import Span
from mdiq.transport.push_pull import PullSource, PushSink
from mdiq.transport.relay import RelayProcess
from mdiq.transport.router_dealer import RouterServer

log = structlog.get_logger()

LEASE_S = 60.0  # importing torch and loading may starve a child's loop for long on a slow card
DRAIN_S = 1.0
OWN_ERROR = "mdiq: "  # how the command line begins the one line that says why it ends


class ProcessStages:
    """Every Stage but the Starter's, each in a process of its own.

    on_fault: told of Faults; on_lost: told when a Node is gone; on_loading: told (node, done, total).
    """

    def __init__(
        self,
        options: RingOptions,
        *,
        ring_key: bytes,
        model_digest: str,
        on_fault: Callable[[control.Fault], None],
        on_lost: Callable[[MdiqError], None],
        on_loading: Callable[[str, int, int], None],
    ) -> None:
        self._options = options
        self._ring_key = ring_key
        self._model_digest = model_digest
        self._on_fault = on_fault
        self._on_lost = on_lost
        self._on_loading = on_loading
        self._names = [NodeId(f"node-{i}") for i in range(1, options.num_nodes)]
        self._context = zmq.asyncio.Context()
        self._control_key = secrets.token_bytes(32)
        self._children: dict[NodeId, asyncio.subprocess.Process] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._coordinator: Coordinator | None = None
        self._server: RouterServer | None = None
        self._ready: dict[NodeId, control.Ready] = {}
        self._quotas: list[CpuQuota] = []
        self._relays: RelayProcess | None = None
        self._is_closing = False
        self.source: PullSource | None = None
        self.sink: PushSink | None = None

    async def start(self) -> Sequence[control.Ready]:
        """Start the processes and have them load; return what each has, in ring order.

        Raises:
            MdiqError: a port, a process or a model failed; the message names the Node.
        """
        self.source = await PullSource.bind(self._context, _listen(self._options, 0))
        self._server = await RouterServer.bind(self._context, "tcp://127.0.0.1:0")
        self._coordinator = coordinator = Coordinator(
            self._server,
            self._control_key,
            mdiq.__version__,
            self._names,
            clock=time.monotonic,
            lease_s=LEASE_S,
            on_fault=lambda _, fault: self._on_fault(fault),
            on_loading=lambda node, loading: self._on_loading(node, loading.done, loading.total),
            on_lost=self._lost,
        )
        self._tasks.append(asyncio.create_task(coordinator.run(), name="coordinator"))
        for i, node in enumerate(self._names, 1):
            child = await self._spawn(node, i, self._server.endpoint)
            self._children[node] = child
            self._tasks.append(asyncio.create_task(self._watch(node, child), name=f"watch-{node}"))
        hellos = await coordinator.all_joined()
        endpoints = [hellos[node].data_endpoint for node in self._names] + [self.source.endpoint]
        if self._options.link is not None:
            self._relays = await RelayProcess.start(self._options.link, endpoints)
            endpoints = self._relays.endpoints
        self.sink = await PushSink.connect(self._context, endpoints[0])
        assignments = {
            node: self._assignment(i, endpoints[i], is_last=i == len(self._names))
            for i, node in enumerate(self._names, 1)
        }
        ready = await coordinator.assign(assignments)
        self._ready = dict(ready)
        return [ready[node] for node in self._names]

    async def begin(self, epoch: Epoch, wires: Sequence[str]) -> None:
        """Have every Stage serve in a new Epoch; ``wires[i]`` is the format of the Hop out of Stage i.

        Raises:
            MdiqError: a Node is gone.
        """
        assert self._coordinator is not None  # start has run
        await self._coordinator.begin(
            {node: control.Begin(epoch, wire) for node, wire in zip(self._names, wires[1:], strict=True)}
        )

    async def send_burst(self, stage: int, burst: control.SendBurst) -> control.BurstSent:
        """Have a Node measure its Hop; see Coordinator."""
        assert self._coordinator is not None  # start has run
        return await self._coordinator.send_burst(self._names[stage - 1], burst)

    def burst_arrived(self, stage: int, number: int) -> "asyncio.Future[control.BurstArrived]":
        """Return a future of what a Node sees of a burst; see Coordinator."""
        assert self._coordinator is not None  # start has run
        return self._coordinator.burst_arrived(self._names[stage - 1], number)

    async def drain(self) -> None:
        """Ask the processes to end and take their last figures; those that do not answer are killed by ``aclose``."""
        self._is_closing = True
        if self._coordinator is not None:
            await self._coordinator.drain(DRAIN_S)

    def figures(self) -> list[NodeFigures]:
        """Return the newest figures of every Node, in ring order."""
        heartbeats = self._coordinator.heartbeats if self._coordinator else {}
        return [
            NodeFigures(
                name=node,
                layers=layers,
                rss_bytes=beat.rss_bytes,
                weight_bytes=self._ready[node].weight_bytes if node in self._ready else 0,
                busy_s=beat.busy_s,
                waiting_s=beat.waiting_s,
                bytes_in=beat.bytes_in,
                bytes_out=beat.bytes_out,
                dropped=dict(beat.frames_dropped),
            )
            for node, layers in zip(self._names, self._options.layers[1:], strict=True)
            if (beat := heartbeats.get(node)) is not None
        ]

    def spans(self) -> dict[str, list[Span]]:
        """Return the Spans that came in so far, by Node in ring order."""
        return {node: self._coordinator.spans[node] for node in self._names} if self._coordinator else {}

    async def aclose(self) -> None:
        """End every process and close every socket; what does not end by itself is killed."""
        self._is_closing = True
        for child in self._children.values():
            if child.stdin is not None:
                child.stdin.close()  # the child ends when its pipe does
        waits = [asyncio.create_task(child.wait()) for child in self._children.values()]
        if waits:
            await asyncio.wait(waits, timeout=0.3)
        for child in self._children.values():
            if child.returncode is None:
                child.kill()
        await asyncio.gather(*waits)
        for quota in self._quotas:
            quota.close()
        if self._relays is not None:
            await self._relays.aclose()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for part in (self.sink, self.source, self._server):
            if part is not None:
                await part.aclose()
        self._context.term()

    def _assignment(self, i: int, next_endpoint: str, *, is_last: bool) -> control.Assign:
        options, layers = self._options, self._options.layers[i]
        return control.Assign(
            epoch=1,
            layer_start=layers.start,
            layer_stop=layers.stop,
            is_last=is_last,
            next_endpoint=next_endpoint,
            model=str(options.model),
            model_digest=self._model_digest,
            dtype=options.dtype,
            weights=options.weights,
            exact=options.exact,
            wire=options.wire(i) or "",
            device=options.device,
            kv_tokens=options.kv_tokens or 0,
            memory_share=1 / options.num_nodes,
            receive_key=hop_key(self._ring_key, i),
            send_key=hop_key(self._ring_key, 0 if is_last else i + 1),
            trace=options.trace,
        )

    async def _spawn(self, node: NodeId, i: int, control_endpoint: str) -> asyncio.subprocess.Process:
        options = self._options
        command = [sys.executable, "-m", "mdiq", "node", "--name", node, "--control", control_endpoint]
        command += ["--listen", _listen(options, i), "--threads", str(options.threads), "--stdin-key"]
        command += ["--log-level", options.log_level]
        if options.pin:
            command += ["--pin", str(core_of(i))]
        if options.cpu is not None:
            self._quotas.append(CpuQuota.create(node, options.cpu))
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # Its own process group: Ctrl-C reaches the Starter alone, which ends its Nodes in order.
            start_new_session=True,
        )
        assert child.stdin is not None  # PIPE was asked for
        if options.cpu is not None:
            self._quotas[-1].add(child.pid)
        child.stdin.write(self._control_key.hex().encode() + b"\n")
        return child

    async def _watch(self, node: NodeId, child: asyncio.subprocess.Process) -> None:
        last_words = await _forward_errors(child)
        code = await child.wait()
        if not self._is_closing and self._coordinator is not None:
            error = NodeDiedError(f"{node}: {last_words or f'its process ended with {_exit_text(code)}'}")
            self._coordinator.fail(node, error)
            self._lost(node, error)

    def _lost(self, node: NodeId, error: MdiqError) -> None:
        if not self._is_closing:
            log.info("node_lost", node=node, error=str(error))
            self._on_lost(error)


async def _forward_errors(child: asyncio.subprocess.Process) -> str:
    """Pass a child's log on until it ends; return its own error line, which then stands in the Starter's error."""
    assert child.stderr is not None  # PIPE was asked for
    last_words = ""
    while True:
        try:
            line = (await child.stderr.readline()).decode(errors="replace")
        except ValueError:  # longer than the reader's limit, which has dropped it
            continue
        if not line:
            return last_words
        if line.startswith(OWN_ERROR):
            last_words = line.removeprefix(OWN_ERROR).strip()
        else:
            sys.stderr.write(line)
            sys.stderr.flush()


def _listen(options: RingOptions, i: int) -> str:
    return f"tcp://127.0.0.1:{options.base_port + i if options.base_port else 0}"


def _exit_text(code: int) -> str:
    if code == -signal.SIGKILL:
        return "signal 9 (killed; if nobody did, the machine ran out of memory: see the kernel's log)"
    if code < 0:
        return f"signal {-code} ({signal.strsignal(-code)})"
    return f"exit code {code}; look at its log"
