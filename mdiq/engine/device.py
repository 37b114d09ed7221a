"""Device and dtype: which a Node uses, and how much memory is free there."""

import contextlib
import functools
import platform
from pathlib import Path

import torch

from mdiq.engine.memory import machine_free_bytes
from mdiq.engine.tensors import DTYPES
from mdiq.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """Return the torch device for "cpu", "cuda", "cuda:1" or "auto" (CUDA when there is one).

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: not a device; use cpu, cuda, cuda:0 or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: not supported; use cpu, cuda, cuda:0 or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    return device


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the feature flags of this CPU, by Linux's names: "avx2", "avx512_vnni".."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):  # of x86, of ARM
                return frozenset(value.split())
    return frozenset()


@functools.cache
def cpu_name() -> str:
    """Return the CPU's name and the instruction set that torch uses."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model", "CPU part"):
                # Virtual machines hide features of a CPU, so torch's view is part of the name.
                return f"{value.strip()} {torch.backends.cpu.get_cpu_capability()}"
    return kind_of(torch.device("cpu"))


def kind_of(device: torch.device) -> str:
    """Return the kind of a device's processor: "x86_64 AVX2"; equal kinds give equal bits in exact mode."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def choose_dtype(name: str) -> torch.dtype:
    """Return the torch dtype for "f32" or "bf16".

    Raises:
        ConfigError: another name.
    """
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name}: not supported; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of the device; for the CPU, within the limits of the machine and the cgroup."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return machine_free_bytes()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch, or Python, could not allocate: on the CPU torch has no class for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
