"""64 streaming clients of two keys, a third of which keep going away: the rest get every token, and all is free.

By itself it takes some seconds, with the small model. MDIQ_STREAMS_S: how many seconds, with the 0.5B model.
"""

import asyncio
import json
import os
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import psutil
import pytest

from mdiq.api.keys import line_of
from mdiq.cache import cache_directory
from tests.faults.conftest import HALF_B, SMALL, model_that_is_here
from tests.integration.two_nodes import TwoNodes, two_nodes

SECONDS = float(os.environ.get("MDIQ_STREAMS_S", "0"))
MIN_S, MIN_TOKENS = SECONDS or 8.0, 800
"""How long at least; and so many tokens of each key, or chance decides who had more."""
KEYS = {"many": ("key-with-many-clients", 40), "few": ("key-with-few-clients-", 24)}
"""Names, keys and clients. Both keys have more clients than their half of the ring's places, and equal shares."""
MAX_LIVE = 16
BODIES: list[dict[str, Any]] = [
    {
        "prompt": f"Here is a story about {what}.",
        "max_tokens": 10 + 2 * i,
        "temperature": float(i % 2),
        "seed": i,
        "ignore_eos": True,
        "stream": True,
    }
    for i, what in enumerate(("the sea", "a fox", "two bears", "the moon", "a small red boat", "winter"))
]
SAMPLES_S = 1.0
Memory = list[tuple[float, int, int]]
"""When, and resident bytes of the Starter and of the second node then."""

pytestmark = pytest.mark.timeout(SECONDS * 3 + 600)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    """A ring whose KV blocks hold no finished prompts, so that all of them can be seen to be free."""
    folder = tmp_path_factory.mktemp("streams")
    file = folder / "api-keys"
    file.touch(mode=0o600)
    file.write_text("".join(line_of(name, key, {}) + "\n" for name, (key, _) in KEYS.items()))
    settings: dict[str, Any] = {
        # Places for twice the clients: those of one that went away are taken until its answer has been stopped.
        "api": {"keys_file": file.name, "max_waiting": 128 - MAX_LIVE},
        "ring": {"max_live": MAX_LIVE, "prefix_reuse": False},
    }
    kind, num_layers = (HALF_B, 24) if SECONDS else (SMALL, 30)
    model = {"path": str(model_that_is_here(kind)), "name": "streams"}
    # So little that the KV cache is soon full: what still grows after that is a leak.
    second = {"memory": "520M"} if SECONDS else {}
    with two_nodes(folder, model, num_layers, second, cache=cache_directory(), **settings) as ring:
        ring.key = KEYS["many"][0]
        yield ring


@dataclass
class Seen:
    """What all clients saw together. first_s: times to first tokens; num_left: streams that were left."""

    first_s: list[float] = field(default_factory=list)
    num_whole: int = 0
    num_left: int = 0
    num_tokens: int = 0


async def _text(session: aiohttp.ClientSession, url: str, body: dict[str, Any], seen: Seen, leave_after: int) -> str:
    """Return the text of a stream, or its beginning if it is left after some tokens."""
    asked_s, text, num_tokens = time.monotonic(), "", 0
    async with session.post(url, json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                assert line in (b"\n", b"data: [DONE]\n") or line.startswith(b":"), line
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            if not num_tokens:
                seen.first_s.append(time.monotonic() - asked_s)
            num_tokens += 1
            seen.num_tokens += 1
            text += event["choices"][0]["text"]
            if num_tokens >= leave_after:
                seen.num_left += 1
                response.close()
                return text
    seen.num_whole += 1
    return text


async def _client(
    ring: TwoNodes, key: str, number: int, right: list[str], seen: Seen, is_over: asyncio.Event, *, leaves: bool
) -> None:
    draws = random.Random(number)
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(300)) as session:
        while not is_over.is_set():
            i = draws.randrange(len(BODIES))
            leave_after = draws.randint(1, BODIES[i]["max_tokens"] - 2) if leaves else 1_000
            text = await _text(session, f"{ring.api}/v1/completions", BODIES[i], seen, leave_after)
            if leaves:
                assert right[i].startswith(text), (i, text)
            else:
                assert text == right[i], i


async def _answer_tokens(ring: TwoNodes) -> dict[str, float]:
    name = "mdiq_key_answer_tokens_total"
    return {key: await asyncio.to_thread(ring.metric, f'{name}{{key="{key}"}}') for key in KEYS}


