"""lm-evaluation-harness, as it is, on a task from local data: its log-likelihoods equal those of transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from mdiq.core.known_models import QWEN_CODER_0_5B
from tests.integration.two_nodes import two_nodes
from tests.real_models import fetched

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]

TOLERANCE = 5e-3
"""In nats, of a whole continuation."""
QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "London", "a kind of cheese"], "answer": 0},
    {"question": "def add(a, b):\n    return", "choices": ["a - b", "a + b", "print"], "answer": 1},
    {
        "question": "Water boils at a hundred degrees",
        "choices": ["Celsius", "below zero", "in cafés €"],
        "answer": 0,
    },
    {"question": "One, two, three,", "choices": ["seven", "four", "one"], "answer": 1},
]
TASK = {
    "task": "local_choices",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def _samples(folder: Path, api: str, tokenizer: Path, batch_size: int) -> list[dict[str, Any]]:
    """Run the harness; return its records of the questions, in their order."""
    out = folder / f"out{batch_size}"
    url = f"base_url={api}/v1/completions"
    arguments = f"model=qwen,{url},tokenizer_backend=huggingface,tokenizer={tokenizer},num_concurrent=2,max_retries=1"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    command += ["--include_path", str(folder / "tasks"), "--tasks", "local_choices", "--batch_size", str(batch_size)]
    command += ["--output_path", str(out), "--log_samples"]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **offline})
    assert done.returncode == 0, done.stderr[-3_000:]
    (file,) = out.rglob("samples_local_choices_*.jsonl")
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda record: record["doc_id"])


def test_a_log_likelihood_task_gives_what_transformers_gives(tmp_path: Path) -> None:
    model = fetched(QWEN_CODER_0_5B)
    tasks, tokenizer_folder = tmp_path / "tasks", tmp_path / "tokenizer"
    tasks.mkdir()
    data = tasks / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tasks / "task.yaml").write_text(yaml.safe_dump({**TASK, "dataset_kwargs": {"data_files": {"test": str(data)}}}))
    tokenizer = AutoTokenizer.from_pretrained(str(model.parent), gguf_file=model.name)
    tokenizer.save_pretrained(tokenizer_folder)
    with two_nodes(
        tmp_path, {"path": str(model), "name": "qwen", "weights": "plain"}, 24, links={"wire": "f32"}
    ) as ring:
        runs = [_samples(tmp_path, ring.api, tokenizer_folder, batch_size) for batch_size in (1, 4)]
    reference = AutoModelForCausalLM.from_pretrained(str(model.parent), gguf_file=model.name, dtype=torch.float32)
    for samples in runs:
        assert len(samples) == len(QUESTIONS)
        for question, sample in zip(QUESTIONS, samples, strict=True):
            for choice, found in zip(question["choices"], sample["filtered_resps"], strict=True):
                context = tokenizer.encode(question["question"])
                whole = tokenizer.encode(f"{question['question']} {choice}")
                with torch.inference_mode():
                    logits = reference(torch.tensor([whole])).logits[0, len(context) - 1 : -1].float()
                right = torch.log_softmax(logits, -1)
                ids = torch.tensor(whole[len(context) :])
                expected = float(right.gather(1, ids[:, None]).sum())
                assert abs(float(found[0]) - expected) < TOLERANCE, (question, choice)
                assert str(found[1]) == str(bool((right.argmax(-1) == ids).all()))
