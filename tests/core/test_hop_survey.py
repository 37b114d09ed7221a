"""Delays and bandwidths of Hops come out right though every Node has a clock of its own."""

from dataclasses import dataclass, field, replace

import pytest

from mdiq.core.control import BurstArrived, SendBurst
from mdiq.core.frame import Frame, FrameKind
from mdiq.core.hop_survey import (
    BURST_FRAMES,
    ENOUGH_S,
    FIRST_FRAME_BYTES,
    MAX_FRAME_BYTES,
    NUM_SINGLE,
    BurstMeter,
    BurstReport,
    HopLink,
    HopSurvey,
    burst_frames,
)
from mdiq.core.types import Epoch
from mdiq.core.wire import WireLimits, decode, encode

EPOCH = Epoch(3)
KEY = bytes(range(32))
LIMITS = WireLimits(max_width=576, max_context=8_192)


@dataclass
class World:
    """Hops between Nodes whose clocks are ``ahead`` seconds ahead of the Starter's.

    control_s: of the control channel to and from each Node. late_s: what each single Frame waits for on its way.
    held_up_s: by the number of a burst, what its last Frame waits for.
    """

    delays_s: list[float]
    rates: list[float]
    ahead: list[float]
    control_s: list[tuple[float, float]]
    late_s: list[float] = field(default_factory=lambda: [0.0])
    held_up_s: dict[int, float] = field(default_factory=dict)
    now: float = 100.0
    seconds: float = 0.0
    sent: list[tuple[int, int, int]] = field(default_factory=list)

    def run(self, hop: int, burst: SendBurst) -> BurstReport:
        """Send a burst; its Frames follow each other as fast as the Hop carries them."""
        size = len(self.delays_s)
        self.sent.append((hop, burst.num_frames, burst.frame_bytes))
        to_s, back_s = self.control_s[hop]
        asked_s, sent_s = self.now, self.now + to_s
        late_s = self.late_s[len(self.sent) % len(self.late_s)]
        first_s = sent_s + self.delays_s[hop] + late_s
        later_bytes = (burst.num_frames - 1) * burst.frame_bytes
        last_s = first_s + later_bytes / self.rates[hop] + self.held_up_s.get(len(self.sent), 0.0)
        self.seconds += last_s - first_s
        self.now = last_s + 0.01
        receiver_ahead = self.ahead[(hop + 1) % size]
        arrived = BurstArrived(EPOCH, burst.number, first_s + receiver_ahead, last_s + receiver_ahead, later_bytes)
        return BurstReport(asked_s, sent_s + back_s, sent_s + self.ahead[hop], arrived)

    def survey(self) -> tuple[HopLink | None, ...]:
        survey = HopSurvey(EPOCH, len(self.delays_s))
        while (wanted := survey.next_burst()) is not None:
            survey.reported(self.run(*wanted))
        return survey.links()


def _links(world: World) -> list[HopLink]:
    links = world.survey()
    assert None not in links
    return [link for link in links if link is not None]


def test_each_hop_has_its_delay_whatever_the_clocks_show() -> None:
    world = World([0.02, 0.05, 0.0], [1e9] * 3, [0.0, 5_000.0, -77.0], [(0.0, 0.0), (0.001, 0.001), (0.004, 0.004)])
    assert [link.delay_s for link in _links(world)] == pytest.approx([0.02, 0.05, 0.0], abs=1e-6)


def test_the_sum_of_the_delays_is_right_even_where_the_control_channel_is_not_even() -> None:
    world = World([0.02, 0.05, 0.03], [1e9] * 3, [0.0, 5_000.0, -77.0], [(0.0, 0.0), (0.001, 0.005), (0.0, 0.004)])
    delays_s = [link.delay_s for link in _links(world)]
    assert sum(delays_s) == pytest.approx(0.1, abs=1e-6)
    assert delays_s == pytest.approx([0.02, 0.05, 0.03], abs=0.005)


def test_no_delay_is_less_than_nothing() -> None:
    world = World([0.0, 0.0], [1e9] * 2, [0.0, 9.0], [(0.0, 0.0), (0.01, 0.0)])
    assert min(link.delay_s for link in _links(world)) == 0.0


def test_the_quickest_of_several_frames_gives_the_delay() -> None:
    world = World([0.02, 0.05], [1e9] * 2, [0.0, 9.0], [(0.0, 0.0), (0.0, 0.0)], late_s=[0.4, 0.0, 0.2])
    assert [link.delay_s for link in _links(world)] == pytest.approx([0.02, 0.05], abs=1e-6)
    assert world.sent[:NUM_SINGLE] == [(0, 1, 64)] * NUM_SINGLE


@pytest.mark.parametrize("rate", [2_000.0, 1.25e6, 1e8, 1e12])
def test_bandwidth_is_measured_with_bursts_that_suit_it(rate: float) -> None:
    world = World([0.02, 0.0], [rate, 1e9], [0.0, 9.0], [(0.0, 0.0), (0.0, 0.0)])
    assert _links(world)[0].bytes_per_s == pytest.approx(rate, rel=0.3 if rate > 1e11 else 1e-6)
    sizes = [frame_bytes for hop, num_frames, frame_bytes in world.sent if hop == 0 and num_frames == BURST_FRAMES]
    assert sizes == sorted(sizes)
    assert sizes[-1] <= MAX_FRAME_BYTES


