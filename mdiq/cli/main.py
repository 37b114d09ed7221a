"""The command line: parses, wires, and turns every MdiqError into one line and an exit code. Heavy imports come late.

Exit codes: 0 ok, 1 failed, 2 bad usage or input, 130 interrupted (143 by SIGTERM).
"""

import contextlib
import errno
import io
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import mdiq
from mdiq.cache import NO_SPACE
from mdiq.core.types import USUAL_WEIGHTS
from mdiq.errors import MdiqError
from mdiq.plan.partition import Objective
from mdiq.telemetry import logging
from mdiq.transport.room import raise_descriptor_limit

app = typer.Typer(
    name="mdiq",
    help="Run a large language model on several cheap devices at once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Dtype(StrEnum):
    """Number format of activations and KV cache, and of plain weights."""

    F32 = "f32"
    BF16 = "bf16"


class Weights(StrEnum):
    """How weights are held: as suits the file, as --dtype says, or packed; core.types.WeightFormat."""

    AUTO = "auto"
    PLAIN = "plain"
    INT8 = "int8"
    INT4 = "int4"


_USUAL = Weights(USUAL_WEIGHTS)
_MODEL_HELP = (
    "Model directory, .gguf file, or a name (fetched once): smollm2-135m-instruct, qwen2.5-coder-0.5b-instruct, "
    "qwen2.5-coder-1.5b-instruct. [default: smollm2-135m-instruct]"
)
_WEIGHTS_HELP = (
    "How weights are held: auto (4 bits for a file of 4-bit types, else 8; plain on a GPU), plain (as --dtype says), "
    "int8 or int4."
)
_EXACT_HELP = (
    "The same tokens on any number of nodes, alone and among other requests; or whatever kernel and hop is fastest."
)
_SPLIT_HELP = "Share a topology's auto layers evenly instead of by the plan."
_OF_THE_MACHINE = (*NO_SPACE, errno.EIO, errno.EMFILE, errno.ENFILE)


class LogLevel(StrEnum):
    """Minimum severity of log lines."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _make_stdout_utf8(is_json: bool) -> bool:
    # JSON is UTF-8, whatever the terminal or the file's reader expects of text.
    if is_json and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    return is_json


_Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.", callback=_make_stdout_utf8)]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"mdiq {mdiq.__version__}")
        raise typer.Exit


@app.command()
def run(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; or use --prompts.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help=_MODEL_HELP, show_default=False),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Nodes of the ring; each needs a layer. [default: 2]", show_default=False),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers of each node by hand: 10,12,8. [default: even work; the head counts as layers of the Starter]"
        ),
    ] = None,
    topology: Annotated[
        Path | None, typer.Option(help="Run on the nodes of this topology file, which wins over other flags.")
    ] = None,
    join_wait: Annotated[
        float, typer.Option(min=1, help="Seconds to wait for the nodes of a topology to join, at most.")
    ] = 120.0,
    even_split: Annotated[bool, typer.Option("--even-split", help=_SPLIT_HELP)] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="File of JSON lines, one request each, instead of a prompt.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write results to this file as JSON lines, as they finish.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue where --out stopped.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of an answer.")] = 256,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue after the model's end token.")] = False,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens that add up to p.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this times the most likely.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Over 1 avoids tokens seen before.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be repeated.")] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="A token that ends the answer; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random draws.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Use prompts as they are, without the chat template.")] = False,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run all stages in this process, without sockets.")
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="Number format of activations, KV cache and plain weights.")] = Dtype.F32,
    weights: Annotated[Weights, typer.Option(help=_WEIGHTS_HELP)] = _USUAL,
    exact: Annotated[bool, typer.Option("--exact/--fast", help=_EXACT_HELP)] = True,
    wire: Annotated[
        str, typer.Option(help="Activations on the hops: auto, f32, bf16 or i8; or one for each hop: bf16,auto.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0 or auto; the same for all nodes.")] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="Threads that compute, per node. [default: cores / nodes, within the control group's CPU time]",
            show_default=False,
        ),
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Bind node i to core i.")] = False,
    kv_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="KV cache of each node in tokens, in steps of 32. [default: half of a node's share of free memory]",
        ),
    ] = None,
    base_port: Annotated[
        int, typer.Option(min=0, max=65000, help="Node i listens on this port + i; 0: any free port.")
    ] = 0,
    decode_wait: Annotated[
        float,
        typer.Option(min=1, help="Max ms between two tokens of a request while prompts of others are in the ring."),
    ] = 200.0,
    max_live: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Requests in the ring at once. [default: what fills it, 64 to 256]"),
    ] = None,
    no_prefix_reuse: Annotated[
        bool, typer.Option("--no-prefix-reuse", help="Compute every prompt whole, even if it begins like another.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON lines on stdout, a summary last.", callback=_make_stdout_utf8)
    ] = False,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome/Perfetto trace of every loop.")] = None,
    log_level: Annotated[LogLevel, typer.Option(help="Minimum severity of log lines.")] = LogLevel.WARNING,
) -> None:
    """Run prompts on a ring of local node processes, or of the nodes of a topology, and print the answers."""
    from mdiq.cli.run import RunOptions, execute
    from mdiq.core.sequence import SamplingParams

    logging.configure(log_level.value, node="node-0")
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        stop_token_ids=tuple(stop_token_id or ()),
        ignore_eos=ignore_eos,
        seed=seed,
    )
    options = RunOptions(
        prompt=prompt,
        prompts=prompts,
        out=out,
        resume=resume,
        model=model,
        nodes=nodes,
        layers=layers,
        topology=topology,
        join_wait_s=join_wait,
        even_split=even_split,
        params=params,
        raw=raw,
        in_process=in_process,
        dtype=dtype.value,
        weights=weights.value,
        exact=exact,
        wire=wire,
        device=device,
        threads=threads,
        pin=pin,
        kv_tokens=kv_tokens,
        base_port=base_port,
        decode_wait_ms=decode_wait,
        max_live=max_live,
        prefix_reuse=not no_prefix_reuse,
        as_json=as_json,
        trace=trace,
        log_level=log_level.value,
    )
    raise typer.Exit(execute(options))


@app.command()
def perplexity(
    model: Annotated[
        str | None,
        typer.Option(help=_MODEL_HELP, show_default=False),
    ] = None,
    weights: Annotated[
        list[Weights] | None,
        typer.Option(help="Formats beside f32; may be repeated, auto is the file's. [default: int8 and int4]"),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact/--fast", help="Kernels that give the same tokens alone and among other requests, or the fastest."
        ),
    ] = True,
    text: Annotated[Path | None, typer.Option(help="Text to read. [default: Python's own documentation]")] = None,
    tokens: Annotated[int, typer.Option(min=2, max=1_000_000, help="Tokens of the text to read.")] = 4096,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads. [default: cores]")] = None,
    as_json: _Json = False,
) -> None:
    """Measure what packed weights cost in quality: perplexity on a real text, beside f32."""
    from mdiq.cli.perplexity import PerplexityOptions, measure

    chosen = tuple(item.value for item in weights or (Weights.INT8, Weights.INT4) if item is not Weights.PLAIN)
    raise typer.Exit(measure(PerplexityOptions(model, text, tokens, chosen, exact, threads, as_json)))


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Option(help=_MODEL_HELP, show_default=False),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights of this shape instead, written to the cache once: "
            "tiny, smollm2-135m, tinyllama-1.1b, llama-3.2-1b."
        ),
    ] = None,
    bits: Annotated[int, typer.Option(help="Bits of a shape's weights in its file: 8 (Q8_0) or 4 (Q4_0).")] = 8,
    nodes: Annotated[
        str, typer.Option(help="Sizes of the rings to measure, separated by commas; every combination is measured.")
    ] = "1,2",
    users: Annotated[
        str | None, typer.Option(help="Users that ask at once, separated by commas. [default: 1,4]", show_default=False)
    ] = None,
    users_per_node: Annotated[
        str | None,
        typer.Option(help="Users for each node instead of --users; also the smallest ring's users on every ring."),
    ] = None,
    prompt_tokens: Annotated[str, typer.Option(help="Tokens of each prompt, separated by commas.")] = "32",
    answer_tokens: Annotated[int, typer.Option(min=1, max=65536, help="Tokens of each answer.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Rounds; medians are shown.")] = 3,
    weights: Annotated[Weights, typer.Option(help=_WEIGHTS_HELP)] = _USUAL,
    exact: Annotated[bool, typer.Option("--exact/--fast", help=_EXACT_HELP)] = True,
    wire: Annotated[str, typer.Option(help="Activations on all hops: auto, f32, bf16 or i8.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Number format of activations, KV cache and plain weights.")] = Dtype.F32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0 or auto; the same for all nodes.")] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Threads per node. [default: cores / max nodes]", show_default=False),
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Bind node i to core i, and the peer to its first cores.")] = False,
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="KV cache of each node in tokens. [default: what the load needs]")
    ] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(help="Slow every hop down: delay=20ms,bandwidth=10mbit,jitter=5ms, or none; may be repeated."),
    ] = None,
    cpu: Annotated[
        float | None, typer.Option(help="CPU time of each node in cores, by control groups: 0.5. [default: no limit]")
    ] = None,
    apart: Annotated[
        bool, typer.Option("--apart", help="Also measure as many rings of one node at once: what the machine can do.")
    ] = False,
    peer: Annotated[str | None, typer.Option(help="llama-cpp: run the same load through it, too.")] = None,
    peer_python: Annotated[
        str | None, typer.Option(help="Interpreter that has llama-cpp-python. [default: this one]")
    ] = None,
    peer_threads: Annotated[
        str | None,
        typer.Option(help="Threads of the peer, separated by commas. [default: those of each ring's nodes together]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of the draws.")] = 0,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Temperature of the draws; 0 is greedy; not with a peer.")
    ] = 0.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write plots to this directory, as SVG and PNG.")] = None,
    log_level: Annotated[LogLevel, typer.Option(help="Minimum severity of log lines.")] = LogLevel.WARNING,
) -> None:
    """Measure rings of local nodes under load: tokens/s, time to first token, inter-token latency."""
    from mdiq.cli.bench import BenchOptions, execute

    logging.configure(log_level.value, node="node-0")
    options = BenchOptions(
        model=model,
        shape=shape,
        bits=bits,
        nodes=nodes,
        users=users,
        users_per_node=users_per_node,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        repeats=repeats,
        weights=weights.value,
        exact=exact,
        wire=wire,
        dtype=dtype.value,
        device=device,
        threads=threads,
        pin=pin,
        kv_tokens=kv_tokens,
        links=tuple(link or ()),
        cpu=cpu,
        apart=apart,
        peer=peer,
        peer_python=peer_python,
        peer_threads=peer_threads,
        seed=seed,
        temperature=temperature,
        json_file=json_file,
        plot=plot,
        log_level=log_level.value,
    )
    raise typer.Exit(execute(options))


@app.command()
def init(
    node: Annotated[
        list[str] | None,
        typer.Option(
            help="A device: name=address; after commas data_port, control_port, weights_port, device, threads, memory "
            "or layers, as in memory=700M. The Starter first; may be repeated."
        ),
    ] = None,
    spare: Annotated[
        list[str] | None, typer.Option(help="A device that stands by for one that fails; may be repeated.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help=_MODEL_HELP, show_default=False),
    ] = None,
    weights: Annotated[Weights, typer.Option(help=_WEIGHTS_HELP)] = _USUAL,
    insecure: Annotated[bool, typer.Option("--insecure", help="Plain text on the network, without keys.")] = False,
    out: Annotated[Path, typer.Option(help="File to write; its schema is written beside it.")] = Path("topology.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write an annotated topology file from flags, or from questions on a terminal."""
    from mdiq.cli.init import InitOptions
    from mdiq.cli.init import init as execute

    options = InitOptions(tuple(node or ()), tuple(spare or ()), model, weights.value, insecure, out, force)
    raise typer.Exit(execute(options))


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="The topology file.")],
    as_json: _Json = False,
    since: Annotated[
        Path | None,
        typer.Option(help="Say what the service of --name needs after a change from this older file."),
    ] = None,
    name: Annotated[str, typer.Option(help="A node of the file.")] = "",
) -> None:
    """List all errors of a topology file at once, and warn of what is allowed but will hurt."""
    from mdiq.cli.check import check as execute
    from mdiq.cli.check import since as execute_since

    if since is not None:
        raise typer.Exit(execute_since(file, since, name))
    raise typer.Exit(execute(file, as_json=as_json))


