"""A partial copy on disk: what it holds, what it believes after a restart, and what it finds changed. No sockets."""

import errno
import hashlib
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mdiq.control import weight_store
from mdiq.control.weight_store import Chunk, WeightStore, try_lock
from mdiq.core.weights import PART_SUFFIX, Manifest, decode
from mdiq.errors import CapacityError, ModelError

CHUNK = 4_096
DIGEST = "ab" * 32
SIZES = {"config.json": 100, "model.safetensors": 200 * CHUNK + 10}
CONTENT = {name: random.Random(name).randbytes(size) for name, size in SIZES.items()}
MANIFEST = Manifest(
    digest=DIGEST,
    is_directory=True,
    chunk_bytes=CHUNK,
    files=tuple((name, size, 10**18 + 7) for name, size in SIZES.items()),
    ranges=((0, 0, 1), (1, 0, 2), (1, 50, 54), (1, 199, 201)),
    fingerprints=b"",
)
SOME: list[Chunk] = [(1, 1), (1, 50), (1, 200)]


def _bytes(chunk: Chunk) -> bytes:
    return CONTENT[MANIFEST.files[chunk[0]][0]][chunk[1] * CHUNK :][:CHUNK]


def _put(store: WeightStore, chunks: list[Chunk]) -> None:
    for chunk in chunks:
        assert store.put(chunk, _bytes(chunk), hashlib.sha256(_bytes(chunk)).digest())


def _opened(folder: Path, manifest: Manifest = MANIFEST, *, is_thorough: bool = False) -> WeightStore:
    store = WeightStore(folder, manifest, is_thorough=is_thorough)
    while store.num_unchecked:
        store.check(3)
    return store


def _filled(folder: Path, chunks: list[Chunk] | None = None) -> WeightStore:
    """Return a closed store that has these chunks."""
    folder.mkdir(exist_ok=True)
    store = _opened(folder)
    _put(store, MANIFEST.chunks() if chunks is None else chunks)
    store.close()
    return store


def _killed(store: WeightStore) -> None:
    """End a store as a kill does: handles go, nothing else is written."""
    for handle in store._handles.values():
        os.close(handle)
    assert store._journal is not None
    os.close(store._journal)


def _note(store: WeightStore) -> Manifest:
    note = decode(store.path.with_name(store.path.name + PART_SUFFIX).read_bytes())
    assert isinstance(note, Manifest)
    return note


def _damage(folder: Path, at: int, *, keeps_time: bool) -> None:
    """Change one byte of the weights."""
    path = folder / "model" / "model.safetensors"
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    if keeps_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_what_was_put_is_there_and_the_rest_is_holes(tmp_path: Path) -> None:
    store = _filled(tmp_path)
    path = store.path / "model.safetensors"
    assert path.stat().st_size == SIZES["model.safetensors"]
    expected = bytearray(SIZES["model.safetensors"])
    for file, chunk in MANIFEST.chunks():
        if file == 1:
            expected[chunk * CHUNK : (chunk + 1) * CHUNK] = _bytes((1, chunk))
    assert path.read_bytes() == expected
    assert (store.path / "config.json").read_bytes() == CONTENT["config.json"]
    assert path.stat().st_blocks * 512 <= 8 * CHUNK + CHUNK, "holes take space: is this file system without them?"
    assert _note(store) == MANIFEST


