"""Request fields of OpenAI and of other servers: which are served, and which are refused.

A field that would change the answer and is not served is refused by name, unless its value has no effect. Others are
ignored: fields about storing, counting or scheduling a request, and options of a field that is refused itself.
Requests of the HTTP API and lines of a prompts file follow the same table.

The names are those of OpenAI, vLLM, SGLang, llama.cpp, TGI, Ollama, KoboldCpp, text-generation-webui and transformers.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mdiq.errors import ConfigError

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "seed",
)
"""Fields with the names of SamplingParams; max_tokens has more names, see MAX_TOKENS."""
MAX_TOKENS = ("max_completion_tokens", "max_tokens", "n_predict", "max_new_tokens", "num_predict")
"""The first one that is given counts."""
_SYNONYMS = {
    "repeat_penalty": "repetition_penalty",
    "rep_pen": "repetition_penalty",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "stopping_strings": "stop",
}
_WHOLE = ("top_k", "seed", *MAX_TOKENS)

# Reason: names, each with the values, beside null, false, [], {} and "", that have no effect. True: on by default.
_NOT_SERVED: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "log probabilities are not given": {
        "logprobs": (),
        "top_logprobs": (),
        "prompt_logprobs": (),
        "n_probs": (0,),
        "top_n_tokens": (0,),
        "decoder_input_details": (),
        "details": (),
    },
    "one answer a request is given; ask several times": {
        "n": (1,),
        "n_cmpl": (1,),
        "best_of": (1,),
        "num_return_sequences": (1,),
    },
    "one answer is drawn, token by token": {
        "use_beam_search": (),
        "num_beams": (1,),
        "num_beam_groups": (1,),
        "diversity_penalty": (0,),
        "length_penalty": (1, 0),
        "early_stopping": (),
    },
    "tokens are drawn; temperature 0 takes the likeliest": {"do_sample": (True,)},
    "tools are not called": {
        "tools": (),
        "tool_choice": ("none", "auto"),
        "functions": (),
        "function_call": ("none", "auto"),
        "web_search_options": (),
        "tool_prompt": (),
        "guideline": (),
    },
    "the answer's form is not enforced": {
        "response_format": ({"type": "text"},),
        "response_schema": (),
        "response_mime_type": ("text/plain",),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "structured_outputs": (),
        "structural_tag": (),
        "grammar": (),
        "grammar_string": (),
        "json_schema": (),
        "regex": (),
        "ebnf": (),
        "format": (),
        "n_indent": (0,),
        "watermark": (),
        "verbosity": ("medium",),
    },
    "no token can be made likelier, less likely or impossible": {
        "logit_bias": (),
        "bad_words": (),
        "bad_words_ids": (),
        "banned_tokens": (),
        "banned_strings": (),
        "custom_token_bans": (),
        "ban_eos_token": (),
        "allowed_token_ids": (),
        "suppress_tokens": (),
        "begin_suppress_tokens": (),
        "force_words_ids": (),
        "forced_bos_token_id": (),
        "forced_eos_token_id": (),
        "sequence_bias": (),
        "no_repeat_ngram_size": (0,),
        "encoder_no_repeat_ngram_size": (0,),
        "logits_processors": (),
        "logits_processor": (),
        "custom_logit_processor": (),
        "negative_prompt": (),
        "guidance_scale": (1, 0),
        "cfg_scale": (1, 0),
    },
    "tokens are penalized by repetition_penalty alone": {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "encoder_repetition_penalty": (1,),
        "exponential_decay_length_penalty": (),
        "rep_pen_slope": (0, 1),
        "repetition_detection": (),
    },
    "repetition_penalty looks at all tokens": {
        "repeat_last_n": (-1,),
        "repetition_penalty_range": (),
        "rep_pen_range": (),
        "penalize_nl": (True,),
    },
    "there is no such sampler (temperature, top_k, top_p, min_p and repetition_penalty are there)": {
        "typical_p": (1,),
        "typical": (1,),
        "tfs_z": (1,),
        "tfs": (1,),
        "top_a": (0,),
        "top_n_sigma": (-1, 0),
        "mirostat": (0,),
        "mirostat_mode": (0,),
        "dynatemp_range": (0,),
        "dynamic_temperature": (),
        "smoothing_factor": (0,),
        "dry_multiplier": (0,),
        "xtc_probability": (0,),
        "adaptive_target": (-1,),
        "penalty_alpha": (0,),
        "epsilon_cutoff": (0,),
        "eta_cutoff": (0,),
        "min_keep": (0,),
        "samplers": (),
        "sampler_order": (),
        "sampler_priority": (),
        "temperature_last": (),
        "preset": (),
    },
    "an answer ends at stop texts, stop tokens, the model's own end and max_tokens": {
        "min_tokens": (0,),
        "min_length": (0,),
        "min_new_tokens": (0,),
        "stop_regex": (),
        "t_max_predict_ms": (0, -1),
        "max_time": (),
    },
    "a stop text is not a part of the answer": {"include_stop_str_in_output": (), "no_stop_trim": ()},
    "special tokens have no text in an answer": {"skip_special_tokens": (True,)},
    "answers are texts": {
        "audio": (),
        "modalities": (["text"],),
        "return_tokens_as_token_ids": (),
        "return_token_ids": (),
        "return_tokens": (),
        "return_hidden_states": (),
    },
    "the prompt is not repeated": {"echo": (), "return_full_text": ()},
    "text is not inserted": {"suffix": (), "input_prefix": (), "input_suffix": (), "input_extra": ()},
    "answers are not predicted": {"prediction": ()},
    "nothing of a prompt is left out": {
        "n_keep": (0, -1),
        "num_keep": (0, -1),
        "truncate_prompt_tokens": (),
        "truncate": (),
        "truncation_length": (),
    },
    "prompts are texts or token ids": {"prompt_embeds": (), "images": (), "image_data": (), "input_ids": ()},
    "the prompt is made of the messages and the model's chat template alone": {
        "add_generation_prompt": (True,),
        "continue_final_message": (),
        "continue_": (),
        "chat_template": (),
        "template": (),
        "instruction_template": (),
        "character": (),
        "mode": ("instruct",),
        "raw": (),
        "system": (),
        "context": (),
        "documents": (),
    },
    "the tokenizer says which special tokens come before and after a text": {
        "add_special_tokens": (True,),
        "add_bos_token": (True,),
    },
    "thinking is set in chat_template_kwargs": {
        "thinking": (),
        "think": (),
        "thinking_budget": (-1,),
        "thinking_budget_tokens": (-1,),
        "thinking_token_budget": (),
        "reasoning_budget": (-1,),
        "reasoning": (),
    },
    "a model's thinking is a part of its answer": {
        "include_reasoning": (True,),
        "reasoning_format": ("none", "auto"),
    },
    "there are no adapters": {"lora": (), "lora_path": (), "adapter_id": ()},
    "its fields stand beside the messages or the prompt": {"options": (), "parameters": (), "extra_body": ()},
}
_REASONS = {name: (reason, nothing) for reason, names in _NOT_SERVED.items() for name, nothing in names.items()}
_NOTHING: tuple[object, ...] = (None, False, [], {}, "")


def _penalizes_nothing(given: Mapping[str, Any]) -> bool:
    names = ("repetition_penalty", *(name for name, meant in _SYNONYMS.items() if meant == "repetition_penalty"))
    return all(given.get(name) in (None, 1) for name in names)


# Fields without effect together with other fields of the same request.
_WITHOUT_EFFECT: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    **dict.fromkeys(_NOT_SERVED["repetition_penalty looks at all tokens"], _penalizes_nothing),
    "add_special_tokens": lambda given: "messages" in given,  # a template writes them itself
    "do_sample": lambda given: given.get("temperature") == 0,
}


def check_served(given: Mapping[str, Any], error: Callable[[str, str], Exception]) -> None:
    """Refuse fields that would change the answer and are not served.

    error: makes the exception, from a message and the field's name.
    """
    for field in given.keys() & _REASONS.keys():
        reason, nothing = _REASONS[field]
        if field in _WITHOUT_EFFECT and _WITHOUT_EFFECT[field](given):
            continue
        # A field that is on by default: false has an effect.
        is_on = any(value is True for value in nothing)
        nothing = (None, *nothing) if is_on else (*_NOTHING, *nothing)
        if not any(_equal(given[field], value) for value in nothing):
            raise error(f"{field}: {reason}; leave it out", field)


def sampling_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the SamplingParams that a request sets, by their names there.

    A negative limit of tokens means no limit: "max_tokens" is then None. It is missing if the request does not set it.

    Raises:
        ConfigError: a value has the wrong type; the message begins with its name.
    """
    values: dict[str, Any] = {}
    for field in (*SAMPLING, *_SYNONYMS):
        value = given.get(field)
        if value is None or (_SYNONYMS.get(field, field) == "stop" and value == []):
            continue
        value = _whole(field, value)
        if field in ("top_k", "seed") and value == -1:
            if field == "seed":  # another one each time
                continue
            value = 0
        values.setdefault(_SYNONYMS.get(field, field), value)
    for field in MAX_TOKENS:
        value = _whole(field, given.get(field))
        if value is None:
            continue
        if type(value) is not int or (value < 1 and value != -1):
            raise ConfigError(f"{field}: {str(value)[:40]} is not a number of tokens; give at least 1")
        values["max_tokens"] = None if value == -1 else value
        break
    return values


def _whole(field: str, value: Any) -> Any:
    """Return whole numbers written as floats as integers: the JSON of some languages has no other."""
    return int(value) if field in _WHOLE and isinstance(value, float) and value.is_integer() else value


def _equal(value: object, other: object) -> bool:
    # True is not 1 here, nor False 0: "logprobs": 0 has an effect.
    return isinstance(value, bool) == isinstance(other, bool) and value == other
