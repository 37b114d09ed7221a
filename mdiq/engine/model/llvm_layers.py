"""Layers as one call of compiled code: a decoded token of a small model costs more in calls than in maths.

A Layer of SmolLM2 is some 20 calls of torch and of compiled functions, of which the matmuls were a third of the time.
Here all Layers of a Stage are a program, which each thread goes through; they wait for each other between its steps
without Python. See llvm_layers_code.py.
"""

import struct
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from itertools import accumulate

import torch

from mdiq.engine.kernels.linear import Linear, StackedLinear
from mdiq.engine.kernels.llvm_matmul import CompiledMatmul, compiled
from mdiq.engine.kernels.llvm_words import LANES, Word
from mdiq.engine.model.kv_cache import KvCache
from mdiq.engine.model.layers import (
    ActivateUp,
    AddChange,
    LookBack,
    Multiply,
    Norm,
    Normalize,
    Rotate,
    Rows,
    Step,
)
from mdiq.engine.model.llvm_activation import CompiledActivation
from mdiq.engine.model.llvm_attention import CompiledAttention, CompiledBatch
from mdiq.engine.model_config import ModelConfig

_FLOAT_BYTES = 4
_MAX_THREADS = 256
_STEP_WORDS = 3  # before what a step's function reads: see llvm_layers_code.py


