"""A Sequence: one token stream with its prompt, its answer so far and how to sample it. No scheduling, no tensors.

The MDI literature calls a Sequence a *sample*.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from hashlib import blake2b

from mdiq.core.logprobs import Logprobs, LogprobsWanted, TokenLogprob
from mdiq.errors import ConfigError

MAX_BIASES = 1_024
"""Tokens with a bias, of one request: each costs time at every token."""

_HALF = re.compile("[\ud800-\udfff]")


class FinishReason(StrEnum):
    """Why a Sequence ended; the words are those of the OpenAI API where it has one."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen, and when to stop.

    max_tokens: maximum tokens to generate (at least 1).
    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of tokens whose probabilities reach it, in (0, 1].
    min_p: drop tokens less likely than min_p times the most likely one, in [0, 1].
    repetition_penalty: over 1 makes tokens of the prompt and the answer less likely (Keskar et al. 2019, CTRL, 4.1).
    presence_penalty, frequency_penalty: taken from the logits of tokens of the answer, once, and for each time that the
    token is there; in [-2, 2] (OpenAI's formula; the prompt does not count).
    logit_bias: (token id, what is added to its logit) in [-100, 100], at most MAX_BIASES.
    min_tokens: this many tokens come before an end token or a stop text can end the answer; at most max_tokens. Where
    nothing but an end token can come, it ends all the same.
    stop: texts that end the answer; they are not part of it.
    stop_token_ids: tokens that end the answer, beside the model's own.
    ignore_eos: continue after the model's own end tokens.
    seed: draws depend on (seed, position) alone, so a Replay gives the same tokens.
    grammar: the form of the answer as "KIND:TEXT"; engine/text/grammar.py has the kinds. Empty: any text.
    shown_token_ids: special tokens that have a text in the answer, such as the mark before a tool call.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    grammar: str = ""
    shown_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "over 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            (
                "repetition_penalty",
                math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
                "over 0 (1 is off)",
            ),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"from 0 to max_tokens ({self.max_tokens})"),
            ("stop", all(map(_is_text, self.stop)), "texts of at least one character, and of whole ones"),
            ("ignore_eos", not (self.ignore_eos and self.grammar), "false where the answer's form says where it ends"),
            ("seed", -(2**63) <= self.seed < 2**64, "a 64-bit integer"),
        )
        for name, holds, wanted in checks:
            if not holds:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is out of range; use {wanted}")
        if self.logit_bias:
            self._check_biases()

    def _check_biases(self) -> None:
        if len(self.logit_bias) > MAX_BIASES:
            raise ConfigError(f"logit_bias: {len(self.logit_bias)} tokens; give at most {MAX_BIASES}")
        # Choices of many answers are checked again, each: no loop of Python over a thousand biases.
        tokens, biases = zip(*self.logit_bias, strict=True)
        if min(tokens) < 0 or not all(map(math.isfinite, biases)) or min(biases) < -100 or max(biases) > 100:
            wrong = next((token, bias) for token, bias in self.logit_bias if token < 0 or not -100 <= bias <= 100)
            raise ConfigError(f"logit_bias: {wrong[0]}: {wrong[1]!r} is out of range; use token ids, and -100 to 100")

    @property
    def changes_logits(self) -> bool:
        """Whether a token is chosen from other logits than the model's, its end tokens aside (min_tokens)."""
        return bool(
            self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty or self.logit_bias
        )

    def of_choice(self, choice: int) -> "SamplingParams":
        """Return the params of one of several answers to the same prompt: each draws by a seed of its own."""
        if not choice:
            return self
        key = (self.seed % 2**64).to_bytes(8, "little") + choice.to_bytes(8, "little")
        seed = blake2b(key, digest_size=8, person=b"mdiq choice").digest()
        return replace(self, seed=int.from_bytes(seed, "little"))

    def replaced(self, values: Mapping[str, object], where: str) -> "SamplingParams":
        """Return these params with the values that a JSON object gives under the same names; other names are ignored.

        Raises:
            ConfigError: a value has the wrong type or is out of range; the message begins with ``where``.
        """
        current = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in current.keys() & values.keys():
            try:
                current[name] = _convert(name, values[name], current[name])
            except (TypeError, ValueError, OverflowError) as error:
                raise ConfigError(f"{where}: {name}: {error}") from None
        try:
            return SamplingParams(**current)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


def _is_text(stop: str) -> bool:
    """Return whether a stop text has a character, and no half of a surrogate pair, which JSON can have."""
    return bool(stop) and _HALF.search(stop) is None


