"""A Stage's Layers from files that were fetched, where nothing else of the model is; packed_model.py writes such files.

They come from another machine: shapes and types are checked before any kernel reads there.
"""

from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
from safetensors import SafetensorError

from mdiq.cache import Use
from mdiq.engine.formats.about import About
from mdiq.engine.formats.checkpoint import Checkpoint
from mdiq.engine.formats.gguf_blocks import BLOCK, GROUP, Blocks
from mdiq.engine.formats.gguf_file import dequantized
from mdiq.engine.formats.packed_file import PackedFile
from mdiq.errors import ModelError

_HALF = BLOCK // 2


class LayerFiles:
    """The Layers of one model whose files are at ``paths``, all of them open: another fetch may remove them.

    about: what the files say of themselves, all the same but for what they store. in_use: see PackedModel.

    Raises:
        ModelError: a file cannot be read, or is not of the others' model.
    """

    def __init__(self, paths: Mapping[int, Path], in_use: Use) -> None:
        self.path = next(iter(paths.values())).parent
        self.in_use = [in_use]
        self.has_packed = False
        self._files = {layer: _opened(path) for layer, path in paths.items()}
        self.about, first = self._files[min(paths)]
        self.config = self.about.config
        for about, file in self._files.values():
            if (about.digest, about.weights, about.config) != (self.digest, self.about.weights, self.config):
                raise ModelError(
                    f"{file.path}: it is of another model than the files beside it; delete it, it is fetched again"
                )
        _Check(first, self.about).rope_factors()
        factors = first.find("rope_factors")
        self._rope_factors = None if factors is None else factors.clone()

    @property
    def digest(self) -> str:
        """The model's."""
        return self.about.digest

    def rope_factors(self) -> torch.Tensor | None:
        """Return what Checkpoint.rope_factors returned for the model."""
        return self._rope_factors

    def layer(self, i: int) -> PackedFile:
        """Return the file of Layer ``i`` in a packed format.

        Raises:
            ModelError: it is not here, or has not the tensors that its model calls for.
        """
        _, file = self._file(i)
        _Check(file, self.about).layer()
        return file

    def stored(self, i: int) -> Checkpoint:
        """Return a Checkpoint that holds Layer ``i`` of format "plain" and nothing else.

        Raises:
            ModelError: it is not here.
        """
        about, file = self._file(i)
        return Checkpoint(file.path, self.config, _StoredTensors(file, about), is_gguf=about.is_gguf)

    def _file(self, i: int) -> tuple[About, PackedFile]:
        if i not in self._files:
            raise ModelError(f"{self.path}: layer {i} was not fetched to this node; fetch its file first")
        return self._files[i]


