"""A ring over several machines, each a network of this one: joined by keys, fed with weights, run again."""

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mdiq.plan.measured import from_json
from mdiq.testbed.loopback import LoopbackRing
from tests.integration.conftest import Finished, finish, run_mdiq

pytestmark = pytest.mark.timeout(300)  # each node packs its layers, and several rings start

PORTS = "data_port=17400,threads=1"
RUN = ("Why is the sky blue?", "--max-tokens", "12", "--json")
LAYERS = ("0-9", "10-19", "20-29")


@pytest.fixture
def topology(tmp_path: Path) -> Path:
    file = tmp_path / "topology.yaml"
    starter = f"desk=192.168.1.10,{PORTS},control_port=17401,weights_port=17402,layers={LAYERS[0]}"
    workers = (f"pi{i}=192.168.1.1{i},{PORTS},layers={LAYERS[i]}" for i in (1, 2))
    nodes = [argument for node in (starter, *workers) for argument in ("--node", node)]
    for command in (("init", *nodes, "--out", file), ("keys", file), ("check", file)):
        done = run_mdiq(*command)
        assert done.code == 0, done.errors
    file.write_text(file.read_text().replace("wire: auto", "wire: bf16"))
    return file


@pytest.fixture
def ring(topology: Path, tmp_path: Path, real_model: Path) -> Iterator[LoopbackRing]:
    """The machines of the topology, switched on and without a node on them.

    The model was found before: from their network nothing can be fetched.
    """
    with LoopbackRing(topology, tmp_path / "ring", without=("pi1", "pi2")) as ring:
        yield ring


@contextmanager
def _node(ring: LoopbackRing, name: str, *arguments: str) -> "Iterator[subprocess.Popen[Any]]":
    """A node in a process of its own; it is stopped in the end."""
    process = ring.start_node(name, *arguments)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


