"""Requests keep coming for a while, faults too, and every answer is right; nothing is left over.

MDIQ_SOAK_S: how long, in seconds; MDIQ_SOAK_SEED: which faults; MDIQ_SOAK_SPARES: spare nodes beside the two workers.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdiq.config.units import parse_size
from tests.faults.conftest import SMALL, model_that_is_here
from tests.faults.lab import Lab, running_of
from tests.faults.receipts import write_receipt
from tests.faults.soak import Soak

QUICK_S = 60.0
SECONDS = float(os.environ.get("MDIQ_SOAK_S", QUICK_S))
SEED = int(os.environ.get("MDIQ_SOAK_SEED", "1"))
SPARES = int(os.environ.get("MDIQ_SOAK_SPARES", "0"))
FAULT_S = 20.0 if SECONDS > QUICK_S else 14.0
MEMORY = "700M"  # of each node; so little that the KV cache is soon full, and what still grows after that is a leak
SLACK = 4  # descriptors, or threads, that come and go: a connection that is being closed

pytestmark = [pytest.mark.soak, pytest.mark.timeout(SECONDS + 1_500)]

DOES_NOT_SHOW = [
    "Slow leaks of a process that lives for hours: nodes are killed, and a slope is that of one lifetime.",
    "Leaks as small as what a process still takes at first: KV cache and cached prompts fill in the first minutes.",
    "Losses of packets and links that are cut: all nodes share loopback.",
    "The loss of the Starter: it is never a victim.",
    "Other models and longer contexts: it is one model, and the same six requests again and again.",
    "Devices unlike each other: all nodes have the same kind of CPU.",
    "Faults at chosen moments: they are drawn by a seed, and where they hit an answer differs from run to run.",
]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path, model_that_is_here(SMALL), num_spares=SPARES, memory=MEMORY) as lab:
        yield lab


def test_every_answer_is_right_while_nodes_die_freeze_and_stop(lab: Lab, tmp_path: Path) -> None:
    soak = Soak(lab, seed=SEED, seconds=SECONDS, fault_s=FAULT_S)
    told = soak.told
    try:
        soak.run()
    finally:
        values = {
            "what": "soak",
            "model": lab.model.name,
            "nodes": lab.names,
            "seed": SEED,
            "memory_of_each": MEMORY,
            "counts": soak.summary(),
            "troubles": told.troubles,
            "failures": told.failures,
            "faults": told.faults,
            "does_not_show": DOES_NOT_SHOW,
        }
        print(f"\n{write_receipt('soak', values, tmp_path)}: {values['counts']}")  # noqa: T201
    lab.close()
    assert told.failures == [] and told.troubles == []
    assert told.faults and told.verdicts["same"] > len(told.faults), "too little came of it to say anything"
    assert soak.before is not None and soak.after is not None
    assert soak.after.descriptors <= soak.before.descriptors + SLACK, (soak.before, soak.after)
    assert soak.after.threads <= soak.before.threads + SLACK, (soak.before, soak.after)
    peaks = [(process["node"], process["peak_rss_bytes"]) for process in values["counts"]["processes"]]
    assert all(peak <= parse_size(MEMORY) for _, peak in peaks), f"more memory than a node may use: {peaks}"
    assert running_of(tmp_path) == [], "processes are left over"
