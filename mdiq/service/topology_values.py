"""What a topology file means to the runtime, which reads no files: model, threads, Nodes, endpoints and keys."""

import os
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path

from mdiq.config.addresses import machine_of
from mdiq.config.load import LoadedTopology
from mdiq.config.topology import Node, Topology
from mdiq.core.types import WeightSettings
from mdiq.errors import ConfigError
from mdiq.plan.privacy import promised
from mdiq.runtime.options import RemoteNode, RemoteRing, RingPeers
from mdiq.runtime.placement import usable_threads
from mdiq.transport.keys import private_of, public_of


class Needs(StrEnum):
    """What a service needs to follow a topology that has changed."""

    NOTHING = "nothing"
    RELOAD = "reload"
    RESTART = "restart"


def needs_of(old: Topology, new: Topology, name: str) -> Needs:
    """Return what the service of a node needs when its topology file changes in a value that it reads."""
    try:
        before, now = old.node(name), new.node(name)
    except KeyError:
        return Needs.RESTART
    if before.is_starter != now.is_starter or threads_of(old, before) != threads_of(new, now):
        return Needs.RESTART
    if now.is_starter:
        fixed = [(t.model.path, t.model.name, t.api) for t in (old, new)]
        if fixed[0] != fixed[1]:
            return Needs.RESTART
        return Needs.NOTHING if old == new else Needs.RELOAD
    read = [(_all_nodes(t), t.node(name), t.starter, t.security) for t in (old, new)]
    return Needs.NOTHING if read[0] == read[1] else Needs.RELOAD


def model_of(loaded: LoadedTopology) -> str:
    """Return what the file calls its model: a path beside the file before a known name."""
    named = loaded.topology.model.path
    beside = loaded.file.parent / Path(os.path.expanduser(named))
    return str(beside) if beside.exists() else named


def weights_of(topology: Topology) -> WeightSettings:
    """Return how the Nodes hold their weights; the device is the Starter's."""
    model = topology.model
    return WeightSettings(model.weights, model.dtype, model.mode == "exact", topology.starter.device)


def wires_of(topology: Topology) -> tuple[str, ...]:
    """Return the wanted format of each Hop."""
    wires = tuple(topology.wire_of(*hop) for hop in topology.hops)
    return wires[:1] if len(set(wires)) == 1 else wires


def threads_of(topology: Topology, node: Node) -> int:
    """Return the threads of a Node: as the file says, else its share of the machine that this is."""
    sharing = _nodes_by_machine(topology)[machine_of(node.address)]
    return node.threads or max(usable_threads() // sharing, 1)


def secret_of(loaded: LoadedTopology, node: Node) -> bytes | None:
    """Return a Node's private key, or None in plain text.

    Raises:
        ConfigError: it cannot be used.
    """
    topology = loaded.topology
    if topology.is_plain_text:
        return None
    folder = loaded.path(topology.security.keys)
    secret = private_of(folder, node.name)
    if public_of(secret) != node.public_key:
        raise ConfigError(
            f"{node.name}: its private key is not the one of public_key in {loaded.file}; copy both from where "
            "mdiq keys made them"
        )
    return secret


def remote_ring(loaded: LoadedTopology, join_wait_s: float) -> RemoteRing:
    """Return the Ring as its Starter reaches it.

    Raises:
        ConfigError: the Starter's private key cannot be used.
    """
    topology = loaded.topology
    starter = topology.starter
    limit = topology.links.transfer_limit_bit_per_s
    return RemoteRing(
        nodes=remote_nodes(topology, topology.ring_nodes, with_noise=True),
        control_endpoint=starter.control_endpoint,
        weights_endpoint=starter.weights_endpoint,
        secret=secret_of(loaded, starter),
        insecure=topology.security.insecure,
        join_wait_s=join_wait_s,
        transfer_bytes_per_s=None if limit is None else limit / 8,
    )


def node_of(loaded: LoadedTopology, name: str) -> tuple[Node, int]:
    """Return the worker of that name, and its threads.

    Raises:
        ConfigError: there is none, or it is the Starter.
    """
    if not name:
        raise ConfigError("mdiq node: which node is this? give --name NAME, or set MDIQ_NAME")
    try:
        node = loaded.topology.node(name)
    except KeyError:
        known = ", ".join(node.name for node in loaded.topology.nodes if not node.is_starter)
        raise ConfigError(f"--name {name}: {loaded.file} has no such node; its workers are {known}") from None
    if node.is_starter:
        raise ConfigError(f"--name {name}: it is the Starter; start it by mdiq run --topology {loaded.file}")
    return node, threads_of(loaded.topology, node)


def peers_of(loaded: LoadedTopology, name: str) -> RingPeers:
    """Return the Ring as one of its workers reaches it.

    Raises:
        ConfigError: the worker's private key cannot be used.
    """
    topology = loaded.topology
    return RingPeers(
        nodes=_all_nodes(topology),
        weights_endpoint=topology.starter.weights_endpoint,
        secret=secret_of(loaded, topology.node(name)),
        insecure=topology.security.insecure,
    )


def remote_nodes(topology: Topology, nodes: Iterable[Node], *, with_noise: bool = False) -> tuple[RemoteNode, ...]:
    """Return nodes of a topology as the others of its Ring know them; ``with_noise`` as the Starter does.

    Raises:
        ConfigError: there is noise, and no package to compute it.
    """
    shares = _nodes_by_machine(topology)
    return tuple(
        RemoteNode(
            node.name,
            node.data_endpoint,
            None if topology.is_plain_text else node.public_key,
            device=node.device,
            memory_share=1 / shares[machine_of(node.address)],
            memory_bytes=node.memory_bytes,
            keeps_standby_layers=node.standby_layers == "auto",
            noise=promised(node.noise.epsilon, node.noise.delta, node.noise.clip)
            if with_noise and node.noise is not None
            else None,
        )
        for node in nodes
    )


def _all_nodes(topology: Topology) -> tuple[RemoteNode, ...]:
    return remote_nodes(topology, (*topology.ring_nodes, *topology.spares))


def _nodes_by_machine(topology: Topology) -> Mapping[str, int]:
    machines = [machine_of(node.address) for node in topology.nodes if not node.spare]
    return {machine_of(node.address): max(machines.count(machine_of(node.address)), 1) for node in topology.nodes}
