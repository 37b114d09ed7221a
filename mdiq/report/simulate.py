"""Predict rings of devices that one need not own: `mdiq simulate`. Values in, values out; simulate_text.py shows them.

Split and rates are those of the planner (plan/), from profiles that the catalogue gives. Each figure has the mark of
the weakest figure that it was computed from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mdiq.core.types import NodeId
from mdiq.errors import PlanError
from mdiq.plan.divide import best_of
from mdiq.plan.first_token import first_token_s
from mdiq.plan.partition import find_split
from mdiq.plan.plan import Limit, LimitKind, Plan
from mdiq.plan.profile import FRAME_BYTES, SEGMENT_BYTES
from mdiq.report.catalogue import Catalogue, Device, Figure, Mark, weakest
from mdiq.report.simulate_nodes import is_bound_by_reading, link_mark, links_of, measured_layers, time_marks
from mdiq.report.simulate_rings import (
    MAX_DEVICES,
    Question,
    RingForecast,
    RingLayout,
    check_fits,
    holds,
    in_ring_order,
    layouts,
    node_names,
    node_profiles,
)


@dataclass(frozen=True, slots=True)
class StageForecast:
    """A Stage of the ring: its Layers, bytes on its device, and its share of time and power."""

    node: NodeId
    layers: str
    num_layers: int
    weight_bytes: int
    kv_bytes: int
    other_bytes: int
    free_bytes: int
    memory: Mark
    busy: float
    watts: Figure | None


@dataclass(frozen=True, slots=True)
class OneMore:
    """What one more device of a kind would bring to one ring; rate: None if the model still does not fit."""

    device: str
    rate: float | None
    change: float = 0.0


@dataclass(frozen=True, slots=True)
class NextLimit:
    """What would limit more of the same. at_tokens_per_s: of all rings together."""

    name: str
    at_tokens_per_s: float
    mark: Mark
    text: str


@dataclass(frozen=True, slots=True)
class Simulation:
    """The prediction for the best layout, and for its first ring.

    figures: by name, each with its unit at the end of the name. limit: what limits the ring, in words.
    others: rings, tokens per second and devices in use of the best layouts of other numbers of rings. needed: how many
    more devices of each kind would make the model fit num_rings rings, where why_not says why it does not; then the
    rest is empty.
    """

    question: Question
    why_not: str = ""
    needed: tuple[tuple[str, int], ...] = ()
    num_rings: int = 1
    layout: RingLayout | None = None
    figures: tuple[tuple[str, Figure], ...] = ()
    stages: tuple[StageForecast, ...] = ()
    limit: str = ""
    left_out: tuple[str, ...] = ()
    one_more: tuple[OneMore, ...] = ()
    others: tuple[tuple[int, float, int], ...] = ()
    next_limits: tuple[NextLimit, ...] = ()

    @property
    def ring(self) -> RingForecast:
        """The ring whose figures these are: the one with the most users."""
        assert self.layout is not None  # it fits
        return max((ring for _, ring in self.layout.rings), key=lambda ring: ring.users)

    def figure(self, name: str) -> Figure:
        return dict(self.figures)[name]


def simulate(question: Question, catalogue: Catalogue, num_rings: int | None = None) -> Simulation:
    """Return the prediction. num_rings: as many rings; None: as is best."""
    found = layouts(question, num_rings)
    if not found:
        return _misfit(question, catalogue, num_rings or 1)
    best = best_of(found)
    simulation = Simulation(question, layout=best)
    ring = simulation.ring
    return replace(
        simulation,
        figures=tuple(_figures(question, best, ring)),
        stages=tuple(_stages(question, ring)),
        limit=limit_text(question, ring, ring.plan if ring.users > 1 else ring.alone),
        left_out=tuple(str(name) for name in node_names(ring.devices) if ring.plan.layers(name) is None),
        one_more=tuple(_one_more(question, ring, catalogue)),
        others=tuple((other.num_rings, other.rate, other.num_used) for other in found if other is not best),
        next_limits=tuple(_next_limits(question, best, ring, catalogue)),
    )


def _misfit(question: Question, catalogue: Catalogue, num_rings: int) -> Simulation:
    """Return why the model does not fit, and how many more devices of each kind these rings would need."""
    devices = in_ring_order(question, question.devices)[::num_rings]
    why = f"{num_rings} rings: not every ring holds the model"
    try:
        check_fits(replace(question, users=-(-question.users // num_rings)), devices)
    except PlanError as error:
        why = str(error)
    kinds = catalogue.devices.values()
    needed = [(kind.name, number) for kind in kinds if (number := _needed(question, kind, num_rings))]
    return Simulation(question, why_not=why, needed=tuple(needed), num_rings=num_rings)


def _needed(question: Question, device: Device, num_rings: int) -> int:
    """Return how many more devices of a kind so many rings need; 0 where no number of them does."""
    (node,) = node_profiles(question, [device])
    one = question.goal(question.users if num_rings == 1 else 1).kv_tokens
    if not max(node.max_layers(question.model, one, is_starter=is_starter) for is_starter in (True, False)):
        return 0
    # Of its own kind, each ring has as many as it has layers at most.
    for number in range(1, min(num_rings * question.shape.num_layers, MAX_DEVICES - len(question.devices)) + 1):
        asked = replace(question, devices=(*question.devices, *[device] * number))
        if holds(asked, num_rings) and layouts(asked, num_rings):
            return number
    return 0


def _figures(question: Question, layout: RingLayout, ring: RingForecast) -> Iterator[tuple[str, Figure]]:
    shape = question.shape.mark
    times = [shape, *(mark for device in ring.used for mark in time_marks(device, question.shape, question.held))]
    if ring.plan.hops:
        times.append(link_mark(question.link))
    time = weakest(times)
    rate = ring.rate
    yield "rate_tokens_per_s", Figure(layout.rate, time)
    yield "ring_rate_tokens_per_s", Figure(rate, time)
    yield "one_user_tokens_per_s", Figure(ring.alone.rate_one, time)
    yield "between_tokens_s", Figure(min(ring.users, ring.plan.goal.num_users) / rate, time)
    yield "first_token_s", Figure(first_token_s(ring.alone, question.prompt_tokens), time)
    yield "prompt_rate_tokens_per_s", Figure(ring.plan.prompt_rate, time)
    yield "network_bytes_per_token", Figure(network_bytes(ring.plan), shape)
    watts = [_watts(ring, i) for i in range(len(ring.plan.stages))]
    known = [each for each in watts if each is not None]
    if len(known) == len(watts):
        # What computes for how long follows from the times.
        mark = weakest([time, *(each.mark for each in known)])
        total = sum(each.value for each in known)
        yield "ring_watts", Figure(total, mark)
        yield "joules_per_token", Figure(total / rate, mark)


def network_bytes(plan: Plan) -> float:
    """Return the bytes that one token's rows take on all Hops of the ring together, frames included.

    A Frame has as many rows as its micro-batch has users.
    """
    row = SEGMENT_BYTES + plan.model.row_bytes
    return len(plan.hops) * (row + FRAME_BYTES / plan.cap)


def _stages(question: Question, ring: RingForecast) -> Iterator[StageForecast]:
    for i, stage in enumerate(ring.plan.stages):
        device = ring.device_of(stage.node)
        kv_bytes = ring.plan.goal.kv_tokens * len(stage.layers) * ring.plan.model.kv_bytes  # for its users, no more
        yield StageForecast(
            node=stage.node,
            layers=str(stage.layers),
            num_layers=len(stage.layers),
            weight_bytes=stage.weight_bytes,
            kv_bytes=kv_bytes,
            other_bytes=stage.other_bytes,
            free_bytes=stage.memory_bytes - stage.weight_bytes - stage.other_bytes - kv_bytes,
            memory=weakest([question.shape.mark, device.memory_bytes.mark, device.process_bytes.mark]),
            busy=_busy(ring, i),
            watts=_watts(ring, i),
        )


def _busy(ring: RingForecast, i: int) -> float:
    """Return the share of the time in which a Stage computes, with the ring's users."""
    if ring.users > 1:
        return ring.plan.stages[i].busy
    return ring.alone.stages[i].cost.decode.seconds(1) * ring.alone.rate_one


