"""An emulated 64-bit ARM device gives the tokens that this machine gives. MDIQ_ARM names the tool that emulates it.

What the tool must do: ``up FOLDER`` makes an ARM system with Python 3.11 and unpacks the wheels of a folder there,
``put FILE PATH`` copies a file in, ``run COMMAND...`` runs a command in it; ARM_FEATURES is what its CPU says it can.

Emulated, a run takes minutes: as few tokens as tell right from wrong, in one process.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from mdiq.engine.formats.model_source import find_model

ROOT = Path(__file__).parent.parent.parent
TOOL = os.environ.get("MDIQ_ARM")
UP_S = 1800.0
RUN_S = 7200.0  # the first run of a format packs the model: 6 to over 30 minutes, by the machine that emulates
MODEL = "/root/model.gguf"
RUN = ("--raw", "--in-process", "--nodes", "1", "--threads", "1", "--kv-tokens", "64", "--max-tokens", "3", "--json")
PROMPT = "The capital of France is"
WITHOUT_DOT_PRODUCTS = "fp asimd"  # a Raspberry Pi 4

pytestmark = [
    pytest.mark.arm,
    pytest.mark.skipif(TOOL is None, reason="MDIQ_ARM names no tool that emulates a 64-bit ARM device"),
]


def _run(*command: str | Path, timeout: float, env: dict[str, str] | None = None) -> str:
    words = [str(word) for word in command]
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, env=environment
    )
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _tokens(out: str) -> list[int]:
    answer: list[int] = json.loads(out.splitlines()[0])["token_ids"]
    assert len(answer) == 3
    return answer


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tool, with mdiq installed in its ARM system from the wheels that a Raspberry Pi gets."""
    assert TOOL is not None  # the tests are skipped without it
    wheels = tmp_path_factory.mktemp("wheels")
    fill = [sys.executable, "-P", ROOT / "nodes" / "wheels.py", "--machine", "aarch64", "--python", "3.11"]
    _run(*fill, "--wheels", wheels, timeout=UP_S)
    _run(TOOL, "up", wheels, timeout=UP_S)
    _run(TOOL, "put", find_model(None), MODEL, timeout=UP_S)
    return TOOL


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is one itself")
@pytest.mark.parametrize("features", [None, WITHOUT_DOT_PRODUCTS], ids=["dot-products", "no-dot-products"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_smollm2_gives_the_tokens_that_this_machine_gives(weights: str, features: str | None, device: str) -> None:
    options = [*RUN, "--weights", weights]
    here = _run(sys.executable, "-P", "-m", "mdiq", "run", PROMPT, "--model", find_model(None), *options, timeout=RUN_S)
    env = {"ARM_FEATURES": features} if features else None
    there = _run(
        device, "run", "python3", "-P", "-m", "mdiq", "run", PROMPT, "--model", MODEL, *options, timeout=RUN_S, env=env
    )
    assert _tokens(there) == _tokens(here)
