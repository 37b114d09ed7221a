"""How long a client waits when a node is killed while it is answered: the steps of the pause, over several kills."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.answers import Asked, Sample, compare
from tests.faults.lab import STARTER, Lab, serving_of
from tests.faults.matrix import ANSWERS_S, CALM_S, WHOLE_S
from tests.faults.points import SEVERAL_HUNDRED_TOKENS
from tests.faults.receipts import noticed, pauses, spread, write_receipt

KILL_AT = 6
"""The event of the answer with which a node is killed."""
AT_HAND_S = 120.0
CHAT = Sample(
    "about 500 tokens of context",
    {"prompt": SEVERAL_HUNDRED_TOKENS, "max_tokens": 40, "temperature": 0, "ignore_eos": True},
)


@dataclass(slots=True)
class Times:
    """What was measured, in seconds; a list has one figure for each kill.

    prefill: of a calm run, until its first event. noticed: from the kill to the log's line. loaded: what the nodes took
    to load. replayed: from the ring's beginning again to the next token. gap: what the client saw, between two events.
    troubles: answers that are not those of the calm run, in words.
    """

    prompt_tokens: int = 0
    prefill: list[float] = field(default_factory=list)
    noticed: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)
    replayed: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def medians(self) -> dict[str, Any]:
        """Return count, median and maximum of each."""
        names = ("prefill", "noticed", "loaded", "replayed", "gap")
        return {f"{name}_s": spread(getattr(self, name)) for name in names}


def measure_times(lab: Lab, num_kills: int) -> Times:
    """Kill a worker of a whole ring in mid-answer, one after the other, so often."""
    times = Times()
    serving_of(lab.until_whole(CALM_S))
    for _ in range(2):  # the first one finds cold caches
        begun_s = time.monotonic()
        asked = Asked(lab.api, [CHAT])
        asked.until_event(0, 1)
        times.prefill = [time.monotonic() - begun_s]
        (calm,) = asked.answers(CALM_S)
    times.prompt_tokens = calm.usage["prompt_tokens"]
    for i in range(num_kills):
        victim = made_whole(lab)[i % len(lab.workers)]
        until_at_hand(lab)
        since = lab.mark(STARTER)
        asked = Asked(lab.api, [CHAT])
        asked.until_event(0, KILL_AT)
        killed_s = time.time()
        lab.kill(victim)
        (answer,) = asked.answers(ANSWERS_S)
        verdict = compare(calm, answer)
        if verdict.kind != "same":
            times.troubles.append(f"kill {i + 1}, {victim}: {verdict.kind}: {verdict.text}")
        lines = lab.said(STARTER, since)
        times.noticed += noticed([(victim, killed_s)], lines)
        for pause in pauses(lines)[:1]:
            times.loaded.append(pause["loaded_s"] - pause["back_s"])
            times.replayed.append(pause.get("first_token_s", pause["after_s"]) - pause["after_s"])
        times.gap.append(answer.longest_gap_s)
    return times


def write_times(lab: Lab, arrangement: str, times: Times, fallback: Path) -> Path:
    """Write a receipt; return where it is."""
    values = {
        "what": "times of a pause",
        "model": lab.model.name,
        "arrangement": arrangement,
        "prompt_tokens": times.prompt_tokens,
        "killed_at_event": KILL_AT,
        "medians": times.medians(),
        "raw": {name: getattr(times, name) for name in ("noticed", "loaded", "replayed", "gap")},
        "does_not_show": ["Links: all nodes share loopback.", "Other load: one request runs."],
    }
    return write_receipt(f"times-{lab.model.stem}-{arrangement}", values, fallback)


def made_whole(lab: Lab) -> list[str]:
    """Bring back what is down; return the workers that serve. A ring takes a node in again ever less often."""
    for name in lab.names:
        lab.start(name)
    try:
        return serving_of(lab.until_whole(WHOLE_S))
    except TimeoutError:
        lab.restart(STARTER)
        return serving_of(lab.until_whole())


def until_at_hand(lab: Lab) -> None:
    """Wait until nodes have the layers on their disks that they may have to take over."""
    end_s = time.monotonic() + AT_HAND_S
    while time.monotonic() < end_s:
        nodes = lab.status()["nodes"][1:]
        wanted = {layer for node in nodes if "layers" in node for layer in range(*node["layers"])}
        if all(wanted <= {*node.get("on_disk", ())} for node in nodes):
            return
        time.sleep(0.5)
    raise TimeoutError(f"the nodes lack layers of others after {AT_HAND_S:g} s: {nodes}")
