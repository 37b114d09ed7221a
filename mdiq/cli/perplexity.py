"""`mdiq perplexity`: what packed weights cost in quality, measured on a real text beside f32."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from mdiq.errors import ConfigError
from mdiq.runtime.placement import set_threads, usable_threads

if TYPE_CHECKING:
    import torch

_MOST = {"int8": 1.005, "int4": 1.04}
_MOST_OF_4_BITS = 1.01  # of a file of 4-bit types in 4 bits: its values are kept, and activations are rounded
_ERRORS = 2  # standard ones: by so many a ratio must be above what it may be, or it may be chance


def max_ratio(weights: str, best: str) -> float | None:
    """Return the most that perplexity may grow by, as a factor, or None where there is no bound.

    best: the format that suits the file; see quantize.best_format.
    """
    return _MOST_OF_4_BITS if weights == best == "int4" else _MOST.get(weights)


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
    """What one format gave.

    ratio: to f32. error: its standard error, over the tokens of the text. most: what it may be, where there is a bound.
    """

    weights: str
    mode: str
    perplexity: float
    ratio: float
    error: float
    most: float | None
    weight_bytes: int

    @property
    def is_within(self) -> bool:
        """Whether nothing says that the bound is missed: chance alone may explain the rest."""
        return self.most is None or self.ratio - _ERRORS * self.error <= self.most


def measure(options: PerplexityOptions) -> int:
    """Print the perplexities and return the exit code: 1 when weights miss their bound."""
    set_threads(options.threads or usable_threads())
    import torch

    from mdiq.cache import cache_directory
    from mdiq.core.types import LayerRange, WeightSettings
    from mdiq.engine.formats.checkpoint import open_checkpoint
    from mdiq.engine.formats.model_source import find_model
    from mdiq.engine.formats.quantize import best_format, chosen_format
    from mdiq.engine.model.perplexity import losses
    from mdiq.engine.model.stage_model import StageModel
    from mdiq.engine.text.sample_text import sample_text
    from mdiq.engine.text.tokenizer import Tokenizer

    console = Console(stderr=True)
    path = find_model(options.model, progress=lambda text: console.print(text, style="dim"))
    # No more text than the tokens can need: a token of English has 4 characters or so, and seldom more than 16.
    text = sample_text() if options.text is None else _read(options.text)
    token_ids = Tokenizer.load(path).encode(text[: 16 * options.tokens])[: options.tokens]
    if len(token_ids) < 2:
        raise ConfigError(f"{options.text}: {len(token_ids)} tokens are too few; give a longer text")
    rows: list[Row] = []
    plain: torch.Tensor | None = None
    for weights in ("plain", *options.weights):
        with Progress(console=console, transient=True) as bars:
            task = bars.add_task(f"{weights}: loads", total=None)
            show = partial(_advance, bars, task)
            with open_checkpoint(path) as checkpoint:
                best = best_format(checkpoint)
                weights = chosen_format(weights, checkpoint, torch.device("cpu"))
                model = StageModel(
                    checkpoint,
                    LayerRange(0, checkpoint.config.num_layers),
                    owns_embedding_and_head=True,
                    weights=WeightSettings(weights, exact=options.exact),
                    folder=cache_directory(),
                    progress=show,
                )
            bars.update(task, description=f"{weights}: reads")
            found = losses(model, token_ids, progress=show)
        plain = found if plain is None else plain
        ratio, error = compared(found, plain)
        rows.append(
            Row(
                weights="f32" if weights == "plain" else weights,
                mode="exact" if options.exact else "fast",
                perplexity=math.exp(found.mean()),
                ratio=ratio,
                error=error,
                most=max_ratio(weights, best),
                weight_bytes=model.weight_bytes,
            )
        )
        del model
    if options.as_json:
        report = {"model": str(path), "num_tokens": len(token_ids), "rows": [asdict(row) for row in rows]}
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        _print_table(rows)
    return 0 if all(row.is_within for row in rows) else 1


def compared(found: "torch.Tensor", plain: "torch.Tensor") -> tuple[float, float]:
    """Return the ratio of perplexities of two rows of losses of the same tokens, and its standard error."""
    more = found - plain
    ratio = math.exp(more.mean())
    return ratio, ratio * float(more.std(correction=0)) / math.sqrt(len(more))


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
        most = "" if row.most is None else f"{row.most:.3f}"
        ratio = f"{row.ratio:.4f} ± {row.error:.4f}"
        size = f"{row.weight_bytes / 1e6:.0f} MB"
        table.add_row(row.weights, row.mode, f"{row.perplexity:.3f}", ratio, most, size)
    Console().print(table)
