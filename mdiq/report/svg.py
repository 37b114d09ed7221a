"""A Chart as an SVG picture: text stays text, in the reader's fonts, and every point carries its place in the JSON."""

import math
from collections.abc import Iterator, Sequence
from html import escape

from mdiq.report.page import Chart, Document, Point, Series, look_up, shown

WIDTH, HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 44, 82
COLORS = ("#0b62a8", "#d1630a", "#3a8a3a", "#8a4fa3", "#b23a48", "#5b6670", "#a5801a", "#2a9d8f")
"""Told apart also by those who see fewer colours; series differ by their marks as well."""
_MARKS = ("circle", "square", "diamond", "triangle")
_TICKS = 5


def ticks(peak: float) -> list[float]:
    """Return round numbers from 0 to at least ``peak``, about _TICKS of them."""
    if peak <= 0:
        return [0.0, 1.0]
    step = 10.0 ** math.floor(math.log10(peak / _TICKS))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if step * factor * _TICKS >= peak)
    return [step * i for i in range(math.ceil(peak / step - 1e-9) + 1)]


def draw(chart: Chart, document: Document) -> str:
    """Return the picture as an <svg> element."""
    parts = [*(_stacked(chart, document) if chart.kind == "stacked" else _plain(chart, document)), *_legend(chart)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="currentColor">'
        f"<title>{escape(chart.title)}</title>"
        f'<text x="{_LEFT}" y="22" font-size="15" font-weight="600">{escape(chart.title)}</text>'
        f"{''.join(parts)}</svg>"
    )


def _plain(chart: Chart, document: Document) -> Iterator[str]:
    points = [point for series in chart.series for point in series.points]
    scale = ticks(max((point.y for point in points), default=0.0))
    yield from _axes(chart, scale)
    if chart.kind == "bar":
        yield from _bars(chart, scale[-1], document)
        return
    numbers = [float(point.x) for point in points] + [mark.at for mark in chart.marks]
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    if high - low > 8 or high == low:
        low = min(low, 0.0)
    high = high if high > low else low + 1
    names = sorted({float(point.x) for point in points})
    places = names if len(names) <= 8 else [tick for tick in ticks(high) if low <= tick <= high]
    for place in places:
        x = _across(place, low, high)
        yield _tick(x, f"{place:g}")
    for mark in chart.marks:
        x = _across(mark.at, low, high)
        yield (
            f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{HEIGHT - _BOTTOM}" stroke="{COLORS[4]}" '
            f'stroke-dasharray="2 3"/>'
            f'<text class="mark" data-json="{escape(mark.x.pointer)}" x="{x + 4:.1f}" y="{_TOP + 12}" '
            f'fill="{COLORS[4]}">{escape(mark.text)}</text>'
        )
    for i, series in enumerate(chart.series):
        color, dash = COLORS[i % len(COLORS)], ' stroke-dasharray="6 4"' if series.is_predicted else ""
        way = [(_across(float(p.x), low, high), _up(p.y, scale[-1]), p) for p in series.points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in way)
        yield f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"{dash}/>'
        size = 4.0 if len(way) <= 30 else 1.5
        for x, y, point in way:
            yield _mark(_MARKS[i % len(_MARKS)], x, y, size, color, _title(series, point, document))


def _bars(chart: Chart, peak: float, document: Document) -> Iterator[str]:
    names = _names(chart.series)
    slot = (WIDTH - _LEFT - _RIGHT) / max(len(names), 1)
    width = slot * 0.8 / max(len(chart.series), 1)
    for i, name in enumerate(names):
        yield _tick(_LEFT + slot * (i + 0.5), name, slot)
    for i, series in enumerate(chart.series):
        for point in series.points:
            x = _LEFT + slot * (names.index(str(point.x)) + 0.1) + width * i
            yield _bar(x, _up(point.y, peak), width, HEIGHT - _BOTTOM, i, series, point, document)


def _stacked(chart: Chart, document: Document) -> Iterator[str]:
    names = _names(chart.series)
    sums = [sum(p.y for series in chart.series for p in series.points if str(p.x) == name) for name in names]
    scale = ticks(max(sums, default=0.0))
    yield from _axes(chart, scale)
    slot = (WIDTH - _LEFT - _RIGHT) / max(len(names), 1)
    width = min(slot * 0.7, 90)
    for i, name in enumerate(names):
        x, below = _LEFT + slot * (i + 0.5), 0.0
        yield _tick(x, name, slot)
        for j, series in enumerate(chart.series):
            for point in series.points:
                if str(point.x) == name:
                    bottom, below = _up(below, scale[-1]), below + point.y
                    yield _bar(x - width / 2, _up(below, scale[-1]), width, bottom, j, series, point, document)


