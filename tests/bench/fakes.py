"""A ring that answers from a script of times, and measurements made of such answers."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from mdiq.bench.figures import LoadFigures
from mdiq.bench.runner import CellRun, Measurements, NodeShare, PeerCell, PeerRun
from mdiq.bench.workload import ApartCell, Cell
from mdiq.core.sequence import FinishReason, Sequence, TokenEvent
from mdiq.core.types import LayerRange
from mdiq.errors import MdiqError
from mdiq.runtime.options import HopFigures, NodeFigures
from mdiq.testbed.link_shape import LinkShape


@dataclass(frozen=True)
class FakeEvent:
    step: TokenEvent
    at_s: float


@dataclass
class FakeRing:
    """Answers every Sequence at once; each token costs its Nodes a second of work and 10 bytes."""

    nodes: int
    link: LinkShape | None = None
    short_by: int = 0
    error: MdiqError | None = None
    asked: list[Sequence] = field(default_factory=list)
    is_open: bool = False
    num_tokens: int = 0

    async def __aenter__(self) -> "FakeRing":
        self.is_open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self.is_open = False

    async def stream(self, sequence: Sequence) -> AsyncIterator[FakeEvent]:
        assert self.is_open
        self.asked.append(sequence)
        if self.error is not None:
            yield FakeEvent(TokenEvent(sequence.index, None, 0, FinishReason.ERROR, self.error), 0.0)
            return
        for i in range(sequence.params.max_tokens - self.short_by):
            self.num_tokens += 1
            yield FakeEvent(TokenEvent(sequence.index, i, i), 1e9 + i)

    def figures(self) -> list[NodeFigures]:
        return [
            NodeFigures(
                f"node-{i}", LayerRange(i, i + 1), 100, 50, float(self.num_tokens), 0.0, 0, 10 * self.num_tokens, {}
            )
            for i in range(self.nodes)
        ]

    def hops(self) -> list[HopFigures]:
        return [HopFigures("bf16", 0.01, 1e6)] * self.nodes if self.nodes > 1 else []


def make_measurements(links: tuple[LinkShape | None, ...] = (None,), nodes: tuple[int, ...] = (1, 2)) -> Measurements:
    """Return made-up measurements of one and two users, with the peer's."""
    measured = Measurements()
    for link in links:
        for count in nodes:
            for users in (1, 2):
                figures = LoadFigures(8.0 * users, 10.0 * users * count, 0.5, 0.6, 0.1, 0.2)
                share = NodeShare("node-0", "0-3", 10**9, 10**8, 0.5, 0.01, 130.0)
                measured.cells[Cell(count, users, 8, link if count > 1 else None)] = [
                    CellRun(figures, (share,) * count, (HopFigures(wire, delay_s, rate),) * count if count > 1 else ())
                    for wire, delay_s, rate in (("bf16", 0.01, 1e6), ("i8", 0.03, None))
                ]
    measured.apart[ApartCell(2, 1, 8)] = [LoadFigures(14.0, rate, 0.5, 0.6, 0.1, 0.2) for rate in (15.0, 17.0)]
    for users in (1, 2):
        figures = LoadFigures(4.0 * users, 5.0 * users, 0.5, 0.6, 0.1, 0.2)
        measured.peer[PeerCell(1, users, 8)] = [PeerRun(figures, 7), PeerRun(figures, 9)]
    return measured
