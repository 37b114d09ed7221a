"""Bursts that come in over the last Hop, and those who wait for them."""

import asyncio

from mdiq.core import control
from mdiq.core.frame import Frame
from mdiq.core.hop_survey import BurstMeter
from mdiq.errors import MdiqError


class AwaitedBursts:
    """A future for each burst that somebody waits for; others are ignored."""

    def __init__(self) -> None:
        self._meter = BurstMeter()
        self._awaited: dict[int, asyncio.Future[control.BurstArrived]] = {}

    def expect(self, number: int) -> "asyncio.Future[control.BurstArrived]":
        """Return a future of what comes of a burst."""
        self._awaited[number] = future = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: self._awaited.pop(number, None))
        return future

    def frame_came(self, frame: Frame, now: float) -> None:
        """Take in a Frame of a burst; the last one ends the wait."""
        arrived = self._meter.arrived(frame, now)
        awaited = None if arrived is None else self._awaited.get(arrived.number)
        if arrived is not None and awaited is not None and not awaited.done():
            awaited.set_result(arrived)

    def fail(self, error: MdiqError) -> None:
        """End every wait with an error."""
        for future in list(self._awaited.values()):
            if not future.done():
                future.set_exception(error)
                future.exception()  # the survey may not wait for it yet
