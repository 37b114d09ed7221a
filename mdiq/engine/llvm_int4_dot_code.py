"""The loops of LlvmInt4Dot, in LLVM's language: what they compute and in which order; see llvm_int4_dot.py.

A step takes WIDTH columns of one row of the matrix: 32 bytes of nibbles. 16 bytes are a block of 32 columns, the even
ones in the low nibbles. A wide vector holds a step of two rows of the matrix, and its halves go each their own way: so
the bits of a result are the same for vectors of both sizes.
"""

from functools import reduce

from llvmlite import ir

from mdiq.engine.llvm_code import (
    BYTE,
    FLOAT,
    INT,
    LONG,
    NEAREST,
    PART_STEP,
    POINTER,
    SECOND,
    SHORT,
    Function,
    Value,
    build_finish,
    build_multiply,
    part_width,
    splat,
    vector,
    with_dot_products,
    zero_level,
)
from mdiq.engine.quantize import BLOCK

WIDTH = 2 * BLOCK
"""Columns of a step."""
GROUP = 4 * WIDTH
"""Columns whose products are added as integers: their activations have one scale."""
PAD = 64
"""Bytes between rows of activations: rows that lie a power of two apart push each other out of the cache."""
LANES = 8
"""32-bit numbers for a row of the matrix."""
ZERO = 128
"""What stands for 0 among levels of weights while they are made, and on x86 behind it; see llvm_code.zero_level."""
FRACTION = 8
"""Bits behind the point of a block's factor and start."""
_LEVELS = 127  # of an activation, above and below 0
_MOST_ROWS = 8
_FEW_ROWS = 2  # of activations, for which the matrix is read row by row
_OUTPUTS, _COLUMNS = 32, 2_048  # of the matrix: a tile of activations stays in the nearest cache for so many rows
assert PART_STEP % GROUP == 0  # no group lies in two parts
_AHEAD = 2_048  # bytes: how far nibbles are asked for ahead for few rows, and scales a quarter of it


def build(features: frozenset[str], *, is_wide: bool = False) -> Value:
    """Return the module for a CPU with such features; without dot products it is slow, and gives the same bits.

    is_wide: use vectors of 512 bits, which some CPUs that have them are slower with.
    """
    module = ir.Module()
    _build_prepare(module, features)
    for num_rows in range(1, _MOST_ROWS + 1):
        # Few rows of activations wait for memory, which likes to be read row by row.
        _build_tile(module, num_rows, features, num_places=2 if is_wide and num_rows > _FEW_ROWS else 1)
    build_finish(module, num_pointers=7, num_sizes=1, lanes=LANES, result=_result)
    build_multiply(
        module,
        num_weights=3,
        strides=(
            lambda f, sizes: f.b.add(sizes[0], LONG(PAD)),
            lambda f, sizes: f.b.mul(_num_groups(f, sizes[0]), LONG(4)),
            lambda f, sizes: f.b.mul(_num_groups(f, sizes[0]), LONG(4 * LANES)),
        ),
        num_sizes=1,
        most_rows=_MOST_ROWS,
        outputs=_OUTPUTS,
        columns=_COLUMNS,
        finishes=True,
    )
    return module


def _num_groups(f: Function, num_in: Value) -> Value:
    return f.b.sdiv(f.b.add(num_in, LONG(GROUP - 1)), LONG(GROUP))


def _bounds(f: Function, group: Value, num_in: Value) -> tuple[Value, Value]:
    """Return a group's first column and the one behind its last: the last group may be short."""
    start = f.b.mul(group, LONG(GROUP))
    stop = f.b.add(start, LONG(GROUP))
    return start, f.b.select(f.b.icmp_signed("<", stop, num_in), stop, num_in)


