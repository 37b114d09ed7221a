"""Predictions whose values can be computed by hand."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdiq.core.types import NodeId
from mdiq.plan.micro_batches import Curve
from mdiq.plan.profile import FRAME_BYTES, SEGMENT_BYTES
from mdiq.report.catalogue import Catalogue, Figure, LinkKind, Mark, MeasuredLayers, read_catalogues
from mdiq.report.simulate import simulate, sources, upload_s
from mdiq.report.simulate_nodes import held_as, links_of, measured_layers, model_shape, node_profile, under_quota
from mdiq.report.simulate_rings import forecast, layouts, node_names
from tests.report.devices import BILLION, BOX, BYTES, FREE, GIB, SMALL, cited, question

ONLY_BOX = Catalogue({"box": BOX})
NEAR = 1e-4  # the contexts, which are a token long


def test_a_device_that_reads_10_gb_a_second_gives_10_tokens_of_1_gb_of_weights() -> None:
    found = simulate(question(BOX), ONLY_BOX)
    assert found.figure("rate_tokens_per_s").value == pytest.approx(10, rel=NEAR)
    assert found.figure("between_tokens_s").value == pytest.approx(0.1, rel=NEAR)
    assert found.limit == "memory bandwidth of box-1"
    assert found.figure("network_bytes_per_token").value == 0


def test_a_device_of_10_gigaflops_needs_two_operations_a_weight() -> None:
    slow = replace(BOX, flop_per_s=cited(10e9))
    found = simulate(question(slow), ONLY_BOX)
    assert found.figure("rate_tokens_per_s").value == pytest.approx(5, rel=NEAR)
    assert found.limit == "compute rate of box-1"


def test_reading_once_serves_all_users_of_a_batch_until_the_arithmetic_takes_longer() -> None:
    # Per token: 0.02 s of arithmetic; to read takes 0.1 s: 5 users in 0.1 s, 10 in 0.2 s.
    device = replace(BOX, flop_per_s=cited(100e9))
    for users, rate in ((1, 10), (4, 40), (16, 50), (64, 50)):
        found = simulate(question(device, users=users), ONLY_BOX, 1)
        assert found.figure("rate_tokens_per_s").value == pytest.approx(rate, rel=0.001), users


def test_a_forward_and_a_link_add_their_time_to_a_lap() -> None:
    # The model is in two halves: 0.1 s in all, 2 x 5 ms of forwards, 2 x 20 ms of hops, and rows of 4,000 bytes.
    device = replace(SMALL, memory_bytes=cited(1.1 * GIB), forward_s=cited(0.005))
    link = LinkKind("slow", "", cited(1e6), cited(0.02))
    found = simulate(question(device, device, link=link), ONLY_BOX)
    assert len(found.stages) == 2 and sum(stage.num_layers for stage in found.stages) == 10
    send_s = (4_000 + SEGMENT_BYTES + FRAME_BYTES) / 1e6
    assert found.figure("one_user_tokens_per_s").value == pytest.approx(1 / (0.1 + 0.01 + 0.04 + 2 * send_s), rel=NEAR)
    assert found.figure("network_bytes_per_token").value == 2 * (4_000 + SEGMENT_BYTES + FRAME_BYTES)
    assert simulate(question(device, device, link=replace(link, delay_s=cited(1.0))), ONLY_BOX).limit.endswith(
        "its delay"
    )


def test_two_devices_give_one_user_no_more_and_several_nearly_twice_as_much() -> None:
    # Its arithmetic takes as long as its reading: a batch is no faster than one token after the other.
    two = replace(SMALL, memory_bytes=cited(1.1 * GIB), flop_per_s=cited(20e9))
    assert simulate(question(two, two), ONLY_BOX).figure("rate_tokens_per_s").value == pytest.approx(10, rel=NEAR)
    both = simulate(question(two, two, users=8), ONLY_BOX)
    assert both.ring.plan.in_flight > 1 and len(both.stages) == 2
    assert 17 < both.figure("rate_tokens_per_s").value < 20
    # Users who wait for a whole lap: 8 / rate.
    between_s = 8 / both.figure("rate_tokens_per_s").value
    assert both.figure("between_tokens_s").value == pytest.approx(between_s)


def test_power_is_idle_and_what_load_adds_and_energy_is_that_by_the_rate() -> None:
    found = simulate(question(BOX), ONLY_BOX)
    assert found.figure("ring_watts").value == pytest.approx(15)
    assert found.figure("joules_per_token").value == pytest.approx(1.5, rel=NEAR)
    # Of two halves each is busy for half of the time: 2 x (5 + 10 / 2).
    half = replace(SMALL, memory_bytes=cited(1.1 * GIB))
    even = replace(BILLION, vocab_size=1)
    halves = simulate(replace(question(half, half), shape=even), ONLY_BOX)
    assert halves.figure("ring_watts").value == pytest.approx(20, rel=0.001)
    assert "ring_watts" not in dict(simulate(question(replace(BOX, idle_w=None)), ONLY_BOX).figures)


def test_memory_of_a_device_is_shared_out() -> None:
    found = simulate(question(BOX), ONLY_BOX)
    (stage,) = found.stages
    assert stage.weight_bytes == 1_000_000_000
    # Keys and values of 32 tokens, in steps of a block: 2 x 10 x 100 numbers of 4 bytes in 10 layers.
    assert stage.kv_bytes == 32 * 10 * 8_000
    assert stage.free_bytes == 4 * GIB - stage.weight_bytes - stage.kv_bytes - stage.other_bytes
    assert stage.other_bytes >= 0.5 * GIB


def test_what_does_not_fit_says_what_would_help() -> None:
    found = simulate(question(SMALL), Catalogue({"box": BOX, "small": SMALL}))
    assert found.layout is None and "do not fit" in found.why_not
    assert dict(found.needed)["box"] == 1
    more = dict(found.needed)["small"]
    assert more > 1
    assert simulate(question(*[SMALL] * (1 + more)), ONLY_BOX).layout is not None
    assert simulate(question(*[SMALL] * more), ONLY_BOX).layout is None


SIZES = {
    name: replace(BOX, name=name, memory_bytes=cited(gib * GIB), read_bytes_per_s=cited(rate))
    for name, gib, rate in (("tiny", 0.55, 9e9), ("third", 0.9, 12e9), ("half", 1.1, 8e9), ("whole", 2, 7e9))
}


@given(
    st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_as_many_devices_are_asked_for_as_make_the_model_fit_so_many_rings(
    owned: list[str], num_rings: int, users: int
) -> None:
    asked = question(*(SIZES[name] for name in owned), users=users)
    found = simulate(asked, Catalogue(SIZES), num_rings)
    if found.layout is not None:
        return
    for kind in SIZES.values():
        fitting = [
            number
            for number in range(1, 3 * 10 + 1)
            if layouts(replace(asked, devices=(*asked.devices, *[kind] * number)), num_rings)
        ]
        assert dict(found.needed).get(kind.name) == (fitting[0] if fitting else None)


def test_each_of_several_rings_needs_devices_of_its_own() -> None:
    # A box holds the whole model.
    found = simulate(question(BOX, users=2), ONLY_BOX, 2)
    assert found.layout is None and found.needed == (("box", 1),)
    found = simulate(question(BOX, users=2), ONLY_BOX, 3)
    assert found.needed == (("box", 2),)


def test_a_model_that_fits_each_device_is_served_best_by_whole_copies() -> None:
    # Its arithmetic takes as long as its reading: 10 tokens/s, however many users it has.
    box = replace(BOX, flop_per_s=cited(20e9))
    found = simulate(question(*[box] * 4, users=4, link=replace(FREE, delay_s=cited(0.05))), ONLY_BOX)
    assert found.layout is not None and found.layout.num_rings == 4
    assert found.figure("rate_tokens_per_s").value == pytest.approx(40, rel=NEAR)
    assert found.figure("ring_rate_tokens_per_s").value == pytest.approx(10, rel=NEAR)
    assert {rings for rings, _, _ in found.others} == {1, 2, 3}


def test_users_go_to_the_rings_where_they_get_most() -> None:
    # A copy computes 10 tokens/s, however many users it has, and a fast one 20.
    slow = replace(BOX, flop_per_s=cited(20e9))
    fast = replace(slow, name="fast", read_bytes_per_s=cited(20e9), flop_per_s=cited(40e9))
    far = replace(FREE, delay_s=cited(1.0))
    (layout,) = layouts(question(slow, fast, slow, fast, users=6, link=far), 4)
    assert [(count, ring.devices[0].name, ring.users) for count, ring in layout.rings] == [
        (2, "fast", 2),
        (2, "box", 1),
    ]
    assert layout.rate == pytest.approx(60, rel=NEAR)
    assert node_names((fast, slow, slow)) == ["fast-1", "box-1", "box-2"]


def test_few_devices_are_divided_in_all_ways() -> None:
    # Three small ones hold the model together, and the large one holds it alone.
    third = replace(SMALL, flop_per_s=cited(20e9))
    large = replace(BOX, flop_per_s=cited(20e9))
    far = replace(FREE, delay_s=cited(0.05))
    found = simulate(question(third, third, third, large, users=12, link=far), ONLY_BOX)
    assert found.layout is not None
    assert sorted((count, ring.num_used) for count, ring in found.layout.rings) == [(1, 1), (1, 3)]
    # One alone gives 10 tokens/s, and three in a ring that is not quite full some 30.
    assert 30 < found.figure("rate_tokens_per_s").value < 40


def test_a_given_number_of_rings_needs_room_in_each() -> None:
    large, other = replace(BOX, flop_per_s=cited(20e9)), SMALL
    assert layouts(question(large, other, users=2), 2) == []
    assert [layout.num_rings for layout in layouts(question(large, other, users=2))] == [1]
    assert "not every ring holds the model" in simulate(question(large, other, users=2), ONLY_BOX, 2).why_not
    # The second of two has no user, but it could have one.
    assert [layout.num_rings for layout in layouts(question(large, large), 2)] == [1]


def test_rings_on_one_air_have_a_part_of_it_each() -> None:
    half = replace(SMALL, memory_bytes=cited(1.1 * GIB), flop_per_s=cited(20e9))
    wifi = LinkKind("wifi", "", cited(2e5), cited(0.0), is_shared=True)
    (two,) = layouts(question(*[half] * 4, users=8, link=wifi), 2)
    ((count, ring),) = two.rings
    # Four Hops share 200,000 bytes a second.
    alike = forecast(question(half, half, link=replace(wifi, bytes_per_s=cited(5e4), is_shared=False)), (half, half), 4)
    assert count == 2 and alike is not None and ring.rate == pytest.approx(alike.rate)
    assert ring.rate < 0.95 * layouts(question(half, half, users=4, link=wifi))[0].rate


def test_a_thousand_devices_are_rings_with_a_router_before_them() -> None:
    own = read_catalogues()
    pi = own.devices["pi5-8gb"]
    shape = own.models["llama-3-70b"]
    asked = replace(question(*[pi] * 1_000, users=1_000, link=own.links["gigabit"]), shape=shape, held=held_as("int4"))
    found = simulate(asked, own)
    assert found.layout is not None and 10 < found.layout.num_rings < 200 and found.layout.num_used <= 1_000
    assert {limit.name for limit in found.next_limits} == {"router", "starter's head", "links"}
    rates = [limit.at_tokens_per_s for limit in found.next_limits]
    assert rates == sorted(rates) and rates[0] > found.figure("rate_tokens_per_s").value
    router = next(limit for limit in found.next_limits if limit.name == "router")
    assert (router.at_tokens_per_s, router.mark) == (5_000, Mark.ESTIMATED)


def test_weights_travel_once_within_a_ring_and_once_to_each_starter() -> None:
    half = replace(SMALL, memory_bytes=cited(1.1 * GIB))
    asked = question(half, half, link=LinkKind("cable", "", cited(1e6), cited(0.0)))
    ring = forecast(asked, asked.devices, 1)
    assert ring is not None
    within_s, starters_s = upload_s(asked, ring, 3)
    assert within_s == pytest.approx(len(ring.plan.stages[1].layers) * 99)
    assert starters_s == pytest.approx(3_000)


def test_all_hops_share_the_air() -> None:
    wifi = LinkKind("wifi", "", cited(8e6), cited(0.003), is_shared=True)
    assert links_of(wifi, 4).between(NodeId("a"), NodeId("b")).bytes_per_s == 2e6
    assert links_of(replace(wifi, is_shared=False), 4).between(NodeId("a"), NodeId("b")).bytes_per_s == 8e6


def test_tokens_of_a_batch_meet_more_experts_together() -> None:
    mixture = replace(BILLION, num_experts=4, active_experts=2)
    shared, expert = mixture.shared_params, mixture.expert_params
    assert mixture.layer_params == shared + 4 * expert
    assert mixture.active_layer_params == mixture.read_params(1) == shared + 2 * expert
    # Two tokens leave out each of 4 experts with probability 1/4: they meet 3.
    assert mixture.read_params(2) == shared + 3 * expert
    profile = node_profile("a", BOX, mixture, BYTES)
    assert profile.layer_decode.seconds(2) == pytest.approx((shared + 3 * expert) / 10e9)
    assert model_shape(mixture, BYTES).layer_bytes == mixture.layer_params


def test_marks_are_those_of_the_weakest_figure() -> None:
    assert simulate(question(BOX), ONLY_BOX).figure("rate_tokens_per_s").mark is Mark.CITED
    guessed = replace(BOX, forward_s=Figure(0.0, Mark.ESTIMATED, "a guess"))
    found = simulate(question(guessed), ONLY_BOX)
    assert found.figure("rate_tokens_per_s").mark is Mark.ESTIMATED
    assert found.figure("joules_per_token").mark is Mark.ESTIMATED
    assert found.figure("network_bytes_per_token").mark is Mark.CITED
    assert found.stages[0].memory is Mark.CITED
    half = replace(SMALL, memory_bytes=cited(1.1 * GIB))
    link = LinkKind("given", "", Figure(1e9, Mark.ESTIMATED), Figure(0.0, Mark.GIVEN))
    assert simulate(question(half, half, link=link), ONLY_BOX).figure("rate_tokens_per_s").mark is Mark.ESTIMATED


def test_a_device_that_has_measured_such_layers_takes_its_own_times() -> None:
    layers = MeasuredLayers(
        "m", "bytes", 99_000_000, 10_000_000, Curve(((1, 0.02), (8, 0.04))), Curve(((16, 0.1),)), Curve(((1, 0.3),))
    )

    def measured(figure: Figure) -> Figure:
        return replace(figure, mark=Mark.MEASURED)

    mine = replace(
        BOX, layers=(layers,), read_bytes_per_s=measured(BOX.read_bytes_per_s), flop_per_s=measured(BOX.flop_per_s)
    )
    own = replace(BILLION, mark=Mark.MEASURED)
    found = simulate(replace(question(mine), shape=own), ONLY_BOX)
    # Ten layers of 0.02 s, less the 96 tokens of context that the measurement had, and the head.
    context_s = 96 * 8_000 / 10e9
    rate = found.figure("rate_tokens_per_s")
    assert rate.value == pytest.approx(1 / (10 * (0.02 - context_s) + 0.3), rel=1e-3)
    assert rate.mark is Mark.MEASURED
    # Layers of another size are computed from its rates: an estimate.
    other = replace(own, mlp_size=9_500)
    assert measured_layers(mine, other, BYTES) is None
    assert simulate(replace(question(mine), shape=other), ONLY_BOX).figure("rate_tokens_per_s").mark is Mark.ESTIMATED


def test_a_part_of_a_core_takes_as_much_longer() -> None:
    layers = MeasuredLayers(
        "m", "bytes", 99_000_000, 10_000_000, Curve(((1, 0.02),)), Curve(((16, 0.1),)), Curve(((1, 0.3),))
    )
    half = under_quota(replace(BOX, layers=(layers,), forward_s=cited(0.001)), 0.5)
    assert (half.read_bytes_per_s.value, half.forward_s.value) == (5e9, 0.002)
    assert half.layers[0].decode.points == ((1, 0.04),) and half.layers[0].head.points == ((1, 0.6),)
    assert half.memory_bytes == BOX.memory_bytes


def test_bits_of_weights_and_numbers_of_the_cache() -> None:
    int8, int4, plain, bf16 = held_as("int8"), held_as("int4"), held_as("plain"), held_as("plain", "bf16")
    assert [held.layer_bits for held in (int8, int4, plain, bf16)] == [8.3, 5.0, 32.0, 16.0]
    assert int4.ends_bits == 8.3  # embedding and head stay in 8
    assert model_shape(BILLION, int4).layer_bytes == round(99e6 * 5 / 8)
    assert (model_shape(BILLION, plain).kv_bytes, model_shape(BILLION, bf16).kv_bytes) == (8_000, 4_000)
    assert (model_shape(BILLION, plain).row_bytes, model_shape(BILLION, bf16).row_bytes) == (4_000, 2_000)


def test_one_more_device_of_each_kind_is_planned_with() -> None:
    fast = replace(BOX, name="fast", read_bytes_per_s=cited(40e9))
    found = simulate(question(BOX), Catalogue({"box": BOX, "fast": fast, "small": SMALL}))
    more = {each.device: each for each in found.one_more}
    assert more["fast"].rate == pytest.approx(40, rel=NEAR) and more["fast"].change == pytest.approx(3, rel=0.001)
    assert more["small"].change == pytest.approx(0, abs=0.001)


def test_the_figures_that_it_rests_on_are_named_once_a_kind() -> None:
    names = [name for name, _ in sources(question(BOX, BOX, SMALL), [BOX, BOX, SMALL], ONLY_BOX)]
    assert len(names) == len({*names}) and "box: weights read, bytes/s" in names and "free: delay, s" in names
