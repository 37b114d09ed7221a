"""Check predictions against rings on this machine, with CPU quotas and slow links: `mdiq simulate --check`.

This machine measures itself first, as for the catalogue; a Node with a part of a core is predicted to take as much
longer. Then each ring is formed with the split that was predicted, and loaded.
"""

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

from mdiq.bench.figures import UserTimes, load_figures
from mdiq.bench.runner import WARM_UP_TOKENS, run_load
from mdiq.bench.workload import Load
from mdiq.core.ring_settings import RingSettings
from mdiq.core.types import LayerRange, NodeId, WeightSettings
from mdiq.engine.model_config import read_config
from mdiq.errors import PlanError
from mdiq.plan.first_token import first_token_s
from mdiq.plan.partition import Objective, find_split
from mdiq.plan.plan import plan_split
from mdiq.plan.profile import HopProfile, Links, NodeProfile
from mdiq.report.catalogue import Figure, LinkKind, Mark
from mdiq.report.simulate_measure import Machine
from mdiq.report.simulate_nodes import under_quota
from mdiq.report.simulate_rings import KV_STEP, Question, node_profiles
from mdiq.runtime.epochs import LOOPBACK_HOP_S
from mdiq.runtime.options import Outages, RingOptions
from mdiq.runtime.ring_host import RingHost
from mdiq.testbed.cpu_quota import CpuQuota, check_quota, period_us
from mdiq.testbed.link_shape import LinkShape
from mdiq.testbed.slow_ring import SlowRing

BOUND = 0.2
"""Largest error of the rate that a prediction may have."""
PROMPT_TOKENS = 16
ANSWER_TOKENS = 96
_SEED = 3
_ANY_LINK = LinkKind("loopback", "loopback", Figure(1e9, Mark.GIVEN), Figure(LOOPBACK_HOP_S, Mark.GIVEN))
_UNLIMITED = 1e12  # bytes per second: of a link without a limit


@dataclass(frozen=True, slots=True)
class Case:
    """One ring. cpus: cores of each Node, the Starter first; None sets no limit. users: of its load."""

    name: str
    num_nodes: int
    users: int
    cpus: tuple[float, ...] | None = None
    link: LinkShape | None = None


MAX_CPU = 1.5
"""Cores that the Nodes of a ring take together, unless the user says otherwise: less than this machine has."""
_USERS_A_NODE = 6


def cases(cpu: float = MAX_CPU) -> tuple[Case, ...]:
    """Return the five rings, with so many cores for the Nodes of each together."""
    third = (cpu / 3,) * 3
    users = 3 * _USERS_A_NODE
    return (
        Case("2 nodes", 2, 2 * _USERS_A_NODE, (cpu / 2,) * 2),
        Case("3 nodes", 3, users, third),
        Case("3 nodes, 20 ms", 3, 2 * users, third, LinkShape(delay_s=0.02)),
        Case("3 nodes, 50 Mbit/s", 3, users, third, LinkShape(bandwidth_bit_per_s=50e6)),
        Case("3 unlike nodes", 3, users, (0.5 * cpu, 0.28 * cpu, 0.22 * cpu)),
    )


