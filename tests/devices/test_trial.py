"""Three unlike devices and a spare, from `mdiq init` to an answer, by nodes/README.md alone and under real systemd.

The tests go in this order, each from where the one before left the devices. `Guide` types what the README says, so a
command that does not work there fails here; the last test sees that none was left out.
"""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mdiq.engine.formats.model_source import find_model
from tests.devices.conftest import BRIDGE, ROOT, UP_S, Shelf, must, run
from tests.devices.guide import Guide
from tests.streams import read_streams

DEVICES = {"desk": (1.0, "2G"), "pi1": (0.5, "1500M"), "pi2": (0.3, "1500M"), "pi3": (0.3, "1500M")}
STARTER, *WORKERS, SPARE = DEVICES
IN_README = {"desk": "192.168.1.10", "pi1": "192.168.1.11", "pi2": "192.168.1.12", SPARE: "192.168.1.13"}
QUESTION = "Why is the sky blue?"
DATA_PORT = 7400
RUN_BYTES = 16
RUN = (QUESTION, "--max-tokens", "16", "--json")
USERS = 8
CABLE_S = 20.0
NOTICED_S = 6.0  # by then a silent device is taken for gone, and others load its layers
MDIQ = "/opt/mdiq/current/bin/mdiq"
TOPOLOGY = "/etc/mdiq/topology.yaml"
# Root's own cache: the service could not write in folders of root's.
AS_ROOT = f"CREDENTIALS_DIRECTORY=/etc/mdiq MDIQ_CACHE=/root/cache {MDIQ}"
# Not in minutes' reach of a test: wheels for other machines, a journal that is followed for ever. The others have tests
# of their own: test_bring_up.py, tests/nodes.
NOT_TYPED = (
    "pip install -q",
    "ssh root@192.168.1.11 journalctl -u mdiq-node -f",
    "python nodes/provision.py topology.yaml --rollback",
    "python -m mdiq.testbed",
    "install -D -m 0644 accelerator.conf",
    "systemctl daemon-reload && systemctl restart",
)


