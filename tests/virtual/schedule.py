"""Fault schedules: what befalls a whole service, when, and what must hold of it whatever that was."""

import asyncio
import random
from dataclasses import dataclass, replace
from unittest import mock

from mdiq.errors import EngineError
from mdiq.runtime import socket_workers
from mdiq.runtime.options import Outages
from tests.virtual.clock import VirtualTimeLoop, run_virtual
from tests.virtual.house import HOP, STARTER, House, no_memory
from tests.virtual.network import Plane

LEASE_S = 10.0  # so that a silent death on the way into a Ring costs few seconds; 60 s in the product
TOLERANCE_S = 15.0  # 60 s in the product
LAP_S = 8.0  # until the first Lap is measured; 60 s in the product
FAULTS_S = 25.0
"""Faults begin within this time, and last at most MAX_FAULT_S."""
MAX_FAULT_S = 20.0
SERVES_S = 60.0
"""When the last fault is over, the Ring serves within this time: a Lease, a forming that fails, and one more."""
ANSWERS_S = 40.0
"""... and whoever waits for an answer has one."""
LINES_A_SECOND = 12.0
"""Log lines of all machines together, in the long run."""

KINDS = ("kill", "crash", "cut", "freeze", "no_load", "break", "revoke", "drain", "leave", "starter", "rotate")
HOP_KINDS = ("hop", "answers", "stuck", "slow")
"""A Hop that carries nothing, or little, while its Nodes live and are heard."""
FAILURES = ("fails", "full")
"""A Node says that it failed; or it comes back without what was on its disk, and with no room there."""
OUTAGES = KINDS[:4]
"""After which a Node comes back with all that it needs: they may cost time and nothing else."""


@dataclass(frozen=True, slots=True)
class Event:
    """What befalls a Node, or the Starter, at a time; it is over after ``lasts_s``."""

    at_s: float
    kind: str
    node: int
    lasts_s: float


@dataclass(frozen=True, slots=True)
class Schedule:
    """One course of events. control, data: losses and doubles until the last event is over."""

    num_nodes: int
    seed: int
    events: tuple[Event, ...]
    control: Plane = Plane()
    data: Plane = HOP
    is_measured: bool = True
    skews_s: tuple[float, ...] = ()
    asks_every_s: float = 2.0
    tolerance_s: float = TOLERANCE_S
    fetch_s: float = 1.0
    num_spares: int = 0
    keeps_standby_layers: bool = False  # else survivors and spares have to fetch what they take over

    @classmethod
    def drawn(
        cls, seed: int, *, is_lossy: bool, kinds: tuple[str, ...] = KINDS, tolerance_s: float = TOLERANCE_S
    ) -> "Schedule":
        """Draw a schedule of one to three Nodes; is_lossy: messages are lost, doubled and late, too."""
        rng = random.Random(f"{seed} {is_lossy}")

        def plane(usual: Plane) -> Plane:
            if not is_lossy:
                return usual
            shares = (0.0, 0.02, 0.1)
            return replace(usual, drop=rng.choice(shares), double=rng.choice(shares), jitter_s=rng.choice((0.0, 0.3)))

        events = tuple(
            Event(
                rng.randrange(int(FAULTS_S * 10)) / 10,
                rng.choice(kinds),
                rng.randrange(3),
                rng.randrange(int(MAX_FAULT_S * 10)) / 10,
            )
            for _ in range(rng.choice((1, 2, 2, 3)))
        )
        return cls(
            num_nodes=rng.choice((1, 2, 2, 3)),
            seed=seed,
            events=events,
            control=plane(Plane()),
            data=plane(HOP),
            is_measured=rng.random() < 0.5,
            skews_s=tuple(rng.choice((0.0, -3_600.0, 1e6)) for _ in range(3)),
            asks_every_s=rng.choice((0.7, 3.0)),
            tolerance_s=tolerance_s,
            fetch_s=rng.choice((0.5, 1.0, 6.0)),
            num_spares=rng.choice((0, 0, 1, 2)),
            keeps_standby_layers=rng.random() < 0.5,
        )


def smallest(schedule: Schedule) -> Schedule:
    """Return what is left of a schedule that fails when every event without which it still does is taken away."""
    for event in schedule.events:
        less = replace(schedule, events=tuple(each for each in schedule.events if each is not event))
        try:
            run(less)
        except AssertionError:
            return smallest(less)
    return schedule


def run(schedule: Schedule) -> House:
    """Run a schedule and check it; return what is left of it.

    Raises:
        AssertionError: something that must hold did not; the message has what happened.
    """
    house: House | None = None

    async def main(loop: VirtualTimeLoop) -> None:
        nonlocal house
        house = House(
            loop,
            schedule.num_nodes,
            seed=schedule.seed,
            control_plane=schedule.control,
            data_plane=schedule.data,
            is_measured=schedule.is_measured,
            skews_s=schedule.skews_s,
            lap_s=LAP_S,
            outages=Outages(tolerance_s=schedule.tolerance_s),
            num_spares=schedule.num_spares,
        )
        house.fetch_s, house.keeps_standby_layers = schedule.fetch_s, schedule.keeps_standby_layers
        with house.installed(), mock.patch.object(socket_workers, "LEASE_S", LEASE_S):
            try:
                await _live(house, schedule)
            finally:
                await house.close()
            house.check()

    try:
        run_virtual(main)
    except Exception as error:
        if house is None:
            raise
        told = "\n".join(f"{at_s:9.2f} {what}" for at_s, what in house.story())
        raise AssertionError(f"{error}\n{schedule}\n{told}") from error
    assert house is not None
    return house


