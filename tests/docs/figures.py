"""README's figures: `python -m tests.docs.figures REPORT.json BENCH.json` keeps what `mdiq report` and `mdiq bench`
measured, and writes README's tables from it; a test compares.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
KEPT = {"report": ROOT / "docs" / "figures" / "report.json", "bench": ROOT / "docs" / "figures" / "bench.json"}
BENCH_COMMAND = "mdiq bench --model qwen2.5-coder-1.5b-instruct --nodes 1 --users 1,8 --threads 1 --peer llama-cpp"
_BLOCK = re.compile(r"(?<=<!-- figures -->\n).*(?=<!-- end of figures -->)", re.DOTALL)
_LONG = ("answers", "progress")
"""Lists that the tables need nothing of: tokens, and when each of them came."""
_STAGES = {"alone": "one device, the whole model", "few": "few", "tuned": "tuned", "all": "all"}


def kept(document: Any) -> Any:
    """Return a document without its long lists, and without where it was written to."""
    if isinstance(document, str):
        return re.sub(r" --out \S+", "", document) if document.startswith("mdiq ") else document
    if isinstance(document, Mapping):
        return {key: kept(value) for key, value in document.items() if key not in _LONG}
    return [kept(each) for each in document] if isinstance(document, list) else document


def block_of(readme: str) -> str:
    """Return README's part about figures."""
    found = _BLOCK.search(readme)
    assert found is not None
    return found[0]


def figures(report: Mapping[str, Any], bench: Mapping[str, Any]) -> str:
    """Return README's part about figures, from the JSON files of both commands."""
    return "\n".join([*trial_lines(report), "", *peer_lines(bench), ""])


def rows_of(block: str) -> list[str]:
    """Return what the rows of the tables are about: their first cells, without numbers."""
    cells = [line.split("|")[1].strip() for line in block.splitlines() if line.startswith("| ")]
    return [re.sub(r"\d+(\.\d+)?", "N", cell) for cell in cells]


def trial_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines about a trial."""
    receipt, settings = report["receipt"], report["settings"]
    yield f"`{receipt['command']}`"
    day, threads = receipt["made_at"][:10], settings["threads_per_node"]
    yield f"on {_machine(receipt['machine'])}, with {threads} thread per node, {day}:"
    yield ""
    users = settings["users"]
    yield f"| ring | devices | layers | tokens/s, {users} users | one user | memory of the largest process, MiB |"
    yield "|---|---|---|---|---|---|"
    stages = [report["alone"], *report["stages"]]
    for stage in stages:
        split = ", ".join(map(str, stage["split"]))
        many, one = (stage[name]["figures"]["decode_tokens_per_s"] for name in ("many", "one"))
        memory = max(device["rss_bytes"] for device in stage["devices"]) / (1 << 20)
        yield f"| {_STAGES[stage['name']]} | {stage['nodes']} | {split} | {many:.1f} | {one:.1f} | {memory:,.0f} |"
    yield ""
    yield "| also measured there | figure |"
    yield "|---|---|"
    equal = sum(stage["equal"] for stage in stages[1:]), sum(stage["many"]["users"] for stage in stages[1:])
    yield f"| answers of the rings with the tokens of one device | {equal[0]} of {equal[1]} |"
    drills = [stage["drill"] for stage in stages[1:] if stage["drill"]]
    same = sum(drill["equal"] for drill in drills), sum(drill["users"] for drill in drills)
    yield f"| the same while a device was killed | {same[0]} of {same[1]} |"
    yield f"| longest silence of a user then | {max(drill['gap_s'] for drill in drills):.1f} s |"
    exact = [entry for entry in report["wire"] if entry["wire"] == "f32"]
    for has_kv_cache, how in ((True, "with a KV cache"), (False, "without")):
        found = sorted((e["length"], e["first_per_token"]) for e in exact if e["has_kv_cache"] is has_kv_cache)
        (short, few), (long, many) = found[0], found[-1]
        what = f"bytes of a token on the first hop {how}, after {short} and {long} tokens"
        yield f"| {what} | {few:,.0f} and {many:,.0f} |"
    attention = report["attention"]
    whole = attention["full_kv_bytes_per_token"] / 1_024
    yield f"| KV cache of a token | {attention['kv_bytes_per_token'] / 1_024:.0f} KiB; without GQA {whole:.0f} |"


def peer_lines(bench: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines about a bench with its peer."""
    yield f"`{BENCH_COMMAND}`"
    yield f"on {_machine(bench['machine'])}:"
    yield ""
    yield "| users of one device | mdiq, tokens/s | llama.cpp | ratio |"
    yield "|---|---|---|---|"
    theirs = {peer["cell"]["users"]: peer["figures"]["decode_tokens_per_s"] for peer in bench["peer"]}
    ratios = {ratio["cell"]["users"]: ratio["decode"] for ratio in bench["ratios"]}
    for cell in (cell for cell in bench["cells"] if cell["cell"]["nodes"] == 1):
        users, ours = cell["cell"]["users"], cell["figures"]["decode_tokens_per_s"]
        yield f"| {users} | {ours:.1f} | {theirs[users]:.1f} | {ratios[users]:.2f} |"


def _machine(machine: Mapping[str, str | int]) -> str:
    return f"{machine['cores']} virtual cores of an {machine['cpu']} (Linux {machine['kernel'].split('-')[0]})"


if __name__ == "__main__":
    documents = [kept(json.loads(Path(name).read_text(encoding="utf-8"))) for name in sys.argv[1:3]]
    for path, document in zip(KEPT.values(), documents, strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    README.write_text(_BLOCK.sub(lambda _: figures(*documents), text), encoding="utf-8")