def _convert(name: str, value: object, current: object) -> object:
    """Return a JSON value as the type of the current one, without guessing."""
    match current:
        case bool():
            if isinstance(value, bool):
                return value
            raise TypeError(f"{value!r} is not true or false")
        case int():
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            raise TypeError(f"{value!r} is not a whole number")
        case float():
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
            raise TypeError(f"{value!r} is not a number")
        case _ if name == "logit_bias":
            return _biases(value)
        case str():
            if isinstance(value, str):
                return value
            raise TypeError(f"{value!r} is not a text")
        case _:
            items = [value] if isinstance(value, str) else value
            kind = str if name == "stop" else int
            if not isinstance(items, list | tuple) or not all(type(item) is kind for item in items):
                raise TypeError(f"{value!r} is not a list of {'texts' if kind is str else 'token ids'}")
            return tuple(items)


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    """Return biases, from an object {"token id": bias} as OpenAI has it, or a list of [token id, bias]."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, list | tuple) for pair in pairs):
        raise TypeError('it is not an object such as {"1234": -100}')
    if len(pairs) > MAX_BIASES:
        raise ValueError(f"{len(pairs)} tokens; give at most {MAX_BIASES}")
    found: dict[int, float] = {}
    for pair in pairs:
        token, bias = pair if len(pair) == 2 else (None, None)
        if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) <= 10:
            token = int(token)
        if type(token) is not int:
            raise TypeError(f"{str(token)[:20]!r} is not a token id")
        if not isinstance(bias, int | float) or isinstance(bias, bool):
            raise TypeError(f"{token}: {str(bias)[:20]} is not a number")
        found[token] = float(bias)
    return tuple(found.items())


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """One token stream.

    index: the caller's name for it, unique within a Ring.
    prompt: token ids of the prompt, at least one.
    generated: the answer so far; a Sequence may come with tokens of an earlier Ring.
    eos_token_ids: the model's own end tokens.
    owner: whose request it is, and share: what the owner gets beside others; see fair_shares.py.
    deadline: the time on the caller's clock at which it is ended if it has not finished; None: no limit.
    cached_prompt_tokens: tokens of the prompt that were found in the KV cache and not computed.
    logprobs: the log-probabilities that it wants; None: none.
    prompt_logprobs: those of the prompt's tokens from the second one on, as far as they are known. They are history
    like the answer: a Replay adds what is lacking.
    entered_at: when its first Segment was sent; None before that.
    num_rows_sent, num_passes: see exposure.py.
    """

    index: int
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: frozenset[int] = frozenset()
    deadline: float | None = None
    generated: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    cached_prompt_tokens: int = 0
    logprobs: LogprobsWanted | None = None
    prompt_logprobs: Logprobs = field(default_factory=Logprobs)
    owner: str = ""
    share: int = 1
    entered_at: float | None = None
    num_rows_sent: int = 0
    num_passes: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: prompt and answer."""
        return len(self.prompt) + len(self.generated)

    @property
    def max_total_tokens(self) -> int:
        """Tokens that it may grow to, the maximum that the KV cache holds of it."""
        return len(self.prompt) + self.params.max_tokens

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Return the token ids at positions ``start`` to ``stop - 1``."""
        split = len(self.prompt)
        return (*self.prompt[start:stop], *self.generated[max(start - split, 0) : max(stop - split, 0)])

    def wants_rows(self, start: int, stop: int) -> bool:
        """Return whether a token of the prompt is still to be scored with the row of one of these positions."""
        if self.logprobs is None or not self.logprobs.of_prompt:
            return False
        # The row of a position tells how likely the next token is.
        return max(start, len(self.prompt_logprobs)) < min(stop, len(self.prompt) - 1)

    @property
    def barred(self) -> Collection[int]:
        """Tokens that come next only if no other can: those that would end an answer below min_tokens."""
        params = self.params
        if len(self.generated) >= params.min_tokens:
            return ()
        return params.stop_token_ids if params.ignore_eos else {*params.stop_token_ids, *self.eos_token_ids}

    def append(self, token: int, *, stop_matched: bool = False) -> FinishReason | None:
        """Add a generated token and return why the Sequence ends with it, or None when it goes on."""
        self.generated.append(token)
        # A barred token comes where nothing else can, as at the end of what a grammar allows.
        if token in self.params.stop_token_ids or (token in self.eos_token_ids and not self.params.ignore_eos):
            return FinishReason.STOP
        if stop_matched and len(self.generated) > self.params.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.generated) >= self.params.max_tokens else None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step of a Sequence as its caller sees it: a token, its end, or both.

    position: the token's position in the Sequence (the prompt's length for the first generated one).
    logprob: the token's, if the Sequence wants it.
    """

    index: int
    token: int | None
    position: int
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    logprob: TokenLogprob | None = None
