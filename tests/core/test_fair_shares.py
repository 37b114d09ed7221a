"""Owners that ask for more than the Ring takes in get equal tokens, whatever they ask for."""

from collections import Counter

import pytest

from mdiq.core.fair_shares import _KEPT_OWNERS, FairShares
from mdiq.core.frame import Frame, FrameKind, TokenIds
from mdiq.core.ring import RingProtocol
from mdiq.core.ring_actions import HeadRow, Inject
from mdiq.core.ring_settings import RingSettings
from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.core.types import Epoch, RingSpec

SETTINGS = RingSettings(lap_timeout_s=1e9, prefix_tokens=0)


class Asking:
    """A Ring of four Sequences at once, and owners that ask it. had: tokens of each, prompts included."""

    def __init__(self, kv_tokens: int = 4_096) -> None:
        self.ring = RingProtocol(SETTINGS)
        self.ring.begin_epoch(Epoch(1), RingSpec(2, kv_tokens, 512, max_live=4))
        self.owners: list[str] = []
        self.had: Counter[str] = Counter()
        self.ended: list[int] = []

    def ask(self, owner: str, num_prompt: int = 4, max_tokens: int = 8, share: int = 1) -> int:
        index = len(self.owners)
        self.owners.append(owner)
        params = SamplingParams(max_tokens=max_tokens)
        self.ring.submit(Sequence(index, (1,) * num_prompt, params, owner=owner, share=share), 0.0)
        return index

    def lap(self) -> list[int]:
        """Send what waits, and let all of it come round; return the Sequences whose prompt has been sent."""
        rows: list[HeadRow] = []
        prompts = []
        for action in self.ring.poll(0.0):
            if not isinstance(action, Inject):
                continue
            frame = action.frame
            wanting = sum(segment.wants_logits for segment in frame.segments)
            kind = FrameKind.RELEASE if frame.kind is FrameKind.RELEASE else FrameKind.HEAD
            back = Frame(frame.epoch, kind, frame.segments, TokenIds((0,) * wanting))
            came = [row for row in self.ring.returned(back, 0.0) if isinstance(row, HeadRow)]
            for segment, row in zip([s for s in frame.segments if s.wants_logits], came, strict=True):
                if segment.stop == len(row.sequence.prompt):
                    prompts.append(row.sequence.index)
                    self.had[row.sequence.owner] += segment.stop
            rows += came
        for row in rows:
            event = self.ring.sampled(row.seq_id, 7, now=0.0)
            assert event is not None
            self.had[row.sequence.owner] += 1
            if event.finish_reason:
                self.ended.append(event.index)
        return prompts

    def until(self, num_left: int, owner: str) -> None:
        """Go on until an owner has so few Sequences left."""
        for _ in range(10_000):
            left = [i for i, other in enumerate(self.owners) if other == owner and i not in self.ended]
            if len(left) <= num_left:
                return
            self.lap()
        raise AssertionError("it does not end")


@pytest.mark.parametrize("order", ["many first", "few first", "mixed"])
def test_an_owner_with_ten_times_the_requests_gets_no_more_tokens(order: str) -> None:
    asking = Asking()
    many, few = ["many"] * 400, ["few"] * 40
    mixed = [owner for i in range(40) for owner in (*many[10 * i : 10 * i + 10], few[i])]
    for owner in {"many first": many + few, "few first": few + many, "mixed": mixed}[order]:
        asking.ask(owner)
    asking.until(2, "few")
    assert asking.had["many"] == pytest.approx(asking.had["few"], rel=0.1)
    assert asking.had["few"] > 400
    asking.until(0, "many")  # and nothing is left idle after that
    assert asking.had == {"many": 400 * 12, "few": 40 * 12}


@pytest.mark.parametrize("few", [{"num_prompt": 60, "max_tokens": 4}, {"num_prompt": 2, "max_tokens": 62}])
def test_tokens_are_equal_and_not_requests(few: dict[str, int]) -> None:
    asking = Asking()
    for _ in range(60):
        asking.ask("long", **few)
    for _ in range(600):
        asking.ask("short", num_prompt=4, max_tokens=4)
    asking.until(4, "long")
    assert asking.had["short"] == pytest.approx(asking.had["long"], rel=0.1)


def test_twice_the_share_is_twice_the_tokens() -> None:
    asking = Asking()
    for _ in range(300):
        asking.ask("one")
        asking.ask("two", share=2)
    asking.until(100, "two")
    assert asking.had["two"] == pytest.approx(2 * asking.had["one"], rel=0.1)


