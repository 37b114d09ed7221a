"""The loops of CompiledAttention: what they compute and in which order; see llvm_attention.py."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product

from llvmlite import ir

from mdiq.engine.kernels.llvm_code import FLOAT, LONG, NEAREST, POINTER, Function, Value, fma, power_of_2, vector

LANES = 16
"""Floats of a vector: head dimensions are multiples."""
_FLOATS = vector(FLOAT, LANES)
_FLOAT_BYTES, _VECTOR_BYTES = 4, 4 * LANES  # a vector is a line of memory, too
_READ_BYTES = 32  # of a tile's description
_SIDE = 8
"""Rows and columns of a square that is turned in registers."""
_TURNS = (
    (1, (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)),
    (2, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)),
    (4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)),
)
"""How lines so far apart exchange floats: each step is one instruction for a vector of 4 or 8, on x86 and ARM."""
_TURNED = (0, 2, 1, 3, 4, 6, 5, 7)
"""Which line holds each column in the end."""


def row_floats(num_slots: int, head_dim: int) -> int:
    """Return the size of a row of scratch memory for a Sequence of ``num_slots``, in floats: whole vectors."""
    # Scores begin at the first slot's KvBlock, end with a whole vector, and have one float more after them.
    return (num_slots // LANES + 2) * LANES + head_dim


def build(features: frozenset[str], *, head_dim: int, groups: int, block_tokens: int) -> ir.Module:
    """Return the module for heads of ``head_dim``, ``groups`` query heads for each KV head, blocks of KV cache.

    Its function attend(q, keys, values, out, reads, rows, num_kv_heads, q_step, out_step, window, width, first, stop)
    does items ``first`` to ``stop - 1``; item i is KV head i % num_kv_heads of tile i // num_kv_heads. A tile is some
    tokens of one Sequence, in order: they share what is loaded.

    q, out: f32 rows [heads, head_dim], ``q_step`` and ``out_step`` bytes apart. keys, values: pools, f32 [slots,
    num_kv_heads, head_dim]. reads: of each tile, where its Sequence's slots stand (i64; those of a KvBlock are
    neighbours), how many of them its first token sees, that token's row in q and out, and its number of tokens.
    rows: f32 [tokens of a tile * groups, width], scratch; ``width`` is that of row_floats for the longest Sequence.
    window: slots that are read at most, from the last; 0 is all.

    What a token finds does not depend on its tile. Each score is LANES sums, added in pairs of neighbours. Weights are
    added in LANES sums by their place in the Sequence, and values from the first to the last; what a token does not see
    weighs 0, which changes no sum.
    """
    module = ir.Module()
    f = Function(module, "attend", 6, 7)
    q, keys, values, out, reads, rows = f.arguments[:6]
    num_kv_heads, q_step, out_step, window, width, first, stop = f.arguments[6:]
    head_bytes, row_bytes = f.integer(_FLOAT_BYTES * head_dim), width * _FLOAT_BYTES
    group_bytes = head_bytes * groups
    # A row of scratch: scores, which become weights, 1 / their sum, and the query, whose place sums of values take.
    query_at = row_bytes - head_bytes
    inverse_at = query_at - _FLOAT_BYTES
    parts = range(0, _FLOAT_BYTES * head_dim, _VECTOR_BYTES)
    max_sums = sums_in_registers(features)
    packed, lane_sums = (f.scratch(LANES * count) for count in (head_dim, LANES * max_sums))

    with f.each(first, stop) as i:
        number = i // num_kv_heads
        head = i - number * num_kv_heads
        read = reads + number * _READ_BYTES
        slots = read.load(POINTER)
        first_end, first_row, num_tokens = (read.load(LONG, at) for at in (8, 16, 24))
        end = first_end + num_tokens - 1
        token_bytes = num_kv_heads * head_bytes
        num_rows = num_tokens * groups

        def begin_of(end: Value) -> Value:
            return ((window > 0) & (end > window)).select(end - window, 0)

        begin = begin_of(first_end)
        base = begin & -block_tokens
        count = end - base

        def slot_row(pool: Value, t: Value) -> Value:
            """Return a pointer to this head's row of the token that slot number ``t`` holds."""
            return pool + (slots.load(LONG, t * 8) * num_kv_heads + head) * head_bytes

        def here_and_next(pool: Value, t: Value) -> tuple[Value, Value]:
            """Return slot_row of ``t`` and of the slot LANES on, which is asked for while the former is used."""
            later = t + LANES
            return slot_row(pool, t), slot_row(pool, (later < end).select(later, t))

        @contextmanager
        def each_head() -> Iterator[tuple[Value, Value, Value]]:
            """For each head of each token: (token, row of scratch, bytes to the head in a row of q or out)."""
            with f.each(0, num_tokens) as token, f.each(0, groups) as g:
                at = head * group_bytes + g * head_bytes
                yield token, rows + (token * groups + g) * row_bytes, at

        def some_rows() -> Iterator[list[Value]]:
            """Build loops over all rows of scratch: some at a time, see _in_groups."""
            for number, size in _in_groups(f, num_rows, max_sums):
                yield [rows + (number + n) * row_bytes for n in range(size)]

        with each_head() as (token, here, at):
            there = q + (first_row + token) * q_step + at
            for part in parts:
                (here + query_at).store(there.load(_FLOATS, part), part)

        with f.each(base, end, LANES) as t:
            _turn(f, *here_and_next(keys, t), token_bytes, packed, len(parts))
            for some in some_rows():
                found = _scores(f, [each + query_at for each in some], packed, lane_sums, len(parts))
                for each, score in zip(some, found, strict=True):
                    each.store(score, (t - base) * _FLOAT_BYTES)

        with each_head() as (token, here, _):
            token_end = first_end + token
            _hide(f, here, begin_of(token_end) - base, token_end - base, count)
            here.store(_soften(f, here, count, head_dim), inverse_at)
            for part in parts:
                (here + query_at).store(f.splat(FLOAT, LANES, 0.0), part)

        with f.each(base, end, LANES) as t:
            left = end - t
            stop_lane = (left < LANES).select(left, LANES)
            first_lane = begin - t
            first_lane = (first_lane > 0).select(first_lane, 0)
            _gather(f, *here_and_next(values, t), token_bytes, first_lane, stop_lane, parts, packed)
            weights_at = (t - base) * _FLOAT_BYTES
            with f.each(0, head_bytes, _VECTOR_BYTES) as part_at:
                column = packed + part_at * LANES
                for some in some_rows():
                    at = query_at + part_at

                    def add(i: Value, sums: list[Value], some: list[Value] = some) -> list[Value]:
                        value = column.load(_FLOATS, i * _VECTOR_BYTES)
                        weight_at = weights_at + i * _FLOAT_BYTES
                        weights = [each.load(FLOAT, weight_at).spread(LANES) for each in some]
                        return [fma(weight, value, total) for weight, total in zip(weights, sums, strict=True)]

                    sums = f.loop(first_lane, stop_lane, 1, [each.load(_FLOATS, at) for each in some], add)
                    for each, total in zip(some, sums, strict=True):
                        each.store(total, at)

        with each_head() as (token, here, at):
            there = out + (first_row + token) * out_step + at
            inverse = here.load(FLOAT, inverse_at).spread(LANES)
            for part in parts:
                there.store((here + query_at).load(_FLOATS, part) * inverse, part)
    f.finish()
    return module


