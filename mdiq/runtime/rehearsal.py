"""A short text through the whole Ring before it serves: what logits come out with these formats on its Hops?

The tokens are known, so the model only tells how likely it finds them: two rehearsals see the same text, whatever they
would have answered. It is cut in pieces that go round together, so a slow link costs few Laps.
"""

import asyncio
from collections.abc import Sequence as AbstractSequence

import torch

from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.errors import MdiqError, first_of
from mdiq.runtime.starter_service import StarterService
from mdiq.runtime.starter_stage import TorchStarter

NUM_PIECES = 2
PIECE_TOKENS = 32
ANSWER_TOKENS = 8
"""Of each piece, its last tokens: as many rows of logits come of it. Those of the first tokens tell less: a model leans
on the very first one, whose row is rounded most."""
NUM_TOKENS = NUM_PIECES * PIECE_TOKENS


class PieceScript:
    """Answers with the text's own tokens and keeps the logits; piece i is the Sequence of index i."""

    def __init__(self, pieces: AbstractSequence[AbstractSequence[int]]) -> None:
        self._pieces = pieces
        self._logits: dict[tuple[int, int], torch.Tensor] = {}

    def take(self, logits: torch.Tensor, sequences: AbstractSequence[Sequence]) -> list[int]:
        """Return the tokens that follow; see starter_stage.Script."""
        places = [(sequence.index, sequence.num_tokens) for sequence in sequences]
        self._logits.update(zip(places, logits, strict=True))
        return [self._pieces[index][position] for index, position in places]

    def logits(self) -> torch.Tensor:
        """Return all logits [n, vocab_size], in the order of the text."""
        return torch.stack([self._logits[place] for place in sorted(self._logits)])


async def rehearse(service: StarterService, engine: TorchStarter, tokens: AbstractSequence[int]) -> torch.Tensor:
    """Run NUM_TOKENS tokens round the Ring, which does nothing else; return logits [n, vocab_size].

    Raises:
        MdiqError: the Ring failed.
    """
    pieces = [tokens[i : i + PIECE_TOKENS] for i in range(0, NUM_TOKENS, PIECE_TOKENS)]
    engine.script = script = PieceScript(pieces)
    params = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
    try:
        async with asyncio.TaskGroup() as tasks:
            for index, piece in enumerate(pieces):
                sequence = Sequence(index, tuple(piece[:-ANSWER_TOKENS]), params)
                tasks.create_task(_finish(service, sequence), name=f"rehearsal-{index}")
    except* MdiqError as group:
        raise first_of(group) from None
    finally:
        engine.script = None
    return script.logits()


async def _finish(service: StarterService, sequence: Sequence) -> None:
    async for event in service.stream(sequence):
        if event.step.error is not None:
            raise event.step.error
