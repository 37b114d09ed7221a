"""Topologies on one machine, no model: networks, addresses, slow hops, the copy of the file, and what is left."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
import zmq

from mdiq.cli.check import check
from mdiq.cli.keys import execute as make_missing_keys
from mdiq.config.load import load_topology
from mdiq.errors import ConfigError
from mdiq.testbed import loopback
from mdiq.testbed.loopback import LoopbackRing, parse_links
from mdiq.testbed.networks import Link, Namespaces, NoNamespacesError
from tests.streams import read_streams
from tests.testbed.namespaces import why_no_namespaces

WAIT_S = 20.0
LISTEN = """
import socket, sys
with socket.create_server((sys.argv[1], 7400)) as server:
    print("listens", flush=True)
    while True:
        peer, (source, _) = server.accept()
        with peer:
            peer.sendall(source.encode() + b" said " + peer.recv(1000))
"""
ASK = """
import socket, sys, time
start_s = time.monotonic()
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 5) as peer:
    peer.sendall(sys.argv[3].encode())
    print(peer.recv(1000).decode(), time.monotonic() - start_s)
"""


WHY_NOT = why_no_namespaces()
needs_namespaces = pytest.mark.skipif(bool(WHY_NOT), reason=f"no network namespaces here: {WHY_NOT}")
WORKERS = ("pi1", "pi2")


def write(folder: Path, addresses: dict[str, str], **more: object) -> Path:
    nodes: list[dict[str, object]] = [{"name": name, "address": address} for name, address in addresses.items()]
    nodes[0]["role"] = "starter"
    data = {"version": 1, "model": {"path": "smollm2-135m-instruct"}, "nodes": nodes, **more}
    file = folder / "topology.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return file


@pytest.fixture
def topology(tmp_path: Path) -> Path:
    return write(tmp_path, {"desk": "192.168.1.10", "pi1": "192.168.1.11", "pi2": "pi2.lan"})


@pytest.fixture(params=["as root", "as a user"])
def ring(
    request: pytest.FixtureRequest, topology: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LoopbackRing]:
    if request.param == "as a user":  # root can have a user namespace as well
        monkeypatch.setattr(os, "getuid", lambda: 1000)
    with LoopbackRing(topology, tmp_path / "ring", without=WORKERS) as ring:
        yield ring


def listen(ring: LoopbackRing, name: str) -> None:
    process = ring.start(name, [sys.executable, "-c", LISTEN, ring.addresses[name]], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"listens\n"


def ask(ring: LoopbackRing, name: str, address: str, text: str = "hello", port: int = 7400) -> tuple[str, float]:
    """Return what a listener answers to a Node, or the error, and how long it took."""
    command = [sys.executable, "-c", ASK, address, str(port), text]
    process = ring.start(name, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, errors = process.communicate(timeout=WAIT_S)
    if process.returncode:
        return errors.decode().splitlines()[-1], 0.0
    answer, _, seconds = out.decode().strip().rpartition(" ")
    return answer, float(seconds)


def happens(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it does not happen"
        time.sleep(0.02)


def networks(parent: int | None = None) -> set[str]:
    """Return the network namespaces in which any process is, or the children of one are; ours is none of them."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if parent in (None, int((process / "stat").read_text().rpartition(")")[2].split()[1])):
                found.add(os.readlink(process / "ns/net"))
        except OSError:
            continue  # it has ended
    return found - {os.readlink("/proc/self/ns/net")}


@needs_namespaces
def test_nodes_reach_each_other_at_their_own_addresses(ring: LoopbackRing) -> None:
    assert not ring.is_plain
    # A host name is none that a namespace can have.
    assert dict(ring.addresses) == {"desk": "192.168.1.10", "pi1": "192.168.1.11", "pi2": "10.77.0.1"}
    for name in ("pi1", "pi2"):
        listen(ring, name)
    assert ask(ring, "desk", "192.168.1.11")[0] == "192.168.1.10 said hello"
    assert ask(ring, "pi1", "10.77.0.1")[0] == "192.168.1.11 said hello"


@needs_namespaces
def test_nothing_else_is_reached_from_there(ring: LoopbackRing) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        answer, _ = ask(ring, "pi1", "127.0.0.1", port=server.getsockname()[1])
    assert "ConnectionRefusedError" in answer


@needs_namespaces
def test_a_slow_hop_is_slow_for_its_sender_alone_and_nobody_has_to_know(topology: Path, tmp_path: Path) -> None:
    links = parse_links(["pi1:pi2,delay=60ms"])
    with LoopbackRing(topology, tmp_path / "ring", links=links, without=WORKERS) as ring:
        listen(ring, "pi2")
        answer, seconds = ask(ring, "pi1", ring.addresses["pi2"])
        assert answer.endswith(" said hello") and seconds >= 0.12
        assert ask(ring, "desk", ring.addresses["pi2"])[0] == "192.168.1.10 said hello"  # not through the relay
        listen(ring, "pi1")
        assert ask(ring, "pi2", ring.addresses["pi1"])[0] == f"{ring.addresses['pi2']} said hello"


