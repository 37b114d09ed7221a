"""`mdiq simulate`: from flags to text, JSON and errors."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mdiq.cli.main import app
from mdiq.cli.simulate import devices_of, link_of, model_of, rings_of
from mdiq.errors import ConfigError, ModelError
from mdiq.report.catalogue import Mark, read_catalogues
from tests.report.test_catalogue import ENTRY

OWN = read_catalogues()


def simulate(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["simulate", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_pages_commands_predict_rings() -> None:
    ring = simulate("--devices", "pi5-8gb*4,office-pc-2015*2", "--link", "wifi5", "--model", "llama-3-8b",
                    "--weights", "int4", "--users", "8", "--prompt", "512", "--rings", "1")  # fmt: skip
    assert "one ring of" in ring and "tokens/s for 8 users" in ring and "estimated" in ring
    many = json.loads(simulate("--devices", "pi5-8gb*1000", "--model", "llama-3-70b", "--weights", "int4",
                               "--users", "1000", "--json"))  # fmt: skip
    assert sum(each["count"] for each in many["rings"]) > 10
    assert many["next_limits"][0]["name"] in ("router", "starter's head", "links")
    assert "rests on" in simulate("--devices", "pi5-8gb", "--model", "qwen2.5-0.5b", "--sources")


def test_kinds_are_listed() -> None:
    listed = simulate("--list")
    for name in ("pi5-8gb", "wifi-bad", "qwen3-30b-a3b"):
        assert name in listed


def test_a_model_that_does_not_fit_ends_with_1() -> None:
    done = CliRunner().invoke(app, ["simulate", "--devices", "pi4-8gb", "--model", "llama-3-70b"])
    assert done.exit_code == 1 and "does not fit" in done.stdout


def test_a_catalogue_of_ones_own_adds_devices(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(ENTRY.replace("value: 100,", "value: 9000,"))
    text = simulate("--catalogue", str(file), "--devices", "mine*2", "--model", "tinyllama-1.1b")
    assert "mine-1" in text


def test_devices_are_kinds_with_numbers() -> None:
    names = [device.name for device in devices_of("pi5-8gb*2, office-pc-2015", OWN)]
    assert names == ["pi5-8gb", "pi5-8gb", "office-pc-2015"]
    assert len(devices_of("pi5-8gb*999,pi4-8gb", OWN)) == 1_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "give some"),
        ("pi9", "'pi9' is not known"),
        ("pi5-8gb*x", "not a kind with a number"),
        ("pi5-8gb*0", "no device is left"),
        ("pi5-8gb*1001", "more than 1,000"),
        ("pi5-8gb*9999999", "not a kind with a number"),
        (",", "not a kind"),
    ],
)
def test_devices_that_are_not_right_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        devices_of(text, OWN)


def test_a_link_is_of_the_catalogue_or_given() -> None:
    assert link_of("wifi5", OWN) is OWN.links["wifi5"]
    given = link_of("delay=20ms,bandwidth=50mbit", OWN)
    assert (given.delay_s.value, given.bytes_per_s.value, given.delay_s.mark) == (0.02, 6.25e6, Mark.GIVEN)
    assert link_of("delay=1ms", OWN).bytes_per_s.value > 1e10
    with pytest.raises(ConfigError, match="not known; use one of gigabit"):
        link_of("wifi9", OWN)
    with pytest.raises(ConfigError, match="--link"):
        link_of("delay=fast", OWN)


def test_rings_are_a_number_or_automatic() -> None:
    assert (rings_of("auto", 3), rings_of("3", 3)) == (None, 3)
    for text in ("0", "4", "-1", "many", "1.5", "²"):
        with pytest.raises(ConfigError, match="--rings"):
            rings_of(text, 3)


def test_a_model_is_a_name_or_a_file(tmp_path: Path) -> None:
    shape, held = model_of("llama-3-8b", "auto", "f32", OWN)
    assert shape is OWN.models["llama-3-8b"] and held.weights == "int8"
    with pytest.raises(ConfigError, match="no such file, and no such name"):
        model_of("llama-99", "auto", "f32", OWN)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError):
        model_of(str(tmp_path), "auto", "f32", OWN)


def test_a_models_file_is_read_and_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path))
    from mdiq.bench.shapes import SHAPES, shape_file

    file = shape_file("tiny", 4)
    shape, held = model_of(str(file), "auto", "f32", OWN)
    assert (shape.num_layers, shape.hidden_size, shape.vocab_size) == (4, 64, SHAPES["tiny"].vocab_size)
    assert shape.mark is Mark.MEASURED
    # Q4_0 stays as it is: 18 bytes for 32 weights.
    assert held.weights == "int4" and held.layer_bits == pytest.approx(4.5)
    assert model_of(str(file), "int8", "f32", OWN)[1].layer_bits == 8.3
    assert model_of(str(shape_file("tiny", 8)), "auto", "f32", OWN)[1].weights == "int8"
    assert "tiny" in simulate("--devices", "pi4-8gb", "--model", str(file))
