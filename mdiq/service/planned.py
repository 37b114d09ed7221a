"""Layers that a topology leaves to the planner, from what its nodes measured.

Before the first ring of a topology its nodes measure a few layers each. Those figures are kept in the cache folder, as
are those of every ring, and the next one is planned from them.
"""

import contextlib
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import structlog

from mdiq.cache import cache_directory, keep_small
from mdiq.config.load import LoadedTopology
from mdiq.config.topology import Topology
from mdiq.errors import ConfigError
from mdiq.plan.explain import reason
from mdiq.plan.measured import MeasuredRing, Profiles, differing_kinds, from_json, profiles_of, to_json
from mdiq.plan.partition import Goal, Objective
from mdiq.plan.plan import LeftOut, Plan, make_plan

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class PlannedRing:
    """A topology with the nodes that take part, and how many layers each has; None: by hand, or not planned yet.

    plan: what they follow from. left_out: the nodes that take no part, and why. notes: what an operator should know of
    it. is_unmeasured: there is no plan before some of the nodes have measured themselves.
    """

    loaded: LoadedTopology
    layers: tuple[int, ...] | None = None
    plan: Plan | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    is_unmeasured: bool = False


def planned_ring(
    loaded: LoadedTopology,
    profiles: Profiles | None,
    num_layers: int,
    max_bytes: Mapping[str, int] = MappingProxyType({}),
) -> PlannedRing:
    """Return the ring that the planner makes of a topology with ``auto`` layers, if it knows all of its nodes.

    num_layers: of the model as it is now. max_bytes: memory of some nodes, where that is less than they say.

    Raises:
        PlanError: the model does not fit.
    """
    topology = loaded.topology
    nodes = topology.ring_nodes
    if len(nodes) < 2 or any(node.layers is not None for node in nodes):
        return PlannedRing(loaded)
    # Another model under the old name has other Layers.
    if profiles is None or profiles.model.num_layers != num_layers:
        return PlannedRing(loaded, notes=("the nodes measure themselves first",), is_unmeasured=True)
    limits = {node.name: node.memory_bytes for node in nodes}
    limits |= {name: min(limits[name] or most, most) for name, most in max_bytes.items() if name in limits}
    known = profiles.of([node.name for node in nodes], limits)
    if known is None:
        new = ", ".join(profiles.unknown([node.name for node in nodes]))
        return PlannedRing(loaded, notes=(f"{new}: not measured yet; the nodes measure first",), is_unmeasured=True)
    goal = goal_of(topology)
    plan = make_plan(profiles.model, known, profiles.links, goal)
    left_out = {str(node.node): _reason(plan, node) for node in plan.left_out}
    layers = ", ".join(f"{stage.node} {len(stage.layers)}" for stage in plan.stages)
    notes = (
        f"layers as planned: {layers}; {plan.value:.1f} tokens/s predicted for "
        + ("one user" if goal.num_users == 1 else f"{goal.num_users} users"),
        *(f"left out: {name}: {why}" for name, why in left_out.items()),
    )
    kinds = differing_kinds({str(stage.node): profiles.nodes[stage.node].cpu for stage in plan.stages})
    if kinds and topology.model.mode == "exact":
        notes += (f"kinds of CPU differ, so another split may give other tokens: {kinds}",)
    return PlannedRing(
        without(loaded, left_out),
        tuple(len(stage.layers) for stage in plan.stages),
        plan,
        left_out,
        notes,
    )


def _reason(plan: Plan, node: LeftOut) -> str:
    """Return why the plan leaves a node out, short enough for a status line."""
    if node.rate_with is None:
        return reason(plan, node)
    return f"{100 * (1 - node.rate_with / plan.value):.0f} % slower with it"


def goal_of(topology: Topology, objective: Objective | None = None, users: int | None = None) -> Goal:
    """Return what a topology's ring is planned for. objective, users: in place of the topology's."""
    wishes = topology.ring
    if objective is None:  # users alone ask for a plan for several
        objective = Objective(wishes.objective) if users is None else Objective.THROUGHPUT
    num_users = 1 if objective is Objective.LATENCY else users or wishes.users
    return Goal(objective, num_users, kv_tokens=wishes.kv_tokens, min_starter_layers=wishes.min_starter_layers)


def without(loaded: LoadedTopology, names: Collection[str]) -> LoadedTopology:
    """Return a topology without these nodes.

    Raises:
        ConfigError: there is no ring without one of them.
    """
    if not names:
        return loaded
    topology = loaded.topology
    workers = [node.name for node in topology.ring_nodes[1:]]
    for name in sorted(names):
        if name == topology.starter.name:
            raise ConfigError(f"{name}: it is the Starter, and there is no ring without it; stop mdiq serve instead")
        if name not in workers:
            raise ConfigError(f"{name}: the ring has no such node; its workers are {', '.join(workers) or 'none'}")
    if any(node.layers is not None for node in topology.ring_nodes):
        raise ConfigError(f"{loaded.file}: layers by hand leave none for another node; write auto to drain one")
    nodes = tuple(node for node in topology.nodes if node.name not in names)
    return replace(loaded, topology=topology.model_copy(update={"nodes": nodes}))


def read_profiles(loaded: LoadedTopology) -> Profiles | None:
    """Return what earlier rings of a topology measured, or None."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return from_json(profiles_path(loaded).read_text(encoding="utf-8"))
    return None


def keep_profiles(loaded: LoadedTopology, ring: MeasuredRing) -> Profiles | None:
    """Keep what a ring measured, and return it with what was known; what cannot be written is measured again."""
    profiles = profiles_of(ring, loaded.topology.model.weights, read_profiles(loaded))
    if profiles is None:
        return None
    write_profiles(loaded, profiles)
    return profiles


def write_profiles(loaded: LoadedTopology, profiles: Profiles) -> None:
    """Write what is known of a topology's nodes; what cannot be written is measured again."""
    path = profiles_path(loaded)
    try:
        keep_small(path, to_json(profiles).encode())
    except OSError as error:
        log.warning("measurements_not_kept", path=str(path.parent), error=error.strerror)


def profiles_path(loaded: LoadedTopology) -> Path:
    """Return where the figures of a topology's nodes are kept, for its model and weights."""
    return cache_directory() / "profiles" / f"{_key(loaded.topology, loaded.file)}.json"


def _key(topology: Topology, file: Path) -> str:
    # A node's figures are those of one model in one format.
    text = "|".join((str(file.resolve()), topology.model.path, topology.model.weights, topology.model.dtype))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
