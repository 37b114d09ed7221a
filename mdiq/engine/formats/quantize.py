"""Weights in 8 and 4 bits: the arithmetic of packing, and the files that keep the result. kernels/linear.py multiplies.

int8: one scale per row of the matrix, w = scale * q with q in -127..127. Copies of hot columns (see hot_columns.py)
follow after the matrix's own columns, and no two neighbours of a row may exceed what 16 bits hold of their products
with activations in 8 bits: x86 without VNNI adds two products in so many.
int4: blocks of 32 columns; see gguf_blocks.Blocks. A file of few bits decides for each matrix: blocks of 4 bits
and of Q6_K stay as they are, and what else it has is packed in 8. Other files are packed in 4.

A layer is packed the first time that it is loaded, or that another node asks for it, and written to a file; from then
on the file is mapped into memory, here and at the node that fetches it. So no more than one layer of a process is ever
held in f32, and a restart reads no weights that it does not use. The file does not depend on the CPU: what kernels need
beside it, they derive from it.
"""

import contextlib
import hashlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional

from mdiq.cache import Use, locked, make_room, no_space, put_whole, says_no_space, scratch_directory, temporary, use
from mdiq.engine.formats.about import About
from mdiq.engine.formats.checkpoint import Checkpoint
from mdiq.engine.formats.gguf_blocks import BLOCK, FEW_BITS, FOUR_BITS, KEPT, Blocks
from mdiq.errors import ModelError

FORMATS = ("int8", "int4")
VERSION = 6
"""Of the files' layout."""
_HOT_SHARE = 0.03  # copies, of a matrix's columns
_HOT_SHARES = {"down": 0.08}  # its activations are products, and spread the most
_HOT_STEP = 32  # columns: what the kernels take
_MAX_PAIR = 127.4  # steps: rounding may add 1, and 255 * 128 is the most that 16 bits hold
_ROWS = 4_096  # of the vocabulary, packed at a time: a whole one in f32 may be larger than a layer
_PACKING = threading.Lock()  # a Starter packs for itself and for others: one layer at a time is held in f32
_PACKING_S = 1.0
_ABOUT = "mdiq"  # the one key of a file's metadata: safetensors does not keep the order of several
_SYMMETRIC_ERROR = 1e-3  # of a scale: below it a block came from a format without offsets


def best_format(checkpoint: Checkpoint) -> str:
    """Return the one of FORMATS that suits a checkpoint: 4 bits where its file has matrices of 4 bits, else int8.

    4 bits keep the values of such matrices, and hold the file's others in 8; see PackedModel.
    """
    return "int4" if FOUR_BITS & checkpoint.layer_kinds() else "int8"


def chosen_format(wanted: str, checkpoint: Checkpoint, device: torch.device) -> str:
    """Return "plain" or one of FORMATS for a core.types.WeightFormat: packed weights are computed on the CPU only."""
    if wanted != "auto":
        return wanted
    return best_format(checkpoint) if device.type == "cpu" else "plain"


def num_hot(num_in: int, role: str) -> int:
    """Return how many copies of hot columns follow a matrix with ``num_in`` columns: none in a very narrow one."""
    if num_in < 4 * _HOT_STEP:
        return 0
    return max(round(_HOT_SHARES.get(role, _HOT_SHARE) * num_in / _HOT_STEP), 1) * _HOT_STEP


def quantize_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q: int8 [n, width], and scale: f32 [n], for rows [n, width]."""
    wide = rows.float()
    scale = wide.abs().amax(1).clamp_min_(torch.finfo(torch.float32).tiny) / 127
    return (wide / scale[:, None]).round_().to(torch.int8), scale


def quantize_columns(weight: torch.Tensor, hot: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return a matrix [out, in] in int8, with copies of its hot columns.

    hot: i64 [k], the columns to copy, one as often as copies of it are wanted; or None.

    Returns q: int8 [out, in + k], the copies last; scale: f32 [out]; and "hot", as given, where k > 0.
    """
    if hot is None or not len(hot):
        q, scale = _quantize_pairs(weight)
        return {"q": q, "scale": scale}
    q, scale = _quantize_pairs(torch.cat((weight, weight[:, hot]), dim=1))
    return {"q": q, "scale": scale, "hot": hot}


