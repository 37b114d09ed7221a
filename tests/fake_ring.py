"""A Ring without Nodes, a model or time, for tests of its callers: the keeper, `mdiq run`, the bench.

tests/runtime/test_ring_contract.py asks of it what it asks of a real one.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mdiq.control.standby import StandingBy
from mdiq.core.hop_survey import HopLink
from mdiq.core.ring import RingProtocol
from mdiq.core.sequence import FinishReason, Sequence, TokenEvent
from mdiq.core.types import LayerRange
from mdiq.errors import CapacityError, MdiqError, RingError
from mdiq.runtime.options import HopFigures, NodeFigures, PaceFigures, RingOptions
from mdiq.runtime.recovery_times import RecoveryTimes
from mdiq.runtime.starter_service import StreamEvent
from mdiq.runtime.takeover import with_members_of

FIRST_TOKEN_S = 1e9


def ring_options(num_nodes: int, **changes: Any) -> RingOptions:
    """Return a ring of so many nodes, of one layer each."""
    return RingOptions(Path("model"), tuple(LayerRange(i, i + 1) for i in range(num_nodes)), **changes)


class FakeService:
    """The Starter of a FakeRing."""

    def __init__(self) -> None:
        self.ring = RingProtocol()
        self.ended: MdiqError | None = None
        self.is_over = asyncio.Event()

    def fail_all(self, error: MdiqError) -> None:
        if self.ended is None:
            self.ended = error
            self.is_over.set()


class FakeRing:
    """A ring whose forming, loss and tokens the test decides. Each token costs its nodes a second and 10 bytes.

    joined: it can be entered; refused: why not even then. goes_on: streams give more than their first token. failure:
    ends every stream after its first token. short_by: tokens that streams lack. refuses: returns why a Sequence cannot
    run. can_change: it can serve as another Ring. silence: seconds, by node. disks, times: see RingHost.
    closing: it is being closed; closes: that
    can end.
    """

    def __init__(
        self,
        options: RingOptions,
        on_loading: Callable[[str, int, int], None] = lambda *_: None,
        *,
        is_held: bool = False,
        failure: MdiqError | None = None,
        short_by: int = 0,
        context_tokens: int = 2_000,
    ) -> None:
        self.options = options
        self.on_loading = on_loading
        self.joined, self.goes_on = asyncio.Event(), asyncio.Event()
        if not is_held:
            self.joined.set()
            self.goes_on.set()
        self.failure = failure
        self.short_by = short_by
        self.refused: MdiqError | None = None
        self.refuses: Callable[[Sequence], MdiqError | None] = lambda _: None
        self.silence: dict[str, float] = {}
        self.gone: list[str] = []
        self.num_given_way = 0
        self.disks: dict[str, frozenset[int]] = {}
        self.times: list[RecoveryTimes] = []
        self.trouble = ""
        self.can_change = False  # it has to be formed anew for that
        self.cannot: MdiqError | None = None  # why it goes on as it is when it is to change
        self.num_tries = 0  # to change
        self.loss: asyncio.Future[MdiqError] = asyncio.get_running_loop().create_future()
        self.leaving: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.stays = asyncio.Event()
        self.is_open = self.is_closed = False
        self.closing, self.closes = asyncio.Event(), asyncio.Event()
        self.closes.set()
        self.asked: list[Sequence] = []
        self.num_tokens = self.num_open = self.peak_open = 0
        self.service: Any = FakeService()
        self.worker: Any = None
        self._context_tokens = context_tokens

    async def __aenter__(self) -> "FakeRing":
        await self.joined.wait()
        if self.refused is not None:
            raise self.refused
        self.is_open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        self.is_open = False
        self.closing.set()
        await self.closes.wait()
        self.is_closed = True
        self.service.fail_all(RingError("starter: its loops have ended; see the log"))

    @property
    def context_tokens(self) -> int:
        assert self.is_open, "it holds nothing yet"
        return self._context_tokens

    @property
    def missing(self) -> list[str]:
        return self.gone if self.joined.is_set() else list(self.options.node_names[1:])

    def give_way(self) -> None:
        self.num_given_way += 1

    @property
    def at_hand(self) -> Mapping[str, frozenset[int]]:
        return self.disks

    @property
    def pauses(self) -> Collection[RecoveryTimes]:
        return self.times

    @property
    def is_paused(self) -> bool:
        return bool(self.gone)

    def silent(self, min_s: float) -> dict[str, float]:
        return {name: silent_s for name, silent_s in self.silence.items() if silent_s >= min_s}

    @property
    def standing_by(self) -> tuple[StandingBy, ...]:
        return self.options.remote.standing_by if self.options.remote else ()

    @property
    def hop_trouble(self) -> str:
        return self.trouble

    @property
    def idle_here(self) -> list[str]:
        return [node.name for node in self.standing_by]

    def can_change_to(self, options: RingOptions) -> bool:
        return self.can_change

    async def change(self, options: RingOptions) -> None:
        assert self.is_open, "it does not serve"
        self.num_tries += 1
        if self.cannot is not None:
            raise self.cannot
        self.options = options

    async def replace_members(self, like: RingOptions) -> None:
        self.options = with_members_of(self.options, like)

    async def go_without(self, name: str) -> bool:
        if self.can_change:
            keep = [i for i, each in enumerate(self.options.node_names) if each != name]
            assert self.options.remote is not None  # Nodes of this machine do not leave
            remote = replace(self.options.remote, nodes=tuple(self.options.remote.nodes[i] for i in keep))
            self.options = replace(self.options, layers=tuple(self.options.layers[i] for i in keep), remote=remote)
            self.leaving = asyncio.get_running_loop().create_future()
        return self.can_change

    async def until_lost(self) -> MdiqError:
        return await asyncio.shield(self.loss)

    async def until_leaving(self) -> str:
        return await asyncio.shield(self.leaving)

    async def until_staying(self) -> None:
        await self.stays.wait()
        self.stays.clear()
        self.leaving = asyncio.get_running_loop().create_future()

    def lose(self, error: MdiqError) -> None:
        self.service.fail_all(error)
        self.loss.set_result(error)

    async def stream(self, sequence: Sequence) -> AsyncGenerator[StreamEvent, None]:
        if self.service.ended is not None:
            raise RingError(f"the ring has ended: {self.service.ended}")
        room = self._context_tokens - len(sequence.prompt)
        if not sequence.prompt or room <= 0:
            raise CapacityError(f"a prompt of {len(sequence.prompt)} tokens does not fit {self._context_tokens}")
        if (refusal := self.refuses(sequence)) is not None:
            raise refusal
        assert self.is_open, "it is not entered"
        self.asked.append(sequence)
        self.num_open += 1
        self.peak_open = max(self.peak_open, self.num_open)
        num_tokens = min(sequence.params.max_tokens, room) - self.short_by
        try:
            if len(sequence.generated) >= num_tokens:
                step = TokenEvent(sequence.index, None, sequence.num_tokens, FinishReason.LENGTH)
                yield StreamEvent(step, "", FIRST_TOKEN_S)
            for i in range(len(sequence.generated), num_tokens):
                position = sequence.num_tokens
                if i and (error := await self._may_go_on()) is not None:
                    step = TokenEvent(sequence.index, None, position, FinishReason.ERROR, error)
                    yield StreamEvent(step, "", FIRST_TOKEN_S + i)
                    return
                self.num_tokens += 1
                sequence.append(i)
                reason = FinishReason.LENGTH if i == num_tokens - 1 else None
                yield StreamEvent(TokenEvent(sequence.index, i, position, reason), "x", FIRST_TOKEN_S + i)
        finally:
            self.num_open -= 1

    async def _may_go_on(self) -> MdiqError | None:
        """Wait until a stream may go on; return what ends it instead."""
        waiting = [asyncio.ensure_future(event.wait()) for event in (self.goes_on, self.service.is_over)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()
        ended: MdiqError | None = self.service.ended
        return ended or self.failure

    def figures(self) -> list[NodeFigures]:
        busy_s, num_bytes = float(self.num_tokens), 10 * self.num_tokens
        return [
            NodeFigures(name, layers, 100, 50, busy_s, 0.0, num_bytes, num_bytes, {})
            for name, layers in zip(self.options.node_names, self.options.layers, strict=True)
        ]

    async def measure_hops(self) -> tuple[HopLink | None, ...]:
        return ()

    def hops(self) -> list[HopFigures]:
        assert not self.options.is_survey, "its hops have no formats yet"
        num_nodes = self.options.num_nodes
        return [HopFigures("bf16", 0.01, 1e6)] * num_nodes if num_nodes > 1 else []

    def pace(self) -> PaceFigures:
        assert not self.options.is_survey, "it is not paced"
        return PaceFigures(1, 2, 4, 0.01, 9.0, 16, 0.0, 8, 4_096)
