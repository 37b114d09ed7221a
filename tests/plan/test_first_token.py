"""The time to a prompt's first token, computed by hand."""

import pytest

from mdiq.core.types import NodeId
from mdiq.plan.first_token import first_token_s, prompt_chunks
from mdiq.plan.micro_batches import Curve
from mdiq.plan.partition import Goal, Objective
from mdiq.plan.plan import Plan, plan_split
from mdiq.plan.profile import HopProfile, Links, ModelShape, NodeProfile

MODEL = ModelShape(4, 1_000, 1_000, 8, 983)  # a row with its header: 1,000 bytes
ONE = Goal(Objective.LATENCY, 1, kv_tokens=1)


def node(name: str) -> NodeProfile:
    """A Layer takes 1 ms for each token of a prompt, without a fixed part; the head takes nothing."""
    return NodeProfile(
        NodeId(name), 1 << 30, Curve(((1, 0.001), (2, 0.002))), Curve(((1, 0.001), (2, 0.002))), Curve(((1, 0.0),))
    )


def ring(*split: int, hop: HopProfile) -> Plan:
    return plan_split(MODEL, [node(f"n{i}") for i in range(len(split))], Links(unknown=hop), ONE, split)


def test_one_node_computes_the_prompt_in_one_piece_up_to_the_limit_of_a_chunk() -> None:
    alone = ring(4, hop=HopProfile(0.0))
    assert prompt_chunks(alone, 100) == [100]
    assert prompt_chunks(alone, 600) == [256, 256, 88]
    assert first_token_s(alone, 100) == pytest.approx(0.4)
    assert first_token_s(alone, 600) == pytest.approx(2.4)


def test_chunks_follow_each_other_through_the_stages() -> None:
    two = ring(2, 2, hop=HopProfile(0.01))
    chunks = prompt_chunks(two, 64)
    assert sum(chunks) == 64 and len(chunks) > 1 and len({*chunks}) == 1
    first = chunks[0] * 2 * 0.001
    # The second stage is one chunk later; then the last row travels back. Both hops take 10 ms.
    assert first_token_s(two, 64) == pytest.approx((len(chunks) + 1) * first + 0.02)


def test_a_slow_line_holds_up_the_chunks_after_the_first() -> None:
    # A row takes 10 ms on the line, and the frame's 120 bytes 1.2 ms; two layers take 2 ms for it.
    slow = ring(2, 2, hop=HopProfile(0.0, 1e5))
    chunks = prompt_chunks(slow, 64)
    sent_s = sum(0.0012 + 0.01 * length for length in chunks)
    last_row_s = 0.0012 + 0.01
    assert first_token_s(slow, 64) == pytest.approx(0.002 * chunks[0] + sent_s + 0.002 * chunks[-1] + last_row_s)
