"""Convert the measurements of a Ring's Stages to Profiles for the planner, and store them in a file.

A Stage measures its forward with the Layers that it has. Layers are alike, so this gives the cost of a Layer; the head,
which the Starter measures separately, is first subtracted from its forward.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mdiq.core.hop_survey import HopLink
from mdiq.core.types import NodeId
from mdiq.core.wire_formats import row_bytes
from mdiq.plan.micro_batches import Curve
from mdiq.plan.pace import StageCost
from mdiq.plan.profile import HopProfile, Links, ModelShape, NodeProfile

VERSION = 1
CHANGED = 2.0  # costs that differ by more are those of a device that has changed
_MIN_S = 1e-7  # of a Layer: noise may make the head longer than the forward that it is a part of


@dataclass(frozen=True, slots=True)
class MeasuredStage:
    """The measurements of a serving Stage.

    rss_bytes: of its process; free_bytes: still free on its device; peak_bytes: peak memory of its process while it
    loaded, 0 if unknown. cpu: its kind of processor, empty if unknown.
    """

    name: str
    num_layers: int
    cost: StageCost
    weight_bytes: int
    kv_bytes_per_token: int
    rss_bytes: int
    free_bytes: int
    peak_bytes: int = 0
    cpu: str = ""


@dataclass(frozen=True, slots=True)
class MeasuredRing:
    """The measurements of a serving Ring: Stages in its order, the Starter first, and format and link of each Hop.

    num_layers: of the model, which may be more than the Stages have. head: seconds of the Starter's head, by rows.
    """

    num_layers: int
    stages: tuple[MeasuredStage, ...]
    head: Curve
    hidden_size: int
    hops: tuple[tuple[str, HopLink | None], ...]


@dataclass(frozen=True, slots=True)
class Profiles:
    """The Profiles of a model and of Nodes that served it, including Nodes that are no longer in a Ring."""

    model: ModelShape
    nodes: Mapping[str, NodeProfile]
    links: Links = field(default_factory=Links)

    def unknown(self, names: Sequence[str]) -> list[str]:
        """Return which of these Nodes, the Starter first, still lack a measurement that their Ring needs.

        A Node that becomes the Starter is one of them if it has not measured the head.
        """
        return [
            name for i, name in enumerate(names) if name not in self.nodes or (i == 0 and self.nodes[name].head is None)
        ]

    def of(self, names: Sequence[str], limits: Mapping[str, int | None]) -> list[NodeProfile] | None:
        """Return these Nodes as the planner counts on them, the Starter first, or None when one is not known.

        limits: maximum bytes of some of them.
        """
        if self.unknown(names):
            return None
        return [
            replace(node.as_under_load(), memory_bytes=min(node.memory_bytes, limits.get(name) or node.memory_bytes))
            for name in names
            if (node := self.nodes[name])
        ]

    def under_load(self, factors: Mapping[str, float]) -> "Profiles":
        """Return these Profiles with what load has shown of some Nodes; see NodeProfile."""
        seen = {name: replace(node, under_load=factors.get(name, node.under_load)) for name, node in self.nodes.items()}
        return replace(self, nodes=seen)

    def with_handling(self, handling_s: Mapping[str, float]) -> "Profiles":
        """Return these Profiles with the seconds that a forward's Frames and requests take on some Nodes."""
        nodes = {name: replace(n, forward_s=handling_s.get(name, n.forward_s)) for name, n in self.nodes.items()}
        return replace(self, nodes=nodes)

    def with_hops(self, names: Sequence[str], hops: Sequence[HopLink | None]) -> "Profiles":
        """Return these Profiles with what the Hops of a Ring of these Nodes are like now; None: not known."""
        links = dict(self.links.hops)
        nodes = [NodeId(name) for name in names]
        for sender, receiver, link in zip(nodes, (*nodes[1:], nodes[0]), hops, strict=True):
            if link is not None:
                before = links.get((sender, receiver))
                links[sender, receiver] = _hop_profile(link, before.row_bytes if before else None)
        return replace(self, links=replace(self.links, hops=links))


