"""Requests good and bad, as values."""

from typing import Any

import pytest

from mdiq.api.fields import _REASONS
from mdiq.api.logprobs import AskedLogprobs
from mdiq.api.requests import ApiError, BadRequest, parse
from mdiq.core.logprobs import LogprobsWanted
from mdiq.core.sequence import SamplingParams

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def _params(body: dict[str, Any], *, is_chat: bool = True, num_prompt: int = 10) -> SamplingParams:
    return parse(body, is_chat=is_chat).params(num_prompt, 100)


def test_a_chat_takes_what_the_context_holds_and_samples_at_1() -> None:
    params = _params(HELLO)
    assert (params.max_tokens, params.temperature, params.top_p) == (90, 1.0, 1.0)
    assert _params(HELLO).seed != params.seed  # another answer each time
    assert _params({**HELLO, "seed": 7}).seed == 7


def test_a_completion_has_16_tokens_or_what_is_left() -> None:
    assert _params({"prompt": "a"}, is_chat=False).max_tokens == 16
    assert _params({"prompt": "a"}, is_chat=False, num_prompt=95).max_tokens == 5


def test_the_newer_name_of_the_limit_goes_first() -> None:
    assert _params({**HELLO, "max_tokens": 3}).max_tokens == 3
    assert _params({**HELLO, "max_tokens": 3, "max_completion_tokens": 4}).max_tokens == 4