async def _samples(ring: TwoNodes, found: Memory) -> None:
    processes = [psutil.Process(each.pid) for each in (ring.starter, ring.second)]
    while True:
        first, second = (process.memory_info().rss for process in processes)
        found.append((time.monotonic(), first, second))
        await asyncio.sleep(SAMPLES_S)


async def _load(ring: TwoNodes, right: list[str], memory: Memory) -> tuple[Seen, dict[str, float]]:
    """Return what the clients saw, and the tokens of each key while both had requests that waited."""
    seen, is_over = Seen(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        clients = [(key, number) for key, count in KEYS.values() for number in range(count)]
        for i, (key, number) in enumerate(clients):
            group.create_task(_client(ring, key, i, right, seen, is_over, leaves=number % 3 == 0))
        while seen.num_tokens < MIN_TOKENS / 4:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        sampling = group.create_task(_samples(ring, memory))
        begun_s, before = time.monotonic(), await _answer_tokens(ring)
        tokens = dict.fromkeys(KEYS, 0.0)
        while time.monotonic() - begun_s < MIN_S or min(tokens.values()) < MIN_TOKENS:
            await asyncio.sleep(0.5)
            now = await _answer_tokens(ring)
            tokens = {key: now[key] - before[key] for key in KEYS}
        lasted_s = time.monotonic() - begun_s
        is_over.set()
        sampling.cancel()
    print(f"\n{sum(tokens.values()) / lasted_s:.1f} tokens/s over {lasted_s:.0f} s; of each key: {tokens}")  # noqa: T201
    return seen, tokens


async def _calm(ring: TwoNodes) -> list[str]:
    headers = {"Authorization": f"Bearer {ring.key}"}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(300)) as session:
        return [await _text(session, f"{ring.api}/v1/completions", body, Seen(), 1_000) for body in BODIES]


async def _until_free(ring: TwoNodes) -> None:
    async with asyncio.timeout(120):
        names = ("mdiq_requests_running", "mdiq_kv_reserved_tokens")
        while any([await asyncio.to_thread(ring.metric, name) for name in names]):  # noqa: ASYNC110
            await asyncio.sleep(0.2)


def test_those_that_stay_get_every_token_while_a_third_goes_away(ring: TwoNodes) -> None:
    right = asyncio.run(_calm(ring))
    memory: Memory = []
    seen, tokens = asyncio.run(_load(ring, right, memory))
    asyncio.run(_until_free(ring))
    _show(seen, memory)
    assert seen.num_whole > 20 and seen.num_left > 5, "too little came of it to say anything"
    assert ring.metric("mdiq_requests_failed_total") == ring.metric("mdiq_requests_refused_total") == 0
    # A stream that is left may have been written to its end before its client has read so far.
    ended = {name: ring.metric(f"mdiq_requests_{name}_total") for name in ("done", "left")}
    assert sum(ended.values()) == seen.num_whole + seen.num_left + len(BODIES)
    assert ended["left"] > 0
    many, few = tokens.values()
    assert abs(many - few) <= 0.1 * max(many, few), tokens
    assert asyncio.run(_calm(ring)) == right
    asyncio.run(_until_free(ring))
    assert "Traceback" not in ring.log_of("serve") + ring.log_of("second")


def _show(seen: Seen, memory: Memory) -> None:
    first_s = sorted(seen.first_s)
    at_95 = first_s[int(0.95 * len(first_s))]
    print(  # noqa: T201
        f"{seen.num_whole} answers, {seen.num_left} left; first token: median {statistics.median(first_s):.2f} s, "
        f"95 % within {at_95:.2f} s, longest {first_s[-1]:.2f} s"
    )
    # The system gives a process its KV cache page by page, as blocks are used for the first time: until all have been,
    # memory grows. What a leak adds comes on top, and does not end.
    later = np.array(memory[len(memory) // 2 :])
    for name, column in (("Starter", 1), ("second node", 2)):
        slope = np.polyfit(later[:, 0], later[:, column], 1)[0] * 60 / 2**20 if len(later) > 2 else float("nan")
        print(f"{name}: {later[-1, column] / 2**20:.0f} MiB, {slope:+.2f} MiB a minute in the second half")  # noqa: T201
