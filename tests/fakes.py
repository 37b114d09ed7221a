"""Fakes that several tests share: the chain engine, whose tokens tell of any lost, doubled, swapped or stale Frame."""

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from hashlib import blake2b

from mdiq.core.frame import Batch, Buffer, Payload, TokenIds
from mdiq.core.logprobs import Drawn, TokenLogprob
from mdiq.core.sequence import Sequence
from mdiq.core.types import LayerRange, SeqId
from mdiq.errors import EngineError

ROW_BYTES = 16
VOCAB = 50


@dataclass(frozen=True, slots=True)
class ChainRows:
    """Rows of 16 bytes, which the wire takes for four f32."""

    data: bytes

    @property
    def num_rows(self) -> int:
        return len(self.data) // ROW_BYTES

    def rows(self, start: int, stop: int) -> "ChainRows":
        return ChainRows(self.data[start * ROW_BYTES : stop * ROW_BYTES])

    def parts(self) -> tuple[str, int, AbstractSequence[Buffer]]:
        return "f32", ROW_BYTES // 4, (self.data,)


def chain_hash(*parts: bytes | int) -> bytes:
    data = b"".join(part if isinstance(part, bytes) else part.to_bytes(8, "little") for part in parts)
    return blake2b(data, digest_size=ROW_BYTES).digest()


def chain_token(row: bytes) -> int:
    """The head of the chain model: token ids 0 to VOCAB - 1."""
    return int.from_bytes(row, "little") % VOCAB


@dataclass(slots=True)
class ChainCache:
    """What a Stage caches of a Sequence: a state of every layer for each position, and the blocks that they take."""

    states: list[list[bytes]] = field(default_factory=list)
    blocks: list[object] = field(default_factory=list)


def chain_logprob(row: bytes, token: int) -> TokenLogprob:
    """What the chain model thinks of a token in the place that a row is of; the likeliest is the one it would draw."""
    value = int.from_bytes(chain_hash(row, token)[:2], "little")
    return TokenLogprob(token, -float(value), ((chain_token(row), -1.0),))


class ChainEngine:
    """A Stage's layers as hashes. A layer's state per Sequence plays the KV cache: all that came before is in it.

    kv_tokens, block_tokens: its capacity, and what Sequences take at once and may share; None is no limit.
    """

    def __init__(
        self, layers: LayerRange, *, is_last: bool, kv_tokens: int | None = None, block_tokens: int = 1
    ) -> None:
        self._layers = layers
        self._is_last = is_last
        self._kv_tokens = kv_tokens
        self._block_tokens = block_tokens
        self.states: dict[SeqId, ChainCache] = {}
        self.num_forks = 0

    def reset(self) -> None:
        self.states.clear()

    def forward(self, batch: Batch) -> ChainRows:
        for seq_id in batch.releases:
            self.states.pop(seq_id, None)
        if len({segment.seq_id for segment in batch.segments}) != len(batch.segments):
            raise EngineError("the chain engine was given two Segments of a Sequence in one Batch")
        out: list[bytes] = []
        for segment, payload in zip(batch.segments, batch.payloads, strict=True):
            if segment.parent is not None:
                self._fork(segment.seq_id, segment.parent, segment.start)
            cache = self.states.setdefault(segment.seq_id, ChainCache())
            if len(cache.states) != segment.start:
                raise EngineError(f"{segment}: the chain engine holds {len(cache.states)} tokens")
            states = list(cache.states[-1]) if cache.states else [b""] * len(self._layers)
            rows = []
            for offset, hidden in enumerate(_rows(payload)):
                rows.append(self._row(states, hidden, segment.start + offset))
                cache.states.append(list(states))
            self._take_blocks(cache)
            out += rows[len(rows) - segment.num_head_rows :] if self._is_last else rows
        return ChainRows(b"".join(out))

    def _fork(self, seq_id: SeqId, parent: SeqId, num_tokens: int) -> None:
        source = self.states.get(parent, ChainCache())
        if seq_id in self.states or len(source.states) < num_tokens or num_tokens % self._block_tokens:
            raise EngineError(f"{seq_id} cannot begin with {num_tokens} of the {len(source.states)} tokens of {parent}")
        blocks = source.blocks[: num_tokens // self._block_tokens]
        self.states[seq_id] = ChainCache(source.states[:num_tokens], blocks)
        self.num_forks += 1

    def _take_blocks(self, cache: ChainCache) -> None:
        cache.blocks += [object() for _ in range(-(-len(cache.states) // self._block_tokens) - len(cache.blocks))]
        num_blocks = len({block for cache in self.states.values() for block in cache.blocks})
        if self._kv_tokens is not None and num_blocks * self._block_tokens > self._kv_tokens:
            raise EngineError(f"the chain engine holds {num_blocks} blocks of {self._block_tokens} tokens")

    def _row(self, states: list[bytes], hidden: bytes, position: int) -> bytes:
        for i, layer in enumerate(self._layers):
            states[i] = hidden = chain_hash(states[i], hidden, layer, position)
        return hidden


def _rows(payload: Payload) -> list[bytes]:
    if isinstance(payload, TokenIds):
        return [chain_hash(token) for token in payload.ids]
    _, width, buffers = payload.parts()
    data = b"".join(bytes(buffer) for buffer in buffers)
    assert width * 4 == ROW_BYTES
    return [data[i : i + ROW_BYTES] for i in range(0, len(data), ROW_BYTES)]


def chain_answer(
    prompt: tuple[int, ...], num_layers: int, max_tokens: int, eos: frozenset[int] = frozenset()
) -> list[int]:
    """The single-process answer: what every Ring must give, whatever happens to its Frames."""
    states = [b""] * num_layers
    engine = ChainEngine(LayerRange(0, num_layers), is_last=True)
    tokens, answer = list(prompt), []
    for position in range(len(prompt) + max_tokens - 1):
        row = engine._row(states, chain_hash(tokens[position]), position)
        if position >= len(prompt) - 1:
            tokens.append(chain_token(row))
            answer.append(tokens[-1])
            if tokens[-1] in eos:
                break
    return answer


def chain_prompt_logprobs(prompt: tuple[int, ...], num_layers: int) -> list[TokenLogprob]:
    """The single-process log-probabilities of the prompt's tokens from the second one on."""
    states = [b""] * num_layers
    engine = ChainEngine(LayerRange(0, num_layers), is_last=True)
    rows = [engine._row(states, chain_hash(token), position) for position, token in enumerate(prompt)]
    return [chain_logprob(row, token) for row, token in zip(rows, prompt[1:], strict=False)]


class ChainStarter(ChainEngine):
    """The Starter's engine of a chain Ring: its first layers, and the head as a sampler."""

    def sample(self, rows: AbstractSequence[Payload], sequences: AbstractSequence[Sequence]) -> list[Drawn]:
        drawn = []
        for row, sequence in zip(rows, sequences, strict=True):
            (data,) = _rows(row)
            token = chain_token(data)
            drawn.append(Drawn(token, chain_logprob(data, token) if sequence.logprobs else None))
        return drawn

    def score(self, rows: Payload, sequence: Sequence, start: int) -> list[TokenLogprob]:
        data = _rows(rows)
        return [chain_logprob(row, sequence.prompt[start + 1 + i]) for i, row in enumerate(data)]
