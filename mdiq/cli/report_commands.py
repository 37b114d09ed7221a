"""The commands that write pages for the person who decides: options, each with its help."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mdiq.cli.options import Dtype, HeldAs, Level, Model
from mdiq.core.types import USUAL_WEIGHTS, WeightSettings


class PageLanguage(StrEnum):
    """report/page.py's Language, or both."""

    EN = "en"
    JA = "ja"
    BOTH = "both"


Pages = Annotated[PageLanguage, typer.Option(help="Language of the pages.")]
Link = Annotated[
    str | None, typer.Option(help="Slow every hop down: delay=20ms,bandwidth=10mbit,jitter=5ms. [default: as it is]")
]
Cpu = Annotated[
    float | None, typer.Option(help="CPU time of each node in cores, by control groups: 0.5. [default: no limit]")
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="Threads per node. [default: cores / nodes]", show_default=False),
]


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """Measure rings of 1 to N nodes as the MDI-LLM paper does. The nodes are local; it writes tables and plots."""

    out: Annotated[Path, typer.Option(help="Folder for the pages, pictures, JSON and CSV.")] = Path("evaluation")
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model's file, folder or name, or a shape of mdiq bench with random weights; may be repeated. "
            "[default: smollm2-135m, which has GQA, and gpt2, which has not]",
            show_default=False,
        ),
    ] = None
    nodes: Annotated[int, typer.Option(min=1, max=64, help="Nodes of the largest ring.")] = 3
    prompt_tokens: Annotated[int, typer.Option(min=1, max=1 << 20, help="Tokens of each prompt.")] = 16
    answer_tokens: Annotated[int, typer.Option(min=2, max=65536, help="Tokens of each answer.")] = 64
    no_kv_cache: Annotated[
        bool,
        typer.Option("--no-kv-cache", help="Also generate without a KV cache: all that came before is computed again."),
    ] = False
    lengths: Annotated[
        str, typer.Option(help="Lengths at which the bytes of a token are counted, separated by commas.")
    ] = "16,64,128"
    wires: Annotated[str, typer.Option(help="Formats of the hops whose bytes are counted.")] = "f32,bf16,i8"
    weights: HeldAs = USUAL_WEIGHTS
    dtype: Dtype = "f32"
    bits: Annotated[int, typer.Option(help="Bits of a shape's weights in its file: 8 or 4.")] = 8
    threads: Threads = None
    link: Link = None
    cpu: Cpu = None
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0
    language: Pages = PageLanguage.BOTH
    log_level: Level = "error"

    @property
    def held(self) -> WeightSettings:
        return WeightSettings(self.weights, self.dtype)


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """Try a ring in stages, and write a report that recommends. The nodes are local; it is for the one who decides."""

    out: Annotated[Path, typer.Option(help="Folder for the report, its pictures, JSON and CSV.")] = Path("report")
    api: Annotated[
        str | None,
        typer.Option(
            help="Measure the running ring at this address of its API instead, as it stands: http://127.0.0.1:8080. "
            "Its key is read from MDIQ_API_KEY."
        ),
    ] = None
    model: Model = None
    shape: Annotated[
        str | None, typer.Option(help="Random weights of a shape of mdiq bench instead, to measure speed alone.")
    ] = None
    bits: Annotated[int, typer.Option(help="Bits of a shape's weights in its file: 8 or 4.")] = 8
    nodes: Annotated[int, typer.Option(min=2, max=64, help="All nodes: those of the last stage.")] = 3
    few: Annotated[int, typer.Option(min=2, max=64, help="Nodes of the first two stages.")] = 2
    users: Annotated[int, typer.Option(min=1, max=256, help="Users that ask at once.")] = 4
    prompt_tokens: Annotated[int, typer.Option(min=1, max=1 << 20, help="Tokens of each prompt.")] = 32
    answer_tokens: Annotated[int, typer.Option(min=4, max=65536, help="Tokens of each answer.")] = 48
    lengths: Annotated[
        str, typer.Option(help="Lengths at which the bytes of a token are counted, separated by commas.")
    ] = "16,64,128"
    wires: Annotated[str, typer.Option(help="Formats of the hops whose bytes are counted.")] = "f32,bf16,i8"
    weights: HeldAs = USUAL_WEIGHTS
    dtype: Dtype = "f32"
    threads: Threads = None
    link: Link = None
    cpu: Cpu = None
    device_memory: Annotated[
        str | None, typer.Option(help="Memory of one device, as in 4G. [default: this machine's]", show_default=False)
    ] = None
    min_tokens_per_s: Annotated[float, typer.Option(min=0, help="Gate: tokens/s of all users, at least.")] = 0.0
    max_token_ms: Annotated[
        float, typer.Option(min=1, help="Gate: ms between two tokens of a user (95th percentile), at most.")
    ] = 1000.0
    max_recovery: Annotated[
        float, typer.Option(min=1, help="Gate: seconds until all go on after a node was killed, at most.")
    ] = 60.0
    drill_node: Annotated[
        str | None,
        typer.Option(
            help="Node that the recovery drills kill, in rings that have it. [default: the one with the most layers]",
            show_default=False,
        ),
    ] = None
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Run all stages, also past a gate that does not pass.")
    ] = False
    watts: Annotated[
        float | None, typer.Option(min=0, help="Power of one device. [default: what this machine tells of itself]")
    ] = None
    device_cost: Annotated[float | None, typer.Option(min=0, help="Price of one device.")] = None
    power_price: Annotated[float | None, typer.Option(min=0, help="Price of a kWh.")] = None
    price_per_million_tokens: Annotated[
        float | None, typer.Option(min=0, help="What a million tokens cost elsewhere.")
    ] = None
    currency: Annotated[str, typer.Option(help="Currency of all prices.")] = "EUR"
    lifetime_years: Annotated[float, typer.Option(min=0.1, help="Years over which a device is paid for.")] = 3.0
    load_share: Annotated[float, typer.Option(min=0.001, max=1, help="Part of the time in which the ring answers.")] = (
        1.0
    )
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0
    language: Pages = PageLanguage.BOTH
    log_level: Level = "error"

    @property
    def held(self) -> WeightSettings:
        return WeightSettings(self.weights, self.dtype)
