"""The text of an answer ends with its last whole character, however its tokens end."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from mdiq.core.sequence import FinishReason, SamplingParams, Sequence
from mdiq.engine.text.tokenizer import Tokenizer
from mdiq.runtime.text_pipe import text_of
from mdiq.service.text_pipe import TokenizerPipe, go_on
from tests.engine.text.test_tokenizer import byte_level, byte_level_file, pieces, sentencepiece

__all__ = ["byte_level", "pieces", "sentencepiece"]  # fixtures


@pytest.fixture(params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path, byte_level: Backend) -> Tokenizer:
    if request.param == "byte-level":
        return Tokenizer.load(byte_level_file(tmp_path / "a.gguf", byte_level))
    found: Tokenizer = request.getfixturevalue("sentencepiece")
    return found


def _said(tokenizer: Tokenizer, ids: list[int], *stops: str, min_tokens: int = 0) -> str:
    pipe = TokenizerPipe(tokenizer, SamplingParams(stop=stops, min_tokens=min_tokens))
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


def _both(
    tokenizer: Tokenizer, ids: list[int], params: SamplingParams, num_known: int
) -> tuple[str, FinishReason | None, list[int]]:
    """Return text, end and tokens of an answer whose first tokens are of an earlier run."""
    sequence = Sequence(0, (1,), params, eos_token_ids=frozenset({EOS}))
    pipe = TokenizerPipe(tokenizer, params)
    text = go_on(sequence, pipe, ids[:num_known])
    for token in ids[num_known:]:
        if sequence.finish_reason is None:
            text += text_of(pipe, sequence, token)
            sequence.finish_reason = sequence.append(token, stop_matched=pipe.stop_matched)
            if sequence.finish_reason is not None:
                text += pipe.finish()
    return text, sequence.finish_reason, sequence.generated


EOS = 2**20  # no text has it


@pytest.mark.parametrize(
    ("params", "said", "reason"),
    [
        (SamplingParams(max_tokens=99), "a\U0001f0a1 b\u1fa7 END of it", FinishReason.STOP),
        (SamplingParams(max_tokens=99, stop=("END",)), "a\U0001f0a1 b\u1fa7", FinishReason.STOP),
        (SamplingParams(max_tokens=99, stop=("a",), min_tokens=3), "a\U0001f0a1 b\u1fa7 END of it", FinishReason.STOP),
        (SamplingParams(max_tokens=4), None, FinishReason.LENGTH),
        (SamplingParams(max_tokens=99, ignore_eos=True), "a\U0001f0a1 b\u1fa7 END of it and more", None),
    ],
)
def test_an_answer_says_and_ends_alike_wherever_a_restart_has_cut_it(
    tokenizer: Tokenizer, params: SamplingParams, said: str | None, reason: FinishReason | None
) -> None:
    ids = [*tokenizer.encode("a\U0001f0a1 b\u1fa7 END of it"), EOS, *tokenizer.encode(" and more")]
    whole = _both(tokenizer, ids, params, 0)
    assert whole[1] is reason and (said is None or whole[0].split() == said.split())
    for num_known in range(1, len(ids) + 1):
        assert _both(tokenizer, ids, params, num_known) == whole


def test_a_stop_text_ends_no_answer_before_its_least_length(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("END a END b END c")
    said = [_said(tokenizer, ids, "END", min_tokens=num_tokens).split() for num_tokens in range(len(ids) + 1)]
    assert said[0] == [] and said[-1] == "END a END b END c".split()
    assert [words for i, words in enumerate(said) if words not in said[:i]] == [
        [],
        ["END", "a"],
        ["END", "a", "END", "b"],
        ["END", "a", "END", "b", "END", "c"],
    ]


def test_special_tokens_have_a_text_where_they_are_to_be_seen(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.plain_ids("a b"), 1, *tokenizer.plain_ids("c"), 2]
    assert _said(tokenizer, ids) == tokenizer.decode(ids)
    pipe = TokenizerPipe(tokenizer, SamplingParams(shown_token_ids=(1,)))
    text = "".join([pipe.push(token) for token in ids]) + pipe.finish()
    assert "".join(text.split()) == f"ab{tokenizer.text_of_special(1)}c"


def test_the_stop_text_that_ended_an_answer_is_known(tokenizer: Tokenizer) -> None:
    pipe = TokenizerPipe(tokenizer, SamplingParams(stop=("xx", "b")))
    assert pipe.stop_text is None
    for token in tokenizer.plain_ids("a b c"):
        pipe.push(token)
    assert pipe.stop_matched and pipe.stop_text == "b"


def test_half_a_character_before_a_mark_is_told_once(tokenizer: Tokenizer) -> None:
    mark = min(tokenizer.eos_token_ids)
    half = tokenizer.encode("\U0001f0a1")[-2]
    a, b = tokenizer.encode("a b"), tokenizer.encode("c d")

    def told(ids: list[int]) -> str:
        pipe = TokenizerPipe(tokenizer, SamplingParams(shown_token_ids=(mark,)))
        return "".join([pipe.push(token) for token in ids]) + pipe.finish()

    name = tokenizer.text_of_special(mark)
    before, after = told([*a, half, mark, *b]).split(name)
    assert [before.rstrip("\ufffd"), after] == told([*a, mark, *b]).split(name)
    assert before.endswith("\ufffd")


def test_bytes_that_never_become_a_character_do_not_wait_for_ever(tokenizer: Tokenizer) -> None:
    half, whole = tokenizer.encode("\U0001f0a1")[-2], tokenizer.encode("x\U0001f0a1 y")
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in [half] * 1_000]
    assert "".join(pieces).count("\ufffd") >= 900 and max(map(len, pieces)) < 200
    text = "".join(pieces) + "".join([stream.push(token) for token in whole]) + stream.finish()
    assert set(text.removesuffix(tokenizer.decode(whole).strip(" "))) <= {"\ufffd", " "}
    assert tokenizer.decode([half] * 1_000 + whole) == text
