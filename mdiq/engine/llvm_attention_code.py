"""The loops of CompiledAttention, in LLVM's language: what they compute and in which order; see llvm_attention.py."""

import math
from collections.abc import Sequence

from llvmlite import ir

from mdiq.engine.llvm_code import FLOAT, INT, LONG, NEAREST, POINTER, Function, Value, splat, vector

LANES = 16
"""Floats of a vector: head dimensions are multiples, and rows of scores have room for so many more."""
_FLOATS, _OF_FLOATS = vector(FLOAT, LANES), f"v{LANES}f32"
_LINE_BYTES = 64
_AHEAD = 8  # tokens: how far keys and values are asked for ahead, since a head's lie in strides
_LEAST_EXPONENT = -126.0  # of the smallest normal float
_EXPONENT_BIAS, _MANTISSA_BITS = 127, 23
_POWERS = 7  # of the series of 2^x: what is left out is below half a unit in the last place for |x| <= 1/2


def build(features: frozenset[str], *, head_dim: int, groups: int) -> Value:
    """Return the module for heads of ``head_dim``, ``groups`` query heads for each KV head.

    Its function attend(q, keys, values, out, reads, scores, num_kv_heads, q_step, out_step, window, width, first,
    stop) does items ``first`` to ``stop - 1``; item i is KV head i % num_kv_heads of token i // num_kv_heads.

    q, out: f32 rows [heads, head_dim], ``q_step`` and ``out_step`` bytes apart. keys, values: pools, f32 [slots,
    num_kv_heads, head_dim]. reads: of each token, where its Sequence's slots stand (i64), how many they are, and its
    row in q and out. scores: f32 [groups, width], scratch with LANES more than the longest Sequence. window: slots that
    are read at most, from the last; 0 is all.
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
        token = b.sdiv(i, num_kv_heads)
        head = b.sub(i, b.mul(token, num_kv_heads))
        group = b.mul(head, b.mul(head_bytes, LONG(groups)))
        read = f.at(reads, b.mul(token, LONG(24)))
        slots = f.load(POINTER, read, LONG(0))
        end, number = (f.load(LONG, read, LONG(at)) for at in (8, 16))
        q_heads = f.at(f.at(q, b.mul(number, q_step)), group)
        found = f.at(f.at(out, b.mul(number, out_step)), group)
        last = b.sub(end, LONG(1))
        is_over = b.and_(b.icmp_signed(">", window, LONG(0)), b.icmp_signed(">", end, window))
        begin = b.select(is_over, b.sub(end, window), LONG(0))
        count = b.sub(end, begin)

        def row(pool: Value, t: Value) -> Value:
            """Return a pointer to this head's row of the token that slot number ``t`` holds."""
            slot = f.load(LONG, slots, b.mul(t, LONG(8)))
            return f.at(pool, b.mul(b.add(b.mul(slot, num_kv_heads), head), head_bytes))

        def rows(pool: Value, t: Value, tile: range) -> list[Value]:
            later = b.add(t, LONG(_AHEAD))
            following = row(pool, b.select(b.icmp_signed("<", later, last), later, last))
            for line in range(0, 0 if tile.start else 4 * head_dim, _LINE_BYTES):
                f.ask_for(f.at(following, LONG(line)), NEAREST)
            here = row(pool, t)
            return [f.load(_FLOATS, here, LONG(part)) for part in parts]

        for tile in _tiles(groups, LANES // 2):
            queries = [[f.load(_FLOATS, q_heads, LONG(4 * head_dim * g + part)) for part in parts] for g in tile]

            def score(
                t: Value, _: list[Value], tile: range = tile, queries: list[list[Value]] = queries
            ) -> list[Value]:
                key = rows(keys, t, tile)
                totals = f.lane_totals([_dot(f, query, key) for query in queries])
                for g, total in zip(tile, totals, strict=True):
                    f.store(total, scores, _place(f, width, g, b.sub(t, begin)))
                return []

            f.loop(begin, end, 1, [], score)
        inverses = [_soften(f, f.at(scores, _place(f, width, g, LONG(0))), count, head_dim) for g in range(groups)]
        for tile in _tiles(groups, max(num_sums // len(parts), 1)):

            def weigh(t: Value, sums: list[Value], tile: range = tile) -> list[Value]:
                value = rows(values, t, tile)
                weights = [f.spread(f.load(FLOAT, scores, _place(f, width, g, b.sub(t, begin))), LANES) for g in tile]
                heads = [sums[n : n + len(parts)] for n in range(0, len(sums), len(parts))]
                return [
                    _fma(f, weight, part, total)
                    for weight, head_sums in zip(weights, heads, strict=True)
                    for part, total in zip(value, head_sums, strict=True)
                ]

            sums = f.loop(begin, end, 1, [splat(FLOAT, LANES, 0.0)] * (len(parts) * len(tile)), weigh)
            for n, total in enumerate(sums):
                g, part = tile[n // len(parts)], parts[n % len(parts)]
                f.store(b.fmul(total, f.spread(inverses[g], LANES)), found, LONG(4 * head_dim * g + part))
        return []

    f.loop(first, stop, 1, [], item)
    f.finish()
    return module


def _tiles(groups: int, most: int) -> list[range]:
    return [range(g, min(g + most, groups)) for g in range(0, groups, most)]


def _place(f: Function, width: Value, head: int, number: Value) -> Value:
    """Return the bytes to a score."""
    return f.b.mul(f.b.add(f.b.mul(width, LONG(head)), number), LONG(4))


def _fma(f: Function, x: Value, y: Value, total: Value) -> Value:
    return f.call(f"llvm.fma.{_OF_FLOATS}", _FLOATS, x, y, total)


def _dot(f: Function, query: Sequence[Value], key: Sequence[Value]) -> Value:
    """Return a vector of sums whose total is the product of two rows."""
    total = f.b.fmul(query[0], key[0])
    for x, y in zip(query[1:], key[1:], strict=True):
        total = _fma(f, x, y, total)
    return total


def _soften(f: Function, scores: Value, count: Value, head_dim: int) -> Value:
    """Put e^(score / sqrt(head_dim)), less the largest exponent, in the scores' place; return 1 / their sum."""
    b = f.b
    # Whole vectors from here on: what lies behind the last score weighs nothing.
    f.store(splat(FLOAT, LANES, -math.inf), scores, b.mul(count, LONG(4)))

    def larger(i: Value, found: list[Value]) -> list[Value]:
        return [f.call(f"llvm.maxnum.{_OF_FLOATS}", _FLOATS, f.load(_FLOATS, scores, b.mul(i, LONG(4))), found[0])]

    largest = f.loop(LONG(0), count, LANES, [splat(FLOAT, LANES, -math.inf)], larger)[0]
    most = f.spread(f.call(f"llvm.vector.reduce.fmax.{_OF_FLOATS}", FLOAT, largest), LANES)
    to_powers_of_2 = splat(FLOAT, LANES, math.log2(math.e) / math.sqrt(head_dim))

    def soft(i: Value, found: list[Value]) -> list[Value]:
        at = b.mul(i, LONG(4))
        weight = _power_of_2(f, b.fmul(b.fsub(f.load(_FLOATS, scores, at), most), to_powers_of_2))
        f.store(weight, scores, at)
        return [b.fadd(found[0], weight)]

    sums = f.loop(LONG(0), count, LANES, [splat(FLOAT, LANES, 0.0)], soft)[0]
    return b.fdiv(FLOAT(1.0), f.total(sums))


def _power_of_2(f: Function, x: Value) -> Value:
    """Return 2^x for a vector, x at most 0: the exponent's bits for the whole part, a Taylor series for the rest."""
    b = f.b
    x = f.call(f"llvm.maxnum.{_OF_FLOATS}", _FLOATS, x, splat(FLOAT, LANES, _LEAST_EXPONENT))
    whole = f.call(f"llvm.rint.{_OF_FLOATS}", _FLOATS, x)
    rest = b.fsub(x, whole)
    terms = [math.log(2) ** n / math.factorial(n) for n in range(_POWERS)]
    series = splat(FLOAT, LANES, terms[-1])
    for term in reversed(terms[:-1]):
        series = _fma(f, series, rest, splat(FLOAT, LANES, term))
    ints = vector(INT, LANES)
    exponent = b.add(b.fptosi(whole, ints), splat(INT, LANES, _EXPONENT_BIAS))
    return b.fmul(series, b.bitcast(b.shl(exponent, splat(INT, LANES, _MANTISSA_BITS)), _FLOATS))
