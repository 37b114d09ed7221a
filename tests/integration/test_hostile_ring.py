"""Strangers at a whole ring of `mdiq node` processes: what its wires show, who gets in, and what its logs say of them.

All of it happens once, in two rings (the second without keys, so that what is not found could have been found); the
tests look at what was recorded.
"""

import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
import zmq
from safetensors.torch import load_file

from mdiq.core.frame import Batch, Segment, TokenIds
from mdiq.core.types import Epoch, LayerRange, SeqId
from mdiq.engine.model_config import read_config
from mdiq.engine.runner import StageRunner
from mdiq.engine.text.tokenizer import Tokenizer
from mdiq.errors import ConfigError
from mdiq.testbed.loopback import LoopbackRing, parse_links
from mdiq.transport.watch import UNKNOWN
from tests.integration.conftest import finish
from tests.integration.tiny_model import HIDDEN_SIZE, NUM_LAYERS, write_tiny_model
from tests.streams import Way, read_streams
from tests.testbed.namespaces import why_no_namespaces

pytestmark = pytest.mark.timeout(300)

PROMPT = "Ohm's law says:"  # one chunk, so that its rows are computed together here as well
DESK, LEFT, RIGHT, STRANGER = "starter-desk", "worker-left", "worker-right", "stranger"
WAIT_S = 40.0
AGAIN_S = 0.3  # as hostile_peer.py has it
HERE = Path(__file__).parent
_STRANGERS = itertools.count(secrets.randbelow(62_500))  # their addresses: none twice

# mdiq with a gate that hangs, or dies, at the next peer that comes once a file tells it to. Its argument: which file.
GATE_THAT_BREAKS = """
import asyncio, os, sys
from mdiq.cli.main import main
from mdiq.transport import sockets
from mdiq.transport.curve import Gate

sockets.HANDSHAKE_MS = 1_000
answer, run = Gate._answer, Gate.run
dies, hangs = (sys.argv[1] + what for what in ("-dies", "-hangs"))
del sys.argv[1]

def answering(self, request):
    if os.path.exists(dies):
        os.unlink(dies)
        raise RuntimeError("as this test wants it")
    return answer(self, request)

async def running(self):
    receive = self._socket.recv_multipart
    async def receiving():
        request = await receive()
        if os.path.exists(hangs):
            await asyncio.Event().wait()
        return request
    self._socket.recv_multipart = receiving
    await run(self)

Gate._answer, Gate.run = answering, running
main()
"""


@dataclass
class Attempt:
    """Somebody tries to get in at a port of ``node``. who: for messages of this test."""

    who: str
    node: str
    plane: str
    options: dict[str, str]
    source: str = ""
    is_let_in: bool | None = None


@dataclass
class Siege:
    """What happened to the ring with keys."""

    model: Path
    capture: Path
    addresses: Mapping[str, str]
    attempts: list[Attempt] = field(default_factory=list)
    logs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def refusals(self, node: str, address: str, plane: str | None = None) -> list[dict[str, Any]]:
        refused = [line for line in self.logs[node] if line["event"] == "peer_refused" and line["address"] == address]
        return refused if plane is None else [line for line in refused if line["plane"] == plane]

    def is_refused(self, attempt: Attempt) -> bool:
        """Return whether the log has this stranger. Without a key it may be gone before its address can be read."""
        own = self.refusals(attempt.node, attempt.source)
        return bool(own or ("secret" not in attempt.options and self.refusals(attempt.node, UNKNOWN, attempt.plane)))


def _breakable(ring: LoopbackRing, name: str) -> list[str]:
    return [sys.executable, "-c", GATE_THAT_BREAKS, str(ring.folder / name)]


def _break(ring: LoopbackRing, name: str, how: str) -> None:
    (ring.folder / f"{name}-{how}").touch()


