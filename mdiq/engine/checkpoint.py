"""Weights from disk, one layer at a time: safetensors directories and GGUF files behind one interface.

A Checkpoint reads only what it is asked for, and a partial copy (a note of core/weights.py's lies beside it) gives
nothing but what it holds. Names, transpositions and permutations end here: what leaves has the
roles of ``families.py`` and the shape [out, in].
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from mdiq.core.weights import PART_SUFFIX, SHA256_BYTES, Manifest, decode
from mdiq.engine.families import GGUF_NAMES, LLAMA
from mdiq.engine.gguf_file import GgufFile
from mdiq.engine.model_config import ModelConfig, config_from_gguf, config_from_hf
from mdiq.errors import ModelError, RemoteProtocolError

_SAMPLE_BYTES = 4096
_MOST_CONFIG_BYTES = 1 << 20
_NORMS = ("attn_norm", "mlp_norm", "q_norm", "k_norm")
_ENDS = ("embedding", "positions", "final_norm", "head")
_ROPE_FACTORS = "rope_freqs.weight"

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """The weights of one Layer, as stored in value, f32 from GGUF or in the file's own dtype.

    matrices: [out, in] by role: qkv (Q, K and V on top of each other), o, gate_up (likewise; up alone where there is no
        gate), down.
    biases: [out] by the same roles, where the model has them.
    norms: [size] by "role" and "role.bias".
    """

    matrices: Tensors
    biases: Tensors
    norms: Tensors


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a tensor lie: in the file of that name."""

    file: str
    offset: int
    num_bytes: int


class Source(Protocol):
    """Tensors by their own names."""

    def has(self, name: str) -> bool:
        """Tell whether a tensor of that name is stored."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read one tensor, or the rows ``start`` to ``stop - 1`` of a matrix.

        Raises:
            ModelError: it is missing or cannot be read.
        """
        ...

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        ...

    def fingerprint(self, name: str) -> bytes:
        """Return a SHA-256 of shape, type and first bytes of a tensor, for the digest."""
        ...

    def place(self, name: str) -> Place:
        """Return where a tensor lies."""
        ...

    def headers(self) -> Mapping[str, int]:
        """Return the files that hold tensors, by name, and the bytes in front of the tensors of each."""
        ...

    def close(self) -> None:
        """Unmap the files."""
        ...


