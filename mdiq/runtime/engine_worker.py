"""Where torch meets the loops: the worker's settings, the Starter's engine, and limits that follow from the model."""

from collections.abc import Sequence as AbstractSequence
from typing import Protocol

import torch

from mdiq.core import wire
from mdiq.core.frame import Batch, Payload
from mdiq.core.sequence import Sequence
from mdiq.engine.runner import StageRunner
from mdiq.engine.sampler import SampleRow, sample
from mdiq.runtime.loops import Clock, Worker
from mdiq.telemetry.trace import Tracer


def make_worker(clock: Clock, tracer: Tracer, threads: int) -> Worker:
    """Return the Node's worker; its thread count is set inside the thread too, since torch keeps it per thread."""

    def initialize() -> None:
        torch.set_num_threads(threads)

    return Worker(clock, tracer, initialize)


def wire_limits(runner: StageRunner) -> wire.WireLimits:
    """Return the largest Frame that a Ring of this model may send."""
    return wire.WireLimits(max_width=runner.config.hidden_size, max_context=runner.config.context_tokens)


class Script(Protocol):
    """Knows the tokens before they are drawn."""

    def take(self, logits: torch.Tensor, sequences: AbstractSequence[Sequence]) -> list[int]:
        """Return the next token of each Sequence; logits: [n, vocab_size], what they would have been drawn from."""
        ...


class TorchStarter:
    """The Starter's engine: a StageRunner that owns embedding and head, and the sampler.

    script: draws the tokens instead of the sampler, while there is one.
    """

    def __init__(self, runner: StageRunner) -> None:
        self._runner = runner
        self.script: Script | None = None

    def forward(self, batch: Batch) -> Payload:
        return self._runner.forward(batch)

    def reset(self) -> None:
        self._runner.reset()

    def sample(self, rows: AbstractSequence[Payload], sequences: AbstractSequence[Sequence]) -> list[int]:
        """Return the next token of each Sequence; see starter_service.StarterEngine."""
        logits = self._runner.logits(rows)
        if self.script is not None:
            return self.script.take(logits, sequences)
        sample_rows = [
            SampleRow(
                sequence.params,
                # Only the repetition penalty reads the history.
                sequence.tokens(0, sequence.num_tokens) if sequence.params.repetition_penalty != 1.0 else (),
                sequence.num_tokens,
            )
            for sequence in sequences
        ]
        return sample(logits, sample_rows)
