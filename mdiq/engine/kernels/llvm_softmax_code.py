"""The loops of CompiledSoftmax; see llvm_softmax.py."""

import math

from llvmlite import ir

from mdiq.engine.kernels.llvm_code import FLOAT, Function, Value, power_of_2, vector

LANES = 16
"""Floats of a vector."""
BLOCK = 128
"""Weights that are summed together."""


def build(features: frozenset[str]) -> ir.Module:
    """Return the module with soften and add_up."""
    module = ir.Module()
    _build(module, "soften", keeps_weights=True)
    _build(module, "add_up", keeps_weights=False)
    return module


def _build(module: ir.Module, name: str, *, keeps_weights: bool) -> None:
    """Build soften(logits, numbers, weights, sums, count), or add_up, which has no weights.

    logits, weights: f32 [count]; a weight is e^((logit - largest) * factor), 0 where that is no normal float. numbers:
    f32, largest and factor. sums: f32, of each BLOCK weights, and of the rest if there is one.
    """
    f = Function(module, name, 3 + keeps_weights, 1)
    logits, numbers, *weights, sums, count = f.arguments
    whole = count & -BLOCK
    largest = numbers.load(FLOAT)
    to_powers_of_2 = numbers.load(FLOAT, 4) * math.log2(math.e)

    def soft(i: Value, lanes: int) -> Value:
        logit = logits.load(vector(FLOAT, lanes), i * 4)
        weight = power_of_2((logit - largest.spread(lanes)) * to_powers_of_2.spread(lanes))
        for kept in weights:
            kept.store(weight, i * 4)
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
