"""What trials and evaluations measure on a ring: loads, one answer with and without a KV cache, bytes on its Hops."""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from mdiq.bench.figures import LoadFigures, UserTimes, load_figures, num_ended_early
from mdiq.bench.runner import WARM_UP_TOKENS, LoadedRing, NodeShare, ask, node_shares, run_load
from mdiq.bench.workload import Load
from mdiq.core.sequence import SamplingParams
from mdiq.core.sequence import Sequence as TokenSequence
from mdiq.engine.memory import return_free_memory
from mdiq.plan.measured import MeasuredRing
from mdiq.report.energy import joules, read_energy

_QUIET_S = 0.1
BYTES_TOKENS = 8
"""Tokens over which the bytes of one are counted."""


class MeasurableRing(LoadedRing, Protocol):
    """A ring whose Nodes say what they measured; runtime's RingHost is one."""

    async def measured(self) -> MeasuredRing:
        """Return what the Nodes measured before the Ring served."""
        ...


@dataclass(frozen=True, slots=True)
class LoadRun:
    """One Load on one ring. seconds: from the first question to the last token. answers: the users' tokens.

    energy_source, joules: what the machine told of these seconds; empty and None where it tells nothing.
    ended_early: see num_ended_early.
    """

    users: int
    prompt_tokens: int
    answer_tokens: int
    seconds: float
    figures: LoadFigures
    nodes: tuple[NodeShare, ...]
    answers: tuple[tuple[int, ...], ...]
    energy_source: str = ""
    joules: float | None = None
    ended_early: int = 0


@dataclass(frozen=True, slots=True)
class HopBytes:
    """Bytes that one generated token costs on the first Hop and on the last one, framing included, as counted.

    length: tokens before it. num_tokens: over how many it was counted; first_total, last_total: the counts.
    """

    wire: str
    has_kv_cache: bool
    length: int
    num_tokens: int
    first_total: int
    last_total: int
    first_per_token: float
    last_per_token: float


