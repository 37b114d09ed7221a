"""Transcripts of the ring protocol: commands, and indented below each one what it leads to.

``pytest tests/core/test_stories.py --rewrite-stories`` writes what happens now; read the difference before it is
committed. The commands are the methods of Story; ``poll`` follows each one. Frames return in the order in which they
were injected unless their first Segment is named; a row gives the token 40 + its position.
"""

import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from mdiq.core.frame import Frame, FrameKind, Segment, TokenIds
from mdiq.core.ring import RingProtocol
from mdiq.core.ring_actions import Ended, HeadRow, Inject
from mdiq.core.ring_settings import RingSettings
from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.core.types import Epoch, RingSpec, SeqId
from mdiq.errors import MdiqError

STORIES = sorted((Path(__file__).parent / "stories").glob("*.txt"))
SPEC = RingSpec(num_stages=2, kv_tokens=64, context_tokens=32, caps=(1, 2))
SETTINGS = RingSettings(
    chunk_tokens=4, prefill_tokens=64, lap_timeout_s=10.0, token_timeout_s=0.0, max_replays=2, prefix_tokens=0
)


def _values(words: list[str]) -> dict[str, Any]:
    """Return the values of words like ``caps=1,2``; None is written as none."""

    def value(text: str) -> object:
        if "," in text:
            return tuple(int(part) for part in text.split(",") if part)
        return None if text == "none" else float(text) if "." in text else int(text)

    return {name: value(text) for name, text in (word.split("=") for word in words)}


def _tokens(text: str) -> tuple[int, ...]:
    """Return the tokens of a text like ``0-6,9``; both ends of a range are in it."""
    ends = [part.partition("-") for part in text.split(",") if part != "none"]
    return tuple(token for first, _, last in ends for token in range(int(first), int(last or first) + 1))


def _segment(text: str) -> Segment:
    parts = re.fullmatch(r"(\d+)\[(\d+):(\d+)\](\*?)", text)
    assert parts is not None, text
    seq_id, start, stop = (int(part) for part in parts.groups()[:3])
    return Segment(SeqId(seq_id), start, stop - start, wants_logits=bool(parts[4]))


def _head(frame: Frame) -> Frame:
    """Return what a Frame is when it has made its Lap."""
    if frame.kind is FrameKind.RELEASE:
        return frame
    rows = TokenIds((0,) * sum(segment.wants_logits for segment in frame.segments))
    return Frame(frame.epoch, FrameKind.HEAD, frame.segments, rows)


