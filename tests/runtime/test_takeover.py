"""Which Ring goes on without some of its Nodes: values in, values out."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdiq.core.noise import NoisePromise, RowNoise
from mdiq.core.types import LayerRange
from mdiq.runtime.options import RemoteNode, RemoteRing, RingOptions, StandingBy
from mdiq.runtime.takeover import (
    Able,
    is_like,
    is_same_but_members,
    members_of,
    rekeyed,
    standby_layers,
    with_members_of,
    with_newcomers,
    with_spares,
    with_survivors,
)

ANY = Able(1.0, 1_000)


def node(name: str, key: str = "") -> RemoteNode:
    return RemoteNode(name, f"tcp://{name}:7002", key or f"key of {name}")


def ring(sizes: dict[str, int], spares: tuple[str, ...] = ()) -> RingOptions:
    """Return a Ring of Nodes with so many Layers each."""
    stops = [sum(list(sizes.values())[: i + 1]) for i in range(len(sizes))]
    return RingOptions(
        Path("model"),
        tuple(LayerRange(stop - size, stop) for stop, size in zip(stops, sizes.values(), strict=True)),
        remote=RemoteRing(
            tuple(map(node, sizes)),
            "tcp://c",
            "tcp://w",
            standing_by=tuple(StandingBy(name, node(name).public_key, "it is a spare") for name in spares),
            spares=tuple(map(node, spares)),
        ),
    )


def sizes(options: RingOptions) -> dict[str, int]:
    return dict(zip(options.node_names, map(len, options.layers), strict=True))


def idle(options: RingOptions) -> dict[str, str]:
    assert options.remote is not None
    assert {each.name for each in options.remote.spares} <= {each.name for each in options.remote.standing_by}
    return {each.name: each.reason for each in options.remote.standing_by}


RING = ring({"desk": 6, "pi1": 4, "pi2": 2}, ("pi3", "pi4"))


def test_a_spare_has_the_place_and_the_layers_of_the_node_that_is_lost_and_may_be_replaced_by_it() -> None:
    taken = with_spares(RING, ["pi1"], ["pi3"])
    assert sizes(taken) == {"desk": 6, "pi3": 4, "pi2": 2} and taken.layers == RING.layers
    assert idle(taken) == {"pi4": "it is a spare", "pi1": "it was lost, and pi3 took over"}
    back = with_spares(taken, ["pi3"], ["pi1"])
    assert sizes(back) == sizes(RING) and set(idle(back)) == {"pi3", "pi4"}


def test_as_many_are_replaced_as_there_are_spares_and_strangers_are_none() -> None:
    assert sizes(with_spares(RING, ["pi1", "pi2"], ["pi4"])) == {"desk": 6, "pi4": 4, "pi2": 2}
    assert sizes(with_spares(RING, ["pi1", "pi2"], ["pi4", "pi3"])) == {"desk": 6, "pi4": 4, "pi3": 2}
    assert with_spares(RING, ["pi1"], ["unknown"]) == RING


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"desk": ANY, "pi2": ANY}, {"desk": 6, "pi2": 6}),
        ({"desk": Able(1.0, 99), "pi2": Able(3.0, 99)}, {"desk": 9, "pi2": 3}),
        ({"desk": Able(1.0, 8), "pi2": Able(9.0, 99)}, {"desk": 8, "pi2": 4}),
        ({"desk": Able(1.0, 7), "pi2": Able(9.0, 4)}, None),
    ],
    ids=["even", "the faster one", "as its memory holds", "no room"],
)
def test_the_nodes_beside_it_share_its_layers(able: dict[str, Able], expected: dict[str, int] | None) -> None:
    survived = with_survivors(RING, ["pi1"], able)
    assert (None if survived is None else sizes(survived)) == expected
    if survived is not None:
        assert idle(survived)["pi1"] == "it was lost, and the nodes beside it took over"


def test_the_last_nodes_layers_go_to_the_one_before_it_and_all_to_the_starter_at_last() -> None:
    able = dict.fromkeys(("desk", "pi1", "pi2"), ANY)
    survived = with_survivors(RING, ["pi2"], able)
    assert survived is not None and sizes(survived) == {"desk": 6, "pi1": 6}
    alone = with_survivors(RING, ["pi1", "pi2"], able)
    assert alone is not None and sizes(alone) == {"desk": 12} and alone.num_nodes == 1
    assert with_survivors(RING, ["pi1", "pi2"], {"desk": Able(1.0, 11)}) is None


def test_the_starters_head_counts_where_it_shares_layers() -> None:
    """Of 24 Layers and a head that costs as much as nine, three equal Nodes had 2, 11 and 11."""
    small = ring({"desk": 2, "pi1": 11, "pi2": 11})
    able = {"desk": Able(1.0, 99, head_layers=9.0), "pi1": ANY, "pi2": ANY}
    for lost, left in (("pi1", "pi2"), ("pi2", "pi1")):
        survived = with_survivors(small, [lost], able, {left: range(2, 24)})
        assert survived is not None and sizes(survived) == {"desk": 7, left: 17}
        how = {"pi1": "the nodes beside it took over", "pi2": "those that are left share the layers anew"}
        assert idle(survived)[lost] == f"it was lost, and {how[lost]}"


def test_where_those_beside_have_no_room_all_share_what_they_have_at_hand() -> None:
    wide = ring({"desk": 3, "pi1": 3, "pi2": 3, "pi3": 3})
    able = dict.fromkeys(("desk", "pi1", "pi3"), ANY) | {"pi2": Able(1.0, 4)}
    assert with_survivors(wide, ["pi3"], able) is None
    survived = with_survivors(wide, ["pi3"], able, {"pi1": range(3, 9), "pi2": range(6, 12)})
    assert survived is not None and sizes(survived) == {"desk": 4, "pi1": 4, "pi2": 4}
    assert idle(survived)["pi3"] == "it was lost, and those that are left share the layers anew"
    able["desk"] = Able(1.0, 3)
    survived = with_survivors(wide, ["pi3"], able, {"pi1": range(3, 9), "pi2": range(6, 12)})
    assert survived is not None and sizes(survived) == {"desk": 3, "pi1": 5, "pi2": 4}


def test_hops_have_the_formats_of_their_senders_and_one_format_is_for_all() -> None:
    options = replace(ring({"desk": 3, "pi1": 3, "pi2": 3, "pi3": 3}, ("pi4",)), wires=("f32", "bf16", "i8", "bf16"))
    able = dict.fromkeys(options.node_names, ANY)
    for lost, wires in (
        (("pi1",), ("f32", "i8", "bf16")),
        (("pi1", "pi3"), ("f32", "i8")),
        (("pi2",), ("f32", "bf16", "bf16")),
    ):
        survived = with_survivors(options, lost, able)
        assert survived is not None and survived.wires == wires
    assert with_spares(options, ["pi2"], ["pi4"]).wires == options.wires
    survived = with_survivors(replace(options, wires=("bf16",)), ["pi1"], able)
    assert survived is not None and survived.wires == ("bf16",)


def test_all_that_are_left_share_the_layers_anew_if_that_is_clearly_faster_and_nobody_has_to_fetch() -> None:
    options = ring({"desk": 2, "pi1": 11, "pi2": 11})
    able = dict.fromkeys(options.node_names, ANY)

    def left(lost: str, at_hand: dict[str, range] | None = None) -> dict[str, int]:
        survived = with_survivors(options, [lost], able, at_hand or {})
        assert survived is not None
        return sizes(survived)

    assert left("pi2", {"pi1": range(2, 24)}) == {"desk": 12, "pi1": 12}
    assert left("pi2") == {"desk": 2, "pi1": 22}, "only the Starter has all of them, and it is the first"
    assert left("pi1", {"pi2": range(2, 24)}) == {"desk": 12, "pi2": 12}
    able["desk"] = Able(1.0, 1_000, head_layers=4.0)
    assert left("pi2", {"pi1": range(2, 24)}) == {"desk": 10, "pi1": 14}, "its head takes as long as four"
    able["desk"] = Able(1.0, 3)
    assert left("pi2", {"pi1": range(2, 24)}) == {"desk": 2, "pi1": 22}, "one more is not worth a longer pause"


def test_the_starter_keeps_what_it_has_also_where_others_are_faster() -> None:
    options = ring({"desk": 6, "pi1": 2, "pi2": 4})
    able = {"desk": Able(9.0, 12), "pi1": Able(1.0, 12), "pi2": Able(1.0, 12)}
    survived = with_survivors(options, ["pi2"], able, {"pi1": range(12)})
    assert survived is not None and sizes(survived) == {"desk": 6, "pi1": 6}


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=5),
    st.data(),
)
def test_all_layers_are_held_once_and_who_is_left_keeps_what_he_has_unless_another_ring_is_clearly_faster(
    held: list[int], data: st.DataObject
) -> None:
    names = [f"n{i}" for i in range(len(held))]
    options = ring(dict(zip(names, held, strict=True)))
    lost = data.draw(st.sets(st.sampled_from(names[1:])))
    able = {name: Able(data.draw(st.sampled_from((0.5, 1.0, 4.0))), data.draw(st.integers(1, 30))) for name in names}
    before = dict(zip(options.node_names, options.layers, strict=True))
    at_hand = {name: {*before[name], *data.draw(st.sets(st.integers(0, sum(held) - 1)))} for name in names}
    at_hand[names[0]] = {*range(sum(held))}
    survived = with_survivors(options, lost, able, at_hand)
    if survived is None:
        return
    left = survived.node_names
    assert {*idle(survived)} == lost
    assert [layer for layers in survived.layers for layer in layers] == list(range(sum(held)))
    assert {*before[names[0]]} <= {*survived.layers[0]}
    keeps = all({*before[name]} <= {*layers} for name, layers in zip(left, survived.layers, strict=True))
    for name, layers in zip(left, survived.layers, strict=True):
        assert layers == before[name] or len(layers) <= able[name].max_layers
        assert keeps or {*layers} <= at_hand[name]
    # The best of all splits, by trying each.
    times = [
        max(able[name].seconds(stop - start) for name, (start, stop) in zip(left, parts, strict=True))
        for cuts in combinations(range(1, sum(held)), len(left) - 1)
        for parts in [list(pairwise([0, *cuts, sum(held)]))]
        if parts[0][1] >= held[0]
        and all(
            {*range(*part)} <= at_hand[name] and part[1] - part[0] <= able[name].max_layers
            for name, part in zip(left, parts, strict=True)
        )
    ]
    slowest_s = max(able[name].seconds(len(layers)) for name, layers in zip(left, survived.layers, strict=True))
    assert slowest_s == min(times) if not keeps else all(slowest_s <= 1.1 * time_s + 1e-9 for time_s in times)


def test_newcomers_stand_by_and_those_that_the_topology_names_no_more_are_gone() -> None:
    assert RING.remote is not None
    planned = ring({"desk": 4, "pi1": 4, "pi2": 2, "new": 2}, ("pi4",))
    waits = with_newcomers(RING, planned)
    assert sizes(waits) == sizes(RING)
    assert idle(waits) == {"pi4": "it is a spare", "new": "the ring takes it in when all are here"}


def test_a_ring_is_like_another_that_differs_in_nodes_and_layers_alone() -> None:
    assert is_like(RING, ring({"desk": 4, "pi3": 8}))
    assert is_like(RING, ring({"desk": 4, "a new one": 8}))
    assert not is_like(RING, replace(RING, threads=4))
    assert not is_like(RING, replace(RING, is_survey=True))
    other = ring({"desk": 6, "pi1": 4, "pi2": 2})
    assert is_like(RING, with_keys(other, "pi1", "pi3"))
    assert not is_like(RING, with_keys(other, "desk")), "everyone would have to know the Starter's new key first"
    assert other.remote is not None
    moved = tuple(replace(each, data_endpoint=f"tcp://{each.name}:9") for each in other.remote.nodes)
    assert not is_like(RING, replace(other, remote=replace(other.remote, nodes=moved)))


def test_a_spare_that_has_taken_over_is_not_alike_when_something_is_promised_of_it() -> None:
    before, after = (
        ring({"desk": 6, "pi1": 6}, ("pi3",)),
        with_spares(ring({"desk": 6, "pi1": 6}, ("pi3",)), ["pi1"], ["pi3"]),
    )
    assert before.remote is not None
    spare = replace(before.remote.spares[0], noise=NoisePromise(8.0, 1e-6, RowNoise(10.0, 30.0)))
    planned = replace(before, remote=replace(before.remote, spares=(spare,)))
    assert is_like(after, before) and not is_like(after, planned), "the hop to it has no noise yet"
    assert is_like(before, planned), "it sees nothing yet"


def test_nodes_with_another_key_are_told_and_the_starter_keeps_its_own() -> None:
    new = with_keys(RING, "desk", "pi1", "pi3")
    assert {*rekeyed(RING, new)} == {"desk", "pi1", "pi3"} and rekeyed(RING, RING) == []
    for other in (new, ring({"desk": 6, "pi2": 6}), with_newcomers(RING, new)):
        taken = with_members_of(RING, other)
        assert is_same_but_members(taken, RING) and is_same_but_members(RING, with_keys(RING, "pi2", "pi4"))
    assert not is_same_but_members(RING, with_keys(RING, "desk"))
    taken = with_members_of(RING, new)
    assert dict(members_of(taken)) == dict(members_of(RING)) | {"pi1": "another key", "pi3": "another key"}


def with_keys(options: RingOptions, *names: str) -> RingOptions:
    """Return a Ring in which these Nodes have another key."""
    remote = options.remote
    assert remote is not None

    def of(nodes: Sequence[Any]) -> Any:
        return tuple(replace(each, public_key="another key") if each.name in names else each for each in nodes)

    return replace(
        options,
        remote=replace(remote, nodes=of(remote.nodes), standing_by=of(remote.standing_by), spares=of(remote.spares)),
    )


def at_hand(options: RingOptions, num_more: int = 100) -> dict[str, str]:
    return {name: str(layers) for name, layers in standby_layers(options, lambda _: num_more).items()}


def test_spares_keep_the_layers_of_all_workers_and_others_those_of_their_neighbours() -> None:
    wide = ring({"desk": 6, "pi1": 4, "pi2": 2, "pi3": 5}, ("pi4",))
    assert at_hand(wide) == {"pi4": "6-16", "pi1": "6-11", "pi2": "6-16", "pi3": "10-16"}
    assert at_hand(RING) == {"pi3": "6-11", "pi4": "6-11", "pi1": "6-11", "pi2": "6-11"}


def test_a_node_keeps_no_more_than_it_could_hold_and_none_if_it_is_not_to() -> None:
    wide = ring({"desk": 6, "pi1": 4, "pi2": 2, "pi3": 5})
    assert at_hand(wide, 1) == {"pi1": "6-10", "pi2": "9-12", "pi3": "11-16"}
    assert at_hand(wide, 0) == {}
    assert wide.remote is not None
    none = replace(wide.remote, nodes=tuple(replace(each, keeps_standby_layers=False) for each in wide.remote.nodes))
    assert at_hand(replace(wide, remote=none)) == {}


def test_a_starter_alone_and_a_ring_on_one_machine_keep_none() -> None:
    assert at_hand(ring({"desk": 6}, ("pi1",))) == {}
    assert at_hand(replace(RING, remote=None)) == {}


def test_a_node_may_have_more_or_less_memory_without_a_ring_formed_anew() -> None:
    assert RING.remote is not None
    nodes = tuple(replace(each, memory_bytes=1 << 30, memory_share=0.5) for each in RING.remote.nodes)
    other = replace(ring({"desk": 6, "pi1": 3, "pi2": 3}, ("pi3", "pi4")), remote=replace(RING.remote, nodes=nodes))
    assert is_like(RING, other)


def test_what_is_promised_of_a_node_is_kept_in_every_ring_that_goes_on() -> None:
    promise = NoisePromise(8.0, 1e-6, RowNoise(10.0, 30.0))

    def with_noise(options: RingOptions, *names: str) -> RingOptions:
        assert options.remote is not None
        nodes = tuple(replace(n, noise=promise if n.name in names else None) for n in options.remote.nodes)
        spares = tuple(replace(n, noise=promise if n.name in names else None) for n in options.remote.spares)
        return replace(options, remote=replace(options.remote, nodes=nodes, spares=spares))

    def noisy_hops(options: RingOptions | None) -> list[str]:
        assert options is not None
        rows = [options.row_noise(i) for i in range(options.num_nodes)]
        assert {*rows} <= {promise.row, None}
        return [name for name, row in zip(options.node_names, rows, strict=True) if row is not None]

    wide = with_noise(ring({"desk": 6, "pi1": 4, "pi2": 2, "pi3": 2}, ("pi4",)), "pi2", "pi3", "pi4")
    able = dict.fromkeys(wide.node_names, ANY)
    assert noisy_hops(wide) == ["pi1"], "pi2 hands on what is noisy already"
    assert noisy_hops(with_survivors(wide, ["pi1"], able)) == ["desk"]
    assert noisy_hops(with_survivors(wide, ["pi2"], able)) == ["pi1"]
    assert noisy_hops(with_survivors(wide, ["pi2", "pi3"], able)) == []
    assert noisy_hops(with_spares(wide, ["pi1"], ["pi4"])) == ["desk"]
    assert noisy_hops(with_survivors(wide, ["pi1", "pi2", "pi3"], able)) == []
    assert not is_like(wide, with_noise(wide, "pi3", "pi4")), "another promise is another Ring"
