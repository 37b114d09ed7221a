"""Which Hop carries nothing, by what both its ends report; and what is to be done about it."""

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import pytest

from mdiq.core.hop_watch import AGAIN_S, BARRED_S, FRESH_S, MIN_PROBES, Arrivals, HopTroubles, HopWatch
from mdiq.core.types import Epoch

SILENCE_S = 5.0
FIRST, SECOND = Epoch(7), Epoch(8)


@dataclass
class World:
    """A Ring whose PROBEs go round each second, and whose Nodes report each second; looked at each half second.

    passes: returns what a Hop makes of a PROBE: seconds for its way, or None if it is lost. trickles: Hops on which
    bytes of something large arrive all the time. reports: returns whether a Node's report comes, at a time.
    """

    num_nodes: int = 3
    passes: Callable[[int, float], float | None] = lambda *_: 0.01
    trickles: Callable[[int, float], bool] = lambda *_: False
    reports: Callable[[int, float], float | None] = lambda *_: 0.01
    found: list[tuple[int, float]] = field(default_factory=list)

    def run(self, until_s: float) -> list[tuple[int, float]]:
        """Return which Hops were found dead, each time that the watch was asked, and when."""
        n, watch = self.num_nodes, HopWatch(self.num_nodes, SILENCE_S)
        events: list[tuple[float, int, Callable[[float], None]]] = []
        newest, inflow = [0] * n, [0] * n
        order = itertools.count()

        def at(time_s: float, act: Callable[[float], None]) -> None:
            heapq.heappush(events, (time_s, next(order), act))

        def probe(number: int) -> Callable[[float], None]:
            return lambda now: watch.sent(number, now)

        def arrives(node: int, number: int) -> Callable[[float], None]:
            def act(_: float) -> None:
                newest[node] = max(newest[node], number)
                inflow[node] += 100

            return act

        def reported(node: int, seen_at: float) -> None:
            late_s = self.reports(node, seen_at)
            if late_s is not None:
                seen = Arrivals(newest[node], inflow[node])
                at(seen_at + late_s, lambda now: watch.heard(node, seen, now))

        def report(node: int) -> Callable[[float], None]:
            return lambda now: reported(node, now)

        def look(now: float) -> None:
            watch.heard(0, Arrivals(newest[0], inflow[0]), now)
            for hop in range(n):
                if self.trickles(hop, now):
                    inflow[(hop + 1) % n] += 1
            if (dead := watch.dead(now)) is not None:
                self.found.append((dead, now))

        for number, second in enumerate(range(int(until_s)), 1):
            at(float(second), probe(number))
            sent_at: float = second
            for hop in range(n):
                took_s = self.passes(hop, sent_at)
                if took_s is None:
                    break
                sent_at += took_s
                at(sent_at, arrives((hop + 1) % n, number))
            for node in range(1, n):
                at(second + 0.3 * node, report(node))
            at(second + 0.25, look)
            at(second + 0.75, look)
        while events:
            now, _, act = heapq.heappop(events)
            act(now)
        return self.found


def cut(hops: Iterable[int], start_s: float, stop_s: float = 1e9) -> Callable[[int, float], float | None]:
    lost = {*hops}
    return lambda hop, now: None if hop in lost and start_s <= now < stop_s else 0.01


@pytest.mark.parametrize("num_nodes", [2, 3, 5])
def test_a_ring_that_carries_is_never_taken_for_dead(num_nodes: int) -> None:
    assert World(num_nodes).run(120) == []


@pytest.mark.parametrize(("num_nodes", "hop"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (5, 3)])
def test_a_hop_that_is_cut_is_found_and_those_after_it_are_not(num_nodes: int, hop: int) -> None:
    found = World(num_nodes, cut([hop], 20.0)).run(60)
    assert {dead for dead, _ in found} == {hop}
    assert 20.0 + SILENCE_S <= found[0][1] <= 20.0 + SILENCE_S + 3.0


