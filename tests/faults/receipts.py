"""What a run of the lab leaves behind: counts as JSON, with what they were measured on and what they do not show."""

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def write_receipt(name: str, values: Mapping[str, Any], fallback: Path) -> Path:
    """Write a receipt under $MDIQ_RECEIPTS, or else under ``fallback``; return its path."""
    folder = Path(os.environ.get("MDIQ_RECEIPTS") or fallback)
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    path = folder / f"{name}-{now:%Y%m%dT%H%M%SZ}.json"
    about = {"commit": commit(), "date": now.isoformat(timespec="seconds"), "machine": machine()}
    path.write_text(json.dumps(about | dict(values), indent=2) + "\n", encoding="utf-8")
    return path


def commit() -> str:
    """Return the commit of this tree, and whether files differ from it."""
    described = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    done = subprocess.run(described, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """Return the kind of CPU, the cores that this process may use, the memory and the system."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "Model", "CPU part"))
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return count, median and maximum; only the count of nothing."""
    if not values:
        return {"count": 0}
    return {"count": len(values), "median": round(statistics.median(values), 3), "max": round(max(values), 3)}


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Return how fast y grows with x, by least squares; None where there are too few points to say."""
    if len(points) < 3 or len({x for x, _ in points}) < 2:
        return None
    return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope


PAUSE_STEPS = ("after_s", "back_s", "loaded_s", "first_token_s", "replayed_s")


def pauses(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return the steps of all pauses that a Starter's log lines tell of, as ring_goes_on and ring_has_replayed do."""
    found: list[dict[str, float]] = []
    for line in lines:
        steps = {name: float(line[name]) for name in PAUSE_STEPS if name in line}
        if line["event"] == "ring_goes_on":
            found.append(steps)
        elif line["event"] == "ring_has_replayed" and found:
            found[-1] |= steps
    return found


def noticed(killed: Sequence[tuple[str, float]], lines: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return how long after each kill a Starter has logged the loss: of (node, time), in the order of the kills.

    A node that was not in the ring yet is not lost; two kills of one node before its loss is logged count once.
    """
    found: list[float] = []
    lost = [(line["node"], _seconds(line["timestamp"])) for line in lines if line["event"] == "node_lost"]
    for i, (name, killed_s) in enumerate(killed):
        next_s = next((at_s for other, at_s in killed[i + 1 :] if other == name), float("inf"))
        after = [at_s for node, at_s in lost if node == name and killed_s <= at_s < next_s]
        found += [round(after[0] - killed_s, 3)] if after else []
    return found


def _seconds(timestamp: str) -> float:
    return datetime.datetime.fromisoformat(timestamp).timestamp()
