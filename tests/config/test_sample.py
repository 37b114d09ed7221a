"""Files that `mdiq init` writes."""

from pathlib import Path

import pytest
import yaml

from mdiq.config.load import check_bytes
from mdiq.config.sample import Answers, NodeAnswer, scalar, topology_text
from mdiq.config.schema import SCHEMA_LINE, topology_schema
from mdiq.config.topology import Topology


def loaded(text: str) -> Topology:
    report = check_bytes(text.encode(), Path("t.yaml"))
    assert report.topology is not None, report.lines()
    return report.topology


def test_a_sample_says_what_was_answered() -> None:
    nodes = (
        NodeAnswer("desk", "192.168.1.10"),
        NodeAnswer("no", "fd00::11", values={"memory": "700M", "threads": "2"}),
        NodeAnswer("pi2", "pi2.lan", spare=True, values={"device": "cuda:0"}),
    )
    text = topology_text(Answers(nodes, model="/srv/my model", weights="int4", insecure=True))
    topology = loaded(text)
    assert topology.model.path == "/srv/my model"
    assert topology.model.weights == "int4"
    assert [(node.name, node.address, node.spare) for node in topology.nodes] == [
        ("desk", "192.168.1.10", False),
        ("no", "fd00::11", False),
        ("pi2", "pi2.lan", True),
    ]
    assert (topology.nodes[1].memory_bytes, topology.nodes[1].threads) == (700 << 20, 2)
    assert topology.nodes[2].device == "cuda:0"
    assert topology.security.insecure


def test_a_sample_names_the_schema_and_explains_every_key() -> None:
    text = topology_text(Answers((NodeAnswer("desk", "127.0.0.1"),)))
    assert text.startswith(f"{SCHEMA_LINE}\n")
    assert max(map(len, text.splitlines())) <= 120
    words = " ".join(line.strip(" #") for line in text.splitlines())
    schema = topology_schema()
    for model in ("ModelChoice", "Node", "Links", "Security", "Api", "RingWishes"):
        for key, value in schema["$defs"][model]["properties"].items():
            assert f"{key}: " in text
            assert value["description"] in words


def test_nodes_on_one_machine_get_ports_of_their_own() -> None:
    nodes = tuple(NodeAnswer(f"n{i}", "127.0.0.1", values={"data_port": "7404"} if i == 1 else {}) for i in range(4))
    assert [node.data_port for node in loaded(topology_text(Answers(nodes))).nodes] == [7400, 7404, 7403, 7405]


@pytest.mark.parametrize(
    "text",
    ["no", "1", "1e3", "0x1", "12:30", "a: b", "# a", "", " a", "~", "null", "2024-01-01", "a\nb", "ä", "::1", "a:"],
)
def test_a_text_stays_a_text(text: str) -> None:
    assert yaml.safe_load(f"key: {scalar(text)}") == {"key": text}
    assert yaml.safe_load(f"{{key: {scalar(text)}}}") == {"key": text}
