"""`mdiq run` as a user meets it: figures, signals, hostile frames, and everything that can be wrong with the input."""

import json
import os
import random
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest
import zmq

from tests.integration.conftest import Finished, mdiq_command, run_mdiq, write_prompts

MARK = "MDIQ_TEST_RUN"


@pytest.fixture(scope="module", autouse=True)
def mark() -> Iterator[str]:
    """A mark in the environment of all that this file starts: other tests have processes of their own meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, uuid.uuid4().hex)
        yield os.environ[MARK]


def test_the_first_command_of_the_readme_answers() -> None:
    done = run_mdiq("run", "Why is the sky blue?", "--max-tokens", "120", "--json")
    assert done.code == 0, done.errors
    assert "scattering" in done.results[0]["text"]
    assert [node["layers"] for node in done.summary["nodes"]] == [[0, 11], [11, 30]]
    for node in done.summary["nodes"]:
        assert node["rss_bytes"] > node["weight_bytes"] > 0
        assert 0 < node["busy_share"] < 1
        assert node["bytes_in"] > 0 and node["bytes_out"] > 0
        assert node["frames_dropped"] == {}


def test_the_trace_shows_neighbours_computing_at_the_same_time(tmp_path: Path) -> None:
    requests = [{"prompt": f"Story number {i}:"} for i in range(6)]
    prompts, trace = write_prompts(tmp_path / "6.jsonl", requests), tmp_path / "trace.json"
    done = run_mdiq(
        "run", "--prompts", prompts, "--nodes", "3", "--max-tokens", "32", "--ignore-eos", "--trace", trace, "--json"
    )
    assert done.code == 0, done.errors
    events = json.loads(trace.read_text())["traceEvents"]
    rows = {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    assert rows == {(pid, loop) for pid in range(3) for loop in ("compute", "receive", "send")}
    # How large the share is depends on what else the machine does; a ring that runs one sample at a time has none, as
    # the run of a lone one shows. Its prompt is one chunk: those of a longer one follow each other round the ring.
    assert all(node["overlap_share"] > 0.02 for node in done.summary["nodes"]), done.summary["nodes"]
    arguments = ("--nodes", "3", "--max-tokens", "16", "--ignore-eos", "--trace", trace, "--json")
    alone = run_mdiq("run", "Hi", "--raw", *arguments)
    assert all(node["overlap_share"] < 0.02 for node in alone.summary["nodes"]), alone.summary["nodes"]


def test_a_results_file_goes_on_where_it_stopped(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "in.jsonl", [{"prompt": f"Number {i}", "max_tokens": 4} for i in range(5)])
    out = tmp_path / "out.jsonl"
    assert run_mdiq("run", "--prompts", prompts, "--out", out).code == 0
    whole = {line["index"]: line["token_ids"] for line in map(json.loads, out.read_text().splitlines())}
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:2]) + lines[2][:30])  # a crash cut the third line
    assert run_mdiq("run", "--prompts", prompts, "--out", out).code == 2  # never overwrites by itself
    assert run_mdiq("run", "--prompts", prompts, "--out", out, "--resume").code == 0
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(again) == 5 and {line["index"]: line["token_ids"] for line in again} == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_process_and_leaves_none_behind(number: signal.Signals) -> None:
    command = mdiq_command("run", "Tell me a long story.", "--nodes", "3", "--max-tokens", "4000", "--ignore-eos")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.read(20)  # it answers
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 2
        process.send_signal(number)
        process.wait(10)
    assert process.returncode == 128 + number
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_nodes_that_die_one_after_the_other_cost_time_and_not_a_token(tmp_path: Path) -> None:
    """Greedy and drawn; the first answer that ends says when the others are under way."""
    requests: list[dict[str, object]] = [{"prompt": "Once", "max_tokens": 20}]
    for i in range(4):
        draws: dict[str, object] = {"temperature": 0.9, "seed": i} if i % 2 else {}
        requests.append({"prompt": f"Tell me a long story. ({i})", "max_tokens": 120, **draws})
    prompts = write_prompts(tmp_path / "in.jsonl", requests)
    arguments = ("run", "--prompts", prompts, "--nodes", "3", "--threads", "1", "--ignore-eos", "--json")
    calm = run_mdiq(*arguments)
    with subprocess.Popen(mdiq_command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline()
        pauses = []
        for name in ("node-1", "node-2"):
            (victim,) = [child for child in psutil.Process(process.pid).children() if name in child.cmdline()]
            victim.kill()
            pauses.append(process.stderr.readline().decode())
            while "ring_goes_on" not in (line := process.stderr.readline().decode()):
                assert line, "it has ended"
        out = first + process.stdout.read()
        process.wait(60)
    assert process.returncode == 0
    lines = [json.loads(line) for line in out.splitlines()]
    answers = {line["index"]: line["token_ids"] for line in lines if "index" in line}
    assert answers == {index: result["token_ids"] for index, result in calm.results.items()} and len(answers) == 5
    for name, pause in zip(("node-1", "node-2"), pauses, strict=True):
        assert f"{name}: its process ended with signal 9" in pause, pause


def test_thousands_of_hostile_frames_are_counted_drops(tmp_path: Path) -> None:
    """3,000 random and 3,000 near-miss frames at the port of a serving node; its answers stay the same.

    Each of 20,000 is accounted for in tests/runtime/test_hostile_peer.py.
    """
    base = _free_ports(2)
    prompts = write_prompts(tmp_path / "in.jsonl", [{"prompt": "Once upon a time"}])
    arguments = ("run", "--prompts", prompts, "--max-tokens", "300", "--ignore-eos", "--json")  # while most come
    calm = run_mdiq(*arguments)
    rng = random.Random(1)
    with (
        subprocess.Popen(
            mdiq_command(*arguments, "--base-port", str(base)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
        zmq.Context() as context,
        context.socket(zmq.PUSH) as push,
    ):
        push.setsockopt(zmq.LINGER, 2_000)
        push.setsockopt(zmq.SNDTIMEO, 60_000)
        push.connect(f"tcp://127.0.0.1:{base + 1}")  # frames queue until the node listens
        for i in range(6_000):
            body = rng.randbytes(rng.randrange(120))
            push.send_multipart([body] if i % 2 else [b"MQ1\x01" + body, rng.randbytes(2_304)])
        out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[0]["token_ids"] == calm.results[0]["token_ids"]
    dropped = lines[1]["summary"]["nodes"][1]["frames_dropped"]
    assert sum(dropped.values()) > 3_000, dropped


def _free_ports(count: int) -> int:
    """Return the first of ``count`` neighbouring ports that are free now."""
    for base in range(42_000, 60_000, 10):
        try:
            for port in range(base, base + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return base
    raise AssertionError("no free ports")


@pytest.fixture
def used_port() -> Iterator[int]:
    base = _free_ports(2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", base + 1))
        listener.listen()
        yield base


def _one_line(done: Finished, code: int, *words: str) -> None:
    lines = done.errors.strip().splitlines()
    assert done.code == code, done.errors
    assert len(lines) == 1 and lines[0].startswith("mdiq: "), done.errors
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "/no/such.gguf"), ("/no/such.gguf", "no such file")),
        (("--model", "unheard-of"), ("unheard-of", "smollm2-135m-instruct")),
        (("--layers", "10,12"), ("these cover 22 layers", "30")),
        (("--layers", "10,x"), ("10,12,8",)),
        (("--nodes", "31"), ("30 layers",)),
        (("--temperature", "-1"), ("temperature", "0 (greedy) or more")),
        (("--dtype", "f32", "--device", "cuda:7"), ("cuda:7",)),
        (("--prompts", "/no/such.jsonl"), ("one of them",)),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    _one_line(run_mdiq("run", "hi", *arguments), 2, *words)


def test_a_truncated_gguf_says_where_it_ends(real_model: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    with real_model.open("rb") as file:
        data = file.read(40_000_000)
    for size, words in (40_000_000, ("truncated", "file at 40000000")), (1_000_000, ("truncated",)), (3, ("GGUF",)):
        cut.write_bytes(data[:size])
        _one_line(run_mdiq("run", "hi", "--model", cut), 2, str(cut), *words)


def test_an_unsupported_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mamba.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _one_line(run_mdiq("run", "hi", "--model", path), 2, "mamba", "llama, mistral, qwen2, qwen3, gpt2")


def test_a_prompt_longer_than_the_context_harms_no_other(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "in.jsonl", [{"prompt_token_ids": [5] * 8_192}, {"prompt": "Hello"}])
    done = run_mdiq("run", "--prompts", prompts, "--max-tokens", "4", "--json")
    assert done.code == 1
    assert "8192 tokens leave no room for an answer in the context of 8192" in done.results[0]["error"]
    assert len(done.results[1]["token_ids"]) == 4


def test_too_little_memory_for_the_kv_cache_is_one_line(real_model: Path) -> None:
    _one_line(run_mdiq("run", "hi", "--kv-tokens", "1000000000"), 1, "KV cache", "lower --kv-tokens")
    _one_line(run_mdiq("run", "hi " * 100, "--kv-tokens", "64"), 1, "KV cache", "shorten the prompt")


def test_a_port_in_use_is_one_line_that_names_the_node(used_port: int) -> None:
    _one_line(run_mdiq("run", "hi", "--base-port", str(used_port)), 1, "node-1", str(used_port + 1), "in use")


def test_bad_lines_of_a_prompts_file_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": 5}\nnot json\n{"prompt": "x", "temperature": "hot"}\n')
    done = run_mdiq("run", "--prompts", path)
    assert done.code == 2
    for number in 2, 3, 4:
        assert f"in.jsonl:{number}: " in done.errors


def _has(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark
    except psutil.Error:  # another user's, or it has just ended
        return False


def test_no_process_is_left_of_all_these_runs(mark: str) -> None:
    with subprocess.Popen(["sleep", "60"]) as left:
        assert [process.pid for process in psutil.process_iter() if _has(process, mark)] == [left.pid]
        left.kill()
    time.sleep(0.5)
    assert [process for process in psutil.process_iter() if _has(process, mark)] == []