class Story:
    """One Ring, the Frames that are on their Lap, and the log."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.ring_of()

    def ring_of(self, *words: str) -> None:
        """Begin with another Ring."""
        values = _values(list(words))
        names = {field.name for field in fields(RingSettings)}
        self.spec = replace(SPEC, **{name: value for name, value in values.items() if name not in names})
        settings = {name: value for name, value in values.items() if name in names}
        self.ring = RingProtocol(replace(SETTINGS, **settings))
        self.ring.begin_epoch(Epoch(1), self.spec)
        self.now = 0.0
        self.under_way: list[Frame] = []
        self.newest: list[Frame] = []  # what the last command brought back
        self.rows: list[HeadRow] = []  # what awaits its token
        self.shown: dict[str, object] = {"": "live 0 of 0, kv 0", "due": "never"}

    def tell(self, line: str) -> list[str]:
        """Run one command; return the lines of its log."""
        command, *words = line.split()
        method: Callable[..., None] = getattr(self, command)
        self.log = []
        try:
            method(*words)
        except MdiqError as error:
            self.log.append(f"refused: {type(error).__name__}: {error}")
        for action in self.ring.poll(self.now):
            if isinstance(action, Inject):
                self._injected(action.frame)
            elif isinstance(action, Ended):
                kind = "" if action.event.error is None else f", {type(action.event.error).__name__}"
                self.log.append(f"sequence {action.event.index} ended: {action.event.finish_reason}{kind}")
            else:
                self.log.append(f"suspect epoch {action.epoch}")
        ring, due = self.ring, self.ring.next_deadline()
        self._show("counts", {**ring.counts}, {})
        self._show("prefill", {**ring.prefill} if "prefix_hits" in ring.prefill else {}, {})
        state = f"live {ring.num_live} of {ring.num_unfinished}, kv {ring.kv_reserved_tokens}"
        self._show("", state + (f" ({len(ring._books.retained)} retained)" if ring._books.retained else ""), None)
        self._show("due", "never" if due is None else round(due, 3), None)
        return self.log

    def _show(self, name: str, value: object, default: object) -> None:
        if self.shown.get(name, default) != value:
            self.shown[name] = value
            text = ", ".join(f"{key} {n}" for key, n in value.items()) if isinstance(value, dict) else value
            self.log.append(f"{name} {text}".strip())

    def _injected(self, frame: Frame) -> None:
        self.under_way.append(frame)
        tokens = f" tokens {' '.join(map(str, frame.payload.ids))}" if isinstance(frame.payload, TokenIds) else ""
        self._show("wishes", {"cap": frame.cap, "chunk": frame.chunk_tokens}, None)
        self.log.append(f"-> {frame}{tokens}")

    def _taken(self, which: tuple[str, ...]) -> list[Frame]:
        """Take Frames off the Ring: the oldest, those named, or all."""
        found = self.under_way[:1] if not which else self.under_way[:]
        if which and which != ("all",):
            found = [frame for frame in found if re.sub(r"<\d+", "", str(frame.segments[0])) in which]
        assert found, "no such Frame is under way"
        self.under_way = [frame for frame in self.under_way if frame not in found]
        return found

    def submit(self, index: str, prompt: str, *words: str) -> None:
        values = _values(list(words))
        params = SamplingParams(max_tokens=values.get("max", 4))
        self.ring.submit(Sequence(int(index), _tokens(prompt), params, deadline=values.get("deadline")), self.now)

    def arrives(self, *which: str) -> None:
        """Frames are back, and their rows wait for the sampler."""
        self.newest = self._taken(which)
        for frame in self.newest:
            self.rows += [row for row in self.ring.returned(_head(frame), self.now) if isinstance(row, HeadRow)]

    def sampled(self) -> None:
        rows, self.rows = self.rows, []
        for row in rows:
            event = self.ring.sampled(row.seq_id, 40 + row.sequence.num_tokens, now=self.now)
            if event is None:
                self.log.append(f"the token of {row.seq_id} is not wanted")
            else:
                reason = "" if event.finish_reason is None else f", the last one: {event.finish_reason}"
                self.log.append(f"sequence {event.index}: token {event.token} at {event.position}{reason}")

    def back(self, *which: str) -> None:
        """Frames are back, and their rows become tokens."""
        self.arrives(*which)
        self.sampled()

    def lost(self, *which: str) -> None:
        self._taken(which)

    def again(self) -> None:
        """What the last command brought comes a second time."""
        for frame in self.newest:
            self.rows += [row for row in self.ring.returned(_head(frame), self.now) if isinstance(row, HeadRow)]
        self.sampled()

    def foreign(self, *segments: str) -> None:
        """A Frame comes that nobody sent."""
        frame = Frame(self.ring.epoch, FrameKind.HIDDEN, tuple(map(_segment, segments)))
        self.rows += [row for row in self.ring.returned(_head(frame), self.now) if isinstance(row, HeadRow)]
        self.log += [f"row {row.row} is of {row.seq_id}" for row in self.rows]
        self.sampled()

    def at(self, time: str) -> None:
        self.now = float(time)

    def heard(self, time: str) -> None:
        self.now = float(time)
        self.ring.heard(self.now)

    def gap(self, *seq_ids: str) -> None:
        self.ring.fault([SeqId(int(seq_id)) for seq_id in seq_ids])

    def fail(self, *seq_ids: str) -> None:
        self.ring.fail([SeqId(int(seq_id)) for seq_id in seq_ids], MdiqError("out of memory"))

    def fail_all(self) -> None:
        self.ring.fail_all(MdiqError("out of memory"))

    def pause(self) -> None:
        """Put nothing into the Ring until the next Epoch."""
        self.ring.pause()

    def cancel(self, index: str) -> None:
        self.ring.cancel(int(index))

    def epoch(self, epoch: str, *words: str) -> None:
        self.ring.begin_epoch(Epoch(int(epoch)), replace(self.spec, **_values(list(words))))

    def pace(self, *words: str) -> None:
        self.ring.pace(replace(self.spec, **_values(list(words))))

    def drop_prefixes(self) -> None:
        self.ring.drop_prefixes()


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_the_ring_protocol_tells_this_story(path: Path, request: pytest.FixtureRequest) -> None:
    told = path.read_text(encoding="utf-8")
    story, lines = Story(), []
    for line in told.splitlines():
        if not line.startswith("    "):
            lines.append(line)
            if line and not line.startswith("#"):
                lines += [f"    {entry}" for entry in story.tell(line)]
    text = "\n".join(lines) + "\n"
    if request.config.getoption("--rewrite-stories"):
        path.write_text(text, encoding="utf-8")
    else:
        assert text == told
