"""A staged trial on a ring of local processes: few nodes, then a split tuned by the planner, then all nodes.

Before the stages the whole model runs on one Node: what the stages' answers must equal, and what copies would reach.
After each stage gates say whether the next one begins; a stage ends with a recovery drill.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from mdiq.bench.runner import NodeShare
from mdiq.bench.workload import Load
from mdiq.core.types import NodeId
from mdiq.engine.memory import return_free_memory
from mdiq.errors import PlanError
from mdiq.plan.explain import WhatIf, explain
from mdiq.plan.measured import MeasuredRing, Profiles, profiles_of
from mdiq.plan.micro_batches import best_grouping
from mdiq.plan.partition import Goal, Split, best_split
from mdiq.plan.plan import plan_split
from mdiq.plan.profile import HopProfile, Links, NodeProfile
from mdiq.plan.split import split_layers
from mdiq.report.drill import Drill, Kill, RecoverableRing, drill
from mdiq.report.gates import Gate, Limits, Shown, all_pass, gates
from mdiq.report.measure import HopBytes, LoadRun, MeasurableRing, Meter, count_bytes
from mdiq.runtime.options import HopFigures

_NO_LIMIT_BYTES = 1 << 62


class TriedRing(MeasurableRing, RecoverableRing, Protocol):
    """What a trial runs on; runtime's RingHost is one."""


OpenRing = Callable[[Split, str | None], AbstractAsyncContextManager[TriedRing]]
"""Starts a ring with so many Layers on each Node, and this format on its Hops; None: the usual one."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """Tokens/s while decoding, with one user and with all of them; token_s: between two tokens of one of all."""

    one: float
    many: float
    token_s: float


@dataclass(frozen=True, slots=True)
class Energy:
    """What the machine told during the largest Load; source "" and None where it tells nothing."""

    source: str
    joules: float | None
    watts: float | None
    joules_per_token: float | None


@dataclass(frozen=True, slots=True)
class StageRun:
    """A stage. name: "alone", "few", "tuned" or "all".

    is_planned: the split is the planner's; otherwise even, since nothing was measured before, or since by the plan the
    devices' memory does not hold the model. predicted: by the Plan before the stage ran; for an even
    split from what its Nodes measured when they started. kv_bytes: of each Node when its KV cache is full.
    part: users of the load that one of several copies would have; of "alone" only.
    """

    name: str
    nodes: int
    split: Split
    is_planned: bool
    one: LoadRun
    many: LoadRun
    part: LoadRun | None
    equal: int
    predicted: Predicted | None
    devices: tuple[NodeShare, ...]
    kv_bytes: tuple[int, ...]
    hops: tuple[HopFigures, ...]
    energy: Energy
    drill: Drill | None = None
    gates: tuple[Gate, ...] = ()
    passes: bool = True


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the planner says of all the devices. planned: its rate with the users' load, for its own best ring.

    num_needed: devices that the memory of the model needs. left_out: devices that it would leave out.
    one_more: with another device of a Node's kind; gains: their rates over planned.
    """

    planned: float
    num_needed: int
    left_out: tuple[str, ...]
    one_more: tuple[WhatIf, ...]
    gains: tuple[float | None, ...]
    limited_by: str
    limit: str


@dataclass(frozen=True, slots=True)
class TrialRun:
    """All that a trial measured. outlook: None before two Nodes have run; ``why_no_outlook`` says why else."""

    alone: StageRun
    stages: tuple[StageRun, ...]
    num_stages: int
    wire: tuple[HopBytes, ...]
    outlook: Outlook | None
    why_no_outlook: str = ""


