"""How much of a loop's time messages of no use may take."""

from mdiq.transport.junk import QUANTUM_S, RECEIVE_S, JunkBudget


async def test_junk_takes_a_fifth_of_the_time_at_most_and_never_long_at_once() -> None:
    rests: list[float] = []

    async def sleep(seconds: float) -> None:
        rests.append(seconds)

    junk, cost_s = JunkBudget(sleep), 50e-6
    for _ in range(114_000):
        await junk.spent(cost_s)
    used_s = 114_000 * (cost_s + RECEIVE_S)
    assert used_s / (used_s + sum(rests)) < 0.201
    assert max(rests) < 5 * QUANTUM_S


async def test_a_few_messages_of_no_use_cost_no_rest() -> None:
    async def sleep(_: float) -> None:
        raise AssertionError("a rest")

    junk = JunkBudget(sleep)
    for _ in range(5):
        await junk.spent(50e-6)
