"""From the catalogue to the planner's input: what a Node of a kind of device would measure of a model. Pure.

A Layer's time for n tokens at once is that of a roofline (Williams, Waterman and Patterson 2009): as long as its
weights take to be read, or as long as the arithmetic takes, whichever is longer,

    max(read(n) / read_bytes_per_s, 2 n weights / flop_per_s)

where read(n) is all of the Layer, or of a mixture the experts that n tokens meet. Each token of a context adds its keys
and values, and two operations for each of their numbers and query head. A device that has measured Layers of this size
itself takes its own times instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mdiq.core.types import NodeId
from mdiq.core.wire_formats import row_bytes
from mdiq.plan.micro_batches import MAX_LIVE, Curve
from mdiq.plan.profile import HopProfile, Links, ModelShape, NodeProfile
from mdiq.report.catalogue import Device, Figure, LinkKind, Mark, MeasuredLayers, Shape, weakest

FLOP_PER_WEIGHT = 2  # a multiplication and an addition
BITS = {"int8": 8.3, "int4": 5.0}
"""Bits of a packed weight with its scales: docs/performance.md."""
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, MAX_LIVE)
_PROMPT_SIZES = (16, 64, 192, 256)
_PROMPT_ROWS = 256  # of the largest Batch: a chunk of a prompt
MEASURED_CONTEXT = 96
"""Tokens of context in front of each measured token: engine/measure.py."""


@dataclass(frozen=True, slots=True)
class Held:
    """How weights, activations and the KV cache are held. layer_bits: of a weight of a Layer; ends_bits: of the rest.

    dtype_bytes: of a number in the KV cache and on a Hop.
    """

    weights: str
    layer_bits: float
    ends_bits: float
    dtype: str = "f32"
    wire: str = "f32"

    @property
    def dtype_bytes(self) -> int:
        return 2 if self.dtype == "bf16" else 4


def held_as(weights: str, dtype: str = "f32", layer_bits: float | None = None) -> Held:
    """Return how mdiq holds a model in a weight format; on the Hops are the numbers of the dtype, as in exact mode.

    layer_bits: of a file that keeps its own types, in 4 bits.
    """
    plain = 16.0 if dtype == "bf16" else 32.0
    bits = BITS.get(weights, plain) if layer_bits is None else layer_bits
    # Embedding and head have 8 bits in both packed formats.
    return Held(weights, bits, BITS["int8"] if weights in BITS else plain, dtype, dtype)


def model_shape(shape: Shape, held: Held) -> ModelShape:
    """Return the size of a model in bytes, as the planner counts on it."""
    rows = row_bytes(held.wire, shape.hidden_size)
    # Of the largest Batch: the hidden state and its copies, queries and keys, and the two halves of an MLP, in f32.
    width = 4 * shape.hidden_size + 2 * shape.num_heads * shape.head_dim
    width += 2 * shape.mlp_size * max(shape.active_experts, 1)
    return ModelShape(
        num_layers=shape.num_layers,
        layer_bytes=round(shape.layer_params * held.layer_bits / 8),
        ends_bytes=round(shape.ends_params * held.ends_bits / 8),
        kv_bytes=2 * shape.num_kv_heads * shape.head_dim * held.dtype_bytes,
        row_bytes=rows,
        activation_bytes=4 * _PROMPT_ROWS * width,
        weights=held.weights,
    )


def node_profile(name: str, device: Device, shape: Shape, held: Held) -> NodeProfile:
    """Return what a Node on such a device would measure of the model."""
    own = measured_layers(device, shape, held)
    context_s = _context_s(device, shape, held)
    if own is None:
        decode, prompt, head = _roofline(device, shape, held)
    else:
        decode, prompt, head = _without_context(own.decode, context_s), own.prompt, own.head
    return NodeProfile(
        name=NodeId(name),
        memory_bytes=round(device.memory_bytes.value),
        layer_decode=decode,
        layer_prompt=prompt,
        head=head,
        context_s=context_s,
        forward_s=device.forward_s.value,
        process_bytes=round(device.process_bytes.value),
    )


def measured_layers(device: Device, shape: Shape, held: Held) -> MeasuredLayers | None:
    """Return what the device has measured itself of Layers and a head of these sizes, or None."""
    sizes = (held.weights, shape.layer_params, shape.head_params)
    return next(
        (layers for layers in device.layers if (layers.weights, layers.layer_params, layers.head_params) == sizes),
        None,
    )


def is_bound_by_reading(device: Device, shape: Shape, held: Held, num_tokens: int) -> bool:
    """Return whether reading a Layer's weights takes longer than the arithmetic of so many tokens."""
    read_s, compute_s = _layer_s(device, shape, held, num_tokens)
    return read_s >= compute_s


