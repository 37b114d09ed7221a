"""A peer that reaches a Node's real port and sends what it likes: every frame is a counted drop or does no harm."""

import asyncio
import random
import threading
from collections.abc import Iterator

import pytest
import zmq

from mdiq.core.wire import TAG_BYTES
from tests.runtime.conftest import END_OF_ATTACK, OpenRing, Ring, make_sequence

MAGIC = b"MQ1"


def random_frames(rng: random.Random, num_frames: int) -> Iterator[list[bytes]]:
    """Yield noise: of any number of parts, some with the right beginning, some with a plausible header."""
    for i in range(num_frames):
        parts = [rng.randbytes(rng.choice([0, 1, 3, 17, 18, 51, 200])) for _ in range(rng.choice([1, 1, 2, 2, 3, 9]))]
        if i % 3 == 1:
            parts[0] = MAGIC + parts[0]
        elif i % 3 == 2:
            # One HIDDEN segment of one f32 row of width 4, and a tag that the sender cannot know.
            fields = bytes([1, 1, 0, 0, 0, 1, 0, 1, 0, 4, 0, 0, 0, 1, 0]) + rng.randbytes(17)
            parts = [MAGIC + fields + rng.randbytes(TAG_BYTES), rng.randbytes(16)]
        yield parts


def mutated(rng: random.Random, parts: list[bytes]) -> list[bytes]:
    """Return a legal frame with one thing wrong."""
    parts = list(parts)
    i = rng.randrange(len(parts))
    match rng.choice(["flip", "flip", "cut", "longer", "extra", "swap", "empty"]):
        case "flip":
            damaged = bytearray(parts[i])
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            parts[i] = bytes(damaged)
        case "cut":
            parts[i] = parts[i][: rng.randrange(len(parts[i]))]
        case "longer":
            parts[i] += rng.randbytes(rng.randint(1, 40))
        case "extra":
            parts.insert(rng.randint(0, len(parts)), rng.randbytes(rng.randrange(40)))
        case "swap":
            parts = [*reversed(parts)] if len(parts) > 1 else [parts[0], parts[0]]
        case "empty":
            parts[i] = b""
    return parts


def attack(endpoint: str, recorded: list[list[bytes]], num_frames: int, is_over: threading.Event) -> tuple[int, int]:
    """Send noise and damaged or repeated frames, and the end mark; return how many were illegal and how many repeated.

    Runs in a thread: ``recorded`` grows meanwhile, so that frames of the sequences that run now are among them.
    """
    rng = random.Random(20)
    num_illegal = num_repeated = 0
    with zmq.Context() as context, context.socket(zmq.PUSH) as hostile:
        hostile.connect(endpoint)
        for frame in random_frames(rng, num_frames):
            hostile.send_multipart(frame)
            legal = recorded[-rng.randint(1, min(len(recorded), 200))]
            if rng.random() < 0.2:
                hostile.send_multipart(legal)
                num_repeated += 1
            else:
                hostile.send_multipart(mutated(rng, legal))
                num_illegal += 1
            num_illegal += 1
        hostile.send_multipart([END_OF_ATTACK])
        # A connection that is closed takes with it what the node has not read.
        is_over.wait()
        hostile.close(linger=0)
    return num_illegal, num_repeated


@pytest.mark.parametrize(("target", "num_frames"), [(1, 10_000), (0, 3_000)], ids=["stage", "starter"])
@pytest.mark.timeout(300)  # what is of no use waits, on a busy machine for long
async def test_noise_and_damaged_and_repeated_frames_change_no_token(
    open_ring: OpenRing, target: int, num_frames: int
) -> None:
    async with open_ring(2, "sockets") as ring:
        await ring.check(*(make_sequence(i) for i in range(8)))
        # What a peer can have recorded: the frames that come to this node.
        recorded = ring.sinks[target - 1].sent
        num_before = len(recorded)
        is_over = threading.Event()
        serving = asyncio.create_task(serve_until(is_over, ring))
        attacking = asyncio.create_task(
            asyncio.to_thread(attack, ring.endpoints[target], recorded, num_frames, is_over)
        )
        try:
            await ring.sources[target].attack_over.wait()
        finally:
            is_over.set()
        num_illegal, num_repeated = await attacking
        await serving
        assert len(recorded) > num_before, "no sequence ran meanwhile"
        # Every illegal frame is counted, the end mark among them, and no legal one.
        dropped = ring.workers[target].meter.dropped
        assert sum(dropped.values()) == num_illegal + 1, dropped
        assert {"magic", "tag", "parts", "length"} <= set(dropped)
        counts = ring.protocol.counts if target == 0 else ring.stages[target].counts
        assert 0 < counts["duplicates"] + counts["unknown"]
        assert num_repeated > num_frames / 10
        assert ring.protocol.counts["replays"] == 0
        await ring.check(*(make_sequence(i) for i in range(8)))
        await ring.check_quiet()


async def serve_until(is_over: threading.Event, ring: Ring) -> None:
    """Run Sequences, four at a time; each has to be right."""
    while not is_over.is_set():
        await ring.check(*(make_sequence(i, max_tokens=30) for i in range(4)))