class CompiledLayers:
    """Consecutive Layers of a Stage, all of their matrices in compiled kernels, in f32 on the CPU.

    They compute what layers.run_layer does, from the same steps. A token gets the same bits in any company and with any
    number of threads.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[Sequence[Step]],
        *,
        first_in_cache: int,
        attention: CompiledAttention,
        activation: CompiledActivation,
    ) -> None:
        """Write the program of Layers, each in its steps. first_in_cache: the first one's number in the KV cache.

        Raises:
            RuntimeError: some of it cannot be compiled, or not for such shapes.
        """
        self._machine = compiled("llvm_layers_code")
        if config.hidden_size % LANES:
            raise RuntimeError(f"rows of {config.hidden_size} are no multiple of {LANES}")
        self._config, self._layers = config, tuple(layers)  # what lies at addresses lives as long as this does
        self._attention, self._activation = attention, activation
        heads = config.num_heads + 2 * config.num_kv_heads
        self._widths = {
            **dict.fromkeys((Rows.HIDDEN, Rows.NORMED, Rows.CHANGE), config.hidden_size),
            Rows.QKV: heads * config.head_dim,
            Rows.FOUND: config.num_heads * config.head_dim,
            Rows.UP: config.mlp_size * (2 if config.family.is_gated else 1),
            Rows.ACTIVE: config.mlp_size,
        }
        self._words: list[int] = []
        self._num_steps = 0
        self._rounded_bytes = 0
        for i, steps in enumerate(self._layers, first_in_cache):
            for step in steps:
                self._write(step, i)
        self._program = torch.tensor(self._words)
        self._run = self._machine.function("run", 2, 3)
        # UP lies where QKV and FOUND were: nobody reads them any more then.
        widths, places, end = self._widths, {}, 0
        for rows in (Rows.NORMED, Rows.CHANGE, Rows.ACTIVE, Rows.QKV, Rows.FOUND):
            places[Word[rows.name]] = end
            end += widths[rows]
        places[Word.UP] = places[Word.QKV]
        self._places = places  # in floats of one row
        self._row_floats = max(end, places[Word.UP] + widths[Rows.UP])

    @staticmethod
    def fits(steps: Sequence[Step]) -> bool:
        """Tell whether a Layer's matrices all are in compiled kernels, which does not depend on what was measured."""
        return all(_matmuls(step.linear) is not None for step in steps if isinstance(step, Multiply))

    def run(
        self,
        hidden: torch.Tensor,
        batch: CompiledBatch,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        cache: KvCache,
    ) -> torch.Tensor:
        """Return hidden, f32 [T, hidden_size], after these Layers; ``angles`` as Rope.tables has them."""
        num_rows, num_threads = len(hidden), min(torch.get_num_threads(), _MAX_THREADS)
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        rows = torch.empty(num_rows, self._row_floats)
        rounded = torch.empty(num_rows, self._rounded_bytes, dtype=torch.uint8)
        arrivals = torch.zeros(1, dtype=torch.int64)
        bounds = batch.bounds(num_threads)
        words = [0] * len(Word)
        words[Word.NUM_ROWS] = num_rows
        words[Word.ARRIVALS] = arrivals.data_ptr()
        if angles is not None:
            angles = (angles[0].contiguous(), angles[1].contiguous())
            words[Word.COS], words[Word.SIN] = (table.data_ptr() for table in angles)
        words[Word.SLOTS] = batch.slots
        words[Word.POOLS] = cache.addresses.data_ptr()
        words[Word.READS], words[Word.WIDTH] = batch.reads.data_ptr(), batch.width
        words[Word.BOUNDS] = bounds.data_ptr()
        words[Word.SCORES], words[Word.SCORE_BYTES] = batch.scores.data_ptr(), batch.scores[0].nbytes
        words[Word.HIDDEN], words[Word.ROUNDED] = hidden.data_ptr(), rounded.data_ptr()
        for word, place in self._places.items():
            words[word] = rows.data_ptr() + _FLOAT_BYTES * place * num_rows
        record = torch.tensor(words)
        given = (self._program.data_ptr(), record.data_ptr(), self._num_steps)
        if num_threads == 1:
            self._run(*given, 0, 1)
            return hidden
        others: list[Future[None]] = []
        try:
            for thread in range(1, num_threads):
                others.append(self._threads.submit(self._run, *given, thread, num_threads))
            self._run(*given, 0, num_threads)
        except RuntimeError:  # no thread can be started: those that run wait for nobody any more, and end
            arrivals.fill_(1 << 62)
            raise
        finally:
            wait(others)  # they write to what is freed after this
        return hidden

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        """Of these Layers alone: threads that wait for each other must all run."""
        return ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="layers")  # it starts what it needs

    def _write(self, step: Step, place: int) -> None:
        """Write a step of a Layer, which has this place in the KV cache; see layers.run_layer."""
        config = self._config
        head_bytes = _FLOAT_BYTES * config.head_dim
        qkv = (Word.QKV, _FLOAT_BYTES * self._widths[Rows.QKV])
        match step:
            case Normalize(norm, source, target, None):
                self._norm(norm, source, target)
            case Normalize(norm, source, target, range(start=first, stop=stop)):
                self._norm(norm, source, target, count=stop - first, before=head_bytes * first)
            case Multiply(linear, source, target):
                self._matmul(linear, source, target)
            case Rotate():
                self._step("rotate", *qkv, config.num_heads + config.num_kv_heads, config.head_dim // 2)
            case LookBack(window):
                kv_width = config.num_kv_heads * config.head_dim
                self._step("store", *qkv, head_bytes * config.num_heads, kv_width, place, waits=True)
                found = (Word.FOUND, head_bytes * config.num_heads)
                sizes = (config.num_kv_heads, window, place)
                self._step("attend", self._attention.machine.address("attend"), *qkv, *found, *sizes, waits=True)
            case ActivateUp():
                up_bytes = _FLOAT_BYTES * self._widths[Rows.UP]
                activate = self._activation.machine.address("activate")
                self._step("activate", activate, Word.UP, up_bytes, Word.ACTIVE, config.mlp_size)
            case AddChange():
                self._step("add", Word.CHANGE, config.hidden_size)

    def _norm(self, norm: Norm, source: Rows, target: Rows, *, count: int = 1, before: int = 0) -> None:
        bias = 0 if norm.bias is None else norm.bias.data_ptr()
        (eps,) = struct.unpack("<i", struct.pack("<f", norm.eps))
        row_bytes = (_FLOAT_BYTES * self._widths[rows] for rows in (source, target))
        name = "rms_norm" if norm.bias is None else "layer_norm"
        places = (Word[source.name], Word[target.name], norm.weight.data_ptr(), bias, eps)
        self._step(name, *places, len(norm.weight), count, *row_bytes, before)

    def _matmul(self, linear: Linear, source: Rows, target: Rows) -> None:
        """Write a matmul: threads wait before it, since it reads whole rows, and after it."""
        matmuls = _matmuls(linear)
        assert matmuls is not None  # the caller asks fits first
        width = sum(matmul.num_out for matmul in matmuls)
        *before, total = accumulate((matmul.row_bytes for matmul in matmuls), initial=0)
        columns = accumulate((matmul.num_out for matmul in matmuls), initial=0)
        self._rounded_bytes = max(self._rounded_bytes, total)
        last = matmuls[-1]
        for matmul, at in zip(matmuls, before, strict=True):
            prepare = matmul.machine.address("prepare")
            self._step("prepare", prepare, matmul.words.data_ptr(), Word[source.name], at, waits=matmul is last)
        for matmul, at, column in zip(matmuls, before, columns, strict=False):
            multiply = matmul.machine.address("multiply")
            bias = 0 if matmul.bias is None else matmul.bias.data_ptr()
            place = (Word[target.name], width, column, matmul.num_out, bias)
            self._step("multiply", multiply, matmul.words.data_ptr(), at, *place, waits=matmul is last)

    def _step(self, name: str, *words: int, waits: bool = False) -> None:
        self._words += [self._machine.address(name), _STEP_WORDS + len(words), int(waits), *words]
        self._num_steps += 1


def _matmuls(linear: Linear) -> list[CompiledMatmul] | None:
    """Return the compiled matmuls that a matrix is made of, one above the other, or None where it has others."""
    parts = linear.parts if isinstance(linear, StackedLinear) else [linear]
    found = [part for part in parts if isinstance(part, CompiledMatmul) and part.num_padded == part.num_out]
    return found if len(found) == len(parts) else None
