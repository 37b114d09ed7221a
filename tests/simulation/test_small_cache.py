"""More answers than the KV cache holds: all end with the single-process tokens, and nobody waits for ever.

One Stage computes all that waits, then all that came back is sampled: a Ring without time, in which only room counts.
"""

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from mdiq.core.frame import Frame, FrameKind
from mdiq.core.ring import RingProtocol
from mdiq.core.ring_actions import Ended, Inject
from mdiq.core.ring_settings import RingSettings
from mdiq.core.scheduler import MAX_PASSED, MAX_PREEMPTIONS
from mdiq.core.sequence import FinishReason, SamplingParams, Sequence
from mdiq.core.stage import StageProtocol
from mdiq.core.types import Epoch, LayerRange, RingSpec
from tests.fakes import ROW_BYTES, VOCAB, ChainEngine, ChainRows, chain_answer, chain_token

EPOCH = Epoch(1)
NUM_LAYERS = 2


class SmallRing:
    """A Ring of one Stage whose engine refuses more tokens than its cache holds."""

    def __init__(self, kv_tokens: int, block_tokens: int, context_tokens: int = 100_000, max_live: int = 64) -> None:
        self.ring = RingProtocol(RingSettings(chunk_tokens=64))
        self.ring.begin_epoch(
            EPOCH,
            RingSpec(1, kv_tokens, context_tokens, caps=(64,), kv_block_tokens=block_tokens, max_live=max_live),
        )
        self.stage = StageProtocol()
        self.stage.assign(EPOCH, is_last=True)
        self.engine = ChainEngine(
            LayerRange(0, NUM_LAYERS), is_last=True, kv_tokens=kv_tokens, block_tokens=block_tokens
        )
        self.ends: dict[int, FinishReason] = {}
        self.num_laps = 0
        self.peak_live = 0

    def submit(self, index: int, num_prompt: int, max_tokens: int) -> Sequence:
        prompt = tuple((index * 7 + i * i) % VOCAB for i in range(num_prompt))
        sequence = Sequence(index, prompt, SamplingParams(max_tokens=max_tokens))
        self.ring.submit(sequence, 0.0)
        return sequence

    def lap(self, num_lost: int = 0) -> None:
        """Compute all that is injected and sample all rows; the first ``num_lost`` prompts or tokens never arrive."""
        self.num_laps += 1
        for action in self.ring.poll(0.0):
            if isinstance(action, Ended):
                assert action.event.finish_reason is not None
                self.ends[action.event.index] = action.event.finish_reason
            elif isinstance(action, Inject):
                if num_lost and action.frame.kind is FrameKind.HIDDEN:
                    num_lost -= 1
                    self.ring.fault([action.frame.segments[0].seq_id])  # as a Stage would report it later
                    continue
                self.ring.fault(self.stage.receive(action.frame).gaps)
        self.peak_live = max(self.peak_live, self.ring.num_live)
        back: deque[Frame] = deque()
        while (batch := self.stage.take()) is not None:
            back += self.stage.complete(batch, self.engine.forward(batch))
        for frame in back:
            for row in self.ring.returned(frame):
                assert isinstance(frame.payload, ChainRows)
                data = frame.payload.data[row.row * ROW_BYTES : (row.row + 1) * ROW_BYTES]
                event = self.ring.sampled(row.seq_id, chain_token(data))
                if event is not None and event.finish_reason is not None:
                    self.ends[event.index] = event.finish_reason

    def run(self, max_laps: int) -> None:
        while not self.ring.is_quiet:
            assert self.num_laps < max_laps, "the ring does not come to an end"
            self.lap()

    def check(self, sequences: list[Sequence], limit: int) -> None:
        for sequence in sequences:
            num_left = min(sequence.params.max_tokens, limit - len(sequence.prompt))
            answer = chain_answer(sequence.prompt, NUM_LAYERS, num_left)
            if self.ends[sequence.index] is FinishReason.LENGTH:
                assert sequence.generated == answer
            else:
                assert self.ends[sequence.index] is FinishReason.CANCELLED
                assert sequence.generated == answer[: len(sequence.generated)]
        self.ring.drop_prefixes()
        self.run(self.num_laps + 10)
        assert self.ring.kv_reserved_tokens == 0 and not self.engine.states


def test_eight_chats_without_a_limit_run_at_once_and_a_short_one_is_not_kept_after_them() -> None:
    small = SmallRing(kv_tokens=20_000, block_tokens=32, context_tokens=32_768)
    for index in range(8):
        small.submit(index, num_prompt=40, max_tokens=32_768)
    small.lap()
    assert small.ring.num_live == 8
    short = small.submit(8, num_prompt=15, max_tokens=15)
    for _ in range(16):
        small.lap()
    assert short.finish_reason is FinishReason.LENGTH and small.ring.num_live == 8