def _bar(
    x: float, y: float, width: float, bottom: float, i: int, series: Series, point: Point, document: Document
) -> str:
    look = f'fill="{COLORS[i % len(COLORS)]}"'
    if series.is_predicted:
        look = f'fill="none" stroke="{COLORS[i % len(COLORS)]}" stroke-width="2" stroke-dasharray="6 4"'
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{max(bottom - y, 0.0):.1f}" {look} '
        f'data-json="{escape(point.value.pointer)}">{_title(series, point, document)[1]}</rect>'
    )


def _title(series: Series, point: Point, document: Document) -> tuple[str, str]:
    """Return a point's place, and what a reader sees who rests on it."""
    figure = shown(look_up(document, point.value.pointer), point.value)
    where = f"{point.x:g}" if isinstance(point.x, float) else f"{point.x}"
    return point.value.pointer, f"<title>{escape(series.name)}, {escape(where)}: {escape(figure)}</title>"


def _mark(kind: str, x: float, y: float, size: float, color: str, title: tuple[str, str]) -> str:
    place, text = title
    shape = {
        "circle": f'circle cx="{x:.1f}" cy="{y:.1f}" r="{size}"',
        "square": f'rect x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" height="{2 * size}"',
        "diamond": f'path d="M{x:.1f} {y - size:.1f}l{size} {size}l-{size} {size}l-{size} -{size}z"',
        "triangle": f'path d="M{x:.1f} {y - size:.1f}l{size} {2 * size}h-{2 * size}z"',
    }[kind]
    return f'<{shape} fill="{color}" data-json="{escape(place)}">{text}</{shape.split()[0]}>'


def _axes(chart: Chart, scale: Sequence[float]) -> Iterator[str]:
    for number in scale:
        y = _up(number, scale[-1])
        yield (
            f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{WIDTH - _RIGHT}" y2="{y:.1f}" stroke="currentColor" '
            f'stroke-opacity="{0.5 if number == 0 else 0.15}"/>'
            f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number:,g}</text>'
        )
    middle = _TOP + (HEIGHT - _TOP - _BOTTOM) / 2
    yield (
        f'<text class="label" x="16" y="{middle:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 16 {middle:.0f})">{escape(chart.y_label)}</text>'
        f'<text class="label" x="{(WIDTH + _LEFT) / 2:.0f}" y="{HEIGHT - _BOTTOM + 36}" '
        f'text-anchor="middle">{escape(chart.x_label)}</text>'
    )


def _tick(x: float, name: str, room: float = 60.0) -> str:
    small = ' font-size="10"' if len(name) * 7 > room else ""
    return (
        f'<text class="tick" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle"{small}>{escape(name)}</text>'
    )


def _legend(chart: Chart) -> Iterator[str]:
    x, y = float(_LEFT), HEIGHT - 26
    for i, series in enumerate(chart.series):
        # A sign of Japanese is twice as wide as a letter.
        width = 30 + sum(12.5 if ord(sign) > 0x2E80 else 6.8 for sign in series.name)
        if x + width > WIDTH and x > _LEFT:
            x, y = float(_LEFT), y + 17
        color = COLORS[i % len(COLORS)]
        look = f'stroke="{color}" stroke-width="4"' + (' stroke-dasharray="6 3"' if series.is_predicted else "")
        yield f'<line x1="{x:.0f}" y1="{y - 4}" x2="{x + 18:.0f}" y2="{y - 4}" {look}/>'
        yield f'<text class="label" x="{x + 23:.0f}" y="{y}">{escape(series.name)}</text>'
        x += width + 8


def _names(all_series: Sequence[Series]) -> list[str]:
    return list(dict.fromkeys(str(point.x) for series in all_series for point in series.points))


def _across(x: float, low: float, high: float) -> float:
    inner = WIDTH - _LEFT - _RIGHT - 24
    return _LEFT + 12 + inner * (x - low) / (high - low)


def _up(y: float, peak: float) -> float:
    return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * y / peak
