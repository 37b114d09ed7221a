"""What a ring is loaded with: users that ask at once, as token ids. One seed, the same prompts to every engine.

Grid cells are made here too, from what the command line lists.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mdiq.testbed.link_shape import LinkShape

FIRST_TOKEN = 3  # the first ids are control tokens in most vocabularies


@dataclass(frozen=True, slots=True)
class Load:
    """``users`` prompts that are asked at once, each answered with exactly ``answer_tokens`` tokens.

    temperature: of the draws; 0 is greedy.
    """

    users: int
    prompt_tokens: int
    answer_tokens: int
    seed: int = 0
    temperature: float = 0.0

    def prompts(self, vocab_size: int) -> tuple[tuple[int, ...], ...]:
        """Return one prompt a user; they differ from their first token on, so that no cache can share them."""
        rng = random.Random(f"{self.seed} {self.users} {self.prompt_tokens}")
        first = min(FIRST_TOKEN, vocab_size - 1)
        starts = rng.sample(range(first, vocab_size), min(self.users, vocab_size - first))
        return tuple(
            (starts[user % len(starts)], *(rng.randrange(first, vocab_size) for _ in range(self.prompt_tokens - 1)))
            for user in range(self.users)
        )


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid: a Load on a ring of ``nodes`` Nodes, with every Hop slowed by ``link``.

    temperature: of the users' requests; 0 is greedy.
    """

    nodes: int
    users: int
    prompt_tokens: int
    link: LinkShape | None = None
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class ApartCell:
    """``rings`` rings of one Node at once, each with a Load of its own of ``users`` users."""

    rings: int
    users: int
    prompt_tokens: int
    temperature: float = 0.0

    @classmethod
    def beside(cls, cell: Cell) -> "ApartCell | None":
        """Return as many rings as a cell has Nodes, with as many users in all; None for one Node and on slowed Hops."""
        if cell.nodes == 1 or cell.link is not None or cell.users % cell.nodes:
            return None
        return cls(cell.nodes, cell.users // cell.nodes, cell.prompt_tokens, cell.temperature)


def grid(
    nodes: Sequence[int],
    users: Sequence[int],
    users_per_node: Sequence[int],
    prompt_tokens: Sequence[int],
    links: Sequence[LinkShape | None] = (None,),
    temperatures: Sequence[float] = (0.0,),
) -> tuple[Cell, ...]:
    """Return the cells to measure, in order and each once.

    With ``users_per_node``, every count of Nodes also gets the users that the smallest ring has: a fixed total beside
    the users that grow with the ring. A ring of one Node has no Hop, hence no link.
    """
    cells: dict[Cell, None] = {}
    for link in links:
        for count in sorted(set(nodes)):
            of_ring = {*users, *(each * size for each in users_per_node for size in (count, min(nodes)))}
            for user in sorted(of_ring):
                for prompt in sorted(set(prompt_tokens)):
                    for temperature in sorted(set(temperatures)):
                        cells[Cell(count, user, prompt, link if count > 1 else None, temperature)] = None
    return tuple(cells)
