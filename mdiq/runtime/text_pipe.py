"""What turns tokens into text, as a Ring knows it: service/text_pipe.py has one that does."""

from typing import Protocol

from mdiq.core.sequence import Sequence


class TextPipe(Protocol):
    """Turns the tokens of one Sequence into text that can be shown."""

    @property
    def stop_matched(self) -> bool:
        """Whether a stop text has appeared."""
        ...

    @property
    def stop_text(self) -> str | None:
        """The stop text that has appeared."""
        ...

    def push(self, token: int) -> str:
        """Return the text that the token completes."""
        ...

    def finish(self) -> str:
        """Return what was held back."""
        ...


def text_of(pipe: TextPipe, sequence: Sequence, token: int) -> str:
    """Return the text that a token adds to an answer; the model's own end token has none."""
    is_end_token = token in sequence.eos_token_ids and not sequence.params.ignore_eos
    return "" if is_end_token else pipe.push(token)


class NoText:
    """The pipe of callers that want token ids only."""

    stop_matched = False
    stop_text: str | None = None

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""
