"""Nodes that a Ring goes without, at the Starter: spares, drained ones, those that the plan leaves out.

They join and are told why they have no Layers. Some may take over from a Node that is lost; when the Ring ends they are
drained, since the next one may have work for them. Which Nodes these are is for service/topology_rings.py, what they do
meanwhile for runtime/node.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mdiq.core import control
from mdiq.core.noise import NoisePromise


@dataclass(frozen=True, slots=True)
class StandingBy:
    """A Node that has no Layers now, and why: the topology, the plan or an operator wants it so.

    is_left_out: it is the plan. noise: what is promised of the rows that it has seen, if it was in a Ring.
    """

    name: str
    public_key: str | None
    reason: str
    is_left_out: bool = False
    noise: NoisePromise | None = None

    @property
    def message(self) -> control.StandBy:
        """What it is told when it joins, or is set aside."""
        return control.StandBy(self.reason)

    @property
    def status(self) -> dict[str, object]:
        """What `mdiq status` shows of it."""
        return {"name": self.name, "state": "stands by", "reason": self.reason}


def left_out_text(nodes: Sequence[StandingBy]) -> str:
    """Return which Nodes the plan leaves out, and what to do: the operator has brought them up, and may want them."""
    left_out = ", ".join(f"{node.name} ({node.reason.rpartition(': ')[2]})" for node in nodes if node.is_left_out)
    return f"; stand by: {left_out}; layers by hand or --even-split use all" if left_out else ""
