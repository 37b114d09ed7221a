"""Grammars: every answer that follows one has the form, and a state that is made anew from the tokens is the same."""

import gc
import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from mdiq.api.structure import schema_grammar, wrong_part
from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.engine.text import grammar as grammar_module
from mdiq.engine.text.grammar import MAX_KEPT, Grammars
from mdiq.engine.text.tokenizer import Tokenizer
from mdiq.errors import ConfigError, EngineError
from tests.engine.text.random_schemas import random_schema
from tests.engine.text.test_tokenizer import byte_level, byte_level_file, pieces, sentencepiece

__all__ = ["byte_level", "pieces", "sentencepiece"]  # fixtures

MORE = 40  # ids of a model beyond those of its tokenizer


@pytest.fixture(params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path, byte_level: Backend) -> Tokenizer:
    if request.param == "byte-level":
        return Tokenizer.load(byte_level_file(tmp_path / "a.gguf", byte_level))
    found: Tokenizer = request.getfixturevalue("sentencepiece")
    return found


def _sequence(grammar: str) -> Sequence:
    return Sequence(0, (1,), SamplingParams(grammar=grammar))


def _allowed(grammars: Grammars, tokenizer: Tokenizer, sequence: Sequence) -> list[int]:
    form = grammars.form(sequence, tokenizer.vocab_size + MORE)
    mask = form.allowed()
    taken = {token for token in range(len(mask)) if form.takes(token)}
    found = {int(token) for token in np.flatnonzero(mask)}
    assert taken <= found and found - taken <= tokenizer.eos_token_ids
    assert mask.shape == (tokenizer.vocab_size + MORE,) and not mask[tokenizer.vocab_size :].any()
    return [int(token) for token in np.flatnonzero(mask)]


def _walk(tokenizer: Tokenizer, grammar: str, seed: int, *, max_tokens: int = 3_000) -> str:
    """Take random tokens that are allowed until the end is taken; each state is also made anew from the tokens."""
    rng, grammars, sequence = random.Random(seed), Grammars(tokenizer), _sequence(grammar)
    for i in range(max_tokens):
        allowed = _allowed(grammars, tokenizer, sequence)
        if i % 7 == seed % 7:
            again = _sequence(grammar)
            again.generated[:] = sequence.generated
            assert _allowed(grammars, tokenizer, again) == allowed
        # The end as soon as it may be: else a number has thousands of digits.
        ends = [token for token in allowed if token in tokenizer.eos_token_ids]
        if ends and rng.random() < 0.5 or allowed == ends:
            return tokenizer.decode(sequence.generated)
        token = rng.choice([token for token in allowed if token not in ends])
        assert token not in tokenizer.special_ids
        sequence.append(token)
    raise AssertionError(f"no end: {tokenizer.decode(sequence.generated)[:500]}")


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_drawn_of_the_allowed_tokens_is_valid_json_of_the_schema(tokenizer: Tokenizer, seed: int) -> None:
    schema = random_schema(seed)
    text = _walk(tokenizer, f"json_schema:{json.dumps(schema)}", seed)
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize(
    ("grammar", "fits"),
    [
        ('choice:["yes, sure", "no", "\\u00e9\\n\\"x"]', lambda text: text in ("yes, sure", "no", 'é\n"x')),
        (r"regex:[0-9]{3}-[a-c]{2}", lambda text: len(text) == 6 and text[3] == "-"),
        ('gbnf:root ::= ("- " [a-z]{1,3} "\\n"){2}', lambda text: text.count("- ") == 2 == text.count("\n")),
    ],
)
def test_other_kinds_of_grammars_are_followed(tokenizer: Tokenizer, grammar: str, fits: object) -> None:
    for seed in range(5):
        text = _walk(tokenizer, grammar, seed)
        assert callable(fits) and fits(text), text


def test_the_name_of_a_special_token_may_stand_in_a_form_as_text(tokenizer: Tokenizer) -> None:
    name = tokenizer.text_of_special(next(iter(tokenizer.eos_token_ids)))
    for grammar in (f"choice:{json.dumps([f'a{name}b'])}", f"choice:{json.dumps([name])}"):
        for seed in range(3):
            assert name in _walk(tokenizer, grammar, seed)


def test_the_end_is_allowed_only_where_the_form_is_whole(tokenizer: Tokenizer) -> None:
    grammars, sequence = Grammars(tokenizer), _sequence('choice:["aa", "aabb"]')
    ends, seen = tokenizer.eos_token_ids, {}
    ids = tokenizer.token_bytes()
    while True:
        allowed = _allowed(grammars, tokenizer, sequence)
        text = b"".join(ids[token] for token in sequence.generated)
        seen[text] = bool(ends & {*allowed})
        single = [token for token in allowed if len(ids[token]) == 1 and token not in ends]
        if not single:
            break
        sequence.append(single[0])
    assert seen == {b"": False, b"a": False, b"aa": True, b"aab": False, b"aabb": True}
    assert ends <= {*allowed} and {*allowed} == ends, "only the end is left"


