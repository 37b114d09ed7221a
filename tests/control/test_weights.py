"""Weights over real loopback sockets: cut, corrupted, slowed down, asked for by several at once and by strangers."""

import asyncio
import hashlib
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import zmq.asyncio

from mdiq.cache import State, entries, state_of
from mdiq.control import weight_client, weight_server
from mdiq.control.chunk_hashes import ChunkHashes
from mdiq.control.weight_client import Fetched, fetch_weights
from mdiq.control.weight_server import WEIGHTS_HWM, WeightServer
from mdiq.control.weight_store import WeightStore, try_lock
from mdiq.core import weights
from mdiq.core.token_bucket import TokenBucket
from mdiq.core.types import LayerRange
from mdiq.core.weights import CREDIT_CHUNKS, WeightMap
from mdiq.errors import ModelError, RemoteProtocolError, TransportError
from mdiq.testbed.link_shape import LinkShape
from mdiq.testbed.relay import Relay
from mdiq.transport.base import ControlLink
from mdiq.transport.router_dealer import DealerLink, RouterServer
from tests.transport.conftest import context as context

CHUNK = 2**17
NUM_CHUNKS = 40
CONTENT = random.Random(9).randbytes(NUM_CHUNKS * CHUNK - 77)
LAYERS = LayerRange(1, 3)  # chunks 10 to 29, and 0


@dataclass
class Plane:
    """A Starter that serves a file of random bytes as a model of four Layers, and what a Node needs to reach it."""

    context: zmq.asyncio.Context
    folder: Path
    weights: WeightMap
    server: WeightServer
    router: RouterServer
    task: "asyncio.Task[None]"
    port: int = 0
    num_links: int = 0
    asked: list[tuple[int, int]] = field(default_factory=list)

    async def connect(self) -> ControlLink:
        self.num_links += 1
        link = await DealerLink.connect(
            self.context, f"tcp://127.0.0.1:{self.port}", identity=f"node-1/{self.num_links}"
        )
        send = link.send

        async def noting(data: bytes) -> None:
            message = weights.decode(data)
            if isinstance(message, weights.AskChunk):
                self.asked.append((message.file, message.chunk))
            await send(data)

        link.send = noting  # type: ignore[method-assign]
        return link

    async def fetch(self, cache: str = "node-1", layers: LayerRange = LAYERS, **options: object) -> Fetched:
        values: dict[str, object] = {"silence_s": 1.0, "clock": time.monotonic, **options}
        return await fetch_weights(self.connect, self.folder / cache, layers, **values)  # type: ignore[arg-type]

    def check(self, fetched: Fetched, chunks: set[int]) -> None:
        """Fail unless these chunks of the copy are right and the rest of it is holes."""
        expected = b"".join(
            CONTENT[i * CHUNK : (i + 1) * CHUNK] if i in chunks else bytes(len(CONTENT[i * CHUNK : (i + 1) * CHUNK]))
            for i in range(NUM_CHUNKS)
        )
        assert fetched.path.read_bytes() == expected
        assert fetched.path.stat().st_blocks * 512 <= len(chunks) * CHUNK + 2**16  # what the file system itself takes

    @property
    def model(self) -> Path:
        return self.folder / "big.gguf"


MINE = {0, *range(10, 30)}


def _map(model: Path) -> WeightMap:
    stat = model.stat()
    return WeightMap(
        digest=hashlib.sha256(CONTENT).hexdigest(),
        is_directory=False,
        files=(("model.gguf", stat.st_size, stat.st_mtime_ns),),
        fingerprints=b"",
        shared=((0, 0, 50),),
        layers=tuple(((0, i * 10 * CHUNK + 1, (i + 1) * 10 * CHUNK - 78),) for i in range(4)),
        ends=(),
        chunk_bytes=CHUNK,
    )


@pytest.fixture
async def start(context: zmq.asyncio.Context, tmp_path: Path) -> AsyncIterator[Callable[..., object]]:
    planes: list[Plane] = []

    async def starting(**options: object) -> Plane:
        model = tmp_path / "big.gguf"
        if not model.exists():
            model.write_bytes(CONTENT)
        mapped = _map(model)
        router = await RouterServer.bind(context, "tcp://127.0.0.1:0", hwm=WEIGHTS_HWM)
        hashes = ChunkHashes(tmp_path / "hashes", model, mapped)
        server = WeightServer(router, mapped, model, hashes, clock=time.monotonic, **options)  # type: ignore[arg-type]
        task = asyncio.create_task(server.run(), name="weights")
        planes.append(Plane(context, tmp_path, mapped, server, router, task, int(router.endpoint.rpartition(":")[2])))
        return planes[-1]

    yield starting
    for plane in planes:
        assert not plane.task.done(), "the server must survive whatever comes"
        plane.task.cancel()
        await asyncio.gather(plane.task, return_exceptions=True)
        await plane.router.aclose()


