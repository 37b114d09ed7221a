"""Hops that carry nothing though both their ends live: what the service does, and what it says; all in virtual time."""

import asyncio
from dataclasses import replace

import pytest

from mdiq.core.ring_settings import RingSettings
from mdiq.errors import NodeDiedError
from mdiq.runtime.options import Outages
from tests.runtime.test_ring_changes import FORMED_S, TAKEN_S, asked, has_layers, layers, live, states
from tests.virtual.house import HOP, House

SILENCE_S, TOLERANCE_S = Outages().silence_s, Outages().tolerance_s
FOUND_S = SILENCE_S + 3.0
"""In which a dead Hop is found: a PROBE, a heartbeat and a look of the guard come after the silence has begun."""
REPLACED_S = 2 * FOUND_S + TAKEN_S
HOPS = [("desk", "pi1"), ("pi1", "pi2"), ("pi2", "desk")]
WHOLE = {"desk": 2, "pi1": 2, "pi2": 2}


def lines(house: House, event: str) -> list[dict[str, object]]:
    return [dict(line) for line in house.log if line["event"] == event]


async def until(house: House, text: str, within_s: float) -> None:
    """Wait until the service says this of its state."""
    assert house.keeper is not None
    deadline_s = house.loop.time() + within_s
    while house.keeper.state.text != text:
        assert house.loop.time() < deadline_s, f"{house.keeper.state.text} after {within_s:g} s"
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("back_only", [False, True], ids=["data", "answers"])
@pytest.mark.parametrize("hop", HOPS, ids=":".join)
def test_a_hop_that_is_cut_for_good_is_found_and_a_spare_replaces_an_end_of_it(
    hop: tuple[str, str], back_only: bool
) -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        house.network.cut_hop(*hop, back_only=back_only)
        await house.answered(REPLACED_S + 10.0)
        left_out = hop[1] if hop[1] != "desk" else hop[0]
        assert set(layers(house)) == {"desk", "pi1", "pi2", "spare1"} - {left_out}
        await asked(house)
        await house.answered(10.0)

    house = live(act, num_spares=1)
    found = lines(house, "hop_is_dead")
    assert [(line["sender"], line["receiver"], line["is_again"]) for line in found] == [(*hop, False), (*hop, True)]
    first, second = lines(house, "ring_paused")
    assert str(first["error"]).startswith(f"{hop[0]} to {hop[1]}: nothing that {hop[0]} sends to tcp://127.0.0.1:70")
    assert second["error"] == first["error"]


def test_a_connection_that_a_router_has_forgotten_is_made_anew_and_all_nodes_stay() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        for hop in HOPS:
            await asked(house)
            house.network.stick_hop(*hop)
            await house.answered(FOUND_S + 10.0)
            assert layers(house) == WHOLE

    house = live(act, num_spares=1)
    assert [(line["sender"], line["receiver"]) for line in lines(house, "hop_is_dead")] == HOPS
    assert len(lines(house, "hop_carries_again")) == len(lines(house, "ring_goes_on")) == 3
    assert sum(line["event"] == "stage_ready" for line in house.log) == 2, "nothing is loaded again"


@pytest.mark.parametrize("cut_s", [4.0, 9.0, 25.0, 50.0])
@pytest.mark.parametrize("hop", HOPS, ids=":".join)
def test_without_anyone_to_replace_an_end_the_ring_waits_for_the_hop(hop: tuple[str, str], cut_s: float) -> None:
    async def act(house: House) -> None:
        house.free_bytes = 0  # nobody has room for more Layers
        await house.serving(FORMED_S)
        await asked(house)
        house.network.cut_hop(*hop)
        await asyncio.sleep(cut_s)
        assert house.is_serving == (cut_s < SILENCE_S)
        house.network.mend_hop(*hop)
        await house.answered(2.0 + FOUND_S + 10.0)
        await house.serving(3.0)
        assert layers(house) == WHOLE

    live(act)


def test_when_nothing_helps_the_error_names_the_hop_and_what_to_look_at() -> None:
    async def act(house: House) -> None:
        house.free_bytes = 0
        await house.serving(FORMED_S)
        await asked(house)
        house.network.cut_hop("pi1", "pi2")
        await house.answered(2 * FOUND_S + TOLERANCE_S + 2.0)
        for answer in house.answers:
            assert isinstance(answer.error, NodeDiedError)
            assert "pi1 to pi2: nothing that pi1 sends to tcp://127.0.0.1:7004 arrives there; see" in str(answer.error)
            assert "a firewall on pi2 lets port 7004 in" in str(answer.error)
        assert house.keeper is not None
        await asyncio.sleep(60.0)
        assert house.keeper.last_error is not None and "pi1 to pi2: nothing that pi1" in house.keeper.last_error
        house.network.mend_hop("pi1", "pi2")
        await house.serving(60.0)
        house.ask()
        await house.answered(10.0)
        assert house.answers[-1].error is None

    live(act, is_kept=False)


