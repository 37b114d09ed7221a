"""Three unlike devices and a spare, from `mdiq init` to an answer, by nodes/README.md alone and under real systemd.

The tests go in this order, each from where the one before left the devices. `Guide` types what the README says, so a
command that does not work there fails here; the last test sees that none was left out.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mdiq.engine.model_source import find_model
from tests.devices.capture import Capture, payloads
from tests.devices.conftest import UP_S, Shelf, must, run
from tests.devices.guide import Guide

DEVICES = {"desk": (1.0, "2G"), "pi1": (0.5, "1G"), "pi2": (0.3, "700M"), "pi3": (0.3, "700M")}
WORKERS = ("pi1", "pi2")
SPARE = "pi3"
IN_README = {"desk": "192.168.1.10", "pi1": "192.168.1.11", "pi2": "192.168.1.12", SPARE: "192.168.1.13"}
QUESTION = "Why is the sky blue?"
DATA_PORT = 7400
RUN_BYTES = 16
RUN = (QUESTION, "--max-tokens", "16", "--json")
# Not in minutes' reach of a test: wheels for other machines, a journal that is followed for ever. The others have tests
# of their own: test_bring_up.py, tests/nodes.
NOT_TYPED = (
    "pip download -d wheels --only-binary",
    "ssh root@192.168.1.11 journalctl -u mdiq-node -f",
    "python nodes/provision.py topology.yaml --ready-within",
    "python nodes/provision.py topology.yaml --rollback",
    "python nodes/loopback.py",
    "install -D -m 0644 accelerator.conf",
    "systemctl daemon-reload && systemctl restart",
)
ON_DESK = "CREDENTIALS_DIRECTORY=/etc/mdiq MDIQ_CACHE=/var/cache/mdiq /opt/mdiq/current/bin/mdiq"


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


def _ask(shelf: Shelf) -> tuple[list[int], dict[str, Any]]:
    """Ask the ring from the Starter's device; return the answer's tokens and the run's summary."""
    return _read(shelf.sh("desk", _asking(), timeout=UP_S))


def _asking() -> str:
    quoted = " ".join(f"'{part}'" for part in RUN)
    # Of each ring alike: the second one would be planned from what the first has measured.
    return f"{ON_DESK} run --topology /etc/mdiq/topology.yaml --even-split {quoted}"


def _read(out: str) -> tuple[list[int], dict[str, Any]]:
    result, last = (json.loads(line) for line in out.splitlines())
    return result["token_ids"], last["summary"]


def _local_answer(summary: dict[str, Any], weights: str) -> list[int]:
    """Return the tokens of a ring on this machine with the same Layers and formats."""
    layers = ",".join(str(stop - start) for start, stop in (node["layers"] for node in summary["nodes"]))
    options = ["--layers", layers, "--wire", ",".join(summary["wires"]), "--weights", weights, "--threads", "1"]
    return _read(must(run(sys.executable, "-m", "mdiq", "run", *RUN, *options, timeout=UP_S)))[0]


def _events(shelf: Shelf, name: str, event: str) -> list[dict[str, Any]]:
    """Return a node's log lines of one kind, from its journal."""
    lines = shelf.sh(name, "journalctl --no-pager -o cat -u mdiq-node").splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    return [entry for entry in events if entry["event"] == event]


def _provision_topology(guide: Guide, shelf: Shelf) -> str:
    """Bring the operator's topology, which has changed, to all devices."""
    only = " ".join(f"--only {name}" for name in (*WORKERS, SPARE))
    out = _done(guide.run(f"python nodes/provision.py topology.yaml {only}"))
    shelf.write("desk", "/etc/mdiq/topology.yaml", (guide.folder / "topology.yaml").read_bytes())
    return out


def _done(done: subprocess.CompletedProcess[str]) -> str:
    return must(done)


def test_init_keys_and_check_write_a_file_that_has_no_mistake(guide: Guide) -> None:
    assert "topology.yaml: written" in _done(guide.type("mdiq init"))
    assert "run `mdiq keys`" in guide.run("mdiq check topology.yaml").stderr
    _done(guide.type("mdiq keys"))
    checked = guide.type("mdiq check")
    assert _done(checked).endswith("encrypted\n") and checked.stderr == ""
    modes = _done(guide.run("stat -c '%a %n' keys keys/*"))
    assert modes.splitlines() == ["700 keys", *(f"600 keys/{name}.key" for name in DEVICES)]


def test_the_starters_device_gets_the_model(guide: Guide, shelf: Shelf) -> None:
    _done(guide.type("ssh root@192.168.1.10 'mkdir -p /var/lib/mdiq"))
    assert int(shelf.sh("desk", "stat -c %s /var/lib/mdiq/model.gguf")) == guide.model.stat().st_size


def test_a_folder_of_wheels_is_filled(guide: Guide) -> None:
    _done(guide.type("pip wheel", on_network=False))
    _done(guide.type("pip download -d wheels wheels/mdiq", on_network=False))
    assert list((guide.folder / "wheels").glob("torch-*.whl"))


