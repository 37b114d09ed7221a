"""The words that compiled loops are written in: numbers and vectors with operators, addresses, loops and sums.

They append instructions of LLVM to the function being built, one for each operator; optimizing is left to LLVM.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from llvmlite import ir

Type = Any
"""llvmlite gives its classes no types."""
BYTE, SHORT, INT, LONG = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
HALF, FLOAT = ir.HalfType(), ir.FloatType()
POINTER, VOID = ir.PointerType(), ir.VoidType()
_FLOATS = (HALF, FLOAT)
NEAREST, SECOND = 3, 2
"""Caches, as LLVM counts them."""
_MIN_EXPONENT = -127.0  # below that of the smallest normal float: such a power of 2 is 0
_EXPONENT_BIAS, _MANTISSA_BITS = 127, 23
_POWERS = 7  # of the series of 2^x: what is left out is below half a unit in the last place for |x| <= 1/2
_LINE_BYTES = 64  # of a cache


def vector(element: Type, count: int) -> Type:
    """Return the type of a vector."""
    return ir.VectorType(element, count)


def _operator(name: str) -> Callable[["Value", "Operand"], "Value"]:
    return lambda one, other: one._apply(name, other)


def _relation(name: str) -> Callable[["Value", "Operand"], "Value"]:
    return lambda one, other: one._compare(name, other)


class Value:
    """A number, a vector of numbers, or an address. A Python number beside one is a constant of its type, in all lanes.

    Integers have a sign, except in ``unsigned`` and ``shifted_down``. Comparisons make lanes of one bit, for
    ``select``. An address plus a number is so many bytes further on.
    """

    def __init__(self, b: ir.IRBuilder, value: Any) -> None:
        self.b, self.ir = b, value

    @property
    def type(self) -> Type:
        return self.ir.type

    @property
    def count(self) -> int:
        """Lanes of a vector, 1 for a number."""
        return getattr(self.type, "count", 1)

    @property
    def _element(self) -> Type:
        return getattr(self.type, "element", self.type)

    def constant(self, number: "Operand") -> "Value":
        """Return a number in this value's type; another value as it is."""
        return number if isinstance(number, Value) else constant(self.b, self.type, number)

    def _apply(self, name: str, other: "Operand") -> "Value":
        method = getattr(self.b, f"f{name}" if self._element in _FLOATS else name)
        return Value(self.b, method(self.ir, self.constant(other).ir))

    def _compare(self, relation: str, other: "Operand") -> "Value":
        compare = self.b.fcmp_ordered if self._element in _FLOATS else self.b.icmp_signed
        return Value(self.b, compare(relation, self.ir, self.constant(other).ir))

    def __add__(self, other: "Operand") -> "Value":
        if isinstance(self.type, ir.PointerType):
            offset = other.ir if isinstance(other, Value) else LONG(other)
            return Value(self.b, self.b.gep(self.ir, [offset], source_etype=BYTE))
        return self._apply("add", other)

    __sub__, __mul__ = _operator("sub"), _operator("mul")
    __truediv__, __floordiv__ = _operator("div"), _operator("sdiv")
    __and__, __or__ = _operator("and_"), _operator("or_")
    __lshift__, __rshift__ = _operator("shl"), _operator("ashr")
    __lt__, __le__, __gt__, __ge__ = _relation("<"), _relation("<="), _relation(">"), _relation(">=")
    equals, differs_from = _relation("=="), _relation("!=")

    def __rtruediv__(self, other: float) -> "Value":
        return self.constant(other) / self

    def __neg__(self) -> "Value":
        return Value(self.b, self.b.fneg(self.ir))

    def shifted_down(self, num_bits: int) -> "Value":
        """Return numbers without a sign, shifted to the right."""
        return self._apply("lshr", num_bits)

    def select(self, one: "Operand", other: "Operand") -> "Value":
        """Return ``one`` where this bit is set, ``other`` elsewhere; a Value is among the two."""
        like = one if isinstance(one, Value) else other
        assert isinstance(like, Value)
        return Value(self.b, self.b.select(self.ir, like.constant(one).ir, like.constant(other).ir))

    def to(self, element: Type) -> "Value":
        """Return the numbers in another type; of floats the whole part, of integers the lower bits."""
        is_float, was_float = element in _FLOATS, self._element in _FLOATS
        if is_float != was_float:
            convert = self.b.sitofp if is_float else self.b.fptosi
        elif is_float:
            convert = self.b.fpext
        else:
            convert = self.b.sext if element.width > self._element.width else self.b.trunc
        return Value(self.b, convert(self.ir, self._with(element)))

    def unsigned(self, element: Type) -> "Value":
        """Return integers without a sign in a larger type."""
        return Value(self.b, self.b.zext(self.ir, self._with(element)))

    def as_type(self, kind: Type) -> "Value":
        """Return the same bits as another type."""
        return Value(self.b, self.b.bitcast(self.ir, kind))

    def as_address(self) -> "Value":
        """Return an integer of 64 bits as the address that it is."""
        return Value(self.b, self.b.inttoptr(self.ir, POINTER))

    def _with(self, element: Type) -> Type:
        return vector(element, self.count) if isinstance(self.type, ir.VectorType) else element

    def load(self, kind: Type, offset: "Operand" = 0) -> "Value":
        """Return what lies ``offset`` bytes after an address, on any byte."""
        found = self.b.load((self + offset).ir, typ=kind)
        found.align = 1
        return Value(self.b, found)

    def store(self, value: "Value", offset: "Operand" = 0) -> None:
        """Put a value ``offset`` bytes after an address, on any byte."""
        self.b.store(value.ir, (self + offset).ir).align = 1

    def ask_for(self, cache: int) -> None:
        """Have the line of memory at an address come into NEAREST or SECOND cache; the address may be anyone's."""
        arguments = (constant(self.b, INT, number) for number in (0, cache, 1))
        call(self.b, "llvm.prefetch.p0", VOID, self, *arguments)

    def pick(self, places: Sequence[int], following: "Value | None" = None) -> "Value":
        """Return a vector of some lanes; those of ``following`` have the numbers after this vector's."""
        other = ir.Constant(self.type, ir.Undefined) if following is None else following.ir
        chosen = ir.Constant(vector(INT, len(places)), list(places))
        return Value(self.b, self.b.shuffle_vector(self.ir, other, chosen))

    def lane(self, number: int) -> "Value":
        return Value(self.b, self.b.extract_element(self.ir, INT(number)))

    def spread(self, count: int) -> "Value":
        """Return a vector with this number in every lane."""
        none = ir.Constant(vector(self.type, 1), ir.Undefined)
        return Value(self.b, self.b.insert_element(none, self.ir, INT(0))).pick([0] * count)

    def total(self) -> "Value":
        """Return the sum of all lanes, halves first."""
        lanes, count = self, self.count
        while count > 1:
            count //= 2
            lanes = lanes.pick(range(count)) + lanes.pick(range(count, 2 * count))
        return lanes.lane(0)

    def largest(self) -> "Value":
        """Return the largest lane of a vector of floats; a lane that is not a number is passed over."""
        return self._intrinsic("vector.reduce.fmax", result=self._element)

    def integer_total(self) -> "Value":
        """Return the sum of all lanes of integers."""
        return self._intrinsic("vector.reduce.add", result=self._element)

    def abs(self) -> "Value":
        return self._intrinsic("fabs")

    def rounded(self) -> "Value":
        """Return whole floats; halves become even."""
        return self._intrinsic("rint")

    def sqrt(self) -> "Value":
        return self._intrinsic("sqrt")

    def or_larger(self, other: "Operand") -> "Value":
        """Return the larger of two floats; of a number and one that is not a number, the number."""
        return self._intrinsic("maxnum", other)

    def or_smaller(self, other: "Operand") -> "Value":
        """Return the smaller of two floats; see or_larger."""
        return self._intrinsic("minnum", other)

    def _intrinsic(self, name: str, *others: "Operand", result: Type = None) -> "Value":
        lanes = f"v{self.count}" if isinstance(self.type, ir.VectorType) else ""
        element = "i32" if self._element == INT else "f32"
        operands = (self.constant(other) for other in others)
        return call(self.b, f"llvm.{name}.{lanes}{element}", result or self.type, self, *operands)


