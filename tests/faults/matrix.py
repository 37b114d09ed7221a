"""Plays kill points on one ring, compares the answers with those of a calm run, and keeps the counts."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.faults.answers import Answer, Asked, compare
from tests.faults.lab import STARTER, Lab, serving_of
from tests.faults.points import ARRANGEMENTS, LONG_PROMPT, RESTART, SAMPLES, SPARE, STEPS, Point, Second, points_of
from tests.faults.receipts import PAUSE_STEPS, commit, noticed, pauses, spread, write_receipt

ANSWERS_S = 120.0  # an answer that is not there after it hangs
CALM_S = 240.0
CALM_S = 240.0
MOMENT_S = 45.0  # the moment of a kill comes within it
WHOLE_S = 45.0
RETURNS_S = 14.0
"""A Ring takes a node in again twice as late each time: from the second time on, forming it anew is sooner."""
POLL_S = 0.002

DOES_NOT_SHOW = [
    "Losses of packets and links that are cut: all nodes share loopback, which loses nothing.",
    "A device without power: the kernel of a killed process closes its connections, which the others see at once.",
    "The loss of the Starter: it is never killed.",
    "Devices unlike each other: all nodes have the same kind of CPU, and rounding may differ between kinds.",
    "Token ids: the API gives text, finish_reason and counts of tokens, and those are compared.",
    "The exact chunk of a prompt: a kill goes by the victim's CPU time, in eighths of what the prompts took calmly.",
    "The exact instant within a phase: a kill comes some milliseconds after the event or log line that it follows.",
    "Reuse of cached prompts: prefix_reuse is off here, so that each point computes its prompts (the soak has it on).",
    "Rare races: each point is played once.",
]


@dataclass(frozen=True, slots=True)
class Killed:
    """A node that was killed, when, and the last event in its log."""

    node: str
    at_s: float
    last_words: str


@dataclass(slots=True)
class Played:
    """A point that was played.

    noticed_s: how long after it the Starter has logged the loss of a node that it had.
    verdicts: how many answers are the same, differ, are errors, hang. troubles: those that are not the same, in words.
    missed: why a kill had no moment, else empty. is_late: a kill in a prompt came with its first token. num_running:
    answers that ran at the first kill.
    """

    point: Point
    killed: list[Killed] = field(default_factory=list)
    noticed_s: list[float] = field(default_factory=list)
    verdicts: dict[str, int] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)
    missed: str = ""
    is_late: bool = False
    pauses: list[dict[str, float]] = field(default_factory=list)
    num_refused: int = 0
    num_running: int = 0
    longest_gap_s: float = 0.0
    is_formed_anew: bool = False
    seconds: float = 0.0


class Matrix:
    """One ring of an arrangement, and the points that were played on it. lab: the ring, which is entered."""

    def __init__(self, lab: Lab, arrangement: str) -> None:
        self.lab = lab
        self.arrangement = arrangement
        self.played: list[Played] = []
        self.commit = commit()  # before anybody changes the tree while it runs
        self.calm: list[Answer] = []
        self._prompt_cpu_s: list[float] = []
        self._serving: list[str] = []  # when the point began

    def run_calmly(self) -> None:
        """Learn the expected answers, twice: a difference in a calm ring is not a recovery's fault."""
        workers = serving_of(self.lab.until_whole(CALM_S))
        self.calm = Asked(self.lab.api, SAMPLES).answers(CALM_S)
        before = [_cpu_s(self.lab, name) for name in workers]
        asked = Asked(self.lab.api, SAMPLES)
        asked.until_event(LONG_PROMPT, 1)
        self._prompt_cpu_s = [_cpu_s(self.lab, name) - was for name, was in zip(workers, before, strict=True)]
        again = asked.answers(CALM_S)
        verdicts = [compare(first, second) for first, second in zip(self.calm, again, strict=True)]
        assert all(verdict.kind == "same" for verdict in verdicts), f"two calm runs differ: {verdicts}"
        few = [sample.name for sample, answer in zip(SAMPLES, self.calm, strict=True) if answer.num_events < STEPS[-1]]
        assert not few, f"too few events to kill at step {STEPS[-1]}: {few}"

    def play(self, point: Point) -> Played:
        """Kill as the point says, wait for all answers, and have the ring whole again."""
        lab, played = self.lab, Played(point)
        self.played.append(played)
        begun_s = time.monotonic()
        self._serving = self._made_whole(played)
        victim = self._serving[point.victim]
        since = lab.marks()
        try:
            if point.when.what == "forming":
                self._kill_while_forming(played, victim, since)
            asked = Asked(lab.api, SAMPLES)
            try:
                if point.when.what != "forming":
                    self._kill_while_answering(played, victim, asked, since)
            finally:
                self._compare(played, asked.answers(ANSWERS_S))
        except TimeoutError as error:
            played.missed = str(error)
        self._made_whole(played)
        lines = lab.said(STARTER, since[STARTER])
        played.pauses = pauses(lines)
        played.noticed_s = noticed([(killed.node, killed.at_s) for killed in played.killed], lines)
        played.seconds = round(time.monotonic() - begun_s, 1)
        return played

    def _kill_while_forming(self, played: Played, victim: str, since: Mapping[str, int]) -> None:
        lab, line = self.lab, played.point.when.line
        lab.restart(STARTER)
        lab.until_said(STARTER if line == "api_listens" else victim, line, since, MOMENT_S)
        self._kill(played, victim)
        lab.start(victim)
        lab.until_whole()

    def _kill_while_answering(self, played: Played, victim: str, asked: Asked, since: Mapping[str, int]) -> None:
        lab, when, second = self.lab, played.point.when, played.point.second
        if when.what == "share":
            self._until_worked(played, victim, when.number / 8 * self._prompt_cpu_s[played.point.victim], asked)
        elif when.what == "step":
            asked.until_event(when.sample, when.number)
        else:
            asked.until_over(when.sample)
        before = lab.units[victim].num_starts
        marks = lab.marks()
        played.num_running = asked.num_running()
        self._kill(played, victim)
        if second is not None and not second.line:
            self._kill_second(played, second, victim, before, marks)
        lab.until_said(STARTER, "ring_paused", since, MOMENT_S)
        if second is not None and second.line:
            self._kill_second(played, second, victim, before, marks)

    def _kill_second(
        self, played: Played, second: Second, victim: str, num_starts: int, marks: Mapping[str, int]
    ) -> None:
        lab = self.lab
        others = [name for name in lab.names[1:] if name != victim]
        if second.who == "same":
            target = victim
            lab.units[victim].until_started(num_starts)
            if second.line != "started":
                lab.until_said(victim, second.line, marks, MOMENT_S)
        elif second.who == "taker":
            target = lab.until_said(others, second.line, marks, MOMENT_S)
        else:
            target = next(name for name in self._serving if name != victim)
            if second.line:
                lab.until_said(STARTER, second.line, marks, MOMENT_S)
        self._kill(played, target)

    def _kill(self, played: Played, name: str) -> None:
        at_s = time.time()
        self.lab.kill(name)
        said = self.lab.said(name)  # a restart loop waits before it starts the next process
        played.killed.append(Killed(name, at_s, said[-1]["event"] if said else ""))

    def _until_worked(self, played: Played, name: str, cpu_s: float, asked: Asked) -> None:
        """Wait until a node has worked for so long, or the long prompt's first token is there: it was late then."""
        before_s, end_s = _cpu_s(self.lab, name), time.monotonic() + MOMENT_S
        while _cpu_s(self.lab, name) - before_s < cpu_s and not played.is_late:
            if time.monotonic() > end_s:
                raise TimeoutError(f"{name} has not worked for {cpu_s:.2f} s on the prompts within {MOMENT_S:g} s")
            played.is_late = asked.num_events(LONG_PROMPT) > 0
            time.sleep(POLL_S)

    def _compare(self, played: Played, found: Sequence[Answer]) -> None:
        for sample, calm, answer in zip(SAMPLES, self.calm, found, strict=True):
            verdict = compare(calm, answer)
            played.verdicts[verdict.kind] = played.verdicts.get(verdict.kind, 0) + 1
            if verdict.kind != "same":
                played.troubles.append(f"{sample.name} {verdict.kind}: {verdict.text}")
        played.num_refused = sum(answer.num_refused for answer in found)
        played.longest_gap_s = round(max((answer.longest_gap_s for answer in found), default=0.0), 3)

    def _made_whole(self, played: Played) -> list[str]:
        """Bring back what is down, or form the ring anew if that is not enough; return the workers that serve."""
        lab = self.lab
        for name in lab.names:
            lab.start(name)
        try:
            return serving_of(lab.until_whole(WHOLE_S if self.arrangement == RESTART else RETURNS_S))
        except TimeoutError:
            played.is_formed_anew = True
            lab.restart(STARTER)
            return serving_of(lab.until_whole())

    # The receipt

    def counts(self) -> dict[str, Any]:
        """Return the raw counts: of points and answers, and of what went wrong."""
        kinds = Counter(kind for played in self.played for kind in Counter(played.verdicts).elements())
        lengths = [length for played in self.played for length in played.pauses]
        done = [played for played in self.played if not played.missed]
        return {
            "points": len(done),
            "points_of_the_arrangement": len(points_of(self.arrangement)),
            "points_by_phase": dict(Counter(played.point.phase for played in done)),
            "points_without_a_moment": len(self.played) - len(done),
            "kills_in_prompts_that_came_with_the_first_token": sum(played.is_late for played in done),
            "handshake_kills_before_epoch_began": sum(
                played.point.phase == "handshake" and played.killed[-1].last_words == "stage_ready" for played in done
            ),
            "kills": sum(len(played.killed) for played in self.played),
            "answers": kinds.total(),
            "same": kinds["same"],
            "running_when_killed": spread(
                [played.num_running for played in done if played.point.when.what != "forming"]
            ),
            "hangs": kinds["hangs"],
            "differing": kinds["differs"],
            "errors": kinds["error"],
            "asked_again_after_503": sum(played.num_refused for played in self.played),
            "rings_formed_anew_by_the_lab": sum(played.is_formed_anew for played in self.played),
            "tracebacks": self.lab.tracebacks(),
            "pauses_s": {name: spread([each[name] for each in lengths if name in each]) for name in PAUSE_STEPS},
            "noticed_s": spread([noticed_s for played in self.played for noticed_s in played.noticed_s]),
            "longest_gap_of_a_stream_s": spread([played.longest_gap_s for played in done]),
        }

    def write(self, fallback: Path) -> Path:
        """Write the receipt; return where it is."""
        values = {
            "what": "kill matrix",
            "commit": self.commit,
            "model": self.lab.model.name,
            "arrangement": self.arrangement,
            "arrangement_in_words": ARRANGEMENTS[self.arrangement],
            "nodes": self.lab.names,
            "threads_per_node": 1,
            "samples": [{"name": sample.name, **_shown(sample.body)} for sample in SAMPLES],
            "calm": [
                {"finish_reason": answer.finish_reason, "events": answer.num_events, **answer.usage}
                for answer in self.calm
            ],
            "counts": self.counts(),
            "does_not_show": DOES_NOT_SHOW,
            "played": [asdict(played) | {"point": str(played.point)} for played in self.played],
        }
        return write_receipt(f"kill-matrix-{self.lab.model.stem}-{self.arrangement}", values, fallback)


def lab_of(arrangement: str, folder: Path, model: Path) -> Lab:
    """Return the ring of an arrangement, which is not entered yet."""
    return Lab(
        folder,
        model,
        num_spares=int(arrangement == SPARE),
        keeps_up=arrangement == RESTART,
        ring={"prefix_reuse": False},
    )


def _shown(body: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in body.items() if key != "prompt"}


def _cpu_s(lab: Lab, name: str) -> float:
    times = psutil.Process(lab.units[name].pid).cpu_times()
    return float(times.user + times.system)
