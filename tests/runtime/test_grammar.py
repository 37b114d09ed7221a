"""Sequences with a grammar on a Ring: a Replay, a preemption and another process give the tokens of a calm run."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from mdiq.bench.shapes import SHAPES, shape_file
from mdiq.core.sequence import FinishReason, SamplingParams, Sequence
from mdiq.core.types import LayerRange, SeqId, WeightSettings
from mdiq.engine.text.gguf_tokenizer import TokenizerParts
from mdiq.engine.text.grammar import Grammars
from mdiq.engine.text.tokenizer import Tokenizer
from mdiq.errors import EngineError
from mdiq.runtime.options import RingOptions
from mdiq.runtime.ring_host import RingHost

END = 256
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "maxItems": 3},
        "kind": {"enum": ["red", "green", None]},
    },
    "required": ["name", "sizes", "kind"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},  # random weights like spaces
}
PARAMS = [
    SamplingParams(max_tokens=150, grammar=f"json_schema:{json.dumps(SCHEMA)}", temperature=temperature, seed=seed)
    for seed, temperature in enumerate((0.0, 1.0, 1.5))
]


@pytest.fixture
def tokenizer() -> Tokenizer:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={sign: i for i, sign in enumerate([*alphabet, "<end>"])}, merges=[]))
    backend.add_special_tokens(["<end>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(TokenizerParts(backend, SHAPES["tiny"].vocab_size, frozenset({END}), (), (), {}, None, ""))


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RingOptions:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path))
    layers = (LayerRange(0, 2), LayerRange(2, 4))
    model = shape_file("tiny", 8, lambda _: None)
    return RingOptions(model, layers, weights=WeightSettings("int8"), in_process=True, kv_tokens=1024)


@pytest.fixture
async def ring(options: RingOptions, tokenizer: Tokenizer) -> AsyncIterator[RingHost]:
    async with RingHost(options, grammars=Grammars(tokenizer)) as ring:
        yield ring


def _sequence(index: int, params: SamplingParams, generated: list[int] | None = None) -> Sequence:
    return Sequence(index, (72, 105, 33), params, frozenset({END}), generated=generated or [])


async def _answer(ring: RingHost, sequence: Sequence, *, fault_at: int = 0) -> list[int]:
    """Return the whole answer; with ``fault_at`` it is replayed at each such number of tokens."""
    async for event in ring.stream(sequence):
        assert event.step.error is None, event.step.error
        if fault_at and event.step.token is not None and len(sequence.generated) % fault_at == 0:
            protocol = ring.service.ring
            ring.service.report_gaps(protocol.epoch, tuple(map(SeqId, range(100))))
    return sequence.generated


@pytest.mark.parametrize("params", PARAMS, ids=lambda params: f"temperature-{params.temperature}")
async def test_a_replayed_answer_in_a_form_is_that_of_a_calm_ring(
    ring: RingHost, tokenizer: Tokenizer, params: SamplingParams
) -> None:
    calm = _sequence(0, params)
    expected = await _answer(ring, calm)
    assert calm.finish_reason is FinishReason.STOP and expected[-1] == END and len(expected) > 20
    jsonschema.validate(json.loads(tokenizer.decode(expected)), SCHEMA)
    assert not ring.service.ring.counts["replays"]
    assert await _answer(ring, _sequence(1, params), fault_at=5) == expected
    assert ring.service.ring.counts["replays"] >= 4


async def test_an_answer_that_goes_on_in_another_process_is_that_of_a_calm_ring(
    ring: RingHost, options: RingOptions, tokenizer: Tokenizer
) -> None:
    expected = [await _answer(ring, _sequence(i, params)) for i, params in enumerate(PARAMS)]
    async with RingHost(options, grammars=Grammars(tokenizer)) as another:
        for i, params in enumerate(PARAMS):
            assert await _answer(another, _sequence(i, params, expected[i][:11])) == expected[i]


async def test_an_answer_may_be_cut_short_in_its_form(ring: RingHost, tokenizer: Tokenizer) -> None:
    sequence = _sequence(0, replace(PARAMS[0], max_tokens=9))
    tokens = await _answer(ring, sequence)
    assert (sequence.finish_reason, len(tokens)) == (FinishReason.LENGTH, 9)
    assert tokenizer.decode(tokens).startswith('{"name"')


async def test_a_form_that_fails_ends_its_own_sequence_alone(ring: RingHost) -> None:
    bad = _sequence(0, replace(PARAMS[0], grammar="regex:("))
    good = _sequence(1, PARAMS[0])
    events = [event async for event in ring.stream(bad)]
    assert events[-1].step.finish_reason is FinishReason.ERROR and "unclosed" in str(events[-1].step.error)
    await _answer(ring, good)
    assert good.finish_reason is FinishReason.STOP


async def test_a_ring_without_a_tokenizer_says_so(options: RingOptions) -> None:
    async with RingHost(options) as ring:
        events = [event async for event in ring.stream(_sequence(0, PARAMS[0]))]
        assert isinstance(events[-1].step.error, EngineError) and "no tokenizer" in str(events[-1].step.error)