def frozen_s(cpu: float) -> float:
    """Return how long a frame waits on average for a Node that has a part of a core, and uses all of it.

    Its group is frozen for (1 - cpu) of each period, event loop included. A frame that arrives in that part, as
    (1 - cpu) of them do, waits for half of it. A slow device is not frozen: this holds for the rings here alone.
    """
    return (1 - min(cpu, 1.0)) ** 2 * period_us(cpu) / 1e6 / 2


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is predicted for a case. layers: of each Node."""

    layers: tuple[int, ...]
    rate_tokens_per_s: float
    one_user_tokens_per_s: float
    first_token_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """A case, predicted and measured. error: of the rate with all users, against the measured one."""

    case: Case
    forecast: Forecast
    rate_tokens_per_s: float
    one_user_tokens_per_s: float
    first_token_s: float

    @property
    def error(self) -> float:
        return self.forecast.rate_tokens_per_s / self.rate_tokens_per_s - 1


def prepare(cases: Sequence[Case]) -> None:
    """Check what the rings need.

    Raises:
        ConfigError: this machine does not let this process limit CPU time.
    """
    if any(case.cpus is not None for case in cases):
        check_quota()


def measured_in_part(measure: Callable[[], Machine], cpu: float) -> Machine:
    """Return what this machine measures with a part of a core, as if it had a whole one.

    Raises:
        ConfigError: this machine does not let this process limit CPU time.
    """
    quota = CpuQuota.create("measure", cpu, comes_first=True)
    try:
        quota.add(os.getpid())
        machine = measure()
    finally:
        quota.close()
    return replace(machine, device=under_quota(machine.device, 1 / cpu))


def predict(machine: Machine, case: Case) -> Forecast:
    """Return what the planner makes of a ring of this machine's parts.

    Raises:
        PlanError: the model does not fit.
    """
    cpus = case.cpus or (1.0,) * case.num_nodes
    devices = tuple(under_quota(machine.device, cpu) for cpu in cpus)
    question = Question(machine.shape, machine.held, devices, _ANY_LINK, case.users, PROMPT_TOKENS, ANSWER_TOKENS)
    nodes = [
        replace(node, name=NodeId(f"node-{i}"))  # as on this machine
        for i, node in enumerate(node_profiles(question, devices))
    ]
    model, links = question.model, _links(case, nodes)
    goal = replace(question.goal(case.users), objective=Objective.THROUGHPUT)
    found = find_split(model, nodes, links, goal, all_nodes=True)
    if found is None:
        raise PlanError(f"{case.name}: the model does not fit; take a smaller one")
    plan = plan_split(model, nodes, links, goal, found[0])
    return Forecast(found[0], plan.rate, plan.rate_one, first_token_s(plan, PROMPT_TOKENS))


def rate_of_all(users: Sequence[UserTimes]) -> float:
    """Return the tokens per second from the last user's first token to the first user's last one: while all decode.

    Where there is no such time, the prompts took too long: it is then the rate after the last first token.
    """
    start_s, end_s = max(user.tokens_s[0] for user in users), min(user.tokens_s[-1] for user in users)
    if end_s <= start_s:
        return load_figures(users).decode_tokens_per_s
    return sum(start_s < at_s <= end_s for user in users for at_s in user.tokens_s) / (end_s - start_s)


async def check(
    machine: Machine, model: Path, cases: Sequence[Case], progress: Callable[[str], object] = lambda _: None
) -> list[Result]:
    """Return the cases, predicted and measured.

    Raises:
        MdiqError: a ring failed.
    """
    vocab_size = read_config(model).vocab_size
    results = []
    for case in cases:
        forecast = predict(machine, case)
        progress(f"{case.name}: {forecast.rate_tokens_per_s:.1f} tokens/s predicted for {case.users} users; measuring")
        results.append(await _measure(machine, model, case, forecast, vocab_size))
    return results


async def _measure(machine: Machine, model: Path, case: Case, forecast: Forecast, vocab_size: int) -> Result:
    stops = accumulate(forecast.layers, initial=0)
    cpu = None if case.cpus is None else {f"node-{i}": cpu for i, cpu in enumerate(case.cpus)}
    tokens = -(-(PROMPT_TOKENS + ANSWER_TOKENS) // KV_STEP) * KV_STEP
    options = RingOptions(
        model=model,
        layers=tuple(LayerRange(start, stop) for start, stop in pairwise(stops)),
        weights=WeightSettings(machine.held.weights, machine.held.dtype, machine.exact),
        kv_tokens=case.users * tokens,
        slowdown=SlowRing(case.link, cpu, comes_first=True),
        # Every load asks other prompts, and each is to be computed.
        ring=RingSettings(prefix_tokens=0),
        outages=Outages(tolerance_s=0.0),
    )
    index = 0
    async with RingHost(options) as ring:

        async def load(users: int, answer_tokens: int, seed: int) -> list[UserTimes]:
            nonlocal index
            load = Load(users, PROMPT_TOKENS, answer_tokens, seed)
            times = await run_load(ring, load, vocab_size, index)
            index += users
            return times

        await load(case.users, WARM_UP_TOKENS, _SEED)
        together = [await load(case.users, ANSWER_TOKENS, _SEED + i) for i in (1, 2)]
        alone = load_figures(await load(1, ANSWER_TOKENS, _SEED + 3))
    return Result(
        case,
        forecast,
        statistics.mean(map(rate_of_all, together)),
        alone.decode_tokens_per_s,
        alone.ttft_median_s,
    )


def check_text(machine: Machine, results: Sequence[Result]) -> str:
    """Return a table of the results, and whether all are within BOUND."""
    lines = [
        f"{machine.device.layers[0].model}, {machine.held.weights}, on {machine.cpu}; one thread a node; prompts of "
        f"{PROMPT_TOKENS} tokens, answers of {ANSWER_TOKENS}",
        "",
        f"{'ring':<22}{'layers':<12}{'users':>5}{'predicted':>11}{'measured':>10}{'error':>8}"
        f"{'one user':>18}{'first token, ms':>18}",
    ]
    for result in results:
        forecast = result.forecast
        one = f"{forecast.one_user_tokens_per_s:.1f} / {result.one_user_tokens_per_s:.1f}"
        first = f"{1_000 * forecast.first_token_s:.0f} / {1_000 * result.first_token_s:.0f}"
        lines.append(
            f"{result.case.name:<22}{','.join(map(str, forecast.layers)):<12}{result.case.users:>5}"
            f"{forecast.rate_tokens_per_s:>11.1f}{result.rate_tokens_per_s:>10.1f}{100 * result.error:>+7.0f} %"
            f"{one:>17}{first:>18}"
        )
    largest = max(abs(result.error) for result in results)
    verdict = "within" if largest <= BOUND else "not within"
    lines += [
        "",
        "predicted, measured: tokens/s of all users together, while all decode. One user and first token: predicted / "
        "measured, alone in the ring.",
        f"largest error {100 * largest:.0f} %: {verdict} {100 * BOUND:.0f} %",
    ]
    return "\n".join(lines)


def check_json(machine: Machine, results: Sequence[Result]) -> str:
    """Return the results as JSON."""
    value = {
        "model": machine.device.layers[0].model,
        "weights": machine.held.weights,
        "cpu": machine.cpu,
        "bound": BOUND,
        "rings": [{**asdict(result), "error": result.error} for result in results],
    }
    return json.dumps(value, indent=1)


def _links(case: Case, nodes: Sequence[NodeProfile]) -> Links:
    shape = case.link or LinkShape()
    rate = shape.bandwidth_bit_per_s / 8 or _UNLIMITED
    cpus = case.cpus or (1.0,) * case.num_nodes
    return Links(
        {
            (nodes[i - 1].name, node.name): HopProfile(LOOPBACK_HOP_S + shape.delay_s + frozen_s(cpus[i]), rate)
            for i, node in enumerate(nodes)
        }
    )
