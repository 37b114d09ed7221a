"""The loops of LlvmInt8, in LLVM's language: what they compute and in which order; see llvm_int8.py."""

from functools import partial

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
    build_finish,
    build_multiply,
    matrix_words,
    splat,
    vector,
    with_dot_products,
    zero_level,
)

ALIGNMENT = 64
"""Bytes: rows of activations begin there, and end that much behind what they hold."""
STEP = 16
"""Columns that are rounded together."""
ZERO = 128
"""What stands for 0 while activations are rounded, and on x86 behind it: dot products want one side without sign."""
_NUM_WEIGHTS = 3  # addresses of a matrix that multiply reads: of q, scale, starts
_LANES = 16  # sums that become results together
_LEVELS = 127  # of an activation, above and below 0
_FEW_ROWS = 2  # of activations, for which the matrix is read row by row
_OUTPUTS, _COLUMNS = 32, 2_048  # of the matrix: a tile of activations stays in the nearest cache for so many rows
# Bytes: how far weights are asked for ahead for few rows. Always in the order of their addresses and no nearer than the
# second cache: in another order, or into the nearest, they came half as fast.
_AHEAD = 2_048


def build(features: frozenset[str]) -> Value:
    """Return the module for a CPU with such features: the same bits for all, slow without AVX2 or dot products."""
    is_wide = "avx512vnni" in features
    max_rows = 12 if is_wide else 6  # what 32 or 16 registers hold the sums of, for two rows of the matrix each
    module = ir.Module()
    _build_prepare(module, features)
    for num_rows in range(1, max_rows + 1):
        _build_tile(module, num_rows, features, lanes=16 if is_wide else 8)
    build_finish(module, num_pointers=6, num_sizes=1, lanes=_LANES, result=partial(_result, features=features))
    build_multiply(
        module,
        num_weights=_NUM_WEIGHTS,
        strides=(lambda f, sizes: _row_bytes(f, sizes[0]), lambda *_: LONG(4)),
        num_sizes=1,
        max_rows=max_rows,
        outputs=_OUTPUTS,
        columns=_COLUMNS,
        finishes=True,
    )
    return module