def test_a_second_start_misses_nothing_and_writes_nothing(tmp_path: Path) -> None:
    _filled(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    store = WeightStore(tmp_path, MANIFEST)
    assert store.num_unchecked == 0 and store.missing() == []
    store.close()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_cut_transfer_goes_on_where_it_stopped(tmp_path: Path) -> None:
    _filled(tmp_path, SOME)
    store = WeightStore(tmp_path, MANIFEST)
    assert store.num_unchecked == 0
    assert store.missing() == [chunk for chunk in MANIFEST.chunks() if chunk not in SOME]


def test_after_a_kill_every_chunk_is_hashed_and_none_is_missing(tmp_path: Path) -> None:
    store = _opened(tmp_path)
    _put(store, SOME)
    _killed(store)
    assert _note(store).ranges == (), "nobody may read what is not known to be on the disk"
    again = WeightStore(tmp_path, MANIFEST)
    assert again.num_unchecked == len(SOME)
    again = _opened(tmp_path)
    assert again.num_bad == 0
    assert again.missing() == [chunk for chunk in MANIFEST.chunks() if chunk not in SOME]
    again.close()
    assert _note(again).ranges == ((1, 1, 2), (1, 50, 51), (1, 200, 201))
    assert WeightStore(tmp_path, MANIFEST).num_unchecked == 0


@pytest.mark.parametrize("num_bytes", [1, 43, 44, 45, 100])
def test_a_journal_that_a_power_cut_shortened_is_believed_as_far_as_it_goes(num_bytes: int, tmp_path: Path) -> None:
    _filled(tmp_path)
    data = (tmp_path / "journal").read_bytes()
    (tmp_path / "journal").write_bytes(data[:-num_bytes])
    num_lost = (num_bytes - 1) // 44  # the last record is the mark of the end
    store = _opened(tmp_path)
    assert len(store.missing()) == num_lost
    _put(store, store.missing())
    store.close()
    assert WeightStore(tmp_path, MANIFEST).num_unchecked == 0


def test_a_journal_of_which_any_byte_is_wrong_costs_chunks_but_never_gives_wrong_ones(tmp_path: Path) -> None:
    _filled(tmp_path / "first")
    data = (tmp_path / "first" / "journal").read_bytes()
    for at in range(0, len(data), 7):
        folder = tmp_path / f"at-{at}"
        shutil.copytree(tmp_path / "first", folder)
        (folder / "journal").write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        store = _opened(folder)
        _put(store, store.missing())
        store.close()
        assert store.missing() == []
        for file, chunk in MANIFEST.chunks():
            path = folder / "model" / MANIFEST.files[file][0]
            assert path.read_bytes()[chunk * CHUNK :][:CHUNK] == _bytes((file, chunk))


def test_a_changed_byte_is_found_by_the_files_time(tmp_path: Path) -> None:
    _filled(tmp_path)
    _damage(tmp_path, 51 * CHUNK + 5, keeps_time=False)
    store = _opened(tmp_path)
    assert store.num_bad == 1 and store.missing() == [(1, 51)]


def test_a_changed_byte_under_the_old_time_is_found_when_asked(tmp_path: Path) -> None:
    _filled(tmp_path)
    _damage(tmp_path, 51 * CHUNK + 5, keeps_time=True)
    assert _opened(tmp_path).missing() == []
    store = _opened(tmp_path, is_thorough=True)
    assert store.missing() == [(1, 51)]
    _put(store, store.missing())
    store.close()
    assert _opened(tmp_path, is_thorough=True).missing() == []


def test_a_mended_file_has_another_time_than_the_starters_and_keeps_it(tmp_path: Path) -> None:
    """What was packed from its wrong bytes is kept under the old time."""
    path = _filled(tmp_path).path / "model.safetensors"
    assert path.stat().st_mtime_ns == MANIFEST.files[1][2]
    _damage(tmp_path, 51 * CHUNK, keeps_time=True)
    store = _opened(tmp_path, is_thorough=True)
    _put(store, store.missing())
    store.close()
    mended_ns = path.stat().st_mtime_ns
    assert mended_ns != MANIFEST.files[1][2]
    store = WeightStore(tmp_path, replace(MANIFEST, ranges=((1, 90, 91),)))
    _put(store, store.missing())
    store.close()
    assert path.stat().st_mtime_ns == mended_ns
    assert (store.path / "config.json").stat().st_mtime_ns == MANIFEST.files[0][2]


def test_a_changed_byte_of_layers_that_are_not_asked_for_is_forgotten_all_the_same(tmp_path: Path) -> None:
    _filled(tmp_path)
    _damage(tmp_path, 51 * CHUNK, keeps_time=False)
    store = _opened(tmp_path, replace(MANIFEST, ranges=((1, 0, 2),)))
    assert store.missing() == [] and store.num_bad == 1
    store.close()
    assert (1, 50, 51) in _note(store).ranges and (1, 52, 54) in _note(store).ranges
    assert _opened(tmp_path).missing() == [(1, 51)]


def test_other_layers_take_only_what_is_not_there_and_forget_nothing(tmp_path: Path) -> None:
    _filled(tmp_path)
    other = replace(MANIFEST, ranges=((0, 0, 1), (1, 0, 2), (1, 53, 56)))
    store = WeightStore(tmp_path, other)
    assert store.missing() == [(1, 54), (1, 55)]
    _put(store, store.missing())
    store.close()
    assert (1, 50, 56) in _note(store).ranges
    assert WeightStore(tmp_path, MANIFEST).missing() == []


def test_a_file_that_is_touched_at_the_starter_is_asked_about_and_not_fetched_again(tmp_path: Path) -> None:
    _filled(tmp_path)
    touched = replace(MANIFEST, files=tuple((name, size, 2 * 10**18) for name, size, _ in MANIFEST.files))
    store = _opened(tmp_path, touched)
    assert store.num_bad == 0 and store.missing() == MANIFEST.chunks()
    assert all(store.known_sha256(chunk) == hashlib.sha256(_bytes(chunk)).digest() for chunk in MANIFEST.chunks())
    store.make_room()
    store.confirm((1, 50))
    _killed(store)
    again = _opened(tmp_path, touched)
    assert again.missing() == [chunk for chunk in MANIFEST.chunks() if chunk != (1, 50)]
    assert again.known_sha256((1, 51)), "what is doubted is remembered over a kill"
    for chunk in again.missing():
        again.confirm(chunk)
    again.close()
    assert _note(again) == touched
    assert (again.path / "model.safetensors").stat().st_mtime_ns == 2 * 10**18
    assert WeightStore(tmp_path, touched).num_unchecked == 0


def test_files_of_other_sizes_begin_anew(tmp_path: Path) -> None:
    _filled(tmp_path)
    other = replace(MANIFEST, files=(MANIFEST.files[0], ("model.safetensors", 300 * CHUNK, 1)))
    store = _opened(tmp_path, other)
    assert store.missing() == MANIFEST.chunks() and not store.known_sha256((1, 50))
    assert not store.path.exists()


def test_a_deleted_or_shortened_file_is_fetched_again(tmp_path: Path) -> None:
    path = _filled(tmp_path).path
    (path / "config.json").unlink()
    os.truncate(path / "model.safetensors", 60 * CHUNK)
    store = _opened(tmp_path)
    assert store.missing() == MANIFEST.chunks()
    _put(store, store.missing())
    store.close()
    assert (path / "model.safetensors").stat().st_size == SIZES["model.safetensors"]


def test_bytes_without_the_right_hash_or_length_are_not_written(tmp_path: Path) -> None:
    store = _opened(tmp_path)
    right = _bytes((1, 50))
    assert not store.put((1, 50), right[:-1] + b"\0", hashlib.sha256(right).digest())
    assert not store.put((1, 50), right + b"x", hashlib.sha256(right + b"x").digest())
    assert (1, 50) in store.missing()
    store.close()


def test_a_full_disk_is_one_line_and_what_was_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = _opened(tmp_path)
    _put(store, SOME)
    write = os.pwrite

    def full(handle: int, data: bytes, at: int) -> int:
        if at > 51 * CHUNK:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data, at)

    monkeypatch.setattr(weight_store.os, "pwrite", full)
    with pytest.raises(CapacityError, match="no space left for weights; free some there, or set MDIQ_CACHE") as caught:
        _put(store, [(1, 53)])
    assert "\n" not in str(caught.value)
    store.close()
    assert WeightStore(tmp_path, MANIFEST).missing() == [chunk for chunk in MANIFEST.chunks() if chunk not in SOME]


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(tmp_path: Path) -> None:
    huge = replace(MANIFEST, files=(MANIFEST.files[0], ("model.safetensors", 2**43, 1)), ranges=((1, 0, 2**31),))
    store = WeightStore(tmp_path, huge)
    with pytest.raises(CapacityError, match=r"no space left in .*: 8796094 MB needed, \d+ MB free"):
        store.missing = lambda: [(1, 0)] * 3  # type: ignore[method-assign]
        store.size_of = lambda _: 2**43  # type: ignore[method-assign]
        store.make_room()
    assert not store.path.exists()


