"""`mdiq node`: the process of one Node of a topology; or a child of `mdiq run`, ended by its parent."""

import asyncio
import os
import sys
import threading
from pathlib import Path
from typing import NoReturn

from mdiq.cli.signals import LOADS_PROGRAM, READS, run_service
from mdiq.errors import ConfigError, MdiqError, first_of
from mdiq.runtime.placement import bind_to_core, set_threads

MAX_KEY_CHARACTERS = 128


def serve_topology(file: Path, name: str, *, once: bool) -> NoReturn:
    """Serve ring after ring until a signal comes, or one ring; end the process then."""
    from mdiq.config.load import load_topology
    from mdiq.runtime.lifecycle import Notifier
    from mdiq.service.topology_values import node_of, peers_of

    notifier = Notifier.from_environment()
    notifier.starting(f"{READS} {file.name}")
    loaded = load_topology(file)
    _, threads = node_of(loaded, name)
    peers_of(loaded, name)  # a wrong key is reported before torch is loaded
    set_threads(threads)
    notifier.starting(LOADS_PROGRAM)
    from mdiq.core.control import CHECKSUM_KEY
    from mdiq.runtime.node import NodeOptions
    from mdiq.service.worker import NodeService

    def read() -> NodeOptions:
        loaded = load_topology(file)
        node, _ = node_of(loaded, name)
        control = loaded.topology.starter.control_endpoint
        return NodeOptions(name, control, node.data_endpoint, CHECKSUM_KEY, threads, peers_of(loaded, name))

    run_service(NodeService(read, notifier, once=once).run())


def serve_node(name: str, control: str, listen: str, threads: int, pin: int | None, *, stdin_key: bool) -> int:
    """Serve until drained; return the exit code."""
    if not stdin_key:
        raise ConfigError("mdiq node: no topology; write for example mdiq node topology.yaml --name pi1")
    control_key = _read_key()
    _end_with_stdin()
    set_threads(threads)
    if pin is not None:
        bind_to_core(pin)
    # After set_threads: torch reads the thread count when it is imported.
    from mdiq.runtime.node import NodeOptions, NodeProcess

    try:
        asyncio.run(NodeProcess(NodeOptions(name, control, listen, control_key, threads)).run())
    except* MdiqError as group:
        raise first_of(group) from None
    return 0


def _read_key() -> bytes:
    try:
        return bytes.fromhex(sys.stdin.readline(MAX_KEY_CHARACTERS).strip())
    except ValueError:
        raise ConfigError("mdiq node: the first line of standard input is not a key in hexadecimal") from None


def _end_with_stdin() -> None:
    """End this process at once when the parent's end of the pipe closes, even while torch loads or computes."""

    def wait_for_end() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        # A worker thread inside torch cannot be stopped, and nothing here outlives the process.
        os._exit(0)

    threading.Thread(target=wait_for_end, name="parent-watch", daemon=True).start()
