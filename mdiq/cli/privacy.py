"""`mdiq privacy`: what a node could read of the prompts, and what noise against it costs."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mdiq.cli.flags import parse_numbers
from mdiq.cli.options import HeldAs, Json, Model
from mdiq.cli.progress import shown_bar
from mdiq.core.types import USUAL_WEIGHTS, WeightSettings
from mdiq.errors import ConfigError
from mdiq.plan.privacy import promised
from mdiq.runtime.placement import set_threads, usable_threads

if TYPE_CHECKING:  # torch is imported after set_threads
    from mdiq.report.privacy import PrivacyReport

MAX_EPSILON, MAX_CUT, MAX_TOKENS = 1e6, 1_024, 1_000_000


@dataclass(frozen=True, slots=True)
class PrivacyOptions:
    """Measure which tokens of a prompt a node can recover. It also measures what noise costs in quality."""

    model: Model = None
    cut: Annotated[str, typer.Option(help="Layers before the hop, separated by commas; each is measured.")] = "1,4,8"
    epsilon: Annotated[
        str, typer.Option(help="Epsilons of a row, separated by commas; no noise is measured besides.")
    ] = "100000,10000,1000,100,10"
    delta: Annotated[float, typer.Option(help="Delta of a row, and of a whole prompt.")] = 1e-6
    clip: Annotated[
        float | None,
        typer.Option(help="L2 norm to which rows are clipped. [default: their median at each cut]", show_default=False),
    ] = None
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text: its beginning is the attacker's, its end the user's. [default: Python's own documentation]",
            show_default=False,
        ),
    ] = None
    train_tokens: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Tokens that the attacker runs.")] = 6144
    test_tokens: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Tokens of the user's prompts.")] = 512
    weights: HeldAs = USUAL_WEIGHTS
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads. [default: cores]", show_default=False)
    ] = None
    plot: Annotated[Path | None, typer.Option(help="Write a picture to this directory, as SVG and PNG.")] = None
    as_json: Json = False


def execute(options: PrivacyOptions) -> int:
    """Print what was measured; return the exit code."""
    cuts = parse_numbers("--cut", options.cut, MAX_CUT)
    epsilons = parse_epsilons(options.epsilon)
    if not 1e-12 <= options.delta <= 0.1:
        raise ConfigError(f"--delta {options.delta:g}: it must be from 1e-12 to 0.1, for example 1e-6")
    if options.clip is not None and not 1e-6 <= options.clip <= 1e9:
        raise ConfigError(f"--clip {options.clip:g}: it must be from 1e-6 to 1e9; leave it out for the median")
    for epsilon in epsilons:  # a package that is missing is named now, and not after minutes of measuring
        promised(epsilon, options.delta, 1.0)
    if options.plot is not None:
        from mdiq.bench.plots import check_plots

        check_plots()
    set_threads(options.threads or usable_threads())
    from mdiq.engine.formats.model_source import find_model
    from mdiq.engine.text.sample_text import sample_text
    from mdiq.engine.text.tokenizer import Tokenizer
    from mdiq.report.privacy import Wishes, measure, texts_of

    console = Console(stderr=True)
    path = find_model(options.model, progress=lambda text: console.print(text, style="dim"))
    text = sample_text() if options.text is None else _read(options.text)
    texts = texts_of(Tokenizer.load(path).encode(text), num_train=options.train_tokens, num_test=options.test_tokens)
    wishes = Wishes(cuts, epsilons, options.delta, options.clip)
    with shown_bar(console) as progress:
        report = measure(path, WeightSettings(options.weights), texts, wishes, progress)
    if options.as_json:
        sys.stdout.write(json.dumps(asdict(report)) + "\n")
    else:
        _print(report)
    if options.plot is not None:
        from mdiq.report.privacy_plot import draw

        for file in draw(report, options.plot):
            console.print(f"wrote {file}", style="dim", highlight=False)
    return 0


def parse_epsilons(text: str) -> tuple[float, ...]:
    """Return the epsilons of a list like 1000,100,8, largest first."""
    try:
        epsilons = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--epsilon {text}: not numbers with commas between; write for example 1000,100,8") from None
    if not all(0.01 <= epsilon <= MAX_EPSILON for epsilon in epsilons):
        raise ConfigError(f"--epsilon {text}: each must be from 0.01 to {MAX_EPSILON:,.0f}")
    return tuple(sorted(set(epsilons), reverse=True))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--text {path}: {error.strerror}; give a text file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--text {path}: not UTF-8; give a text file") from None


def _print(report: "PrivacyReport") -> None:
    from mdiq.report.privacy_plot import level_text, of_prompt

    console = Console()
    headings = ("layers", "epsilon", "of a prompt", "clip", "sigma", "linear", "nearest", "perplexity", "changed")
    table = Table(*headings, box=None, pad_edge=False)
    for row in report.rows:
        table.add_row(
            str(row.cut),
            level_text(row.epsilon),
            of_prompt(row),
            "" if row.clip is None else f"{row.clip:.4g}",
            f"{row.sigma:.3g}" if row.sigma else "",
            f"{row.linear:.1%}",
            f"{row.nearest:.1%}",
            f"{row.perplexity:.4g}",
            f"{row.changed:.1%}",
        )
    console.print(table)
    console.print(
        f"{Path(report.model).name}, {report.weights} weights; {report.num_test} tokens of the user in prompts of "
        f"{report.prompt_tokens}, {report.num_train} of the attacker; delta {report.delta:g}.\n"
        "layers: those before the hop. epsilon: of each row.\n"
        "linear, nearest: share of the user's tokens that each attack recovers; better attacks exist.\n"
        "changed: share of the most likely next tokens that noise makes others.",
        highlight=False,
        markup=False,
    )
