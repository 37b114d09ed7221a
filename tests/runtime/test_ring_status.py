"""What the status tells of noise."""

from dataclasses import replace
from pathlib import Path

import pytest

from mdiq.core.exposure import Exposure
from mdiq.core.sequence import Sequence
from mdiq.core.types import LayerRange
from mdiq.plan.privacy import promised, total_epsilon
from mdiq.runtime.options import RemoteNode, RemoteRing, RingOptions, StandingBy
from mdiq.runtime.ring_status import _about_noise

NODES = tuple(RemoteNode(name, f"tcp://{name}:7002", None) for name in ("desk", "pi1", "pi2"))


def _ring(*nodes: RemoteNode) -> RingOptions:
    layers = tuple(LayerRange(i, i + 1) for i in range(len(nodes)))
    return RingOptions(Path("model"), layers, remote=RemoteRing(nodes, "tcp://c", "tcp://w"))


def test_the_status_tells_the_total_of_the_request_that_sent_the_most_rows() -> None:
    promise = promised(0.5, 1e-6, clip=3.0)
    ring = _ring(NODES[0], NODES[1], replace(NODES[2], noise=promise))
    exposure = Exposure()
    exposure.sent(Sequence(0, (1, 2)), 10)
    exposure.sent(Sequence(1, (1, 2)), 1_000)
    found = _about_noise(ring, exposure)["noise"]
    assert (found["rows_sent"], found["worst_request_rows"]) == (1_010, 1_000)
    assert found["hops"] == ["pi1 > pi2"]
    (node,) = found["nodes"]
    assert (node["name"], node["epsilon"], node["delta"]) == ("pi2", 0.5, 1e-6)
    assert (node["clip"], node["sigma"]) == (3.0, promise.row.sigma)
    assert node["worst_request_epsilon"] == pytest.approx(total_epsilon(promise, 1_000), abs=1e-3)


def test_what_a_lost_or_drained_node_has_learnt_is_still_told() -> None:
    lost = replace(NODES[2], noise=promised(0.5, 1e-6, clip=3.0))
    remote = _ring(NODES[0], NODES[1]).remote
    assert remote is not None
    drained = StandingBy("pi3", None, "it is drained", noise=lost.noise)
    exposure = Exposure()
    exposure.sent(Sequence(0, (1, 2)), 10)
    for now, name in ((replace(remote, spares=(lost,)), "pi2"), (replace(remote, standing_by=(drained,)), "pi3")):
        found = _about_noise(replace(_ring(NODES[0], NODES[1]), remote=now), exposure)["noise"]
        assert found["hops"] == [] and found["rows_sent"] == 10
        assert [node["name"] for node in found["nodes"]] == [name]


def test_a_ring_without_noise_tells_nothing_of_it() -> None:
    assert _about_noise(_ring(*NODES), Exposure()) == {}
