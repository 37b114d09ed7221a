"""The kill points of each arrangement: which node is killed, at which moment of the answers, and which one after it."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, product

from tests.faults.answers import Sample

RESTART, SPARE, SURVIVORS, BOTH = "restart", "spare", "survivors", "both"
ARRANGEMENTS: Mapping[str, str] = {
    RESTART: "2 workers under a restart loop: a killed node is back by itself after about a second",
    SPARE: "2 workers and a spare: a killed node is started again when all answers are there",
    SURVIVORS: "2 workers: a killed node is started again when all answers are there",
    BOTH: "2 workers, both are killed: they are started again when all answers are there",
}
QUICK_ARRANGEMENTS = (SPARE, SURVIVORS)
QUICK = {"load": 1, "handshake": 1, "prefill": 1, "decode": 2, "release": 1, "recovery": 1}
VICTIMS = (0, 1)
EIGHTHS = range(1, 8)
STEPS = (1, 2, 7)
MID_STEP = 2, 2  # of which sample, and the step: where a first kill goes whose second one counts

SEVERAL_HUNDRED_TOKENS = "The log of the night shift. " + " ".join(
    f"Machine {i} made {7 * i % 53 + 12} parts, {3 * i % 5} of them bad, and stood still for {11 * i % 37} minutes."
    for i in range(1, 19)
)
A_HUNDRED_TOKENS = (
    "A lighthouse keeper writes to his sister. Dear Anna, the storm has lasted for three days now, and the supply boat "
    "could not land. I have enough oil for the lamp, and flour, but the coffee is gone. At night I listen to the sea "
    "and think of our father, who taught us the names of the winds. Yesterday I saw a ship"
)
GREEDY = {"temperature": 0}
SAMPLES = (
    Sample("long-prompt", {"prompt": SEVERAL_HUNDRED_TOKENS, "max_tokens": 24, **GREEDY, "ignore_eos": True}),
    Sample("short", {"prompt": "The capital of France is", "max_tokens": 12, **GREEDY}),
    Sample("long-answer", {"prompt": "Once upon a time", "max_tokens": 56, **GREEDY, "ignore_eos": True}),
    Sample(
        "drawn-hot",
        {"prompt": "My favourite tools are", "max_tokens": 16, "temperature": 1.3, "top_k": 40, "seed": 11},
    ),
    Sample("drawn", {"prompt": A_HUNDRED_TOKENS, "max_tokens": 32, "temperature": 0.8, "seed": 7}),
    Sample(
        "drawn-stop",
        {
            "prompt": "When the rain stopped,",
            "max_tokens": 60,
            "temperature": 0.9,
            "top_p": 0.9,
            "seed": 13,
            "stop": ".",
        },
    ),
)
LONG_PROMPT = 0


@dataclass(frozen=True, slots=True)
class When:
    """A moment.

    what: "forming" (a log line of the victim, in a ring that forms before anything is asked), "share" (of the work on
    the prompts, in eighths, by the victim's CPU time), "step" (number, of a sample's events), "end" (of a sample).
    """

    what: str
    number: int = 0
    sample: int = 0
    line: str = ""


@dataclass(frozen=True, slots=True)
class Second:
    """A second kill. who: "same" (when it is back), "other", or "taker" (whichever node first logs the line).

    line: of that node's log, after the first kill; "started": as soon as it has a process; "" at once; ring_paused and
    ring_goes_on: of the Starter's.
    """

    who: str
    line: str


@dataclass(frozen=True, slots=True)
class Point:
    """One kill, or two. victim: its place among the workers that serve."""

    phase: str
    victim: int
    when: When
    second: Second | None = None

    def __str__(self) -> str:
        when, second = self.when, self.second
        first = {
            "forming": f"forming-{when.line}",
            "share": f"{when.number}-of-8",
            "step": f"step-{when.number}-of-{when.sample}",
            "end": f"end-of-{when.sample}",
        }[when.what]
        return f"{self.phase}-{first}-kills-{self.victim}" + (f"-then-{second.who}-{second.line}" if second else "")


def points_of(arrangement: str) -> list[Point]:
    """Return all kill points of an arrangement; no two are equal."""
    return list(_points(arrangement))


def quick_points_of(arrangement: str) -> list[Point]:
    """Return some of them, of each phase."""
    found: list[Point] = []
    for phase, count in QUICK.items():
        for i in range(count):  # from all parts of the list, with one victim and the other
            victim = VICTIMS[(i + len(found)) % 2]
            those = [p for p in points_of(arrangement) if (p.phase, p.victim) == (phase, victim)]
            found.append(those[(2 * i + 1) * len(those) // (2 * count)])
    return found


def wanted_points(words: Collection[str]) -> dict[str, list[Point]]:
    """Return the points to play, by arrangement, from the words of MDIQ_FAULTS.

    No word: the quick selection. "all": every point of every arrangement. The name of an arrangement: every point of
    it, or with "quick" the quick selection of it. "times" alone: none; see test_times.
    """
    known = {*ARRANGEMENTS, "all", "quick", "times"}
    assert known.issuperset(words), f"MDIQ_FAULTS: {', '.join(words)}: use some of {', '.join(sorted(known))}"
    if {*words} == {"times"}:
        return {}
    names = [name for name in ARRANGEMENTS if name in words]
    is_quick = "quick" in words or not words
    names = names or list(QUICK_ARRANGEMENTS if is_quick else ARRANGEMENTS)
    return {name: (quick_points_of if is_quick else points_of)(name) for name in names}


def words_of_environment() -> list[str]:
    return [word for word in os.environ.get("MDIQ_FAULTS", "").replace(",", " ").split() if word]


def _points(arrangement: str) -> Iterator[Point]:
    comes_back = arrangement == RESTART
    seconds: Iterator[Second | None] = cycle([None])
    if arrangement == BOTH:
        seconds = cycle([Second("other", line) for line in ("", "ring_paused", "ring_goes_on")])
    step = When("step", MID_STEP[1], MID_STEP[0])
    prompt = When("share", 4)

    who = "same" if comes_back else "taker"
    for when, victim in product((step, prompt), VICTIMS):
        for line in ("started", "waits_for_starter", "weights_here") if comes_back else ("weights_here",):
            if arrangement != BOTH:
                yield Point("load", victim, when, Second(who, line))
        if arrangement != BOTH:
            yield Point("handshake", victim, when, Second(who, "stage_ready"))
    for victim in VICTIMS:
        for line in ("api_listens", "weights_here"):
            yield Point("load", victim, When("forming", line=line))
        yield Point("handshake", victim, When("forming", line="stage_ready"))

    for number, victim in product(EIGHTHS, VICTIMS):
        yield Point("prefill", victim, When("share", number), next(seconds))
    for number, sample, victim in product(STEPS, range(len(SAMPLES)), VICTIMS):
        yield Point("decode", victim, When("step", number, sample), next(seconds))
    for sample, victim in product(range(len(SAMPLES)), VICTIMS):
        yield Point("release", victim, When("end", sample=sample), next(seconds))

    lines: Sequence[str] = ("ring_paused", "ring_goes_on") if arrangement != BOTH else ("ring_paused",)
    for when, line, victim in product((step, prompt), lines, VICTIMS):
        yield Point("recovery", victim, when, Second("other", line))
