"""The Rings of a topology: which Nodes take part, and with which Layers, as planned from what they measured."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mdiq.core.ring_settings import RingSettings
from mdiq.core.types import LayerRange, NodeId
from mdiq.errors import CapacityError, MdiqError, NodeDiedError, PlanError
from mdiq.plan.handling import is_news
from mdiq.plan.measured import MeasuredRing, Profiles
from mdiq.plan.pace import PaceSettings
from mdiq.plan.plan import Plan, plan_split
from mdiq.plan.room import format_bytes
from mdiq.plan.split import check_split, split_layers
from mdiq.runtime.options import Outages, RingOptions, StandingBy
from mdiq.service.planned import (
    goal_of,
    keep_profiles,
    planned_ring,
    profiles_path,
    read_profiles,
    without,
    write_profiles,
)
from mdiq.service.topology_values import remote_nodes, remote_ring, weights_of, wires_of

if TYPE_CHECKING:  # torch is imported after set_threads
    from mdiq.config.load import LoadedTopology
    from mdiq.config.topology import Topology
    from mdiq.engine.model_config import ModelConfig

SURVEY_LAYERS = 4
SURVEY_KV_TOKENS = 2_048  # what engine/measure.py asks for: 16 Sequences with their context
BETTER = 1.1  # a predicted gain that is worth forming the ring again; figures of one ring differ by less
SMALLER = 0.9  # of the memory that a node was planned with and did not have
NEWS = 0.05  # of a factor
MAX_CHANGES = 2  # of the plan of one topology in one process: figures that swing must not move layers for ever


class TopologyRings:
    """Gives the options of a topology's next Ring.

    What Nodes measured in earlier Rings is read once, so a Ring that is formed again is the same. What a survey finds
    is taken up by ``keep``. What a serving Ring finds is kept for later processes, and taken up only if it predicts
    ``BETTER`` times the rate with another split, at most ``MAX_CHANGES`` times. What load shows of the Nodes is kept in
    the same way, and taken up by ``take_up``; replanning.py decides that.

    A split to which a Ring could not change is not planned again.

    A Node whose memory did not hold what it was to load is planned with less from then on; so is one that died twice
    while it loaded the same Layers. One that has no room for a survey is left out.

    on_note: called with what an operator should know of a plan. even_split: share ``auto`` Layers evenly, measure
    nothing. before: the same of an earlier reading of the file: its figures stay.
    """

    def __init__(
        self,
        loaded: "LoadedTopology",
        model: Path,
        config: "ModelConfig",
        *,
        threads: int,
        join_wait_s: float,
        even_split: bool,
        on_note: Callable[[str], None],
        before: "TopologyRings | None" = None,
    ) -> None:
        self._loaded = loaded
        self._model = model
        self._config = config
        self._threads = threads
        self._join_wait_s = join_wait_s
        self._even_split = even_split
        self._on_note = on_note
        self._told: tuple[str, ...] = ()
        self._drained: frozenset[str] = frozenset()
        self._no_more: frozenset[str] = frozenset()  # drained, and no workers any more since the file was read again
        if before is not None:
            workers = {node.name for node in loaded.topology.ring_nodes[1:]}
            self._no_more = (before._drained | before._no_more) - workers
        self._num_changes = 0
        self._max_bytes: dict[str, int] = {}  # of memory, learnt by failures
        self._unfit: dict[str, str] = {}  # Nodes that cannot even measure, and why
        self._died: tuple[str, tuple[LayerRange, ...]] | None = None  # a Node, and the Ring that was formed then
        self._failed: set[frozenset[tuple[str, int]]] = set()  # splits to which a Ring could not change
        self._profiles: Profiles | None = None  # with which Rings are planned
        self._profiles_before: Profiles | None = None  # with which the Ring was planned that was to change
        self.measured: Profiles | None = None  # the newest
        self._written: Profiles | None = None
        self._is_kept = False  # the figures, in a file
        if even_split:
            return
        path = profiles_path(loaded)
        is_forgotten = before is not None and before._is_kept and not path.exists()  # mdiq plan --forget
        if before is not None and profiles_path(before._loaded) == path and not is_forgotten:
            self._profiles, self._profiles_before = before._profiles, before._profiles_before
            self.measured, self._written = before.measured, before._written
            if before._loaded.topology == loaded.topology:
                self._num_changes, self._told = before._num_changes, before._told
                self._max_bytes, self._unfit, self._failed = before._max_bytes, before._unfit, before._failed
        self._profiles = self._profiles or read_profiles(loaded)
        self.measured = self.measured or self._profiles
        self._is_kept = path.exists()

    def options(self, drained: frozenset[str] = frozenset()) -> RingOptions:
        """Return the next Ring, a survey where Nodes are not measured yet.

        Raises:
            ConfigError: the topology cannot be used, or there is no Ring without the Nodes that are drained.
            PlanError: the model does not fit, or layers by hand do not cover it.
        """
        drained -= self._no_more
        loaded = without(self._loaded, drained | self._unfit.keys())
        num_layers = self._config.num_layers
        idle = {node.name: "it is a spare" for node in loaded.topology.spares} | self._unfit
        idle |= dict.fromkeys(drained, "it is drained")
        if self._even_split:
            self._drained = drained
            return self._options(loaded, None, idle)
        planned = planned_ring(loaded, self._profiles, num_layers, self._max_bytes)
        self._drained = drained
        if planned.notes != self._told:
            self._told = planned.notes
            for note in planned.notes:
                self._on_note(note)
        return self._options(
            planned.loaded,
            planned.layers,
            idle | {name: f"the plan leaves it out: {why}" for name, why in planned.left_out.items()},
            left_out=planned.left_out,
            is_survey=planned.is_unmeasured,
        )

    def keep(self, measured: MeasuredRing, *, is_survey: bool = False) -> None:
        """Keep what a Ring measured; see the class for what this process does with it."""
        profiles = keep_profiles(self._loaded, measured)
        self._is_kept = profiles_path(self._loaded).exists()
        self.measured = self._written = profiles
        if is_survey:
            self._profiles = profiles
        elif profiles is not None and not self._even_split and self._num_changes < MAX_CHANGES:
            self._take_up(profiles, {stage.name: stage.num_layers for stage in measured.stages})

    def best(self, profiles: Profiles) -> Mapping[str, int] | None:
        """Return the best split by these figures; None if there is none, or a Ring could not change to it."""
        if (plan := self._plan(profiles)) is None or self._even_split:
            return None
        split = _split_of(plan)
        return None if frozenset(split.items()) in self._failed else split

    def value(self, profiles: Profiles, split: Mapping[str, int]) -> float | None:
        """Return the rate that is predicted of a split, or None where the figures say nothing of it."""
        try:
            return _value_of(self._usable, profiles, split)
        except MdiqError:
            return None

    def under_load(self) -> Mapping[str, float]:
        """Return how many times as long Nodes take while they serve, of those that have been seen to."""
        nodes = self.measured.nodes if self.measured else {}
        return {name: node.under_load for name, node in nodes.items() if node.under_load is not None}

    def keep_load(self, profiles: Profiles) -> None:
        """Keep figures with what load has shown, for later processes too, unless an operator has them forgotten."""
        self.measured = profiles
        if profiles_path(self._loaded).exists() and (self._written is None or _has_news(self._written, profiles)):
            write_profiles(self._loaded, profiles)
            self._written = profiles

    def take_up(self, profiles: Profiles, why: str) -> None:
        """Plan with figures from now on that load has shown, and say why."""
        self.keep_load(profiles)
        self._profiles_before, self._profiles = self._profiles, profiles
        self._on_note(why)

    def note_not_changed(self, options: RingOptions) -> None:
        """Plan as before, and not this one again, since a Ring could not change to it."""
        split = dict(zip(options.node_names, map(len, options.layers), strict=True))
        self._failed.add(frozenset(split.items()))
        self.go_back()

    def go_back(self) -> None:
        """Plan with the figures from which the Ring that serves was planned."""
        if self._profiles_before is not None:
            self._profiles, self._profiles_before = self._profiles_before, None

    def note_failure(self, options: RingOptions, error: MdiqError) -> None:
        """Learn from a Ring that could not be formed, so that the same plan is not tried for ever."""
        if any(node.layers is not None for node in self._loaded.topology.ring_nodes):
            return  # nothing is planned
        starter = options.node_names[0]
        name = error.node or starter
        if isinstance(error, NodeDiedError) and self._died != (name, options.layers):
            self._died = (name, options.layers)  # it may have been stopped, or lost its power
            return
        if not isinstance(error, NodeDiedError | CapacityError) or name not in options.node_names:
            return
        num_layers = len(options.layers[options.node_names.index(name)])
        if options.is_survey and name != starter:
            self._unfit[name] = f"its memory does not hold {num_layers} layers to measure: {error}"
            what_to_do = "give it more memory in the topology and reload, or make room there and restart mdiq serve"
            self._on_note(f"left out: {name}: {self._unfit[name]}; {what_to_do}")
        elif self._profiles is not None and (profile := self._profiles.nodes.get(NodeId(name))) is not None:
            model = self._profiles.model
            layer_bytes = model.layer_bytes + goal_of(self._loaded.topology).kv_tokens * model.kv_bytes
            needed = profile.memory_bytes - profile.room_bytes(model, is_starter=name == starter)
            self._max_bytes[name] = most = int(SMALLER * (needed + num_layers * layer_bytes))
            self._on_note(
                f"{name}: its memory did not hold {num_layers} layers ({error}); it is planned with "
                f"{format_bytes(most)} from now on"
            )

    def _take_up(self, profiles: Profiles, split: Mapping[str, int]) -> None:
        """Plan with a Ring's own figures from now on, if they predict a much better Ring than this split."""
        plan, value = self._plan(profiles), self.value(profiles, split)
        if plan is None or (best := _split_of(plan)) == split or frozenset(best.items()) in self._failed:
            return
        if value is None or plan.value < BETTER * value:
            return
        self._profiles_before, self._profiles = self._profiles, profiles
        self._num_changes += 1
        self._on_note(
            f"a better split, by what the ring measured of itself: {_split_text(plan)}; {plan.value:.1f} tokens/s "
            f"predicted, and {value:.1f} as it is; the ring is formed with it the next time, and when it is idle"
        )

    def _plan(self, profiles: Profiles) -> Plan | None:
        """Return the Plan by these figures, or None if there is none."""
        try:
            return planned_ring(self._usable, profiles, self._config.num_layers, self._max_bytes).plan
        except MdiqError:
            return None  # a Ring that serves is better than none

    @property
    def _usable(self) -> "LoadedTopology":
        """The topology without the Nodes that take no part."""
        return without(self._loaded, self._drained | self._unfit.keys())

    def _options(
        self,
        loaded: "LoadedTopology",
        planned: tuple[int, ...] | None,
        idle: Mapping[str, str],
        *,
        left_out: Collection[str] = (),
        is_survey: bool = False,
    ) -> RingOptions:
        topology = loaded.topology
        without_work = remote_nodes(self._loaded.topology, map(self._loaded.topology.node, idle), with_noise=True)
        remote = replace(
            remote_ring(loaded, self._join_wait_s),
            standing_by=tuple(
                StandingBy(node.name, node.public_key, idle[node.name], node.name in left_out, node.noise)
                for node in without_work
            ),
            spares=remote_nodes(
                self._loaded.topology,
                [
                    node
                    for node in self._loaded.topology.nodes
                    if node.name in left_out or (node.spare and node.name not in self._unfit)
                ],
                with_noise=True,
            ),
        )
        # A survey serves nobody: what it sends is its own.
        min_first = 1 if is_survey else topology.ring.min_starter_layers
        layers = self._layers(planned, topology, min_first)
        if is_survey:
            layers = tuple(LayerRange(r.start, min(r.start + SURVEY_LAYERS, r.stop)) for r in layers)
        return RingOptions(
            model=self._model,
            layers=layers,
            weights=weights_of(topology),
            wires=wires_of(topology),
            threads=self._threads,
            kv_tokens=SURVEY_KV_TOKENS if is_survey else None,
            pace=PaceSettings(decode_wait_s=topology.ring.decode_wait_s, max_live=topology.ring.max_live),
            ring=RingSettings(prefix_tokens=None if topology.ring.prefix_reuse else 0),
            remote=remote,
            outages=Outages(topology.ring.silence_s, topology.ring.outage_tolerance_s),
            is_survey=is_survey,
        )

    def _layers(self, planned: tuple[int, ...] | None, topology: "Topology", min_first: int) -> tuple[LayerRange, ...]:
        num_layers, num_nodes = self._config.num_layers, len(topology.ring_nodes)
        if split := planned or [len(node.layers) for node in topology.ring_nodes if node.layers is not None]:
            return check_split(split, num_layers)
        if num_nodes > num_layers:
            raise PlanError(
                f"{self._loaded.file}: {num_nodes} nodes and a model of {num_layers} layers; every node of the ring "
                "needs one: make some of them spares"
            )
        return split_layers(num_layers, num_nodes, self._config.head_layers, min_first=min_first)


