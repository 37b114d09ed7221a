"""Runs Loads on a ring and on its peer, round by round, and collects what came out. A ring's parts are runtime's.

A round starts each ring once, runs all its cells, then the rings apart and the peer's: so a machine that becomes
slower, or warmer, changes them alike. Figures of Nodes come with their heartbeats: after each Load the ring rests until
all have beaten.
"""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from mdiq.bench.figures import LoadFigures, UserTimes, load_figures
from mdiq.bench.workload import ApartCell, Cell, Load
from mdiq.core.sequence import SamplingParams
from mdiq.core.sequence import Sequence as TokenSequence
from mdiq.errors import RingError
from mdiq.runtime.options import HopFigures, NodeFigures
from mdiq.runtime.starter_service import StreamEvent
from mdiq.testbed.link_shape import LinkShape

WARM_UP_TOKENS = 4


class LoadedRing(Protocol):
    """What is measured; runtime's RingHost is one."""

    def stream(self, sequence: TokenSequence) -> AsyncIterator[StreamEvent]:
        """Run a Sequence and yield its events."""
        ...

    def figures(self) -> list[NodeFigures]:
        """Return what every Node did so far, in ring order."""
        ...

    def hops(self) -> list[HopFigures]:
        """Return what every Hop is like, in ring order; none in a ring of one Node."""
        ...


OpenRing = Callable[[int, LinkShape | None], AbstractAsyncContextManager[LoadedRing]]
"""Starts a ring of so many Nodes, over such links."""


@dataclass(frozen=True, slots=True)
class NodeShare:
    """What one Node did during a Load.

    busy_share, waiting_share: of the Load's time; see NodeFigures.
    bytes_per_token: what its Hop carried for each row that passed there, framing included; 0 without a Hop.
    """

    name: str
    layers: str
    rss_bytes: int
    weight_bytes: int
    busy_share: float
    waiting_share: float
    bytes_per_token: float


@dataclass(frozen=True, slots=True)
class CellRun:
    """One repeat of a cell."""

    figures: LoadFigures
    nodes: tuple[NodeShare, ...] = ()
    hops: tuple[HopFigures, ...] = ()


@dataclass(frozen=True, slots=True, order=True)
class PeerCell:
    """One point of the peer's grid."""

    threads: int
    users: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class PeerRun:
    """One repeat of a peer's cell."""

    figures: LoadFigures
    rss_bytes: int


RunPeer = Callable[[int, Load], Awaitable[tuple[Sequence[UserTimes], int]]]
"""Runs a Load with so many threads; returns the users' times and the peer's resident memory."""

RunApart = Callable[[int, Load], Awaitable[Sequence[UserTimes]]]
"""Runs a Load on each of so many rings of one Node at once; returns the times of all users."""


