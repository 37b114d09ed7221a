"""How much of a loop's time messages of no use may take."""

import pytest

from mdiq.transport.junk import BURST_S, QUANTUM_S, RECEIVE_S, SHARE, JunkBudget

COST_S = 50e-6


class Loop:
    """A clock, and rests that end as much later as the loop has other work."""

    def __init__(self, late_s: float) -> None:
        self.now_s = self.rested_s = self.longest_s = 0.0
        self._late_s = late_s

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.longest_s = max(self.longest_s, seconds)
        self.now_s += seconds + self._late_s


@pytest.mark.parametrize("late_s", [0.0, 0.002, 0.02])
async def test_junk_takes_a_fifth_of_the_time_whatever_else_the_loop_does(late_s: float) -> None:
    loop, num_messages = Loop(late_s), 50_000
    junk = JunkBudget(loop.sleep, loop.clock)
    for _ in range(num_messages):
        loop.now_s += COST_S + RECEIVE_S
        await junk.spent(COST_S)
    used_s = num_messages * (COST_S + RECEIVE_S)
    # No more, or senders of Frames would wait for nothing; no less either.
    assert used_s <= BURST_S + SHARE * loop.now_s
    assert used_s > 0.9 * SHARE * loop.now_s
    assert loop.longest_s < 2 * QUANTUM_S / SHARE


async def test_a_few_messages_of_no_use_cost_no_rest() -> None:
    async def sleep(_: float) -> None:
        raise AssertionError("a rest")

    junk = JunkBudget(sleep)
    for _ in range(5):
        await junk.spent(COST_S)