def test_of_two_dead_hops_the_first_is_found_and_then_the_other() -> None:
    """The second one's sender has nothing new while the first is dead: it is found once the first is mended."""
    found = World(4, lambda hop, now: cut([1], 20.0, 40.0)(hop, now) and cut([2], 20.0)(hop, now)).run(60)
    assert [dead for dead, _ in itertools.groupby(dead for dead, _ in found)] == [1, 2]
    assert min(at for dead, at in found if dead == 2) > 40.0


@pytest.mark.parametrize("lasts_s", [1.0, 3.0, 4.5])
def test_a_cut_shorter_than_the_silence_is_not_found(lasts_s: float) -> None:
    assert World(passes=cut([1], 20.0, 20.0 + lasts_s)).run(60) == []


def test_a_large_message_that_takes_a_minute_is_not_a_dead_hop() -> None:
    """No PROBE passes it, and no message is whole until its end; but bytes arrive."""
    world = World(passes=cut([1], 20.0, 80.0), trickles=lambda hop, now: hop == 1 and 20.0 <= now < 80.0)
    assert world.run(120) == []


def test_a_hop_that_stops_in_the_midst_of_a_large_message_is_dead() -> None:
    found = World(passes=cut([1], 20.0), trickles=lambda hop, now: hop == 1 and 20.0 <= now < 50.0).run(80)
    assert {dead for dead, _ in found} == {1} and found[0][1] > 50.0 + SILENCE_S - 1.0


@pytest.mark.parametrize("seed", range(20))
def test_slow_and_uneven_hops_and_late_reports_are_not_taken_for_dead(seed: int) -> None:
    rng = random.Random(seed)
    slow = [rng.choice((0.01, 1.0, 8.0, 30.0)) for _ in range(4)]
    world = World(
        4,
        passes=lambda hop, _: slow[hop] + rng.uniform(0.0, 1.0),
        reports=lambda *_: rng.choice((0.01, 0.5, 1.5, None)),
    )
    # What was sent a while ago arrives all the time; only until the first has come nothing does.
    assert [at for _, at in world.run(200) if at > sum(slow) + SILENCE_S + 3.0] == []


@pytest.mark.parametrize("silent", [1, 2])
def test_a_node_that_is_not_heard_says_nothing_of_its_hops(silent: int) -> None:
    """It may be gone, with its Hops; that is for another watch."""
    reports: Callable[[int, float], float | None] = lambda node, now: None if node == silent and now > 20.0 else 0.01  # noqa: E731
    assert World(passes=cut([1], 21.0), reports=reports).run(80) == []


def test_reports_that_come_all_at_once_after_a_stall_tell_of_no_dead_hop() -> None:
    reports: Callable[[int, float], float | None] = lambda node, now: (  # noqa: E731
        31.0 - now if node == 2 and 20.0 < now < 31.0 else 0.01
    )
    assert World(reports=reports).run(80) == []


def test_some_lost_heartbeats_only_delay_it() -> None:
    rng = random.Random(5)
    found = World(passes=cut([1], 20.0), reports=lambda *_: None if rng.random() < 0.3 else 0.01).run(60)
    assert {dead for dead, _ in found} == {1} and found[0][1] < 20.0 + SILENCE_S + 8.0


def _still(watch: HopWatch, probes: Mapping[int, int], since_s: float, until_s: float) -> None:
    for second in range(int(since_s), int(until_s) + 1):
        for node, probe in probes.items():
            watch.heard(node, Arrivals(probe, 100 * probe), second)


def test_a_single_probe_that_was_lost_on_the_way_to_an_idle_hop_is_nothing() -> None:
    """The one before it died then, so that no newer one comes: its sender has one that it never passed on."""
    watch = HopWatch(3, SILENCE_S)
    watch.sent(9 + MIN_PROBES, 0.0)
    _still(watch, {1: 9, 2: 8, 0: 8}, 0, 20)
    assert watch.dead(20.0) == 0
    watch = HopWatch(3, SILENCE_S)
    watch.sent(9, 0.0)
    _still(watch, {1: 9, 2: 8, 0: 8}, 0, 20)
    assert watch.dead(20.0) is None


