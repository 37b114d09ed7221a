"""Hot columns that travel: a part of a model is packed as the whole is, and what are no columns is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mdiq.bench.shapes import shape_file
from mdiq.core.types import LayerRange
from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.formats.quantize import PackedModel
from mdiq.engine.model.hot_table import hot_columns_from, hot_table, of_layers
from mdiq.errors import ModelError


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path))
    return shape_file("tiny", 8, lambda _: None)


def _never() -> dict[str, torch.Tensor]:
    raise AssertionError("a part of a model cannot find them")


def test_a_layer_with_columns_from_elsewhere_is_packed_as_where_they_were_found(tiny: Path, tmp_path: Path) -> None:
    table = hot_table(tiny, "int8")
    layers = LayerRange(1, 2)
    with open_checkpoint(tiny) as checkpoint:
        known = hot_columns_from(of_layers(table, layers), checkpoint)
        assert set(known) == {f"layer-001.{role}" for role in ("qkv", "o", "gate_up", "down")}
        assert any(len(columns) for columns in known.values())
        with (
            PackedModel(checkpoint, "int8", tmp_path / "packed", _never) as whole,
            PackedModel(checkpoint, "int8", tmp_path / "part", _never, known) as part,
        ):
            ours, theirs = part.layer(1), whole.layer(1)
            assert ours.names == theirs.names
            assert all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in ours.names)


def test_a_layer_that_was_packed_for_other_columns_is_packed_again(tiny: Path, tmp_path: Path) -> None:
    with open_checkpoint(tiny) as checkpoint:
        known = hot_columns_from(of_layers(hot_table(tiny, "int8"), LayerRange(0, 1)), checkpoint)
        name = next(name for name, columns in known.items() if len(columns))
        other = {**known, name: torch.arange(len(known[name]))}
        assert not torch.equal(other[name], known[name])
        with PackedModel(checkpoint, "int8", tmp_path / "part", _never, known) as part:
            part.layer(0)
        with PackedModel(checkpoint, "int8", tmp_path / "part", _never, other) as part:
            packed = part.layer(0).tensor(f"{name.removeprefix('layer-000.')}.hot")
    assert torch.equal(packed, other[name])


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("layer-000.qkv", [1] * 1_000),
        ("layer-000.qkv", [-1, 2]),
        ("layer-000.qkv", [0, 10**6]),
        ("layer-999.qkv", [0]),
        ("layer-000.key", [0]),
        ("head", [0]),
    ],
)
def test_what_are_no_columns_of_the_model_is_refused(tiny: Path, name: str, columns: list[int]) -> None:
    with open_checkpoint(tiny) as checkpoint, pytest.raises(ModelError, match="hot columns"):
        hot_columns_from({name: np.array(columns, "<i4").tobytes()}, checkpoint)


def test_bytes_that_are_no_numbers_are_refused(tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint, pytest.raises(ModelError, match="hot columns"):
        hot_columns_from({"layer-000.qkv": b"\0\0\0"}, checkpoint)
