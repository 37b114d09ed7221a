"""A Plan as a table for review: its figures, those of other splits, and the effect of one Node more or less.

explain() returns plain values, render() text; colours and JSON are left to the command line.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mdiq.core.types import NodeId
from mdiq.plan.fixed_tables import mdi_split
from mdiq.plan.partition import Goal, Objective, Split, find_split
from mdiq.plan.plan import LeftOut, LimitKind, Plan, Why, make_plan, plan_split
from mdiq.plan.profile import Links, ModelShape, NodeProfile
from mdiq.plan.room import count_layers, format_bytes, held_layers, min_nodes
from mdiq.plan.split import split_layers

_SAME = 0.005  # a rate that differs by less is the same
_MIB = 1 << 20
_HEADINGS = ("node", "layers", "at most", "share %", "stage ms", "busy %", "weights MiB", "KV MiB", "free MiB")


@dataclass(frozen=True, slots=True)
class Row:
    """A Stage in the table; share: of the model's Layers; max_layers: limit from its memory."""

    node: NodeId
    layers: str
    max_layers: int
    share: float
    batch_s: float
    busy: float
    weight_bytes: int
    kv_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class WhatIf:
    """Another Ring and its rate, by the goal's objective; None where it is impossible, for the reason ``why``."""

    name: str
    rate: float | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The figures of a Plan and of its alternatives.

    free_rate: of the best Plan that may take Layers from the Starter, by the goal's objective; None if
    min_starter_layers asks for nothing.
    num_needed: minimum number of Nodes under the memory limits, with the Starter. held: Layers that each could hold.
    splits: other splits of the Layers. one_more: with a second device of a Node's kind. without: with one Node less.
    """

    plan: Plan
    rows: tuple[Row, ...]
    num_needed: int
    held: tuple[tuple[NodeId, int], ...]
    splits: tuple[WhatIf, ...]
    one_more: tuple[WhatIf, ...]
    without: tuple[WhatIf, ...]
    free_rate: float | None = None


def explain(model: ModelShape, nodes: Sequence[NodeProfile], links: Links, goal: Goal) -> Explanation:
    """Return the best Plan for these Nodes, the Starter first, with its alternatives.

    Raises:
        PlanError: the model does not fit.
    """
    plan = make_plan(model, nodes, links, goal)
    usable = [node for i, node in enumerate(nodes) if not (i and node.is_spare)]
    held = held_layers(model, usable, goal.kv_tokens)
    free = find_split(model, usable, links, replace(goal, min_starter_layers=1))
    return Explanation(
        plan=plan,
        rows=tuple(_rows(plan)),
        num_needed=min_nodes(model, usable, goal.kv_tokens),
        held=tuple((node.name, layers) for node, layers in zip(usable, held, strict=True)),
        splits=tuple(_splits(model, usable, links, goal)),
        one_more=tuple(_one_more(model, usable, links, goal)),
        without=tuple(
            _what_if(node.name, model, [other for other in usable if other is not node], links, goal)
            for node in usable[1:]
            if plan.layers(node.name)
        ),
        free_rate=None if goal.min_starter_layers == 1 or free is None else free[1],
    )


def _rows(plan: Plan) -> Iterator[Row]:
    for stage in plan.stages:
        yield Row(
            node=stage.node,
            layers=str(stage.layers),
            max_layers=stage.max_layers,
            share=len(stage.layers) / plan.model.num_layers,
            batch_s=stage.batch_s,
            busy=stage.busy,
            weight_bytes=stage.weight_bytes,
            kv_bytes=stage.kv_bytes,
            free_bytes=stage.free_bytes,
        )


def _splits(model: ModelShape, nodes: Sequence[NodeProfile], links: Links, goal: Goal) -> Iterator[WhatIf]:
    fixed: list[tuple[str, Split]] = []
    if 1 < len(nodes) <= model.num_layers:
        fixed.append(("equal split", tuple(map(len, split_layers(model.num_layers, len(nodes))))))
    table = mdi_split(model.num_layers, len(nodes))
    if table is not None:
        fixed.append(("MDI-LLM's table", table))
    held = held_layers(model, nodes, goal.kv_tokens)
    for name, split in fixed:
        full_name = f"{name} {','.join(map(str, split))}"
        too_small = [f"{node.name} holds {most}" for node, n, most in zip(nodes, split, held, strict=True) if n > most]
        if split[0] < goal.min_starter_layers:
            yield WhatIf(full_name, None, f"less than {count_layers(goal.min_starter_layers)} on {nodes[0].name}")
        elif too_small:
            yield WhatIf(full_name, None, f"does not fit: {', '.join(too_small)} at most")
        else:
            yield WhatIf(full_name, plan_split(model, nodes, links, goal, split).value)


def _one_more(model: ModelShape, nodes: Sequence[NodeProfile], links: Links, goal: Goal) -> Iterator[WhatIf]:
    seen: list[NodeProfile] = []
    for node in nodes:
        kind = replace(node, name=NodeId(""))
        if kind not in seen:
            seen.append(kind)
            twin = replace(node, name=NodeId(f"{node.name} (2)"))
            yield _what_if(node.name, model, [*nodes, twin], links.with_twin(node.name, twin.name), goal)


def _what_if(name: str, model: ModelShape, nodes: Sequence[NodeProfile], links: Links, goal: Goal) -> WhatIf:
    found = find_split(model, nodes, links, goal)
    if found is None:
        missing = model.num_layers - sum(held_layers(model, nodes, goal.kv_tokens))
        missing_bytes = missing * (model.layer_bytes + goal.kv_tokens * model.kv_bytes)
        return WhatIf(name, None, f"{count_layers(missing)} or {format_bytes(missing_bytes)} would not fit")
    return WhatIf(name, found[1])


def render(explanation: Explanation, *, with_more: bool = True) -> str:
    """Return the explanation as text of at most 120 columns, except for long names.

    with_more: include other splits, and one Node more or less.
    """
    plan = explanation.plan
    goal, model = plan.goal, plan.model
    users = "1 user" if goal.num_users == 1 else f"{goal.num_users} users"
    weights = f"{model.weights} weights, " if model.weights else ""
    total_bytes = model.stage_bytes(model.num_layers, is_starter=True)
    lines = [
        f"{model.num_layers} layers, {weights}{format_bytes(total_bytes)}, planned for "
        + (f"{goal.objective}: one user's" if goal.objective is Objective.LATENCY else f"{goal.objective}: {users}'")
        + " tokens per second",
        "",
        *_table(explanation.rows),
        "",
        f"predicted    {plan.rate:.1f} tokens/s for {users} in micro-batches of {plan.cap}; "
        f"{plan.rate_one:.1f} for one alone; long prompts at {plan.prompt_rate:.0f} tokens/s",
        f"limited by   {_limit(plan)}",
        f"KV cache     {_kv(plan)}",
        *_trusted(explanation),
        *_memory(explanation),
        *(f"left out     {left_out.node}: {reason(plan, left_out)}" for left_out in plan.left_out),
    ]
    for title, what_ifs in (
        ("other splits", explanation.splits),
        ("with one more device like", explanation.one_more),
        ("without", explanation.without),
    ):
        if what_ifs and with_more:
            lines += ["", title, *_what_ifs(plan.value, what_ifs)]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    cells = [
        (
            row.node,
            row.layers,
            f"{row.max_layers}",
            f"{100 * row.share:.0f}",
            f"{1_000 * row.batch_s:.1f}",
            f"{100 * row.busy:.0f}",
            f"{row.weight_bytes / _MIB:.0f}",
            f"{row.kv_bytes / _MIB:.0f}",
            f"{row.free_bytes / _MIB:.0f}",
        )
        for row in rows
    ]
    widths = [max(len(row[i]) for row in (_HEADINGS, *cells)) for i in range(len(_HEADINGS))]
    for name, *figures in (_HEADINGS, *cells):
        padded = (figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True))
        yield "  ".join([name.ljust(widths[0]), *padded])


def _limit(plan: Plan) -> str:
    limit = plan.limit
    where = {
        LimitKind.COMPUTE: f"the computing of {limit.where}",
        LimitKind.HOP: f"the hop {limit.where}",
        LimitKind.MEMORY: f"the memory of {limit.where}: with more of it, more layers would go there",
    }[limit.kind]
    if limit.is_waiting:
        return f"the time round the ring: {plan.goal.num_users} users do not fill it; the longest part is {where}"
    line = next((hop for hop in plan.hops if str(hop) == limit.where and hop.send.seconds(1) > hop.delay_s), None)
    return where if line is None else f"{where}, whose line is busy for {100 * line.busy:.0f} % of the time"


def _kv(plan: Plan) -> str:
    least = min(plan.stages, key=lambda stage: stage.free_bytes / len(stage.layers))
    text = f"room for {plan.kv_tokens:,} tokens"
    if plan.kv_tokens == plan.goal.max_kv_tokens:
        return f"{text}, as many as are wanted"
    return f"{text}; the memory of {least.node} is full first"


def _trusted(explanation: Explanation) -> Iterator[str]:
    """Say what it costs that the first Layers stay on the Starter."""
    free, plan = explanation.free_rate, explanation.plan
    if free is None:
        return
    starter = plan.stages[0]
    stay = f"trusted      the first {count_layers(plan.goal.min_starter_layers)} stay on {starter.node}"
    if abs(plan.value / free - 1) < _SAME:
        yield f"{stay}, which costs nothing: the best plan has {len(starter.layers)} there anyway"
    else:
        cost = f"{100 * (plan.value / free - 1):+.0f} %"
        yield f"{stay}: {plan.value:.1f} tokens/s with that, {free:.1f} without, {cost}"


def _memory(explanation: Explanation) -> Iterator[str]:
    """Explain why a Ring is needed, if one Node is too small."""
    model, goal = explanation.plan.model, explanation.plan.goal
    if explanation.num_needed > 1:
        held = ", ".join(f"{name} {layers}" for name, layers in explanation.held)
        yield (
            f"memory       {model.num_layers} layers with {goal.kv_tokens:,} tokens of KV cache need at least "
            f"{explanation.num_needed} of these nodes;"
        )
        yield f"             layers that fit: {held}"


def reason(plan: Plan, left_out: LeftOut) -> str:
    """Return why a Node holds nothing, in words."""
    match left_out.why:
        case Why.SPARE:
            return "it is spare"
        case Why.NO_ROOM:
            return f"its memory does not hold a layer with {plan.goal.kv_tokens:,} tokens of KV cache"
        case Why.NO_LAYER:
            return "there is no layer for it beside the other nodes'"
    assert left_out.rate_with is not None  # it is left out because of its rate
    return f"{left_out.rate_with:.1f} tokens/s with it, {plan.value:.1f} without"


def _what_ifs(value: float, what_ifs: Sequence[WhatIf]) -> Iterator[str]:
    width = max(len(what_if.name) for what_if in what_ifs)
    for what_if in what_ifs:
        name = what_if.name.ljust(width)
        if what_if.rate is None:
            yield f"  {name}  {what_if.why}"
        else:
            change = what_if.rate / value - 1
            much = "the same" if abs(change) < _SAME else f"{100 * change:+.0f} %"
            yield f"  {name}  {what_if.rate:.1f} tokens/s, {much}"
