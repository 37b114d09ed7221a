"""Stop texts end the answer and are not part of it, however the text is cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdiq.core.stop_text import StopText

TEXTS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=3).map(tuple)


def _reference(text: str, stops: tuple[str, ...], num_barred: int = -1) -> tuple[str, bool]:
    """Look for a stop text behind every character that is not barred, the slow and plain way."""
    for end in range(num_barred + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@settings(deadline=None)
@given(TEXTS, STOPS, st.lists(st.integers(0, 30), max_size=8))
def test_the_answer_does_not_depend_on_how_the_text_is_cut(text: str, stops: tuple[str, ...], cuts: list[int]) -> None:
    stop_text = StopText(stops)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    out = "".join(stop_text.push(text[a:b]) for a, b in zip(bounds, bounds[1:], strict=False))
    out += stop_text.finish()
    assert (out, stop_text.matched) == _reference(text, stops)


@settings(deadline=None)
@given(TEXTS, TEXTS, STOPS, st.lists(st.integers(0, 30), max_size=8))
def test_a_stop_text_that_is_complete_before_it_may_end_the_answer_is_text(
    barred: str, text: str, stops: tuple[str, ...], cuts: list[int]
) -> None:
    stop_text = StopText(stops)
    stop_text.may_end = False
    bounds = [0, *sorted(min(cut, len(barred)) for cut in cuts), len(barred)]
    out = "".join(stop_text.push(barred[a:b]) for a, b in zip(bounds, bounds[1:], strict=False))
    assert not stop_text.matched
    stop_text.may_end = True
    out += stop_text.push(text) + stop_text.finish()
    assert (out, stop_text.matched) == _reference(barred + text, stops, len(barred))


@settings(deadline=None)
@given(TEXTS, STOPS)
def test_no_more_is_held_back_than_could_begin_a_stop_text(text: str, stops: tuple[str, ...]) -> None:
    stop_text = StopText(stops)
    out = stop_text.push(text)
    if not stop_text.matched:
        held = text[len(out) :]
        assert text == out + held
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "out"),
    [
        ((), ["all", " of it"], ["all", " of it", ""]),
        (("END",), ["one E", "N", "D two", "three"], ["one ", "", "", "", ""]),
        (("END",), ["one E", "Nd"], ["one ", "ENd", ""]),
        (("END",), ["one EN"], ["one ", "EN"]),
        (("\n\n", "User:"), ["hi\nUser", ": \n\n"], ["hi\n", "", ""]),
        (("bc", "abcd"), ["abcd"], ["a", ""]),
        (("bc", "abc"), ["abc"], ["", ""]),
    ],
)
def test_text_comes_out_as_soon_as_it_is_certain(stops: tuple[str, ...], pieces: list[str], out: list[str]) -> None:
    stop_text = StopText(stops)
    assert [*(stop_text.push(piece) for piece in pieces), stop_text.finish()] == out
