"""The measure of what a format costs, and the text that it is taken with."""

import math
from pathlib import Path

import pytest
import torch

from mdiq.engine import wire_check
from mdiq.engine.text.sample_text import sample_text
from mdiq.engine.wire_check import check_tokens, divergence_nats
from mdiq.errors import ModelError


def test_equal_logits_do_not_diverge_and_a_constant_makes_no_difference() -> None:
    logits = torch.randn(5, 40)
    assert divergence_nats(logits, logits + 3.0) == pytest.approx(0.0, abs=1e-9)


def test_the_divergence_is_the_mean_over_the_rows_in_nats() -> None:
    even, certain = torch.tensor([0.0, 0.0]), torch.tensor([math.log(3.0), 0.0])
    of_one_row = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert divergence_nats(torch.stack([even, even]), torch.stack([certain, even])) == pytest.approx(of_one_row / 2)


def test_what_is_not_a_number_is_over_every_bound() -> None:
    logits = torch.randn(2, 4)
    assert divergence_nats(logits, logits * float("nan")) == math.inf


def test_a_model_without_a_tokenizer_is_tried_with_tokens_of_its_whole_vocabulary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_tokenizer(_: Path) -> None:
        raise ModelError("none")

    monkeypatch.setattr(wire_check.Tokenizer, "load", no_tokenizer)
    tokens = check_tokens(tmp_path, 64, 50)
    assert len(tokens) == 64
    assert len(set(tokens)) == 50


def test_a_model_is_tried_with_real_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Letters:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) for letter in text]

    monkeypatch.setattr(wire_check.Tokenizer, "load", lambda _: Letters())
    text = "".join(map(chr, check_tokens(tmp_path, 64, 50)))
    assert text == sample_text()[1_000:1_064]
