"""Sums of products of small integers, as the CPU at hand has them fastest: for llvm_int4_code.py's loops."""

from functools import reduce

from mdiq.engine.kernels.llvm_code import (
    INT,
    SHORT,
    Function,
    Value,
    has_dot_products,
    splat,
    vector,
    with_dot_products,
)

_LANES = 8
"""Of a vector of AVX2."""


def sum_products(f: Function, weights: list[Value], activations: list[Value], features: frozenset[str]) -> Value:
    """Return for each lane the sum of all products of bytes: of weights in 0..15 and activations with a sign."""
    kind = activations[0].type
    if "avx2" not in features or has_dot_products(features):
        total = splat(INT, kind.count, 0)
        for weight, activation in zip(weights, activations, strict=True):
            total = with_dot_products(f, total, f.b.bitcast(weight, kind), activation, features)
        return total
    total = _short_products(f, weights, activations)
    return f.call("llvm.x86.avx2.pmadd.wd", kind, total, splat(SHORT, 2 * kind.count, 1))


def _short_products(f: Function, weights: list[Value], activations: list[Value]) -> Value:
    """Return two sums for each lane, with AVX2: of 16 products of 15 * 127 at most, which 16 bits hold."""
    shorts = vector(SHORT, weights[0].type.count // 2)
    products = [
        f.call("llvm.x86.avx2.pmadd.ub.sw", shorts, weight, f.b.bitcast(activation, weight.type))
        for weight, activation in zip(weights, activations, strict=True)
    ]
    while len(products) > 1:
        products = [f.b.add(*pair) for pair in zip(products[::2], products[1::2], strict=True)]
    return products[0]


def scaled_products(
    f: Function, scale: Value, weights: list[Value], activations: list[Value], features: frozenset[str]
) -> Value:
    """Return for each lane its scale, 0 to 63, times the sum of products of bytes; see sum_products."""
    b, kind = f.b, scale.type
    if "avx2" not in features or has_dot_products(features):
        return b.mul(scale, sum_products(f, weights, activations, features))
    both = b.bitcast(b.or_(scale, b.shl(scale, splat(INT, kind.count, 16))), vector(SHORT, 2 * kind.count))
    return f.call("llvm.x86.avx2.pmadd.wd", kind, _short_products(f, weights, activations), both)


def small_product(f: Function, low: Value, total: Value, features: frozenset[str]) -> Value:
    """Return the product of ``low``, 0 to 63, and what 16 bits hold with a sign, lane by lane."""
    if "avx2" not in features or low.type.count != _LANES:
        return f.b.mul(low, total)
    shorts = vector(SHORT, 2 * _LANES)  # the upper half of ``low`` is 0, and so is what it is multiplied with
    return f.call("llvm.x86.avx2.pmadd.wd", low.type, f.b.bitcast(low, shorts), f.b.bitcast(total, shorts))


def products_of_6(
    f: Function, pairs: Value, weights: list[Value], activations: list[Value], features: frozenset[str]
) -> Value:
    """Return for each lane the sum of its two scales times the products of bytes of half a block: weights in 0..63."""
    b = f.b
    num_lanes = pairs.type.count // 2
    kind, half = vector(INT, num_lanes), len(weights) // 2
    found = []
    for parity, places in enumerate((slice(half), slice(half, None))):
        of_half = weights[places], activations[places]
        if "avx2" not in features or has_dot_products(features):
            scale = _of_pairs(f, pairs)[parity]
            found.append(b.mul(scale, sum_products(f, *of_half, features)))
            continue
        scale = f.pick(pairs, [lane // 2 * 2 + parity for lane in range(2 * num_lanes)])
        for k in range(0, half, 2):  # sums of four products of 63 * 127 at most: 16 bits hold them
            total = _short_products(f, of_half[0][k : k + 2], of_half[1][k : k + 2])
            found.append(f.call("llvm.x86.avx2.pmadd.wd", kind, total, scale))
    return reduce(b.add, found)


def pair_products(f: Function, pairs: Value, others: Value, features: frozenset[str]) -> Value:
    """Return for each lane the sum of two products of 16 bits with a sign."""
    b, kind = f.b, vector(INT, pairs.type.count // 2)
    if "avx2" in features and kind.count == _LANES:
        return f.call("llvm.x86.avx2.pmadd.wd", kind, pairs, others)
    products = [b.mul(*sides) for sides in zip(_of_pairs(f, pairs), _of_pairs(f, others), strict=True)]
    return b.add(*products)


def _of_pairs(f: Function, pairs: Value) -> list[Value]:
    """Return the first and the second number of each lane's two, as i32."""
    kind = vector(INT, pairs.type.count // 2)
    return [f.b.sext(f.pick(pairs, range(parity, pairs.type.count, 2)), kind) for parity in range(2)]
