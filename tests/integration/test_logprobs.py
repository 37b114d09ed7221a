"""Log-probabilities of a real ring over HTTP equal those of transformers on the same weights."""

import json
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mdiq.engine.text.tokenizer import Tokenizer
from tests.integration.tiny_model import NUM_LAYERS, write_tiny_model
from tests.integration.two_nodes import TwoNodes, two_nodes

pytestmark = pytest.mark.timeout(600)

TOLERANCE = 2e-3
"""In nats: sums of f32 in another order."""
LONG = [i * i * 31 % 251 for i in range(1_500)]
"""A prompt of several chunks."""
TEXT = "The capital of France is Paris, and that of Italy is Rome. Naïve cafés cost 5 € in 2024; " * 4


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("logprobs")
    write_tiny_model(folder / "model")
    model = {"path": "model", "weights": "plain"}
    with two_nodes(folder, model, NUM_LAYERS, links={"wire": "f32"}, ring={"prefix_reuse": False}) as ring:
        yield ring


@pytest.fixture(scope="module")
def reference(ring: TwoNodes) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(ring.folder / "model")
    return model.eval()


def _post(ring: TwoNodes, body: dict[str, Any], path: str = "completions") -> str:
    request = urllib.request.Request(
        f"{ring.api}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=400) as response:
        return str(response.read().decode())


def _choice(ring: TwoNodes, body: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = json.loads(_post(ring, {"temperature": 0, **body}))["choices"][0]
    return choice


def _log_softmax(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """Return row i: what comes after token i."""
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([list(tokens)])).logits[0].float(), -1)


def _check(model: PreTrainedModel, tokens: Sequence[int], logprobs: dict[str, Any]) -> None:
    """See that each token has its value, and that the likeliest one is beside it."""
    right = _log_softmax(model, tokens)
    assert [len(values) for values in logprobs.values()] == [len(tokens)] * 4
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    expected = right[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert (torch.tensor(logprobs["token_logprobs"][1:]) - expected).abs().max() < TOLERANCE
    likeliest = torch.tensor([max(top.values()) for top in logprobs["top_logprobs"][1:]])
    assert (likeliest - right[:-1].max(-1).values).abs().max() < TOLERANCE


def test_a_prompt_of_several_chunks_is_scored_as_transformers_does(ring: TwoNodes, reference: PreTrainedModel) -> None:
    body = {"prompt": LONG, "echo": True, "logprobs": 3, "max_tokens": 1}
    others: list[dict[str, Any]] = []
    other = threading.Thread(target=lambda: others.append(_choice(ring, {"prompt": TEXT, "max_tokens": 20})))
    other.start()
    choice = _choice(ring, body)
    other.join()
    (answer,) = _choice(ring, {"prompt": LONG, "max_tokens": 1, "logprobs": 0})["logprobs"]["tokens"]
    assert choice["logprobs"]["tokens"][-1] == answer
    likeliest = int(_log_softmax(reference, LONG)[-1].argmax())
    _check(reference, [*LONG, likeliest], choice["logprobs"])
    assert _choice(ring, {**body, "max_tokens": 0})["logprobs"] == {
        name: values[:-1] for name, values in choice["logprobs"].items()
    }, "the same request gives the same bits"
    assert others[0]["text"] == _choice(ring, {"prompt": TEXT, "max_tokens": 20})["text"]
    deadline = time.monotonic() + 30
    while ring.metric("mdiq_kv_reserved_tokens") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ring.metric("mdiq_kv_reserved_tokens") == 0


def test_a_text_comes_back_with_its_tokens_and_their_places(ring: TwoNodes) -> None:
    choice = _choice(ring, {"prompt": TEXT, "echo": True, "logprobs": 0, "max_tokens": 0})
    assert choice["text"] == TEXT
    data = TEXT.encode()
    assert len(choice["logprobs"]["tokens"]) == len(data), "its tokens are bytes"
    starts = [len(data[:i].decode(errors="ignore")) for i in range(len(data))]
    assert choice["logprobs"]["text_offset"] == starts


def test_a_stream_gives_the_values_of_the_whole_answer(ring: TwoNodes) -> None:
    body = {"prompt": LONG[:40], "max_tokens": 12, "temperature": 1.0, "seed": 4, "logprobs": 2, "echo": True}
    whole = _choice(ring, body)
    lines = [line[6:] for line in _post(ring, {**body, "stream": True}).split("\n\n") if line.startswith("data: {")]
    chunks = [json.loads(line)["choices"][0] for line in lines]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for chunk in chunks if chunk["logprobs"] for value in chunk["logprobs"][name]] == values


def test_values_are_those_before_temperature_and_filters(ring: TwoNodes) -> None:
    body = {"prompt": LONG[:40], "max_tokens": 1, "logprobs": 5}
    greedy = _choice(ring, body)["logprobs"]["top_logprobs"]
    drawn = _choice(ring, {**body, "temperature": 1.5, "top_k": 1, "seed": 3, "repetition_penalty": 1.3})
    assert {k: v for k, v in drawn["logprobs"]["top_logprobs"][0].items() if k in greedy[0]} == greedy[0]


def test_a_node_that_dies_meanwhile_changes_no_value(ring: TwoNodes) -> None:
    body = {"prompt": LONG * 6, "echo": True, "logprobs": 1, "max_tokens": 3}
    right = _choice(ring, body)
    recoveries = ring.metric("mdiq_recoveries_total")
    killer = threading.Thread(target=_kill_when_it_runs, args=(ring,))
    killer.start()
    found = _choice(ring, body)
    killer.join()
    assert ring.metric("mdiq_recoveries_total") == recoveries + 1
    assert "ring_has_replayed" in ring.log_of("serve"), "it was killed while the request ran"
    assert found == right


def _kill_when_it_runs(ring: TwoNodes) -> None:
    deadline = time.monotonic() + 60
    while not ring.metric("mdiq_kv_reserved_tokens") and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # some of its chunks have come back
    ring.replace_second()


def test_a_real_models_log_likelihoods_equal_those_of_transformers(tmp_path: Path, qwen_model: Path) -> None:
    model = {"path": str(qwen_model), "weights": "plain"}
    with two_nodes(tmp_path, model, 24, links={"wire": "f32"}) as ring:
        choice = _choice(ring, {"prompt": TEXT, "echo": True, "logprobs": 1, "max_tokens": 1})
    reference = AutoModelForCausalLM.from_pretrained(
        str(qwen_model.parent), gguf_file=qwen_model.name, dtype=torch.float32
    ).eval()
    tokens = Tokenizer.load(qwen_model).encode(TEXT)
    tokens.append(int(_log_softmax(reference, tokens)[-1].argmax()))
    _check(reference, tokens, choice["logprobs"])
    assert choice["logprobs"]["tokens"][:4] == ["The", " capital", " of", " France"]
