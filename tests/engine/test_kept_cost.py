"""A Stage's cost is measured once on a machine, and again when it is not right any more."""

import json
from pathlib import Path

import pytest

from mdiq.core.types import LayerRange
from mdiq.engine import kept_cost, measure
from mdiq.engine.runner import StageRunner
from tests.engine.tiny_models import make_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))
    make_model("llama-gqa-tied").save_pretrained(tmp_path / "model")
    return tmp_path / "cache"


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each forward that is measured; one takes a hundredth of a second for each of them."""
    rows: list[int] = []

    def forward_s(runner: StageRunner, batch: measure.Batch) -> float:
        runner.forward(batch)
        rows.append(sum(segment.length for segment in batch.segments))
        return 0.01 * rows[-1]

    monkeypatch.setattr(measure, "_forward_s", forward_s)
    return rows


def _runner(cache: Path, *, num_layers: int = 1, kv_tokens: int = 512) -> StageRunner:
    return StageRunner.load(
        cache.parent / "model",
        LayerRange(0, num_layers),
        is_last=False,
        owns_embedding_and_head=False,
        kv_tokens=kv_tokens,
    )


def test_a_second_start_measures_one_token_only(cache: Path, sizes: list[int]) -> None:
    first = kept_cost.kept_cost(_runner(cache))
    assert set(sizes) == {*measure.DECODE_SIZES, *measure.PROMPT_SIZES}
    sizes.clear()
    assert kept_cost.kept_cost(_runner(cache)) == first
    assert set(sizes) == {1}


def test_stages_of_another_shape_are_measured_themselves(cache: Path, sizes: list[int]) -> None:
    kept_cost.kept_cost(_runner(cache))
    sizes.clear()
    kept_cost.kept_cost(_runner(cache, num_layers=2))
    assert max(sizes) == max(measure.PROMPT_SIZES)
    kept_cost.kept_cost(_runner(cache, kv_tokens=32))
    assert len(list((cache / "costs").iterdir())) == 3


@pytest.mark.parametrize(
    "kept",
    [
        [[[1, 0.02], [2, 0.04]], [[16, 0.1]]],  # of a busy machine: a token takes half of that
        [[[1, 0.005]], [[16, 0.1]]],
        [[[1, float("nan")]], [[16, 0.1]]],
        [[], []],
        [[[1, 0.01]]],
        {"decode": 1},
        [[["1", None]], [[16, 0.1]]],
    ],
)
def test_figures_that_are_not_right_are_measured_anew(cache: Path, sizes: list[int], kept: object) -> None:
    right = kept_cost.kept_cost(_runner(cache))
    (file,) = (cache / "costs").iterdir()
    file.write_text(json.dumps(kept))
    assert kept_cost.kept_cost(_runner(cache)) == right
    assert [[list(point) for point in curve.points] for curve in (right.decode, right.prompt)] == json.loads(
        file.read_text()
    )


def test_a_cache_that_cannot_be_written_keeps_nobody_from_measuring(cache: Path, sizes: list[int]) -> None:
    cache.mkdir()
    (cache / "costs").write_text("a file where the folder should be")
    assert kept_cost.kept_cost(_runner(cache)).decode.points