@dataclass(frozen=True)
class Plain:
    """What a ring without keys showed, as it answered the same prompt, and a careless program beside it."""

    streams: Mapping[Way, bytes]
    links: list[str]
    summary: dict[str, Any]


class Talk:
    """A Starter that answers without end; its text comes in all the time."""

    def __init__(self, ring: LoopbackRing, log: Path) -> None:
        command = [*_breakable(ring, DESK), "run", "--topology", "{topology}", PROMPT, "--raw", "--ignore-eos"]
        command += ["--max-tokens", "30000", "--kv-tokens", "32768"]
        with log.open("ab") as errors:
            self.process = ring.start(DESK, command, stdout=subprocess.PIPE, stderr=errors)
        self.text = ""
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        while data := os.read(self.process.stdout.fileno(), 65_536):
            self.text += data.decode(errors="replace")

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def goes_on(self, more: int = 20) -> None:
        """Wait for some more of the answer."""
        before = len(self.text)
        happens(lambda: len(self.text) >= before + more or self.has_ended())
        assert not self.has_ended(), "the ring has ended"


def happens(condition: Callable[[], object]) -> None:
    """Wait for what another process will do."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it does not happen"
        time.sleep(0.05)


def lines_of(log: Path) -> list[dict[str, Any]]:
    found = []
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            found.append(json.loads(line))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def _topology(folder: Path, model: Path, *, insecure: bool) -> Path:
    share = NUM_LAYERS // 3
    nodes: list[dict[str, object]] = [
        {
            "name": name,
            "address": f"192.168.7.{10 + i}",
            "threads": 1,
            "memory": "1G",
            "layers": f"{i * share}-{i * share + share - 1}",
        }
        for i, name in enumerate((DESK, LEFT, RIGHT))
    ]
    nodes[0]["role"] = "starter"
    nodes.append({"name": STRANGER, "address": "192.168.7.66", "spare": True, "threads": 1, "memory": "1G"})
    data = {
        "version": 1,
        "model": {"path": str(model), "weights": "plain", "dtype": "f32"},
        "nodes": nodes,
        "links": {"wire": "f32"},  # so that activations on the wire are those that this test computes
        "security": {"insecure": insecure},
    }
    file = folder / "topology.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return file


def _ring(folder: Path, model: Path, *, insecure: bool, **options: Any) -> LoopbackRing:
    topology = _topology(folder, model, insecure=insecure)
    options = {"without": (STRANGER,), **options}
    return LoopbackRing(topology, folder / "ring", capture=folder / "ring.pcap", **options)


@pytest.fixture(scope="module")
def siege(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Siege]:
    folder = tmp_path_factory.mktemp("siege")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MDIQ_LOG", "json")
        try:
            with _ring(folder, model, insecure=False, without=(STRANGER, LEFT, RIGHT)) as ring:
                siege = Siege(model, folder / "ring.pcap", dict(ring.addresses))
                nodes = {name: ring.start_node(name, program=_breakable(ring, name)) for name in (LEFT, RIGHT)}
                _besiege(ring, siege, folder, nodes[RIGHT])
        except ConfigError as error:
            if "--capture" not in str(error):
                raise
            pytest.skip(f"packets cannot be captured here: {error}")
    yield siege


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, model: Path, siege: Siege) -> Plain:
    """A ring without keys, with slow hops where those can be had."""
    folder = tmp_path_factory.mktemp("plain")
    links = [] if why_no_namespaces() else parse_links(["delay=4ms", f"{RIGHT}:{DESK},delay=12ms"])
    with _ring(folder, model, insecure=True, links=links) as ring:
        command = ["mdiq", "run", "--topology", "{topology}", PROMPT, "--raw", "--ignore-eos", "--max-tokens", "8"]
        done = finish(ring.start(DESK, [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        assert done.code == 0, done.errors
        hears = [sys.executable, "-c", CARELESS, "hears", ring.addresses[STRANGER]]
        says = [sys.executable, "-c", CARELESS, "says", ring.addresses[STRANGER], PROMPT, _token_bytes(model).hex()]
        stranger = ring.start(STRANGER, hears, stdout=subprocess.PIPE)
        assert stranger.stdout is not None and stranger.stdout.readline() == b"listens\n"
        assert ring.start(DESK, says).wait(20) == 0 and stranger.wait(20) == 0
    return Plain(read_streams(folder / "ring.pcap"), [link.shape for link in links], done.summary)


# In the network of the ring: a prompt and its token ids as they would be seen if they ever left the Starter.
CARELESS = """
import socket, sys
if sys.argv[1] == "hears":
    with socket.create_server((sys.argv[2], 9000)) as server:
        print("listens", flush=True)
        peer, _ = server.accept()
        while peer.recv(1000):
            pass
