"""Runs Batches on a Stage's part of the model: payloads in, rows out. No sockets; one thread calls it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from mdiq.cache import cache_directory
from mdiq.core.frame import Batch, Payload, TokenIds
from mdiq.core.noise import RowNoise
from mdiq.core.types import PLAIN_WEIGHTS, LayerRange, SeqId, WeightSettings
from mdiq.core.wire import WireLimits
from mdiq.engine.device import choose_device, choose_dtype, free_bytes, is_out_of_memory
from mdiq.engine.formats.checkpoint import Checkpoint, open_checkpoint
from mdiq.engine.formats.layer_files import LayerFiles
from mdiq.engine.memory import drop_library, return_free_memory, rss_bytes
from mdiq.engine.model.kv_cache import BLOCK_TOKENS, KvCache
from mdiq.engine.model.layers import PlacedSegment
from mdiq.engine.model.stage_model import StageModel
from mdiq.engine.model_config import ModelConfig
from mdiq.engine.noise import noisy
from mdiq.engine.tensors import TensorRows, to_tensor, to_wire
from mdiq.errors import CapacityError, ConfigError, EngineError, ModelError, SequenceError

KV_MEMORY_SHARE = 0.5  # of the memory that is free after the weights: the rest is for activations and other programs
MAX_SEQUENCES = 64


class StageRunner:
    """A loaded Stage: core's Engine, and on the Starter the head as well.

    config: the whole model's shape.
    """

    def __init__(
        self,
        model: StageModel,
        cache: KvCache,
        *,
        is_last: bool,
        dtype: torch.dtype,
        device: torch.device,
        wire: str | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._is_last = is_last
        self._dtype = dtype
        self._device = device
        self._wire = wire
        self.noise: RowNoise | None = None  # of the Hop out of this Stage
        self.config: ModelConfig = model.config

    @classmethod
    def load(
        cls,
        model: Path | Checkpoint | LayerFiles,
        layers: LayerRange,
        *,
        is_last: bool,
        owns_embedding_and_head: bool,
        kv_tokens: int | None,
        weights: WeightSettings = PLAIN_WEIGHTS,
        wire: str | None = None,
        memory_share: float = 1.0,
        memory_bytes: int | None = None,
        digest: str = "",
        progress: Callable[[int, int], object] = lambda *_: None,
    ) -> "StageRunner":
        """Load Layers ``layers`` of a model and make room for their KV cache.

        model: its path; or an open one, which the caller closes; or the files of these Layers.
        kv_tokens: capacity in tokens, or None for what free memory allows. memory_share: the part of the machine's free
        memory that this Stage may use. memory_bytes: maximum memory of this process, or None. wire: the format
        of the Hop out of this Stage, or None where the rows stay here. digest: refuse a model with another digest;
        empty accepts any.

        Raises:
            ModelError: the model is missing, malformed, unsupported, or has another digest.
            CapacityError: weights or KV cache do not fit.
        """
        torch_device, torch_dtype = choose_device(weights.device), choose_dtype(weights.dtype)
        is_packed = weights.format != "plain"
        if is_packed and torch_device.type != "cpu":
            raise ConfigError(
                f"--weights {weights.format}: packed weights run on the CPU only; use --dtype bf16 on {weights.device}"
            )
        folder = cache_directory() if is_packed else Path()  # plain weights need no cache, nor a home directory
        with ExitStack() as opened, torch.inference_mode():
            model = _opened(model, digest, opened)
            with _memory_for(layers, model.path):
                stage = StageModel(
                    model,
                    layers,
                    owns_embedding_and_head=owns_embedding_and_head,
                    weights=weights,
                    folder=folder,
                    progress=progress,
                )
            drop_library("libllvmlite")  # 50 MB, not needed once the code is compiled
            cache = _make_cache(stage.config, layers, torch_dtype, torch_device, kv_tokens, memory_share, memory_bytes)
        return cls(stage, cache, is_last=is_last, dtype=torch_dtype, device=torch_device, wire=wire)

    def reshape(
        self,
        model: Path | Checkpoint | LayerFiles | None,
        layers: LayerRange,
        *,
        is_last: bool,
        kv_tokens: int | None,
        memory_share: float = 1.0,
        memory_bytes: int | None = None,
        digest: str = "",
        progress: Callable[[int, int], object] = lambda *_: None,
    ) -> None:
        """Hold other Layers of the same model, and forget every Sequence; Layers that are here are not read again.

        model: as for ``load``; None where nothing is lacking. The other arguments: see ``load``. The room of the KV
        cache is given back first, so that this takes no more memory than a Stage that is loaded anew. After an error
        this runner computes nothing until it is reshaped again.

        Raises:
            ModelError, CapacityError: see ``load``.
        """
        self._is_last = is_last
        self._cache = KvCache(0, 0, self.config.num_kv_heads, self.config.head_dim, self._dtype, self._device)
        with ExitStack() as opened, torch.inference_mode():
            opened_model = _opened(model, digest, opened) if model is not None and self.lacks(layers) else None
            with _memory_for(layers, opened_model.path if opened_model else Path()):
                self._model.reshape(opened_model, layers, progress)
            drop_library("libllvmlite")
            self._cache = _make_cache(
                self.config, layers, self._dtype, self._device, kv_tokens, memory_share, memory_bytes
            )

    def lacks(self, layers: LayerRange) -> list[int]:
        """Return which of these Layers are not here."""
        return self._model.lacks(layers)

    @property
    def shape(self) -> str:
        """Text with all that the time of a forward depends on, without the machine and the program."""
        noise = ", noise" if self.noise is not None else ""
        return (
            f"{len(self._cache.keys)} layers, {self.weight_bytes} bytes, first {self.owns_embedding}, "
            f"last {self._is_last}, {self._dtype}, {self._device}, {self._wire}{noise}, {self.config.text}"
        )

    @property
    def wire_limits(self) -> WireLimits:
        """The largest Frame that a Ring of this model may send."""
        return WireLimits(max_width=self.config.hidden_size, max_context=self.config.context_tokens)

    @property
    def owns_embedding(self) -> bool:
        """Whether token ids enter here."""
        return self._model.owns_embedding

    @property
    def is_on_cpu(self) -> bool:
        """Whether forwards take CPU time."""
        return self._device.type == "cpu"

    @property
    def weight_bytes(self) -> int:
        """Bytes of this Stage's weights."""
        return self._model.weight_bytes

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self._cache.capacity_tokens

    @property
    def kv_tokens_in_use(self) -> int:
        """Tokens of all KvBlocks that Sequences hold."""
        return self._cache.tokens_in_use

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token in this Stage."""
        return self.config.kv_bytes_per_token(len(self._cache.keys), self._dtype.itemsize)

    def reset(self) -> None:
        """Forget every Sequence."""
        self._cache.reset()

    def occupy(self, seq_id: SeqId, num_tokens: int) -> None:
        """Reserve tokens for a new Sequence with uninitialized K and V: for measurements only.

        Raises:
            CapacityError: the KV cache is full.
        """
        self._cache.extend(seq_id, 0, num_tokens)

    def set_wire(self, wire: str | None) -> None:
        """Set the format of the Hop out of this Stage for later Batches; None: see ``load``."""
        self._wire = wire

    def forward(self, batch: Batch) -> Payload:
        """Run a Batch; see core's Engine.

        Raises:
            SequenceError: some have a token id without an embedding, a position out of order, or no room in the KV
                cache; only releases were carried out.
            EngineError: a payload does not fit, or torch failed.
        """
        for seq_id in batch.releases:
            self._cache.free(seq_id)
        self._check_ids(batch)
        if wrong := self._cache.misfits(batch.segments):
            seq_id, reason = next(iter(wrong.items()))
            raise SequenceError(f"sequence {seq_id}: {reason}", tuple(wrong))
        if not batch.segments:
            return TensorRows(torch.empty(0, self.config.hidden_size, dtype=self._dtype))
        try:
            with torch.inference_mode():
                hidden = self._forward(batch)
                if self.noise is not None:
                    hidden = noisy(hidden, self.noise)
                # Here and not in the send loop, to keep computation out of the event loop's thread.
                return TensorRows(hidden) if self._wire is None else to_wire(hidden, self._wire)
        except (RuntimeError, IndexError) as error:
            raise EngineError(f"the forward of {len(batch.segments)} segments failed: {str(error)[:200]}") from error

    def logits(self, rows: Sequence[Payload]) -> torch.Tensor:
        """Return [n, vocab_size], f32, on the CPU, for payloads of n rows together from the last Stage.

        Raises:
            EngineError: a payload does not fit, or torch failed.
        """
        try:
            with torch.inference_mode():
                return self._model.logits(torch.cat([self._rows(row) for row in rows])).cpu()
        except RuntimeError as error:
            raise EngineError(f"the head failed on {len(rows)} rows: {str(error)[:200]}") from error

    def _forward(self, batch: Batch) -> torch.Tensor:
        placed: list[PlacedSegment] = []
        wanted: list[int] = []  # rows of logits
        first = 0
        for segment in batch.segments:
            # All forks come first: one may move its parent's last KvBlock.
            if segment.parent is not None:
                self._cache.fork(segment.seq_id, segment.parent, segment.start)
        for segment in batch.segments:
            placement = self._cache.extend(segment.seq_id, segment.start, segment.length)
            placed.append(PlacedSegment(first, segment.length, segment.start, placement))
            first += segment.length
            wanted += range(first - segment.num_head_rows, first)
        positions = torch.tensor([p for s in batch.segments for p in range(s.start, s.stop)], device=self._device)
        hidden = self._model.run(self._hidden(batch, positions), positions, self._cache, placed)
        if not self._is_last:
            return hidden
        return hidden if wanted == list(range(len(hidden))) else hidden[wanted]

    def _hidden(self, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
        """Return the input of the Layers: [T, hidden_size]."""
        if all(isinstance(payload, TokenIds) for payload in batch.payloads):
            ids = [token for payload in batch.payloads if isinstance(payload, TokenIds) for token in payload.ids]
            return self._model.embed(torch.tensor(ids, device=self._device), positions)
        rows = [self._rows(payload) for payload in batch.payloads]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _check_ids(self, batch: Batch) -> None:
        vocab_size = self.config.vocab_size
        wrong = {
            segment.seq_id: token
            for segment, payload in zip(batch.segments, batch.payloads, strict=True)
            if isinstance(payload, TokenIds)
            for token in payload.ids
            if not 0 <= token < vocab_size
        }
        if wrong:
            token = next(iter(wrong.values()))
            raise SequenceError(f"token id {token} is not one of the model's {vocab_size}", tuple(wrong))

    def _rows(self, payload: Payload) -> torch.Tensor:
        return to_tensor(payload, self.config.hidden_size, self._dtype, self._device)


def _opened(model: Path | Checkpoint | LayerFiles, digest: str, stack: ExitStack) -> Checkpoint | LayerFiles:
    """Return a model that is open, and is the one that is wanted."""
    if isinstance(model, Path):
        model = stack.enter_context(open_checkpoint(model))
    if digest and model.digest != digest:
        raise ModelError(f"{model.path}: it is not the starter's model (their digests differ); copy it here again")
    return model


@contextmanager
def _memory_for(layers: LayerRange, path: Path) -> Iterator[None]:
    """Say what to do when weights do not fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise CapacityError(f"{path}: no memory for layers {layers}; use more nodes or --weights int8") from None