def test_a_dry_run_reaches_every_device(guide: Guide) -> None:
    _done(guide.type("ssh root@192.168.1.11 true"))
    out = _done(guide.type("python nodes/provision.py topology.yaml --dry-run"))
    for name in DEVICES:
        assert re.search(rf"^{name} +push +would send", out, re.MULTILINE)


def test_the_canary_comes_up_before_the_others_and_all_wait_for_their_ring(guide: Guide, shelf: Shelf) -> None:
    only = " ".join(f"--only {name}" for name in (*WORKERS, SPARE))
    out = _done(guide.type("python nodes/provision.py topology.yaml --canary", but=only))
    lines = [line.split(maxsplit=2) for line in out.splitlines()]
    places = {(name, stage): i for i, (name, stage, _) in enumerate(lines)}
    for name in ("pi2", SPARE):
        assert places["pi1", "check"] < places[name, "reach"]
        assert "activating: " in lines[places[name, "check"]][2]
    for name in (*WORKERS, SPARE):
        shelf.wait(name, "systemctl show -p StatusText mdiq-node | grep -q starter")
    # A ring that is not there holds up no boot and is no failure.
    for name in (*WORKERS, SPARE):
        assert shelf.unit(name, "ActiveState", "StatusText") == ["activating", "waits for the starter"]


def test_the_starters_device_is_brought_up_by_hand(guide: Guide, shelf: Shelf) -> None:
    copies = "wheels nodes topology.yaml keys/desk.key"
    _done(guide.run(f"tar -c {copies} | ssh root@192.168.1.10 'mkdir -p /root/mdiq && tar -x -C /root/mdiq'"))
    install = "./nodes/install.sh --name desk --role starter --wheels wheels --key keys/desk.key"
    shelf.sh("desk", f"cd /root/mdiq && {install} --topology topology.yaml --no-start && rm -r ../mdiq", timeout=UP_S)


def test_the_first_ring_tells_its_progress_gets_ready_and_answers_as_a_local_one(shelf: Shelf) -> None:
    command = [shelf.tool, "sh", "desk", "bash", "-c", _asking()]
    seen: dict[str, list[tuple[str, str]]] = {name: [] for name in WORKERS}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asking:
        while asking.poll() is None:
            for name in WORKERS:
                state = tuple(shelf.unit(name, "ActiveState", "StatusText"))
                if not seen[name] or seen[name][-1] != state:
                    seen[name].append(state)
            time.sleep(0.2)
        out, errors = asking.communicate()
    assert asking.returncode == 0, errors
    tokens, summary = _read(out)
    assert [node["name"] for node in summary["nodes"]] == ["desk", *WORKERS]
    assert tokens == _local_answer(summary, "int8")
    for name, (start, stop) in ((node["name"], node["layers"]) for node in summary["nodes"][1:]):
        layers = f"layers {start}-{stop - 1}"
        texts = [text for state, text in seen[name] if state == "activating"]
        assert any(re.fullmatch(rf"fetching {layers}: \d+ %", text) for text in texts), seen[name]
        assert any(re.fullmatch(rf"loading {layers}: \d+ %", text) for text in texts), seen[name]
        # Ready is what it says when it serves, and nothing before is.
        first_active = next(text for state, text in seen[name] if state == "active")
        assert first_active in (f"serves {layers}", "waits for the starter"), seen[name]


def test_each_node_has_fetched_its_own_layers_and_a_second_run_fetches_nothing(shelf: Shelf) -> None:
    tokens, summary = _ask(shelf)
    assert tokens == _local_answer(summary, "int8")
    for name in WORKERS:
        first, second = (event["chunks_fetched"] for event in _events(shelf, name, "weights_here"))
        assert first > 10 and second == 0
        size, taken = map(int, shelf.sh(name, "stat -c '%s %b' /var/cache/mdiq/weights/*/model.gguf").split())
        assert taken * 512 < size / 2, "it has more than its own layers"
    assert shelf.sh(SPARE, "ls -A /var/cache/mdiq") == ""


def test_the_status_and_the_journal_can_be_read(guide: Guide, shelf: Shelf) -> None:
    status = _done(guide.type("ssh root@192.168.1.11 systemctl status"))
    assert "active (running)" in status and 'Status: "waits for the starter"' in status
    _done(guide.run("ssh root@192.168.1.11 journalctl -u mdiq-node --no-pager"))
    for name in WORKERS:
        journal = shelf.sh(name, "journalctl --no-pager -o cat -u mdiq-node")
        assert "Traceback" not in journal and QUESTION not in journal
        for event in ("waits_for_starter", "weights_here", "stage_ready", "epoch_began", "ring_ended"):
            assert _events(shelf, name, event), f"{name} has not told {event}"


def test_the_watchdog_restarts_a_node_that_stands_still_and_the_next_ring_has_it(shelf: Shelf) -> None:
    (before,) = shelf.unit("pi2", "MainPID")
    shelf.sh("pi2", f"kill -STOP {before}")
    shelf.wait("pi2", f"! test -e /proc/{before} && systemctl show -p StatusText mdiq-node | grep -q starter")
    assert "Watchdog timeout" in shelf.journal("pi2")
    tokens, summary = _ask(shelf)
    assert tokens == _local_answer(summary, "int8")


