"""The Rings of a topology: which Nodes take part, and with which Layers, as planned from what they measured."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdiq.cli.planned import keep_profiles, planned_ring, read_profiles, without
from mdiq.cli.ring_file import flags_of, remote_ring
from mdiq.core.ring import RingSettings
from mdiq.core.types import LayerRange
from mdiq.errors import PlanError
from mdiq.plan.measured import MeasuredRing
from mdiq.plan.pace import PaceSettings
from mdiq.plan.split import check_split, split_layers
from mdiq.runtime.options import RingOptions, StandingBy, parse_wires

if TYPE_CHECKING:  # torch is imported behind set_threads
    from mdiq.config.load import LoadedTopology
    from mdiq.engine.model_config import ModelConfig

SURVEY_LAYERS = 4
SURVEY_KV_TOKENS = 2_048  # what engine/measure.py asks for: 16 Sequences with their context


class TopologyRings:
    """Gives the options of a topology's next Ring.

    What Nodes measured in earlier Rings is read once, so a Ring that is formed again is the same; what a survey finds
    is taken up by ``keep``.

    on_note: told what an operator should know of a plan. even_split: share ``auto`` Layers evenly, measure nothing.
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
    ) -> None:
        self._loaded = loaded
        self._model = model
        self._config = config
        self._threads = threads
        self._join_wait_s = join_wait_s
        self._even_split = even_split
        self._on_note = on_note
        self._told: tuple[str, ...] = ()
        self._profiles = None if even_split else read_profiles(loaded)

    def options(self, drained: frozenset[str] = frozenset()) -> RingOptions:
        """Return the next Ring, a survey where Nodes are not measured yet.

        Raises:
            ConfigError: the topology cannot be used, or there is no Ring without the Nodes that are drained.
            PlanError: the model does not fit, or layers by hand do not cover it.
        """
        loaded = without(self._loaded, drained)
        num_layers = self._config.num_layers
        idle = {node.name: "it is a spare" for node in loaded.topology.spares} | dict.fromkeys(drained, "it is drained")
        if self._even_split:
            return self._options(loaded, None, idle)
        planned = planned_ring(loaded, self._profiles, num_layers)
        if planned.notes != self._told:
            self._told = planned.notes
            for note in planned.notes:
                self._on_note(note)
        return self._options(
            planned.loaded,
            planned.layers,
            idle | {name: f"the plan leaves it out: {why}" for name, why in planned.left_out.items()},
            is_survey=planned.is_unmeasured,
        )

    def keep(self, measured: MeasuredRing, *, is_survey: bool = False) -> None:
        """Keep what a Ring measured, for later ones; of a survey, for the next one already."""
        profiles = keep_profiles(self._loaded, measured)
        if is_survey:
            self._profiles = profiles

    def _options(
        self,
        loaded: "LoadedTopology",
        planned: tuple[int, ...] | None,
        idle: Mapping[str, str],
        *,
        is_survey: bool = False,
    ) -> RingOptions:
        flags = flags_of(loaded)
        remote = replace(
            remote_ring(loaded, self._join_wait_s),
            standing_by=tuple(
                StandingBy(name, self._loaded.topology.node(name).public_key, reason) for name, reason in idle.items()
            ),
        )
        layers = self._layers(planned, flags, len(remote.nodes))
        if is_survey:
            layers = tuple(LayerRange(r.start, min(r.start + SURVEY_LAYERS, r.stop)) for r in layers)
        return RingOptions(
            model=self._model,
            layers=layers,
            dtype=flags["dtype"],
            weights=flags["weights"],
            exact=flags["exact"],
            wires=parse_wires(flags["wire"], len(remote.nodes)),
            device=flags["device"],
            threads=self._threads,
            kv_tokens=SURVEY_KV_TOKENS if is_survey else None,
            pace=PaceSettings(decode_wait_s=flags["decode_wait_ms"] / 1_000, max_live=flags["max_live"]),
            ring=RingSettings(prefix_tokens=None if flags["prefix_reuse"] else 0),
            remote=remote,
            is_survey=is_survey,
        )

    def _layers(
        self, planned: tuple[int, ...] | None, flags: Mapping[str, Any], num_nodes: int
    ) -> tuple[LayerRange, ...]:
        num_layers = self._config.num_layers
        if planned is not None:
            return check_split(list(planned), num_layers)
        if flags["layers"] is not None:
            return check_split([int(number) for number in flags["layers"].split(",")], num_layers)
        if num_nodes > num_layers:
            raise PlanError(
                f"{self._loaded.file}: {num_nodes} nodes and a model of {num_layers} layers; every node of the ring "
                "needs one: make some of them spares"
            )
        return split_layers(num_layers, num_nodes, self._config.head_layers)
