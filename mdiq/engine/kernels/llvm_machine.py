"""Machine code made on the device itself, with llvmlite, for this very CPU.

No wheel carries code for what the CPUs of old PCs can do, and devices have no compiler.
"""

import contextlib
import ctypes
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from mdiq.cache import keep_small
from mdiq.engine.device import cpu_flags
from mdiq.engine.memory import drop_library, peak_bytes, reset_peak, return_free_memory
from mdiq.engine.program import engine_digest

_DIGEST_BYTES = 32  # of SHA-256, before compiled code that is kept


def host_features() -> frozenset[str]:
    """Return what LLVM calls the abilities of this CPU."""
    found = {name for name, is_there in llvm.get_host_cpu_features().items() if is_there}
    # LLVM asks Linux for few of an ARM CPU's abilities, and else goes by its name.
    return frozenset(found | {"dotprod", "neon"} if "asimddp" in cpu_flags() else found)


class Machine:
    """The compiled functions of a module; they live as long as this does.

    build: returns the module. kept: a folder where compiled code is looked for, and put for the next process; None
    compiles anew. name: tells what is built from others of this program.
    """

    def __init__(self, build: Callable[[], Any], kept: Path | None = None, name: str = "") -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        features = llvm.get_host_cpu_features().flatten().split(",") + [f"+{name}" for name in sorted(host_features())]
        cpu, abilities = llvm.get_host_cpu_name(), ",".join(filter(None, features))
        target = llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=abilities, opt=3)
        # All that the code follows from; the version's LLVM is its own.
        follows = "\n".join([llvmlite.__version__, target.triple, cpu, abilities, name, engine_digest()])
        path = None if kept is None else kept / f"{hashlib.sha256(follows.encode()).hexdigest()}.o"
        code = _read_code(path)
        if code is None:
            before_bytes = peak_bytes()
            code = _compile(build, target)
            drop_library("libllvmlite")  # 70 MB, which only compiling touches
            return_free_memory()
            if _write_code(path, code):
                # No later load compiles this code, so no node is to be planned by the memory that compiling took.
                reset_peak(before_bytes)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        """Return where a function is, for compiled code that calls it."""
        return int(self._engine.get_function_address(name))

    def function(self, name: str, num_pointers: int, num_integers: int) -> Callable[..., None]:
        """Return a function that takes addresses and then integers; it runs without Python's lock."""
        kinds = [ctypes.c_void_p] * num_pointers + [ctypes.c_int64] * num_integers
        return ctypes.CFUNCTYPE(None, *kinds)(self.address(name))


def _compile(build: Callable[[], Any], target: Any) -> bytes:
    parsed = llvm.parse_assembly(str(build()))
    parsed.verify()
    passes = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    return bytes(target.emit_object(parsed))


def _read_code(path: Path | None) -> bytes | None:
    """Return the code that a file holds, or None where there is none, or not as it was written."""
    try:
        kept = b"" if path is None else path.read_bytes()
    except OSError:
        return None
    digest, code = kept[:_DIGEST_BYTES], kept[_DIGEST_BYTES:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _write_code(path: Path | None, code: bytes) -> bool:
    """Keep code for the next process, and return whether it is kept; if it is not, the next process compiles too."""
    if path is not None:
        with contextlib.suppress(OSError):
            keep_small(path, hashlib.sha256(code).digest() + code)
            return True
    return False
