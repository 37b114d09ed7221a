import pytest

from mdiq.bench.figures import (
    LoadFigures,
    Scaling,
    UserTimes,
    load_figures,
    median_figures,
    median_ratio,
    num_ended_early,
    percentile,
    scalings,
)
from mdiq.bench.workload import ApartCell, Cell
from mdiq.testbed.link_shape import LinkShape


def figures(rate: float, total: float = 1.0) -> LoadFigures:
    return LoadFigures(total, rate, 0.0, 0.0, 0.0, 0.0)


def test_two_users_who_take_turns_give_the_rate_of_both() -> None:
    # Each has a token every 2 s, the second half a period later: one token a second in all.
    users = [UserTimes(0.0, (1.0, 3.0, 5.0, 7.0)), UserTimes(0.0, (2.0, 4.0, 6.0, 8.0))]
    result = load_figures(users)
    assert result.decode_tokens_per_s == 1.0
    assert result.total_tokens_per_s == 1.0
    assert (result.ttft_median_s, result.ttft_p95_s) == (1.5, 2.0)
    assert (result.itl_median_s, result.itl_p95_s) == (2.0, 2.0)


def test_the_decode_rate_begins_when_every_prompt_is_done() -> None:
    users = [UserTimes(0.0, (1.0, 9.0, 10.0, 11.0)), UserTimes(0.0, (8.0, 9.0, 10.0, 11.0))]
    assert load_figures(users).decode_tokens_per_s == 2.0


def test_users_who_had_their_answer_before_all_had_a_token_are_counted() -> None:
    # The first two answer at 3 tokens/s each; the third comes when they have ended, and is all that the rate shows.
    users = [UserTimes(0.0, (1.0, 1.3, 1.6)), UserTimes(0.0, (1.0, 1.3, 1.6)), UserTimes(0.0, (2.0, 3.0, 4.0))]
    assert load_figures(users).decode_tokens_per_s == 1.0
    assert num_ended_early(users) == 2
    assert num_ended_early([*users[:2], UserTimes(0.0, (1.6, 2.0, 2.4))]) == 0
    assert num_ended_early(users[:1]) == 0


def test_answers_of_one_token_have_no_decode_rate_and_no_latency() -> None:
    result = load_figures([UserTimes(1.0, (3.0,))])
    assert result == LoadFigures(0.5, 0.0, 2.0, 2.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([3, 1, 2], 50, 2), ([1], 95, 1), (range(1, 101), 95, 95), (range(1, 21), 95, 19), ([1, 2], 0, 1)],
)
def test_percentiles_are_values_that_occurred(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_each_figure_has_its_own_median() -> None:
    runs = [LoadFigures(*(float(i + offset) for i in range(6))) for offset in (0, 2, 1)]
    assert median_figures(runs) == runs[2]


def test_a_ratio_is_taken_within_each_round() -> None:
    # The machine was half as fast in the second round, for both.
    assert median_ratio([figures(20), figures(10), figures(20)], [figures(10), figures(5), figures(10)]) == 2.0
    assert median_ratio([figures(1, 6)], [figures(1, 3)], "total_tokens_per_s") == 2.0
    assert median_ratio([figures(1)], [figures(0)]) is None


def test_scaling_compares_with_the_same_users_per_node_and_in_all() -> None:
    runs = {
        Cell(1, 4, 8): [figures(10)],
        Cell(2, 4, 8): [figures(15)],
        Cell(2, 8, 8): [figures(19)],
        Cell(2, 3, 8): [figures(1)],
    }
    assert scalings(runs, {}) == [Scaling(Cell(2, 4, 8), None, 1.5), Scaling(Cell(2, 8, 8), 1.9, None)]


def test_rings_apart_are_compared_with_one_of_them_alone() -> None:
    runs = {Cell(1, 4, 8): [figures(10), figures(5)], Cell(2, 8, 8): [figures(16), figures(8)]}
    apart = {ApartCell(2, 4, 8): [figures(18), figures(9)]}
    assert scalings(runs, apart) == [Scaling(Cell(2, 8, 8), 1.6, None, 1.8)]
    # Of slowed hops rings apart say nothing: they have none.
    slow = LinkShape(0.02)
    assert scalings({Cell(1, 4, 8): [figures(10)], Cell(2, 8, 8, slow): [figures(5)]}, apart)[0].apart is None


def test_a_slowed_ring_is_compared_with_one_node_that_has_no_link() -> None:
    slow = LinkShape(0.02)
    runs = {Cell(1, 2, 8): [figures(10)], Cell(2, 2, 8, slow): [figures(5)]}
    assert scalings(runs, {}) == [Scaling(Cell(2, 2, 8, slow), None, 0.5)]


def test_slowed_rings_are_compared_with_each_other() -> None:
    slow = LinkShape(0.02)
    runs = {
        Cell(2, 2, 8): [figures(20)],
        Cell(2, 2, 8, slow): [figures(10)],
        Cell(3, 2, 8, slow): [figures(5)],
    }
    assert scalings(runs, {}) == [Scaling(Cell(3, 2, 8, slow), None, 0.5)]