def _value_of(loaded: "LoadedTopology", profiles: Profiles, split: Mapping[str, int]) -> float | None:
    """Return the rate that is predicted of a split, or None where the figures say nothing of it."""
    nodes = loaded.topology.ring_nodes
    names = [node.name for node in nodes]
    known = profiles.of(names, {node.name: node.memory_bytes for node in nodes})
    if known is None:
        return None
    layers = tuple(split.get(name, 0) for name in names)
    try:
        return plan_split(profiles.model, known, profiles.links, goal_of(loaded.topology), layers).value
    except PlanError:
        return None  # it runs all the same


def _split_of(plan: Plan) -> dict[str, int]:
    return {str(stage.node): len(stage.layers) for stage in plan.stages}


def _has_news(before: Profiles, now: Profiles) -> bool:
    """Whether there is something else to write of a Node or a link: no need to write each minute."""
    return before.links != now.links or any(
        is_news(node.forward_s, before.nodes[name].forward_s)
        or node.under_load is not None
        and ((old := before.nodes[name].under_load) is None or abs(node.under_load / old - 1) > NEWS)
        for name, node in now.nodes.items()
    )


def _split_text(plan: Plan) -> str:
    return ", ".join(f"{stage.node} {len(stage.layers)}" for stage in plan.stages)
