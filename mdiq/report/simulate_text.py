"""A Simulation as a text for review and as JSON. Pure: the command line prints it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from mdiq.plan.micro_batches import MAX_LIVE
from mdiq.plan.room import count_layers, format_bytes
from mdiq.report.catalogue import Catalogue, Figure, weakest
from mdiq.report.simulate import Simulation, sources, upload_s
from mdiq.report.simulate_rings import Question, RingLayout

MIXTURE = (
    "mdiq cannot run mixtures of experts yet: this is what the planner would make of one. Memory holds all experts; a "
    "token reads and computes the active ones, and tokens of a batch meet more of them together."
)
_SAME = 0.005
_SHOWN = 4  # names in a line
_MIB = 1 << 20


def render(simulation: Simulation, catalogue: Catalogue, *, with_sources: bool = False) -> str:
    """Return the prediction as text. with_sources: list the figures that it rests on."""
    question = simulation.question
    lines = list(_head(question))
    if simulation.layout is None:
        lines += ["", f"does not fit  {simulation.why_not}"]
        if simulation.needed:
            needed = ", or ".join(f"{number} {device}" for device, number in simulation.needed)
            rings = "one ring" if simulation.num_rings == 1 else f"{simulation.num_rings} rings"
            lines.append(f"it would fit {rings} with {needed} more")
    else:
        lines += ["", *_body(simulation, simulation.layout, catalogue)]
    if with_sources:
        lines += ["", "rests on"]
        for name, figure in sources(question, question.devices, catalogue):
            lines.append(f"  {name:<38} {figure.value:>14,.6g}  {figure.mark:<9}  {figure.source}")
    else:
        lines += [
            "",
            "marks: each line has that of the weakest figure that it was computed from; --sources lists all figures",
        ]
    return "\n".join(lines) + "\n"


def as_json(simulation: Simulation, catalogue: Catalogue) -> str:
    """Return the prediction as JSON: each figure with its mark, and the figures that it rests on with their sources."""
    question, layout = simulation.question, simulation.layout
    value: dict[str, object] = {
        "model": {**asdict(question.shape), "params": question.shape.params},
        "weights": question.held.weights,
        "devices": [device.name for device in question.devices],
        "link": question.link.name,
        "users": question.users,
        "prompt_tokens": question.prompt_tokens,
        "answer_tokens": question.answer_tokens,
        "can_run": not question.shape.num_experts,
        "fits": layout is not None,
    }
    if layout is None:
        value |= {"why_not": simulation.why_not, "needed": dict(simulation.needed)}
    else:
        ring = simulation.ring
        within_s, starters_s = upload_s(question, ring, layout.num_rings)
        value |= {
            "rings": [
                {
                    "count": count,
                    "users": each.users,
                    "rate_tokens_per_s": each.rate,
                    "layers": {stage.node: len(stage.layers) for stage in each.plan.stages},
                }
                for count, each in layout.rings
            ],
            "figures": {name: _figure(figure) for name, figure in simulation.figures},
            "micro_batches": {"cap": ring.plan.cap, "in_flight": ring.plan.in_flight},
            "stages": [asdict(stage) for stage in simulation.stages],
            "limit": simulation.limit,
            "left_out": simulation.left_out,
            "one_more": [asdict(each) for each in simulation.one_more],
            "other_layouts": [
                {"rings": rings, "rate_tokens_per_s": rate, "devices_used": used}
                for rings, rate, used in simulation.others
            ],
            "next_limits": [asdict(limit) for limit in simulation.next_limits],
            "upload_s": {"within_a_ring": within_s, "to_all_starters": starters_s},
        }
    value["sources"] = {
        name: {**_figure(figure), "source": figure.source}
        for name, figure in sources(question, question.devices, catalogue)
    }
    return json.dumps(value, indent=1)


def _figure(figure: Figure) -> dict[str, object]:
    return {"value": figure.value, "mark": figure.mark}


def _head(question: Question) -> Iterator[str]:
    shape, model = question.shape, question.model
    total = model.stage_bytes(model.num_layers, is_starter=True)
    kinds: dict[str, int] = {}
    for device in question.devices:
        kinds[device.name] = kinds.get(device.name, 0) + 1
    devices = ", ".join(f"{number} {name}" for name, number in kinds.items())
    yield (
        f"{shape.name}: {count_layers(shape.num_layers)}, {shape.params / 1e9:.2f} billion weights in "
        f"{question.held.weights}, {format_bytes(total)}"
    )
    yield (
        f"on {devices}; {question.link.title}; {_users(question.users)}, prompts of {question.prompt_tokens} tokens, "
        f"answers of {question.answer_tokens}"
    )
    if shape.num_experts:
        active = shape.num_layers * shape.active_layer_params + shape.head_params
        experts = f"{shape.active_experts} of {shape.num_experts} experts"
        yield f"mixture: {experts}; {active / 1e9:.2f} billion weights a token"
        yield MIXTURE


def _body(simulation: Simulation, layout: RingLayout, catalogue: Catalogue) -> Iterator[str]:
    question, ring = simulation.question, simulation.ring
    yield f"layout        {_layout(layout)}"
    if layout.num_rings > 1:
        yield f"              the figures of a ring are those of one with {_users(ring.users)}"
    if ring.users > MAX_LIVE:
        yield f"              a ring takes {MAX_LIVE} users at once; {ring.users - MAX_LIVE} wait for a place"
    yield ""
    yield from _stages(simulation)
    yield ""
    figures = dict(simulation.figures)

    def line(title: str, text: str, name: str) -> str:
        return f"{title:<14}{text:<60}  {figures[name].mark}"

    rate = figures["rate_tokens_per_s"].value
    batches = f"micro-batches of {ring.plan.cap}"
    yield line("rate", f"{_rate(rate)} tokens/s for {_users(question.users)} in {batches}", "rate_tokens_per_s")
    yield line("one user", f"{_rate(figures['one_user_tokens_per_s'].value)} tokens/s alone", "one_user_tokens_per_s")
    yield line(
        "tokens",
        f"one every {1_000 * figures['between_tokens_s'].value:.0f} ms for each user",
        "between_tokens_s",
    )
    first = f"{figures['first_token_s'].value:.1f} s for a prompt of {question.prompt_tokens} tokens alone in the ring"
    yield line("first token", first, "first_token_s")
    prompts = f"{figures['prompt_rate_tokens_per_s'].value:,.0f} tokens/s of long prompts while nothing is decoded"
    yield line("prompts", prompts, "prompt_rate_tokens_per_s")
    yield line(
        "network",
        f"{figures['network_bytes_per_token'].value:,.0f} bytes a token, on {len(ring.plan.hops)} hops together",
        "network_bytes_per_token",
    )
    if "ring_watts" in figures:
        watts = f"{figures['ring_watts'].value:.0f} W a ring, {figures['joules_per_token'].value:.1f} J a token"
        yield line("power", watts, "ring_watts")
    else:
        yield "power         not known: a device has no idle_w and load_w in the catalogue"
    yield f"limited by    {simulation.limit}"
    if simulation.left_out:
        left_out = simulation.left_out
        names = ", ".join(left_out) if len(left_out) <= _SHOWN else f"{len(left_out)} of them"
        yield f"left out      {names}: a ring is not faster with more"
    yield from _one_more(simulation)
    yield from _others(simulation, layout)
    yield from _next(simulation, layout, catalogue)


def _stages(simulation: Simulation) -> Iterator[str]:
    head = ("node", "layers", "weights MiB", "KV MiB", "process MiB", "free MiB", "busy %", "watts", "memory is")
    rows = [
        (
            str(stage.node),
            stage.layers,
            f"{stage.weight_bytes / _MIB:,.0f}",
            f"{stage.kv_bytes / _MIB:,.0f}",
            f"{stage.other_bytes / _MIB:,.0f}",
            f"{stage.free_bytes / _MIB:,.0f}",
            f"{100 * stage.busy:.0f}",
            "-" if stage.watts is None else f"{stage.watts.value:.1f}",
            str(stage.memory),
        )
        for stage in simulation.stages
    ]
    yield from _table([head, *_shortened(rows)])


def _shortened(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the rows, or of many the first and last ones with a row of dots between."""
    if len(rows) <= 16:
        return list(rows)
    return [*rows[:8], tuple("..." for _ in rows[0]), *rows[-4:]]


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for name, *figures in rows:
        cells = (figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True))
        yield "  ".join([name.ljust(widths[0]), *cells])


