"""What has gone wrong in one recovery: which Nodes were lost, which could not do what was wanted of them."""

from collections.abc import Sequence

from mdiq.errors import CrampedError, KeyRevokedError, MdiqError, NodeDiedError

MAX_LOSSES = 5
"""In one recovery. A Node that dies each time that it loads would otherwise hold up what runs for ever."""


class Losses:
    """The losses of what is done now; forgotten when that is done.

    unfit: Nodes that could not do what another Ring wanted of them. broken: that could not do again what they did in
    the one that served: they are back without their disk, or their memory.
    has_waited: for so long that a smaller Ring is better than none.
    """

    def __init__(self) -> None:
        self._errors: list[MdiqError] = []
        self.unfit: set[str] = set()
        self._cramped: set[str] = set()  # of these, the ones that could, with too little KV cache for what runs
        self.broken: set[str] = set()
        self.has_waited = False

    def __len__(self) -> int:
        return len(self._errors)

    @property
    def first(self) -> MdiqError:
        """The one that it began with."""
        return self._errors[0]

    @property
    def last(self) -> MdiqError:
        """The newest one."""
        return self._errors[-1]

    def add(self, error: MdiqError) -> NodeDiedError | None:
        """Note one; return an error if there have been too many."""
        self._errors.append(error)
        number = sum(not isinstance(each, KeyRevokedError) for each in self._errors)
        if number <= MAX_LOSSES:
            return None
        return NodeDiedError(f"{error}; it is loss number {number} in one recovery")

    def is_again(self, name: str) -> bool:
        """Whether a Node has been lost before: it is back since then."""
        return any(error.node == name for error in self._errors)

    def note_unfit(self, error: MdiqError, names: Sequence[str]) -> None:
        """Note who could not do what another Ring wanted. names: of that Ring; the first is the Starter.

        A Starter that fails again fails with the Layers that it had: it is the Ring that cannot.
        """
        is_again = error.node is None and names[0] in self.unfit
        new = {*names} if is_again else {error.node or names[0]}
        if isinstance(error, CrampedError):
            self._cramped |= new - self.unfit
        self.unfit |= new

    def note_waited(self) -> None:
        """Note that a smaller Ring is better than none from now on."""
        self.has_waited = True
        self.unfit -= self._cramped

    def is_silent(self, name: str) -> bool:
        """Whether a Node that is missing may live, as far as is known."""
        loss = next((error for error in reversed(self._errors) if error.node == name), None)
        return isinstance(loss, NodeDiedError) and loss.is_silent

    def not_back(self, missing: Sequence[str], waited_s: float) -> NodeDiedError:
        """Return why what runs has to end: the loss of a Node that is still missing."""
        loss = next((error for error in reversed(self._errors) if error.node in missing), self.last)
        return NodeDiedError(f"{loss}; it is not back after {waited_s:g} s")

    def forget(self) -> None:
        """Begin anew."""
        self._errors.clear()
        self.unfit.clear()
        self._cramped.clear()
        self.broken.clear()
        self.has_waited = False