class Checkpoint:
    """An open model; use it as a context manager, or call ``close``.

    config: its shape.
    path: where it lies, for messages.
    """

    def __init__(self, path: Path, config: ModelConfig, source: Source, *, is_gguf: bool) -> None:
        self.path = path
        self.config = config
        self._source = source
        self._is_gguf = is_gguf
        self._names = GGUF_NAMES if is_gguf else config.family.hf_names

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files."""
        self._source.close()

    @property
    def digest(self) -> str:
        """A fingerprint of the model: every tensor's name, shape, type and first 4 KiB, hashed.

        It tells models apart that differ by mistake; it is no proof against forgery. In a partial copy the fingerprints
        of the tensors that it lacks are what its note says.
        """
        # The family by its name: the order in which a frozenset prints differs from process to process.
        shape = replace(self.config, family=LLAMA, windowed_layers=frozenset())
        digest = hashlib.sha256(f"{self.config.family.name} {sorted(self.config.windowed_layers)} {shape!r}".encode())
        for name in self._source.names():
            digest.update(name.encode() + b"\0" + self._source.fingerprint(name))
        return digest.hexdigest()

    @property
    def is_partial(self) -> bool:
        """Whether it lies beside a note that says what of it is there."""
        return isinstance(self._source, _PartialSource)

    @property
    def headers(self) -> Mapping[str, int]:
        """The files that hold tensors, by name, and the bytes in front of the tensors of each."""
        return self._source.headers()

    def fingerprints(self) -> bytes:
        """Return what the digest is made of: 32 bytes of each tensor, in the order of their names."""
        return b"".join(map(self._source.fingerprint, self._source.names()))

    def shared_places(self) -> list[Place]:
        """Return where the tensors lie that every Stage reads."""
        return [self._source.place(_ROPE_FACTORS)] if self._source.has(_ROPE_FACTORS) else []

    def end_places(self) -> list[Place]:
        """Return where the tensors of the Starter's ends lie: embedding, positions, final norm and head."""
        names = [self._name(role, 0, part) for role in _ENDS if role in self._names for part in ("weight", "bias")]
        return [self._source.place(name) for name in names if self._source.has(name)]

    def layer_places(self) -> list[list[Place]]:
        """Return where the tensors of each Layer lie."""
        # Every family's layers are numbered behind one word, which some checkpoints of GPT-2 shorten.
        prefix = self._names["attn_norm"].partition("{i}")[0]
        places: list[list[Place]] = [[] for _ in range(self.config.num_layers)]
        for name in self._source.names():
            for word in (prefix, prefix.removeprefix("transformer.")):
                number = name.removeprefix(word).partition(".")[0] if name.startswith(word) else ""
                if number.isdecimal() and int(number) < len(places):
                    places[int(number)].append(self._source.place(name))
                    break
        return places

    def embedding(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return the token embedding: [vocab_size, hidden_size], or some rows of it."""
        return self._vocabulary("embedding", start, stop)

    def positions(self) -> torch.Tensor | None:
        """Return the learned positions, [context_tokens, hidden_size], or None where positions are rotary."""
        if self.config.family.has_rotary:
            return None
        return self._checked("positions", (self.config.context_tokens, self.config.hidden_size))

    def head(self, start: int = 0, stop: int | None = None) -> torch.Tensor | None:
        """Return the output matrix, [vocab_size, hidden_size], or some rows; None where it is the embedding."""
        return None if self.config.is_tied else self._vocabulary("head", start, stop)

    def final_norm(self) -> Tensors:
        """Return the norm before the head: [hidden_size] as "final_norm", and its bias where it has one."""
        return dict(self._norm("final_norm", 0, self.config.hidden_size))

    def rope_factors(self) -> torch.Tensor | None:
        """Return what each rotary frequency is divided by, [head_dim / 2], where a GGUF file stores it (Llama 3.1)."""
        if self._is_gguf and self._source.has(_ROPE_FACTORS):
            return self._source.read(_ROPE_FACTORS)
        return None

    def layer(self, i: int) -> LayerTensors:
        """Return the weights of Layer ``i``.

        Raises:
            ModelError: a tensor is missing or has another shape than the config says.
        """
        config, family = self.config, self.config.family
        hidden, q_size, kv_size = (
            config.hidden_size,
            config.num_heads * config.head_dim,
            (config.num_kv_heads * config.head_dim),
        )
        if family.fused_qkv:
            qkv, qkv_bias = self._linear("qkv", i, (q_size + 2 * kv_size, hidden))
        else:
            parts = [
                self._linear("q", i, (q_size, hidden), heads=config.num_heads),
                self._linear("k", i, (kv_size, hidden), heads=config.num_kv_heads),
                self._linear("v", i, (kv_size, hidden)),
            ]
            qkv, qkv_bias = _stacked(parts, self.path, i)
        o, o_bias = self._linear("o", i, (hidden, q_size))
        ups = [self._linear("up", i, (config.mlp_size, hidden))]
        if family.is_gated:
            ups.insert(0, self._linear("gate", i, (config.mlp_size, hidden)))
        gate_up, gate_up_bias = _stacked(ups, self.path, i)
        down, down_bias = self._linear("down", i, (hidden, config.mlp_size))
        biases = {"qkv": qkv_bias, "o": o_bias, "gate_up": gate_up_bias, "down": down_bias}
        norms: dict[str, torch.Tensor] = {}
        for role in _NORMS if family.has_qk_norm else _NORMS[:2]:
            norms.update(self._norm(role, i, config.head_dim if role in ("q_norm", "k_norm") else hidden))
        return LayerTensors(
            {"qkv": qkv, "o": o, "gate_up": gate_up, "down": down},
            {role: bias for role, bias in biases.items() if bias is not None},
            norms,
        )

    def _linear(
        self, role: str, i: int, shape: tuple[int, int], *, heads: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return matrix and bias of a role; ``heads`` marks the ones that GGUF may store permuted."""
        family = self.config.family
        is_transposed = family.is_transposed_hf and not self._is_gguf
        weight = self._checked(role, (shape[1], shape[0]) if is_transposed else shape, i)
        if is_transposed:
            weight = weight.t().contiguous()
        has_bias = role in family.biases or self._source.has(self._name(role, i, "bias"))
        bias = self._checked(role, (shape[0],), i, "bias") if has_bias else None
        if heads and self._is_gguf and family.is_permuted_gguf:
            weight = _unpermuted(weight, heads)
            bias = None if bias is None else _unpermuted(bias, heads)
        return weight, bias

    def _norm(self, role: str, i: int, size: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield role, self._checked(role, (size,), i)
        if role in self.config.family.biases:
            yield f"{role}.bias", self._checked(role, (size,), i, "bias")

    def _vocabulary(self, role: str, start: int, stop: int | None) -> torch.Tensor:
        vocab_size = self.config.vocab_size
        num_rows = len(range(*slice(start, stop).indices(vocab_size)))
        return self._checked(role, (num_rows, self.config.hidden_size), rows=(start, stop))

    def _checked(
        self,
        role: str,
        shape: tuple[int, ...],
        i: int = 0,
        part: str = "weight",
        rows: tuple[int, int | None] = (0, None),
    ) -> torch.Tensor:
        name = self._name(role, i, part)
        tensor = self._source.read(name, *rows)
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{self.path}: tensor {name} has shape {list(tensor.shape)} and the config calls for {list(shape)}; "
                "fetch the model again"
            )
        return tensor

    def _name(self, role: str, i: int, part: str) -> str:
        name = f"{self._names[role].format(i=i)}.{part}"
        # Some checkpoints of GPT-2 leave the first word out.
        short = name.removeprefix("transformer.")
        return short if short != name and not self._source.has(name) and self._source.has(short) else name


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model directory in the Hugging Face layout, or a .gguf file.

    Raises:
        ModelError: missing, truncated, malformed, or of an unsupported kind.
    """
    note = _read_note(path)
    if path.is_dir():
        where = path / "config.json"
        config = config_from_hf(_read_json(where), str(where))
        shards = _SafetensorsSource(path)
        return Checkpoint(path, config, shards if note is None else _PartialSource(shards, note, path), is_gguf=False)
    file = GgufFile(path)
    try:
        tensors = _GgufSource(file)
        source = tensors if note is None else _PartialSource(tensors, note, path)
        return Checkpoint(path, config_from_gguf(file), source, is_gguf=True)
    except ModelError:
        file.close()
        raise


def _read_note(path: Path) -> Manifest | None:
    """Return what is there of a partial copy, or None of a whole model."""
    where = path.with_name(path.name + PART_SUFFIX)
    try:
        note = decode(where.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, RemoteProtocolError) as error:
        raise ModelError(f"{where}: cannot be read ({str(error)[:100]}); delete it and fetch the model again") from None
    if not isinstance(note, Manifest):
        raise ModelError(f"{where}: it does not say what of the model is there; delete it and fetch the model again")
    return note


class _PartialSource:
    """Another Source, of which only some ranges of bytes are there: the rest of its files are holes."""

    def __init__(self, source: Source, note: Manifest, path: Path) -> None:
        self._source = source
        self._note = note
        self._path = path
        self._files = {name: i for i, (name, _, _) in enumerate(note.files)}
        names = source.names()
        if len(note.fingerprints) != len(names) * SHA256_BYTES:
            raise ModelError(f"{path}: its note is about another model; delete both and fetch the model again")
        self._order = {name: i for i, name in enumerate(names)}

    def has(self, name: str) -> bool:
        return self._source.has(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if self.has(name) and not self._holds(name):
            raise ModelError(f"{self._path}: tensor {name} was not fetched to this node; fetch its layer first")
        return self._source.read(name, start, stop)

    def names(self) -> list[str]:
        return self._source.names()

    def fingerprint(self, name: str) -> bytes:
        if self._holds(name):
            return self._source.fingerprint(name)
        at = self._order[name] * SHA256_BYTES
        return self._note.fingerprints[at : at + SHA256_BYTES]

    def place(self, name: str) -> Place:
        return self._source.place(name)

    def headers(self) -> Mapping[str, int]:
        return self._source.headers()

    def close(self) -> None:
        self._source.close()

    def _holds(self, name: str) -> bool:
        place, chunk_bytes = self._source.place(name), self._note.chunk_bytes
        file = self._files.get(place.file) if self._note.is_directory else 0
        return any(
            i == file and first * chunk_bytes <= place.offset and place.offset + place.num_bytes <= stop * chunk_bytes
            for i, first, stop in self._note.ranges
        )


class _GgufSource:
    def __init__(self, file: GgufFile) -> None:
        self._file = file

    def has(self, name: str) -> bool:
        return name in self._file.tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return torch.from_numpy(self._file.array(name, start, stop))

    def names(self) -> list[str]:
        return sorted(self._file.tensors)

    def fingerprint(self, name: str) -> bytes:
        tensor = self._file.tensors[name]
        description = f"{tensor.shape} {tensor.type.name} ".encode() + self._file.sample(name, _SAMPLE_BYTES)
        return hashlib.sha256(description).digest()

    def place(self, name: str) -> Place:
        tensor = self._file.tensors[name]
        return Place(self._file.path.name, tensor.offset, tensor.num_bytes)

    def headers(self) -> Mapping[str, int]:
        return {self._file.path.name: self._file.header_bytes}

    def close(self) -> None:
        self._file.close()


class _SafetensorsSource:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}  # safetensors gives its handles no type
        try:
            for name in _shard_names(path):
                file = self._stack.enter_context(safe_open(path / name, framework="pt"))
                self._files.update(dict.fromkeys(file.keys(), file))
        except (SafetensorError, OSError) as error:
            self._stack.close()
            raise ModelError(f"{path / name}: cannot be read ({str(error)[:120]}); fetch the file again") from None

    def has(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if name not in self._files:
            raise ModelError(f"{self._path}: tensor {name} is missing; fetch the model again")
        try:
            is_whole = not start and stop is None
            tensor: torch.Tensor = (
                self._files[name].get_tensor(name) if is_whole else self._files[name].get_slice(name)[start:stop]
            )
        except SafetensorError as error:
            raise ModelError(f"{self._path}: tensor {name} cannot be read ({str(error)[:120]})") from None
        if not tensor.is_floating_point():
            raise ModelError(f"{self._path}: tensor {name} is {tensor.dtype}; only floating point is supported")
        return tensor

    def names(self) -> list[str]:
        return sorted(self._files)

    def fingerprint(self, name: str) -> bytes:
        view = self._files[name].get_slice(name)
        shape = view.get_shape()
        sample = view[:1] if shape else self.read(name).reshape(1)
        data = sample.contiguous().reshape(-1)[: _SAMPLE_BYTES // sample.element_size()]
        description = f"{shape} {view.get_dtype()} ".encode() + data.view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(description).digest()

    def place(self, name: str) -> Place:
        return self._index[0][name]

    def headers(self) -> Mapping[str, int]:
        return self._index[1]

    @cached_property
    def _index(self) -> tuple[dict[str, Place], dict[str, int]]:
        """Where the tensors lie, and the bytes in front of those of each file; safetensors tells neither."""
        places: dict[str, Place] = {}
        headers: dict[str, int] = {}
        for shard in _shard_names(self._path):
            with (self._path / shard).open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))  # safe_open has checked it
            headers[shard] = 8 + size
            for name, entry in header.items():
                if name != "__metadata__":
                    start, stop = entry["data_offsets"]
                    places[name] = Place(shard, 8 + size + start, stop - start)
        return places, headers

    def close(self) -> None:
        self._files.clear()
        self._stack.close()


def _shard_names(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        if (path / "model.safetensors").exists():
            return ["model.safetensors"]
        hint = "only safetensors are read (a .bin file can run code): convert it"
        raise ModelError(f"{path}: model.safetensors is missing; {hint if any(path.glob('*.bin')) else 'fetch it'}")
    weights = _read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise ModelError(f"{index}: weight_map is missing; fetch the file again")
    names = sorted({str(name) for name in weights.values()})
    for name in names:
        # A name comes from the file and must not lead out of the directory.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: {name!r} is not a file name of this directory; fetch the model again")
        if not (path / name).is_file():
            raise ModelError(f"{path / name}: it is missing; fetch the model again")
    return names


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > 64 * _MOST_CONFIG_BYTES:
            raise ModelError(f"{path}: it is too large for what it should be; fetch it again")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; give a model directory or a .gguf file") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({str(error)[:80]}); fetch it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object; fetch it again")
    return value


def _stacked(
    parts: list[tuple[torch.Tensor, torch.Tensor | None]], path: Path, i: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return matrices on top of each other, so that one matmul serves them; likewise their biases."""
    if len(parts) == 1:
        return parts[0]
    biases = [bias for _, bias in parts if bias is not None]
    if biases and len(biases) != len(parts):
        # Zeros stand in for what a checkpoint leaves out, as Q and V of some models have a bias and K has none.
        biases = [torch.zeros(w.shape[0], dtype=w.dtype) if b is None else b for w, b in parts]
    return torch.cat([weight for weight, _ in parts]), torch.cat(biases) if biases else None


def _unpermuted(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows in the order of half-split rotary embedding; GGUF interleaves the halves of each head."""
    rows = tensor.shape[0] // heads
    return tensor.view(heads, rows // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)