def _quantize_pairs(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Do as quantize_int8, with a scale that keeps every pair of neighbours within _MAX_PAIR."""
    wide = weight.float()
    pairs = functional.pad(wide, (0, wide.shape[1] % 2)).view(wide.shape[0], -1, 2)
    # Activations are 0 to 255: the worst that a pair can add up to is its positive part, or its negative one.
    most = torch.maximum(pairs.clamp_min(0).sum(-1), pairs.clamp_max(0).sum(-1).neg_()).amax(1)
    scale = torch.maximum(wide.abs().amax(1) / 127, most / _MAX_PAIR).clamp_min_(torch.finfo(torch.float32).tiny)
    return (wide / scale[:, None]).round_().to(torch.int8), scale


def quantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return nibbles, scales and offsets for weight: [out, in], in a multiple of BLOCK.

    nibbles: u8 [out, in / BLOCK, BLOCK / 2], the even column in the low half. scales: f32 [out, in / BLOCK].
    offsets: f32, likewise, or None where all blocks do without.
    """
    blocks = weight.float().view(weight.shape[0], -1, BLOCK)
    # As Q4_0: the value of the largest magnitude becomes q = 0.
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = _not_zero(largest / -8)
    q = (blocks / scale).round_().add_(8).clamp_(0, 15)
    error = (q.sub(8).mul_(scale) - blocks).abs_().amax(-1, keepdim=True)
    if bool((error <= scale.abs() * _SYMMETRIC_ERROR).all()):
        return _nibbles(q), scale[..., 0].contiguous(), None
    # As Q4_1: the range of the block in 15 steps.
    least, most = blocks.aminmax(dim=-1, keepdim=True)
    scale = _not_zero((most - least) / 15)
    q = ((blocks - least) / scale).round_().clamp_(0, 15)
    offset = least + 8 * scale
    return _nibbles(q), scale[..., 0].contiguous(), offset[..., 0].contiguous()


def unpack_int4(nibbles: torch.Tensor) -> torch.Tensor:
    """Return q: u8 [out, in], 0..15, for nibbles [out, in / BLOCK, BLOCK / 2]."""
    return torch.stack((nibbles & 15, nibbles >> 4), dim=-1).view(nibbles.shape[0], -1)


class PackedFile:
    """Tensors of one file, mapped into memory until none of them is in use any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = safe_open(path, framework="pt")  # safetensors gives its handles no type
        self.names = frozenset[str](self._file.keys())  # type: ignore[no-untyped-call]

    @property
    def about(self) -> str:
        """What the file says of itself: see about.py; empty where it says nothing."""
        return str((self._file.metadata() or {}).get(_ABOUT, ""))

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor; its memory is the file's. Raises KeyError where there is none."""
        if name not in self.names:
            raise KeyError(name)
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def find(self, name: str) -> torch.Tensor | None:
        """Return a tensor, or None where the file has none of that name."""
        return self.tensor(name) if name in self.names else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without touching its memory."""
        return tuple(self._file.get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        """Return a tensor's type, as safetensors calls it, without touching its memory."""
        return str(self._file.get_slice(name).get_dtype())


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


def written(path: Path, tensors: dict[str, torch.Tensor], scratch: Path, *, about: str | None = None) -> PackedFile:
    """Write a file and return it. about: what it says of itself; then the SHA-256 of the whole is added to its name.

    scratch: a folder on the same disk. Several Nodes of one machine may make the same file: each writes its own there,
    and the last one stays; a power cut leaves a whole file or none.

    Raises:
        CapacityError: the disk is full.
        ModelError: the file cannot be written.
    """
    with _write_errors(path, tensors), temporary(scratch, "write-") as folder:
        own = folder / path.name
        save_file(tensors, own, metadata=None if about is None else {_ABOUT: about})
        if about is not None:
            with own.open("rb") as file:
                path = path.with_stem(f"{path.stem}-{hashlib.file_digest(file, 'sha256').hexdigest()}")
        put_whole(own, path)
        return PackedFile(path)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file that nobody else reads, and that need not outlive a power cut.

    Raises:
        CapacityError, ModelError: as ``written``.
    """
    with _write_errors(path, tensors):
        save_file(tensors, path)


@contextlib.contextmanager
def _write_errors(path: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    try:
        make_room(path.parent, num_bytes)
        yield
    except (SafetensorError, OSError) as error:
        if says_no_space(str(error)):
            raise no_space(path.parent, num_bytes) from None
        raise ModelError(
            f"{path}: packed weights cannot be written ({str(error)[:120]}); set MDIQ_CACHE to another directory"
        ) from None


def _nibbles(q: torch.Tensor) -> torch.Tensor:
    q = q.to(torch.uint8)
    return q[..., 0::2] | (q[..., 1::2] << 4)


def _not_zero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale.abs() < 1e-30, torch.full_like(scale, 1e-30), scale)
