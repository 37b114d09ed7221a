"""Gates between the stages of a trial: what a stage must show before the next one begins. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class GateName(StrEnum):
    """What a gate looks at."""

    ANSWERS = "answers"  # share of users whose tokens are those of one device alone
    PREDICTION = "prediction"  # tokens/s of all users over what was predicted
    THROUGHPUT = "throughput"  # tokens/s of all users
    GAIN = "gain"  # tokens/s of all users over those of the stage before
    MEMORY = "memory"  # bytes of the largest process, where the user says what a device holds
    LATENCY = "latency"  # seconds between two tokens of a user, 95th percentile
    RECOVERY_ANSWERS = "recovery answers"  # share of users with the same tokens although a node was killed
    RECOVERY = "recovery"  # seconds from the loss until every request had gone on


@dataclass(frozen=True, slots=True)
class Limits:
    """What the gates ask for. min_gain_tuned, min_gain_all: tokens/s over those of the stage before."""

    min_of_predicted: float = 0.6
    min_tokens_per_s: float = 0.0
    max_token_s: float = 1.0
    max_recovery_s: float = 60.0
    min_gain_tuned: float = 0.95
    min_gain_all: float = 1.05


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate. limit: the minimum, or the maximum of what should be low. value: None if it could not be had."""

    name: GateName
    value: float | None
    limit: float
    is_minimum: bool
    passes: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """What a stage has shown.

    equal, recovered: users whose tokens were right, of ``users``; recovered None: there was no drill.
    before: tokens/s of the stage before; None at the first. device_bytes: memory of a device; None: not given.
    recovery_s: None: not all requests went on.
    """

    users: int
    equal: int
    tokens_per_s: float
    predicted_tokens_per_s: float | None
    token_p95_s: float
    before: float | None = None
    min_gain: float | None = None
    rss_bytes: int = 0
    device_bytes: int | None = None
    recovered: int | None = None
    recovery_s: float | None = None


def gates(shown: Shown, limits: Limits) -> tuple[Gate, ...]:
    """Return the gates of a stage."""
    found = [_at_least(GateName.ANSWERS, shown.equal / shown.users, 1.0)]
    if shown.predicted_tokens_per_s:
        share = shown.tokens_per_s / shown.predicted_tokens_per_s
        found.append(_at_least(GateName.PREDICTION, share, limits.min_of_predicted))
    found.append(_at_least(GateName.THROUGHPUT, shown.tokens_per_s, limits.min_tokens_per_s))
    if shown.before and shown.min_gain is not None:
        found.append(_at_least(GateName.GAIN, shown.tokens_per_s / shown.before, shown.min_gain))
    if shown.device_bytes is not None:
        found.append(_at_most(GateName.MEMORY, shown.rss_bytes, shown.device_bytes))
    found.append(_at_most(GateName.LATENCY, shown.token_p95_s, limits.max_token_s))
    if shown.recovered is not None:
        found.append(_at_least(GateName.RECOVERY_ANSWERS, shown.recovered / shown.users, 1.0))
        found.append(_at_most(GateName.RECOVERY, shown.recovery_s, limits.max_recovery_s))
    return tuple(found)


def all_pass(found: Sequence[Gate]) -> bool:
    """Return whether the next stage may begin."""
    return all(gate.passes for gate in found)


def _at_least(name: GateName, value: float, limit: float) -> Gate:
    return Gate(name, value, limit, is_minimum=True, passes=value >= limit)


def _at_most(name: GateName, value: float | None, limit: float) -> Gate:
    return Gate(name, value, limit, is_minimum=False, passes=value is not None and value <= limit)
