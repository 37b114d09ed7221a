"""The order of a trial, on rings that only keep books; and the planner's part, by hand."""

import asyncio
from typing import Any

import pytest

from mdiq.bench.workload import Load
from mdiq.core.hop_survey import HopLink
from mdiq.core.types import NodeId
from mdiq.errors import RingError
from mdiq.plan.measured import MeasuredRing, MeasuredStage, profiles_of
from mdiq.plan.micro_batches import Curve
from mdiq.plan.pace import StageCost
from mdiq.plan.partition import Split
from mdiq.report.drill import drill, kill_child
from mdiq.report.energy import Reading
from mdiq.report.gates import GateName, Limits
from mdiq.report.trial import StageRun, Trial, devices
from mdiq.runtime.recovery_times import RecoveryTimes
from tests.fake_ring import FakeRing, ring_options

LAYERS = 8
LAYER_S, HEAD_S, DELAY_S = 0.1, 0.2, 0.02


def measured(split: Split) -> MeasuredRing:
    """Return what the Nodes of a ring with such Layers say: for each row a Layer takes LAYER_S, the head HEAD_S."""

    def cost(layers: int, *, is_starter: bool) -> StageCost:
        time_s = layers * LAYER_S + is_starter * HEAD_S
        return StageCost.of(((1, time_s), (2, 2 * time_s)), ((1, time_s), (64, 64 * time_s)))

    return MeasuredRing(
        num_layers=LAYERS,
        stages=tuple(
            MeasuredStage(f"node-{i}", n, cost(n, is_starter=not i), 1000 * n, 64 * n, 5_000 + 1000 * n, 10_000)
            for i, n in enumerate(split)
        ),
        head=Curve(((1, HEAD_S), (2, 2 * HEAD_S))),
        hidden_size=8,
        hops=(("f32", HopLink(DELAY_S, 1e6)),) * len(split) if len(split) > 1 else (),
    )


class TriedFake(FakeRing):
    """A FakeRing whose Nodes have measured themselves, and that pauses when one is killed. ``wrong``: its tokens."""

    def __init__(self, split: Split, killed: list[str]) -> None:
        super().__init__(ring_options(len(split)))
        self.split, self.killed = split, killed

    async def measured(self) -> MeasuredRing:
        return measured(self.split)

    def kill(self, name: str) -> None:
        self.killed.append(name)
        now = asyncio.get_running_loop().time()
        times = RecoveryTimes(f"{name}: killed", now, back_s=now + 1, loaded_s=now + 2)
        times.begun((0,), now + 2.5)
        times.went_on(0, now + 3, has_token=True)
        self.times.append(times)


def make_trial(limits: Limits, opened: list[tuple[Split, str | None]], killed: list[str], **changes: Any) -> Trial:
    rings: list[TriedFake] = []

    def open_ring(split: Split, wire: str | None) -> TriedFake:
        opened.append((split, wire))
        rings.append(TriedFake(split, killed))
        return rings[-1]

    values: dict[str, Any] = {
        "num_layers": LAYERS,
        "head_layers": 2.0,
        "vocab_size": 50,
        "weights": "int8",
        "nodes": 3,
        "few": 2,
        "users": 2,
        "prompt_tokens": 3,
        "answer_tokens": 6,
        "seed": 0,
        "kv_tokens": 32,
        "device_bytes": None,
        "limits": limits,
        "keeps_going": False,
        "wires": ("f32",),
        "lengths": (4,),
        "rest_s": 0.0,
        "lap_s": 0.0,
        "open_ring": open_ring,
        "kill": lambda name: rings[-1].kill(name),
    }
    return Trial(**(values | changes))


EASY = Limits(min_of_predicted=0.0, max_token_s=10.0, min_gain_tuned=0.9, min_gain_all=0.9)


def stages_of(run: Any) -> list[tuple[str, int, bool, bool]]:
    stages: tuple[StageRun, ...] = run.stages
    return [(stage.name, stage.nodes, stage.is_planned, stage.passes) for stage in stages]


