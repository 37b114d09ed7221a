"""What is wrong with a topology: a place among its values, and later a line of its file."""

from dataclasses import dataclass

Loc = tuple[str | int, ...]
"""A place among the values, as keys and list indices: ``("nodes", 1, "layers")``."""

OTHER_PLACE = "{place}"
"""In a Problem's text: replaced by the line of the other place that is meant."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A value that cannot be, or that will hurt.

    text: what, and what to do. others: places that it depends on; the first is the other place that text names.
    """

    loc: Loc
    text: str
    others: tuple[Loc, ...] = ()

    def __str__(self) -> str:
        text = self.text.replace(OTHER_PLACE, path_of(self.others[0])) if self.others else self.text
        return f"{path_of(self.loc)}: {text}" if self.loc else text


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """A Problem with its line in the file, counted from 1; ``path`` is empty where it is about the file."""

    line: int
    path: str
    message: str

    def render(self, file: str) -> str:
        """Return the line that an operator reads."""
        return f"{file}:{self.line} {self.path}: {self.message}" if self.path else f"{file}:{self.line}: {self.message}"


def path_of(loc: Loc) -> str:
    """Return a place as an operator reads it: ``nodes[1].layers``."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
