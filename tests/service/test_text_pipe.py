"""The text of an answer ends with its last whole character, however its tokens end."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from mdiq.engine.text.tokenizer import Tokenizer
from mdiq.service.text_pipe import TokenizerPipe
from tests.engine.text.test_tokenizer import byte_level, byte_level_file, pieces, sentencepiece

__all__ = ["byte_level", "pieces", "sentencepiece"]  # fixtures


@pytest.fixture(params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path, byte_level: Backend) -> Tokenizer:
    if request.param == "byte-level":
        return Tokenizer.load(byte_level_file(tmp_path / "a.gguf", byte_level))
    found: Tokenizer = request.getfixturevalue("sentencepiece")
    return found


def _said(tokenizer: Tokenizer, ids: list[int], *stops: str) -> str:
    pipe = TokenizerPipe(tokenizer, stops)
    return "".join([pipe.push(token) for token in ids]) + pipe.finish()


@pytest.mark.parametrize("text", ["a\ufffd", "a\ufffd\ufffd", "\ufffd", "a\ufffd b", "\U0001f0a1", "a\U0001f0a1\ufffd"])
def test_a_replacement_character_that_the_model_says_is_shown(tokenizer: Tokenizer, text: str) -> None:
    assert _said(tokenizer, tokenizer.encode(text)).strip(" ") == text


@pytest.mark.parametrize("before", ["", "a", "a\ufffd", "\ufffd\ufffd", "\U0001f0a1"])
@pytest.mark.parametrize("character", ["\U0001f0a1", "\u1fa7", "\u0378"])  # so rare that it has several tokens
def test_half_a_character_at_the_end_is_not_shown(tokenizer: Tokenizer, before: str, character: str) -> None:
    ids = tokenizer.encode(before + character)
    num_tokens = len(ids) - len(tokenizer.encode(before))
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd")
    assert num_tokens > 1
    for cut in range(1, num_tokens + 1):
        assert _said(tokenizer, ids[:-cut]).strip(" ") == before
        assert _said(tokenizer, ids[:-cut], "never").strip(" ") == before


def test_a_stop_text_ends_the_answer_before_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a END \U0001f0a1")[:-1]
    assert _said(tokenizer, ids, "END").strip() == "a"