def test_a_ring_that_nobody_asks_anything_finds_it_too_and_says_what_is_so() -> None:
    async def act(house: House) -> None:
        house.free_bytes = 0
        await house.serving(FORMED_S)
        await asyncio.sleep(10.0)
        house.network.cut_hop("pi1", "pi2")
        await until(house, "degraded: nothing goes from pi1 to pi2", FOUND_S)
        assert not house.is_serving
        await until(house, "paused: waits for pi2; nothing goes from pi1 to pi2", FOUND_S)
        answer = house.ask()
        await asyncio.sleep(5.0)
        assert not answer.tokens
        house.network.mend_hop("pi1", "pi2")
        await until(house, "serves on desk, pi1, pi2", 5.0)
        await house.answered(5.0)

    live(act)


def test_a_node_whose_data_port_is_dead_both_ways_is_the_one_that_is_left_out() -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        await asked(house)
        for hop in (("desk", "pi1"), ("pi1", "pi2")):
            house.network.cut_hop(*hop)
        await house.answered(REPLACED_S + 20.0)
        assert layers(house) == {"desk": 3, "pi2": 3}
        assert states(house)["pi1"] == "missing"

    live(act)


def test_a_sender_that_reaches_no_other_node_is_left_out_in_the_end() -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        await asked(house)
        for receiver in ("pi2", "spare1", "spare2"):
            house.network.cut_hop("pi1", receiver)
        await house.answered(2 * REPLACED_S + 20.0)
        assert "pi1" not in layers(house) and house.is_serving

    live(act, num_spares=2)


def test_a_node_that_was_left_out_is_taken_in_again_later_and_left_out_at_once_if_its_hop_is_dead_still() -> None:
    async def act(house: House) -> None:
        house.fill_disks()
        await house.serving(FORMED_S)
        house.network.cut_hop("desk", "pi1")
        await asyncio.sleep(REPLACED_S)
        assert layers(house) == {"desk": 3, "pi2": 3}
        await has_layers(house, WHOLE, 100.0)
        house.ask(max_tokens=200)
        await asyncio.sleep(FOUND_S + TAKEN_S)
        assert layers(house) == {"desk": 3, "pi2": 3}
        house.network.mend_hop("desk", "pi1")
        await has_layers(house, WHOLE, 120.0)
        await asyncio.sleep(20.0)
        assert layers(house) == WHOLE and house.is_serving
        await house.answered(10.0)

    house = live(act)
    assert [line["is_again"] for line in lines(house, "hop_is_dead")] == [False, True, True]


@pytest.mark.parametrize(
    "plane",
    [
        replace(HOP, delay_s=2.0),
        replace(HOP, delay_s=0.5, jitter_s=3.0),
        replace(HOP, gap_s=1.0),
        replace(HOP, gap_s=8.0),
    ],
    ids=["delay", "jitter", "bandwidth", "collapse"],
)
@pytest.mark.parametrize("hop", HOPS, ids=":".join)
def test_a_hop_that_is_slow_is_never_taken_for_dead(hop: tuple[str, str], plane: object) -> None:
    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        answers = [house.ask(max_tokens=60) for _ in range(3)]
        await asyncio.sleep(1.0)
        house.network.slow_hop(*hop, plane)  # type: ignore[arg-type]
        await asyncio.sleep(120.0)
        assert house.is_serving
        house.network.mend_hop(*hop)
        await house.answered(400.0)
        assert [answer.error for answer in answers] == [None] * 3

    house = live(act, num_spares=1)
    assert not lines(house, "hop_is_dead") and not lines(house, "ring_paused")


@pytest.mark.parametrize("num_asked", [1, 4])
def test_a_lost_frame_is_sent_again_after_a_few_laps_and_not_after_a_minute(num_asked: int) -> None:
    """A Lap takes a tenth of a second here; the shortest deadline is 2 s."""

    async def act(house: House) -> None:
        await house.serving(FORMED_S)
        answers = [house.ask(max_tokens=200) for _ in range(num_asked)]
        await asyncio.sleep(1.0)
        house.network.num_to_lose = 1
        before = [len(answer.tokens) for answer in answers]
        await asyncio.sleep(RingSettings().min_timeout_s + 1.0)
        assert house.keeper is not None
        counts = house.keeper.status()["counts"]
        assert 1 <= counts["overdue"] == counts["replays"] <= num_asked and not house.network.num_to_lose
        assert all(0 < num < len(answer.tokens) - 5 for num, answer in zip(before, answers, strict=True))
        await house.answered(20.0)

    house = live(act)
    assert not lines(house, "hop_is_dead")
