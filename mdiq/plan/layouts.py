"""How the devices are best divided: one ring of all, whole copies, or several rings at one address. Pure.

A copy has no hops, and a ring of fewer devices has fewer of them, so where memory allows it several of them give more
tokens per second together. One ring needs the weights once, has the most KV cache, and may hold what fits no device.
The figures are those of the planner for each part (plan/plan.py), with the users spread over the parts so that each
user gets as much as possible; see docs/many-rings.md.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from mdiq.core.types import NodeId
from mdiq.plan.partition import Goal, Objective, Split, find_split
from mdiq.plan.plan import Plan, plan_split
from mdiq.plan.profile import Links, ModelShape, NodeProfile

MAX_NODES = 6
"""With up to so many Nodes all divisions are compared (203 of six); with more, one ring and the copies."""
SHOWN = 4


@dataclass(frozen=True, slots=True)
class Part:
    """A ring, or a whole copy if it has one Node. nodes: those that it uses; rate: tokens/s of its users together."""

    nodes: tuple[NodeId, ...]
    num_users: int
    rate: float

    def __str__(self) -> str:
        return f"{'copy' if len(self.nodes) == 1 else 'ring'} of {', '.join(self.nodes)}"


@dataclass(frozen=True, slots=True)
class Layout:
    """A division of the Nodes. rate: by the goal's objective: of all users together, or of one user.

    is_estimated: a part has a Starter that has not measured its head; the head of this one is scaled to it.
    """

    parts: tuple[Part, ...]
    rate: float
    is_estimated: bool = False

    def __str__(self) -> str:
        return "; ".join(map(str, self.parts))


def layouts(model: ModelShape, nodes: Sequence[NodeProfile], links: Links, goal: Goal) -> list[Layout]:
    """Return what the Nodes can be divided into, the best first; nodes: without spares, the Starter first."""
    heads = [_with_head(node, nodes[0]) for node in nodes]
    groups: dict[tuple[int, ...], _Group | None] = {}
    found: dict[str, Layout] = {}
    for division in _divisions(len(nodes)):
        for numbers in division:
            if numbers not in groups:
                groups[numbers] = _Group.of(model, [heads[i] for i in numbers], links, goal)
        # Devices that cannot hold the model are left out.
        held = [(numbers, group) for numbers in division if (group := groups[numbers]) is not None]
        if held:
            is_estimated = any(nodes[numbers[0]].head is None for numbers, _ in held)
            layout = _layout([group for _, group in held], goal, is_estimated)
            found.setdefault(str(layout), layout)
    return sorted(found.values(), key=lambda layout: (-layout.rate, len(layout.parts)))


def text(found: Sequence[Layout], rate: float) -> str:
    """Return the best layouts as lines, with what they give beside one ring of ``rate`` tokens per second."""
    best = [layout for layout in found if len(layout.parts) > 1][:SHOWN]
    if not best:
        return ""
    lines = ["several rings or copies at one address (mdiq route)"]
    for layout in best:
        much = f"{100 * (layout.rate / rate - 1):+.0f} %"
        about = "; estimated, for a head was not measured there" if layout.is_estimated else ""
        lines.append(f"  {layout}: {layout.rate:.1f} tokens/s, {much}{about}")
    why = "each part has fewer hops, and a copy none" if best[0].rate > rate else "all devices are better used together"
    lines.append(f"  best: {best[0] if best[0].rate > rate else 'one ring'}; {why}")
    return "\n".join(lines) + "\n"


def _with_head(node: NodeProfile, starter: NodeProfile) -> NodeProfile:
    if node.head is not None or starter.head is None:
        return node
    factor = node.layer_decode.seconds(1) / starter.layer_decode.seconds(1)
    return replace(node, head=starter.head.scaled(factor))


class _Group:
    """Some of the Nodes as a ring: what it gives its users."""

    def __init__(self, used: tuple[NodeId, ...], plan: Callable[[int], Plan], objective: Objective) -> None:
        self.used, self._plan, self._objective = used, plan, objective
        self._rates: dict[int, float] = {0: 0.0}

    @classmethod
    def of(cls, model: ModelShape, nodes: Sequence[NodeProfile], links: Links, goal: Goal) -> "_Group | None":
        """Return the group, or None if the Nodes cannot hold the model."""
        found = find_split(model, nodes, links, goal)
        if found is None:
            return None
        split: Split = found[0]
        used = tuple(node.name for node, num_layers in zip(nodes, split, strict=True) if num_layers)

        def plan(num_users: int) -> Plan:
            return plan_split(model, nodes, links, replace(goal, num_users=num_users), split)

        return cls(used, plan, goal.objective)

    def rate(self, num_users: int) -> float:
        """Return its tokens per second with so many users."""
        if num_users not in self._rates:
            plan = self._plan(num_users)
            self._rates[num_users] = plan.rate_one if self._objective is Objective.LATENCY else plan.rate
        return self._rates[num_users]


def _layout(groups: Sequence[_Group], goal: Goal, is_estimated: bool) -> Layout:
    """Spread the users: each next one goes where it gets most."""
    users = [0] * len(groups)
    for _ in range(goal.num_users):
        at = max(range(len(groups)), key=lambda i: groups[i].rate(users[i] + 1) / (users[i] + 1))
        users[at] += 1
    parts = tuple(Part(group.used, num, group.rate(num)) for group, num in zip(groups, users, strict=True))
    rates = [part.rate for part in parts]
    return Layout(parts, max(rates) if goal.objective is Objective.LATENCY else sum(rates), is_estimated)


def _divisions(num_nodes: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield the ways to divide so many Nodes into groups, the first with the Starter."""
    if num_nodes > MAX_NODES:
        yield [tuple(range(num_nodes))]
        yield [(i,) for i in range(num_nodes)]
        yield [tuple(range(0, num_nodes, 2)), tuple(range(1, num_nodes, 2))]
        return
    yield from _partitions(list(range(num_nodes)))


def _partitions(items: list[int]) -> Iterator[list[tuple[int, ...]]]:
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for mask in range(1 << len(rest)):
        group = (first, *(item for i, item in enumerate(rest) if mask >> i & 1))
        left = [item for i, item in enumerate(rest) if not mask >> i & 1]
        for others in _partitions(left):
            yield [group, *others]
