"""Models of a known shape with random weights, as GGUF files in the cache: nothing is downloaded to measure speed.

What a forward costs depends on the shape and on the number format, not on the weights' values. They are drawn so that
activations stay finite: each matrix keeps the size of what it multiplies. There is no tokenizer; a load is token ids.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np

from mdiq.cache import NO_SPACE, cache_directory, keep, make_room, no_space, put_whole, temporary
from mdiq.errors import ConfigError

FILE_VERSION = 1
"""Part of the file name: a change of what is written here makes a new file."""
SEED = 1
_BLOCK = 32  # weights that share a scale, in Q4_0 and in Q8_0
_Q8_MOST = 127
_Q8_SPREAD = math.sqrt((2 * _Q8_MOST + 1) ** 2 / 12)  # standard deviation of whole numbers from -127 to 127
_Q4_SPREAD = math.sqrt(16**2 / 12)
_CHUNK_BLOCKS = 1 << 20
_TYPES = {8: gguf.GGMLQuantizationType.Q8_0, 4: gguf.GGMLQuantizationType.Q4_0}


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model. is_gpt2: of GPT-2's family (LayerNorm, learned positions, no gate); otherwise Llama's."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    mlp_size: int
    vocab_size: int
    context_tokens: int
    is_tied: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    is_gpt2: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


SHAPES = {
    "tiny": Shape(4, 64, 4, 2, 128, 320, 512),
    "smollm2-135m": Shape(30, 576, 9, 3, 1536, 49_152, 8_192, is_tied=True, rope_theta=100_000.0),
    "tinyllama-1.1b": Shape(22, 2048, 32, 4, 5632, 32_000, 2_048),
    "llama-3.2-1b": Shape(16, 2048, 32, 8, 8192, 128_256, 131_072, is_tied=True, rope_theta=500_000.0),
    "tiny-gpt2": Shape(4, 64, 4, 4, 256, 320, 512, is_gpt2=True),
    # The defaults of transformers' GPT2Config; a test compares.
    "gpt2": Shape(12, 768, 12, 12, 3072, 50_257, 1_024, is_tied=True, is_gpt2=True),
}
MHA = "-mha"
"""A name that ends so is the shape before it with full multi-head attention: as many KV heads as query heads."""


def find_shape(name: str) -> Shape | None:
    """Return the Shape of a name of SHAPES, or of one with MHA at its end; None if there is none."""
    shape = SHAPES.get(name.removesuffix(MHA))
    return shape if shape is None or not name.endswith(MHA) else replace(shape, num_kv_heads=shape.num_heads)


def shape_file(name: str, bits: int = 8, progress: Callable[[str], None] = lambda _: None) -> Path:
    """Return the file of a shape; it is written first if the cache does not hold it, and kept while this process runs.

    bits: 8 (Q8_0) or 4 (Q4_0). progress: called with a text before something that takes long.

    Raises:
        ConfigError: there is no such shape or format, or the cache cannot be written.
        CapacityError: there is no room for it.
    """
    shape = find_shape(name)
    if shape is None:
        raise ConfigError(f"--shape {name}: no such shape; known are {', '.join(SHAPES)}, and each with {MHA}")
    if bits not in _TYPES:
        raise ConfigError(f"--bits {bits}: a shape is written with 8 or 4 bits")
    kind = _TYPES[bits]
    directory = cache_directory() / "shapes"
    path = directory / f"{name}-{kind.name.lower()}-v{FILE_VERSION}.gguf"
    keep(path)
    if path.is_file():
        return path
    num_bytes = sum(_num_bytes(size, kind) for _, size in _tensors(shape))
    if num_bytes > 10 << 20:
        progress(f"writing {path.name} ({num_bytes >> 20} MiB of random weights), once")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        make_room(directory, num_bytes)
        # Beside its destination, and moved when it is whole: another process never sees a part of it.
        with temporary(directory, "write-") as scratch:
            part = scratch / path.name
            _write(part, name, shape, kind)
            put_whole(part, path)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise no_space(directory, num_bytes) from None
        raise ConfigError(
            f"{directory}: {error.strerror or error}; set MDIQ_CACHE to a directory with {num_bytes >> 20} MiB free"
        ) from None
    keep(path)
    return path


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and [rows, columns] of every tensor, in the file's order; norms have one dimension."""
    if shape.is_gpt2:
        yield from _gpt2_tensors(shape)
        return
    hidden, kv_size = shape.hidden_size, shape.num_kv_heads * shape.head_dim
    yield "token_embd.weight", (shape.vocab_size, hidden)
    for i in range(shape.num_layers):
        yield f"blk.{i}.attn_norm.weight", (hidden,)
        yield f"blk.{i}.attn_q.weight", (hidden, hidden)
        yield f"blk.{i}.attn_k.weight", (kv_size, hidden)
        yield f"blk.{i}.attn_v.weight", (kv_size, hidden)
        yield f"blk.{i}.attn_output.weight", (hidden, hidden)
        yield f"blk.{i}.ffn_norm.weight", (hidden,)
        yield f"blk.{i}.ffn_gate.weight", (shape.mlp_size, hidden)
        yield f"blk.{i}.ffn_up.weight", (shape.mlp_size, hidden)
        yield f"blk.{i}.ffn_down.weight", (hidden, shape.mlp_size)
    yield "output_norm.weight", (hidden,)
    if not shape.is_tied:
        yield "output.weight", (shape.vocab_size, hidden)