Start = Callable[..., "asyncio.Future[Plane]"]


async def _until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_node_gets_the_chunks_of_its_layers_and_nothing_else(start: Start) -> None:
    plane = await start()
    progress: list[tuple[int, int]] = []
    fetched = await plane.fetch(progress=lambda done, total: progress.append((done, total)))
    plane.check(fetched, MINE)
    assert fetched.num_fetched == len(MINE) == plane.server.num_chunks
    assert progress == [(i * CHUNK, len(MINE) * CHUNK) for i in range(len(MINE) + 1)]


async def test_a_copy_is_in_use_as_long_as_its_node_says(start: Start) -> None:
    plane = await start()
    fetched = await plane.fetch("weights")
    (entry,) = entries(plane.folder)
    assert fetched.path.is_relative_to(entry.path) and state_of(entry) is State.IN_USE
    del fetched
    assert state_of(entry) is State.FREE


async def test_a_second_start_transfers_nothing(start: Start) -> None:
    plane = await start()
    await plane.fetch()
    plane.asked.clear()
    again = await plane.fetch(digest=plane.weights.digest)
    plane.check(again, MINE)
    assert (again.num_fetched, again.num_confirmed, plane.asked) == (0, 0, [])


async def test_other_layers_fetch_only_what_is_not_there(start: Start) -> None:
    plane = await start()
    await plane.fetch()
    plane.asked.clear()
    plane.check(await plane.fetch(layers=LayerRange(2, 4)), {*MINE, *range(30, 40)})
    assert sorted(plane.asked) == [(0, chunk) for chunk in range(30, 40)]


async def test_a_transfer_that_is_cut_five_times_resumes_and_fetches_nothing_twice(start: Start) -> None:
    plane = await start()
    total = len(MINE) * CHUNK
    verified = [0]
    shape, target = LinkShape(bandwidth_bit_per_s=40e6), plane.port
    relay = Relay(shape, "127.0.0.1", target)
    await relay.start()
    plane.port = relay.port
    fetching = asyncio.create_task(
        plane.fetch(progress=lambda done, _: verified.append(done), silence_s=0.4), name="fetch"
    )
    for cut in range(5):
        await _until(lambda at=total * (cut + 1) // 7: verified[-1] >= at or fetching.done())  # type: ignore[misc]
        assert not fetching.done(), "it was over before it was cut"
        await relay.aclose()
        relay = Relay(shape, "127.0.0.1", target)
        await relay.start()
        plane.port = relay.port
    fetched = await fetching
    await relay.aclose()
    plane.check(fetched, MINE)
    assert plane.num_links >= 6
    assert fetched.num_fetched == len(MINE), "a chunk was taken in twice"
    assert fetched.num_bad == 0
    # Only what was under way at a cut is asked for again.
    assert len(plane.asked) <= len(MINE) + (plane.num_links - 1) * CREDIT_CHUNKS


_CHILD = """
import asyncio, pathlib, sys, time
import zmq.asyncio
from mdiq.control.weight_client import fetch_weights
from mdiq.core.types import LayerRange
from mdiq.transport.router_dealer import DealerLink

async def main():
    context = zmq.asyncio.Context()
    connect = lambda: DealerLink.connect(context, sys.argv[1], identity="child")
    report = lambda done, total: print(done, flush=True)
    folder, layers = pathlib.Path(sys.argv[2]), LayerRange(1, 3)
    await fetch_weights(connect, folder, layers, clock=time.monotonic, progress=report)

asyncio.run(main())
"""


async def test_a_node_that_is_killed_in_the_middle_goes_on_with_what_it_has(start: Start, tmp_path: Path) -> None:
    plane = await start(limit=TokenBucket(20 * CHUNK, CHUNK))
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _CHILD, plane.router.endpoint, str(tmp_path / "node-1")), stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    verified = 0
    while verified < 5 * CHUNK:
        verified = int(await child.stdout.readline())
    child.kill()
    await child.wait()
    plane.server._limit = None
    again = await plane.fetch()
    plane.check(again, MINE)
    assert again.num_mended == 0 and 0 < again.num_fetched <= len(MINE) - verified // CHUNK
    assert len(plane.asked) == again.num_fetched


