"""Flags whose values are texts with commas between, and files to write."""

import os
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mdiq.api.fields import SAMPLING, sampling_values
from mdiq.cli.flags import check_writable, parse_wires
from mdiq.cli.main import app
from mdiq.cli.ring_commands import RunOptions
from mdiq.core.sequence import SamplingParams
from mdiq.errors import ConfigError


def test_one_format_serves_all_hops_and_a_list_each() -> None:
    assert parse_wires("i8", 3) == ("i8",)
    assert parse_wires("bf16,i8,f32", 3) == ("bf16", "i8", "f32")
    assert parse_wires("bf16", 1) == ("bf16",)
    assert parse_wires("auto", 2) == ("auto",)
    assert parse_wires("auto,i8", 2) == ("auto", "i8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a format; use one of f32, bf16, i8, auto"),
        ("int8", "'int8' is not a format"),
        ("bf16,", "'' is not a format"),
        ("bf16,i8", "2 formats for 3 hops; give one, or one for each"),
    ],
)
def test_other_formats_and_numbers_of_them_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--wire {text}: {message}"):
        parse_wires(text, 3)


def test_a_file_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_text("kept")
    for path in (new, old):
        check_writable("--json", path)
    assert not new.exists() and old.read_text() == "kept"


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable("--json", pipe)  # opening it would wait for a reader


@pytest.mark.parametrize("command", ["run Hello --trace", "bench --json"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(command: str, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere" / "file", tmp_path):
        error = CliRunner().invoke(app, [*command.split(), str(path)]).exception
        flag = command.split()[-1]
        assert isinstance(error, ConfigError) and str(error).startswith(f"{flag} {path}: "), error
        assert str(error).endswith("name a file that can be written")


def test_each_sampling_field_of_the_api_is_an_option_of_mdiq_run() -> None:
    wanted = {*SAMPLING, "max_tokens", "response_format"} - {"stop_token_ids"} | {"stop_token_id"}
    assert wanted <= {field.name for field in fields(RunOptions)}


def test_the_options_of_mdiq_run_say_how_to_sample() -> None:
    assert RunOptions().params == SamplingParams()
    given = RunOptions(
        presence_penalty=0.5,
        frequency_penalty=-1.5,
        logit_bias=["7=-100", "9=2.5"],
        min_tokens=3,
        response_format='{"type": "json_object"}',
    )
    asked = {"response_format": {"type": "json_object"}}
    assert given.params == SamplingParams(
        presence_penalty=0.5,
        frequency_penalty=-1.5,
        logit_bias=((7, -100.0), (9, 2.5)),
        min_tokens=3,
        grammar=sampling_values(asked)["grammar"],
    )
    assert RunOptions(response_format='{"type": "text"}').params == SamplingParams()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--logit-bias", "7"], "--logit-bias 7: not TOKEN=BIAS; write for example 1234=-100"),
        (["--logit-bias", "a=1"], "--logit-bias: logit_bias: 'a' is not a token id"),
        (
            ["--logit-bias", "7=101"],
            "--logit-bias: logit_bias: 7: 101.0 is out of range; use token ids, and -100 to 100",
        ),
        (["--logit-bias", "7=nan"], "--logit-bias: logit_bias: 7: nan is out of range"),
        (["--presence-penalty", "3"], "presence_penalty: 3.0 is out of range; use from -2 to 2"),
        (["--frequency-penalty", "-2.5"], "frequency_penalty: -2.5"),
        (["--min-tokens", "9", "--max-tokens", "8"], "min_tokens: 9"),
        (["--response-format", "json"], "--response-format json: not JSON"),
        (["--response-format", '{"type": "xml"}'], 'response_format: give {"type": …} with one of text'),
    ],
)
def test_a_sampling_option_that_cannot_be_is_refused_before_a_model_is_looked_for(
    flags: list[str], message: str
) -> None:
    done = CliRunner().invoke(app, ["run", "Hi", "--model", "/nowhere", *flags])
    assert isinstance(done.exception, ConfigError) and message in str(done.exception)
