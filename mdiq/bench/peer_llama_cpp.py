"""The peer, as a program of its own: llama.cpp under the same load, through the package llama-cpp-python.

It runs in a process of its own, so that neither side's threads and memory disturb the other, and under an interpreter
that may have llama-cpp-python and nothing of mdiq: it imports the standard library, numpy and llama_cpp only.

One JSON object comes on standard input (model, threads, cores, prompts, answer_tokens), one goes to standard output
(submitted_s and tokens_s of each user, rss_bytes, version), or {"error": ...}. Users are sequences of one context, and
every llama_decode carries a token of each user that decodes and as many prompt tokens as fit, as llama.cpp's server
does it. Tokens are greedy and end tokens are ignored.
"""

import contextlib
import json
import os
import sys
import time
from typing import Any

N_BATCH = 2048  # llama.cpp's own default, as is its micro-batch of 512
KV_STEP = 256  # llama.cpp rounds each sequence's share of the cache up to it


def main() -> None:
    """Read the load, run it, write the times."""
    spec = json.loads(sys.stdin.readline())
    try:
        if spec.get("cores"):
            os.sched_setaffinity(0, spec["cores"])
        result = run(spec)
    except Exception as error:  # this is the process's edge: its parent makes one line of it
        result = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(result) + "\n")


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the times of every user."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(spec["model"].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError("llama.cpp cannot load " + spec["model"])
    prompts, answer_tokens = spec["prompts"], spec["answer_tokens"]
    longest = max(len(prompt) for prompt in prompts) + answer_tokens
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = len(prompts) * -(-longest // KV_STEP) * KV_STEP
    params.n_batch = N_BATCH
    params.n_seq_max = len(prompts)
    params.n_threads = params.n_threads_batch = spec["threads"]
    # A cache for each sequence: with a shared one, every token attends over the cells of all users.
    params.kv_unified = spec.get("kv_unified", False)
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp has no memory for {len(prompts)} sequences")
    engine = _Engine(llama_cpp, model, context)
    # The first decode touches every weight, and each batch size makes its buffers: none of that is measured.
    engine.answer([prompt[: max(len(prompt) // 4, 1)] for prompt in prompts], 2)
    submitted_s, tokens_s = engine.answer(prompts, answer_tokens)
    return {
        "submitted_s": [submitted_s] * len(prompts),
        "tokens_s": tokens_s,
        "rss_bytes": _peak_memory(),
        "version": llama_cpp.__version__,
    }


def _peak_memory() -> int:
    """Return the peak resident memory. getrusage would count the parent's, from before this program began."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


class _Engine:
    """A context, and the batch that feeds it."""

    def __init__(self, llama_cpp: Any, model: Any, context: Any) -> None:
        import numpy

        self._lib = llama_cpp
        self._numpy = numpy
        self._context = context
        self._num_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)

    def answer(self, prompts: list[list[int]], answer_tokens: int) -> tuple[float, list[list[float]]]:
        """Answer all prompts at once; return when they were asked, and when each token of each answer came."""
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        known = [list(prompt) for prompt in prompts]
        num_done = [0] * len(prompts)
        tokens_s: list[list[float]] = [[] for _ in prompts]
        submitted_s = time.perf_counter()
        while True:
            rows = self._fill(known, num_done, prompts, tokens_s, answer_tokens)
            if not self._batch.n_tokens:
                return submitted_s, tokens_s
            code = lib.llama_decode(self._context, self._batch)
            if code:
                raise RuntimeError(f"llama_decode gave {code}")
            for user, row in rows:
                known[user].append(self._best(row))
                tokens_s[user].append(time.perf_counter())

    def _fill(
        self,
        known: list[list[int]],
        num_done: list[int],
        prompts: list[list[int]],
        tokens_s: list[list[float]],
        answer_tokens: int,
    ) -> list[tuple[int, int]]:
        """Fill the batch: decoding users first, then prompts. Return (user, row) of the rows that give a token."""
        rows: list[tuple[int, int]] = []
        batch = self._batch
        batch.n_tokens = 0
        users = [user for user in range(len(known)) if len(tokens_s[user]) < answer_tokens]
        for user in sorted(users, key=lambda number: num_done[number] < len(prompts[number])):
            for position in range(num_done[user], len(known[user])):
                at = batch.n_tokens
                if at == N_BATCH:
                    return rows
                batch.token[at] = known[user][position]
                batch.pos[at] = position
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = user
                batch.logits[at] = position == len(known[user]) - 1
                if batch.logits[at]:
                    rows.append((user, at))
                batch.n_tokens += 1
                num_done[user] += 1
        return rows

    def _best(self, row: int) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, row)
        return int(self._numpy.ctypeslib.as_array(logits, (self._num_vocab,)).argmax())


if __name__ == "__main__":
    # llama.cpp writes to file descriptor 1 here and there; the result goes out on a copy of it.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.redirect_stdout(out), out:
        main()
