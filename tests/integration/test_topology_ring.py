"""A ring over several machines, with loopback addresses in their place: joined by keys, fed with weights, run again."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.conftest import mdiq_command, run_mdiq

pytestmark = pytest.mark.timeout(300)  # each node packs its layers, and several rings start

PORTS = "data_port=17400,threads=1"
RUN = ("Why is the sky blue?", "--max-tokens", "12", "--json")
LAYERS = ("0-9", "10-19", "20-29")


@pytest.fixture
def topology(tmp_path: Path) -> Path:
    file = tmp_path / "topology.yaml"
    starter = f"desk=127.0.0.1,{PORTS},control_port=17401,weights_port=17402,layers={LAYERS[0]}"
    workers = (f"pi{i}=127.0.0.{i + 1},{PORTS},layers={LAYERS[i]}" for i in (1, 2))
    nodes = [argument for node in (starter, *workers) for argument in ("--node", node)]
    for command in (("init", *nodes, "--out", file), ("keys", file), ("check", file)):
        done = run_mdiq(*command)
        assert done.code == 0, done.errors
    file.write_text(file.read_text().replace("wire: auto", "wire: bf16"))
    return file


@contextmanager
def _node(topology: Path, name: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A node in a process of its own, with a cache of its own; it is stopped in the end."""
    folder = topology.parent
    environment = {**os.environ, "MDIQ_CACHE": str(folder / f"cache-{name}"), "MDIQ_NAME": name}
    with (folder / f"{name}.log").open("ab") as log:
        with subprocess.Popen(mdiq_command("node", topology, *arguments), stderr=log, env=environment) as process:
            try:
                yield process
            finally:
                process.terminate()
                try:
                    process.wait(20)
                finally:
                    process.kill()


def _run(topology: Path) -> tuple[list[int], list[str]]:
    done = run_mdiq("run", "--topology", topology, *RUN)
    assert done.code == 0, done.errors
    return done.results[0]["token_ids"], [node["name"] for node in done.summary["nodes"]]


def _fetched(topology: Path, name: str) -> list[int]:
    """Return how many chunks a node has fetched for each of its rings, by its log."""
    found = re.findall(r"weights_here +chunks_fetched=(\d+)", (topology.parent / f"{name}.log").read_text())
    return [int(number) for number in found]


def test_three_nodes_answer_as_three_local_ones_and_a_second_run_transfers_nothing(topology: Path) -> None:
    local = run_mdiq("run", *RUN, "--layers", "10,10,10", "--weights", "int8", "--threads", "1")
    assert local.code == 0, local.errors
    with _node(topology, "pi1") as one, _node(topology, "pi2", "--once") as two:
        tokens, names = _run(topology)
        assert tokens == local.results[0]["token_ids"] and names == ["desk", "pi1", "pi2"]
        assert two.wait(20) == 0  # with --once it ends with the ring
        with _node(topology, "pi2"):
            assert _run(topology) == (tokens, names)
        one.send_signal(signal.SIGHUP)  # it reads its file again and goes on
        with _node(topology, "pi2"):
            assert _run(topology)[0] == tokens
        one.send_signal(signal.SIGTERM)
        assert one.wait(20) == 0
    for name in ("pi1", "pi2"):
        first, *later = _fetched(topology, name)
        assert first > 10 and later == [0, 0]
        copy = next((topology.parent / f"cache-{name}" / "weights").glob("*/model.gguf")).stat()
        assert copy.st_blocks * 512 < copy.st_size / 2, "it has more than its own layers"


def test_nodes_of_a_starter_that_was_killed_join_the_next_one(topology: Path) -> None:
    with _node(topology, "pi1"), _node(topology, "pi2"):
        endless = ("a long story", "--max-tokens", "4000", "--ignore-eos")
        with subprocess.Popen(
            mdiq_command("run", "--topology", topology, *endless), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as starter:
            assert starter.stdout is not None and starter.stdout.read(20)  # it answers
            starter.kill()
        assert _run(topology)[1] == ["desk", "pi1", "pi2"]


def test_a_node_that_is_stopped_ends_the_run_with_its_name(topology: Path) -> None:
    with _node(topology, "pi1"), _node(topology, "pi2") as two:
        endless = ("a long story", "--max-tokens", "4000", "--ignore-eos")
        with subprocess.Popen(
            mdiq_command("run", "--topology", topology, *endless), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as starter:
            assert starter.stdout is not None and starter.stderr is not None and starter.stdout.read(20)
            two.terminate()
            assert two.wait(20) == 0
            errors = starter.stderr.read().decode()
            assert starter.wait(20) == 1
        assert errors.splitlines()[-1] == "mdiq: pi2: it was stopped on its device"


def test_a_node_with_another_key_is_refused_and_named_at_the_deadline(topology: Path) -> None:
    theirs = topology.parent / "theirs"
    theirs.mkdir()
    (theirs / topology.name).write_bytes(topology.read_bytes())
    (topology.parent / "keys").rename(theirs / "keys")
    for command in (("keys", theirs / topology.name, "--rotate", "pi2"),):
        assert run_mdiq(*command).code == 0
    # The Starter's file has pi2's old key, and its own and pi1's as before.
    (topology.parent / "keys").symlink_to(theirs / "keys")
    with _node(topology, "pi1"), _node(theirs / topology.name, "pi2"):
        done = run_mdiq("run", "--topology", topology, *RUN, "--join-wait", "15")
    lines = done.errors.strip().splitlines()
    assert done.code == 1
    assert lines[-1].startswith("mdiq: pi2: not joined within 15 s; ") and "refused here" in lines[-1]
    assert any("peer_refused" in line and "control" in line for line in lines)


def test_a_private_key_that_is_not_the_topologys_is_told_where_it_is_used(topology: Path) -> None:
    keys = topology.parent / "keys"
    (keys / "pi1.key").write_bytes((keys / "pi2.key").read_bytes())
    done = run_mdiq("node", topology, "--name", "pi1", timeout=30)
    assert done.code == 2 and "pi1: its private key is not the one of public_key" in done.errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("node", "--name", "pi9"), "no such node; its workers are pi1, pi2"),
        (("node", "--name", "desk"), "it is the Starter"),
        (("node",), "give --name NAME"),
        (("run", "hi", "--nodes", "3", "--topology"), "--nodes: it is for rings on this machine"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(topology: Path, arguments: tuple[str, ...], words: str) -> None:
    done = run_mdiq(*arguments, topology, env={"MDIQ_NAME": ""})
    assert done.code == 2 and words in done.errors and len(done.errors.splitlines()) == 1, done.errors
