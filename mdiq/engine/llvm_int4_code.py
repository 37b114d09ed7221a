"""The loops of LlvmInt4, in LLVM's language: what they compute and in which order; see llvm_int4.py.

A step takes WIDTH columns of one row of the matrix: 32 bytes of nibbles, one load. 16 bytes are a block of 32 columns,
so that of a vector of 8 sums the first four are of one block and the last four of the next.
"""

from llvmlite import ir

from mdiq.engine.llvm_code import (
    BYTE,
    FLOAT,
    HALF,
    INT,
    LONG,
    NEAREST,
    POINTER,
    SHORT,
    Function,
    Value,
    build_multiply,
    splat,
    vector,
)
from mdiq.engine.quantize import BLOCK

WIDTH = 2 * BLOCK
"""Columns of a step."""
PAD = 64
"""Bytes between rows of activations: rows that lie a power of two apart push each other out of the cache."""
LANES = 8
"""32-bit numbers of a vector."""
FACTORS = 32_767
"""Largest factor of a block: times it, the sum of 8 products of at most 15 * 127 fits 32 bits."""
MOST_ROWS = 6
"""Rows of activations for which a step's weights are unpacked once: with more, AVX2's 16 registers do not do."""
_LEVELS = 127  # of an activation, above and below 0
_OUTPUTS = 16  # rows of the matrix for which a tile of activations stays in the nearest cache
_AHEAD = 1_024  # bytes: how far weights are asked for ahead; without it a core read 11.6 GB/s instead of 14.6


def build(features: frozenset[str]) -> Value:
    """Return the module for a CPU with such features, as LLVM calls them."""
    module = ir.Module()
    _build_prepare(module)
    for num_rows in range(1, MOST_ROWS + 1):
        _build_tile(module, num_rows, features)
    build_multiply(
        module,
        num_weights=4,
        strides=(
            lambda f, sizes: f.b.add(sizes[0], LONG(PAD)),
            lambda f, sizes: f.b.add(f.b.ashr(sizes[0], LONG(1)), LONG(PAD)),
            lambda f, sizes: f.b.mul(sizes[1], LONG(4)),
        ),
        num_sizes=2,
        most_rows=MOST_ROWS,
        outputs=_OUTPUTS,
        columns=None,
    )
    return module


def _build_prepare(module: Value) -> None:
    """Build prepare(x, rounded, steps, sums, num_rows, in, num_blocks): what a matmul wants of activations.

    x: f32 [rows, in]. rounded: i8 [rows, in + PAD], of every WIDTH columns the even ones of both blocks before the odd
    ones, as the low nibbles come before the high ones. steps: f32, rows of in / 2 + PAD bytes: what one of _LEVELS
    stands for in WIDTH columns, for each lane. sums: f32 [rows, num_blocks], of what the rounded activations of a block
    stand for.
    """
    f = Function(module, "prepare", [POINTER] * 4 + [LONG] * 3)
    b = f.b
    x, rounded, steps, sums, num_rows, num_in, num_blocks = f.arguments
    floats = vector(FLOAT, WIDTH)

    def row(i: Value, _: list[Value]) -> list[Value]:
        x_row = f.at(x, b.mul(i, b.mul(num_in, LONG(4))))
        rounded_row = f.at(rounded, b.mul(i, b.add(num_in, LONG(PAD))))
        steps_row = f.at(steps, b.mul(i, b.add(b.ashr(num_in, LONG(1)), LONG(PAD))))
        sums_row = f.at(sums, b.mul(i, b.mul(num_blocks, LONG(4))))

        def columns(column: Value, _: list[Value]) -> list[Value]:
            values = f.load(floats, x_row, b.mul(column, LONG(4)))
            sizes = f.call(f"llvm.fabs.v{WIDTH}f32", floats, values)
            most = f.call(f"llvm.vector.reduce.fmax.v{WIDTH}f32", FLOAT, sizes)
            most = f.call("llvm.maxnum.f32", FLOAT, most, FLOAT(1e-30))
            step = b.fdiv(most, FLOAT(_LEVELS))
            levels = b.fmul(values, f.spread(b.fdiv(FLOAT(_LEVELS), most), WIDTH))
            levels = f.call(f"llvm.rint.v{WIDTH}f32", floats, levels)
            # Of an activation that is no number these make a level: LLVM's conversion to integers wants one.
            levels = f.call(f"llvm.maxnum.v{WIDTH}f32", floats, levels, splat(FLOAT, WIDTH, -_LEVELS))
            levels = f.call(f"llvm.minnum.v{WIDTH}f32", floats, levels, splat(FLOAT, WIDTH, _LEVELS))
            whole = b.fptosi(levels, vector(INT, WIDTH))
            small = b.trunc(whole, vector(BYTE, WIDTH))
            for parity in range(2):
                part = f.pick(small, range(parity, WIDTH, 2))
                f.store(part, rounded_row, b.add(column, LONG(parity * BLOCK)))
            for i in range(2):
                block = f.pick(whole, range(i * BLOCK, (i + 1) * BLOCK))
                total = b.sitofp(f.call(f"llvm.vector.reduce.add.v{BLOCK}i32", INT, block), FLOAT)
                f.store(b.fmul(total, step), sums_row, b.add(b.ashr(column, LONG(3)), LONG(4 * i)))
            f.store(f.spread(step, LANES), steps_row, b.ashr(column, LONG(1)))
            return []

        f.loop(LONG(0), num_in, WIDTH, [], columns)
        return []

    f.loop(LONG(0), num_rows, 1, [], row)
    f.finish()


