"""What `mdiq simulate` shows."""

import json
from dataclasses import replace

import pytest

from mdiq.report.catalogue import Catalogue, Figure, Mark, read_catalogues
from mdiq.report.simulate import simulate
from mdiq.report.simulate_text import MIXTURE, as_json, render
from tests.report.devices import BILLION, BOX, GIB, SMALL, cited, question

OWN = Catalogue({"box": BOX, "small": SMALL}, router_events_per_s=Figure(5_000, Mark.ESTIMATED, "a guess"))
HALF = replace(SMALL, memory_bytes=cited(1.1 * GIB), flop_per_s=cited(20e9))


def test_the_text_has_the_figures_with_their_marks() -> None:
    text = render(simulate(question(HALF, HALF, users=8), OWN), OWN)
    lines = dict(line.split(maxsplit=1) for line in text.splitlines() if line[:1].isalpha() and " " in line)
    assert "tokens/s for 8 users in micro-batches of" in lines["rate"] and lines["rate"].endswith("cited")
    assert lines["layout"] == "one ring of 2 devices"
    assert "J a token" in lines["power"] and "hops together" in lines["network"]
    assert "one ring with one more device" in text and "starter's head" in text
    assert "rests on" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_rates_of_a_large_model_show_differences_of_some_percent() -> None:
    found = simulate(question(HALF, HALF, users=8), OWN)
    more = replace(found.one_more[0], rate=0.234, change=0.04)
    assert "0.23 tokens/s, +4 %" in render(replace(found, one_more=[more]), OWN)
    assert "23.4 tokens/s, +4 %" in render(replace(found, one_more=[replace(more, rate=23.44)]), OWN)


def test_sources_are_listed_when_they_are_asked_for() -> None:
    text = render(simulate(question(BOX), OWN), OWN, with_sources=True)
    line = next(line for line in text.splitlines() if "box: weights read" in line)
    assert "10,000,000,000" in line.replace("1e+10", "10,000,000,000") and line.endswith(
        "cited      https://example.org"
    )


def test_json_has_each_figure_with_its_mark_and_all_sources() -> None:
    found = simulate(question(HALF, HALF, users=8), OWN)
    value = json.loads(as_json(found, OWN))
    assert value["fits"] is True and value["can_run"] is True and value["devices"] == ["small", "small"]
    rate = value["figures"]["rate_tokens_per_s"]
    assert rate == {"value": found.figure("rate_tokens_per_s").value, "mark": "cited"}
    assert [stage["num_layers"] for stage in value["stages"]] == [stage.num_layers for stage in found.stages]
    assert value["rings"][0]["users"] == 8
    assert value["sources"]["small: idle, W"] == {"value": 5.0, "mark": "cited", "source": "https://example.org"}
    assert value["upload_s"]["within_a_ring"] >= 0


def test_a_model_that_does_not_fit_is_an_answer_too() -> None:
    found = simulate(question(SMALL), OWN)
    text, value = render(found, OWN), json.loads(as_json(found, OWN))
    assert "does not fit" in text and "1 box" in text
    assert value["fits"] is False and value["needed"]["box"] == 1 and "figures" not in value


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b"])
def test_a_mixture_is_said_not_to_run_yet(name: str) -> None:
    catalogue = read_catalogues()
    pis = [catalogue.devices["pi5-16gb"]] * 4
    found = simulate(replace(question(*pis), shape=catalogue.models[name]), catalogue)
    assert MIXTURE in render(found, catalogue)
    assert json.loads(as_json(found, catalogue))["can_run"] is False
    assert "mixture" not in render(simulate(question(BOX), OWN), OWN)


def test_copies_and_rings_are_named() -> None:
    copies = render(simulate(question(*[replace(BOX, flop_per_s=cited(20e9))] * 3, users=3), OWN), OWN)
    assert "3 whole copies, a device each, with a router before them" in copies and "router" in copies
    rings = render(simulate(question(*[HALF] * 4, users=32), OWN, 2), OWN)
    assert "2 rings of 2 devices, with a router before them; 4 devices in use" in rings
    assert "one device alone" in render(simulate(question(BOX), OWN), OWN)


def test_users_that_wait_for_a_place_are_said() -> None:
    assert "44 wait for a place" in render(simulate(question(BOX, users=300), OWN), OWN)
    assert "wait for a place" not in render(simulate(question(BOX, users=256), OWN), OWN)


def test_watts_that_are_not_known_are_not_made_up() -> None:
    text = render(simulate(question(replace(BOX, idle_w=None)), OWN), OWN)
    assert "power         not known" in text


def test_many_stages_are_shortened() -> None:
    many = [replace(SMALL, memory_bytes=cited(0.75 * GIB), flop_per_s=cited(20e9))] * 40
    shape = replace(BILLION, num_layers=40, mlp_size=10_000)
    found = simulate(replace(question(*many, users=64), shape=shape), OWN, 1)
    assert len(found.stages) > 16
    text = render(found, OWN)
    assert sum(line.startswith("small-") for line in text.splitlines()) == 12 and "\n...  " in text