def _watts(ring: RingForecast, i: int) -> Figure | None:
    """Return a device's power: idle, and what load adds for the share of the time in which it computes."""
    device = ring.device_of(ring.plan.stages[i].node)
    if device.idle_w is None or device.load_w is None:
        return None
    idle, load = device.idle_w, device.load_w
    watts = idle.value + min(_busy(ring, i), 1.0) * max(load.value - idle.value, 0.0)
    return Figure(watts, weakest([idle.mark, load.mark]))


def limit_text(question: Question, ring: RingForecast, plan: Plan) -> str:
    """Return what limits a ring, in words; of a computing device whether its memory or its arithmetic does."""
    limit: Limit = plan.limit
    if limit.kind is LimitKind.MEMORY:
        where = f"memory room of {limit.where}: with more of it, more layers would go there"
    elif limit.kind is LimitKind.HOP:
        hop = next(hop for hop in plan.hops if str(hop) == limit.where)
        part = "bandwidth" if hop.send.seconds(plan.cap) > hop.delay_s else "delay"
        where = f"link {limit.where}: its {part}"
    else:
        device = ring.device_of(NodeId(limit.where))
        if measured_layers(device, question.shape, question.held) is not None:
            where = f"computing of {limit.where}"
        elif is_bound_by_reading(device, question.shape, question.held, plan.cap):
            where = f"memory bandwidth of {limit.where}"
        else:
            where = f"compute rate of {limit.where}"
    if limit.is_waiting:
        return f"the time round the ring: {plan.goal.num_users} users do not fill it; the longest part is {where}"
    return where


