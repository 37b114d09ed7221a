"""The Starter's own Stage: the ends of the model and its first Layers, opened, loaded, measured and run in its worker.

Torch comes with this module: RingHost imports it in the worker's thread, while the Ring's other Nodes start.
"""

from collections.abc import Sequence as AbstractSequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol

import structlog
import torch

from mdiq.core.control import Ready
from mdiq.core.frame import Batch, Payload
from mdiq.core.hop_survey import HopLink
from mdiq.core.logprobs import Drawn, TokenLogprob
from mdiq.core.sequence import Sequence
from mdiq.core.types import LayerRange, RingSpec
from mdiq.engine.device import choose_device, free_bytes, kind_of
from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.formats.quantize import chosen_format
from mdiq.engine.kept_cost import kept_cost
from mdiq.engine.measure import SUSTAINED_S, measure_cost, measure_head
from mdiq.engine.memory import peak_bytes, reset_peak, rss_bytes
from mdiq.engine.model.kv_cache import BLOCK_TOKENS
from mdiq.engine.model.logprobs import token_logprobs
from mdiq.engine.model.sampler import Form, SampleRow, sample
from mdiq.engine.runner import StageRunner
from mdiq.engine.text.grammar import Grammars
from mdiq.errors import EngineError
from mdiq.plan.measured import MeasuredRing, MeasuredStage, differing_kinds
from mdiq.plan.micro_batches import Curve
from mdiq.plan.pace import StageCost
from mdiq.runtime.loops import Progress
from mdiq.runtime.options import RingOptions

log = structlog.get_logger()


class StarterStage:
    """The Starter's part of one Ring; make it in the worker's thread, and call ``load`` and ``measure`` there.

    digest: the model's. weights: how all Nodes hold theirs, since one Node decides. cpu: as control.Ready has it.
    grammars: see TorchStarter. runner, engine: after ``load``.
    """

    runner: StageRunner
    engine: "TorchStarter"

    def __init__(self, options: RingOptions, grammars: Grammars | None = None) -> None:
        """Open the model.

        Raises:
            ModelError: it is missing, malformed or unsupported.
        """
        self._options = options
        self._grammars = grammars
        self._held: tuple[LayerRange, bool] | None = None  # its Layers, and whether it is the last Stage
        self._can_peak = False  # the process's peak is this Ring's
        with ExitStack() as opened:
            self._checkpoint = checkpoint = opened.enter_context(open_checkpoint(options.model))
            self._device = choose_device(options.weights.device)
            self.cpu = kind_of(self._device)
            self.digest = checkpoint.digest
            self.weights = replace(
                options.weights, format=chosen_format(options.weights.format, checkpoint, self._device)
            )
            self._opened = opened.pop_all()

    def load(self, progress: Progress) -> None:
        """Load the Layers, from the model as it was opened, and close it.

        Raises:
            MdiqError: see StageRunner.load.
        """
        options = self._options
        self._can_peak = not options.in_process and reset_peak()
        with self._opened.pop_all():
            self.runner = StageRunner.load(
                self._checkpoint,
                options.layers[0],
                is_last=options.num_nodes == 1,
                owns_embedding_and_head=True,
                kv_tokens=options.kv_tokens,
                weights=self.weights,
                wire=options.wire(0),
                memory_share=options.remote.nodes[0].memory_share if options.remote else 1 / options.num_nodes,
                memory_bytes=options.remote.nodes[0].memory_bytes if options.remote else None,
                progress=progress,
            )
        self.runner.noise = options.row_noise(0)
        self.engine = TorchStarter(self.runner, self._grammars)
        self._held = options.layers[0], options.num_nodes == 1

    def reshape(self, options: RingOptions, progress: Progress) -> None:
        """Have the Layers that other options say, of the same model; every Sequence is forgotten.

        Raises:
            MdiqError: see StageRunner.reshape.
        """
        self._options, wanted = options, (options.layers[0], options.num_nodes == 1)
        self.runner.noise = options.row_noise(0)
        if wanted == self._held:
            return
        assert options.remote is not None  # only such a Ring changes
        self._held = None  # until all of it is there: this may be given up
        self.runner.reshape(
            options.model,
            options.layers[0],
            is_last=wanted[1],
            kv_tokens=options.kv_tokens,
            memory_share=options.remote.nodes[0].memory_share,
            memory_bytes=options.remote.nodes[0].memory_bytes,
            digest=self.digest,
            progress=progress,
        )
        self._held = wanted

    def memory(self) -> tuple[int, int]:
        """Return the bytes that are free on the device, and those that this process takes."""
        return free_bytes(self._device), rss_bytes()

    def close(self) -> None:
        """Close the model, if no load has begun."""
        self._opened.close()

    def measure(self, progress: Progress) -> StageCost:
        """Return what a forward costs; the KV cache is empty afterwards."""
        # Devices, unlike cores of one machine, may have their CPU time rationed.
        if self._options.remote is None:
            return kept_cost(self.runner, progress=progress)
        return measure_cost(self.runner, min_s=SUSTAINED_S, progress=progress)

    def measure_head(self, progress: Progress) -> Curve:
        """Return what the head costs."""
        min_s = 0.0 if self._options.remote is None else SUSTAINED_S
        return measure_head(self.runner, min_s=min_s, progress=progress)

    def spec(self, others: AbstractSequence[Ready]) -> RingSpec:
        """Return what the ring protocol is to know of the Ring of this Stage and others."""
        return RingSpec(
            num_stages=self._options.num_nodes,
            kv_tokens=min([self.runner.kv_capacity_tokens, *(ready.kv_tokens for ready in others)]),
            context_tokens=self.runner.config.context_tokens,
            kv_block_tokens=BLOCK_TOKENS,
        )

    def check_kinds(self, others: AbstractSequence[Ready]) -> None:
        """Log which Nodes have which kind of CPU, if they differ and the same tokens are wanted on any split."""
        cpus = dict(zip(self._options.node_names, (self.cpu, *(ready.cpu for ready in others)), strict=True))
        if self.weights.exact and (kinds := differing_kinds(cpus)):
            log.warning("kinds_of_cpu_differ", kinds=kinds, text="another split of the layers may give other tokens")

    def measured(
        self,
        costs: AbstractSequence[StageCost],
        others: AbstractSequence[Ready],
        head: Curve,
        hops: tuple[tuple[str, HopLink | None], ...],
    ) -> MeasuredRing:
        """Return what the planner is told of the Ring: costs of all Stages, and what the others have."""
        options, runner = self._options, self.runner
        # Nodes of one machine would each count all of its memory.
        shares = [node.memory_share for node in options.remote.nodes] if options.remote else [1.0] * options.num_nodes
        own = MeasuredStage(
            options.node_names[0],
            len(options.layers[0]),
            costs[0],
            runner.weight_bytes,
            runner.kv_bytes_per_token,
            rss_bytes(),
            int(shares[0] * free_bytes(self._device)),
            peak_bytes() if self._can_peak else 0,
            self.cpu,
        )
        stages = [
            MeasuredStage(
                name,
                len(layers),
                cost,
                ready.weight_bytes,
                ready.kv_bytes_per_token,
                ready.rss_bytes,
                int(share * ready.free_bytes),
                ready.peak_bytes,
                ready.cpu,
            )
            for name, layers, cost, ready, share in zip(
                options.node_names[1:], options.layers[1:], costs[1:], others, shares[1:], strict=True
            )
        ]
        return MeasuredRing(runner.config.num_layers, (own, *stages), head, runner.config.hidden_size, hops)


