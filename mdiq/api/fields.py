"""Fields of requests as clients of OpenAI, vLLM and llama.cpp name them: which are served, and which are refused.

A field that would change the answer and is not served is refused by name, unless its value asks for nothing. Others are
ignored. Requests of the HTTP API and lines of a prompts file follow the same table.
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
"""Of SamplingParams, as clients name them too; max_tokens has more names, see MAX_TOKENS."""
MAX_TOKENS = ("max_completion_tokens", "max_tokens", "n_predict", "max_new_tokens")
"""The first one that is given counts."""
_SYNONYMS = {"repeat_penalty": "repetition_penalty"}
_WHOLE = ("top_k", "seed", *MAX_TOKENS)

_PROBABILITIES = "log probabilities are not given"
_FORM = "the answer's form is not enforced"
_TOOLS = "tools are not called"
_SAMPLER = "there is no such sampler (temperature, top_k, top_p, min_p and repetition_penalty are there)"
_SEARCH = "one answer is drawn, token by token"
_PROMPT = "the prompt is made of the messages and the model's chat template alone"
_NOT_SERVED: dict[str, tuple[str, tuple[object, ...]]] = {
    # name: why not, and the values that ask for nothing beside null, false, [] and {}
    "logprobs": (_PROBABILITIES, ()),
    "top_logprobs": (_PROBABILITIES, ()),
    "prompt_logprobs": (_PROBABILITIES, ()),
    "n_probs": (_PROBABILITIES, (0,)),
    "echo": ("the prompt is not repeated", ()),
    "suffix": ("text is not inserted", ("",)),
    "n": ("one answer a request; ask several times", (1,)),
    "best_of": ("one answer a request; ask several times", (1,)),
    "use_beam_search": (_SEARCH, ()),
    "num_beams": (_SEARCH, (1,)),
    "length_penalty": (_SEARCH, (1, 0)),
    "early_stopping": (_SEARCH, ()),
    "tools": (_TOOLS, ()),
    "tool_choice": (_TOOLS, ("none", "auto")),
    "functions": (_TOOLS, ()),
    "function_call": (_TOOLS, ("none", "auto")),
    "web_search_options": (_TOOLS, ()),
    "response_format": (_FORM, ({"type": "text"},)),
    "guided_json": (_FORM, ()),
    "guided_regex": (_FORM, ()),
    "guided_choice": (_FORM, ()),
    "guided_grammar": (_FORM, ()),
    "structured_outputs": (_FORM, ()),
    "structural_tag": (_FORM, ("",)),
    "grammar": (_FORM, ("",)),
    "json_schema": (_FORM, ()),
    "logit_bias": ("logits cannot be changed", ()),
    "bad_words": ("tokens cannot be forbidden", ()),
    "allowed_token_ids": ("tokens cannot be forbidden", ()),
    "frequency_penalty": ("tokens are not penalized by how often they came (repetition_penalty is there)", (0,)),
    "presence_penalty": ("tokens are not penalized for having come (repetition_penalty is there)", (0,)),
    "no_repeat_ngram_size": ("tokens cannot be forbidden", (0,)),
    "logits_processors": ("logits cannot be changed", ()),
    "penalty_alpha": (_SAMPLER, (0,)),
    "t_max_predict_ms": ("the time of an answer cannot be set", (0, -1)),
    "repeat_last_n": ("repetition_penalty looks at all tokens", (-1,)),
    "dry_multiplier": (_SAMPLER, (0,)),
    "xtc_probability": (_SAMPLER, (0,)),
    "typical_p": (_SAMPLER, (1,)),
    "tfs_z": (_SAMPLER, (1,)),
    "top_a": (_SAMPLER, (0,)),
    "top_n_sigma": (_SAMPLER, (-1, 0)),
    "mirostat": (_SAMPLER, (0,)),
    "dynatemp_range": (_SAMPLER, (0,)),
    "epsilon_cutoff": (_SAMPLER, (0,)),
    "eta_cutoff": (_SAMPLER, (0,)),
    "samplers": (_SAMPLER, ()),
    "min_keep": (_SAMPLER, (0,)),
    "min_tokens": ("the least length of an answer cannot be set", (0,)),
    "n_keep": ("nothing of a prompt is left out", (0,)),
    "truncate_prompt_tokens": ("nothing of a prompt is left out", ()),
    "include_stop_str_in_output": ("a stop text is not a part of the answer", ()),
    "skip_special_tokens": ("special tokens have no text", (True,)),
    "return_tokens_as_token_ids": ("tokens are given as text", ()),
    "prompt_embeds": ("prompts are texts or token ids", ()),
    "add_generation_prompt": (_PROMPT, (True,)),
    "continue_final_message": (_PROMPT, ()),
    "chat_template": (_PROMPT, ()),
    "documents": (_PROMPT, ()),
    "audio": ("answers are texts", ()),
    "modalities": ("answers are texts", (["text"],)),
    "prediction": ("answers are not predicted", ()),
    "lora": ("there are no adapters", ()),
}
_NOTHING: tuple[object, ...] = (None, False, [], {})


def check_served(given: Mapping[str, Any], error: Callable[[str, str], Exception]) -> None:
    """Refuse what would change the answer and is not served.

    error: makes the exception of a message and the field's name.
    """
    for field in given.keys() & _NOT_SERVED.keys():
        words, harmless = _NOT_SERVED[field]
        if any(value is True for value in harmless):  # what is on by default: false asks for something
            harmless = (None, True)
        else:
            harmless = (*_NOTHING, *harmless)
        if not any(_equal(given[field], value) for value in harmless):
            raise error(f"{field}: {words} by this version of mdiq; leave it out", field)


def sampling_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a request says of SamplingParams, by their names there; what it leaves out or open is not in it.

    A limit of tokens below 0 is none: "max_tokens" is None then, and missing where nothing is said of it.

    Raises:
        ConfigError: a value has the wrong type; the message begins with its name.
    """
    values: dict[str, Any] = {}
    for field in (*SAMPLING, *_SYNONYMS):
        value = given.get(field)
        if value is None or (field == "stop" and value == []):
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
    """Return whole numbers that are written as floats as numbers, as JSON of some languages has them."""
    return int(value) if field in _WHOLE and isinstance(value, float) and value.is_integer() else value


def _equal(value: object, other: object) -> bool:
    # True is not 1 here, nor False 0: "logprobs": 0 asks for something.
    return isinstance(value, bool) == isinstance(other, bool) and value == other