else:
    with socket.create_connection((sys.argv[2], 9000)) as peer:
        peer.sendall(sys.argv[3].encode() + bytes.fromhex(sys.argv[4]))
"""


def _besiege(ring: LoopbackRing, siege: Siege, folder: Path, right: "subprocess.Popen[Any]") -> None:
    starter_log = folder / "starter.log"
    siege.notes["impostor"] = _pretend_to_be_the_starter(ring, folder)
    talk = Talk(ring, starter_log)
    talk.goes_on()
    siege.attempts += _strangers(ring, siege.capture)

    def are_refused(*attempts: Attempt) -> bool:
        _note(ring, siege, starter_log)
        return all(map(siege.is_refused, attempts))

    _try(ring, siege.attempts, lambda: are_refused(*siege.attempts))
    talk.goes_on()
    # A gate that answers no more, at the left: whoever is in stays in, and nobody else comes in, whatever key it has.
    _break(ring, LEFT, "hangs")
    hung = Attempt("a listed key while the gate hangs", LEFT, "data", _keys(ring, DESK, LEFT))
    _try(ring, [hung], lambda: are_refused(hung))
    talk.goes_on()
    # And one that fails, at the right: the node says so and is lost, others take over, and it waits for the next ring.
    _break(ring, RIGHT, "dies")
    last = Attempt("whoever comes then", RIGHT, "data", _keys(ring, None, RIGHT))
    _try(ring, [last], lambda: any(line["event"] == "ring_goes_on" for line in lines_of(starter_log)))
    talk.goes_on()
    siege.notes["losses"] = [line["error"] for line in lines_of(starter_log) if line["event"] == "ring_paused"]
    talk.process.terminate()
    talk.process.wait()
    siege.texts.append(talk.text)
    (ring.folder / f"{LEFT}-hangs").unlink()
    siege.attempts.append(hung)
    siege.notes["refused before"] = {a.source: len(siege.refusals(a.node, a.source)) for a in siege.attempts}
    siege.notes["told before"] = {a.source: siege.is_refused(a) for a in siege.attempts}
    siege.notes["unknown before"] = [
        len(siege.refusals(*place)) for place in {(a.node, UNKNOWN, a.plane) for a in siege.attempts}
    ]

    second_log = folder / "second.log"
    talk = Talk(ring, second_log)
    talk.goes_on()
    # The key of the left one is revoked at the right one, in the midst of a ring.
    file = ring.file.read_text()
    revoked = _public(ring, LEFT)
    ring.file.write_text(file.replace(revoked, zmq.curve_keypair()[0].decode()))
    right.send_signal(signal.SIGHUP)
    happens(lambda: _note(ring, siege, starter_log).refusals(RIGHT, _source(siege.addresses, LEFT)))
    happens(lambda: any(line["event"] == "keys_revoked" for line in siege.logs[RIGHT]))
    time.sleep(0.5)
    length = len(talk.text)
    time.sleep(0.5)
    siege.notes["text behind the revocation"] = len(talk.text) - length
    siege.texts.append(talk.text)
    # The Starter's own gate fails.
    _break(ring, DESK, "dies")
    _try(ring, [Attempt("whoever comes then", DESK, "control", _keys(ring, None, DESK))], talk.has_ended)
    siege.notes["second end"] = talk.process.wait(), second_log.read_text().splitlines()[-1]
    siege.notes["ended"] = ring.ended()
    _note(ring, siege, starter_log)


def _note(ring: LoopbackRing, siege: Siege, starter_log: Path) -> Siege:
    siege.logs = {DESK: lines_of(starter_log), LEFT: lines_of(ring.log(LEFT)), RIGHT: lines_of(ring.log(RIGHT))}
    return siege


def _source(addresses: Mapping[str, str], name: str) -> str:
    """Return the address from which a Node's connections come; on loopback it is not that at which it listens."""
    return "127.0.0.1" if addresses[name].startswith("127.") else addresses[name]


