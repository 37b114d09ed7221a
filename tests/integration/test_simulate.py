"""`mdiq simulate --measure` and `--check` with real processes, on a model of random weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdiq.report.catalogue import Mark, read_catalogues

pytestmark = pytest.mark.integration


def simulate(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mdiq", "simulate", *arguments],
        env={**os.environ, "MDIQ_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def tiny(cache: Path) -> str:
    script = "from mdiq.bench.shapes import shape_file; print(shape_file('tiny', 8))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "MDIQ_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.timeout(300)
def test_a_machine_that_has_measured_itself_can_be_simulated(tmp_path: Path) -> None:
    model, mine = tiny(tmp_path), tmp_path / "mine.yaml"
    done = simulate(tmp_path, "--measure", "--model", model, "--name", "mine", "--threads", "1")
    assert done.returncode == 0, done.stderr
    mine.write_text(done.stdout)
    device = read_catalogues([mine]).devices["mine"]
    assert device.read_bytes_per_s.mark is Mark.MEASURED and device.forward_s.value > 0
    found = simulate(
        tmp_path, "--catalogue", str(mine), "--devices", "mine*2", "--model", model, "--users", "4", "--json"
    )
    figures = json.loads(found.stdout)["figures"]
    assert figures["one_user_tokens_per_s"]["mark"] == "measured" and figures["one_user_tokens_per_s"]["value"] > 10


@pytest.mark.timeout(300)
def test_five_rings_are_measured_beside_their_predictions(tmp_path: Path) -> None:
    done = simulate(tmp_path, "--check", "--model", tiny(tmp_path), "--cpu", "0.9", "--json")
    if "does not let this process limit CPU time" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    rings = json.loads(done.stdout)["rings"]
    assert [ring["case"]["num_nodes"] for ring in rings] == [2, 3, 3, 3, 3]
    for ring in rings:
        assert ring["rate_tokens_per_s"] > 0 and ring["forecast"]["rate_tokens_per_s"] > 0
        assert ring["error"] == pytest.approx(ring["forecast"]["rate_tokens_per_s"] / ring["rate_tokens_per_s"] - 1)
    assert list(Path("/sys/fs/cgroup").glob("**/mdiq-bench-*-measure")) == []