def test_all_ways_to_sample_and_to_stop_arrive() -> None:
    wishes = {"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True}
    params = _params({**HELLO, **wishes, "stop": "END", "stop_token_ids": [3], "seed": 2**63})
    assert all(getattr(params, name) == value for name, value in wishes.items())
    assert (params.stop, params.stop_token_ids, params.seed) == (("END",), (3,), 2**63)
    assert _params({**HELLO, "stop": ["a", "b"]}).stop == ("a", "b")
    assert _params({**HELLO, "stop": None, "temperature": None}).temperature == 1.0


def test_a_prompt_is_a_text_or_token_ids_alone_or_in_a_list() -> None:
    for prompt in ("text", ["text"]):
        assert parse({"prompt": prompt}, is_chat=False).prompts == ("text",)
    for ids in ([1, 2], [[1, 2]]):
        assert parse({"prompt": ids}, is_chat=False).prompts == ((1, 2),)


def test_parts_of_a_content_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = parse({"messages": [{"role": "user", "content": parts}]}, is_chat=True)
    assert asked.messages == ({"role": "user", "content": "ab"},)
    parts = [{"text": "a"}, {"type": "output_text", "text": "b"}, {"type": "refusal", "refusal": "c"}]
    asked = parse({"messages": [{"role": "assistant", "content": parts}]}, is_chat=True)
    assert asked.messages == ({"role": "assistant", "content": "abc"},)


def test_unknown_fields_and_those_that_ask_for_nothing_are_ignored() -> None:
    asked = parse(
        {**HELLO, "user": "me", "n": 1, "tools": [], "logprobs": False, "echo": None, "presence_penalty": 0.0},
        is_chat=True,
    )
    assert not asked.is_streamed and not asked.wants_usage
    asked = parse({**HELLO, "stream": True, "stream_options": {"include_usage": True}}, is_chat=True)
    assert asked.is_streamed and asked.wants_usage


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 65}, "n"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"num_return_sequences": "2"}, "num_return_sequences"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"type": "object"}, "grammar": "root ::= 'a'"}, "guided_json"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"grammar": {"type": "json"}}, "grammar"),
        ({"structured_outputs": {"json": {}, "structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json_object": 1}}, "json_object"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"logprobs": 0}, "logprobs"),
        ({"logprobs": "yes"}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"mirostat": 2}, "mirostat"),
        ({"typical_p": 0.9}, "typical_p"),
        ({"dry_multiplier": 0.8}, "dry_multiplier"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"n_predict": 0}, "n_predict"),
        ({"stream": 1}, "stream"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage"),
        ({"top_k": -2}, "top_k"),
        ({"repeat_penalty": 0}, "repetition_penalty"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"deep": {}}}, "chat_template_kwargs"),
        ({"messages": [{"role": "banana", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": "f"}]}]}, "messages"),
        ({"echo": True}, "echo"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"presence_penalty": "1"}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"presence_penalty": 1, "repeat_last_n": 64}, "repeat_last_n"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": float("nan")}}, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias"),
        ({"logit_bias": {"\u0665": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1_025)}}, "logit_bias"),
        ({"logit_bias": [[5]]}, "logit_bias"),
        ({"logit_bias": [5, 1]}, "logit_bias"),
        ({"logit_bias": "5"}, "logit_bias"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 2.5}, "min_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"stop_token_ids": list(range(1_025))}, "stop_token_ids"),
        ({"tools": {}}, None),
        ({"tools": {"a": 1}}, "tools"),
        ({"tools": [{}]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "a"}}] * 2}, "tools[1].function.name"),
        ({"tools": [{"function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
        ({"tools": [{"function": {"name": "a", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [{"function": {"name": "a", "parameters": {"type": "array"}}}]}, "tools[0].function.parameters"),
        ({"tools": [{"function": {"name": "a", "description": 5}}]}, "tools[0].function.description"),
        ({"tools": [{"function": {"name": "a", "description": "\ud800"}}]}, "tools[0].function"),
        ({"tools": [{"function": {"name": "a"}}], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [{"function": {"name": "a"}}], "tool_choice": {"type": "function"}}, "tool_choice"),
        (
            {"tools": [{"function": {"name": "a"}}], "tool_choice": {"type": "function", "function": {"name": "b"}}},
            "tool_choice",
        ),
        ({"tools": [{"function": {"name": "a"}}], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_completion_tokens": True}, "max_completion_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a", "b" * 1_001]}, "stop"),
        ({"stop": "b" * 1_001}, "stop"),
        ({"seed": 1.5}, "seed"),
        ({"model": 5}, "model"),
        ({"stream_options": []}, None),
        ({"stream_options": [1]}, "stream_options"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["Hello"]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a cat"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": 5, "text": "a cat"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0]"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_field(change: dict[str, Any], param: str | None) -> None:
    if param is None:  # as good as nothing
        _params({**HELLO, **change})
        return
    with pytest.raises(BadRequest) as caught:
        _params({**HELLO, **change})
    assert caught.value.status == 400
    assert caught.value.body["param"] == param
    assert str(caught.value).startswith(param)


@pytest.mark.parametrize(
    "nothing",
    [
        {"tools": [], "tool_choice": "auto", "functions": None, "logit_bias": {}, "frequency_penalty": 0},
        {"n": 2, "best_of": 2, "logit_bias": [], "presence_penalty": None},
        {"response_format": {"type": "text"}, "modalities": ["text"], "min_tokens": 0, "best_of": 1, "typical_p": 1.0},
        {"mirostat": 0, "xtc_probability": 0.0, "repeat_last_n": -1, "add_generation_prompt": True, "logprobs": None},
        {"metadata": {"a": 1}, "store": False, "service_tier": "auto", "cache_prompt": True, "id_slot": 3},
    ],
)
def test_fields_that_ask_for_nothing_pass(nothing: dict[str, Any]) -> None:
    assert _params({**HELLO, **nothing}).max_tokens == 90


def test_usual_synonyms_and_ways_to_write_a_value_are_taken() -> None:
    assert _params({**HELLO, "repeat_penalty": 1.3}).repetition_penalty == 1.3
    assert _params({**HELLO, "n_predict": 7}).max_tokens == 7
    assert _params({**HELLO, "n_predict": -1}).max_tokens == _params({**HELLO, "max_tokens": -1}).max_tokens == 90
    assert _params({"prompt": "a", "max_tokens": -1}, is_chat=False).max_tokens == 90
    assert _params({**HELLO, "max_tokens": 5.0, "top_k": 40.0, "seed": 3.0}).top_k == 40
    assert _params({**HELLO, "top_k": -1}).top_k == 0
    assert len({_params({**HELLO, "seed": -1}).seed for _ in range(3)}) == 3
    assert _params({**HELLO, "top_p": None, "stop": None, "max_tokens": None}).top_p == 1.0


@pytest.mark.parametrize(
    "prompt", [None, "", [], [[]], ["a", [1, "b"]], ["a"] * 65, [1, "a"], [-1], [True], {}, "\udfff"]
)
def test_a_prompt_that_is_none_is_refused(prompt: object) -> None:
    if prompt == "":  # a text, whose tokens decide
        assert parse({"prompt": prompt}, is_chat=False).prompts == ("",)
        return
    with pytest.raises(BadRequest, match="^prompt"):
        parse({"prompt": prompt}, is_chat=False)


@pytest.mark.parametrize("body", [None, [], "text", 5])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    with pytest.raises(BadRequest, match="not a JSON object"):
        parse(body, is_chat=True)


def test_what_does_not_fit_the_context_is_told_with_both_numbers() -> None:
    for num_prompt, wanted in ((100, None), (101, 1)):
        with pytest.raises(BadRequest) as caught:
            parse({**HELLO, "max_tokens": wanted}, is_chat=True).params(num_prompt, 100)
        body = caught.value.body
        assert body["type"] == "exceed_context_size_error"
        assert (body["n_prompt_tokens"], body["n_ctx"]) == (num_prompt, 100)
        # What litellm and langchain-openai know a prompt that is too long by; newer openai clients hand on only the
        # message, without the code.
        assert body["code"] == "context_length_exceeded"
        assert "this model's maximum context length is" in str(body["message"]).lower()
        assert "prompt is too long" in str(body["message"])


def test_an_answer_longer_than_what_is_left_is_what_is_left() -> None:
    assert parse({**HELLO, "max_tokens": 51}, is_chat=True).params(50, 100).max_tokens == 50
    assert parse({**HELLO, "max_tokens": 10**9}, is_chat=True).params(99, 100).max_tokens == 1


def test_errors_have_openais_types() -> None:
    kinds = {status: ApiError(status, "words").body["type"] for status in (400, 401, 404, 413, 429, 503)}
    assert kinds == {
        400: "invalid_request_error",
        401: "authentication_error",
        404: "not_found_error",
        413: "invalid_request_error",
        429: "rate_limit_error",
        503: "unavailable_error",
    }


@pytest.mark.parametrize(
    ("field", "value", "nothing"),
    [
        ("structural_tag", "x", ""),
        ("no_repeat_ngram_size", 2, 0),
        ("logits_processors", ["a"], []),
        ("penalty_alpha", 0.5, 0),
        ("t_max_predict_ms", 5, -1),
        ("prompt_embeds", "x", None),
    ],
)
def test_fields_of_other_servers_are_refused_by_name_unless_they_ask_for_nothing(
    field: str, value: object, nothing: object
) -> None:
    parse({**HELLO, field: nothing}, is_chat=True)
    with pytest.raises(BadRequest, match=f"^{field}: "):
        parse({**HELLO, field: value}, is_chat=True)


# What each server's clients may send, beside what OpenAI has: names that are served, and those that change no answer.
SERVED = {
    "max_new_tokens",
    "n_predict",
    "num_predict",
    "repeat_penalty",
    "rep_pen",
    "stop_sequences",
    "chat_template_kwargs",
}
SERVED |= {
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "ignore_eos",
    "reasoning_effort",
    "enable_thinking",
    "response_format",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "json_schema",
    "regex",
    "ebnf",
    "grammar",
}
SERVED |= {"n", "n_cmpl", "num_return_sequences", "presence_penalty", "frequency_penalty", "logit_bias"}
SERVED |= {"min_tokens", "min_new_tokens"}
SERVED |= {"temperature", "top_p", "stop", "seed", "max_tokens", "max_completion_tokens", "stream", "stream_options"}
WITHOUT_EFFECT = set(
    "user metadata store service_tier safety_identifier prompt_cache_key parallel_tool_calls priority request_id "
    "cache_salt rid cache_prompt id_slot timings_per_token return_progress post_sampling_probs keep_alive "
    "dynatemp_exponent smoothing_curve dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers "
    "xtc_threshold mirostat_tau mirostat_eta guided_decoding_backend guided_whitespace_pattern separate_reasoning "
    "spaces_between_special_tokens num_ctx prompt_lookup_num_tokens".split()
)
IN_COMPLETIONS = {"logprobs", "echo"}
"""Refused elsewhere. A chat has its own "logprobs", and a prompts file none."""
SENT = {
    "openai": "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens "
    "metadata modalities n parallel_tool_calls prediction presence_penalty prompt_cache_key reasoning_effort "
    "response_format safety_identifier seed service_tier stop store stream stream_options temperature tool_choice "
    "tools top_logprobs top_p user verbosity web_search_options best_of echo suffix",
    "vllm": "use_beam_search top_k min_p repetition_penalty length_penalty stop_token_ids include_stop_str_in_output "
    "ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens prompt_logprobs "
    "allowed_token_ids bad_words add_generation_prompt continue_final_message add_special_tokens documents "
    "chat_template chat_template_kwargs include_reasoning guided_json guided_regex guided_choice guided_grammar "
    "structural_tag guided_decoding_backend guided_whitespace_pattern structured_outputs priority request_id "
    "logits_processors return_tokens_as_token_ids return_token_ids cache_salt prompt_embeds thinking_token_budget",
    "sglang": "regex ebnf json_schema stop_regex no_stop_trim separate_reasoning lora_path custom_logit_processor "
    "return_hidden_states rid input_ids image_data",
    "llama.cpp": "dynatemp_range dynatemp_exponent n_predict n_indent n_keep n_cmpl typical_p repeat_penalty "
    "repeat_last_n penalize_nl dry_multiplier dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers "
    "xtc_probability xtc_threshold mirostat mirostat_tau mirostat_eta grammar n_probs min_keep t_max_predict_ms "
    "id_slot cache_prompt return_tokens samplers timings_per_token return_progress post_sampling_probs lora "
    "top_n_sigma tfs_z adaptive_target reasoning_format thinking_budget_tokens input_prefix input_suffix input_extra",
    "tgi": "do_sample max_new_tokens details decoder_input_details return_full_text top_n_tokens truncate watermark "
    "adapter_id guideline tool_prompt",
    "ollama": "options format raw template system context images think keep_alive num_predict num_ctx num_keep",
    "koboldcpp": "typical tfs top_a rep_pen rep_pen_range rep_pen_slope sampler_order smoothing_factor banned_tokens "
    "stop_sequences",
    "transformers": "num_beams num_beam_groups diversity_penalty early_stopping min_length min_new_tokens max_time "
    "no_repeat_ngram_size encoder_repetition_penalty encoder_no_repeat_ngram_size bad_words_ids force_words_ids "
    "forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens sequence_bias guidance_scale "
    "penalty_alpha epsilon_cutoff eta_cutoff num_return_sequences exponential_decay_length_penalty",
    "text-generation-webui": "dynamic_temperature smoothing_curve temperature_last sampler_priority custom_token_bans "
    "ban_eos_token negative_prompt repetition_penalty_range truncation_length mirostat_mode grammar_string "
    "add_bos_token mode character instruction_template continue_ preset prompt_lookup_num_tokens",
    "others": "thinking enable_thinking thinking_budget reasoning response_schema response_mime_type",
}


@pytest.mark.parametrize("server", SENT)
def test_every_field_of_a_server_is_served_refused_or_without_effect(server: str) -> None:
    for name in SENT[server].split():
        assert (name in _REASONS) + (name in SERVED) + (name in WITHOUT_EFFECT) == 1, name
        if name in _REASONS and name not in IN_COMPLETIONS:
            is_on = any(value is True for value in _REASONS[name][1])
            with pytest.raises(BadRequest, match=f"^{name}: .*; leave it out$"):
                body = {"prompt": "a", "repetition_penalty": 1.1, name: False if is_on else "x"}
                parse(body, is_chat=False)


def test_what_means_something_only_beside_another_field_is_refused_only_there() -> None:
    for name, value in (("repeat_last_n", 64), ("penalize_nl", False), ("rep_pen_range", 1024)):
        parse({**HELLO, name: value, "repeat_penalty": 1.0}, is_chat=True)
        for penalty in ("repeat_penalty", "repetition_penalty", "rep_pen", "presence_penalty", "frequency_penalty"):
            with pytest.raises(BadRequest, match=f"^{name}: "):
                parse({**HELLO, name: value, penalty: 1.1}, is_chat=True)
    parse({**HELLO, "do_sample": False, "temperature": 0}, is_chat=True)
    with pytest.raises(BadRequest, match="^do_sample: tokens are drawn; temperature 0"):
        parse({**HELLO, "do_sample": False}, is_chat=True)
    parse({**HELLO, "add_special_tokens": False}, is_chat=True)
    with pytest.raises(BadRequest, match="^add_special_tokens"):
        parse({"prompt": "a", "add_special_tokens": False}, is_chat=False)


def test_words_for_the_template_may_stand_in_the_request_itself() -> None:
    asked = parse({**HELLO, "enable_thinking": False, "reasoning_effort": "low"}, is_chat=True)
    assert asked.template_kwargs == {"enable_thinking": False, "reasoning_effort": "low"}
    both = {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}
    assert parse({**HELLO, **both}, is_chat=True).template_kwargs == {"enable_thinking": False}
    for wrong in ({"enable_thinking": "no"}, {"reasoning_effort": 3}):
        with pytest.raises(BadRequest, match=f"^{next(iter(wrong))}: "):
            parse({**HELLO, **wrong}, is_chat=True)


@pytest.mark.parametrize(
    ("more", "asked"),
    [
        ({}, AskedLogprobs()),
        ({"logprobs": False, "echo": False}, AskedLogprobs()),
        ({"logprobs": 0}, AskedLogprobs(LogprobsWanted(0))),
        ({"logprobs": 20.0}, AskedLogprobs(LogprobsWanted(20))),
        ({"echo": True}, AskedLogprobs(None, echo=True)),
        ({"echo": True, "logprobs": 1}, AskedLogprobs(LogprobsWanted(1, of_prompt=True), echo=True)),
        (
            {"echo": True, "logprobs": 1, "max_tokens": 0},
            AskedLogprobs(LogprobsWanted(1, of_prompt=True), echo=True, drops_answer=True),
        ),
        ({"echo": True, "n_predict": 0.0}, AskedLogprobs(None, echo=True, drops_answer=True)),
    ],
)
def test_a_completion_says_which_log_probabilities_it_wants(more: dict[str, Any], asked: AskedLogprobs) -> None:
    parsed = parse({"prompt": "a", **more}, is_chat=False)
    assert parsed.logprobs == asked
    if asked.drops_answer:
        assert parsed.params(10, 100).max_tokens == 1


@pytest.mark.parametrize(
    ("more", "asked"),
    [
        ({"logprobs": False, "top_logprobs": 0}, AskedLogprobs()),
        ({"logprobs": True}, AskedLogprobs(LogprobsWanted())),
        ({"logprobs": True, "top_logprobs": 20}, AskedLogprobs(LogprobsWanted(20))),
    ],
)
def test_a_chat_says_which_log_probabilities_it_wants(more: dict[str, Any], asked: AskedLogprobs) -> None:
    assert parse({**HELLO, **more}, is_chat=True).logprobs == asked


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 1.5}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"echo": 1}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "max_tokens": False}, "max_tokens"),
    ],
)
def test_log_probabilities_of_a_completion_that_make_no_sense_are_refused(more: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest, match=f"^{param}: ") as caught:
        parse({"prompt": "a", **more}, is_chat=False)
    assert caught.value.body["param"] == param


def test_stop_texts_have_the_names_of_other_servers() -> None:
    for name in ("stop_sequences", "stop_strings", "stopping_strings"):
        assert _params({**HELLO, name: ["a"]}).stop == ("a",)
        assert _params({**HELLO, name: []}).stop == ()


def test_the_limit_of_tokens_has_the_names_of_other_servers() -> None:
    assert parse({**HELLO, "max_new_tokens": 7}, is_chat=True).max_tokens == 7


def test_biases_penalties_and_a_least_length_arrive() -> None:
    wishes = {"presence_penalty": -2, "frequency_penalty": 0.5, "min_new_tokens": 3.0}
    params = _params({**HELLO, **wishes, "logit_bias": {"5": -100, "07": 1.5}})
    assert (params.presence_penalty, params.frequency_penalty, params.min_tokens) == (-2.0, 0.5, 3)
    assert params.logit_bias == ((5, -100.0), (7, 1.5))
    assert _params({**HELLO, "logit_bias": [[5, -1], [6, 2.5]]}).logit_bias == ((5, -1.0), (6, 2.5))


def test_a_least_length_is_no_more_than_what_is_left() -> None:
    params = _params({**HELLO, "min_tokens": 80, "max_tokens": 200}, num_prompt=70)
    assert (params.min_tokens, params.max_tokens) == (30, 30)
    with pytest.raises(BadRequest, match=r"^min_tokens: 17 is out of range; use from 0 to max_tokens \(16\)"):
        _params({"prompt": "a", "min_tokens": 17}, is_chat=False)


@pytest.mark.parametrize("name", ["n", "n_cmpl", "num_return_sequences"])
def test_several_answers_are_asked_for_by_the_names_of_other_servers(name: str) -> None:
    assert parse({**HELLO, name: 3.0}, is_chat=True).num_answers == 3
    asked = parse({"prompt": ["a", "b"], name: 32, "best_of": 32}, is_chat=False)
    assert (asked.num_choices, asked.num_answers) == (32, 64)
    with pytest.raises(BadRequest, match="^n: 33 answers to each of 2 prompts; give at most 64"):
        parse({"prompt": ["a", "b"], name: 33}, is_chat=False)
