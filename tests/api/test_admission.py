"""Which requests are taken, and when the others should ask again: as values, with the time as a number."""

import pytest

from mdiq.api.admission import MAX_PROMPT_TOKENS, MAX_RETRY_S, RETRY_S, Admission, Places, max_prompts
from mdiq.api.requests import REASONS, ApiError, BadRequest, too_long
from mdiq.api.shapes import Answer


def _taken(admission: Admission, now: float, *max_tokens: int, num_prompt: int = 5) -> tuple[Places, list[Answer]]:
    """Let a request with prompts of these max_tokens in, as if the ring had many places."""
    places = admission.take(len(max_tokens), 1_000, now)
    answers = [Answer(num_prompt, each) for each in max_tokens]
    admission.fill(places, answers, now)
    return places, answers


def _measured(rate_tokens_per_s: int = 10) -> Admission:
    """Return one that has seen an answer of 200 tokens."""
    admission = Admission()
    places, [answer] = _taken(admission, 0.0, 200)
    answer.num_tokens, answer.finish_reason = 200, "length"
    admission.leave(places, 200 / rate_tokens_per_s)
    return admission


def test_places_are_counted_by_prompts_and_given_back() -> None:
    admission = Admission()
    first, second = admission.take(1, 4, 0.0), admission.take(3, 4, 0.0)
    with pytest.raises(ApiError) as refused:
        admission.take(1, 4, 0.0)
    assert (refused.value.status, refused.value.reason) == (429, "busy")
    assert "4 requests are running or waiting" in str(refused.value)
    admission.leave(first, 1.0)
    admission.leave(admission.take(1, 4, 1.0), 2.0)
    admission.leave(second, 3.0)
    assert admission.num_taken == 0


def test_requests_that_only_the_ring_knows_of_count_too() -> None:
    admission = Admission()
    with pytest.raises(ApiError, match="3 requests"):
        admission.check(1, 3, 0.0, num_running=3)
    admission.check(1, 4, 0.0, num_running=3)


def test_more_prompts_than_there_will_ever_be_places_for_are_not_asked_to_come_again() -> None:
    with pytest.raises(BadRequest, match="5 prompts; this ring takes 4 at once") as refused:
        Admission().take(5, 4, 0.0)
    assert (refused.value.status, refused.value.reason) == (400, "invalid")


def test_prompts_are_bounded_by_their_tokens_too_and_the_longest_alone_is_taken() -> None:
    admission = Admission()
    places, _ = _taken(admission, 0.0, 8, num_prompt=MAX_PROMPT_TOKENS + 1)
    other = admission.take(1, 4, 0.0)
    with pytest.raises(ApiError, match=f"requests of {MAX_PROMPT_TOKENS + 1} prompt tokens") as refused:
        admission.fill(other, [Answer(1, 8)], 0.0)
    assert refused.value.reason == "busy"
    admission.leave(places, 1.0)
    admission.fill(other, [Answer(1, 8)], 1.0)


def test_a_refused_client_is_asked_to_come_when_the_others_are_answered() -> None:
    admission = _measured(rate_tokens_per_s=10)
    _taken(admission, 100.0, 50)  # 50 tokens at most
    _, [long] = _taken(admission, 100.0, 4_096)  # 200, as long as the one before
    assert admission.retry_after_s(100.0) == 25
    long.num_tokens = 150
    assert admission.retry_after_s(101.0) == 10
    admission.take(2, 1_000, 101.0)  # their texts are not tokens yet
    assert admission.retry_after_s(101.0) == 50
    with pytest.raises(ApiError, match="ask again in 50 s") as refused:
        admission.take(1, 4, 101.0)
    assert refused.value.retry_after_s == 50


def test_the_time_is_that_of_the_newest_rate_and_neither_nothing_nor_longer_than_clients_wait() -> None:
    assert Admission().retry_after_s(0.0) == RETRY_S
    admission = _measured(rate_tokens_per_s=10)
    assert admission.retry_after_s(100.0) == 1, "nothing is ahead of it"
    _, [answer] = _taken(admission, 100.0, 4_096)
    answer.num_tokens = 40
    assert admission.retry_after_s(120.0) == MAX_RETRY_S == 60, "160 tokens at 2 a second are 80"
    answer.num_tokens = 140
    assert admission.retry_after_s(130.0) == 6, "60 tokens at 10 a second"


def test_neither_idle_hours_nor_a_pause_count_as_a_slow_ring() -> None:
    admission = _measured(rate_tokens_per_s=10)
    _, [answer] = _taken(admission, 50_000.0, 300)
    assert admission.retry_after_s(50_009.0) == 20
    assert admission.retry_after_s(50_040.0) == 20, "nothing came meanwhile: the ring is paused"
    answer.num_tokens = 100
    assert admission.retry_after_s(50_050.0) == 10


def test_answers_that_were_left_say_nothing_of_how_long_answers_are() -> None:
    admission = _measured()
    places, [answer] = _taken(admission, 100.0, 4_096)
    answer.num_tokens = 1
    admission.leave(places, 101.0)
    _taken(admission, 101.0, 4_096)
    assert admission.retry_after_s(101.0) == 20


@pytest.mark.parametrize(
    ("max_live", "max_waiting", "expected"), [(8, None, 72), (64, None, 192), (256, None, 768), (8, 4, 12)]
)
def test_twice_as_many_wait_as_the_ring_takes_in_and_at_least_one_request(
    max_live: int, max_waiting: int | None, expected: int
) -> None:
    assert max_prompts(max_live, max_waiting) == expected


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ApiError(503, "paused"), "unavailable"),
        (ApiError(429, "busy"), "busy"),
        (ApiError(413, "large"), "too_large"),
        (ApiError(408, "slow"), "too_slow"),
        (ApiError(401, "key"), "no_key"),
        (ApiError(404, "model"), "invalid"),
        (too_long("9 tokens", 8), "too_long"),
    ],
)
def test_each_refusal_has_a_reason_that_the_metrics_know(error: ApiError, reason: str) -> None:
    assert error.reason == reason
    assert reason in REASONS
    assert Admission().refused[reason] == 0 and reason in Admission().refused
