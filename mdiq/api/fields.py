"""Request fields of OpenAI and of other servers: which are served, and which are refused.

A field that would change the answer and is not served is refused by name, unless its value has no effect. Others are
ignored: fields about storing, counting or scheduling a request, and options of a field that is refused itself.
Requests of the HTTP API and lines of a prompts file follow the same table.

The names are those of OpenAI, vLLM, SGLang, llama.cpp, TGI, Ollama, KoboldCpp, text-generation-webui and transformers.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mdiq.api.structure import structure_of
from mdiq.errors import ConfigError

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "seed",
)
"""Fields with the names of SamplingParams; max_tokens has more names, see MAX_TOKENS."""
MAX_TOKENS = ("max_completion_tokens", "max_tokens", "n_predict", "max_new_tokens", "num_predict")
"""The first one that is given counts."""
MAX_CHOICES = 64
NO_LIMIT = 1 << 31  # tokens of an answer: what is left of the context counts
MAX_STOP_TOKENS = 1_024  # each costs time at every token
_SYNONYMS = {
    "repeat_penalty": "repetition_penalty",
    "rep_pen": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "stopping_strings": "stop",
}
NUM_CHOICES = ("n", "n_cmpl", "num_return_sequences")
"""The first one that is given counts."""
_WHOLE = ("top_k", "seed", "min_tokens", "min_new_tokens", *MAX_TOKENS, *NUM_CHOICES)


def _fields(names: str = "", **harmless: object) -> Mapping[str, tuple[object, ...]]:
    """Return fields with the values, beside null, false, [], {} and "", that have no effect. True: on by default.

    names: of fields that have no such value. harmless: the others; a tuple has several values.
    """
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in harmless.items()}
    return {**dict.fromkeys(names.split(), ()), **values}


# Reason: fields.
_NOT_SERVED: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "log-probabilities are given by the HTTP API alone (logprobs, and in a chat top_logprobs)": _fields(
        "logprobs top_logprobs prompt_logprobs decoder_input_details details", n_probs=0, top_n_tokens=0
    ),
    "all answers are given, the best is not chosen": _fields("best_of"),
    "one answer is drawn, token by token": _fields(
        "use_beam_search early_stopping", num_beams=1, num_beam_groups=1, diversity_penalty=0, length_penalty=(1, 0)
    ),
    "tokens are drawn; temperature 0 takes the likeliest": _fields(do_sample=True),
    "tools are called by chats over HTTP alone": _fields("tools", tool_choice=("none", "auto")),
    "tools are set in `tools`": _fields(
        "functions web_search_options tool_prompt guideline",
        function_call=("none", "auto"),
    ),
    "the answer's form is set in response_format": _fields(
        "response_schema structural_tag grammar_string format watermark",
        response_mime_type="text/plain",
        n_indent=0,
        verbosity="medium",
    ),
    "logit_bias makes tokens likelier or less likely; none is made impossible": _fields(
        "bad_words bad_words_ids banned_tokens banned_strings custom_token_bans ban_eos_token "
        "allowed_token_ids suppress_tokens begin_suppress_tokens force_words_ids forced_bos_token_id "
        "forced_eos_token_id sequence_bias logits_processors logits_processor custom_logit_processor "
        "negative_prompt",
        no_repeat_ngram_size=0,
        encoder_no_repeat_ngram_size=0,
        guidance_scale=(1, 0),
        cfg_scale=(1, 0),
    ),
    "tokens are penalized by repetition_penalty, presence_penalty and frequency_penalty alone": _fields(
        "exponential_decay_length_penalty repetition_detection",
        encoder_repetition_penalty=1,
        rep_pen_slope=(0, 1),
    ),
    "repetition_penalty looks at all tokens, the other penalties at those of the answer": _fields(
        "repetition_penalty_range rep_pen_range", repeat_last_n=-1, penalize_nl=True
    ),
    "there is no such sampler (temperature, top_k, top_p, min_p and repetition_penalty are there)": _fields(
        "dynamic_temperature samplers sampler_order sampler_priority temperature_last preset",
        **dict.fromkeys("typical_p typical tfs_z tfs".split(), 1),
        **dict.fromkeys("top_a mirostat mirostat_mode dynatemp_range smoothing_factor dry_multiplier".split(), 0),
        **dict.fromkeys("xtc_probability penalty_alpha epsilon_cutoff eta_cutoff min_keep".split(), 0),
        top_n_sigma=(-1, 0),
        adaptive_target=-1,
    ),
    "an answer ends at stop texts, stop tokens, the model's own end and max_tokens": _fields(
        "stop_regex max_time", min_length=0, t_max_predict_ms=(0, -1)
    ),
    "a stop text is not a part of the answer": _fields("include_stop_str_in_output no_stop_trim"),
    "special tokens have no text in an answer": _fields(skip_special_tokens=True),
    "answers are texts": _fields(
        "audio return_tokens_as_token_ids return_token_ids return_tokens return_hidden_states", modalities=(["text"],)
    ),
    "the prompt is repeated by echo in /v1/completions alone": _fields("echo return_full_text"),
    "text is not inserted": _fields("suffix input_prefix input_suffix input_extra"),
    "answers are not predicted": _fields("prediction"),
    "nothing of a prompt is left out": _fields(
        "truncate_prompt_tokens truncate truncation_length", n_keep=(0, -1), num_keep=(0, -1)
    ),
    "prompts are texts or token ids": _fields("prompt_embeds images image_data input_ids"),
    "the prompt is made of the messages and the model's chat template alone": _fields(
        "continue_final_message continue_ chat_template template instruction_template character raw system "
        "context documents",
        add_generation_prompt=True,
        mode="instruct",
    ),
    "the tokenizer says which special tokens come before and after a text": _fields(
        add_special_tokens=True, add_bos_token=True
    ),
    "thinking is set in chat_template_kwargs": _fields(
        "thinking think thinking_token_budget reasoning",
        thinking_budget=-1,
        thinking_budget_tokens=-1,
        reasoning_budget=-1,
    ),
    "a model's thinking is a part of its answer": _fields(include_reasoning=True, reasoning_format=("none", "auto")),
    "there are no adapters": _fields("lora lora_path adapter_id"),
    "its fields stand beside the messages or the prompt": _fields("options parameters extra_body"),
}
_REASONS = {name: (reason, nothing) for reason, names in _NOT_SERVED.items() for name, nothing in names.items()}
_NOTHING: tuple[object, ...] = (None, False, [], {}, "")


def _penalizes_nothing(given: Mapping[str, Any]) -> bool:
    names = ("repetition_penalty", *(name for name, meant in _SYNONYMS.items() if meant == "repetition_penalty"))
    others = ("presence_penalty", "frequency_penalty")
    return all(given.get(name) in (None, 1) for name in names) and all(given.get(name) in (None, 0) for name in others)


def _keeps_all_answers(given: Mapping[str, Any]) -> bool:
    """Whether as many answers are made as are given."""
    return bool(_whole("n", given["best_of"]) == next((given[name] for name in NUM_CHOICES if given.get(name)), 1))


# Fields without effect together with other fields of the same request.
_WITHOUT_EFFECT: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    **dict.fromkeys(("repetition_penalty_range", "rep_pen_range", "repeat_last_n", "penalize_nl"), _penalizes_nothing),
    "best_of": _keeps_all_answers,
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
        if value is None or (_SYNONYMS.get(field, field) in ("stop", "logit_bias") and value in ([], "")):
            continue
        if field == "stop_token_ids" and isinstance(value, list) and len(value) > MAX_STOP_TOKENS:
            raise ConfigError(f"{field}: {len(value)} tokens; give at most {MAX_STOP_TOKENS}")
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
    if (structure := structure_of(given)) is not None:
        values["grammar"] = structure.grammar
    return values


def num_choices(given: Mapping[str, Any]) -> int:
    """Return how many answers to each prompt a request wants.

    Raises:
        ConfigError: it is not a number of answers; the message begins with the field's name.
    """
    for field in NUM_CHOICES:
        value = _whole(field, given.get(field))
        if value is not None:
            if type(value) is not int or not 1 <= value <= MAX_CHOICES:
                raise ConfigError(f"{field}: {str(value)[:40]} is not a number of answers; give 1 to {MAX_CHOICES}")
            return value
    return 1


def _whole(field: str, value: Any) -> Any:
    """Return whole numbers written as floats as integers: the JSON of some languages has no other."""
    return int(value) if field in _WHOLE and isinstance(value, float) and value.is_integer() else value


def _equal(value: object, other: object) -> bool:
    # True is not 1 here, nor False 0: "logprobs": 0 has an effect.
    return isinstance(value, bool) == isinstance(other, bool) and value == other