async def test_a_trial_goes_from_few_nodes_over_a_planned_split_to_all_nodes() -> None:
    opened: list[tuple[Split, str | None]] = []
    killed: list[str] = []
    run = await make_trial(EASY, opened, killed).run()
    assert stages_of(run) == [("few", 2, False, True), ("tuned", 2, True, True), ("all", 3, True, True)]
    # The head costs as much as two layers: with it, two Nodes have the work of five layers each.
    splits = [split for split, _ in opened]
    assert splits[:3] == [(8,), (3, 5), (3, 5)] and splits[4] == (3, 5)
    first, *others = splits[3]
    assert max(first + 2, *others) == 4 and sum(splits[3]) == LAYERS, "ten layers' worth on three Nodes"
    assert [wire for _, wire in opened] == [None] * 4 + ["f32"]
    most = f"node-{max((1, 2), key=lambda i: splits[3][i])}"
    assert killed == ["node-1", "node-1", most]
    assert run.alone.drill is None and run.alone.part is not None and run.alone.part.users == 1
    assert all(stage.equal == 2 for stage in run.stages)
    drilled = run.stages[0].drill
    assert drilled is not None and (drilled.node, drilled.equal, drilled.error) == ("node-1", 2, "")
    assert drilled.timeline["replayed_s"] == pytest.approx(3.0)
    assert drilled.recovered_s == pytest.approx(3.0, abs=0.2)
    assert [entry.tokens for entry in drilled.progress] == list(range(1, 13))
    # A FakeRing carries 10 bytes a token.
    assert [(b.has_kv_cache, b.first_per_token, b.num_tokens) for b in run.wire] == [(True, 10.0, 8), (False, 10.0, 1)]
    assert run.outlook is not None and run.outlook.num_needed >= 1


async def test_a_drill_kills_the_chosen_node_where_it_is_and_each_step_is_told() -> None:
    killed: list[str] = []
    told: list[str] = []
    run = await make_trial(EASY, [], killed, drill_node="node-2", progress=told.append).run()
    assert killed == ["node-1", "node-1", "node-2"]
    assert [stage.drill.node for stage in run.stages if stage.drill is not None] == killed
    assert told[:2] == ["alone: one node starts", "alone: one user"]
    assert "few: a ring of 2 nodes starts" in told and "all: node-2 is killed while 2 users ask" in told


@pytest.mark.parametrize(
    ("wanted", "split", "victim"),
    [
        (None, (9, 3, 5), "node-2"),
        (None, (1, 4, 4), "node-1"),
        (None, (2, 6), "node-1"),
        ("node-1", (9, 3, 5), "node-1"),
        ("node-2", (2, 6), "node-1"),
    ],
)
def test_a_drill_kills_the_node_with_the_most_layers_but_not_the_starter(
    wanted: str | None, split: Split, victim: str
) -> None:
    names = [f"node-{i}" for i in range(len(split))]
    assert make_trial(EASY, [], [], drill_node=wanted)._victim(names, split) == victim


async def test_a_gate_that_does_not_pass_ends_the_trial_unless_it_is_to_go_on() -> None:
    hard = Limits(min_of_predicted=0.0, max_token_s=0.5)  # a FakeRing takes a second for each token
    run = await make_trial(hard, [], []).run()
    assert stages_of(run) == [("few", 2, False, False)]
    assert [gate.name for gate in run.stages[0].gates if not gate.passes] == [GateName.LATENCY]
    run = await make_trial(hard, [], [], keeps_going=True).run()
    assert [stage.name for stage in run.stages] == ["few", "tuned", "all"]


async def test_more_nodes_must_bring_something() -> None:
    limits = Limits(min_of_predicted=0.0, max_token_s=10.0)  # every FakeRing is as fast as the other
    run = await make_trial(limits, [], []).run()
    assert stages_of(run)[-1] == ("all", 3, True, False)
    assert [gate.name for gate in run.stages[-1].gates if not gate.passes] == [GateName.GAIN]
    run = await make_trial(limits, [], [], nodes=2).run()
    assert stages_of(run)[-1] == ("all", 2, True, True), "as many nodes as before are to bring nothing"


# A Node takes 5,000 bytes without weights, and a Layer 1,000 with 64 for each of 32 tokens of KV cache.
HOLDS_3, HOLDS_4 = (5_000 + layers * (1_000 + 32 * 64) + 10 for layers in (3, 4))


