"""A file of prompts over restarts: killed between any two steps, a run goes on and answers each request once."""

import io
import json
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from mdiq.bench.shapes import SHAPES, shape_file
from mdiq.cli import run
from mdiq.cli.prompts import read_prompts
from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.core.types import LayerRange, WeightSettings
from mdiq.errors import ConfigError, EngineError
from mdiq.plan.pace import PaceSettings
from mdiq.runtime.options import RingOptions
from mdiq.runtime.ring_host import RingHost
from mdiq.service.batch import Batch, about
from mdiq.service.journal import Begun, Changes, Journal
from mdiq.service.recorder import Recorder
from mdiq.service.requests import PromptLine, Requests
from mdiq.service.results import ResultsFile
from mdiq.service.text_pipe import TokenizerPipe
from tests.fake_ring import FakeRing, ring_options

DEFAULTS = SamplingParams(max_tokens=12)
REQUESTS: tuple[Mapping[str, object], ...] = (
    {"prompt_token_ids": [1, 2, 3]},
    {"prompt_token_ids": [1, 2, 4], "temperature": 0.9, "seed": 5, "max_tokens": 20},
    {"prompt_token_ids": [9], "temperature": 1.5, "seed": 6, "repetition_penalty": 1.3, "max_tokens": 30},
    {"prompt_token_ids": [8, 8], "max_tokens": 1},
    {"prompt_token_ids": [5, 8], "presence_penalty": 1.5, "frequency_penalty": 0.5, "max_tokens": 40, "min_tokens": 30},
    {"prompt_token_ids": [3], "temperature": 0.8, "seed": 2, "logit_bias": {"5": 5, "9": -100}, "max_tokens": 30},
    {"prompt_token_ids": [7], "temperature": 2.0, "seed": 1, "max_tokens": 60, "stop": [" 1"]},
)


class NumberTokenizer:
    """Says each token as a number; all that is needed of a tokenizer here."""

    eos_token_ids = frozenset({5, 6, 7})

    def with_special_stops(self, params: SamplingParams) -> SamplingParams:
        return params

    def stream(self) -> Any:
        return SimpleNamespace(push=lambda token: f" {token}", finish=lambda *, drops_half: "")


class Rings:
    """One ring for many runs: the pipe of each Sequence is that of the run."""

    def __init__(self, ring: RingHost) -> None:
        self.ring = ring
        self.requests: Requests | None = None

    def pipe(self, sequence: Sequence) -> TokenizerPipe:
        assert self.requests is not None
        return self.requests.pipe(sequence)


@pytest.fixture
async def rings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rings]:
    with monkeypatch.context() as patch:
        patch.setenv("MDIQ_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        options = RingOptions(
            shape_file("tiny", 8, lambda _: None),
            (LayerRange(0, 2), LayerRange(2, 4)),
            weights=WeightSettings("int8"),
            in_process=True,
            kv_tokens=512,
        )
        holder: list[Rings] = []
        async with RingHost(options, make_pipe=lambda sequence: holder[0].pipe(sequence)) as ring:
            holder.append(Rings(ring))
            yield holder[0]


@pytest.fixture
def lines(tmp_path: Path) -> list[PromptLine]:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
    return read_prompts(path, DEFAULTS)


async def _serve(rings: Rings, lines: list[PromptLine], out: Path, *, resume: bool) -> list[PromptLine]:
    """Answer what has no result, as `mdiq run` does; return the lines that were asked."""
    config: Any = SimpleNamespace(vocab_size=SHAPES["tiny"].vocab_size, context_tokens=512)
    rings.requests = requests = Requests(NumberTokenizer(), config, raw=True)  # type: ignore[arg-type]
    options: Any = SimpleNamespace(prompts=Path("in.jsonl"), as_json=False)
    ring: Any = SimpleNamespace(pace=PaceSettings())
    with Batch(out, resume=resume, is_journalled=True) as batch:
        todo = run._todo(batch, lines, Console(file=io.StringIO()))
        its = run._Run(options, ring, requests, todo, Console(file=io.StringIO()), batch, None)
        its._recorder = Recorder(batch.results, batch.journal, interval_s=0.1)
        await its.serve_all(rings.ring)
        batch.end()
    return todo


def _answers(out: Path) -> dict[int, tuple[object, ...]]:
    """Return what each request was answered; fail if one was answered twice, or a line is not whole."""
    text = out.read_text()
    assert text.endswith("\n")
    results = [json.loads(line) for line in text.splitlines()]
    fields = ("prompt_token_ids", "token_ids", "text", "finish_reason", "request")
    answers = {result["index"]: tuple(result[field] for field in fields) for result in results}
    assert len(answers) == len(results)
    return answers


