"""What recovery.py wants of a Ring that can become another one."""

from collections.abc import Collection
from math import inf
from typing import Protocol

from mdiq.runtime.options import RingOptions


class ChangingRing(Protocol):
    """A Ring that can become another one; ServingRing is one.

    options: what it is now.
    """

    @property
    def options(self) -> RingOptions: ...
    def absent(self, options: RingOptions) -> set[str]:
        """Return the Nodes of a Ring that are not here."""
        ...

    def lacks(self, options: RingOptions) -> bool:
        """Whether a Node of a Ring would have to fetch Layers first, as far as is known."""
        ...

    def taken_over(
        self, lost: Collection[str], *, unfit: Collection[str] = (), max_fetch_s: float | None = inf
    ) -> RingOptions | None:
        """Return the Ring without these Nodes, or None.

        unfit: Nodes whose memory is too small. max_fetch_s: how long survivors may fetch Layers; None: only spares.
        """
        ...

    async def reform(self, options: RingOptions) -> None:
        """Be another Ring from now on; nobody loads yet."""
        ...

    async def reload(self) -> None:
        """Have all Nodes hold what they are to hold."""
        ...

    @property
    def rounds(self) -> bool:
        """Whether Hops round activations: another cut between the Layers gives other tokens."""
        ...

    @property
    def holds_what_runs(self) -> bool:
        """Whether the KV cache, as it is loaded, is large enough for each request that runs."""
        ...

    async def begin_again(self) -> None:
        """Begin the next Epoch, and replay."""
        ...
