"""Nodes and a model that several tests of the planner share."""

from mdiq.core.types import NodeId
from mdiq.plan.micro_batches import Curve
from mdiq.plan.profile import ModelShape, NodeProfile

MIB = 1 << 20
DECODE = ((1, 0.002), (2, 0.0025), (4, 0.0035), (8, 0.006))
PROMPT = ((16, 0.008), (64, 0.026), (192, 0.075))
HEAD = ((1, 0.006), (16, 0.012))

INT4 = ModelShape(32, 22 * MIB, 66 * MIB, 8_192, 4_100, 60 * MIB, weights="int4")
MODEL = ModelShape(32, 40 * MIB, 120 * MIB, 8_192, 4_100, 60 * MIB, weights="int8", smaller=(INT4,))
"""32 Layers of 40 MiB; with 2,048 tokens of KV cache a Layer takes 56 MiB."""

BARE = {"layer_decode": Curve(((1, 0.02), (2, 0.04))), "head": Curve(((1, 0.0),))}
"""Of a Node whose head costs nothing, and each Segment of a Batch as much as the first: more Nodes are better."""


def times(points: tuple[tuple[int, float], ...], factor: float) -> Curve:
    return Curve(tuple((size, factor * time_s) for size, time_s in points))


def node(name: str, factor: float = 1.0, memory_mib: int = 4_096, *, is_spare: bool = False) -> NodeProfile:
    """Return a Node that takes ``factor`` times as long as the fastest."""
    return NodeProfile(
        NodeId(name),
        memory_mib * MIB,
        times(DECODE, factor),
        times(PROMPT, factor),
        times(HEAD, factor),
        forward_s=0.0005,
        process_bytes=300 * MIB,
        is_spare=is_spare,
    )