class Deaths:
    """Keeps what the disk has before and after every step of a run, and amid a line: what a kill there leaves."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.left: list[Path] = []
        append, write = ResultsFile.append, Journal.write

        def appended(file: ResultsFile, lines: list[str]) -> None:
            before = file.path.stat().st_size
            append(file, lines)
            self._keep(file.path)
            for num_bytes in (1, file.path.stat().st_size - before - 1):
                with self._keep(file.path).open("r+b") as cut:
                    cut.truncate(before + num_bytes)

        def written(journal: Journal, changes: Changes) -> None:
            write(journal, changes)
            self._keep(journal.path.with_suffix(""))

        patch.setattr(ResultsFile, "append", appended)
        patch.setattr(Journal, "write", written)

    def _keep(self, out: Path) -> Path:
        into = self.folder / f"{len(self.left)}"
        into.mkdir()
        for file in out.parent.glob(f"{out.name}*"):
            shutil.copy(file, into)
        self.left.append(into / out.name)
        return into / out.name


async def test_a_run_that_is_killed_between_any_two_steps_is_finished_with_each_answer_once(
    rings: Rings, lines: list[PromptLine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("calm", "killed", "left"):
        (tmp_path / name).mkdir()
    await _serve(rings, lines, tmp_path / "calm" / "out.jsonl", resume=False)
    calm = _answers(tmp_path / "calm" / "out.jsonl")
    assert {str(answer[3]) for answer in calm.values()} == {"length", "stop"} and len(calm) == len(REQUESTS)
    assert [file.name for file in (tmp_path / "calm").iterdir()] == ["out.jsonl"], "the journal is removed"
    with monkeypatch.context() as patch:
        deaths = Deaths(tmp_path / "left", patch)
        await _serve(rings, lines, tmp_path / "killed" / "out.jsonl", resume=False)
    num_resumed = 0
    for out in deaths.left:
        await _serve(rings, lines, out, resume=True)
        assert _answers(out) == calm
        num_resumed += sum(json.loads(line).get("resumed_tokens", 0) for line in out.read_text().splitlines())
        assert [file.name for file in out.parent.iterdir()] == ["out.jsonl"]
    # At least one state of the journal, and three of a results file; a busy machine writes more at once.
    assert len(deaths.left) >= 4 and num_resumed > 0, "too little was killed to say anything"


async def test_an_answer_whose_tokens_were_all_there_is_not_computed_again(
    rings: Rings, lines: list[PromptLine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    await _serve(rings, lines, out, resume=False)
    whole = [json.loads(line) for line in out.read_text().splitlines()]
    calm = _answers(out)
    out.write_text("")
    with Batch(out, resume=False, is_journalled=True) as batch:
        assert batch.journal is not None
        tokens = {f"{result['index']}": (0, result["token_ids"]) for result in whole}
        begun = {f"{line.index}": _begun(line) for line in lines}
        batch.journal.write(Changes(begun, tokens))
    rings.ring.service.ring.reset_counts()
    await _serve(rings, lines, out, resume=True)
    assert _answers(out) == calm
    assert rings.ring.service.ring.prefill["prefill_tokens"] == 0
    assert all(json.loads(line)["timings"]["ttft_s"] is None for line in out.read_text().splitlines())


def _begun(line: PromptLine) -> Begun:
    assert line.token_ids is not None
    return Begun(line.token_ids, line.params)


async def test_requests_that_a_lost_ring_has_ended_go_on_in_the_next_run(tmp_path: Path) -> None:
    lines = [
        PromptLine(i, f"in.jsonl:{i}", SamplingParams(max_tokens=4), token_ids=(1,), digest=f"{i}") for i in (0, 1)
    ]
    out = tmp_path / "out.jsonl"
    requests = Requests(NumberTokenizer(), SimpleNamespace(vocab_size=9), raw=True)  # type: ignore[arg-type]
    options: Any = SimpleNamespace(prompts=Path("in.jsonl"), as_json=False)
    ring: Any = SimpleNamespace(pace=PaceSettings())
    for failure, resume in ((EngineError("not a number"), False), (None, True)):
        with Batch(out, resume=resume, is_journalled=True) as batch:
            todo = run._todo(batch, lines, Console(file=io.StringIO()))
            its = run._Run(options, ring, requests, todo, Console(file=io.StringIO()), batch, None)
            async with FakeRing(ring_options(1), failure=failure) as fake:
                await its.serve_all(fake)  # type: ignore[arg-type]
            assert [sequence.generated for sequence in fake.asked] == [[0] if failure else [0, 1, 2, 3]] * 2
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [result["finish_reason"] for result in results] == ["error"] * 2 + ["length"] * 2
    assert [result.get("resumed_tokens") for result in results] == [None] * 2 + [1] * 2


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that runs `mdiq run` up to where it looks for the model; it returns the error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')

    def execute(*, out: str = "out.jsonl", resume: bool = False, model: str = "nowhere.gguf") -> str:
        with pytest.raises(ConfigError) as caught:
            run.execute(run.RunOptions(prompts=Path("in.jsonl"), out=Path(out), resume=resume, model=model))
        return str(caught.value)

    return execute


def test_an_earlier_run_is_gone_on_with_only_if_it_is_asked_for(main: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("no result, and no end of a line")
    assert main().startswith("out.jsonl: it exists; add --resume to go on where it stopped, or move it away")
    assert "out.jsonl:1: " not in main(), "only --resume reads it"
    assert out.read_text() == "no result, and no end of a line"
    out.unlink()
    with Journal(tmp_path / "out.jsonl.journal") as journal:
        journal.write(Changes({"0": _begun(PromptLine(0, "", DEFAULTS, token_ids=(1,)))}))
    assert main() == (
        "out.jsonl.journal: answers of an earlier run have begun; add --resume to go on with them, or delete it"
    )


def test_a_second_run_of_one_results_file_is_refused_in_words(main: Callable[..., str]) -> None:
    with Batch(Path("out.jsonl"), resume=False, is_journalled=True):
        assert main(resume=True) == ("out.jsonl: another mdiq run writes it; wait for that one, or give another --out")


def test_a_journal_that_cannot_be_used_ends_the_command_before_anything_loads(
    main: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "out.jsonl.journal").write_bytes(b"x" * 5_000)
    assert "out.jsonl.journal: it is damaged (file is not a database); delete it" in main(resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lines": "b"}, r"the prompts file \(by SHA-256\) is \w+, and was \w+"),
        ({"defaults": SamplingParams(max_tokens=12, temperature=0.5)}, r"temperature is 0.5, and was 0.0\. "),
        ({"weights": WeightSettings("int4")}, "weights is int4, and was auto"),
        ({"weights": WeightSettings(exact=False)}, "mode is fast, and was exact"),
        ({"wires": ("i8",)}, "wire is i8, and was auto"),
        ({"raw": True}, "raw is true, and was false"),
    ],
)
def test_a_run_that_would_say_something_else_is_refused(tmp_path: Path, changes: Mapping[str, Any], words: str) -> None:
    def described(**changes: Any) -> Mapping[str, str]:
        lines = [PromptLine(0, "", DEFAULTS, digest=changes.get("lines", "a"))]
        given = {name: changes[name] for name in ("weights", "wires") if name in changes}
        options = ring_options(2, **given)
        return about(lines, changes.get("defaults", DEFAULTS), options, raw=changes.get("raw", False))

    out = tmp_path / "out.jsonl"
    with Batch(out, resume=False, is_journalled=True) as batch:
        batch.expect(described())
        assert batch.journal is not None
        batch.journal.write(Changes({"0": _begun(PromptLine(0, "", DEFAULTS, token_ids=(1,)))}))
    with Batch(out, resume=True, is_journalled=True) as batch:
        batch.expect(described())
        with pytest.raises(ConfigError, match=words):
            batch.expect(described(**changes))


def test_another_model_is_refused_and_the_same_one_elsewhere_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))
    model, other = shape_file("tiny", 8, lambda _: None), shape_file("tiny", 4, lambda _: None)
    shutil.copy(model, tmp_path / "moved.gguf")
    with Batch(tmp_path / "out.jsonl", resume=False, is_journalled=True) as batch:
        batch.expect_model(model)
        batch.expect_model(tmp_path / "moved.gguf")
        with pytest.raises(ConfigError, match=r"the model \(by SHA-256\) is \w+, and was \w+"):
            batch.expect_model(other)


def test_nothing_is_left_of_a_run_that_failed_before_its_first_answer(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Batch(out, resume=False, is_journalled=True) as batch:
        batch.expect({"temperature": "0.5"})
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]
    with Batch(out, resume=False, is_journalled=True) as batch:
        batch.expect({"temperature": "0.7"})


def test_results_that_go_to_no_disk_have_no_journal() -> None:
    with Batch(Path("/dev/null"), resume=False, is_journalled=True) as batch:
        assert batch.journal is None
        batch.expect({"temperature": "0.5"})
        batch.end()
    assert not Path("/dev/null.journal").exists()