@pytest.fixture(scope="module")
def guide(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Guide:
    for name, (cpu, memory) in DEVICES.items():
        shelf.up(name, cpu, memory)
    # A watchdog of a minute would be the longest test of all.
    shelf.write("pi2", "/etc/systemd/system/mdiq-node.service.d/50-test.conf", b"[Service]\nWatchdogSec=10\n")
    addresses = {IN_README[name]: shelf.addresses[name] for name in DEVICES}
    guide = Guide(shelf, tmp_path_factory.mktemp("checkout"), addresses, find_model(None))
    guide.welcome()
    return guide


class Watch:
    """Notes the changes of the units of devices while it runs: (ActiveState, StatusText).

    It looks twice a second and no more: what it takes of a device's CPU time is missing in what the device measures.
    """

    def __init__(self, shelf: Shelf, *names: str) -> None:
        self.seen: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
        self._shelf = shelf
        self._looking: list[subprocess.Popen[str]] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Watch":
        for name in self.seen:
            unit = "mdiq-starter" if name == STARTER else "mdiq-node"
            show = f"systemctl show -p ActiveState,StatusText --value {unit} | paste -s"
            # The end of the pipe ends it: a signal would not reach what runs on the device.
            loop = f"while read -r -t 0.5; [ $? -gt 128 ]; do {show}; done"
            command = [self._shelf.tool, "sh", name, "bash", "-c", loop]
            looking = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._looking.append(looking)
            self._threads.append(threading.Thread(target=self._read, args=(name, self._looking[-1])))
            self._threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        for looking, thread in zip(self._looking, self._threads, strict=True):
            assert looking.stdin is not None and looking.stdout is not None
            looking.stdin.close()
            thread.join(30)
            looking.stdout.close()
            looking.wait(30)

    def until_all_are_active(self) -> None:
        """Wait until it has seen what others were told a moment ago."""
        for _ in range(100):
            if all(any(state == "active" for state, _ in seen) for seen in self.seen.values()):
                return
            time.sleep(0.2)
        raise AssertionError(self.seen)

    def _read(self, name: str, looking: "subprocess.Popen[str]") -> None:
        assert looking.stdout is not None
        for line in looking.stdout:
            # systemctl shows them in an order of its own.
            states = [part for part in line.rstrip("\n").split("\t") if part]
            state = next((part for part in states if part in ("active", "activating", "inactive", "failed")), "")
            text = next((part for part in states if part != state), "")
            if not self.seen[name] or self.seen[name][-1] != (state, text):
                self.seen[name].append((state, text))


def _status(shelf: Shelf) -> dict[str, Any]:
    """Return what `mdiq status` tells on the Starter's device."""
    asked = shelf.try_sh(STARTER, f"{MDIQ} status {TOPOLOGY} --json")
    found: dict[str, Any] = json.loads(asked.stdout) if asked.stdout.startswith("{") else {"is_serving": False}
    return found


def _members(status: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the nodes of the ring; others stand by."""
    return [node for node in status["nodes"] if "layers" in node]


def _until_serves(shelf: Shelf, num_rings: int) -> dict[str, Any]:
    """Wait until the Starter's unit serves its so many'th ring.

    It asks systemd meanwhile: each `mdiq status` would take half a second of the CPU time that desk measures.
    """
    for _ in range(300):
        text = shelf.sh(STARTER, "systemctl show -p StatusText --value mdiq-starter")
        if text.startswith("serves"):
            found = _status(shelf)
            if found["is_serving"] and found["rings_formed"] >= num_rings:
                return found
        time.sleep(1)
    raise AssertionError(shelf.sh(STARTER, "journalctl --no-pager -o cat -u mdiq-starter | tail -50"))


def _until_it_is_as_before(shelf: Shelf, served: dict[str, Any]) -> None:
    """Wait until the ring, the same one, has the nodes and layers again that it had."""
    for _ in range(120):
        found = _until_serves(shelf, served["rings_formed"])
        assert found["rings_formed"] == served["rings_formed"], "it was formed anew"
        if [(node["name"], node["layers"]) for node in _members(found)] == [
            (node["name"], node["layers"]) for node in _members(served)
        ]:
            return
        time.sleep(2)
    raise AssertionError(shelf.sh(STARTER, "journalctl --no-pager -o cat -u mdiq-starter | tail -50"))


def _settled(shelf: Shelf) -> dict[str, Any]:
    """Return the status of a ring that has the split of the last plan: its own figures may have led to a better one."""
    for _ in range(4):
        served = _status(shelf)
        split = ", ".join(f"{node['name']} {node['layers'][1] - node['layers'][0]}" for node in _members(served))
        journal = shelf.sh(STARTER, "journalctl --no-pager -o cat -u mdiq-starter")
        planned = re.findall(r"layers as planned: ([^;]+);", journal)
        if planned and planned[-1] == split:
            return served
        shelf.sh(STARTER, "systemctl restart mdiq-starter", timeout=UP_S)
        _until_serves(shelf, 1)
    raise AssertionError(journal)


def _answer(shelf: Shelf) -> str:
    """Ask the Starter's API."""
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 16})
    script = (
        "import json, urllib.request as r\n"
        f"answer = r.urlopen('http://127.0.0.1:8080/v1/chat/completions', {body.encode()!r})\n"
        "print(json.load(answer)['choices'][0]['message']['content'])\n"
    )
    shelf.write(STARTER, "/root/ask.py", script.encode())
    return shelf.sh(STARTER, "python3 /root/ask.py").strip()


@contextmanager
def _client_reads_on(shelf: Shelf) -> Iterator[None]:
    """Have a client read a long answer, and see that what happens meanwhile costs it time and not a token."""
    body = {"prompt": QUESTION, "temperature": 0, "max_tokens": 300, "ignore_eos": True, "stream": True}
    script = (
        "import json, urllib.request as r\n"
        f"for line in r.urlopen('http://127.0.0.1:8080/v1/completions', {json.dumps(body).encode()!r}):\n"
        "    if line.startswith(b'data: {'):\n"
        "        print(json.dumps(json.loads(line[6:])['choices'][0]['text']), flush=True)\n"
    )
    shelf.write(STARTER, "/root/stream.py", script.encode())
    command = [shelf.tool, "sh", STARTER, "python3", "/root/stream.py"]
    whole = must(run(*command, timeout=UP_S))
    assert len(whole.splitlines()) >= 200  # some tokens are no text of their own
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        begun = "".join(client.stdout.readline() for _ in range(20))
        yield
        rest, errors = client.communicate(timeout=UP_S)
    assert begun + rest == whole and client.returncode == 0, errors


