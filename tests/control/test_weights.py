"""Weights over real loopback sockets: cut, corrupted, slowed down, asked for by several at once and by strangers."""

import asyncio
import hashlib
import os
import random
import sys
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq.asyncio

from mdiq.cache import State, entries, state_of
from mdiq.control import weight_client, weight_server
from mdiq.control.weight_client import Fetched, fetch_weights
from mdiq.control.weight_server import WEIGHTS_HWM, LayerSource, WeightServer
from mdiq.control.weight_store import StoredFile, try_lock
from mdiq.core import weights
from mdiq.core.token_bucket import TokenBucket
from mdiq.core.types import LayerRange
from mdiq.core.weights import CREDIT_PARTS, PART_BYTES
from mdiq.errors import CapacityError, ModelError, RemoteProtocolError, RingError, TransportError
from mdiq.testbed.link_shape import LinkShape
from mdiq.testbed.relay import Relay
from mdiq.transport.base import ControlLink
from mdiq.transport.router_dealer import DealerLink, RouterServer
from tests.transport.conftest import context as context

NUM_LAYERS = 4
PARTS = 3
"""Of a Layer's file; the last one is short."""
SIZE = (PARTS - 1) * PART_BYTES + 77
CONTENT = [random.Random(layer).randbytes(SIZE) for layer in range(NUM_LAYERS)]
DIGEST = hashlib.sha256(b"".join(CONTENT)).hexdigest()
LAYERS = LayerRange(1, 3)
TOTAL = len(LAYERS) * SIZE


