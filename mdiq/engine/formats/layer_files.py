"""A Stage's Layers from files that were fetched, where nothing else of the model is; quantize.py writes such files.

They come from another machine: shapes and types are checked before any kernel reads there.
"""

import math
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
from mdiq.engine.formats.quantize import PackedFile
from mdiq.errors import ModelError

_HALF = BLOCK // 2


class LayerFiles:
    """The Layers of one model whose files are at ``paths``.

    about: what the files say of themselves, all the same but for what they store. in_use: see PackedModel.

    Raises:
        ModelError: a file cannot be read, or is not of the others' model.
    """

    def __init__(self, paths: Mapping[int, Path], in_use: Use) -> None:
        self.path = next(iter(paths.values())).parent
        self.in_use = [in_use]
        self.has_packed = False
        self._paths = paths
        self.about, first = self._opened(min(paths))
        self.config = self.about.config
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
        _, file = self._opened(i)
        _Check(file, self.about).layer()
        return file

    def stored(self, i: int) -> Checkpoint:
        """Return a Checkpoint that holds Layer ``i`` of format "plain" and nothing else.

        Raises:
            ModelError: it is not here.
        """
        about, file = self._opened(i)
        return Checkpoint(file.path, self.config, _StoredTensors(file, about), is_gguf=about.is_gguf)

    def _opened(self, i: int) -> tuple[About, PackedFile]:
        if i not in self._paths:
            raise ModelError(f"{self.path}: layer {i} was not fetched to this node; fetch its file first")
        path = self._paths[i]
        try:
            file = PackedFile(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: cannot be read ({str(error)[:100]}); delete it, it is fetched again") from None
        about = About.parse(file.about, str(path))
        known = getattr(self, "about", about)
        if (about.digest, about.weights, about.config) != (known.digest, known.weights, known.config):
            raise ModelError(f"{path}: it is of another model than the files beside it; delete it, it is fetched again")
        return about, file


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
            return data[start:stop]
        try:
            found = dequantized(
                data.flatten().numpy(), gguf.GGMLQuantizationType[kind[0]], kind[1], f"{self._file.path}: tensor {name}"
            )
        except (ValueError, KeyError) as error:
            raise ModelError(f"{self._file.path}: tensor {name}: not of {kind} ({str(error)[:100]})") from None
        return torch.from_numpy(found)[start:stop]

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
        if (factors := self._file.find("rope_factors")) is not None and factors.shape != (config.head_dim // 2,):
            raise self._wrong("rope_factors")

    def _matrix(self, name: str, num_in: int) -> int:
        """Return the rows of a matrix [out, num_in], in whatever packing it is."""
        file, blocks, groups = self._file, math.ceil(num_in / BLOCK), num_in // GROUP
        first = f"{name}.nibbles" if f"{name}.nibbles" in file.names else f"{name}.q"
        if first not in file.names:
            raise self._wrong(first)
        num_out = file.shape(first)[0]
        if first.endswith(".q"):
            hot = file.find(f"{name}.hot")
            num_hot = 0 if hot is None else len(hot)
            self._is(first, "I8", num_out, num_in + num_hot)
            self._is(f"{name}.scale", "F32", num_out)
            if hot is not None and (hot.dtype != torch.int64 or hot.ndim != 1 or not _all_below(hot, num_in)):
                raise self._wrong(f"{name}.hot")
        else:
            self._is(first, "U8", num_out, num_in // BLOCK, _HALF)
            if f"{name}.mins" in file.names:
                numbers = {
                    "scales": ("U8", blocks),
                    "mins": ("U8", blocks),
                    "d": ("F16", groups),
                    "dmin": ("F16", groups),
                }
            elif f"{name}.high" in file.names:
                self._is(f"{name}.high", "U8", num_out, blocks, BLOCK // 4)
                self._is(f"{name}.scales", "I8", num_out, blocks, 2)
                numbers = {"d": ("F16", groups)}
            else:
                numbers = {"scale": ("F32", blocks)}
                if f"{name}.offset" in file.names:
                    numbers["offset"] = ("F32", blocks)
            for part, (kind, columns) in numbers.items():
                self._is(f"{name}.{part}", kind, num_out, columns)
        if f"{name}.bias" in file.names:
            self._is(f"{name}.bias", "F32", num_out)
        return num_out

    def _is(self, name: str, kind: str, *shape: int) -> None:
        file = self._file
        if name not in file.names or file.kind(name) != kind or file.shape(name) != shape:
            raise self._wrong(name)

    def _wrong(self, name: str) -> ModelError:
        return ModelError(
            f"{self._file.path}: {name} is not as its model calls for; install the same mdiq everywhere, and delete "
            "the file: it is fetched again"
        )


def _all_below(columns: torch.Tensor, width: int) -> bool:
    return not bool(((columns < 0) | (columns >= width)).any())