def _gpt2_tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = shape.hidden_size
    yield "token_embd.weight", (shape.vocab_size, hidden)
    yield "position_embd.weight", (shape.context_tokens, hidden)
    for i in range(shape.num_layers):
        for name, rows, columns in (
            ("attn_norm", hidden, 0),
            ("attn_qkv", 3 * hidden, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_norm", hidden, 0),
            ("ffn_up", shape.mlp_size, hidden),
            ("ffn_down", hidden, shape.mlp_size),
        ):
            yield f"blk.{i}.{name}.weight", (rows, columns) if columns else (rows,)
            yield f"blk.{i}.{name}.bias", (rows,)
    yield "output_norm.weight", (hidden,)
    yield "output_norm.bias", (hidden,)
    if not shape.is_tied:
        yield "output.weight", (shape.vocab_size, hidden)


def _num_bytes(size: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    if len(size) == 1:
        return 4 * size[0]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return size[0] * size[1] // block * block_bytes


def _write(path: Path, name: str, shape: Shape, kind: gguf.GGMLQuantizationType) -> None:
    writer = gguf.GGUFWriter(path, "gpt2" if shape.is_gpt2 else "llama")
    writer.add_name(f"{name}, random weights")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.mlp_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    if shape.is_gpt2:
        writer.add_layer_norm_eps(shape.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(shape.norm_eps)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(shape.rope_theta)
    # llama.cpp then asks for no vocabulary; the size is all that it has to know.
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(shape.vocab_size)
    tensors = list(_tensors(shape))
    for tensor, size in tensors:
        dtype, raw = (np.dtype(np.float32), None) if len(size) == 1 else (np.dtype(np.float16), kind)
        writer.add_tensor_info(tensor, size, dtype, _num_bytes(size, kind), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(SEED)
    for tensor, size in tensors:  # one at a time: memory for the largest one is enough
        if len(size) == 1:
            writer.write_tensor_data(np.full(size, tensor.endswith(".weight"), np.float32))  # a norm, or a bias
        else:
            writer.write_tensor_data(_random_matrix(rng, size, kind))
    writer.close()


def _random_matrix(rng: np.random.Generator, size: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return the blocks of a random matrix as bytes: [blocks, bytes of a block].

    Weights have variance 1 / columns, so that rows keep the size of what they multiply.
    """
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.empty((size[0] * size[1] // _BLOCK, block_bytes), np.uint8)
    is_8_bit = kind is gguf.GGMLQuantizationType.Q8_0
    scale = np.float16(1 / math.sqrt(size[1]) / (_Q8_SPREAD if is_8_bit else _Q4_SPREAD))
    blocks[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
    for start in range(0, len(blocks), _CHUNK_BLOCKS):
        part = blocks[start : start + _CHUNK_BLOCKS, 2:]
        quants = np.frombuffer(rng.bytes(part.size), np.int8).reshape(part.shape)
        # -128 is not in the format's range: kernels that take absolute values rely on it.
        part[:] = (np.maximum(quants, -_Q8_MOST) if is_8_bit else quants).view(np.uint8)
    return blocks