class Script(Protocol):
    """Knows the tokens before they are drawn."""

    def take(self, logits: torch.Tensor, sequences: AbstractSequence[Sequence]) -> list[int]:
        """Return the next token of each Sequence; logits: [n, vocab_size], what they would have been drawn from."""
        ...


class TorchStarter:
    """The Starter's engine: a StageRunner that owns embedding and head, and the sampler.

    grammars: of Sequences with one; None: there are no such Sequences.
    script: draws the tokens instead of the sampler, while there is one.
    """

    def __init__(self, runner: StageRunner, grammars: Grammars | None = None) -> None:
        self._runner = runner
        self._grammars = grammars
        self.script: Script | None = None

    def forward(self, batch: Batch) -> Payload:
        return self._runner.forward(batch)

    def reset(self) -> None:
        self._runner.reset()

    def sample(self, rows: AbstractSequence[Payload], sequences: AbstractSequence[Sequence]) -> list[Drawn]:
        """Return the next token of each Sequence; see starter_engine.StarterEngine."""
        logits = self._runner.logits(rows)
        asked = [i for i, sequence in enumerate(sequences) if sequence.logprobs is not None]
        before = logits[asked]  # a copy: the sampler may change its rows
        tokens = self._tokens(logits, sequences)
        logprobs: dict[int, TokenLogprob] = {}
        if asked:
            top = [sequence.logprobs.top for sequence in sequences if sequence.logprobs is not None]
            found = token_logprobs(before, [tokens[i] for i in asked], top)
            logprobs = dict(zip(asked, found, strict=True))
        return [Drawn(token, logprobs.get(i)) for i, token in enumerate(tokens)]

    def score(self, rows: Payload, sequence: Sequence, start: int) -> list[TokenLogprob]:
        """Return the log-probabilities of tokens of the prompt; see starter_engine.StarterEngine."""
        assert sequence.logprobs is not None  # it was asked for
        tokens = sequence.prompt[start + 1 : start + 1 + rows.num_rows]
        return token_logprobs(self._runner.logits([rows]), tokens, [sequence.logprobs.top] * len(tokens))

    def _tokens(self, logits: torch.Tensor, sequences: AbstractSequence[Sequence]) -> list[int]:
        if self.script is not None:
            return self.script.take(logits, sequences)
        sample_rows = [
            SampleRow(
                sequence.params,
                # Only the repetition penalty reads the history.
                sequence.tokens(0, sequence.num_tokens) if sequence.params.repetition_penalty != 1.0 else (),
                sequence.num_tokens,
                sequence.generated,
                sequence.barred,
                self._form(sequence, logits.shape[1]) if sequence.params.grammar else None,
            )
            for sequence in sequences
        ]
        return sample(logits, sample_rows)

    def _form(self, sequence: Sequence, num_tokens: int) -> Form:
        if self._grammars is None:
            raise EngineError("this ring has no tokenizer to follow a grammar with")
        return self._grammars.form(sequence, num_tokens)
