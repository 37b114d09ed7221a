"""A Ring whose Nodes have loaded: what it is now, what it can become, and how it gets there; see recovery.py.

How it comes to be, and how it ends, is for ring_host.py.
"""

import asyncio
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from math import inf

from mdiq.errors import MdiqError, first_of
from mdiq.plan.measured import MeasuredRing
from mdiq.runtime.epochs import Epochs
from mdiq.runtime.loaded_ring import USUAL_BYTES_PER_S, LoadedRing
from mdiq.runtime.loops import Worker
from mdiq.runtime.options import HopFigures, PaceFigures, RingOptions
from mdiq.runtime.starter_service import StarterService
from mdiq.runtime.takeover import is_same_but_members, with_spares
from mdiq.runtime.workers import Workers

AHEAD_SHARE = 0.25
"""Of the slowest Hop's rate, for Layers that are fetched while activations travel."""


class ServingRing:
    """A Ring from the loading of its Layers on; Recovery and FetchAhead change it.

    options: what it is now. epochs: how its Nodes begin together. loaded: what they have.
    on_loading: called with (done, total) while the Starter loads.
    """

    def __init__(
        self,
        loaded: LoadedRing,
        epochs: Epochs,
        service: StarterService,
        workers: Workers,
        worker: Worker,
        on_loading: Callable[[int, int], None],
    ) -> None:
        self.options = loaded.options
        self.loaded = loaded
        self.epochs = epochs
        self._service = service
        self._workers = workers
        self._worker = worker
        self._on_loading = on_loading
        self._rate = USUAL_BYTES_PER_S

    @property
    def is_paused(self) -> bool:
        """Whether nothing enters the Ring."""
        return self._service.ring.is_paused

    @property
    def context_tokens(self) -> int:
        """Max tokens of one Sequence that context and KV cache hold."""
        return self.epochs.spec.max_tokens

    @property
    def rounds(self) -> bool:
        """Whether Hops round activations: another cut between the Layers gives other tokens."""
        return self.options.rounds([hop.wire for hop in self.hops()]) or not self.options.weights.exact

    @property
    def holds_what_runs(self) -> bool:
        """Whether the KV cache, as it is loaded, is large enough for each request that runs."""
        return self.epochs.spec.max_tokens >= self._service.ring.needed_tokens

    def absent(self, options: RingOptions) -> set[str]:
        """Return the Nodes of a Ring that are not here."""
        workers = self._workers
        return {*options.node_names} - ({*self.options.node_names, *workers.standing_by} - {*workers.missing})

    def lacks(self, options: RingOptions) -> bool:
        """Whether a Node of a Ring would have to fetch Layers first, as far as is known."""
        at_hand, parts = self._workers.at_hand, zip(options.node_names, options.layers, strict=True)
        return any(not {*layers} <= at_hand.get(name, frozenset()) for name, layers in list(parts)[1:])

    def taken_over(
        self, lost: Collection[str], *, unfit: Collection[str] = (), max_fetch_s: float | None = inf
    ) -> RingOptions | None:
        """Return the Ring without these Nodes, or None; see recovery.ChangingRing."""
        if not self._workers.can_change:
            return None
        layers = dict(zip(self.options.node_names, self.options.layers, strict=True))
        wanted = {layer for name in lost for layer in layers.get(name, ())}
        spares = [name for name in self._workers.standing_by if name not in unfit]
        at_hand = self._workers.at_hand
        spares.sort(key=lambda name: len(wanted - at_hand.get(name, frozenset())))
        options = with_spares(self.options, lost, spares)
        still = [name for name in lost if name in options.node_names]
        if not still:
            return options
        starter, *others = (name for name in options.node_names if name not in still)
        if max_fetch_s is None or not {*unfit}.isdisjoint(others):
            return None
        if self.rounds and max_fetch_s < inf:  # a node that is back goes on with the same tokens
            return None
        return self.loaded.survived(
            self.options, options, still, max_fetch_s, self._slowest_hop, at_hand, is_starter_full=starter in unfit
        )

    async def reform(self, options: RingOptions) -> None:
        """Be another Ring from now on; nobody loads yet."""
        self.options = options
        await self._workers.reform(options)

    async def reload(self) -> None:
        """Have all Nodes hold what they are to hold; raise an MdiqError when one is gone, or cannot."""
        options, ring, epochs = self.options, self.loaded, self.epochs
        is_same, kv_tokens = is_same_but_members(options, epochs.options), epochs.kv_tokens(options)
        try:
            async with asyncio.TaskGroup() as tasks:
                reshape = partial(ring.stage.reshape, replace(options, kv_tokens=kv_tokens))
                tasks.create_task(self._worker.run_long(reshape, self._on_loading), name="load")
                loading = tasks.create_task(self._workers.reload(epochs.next_epoch(), kv_tokens), name="workers")
        except* MdiqError as group:
            raise first_of(group) from None
        if not is_same:
            self.loaded = ring = ring.as_reshaped(options, loading.result())
            await epochs.reshape(options, ring)

    async def begin_again(self) -> None:
        """Begin the next Epoch, and replay."""
        await self.epochs.begin_again(self._service)

    @property
    def ahead_bytes_per_s(self) -> float | None:
        """What Layers may take of the links while activations travel; None where there is no Hop."""
        return AHEAD_SHARE * self._slowest_hop if self.options.num_nodes > 1 else None

    def pace(self) -> PaceFigures:
        """Return the pace of the most Sequences that were in the Ring at once, as it is planned now."""
        return self.epochs.pace(self._service)

    def hops(self) -> list[HopFigures]:
        """Return what every Hop is like, the one out of the Starter first; none in a Ring of one Node."""
        return self.epochs.hops()

    async def measured(self) -> MeasuredRing:
        """Return what the Nodes measured, for the planner; the head is measured now, between two Batches."""
        return await self.epochs.measured()

    @property
    def _slowest_hop(self) -> float:
        """The rate of the slowest Hop; Hops of another Ring than the one that was formed are not measured."""
        self._rate = min((hop.bytes_per_s for hop in self.hops() if hop.bytes_per_s is not None), default=self._rate)
        return self._rate
