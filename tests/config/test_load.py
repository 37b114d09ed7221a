"""What an operator is told of a topology file: golden files for the mistakes, and files that no one would write."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mdiq.config.document import MAX_BYTES
from mdiq.config.load import check_bytes, check_file, load_topology
from mdiq.config.messages import SECTIONS
from mdiq.errors import ConfigError, TopologyError
from tests.config.generated import BROKEN, CONFIGS, told

EXAMPLES = sorted(CONFIGS.glob("*.yaml"))
GOOD = (CONFIGS / "mixed-spare.yaml").read_text(encoding="utf-8")
FILE = Path("t.yaml")


def lines_of(text: str) -> list[str]:
    return check_bytes(text.encode(), FILE).lines()


def test_there_are_forty_broken_files_and_each_has_what_is_told() -> None:
    assert len(BROKEN) >= 40
    texts = {file.with_suffix(".txt") for file in BROKEN}
    assert texts == set(BROKEN[0].parent.glob("*.txt"))


@pytest.mark.parametrize("file", BROKEN, ids=lambda file: file.stem)
def test_a_broken_file_is_told_with_line_and_advice(file: Path) -> None:
    assert told(file) == file.with_suffix(".txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", BROKEN, ids=lambda file: file.stem)
def test_every_message_names_an_existing_line_and_what_to_do(file: Path) -> None:
    report = check_file(file)
    assert report.errors or report.warnings
    num_lines = file.read_bytes().count(b"\n")
    for finding in report.errors + report.warnings:
        assert 1 <= finding.line <= max(num_lines, 1)
        assert ";" in finding.message or ":" in finding.message, "what, and what to do"
        assert "made-up" not in finding.message, "it depends on a value that was put there to go on"
        assert finding.render("t.yaml").isprintable()


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_loads_without_a_warning(file: Path) -> None:
    loaded = load_topology(file)
    assert check_file(file).warnings == ()
    assert loaded.topology.version == 1
    assert loaded.path("keys") == CONFIGS / "keys"
    assert loaded.path("/etc/keys") == Path("/etc/keys")


def test_all_mistakes_are_one_error_of_several_lines() -> None:
    file = next(file for file in BROKEN if "many-mistakes" in file.stem)
    with pytest.raises(TopologyError) as caught:
        load_topology(file)
    assert isinstance(caught.value, ConfigError)
    assert caught.value.exit_code == 2
    assert list(caught.value.lines) == check_file(file).lines()
    assert str(caught.value).splitlines() == list(caught.value.lines)


def test_missing_keys_are_no_mistake_for_who_makes_them() -> None:
    file = next(file for file in BROKEN if "no-keys" in file.stem)
    assert len(load_topology(file, without_keys=True).topology.nodes) == 2
    with pytest.raises(TopologyError, match="run `mdiq keys`"):
        load_topology(file)


@pytest.mark.parametrize(("name", "message"), [("gone.yaml", "no such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        check_file(tmp_path / name)


def test_one_mistake_hides_no_other() -> None:
    text = GOOD.replace("memory: 700M", "memory: 700").replace("spare: true", "spare: true\n    layers: 0-3")
    assert [line.split(" ")[1] for line in lines_of(text)] == ["nodes[2].memory:", "nodes[3].layers:"]


def test_a_key_that_cannot_be_read_hides_only_what_is_missing_beside_it() -> None:
    text = "on: 1\nmodel: {path: m, {{ weights }}: x, mode: slow}\nlinks: {wire: x}\n"
    assert [line.split(": ")[0] for line in lines_of(text)] == [
        "t.yaml:1",
        "t.yaml:2 model",
        "t.yaml:2 model.mode",
        "t.yaml:3 links.wire",
    ]


def test_what_depends_on_a_wrong_value_is_not_told() -> None:
    # Without a name that can be read, nobody knows whether the hop's ends are neighbours.
    text = GOOD.replace("name: pi", "name: Pi")
    assert [line.split(":")[1] for line in lines_of(text)] == [
        str(text[: text.index("Pi\n")].count("\n") + 1) + " nodes[2].name"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("just words", "t.yaml:1: it holds a text, and a topology is made of keys"),
        ("null", "t.yaml:1: it holds no keys"),
        ("# nothing\n", "t.yaml:1: the file is empty"),
        ("on: 1\n", "t.yaml:1: YAML reads the key on as true; a key is text"),
        ("1: 1\n", "t.yaml:1: YAML reads the key 1 as a number"),
        ("a: \x07\n", "t.yaml:1: a control character (U+0007); remove it"),
        ("a: *b\n", "t.yaml:1: a value that begins with *"),
        ("a: %b\n", "t.yaml:1: a value cannot begin with this sign"),
        ("a: |b\n", "t.yaml:1: a value that begins with > or |"),
        ("a: b: c\n", "t.yaml:1: a second `: ` in the line"),
        ("a: [1, 2\n", "t.yaml:1: `[` opens here and never closes"),
        ("a: [\n", "t.yaml:1: `[` opens here and never closes; add ]"),
        ("a: {\n", "t.yaml:1: `{` opens here and never closes; add }"),
        ("a:\n  - [{b: 1},\n", "t.yaml:2: `[` opens here and never closes; add ]"),
        ("a: !x!y z\n", "t.yaml:1: it is no YAML"),
        ("journal: 2024-10-01\n", 't.yaml:1 journal: YAML reads 2024-10-01 as a date; put it in quotes: "2024-10-01"'),
        ("journal: =\n", "t.yaml:1 journal: a lone = is not a value"),
        ("journal: .inf\n", "t.yaml:1 journal: YAML reads .inf as a number"),
        ("journal: 1.0\n", 't.yaml:1 journal: YAML reads 1.0 as a number; put it in quotes if it is meant: "1.0"'),
        (
            "journal: 123456789012345678901234567890\n",
            "t.yaml:1 journal: 123456789012345678901234567890 is larger than any",
        ),
        ("journal: !!binary aGk=\n", "t.yaml:1 journal: the tag !!binary is not read here"),
        ("journal: !!int abc\n", "t.yaml:1 journal: the tag !!int is not read here"),
        ("journal: !!bool maybe\n", "t.yaml:1 journal: the tag !!bool is not read here"),
        ("journal: -0_700\n", "t.yaml:1 journal: YAML reads -0_700 as -448, an octal number; write -700"),
        ("journal: +5\n", "t.yaml:1 journal: YAML reads +5 as a number"),
        ("journal: 0b11\n", "t.yaml:1 journal: YAML reads 0b11 as 3; write 3"),
        ("journal: 1_0:30\n", "t.yaml:1 journal: YAML reads 1_0:30 as 630, a number to the base of 60"),
        (
            f"journal: {'59:' * 5000}59\n",
            "t.yaml:1 journal: 59:59:59:59:59:59:59:59:59:59:59:59:59:5... is larger than",
        ),
        (
            f"journal: {'9' * 5000}.0\n",
            "t.yaml:1 journal: YAML reads 9999999999999999999999999999999999999999... as a number",
        ),
        ("journal: <<\n", "t.yaml:1 journal: a lone << is not a value"),
        ("<<: {a: 1}\n", "t.yaml:1: `<<` is not read here"),
        ("journal: !!set {a}\n", "t.yaml:1 journal: the tag !!set is not read here"),
        ('journal: ""\n', "t.yaml:1 journal: it is empty; write a path"),
        ("journal: [a]\n", "t.yaml:1 journal: it is a list, and a text belongs here"),
        ("links: {hops: desk}\n", "t.yaml:1 links.hops: it is a text, and a list belongs here"),
        ("links: wire:i8\n", "t.yaml:1 links: the space after the colon is missing; write wire: i8"),
        ("nodes: []\n", "t.yaml:1 nodes: the list is empty; begin each node with"),
        ("nodes: [a]\n", "t.yaml:1 nodes[0]: a text stands where a node should"),
        ("nodes: [{name: a, name: b}]\n", "t.yaml:1 nodes[0].name: it stands here twice, first in line 1"),
        ("security: {password: x}\n", "t.yaml:1 security.password: a secret does not belong into this file"),
    ],
)
def test_a_mistake_of_yaml_is_told_in_words(text: str, message: str) -> None:
    assert [line for line in lines_of(text) if line.startswith(message)], lines_of(text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b" " * (MAX_BYTES + 1), "the file is larger than 256 KiB"),
        (b"[" * 100_000, "more than 20 levels deep"),
        (b"- a\n" * 20_000, "more than 10000 values"),
        ("a: 1\n".encode("utf-16"), "the file is UTF-16"),
        (
            b"a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + b"".join(
                b"b%d: &b%d [%s]\n" % (i, i, b",".join([b"*" + (b"a" if i == 0 else b"b%d" % (i - 1))] * 10))
                for i in range(9)
            ),
            "grow to more than 10000 values",
        ),
        (b"a: &a0 [1]\n" + b"".join(b"b%d: &a%d [*a%d]\n" % (i, i + 1, i) for i in range(2000)), "levels deep"),
        (b"a: &a [*a]\n", "an anchor (&) that holds its own alias"),
    ],
)
def test_a_file_that_would_grow_is_refused(data: bytes, message: str) -> None:
    (line,) = check_bytes(data, FILE).lines()
    assert message in line


def test_the_byte_order_mark_of_windows_is_no_mistake() -> None:
    assert check_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode(), FILE).errors == ()


def test_an_alias_is_read_as_what_it_names() -> None:
    text = GOOD.replace("memory: 4G", "memory: &most 4G").replace("memory: 700M", "memory: *most")
    report = check_bytes(text.encode(), FILE)
    assert report.topology is not None
    assert report.topology.node("pi").memory_bytes == 4 << 30


_KEYS = sorted({field.alias or name for model in SECTIONS.values() for name, field in model.model_fields.items()})
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 70_000),
    st.floats(allow_nan=True),
    st.dates(),
    st.sampled_from(
        [
            "auto",
            "desk",
            "pi1",
            "starter",
            "worker",
            "127.0.0.1",
            "10.0.0.1",
            "0-3",
            "4-7",
            "1G",
            "20mbit",
            "200ms",
            "i8",
            "a" * 40,
        ]
    ),
    st.text(max_size=8),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(_KEYS), inner, max_size=8)),
    max_leaves=30,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=8))
def test_no_values_are_too_strange_to_be_told(value: dict[str, object]) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    report = check_bytes(text.encode("utf-8", "surrogatepass"), FILE)
    assert (report.topology is None) == bool(report.errors)
    assert not any("made-up" in line for line in report.lines() + report.warning_lines())


_NODE = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["desk", "pi1", "pi2", "Pi"]),
        "address": st.sampled_from(["127.0.0.1", "10.0.0.1", "10.0.0.2", "x y"]),
    },
    optional={
        "role": st.sampled_from(["starter", "worker", "boss"]),
        "spare": st.sampled_from([True, False, "yes"]),
        "layers": st.sampled_from(["0-3", "4-7", "3-5", "auto", "8"]),
        "data_port": st.sampled_from([7400, 7403, 7404, 80]),
        "memory": st.sampled_from(["1G", "100M", "1"]),
        "public_key": st.sampled_from(["a" * 40, "b" * 40, "c"]),
        "threads": st.sampled_from([1, 100, "auto", 0]),
    },
)
_HOP = st.fixed_dictionaries(
    {"from": st.sampled_from(["desk", "pi1", "nobody"]), "to": st.sampled_from(["pi1", "pi2"]), "wire": st.just("i8")}
)
_TOPOLOGY = st.fixed_dictionaries(
    {"version": st.just(1), "model": st.just({"path": "m"}), "nodes": st.lists(_NODE, max_size=4)},
    optional={
        "links": st.fixed_dictionaries({"hops": st.lists(_HOP, max_size=3)}),
        "security": st.fixed_dictionaries({"insecure": st.booleans()}),
        "api": st.fixed_dictionaries({"host": st.sampled_from(["127.0.0.1", "0.0.0.0", "::1"])}),
    },
)


@settings(max_examples=100, deadline=None)
@given(_TOPOLOGY)
def test_a_topology_that_is_let_through_fits_together(value: dict[str, object]) -> None:
    report = check_bytes(yaml.safe_dump(value).encode(), FILE)
    assert (report.topology is None) == bool(report.errors)
    if report.topology is not None:
        topology = report.topology
        names = [node.name for node in topology.nodes]
        assert len(set(names)) == len(names)
        assert topology.ring_nodes[0] is topology.starter
        assert len({(node.address, node.data_port) for node in topology.nodes}) == len(names)
        layers = [node.layers for node in topology.ring_nodes]
        if any(layers):
            assert [layer for part in layers if part for layer in part] == list(
                range(sum(len(part) for part in layers if part))
            )
        assert topology.is_on_loopback or topology.security.insecure or all(node.public_key for node in topology.nodes)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, len(GOOD)),
    st.integers(0, 30),
    st.text(st.sampled_from("\t\n -:{}[],&*!|>'\"%@`#?=<~0aZ\x07\xfc"), max_size=6),
)
def test_no_damage_of_a_file_is_too_strange_to_be_told(start: int, length: int, new: str) -> None:
    report = check_bytes((GOOD[:start] + new + GOOD[start + length :]).encode(), FILE)
    assert (report.topology is None) == bool(report.errors)
    for line in report.lines() + report.warning_lines():
        assert line.isprintable()
        assert "made-up" not in line
