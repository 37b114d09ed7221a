"""`mdiq bench` with child processes, on a model of random weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration


def bench(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mdiq", "bench", "--shape", "tiny", "--answer-tokens", "6", *arguments],
        env={**os.environ, "MDIQ_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_nodes_are_measured_over_slow_links(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    link = ("--link", "none", "--link", "delay=30ms,bandwidth=10mbit,jitter=2ms")
    done = bench(tmp_path, "--nodes", "1,2", "--users-per-node", "2", "--repeats", "1", *link, "--json", str(out))
    assert done.returncode == 0, done.stderr
    cells = {
        (cell["cell"]["nodes"], cell["cell"]["users"], cell["cell"]["link"] is not None): cell
        for cell in json.loads(out.read_text())["cells"]
    }
    assert cells.keys() == {(1, 2, False), (2, 2, False), (2, 4, False), (2, 2, True), (2, 4, True)}
    # Two hops, each slowed by 30 ms less the jitter: a token cannot come round faster.
    assert cells[2, 2, True]["figures"]["itl_median_s"] >= 0.056
    first, last = cells[2, 4, True]["nodes"]
    assert (first["name"], last["name"]) == ("node-0", "node-1")
    assert min(first["bytes_per_token"], last["bytes_per_token"]) > 64
    assert "same users per node" in done.stdout


def test_rings_apart_are_measured_beside_a_ring(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = bench(tmp_path, "--nodes", "1,2", "--users-per-node", "2", "--repeats", "1", "--apart", "--json", str(out))
    assert done.returncode == 0, done.stderr
    scaling = {entry["cell"]["users"]: entry["apart"] for entry in json.loads(out.read_text())["scaling"]}
    assert scaling[2] is None  # one user on each: no cell of one node has that load
    assert scaling[4] > 0
    assert "rings apart" in done.stdout


def test_nodes_run_under_a_quota_and_leave_nothing_behind(tmp_path: Path) -> None:
    done = bench(tmp_path, "--nodes", "2", "--users", "2", "--repeats", "1", "--cpu", "0.5")
    if "does not let this process limit CPU time" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert list(Path("/sys/fs/cgroup").glob("**/mdiq-bench-*-node-*")) == []
