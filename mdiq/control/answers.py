"""What Nodes were asked and have not answered yet, by Node, kind of answer and number."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from mdiq.core import control
from mdiq.core.types import NodeId
from mdiq.errors import MdiqError, TransportError
from mdiq.transport.base import ControlServer

T = TypeVar("T")
A = TypeVar("A", control.Ready, control.Begun, control.Fetched, control.BurstSent, control.BurstArrived)


class Answers:
    """A future for each answer; a future that its caller cancels is forgotten, and what comes for it is ignored."""

    def __init__(self) -> None:
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


async def not_sent(server: ControlServer, identity: bytes, data: bytes) -> str:
    """Send something to a Node; return why that cannot be, or an empty text."""
    try:
        await server.send(identity, data)
    except TransportError as error:
        return str(error)
    return ""


def fail(future: "asyncio.Future[Any]", error: MdiqError) -> None:
    """End a future with an error that is also told elsewhere: nobody has to look at it."""
    if not future.done():
        future.set_exception(error)
        future.exception()
