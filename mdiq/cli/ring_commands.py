"""The commands that run a model here: options, each with its help. run.py, perplexity.py and bench.py do the work."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mdiq.cli.flags import parse_biases, parse_form
from mdiq.cli.options import Device, Dtype, EvenSplit, Exact, HeldAs, Json, Level, Model, Weights, make_stdout_utf8
from mdiq.core.sequence import SamplingParams
from mdiq.core.types import USUAL_WEIGHTS, WeightSettings
from mdiq.plan.pace import PaceSettings


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Run prompts on a ring, and print the answers. The ring is of local processes, or of the nodes of a topology."""

    prompt: Annotated[str | None, typer.Argument(help="The prompt; or use --prompts.")] = None
    model: Model = None
    nodes: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Nodes of the ring; each needs a layer. [default: 2]", show_default=False),
    ] = None
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers of each node by hand: 10,12,8. [default: even work; the head counts as layers of the Starter]"
        ),
    ] = None
    min_starter_layers: Annotated[
        int,
        typer.Option(min=1, max=1024, help="Layers that stay on the Starter, from the first on; see docs/privacy.md."),
    ] = 1
    topology: Annotated[
        Path | None, typer.Option(help="Run on the nodes of this topology file, which wins over other flags.")
    ] = None
    join_wait: Annotated[
        float, typer.Option(min=1, help="Seconds to wait for the nodes of a topology to join, at most.")
    ] = 120.0
    even_split: EvenSplit = False
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of JSON lines, one request each, instead of a prompt."),
    ] = None
    out: Annotated[Path | None, typer.Option(help="Write results to this file as JSON lines, as they finish.")] = None
    resume: Annotated[bool, typer.Option("--resume", help="Continue where --out stopped.")] = False
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of an answer.")] = 256
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue after the model's end token.")] = False
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 is off.")] = 0
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens that add up to p.")] = 1.0
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this times the most likely.")] = 0.0
    repetition_penalty: Annotated[float, typer.Option(help="Over 1 avoids tokens seen before.")] = 1.0
    presence_penalty: Annotated[
        float, typer.Option(help="-2 to 2: taken from the logits of tokens that the answer has.")
    ] = 0.0
    frequency_penalty: Annotated[
        float, typer.Option(help="-2 to 2: the same for each time that the answer has the token.")
    ] = 0.0
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            help="TOKEN=BIAS, a token id and -100 to 100: added to its logit, as in 1234=-100; may be repeated."
        ),
    ] = None
    min_tokens: Annotated[
        int, typer.Option(help="So many tokens come before an end token or a stop text can end it.")
    ] = 0
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be repeated.")] = None
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option(help="A token that ends the answer; may be repeated."),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the random draws.")] = 0
    response_format: Annotated[
        str | None,
        typer.Option(
            help='Form of the answer, as JSON of the API: \'{"type": "json_object"}\', or with a JSON schema.'
        ),
    ] = None
    raw: Annotated[bool, typer.Option("--raw", help="Use prompts as they are, without the chat template.")] = False
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run all stages in this process, without sockets.")
    ] = False
    dtype: Dtype = "f32"
    weights: HeldAs = USUAL_WEIGHTS
    exact: Exact = True
    wire: Annotated[
        str, typer.Option(help="Activations on the hops: auto, f32, bf16 or i8; or one for each hop: bf16,auto.")
    ] = "auto"
    device: Device = "cpu"
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="Threads that compute, per node. [default: cores / nodes, within the control group's CPU time]",
            show_default=False,
        ),
    ] = None
    pin: Annotated[bool, typer.Option("--pin", help="Bind node i to core i.")] = False
    kv_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="KV cache of each node in tokens, in steps of 32. [default: half of a node's share of free memory]",
        ),
    ] = None
    base_port: Annotated[
        int, typer.Option(min=0, max=65000, help="Node i listens on this port + i; 0: any free port.")
    ] = 0
    decode_wait: Annotated[
        float,
        typer.Option(min=1, help="Max ms between two tokens of a request while prompts of others are in the ring."),
    ] = 200.0
    max_live: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Requests in the ring at once. [default: what fills it, 64 to 256]"),
    ] = None
    no_prefix_reuse: Annotated[
        bool, typer.Option("--no-prefix-reuse", help="Compute every prompt whole, even if it begins like another.")
    ] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON lines on stdout, a summary last.", callback=make_stdout_utf8)
    ] = False
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome/Perfetto trace of every loop.")] = None
    log_level: Level = "warning"

    @property
    def params(self) -> SamplingParams:
        """How to sample, where a line of a prompts file does not say it.

        Raises:
            ConfigError: a flag is out of range.
        """
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=parse_biases(self.logit_bias or ()),
            min_tokens=self.min_tokens,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_id or ()),
            ignore_eos=self.ignore_eos,
            seed=self.seed,
            grammar=parse_form(self.response_format),
        )

    @property
    def held(self) -> WeightSettings:
        return WeightSettings(self.weights, self.dtype, self.exact, self.device)

    @property
    def pace(self) -> PaceSettings:
        return PaceSettings(decode_wait_s=self.decode_wait / 1_000, max_live=self.max_live)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Keep a ring up and serve its HTTP API. The ring is of a topology, on its Starter, or of local processes."""

    topology: Annotated[
        Path | None, typer.Argument(help="The topology file; without one, the ring is of this machine alone.")
    ] = None
    even_split: EvenSplit = False
    model: Model = None
    nodes: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Nodes of a ring without a topology. [default: 2]", show_default=False),
    ] = None
    layers: Annotated[str | None, typer.Option(help="Layers of each of them by hand: 10,12,8.")] = None
    weights: HeldAs = USUAL_WEIGHTS
    exact: Exact = True
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Threads of each of them. [default: cores / nodes]", show_default=False),
    ] = None
    kv_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="KV cache of each of them in tokens. [default: half of its share of free memory]"),
    ] = None
    max_live: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Requests in the ring at once. [default: what fills it, 64 to 256]"),
    ] = None
    host: Annotated[
        str | None,
        typer.Option(help="Address of the API without a topology. [default: 127.0.0.1]", show_default=False),
    ] = None
    port: Annotated[
        int | None,
        typer.Option(
            min=1024, max=65535, help="Port of the API without a topology. [default: 8080]", show_default=False
        ),
    ] = None
    keys_file: Annotated[
        Path | None, typer.Option(help="File of API keys, which clients must send; needed beyond loopback.")
    ] = None
    journal: Annotated[
        Path | None, typer.Option(help="File that keeps responses in the background over a restart. [default: none]")
    ] = None
    log_level: Level = "info"


@dataclass(frozen=True, slots=True)
class PerplexityOptions:
    """Measure what packed weights cost in quality. It compares the perplexity on a real text with that of f32."""

    model: Model = None
    weights: Annotated[
        list[Weights] | None,
        typer.Option(help="Formats beside f32; may be repeated, auto is the file's. [default: int8 and int4]"),
    ] = None
    exact: Annotated[
        bool,
        typer.Option(
            "--exact/--fast", help="Kernels that give the same tokens alone and among other requests, or the fastest."
        ),
    ] = True
    text: Annotated[Path | None, typer.Option(help="Text to read. [default: Python's own documentation]")] = None
    tokens: Annotated[int, typer.Option(min=2, max=1_000_000, help="Tokens of the text to read.")] = 4096
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads. [default: cores]")] = None
    as_json: Json = False


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Measure rings of local nodes under load. It shows tokens/s, time to first token and inter-token latency."""

    model: Model = None
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights of this shape instead, written to the cache once: "
            "tiny, smollm2-135m, tinyllama-1.1b, llama-3.2-1b, tiny-gpt2, gpt2; -mha after it: without GQA."
        ),
    ] = None
    bits: Annotated[int, typer.Option(help="Bits of a shape's weights in its file: 8 (Q8_0) or 4 (Q4_0).")] = 8
    nodes: Annotated[
        str, typer.Option(help="Sizes of the rings to measure, separated by commas; every combination is measured.")
    ] = "1,2"
    users: Annotated[
        str | None, typer.Option(help="Users that ask at once, separated by commas. [default: 1,4]", show_default=False)
    ] = None
    users_per_node: Annotated[
        str | None,
        typer.Option(help="Users for each node instead of --users; also the smallest ring's users on every ring."),
    ] = None
    prompt_tokens: Annotated[str, typer.Option(help="Tokens of each prompt, separated by commas.")] = "32"
    answer_tokens: Annotated[int, typer.Option(min=1, max=65536, help="Tokens of each answer.")] = 64
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Rounds; medians are shown.")] = 3
    weights: HeldAs = USUAL_WEIGHTS
    exact: Exact = True
    wire: Annotated[str, typer.Option(help="Activations on all hops: auto, f32, bf16 or i8.")] = "auto"
    dtype: Dtype = "f32"
    device: Device = "cpu"
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Threads per node. [default: cores / max nodes]", show_default=False),
    ] = None
    pin: Annotated[bool, typer.Option("--pin", help="Bind node i to core i, and the peer to its first cores.")] = False
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="KV cache of each node in tokens. [default: what the load needs]")
    ] = None
    link: Annotated[
        list[str] | None,
        typer.Option(help="Slow every hop down: delay=20ms,bandwidth=10mbit,jitter=5ms, or none; may be repeated."),
    ] = None
    cpu: Annotated[
        float | None, typer.Option(help="CPU time of each node in cores, by control groups: 0.5. [default: no limit]")
    ] = None
    apart: Annotated[
        bool, typer.Option("--apart", help="Also measure as many rings of one node at once: what the machine can do.")
    ] = False
    peer: Annotated[str | None, typer.Option(help="llama-cpp: run the same load through it, too.")] = None
    peer_python: Annotated[
        str | None, typer.Option(help="Interpreter that has llama-cpp-python. [default: this one]")
    ] = None
    peer_threads: Annotated[
        str | None,
        typer.Option(help="Threads of the peer, separated by commas. [default: those of each ring's nodes together]"),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of the draws.")] = 0
    temperature: Annotated[
        str, typer.Option(help="Temperatures of the draws, separated by commas; 0 is greedy; not with a peer.")
    ] = "0"
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file as JSON.")] = None
    plot: Annotated[Path | None, typer.Option(help="Write plots to this directory, as SVG and PNG.")] = None
    log_level: Level = "warning"

    @property
    def held(self) -> WeightSettings:
        return WeightSettings(self.weights, self.dtype, self.exact, self.device)
