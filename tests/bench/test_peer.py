"""The peer's process, and the peer's program on a llama_cpp that only keeps books."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mdiq.bench.peer import PROGRAM, Peer
from mdiq.bench.workload import Load
from mdiq.errors import ConfigError, RingError

LLAMA_CPP = '''
"""Says that the token after t is t + 1, and writes down every batch."""
import ctypes, json, os
VOCAB = 50
__version__ = "0"
class Batch:
    def __init__(self, size):
        self.n_tokens = 0
        self.token, self.pos, self.n_seq_id, self.logits = [0] * size, [0] * size, [0] * size, [0] * size
        self.seq_id = [[0] for _ in range(size)]
class Params: pass
llama_log_callback = lambda f: f
llama_log_set = lambda *a: None
llama_backend_init = lambda: None
llama_model_default_params = llama_context_default_params = Params
llama_model_load_from_file = lambda path, params: path != b"missing.gguf" and "model"
def llama_init_from_model(model, params):
    note({"n_ctx": params.n_ctx, "n_seq_max": params.n_seq_max, "n_threads": params.n_threads})
    return "context"
llama_model_get_vocab = lambda model: "vocab"
llama_vocab_n_tokens = lambda vocab: VOCAB
llama_batch_init = lambda size, embd, seqs: Batch(size)
llama_get_memory = lambda context: "memory"
llama_memory_clear = lambda memory, data: note("clear")
def note(value):
    with open(os.environ["BOOKS"], "a") as file:
        file.write(json.dumps(value) + "\\n")
def llama_decode(context, batch):
    global rows
    rows = {}
    n = batch.n_tokens
    note([[batch.seq_id[i][0], batch.pos[i], batch.token[i], bool(batch.logits[i])] for i in range(n)])
    for i in range(n):
        if batch.logits[i]:
            rows[i] = (ctypes.c_float * VOCAB)(*[float(t == (batch.token[i] + 1) % VOCAB) for t in range(VOCAB)])
    return 0
def llama_get_logits_ith(context, row):
    return ctypes.cast(rows[row], ctypes.POINTER(ctypes.c_float))
'''


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("BOOKS", str(tmp_path / "books"))
    return tmp_path / "books"


def make_peer(model: str = "model.gguf", **changes: object) -> Peer:
    return Peer(**{"python": sys.executable, "model": Path(model), "vocab_size": 50, **changes})  # type: ignore[arg-type]


def read(books: Path) -> list[Any]:
    return [json.loads(line) for line in books.read_text().splitlines()]


async def test_every_user_gets_the_tokens_asked_for_in_shared_batches(books: Path) -> None:
    load = Load(users=3, prompt_tokens=5, answer_tokens=4)
    users, rss = await make_peer().run(2, load)
    assert [len(user.tokens_s) for user in users] == [4, 4, 4]
    assert all(user.submitted_s <= user.tokens_s[0] for user in users)
    assert 0 < rss < 200 << 20  # its own alone: this process, with torch, has more
    context, *lines = read(books)
    assert context == {"n_ctx": 3 * 256, "n_seq_max": 3, "n_threads": 2}
    # What was warmed up is forgotten; then one batch of all prompts and one for each further token of all users.
    measured = lines[len(lines) - lines[::-1].index("clear") :]
    assert [len(batch) for batch in measured if batch != "clear"] == [15, 3, 3, 3]
    for user, prompt in enumerate(load.prompts(50)):
        taken = [entry for batch in measured for entry in batch if entry[0] == user]
        assert [position for _, position, _, _ in taken] == list(range(8))
        assert [token for _, _, token, _ in taken][:5] == list(prompt)
        assert [token for _, _, token, _ in taken][5:] == [(prompt[-1] + i) % 50 for i in (1, 2, 3)]
        assert [wants for _, _, _, wants in taken] == [False] * 4 + [True] * 4


async def test_prompts_that_fill_a_batch_are_cut(books: Path) -> None:
    users, _ = await make_peer().run(1, Load(users=2, prompt_tokens=1500, answer_tokens=2))
    lines = read(books)
    measured = lines[len(lines) - lines[::-1].index("clear") :]
    # The first user's second token rides with the rest of the other's prompt.
    assert [len(batch) for batch in measured] == [2048, 1 + 952, 1]
    assert [len(user.tokens_s) for user in users] == [2, 2]


async def test_a_model_that_llama_cpp_refuses_is_one_line(books: Path) -> None:
    with pytest.raises(RingError, match="peer llama-cpp: RuntimeError: llama.cpp cannot load missing.gguf"):
        await make_peer("missing.gguf").run(1, Load(1, 2, 1))


async def test_a_missing_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ModuleNotFoundError(\"No module named 'llama_cpp'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigError, match="No module named 'llama_cpp'; install llama-cpp-python"):
        await make_peer().run(1, Load(1, 2, 1))


async def test_a_peer_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import os, sys; sys.stderr.write('one\\nout of memory\\n'); sys.stderr.flush(); os.abort()")
    with pytest.raises(RingError, match="peer llama-cpp: its process ended with signal 6 .*: out of memory"):
        await make_peer(program=program).run(1, Load(1, 2, 1))


async def test_an_interpreter_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ConfigError, match="--peer-python /nowhere/python: No such file"):
        await make_peer(python="/nowhere/python").run(1, Load(1, 2, 1))


def test_the_program_imports_nothing_of_mdiq() -> None:
    # The interpreter that has llama-cpp-python need not have anything else.
    assert "mdiq." not in PROGRAM.read_text(encoding="utf-8")