async def test_planned_splits_keep_to_the_memory_of_a_device() -> None:
    run = await make_trial(EASY, [], [], device_bytes=HOLDS_4).run()
    assert [(stage.split, stage.is_planned) for stage in run.stages][:2] == [((3, 5), False), ((4, 4), True)]
    assert run.outlook is not None and run.outlook.num_needed == 2
    assert all(gate.passes for gate in run.stages[0].gates if gate.name is GateName.MEMORY), "a FakeRing takes 100"


async def test_where_few_devices_do_not_hold_the_model_by_the_plan_the_split_stays_even() -> None:
    run = await make_trial(EASY, [], [], device_bytes=HOLDS_3).run()
    assert [(stage.split, stage.is_planned) for stage in run.stages][:2] == [((3, 5), False), ((3, 5), False)]
    last = run.stages[-1]
    assert last.is_planned and max(last.split) == 3 and len(last.split) == 3
    run = await make_trial(EASY, [], [], device_bytes=99).run()
    assert [gate.name for gate in run.stages[0].gates if not gate.passes] == [GateName.MEMORY]
    assert run.outlook is None and "memory" in run.why_no_outlook


async def test_predictions_follow_from_what_the_nodes_measured() -> None:
    run = await make_trial(EASY, [], []).run()
    assert run.alone.predicted is not None
    assert run.alone.predicted.one == pytest.approx(1 / (LAYERS * LAYER_S + HEAD_S))
    few = run.stages[0].predicted
    assert few is not None
    # One user's lap: all layers, the head, and two hops; what a row takes on the line is a millisecond.
    assert few.one == pytest.approx(1 / (LAYERS * LAYER_S + HEAD_S + 2 * DELAY_S), rel=0.01)
    assert few.token_s == pytest.approx(2 / few.many)


def test_nodes_that_have_not_run_are_like_the_last_one_and_their_hops_like_the_worst() -> None:
    profiles = profiles_of(measured((3, 5)), "int8")
    assert profiles is not None
    nodes, links = devices(profiles, 4)
    assert [node.name for node in nodes] == ["node-0", "node-1", "node-2", "node-3"]
    assert nodes[3].layer_decode == nodes[1].layer_decode
    hop = links.between(NodeId("node-2"), NodeId("node-3"))
    assert (hop.delay_s, hop.bytes_per_s) == (DELAY_S, 1e6)


async def test_a_drill_in_which_a_request_fails_says_so() -> None:
    async with FakeRing(ring_options(2), failure=RingError("node-1: it does not come back")) as ring:
        found = await drill(ring, Load(2, 3, 6), 50, 0, "node-1", lambda _: None, [(0,), (0,)])
    assert (found.error, found.equal, found.recovered_s) == ("node-1: it does not come back", 0, None)
    assert found.timeline == {}


async def test_a_drill_in_which_an_answer_changes_counts_it() -> None:
    async with TriedFake((4, 4), []) as ring:
        answers = [(0, 1, 2, 3), (0, 1, 2, 9)]
        found = await drill(ring, Load(2, 3, 4), 50, 0, "node-1", ring.kill, answers)  # type: ignore[arg-type]
    assert found.equal == 1


def test_a_node_that_is_no_process_here_cannot_be_killed() -> None:
    with pytest.raises(RingError, match="node-77: no process"):
        kill_child("node-77")


@pytest.mark.parametrize("users", [1, 2])
async def test_energy_is_that_of_the_load_and_not_of_the_rest_after_it(
    users: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent: list[float] = [0.0]
    stream = TriedFake.stream

    async def spends(self: TriedFake, *args: Any) -> Any:
        spent[0] += 100.0
        async for event in stream(self, *args):
            yield event

    async def rests(seconds: float) -> None:
        spent[0] += 7.0

    monkeypatch.setattr(TriedFake, "stream", spends)
    monkeypatch.setattr("mdiq.report.measure.asyncio.sleep", rests)
    monkeypatch.setattr("mdiq.report.measure.read_energy", lambda: Reading("rapl", ((spent[0], 1e9),)))
    run = await make_trial(EASY, [], [], users=users).run()
    for stage in (run.alone, *run.stages):
        assert (stage.energy.source, stage.energy.joules) == ("rapl", 100.0 * users)
        assert stage.energy.joules_per_token == pytest.approx(100.0 / 6)
