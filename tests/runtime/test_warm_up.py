"""What a Node that stands by loads for a moment, when it does, and when it does not."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mdiq.core.types import PLAIN_WEIGHTS
from mdiq.errors import EngineError
from mdiq.runtime import warm_up
from mdiq.runtime.warm_up import ROOM, StoredLayer, WarmUp

FILE_BYTES = 100


@dataclass
class Stage:
    """A StageHost that notes what it is to warm up."""

    done: list[int] = field(default_factory=list)
    errors: dict[int, Exception] = field(default_factory=dict)

    async def warm_up(self, _: Any, layer: int, __: Any) -> None:
        self.done.append(layer)
        if error := self.errors.get(layer):
            raise error


@dataclass
class Node:
    """A WarmUp in its surroundings."""

    stage: Stage
    folder: Path
    is_idle: bool = True
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        stage: Any = self.stage
        self.warm_up = WarmUp(stage, is_idle=lambda: self.is_idle, max_bytes=lambda: self.max_bytes)

    def stored(self, *layers: int, digest: str = "d1") -> list[StoredLayer]:
        in_use: Any = None
        for layer in layers:
            (self.folder / str(layer)).write_bytes(bytes(FILE_BYTES))
        return [StoredLayer(self.folder / str(layer), layer, digest, PLAIN_WEIGHTS, in_use) for layer in layers]

    async def until(self, *layers: int) -> None:
        async with asyncio.timeout(20):
            while self.stage.done != [*layers] or (self.warm_up._wanted and self.is_idle):  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    monkeypatch.setattr(warm_up, "LayerFiles", lambda *_: None)
    monkeypatch.setattr(warm_up, "machine_free_bytes", lambda: ROOM * FILE_BYTES)
    monkeypatch.setattr(warm_up, "rss_bytes", lambda: 1_000)
    node = Node(Stage(), tmp_path)
    running = asyncio.create_task(node.warm_up.run())
    yield node
    assert not running.done(), "it ended"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_each_layer_is_loaded_once_in_a_process(node: Node) -> None:
    node.warm_up.want(*node.stored(3, 4))
    await node.until(3, 4)
    node.warm_up.want(*node.stored(3, 4, 5), *node.stored(5, 6))
    await node.until(3, 4, 5, 6)


async def test_a_node_that_has_work_goes_on_when_it_stands_by_again(node: Node) -> None:
    node.is_idle = False
    node.warm_up.want(*node.stored(3))
    await asyncio.sleep(0.05)
    assert node.stage.done == []
    node.is_idle = True
    node.warm_up.want()
    await node.until(3)


async def test_a_node_that_has_work_keeps_nothing_twice_and_nothing_of_another_model(node: Node) -> None:
    node.is_idle = False
    for digest in ("d1", "d1", "d2", "d2"):
        node.warm_up.want(*node.stored(3, 4, digest=digest))
        assert [(each.digest, each.layer) for each in node.warm_up._wanted.values()] == [(digest, 3), (digest, 4)]
    node.is_idle = True
    node.warm_up.want()
    await node.until(3, 4)


@pytest.mark.parametrize("error", [EngineError("no kernel"), RuntimeError("torch says so"), OSError("no such file")])
async def test_a_layer_that_cannot_be_loaded_ends_nothing(node: Node, error: Exception) -> None:
    node.stage.errors[3] = error
    node.warm_up.want(*node.stored(3, 4))
    await node.until(3, 4)


@pytest.mark.parametrize("is_limited", [False, True])
async def test_a_layer_that_the_memory_may_not_hold_is_left_out(
    node: Node, monkeypatch: pytest.MonkeyPatch, is_limited: bool
) -> None:
    if is_limited:
        node.max_bytes = 1_000 + ROOM * FILE_BYTES - 1
    else:
        monkeypatch.setattr(warm_up, "machine_free_bytes", lambda: ROOM * FILE_BYTES - 1)
    node.warm_up.want(*node.stored(3))
    async with asyncio.timeout(20):
        while node.warm_up._wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    assert node.stage.done == []
    node.max_bytes = 1_000 + ROOM * FILE_BYTES
    monkeypatch.setattr(warm_up, "machine_free_bytes", lambda: ROOM * FILE_BYTES)
    node.warm_up.want(*node.stored(4))
    await node.until(4)
