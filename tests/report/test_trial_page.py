import re
from dataclasses import replace

import pytest

from mdiq.report.cost import Prices
from mdiq.report.html import html
from mdiq.report.markdown import markdown
from mdiq.report.page import LANGUAGES, Language
from mdiq.report.trial_document import copies_of
from mdiq.report.trial_page import trial_page
from tests.report.fakes import MIB, PRICES, load_run, stage, trial, trial_run
from tests.report.tracing import assert_traces_back, values_of


def english(document: dict[str, object]) -> str:
    return markdown(trial_page(document, "en"), document, "")


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_figure_of_the_report_is_in_the_document(language: Language) -> None:
    for document in (
        trial(),
        trial(device_bytes=1000 * MIB),
        trial(trial_run(stage("few", 2, 10.0, passes=False, equal=1))),
        trial(trial_run(stage("few", 2, 10.0, passes=False, error="node-1: gone"))),
        trial(replace(trial_run(), outlook=None, why_no_outlook="3 layers do not fit"), prices=Prices()),
    ):
        page = trial_page(document, language)
        assert assert_traces_back(html(page, document), page, document) > 100


def test_words_stand_at_the_left_and_figures_keep_their_unit() -> None:
    document = trial()
    text = html(trial_page(document, "en"), document)
    assert '<th scope="col" class="words">gate</th>' in text and '<td class="words">passed</td>' in text
    assert '<th scope="col">value</th>' in text
    assert re.search(r'<td><data [^>]*class="number">0.484 JPY</data></td>', text)


def test_the_drill_says_from_when_its_seconds_count() -> None:
    text = english(trial())
    assert "the kill and its notice count from the question" in text
    assert "| stage | device | killed, s | noticed, s | ring found, s | layers loaded, s | first token, s |" in text


def test_both_languages_show_the_same_figures() -> None:
    document = trial()
    en, ja = (sorted(v.pointer for v in values_of(trial_page(document, language))) for language in LANGUAGES)
    assert en == ja


def test_a_model_too_large_for_one_device_gets_a_ring() -> None:
    text = english(trial())
    assert "**Go on with all 3 devices in one ring: 15.0 tokens/s" in text
    assert "The whole model took 0.29 GiB on one device. A device has 0.10 GiB (as given)." in text  # 300 and 100 MiB


def test_the_report_says_when_the_ring_is_the_wrong_answer() -> None:
    # A device of 1000 MiB holds the model's 300; two of three copies have a user, and reach 2 * 6 tokens/s.
    slow = trial_run(stage("few", 2, 6.0), stage("tuned", 2, 9.0), stage("all", 3, 10.0))
    document = trial(slow, device_bytes=1000 * MIB)
    text = english(document)
    assert "**A ring is the wrong answer here: the model fits one device." in text
    assert "A whole copy on each of the 3 devices reaches 12.0 tokens/s where the ring reached 10.0." in text
    # Three devices of 100 over 2 years, and 30 W at 0.3, for 12 tokens/s: 0.3964 and 0.2083 for a million.
    assert "| cost of a million tokens | 0.605 JPY |" in text
    assert document["facts"]["cost_per_million"] == pytest.approx(0.60470, abs=1e-5)


def test_copies_must_not_be_slower_than_the_ring_that_passed() -> None:
    # Two copies with a user each: 12 tokens/s; the last stage is slower, but does not pass either.
    last_fails = trial_run(stage("few", 2, 10.0), stage("tuned", 2, 14.0), stage("all", 3, 9.0, passes=False))
    text = english(trial(last_fails, device_bytes=1000 * MIB))
    assert "**Stay with the ring of 2 devices (14.0 tokens/s)" in text


@pytest.mark.parametrize(
    ("users", "devices", "part_users", "rate"),
    [
        (1, 3, 1, 6.0),  # one of the copies has a user
        (2, 3, 1, 12.0),
        (3, 3, 1, 18.0),
        (4, 3, 2, 8.0 + 2 * 6.0),
        (8, 4, 2, 4 * 8.0),
        (8, 3, 3, 2 * 8.0 + 7.0),  # two users lie between one and three
    ],
)
def test_copies_have_the_rings_users_and_no_more(users: int, devices: int, part_users: int, rate: float) -> None:
    alone = replace(
        stage("alone", 1, 8.0),
        one=load_run(1, 1, 6.0),
        part=load_run(1, part_users, 6.0 if part_users == 1 else 8.0),
        many=load_run(1, users, 8.0),
    )
    assert copies_of(alone, devices, 10.0).tokens_per_s == pytest.approx(rate)


