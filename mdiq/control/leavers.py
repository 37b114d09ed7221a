"""Nodes that ask to be drained: they go one after the other, so that others can take over from each."""

import asyncio
from collections.abc import Callable

from mdiq.core.types import NodeId


class Leavers:
    """Who has asked, in that order, and is here still.

    first: a future of the one that is to go next.
    """

    def __init__(self) -> None:
        self._others: dict[NodeId, None] = {}  # a dict for its order
        self._is_over = asyncio.Event()
        self.first: asyncio.Future[NodeId] = asyncio.get_running_loop().create_future()

    @property
    def now(self) -> NodeId | None:
        """The one that is to go next, if there is one."""
        return self.first.result() if self.first.done() else None

    def asks(self, node: NodeId) -> None:
        """Note that a Node asks; it may do so again."""
        if not self.first.done():
            self.first.set_result(node)
        elif node != self.now:
            self._others[node] = None

    def forget(self, node: NodeId) -> None:
        """Note that a Node that waits for its turn is gone, or has been started anew."""
        self._others.pop(node, None)

    def is_over(self, node: NodeId, may_go: Callable[[NodeId], bool]) -> None:
        """Note that a Node has gone, or has been started again and stays; if it was to go, the next one is.

        may_go: whether the Ring has that Node still.
        """
        if self.now != node:
            return
        self.first = asyncio.get_running_loop().create_future()
        self._is_over.set()
        others, self._others = self._others, {}
        for other in filter(may_go, others):
            self.asks(other)

    async def until_over(self) -> None:
        """Wait until it is no longer the same one that is to go."""
        if self.first.done():
            self._is_over.clear()
            await self._is_over.wait()