def _build_tile(module: Value, num_rows: int, features: frozenset[str]) -> None:
    """Build tile<num_rows>(nibbles, factors, unit, low, rounded, steps, sums, y, out, first, stop, 0, in, in, blocks).

    It fills columns ``first`` to ``stop - 1`` of y: f32 [num_rows, out], and takes all columns of the matrix at once.
    What it is given is as LlvmInt4 and _build_prepare have it. A row's sums are made in the same order whatever
    num_rows is.
    """
    f = Function(module, f"tile{num_rows}", [POINTER] * 8 + [LONG] * 7)
    b = f.b
    nibbles, factors, unit, low, rounded, steps, sums, y, num_out, first, stop, _, _, num_in, num_blocks = f.arguments
    row_bytes, factor_bytes = b.ashr(num_in, LONG(1)), b.ashr(num_in, LONG(4))
    bytes_, floats = vector(BYTE, WIDTH // 2), vector(FLOAT, LANES)
    rows = [LONG(row) for row in range(num_rows)]
    rounded_rows = [f.at(rounded, b.mul(row, b.add(num_in, LONG(PAD)))) for row in rows]
    steps_rows = [f.at(steps, b.mul(row, b.add(row_bytes, LONG(PAD)))) for row in rows]
    sums_rows = [f.at(sums, b.mul(row, b.mul(num_blocks, LONG(4)))) for row in rows]

    def output(i: Value, _: list[Value]) -> list[Value]:
        nibbles_row = f.at(nibbles, b.mul(i, row_bytes))
        factors_row = f.at(factors, b.mul(i, factor_bytes))
        low_row = f.at(low, b.mul(i, b.mul(num_blocks, LONG(2))))

        def columns(column: Value, totals: list[Value]) -> list[Value]:
            at = b.ashr(column, LONG(1))
            ahead = f.at(nibbles_row, b.add(at, LONG(_AHEAD)))
            f.ask_for(ahead, NEAREST)
            packed = f.load(bytes_, nibbles_row, at)
            weights = (b.and_(packed, splat(BYTE, WIDTH // 2, 15)), b.lshr(packed, splat(BYTE, WIDTH // 2, 4)))
            # Eight lanes of 16 bits are of the first block, eight of the second.
            two = f.load(vector(SHORT, 2), factors_row, b.ashr(column, LONG(4)))
            factors = f.pick(two, [0] * LANES + [1] * LANES)
            following = []
            for row, total in enumerate(totals):
                activations = [f.load(bytes_, rounded_rows[row], b.add(column, LONG(BLOCK * i))) for i in range(2)]
                products = _products(f, weights, activations, factors, features)
                step = f.load(floats, steps_rows[row], at)
                following.append(f.call(f"llvm.fma.v{LANES}f32", floats, b.sitofp(products, floats), step, total))
            return following

        def offsets(block: Value, totals: list[Value]) -> list[Value]:
            lows = b.fpext(f.load(vector(HALF, LANES), low_row, b.mul(block, LONG(2))), floats)
            at = b.mul(block, LONG(4))
            return [
                f.call(f"llvm.fma.v{LANES}f32", floats, lows, f.load(floats, sums_rows[row], at), total)
                for row, total in enumerate(totals)
            ]

        totals = f.loop(LONG(0), num_in, WIDTH, [splat(FLOAT, LANES, 0.0)] * num_rows, columns)
        units = f.spread(f.load(FLOAT, unit, b.mul(i, LONG(4))), LANES)
        totals = f.loop(LONG(0), num_blocks, LANES, [b.fmul(total, units) for total in totals], offsets)
        for row, total in zip(rows, totals, strict=True):
            f.store(f.total(total), y, b.mul(b.add(b.mul(row, num_out), i), LONG(4)))
        return []

    f.loop(first, stop, 1, [], output)
    f.finish()


def _products(
    f: Function,
    weights: tuple[Value, Value],
    activations: list[Value],
    factors: Value,
    features: frozenset[str],
) -> Value:
    """Return two vectors of weights, 0..15, times two of activations, times factors: LANES x i32, sums of 8 each.

    Both ways give the same integers: up to the factors 16 bits hold them.
    """
    b = f.b
    ints, shorts, wide = vector(INT, LANES), vector(SHORT, 2 * LANES), vector(SHORT, 4 * LANES)
    pairs = []
    for weight, activation in zip(weights, activations, strict=True):
        if "avx2" in features:
            pairs.append(f.call("llvm.x86.avx2.pmadd.ub.sw", shorts, weight, activation))
            continue
        each = b.mul(b.zext(weight, wide), b.sext(activation, wide))
        pairs.append(b.add(*(f.pick(each, range(parity, 4 * LANES, 2)) for parity in range(2))))
    total = b.add(*pairs)
    if "avx2" in features:
        return f.call("llvm.x86.avx2.pmadd.wd", ints, total, factors)
    wider = vector(INT, 2 * LANES)
    each = b.mul(b.sext(total, wider), b.sext(factors, wider))
    return b.add(*(f.pick(each, range(parity, 2 * LANES, 2)) for parity in range(2)))
