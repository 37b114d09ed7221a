"""What is noticed twice, or tried again and again, is said once: messages that cannot be sent."""

import asyncio
from collections import Counter

import pytest
import structlog

from mdiq.control import coordinator
from mdiq.control.agent import Agent
from mdiq.core import control
from mdiq.core.types import NodeId
from mdiq.errors import TransportError
from mdiq.transport.memory import MemoryControlServer
from tests.control.conftest import (
    KEY,
    VERSION,
    Plane,
    assignment,
    begin,
    fetch,
    heartbeat,
    ready,
    send_burst,
    stand_by,
)

ONE = NodeId("node-1")


async def test_a_message_that_is_tried_again_and_again_is_one_line_of_the_log_for_each_outage(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "RECONNECT_S", 0.001)
    for name in ("node-1", "node-2"):
        plane.agent(name)
    await plane.coordinator.all_joined()
    send, cut_off = plane.server.send, plane.coordinator._identities[ONE]
    tries: Counter[int] = Counter()

    async def send_later(identity: bytes, data: bytes) -> None:
        message = control.decode(data, KEY)
        if isinstance(message, control.Begin) and identity == cut_off:
            tries[message.epoch] += 1
            if tries[message.epoch] <= 10:
                raise TransportError("not connected")
        await send(identity, data)

    monkeypatch.setattr(plane.server, "send", send_later)
    async with asyncio.timeout(20):
        with structlog.testing.capture_logs() as lines:
            await plane.coordinator.assign({ONE: assignment()})
            for epoch in (3, 4):
                await plane.coordinator.begin({ONE: control.Begin(epoch, "f32")})
    assert tries == {3: 11, 4: 11}
    unsent = [line for line in lines if line["event"] == "control_message_not_sent"]
    assert [(line["peer"], line["error"]) for line in unsent] == [(repr(cut_off), "not connected")] * 2


async def test_an_agent_whose_starter_takes_nothing_says_once_that_it_drops_what_it_has_to_say() -> None:
    link = MemoryControlServer().connect(b"node-1")
    hello = control.Hello("node-1", "tcp://127.0.0.1:6001", 1, VERSION)
    with structlog.testing.capture_logs() as lines:
        agent = Agent(
            link,
            KEY,
            hello,
            load=load,
            send_burst=send_burst,
            begin=begin,
            fetch=fetch,
            stand_by=stand_by,
            heartbeat=heartbeat,
            spans=list,
        )
        for done in range(1_020):
            agent.loading(done, 2_000)
        agent._outgoing.get_nowait()
        agent.loading(1_020, 2_000)
    assert [line for line in lines if line["event"].startswith("control_message")] == [
        {"event": "control_message_not_sent", "log_level": "warning", "message": "Loading"},
        {"event": "control_messages_sent_again", "log_level": "warning", "num_not_sent": 20},
    ]


async def load(_: control.Assign) -> control.Ready:
    return ready()
