"""Which of the waiting Segments the next Batch takes. The cap comes from the Plan, see plan/micro_batches.py."""

from collections import deque
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


def coalesce(waiting: deque[Queued], cap: int, token_budget: int) -> list[Queued]:
    """Remove from ``waiting`` what the next Batch runs, oldest first, and return it.

    At most ``cap`` Segments, one of each Sequence, so that the order within a Sequence stays that of arrival; at most
    ``token_budget`` tokens, but always one Segment when any waits. Segments that are left behind keep their order.
    """
    taken: list[Queued] = []
    skipped: list[Queued] = []
    sequences: set[SeqId] = set()
    num_tokens = 0
    while waiting and len(taken) < cap:
        queued = waiting[0]
        if queued.segment.seq_id in sequences:
            skipped.append(waiting.popleft())
            continue
        if taken and num_tokens + queued.segment.length > token_budget:
            break
        taken.append(waiting.popleft())
        sequences.add(queued.segment.seq_id)
        num_tokens += queued.segment.length
    waiting.extendleft(reversed(skipped))
    return taken
