"""`mdiq report` as a user calls it, on a model of random weights and rings of real processes."""

import csv
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from mdiq.report.page import LANGUAGES, look_up
from mdiq.report.trial_page import trial_page
from tests.docs.figures import README, block_of, rows_of, trial_lines
from tests.integration.tiny_model import HIDDEN_SIZE, NUM_LAYERS, write_tiny_model
from tests.report.tracing import assert_traces_back

pytestmark = pytest.mark.integration


@pytest.mark.timeout(500)
def test_a_trial_of_two_nodes_becomes_a_report_in_both_languages(tmp_path: Path) -> None:
    out = tmp_path / "pages"
    command = ["report", "--shape", "tiny", "--nodes", "2", "--users", "2", "--prompt-tokens", "6", "--keep-going"]
    command += ["--answer-tokens", "24", "--lengths", "8,64", "--wires", "f32", "--link", "delay=5ms"]
    command += ["--device-memory", "100M", "--watts", "7", "--device-cost", "60", "--power-price", "0.3"]
    command += ["--price-per-million-tokens", "1", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mdiq", *command],
        env={**os.environ, "MDIQ_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((out / "report.json").read_text())
    assert [(stage["name"], stage["nodes"]) for stage in document["stages"]] == [("few", 2), ("tuned", 2), ("all", 2)]
    alone = document["alone"]["many"]["answers"]
    assert len(alone) == 2 and all(len(answer) == 24 for answer in alone)
    for stage in document["stages"]:
        assert sum(stage["split"]) == 4
        assert stage["many"]["answers"] == alone and stage["equal"] == 2
        assert stage["predicted"]["many"] > 0
        drill = stage["drill"]
        # The requests outlive the node, with the same tokens.
        assert (drill["node"], drill["equal"], drill["error"]) == ("node-1", 2, "")
        assert 0 < drill["killed_s"] <= drill["noticed_s"] < drill["killed_s"] + drill["recovered_s"]
        assert drill["timeline"]["sequences"] == 2
        assert len(drill["progress"]) == 48
        assert all(device["busy_share"] > 0 for device in stage["devices"])
        # Two hops of 5 ms: a token cannot come round faster.
        assert stage["one"]["figures"]["itl_median_s"] >= 0.01
    assert document["recommendation"]["verdict"] != "copies", "no device of 100 MiB holds it"
    assert document["cost"]["watts"] == 14
    assert rows_of("\n".join(trial_lines(document))) == rows_of(block_of(README.read_text()).partition("mdiq bench")[0])
    short, long = (b["first_total"] for b in document["wire"] if not b["has_kv_cache"])
    assert long - short > 50 * 256, "without a KV cache the bytes grow with the length"
    rows = list(csv.reader(io.StringIO((out / "report.csv").read_text())))
    assert len(rows) > 200
    for place, value in rows[1:50]:
        found = look_up(document, place)
        assert value == ("" if found is None else str(found))
    for language in LANGUAGES:
        page = trial_page(document, language)
        assert_traces_back((out / f"report.{language}.html").read_text(), page, document)
        assert (out / f"report.{language}.md").read_text().startswith("# ")
        for chart in page.charts:
            assert (out / f"report-{language}-{chart.name}.svg").read_text().startswith("<svg")
            assert (out / f"report-en-{chart.name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(300)
def test_a_running_ring_is_measured_through_its_api(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "MDIQ_CACHE": str(tmp_path / "cache")}
    serve = ["serve", "--model", str(model), "--nodes", "2", "--threads", "1", "--port", str(port)]
    python = (sys.executable, "-P", "-m", "mdiq")
    with (tmp_path / "log").open("wb") as log:
        service = subprocess.Popen([*python, *serve, "--kv-tokens", "4096"], stdout=log, stderr=log, env=environment)
    try:
        until_ready(service, f"http://127.0.0.1:{port}/ready", tmp_path / "log")
        command = ["report", "--api", f"http://127.0.0.1:{port}", "--users", "2", "--answer-tokens", "40"]
        done = subprocess.run(
            [*python, *command, "--language", "en", "--out", str(tmp_path / "pages")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
    finally:
        service.terminate()
        service.wait(60)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "pages" / "report.json").read_text())
    (stage,) = document["stages"]
    assert (stage["name"], stage["nodes"], sum(stage["split"]), stage["equal"]) == ("now", 2, NUM_LAYERS, 2)
    assert stage["passes"] and document["recommendation"]["verdict"] == "ring"
    assert stage["drill"] is None and document["copies"] is None
    assert all(device["rss_bytes"] > 0 and device["bytes_per_token"] > HIDDEN_SIZE for device in stage["devices"])
    page = trial_page(document, "en")
    assert_traces_back((tmp_path / "pages" / "report.en.html").read_text(), page, document)
    assert not list((tmp_path / "pages").glob("*.ja.*"))


def until_ready(service: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    end_s = time.monotonic() + 100
    while time.monotonic() < end_s:
        assert service.poll() is None, log.read_text()[-3_000:]
        try:
            urllib.request.urlopen(url, timeout=10).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3_000:])
