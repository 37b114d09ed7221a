"""Bounds the time that messages of no use take of an event loop, so that others' tokens flow beside a flood of them."""

import asyncio
from collections.abc import Awaitable, Callable

QUANTUM_S = 0.0005
REST_PER_S = 4.0
RECEIVE_S = 30e-6
"""What it takes to receive a message, before anybody looks at it; about so much on a desktop machine."""


class JunkBudget:
    """Lets a reader rest after junk: a fifth of the time is the most that it takes.

    A reader that rests reads no more of others either, but libzmq takes turns between senders: whatever one of them
    sends, the next message is another's. And while it rests, full queues slow the sender down.
    """

    def __init__(self, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep) -> None:
        self._sleep = sleep
        self._used_s = 0.0

    async def spent(self, seconds: float) -> None:
        """Note that it took so long to look at a message and drop it; rest when it is time to."""
        self._used_s += seconds + RECEIVE_S
        if self._used_s >= QUANTUM_S:
            rest_s, self._used_s = self._used_s * REST_PER_S, 0.0
            await self._sleep(rest_s)
