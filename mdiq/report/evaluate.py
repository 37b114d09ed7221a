"""The evaluation of the MDI-LLM paper (Macario et al. 2025), measured on rings of 1 to N Nodes; values that are JSON.

Throughput and memory against Nodes, generation time against tokens with and without a KV cache, one Sequence in flight
against as many as there are Nodes, and the bytes that a token costs on the wire.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdiq.bench.runner import WARM_UP_TOKENS
from mdiq.bench.workload import Load
from mdiq.engine.memory import return_free_memory
from mdiq.report.measure import BYTES_TOKENS, HopBytes, LoadRun, MeasurableRing, Meter, count_bytes
from mdiq.report.receipt import Receipt

if TYPE_CHECKING:
    from mdiq.engine.model_config import ModelConfig

VERSION = 1
EXAMPLE_TOKENS = 4_096
"""A context for which the KV cache is computed."""
WIRE_NODES = 2
"""Nodes of the rings on which bytes are counted: the first Hop carries a row for each token that passes, the last one
only those that give a token. In longer rings every Hop but the last is like the first."""

OpenRing = Callable[[Path, int, str], AbstractAsyncContextManager[MeasurableRing]]
"""Starts a ring of a model, of so many Nodes, with this format on its Hops."""


@dataclass(frozen=True, slots=True)
class ModelAbout:
    """A model, as far as figures depend on it.

    kv_bytes_per_token: of all Layers, in the dtype of the KV cache; example_kv_bytes: of EXAMPLE_TOKENS.
    """

    name: str
    family: str
    is_random: bool
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    kv_bytes_per_token: int
    example_kv_bytes: int


@dataclass(frozen=True, slots=True)
class Generation:
    """One user's answer. times_s: from the question to each token. is_same: its tokens are those of one Node alone,
    as far as it goes."""

    has_kv_cache: bool
    prompt_tokens: int
    times_s: tuple[float, ...]
    is_same: bool


@dataclass(frozen=True, slots=True)
class RingRun:
    """All of a ring of so many Nodes.

    kv_bytes_per_token: of each Node's Layers. one, many: with one user, and with as many users as Nodes.
    peak_rss_bytes: of the Node with most. gain: tokens/s while decoding, of many over one.
    """

    nodes: int
    layers: tuple[str, ...]
    kv_bytes_per_token: tuple[int, ...]
    one: LoadRun
    many: LoadRun
    generations: tuple[Generation, ...]
    peak_rss_bytes: int
    gain: float | None


@dataclass(frozen=True, slots=True)
class ModelRun:
    """All of a model. full: the same shape with full multi-head attention, and the bytes that its ring sends in the
    first format; None where there is no such shape."""

    about: ModelAbout
    rings: tuple[RingRun, ...]
    wire: tuple[HopBytes, ...]
    full: ModelAbout | None = None
    full_wire: tuple[HopBytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The document."""

    receipt: Receipt
    settings: dict[str, Any]
    models: tuple[ModelRun, ...]
    kind: str = "evaluation"
    version: int = VERSION

    def as_document(self) -> dict[str, Any]:
        """Return it as a JSON object, without anything that JSON does not know."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return document


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to evaluate. full: its shape with full multi-head attention, if there is one."""

    name: str
    path: Path
    config: "ModelConfig"
    is_random: bool
    full: "Subject | None" = None


