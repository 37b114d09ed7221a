"""The Plan: which Layers each Node holds, the predicted rate, what limits it, and which Nodes are left out and why.

Both ways to a Plan give the same figures: make_plan searches for the best split, plan_split takes a given one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import accumulate, pairwise

from mdiq.core.types import LayerRange, NodeId
from mdiq.errors import PlanError
from mdiq.plan.micro_batches import Curve, best_grouping
from mdiq.plan.pace import StageCost
from mdiq.plan.partition import Goal, Objective, Split, best_split, find_split
from mdiq.plan.profile import Links, ModelShape, NodeProfile
from mdiq.plan.room import check_room, format_bytes

_CHUNK = 64  # tokens of a prompt's chunk in predictions
_HELD_BACK = 1.03  # memory limits a Ring that would be this much faster without its limits
_FULL = 0.9  # the busiest Stage of a Ring that is full: its share of a Lap, see the corner in plan/micro_batches.py
_NO_LIMIT_BYTES = 1 << 62


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """The prediction for a Stage with the goal's users; bytes are those of its Node.

    batch_s: a forward of the largest micro-batch. busy: the share of the time in which it computes.
    max_layers: limit from its memory. other_bytes: the process and its activations.
    """

    node: NodeId
    layers: LayerRange
    cost: StageCost
    batch_s: float
    busy: float
    max_layers: int
    memory_bytes: int
    weight_bytes: int
    kv_bytes: int
    other_bytes: int

    @property
    def free_bytes(self) -> int:
        """Free bytes."""
        return self.memory_bytes - self.weight_bytes - self.kv_bytes - self.other_bytes


@dataclass(frozen=True, slots=True)
class PlannedHop:
    """The prediction for a Hop: its delay, how long a Frame keeps its line busy by rows, and its part of a Lap."""

    sender: NodeId
    receiver: NodeId
    delay_s: float
    send: Curve
    lap_s: float
    busy: float

    def __str__(self) -> str:
        return f"{self.sender} > {self.receiver}"


class Why(StrEnum):
    """Why a Node holds nothing."""

    SPARE = "spare"
    SLOWER = "slower"  # with it the Ring is slower
    NO_ROOM = "no room"  # its memory holds no Layer
    NO_LAYER = "no layer"  # the others have all of them


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A Node without a Stage; rate_with: of the best Ring that includes it, if there is one."""

    node: NodeId
    why: Why
    rate_with: float | None = None


class LimitKind(StrEnum):
    """What keeps the Ring from being faster."""

    COMPUTE = "compute"
    HOP = "hop"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Limit:
    """What limits the Ring, and where. is_waiting: no Stage is always busy, so more users would fill the Ring."""

    kind: LimitKind
    where: str
    is_waiting: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The Layers of each Node, and the prediction. Stages and Hops are in the Ring's order, the Starter first.

    cap: maximum Segments of a Batch for the goal's users; in_flight: micro-batches in flight then.
    kv_tokens: KV capacity. rate, rate_one: tokens per second of the goal's users together, and of one alone.
    prompt_rate: tokens per second of a long prompt that has the Ring to itself.
    """

    model: ModelShape
    goal: Goal
    stages: tuple[PlannedStage, ...]
    hops: tuple[PlannedHop, ...]
    cap: int
    in_flight: int
    kv_tokens: int
    rate: float
    rate_one: float
    prompt_rate: float
    limit: Limit
    left_out: tuple[LeftOut, ...] = ()

    @property
    def value(self) -> float:
        """The rate that the goal's objective compares."""
        return self.rate_one if self.goal.objective is Objective.LATENCY else self.rate

    @property
    def hops_s(self) -> float:
        """Delay of all Hops together."""
        return sum(hop.delay_s for hop in self.hops)

    def layers(self, node: NodeId) -> LayerRange | None:
        """Return the Layers of a Node, or None when it has none."""
        return next((stage.layers for stage in self.stages if stage.node == node), None)


