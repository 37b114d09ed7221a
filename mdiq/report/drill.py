"""A recovery drill: users ask, one Node's process is killed, and all still get the tokens that they would have got.

What is shown afterwards: the timeline of the pause, and how many tokens had come by when.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil

from mdiq.bench.runner import LoadedRing
from mdiq.bench.workload import Load
from mdiq.core.sequence import SamplingParams
from mdiq.core.sequence import Sequence as TokenSequence
from mdiq.errors import MdiqError, RingError
from mdiq.runtime.recovery_times import RecoveryTimes

Kill = Callable[[str], None]


class RecoverableRing(LoadedRing, Protocol):
    """A ring that goes on after a loss; runtime's RingHost is one."""

    @property
    def pauses(self) -> Collection[RecoveryTimes]: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """How many tokens of all users together had come at a time; seconds since they asked."""

    at_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Drill:
    """What a drill showed; times are seconds since the users asked, those of the timeline since the loss was noticed.

    node: that was killed. killed_s, noticed_s: when. recovered_s: from the killing until each request had gone on;
    None: not all did, and ``error`` says why. gap_s: the longest time between two tokens of all users together.
    equal: users whose answer is the expected one. timeline: see RecoveryTimes.shown.
    """

    node: str
    users: int
    killed_s: float
    noticed_s: float | None
    recovered_s: float | None
    gap_s: float
    equal: int
    error: str
    timeline: dict[str, object]
    progress: tuple[Progress, ...]


async def drill(
    ring: RecoverableRing,
    load: Load,
    vocab_size: int,
    first_index: int,
    node: str,
    kill: Kill,
    expected: Sequence[tuple[int, ...]],
) -> Drill:
    """Run a Load, and kill a Node when a third of the tokens have come.

    first_index: indices from there on are not in use in this ring. expected: the answers without a loss.
    """
    begun_s = time.monotonic()
    killed_s: float | None = None
    came_s: list[float] = []
    threshold = max(load.users * load.answer_tokens // 3, 1)

    async def user(i: int, prompt: tuple[int, ...]) -> tuple[int, ...]:
        nonlocal killed_s
        answer: list[int] = []
        params = SamplingParams(load.answer_tokens, load.temperature, ignore_eos=True, seed=load.seed + i)
        async for event in ring.stream(TokenSequence(first_index + i, prompt, params)):
            if event.step.error is not None:
                raise event.step.error
            if event.step.token is not None:
                answer.append(event.step.token)
                came_s.append(time.monotonic() - begun_s)
            if len(came_s) >= threshold and killed_s is None:
                killed_s = time.monotonic() - begun_s
                kill(node)
        return tuple(answer)

    prompts = load.prompts(vocab_size)
    ended = await asyncio.gather(*(user(i, prompt) for i, prompt in enumerate(prompts)), return_exceptions=True)
    for end in ended:
        if isinstance(end, BaseException) and not isinstance(end, MdiqError):
            raise end
    error = next((str(end) for end in ended if isinstance(end, MdiqError)), "")
    assert killed_s is not None or error  # every user has all tokens, or there is an error
    killed_s = time.monotonic() - begun_s if killed_s is None else killed_s
    pause = next((pause for pause in ring.pauses if pause.lost_s - begun_s >= killed_s), None)
    recovered_s = None
    if pause is not None and pause.replayed_s is not None and not error:
        recovered_s = pause.replayed_s - begun_s - killed_s
    return Drill(
        node=node,
        users=load.users,
        killed_s=killed_s,
        noticed_s=None if pause is None else pause.lost_s - begun_s,
        recovered_s=recovered_s,
        gap_s=max((later - sooner for sooner, later in zip(came_s, came_s[1:], strict=False)), default=0.0),
        equal=sum(end == wanted for end, wanted in zip(ended, expected, strict=True)),
        error=error,
        timeline={} if pause is None else pause.shown(),
        progress=tuple(Progress(at_s, i) for i, at_s in enumerate(came_s, 1)),
    )


def kill_child(name: str) -> None:
    """Kill the process of a Node that this one has started.

    Raises:
        RingError: there is none.
    """
    for child in psutil.Process().children():
        try:
            words = child.cmdline()
            if "--name" in words and words[words.index("--name") + 1] == name:
                child.kill()
                return
        except psutil.Error:  # it has just ended
            continue
    raise RingError(f"{name}: no process of this name to kill; the drill is for rings on this machine")
