"""Models that are here already, and the logs of a ring whose test failed. The lab is lab.py."""

import os
from collections.abc import Generator
from pathlib import Path

import pytest

from mdiq.core.known_models import DEFAULT_MODEL, QWEN_CODER_0_5B, QWEN_CODER_1_5B, PackagedModel
from tests.faults.lab import Lab
from tests.real_models import fetched

SMALL, HALF_B, ONE_AND_A_HALF_B = "smollm2", "0.5b", "1.5b"
_MODELS: dict[str, tuple[PackagedModel, str]] = {
    SMALL: (DEFAULT_MODEL, "MDIQ_TEST_MODEL_SMALL"),
    HALF_B: (QWEN_CODER_0_5B, "MDIQ_TEST_MODEL_05B"),
    ONE_AND_A_HALF_B: (QWEN_CODER_1_5B, "MDIQ_TEST_MODEL_15B"),
}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Play all points of a ring one after the other. pytest takes turns between rings whose points are the same."""
    rings: list[object] = []

    def ring_of(item: pytest.Item) -> int:
        ring = (
            item.callspec.params.get("matrix")
            if isinstance(item, pytest.Function) and hasattr(item, "callspec")
            else None
        )
        if ring not in rings:
            rings.append(ring)
        return rings.index(ring)

    items.sort(key=ring_of)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the nodes of a test's ring last said, if it failed: their logs go with its folder."""
    report = yield
    for value in item.funcargs.values() if report.failed else ():
        lab = getattr(value, "lab", value)
        if isinstance(lab, Lab):
            logs = sorted(lab.folder.glob("*.log"))
            report.sections += [(f"end of {log}", log.read_text(errors="replace")[-6_000:]) for log in logs]
    return report


def model_that_is_here(name: str) -> Path:
    """Return a model's file: what a variable names, else from the package index, fetched once into mdiq's cache."""
    model, variable = _MODELS[name]
    given = os.environ.get(variable)
    return Path(given).resolve(strict=True) if given else fetched(model)
