"""The planner's input: the Nodes' own measurements, the Hops between them, and the size of the model.

All values are per Layer where a Node's share of the model is not known yet; plan/partition.py decides that share.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mdiq.core.types import NodeId
from mdiq.core.work import Work
from mdiq.plan.micro_batches import Curve
from mdiq.plan.pace import StageCost

FRAME_BYTES = 120
"""Bytes of a Frame without its Segments: header, tag, and the headers of ZeroMQ and TCP/IP (see core/wire.py)."""
SEGMENT_BYTES = 17
"""Bytes of a Segment without its rows."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The size of a model in one weight format, in bytes.

    layer_bytes: of a Layer's weights. ends_bytes: of embedding, final norm and head, which the Starter holds.
    kv_bytes: of K and V of one token in one Layer. row_bytes: of a token's hidden state on the wire.
    activation_bytes: memory of a forward of the largest Batch, without weights and KV cache, on any Node.
    weights: the format's name. smaller: the same model in smaller formats, for advice.
    """

    num_layers: int
    layer_bytes: int
    ends_bytes: int
    kv_bytes: int
    row_bytes: int
    activation_bytes: int = 0
    weights: str = ""
    smaller: tuple["ModelShape", ...] = ()

    def __post_init__(self) -> None:
        if min(self.num_layers, self.layer_bytes, self.kv_bytes, self.row_bytes) < 1:
            raise ValueError(f"{self}: layers and their bytes must be at least 1")

    def stage_bytes(self, num_layers: int, *, is_starter: bool) -> int:
        """Return the bytes of a Stage's weights."""
        return num_layers * self.layer_bytes + (self.ends_bytes if is_starter else 0)


