"""Whether several rings or whole copies would be better than one ring, by the planner's figures. Pure.

A copy has no hops, and a ring of fewer devices has fewer of them, so where memory allows it several of them give more
tokens per second together. One ring needs the weights once, has the most KV cache, and may hold what fits no device.
plan/divide.py has the rule; here are the figures of measured Nodes, and the text.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache

from mdiq.core.types import NodeId
from mdiq.plan.divide import Layout, best_of, divisions, lay_out
from mdiq.plan.partition import Goal, Objective, find_split
from mdiq.plan.plan import Plan
from mdiq.plan.profile import Links, ModelShape, NodeProfile

SHOWN = 4


@dataclass(frozen=True, slots=True)
class Part:
    """A ring, or a whole copy if it has one Node. nodes: those that it uses; rate: tokens/s of its users together.

    is_estimated: its Starter has not measured its head; the head of the one ring's Starter is scaled to it.
    """

    nodes: tuple[NodeId, ...]
    num_users: int
    rate: float
    is_estimated: bool = False

    @property
    def num_used(self) -> int:
        return len(self.nodes)

    def __str__(self) -> str:
        return f"{'copy' if len(self.nodes) == 1 else 'ring'} of {', '.join(self.nodes)}"


def layouts(model: ModelShape, nodes: Sequence[NodeProfile], links: Links, goal: Goal) -> list[Layout[Part]]:
    """Return what the Nodes can be divided into, the best first; nodes: without spares, the Starter first.

    A ring keeps the Nodes' order, and its first Node is its Starter. A goal of latency is that of one user.
    """
    heads = [_with_head(node, nodes[0]) for node in nodes]
    users = 1 if goal.objective is Objective.LATENCY else goal.num_users

    @cache
    def part(group: tuple[int, ...], num_users: int) -> Part | None:
        numbers = sorted(group)
        found = find_split(model, [heads[i] for i in numbers], links, replace(goal, num_users=num_users))
        if found is None:
            return None
        split, rate = found
        used = tuple(nodes[i].name for i, n in zip(numbers, split, strict=True) if n)
        return Part(used, num_users, rate, nodes[numbers[0]].head is None)

    by_speed = sorted(range(len(nodes)), key=lambda i: nodes[i].layer_decode.seconds(1))
    laid_out = (lay_out(division, users, part) for division in divisions(by_speed, users))
    different = list({frozenset(layout.rings): layout for layout in laid_out if layout is not None}.values())
    if not different:
        return []
    best = best_of(different)
    return sorted(different, key=lambda layout: (layout is not best, -layout.rate, layout.num_used))


def text(found: Sequence[Layout[Part]], plan: Plan) -> str:
    """Return the best layouts but the one ring of the plan as lines, with what they give beside it."""
    starter = plan.stages[0].node
    others = [layout for layout in found if layout.num_rings > 1 or layout.rings[0][1].nodes[0] != starter]
    if not others:
        return ""
    lines = ["several rings or copies at one address (mdiq route)"]
    for layout in others[:SHOWN]:
        much = f"{100 * (layout.rate / plan.value - 1):+.0f} %"
        is_estimated = any(part.is_estimated for _, part in layout.rings)
        about = "; estimated, for a head was not measured there" if is_estimated else ""
        lines.append(f"  {layout}: {layout.rate:.1f} tokens/s, {much}{about}")
    if others[0] is not found[0]:
        lines.append("  best: one ring; no other layout is more than 2 % faster")
    elif others[0].num_rings > 1:
        lines.append(f"  best: {others[0]}; each part has fewer hops, and a copy none")
    else:
        lines.append(f"  best: {others[0]}; it does without {starter}")
    return "\n".join(lines) + "\n"


def as_value(layout: Layout[Part]) -> dict[str, object]:
    """Return a Layout for JSON."""
    parts = [asdict(part) for _, part in layout.rings]
    return {"parts": parts, "rate": layout.rate, "is_estimated": any(part["is_estimated"] for part in parts)}


def _with_head(node: NodeProfile, starter: NodeProfile) -> NodeProfile:
    if node.head is not None or starter.head is None:
        return node
    factor = node.layer_decode.seconds(1) / starter.layer_decode.seconds(1)
    return replace(node, head=starter.head.scaled(factor))
