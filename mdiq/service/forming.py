"""Form a Ring for a command that ends with it, again when a Node dies on the way: nothing is lost by that yet."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import structlog

from mdiq.errors import NodeDiedError

log = structlog.get_logger()

MAX_TRIES = 3
"""A Node that dies each time, for want of memory perhaps, is named after so many."""


class _Enterable(Protocol):
    async def __aenter__(self) -> Any: ...


R = TypeVar("R", bound=_Enterable)


async def formed(open_ring: Callable[[], R]) -> R:
    """Return a Ring that serves; the caller closes it.

    Raises:
        MdiqError: it cannot be formed.
    """
    for num_left in reversed(range(MAX_TRIES)):
        ring = open_ring()
        try:
            await ring.__aenter__()
            return ring
        except NodeDiedError as error:
            if not num_left:
                raise
            log.warning("ring_not_formed", error=str(error), tries_left=num_left)
    raise AssertionError("the last try returns or raises")
