"""A file of prompts and its file of results, over restarts: what has begun, and whether the same run goes on."""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from mdiq.core.sequence import SamplingParams
from mdiq.errors import ConfigError
from mdiq.runtime.options import RingOptions
from mdiq.service.journal import Begun, Journal
from mdiq.service.requests import PromptLine
from mdiq.service.results import ResultsFile


class Batch:
    """The open files of one run; both are locked.

    journal: beside the results; None for a lone prompt, and for results that go to no disk.
    begun: requests that have begun in earlier runs, by index; some may have a result by now.
    """

    def __init__(self, out: Path, *, resume: bool, is_journalled: bool) -> None:
        """Open or make the files.

        Raises:
            ConfigError: they cannot be used, or there is an earlier run and not ``resume``.
            CapacityError: the disk is full.
        """
        self.begun: Mapping[int, Begun] = {}
        with contextlib.ExitStack() as opened:
            self.results = results = opened.enter_context(ResultsFile(out))
            has_results = results.is_regular and results.num_bytes > 0
            if has_results and not resume:
                raise ConfigError(f"{out}: it exists; add --resume to go on where it stopped, or move it away")
            self.journal: Journal | None = None
            if is_journalled and results.is_regular and out.resolve().parts[1:2] not in (("dev",), ("proc",)):
                self.journal = journal = opened.enter_context(Journal(_journal_of(out)))
                self.begun = {int(key): begun for key, begun in journal.begun().items()}
                if self.begun and not resume:
                    raise ConfigError(
                        f"{journal.path}: answers of an earlier run have begun; add --resume to go on with them, or "
                        "delete it"
                    )
                if not (self.begun or has_results):
                    journal.expect_anything()
            self._opened = opened.pop_all()

    def __enter__(self) -> "Batch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._opened:
            if self.journal is not None and not self.results.num_bytes and not self.journal.begun():
                self.end()  # it has failed before the first answer

    def expect(self, about: Mapping[str, str]) -> None:
        """See that the run is the one that has begun; see Journal.expect."""
        if self.journal is not None:
            self.journal.expect(about)

    def expect_model(self, model: Path) -> None:
        """See that the model is the one that has begun; it imports torch. See Journal.expect."""
        if self.journal is not None:
            from mdiq.engine.formats.checkpoint import open_checkpoint

            with open_checkpoint(model) as checkpoint:
                self.journal.expect({"the model (by SHA-256)": checkpoint.digest[:32]})

    def end(self) -> None:
        """Remove the journal: nothing is to go on."""
        if self.journal is not None:
            self.journal.remove()
            self.journal = None


def _journal_of(out: Path) -> Path:
    """Return where the journal is: beside the file itself, whatever link leads to it."""
    file = out.resolve() if out.is_symlink() else out
    return file.with_name(f"{file.name}.journal")


def about(
    lines: Sequence[PromptLine], defaults: SamplingParams, options: RingOptions, *, raw: bool
) -> Mapping[str, str]:
    """Return what the text of answers depends on, the model aside, as an operator knows it.

    Nodes, layers and threads are not in it: in exact mode they change no token.
    """
    digest = hashlib.sha256("".join(line.digest for line in lines).encode()).hexdigest()
    weights = options.weights
    return {
        "the prompts file (by SHA-256)": digest[:32],
        "weights": weights.format,
        "dtype": weights.dtype,
        "mode": "exact" if weights.exact else "fast",
        "device": weights.device,
        "wire": ",".join(sorted({*options.wires})),  # the plan may have left Nodes out
        "raw": str(raw).lower(),
        **{name: str(value) for name, value in asdict(defaults).items()},
    }
