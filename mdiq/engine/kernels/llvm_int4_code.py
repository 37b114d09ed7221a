"""The loops of LlvmInt4, in LLVM's language: what they compute and in which order; see llvm_int4.py.

A lane of a vector is one row of the matrix, so that no vector's lanes are ever added. ROWS rows lie interleaved: of a
block of 32 columns first the nibbles, in words of four bytes, the first word of each row before the second of each;
then the ROWS scales and the ROWS offsets of their blocks, in f16. A wide vector holds two times ROWS rows.

Of matrices in groups, as Q4_K has them, the scales and mins of blocks are bytes, and behind the blocks of a GROUP come
its ROWS scales of scales and its ROWS scales of mins, in f16. What a group adds up to are then integers but for these.
In Q6_K's groups a block has behind its nibbles the upper two bits of all of them (see gguf_blocks.py), two words for
each row, then two scales for each row, a byte with a sign for half of the block; there are no mins.

Activations lie in blocks, too: BLOCK levels of a byte, the even columns before the odd ones; their step, which is what
one level stands for, f32; and the sum of levels: f32 and times the step; or for groups i32; or for Q6_K's groups the
sums of both halves, 16 bits each. A step is of a block, or of a group: then its blocks all have it.
"""

from llvmlite import ir

from mdiq.engine.formats.gguf_blocks import BLOCK, GROUP
from mdiq.engine.kernels.llvm_code import (
    BYTE,
    FLOAT,
    HALF,
    INT,
    LONG,
    NEAREST,
    POINTER,
    SECOND,
    SHORT,
    Function,
    Value,
    build_multiply,
    matrix_words,
    part_width,
    splat,
    vector,
)
from mdiq.engine.kernels.llvm_products_code import (
    pair_products,
    products_of_6,
    scaled_products,
    small_product,
    sum_products,
)

