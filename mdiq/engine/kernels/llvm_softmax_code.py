"""The loops of CompiledSoftmax, in LLVM's language; see llvm_softmax.py."""

import math

from llvmlite import ir

from mdiq.engine.kernels.llvm_code import FLOAT, INT, LONG, POINTER, Function, Value, power_of_2, splat, vector

LANES = 16
"""Floats of a vector."""
BLOCK = 128
"""Weights that are summed together."""
CLASS_SHIFT = 16
"""Bits of a weight that its class leaves out; positive floats lie in the order of their bits."""
NUM_CLASSES, NUM_SPARE = 1 << 31 - CLASS_SHIFT, 8
_FLOATS, _DOUBLE = vector(FLOAT, LANES), ir.DoubleType()


def build(features: frozenset[str]) -> Value:
    """Return the module with soften and add_classes."""
    module = ir.Module()
    _build_soften(module)
    _build_add_classes(module)
    return module


def _build_soften(module: Value) -> None:
    """Build soften(logits, factor, weights, sums, count).

    logits, weights: f32 [count]; a weight is e^((logit - largest) * factor), 0 where that is no normal float. factor:
    f32, one number. sums: f32, of each BLOCK weights, and of the rest if there is one.
    """
    f = Function(module, "soften", [POINTER] * 4 + [LONG])
    b = f.b
    logits, factor, weights, sums, count = f.arguments
    whole = b.and_(count, LONG(-BLOCK))

    def larger(one: Value, other: Value) -> Value:
        return b.select(b.fcmp_ordered(">", one, other), one, other)

    def at(i: Value) -> Value:
        return b.mul(i, LONG(4))

    def most(i: Value, found: list[Value]) -> list[Value]:
        return [larger(f.load(_FLOATS, logits, at(b.add(i, LONG(LANES * k)))), each) for k, each in enumerate(found)]

    nothing = splat(FLOAT, LANES, -math.inf)
    found = f.loop(LONG(0), whole, BLOCK, [nothing] * (BLOCK // LANES), most)
    for each in found[1:]:
        found[0] = larger(found[0], each)
    largest = f.call(f"llvm.vector.reduce.fmax.v{LANES}f32", FLOAT, found[0])
    largest = f.loop(whole, count, 1, [largest], lambda i, found: [larger(f.load(FLOAT, logits, at(i)), found[0])])[0]
    to_powers_of_2 = b.fmul(f.load(FLOAT, factor, LONG(0)), FLOAT(math.log2(math.e)))

    def soft(i: Value, lanes: int) -> Value:
        logit = f.load(vector(FLOAT, lanes), logits, at(i))
        weight = power_of_2(f, b.fmul(b.fsub(logit, f.spread(largest, lanes)), f.spread(to_powers_of_2, lanes)))
        f.store(weight, weights, at(i))
        return weight

    def block(i: Value, _: list[Value]) -> list[Value]:
        total = soft(i, LANES)
        for k in range(LANES, BLOCK, LANES):
            total = b.fadd(total, soft(b.add(i, LONG(k)), LANES))
        f.store(f.total(total), sums, at(b.sdiv(i, LONG(BLOCK))))
        return []

    f.loop(LONG(0), whole, BLOCK, [], block)

    def one(i: Value, found: list[Value]) -> list[Value]:
        total = b.fadd(found[0], b.extract_element(soft(i, 1), ir.Constant(ir.IntType(32), 0)))
        f.store(total, sums, at(b.sdiv(i, LONG(BLOCK))))
        return [total]

    f.loop(whole, count, 1, [FLOAT(0.0)], one)
    f.finish()


def _build_add_classes(module: Value) -> None:
    """Build add_classes(weights, least, sums, count): it adds weights to the sums of their classes, one by one.

    weights: f32 [count], not negative. least: f32, one number; smaller weights do not count. sums: f64 [NUM_CLASSES],
    and NUM_SPARE that hold nothing of use.
    """
    f = Function(module, "add_classes", [POINTER] * 3 + [LONG])
    b = f.b
    weights, min_at, sums, count = f.arguments
    least = f.load(FLOAT, min_at, LONG(0))

    def one(i: Value, _: list[Value]) -> list[Value]:
        weight = f.load(FLOAT, weights, b.mul(i, LONG(4)))
        its_class = b.zext(b.lshr(b.bitcast(weight, INT), INT(CLASS_SHIFT)), LONG)
        # No jump, which would be guessed wrong, and no sum that all small weights wait for.
        spare = b.add(b.and_(i, LONG(NUM_SPARE - 1)), LONG(NUM_CLASSES))
        at = b.mul(b.select(b.fcmp_ordered(">=", weight, least), its_class, spare), LONG(8))
        f.store(b.fadd(f.load(_DOUBLE, sums, at), b.fpext(weight, _DOUBLE)), sums, at)
        return []

    f.loop(LONG(0), count, 1, [], one)
    f.finish()