def test_three_owners_share_and_one_that_asks_for_little_gets_it_at_once() -> None:
    asking = Asking()
    for _ in range(200):
        asking.ask("a")
        asking.ask("b")
    for _ in range(100):
        asking.lap()
    index = asking.ask("c")
    num_laps = 0
    while index not in asking.ended:
        asking.lap()
        num_laps += 1
    assert num_laps <= 8 + 8 + 2, "it waits for one place only"
    assert asking.had["a"] == pytest.approx(asking.had["b"], rel=0.1)


def test_an_owner_that_was_away_has_saved_up_nothing() -> None:
    asking = Asking()
    for _ in range(200):
        asking.ask("stays")
    asking.until(100, "stays")
    for _ in range(200):
        asking.ask("comes")
    before = asking.had["stays"]
    asking.until(150, "comes")
    assert asking.had["stays"] - before == pytest.approx(asking.had["comes"], rel=0.1)


def test_what_an_owner_had_while_it_was_alone_is_not_held_against_it() -> None:
    asking = Asking()
    for owner in ("early", "late"):
        for _ in range(100):
            asking.ask(owner)
        asking.until(0, owner)
    before = Counter(asking.had)
    for _ in range(100):
        asking.ask("early")
        asking.ask("late")
    asking.until(50, "early")
    new = {owner: asking.had[owner] - before[owner] for owner in ("early", "late")}
    assert new["early"] == pytest.approx(new["late"], rel=0.15)


def test_requests_of_one_owner_keep_their_order() -> None:
    asking = Asking()
    asking.ask("other")
    numbers = [asking.ask("one", max_tokens=3) for _ in range(20)]
    entered: list[int] = []
    while len(asking.ended) < 21:
        entered += asking.lap()
    assert [index for index in entered if index in numbers] == numbers


def test_a_sequence_that_was_put_back_goes_before_all_that_were_not_in_the_ring_whosever_they_are() -> None:
    """Else one owner's newcomers could keep another's from ending for ever."""
    asking = Asking(kv_tokens=64)
    first, second = asking.ask("a", max_tokens=55), asking.ask("a", max_tokens=55)
    asking.lap()
    for _ in range(8):
        asking.ask("b", num_prompt=8, max_tokens=20)
    entered: list[int] = []
    while len(asking.ended) < 10:
        entered += asking.lap()
    assert asking.ring.counts["preemptions"] > 0
    assert asking.ended[0] == first, "the first is never put back"
    assert asking.ended.index(second) < 9
    assert {index: asking.ended.count(index) for index in range(10)} == dict.fromkeys(range(10), 1)


def test_counts_at_the_floor_are_forgotten_and_mean_the_same() -> None:
    shares = FairShares()
    shares.took("busy", 1, 100)
    for i in range(_KEPT_OWNERS):
        shares.took(f"gone{i}", 1, 10)
    shares.raise_floor(["gone0"])
    shares.took("new", 1, 1)
    assert len(shares._had) == 2
    assert (shares.had("busy"), shares.had("gone1"), shares.had("new")) == (100, 10, 11)


@pytest.mark.parametrize("is_over", [False, True])
def test_what_an_owner_had_while_nothing_waited_is_not_held_against_it(is_over: bool) -> None:
    """Its Sequences entered at once, and had their tokens after that; those that come are not owed as many."""
    asking = Asking()
    asking.ask("comes")
    asking.until(0, "comes")
    for _ in range(4):
        asking.ask("was alone", max_tokens=400)
    for _ in range(350):
        asking.lap()
    if is_over:
        asking.until(0, "was alone")
    before = asking.had["was alone"]
    for _ in range(100):
        asking.ask("comes")
        asking.ask("was alone")
    asking.until(60, "comes")
    assert asking.had["was alone"] - before >= 0.7 * asking.had["comes"]


def test_what_passes_others_does_not_raise_the_floor_over_who_waits() -> None:
    """A large Sequence waits for room, and small ones of its owner pass it; another owner has waited all the while."""
    asking = Asking(kv_tokens=256)
    asking.ask("a", num_prompt=100, max_tokens=60)
    asking.lap()
    asking.ask("a", num_prompt=200, max_tokens=10)
    for _ in range(6):
        asking.ask("a", num_prompt=8, max_tokens=4)
    asking.ask("b", num_prompt=150, max_tokens=10)
    scheduler = asking.ring._scheduler
    before = scheduler._shares.had("b")
    for _ in range(20):
        asking.lap()
    assert scheduler._shares.had("b") <= before + 160