Operand = Value | float


def constant(b: ir.IRBuilder, kind: Type, number: float) -> Value:
    """Return a constant: in every lane, if ``kind`` is a vector."""
    return Value(b, ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number))


def call(b: ir.IRBuilder, name: str, result: Type, *arguments: Value) -> Value:
    """Call a function of the module, or one that LLVM knows by name."""
    values = [argument.ir for argument in arguments]
    called = b.module.globals.get(name)
    if called is None:
        called = ir.Function(b.module, ir.FunctionType(result, [value.type for value in values]), name)
    return Value(b, b.call(called, values))


def fma(x: Value, y: Operand, total: Operand) -> Value:
    """Return x * y + total, rounded once."""
    return x._intrinsic("fma", y, total)


def lesser(one: Value, other: Value) -> Value:
    return (one < other).select(one, other)


def joined(vectors: Sequence[Value]) -> Value:
    """Return one vector, or two as one."""
    if len(vectors) == 1:
        return vectors[0]
    low, high = vectors
    return low.pick(range(2 * low.count), high)


def lane_totals(vectors: Sequence[Value]) -> list[Value]:
    """Return the sum of the lanes of each vector, no more vectors than each has lanes; always added in one order."""
    count, found = vectors[0].count, list(vectors)
    for _ in range(count.bit_length() - 1):  # half as many lanes are left for each vector, one vector of two
        pairs = zip(found[::2], found[1::2] + found[-1:] * (len(found) % 2), strict=True)
        found = [low.pick(range(0, 2 * count, 2), high) + low.pick(range(1, 2 * count, 2), high) for low, high in pairs]
    return [found[0].lane(i) for i in range(len(vectors))]


