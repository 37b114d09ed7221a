"""Sampling values are checked, and a Sequence knows its tokens and its end."""

import json
from dataclasses import asdict, replace

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
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, 100.5),)),
        ("logit_bias", tuple((i, 1.0) for i in range(1_025))),
        ("min_tokens", -1),
        ("min_tokens", 257),  # more than max_tokens
        ("stop", ("",)),
        ("stop", ("a", "\ud800")),
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
        ("min_tokens", 1.5),
        ("logit_bias", 3),
        ("logit_bias", [[1, 2, 3]]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"1": None}),
        ("logit_bias", [[True, 1]]),
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


@pytest.mark.parametrize("value", [{"3": 1, "2": -100}, [[3, 1], ["2", -100.0]], [(3, 0), (2, -100), (3, 1)]])
def test_a_bias_is_given_as_an_object_or_as_pairs(value: object) -> None:
    assert SamplingParams().replaced({"logit_bias": value}, "line 1").logit_bias == ((3, 1.0), (2, -100.0))


def test_params_come_back_from_their_json() -> None:
    params = SamplingParams(logit_bias=((3, 1.0), (2, -100.0)), min_tokens=4, presence_penalty=1.0, stop=("a",))
    assert SamplingParams().replaced(json.loads(json.dumps(asdict(params))), "params") == params


def test_no_end_token_and_no_stop_text_ends_an_answer_before_its_least_length() -> None:
    params = SamplingParams(max_tokens=9, min_tokens=2, stop_token_ids=(8,))
    sequence = Sequence(0, (1,), params, frozenset({9}))
    assert {*sequence.barred} == {8, 9}
    assert sequence.append(4) is None and {*sequence.barred} == {8, 9}
    assert sequence.append(3, stop_matched=True) is None and not sequence.barred
    assert sequence.append(8) is FinishReason.STOP
    assert {*Sequence(0, (1,), replace(params, ignore_eos=True), frozenset({9})).barred} == {8}
    assert Sequence(0, (1,), params).append(8) is FinishReason.STOP, "no other token could come"
    full = Sequence(0, (1,), SamplingParams(max_tokens=2, min_tokens=2), generated=[5])
    assert full.append(5) is FinishReason.LENGTH


def test_each_choice_draws_by_a_seed_of_its_own_that_is_always_the_same() -> None:
    params = SamplingParams(temperature=1.0, seed=7)
    choices = [params.of_choice(i) for i in range(64)]
    assert choices[0] == params and len({choice.seed for choice in choices}) == 64
    assert [replace(choice, seed=7) for choice in choices] == [params] * 64
    assert choices == [params.of_choice(i) for i in range(64)]
    assert replace(params, seed=8).of_choice(1).seed != choices[1].seed
    assert replace(params, seed=-1).of_choice(1).seed == replace(params, seed=2**64 - 1).of_choice(1).seed


def test_how_to_sample_survives_a_journal() -> None:
    """As JSON: an answer in a form goes on in it after a restart."""
    params = SamplingParams(grammar='regex:"a"', shown_token_ids=(7, 8), stop=("x",), seed=3)
    assert SamplingParams().replaced(json.loads(json.dumps(asdict(params))), "journal") == params
    with pytest.raises(ConfigError, match="journal: grammar: 5 is not a text"):
        SamplingParams().replaced({"grammar": 5}, "journal")


def test_a_form_says_where_the_answer_ends() -> None:
    with pytest.raises(ConfigError, match="ignore_eos: True is out of range"):
        SamplingParams(grammar="regex:a", ignore_eos=True)