def test_a_folder_that_cannot_be_one_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="weights cannot be kept there"):
        try_lock(tmp_path / "file" / "weights")


def test_a_link_in_the_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"x" * SIZES["model.safetensors"])
    (tmp_path / "cache" / "model").mkdir(parents=True)
    store = WeightStore(tmp_path / "cache", MANIFEST)
    store.path.mkdir()
    (store.path / "model.safetensors").symlink_to(outside)
    with pytest.raises(ModelError, match="cannot be kept there"):
        _put(store, SOME)
    store.close()
    assert outside.read_bytes() == b"x" * SIZES["model.safetensors"]


def test_a_folder_is_one_process_at_a_time(tmp_path: Path) -> None:
    lock = try_lock(tmp_path / "new")
    assert lock is not None
    assert try_lock(tmp_path / "new") is None
    os.close(lock)
    again = try_lock(tmp_path / "new")
    assert again is not None
    os.close(again)


def test_a_gguf_file_lies_alone_with_its_note_beside_it(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(3 * CHUNK)
    manifest = Manifest(DIGEST, False, CHUNK, (("model.gguf", len(content), 5),), ((0, 1, 2),), b"")
    store = WeightStore(tmp_path, manifest)
    data = content[CHUNK : 2 * CHUNK]
    assert store.put((0, 1), data, hashlib.sha256(data).digest())
    store.close()
    assert store.path == tmp_path / "model.gguf"
    assert store.path.read_bytes() == bytes(CHUNK) + data + bytes(CHUNK)
    assert {path.name for path in tmp_path.iterdir()} == {"journal", "model.gguf", "model.gguf" + PART_SUFFIX}
