"""What the command itself decides of a service; the ring is tests/integration's."""

import pytest

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
