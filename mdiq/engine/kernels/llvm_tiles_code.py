"""The loop over a matrix in tiles that all compiled matmuls share; what a tile computes is its caller's."""

from collections.abc import Callable, Sequence

from llvmlite import ir

from mdiq.engine.kernels.llvm_code import FLOAT, INT, LONG, POINTER, VOID, Function, Operand, Value, lesser, vector

PART_STEP = 256
"""Columns: what multiply gives a tile begins at a multiple, and ends at one or at the last column."""
FEW_ROWS = 2
"""Of activations: they wait for memory, so the matrix is read in the order of its addresses."""
AHEAD = 2_048
"""Bytes: how far weights are asked for ahead for few rows."""
COLUMNS = 2_048
"""Of a matrix, about as many at a time where the activations of a tile do not fit the nearest cache."""
_OUTPUTS = 32  # rows of the matrix that all tiles go over before the next: a tile of activations stays in that cache
# Of activations that a tile takes at once: half of a nearest cache of 32 KiB, since weights pass there too.
_NEAR_BYTES = 16_384


def matrix_words(matrix: Value, num_addresses: int, num_sizes: int) -> tuple[list[Value], list[Value]]:
    """Return the addresses and then the sizes that describe a matrix, in successive words of 64 bits."""
    kinds = [POINTER] * num_addresses + [LONG] * num_sizes
    words = [matrix.load(kind, 8 * i) for i, kind in enumerate(kinds)]
    return words[:num_addresses], words[num_addresses:]


def build_multiply(
    module: ir.Module,
    *,
    num_weights: int,
    strides: Sequence[Callable[[Value], Operand]],
    max_rows: int,
    finishes: bool = False,
) -> None:
    """Build multiply(matrix, rounded, y, out, first, stop, num_rows): a matmul, tile by tile.

    It fills columns ``first`` to ``stop - 1`` of y, f32 [num_rows, out]. Functions tile1, tile2.. of the module do it
    for as many rows: tile(weights.., activations.., y, out, first, stop, begin, end, in) takes the columns of the
    matrix from ``begin`` to ``end - 1``. Weights come from memory once, whatever the number of rows.

    matrix: the addresses of its weights and its number of columns, see matrix_words. rounded: where its prepare(x,
    matrix, rounded, num_rows, first, stop) has put the activations of x: f32 [num_rows, in], called for all rows, in
    any parts. All arrays that describe activations lie there one after the other.
    strides: return the bytes of one row of each of these arrays, for the number of columns.
    max_rows: of the largest tile; tiles are about as large as each other.
    finishes: after the tiles of some rows, multiply calls finish(weights.., activations.., y, out, first, stop,
    num_rows, in) for these rows.
    """
    f = Function(module, "multiply", 3, 4)
    matrix, rounded, y, num_out, first, stop, num_rows = f.arguments
    weights, (num_in,) = matrix_words(matrix, num_weights, 1)
    steps = [f.integer(stride(num_in)) for stride in strides]
    pointers = [rounded]
    for step in steps[:-1]:
        pointers.append(pointers[-1] + num_rows * step)
    steps.append(num_out * 4)
    num_tiles = (num_rows + (max_rows - 1)) // max_rows
    with f.each(first, stop, _OUTPUTS) as begin:
        end = lesser(begin + _OUTPUTS, stop)
        with f.each(0, num_tiles) as i:
            row = num_rows * i // num_tiles
            count = num_rows * (i + 1) // num_tiles - row
            rows = [start + row * step for start, step in zip((*pointers, y), steps, strict=True)]
            after = f.function.append_basic_block()
            choice = f.b.switch(count.ir, after)
            for size in range(1, max_rows + 1):
                case = f.function.append_basic_block()
                choice.add_case(LONG(size), case)
                f.b.position_at_end(case)
                _call_tile(f, size, (*weights, *rows, num_out, begin, end), num_in)
                f.b.branch(after)
            f.b.position_at_end(after)
            if finishes:
                f.call("finish", VOID, *weights, *rows, num_out, begin, end, count, num_in)
    f.finish()


def _call_tile(f: Function, num_rows: int, arguments: Sequence[Value], num_in: Value) -> None:
    """Call a tile for all columns of the matrix, or for some of them at a time where its activations are many."""
    is_small = num_in * num_rows <= _NEAR_BYTES
    width = is_small.select(num_in, part_width(num_in))
    with f.each(0, num_in, width) as begin:
        f.call(f"tile{num_rows}", VOID, *arguments, begin, lesser(begin + width, num_in), num_in)


def part_width(num_in: Value) -> Value:
    """Return how many columns tiles take at a time: about COLUMNS, in parts of one size, of which none is tiny."""
    num_parts = (num_in + COLUMNS // 2) // COLUMNS
    num_parts = (num_parts < 1).select(1, num_parts)
    return num_in // num_parts + (PART_STEP - 1) & -PART_STEP


def largest_size(f: Function, row: Value, first: Operand, stop: Operand, lanes: int) -> Value:
    """Return the largest magnitude of the floats in columns ``first`` to ``stop - 1`` of a row, and 1e-30 at least."""
    floats = vector(FLOAT, lanes)
    largest = f.fold(
        first, stop, lanes, f.splat(FLOAT, lanes, 1e-30), lambda i, most: row.load(floats, i * 4).abs().or_larger(most)
    )
    return largest.largest()


def whole_levels(levels: Value, least: int, most: int) -> Value:
    """Return floats rounded to integers within these bounds."""
    # Of an activation that is not a number these make a level: LLVM's conversion to integers wants one.
    return levels.rounded().or_larger(least).or_smaller(most).to(INT)


def together(i: Value, stop: Value, count: int, step: int) -> list[Value]:
    """Return the outputs that a tile computes at once, one or two; without a second one the first is done twice."""
    if count == 1:
        return [i]
    following = i + step
    return [i, (following < stop).select(following, i)]
