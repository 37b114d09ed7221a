"""A Node that stands by loads each Layer that it has fetched once, for a moment: its first take-over is quick then.

Compiling and choosing kernels for the first time takes seconds, many on a small board.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import structlog

from mdiq.cache import Use
from mdiq.core.types import WeightSettings
from mdiq.engine.formats.layer_files import LayerFiles
from mdiq.engine.memory import machine_free_bytes, rss_bytes
from mdiq.errors import MdiqError
from mdiq.runtime.stage_host import StageHost

log = structlog.get_logger()

ROOM = 4  # times a Layer's file: the mapped file, what is made of it, and what measuring kernels takes


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A Layer's file. digest: of its model. weights: how a Ring would have it held. in_use: keeps the file there."""

    path: Path
    layer: int
    digest: str
    weights: WeightSettings
    in_use: Use

    @property
    def key(self) -> tuple[str, WeightSettings, int]:
        """What tells it from others."""
        return self.digest, self.weights, self.layer


class WarmUp:
    """Takes Layers one after the other, as long as nothing else is to be computed here.

    stage: of this process. is_idle: whether the Node has no part in a Ring. max_bytes: returns what the process may
    take, or None.
    """

    def __init__(self, stage: StageHost, *, is_idle: Callable[[], bool], max_bytes: Callable[[], int | None]) -> None:
        self._stage = stage
        self._is_idle = is_idle
        self._max_bytes = max_bytes
        self._wanted: dict[tuple[str, WeightSettings, int], StoredLayer] = {}
        self._done: set[tuple[str, WeightSettings, int]] = set()
        self._news = asyncio.Event()

    def want(self, *layers: StoredLayer) -> None:
        """Take these too, but for those that this process has had before; without any: go on, if it may by now.

        Those of another model are let go: a Node that serves may wait for long, and would keep their files on the disk.
        """
        if newest := {each.digest for each in layers}:
            wanted = (each for each in (*self._wanted.values(), *layers) if each.digest in newest)
            self._wanted = {each.key: each for each in wanted if each.key not in self._done}
        self._news.set()

    async def run(self) -> NoReturn:
        """Warm up until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._wanted and self._is_idle():
                await self._warm_up(self._wanted.pop(next(iter(self._wanted))))

    async def _warm_up(self, stored: StoredLayer) -> None:
        self._done.add(stored.key)
        try:
            size = stored.path.stat().st_size
            if self._free_bytes() < ROOM * size:
                log.info("not_warmed_up", layer=stored.layer, reason=f"less than {ROOM * size} bytes are free")
                return
            model = await asyncio.to_thread(LayerFiles, {stored.layer: stored.path}, stored.in_use)
            await self._stage.warm_up(model, stored.layer, stored.weights)
        except (MdiqError, OSError, RuntimeError, ValueError, LookupError, MemoryError) as error:
            # A take-over will tell what is wrong, if it comes to one.
            log.warning("not_warmed_up", layer=stored.layer, reason=str(error)[:300])

    def _free_bytes(self) -> int:
        limit = self._max_bytes()
        free = machine_free_bytes()
        return free if limit is None else min(free, limit - rss_bytes())
