"""What a Stage loads when it is assigned again, and what it gets ready before it is."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mdiq.core import control
from mdiq.core.noise import RowNoise
from mdiq.core.types import PLAIN_WEIGHTS, LayerRange
from mdiq.core.wire import WireLimits
from mdiq.engine.model.kv_cache import BLOCK_TOKENS
from mdiq.runtime import stage_host
from mdiq.runtime.loops import Worker, make_worker
from mdiq.runtime.stage_host import StageHost
from mdiq.telemetry.trace import Tracer
from mdiq.transport.memory import MemoryLink
from tests.control.conftest import assignment

KV_TOKENS = 640


@dataclass
class Loads:
    """A StageRunner that notes what it is to load."""

    done: list[str] = field(default_factory=list)
    kv_capacity_tokens = 0
    weight_bytes = kv_bytes_per_token = kv_tokens_in_use = 1
    wire_limits = WireLimits(1_024, 64, 1_024)
    noise: RowNoise | None = None

    def load(self, _: object, layers: LayerRange, *, kv_tokens: int | None, **__: Any) -> "Loads":
        self.done.append(f"loads {layers}")
        self.kv_capacity_tokens = kv_tokens or KV_TOKENS
        return self

    def reshape(self, model: object, layers: LayerRange, *, kv_tokens: int | None, **__: Any) -> None:
        self.load(model, layers, kv_tokens=kv_tokens)

    def reset(self) -> None:
        self.done.append("forgets")

    def lacks(self, _: LayerRange) -> list[int]:
        return []


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    loads = Loads()
    monkeypatch.setattr(stage_host, "StageRunner", SimpleNamespace(load=loads.load))
    return loads


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    worker = make_worker(time.monotonic, Tracer(is_on=False), 1)
    yield worker
    await worker.aclose()


def part(**changes: Any) -> control.Assign:
    wanted = replace(assignment(), weights=PLAIN_WEIGHTS, measures=False, kv_tokens=KV_TOKENS)
    return replace(wanted, **changes)


async def test_a_stage_whose_part_stays_the_same_in_another_ring_loads_nothing(loads: Loads, worker: Worker) -> None:
    host = StageHost(worker)
    await host.load(part(), Path())
    again = await host.load(part(epoch=7, previous="pi9", next_endpoint="tcp://10.0.0.9:1"), None)
    fewer = await host.load(part(kv_tokens=KV_TOKENS // 2), None)
    assert loads.done == ["loads 2-3", "forgets", "forgets"]
    assert (again.epoch, again.kv_tokens, fewer.kv_tokens) == (7, KV_TOKENS, KV_TOKENS)


async def test_a_stage_that_has_chosen_its_kv_cache_keeps_it_until_it_is_told_how_large(
    loads: Loads, worker: Worker
) -> None:
    host = StageHost(worker)
    for kv_tokens in (0, 0, KV_TOKENS // 2, 0):
        await host.load(part(kv_tokens=kv_tokens), Path())
    assert loads.done == ["loads 2-3", "forgets", "forgets", "loads 2-3"]


@pytest.mark.parametrize(
    ("changes", "memory_bytes"),
    [
        ({"layer_stop": 5}, None),
        ({"is_last": True}, None),
        ({"kv_tokens": 2 * KV_TOKENS}, None),
        ({"kv_tokens": 0}, None),  # as many as there is room for
        ({"memory_share": 0.25}, None),
        ({}, 1 << 30),
    ],
)
async def test_a_stage_with_another_part_or_limit_is_loaded_again(
    loads: Loads, worker: Worker, changes: dict[str, Any], memory_bytes: int | None
) -> None:
    host = StageHost(worker)
    await host.load(part(is_last=False), Path())
    await host.load(part(**{"is_last": False, **changes}), Path(), memory_bytes=memory_bytes)
    assert len(loads.done) == 2 and "forgets" not in loads.done


async def test_a_warm_up_loads_one_layer_and_keeps_nothing(loads: Loads, worker: Worker) -> None:
    host = StageHost(worker)
    await host.warm_up(Path(), 3, PLAIN_WEIGHTS)  # type: ignore[arg-type]
    assert loads.done == ["loads 3-3"] and loads.kv_capacity_tokens == BLOCK_TOKENS
    assert host.lacks(part())
    await host.load(part(), Path())
    assert len(loads.done) == 2


async def test_a_burst_of_an_epoch_that_is_over_is_answered_and_not_sent(loads: Loads, worker: Worker) -> None:
    """Its Starter has given up measuring, and a Node that fails by a late question would cost what runs a pause."""
    host, coming, going = StageHost(worker), MemoryLink(), MemoryLink()
    reports: Any = SimpleNamespace()
    assigned = part(epoch=4)
    await host.load(assigned, Path())
    serving = asyncio.create_task(host.serve(assigned, coming, going, reports))
    for number, (epoch, num_sent) in enumerate([(3, 0), (4, 2), (5, 0)], 1):
        sent = await host.send_burst(control.SendBurst(epoch, number, 2, 64))
        assert (sent.epoch, sent.number) == (epoch, number)
        for _ in range(num_sent):
            async with asyncio.timeout(20):
                await going.receive()
    assert going.bytes_out == going.bytes_in > 0
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


async def test_a_stage_has_the_noise_of_its_newest_assignment_also_if_nothing_is_loaded(
    loads: Loads, worker: Worker
) -> None:
    host = StageHost(worker)
    for changes, noise in (
        ({"noise_clip": 2.0, "noise_sigma": 0.5}, RowNoise(2.0, 0.5)),
        ({"noise_clip": 2.0, "noise_sigma": 9.0}, RowNoise(2.0, 9.0)),
        ({}, None),
    ):
        await host.load(part(**changes), Path())
        assert loads.noise == noise
    assert loads.done == ["loads 2-3", "forgets", "forgets"]
