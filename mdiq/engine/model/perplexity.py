"""How well a model in some format predicts a real text: the measure of what packing its weights costs."""

from collections.abc import Callable, Sequence

import torch

from mdiq.core.types import SeqId
from mdiq.engine.model.kv_cache import BLOCK_TOKENS, KvCache
from mdiq.engine.model.layers import PlacedSegment
from mdiq.engine.model.stage_model import StageModel


def losses(
    model: StageModel,
    token_ids: Sequence[int],
    *,
    window: int = 512,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> torch.Tensor:
    """Return the negative log likelihood of each token but the first in windows of ``window`` tokens: f64, in one row.

    Perplexity is e to the power of their mean.

    model: all Layers with embedding and head, on the CPU. The rest after the last whole window is not used.
    ``progress`` is called with (done, total) in windows.
    """
    config, dtype, device = model.config, torch.float32, torch.device("cpu")
    window = min(window, len(token_ids), config.context_tokens)
    cache = KvCache(
        config.num_layers,
        -(-window // BLOCK_TOKENS) * BLOCK_TOKENS,
        config.num_kv_heads,
        config.head_dim,
        dtype,
        device,
    )
    positions = torch.arange(window)
    starts = range(0, len(token_ids) - window + 1, window)
    found: list[torch.Tensor] = []
    with torch.inference_mode():
        for done, start in enumerate(starts):
            progress(done, len(starts))
            ids = torch.tensor(token_ids[start : start + window])
            cache.reset()
            placed = [PlacedSegment(0, window, 0, cache.extend(SeqId(0), 0, window))]
            hidden = model.run(model.embed(ids, positions), positions, cache, placed)
            logits = model.logits(hidden)[:-1]
            found.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").double())
    progress(len(starts), len(starts))
    return torch.cat(found)
