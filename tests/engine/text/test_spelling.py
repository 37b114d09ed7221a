"""Single tokens as bytes, for tokenizers of both kinds."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mdiq.engine.text.spelling import Spelling
from mdiq.engine.text.tokenizer import Tokenizer as ModelTokenizer
from tests.integration.tiny_model import write_tiny_model

TEXTS = ["a plain text", "Naïve cafés cost 5 €;\n\t then 🙂 and 中文", "  two spaces  "]


def test_a_byte_level_tokenizer_gives_the_bytes_of_a_text(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer.load(write_tiny_model(tmp_path))
    for text in TEXTS:
        spelled = [tokenizer.spell(token) for token in tokenizer.encode(text)]
        assert b"".join(data for data, _ in spelled) == text.encode()
        assert all(is_text for _, is_text in spelled)
    assert tokenizer.spell(9_999) == (b"", False)


def test_sentencepiece_signs_and_byte_tokens_are_what_they_stand_for() -> None:
    vocab = {"<unk>": 0, "▁the": 1, "▁": 2, "<0xE2>": 3, "é": 4, "<0xZZ>": 5}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Prepend("▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken("<s>")])
    backend.add_tokens([AddedToken("▁as it is")])
    special = backend.token_to_id("<s>")
    spelling = Spelling(backend, {special})
    spelled = [spelling.of(token) for token in range(6)]
    assert spelled == [
        (b"<unk>", True),
        (b" the", True),
        (b" ", True),
        (b"\xe2", True),
        ("é".encode(), True),
        (b"<0xZZ>", True),
    ]
    assert spelling.of(special) == (b"<s>", False), "a special token has a name and no text"
    assert spelling.of(backend.token_to_id("▁as it is")) == ("▁as it is".encode(), True)


@pytest.mark.parametrize("text", TEXTS)
def test_added_tokens_of_a_byte_level_tokenizer_are_not_in_bytes(text: str) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(alphabet)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text)])
    assert Spelling(backend, ()).of(len(alphabet)) == (text.encode(), True)
