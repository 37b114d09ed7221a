"""What the command itself decides of a service; the ring is tests/integration's."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.service.ring_backend import RingBackend
from mdiq.service.starter import name_of


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("models/Llama-3.2-1B-Instruct", "Llama-3.2-1B-Instruct"),
        ("/m/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "qwen2.5-coder-0.5b-instruct-q4_k_m"),
        ("big-Q4_K_M-00002-of-00003.gguf", "big-Q4_K_M"),
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
    ],
)
def test_a_model_is_called_after_its_path(path: str, name: str) -> None:
    assert name_of(path) == name


def test_a_sequence_has_the_name_and_the_share_of_its_key() -> None:
    asked: list[Sequence] = []
    keeper = SimpleNamespace(stream=asked.append)
    tokenizer = SimpleNamespace(with_special_stops=lambda params: params, eos_token_ids=frozenset([2]))
    config = SimpleNamespace(vocab_size=9, context_tokens=8)
    backend = RingBackend(*cast(Any, (keeper, tokenizer, None, config, "m", None, dict, str)))
    backend.answer((1,), SamplingParams(), owner="office", share=3)
    backend.answer((1,), SamplingParams())
    assert [(each.owner, each.share) for each in asked] == [("office", 3), ("", 1)]
    assert asked[0].index != asked[1].index
