"""Requests of `mdiq run` become Sequences: before a Ring loads where that is cheap, else when their turn comes."""

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.errors import ConfigError
from mdiq.service.journal import Begun
from mdiq.service.text_pipe import TokenizerPipe, go_on

if TYPE_CHECKING:
    from mdiq.engine.model_config import ModelConfig
    from mdiq.engine.text.grammar import Grammars
    from mdiq.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One request: exactly one of ``text``, ``token_ids`` and ``messages`` is set. ``where`` names it in errors.

    template_kwargs: variables of the chat template beside the messages. digest: of the line; it says in a results file
    which request was answered.
    """

    index: int
    where: str
    params: SamplingParams
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    template_kwargs: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    digest: str = ""


class Requests:
    """Makes the Sequences of requests. raw: prompts are used as they are, without the chat template."""

    def __init__(self, tokenizer: "Tokenizer", config: "ModelConfig", *, raw: bool) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._raw = raw
        self._checked: dict[int, Sequence] = {}  # made to be checked before the ring loads; nothing is tokenized twice
        self._pipes: dict[int, TokenizerPipe] = {}  # of Sequences that go on
        self.grammars: Grammars | None = None  # once a request has a grammar

    def check(self, lines: AbstractSequence[PromptLine], *, is_single: bool) -> None:
        """Refuse what can be seen to be wrong before anything runs.

        Raises:
            ConfigError: a request has token ids that the model does not have, no token, or an answer's form that
                cannot be used.
            ContextLengthError: the only one cannot fit the model's context.
        """
        checked = {""}
        for line in lines:
            if line.params.logit_bias:
                self._check_ids(line, [token for token, _ in line.params.logit_bias], "logit_bias: ")
            if line.params.grammar not in checked:
                self._check_form(line)
                checked.add(line.params.grammar)
            if line.token_ids:
                self._check_ids(line, line.token_ids)
            if is_single or not (line.token_ids or line.text or line.messages):
                self._checked[line.index] = self._make(line, self._config.context_tokens)

    def sequence(self, line: PromptLine, room: int) -> Sequence:
        """Return the Sequence of a request; a text that cannot fit ``room`` tokens is refused before it is tokenized.

        Raises:
            ConfigError: see ``check``.
            ContextLengthError: it does not fit.
        """
        return self._checked.pop(line.index, None) or self._make(line, room)

    def resumed(self, line: PromptLine, begun: Begun) -> tuple[Sequence, str]:
        """Return the Sequence of a request that has begun in an earlier run, and the text that it has.

        It has a finish_reason if nothing is left to do.

        Raises:
            ConfigError: the model does not have these tokens.
        """
        self._check_ids(line, (*begun.prompt, *begun.tokens))
        sequence = Sequence(line.index, begun.prompt, begun.params, eos_token_ids=self._tokenizer.eos_token_ids)
        pipe = TokenizerPipe(self._tokenizer, begun.params)
        text = go_on(sequence, pipe, begun.tokens)
        if sequence.finish_reason is None:
            self._pipes[line.index] = pipe
            self._begin_form(sequence)
        return sequence, text

    def _make(self, line: PromptLine, room: int) -> Sequence:
        tokenizer = self._tokenizer
        text = line.text or ""
        if line.token_ids is not None:
            prompt = line.token_ids
        elif line.messages is not None:
            prompt = tuple(tokenizer.chat_ids(line.messages, line.template_kwargs, room=room))
        elif self._raw or not tokenizer.has_chat_template:
            tokenizer.check_fits(text, room)
            prompt = tuple(tokenizer.encode(text))
        else:
            messages = [{"role": "user", "content": text}]
            prompt = tuple(tokenizer.chat_ids(messages, line.template_kwargs, room=room))
        if not prompt:
            raise ConfigError(f"{line.where}: the prompt is empty; give at least one token")
        # A tokenizer may know tokens that the model has no embedding of.
        self._check_ids(line, prompt)
        params = tokenizer.with_special_stops(line.params)
        sequence = Sequence(line.index, prompt, params, eos_token_ids=tokenizer.eos_token_ids)
        self._begin_form(sequence)
        return sequence

    def _check_form(self, line: PromptLine) -> None:
        from mdiq.engine.text.grammar import Grammars  # torch is imported after set_threads

        if self.grammars is None:
            self.grammars = Grammars(self._tokenizer)
        try:
            self.grammars.check(line.params.grammar)
        except ConfigError as error:
            raise ConfigError(f"{line.where}: the answer's form: {error}") from None

    def _begin_form(self, sequence: Sequence) -> None:
        if sequence.params.grammar:
            assert self.grammars is not None  # all are checked
            self.grammars.begin(sequence)

    def pipe(self, sequence: Sequence) -> TokenizerPipe:
        """Return what turns the Sequence's tokens into text."""
        return self._pipes.pop(sequence.index, None) or TokenizerPipe(self._tokenizer, sequence.params)

    def _check_ids(self, line: PromptLine, ids: AbstractSequence[int], field: str = "") -> None:
        if (largest := max(ids)) >= (num := self._config.vocab_size):
            raise ConfigError(f"{line.where}: {field}token id {largest}: the model has {num} tokens only")
