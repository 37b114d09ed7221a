"""Finds the Nodes that are gone: their Lease has ended, or their connection has."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

import structlog

from mdiq.core.membership import Membership, NodeState
from mdiq.core.types import NodeId

log = structlog.get_logger()

WATCH_S = 0.4
LATE_S = 0.5  # of the watcher; less than that hides no heartbeat
SILENT_S = 3.0  # three heartbeats
UNREACHED_S = 0.3  # a connection that is made anew, because another's key was revoked, is back by then
CHANGING_S = 1.0  # the same while the Ring changes: both ends have much to do then


class NodeWatch:
    """Watches the Nodes of a table of Leases.

    ping: sends a Node something; returns whether it has a connection. It ends with a process at once, and not with the
    power of a device. on_gone: called with a Node, why it is taken for gone, and whether it is only silent; it may be
    heard again.
    """

    def __init__(
        self,
        members: Membership,
        *,
        clock: Callable[[], float],
        ping: Callable[[NodeId], Awaitable[bool]],
        on_gone: Callable[[NodeId, str, bool], None],
    ) -> None:
        self._members = members
        self._clock = clock
        self._ping = ping
        self._on_gone = on_gone
        self._unreached: dict[NodeId, float] = {}  # Nodes without a connection, and since when

    async def run(self) -> NoReturn:
        """Watch until cancelled."""
        members = self._members
        time_of, pause_s = asyncio.get_running_loop().time, min(members.min_lease_s / 4, WATCH_S)
        while True:
            due_s = time_of() + pause_s
            await asyncio.sleep(pause_s)
            # This process may have been stopped, with its machine or alone: silence of that time is its own.
            if (late_s := time_of() - due_s) > LATE_S:
                log.warning("watcher_late", late_s=round(late_s, 1))
                members.stretch(late_s, self._clock())
                self._unreached.clear()
            for node in members.present():
                # One that has joined and has no work yet may be started anew, and nobody loses anything.
                if members.state(node) is not NodeState.JOINING and await self._has_no_connection(node):
                    self._on_gone(node, "its connection has ended, most likely with its process; see its log", False)
            for node, lease_s in members.expire(self._clock()):
                self._on_gone(node, f"no heartbeat for {lease_s:g} s; it hangs or its link is down", True)

    async def _has_no_connection(self, node: NodeId) -> bool:
        if await self._ping(node):
            self._unreached.pop(node, None)
            return False
        patience_s = SILENT_S  # a Ring that forms ends with a Node
        if self._members.has_served:
            patience_s = UNREACHED_S if self._members.state(node) is NodeState.SERVING else CHANGING_S
        since_s = self._unreached.setdefault(node, self._clock())
        if self._clock() - since_s < patience_s:
            return False
        self._unreached.pop(node, None)
        return True
