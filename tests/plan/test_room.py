"""A model that has no room, and what is said of it."""

import pytest

from mdiq.errors import PlanError
from mdiq.plan.partition import Goal
from mdiq.plan.room import check_room, count_layers, format_bytes, held_layers, min_nodes
from tests.plan.profiles import INT4, MODEL, node


def _refusal(*nodes: tuple[str, int], spares: tuple[tuple[str, int], ...] = (), kv_tokens: int = 2_048) -> str:
    profiles, spare = ([node(name, memory_mib=mib) for name, mib in group] for group in (nodes, spares))
    with pytest.raises(PlanError) as caught:
        check_room(MODEL, profiles, Goal(kv_tokens=kv_tokens), spare)
    return str(caught.value)


def test_a_model_that_fits_is_let_through() -> None:
    check_room(MODEL, [node("desk", memory_mib=480 + 16 * 56), node("pi1", memory_mib=360 + 16 * 56)], Goal())


def test_a_model_that_does_not_fit_says_who_holds_what_and_what_would_help() -> None:
    assert _refusal(("desk", 1_000), ("pi1", 700)) == (
        "plan: 32 layers of 56 MiB each with 2,048 tokens of KV cache do not fit; the nodes hold desk 9 (of 1000 MiB), "
        "pi1 6 (of 700 MiB); 17 layers or 952 MiB too many: add one device that gives 1.5 GiB"
    )


def test_a_spare_node_that_would_do_is_named() -> None:
    text = _refusal(("desk", 1_000), ("pi1", 900), spares=(("pi2", 1_200),))
    assert text.endswith("add one device that gives 1.25 GiB, or let pi2 take part (spare: false)")
    assert "spare" not in _refusal(("desk", 1_000), ("pi1", 900), spares=(("pi2", 700),))


def test_smaller_weights_and_a_smaller_kv_cache_are_advised_where_they_do() -> None:
    assert _refusal(("desk", 1_200), ("pi1", 1_300)).endswith(
        "; 4 layers or 224 MiB too many: add one device that gives 0.75 GiB, or weights int4, "
        "or take 1,440 tokens of KV cache"
    )
    check_room(INT4, [node("desk", memory_mib=1_200), node("pi1", memory_mib=1_300)], Goal())
    check_room(MODEL, [node("desk", memory_mib=1_200), node("pi1", memory_mib=1_300)], Goal(kv_tokens=1_440))
    _refusal(("desk", 1_200), ("pi1", 1_300), kv_tokens=1_472)


def test_a_starter_that_cannot_hold_its_ends_and_a_layer_says_so() -> None:
    assert _refusal(("desk", 500), ("pi1", 9_000)) == (
        "desk: as the Starter it needs 536 MiB, of which embedding and head take 120 MiB and one layer with 2,048 "
        "tokens of KV cache 56 MiB, and it may take 500 MiB; raise its memory or make a larger node the starter"
    )


def test_the_least_number_of_nodes_is_that_of_the_largest() -> None:
    nodes = [node("desk", memory_mib=1_000), node("pi1", memory_mib=700), node("pi2", memory_mib=1_800)]
    assert held_layers(MODEL, nodes, 2_048) == [9, 6, 25]
    assert min_nodes(MODEL, nodes, 2_048) == 2
    assert min_nodes(MODEL, [node("desk"), *nodes[1:]], 2_048) == 1
    assert min_nodes(MODEL, [nodes[0], nodes[1], nodes[1], nodes[1], nodes[1]], 2_048) == 5


def test_sizes_are_written_as_operators_write_them() -> None:
    assert [format_bytes(n << 20) for n in (812, 1_023, 1_536)] == ["812 MiB", "1023 MiB", "1.5 GiB"]
    assert [count_layers(n) for n in (1, 2)] == ["1 layer", "2 layers"]


def test_trusted_layers_that_the_starter_cannot_hold_say_what_to_do() -> None:
    def refusal(memory_mib: int, min_starter_layers: int) -> str:
        with pytest.raises(PlanError) as caught:
            nodes = [node("desk", memory_mib=memory_mib), node("pi1")]
            check_room(MODEL, nodes, Goal(min_starter_layers=min_starter_layers))
        return str(caught.value)

    assert refusal(480 + 5 * 56, 8) == (
        "min_starter_layers: 8 layers with 2,048 tokens of KV cache are to stay on desk, and its 760 MiB hold 5; give "
        "it 168 MiB more, or make a larger node the starter, or write min_starter_layers: 5, or use weights int4"
    )
    assert refusal(4_096, 33) == (
        "min_starter_layers: 33 layers are to stay on desk, and the model has 32; write 32 or less"
    )
    check_room(MODEL, [node("desk", memory_mib=480 + 8 * 56), node("pi1")], Goal(min_starter_layers=8))