def _public(ring: LoopbackRing, name: str) -> str:
    nodes = yaml.safe_load(ring.file.read_text())["nodes"]
    return next(str(node["public_key"]) for node in nodes if node["name"] == name)


def _keys(ring: LoopbackRing, who: str | None, server: str) -> dict[str, str]:
    """Return the keys of a peer that has a Node's private key, or one that nobody knows."""
    folder = Path(yaml.safe_load(ring.file.read_text())["security"]["keys"])
    secret = zmq.curve_keypair()[1].decode() if who is None else (folder / f"{who}.key").read_text().strip()
    return {"secret": secret, "server": _public(ring, server)}


PORTS = {"data": 7400, "control": 7401, "weights": 7402}


def _strangers(ring: LoopbackRing, capture: Path) -> list[Attempt]:
    places = [(LEFT, "data"), (DESK, "data"), (DESK, "control"), (DESK, "weights")]
    attempts = [Attempt("an unlisted key", *place, _keys(ring, None, place[0])) for place in places]
    attempts += [Attempt("no key", *place, {}) for place in places]
    wrong = {
        (RIGHT, "data"): DESK,
        (DESK, "data"): LEFT,
        (LEFT, "data"): RIGHT,
        (DESK, "control"): DESK,
        (DESK, "weights"): DESK,  # a node that stands by may come, for what it is asked to fetch
    }
    attempts += [
        Attempt(f"the key of {who} where it does not belong", *place, _keys(ring, who, place[0]))
        for place, who in wrong.items()
    ]
    heard = read_streams(capture, whole=False)
    for node, plane, sender in ((LEFT, "data", DESK), (DESK, "control", LEFT)):
        ends = (_source(ring.addresses, sender), ring.addresses[node], PORTS[plane])
        recorded = [data for way, data in heard.items() if (way.source, way.target, way.target_port) == ends]
        # Greeting, HELLO and INITIATE, with the first messages behind it.
        attempts.append(Attempt(f"what {sender} has sent", node, plane, {"recorded": recorded[-1][:2_000].hex()}))
    return attempts


