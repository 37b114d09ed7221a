"""`mdiq perplexity`: what packed weights cost in quality, measured on a real text beside f32."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from mdiq.errors import ConfigError
from mdiq.runtime.placement import set_threads, usable_threads

BOUNDS = {"int8": 1.01, "int4": 1.04}
"""Most that the perplexity may grow by, as a factor."""


@dataclass(frozen=True, slots=True)
class PerplexityOptions:
    """The flags of `mdiq perplexity`; see its help."""

    model: str | None
    text: Path | None
    tokens: int
    weights: tuple[str, ...]
    exact: bool
    threads: int | None
    as_json: bool


@dataclass(frozen=True, slots=True)
class Row:
    """What one format gave. ratio: to f32. most: what the ratio may be, where there is a bound."""

    weights: str
    mode: str
    perplexity: float
    ratio: float
    most: float | None
    weight_bytes: int


def measure(options: PerplexityOptions) -> int:
    """Print the perplexities and return the exit code: 1 when weights miss their bound."""
    set_threads(options.threads or usable_threads())
    import torch

    from mdiq.cache import cache_directory
    from mdiq.core.types import LayerRange
    from mdiq.engine.checkpoint import open_checkpoint
    from mdiq.engine.model_source import find_model
    from mdiq.engine.perplexity import perplexity
    from mdiq.engine.quantize import chosen_format
    from mdiq.engine.sample_text import sample_text
    from mdiq.engine.stage_model import StageModel, WeightSettings
    from mdiq.engine.tokenizer import Tokenizer

    console = Console(stderr=True)
    path = find_model(options.model, progress=lambda text: console.print(text, style="dim"))
    # No more text than the tokens can need: a token of English has 4 characters or so, and seldom more than 16.
    text = sample_text() if options.text is None else _read(options.text)
    token_ids = Tokenizer.load(path).encode(text[: 16 * options.tokens])[: options.tokens]
    if len(token_ids) < 2:
        raise ConfigError(f"{options.text}: {len(token_ids)} tokens are too few; give a longer text")
    rows: list[Row] = []
    for weights in ("plain", *options.weights):
        with Progress(console=console, transient=True) as bars:
            task = bars.add_task(f"{weights}: loads", total=None)
            show = partial(_advance, bars, task)
            with open_checkpoint(path) as checkpoint:
                weights = chosen_format(weights, checkpoint, torch.device("cpu"))
                model = StageModel(
                    checkpoint,
                    LayerRange(0, checkpoint.config.num_layers),
                    owns_embedding_and_head=True,
                    weights=WeightSettings(weights, options.exact, cache_directory()),
                    dtype=torch.float32,
                    device=torch.device("cpu"),
                    progress=show,
                )
            bars.update(task, description=f"{weights}: reads")
            value = perplexity(model, token_ids, progress=show)
        rows.append(
            Row(
                weights="f32" if weights == "plain" else weights,
                mode="exact" if options.exact else "fast",
                perplexity=value,
                ratio=value / rows[0].perplexity if rows else 1.0,
                most=BOUNDS.get(weights),
                weight_bytes=model.weight_bytes,
            )
        )
        del model
    if options.as_json:
        report = {"model": str(path), "num_tokens": len(token_ids), "rows": [asdict(row) for row in rows]}
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        _print_table(rows)
    return 0 if all(row.most is None or row.ratio <= row.most for row in rows) else 1


def _advance(bars: Progress, task: TaskID, done: int, total: int) -> None:
    bars.update(task, completed=done, total=total)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--text {path}: {error.strerror}; give a text file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--text {path}: not UTF-8; give a text file") from None


def _print_table(rows: Sequence[Row]) -> None:
    table = Table("weights", "mode", "perplexity", "of f32", "at most", "weights in memory")
    for row in rows:
        most = "" if row.most is None else f"{row.most:.2f}"
        size = f"{row.weight_bytes / 1e6:.0f} MB"
        table.add_row(row.weights, row.mode, f"{row.perplexity:.3f}", f"{row.ratio:.4f}", most, size)
    Console().print(table)
