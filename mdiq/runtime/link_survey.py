"""Measures every Hop: asks Nodes for bursts and hands what they report to core/hop_survey.py.

A Ring with a Hop that nothing crosses would take requests and answer none, so that every Hop is tried before the Ring
serves.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol

import structlog

from mdiq.core import control
from mdiq.core.hop_survey import SINGLE_BYTES, BurstReport, HopLink, HopSurvey
from mdiq.core.types import Epoch
from mdiq.errors import TransportError
from mdiq.runtime.loops import Clock
from mdiq.runtime.starter_service import StarterService

log = structlog.get_logger()

BURST_TIMEOUT_S = 15.0


class Nodes(Protocol):
    """The Nodes after the Starter, by their Stage; see Coordinator."""

    async def send_burst(self, stage: int, burst: control.SendBurst) -> control.BurstSent:
        """Have a Node send a burst."""
        ...

    def burst_arrived(self, stage: int, number: int) -> "asyncio.Future[control.BurstArrived]":
        """Return a future of what a Node sees of a burst."""
        ...


async def survey_hops(
    starter: StarterService,
    nodes: Nodes,
    epoch: Epoch,
    num_hops: int,
    clock: Clock,
    *,
    numbers: Iterator[int] | None = None,
    unreached: Callable[[int], str] | None = None,
    timeout_s: float = BURST_TIMEOUT_S,
) -> tuple[HopLink | None, ...]:
    """Return what each Hop is like, the first one out of the Starter first; None where a larger burst did not arrive.

    numbers: see HopSurvey. unreached: returns what to tell of a Hop over which not even a small Frame arrives; None
    where the Ring serves, and that is known already.

    Raises:
        TransportError: there are such Hops.
        MdiqError: a Node is gone.
    """
    if unreached is not None:
        await _try_all(starter, nodes, epoch, num_hops, unreached, timeout_s)
    survey = HopSurvey(epoch, num_hops, numbers)
    while (wanted := survey.next_burst()) is not None:
        hop, burst = wanted
        receiver = (hop + 1) % num_hops
        arriving = nodes.burst_arrived(receiver, burst.number) if receiver else starter.burst_arrived(burst.number)
        try:
            async with asyncio.timeout(timeout_s):
                survey.reported(await _run(starter, nodes, hop, burst, arriving, clock))
        except TimeoutError:
            log.warning("hop_not_measured", hop=hop, timeout_s=timeout_s)
            survey.missed()
        finally:
            arriving.cancel()
    links = survey.links()
    for hop, link in enumerate(links):
        if link is not None:
            log.info("hop_measured", hop=hop, delay_s=round(link.delay_s, 6), bytes_per_s=round(link.bytes_per_s))
    return links


async def _try_all(
    starter: StarterService,
    nodes: Nodes,
    epoch: Epoch,
    num_hops: int,
    unreached: Callable[[int], str],
    timeout_s: float,
) -> None:
    """Send a small Frame over every Hop, over all at once."""
    probe = control.SendBurst(epoch, 0, 1, SINGLE_BYTES)
    arriving = [
        nodes.burst_arrived(receiver, probe.number) if receiver else starter.burst_arrived(probe.number)
        for receiver in ((hop + 1) % num_hops for hop in range(num_hops))
    ]
    sending = [asyncio.ensure_future(starter.send_burst(probe))]
    sending += [asyncio.ensure_future(_sent_s(nodes, hop, probe)) for hop in range(1, num_hops)]
    try:
        await asyncio.wait(arriving, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        for arrived in arriving:
            if arrived.done():
                arrived.result()
        if missing := [hop for hop, arrived in enumerate(arriving) if not arrived.done()]:
            raise TransportError("; ".join(unreached(hop) for hop in missing))
    finally:
        for arrived in arriving:
            arrived.cancel()
        for sent in sending:
            sent.cancel()
        await asyncio.gather(*arriving, *sending, return_exceptions=True)


async def _sent_s(nodes: Nodes, hop: int, burst: control.SendBurst) -> float:
    return (await nodes.send_burst(hop, burst)).sent_s


async def _run(
    starter: StarterService,
    nodes: Nodes,
    hop: int,
    burst: control.SendBurst,
    arriving: Awaitable[control.BurstArrived],
    clock: Clock,
) -> BurstReport:
    asked_s = clock()
    sent_s = await _sent_s(nodes, hop, burst) if hop else await starter.send_burst(burst)
    answered_s = clock()
    return BurstReport(asked_s, answered_s, sent_s, await arriving)
