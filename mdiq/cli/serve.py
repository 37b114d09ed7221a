"""`mdiq serve`: the process of a Starter's service."""

from pathlib import Path
from typing import NoReturn

from mdiq.cli.signals import LOADS_PROGRAM, READS, run_service
from mdiq.config.load import load_topology
from mdiq.runtime.lifecycle import Notifier
from mdiq.runtime.placement import set_threads
from mdiq.service.topology_values import secret_of, threads_of


def serve(file: Path, *, even_split: bool = False) -> NoReturn:
    """Serve until a signal comes; end the process then."""
    notifier = Notifier.from_environment()
    notifier.starting(f"{READS} {file.name}")
    loaded = load_topology(file)
    starter = loaded.topology.starter
    secret_of(loaded, starter)  # a wrong key is reported before torch is loaded
    threads = threads_of(loaded.topology, starter)
    set_threads(threads)
    notifier.starting(LOADS_PROGRAM)
    from mdiq.service.starter import TopologyService

    run_service(TopologyService(loaded, threads, notifier, even_split=even_split).run())