async def test_a_node_that_is_told_to_stop_closes_its_copy(start: Start, tmp_path: Path) -> None:
    plane = await start(limit=TokenBucket(20 * CHUNK, CHUNK))
    verified = [0]
    fetching = asyncio.create_task(plane.fetch(progress=lambda done, _: verified.append(done)))
    await _until(lambda: verified[-1] >= 3 * CHUNK)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    folder = tmp_path / "node-1" / plane.weights.digest
    lock = try_lock(folder)
    assert lock is not None, "the lock is still held"
    store = WeightStore(folder, plane.weights.manifest(LAYERS, with_ends=False))
    assert store.num_unchecked == 0 and len(store.missing()) <= len(MINE) - 3
    os.close(lock)


class _Flipping:
    """A way to the Starter on which one bit of what comes from it is wrong, at each of some places in the stream."""

    def __init__(self, port: int, places: list[int]) -> None:
        self._target = port
        self._places = places
        self._at = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def aclose(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def num_left(self) -> int:
        return len(self._places)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._tasks |= {
            asyncio.create_task(self._pass(reader, far_writer, flips=False), name="forth"),
            asyncio.create_task(self._pass(far_reader, writer, flips=True), name="back"),
        }

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, flips: bool) -> None:
        try:
            while data := bytearray(await reader.read(65_536)):
                if flips:
                    while self._places and self._places[0] < self._at + len(data):
                        data[self._places.pop(0) - self._at] ^= 4
                    self._at += len(data)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


async def test_bytes_that_are_wrong_on_the_wire_are_found_and_fetched_again(start: Start) -> None:
    plane = await start()
    way = _Flipping(plane.port, [3 * CHUNK, 3 * CHUNK + 1, 9 * CHUNK + 100, 14 * CHUNK])
    await way.start()
    plane.port = way.port
    fetched = await plane.fetch(silence_s=0.4)
    assert way.num_left == 0
    await way.aclose()
    plane.check(fetched, MINE)
    assert len(plane.asked) > len(MINE), "nothing was asked for again"


@pytest.mark.parametrize("seed", range(4))
async def test_wrong_bytes_anywhere_in_the_stream_never_end_in_a_wrong_copy(start: Start, seed: int) -> None:
    """Framing, handshake and message heads are hit too."""
    plane = await start()
    rng = random.Random(seed)
    places = sorted({rng.randrange(600), rng.randrange(2_000), *(rng.randrange(2_000_000) for _ in range(2))})
    way = _Flipping(plane.port, places)
    await way.start()
    plane.port = way.port
    fetched = await plane.fetch(silence_s=0.4)
    await way.aclose()
    plane.check(fetched, MINE)


async def test_a_chunk_whose_hash_is_wrong_is_asked_for_again(start: Start) -> None:
    """The wire has a checksum of its own, so this is what a Starter with bad memory looks like."""
    plane = await start()
    read = plane.server._read
    wrong = [2]

    def reading(ask: weights.AskChunk, is_again: bool) -> tuple[bytes, bytes]:
        data, sha256 = read(ask, is_again)
        if ask.chunk == 12 and wrong[0]:
            wrong[0] -= 1
            return data[:-1] + b"\0", sha256
        return data, sha256

    plane.server._read = reading  # type: ignore[method-assign]
    fetched = await plane.fetch()
    plane.check(fetched, MINE)
    assert fetched.num_bad == 2 and plane.num_links == 1


async def test_a_chunk_that_is_always_wrong_is_an_error_that_says_where_to_look(start: Start) -> None:
    plane = await start()
    read = plane.server._read
    plane.server._read = lambda ask, again: (read(ask, again)[0], bytes(32))  # type: ignore[method-assign]
    with pytest.raises(RemoteProtocolError, match="came with wrong bytes 4 times; look at the network and"):
        await plane.fetch()


async def test_a_byte_that_changed_on_this_disk_is_found_and_fetched_again(start: Start) -> None:
    plane = await start()
    path = (await plane.fetch()).path
    times = path.stat()
    for is_thorough in (False, True):
        with path.open("r+b") as file:
            file.seek(15 * CHUNK + 3)
            file.write(bytes([CONTENT[15 * CHUNK + 3] ^ 1]))
        if is_thorough:
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        plane.asked.clear()
        fetched = await plane.fetch(is_thorough=is_thorough)
        plane.check(fetched, MINE)
        assert (fetched.num_mended, plane.asked) == (1, [(0, 15)])
        times = path.stat()


