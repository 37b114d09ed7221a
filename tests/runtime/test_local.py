"""A Ring of this one process, on a model of random weights."""

from pathlib import Path

import pytest

from mdiq.bench.shapes import shape_file
from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.core.types import LayerRange
from mdiq.runtime.local import LocalRing
from mdiq.runtime.options import HopFigures, RingOptions


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path))
    return shape_file("tiny", 8, lambda _: None)


@pytest.mark.parametrize(("wires", "used"), [(("auto",), ["f32", "f32"]), (("i8", "auto"), ["i8", "f32"])])
async def test_hops_inside_a_process_are_not_measured_and_carry_what_the_stages_have(
    tiny: Path, wires: tuple[str, ...], used: list[str]
) -> None:
    layers = (LayerRange(0, 2), LayerRange(2, 4))
    options = RingOptions(tiny, layers, wires=wires, in_process=True, kv_tokens=128)
    async with LocalRing(options) as ring:
        assert ring.hops() == [HopFigures(wire, None, None) for wire in used]
        assert ring.wire_check_nats is None
        tokens = [e.step.token async for e in ring.stream(Sequence(0, (1, 2, 3), SamplingParams(max_tokens=3)))]
        assert len(tokens) == 3
        assert [figures.bytes_out > 0 for figures in ring.figures()] == [True, True]


async def test_a_ring_of_one_has_no_hops(tiny: Path) -> None:
    async with LocalRing(RingOptions(tiny, (LayerRange(0, 4),), wires=("auto",), kv_tokens=128)) as ring:
        assert ring.hops() == []
