"""Energy, where the machine tells it: RAPL counters of the processor, or a battery that is being discharged."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
POWER_SUPPLY = Path("/sys/class/power_supply")
_MICRO = 1e-6


@dataclass(frozen=True, slots=True)
class Reading:
    """Counters at one moment. source: "rapl", "battery", or "" where the machine tells nothing.

    counters: (joules, joules at which it begins at 0 again) of each processor package. watts: of a battery.
    """

    source: str = ""
    counters: tuple[tuple[float, float], ...] = ()
    watts: float = 0.0


def read_energy(powercap: Path = POWERCAP, power_supply: Path = POWER_SUPPLY) -> Reading:
    """Return what the machine says now."""
    counters = []
    for package in filter(_is_package, _folders(powercap)):
        now, most = _number(package / "energy_uj"), _number(package / "max_energy_range_uj")
        if now is not None:
            counters.append((now * _MICRO, (most or 0.0) * _MICRO))
    if counters:
        return Reading("rapl", tuple(counters))
    for supply in _folders(power_supply):
        power = _number(supply / "power_now")
        if power is None:
            current, voltage = _number(supply / "current_now"), _number(supply / "voltage_now")
            power = None if current is None or voltage is None else current * voltage * _MICRO
        if power and _text(supply / "status") == "Discharging":
            return Reading("battery", watts=abs(power) * _MICRO)  # some drivers say that it is negative
    return Reading()


def joules(before: Reading, after: Reading, seconds: float) -> float | None:
    """Return the energy between two readings, or None if the machine does not tell it."""
    if before.source != after.source or not after.source:
        return None
    if after.source == "battery":
        return (before.watts + after.watts) / 2 * seconds
    if len(before.counters) != len(after.counters):
        return None
    pairs = list(zip(before.counters, after.counters, strict=True))
    if any(new + most < old for (old, _), (new, most) in pairs):
        return None  # it began again, and it is not known where
    return sum(_grown(old, new, most) for (old, _), (new, most) in pairs)


def _grown(old: float, new: float, most: float) -> float:
    return new - old if new >= old else new - old + most


def _is_package(folder: Path) -> bool:
    """Return whether these are the counters of a processor package; AMD's processors have the same names.

    intel-rapl:0:0 is a part of one. intel-rapl-mmio:0 is a package a second time, and "psys" is the whole machine with
    its packages: with them, energy would count twice.
    """
    kind, _, number = folder.name.partition(":")
    return kind == "intel-rapl" and number.isdecimal() and _text(folder / "name").startswith("package")


def _folders(folder: Path) -> Sequence[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return ()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:  # RAPL is for root alone on most machines
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None
