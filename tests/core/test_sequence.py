"""Sampling values are checked, and a Sequence knows its tokens and its end."""

import json
from dataclasses import asdict

import pytest

from mdiq.core.sequence import FinishReason, SamplingParams, Sequence
from mdiq.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("stop", ("",)),
        ("seed", 2**64),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_values_of_a_json_object_replace_those_of_the_same_name() -> None:
    values = {"temperature": 1, "stop": "end", "stop_token_ids": [1, 2], "ignore_eos": True, "max_tokens": 3, "n": 9}
    params = SamplingParams().replaced(values, "line 1")
    assert params == SamplingParams(
        temperature=1.0, stop=("end",), stop_token_ids=(1, 2), ignore_eos=True, max_tokens=3
    )
    assert type(params.temperature) is float


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ignore_eos", 1),
        ("max_tokens", True),
        ("max_tokens", 2.5),
        ("temperature", "hot"),
        ("temperature", False),
        ("stop", [1]),
        ("stop", 3),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", [True]),
        ("top_p", 7),
    ],
)
def test_a_json_value_of_the_wrong_type_is_refused_with_its_place(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^in.jsonl:3: {name}"):
        SamplingParams().replaced({name: value}, "in.jsonl:3")


def test_tokens_are_prompt_and_answer_in_one() -> None:
    sequence = Sequence(0, (1, 2, 3), SamplingParams(max_tokens=4), generated=[4, 5])
    assert (sequence.num_tokens, sequence.max_total_tokens) == (5, 7)
    for start in range(6):
        for stop in range(start, 6):
            assert sequence.tokens(start, stop) == (1, 2, 3, 4, 5)[start:stop]


def test_a_sequence_ends_with_its_last_token_an_end_token_or_a_stop_text() -> None:
    params = SamplingParams(max_tokens=3, stop_token_ids=(8,))
    assert Sequence(0, (1,), params).append(8) is FinishReason.STOP
    assert Sequence(0, (1,), params, frozenset({9})).append(9) is FinishReason.STOP
    assert Sequence(0, (1,), params).append(5, stop_matched=True) is FinishReason.STOP
    going_on = Sequence(0, (1,), SamplingParams(max_tokens=2, ignore_eos=True), frozenset({9}))
    assert going_on.append(9) is None
    assert going_on.append(9) is FinishReason.LENGTH


def test_how_to_sample_survives_a_journal() -> None:
    """As JSON: an answer in a form goes on in it after a restart."""
    params = SamplingParams(grammar='regex:"a"', shown_token_ids=(7, 8), stop=("x",), seed=3)
    assert SamplingParams().replaced(json.loads(json.dumps(asdict(params))), "journal") == params
    with pytest.raises(ConfigError, match="journal: grammar: 5 is not a text"):
        SamplingParams().replaced({"grammar": 5}, "journal")


def test_a_form_says_where_the_answer_ends() -> None:
    with pytest.raises(ConfigError, match="ignore_eos: True is out of range"):
        SamplingParams(grammar="regex:a", ignore_eos=True)