def power_of_2(x: Value) -> Value:
    """Return 2^x for a vector of floats, x at most 0: the exponent's bits for the whole part, a series for the rest."""
    x = x.or_larger(_MIN_EXPONENT)
    whole = x.rounded()
    rest = x - whole
    *terms, last = (math.log(2) ** n / math.factorial(n) for n in range(_POWERS))
    series = x.constant(last)
    for term in reversed(terms):
        series = fma(series, rest, term)
    exponent = whole.to(INT) + _EXPONENT_BIAS
    return series * (exponent << _MANTISSA_BITS).as_type(x.type)


class Function:
    """A function without result, being built: its arguments are addresses, then integers of 64 bits."""

    def __init__(self, module: ir.Module, name: str, num_addresses: int, num_integers: int) -> None:
        kinds = [POINTER] * num_addresses + [LONG] * num_integers
        self.function = ir.Function(module, ir.FunctionType(VOID, kinds), name)
        self.b = ir.IRBuilder(self.function.append_basic_block())
        self.arguments = [Value(self.b, argument) for argument in self.function.args]

    def integer(self, number: Operand) -> Value:
        """Return a number as an integer of 64 bits."""
        return number if isinstance(number, Value) else constant(self.b, LONG, number)

    def splat(self, element: Type, count: int, number: float) -> Value:
        """Return a vector of equal constants."""
        return constant(self.b, vector(element, count), number)

    def lane_numbers(self, element: Type, count: int) -> Value:
        """Return a vector of 0, 1, 2 and so on."""
        return Value(self.b, ir.Constant(vector(element, count), list(range(count))))

    def scratch(self, count: int) -> Value:
        """Return a pointer to room for ``count`` floats, on the stack until the function returns; not in a loop."""
        room = self.b.alloca(FLOAT, count)
        room.align = _LINE_BYTES
        room.type = POINTER  # llvmlite still gives it an element
        return Value(self.b, room)

    def call(self, name: str, result: Type, *arguments: Operand) -> Value:
        """Call a function of the module, or one that LLVM knows by name; Python's numbers are passed as LONG."""
        return call(self.b, name, result, *map(self.integer, arguments))

    def when(self, is_so: Value) -> AbstractContextManager[object]:
        """Run the body of a ``with`` if a bit is set."""
        found: AbstractContextManager[object] = self.b.if_then(is_so.ir)
        return found

    @contextmanager
    def each(self, start: Operand, stop: Operand, step: Operand = 1) -> Iterator[Value]:
        """Run the body of a ``with`` for each number from ``start`` until ``stop``."""
        loop = _Loop(self, start, stop, step, [])
        yield loop.i
        loop.end([])

    def loop(
        self,
        start: Operand,
        stop: Operand,
        step: Operand,
        carried: Sequence[Value],
        body: Callable[[Value, list[Value]], Sequence[Value]],
    ) -> list[Value]:
        """Run ``body(i, carried)`` for i from ``start`` until ``stop``; return the last values that it returned."""
        loop = _Loop(self, start, stop, step, carried)
        return loop.end(body(loop.i, loop.carried))

    def fold(
        self, start: Operand, stop: Operand, step: Operand, first: Value, body: Callable[[Value, Value], Value]
    ) -> Value:
        """Run a loop that carries one value."""
        return self.loop(start, stop, step, [first], lambda i, carried: [body(i, carried[0])])[0]

    def finish(self) -> None:
        """End the function."""
        self.b.ret_void()


class _Loop:
    """A loop of which the body is being built; i: its number. carried: what the body before has returned."""

    def __init__(self, f: Function, start: Operand, stop: Operand, step: Operand, carried: Sequence[Value]) -> None:
        self._b = b = f.b
        start, self._stop, self._step = f.integer(start), f.integer(stop), step
        self._before, self._head, self._after = b.block, *(f.function.append_basic_block() for _ in range(2))
        b.cbranch((start < self._stop).ir, self._head, self._after)
        b.position_at_end(self._head)
        self._first = [start, *carried]
        self.i, *self.carried = (Value(b, b.phi(value.type)) for value in self._first)

    def end(self, following: Sequence[Value]) -> list[Value]:
        """End the body, which returns ``following``; return what the last one returned."""
        b, next_i = self._b, self.i + self._step
        end = b.block
        for phi, first, later in zip((self.i, *self.carried), self._first, (next_i, *following), strict=True):
            phi.ir.add_incoming(first.ir, self._before)
            phi.ir.add_incoming(later.ir, end)
        b.cbranch((next_i < self._stop).ir, self._head, self._after)
        b.position_at_end(self._after)
        results = []
        for first, later in zip(self._first[1:], following, strict=True):
            result = b.phi(first.type)
            result.add_incoming(first.ir, self._before)
            result.add_incoming(later.ir, end)
            results.append(Value(b, result))
        return results
