"""`mdiq perplexity`: what packed weights cost in quality, measured on a real text beside f32."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mdiq.cli.progress import shown_bar
from mdiq.cli.ring_commands import PerplexityOptions
from mdiq.errors import ConfigError
from mdiq.runtime.placement import set_threads, usable_threads

if TYPE_CHECKING:  # torch is imported after set_threads
    from mdiq.service.perplexity import Row


def execute(options: PerplexityOptions) -> int:
    """Print the perplexities and return the exit code: 1 when weights miss their bound."""
    set_threads(options.threads or usable_threads())
    from mdiq.engine.formats.model_source import find_model
    from mdiq.engine.text.sample_text import sample_text
    from mdiq.engine.text.tokenizer import Tokenizer
    from mdiq.service.perplexity import MeasuredWeights

    console = Console(stderr=True)
    path = find_model(options.model, progress=lambda text: console.print(text, style="dim"))
    # No more text than the tokens can need: a token of English has 4 characters or so, and seldom more than 16.
    text = sample_text() if options.text is None else _read(options.text)
    token_ids = Tokenizer.load(path).encode(text[: 16 * options.tokens])[: options.tokens]
    if len(token_ids) < 2:
        raise ConfigError(f"{options.text}: {len(token_ids)} tokens are too few; give a longer text")
    measured = MeasuredWeights(path, token_ids, is_exact=options.exact)
    rows: list[Row] = []
    for weights in dict.fromkeys(("plain", *(options.weights or ("int8", "int4")))):
        with shown_bar(console) as progress:
            rows.append(measured.row(weights, partial(_advance, progress, weights)))
    if options.as_json:
        report = {"model": str(path), "num_tokens": len(token_ids), "rows": [asdict(row) for row in rows]}
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        _print_table(rows)
    return 0 if all(row.is_within for row in rows) else 1


def _advance(progress: Callable[[str, int, int], None], weights: str, doing: str, done: int, total: int) -> None:
    progress(f"{weights}: {doing}", done, total)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--text {path}: {error.strerror}; give a text file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--text {path}: not UTF-8; give a text file") from None


def _print_table(rows: Sequence["Row"]) -> None:
    table = Table("weights", "mode", "perplexity", "of f32", "at most", "weights in memory")
    for row in rows:
        most = "" if row.most is None else f"{row.most:.3f}"
        ratio = f"{row.ratio:.4f} ± {row.error:.4f}"
        size = f"{row.weight_bytes / 1e6:.0f} MB"
        table.add_row(row.weights, row.mode, f"{row.perplexity:.3f}", ratio, most, size)
    Console().print(table)