def time_marks(device: Device, shape: Shape, held: Held) -> list[Mark]:
    """Return the marks of the figures from which a Node's times follow."""
    if measured_layers(device, shape, held) is not None:
        return [Mark.MEASURED]
    # A device's own figures, of another model, are scaled by bytes and operations.
    scaled = [Mark.ESTIMATED] if device.read_bytes_per_s.mark is Mark.MEASURED else []
    return [*(figure.mark for figure in (device.read_bytes_per_s, device.flop_per_s, device.forward_s)), *scaled]


def links_of(link: LinkKind, num_nodes: float) -> Links:
    """Return the links of rings of so many Nodes together; where they share one capacity, each has its part."""
    share = num_nodes if link.is_shared else 1
    return Links(unknown=HopProfile(link.delay_s.value, link.bytes_per_s.value / share))


def link_mark(link: LinkKind) -> Mark:
    return weakest((link.bytes_per_s.mark, link.delay_s.mark))


def under_quota(device: Device, cpu: float) -> Device:
    """Return a device that has a part of a core: all that it computes takes longer by as much."""

    def slower(figure: Figure) -> Figure:
        return replace(figure, value=figure.value * cpu)

    return replace(
        device,
        read_bytes_per_s=slower(device.read_bytes_per_s),
        flop_per_s=slower(device.flop_per_s),
        forward_s=replace(device.forward_s, value=device.forward_s.value / cpu),
        layers=tuple(
            replace(
                layers,
                decode=layers.decode.scaled(1 / cpu),
                prompt=layers.prompt.scaled(1 / cpu),
                head=layers.head.scaled(1 / cpu),
            )
            for layers in device.layers
        ),
    )


def _roofline(device: Device, shape: Shape, held: Held) -> tuple[Curve, Curve, Curve]:
    def curve(sizes: Sequence[int]) -> Curve:
        return Curve(tuple((n, max(_layer_s(device, shape, held, n))) for n in sizes))

    head_read_s = shape.head_params * held.ends_bits / 8 / device.read_bytes_per_s.value
    head_flop_s = FLOP_PER_WEIGHT * shape.head_params / device.flop_per_s.value
    head = Curve(tuple((n, max(head_read_s, n * head_flop_s)) for n in _SIZES))
    return curve(_SIZES), curve(_PROMPT_SIZES), head


def _context_s(device: Device, shape: Shape, held: Held) -> float:
    """Return what one token of a context adds to a Layer of one Segment."""
    kv_bytes = 2 * shape.num_kv_heads * shape.head_dim * held.dtype_bytes
    num_operations = 2 * FLOP_PER_WEIGHT * shape.num_heads * shape.head_dim  # scores, and the sum of the values
    return max(kv_bytes / device.read_bytes_per_s.value, num_operations / device.flop_per_s.value)


def _without_context(decode: Curve, context_s: float) -> Curve:
    """Return measured times without what the context of the measurement adds by _context_s, or half of them."""
    return Curve(tuple((n, max(time_s - n * MEASURED_CONTEXT * context_s, time_s / 2)) for n, time_s in decode.points))


def _layer_s(device: Device, shape: Shape, held: Held, num_tokens: int) -> tuple[float, float]:
    """Return how long a Layer's weights take to be read, and how long the arithmetic takes, for tokens at once."""
    read_s = shape.read_params(num_tokens) * held.layer_bits / 8 / device.read_bytes_per_s.value
    return read_s, FLOP_PER_WEIGHT * num_tokens * shape.active_layer_params / device.flop_per_s.value