async def _live(house: House, schedule: Schedule) -> None:
    house.start()
    asking = asyncio.create_task(_ask(house, schedule.asks_every_s), name="asking")
    acts = [asyncio.create_task(_befall(house, event), name=event.kind) for event in schedule.events]
    try:
        await asyncio.gather(*acts)
        house.network.planes = {"control": Plane(), "data": HOP}
        house.breaks.clear()
        house.cannot_load.clear()
        house.note("the faults are over")
        await _until_it_answers(house)
    finally:
        for task in (asking, *acts):
            task.cancel()
        await asyncio.gather(asking, *acts, return_exceptions=True)
    await house.answered(ANSWERS_S)
    house.check_counts()
    num_lines = len(house.log) / max(house.loop.time(), 10.0)
    assert num_lines < LINES_A_SECOND, f"{num_lines:.1f} log lines a second"


async def _until_it_answers(house: House) -> None:
    """Wait until the Ring serves, and answers: it may not know yet that a Node has died."""
    until_s = house.loop.time() + SERVES_S
    while True:
        await house.serving(until_s - house.loop.time())
        answers = [house.ask(), house.ask()]
        await house.answered(ANSWERS_S)
        if not any(answer.error for answer in answers):
            return
        assert house.loop.time() < until_s, f"a ring that serves answers: {answers[0].error!r}"


async def _ask(house: House, every_s: float) -> None:
    """Have callers come again and again; some leave early."""
    while True:
        await asyncio.sleep(every_s * (0.5 + house.rng.random()))
        if house.is_serving or house.rng.random() < 0.1:
            house.ask(max_tokens=house.rng.choice((1, 6, 40)), leaves_after=2 if house.rng.random() < 0.15 else None)


async def _befall(house: House, event: Event) -> None:
    await asyncio.sleep(event.at_s)
    name = house.names[event.node % len(house.names)]
    house.note(f"{event.kind} {name} for {event.lasts_s:g} s")
    match event.kind:
        case "kill" | "crash" | "leave":
            if not house.is_up(name):
                return
            end = {"kill": house.kill, "crash": house.crash, "leave": house.leave}[event.kind]
            await end(name)
            await asyncio.sleep(event.lasts_s)
            if not house.is_up(name):
                house.start_node(name)
        case "cut":
            house.network.cut(name)
            await asyncio.sleep(event.lasts_s)
            house.network.plug(name)
        case "hop" | "answers" | "stuck" | "slow":
            await _befall_hop(house, event)
        case "freeze":
            house.network.freeze(name, event.lasts_s)
            await asyncio.sleep(event.lasts_s)
        case "fails" | "full":
            await _befall_failure(house, event.kind, name, event.lasts_s)
        case "no_load":
            house.cannot_load[name] = no_memory(name)
        case "break":
            house.breaks.add(name)
        case "revoke":
            house.revoked.add(name)
            house.reload()
            await asyncio.sleep(event.lasts_s)
            house.revoked.discard(name)
            house.reload()
        case "rotate":
            house.rotate(name)
            house.reload()
            for other in house.names:
                if other != name and house.is_up(other):
                    await house.reload_node(other)
            await asyncio.sleep(event.lasts_s)
            if house.is_up(name):
                await house.crash(name)
                house.start_node(name)
        case "drain":
            house.drain(name)
            await asyncio.sleep(event.lasts_s)
            house.drain(name, undo=True)
        case "starter":
            if not house.is_starter_up:
                return
            await house.kill_starter()
            await asyncio.sleep(event.lasts_s)
            if not house.starter.is_alive:
                house.start_starter()


async def _befall_failure(house: House, kind: str, name: str, lasts_s: float) -> None:
    """Have a Node's loop fail, or its process end and start anew with a full disk."""
    if not house.is_up(name):
        return
    if kind == "fails":
        house.fails(name, EngineError("a loop broke"))
        return
    house.disks[name].clear()
    house.full_disks.add(name)
    await house.crash(name)
    await asyncio.sleep(1.0)
    if not house.is_up(name):
        house.start_node(name)
    await asyncio.sleep(lasts_s)
    house.full_disks.discard(name)


async def _befall_hop(house: House, event: Event) -> None:
    """Have something befall the Hop into a Node of the Ring that there is, or into the Starter."""
    names = house.rings[-1].options.node_names if house.rings else (STARTER, *house.names)
    receiver = event.node % len(names)
    hop = names[receiver - 1], names[receiver]
    house.note(f"{event.kind} from {hop[0]} to {hop[1]}")
    match event.kind:
        case "stuck":
            house.network.stick_hop(*hop)
            return
        case "slow":
            house.network.slow_hop(*hop, replace(house.network.planes["data"], delay_s=1.0, gap_s=1.5))
        case _:
            house.network.cut_hop(*hop, back_only=event.kind == "answers")
    await asyncio.sleep(event.lasts_s)
    house.network.mend_hop(*hop)
