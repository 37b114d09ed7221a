"""When rings have the same mark, and when they have none."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel

from mdiq.core.noise import NoisePromise, RowNoise
from mdiq.core.types import LayerRange, WeightSettings
from mdiq.engine.device import kind_of
from mdiq.engine.text.gguf_tokenizer import TokenizerParts
from mdiq.engine.text.tokenizer import Tokenizer
from mdiq.runtime.options import RemoteNode, RemoteRing, RingOptions
from mdiq.service.same_tokens import SameTokens

ONE = RingOptions(Path("m"), (LayerRange(0, 4),))


def _mark(
    options: RingOptions | None = ONE,
    cpus: tuple[str, ...] = (),
    *,
    model: str = "m",
    words: str = "t",
    wanted: RingOptions | None = None,
) -> str | None:
    checkpoint = SimpleNamespace(digest=model, layer_kinds=set)
    same = SameTokens(cast(Any, checkpoint), cast(Any, SimpleNamespace(digest=words)))
    same.options = options
    return same.mark(cpus, wanted)


def test_how_the_layers_are_split_is_no_part_of_the_mark() -> None:
    two = replace(ONE, layers=(LayerRange(0, 1), LayerRange(1, 4)), threads=4, kv_tokens=99)
    assert _mark(ONE) == _mark(two) is not None
    own = kind_of(torch.device("cpu"))
    assert _mark(ONE, (own, "", own)) == _mark(ONE)
    assert _mark(replace(ONE, weights=WeightSettings("int8"))) == _mark(ONE), "it is what auto chooses"


def test_what_decides_tokens_changes_the_mark() -> None:
    marks = [_mark(), _mark(model="n"), _mark(words="u"), _mark(replace(ONE, weights=WeightSettings("int4")))]
    assert len({*marks}) == 4 and None not in marks


@pytest.mark.parametrize(
    "options",
    [
        None,
        replace(ONE, weights=WeightSettings("plain")),
        replace(ONE, weights=WeightSettings(exact=False)),
        replace(ONE, weights=WeightSettings(dtype="bf16")),
        replace(ONE, layers=(LayerRange(0, 2), LayerRange(2, 4)), wires=("i8",)),
    ],
)
def test_rings_that_may_differ_in_a_token_have_no_mark(options: RingOptions | None) -> None:
    assert _mark(options) is None


def test_a_ring_with_noise_has_no_mark_nor_one_that_may_get_some() -> None:
    desk, pi1 = (RemoteNode(name, f"tcp://{name}:7002", None) for name in ("desk", "pi1"))
    noisy = replace(pi1, noise=NoisePromise(8.0, 1e-6, RowNoise(40.0, 20.0)))

    def ring(*nodes: RemoteNode, spares: tuple[RemoteNode, ...] = ()) -> RingOptions:
        layers = (LayerRange(0, 2), LayerRange(2, 4))
        return replace(ONE, layers=layers, remote=RemoteRing(nodes, "tcp://c", "tcp://w", spares=spares))

    assert _mark(ring(desk, pi1)) == _mark()
    assert _mark(ring(desk, noisy)) is None
    assert _mark(ring(desk, pi1), wanted=ring(desk, noisy)) is None, "it was let in since then"
    assert _mark(ring(desk, pi1), wanted=ring(desk)) == _mark()
    assert _mark(ring(desk, pi1, spares=(replace(noisy, name="pi2"),))) is None


def test_a_ring_of_unlike_processors_has_no_mark() -> None:
    assert _mark(ONE, ("another kind",)) is None


def test_a_tokenizer_is_known_by_its_words_its_ends_and_its_template() -> None:
    def digest(**changes: Any) -> str:
        words = Words(WordLevel({"a": 0, "b": 1}, unk_token="a"))
        values: dict[str, Any] = {"backend": words, "vocab_size": 2, "eos_token_ids": frozenset([1]), "prefix": ()}
        values |= {"suffix": (), "special_texts": {}, "chat_template": "x", "chat_template_where": "here"}
        return Tokenizer(TokenizerParts(**values | changes)).digest

    assert digest() == digest(chat_template_where="there")
    other = Words(WordLevel({"a": 0, "c": 1}, unk_token="a"))
    changes: list[dict[str, Any]] = [{"backend": other}, {"prefix": (1,)}, {"eos_token_ids": frozenset([0])}]
    changes += [{"special_texts": {"bos_token": "a"}}, {"chat_template": "y"}, {"chat_template": None}]
    assert len({digest(), *(digest(**change) for change in changes)}) == 7
