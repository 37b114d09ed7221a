"""Log-probabilities against torch's own, and a whole ring's against transformers on the same weights."""

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from mdiq.core.frame import TokenIds
from mdiq.core.logprobs import LogprobsWanted, TokenLogprob
from mdiq.core.ring_settings import RingSettings
from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.core.types import PLAIN_WEIGHTS, LayerRange
from mdiq.engine.model.logprobs import MIN_LOGPROB, token_logprobs
from mdiq.errors import EngineError
from mdiq.runtime.options import RingOptions
from mdiq.runtime.ring_host import RingHost
from mdiq.runtime.starter_stage import TorchStarter
from tests.engine.tiny_models import make_model

VOCAB = 1_000


def test_values_are_those_of_log_softmax_and_the_likeliest_come_first() -> None:
    torch.manual_seed(1)
    logits = torch.randn(3, VOCAB) * 5
    right = torch.log_softmax(logits, -1)
    tokens, top = [5, 7, int(right[2].argmax())], [0, 20, 1]
    found = token_logprobs(logits, tokens, top)
    for row, token, count, value in zip(right, tokens, top, found, strict=True):
        assert value.token == token and value.logprob == float(row[token])
        likeliest = row.sort(descending=True, stable=True)
        assert value.top == tuple(
            (int(i), float(x)) for i, x in zip(likeliest.indices[:count], likeliest.values[:count], strict=True)
        )
    assert found[2].top == ((found[2].token, found[2].logprob),)


def test_of_equal_logits_the_lower_ids_come_first() -> None:
    logits = torch.zeros(1, VOCAB)
    (found,) = token_logprobs(logits, [3], [2])
    assert found == TokenLogprob(3, found.logprob, ((0, found.logprob), (1, found.logprob)))
    assert math.isclose(found.logprob, -math.log(VOCAB), rel_tol=1e-6)


def test_what_cannot_come_has_the_least_value_and_small_vocabularies_give_what_they_have() -> None:
    logits = torch.tensor([[0.0, -math.inf, -1e9]])
    (found,) = token_logprobs(logits, [1], [20])
    assert found.logprob == MIN_LOGPROB
    assert found.top == ((0, 0.0), (2, MIN_LOGPROB), (1, MIN_LOGPROB))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_is_an_error_and_no_value(bad: float) -> None:
    logits = torch.zeros(2, VOCAB)
    logits[1, 3] = bad
    with pytest.raises(EngineError, match="not numbers"):
        token_logprobs(logits, [1, 1], [0, 0])


@pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen2", "gpt2"])
async def test_a_rings_values_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path)
    prompt = tuple(i * i * 31 % 97 for i in range(150))
    options = RingOptions(
        tmp_path,
        (LayerRange(0, 2), LayerRange(2, 4)),
        weights=PLAIN_WEIGHTS,
        in_process=True,
        kv_tokens=512,
        ring=RingSettings(chunk_tokens=32),
    )
    # At temperature 1 with penalties: none of it shows in the values.
    params = SamplingParams(max_tokens=6, temperature=1.0, top_k=5, repetition_penalty=1.5, seed=3)
    sequence = Sequence(0, prompt, params, logprobs=LogprobsWanted(3, of_prompt=True))
    async with RingHost(options) as ring:
        events = [event async for event in ring.stream(sequence)]
        assert ring.service.ring.kv_reserved_tokens <= len(prompt) + 16, "only what is cached for others is kept"
    assert events[0].prompt_logprobs is sequence.prompt_logprobs
    drawn = [event.step.logprob for event in events]
    tokens = [*prompt, *sequence.generated]
    with torch.no_grad():
        right = torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), -1)
    found = [*sequence.prompt_logprobs, *drawn]
    assert len(found) == len(tokens) - 1
    for row, token, value in zip(right[:-1], tokens[1:], found, strict=True):
        assert value is not None and value.token == token
        assert abs(value.logprob - float(row[token])) < 1e-3
        best = row.topk(3).values.tolist()
        assert [logprob for _, logprob in value.top] == pytest.approx(best, abs=1e-3)
        assert all(abs(logprob - float(row[each])) < 1e-3 for each, logprob in value.top)


def test_a_sampler_that_changes_its_rows_changes_no_value() -> None:
    torch.manual_seed(2)
    logits = torch.randn(2, VOCAB)
    right = torch.log_softmax(logits, -1)

    class Runner:
        def logits(self, rows: object) -> torch.Tensor:
            return logits

    class Masking:
        def take(self, rows: torch.Tensor, sequences: object) -> list[int]:
            rows[:, :500] = -math.inf
            return [int(row.argmax()) for row in rows]

    starter = TorchStarter(cast(Any, Runner()))
    starter.script = Masking()
    wanted = Sequence(0, (1,), SamplingParams(), logprobs=LogprobsWanted(1))
    plain, scored = starter.sample([TokenIds((1,))] * 2, [Sequence(1, (1,), SamplingParams()), wanted])
    assert plain.logprob is None and scored.logprob is not None
    assert scored.token >= 500 and scored.logprob.logprob == float(right[1, scored.token])
    assert scored.logprob.top == ((int(right[1].argmax()), float(right[1].max())),)
