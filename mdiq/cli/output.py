"""What `mdiq run` prints: streamed text, JSON lines, the closing table. Answers go to stdout, the rest to stderr."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.table import Table

from mdiq.core.sequence import FinishReason
from mdiq.runtime.options import HopFigures, NodeFigures, PaceFigures


@dataclass(slots=True)
class Result:
    """One Sequence as it came out. Times are seconds since the run began to serve.

    request: digest of the line that asked for it; empty for a lone prompt.
    num_resumed: tokens that are of an earlier run.
    """

    index: int
    prompt_token_ids: tuple[int, ...]
    submitted_s: float
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    error: str | None = None
    first_token_s: float | None = None
    finished_s: float = 0.0
    cached_prompt_tokens: int = 0
    request: str = ""
    num_resumed: int = 0

    @property
    def num_generated(self) -> int:
        """Tokens that this run has generated."""
        return len(self.token_ids) - self.num_resumed

    def as_json(self) -> str:
        """Return the line of `--json` and of a results file."""
        value: dict[str, object] = {
            "index": self.index,
            "prompt_token_ids": list(self.prompt_token_ids),
            "token_ids": self.token_ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "cached_prompt_tokens": self.cached_prompt_tokens,
            "timings": self._timings(),
        }
        if self.num_resumed:
            value["resumed_tokens"] = self.num_resumed
        if self.request:
            value["request"] = self.request
        if self.error is not None:
            value["error"] = self.error
        return json.dumps(value, ensure_ascii=False)

    def _timings(self) -> Mapping[str, float | None]:
        ttft_s = None if self.first_token_s is None else self.first_token_s - self.submitted_s
        decode_s = None if self.first_token_s is None else self.finished_s - self.first_token_s
        return {
            "submitted_s": round(self.submitted_s, 6),
            "ttft_s": _rounded(ttft_s, 6),
            "total_s": round(self.finished_s - self.submitted_s, 6),
            "decode_tokens_per_s": round((self.num_generated - 1) / decode_s, 3) if decode_s else None,
        }


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a whole run.

    wall_s: from the first submission to the last token.
    counts: what the Ring ignored or mended; prefill: what became of prompts; see RingProtocol.
    hops: in ring order; wire_check_nats: see RingHost.
    overlap: per Node, the share of its compute time in which a neighbour computed too; None without a trace.
    """

    model: str
    dtype: str
    wall_s: float
    results: Sequence[Result]
    nodes: Sequence[NodeFigures]
    counts: Mapping[str, int]
    pace: PaceFigures
    overlap: Mapping[str, float] | None = None
    prefill: Mapping[str, int] = field(default_factory=dict)
    hops: Sequence[HopFigures] = ()
    wire_check_nats: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that this run has generated."""
        return sum(result.num_generated for result in self.results)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens of all Sequences over the wall time, prompts included in the time."""
        return self.num_tokens / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def ttft_s(self) -> float | None:
        """Median time to first token."""
        times = [r.first_token_s - r.submitted_s for r in self.results if r.first_token_s is not None]
        return statistics.median(times) if times else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens per second of all Sequences while all of them decoded; None where that was never so."""
        found = [(r.first_token_s, r.finished_s, r.num_generated) for r in self.results if r.first_token_s is not None]
        if len(found) < len(self.results) or not found:
            return None
        if max(first for first, _, _ in found) >= min(last for _, last, _ in found):
            return None
        return sum((count - 1) / (last - first) for first, last, count in found)

    def share(self, seconds: float) -> float:
        """Return seconds as a share of the wall time."""
        return seconds / self.wall_s if self.wall_s > 0 else 0.0

    def as_json(self) -> str:
        """Return the last line of `--json`."""
        nodes = []
        for node in self.nodes:
            value: dict[str, object] = {
                "name": node.name,
                "layers": [node.layers.start, node.layers.stop],
                "rss_bytes": node.rss_bytes,
                "weight_bytes": node.weight_bytes,
                "busy_share": round(self.share(node.busy_s), 4),
                "waiting_share": round(self.share(node.waiting_s), 4),
                "bytes_in": node.bytes_in,
                "bytes_out": node.bytes_out,
                "frames_dropped": node.dropped,
            }
            if self.overlap is not None:
                value["overlap_share"] = round(self.overlap[node.name], 4)
            nodes.append(value)
        summary = {
            "model": self.model,
            "dtype": self.dtype,
            "num_sequences": len(self.results),
            "num_tokens": self.num_tokens,
            "wall_s": round(self.wall_s, 4),
            "tokens_per_s": round(self.tokens_per_s, 3),
            "ttft_s": _rounded(self.ttft_s, 4),
            "pace": self._pace(),
            "wires": [hop.wire for hop in self.hops],
            "hops": [
                {
                    "delay_s": _rounded(hop.delay_s, 6),
                    "bytes_per_s": _rounded(hop.bytes_per_s, 0),
                }
                for hop in self.hops
            ],
            "wire_check_nats": _rounded(self.wire_check_nats, 6),
            "nodes": nodes,
            "counts": {**self.counts, **self.prefill},
        }
        return json.dumps({"summary": summary})

    def _pace(self) -> Mapping[str, object]:
        pace = self.pace
        return {
            "num_live": pace.num_live,
            "in_flight": pace.in_flight,
            "cap": pace.cap,
            "hops_s": _rounded(pace.hops_s, 6),
            "predicted_tokens_per_s": round(pace.predicted_tokens_per_s, 3),
            "measured_tokens_per_s": _rounded(self.decode_tokens_per_s, 3),
            "chunk_tokens": pace.chunk_tokens,
            "decode_gap_ms_max": round(pace.decode_gap_s * 1_000, 3),
        }


def print_table(console: Console, summary: Summary) -> None:
    """Print the closing table: one line of the whole, one row a Node."""
    ttft = "-" if summary.ttft_s is None else f"{summary.ttft_s:.2f} s"
    table = Table(
        title=(
            f"{summary.num_tokens} tokens in {summary.wall_s:.2f} s: {summary.tokens_per_s:.1f} tokens/s, "
            f"time to first token {ttft}"
        ),
        title_justify="left",
        title_style="bold",
    )
    columns = ["node", "layers", "memory", "weights", "busy", "work waited", "in", "out"]
    if summary.overlap is not None:
        columns.append("overlap")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right")
    for node in summary.nodes:
        row = [
            node.name,
            str(node.layers),
            _bytes(node.rss_bytes),
            _bytes(node.weight_bytes),
            f"{summary.share(node.busy_s):.0%}",
            f"{summary.share(node.waiting_s):.1%}",
            _bytes(node.bytes_in),
            _bytes(node.bytes_out),
        ]
        if summary.overlap is not None:
            row.append(f"{summary.overlap[node.name]:.0%}")
        table.add_row(*row)
    console.print(table)
    if summary.overlap is not None:
        console.print(
            "overlap: share of a node's compute time in which a neighbour computed too; "
            "work waited: share of the run in which frames waited while the node did not compute",
            style="dim",
        )
    predicted, measured = summary.pace.predicted_tokens_per_s, summary.decode_tokens_per_s
    if measured is not None and predicted > 0 and summary.pace.num_live == len(summary.results):
        console.print(
            f"decoding: {predicted:.1f} tokens/s predicted for {summary.pace.num_live} at once, "
            f"{measured:.1f} measured, {100 * (measured / predicted - 1):+.0f} %",
            style="dim",
        )
    if cached := summary.prefill.get("prefix_tokens"):
        console.print(
            f"prompts: {summary.prefill['prefill_tokens']} tokens computed, {cached} found in the KV cache", style="dim"
        )
    mended = {name: count for name, count in summary.counts.items() if count}
    if mended:
        console.print(f"ring: {', '.join(f'{count} {name}' for name, count in mended.items())}", style="yellow")


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits or None)


def _bytes(count: int) -> str:
    value, units = float(count), ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" or value >= 100 else f"{value:.1f} {units[0]}"


class AnswerPrinter:
    """Writes answers to stdout in the form that was asked for.

    One Sequence in plain form streams; several come whole, each under a line that names it, as they finish.
    has_file: results go to a file; in plain form they are not shown then.
    """

    def __init__(self, out: TextIO, *, as_json: bool, is_single: bool, has_file: bool) -> None:
        self._out = out
        self._as_json = as_json
        self._is_single = is_single
        self._has_file = has_file

    def text(self, piece: str) -> None:
        """Show text of a lone Sequence as it comes."""
        if piece and self._is_single and not self._as_json and not self._has_file:
            self._out.write(piece)
            self._out.flush()

    def finished(self, result: Result) -> None:
        """Show a finished Sequence."""
        if self._as_json:
            self._out.write(result.as_json() + "\n")
        elif not self._has_file and self._is_single:
            self._out.write("\n")
        elif not self._has_file:
            self._out.write(f"--- {result.index} ({result.finish_reason})\n{result.text}\n")
        self._out.flush()

    def summary(self, summary: Summary) -> None:
        """End the JSON lines; the plain form's table is print_table's."""
        if self._as_json:
            self._out.write(summary.as_json() + "\n")
            self._out.flush()
