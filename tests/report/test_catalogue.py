"""The catalogue: the package's own, and what is said of a file that is wrong."""

import re
from pathlib import Path

import pytest

from mdiq.errors import ConfigError
from mdiq.report.catalogue import Mark, Shape, read_catalogue, read_catalogues, weakest

OWN = read_catalogues()
BILLIONS = {
    "smollm2-135m": 0.1345,
    "tinyllama-1.1b": 1.1,
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.6,
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.62,
    "qwen2.5-14b": 14.8,
    "qwen2.5-32b": 32.8,
    "qwen2.5-72b": 72.7,
    "mistral-7b": 7.24,
    "mixtral-8x7b": 46.7,
    "qwen3-30b-a3b": 30.5,
}
"""Weights as the models' own pages give them."""

ENTRY = """\
version: 1
devices:
  mine:
    title: my box
    memory_mib: {value: 100, mark: measured, source: free}
    read_gb_per_s: {value: 10, mark: measured, source: by hand}
    compute_gflop_per_s: {value: 50, mark: estimated, source: a guess}
    forward_ms: {value: 0, mark: estimated, source: a guess}
    process_mib: {value: 1, mark: estimated, source: a guess}
"""


def test_the_models_have_as_many_weights_as_their_pages_say() -> None:
    assert OWN.models.keys() == BILLIONS.keys()
    for name, billions in BILLIONS.items():
        assert OWN.models[name].params / 1e9 == pytest.approx(billions, rel=0.01), name


def test_a_token_of_a_mixture_meets_its_active_experts() -> None:
    def active(shape: Shape) -> float:
        return (shape.num_layers * shape.active_layer_params + shape.ends_params) / 1e9

    # 12.9 and 3.3 billion, as their authors say.
    assert active(OWN.models["mixtral-8x7b"]) == pytest.approx(12.9, rel=0.01)
    assert active(OWN.models["qwen3-30b-a3b"]) == pytest.approx(3.3, rel=0.02)


def test_every_figure_has_a_mark_and_a_source() -> None:
    figures = [
        figure
        for device in OWN.devices.values()
        for figure in (
            *(device.memory_bytes, device.read_bytes_per_s, device.flop_per_s, device.forward_s, device.process_bytes),
            *(each for each in (device.idle_w, device.load_w) if each),
        )
    ]
    figures += [figure for link in OWN.links.values() for figure in (link.bytes_per_s, link.delay_s)]
    assert len(figures) > 60 and all(figure.source and figure.value >= 0 for figure in figures)
    assert all("://" in figure.source for figure in figures if figure.mark is Mark.CITED)
    assert not [figure for figure in figures if figure.mark is Mark.MEASURED], "nobody here has these devices"
    assert {*OWN.links} == {"gigabit", "100mbit", "wifi5", "wifi-bad"}
    assert {"pi4-8gb", "pi5-8gb", "jetson-tx2", "jetson-orin-nano-8gb", "office-pc-2015"} <= OWN.devices.keys()


def test_units_become_bytes_and_seconds(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(ENTRY)
    mine = read_catalogues([file]).devices["mine"]
    assert mine.memory_bytes.value == 100 * 1024 * 1024
    assert (mine.read_bytes_per_s.value, mine.flop_per_s.value) == (1e10, 5e10)
    assert mine.idle_w is None
    wifi = OWN.links["wifi5"]
    assert (wifi.bytes_per_s.value, wifi.delay_s.value, wifi.is_shared) == (93e6 / 8, 0.003, True)
    assert "pi5-8gb" in read_catalogues([file]).devices


def test_the_weakest_mark_counts() -> None:
    assert weakest([Mark.MEASURED, Mark.CITED, Mark.GIVEN]) is Mark.CITED
    assert weakest([Mark.CITED, Mark.ESTIMATED, Mark.MEASURED]) is Mark.ESTIMATED
    assert weakest([Mark.MEASURED, Mark.GIVEN]) is Mark.GIVEN
    assert weakest([Mark.MEASURED]) is Mark.MEASURED


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("value: 10, mark: measured, source: by hand", "value: 10, mark: cited, source: a book", 6, "https://"),
        ("value: 10, mark: measured", "value: 0, mark: measured", 6, "greater than or equal to 0.000000001"),
        ("value: 10, mark: measured", "value: 1.0e+300, mark: measured", 6, "less than or equal to 1000000000000"),
        ("value: 10, mark: measured", "value: ten, mark: measured", 6, "number"),
        ("mark: measured, source: free", "mark: guessed, source: free", 5, "'measured', 'given', 'cited' or"),
        (", source: free", "", 5, "missing"),
        ("    title: my box\n", "    title: my box\n    price: 3\n", 5, "no such key"),
        ("version: 1", "version: 7", 1, "version 7"),
        ("  mine:", "  My box:", 3, "pattern"),
    ],
)
def test_a_wrong_entry_is_named_by_its_line(tmp_path: Path, old: str, new: str, line: int, words: str) -> None:
    file = tmp_path / "mine.yaml"
    assert old in ENTRY
    file.write_text(ENTRY.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        read_catalogue(file)
    assert re.match(rf"{re.escape(str(file))}:{line}[ :]", str(caught.value)) and words in str(caught.value)


def test_experts_that_are_more_than_there_are_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    sizes = "num_layers: 1, hidden_size: 8, num_heads: 1, num_kv_heads: 1, head_dim: 8, mlp_size: 8, vocab_size: 8"
    file.write_text(f"version: 1\nmodels:\n  odd: {{{sizes}, num_experts: 2, active_experts: 3, source: me}}\n")
    with pytest.raises(ConfigError, match="active_experts must be from 1 to num_experts"):
        read_catalogue(file)


@pytest.mark.parametrize(("text", "words"), [("\n", "empty"), ("a: b\n" * 100_000, "larger than 256 KiB")])
def test_a_file_that_is_empty_or_too_large_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"{words}.*--measure"):
        read_catalogue(file)


@pytest.mark.parametrize("text", ["{", "a: *b", "- 1"])
def test_what_is_no_catalogue_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        read_catalogue(file)


def test_a_text_in_place_of_a_catalogue_says_what_is_expected(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("root is here\n")
    with pytest.raises(ConfigError) as caught:
        read_catalogue(file)
    assert str(caught.value) == f"{file}:1: keys with values are expected here; mdiq/report/catalogue.yaml shows them"


def test_a_file_that_is_not_there_says_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--measure"):
        read_catalogue(tmp_path / "none.yaml")