@app.command()
def keys(
    file: Annotated[Path, typer.Argument(help="The topology.")],
    rotate: Annotated[
        list[str] | None, typer.Option(help="Make a new pair for this node; may be repeated.", metavar="NAME")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
) -> None:
    """Make a key pair for every node of a topology that has none, and write the public keys into the file."""
    from mdiq.cli.keys import execute

    raise typer.Exit(execute(file, rotate or (), dry_run=dry_run))


@app.command(hidden=True)
def relay(link: Annotated[str, typer.Option(help="How the link is: delay=20ms,bandwidth=10mbit,jitter=5ms.")]) -> None:
    """Stand in front of every hop of a ring (started by mdiq bench)."""
    from mdiq.transport.relay import serve

    serve(link)


@app.command()
def node(
    topology: Annotated[Path | None, typer.Argument(help="The topology file; the same as the Starter's.")] = None,
    name: Annotated[
        str, typer.Option(help="This node's name in the topology.", envvar="MDIQ_NAME", show_default=False)
    ] = "",
    once: Annotated[bool, typer.Option("--once", help="End with the first ring instead of joining the next.")] = False,
    control: Annotated[str, typer.Option(hidden=True)] = "",
    listen: Annotated[str, typer.Option(hidden=True)] = "",
    threads: Annotated[int, typer.Option(min=1, hidden=True)] = 1,
    pin: Annotated[int | None, typer.Option(hidden=True)] = None,
    stdin_key: Annotated[bool, typer.Option("--stdin-key", hidden=True)] = False,
    log_level: Annotated[
        LogLevel | None, typer.Option(help="Minimum severity of log lines. [default: info]", show_default=False)
    ] = None,
) -> None:
    """Serve one node of a topology, ring after ring, until it is stopped."""
    from mdiq.cli.node import serve_node, serve_topology

    if topology is not None:
        logging.configure((log_level or LogLevel.INFO).value, node=name)
        raise typer.Exit(serve_topology(topology, name, once=once))
    # A child of `mdiq run`: control is its endpoint, listen where this node takes activations.
    logging.configure((log_level or LogLevel.WARNING).value, node=name)
    raise typer.Exit(serve_node(name, control, listen, threads, pin, stdin_key=stdin_key))


_Topology = Annotated[Path, typer.Argument(help="The topology file.")]


@app.command()
def plan(
    topology: _Topology,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also show other splits, and what one device more or less would bring.")
    ] = False,
    objective: Annotated[
        Objective | None,
        typer.Option(help="Plan for several users, or for one. [default: as the topology says]", show_default=False),
    ] = None,
    users: Annotated[
        int | None,
        typer.Option(
            min=1, max=256, help="Users at once, with throughput. [default: as the topology says]", show_default=False
        ),
    ] = None,
    forget: Annotated[
        bool, typer.Option("--forget", help="Forget what the nodes measured; they measure again before the next ring.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Show which layers go where, and why, from what the nodes measured in an earlier ring."""
    from mdiq.cli.plan import forget as execute_forget
    from mdiq.cli.plan import plan as execute

    if forget:
        raise typer.Exit(execute_forget(topology))
    raise typer.Exit(execute(topology, objective=objective, users=users, with_more=explain, as_json=as_json))


@app.command()
def serve(
    topology: _Topology,
    even_split: Annotated[bool, typer.Option("--even-split", help=_SPLIT_HELP)] = False,
    log_level: Annotated[LogLevel, typer.Option(help="Minimum severity of log lines.")] = LogLevel.INFO,
) -> None:
    """Serve a topology on its Starter, with the HTTP API, until it is stopped."""
    from mdiq.cli.serve import serve as execute

    logging.configure(log_level.value, node="starter")
    raise typer.Exit(execute(topology, even_split=even_split))


@app.command()
def status(topology: _Topology, as_json: _Json = False) -> None:
    """Show the ring that mdiq serve keeps up on this machine; exit with 1 while it does not serve."""
    from mdiq.cli.admin import status as execute

    raise typer.Exit(execute(topology, as_json=as_json))


@app.command()
def drain(
    topology: _Topology,
    node: Annotated[str, typer.Argument(help="A node of the ring.")],
    undo: Annotated[bool, typer.Option("--undo", help="Let the node in again.")] = False,
) -> None:
    """Take a node out of the ring once its work is done; the others take its layers."""
    from mdiq.cli.admin import drain as execute

    raise typer.Exit(execute(topology, node, undo=undo))


@app.command()
def reload(topology: _Topology) -> None:
    """Have mdiq serve read its topology again; a node that is no longer in it is cut off."""
    from mdiq.cli.admin import reload as execute

    raise typer.Exit(execute(topology))


_cache = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(_cache, name="cache", help="Show what the cache holds, or clear it.")


@_cache.command("list")
def cache_list(as_json: _Json = False) -> None:
    """Show models, packed weights and copies of weights in the cache, in the order in which they will be removed."""
    from mdiq.cli.cache import show

    raise typer.Exit(show(as_json=as_json))


@_cache.command("clear")
def cache_clear(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Names as mdiq cache list shows them, or folders such as packed. [default: all]"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
) -> None:
    """Remove everything from the cache that no process uses."""
    from mdiq.cli.cache import clear

    logging.configure(LogLevel.WARNING.value, node="")
    raise typer.Exit(clear(names or (), dry_run=dry_run))


def main() -> None:
    """Run the command line; errors that mdiq raises on purpose, and those of files and disks, are a line on stderr."""
    _show_any_text()
    raise_descriptor_limit()
    try:
        app(standalone_mode=True)
    except MdiqError as error:
        sys.stderr.writelines(f"mdiq: {line}\n" for line in str(error).splitlines())
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("mdiq: interrupted\n")
        sys.exit(130)
    except OSError as error:
        if error.filename is None and error.errno not in _OF_THE_MACHINE:
            raise
        where = error.filename or ("this process" if error.errno in (errno.EMFILE, errno.ENFILE) else "output")
        sys.stderr.write(f"mdiq: {where}: {error.strerror}\n")
        if error.filename is None:  # Python writes what is left in stdout's buffer once more when it ends
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _show_any_text() -> None:
    """Have stdout and stderr show what their encoding lacks as ? or as an escape, in place of an error."""
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before this process began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
