"""A Topology as values: what follows from it, and what is wrong between them."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mdiq.config.checks import find_problems
from mdiq.config.load import check_bytes
from mdiq.config.topology import MAX_NODES, Topology
from mdiq.core.types import LayerRange

KEYS = ["0" * 40, "1" * 40, "2" * 40]


def topology(*nodes: dict[str, Any], **more: Any) -> Topology:
    return Topology.model_validate({"version": 1, "model": {"path": "m"}, "nodes": nodes, **more})


STARTER = {"name": "desk", "role": "starter", "address": "10.0.0.1", "public_key": KEYS[0]}
WORKER = {"name": "pi1", "address": "fd00::11", "public_key": KEYS[1], "memory": "700M", "threads": 2}
SPARE = {"name": "pi2", "address": "pi2.lan", "public_key": KEYS[2], "spare": True}


def test_values_come_in_units_that_their_names_say() -> None:
    value = topology(
        STARTER,
        WORKER,
        links={"transfer_limit": "20mbit"},
        ring={"decode_wait": "1.5s", "silence": "2s", "outage_tolerance": "5s", "max_live": 8},
    )
    node = value.node("pi1")
    assert (node.memory_bytes, node.threads, node.layers) == (700 << 20, 2, None)
    assert value.links.transfer_limit_bit_per_s == 2e7
    ring = value.ring
    assert (ring.decode_wait_s, ring.silence_s, ring.outage_tolerance_s, ring.max_live) == (1.5, 2.0, 5.0, 8)


def test_what_the_file_leaves_out_has_its_default() -> None:
    value = topology(STARTER, WORKER)
    node = value.starter
    assert (node.data_port, node.control_port, node.weights_port) == (7400, 7401, 7402)
    assert (node.device, node.threads, node.memory_bytes, node.layers, node.spare) == ("cpu", None, None, None, False)
    assert (value.model.weights, value.model.mode, value.model.dtype) == ("auto", "exact", "f32")
    assert (value.links.wire, value.links.hops, value.links.transfer_limit_bit_per_s) == ("auto", (), None)
    assert (value.security.keys, value.security.insecure) == ("keys", False)
    assert (value.api.host, value.api.port, value.api.keys_file) == ("127.0.0.1", 8080, None)
    assert (value.ring.decode_wait_s, value.ring.silence_s, value.ring.outage_tolerance_s) == (0.2, 5.0, 60.0)
    assert (value.ring.max_live, value.ring.prefix_reuse) == (None, True)
    assert value.journal == "auto"


def test_the_ring_has_the_nodes_in_order_without_the_spare_ones() -> None:
    value = topology(STARTER, SPARE, WORKER)
    assert [node.name for node in value.ring_nodes] == ["desk", "pi1"]
    assert [node.name for node in value.spares] == ["pi2"]
    assert value.starter.is_starter and not value.node("pi1").is_starter
    with pytest.raises(KeyError):
        value.node("pi3")


def test_endpoints_are_those_of_the_receiver() -> None:
    value = topology(STARTER, WORKER)
    assert value.starter.control_endpoint == "tcp://10.0.0.1:7401"
    assert value.starter.weights_endpoint == "tcp://10.0.0.1:7402"
    assert value.node("pi1").data_endpoint == "tcp://[fd00::11]:7400"


def test_a_hop_has_its_own_format_or_that_of_all() -> None:
    value = topology(STARTER, WORKER, links={"wire": "bf16", "hops": ({"from": "pi1", "to": "desk", "wire": "i8"},)})
    assert value.hops == (("desk", "pi1"), ("pi1", "desk"))
    assert value.wire_of("pi1", "desk") == "i8"
    assert value.wire_of("desk", "pi1") == "bf16"


def test_layers_are_half_open_ranges() -> None:
    value = topology(STARTER | {"layers": "0-11"}, WORKER | {"layers": "12-29"})
    assert [node.layers for node in value.nodes] == [LayerRange(0, 12), LayerRange(12, 30)]


def test_plain_text_is_on_loopback_or_said() -> None:
    local = topology({"name": "a", "role": "starter", "address": "127.0.0.1"})
    assert local.is_on_loopback and local.is_plain_text
    assert not topology(STARTER, WORKER).is_plain_text
    assert topology(STARTER, WORKER, security={"insecure": True}).is_plain_text
    keyless = {key: value for key, value in STARTER.items() if key != "public_key"}
    assert topology(keyless).is_plain_text
    assert find_problems(topology(keyless), without_keys=True) == []
    assert "no node has a public_key" in str(find_problems(topology(keyless))[0])


def test_all_that_does_not_fit_together_is_found_at_once() -> None:
    value = topology(STARTER, WORKER | {"name": "desk"}, api={"host": "0.0.0.0"})
    text = "; ".join(map(str, find_problems(value)))
    assert "nodes[1].name: desk is the name of another node (nodes[0].name) too" in text
    assert "api.host: 0.0.0.0 lets other machines ask" in text


def test_a_topology_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        topology(STARTER).journal = "x"  # type: ignore[misc]


def test_there_are_no_more_nodes_than_a_ring_takes() -> None:
    workers = [{"name": f"n{i}", "address": f"10.0.1.{i}", "public_key": f"{i:040}"} for i in range(1, MAX_NODES)]
    assert len(topology(STARTER | {"public_key": "a" * 40}, *workers).nodes) == MAX_NODES
    with pytest.raises(ValidationError, match="these are 65 nodes, and a ring has up to 64"):
        topology(STARTER | {"public_key": "a" * 40}, *workers, SPARE | {"public_key": "b" * 40})


def test_what_clients_of_the_api_meet_can_be_set() -> None:
    api = {"cors_origins": ("https://chat.example.org",), "allowed_hosts": ("a.example",), "client_timeout": "20s"}
    found = topology(STARTER, WORKER, model={"path": "m.gguf", "name": "Llama-3.2-1B-Instruct"}, api=api)
    assert found.model.name == "Llama-3.2-1B-Instruct"
    assert found.api.cors_origins == ("https://chat.example.org",)
    assert found.api.allowed_hosts == ("a.example",)
    assert found.api.client_timeout_s == 20


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("model", {"path": "m", "name": "two words"}, "not a name for clients"),
        ("api", {"cors_origins": ("chat.example.org",)}, "write for example https://"),
        ("api", {"allowed_hosts": ("chat.example.org:8080",)}, "without a port"),
        ("api", {"client_timeout": "1ms"}, "write 1s to 3600s"),
    ],
)
def test_what_clients_of_the_api_meet_is_checked(section: str, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        topology(STARTER, WORKER, **{section: values})


@pytest.mark.parametrize("written", ["1e-6", "1.0e-6", "1.0e-06", "0.000001"])
def test_a_small_number_may_be_written_as_people_and_programs_do(written: str) -> None:
    noise = f"{{epsilon: 8, delta: {written}, clip: 2.5}}"
    text = f"""version: 1
model: {{path: m}}
nodes:
- {{name: desk, role: starter, address: 127.0.0.1}}
- {{name: pi1, address: 127.0.0.1, data_port: 7403, noise: {noise}}}
"""
    report = check_bytes(text.encode(), Path("t.yaml"))
    assert report.topology is not None, report.lines()
    found = report.topology.nodes[1].noise
    assert found is not None and (found.epsilon, found.delta, found.clip) == (8.0, 1e-6, 2.5)