@dataclass(frozen=True, slots=True)
class Trial:
    """How to try.

    device_bytes: memory of a device, for the planner; None: no limit. kv_tokens: of the rings.
    rest_s: how long after a Load every Node has reported. lap_s: see Meter. keeps_going: past gates that fail.
    drill_node: the Node that the drills kill, in rings that have it; else the one with the most Layers beside the
    Starter, which measures.
    """

    num_layers: int
    head_layers: float
    vocab_size: int
    weights: str
    nodes: int
    few: int
    users: int
    prompt_tokens: int
    answer_tokens: int
    seed: int
    kv_tokens: int
    device_bytes: int | None
    limits: Limits
    keeps_going: bool
    wires: Sequence[str]
    lengths: Sequence[int]
    rest_s: float
    lap_s: float
    open_ring: OpenRing
    kill: Kill
    drill_node: str | None = None
    progress: Callable[[str], None] = lambda _: None

    async def run(self) -> TrialRun:
        """Run baseline, stages and counts.

        Raises:
            MdiqError: a ring failed outside a drill.
        """
        alone, _ = await self._stage("alone", (self.num_layers,), None, None)
        stages: list[StageRun] = []
        profiles: Profiles | None = None
        even = self._even(self.few)
        names = ("few", "tuned", "all")
        for name in names:
            split, predicted, is_planned = even, None, False
            if profiles is not None:
                split, predicted, is_planned = self._planned(profiles, self.few if name == "tuned" else self.nodes)
            stage, measured = await self._stage(name, split, alone, stages[-1] if stages else None, predicted)
            stage = replace(stage, is_planned=is_planned)
            stages.append(stage)
            profiles = profiles_of(measured, self.weights, profiles)
            if not stage.passes and not self.keeps_going:
                break
        wire = await count_bytes(
            lambda wire: self.open_ring(even, wire),
            self.vocab_size,
            self.wires,
            self.lengths,
            self.seed,
            lap_s=self.lap_s,
            has_uncached=True,
            progress=self.progress,
        )
        assert profiles is not None  # "few" has run
        try:
            outlook, why = self._outlook(profiles), ""
        except PlanError as error:
            outlook, why = None, str(error)
        return TrialRun(alone, tuple(stages), len(names), wire, outlook, why)

    async def _stage(
        self,
        name: str,
        split: Split,
        alone: StageRun | None,
        before: StageRun | None,
        predicted: Predicted | None = None,
    ) -> tuple[StageRun, MeasuredRing]:
        nodes = len(split)
        self.progress(f"{name}: {'one node starts' if nodes == 1 else f'a ring of {nodes} nodes starts'}")
        await asyncio.to_thread(return_free_memory, collect=True)  # the Starter of the ring before was in this process
        async with self.open_ring(split, None) as ring:
            meter = Meter(ring, self.vocab_size, self.rest_s if nodes > 1 else 0.0, self.lap_s)
            await meter.warm_up(self.users, self.prompt_tokens, self.seed)
            measured = await ring.measured()
            predicted = predicted or _predicted(measured, self.users)
            self.progress(f"{name}: one user")
            one = await meter.load(self._load(1))
            part = None
            if alone is None:
                part = await meter.load(self._load(math.ceil(self.users / self.nodes)))
            many = one
            if self.users > 1:
                self.progress(f"{name}: {self.users} users")
                many = await meter.load(self._load(self.users))
            expected = many if alone is None else alone.many
            found = None
            if nodes > 1:
                victim = self._victim([figures.name for figures in ring.figures()], split)
                asking = "one user asks" if self.users == 1 else f"{self.users} users ask"
                self.progress(f"{name}: {victim} is killed while {asking}")
                found = await drill(
                    ring,
                    self._load(self.users),
                    self.vocab_size,
                    meter.next_index(self.users),
                    victim,
                    self.kill,
                    expected.answers,
                )
            stage = StageRun(
                name=name,
                nodes=nodes,
                split=split,
                is_planned=False,
                one=one,
                many=many,
                part=part,
                equal=sum(mine == its for mine, its in zip(many.answers, expected.answers, strict=True)),
                predicted=predicted,
                devices=many.nodes,
                kv_bytes=tuple(self.kv_tokens * stage.kv_bytes_per_token for stage in measured.stages),
                hops=tuple(ring.hops()),
                energy=_energy(many),
                drill=found,
            )
        if alone is None:
            return stage, measured
        found_gates = gates(self._shown(stage, before), self.limits)
        return replace(stage, gates=found_gates, passes=all_pass(found_gates)), measured

    def _victim(self, names: Sequence[str], split: Split) -> str:
        if self.drill_node is not None and self.drill_node in names[1:]:
            return self.drill_node
        return names[max(range(1, len(names)), key=lambda i: split[i])]

    def _shown(self, stage: StageRun, before: StageRun | None) -> Shown:
        min_gain = None
        if stage.name == "tuned":
            min_gain = self.limits.min_gain_tuned
        elif stage.name == "all":  # with as many Nodes as before there is nothing to gain
            min_gain = self.limits.min_gain_all if self.nodes > self.few else self.limits.min_gain_tuned
        return Shown(
            users=self.users,
            equal=stage.equal,
            tokens_per_s=stage.many.figures.decode_tokens_per_s,
            predicted_tokens_per_s=None if stage.predicted is None else stage.predicted.many,
            token_p95_s=stage.many.figures.itl_p95_s,
            before=None if before is None else before.many.figures.decode_tokens_per_s,
            min_gain=min_gain,
            rss_bytes=max(share.rss_bytes for share in stage.devices),
            device_bytes=self.device_bytes,
            recovered=None if stage.drill is None else stage.drill.equal,
            recovery_s=None if stage.drill is None else stage.drill.recovered_s,
        )

    def _load(self, users: int) -> Load:
        return Load(users, self.prompt_tokens, self.answer_tokens, self.seed)

    def _even(self, nodes: int) -> Split:
        return tuple(map(len, split_layers(self.num_layers, nodes, self.head_layers)))

    def _goal(self) -> Goal:
        return Goal(num_users=self.users, kv_tokens=self.kv_tokens)

    def _planned(self, profiles: Profiles, nodes: int) -> tuple[Split, Predicted, bool]:
        """Return the split over so many Nodes, its prediction, and whether the planner made it.

        Where the devices' memory does not hold the model by the plan, the split is even: a gate looks at the memory.
        """
        profiled, links = devices(profiles, nodes)
        roomy = [replace(node, memory_bytes=_NO_LIMIT_BYTES) for node in profiled]
        limited = roomy if self.device_bytes is None else self._limited(profiled)
        planned = best_split(profiles.model, limited, links, self._goal(), all_nodes=True)
        split = planned or self._even(nodes)
        plan = plan_split(profiles.model, roomy, links, self._goal(), split)
        return split, _as_predicted(plan.rate_one, plan.rate, self.users), planned is not None

    def _limited(self, profiled: Sequence[NodeProfile]) -> list[NodeProfile]:
        """Return these Nodes with the memory of a device.

        The first one is the process that measures, too: each counts with what the last one takes without weights.
        """
        assert self.device_bytes is not None  # it is asked for then alone
        process_bytes = profiled[-1].process_bytes
        return [replace(node, memory_bytes=self.device_bytes, process_bytes=process_bytes) for node in profiled]

    def _outlook(self, profiles: Profiles) -> Outlook:
        profiled, links = devices(profiles, self.nodes)
        if self.device_bytes is not None:
            profiled = self._limited(profiled)
        found = explain(profiles.model, profiled, links, self._goal())
        value = found.plan.value
        return Outlook(
            planned=value,
            num_needed=found.num_needed,
            left_out=tuple(str(left.node) for left in found.plan.left_out),
            one_more=found.one_more,
            gains=tuple(None if more.rate is None else more.rate / value for more in found.one_more),
            limited_by=str(found.plan.limit.kind),
            limit=found.plan.limit.where,
        )


