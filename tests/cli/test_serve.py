"""What `mdiq serve` refuses before it loads anything."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mdiq.cli.main import app
from mdiq.cli.ring_commands import ServeOptions
from mdiq.cli.serve import _local_topology
from mdiq.errors import MdiqError


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("x.yaml --nodes 3", "--nodes: x.yaml says that; write it there, or serve without a topology"),
        ("x.yaml --port 8081", "--port: x.yaml says that"),
        ("x.yaml --keys-file k", "--keys-file: x.yaml says that"),
        ("x.yaml --journal j", "--journal: x.yaml says that"),
        ("x.yaml --fast", "--exact: x.yaml says that"),
        ("x.yaml", "x.yaml: no such file"),
        ("--even-split", "--even-split: it is for the auto layers of a topology"),
        ("--layers 1,2 --nodes 3", "--layers 1,2: that is 2 nodes and --nodes says 3"),
        (
            "--host 0.0.0.0",
            "mdiq serve --port 8080: api.host: 0.0.0.0 lets other machines ask, and there are no API keys",
        ),
        ("--host nowhere/at/all", "api.host"),
    ],
)
def test_what_cannot_be_is_refused_in_words(words: str, text: str) -> None:
    error = CliRunner().invoke(app, ["serve", *words.split()]).exception
    assert isinstance(error, MdiqError) and text in str(error)


def test_a_ring_without_a_topology_has_its_model_and_api_from_the_flags(tmp_path: Path) -> None:
    loaded = _local_topology(ServeOptions(model=str(tmp_path), port=9_000, host="0.0.0.0", keys_file=Path("keys")))
    assert (loaded.topology.api.host, loaded.topology.api.port) == ("0.0.0.0", 9_000)
    assert loaded.topology.model.path == str(tmp_path)
    assert loaded.path(str(loaded.topology.api.keys_file)) == Path("keys").absolute()
    assert loaded.topology.journal is None
    kept = _local_topology(ServeOptions(journal=Path("kept")))
    assert kept.path(str(kept.topology.journal)) == Path("kept").absolute()
    usual = _local_topology(ServeOptions()).topology
    assert (usual.api.host, usual.api.port, usual.model.path) == ("127.0.0.1", 8_080, "smollm2-135m-instruct")
