import pytest

from mdiq.report.page import NOTHING, Value, Words, look_up, shown, text

DOCUMENT = {"a": [{"rate": 1234.567, "name": "x", "none": None}]}


def test_a_place_is_looked_up() -> None:
    assert look_up(DOCUMENT, "/a/0/rate") == 1234.567
    assert look_up(DOCUMENT, "") == DOCUMENT


@pytest.mark.parametrize("pointer", ["/b", "/a/1", "/a/rate", "/a/0/rate/0"])
def test_a_place_that_is_not_there_is_an_error(pointer: str) -> None:
    with pytest.raises(KeyError):
        look_up(DOCUMENT, pointer)


@pytest.mark.parametrize(
    ("raw", "value", "expected"),
    [
        (1234.567, Value("", 1), "1,234.6"),
        (1234.567, Value("", 2, 1000.0, " k"), "1.23 k"),
        (0.25, Value("", 0, 0.01, " %"), "25 %"),
        (0.25, Value("", 0, 0.01, " %", has_sign=True), "+25 %"),
        (-3, Value("", 0, has_sign=True), "-3"),
        (None, Value("", 2, unit=" s"), NOTHING),
        ("f32", Value(""), "f32"),
        (True, Value(""), "✓"),
        (False, Value(""), NOTHING),
    ],
)
def test_a_figure_is_written_as_its_value_says(raw: object, value: Value, expected: str) -> None:
    assert shown(raw, value) == expected


def test_a_sentence_keeps_text_and_figures_apart() -> None:
    rate = Value("/a/0/rate")
    assert text("{rate} tokens/s on {name}.", {"rate": rate, "name": "x"}) == (rate, " tokens/s on ", "x", ".")
    assert Words("ja").say("now {rate}", "毎秒{rate}", rate=rate) == ("毎秒", rate)
    with pytest.raises(KeyError):
        text("{lost}", {})
