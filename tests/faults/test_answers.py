"""What the lab itself can get wrong: a difference that it does not see, points that are too few or equal, figures."""

import pytest

from tests.faults.answers import Answer, compare
from tests.faults.points import (
    ARRANGEMENTS,
    BOTH,
    QUICK,
    QUICK_ARRANGEMENTS,
    SAMPLES,
    points_of,
    quick_points_of,
    wanted_points,
)
from tests.faults.receipts import noticed, pauses, slope, spread

CALM = {"text": "a lamp", "finish_reason": "stop", "usage": {"completion_tokens": 3}, "is_over": True, "num_events": 3}


def _answer(**changes: object) -> Answer:
    return Answer(**{**CALM, **changes})  # type: ignore[arg-type]


def test_the_same_answer_is_the_same_however_its_events_came() -> None:
    assert compare(_answer(), _answer(num_events=2, longest_gap_s=9.0, num_refused=1)).kind == "same"


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"text": "a lump"}, "differs", "text from character 3 on: 'ump', not 'amp'"),  # one token is another one
        ({"text": "a lam"}, "differs", "text from character 5 on: '', not 'p'"),
        ({"text": "a lamp "}, "differs", "text from character 6 on: ' ', not ''"),
        ({"finish_reason": "length"}, "differs", "finish_reason length, not stop"),
        (
            {"usage": {"completion_tokens": 4}},
            "differs",
            "usage {'completion_tokens': 4}, not {'completion_tokens': 3}",
        ),
        ({"usage": {}}, "differs", "usage {}, not {'completion_tokens': 3}"),
        ({"error": "pi1: it is not back"}, "error", "error after 3 events: pi1: it is not back"),
        ({"is_over": False}, "hangs", "hangs after 3 events"),
    ],
)
def test_an_answer_that_is_not_that_of_the_calm_run_is_noticed(
    changes: dict[str, object], kind: str, text: str
) -> None:
    verdict = compare(_answer(), _answer(**changes))
    assert (verdict.kind, verdict.text) == (kind, text)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_an_arrangement_has_sixty_points_or_more_and_the_quick_ones_are_of_each_phase(arrangement: str) -> None:
    points = points_of(arrangement)
    assert len(points) >= 60 and len(set(points)) == len({str(point) for point in points}) == len(points)
    quick = quick_points_of(arrangement)
    assert len(quick) == len(set(quick)) == sum(QUICK.values()) and set(quick) < set(points)
    assert {point.phase for point in quick} == {point.phase for point in points}
    assert {point.victim for point in quick} == {0, 1}
    kills_both = [point for point in points if point.second and point.second.who == "other"]
    assert len(kills_both) > 50 if arrangement == BOTH else kills_both


def test_the_words_of_the_environment_choose_points() -> None:
    assert wanted_points([]) == {name: quick_points_of(name) for name in QUICK_ARRANGEMENTS}
    assert wanted_points(["all"]) == {name: points_of(name) for name in ARRANGEMENTS}
    assert wanted_points(["spare"]) == {"spare": points_of("spare")}
    assert wanted_points(["quick", "spare", "both"]) == {name: quick_points_of(name) for name in ("spare", "both")}
    with pytest.raises(AssertionError, match="use some of all, both"):
        wanted_points(["everything"])


def test_samples_are_half_greedy_and_half_drawn_with_a_seed() -> None:
    greedy = [sample for sample in SAMPLES if sample.body["temperature"] == 0]
    drawn = [sample for sample in SAMPLES if "seed" in sample.body]
    assert len(greedy) == len(drawn) == 3 and len({str(sample.body["prompt"]) for sample in SAMPLES}) == 6


def test_figures_of_a_receipt() -> None:
    lines: list[dict[str, object]] = [
        {"event": "ring_paused"},
        {"event": "ring_goes_on", "after_s": 1.5, "back_s": 1.2, "sequences": 3},
        {"event": "ring_has_replayed", "after_s": 1.5, "back_s": 1.2, "replayed_s": 2.5, "sequences": 3},
    ]
    assert pauses(lines) == [{"after_s": 1.5, "back_s": 1.2, "replayed_s": 2.5}]
    assert spread([3.0, 1.0, 8.0]) == {"count": 3, "median": 3.0, "max": 8.0}
    assert spread([]) == {"count": 0}
    assert slope([(0.0, 5.0), (1.0, 7.0), (2.0, 9.0)]) == pytest.approx(2.0)
    assert slope([(0.0, 5.0), (1.0, 7.0)]) is None


def test_the_time_until_a_loss_is_noticed_is_that_of_the_kill_before_it() -> None:
    losses = [("pi1", "01"), ("pi2", "02"), ("pi1", "09")]
    lines = [{"event": "node_lost", "node": n, "timestamp": f"1970-01-01T00:01:{s}Z"} for n, s in losses]
    assert noticed([("pi1", 60.5), ("pi2", 61.5), ("pi1", 65.0)], lines) == [0.5, 0.5, 4.0]
    assert noticed([("pi1", 60.5), ("pi1", 60.7), ("pi3", 64.0)], lines) == [0.3]