def make_plan(model: ModelShape, nodes: Sequence[NodeProfile], links: Links, goal: Goal) -> Plan:
    """Return the best Plan for these Nodes, which are given in the Ring's order, the Starter first.

    Raises:
        PlanError: the model does not fit.
    """
    usable, spares = _usable(nodes)
    check_room(model, usable, goal, spares)
    split = best_split(model, usable, links, goal)
    assert split is not None  # there is room
    plan = _plan(model, usable, links, goal, split)
    left_out = [
        *(_left_out(model, usable, links, goal, split, i) for i, n in enumerate(split) if not n),
        *(LeftOut(spare.name, Why.SPARE) for spare in spares),
    ]
    full = _full_node(model, usable, links, goal, split, plan.value)
    limit = plan.limit if full is None else Limit(LimitKind.MEMORY, full)
    return replace(plan, limit=limit, left_out=tuple(left_out))


def plan_split(model: ModelShape, nodes: Sequence[NodeProfile], links: Links, goal: Goal, split: Split) -> Plan:
    """Return the Plan of a given split: Layers of each Node but the spares. 0: left out; at least 1 for the Starter.

    Raises:
        PlanError: the split does not cover the model, or a Node's memory does not hold its part.
    """
    usable, _ = _usable(nodes)
    if len(split) != len(usable) or sum(split) != model.num_layers or min(split) < 0 or not split[0]:
        raise PlanError(
            f"layers {','.join(map(str, split))}: {len(usable)} nodes and {model.num_layers} layers need one number "
            f"for each node, {model.num_layers} together, and at least 1 for the starter"
        )
    if split[0] < goal.min_starter_layers:
        raise PlanError(
            f"layers {','.join(map(str, split))}: the first {goal.min_starter_layers} are to stay on {usable[0].name} "
            f"(min_starter_layers), which has {split[0]}; give it {goal.min_starter_layers} or more"
        )
    for i, (node, num_layers) in enumerate(zip(usable, split, strict=True)):
        room_bytes = node.room_bytes(model, is_starter=not i)
        need_bytes = num_layers * (model.layer_bytes + goal.kv_tokens * model.kv_bytes)
        if num_layers and need_bytes > room_bytes:
            most = node.max_layers(model, goal.kv_tokens, is_starter=not i)
            raise PlanError(
                f"{node.name}: {num_layers} layers with {goal.kv_tokens:,} tokens of KV cache need "
                f"{format_bytes(need_bytes)} and {format_bytes(max(room_bytes, 0))} of its "
                f"{format_bytes(node.memory_bytes)} are left for them; give it at most {most}"
            )
    return _plan(model, usable, links, goal, split)


def _usable(nodes: Sequence[NodeProfile]) -> tuple[list[NodeProfile], list[NodeProfile]]:
    """Return the Nodes that may take part, and the spare ones."""
    return [n for i, n in enumerate(nodes) if not (i and n.is_spare)], [n for n in nodes[1:] if n.is_spare]


