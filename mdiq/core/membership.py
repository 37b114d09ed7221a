"""The Nodes of the Ring and their states: a table of Leases. No clock of its own, no sockets.

state      event      next
JOINING    assigned   LOADING
LOADING    ready      READY
READY      begun      SERVING    (and again in each later Epoch)
LOADING    assigned   LOADING    (anew, in a later Epoch)
READY      assigned   LOADING
SERVING    assigned   LOADING    (other layers, or other neighbours)
any        set aside  STANDING_BY
STANDING_BY assigned  LOADING
any        lost       LOST       (its Lease ended, or its process did)
LOST       joined     JOINING    (the same name, a new process)
"""

from dataclasses import dataclass
from enum import StrEnum

from mdiq.core.types import NodeId
from mdiq.errors import RemoteProtocolError


class NodeState(StrEnum):
    """Where a Node stands on its way into the Ring."""

    JOINING = "joining"
    LOADING = "loading"
    READY = "ready"
    SERVING = "serving"
    STANDING_BY = "standing by"
    LOST = "lost"


_NEXT = {
    ("joined", NodeState.LOST): NodeState.JOINING,
    ("assigned", NodeState.JOINING): NodeState.LOADING,
    ("assigned", NodeState.LOADING): NodeState.LOADING,
    ("assigned", NodeState.READY): NodeState.LOADING,
    ("assigned", NodeState.SERVING): NodeState.LOADING,
    ("assigned", NodeState.STANDING_BY): NodeState.LOADING,
    ("ready", NodeState.LOADING): NodeState.READY,
    ("begun", NodeState.READY): NodeState.SERVING,
    ("begun", NodeState.SERVING): NodeState.SERVING,
}


@dataclass(slots=True)
class Member:
    """One Node as the Starter knows it. ``heard_at`` is a time on the caller's clock."""

    node: NodeId
    state: NodeState
    heard_at: float


class Membership:
    """The table of Nodes. A heartbeat renews a Lease by ``lease_s`` seconds, or by ``silence_s`` for a Node that serves
    or stands by.

    Importing torch, loading and compiling starve the heartbeats of a small device; serving does not.
    """

    def __init__(self, lease_s: float, silence_s: float) -> None:
        self._lease_s = lease_s
        self._silence_s = silence_s
        self._members: dict[NodeId, Member] = {}
        self._has_served = False

    def joined(self, node: NodeId, now: float) -> None:
        """Enter a Node.

        Raises:
            RemoteProtocolError: a live Node of that name is in the table.
        """
        if node in self._members:
            self._step(node, "joined")
        self._members[node] = Member(node, NodeState.JOINING, now)

    def assigned(self, node: NodeId) -> None:
        """Note that the Node was assigned layers."""
        self._step(node, "assigned")

    def set_aside(self, node: NodeId) -> None:
        """Note that a Node that is here has no work: the Ring goes without it."""
        self._members[node].state = NodeState.STANDING_BY

    def ready(self, node: NodeId) -> None:
        """Note that the Node has loaded.

        Raises:
            RemoteProtocolError: it was not assigned any layers.
        """
        self._step(node, "ready")

    def begun(self, node: NodeId) -> None:
        """Note that the Node serves.

        Raises:
            RemoteProtocolError: it has not loaded.
        """
        self._step(node, "begun")
        self._has_served = True

    @property
    def has_served(self) -> bool:
        """Whether the Ring has begun an Epoch: it can go on without a Node then, which a Ring that forms cannot."""
        return self._has_served

    @property
    def min_lease_s(self) -> float:
        """How long the shortest Lease is."""
        return min(self._lease_s, self._silence_s)

    def lease_s(self, node: NodeId) -> float:
        """Return how long a Node may say nothing."""
        is_idle = self.state(node) in (NodeState.SERVING, NodeState.STANDING_BY)
        return self._silence_s if is_idle else self._lease_s

    def heard(self, node: NodeId, now: float) -> None:
        """Renew a Lease; an expired one stays expired until the Node joins again."""
        member = self._members.get(node)
        if member is not None and member.state is not NodeState.LOST:
            member.heard_at = now

    def lost(self, node: NodeId) -> None:
        """Note that the Node's process has ended."""
        self._members[node].state = NodeState.LOST

    def forget(self, node: NodeId) -> None:
        """Take a Node out of the table."""
        self._members.pop(node, None)

    def present(self) -> list[NodeId]:
        """Return the Nodes that are not lost."""
        return [node for node, member in self._members.items() if member.state is not NodeState.LOST]

    def expire(self, now: float) -> list[tuple[NodeId, float]]:
        """Return the Nodes whose Lease has just ended, and how long it was; from now on they are lost."""
        leases_s = [(node, self.lease_s(node)) for node in self.present()]
        ended = [(node, lease_s) for node, lease_s in leases_s if self._members[node].heard_at + lease_s <= now]
        for node, _ in ended:
            self._members[node].state = NodeState.LOST
        return ended

    def stretch(self, late_s: float, now: float) -> None:
        """Make all Leases longer by the time for which the watcher itself was stopped and heard no Node.

        What had come by then may have been heard since: that Node's Lease is whole already.
        """
        for member in self._members.values():
            member.heard_at = min(member.heard_at + late_s, now)

    def silent_s(self, node: NodeId, now: float) -> float:
        """Return the seconds since a Node was last heard; 0 for one that never joined."""
        member = self._members.get(node)
        return 0.0 if member is None else now - member.heard_at

    def state(self, node: NodeId) -> NodeState | None:
        """Return the state of a Node, or None when it never joined."""
        member = self._members.get(node)
        return None if member is None else member.state

    def _step(self, node: NodeId, event: str) -> None:
        state = self.state(node)
        following = None if state is None else _NEXT.get((event, state))
        if following is None:
            raise RemoteProtocolError(f"node {node}: {event!r} while {state or 'unknown'} is out of order")
        self._members[node].state = following
