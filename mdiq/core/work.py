"""What a Stage has computed, in figures that say how long it should have taken."""

from dataclasses import astuple, dataclass

from mdiq.core.frame import Batch


@dataclass(frozen=True, slots=True)
class Work:
    """The forwards of a Stage since it began to serve: Batches of single tokens, and Batches of prompts.

    forward_s: seconds that all of them took; the Starter's head is not part of it.
    handling_s: CPU seconds of the event loop meanwhile: Frames, and on the Starter also requests and their answers.
    """

    forward_s: float = 0.0
    decode_batches: int = 0
    decode_segments: int = 0
    prompt_batches: int = 0
    prompt_tokens: int = 0
    handling_s: float = 0.0

    def __post_init__(self) -> None:
        if min(astuple(self)) < 0:
            raise ValueError("it has figures below 0")

    @property
    def num_forwards(self) -> int:
        """All Batches."""
        return self.decode_batches + self.prompt_batches

    def plus(self, batch: Batch, time_s: float) -> "Work":
        """Return this and a forward of one more Batch, which took so long."""
        if not batch.segments:  # it only frees KV cache
            return self
        is_decode = batch.num_tokens == len(batch.segments)
        return Work(
            self.forward_s + time_s,
            self.decode_batches + is_decode,
            self.decode_segments + is_decode * len(batch.segments),
            self.prompt_batches + (not is_decode),
            self.prompt_tokens + (not is_decode) * batch.num_tokens,
            self.handling_s,
        )

    def since(self, before: "Work") -> "Work | None":
        """Return what was computed after ``before``; None if the Stage has begun to count anew in between."""
        try:
            return Work(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))
        except ValueError:
            return None