def test_a_slow_link_is_not_kept_busy_for_long() -> None:
    for rate in (20_000.0, 125_000.0, 600_000.0, 1.25e6):
        world = World([0.0, 0.0], [rate, 1e9], [0.0, 9.0], [(0.0, 0.0), (0.0, 0.0)])
        world.survey()
        assert world.seconds < 6 * ENOUGH_S


@pytest.mark.parametrize("late", range(1, 7))
def test_a_burst_that_is_held_up_on_its_way_does_not_spoil_the_rate(late: int) -> None:
    number = NUM_SINGLE + late
    world = World([0.0, 0.0], [1e8, 1e9], [0.0, 9.0], [(0.0, 0.0)] * 2, held_up_s={number: 2 * ENOUGH_S})
    assert _links(world)[0].bytes_per_s == pytest.approx(1e8)
    assert world.sent[number] == world.sent[number - 1], "it is sent again"


def test_of_two_bursts_that_are_held_up_the_better_counts() -> None:
    world = World([0.0, 0.0], [1e6, 1e9], [0.0, 9.0], [(0.0, 0.0)] * 2, held_up_s={6: 1.0, 7: 0.5})
    first_bytes = 15 * FIRST_FRAME_BYTES
    assert _links(world)[0].bytes_per_s == pytest.approx(first_bytes / (0.5 + first_bytes / 1e6))


def test_a_hop_that_loses_a_burst_is_given_up_and_the_others_are_measured() -> None:
    world = World([0.02, 0.05, 0.03], [1e9] * 3, [0.0, 5.0, -7.0], [(0.0, 0.0)] * 3)
    survey = HopSurvey(EPOCH, 3)
    while (wanted := survey.next_burst()) is not None:
        hop, burst = wanted
        if hop == 1 and burst.num_frames > 1:
            survey.missed()
        else:
            survey.reported(world.run(hop, burst))
    first, second, third = survey.links()
    assert second is None
    assert first is not None and first.delay_s == pytest.approx(0.02, abs=1e-6)
    assert third is not None and third.delay_s == pytest.approx(0.03, abs=1e-6)


def test_a_burst_of_which_only_the_last_frame_came_gives_no_rate_of_nothing() -> None:
    """A connection that is made anew in its midst loses the others; a Hop of no bytes a second would bar take-overs."""
    world = World([0.01, 0.02], [1e6, 1e7], [0.0, 9.0], [(0.0, 0.0)] * 2)
    survey = HopSurvey(EPOCH, 2)
    while (wanted := survey.next_burst()) is not None:
        report = world.run(*wanted)
        hop, burst = wanted
        if hop == 0 and burst.num_frames > 1:
            last_s = report.arrived.last_s
            report = replace(report, arrived=BurstArrived(EPOCH, burst.number, last_s, last_s, 0))
        survey.reported(report)
    first, second = survey.links()
    assert first is None and second is not None and second.bytes_per_s == pytest.approx(1e7)


def test_a_node_that_never_answered_has_an_unknown_clock_so_the_hop_into_it_is_unknown_too() -> None:
    world = World([0.02, 0.05, 0.03], [1e9] * 3, [0.0, 5.0, -7.0], [(0.0, 0.0)] * 3)
    survey = HopSurvey(EPOCH, 3)
    while (wanted := survey.next_burst()) is not None:
        if wanted[0] == 1:
            survey.missed()
        else:
            survey.reported(world.run(*wanted))
    assert [link is None for link in survey.links()] == [True, True, False]


@pytest.mark.parametrize("limits", [LIMITS, WireLimits(max_width=4, max_context=64), WireLimits(max_width=8_192)])
@pytest.mark.parametrize("frame_bytes", [1, 64, 5_000, MAX_FRAME_BYTES])
def test_the_frames_of_a_burst_are_legal_and_count_down(limits: WireLimits, frame_bytes: int) -> None:
    frames = burst_frames(SendBurst(EPOCH, 9, 16, frame_bytes), limits)
    decoded = [decode(encode(frame, KEY), KEY, limits) for frame in frames]
    assert [(frame.kind, frame.epoch, frame.segments[0].seq_id) for frame in decoded] == [
        (FrameKind.BURST, EPOCH, 9)
    ] * 16
    assert [frame.segments[0].start for frame in decoded] == list(range(15, -1, -1))
    size = len(decoded[0].payload.parts()[2][0])
    assert size <= max(frame_bytes, 4)
    if limits is LIMITS:
        assert size >= frame_bytes * 0.9 or frame_bytes == 1


def _frames(number: int, num_frames: int) -> list[Frame]:
    return burst_frames(SendBurst(EPOCH, number, num_frames, 400), LIMITS)


def test_the_far_end_times_a_whole_burst_and_counts_what_came_behind_the_first_frame() -> None:
    meter = BurstMeter()
    reports = [meter.arrived(frame, 1.0 + i) for i, frame in enumerate(_frames(5, 3))]
    assert reports == [None, None, BurstArrived(EPOCH, 5, 1.0, 3.0, 2 * (400 + 51))]
    (single,) = _frames(6, 1)
    assert meter.arrived(single, 9.0) == BurstArrived(EPOCH, 6, 9.0, 9.0, 0)


def test_a_burst_that_breaks_off_is_forgotten_when_the_next_one_comes() -> None:
    meter = BurstMeter()
    for frame in _frames(5, 3)[:2]:
        assert meter.arrived(frame, 1.0) is None
    first, last = _frames(6, 2)
    assert meter.arrived(first, 7.0) is None
    assert meter.arrived(last, 8.0) == BurstArrived(EPOCH, 6, 7.0, 8.0, 451)
