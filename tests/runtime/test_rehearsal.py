"""A rehearsal tells what the model makes of a known text, and gives the sampler back."""

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
import torch

from mdiq.core.frame import Payload, TokenIds
from mdiq.core.sequence import FinishReason, Sequence, TokenEvent
from mdiq.errors import EngineError
from mdiq.runtime.rehearsal import ANSWER_TOKENS, NUM_PIECES, NUM_TOKENS, PIECE_TOKENS, rehearse
from mdiq.runtime.starter_service import StarterService, StreamEvent
from mdiq.runtime.starter_stage import TorchStarter


class Runner:
    """Logits that name their place: the payload's first token id."""

    def logits(self, rows: list[Payload]) -> torch.Tensor:
        return torch.tensor([[float(cast(TokenIds, row).ids[0]), 0.0] for row in rows])


class Service:
    """Streams what the engine says, one token at a time; ``error``: of the last Sequence."""

    def __init__(self, engine: TorchStarter, error: EngineError | None = None) -> None:
        self._engine = engine
        self._error = error
        self.asked: list[Sequence] = []

    async def stream(self, sequence: Sequence) -> AsyncIterator[StreamEvent]:
        self.asked.append(sequence)
        if self._error is not None and sequence.index == NUM_PIECES - 1:
            yield StreamEvent(TokenEvent(sequence.index, None, 0, FinishReason.ERROR, self._error), "", 0.0)
            return
        reason = None
        while reason is None:
            place = sequence.index * PIECE_TOKENS + sequence.num_tokens
            token = self._engine.sample([TokenIds((place,))], [sequence])[0].token
            reason = sequence.append(token)
            yield StreamEvent(TokenEvent(sequence.index, token, sequence.num_tokens, reason), "", 0.0)


def _engine() -> TorchStarter:
    return TorchStarter(cast(Any, Runner()))


async def test_the_text_goes_round_whatever_the_model_would_say() -> None:
    engine = _engine()
    service = Service(engine)
    tokens = [1_000 + i for i in range(NUM_TOKENS)]
    logits = await rehearse(cast(StarterService, service), engine, tokens)
    for i, sequence in enumerate(service.asked):
        assert list(sequence.tokens(0, sequence.num_tokens)) == tokens[i * PIECE_TOKENS : (i + 1) * PIECE_TOKENS]
    answered = range(PIECE_TOKENS - ANSWER_TOKENS, PIECE_TOKENS)
    assert logits[:, 0].tolist() == [i * PIECE_TOKENS + place for i in range(NUM_PIECES) for place in answered]
    assert engine.script is None


async def test_a_ring_that_fails_ends_the_rehearsal_and_the_sampler_is_back() -> None:
    engine = _engine()
    with pytest.raises(EngineError, match="node-1: not a number"):
        await rehearse(
            cast(StarterService, Service(engine, EngineError("node-1: not a number"))), engine, [0] * NUM_TOKENS
        )
    assert engine.script is None
