"""`mdiq bench` from its flags to its tables, without child processes."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mdiq.bench.machine import machine
from mdiq.bench.report import WHAT_APART_SHOWS, WHY_FIXED_TOTAL_IS_LOWER, make_report
from mdiq.cli.bench import print_report
from mdiq.cli.main import app
from mdiq.errors import UsageError
from mdiq.testbed.link_shape import LinkShape
from tests.bench.fakes import make_measurements
from tests.docs.figures import KEPT, peer_lines, rows_of


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")  # the command sets them; they are put back


def bench(*arguments: str) -> str:
    """Run the command; return what it printed on stdout."""
    result = CliRunner().invoke(app, ["bench", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_one_node_is_measured_in_this_process(tmp_path: Path) -> None:
    out = bench(
        *("--shape", "tiny", "--nodes", "1", "--users", "1,3", "--prompt-tokens", "4,40"),
        *("--answer-tokens", "5", "--repeats", "2", "--threads", "1", "--temperature", "1,0"),
        *("--json", str(tmp_path / "out.json")),
    )
    assert "tokens/s against temperature 0" in out
    assert "mdiq, tiny-q8_0-v1.gguf" in out
    value = json.loads((tmp_path / "out.json").read_text())
    keys = ("nodes", "users", "prompt_tokens", "temperature")
    loads = [(1, 1, 4), (1, 1, 40), (1, 3, 4), (1, 3, 40)]
    assert [tuple(cell["cell"][key] for key in keys) for cell in value["cells"]] == [
        (*load, temperature) for load in loads for temperature in (0, 1)
    ]
    assert [tuple(drawn["cell"][key] for key in keys) for drawn in value["draws"]] == [(*load, 1) for load in loads]
    assert all(drawn["decode"] > 0 for drawn in value["draws"])
    for cell in value["cells"]:
        assert len(cell["repeats"]) == 2
        figures = cell["figures"]
        assert all(figure > 0 for figure in figures.values())
        assert figures["itl_median_s"] <= figures["itl_p95_s"]
        (node,) = cell["nodes"]
        assert node["busy_share"] > 0
        assert node["weight_bytes"] > 0
    assert value["settings"]["threads_per_node"] == 1
    assert (value["peer"], value["ratios"]) == ([], [])


def test_readmes_table_is_made_of_a_benchs_file() -> None:
    value = json.loads(make_report(make_measurements(), machine=machine(), settings={}).as_json())
    lines = list(peer_lines(value))
    assert {*rows_of("\n".join(lines))} == {*rows_of("\n".join(peer_lines(json.loads(KEPT["bench"].read_text()))))}
    cell = next(cell for cell in value["cells"] if cell["cell"]["nodes"] == 1)
    assert f"| {cell['cell']['users']} | {cell['figures']['decode_tokens_per_s']:.1f} |" in "\n".join(lines)


def test_tables_show_cells_scaling_peer_and_ratios() -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    report = make_report(make_measurements((None, LinkShape(0.02))), machine={}, settings={"model": "m"})
    print_report(console, report)
    text = console.export_text()
    assert "every hop delay=20ms" in text
    assert WHY_FIXED_TOTAL_IS_LOWER[:60] in text
    assert WHAT_APART_SHOWS[:60] in text
    assert "llama.cpp, the same file and prompts" in text
    assert "mdiq / llama.cpp" in text
    assert "500 (600)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "1,x"], "--nodes 1,x: not whole numbers"),
        (["--nodes", "0"], "--nodes 0: each must be from 1 to 64"),
        (["--users", "1", "--users-per-node", "1"], "--users or --users-per-node, not both"),
        (["--users-per-node", "1024", "--nodes", "2"], "2048 users on 2 nodes; a ring takes up to 1024"),
        (["--shape", "tiny", "--model", "x.gguf"], "--model or --shape, not both"),
        (["--shape", "tiny", "--nodes", "5"], "--nodes 5: the model has 4 layers"),
        (["--shape", "tiny", "--prompt-tokens", "500"], "the longest prompt and its answer have 564 tokens"),
        (["--temperature", "0,warm"], "--temperature 0,warm: not numbers with commas between; write for example 0,0.7"),
        (["--temperature", "0,-1"], "--temperature 0,-1: each must be a finite number, 0 or more"),
        (["--temperature", "inf"], "--temperature inf: each must be a finite number, 0 or more"),
        (["--temperature", "nan"], "--temperature nan: each must be a finite number, 0 or more"),
        (["--temperature", "0,1", "--peer", "llama-cpp"], "the peer answers greedily only"),
        (["--link", "slow"], "--link slow: 'slow' is not delay, bandwidth or jitter"),
        (["--nodes", "2", "--users", "4", "--apart"], "--apart: it goes with rings of one and of more nodes"),
        (["--cpu", "0.01"], "--cpu 0.01: give 0.05 to"),
        (["--peer", "vllm"], "--peer vllm: no such peer; known is llama-cpp"),
        (["--peer-threads", "1"], "go with --peer llama-cpp"),
        (["--shape", "tiny", "--peer", "llama-cpp", "--peer-threads", "no"], "--peer-threads no: not whole numbers"),
        (["--json", "/nowhere/out.json"], "--json /nowhere/out.json: No such file"),
        (["--nodes", "64", "--pin"], "--pin: 64 nodes need as many cores"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        bench(*arguments)
    assert message in str(caught.value)