def test_before_a_node_has_reported_in_this_epoch_nothing_is_known() -> None:
    watch = HopWatch(2, SILENCE_S)
    watch.sent(50, 0.0)
    assert watch.dead(100.0) is None and watch.probe(0) == 0
    _still(watch, {1: 0}, 100, 100 + SILENCE_S)
    assert watch.dead(100.0 + SILENCE_S) == 0


def test_counters_that_begin_anew_are_news() -> None:
    watch = HopWatch(2, SILENCE_S)
    watch.sent(50, 0.0)
    _still(watch, {1: 40}, 0, 4)
    watch.heard(1, Arrivals(2, 10), 4.5)
    _still(watch, {1: 2}, 5, 9)
    assert watch.dead(9.0) is None
    _still(watch, {1: 2}, 10, 11)
    assert watch.dead(11.0) == 0


def test_time_for_which_the_watcher_itself_was_stopped_does_not_count() -> None:
    watch = HopWatch(2, SILENCE_S)
    watch.sent(50, 0.0)
    _still(watch, {1: 40}, 0, 4)
    watch.stretch(56.0)
    assert watch.dead(60.0) is None, "it has not read yet what has come"
    watch.heard(1, Arrivals(40, 4_000), 60.0)
    assert watch.dead(60.0) is None
    watch.heard(1, Arrivals(40, 4_000), 61.0)
    assert watch.dead(61.0) == 0
    assert watch.dead(61.0 + FRESH_S + 1.0) is None


AB, BC = ("a", "b"), ("b", "c")


def test_a_hop_is_tried_again_first_and_its_end_replaced_when_that_did_not_help() -> None:
    troubles = HopTroubles()
    assert not troubles.died(AB, FIRST, 4, 10.0)
    assert troubles.dead_among([AB, BC]) == [AB] and (troubles.num_at("b"), troubles.num_at("c")) == (1, 0)
    assert not troubles.came(AB, FIRST, 4, 11.0), "it had come before"
    assert not troubles.came(AB, SECOND, 0, 11.0) and not troubles.came(BC, SECOND, 9, 11.0)
    assert troubles.died(AB, SECOND, 0, 2_000.0), "nothing has come since, however long ago that is"


@pytest.mark.parametrize(("later_s", "is_again"), [(1.0, True), (AGAIN_S - 1.0, True), (AGAIN_S + 1.0, False)])
def test_a_hop_that_carried_again_has_another_chance_after_a_while(later_s: float, is_again: bool) -> None:
    troubles = HopTroubles()
    troubles.died(AB, FIRST, 4, 10.0)
    assert troubles.came(AB, SECOND, 1, 12.0) and not troubles.came(AB, SECOND, 2, 13.0)
    assert troubles.dead_among([AB]) == []
    assert troubles.died(AB, SECOND, 9, 12.0 + later_s) is is_again


def test_a_node_that_is_barred_for_a_hop_is_let_in_when_it_carries_again() -> None:
    troubles = HopTroubles()
    troubles.died(AB, FIRST, 4, 10.0)
    troubles.bar("b", AB, 10.0)
    assert not troubles.let_in(["a", "b"], 10_000.0, all_of_ring=False), "nothing has come"
    assert troubles.came(AB, FIRST, 5, 12.0) and not troubles.barred


def test_a_node_that_is_left_out_is_let_in_after_a_while_and_one_of_the_ring_when_no_probe_can_tell() -> None:
    troubles = HopTroubles()
    troubles.bar("b", AB, 10.0)
    troubles.bar("c", BC, 20.0)
    assert not troubles.let_in(["a"], 10.0 + BARRED_S - 1.0, all_of_ring=True)
    assert troubles.let_in(["a"], 10.0 + BARRED_S, all_of_ring=False) and [*troubles.barred] == ["c"]
    assert troubles.let_in(["a", "c"], 11.0 + BARRED_S, all_of_ring=True) and not troubles.barred
