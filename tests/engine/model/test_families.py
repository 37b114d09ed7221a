"""Every family row gives the tokens that transformers gives for the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdiq.core.types import LayerRange
from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.runner import StageRunner
from mdiq.errors import ModelError, SequenceError
from tests.engine.tiny_models import (
    MODELS,
    PROMPTS,
    Chain,
    assert_gives_reference_tokens,
    make_model,
    reference_tokens,
)


@pytest.mark.parametrize("name", MODELS)
def test_a_family_gives_the_reference_tokens(name: str, tmp_path: Path) -> None:
    assert_gives_reference_tokens(name, tmp_path, [([4], 1000), ([1, 2, 1], 7)])


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2"])
def test_bf16_stays_near_the_reference(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path)
    chain = Chain.load(tmp_path, [2, 2], dtype="bf16")
    expected, _ = reference_tokens(model, PROMPTS[2], 1)
    # bf16 keeps 8 bits: only a clear winner is sure to win, so the first token of one prompt is the check.
    assert chain.generate({2: PROMPTS[2]}, 1)[2] == expected


def test_a_sharded_checkpoint_equals_the_single_file(tmp_path: Path) -> None:
    model = make_model("llama-gqa-tied")
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    with open_checkpoint(tmp_path / "single") as single, open_checkpoint(tmp_path / "sharded") as sharded:
        assert single.digest == sharded.digest
        for i in range(4):
            for role, matrix in single.layer(i).matrices.items():
                assert torch.equal(matrix, sharded.layer(i).matrices[role])


def test_a_stage_reads_only_its_own_layers(tmp_path: Path) -> None:
    """The other layers' tensors are damaged in shape, and nobody notices."""
    make_model("llama-gqa-tied").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in tensors:
        if "layers.1." not in name and "layers.2." not in name:
            tensors[name] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    arguments = {"owns_embedding_and_head": False, "kv_tokens": 64}
    StageRunner.load(tmp_path, LayerRange(1, 3), is_last=False, **arguments)
    with pytest.raises(ModelError, match=r"layers\.0\..* has shape \[1\]"):
        StageRunner.load(tmp_path, LayerRange(0, 3), is_last=False, **arguments)


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_every_process_finds_the_same_digest(name: str, tmp_path: Path) -> None:
    """Sets print in another order in every process, as strings are hashed with another seed."""
    make_model(name).save_pretrained(tmp_path)
    code = "import sys, pathlib; from mdiq.engine.formats.checkpoint import open_checkpoint; "
    code += "print(open_checkpoint(pathlib.Path(sys.argv[1])).digest)"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(digests) == 1


def test_another_model_than_the_starters_is_refused(tmp_path: Path) -> None:
    make_model("qwen3").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not the starter's model"):
        StageRunner.load(
            tmp_path,
            LayerRange(0, 4),
            is_last=True,
            owns_embedding_and_head=False,
            kv_tokens=64,
            digest="0" * 64,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "models of type 'mamba' are not supported; use one of llama"),
        ({"model_type": None}, "models of type '' are not supported"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers is 'four'; expected int"),
        ({"num_attention_heads": 0}, "num_heads is 0"),
        ({"num_key_value_heads": 4}, "6 heads do not share 4 KV heads"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_parameters": [1]}, "rope_scaling is not an object"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000"),
        ({"intermediate_size": 96}, r"has shape \[80, 48\] and the config calls for \[96, 48\]"),
    ],
)
def test_a_config_that_cannot_be_served_says_why(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    make_model("llama-gqa-tied").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=message), open_checkpoint(tmp_path) as checkpoint:
        checkpoint.layer(0)


def test_missing_and_damaged_files_say_where(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere.gguf: cannot be read"):
        open_checkpoint(tmp_path / "nowhere.gguf")
    with pytest.raises(ModelError, match=r"config.json: No such file"):
        open_checkpoint(tmp_path)
    make_model("gpt2").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=r"model.safetensors: cannot be read"):
        open_checkpoint(tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"a .bin file can run code"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(ModelError, match="not a file name of this directory"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="not JSON"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("wrong", [97, 2**31, -1])
def test_a_token_id_without_an_embedding_is_refused_for_its_sequence_alone(wrong: int, tmp_path: Path) -> None:
    model = make_model("llama-gqa-tied")
    model.save_pretrained(tmp_path)
    chain = Chain.load(tmp_path, [4])
    pieces = [(0, 0, PROMPTS[0]), (1, 0, [3, wrong, 4]), (2, 0, PROMPTS[2])]
    with pytest.raises(SequenceError, match=f"token id {wrong} is not one of the model's 97") as caught:
        chain.forward(pieces)
    assert caught.value.seq_ids == (1,)
    expected = [reference_tokens(model, PROMPTS[i], 1)[0][0] for i in (0, 2)]
    assert chain.forward([pieces[0], pieces[2]]) == expected


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ((1, 5, [3, 4]), "sequence 1: 0 tokens are cached, a segment begins at 5"),
        ((1, 0, [3] * 1_024), "sequence 1: KV cache: 32 blocks are needed and 31 are free"),
    ],
)
def test_a_sequence_out_of_order_or_without_room_is_refused_alone(
    piece: tuple[int, int, list[int]], message: str, tmp_path: Path
) -> None:
    model = make_model("llama-gqa-tied")
    model.save_pretrained(tmp_path)
    chain = Chain.load(tmp_path, [4])
    pieces = [(0, 0, PROMPTS[0]), piece, (2, 0, PROMPTS[2])]
    with pytest.raises(SequenceError, match=message) as caught:
        chain.forward(pieces)
    assert caught.value.seq_ids == (1,)
    expected = [reference_tokens(model, PROMPTS[i], 1)[0][0] for i in (0, 2)]
    assert chain.forward([pieces[0], pieces[2]]) == expected
