"""Where in a model's files the weights of each Layer lie, for those who send them. Reads headers, no weights."""

from collections.abc import Iterable
from pathlib import Path

from mdiq.core.weights import CHUNK_BYTES, FileEntry, FileRange, WeightMap, is_file_name
from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.formats.checkpoint_files import Place
from mdiq.errors import ModelError

_GGUF_NAME = "model.gguf"  # what a user calls the file is of no use elsewhere
_INDEX = "model.safetensors.index.json"


def map_weights(path: Path, *, chunk_bytes: int = CHUNK_BYTES) -> WeightMap:
    """Return the map of the model at ``path``: the files of a directory that a Stage needs, or the one GGUF file.

    Raises:
        ModelError: it cannot be read, has files that cannot be sent, or is no whole model.
    """
    with open_checkpoint(path) as checkpoint:
        if checkpoint.is_partial:
            raise ModelError(f"{path}: it is a partial copy and cannot be given to others; name the model itself")
        # A split GGUF file is sent as a directory of its parts.
        is_directory = path.is_dir() or len(checkpoint.headers) > 1
        folder = checkpoint.folder
        small = [name for name in ("config.json", _INDEX) if path.is_dir() and (path / name).is_file()]
        names = [*small, *checkpoint.headers]
        index = {name: i for i, name in enumerate(names)}

        def ranges(places: Iterable[Place]) -> tuple[FileRange, ...]:
            # An empty tensor has no bytes that anybody could need.
            return tuple((index[p.file], p.offset, p.offset + p.num_bytes) for p in places if p.num_bytes)

        files = tuple(_entry(folder / name, name) for name in names) if is_directory else (_entry(path, _GGUF_NAME),)
        shared = [Place(name, 0, files[index[name]][1]) for name in small]
        shared += [Place(name, 0, num_bytes) for name, num_bytes in checkpoint.headers.items()]
        return WeightMap(
            digest=checkpoint.digest,
            is_directory=is_directory,
            files=files,
            fingerprints=checkpoint.fingerprints(),
            shared=ranges([*shared, *checkpoint.shared_places()]),
            layers=tuple(map(ranges, checkpoint.layer_places())),
            ends=ranges(checkpoint.end_places()),
            chunk_bytes=chunk_bytes,
        )


def _entry(path: Path, name: str) -> FileEntry:
    if not is_file_name(name):
        raise ModelError(f"{path}: its name cannot be sent to other nodes; use letters, digits and . _ -")
    stat = path.stat()
    return name, stat.st_size, stat.st_mtime_ns
