from mdiq.bench.workload import Cell, Load, grid
from mdiq.testbed.link_shape import LinkShape

SLOW = LinkShape(delay_s=0.02)


def test_one_seed_gives_the_same_prompts_again() -> None:
    assert Load(3, 5, 8, seed=1).prompts(100) == Load(3, 5, 8, seed=1).prompts(100)
    assert Load(3, 5, 8, seed=1).prompts(100) != Load(3, 5, 8, seed=2).prompts(100)


def test_prompts_have_the_length_asked_for_and_tokens_of_the_vocabulary() -> None:
    prompts = Load(4, 7, 8).prompts(20)
    assert [len(prompt) for prompt in prompts] == [7] * 4
    assert all(0 <= token < 20 for prompt in prompts for token in prompt)


def test_prompts_differ_from_their_first_token_on() -> None:
    assert len({prompt[0] for prompt in Load(16, 3, 8).prompts(100)}) == 16


def test_more_users_than_tokens_are_served_too() -> None:
    assert len(Load(5, 2, 1).prompts(4)) == 5


def test_the_grid_has_every_combination_once() -> None:
    assert grid([2, 1, 2], [4, 1], [], [32, 16]) == (
        Cell(1, 1, 16),
        Cell(1, 1, 32),
        Cell(1, 4, 16),
        Cell(1, 4, 32),
        Cell(2, 1, 16),
        Cell(2, 1, 32),
        Cell(2, 4, 16),
        Cell(2, 4, 32),
    )


def test_users_per_node_come_with_the_same_users_in_all() -> None:
    assert grid([1, 2, 3], [], [4], [8]) == (
        Cell(1, 4, 8),
        Cell(2, 4, 8),
        Cell(2, 8, 8),
        Cell(3, 4, 8),
        Cell(3, 12, 8),
    )


def test_temperatures_stand_side_by_side() -> None:
    assert grid([1], [2, 1], [], [8], temperatures=[1.0, 0.0]) == (
        Cell(1, 1, 8),
        Cell(1, 1, 8, temperature=1.0),
        Cell(1, 2, 8),
        Cell(1, 2, 8, temperature=1.0),
    )


def test_a_ring_of_one_node_has_no_link() -> None:
    assert grid([1, 2], [1], [], [8], [None, SLOW]) == (Cell(1, 1, 8), Cell(2, 1, 8), Cell(2, 1, 8, SLOW))
