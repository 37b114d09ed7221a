import asyncio
from collections.abc import Sequence

import pytest

from mdiq.bench.figures import UserTimes
from mdiq.bench.runner import WARM_UP_TOKENS, Bench, PeerCell, node_shares, run_load
from mdiq.bench.workload import ApartCell, Cell, Load
from mdiq.errors import EngineError, RingError
from mdiq.testbed.link_shape import LinkShape
from tests.fake_ring import FakeRing, ring_options

SLOW = LinkShape(0.02)


async def test_every_user_asks_once_and_gets_all_tokens() -> None:
    async with FakeRing(ring_options(1)) as ring:
        users = await run_load(ring, Load(3, 5, 4), 100, first_index=7)
    assert [user.tokens_s for user in users] == [(1e9, 1e9 + 1, 1e9 + 2, 1e9 + 3)] * 3
    assert [sequence.index for sequence in ring.asked] == [7, 8, 9]
    assert [sequence.prompt for sequence in ring.asked] == list(Load(3, 5, 4).prompts(100))
    assert all(sequence.params.ignore_eos and sequence.params.temperature == 0 for sequence in ring.asked)


async def test_users_who_draw_have_a_seed_each() -> None:
    async with FakeRing(ring_options(1)) as ring:
        await run_load(ring, Load(3, 5, 4, seed=10, temperature=0.7), 100, first_index=0)
    assert [(sequence.params.temperature, sequence.params.seed) for sequence in ring.asked] == [
        (0.7, 10),
        (0.7, 11),
        (0.7, 12),
    ]


async def test_an_answer_that_is_too_short_is_an_error() -> None:
    async with FakeRing(ring_options(1), short_by=1) as ring:
        with pytest.raises(ExceptionGroup) as caught:
            await run_load(ring, Load(1, 5, 4), 100, 0)
    assert isinstance(caught.value.exceptions[0], RingError)
    assert "3 of 4 tokens" in str(caught.value.exceptions[0])


async def test_a_user_who_gets_an_error_ends_the_measurement() -> None:
    async with FakeRing(ring_options(1), failure=EngineError("node-1: not a number")) as ring:
        with pytest.raises(ExceptionGroup) as caught:
            await run_load(ring, Load(2, 5, 4), 100, 0)
    assert str(caught.value.exceptions[0]) == "node-1: not a number"


async def test_nodes_are_charged_with_what_they_did_during_the_load() -> None:
    ring = FakeRing(ring_options(2))
    before = ring.figures()
    ring.num_tokens = 6
    users = [UserTimes(0.0, (1.0, 12.0))] * 2
    first, last = node_shares(before, ring.figures(), Load(2, 4, 2), users)
    assert first.busy_share == 0.5
    # 2 users, 4 tokens of a prompt and 1 of the answer pass every hop but the last one, which carries 2 rows each.
    assert first.bytes_per_token == 60 / 10
    assert last.bytes_per_token == 60 / 4


async def test_rounds_go_over_all_rings_and_the_peer_in_turn() -> None:
    order: list[str] = []
    rings_opened: list[FakeRing] = []

    def open_ring(nodes: int, link: LinkShape | None) -> FakeRing:
        assert not any(ring.is_open for ring in rings_opened), "one ring is up at a time"
        order.append(f"{nodes} nodes, {link}")
        rings_opened.append(FakeRing(ring_options(nodes)))
        return rings_opened[-1]

    async def run_peer(threads: int, load: Load) -> tuple[Sequence[UserTimes], int]:
        assert not any(ring.is_open for ring in rings_opened), "no ring disturbs the peer"
        order.append(f"peer {threads} {load.users}")
        return [UserTimes(0.0, (1.0, 2.0))], 123

    async def run_apart(rings: int, load: Load) -> Sequence[UserTimes]:
        assert not any(ring.is_open for ring in rings_opened), "no ring disturbs them"
        order.append(f"{rings} apart {load.users}")
        return [UserTimes(0.0, (1.0, 2.0))]

    told: list[str] = []
    bench = Bench(
        cells=(Cell(1, 2, 5), Cell(1, 3, 4, temperature=0.5), Cell(2, 2, 5), Cell(2, 2, 5, SLOW)),
        answer_tokens=2,
        repeats=2,
        seed=0,
        vocab_size=100,
        rest_s=0.0,
        open_ring=open_ring,
        peer_cells=[PeerCell(2, 2, 5)],
        run_peer=run_peer,
        apart_cells=[ApartCell(2, 1, 5)],
        run_apart=run_apart,
        progress=told.append,
    )
    measured = await asyncio.wait_for(bench.run(), 30)
    assert order == ["1 nodes, None", "2 nodes, None", f"2 nodes, {SLOW}", "2 apart 1", "peer 2 2"] * 2
    assert [run.decode_tokens_per_s for run in measured.apart[ApartCell(2, 1, 5)]] == [1.0, 1.0]
    assert list(measured.cells) == list(bench.cells)
    assert all(len(runs) == 2 for runs in measured.cells.values())
    assert [run.rss_bytes for run in measured.peer[PeerCell(2, 2, 5)]] == [123, 123]
    assert told[0] == "round 1 of 2: 1 nodes start"
    # The warm-up has the most users and the longest prompt of the ring, and no index comes twice.
    asked = rings_opened[0].asked
    assert [(len(s.prompt), s.params.max_tokens) for s in asked[:3]] == [(5, WARM_UP_TOKENS)] * 3
    assert [sequence.index for sequence in asked] == list(range(8))
    # The warm-up draws if any load does.
    assert [sequence.params.temperature for sequence in asked] == [0.5] * 3 + [0.0] * 2 + [0.5] * 3
    assert measured.cells[Cell(2, 2, 5)][0].nodes[1].rss_bytes == 100
    assert [hop.wire for hop in measured.cells[Cell(2, 2, 5)][0].hops] == ["bf16", "bf16"]
    assert measured.cells[Cell(1, 2, 5)][0].hops == ()