def _try(ring: LoopbackRing, attempts: Sequence[Attempt], until: Callable[[], bool]) -> None:
    """Have a stranger try it all, from an address of its own for each, so that the logs tell them apart."""
    network = "127.66" if ring.is_plain else "10.66"
    for attempt in attempts:
        third, fourth = divmod(next(_STRANGERS) % 62_500, 250)
        attempt.source = f"{network}.{third}.{fourth + 1}"
        if not ring.is_plain:
            assert ring.start(STRANGER, ["ip", "addr", "add", f"{attempt.source}/32", "dev", "eth0"]).wait(10) == 0
    told = [
        {
            "source": a.source,
            "host": ring.addresses[a.node],
            "port": PORTS[a.plane],
            "is_router": a.plane != "data",
            **a.options,
        }
        for a in attempts
    ]
    program = [sys.executable, str(HERE / "hostile_peer.py")]
    stranger = ring.start(STRANGER, program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert stranger.stdin is not None  # PIPE was asked for
    stranger.stdin.write(json.dumps(told).encode() + b"\n")
    stranger.stdin.flush()
    happens(until)
    time.sleep(2 * AGAIN_S)  # they try again, and are not logged again
    out, _ = stranger.communicate(timeout=WAIT_S)
    for attempt, is_let_in in zip(attempts, json.loads(out), strict=True):
        attempt.is_let_in = is_let_in


FALSE_STARTER = """
import json, sys, time, zmq
endpoint, secret = sys.argv[1:]
context = zmq.Context()
router = context.socket(zmq.ROUTER)
router.curve_server, router.curve_secretkey = True, secret.encode()
router.bind(endpoint)
print("listens", flush=True)
print(json.dumps([len(part) for part in router.recv_multipart()] if router.poll(60_000) else []), flush=True)
"""


def _pretend_to_be_the_starter(ring: LoopbackRing, folder: Path) -> str:
    """Listen where the Starter should, with the right one's key; return what the nodes have said to that."""
    endpoint = f"tcp://{ring.addresses[DESK]}:{PORTS['control']}"
    command = [sys.executable, "-c", FALSE_STARTER, endpoint, _keys(ring, RIGHT, RIGHT)["secret"]]
    impostor = ring.start(DESK, command, stdout=subprocess.PIPE, text=True)
    happens(lambda: all(_told_of_impostor(ring, name) for name in (LEFT, RIGHT)))
    time.sleep(1)
    impostor.terminate()
    out, _ = impostor.communicate(timeout=20)
    return str(out)


def _told_of_impostor(ring: LoopbackRing, name: str) -> list[dict[str, Any]]:
    return [line for line in lines_of(ring.log(name)) if line["event"] == "peer_not_trusted"]


def _token_bytes(model: Path) -> bytes:
    """Return the prompt's token ids as the engine holds them in 32 bits; with 64 bits every other one would be 0."""
    return b"".join(token.to_bytes(4, "little") for token in Tokenizer.load(model).encode(PROMPT))


def _activations(model: Path) -> list[bytes]:
    """Return the rows of the prompt as the first two Stages pass them on, computed here."""
    tokens = tuple(Tokenizer.load(model).encode(PROMPT))
    share, payload, rows = NUM_LAYERS // 3, TokenIds(tokens), []
    for i in range(2):
        stage = StageRunner.load(
            model,
            LayerRange(i * share, (i + 1) * share),
            is_last=False,
            owns_embedding_and_head=i == 0,
            kv_tokens=64,
        )
        segments = (Segment(SeqId(1), 0, len(tokens), wants_logits=True),)
        payload = stage.forward(Batch(Epoch(1), segments, (payload,)))
        data = b"".join(bytes(part) for part in payload.parts()[2])
        rows += [data[at : at + 4 * HIDDEN_SIZE] for at in range(0, len(data), 4 * HIDDEN_SIZE)]
    return rows


def _secrets_of(model: Path) -> dict[str, list[bytes]]:
    # Of the last layer, which is not the Starter's: others of the model do not travel.
    last = f".layers.{read_config(model).num_layers - 1}."
    tensors = load_file(next(model.glob("*.safetensors"))).items()
    weights = b"".join(tensor.numpy().tobytes() for name, tensor in tensors if last in name and tensor.ndim == 2)
    return {
        "activations": [row[at : at + 32] for row in _activations(model) for at in range(0, len(row), 32)],
        "prompt": [PROMPT.encode()],
        "token ids": [_token_bytes(model)],
        "weights": [weights[at : at + 32] for at in range(0, len(weights), 4096)],
        "names": [LEFT.encode(), RIGHT.encode()],
    }


def _found(streams: Mapping[Way, bytes], runs: Sequence[bytes]) -> int:
    return sum(any(run in stream for stream in streams.values()) for run in runs)


def test_no_byte_run_of_prompt_tokens_activations_or_weights_crosses_a_wire_of_a_ring_with_keys(siege: Siege) -> None:
    streams = read_streams(siege.capture)
    ports = {way.target_port for way in streams}
    assert set(PORTS.values()) <= ports, "something of the ring was not captured"
    assert sum(map(len, streams.values())) > 500_000
    for what, runs in _secrets_of(siege.model).items():
        assert _found(streams, runs) == 0, what


def test_the_same_search_finds_all_of_them_in_plain_text(siege: Siege, plain: Plain) -> None:
    for what, runs in _secrets_of(siege.model).items():
        assert _found(plain.streams, runs) == len(runs), what
    # Even there, prompt and token ids never leave the Starter: they are where the careless program sent them.
    ring = {way: stream for way, stream in plain.streams.items() if way.target_port != 9000}
    assert _found(ring, [PROMPT.encode(), _token_bytes(siege.model)]) == 0


def test_slow_hops_are_measured_as_they_are(plain: Plain) -> None:
    if not plain.links:
        pytest.skip(f"no slow hops: {why_no_namespaces()}")
    delays_s = [hop["delay_s"] for hop in plain.summary["hops"]]
    assert all(delay_s >= min_s for delay_s, min_s in zip(delays_s, (0.004, 0.004, 0.012), strict=True)), delays_s


def test_nobody_gets_in_who_is_not_listed_there(siege: Siege) -> None:
    assert len(siege.attempts) == 16
    assert [attempt.who for attempt in siege.attempts if attempt.is_let_in] == []


def test_each_refused_peer_is_logged_once_with_its_address(siege: Siege) -> None:
    counts = {(a.who, a.node, a.plane): siege.notes["refused before"][a.source] for a in siege.attempts}
    with_key = {(a.who, a.node, a.plane) for a in siege.attempts if "secret" in a.options}
    assert {place: count for place, count in counts.items() if place in with_key} == dict.fromkeys(with_key, 1)
    assert max(counts.values()) == 1 and max(siege.notes["unknown before"]) <= 1
    assert all(siege.notes["told before"].values())
    for attempt in siege.attempts:
        for line in siege.refusals(attempt.node, attempt.source):
            assert line["plane"] == attempt.plane
            assert ("public_key" in line) == ("secret" in attempt.options and "hangs" not in attempt.who)


def test_a_starter_with_another_key_hears_nothing_and_is_logged_once(siege: Siege) -> None:
    assert siege.notes["impostor"] == "listens\n"
    for node in (LEFT, RIGHT):
        told = [line for line in siege.logs[node] if line["event"] == "peer_not_trusted"]
        control = f"tcp://{siege.addresses[DESK]}:{PORTS['control']}"
        assert [line["endpoint"] for line in told] == [control]


def test_a_gate_that_fails_costs_a_node_and_the_ring_goes_on_and_the_next_one_answers_the_same(siege: Siege) -> None:
    (loss,) = siege.notes["losses"]
    assert loss.startswith(f"{RIGHT}: gate: it failed"), loss
    first, second = siege.texts
    assert len(second) >= 20 and first[: len(second)] == second[: len(first)]


def test_a_key_that_is_revoked_in_the_midst_of_a_ring_ends_its_connection(siege: Siege) -> None:
    revoked = [line["nodes"] for line in siege.logs[RIGHT] if line["event"] == "keys_revoked"]
    assert revoked == [LEFT]
    assert siege.notes["text behind the revocation"] == 0
    assert len(siege.refusals(RIGHT, _source(siege.addresses, LEFT))) == 1


def test_nothing_crashes(siege: Siege) -> None:
    assert siege.notes["ended"] == {}
    code, last_words = siege.notes["second end"]
    assert code == 1 and last_words.startswith("mdiq: gate: it failed"), last_words
    crashes = [line for lines in siege.logs.values() for line in lines if "exception" in line]
    assert crashes == []
