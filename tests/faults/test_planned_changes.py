"""What an operator changes while answers run costs a pause, and not a token; the pauses are printed as medians.

With MDIQ_FAULTS=times (or all): ten rounds, with the 0.5B model; else one, with the small one.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.answers import Asked, Sample, compare
from tests.faults.conftest import HALF_B, SMALL, model_that_is_here
from tests.faults.lab import STARTER, Lab
from tests.faults.matrix import ANSWERS_S, CALM_S, lab_of
from tests.faults.points import A_HUNDRED_TOKENS, SURVIVORS, words_of_environment
from tests.faults.receipts import spread, write_receipt
from tests.faults.times import made_whole, until_at_hand

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3_600)]

ACT_AT = 6
"""The event of the first answer with which the operator acts."""
LOAD = [
    Sample(f"user {i}", {"prompt": f"{i}. {A_HUNDRED_TOKENS}", "max_tokens": 60, **draw, "ignore_eos": True})
    for i, draw in enumerate([{"temperature": 0}, {"temperature": 0.8, "seed": 7}] * 2)
]


def test_drains_a_memory_limit_and_a_key_cost_a_pause_and_not_a_token(tmp_path: Path) -> None:
    is_whole = not {"times", "all"}.isdisjoint(words_of_environment())
    pauses: dict[str, list[float]] = {}
    gaps: dict[str, list[float]] = {}
    rss: dict[str, list[int]] = {}  # of processes that live on through all rounds, after each
    troubles: list[str] = []
    with lab_of(SURVIVORS, tmp_path, model_that_is_here(HALF_B if is_whole else SMALL)) as lab:
        made_whole(lab)
        calm = Asked(lab.api, LOAD).answers(CALM_S)
        rings = lab.status()["rings_formed"]
        for _ in range(10 if is_whole else 1):
            for what, name in _changes(lab):
                until_at_hand(lab)
                since = lab.mark(STARTER)
                asked = Asked(lab.api, LOAD)
                asked.until_event(0, ACT_AT)
                _act(lab, what, name)
                found = asked.answers(ANSWERS_S)
                verdicts = [compare(was, answer) for was, answer in zip(calm, found, strict=True)]
                troubles += [f"{what} {name}: {each.kind}: {each.text}" for each in verdicts if each.kind != "same"]
                pauses.setdefault(what, []).extend(_pauses(lab, since))
                gaps.setdefault(what, []).append(max(answer.longest_gap_s for answer in found))
                assert lab.status()["rings_formed"] == rings, f"{what} {name}: it was formed anew"
                if what == "key":
                    lab.restart(name)
                    made_whole(lab)
                    rings = lab.status()["rings_formed"]  # where the wait until it is let in is cut short
            for node in lab.status()["nodes"][:2]:
                rss.setdefault(node["name"], []).append(node["rss_bytes"])
    medians = {what: {"pause_s": spread(pauses[what]), "gap_s": spread(gaps[what])} for what in pauses}
    values = {
        "what": "changes by an operator",
        "model": lab.model.name,
        "medians": medians,
        "rss_bytes": rss,
        "raw": [pauses, gaps],
    }
    path = write_receipt(f"changes-{lab.model.stem}", values, tmp_path)
    print(f"\n{medians}\nresident: {rss}\n{path}")  # noqa: T201
    assert not troubles, "\n".join(troubles)
    assert all(len(pauses[what]) >= len(gaps[what]) for what in gaps), "a change that no pause shows"


def _changes(lab: Lab) -> Iterator[tuple[str, str]]:
    for name in lab.workers:
        yield "drain", name
        yield "let in", name
    yield "memory", "of all"
    yield "key", lab.workers[1]


def _act(lab: Lab, what: str, name: str) -> None:
    match what:
        case "drain":
            lab.mdiq("drain", name)
        case "let in":
            lab.mdiq("drain", name, "--undo")
        case "memory":
            text = lab.file.read_text()
            more, less = "memory: 3G", "memory: 2900M"
            lab.file.write_text(text.replace(more, less) if more in text else text.replace(less, more))
            lab.mdiq("reload")
        case "key":
            lab.mdiq("keys", "--rotate", name)
            lab.mdiq("reload")
            for other in lab.workers:
                if other != name:
                    lab.units[other].signal(signal.SIGHUP)


def _pauses(lab: Lab, since: int) -> list[float]:
    """Return how long nothing was computed, each time until the first token after it."""
    lines = lab.said(STARTER, since)
    return [line["first_token_s"] for line in lines if line["event"] == "ring_has_replayed" and "first_token_s" in line]