def _layout(layout: RingLayout) -> str:
    if layout.num_rings == 1:
        number = layout.num_used
        return "one device alone" if number == 1 else f"one ring of {number} devices"
    sizes = sorted({len(ring.plan.stages) for _, ring in layout.rings})
    if sizes == [1]:
        return f"{layout.num_rings} whole copies, a device each, with a router before them"
    return (
        f"{layout.num_rings} rings of {' or '.join(map(str, sizes))} devices, with a router before them; "
        f"{layout.num_used} devices in use"
    )


def _one_more(simulation: Simulation) -> Iterator[str]:
    if not simulation.one_more:
        return
    yield ""
    yield "one ring with one more device"
    width = max(len(each.device) for each in simulation.one_more)
    for each in simulation.one_more:
        if each.rate is None:
            yield f"  {each.device:<{width}}  does not fit"
        else:
            change = "the same" if abs(each.change) < _SAME else f"{100 * each.change:+.0f} %"
            yield f"  {each.device:<{width}}  {_rate(each.rate)} tokens/s, {change}"


def _others(simulation: Simulation, layout: RingLayout) -> Iterator[str]:
    if not simulation.others:
        return
    yield ""
    yield "other layouts"
    rings = [(layout.num_rings, layout.rate, layout.num_used), *simulation.others]
    shown = sorted(rings)[:: max(len(rings) // 8, 1)]
    for number, rate, used in sorted({*shown, rings[0]}):
        kind = f"{'ring' if number == 1 else 'rings':<5}"
        mark = "  <" if number == layout.num_rings else ""
        yield f"  {number:>4} {kind}  {_rate(rate):>9} tokens/s  {used:>4} devices{mark}"


def _next(simulation: Simulation, layout: RingLayout, catalogue: Catalogue) -> Iterator[str]:
    if not simulation.next_limits:
        return
    question, ring = simulation.question, simulation.ring
    yield ""
    yield "the next limits, in tokens/s of all rings together"
    for limit in simulation.next_limits:
        yield f"  {limit.name:<15}{limit.at_tokens_per_s:>12,.0f}  {limit.mark:<9}  {limit.text}"
    within_s, starters_s = upload_s(question, ring, layout.num_rings)
    mark = weakest([question.link.bytes_per_s.mark, question.shape.mark])
    yield f"  weights before the first start: {_minutes(within_s)} within a ring" + (
        f", {_minutes(starters_s)} to all Starters from one place  ({mark})" if layout.num_rings > 1 else f"  ({mark})"
    )


def _rate(tokens_per_s: float) -> str:
    """Return a rate with enough digits to see a difference of some percent, also below a token a second."""
    return f"{tokens_per_s:.{1 if tokens_per_s >= 10 else 2}f}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _users(users: int) -> str:
    return "1 user" if users == 1 else f"{users} users"
