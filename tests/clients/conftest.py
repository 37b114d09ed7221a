"""`mdiq serve` with a real model, as programs of others find it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.conftest import HALF_B, ONE_AND_A_HALF_B, model_that_is_here
from tests.integration.local_service import LocalService, local_service

KEY, NARROW_KEY = "key-of-the-client-tests", "key-of-one-request-at-a-time"


@dataclass(frozen=True)
class Served:
    """url: what clients take as base URL; model: its id there; key: may do all; narrow_key: one request at a time."""

    service: LocalService
    url: str
    model: str
    key: str = KEY
    narrow_key: str = NARROW_KEY


@contextmanager
def _served(folder: Path, model: Path) -> Iterator[Served]:
    keys = {KEY: {}, NARROW_KEY: {"max_requests": 1}}
    with local_service(folder, model, keys, "--max-live", "8", "--kv-tokens", "16384") as service:
        yield Served(service, f"{service.url}/v1", model.stem)


@pytest.fixture(scope="module")
def half_b(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The 0.5B model."""
    with _served(tmp_path_factory.mktemp("half-b"), model_that_is_here(HALF_B)) as served:
        yield served


@pytest.fixture(scope="module")
def tool_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The 1.5B model: it calls a tool and then says what it got. The 0.5B model calls on and on."""
    with _served(tmp_path_factory.mktemp("tool-model"), model_that_is_here(ONE_AND_A_HALF_B)) as served:
        yield served
