"""What provision.py reads and carries: devices and keys of the topology, wheels for each kind of device, scripts."""

import hashlib
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mdiq.config.load import load_topology
from mdiq.errors import TopologyError
from nodes.ssh import Device, ProvisionError

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Kind:
    """What decides which wheels a device can use: its machine ("x86_64", "aarch64") and its Python ("3.11")."""

    machine: str
    python: str

    def takes(self, wheel: Path) -> bool:
        """Tell whether the wheel is for such a device."""
        _, abi, place = wheel.stem.rsplit("-", 2)
        # cp311 is for that Python alone; abi3 and none are for later ones too.
        is_for_python = not abi.startswith("cp") or abi == f"cp{self.python.replace('.', '')}"
        return is_for_python and place.endswith(("any", f"_{self.machine}"))


def read_devices(path: Path) -> list[Device]:
    """Return the devices of a topology file: of it all only what provisioning needs.

    Raises:
        ProvisionError: the file is missing or has errors; the message lists all of them.
    """
    try:
        loaded = load_topology(path)
    except TopologyError as error:
        raise ProvisionError(str(error), code=2) from None
    topology, keys = loaded.topology, loaded.path(loaded.topology.security.keys)
    has_keys = not topology.is_plain_text
    return [
        Device(node.name, node.address, node.role, keys / f"{node.name}.key" if has_keys else None)
        for node in topology.nodes
    ]


def check_keys(devices: Iterable[Device]) -> None:
    """See that every device's private key is there and that only its owner can read it.

    Raises:
        ProvisionError: one is not.
    """
    for device in devices:
        if device.key is None:
            continue
        try:
            mode = device.key.stat().st_mode
        except OSError:
            raise ProvisionError(f"{device.key}: missing; make it with: mdiq keys", code=2) from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ProvisionError(f"{device.key}: others may read it; run: chmod 600 {device.key}", code=2)


def wheels_for(folder: Path, kind: Kind) -> list[Path]:
    """Return the wheels of a folder that such a device can use.

    Raises:
        ProvisionError: there is no wheel of mdiq, or none of torch for it.
    """
    fitting = [wheel for wheel in sorted(folder.glob("*.whl")) if kind.takes(wheel)]
    for needed in ("mdiq", "torch"):
        if not any(wheel.name.startswith(f"{needed}-") for wheel in fitting):
            raise ProvisionError(
                f"{folder}: no wheel of {needed} for {kind.machine} with Python {kind.python}; run: "
                f"python nodes/wheels.py --machine {kind.machine} --python {kind.python} --wheels {folder}",
                code=2,
            )
    return fitting


def sha256(path: Path) -> str:
    """Return a file's SHA-256, as sha256sum writes it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_to_push(topology: Path, wheels: Path, kind: Kind) -> dict[str, Path]:
    """Return the files that a device of that kind needs, but for its key: their names on the device -> here."""
    files = {f"wheels/{wheel.name}": wheel for wheel in wheels_for(wheels, kind)}
    for script in [HERE / "install.sh", HERE / "README.md", *sorted((HERE / "systemd").iterdir())]:
        files[f"nodes/{script.relative_to(HERE)}"] = script
    files["topology.yaml"] = topology
    return files