@needs_namespaces
def test_a_capture_holds_every_byte_between_nodes(topology: Path, tmp_path: Path) -> None:
    file = tmp_path / "ring.pcap"
    links = parse_links(["delay=1ms"])  # so that one of the two goes through a relay
    text = "what was said: " + "0123456789" * 50
    with LoopbackRing(topology, tmp_path / "ring", links=links, capture=file, without=WORKERS) as ring:
        for name in ("desk", "pi2"):
            listen(ring, name)
            assert ask(ring, "pi1", ring.addresses[name], text)[0].endswith(text)
    streams = read_streams(file)
    assert sorted(stream == text.encode() for stream in streams.values()) == [False, False, True, True]
    assert all(text.encode() in stream for stream in streams.values())


@needs_namespaces
def test_programs_of_this_machine_reach_the_starters_api(tmp_path: Path) -> None:
    topology = write(tmp_path, {"desk": "192.168.1.10"}, api={"port": 28_080})
    with LoopbackRing(topology, tmp_path / "ring") as ring:
        command = [sys.executable, "-c", LISTEN.replace("7400", "28080"), "127.0.0.1"]
        assert ring.start("desk", command, stdout=subprocess.PIPE).stdout.readline() == b"listens\n"
        ring.open_api()
        done = subprocess.run([sys.executable, "-c", ASK, "127.0.0.1", "28080", "hi"], capture_output=True, timeout=20)
        assert done.stdout.startswith(b"127.0.0.1 said hi")
        with pytest.raises(ConfigError, match="28080: Address already in use; write another api.port"):
            ring.open_api()


