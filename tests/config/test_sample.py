"""Files that `mdiq init` writes, and public keys that are put into files by other people."""

from pathlib import Path

import pytest
import yaml

from mdiq.config.edit import with_public_keys
from mdiq.config.load import check_bytes
from mdiq.config.sample import Answers, NodeAnswer, scalar, topology_text
from mdiq.config.schema import SCHEMA_LINE, topology_schema
from mdiq.config.topology import Topology
from tests.config.generated import CONFIGS

KEYS = {"desk": "[" * 40, "pi1": "{" * 40, "no": "#" * 40}


def loaded(text: str, *, without_keys: bool = False) -> Topology:
    report = check_bytes(text.encode(), Path("t.yaml"), without_keys=without_keys)
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


def test_public_keys_go_into_a_sample() -> None:
    nodes = (NodeAnswer("desk", "192.168.1.10"), NodeAnswer("pi1", "192.168.1.11"), NodeAnswer("no", "192.168.1.12"))
    before = topology_text(Answers(nodes))
    assert loaded(before, without_keys=True).is_plain_text
    after = with_public_keys(before, KEYS)
    assert {node.name: node.public_key for node in loaded(after).nodes} == KEYS
    changed = [(a, b) for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b]
    assert [a.strip() for a, _ in changed] == ["public_key: null"] * 3


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "nodes",
    [
        "  - name: desk # the old PC\n    role: starter\n    address: 10.0.0.1\n  - name: pi1\n    address: 10.0.0.2\n",
        "  - {name: desk, role: starter, address: 10.0.0.1}\n  - {address: 10.0.0.2, name: pi1}\n",
        "  - address: 10.0.0.1\n    role: starter\n    name: desk\n  - address: 10.0.0.2\n    name: pi1",
        "  - name: desk\n    role: starter\n    address: 10.0.0.1\n    public_key:\n"
        "  - name: pi1\n    public_key:   # soon\n    address: 10.0.0.2\n",
        '  - name: desk\n    role: starter\n    address: 10.0.0.1\n    public_key: "'
        + "0" * 40
        + '" # old\n  - {name: pi1, address: 10.0.0.2, public_key: }\n',
    ],
)
def test_public_keys_go_into_a_file_that_people_wrote(nodes: str, newline: str) -> None:
    before = ("# mine\nversion: 1\nmodel: {path: m}\nnodes:\n" + nodes).replace("\n", newline)
    keys = {"desk": KEYS["desk"], "pi1": KEYS["pi1"]}
    after = with_public_keys(before, keys)
    assert {node.name: node.public_key for node in loaded(after).nodes} == keys
    for comment in ("# mine", "# the old PC", "# soon", "# old"):
        assert (comment in after) == (comment in before)
    assert with_public_keys(after, keys) == after
    assert ("\r" in after) == ("\r" in before)
    assert after.count("\r\n") == after.count("\n") or newline == "\n"


def test_nodes_that_are_not_named_keep_their_keys() -> None:
    text = (CONFIGS / "mixed-spare.yaml").read_text(encoding="utf-8")
    after = with_public_keys(text, {"laptop": "9" * 40})
    assert after != text
    assert with_public_keys(after, {"laptop": loaded(text).node("laptop").public_key or ""}) == text