def _build_prepare(module: Value, features: frozenset[str]) -> None:
    """Build prepare(x, rounded, steps, starts, num_rows, in): what a matmul wants of activations.

    x: f32 [rows, in]. rounded: i8 [rows, in + PAD], of every WIDTH columns the even ones before the odd ones. steps:
    f32 [rows, groups], what one of _LEVELS stands for in a group. starts: i32 [rows, groups, LANES], where a group's
    sums begin: it takes out what the level that stands for 0 adds.
    """
    f = Function(module, "prepare", [POINTER] * 4 + [LONG] * 2)
    b = f.b
    x, rounded, steps, starts, num_rows, num_in = f.arguments
    floats, ints, of_floats = vector(FLOAT, WIDTH), vector(INT, WIDTH), f"v{WIDTH}f32"
    num_groups = _num_groups(f, num_in)

    def row(i: Value, _: list[Value]) -> list[Value]:
        x_row = f.at(x, b.mul(i, b.mul(num_in, LONG(4))))
        rounded_row = f.at(rounded, b.mul(i, b.add(num_in, LONG(PAD))))

        def group(g: Value, _: list[Value]) -> list[Value]:
            first, stop = _bounds(f, g, num_in)
            place = b.add(b.mul(i, num_groups), g)

            def most(column: Value, found: list[Value]) -> list[Value]:
                sizes = f.call(f"llvm.fabs.{of_floats}", floats, f.load(floats, x_row, b.mul(column, LONG(4))))
                return [f.call(f"llvm.maxnum.{of_floats}", floats, sizes, found[0])]

            largest = f.loop(first, stop, WIDTH, [splat(FLOAT, WIDTH, 1e-30)], most)[0]
            largest = f.call(f"llvm.vector.reduce.fmax.{of_floats}", FLOAT, largest)
            f.store(b.fdiv(largest, FLOAT(_LEVELS)), steps, b.mul(place, LONG(4)))
            per_step = f.spread(b.fdiv(FLOAT(_LEVELS), largest), WIDTH)

            def columns(column: Value, totals: list[Value]) -> list[Value]:
                levels = b.fmul(f.load(floats, x_row, b.mul(column, LONG(4))), per_step)
                levels = f.call(f"llvm.rint.{of_floats}", floats, levels)
                # Of an activation that is no number these make a level: LLVM's conversion to integers wants one.
                levels = f.call(f"llvm.maxnum.{of_floats}", floats, levels, splat(FLOAT, WIDTH, -_LEVELS))
                levels = f.call(f"llvm.minnum.{of_floats}", floats, levels, splat(FLOAT, WIDTH, _LEVELS))
                whole = b.fptosi(levels, ints)
                small = b.trunc(whole, vector(BYTE, WIDTH))
                for parity in range(2):
                    part = f.pick(small, range(parity, WIDTH, 2))
                    f.store(part, rounded_row, b.add(column, LONG(parity * BLOCK)))
                return [b.add(totals[0], whole)]

            total = f.loop(first, stop, WIDTH, [splat(INT, WIDTH, 0)], columns)[0]
            # Neighbours of a step are of one lane. Each lane on its own: so sums are the same whatever stands for 0.
            parts = [f.pick(total, range(k, WIDTH, WIDTH // LANES)) for k in range(WIDTH // LANES)]
            lanes = b.mul(reduce(b.add, parts), splat(INT, LANES, -zero_level(features)))
            f.store(lanes, starts, b.mul(place, LONG(4 * LANES)))
            return []

        f.loop(LONG(0), num_groups, 1, [], group)
        return []

    f.loop(LONG(0), num_rows, 1, [], row)
    f.finish()


def _build_tile(module: Value, num_rows: int, features: frozenset[str], *, num_places: int) -> None:
    """Build tile<num_rows>(nibbles, scales, unit, rounded, steps, starts, y, out, first, stop, begin, end, in).

    It adds what columns ``begin`` to ``end - 1`` of the matrix give to columns ``first`` to ``stop - 1`` of y: f32
    [num_rows, out], which needs no start, num_places of them at a time. What it is given is as LlvmInt4Dot and
    _build_prepare have it. A row's sums are made in the same order whatever num_rows is.
    """
    f = Function(module, f"tile{num_rows}", [POINTER] * 7 + [LONG] * 6)
    b = f.b
    nibbles, scales, unit, rounded, steps, starts, y, num_out, first, stop, begin, end, num_in = f.arguments
    num_lanes = num_places * LANES
    floats = vector(FLOAT, num_lanes)
    num_groups = _num_groups(f, num_in)
    width = part_width(f, num_in, _COLUMNS)
    rounded_rows = [f.at(rounded, b.mul(LONG(row), b.add(num_in, LONG(PAD)))) for row in range(num_rows)]

    def output(i: Value, _: list[Value]) -> list[Value]:
        places = [i]
        if num_places == 2:
            other = b.add(i, LONG(1))
            places.append(b.select(b.icmp_signed("<", other, stop), other, i))
        nibbles_rows = [f.at(nibbles, b.mul(place, b.ashr(num_in, LONG(1)))) for place in places]
        scales_rows = [f.at(scales, b.mul(place, b.ashr(num_in, LONG(3)))) for place in places]

        if num_rows <= _FEW_ROWS:
            cache, following = NEAREST, [f.at(nibbles_rows[0], LONG(_AHEAD)), f.at(scales_rows[0], LONG(_AHEAD // 4))]
        else:  # of the next rows of the matrix that tiles go over, as much as was read of these
            num_read = b.add(b.mul(b.sub(stop, first), begin), b.mul(b.sub(i, first), b.sub(end, begin)))
            num_read = b.add(b.mul(stop, num_in), b.sub(num_read, begin))
            cache, following = (
                SECOND,
                [f.at(nibbles, b.ashr(num_read, LONG(1))), f.at(scales, b.ashr(num_read, LONG(3)))],
            )

        def part(part_begin: Value, _: list[Value]) -> list[Value]:
            part_end = b.add(part_begin, width)
            part_end = b.select(b.icmp_signed("<", part_end, end), part_end, end)

            def group(column: Value, totals: list[Value]) -> list[Value]:
                return with_group(b.sdiv(column, LONG(GROUP)), totals)

            totals = f.loop(part_begin, part_end, GROUP, [splat(FLOAT, num_lanes, 0.0)] * num_rows, group)
            is_first = b.icmp_signed("==", part_begin, LONG(0))
            halves = [f.pick(total, range(k * LANES, (k + 1) * LANES)) for total in totals for k in range(num_places)]
            found = [total for k in range(0, len(halves), LANES) for total in f.lane_totals(halves[k : k + LANES])]
            values, pointers = [], []
            for k, total in enumerate(found):
                row, place = LONG(k // num_places), places[k % num_places]
                pointers.append(f.at(y, b.mul(b.add(b.mul(row, num_out), place), LONG(4))))
                before = b.select(is_first, FLOAT(0.0), f.load(FLOAT, pointers[-1], LONG(0)))
                values.append(b.fadd(before, total))
            for value, pointer in zip(values, pointers, strict=True):  # behind all loads: two may be of one place
                f.store(value, pointer, LONG(0))
            return []

        def with_group(g: Value, totals: list[Value]) -> list[Value]:
            def columns(column: Value, sums: list[Value]) -> list[Value]:
                at = b.ashr(column, LONG(1))
                for start, row_bytes in zip(following, (at, b.ashr(column, LONG(3))), strict=True):
                    f.ask_for(f.at(start, row_bytes), cache)
                packed = f.joined([f.load(vector(BYTE, WIDTH // 2), row, at) for row in nibbles_rows])
                pairs = [f.load(LONG, row, b.ashr(column, LONG(3))) for row in scales_rows]
                levels = _levels(f, packed, pairs, features)
                results = []
                for row, total in zip(rounded_rows, sums, strict=True):
                    for parity, weights in enumerate(levels):
                        activations = f.load(vector(INT, LANES), row, b.add(column, LONG(parity * BLOCK)))
                        activations = f.joined([activations] * num_places)
                        total = with_dot_products(f, total, weights, activations, features)
                    results.append(total)
                return results

            rows = [b.add(b.mul(LONG(row), num_groups), g) for row in range(num_rows)]
            sums = [f.load(vector(INT, LANES), starts, b.mul(row, LONG(4 * LANES))) for row in rows]
            sums = f.loop(*_bounds(f, g, num_in), WIDTH, [f.joined([start] * num_places) for start in sums], columns)
            added = []
            for row, products, total in zip(rows, sums, totals, strict=True):
                step = f.spread(f.load(FLOAT, steps, b.mul(row, LONG(4))), num_lanes)
                products = b.sitofp(products, floats)
                added.append(f.call(f"llvm.fma.v{num_lanes}f32", floats, products, step, total))
            return added

        f.loop(begin, end, width, [], part)
        return []

    f.loop(first, stop, num_places, [], output)
    f.finish()


def _result(f: Function, y_row: Value, _: Value, at: Value, count: int) -> Value:
    totals, units = (f.load(vector(FLOAT, count), start, at) for start in (y_row, f.arguments[2]))
    return f.b.fmul(totals, units)


def _levels(f: Function, packed: Value, pairs: list[Value], features: frozenset[str]) -> list[Value]:
    """Return levels of the even and of the odd columns: u8, two vectors as large as ``packed``.

    packed: nibbles q of one or two rows of the matrix. pairs: for each of the rows, factor and start of both blocks, 16
    bits each. A level is (factor * q + start) >> FRACTION.
    """
    b = f.b
    num_bytes = packed.type.count
    bytes_, shorts = packed.type, vector(SHORT, num_bytes // 2)
    parts = [b.and_(packed, splat(BYTE, num_bytes, 15)), b.lshr(packed, splat(BYTE, num_bytes, 4))]
    numbers = b.bitcast(f.joined([f.spread(pair, 4) for pair in pairs]), shorts)
    # Of the 16 bytes of a block, that block's: of the first, numbers 0 and 1 of the four, of the second 2 and 3.
    blocks = [8 * k + 2 * (k % 2) for k in range(num_bytes // 16)]
    flipped = ZERO - zero_level(features)
    if not {"avx2", "neon"} & features:
        levels = []
        for part in parts:
            factor, start = (f.pick(numbers, [block + k for block in blocks for _ in range(16)]) for k in range(2))
            level = b.add(b.mul(b.zext(part, vector(SHORT, num_bytes)), factor), start)
            level = b.trunc(b.lshr(level, splat(SHORT, num_bytes, FRACTION)), bytes_)
            levels.append(b.xor(level, splat(BYTE, num_bytes, flipped)))
        return levels
    # A table of a block's 16 levels, in which the nibbles are looked up.
    factor, start = (f.pick(numbers, [block + k for block in blocks for _ in range(8)]) for k in range(2))
    even = b.add(b.mul(factor, ir.Constant(shorts, [2 * (i % 8) for i in range(num_bytes // 2)])), start)
    odd = b.add(even, factor)
    kept = splat(SHORT, num_bytes // 2, 0xFF00)
    table = b.bitcast(b.or_(b.lshr(even, splat(SHORT, num_bytes // 2, FRACTION)), b.and_(odd, kept)), bytes_)
    table = b.xor(table, splat(BYTE, num_bytes, flipped))
    if "avx2" in features:
        look_up = "llvm.x86.avx512.pshuf.b.512" if num_bytes == 64 else "llvm.x86.avx2.pshuf.b"
        return [f.call(look_up, bytes_, table, part) for part in parts]
    halves = [range(16 * i, 16 * i + 16) for i in range(num_bytes // 16)]
    return [
        f.joined(
            [
                f.call("llvm.aarch64.neon.tbl1.v16i8", vector(BYTE, 16), f.pick(table, half), f.pick(part, half))
                for half in halves
            ]
        )
        for part in parts
    ]
