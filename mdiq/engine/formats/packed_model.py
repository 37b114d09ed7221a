"""A model's packed weights as files.

A layer is packed the first time that it is loaded, or that another node asks for it, and written to a file; from then
on the file is mapped into memory, here and at the node that fetches it. So no more than one layer of a process is ever
held in f32, and a restart reads no weights that it does not use. The file does not depend on the CPU: what kernels need
beside it, they derive from it.
"""

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError

from mdiq.cache import Use, locked, scratch_directory, use
from mdiq.engine.formats.about import About
from mdiq.engine.formats.checkpoint import Checkpoint
from mdiq.engine.formats.gguf_blocks import BLOCK, FEW_BITS, KEPT, Blocks
from mdiq.engine.formats.packed_file import PackedFile, written
from mdiq.engine.formats.quantize import quantize_columns, quantize_int4

VERSION = 6
"""Of the files' layout."""
_ROWS = 4_096  # of the vocabulary, packed at a time: a whole one in f32 may be larger than a layer
_PACKING = threading.Lock()  # a Starter packs for itself and for others: one layer at a time is held in f32
_PACKING_S = 1.0


class PackedModel:
    """A checkpoint's weights in one of FORMATS or "plain", a file for each Layer and one for embedding, norm and head.

    folder: where the files are kept; if it cannot be written, new ones are temporary.
    find_hot: finds the hot columns; called once for a model.
    on_step: called after each matrix that was packed, or part of a large one, and while another thread packs: the first
    load takes long.
    has_packed: whether anything was packed since it was last set to False.
    in_use: what keeps its files from being forgotten; whoever computes with their tensors refers to it.

    A file's name ends in its SHA-256. Tensor names in it: "<role>." and the names of quantize_columns for int8 or of
    gguf_blocks.Blocks for int4, and "<role>.bias"; norms by their role. What a matrix is stacked of has "<role>.0",
    "<role>.1".. for a role where the parts are held in several ways. For "plain", of a Layer: its tensors by the names
    and with the bytes of the model's own files. "rope_factors": see Checkpoint.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: str,
        folder: Path,
        find_hot: Callable[[], dict[str, torch.Tensor]],
        on_step: Callable[[], object] = lambda: None,
    ) -> None:
        self._on_step = on_step
        self.has_packed = False
        self._checkpoint = checkpoint
        self._weights = weights
        self._find_hot = find_hot
        self._hot: PackedFile | None = None
        # The digest samples; a file that was changed in place has another time.
        stamp = max(source.stat().st_mtime_ns for source in checkpoint.files)
        name = f"{checkpoint.digest[:16]}-{stamp:x}"
        self._kept = folder / f"{name}-{weights}-v{VERSION}"
        self._folder = self._kept
        self._hot_path = folder / f"{name}-hot-v{VERSION}.safetensors"  # the same for all formats
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        scratch = scratch_directory(self._kept)
        if scratch != self._kept:
            self._temporary = tempfile.TemporaryDirectory(prefix="mdiq-", dir=scratch)
            self._folder = Path(self._temporary.name)
        self._scratch = folder if self._temporary is None else self._folder
        make = partial(self._kept.mkdir, parents=True, exist_ok=True) if scratch == self._kept else None
        self.in_use: list[Use] = []
        with contextlib.suppress(OSError):  # a cache that cannot be written may lack them
            self.in_use.append(use(self._kept, make))
            self.in_use.append(use(self._hot_path))

    def __enter__(self) -> "PackedModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    def layer(self, i: int) -> PackedFile:
        """Return Layer ``i``, packed now if it never was.

        Raises:
            ModelError: the checkpoint lacks something, or the disk is full.
        """
        return self._file(f"layer-{i:03}", lambda: self._stored_layer(i) if self._is_plain else self._pack_layer(i))

    def ends(self) -> PackedFile:
        """Return embedding ("embedding", int8 also in int4 models), "positions", "final_norm" and "head"."""
        return self._file("ends", self._pack_ends)

    @property
    def _is_plain(self) -> bool:
        return self._weights == "plain"

    def _file(self, name: str, make: Callable[[], dict[str, torch.Tensor]]) -> PackedFile:
        """Return a file of this model, made now if there is none."""
        if (file := self._found(name)) is not None:
            return file
        # What keeps its bytes need not wait until a Starter has read its text for the hot columns of its head.
        with contextlib.nullcontext() if self._keeps_bytes(name) else self._packing_alone():
            if (file := self._found(name)) is None:
                self.has_packed = True
                path = self._folder / f"{name}.safetensors"
                file = written(path, make(), self._scratch, about=self._about(name))
        return file

    def _keeps_bytes(self, name: str) -> bool:
        """Whether a file is made without any matrix in f32."""
        if name == "ends":
            return False
        return self._is_plain or (self._keeps_blocks and self._checkpoint.layer_kinds() <= KEPT)

    @contextlib.contextmanager
    def _packing_alone(self) -> Iterator[None]:
        while not _PACKING.acquire(timeout=_PACKING_S):
            self._on_step()
        try:
            yield
        finally:
            _PACKING.release()

    def _found(self, name: str) -> PackedFile | None:
        for folder in (self._kept, self._folder):
            for path in sorted(folder.glob(f"{name}-*.safetensors")):
                with contextlib.suppress(SafetensorError, OSError):
                    return PackedFile(path)
        return None

    def _about(self, name: str) -> str:
        checkpoint = self._checkpoint
        stored = checkpoint.stored_kinds(int(name[-3:])) if self._is_plain else {}
        return About(checkpoint.digest, self._weights, checkpoint.config, checkpoint.is_gguf, stored).text

    def _with_rope(self, packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        factors = self._checkpoint.rope_factors()
        return packed if factors is None else packed | {"rope_factors": factors.float()}

    def _stored_layer(self, i: int) -> dict[str, torch.Tensor]:
        return self._with_rope(self._checkpoint.stored_layer(i))

    def _hot_columns(self, name: str) -> torch.Tensor | None:
        """Return a matrix's hot columns, found now if they never were; None where there are none."""
        if self._hot is None:
            # Nodes of one machine start together: one of them finds the columns, and the others wait for it.
            self._hot = self._found_hot()
        return self._hot.find(name)

    def _found_hot(self) -> PackedFile:
        path = self._hot_path
        if self._temporary is not None:
            with contextlib.suppress(SafetensorError, OSError):
                return PackedFile(path)
            path = self._folder / "hot.safetensors"
        with locked(path.with_suffix(".lock")):
            with contextlib.suppress(SafetensorError, OSError):
                return PackedFile(path)
            return written(path, self._find_hot(), self._scratch)

    def _pack_layer(self, i: int) -> dict[str, torch.Tensor]:
        keeps_blocks = self._keeps_blocks
        stored = self._checkpoint.layer_blocks(i) if keeps_blocks else {}
        kept = [role for role, parts in stored.items() if all(blocks is not None for _, blocks in parts)]
        layer = self._checkpoint.layer(i, kept)
        packed = {name: tensor.float() for name, tensor in layer.norms.items()}
        biases = {role: bias.float() for role, bias in layer.biases.items()}
        for role, matrix in layer.matrices.items():
            parts = _merged(stored[role]) if keeps_blocks else [(matrix.shape[0], None)]
            first = 0
            for k, (num_rows, blocks) in enumerate(parts):
                rows, name = slice(first, first + num_rows), role if len(parts) == 1 else f"{role}.{k}"
                tensors = blocks or self._pack(matrix[rows], f"layer-{i:03}.{role}", in_4=not keeps_blocks)
                packed |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
                if role in biases:
                    packed[f"{name}.bias"] = biases[role][rows].clone()
                first += num_rows
                self._on_step()
        return self._with_rope(packed)

    @property
    def _keeps_blocks(self) -> bool:
        """Whether the file's types say how each matrix is held."""
        return self._weights == "int4" and bool(FEW_BITS & self._checkpoint.layer_kinds())

    def _pack(self, matrix: torch.Tensor, name: str, *, in_4: bool) -> Mapping[str, torch.Tensor]:
        if self._weights == "int4" and in_4 and matrix.shape[1] % BLOCK == 0:
            nibbles, scale, offset = quantize_int4(matrix)
            return {"nibbles": nibbles, "scale": scale} | ({} if offset is None else {"offset": offset})
        return quantize_columns(matrix, self._hot_columns(name))

    def _pack_ends(self) -> dict[str, torch.Tensor]:
        checkpoint = self._checkpoint
        packed = {name: tensor.float() for name, tensor in checkpoint.final_norm().items()}
        hot = self._hot_columns("head")
        # Tied, one matrix is both; the embedding alone is only looked up.
        packed |= self._in_parts("embedding", checkpoint.embedding, hot if checkpoint.config.is_tied else None)
        if (positions := checkpoint.positions()) is not None:
            packed["positions"] = positions.float()
        if self._keeps_blocks and (blocks := checkpoint.head_blocks()) is not None:
            packed |= {f"head.{name}": tensor for name, tensor in blocks.items()}
        elif not checkpoint.config.is_tied:
            packed |= self._in_parts("head", checkpoint.head, hot)
        return packed

    def _in_parts(
        self, role: str, read: Callable[[int, int], torch.Tensor | None], hot: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Return a matrix with one row for each token id, by "<role>." and the names of quantize_columns."""
        parts: list[dict[str, torch.Tensor]] = []
        for start in range(0, self._checkpoint.config.vocab_size, _ROWS):
            part = read(start, min(start + _ROWS, self._checkpoint.config.vocab_size))
            assert part is not None  # asked for only where there is one
            parts.append(quantize_columns(part, hot))
            self._on_step()
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "hot"}
        if "hot" in parts[0]:
            whole["hot"] = parts[0]["hot"]
        return {f"{role}.{name}": tensor for name, tensor in whole.items()}


def _merged(parts: Sequence[tuple[int, Blocks | None]]) -> list[tuple[int, Blocks | None]]:
    """Return the parts of a matrix with neighbours as one that are held in the same way."""
    merged: list[tuple[int, Blocks | None]] = []
    for num_rows, blocks in parts:
        before = merged[-1][1] if merged else None
        if not merged or (blocks or {}).keys() != (before or {}).keys():
            merged.append((num_rows, blocks))
            continue
        both = None if blocks is None or before is None else {k: torch.cat((before[k], blocks[k])) for k in blocks}
        merged[-1] = (merged[-1][0] + num_rows, both)
    return merged