@dataclass(frozen=True, slots=True)
class Evaluator:
    """How to evaluate.

    lengths: at which the bytes of a token are counted. uncached_tokens: of an answer without a KV cache; 0: none.
    rest_s: how long after a Load every Node has reported. lap_s: see Meter.
    progress: called with what runs now.
    """

    nodes: Sequence[int]
    prompt_tokens: int
    answer_tokens: int
    uncached_tokens: int
    lengths: Sequence[int]
    wires: Sequence[str]
    usual_wire: str
    item_bytes: int
    seed: int
    rest_s: float
    lap_s: float
    open_ring: OpenRing
    progress: Callable[[str], None] = lambda _: None

    async def run(self, subjects: Sequence[Subject]) -> tuple[ModelRun, ...]:
        """Measure every model.

        Raises:
            MdiqError: a ring failed.
        """
        return tuple([await self._model(subject) for subject in subjects])

    async def _model(self, subject: Subject) -> ModelRun:
        rings: list[RingRun] = []
        alone: tuple[int, ...] = ()
        for nodes in self.nodes:
            ring = await self._ring(subject, nodes, alone)
            alone = alone or ring.one.answers[0]
            rings.append(ring)
        full = subject.full
        return ModelRun(
            about=about(subject, self.item_bytes),
            rings=tuple(rings),
            wire=await self._wire(subject, self.wires),
            full=None if full is None else about(full, self.item_bytes),
            full_wire=() if full is None else await self._wire(full, self.wires[:1]),
        )

    async def _ring(self, subject: Subject, nodes: int, alone: tuple[int, ...]) -> RingRun:
        self.progress(f"{subject.name}: {nodes} nodes")
        return_free_memory(collect=True)  # the Starter of the ring before was in this process
        async with self.open_ring(subject.path, nodes, self.usual_wire) as ring:
            meter = self._meter(ring, subject, nodes)
            await meter.warm_up(nodes, self.prompt_tokens, self.seed)
            one = await meter.load(self._load(1))
            many = one if nodes == 1 else await meter.load(self._load(nodes))
            alone = alone or one.answers[0]
            generations = [await self._generation(meter, subject, self.answer_tokens, alone, has_kv_cache=True)]
            if self.uncached_tokens:
                self.progress(f"{subject.name}: {nodes} nodes, without a KV cache")
                tokens = self.uncached_tokens
                generations.append(await self._generation(meter, subject, tokens, alone, has_kv_cache=False))
            measured = await ring.measured()
            return RingRun(
                nodes=nodes,
                layers=tuple(share.layers for share in one.nodes),
                kv_bytes_per_token=tuple(stage.kv_bytes_per_token for stage in measured.stages),
                one=one,
                many=many,
                generations=tuple(generations),
                peak_rss_bytes=max(share.rss_bytes for share in many.nodes),
                gain=_ratio(many.figures.decode_tokens_per_s, one.figures.decode_tokens_per_s),
            )

    async def _generation(
        self, meter: Meter, subject: Subject, num_tokens: int, alone: tuple[int, ...], *, has_kv_cache: bool
    ) -> Generation:
        (prompt,) = self._load(1).prompts(subject.config.vocab_size)
        user = await meter.generate(prompt, num_tokens, has_kv_cache=has_kv_cache)
        return Generation(
            has_kv_cache,
            self.prompt_tokens,
            tuple(at_s - user.submitted_s for at_s in user.tokens_s),
            user.answer == alone[:num_tokens],
        )

    async def _wire(self, subject: Subject, wires: Sequence[str]) -> tuple[HopBytes, ...]:
        return await count_bytes(
            lambda wire: self.open_ring(subject.path, WIRE_NODES, wire),
            subject.config.vocab_size,
            wires,
            self.lengths,
            self.seed,
            lap_s=self.lap_s,
            has_uncached=self.uncached_tokens > 0,
            progress=lambda text: self.progress(f"{subject.name}: {text}"),
        )

    def _meter(self, ring: MeasurableRing, subject: Subject, nodes: int) -> Meter:
        return Meter(ring, subject.config.vocab_size, self.rest_s if nodes > 1 else 0.0, self.lap_s)

    def _load(self, users: int) -> Load:
        return Load(users, self.prompt_tokens, self.answer_tokens, self.seed)


def about(subject: Subject, item_bytes: int) -> ModelAbout:
    """Return what figures depend on of a model. item_bytes: of a number in the KV cache."""
    config = subject.config
    kv_bytes = config.kv_bytes_per_token(config.num_layers, item_bytes)
    return ModelAbout(
        name=subject.name,
        family=config.family.name,
        is_random=subject.is_random,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        vocab_size=config.vocab_size,
        kv_bytes_per_token=kv_bytes,
        example_kv_bytes=EXAMPLE_TOKENS * kv_bytes,
    )


def longest_text(prompt_tokens: int, answer_tokens: int, lengths: Sequence[int]) -> int:
    """Return the tokens of the longest Sequence: of a load, or of one whose bytes are counted; see Meter.hop_bytes."""
    return max(prompt_tokens + max(answer_tokens, WARM_UP_TOKENS), max(lengths) + 1 + BYTES_TOKENS)


def kv_tokens(users: int, longest: int, step: int = 32) -> int:
    """Return the KV capacity for so many Sequences of so many tokens each. step: of a KvBlock."""
    return users * -(-longest // step) * step


def _ratio(value: float, base: float) -> float | None:
    return value / base if base else None
