"""Brings mdiq to every device of a topology over ssh, from the operator's machine.

    python nodes/provision.py topology.yaml --wheels wheels --canary pi1
    python nodes/provision.py topology.yaml --rollback

Five stages, each for all devices at once: reach, push, prepare, switch, check. When a stage fails on one device, no
device enters the next, so nothing that runs has changed until everything lies ready everywhere. A second run sends only
what changed. What is done on a device is done by install.sh; this program only carries and asks.

A device's private key goes to that device alone, through ssh's standard input: never in an argument, a log, or a file
of any other place.
"""

import argparse
import asyncio
import io
import os
import shlex
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mdiq.cli.signals import LOADS_PROGRAM, READS

if not __package__:  # run as a file: its neighbours lie in nodes/
    sys.path.append(str(Path(__file__).resolve().parent.parent))
from nodes.cargo import Kind, check_keys, files_to_push, read_devices, sha256, wheels_for
from nodes.ssh import Device, ProvisionError, Ssh

PUSHED = "/opt/mdiq/push"
"""Where wheels and scripts lie on a device; of root."""
SHORT_STAGE_S = 120.0
START_S = 90.0
"""Within this a unit has loaded its program; Python and torch take a while on a small device."""
SETTLE_S = 3.0
READY_WORDS = ("serves ", "stands by")  # how the status of a unit begins whose part of the ring is up
POLL_S = 1.0
MAX_ERROR_LINES = 12
_CHUNK_BYTES = 256 * 1024


@dataclass(slots=True)
class Plan:
    """What the run is to do, and what it has learnt."""

    topology: Path
    wheels: Path
    ssh: Ssh
    ready_within_s: float
    prepare_within_s: float
    is_dry: bool
    kinds: dict[str, Kind] = field(default_factory=dict)


def say(device: str, stage: str, text: str) -> None:
    """Show a line of progress."""
    sys.stdout.write(f"{device:<12} {stage:<8} {text}\n")
    sys.stdout.flush()


# --- the stages -----------------------------------------------------------------------------------------------------


async def reach(plan: Plan, device: Device) -> str:
    """See that the device answers and can run mdiq; learn its kind."""
    answer = await plan.ssh.run(
        device,
        "uname -m && python3 -I -c 'import sys; print(*sys.version_info[:2], sep=\".\")' && "
        "systemctl --version | head -n 1 && tar --version >/dev/null && "
        "python3 -I -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || "
        '{ echo "needs systemd, tar and Python 3.11 to 3.14 with venv: apt install python3-venv; it has" '
        '"$(python3 --version 2>&1)" >&2; exit 1; }',
        timeout_s=SHORT_STAGE_S,
    )
    machine, python, systemd = answer.splitlines()[:3]
    plan.kinds[device.name] = kind = Kind(machine, python)
    wheels_for(plan.wheels, kind)
    return f"{device.address}: {machine}, Python {python}, {' '.join(systemd.split()[:2])}"


async def push(plan: Plan, device: Device) -> str:
    """Send the files that the device does not have yet, by digest, and remove wheels that are no longer wanted."""
    files = files_to_push(plan.topology, plan.wheels, plan.kinds[device.name])
    wanted = {name: await asyncio.to_thread(sha256, path) for name, path in files.items()}
    there = await _digests_there(plan, device)
    missing = [name for name in files if there.get(name) != wanted[name]]
    total = sum(files[name].stat().st_size for name in missing)
    if plan.is_dry:
        return f"would send {len(missing)} of {len(files)} files, {_size(total)}"
    if missing:
        await plan.ssh.run(
            device,
            # A file that is cut off has another digest: the next run sends it again.
            f"umask 022 && mkdir -p {PUSHED} && tar -x -C {PUSHED} --no-same-owner",
            send=_archive(device, {name: files[name] for name in missing}, total),
            timeout_s=plan.prepare_within_s,
        )
    stale = [name for name in there if name not in files]
    if stale:
        await plan.ssh.run(
            device, f"cd {PUSHED} && rm -f -- {' '.join(map(shlex.quote, stale))}", timeout_s=SHORT_STAGE_S
        )
    if missing and await _digests_there(plan, device) != wanted:
        raise ProvisionError("what arrived is not what was sent; run this again, and check the device's disk")
    return f"{len(missing)} of {len(files)} files sent, {_size(total)}"


async def _digests_there(plan: Plan, device: Device) -> dict[str, str]:
    lines = await plan.ssh.run(
        device,
        f"cd {PUSHED} 2>/dev/null || exit 0; find . -type f -exec sha256sum {{}} +",
        timeout_s=plan.prepare_within_s,
    )
    return {line[66:].removeprefix("./"): line[:64] for line in lines.splitlines()}


