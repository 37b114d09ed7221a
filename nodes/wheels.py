"""Fills a folder with all wheels of a kind of device: mdiq, from this checkout, and whatever it needs there.

    python nodes/wheels.py                                      for devices like this machine
    python nodes/wheels.py --machine aarch64 --python 3.11      for Raspberry Pis with Debian 12

uv resolves the requirements as the device would (``pip download`` takes this machine's word for what a device is, and
so asks for CUDA on a Raspberry Pi), pip then downloads exactly those releases. Both ask where pip is set up to ask.
"""

import argparse
import ast
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GLIBC_MINORS = range(31, 16, -1)
"""What the wheels may ask of a device's C library: 2.31, of Debian 11, at most."""
CUDA = re.compile(r"(nvidia|cuda|triton)\b")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class WheelsError(Exception):
    """The folder cannot be filled; the text says why, and what to do."""


def resolve(machine: str, python: str, extra_index_urls: Sequence[str] = ()) -> list[str]:
    """Return NAME==VERSION of all that mdiq needs on such a device.

    Raises:
        WheelsError: uv is not there, or there is no way to fulfil the requirements.
    """
    command = [sys.executable, "-P", "-m", "uv", "pip", "compile", str(ROOT / "pyproject.toml"), "--no-config"]
    command += ["--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:"]
    command += ["--python-platform", f"{machine}-manylinux_2_31", "--python-version", python]
    # As pip does: the highest version of all indexes.
    command += ["--index-strategy", "unsafe-best-match", *index_arguments(extra_index_urls)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=_environment())
    if "No module named uv" in done.stderr:
        raise WheelsError('uv is not in this environment; run: pip install "uv>=0.9,<1"')
    if done.returncode:
        raise WheelsError(f"no wheels for {machine}, Python {python}: {done.stderr.strip()}")
    return [line for line in done.stdout.splitlines() if "==" in line]


def cuda_packages(pins: Sequence[str]) -> list[str]:
    """Return those pins that are part of CUDA."""
    return [pin for pin in pins if CUDA.match(pin)]


def download(pins: Sequence[str], machine: str, python: str, folder: Path, extra_index_urls: Sequence[str]) -> None:
    """Download the wheels of these releases for such a device.

    Raises:
        WheelsError: one has none.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins) + "\n")
        file.flush()
        command = ["download", "--no-deps", "--only-binary=:all:", "--python-version", python, "--dest", str(folder)]
        for tag in [*(f"manylinux_2_{minor}" for minor in GLIBC_MINORS), "manylinux2014"]:
            command += ["--platform", f"{tag}_{machine}"]
        command += [part for url in extra_index_urls for part in ("--extra-index-url", url)]
        _pip(*command, "--requirement", file.name)


def build(folder: Path) -> None:
    """Make the wheel of mdiq itself, in place of those of other versions."""
    for old in folder.glob("mdiq-*.whl"):
        old.unlink()
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-P", "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, *arguments[1:]], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        raise WheelsError("\n".join([f"pip {arguments[0]} failed:", *lines[-5:]]))


def _pip_settings() -> dict[str, str]:
    """Return pip's settings by name; those of the environment go before those of files."""
    command = [sys.executable, "-P", "-m", "pip", "config", "list"]
    listed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
    found: dict[str, str] = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        match = re.fullmatch(r"(?:global|download|:env:)\.([a-z-]+)=(.*)", line)
        if match:
            found[match[1]] = str(ast.literal_eval(match[2]))
    return found


def index_arguments(extra_index_urls: Sequence[str]) -> list[str]:
    """Return uv's options for asking where pip asks, and at these URLs."""
    settings = _pip_settings()
    arguments = ["--default-index", settings["index-url"]] if "index-url" in settings else []
    for option, more in (("extra-index-url", extra_index_urls), ("find-links", ())):
        for place in [*settings.get(option, "").split(), *more]:
            arguments += [f"--{option}", place]
    return arguments


def _environment() -> dict[str, str]:
    certificates = _pip_settings().get("cert")
    return {**os.environ, **({"SSL_CERT_FILE": certificates} if certificates else {})}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="wheels.py", description=(__doc__ or "").partition("\n")[0])
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--machine", default=platform.machine(), help="uname -m of the devices (default: this one's)")
    parser.add_argument("--python", default=here, help="Python of the devices (default: this one's)")
    parser.add_argument("--wheels", type=Path, default=Path("wheels"), help="folder to fill (default: wheels)")
    parser.add_argument(
        "--extra-index-url", metavar="URL", action="append", default=[], help=f"look there too: {CPU_INDEX}"
    )
    parser.add_argument(
        "--cuda", action="store_true", help="the devices have NVIDIA GPUs: CUDA may be among the wheels"
    )
    parser.add_argument("--dry-run", action="store_true", help="say which releases, download nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = _arguments(argv)
    machine, python, folder = arguments.machine, arguments.python, arguments.wheels
    try:
        pins = resolve(machine, python, arguments.extra_index_url)
        cuda = cuda_packages(pins)
        if cuda and not arguments.cuda:
            raise WheelsError(
                f"torch for {machine}, Python {python} asks for CUDA ({', '.join(cuda[:3])}, ...): gigabytes. For "
                f"devices without an NVIDIA GPU give --extra-index-url {CPU_INDEX}, for those with one --cuda"
            )
        if arguments.dry_run:
            sys.stdout.write("\n".join(pins) + "\n")
            return 0
        build(folder)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            download(pins, machine, python, Path(scratch), arguments.extra_index_url)
            own = [(wheel.name, wheel.stat().st_size) for wheel in folder.glob("mdiq-*.whl")]
            wheels = sorted([*own, *((wheel.name, wheel.stat().st_size) for wheel in Path(scratch).glob("*.whl"))])
            for wheel in Path(scratch).glob("*.whl"):
                wheel.replace(folder / wheel.name)
    except WheelsError as error:
        sys.stderr.write(f"wheels.py: {error}\n")
        return 1
    for name, size in wheels:
        sys.stdout.write(f"{size / 1e6:8.1f} MB  {name}\n")
    total = sum(size for _, size in wheels)
    sys.stdout.write(f"{total / 1e6:8.1f} MB  {len(wheels)} wheels for {machine}, Python {python}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