def row_bytes(num_in: int, num_copies: int) -> int:
    """Return how many bytes a row of rounded activations takes, and a row with copies before it is rounded."""
    return -(-num_in // ALIGNMENT) * ALIGNMENT + ALIGNMENT + 4 + (4 * num_in if num_copies else 0)


def _row_bytes(f: Function, num_in: Value) -> Value:
    return f.b.add(f.b.and_(f.b.add(num_in, LONG(ALIGNMENT - 1)), LONG(-ALIGNMENT)), LONG(ALIGNMENT))


def _build_prepare(module: Value, features: frozenset[str]) -> None:
    """Build prepare, see build_multiply: what a matmul wants of activations.

    Behind the words that multiply reads of a matrix come: how many copies of hot columns it has, which columns they
    are of (i64), and the share of an activation that each of all columns gets (f32); see quantize_columns.

    x: f32 [rows, in - copies]. It makes rows of bytes, see _row_bytes, and behind all of them what one of _LEVELS
    stands for in each row, f32; behind these lie the shares where there are copies, f32 [rows, in].
    """
    f = Function(module, "prepare", [POINTER] * 3 + [LONG] * 3)
    b = f.b
    x, matrix, rounded, num_rows, first_row, stop_row = f.arguments
    _, (num_in, num_copies) = matrix_words(f, matrix, _NUM_WEIGHTS, 2)
    hot, share = (f.load(POINTER, matrix, LONG(8 * (_NUM_WEIGHTS + k))) for k in (2, 3))
    num_columns = b.sub(num_in, num_copies)
    steps = f.at(rounded, b.mul(num_rows, _row_bytes(f, num_in)))
    shares = f.at(steps, b.mul(num_rows, LONG(4)))
    floats, of_floats = vector(FLOAT, STEP), f"v{STEP}f32"

    def spread(given: Value, spread_row: Value) -> None:
        """Give a matrix's copies of a column equal shares of its activation."""

        def some(column: Value, _: list[Value]) -> list[Value]:
            at = b.mul(column, LONG(4))
            f.store(b.fmul(f.load(floats, given, at), f.load(floats, share, at)), spread_row, at)
            return []

        def copy(i: Value, _: list[Value]) -> list[Value]:
            column = f.load(LONG, hot, b.mul(i, LONG(8)))
            at = b.mul(b.add(num_columns, i), LONG(4))
            f.store(b.fmul(f.load(FLOAT, given, b.mul(column, LONG(4))), f.load(FLOAT, share, at)), spread_row, at)
            return []

        f.loop(LONG(0), b.select(b.icmp_signed(">", num_copies, LONG(0)), num_columns, LONG(0)), STEP, [], some)
        f.loop(LONG(0), num_copies, 1, [], copy)

    def row(i: Value, _: list[Value]) -> list[Value]:
        given, spread_row = (
            f.at(x, b.mul(i, b.mul(num_columns, LONG(4)))),
            f.at(shares, b.mul(i, b.mul(num_in, LONG(4)))),
        )
        spread(given, spread_row)
        x_row = b.select(b.icmp_signed(">", num_copies, LONG(0)), spread_row, given)
        rounded_row = f.at(rounded, b.mul(i, _row_bytes(f, num_in)))

        def most(column: Value, found: list[Value]) -> list[Value]:
            sizes = f.call(f"llvm.fabs.{of_floats}", floats, f.load(floats, x_row, b.mul(column, LONG(4))))
            return [f.call(f"llvm.maxnum.{of_floats}", floats, sizes, found[0])]

        largest = f.loop(LONG(0), num_in, STEP, [splat(FLOAT, STEP, 1e-30)], most)[0]
        step = b.fdiv(f.call(f"llvm.vector.reduce.fmax.{of_floats}", FLOAT, largest), FLOAT(_LEVELS))
        f.store(step, steps, b.mul(i, LONG(4)))

        def columns(column: Value, _: list[Value]) -> list[Value]:
            levels = b.fdiv(f.load(floats, x_row, b.mul(column, LONG(4))), f.spread(step, STEP))
            # In this order, as FBGEMM has it.
            levels = b.fadd(levels, splat(FLOAT, STEP, ZERO))
            levels = f.call(f"llvm.rint.{of_floats}", floats, levels)
            # Of an activation that is no number these make a level: LLVM's conversion to integers wants one.
            levels = f.call(f"llvm.maxnum.{of_floats}", floats, levels, splat(FLOAT, STEP, ZERO - _LEVELS))
            levels = f.call(f"llvm.minnum.{of_floats}", floats, levels, splat(FLOAT, STEP, ZERO + _LEVELS))
            whole = b.fptosi(levels, vector(INT, STEP))
            whole = b.sub(whole, splat(INT, STEP, ZERO - zero_level(features)))
            f.store(b.trunc(whole, vector(BYTE, STEP)), rounded_row, column)
            return []

        f.loop(LONG(0), num_in, STEP, [], columns)
        return []

    f.loop(first_row, stop_row, 1, [], row)
    f.finish()


def _build_tile(module: Value, num_rows: int, features: frozenset[str], *, lanes: int) -> None:
    """Build tile<num_rows>(q, scale, starts, rounded, steps, y, out, first, stop, begin, end, in).

    It adds what columns ``begin`` to ``end - 1`` of the matrix give to columns ``first`` to ``stop - 1`` of y: i32
    [num_rows, out], which needs no start. What it is given is as LlvmInt8 and _build_prepare have it.
    """
    f = Function(module, f"tile{num_rows}", [POINTER] * 6 + [LONG] * 6)
    b = f.b
    q, scale, starts, rounded, steps, y, num_out, first, stop, begin, end, num_in = f.arguments
    is_first = b.icmp_signed("==", begin, LONG(0))
    width = 4 * lanes
    ints, of_ints = vector(INT, lanes), f"v{lanes}i32"
    rows = [f.at(rounded, b.mul(LONG(row), _row_bytes(f, num_in))) for row in range(num_rows)]
    whole = b.and_(end, LONG(-width))
    # Behind the last whole vector lie columns of the next row, or of nothing.
    num_left = f.spread(b.trunc(b.ashr(b.sub(num_in, whole), LONG(2)), INT), lanes)
    mask = b.icmp_signed("<", ir.Constant(ints, list(range(lanes))), num_left)
    # Few rows of activations go through the matrix as it lies; more make use of what was loaded twice.
    num_outputs = 1 if num_rows <= _FEW_ROWS else 2

    def output(i: Value, _: list[Value]) -> list[Value]:
        places = [i]
        if num_outputs == 2:
            other = b.add(i, LONG(1))
            places.append(b.select(b.icmp_signed("<", other, stop), other, i))
        weight_rows = [f.at(q, b.mul(place, num_in)) for place in places]
        if num_outputs == 1:
            following = f.at(weight_rows[0], LONG(_AHEAD))
        else:  # of the next rows of the matrix that tiles go over, as much as was read of these
            num_read = b.add(b.mul(b.sub(stop, first), begin), b.mul(b.sub(i, first), b.sub(end, begin)))
            following = f.at(q, b.add(b.mul(stop, num_in), num_read))

        def added(sums: list[Value], weights: list[Value], column: Value) -> list[Value]:
            results = []
            for row, row_sums in zip(rows, zip(*[iter(sums)] * num_outputs, strict=True), strict=True):
                activations = f.load(ints, row, column)
                for total, weight in zip(row_sums, weights, strict=True):
                    results.append(with_dot_products(f, total, activations, weight, features))
            return results

        def columns(column: Value, sums: list[Value]) -> list[Value]:
            for k in range(num_outputs):
                where = f.at(following, b.add(b.mul(b.sub(column, begin), LONG(num_outputs)), LONG(k * width)))
                f.ask_for(where, SECOND)
            return added(sums, [f.load(ints, row, column) for row in weight_rows], column)

        def rest(column: Value, sums: list[Value]) -> list[Value]:
            load, nothing = f"llvm.masked.load.{of_ints}.p0", splat(INT, lanes, 0)
            weights = [f.call(load, ints, f.at(row, column), INT(1), mask, nothing) for row in weight_rows]
            return added(sums, weights, column)

        sums = f.loop(begin, whole, width, [splat(INT, lanes, 0)] * (num_rows * num_outputs), columns)
        sums = f.loop(whole, end, width, sums, rest)
        totals = [total for i in range(0, len(sums), lanes) for total in f.lane_totals(sums[i : i + lanes])]
        values, pointers = [], []
        for k, total in enumerate(totals):
            row, place = LONG(k // num_outputs), places[k % num_outputs]
            pointers.append(f.at(y, b.mul(b.add(b.mul(row, num_out), place), LONG(4))))
            values.append(b.add(total, b.select(is_first, INT(0), f.load(INT, pointers[-1], LONG(0)))))
        for value, pointer in zip(values, pointers, strict=True):  # behind all loads: two may be of one place
            f.store(value, pointer, LONG(0))
        return []

    f.loop(first, stop, num_outputs, [], output)
    f.finish()


def _result(f: Function, y_row: Value, row: Value, at: Value, count: int, *, features: frozenset[str]) -> Value:
    _, scale, starts, _, steps, *_ = f.arguments
    floats = vector(FLOAT, count)
    totals = f.load(vector(INT, count), y_row, at)
    if zero_level(features):
        totals = f.b.add(totals, f.load(vector(INT, count), starts, at))
    values = f.b.fmul(f.b.sitofp(totals, floats), f.load(floats, scale, at))
    return f.b.fmul(values, f.spread(f.load(FLOAT, steps, f.b.mul(row, LONG(4))), count))