def test_a_device_that_lost_its_power_is_back_when_the_next_ring_starts(shelf: Shelf) -> None:
    shelf.off("pi1")
    shelf.up("pi1", *DEVICES["pi1"])
    # Nobody waits for its service: the Starter does.
    tokens, summary = _ask(shelf)
    assert tokens == _local_answer(summary, "int8")
    assert shelf.sh("pi1", "systemctl is-system-running").strip() == "running"
    assert _events(shelf, "pi1", "weights_here")[-1]["chunks_fetched"] == 0


def test_the_starters_unit_serves_the_ring_and_forms_it_again_after_a_reboot(guide: Guide, shelf: Shelf) -> None:
    def status() -> dict[str, Any]:
        asked = shelf.try_sh("desk", "/opt/mdiq/current/bin/mdiq status /etc/mdiq/topology.yaml --json")
        found: dict[str, Any] = json.loads(asked.stdout) if asked.stdout.startswith("{") else {"is_serving": False}
        return found

    def until_serves(num_rings: int) -> dict[str, Any]:
        for _ in range(300):
            found = status()
            if found["is_serving"] and found["rings_formed"] >= num_rings:
                return found
            time.sleep(1)
        raise AssertionError(shelf.sh("desk", "journalctl --no-pager -o cat -u mdiq-starter | tail -50"))

    def answer() -> str:
        body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 16})
        script = (
            "import json, urllib.request as r\n"
            f"answer = r.urlopen('http://127.0.0.1:8080/v1/chat/completions', {body.encode()!r})\n"
            "print(json.load(answer)['choices'][0]['message']['content'])\n"
        )
        shelf.write("desk", "/root/ask.py", script.encode())
        return shelf.sh("desk", "python3 /root/ask.py")

    shelf.sh("desk", "systemctl start mdiq-starter", timeout=UP_S)
    # It is ready when it says so.
    served = status()
    assert served["is_serving"], served
    shown = shelf.sh("desk", "systemctl show -p StatusText mdiq-starter")
    assert shown.startswith("StatusText=serves on desk"), shown
    first = answer()
    nodes = [node["name"] for node in served["nodes"]]
    assert "pi1" in nodes, served
    shelf.off("pi1")
    shelf.up("pi1", *DEVICES["pi1"])
    until_serves(served["rings_formed"] + 1)
    assert answer() == first
    layers = ",".join(str(node["layers"][1] - node["layers"][0]) for node in served["nodes"])
    wires = ",".join(hop["wire"] for hop in served["hops"])
    options = ["--layers", layers, "--wire", wires, "--weights", "int8", "--threads", "1"]
    local = must(run(sys.executable, "-m", "mdiq", "run", *RUN, *options, timeout=UP_S))
    assert first.strip() == json.loads(local.splitlines()[0])["text"].strip()
    journal = shelf.sh("desk", "journalctl --no-pager -o cat -u mdiq-starter")
    assert "Traceback" not in journal and QUESTION not in journal
    shelf.sh("desk", "systemctl stop mdiq-starter")


def test_a_model_too_large_for_a_device_runs_over_three(guide: Guide, shelf: Shelf) -> None:
    """In f32 the model alone takes 538 MB, and mdiq more than 160 MB beside it."""
    file = guide.folder / "topology.yaml"
    file.write_text(file.read_text().replace("weights: int8", "weights: plain"))
    out = _provision_topology(guide, shelf)
    assert len(re.findall(r"^\w+ +push +1 of", out, re.MULTILINE)) == 3, "the topology alone is sent"
    tokens, summary = _ask(shelf)
    assert tokens == _local_answer(summary, "plain")
    assert all(node["rss_bytes"] < 600 << 20 for node in summary["nodes"][1:])
    assert sum(node["weight_bytes"] for node in summary["nodes"]) > 500 << 20
    shelf.write("pi2", "/root/model.gguf", guide.model.read_bytes())
    # Without room for it the system turns memory over and over, where it does not kill the process: it gets its time.
    command = f"timeout 150 /opt/mdiq/current/bin/mdiq run --in-process --model /root/model.gguf '{QUESTION}'"
    alone = shelf.try_sh("pi2", command)
    assert alone.returncode != 0 and alone.stdout == "", alone


def test_what_passes_between_devices_cannot_be_read_unless_the_ring_is_insecure(
    guide: Guide, shelf: Shelf, tmp_path: Path
) -> None:
    def capture(name: str) -> bytes:
        with Capture(shelf.tool, tmp_path / name):
            _ask(shelf)
        return b"".join(payloads(tmp_path / name, DATA_PORT))

    secure = capture("secure")
    file = guide.folder / "topology.yaml"
    file.write_text(file.read_text().replace("insecure: false", "insecure: true"))
    _provision_topology(guide, shelf)
    open_, again = capture("open"), capture("again")
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