def sums_in_registers(features: frozenset[str]) -> int:
    """Return how many vectors of sums a CPU holds in its registers beside what it adds to them, a power of 2."""
    # AVX2 has 16 registers of 8 floats, NEON 32 of 4: half of them. AVX-512 has 32 of 16, where 8 sums keep both of its
    # units for products busy.
    return 8 if "avx512f" in features else 4


def _in_groups(f: Function, num_rows: Value, max_rows: int) -> Iterator[tuple[Value, int]]:
    """Build loops over all rows: (first of some, how many), ``max_rows`` at a time, and the rest in halves of it."""
    start, size = f.integer(0), max_rows
    while size:
        stop = num_rows & -size  # size: a power of 2
        with f.each(start, stop, size) as number:
            yield number, size
        start, size = stop, size // 2


def _turn(f: Function, first: Value, following: Value, step: Value, turned: Value, num_parts: int) -> None:
    """Write the columns of LANES rows, ``step`` bytes apart, as vectors: those of each lane one after the other.

    following: the first of the rows that come next, which are asked for.
    """
    with f.each(0, num_parts) as i:
        at = i * _VECTOR_BYTES
        for row in range(LANES):
            (following + step * row + at).ask_for(NEAREST)
        for row, lane in product(range(0, LANES, _SIDE), repeat=2):
            lines = (first + step * (row + n) for n in range(_SIDE))
            square = [line.load(vector(FLOAT, _SIDE), at + _FLOAT_BYTES * lane) for line in lines]
            for distance, low, high in _TURNS:
                for n in (n for n in range(_SIDE) if not n & distance):
                    one, other = square[n], square[n + distance]
                    square[n], square[n + distance] = one.pick(low, other), one.pick(high, other)
            for n, place in enumerate(_TURNED):
                there = turned + ((lane + n) * num_parts * _VECTOR_BYTES + _FLOAT_BYTES * row)
                there.store(square[place], at)


