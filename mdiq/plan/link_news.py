"""When the Hops of a serving Ring are measured again, and when what they are like is worth another Plan. Pure.

Measuring takes a second or so of every link, so it is done while nothing runs: once in EVERY_S, and sooner if PROBEs
(core/hops.py) say that all Hops together take much longer, or less long, than when they were measured. A link that
comes and goes moves no Layers: STEADY measurements, AGAIN_S apart, have to predict GAIN for another split.
"""

from dataclasses import dataclass

from mdiq.plan.drift import GAIN

IDLE_S = 60.0  # without a request, before the links are taken up
EVERY_S = 600.0
AGAIN_S = 120.0
STEADY = 3
CHANGED = 1.5  # times as long as before, or less long by as much
MIN_CHANGE_S = 2e-3  # a change of all Hops together that matters


@dataclass(slots=True)
class LinkNews:
    """What was found of one Ring's Hops, and when they are to be measured next."""

    _due_s: float | None = None  # None: they have not been looked at
    _soonest_s: float = 0.0
    _known_s: float | None = None  # of all Hops together, when they were measured
    _num_better: int = 0  # of the newest measurements

    def is_due(self, now: float, hops_s: float | None) -> bool:
        """Return whether to measure now, if nothing runs. hops_s: of all Hops together, by PROBEs."""
        if self._due_s is None:  # they were measured when the Ring was formed
            self._due_s, self._soonest_s = now + EVERY_S, now + AGAIN_S
        if self._known_s is None:
            self._known_s = hops_s
        if now >= self._due_s:
            return True
        if now < self._soonest_s or hops_s is None or self._known_s is None:
            return False
        low, high = sorted((hops_s, self._known_s))
        return high >= CHANGED * low and high - low >= MIN_CHANGE_S

    def given_up(self, now: float) -> None:
        """Note that something was to be done meanwhile."""
        self._due_s = self._soonest_s = now + AGAIN_S

    def measured(self, now: float, hops_s: float | None, gain: float | None) -> bool:
        """Note that they are measured; return whether the best split by that is worth a change.

        gain: the rate that is predicted of the best one by the present one's; None if nothing is predicted.
        """
        self._known_s = hops_s
        is_better = gain is not None and gain >= GAIN
        self._num_better = self._num_better + 1 if is_better else 0
        self._due_s = now + (AGAIN_S if is_better else EVERY_S)
        self._soonest_s = now + AGAIN_S
        return self._num_better >= STEADY
