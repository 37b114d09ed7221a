"""The Epochs of one Ring: what its Hops are like, its pace, their formats, and the beginning of each."""

import asyncio
from functools import partial
from typing import NoReturn

import structlog

from mdiq.core.hop_survey import HopLink
from mdiq.core.types import FIRST_EPOCH, Epoch, RingSpec
from mdiq.core.wire_formats import AUTO, USUAL
from mdiq.plan.handling import Handling
from mdiq.plan.measured import MeasuredRing
from mdiq.plan.micro_batches import MicroBatches
from mdiq.plan.pace import paced
from mdiq.plan.wire_choice import WireCosts, choose_wires
from mdiq.runtime.loaded_ring import LoadedRing
from mdiq.runtime.loops import Worker
from mdiq.runtime.options import HopFigures, PaceFigures, RingOptions
from mdiq.runtime.starter_service import StarterService
from mdiq.runtime.takeover import is_same_but_members
from mdiq.runtime.workers import Workers

log = structlog.get_logger()

LOOK_S = 2.0  # at what forwards cost the event loops
LOOPBACK_HOP_S = 2e-4  # until the first probe is back: a frame over loopback, both event loops included


class Epochs:
    """Forms a Ring that is loaded: measures its Hops, plans its pace, chooses formats, and begins its Epochs.

    options: the Ring of the newest of them.
    wire_check_nats: what i8 would cost on the Hops that it was chosen for; None where it was not in question.
    bytes_before: in and out, when this Epoch began.
    """

    def __init__(self, options: RingOptions, ring: LoadedRing, workers: Workers, worker: Worker) -> None:
        self.options = options
        self._ring = ring
        self._workers = workers
        self._worker = worker
        self._epoch = FIRST_EPOCH
        self._links: tuple[HopLink | None, ...] = ()
        self._wires: tuple[str, ...] = ()
        # Of all Hops that the Ring has had, by their ends and what is wanted of them: a Node that is back has its own.
        self._known_wires: dict[tuple[tuple[str, str], str], str] = {}
        self._known_links: dict[tuple[str, str], HopLink | None] = {}
        self._micro_batches: MicroBatches | None = None
        self._handling = Handling()
        self.spec = ring.stage.spec(ring.others)
        self._served = options, self.spec.kv_tokens
        self.bytes_before = (0, 0)
        self.wire_check_nats: float | None = None

    async def form(self, service: StarterService) -> None:
        """Measure the Hops, and begin to serve unless this is a survey.

        Raises:
            MdiqError: a Node is gone, or nothing arrives over a Hop.
        """
        self._links = await self._workers.survey(service, self._epoch)
        if self.options.is_survey:
            self._wires = self._first_wires
            return
        await self.plan_pace(self._hops_s)
        await self._begin(service, await self._choose_wires(service))

    def next_epoch(self) -> Epoch:
        """Return an Epoch in which nobody has served yet: Nodes that came back load in it."""
        self._epoch = Epoch(self._epoch + 1)
        return self._epoch

    def kv_tokens(self, options: RingOptions) -> int | None:
        """Return the KV cache that a Ring counts on: that it has, or had when it served last; None: each Node chooses.

        A Ring may have loaded after the one that served, and not have served itself.
        """
        for known, kv_tokens in ((self.options, self.spec.kv_tokens), self._served):
            if is_same_but_members(options, known):
                return kv_tokens
        return options.kv_tokens

    async def reshape(self, options: RingOptions, ring: LoadedRing) -> None:
        """Go on with another Ring from the next Epoch on; what is known of Hops that it has had, too, is kept."""
        hops = _hops_of(self.options)
        self._known_wires |= dict(zip(zip(hops, self.options.wanted_wires, strict=True), self._wires, strict=False))
        self._known_links |= dict(zip(hops, self._links, strict=False))
        self.options, self._ring, self.spec = options, ring, ring.stage.spec(ring.others)
        hops = _hops_of(options)
        wanted = zip(zip(hops, options.wanted_wires, strict=True), self._first_wires, strict=True)
        self._wires = tuple(self._known_wires.get(hop, wire) for hop, wire in wanted)
        self._links = tuple(self._known_links.get(hop) for hop in hops)
        await self.plan_pace(self._hops_s)

    async def begin_again(self, service: StarterService) -> None:
        """Begin the next Epoch, with the Nodes that have loaded for it; every Sequence is replayed.

        Raises:
            MdiqError: a Node is gone.
        """
        await self._begin(service, self._wires)

    async def plan_pace(self, hops_s: float) -> RingSpec:
        """Plan the pace anew, for Hops that take so long together; return what the ring protocol is to know of it."""
        # In a thread: 30 to 120 ms on a desktop machine.
        ring = self._ring
        handling_s = self._handling.seconds
        names = self.options.node_names
        costs = [cost.with_handling(handling_s.get(name, 0.0)) for name, cost in zip(names, ring.costs, strict=True)]
        planned = await asyncio.to_thread(paced, self.spec, costs, hops_s, self.options.pace)
        if ring is self._ring:  # else it is another Ring by now
            self.spec, self._micro_batches = planned
        return self.spec

    async def watch_handling(self, service: StarterService) -> NoReturn:
        """Have the pace planned anew when forwards are found to cost the event loops more, or less, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            works = {figures.name: figures.work for figures in self._workers.figures()}
            works[self.options.node_names[0]] = self._worker.work
            if self._handling.observe(self._worker.clock(), works):
                log.info("handling_measured", seconds={n: round(s, 6) for n, s in self._handling.seconds.items()})
                service.renew_pace()

    def pace(self, service: StarterService) -> PaceFigures:
        """Return the pace of the most Sequences that were in the Ring at once, as it is planned now."""
        assert self._micro_batches is not None  # it is formed
        num_live = min(max(service.ring.peak_live, 1), self.spec.max_live)  # an earlier Ring may have had room for more
        return PaceFigures(
            num_live=service.ring.peak_live,
            in_flight=self._micro_batches.in_flight[num_live - 1],
            cap=self.spec.cap(num_live),
            hops_s=service.hops_s,
            predicted_tokens_per_s=self._micro_batches.rates[num_live - 1],
            chunk_tokens=self.spec.shared_chunk(num_live),
            decode_gap_s=service.ring.decode_gap_s,
            max_live=self.spec.max_live,
            kv_tokens=self.spec.kv_tokens,
        )

    def hops(self) -> list[HopFigures]:
        """Return what every Hop is like, the one out of the Starter first; none in a Ring of one Node."""
        links = self._links or (None,) * len(self._wires)
        return [
            HopFigures(wire, None, None) if link is None else HopFigures(wire, link.delay_s, link.bytes_per_s)
            for wire, link in zip(self._wires, links, strict=True)
        ]

    async def measure_hops(self, service: StarterService) -> tuple[HopLink | None, ...]:
        """Measure the Hops again; return what they are like, None where that is not known. See Workers."""
        epoch = self._epoch
        links = await self._workers.measure_hops(service, epoch)
        if epoch != self._epoch:  # another Ring, by now
            return ()
        self._links = tuple(new or old for new, old in zip(links, self._links, strict=True))
        return links

    async def measured(self) -> MeasuredRing:
        """Return what the Nodes measured, for the planner; the head is measured now, between two Batches."""
        ring = self._ring
        head = await self._worker.run_long(ring.stage.measure_head)
        return ring.stage.measured(ring.costs, ring.others, head, tuple(zip(self._wires, self._links, strict=False)))

    @property
    def _hops_s(self) -> float:
        """How long all Hops take, as they were measured when the Ring was formed."""
        delays_s = [LOOPBACK_HOP_S if link is None else max(link.delay_s, LOOPBACK_HOP_S) for link in self._links]
        return sum(delays_s) if delays_s else LOOPBACK_HOP_S * self.options.num_nodes

    @property
    def _first_wires(self) -> tuple[str, ...]:
        """The formats that the Hops begin with."""
        options = self.options
        return tuple(options.wire(i) or USUAL for i in range(options.num_nodes)) if options.num_nodes > 1 else ()

    async def _choose_wires(self, service: StarterService) -> tuple[str, ...]:
        """Return the format of each Hop; where i8 is in question, try it first."""
        from mdiq.engine.measure import measure_packing
        from mdiq.engine.wire_check import check_tokens, divergence_nats
        from mdiq.runtime.rehearsal import NUM_TOKENS, rehearse

        options, stage, first = self.options, self._ring.stage, self._first_wires
        # Noise would drown what i8 costs: two rehearsals would differ by it alone.
        if not self._links or AUTO not in options.wanted_wires or any(options.noises):
            return first
        config = stage.runner.config
        packing = await self._worker.run_uncounted(partial(measure_packing, config.hidden_size))
        costs = WireCosts(config.hidden_size, self._ring.costs, self.spec.cap(self.spec.max_live), packing)
        choose = partial(choose_wires, options.wanted_wires, self._links, costs)
        wires = choose()
        if wires == first:
            return wires
        tokens = await self._worker.run_uncounted(partial(check_tokens, options.model, NUM_TOKENS, config.vocab_size))
        logits = []
        for tried in (first, wires):
            await self._begin(service, tried)
            logits.append(await rehearse(service, stage.engine, tokens))
        self.wire_check_nats = divergence_nats(*logits)
        if self.wire_check_nats <= options.max_divergence_nats:
            return wires
        log.warning("i8_refused", divergence_nats=round(self.wire_check_nats, 4), most_nats=options.max_divergence_nats)
        return choose(avoid_small=True)

    async def _begin(self, service: StarterService, wires: tuple[str, ...]) -> None:
        """Have every Stage serve in a new Epoch with these formats; figures count from here on."""
        options, workers = self.options, self._workers
        self.next_epoch()
        self._wires = wires
        if options.weights.exact and options.rounds(wires):
            log.warning("wire_is_not_exact", wires=wires, text="hops round activations: other tokens than on one node")
        if any(options.noises):
            log.warning("noise_is_not_exact", text="hops carry noise: no answer comes out the same way twice")
        await workers.connect()
        runner = self._ring.stage.runner
        if (links := workers.links(runner.wire_limits)) != service.links:
            await service.relink(links)
        await workers.begin(self._epoch, wires)
        runner.set_wire(wires[0] if wires else None)
        is_rehearsed = not service.ring.is_paused
        await service.begin_epoch(self._epoch, self.spec)
        if is_rehearsed:
            service.ring.reset_counts()
        self._served = options, self.spec.kv_tokens
        self._worker.reset_meter()
        self._worker.tracer.clear()
        if workers.source is not None and workers.sink is not None:
            self.bytes_before = workers.source.bytes_in, workers.sink.bytes_out
        log.info("epoch_began", epoch=self._epoch, wires=wires)


def _hops_of(options: RingOptions) -> list[tuple[str, str]]:
    """Return who sends to whom, the Starter first."""
    names = options.node_names
    return list(zip(names, (*names[1:], names[0]), strict=True)) if len(names) > 1 else []
