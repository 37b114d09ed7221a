"""`mdiq serve`: the process of a Starter's service, of a topology or of a ring on this machine."""

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NoReturn

import yaml

from mdiq.cli.flags import hand_split, parse_wires
from mdiq.cli.ring_commands import RunOptions, ServeOptions
from mdiq.cli.run import DEFAULT_NODES, local_ring
from mdiq.cli.signals import LOADS_PROGRAM, READS, run_service
from mdiq.config.load import LoadedTopology, check_bytes, load_topology
from mdiq.config.topology import VERSION
from mdiq.core.known_models import DEFAULT_MODEL
from mdiq.errors import ConfigError
from mdiq.runtime.lifecycle import Notifier
from mdiq.runtime.placement import set_threads, usable_threads
from mdiq.service.topology_values import secret_of, threads_of
from mdiq.telemetry import logging

_OF_BOTH = ("topology", "even_split", "log_level")


def execute(options: ServeOptions) -> NoReturn:
    """Serve until a signal comes; end the process then."""
    logging.configure(options.log_level, node="starter")
    notifier = Notifier.from_environment()
    if options.topology is None:
        _serve_here(options, notifier)
    for flag in fields(options):
        if flag.name not in _OF_BOTH and getattr(options, flag.name) != flag.default:
            name = flag.name.replace("_", "-")
            raise ConfigError(f"--{name}: {options.topology} says that; write it there, or serve without a topology")
    notifier.starting(f"{READS} {options.topology.name}")
    loaded = load_topology(options.topology)
    starter = loaded.topology.starter
    secret_of(loaded, starter)  # a wrong key is reported before torch is loaded
    threads = threads_of(loaded.topology, starter)
    set_threads(threads)
    notifier.starting(LOADS_PROGRAM)
    from mdiq.service.starter import TopologyService

    run_service(TopologyService(loaded, threads, notifier, even_split=options.even_split).run())


def _serve_here(options: ServeOptions, notifier: Notifier) -> NoReturn:
    if options.even_split:
        raise ConfigError("--even-split: it is for the auto layers of a topology; give one, or leave it out")
    split = hand_split(options.layers, options.nodes)
    num_nodes = len(split) or options.nodes or DEFAULT_NODES
    threads = options.threads or max(usable_threads() // num_nodes, 1)
    loaded = _local_topology(options)
    set_threads(threads)
    ring = RunOptions(
        weights=options.weights, exact=options.exact, kv_tokens=options.kv_tokens, max_live=options.max_live
    )
    make_ring = partial(
        local_ring, ring, split=split or num_nodes, wires=parse_wires(ring.wire, num_nodes), threads=threads
    )
    notifier.starting(LOADS_PROGRAM)
    from mdiq.service.starter import TopologyService

    run_service(TopologyService(loaded, threads, notifier, local_ring=make_ring).run())


def _local_topology(options: ServeOptions) -> LoadedTopology:
    """Return what a file would say of the model and of the API; the ring is not in it."""
    port = options.port or 8080
    api = {"host": options.host or "127.0.0.1", "port": port}
    if options.keys_file is not None:
        api["keys_file"] = str(options.keys_file.absolute())
    model = options.model or DEFAULT_MODEL.name
    whole = {
        "version": VERSION,
        "model": {"path": str(Path(model).absolute()) if Path(model).exists() else model},
        "nodes": [{"name": "node-0", "address": "127.0.0.1", "role": "starter"}],
        "api": api,
        "journal": None if options.journal is None else str(options.journal.absolute()),
    }
    file = Path(f"mdiq serve --port {port}")
    report = check_bytes(yaml.safe_dump(whole).encode(), file)
    if report.topology is None:  # of the flags: the rest is right
        raise ConfigError("; ".join(f"{file}: {finding.path}: {finding.message}" for finding in report.errors))
    return LoadedTopology(report.topology, file)
