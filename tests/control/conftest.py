"""A Coordinator and Agents over control links inside this process, with a clock that a test moves."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from mdiq.control.agent import Agent
from mdiq.control.coordinator import Coordinator
from mdiq.control.standby import StandingBy
from mdiq.core import control
from mdiq.core.types import PLAIN_WEIGHTS, NodeId
from mdiq.core.work import Work
from mdiq.errors import MdiqError, TransportError
from mdiq.telemetry.trace import Span
from mdiq.transport.base import ControlLink
from mdiq.transport.memory import MemoryControlServer

KEY = b"the control key, 32 bytes of it."
VERSION = "1.2.3"
LEASE_S = 0.04

Load = Callable[[control.Assign], Awaitable[control.Ready]]


def assignment(**changes: object) -> control.Assign:
    values: dict[str, object] = {
        "epoch": 1,
        "layer_start": 2,
        "layer_stop": 4,
        "is_last": True,
        "next_endpoint": "tcp://127.0.0.1:5000",
        "model": "/models/tiny",
        "model_digest": "d1ge57",
        "kv_tokens": 0,
        "weights": PLAIN_WEIGHTS,
        "wire": "bf16",
        "memory_share": 0.5,
        "receive_key": b"the key of a hop, thirty bytes",
        "send_key": b"the key of the next hop, of 32 B",
        "trace": False,
    }
    return control.Assign(**{**values, **changes})  # type: ignore[arg-type]


def ready(kv_tokens: int = 64) -> control.Ready:
    return control.Ready(
        epoch=1,
        kv_tokens=kv_tokens,
        weight_bytes=1,
        kv_bytes_per_token=1,
        rss_bytes=1,
        decode_s=((1, 0.1), (2, 0.11)),
        prompt_s=((64, 0.2),),
    )


def heartbeat(busy_s: float = 0.0) -> control.Heartbeat:
    return control.Heartbeat(
        epoch=1,
        rss_bytes=1,
        busy_s=busy_s,
        waiting_s=0.0,
        bytes_in=0,
        bytes_out=0,
        frames_dropped={"tag": 1},
        kv_tokens_in_use=0,
        queue_depth=0,
        work=Work(),
    )


async def fetch(message: control.Fetch) -> control.Fetched:
    return control.Fetched(message.number, tuple(range(message.layer_start, message.layer_stop)))


async def send_burst(burst: control.SendBurst) -> control.BurstSent:
    return control.BurstSent(burst.epoch, burst.number, 7.5)


async def begin(message: control.Begin) -> control.Begun:
    return control.Begun(message.epoch)


async def stand_by(_: control.StandBy) -> None:
    """Have no layers, which there were none of."""


class Heartbeats(dict[NodeId, control.Heartbeat]):
    """The Coordinator's table, which also tells whose heartbeat came."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: asyncio.Queue[NodeId] = asyncio.Queue()

    def __setitem__(self, node: NodeId, beat: control.Heartbeat) -> None:
        super().__setitem__(node, beat)
        self.heard.put_nowait(node)


async def loads(_: control.Assign) -> control.Ready:
    """Have layers at once."""
    return ready()


def agent_on(
    link: ControlLink,
    name: str = "node-1",
    *,
    load: Load = loads,
    heartbeat: Callable[[], control.Heartbeat] = heartbeat,
) -> Agent:
    """Return a Node's Agent that nobody runs yet; it does at once what it is asked."""
    return Agent(
        link,
        KEY,
        control.Hello(name, f"tcp://127.0.0.1:600{name[-1]}", 1, VERSION),
        load=load,
        send_burst=send_burst,
        begin=begin,
        fetch=fetch,
        stand_by=stand_by,
        heartbeat=heartbeat,
        spans=list,
    )


@dataclass
class Plane:
    """A control plane whose Coordinator expects ``node-1`` and ``node-2``, and goes without ``node-3``."""

    server: MemoryControlServer
    now: float = 0.0
    faults: list[tuple[NodeId, control.Fault]] = field(default_factory=list)
    progress: list[tuple[NodeId, control.Loading]] = field(default_factory=list)
    lost: "asyncio.Queue[tuple[NodeId, MdiqError]]" = field(default_factory=asyncio.Queue)
    stand_by: list[control.StandBy] = field(default_factory=list)  # why Agents were told to
    spans: list[Span] = field(default_factory=list)
    tasks: list["asyncio.Task[None]"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.coordinator = Coordinator(
            self.server,
            KEY,
            VERSION,
            [NodeId("node-1"), NodeId("node-2")],
            clock=lambda: self.now,
            lease_s=LEASE_S,
            silence_s=LEASE_S,
            on_fault=lambda node, fault: self.faults.append((node, fault)),
            on_loading=lambda node, loading: self.progress.append((node, loading)),
            on_lost=lambda node, error: self.lost.put_nowait((node, error)),
            standing_by=[StandingBy("node-3", None, "it is a spare")],
        )
        self.heartbeats = self.coordinator.heartbeats = Heartbeats()
        self.coordinating = asyncio.create_task(self.coordinator.run(), name="coordinator")

    def agent(
        self,
        name: str,
        *,
        load: Load | None = None,
        begin: Callable[[control.Begin], Awaitable[control.Begun]] = begin,
        fetch: Callable[[control.Fetch], Awaitable[control.Fetched]] = fetch,
        key: bytes = KEY,
        version: str = VERSION,
        identity: bytes | None = None,
    ) -> "tuple[Agent, asyncio.Task[None]]":
        """Start an Agent; ``load`` is what it does with an Assign, ``begin`` with a Begin."""
        agent = Agent(
            self.server.connect(identity or name.encode()),
            key,
            control.Hello(name, f"tcp://127.0.0.1:600{name[-1]}", 1, version),
            load=load or loads,
            send_burst=send_burst,
            begin=begin,
            fetch=fetch,
            stand_by=self._stands_by,
            heartbeat=heartbeat,
            spans=lambda: self.spans,
        )
        task = asyncio.create_task(agent.run(), name=name)
        self.tasks.append(task)
        return agent, task

    def cuts_off(
        self, node: str, num_tries: int, monkeypatch: pytest.MonkeyPatch
    ) -> "tuple[bytes, Counter[tuple[bytes, int]]]":
        """Have so many sends of each Begin to a Node fail; return its connection, and the tries by that and Epoch."""
        send, cut_off = self.server.send, self.coordinator._identities[NodeId(node)]
        tries: Counter[tuple[bytes, int]] = Counter()

        async def send_later(identity: bytes, data: bytes) -> None:
            if isinstance(message := control.decode(data, KEY), control.Begin):
                tries[identity, message.epoch] += 1
                if identity == cut_off and tries[identity, message.epoch] <= num_tries:
                    raise TransportError("not connected")
            await send(identity, data)

        monkeypatch.setattr(self.server, "send", send_later)
        return cut_off, tries

    async def _stands_by(self, message: control.StandBy) -> None:
        self.stand_by.append(message)


@pytest.fixture
async def plane(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plane]:
    monkeypatch.setattr("mdiq.control.node_watch.LATE_S", 1e9)  # its clock is the test's, however late the loop is
    plane = Plane(MemoryControlServer())
    yield plane
    assert not plane.coordinating.done(), "the coordinator must survive whatever comes"
    for task in (plane.coordinating, *plane.tasks):
        task.cancel()
    await asyncio.gather(plane.coordinating, *plane.tasks, return_exceptions=True)
