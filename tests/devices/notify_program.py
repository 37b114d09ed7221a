"""Stands in for `mdiq node` in a unit: reports a start, gets ready when a file appears, beats, drains, reloads.

Runs on the device, with the installed mdiq. What it computes is nothing; how it lives is mdiq/runtime/lifecycle.py.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

from mdiq.runtime.lifecycle import Notifier, Watchdog, serve_until_signal, watchdog_interval_s
from mdiq.telemetry import logging

FOLDER = Path(os.environ["STATE_DIRECTORY"])
"""Of the service: ``ready`` there lets it get ready, ``stuck`` makes its compute loop stand still."""


class ComputeLoop:
    """A compute loop that always has work."""

    def __init__(self) -> None:
        self.progress_s = time.monotonic()

    async def run(self) -> None:
        while True:
            if not (FOLDER / "stuck").exists():
                self.progress_s = time.monotonic()
            await asyncio.sleep(0.2)


async def main() -> None:
    logging.configure("info", node=sys.argv[1])
    notifier = Notifier.from_environment()
    compute = ComputeLoop()
    interval_s = watchdog_interval_s()
    assert interval_s is not None, "the unit has a watchdog"
    watchdog = Watchdog(notifier, interval_s, has_work=lambda: True, last_progress_s=lambda: compute.progress_s)

    async def start() -> None:
        notifier.starting("loading layers 0-11: 50 %")
        while not (FOLDER / "ready").exists():
            notifier.starting("loading layers 0-11: 62 %")
            await asyncio.sleep(0.2)
        notifier.ready("serving layers 0-11")

    async def serve() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(start())
            tasks.create_task(compute.run())
            tasks.create_task(watchdog.run())

    async def drain() -> None:
        await asyncio.sleep(0.5)

    async def reload() -> None:
        (FOLDER / "reloaded").touch()

    await serve_until_signal(serve(), notifier=notifier, drain=drain, drain_s=10.0, reload=reload)


def write_facts() -> None:
    """Leave for the test what the unit gave this process."""
    key = Path(os.environ["CREDENTIALS_DIRECTORY"], "node.key")
    facts = [os.getuid(), key.stat().st_size, os.environ["MDIQ_CACHE"], os.environ["HOME"]]
    (FOLDER / "facts").write_text(" ".join(map(str, facts)))


write_facts()
asyncio.run(main())
