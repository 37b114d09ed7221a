"""What a weight transfer is about, and its messages. Files are control/weight_store.py's, sockets transport/'s.

A model's files are cut into chunks, aligned to ``chunk_bytes``. A Node asks for the Manifest of its Layers, then for
the chunks, a few at a time; the Starter answers each with Pieces, small enough that a slow link always has news. A
chunk is believed when its bytes have the SHA-256 that the Starter says.

    Node                                Starter
    AskManifest(layers)            ->
                                   <-   Manifest, or Refused
    AskChunk(file, chunk)          ->                           at most CREDIT_CHUNKS unanswered
                                   <-   Piece, Piece, ...       one without data: what you know of it is right
                                   <-   Waiting                 while the rate limit holds a chunk back
    Done                           ->

The tag of these messages is a checksum under a public key: who may speak at all is a matter of the sockets.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import get_args

from mdiq.core.codec import MAX_TEXT, Codec
from mdiq.core.types import LayerRange
from mdiq.errors import PlanError

VERSION = 1
MOST_BYTES = 2**21
CHUNK_BYTES = 2**20
"""Bytes that are hashed together, and most that one chunk may have."""
LEAST_CHUNK_BYTES = 4_096
PIECE_BYTES = 2**16  # on 0.1 Mbit/s five seconds: ZeroMQ gives up a link on which nothing arrives for 6 s
CREDIT_CHUNKS = 4
SHA256_BYTES = 32
PART_SUFFIX = ".mdiq-part"
"""Beside a partial copy of a model lies a note of its name and this: a Manifest of the chunks that are there."""
_MOST_FILES = 4_096
_MOST_FILE_BYTES = 2**44
_MOST_BLOB_BYTES = 3 * 2**19  # fingerprints of 49,152 tensors: 90 layers of 128 experts have some 36,000
_CHECKSUM_KEY = b"mdiq weights, v1"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
_DIGEST = re.compile(r"[0-9a-f]{64}")

FileEntry = tuple[str, int, int]
"""A file of a model: name, bytes, time of its last change in ns."""
FileRange = tuple[int, int, int]
"""Index of a file, and a half-open range in it: of bytes or of chunks, as the field says."""


def is_file_name(name: str) -> bool:
    """Tell whether a file may be called so: one plain word that leads nowhere else."""
    return _FILE_NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class AskManifest:
    """A Node asks what it takes to load some Layers. ``with_ends``: and the Starter's embedding, norm and head."""

    layer_start: int
    layer_stop: int
    with_ends: bool

    def __post_init__(self) -> None:
        if not self.layer_start < self.layer_stop:
            raise ValueError("it needs a layer")

    @property
    def layers(self) -> LayerRange:
        """The Layers that it is about."""
        return LayerRange(self.layer_start, self.layer_stop)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What some Layers take: files, and the chunks of each.

    digest: the model's, see engine/formats/checkpoint.py. is_directory: the model is a directory, not the one file.
    ranges: of chunks, ascending. fingerprints: of every tensor of the model, 32 bytes each, in the order of the names.
    """

    digest: str
    is_directory: bool
    chunk_bytes: int
    files: tuple[FileEntry, ...]
    ranges: tuple[FileRange, ...]
    fingerprints: bytes

    def __post_init__(self) -> None:
        names = {name for name, _, _ in self.files}
        if not 0 < len(self.files) <= _MOST_FILES or len(names) < len(self.files):
            raise ValueError(f"it needs 1 to {_MOST_FILES} files of different names")
        if not self.is_directory and len(names) > 1:
            raise ValueError("a model that is no directory is one file")
        for name, num_bytes, _ in self.files:
            if not is_file_name(name):
                raise ValueError(f"{name[:40]!r} is not a plain file name")
            if not 0 < num_bytes <= _MOST_FILE_BYTES:
                raise ValueError(f"{name}: {num_bytes} bytes; it needs 1 to {_MOST_FILE_BYTES}")
        if not LEAST_CHUNK_BYTES <= self.chunk_bytes <= CHUNK_BYTES or self.chunk_bytes & (self.chunk_bytes - 1):
            raise ValueError(f"chunk_bytes {self.chunk_bytes} is no power of two up to {CHUNK_BYTES}")
        end = (0, 0)
        for file, first, stop in self.ranges:
            if file >= len(self.files) or not first < stop <= self.num_chunks(file) or (file, first) < end:
                raise ValueError(f"chunks {first} to {stop} of file {file} do not exist or are not in order")
            end = (file, stop)
        if not _DIGEST.fullmatch(self.digest) or len(self.fingerprints) % SHA256_BYTES:
            raise ValueError("digest or fingerprints are not SHA-256")

    def num_chunks(self, file: int) -> int:
        """Return how many chunks a file has."""
        return -(-self.files[file][1] // self.chunk_bytes)

    def chunk_size(self, file: int, chunk: int) -> int:
        """Return the bytes of a chunk: the last one of a file may be shorter."""
        return min(self.files[file][1] - chunk * self.chunk_bytes, self.chunk_bytes)

    def chunks(self) -> list[tuple[int, int]]:
        """Return (file, chunk) of every chunk that the Layers take, in order."""
        return [(file, chunk) for file, first, stop in self.ranges for chunk in range(first, stop)]


@dataclass(frozen=True, slots=True)
class AskChunk:
    """A Node asks for a chunk.

    taken: chunks that it has taken in since the Manifest, right or wrong: so many less are under way.
    known_sha256: of what it has there already, or empty.
    """

    file: int
    chunk: int
    taken: int
    known_sha256: bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of a chunk, which begin at ``offset`` in it. ``sha256`` is that of the whole chunk."""

    file: int
    chunk: int
    offset: int
    sha256: bytes
    data: bytes

    def __post_init__(self) -> None:
        if len(self.sha256) != SHA256_BYTES or len(self.data) > PIECE_BYTES:
            raise ValueError(f"it needs a SHA-256 and at most {PIECE_BYTES} bytes")


