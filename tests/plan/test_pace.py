"""From measured costs to caps and chunks."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdiq.core.codec import MAX_FLOAT
from mdiq.core.types import RingSpec
from mdiq.plan.micro_batches import Curve, Points
from mdiq.plan.pace import PaceSettings, StageCost, paced

DECODE = ((1, 0.010), (8, 0.012), (16, 0.024))


def cost(prompt_s: tuple[tuple[int, float], ...] = ((16, 0.016), (64, 0.040), (192, 0.104))) -> StageCost:
    """Return a Stage whose forward of a prompt takes 8 ms and 0.5 ms a token."""
    return StageCost.of(DECODE, prompt_s)


def pace(num_stages: int = 2, *, hops_s: float = 0.0, stage: StageCost | None = None, **wishes: float) -> RingSpec:
    settings = PaceSettings(**wishes)  # type: ignore[arg-type]
    return paced(RingSpec(num_stages, 1_000, 500), [stage or cost()] * num_stages, hops_s, settings)[0]


def test_the_spec_keeps_what_the_plan_does_not_decide_and_gets_the_rest() -> None:
    spec = pace()
    assert (spec.num_stages, spec.kv_tokens, spec.context_tokens) == (2, 1_000, 500)
    assert len(spec.caps) == len(spec.shared_chunks) == spec.max_live
    assert spec.pass_tokens == pytest.approx(16)  # 8 ms at 0.5 ms a token


def test_the_prediction_comes_with_it() -> None:
    spec, prediction = paced(RingSpec(2, 1_000, 500), [cost()] * 2, 0.0, PaceSettings(max_live=7))
    assert prediction.caps == spec.caps
    assert spec.max_live == len(spec.caps) == 7


@pytest.mark.parametrize(("wait_s", "chunk"), [(0.09, 16), (0.2, 80), (0.22, 96), (9.0, 128)])
def test_a_chunk_is_as_long_as_the_wait_allows_and_no_longer_than_is_efficient(wait_s: float, chunk: int) -> None:
    # 2 live Sequences: their own way takes about 40 ms; three quarters of the wait are given away.
    assert pace(decode_wait_s=wait_s).shared_chunk(2) == chunk


def test_a_wait_that_cannot_be_kept_gives_the_shortest_chunk() -> None:
    assert pace(decode_wait_s=0.001).shared_chunk(2) == 16
    assert pace(decode_wait_s=0.2, hops_s=1.0).shared_chunk(2) == 16


def test_the_longest_chunk_is_the_operators() -> None:
    assert pace(decode_wait_s=9.0, chunk_tokens=32).shared_chunk(2) == 32


def test_more_stages_and_more_sequences_shorten_the_chunk() -> None:
    assert pace(4, decode_wait_s=0.25).shared_chunk(2) < pace(2, decode_wait_s=0.25).shared_chunk(2)
    spec = pace(decode_wait_s=0.25)
    assert spec.shared_chunk(32) < spec.shared_chunk(2)


def test_a_long_way_needs_more_chunks_in_flight() -> None:
    assert pace(3).num_chunks == 4
    assert pace(3, hops_s=0.4).num_chunks == 4 + 10


def test_costs_that_were_measured_as_nothing_or_flat_still_give_a_pace() -> None:
    assert pace(stage=cost(((64, 0.0),)), hops_s=0.1).num_chunks == 3
    flat = StageCost(Curve(DECODE), Curve(((16, 0.1), (64, 0.1))))
    assert pace(stage=flat).pass_tokens == 256


def test_handling_is_a_part_of_every_forward_and_favors_larger_batches() -> None:
    spec, without = paced(RingSpec(2, 1_000, 500), [cost(), cost()], 0.0, PaceSettings(max_live=8))
    handled, with_it = paced(
        RingSpec(2, 1_000, 500), [cost().with_handling(0.02), cost()], 0.0, PaceSettings(max_live=8)
    )
    assert cost().with_handling(0.02).decode.seconds(1) == pytest.approx(DECODE[0][1] + 0.02)
    assert cost().with_handling(0.02).prompt.seconds(64) == pytest.approx(0.060)
    assert with_it.rates[7] < without.rates[7]
    assert handled.cap(8) > spec.cap(8)


_SECONDS = st.floats(-MAX_FLOAT, MAX_FLOAT)
_POINTS = st.dictionaries(st.integers(1, 2**63), _SECONDS, min_size=1, max_size=4).map(
    lambda p: tuple(sorted(p.items()))
)


@settings(deadline=None, max_examples=50)
@given(_POINTS, _POINTS, st.floats(0, 4 * MAX_FLOAT))
def test_whatever_a_node_says_that_it_costs_there_is_a_pace(decode: Points, prompt: Points, hops_s: float) -> None:
    costs = [cost(), StageCost.of(decode, prompt)]
    spec, micro_batches = paced(RingSpec(2, 1_000, 500), costs, hops_s, PaceSettings())
    assert spec.max_live >= 1 and spec.num_chunks >= 1 and math.isfinite(spec.pass_tokens)
    assert all(0 <= rate < math.inf for rate in micro_batches.rates)
