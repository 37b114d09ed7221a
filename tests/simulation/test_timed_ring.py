"""What the plan and the protocols make of costs and delays, in virtual time."""

import itertools

import pytest

from mdiq.plan.micro_batches import Curve
from mdiq.plan.pace import PaceSettings, StageCost
from tests.simulation.timed_ring import TimedRing

MODEL = StageCost.of(
    ((1, 0.012), (2, 0.012), (4, 0.012), (8, 0.0135), (16, 0.0255)), ((16, 0.0252), (64, 0.0828), (192, 0.2364))
)
"""A whole model on one Node: 12 ms a token of up to 8 Sequences, 6 ms and 1.2 ms a token of a prompt."""
HEAD = Curve(((1, 0.001), (16, 0.004)))


def part(share: float) -> StageCost:
    """Return the cost of a share of the model's Layers."""
    decode, prompt = (tuple((n, s * share) for n, s in curve.points) for curve in (MODEL.decode, MODEL.prompt))
    return StageCost.of(decode, prompt)


def _first_token_s(num_stages: int, num_prompt: int) -> float:
    ring = TimedRing([part(1 / num_stages)] * num_stages, head=HEAD, jitter=0.1)
    index = ring.submit(num_prompt, 2)
    ring.run()
    return ring.token_times[index][0]


@pytest.mark.parametrize(("num_stages", "most"), [(2, 0.62), (3, 0.45), (4, 0.36)])
def test_all_stages_work_on_one_long_prompt(num_stages: int, most: float) -> None:
    assert _first_token_s(num_stages, 1_000) < most * _first_token_s(1, 1_000)


@pytest.mark.parametrize("num_users", [1, 4, 12])
@pytest.mark.parametrize("wait_s", [0.15, 0.2, 0.5])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
def test_a_decoding_user_beside_long_prompts_never_waits_longer_than_the_setting(
    num_stages: int, wait_s: float, num_users: int
) -> None:
    """Though one Stage is slower, and times vary and grow with the context."""
    costs = [part(1 / num_stages)] * (num_stages - 1) + [part(1.3 / num_stages)]
    settings = PaceSettings(decode_wait_s=wait_s)
    ring = TimedRing(costs, head=HEAD, jitter=0.1, growth=0.2, settings=settings, seed=num_users)
    users = [ring.submit(20, 150, at=0.03 * i) for i in range(num_users)]
    prompts = [ring.submit(length, 2, at=at) for length, at in ((1_000, 0.5), (700, 0.8), (40, 0.9))]
    ring.run()
    gaps = [b - a for user in users for a, b in itertools.pairwise(ring.token_times[user])]
    assert max(gaps) <= wait_s
    # The Ring's own figure also counts the prompts' Sequences, which decode beside each other.
    assert 0 < ring.ring.decode_gap_s <= wait_s
    assert all(len(ring.token_times[prompt]) == 2 for prompt in prompts)


def test_a_longer_wait_lets_a_prompt_through_faster() -> None:
    def first_token_s(wait_s: float) -> float:
        ring = TimedRing([part(0.5)] * 2, head=HEAD, settings=PaceSettings(decode_wait_s=wait_s))
        ring.submit(20, 400)
        prompt = ring.submit(1_000, 2, at=0.5)
        ring.run()
        return ring.token_times[prompt][0]

    assert first_token_s(0.3) < 0.8 * first_token_s(0.06)


def test_without_prompts_in_the_ring_no_gap_is_counted() -> None:
    ring = TimedRing([part(0.5)] * 2, head=HEAD)
    ring.submit(20, 30)
    ring.run()
    assert ring.ring.decode_gap_s == 0


def _tokens_per_s(ring: TimedRing, num_sequences: int) -> float:
    """Return the rate of the middle half of all tokens."""
    for _ in range(num_sequences):
        ring.submit(10, 60)
    ring.run()
    times = sorted(itertools.chain.from_iterable(ring.token_times.values()))
    quarter = len(times) // 4
    return 2 * quarter / (times[3 * quarter] - times[quarter])


def test_a_delay_on_every_hop_costs_latency_and_not_throughput() -> None:
    """50 ms one way on each of 3 Hops; the Ring itself chooses how many Sequences and micro-batches are in flight."""
    near, far = (TimedRing([part(1 / 3)] * 3, head=HEAD, jitter=0.1, hop_s=hop_s) for hop_s in (2e-4, 0.05))
    assert far.spec.max_live > near.spec.max_live
    assert _tokens_per_s(far, 250) > 0.85 * _tokens_per_s(near, 250)


def test_the_rate_is_the_predicted_one() -> None:
    for num_live in (2, 8, 24):
        ring = TimedRing([part(0.25)] * 4, head=HEAD, jitter=0.2)
        for _ in range(num_live):
            ring.submit(1, 200)
        ring.run()
        rate = ring.num_tokens / ring.now
        assert rate == pytest.approx(ring.prediction.rates[num_live - 1], rel=0.1)


def test_batches_that_were_cut_by_chance_grow_together_again() -> None:
    """8 Sequences in 2 groups of 4, one starts alone: with 3 groups in flight the slow Stage would work more."""
    slow = [part(0.5), part(1.0)]
    together, apart = (TimedRing(slow, hop_s=0.01) for _ in range(2))
    for i in range(8):
        together.submit(1, 300)
        apart.submit(1, 300, at=0.0 if i == 0 else 0.004)
    together.run()
    apart.run()
    assert apart.num_tokens / apart.now > 0.97 * together.num_tokens / together.now


def test_slow_laps_of_slow_devices_with_prompts_between_them_are_not_given_up() -> None:
    """A Lap of 3 to 20 s, hops of half a second, times that vary by a half: TimedRing fails on the first Replay."""
    cost = StageCost(Curve(((1, 1.0), (8, 2.0), (64, 8.0))), Curve(((1, 1.0), (64, 4.0), (256, 14.0))))
    ring = TimedRing([cost] * 3, hop_s=0.5, jitter=0.5, growth=0.5)
    for i in range(6):
        ring.submit(num_prompt=20 + 90 * i, max_tokens=30, at=40.0 * i)
    ring.run()
    assert ring.num_tokens == 6 * 30
    assert not ring.ring.counts
