"""Choose the Segments of the next Batch. The cap comes from the Plan, see plan/micro_batches.py."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mdiq.core.frame import Payload, Segment
from mdiq.core.types import SeqId


@dataclass(frozen=True, slots=True)
class Queued:
    """A Segment that waits at a Stage, with its rows.

    is_first: the Stage had not heard of its Sequence before.
    """

    segment: Segment
    payload: Payload
    is_first: bool = False


def coalesce(
    waiting: deque[Queued], cap: int, token_budget: int, is_ready: Callable[[Segment], bool] = lambda _: True
) -> list[Queued]:
    """Remove the Segments of the next Batch from ``waiting``, oldest first, and return them.

    At most ``cap`` Segments, one per Sequence, so that the Segments of a Sequence run in the order of arrival; at most
    ``token_budget`` tokens, but always one Segment when any is ready. Segments that are not taken keep their order.
    A first Segment that is not ready holds back later first Segments: the next Stage knows them by their order.
    """
    taken: list[Queued] = []
    skipped: list[Queued] = []
    sequences: set[SeqId] = set()
    num_tokens = 0
    holds_firsts = False
    while waiting and len(taken) < cap:
        queued = waiting[0]
        segment = queued.segment
        holds_firsts = holds_firsts or not is_ready(segment)
        if segment.seq_id in sequences or (holds_firsts and segment.is_first):
            sequences.add(segment.seq_id)
            skipped.append(waiting.popleft())
            continue
        if taken and num_tokens + segment.length > token_budget:
            break
        taken.append(waiting.popleft())
        sequences.add(segment.seq_id)
        num_tokens += segment.length
    waiting.extendleft(reversed(skipped))
    return taken