def _starter(ring: LoopbackRing, *arguments: str) -> "subprocess.Popen[Any]":
    command = ["mdiq", "run", "--topology", "{topology}", *arguments]
    return ring.start("desk", command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _finished(ring: LoopbackRing, *arguments: str) -> Finished:
    return finish(_starter(ring, *RUN, *arguments))


def _run(ring: LoopbackRing) -> tuple[list[int], list[str]]:
    done = _finished(ring)
    assert done.code == 0, done.errors
    return done.results[0]["token_ids"], [node["name"] for node in done.summary["nodes"]]


def _room_for_some_twelve_layers_each(file: Path, folder: Path, cache: Path) -> dict[str, int]:
    """Return the MiB of each node that leave it room for some 12 layers of the model.

    What a process takes beside its layers differs between machines, so it is measured, and forgotten again.
    """
    with LoopbackRing(file, folder) as ring:
        done = _finished(ring)
        assert done.code == 0, done.errors
    [kept] = (cache / "profiles").glob("*.json")
    profiles = from_json(kept.read_text())
    kept.unlink()
    model = profiles.model
    layer_bytes = model.layer_bytes + 2_048 * model.kv_bytes
    return {
        name: (node.process_bytes + 13 * layer_bytes + (model.ends_bytes if name == "desk" else 0)) >> 20
        for name, node in profiles.nodes.items()
    }


def _fetched(ring: LoopbackRing, name: str) -> list[int]:
    """Return how many layers a node has fetched for each of its rings, by its log."""
    found = re.findall(r"weights_here .*?layers_fetched=(\d+)", ring.log(name).read_text())
    return [int(number) for number in found]


def test_three_nodes_answer_as_three_local_ones_and_a_second_run_transfers_nothing(ring: LoopbackRing) -> None:
    local = run_mdiq("run", *RUN, "--layers", "10,10,10", "--threads", "1")
    assert local.code == 0, local.errors
    with _node(ring, "pi1") as one, _node(ring, "pi2", "--once") as two:
        tokens, names = _run(ring)
        assert tokens == local.results[0]["token_ids"] and names == ["desk", "pi1", "pi2"]
        assert two.wait(20) == 0  # with --once it ends with the ring
        one.send_signal(signal.SIGHUP)  # it reads its file again and goes on
        with _node(ring, "pi2"):
            assert _run(ring) == (tokens, names)
        one.send_signal(signal.SIGTERM)
        assert one.wait(20) == 0
    for name in ("pi1", "pi2"):
        assert _fetched(ring, name) == [10, 0]
        cache = ring.folder / f"cache-{name}"
        numbers = sorted(path.name[6:9] for path in cache.glob("weights/*/layer-*"))
        first = 10 * int(name[-1])
        assert numbers == [f"{layer:03}" for layer in range(first, first + 10)], "files of other layers"
        assert not [*cache.glob("packed/*/layer-*")], "it has packed what came packed"


def test_nodes_of_a_starter_that_was_killed_join_the_next_one(ring: LoopbackRing) -> None:
    with _node(ring, "pi1"), _node(ring, "pi2"):
        endless = ("a long story", "--max-tokens", "4000", "--ignore-eos")
        starter = _starter(ring, *endless)
        assert starter.stdout.read(20)  # type: ignore[union-attr]  # it answers
        starter.kill()
        assert _run(ring)[1] == ["desk", "pi1", "pi2"]


def test_a_run_waits_for_a_node_that_is_stopped_and_goes_on_when_it_is_started_again(ring: LoopbackRing) -> None:
    story = ("a long story", "--max-tokens", "150", "--ignore-eos")
    with _node(ring, "pi1"), _node(ring, "pi2") as two:
        calm = _starter(ring, *story).communicate(timeout=120)[0]
        starter = _starter(ring, *story)
        assert starter.stdout is not None and starter.stderr is not None
        text = starter.stdout.read(20)
        two.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            two.wait(1)  # what is in the ring ends first
        two.terminate()  # at once
        assert two.wait(20) == 0
        while b"ring_paused" not in (line := starter.stderr.readline()):
            assert line, "it has ended"
        assert b"pi2: it was stopped on its device" in line
        with _node(ring, "pi2"):
            text += starter.stdout.read()
            errors = starter.stderr.read()
            assert starter.wait(60) == 0 and b"ring_goes_on" in errors
    assert text == calm and len(calm) > 150


def test_a_node_with_another_key_is_refused_and_named_at_the_deadline(ring: LoopbackRing) -> None:
    theirs = ring.folder / "theirs"
    theirs.mkdir()
    file = theirs / "topology.yaml"
    file.write_text(re.sub(r"keys: .*/keys", "keys: keys", ring.file.read_text()))
    (theirs / "keys").mkdir()
    for key in (ring.folder.parent / "keys").iterdir():
        (theirs / "keys" / key.name).write_bytes(key.read_bytes())
        (theirs / "keys" / key.name).chmod(0o600)
    assert run_mdiq("keys", file, "--rotate", "pi2").code == 0  # the Starter's file has pi2's old key
    with _node(ring, "pi1"):
        ring.start("pi2", ["mdiq", "node", str(file), "--name", "pi2"], stderr=subprocess.DEVNULL)
        done = _finished(ring, "--join-wait", "15")
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


def test_auto_layers_are_planned_within_memory_before_the_first_ring(
    tmp_path: Path, real_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In f32 the model takes 538 MB: by what their `memory` says, two of the nodes cannot hold it."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("MDIQ_CACHE", str(cache))
    file = tmp_path / "topology.yaml"
    nodes = [f"desk=192.168.1.10,{PORTS},control_port=17401,weights_port=17402,memory=3001M"]
    nodes += [f"pi{i}=192.168.1.1{i},{PORTS},memory=300{i + 1}M" for i in (1, 2)]
    given = (word for node in nodes for word in ("--node", node))
    # By its path: the cache of this test has no model.
    done = run_mdiq("init", *given, "--model", real_model, "--out", file)
    assert done.code == 0, done.errors
    text = file.read_text().replace("weights: auto", "weights: plain").replace("wire: auto", "wire: f32")
    file.write_text(text)
    assert run_mdiq("keys", file).code == 0
    limits = _room_for_some_twelve_layers_each(file, tmp_path / "ample", cache)
    text = file.read_text()
    for number, name in enumerate(limits, 1):
        text = text.replace(f"300{number}M", f"{limits[name]}M")
    file.write_text(text)
    with LoopbackRing(file, tmp_path / "ring") as ring:
        done = _finished(ring)
        assert done.code == 0, done.errors
        assert "the nodes measure themselves first" in done.errors and "layers as planned: desk " in done.errors
        plan = ring.start("desk", ["mdiq", "plan", "{topology}", "--explain", "--json"], stdout=subprocess.PIPE)
        explained = json.loads(plan.communicate(timeout=60)[0])
    layers = [stop - start for start, stop in (node["layers"] for node in done.summary["nodes"])]
    assert len(layers) == explained["num_needed"] == 3 and sum(layers) == 30
    # Each keeps within what it may take, the KV cache that it has room for included.
    for node, limit in zip(done.summary["nodes"], limits.values(), strict=True):
        assert node["rss_bytes"] < limit << 20, done.summary["nodes"]
    assert all(row["free_bytes"] >= 0 and row["kv_bytes"] > 0 for row in explained["rows"])
    options = ("--weights", "plain", "--wire", "f32", "--threads", "1", "--model", real_model)
    local = run_mdiq("run", *RUN, "--layers", ",".join(map(str, layers)), *options)
    assert local.code == 0, local.errors
    assert done.results[0]["token_ids"] == local.results[0]["token_ids"]
