"""Rows that are back wait here for the head: those that tokens are made of, and those that score prompts.

Tokens first. Prompts are scored a few rows at a time, so that nobody's next token waits for many. The token after a
prompt is not drawn before all of the prompt is scored.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import structlog

from mdiq.core.frame import Frame, Payload
from mdiq.core.logprobs import Drawn
from mdiq.core.ring import RingProtocol
from mdiq.core.ring_actions import HeadRow, PromptRows
from mdiq.errors import EngineError, MdiqError
from mdiq.runtime.loops import Worker
from mdiq.runtime.starter_engine import StarterEngine

log = structlog.get_logger()

PIECE_ROWS = 32
"""Rows of a prompt that one run of the head scores: 19 MB of logits where there are 150,000 tokens."""

T = TypeVar("T")


class Head:
    """Makes tokens and log-probabilities of Frames from the last Hop. deliver: called with each token and its row."""

    def __init__(
        self, ring: RingProtocol, engine: StarterEngine, worker: Worker, deliver: Callable[[HeadRow, Drawn], None]
    ) -> None:
        self._ring = ring
        self._engine = engine
        self._worker = worker
        self._deliver = deliver
        self._returned: deque[Frame] = deque()
        # In the order of their return; the ring protocol bounds how many rows of prompts there are.
        self._to_score: deque[tuple[PromptRows | HeadRow, Payload]] = deque()
        self._scored: list[tuple[HeadRow, Payload]] = []  # whose prompts have been scored

    @property
    def num_waiting(self) -> int:
        """Segments that are back and that nobody has looked at yet."""
        return sum(len(frame.segments) for frame in self._returned)

    def add(self, frame: Frame) -> None:
        """Take in a Frame from the last Stage."""
        self._returned.append(frame)

    def clear(self) -> None:
        """Forget all rows: a new Epoch begins."""
        self._returned.clear()
        self._to_score.clear()
        self._scored.clear()

    async def sample(self) -> bool:
        """Make tokens of all rows that wait for nothing else; return False if nothing was there."""
        if not self._returned and not self._scored:
            return False
        rows = self._take_rows()
        # One forward of the head for all rows; if it fails, one for each, so that a bad row harms no other Sequence.
        if rows and not await self._sample(rows):
            for row in rows:
                await self._sample([row], is_final=True)
        return True

    async def score(self) -> bool:
        """Score some rows of a prompt, the oldest; return False if there are none."""
        if not self._to_score:
            return False
        rows, payload = self._to_score.popleft()
        if isinstance(rows, HeadRow):
            self._scored.append((rows, payload))
        elif self._ring.awaits_scores(rows.seq_id):
            job = self._engine.score
            found = await self._run(
                f"head, {rows.num_rows} rows of a prompt", lambda: job(payload, rows.sequence, rows.start)
            )
            if isinstance(found, MdiqError):
                self._ring.fail([rows.seq_id], found)
            else:
                self._ring.scored(rows.seq_id, rows.start, found)
        return True

    def _take_rows(self) -> list[tuple[HeadRow, Payload]]:
        """Return the rows to make tokens of now; what scores prompts, and what waits for that, goes to its queue."""
        now = self._worker.clock()
        taken, self._scored = self._scored, []
        while self._returned:
            frame = self._returned.popleft()
            for rows in self._ring.returned(frame, now):
                if isinstance(rows, PromptRows):
                    self._to_score += _pieces(rows, frame.payload)
                    continue
                row = rows, frame.payload.rows(rows.row, rows.row + 1)
                if any(waiting.seq_id == rows.seq_id for waiting, _ in self._to_score):
                    self._to_score.append(row)
                else:
                    taken.append(row)
        return taken

    async def _sample(self, rows: list[tuple[HeadRow, Payload]], *, is_final: bool = False) -> bool:
        payloads = [payload for _, payload in rows]
        sequences = [row.sequence for row, _ in rows]
        drawn = await self._run(f"head, {len(rows)} rows", lambda: self._engine.sample(payloads, sequences))
        if isinstance(drawn, MdiqError):
            if is_final:
                self._ring.fail([row.seq_id for row, _ in rows], drawn)
            return False
        for (row, _), each in zip(rows, drawn, strict=True):
            self._deliver(row, each)
        return True

    async def _run(self, label: str, job: Callable[[], T]) -> T | MdiqError:
        """Run the head in the worker; return its result, or why there is none: the Ring of all others goes on."""
        try:
            return await self._worker.run(label, job)
        except MdiqError as error:
            return error
        except Exception as error:  # of these rows, whatever it is
            log.exception("sampling_broke", job=label)
            return EngineError(f"sampling failed: {error!r}; see the log")


def _pieces(rows: PromptRows, payload: Payload) -> list[tuple[PromptRows | HeadRow, Payload]]:
    """Return rows in pieces of at most PIECE_ROWS. payload: of their Frame."""
    pieces: list[tuple[PromptRows | HeadRow, Payload]] = []
    for first in range(0, rows.num_rows, PIECE_ROWS):
        num_rows = min(PIECE_ROWS, rows.num_rows - first)
        piece = replace(rows, row=rows.row + first, num_rows=num_rows, start=rows.start + first)
        pieces.append((piece, payload.rows(piece.row, piece.row + num_rows)))
    return pieces