def test_a_stage_that_failed_is_not_recommended() -> None:
    failed = trial_run(stage("few", 2, 10.0), stage("tuned", 2, 12.0), stage("all", 3, 9.0, passes=False))
    stay = english(trial(failed))
    assert "**Stay with the ring of 2 devices (12.0 tokens/s): a later stage" in stay
    assert "| tokens/s of the recommended ring, all users | 12.0 |" in stay
    # Costs are those of the two devices: 20 W at 12 tokens/s.
    assert "Energy: 20.0 W for all devices together (as given for each device), 1.67 J for a token." in stay
    assert "| the ring of 2 devices | 100 % |" in stay
    wrong = english(trial(trial_run(stage("few", 2, 10.0, passes=False, equal=1))))
    assert "**Do not go on as it is: answers differed from those of one device.**" in wrong
    assert "The trial ended before its last stage" in wrong
    assert "| few: 2 devices, even split | equal answers | 50 % | at least 100 % | NOT PASSED |" in wrong


def test_a_request_that_was_lost_is_shown() -> None:
    lost = english(trial(trial_run(stage("few", 2, 10.0, passes=False, error="node-1: gone"))))
    assert "A request failed: node-1: gone" in lost
    assert "| few: 2 devices, even split | node-1 | 1.50 | 1.75 | – | – | – | – | 3.50 | 0 / 2 |" in lost


def test_tables_have_the_right_figures() -> None:
    text = english(trial())
    assert (
        "| all: 3 devices, planned split | 4, 4, 4 | 15.00 | 18.75 | 7.50 | 7.50 | 0.133 | 0.200 | 0.50 | 2 / 2 |"
        in text
    )
    assert "| all: 3 devices, planned split | node-1 | 1.50 | 1.75 | 2.00 | 3.00 | 3.50 | 4.00 | 3.50 | 2 / 2 |" in text
    assert "| out of node-0 | f32 | 20.0 | 10 |" in text
    assert "| one more like node-0 | 20.00 | 1.25 |" in text
    assert "| one more like node-1 | 3 layers would not fit | – |" in text
    assert "planner would leave out: node-2" in text
    assert "| full multi-head (computed) | 8 | 4.0 |" in text
    # 30 W at 15 tokens/s: a million takes 18.52 h, 0.5556 kWh; devices 300 / 17520 h * 18.52 h.
    assert "| the ring of 3 devices | 100 % | 0.56 | 0.167 JPY | 0.317 JPY | 0.484 JPY | 126 |" in text
    assert "Every stage passed its gates: the ring of all devices. | holds | 3 against 3 |" in text
    assert "Energy: 30.0 W for all devices together (as given for each device), 2.00 J for a token." in text


def test_what_was_not_measured_and_not_given_is_said() -> None:
    text = english(trial(prices=Prices()))
    assert "Energy: not measured." in text
    assert "Cost: no prices were given." in text
    assert "cost of a million tokens" not in text


def test_devices_whose_power_alone_costs_more_never_pay_back() -> None:
    never = "The ring never pays back at this rate"
    assert never not in english(trial())
    # 30 W at 0.3 for 15 tokens/s cost 0.17 for a million.
    assert never in english(trial(prices=replace(PRICES, per_million_tokens=0.1)))
    assert never not in english(trial(prices=Prices(per_million_tokens=0.1))), "nothing is known of the ring's cost"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_rate_of_fewer_users_than_asked_is_said(language: Language) -> None:
    document = trial()
    warning = {"en": "had their whole answer before all", "ja": "前に回答を終えた"}[language]
    assert warning not in markdown(trial_page(document, language), document, "")
    many = document["stages"][0]["many"]
    many["ended_early"] = 1
    page = trial_page(document, language)
    assert warning in markdown(page, document, "")
    assert f"{document['stages'][0]['nodes']} devices 1 of {many['users']} users" in english(document)


def test_the_drill_says_which_node_was_killed() -> None:
    document = trial()
    assert "the process of the device with the most layers (the first one measures, and stayed) was killed" in english(
        document
    )
    document["settings"]["drill_node"] = "node-2"
    assert "the process of node-2 (where a stage does not have it, of the device with the most layers)" in english(
        document
    )
