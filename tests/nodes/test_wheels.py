"""nodes/wheels.py: what each kind of device is sent."""

import subprocess
from pathlib import Path

import pytest

from nodes import wheels

PI = ["numpy==2.4.6", "torch==2.9.1"]
PC_FROM_PYPI = [
    "cuda-toolkit==13.0.3",
    "numpy==2.4.6",
    "nvidia-cudnn-cu13==9.20.0.48",
    "torch==2.13.0",
    "triton==3.7.0",
]


def test_parts_of_cuda_are_told_from_other_packages() -> None:
    assert wheels.cuda_packages(PI) == []
    assert wheels.cuda_packages(PC_FROM_PYPI) == [PC_FROM_PYPI[0], PC_FROM_PYPI[2], PC_FROM_PYPI[4]]


def test_cuda_is_refused_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wheels, "resolve", lambda *_: PC_FROM_PYPI)
    assert wheels.main(["--wheels", str(tmp_path / "wheels")]) == 1
    assert wheels.CPU_INDEX in capsys.readouterr().err
    assert not (tmp_path / "wheels").exists()


def test_devices_with_a_gpu_may_have_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(wheels, "resolve", lambda *_: PC_FROM_PYPI)
    assert wheels.main(["--cuda", "--dry-run"]) == 0
    assert capsys.readouterr().out.split() == PC_FROM_PYPI


def test_uv_asks_where_pip_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "\n".join(
        [
            ":env:.extra-index-url='https://of.the/environment https://and/another'",
            "global.extra-index-url='https://of.a/file'",
            "global.index-url='https://mirror/simple'",
            "install.no-binary='x'",
        ]
    )
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, listed, ""))
    assert wheels.index_arguments(["https://cpu"]) == [
        *("--default-index", "https://mirror/simple"),
        *("--extra-index-url", "https://of.the/environment"),
        *("--extra-index-url", "https://and/another"),
        *("--extra-index-url", "https://cpu"),
    ]


@pytest.mark.integration
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_an_arm_device_is_sent_nothing_of_cuda(python: str) -> None:
    try:
        pins = wheels.resolve("aarch64", python)
    except wheels.WheelsError as error:
        if any(words in str(error) for words in ("uv is not in", "Failed to fetch", "connect")):
            pytest.skip(f"this needs uv and a package index: {error}")
        raise
    assert wheels.cuda_packages(pins) == []
    (torch,) = [pin for pin in pins if pin.startswith("torch==")]
    assert torch.startswith("torch==2.9.")
    assert any(pin.startswith("llvmlite==") for pin in pins)
