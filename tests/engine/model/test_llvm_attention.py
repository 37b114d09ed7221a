"""Compiled attention against the same sums in f64, and against torch's way through a whole Batch."""

import math
import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdiq.core.types import SeqId
from mdiq.engine.families import FAMILIES
from mdiq.engine.kernels import llvm_attention_code, llvm_matmul
from mdiq.engine.kernels.llvm_attention_code import sums_in_registers
from mdiq.engine.kernels.llvm_machine import Machine
from mdiq.engine.model import llvm_attention
from mdiq.engine.model.kv_cache import BLOCK_TOKENS, KvCache, Placement
from mdiq.engine.model.layers import PlacedSegment, attention_over
from mdiq.engine.model.llvm_attention import CompiledAttention
from mdiq.engine.model_config import ModelConfig

CPU = torch.device("cpu")
TOLERANCE = 2e-5  # of values around 1: f32 sums in another order, and e^x to the last bits


def _config(num_heads: int, num_kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        family=FAMILIES["llama"],
        num_layers=1,
        hidden_size=num_heads * head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_size=1,
        vocab_size=1,
        context_tokens=1,
        norm_eps=1e-5,
    )


def _compiled(num_heads: int, num_kv_heads: int, head_dim: int) -> CompiledAttention:
    found = CompiledAttention.find(_config(num_heads, num_kv_heads, head_dim), torch.float32, CPU)
    assert found is not None
    return found


