"""The least number of tokens of a text is never more than it has, and near enough to refuse what is far too long."""

from pathlib import Path

import pytest
from hypothesis import given
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mdiq.engine.text.token_bound import TokenBound
from mdiq.engine.text.tokenizer import Tokenizer
from mdiq.errors import ConfigError, ContextLengthError
from tests.engine.text.test_tokenizer import TEXTS, byte_level, byte_level_file, few, pieces, sentencepiece, texts

__all__ = ["byte_level", "pieces", "sentencepiece"]  # fixtures


@pytest.fixture(params=["gpt-2", "qwen2", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "sentencepiece":
        found: Tokenizer = request.getfixturevalue("sentencepiece")
        return found
    return Tokenizer.load(
        byte_level_file(tmp_path / "a.gguf", request.getfixturevalue("byte_level"), pre=request.param)
    )


def test_the_bound_is_never_more_than_there_are(tokenizer: Tokenizer) -> None:
    backend = tokenizer._backend
    bound = TokenBound(backend)

    @few
    @given(texts)
    def check(text: str) -> None:
        for given_text in (text, text * 20):
            assert bound.min_tokens(given_text) <= len(backend.encode(given_text, add_special_tokens=False).ids)

    for text in (*TEXTS, "e\u0301" * 500, "\u1fa7" * 99, "<|im_start|>" * 50, "-" * 5_000, " \n" * 500):
        ids = backend.encode(text, add_special_tokens=False).ids
        assert bound.min_tokens(text) <= len(ids)
    check()
    assert bound.min_tokens("The quick brown fox jumps. " * 1_000) > 250


def test_a_text_that_cannot_fit_is_refused_without_its_tokens(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenized(_: str) -> list[int]:
        raise AssertionError("it was tokenized")

    tokenizer.check_fits("a b " * 500, 20_000)
    monkeypatch.setattr(tokenizer, "_ids", tokenized)
    with pytest.raises(ContextLengthError, match=r"prompt: at least \d+ tokens leave no room for an answer in 1000"):
        tokenizer.check_fits("a b " * 500_000, 1_000)


def test_a_chat_that_cannot_fit_is_refused_once_its_template_has_written_it(
    byte_level: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "{% for m in messages %}{% if not loop.first %}{{ m.content }}{% endif %}{% endfor %}"
    tokenizer = Tokenizer.load(byte_level_file(tmp_path / "a.gguf", byte_level, chat_template=source))
    long, short = ({"role": "user", "content": text} for text in ("a b " * 100_000, "a b"))
    assert tokenizer.chat_ids([long, short], room=1_000) == tokenizer.encode("a b")  # the template leaves the long out
    monkeypatch.setattr(tokenizer, "_ids", lambda _: pytest.fail("it was tokenized"))
    with pytest.raises(ContextLengthError):
        tokenizer.chat_ids([short, long], room=1_000)


@pytest.mark.parametrize("kind", ["words", "unknown", "removed", "stripping"])
def test_there_is_no_bound_where_a_token_may_cover_anything(kind: str) -> None:
    unknown = {"unk_token": "<unk>", "fuse_unk": True} if kind == "unknown" else {}
    backend = Backend(models.BPE(vocab={"a": 0, "<unk>": 1}, merges=[], **unknown))
    if kind == "words":
        backend.model = models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")
    if kind == "removed":
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("b+"), behavior="removed")
    if kind == "stripping":
        backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
        backend.normalizer = normalizers.NFC()
    assert TokenBound(backend).min_tokens("ab" * 10_000) == 0


def test_half_a_surrogate_pair_in_a_long_text_is_an_error_of_the_text(byte_level: Backend, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_level_file(tmp_path / "a.gguf", byte_level))
    with pytest.raises(ConfigError, match="half a surrogate pair"):
        tokenizer.check_fits("a b " * 500 + "\ud800", 1_000)