def test_a_hundred_chats_in_a_cache_of_2_000_tokens_all_end_right_and_their_preemptions_are_counted() -> None:
    small = SmallRing(kv_tokens=2_000, block_tokens=32)
    sequences = [small.submit(i, num_prompt=20 + i % 13, max_tokens=150 + 7 * (i % 11)) for i in range(100)]
    small.run(max_laps=8_000)
    assert small.peak_live > 8
    assert 0 < small.ring.counts["preemptions"] <= 100 * MAX_PREEMPTIONS
    small.check(sequences, limit=1_984)


def test_while_requests_never_stop_coming_each_of_them_ends_and_preempted_ones_with_the_same_tokens() -> None:
    """Each lap the queue is full again: whoever could be preempted or passed for ever would be found waiting."""
    num_unfinished, max_tokens = 8, 60
    small = SmallRing(kv_tokens=256, block_tokens=32)
    sequences: list[Sequence] = []
    submitted: list[int] = []
    num_ended = 0  # of the oldest
    for lap in range(1_500):
        while small.ring.num_unfinished < num_unfinished:
            i = len(sequences)
            sequences.append(small.submit(i, num_prompt=20 + i % 13, max_tokens=max_tokens - 7 * (i % 5)))
            submitted.append(lap)
        small.lap()
        while sequences[num_ended].finish_reason is not None:
            num_ended += 1
        assert lap - submitted[num_ended] <= num_unfinished * max_tokens, "as if they ran one after the other"
    assert small.ring.counts["preemptions"] > 3 and num_ended > 50
    small.run(max_laps=2_500)
    small.check(sequences, limit=256)


def test_a_large_one_that_waits_is_passed_by_small_ones_so_often_and_no_more() -> None:
    small = SmallRing(kv_tokens=640, block_tokens=32, max_live=64)
    small.submit(0, num_prompt=320, max_tokens=300)
    small.lap()
    large = small.submit(1, num_prompt=400, max_tokens=8)
    small.lap()
    assert small.ring.num_live == 1
    little = [small.submit(2 + i, num_prompt=4, max_tokens=4) for i in range(MAX_PASSED + 5)]
    for _ in range(60):
        small.lap()
    done = [sequence.finish_reason is not None for sequence in little]
    assert done == [True] * MAX_PASSED + [False] * 5
    assert large.finish_reason is None
    small.run(max_laps=700)
    assert large.finish_reason is FinishReason.LENGTH and all(sequence.finish_reason for sequence in little)


def test_one_that_may_grow_without_a_limit_does_not_pass() -> None:
    small = SmallRing(kv_tokens=640, block_tokens=32)
    small.submit(0, num_prompt=320, max_tokens=300)
    small.lap()
    small.submit(1, num_prompt=400, max_tokens=8)
    chat = small.submit(2, num_prompt=4, max_tokens=10_000)
    small.lap()
    assert (small.ring.num_live, chat.generated) == (1, [])


@settings(max_examples=150, deadline=None)
@given(
    block_tokens=st.sampled_from([1, 4, 32]),
    num_blocks=st.integers(3, 12),
    max_live=st.sampled_from([1, 3, 64]),
    requests=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 60), st.integers(0, 30), st.none() | st.integers(0, 60)),
        min_size=1,
        max_size=14,
    ),
    losses=st.dictionaries(st.integers(0, 60), st.integers(1, 2), max_size=4),
)
def test_whatever_comes_every_sequence_ends_with_the_single_process_tokens(
    block_tokens: int,
    num_blocks: int,
    max_live: int,
    requests: list[tuple[int, int, int, int | None]],
    losses: dict[int, int],
) -> None:
    """Requests: prompt, max_tokens, the lap of arrival, the lap of a cancel. The engine refuses what has no room."""
    limit = num_blocks * block_tokens
    small = SmallRing(limit, block_tokens, max_live=max_live)
    sequences = []
    for lap in range(61):
        for index, (num_prompt, max_tokens, arrival, cancel) in enumerate(requests):
            if arrival == lap and num_prompt < limit:
                sequences.append(small.submit(index, num_prompt, max_tokens))
            if cancel == lap:
                small.ring.cancel(index)
        small.lap(losses.get(lap, 0))
        assert small.ring.kv_reserved_tokens <= limit
    small.run(max_laps=5_000)
    assert small.ring.counts["preemptions"] <= MAX_PREEMPTIONS * len(sequences)
    small.check(sequences, limit)
