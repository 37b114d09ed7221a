"""Tokens a second before, without and after a node, beside what is predicted; and how others fare while many replay.

With MDIQ_FAULTS=times (or all): ten kills, with the 0.5B model; else one, with the small one. Figures are printed, and
kept as a receipt; that the answers are right is what is tested.
"""

import statistics
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.faults.answers import Asked, Sample, compare
from tests.faults.conftest import HALF_B, SMALL, model_that_is_here
from tests.faults.lab import STARTER, Lab
from tests.faults.matrix import CALM_S, MOMENT_S, lab_of
from tests.faults.points import A_HUNDRED_TOKENS, SURVIVORS, words_of_environment
from tests.faults.receipts import spread, write_receipt
from tests.faults.times import made_whole, until_at_hand

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3_600)]

USERS = 8
WINDOW_S = 8.0
ANSWER_TOKENS = 200
LOAD = [
    Sample(
        f"user {i}",
        {"prompt": f"{i}. {A_HUNDRED_TOKENS}", "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True},
    )
    for i in range(USERS)
]


def test_rates_before_without_and_after_a_node(tmp_path: Path) -> None:
    is_whole = not {"times", "all"}.isdisjoint(words_of_environment())
    found: dict[str, list[float]] = {}
    troubles: list[str] = []

    def note(what: str, value: float) -> None:
        found.setdefault(what, []).append(value)

    with lab_of(SURVIVORS, tmp_path, model_that_is_here(HALF_B if is_whole else SMALL)) as lab:
        made_whole(lab)
        calm = Asked(lab.api, LOAD).answers(CALM_S)
        for i in range(10 if is_whole else 1):
            names = made_whole(lab)
            until_at_hand(lab)
            note("whole", _rate(lab))
            since = lab.mark(STARTER)
            asked = Asked(lab.api, LOAD)
            asked.until_event(USERS - 1, 20)
            killed_s = time.monotonic()
            lab.kill(names[i % len(names)])
            lab.until_said(STARTER, "ring_has_replayed", {STARTER: since}, MOMENT_S)
            replayed_s = time.monotonic()
            answers = asked.answers(CALM_S)
            verdicts = [compare(was, answer) for was, answer in zip(calm, answers, strict=True)]
            troubles += [f"kill {i + 1}: {each.kind}: {each.text}" for each in verdicts if each.kind != "same"]
            before, during = _gaps([answer.events_s for answer in answers], killed_s, replayed_s)
            note("gap before", statistics.median(before))
            if during:
                note("gap of others while some replay", statistics.median(during))
            rate = _rate(lab)
            note("without one, of predicted", rate / lab.status()["pace"]["predicted_tokens_per_s"])
            made_whole(lab)
            note("back, of before", _rate(lab) / found["whole"][-1])
    figures = {what: spread(values) for what, values in found.items()}
    values = {"what": "throughput", "model": lab.model.name, "users": USERS, "medians": figures, "raw": found}
    path = write_receipt(f"throughput-{lab.model.stem}", values, tmp_path)
    print(f"\n{figures}\n{path}")  # noqa: T201
    assert not troubles, "\n".join(troubles)
    assert min(found["whole"]) > 0


def _rate(lab: Lab) -> float:
    """Return the tokens a second of all users together, in the midst of their answers."""
    asked = Asked(lab.api, LOAD)
    asked.until_event(USERS - 1, 20)
    begun_s = time.monotonic()
    num_before = sum(map(len, asked.events_s()))
    while time.monotonic() < begun_s + WINDOW_S and not asked.is_any_over():
        time.sleep(0.05)
    lasted_s, num_after = time.monotonic() - begun_s, sum(map(len, asked.events_s()))
    asked.answers(CALM_S)
    return (num_after - num_before) / lasted_s


def _gaps(events_s: list[list[float]], killed_s: float, replayed_s: float) -> tuple[list[float], list[float]]:
    """Return the times between tokens before a kill, and those of answers that go on while others still replay."""
    before = [b - a for times in events_s for a, b in pairwise(times) if b < killed_s]
    during = [b - a for times in events_s for a, b in pairwise(times) if killed_s + 0.3 < a and b <= replayed_s]
    return before, during
