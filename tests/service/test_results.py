"""The file of results: whole lines or none, whatever the disk does, and one run at a time."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mdiq.errors import CapacityError, ConfigError
from mdiq.service.results import ResultsFile


@contextmanager
def _max_file_bytes(count: int) -> Iterator[None]:
    """Files of this process cannot be longer: a write ends with an error after part of its bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lines_are_added_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultsFile(path) as file:
        file.append(["first", "🦊 \udcff"])
        with _max_file_bytes(file.num_bytes + 3):
            with pytest.raises(CapacityError, match=r"out.jsonl: File too large; free some, then go on with --resume"):
                file.append(["a long line"])
        assert path.read_text() == "first\n🦊 ?\n"
        file.append(["last"])
    assert path.read_text() == "first\n🦊 ?\nlast\n"


def test_a_device_that_is_full_is_named() -> None:
    with ResultsFile(Path("/dev/full")) as file:
        assert not file.is_regular
        with pytest.raises(CapacityError, match="/dev/full: No space left on device"):
            file.append(["a line"])


@pytest.mark.parametrize(("before", "after"), [("a\nb", "a\n"), ("a\nb\n", "a\nb\n"), ("half", ""), ("", "")])
def test_a_line_without_its_end_is_dropped_on_demand(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(before)
    with ResultsFile(path) as file:
        assert path.read_text() == before
        file.drop_cut_line()
        file.append(["next"])
    assert path.read_text() == f"{after}next\n"


def test_a_second_run_is_refused_until_the_first_one_ends(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    (tmp_path / "link").symlink_to(path)
    with ResultsFile(path):
        with pytest.raises(ConfigError, match=r"link: another mdiq run writes it; wait for that one, or give another"):
            ResultsFile(tmp_path / "link")
    ResultsFile(tmp_path / "link").__exit__(None, None, None)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gone/out.jsonl: No such file or directory; --out must be a file that can"):
        ResultsFile(tmp_path / "gone" / "out.jsonl")
