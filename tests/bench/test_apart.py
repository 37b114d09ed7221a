"""Rings apart: that they wait for each other, and what is told when one of them fails."""

from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest

from mdiq.bench.apart import RingsApart
from mdiq.bench.workload import ApartCell, Cell, Load
from mdiq.core.types import LayerRange
from mdiq.errors import RingError
from mdiq.runtime.options import RingOptions
from mdiq.testbed.link_shape import LinkShape

OPTIONS = RingOptions(Path("m.gguf"), (LayerRange(0, 4),), kv_tokens=64, log_level="info")
LOAD = Load(users=2, prompt_tokens=3, answer_tokens=2, seed=5)


def rings(tmp_path: Path, program: str, cores: tuple[int, ...] = ()) -> RingsApart:
    """Return rings whose program is ``program``: ``spec`` is what it was told, ``say`` answers a line."""
    file = tmp_path / "program.py"
    start = """
        import json, os, sys, time
        from pathlib import Path
        folder = Path(__file__).parent
        spec = json.loads(sys.stdin.readline())
        def say(text):
            print(text, flush=True)
    """
    file.write_text(dedent(start) + dedent(program))
    return RingsApart(OPTIONS, 50, cores, (str(file),))


async def test_no_ring_begins_before_all_are_ready(tmp_path: Path) -> None:
    apart = rings(
        tmp_path,
        """
        seed = spec["load"]["seed"]
        (folder / f"loaded-{seed}").touch()
        if seed == 5:
            while not (folder / "loaded-6").exists():
                time.sleep(0.01)
            (folder / "late").touch()
        say("ready")
        sys.stdin.readline()
        if not (folder / "late").exists():
            say(json.dumps({"error": "it did not wait"}))
        say(json.dumps({"submitted_s": [1.0, 2.0], "tokens_s": [[3.0, 4.0], [5.0, spec["core"]]]}))
        """,
        cores=(7, 9),
    )
    users = await apart.run(2, LOAD)
    assert [user.submitted_s for user in users] == [1.0, 2.0, 1.0, 2.0]
    assert [user.tokens_s for user in users] == [(3.0, 4.0), (5.0, 7), (3.0, 4.0), (5.0, 9)]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ('say(json.dumps({"error": "no memory; use fewer"}))', "ring 0 apart: no memory; use fewer"),
        ('say("ready"); sys.stdin.readline(); say(json.dumps({"error": "lost"}))', "ring 0 apart: lost"),
        ('sys.stderr.write("one\\ntwo\\n"); sys.exit(3)', "ring 0 apart: its process ended with exit code 3: two"),
        ('say("ready"); sys.stdin.readline()', "ring 0 apart: its process ended with exit code 0: it said nothing"),
        (
            'say("ready"); sys.stdin.readline(); os.kill(os.getpid(), 9)',
            "ring 0 apart: its process ended with signal 9 .Killed.: it said nothing",
        ),
        ('say(json.dumps({"submitted_s": [], "tokens_s": []}))', "ring 0 apart: it began without waiting"),
    ],
)
async def test_a_ring_that_fails_is_named(tmp_path: Path, program: str, message: str) -> None:
    with pytest.raises(RingError, match=message):
        await rings(tmp_path, program).run(2, LOAD)


async def test_a_real_ring_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(RingError, match=r"ring 0 apart: .*missing\.gguf"):
        await RingsApart(replace(OPTIONS, model=tmp_path / "missing.gguf"), 50).run(1, LOAD)


def test_only_whole_shares_on_free_hops_have_rings_apart() -> None:
    assert ApartCell.beside(Cell(2, 8, 5)) == ApartCell(2, 4, 5)
    assert ApartCell.beside(Cell(2, 3, 5)) is None
    assert ApartCell.beside(Cell(1, 4, 5)) is None
    assert ApartCell.beside(Cell(2, 8, 5, LinkShape(0.02))) is None
