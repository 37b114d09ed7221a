"""A ring under requests that keep coming while a seed draws faults; what its processes take meanwhile."""

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from mdiq.runtime.recovery import MAX_RETURN_S
from tests.faults.answers import Answer, Asked, compare
from tests.faults.lab import FORMED_S, STARTER, Lab
from tests.faults.points import SAMPLES
from tests.faults.receipts import PAUSE_STEPS, pauses, slope, spread

ANSWERS_S = 180.0
NUM_CLIENTS = 3
SAMPLE_S = 1.0
SETTLED_S = 10.0  # a process takes its weights up to here; its memory is looked at from then on
SHORT_FREEZE_S = 2.0  # less than ring.silence
LONG_FREEZE_S = 8.0  # more than ring.silence


@dataclass(frozen=True, slots=True)
class Taken:
    """What a process takes: descriptors and threads."""

    descriptors: int
    threads: int


@dataclass(slots=True)
class Told:
    """What came out. faults: when they were, in seconds, and what was done."""

    verdicts: Counter[str] = field(default_factory=Counter)
    troubles: list[str] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)
    num_refused: int = 0
    gaps_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Soak:
    """Runs for so many seconds, with a fault about every ``fault_s``; the same seed draws the same faults.

    lab: the ring, which is entered; its workers are under a restart loop.
    """

    def __init__(self, lab: Lab, *, seed: int, seconds: float, fault_s: float) -> None:
        self.lab = lab
        self.told = Told()
        self.before: Taken | None = None
        self.after: Taken | None = None
        self._seed, self._seconds, self._fault_s = seed, seconds, fault_s
        self._calm: list[Answer] = []
        self._memory: dict[int, list[tuple[float, float]]] = {}  # pid: seconds, resident bytes
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._begun_s = 0.0

    def run(self) -> None:
        """Learn the answers, run, and wait until the ring is whole again."""
        self.lab.until_whole()
        self._calm = Asked(self.lab.api, SAMPLES).answers(ANSWERS_S)
        self.before = _taken(self.lab.units[STARTER].pid)
        self._begun_s = time.monotonic()
        clients = [threading.Thread(target=self._guarded, args=(self._ask, i)) for i in range(NUM_CLIENTS)]
        threads = [*clients, threading.Thread(target=self._guarded, args=(self._do_harm,))]
        for thread in threads:
            thread.start()
        try:
            while self._now_s() < self._seconds:
                self._look_at_memory()
                self._is_over.wait(SAMPLE_S)
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join(ANSWERS_S + 60)
        # After so many losses the ring takes nodes in as late as it ever does.
        self.lab.until_whole(MAX_RETURN_S + FORMED_S)
        self.after = _taken(self.lab.units[STARTER].pid)

    def summary(self) -> dict[str, Any]:
        """Return the raw counts, and how much memory each process took and gained."""
        lines = self.lab.said(STARTER)
        lengths = pauses(lines)
        return {
            "seconds": self._seconds,
            "answers": self.told.verdicts.total(),
            **{kind: self.told.verdicts[kind] for kind in ("same", "differs", "error", "hangs")},
            "asked_again_after_503": self.told.num_refused,
            "faults": dict(Counter(what for _, what in self.told.faults)),
            "pauses_s": {name: spread([each[name] for each in lengths if name in each]) for name in PAUSE_STEPS},
            "rings_formed": sum(line["event"] == "ring_formed" for line in lines),
            "rings_failed": sum(line["event"] == "ring_failed" for line in lines),
            "longest_gap_of_a_stream_s": spread(self.told.gaps_s),
            "starter_before": _shown(self.before),
            "starter_after": _shown(self.after),
            "processes": [self._process(pid) for pid in self._memory],
            "tracebacks": self.lab.tracebacks(),
        }

    def _process(self, pid: int) -> dict[str, Any]:
        points = self._memory[pid]
        grown = slope([point for point in points if point[0] >= points[0][0] + SETTLED_S])
        later = slope(points[len(points) // 2 :])
        return {
            "node": self.lab.pids[pid],
            "seconds": round(points[-1][0] - points[0][0], 1),
            "peak_rss_bytes": int(max(rss for _, rss in points)),
            "rss_bytes_per_minute": None if grown is None else round(60 * grown),
            "rss_bytes_per_minute_of_second_half": None if later is None else round(60 * later),
        }

    def _guarded(self, work: Callable[..., None], *arguments: int) -> None:
        try:
            work(*arguments)
        except Exception as error:  # of a thread: the test tells of it
            with self._lock:
                self.told.failures.append(repr(error))

    def _ask(self, client: int) -> None:
        """Ask one request after the other, and compare each answer."""
        draws = random.Random(f"{self._seed} client {client}")
        while not self._is_over.is_set():
            i = draws.randrange(len(SAMPLES))
            [answer] = Asked(self.lab.api, SAMPLES[i : i + 1]).answers(ANSWERS_S)
            verdict = compare(self._calm[i], answer)
            with self._lock:
                self.told.verdicts[verdict.kind] += 1
                self.told.num_refused += answer.num_refused
                self.told.gaps_s.append(answer.longest_gap_s)
                if verdict.kind != "same":
                    text = f"{self._now_s():.1f} s: {SAMPLES[i].name} {verdict.kind}: {verdict.text}"
                    self.told.troubles.append(text)

    def _do_harm(self) -> None:
        """Do one fault after the other, every kind before any of them again."""
        draws = random.Random(f"{self._seed} faults")
        lab, due_s = self.lab, 0.0
        faults: Sequence[tuple[str, Callable[[str], None]]] = (
            ("kill", lab.kill),
            ("kill two at once", lambda name: _kill_two(lab, name)),
            (f"freeze for {SHORT_FREEZE_S:g} s", lambda name: lab.freeze(name, SHORT_FREEZE_S)),
            (f"freeze for {LONG_FREEZE_S:g} s", lambda name: lab.freeze(name, LONG_FREEZE_S)),
            ("restart", lab.restart),
        )
        drawn: list[tuple[str, Callable[[str], None]]] = []
        while True:
            due_s += self._fault_s * draws.uniform(0.75, 1.25)
            drawn = drawn or draws.sample(faults, len(faults))
            (what, act), name = drawn.pop(), draws.choice(lab.names[1:])
            if due_s > self._seconds or self._is_over.wait(max(due_s - self._now_s(), 0)):
                return
            lab.units[name].start()  # it may be on its way up from the last fault
            with self._lock:
                self.told.faults.append((round(self._now_s(), 1), what))
            act(name)

    def _look_at_memory(self) -> None:
        for name in self.lab.names:
            if self.lab.units[name].is_on:
                pid = self.lab.units[name].pid
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just been killed
                    rss = psutil.Process(pid).memory_info().rss
                    self._memory.setdefault(pid, []).append((self._now_s(), rss))

    def _now_s(self) -> float:
        return time.monotonic() - self._begun_s


def _kill_two(lab: Lab, name: str) -> None:
    names = lab.names[1:]
    for each in (name, names[(names.index(name) + 1) % len(names)]):
        lab.kill(each)


def _taken(pid: int) -> Taken:
    process = psutil.Process(pid)
    return Taken(process.num_fds(), process.num_threads())


def _shown(taken: Taken | None) -> dict[str, int]:
    return {} if taken is None else {"descriptors": taken.descriptors, "threads": taken.threads}