class Packing:
    """Stands for the engine: writes the file of a Layer when it is asked for it, after ``wait`` says so."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.packed: list[int] = []
        self.wait: Callable[[int], object] = lambda _: None

    def find(self, layer: int) -> Path:
        path = self._folder / f"layer-{layer:03}-{hashlib.sha256(CONTENT[layer]).hexdigest()}.safetensors"
        if not path.exists():
            self.wait(layer)
            self.packed.append(layer)
            self._folder.mkdir(exist_ok=True)
            path.write_bytes(CONTENT[layer])
        return path


@dataclass
class Plane:
    """A Starter that serves files of random bytes as a model of four Layers, and what a Node needs to reach it."""

    context: zmq.asyncio.Context
    folder: Path
    packing: Packing
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
            if isinstance(message, weights.AskPart):
                self.asked.append((message.layer, message.offset))
            await send(data)

        link.send = noting  # type: ignore[method-assign]
        return link

    async def fetch(self, cache: str = "node-1", layers: LayerRange = LAYERS, **options: object) -> Fetched:
        values: dict[str, object] = {"silence_s": 1.0, "clock": time.monotonic, **options}
        digest = str(values.pop("digest", DIGEST))
        folder = self.folder / "weights" / cache
        return await fetch_weights(self.connect, folder, digest, layers, **values)  # type: ignore[arg-type]

    def check(self, fetched: Fetched, layers: LayerRange = LAYERS) -> None:
        """Fail unless these Layers are there, right, and nothing else is."""
        assert [fetched.paths[layer].read_bytes() for layer in layers] == CONTENT[layers.start : layers.stop]
        (folder,) = {path.parent for path in fetched.paths.values()}
        assert {*folder.iterdir()} == {*fetched.paths.values(), folder / "lock"}


def _offsets(layer: int) -> list[tuple[int, int]]:
    return [(layer, part * PART_BYTES) for part in range(PARTS)]


@pytest.fixture
async def start(context: zmq.asyncio.Context, tmp_path: Path) -> AsyncIterator[Callable[..., object]]:
    planes: list[Plane] = []

    async def starting(**options: object) -> Plane:
        packing = Packing(tmp_path / "packed")
        source = LayerSource(DIGEST, NUM_LAYERS, lambda layer: packing.find(layer))
        router = await RouterServer.bind(context, "tcp://127.0.0.1:0", hwm=WEIGHTS_HWM)
        server = WeightServer(router, source, clock=time.monotonic, **options)  # type: ignore[arg-type]
        task = asyncio.create_task(server.run(), name="weights")
        port = int(router.endpoint.rpartition(":")[2])
        planes.append(Plane(context, tmp_path, packing, server, router, task, port))
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


async def test_a_node_gets_the_files_of_its_layers_and_nothing_else(start: Start) -> None:
    plane = await start()
    progress: list[tuple[int, int]] = []
    fetched = await plane.fetch(progress=lambda done, total: progress.append((done, total)))
    plane.check(fetched)
    assert (fetched.num_fetched, fetched.num_bytes, plane.server.num_parts) == (2, TOTAL, 2 * PARTS)
    assert plane.asked == [*_offsets(1), *_offsets(2)]
    assert plane.packing.packed == [1, 2]
    assert progress[0] == (0, 0) and progress[-1] == (TOTAL, TOTAL)
    assert {total for _, total in progress[1:]} == {TOTAL}, "layers are alike: the first tells the size of all"
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


async def test_a_folder_is_in_use_as_long_as_its_node_says(start: Start) -> None:
    plane = await start()
    fetched = await plane.fetch(DIGEST + "-int4")
    (entry,) = (entry for entry in entries(plane.folder) if entry.is_ours)
    assert fetched.paths[1].is_relative_to(entry.path) and state_of(entry) is State.IN_USE
    del fetched
    assert state_of(entry) is State.FREE


async def test_a_second_start_transfers_nothing(start: Start) -> None:
    plane = await start()
    await plane.fetch()
    plane.asked.clear()
    again = await plane.fetch()
    plane.check(again)
    assert (again.num_fetched, again.num_bytes, plane.asked) == (0, 0, [])


async def test_other_layers_fetch_only_what_is_not_there(start: Start) -> None:
    plane = await start()
    await plane.fetch()
    plane.asked.clear()
    again = await plane.fetch(layers=LayerRange(2, 4))
    assert plane.asked == _offsets(3) and again.num_fetched == 1
    assert [again.paths[layer].read_bytes() for layer in (2, 3)] == CONTENT[2:]


async def test_a_transfer_that_is_cut_five_times_resumes_and_fetches_nothing_twice(start: Start) -> None:
    plane = await start()
    done = [0]
    shape, target = LinkShape(bandwidth_bit_per_s=40e6), plane.port
    relay = Relay(shape, "127.0.0.1", target)
    await relay.start()
    plane.port = relay.port
    layers = LayerRange(0, NUM_LAYERS)
    fetching = asyncio.create_task(
        plane.fetch(layers=layers, progress=lambda now, _: done.append(now), silence_s=0.4), name="fetch"
    )
    for cut in range(5):
        await _until(lambda at=NUM_LAYERS * SIZE * (cut + 1) // 7: done[-1] >= at or fetching.done())  # type: ignore
        assert not fetching.done(), "it was over before it was cut"
        await relay.aclose()
        relay = Relay(shape, "127.0.0.1", target)
        await relay.start()
        plane.port = relay.port
    fetched = await fetching
    await relay.aclose()
    plane.check(fetched, layers)
    assert plane.num_links >= 6
    assert fetched.num_bytes == NUM_LAYERS * SIZE, "a part was taken in twice"
    assert fetched.num_bad == 0
    # Only what was under way at a cut is asked for again.
    assert len(plane.asked) <= NUM_LAYERS * PARTS + (plane.num_links - 1) * CREDIT_PARTS


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
    await fetch_weights(connect, folder, sys.argv[3], layers, clock=time.monotonic, progress=report)

asyncio.run(main())
"""


async def test_a_node_that_is_killed_in_the_middle_goes_on_with_what_it_has(start: Start, tmp_path: Path) -> None:
    plane = await start(limit=TokenBucket(4 * PART_BYTES, PART_BYTES))
    folder = tmp_path / "weights" / "node-1"
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _CHILD, plane.router.endpoint, str(folder), DIGEST), stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    done = 0
    while done < SIZE + PART_BYTES:
        done = int(await child.stdout.readline())
    child.kill()
    await child.wait()
    plane.server.limit = None
    again = await plane.fetch()
    plane.check(again)
    assert again.num_mended == 0 and 0 < again.num_bytes <= TOTAL - done


