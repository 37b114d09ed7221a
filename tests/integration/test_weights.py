"""The real model's weights travel: cut, resumed, to three nodes at once, and every stage computes as on the whole."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import zmq.asyncio

from mdiq.control.chunk_hashes import ChunkHashes
from mdiq.control.weight_client import Fetched, fetch_weights
from mdiq.control.weight_server import WEIGHTS_HWM, WeightServer
from mdiq.core.frame import Batch, Payload, Segment, TokenIds
from mdiq.core.types import Epoch, LayerRange, SeqId
from mdiq.core.weights import CHUNK_BYTES, CREDIT_CHUNKS, WeightMap
from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.formats.weight_map import map_weights
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
    weights: WeightMap
    server: WeightServer
    server_port: int
    port: int
    num_links: int = 0

    async def fetch(self, node: str, layers: LayerRange, **options: object) -> Fetched:
        async def connect() -> DealerLink:
            self.num_links += 1
            name = f"{node}/{self.num_links}"
            return await DealerLink.connect(self.context, f"tcp://127.0.0.1:{self.port}", identity=name)

        values: dict[str, object] = {"silence_s": 2.0, "digest": self.weights.digest, **options}
        return await fetch_weights(connect, self.folder / node, layers, clock=time.monotonic, **values)  # type: ignore

    def held_bytes(self, layers: LayerRange, *, with_ends: bool = False) -> int:
        manifest = self.weights.manifest(layers, with_ends=with_ends)
        return sum(manifest.chunk_size(*chunk) for chunk in manifest.chunks())


@pytest.fixture
async def starter(context: zmq.asyncio.Context, real_model: Path, tmp_path: Path) -> AsyncIterator[Starter]:
    weights = map_weights(real_model)
    router = await RouterServer.bind(context, "tcp://127.0.0.1:0", hwm=WEIGHTS_HWM)
    hashes = ChunkHashes(tmp_path / "hashes", real_model, weights)
    server = WeightServer(router, weights, real_model, hashes, clock=time.monotonic)
    serving = asyncio.create_task(server.run())
    port = int(router.endpoint.rpartition(":")[2])
    yield Starter(context, tmp_path, weights, server, port, port)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    await router.aclose()


def _rows(path: Path, layers: LayerRange, payload: Payload, digest: str) -> tuple[StageRunner, Payload]:
    """Return a Stage that was loaded from there, and what it makes of a payload of six tokens."""
    runner = StageRunner.load(
        path,
        layers,
        is_last=layers.stop == 30,
        owns_embedding_and_head=layers.start == 0,
        kv_tokens=64,
        digest=digest,
    )
    segments = (Segment(SeqId(1), 0, 6, wants_logits=True),)
    return runner, runner.forward(Batch(Epoch(1), segments, (payload,)))


async def test_three_nodes_fetch_at_once_and_compute_what_the_whole_model_does(
    starter: Starter, real_model: Path
) -> None:
    many = await asyncio.gather(
        *(starter.fetch(f"node-{i}", layers, with_ends=i == 0) for i, layers in enumerate(STAGES))
    )
    for i, (fetched, layers) in enumerate(zip(many, STAGES, strict=True)):
        own = starter.held_bytes(layers, with_ends=i == 0)
        stat = fetched.path.stat()
        assert stat.st_size == starter.weights.files[0][1]
        assert stat.st_blocks * 512 < own + 2**16 < 0.75 * stat.st_size, (
            "something outside its own ranges is on the disk"
        )
        with open_checkpoint(fetched.path) as copy:
            assert copy.digest == starter.weights.digest
    assert starter.server.most_outstanding_bytes <= len(STAGES) * CREDIT_CHUNKS * CHUNK_BYTES
    # The packed weights of int8 and int4 are those of the whole as well: tests/engine/formats/test_weight_map.py.
    answers = []
    for paths in ([real_model] * 3, [fetched.path for fetched in many]):
        payload: Payload = TokenIds((504, 1266, 29, 7, 1999, 30))
        starts = []
        for path, layers in zip(paths, STAGES, strict=True):
            runner, payload = await asyncio.to_thread(_rows, path, layers, payload, starter.weights.digest)
            starts.append(runner)
        answers.append(starts[0].logits([payload]))
    assert torch.equal(answers[0], answers[1])


async def test_a_transfer_that_is_cut_five_times_ends_with_the_right_digest(starter: Starter) -> None:
    layers = LayerRange(10, 20)
    total = starter.held_bytes(layers)
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
    assert fetched.num_fetched == len(starter.weights.manifest(layers, with_ends=False).chunks())
    with open_checkpoint(fetched.path) as copy:
        assert copy.digest == starter.weights.digest
    num_served, starter.port = starter.server.num_chunks, starter.server_port
    again = await starter.fetch("node", layers)
    assert again.num_fetched == 0 and starter.server.num_chunks == num_served, "a second start transfers nothing"


async def _until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
