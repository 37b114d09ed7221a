"""nodes/provision.py against a stand-in for ssh that notes what it was given. Booted devices see the real one."""

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from nodes import cargo, provision
from nodes.ssh import Device, ProvisionError, Ssh

KEYS = {"pi1": "the key of pi1, which is its own secret!", "pi2": "the key of pi2, which is its own secret!"}
PUBLIC = {"pi1": "+{#T)k[lSSo7Gq:lKB5Pn8v-(4UewXD.#FElM--3", "pi2": "/fSgr&AVHUsv&0CaeX=<9E?HS6/a}ZaMxngJPY}."}
FAKE_SSH = """#!{python}
# Notes arguments and standard input, and answers as a device would.
import json, os, sys
remote, address = sys.argv[-1], sys.argv[-2]
if "-O" in sys.argv:
    sys.exit(0)
reads = "tar -x" in remote or "--key -" in remote
given = sys.stdin.buffer.read() if reads else b""
with open({log!r}, "a") as log:
    log.write(json.dumps([sys.argv[1:], given.decode("latin-1")]) + "\\n")
broken = json.load(open({broken!r}))
for stage, text, code in broken.get(address, []):
    if stage in remote:
        sys.stderr.write(text)
        sys.exit(code)
if "uname" in remote:
    print("x86_64\\n3.11\\nsystemd 252 (252.1)")
elif "sha256sum" in remote:
    state = {state!r} + address
    print(open(state).read() if os.path.exists(state) else "", end="")
elif "tar -x" in remote:
    import hashlib, io, tarfile
    with tarfile.open(fileobj=io.BytesIO(given)) as archive, open({state!r} + address, "w") as state:
        for member in archive:
            digest = hashlib.sha256(archive.extractfile(member).read()).hexdigest()
            print(f"{{digest}}  ./{{member.name}}", file=state)
elif "systemctl show" in remote:
    active = "active" if address == "pi1.lan" or "ALL_ACTIVE" in os.environ else "activating"
    status = os.environ.get("STATUS_OF_" + address[:3], "waiting for pi2")
    print(f"ActiveState={{active}}\\nSubState=start\\nMainPID=7\\nStatusText={{status}}\\nResult=success")
elif "--version" in remote:
    print("mdiq 1.2.3")
else:
    print("install.sh: done")
"""


