"""Which server a request goes to, and how a server is: values in, values out; time is a number."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdiq.route.choice import SLACK, Wanted, choose, models_of
from mdiq.route.servers import Report, Server, State, report_of


def _server(name: str, running: int = 0, *, places: int = 4, others: int = 0, **changes: Any) -> Server:
    server = Server(name, 5.0)
    values = {"model": "m", "is_serving": True, "text": "serves", "num_running": others, "num_places": places}
    values |= {"max_requests": 8, "context_tokens": 100, "same_tokens": "x"} | changes
    server.reported(Report(**values), 0.0)
    server.num_running = running
    return server


def test_the_server_with_the_least_to_do_for_each_place_is_chosen() -> None:
    servers = [_server("a", 3, places=4), _server("b", 5, places=8), _server("c", 2, places=2)]
    chosen = choose(servers, Wanted())
    assert chosen is not None and chosen.name == "b"


def test_requests_of_other_clients_count_too_and_our_own_only_once() -> None:
    server = _server("a", others=2)
    assert server.num_all == 2
    server.num_running = 3
    assert server.num_all == 5
    server.reported(_server("a", others=5).report or pytest.fail(), 1.0)  # ours are among the five
    assert server.num_all == 5


def test_idle_servers_are_used_by_turns_as_their_places_say() -> None:
    servers = [_server("a", places=2), _server("b", places=4)]
    had = []
    for _ in range(6):
        chosen = choose(servers, Wanted())
        assert chosen is not None
        chosen.num_begun += 1
        had.append(chosen.name)
    assert (had.count("a"), had.count("b")) == (2, 4)


@pytest.mark.parametrize(("running", "name"), [(0, "b"), (2, "b"), (3, "a")])
def test_the_server_that_has_the_beginning_is_chosen_unless_it_has_much_more_to_do(running: int, name: str) -> None:
    assert SLACK == 0.5
    chosen = choose([_server("a"), _server("b", running), _server("c", 1)], Wanted(blocks={"b": 3, "c": 1}))
    assert chosen is not None and chosen.name == (name if running < 3 else "c")


def test_a_server_without_room_is_asked_only_when_no_other_takes_requests() -> None:
    full, busy = _server("a", 8, places=100), _server("b", 7, places=1)
    assert choose([full, busy], Wanted()) is busy
    assert choose([full, busy], Wanted(), {"b"}) is full


def test_a_long_prompt_goes_where_the_cache_has_room_for_it() -> None:
    full, busy = _server("a", kv_free_tokens=99), _server("b", 3, kv_free_tokens=100)
    assert choose([full, busy], Wanted(num_tokens=99)) is full
    assert choose([full, busy], Wanted(num_tokens=100)) is busy
    assert choose([full, busy], Wanted(num_tokens=101)) is full, "it waits, wherever it is"
    assert choose([full, busy], Wanted(num_tokens=100, block_tokens=10, blocks={"a": 1})) is full, "it has a part of it"
    assert choose([_server("c", 1), full], Wanted(num_tokens=101)) is not full, "one that does not say may have room"
    busy.num_tokens = 1  # it has got a request since it reported
    assert choose([full, busy], Wanted(num_tokens=100)) is full
    busy.reported(busy.report or pytest.fail(), 1.0)
    assert choose([full, busy], Wanted(num_tokens=100)) is busy


def test_only_servers_that_suit_are_chosen() -> None:
    servers = [
        _server("a", model="n"),
        _server("b", same_tokens=None),
        _server("c", context_tokens=50),
        _server("d", 5),
    ]

    def names(wanted: Wanted) -> set[str]:
        tried: set[str] = set()
        while (chosen := choose(servers, wanted, tried)) is not None:
            tried.add(chosen.name)
        return tried

    assert names(Wanted()) == {"a", "b", "c", "d"}
    assert names(Wanted("m")) == {"b", "c", "d"}
    assert names(Wanted("m", same_tokens="x")) == {"c", "d"}
    assert names(Wanted("m", min_context_tokens=51)) == {"b", "d"}
    servers[3].is_drained = True
    assert names(Wanted("m", same_tokens="x", min_context_tokens=51)) == set()
    assert names(Wanted(only=frozenset({"d"}))) == {"d"}, "what it has goes on there"
    assert models_of(servers) == {"n": 100, "m": 100}


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=6))
def test_no_choice_is_far_from_the_least_load(rows: list[tuple[int, int, int]]) -> None:
    servers = [_server(f"s{i}", running, places=places) for i, (running, places, _) in enumerate(rows)]
    chosen = choose(servers, Wanted(blocks={f"s{i}": depth for i, (_, _, depth) in enumerate(rows) if depth}))
    assert chosen is not None
    with_room = [server for server in servers if server.has_room] or servers
    assert chosen in with_room and chosen.load <= min(server.load for server in with_room) + SLACK


def test_a_server_is_gone_after_its_silence_and_back_with_its_first_answer() -> None:
    server = Server("a", 5.0)
    server.look(10.0)
    server.look(14.9)
    assert server.state is State.UNKNOWN
    server.look(15.0)
    assert server.state is State.GONE and server.text == "silent for 5 s"
    report = _server("a").report
    assert report is not None
    server.reported(report, 16.0)
    assert server.state is State.SERVES
    server.heard(20.0)  # a token of an answer
    server.look(24.0)
    assert server.state is State.SERVES
    server.look(25.0)
    assert server.state is State.GONE


def test_how_a_server_is_follows_from_what_was_heard_last() -> None:
    server = _server("a")
    report = _server("a", is_serving=False, text="paused").report
    assert report is not None
    server.reported(report, 1.0)
    assert (server.state, server.text) == (State.WAITS, "paused")
    server.locked(2.0)
    assert server.state is State.LOCKED and "key_file" in server.text
    server.misunderstood("what?", 3.0)
    assert server.state is State.WAITS
    server.refused("nobody listens")
    assert (server.state, server.text) == (State.GONE, "nobody listens")
    assert not server.takes_requests


STATUS = {
    "is_serving": True,
    "state": "serves",
    "requests": {"running": 2},
    "pace": {"max_live": 3},
    "serves": {"model": "m", "context_tokens": 64, "max_requests": 9, "same_tokens": None},
}


def test_a_status_is_read() -> None:
    assert report_of(STATUS) == Report("m", True, "serves", 2, 3, 9, 64, None)
    assert report_of({**STATUS, "pace": None}).num_places == 9
    cache = {"kv_reserved_tokens": 90, "kv_live_tokens": 30, "kv_capacity_tokens": 100}
    assert report_of({**STATUS, **cache}).kv_free_tokens == 70


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        {},
        {"serves": 1},
        {"requests": {"running": -1}},
        {"pace": {"max_live": 0}},
        {"pace": {"max_live": "9"}},
        {"kv_live_tokens": 3},
        {"kv_live_tokens": -3, "kv_capacity_tokens": 9},
    ],
)
def test_a_status_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="status"):
        report_of({**STATUS, **wrong} if isinstance(wrong, dict) and wrong else wrong)
