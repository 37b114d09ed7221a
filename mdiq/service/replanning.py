"""Has a Ring that serves planned again when its Nodes or its links take longer, or less long, than they measured."""

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

import structlog

from mdiq.core.hop_survey import HopLink
from mdiq.core.work import Work
from mdiq.errors import MdiqError
from mdiq.plan.drift import BetterPlan, Drift, Factors, NamedSplit, load_text
from mdiq.plan.handling import Handling
from mdiq.plan.link_news import IDLE_S, LinkNews
from mdiq.plan.measured import Profiles
from mdiq.runtime.loops import Clock
from mdiq.runtime.options import RingOptions
from mdiq.runtime.ring_keeper import RingKeeper
from mdiq.runtime.ring_status import KeptRing

log = structlog.get_logger()

LOOK_S = 10.0
NEEDED_S = 0.05  # how soon links are left alone when there is something to do
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
        """Keep figures with what load, or the links, have shown."""
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
        self._handling = Handling()
        self._news, self._idle_since_s = LinkNews(), math.inf
        self._ring: KeptRing | None = None
        self._formed: NamedSplit | None = None  # the split with which the Ring was formed
        self._taken: NamedSplit | None = None  # by load; perhaps it waits until nothing runs

    async def run(self) -> NoReturn:
        """Look at the Ring again and again until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()
            await self.look_at_links()

    async def look(self) -> None:
        """Take in what the Nodes have computed; have the Ring change if that is worth it."""
        ring, plans = self._keeper.formed, self._plans()
        if ring is None or ring.is_paused or plans is None or (profiles := plans.measured) is None:
            return
        split = _split_of(ring.options)
        if ring is not self._ring:
            self._ring, self._formed, self._taken = ring, split, None
            self._drift.forget()
            self._handling = Handling()
            self._news, self._idle_since_s = LinkNews(), math.inf
        works = {figures.name: figures.work for figures in ring.figures()}
        if works.keys() != split.keys() or profiles.unknown(list(split)):
            return
        self._handling.observe(self._clock(), works)
        profiles = profiles.with_handling(self._handling.seconds)

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
        if better is None or not self._take_up(
            plans, ring, better.split, profiles.under_load(better.factors), _why(better)
        ):
            if is_outdone:
                self._keeper.plan_again()

    async def look_at_links(self) -> None:
        """Measure the links again when it is time and nothing runs; have the Ring change if that is worth it."""
        ring, plans, now = self._keeper.formed, self._plans(), self._clock()
        if self._keeper.num_running or ring is None or ring is not self._ring or ring.is_paused:
            self._idle_since_s = math.inf
            return
        self._idle_since_s = min(self._idle_since_s, now)
        hops_s = ring.service.hops_s
        if not self._news.is_due(now, hops_s) or now - self._idle_since_s < IDLE_S:
            return
        split, links = _split_of(ring.options), await self._measured(ring)
        now = self._clock()

        def is_as_it_was() -> bool:
            return plans is self._plans() and self._is_at_work(ring) and split == _split_of(ring.options)

        if not links or not is_as_it_was() or plans is None or (profiles := plans.measured) is None:
            self._news.given_up(now)
            return
        profiles = profiles.with_hops(ring.options.node_names, links)
        plans.keep_load(profiles)
        best = await asyncio.to_thread(plans.best, profiles)
        if not is_as_it_was():
            self._news.given_up(now)
            return
        value, present = (None if each is None else plans.value(profiles, each) for each in (best, split))
        gain = value / present if value and present else None
        is_worth_it = self._news.measured(now, hops_s, gain)
        if is_worth_it and best is not None and value and present and self._drift.may_change(now):
            why = f"by what the links carry now: a better split: {_predicted(best, value, present)}"
            self._take_up(plans, ring, best, profiles, why)

    def _is_at_work(self, ring: KeptRing) -> bool:
        """Whether a Ring is the one that there is, and is not changing."""
        return ring is self._keeper.formed and not ring.is_paused

    async def _measured(self, ring: KeptRing) -> tuple[HopLink | None, ...]:
        """Return what the Hops are like; nothing if a request came meanwhile, or the Ring has other things to do."""
        measuring = asyncio.create_task(ring.measure_hops(), name="measure hops")
        try:
            while not measuring.done() and not self._keeper.num_running and self._is_at_work(ring):
                await asyncio.wait({measuring}, timeout=NEEDED_S)
            return measuring.result() if measuring.done() else ()
        except MdiqError as error:  # a Node is gone: the Ring is told by others
            log.info("links_not_measured", error=str(error))
            return ()
        finally:
            measuring.cancel()
            await asyncio.gather(measuring, return_exceptions=True)

    def _take_up(self, plans: Plans, ring: KeptRing, split: NamedSplit, profiles: Profiles, why: str) -> bool:
        """Have the Ring planned with these figures, unless it is to be this split already, or a Node is not here."""
        waits = _split_of(self._keeper.wanted)
        if not {*split} <= {*_split_of(ring.options), *ring.idle_here} or waits == split == self._taken:
            return False
        self._taken = split
        plans.take_up(profiles, why)
        self._drift.changed(self._clock())
        self._news = LinkNews()
        self._keeper.plan_again()
        return True


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
    times = load_text(better.factors, NOTABLE)
    why = f"under load {times} as measured alone" if times else "by what the nodes do under load"
    return f"{why}: a better split: {_predicted(better.split, better.value, better.present_value)}"


def _predicted(split: NamedSplit, value: float, present_value: float) -> str:
    layers = ", ".join(f"{name} {num_layers}" for name, num_layers in split.items())
    gain = 100 * (value / present_value - 1)
    return f"{layers}; {value:.1f} tokens/s predicted, {gain:.0f} % more than as it is"