class Meter:
    """Measures one ring.

    rest_s: how long after a Load every Node has reported; 0 where the Starter is the only one.
    lap_s: the longest way of a small Frame round the ring, as the RELEASE that follows an answer goes.
    """

    def __init__(self, ring: MeasurableRing, vocab_size: int, rest_s: float, lap_s: float = 0.0) -> None:
        self._ring, self._vocab_size, self._rest_s = ring, vocab_size, rest_s
        self._quiet_s = _QUIET_S + 2 * lap_s
        self._indices = itertools.count()

    def next_index(self, count: int) -> int:
        """Return the first of so many indices that nothing else in the ring has."""
        first = next(self._indices)
        self._indices = itertools.count(first + count)
        return first

    async def warm_up(self, users: int, prompt_tokens: int, seed: int) -> None:
        """Run a short Load of another seed, so that memory of the largest one is taken."""
        await self._run(Load(users, prompt_tokens, WARM_UP_TOKENS, seed + 1))
        await asyncio.sleep(self._rest_s)

    async def load(self, load: Load) -> LoadRun:
        """Run a Load; return what it took.

        Raises:
            MdiqError: the ring failed a user.
        """
        before, energy_before = self._ring.figures(), read_energy()
        users = await self._run(load)
        energy_after = read_energy()  # before the rest, in which next to nothing is done
        seconds = max(user.tokens_s[-1] for user in users) - min(user.submitted_s for user in users)
        found = joules(energy_before, energy_after, seconds)
        await asyncio.sleep(self._rest_s)
        return LoadRun(
            users=load.users,
            prompt_tokens=load.prompt_tokens,
            answer_tokens=load.answer_tokens,
            seconds=seconds,
            figures=load_figures(users),
            nodes=node_shares(before, self._ring.figures(), load, users),
            answers=tuple(user.answer for user in users),
            energy_source="" if found is None else energy_before.source,
            joules=found,
            ended_early=num_ended_early(users),
        )

    async def generate(self, prompt: Sequence[int], num_tokens: int, *, has_kv_cache: bool = True) -> UserTimes:
        """Return one user's greedy answer, and when its tokens came.

        Without a KV cache each token is a request of its own, whose prompt is all that came before: its positions are
        computed again, by every Stage. The ring must not keep prefixes. That is how the evaluation measures it; nothing
        that serves does so.
        """
        if has_kv_cache:
            return await ask(self._ring, self._sequence(tuple(prompt), num_tokens))
        submitted_s = time.monotonic()
        tokens_s: list[float] = []
        answer: list[int] = []
        for _ in range(num_tokens):
            step = await ask(self._ring, self._sequence((*prompt, *answer), 1))
            tokens_s += step.tokens_s
            answer += step.answer
        return UserTimes(submitted_s, tuple(tokens_s), tuple(answer))

    async def hop_bytes(self, wire: str, length: int, seed: int, *, has_kv_cache: bool) -> HopBytes:
        """Count what a generated token costs on the wire when ``length`` tokens came before it.

        With a KV cache it is the difference between an answer of one token and one of BYTES_TOKENS more. Without one it
        is the whole request of one token.
        """
        (prompt,) = Load(1, length, 1, seed).prompts(self._vocab_size)
        await self._counted(prompt, 1)  # what the ring does once is not counted
        first, last = await self._counted(prompt, 1)
        num_tokens = 1
        if has_kv_cache:
            longer_first, longer_last = await self._counted(prompt, 1 + BYTES_TOKENS)
            first, last, num_tokens = longer_first - first, longer_last - last, BYTES_TOKENS
        return HopBytes(wire, has_kv_cache, length, num_tokens, first, last, first / num_tokens, last / num_tokens)

    async def _counted(self, prompt: tuple[int, ...], num_tokens: int) -> tuple[int, int]:
        before = await self._quiet_bytes()
        await ask(self._ring, self._sequence(prompt, num_tokens))
        after = await self._quiet_bytes()
        return after[0] - before[0], after[1] - before[1]

    async def _quiet_bytes(self) -> tuple[int, int]:
        """Return the bytes that left and reached the Starter, once there are no more of them."""
        now = self._starter_bytes()
        while True:
            await asyncio.sleep(self._quiet_s)
            before, now = now, self._starter_bytes()
            if now == before:
                return now

    def _starter_bytes(self) -> tuple[int, int]:
        starter = self._ring.figures()[0]
        return starter.bytes_out, starter.bytes_in

    def _sequence(self, prompt: tuple[int, ...], num_tokens: int) -> TokenSequence:
        return TokenSequence(next(self._indices), prompt, SamplingParams(num_tokens, ignore_eos=True))

    async def _run(self, load: Load) -> list[UserTimes]:
        return await run_load(self._ring, load, self._vocab_size, self.next_index(load.users))


async def count_bytes(
    open_ring: Callable[[str], AbstractAsyncContextManager[MeasurableRing]],
    vocab_size: int,
    wires: Sequence[str],
    lengths: Sequence[int],
    seed: int,
    *,
    lap_s: float,
    has_uncached: bool,
    progress: Callable[[str], None],
) -> tuple[HopBytes, ...]:
    """Count the bytes of a token in each format, at each length, on a ring of its own.

    open_ring: called with a format. lap_s: see Meter. has_uncached: count them without a KV cache as well.

    Raises:
        MdiqError: a ring failed.
    """
    found: list[HopBytes] = []
    for wire in wires:
        progress(f"bytes on a hop of {wire}")
        await asyncio.to_thread(return_free_memory, collect=True)
        async with open_ring(wire) as ring:
            meter = Meter(ring, vocab_size, 0.0, lap_s)
            for has_kv_cache in (True, False) if has_uncached else (True,):
                for length in lengths:
                    found.append(await meter.hop_bytes(wire, length, seed, has_kv_cache=has_kv_cache))
    return tuple(found)
