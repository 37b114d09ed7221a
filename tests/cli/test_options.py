import dataclasses
from typing import get_args

import pytest
from typer.testing import CliRunner

from mdiq.cli import bench, perplexity, run
from mdiq.cli.main import app
from mdiq.cli.options import LogLevelName, Weights
from mdiq.cli.ring_commands import BenchOptions, PerplexityOptions, RunOptions
from mdiq.core.sequence import SamplingParams
from mdiq.core.types import WeightFormat, WeightSettings
from mdiq.plan.pace import PaceSettings
from mdiq.telemetry.logging import LEVELS


def test_flags_take_what_topologies_and_logs_take() -> None:
    assert tuple(Weights) == get_args(WeightFormat)
    assert get_args(LogLevelName) == tuple(LEVELS)


@pytest.mark.parametrize(
    ("name", "module", "kind"),
    [("run", run, RunOptions), ("bench", bench, BenchOptions), ("perplexity", perplexity, PerplexityOptions)],
)
def test_a_command_without_flags_has_the_options_of_its_class_and_their_defaults(
    name: str, module: object, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(module, "execute", lambda options: asked.append(options) or 3)
    assert CliRunner().invoke(app, [name]).exit_code == 3
    (options,) = asked
    assert isinstance(options, kind) and options == kind()
    assert {f.name for f in dataclasses.fields(kind)} >= {"model", "threads"}


def test_flags_become_the_values_that_the_ring_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[RunOptions] = []
    monkeypatch.setattr(run, "execute", lambda options: asked.append(options) or 0)
    flags = "--temperature 0.5 --top-k 3 --stop a --stop b --stop-token-id 7 --ignore-eos --seed 9 --max-tokens 5"
    flags += " --weights int4 --dtype bf16 --fast --device cuda:0 --decode-wait 50 --max-live 6"
    assert CliRunner().invoke(app, ["run", "hello", *flags.split()]).exit_code == 0
    (options,) = asked
    sampled = SamplingParams(5, 0.5, top_k=3, stop=("a", "b"), stop_token_ids=(7,), ignore_eos=True, seed=9)
    assert options.prompt == "hello" and options.params == sampled
    assert options.held == WeightSettings("int4", "bf16", exact=False, device="cuda:0")
    assert options.pace == PaceSettings(decode_wait_s=0.05, max_live=6)
