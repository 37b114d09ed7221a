"""Loops over vectors in LLVM's own language, one instruction a call; what the loops compute is their caller's."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

Value = Any
"""Of the function being built: llvmlite gives its classes no types."""
PART_STEP = 256
"""Columns: what multiply gives a tile begins at a multiple, and ends at one or at the last column."""

BYTE, SHORT, INT, LONG = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
HALF, FLOAT = ir.HalfType(), ir.FloatType()
POINTER = ir.PointerType()


def vector(element: Value, count: int) -> Value:
    """Return the type of a vector."""
    return ir.VectorType(element, count)


def splat(element: Value, count: int, value: float) -> Value:
    """Return a vector of equal constants."""
    return ir.Constant(vector(element, count), [value] * count)


NEAREST, SECOND = 3, 2
"""Caches, as LLVM counts them."""
_MIN_EXPONENT = -127.0  # below that of the smallest normal float: such a power of 2 is 0
_EXPONENT_BIAS, _MANTISSA_BITS = 127, 23
_POWERS = 7  # of the series of 2^x: what is left out is below half a unit in the last place for |x| <= 1/2
# Of activations that a tile takes at once: half of a nearest cache of 32 KiB, since weights pass there too.
_NEAR_BYTES = 16_384
_LINE_BYTES = 64  # of a cache


class Function:
    """A function without result, being built; ``b`` is llvmlite's builder at its end."""

    def __init__(self, module: Value, name: str, arguments: Sequence[Value]) -> None:
        self.module = module
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
        self.arguments = self.function.args
        self.b = ir.IRBuilder(self.function.append_basic_block())

    def at(self, pointer: Value, offset: Value) -> Value:
        """Return a pointer ``offset`` bytes on."""
        return self.b.gep(pointer, [offset], source_etype=BYTE)

    def load(self, kind: Value, pointer: Value, offset: Value) -> Value:
        """Return what lies ``offset`` bytes behind a pointer, on any byte."""
        found = self.b.load(self.at(pointer, offset), typ=kind)
        found.align = 1
        return found

    def store(self, value: Value, pointer: Value, offset: Value) -> None:
        """Put a value ``offset`` bytes behind a pointer, on any byte."""
        self.b.store(value, self.at(pointer, offset)).align = 1

    def scratch(self, count: int) -> Value:
        """Return a pointer to room for ``count`` floats, on the stack until the function returns; not in a loop."""
        room = self.b.alloca(FLOAT, count)
        room.align = _LINE_BYTES
        room.type = POINTER  # llvmlite still gives it an element
        return room

    def ask_for(self, pointer: Value, cache: int) -> None:
        """Have the line of memory at a pointer come into NEAREST or SECOND cache, whoever it belongs to."""
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, INT(0), INT(cache), INT(1))

    def pick(self, lanes: Value, places: Sequence[int]) -> Value:
        """Return a vector of some lanes of another."""
        chosen = ir.Constant(vector(INT, len(places)), list(places))
        return self.b.shuffle_vector(lanes, ir.Constant(lanes.type, ir.Undefined), chosen)

    def joined(self, vectors: Sequence[Value]) -> Value:
        """Return one vector, or two as one."""
        if len(vectors) == 1:
            return vectors[0]
        places = list(range(2 * vectors[0].type.count))
        return self.b.shuffle_vector(*vectors, ir.Constant(vector(INT, len(places)), places))

    def pick_of_two(self, low: Value, high: Value, places: Sequence[int]) -> Value:
        """Return a vector of some lanes of two others, those of ``high`` numbered behind those of ``low``."""
        return self.b.shuffle_vector(low, high, ir.Constant(vector(INT, len(places)), list(places)))

    def spread(self, value: Value, count: int) -> Value:
        """Return a vector with a value in every lane."""
        one = self.b.insert_element(ir.Constant(vector(value.type, 1), ir.Undefined), value, INT(0))
        return self.pick(one, [0] * count)

    def total(self, lanes: Value) -> Value:
        """Return the sum of a vector's floats, halves first."""
        count = lanes.type.count
        while count > 1:
            count //= 2
            lanes = self.b.fadd(self.pick(lanes, range(count)), self.pick(lanes, range(count, 2 * count)))
        return self.b.extract_element(lanes, INT(0))

    def lane_totals(self, vectors: list[Value]) -> list[Value]:
        """Return the sums of the lanes of vectors, no more vectors than each has lanes; floats always in one order."""
        count = vectors[0].type.count
        add = self.b.fadd if vectors[0].type.element == FLOAT else self.b.add
        halves = [list(range(parity, 2 * count, 2)) for parity in range(2)]
        found = vectors
        for _ in range(count.bit_length() - 1):  # half as many lanes are left for each vector, one vector of two
            pairs = zip(found[::2], found[1::2] + found[-1:] * (len(found) % 2), strict=True)
            found = [
                add(*(self.b.shuffle_vector(*pair, ir.Constant(vector(INT, count), half)) for half in halves))
                for pair in pairs
            ]
        return [self.b.extract_element(found[0], INT(i)) for i in range(len(vectors))]

    def call(self, name: str, result: Value, *arguments: Value) -> Value:
        """Call a function of the module, or one that LLVM knows by name."""
        called = self.module.globals.get(name)
        if called is None:
            called = ir.Function(self.module, ir.FunctionType(result, [value.type for value in arguments]), name)
        return self.b.call(called, arguments)

    def loop(
        self,
        start: Value,
        stop: Value,
        step: int | Value,
        carried: Sequence[Value],
        body: Callable[[Value, list[Value]], Sequence[Value]],
    ) -> list[Value]:
        """Run ``body(i, carried)`` for i from ``start`` until ``stop``; return the last values that it returned."""
        b = self.b
        before, head, behind = b.block, self.function.append_basic_block(), self.function.append_basic_block()
        b.cbranch(b.icmp_signed("<", start, stop), head, behind)
        b.position_at_end(head)
        i = b.phi(LONG)
        current = [b.phi(value.type) for value in carried]
        following = body(i, current)
        next_i = b.add(i, LONG(step) if isinstance(step, int) else step)
        end = b.block
        for phi, first, later in zip((i, *current), (start, *carried), (next_i, *following), strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(later, end)
        b.cbranch(b.icmp_signed("<", next_i, stop), head, behind)
        b.position_at_end(behind)
        results: list[Value] = []
        for first, later in zip(carried, following, strict=True):
            result = b.phi(first.type)
            result.add_incoming(first, before)
            result.add_incoming(later, end)
            results.append(result)
        return results

    def finish(self) -> None:
        """End the function."""
        self.b.ret_void()


def power_of_2(f: Function, x: Value) -> Value:
    """Return 2^x for a vector of floats, x at most 0: the exponent's bits for the whole part, a series for the rest."""
    b, kind, count = f.b, x.type, x.type.count
    x = f.call(f"llvm.maxnum.v{count}f32", kind, x, splat(FLOAT, count, _MIN_EXPONENT))
    whole = f.call(f"llvm.rint.v{count}f32", kind, x)
    rest = b.fsub(x, whole)
    terms = [math.log(2) ** n / math.factorial(n) for n in range(_POWERS)]
    series = splat(FLOAT, count, terms[-1])
    for term in reversed(terms[:-1]):
        series = f.call(f"llvm.fma.v{count}f32", kind, series, rest, splat(FLOAT, count, term))
    ints = vector(INT, count)
    exponent = b.add(b.fptosi(whole, ints), splat(INT, count, _EXPONENT_BIAS))
    return b.fmul(series, b.bitcast(b.shl(exponent, splat(INT, count, _MANTISSA_BITS)), kind))


def matrix_words(f: Function, matrix: Value, num_pointers: int, num_sizes: int) -> tuple[list[Value], list[Value]]:
    """Return what describes a matrix, words of 64 bits one behind the other: addresses, then sizes."""
    kinds = [POINTER] * num_pointers + [LONG] * num_sizes
    words = [f.load(kind, matrix, LONG(8 * i)) for i, kind in enumerate(kinds)]
    return words[:num_pointers], words[num_pointers:]


def build_multiply(
    module: Value,
    *,
    num_weights: int,
    strides: Sequence[Callable[[Function, Sequence[Value]], Value]],
    num_sizes: int,
    max_rows: int,
    outputs: int,
    columns: int | None,
    finishes: bool = False,
) -> None:
    """Build multiply(matrix, rounded, y, out, first, stop, num_rows): a matmul, tile by tile.

    It fills columns ``first`` to ``stop - 1`` of y, f32 [num_rows, out]. Functions tile1, tile2.. of the module do it
    for as many rows: tile(weights.., activations.., y, out, first, stop, begin, end, sizes..) takes the columns of the
    matrix from ``begin`` to ``end - 1``. Weights come from memory once, whatever the number of rows.

    matrix: its words, see matrix_words. rounded: where its prepare(x, matrix, rounded, num_rows, first, stop) has put
    the activations of x: f32 [num_rows, in], called for all rows, in any parts. All that describes activations lies
    there one behind the other; strides are what gives the bytes of one row of each, from the sizes.
    max_rows: of the largest tile; tiles are about as large as each other.
    outputs: rows of the matrix that all tiles go over before the next. columns: of the matrix, about as many at a time
    where activations of a tile, a byte each, do not fit the nearest cache; None is always all.
    finishes: behind the tiles of some rows comes a function finish(weights.., activations.., y, out, first, stop,
    num_rows, sizes..) for these rows.
    """
    f = Function(module, "multiply", [POINTER] * 3 + [LONG] * 4)
    b = f.b
    matrix, rounded, y, num_out, first, stop, num_rows = f.arguments
    weights, sizes = matrix_words(f, matrix, num_weights, num_sizes)
    steps = [stride(f, sizes) for stride in strides]
    pointers = [rounded]
    for step in steps[:-1]:
        pointers.append(f.at(pointers[-1], b.mul(num_rows, step)))
    steps.append(b.mul(num_out, LONG(4)))
    num_tiles = b.sdiv(b.add(num_rows, LONG(max_rows - 1)), LONG(max_rows))

    def part(begin: Value, _: list[Value]) -> list[Value]:
        end = b.add(begin, LONG(outputs))
        end = b.select(b.icmp_signed("<", end, stop), end, stop)

        def tile(i: Value, _: list[Value]) -> list[Value]:
            row = b.sdiv(b.mul(num_rows, i), num_tiles)
            count = b.sub(b.sdiv(b.mul(num_rows, b.add(i, LONG(1))), num_tiles), row)
            rows = [f.at(start, b.mul(row, step)) for start, step in zip((*pointers, y), steps, strict=True)]
            behind = f.function.append_basic_block()
            choice = b.switch(count, behind)
            for size in range(1, max_rows + 1):
                case = f.function.append_basic_block()
                choice.add_case(LONG(size), case)
                b.position_at_end(case)
                _call_tile(f, size, (*weights, *rows, num_out, begin, end), sizes, columns)
                b.branch(behind)
            b.position_at_end(behind)
            if finishes:
                f.call("finish", ir.VoidType(), *weights, *rows, num_out, begin, end, count, *sizes)
            return []

        f.loop(LONG(0), num_tiles, 1, [], tile)
        return []

    f.loop(first, stop, outputs, [], part)
    f.finish()


def build_finish(
    module: Value,
    *,
    num_pointers: int,
    num_sizes: int,
    lanes: int,
    result: Callable[[Function, Value, Value, Value, int], Value],
) -> None:
    """Build finish(weights.., activations.., y, out, first, stop, num_rows, sizes..): it makes results of sums in y.

    num_pointers: arguments up to y. result: of (function, y's row, its number, bytes to a place in it, count) makes a
    vector of ``count`` results in f32, for which ``count`` sums of 32 bits lie there; ``count`` is ``lanes`` or 1.
    """
    f = Function(module, "finish", [POINTER] * num_pointers + [LONG] * (4 + num_sizes))
    b = f.b
    y, num_out, first, stop, num_rows, *_ = f.arguments[num_pointers - 1 :]
    whole = b.add(first, b.and_(b.sub(stop, first), LONG(-lanes)))  # lanes: a power of two

    def row(i: Value, _: list[Value]) -> list[Value]:
        y_row = f.at(y, b.mul(b.mul(i, num_out), LONG(4)))

        def some(count: int) -> Callable[[Value, list[Value]], list[Value]]:
            def at_place(place: Value, _: list[Value]) -> list[Value]:
                at = b.mul(place, LONG(4))
                f.store(result(f, y_row, i, at, count), y_row, at)
                return []

            return at_place

        f.loop(first, whole, lanes, [], some(lanes))
        f.loop(whole, stop, 1, [], some(1))
        return []

    f.loop(LONG(0), num_rows, 1, [], row)
    f.finish()


def _call_tile(
    f: Function, num_rows: int, arguments: Sequence[Value], sizes: Sequence[Value], columns: int | None
) -> None:
    """Call a tile for all columns of the matrix, or for some of them at a time where its activations are many."""
    b, num_in = f.b, sizes[0]
    if columns is None:
        f.call(f"tile{num_rows}", ir.VoidType(), *arguments, LONG(0), num_in, *sizes)
        return
    is_small = b.icmp_signed("<=", b.mul(num_in, LONG(num_rows)), LONG(_NEAR_BYTES))
    width = b.select(is_small, num_in, part_width(f, num_in, columns))

    def part(begin: Value, _: list[Value]) -> list[Value]:
        end = b.add(begin, width)
        end = b.select(b.icmp_signed("<", end, num_in), end, num_in)
        f.call(f"tile{num_rows}", ir.VoidType(), *arguments, begin, end, *sizes)
        return []

    f.loop(LONG(0), num_in, width, [], part)


def part_width(f: Function, num_in: Value, columns: int) -> Value:
    """Return how many columns tiles take at a time: about ``columns``, in parts of one size, of which none is tiny."""
    b = f.b
    num_parts = b.sdiv(b.add(num_in, LONG(columns // 2)), LONG(columns))
    num_parts = b.select(b.icmp_signed("<", num_parts, LONG(1)), LONG(1), num_parts)
    return b.and_(b.add(b.sdiv(num_in, num_parts), LONG(PART_STEP - 1)), LONG(-PART_STEP))


def with_dot_products(f: Function, total: Value, levels: Value, others: Value, features: frozenset[str]) -> Value:
    """Return a vector of i32 to which each lane's four products of bytes are added.

    levels, others: vectors as large as ``total``. ``others`` have a sign; of ``levels`` see zero_level. With AVX2 alone
    a vector has 256 bits, and the sizes of two neighbours in ``others`` add to 128 at most. With less, it is slow.
    """
    b = f.b
    kind = total.type
    bytes_, wide = vector(BYTE, 4 * kind.count), vector(INT, 4 * kind.count)
    if has_dot_products(features):
        sides = (b.bitcast(side, kind) for side in (levels, others))
        return f.call(f"llvm.x86.avx512.vpdpbusd.{kind.count * 32}", kind, total, *sides)
    levels, others = b.bitcast(levels, bytes_), b.bitcast(others, bytes_)
    if "dotprod" in features:
        parts = []
        for i in range(0, kind.count, 4):
            sides = (f.pick(side, range(4 * i, 4 * i + 16)) for side in (levels, others))
            part = f.pick(total, range(i, i + 4))
            parts.append(f.call("llvm.aarch64.neon.sdot.v4i32.v16i8", part.type, part, *sides))
        return f.joined(parts)
    if "avx2" in features:
        shorts = vector(SHORT, 2 * kind.count)
        pairs = f.call("llvm.x86.avx2.pmadd.ub.sw", shorts, levels, others)  # 16 bits hold 255 * 128
        return b.add(total, f.call("llvm.x86.avx2.pmadd.wd", kind, pairs, splat(SHORT, 2 * kind.count, 1)))
    each = b.mul(b.zext(levels, wide), b.sext(others, wide))
    for part in range(4):
        total = b.add(total, f.pick(each, range(part, 4 * kind.count, 4)))
    return total


def has_dot_products(features: frozenset[str]) -> bool:
    """Tell whether an x86 CPU with such features, as LLVM calls them, has instructions for dot products of bytes."""
    return bool({"avx512vnni", "avxvnni"} & features)


def zero_level(features: frozenset[str]) -> int:
    """Return which level stands for 0 in dot products: ARM has them with a sign on both sides, x86 on one."""
    return 0 if "dotprod" in features else 128
