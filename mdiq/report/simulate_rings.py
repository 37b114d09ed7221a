"""Rings of devices that one need not own: their plans, and which layout of many devices is best. Pure.

Split and pace are those of plan/, and so is the rule that divides the devices (plan/divide.py).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

from mdiq.core.types import NodeId
from mdiq.plan.divide import Layout, best_of, divisions, lay_out
from mdiq.plan.micro_batches import MAX_LIVE
from mdiq.plan.partition import Goal, Objective, find_split
from mdiq.plan.plan import Plan, plan_split
from mdiq.plan.profile import ModelShape, NodeProfile
from mdiq.plan.room import check_room
from mdiq.report.catalogue import Device, LinkKind, Shape
from mdiq.report.simulate_nodes import Held, links_of, model_shape, node_profile

KV_STEP = 32  # tokens of a KvBlock
MAX_DEVICES = 1_000


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be predicted. users: requests at once, each with so many tokens of prompt and answer."""

    shape: Shape
    held: Held
    devices: tuple[Device, ...]
    link: LinkKind
    users: int = 1
    prompt_tokens: int = 512
    answer_tokens: int = 256

    @property
    def model(self) -> ModelShape:
        return model_shape(self.shape, self.held)

    def goal(self, users: int) -> Goal:
        """Return the planner's goal for so many users of one ring; more than a ring takes at once wait."""
        users = min(users, MAX_LIVE)
        tokens = self.prompt_tokens + self.answer_tokens
        return Goal(
            Objective.THROUGHPUT if users > 1 else Objective.LATENCY,
            users,
            kv_tokens=users * -(-tokens // KV_STEP) * KV_STEP,
            # On average, an answer is half done.
            context_tokens=self.prompt_tokens + self.answer_tokens // 2,
        )


@dataclass(frozen=True, slots=True)
class RingForecast:
    """One ring. plan: for its users; alone: the same split with all of a shared link, for one user.

    devices: in the planner's order, the Starter first; some may be left out of the plan.
    """

    devices: tuple[Device, ...]
    users: int
    plan: Plan
    alone: Plan

    @property
    def rate(self) -> float:
        """Tokens per second of all its users together."""
        return self.plan.rate if self.users > 1 else self.alone.rate_one

    @property
    def num_used(self) -> int:
        """Devices that hold Layers."""
        return len(self.plan.stages)

    def device_of(self, node: NodeId) -> Device:
        return dict(zip(node_names(self.devices), self.devices, strict=True))[node]

    @property
    def used(self) -> list[Device]:
        """The devices that hold Layers, in ring order."""
        return [self.device_of(stage.node) for stage in self.plan.stages]


RingLayout = Layout[RingForecast]


def node_names(devices: Sequence[Device]) -> list[NodeId]:
    """Return a name for each device of a ring: its kind and a number."""
    seen: Counter[str] = Counter()
    names = []
    for device in devices:
        seen[device.name] += 1
        names.append(NodeId(f"{device.name}-{seen[device.name]}"))
    return names


def in_ring_order(question: Question, devices: Sequence[Device]) -> tuple[Device, ...]:
    """Return devices as a ring is planned: the Starter first, which is the fastest that can hold the model's ends."""
    ends_bytes = question.model.ends_bytes + question.model.activation_bytes
    return tuple(
        sorted(
            devices,
            key=lambda device: (
                device.memory_bytes.value - device.process_bytes.value > ends_bytes,
                device.read_bytes_per_s.value,
            ),
            reverse=True,
        )
    )


def node_profiles(question: Question, devices: Sequence[Device]) -> list[NodeProfile]:
    names = node_names(devices)
    known: dict[Device, NodeProfile] = {}
    for device in devices:
        if device not in known:
            known[device] = node_profile("", device, question.shape, question.held)
    return [replace(known[device], name=name) for name, device in zip(names, devices, strict=True)]


def forecast(question: Question, devices: Sequence[Device], users: int, num_rings: float = 1) -> RingForecast | None:
    """Return the best ring of some of these devices, the Starter first; None when the model does not fit.

    num_rings: rings like this that share the link, where it is a shared one.
    """
    devices = tuple(devices[: question.shape.num_layers])  # each has a Layer at least
    nodes, goal, model = node_profiles(question, devices), question.goal(users), question.model
    found = find_split(model, nodes, links_of(question.link, num_rings * len(devices)), goal)
    if found is None:
        return None
    split, _ = found
    num_hops = num_rings * sum(n > 0 for n in split)
    plan = plan_split(model, nodes, links_of(question.link, num_hops), goal, split)
    one = replace(goal, objective=Objective.LATENCY, num_users=1)
    return RingForecast(devices, users, plan, plan_split(model, nodes, links_of(question.link, 1), one, split))


def check_fits(question: Question, devices: Sequence[Device]) -> None:
    """Check that one ring of all these devices holds the model for all users.

    Raises:
        PlanError: it does not; it says what is missing and what would help.
    """
    check_room(question.model, node_profiles(question, devices), question.goal(question.users))


def holds(question: Question, num_rings: int) -> bool:
    """Return whether the devices, divided into so many rings, have room for the model in each.

    One ring has the KV cache of all users, and each of several that of one user at least.
    """
    goal, model = question.goal(question.users if num_rings == 1 else 1), question.model
    room: dict[tuple[Device, bool], int] = {}

    def layers(device: Device, is_starter: bool) -> int:
        if (device, is_starter) not in room:
            (node,) = node_profiles(question, [device])
            room[device, is_starter] = node.max_layers(model, goal.kv_tokens, is_starter=is_starter)
        return room[device, is_starter]

    def is_held(devices: Sequence[Device]) -> bool:
        held = [layers(device, not i) for i, device in enumerate(devices[: model.num_layers])]
        return held[0] > 0 and sum(held) >= model.num_layers

    ordered = in_ring_order(question, question.devices)
    return any(all(map(is_held, division)) for division in divisions(ordered, question.users, num_rings))


def layouts(question: Question, num_rings: int | None = None) -> list[RingLayout]:
    """Return the best layout for each number of rings.

    num_rings: the devices are divided into so many, and each has room for the model.
    """

    @cache
    def ring(all_devices: int, devices: tuple[Device, ...], users: int) -> RingForecast | None:
        # The others' Hops, as if each ring used the same part of its devices.
        return forecast(question, devices, users, all_devices / len(devices) if all_devices else 1)

    found: dict[int, list[RingLayout]] = {}
    for division in divisions(in_ring_order(question, question.devices), question.users, num_rings):
        in_rings = sum(count * len(devices) for devices, count in division.items() if len(devices) > 1)
        of_division = partial(ring, in_rings if question.link.is_shared else 0)
        if num_rings is None or all(of_division(devices, 1) for devices in division):
            layout = lay_out(division, question.users, of_division)
            if layout is not None:
                found.setdefault(layout.num_rings, []).append(layout)
    return [best_of(found[number]) for number in sorted(found)]
