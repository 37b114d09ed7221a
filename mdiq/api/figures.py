"""Histograms and counters of answers, observed as their events pass."""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Histogram

from mdiq.api.clients import Client
from mdiq.runtime.starter_service import StreamEvent

_WAITS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_LAPS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 60.0)
_TOKENS = tuple(float(1 << i) for i in range(18))


class Figures:
    """The distributions of what users notice, for Prometheus. Times are those at which tokens came, read or not."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, registry=registry)

        self._first_s = histogram("mdiq_time_to_first_token_seconds", "From a request to its first token.", _WAITS_S)
        self._between_s = histogram("mdiq_time_between_tokens_seconds", "Between two tokens of an answer.", _LAPS_S)
        self._queue_s = histogram("mdiq_queue_seconds", "How long requests waited for the ring.", _WAITS_S)
        self._whole_s = histogram("mdiq_request_seconds", "From a request to its last token.", _WAITS_S)
        self._prompt = histogram("mdiq_request_prompt_tokens", "Lengths of prompts.", _TOKENS)
        self._answer = histogram("mdiq_request_answer_tokens", "Lengths of complete answers.", _TOKENS)
        self._num_prompt = counter("mdiq_prompt_tokens_total", "Tokens of prompts that were taken.")
        self._num_answer = counter("mdiq_answer_tokens_total", "Tokens of answers.")

    def took(self, num_prompt: int) -> None:
        """Count a prompt by its tokens; 0 for one that was counted."""
        if num_prompt:
            self._prompt.observe(num_prompt)
            self._num_prompt.inc(num_prompt)

    async def watched(
        self,
        events: AsyncGenerator[StreamEvent, None],
        num_prompt: int,
        asked_s: float,
        client: Client,
        *,
        num_before: int = 0,
    ) -> AsyncGenerator[StreamEvent, None]:
        """Yield the events of an answer and count them, for its client too. asked_s: when the request came.

        num_prompt: 0 for further answers to a prompt that was counted. num_before: tokens that it has from an earlier
        ring, so its first one has come.
        """
        begun_s = self._clock()
        token_s: float | None = None
        num_answer = num_before
        self.took(num_prompt)
        async with aclosing(events):
            async for event in events:
                step = event.step
                if step.token is not None:
                    if not num_answer:
                        self._first_s.observe(event.at_s - asked_s)
                        if event.entered_s is not None:
                            self._queue_s.observe(event.entered_s - begun_s)
                    elif token_s is not None:
                        self._between_s.observe(event.at_s - token_s)
                    token_s = event.at_s
                    num_answer += 1
                    self._num_answer.inc()
                    client.got(1, self._clock())
                if step.finish_reason is not None and step.error is None:
                    self._whole_s.observe(event.at_s - asked_s)
                    self._answer.observe(num_answer)
                yield event
