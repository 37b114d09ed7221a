"""Grammars: which tokens an answer may go on with, so that it has the form that its request asks for.

`llguidance` compiles a grammar and follows the tokens of an answer. A Sequence's state follows from its tokens alone:
after a Replay, or in another process, it is made again from them.

A grammar is a text "KIND:TEXT". The kinds: json_schema (a JSON object), choice (a JSON list of texts), regex, gbnf
(llama.cpp's grammars; Lark is accepted too), lark (llguidance's own, for the forms of tool calls).
"""

import threading
from collections import OrderedDict
from contextlib import suppress
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from mdiq.core.sequence import Sequence
from mdiq.engine.text.grammar_trial import Trial, compiled, line_of
from mdiq.engine.text.tokenizer import Tokenizer
from mdiq.errors import ConfigError, EngineError

MAX_KEPT = 512  # compiled grammars; most clients send the same few
MAX_KEPT_CHARACTERS = 1 << 19
"""Of all of them: what one takes grows with its length, 150 bytes and more for a character."""
_TRIAL = Trial()


class Grammars:
    """The grammars of one tokenizer; those that were compiled last are kept. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._followed: WeakKeyDictionary[Sequence, _Followed] = WeakKeyDictionary()

    def prepare(self) -> None:
        """Build what all grammars of this tokenizer need.

        llguidance keeps the interpreter's lock for it, half a second for 150,000 tokens: call this before anyone waits.

        Raises:
            ConfigError: the model has no end token, so no form can end.
        """
        with self._lock:
            if self._tokens is None:
                self._tokens = _ll_tokenizer(self._tokenizer)

    def check(self, grammar: str) -> None:
        """Compile a grammar, unless it is there. Takes long, without the interpreter's lock: call it in a thread.

        Raises:
            ConfigError: it is not a grammar, or is too large.
            CostlyFormError: it takes too much time, memory or stack; see grammar_trial.py.
            EngineError: that cannot be tried.
        """
        self.prepare()
        with self._lock:
            is_known = grammar in self._compiled
        if not is_known:
            _TRIAL.check(grammar)
        self._matcher(grammar)

    def begin(self, sequence: Sequence) -> None:
        """Make the state of a Sequence with a grammar, at the end of the tokens that it has.

        Raises:
            ConfigError: see ``check``.
        """
        self._followed[sequence] = followed = _Followed(self._matcher(sequence.params.grammar))
        followed.go_on(sequence.generated)

    def form(self, sequence: Sequence, num_tokens: int) -> "Form":
        """Return what may come next in a Sequence with a grammar, of the token ids below num_tokens.

        It holds until the Sequence has its next token.

        Raises:
            EngineError: the grammar cannot be compiled.
        """
        followed = self._followed.get(sequence)
        if followed is None:
            try:
                self.begin(sequence)
            except ConfigError as error:  # it was compiled when it was asked for
                raise EngineError(f"the answer's form: {error}") from None
            followed = self._followed[sequence]
        followed.go_on(sequence.generated)
        return Form(followed.matcher, num_tokens, num_known=self._tokenizer.vocab_size)

    def _matcher(self, grammar: str) -> LLMatcher:
        """Return a matcher at the beginning of a grammar, for one Sequence."""
        self.prepare()
        with self._lock:
            if (known := self._compiled.get(grammar)) is not None:
                self._compiled.move_to_end(grammar)
                return known.deep_copy()
        assert self._tokens is not None  # it is prepared
        new = compiled(self._tokens, grammar)
        with self._lock:
            self._compiled[grammar] = new
            while len(self._compiled) > MAX_KEPT or (
                len(self._compiled) > 1 and sum(map(len, self._compiled)) > MAX_KEPT_CHARACTERS
            ):
                self._compiled.popitem(last=False)
        return new.deep_copy()


class _Followed:
    """A matcher, and how many tokens of its Sequence it has taken."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self._num_taken = 0

    def go_on(self, tokens: list[int]) -> None:
        self.matcher.consume_tokens(tokens[self._num_taken :])
        self._num_taken = len(tokens)


class Form:
    """What may come next at one place of an answer; see sampler.Form.

    num_tokens: ids of the model. num_known: those of its tokenizer, which may be fewer.
    """

    def __init__(self, matcher: LLMatcher, num_tokens: int, *, num_known: int) -> None:
        self._matcher = matcher
        self._num_tokens, self._num_known = num_tokens, num_known

    def takes(self, token: int) -> bool:
        """Return whether it is known that this token may come; of some end tokens only ``allowed`` knows it."""
        # One that has left its form, or is at its end, would take an end token for ever.
        if token >= self._num_known or self._matcher.is_stopped():
            return False
        # Where only one text can follow, the mask holds the first token that the tokenizer makes of it, and no other.
        forced = self._matcher.compute_ff_tokens()
        return token == forced[0] if forced else self._matcher.validate_tokens([token]) == 1

    def allowed(self) -> np.ndarray:
        """Return which tokens may come: [num_tokens], bool.

        Raises:
            EngineError: the grammar is too complex to go on from here, or the Sequence has left it.
        """
        num_tokens = self._num_tokens
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise EngineError(f"the answer's form: {line_of(self._matcher.get_error())}; ask for a simpler form")
        allowed = np.zeros(num_tokens, bool)
        known = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little", count=num_tokens)
        allowed[: len(known)] = known
        return allowed


def _ll_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    ends = sorted(tokenizer.eos_token_ids)
    if not ends:
        raise ConfigError("the model has no end token, so the form of an answer cannot end it; leave it out")
    return LLTokenizer(TokenizerWrapper(_Texts(tokenizer, ends)), n_vocab=tokenizer.vocab_size, eos_token=ends)


class _Texts:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer, ends: list[int]) -> None:
        self.tokens = tokenizer.token_bytes()
        self._special = {*tokenizer.special_ids, *ends}
        self.special_token_ids = sorted(self._special)
        self.eos_token_id = ends[0]
        self.bos_token_id = None
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        with suppress(UnicodeDecodeError):
            ids = self._tokenizer.plain_ids(text.decode())
            is_plain = not self._special & {*ids} and max(ids, default=0) < len(self.tokens)
            if is_plain and b"".join(self.tokens[token] for token in ids) == text:
                return ids
        return self._greedy(text)  # it is not a whole text, or the tokenizer makes something else of it

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {text: token for token, text in enumerate(self.tokens) if text and token not in self._special}

    @cached_property
    def _max_bytes(self) -> int:
        return max(map(len, self._ids), default=0)

    def _greedy(self, text: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(text):
            lengths = range(min(len(text) - at, self._max_bytes), 0, -1)
            size = next((n for n in lengths if text[at : at + n] in self._ids), 0)
            if not size:
                break
            ids.append(self._ids[text[at : at + size]])
            at += size
        return ids