def _local(layers: list[int], wires: list[str], weights: str) -> dict[str, Any]:
    """Return the result of a ring on this machine with these numbers of layers, and these formats."""
    options = ["--layers", ",".join(map(str, layers)), "--wire", ",".join(wires), "--weights", weights]
    done = must(run(sys.executable, "-m", "mdiq", "run", *RUN, *options, "--threads", "1", timeout=UP_S))
    result: dict[str, Any] = json.loads(done.splitlines()[0])
    return result


def _local_text(status: dict[str, Any], weights: str = "auto") -> str:
    """Return the text of a ring on this machine that is like the one which a status shows."""
    layers = [node["layers"][1] - node["layers"][0] for node in _members(status)]
    return str(_local(layers, [hop["wire"] for hop in status["hops"]], weights)["text"]).strip()


def _run_on_desk(shelf: Shelf, *arguments: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run `mdiq run` over the devices in place of the service; return the results and the summary."""
    quoted = " ".join(f"'{part}'" for part in arguments)
    out = shelf.sh(STARTER, f"{AS_ROOT} run --topology {TOPOLOGY} {quoted}", timeout=UP_S)
    *results, last = (json.loads(line) for line in out.splitlines())
    return results, last["summary"]


def _events(shelf: Shelf, name: str, event: str) -> list[dict[str, Any]]:
    """Return a node's log lines of one kind, from its journal."""
    lines = shelf.sh(name, "journalctl --no-pager -o cat -u mdiq-node").splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    return [entry for entry in events if entry["event"] == event]


def _edit(guide: Guide, *, memory: dict[str, str], kv_tokens: int, **model: str) -> None:
    """Change the operator's file as an editor would."""
    file = guide.folder / "topology.yaml"
    text = file.read_text()
    for name, limit in memory.items():
        before, begin, rest = text.partition(f"  - name: {name}\n")
        block, end, after = rest.partition("\n\n")
        lines = [line for line in block.split("\n") if not line.startswith("    memory:")]
        text = before + begin + "\n".join([*lines, f"    memory: {limit}"]) + end + after
    for key, value in {"kv_tokens": str(kv_tokens), **model}.items():
        text, num = re.subn(rf"^(  {key}: )\S+", rf"\g<1>{value}", text, flags=re.MULTILINE)
        assert num == 1, text
    file.write_text(text)


def _provision_topology(guide: Guide) -> None:
    """Bring the operator's topology, which has changed, to all devices."""
    out = must(guide.run("python nodes/provision.py topology.yaml"))
    assert len(re.findall(r"^\w+ +push +1 of", out, re.MULTILINE)) == len(DEVICES), "the topology alone is sent"


@contextmanager
def _capture(shelf: Shelf, file: Path) -> Iterator[None]:
    """Copy what passes between the devices meanwhile."""
    command = [shelf.tool, "hub", sys.executable, ROOT / "mdiq" / "testbed" / "capture.py", file, BRIDGE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as capture:
        assert capture.stdout is not None and capture.stdout.readline() == "captures\n"
        try:
            yield
        finally:
            capture.terminate()
        assert capture.wait(30) == 0


def test_init_keys_and_check_write_a_file_that_has_no_mistake(guide: Guide) -> None:
    assert "topology.yaml: written" in must(guide.type("mdiq init"))
    # For 8 users a small model is fastest on the fastest device alone. These have other things to do as well, and the
    # users long questions: no two of them hold it. Some 14 layers of 52 MiB, with KV cache, fit on each: what a process
    # takes beside them differs by tens of MiB from kernel to kernel, which is about one layer.
    _edit(guide, memory={STARTER: "1200M", "pi1": "1130M", "pi2": "1130M"}, kv_tokens=32_768)
    assert "run `mdiq keys`" in guide.run("mdiq check topology.yaml").stderr
    must(guide.type("mdiq keys"))
    checked = guide.type("mdiq check")
    assert must(checked).endswith("encrypted\n") and checked.stderr == ""
    modes = must(guide.run("stat -c '%a %n' keys keys/*"))
    assert modes.splitlines() == ["700 keys", *(f"600 keys/{name}.key" for name in DEVICES)]


def test_the_starters_device_gets_the_model(guide: Guide, shelf: Shelf) -> None:
    must(guide.type("ssh root@192.168.1.10 'mkdir -p /var/lib/mdiq"))
    assert int(shelf.sh(STARTER, "stat -c %s /var/lib/mdiq/model.gguf")) == guide.model.stat().st_size


def test_a_folder_of_wheels_is_filled(guide: Guide) -> None:
    must(guide.type("python nodes/wheels.py --python 3.11", on_network=False))
    for_pis = must(guide.type("python nodes/wheels.py --machine aarch64", on_network=False))
    assert "wheels for aarch64, Python 3.11" in for_pis
    assert list((guide.folder / "wheels").glob("torch-*.whl"))


def test_a_dry_run_reaches_every_device(guide: Guide) -> None:
    must(guide.type("ssh root@192.168.1.11 true"))
    out = must(guide.type("python nodes/provision.py topology.yaml --dry-run"))
    for name in DEVICES:
        assert re.search(rf"^{name} +push +would send", out, re.MULTILINE)


def test_the_canary_comes_up_before_the_others_and_the_ring_tells_its_progress_until_it_is_ready(
    guide: Guide, shelf: Shelf
) -> None:
    with Watch(shelf, *WORKERS, STARTER) as watch:
        out = must(guide.type("python nodes/provision.py topology.yaml --canary"))
        lines = [line.split(maxsplit=2) for line in out.splitlines()]
        places = {(name, stage): i for i, (name, stage, _) in enumerate(lines)}
        for name in (STARTER, "pi2", SPARE):
            assert places["pi1", "check"] < places[name, "reach"]
        # A ring that is not there holds up no boot and is no failure.
        assert "activating: " in lines[places["pi1", "check"]][2]
        ready = must(guide.type("python nodes/provision.py topology.yaml --ready-within"))
        watch.until_all_are_active()
    assert re.search(r"^desk +ready +serves on desk", ready, re.MULTILINE), ready
    assert re.search(rf"^{SPARE} +ready +stands by: it is a spare", ready, re.MULTILINE), ready
    assert len(re.findall(r"^\w+ +push +0 of", ready, re.MULTILINE)) == len(DEVICES), ready
    served = _status(shelf)
    assert served["is_serving"], served
    assert [node["name"] for node in _members(served)] == [STARTER, *WORKERS], "each brings more than it costs"
    for node in _members(served)[1:]:
        layers, seen = f"layers {node['layers'][0]}-{node['layers'][1] - 1}", watch.seen[node["name"]]
        texts = [text for state, text in seen if state == "activating"]
        assert any(re.fullmatch(r"(fetching|loading) layers \d+-\d+: \d+ %", text) for text in texts), seen
        # Ready is what it says when it serves, and nothing before is: of the survey it says nothing.
        first_active = next(text for state, text in seen if state == "active")
        assert first_active in (f"serves {layers}", "waits for the starter"), seen
    starter = watch.seen[STARTER]
    assert any("nodes measure themselves" in text for state, text in starter if state == "activating"), starter
    assert next(text for state, text in starter if state == "active").startswith("serves on desk"), starter


def test_the_ring_answers_over_http_as_a_local_one(shelf: Shelf) -> None:
    assert _answer(shelf) == _local_text(_status(shelf))


def test_nodes_fetch_their_own_layers_and_then_those_that_they_may_take_over(shelf: Shelf) -> None:
    nodes = {node["name"]: node for node in _members(_status(shelf))}
    num_of_starter = nodes[STARTER]["layers"][1] - nodes[STARTER]["layers"][0]
    for name in (*WORKERS, SPARE):
        shelf.wait(name, "journalctl -o cat -u mdiq-node | grep -q standby_layers_here")
        files = shelf.sh(name, "find /var/cache/mdiq/ -name 'layer-*'").split()
        assert all("/weights/" in file for file in files), "it has packed what came packed"
        num_own = sum(event["layers_fetched"] for event in _events(shelf, name, "weights_here"))
        if name == SPARE:
            assert not num_own and len(files) == 30 - num_of_starter, "it has not what all the others have"
        else:
            assert 0 < num_own < 0.6 * 30 and num_own < len(files), "it has not what its neighbour has"
    assert shelf.unit(SPARE, "ActiveState", "StatusText") == ["active", "stands by: it is a spare"]


def test_the_status_and_the_journal_can_be_read(guide: Guide, shelf: Shelf) -> None:
    status = must(guide.type("ssh root@192.168.1.11 systemctl status"))
    assert "active (running)" in status and 'Status: "serves layers' in status
    must(guide.run("ssh root@192.168.1.11 journalctl -u mdiq-node --no-pager"))
    for name in WORKERS:
        journal = shelf.sh(name, "journalctl --no-pager -o cat -u mdiq-node")
        assert "Traceback" not in journal and QUESTION not in journal
        for event in ("waits_for_starter", "weights_here", "stage_ready", "epoch_began"):
            assert _events(shelf, name, event), f"{name} has not told {event}"
    journal = shelf.sh(STARTER, "journalctl --no-pager -o cat -u mdiq-starter")
    assert "Traceback" not in journal and QUESTION not in journal and "layers as planned" in journal


def test_the_watchdog_restarts_a_node_that_stands_still_and_answers_go_on(shelf: Shelf) -> None:
    served, before = _settled(shelf), _answer(shelf)
    if "pi2" not in [node["name"] for node in _members(served)]:
        pytest.fail(f"the plan leaves pi2 out: {served}")
    (pid,) = shelf.unit("pi2", "MainPID")
    with _client_reads_on(shelf):
        shelf.sh("pi2", f"kill -STOP {pid}")
        shelf.wait("pi2", f"! test -e /proc/{pid}")
    _until_it_is_as_before(shelf, served)
    assert "Watchdog timeout" in shelf.journal("pi2")
    assert _events(shelf, SPARE, "epoch_began"), "it has taken over"
    assert _answer(shelf) == before
    # What it had is still there.
    assert _events(shelf, "pi2", "weights_here")[-1]["layers_fetched"] == 0


def test_a_device_that_lost_its_power_comes_back_by_itself_and_answers_go_on(shelf: Shelf) -> None:
    served, before = _status(shelf), _answer(shelf)
    with _client_reads_on(shelf):
        shelf.off("pi1")
        shelf.up("pi1", *DEVICES["pi1"])
    _until_it_is_as_before(shelf, served)
    assert _answer(shelf) == before
    assert shelf.sh("pi1", "systemctl is-system-running").strip() == "running"
    assert _events(shelf, "pi1", "weights_here")[-1]["layers_fetched"] == 0


def test_a_cable_that_is_out_for_a_while_costs_a_pause_and_not_a_token(shelf: Shelf) -> None:
    served = _status(shelf)
    with _client_reads_on(shelf):
        shelf.cut("pi1")
        time.sleep(CABLE_S)
        shelf.mend("pi1")
    _until_it_is_as_before(shelf, served)


def test_a_unit_that_is_restarted_and_a_second_failure_meanwhile_cost_not_a_token(shelf: Shelf) -> None:
    served = _status(shelf)
    with _client_reads_on(shelf):
        shelf.sh("pi1", "systemctl restart mdiq-node", timeout=UP_S)
    _until_it_is_as_before(shelf, served)
    (pid,) = shelf.unit("pi2", "MainPID")
    with _client_reads_on(shelf):
        shelf.off("pi1")
        time.sleep(NOTICED_S)
        shelf.sh("pi2", f"kill -KILL {pid}")
        shelf.up("pi1", *DEVICES["pi1"])
    _until_it_is_as_before(shelf, served)


def test_the_planned_ring_beside_the_equal_one(shelf: Shelf, record_property: Callable[[str, object], None]) -> None:
    """The figures are for whoever reads the report: see -rP. That the slow devices carry less is a test."""
    shelf.sh(STARTER, "systemctl stop mdiq-starter", timeout=UP_S)
    lines = "".join(json.dumps({"prompt": f"{QUESTION} ({i})", "ignore_eos": True}) + "\n" for i in range(USERS))
    shelf.write(STARTER, "/root/prompts.jsonl", lines.encode())
    load = ("--prompts", "/root/prompts.jsonl", "--max-tokens", "48", "--json")
    rates: dict[str, list[float]] = {"planned": [], "equal": []}
    for _ in range(2):
        for kind, options in (("planned", ()), ("equal", ("--even-split",))):
            results, summary = _run_on_desk(shelf, *load, *options)
            assert len(results) == USERS and all(len(result["token_ids"]) == 48 for result in results)
            rates[kind].append(summary["pace"]["measured_tokens_per_s"])
            layers = {node["name"]: node["layers"][1] - node["layers"][0] for node in summary["nodes"]}
            if kind == "planned":
                # The head, which is worth several layers, is desk's.
                assert layers.get("pi1", 0) > layers.get("pi2", 0) and layers["desk"] > layers.get("pi2", 0), layers
            print(  # noqa: T201
                f"{kind}: {layers}, {summary['pace']['measured_tokens_per_s']:.1f} tokens/s, predicted "
                f"{summary['pace']['predicted_tokens_per_s']:.1f}"
            )
    explained = json.loads(shelf.sh(STARTER, f"{AS_ROOT} plan {TOPOLOGY} --explain --json --users {USERS}"))
    equal = next(split for split in explained["splits"] if "equal" in split["name"])
    print(f"predicted: planned {explained['plan']['rate']:.1f}; {equal}")  # noqa: T201
    record_property("rates", json.dumps(rates))


def test_a_model_too_large_for_a_device_runs_over_three(guide: Guide, shelf: Shelf) -> None:
    """In f32 the model alone takes 538 MB, and mdiq more than 160 MB beside it."""
    # Two alone may not hold it: the third one is necessary.
    _edit(guide, memory={STARTER: "700M", "pi1": "560M", "pi2": "600M"}, kv_tokens=2_048, weights="plain")
    _provision_topology(guide)
    served = _until_serves(shelf, 1)
    assert [node["name"] for node in _members(served)] == [STARTER, *WORKERS]
    assert _answer(shelf) == _local_text(served, "plain")
    assert all(node["rss_bytes"] < 700 << 20 for node in _members(served))
    assert sum(node["weight_bytes"] for node in _members(served)) > 500 << 20
    plan = must(guide.type("ssh root@192.168.1.10 MDIQ_CACHE=/var/cache/mdiq"))
    assert "free MiB" in plan and "KV MiB" in plan, plan
    print(plan)  # noqa: T201
    # Alone: what has room on desk has none on pi2. It turns memory over and over there, if it is not killed.
    alone = f"timeout 150 {MDIQ} run --in-process --weights plain --model /root/model.gguf --max-tokens 4 '{QUESTION}'"
    shelf.sh(STARTER, "systemctl stop mdiq-starter", timeout=UP_S)
    for name in (STARTER, "pi2"):
        shelf.write(name, "/root/model.gguf", guide.model.read_bytes())
    shelf.limit("pi2", "600M")
    done = {name: shelf.try_sh(name, alone) for name in (STARTER, "pi2")}
    shelf.limit("pi2", DEVICES["pi2"][1])
    assert done[STARTER].returncode == 0 and done[STARTER].stdout, done
    assert done["pi2"].returncode != 0 and done["pi2"].stdout == "", done


def test_what_passes_between_devices_cannot_be_read_unless_the_ring_is_insecure(
    guide: Guide, shelf: Shelf, tmp_path: Path
) -> None:
    def captured(name: str) -> bytes:
        # Each time a ring of its own: none finds the prompt in its cache.
        with _capture(shelf, tmp_path / name):
            _run_on_desk(shelf, "--even-split", *RUN)
        streams = read_streams(tmp_path / name, whole=False)
        assert len({way.source for way in streams if way.target_port == DATA_PORT}) == len(WORKERS) + 1
        return b"".join(data for way, data in streams.items() if way.target_port == DATA_PORT)

    file = guide.folder / "topology.yaml"
    file.write_text(file.read_text().replace("weights: plain", "weights: int8"))
    _provision_topology(guide)
    shelf.sh(STARTER, "systemctl stop mdiq-starter", timeout=UP_S)
    secure = captured("secure")
    file.write_text(file.read_text().replace("insecure: false", "insecure: true"))
    _provision_topology(guide)
    shelf.sh(STARTER, "systemctl stop mdiq-starter", timeout=UP_S)
    open_, again = captured("open"), captured("again")
    # Activations are the same in each run, but for tags and ids beside them.
    runs = {open_[start : start + RUN_BYTES] for start in range(0, len(open_) - RUN_BYTES, 8 * RUN_BYTES)}
    runs = {run_ for run_ in runs if len(set(run_)) > RUN_BYTES // 4}
    found = sum(run_ in again for run_ in runs)
    assert len(runs) > 50 and found > len(runs) / 2, f"of {len(runs)} runs of an insecure ring {found} come again"
    assert len(secure) > len(open_) / 2 and b"CURVE" in secure
    assert [run_ for run_ in runs if run_ in secure] == []
    assert QUESTION.encode() not in secure


def test_every_command_of_the_readme_was_typed(guide: Guide) -> None:
    left = [command for command in guide.commands if command not in guide.done]
    left = [command for command in left if not command.startswith(NOT_TYPED)]
    assert left == []
