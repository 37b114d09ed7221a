"""Bounds the time that messages of no use take of an event loop, so that others' tokens flow beside a flood of them."""

import asyncio
import time
from collections.abc import Awaitable, Callable

SHARE = 0.2
"""Of the time: the most that junk takes."""
QUANTUM_S = 0.0005
BURST_S = 0.005
"""What may be taken at once after a rest: on a busy loop each rest is longer than it was meant to be."""
RECEIVE_S = 30e-6
"""What it takes to receive a message, before anybody looks at it; about so much on a desktop machine."""


class JunkBudget:
    """Lets a reader rest after junk: a fifth of the time is the most that it takes.

    A reader that rests reads no more of others either, but libzmq takes turns between senders: whatever one of them
    sends, the next message is another's. And while it rests, full queues slow the sender down.
    """

    def __init__(
        self,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sleep = sleep
        self._clock = clock
        self._left_s = QUANTUM_S
        self._last_s = clock()

    async def spent(self, seconds: float) -> None:
        """Note that it took so long to look at a message and drop it; rest when it is time to."""
        now_s = self._clock()
        self._left_s = min(self._left_s + (now_s - self._last_s) * SHARE, BURST_S) - (seconds + RECEIVE_S)
        self._last_s = now_s
        if self._left_s < 0:
            await self._sleep((QUANTUM_S - self._left_s) / SHARE)
