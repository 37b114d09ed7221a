"""Real processes: a hop carries nothing while its nodes live and TCP looks well, and a spare goes on with the text.

The hop from pi1 to pi2 leads through a relay that is stopped (SIGSTOP): the kernel takes what pi1 sends, and answers,
and nothing of it arrives. So it is in front of a switch that hangs, or a router that has forgotten a connection.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.answers import Asked, compare
from tests.faults.conftest import SMALL, model_that_is_here
from tests.faults.lab import STARTER, Lab, serving_of
from tests.faults.points import SAMPLES

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

ANSWERS_S = 240.0
STATE = "nothing goes from pi1 to pi2"


class _RelayedLab(Lab):
    """A ring of two workers and a spare. All but pi2 have the relay's port in their topology for it."""

    relay: "subprocess.Popen[bytes]"

    def close(self) -> None:
        super().close()
        self.relay.kill()
        self.relay.communicate()

    def _write_topology(self) -> None:
        super()._write_topology()
        topology = yaml.safe_load(self.file.read_text())
        (node,) = [node for node in topology["nodes"] if node["name"] == "pi2"]
        self._own_file.write_text(self.file.read_text())
        self.relay = relay = subprocess.Popen(
            [sys.executable, "-P", "-m", "mdiq.testbed.relay", "delay=0ms"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert relay.stdin is not None and relay.stdout is not None  # PIPE was asked for
        relay.stdin.write(json.dumps([f"tcp://127.0.0.1:{node['data_port']}"]).encode() + b"\n")
        relay.stdin.flush()
        (endpoint,) = json.loads(relay.stdout.readline())
        node["data_port"] = int(endpoint.rpartition(":")[2])
        self.file.write_text(yaml.safe_dump(topology, sort_keys=False))

    def _spawn(self, name: str) -> "subprocess.Popen[bytes]":
        file = self.file
        self.file = self._own_file if name == "pi2" else file
        try:
            return super()._spawn(name)
        finally:
            self.file = file

    @property
    def _own_file(self) -> Path:
        return self.folder / "pi2.yaml"


def _until(holds: Callable[[], Any], what: str) -> None:
    end_s = time.monotonic() + ANSWERS_S
    while not holds():
        assert time.monotonic() < end_s, f"{what}: not within {ANSWERS_S:g} s"
        time.sleep(0.05)


def test_a_hop_that_carries_nothing_is_found_and_a_spare_goes_on_with_the_same_text(tmp_path: Path) -> None:
    lab = _RelayedLab(tmp_path, model_that_is_here(SMALL), num_spares=1, keeps_up=False, ring={"prefix_reuse": False})
    with lab:
        assert serving_of(lab.until_whole()) == ["pi1", "pi2"]
        calm = Asked(lab.api, SAMPLES[2:5]).answers(ANSWERS_S)
        asked = Asked(lab.api, SAMPLES[2:5])
        asked.until_event(0, 2)
        lab.relay.send_signal(signal.SIGSTOP)
        states: list[str] = []
        _until(lambda: lab.said(STARTER, 0, "hop_is_dead"), "it is found")
        _until(lambda: asked.is_over() or states.append(lab.status().get("state", "")), "the answers")
        found = asked.answers(ANSWERS_S)
        assert [compare(first, second).kind for first, second in zip(calm, found, strict=True)] == ["same"] * 3
        said = lab.said(STARTER, 0, "hop_is_dead")
        assert [(line["sender"], line["receiver"]) for line in said[:2]] == [("pi1", "pi2")] * 2
        anew, taken_over = lab.said(STARTER, 0, "ring_goes_on")[:2]
        assert "layers" not in anew and "pi3" in taken_over["layers"] and "pi2" not in taken_over["layers"]
        assert any(STATE in state for state in states), states
        assert not lab.tracebacks()
