"""The loop of CompiledActivation, in LLVM's language; see llvm_activation.py."""

import math

from llvmlite import ir

from mdiq.engine.kernels.llvm_code import FLOAT, LONG, POINTER, Function, Value, power_of_2, splat, vector

LANES = 16
"""Floats of a vector, and the fewest columns of a matrix."""
_FLOATS, _OF_FLOATS = vector(FLOAT, LANES), f"v{LANES}f32"
_CUBE = 0.044715
_SLOPE = 2 * math.sqrt(2 / math.pi)


def build(features: frozenset[str], *, is_gelu: int, is_gated: int) -> Value:
    """Return the module for SiLU, or for GELU as tanh approximates it; gated, or not.

    Its function activate(up, out, width, up_step, out_step, first, stop) does rows ``first`` to ``stop - 1``. up: f32
    rows of ``width``, ``up_step`` bytes apart, twice as wide where they are gated. out: f32 rows, ``out_step`` bytes
    apart, elsewhere.
    """
    module = ir.Module()
    f = Function(module, "activate", [POINTER] * 2 + [LONG] * 5)
    b = f.b
    up, out, width, up_step, out_step, first, stop = f.arguments

    def row(i: Value, _: list[Value]) -> list[Value]:
        x_row, y_row = f.at(up, b.mul(i, up_step)), f.at(out, b.mul(i, out_step))
        other = f.at(x_row, b.mul(width, LONG(4)))
        last = b.sub(width, LONG(LANES))

        def some(i: Value, _: list[Value]) -> list[Value]:
            # The last vector may overlap the one before: an element is the same in either.
            at = b.mul(b.select(b.icmp_signed("<", i, last), i, last), LONG(4))
            x = f.load(_FLOATS, x_row, at)
            y = b.fmul(x, _sigmoid(f, _bent(f, x) if is_gelu else x))
            f.store(b.fmul(y, f.load(_FLOATS, other, at)) if is_gated else y, y_row, at)
            return []

        f.loop(LONG(0), width, LANES, [], some)
        return []

    f.loop(first, stop, 1, [], row)
    f.finish()
    return module


def _bent(f: Function, x: Value) -> Value:
    """Return what GELU gives the sigmoid: (1 + tanh z) / 2 is the sigmoid of 2 z."""
    square = f.b.fmul(x, x)
    bend = f.call(f"llvm.fma.{_OF_FLOATS}", _FLOATS, square, splat(FLOAT, LANES, _CUBE), splat(FLOAT, LANES, 1.0))
    return f.b.fmul(f.b.fmul(x, splat(FLOAT, LANES, _SLOPE)), bend)


def _sigmoid(f: Function, x: Value) -> Value:
    """Return 1 / (1 + e^-x), from e^-|x|, which overflows nowhere."""
    b = f.b
    size = f.call(f"llvm.fabs.{_OF_FLOATS}", _FLOATS, x)
    power = power_of_2(f, b.fmul(size, splat(FLOAT, LANES, -math.log2(math.e))))
    one = splat(FLOAT, LANES, 1.0)
    top = b.select(b.fcmp_ordered(">=", x, splat(FLOAT, LANES, 0.0)), one, power)
    return b.fdiv(top, b.fadd(one, power))
