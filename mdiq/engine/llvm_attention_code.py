"""The loops of CompiledAttention, in LLVM's language: what they compute and in which order; see llvm_attention.py."""

import math
from collections.abc import Callable, Sequence

from llvmlite import ir

from mdiq.engine.kv_cache import BLOCK_TOKENS
from mdiq.engine.llvm_code import FLOAT, LONG, NEAREST, POINTER, Function, Value, power_of_2, splat, vector

LANES = 16
"""Floats of a vector: head dimensions are multiples."""
SPARE = 2 * LANES
"""Floats that a row of scores has more than the longest Sequence: it is hidden in whole vectors."""
_FLOATS, _OF_FLOATS = vector(FLOAT, LANES), f"v{LANES}f32"
_LINE_BYTES = 64
_AHEAD = 8  # tokens: how far values are asked for ahead, since a head's lie in strides


def build(features: frozenset[str], *, head_dim: int, groups: int) -> Value:
    """Return the module for heads of ``head_dim``, ``groups`` query heads for each KV head.

    Its function attend(q, keys, values, out, reads, scores, num_kv_heads, q_step, out_step, window, width, first,
    stop) does items ``first`` to ``stop - 1``; item i is KV head i % num_kv_heads of tile i // num_kv_heads. A tile is
    some tokens of one Sequence, each behind the other: they share what is loaded.

    q, out: f32 rows [heads, head_dim], ``q_step`` and ``out_step`` bytes apart. keys, values: pools, f32 [slots,
    num_kv_heads, head_dim]. reads: of each tile, where its Sequence's slots stand (i64; those of a KvBlock are
    neighbours), how many of them its first token sees, that token's row in q and out, and its number of tokens.
    scores: f32 [tokens of a tile, groups, width], scratch with SPARE more than the longest Sequence. window: slots that
    are read at most, from the last; 0 is all.

    What a token finds does not depend on its tile. Each score is one sum. Weights are added in LANES sums by their
    place in the Sequence, and values from the first to the last; what a token does not see weighs 0, which changes no
    sum.
    """
    module = ir.Module()
    f = Function(module, "attend", [POINTER] * 6 + [LONG] * 7)
    b = f.b
    q, keys, values, out, reads, scores = f.arguments[:6]
    num_kv_heads, q_step, out_step, window, width, first, stop = f.arguments[6:]
    head_bytes = LONG(4 * head_dim)
    parts = range(0, 4 * head_dim, 4 * LANES)
    # Of values, as many heads at a time as half of the vector registers hold the sums of.
    num_sums = 16 if "avx512f" in features or "neon" in features else 8

    def item(i: Value, _: list[Value]) -> list[Value]:
        number = b.sdiv(i, num_kv_heads)
        head = b.sub(i, b.mul(number, num_kv_heads))
        group = b.mul(head, b.mul(head_bytes, LONG(groups)))
        read = f.at(reads, b.mul(number, LONG(32)))
        slots = f.load(POINTER, read, LONG(0))
        first_end, first_row, num_tokens = (f.load(LONG, read, LONG(at)) for at in (8, 16, 24))
        end = b.sub(b.add(first_end, num_tokens), LONG(1))
        last = b.sub(end, LONG(1))
        token_bytes = b.mul(num_kv_heads, head_bytes)

        def begin_of(end: Value) -> Value:
            is_over = b.and_(b.icmp_signed(">", window, LONG(0)), b.icmp_signed(">", end, window))
            return b.select(is_over, b.sub(end, window), LONG(0))

        begin = begin_of(first_end)
        base = b.and_(begin, LONG(-BLOCK_TOKENS))

        def row(pool: Value, t: Value) -> Value:
            """Return a pointer to this head's row of the token that slot number ``t`` holds."""
            slot = f.load(LONG, slots, b.mul(t, LONG(8)))
            return f.at(pool, b.mul(b.add(b.mul(slot, num_kv_heads), head), head_bytes))

        def heads_of(rows: Value, step: Value, token: Value) -> Value:
            """Return a pointer to this group's heads of a token of the tile."""
            return f.at(f.at(rows, b.mul(b.add(first_row, token), step)), group)

        def scores_of(token: Value, g: int) -> Value:
            """Return a pointer to the scores of one head, the first of them at ``base``."""
            return f.at(scores, b.mul(b.mul(b.add(b.mul(token, LONG(groups)), LONG(g)), width), LONG(4)))

        def some_scores(t: Value, _: list[Value]) -> list[Value]:
            here = row(keys, t)
            later = b.add(t, LONG(LANES))
            following = row(keys, b.select(b.icmp_signed("<", later, end), later, t))
            for i in range(LANES):
                for line in range(0, 4 * head_dim, _LINE_BYTES):
                    f.ask_for(f.at(following, b.add(b.mul(token_bytes, LONG(i)), LONG(line))), NEAREST)
            at = b.mul(b.sub(t, base), LONG(4))

            def of_token(token: Value, _: list[Value]) -> list[Value]:
                heads = heads_of(q, q_step, token)
                for g in range(groups):
                    query = [f.load(_FLOATS, heads, LONG(4 * head_dim * g + part)) for part in parts]

                    def dot(i: int, query: list[Value] = query) -> Value:
                        key = f.at(here, b.mul(token_bytes, LONG(i)))
                        return _dot(f, query, [f.load(_FLOATS, key, LONG(part)) for part in parts])

                    f.store(_totals(f, dot, 0, LANES), scores_of(token, g), at)
                return []

            f.loop(LONG(0), num_tokens, 1, [], of_token)
            return []

        f.loop(base, end, LANES, [], some_scores)

        def weights_of_token(token: Value, _: list[Value]) -> list[Value]:
            token_end = b.add(first_end, token)
            count = b.sub(end, base)
            for g in range(groups):
                row_scores = scores_of(token, g)
                _hide(f, row_scores, b.sub(begin_of(token_end), base), b.sub(token_end, base), count)
                inverse = _soften(f, row_scores, count, head_dim)
                f.store(inverse, row_scores, b.mul(b.sub(width, LONG(1)), LONG(4)))
            return []

        f.loop(LONG(0), num_tokens, 1, [], weights_of_token)
        tiles = _tiles(groups, max(num_sums // len(parts), 1))

        def add_values(
            token: Value, tile: range, first: Value, stop: Value, sums: list[Value], value_at: Callable[[Value], Value]
        ) -> list[Value]:
            """Return the sums of some heads with the values from ``first`` to ``stop - 1``."""
            places = [scores_of(token, g) for g in tile]

            def weigh(t: Value, sums: list[Value]) -> list[Value]:
                here, at = value_at(t), b.mul(b.sub(t, base), LONG(4))
                value = [f.load(_FLOATS, here, LONG(part)) for part in parts]
                weights = [f.spread(f.load(FLOAT, place, at), LANES) for place in places]
                heads = [sums[n : n + len(parts)] for n in range(0, len(sums), len(parts))]
                return [
                    _fma(f, weight, part, total)
                    for weight, head_sums in zip(weights, heads, strict=True)
                    for part, total in zip(value, head_sums, strict=True)
                ]

            return f.loop(first, stop, 1, sums, weigh)

        def places(found: Value, tile: range) -> list[tuple[Value, Value]]:
            return [(found, LONG(4 * head_dim * g + part)) for g in tile for part in parts]

        def inverse_of(token: Value, g: int) -> Value:
            return f.spread(f.load(FLOAT, scores_of(token, g), b.mul(b.sub(width, LONG(1)), LONG(4))), LANES)

        def finish(token: Value, tile: range, sums: list[Value]) -> None:
            inverses = [inverse_of(token, g) for g in tile for _ in parts]
            for place, total, inverse in zip(places(heads_of(out, out_step, token), tile), sums, inverses, strict=True):
                f.store(b.fmul(total, inverse), *place)

        is_one, many, behind = (f.function.append_basic_block() for _ in range(3))
        b.cbranch(b.icmp_signed("==", num_tokens, LONG(1)), is_one, many)

        b.position_at_end(is_one)
        for tile in tiles:

            def asked(t: Value, tile: range = tile) -> Value:
                later = b.add(t, LONG(_AHEAD))
                following = row(values, b.select(b.icmp_signed("<", later, last), later, last))
                for line in range(0, 0 if tile.start else 4 * head_dim, _LINE_BYTES):
                    f.ask_for(f.at(following, LONG(line)), NEAREST)
                return row(values, t)

            zeros = [splat(FLOAT, LANES, 0.0)] * (len(parts) * len(tile))
            finish(LONG(0), tile, add_values(LONG(0), tile, begin, end, zeros, asked))
        b.branch(behind)

        b.position_at_end(many)

        def for_tokens(body: Callable[[Value, range, list[tuple[Value, Value]]], None]) -> None:
            def of_token(token: Value, _: list[Value]) -> list[Value]:
                found = heads_of(out, out_step, token)
                for tile in tiles:
                    body(token, tile, places(found, tile))
                return []

            f.loop(LONG(0), num_tokens, 1, [], of_token)

        def clear(_: Value, __: range, where: list[tuple[Value, Value]]) -> None:
            for place in where:
                f.store(splat(FLOAT, LANES, 0.0), *place)

        def end_of_token(token: Value, tile: range, where: list[tuple[Value, Value]]) -> None:
            finish(token, tile, [f.load(_FLOATS, *place) for place in where])

        def block(t: Value, _: list[Value]) -> list[Value]:
            start = row(values, t)
            after = b.add(t, LONG(BLOCK_TOKENS))
            first = b.select(b.icmp_signed(">", t, begin), t, begin)
            stop = b.select(b.icmp_signed("<", after, end), after, end)

            def value_at(i: Value) -> Value:
                return f.at(start, b.mul(b.sub(i, t), token_bytes))

            def add_block(token: Value, tile: range, where: list[tuple[Value, Value]]) -> None:
                sums = [f.load(_FLOATS, *place) for place in where]
                for place, total in zip(where, add_values(token, tile, first, stop, sums, value_at), strict=True):
                    f.store(total, *place)

            for_tokens(add_block)
            return []

        for_tokens(clear)
        f.loop(base, end, BLOCK_TOKENS, [], block)
        for_tokens(end_of_token)
        b.branch(behind)
        b.position_at_end(behind)
        return []

    f.loop(first, stop, 1, [], item)
    f.finish()
    return module


def _tiles(groups: int, most: int) -> list[range]:
    return [range(g, min(g + most, groups)) for g in range(0, groups, most)]


def _fma(f: Function, x: Value, y: Value, total: Value) -> Value:
    return f.call(f"llvm.fma.{_OF_FLOATS}", _FLOATS, x, y, total)


def _dot(f: Function, query: Sequence[Value], key: Sequence[Value]) -> Value:
    """Return a vector of sums whose total is the product of two rows."""
    total = f.b.fmul(query[0], key[0])
    for x, y in zip(query[1:], key[1:], strict=True):
        total = _fma(f, x, y, total)
    return total


def _totals(f: Function, dot: Callable[[int], Value], start: int, count: int) -> Value:
    """Return a vector of which lanes ``start`` on hold the totals of so many dots, as Function.lane_totals adds them.

    Depth first, so that few vectors are in registers at a time.
    """
    if count == 1:
        return dot(start)
    low, high = (_totals(f, dot, side, count // 2) for side in (start, start + count // 2))
    return f.b.fadd(*(f.pick_of_two(low, high, range(parity, 2 * LANES, 2)) for parity in range(2)))


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