def differing_kinds(cpus: Mapping[str, str]) -> str:
    """Return which Nodes have which kind of CPU, or "" if all known kinds are the same. cpus: by Node."""
    kinds = sorted({cpu for cpu in cpus.values() if cpu})
    if len(kinds) < 2:
        return ""
    return "; ".join(f"{kind}: {', '.join(name for name, cpu in cpus.items() if cpu == kind)}" for kind in kinds)


def profiles_of(ring: MeasuredRing, weights: str, before: Profiles | None = None) -> Profiles | None:
    """Return the Profiles of a Ring merged with earlier ones; None for one Node, which shows no Layer's bytes."""
    starter, *workers = ring.stages
    if not workers:
        return before
    if before is not None and before.model.num_layers != ring.num_layers:
        before = None  # another model under the old name
    layer_bytes = round(sum(w.weight_bytes for w in workers) / sum(w.num_layers for w in workers))
    model = ModelShape(
        num_layers=ring.num_layers,
        layer_bytes=max(layer_bytes, 1),
        ends_bytes=max(starter.weight_bytes - starter.num_layers * layer_bytes, 0),
        kv_bytes=max(workers[0].kv_bytes_per_token // workers[0].num_layers, 1),
        row_bytes=max(row_bytes(wire, ring.hidden_size) for wire, _ in ring.hops),
        weights=weights,
    )
    nodes = dict(before.nodes) if before else {}
    for stage in ring.stages:
        node = _node(stage, ring.head if stage is starter else None)
        nodes[stage.name] = _refined(node, nodes.get(stage.name))
    hops = dict(before.links.hops) if before else {}
    names = [NodeId(stage.name) for stage in ring.stages]
    for i, (wire, link) in enumerate(ring.hops):
        if link is not None:
            hops[names[i], names[(i + 1) % len(names)]] = _hop_profile(link, row_bytes(wire, ring.hidden_size))
    return Profiles(model, nodes, Links(hops))


def _hop_profile(link: HopLink, row_bytes: int | None) -> HopProfile:
    return HopProfile(max(link.delay_s, 0.0), link.bytes_per_s or HopProfile(0.0).bytes_per_s, row_bytes)


def _node(stage: MeasuredStage, head: Curve | None) -> NodeProfile:
    def per_layer(curve: Curve, of_head: Curve | None) -> Curve:
        return Curve(
            tuple(
                (size, max((time_s - (of_head.seconds(size) if of_head else 0.0)) / stage.num_layers, _MIN_S))
                for size, time_s in curve.points
            )
        )

    # Of a prompt only the last row goes to the head.
    one_row = None if head is None else Curve(((1, head.seconds(1)),))
    return NodeProfile(
        name=NodeId(stage.name),
        memory_bytes=stage.rss_bytes + stage.free_bytes,
        layer_decode=per_layer(stage.cost.decode, head),
        layer_prompt=per_layer(stage.cost.prompt, one_row),
        head=head,
        # A process that exceeds its limit while it loads is killed, however little it takes later.
        process_bytes=max(max(stage.rss_bytes, stage.peak_bytes) - stage.weight_bytes, 0),
        cpu=stage.cpu,
    )


def _refined(now: NodeProfile, before: NodeProfile | None) -> NodeProfile:
    """Return a Profile whose costs are halfway, as ratios, between the earlier ones and those of now.

    One measurement of a device that does other things too may be off by a third, and a split that follows it by several
    Layers. With halfway steps an error fades from Ring to Ring. Only the costs of now count where the device has
    changed: where they differ by more than CHANGED, or another processor computes.
    """
    if before is None or before.cpu != now.cpu:
        return now

    def halfway(new: Curve, old: Curve) -> Curve:
        if [size for size, _ in new.points] != [size for size, _ in old.points]:
            return new
        times = [
            (max(new_s, _MIN_S), max(old_s, _MIN_S))
            for (_, new_s), (_, old_s) in zip(new.points, old.points, strict=True)
        ]
        if not 1 / CHANGED <= statistics.median(new_s / old_s for new_s, old_s in times) <= CHANGED:
            return new
        means = (math.sqrt(new_s * old_s) for new_s, old_s in times)
        return Curve(tuple((size, mean_s) for (size, _), mean_s in zip(new.points, means, strict=True)))

    refined = replace(
        now,
        layer_decode=halfway(now.layer_decode, before.layer_decode),
        layer_prompt=halfway(now.layer_prompt, before.layer_prompt),
        head=halfway(now.head, before.head) if now.head is not None and before.head is not None else now.head,
        forward_s=before.forward_s,
    )
    return replace(refined, under_load=_still_under_load(refined, before))


def _still_under_load(now: NodeProfile, before: NodeProfile) -> float | None:
    """Return what is left of what load has shown, when the Node has measured itself again.

    A device that has slowed for good is slow when it measures alone, too: that part must not count twice.
    """
    if before.under_load is None or (size := before.layer_decode.points[0][0]) != now.layer_decode.points[0][0]:
        return None
    left = before.under_load * before.layer_decode.seconds(size) / max(now.layer_decode.seconds(size), _MIN_S)
    # Between what it was and 1: a change to the other side of either is for the measurement alone.
    low, high = sorted((1.0, before.under_load))
    return min(max(left, low), high)


def to_json(profiles: Profiles) -> str:
    """Return JSON text for from_json."""
    model = profiles.model
    value = {
        "version": VERSION,
        "model": {**{name: getattr(model, name) for name in _SIZES}, "weights": model.weights},
        "nodes": [
            {
                "name": node.name,
                "memory_bytes": node.memory_bytes,
                "process_bytes": node.process_bytes,
                "cpu": node.cpu,
                "under_load": node.under_load,
                "forward_s": node.forward_s,
                "layer_decode": node.layer_decode.points,
                "layer_prompt": node.layer_prompt.points,
                "head": node.head.points if node.head else None,
            }
            for node in profiles.nodes.values()
        ],
        "hops": [
            {"from": a, "to": b, "delay_s": hop.delay_s, "bytes_per_s": hop.bytes_per_s, "row_bytes": hop.row_bytes}
            for (a, b), hop in profiles.links.hops.items()
        ],
    }
    return json.dumps(value, indent=1)


_SIZES = ("num_layers", "layer_bytes", "ends_bytes", "kv_bytes", "row_bytes")


def from_json(text: str) -> Profiles | None:
    """Return the Profiles that to_json wrote, or None for anything else: they are then measured again."""
    try:
        value: Any = json.loads(text)
        if value["version"] != VERSION:
            return None
        nodes = [
            NodeProfile(
                name=NodeId(str(node["name"])),
                memory_bytes=_whole(node["memory_bytes"]),
                layer_decode=_curve(node["layer_decode"]),
                layer_prompt=_curve(node["layer_prompt"]),
                head=None if node["head"] is None else _curve(node["head"]),
                process_bytes=_whole(node["process_bytes"]),
                cpu=str(node.get("cpu", "")),
                under_load=_factor(node.get("under_load")),
                forward_s=_seconds(node.get("forward_s", 0.0)),
            )
            for node in value["nodes"]
        ]
        hops = {
            (NodeId(str(hop["from"])), NodeId(str(hop["to"]))): HopProfile(
                _seconds(hop["delay_s"]),
                float(hop["bytes_per_s"]),
                None if hop["row_bytes"] is None else _whole(hop["row_bytes"]),
            )
            for hop in value["hops"]
        }
        shape: Any = value["model"]
        sizes: Any = {name: _whole(shape[name]) for name in _SIZES}
        model = ModelShape(**sizes, weights=str(shape["weights"]))
        return Profiles(model, {node.name: node for node in nodes}, Links(hops))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def _curve(points: Any) -> Curve:
    return Curve(tuple((_whole(size), _seconds(time_s)) for size, time_s in points))


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r}: a whole number is expected")
    return value


def _factor(value: Any) -> float | None:
    if value is None:
        return None
    if not 0 < (factor := float(value)) < math.inf:
        raise ValueError(f"{value!r}: a factor is expected")
    return factor


def _seconds(value: Any) -> float:
    if not 0 <= (time_s := float(value)) < math.inf:
        raise ValueError(f"{value!r}: seconds are expected")
    return time_s
