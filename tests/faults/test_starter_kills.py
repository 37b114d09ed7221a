"""The Starter of a file of prompts is killed at drawn moments: every line is answered once, and as in a calm run.

MDIQ_KILLS: how often; MDIQ_KILLS_LINES: requests; MDIQ_KILLS_SEED: which moments. The receipt goes to $MDIQ_RECEIPTS,
or to the test's folder.
"""

import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mdiq.service.recorder import INTERVAL_S
from tests.faults.conftest import SMALL, model_that_is_here
from tests.faults.receipts import write_receipt
from tests.integration.conftest import mdiq_command, write_prompts
from tests.killed_batch import KilledBatch, answer_of, results_of

KILLS = int(os.environ.get("MDIQ_KILLS", "10"))
LINES = int(os.environ.get("MDIQ_KILLS_LINES", "200"))
SEED = int(os.environ.get("MDIQ_KILLS_SEED", "1"))
SERVES = 0.7  # so many are killed while they answer, the others soon after their start, while they load
SHARE = (
    1.2 / KILLS
)  # of the calm run's time: a Starter that answers lives no longer, so the kills spread over the lines
MAX_LOADING_S = 10.0
ALONE = 3  # each third one is killed without its nodes

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3_600)]

DOES_NOT_SHOW = [
    "A machine that loses its power: what a process has written outlives the process, synced or not.",
    "Other models, longer answers, more nodes: it is one model on two nodes, on one machine.",
    "Rings over several machines, whose nodes outlive the Starter.",
    "How many tokens a kill has lost, other than that they are those since the last interval of the journal.",
]


def test_every_line_is_answered_once_though_its_starter_is_killed_at_random(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    prompts = write_prompts(tmp_path / "in.jsonl", [_request(i, rng) for i in range(LINES)])
    model = model_that_is_here(SMALL)
    command = mdiq_command("run", "--model", model, "--nodes", "2", "--threads", "1", "--kv-tokens", "16384")
    batch = KilledBatch(command, prompts, tmp_path)
    calm = batch.run_calmly(tmp_path / "calm.jsonl")
    calm_s = max(result["timings"]["submitted_s"] + result["timings"]["total_s"] for result in calm.values())
    for number in range(1, KILLS + 1):
        serves = rng.random() < SERVES
        after_s = rng.uniform(0.0, SHARE * calm_s if serves else MAX_LOADING_S)
        if not batch.run_and_kill(after_s, is_alone=number % ALONE == 0, once_it_serves=serves):
            break
    batch.finish()
    results = results_of(batch.out)
    wrong = [index for index, result in calm.items() if answer_of(results[index]) != answer_of(result)]
    values: dict[str, Any] = {
        "what": "starter kills",
        "model": model.name,
        "seed": SEED,
        "lines": LINES,
        "calm_s": round(calm_s, 1),
        "kills": len(batch.deaths),
        "journal_interval_s": INTERVAL_S,
        "tokens_of_all_answers": sum(len(result["token_ids"]) for result in calm.values()),
        "tokens_kept_at_kills": sum(death.kept_tokens for death in batch.deaths),
        "wrong_lines": wrong,
        "deaths": [asdict(death) for death in batch.deaths],
        "does_not_show": DOES_NOT_SHOW,
    }
    print(f"\n{write_receipt('starter-kills', values, tmp_path)}: {values}")  # noqa: T201
    assert wrong == [] and len(results) == LINES
    assert [death.orphans for death in batch.deaths] == [[]] * len(batch.deaths), "nodes outlived their Starter"
    assert len(batch.deaths) == KILLS, "the lines were answered before all kills: ask for more of them"
    assert not batch.journal.exists()


def _request(i: int, rng: random.Random) -> dict[str, object]:
    draws: dict[str, object] = {"temperature": 0.8, "seed": i} if i % 2 else {}
    return {"prompt": f"Tell me a story about number {i}.", "max_tokens": rng.randrange(60, 240), **draws}