@dataclass(slots=True)
class Measurements:
    """All repeats, in the order of the rounds."""

    cells: dict[Cell, list[CellRun]] = field(default_factory=dict)
    apart: dict[ApartCell, list[LoadFigures]] = field(default_factory=dict)
    peer: dict[PeerCell, list[PeerRun]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bench:
    """A whole measurement.

    peer_cells: empty without a peer. apart_cells: empty where rings apart are not wanted.
    rest_s: how long after a Load every Node has reported.
    progress: called with what runs now.
    """

    cells: Sequence[Cell]
    answer_tokens: int
    repeats: int
    seed: int
    vocab_size: int
    rest_s: float
    open_ring: OpenRing
    peer_cells: Sequence[PeerCell] = ()
    run_peer: RunPeer | None = None
    apart_cells: Sequence[ApartCell] = ()
    run_apart: RunApart | None = None
    progress: Callable[[str], None] = lambda _: None

    async def run(self) -> Measurements:
        """Run every round.

        Raises:
            MdiqError: a ring or the peer failed.
        """
        result = Measurements()
        for repeat in range(self.repeats):
            where = f"round {repeat + 1} of {self.repeats}"
            for nodes, link in dict.fromkeys((cell.nodes, cell.link) for cell in self.cells):
                self.progress(f"{where}: {nodes} nodes start")
                cells = [cell for cell in self.cells if (cell.nodes, cell.link) == (nodes, link)]
                async with self.open_ring(nodes, link) as ring:
                    await self._measure_ring(ring, cells, where, result)
                gc.collect()  # the Starter's weights are in this process: the next ring should find it empty
            for apart_cell in self.apart_cells:
                assert self.run_apart is not None  # apart_cells are empty without it
                self.progress(f"{where}: {apart_cell.rings} rings apart, {apart_cell.users} users each")
                users = await self.run_apart(apart_cell.rings, self._load(apart_cell))
                result.apart.setdefault(apart_cell, []).append(load_figures(users))
            for peer_cell in self.peer_cells:
                assert self.run_peer is not None  # peer_cells are empty without one
                self.progress(f"{where}: peer with {peer_cell.threads} threads, {peer_cell.users} users")
                users, rss = await self.run_peer(peer_cell.threads, self._load(peer_cell))
                result.peer.setdefault(peer_cell, []).append(PeerRun(load_figures(users), rss))
        return result

    async def _measure_ring(self, ring: LoadedRing, cells: Sequence[Cell], where: str, result: Measurements) -> None:
        index = 0
        # The largest Load once, shortly: memory that a first forward of that size takes is taken then.
        max_users, longest = max(c.users for c in cells), max(c.prompt_tokens for c in cells)
        warm_up = Load(max_users, longest, WARM_UP_TOKENS, self.seed + 1, max(c.temperature for c in cells))
        await run_load(ring, warm_up, self.vocab_size, index)
        index += warm_up.users
        # The Starter's own figures are never old.
        rest_s = self.rest_s if cells[0].nodes > 1 else 0.0
        await asyncio.sleep(rest_s)
        for cell in cells:
            drawn = f", temperature {cell.temperature:g}" if cell.temperature else ""
            self.progress(f"{where}: {cell.nodes} nodes, {cell.users} users, {cell.prompt_tokens} prompt tokens{drawn}")
            load = self._load(cell)
            before = ring.figures()
            users = await run_load(ring, load, self.vocab_size, index)
            index += load.users
            await asyncio.sleep(rest_s)
            shares = node_shares(before, ring.figures(), load, users)
            run = CellRun(load_figures(users), shares, tuple(ring.hops()))
            result.cells.setdefault(cell, []).append(run)

    def _load(self, cell: Cell | ApartCell | PeerCell) -> Load:
        temperature = 0.0 if isinstance(cell, PeerCell) else cell.temperature
        return Load(cell.users, cell.prompt_tokens, self.answer_tokens, self.seed, temperature)


async def run_load(ring: LoadedRing, load: Load, vocab_size: int, first_index: int) -> list[UserTimes]:
    """Ask all prompts of the Load at once; return when each user's tokens came.

    first_index: indices from there on are not in use in this ring.

    Raises:
        MdiqError: the ring failed a user.
    """
    sequences = [
        TokenSequence(
            first_index + user,
            prompt,
            # A seed each, as users have: the same draws for all would make their answers alike.
            SamplingParams(load.answer_tokens, load.temperature, ignore_eos=True, seed=load.seed + user),
        )
        for user, prompt in enumerate(load.prompts(vocab_size))
    ]
    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(ask(ring, sequence), name=f"user-{sequence.index}") for sequence in sequences]
    return [task.result() for task in asked]


async def ask(ring: LoadedRing, sequence: TokenSequence) -> UserTimes:
    """Run a Sequence to its end; return when its tokens came, and which.

    Raises:
        MdiqError: the ring failed it, or fewer tokens came than it wanted.
    """
    submitted_s = time.monotonic()
    tokens_s, answer = [], []
    async for event in ring.stream(sequence):
        if event.step.token is not None:
            tokens_s.append(event.at_s)
            answer.append(event.step.token)
        if event.step.error is not None:
            raise event.step.error
    if len(tokens_s) != sequence.params.max_tokens:
        raise RingError(f"user {sequence.index}: {len(tokens_s)} of {sequence.params.max_tokens} tokens came")
    return UserTimes(submitted_s, tuple(tokens_s), tuple(answer))


def node_shares(
    before: Sequence[NodeFigures], after: Sequence[NodeFigures], load: Load, users: Sequence[UserTimes]
) -> tuple[NodeShare, ...]:
    """Return what each Node did between two figures with one Load between them."""
    seconds = max(user.tokens_s[-1] for user in users) - min(user.submitted_s for user in users)
    earlier = {node.name: node for node in before}
    shares = []
    for node in after:
        start = earlier[node.name]
        # The last Stage sends the rows alone that give a token; the others one for every token that passes.
        is_last = node.name == after[-1].name
        rows = load.users * (load.answer_tokens if is_last else load.prompt_tokens + load.answer_tokens - 1)
        shares.append(
            NodeShare(
                name=node.name,
                layers=str(node.layers),
                rss_bytes=node.rss_bytes,
                weight_bytes=node.weight_bytes,
                busy_share=(node.busy_s - start.busy_s) / seconds if seconds > 0 else 0.0,
                waiting_share=(node.waiting_s - start.waiting_s) / seconds if seconds > 0 else 0.0,
                bytes_per_token=(node.bytes_out - start.bytes_out) / rows,
            )
        )
    return tuple(shares)
