"""A file of prompts that `mdiq run` answers while its Starter is killed again and again."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from mdiq.errors import ConfigError
from mdiq.service.journal import Begun, Journal

CALM_S = 1_800.0
ORPHANS_S = 30.0  # a node ends when its Starter's pipe does; on a busy machine that may take a while
POLL_S = 0.1


@dataclass(slots=True)
class Death:
    """A Starter that was killed: when, what was on the disk then, and what outlived it.

    kept_tokens: of answers in the journal. unwritten_s: time since anything was written, from which tokens are lost.
    orphans: node processes that did not end by themselves.
    """

    after_s: float
    is_alone: bool
    num_nodes: int
    num_results: int
    num_begun: int
    kept_tokens: int
    unwritten_s: float
    orphans: list[int] = field(default_factory=list)


class KilledBatch:
    """One file of prompts, and runs of it. command: `mdiq run` with all that is not its files."""

    def __init__(self, command: Sequence[str], prompts: Path, folder: Path) -> None:
        self._command = [*command, "--prompts", str(prompts)]
        self._folder = folder
        self.out = folder / "out.jsonl"
        self.journal = folder / "out.jsonl.journal"
        self.deaths: list[Death] = []
        self.said = ""

    def run_calmly(self, out: Path) -> Mapping[int, Mapping[str, Any]]:
        """Return the results of a run that nobody disturbs."""
        done = subprocess.run(
            [*self._command, "--out", str(out)], capture_output=True, text=True, timeout=CALM_S, check=False
        )
        assert done.returncode == 0, done.stderr
        return results_of(out)

    def run_and_kill(self, after_s: float, *, is_alone: bool, once_it_serves: bool) -> bool:
        """Go on, and kill the Starter so long after its start, or after it has begun to answer; tell whether it lived.

        is_alone: its nodes are left to themselves; else they are killed with it.
        """
        start_s = time.monotonic()
        process = self._start()
        if once_it_serves:
            before = self._on_disk()
            while process.poll() is None and self._on_disk() == before:
                time.sleep(POLL_S)
        try:
            process.wait(after_s)
            self._ended(process)
            return False
        except subprocess.TimeoutExpired:
            pass
        nodes = psutil.Process(process.pid).children(recursive=True)
        # In one go, as far as possible: a Starter that lives sees its nodes die, and starts them again.
        for pid in (process.pid, *(() if is_alone else [node.pid for node in nodes])):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        lived_s, unwritten_s = time.monotonic() - start_s, time.time() - self._written_at()
        state = self._on_disk()
        self.deaths.append(Death(round(lived_s, 2), is_alone, len(nodes), *state, round(unwritten_s, 2)))
        _, alive = psutil.wait_procs(nodes, timeout=ORPHANS_S)
        self.deaths[-1].orphans += [node.pid for node in alive]
        return True

    def finish(self) -> None:
        """Go on to the end."""
        process = self._start()
        process.wait(CALM_S)
        self._ended(process)

    def _start(self) -> "subprocess.Popen[bytes]":
        with (self._folder / "log").open("ab") as log:
            command = [*self._command, "--out", str(self.out), "--resume"]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def _ended(self, process: "subprocess.Popen[bytes]") -> None:
        self.said = (self._folder / "log").read_text(errors="replace")
        assert process.returncode == 0, self.said[-4_000:]

    def _written_at(self) -> float:
        return max((file.stat().st_mtime for file in self._folder.glob("out.jsonl*")), default=time.time())

    def _on_disk(self) -> tuple[int, int, int]:
        """Return how many results and answers that have begun the disk has, and the tokens of these."""
        with tempfile.TemporaryDirectory() as folder:  # the files stay as the run has them
            for file in self._folder.glob("out.jsonl*"):
                with contextlib.suppress(FileNotFoundError):  # it ends just now
                    shutil.copy(file, folder)
            begun: Mapping[str, Begun] = {}
            if (copy := Path(folder) / self.journal.name).exists():
                # A copy of files that are being written may fit together or not.
                with contextlib.suppress(ConfigError), Journal(copy) as journal:
                    begun = journal.begun()
        done = {f"{index}" for index in results_of(self.out)} if self.out.exists() else set()
        tokens = [len(each.tokens) for key, each in begun.items() if key not in done]
        return len(done), len(tokens), sum(tokens)


def results_of(out: Path) -> dict[int, Mapping[str, Any]]:
    """Return the whole lines of a results file by index; fail if an index comes twice."""
    *lines, _ = out.read_bytes().split(b"\n")
    results = [json.loads(line) for line in lines]
    found = {result["index"]: result for result in results}
    assert len(found) == len(results), "a request has two results"
    return found


def answer_of(result: Mapping[str, Any]) -> tuple[object, ...]:
    """Return what must not depend on a restart."""
    return tuple(result[name] for name in ("prompt_token_ids", "token_ids", "text", "finish_reason", "request"))
