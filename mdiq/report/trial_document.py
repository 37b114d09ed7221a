"""A trial as one JSON document: what was measured, what follows from it, and by which rules. Pure."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mdiq.plan.divide import evenly
from mdiq.report.cost import Cost, Prices, cost_of
from mdiq.report.evaluate import ModelAbout
from mdiq.report.gates import GateName
from mdiq.report.receipt import Receipt
from mdiq.report.rules import ROOM, Facts, Recommendation, Verdict, count_passed, recommend
from mdiq.report.trial import StageRun, TrialRun

VERSION = 1
SHARES = (0.1, 0.3, 1.0)
"""Parts of the time in which the ring answers, for the table of costs beside the user's own."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of devices.

    device_bytes: of one; is_given: by the user, else it is this machine's. one_device_bytes: that the whole model took
    on one device. num_copies: devices that hold one each with room to spare.
    """

    device_bytes: int
    is_given: bool
    one_device_bytes: int
    num_copies: int


@dataclass(frozen=True, slots=True)
class Copies:
    """A whole copy on each device instead of the ring, for the same users. users_each: of the copies with most."""

    devices: int
    users_each: int
    tokens_per_s: float
    over_ring: float | None


@dataclass(frozen=True, slots=True)
class Attention:
    """KV cache of one token in bytes: as it is, and computed for as many KV heads as query heads."""

    kv_bytes_per_token: int
    full_kv_bytes_per_token: int
    ratio: float


def trial_document(
    receipt: Receipt,
    settings: Mapping[str, Any],
    about: ModelAbout,
    run: TrialRun,
    prices: Prices,
    device_bytes: int,
    *,
    is_device_given: bool,
    num_devices: int,
) -> dict[str, Any]:
    """Return the document, without anything that JSON does not know."""
    passed = tuple(stage.passes for stage in run.stages)
    ring = run.stages[count_passed(passed) - 1]  # the last one that ran if none passed
    rate = ring.many.figures.decode_tokens_per_s
    one_device_bytes = max(share.rss_bytes for share in run.alone.devices)
    copies = copies_of(run.alone, num_devices, rate)
    best_gain = max((gain for gain in run.outlook.gains if gain is not None), default=None) if run.outlook else None
    facts = Facts(
        passed=passed,
        num_stages=run.num_stages,
        answers_equal=all(stage.equal == stage.many.users for stage in run.stages),
        recovered=_recovered(run),
        one_device_bytes=one_device_bytes,
        device_bytes=device_bytes,
        copies_tokens_per_s=copies.tokens_per_s,
        ring_tokens_per_s=rate,
        price_per_million=prices.per_million_tokens,
        one_more_gain=best_gain,
        num_left_out=len(run.outlook.left_out) if run.outlook else 0,
    )
    costs = tuple(_cost(prices, ring, share) for share in SHARES)
    cost, copies_cost = (_cost(prices, ring, prices.load_share, each) for each in (None, copies))
    # Costs are advice: they do not change the verdict.
    advised = copies_cost if recommend(facts).verdict is Verdict.COPIES else cost
    facts = replace(facts, cost_per_million=advised.per_million)
    recommendation: Recommendation = recommend(facts)
    fits = one_device_bytes * ROOM <= device_bytes
    full = about.kv_bytes_per_token * about.num_heads // about.num_kv_heads
    document = {
        "kind": "trial",
        "version": VERSION,
        "receipt": asdict(receipt),
        "settings": dict(settings),
        "model": asdict(about),
        "memory": asdict(Memory(device_bytes, is_device_given, one_device_bytes, num_devices if fits else 0)),
        "alone": asdict(run.alone),
        "stages": [asdict(stage) for stage in run.stages],
        "num_stages": run.num_stages,
        "wire": [asdict(entry) for entry in run.wire],
        "attention": asdict(Attention(about.kv_bytes_per_token, full, full / about.kv_bytes_per_token)),
        "outlook": None if run.outlook is None else asdict(run.outlook),
        "why_no_outlook": run.why_no_outlook,
        "copies": asdict(copies),
        "prices": asdict(prices),
        "cost": asdict(cost),
        "copies_cost": asdict(copies_cost),
        "costs": [asdict(each) for each in costs],
        "facts": asdict(facts),
        "recommendation": asdict(recommendation),
    }
    plain: dict[str, Any] = json.loads(json.dumps(document))
    return plain


def running_document(
    receipt: Receipt, settings: Mapping[str, Any], model: str, stage: StageRun, prices: Prices
) -> dict[str, Any]:
    """Return the document of a ring that was measured as it stands: one stage, and nothing to compare it with."""
    cost = _cost(prices, stage, prices.load_share)
    facts = Facts(
        passed=(stage.passes,),
        num_stages=1,
        answers_equal=stage.equal == stage.many.users,
        recovered=None,
        one_device_bytes=None,
        device_bytes=None,
        copies_tokens_per_s=None,
        ring_tokens_per_s=stage.many.figures.decode_tokens_per_s,
        cost_per_million=cost.per_million,
        price_per_million=prices.per_million_tokens,
    )
    document = {
        "kind": "trial",
        "version": VERSION,
        "receipt": asdict(receipt),
        "settings": dict(settings),
        "model": {"name": model, "is_random": False},
        "memory": {"device_bytes": None, "is_given": False, "one_device_bytes": None, "num_copies": 0},
        "alone": None,
        "stages": [asdict(stage)],
        "num_stages": 1,
        "wire": [],
        "attention": None,
        "outlook": None,
        "why_no_outlook": "",
        "copies": None,
        "prices": asdict(prices),
        "cost": asdict(cost),
        "copies_cost": None,
        "costs": [asdict(_cost(prices, stage, share)) for share in SHARES],
        "facts": asdict(facts),
        "recommendation": asdict(recommend(facts)),
    }
    plain: dict[str, Any] = json.loads(json.dumps(document))
    return plain


def copies_of(alone: StageRun, num_devices: int, ring_tokens_per_s: float) -> Copies:
    """Return what whole copies would reach with the ring's users, from what the model reached on one device.

    Users are spread as the planner does. Some copies have one user less than ``part``; their rate lies on the line from
    one user to the users of ``part``.
    """
    part, one = alone.part or alone.many, alone.one.figures.decode_tokens_per_s
    fullest = part.figures.decode_tokens_per_s
    per_user = (fullest - one) / max(part.users - 1, 1)
    spread = evenly(alone.many.users, num_devices)
    rate = sum(count * (fullest - (part.users - users) * per_user) for count, users in spread)
    return Copies(num_devices, part.users, rate, rate / ring_tokens_per_s if ring_tokens_per_s else None)


def _recovered(run: TrialRun) -> bool | None:
    of_drills = [gate.passes for stage in run.stages for gate in stage.gates if gate.name is GateName.RECOVERY_ANSWERS]
    return all(of_drills) if of_drills else None


def _cost(prices: Prices, stage: StageRun, share: float, copies: Copies | None = None) -> Cost:
    """Return the cost of a stage's ring, or of copies on as many devices as there are."""
    at_share = replace(prices, load_share=share)
    if copies is not None:
        return cost_of(at_share, copies.devices, copies.tokens_per_s)
    return cost_of(at_share, stage.nodes, stage.many.figures.decode_tokens_per_s, stage.energy.watts)