def _opened(path: Path) -> tuple[About, PackedFile]:
    try:
        file = PackedFile(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read ({str(error)[:100]}); delete it, it is fetched again") from None
    return About.parse(file.about, str(path)), file


class _StoredTensors:
    """The tensors of one file of format "plain": a Source for a Checkpoint."""

    def __init__(self, file: PackedFile, about: About) -> None:
        self._file = file
        self._about = about

    def has(self, name: str) -> bool:
        return name in self._file.names

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if not self.has(name):
            raise ModelError(f"{self._file.path}: tensor {name} is missing; delete it, it is fetched again")
        data = self._file.tensor(name)
        if (kind := self.stored_kind(name)) is None:
            return data[start:stop] if data.ndim else data
        try:
            if data.dtype != torch.uint8:
                raise ValueError(f"it is {data.dtype}")
            found = dequantized(
                data.flatten().numpy(), gguf.GGMLQuantizationType[kind[0]], kind[1], f"{self._file.path}: tensor {name}"
            )
        except (ValueError, KeyError) as error:
            raise ModelError(f"{self._file.path}: tensor {name}: not of {kind} ({str(error)[:100]})") from None
        return torch.from_numpy(found)[start:stop] if found.ndim else torch.from_numpy(found)

    def kind(self, name: str) -> str:
        kind = self.stored_kind(name)
        return self._file.kind(name) if kind is None else kind[0]

    def blocks(self, name: str) -> Blocks | None:
        return None

    def names(self) -> list[str]:
        return sorted(self._file.names)

    def fingerprint(self, name: str) -> bytes:
        raise NotImplementedError("the digest is of the whole model; the file says it")

    def stored(self, name: str) -> torch.Tensor:
        return self._file.tensor(name)

    def stored_kind(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        return self._about.stored.get(name)

    def files(self) -> list[Path]:
        return [self._file.path]

    def close(self) -> None:
        pass  # unmapped when nothing refers to it


class _Check:
    """Compares a packed Layer's tensors with what its model calls for: kernels read where shapes say, unchecked."""

    def __init__(self, file: PackedFile, about: About) -> None:
        self._file = file
        self._config = about.config
        self._seen: set[str] = set()

    def layer(self) -> None:
        config = self._config
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        ups = 2 if config.family.is_gated else 1
        for role, num_out, num_in in (
            ("qkv", q_size + 2 * kv_size, config.hidden_size),
            ("o", config.hidden_size, q_size),
            ("gate_up", ups * config.mlp_size, config.hidden_size),
            ("down", config.hidden_size, config.mlp_size),
        ):
            parts = {name.split(".")[1] for name in self._file.names if name.startswith(f"{role}.")}
            stacked = [part for part in parts if part.isdecimal()]
            names = [f"{role}.{k}" for k in range(len(stacked))] or [role]
            if sum(self._matrix(name, num_in) for name in names) != num_out:
                raise self._wrong(role)
        for role in ("attn_norm", "mlp_norm", *(("q_norm", "k_norm") if config.family.has_qk_norm else ())):
            size = config.head_dim if role in ("q_norm", "k_norm") else config.hidden_size
            self._is(role, "F32", size)
            if role in config.family.biases:
                self._is(f"{role}.bias", "F32", size)
        self.rope_factors()
        if unknown := self._file.names - self._seen:
            raise self._wrong(min(unknown))

    def rope_factors(self) -> None:
        self._is_if_there("rope_factors", "F32", self._config.head_dim // 2)

    def _matrix(self, name: str, num_in: int) -> int:
        """Return the rows of a matrix [out, num_in], in whatever packing it is."""
        blocks, groups = num_in // BLOCK, num_in // GROUP
        has_blocks = f"{name}.nibbles" in self._file.names
        num_out = self._length(f"{name}.nibbles" if has_blocks else f"{name}.q")
        if not has_blocks:
            num_hot = 0
            if f"{name}.hot" in self._file.names:
                num_hot = self._length(f"{name}.hot")
                self._is(f"{name}.hot", "I64", num_hot)
                if not _all_below(self._file.tensor(f"{name}.hot"), num_in):
                    raise self._wrong(f"{name}.hot")
            self._is(f"{name}.q", "I8", num_out, num_in + num_hot)
            self._is(f"{name}.scale", "F32", num_out)
        else:
            self._is(f"{name}.nibbles", "U8", num_out, blocks, _HALF)
            unit = GROUP
            if f"{name}.mins" in self._file.names:
                self._is(f"{name}.scales", "U8", num_out, blocks)
                self._is(f"{name}.mins", "U8", num_out, blocks)
                self._is(f"{name}.d", "F16", num_out, groups)
                self._is(f"{name}.dmin", "F16", num_out, groups)
            elif f"{name}.high" in self._file.names:
                self._is(f"{name}.high", "U8", num_out, blocks, BLOCK // 4)
                self._is(f"{name}.scales", "I8", num_out, blocks, 2)
                self._is(f"{name}.d", "F16", num_out, groups)
            else:
                unit = BLOCK
                self._is(f"{name}.scale", "F32", num_out, blocks)
                self._is_if_there(f"{name}.offset", "F32", num_out, blocks)
            if num_in % unit:
                raise self._wrong(f"{name}.nibbles")
        self._is_if_there(f"{name}.bias", "F32", num_out)
        return num_out

    def _length(self, name: str) -> int:
        """Return the first number of a tensor's shape, which is not 0."""
        length = next(iter(self._file.shape(name)), 0) if name in self._file.names else 0
        if not length:
            raise self._wrong(name)
        return length

    def _is_if_there(self, name: str, kind: str, *shape: int) -> None:
        if name in self._file.names:
            self._is(name, kind, *shape)

    def _is(self, name: str, kind: str, *shape: int) -> None:
        file = self._file
        if name not in file.names or file.kind(name) != kind or file.shape(name) != shape:
            raise self._wrong(name)
        self._seen.add(name)

    def _wrong(self, name: str) -> ModelError:
        shown = ascii(name[:80])[1:-1]
        return ModelError(
            f"{self._file.path}: {shown} is not as its model calls for; install the same mdiq everywhere, and delete "
            "the file: it is fetched again"
        )


def _all_below(columns: torch.Tensor, width: int) -> bool:
    return not bool(((columns < 0) | (columns >= width)).any())