async def test_three_nodes_at_once_cost_the_starter_a_few_chunks_each(start: Start) -> None:
    plane = await start()
    many = await asyncio.gather(*(plane.fetch(f"node-{i}", LayerRange(i, i + 2)) for i in range(3)))
    for i, fetched in enumerate(many):
        plane.check(fetched, {0, *range(i * 10, i * 10 + 20)})
    assert CREDIT_CHUNKS * CHUNK < plane.server.most_outstanding_bytes <= 3 * CREDIT_CHUNKS * CHUNK
    await _until(lambda: plane.server.outstanding_bytes == 0 and not plane.server._peers)


async def test_two_processes_with_one_cache_fetch_each_chunk_once(start: Start) -> None:
    plane = await start(limit=TokenBucket(100 * CHUNK, CHUNK))
    many = await asyncio.gather(plane.fetch(), plane.fetch())
    assert sorted(fetched.num_fetched for fetched in many) == [0, len(MINE)]
    plane.check(many[0], MINE)


async def test_a_node_that_takes_nothing_and_goes_away_costs_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_server, "FORGET_S", 0.05)
    plane = await start()
    link = await DealerLink.connect(plane.context, plane.router.endpoint, identity="silent")
    await link.send(weights.encode(weights.AskManifest(0, 2, False)))
    for chunk in range(CREDIT_CHUNKS + 3):
        await link.send(weights.encode(weights.AskChunk(0, chunk, 0, b"")))
    await _until(lambda: plane.server.num_dropped == 3)
    assert plane.server.outstanding_bytes == CREDIT_CHUNKS * CHUNK
    await link.aclose()
    await _until(lambda: plane.server.outstanding_bytes == 0)
    plane.check(await plane.fetch(), MINE)


async def test_a_node_that_was_forgotten_asks_for_the_manifest_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_server, "FORGET_S", 0.05)
    monkeypatch.setattr(weight_client, "RETRY_S", 0.01)
    plane = await start()
    folder = plane.folder / "node-1" / plane.weights.digest
    lock = try_lock(folder)  # the node waits for another process until the Starter has forgotten it
    assert lock is not None
    fetching = asyncio.create_task(plane.fetch())
    await _until(lambda: plane.num_links == 1 and bool(plane.server._peers))
    await _until(lambda: not plane.server._peers)
    os.close(lock)
    plane.check(await fetching, MINE)
    assert plane.num_links > 1