def _gather(
    f: Function,
    start: Value,
    following: Value,
    step: Value,
    first: Value,
    stop: Value,
    parts: range,
    packed: Value,
) -> None:
    """Write vectors of rows ``first`` to ``stop - 1``, ``step`` bytes apart: the LANES of each part of a row together.

    following: as in _turn.
    """
    with f.each(first, stop) as i:
        at = i * step
        for part in parts:
            (following + (at + part)).ask_for(NEAREST)
            value = (start + at).load(_FLOATS, part)
            packed.store(value, i * _VECTOR_BYTES + part * LANES)


def _scores(f: Function, queries: Sequence[Value], turned: Value, lane_sums: Value, num_parts: int) -> list[Value]:
    """Return a vector of LANES scores for each query; see _turn.

    lane_sums: scratch for a vector of each lane and query.
    """

    def place(lane: Value, n: int) -> Value:
        return (lane * len(queries) + n) * _VECTOR_BYTES

    with f.each(0, LANES) as lane:
        column = turned + lane * (num_parts * _VECTOR_BYTES)
        query_lane = [query + lane * _FLOAT_BYTES for query in queries]
        totals: list[Value] = []
        for part in range(0, num_parts * _VECTOR_BYTES, _VECTOR_BYTES):
            key = column.load(_FLOATS, part)
            factors = [query.load(FLOAT, part).spread(LANES) for query in query_lane]
            if part:
                totals = [fma(factor, key, total) for factor, total in zip(factors, totals, strict=True)]
            else:
                totals = [factor * key for factor in factors]
        for n, total in enumerate(totals):
            lane_sums.store(total, place(lane, n))

    def added(n: int, first: int, count: int) -> Value:
        if count == 1:
            return lane_sums.load(_FLOATS, place(f.integer(first), n))
        return added(n, first, count // 2) + added(n, first + count // 2, count // 2)

    return [added(n, 0, LANES) for n in range(len(queries))]


def _hide(f: Function, scores: Value, begin: Value, end: Value, count: Value) -> None:
    """Have scores before ``begin`` and from ``end`` on, up to the end of the vector of the last, weigh nothing."""
    nothing = f.splat(FLOAT, LANES, -math.inf)
    lanes = f.lane_numbers(LONG, LANES)
    with f.each(0, begin, LANES) as i:
        is_seen = lanes + i.spread(LANES) >= begin.spread(LANES)
        scores.store(is_seen.select(scores.load(_FLOATS, i * 4), nothing), i * 4)
    with f.each(end, count + (LANES - 1) & -LANES, LANES) as i:
        scores.store(nothing, i * 4)


def _soften(f: Function, scores: Value, count: Value, head_dim: int) -> Value:
    """Put e^(score / sqrt(head_dim)), less the largest exponent, in the scores' place; return 1 / their sum."""
    none, zero = (f.splat(FLOAT, LANES, number) for number in (-math.inf, 0.0))
    most = f.fold(0, count, LANES, none, lambda i, found: scores.load(_FLOATS, i * 4).or_larger(found))
    most = most.largest().spread(LANES)

    def soft(i: Value, total: Value) -> Value:
        at = i * 4
        weight = power_of_2((scores.load(_FLOATS, at) - most) * (math.log2(math.e) / math.sqrt(head_dim)))
        scores.store(weight, at)
        return total + weight

    return 1.0 / f.fold(0, count, LANES, zero, soft).total()