def test_a_sequence_that_goes_on_elsewhere_has_its_state_from_its_tokens(tokenizer: Tokenizer) -> None:
    grammar = f"json_schema:{json.dumps(random_schema(3))}"
    first, sequence = Grammars(tokenizer), _sequence(grammar)
    rng = random.Random(1)
    for _ in range(40):
        allowed = [t for t in _allowed(first, tokenizer, sequence) if t not in tokenizer.eos_token_ids]
        if not allowed:
            break
        sequence.append(rng.choice(allowed))
        other = _sequence(grammar)
        other.generated[:] = sequence.generated
        second = Grammars(tokenizer)
        second._tokens = first._tokens  # what takes long to build
        second.begin(other)
        assert _allowed(second, tokenizer, other) == _allowed(first, tokenizer, sequence)
    assert len(sequence.generated) > 5


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        ('json_schema:{"type": "foo"}', "Invalid type: foo"),
        ('json_schema:{"type": "string", "not": {}}', "Unimplemented keys.*not"),
        ('json_schema:{"$ref": "#/nowhere"}', "nowhere"),
        ('json_schema:{"$ref": "#"}', "no answer fits it"),
        ('json_schema:{"type": "integer", "minimum": 3, "maximum": 2}', "Unsatisfiable"),
        ("json_schema:{", "cannot be used"),
        ("json_schema:" + '{"items":' * 300 + "{}" + "}" * 300, "recursion limit"),
        ("regex:(", "unclosed group"),
        ("regex:(?=a)b", "look-around"),
        ("regex:" + "(" * 50_000 + ")" * 50_000, "cannot be used"),
        ("gbnf:root ::= missing", "missing"),
        ("gbnf:root ::= " + "(" * 5_000 + '"a"' + ")" * 5_000, "cannot be used"),
        ("gbnf:" + "x" * 32_769, "32768 is the limit"),
        ("regex:" + "x" * 131_073, "131072 is the limit"),
        ("lark:start: " + "(" * 1_000 + '"a"' + ")" * 1_000, "nested"),
        ("xml:<a>", "kind 'xml'"),
    ],
)
def test_what_is_no_grammar_is_refused_in_a_line_that_says_why(tokenizer: Tokenizer, grammar: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        Grammars(tokenizer).check(grammar)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_tokens_that_leave_the_form_are_an_error_of_their_sequence(tokenizer: Tokenizer) -> None:
    grammars, sequence = Grammars(tokenizer), _sequence("regex:[a-z]{100}")
    sequence.generated.append(tokenizer.plain_ids("7")[-1])
    form = grammars.form(sequence, tokenizer.vocab_size)
    # The end neither: the answer would seem to have its form.
    assert not [token for token in range(tokenizer.vocab_size) if form.takes(token)]
    with pytest.raises(EngineError, match="the answer's form"):
        form.allowed()


def test_nothing_comes_after_the_end(tokenizer: Tokenizer) -> None:
    grammars, sequence = Grammars(tokenizer), _sequence("regex:a?")
    sequence.generated.append(min(tokenizer.eos_token_ids))
    form = grammars.form(sequence, tokenizer.vocab_size)
    assert not [token for token in range(tokenizer.vocab_size) if form.takes(token)]


def test_states_go_with_their_sequences_and_few_grammars_are_kept(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer)
    sequences = [_sequence(f"regex:a{{{i}}}") for i in range(1, MAX_KEPT + 10)]
    for sequence in sequences:
        grammars.form(sequence, tokenizer.vocab_size).allowed()
    assert len(grammars._compiled) == MAX_KEPT and len(grammars._followed) == len(sequences)
    sequences.clear()
    del sequence
    gc.collect()
    assert not grammars._followed


def test_of_long_grammars_fewer_are_kept(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_KEPT_CHARACTERS", 250)
    grammars = Grammars(tokenizer)
    for letter in "abc":
        grammars.begin(_sequence(f"regex:{letter * 100}"))
    assert [text[6] for text in grammars._compiled] == ["b", "c"]
    grammars.begin(_sequence("regex:" + "d" * 1_000))
    assert [text[6] for text in grammars._compiled] == ["d"], "the newest is kept"


def test_a_model_without_an_end_has_no_forms(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "eos_token_ids", frozenset())
    with pytest.raises(ConfigError, match="no end token"):
        Grammars(tokenizer).check("regex:a")


def test_a_tokens_bytes_are_those_of_its_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.token_bytes()
    assert len(ids) == tokenizer.vocab_size
    for text in ("Hello, world", "naïve café", "x  y\n\tz", "日本 🂡", '{"a": [1, 2]}'):
        joined = b"".join(ids[token] for token in tokenizer.plain_ids(text))
        assert joined.removeprefix(b" ") == text.encode()  # SentencePiece's own space


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        ({"type": "foo"}, "schema"),
        ({"properties": {"a": {"type": "string"}, "b": {"items": {"not": {}}}}}, "schema.properties.b.items"),
        (
            {
                "$defs": {"ok": {"type": "null"}, "bad": {"anyOf": [{"$ref": "#/$defs/ok"}, {"type": "foo"}]}},
                "properties": {"a": {"$ref": "#/$defs/ok"}, "b": {"$ref": "#/$defs/bad"}},
            },
            "schema.$defs.bad.anyOf[1]",
        ),
        ({"properties": {"a": {"$ref": "#/nowhere"}}}, "schema.properties.a"),
        ({"type": "array", "minItems": 1, "items": {"enum": []}}, "schema.items"),
    ],
)
def test_the_part_of_a_schema_that_cannot_be_used_is_found(
    tokenizer: Tokenizer, schema: dict[str, Any], where: str
) -> None:
    grammars = Grammars(tokenizer)

    def is_usable(grammar: str) -> bool:
        try:
            grammars.check(grammar)
        except ConfigError:
            return False
        return True

    assert not is_usable(schema_grammar(schema, "schema"))
    assert wrong_part(schema, "schema", is_usable) == where
