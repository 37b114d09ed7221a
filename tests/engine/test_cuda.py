"""Stages on a GPU: the reference's tokens, alone and beside Stages on the CPU; costs; memory that is not there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mdiq.core.types import LayerRange, WeightSettings
from mdiq.engine.measure import measure_cost
from mdiq.engine.runner import StageRunner
from mdiq.errors import CapacityError
from tests.engine.tiny_models import MODELS, assert_gives_reference_tokens, make_model
from tests.integration.tiny_model import write_tiny_model

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("devices", [("cuda",), ("cuda", "cpu"), ("cpu", "cuda")], ids="-".join)
@pytest.mark.parametrize("name", MODELS)
def test_a_family_gives_the_reference_tokens(name: str, devices: tuple[str, ...], tmp_path: Path) -> None:
    assert_gives_reference_tokens(name, tmp_path, [([1, 2, 1], 7)], devices)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_ring_of_processes_answers_as_on_the_cpu(dtype: str, tmp_path: Path) -> None:
    """Token for token in f32. In bf16 a GPU rounds in another order: there the answers have as many tokens."""
    write_tiny_model(tmp_path / "model")
    command = [sys.executable, "-m", "mdiq", "run", "One two", "--raw", "--model", str(tmp_path / "model"), "--json"]
    command += ["--nodes", "2", "--dtype", dtype, "--wire", dtype, "--max-tokens", "24", "--ignore-eos"]
    tokens = {}
    for device in ("cpu", "cuda"):
        done = subprocess.run([*command, "--device", device], capture_output=True, text=True, timeout=300)
        assert not done.returncode, done.stderr
        tokens[device] = json.loads(done.stdout.splitlines()[0])["token_ids"]
    assert len(tokens["cuda"]) == 24
    assert tokens["cuda"] == tokens["cpu"] or dtype == "bf16"


def test_costs_are_of_work_that_is_done(tmp_path: Path) -> None:
    """A GPU works on behind its caller's back: a cost without waiting would not grow with the tokens."""
    make_model("llama-long").save_pretrained(tmp_path)
    runner = StageRunner.load(
        tmp_path,
        LayerRange(0, 4),
        is_last=True,
        owns_embedding_and_head=True,
        weights=WeightSettings("plain", "bf16", device="cuda"),
        kv_tokens=4096,
    )
    cost = measure_cost(runner)
    assert all(seconds > 0 for curve in (cost.decode, cost.prompt) for _, seconds in curve.points)
    assert runner.kv_tokens_in_use == 0


def test_a_cache_that_the_gpu_cannot_hold_is_refused(tmp_path: Path) -> None:
    make_model("llama-long").save_pretrained(tmp_path)
    free = torch.cuda.mem_get_info()[0]
    with pytest.raises(CapacityError, match="lower --kv-tokens"):
        StageRunner.load(
            tmp_path,
            LayerRange(0, 4),
            is_last=True,
            owns_embedding_and_head=True,
            weights=WeightSettings("plain", "f32", device="cuda"),
            kv_tokens=free // 100,
        )