async def test_a_node_that_is_told_to_stop_leaves_its_folder_to_others(start: Start, tmp_path: Path) -> None:
    plane = await start(limit=TokenBucket(4 * PART_BYTES, PART_BYTES))
    done = [0]
    fetching = asyncio.create_task(plane.fetch(progress=lambda now, _: done.append(now)))
    await _until(lambda: done[-1] >= SIZE + PART_BYTES)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    lock = try_lock(tmp_path / "weights" / "node-1")
    assert lock is not None, "the lock is still held"
    os.close(lock)
    plane.server.limit = None
    assert (await plane.fetch()).num_bytes <= TOTAL - done[-1]


async def test_a_slow_disk_is_no_silence_of_the_starter(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card may write for a minute; a Starter that is gone by then is given as long as any other to come back."""
    monkeypatch.setattr(weight_client, "RETRY_S", 0.01)
    monkeypatch.setattr(weight_client, "TELL_S", 0.05, raising=False)
    plane = await start()
    finish, progress = StoredFile.finish, [0]
    is_writing, is_gone = threading.Event(), threading.Event()

    def slowly(stored: StoredFile) -> bool:
        if not is_writing.is_set():
            is_writing.set()
            before = progress[0]
            time.sleep(1.5)
            assert progress[0] - before >= 5, "a node that writes looks as if it stood still"
        return finish(stored)

    def telling(*_: int) -> None:
        progress[0] += 1

    def gone(layer: int) -> None:
        if layer == 3 and not is_gone.is_set():
            is_writing.wait(20)
            is_gone.set()
            raise TransportError("as if the Starter had crashed")

    plane.packing.wait = gone
    monkeypatch.setattr(StoredFile, "finish", slowly)
    fetched = await plane.fetch(layers=LayerRange(2, 4), progress=telling, silence_s=0.3, give_up_s=1.5)
    plane.check(fetched, LayerRange(2, 4))
    assert plane.num_links > 1


async def test_a_node_that_is_told_to_stop_twice_leaves_its_folder_to_others(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread may be at a file still, and nobody else writes there until it has done."""
    plane = await start()
    put, is_there, may_write = StoredFile.put, threading.Event(), threading.Event()

    def slowly(stored: StoredFile, data: bytes) -> None:
        is_there.set()
        may_write.wait(20)
        put(stored, data)

    monkeypatch.setattr(StoredFile, "put", slowly)
    fetching = asyncio.create_task(plane.fetch())
    await _until(is_there.is_set)
    for _ in range(2):
        fetching.cancel()
        await asyncio.sleep(0.02)
    with pytest.raises(asyncio.CancelledError):
        await fetching
    folder = tmp_path / "weights" / "node-1"
    assert try_lock(folder) is None
    may_write.set()
    locks: list[int] = []

    def is_free() -> bool:
        if (lock := try_lock(folder)) is not None:
            locks.append(lock)
        return bool(locks)

    await _until(is_free)
    os.close(*locks)


async def test_the_size_that_a_starter_names_costs_a_node_no_memory(
    monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    plane = await start()
    plane.task.cancel()
    await asyncio.gather(plane.task, return_exceptions=True)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**45))

    async def boasting() -> None:
        while True:
            identity, data = await plane.router.receive()
            if isinstance(weights.decode(data), weights.AskLayers):
                await plane.router.send(identity, weights.encode(weights.LayerFile(1, 2**40, bytes(32))))

    plane.task = asyncio.create_task(boasting())
    tracemalloc.start()
    try:
        with pytest.raises(TransportError):
            await plane.fetch(silence_s=0.1, give_up_s=0.05)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()
    assert plane.asked == [(1, part * PART_BYTES) for part in range(CREDIT_PARTS)]


async def test_layers_are_packed_while_earlier_ones_are_fetched(start: Start) -> None:
    plane = await start()
    may_pack = {1: threading.Event(), 2: threading.Event()}
    may_pack[1].set()
    plane.packing.wait = lambda layer: may_pack[layer].wait(20)
    done = [0]
    fetching = asyncio.create_task(plane.fetch(progress=lambda now, _: done.append(now)))
    await _until(lambda: done[-1] == SIZE)
    assert plane.packing.packed == [1]
    may_pack[2].set()
    plane.check(await fetching)


