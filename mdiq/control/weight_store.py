"""A Node's partial copy of a model: sparse files in which only the chunks that it fetched are filled. No sockets.

Under the folder of a model, which the caller names after its digest:

    lock                     held while chunks are fetched
    journal                  what is there, see below
    model.gguf               the copy of a GGUF file; or
    model/                   of a directory, with the names that its files have at the Starter
    model*.mdiq-part         what of the copy is there, for engine/formats/checkpoint.py; written before the first hole

A file has its full size from the start; what was not fetched are holes, which take no space. When all is written a file
gets the time of the Starter's, so what is made from it (packed weights) stays valid when further layers come.

The journal is records of 44 bytes: file u32, chunk u32, SHA-256, CRC-32 of these. File 0xFFFFFFFF marks something else,
told by the chunk's number: 0, always the first record, which files it is about; 1, all was written and the files had
these sizes and times; 2, a file was mended; 3, the chunks so far are of an earlier state of the Starter's files, which
has to say whether they are still right. Each record follows the bytes that it is about. A journal that does not end
with mark 1, as after a kill or a power cut, or whose files have other sizes or times, is believed only where the bytes
still have the hash that it says.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from mdiq import cache
from mdiq.core.weights import PART_SUFFIX, FileRange, Manifest, encode
from mdiq.errors import CapacityError, ModelError

_RECORD = struct.Struct("<II32sI")
_MARK = 0xFFFF_FFFF
_FILES, _CLOSED, _MENDED, _EARLIER = 0, 1, 2, 3
_MENDED_AT = struct.Struct("<IQ20x")

Chunk = tuple[int, int]
"""Index of a file, and of a chunk in it."""


@contextlib.contextmanager
def file_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in cache.NO_SPACE:
            raise CapacityError(
                f"{folder}: no space left for weights; free some there, or set MDIQ_CACHE to a directory with more"
            ) from None
        raise ModelError(
            f"{folder}: weights cannot be kept there ({error.strerror}); make it writable, or set MDIQ_CACHE"
        ) from None


def try_lock(folder: Path) -> int | None:
    """Return a handle that keeps other processes away from the folder until it is closed; None while one is there.

    Raises:
        ModelError, CapacityError: the folder cannot be written.
    """
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    is_ours = False
    try:
        is_ours = cache.try_lock(handle)
    except OSError as error:
        # Two processes that fill one folder would spoil each other's journal.
        raise ModelError(
            f"{folder}: no file locks there ({error.strerror}); set MDIQ_CACHE to a directory of a local disk"
        ) from None
    finally:
        if not is_ours:
            os.close(handle)
    return handle if is_ours else None


class WeightStore:
    """The copy in ``folder`` that a Manifest is about; the caller holds the folder's lock, and calls ``close``.

    path: what open_checkpoint opens.
    num_bad: chunks that were found changed on disk.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, is_thorough: bool = False) -> None:
        """Read the journal. is_thorough: believe it nowhere, hash all that is there.

        Raises:
            ModelError, CapacityError: the folder cannot be used.
        """
        self._folder = folder
        self._manifest = manifest
        self.path = folder / ("model" if manifest.is_directory else manifest.files[0][0])
        self.num_bad = 0
        self._verified: dict[Chunk, bytes] = {}
        self._doubtful: dict[Chunk, bytes] = {}
        self._unchecked: list[Chunk] = []
        self._mended_ns: dict[int, int] = {}
        self._handles: dict[int, int] = {}
        self._journal: int | None = None
        self._is_stale = False  # the journal does not say what is known now
        with file_errors(folder):
            self._load(is_thorough)

    @property
    def num_unchecked(self) -> int:
        """Chunks that ``check`` has yet to look at."""
        return len(self._unchecked)

    def check(self, most: int) -> None:
        """Hash up to ``most`` chunks that are doubted, and forget those that have changed.

        Raises:
            ModelError: the disk cannot be read.
        """
        with file_errors(self._folder):
            for chunk in self._unchecked[:most]:
                chunks = self._verified if chunk in self._verified else self._doubtful
                size = self._manifest.chunk_size(*chunk)
                data = os.pread(self._handle(chunk[0]), size, chunk[1] * self._manifest.chunk_bytes)
                if hashlib.sha256(data).digest() != chunks[chunk]:
                    del chunks[chunk]
                    self.num_bad += 1
                    # Another time than the Starter's file has: what was packed from wrong bytes is not used again.
                    self._mended_ns[chunk[0]] = time.time_ns()
            del self._unchecked[:most]

    def missing(self) -> list[Chunk]:
        """Return the Manifest's chunks that are not there, in order."""
        return [chunk for chunk in self._manifest.chunks() if chunk not in self._verified]

    def known_sha256(self, chunk: Chunk) -> bytes:
        """Return the hash of a missing chunk that was there before the Starter's file changed, or nothing."""
        return self._doubtful.get(chunk, b"")

    def size_of(self, chunks: Iterable[Chunk]) -> int:
        """Return the bytes of some chunks."""
        return sum(self._manifest.chunk_size(*chunk) for chunk in chunks)

    def make_room(self) -> None:
        """Create the files, and see whether what is missing fits.

        Raises:
            CapacityError: it does not.
            ModelError: the folder cannot be written.
        """
        needed = self.size_of(chunk for chunk in self.missing() if chunk not in self._doubtful)
        with file_errors(self._folder):
            cache.make_room(self._folder, needed)
            self._begin()

    def put(self, chunk: Chunk, data: bytes | bytearray, sha256: bytes) -> bool:
        """Write a chunk that came, or return False because its bytes do not have that hash.

        Raises:
            CapacityError: the disk is full. ModelError: it cannot be written.
        """
        if len(data) != self._manifest.chunk_size(*chunk) or hashlib.sha256(data).digest() != sha256:
            return False
        with file_errors(self._folder):
            self._begin()
            view, at = memoryview(data), chunk[1] * self._manifest.chunk_bytes
            while view:
                written = os.pwrite(self._handle(chunk[0]), view, at)
                view, at = view[written:], at + written
            self._note_chunk(chunk, sha256)
        return True

    def confirm(self, chunk: Chunk) -> None:
        """Note that a chunk of ``known_sha256`` is still the Starter's."""
        with file_errors(self._folder):
            self._begin()
            self._note_chunk(chunk, self._doubtful[chunk])

    def close(self) -> None:
        """Bring everything to the disk and say so in the journal. Nothing is written if nothing has changed."""
        try:
            with file_errors(self._folder):
                if self._is_stale and not self._unchecked:
                    self._begin()
                if self._journal is not None:
                    self._finish(self._journal)
        finally:
            for handle in [*self._handles.values(), *([] if self._journal is None else [self._journal])]:
                os.close(handle)
            self._handles.clear()
            self._journal = None

    def _load(self, is_thorough: bool) -> None:
        try:
            data = (self._folder / "journal").read_bytes()
        except FileNotFoundError:
            data = b""
        records = list(_records(data))
        layout, times = self._identity()
        if not records or records[0][:2] != (_MARK, _FILES) or records[0][2][:16] != layout:
            self._clear()
            return
        for file, number, content in records[1:]:
            if file != _MARK:
                if self._can_hold(file, number):
                    self._verified[file, number] = content
                    self._doubtful.pop((file, number), None)
            elif number == _MENDED:
                mended, at_ns = _MENDED_AT.unpack(content)
                self._mended_ns[mended] = at_ns
            elif number == _EARLIER:
                self._doubt_all()
        is_whole = len(data) == len(records) * _RECORD.size
        if not is_whole or records[-1] != (_MARK, _CLOSED, self._state()) or is_thorough:
            self._unchecked = sorted(self._verified.keys() | self._doubtful.keys())
            self._is_stale = True
        if records[0][2][16:] != times:
            self._doubt_all()
            self._mended_ns.clear()
            self._is_stale = True

    def _can_hold(self, file: int, chunk: int) -> bool:
        """Tell whether a chunk is one of a file that is there."""
        if file >= len(self._manifest.files) or chunk >= self._manifest.num_chunks(file):
            return False
        stat = self._stat(file)
        return stat is not None and stat.st_size == self._manifest.files[file][1]

    def _doubt_all(self) -> None:
        self._doubtful |= self._verified
        self._verified.clear()

    def _clear(self) -> None:
        """Delete a copy that is of no use: there is no journal, or the model's files are other ones now."""
        if self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)

    def _begin(self) -> None:
        """Write the journal anew, without its end: a copy that is not closed is not believed."""
        if self._journal is not None:
            return
        if self._manifest.is_directory:
            self.path.mkdir(exist_ok=True)
        self._write_note()
        lines = [_record(_MARK, _FILES, b"".join(self._identity()))]
        lines += [_record(_MARK, _MENDED, _MENDED_AT.pack(*mended)) for mended in self._mended_ns.items()]
        if self._doubtful:
            lines += [_record(*chunk, sha256) for chunk, sha256 in self._doubtful.items()]
            lines.append(_record(_MARK, _EARLIER, b""))
        lines += [_record(*chunk, sha256) for chunk, sha256 in self._verified.items()]
        _replace_file(self._folder / "journal", b"".join(lines))
        self._journal = os.open(self._folder / "journal", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        for file in range(len(self._manifest.files)):
            self._handle(file)

    def _note_chunk(self, chunk: Chunk, sha256: bytes) -> None:
        assert self._journal is not None  # _begin was called
        _append(self._journal, _record(*chunk, sha256))
        self._doubtful.pop(chunk, None)
        self._verified[chunk] = sha256

    def _finish(self, journal: int) -> None:
        for file, handle in self._handles.items():
            os.fsync(handle)
            at_ns = self._mended_ns.get(file, self._manifest.files[file][2])
            os.utime(handle, ns=(at_ns, at_ns))
        _append(journal, _record(_MARK, _CLOSED, self._state()))
        os.fsync(journal)
        self._write_note()

    def _write_note(self) -> None:
        ranges: list[FileRange] = []
        for file, chunk in sorted(self._verified):
            if ranges and ranges[-1][0] == file and ranges[-1][2] == chunk:
                ranges[-1] = (file, ranges[-1][1], chunk + 1)
            else:
                ranges.append((file, chunk, chunk + 1))
        note = encode(replace(self._manifest, ranges=tuple(ranges)))
        _replace_file(self.path.with_name(self.path.name + PART_SUFFIX), note)

    def _file(self, file: int) -> Path:
        return self.path / self._manifest.files[file][0] if self._manifest.is_directory else self.path

    def _handle(self, file: int) -> int:
        """Return the open file, which has its size from the first moment."""
        if file not in self._handles:
            # A link that somebody put there must not lead elsewhere.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._handles[file] = handle = os.open(self._file(file), flags, 0o644)
            if os.fstat(handle).st_size != self._manifest.files[file][1]:
                os.ftruncate(handle, 0)
                os.ftruncate(handle, self._manifest.files[file][1])
        return self._handles[file]

    def _stat(self, file: int) -> os.stat_result | None:
        try:
            return self._file(file).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _identity(self) -> tuple[bytes, bytes]:
        """Return 16 bytes that tell the files apart from others, and 16 that tell their state at the Starter."""
        files = self._manifest.files
        layout = f"{self._manifest.chunk_bytes} {[(name, size) for name, size, _ in files]}"
        return _hash(layout)[:16], _hash(str([at_ns for _, _, at_ns in files]))[:16]

    def _state(self) -> bytes:
        """Return a hash of the sizes and times that the files have now."""
        stats = [self._stat(file) for file in range(len(self._manifest.files))]
        return _hash(str([stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _record(file: int, number: int, content: bytes) -> bytes:
    body = _RECORD.pack(file, number, content, 0)[:-4]
    return body + struct.pack("<I", zlib.crc32(body))


def _records(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield (file, chunk, content) until the data ends or a record is damaged."""
    for at in range(0, len(data) - _RECORD.size + 1, _RECORD.size):
        file, number, content, crc = _RECORD.unpack_from(data, at)
        if zlib.crc32(data[at : at + _RECORD.size - 4]) != crc:
            return
        yield file, number, content


def _append(handle: int, record: bytes) -> None:
    if os.write(handle, record) != len(record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _replace_file(path: Path, data: bytes) -> None:
    """Write a file so that whoever reads it sees the old one or the new one, whole."""
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
