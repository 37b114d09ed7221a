"""What lives as long as the weights of a Ring: its Stages as they are loaded, their costs, and what they could hold."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mdiq.core import control
from mdiq.plan.pace import StageCost
from mdiq.runtime.options import RingOptions
from mdiq.runtime.takeover import Able, with_survivors

if TYPE_CHECKING:
    from mdiq.runtime.starter_stage import StarterStage

USUAL_BYTES_PER_S = 12.5e6
"""Of a link that was not measured: 100 Mbit/s."""
ROOM_SHARE = 0.8  # of the memory that is free: the rest is for the KV cache and other programs


@dataclass(frozen=True, slots=True)
class LoadedRing:
    """The Starter's Stage, what the other Nodes have, and what forwards cost; the last two in ring order.

    layer_bytes: of one Layer, as the other Nodes had it when the Ring was formed. known: what a Layer costs on Nodes
    that have been in the Ring: one that is back does not measure itself again.
    """

    options: RingOptions
    stage: "StarterStage"
    others: Sequence[control.Ready]
    costs: Sequence[StageCost]
    layer_bytes: float = 0.0
    known: Mapping[str, StageCost] = field(default_factory=dict)

    def as_reshaped(self, options: RingOptions, others: Sequence[control.Ready]) -> "LoadedRing":
        """Return what is there when the Nodes have other Layers; costs follow from those that were measured."""
        before = zip(self.costs, self._decode_layers(self.options), self.options.layers, strict=True)
        per_layer = [
            StageCost(cost.decode.scaled(1 / decode), cost.prompt.scaled(1 / len(layers)))
            for cost, decode, layers in before
        ]
        known = {**self.known, **dict(zip(self.options.node_names, per_layer, strict=True))}
        slowest = max(per_layer, key=lambda cost: cost.decode.seconds(1))  # for a Node that has not measured itself
        after = zip(options.node_names, self._decode_layers(options), options.layers, strict=True)
        costs = [
            StageCost(cost.decode.scaled(decode), cost.prompt.scaled(len(layers)))
            for name, decode, layers in after
            for cost in [known.get(name, slowest)]
        ]
        return replace(self, options=options, others=others, costs=costs, layer_bytes=self._layer_bytes, known=known)

    def _able(self, name: str, options: RingOptions) -> Able:
        """Return what a Node can do, as far as is known: one that has not loaded yet may hold as much as it wants."""
        names = self.options.node_names
        if name not in names:
            cost = self.known.get(name)
            return Able(cost.decode.seconds(1) if cost else max(self._layer_s), len(self._all_layers))
        i = names.index(name)
        assert options.remote is not None  # only such a Ring has Nodes that others can stand in for
        node = next(node for node in options.remote.nodes if node.name == name)
        if i:
            free, used = self.others[i - 1].free_bytes, self.others[i - 1].rss_bytes
        else:
            free, used = self.stage.memory()
        room = int(free * node.memory_share * ROOM_SHARE)
        if node.memory_bytes is not None:
            room = min(room, node.memory_bytes - used)
        num_layers, head_layers = len(self.options.layers[i]), 0.0 if i else self.stage.runner.config.head_layers
        more = int(max(room, 0) / self._layer_bytes) if self._layer_bytes else len(self._all_layers)
        return Able(self._layer_s[i], num_layers + more, head_layers)

    def num_more(self, name: str, options: RingOptions) -> int:
        """Return how many Layers a Node's memory holds beside its own, as far as is known."""
        held = dict(zip(self.options.node_names, self.options.layers, strict=True)).get(name, ())
        return max(self._able(name, options).max_layers - len(held), 0)

    def survived(
        self,
        now: RingOptions,
        options: RingOptions,
        lost: Collection[str],
        max_fetch_s: float,
        bytes_per_s: float,
        at_hand: Mapping[str, frozenset[int]],
        *,
        is_starter_full: bool = False,
    ) -> RingOptions | None:
        """Return a Ring without its lost Nodes; None if the others cannot hold or fetch their Layers in that time.

        now: what the Ring is; options: the same with spares in some places. bytes_per_s: of the slowest link.
        at_hand: Layers on Nodes' disks. is_starter_full: it has tried, and keeps to what it has.
        """
        able = {name: self._able(name, options) for name in options.node_names if name not in lost}
        if is_starter_full:
            starter = options.node_names[0]
            able[starter] = replace(able[starter], max_layers=len(options.layers[0]))
        held = dict(zip(now.node_names, now.layers, strict=True))
        has = {name: at_hand.get(name, frozenset()) | {*held.get(name, ())} for name in able}
        survived = with_survivors(options, lost, able, has)
        if survived is None:
            return None
        limit = survived.remote.transfer_bytes_per_s if survived.remote else None
        rate = min(bytes_per_s, limit or bytes_per_s)
        others = zip(survived.node_names[1:], survived.layers[1:], strict=True)  # the Starter has all
        num_fetched = sum(len({*layers} - has[name]) for name, layers in others)
        return survived if num_fetched * self._layer_bytes / rate <= max_fetch_s else None

    @property
    def _layer_bytes(self) -> float:
        if self.layer_bytes or not self.others:
            return self.layer_bytes
        num_layers = sum(len(layers) for layers in self.options.layers[1:])
        return sum(ready.weight_bytes for ready in self.others) / num_layers

    def _decode_layers(self, options: RingOptions) -> list[float]:
        """Return the work of a decoded token at each Stage, in Layers: a large head takes as long as many of them."""
        head = self.stage.runner.config.head_layers
        return [len(layers) + (0.0 if i else head) for i, layers in enumerate(options.layers)]

    @property
    def _layer_s(self) -> list[float]:
        return [
            cost.decode.seconds(1) / layers
            for cost, layers in zip(self.costs, self._decode_layers(self.options), strict=True)
        ]

    @property
    def _all_layers(self) -> range:
        return range(self.options.layers[0].start, self.options.layers[-1].stop)