async def test_a_node_waits_for_packing_with_progress_and_without_giving_up(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_server, "WAITING_S", 0.05)
    monkeypatch.setattr(weight_server, "FORGET_S", 0.05)
    plane = await start()
    may_pack = threading.Event()
    plane.packing.wait = lambda _: may_pack.wait(20)
    progress: list[tuple[int, int]] = []
    fetching = asyncio.create_task(
        plane.fetch(progress=lambda *now: progress.append(now), silence_s=1.0, give_up_s=0.5)
    )
    await asyncio.sleep(1.5)
    assert len(progress) > 10 and set(progress) == {(0, 0)} and plane.num_links == 1
    monkeypatch.setattr(weight_server, "FORGET_S", 60.0)
    await asyncio.sleep(0.1)  # the Starter's wait of before ends
    may_pack.set()
    plane.check(await fetching)
    assert plane.num_links == 1


async def test_nodes_take_turns_when_layers_are_packed(start: Start) -> None:
    plane = await start()
    plane.packing.wait = lambda _: time.sleep(0.05)
    await asyncio.gather(plane.fetch("a", LayerRange(0, 2)), plane.fetch("b", LayerRange(2, 4)))
    assert plane.packing.packed in ([0, 2, 1, 3], [2, 0, 3, 1])


async def test_a_layer_that_two_nodes_ask_for_is_packed_once(start: Start) -> None:
    plane = await start()
    plane.packing.wait = lambda _: time.sleep(0.05)
    for fetched in await asyncio.gather(plane.fetch("a"), plane.fetch("b")):
        plane.check(fetched)
    assert plane.packing.packed == [1, 2]


async def test_a_starter_that_cannot_pack_says_so_to_the_node(start: Start) -> None:
    plane = await start()

    def full(_: int) -> None:
        raise CapacityError("no space left in /cache: 9 MB needed, 1 MB free")

    plane.packing.wait = full
    with pytest.raises(ModelError, match="^weights: the starter refuses: no space left in /cache: 9 MB needed"):
        await plane.fetch()


