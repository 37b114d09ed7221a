"""Requests that are asked at once and streamed, their answers, and what tells two answers apart."""

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

ASK_AGAIN_S = 0.1
STEP_S = 60.0  # an event that is waited for comes within it
# What the API says when it does not take a request; new requests get 503 during a pause. Another text
# with the same code is that of a request that was taken and lost.
_REFUSED = re.compile(
    r"paused: |degraded: |the ring does not serve: |the ring failed: |forms the ring|loading: |waiting for |starts$"
    r"|measures |\S+ leaves when |drains |lets in |reloads"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A request of /v1/completions by name."""

    name: str
    body: Mapping[str, object]


@dataclass(slots=True)
class Answer:
    """An answer, or as much of it as there was.

    num_events: chunks with text. longest_gap_s: the longest time without an event after the first one. num_refused: how
    often it was asked in vain before it was taken. error: in words, of the API or of the connection. events_s: when the
    chunks with text came, on the clock of ``time.monotonic``.
    """

    text: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, int] = field(default_factory=dict)
    error: str | None = None
    is_over: bool = False
    num_events: int = 0
    num_refused: int = 0
    longest_gap_s: float = 0.0
    events_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an answer is beside that of the calm run: kind is one of "same", "differs", "error", "hangs"."""

    kind: str
    text: str = ""


def compare(calm: Answer, found: Answer) -> Verdict:
    """Return whether an answer is that of the calm run in text, finish_reason and counts of tokens."""
    if not found.is_over:
        return Verdict("hangs", f"hangs after {found.num_events} events")
    if found.error is not None:
        return Verdict("error", f"error after {found.num_events} events: {found.error}")
    told: list[str] = []
    if found.text != calm.text:
        shorter = min(len(calm.text), len(found.text))
        at = next((i for i in range(shorter) if calm.text[i] != found.text[i]), shorter)
        told.append(f"text from character {at} on: {found.text[at : at + 40]!r}, not {calm.text[at : at + 40]!r}")
    if found.finish_reason != calm.finish_reason:
        told.append(f"finish_reason {found.finish_reason}, not {calm.finish_reason}")
    if found.usage != calm.usage:
        told.append(f"usage {dict(found.usage)}, not {dict(calm.usage)}")
    return Verdict("differs", "; ".join(told)) if told else Verdict("same")


class Asked:
    """Requests that run at the same time, one thread each, from the constructor on."""

    def __init__(self, api: str, samples: Sequence[Sample]) -> None:
        self._api = api
        self.samples = samples
        self._answers = [Answer() for _ in samples]
        self._links: list[http.client.HTTPConnection | None] = [None] * len(samples)
        self._changed = threading.Condition()
        self._is_left = False
        self._threads = [
            threading.Thread(target=self._ask, args=(i,), name=f"asks {sample.name}", daemon=True)
            for i, sample in enumerate(samples)
        ]
        for thread in self._threads:
            thread.start()

    def until_event(self, sample: int, number: int) -> None:
        """Wait until an answer has so many events.

        Raises:
            TimeoutError: it does not come, or the answer is over before it.
        """
        answer = self._answers[sample]
        self._until(lambda: answer.num_events >= number or answer.is_over, f"event {number} of sample {sample}")
        if answer.num_events < number:
            raise TimeoutError(f"sample {sample} was over after {answer.num_events} events: {answer.error}")

    def until_over(self, sample: int) -> None:
        """Wait until an answer is over."""
        self._until(lambda: self._answers[sample].is_over, f"the end of sample {sample}")

    def is_over(self) -> bool:
        """Whether all answers are."""
        return all(answer.is_over for answer in self._answers)

    def is_any_over(self) -> bool:
        """Whether an answer is."""
        return any(answer.is_over for answer in self._answers)

    def num_running(self) -> int:
        """Return how many answers are not over."""
        return sum(not answer.is_over for answer in self._answers)

    def num_events(self, sample: int) -> int:
        """Return how many events an answer has so far."""
        return self._answers[sample].num_events

    def events_s(self) -> list[list[float]]:
        """Return when the chunks with text of each answer have come so far."""
        return [list(answer.events_s) for answer in self._answers]

    def answers(self, timeout_s: float) -> list[Answer]:
        """Wait for all answers, at most for so long; those that hang are left and say so."""
        with self._changed:
            self._changed.wait_for(self.is_over, timeout_s)
            self._is_left = True
            found = [_copy(answer) for answer in self._answers]
            links = list(self._links)
        for link in links:
            with contextlib.suppress(OSError, AttributeError):  # it is closed already
                link.sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
        for thread in self._threads:
            thread.join(STEP_S)
        return found

    def _until(self, holds: Callable[[], bool], what: str) -> None:
        with self._changed:
            if not self._changed.wait_for(holds, STEP_S):
                raise TimeoutError(f"{what} does not come within {STEP_S:g} s")

    def _ask(self, i: int) -> None:
        answer = self._answers[i]
        error: str | None = None
        try:
            while (refused := self._post(i, answer)) is not None and not self._is_left:
                if not _REFUSED.match(refused):
                    error = refused
                    break
                answer.num_refused += 1
                time.sleep(ASK_AGAIN_S)  # as a client does that gets 503
        except (OSError, http.client.HTTPException, ValueError) as broken:
            error = f"{type(broken).__name__}: {broken}"
        with self._changed:
            answer.error = answer.error or error
            if answer.error is None and answer.finish_reason is None:
                answer.error = "the stream ended without a finish_reason"
            answer.is_over = True
            self._changed.notify_all()

    def _post(self, i: int, answer: Answer) -> str | None:
        """Ask once; return why it was not taken, or None when the stream has ended."""
        link = http.client.HTTPConnection(self._api)
        self._links[i] = link
        try:
            body = {**self.samples[i].body, "stream": True, "stream_options": {"include_usage": True}}
            link.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            with link.getresponse() as response:
                if response.status != 200:
                    text = response.read().decode(errors="replace")
                    with contextlib.suppress(ValueError, LookupError, TypeError):
                        text = str(json.loads(text)["error"]["message"])
                    return text if response.status == 503 else f"HTTP {response.status}: {text}"
                last_s: float | None = None
                for line in response:
                    if line.startswith(b"data: {"):
                        now_s = time.monotonic()
                        if last_s is not None:
                            answer.longest_gap_s = max(answer.longest_gap_s, now_s - last_s)
                        last_s = now_s
                        self._take(answer, json.loads(line[6:]))
        finally:
            link.close()
        return None

    def _take(self, answer: Answer, event: Mapping[str, object]) -> None:
        with self._changed:
            if "error" in event:
                answer.error = str(event["error"]["message"])  # type: ignore[index]
            elif usage := event.get("usage"):
                # How much of a prompt was cached depends on what came before, and on what was lost.
                answer.usage = {key: num for key, num in usage.items() if key != "prompt_tokens_details"}
            for choice in event.get("choices", ()):  # type: ignore[attr-defined]
                answer.text += choice["text"]
                if choice["text"]:
                    answer.num_events += 1
                    answer.events_s.append(time.monotonic())
                answer.finish_reason = choice["finish_reason"] or answer.finish_reason
            self._changed.notify_all()


def _copy(answer: Answer) -> Answer:
    return Answer(**{name: getattr(answer, name) for name in Answer.__slots__})
