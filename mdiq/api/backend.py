"""The interface between the API and the ring that answers."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from mdiq.core.logprobs import LogprobsWanted
from mdiq.core.sequence import SamplingParams
from mdiq.runtime.starter_service import StreamEvent


class Backend(Protocol):
    """A ring and its tokenizer.

    model_name: its name for clients. vocab_size: token ids are below it. context_tokens: maximum tokens of prompt and
    answer together.
    """

    model_name: str
    vocab_size: int

    @property
    def context_tokens(self) -> int: ...

    @property
    def takes_requests(self) -> bool:
        """Whether requests are taken: also in a pause, after which they are answered."""
        ...

    @property
    def is_serving(self) -> bool:
        """Whether requests are accepted."""
        ...

    @property
    def state(self) -> str:
        """In words; if it does not serve, what it waits for."""
        ...

    @property
    def num_running(self) -> int:
        """Requests that are not finished."""
        ...

    @property
    def max_requests(self) -> int:
        """Prompts that are taken at once: those in the ring, and those that wait for it."""
        ...

    def encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """Return the tokens of each text, without a chat template. Called in a thread.

        Raises:
            CapacityError: one of them cannot fit; none is tokenized then.
        """
        ...

    def chat_ids(
        self, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, str | int | float | bool]
    ) -> Sequence[int]:
        """Return the tokens of a chat in the model's template, rendered with template_kwargs. Called in a thread.

        Raises:
            CapacityError: the chat cannot fit; it is not tokenized then.
            MdiqError: the model has no template, or it refuses these messages.
        """
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens. Called in a thread."""
        ...

    def spell(self, token: int) -> tuple[bytes, bool]:
        """Return a token's bytes, and whether they are part of a text; those of a special token are its name."""
        ...

    def answer(
        self, prompt: tuple[int, ...], params: SamplingParams, *, logprobs: LogprobsWanted | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        """Run a Sequence; closing the iterator cancels it.

        Raises:
            CapacityError: it can never fit.
            RingError: no ring serves now.
        """
        ...

    def status(self) -> Mapping[str, Any]:
        """Return what `mdiq status --json` shows."""
        ...