def _one_more(question: Question, ring: RingForecast, catalogue: Catalogue) -> Iterator[OneMore]:
    kinds = {**catalogue.devices, **{device.name: device for device in question.devices}}
    model, goal = question.model, question.goal(ring.users)
    for device in kinds.values():
        devices = in_ring_order(question, [*ring.used, device])
        links = links_of(question.link, len(devices))
        found = find_split(model, node_profiles(question, devices), links, goal)
        yield OneMore(device.name, None) if found is None else OneMore(device.name, found[1], found[1] / ring.rate - 1)


def _next_limits(
    question: Question, layout: RingLayout, ring: RingForecast, catalogue: Catalogue
) -> Iterator[NextLimit]:
    plan, count = ring.plan, layout.num_rings
    starter = ring.device_of(plan.stages[0].node)
    time = weakest([question.shape.mark, *time_marks(starter, question.shape, question.held)])
    found: list[NextLimit] = []
    if count > 1 and catalogue.router_events_per_s is not None:
        events = catalogue.router_events_per_s
        found.append(
            NextLimit("router", events.value, events.mark, "one router passes on each token of each ring as an event")
        )
    if plan.hops:
        (profile,) = node_profiles(question, [starter])
        # As if all other Layers were elsewhere, and every device took part.
        one_layer_s = profile.fixed_s(plan.cap, is_starter=True) + profile.layer_s(plan.cap, plan.goal.context_tokens)
        text = f"the Starter's head and its one layer, for micro-batches of {plan.cap}"
        found.append(NextLimit("starter's head", count * plan.cap / one_layer_s, time, text))
        per_token = network_bytes(plan) / len(plan.hops)
        # A shared link carries all Hops of all rings.
        lines = 1 / len(plan.hops) if question.link.is_shared else count
        rate = lines * question.link.bytes_per_s.value / per_token
        mark = weakest([question.link.bytes_per_s.mark, question.shape.mark])
        found.append(NextLimit("links", rate, mark, f"{per_token:,.0f} bytes for each token on each hop"))
    yield from sorted(found, key=lambda limit: limit.at_tokens_per_s)


def upload_s(question: Question, ring: RingForecast, num_rings: int) -> tuple[float, float]:
    """Return how long the weights travel before a first start: within each ring, and to all Starters from one place."""
    plan, rate = ring.plan, question.link.bytes_per_s.value
    within = sum(stage.weight_bytes for stage in plan.stages[1:])
    whole = plan.model.stage_bytes(plan.model.num_layers, is_starter=True)
    shared = num_rings if question.link.is_shared else 1
    return shared * within / rate, num_rings * whole / rate


def sources(question: Question, devices: Sequence[Device], catalogue: Catalogue) -> list[tuple[str, Figure]]:
    """Return the figures on which a prediction rests, each with its source."""
    found: list[tuple[str, Figure]] = [
        (f"{question.shape.name}: sizes", Figure(question.shape.params, question.shape.mark, question.shape.source))
    ]
    for device in dict.fromkeys(devices):
        figures = {
            "memory, bytes": device.memory_bytes,
            "weights read, bytes/s": device.read_bytes_per_s,
            "operations/s": device.flop_per_s,
            "each forward, s": device.forward_s,
            "process, bytes": device.process_bytes,
            "idle, W": device.idle_w,
            "load, W": device.load_w,
        }
        found += [(f"{device.name}: {name}", figure) for name, figure in figures.items() if figure is not None]
    link = question.link
    found += [(f"{link.name}: bytes/s", link.bytes_per_s), (f"{link.name}: delay, s", link.delay_s)]
    if catalogue.router_events_per_s is not None:
        found.append(("router: events/s", catalogue.router_events_per_s))
    return found
