"""Guards the Hops of a Ring that serves: one that carries nothing is connected anew, then others replace an end of it.

What is dead is for core/hop_watch.py, and how the Ring goes on for recovery.py: it is told of a loss, and finds that a
Node is missing where others are to replace it.
"""

import asyncio
from collections.abc import Mapping
from typing import NoReturn, Protocol

import structlog

from mdiq.core.control import Heartbeat
from mdiq.core.hop_watch import Arrivals, HopNames, HopTroubles, HopWatch
from mdiq.core.types import NodeId
from mdiq.errors import NodeDiedError
from mdiq.runtime.starter_service import StarterService
from mdiq.runtime.workers import RingWithout
from mdiq.transport.base import FrameSource

log = structlog.get_logger()

LOOK_S = 0.5
LATE_S = 0.5  # of this loop: the process was stopped meanwhile, and has not read what has come


class GuardedHops(Protocol):
    """The Nodes of a Ring and its Hops; SocketWorkers are."""

    source: FrameSource | None

    @property
    def ring_names(self) -> tuple[str, ...]:
        """All Nodes, the Starter first."""
        ...

    def heartbeats(self) -> Mapping[NodeId, Heartbeat]:
        """Return the newest of each Node."""
        ...

    def is_any_gone(self) -> bool:
        """Return whether a Node has not joined, or not again since it was lost."""
        ...

    def unreached(self, hop: int) -> str:
        """Return what is wrong when nothing arrives over a Hop, and what to do."""
        ...

    def lost_hop(self, error: NodeDiedError) -> None:
        """Have the Ring recover."""
        ...


class HopGuard:
    """Watches until cancelled. without: see RingWithout.

    reconnects: Nodes whose Hop to the next one is to be connected anew with the next Epoch. changed: set when a Node is
    no longer barred.
    """

    def __init__(
        self,
        hops: GuardedHops,
        service: StarterService,
        *,
        silence_s: float,
        without: RingWithout,
    ) -> None:
        self._hops = hops
        self._service = service
        self._silence_s = silence_s
        self._without = without
        self._troubles = HopTroubles()
        self._epoch = service.ring.epoch
        self._names: tuple[str, ...] = ()
        self._watch = HopWatch(0, silence_s)
        self._seen: dict[NodeId, Heartbeat] = {}
        self.reconnects: set[str] = set()
        self.changed = asyncio.Event()

    @property
    def barred(self) -> list[str]:
        """The Nodes that the Ring is to do without, because of a dead Hop."""
        return [*self._troubles.barred]

    @property
    def trouble(self) -> str:
        """Which Hops carry nothing, in words; empty if all do as far as is known."""
        dead = self._troubles.dead_among(_hops_of(self._names))
        return "; ".join(f"nothing goes from {sender} to {receiver}" for sender, receiver in dead)

    async def run(self) -> NoReturn:
        """Watch until cancelled."""
        time_of = asyncio.get_running_loop().time
        while True:
            due_s = time_of() + LOOK_S
            await asyncio.sleep(LOOK_S)
            if (late_s := time_of() - due_s) > LATE_S:
                self._watch.stretch(late_s)
            self._look(time_of())

    def _look(self, now: float) -> None:
        ring, hops = self._service.ring, self._hops
        if ring.epoch != self._epoch or not self._names:
            self._epoch, self._names = ring.epoch, hops.ring_names
            self._watch = HopWatch(len(self._names), self._silence_s)
        if self._troubles.let_in([*hops.ring_names], now, all_of_ring=hops.is_any_gone()):
            self.changed.set()  # where a Node is gone, no PROBE can show any more that a Hop carries
        if len(self._names) == 1 or hops.source is None:
            return
        num_sent, num_back = self._service.probes
        self._watch.sent(num_sent, now)
        self._watch.heard(0, Arrivals(num_back, hops.source.inflow), now)
        for i, node in enumerate(map(NodeId, self._names[1:]), 1):
            beat = hops.heartbeats().get(node)
            if beat is not None and beat is not self._seen.get(node):
                self._seen[node] = beat
                if beat.epoch == self._epoch:
                    self._watch.heard(i, Arrivals(beat.probe, beat.inflow), now)
        for i, hop in enumerate(_hops_of(self._names)):
            if self._troubles.came(hop, self._epoch, self._watch.probe(i), now):
                log.info("hop_carries_again", sender=hop[0], receiver=hop[1])
                self.changed.set()
        if not ring.is_paused and (dead := self._watch.dead(now)) is not None:
            self._give_up(dead, now)

    def _give_up(self, i: int, now: float) -> None:
        """Have a dead Hop connected anew, or one of its ends replaced."""
        hop = sender, receiver = _hops_of(self._names)[i]
        is_again = self._troubles.died(hop, self._epoch, self._watch.probe(i), now)
        error = NodeDiedError(self._hops.unreached(i))
        log.warning("hop_is_dead", sender=sender, receiver=receiver, is_again=is_again)
        self.reconnects.add(sender)
        if is_again:
            error.node = self._end_to_replace(hop)
            self._troubles.bar(error.node, hop, now)
        self._hops.lost_hop(error)

    def _end_to_replace(self, hop: HopNames) -> str:
        """Return the end with more dead Hops than the other; else the one that others can replace; never the Starter.

        The receiver, if nothing else decides: what lets nothing in is more often at fault than what lets nothing out.
        """
        ends = [name for name in reversed(hop) if name != self._names[0]]
        return max(ends, key=lambda name: (self._troubles.num_at(name), self._without([name]) is not None))


def _hops_of(names: tuple[str, ...]) -> list[HopNames]:
    return list(zip(names, (*names[1:], names[0]), strict=True)) if len(names) > 1 else []