async def test_a_limit_holds_for_all_transfers_together(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucket's clock is the test's: it moves by what the server sleeps, and by nothing else."""
    monkeypatch.setattr(weight_server, "WAITING_S", 0.5)
    plane = await start(limit=TokenBucket(CHUNK, CHUNK))
    now = [0.0]
    slept: list[float] = []
    sleep = asyncio.sleep

    async def sleeping(seconds: float) -> None:
        if seconds:
            slept.append(seconds)
            now[0] += seconds
        await sleep(0)

    monkeypatch.setattr(weight_server.asyncio, "sleep", sleeping)
    plane.server._clock = lambda: now[0]
    first, second = await asyncio.gather(plane.fetch("a"), plane.fetch("b"))
    plane.check(first, MINE)
    plane.check(second, MINE)
    # Two sleepers move the clock at once, so it may run ahead; it may never lag behind the bytes.
    assert now[0] >= 2 * len(MINE) - 2
    assert max(slept) <= 0.5, "a node that waits hears nothing for longer"


async def test_waiting_for_the_limit_is_no_silence(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_server, "WAITING_S", 0.05)
    plane = await start(limit=TokenBucket(4 * CHUNK, CHUNK))
    fetched = await plane.fetch(layers=LayerRange(0, 1), silence_s=0.2)
    plane.check(fetched, set(range(10)))
    assert plane.num_links == 1


async def test_a_starter_that_is_not_there_is_given_up_with_one_line(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_client, "RETRY_S", 0.01)
    plane = await start()
    plane.port = 1
    with pytest.raises(
        TransportError, match="layers 1-2: nothing came for 0.1 s .*weights port can be reached"
    ) as caught:
        await plane.fetch(silence_s=0.05, give_up_s=0.1)
    assert "\n" not in str(caught.value)
    assert plane.num_links > 1


@pytest.mark.parametrize(
    ("layers", "options", "match"),
    [
        (LayerRange(3, 5), {}, "refuses: layers 3-4: the model has layers 0-3"),
        (LayerRange(0, 1), {}, "refuses: layers 0-0 are not this node's"),
        (LAYERS, {"digest": "0" * 64}, "the starter serves model .* and 000000000000… was called for"),
    ],
)
async def test_what_a_node_may_not_or_cannot_have_is_refused_in_words(
    start: Start, layers: LayerRange, options: dict[str, object], match: str
) -> None:
    plane = await start(may_fetch=lambda _, wanted: wanted.start > 0)
    with pytest.raises(ModelError, match=match):
        await plane.fetch(layers=layers, **options)
    assert plane.server.num_chunks == 0


async def test_chunks_of_other_layers_and_other_files_are_not_given(start: Start) -> None:
    plane = await start()
    link = await DealerLink.connect(plane.context, plane.router.endpoint, identity="greedy")
    await link.send(weights.encode(weights.AskChunk(0, 10, 0, b"")))
    assert weights.decode(await link.receive()) == weights.Refused("ask for the manifest first", False)
    await link.send(weights.encode(weights.AskManifest(1, 3, False)))
    await link.receive()
    questions = [weights.AskChunk(0, 30, 0, b""), weights.AskChunk(1, 0, 0, b""), weights.AskChunk(0, 2**40, 0, b"")]
    for question in questions:
        await link.send(weights.encode(question))
    answer = weights.encode(weights.Waiting())
    for hostile in (b"", b"junk", answer, answer[:-1] + b"\0", bytes(2**16)):
        await link.send(hostile)
    await _until(lambda: plane.server.num_dropped == len(questions) + 5)
    assert plane.server.num_chunks == 0 and plane.server.outstanding_bytes == 0
    await link.aclose()
    plane.check(await plane.fetch(), MINE)


async def test_a_model_that_changes_while_it_is_served_is_an_error(start: Start) -> None:
    plane = await start()
    os.utime(plane.model, ns=(1, 1))
    with pytest.raises(ModelError, match="refuses: .*big.gguf: it was changed while it is served; start the starter"):
        await plane.fetch()


async def test_a_starter_that_starts_again_hashes_nothing_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    plane = await start()
    await plane.fetch("one")
    plane.task.cancel()
    await asyncio.gather(plane.task, return_exceptions=True)
    hashed: list[int] = []
    plane.server = WeightServer(
        plane.router,
        plane.weights,
        plane.model,
        ChunkHashes(plane.folder / "hashes", plane.model, plane.weights),
        clock=time.monotonic,
    )
    put = plane.server._hashes.put
    plane.server._hashes.put = lambda file, chunk, sha: (hashed.append(chunk), put(file, chunk, sha))[1]  # type: ignore
    plane.task = asyncio.create_task(plane.server.run())
    plane.check(await plane.fetch("two", LayerRange(2, 4)), {0, *range(20, 40)})
    assert sorted(hashed) == list(range(30, 40))


async def test_bytes_that_changed_under_the_same_time_at_the_starter_are_not_believed(start: Start) -> None:
    plane = await start()
    await plane.fetch("one")
    times = plane.model.stat()
    with plane.model.open("r+b") as file:
        file.seek(15 * CHUNK)
        file.write(bytes([CONTENT[15 * CHUNK] ^ 1]))
    os.utime(plane.model, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ModelError, match="its bytes have changed and its time has not; look at the starter's disk"):
        await plane.fetch("two")


async def test_a_model_that_was_only_touched_costs_questions_and_no_bytes(start: Start) -> None:
    plane = await start()
    await plane.fetch()
    os.utime(plane.model, ns=(10**18, 10**18))
    touched = await start()
    again = await touched.fetch()
    touched.check(again, MINE)
    assert (again.num_fetched, again.num_confirmed) == (0, len(MINE))
    assert touched.server.num_chunks == 0
    assert (await touched.fetch()).num_confirmed == 0


def test_hashes_of_a_damaged_or_foreign_file_are_found_again(tmp_path: Path) -> None:
    model = tmp_path / "big.gguf"
    model.write_bytes(CONTENT)
    mapped = _map(model)
    hashes = ChunkHashes(tmp_path / "hashes", model, mapped)
    assert hashes.get(0, 7) is None
    hashes.put(0, 7, b"7" * 32)
    hashes.save()
    assert ChunkHashes(tmp_path / "hashes", model, mapped).get(0, 7) == b"7" * 32
    (kept,) = (tmp_path / "hashes").iterdir()
    other = replace(mapped, files=(("model.gguf", len(CONTENT), 1),))
    assert ChunkHashes(tmp_path / "hashes", model, other).get(0, 7) is None
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    assert ChunkHashes(tmp_path / "hashes", model, mapped).get(0, 7) is None
    hashes.put(0, 8, b"8" * 32)
    kept.unlink()
    (tmp_path / "hashes").rmdir()
    (tmp_path / "hashes").touch()
    with pytest.raises(ModelError, match="hashes cannot be kept"):
        hashes.save()
