"""The loops of LlvmInt4: what they compute and in which order; see llvm_int4.py.

A lane of a vector is one row of the matrix, so that no vector's lanes are ever added. ROWS rows lie interleaved: of a
block of 32 columns first the nibbles, in words of four bytes, the first word of each row before the second of each;
then the ROWS scales and the ROWS offsets of their blocks, in f16. A wide vector holds two times ROWS rows.

Of matrices in groups, as Q4_K has them, the scales and mins of blocks are bytes, and after the blocks of a GROUP come
its ROWS scales of scales and its ROWS scales of mins, in f16. What a group adds up to are then integers but for these.
In Q6_K's groups a block has after its nibbles the upper two bits of all of them (see gguf_blocks.py), two words for
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
    NEAREST,
    SECOND,
    SHORT,
    Function,
    Type,
    Value,
    fma,
    joined,
    lesser,
    vector,
)
from mdiq.engine.kernels.llvm_products_code import (
    pair_products,
    products_of_6,
    scaled_products,
    small_product,
    sum_products,
)
from mdiq.engine.kernels.llvm_tiles_code import (
    AHEAD,
    FEW_ROWS,
    build_multiply,
    largest_size,
    matrix_words,
    part_width,
    together,
    whole_levels,
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
_LINE = 64  # bytes


def build(features: frozenset[str], *, is_wide: bool = False, grouped: int = 0) -> ir.Module:
    """Return the module for a CPU with such features; the bits of results are the same for all.

    is_wide: use vectors of 512 bits where several rows of activations come. grouped: for matrices in groups with
    quants of so many bits, 4 or 6; 0 is for others.
    """
    module = ir.Module()
    _build_prepare(module, grouped=grouped)
    max_rows = 8 if {"avx512vl", "neon"} & features else 6  # what 32 or 16 registers hold the sums of
    for num_rows in range(1, max_rows + 1):
        num_places = 2 if is_wide and num_rows > FEW_ROWS else 1
        _build_tile(module, num_rows, features, num_places=num_places, grouped=grouped)
    build_multiply(module, num_weights=NUM_WEIGHTS, strides=(_rounded_row_bytes,), max_rows=max_rows)
    return module


def row_bytes(num_in: int) -> int:
    """Return how many bytes a row of rounded activations takes."""
    return num_in // BLOCK * _ROUNDED_BYTES + _PAD


def _rounded_row_bytes(num_in: Value) -> Value:
    return _rounded_bytes(num_in) + _PAD


def _rounded_bytes(num_columns: Value) -> Value:
    """Return what so many columns of activations take, a multiple of BLOCK."""
    return (num_columns >> 5) * _ROUNDED_BYTES


def _build_prepare(module: ir.Module, *, grouped: int) -> None:
    """Build prepare, see build_multiply: blocks of activations, see above, for x: f32 [rows, in]."""
    f = Function(module, "prepare", 3, 3)
    x, matrix, rounded, _, first_row, stop_row = f.arguments
    _, (num_in,) = matrix_words(matrix, NUM_WEIGHTS, 1)
    width = GROUP if grouped else BLOCK

    def block_sum(levels: Value, step: Value) -> Value:
        total = levels.integer_total()
        if grouped == 6:
            first = levels.pick(range(BLOCK // 2)).integer_total()
            return first & 0xFFFF | total - first << 16
        return total if grouped else total.to(FLOAT) * step

    with f.each(first_row, stop_row) as row:
        x_row, rounded_row = x + row * (num_in * 4), rounded + row * _rounded_row_bytes(num_in)
        with f.each(0, num_in, width) as first:  # what has one step
            stop = lesser(first + width, num_in)
            largest = largest_size(f, x_row, first, stop, BLOCK)
            step, per_step = largest / _LEVELS, (_LEVELS / largest).spread(BLOCK)
            with f.each(first, stop, BLOCK) as column:
                at = _rounded_bytes(column)
                whole = whole_levels(x_row.load(vector(FLOAT, BLOCK), column * 4) * per_step, -_LEVELS, _LEVELS)
                small = whole.to(BYTE)
                for parity in range(2):
                    rounded_row.store(small.pick(range(parity, BLOCK, 2)), at + parity * (BLOCK // 2))
                rounded_row.store(step, at + _STEP_AT)
                rounded_row.store(block_sum(whole, step), at + _SUM_AT)
    f.finish()


def _build_tile(module: ir.Module, num_rows: int, features: frozenset[str], *, num_places: int, grouped: int) -> None:
    """Build tile<num_rows>(packed, unit, rounded, y, out, first, stop, begin, end, in).

    It adds what columns ``begin`` to ``end - 1`` of the matrix give to columns ``first`` to ``stop - 1`` of y: f32
    [num_rows, out], which needs no start. All of ``out``, ``first`` and ``stop`` are multiples of ROWS. What it is
    given is as LlvmInt4 and prepare have it. A row's sums are made in the same order whatever num_rows is.
    """
    f = Function(module, f"tile{num_rows}", 4, 6)
    packed, unit, rounded, y, num_out, first, stop, begin, end, num_in = f.arguments
    num_lanes = num_places * ROWS
    width = part_width(num_in)
    rounded_rows = [rounded + f.integer(row) * _rounded_row_bytes(num_in) for row in range(num_rows)]

    def num_bytes(num_columns: Value) -> Value:
        """Of so many columns of ROWS rows: columns are a multiple of BLOCK, or of GROUP."""
        return (num_columns >> 8) * _GROUP_BYTES[grouped] if grouped else (num_columns >> 5) * PACKED_BYTES

    with f.each(first, stop, num_lanes) as i:
        places = together(i, stop, num_places, ROWS)
        starts = [packed + place // ROWS * num_bytes(num_in) for place in places]
        if num_rows <= FEW_ROWS:
            cache, following = NEAREST, starts[0] + AHEAD
        else:  # of the next rows of the matrix that tiles go over, as much as was read of these
            num_read = (stop - first) // ROWS * num_bytes(begin) + (i - first) // ROWS * num_bytes(end - begin)
            cache, following = SECOND, packed + (stop // ROWS * num_bytes(num_in) + num_read)
            following = following + num_bytes(begin) * -num_places

        def ask(at: Value, count: int) -> None:
            """Ask for what lies as far ahead of ``count`` bytes at a place of each matrix row."""
            for line in range(0, num_places * count, _LINE):
                (following + (at * num_places + line)).ask_for(cache)

        def load(element: Type, count: int, at: Value) -> Value:
            return joined([start.load(vector(element, count), at) for start in starts])

        def load_weights(at: Value) -> list[Value]:
            weights: list[Value] = []
            for word in range(_WORDS):
                both = load(BYTE, 4 * ROWS, at + 4 * ROWS * word)
                weights += [both & 15, both.shifted_down(4)]
            return weights

        def load_activations(rounded_row: Value, at: Value) -> list[Value]:
            places = [4 * word + parity * BLOCK // 2 for word in range(_WORDS) for parity in range(2)]
            return [load_number(INT, rounded_row, at + place) for place in places]

        def load_number(kind: Type, rounded_row: Value, at: Value) -> Value:
            return rounded_row.load(kind, at).spread(num_lanes)

        def block(column: Value, totals: list[Value]) -> list[Value]:
            at, rounded_at = num_bytes(column), _rounded_bytes(column)
            ask(at, PACKED_BYTES)
            weights = load_weights(at)
            scale, offset = (load(HALF, ROWS, at + (PACKED_BYTES - 2 * ROWS * k)).to(FLOAT) for k in (2, 1))
            offset = fma(scale, -_ZERO, offset)
            results = []
            for rounded_row, total in zip(rounded_rows, totals, strict=True):
                products = sum_products(weights, load_activations(rounded_row, rounded_at), features)
                found = products.to(FLOAT) * load_number(FLOAT, rounded_row, rounded_at + _STEP_AT)
                total = fma(found, scale, total)
                results.append(fma(offset, load_number(FLOAT, rounded_row, rounded_at + _SUM_AT), total))
            return results

        def with_upper_bits(weights: list[Value], at: Value) -> list[Value]:
            """Return quants of six bits for nibbles."""
            wide: list[Value] = []
            for k, weight in enumerate(weights):
                upper = load(BYTE, 4 * ROWS, at + 4 * ROWS * (_WORDS + k // 4)).as_type(vector(SHORT, 2 * num_lanes))
                shift = 4 - 2 * (k % 4)
                upper = upper.shifted_down(-shift) if shift < 0 else upper << shift if shift else upper
                wide.append(weight | upper.as_type(weight.type) & 48)
            return wide

        def group(column: Value, totals: list[Value]) -> list[Value]:
            group_at, block_bytes = num_bytes(column), _GROUPED_BLOCK_BYTES[grouped]
            num_sums = 2 if grouped == 4 else 1  # for each row: of products, and of what mins meet

            def grouped_block(i: Value, carried: list[Value]) -> list[Value]:
                at = group_at + i * block_bytes
                rounded_at = _rounded_bytes(column + i * BLOCK)
                ask(at, block_bytes)
                weights = load_weights(at)
                if grouped == 6:
                    weights = with_upper_bits(weights, at)
                    pairs = load(BYTE, 2 * ROWS, at + (block_bytes - 2 * ROWS)).to(SHORT)
                    zeros = pairs * -_ZERO_OF_6
                else:
                    scale, low = (load(BYTE, ROWS, at + (block_bytes - ROWS * k)).unsigned(INT) for k in (2, 1))
                results: list[Value] = []
                for k, rounded_row in enumerate(rounded_rows):
                    activations = load_activations(rounded_row, rounded_at)
                    sums = load_number(INT, rounded_row, rounded_at + _SUM_AT)
                    if grouped == 6:
                        products = products_of_6(pairs, weights, activations, features)
                        found = [products + pair_products(zeros, sums.as_type(pairs.type), features)]
                    else:
                        products = scaled_products(scale, weights, activations, features)
                        found = [products, small_product(low, sums, features)]
                    before = carried[num_sums * k : num_sums * (k + 1)]
                    results += [one + other for one, other in zip(before, found, strict=True)]
                return results

            nothing = [f.splat(INT, num_lanes, 0)] * (num_sums * num_rows)
            found = f.loop(0, GROUP // BLOCK, 1, nothing, grouped_block)
            factors = [
                load(HALF, ROWS, group_at + (GROUP // BLOCK * block_bytes + 2 * ROWS * k)).to(FLOAT)
                for k in range(num_sums)
            ]
            results = []
            for k, (rounded_row, total) in enumerate(zip(rounded_rows, totals, strict=True)):
                value, *low_sums = (of_group.to(FLOAT) for of_group in found[num_sums * k : num_sums * (k + 1)])
                if grouped == 6:
                    value = value * factors[0]
                else:
                    value = fma(value, factors[0], -(low_sums[0] * factors[1]))
                step = load_number(FLOAT, rounded_row, _rounded_bytes(column) + _STEP_AT)
                results.append(fma(value, step, total))
            return results

        with f.each(begin, end, width) as part_begin:
            part_end = lesser(part_begin + width, end)
            nothing = [f.splat(FLOAT, num_lanes, 0.0)] * num_rows
            step, body = (GROUP, group) if grouped else (BLOCK, block)
            totals = f.loop(part_begin, part_end, step, nothing, body)
            is_first, is_last = part_begin.equals(0), part_end.equals(num_in)
            values, pointers = [], []
            for row, total in enumerate(totals):
                for k, place in enumerate(places):
                    pointers.append(y + (f.integer(row) * num_out + place) * 4)
                    before = is_first.select(0.0, pointers[-1].load(vector(FLOAT, ROWS)))
                    value = before + total.pick(range(k * ROWS, (k + 1) * ROWS))
                    values.append(is_last.select(value * unit.load(vector(FLOAT, ROWS), place * 4), value))
            for value, pointer in zip(values, pointers, strict=True):  # after all loads: two may be of one place
                pointer.store(value)
    f.finish()
