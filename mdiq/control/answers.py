"""What Nodes were asked and have not answered yet, by Node, kind of answer and number."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from mdiq.core import control
from mdiq.core.types import NodeId
from mdiq.errors import MdiqError

T = TypeVar("T")
A = TypeVar("A", control.Ready, control.Begun, control.Fetched, control.BurstSent, control.BurstArrived)


STALL_S = 120.0
"""A Node that is heard may stand still for so long: it neither answers nor gets on with what it loads or fetches."""
MEASURE_S = 600.0
"""The same if it measures what it has loaded, of which it says nothing."""


class Patience:
    """Finds the Nodes that live and stand still with what they were asked. steps: how often each has got on.

    It counts the time that was waited for them, not a clock: this process may have been stopped itself.
    """

    def __init__(self, requests: Mapping[NodeId, control.Message], steps: Mapping[NodeId, int]) -> None:
        self._requests = requests
        self._steps = steps
        self._seen = {node: steps.get(node, 0) for node in requests}
        self._still_s = dict.fromkeys(requests, 0.0)

    def ended(self, waited_s: float, waiting: Iterable[NodeId]) -> dict[NodeId, str]:
        """Return which of these have stood still for too long, after another wait, and what is wrong in words."""
        wrong: dict[NodeId, str] = {}
        for node in waiting:
            steps, request = self._steps.get(node, 0), self._requests[node]
            self._still_s[node] = self._still_s[node] + waited_s if steps == self._seen[node] else 0.0
            self._seen[node] = steps
            measures = isinstance(request, control.Assign) and request.measures
            if self._still_s[node] >= (MEASURE_S if measures else STALL_S):
                what = f"{type(request).__name__} for {self._still_s[node]:g} s"
                wrong[node] = f"it lives, and has not got on with {what}; see its log, and restart it"
        return wrong


class Answers:
    """A future for each answer; a future that its caller cancels is forgotten, and what comes for it is ignored.

    steps: how often each Node has got on with what it was asked, as far as it has said.
    """

    def __init__(self) -> None:
        self.steps: Counter[NodeId] = Counter()
        self._awaited: dict[tuple[NodeId, type[control.Message], int], asyncio.Future[Any]] = {}

    def expect(self, node: NodeId, kind: type[A], number: int) -> "asyncio.Future[A]":
        """Return a future of the answer of this kind and number."""
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        key = (node, kind, number)
        self._awaited[key] = future
        future.add_done_callback(lambda _: self._awaited.pop(key, None))
        return future

    def came(self, node: NodeId, number: int, answer: control.Message) -> bool:
        """Hand an answer to whoever waits for it; return whether anybody does."""
        future = self._awaited.get((node, type(answer), number))
        if future is None or future.done():
            return False
        future.set_result(answer)
        return True

    def fail(self, node: NodeId, error: MdiqError) -> None:
        """End every wait for a Node with an error."""
        for (whom, _, _), future in list(self._awaited.items()):
            if whom == node:
                fail(future, error)


async def all_of(
    futures: Mapping[NodeId, "asyncio.Future[T]"], gone: Sequence["asyncio.Future[MdiqError]"]
) -> dict[NodeId, T]:
    """Return what every Node answers, or raise why the first of them is gone.

    A caller that gives up does not end the futures: they tell who is missing.
    """
    while not any(each.done() for each in gone) and not all(future.done() for future in futures.values()):
        waiting: list[asyncio.Future[Any]] = [future for future in futures.values() if not future.done()]
        await asyncio.wait([*waiting, *gone], return_when=asyncio.FIRST_COMPLETED)
    for each in gone:
        if each.done():
            raise each.result()
    return {node: future.result() for node, future in futures.items()}


def fail(future: "asyncio.Future[Any]", error: MdiqError) -> None:
    """End a future with an error that is also told elsewhere: nobody has to look at it."""
    if not future.done():
        future.set_exception(error)
        future.exception()