ROWS = 8
"""Of the matrix, interleaved."""
NUM_WEIGHTS = 2
"""Addresses of a matrix: its rows interleaved, and what each row's results are multiplied with. Its columns follow."""
PACKED_BYTES = ROWS * (BLOCK // 2 + 4)
"""Of a block of ROWS rows."""
_ZERO = 8  # the nibble that stands for 0
_STEP_AT, _SUM_AT, _ROUNDED_BYTES = BLOCK, BLOCK + 4, BLOCK + 8  # of a block of activations
_PAD = 64  # bytes between rows of activations: rows a power of two apart push each other out of the cache
_GROUPED_BLOCK_BYTES = {4: ROWS * (BLOCK // 2 + 2), 6: ROWS * (BLOCK // 2 + BLOCK // 4 + 2)}
_GROUP_BYTES = {
    bits: GROUP // BLOCK * size + ROWS * numbers
    for (bits, size), numbers in zip(_GROUPED_BLOCK_BYTES.items(), (4, 2), strict=True)
}
_ZERO_OF_6 = 32
_LEVELS = 127  # of an activation, above and below 0
_WORDS = BLOCK // 8  # of a block's nibbles in one row: four bytes, eight columns
_FEW_ROWS = 2  # of activations, for which the matrix is read as it lies
_OUTPUTS, _COLUMNS = 32, 2_048  # of the matrix: a tile of activations stays in the nearest cache for so many rows
_AHEAD = 2_048  # bytes: how far weights are asked for ahead for few rows
_LINE = 64  # bytes


def build(features: frozenset[str], *, is_wide: bool = False, grouped: int = 0) -> Value:
    """Return the module for a CPU with such features; the bits of results are the same for all.

    is_wide: use vectors of 512 bits where several rows of activations come. grouped: for matrices in groups with
    quants of so many bits, 4 or 6; 0 is for others.
    """
    module = ir.Module()
    _build_prepare(module, grouped=grouped)
    max_rows = 8 if {"avx512vl", "neon"} & features else 6  # what 32 or 16 registers hold the sums of
    for num_rows in range(1, max_rows + 1):
        # Few rows of activations wait for memory, which likes to be read in the order of its addresses.
        num_places = 2 if is_wide and num_rows > _FEW_ROWS else 1
        _build_tile(module, num_rows, features, num_places=num_places, grouped=grouped)
    build_multiply(
        module,
        num_weights=NUM_WEIGHTS,
        strides=(lambda f, sizes: _rounded_bytes(f, sizes[0], LONG(_PAD)),),
        num_sizes=1,
        max_rows=max_rows,
        outputs=_OUTPUTS,
        columns=_COLUMNS,
    )
    return module


def _smaller(f: Function, one: Value, other: Value) -> Value:
    return f.b.select(f.b.icmp_signed("<", one, other), one, other)


def row_bytes(num_in: int) -> int:
    """Return how many bytes a row of rounded activations takes."""
    return num_in // BLOCK * _ROUNDED_BYTES + _PAD


def _rounded_bytes(f: Function, num_columns: Value, more: Value) -> Value:
    """Return what so many columns of activations take, a multiple of BLOCK, and ``more`` bytes."""
    return f.b.add(f.b.mul(f.b.ashr(num_columns, LONG(5)), LONG(_ROUNDED_BYTES)), more)


def _build_prepare(module: Value, *, grouped: int) -> None:
    """Build prepare, see build_multiply: blocks of activations, see above, for x: f32 [rows, in]."""
    f = Function(module, "prepare", [POINTER] * 3 + [LONG] * 3)
    b = f.b
    x, matrix, rounded, _, first_row, stop_row = f.arguments
    _, (num_in,) = matrix_words(f, matrix, NUM_WEIGHTS, 1)
    floats, ints, of_floats = vector(FLOAT, BLOCK), vector(INT, BLOCK), f"v{BLOCK}f32"
    width = GROUP if grouped else BLOCK

    def block_sum(levels: Value, step: Value) -> Value:
        total = f.call(f"llvm.vector.reduce.add.v{BLOCK}i32", INT, levels)
        if grouped == 6:
            first = f.call(f"llvm.vector.reduce.add.v{BLOCK // 2}i32", INT, f.pick(levels, range(BLOCK // 2)))
            return b.or_(b.and_(first, INT(0xFFFF)), b.shl(b.sub(total, first), INT(16)))
        return total if grouped else b.fmul(b.sitofp(total, FLOAT), step)

    def row(i: Value, _: list[Value]) -> list[Value]:
        x_row = f.at(x, b.mul(i, b.mul(num_in, LONG(4))))
        rounded_row = f.at(rounded, b.mul(i, _rounded_bytes(f, num_in, LONG(_PAD))))

        def sharing(first: Value, _: list[Value]) -> list[Value]:
            """Do what has one step."""
            stop = _smaller(f, b.add(first, LONG(width)), num_in)

            def most(column: Value, found: list[Value]) -> list[Value]:
                sizes = f.call(f"llvm.fabs.{of_floats}", floats, f.load(floats, x_row, b.mul(column, LONG(4))))
                return [f.call(f"llvm.maxnum.{of_floats}", floats, sizes, found[0])]

            largest = f.loop(first, stop, BLOCK, [splat(FLOAT, BLOCK, 1e-30)], most)[0]
            largest = f.call(f"llvm.vector.reduce.fmax.{of_floats}", FLOAT, largest)
            step = b.fdiv(largest, FLOAT(_LEVELS))
            per_step = f.spread(b.fdiv(FLOAT(_LEVELS), largest), BLOCK)

            def block(column: Value, _: list[Value]) -> list[Value]:
                place = _rounded_bytes(f, column, LONG(0))
                levels = b.fmul(f.load(floats, x_row, b.mul(column, LONG(4))), per_step)
                levels = f.call(f"llvm.rint.{of_floats}", floats, levels)
                # Of an activation that is no number these make a level: LLVM's conversion to integers wants one.
                levels = f.call(f"llvm.maxnum.{of_floats}", floats, levels, splat(FLOAT, BLOCK, -_LEVELS))
                levels = f.call(f"llvm.minnum.{of_floats}", floats, levels, splat(FLOAT, BLOCK, _LEVELS))
                whole = b.fptosi(levels, ints)
                small = b.trunc(whole, vector(BYTE, BLOCK))
                for parity in range(2):
                    part = f.pick(small, range(parity, BLOCK, 2))
                    f.store(part, rounded_row, b.add(place, LONG(parity * BLOCK // 2)))
                f.store(step, rounded_row, b.add(place, LONG(_STEP_AT)))
                f.store(block_sum(whole, step), rounded_row, b.add(place, LONG(_SUM_AT)))
                return []

            f.loop(first, stop, BLOCK, [], block)
            return []

        f.loop(LONG(0), num_in, width, [], sharing)
        return []

    f.loop(first_row, stop_row, 1, [], row)
    f.finish()


def _build_tile(module: Value, num_rows: int, features: frozenset[str], *, num_places: int, grouped: int) -> None:
    """Build tile<num_rows>(packed, unit, rounded, y, out, first, stop, begin, end, in).

    It adds what columns ``begin`` to ``end - 1`` of the matrix give to columns ``first`` to ``stop - 1`` of y: f32
    [num_rows, out], which needs no start. All of ``out``, ``first`` and ``stop`` are multiples of ROWS. What it is
    given is as LlvmInt4 and prepare have it. A row's sums are made in the same order whatever num_rows is.
    """
    f = Function(module, f"tile{num_rows}", [POINTER] * 4 + [LONG] * 6)
    b = f.b
    packed, unit, rounded, y, num_out, first, stop, begin, end, num_in = f.arguments
    num_lanes = num_places * ROWS
    floats, of_floats = vector(FLOAT, num_lanes), f"v{num_lanes}f32"
    width = part_width(f, num_in, _COLUMNS)
    numbers = [LONG(row) for row in range(num_rows)]
    rounded_rows = [f.at(rounded, b.mul(row, _rounded_bytes(f, num_in, LONG(_PAD)))) for row in numbers]

    def num_bytes(num_columns: Value) -> Value:
        """Of so many columns of ROWS rows: columns are a multiple of BLOCK, or of GROUP."""
        if grouped:
            return b.mul(b.ashr(num_columns, LONG(8)), LONG(_GROUP_BYTES[grouped]))
        return b.mul(b.ashr(num_columns, LONG(5)), LONG(PACKED_BYTES))

    def output(i: Value, _: list[Value]) -> list[Value]:
        places = [i]
        if num_places == 2:
            other = b.add(i, LONG(ROWS))
            places.append(b.select(b.icmp_signed("<", other, stop), other, i))
        places_starts = [f.at(packed, b.mul(b.sdiv(place, LONG(ROWS)), num_bytes(num_in))) for place in places]
        if num_rows <= _FEW_ROWS:
            cache, following = NEAREST, f.at(places_starts[0], LONG(_AHEAD))
        else:  # of the next rows of the matrix that tiles go over, as much as was read of these
            num_read = b.add(
                b.mul(b.sdiv(b.sub(stop, first), LONG(ROWS)), num_bytes(begin)),
                b.mul(b.sdiv(b.sub(i, first), LONG(ROWS)), num_bytes(b.sub(end, begin))),
            )
            cache = SECOND
            following = f.at(packed, b.add(b.mul(b.sdiv(stop, LONG(ROWS)), num_bytes(num_in)), num_read))
            following = f.at(following, b.mul(num_bytes(begin), LONG(-num_places)))

        def ask(at: Value, count: int) -> None:
            """Ask for what lies as far ahead of ``count`` bytes at a place of each matrix row."""
            for line in range(0, num_places * count, _LINE):
                f.ask_for(f.at(following, b.add(b.mul(at, LONG(num_places)), LONG(line))), cache)

        def load(element: Value, count: int, at: Value, offset: int) -> Value:
            where = b.add(at, LONG(offset))
            return f.joined([f.load(vector(element, count), start, where) for start in places_starts])

        def load_weights(at: Value) -> list[Value]:
            weights: list[Value] = []
            for word in range(_WORDS):
                both = load(BYTE, 4 * ROWS, at, 4 * ROWS * word)
                fours = splat(BYTE, 4 * num_lanes, 4)
                weights += [b.and_(both, splat(BYTE, 4 * num_lanes, 15)), b.lshr(both, fours)]
            return weights

        def load_activations(rounded_row: Value, at: Value) -> list[Value]:
            places = [4 * word + parity * BLOCK // 2 for word in range(_WORDS) for parity in range(2)]
            return [load_number(INT, rounded_row, at, place) for place in places]

        def load_number(kind: Value, rounded_row: Value, at: Value, place: int) -> Value:
            return f.spread(f.load(kind, rounded_row, b.add(at, LONG(place))), num_lanes)

        def block(column: Value, totals: list[Value]) -> list[Value]:
            at, rounded_at = num_bytes(column), _rounded_bytes(f, column, LONG(0))
            ask(at, PACKED_BYTES)
            weights = load_weights(at)
            scale, offset = (b.fpext(load(HALF, ROWS, at, PACKED_BYTES - 2 * ROWS * k), floats) for k in (2, 1))
            offset = f.call(f"llvm.fma.{of_floats}", floats, scale, splat(FLOAT, num_lanes, -_ZERO), offset)
            results = []
            for rounded_row, total in zip(rounded_rows, totals, strict=True):
                products = sum_products(f, weights, load_activations(rounded_row, rounded_at), features)
                found = b.fmul(b.sitofp(products, floats), load_number(FLOAT, rounded_row, rounded_at, _STEP_AT))
                total = f.call(f"llvm.fma.{of_floats}", floats, found, scale, total)
                block_sum = load_number(FLOAT, rounded_row, rounded_at, _SUM_AT)
                results.append(f.call(f"llvm.fma.{of_floats}", floats, offset, block_sum, total))
            return results

        def with_upper_bits(weights: list[Value], at: Value) -> list[Value]:
            """Return quants of six bits for nibbles."""
            bytes_, shorts = vector(BYTE, 4 * num_lanes), vector(SHORT, 2 * num_lanes)
            wide: list[Value] = []
            for i, weight in enumerate(weights):
                upper = b.bitcast(load(BYTE, 4 * ROWS, at, 4 * ROWS * (_WORDS + i // 4)), shorts)
                shift = 4 - 2 * (i % 4)
                by = splat(SHORT, 2 * num_lanes, abs(shift))
                upper = b.lshr(upper, by) if shift < 0 else b.shl(upper, by) if shift else upper
                wide.append(b.or_(weight, b.and_(b.bitcast(upper, bytes_), splat(BYTE, 4 * num_lanes, 48))))
            return wide

        def group(column: Value, totals: list[Value]) -> list[Value]:
            group_at, block_bytes = num_bytes(column), _GROUPED_BLOCK_BYTES[grouped]
            num_sums = 2 if grouped == 4 else 1  # for each row: of products, and of what mins meet

            def grouped_block(i: Value, carried: list[Value]) -> list[Value]:
                at = b.add(group_at, b.mul(i, LONG(block_bytes)))
                rounded_at = _rounded_bytes(f, b.add(column, b.mul(i, LONG(BLOCK))), LONG(0))
                ask(at, block_bytes)
                weights = load_weights(at)
                if grouped == 6:
                    weights = with_upper_bits(weights, at)
                    pairs = b.sext(load(BYTE, 2 * ROWS, at, block_bytes - 2 * ROWS), vector(SHORT, 2 * num_lanes))
                    zeros = b.mul(pairs, splat(SHORT, 2 * num_lanes, -_ZERO_OF_6))
                else:
                    scale, low = (
                        b.zext(load(BYTE, ROWS, at, block_bytes - ROWS * k), vector(INT, num_lanes)) for k in (2, 1)
                    )
                results = []
                for k, rounded_row in enumerate(rounded_rows):
                    activations = load_activations(rounded_row, rounded_at)
                    sums = load_number(INT, rounded_row, rounded_at, _SUM_AT)
                    if grouped == 6:
                        products = products_of_6(f, pairs, weights, activations, features)
                        found = [b.add(products, pair_products(f, zeros, b.bitcast(sums, pairs.type), features))]
                    else:
                        products = scaled_products(f, scale, weights, activations, features)
                        found = [products, small_product(f, low, sums, features)]
                    before = carried[num_sums * k : num_sums * (k + 1)]
                    results += [b.add(*sides) for sides in zip(before, found, strict=True)]
                return results

            nothing = [splat(INT, num_lanes, 0)] * (num_sums * num_rows)
            found = f.loop(LONG(0), LONG(GROUP // BLOCK), 1, nothing, grouped_block)
            factors = [
                b.fpext(load(HALF, ROWS, group_at, GROUP // BLOCK * block_bytes + 2 * ROWS * k), floats)
                for k in range(num_sums)
            ]
            results = []
            for k, (rounded_row, total) in enumerate(zip(rounded_rows, totals, strict=True)):
                sums = [b.sitofp(of_group, floats) for of_group in found[num_sums * k : num_sums * (k + 1)]]
                if grouped == 6:
                    value = b.fmul(sums[0], factors[0])
                else:
                    low = b.fneg(b.fmul(sums[1], factors[1]))
                    value = f.call(f"llvm.fma.{of_floats}", floats, sums[0], factors[0], low)
                step = load_number(FLOAT, rounded_row, _rounded_bytes(f, column, LONG(0)), _STEP_AT)
                results.append(f.call(f"llvm.fma.{of_floats}", floats, value, step, total))
            return results

        def part(part_begin: Value, _: list[Value]) -> list[Value]:
            part_end = _smaller(f, b.add(part_begin, width), end)
            nothing = [splat(FLOAT, num_lanes, 0.0)] * num_rows
            step, body = (GROUP, group) if grouped else (BLOCK, block)
            totals = f.loop(part_begin, part_end, step, nothing, body)
            is_first = b.icmp_signed("==", part_begin, LONG(0))
            is_last = b.icmp_signed("==", part_end, num_in)
            values, pointers = [], []
            for row, total in zip(numbers, totals, strict=True):
                for k, place in enumerate(places):
                    none, of_place = splat(FLOAT, ROWS, 0.0), vector(FLOAT, ROWS)
                    pointers.append(f.at(y, b.mul(b.add(b.mul(row, num_out), place), LONG(4))))
                    before = b.select(is_first, none, f.load(of_place, pointers[-1], LONG(0)))
                    value = b.fadd(before, f.pick(total, range(k * ROWS, (k + 1) * ROWS)))
                    scaled = b.fmul(value, f.load(of_place, unit, b.mul(place, LONG(4))))
                    values.append(b.select(is_last, scaled, value))
            for value, pointer in zip(values, pointers, strict=True):  # behind all loads: two may be of one place
                f.store(value, pointer, LONG(0))
            return []

        f.loop(begin, end, width, [], part)
        return []

    f.loop(first, stop, num_lanes, [], output)
    f.finish()
