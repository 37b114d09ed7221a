"""`mdiq evaluate` as a user calls it, on models of random weights and rings of real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdiq.report.evaluation_page import evaluation_page
from mdiq.report.page import LANGUAGES
from tests.report.tracing import assert_traces_back

pytestmark = pytest.mark.integration
SMALL_FRAME = 64
"""Bytes: a RELEASE, which may follow an answer at once or with the next one."""


@pytest.mark.timeout(300)
def test_the_papers_tables_come_from_one_command(tmp_path: Path) -> None:
    out = tmp_path / "pages"
    command = ["evaluate", "--model", "tiny", "--model", "tiny-gpt2", "--nodes", "2", "--no-kv-cache"]
    command += ["--prompt-tokens", "6", "--answer-tokens", "10", "--lengths", "8,64", "--wires", "f32,i8"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mdiq", *command, "--out", str(out)],
        env={**os.environ, "MDIQ_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((out / "evaluation.json").read_text())
    assert [model["about"]["family"] for model in document["models"]] == ["llama", "gpt2"]
    for model in document["models"]:
        about = model["about"]
        assert [ring["nodes"] for ring in model["rings"]] == [1, 2]
        for ring in model["rings"]:
            assert sum(ring["kv_bytes_per_token"]) == about["kv_bytes_per_token"], "as the stages say themselves"
            assert [g["has_kv_cache"] for g in ring["generations"]] == [True, False]
            assert all(g["is_same"] and len(g["times_s"]) == 10 for g in ring["generations"])
        count = {(b["wire"], b["has_kv_cache"], b["length"]): b for b in model["wire"]}
        for wire, row in (("f32", 4 * 64), ("i8", 64 + 4)):
            short, long = (count[wire, True, length]["first_per_token"] for length in (8, 64))
            assert row < short < row + 160 and abs(long - short) < SMALL_FRAME
            short, long = (count[wire, False, length]["first_total"] for length in (8, 64))
            assert 56 * row - SMALL_FRAME <= long - short < 56 * row + 56 * 8
            last = [count[wire, False, length]["last_total"] for length in (8, 64)]
            assert max(last) < 4 * row + 400
    grouped, gpt2 = document["models"]
    assert grouped["full"]["kv_bytes_per_token"] == 2 * grouped["about"]["kv_bytes_per_token"]
    assert gpt2["full"] is None
    # Full multi-head attention sends what GQA sends.
    for with_gqa, without in zip(grouped["wire"], grouped["full_wire"], strict=False):
        assert abs(with_gqa["first_per_token"] - without["first_per_token"]) < SMALL_FRAME
    for language in LANGUAGES:
        page = evaluation_page(document, language)
        assert_traces_back((out / f"evaluation.{language}.html").read_text(), page, document)
        for chart in page.charts:
            assert (out / f"evaluation-{language}-{chart.name}.svg").read_text().startswith("<svg")
            assert (out / f"evaluation-en-{chart.name}.png").read_bytes().startswith(b"\x89PNG")
    assert "/receipt/commit" in (out / "evaluation.csv").read_text()
