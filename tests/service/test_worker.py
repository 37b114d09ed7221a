"""A node as a service: ring after ring in one process."""

import asyncio
import gc
import weakref
from typing import Any

import pytest

from mdiq.runtime.lifecycle import Notifier
from mdiq.service import worker
from mdiq.service.worker import NodeService


class Weights:
    """What a ring holds."""


class FakeProcess:
    """A ring that ends while it and its tasks hold weights."""

    is_assigned = has_served = True
    held: "list[weakref.ref[Weights]]" = []

    def __init__(self, *_: object) -> None:
        self.weights = Weights()
        self.held.append(weakref.ref(self.weights))

    async def run(self) -> None:
        await asyncio.sleep(0)


async def test_memory_goes_back_when_nothing_refers_to_the_ring_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: asyncio.Queue[bool] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def give_back(*, collect: bool = False) -> None:
        gc.collect()
        loop.call_soon_threadsafe(freed.put_nowait, FakeProcess.held[-1]() is None)

    monkeypatch.setattr(worker, "NodeProcess", FakeProcess)
    monkeypatch.setattr(worker, "return_free_memory", give_back)
    options: Any = type("Options", (), {"control": "tcp://starter"})
    serving = asyncio.create_task(NodeService(lambda: options, Notifier(None), once=False)._rings())
    async with asyncio.timeout(20):
        assert await freed.get()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