def _make_cache(
    config: ModelConfig,
    layers: LayerRange,
    dtype: torch.dtype,
    device: torch.device,
    kv_tokens: int | None,
    memory_share: float,
    memory_bytes: int | None,
) -> KvCache:
    token_bytes = config.kv_bytes_per_token(len(layers), dtype.itemsize)
    if memory_bytes is not None:
        return_free_memory(collect=True)  # so that temporary memory of loading does not count
    free, of_limit = free_bytes(device), ""
    share = int(free * memory_share)
    if memory_bytes is not None and memory_bytes - (taken := rss_bytes()) < free:
        free = max(memory_bytes - taken, 0)
        share = min(share, free)  # a process's own limit is not shared with others on the machine
        of_limit = f" (of its {memory_bytes >> 20} MiB the process takes {taken >> 20})"
    if kv_tokens is None:
        kv_tokens = min(int(share * KV_MEMORY_SHARE) // token_bytes, MAX_SEQUENCES * config.context_tokens)
        if kv_tokens < BLOCK_TOKENS:
            raise CapacityError(
                f"KV cache: {share >> 20} MiB{of_limit} are free after the weights of layers {layers}, too little for "
                f"{BLOCK_TOKENS} tokens; use more nodes, free memory, or set a higher limit"
            )
    kv_tokens = -(-kv_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
    if kv_tokens * token_bytes > free:
        raise CapacityError(
            f"KV cache: {kv_tokens} tokens of layers {layers} need {kv_tokens * token_bytes >> 20} MiB and "
            f"{free >> 20} MiB are free; lower --kv-tokens or use more nodes"
        )
    return KvCache(len(layers), kv_tokens, config.num_kv_heads, config.head_dim, dtype, device)