class _Batch:
    """Sequences of these lengths in a cache, grown in turns so that some lie in pieces, and a Segment of each.

    Without ``lengths`` of Segments each is one token, the Sequence's last.
    """

    def __init__(
        self,
        sizes: list[int],
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        lengths: list[int] | None = None,
        in_pieces: bool = False,
    ) -> None:
        lengths = lengths or [1] * len(sizes)
        random = torch.Generator().manual_seed(sum(sizes))
        capacity = sum(-(-size // BLOCK_TOKENS) * BLOCK_TOKENS for size in sizes)
        cache = KvCache(1, capacity if in_pieces else 4 * capacity, num_kv_heads, head_dim, torch.float32, CPU)
        self.keys, self.values = cache.keys[0], cache.values[0]
        for pool in (self.keys, self.values):
            pool.normal_(generator=random)
        step = 16 if in_pieces else max(sizes)
        for stop in range(step, max(sizes) + step, step):
            for i, (size, length) in enumerate(zip(sizes, lengths, strict=True)):
                known, wanted = min(stop - step, size - length), min(stop, size - length)
                if wanted > known:
                    cache.extend(SeqId(i), known, wanted - known)
        self.placed: list[PlacedSegment] = []
        first = 0
        for i, (size, length) in enumerate(zip(sizes, lengths, strict=True)):
            placement = cache.extend(SeqId(i), size - length, length)
            self.placed.append(PlacedSegment(first, length, size - length, placement))
            first += length
        # As a Layer's matmul and rotation leave them: q and k side by side, v in rows of all three.
        qk = torch.randn(first, num_heads + num_kv_heads, head_dim, generator=random)
        qkv = torch.randn(first, num_heads + 2 * num_kv_heads, head_dim, generator=random)
        self.q, self.k, self.v = qk[:, :num_heads], qk[:, num_heads:], qkv[:, num_heads + num_kv_heads :]

    def by_torch(self, window: int = 0) -> torch.Tensor:
        attend = attention_over(self.placed, CPU)
        return attend(self.q, self.k, self.v, self.keys.clone(), self.values.clone(), window)

    def by_hand(self, window: int = 0) -> torch.Tensor:
        """Return what the last token of each Segment finds, in f64, one number after the other."""
        keys, values = self.keys.double(), self.values.double()
        rows = []
        for segment in self.placed:
            last = segment.first + segment.length - 1
            slots = torch.arange(len(keys))[segment.placement.read]
            keys[slots[-segment.length :]] = self.k[segment.first : last + 1].double()
            values[slots[-segment.length :]] = self.v[segment.first : last + 1].double()
            slots = slots[-window:] if window else slots
            groups = self.q.shape[1] // keys.shape[1]
            heads = [
                ((keys[slots, h // groups] @ self.q[last, h].double()) / math.sqrt(keys.shape[2])).softmax(0)
                @ values[slots, h // groups]
                for h in range(self.q.shape[1])
            ]
            rows.append(torch.cat(heads))
        return torch.stack(rows)

    def by(self, compiled: CompiledAttention, window: int = 0) -> torch.Tensor:
        self.found_keys, self.found_values = self.keys.clone(), self.values.clone()
        attend = compiled.over(self.placed)
        return attend(self.q, self.k, self.v, self.found_keys, self.found_values, window)


SHAPES = [(9, 3, 64), (32, 4, 64), (12, 12, 64), (32, 8, 128), (40, 8, 80), (8, 1, 256), (34, 2, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("in_pieces", [False, True])
def test_it_is_what_the_formula_says(shape: tuple[int, int, int], in_pieces: bool) -> None:
    batch = _Batch([1, 2, 15, 16, 17, 33, 100, 250], *shape, in_pieces=in_pieces)
    is_run = [isinstance(segment.placement.read, slice) for segment in batch.placed]
    assert all(is_run) or in_pieces and not all(is_run)
    found = batch.by(_compiled(*shape))
    assert torch.allclose(found.double(), batch.by_hand(), atol=TOLERANCE, rtol=0)
    assert torch.allclose(found, batch.by_torch(), atol=TOLERANCE, rtol=0)
    for segment in batch.placed:
        assert torch.equal(batch.found_keys[segment.placement.write][0], batch.k[segment.first])
        assert torch.equal(batch.found_values[segment.placement.write][0], batch.v[segment.first])


@pytest.mark.parametrize("window", [1, 12, 33, 1000])
def test_a_window_ends_what_a_token_sees(window: int) -> None:
    for in_pieces in (False, True):
        batch = _Batch([1, 12, 13, 40, 90], 4, 2, 32, in_pieces=in_pieces)
        found = batch.by(_compiled(4, 2, 32), window)
        assert torch.allclose(found.double(), batch.by_hand(window), atol=TOLERANCE, rtol=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000))
def test_a_row_has_the_same_bits_in_any_company_and_as_a_token_of_a_prompt(seed: int) -> None:
    """A Replay computes decoded tokens as a prompt: what each finds must be what it found alone."""
    rng = random.Random(seed)
    shape = rng.choice([(4, 2, 32), (6, 2, 16), (3, 3, 64), (4, 1, 128), (14, 2, 64), (5, 1, 256)])
    sizes = [rng.randrange(60, 200) for _ in range(rng.randrange(1, 5))]
    lengths = [rng.choice([1, 1, 5, 50]) for _ in sizes]
    window = rng.choice([0, 0, 1, 30, 33, 100])
    batch = _Batch(sizes, *shape, lengths=lengths, in_pieces=rng.random() < 0.5)
    compiled = _compiled(*shape)
    together = batch.by(compiled, window)
    assert torch.allclose(together, batch.by_torch(window), atol=TOLERANCE, rtol=0)
    placed, rows = batch.placed, (batch.q, batch.k, batch.v)
    batch.keys, batch.values = batch.found_keys, batch.found_values
    for segment in placed:
        cuts = sorted({0, segment.length, *rng.sample(range(segment.length), min(segment.length, 3))})
        cuts = list(range(segment.length + 1)) if rng.random() < 0.3 else cuts
        for start, stop in pairwise(cuts):
            some = slice(segment.first + start, segment.first + stop)
            read, write = segment.placement.read, segment.placement.write
            here = slice(write.start + start, write.start + stop) if isinstance(write, slice) else write[start:stop]
            seen = segment.start + stop
            until = slice(read.start, read.start + seen) if isinstance(read, slice) else read[:seen]
            batch.placed = [PlacedSegment(0, stop - start, segment.start + start, Placement(here, until))]
            batch.q, batch.k, batch.v = (tensor[some] for tensor in rows)
            assert torch.equal(batch.by(compiled, window), together[some])


def test_what_lies_behind_a_sequence_in_its_last_block_is_never_read() -> None:
    """Room that no token has filled holds anything, numbers that are none included."""
    batch = _Batch([40, 50], 4, 2, 32, lengths=[1, 7])
    expected = batch.by(_compiled(4, 2, 32))
    seen = torch.zeros(len(batch.keys), dtype=torch.bool)
    for segment in batch.placed:
        seen[segment.placement.read] = True
    batch.keys[~seen] = batch.values[~seen] = math.nan
    assert torch.equal(batch.by(_compiled(4, 2, 32)), expected)


def test_how_many_sums_are_in_registers_changes_no_bit() -> None:
    """CPUs with other registers take other numbers of rows at a time; 7 heads are a multiple of none."""
    batch = _Batch([300, 1, 70, 33], 7, 1, 64, lengths=[29, 1, 1, 3])
    compiled = _compiled(7, 1, 64)
    found = batch.by(compiled)
    assert [sums_in_registers(frozenset(features)) for features in ({"avx2"}, {"neon"}, {"avx512f"})] == [4, 4, 8]
    for features in ({"avx2"}, {"avx512f"}):
        machine = Machine(
            partial(llvm_attention_code.build, frozenset(features), head_dim=64, groups=7, block_tokens=BLOCK_TOKENS)
        )
        compiled.machine, compiled.function = machine, machine.function("attend", 6, 7)
        assert torch.equal(batch.by(compiled), found)


def test_a_prompt_of_a_real_models_heads_has_the_bits_of_its_tokens_alone() -> None:
    """Tiles of a prompt are larger than what fits registers, and its last tile is not whole."""
    for shape in ((12, 2, 128), (4, 1, 256)):
        batch = _Batch([75], *shape, lengths=[70])
        compiled = _compiled(*shape)
        together = batch.by(compiled)
        segment = batch.placed[0]
        read, write = segment.placement.read, segment.placement.write
        assert isinstance(read, slice) and isinstance(write, slice)
        batch.placed = [
            PlacedSegment(
                i,
                1,
                5 + i,
                Placement(slice(write.start + i, write.start + i + 1), slice(read.start, read.start + 6 + i)),
            )
            for i in range(70)
        ]
        assert torch.equal(batch.by(compiled), together)


def test_threads_share_the_work_and_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = _Batch([300, 1, 20, 130, 75], 6, 3, 16)
    compiled = _compiled(6, 3, 16)
    alone = batch.by(compiled)
    shares: list[list[tuple[int, ...]]] = []

    def in_turn(function: Callable[..., None], calls: list[tuple[int, ...]]) -> None:
        shares.append([call[-2:] for call in calls])
        for call in reversed(calls):
            function(*call)

    monkeypatch.setattr(llvm_attention, "in_threads", in_turn)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert torch.equal(batch.by(compiled), alone)
    assert shares == [[(0, 1), (1, 2), (2, 10), (10, 15)]]  # about as many tokens to look back on


def test_two_tokens_of_one_sequence_see_each_other() -> None:
    """A prompt may end in several Segments of one token: the later sees the earlier."""
    batch = _Batch([41], 4, 2, 32, lengths=[2])
    expected = batch.by_torch()
    segment = batch.placed[0]
    assert isinstance(segment.placement.read, slice) and isinstance(segment.placement.write, slice)
    read, write = segment.placement.read, segment.placement.write
    ends = (read.stop - 1, read.stop)
    batch.placed = [
        PlacedSegment(
            i, 1, 39 + i, type(segment.placement)(slice(write.start + i, write.start + i + 1), slice(read.start, end))
        )
        for i, end in enumerate(ends)
    ]
    assert torch.allclose(batch.by(_compiled(4, 2, 32)), expected, atol=TOLERANCE, rtol=0)


def test_scores_of_any_size_are_softened() -> None:
    """A score far above the others takes all of the weight; equal ones share it; none is lost to overflow."""
    for scale in (0.0, 1e-20, 1e3, 1e15):
        batch = _Batch([50, 3], 4, 2, 32)
        batch.q = batch.q * scale
        found = batch.by(_compiled(4, 2, 32))
        assert torch.allclose(found.double(), batch.by_hand(), atol=TOLERANCE, rtol=0)


def test_where_it_cannot_be_compiled_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fitting = _config(4, 2, 32)
    assert CompiledAttention.find(fitting, torch.float32, CPU) is not None
    assert CompiledAttention.find(_config(4, 2, 24), torch.float32, CPU) is None  # not whole vectors
    assert CompiledAttention.find(fitting, torch.bfloat16, CPU) is None
    assert CompiledAttention.find(fitting, torch.float32, torch.device("cuda")) is None
    monkeypatch.setattr(llvm_matmul, "find_spec", lambda name: None)
    assert CompiledAttention.find(fitting, torch.float32, CPU) is None
