"""The loops of LlvmInt8: what they compute and in which order; see llvm_int8.py."""

from llvmlite import ir

from mdiq.engine.kernels.llvm_code import (
    BYTE,
    FLOAT,
    INT,
    LONG,
    POINTER,
    SECOND,
    Function,
    Value,
    constant,
    lane_totals,
    vector,
)
from mdiq.engine.kernels.llvm_products_code import with_dot_products, zero_level
from mdiq.engine.kernels.llvm_tiles_code import (
    AHEAD,
    FEW_ROWS,
    build_multiply,
    largest_size,
    matrix_words,
    together,
    whole_levels,
)

ALIGNMENT = 64
"""Bytes: rows of activations begin there, and end that much after what they hold."""
STEP = 16
"""Columns that are rounded together."""
ZERO = 128
"""What stands for 0 while activations are rounded, and on x86 afterwards: dot products want one side without sign."""
_NUM_WEIGHTS = 3  # addresses of a matrix that multiply reads: of q, scale, starts
_LANES = 16  # sums that become results together
_LEVELS = 127  # of an activation, above and below 0


def build(features: frozenset[str]) -> ir.Module:
    """Return the module for a CPU with such features: the same bits for all, slow without AVX2 or dot products."""
    is_wide = "avx512vnni" in features
    max_rows = 12 if is_wide else 6  # what 32 or 16 registers hold the sums of, for two rows of the matrix each
    module = ir.Module()
    _build_prepare(module, features)
    for num_rows in range(1, max_rows + 1):
        _build_tile(module, num_rows, features, lanes=16 if is_wide else 8)
    _build_finish(module, features)
    strides = (_row_bytes, lambda _: 4)
    build_multiply(module, num_weights=_NUM_WEIGHTS, strides=strides, max_rows=max_rows, finishes=True)
    return module


