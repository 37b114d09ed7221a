"""What a topology file means to the runtime, which reads no files: Nodes, endpoints, keys, and flags that it sets."""

import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from mdiq.config.addresses import machine_of
from mdiq.config.load import LoadedTopology
from mdiq.config.topology import Node, Topology
from mdiq.errors import ConfigError
from mdiq.runtime.options import RemoteNode, RemoteRing, RingPeers
from mdiq.runtime.placement import usable_threads
from mdiq.transport.keys import private_of, public_of


class Needs(StrEnum):
    """What a service needs to follow a topology that has changed."""

    NOTHING = "nothing"
    RELOAD = "reload"
    RESTART = "restart"


def needs_of(old: Topology, new: Topology, name: str) -> Needs:
    """Return what the service of a node needs when its topology file changes: of all that is in it, what it reads."""
    try:
        before, now = old.node(name), new.node(name)
    except KeyError:
        return Needs.RESTART
    if before.is_starter != now.is_starter or _threads(old, before) != _threads(new, now):
        return Needs.RESTART
    if now.is_starter:
        fixed = [(t.model.path, t.model.name, t.api) for t in (old, new)]
        if fixed[0] != fixed[1]:
            return Needs.RESTART
        return Needs.NOTHING if old == new else Needs.RELOAD
    read = [(_remote_nodes(t), t.node(name), t.starter, t.security) for t in (old, new)]
    return Needs.NOTHING if read[0] == read[1] else Needs.RELOAD


def flags_of(loaded: LoadedTopology) -> dict[str, Any]:
    """Return the options of `mdiq run` that the file sets, by their names there.

    Raises:
        ConfigError: layers are given by hand for some nodes only.
    """
    topology = loaded.topology
    nodes, model = topology.ring_nodes, topology.model
    by_hand = [node.layers for node in nodes]
    named = Path(os.path.expanduser(model.path))
    beside = loaded.file.parent / named
    following = [*nodes[1:], nodes[0]]
    return {
        "model": str(beside) if beside.exists() else model.path,
        "nodes": len(nodes),
        "layers": ",".join(str(len(layers)) for layers in by_hand if layers is not None) or None,
        "dtype": model.dtype,
        "weights": model.weights,
        "exact": model.mode == "exact",
        "wire": ",".join(topology.wire_of(a.name, b.name) for a, b in zip(nodes, following, strict=True)),
        "device": nodes[0].device,
        "threads": _threads(topology, nodes[0]),
        "decode_wait_ms": topology.ring.decode_wait_s * 1_000,
        "max_live": topology.ring.max_live,
        "prefix_reuse": topology.ring.prefix_reuse,
    }


def remote_ring(loaded: LoadedTopology, join_wait_s: float) -> RemoteRing:
    """Return the Ring as its Starter reaches it.

    Raises:
        ConfigError: the Starter's private key cannot be used.
    """
    topology = loaded.topology
    starter = topology.starter
    limit = topology.links.transfer_limit_bit_per_s
    return RemoteRing(
        nodes=_remote_nodes(topology),
        control_endpoint=starter.control_endpoint,
        weights_endpoint=starter.weights_endpoint,
        secret=_secret(loaded, starter),
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
    return node, _threads(loaded.topology, node)


def peers_of(loaded: LoadedTopology, name: str) -> RingPeers:
    """Return the Ring as one of its workers reaches it.

    Raises:
        ConfigError: the worker's private key cannot be used.
    """
    topology = loaded.topology
    return RingPeers(
        nodes=_remote_nodes(topology),
        weights_endpoint=topology.starter.weights_endpoint,
        secret=_secret(loaded, topology.node(name)),
        insecure=topology.security.insecure,
    )


def _remote_nodes(topology: Topology) -> tuple[RemoteNode, ...]:
    shares = _nodes_by_machine(topology)
    return tuple(
        RemoteNode(
            node.name,
            node.data_endpoint,
            None if topology.is_plain_text else node.public_key,
            device=node.device,
            memory_share=1 / shares[machine_of(node.address)],
            memory_bytes=node.memory_bytes,
        )
        for node in topology.ring_nodes
    )


def _secret(loaded: LoadedTopology, node: Node) -> bytes | None:
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


def _threads(topology: Topology, node: Node) -> int:
    sharing = _nodes_by_machine(topology)[machine_of(node.address)]
    return node.threads or max(usable_threads() // sharing, 1)


def _nodes_by_machine(topology: Topology) -> Mapping[str, int]:
    machines = [machine_of(node.address) for node in topology.nodes if not node.spare]
    return {machine_of(node.address): max(machines.count(machine_of(node.address)), 1) for node in topology.nodes}
