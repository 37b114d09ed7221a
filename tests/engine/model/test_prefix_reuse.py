"""A Sequence that begins with the KV cache of another gives the tokens that it gives alone."""

from pathlib import Path

import pytest

from mdiq.engine.model.kv_cache import BLOCK_TOKENS
from tests.engine.tiny_models import NEAR_TIE, Chain, make_model, reference_tokens

HISTORY = [i * 31 % 97 for i in range(2 * BLOCK_TOKENS + 6)]
NEW = [11, 12, 13]
COUNT = 12


@pytest.mark.parametrize("split", [[4], [1, 2, 1]])
@pytest.mark.parametrize("name", ["llama-gqa-tied", "mistral-windowed", "qwen3"])
def test_the_next_turn_of_a_chat_gives_the_reference_tokens(name: str, split: list[int], tmp_path: Path) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path)
    chain = Chain.load(tmp_path, split)
    chain.forward([(0, 0, HISTORY)])
    shared = 2 * BLOCK_TOKENS
    prompt = [*HISTORY, *NEW]
    expected, gaps = reference_tokens(model, prompt, COUNT)
    assert len(set(expected)) > 2, "it tests too little"
    # The parent goes on in the same Batch, in the block behind those that are shared.
    on_its_own, gaps_on_its_own = reference_tokens(model, [*HISTORY, 7], COUNT)
    tokens = chain.forward([(0, len(HISTORY), [7]), (1, shared, prompt[shared:])], parents={1: 0})
    answers: dict[int, list[int]] = {0: [], 1: []}
    for step in range(COUNT):
        answers[0].append(tokens[0])
        answers[1].append(tokens[1])
        places = len(HISTORY) + 1 + step, len(prompt) + step
        tokens = chain.forward(
            [(s, place, [token]) for s, (place, token) in enumerate(zip(places, tokens, strict=True))]
        )
    _check(answers[0], on_its_own, gaps_on_its_own)
    _check(answers[1], expected, gaps)
    assert {stage.kv_tokens_in_use for stage in chain.stages} == {BLOCK_TOKENS * (2 + 1 + 1)}


def _check(answer: list[int], expected: list[int], gaps: list[float]) -> None:
    for token, wanted, gap in zip(answer, expected, gaps, strict=True):
        if token != wanted:
            assert gap < NEAR_TIE, f"{answer} is not {expected}"
            return
