"""What a topology file means to a ring: its flags, its nodes as both ends reach them, and keys that fit."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mdiq.cli.keys import execute as make_keys
from mdiq.config.load import LoadedTopology, load_topology
from mdiq.core.ring_settings import RingSettings
from mdiq.core.types import LayerRange, WeightSettings
from mdiq.errors import ConfigError
from mdiq.plan.pace import PaceSettings
from mdiq.runtime.options import RingOptions
from mdiq.service.topology_rings import TopologyRings
from mdiq.service.topology_values import model_of, node_of, peers_of, remote_ring, threads_of
from mdiq.transport.keys import public_of

TEXT = """\
version: 1
model: {path: smollm2-135m-instruct, weights: int4, mode: fast, dtype: bf16}
nodes:
  - {name: desk, role: starter, address: 192.168.1.10, threads: 3, layers: 0-11}
  - {name: pi1, address: 192.168.1.11, threads: 2, layers: 12-29}
links: {wire: bf16, hops: [{from: pi1, to: desk, wire: i8}], transfer_limit: 20mbit}
ring: {decode_wait: 100ms, max_live: 8, prefix_reuse: false}
"""


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedTopology:
    file = tmp_path / "topology.yaml"
    file.write_text(TEXT)
    assert make_keys(file, (), dry_run=False) == 0
    return load_topology(file)


def test_the_file_says_what_the_ring_is(loaded: LoadedTopology) -> None:
    config: Any = SimpleNamespace(num_layers=30)
    threads = threads_of(loaded.topology, loaded.topology.starter)
    rings = TopologyRings(
        loaded, Path("m.gguf"), config, threads=threads, join_wait_s=7.0, even_split=False, on_note=lambda _: None
    )
    assert rings.options() == RingOptions(
        model=Path("m.gguf"),
        layers=(LayerRange(0, 12), LayerRange(12, 30)),
        weights=WeightSettings("int4", "bf16", exact=False, device="cpu"),
        wires=("bf16", "i8"),
        threads=3,
        pace=PaceSettings(decode_wait_s=0.1, max_live=8),
        ring=RingSettings(prefix_tokens=0),
        remote=remote_ring(loaded, 7.0),
    )


def test_a_model_beside_the_file_is_meant_before_a_known_name(loaded: LoadedTopology) -> None:
    assert model_of(loaded) == "smollm2-135m-instruct"
    (loaded.file.parent / "smollm2-135m-instruct").mkdir()
    assert model_of(loaded) == str(loaded.file.parent / "smollm2-135m-instruct")


def test_both_ends_know_each_other_by_address_and_key(loaded: LoadedTopology) -> None:
    ring, peers = remote_ring(loaded, 7.0), peers_of(loaded, "pi1")
    assert ring.nodes == peers.nodes
    assert [node.data_endpoint for node in ring.nodes] == ["tcp://192.168.1.10:7400", "tcp://192.168.1.11:7400"]
    assert ring.control_endpoint == "tcp://192.168.1.10:7401"
    assert ring.weights_endpoint == peers.weights_endpoint == "tcp://192.168.1.10:7402"
    assert (ring.join_wait_s, ring.transfer_bytes_per_s) == (7.0, 2.5e6)
    assert ring.secret is not None and peers.secret is not None
    assert [public_of(ring.secret), public_of(peers.secret)] == [node.public_key for node in ring.nodes]
    assert peers.public_key("tcp://192.168.1.10:7400") == public_of(ring.secret)
    with pytest.raises(ConfigError, match=r"tcp://192.168.1.99:7400: no node of this topology"):
        peers.public_key("tcp://192.168.1.99:7400")
    peers.check_name("desk")
    with pytest.raises(ConfigError, match=r"pi9: no node of this topology; copy the starter's"):
        peers.check_name("pi9")
    assert "secret" not in repr(ring) + repr(peers)


def test_a_node_is_a_worker_of_the_file(loaded: LoadedTopology) -> None:
    node, threads = node_of(loaded, "pi1")
    assert (node.name, threads) == ("pi1", 2)
    for name, words in (("pi9", "its workers are pi1"), ("desk", "it is the Starter"), ("", "--name NAME")):
        with pytest.raises(ConfigError, match=words):
            node_of(loaded, name)


def test_a_key_that_is_not_the_files_is_refused(loaded: LoadedTopology) -> None:
    keys = loaded.file.parent / "keys"
    (keys / "pi1.key").write_bytes((keys / "desk.key").read_bytes())
    with pytest.raises(ConfigError, match="pi1: its private key is not the one of public_key"):
        peers_of(loaded, "pi1")


def test_the_starter_knows_the_noise_of_each_node_and_the_workers_need_not(tmp_path: Path) -> None:
    file = tmp_path / "topology.yaml"
    file.write_text("""version: 1
model: {path: smollm2-135m-instruct}
nodes:
- {name: desk, role: starter, address: 127.0.0.1}
- {name: pi1, address: 127.0.0.1, data_port: 7403}
- {name: pi2, address: 127.0.0.1, data_port: 7404, noise: {epsilon: 1, delta: 1e-5, clip: 0.5}}
""")
    loaded = load_topology(file)
    noises = [node.noise for node in remote_ring(loaded, 7.0).nodes]
    assert noises[:2] == [None, None] and noises[2] is not None
    assert (noises[2].epsilon, noises[2].delta, noises[2].row.clip) == (1.0, 1e-5, 0.5)
    assert noises[2].row.sigma == pytest.approx(3.730632, rel=1e-5)
    assert [node.noise for node in peers_of(loaded, "pi1").nodes] == [None] * 3
