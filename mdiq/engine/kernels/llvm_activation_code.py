"""The loop of CompiledActivation; see llvm_activation.py."""

import math

from llvmlite import ir

from mdiq.engine.kernels.llvm_code import FLOAT, Function, Value, fma, lesser, power_of_2, vector

LANES = 16
"""Floats of a vector, and the fewest columns of a matrix."""
_FLOATS = vector(FLOAT, LANES)
_CUBE = 0.044715
_SLOPE = 2 * math.sqrt(2 / math.pi)


def build(features: frozenset[str], *, is_gelu: int, is_gated: int) -> ir.Module:
    """Return the module for SiLU, or for GELU as tanh approximates it; gated, or not.

    Its function activate(up, out, width, up_step, out_step, first, stop) does rows ``first`` to ``stop - 1``. up: f32
    rows of ``width``, ``up_step`` bytes apart, twice as wide where they are gated. out: f32 rows, ``out_step`` bytes
    apart, elsewhere.
    """
    module = ir.Module()
    f = Function(module, "activate", 2, 5)
    up, out, width, up_step, out_step, first, stop = f.arguments
    with f.each(first, stop) as row:
        x_row, y_row = up + row * up_step, out + row * out_step
        other = x_row + width * 4
        last = width - LANES
        with f.each(0, width, LANES) as i:
            # The last vector may overlap the one before: an element is the same in either.
            at = lesser(i, last) * 4
            x = x_row.load(_FLOATS, at)
            y = x * _sigmoid(_bent(x) if is_gelu else x)
            y_row.store(y * other.load(_FLOATS, at) if is_gated else y, at)
    f.finish()
    return module


def _bent(x: Value) -> Value:
    """Return what GELU gives the sigmoid: (1 + tanh z) / 2 is the sigmoid of 2 z."""
    square = x * x
    bend = fma(square, _CUBE, 1.0)
    return x * _SLOPE * bend


def _sigmoid(x: Value) -> Value:
    """Return 1 / (1 + e^-x), from e^-|x|, which overflows nowhere."""
    power = power_of_2(x.abs() * -math.log2(math.e))
    return (x >= 0.0).select(1.0, power) / (x.constant(1.0) + power)