def row_bytes(num_in: int, num_copies: int) -> int:
    """Return how many bytes a row of rounded activations takes, and a row with copies before it is rounded."""
    return -(-num_in // ALIGNMENT) * ALIGNMENT + ALIGNMENT + 4 + (4 * num_in if num_copies else 0)


def _row_bytes(num_in: Value) -> Value:
    return (num_in + (ALIGNMENT - 1) & -ALIGNMENT) + ALIGNMENT


def _build_prepare(module: ir.Module, features: frozenset[str]) -> None:
    """Build prepare, see build_multiply: what a matmul wants of activations.

    After the words that multiply reads of a matrix come: how many copies of hot columns it has, which columns they
    are of (i64), and the share of an activation that each of all columns gets (f32); see quantize_columns.

    x: f32 [rows, in - copies]. It makes rows of bytes, see _row_bytes, and after all of them what one of _LEVELS
    stands for in each row, f32; after these lie the shares where there are copies, f32 [rows, in].
    """
    f = Function(module, "prepare", 3, 3)
    x, matrix, rounded, num_rows, first_row, stop_row = f.arguments
    _, (num_in, num_copies) = matrix_words(matrix, _NUM_WEIGHTS, 2)
    hot, share = (matrix.load(POINTER, 8 * (_NUM_WEIGHTS + k)) for k in (2, 3))
    num_columns = num_in - num_copies
    steps = rounded + num_rows * _row_bytes(num_in)
    shares = steps + num_rows * 4
    floats = vector(FLOAT, STEP)
    with f.each(first_row, stop_row) as row:
        given, spread_row = x + row * (num_columns * 4), shares + row * (num_in * 4)
        # A matrix's copies of a column get equal shares of its activation.
        with f.each(0, (num_copies > 0).select(num_columns, 0), STEP) as column:
            at = column * 4
            spread_row.store(given.load(floats, at) * share.load(floats, at), at)
        with f.each(0, num_copies) as i:
            column = hot.load(LONG, i * 8)
            at = (num_columns + i) * 4
            spread_row.store(given.load(FLOAT, column * 4) * share.load(FLOAT, at), at)
        x_row = (num_copies > 0).select(spread_row, given)
        rounded_row = rounded + row * _row_bytes(num_in)
        step = largest_size(f, x_row, 0, num_in, STEP) / _LEVELS
        steps.store(step, row * 4)
        with f.each(0, num_in, STEP) as column:
            levels = x_row.load(floats, column * 4) / step.spread(STEP) + ZERO  # then rounded: as FBGEMM has it
            whole = whole_levels(levels, ZERO - _LEVELS, ZERO + _LEVELS) - (ZERO - zero_level(features))
            rounded_row.store(whole.to(BYTE), column)
    f.finish()


def _build_tile(module: ir.Module, num_rows: int, features: frozenset[str], *, lanes: int) -> None:
    """Build tile<num_rows>(q, scale, starts, rounded, steps, y, out, first, stop, begin, end, in).

    It adds what columns ``begin`` to ``end - 1`` of the matrix give to columns ``first`` to ``stop - 1`` of y: i32
    [num_rows, out], which needs no start. What it is given is as LlvmInt8 and _build_prepare have it.
    """
    f = Function(module, f"tile{num_rows}", 6, 6)
    q, _, _, rounded, _, y, num_out, first, stop, begin, end, num_in = f.arguments
    is_first = begin.equals(0)
    width = 4 * lanes
    ints = vector(INT, lanes)
    rows = [rounded + f.integer(row) * _row_bytes(num_in) for row in range(num_rows)]
    whole = end & -width
    # After the last whole vector lie columns of the next row, or of nothing.
    num_left = (num_in - whole >> 2).to(INT).spread(lanes)
    mask = f.lane_numbers(INT, lanes) < num_left
    # Few rows of activations go through the matrix as it lies; more make use of what was loaded twice.
    num_outputs = 1 if num_rows <= FEW_ROWS else 2

    with f.each(first, stop, num_outputs) as i:
        places = together(i, stop, num_outputs, 1)
        weight_rows = [q + place * num_in for place in places]
        # Always in the order of their addresses and no nearer than the second cache: in another order, or into the
        # nearest, weights came half as fast.
        if num_outputs == 1:
            following = weight_rows[0] + AHEAD
        else:  # of the next rows of the matrix that tiles go over, as much as was read of these
            num_read = (stop - first) * begin + (i - first) * (end - begin)
            following = q + (stop * num_in + num_read)

        def added(sums: list[Value], weights: list[Value], column: Value) -> list[Value]:
            results = []
            for row, row_sums in zip(rows, zip(*[iter(sums)] * num_outputs, strict=True), strict=True):
                activations = row.load(ints, column)
                for total, weight in zip(row_sums, weights, strict=True):
                    results.append(with_dot_products(total, activations, weight, features))
            return results

        def columns(column: Value, sums: list[Value]) -> list[Value]:
            for k in range(num_outputs):
                (following + ((column - begin) * num_outputs + k * width)).ask_for(SECOND)
            return added(sums, [row.load(ints, column) for row in weight_rows], column)

        def rest(column: Value, sums: list[Value]) -> list[Value]:
            load, alignment = f"llvm.masked.load.v{lanes}i32.p0", constant(f.b, INT, 1)
            nothing = sums[0].constant(0)
            weights = [f.call(load, ints, row + column, alignment, mask, nothing) for row in weight_rows]
            return added(sums, weights, column)

        sums = f.loop(begin, whole, width, [f.splat(INT, lanes, 0)] * (num_rows * num_outputs), columns)
        sums = f.loop(whole, end, width, sums, rest)
        totals = [total for i in range(0, len(sums), lanes) for total in lane_totals(sums[i : i + lanes])]
        values, pointers = [], []
        for k, total in enumerate(totals):
            row, place = k // num_outputs, places[k % num_outputs]
            pointers.append(y + (f.integer(row) * num_out + place) * 4)
            values.append(total + is_first.select(0, pointers[-1].load(INT)))
        for value, pointer in zip(values, pointers, strict=True):  # after all loads: two may be of one place
            pointer.store(value)
    f.finish()


def _build_finish(module: ir.Module, features: frozenset[str]) -> None:
    """Build finish(q, scale, starts, rounded, steps, y, out, first, stop, num_rows, in): results f32 for sums in y."""
    f = Function(module, "finish", 6, 5)
    _, scale, starts, _, steps, y, num_out, first, stop, num_rows, _ = f.arguments
    whole = first + (stop - first & -_LANES)
    with f.each(0, num_rows) as row:
        y_row = y + row * num_out * 4
        for start, end, count in ((first, whole, _LANES), (whole, stop, 1)):
            with f.each(start, end, count) as place:
                at = place * 4
                totals = y_row.load(vector(INT, count), at)
                if zero_level(features):
                    totals = totals + starts.load(vector(INT, count), at)
                values = totals.to(FLOAT) * scale.load(vector(FLOAT, count), at)
                y_row.store(values * steps.load(FLOAT, row * 4).spread(count), at)
    f.finish()
