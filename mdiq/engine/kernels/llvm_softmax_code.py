"""The loops of CompiledSoftmax; see llvm_softmax.py."""

import math

from llvmlite import ir

from mdiq.engine.kernels.llvm_code import DOUBLE, FLOAT, INT, LONG, Function, Value, greater, power_of_2, vector

LANES = 16
"""Floats of a vector."""
BLOCK = 128
"""Weights that are summed together."""
CLASS_SHIFT = 16
"""Bits of a weight that its class leaves out; positive floats lie in the order of their bits."""
NUM_CLASSES, NUM_SPARE = 1 << 31 - CLASS_SHIFT, 8
_FLOATS = vector(FLOAT, LANES)


def build(features: frozenset[str]) -> ir.Module:
    """Return the module with soften and add_classes."""
    module = ir.Module()
    _build_soften(module)
    _build_add_classes(module)
    return module


def _build_soften(module: ir.Module) -> None:
    """Build soften(logits, factor, weights, sums, count).

    logits, weights: f32 [count]; a weight is e^((logit - largest) * factor), 0 where that is no normal float. factor:
    f32, one number. sums: f32, of each BLOCK weights, and of the rest if there is one.
    """
    f = Function(module, "soften", 4, 1)
    logits, factor, weights, sums, count = f.arguments
    whole = count & -BLOCK

    def larger(i: Value, found: list[Value]) -> list[Value]:
        return [greater(logits.load(_FLOATS, (i + LANES * k) * 4), each) for k, each in enumerate(found)]

    nothing = f.splat(FLOAT, LANES, -math.inf)
    found = f.loop(0, whole, BLOCK, [nothing] * (BLOCK // LANES), larger)
    for each in found[1:]:
        found[0] = greater(found[0], each)
    largest = f.fold(whole, count, 1, found[0].largest(), lambda i, most: greater(logits.load(FLOAT, i * 4), most))
    to_powers_of_2 = factor.load(FLOAT) * math.log2(math.e)

    def soft(i: Value, lanes: int) -> Value:
        logit = logits.load(vector(FLOAT, lanes), i * 4)
        weight = power_of_2((logit - largest.spread(lanes)) * to_powers_of_2.spread(lanes))
        weights.store(weight, i * 4)
        return weight

    with f.each(0, whole, BLOCK) as i:
        total = soft(i, LANES)
        for k in range(LANES, BLOCK, LANES):
            total = total + soft(i + k, LANES)
        sums.store(total.total(), i // BLOCK * 4)

    def one(i: Value, total: Value) -> Value:
        total = total + soft(i, 1).lane(0)
        sums.store(total, i // BLOCK * 4)
        return total

    f.fold(whole, count, 1, largest.constant(0.0), one)
    f.finish()


def _build_add_classes(module: ir.Module) -> None:
    """Build add_classes(weights, least, sums, count): it adds weights to the sums of their classes, one by one.

    weights: f32 [count], not negative. least: f32, one number; smaller weights do not count. sums: f64 [NUM_CLASSES],
    and NUM_SPARE that hold nothing of use.
    """
    f = Function(module, "add_classes", 3, 1)
    weights, min_at, sums, count = f.arguments
    least = min_at.load(FLOAT)
    with f.each(0, count) as i:
        weight = weights.load(FLOAT, i * 4)
        its_class = weight.as_type(INT).shifted_down(CLASS_SHIFT).unsigned(LONG)
        # No jump, which would be guessed wrong, and no sum that all small weights wait for.
        spare = (i & NUM_SPARE - 1) + NUM_CLASSES
        at = (weight >= least).select(its_class, spare) * 8
        sums.store(sums.load(DOUBLE, at) + weight.to(DOUBLE), at)
    f.finish()
