"""Prompts files and results files: which request a result belongs to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mdiq.api.fields import sampling_values
from mdiq.cli import prompts
from mdiq.cli.output import Result
from mdiq.cli.prompts import read_finished, read_prompts
from mdiq.core.sequence import FinishReason, SamplingParams
from mdiq.errors import ConfigError
from mdiq.service.requests import PromptLine


def _prompts(path: Path, *requests: object) -> list[PromptLine]:
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return read_prompts(path, SamplingParams())


def _results(path: Path, *lines: PromptLine, reason: FinishReason = FinishReason.STOP) -> Path:
    results = [Result(line.index, (1,), 0.0, finish_reason=reason, request=line.digest) for line in lines]
    path.write_text("".join(result.as_json() + "\n" for result in results))
    return path


def test_a_results_file_knows_which_requests_it_answered(tmp_path: Path) -> None:
    lines = _prompts(tmp_path / "in.jsonl", {"prompt": "a", "seed": 1}, {"prompt": "b"}, {"prompt_token_ids": [4]})
    out = _results(tmp_path / "out.jsonl", *lines[:2])
    assert read_finished(out, lines) == {0, 1}
    # The same request, written otherwise.
    (tmp_path / "in.jsonl").write_text('{"seed":1,  "prompt": "a"}\n{"prompt":"b"}\n')
    assert read_finished(out, read_prompts(tmp_path / "in.jsonl", SamplingParams())) == {0, 1}


@pytest.mark.parametrize(
    "edited",
    [
        ({"prompt": "a"}, {"prompt": "another"}),
        ({"prompt": "a", "temperature": 0.5}, {"prompt": "b"}),
        ({"prompt": "b"}, {"prompt": "a"}),
        ({"prompt": "a"},),
    ],
)
def test_results_of_other_prompts_are_refused(tmp_path: Path, edited: tuple[object, ...]) -> None:
    out = _results(tmp_path / "out.jsonl", *_prompts(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"}))
    with pytest.raises(ConfigError, match=r"out.jsonl:[12]: it answers another request [01] than the prompts file"):
        read_finished(out, _prompts(tmp_path / "in.jsonl", *edited))


def test_results_that_failed_are_not_finished_and_those_without_a_digest_count(tmp_path: Path) -> None:
    lines = _prompts(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    assert read_finished(_results(tmp_path / "out.jsonl", *lines, reason=FinishReason.ERROR), lines) == set()
    (tmp_path / "out.jsonl").write_text('{"index": 1, "finish_reason": "stop"}\n')
    assert read_finished(tmp_path / "out.jsonl", lines) == {1}


def test_a_last_line_without_its_end_is_not_finished_however_much_of_it_is_there(tmp_path: Path) -> None:
    lines = _prompts(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    whole = _results(tmp_path / "out.jsonl", *lines).read_bytes()
    for num_bytes in range(1, len(whole.splitlines()[1]) + 1):
        (tmp_path / "out.jsonl").write_bytes(whole[:-num_bytes])
        assert read_finished(tmp_path / "out.jsonl", lines) == {0}
    (tmp_path / "out.jsonl").write_bytes(whole[:-2] + b"\n")
    with pytest.raises(ConfigError, match="out.jsonl:2: not a line that mdiq run wrote"):
        read_finished(tmp_path / "out.jsonl", lines)


def test_what_many_lines_say_alike_is_checked_once_and_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[object] = []

    def noted(value: Mapping[str, Any]) -> dict[str, Any]:
        checked.append(value)
        return sampling_values(value)

    monkeypatch.setattr(prompts, "sampling_values", noted)
    lines = _prompts(
        tmp_path / "in.jsonl",
        *({"prompt": f"{i}", "max_tokens": 8, "top_k": (1, True, 1.0)[i % 3]} for i in (0, 2, 3, 5)),
        {"prompt": "a", "max_tokens": 9, "enable_thinking": True},
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 9, "enable_thinking": True},
    )
    assert len(checked) == 4, "1 and 1.0 are told apart, and a chat from a text"
    assert [line.params.max_tokens for line in lines] == [8] * 4 + [9] * 2
    assert [dict(line.template_kwargs) for line in lines] == [{}] * 4 + [{"enable_thinking": True}] * 2
    text = "".join(json.dumps({"prompt": "a", "top_k": True}) + "\n" for _ in range(3))
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_prompts(tmp_path / "in.jsonl", SamplingParams())
    assert [line.rpartition("in.jsonl:")[2][:7] for line in str(caught.value).splitlines()] == [
        f"{number}: top_" for number in (1, 2, 3)
    ]


def test_a_line_takes_the_names_that_clients_of_the_api_use(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]
    one, two = _prompts(
        tmp_path / "in.jsonl",
        {"prompt": "a", "repeat_penalty": 1.2, "top_k": -1, "n_predict": 3.0, "min_new_tokens": 2, "n": 1},
        {"messages": chat, "max_tokens": -1},
    )
    assert one.params.min_tokens == 2
    assert (one.params.repetition_penalty, one.params.top_k, one.params.max_tokens) == (1.2, 0, 3)
    assert two.messages == tuple(chat) and two.params.max_tokens > 1 << 20


@pytest.mark.parametrize(
    "more",
    [
        {"regex": "y", "grammar": "x"},
        {"tools": [{}]},
        {"logprobs": 0},
        {"seed": "x"},
        {"n": 2},
        {"logit_bias": {"a": 1}},
    ],
)
def test_a_line_that_asks_for_what_is_not_served_is_refused(tmp_path: Path, more: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"in.jsonl:1: (regex|tools|logprobs|seed|n|logit_bias): "):
        _prompts(tmp_path / "in.jsonl", {"prompt": "a", **more})


def test_a_line_tells_the_template_more_than_its_messages(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}]
    lines = _prompts(
        tmp_path / "in.jsonl",
        {"messages": chat, "chat_template_kwargs": {"enable_thinking": False}},
        {"prompt": "a", "enable_thinking": False},
    )
    assert [line.template_kwargs for line in lines] == [{"enable_thinking": False}] * 2
    with pytest.raises(ConfigError, match="in.jsonl:1: chat_template_kwargs: deep: give it another name"):
        _prompts(tmp_path / "in.jsonl", {"messages": chat, "chat_template_kwargs": {"deep": {}}})
