"""The interface between the API and the ring that answers."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from mdiq.core.logprobs import LogprobsWanted
from mdiq.core.sequence import SamplingParams
from mdiq.core.sequence import Sequence as TokenSequence
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

    def text_ids(self, text: str, *, has_special: bool) -> Sequence[int]:
        """Return the tokens of a text of any length. Called in a thread.

        has_special: with the BOS or EOS that the model's tokenizer adds.
        """
        ...

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special tokens included. Called in a thread."""
        ...

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        template_kwargs: Mapping[str, str | int | float | bool],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        is_bounded: bool = True,
    ) -> Sequence[int]:
        """Return the tokens of a chat in the model's template, rendered with template_kwargs. Called in a thread.

        tools: as the template lists them to the model. is_bounded: a chat that cannot fit is refused.

        Raises:
            CapacityError: the chat cannot fit; it is not tokenized then.
            MdiqError: the model has no template, or it refuses these messages.
        """
        ...

    def check_grammar(self, grammar: str) -> None:
        """Compile a grammar of SamplingParams. Called in a thread.

        Raises:
            ConfigError: it cannot be used.
        """
        ...

    @property
    def chat_template(self) -> str | None:
        """The source of the model's chat template; it says in which form tools are called."""
        ...

    def special_id(self, text: str) -> int | None:
        """Return the special token of this text; None if it has none, or one with a text in answers."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens. Called in a thread."""
        ...

    def spell(self, token: int) -> tuple[bytes, bool]:
        """Return a token's bytes, and whether they are part of a text; those of a special token are its name."""
        ...

    def answer(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        *,
        logprobs: LogprobsWanted | None = None,
        owner: str = "",
        share: int = 1,
    ) -> AsyncGenerator[StreamEvent, None]:
        """Run a Sequence; closing the iterator cancels it. owner: whose it is; share: see core/fair_shares.py.

        Raises:
            CapacityError: it can never fit.
            RingError: no ring serves now.
        """
        ...

    def resumed(
        self, prompt: tuple[int, ...], params: SamplingParams, tokens: Sequence[int]
    ) -> tuple[TokenSequence, Sequence[StreamEvent]]:
        """Return a Sequence that has these tokens already, and their events, as ``answer`` gives them. In a thread.

        It has a finish_reason if it ends with them.
        """
        ...

    def go_on(self, sequence: TokenSequence, *, owner: str = "", share: int = 1) -> AsyncGenerator[StreamEvent, None]:
        """Run a Sequence of ``resumed``; yield the events after those. See ``answer``."""
        ...

    async def until_takes_requests(self) -> None:
        """Wait until ``takes_requests``."""
        ...

    def status(self) -> Mapping[str, Any]:
        """Return what `mdiq status --json` shows."""
        ...