def devices(profiles: Profiles, nodes: int) -> tuple[list[NodeProfile], Links]:
    """Return the profiles of so many Nodes and their Hops; those that have not run yet are like the last one that has.

    A Hop that was not measured is like the worst that was.
    """
    known = [node.as_under_load() for node in list(profiles.nodes.values())[:nodes]]
    more = [replace(known[-1], name=NodeId(f"node-{i}")) for i in range(len(known), nodes)]
    hops = list(profiles.links.hops.values())
    if not hops:
        return [*known, *more], profiles.links
    worst = HopProfile(max(hop.delay_s for hop in hops), min(hop.bytes_per_s for hop in hops))
    return [*known, *more], Links(profiles.links.hops, worst)


def _predicted(measured: MeasuredRing, users: int) -> Predicted | None:
    """Return what follows from what the Nodes of a ring measured when they started."""
    profiles = profiles_of(measured, "")
    if profiles is None:  # of one Node
        decodes = [stage.cost.decode for stage in measured.stages]
        return _as_predicted(best_grouping(decodes, 0.0, 1)[1], best_grouping(decodes, 0.0, users)[1], users)
    profiled, links = devices(profiles, len(measured.stages))
    roomy = [replace(node, memory_bytes=_NO_LIMIT_BYTES) for node in profiled]
    split = tuple(stage.num_layers for stage in measured.stages)
    plan = plan_split(profiles.model, roomy, links, Goal(num_users=users, kv_tokens=1), split)
    return _as_predicted(plan.rate_one, plan.rate, users)


def _as_predicted(one: float, many: float, users: int) -> Predicted:
    return Predicted(one, many, users / many)


def _energy(run: LoadRun) -> Energy:
    found = run.joules
    if found is None or run.seconds <= 0:
        return Energy("", None, None, None)
    return Energy(run.energy_source, found, found / run.seconds, found / (run.users * run.answer_tokens))
