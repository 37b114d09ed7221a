"""Compiled code is kept for the next process, and used only where it is as it was written."""

from functools import partial
from pathlib import Path

import llvmlite.binding as llvm
import pytest
import torch

from mdiq.engine.kernels import llvm_machine, llvm_matmul, llvm_softmax_code
from mdiq.engine.kernels.llvm_machine import Machine, host_features


def _machine(kept: Path | None) -> Machine:
    return Machine(partial(llvm_softmax_code.build, host_features()), kept, "softmax")


def _weights(machine: Machine) -> list[float]:
    logits, numbers = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([3.0, 1.0])
    weights, sums = torch.empty(3), torch.empty(1)
    machine.function("soften", 4, 1)(*(tensor.data_ptr() for tensor in (logits, numbers, weights, sums)), 3)
    return weights.tolist()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One element for each module that was compiled."""
    seen: list[None] = []
    make = llvm.create_pass_builder

    def counted(*arguments: object) -> object:
        seen.append(None)
        return make(*arguments)

    monkeypatch.setattr(llvm, "create_pass_builder", counted)
    return seen


def test_kept_code_is_not_compiled_again_and_gives_the_same_bits(tmp_path: Path, compilations: list[None]) -> None:
    fresh = _weights(_machine(None))
    assert [_weights(_machine(tmp_path / "code")) for _ in range(3)] == [fresh] * 3
    assert len(compilations) == 2
    assert [file.suffix for file in (tmp_path / "code").iterdir()] == [".o"]


def test_kept_code_leaves_compiling_out_of_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes half as much as a small node's process; on its first start a node had no room for its layers."""
    peaks, resets = iter([7, 8, 9]), list[int]()
    monkeypatch.setattr(llvm_machine, "peak_bytes", lambda: next(peaks))
    monkeypatch.setattr(llvm_machine, "reset_peak", resets.append)
    _machine(tmp_path / "code")
    assert resets == [7]  # what came before it still counts
    _machine(tmp_path / "code")  # nothing is compiled
    _machine(None)  # the next process compiles this too
    (tmp_path / "file").write_bytes(b"")
    _machine(tmp_path / "file")
    assert resets == [7] and next(peaks, None) is None


def test_kept_code_spares_the_building_too(tmp_path: Path) -> None:
    _machine(tmp_path)
    assert _weights(Machine(lambda: pytest.fail("it was built again"), tmp_path, "softmax"))


def test_code_of_another_module_or_program_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[None]
) -> None:
    _machine(tmp_path)
    Machine(partial(llvm_softmax_code.build, host_features()), tmp_path, "another")
    monkeypatch.setattr(llvm_machine, "engine_digest", lambda: "of a change")
    _machine(tmp_path)
    assert len(compilations) == len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("harm", [b"", b"x" * 31, b"\0" * 4_096, "cut", "changed"])
def test_code_that_is_not_as_it_was_written_is_compiled_anew(
    harm: bytes | str, tmp_path: Path, compilations: list[None]
) -> None:
    fresh = _weights(_machine(tmp_path))
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    bad = {"cut": good[:-1], "changed": good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]}
    file.write_bytes(harm if isinstance(harm, bytes) else bad[harm])
    assert _weights(_machine(tmp_path)) == fresh
    assert file.read_bytes() == good and len(compilations) == 2


def test_a_folder_that_cannot_be_written_only_costs_the_time(tmp_path: Path, compilations: list[None]) -> None:
    (tmp_path / "file").write_bytes(b"")
    folder = tmp_path / "file" / "code"  # below a file: not even root makes that
    assert _weights(_machine(folder)) == _weights(_machine(folder))
    assert len(compilations) == 2


def test_a_user_without_a_home_compiles_each_time(monkeypatch: pytest.MonkeyPatch, compilations: list[None]) -> None:
    for name in ("MDIQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "nowhere")
    for _ in range(2):
        llvm_matmul.compiled.cache_clear()
        assert sum(_weights(llvm_matmul.compiled("llvm_softmax_code"))) > 1
    assert len(compilations) == 2
