"""Tokens of a Sequence become the text that its caller sees."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mdiq.core.sequence import SamplingParams, Sequence, TokenEvent
from mdiq.core.stop_text import StopText
from mdiq.runtime.text_pipe import text_of

if TYPE_CHECKING:  # torch is imported after set_threads
    from mdiq.engine.text.tokenizer import Tokenizer


class TokenizerPipe:
    """Tokens of one Sequence to text: whole characters only, and nothing of a stop text.

    A stop text that is complete with one of the first min_tokens tokens is text like any other.
    """

    def __init__(self, tokenizer: "Tokenizer", params: SamplingParams) -> None:
        self._stream = tokenizer.stream()
        self._stop_text = StopText(params.stop)
        self._num_barred = params.min_tokens
        self._shown = {token: tokenizer.text_of_special(token) for token in params.shown_token_ids}

    @property
    def stop_matched(self) -> bool:
        return self._stop_text.matched

    @property
    def stop_text(self) -> str | None:
        return self._stop_text.found

    def push(self, token: int) -> str:
        self._stop_text.may_end = self._num_barred == 0
        self._num_barred = max(self._num_barred - 1, 0)
        if (shown := self._shown.get(token)) is not None:
            return self._stop_text.push(self._stream.finish() + shown)
        return self._stop_text.push(self._stream.push(token))

    def finish(self) -> str:
        # Half a character at the end of a limited answer is not shown: its other half is not there.
        return self._stop_text.push(self._stream.finish(drops_half=True)) + self._stop_text.finish()


def steps(sequence: Sequence, pipe: TokenizerPipe, tokens: Iterable[int]) -> Iterator[tuple[TokenEvent, str]]:
    """Bring a Sequence and its pipe to where these tokens of an earlier ring lead; yield each step and its text.

    The Sequence has a finish_reason afterwards if it ends with them.
    """
    for token in tokens:
        text, position = text_of(pipe, sequence, token), sequence.num_tokens
        sequence.finish_reason = reason = sequence.append(token, stop_matched=pipe.stop_matched)
        if reason is not None:
            text += pipe.finish()
        yield TokenEvent(sequence.index, token, position, reason), text
        if reason is not None:
            return


def go_on(sequence: Sequence, pipe: TokenizerPipe, tokens: Iterable[int]) -> str:
    """Take these tokens as ``steps`` does; return their text."""
    return "".join(text for _, text in steps(sequence, pipe, tokens))
