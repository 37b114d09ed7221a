"""What is on the disk at each moment of a run: results, and tokens of what has not ended."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.errors import CapacityError
from mdiq.service.journal import Changes, Journal
from mdiq.service.recorder import Recorder
from mdiq.service.results import ResultsFile

PARAMS = SamplingParams(seed=3)
LONG_S = 3_600.0


class Disk:
    """A recorder, its files, and what it said. An interval does not end by itself."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out.jsonl"
        self.results = ResultsFile(self.out)
        self.journal = Journal(folder / "out.jsonl.journal")
        self.said: list[str] = []
        self.recorder = Recorder(self.results, self.journal, interval_s=LONG_S, on_trouble=self.said.append)

    def tokens(self) -> dict[str, tuple[int, ...]]:
        return {key: begun.tokens for key, begun in self.journal.begun().items()}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path)
    with disk.results, disk.journal:
        yield disk


def _sequence(index: int, *tokens: int) -> Sequence:
    return Sequence(index, (index, 1), PARAMS, generated=[*tokens])


async def _end(disk: Disk, key: str, *, is_final: bool = True) -> None:
    ending = asyncio.create_task(disk.recorder.end(key, f"line {key}", is_final=is_final))
    await asyncio.sleep(0)
    await disk.recorder.write()
    await ending


async def test_tokens_are_journalled_every_interval_and_forgotten_after_the_result(disk: Disk) -> None:
    one, two = _sequence(1), _sequence(2, 20)
    disk.recorder.begin("1", one)
    disk.recorder.begin("2", two)
    await disk.recorder.write(with_tokens=True)
    assert disk.tokens() == {"2": (20,)}, "what has no token begins anew anyway"
    one.append(10)
    two.append(21)
    await disk.recorder.write()
    assert disk.tokens() == {"2": (20,)}, "no interval is over"
    await disk.recorder.write(with_tokens=True)
    assert disk.tokens() == {"1": (10,), "2": (20, 21)}
    assert disk.journal.begun()["1"].prompt == (1, 1) and disk.journal.begun()["1"].params == PARAMS
    one.append(11)
    await _end(disk, "1")
    assert disk.out.read_text() == "line 1\n" and disk.tokens() == {"2": (20, 21)}
    await _end(disk, "2")
    assert disk.out.read_text() == "line 1\nline 2\n" and disk.tokens() == {}


async def test_a_request_that_came_from_the_journal_adds_to_its_tokens(disk: Disk) -> None:
    disk.recorder.begin("1", sequence := _sequence(1, 10, 11))
    await disk.recorder.write(with_tokens=True)
    again = Recorder(disk.results, disk.journal, interval_s=LONG_S)
    again.begin("1", sequence, is_journalled=True)
    sequence.append(12)
    await again.write(with_tokens=True)
    assert disk.tokens() == {"1": (10, 11, 12)}
    again.begin("9", _sequence(9))
    await again.write(with_tokens=True)
    assert disk.tokens() == {"1": (10, 11, 12)}


async def test_a_request_that_failed_keeps_its_tokens_for_another_try(disk: Disk) -> None:
    disk.recorder.begin("1", _sequence(1, 10, 11))
    await disk.recorder.write()  # an interval begins
    disk.recorder.begin("2", _sequence(2, 20))
    await _end(disk, "2", is_final=False)
    assert disk.out.read_text() == "line 2\n" and disk.tokens()["2"] == (20,)
    await disk.recorder.write(with_tokens=True)
    assert disk.tokens() == {"1": (10, 11), "2": (20,)}


async def test_results_are_written_while_the_journal_cannot_be(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = _sequence(1, 10), _sequence(2, 20)
    disk.recorder.begin("1", one)
    disk.recorder.begin("2", two)
    await disk.recorder.write(with_tokens=True)

    def fail(_: Changes) -> None:
        raise CapacityError("out.jsonl.journal: no space left on its disk; free some")

    with monkeypatch.context() as full:
        full.setattr(disk.journal, "write", fail)
        two.append(21)
        await _end(disk, "1")
        await disk.recorder.write(with_tokens=True)
    assert disk.out.read_text() == "line 1\n"
    assert len(disk.said) == 1 and "no space left on its disk; free some. Results are still written" in disk.said[0]
    assert disk.tokens() == {"1": (10,), "2": (20,)}, "the line of 1 counts, not what the journal says"
    await disk.recorder.write(with_tokens=True)
    assert disk.tokens() == {"2": (20, 21)} and disk.said[1:] == ["the journal can be written again"]


async def test_a_result_that_cannot_be_written_stays_in_the_journal(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.recorder.begin("1", sequence := _sequence(1, 10))
    await disk.recorder.write(with_tokens=True)
    sequence.append(11)

    def fail(_: list[str]) -> None:
        raise CapacityError("out.jsonl: No space left on device")

    monkeypatch.setattr(disk.results, "append", fail)
    with pytest.raises(BaseExceptionGroup) as caught:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(disk.recorder.run())
            tasks.create_task(disk.recorder.end("1", "line 1"))
    assert "No space left on device" in str(caught.value.exceptions[0])
    assert disk.tokens() == {"1": (10, 11)} and disk.out.read_text() == ""


async def test_what_waits_is_written_when_a_signal_ends_the_run(disk: Disk) -> None:
    disk.recorder.begin("1", _sequence(1, 10))
    running = asyncio.create_task(disk.recorder.run())
    await asyncio.sleep(0)
    ending = asyncio.create_task(disk.recorder.end("1", "line 1"))
    disk.recorder.begin("2", _sequence(2, 20))
    await asyncio.sleep(0)
    for task in (running, ending):
        task.cancel()
    await asyncio.wait([running, ending])
    await disk.recorder.write(with_tokens=True)
    assert disk.out.read_text() == "line 1\n" and disk.tokens() == {"2": (20,)}
