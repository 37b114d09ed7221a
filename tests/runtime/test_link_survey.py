"""Hops of real services are measured over the very links that carry activations, and the Ring serves afterwards."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count

import pytest

from mdiq.core import control
from mdiq.core.frame import Buffer, FrameKind
from mdiq.core.hop_survey import SINGLE_BYTES, HopLink
from mdiq.core.types import Epoch
from mdiq.errors import NodeDiedError, TransportError
from mdiq.runtime.link_survey import survey_hops
from tests.runtime.conftest import OpenRing, Ring, make_sequence

EPOCH = Epoch(1)


class RingNodes:
    """The Nodes of a Ring without a control channel: their reports come through the Ring's queue."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._awaited: dict[tuple[int, int], asyncio.Future[control.BurstArrived]] = {}

    async def listen(self) -> None:
        while True:
            stage, arrived = await self._ring.bursts.get()
            awaited = self._awaited.get((stage, arrived.number))
            if awaited is not None and not awaited.done():
                awaited.set_result(arrived)

    async def send_burst(self, stage: int, burst: control.SendBurst) -> control.BurstSent:
        sent_s = await self._ring.services[stage - 1].send_burst(burst)
        return control.BurstSent(burst.epoch, burst.number, sent_s)

    def burst_arrived(self, stage: int, number: int) -> "asyncio.Future[control.BurstArrived]":
        return self._awaited.setdefault((stage, number), asyncio.get_running_loop().create_future())


@asynccontextmanager
async def nodes_of(ring: Ring) -> AsyncIterator[RingNodes]:
    nodes = RingNodes(ring)
    listening = asyncio.create_task(nodes.listen())
    yield nodes
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)


@pytest.mark.parametrize(("size", "kind"), [(2, "memory"), (3, "memory"), (2, "sockets"), (3, "sockets")])
async def test_every_hop_is_measured_and_the_ring_answers_as_ever(open_ring: OpenRing, size: int, kind: str) -> None:
    async with open_ring(size, kind) as ring, nodes_of(ring) as nodes:
        links = await survey_hops(ring.starter, nodes, EPOCH, size, time.monotonic, unreached=str)
        assert len(links) == size
        assert all(isinstance(link, HopLink) and link.delay_s >= 0 and link.bytes_per_s > 0 for link in links)
        await ring.check(*(make_sequence(i) for i in range(4)))
        await ring.check_quiet()
        assert all(not worker.meter.dropped for worker in ring.workers)


async def test_a_ring_that_serves_is_measured_again_with_other_numbers(open_ring: OpenRing) -> None:
    async with open_ring(3) as ring, nodes_of(ring) as nodes:
        numbers = count(1)
        await survey_hops(ring.starter, nodes, EPOCH, 3, time.monotonic, numbers=numbers, unreached=str)
        await ring.check(*(make_sequence(i) for i in range(4)))
        first = next(numbers)
        links = await survey_hops(ring.starter, nodes, EPOCH, 3, time.monotonic, numbers=numbers)
        assert all(isinstance(link, HopLink) for link in links) and len(links) == 3
        asked = sorted(number for _, number in nodes._awaited)
        assert any(number < first for number in asked) and any(number > first for number in asked)
        assert len({*asked} - {0}) == len([number for number in asked if number])
        await ring.check(*(make_sequence(i) for i in range(4, 8)))
        await ring.check_quiet()


async def test_hops_that_lose_larger_bursts_are_unknown_and_the_ring_answers_as_ever(open_ring: OpenRing) -> None:
    def drops_large_bursts(parts: Sequence[Buffer]) -> int:
        return parts[0][3] != FrameKind.BURST or len(memoryview(parts[1]).cast("B")) <= SINGLE_BYTES

    async with open_ring(3, copies=drops_large_bursts) as ring, nodes_of(ring) as nodes:
        links = await survey_hops(ring.starter, nodes, EPOCH, 3, time.monotonic, unreached=str, timeout_s=0.05)
        assert links == (None, None, None)
        await ring.check(make_sequence(0))


@pytest.mark.parametrize("blocked", [{0}, {1}, {2}, {0, 2}])
async def test_hops_that_nothing_crosses_are_all_named_and_there_is_no_ring(
    open_ring: OpenRing, blocked: set[int]
) -> None:
    async with open_ring(3) as ring, nodes_of(ring) as nodes:
        for hop in blocked:
            ring.sinks[hop]._copies = lambda _: 0
        with pytest.raises(TransportError) as refusal:
            await survey_hops(
                ring.starter, nodes, EPOCH, 3, time.monotonic, unreached=lambda hop: f"hop {hop}", timeout_s=0.1
            )
        assert str(refusal.value) == "; ".join(f"hop {hop}" for hop in sorted(blocked))


async def test_a_node_that_is_gone_is_heard_of_before_the_time_for_its_hop_is_over(open_ring: OpenRing) -> None:
    async with open_ring(3, copies=lambda _: 0) as ring, nodes_of(ring) as nodes, asyncio.timeout(20):
        surveying = asyncio.create_task(
            survey_hops(ring.starter, nodes, EPOCH, 3, time.monotonic, unreached=str, timeout_s=600.0)
        )
        await asyncio.sleep(0.02)
        ring.starter.fail_all(NodeDiedError("pi2: no heartbeat"))
        with pytest.raises(NodeDiedError, match="pi2"):
            await surveying


async def test_bursts_of_another_epoch_are_not_reported(open_ring: OpenRing) -> None:
    async with open_ring(2) as ring:
        await ring.starter.send_burst(control.SendBurst(7, 1, 2, 64))
        await ring.starter.send_burst(control.SendBurst(EPOCH, 2, 2, 64))
        stage, arrived = await ring.bursts.get()
        assert (stage, arrived.number) == (1, 2)
        assert ring.bursts.empty()


async def test_whoever_waits_for_a_burst_hears_that_the_ring_is_gone(open_ring: OpenRing) -> None:
    async with open_ring(2) as ring:
        waiting = ring.starter.burst_arrived(1)
        ring.starter.fail_all(NodeDiedError("node-1: its process ended"))
        with pytest.raises(NodeDiedError, match="node-1"):
            await waiting
