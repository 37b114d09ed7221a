"""The words of compiled loops mean what they say: each is compiled here and compared with Python's or torch's maths."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("llvmlite")
from llvmlite import ir  # noqa: E402

from mdiq.engine.kernels.llvm_code import (  # noqa: E402
    BYTE,
    FLOAT,
    INT,
    LONG,
    Function,
    Value,
    fma,
    joined,
    lane_totals,
    lesser,
    power_of_2,
    vector,
)
from mdiq.engine.kernels.llvm_machine import Machine  # noqa: E402

LANES = 8
FLOATS, INTS = vector(FLOAT, LANES), vector(INT, LANES)
X = torch.tensor([-3.5, -2.5, -1.0, 0.0, 0.5, 1.5, 2.0, 100.0])
Y = torch.tensor([2.0, 4.0, -1.0, 0.5, 0.25, -8.0, 3.0, 1.0])


def _run(body: Callable[[Function, Value, Value, Value], None], x: torch.Tensor, out: torch.Tensor, n: int = 0) -> None:
    """Compile ``body(f, address of x, address of out, n)``, and call it."""
    module = ir.Module()
    f = Function(module, "it", 2, 1)
    body(f, *f.arguments)
    f.finish()
    machine = Machine(lambda: module)
    machine.function("it", 2, 1)(x.data_ptr(), out.data_ptr(), n)


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (lambda x, y: (x + y) * x - y, lambda x, y: (x + y) * x - y),
        (lambda x, y: x / y, lambda x, y: x / y),
        (lambda x, y: 1.0 / (x * x + 1.0), lambda x, y: 1.0 / (x * x + 1.0)),
        (lambda x, y: -x, lambda x, y: -x),
        (lambda x, y: fma(x, y, 0.25), lambda x, y: torch.addcmul(torch.tensor(0.25), x, y)),
        (lambda x, y: (x >= y).select(x, 7.0), lambda x, y: torch.where(x >= y, x, 7.0)),
        (lambda x, y: (x <= 0.0).select(1.0, y), lambda x, y: torch.where(x <= 0, 1.0, y)),
        (lambda x, y: lesser(x, y), torch.minimum),
        (lambda x, y: x.or_larger(-1.0).or_smaller(y), lambda x, y: torch.minimum(x.clamp(min=-1.0), y)),
        (lambda x, y: x.rounded() + x.abs().sqrt(), lambda x, y: x.round() + x.abs().sqrt()),
        (lambda x, y: x.pick([7, 0, 8, 15] * 2, y), lambda x, y: torch.cat((x, y))[[7, 0, 8, 15] * 2]),
        (lambda x, y: (x.lane(1) + y.lane(5)).spread(LANES), lambda x, y: (x[1] + y[5]).expand(LANES)),
        (lambda x, y: (x * y).total().spread(LANES), lambda x, y: (x * y).sum().expand(LANES)),
        (lambda x, y: x.largest().spread(LANES), lambda x, y: x.max().expand(LANES)),
        (lambda x, y: x.to(INT).to(FLOAT), lambda x, y: x.trunc()),
    ],
)
def test_a_formula_of_floats_gives_what_torch_gives(
    formula: Callable[[Value, Value], Value], expected: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    def body(f: Function, x: Value, out: Value, n: Value) -> None:
        out.store(formula(x.load(FLOATS), x.load(FLOATS, 4 * LANES)))

    out = torch.empty(LANES)
    _run(body, torch.cat((X, Y)), out)
    assert torch.equal(out, expected(X, Y).float())


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (lambda i: i * 3 - 4, lambda i: i * 3 - 4),
        (lambda i: (i & 6) | (i << 4), lambda i: (i & 6) | (i << 4)),
        (lambda i: i >> 1, lambda i: i >> 1),
        (lambda i: i.shifted_down(28), lambda i: (i % 2**32) >> 28),
        (lambda i: i // 3, lambda i: int(i / 3)),
        (lambda i: i.to(BYTE).to(INT), lambda i: (i + 128) % 256 - 128),
        (lambda i: i.to(BYTE).unsigned(INT), lambda i: i % 256),
        (lambda i: i.equals(5).select(1, i), lambda i: 1 if i == 5 else i),
        (lambda i: i.differs_from(5).select(i, 0), lambda i: 0 if i == 5 else i),
        (lambda i: i.integer_total().spread(LANES), lambda i: sum(INTEGERS)),
    ],
)
def test_a_formula_of_integers_gives_what_python_gives(
    formula: Callable[[Value], Value], expected: Callable[[int], int]
) -> None:
    out = torch.empty(LANES, dtype=torch.int32)
    _run(lambda f, x, out, n: out.store(formula(x.load(INTS))), torch.tensor(INTEGERS, dtype=torch.int32), out)
    assert out.tolist() == [expected(i) for i in INTEGERS]


INTEGERS = [-300, -7, -1, 0, 1, 5, 127, 200]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_loops_run_as_often_as_asked_and_carry_what_their_body_returns(count: int) -> None:
    def body(f: Function, x: Value, out: Value, n: Value) -> None:
        total = f.fold(0, n, 1, f.integer(100), lambda i, total: total + i)
        first, second = f.loop(0, n, 2, [f.integer(0), f.integer(1)], lambda i, ab: [ab[1], ab[0] + ab[1] + i])
        for place, value in enumerate((total, first, second)):
            out.store(value, 8 * place)
        with f.each(0, n) as i, f.when(i > 2):
            out.store(i, 24)

    out = torch.full((4,), -1)
    _run(body, X, out, count)
    first, second = 0, 1
    for i in range(0, count, 2):
        first, second = second, first + second + i
    assert out.tolist() == [100 + sum(range(count)), first, second, count - 1 if count > 3 else -1]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_totals_of_several_vectors_are_those_of_each(count: int) -> None:
    rows = torch.arange(count * LANES, dtype=torch.int32).view(count, LANES) ** 2

    def body(f: Function, x: Value, out: Value, n: Value) -> None:
        for i, total in enumerate(lane_totals([x.load(INTS, 4 * LANES * i) for i in range(count)])):
            out.store(total, 4 * i)

    out = torch.empty(count, dtype=torch.int32)
    _run(body, rows, out)
    assert out.tolist() == rows.sum(1).tolist()


def test_powers_of_2_are_right_to_the_last_places_and_0_where_no_normal_float_is_left() -> None:
    x = torch.cat((-torch.linspace(0, 125, 2_000), torch.tensor([-127.0, -1e4, -torch.inf] + [0.0] * 5)))

    def body(f: Function, x: Value, out: Value, n: Value) -> None:
        with f.each(0, n, LANES) as i:
            out.store(power_of_2(x.load(FLOATS, i * 4)), i * 4)

    out = torch.empty_like(x)
    _run(body, x, out, len(x))
    expected = torch.exp2(x.double())
    assert ((out[:2_000] - expected[:2_000]).abs() <= 2e-7 * expected[:2_000]).all()
    assert out[2_000:2_003].tolist() == [0.0] * 3 and (out[2_003:] == 1).all()


def test_what_is_stored_has_its_own_size_and_may_lie_on_any_byte() -> None:
    def body(f: Function, x: Value, out: Value, n: Value) -> None:
        out.store(joined([x.load(vector(BYTE, 4)), x.load(vector(BYTE, 4), 3)]), 1)
        (out + 16).store(x.load(FLOAT, 4), n)
        out.store(f.lane_numbers(LONG, 2), 32)

    out = torch.zeros(48, dtype=torch.uint8)
    _run(body, X, out, 8)
    given = X.view(torch.uint8)
    assert out[1:9].tolist() == [*given[:4].tolist(), *given[3:7].tolist()]
    assert out[24:28].view(torch.float32).item() == -2.5 and not out[28:32].any()
    assert out[32:48].view(torch.int64).tolist() == [0, 1]