@dataclass(frozen=True, slots=True)
class Waiting:
    """The Starter has the question, and the answer takes its time."""


@dataclass(frozen=True, slots=True)
class Done:
    """A Node has all that it wants."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The Starter does not do what it was asked. ``is_final``: asking again gives the same answer."""

    text: str
    is_final: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", self.text[:MAX_TEXT].encode("utf-8", "replace").decode())


Message = AskManifest | Manifest | AskChunk | Piece | Waiting | Done | Refused

_CODEC = Codec[Message](
    "weights message", VERSION, get_args(Message), max_bytes=MOST_BYTES, max_blob_bytes=_MOST_BLOB_BYTES
)


def encode(message: Message) -> bytes:
    """Return the bytes of a message.

    Raises:
        LocalProtocolError: a field is out of bounds, or the whole is too long.
    """
    return _CODEC.encode(message, _CHECKSUM_KEY)


def decode(data: bytes) -> Message:
    """Return the message that ``data`` carries.

    Raises:
        RemoteProtocolError: it is none, or a field is missing or not what it must be.
    """
    return _CODEC.decode(data, _CHECKSUM_KEY)


@dataclass(frozen=True, slots=True)
class WeightMap:
    """Where in a model's files the weights of each Layer lie; ranges are of bytes.

    shared: what every Stage reads: headers, small files. ends: embedding, positions, final norm and head.
    """

    digest: str
    is_directory: bool
    files: tuple[FileEntry, ...]
    fingerprints: bytes = field(repr=False)
    shared: tuple[FileRange, ...]
    layers: tuple[tuple[FileRange, ...], ...]
    ends: tuple[FileRange, ...]
    chunk_bytes: int = CHUNK_BYTES

    def manifest(self, layers: LayerRange, *, with_ends: bool) -> Manifest:
        """Return what a Stage of these Layers takes.

        Raises:
            PlanError: the model has no such Layers.
        """
        if layers.stop > len(self.layers):
            raise PlanError(
                f"layers {layers}: the model has layers 0-{len(self.layers) - 1}; give the node some of these"
            )
        wanted = [*self.shared, *(part for layer in layers for part in self.layers[layer])]
        if with_ends:
            wanted += self.ends
        ranges = _chunks_of(wanted, self.chunk_bytes)
        return Manifest(self.digest, self.is_directory, self.chunk_bytes, self.files, ranges, self.fingerprints)


def _chunks_of(ranges: Iterable[FileRange], chunk_bytes: int) -> tuple[FileRange, ...]:
    """Return the ranges of chunks that hold these ranges of bytes, ascending and apart from each other."""
    merged: list[FileRange] = []
    for file, start, stop in sorted(ranges):
        first, end = start // chunk_bytes, -(-stop // chunk_bytes)
        if merged and merged[-1][0] == file and first <= merged[-1][2]:
            merged[-1] = (file, merged[-1][1], max(end, merged[-1][2]))
        else:
            merged.append((file, first, end))
    return tuple(merged)
