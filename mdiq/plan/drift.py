"""Whether the Nodes of a serving Ring take as long as they measured, and when another Plan is worth a change.

Theory. A Node measures a few forwards, alone, and perhaps while its device is busy. While the Ring serves, it counts
all of them (core/work.py). So every window, a minute of load, gives each Node

    ratio = seconds that its forwards took / seconds that they take by what it measured
    factor = ratio / c, where c is the number nearest to 1 between the smallest and the largest ratio of the Ring

All Nodes run the same tokens. What their ratios have in common is the load's (long contexts, for example): c takes it
out, since it is no reason to move Layers. So a factor compares a Node with the others of its Ring, and a Ring of one
has none.

The best Plan by the mean factors of the newest windows is worth a change if each of these windows, by its own factors,
predicts GAIN times the rate of the present Plan. So one minute without a gain delays it, and figures that vary about
those of the Plan do not change it. STEADY windows are longer than what comes and goes: an update, a backup, a fan.
FIRST are enough where a Node has never been seen under load: what it measured alone is doubted more than that.

After a change the next one waits, and twice as long each time. So whatever the figures do, there are at most 8 changes
on the first day, and one on each later day.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mdiq.core.work import Work

WINDOW_S = 60.0
MAX_WINDOW_S = 300.0  # else this is no load, and a device that rests most of the time is slower at first
MIN_WORK_S = 2.0  # of each Node in a window: some hundred forwards, or 20 periods of a CPU quota
FIRST, STEADY = 3, 8  # windows
MAX_AGE_S = 3_600.0  # of the oldest of them
GAIN = 1.15  # predictions are right to about a tenth, and a change costs a pause
MIN_CHANGE_S, MAX_CHANGE_S = 600.0, 86_400.0  # from a change to the next
MAX_RATIO = 50.0
SHOWN = 1.25  # a factor that is worth an operator's attention

Factors = Mapping[str, float]
"""By Node: how many times as long its Layers take, beside the other Nodes of its Ring."""
NamedSplit = Mapping[str, int]
"""Layers of each Node that takes part."""


class PlansByLoad(Protocol):
    """Plans of one topology by factors."""

    def best(self, factors: Factors) -> NamedSplit | None:
        """Return the best split that may be tried, or None."""
        ...

    def value(self, split: NamedSplit, factors: Factors) -> float | None:
        """Return the rate that is predicted of a split, or None if there is no prediction."""
        ...


@dataclass(frozen=True, slots=True)
class BetterPlan:
    """A split that is worth a change, why, and the rates that are predicted of it and of the present one."""

    split: NamedSplit
    factors: Factors
    value: float
    present_value: float


@dataclass(frozen=True, slots=True)
class _Begin:
    """What the Nodes had computed at the beginning of a window. counted: changes when they count anew."""

    at_s: float
    counted: object
    works: Mapping[str, Work]


@dataclass(frozen=True, slots=True)
class _Window:
    stop_s: float
    factors: Factors


class Drift:
    """The windows of one topology's Ring, and its changes."""

    def __init__(self) -> None:
        self._begin: _Begin | None = None
        self._windows: deque[_Window] = deque(maxlen=STEADY)
        self._not_before_s = -math.inf
        self._pause_s = MIN_CHANGE_S

    def observe(
        self, now: float, counted: object, works: Mapping[str, Work], work_s: Callable[[str, Work], float]
    ) -> bool:
        """Take in what all Nodes of the Ring have computed so far; return whether a window has ended.

        counted: any value that is another one when the Nodes have begun to count anew. work_s: returns the seconds that
        Work of a Node takes by what it measured alone.
        """
        begin, self._begin = self._begin, _Begin(now, counted, works)
        if begin is None or begin.counted != counted or begin.works.keys() != works.keys() or len(works) < 2:
            return False
        done = {name: more for name, work in works.items() if (more := work.since(begin.works[name])) is not None}
        if len(done) < len(works):
            return False
        measured_s = {name: work_s(name, work) for name, work in done.items()}
        if now - begin.at_s < WINDOW_S or min(measured_s.values()) < MIN_WORK_S:
            if now - begin.at_s < MAX_WINDOW_S:
                self._begin = begin
            return False
        ratios = {
            name: min(max(done[name].forward_s / time_s, 1 / MAX_RATIO), MAX_RATIO)
            for name, time_s in measured_s.items()
        }
        common = min(max(1.0, min(ratios.values())), max(ratios.values()))
        if self._windows and self._windows[-1].factors.keys() != ratios.keys():
            self._windows.clear()  # other Nodes have other things in common
        self._windows.append(_Window(now, {name: ratio / common for name, ratio in ratios.items()}))
        return True

    def factors(self, now: float, *, is_doubted: bool) -> Factors | None:
        """Return the mean factors of the newest windows, or None before there are enough.

        is_doubted: one of the Nodes has never been seen under load.
        """
        windows = self._newest(now, is_doubted=is_doubted)
        return _mean(windows) if windows else None

    def better(self, now: float, present: NamedSplit, plans: PlansByLoad, *, is_doubted: bool) -> BetterPlan | None:
        """Return the Plan that is worth a change now, or None."""
        windows = self._newest(now, is_doubted=is_doubted)
        if not windows or not self.may_change(now):
            return None
        factors = _mean(windows)
        split = plans.best(factors)
        if split is None or split == present:
            return None
        # A Node that is left out shows nothing any more: some minutes are not enough for that.
        if is_doubted and not present.keys() <= split.keys():
            return None

        def found(by: Factors) -> BetterPlan | None:
            value, present_value = plans.value(split, by) or 0.0, plans.value(present, by) or math.inf
            return BetterPlan(split, by, value, present_value) if value >= GAIN * present_value else None

        better = found(factors)
        return better if better is not None and all(found(window.factors) for window in windows) else None

    def may_change(self, now: float) -> bool:
        """Return whether enough time has passed since the change before."""
        return now >= self._not_before_s

    def changed(self, now: float) -> None:
        """Note that the Ring changes now: what was seen before says nothing of what comes, and there is a pause."""
        self.forget()
        self._not_before_s = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, MAX_CHANGE_S)

    def forget(self) -> None:
        """Forget what was seen: the Nodes have measured themselves again."""
        self._begin = None
        self._windows.clear()

    def _newest(self, now: float, *, is_doubted: bool) -> Sequence[_Window]:
        num = FIRST if is_doubted else STEADY
        newest = [window for window in self._windows if window.stop_s >= now - MAX_AGE_S][-num:]
        return newest if len(newest) == num else []


def load_text(factors: Factors, min_change: float) -> str:
    """Return the times that Nodes take compared with what they measured, where they are so many times more or less."""
    return ", ".join(
        f"{name} takes {factor:.1f} times as long"
        for name, factor in factors.items()
        if not 1 / min_change < factor < min_change
    )


def _mean(windows: Sequence[_Window]) -> Factors:
    """Return the geometric means: twice as long and half as long are the same on average."""
    return {
        name: math.exp(sum(math.log(window.factors[name]) for window in windows) / len(windows))
        for name in windows[-1].factors
    }
