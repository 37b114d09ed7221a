import re
import xml.etree.ElementTree as ElementTree

import pytest

from mdiq.report.page import Chart, Mark, Point, Series, Value
from mdiq.report.svg import HEIGHT, WIDTH, draw, ticks

DOCUMENT = {"y": [0.0, 5.0, 10.0], "killed_s": 1.5}
TAG = "{http://www.w3.org/2000/svg}"


def chart(kind: str) -> Chart:
    points = tuple(Point(float(i + 1), y, Value(f"/y/{i}", 1, unit=" MiB")) for i, y in enumerate(DOCUMENT["y"]))  # type: ignore[arg-type]
    series = (Series("a < b", points), Series("計画", points, is_predicted=True))
    return Chart("c", "A & B", "x", "y", series, kind, (Mark(Value("/killed_s", 1), 1.5, "killed"),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("peak", "expected"),
    [
        (10, [0, 2, 4, 6, 8, 10]),
        (11, [0, 2.5, 5, 7.5, 10, 12.5]),
        (0.3, [0, 0.1, 0.2, 0.3]),
        (400, [0, 100, 200, 300, 400]),
        (0, [0, 1]),
    ],
)
def test_ticks_are_round_and_reach_the_peak(peak: float, expected: list[float]) -> None:
    assert ticks(peak) == pytest.approx(expected)


def test_a_line_goes_through_its_points_and_each_carries_its_place() -> None:
    picture = ElementTree.fromstring(draw(chart("line"), DOCUMENT))
    first, predicted = picture.findall(f"{TAG}polyline")
    places = [tuple(map(float, pair.split(","))) for pair in first.attrib["points"].split()]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y2, "more is higher up"
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in places)
    assert "stroke-dasharray" in predicted.attrib and "stroke-dasharray" not in first.attrib
    circles = picture.findall(f"{TAG}circle")
    assert [circle.attrib["data-json"] for circle in circles] == ["/y/0", "/y/1", "/y/2"]
    assert [circle.findtext(f"{TAG}title") for circle in circles][1] == "a < b, 2: 5.0 MiB"


def test_bars_are_as_high_as_their_values() -> None:
    picture = ElementTree.fromstring(draw(chart("bar"), DOCUMENT))
    heights = [float(bar.attrib["height"]) for bar in picture.findall(f"{TAG}rect")][:3]
    assert heights[0] == 0
    assert heights[2] == pytest.approx(2 * heights[1], abs=0.2)


def test_stacked_bars_begin_where_the_one_below_ends() -> None:
    picture = ElementTree.fromstring(draw(chart("stacked"), DOCUMENT))
    bars = [bar.attrib for bar in picture.findall(f"{TAG}rect") if bar.attrib["data-json"] == "/y/2"]
    lower, upper = ((float(bar["y"]), float(bar["height"])) for bar in bars)
    assert upper[0] + upper[1] == pytest.approx(lower[0], abs=0.2)


def test_texts_are_escaped_and_japanese_stays_text() -> None:
    text = draw(chart("line"), DOCUMENT)
    assert "A &amp; B" in text and "a &lt; b" in text and "計画" in text
    assert re.search(r'<text class="mark" data-json="/killed_s"', text)


def test_a_chart_without_points_is_drawn_too() -> None:
    for kind in ("line", "bar", "stacked"):
        ElementTree.fromstring(draw(Chart("c", "t", "x", "y", (), kind), {}))  # type: ignore[arg-type]
