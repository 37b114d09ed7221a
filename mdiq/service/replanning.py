"""Has a Ring that serves planned again when its Nodes take longer, or less long, than they measured alone."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

from mdiq.core.work import Work
from mdiq.plan.drift import BetterPlan, Drift, Factors, NamedSplit, load_text
from mdiq.plan.measured import Profiles
from mdiq.runtime.loops import Clock
from mdiq.runtime.options import RingOptions
from mdiq.runtime.ring_keeper import RingKeeper
from mdiq.runtime.ring_status import KeptRing

LOOK_S = 10.0
NOTABLE = 1.1  # what is written of a Node in the reasons of a change


class Plans(Protocol):
    """The Plans of a topology; TopologyRings is one.

    measured: the newest figures of its Nodes, with what load has shown of them; None before there are any.
    """

    @property
    def measured(self) -> Profiles | None: ...
    def best(self, profiles: Profiles) -> NamedSplit | None:
        """Return the best split, or None if there is none, or it has failed."""
        ...

    def value(self, profiles: Profiles, split: NamedSplit) -> float | None:
        """Return the rate that is predicted of a split, or None if there is no prediction."""
        ...

    def keep_load(self, profiles: Profiles) -> None:
        """Keep figures with what load has shown."""
        ...

    def take_up(self, profiles: Profiles, why: str) -> None:
        """Plan with these figures from now on, and say why."""
        ...

    def go_back(self) -> None:
        """Plan with the figures from which the Ring that serves was planned."""
        ...


class Replanning:
    """Watches the Ring of a keeper.

    plans: returns those of the topology as it is now; None before it is read.
    """

    def __init__(self, keeper: RingKeeper, plans: Callable[[], Plans | None], *, clock: Clock = time.monotonic) -> None:
        self._keeper = keeper
        self._plans = plans
        self._clock = clock
        self._drift = Drift()
        self._ring: KeptRing | None = None
        self._formed: NamedSplit | None = None  # the split with which the Ring was formed
        self._taken: NamedSplit | None = None  # by load; perhaps it waits until nothing runs

    async def run(self) -> NoReturn:
        """Look at the Ring again and again until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Take in what the Nodes have computed; have the Ring change if that is worth it."""
        ring, plans = self._keeper.formed, self._plans()
        if ring is None or ring.is_paused or plans is None or (profiles := plans.measured) is None:
            return
        split = _split_of(ring.options)
        if ring is not self._ring:
            self._ring, self._formed, self._taken = ring, split, None
            self._drift.forget()
        works = {figures.name: figures.work for figures in ring.figures()}
        if works.keys() != split.keys() or profiles.unknown(list(split)):
            return

        def work_s(name: str, work: Work) -> float:
            return profiles.nodes[name].work_s(work, split[name])

        now = self._clock()
        if not self._drift.observe(now, (ring.service.ring.epoch, ring.options.layers), works, work_s):
            return
        is_doubted = any(profiles.nodes[name].under_load is None for name in split)
        # In a thread: a search over many Nodes may take a second on a small board.
        by_load = _ByLoad(plans, profiles)
        better = await asyncio.to_thread(self._drift.better, now, split, by_load, is_doubted=is_doubted)
        factors = self._drift.factors(now, is_doubted=is_doubted)
        if factors is None or plans is not self._plans() or ring is not self._keeper.formed or ring.is_paused:
            return
        plans.keep_load(profiles.under_load(factors))
        waits = _split_of(self._keeper.wanted)
        # It is to change by what its Nodes measured alone when it was formed: load says more than that.
        is_outdone = split == self._formed and waits not in (split, self._taken)
        if is_outdone:
            plans.go_back()
        if (
            better is not None
            and {*better.split} <= {*split, *ring.idle_here}
            and not waits == better.split == self._taken
        ):
            self._taken = better.split
            plans.take_up(profiles.under_load(better.factors), _why(better))
            self._drift.changed(now)
            self._keeper.plan_again()
        elif is_outdone:
            self._keeper.plan_again()


def with_load(status: Mapping[str, Any], factors: Factors) -> dict[str, Any]:
    """Return a status whose nodes say how many times as long they take as they measured alone, where that is known."""
    nodes = [
        node | ({"under_load": round(factors[node["name"]], 2)} if node["name"] in factors else {})
        for node in status["nodes"]
    ]
    return {**status, "nodes": nodes}


class _ByLoad:
    """Plans by what load shows of Nodes that have measured themselves."""

    def __init__(self, plans: Plans, profiles: Profiles) -> None:
        self._plans = plans
        self._profiles = profiles

    def best(self, factors: Factors) -> NamedSplit | None:
        return self._plans.best(self._profiles.under_load(factors))

    def value(self, split: NamedSplit, factors: Factors) -> float | None:
        return self._plans.value(self._profiles.under_load(factors), split)


def _split_of(options: RingOptions) -> NamedSplit:
    return dict(zip(options.node_names, map(len, options.layers), strict=True))


def _why(better: BetterPlan) -> str:
    split = ", ".join(f"{name} {num_layers}" for name, num_layers in better.split.items())
    gain = 100 * (better.value / better.present_value - 1)
    times = load_text(better.factors, NOTABLE)
    why = f"under load {times} as measured alone" if times else "by what the nodes do under load"
    return f"{why}: a better split: {split}; {better.value:.1f} tokens/s predicted, {gain:.0f} % more than as it is"
