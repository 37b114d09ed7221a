"""The real model's layers travel as files: cut, resumed, to two nodes at once; stages compute as on the whole model."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import zmq.asyncio

from mdiq.control.weight_client import Fetched, fetch_weights
from mdiq.control.weight_server import WEIGHTS_HWM, LayerSource, WeightServer
from mdiq.core.frame import Batch, Payload, Segment, TokenIds
from mdiq.core.types import Epoch, LayerRange, SeqId
from mdiq.core.weights import CREDIT_PARTS, PART_BYTES, folder_name
from mdiq.engine.formats.layer_files import LayerFiles
from mdiq.engine.model.layer_packing import LayerPacking
from mdiq.engine.runner import StageRunner
from mdiq.testbed.link_shape import LinkShape
from mdiq.testbed.relay import Relay
from mdiq.transport.router_dealer import DealerLink, RouterServer
from tests.transport.conftest import context as context

STAGES = (LayerRange(0, 8), LayerRange(8, 20), LayerRange(20, 30))


@dataclass
class Starter:
    """It serves the real model; ``port`` is where Nodes look for it."""

    context: zmq.asyncio.Context
    folder: Path
    packing: LayerPacking
    server: WeightServer
    server_port: int
    port: int
    num_links: int = 0

    async def fetch(self, node: str, layers: LayerRange, **options: object) -> Fetched:
        async def connect() -> DealerLink:
            self.num_links += 1
            name = f"{node}/{self.num_links}"
            return await DealerLink.connect(self.context, f"tcp://127.0.0.1:{self.port}", identity=name)

        values: dict[str, object] = {"silence_s": 4.0, "clock": time.monotonic, **options}
        folder = self.folder / node / "weights" / folder_name(self.packing.digest, "plain")
        return await fetch_weights(connect, folder, self.packing.digest, layers, **values)  # type: ignore[arg-type]


@pytest.fixture
async def starter(
    context: zmq.asyncio.Context, real_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Starter]:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "starter"))
    packing = LayerPacking(real_model, "plain", tmp_path / "starter" / "packed")
    router = await RouterServer.bind(context, "tcp://127.0.0.1:0", hwm=WEIGHTS_HWM)
    source = LayerSource(packing.digest, packing.num_layers, packing.find)
    server = WeightServer(router, source, clock=time.monotonic)
    serving = asyncio.create_task(server.run())
    port = int(router.endpoint.rpartition(":")[2])
    yield Starter(context, tmp_path, packing, server, port, port)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    await router.aclose()
    packing.close()


def _rows(model: Path | LayerFiles, layers: LayerRange, payload: Payload, digest: str) -> tuple[StageRunner, Payload]:
    """Return a Stage that was loaded from there, and what it makes of a payload of six tokens."""
    runner = StageRunner.load(
        model,
        layers,
        is_last=layers.stop == 30,
        owns_embedding_and_head=layers.start == 0,
        kv_tokens=64,
        digest=digest,
    )
    segments = (Segment(SeqId(1), 0, 6, wants_logits=True),)
    return runner, runner.forward(Batch(Epoch(1), segments, (payload,)))


async def test_two_nodes_fetch_at_once_and_compute_what_the_whole_model_does(
    starter: Starter, real_model: Path
) -> None:
    many = await asyncio.gather(*(starter.fetch(f"node-{i}", layers) for i, layers in enumerate(STAGES) if i))
    whole = await asyncio.to_thread(lambda: real_model.stat().st_size)
    for fetched, layers in zip(many, STAGES[1:], strict=True):
        taken = sum(path.stat().st_size for path in fetched.paths[layers.start].parent.iterdir())
        assert taken == fetched.num_bytes < 0.02 * whole + whole * len(layers) / 30, "it has more than its own layers"
    assert starter.server.peak_outstanding_bytes <= 2 * CREDIT_PARTS * PART_BYTES
    # The packed formats: tests/engine/formats/test_layer_files.py.
    answers = []
    files = [LayerFiles(fetched.paths, fetched.in_use) for fetched in many]
    for models in ([real_model] * 3, [real_model, *files]):
        payload: Payload = TokenIds((504, 1266, 29, 7, 1999, 30))
        starts = []
        for model, layers in zip(models, STAGES, strict=True):
            runner, payload = await asyncio.to_thread(_rows, model, layers, payload, starter.packing.digest)
            starts.append(runner)
        answers.append(starts[0].logits([payload]))
    assert torch.equal(answers[0], answers[1])


async def test_a_transfer_that_is_cut_five_times_ends_with_whole_files(starter: Starter) -> None:
    layers = LayerRange(10, 20)
    total = sum(starter.packing.find(layer).stat().st_size for layer in layers)
    shape = LinkShape(bandwidth_bit_per_s=100e6)
    done = [0]

    async def restart() -> Relay:
        relay = Relay(shape, "127.0.0.1", starter.server_port)
        await relay.start()
        starter.port = relay.port
        return relay

    relay = await restart()
    fetching = asyncio.create_task(
        starter.fetch("node", layers, silence_s=0.5, progress=lambda got, _: done.append(got))
    )
    for cut in range(5):
        await _until(lambda at=total * (cut + 1) // 7: done[-1] >= at or fetching.done())  # type: ignore[misc]
        assert not fetching.done(), "it was over before it was cut"
        await relay.aclose()
        relay = await restart()
    fetched = await fetching
    await relay.aclose()
    assert starter.num_links >= 6
    assert (fetched.num_fetched, fetched.num_bytes, fetched.num_bad) == (len(layers), total, 0)
    for layer, path in fetched.paths.items():
        own = starter.packing.find(layer)
        assert path.name == own.name and path.read_bytes() == own.read_bytes()
    num_served, starter.port = starter.server.num_parts, starter.server_port
    again = await starter.fetch("node", layers)
    assert again.num_fetched == 0 and starter.server.num_parts == num_served, "a second start transfers nothing"


async def _until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
