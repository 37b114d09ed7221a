"""The recommendation of a trial: stated rules, in order; the first one with a verdict that holds decides. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

ROOM = 1.1
"""One device must have this much more memory than the model took there: contexts grow."""
MIN_GAIN = 1.05
"""One more device is worth it from this on."""


class Verdict(StrEnum):
    """What to do."""

    STOP = "stop"  # do not use it as it is
    COPIES = "copies"  # the ring is the wrong answer: a whole copy on each device
    RING = "ring"  # all devices in one ring
    STAY = "stay"  # the ring of the last stage that passed


class RuleName(StrEnum):
    """The rules, in order."""

    ANSWERS = "answers"
    RECOVERY = "recovery"
    FITS = "fits"
    ALL = "all"
    SOME = "some"
    NONE = "none"
    PRICE = "price"
    ONE_MORE = "one more"
    LEFT_OUT = "left out"


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule as it was applied. holds: None: what it needs is not known. verdict: None: it is advice only.

    value, limit: the figures that were compared, where there are some.
    """

    name: RuleName
    holds: bool | None
    verdict: Verdict | None = None
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules look at.

    passed: of the stages that ran, in order; num_stages: that were planned. answers_equal: of all that ran.
    recovered: the drills ended with the same answers in time; None: there was none.
    one_device_bytes: that the whole model took on one device; device_bytes: memory of a device.
    copies_tokens_per_s: of a whole copy on each device, together. These are None where no device had the whole model.
    ring_tokens_per_s: of the ring that would be used if copies were not: of the last stage that passed, or of the last
    one if none did.
    cost_per_million, price_per_million: None: not known. one_more_gain: what the planner expects of one more device.
    num_left_out: devices that the planner would leave out.
    """

    passed: tuple[bool, ...]
    num_stages: int
    answers_equal: bool
    recovered: bool | None
    one_device_bytes: int | None
    device_bytes: int | None
    copies_tokens_per_s: float | None
    ring_tokens_per_s: float
    cost_per_million: float | None = None
    price_per_million: float | None = None
    one_more_gain: float | None = None
    num_left_out: int = 0


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The verdict, the rule that gave it, and every rule as it was applied. stage: of the ring to use, from 0."""

    verdict: Verdict
    by: RuleName
    stage: int | None
    rules: tuple[Rule, ...]


def count_passed(passed: Sequence[bool]) -> int:
    """Return how many stages passed before the first one that did not."""
    return next((i for i, passes in enumerate(passed) if not passes), len(passed))


def recommend(facts: Facts) -> Recommendation:
    """Return what follows from the facts."""
    num_passed = count_passed(facts.passed)
    are_copies_right: bool | None = None
    if facts.one_device_bytes is not None and facts.device_bytes is not None and facts.copies_tokens_per_s is not None:
        fits = facts.one_device_bytes * ROOM <= facts.device_bytes
        are_copies_right = fits and facts.copies_tokens_per_s >= facts.ring_tokens_per_s
    is_whole = num_passed == facts.num_stages
    rules = (
        Rule(RuleName.ANSWERS, not facts.answers_equal, Verdict.STOP),
        Rule(RuleName.RECOVERY, None if facts.recovered is None else not facts.recovered, Verdict.STOP),
        Rule(RuleName.FITS, are_copies_right, Verdict.COPIES, facts.copies_tokens_per_s, facts.ring_tokens_per_s),
        Rule(RuleName.ALL, is_whole, Verdict.RING, num_passed, facts.num_stages),
        Rule(RuleName.SOME, 0 < num_passed < facts.num_stages, Verdict.STAY, num_passed, facts.num_stages),
        Rule(RuleName.NONE, num_passed == 0, Verdict.STOP, num_passed, facts.num_stages),
        _price(facts),
        Rule(
            RuleName.ONE_MORE,
            None if facts.one_more_gain is None else facts.one_more_gain >= MIN_GAIN,
            None,
            facts.one_more_gain,
            MIN_GAIN,
        ),
        Rule(RuleName.LEFT_OUT, facts.num_left_out > 0, None, facts.num_left_out),
    )
    decided = next(rule for rule in rules if rule.holds and rule.verdict is not None)
    assert decided.verdict is not None  # it was looked for
    stage = None
    if decided.verdict in (Verdict.RING, Verdict.STAY):
        stage = num_passed - 1
    return Recommendation(decided.verdict, decided.name, stage, rules)


def _price(facts: Facts) -> Rule:
    cost, price = facts.cost_per_million, facts.price_per_million
    holds = None if cost is None or price is None else cost >= price
    return Rule(RuleName.PRICE, holds, None, cost, price)
