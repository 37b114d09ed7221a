"""Sums of products of small integers, with the fastest instructions of a CPU.

features: of that CPU, as LLVM calls them; with less than AVX2 or dot products, sums are right and slow.
"""

from functools import reduce
from operator import add

from mdiq.engine.kernels.llvm_code import BYTE, INT, SHORT, Value, call, joined, vector

_LANES = 8
"""Of a vector of AVX2."""


def has_dot_products(features: frozenset[str]) -> bool:
    """Tell whether an x86 CPU has instructions for dot products of bytes."""
    return bool({"avx512vnni", "avxvnni"} & features)


def _has_pairs_only(features: frozenset[str]) -> bool:
    """Tell whether the best that a CPU has are AVX2's sums of two products."""
    return "avx2" in features and not has_dot_products(features)


def zero_level(features: frozenset[str]) -> int:
    """Return which level stands for 0 in dot products: ARM has them with a sign on both sides, x86 on one."""
    return 0 if "dotprod" in features else 128


def with_dot_products(total: Value, levels: Value, others: Value, features: frozenset[str]) -> Value:
    """Return a vector of i32 to which each lane's four products of bytes are added.

    levels, others: vectors as large as ``total``. ``others`` have a sign; of ``levels`` see zero_level. With AVX2 alone
    a vector has 256 bits, and the sizes of two neighbours in ``others`` add to 128 at most.
    """
    kind, count = total.type, total.count
    if has_dot_products(features):
        name = f"llvm.x86.avx512.vpdpbusd.{count * 32}"
        return call(total.b, name, kind, total, levels.as_type(kind), others.as_type(kind))
    levels, others = (side.as_type(vector(BYTE, 4 * count)) for side in (levels, others))
    if "dotprod" in features:
        parts = []
        for i in range(0, count, 4):
            part = total.pick(range(i, i + 4))
            sides = (side.pick(range(4 * i, 4 * i + 16)) for side in (levels, others))
            parts.append(call(total.b, "llvm.aarch64.neon.sdot.v4i32.v16i8", part.type, part, *sides))
        return joined(parts)
    if "avx2" in features:
        return total + _pair_sums(_byte_pair_sums(levels, others))  # 16 bits hold 255 * 128
    each = levels.unsigned(INT) * others.to(INT)
    return reduce(add, (each.pick(range(part, 4 * count, 4)) for part in range(4)), total)


def sum_products(weights: list[Value], activations: list[Value], features: frozenset[str]) -> Value:
    """Return for each lane the sum of all products of bytes: of weights in 0..15 and activations with a sign."""
    if _has_pairs_only(features):
        return _pair_sums(_short_products(weights, activations))
    total = activations[0].constant(0)
    for weight, activation in zip(weights, activations, strict=True):
        total = with_dot_products(total, weight.as_type(total.type), activation, features)
    return total


def scaled_products(scale: Value, weights: list[Value], activations: list[Value], features: frozenset[str]) -> Value:
    """Return for each lane its scale, 0 to 63, times the sum of products of bytes; see sum_products."""
    if not _has_pairs_only(features):
        return scale * sum_products(weights, activations, features)
    both = (scale | scale << 16).as_type(vector(SHORT, 2 * scale.count))
    return _pair_sums(_short_products(weights, activations), both)


def small_product(low: Value, total: Value, features: frozenset[str]) -> Value:
    """Return the product of ``low``, 0 to 63, and ``total`` of 16 bits with a sign, lane by lane: both are i32."""
    if "avx2" not in features or low.count != _LANES:
        return low * total
    shorts = vector(SHORT, 2 * _LANES)  # the upper half of ``low`` is 0, and so are its products
    return _pair_sums(low.as_type(shorts), total.as_type(shorts))


def products_of_6(pairs: Value, weights: list[Value], activations: list[Value], features: frozenset[str]) -> Value:
    """Return for each lane the sum of its two scales times the products of bytes of half a block: weights in 0..63."""
    num_lanes, half = pairs.count // 2, len(weights) // 2
    found = []
    for parity, places in enumerate((slice(half), slice(half, None))):
        some_weights, some_activations = weights[places], activations[places]
        if not _has_pairs_only(features):
            found.append(_of_pairs(pairs)[parity] * sum_products(some_weights, some_activations, features))
            continue
        scale = pairs.pick([lane // 2 * 2 + parity for lane in range(2 * num_lanes)])
        for k in range(0, half, 2):  # sums of four products of 63 * 127 at most: 16 bits hold them
            found.append(_pair_sums(_short_products(some_weights[k : k + 2], some_activations[k : k + 2]), scale))
    return reduce(add, found)


def pair_products(pairs: Value, others: Value, features: frozenset[str]) -> Value:
    """Return for each lane the sum of two products of 16 bits with a sign."""
    if "avx2" in features and pairs.count == 2 * _LANES:
        return _pair_sums(pairs, others)
    first, second = (one * other for one, other in zip(_of_pairs(pairs), _of_pairs(others), strict=True))
    return first + second


def _short_products(weights: list[Value], activations: list[Value]) -> Value:
    """Return two sums for each lane, with AVX2: of 16 products of 15 * 127 at most, which 16 bits hold."""
    products = [
        _byte_pair_sums(weight, activation.as_type(weight.type))
        for weight, activation in zip(weights, activations, strict=True)
    ]
    while len(products) > 1:
        products = [one + other for one, other in zip(products[::2], products[1::2], strict=True)]
    return products[0]


def _byte_pair_sums(unsigned: Value, signed: Value) -> Value:
    """Return the sum of two neighbouring products of bytes in each lane of 16 bits, with AVX2."""
    return call(unsigned.b, "llvm.x86.avx2.pmadd.ub.sw", vector(SHORT, unsigned.count // 2), unsigned, signed)


def _pair_sums(shorts: Value, others: Value | None = None) -> Value:
    """Return the sum of two neighbouring products of 16 bits in each lane of 32, with AVX2. others: None is 1."""
    kind = vector(INT, shorts.count // 2)
    return call(shorts.b, "llvm.x86.avx2.pmadd.wd", kind, shorts, shorts.constant(1) if others is None else others)


def _of_pairs(pairs: Value) -> list[Value]:
    """Return the first and the second number of each lane's two, as i32."""
    return [pairs.pick(range(parity, pairs.count, 2)).to(INT) for parity in range(2)]