async def _archive(device: Device, files: Mapping[str, Path], total: int) -> AsyncIterator[bytes]:
    """Yield a tar archive of the files, and tell every tenth of it."""
    sent, told = 0, 0
    for name, path in files.items():
        info = tarfile.TarInfo(name)
        info.size = path.stat().st_size
        info.mode = 0o755 if os.access(path, os.X_OK) else 0o644
        info.mtime = int(path.stat().st_mtime)
        yield info.tobuf(tarfile.PAX_FORMAT)
        with path.open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, _CHUNK_BYTES):
                sent += len(chunk)
                yield chunk
                if total > 10 * _CHUNK_BYTES and sent * 10 // total > told:
                    told = sent * 10 // total
                    say(device.name, "push", f"{told * 10} % of {_size(total)}")
        yield bytes(-info.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


def _last_line(out: str) -> str:
    """Return what install.sh has done: its last line."""
    return out.strip().splitlines()[-1].removeprefix("install.sh: ")


def _install(device: Device, *arguments: str) -> str:
    role = "starter" if device.role == "starter" else "node"
    options = ["--role", role, "--name", device.name, "--wheels", f"{PUSHED}/wheels", *arguments]
    return f"{PUSHED}/nodes/install.sh {shlex.join(options)}"


async def prepare(plan: Plan, device: Device) -> str:
    """Install the release beside the one that runs."""
    out = await plan.ssh.run(device, _install(device, "--prepare"), timeout_s=plan.prepare_within_s)
    return _last_line(out)


async def switch(plan: Plan, device: Device) -> str:
    """Make the release the one that runs, with topology and key, and restart the unit if anything changed."""
    arguments = ["--topology", f"{PUSHED}/topology.yaml"]
    if device.key is None:
        send = None
    else:
        arguments += ["--key", "-"]
        send = _once(device.key.read_bytes())
    out = await plan.ssh.run(device, _install(device, *arguments), send=send, timeout_s=SHORT_STAGE_S)
    return _last_line(out)


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def check(plan: Plan, device: Device) -> str:
    """See that the unit comes up and stays: it serves, or waits for the rest of its ring, and is not restarted."""
    started_s, pid, status_since_s = time.monotonic(), "0", None
    while True:
        now = time.monotonic()
        state = await _unit_state(plan, device)
        is_over = state.get("ActiveState") == "failed" or state.get("SubState") == "auto-restart"
        if state.get("ActiveState") != "deactivating" and not is_over:
            is_over = pid not in ("0", state.get("MainPID"))
            pid = state.get("MainPID", "0")
        status = state.get("StatusText", "")
        if state.get("ActiveState") == "active" or (status and not status.startswith((READS, LOADS_PROGRAM))):
            status_since_s = now if status_since_s is None else status_since_s
        if is_over or now - started_s > START_S:
            at = f"{state.get('ActiveState')}, {state.get('Result')}{', ' if status else ''}{status}"
            raise ProvisionError(
                f"{_unit(device)} does not come up ({at}); its journal ends:\n{await _journal(plan, device)}\n"
                "  --rollback brings the release before back"
            )
        if pid != "0" and status_since_s is not None and now - status_since_s > SETTLE_S:
            break
        await asyncio.sleep(POLL_S)
    version = await plan.ssh.run(device, "/opt/mdiq/current/bin/mdiq --version", timeout_s=SHORT_STAGE_S)
    waits = "" if state["ActiveState"] == "active" or plan.ready_within_s else "; --ready-within S waits for the ring"
    return f"{version.strip()}, {state['ActiveState']}: {status}{waits}"


def _unit(device: Device) -> str:
    return "mdiq-starter" if device.role == "starter" else "mdiq-node"


async def _unit_state(plan: Plan, device: Device) -> dict[str, str]:
    names = "ActiveState,SubState,Result,MainPID,StatusText"
    lines = await plan.ssh.run(device, f"systemctl show --property={names} {_unit(device)}", timeout_s=SHORT_STAGE_S)
    return dict(line.split("=", 1) for line in lines.splitlines() if "=" in line)


async def _journal(plan: Plan, device: Device) -> str:
    lines = await plan.ssh.run(
        device, f"journalctl --no-pager -o cat -n {MAX_ERROR_LINES} -u {_unit(device)}", timeout_s=SHORT_STAGE_S
    )
    return "\n".join(f"  {line}" for line in lines.splitlines())


async def rollback(plan: Plan, device: Device) -> str:
    """Go back to the release before."""
    out = await plan.ssh.run(device, "/opt/mdiq/current/nodes/install.sh --rollback", timeout_s=SHORT_STAGE_S)
    return _last_line(out)


async def wait_until_ready(plan: Plan, device: Device) -> str:
    """Wait until the unit says that it serves, which needs the whole ring, or that it stands by."""
    deadline = time.monotonic() + plan.ready_within_s
    told = ""
    while True:
        state = await _unit_state(plan, device)
        status = state.get("StatusText", "")
        # A unit that was ready once stays active while its ring is formed anew.
        if state.get("ActiveState") == "active" and status.startswith(READY_WORDS):
            return status
        if state.get("ActiveState") == "failed" or time.monotonic() > deadline:
            raise ProvisionError(
                f"{_unit(device)} is {state.get('ActiveState')} ({status or 'no status'}); its journal ends:\n"
                + await _journal(plan, device)
            )
        if status != told:
            told = status
            say(device.name, "ready", status)
        await asyncio.sleep(POLL_S)


Stage = Callable[[Plan, Device], Awaitable[str]]
_INSTEAD = {
    "prepare": "would install the release beside the one that runs",
    "switch": "would install topology, key and units, and restart what changed",
    "check": "would watch the unit",
    "rollback": "would go back to the release before",
}
"""What --dry-run says of stages that change something. The others look at what is there."""


async def run_stage(name: str, stage: Stage, plan: Plan, devices: Sequence[Device]) -> None:
    """Run a stage on all devices at once.

    Raises:
        ProvisionError: it failed on at least one; each has its line by then, and the others were let finish.
    """

    async def on(device: Device) -> bool:
        try:
            is_left_out = plan.is_dry and name in _INSTEAD
            say(device.name, name, _INSTEAD[name] if is_left_out else await stage(plan, device))
        except ProvisionError as error:
            say(device.name, name, f"FAILED: {error}")
            return False
        return True

    results = await asyncio.gather(*(on(device) for device in devices))
    failed = [device.name for device, is_good in zip(devices, results, strict=True) if not is_good]
    if failed:
        raise ProvisionError(f"stopped at {name}: it failed on {', '.join(failed)}; mend that and run this again")


async def provision(plan: Plan, devices: Sequence[Device], canary: str | None, *, is_rollback: bool) -> None:
    """Take all devices through all stages, the canary before the others.

    Raises:
        ProvisionError: a stage failed; the ones after it were not begun.
    """
    first = [device for device in devices if device.name == canary]
    groups = [first, [device for device in devices if device.name != canary]] if first else [list(devices)]
    stages: dict[str, Stage] = {"reach": reach, "push": push, "prepare": prepare, "switch": switch, "check": check}
    if is_rollback:
        stages = {"rollback": rollback, "check": check}
    try:
        for group in filter(None, groups):
            for name, stage in stages.items():
                await run_stage(name, stage, plan, group)
        if plan.ready_within_s and not plan.is_dry:
            await run_stage("ready", wait_until_ready, plan, devices)
    finally:
        await asyncio.gather(*(plan.ssh.hang_up(device) for device in devices))


# --- command line ---------------------------------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="provision.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("topology", type=Path, help="the topology's YAML")
    parser.add_argument("--wheels", type=Path, default=Path("wheels"), help="folder of wheels (default: wheels)")
    parser.add_argument("--canary", metavar="NAME", help="take this device through all stages before the others")
    parser.add_argument("--only", metavar="NAME", action="append", help="this device alone; may be repeated")
    parser.add_argument("--rollback", action="store_true", help="go back to the release before")
    parser.add_argument(
        "--ready-within", metavar="S", type=float, default=0.0, help="then wait for the ring (default: 0, do not)"
    )
    parser.add_argument(
        "--prepare-within", metavar="S", type=float, default=1800.0, help="for pushing, for installing (default: 1800)"
    )
    parser.add_argument("--dry-run", action="store_true", help="reach and compare, change nothing")
    parser.add_argument("--user", default="root", help="login; another than root needs sudo without a password")
    parser.add_argument("--port", type=int, default=22)
    parser.add_argument("--identity", type=Path, help="private ssh key")
    parser.add_argument("--known-hosts", type=Path, help="file of host keys (default: ssh's own)")
    parser.add_argument("--accept-new-host-keys", action="store_true", help="trust a host key that is seen first")
    return parser.parse_args(argv)


def _chosen(devices: Sequence[Device], only: Sequence[str] | None, canary: str | None) -> list[Device]:
    names = {device.name for device in devices}
    for name in [*(only or []), *([canary] if canary else [])]:
        if name not in names:
            raise ProvisionError(f"no node {name} in the topology; it has {', '.join(sorted(names))}", code=2)
    if only and canary and canary not in only:
        raise ProvisionError(f"--canary {canary} is not among --only", code=2)
    return [device for device in devices if not only or device.name in only]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = _arguments(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a device's words may have letters that this terminal lacks
    # Short: the path of a Unix socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="mdiq-") as control:
        try:
            devices = _chosen(read_devices(arguments.topology), arguments.only, arguments.canary)
            if not arguments.rollback:
                check_keys(devices)
            ssh = Ssh(
                arguments.user,
                arguments.port,
                arguments.identity,
                arguments.known_hosts,
                arguments.accept_new_host_keys,
                Path(control),
            )
            plan = Plan(
                arguments.topology,
                arguments.wheels,
                ssh,
                arguments.ready_within,
                arguments.prepare_within,
                arguments.dry_run,
            )
            asyncio.run(provision(plan, devices, arguments.canary, is_rollback=arguments.rollback))
        except ProvisionError as error:
            sys.stderr.write(f"provision.py: {error}\n")
            return error.code
        except KeyboardInterrupt:
            sys.stderr.write("provision.py: interrupted; run it again to go on\n")
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