def test_where_networks_cannot_be_had_the_nodes_share_loopback(
    topology: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise NoNamespacesError("unshare failed: Operation not permitted")

    monkeypatch.setattr(Namespaces, "_hold", refused)
    with LoopbackRing(topology, tmp_path / "ring", without=WORKERS) as ring:
        assert ring.is_plain and ring.why_plain == "unshare failed: Operation not permitted"
        assert len(set(ring.addresses.values())) == 3
        assert all(address.startswith("127.") for address in ring.addresses.values())
        listen(ring, "pi1")
        assert ask(ring, "desk", ring.addresses["pi1"])[0].endswith(" said hello")
    with pytest.raises(ConfigError, match="--link: it needs network namespaces, and there are none here: unshare"):
        LoopbackRing(topology, tmp_path / "ring", links=[Link("", "", "delay=1ms")]).__enter__()


def test_the_copy_is_a_good_topology_for_one_machine(topology: Path, tmp_path: Path) -> None:
    with LoopbackRing(topology, tmp_path / "ring", without=WORKERS) as ring:
        assert check(ring.file, as_json=True) == 0
        nodes = load_topology(ring.file).topology.nodes
    cores = len(os.sched_getaffinity(0))
    assert [node.threads for node in nodes] == [max(cores // 3, 1)] * 3
    assert all(node.memory_bytes for node in nodes)
    assert {node.name: node.address for node in nodes} == dict(ring.addresses)


def test_keys_are_made_where_private_ones_are_missing(topology: Path, tmp_path: Path) -> None:
    stranger = zmq.curve_keypair()[0].decode()  # as in the examples: nobody has its private half
    data = yaml.safe_load(topology.read_text())
    for node in data["nodes"]:
        node["public_key"] = stranger if node["name"] == "desk" else zmq.curve_keypair()[0].decode()
    topology.write_text(yaml.safe_dump(data))
    with LoopbackRing(topology, tmp_path / "ring", without=WORKERS) as ring:
        keys = {node.public_key for node in load_topology(ring.file).topology.nodes}
        assert None not in keys and stranger not in keys
        assert {file.name for file in (tmp_path / "ring" / "keys").iterdir()} == {"desk.key", "pi1.key", "pi2.key"}


def test_keys_that_are_there_are_used(topology: Path, tmp_path: Path) -> None:
    make_missing_keys(topology, (), dry_run=False)
    with LoopbackRing(topology, tmp_path / "ring", without=WORKERS) as ring:
        mine, theirs = (load_topology(file) for file in (ring.file, topology))
        assert [n.public_key for n in mine.topology.nodes] == [n.public_key for n in theirs.topology.nodes]
        assert mine.path(mine.topology.security.keys) == tmp_path / "keys"


def test_a_ring_in_plain_text_stays_so(tmp_path: Path) -> None:
    topology = write(tmp_path, {"desk": "10.0.0.1"}, security={"insecure": True})
    with LoopbackRing(topology, tmp_path / "ring") as ring:
        assert load_topology(ring.file).topology.is_plain_text


def test_paths_of_the_file_mean_the_same_in_the_copy(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "keys").write_text("secret\n")
    topology = write(tmp_path, {"desk": "10.0.0.1"}, api={"keys_file": "api/keys"}, journal="journal")
    topology.write_text(topology.read_text().replace("smollm2-135m-instruct", "model.gguf"))
    with LoopbackRing(topology, tmp_path / "ring") as ring:
        copy = load_topology(ring.file).topology
    assert copy.model.path == str(tmp_path / "model.gguf")
    assert (copy.api.keys_file, copy.journal) == (str(tmp_path / "api" / "keys"), str(tmp_path / "journal"))


def test_a_process_that_does_not_want_to_end_is_killed_with_what_it_has_started(
    topology: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loopback, "STOP_S", 0.2)
    with LoopbackRing(topology, tmp_path / "ring", without=WORKERS) as ring:
        mine = networks(os.getpid())
        assert len(mine) == 4 or ring.is_plain
        stubborn = 'trap "" TERM; sleep 1000 & echo $!; while true; do sleep 1; done'
        process: subprocess.Popen[Any] = ring.start("pi1", ["sh", "-c", stubborn], stdout=subprocess.PIPE)
        child = int(process.stdout.readline())  # type: ignore[union-attr]
    assert process.returncode == -signal.SIGKILL
    happens(lambda: not _is_alive(child))
    assert not mine & networks()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_failure_in_the_middle_of_the_start_leaves_nothing(topology: Path, tmp_path: Path) -> None:
    links = [Link("pi1", "pi2", "delay=never")]
    with pytest.raises(Exception, match="needs network namespaces|relay does not start: .*write for example"):
        LoopbackRing(topology, tmp_path / "ring", links=links, without=WORKERS).__enter__()
    assert networks(os.getpid()) == set()


# --- command line ---------------------------------------------------------------------------------------------------


def script(*arguments: str | Path, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "mdiq.testbed", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_the_starters_command_runs_beside_the_nodes_and_its_exit_code_is_the_scripts(topology: Path) -> None:
    program = "import sys; print(open(sys.argv[1]).read()); sys.exit(3)"
    process = script(topology, "--", sys.executable, "-c", program, "{topology}")
    out, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 3
    addresses = [node["address"] for node in yaml.safe_load(out)["nodes"]]
    for name, address in zip(("desk", *WORKERS), addresses, strict=True):
        assert f"loopback: {name} is at {address}\n" in errors


def test_a_node_that_dies_is_told_with_its_last_words(topology: Path, tmp_path: Path) -> None:
    make_missing_keys(topology, (), dry_run=False)
    (tmp_path / "keys" / "pi1.key").chmod(0o644)
    process = script(topology, "--", sys.executable, "-c", "import sys; sys.stdin.read()", stdin=subprocess.PIPE)
    assert process.stderr is not None and process.stdin is not None
    line = next(line for line in process.stderr if "has ended" in line)
    assert re.match(r"loopback: pi1 has ended with exit code 2: mdiq: .*pi1\.key: .*chmod 600", line)
    process.communicate("", timeout=WAIT_S)
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_it_ends_nothing_is_left(topology: Path, tmp_path: Path, number: signal.Signals) -> None:
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"
    process = script(topology, "--folder", tmp_path / "ring", "--", sys.executable, "-c", program)
    assert process.stdout is not None
    starter = int(process.stdout.readline())
    marks = [f"--name\0{name}".encode() for name in WORKERS]
    file = str(tmp_path / "ring" / "topology.yaml").encode()

    def nodes() -> list[bytes]:
        lines = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                lines.append(path.read_bytes())
            except OSError:
                continue
        return [line for line in lines if file in line and any(mark in line for mark in marks)]

    assert len(nodes()) == 2
    networks_of_it = networks(process.pid)
    assert len(networks_of_it) == 4 or WHY_NOT
    process.send_signal(number)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    happens(lambda: not _is_alive(starter) and not nodes())
    happens(lambda: not networks_of_it & networks())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.yaml",), "no such file"),
        (("{topology}", "--link", "slow"), "--link slow: write for example"),
        (("{topology}", "--link", "pi2:pi1,delay=1ms"), "the ring has no such hop; it has desk:pi1, pi1:pi2, pi2:desk"),
        (("{topology}", "--", "no-such-command-anywhere"), "no-such-command-anywhere"),
        (("{topology}", "--folder", "/dev/null/ring"), "/dev/null/ring: Not a directory; choose another folder"),
        (("{topology}", "--capture", "/dev/null/ring.pcap"), "--capture /dev/null/ring.pcap: "),
    ],
)
def test_a_mistake_is_told_in_one_line(topology: Path, arguments: tuple[str, ...], words: str) -> None:
    process = script(*(argument.replace("{topology}", str(topology)) for argument in arguments))
    _, errors = process.communicate(timeout=WAIT_S)
    told = [line for line in errors.splitlines() if " is at " not in line and "share loopback" not in line]
    assert process.returncode not in (0, 1) and len(told) == 1 and words in told[0], errors
