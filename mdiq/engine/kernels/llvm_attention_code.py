"""The loops of CompiledAttention, in LLVM's language: what they compute and in which order; see llvm_attention.py."""

import math
from collections.abc import Callable, Sequence
from itertools import product

from llvmlite import ir

from mdiq.engine.kernels.llvm_code import FLOAT, LONG, NEAREST, POINTER, Function, Value, power_of_2, splat, vector

LANES = 16
"""Floats of a vector: head dimensions are multiples."""
_FLOATS, _OF_FLOATS = vector(FLOAT, LANES), f"v{LANES}f32"
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
    # Scores begin at the first slot's KvBlock, end with a whole vector, and have one float more behind them.
    return (num_slots // LANES + 2) * LANES + head_dim


def build(features: frozenset[str], *, head_dim: int, groups: int, block_tokens: int) -> Value:
    """Return the module for heads of ``head_dim``, ``groups`` query heads for each KV head, blocks of KV cache.

    Its function attend(q, keys, values, out, reads, rows, num_kv_heads, q_step, out_step, window, width, first, stop)
    does items ``first`` to ``stop - 1``; item i is KV head i % num_kv_heads of tile i // num_kv_heads. A tile is some
    tokens of one Sequence, each behind the other: they share what is loaded.

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
    f = Function(module, "attend", [POINTER] * 6 + [LONG] * 7)
    b = f.b
    q, keys, values, out, reads, rows = f.arguments[:6]
    num_kv_heads, q_step, out_step, window, width, first, stop = f.arguments[6:]
    head_bytes, row_bytes = LONG(_FLOAT_BYTES * head_dim), b.mul(width, LONG(_FLOAT_BYTES))
    group_bytes = b.mul(head_bytes, LONG(groups))
    # A row of scratch: scores, which become weights, 1 / their sum, and the query, whose place sums of values take.
    query_at = b.sub(row_bytes, head_bytes)
    inverse_at = b.sub(query_at, LONG(_FLOAT_BYTES))
    parts = range(0, _FLOAT_BYTES * head_dim, _VECTOR_BYTES)
    max_sums = sums_in_registers(features)
    packed, lane_sums = (f.scratch(LANES * count) for count in (head_dim, LANES * max_sums))

    def item(i: Value, _: list[Value]) -> list[Value]:
        number = b.sdiv(i, num_kv_heads)
        head = b.sub(i, b.mul(number, num_kv_heads))
        read = f.at(reads, b.mul(number, LONG(_READ_BYTES)))
        slots = f.load(POINTER, read, LONG(0))
        first_end, first_row, num_tokens = (f.load(LONG, read, LONG(at)) for at in (8, 16, 24))
        end = b.sub(b.add(first_end, num_tokens), LONG(1))
        token_bytes = b.mul(num_kv_heads, head_bytes)
        num_rows = b.mul(num_tokens, LONG(groups))

        def begin_of(end: Value) -> Value:
            is_over = b.and_(b.icmp_signed(">", window, LONG(0)), b.icmp_signed(">", end, window))
            return b.select(is_over, b.sub(end, window), LONG(0))

        begin = begin_of(first_end)
        base = b.and_(begin, LONG(-block_tokens))
        count = b.sub(end, base)

        def slot_row(pool: Value, t: Value) -> Value:
            """Return a pointer to this head's row of the token that slot number ``t`` holds."""
            slot = f.load(LONG, slots, b.mul(t, LONG(8)))
            return f.at(pool, b.mul(b.add(b.mul(slot, num_kv_heads), head), head_bytes))

        def here_and_next(pool: Value, t: Value) -> tuple[Value, Value]:
            """Return slot_row of ``t`` and of the slot LANES on, which is asked for while the former is used."""
            later = b.add(t, LONG(LANES))
            return slot_row(pool, t), slot_row(pool, b.select(b.icmp_signed("<", later, end), later, t))

        def row(number: Value) -> Value:
            return f.at(rows, b.mul(number, row_bytes))

        def for_heads(body: Callable[[Value, Value, Value], None]) -> None:
            """Call body(token, row of scratch, bytes to the head in a row of q or out) for each head of each token."""

            def of_token(token: Value, _: list[Value]) -> list[Value]:
                def of_head(g: Value, _: list[Value]) -> list[Value]:
                    at = b.add(b.mul(head, group_bytes), b.mul(g, head_bytes))
                    body(token, row(b.add(b.mul(token, LONG(groups)), g)), at)
                    return []

                f.loop(LONG(0), LONG(groups), 1, [], of_head)
                return []

            f.loop(LONG(0), num_tokens, 1, [], of_token)

        def take_query(token: Value, here: Value, at: Value) -> None:
            there = f.at(f.at(q, b.mul(b.add(first_row, token), q_step)), at)
            for part in parts:
                f.store(f.load(_FLOATS, there, LONG(part)), f.at(here, query_at), LONG(part))

        def some_scores(t: Value, _: list[Value]) -> list[Value]:
            _turn(f, *here_and_next(keys, t), token_bytes, packed, len(parts))

            def scores_of(number: Value, size: int) -> None:
                here = [row(b.add(number, LONG(n))) for n in range(size)]
                found = _scores(f, [f.at(each, query_at) for each in here], packed, lane_sums, len(parts))
                for each, score in zip(here, found, strict=True):
                    f.store(score, each, b.mul(b.sub(t, base), LONG(_FLOAT_BYTES)))

            _for_rows(f, num_rows, max_sums, scores_of)
            return []

        def weigh(token: Value, here: Value, _: Value) -> None:
            token_end = b.add(first_end, token)
            _hide(f, here, b.sub(begin_of(token_end), base), b.sub(token_end, base), count)
            f.store(_soften(f, here, count, head_dim), here, inverse_at)
            for part in parts:
                f.store(splat(FLOAT, LANES, 0.0), f.at(here, query_at), LONG(part))

        def add_values(t: Value, _: list[Value]) -> list[Value]:
            left = b.sub(end, t)
            stop = b.select(b.icmp_signed("<", left, LONG(LANES)), left, LONG(LANES))
            first = b.sub(begin, t)
            first = b.select(b.icmp_signed(">", first, LONG(0)), first, LONG(0))
            _gather(f, *here_and_next(values, t), token_bytes, first, stop, parts, packed)
            weights_at = b.mul(b.sub(t, base), LONG(_FLOAT_BYTES))

            def of_part(part: Value, _: list[Value]) -> list[Value]:
                column = f.at(packed, b.mul(part, LONG(LANES)))

                def add_to(number: Value, size: int) -> None:
                    here = [row(b.add(number, LONG(n))) for n in range(size)]
                    at = b.add(query_at, part)

                    def add(i: Value, sums: list[Value]) -> list[Value]:
                        value = f.load(_FLOATS, column, b.mul(i, LONG(_VECTOR_BYTES)))
                        weight_at = b.add(weights_at, b.mul(i, LONG(_FLOAT_BYTES)))
                        weights = [f.spread(f.load(FLOAT, each, weight_at), LANES) for each in here]
                        return [_fma(f, weight, value, total) for weight, total in zip(weights, sums, strict=True)]

                    sums = f.loop(first, stop, 1, [f.load(_FLOATS, each, at) for each in here], add)
                    for each, total in zip(here, sums, strict=True):
                        f.store(total, each, at)

                _for_rows(f, num_rows, max_sums, add_to)
                return []

            f.loop(LONG(0), head_bytes, _VECTOR_BYTES, [], of_part)
            return []

        def give(token: Value, here: Value, at: Value) -> None:
            there = f.at(f.at(out, b.mul(b.add(first_row, token), out_step)), at)
            inverse = f.spread(f.load(FLOAT, here, inverse_at), LANES)
            for part in parts:
                f.store(b.fmul(f.load(_FLOATS, f.at(here, query_at), LONG(part)), inverse), there, LONG(part))

        for_heads(take_query)
        f.loop(base, end, LANES, [], some_scores)
        for_heads(weigh)
        f.loop(base, end, LANES, [], add_values)
        for_heads(give)
        return []

    f.loop(first, stop, 1, [], item)
    f.finish()
    return module


def sums_in_registers(features: frozenset[str]) -> int:
    """Return how many vectors of sums a CPU holds in its registers beside what it adds to them, a power of 2."""
    # AVX2 has 16 registers of 8 floats, NEON 32 of 4: half of them. AVX-512 has 32 of 16, where 8 sums keep both of its
    # units for products busy.
    return 8 if "avx512f" in features else 4


def _for_rows(f: Function, num_rows: Value, most: int, body: Callable[[Value, int], None]) -> None:
    """Call body(first of some rows, how many) until all are done: ``most`` at a time, and what is left in halves."""
    b = f.b
    start: Value = LONG(0)
    while most:
        stop = b.and_(num_rows, LONG(-most))  # most: a power of 2

        def some(number: Value, _: list[Value], size: int = most) -> list[Value]:
            body(number, size)
            return []

        f.loop(start, stop, most, [], some)
        start, most = stop, most // 2


def _turn(f: Function, first: Value, following: Value, step: Value, turned: Value, num_parts: int) -> None:
    """Write the columns of LANES rows, ``step`` bytes apart, as vectors: those of each lane one after the other.

    following: the first of the rows that come next, which are asked for.
    """
    b = f.b

    def part(i: Value, _: list[Value]) -> list[Value]:
        at = b.mul(i, LONG(_VECTOR_BYTES))
        for row in range(LANES):
            f.ask_for(f.at(f.at(following, b.mul(step, LONG(row))), at), NEAREST)
        for row, lane in product(range(0, LANES, _SIDE), repeat=2):
            square = [
                f.load(
                    vector(FLOAT, _SIDE), f.at(first, b.mul(step, LONG(row + n))), b.add(at, LONG(_FLOAT_BYTES * lane))
                )
                for n in range(_SIDE)
            ]
            for distance, low, high in _TURNS:
                for n in (n for n in range(_SIDE) if not n & distance):
                    pair = square[n], square[n + distance]
                    square[n], square[n + distance] = (f.pick_of_two(*pair, lanes) for lanes in (low, high))
            for n, place in enumerate(_TURNED):
                there = f.at(turned, LONG((lane + n) * num_parts * _VECTOR_BYTES + _FLOAT_BYTES * row))
                f.store(square[place], there, at)
        return []

    f.loop(LONG(0), LONG(num_parts), 1, [], part)


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
    b = f.b

    def line(i: Value, _: list[Value]) -> list[Value]:
        at = b.mul(i, step)
        for part in parts:
            f.ask_for(f.at(following, b.add(at, LONG(part))), NEAREST)
            value = f.load(_FLOATS, f.at(start, at), LONG(part))
            f.store(value, packed, b.add(b.mul(i, LONG(_VECTOR_BYTES)), LONG(part * LANES)))
        return []

    f.loop(first, stop, 1, [], line)


def _scores(f: Function, queries: Sequence[Value], turned: Value, lane_sums: Value, num_parts: int) -> list[Value]:
    """Return a vector of LANES scores for each query; see _turn.

    lane_sums: scratch for a vector of each lane and query.
    """
    b = f.b

    def place(lane: Value | int, n: int) -> Value:
        lane = LONG(lane) if isinstance(lane, int) else lane
        return b.mul(b.add(b.mul(lane, LONG(len(queries))), LONG(n)), LONG(_VECTOR_BYTES))

    def of_lane(lane: Value, _: list[Value]) -> list[Value]:
        column = f.at(turned, b.mul(lane, LONG(num_parts * _VECTOR_BYTES)))
        query_lane = [f.at(query, b.mul(lane, LONG(_FLOAT_BYTES))) for query in queries]
        totals: list[Value] = []
        for part in range(0, num_parts * _VECTOR_BYTES, _VECTOR_BYTES):
            key = f.load(_FLOATS, column, LONG(part))
            factors = [f.spread(f.load(FLOAT, query, LONG(part)), LANES) for query in query_lane]
            if part:
                totals = [_fma(f, factor, key, total) for factor, total in zip(factors, totals, strict=True)]
            else:
                totals = [b.fmul(factor, key) for factor in factors]
        for n, total in enumerate(totals):
            f.store(total, lane_sums, place(lane, n))
        return []

    f.loop(LONG(0), LONG(LANES), 1, [], of_lane)

    def added(n: int, first: int, count: int) -> Value:
        if count == 1:
            return f.load(_FLOATS, lane_sums, place(first, n))
        return b.fadd(*(added(n, side, count // 2) for side in (first, first + count // 2)))

    return [added(n, 0, LANES) for n in range(len(queries))]


def _fma(f: Function, x: Value, y: Value, total: Value) -> Value:
    return f.call(f"llvm.fma.{_OF_FLOATS}", _FLOATS, x, y, total)


def _hide(f: Function, scores: Value, begin: Value, end: Value, count: Value) -> None:
    """Have scores before ``begin`` and from ``end`` on, up to the end of the vector of the last, weigh nothing."""
    b = f.b
    nothing = splat(FLOAT, LANES, -math.inf)
    lanes = ir.Constant(vector(LONG, LANES), list(range(LANES)))

    def before(i: Value, _: list[Value]) -> list[Value]:
        at = b.mul(i, LONG(4))
        is_seen = b.icmp_signed(">=", b.add(lanes, f.spread(i, LANES)), f.spread(begin, LANES))
        f.store(b.select(is_seen, f.load(_FLOATS, scores, at), nothing), scores, at)
        return []

    def behind(i: Value, _: list[Value]) -> list[Value]:
        f.store(nothing, scores, b.mul(i, LONG(4)))
        return []

    f.loop(LONG(0), begin, LANES, [], before)
    f.loop(end, b.and_(b.add(count, LONG(LANES - 1)), LONG(-LANES)), LANES, [], behind)


def _soften(f: Function, scores: Value, count: Value, head_dim: int) -> Value:
    """Put e^(score / sqrt(head_dim)), less the largest exponent, in the scores' place; return 1 / their sum."""
    b = f.b

    def larger(i: Value, found: list[Value]) -> list[Value]:
        return [f.call(f"llvm.maxnum.{_OF_FLOATS}", _FLOATS, f.load(_FLOATS, scores, b.mul(i, LONG(4))), found[0])]

    largest = f.loop(LONG(0), count, LANES, [splat(FLOAT, LANES, -math.inf)], larger)[0]
    most = f.spread(f.call(f"llvm.vector.reduce.fmax.{_OF_FLOATS}", FLOAT, largest), LANES)
    to_powers_of_2 = splat(FLOAT, LANES, math.log2(math.e) / math.sqrt(head_dim))

    def soft(i: Value, found: list[Value]) -> list[Value]:
        at = b.mul(i, LONG(4))
        weight = power_of_2(f, b.fmul(b.fsub(f.load(_FLOATS, scores, at), most), to_powers_of_2))
        f.store(weight, scores, at)
        return [b.fadd(found[0], weight)]

    sums = f.loop(LONG(0), count, LANES, [splat(FLOAT, LANES, 0.0)], soft)[0]
    return b.fdiv(FLOAT(1.0), f.total(sums))
