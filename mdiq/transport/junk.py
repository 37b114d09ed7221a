"""Limits an event loop's time for useless messages, so that a flood of them does not stop others' tokens."""

import asyncio
import time
from collections.abc import Awaitable, Callable

SHARE = 0.2
"""Maximum share of the time for junk."""
QUANTUM_S = 0.0005
BURST_S = 0.005
"""Seconds of junk at once after a rest: on a busy loop each rest is longer than intended."""
RECEIVE_S = 30e-6
"""Time to receive a message, before it is looked at; about this much on a desktop machine."""


class JunkBudget:
    """Lets a reader rest after junk, so that junk takes at most a fifth of the time.

    A resting reader does not read from other senders either, but libzmq takes turns between senders: after a message
    of one, the next is another's. And while it rests, full queues slow the sender down.
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
        """Count the time taken to look at a message and drop it; rest when the budget is spent."""
        now_s = self._clock()
        self._left_s = min(self._left_s + (now_s - self._last_s) * SHARE, BURST_S) - (seconds + RECEIVE_S)
        self._last_s = now_s
        if self._left_s < 0:
            await self._sleep((QUANTUM_S - self._left_s) / SHARE)
