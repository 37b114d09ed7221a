"""Identifiers and small values that every other package uses. No behaviour beyond their own invariants."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NewType

NodeId = NewType("NodeId", str)
"""A node's name, as the topology writes it."""

SeqId = NewType("SeqId", int)
"""The id of a Sequence on the wire. It only grows and is never used again: a replayed Sequence gets a new one."""

Epoch = NewType("Epoch", int)
FIRST_EPOCH = Epoch(1)
"""In which Nodes load and Hops are measured."""
"""The integer version of the Ring. It is on every Frame and only grows."""


CHUNK_STEP = 16
"""Prompt chunks are multiples of it: kernels work in such steps, and the wire counts in them."""


WeightFormat = Literal["auto", "plain", "int8", "int4"]
"""How weights are held: as the dtype says, packed in 8 or in 4 bits, or, "auto", as suits the model's file."""
USUAL_WEIGHTS: WeightFormat = "auto"
"""How they are held where nobody says it."""


@dataclass(frozen=True, slots=True)
class WeightSettings:
    """How a Node holds its weights and what it computes with them: one value from flags and topology to the kernels.

    dtype: "f32" or "bf16", of activations, KV cache, and weights unless those are packed.
    exact: batch-invariant kernels, so tokens are the same on any number of Nodes, alone and in company; not for plain
    weights. See engine/kernels/linear.py.
    device: "cpu", "cuda", "cuda:0" or "auto".
    """

    format: str = USUAL_WEIGHTS
    dtype: str = "f32"
    exact: bool = True
    device: str = "cpu"


PLAIN_WEIGHTS = WeightSettings("plain")


@dataclass(frozen=True, slots=True)
class LayerRange:
    """A half-open range of decoder layers: ``LayerRange(8, 16)`` is layers 8 to 15."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"LayerRange({self.start}, {self.stop}): needs 0 <= start < stop")

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __str__(self) -> str:
        return f"{self.start}-{self.stop - 1}"


@dataclass(frozen=True, slots=True)
class RingSpec:
    """The part of a Plan that the ring protocol needs.

    num_stages: Stages of the Ring, the Starter's included.
    kv_tokens: KV capacity of the Ring in tokens, the minimum over its Stages.
    context_tokens: maximum tokens of one Sequence, prompt and answer together.
    caps: ``caps[i]`` is the MicroBatch cap while i + 1 Sequences are live; the last one holds for more.
    kv_block_tokens: tokens of one KvBlock; a Sequence takes whole ones.
    max_live: maximum Sequences in the Ring at once.
    pass_tokens: the fixed cost of a forward, in tokens that cost a Stage as much.
    shared_chunks: ``shared_chunks[i]`` bounds the prompt tokens of a Batch while i + 1 Sequences are live.
    num_chunks: chunks in flight that keep every Stage at work.
    """

    num_stages: int
    kv_tokens: int
    context_tokens: int
    caps: tuple[int, ...] = (1,)
    kv_block_tokens: int = 1
    max_live: int = 64
    pass_tokens: float = 16.0
    shared_chunks: tuple[int, ...] = (256,)
    num_chunks: int = 256

    def __post_init__(self) -> None:
        counts = (self.num_stages, self.kv_tokens, self.context_tokens, self.kv_block_tokens)
        if min(*counts, self.max_live, self.num_chunks) < 1:
            raise ValueError(f"{self}: every count must be at least 1")
        if not self.caps or min(self.caps) < 1:
            raise ValueError(f"{self}: caps must hold numbers of at least 1")
        if not self.shared_chunks or min(self.shared_chunks) < 1:
            raise ValueError(f"{self}: shared_chunks must hold numbers of at least 1")

    @property
    def max_tokens(self) -> int:
        """Maximum tokens of one Sequence that context and KV cache hold."""
        return min(self.context_tokens, self.kv_tokens // self.kv_block_tokens * self.kv_block_tokens)

    def cap(self, num_live: int) -> int:
        """Return the MicroBatch cap while ``num_live`` Sequences are in the Ring."""
        return self.caps[min(max(num_live, 1), len(self.caps)) - 1]

    def shared_chunk(self, num_live: int) -> int:
        """Return the maximum prompt tokens of a Batch that others may have to wait for."""
        return self.shared_chunks[min(max(num_live, 1), len(self.shared_chunks)) - 1]