class World:
    """The operator's folder, and a PATH on which ssh is the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self._broken = folder / "broken"
        self.break_at({})
        (folder / "bin").mkdir()
        ssh = folder / "bin" / "ssh"
        ssh.write_text(
            FAKE_SSH.format(
                python=sys.executable, log=str(self.log), broken=str(self._broken), state=str(folder / "state-")
            )
        )
        ssh.chmod(0o755)
        (folder / "wheels").mkdir()
        for name in ("mdiq-1.2.3-py3-none-any", "torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64"):
            (folder / "wheels" / f"{name}.whl").write_bytes(name.encode() * 100)
        (folder / "wheels" / "torch-2.13.0-cp311-cp311-manylinux_2_28_aarch64.whl").write_bytes(b"for a Pi")
        (folder / "keys").mkdir()
        for name, key in KEYS.items():
            (folder / "keys" / f"{name}.key").write_text(key)
            (folder / "keys" / f"{name}.key").chmod(0o600)
        self.topology = folder / "topology.yaml"
        self.write_topology()

    def write_topology(self, **more: object) -> None:
        nodes = [{"name": name, "address": f"{name}.lan", "public_key": public} for name, public in PUBLIC.items()]
        nodes[0]["role"] = "starter"
        document = {"version": 1, "model": {"path": "/var/lib/mdiq/model.gguf"}, "nodes": nodes, **more}
        self.topology.write_text(yaml.safe_dump(document))

    def break_at(self, broken: dict[str, list[tuple[str, str, int]]]) -> None:
        """Let commands that hold a text fail on a device, with what they then say and their exit code."""
        self._broken.write_text(json.dumps(broken))

    def run(self, *arguments: str) -> int:
        return provision.main([str(self.topology), "--wheels", str(self.folder / "wheels"), *arguments])

    @property
    def calls(self) -> list[tuple[list[str], str]]:
        """Arguments and standard input of each ssh so far."""
        return [tuple(json.loads(line)) for line in self.log.read_text().splitlines()]

    def remote(self, address: str) -> list[str]:
        return [arguments[-1] for arguments, _ in self.calls if arguments[-2] == address]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(provision, "SETTLE_S", 0.0)
    monkeypatch.setattr(provision, "POLL_S", 0.01)
    return world


def test_every_device_passes_all_stages(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.run() == 0
    out = capsys.readouterr().out
    for name in KEYS:
        for stage in ("reach", "push", "prepare", "switch", "check"):
            assert any(line.split()[:2] == [name, stage] for line in out.splitlines())
    assert "mdiq 1.2.3, activating: waiting for pi2" in out


def test_a_key_goes_to_its_device_alone_and_in_no_argument(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.run() == 0
    captured = capsys.readouterr()
    for name, key in KEYS.items():
        receivers = {arguments[-2] for arguments, stdin in world.calls if key in stdin}
        assert receivers == {f"{name}.lan"}
        assert key not in captured.out + captured.err
        assert not any(key in argument for arguments, _ in world.calls for argument in arguments)


def test_an_insecure_ring_gets_no_keys(world: World) -> None:
    world.write_topology(security={"insecure": True})
    assert world.run() == 0
    assert not any("--key" in remote for remote in world.remote("pi1.lan"))


def test_a_wheel_for_another_machine_stays_here(world: World) -> None:
    assert world.run() == 0
    (archive,) = [stdin for arguments, stdin in world.calls if "tar -x" in arguments[-1] and "pi1.lan" in arguments]
    with tarfile.open(fileobj=io.BytesIO(archive.encode("latin-1"))) as tar:
        names = tar.getnames()
    assert "wheels/torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl" in names
    assert not any("aarch64" in name for name in names)
    assert {"topology.yaml", "nodes/install.sh", "nodes/systemd/mdiq-node.service"} <= set(names)


def test_a_second_run_sends_no_file(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.run() == 0
    num_archives = sum("tar -x" in remote for remote in world.remote("pi1.lan"))
    capsys.readouterr()
    assert world.run() == 0
    assert sum("tar -x" in remote for remote in world.remote("pi1.lan")) == num_archives == 1
    assert "0 of" in capsys.readouterr().out


def test_a_file_that_is_no_longer_wanted_is_removed_there(world: World) -> None:
    (world.folder / "state-pi1.lan").write_text("0" * 64 + "  ./wheels/mdiq-1.0.0-py3-none-any.whl\n")
    assert world.run("--only", "pi1") == 0
    assert any("rm -f -- wheels/mdiq-1.0.0-py3-none-any.whl" in remote for remote in world.remote("pi1.lan"))


def test_a_stage_that_fails_on_one_device_is_the_last_for_all(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.break_at({"pi2.lan": [("--prepare", "install.sh: /opt/mdiq: 12 MB are free\n", 1)]})
    assert world.run() == 1
    captured = capsys.readouterr()
    assert "FAILED: install.sh: /opt/mdiq: 12 MB are free" in captured.out
    assert captured.err == "provision.py: stopped at prepare: it failed on pi2; mend that and run this again\n"
    assert not any("--topology" in remote for name in KEYS for remote in world.remote(f"{name}.lan"))


def test_a_canary_that_fails_keeps_the_others_out_of_it(world: World) -> None:
    world.break_at({"pi2.lan": [("--topology", "install.sh: no\n", 1)]})
    assert world.run("--canary", "pi2") == 1
    assert world.remote("pi1.lan") == []


def test_a_dry_run_changes_nothing(world: World) -> None:
    assert world.run("--dry-run") == 0
    for name in KEYS:
        assert not any("install.sh" in remote or "tar -x" in remote for remote in world.remote(f"{name}.lan"))


def test_a_rollback_asks_each_device_for_the_release_before(world: World) -> None:
    assert world.run("--rollback", "--only", "pi2") == 0
    assert world.remote("pi2.lan")[0] == "/opt/mdiq/current/nodes/install.sh --rollback"
    assert world.remote("pi1.lan") == []


@pytest.mark.parametrize(
    ("complaint", "advice"),
    [
        ("ssh: connect to host pi1.lan port 22: No route to host", "is it on"),
        ("ssh: connect to host pi1.lan port 22: Connection timed out", "is it on"),
        ("ssh: connect to host pi1.lan port 22: Connection refused", "openssh-server"),
        ("ssh: Could not resolve hostname pi1.lan: Name or service not known", "correct `address`"),
        ("root@pi1.lan: Permission denied (publickey).", "ssh-copy-id root@pi1.lan"),
        ("Host key verification failed.", "compare the fingerprint"),
        (
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
            "ssh-keygen -R pi1.lan",
        ),
        ("kex_exchange_identification: Connection closed", "kex_exchange_identification"),
    ],
)
def test_a_device_that_does_not_answer_is_named_with_advice(
    complaint: str, advice: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.break_at({"pi1.lan": [("uname", complaint, 255)]})
    assert world.run() == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert line.split()[:2] == ["pi1", "reach"]
    assert advice in line


def test_sudo_that_asks_for_a_password_is_explained(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.break_at({"pi1.lan": [("uname", "sudo: a password is required\n", 1)]})
    assert world.run("--user", "op") == 1
    assert "use sudo without one" in capsys.readouterr().out
    assert all(remote.startswith("sudo -n sh -c ") for remote in world.remote("pi1.lan"))


def test_a_unit_that_fails_shows_the_end_of_its_journal(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    ssh = world.folder / "bin" / "ssh"
    ssh.write_text(ssh.read_text().replace('"activating"', '"failed"'))
    assert world.run() == 1
    out = capsys.readouterr().out
    assert "mdiq-node does not come up (failed, success, waiting for pi2)" in out
    assert "--rollback" in out


@pytest.mark.parametrize("status", ["reads topology.yaml", "loads its program"])
def test_a_unit_that_is_still_at_its_beginning_has_not_come_up(
    status: str, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provision, "START_S", 3.0)
    monkeypatch.setenv("STATUS_OF_pi2", status)
    assert world.run() == 1
    out = capsys.readouterr().out
    assert f"mdiq-node does not come up (activating, success, {status})" in out
    assert "pi1          check    mdiq 1.2.3, active: waiting for pi2" in out


def test_host_keys_are_checked_unless_new_ones_are_asked_for(tmp_path: Path) -> None:
    device = Device("pi1", "pi1.lan", "worker", None)
    strict = Ssh("root", 22, None, None, False, tmp_path).command(device, "true")
    trusting = Ssh("root", 2222, tmp_path / "id", tmp_path / "known", True, tmp_path).command(device, "true")
    assert "StrictHostKeyChecking=yes" in strict
    assert "StrictHostKeyChecking=accept-new" in trusting
    assert f"UserKnownHostsFile={tmp_path / 'known'}" in trusting
    assert {"BatchMode=yes"} <= set(strict) & set(trusting)
    assert ["-p", "2222"] == trusting[trusting.index("-p") :][:2]


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ("nodes: [", "topology.yaml:1"),
        ("- a list", "a topology is made of keys"),
        ("nodes: [{name: pi1}]", "address"),
        ("nodes: [{name: 'pi1; reboot', address: a}]", "is not a node's name"),
        ("nodes: [{name: pi1, address: -oProxyCommand=reboot}]", "oProxyCommand=reboot"),
    ],
)
def test_a_file_that_is_no_topology_is_refused_with_its_line(document: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "topology.yaml"
    file.write_text(document)
    with pytest.raises(ProvisionError, match=complaint) as caught:
        cargo.read_devices(file)
    assert caught.value.code == 2


def test_a_missing_topology_and_an_unknown_name_are_bad_usage(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert provision.main([str(world.folder / "none.yaml")]) == 2
    assert world.run("--canary", "pi9") == 2
    assert world.run("--canary", "pi1", "--only", "pi2") == 2
    err = capsys.readouterr().err
    assert "no such file; `mdiq init` writes one" in err
    assert "no node pi9 in the topology; it has pi1, pi2" in err
    assert "not among --only" in err


def test_a_key_that_is_missing_or_readable_by_others_stops_the_run_before_it_begins(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.folder / "keys" / "pi1.key").chmod(0o640)
    assert world.run() == 2
    assert "chmod 600" in capsys.readouterr().err
    (world.folder / "keys" / "pi1.key").unlink()
    assert world.run() == 2
    assert "mdiq keys" in capsys.readouterr().err
    assert not world.log.exists()


def test_wheels_that_lack_torch_for_a_machine_are_refused(world: World) -> None:
    with pytest.raises(ProvisionError, match="no wheel of torch for riscv64"):
        cargo.wheels_for(world.folder / "wheels", cargo.Kind("riscv64", "3.11"))


def test_wheels_for_another_python_are_refused_with_the_command_that_fetches_its_own(world: World) -> None:
    with pytest.raises(ProvisionError, match="run: python nodes/wheels.py --machine aarch64 --python 3.13"):
        cargo.wheels_for(world.folder / "wheels", cargo.Kind("aarch64", "3.13"))


@pytest.mark.parametrize(
    ("wheel", "fits"),
    [
        ("numpy-2.4.6-cp311-cp311-manylinux_2_27_aarch64.manylinux_2_28_aarch64", True),
        ("numpy-2.4.6-cp313-cp313-manylinux_2_27_aarch64.manylinux_2_28_aarch64", False),
        ("numpy-2.4.6-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64", False),
        ("tokenizers-0.23.3-cp310-abi3-manylinux_2_17_aarch64.manylinux2014_aarch64", True),
        ("jinja2-3.1.6-py3-none-any", True),
    ],
)
def test_a_device_takes_wheels_of_its_kind(wheel: str, fits: bool) -> None:
    assert cargo.Kind("aarch64", "3.11").takes(Path(f"{wheel}.whl")) == fits


async def test_a_command_that_hangs_is_ended_at_its_limit(world: World) -> None:
    (world.folder / "bin" / "ssh").write_text("#!/bin/sh\nexec sleep 600\n")
    ssh = Ssh("root", 22, None, None, False, world.folder)
    with pytest.raises(ProvisionError, match="took longer than 0 s"):
        await ssh.run(Device("pi1", "pi1.lan", "worker", None), "true", timeout_s=0.2)


def test_ready_is_a_unit_that_serves_or_stands_by(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_ACTIVE", "1")
    for name, status in zip(KEYS, ("serves layers 5-18", "stands by: it is a spare"), strict=True):
        monkeypatch.setenv(f"STATUS_OF_{name[:3]}", status)
    assert world.run("--ready-within", "5") == 0
    ready = [line.split(maxsplit=2)[::2] for line in capsys.readouterr().out.splitlines() if " ready " in line]
    assert sorted(ready) == [["pi1", "serves layers 5-18"], ["pi2", "stands by: it is a spare"]]


@pytest.mark.parametrize(
    "status", ["waits for the starter", "loading layers 5-18: 20 %", "degraded: waits for pi2", ""]
)
def test_a_unit_that_was_ready_once_is_not_while_its_ring_is_formed_anew(
    status: str, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd calls it active from the first time on."""
    monkeypatch.setenv("ALL_ACTIVE", "1")
    for name in KEYS:
        monkeypatch.setenv(f"STATUS_OF_{name[:3]}", status)
    assert world.run("--ready-within", "0.05") == 1
    assert f"is active ({status or 'no status'})" in capsys.readouterr().out