async def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane = await start()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=SIZE - 1))
    with pytest.raises(CapacityError, match=r"^no space left in .*: 3 MB needed, 2 MB free") as caught:
        await plane.fetch()
    assert "\n" not in str(caught.value) and plane.server.num_parts == 0


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
    way = _Flipping(plane.port, [PART_BYTES // 2, PART_BYTES // 2 + 1, SIZE + 100, TOTAL - PART_BYTES])
    await way.start()
    plane.port = way.port
    fetched = await plane.fetch(silence_s=0.4)
    assert way.num_left == 0
    await way.aclose()
    plane.check(fetched)
    assert len(plane.asked) > len(LAYERS) * PARTS, "nothing was asked for again"


@pytest.mark.parametrize("seed", range(4))
async def test_wrong_bytes_anywhere_in_the_stream_never_end_in_a_wrong_file(start: Start, seed: int) -> None:
    """Framing, handshake and message heads are hit too."""
    plane = await start()
    rng = random.Random(seed)
    places = sorted({rng.randrange(600), rng.randrange(2_000), *(rng.randrange(TOTAL) for _ in range(2))})
    way = _Flipping(plane.port, places)
    await way.start()
    plane.port = way.port
    fetched = await plane.fetch(silence_s=0.4)
    await way.aclose()
    plane.check(fetched)


async def test_a_file_whose_hash_is_wrong_is_asked_for_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wire has a checksum of its own, so this is what a Starter with bad memory looks like."""
    plane = await start()
    read, wrong = weight_server._read, [2]

    def reading(path: Path, file: weights.LayerFile, offset: int) -> bytes:
        data = read(path, file, offset)
        if (file.layer, offset) == (2, PART_BYTES) and wrong[0]:
            wrong[0] -= 1
            return data[:-1] + bytes([data[-1] ^ 1])
        return data

    monkeypatch.setattr(weight_server, "_read", reading)
    fetched = await plane.fetch()
    plane.check(fetched)
    assert fetched.num_bad == 2 and plane.num_links == 1


async def test_a_file_that_is_always_wrong_is_an_error_that_says_where_to_look(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane = await start()
    monkeypatch.setattr(weight_server, "_read", lambda path, file, at: bytes(min(file.num_bytes - at, PART_BYTES)))
    with pytest.raises(RemoteProtocolError, match="layer 1: .* wrong bytes 4 times; look at the network and"):
        await plane.fetch()


async def test_bytes_that_changed_on_the_starters_disk_are_not_believed(start: Start) -> None:
    """Not by the node, and then not by the Starter: it packs the layer anew when it is started again."""
    plane = await start()
    path = plane.packing.find(1)
    with path.open("r+b") as file:
        file.write(bytes([CONTENT[1][0] ^ 1]))
    with pytest.raises(ModelError, match="refuses: .*: its bytes have changed; look at the starter's disk, and start"):
        await plane.fetch()
    assert not path.exists()
    plane.check(await plane.fetch())


async def test_a_byte_that_changed_on_this_disk_is_found_and_its_file_fetched_again(start: Start) -> None:
    plane = await start()
    path = (await plane.fetch()).paths[2]
    with path.open("r+b") as file:
        file.seek(15)
        file.write(bytes([CONTENT[2][15] ^ 1]))
    plane.asked.clear()
    fetched = await plane.fetch()
    plane.check(fetched)
    assert (fetched.num_mended, plane.asked) == (1, _offsets(2))


async def test_three_nodes_at_once_cost_the_starter_a_few_parts_each(start: Start) -> None:
    plane = await start()
    many = await asyncio.gather(*(plane.fetch(f"node-{i}", LayerRange(i, i + 2)) for i in range(3)))
    for i, fetched in enumerate(many):
        plane.check(fetched, LayerRange(i, i + 2))
    assert 0 < plane.server.peak_outstanding_bytes <= 3 * CREDIT_PARTS * PART_BYTES
    await _until(lambda: plane.server.outstanding_bytes == 0 and not plane.server._peers)


async def test_two_processes_with_one_cache_fetch_each_file_once(start: Start) -> None:
    plane = await start(limit=TokenBucket(20 * PART_BYTES, PART_BYTES))
    progress: list[tuple[int, int]] = []
    many = await asyncio.gather(*(plane.fetch(progress=lambda *now: progress.append(now)) for _ in range(2)))
    assert progress.count((0, 0)) > 2, "a node that waits for the other one looks as if it stood still"
    assert sorted(fetched.num_fetched for fetched in many) == [0, len(LAYERS)]
    for fetched in many:
        plane.check(fetched)


async def _offered(link: ControlLink, num: int) -> None:
    """Wait until so many Layers are offered."""
    while num:
        num -= isinstance(weights.decode(await link.receive()), weights.LayerFile)


async def test_a_node_that_takes_nothing_and_goes_away_costs_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_server, "FORGET_S", 0.5)
    plane = await start()
    link = await DealerLink.connect(plane.context, plane.router.endpoint, identity="silent")
    await link.send(weights.encode(weights.AskLayers(DIGEST, 0, 2)))
    await _offered(link, 2)
    for _ in range(CREDIT_PARTS + 3):
        await link.send(weights.encode(weights.AskPart(0, 0, 0)))
    await _until(lambda: plane.server.num_dropped == 3)
    assert plane.server.peak_outstanding_bytes == CREDIT_PARTS * PART_BYTES
    await link.aclose()
    await _until(lambda: plane.server.outstanding_bytes == 0)
    plane.check(await plane.fetch())


async def test_a_node_that_lies_about_what_it_has_taken_gets_no_more_credit(start: Start) -> None:
    plane = await start(limit=TokenBucket(1, 1))  # nothing is answered meanwhile
    link = await DealerLink.connect(plane.context, plane.router.endpoint, identity="liar")
    await link.send(weights.encode(weights.AskLayers(DIGEST, 0, 2)))
    await _offered(link, 2)
    for _ in range(20):
        await link.send(weights.encode(weights.AskPart(0, 0, 2**60)))
    await _until(lambda: plane.server.num_dropped >= 15)
    [(peer, _)] = plane.server._peers.values()
    assert len(peer.asked) <= CREDIT_PARTS
    await link.aclose()


async def test_a_node_that_was_forgotten_asks_for_its_layers_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_client, "RETRY_S", 0.01)
    plane = await start()
    open_file = StoredFile
    may_hash = threading.Event()

    def slow(*arguments: object) -> object:
        may_hash.wait(20)  # a node that hashes what it has until the Starter has forgotten it
        return open_file(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(weight_client, "StoredFile", slow)
    monkeypatch.setattr(weight_server, "FORGET_S", 0.05)
    fetching = asyncio.create_task(plane.fetch())
    await _until(lambda: plane.num_links == 1 and bool(plane.server._peers))
    await _until(lambda: not plane.server._peers)
    monkeypatch.setattr(weight_server, "FORGET_S", 60.0)
    may_hash.set()
    plane.check(await fetching)
    assert plane.num_links > 1


async def test_a_limit_holds_for_all_transfers_together(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucket's clock is the test's: it moves by what the server sleeps, and by nothing else."""
    monkeypatch.setattr(weight_server, "WAITING_S", 0.5)
    plane = await start(limit=TokenBucket(PART_BYTES, PART_BYTES))
    now = [0.0]
    slept: list[float] = []
    sleep = asyncio.sleep

    async def sleeping(seconds: float) -> None:
        if seconds:
            slept.append(seconds)
            now[0] += seconds
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", sleeping)
    plane.server._clock = lambda: now[0]
    for fetched in await asyncio.gather(plane.fetch("a"), plane.fetch("b")):
        plane.check(fetched)
    # Two sleepers move the clock at once, so it may run ahead; it may never lag behind the bytes.
    assert now[0] >= 2 * TOTAL / PART_BYTES - 2
    assert max(slept) <= 0.5, "a node that waits hears nothing for longer"


async def test_waiting_for_the_limit_is_no_silence(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_server, "WAITING_S", 0.05)
    plane = await start(limit=TokenBucket(PART_BYTES, PART_BYTES // 4))
    fetched = await plane.fetch(layers=LayerRange(0, 1), silence_s=1.0)  # the limit has it wait for 4 s
    plane.check(fetched, LayerRange(0, 1))
    assert plane.num_links == 1


async def test_a_starter_that_is_not_there_is_given_up_with_one_line(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_client, "RETRY_S", 0.01)
    plane = await start()
    plane.port = 1
    with pytest.raises(
        TransportError, match="layers 1-2: nothing came for 0.5 s .*weights port can be reached"
    ) as caught:
        await plane.fetch(silence_s=0.05, give_up_s=0.5)
    assert "\n" not in str(caught.value)
    assert plane.num_links > 1


@pytest.mark.parametrize(
    ("layers", "options", "match"),
    [
        (LayerRange(3, 5), {}, "refuses: layers 3-4: the model has layers 0-3"),
        (LayerRange(0, 1), {}, "refuses: layers 0-0 are not this node's"),
        (LAYERS, {"digest": "0" * 64}, "it serves model .* and 000000000000… was called for"),
    ],
)
async def test_what_a_node_may_not_or_cannot_have_is_refused_in_words(
    start: Start, layers: LayerRange, options: dict[str, str], match: str
) -> None:
    plane = await start(may_fetch=lambda _, wanted: wanted.start > 0)
    with pytest.raises(ModelError, match=match):
        await plane.fetch(layers=layers, **options)
    assert plane.server.num_parts == 0 and plane.packing.packed == []


async def test_other_layers_and_bytes_beyond_a_file_are_not_given(start: Start) -> None:
    plane = await start()
    link = await DealerLink.connect(plane.context, plane.router.endpoint, identity="greedy")
    await link.send(weights.encode(weights.AskPart(1, 0, 0)))
    assert weights.decode(await link.receive()) == weights.Refused("ask for the layers first", False)
    await link.send(weights.encode(weights.AskLayers(DIGEST, 1, 3)))
    await _offered(link, 2)
    questions = [weights.AskPart(0, 0, 0), weights.AskPart(3, 0, 0), weights.AskPart(2**40, 0, 0)]
    questions += [weights.AskPart(1, SIZE, 0), weights.AskPart(1, 2**60, 0)]
    for question in questions:
        await link.send(weights.encode(question))
    answer = weights.encode(weights.Waiting())
    for hostile in (b"", b"junk", answer, answer[:-1] + b"\0", bytes(2**16)):
        await link.send(hostile)
    await _until(lambda: plane.server.num_dropped == len(questions) + 5)
    assert plane.server.num_parts == 0 and plane.server.outstanding_bytes == 0
    await link.aclose()
    plane.check(await plane.fetch())


async def test_a_flood_of_questions_ends_no_transfer_and_packs_nothing_twice(start: Start) -> None:
    plane = await start()
    link = await DealerLink.connect(plane.context, plane.router.endpoint, identity="flood")
    for _ in range(200):
        await link.send(weights.encode(weights.AskLayers(DIGEST, 1, 3)))
    plane.check(await plane.fetch())
    assert plane.packing.packed == [1, 2]
    await link.aclose()


async def test_a_flood_of_questions_while_a_layer_is_packed_holds_one_thread(start: Start) -> None:
    """Not those that the whole program shares, which also close what packs."""
    plane = await start()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    may_pack, at_once, peak = threading.Event(), [0], [0]

    def waiting(_: int) -> None:
        at_once[0] += 1
        peak[0] = max(peak[0], at_once[0])
        may_pack.wait(20)
        at_once[0] -= 1

    plane.packing.wait = waiting
    link = await DealerLink.connect(plane.context, plane.router.endpoint, identity="flood")
    for _ in range(8):
        await link.send(weights.encode(weights.AskLayers(DIGEST, 1, 3)))
        await asyncio.sleep(0.02)
    try:
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "done"), 15) == "done"
    finally:
        may_pack.set()
    plane.check(await plane.fetch())
    assert (peak[0], plane.packing.packed) == (1, [1, 2])
    await link.aclose()


async def test_a_starter_whose_ring_ends_while_it_packs_is_asked_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_client, "RETRY_S", 0.01)
    plane = await start()
    ends = [True]

    def ending(_: int) -> None:
        if ends.pop() if ends else False:
            raise RingError("the ring ends, and its layers are packed no further")

    plane.packing.wait = ending
    plane.check(await plane.fetch())
    assert plane.num_links == 2


async def test_a_node_has_four_transfers_and_its_newest_is_the_one_that_it_needs(start: Start) -> None:
    plane = await start(limit=TokenBucket(1, 1))  # none ends by itself
    links = [
        await DealerLink.connect(plane.context, plane.router.endpoint, identity=f"node-{node}/{i}")
        for node, i in [(2, 1), *((1, i) for i in range(1, 8))]
    ]
    for link in links:
        await link.send(weights.encode(weights.AskLayers(DIGEST, 1, 3)))
        await _offered(link, 2)
    assert [*plane.server._peers] == [b"node-2/1", *(f"node-1/{i}".encode() for i in range(4, 8))]
    for link in links:
        await link.aclose()


async def test_a_file_that_changes_while_it_is_served_is_an_error(start: Start) -> None:
    plane = await start(limit=TokenBucket(4 * PART_BYTES, PART_BYTES))
    done = [0]
    fetching = asyncio.create_task(plane.fetch(progress=lambda now, _: done.append(now)))
    await _until(lambda: bool(done[-1]))
    os.truncate(plane.packing.find(2), 5)
    with pytest.raises(ModelError, match="refuses: .*layer-002.*: it was changed while it is served; start the start"):
        await fetching


@pytest.mark.parametrize(
    "answer",
    [
        weights.LayerFile(9, 5, bytes(32)),
        weights.LayerFile(1, 5, bytes(32)),
        weights.Piece(1, 0, b"x"),
        weights.Piece(1, 2**60, b"x"),
        weights.AskPart(1, 0, 0),
    ],
)
async def test_a_node_leaves_a_connection_on_which_what_nobody_asked_for_comes(
    start: Start, answer: weights.Message, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Starter that talks nonsense costs a connection each time, and is given up in the end."""
    monkeypatch.setattr(weight_client, "RETRY_S", 0.01)
    plane = await start()
    plane.task.cancel()
    await asyncio.gather(plane.task, return_exceptions=True)

    async def nonsense() -> None:
        while True:
            identity, _ = await plane.router.receive()
            for _ in range(2):
                with suppress(TransportError):  # it has left
                    await plane.router.send(identity, weights.encode(answer))

    plane.task = asyncio.create_task(nonsense())
    with pytest.raises((TransportError, RemoteProtocolError)):
        await plane.fetch(silence_s=0.1, give_up_s=0.3)
    assert not list(plane.folder.glob("weights/*/*.safetensors"))
