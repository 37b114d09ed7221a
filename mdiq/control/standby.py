"""Nodes that a Ring goes without, at the Starter: spares, drained ones, those that the plan leaves out.

They join and are told why they have no Layers; when the Ring ends they are drained, since the next one may have work
for them. Which Nodes these are is for service/topology_rings.py, what they do meanwhile for runtime/node.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mdiq.core import control
from mdiq.core.types import NodeId


@dataclass(frozen=True, slots=True)
class StandingBy:
    """A Node that has no Layers now, and why: the topology, the plan or an operator wants it so.

    is_left_out: it is the plan.
    """

    name: str
    public_key: str | None
    reason: str
    is_left_out: bool = False

    @property
    def message(self) -> control.StandBy:
        """What it is told when it joins."""
        return control.StandBy(self.reason)

    @property
    def status(self) -> dict[str, object]:
        """What `mdiq status` shows of it."""
        return {"name": self.name, "state": "stands by", "reason": self.reason}


class Standby:
    """The Nodes that stand by, and where those that have joined speak from."""

    def __init__(self, nodes: Iterable[StandingBy] = ()) -> None:
        self._nodes: dict[str, StandingBy] = {}
        self._joined: dict[str, bytes] = {}
        self.replace(nodes)

    def __contains__(self, node: str) -> bool:
        return node in self._nodes

    @property
    def identities(self) -> list[bytes]:
        """Where those that have joined speak from."""
        return list(self._joined.values())

    def replace(self, nodes: Iterable[StandingBy]) -> None:
        """Have other Nodes stand by; those that do no more are strangers from now on."""
        self._nodes = {node.name: node for node in nodes}
        self._joined = {name: identity for name, identity in self._joined.items() if name in self._nodes}

    def join(self, node: NodeId, identity: bytes) -> control.StandBy:
        """Note that one of them has joined; return what it is to be told."""
        self._joined[node] = identity
        return self._nodes[node].message


def left_out_text(nodes: Sequence[StandingBy]) -> str:
    """Return which Nodes the plan leaves out, and what to do: the operator has brought them up, and may want them."""
    left_out = ", ".join(f"{node.name} ({node.reason.rpartition(': ')[2]})" for node in nodes if node.is_left_out)
    return f"; stand by: {left_out}; layers by hand or --even-split use all" if left_out else ""
