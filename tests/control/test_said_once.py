"""What is noticed twice, or tried again and again, is said once: messages that cannot be sent."""

import asyncio

import pytest
import structlog

from mdiq.control import coordinator
from mdiq.core import control
from mdiq.core.types import NodeId
from mdiq.transport.memory import MemoryControlServer
from tests.control.conftest import Plane, agent_on, assignment

ONE = NodeId("node-1")


async def test_a_message_that_is_tried_again_and_again_is_one_line_of_the_log_for_each_outage(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "RECONNECT_S", 0.001)
    for name in ("node-1", "node-2"):
        plane.agent(name)
    await plane.coordinator.all_joined()
    cut_off, tries = plane.cuts_off("node-1", 10, monkeypatch)
    async with asyncio.timeout(20):
        with structlog.testing.capture_logs() as lines:
            await plane.coordinator.assign({ONE: assignment()})
            for epoch in (3, 4):
                await plane.coordinator.begin({ONE: control.Begin(epoch, "f32")})
    assert tries == {(cut_off, 3): 11, (cut_off, 4): 11}
    unsent = [line for line in lines if line["event"] == "control_message_not_sent"]
    assert [(line["peer"], line["error"]) for line in unsent] == [(repr(cut_off), "not connected")] * 2


async def test_an_agent_whose_starter_takes_nothing_says_once_that_it_drops_what_it_has_to_say() -> None:
    with structlog.testing.capture_logs() as lines:
        agent = agent_on(MemoryControlServer().connect(b"node-1"))
        for done in range(1_020):
            agent.loading(done, 2_000)
        agent._outgoing.get_nowait()
        agent.loading(1_020, 2_000)
    assert [line for line in lines if line["event"].startswith("control_message")] == [
        {"event": "control_message_not_sent", "log_level": "warning", "message": "Loading"},
        {"event": "control_messages_sent_again", "log_level": "warning", "num_not_sent": 20},
    ]
