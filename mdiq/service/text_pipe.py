"""Tokens of a Sequence become the text that its caller sees."""

from typing import TYPE_CHECKING

from mdiq.core.stop_text import StopText

if TYPE_CHECKING:  # torch is imported after set_threads
    from mdiq.engine.text.tokenizer import Tokenizer


class TokenizerPipe:
    """Tokens of one Sequence to text: whole characters only, and nothing of a stop text."""

    def __init__(self, tokenizer: "Tokenizer", stops: tuple[str, ...]) -> None:
        self._stream = tokenizer.stream()
        self._stop_text = StopText(stops)

    @property
    def stop_matched(self) -> bool:
        return self._stop_text.matched

    def push(self, token: int) -> str:
        return self._stop_text.push(self._stream.push(token))

    def finish(self) -> str:
        # Half a character at the end of a limited answer is not shown: its other half is not there.
        return self._stop_text.push(self._stream.finish(drops_half=True)) + self._stop_text.finish()
