"""Activations on a Hop: three formats, there and back."""

import pytest
import torch

from mdiq.core.wire import WirePayload
from mdiq.core.wire_formats import row_bytes
from mdiq.engine.tensors import PackedRows, TensorRows, to_tensor, to_wire
from mdiq.errors import EngineError

CPU = torch.device("cpu")
# Half a step of the format, relative to the largest element of the row.
TOLERANCE = {"f32": 0.0, "bf16": 2**-8, "i8": 0.51 / 127}


def _received(payload: TensorRows | PackedRows) -> WirePayload:
    dtype, width, (data,) = payload.parts()
    assert memoryview(data).nbytes == payload.num_rows * row_bytes(dtype, width)
    return WirePayload(dtype, width, memoryview(bytes(data)))


@pytest.mark.parametrize("wire", TOLERANCE)
def test_rows_come_back_within_half_a_step(wire: str) -> None:
    hidden = torch.randn(5, 48, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1, 100, 1e-3, 0, 7]]).t()
    payload = to_wire(hidden, wire)
    back = to_tensor(_received(payload), 48, torch.float32, CPU)
    most = hidden.abs().amax(1, keepdim=True) * TOLERANCE[wire]
    assert ((back - hidden).abs() <= most).all()
    # Inside one process the same rounding happens without bytes.
    assert torch.equal(to_tensor(payload, 48, torch.float32, CPU), back)
    assert torch.equal(to_tensor(_received(payload).rows(1, 3), 48, torch.float32, CPU), back[1:3])
    assert torch.equal(to_tensor(payload.rows(1, 3), 48, torch.float32, CPU), back[1:3])


@pytest.mark.parametrize("wire", TOLERANCE)
def test_no_rows_make_no_bytes(wire: str) -> None:
    assert to_wire(torch.empty(0, 48), wire).parts()[2] == (b"",)


def test_rows_of_a_width_that_is_no_multiple_of_four_can_be_taken_apart() -> None:
    hidden = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    payload = to_wire(hidden, "i8")
    whole = to_tensor(payload, 6, torch.float32, CPU)
    for i in range(3):
        assert torch.equal(to_tensor(payload.rows(i, i + 1), 6, torch.float32, CPU), whole[i : i + 1])


def test_rows_of_another_width_or_format_are_refused() -> None:
    payload = _received(to_wire(torch.ones(2, 48), "i8"))
    with pytest.raises(EngineError, match="width 48, the model has 64"):
        to_tensor(payload, 64, torch.float32, CPU)
    with pytest.raises(EngineError, match="expected rows of f32, bf16, i8"):
        to_tensor(WirePayload("none", 0, memoryview(b"")), 48, torch.float32, CPU)
