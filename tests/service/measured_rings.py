"""A topology of three nodes, and what a ring of them measures."""

from pathlib import Path

from mdiq.config.load import LoadedTopology, load_topology
from mdiq.core.hop_survey import HopLink
from mdiq.plan.measured import MeasuredRing, MeasuredStage
from mdiq.plan.micro_batches import Curve
from mdiq.plan.pace import StageCost

MIB = 1 << 20
LAYERS = 30
NODES = """version: 1
model: {path: smollm2-135m-instruct, weights: int8}
nodes:
- {name: desk, role: starter, address: 127.0.0.1}
- {name: pi1, address: 127.0.0.2%s}
- {name: pi2, address: 127.0.0.3%s}
"""


def topology(tmp_path: Path, pi1: str = "", pi2: str = "", starter: str = "") -> LoadedTopology:
    file = tmp_path / "topology.yaml"
    file.write_text((NODES % (pi1, pi2)).replace("address: 127.0.0.1", f"address: 127.0.0.1{starter}"))
    return load_topology(file)


def measured_ring(delay_s: float = 0.0005, **layer_s: float) -> MeasuredRing:
    """A ring of 10 Layers a Node, whose time for one and for eight Segments is given by Node."""

    def stage(name: str) -> MeasuredStage:
        time_s = 10 * layer_s[name]
        cost = StageCost.of(((1, time_s), (8, 6 * time_s)), ((64, 8 * time_s),))
        return MeasuredStage(name, 10, cost, 10 * 4 * MIB, 10 * 1_536, 300 * MIB, 700 * MIB)

    link = HopLink(delay_s, 1e8)
    stages = tuple(map(stage, layer_s))
    return MeasuredRing(LAYERS, stages, Curve(((1, 1e-5),)), 576, (("bf16", link),) * len(layer_s))