def _plan(model: ModelShape, nodes: Sequence[NodeProfile], links: Links, goal: Goal, split: Split) -> Plan:
    used = [i for i, n in enumerate(split) if n]
    costs = [nodes[i].stage_cost(split[i], goal.context_tokens, is_starter=not i) for i in used]
    ends = list(pairwise([*used, used[0]])) if len(used) > 1 else []
    ways = [links.between(nodes[a].name, nodes[b].name) for a, b in ends]
    decodes = [*(cost.decode for cost in costs), *(way.send_curve(model) for way in ways)]
    delay_s = sum(way.delay_s for way in ways)
    grouping, rate = best_grouping(decodes, delay_s, goal.num_users)
    _, rate_one = best_grouping(decodes, delay_s, 1)
    lap_s = grouping.num_live / rate  # of the Sequences, not of the bytes
    busy = [grouping.busy_s(curve.seconds(grouping.size), curve.seconds(grouping.largest)) / lap_s for curve in decodes]
    # Of a Layer, for its KV cache.
    rooms = [nodes[i].room_bytes(model, is_starter=not i) // split[i] - model.layer_bytes for i in used]
    kv_tokens = min(*(room // model.kv_bytes for room in rooms), goal.max_kv_tokens or _NO_LIMIT_BYTES)
    starts = [0, *accumulate(split[i] for i in used)]
    stages = tuple(
        PlannedStage(
            node=nodes[i].name,
            layers=LayerRange(start, start + split[i]),
            cost=cost,
            batch_s=cost.decode.seconds(grouping.largest),
            busy=share,
            max_layers=nodes[i].max_layers(model, goal.kv_tokens, is_starter=not i),
            memory_bytes=nodes[i].memory_bytes,
            weight_bytes=model.stage_bytes(split[i], is_starter=not i),
            kv_bytes=kv_tokens * split[i] * model.kv_bytes,
            other_bytes=nodes[i].process_bytes + model.activation_bytes,
        )
        for i, start, cost, share in zip(used, starts, costs, busy, strict=False)
    )
    hops = tuple(
        PlannedHop(
            nodes[a].name,
            nodes[b].name,
            way.delay_s,
            way.send_curve(model),
            way.delay_s + way.send_s(1, grouping.largest, model),
            share,
        )
        for (a, b), way, share in zip(ends, ways, busy[len(used) :], strict=True)
    )
    chunk_s = max([*(c.prompt.seconds(_CHUNK) for c in costs), *(way.send_s(1, _CHUNK, model) for way in ways)])
    return Plan(
        model=model,
        goal=goal,
        stages=stages,
        hops=hops,
        cap=grouping.largest,
        in_flight=grouping.num_batches,
        kv_tokens=kv_tokens,
        rate=rate,
        rate_one=rate_one,
        prompt_rate=_CHUNK / chunk_s,
        limit=_limit(stages, hops, goal),
    )


def _limit(stages: Sequence[PlannedStage], hops: Sequence[PlannedHop], goal: Goal) -> Limit:
    """Return the busiest Stage or Hop; where the Ring is not full, or serves one user, the longest part of a Lap."""
    one = goal.objective is Objective.LATENCY or goal.num_users == 1
    busiest = max([*(stage.busy for stage in stages), *(hop.busy for hop in hops)])
    is_waiting = len(stages) > 1 and not one and busiest < _FULL
    parts: list[tuple[float, float, LimitKind, str]] = []  # part of a Lap, busy share, what it is
    for stage in stages:
        time_s = stage.cost.decode.seconds(1) if one else stage.batch_s
        parts.append((time_s, stage.busy, LimitKind.COMPUTE, stage.node))
    for hop in hops:
        parts.append((hop.delay_s + hop.send.seconds(1) if one else hop.lap_s, hop.busy, LimitKind.HOP, str(hop)))
    _, _, kind, where = max(parts, key=lambda part: part[0] if one or is_waiting else part[1])
    return Limit(kind, where, is_waiting)


def _left_out(
    model: ModelShape, nodes: Sequence[NodeProfile], links: Links, goal: Goal, split: Split, node: int
) -> LeftOut:
    name = nodes[node].name
    if not nodes[node].max_layers(model, goal.kv_tokens, is_starter=False):
        return LeftOut(name, Why.NO_ROOM)
    ring = [profile for i, profile in enumerate(nodes) if split[i] or i == node]
    with_it = find_split(model, ring, links, goal, all_nodes=True)
    return LeftOut(name, Why.NO_LAYER) if with_it is None else LeftOut(name, Why.SLOWER, with_it[1])


def _full_node(
    model: ModelShape, nodes: Sequence[NodeProfile], links: Links, goal: Goal, split: Split, value: float
) -> str | None:
    """Return the Node whose memory keeps the Ring from being faster, or None when no memory does."""
    most = [node.max_layers(model, goal.kv_tokens, is_starter=not i) for i, node in enumerate(nodes)]
    if not any(n == cap < model.num_layers for n, cap in zip(split, most, strict=True)):
        return None
    roomy = [replace(node, memory_bytes=_NO_LIMIT_BYTES) for node in nodes]
    faster = find_split(model, roomy, links, goal, above=_HELD_BACK * value)
    if faster is None:
        return None
    gains = {i: faster[0][i] - n for i, n in enumerate(split) if n == most[i]}
    return nodes[max(gains, key=lambda i: gains[i])].name