@dataclass(frozen=True, slots=True)
class NodeProfile:
    """A Node's measurements.

    memory_bytes: maximum that mdiq may take there; process_bytes: what it takes without any weights (mostly torch).
    layer_decode, layer_prompt: seconds of a Layer by Segments of one token, and by tokens of a prompt.
    head: seconds of embedding and head by rows; the Starter needs it.
    context_s: additional seconds of a Layer for each Segment and token of its context.
    forward_s: seconds of a forward for its Frames and, on the Starter, for requests; see handling.py. 0 before it has
    been seen to serve.
    is_spare: it holds nothing until it takes over from another Node. cpu: its kind of processor, empty if unknown.
    under_load: how many times as long its Layers take while it serves, beside the other Nodes of its Ring; see
    drift.py. None if it has not been seen to serve.
    """

    name: NodeId
    memory_bytes: int
    layer_decode: Curve
    layer_prompt: Curve
    head: Curve | None = None
    context_s: float = 0.0
    forward_s: float = 0.0
    process_bytes: int = 0
    is_spare: bool = False
    cpu: str = ""
    under_load: float | None = None

    def as_under_load(self) -> "NodeProfile":
        """Return the Node with the times that it takes while it serves."""
        factor = 1.0 if self.under_load is None else self.under_load
        return replace(
            self,
            layer_decode=self.layer_decode.scaled(factor),
            layer_prompt=self.layer_prompt.scaled(factor),
            head=None if self.head is None else self.head.scaled(factor),
            context_s=factor * self.context_s,
            forward_s=factor * self.forward_s,
        )

    def work_s(self, work: Work, num_layers: int) -> float:
        """Return the seconds that forwards of so many Layers should have taken, by what the Node has measured alone.

        Handling takes time from forwards that it runs beside, and the planner counts it by itself. So where they took
        longer than alone, as much of that as handling explains is no part of the Node's factor; see drift.py.
        """
        decode_s = prompt_s = 0.0
        if work.decode_batches:
            decode_s = self.layer_decode.seconds(work.decode_segments / work.decode_batches)
        if work.prompt_batches:
            prompt_s = self.layer_prompt.seconds(work.prompt_tokens / work.prompt_batches)
        alone_s = num_layers * (work.decode_batches * decode_s + work.prompt_batches * prompt_s)
        taken_s = min(max(work.forward_s - alone_s, 0.0), work.num_forwards * self.forward_s)
        return alone_s * work.forward_s / (work.forward_s - taken_s) if taken_s else alone_s

    def layer_s(self, size: int, context_tokens: int) -> float:
        """Return the seconds of a Layer for ``size`` Segments of one token."""
        return self.layer_decode.seconds(size) + size * context_tokens * self.context_s

    def fixed_s(self, size: int, *, is_starter: bool) -> float:
        """Return the seconds of a forward without its Layers.

        Raises:
            ValueError: it is the Starter and has not measured the head.
        """
        if not is_starter:
            return self.forward_s
        if self.head is None:
            raise ValueError(f"{self.name}: the Starter needs the head's cost")
        return self.forward_s + self.head.seconds(size)

    def stage_cost(self, num_layers: int, context_tokens: int, *, is_starter: bool) -> StageCost:
        """Return the cost of a forward of ``num_layers`` Layers on this Node."""
        curves = [self.layer_decode, *([self.head] if self.head is not None else [])]
        sizes = sorted({1, 2, *(size for curve in curves for size, _ in curve.points)})
        decode = tuple(
            (n, num_layers * self.layer_s(n, context_tokens) + self.fixed_s(n, is_starter=is_starter)) for n in sizes
        )
        one_row_s = self.fixed_s(1, is_starter=is_starter)
        prompt = tuple((n, num_layers * time_s + one_row_s) for n, time_s in self.layer_prompt.points)
        return StageCost.of(decode, prompt)

    def room_bytes(self, model: ModelShape, *, is_starter: bool) -> int:
        """Return the bytes left for Layers and their KV cache; negative when not even the rest fits."""
        return (
            self.memory_bytes
            - self.process_bytes
            - model.activation_bytes
            - model.stage_bytes(0, is_starter=is_starter)
        )

    def max_layers(self, model: ModelShape, kv_tokens: int, *, is_starter: bool) -> int:
        """Return how many Layers fit with a KV cache of ``kv_tokens``."""
        room_bytes = self.room_bytes(model, is_starter=is_starter)
        return min(max(room_bytes // (model.layer_bytes + kv_tokens * model.kv_bytes), 0), model.num_layers)


@dataclass(frozen=True, slots=True)
class HopProfile:
    """The measured link from one Node to another; row_bytes: on this Hop's wire, None for the model's."""

    delay_s: float
    bytes_per_s: float = math.inf
    row_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.delay_s < 0 or not self.bytes_per_s > 0:
            raise ValueError(f"{self}: it needs a delay of at least 0 and a rate above 0")

    def send_curve(self, model: ModelShape) -> Curve:
        """Return how long a Frame keeps the line busy, by rows."""
        return Curve(tuple((rows, self.send_s(1, rows, model)) for rows in (1, 2)))

    def send_s(self, num_frames: int, num_rows: int, model: ModelShape) -> float:
        """Return how long Frames with these rows keep the line busy."""
        row_bytes = SEGMENT_BYTES + (model.row_bytes if self.row_bytes is None else self.row_bytes)
        return (num_frames * FRAME_BYTES + num_rows * row_bytes) / self.bytes_per_s


UNKNOWN_HOP = HopProfile(delay_s=5e-4, bytes_per_s=12.5e6)
"""A cable of 100 Mbit/s and a switch: the default for Nodes without a measured Hop."""


@dataclass(frozen=True, slots=True)
class Links:
    """The measured Hops, and estimates for the others.

    A Ring that leaves a Node out has a Hop that was not measured. A Node's best Hop shows how good its own line is, so
    such a Hop is estimated as the worse of the two Nodes' best ones.
    """

    hops: Mapping[tuple[NodeId, NodeId], HopProfile] = field(default_factory=dict)
    unknown: HopProfile = UNKNOWN_HOP
    _best: dict[NodeId, HopProfile] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        best: dict[NodeId, HopProfile] = {}
        for ends, hop in self.hops.items():
            for name in ends:
                known = best.get(name, hop)
                best[name] = HopProfile(min(known.delay_s, hop.delay_s), max(known.bytes_per_s, hop.bytes_per_s))
        object.__setattr__(self, "_best", best)

    def between(self, sender: NodeId, receiver: NodeId) -> HopProfile:
        """Return the Hop as measured, or its estimate."""
        measured = self.hops.get((sender, receiver))
        if measured is not None:
            return measured
        a, b = (self._best.get(name, self.unknown) for name in (sender, receiver))
        return HopProfile(max(a.delay_s, b.delay_s), min(a.bytes_per_s, b.bytes_per_s))

    def with_twin(self, node: NodeId, twin: NodeId) -> "Links":
        """Return these Hops and those of one more Node, ``twin``, equal to those of ``node``."""
        renamed = {(_swap(a, node, twin), _swap(b, node, twin)): hop for (a, b), hop in self.hops.items()}
        return Links({**renamed, **self.hops}, self.unknown)


def _swap(name: NodeId, node: NodeId, twin: NodeId) -> NodeId:
    return twin if name == node else name
