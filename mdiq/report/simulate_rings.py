"""Rings of devices that one need not own: their plans, and which layout of many devices is best. Pure.

Split and pace are those of plan/; this decides only which devices form a ring and how the users spread over rings.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mdiq.core.types import NodeId
from mdiq.plan.micro_batches import MAX_LIVE
from mdiq.plan.partition import Goal, Objective, find_split
from mdiq.plan.plan import Plan, plan_split
from mdiq.plan.profile import ModelShape, NodeProfile
from mdiq.plan.room import check_room
from mdiq.report.catalogue import Device, LinkKind, Shape
from mdiq.report.simulate_nodes import Held, links_of, model_shape, node_profile

KV_STEP = 32  # tokens of a KvBlock
MAX_DEVICES = 1_000
_MAX_LAYOUTS = 24
_SAME = 1.02  # rates that differ by less are the same


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

    def device_of(self, node: NodeId) -> Device:
        return dict(zip(node_names(self.devices), self.devices, strict=True))[node]

    @property
    def used(self) -> list[Device]:
        """The devices that hold Layers, in ring order."""
        return [self.device_of(stage.node) for stage in self.plan.stages]


@dataclass(frozen=True, slots=True)
class Layout:
    """Some rings and how many there are of each kind. rings: [(how many, ring)]."""

    rings: tuple[tuple[int, RingForecast], ...]

    @property
    def num_rings(self) -> int:
        return sum(count for count, _ in self.rings)

    @property
    def rate(self) -> float:
        return sum(count * ring.rate for count, ring in self.rings)

    @property
    def num_used(self) -> int:
        """Devices that hold Layers."""
        return sum(count * len(ring.plan.stages) for count, ring in self.rings)


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


def forecast(question: Question, devices: Sequence[Device], users: int, num_rings: int = 1) -> RingForecast | None:
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


def layout_of(question: Question, num_rings: int) -> Layout | None:
    """Return the devices as so many rings, each with as good a share of them as can be; None where one does not fit."""
    ordered = in_ring_order(question, question.devices)
    dealt = Counter(
        (in_ring_order(question, ordered[i::num_rings]), question.users // num_rings + (i < question.users % num_rings))
        for i in range(num_rings)
    )
    rings: list[tuple[int, RingForecast]] = []
    for (devices, users), count in dealt.items():
        if users:  # a ring without users adds nothing
            ring = forecast(question, devices, users, num_rings)
            if ring is None:
                return None
            rings.append((count, ring))
    return Layout(tuple(rings))


def layouts(question: Question) -> Iterator[Layout]:
    """Yield the layouts that are worth a look, those with the fewest rings first."""
    for num_rings in _numbers_of_rings(len(question.devices), question.users):
        layout = layout_of(question, num_rings)
        if layout is not None:
            yield layout


def best_of(found: Sequence[Layout]) -> Layout:
    """Return the layout with the highest rate; of nearly equal ones that with fewest devices, then with most rings."""
    best = max(layout.rate for layout in found)
    equal = [layout for layout in found if layout.rate * _SAME >= best]
    return min(equal, key=lambda layout: (layout.num_used, -layout.num_rings))


def _numbers_of_rings(num_devices: int, users: int) -> list[int]:
    """Return the numbers of rings to try: each that a size of the rings gives, or some of them, evenly spread."""
    numbers = sorted({num_devices // size for size in range(1, num_devices + 1)})
    numbers = [number for number in numbers if number <= users]
    if len(numbers) <= _MAX_LAYOUTS:
        return numbers
    step = (len(numbers) - 1) / (_MAX_LAYOUTS - 1)
    return sorted({numbers[round(i * step)] for i in range(_MAX_LAYOUTS)})
