"""Against rings inside this process: no sockets, real tokens."""

import asyncio
from pathlib import Path

import pytest

from mdiq.bench.workload import Load
from mdiq.core.ring_settings import RingSettings
from mdiq.core.types import LayerRange, WeightSettings
from mdiq.report.measure import Meter
from mdiq.runtime.options import RingOptions
from mdiq.runtime.ring_host import RingHost
from tests.engine.tiny_models import make_model, reference_tokens

VOCAB_SIZE = 97


def options(model: Path) -> RingOptions:
    return RingOptions(
        model,
        (LayerRange(0, 1), LayerRange(1, 4)),
        weights=WeightSettings("plain"),
        in_process=True,
        kv_tokens=256,
        ring=RingSettings(prefix_tokens=0),
    )


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2"])
def test_without_a_kv_cache_the_tokens_are_those_of_transformers_and_of_the_ring_with_one(
    name: str, tmp_path: Path
) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path)
    prompt = [3, 14, 15, 92, 65]
    expected, _ = reference_tokens(model, prompt, 12)
    assert len(set(expected)) > 2, "it tests too little"

    async def both() -> list[tuple[int, ...]]:
        async with RingHost(options(tmp_path)) as ring:
            meter = Meter(ring, VOCAB_SIZE, 0.0)
            users = [await meter.generate(prompt, 12, has_kv_cache=has) for has in (True, False)]
            assert ring.service.ring.num_unfinished == 0
            return [user.answer for user in users]

    assert asyncio.run(both()) == [tuple(expected)] * 2


def test_each_token_without_a_kv_cache_is_a_request_of_all_that_came_before(tmp_path: Path) -> None:
    make_model("llama-gqa-tied").save_pretrained(tmp_path)

    async def tokens_computed(*, has_kv_cache: bool) -> tuple[int, int]:
        async with RingHost(options(tmp_path)) as ring:
            meter = Meter(ring, VOCAB_SIZE, 0.0)
            before = ring.figures()[0].work
            await meter.generate([5] * 10, 4, has_kv_cache=has_kv_cache)
            after = ring.figures()[0].work
            return (
                after.prompt_tokens - before.prompt_tokens,
                after.decode_segments - before.decode_segments,
            )

    assert asyncio.run(tokens_computed(has_kv_cache=True)) == (10, 3)
    assert asyncio.run(tokens_computed(has_kv_cache=False)) == (10 + 11 + 12 + 13, 0)


def test_a_load_gives_the_answers_of_all_users(tmp_path: Path) -> None:
    model = make_model("llama-gqa-tied")
    model.save_pretrained(tmp_path)

    async def answers() -> tuple[tuple[int, ...], ...]:
        async with RingHost(options(tmp_path)) as ring:
            meter = Meter(ring, VOCAB_SIZE, 0.0)
            await meter.warm_up(2, 6, 0)
            run = await meter.load(Load(2, 6, 5))
            assert (run.users, run.prompt_tokens, run.answer_tokens) == (2, 6, 5)
            assert run.seconds > 0
            return run.answers

    expected = [reference_tokens(model, list(prompt), 5)[0] for prompt in Load(2, 6, 5).prompts(VOCAB_SIZE)]
    assert asyncio.run(answers()) == tuple(map(tuple, expected))
