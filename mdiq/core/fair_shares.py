"""Whose Sequence enters the Ring next: one of the owner that has had the fewest tokens lately. Pure.

An owner's count is of the prompt tokens that entered and the answer tokens that came, divided by its share. These are
the virtual token counters of Sheng et al. 2024, "Fairness in Serving Large Language Models", algorithm 2.

Nobody saves up turns: an owner that has nothing waiting rises with the floor, which is the lowest count of those that
waited when a Sequence last entered (the virtual time of start-time fair queueing, Goyal et al. 1996). While nothing
waits, turns do not matter: whoever waits first then raises the floor to the lowest count of those that are at work.
"""

from collections.abc import Collection

_KEPT_OWNERS = 64


class FairShares:
    """The tokens that each owner has had, as far as they matter for the next turn."""

    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        self._floor = 0.0

    def had(self, owner: str) -> float:
        """Return an owner's count; the lowest comes first."""
        return max(self._had.get(owner, self._floor), self._floor)

    def raise_floor(self, owners: Collection[str]) -> None:
        """Note whose counts matter: of those that wait, before one enters; of those at work, when the first waits."""
        self._floor = max(self._floor, min(map(self.had, owners), default=self._floor))

    def took(self, owner: str, share: int, num_tokens: int) -> None:
        """Count tokens of an owner."""
        if owner not in self._had and len(self._had) >= _KEPT_OWNERS:
            # A count at the floor is that of an owner that was never here.
            self._had = {other: had for other, had in self._had.items() if had > self._floor}
        self._had[owner] = self.had(owner) + num_tokens / share
