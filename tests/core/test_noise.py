"""Which Hops get noise for what is promised of the Nodes."""

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdiq.core.noise import NoisePromise, RowNoise, noise_of_hops


def promise(ratio: float, clip: float = 2.0) -> NoisePromise:
    return NoisePromise(1.0 / ratio, 1e-6, RowNoise(clip, clip * ratio))


WEAK, STRONG = promise(1.0), promise(4.0, clip=0.5)


@pytest.mark.parametrize(
    ("nodes", "hops"),
    [
        ([None], (None,)),
        ([None, None, None], (None, None, None)),
        ([None, WEAK, WEAK], (WEAK, None, None)),
        ([None, None, WEAK], (None, WEAK, None)),
        ([None, WEAK, STRONG, WEAK], (WEAK, STRONG, None, None)),
        ([None, STRONG, WEAK, None], (STRONG, None, None, None)),
    ],
    ids=["alone", "none", "once", "a trusted one first", "more for one", "enough before"],
)
def test_a_hop_gets_noise_where_no_earlier_one_has_as_much(
    nodes: list[NoisePromise | None], hops: tuple[NoisePromise | None, ...]
) -> None:
    assert noise_of_hops(nodes) == hops


@given(st.lists(st.none() | st.sampled_from([0.5, 1.0, 2.0, 4.0]).map(promise), min_size=1, max_size=6), st.data())
def test_every_promise_is_kept_in_any_ring_that_is_left_after_losses(
    workers: list[NoisePromise | None], data: st.DataObject
) -> None:
    left = [None, *(each for each in workers if data.draw(st.booleans()))]
    hops = noise_of_hops(left)
    assert len(hops) == len(left) and hops[-1] is None, "the Starter knows the tokens"
    for i, node in enumerate(left):
        if node is not None:
            seen = [hop.row.ratio for hop in hops[:i] if hop is not None]
            assert max(seen) >= node.row.ratio


@pytest.mark.parametrize(("clip", "sigma"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (inf, 1.0), (1.0, nan)])
def test_noise_that_cannot_be_is_refused(clip: float, sigma: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        RowNoise(clip, sigma)
