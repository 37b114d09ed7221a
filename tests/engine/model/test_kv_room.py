"""How much KV cache a Stage makes room for where nobody says a number."""

from pathlib import Path

import pytest

from mdiq.core.types import LayerRange
from mdiq.engine import runner
from mdiq.engine.runner import StageRunner
from tests.engine.tiny_models import make_model

_MIB = 1 << 20
_TOKEN_BYTES = 4 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, head size, f32


@pytest.mark.parametrize(
    ("free", "share", "limit", "half"),
    [
        (14, 1.0, None, 7),
        (24, 0.5, None, 6),
        (24, 0.5, 104, 2),  # the limit is the process's own, though another one runs beside it
        (24, 0.5, 300, 6),
        (24, 0.25, 120, 3),
    ],
)
def test_half_of_what_is_free_for_this_process_is_kv_cache(
    free: int,
    share: float,
    limit: int | None,
    half: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MiB; the process takes 100 of them."""
    make_model("llama-gqa-tied").save_pretrained(tmp_path)
    monkeypatch.setattr(runner, "free_bytes", lambda device: free * _MIB)
    monkeypatch.setattr(runner, "rss_bytes", lambda: 100 * _MIB)
    stage = StageRunner.load(
        tmp_path,
        LayerRange(0, 4),
        is_last=True,
        owns_embedding_and_head=True,
        kv_tokens=None,
        memory_share=share,
        memory_bytes=None if limit is None else limit * _MIB,
    )
    assert stage.kv_capacity_tokens == half * _MIB // _TOKEN_BYTES
