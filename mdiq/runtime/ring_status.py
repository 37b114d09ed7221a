"""What an operator sees of a Ring that is kept up: how its requests end, what its Nodes do, and what it waits for.

Forming the Ring, and forming it again, is for ring_keeper.py.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from mdiq.control.standby import left_out_text
from mdiq.core.exposure import Exposure
from mdiq.core.hop_survey import HopLink
from mdiq.core.sequence import Sequence
from mdiq.errors import CapacityError, ConfigError, MdiqError
from mdiq.plan.privacy import total_epsilon
from mdiq.runtime.loops import Worker
from mdiq.runtime.options import HopFigures, NodeFigures, PaceFigures, RingOptions
from mdiq.runtime.recovery_times import RecoveryTimes
from mdiq.runtime.starter_service import StarterService, StreamEvent

SILENT_S = 5.0  # heartbeats of five seconds that a Node owes, and the Ring does not serve any more


class KeptRing(Protocol):
    """What is asked of a Ring; RingHost is one."""

    @property
    def options(self) -> RingOptions: ...
    @property
    def missing(self) -> list[str]: ...
    @property
    def idle_here(self) -> list[str]: ...
    @property
    def is_paused(self) -> bool: ...
    @property
    def at_hand(self) -> Mapping[str, frozenset[int]]: ...
    @property
    def pauses(self) -> Collection[RecoveryTimes]: ...
    @property
    def hop_trouble(self) -> str: ...
    @property
    def worker(self) -> Worker: ...
    @property
    def service(self) -> StarterService: ...
    @property
    def context_tokens(self) -> int: ...
    async def __aenter__(self) -> Any: ...
    async def aclose(self) -> None: ...
    def silent(self, min_s: float) -> Mapping[str, float]: ...
    def can_change_to(self, options: RingOptions) -> bool: ...
    async def change(self, options: RingOptions) -> None: ...
    async def replace_members(self, like: RingOptions) -> None: ...
    def give_way(self) -> None: ...
    async def go_without(self, name: str) -> bool: ...
    async def until_lost(self) -> MdiqError: ...
    async def until_leaving(self) -> str: ...
    async def until_staying(self) -> None: ...
    def stream(self, sequence: Sequence) -> AsyncGenerator[StreamEvent, None]: ...
    def figures(self) -> list[NodeFigures]: ...
    def hops(self) -> list[HopFigures]: ...
    async def measure_hops(self) -> tuple[HopLink | None, ...]: ...
    def pace(self) -> PaceFigures: ...


@dataclass(frozen=True, slots=True)
class KeeperState:
    """Whether Sequences are taken, and what an operator reads of it."""

    is_serving: bool
    text: str


class Turns:
    """One change of the Ring at a time. give_way: called when an operator wants one while another is under way."""

    def __init__(self, give_way: Callable[[], None]) -> None:
        self.lock = asyncio.Lock()
        self._give_way = give_way

    async def __aenter__(self) -> None:
        if self.lock.locked():
            self._give_way()
        await self.lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        self.lock.release()


class Requests:
    """Counts requests: those that run, and how the others ended. num_taken: of both. quiet: set while none runs."""

    def __init__(self) -> None:
        self.num_taken = 0
        self.quiet = asyncio.Event()
        self.quiet.set()
        self._ended = {"done": 0, "failed": 0, "refused": 0, "left": 0}

    @property
    def num_running(self) -> int:
        """Requests that have not ended."""
        return self.num_taken - sum(self._ended.values())

    def begun(self) -> None:
        """Count a request in."""
        self.num_taken += 1
        self.quiet.clear()

    def ended(self, error: Exception | None, *, is_done: bool) -> None:
        """Count a request out. is_done: it came to its end; else its caller has left it, unless there is an error."""
        if isinstance(error, CapacityError | ConfigError):
            how = "refused"
        elif error is not None:
            how = "failed"
        else:
            how = "done" if is_done else "left"
        self._ended[how] += 1
        if not self.num_running:
            self.quiet.set()

    async def until_idle(self, idle_s: float) -> None:
        """Wait until none has run for so long."""
        while True:
            await self.quiet.wait()
            num_taken = self.num_taken
            await asyncio.sleep(idle_s)
            if self.num_taken == num_taken:
                return

    def counts(self) -> dict[str, int]:
        """Return how many run, and how many ended in which way."""
        return {"running": self.num_running, **self._ended}


@dataclass(slots=True)
class RingView:
    """A Ring from its opening to its end. ring: None before and after, when only the plan is known.

    planned: what it was to be when it was opened.

    loading: how much of its Layers each Node has, (done, total). is_formed: it can serve; a survey never does, since
    it has no pace and no Hops to show, and its KV cache is not the Ring's.
    """

    planned: RingOptions
    ring: KeptRing | None = None
    loading: dict[str, tuple[int, int]] = field(default_factory=dict)
    is_formed: bool = False
    serving_since_s: float = 0.0

    @property
    def options(self) -> RingOptions:
        """What the Ring is now: other Nodes may have taken over."""
        return self.planned if self.ring is None else self.ring.options

    @property
    def formed(self) -> KeptRing | None:
        """The Ring, if it is formed."""
        return self.ring if self.is_formed else None

    @property
    def num_waiting(self) -> int:
        """Requests without a place in the Ring, also those that were put back."""
        if self.formed is None:
            return 0
        ring = self.formed.service.ring
        return ring.num_unfinished - ring.num_live

    def changed_text(self, wanted: RingOptions, done: str = "", not_yet: str = "") -> str:
        """Return in words what has become of a change: it waits where Nodes of the wanted Ring are not here.

        done, not_yet: what comes before that.
        """
        if self.formed is None or {*wanted.node_names} <= {*self.options.node_names}:
            return f"{done}the ring is formed with {names_of(wanted)}"
        waits = f"until all of {names_of(wanted)} are here"
        return f"{not_yet}the ring goes on with {names_of(self.options)} {waits}"

    def give_way(self) -> None:
        """Have a change that only gets ready be given up, if there is one."""
        if self.formed is not None:
            self.formed.give_way()

    def silent(self) -> Mapping[str, float]:
        """Return the Nodes that should have been heard, and for how long they were not."""
        return {} if self.ring is None else self.ring.silent(SILENT_S)

    def degraded(self) -> str:
        """Return in words why a Ring that is not paused does not serve either; empty if it does."""
        if silent := self.silent():
            names = ", ".join(f"{name} (silent for {silent_s:.0f} s)" for name, silent_s in silent.items())
            return f"degraded: waits for {names}"
        trouble = "" if self.ring is None else self.ring.hop_trouble
        return f"degraded: {trouble}" if trouble else ""

    def paused(self) -> str:
        """Return in words what a Ring that is paused waits for; empty if none is."""
        if self.ring is None or not self.ring.is_paused:
            return ""
        parts = [f"waits for {names}"] if (names := ", ".join(self.ring.missing)) else []
        parts += [trouble] if (trouble := self.ring.hop_trouble) else []
        return f"paused: {'; '.join(parts) or 'nodes load'}"

    def starting(self) -> str:
        """Return in words what a Ring that starts waits for; empty if none starts."""
        if self.ring is None or self.is_formed:
            return ""
        loading = [f"{node} {100 * done // total} %" for node, (done, total) in self.loading.items() if total > done]
        parts = [f"loading: {', '.join(loading)}"] if loading else []
        if missing := self.ring.missing:
            parts.append(f"waiting for {', '.join(missing)}")
        text = "; ".join(parts) or "measures the ring"
        return f"nodes measure themselves; {text}" if self.options.is_survey else text

    def about_plan(self, now: float) -> dict[str, Any]:
        """Return what the status shows of any Ring: its model, and its Nodes with those that stand by."""
        options = self.options
        figures = {} if self.formed is None else {node.name: node for node in self.formed.figures()}
        silent = set() if self.formed is None else set(self.silent())
        missing = set() if self.ring is None else set(self.ring.missing)
        nodes: list[dict[str, Any]] = []
        for name, layers in zip(options.node_names, options.layers, strict=True):
            node: dict[str, Any] = {"name": name, "layers": [layers.start, layers.stop]}
            done, total = self.loading.get(name, (0, 0))
            if name in missing:
                node["state"] = "missing"
            elif self.paused() and done < total:
                node |= {"state": "loads", "loaded": done, "to_load": total}
            elif (found := figures.get(name)) is not None:
                node |= {"state": "silent" if name in silent else "serves", **_shown(found, now - self.serving_since_s)}
            elif name in self.loading:
                node |= {"state": "loads", "loaded": done, "to_load": total}
            else:
                node["state"] = "joined" if self.ring is not None else "unknown"
            nodes.append(node)
        standing_by = options.remote.standing_by if options.remote else ()
        here = {node.name for node in standing_by} if self.formed is None else set(self.formed.idle_here)
        nodes += [node.status | ({} if node.name in here else {"state": "missing"}) for node in standing_by]
        for node in nodes:
            if self.ring is not None and (on_disk := self.ring.at_hand.get(node["name"])):
                node["on_disk"] = sorted(on_disk)
        return {"model": str(options.model), "nodes": nodes}

    def about_ring(self, now: float) -> dict[str, Any]:
        """Return what the status shows of a Ring that is formed; nothing of another."""
        if self.formed is None:
            return {}
        hops, pace = self.formed.hops(), self.formed.pace()
        return _about_noise(self.options, self.formed.service.ring.exposure) | {
            "serving_s": round(now - self.serving_since_s, 1),
            "hops": [{"wire": hop.wire, "delay_s": hop.delay_s, "bytes_per_s": hop.bytes_per_s} for hop in hops],
            "counts": dict(self.formed.service.ring.counts),
            "pauses": [
                {"ago_s": round(now - times.lost_s, 1), "reason": times.reason, **times.shown()}
                for times in self.formed.pauses
            ],
            "kv_reserved_tokens": self.formed.service.ring.kv_reserved_tokens,
            "kv_live_tokens": self.formed.service.ring.kv_live_tokens,
            "kv_capacity_tokens": pace.kv_tokens,
            "pace": {
                "hops_s": pace.hops_s,
                "most_live": pace.num_live,
                "in_flight": pace.in_flight,
                "cap": pace.cap,
                "max_live": pace.max_live,
                "predicted_tokens_per_s": round(pace.predicted_tokens_per_s, 3),
            },
        }


def _about_noise(options: RingOptions, exposure: Exposure) -> dict[str, Any]:
    """Return what the Nodes with a promise may have learnt by now, also those that are lost, drained or stand by.

    A promise holds for every row that its Node sees, in whatever Ring: so totals follow from it alone.
    """
    nodes = [
        {
            "name": name,
            "epsilon": promise.epsilon,
            "delta": promise.delta,
            "clip": promise.row.clip,
            "sigma": promise.row.sigma,
            "worst_request_epsilon": round(total_epsilon(promise, exposure.max_rows), 3),
        }
        for name, promise in options.promises.items()
    ]
    if not nodes:
        return {}
    followers = (*options.node_names[1:], options.node_names[0])
    hops = [
        f"{sender} > {receiver}"
        for sender, receiver, promise in zip(options.node_names, followers, options.noises, strict=True)
        if promise is not None
    ]
    counts = {"rows_sent": exposure.num_rows, "worst_request_rows": exposure.max_rows}
    return {"noise": {**counts, "hops": hops, "nodes": nodes}}


def _shown(figures: NodeFigures, since_s: float) -> dict[str, Any]:
    """Return a Node's figures as the status shows them."""
    return {
        "rss_bytes": figures.rss_bytes,
        "weight_bytes": figures.weight_bytes,
        "busy_s": round(figures.busy_s, 3),
        "busy_share": round(min(figures.busy_s / since_s, 1.0), 4) if since_s > 0 else 0.0,
        "bytes_in": figures.bytes_in,
        "bytes_out": figures.bytes_out,
        "frames_dropped": figures.dropped,
    }


def names_of(options: RingOptions) -> str:
    """Return the names of a Ring's Nodes, for a line of text."""
    return ", ".join(options.node_names)


def serves_text(options: RingOptions) -> str:
    """Return which Nodes serve, and which the plan leaves out."""
    left_out = left_out_text(options.remote.standing_by) if options.remote else ""
    return f"serves on {names_of(options)}{' alone' if left_out and options.num_nodes == 1 else ''}{left_out}"
