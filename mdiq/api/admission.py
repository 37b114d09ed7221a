"""Which requests are taken, and when a client that was refused should ask again. Pure: time is an argument.

A request has a place for each of its prompts from the moment that it has been read until it is answered. Some of these
prompts are in the ring, the others wait. The rate of the ring is measured over all answers while there are any.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from mdiq.api.requests import MAX_PROMPTS, REASONS, ApiError, too_many
from mdiq.api.shapes import Answer

MAX_PROMPT_TOKENS = 1 << 22
"""Of all requests together: some 150 MB."""
RETRY_S = 5
"""While the rate is not known."""
MAX_RETRY_S = 60
"""OpenAI's clients do not follow a longer one."""
WINDOW_S = 10.0
OPEN_PART = 0.75
"""Of the places. The rest is for owners that hold fewer than their own part, so that none fills the queue alone."""
_GAIN = 1 / 8  # of a new answer's length in the mean


@dataclass(slots=True, eq=False)
class Places:
    """The places of one request. answers: one for each prompt; none before its texts have become tokens.

    owner: see ApiKey.owner.
    """

    num_prompts: int
    owner: str = ""
    answers: Sequence[Answer] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of its answers so far."""
        return sum(answer.num_tokens for answer in self.answers)

    def num_to_come(self, mean_tokens: float) -> float:
        """Return the tokens that are still to come if its answers are as long as others were."""
        if not self.answers:
            return self.num_prompts * mean_tokens
        return sum(max(min(mean_tokens, each.max_tokens) - each.num_tokens, 0.0) for each in self.answers)


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks. owner: see ApiKey.owner. part: what of the places is its own."""

    owner: str = ""
    part: float = 1.0


_ANYONE = Asker()


class Admission:
    """The requests that have a place, and counts of the others.

    refused: requests by the reason of their refusal, see ApiError.reason. num_cut_off: answers that were not read.
    """

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self.num_cut_off = 0
        self._taken: dict[Places, None] = {}
        self._mean_tokens = 0.0  # of an answer; 0 before the first
        self._rate_tokens_per_s = 0.0
        self._num_ended_tokens = 0
        self._window = (0.0, 0)  # when it began, and the tokens until then

    @property
    def num_taken(self) -> int:
        """Prompts that have a place."""
        return sum(places.num_prompts for places in self._taken)

    def check(
        self,
        num_prompts: int,
        max_prompts: int,
        now: float,
        *,
        num_running: int = 0,
        asker: Asker = _ANYONE,
        num_choices: int = 1,
    ) -> None:
        """Refuse a request if there is no place for its prompts. num_running: those that the ring knows of.

        num_choices: see too_many.

        Raises:
            BadRequest: there can never be one.
            ApiError: there is none now.
        """
        if num_prompts > max_prompts:
            raise too_many(num_prompts, num_choices, max_prompts, f"this ring takes {max_prompts} at once")
        num_taken = max(self.num_taken, num_running)
        num_wanted = num_taken + num_prompts
        if num_wanted > max_prompts:
            raise self._busy(f"{num_taken} requests are running or waiting", now)
        num_held = sum(places.num_prompts for places in self._taken if places.owner == asker.owner)
        is_over = num_held and num_held + num_prompts > asker.part * max_prompts
        if asker.part < 1 and num_wanted > OPEN_PART * max_prompts and is_over:
            raise self._busy(f"{num_held} requests of this key are running or waiting", now)

    def take(
        self,
        num_prompts: int,
        max_prompts: int,
        now: float,
        *,
        num_running: int = 0,
        asker: Asker = _ANYONE,
        num_choices: int = 1,
    ) -> Places:
        """Give a request its places, or refuse it as ``check`` does."""
        self.check(num_prompts, max_prompts, now, num_running=num_running, asker=asker, num_choices=num_choices)
        return self.take_again(num_prompts, now, owner=asker.owner)

    def take_again(self, num_prompts: int, now: float, *, owner: str) -> Places:
        """Give a request that an earlier process has taken its places again."""
        self._measure(now)
        places = Places(num_prompts, owner)
        self._taken[places] = None
        return places

    def fill(self, places: Places, answers: Sequence[Answer], now: float) -> None:
        """Note the answers of a request: the lengths of its prompts are known by now.

        Raises:
            ApiError: all prompts together are too long to be kept.
        """
        waiting = sum(each.num_prompt for other in self._taken for each in other.answers)
        if waiting and waiting + sum(answer.num_prompt for answer in answers) > MAX_PROMPT_TOKENS:
            raise self._busy(f"requests of {waiting} prompt tokens are running or waiting", now)
        places.answers = answers

    def leave(self, places: Places, now: float) -> None:
        """Take the places of a request back: it is answered, or is not any more."""
        for answer in places.answers:
            if answer.finish_reason:
                gain = _GAIN if self._mean_tokens else 1.0
                self._mean_tokens += gain * (answer.num_tokens - self._mean_tokens)
        self._measure(now)
        self._num_ended_tokens += places.num_tokens
        del self._taken[places]

    def retry_after_s(self, now: float) -> int:
        """Return in how many seconds the ring will have answered the requests that have a place."""
        self._measure(now)
        if not (self._rate_tokens_per_s and self._mean_tokens):
            return RETRY_S
        num_to_come = sum(places.num_to_come(self._mean_tokens) for places in self._taken)
        return max(min(ceil(num_to_come / self._rate_tokens_per_s), MAX_RETRY_S), 1)

    def counts(self) -> dict[str, object]:
        """Return what the status shows of them."""
        return {"refused": dict(self.refused), "cut_off": self.num_cut_off}

    def _busy(self, what: str, now: float) -> ApiError:
        retry_s = self.retry_after_s(now)
        return ApiError(429, f"{what}; ask again in {retry_s} s", retry_after_s=retry_s)

    def _measure(self, now: float) -> None:
        """Measure the rate over windows in which there was always a request."""
        since_s, num_before = self._window
        num_tokens = self._num_ended_tokens + sum(places.num_tokens for places in self._taken)
        if not self._taken:
            self._window = now, num_tokens
        elif now - since_s >= WINDOW_S:
            self._window = now, num_tokens
            if num_tokens > num_before:  # else the ring is paused, or long prompts come first
                self._rate_tokens_per_s = (num_tokens - num_before) / (now - since_s)


def max_prompts(max_live: int, max_waiting: int | None) -> int:
    """Return how many prompts have a place: those in the ring, and those that wait for it.

    max_waiting: None lets twice as many wait as the ring takes in, and at least those of one request.
    """
    return max_live + (max(2 * max_live, MAX_PROMPTS) if max_waiting is None else max_waiting)
