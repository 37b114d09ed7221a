"""What flags of a ring mean, and what is refused."""

from pathlib import Path

from mdiq.core.types import LayerRange, WeightSettings
from mdiq.runtime.options import RingOptions


def test_a_hop_has_the_format_of_its_place_and_a_ring_of_one_has_none(tmp_path: Path) -> None:
    two = RingOptions(tmp_path, (LayerRange(0, 1), LayerRange(1, 2)), wires=("bf16", "i8"))
    assert [two.wire(i) for i in (0, 1)] == ["bf16", "i8"]
    assert RingOptions(tmp_path, (LayerRange(0, 2),)).wire(0) is None


def test_a_hop_that_is_left_open_hands_activations_on_as_they_are_in_exact_mode(tmp_path: Path) -> None:
    layers = (LayerRange(0, 1), LayerRange(1, 2))
    for dtype in ("f32", "bf16"):
        ring = RingOptions(tmp_path, layers, WeightSettings(dtype=dtype))
        assert ring.wanted_wires == (dtype, dtype)
        assert ring.wire(0) == dtype
        assert not ring.rounds(ring.wanted_wires)
    ring = RingOptions(tmp_path, layers, wires=("auto", "i8"))
    assert ring.wanted_wires == ("f32", "i8")
    assert ring.rounds(("f32", "i8")) and ring.rounds(("bf16", "f32"))
    assert RingOptions(tmp_path, layers, WeightSettings(dtype="bf16")).rounds(("bf16", "i8"))
    assert not RingOptions(tmp_path, layers, WeightSettings(dtype="bf16")).rounds(("bf16", "f32"))


def test_a_hop_that_is_left_open_begins_with_bf16_or_with_what_one_process_has_in_fast_mode(tmp_path: Path) -> None:
    layers = (LayerRange(0, 1), LayerRange(1, 2))
    ring = RingOptions(tmp_path, layers, wires=("auto", "i8"), weights=WeightSettings(exact=False))
    assert [ring.wire(i) for i in (0, 1)] == ["bf16", "i8"]
    assert ring.wanted_wires == ("auto", "i8")
    for dtype in ("f32", "bf16"):
        weights = WeightSettings(dtype=dtype, exact=False)
        assert RingOptions(tmp_path, layers, weights, in_process=True).wire(0) == dtype
    assert RingOptions(tmp_path, (LayerRange(0, 2),), wires=("auto",)).wanted_wires == ()
