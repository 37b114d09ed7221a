"""A chat's next turn computes its new tokens alone, at every Stage, and its answer is that of a Ring without reuse."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from mdiq.core.ring_settings import RingSettings
from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.core.types import PLAIN_WEIGHTS, LayerRange
from mdiq.engine.model.kv_cache import BLOCK_TOKENS
from mdiq.runtime.options import RingOptions
from mdiq.runtime.ring_host import RingHost
from tests.engine.tiny_models import NEAR_TIE, make_model
from tests.runtime.conftest import OpenRing, make_sequence, right_answer

COUNT = 8


@pytest.mark.parametrize(("size", "kind"), [(1, "memory"), (3, "memory"), (3, "sockets")])
async def test_the_next_turn_of_a_chat_begins_where_the_last_one_ended(
    open_ring: OpenRing, size: int, kind: str
) -> None:
    async with open_ring(size, kind) as ring:
        first = make_sequence(0, num_prompt=30)
        await ring.check(first)
        second = Sequence(1, (*first.prompt, *first.generated, 1, 2, 3), SamplingParams(max_tokens=12))
        await ring.check(second)
        assert second.cached_prompt_tokens == 30 + 12 - 1
        assert ring.protocol.prefill == {"prefill_tokens": 30 + 4, "prefix_hits": 1, "prefix_tokens": 41}
        assert [engine.num_forks for engine in ring.engines] == [1] * size
        assert not ring.protocol.counts
        await ring.check_quiet()


@pytest.mark.parametrize("kind", ["memory", "sockets"])
async def test_requests_that_come_together_compute_their_system_prompt_once(open_ring: OpenRing, kind: str) -> None:
    async with open_ring(3, kind) as ring:
        system = make_sequence(0, num_prompt=40).prompt
        sequences = [Sequence(i, (*system, i, i), SamplingParams(max_tokens=5)) for i in range(8)]
        await ring.check(*sequences)
        assert [sequence.cached_prompt_tokens for sequence in sequences] == [0] + [40] * 7
        assert ring.protocol.prefill["prefill_tokens"] == 40 + 8 * 2
        assert not ring.protocol.counts
        await ring.check_quiet()


async def test_a_parent_that_is_cancelled_costs_those_behind_it_no_token(open_ring: OpenRing) -> None:
    async with open_ring(3) as ring:
        system = make_sequence(0, num_prompt=40).prompt
        doomed, *others = (Sequence(i, (*system, i, i), SamplingParams(max_tokens=5)) for i in range(4))
        running = [asyncio.create_task(ring.stream(sequence)) for sequence in (doomed, *others)]
        for _ in range(4):
            await ring.protocol.submitted.get()
        ring.starter.cancel(0)
        assert (await asyncio.gather(*running))[1:] == [right_answer(sequence) for sequence in others]
        await ring.check_quiet()


async def test_the_second_turn_of_a_chat_of_a_thousand_tokens_prefills_its_new_tokens_alone(tmp_path: Path) -> None:
    model = make_model("llama-long")
    model.save_pretrained(tmp_path)
    history = [i * i * 31 % 97 for i in range(1000)]
    answers: dict[int | None, list[list[int]]] = {}
    for prefix_tokens in (None, 0):
        options = RingOptions(
            tmp_path,
            (LayerRange(0, 2), LayerRange(2, 4)),
            weights=PLAIN_WEIGHTS,
            in_process=True,
            kv_tokens=2048,
            ring=RingSettings(prefix_tokens=prefix_tokens),
        )
        async with RingHost(options) as ring:
            prompt, answers[prefix_tokens] = tuple(history), []
            for turn in range(2):
                sequence = Sequence(turn, prompt, SamplingParams(max_tokens=COUNT))
                async for _ in ring.stream(sequence):
                    pass
                answers[prefix_tokens].append(sequence.generated)
                prompt = (*prompt, *sequence.generated, 5, 6, 7)
            shared = (1000 + COUNT - 1) // BLOCK_TOKENS * BLOCK_TOKENS if prefix_tokens is None else 0
            assert sequence.cached_prompt_tokens == shared
            assert ring.service.ring.prefill["prefill_tokens"] == 1000 + (1000 + COUNT + 3 - shared)
    for turns in answers.values():
        _check(model, history, turns[0])
        _check(model, [*history, *turns[0], 5, 6, 7], turns[1])


async def test_choices_of_one_prompt_compute_it_once_and_are_what_each_would_be_alone(tmp_path: Path) -> None:
    make_model("llama-long").save_pretrained(tmp_path)
    prompt = tuple(i * i * 31 % 97 for i in range(3 * BLOCK_TOKENS + 5))
    params = SamplingParams(max_tokens=COUNT, temperature=1.0, seed=3, presence_penalty=1.0, min_tokens=2)
    options = RingOptions(
        tmp_path,
        (LayerRange(0, 2), LayerRange(2, 4)),
        weights=PLAIN_WEIGHTS,
        in_process=True,
        kv_tokens=2048,
    )

    async def answer(ring: RingHost, index: int, choice: int) -> Sequence:
        sequence = Sequence(index, prompt, params.of_choice(choice))
        async for _ in ring.stream(sequence):
            pass
        return sequence

    async with RingHost(options) as ring:
        choices = await asyncio.gather(*(answer(ring, i, i) for i in range(8)))
        assert [choice.cached_prompt_tokens for choice in choices] == [0] + [3 * BLOCK_TOKENS] * 7
        assert ring.service.ring.prefill["prefill_tokens"] == len(prompt) + 7 * 5
    async with RingHost(replace(options, ring=RingSettings(prefix_tokens=0))) as ring:
        alone = [await answer(ring, i, i) for i in range(8)]
    assert [choice.generated for choice in choices] == [one.generated for one in alone]
    assert len({tuple(choice.generated) for choice in choices}) > 4, "they differ"


def _check(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> None:
    """See that every token is the reference's choice, or as good as."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].float()
    gaps = logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert gaps.max() < NEAR_TIE
    assert len(set(answer)) > 2, "it tests too little"
