"""What the API sees of a service: the ring that is up, and the tokenizer."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from mdiq.api.admission import max_prompts
from mdiq.core.logprobs import LogprobsWanted
from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.engine.model_config import ModelConfig
from mdiq.engine.text.grammar import Grammars
from mdiq.engine.text.tokenizer import Tokenizer
from mdiq.plan.drift import Factors
from mdiq.runtime.ring_keeper import RingKeeper
from mdiq.runtime.starter_service import StreamEvent
from mdiq.service.replanning import with_load
from mdiq.service.text_pipe import TokenizerPipe, steps


class RingBackend:
    """See api.backend.Backend."""

    def __init__(
        self,
        keeper: RingKeeper,
        tokenizer: Tokenizer,
        grammars: Grammars,
        config: ModelConfig,
        model_name: str,
        max_waiting: int | None,
        under_load: Callable[[], Factors],
        same_tokens: Callable[[], str | None],
    ) -> None:
        self._keeper = keeper
        self._under_load = under_load
        self._same_tokens = same_tokens
        self._max_waiting = max_waiting
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._numbers = count()
        self._pipes: WeakKeyDictionary[Sequence, TokenizerPipe] = WeakKeyDictionary()  # of those that go on
        self._changed = asyncio.Event()
        self.model_name = model_name
        # A tokenizer may know tokens that the model has no embedding of.
        self.vocab_size = config.vocab_size
        self._model_tokens = config.context_tokens

    @property
    def context_tokens(self) -> int:
        return self._keeper.context_tokens or self._model_tokens

    @property
    def takes_requests(self) -> bool:
        return self._keeper.takes_requests

    @property
    def is_serving(self) -> bool:
        return self._keeper.state.is_serving

    @property
    def state(self) -> str:
        return self._keeper.describe()

    @property
    def num_running(self) -> int:
        return self._keeper.num_running

    @property
    def max_requests(self) -> int:
        return max_prompts(self._keeper.max_live, self._max_waiting)

    def encode(self, texts: AbstractSequence[str]) -> list[list[int]]:
        for text in texts:
            self._tokenizer.check_fits(text, self.context_tokens)
        return [self._tokenizer.encode(text) for text in texts]

    def text_ids(self, text: str, *, has_special: bool) -> list[int]:
        return self._tokenizer.encode(text, has_special=has_special)

    def text_of(self, tokens: AbstractSequence[int]) -> str:
        return self._tokenizer.decode(tokens, has_special=True)

    def chat_ids(
        self,
        messages: AbstractSequence[Mapping[str, Any]],
        template_kwargs: Mapping[str, str | int | float | bool],
        tools: AbstractSequence[Mapping[str, Any]] = (),
        *,
        is_bounded: bool = True,
    ) -> list[int]:
        room = self.context_tokens if is_bounded else None
        return self._tokenizer.chat_ids(messages, template_kwargs, tools=tools, room=room)

    def check_grammar(self, grammar: str) -> None:
        self._grammars.check(grammar)

    @property
    def chat_template(self) -> str | None:
        return self._tokenizer.chat_template

    def special_id(self, text: str) -> int | None:
        return self._tokenizer.special_id(text)

    def decode(self, tokens: AbstractSequence[int]) -> str:
        return self._tokenizer.decode(tokens)

    def spell(self, token: int) -> tuple[bytes, bool]:
        return self._tokenizer.spell(token)

    def answer(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        *,
        logprobs: LogprobsWanted | None = None,
        owner: str = "",
        share: int = 1,
    ) -> AsyncGenerator[StreamEvent, None]:
        params, eos = self._tokenizer.with_special_stops(params), self._tokenizer.eos_token_ids
        sequence = Sequence(next(self._numbers), prompt, params, eos_token_ids=eos, owner=owner, share=share)
        sequence.logprobs = logprobs
        return self._keeper.stream(sequence)

    def resumed(
        self, prompt: tuple[int, ...], params: SamplingParams, tokens: AbstractSequence[int]
    ) -> tuple[Sequence, list[StreamEvent]]:
        params, eos = self._tokenizer.with_special_stops(params), self._tokenizer.eos_token_ids
        sequence = Sequence(next(self._numbers), prompt, params, eos_token_ids=eos)
        pipe = TokenizerPipe(self._tokenizer, params)
        now = time.monotonic()
        events = [
            StreamEvent(step, text, now, stop_text=pipe.stop_text) for step, text in steps(sequence, pipe, tokens)
        ]
        if params.grammar and sequence.finish_reason is None:
            self._grammars.begin(sequence)
        self._pipes[sequence] = pipe
        return sequence, events

    def go_on(self, sequence: Sequence, *, owner: str = "", share: int = 1) -> AsyncGenerator[StreamEvent, None]:
        sequence.owner, sequence.share = owner, share
        return self._keeper.stream(sequence)

    def pipe(self, sequence: Sequence) -> TokenizerPipe:
        """Return what turns a Sequence's tokens into text."""
        return self._pipes.pop(sequence, None) or TokenizerPipe(self._tokenizer, sequence.params)

    async def until_takes_requests(self) -> None:
        while not self.takes_requests:
            await self._changed.wait()

    def note_state(self) -> None:
        """Wake who waits for the ring: its state is another one."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def status(self) -> Mapping[str, Any]:
        serves = {"model": self.model_name, "context_tokens": self.context_tokens, "max_requests": self.max_requests}
        status = with_load(self._keeper.status(), self._under_load())
        return status | {"serves": {**serves, "same_tokens": self._same_tokens()}}
