"""A ring that is formed for a command: a node that dies on the way is waited for, and named when it dies each time."""

import pytest

from mdiq.errors import EngineError, MdiqError, NodeDiedError
from mdiq.service.forming import MAX_TRIES, formed
from tests.fake_ring import FakeRing, ring_options


class Rings:
    """Opens rings; the first ones cannot be formed, for these reasons."""

    def __init__(self, *reasons: MdiqError) -> None:
        self.reasons = list(reasons)
        self.rings: list[FakeRing] = []

    def __call__(self) -> FakeRing:
        ring = FakeRing(ring_options(2))
        ring.refused = self.reasons.pop(0) if self.reasons else None
        self.rings.append(ring)
        return ring


async def test_a_ring_is_formed_again_when_a_node_dies_on_the_way() -> None:
    rings = Rings(*[NodeDiedError("node-1: its process ended with signal 9")] * (MAX_TRIES - 1))
    ring = await formed(rings)
    assert ring is rings.rings[-1] and len(rings.rings) == MAX_TRIES and ring.is_open


async def test_a_node_that_dies_each_time_is_named() -> None:
    rings = Rings(*[NodeDiedError(f"node-1: death {i}") for i in range(MAX_TRIES)])
    with pytest.raises(NodeDiedError, match=f"death {MAX_TRIES - 1}"):
        await formed(rings)
    assert len(rings.rings) == MAX_TRIES


async def test_what_another_try_would_not_mend_is_told_at_once() -> None:
    rings = Rings(EngineError("node-1: it runs another mdiq"))
    with pytest.raises(EngineError):
        await formed(rings)
    assert len(rings.rings) == 1
