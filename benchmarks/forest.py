"""A forest plot as SVG, on white as the guide's other pictures: pooled means and those of experiments."""

from collections.abc import Iterator, Sequence

LEFT, WIDTH, ROW, TOP, ENDS = 370, 880, 34, 50, (-12, 22)
"""Pixels before the axis, in all, for each row and above the first; points at the ends of the axis."""
Row = tuple[str, tuple[float, float, float], Sequence[float]]
"""Question; mean, lower and upper end; means of single experiments."""


def plot(rows: Sequence[Row]) -> str:
    height = TOP + ROW * len(rows) + 46
    style = 'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#111"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" {style}>',
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#fff"/>',
        f'<rect x="{_x(-3)}" y="30" width="{_x(3) - _x(-3):.1f}" height="{height - 70}" fill="#eef1f5"/>',
        _text(
            _x(0),
            22,
            "points, pooled (dots) and single contrasts (rings); 95 % intervals; grey: within ±3",
            "middle",
        ),
    ]
    for points in range(-10, 21, 5):
        colour = "#555" if points == 0 else "#ddd"
        lines.append(f'<path d="M{_x(points)} 30V{height - 40}" stroke="{colour}"/>')
        lines.append(_text(_x(points), height - 20, f"{points:+d}" if points else "0", "middle"))
    for number, row in enumerate(rows):
        lines += _row(TOP + ROW * number + ROW // 2, *row)
    return "\n".join([*lines, "</svg>", ""])


def _row(y: int, question: str, pooled: Sequence[float], parts: Sequence[float]) -> Iterator[str]:
    mean, low, high = pooled
    yield _text(LEFT - 14, y + 4, question, "end")
    for part in parts:
        yield f'<circle cx="{_x(part)}" cy="{y}" r="5" fill="none" stroke="#8a8f98"/>'
    yield f'<path d="M{_x(low)} {y}H{_x(high)}" stroke="#2f67b1" stroke-width="2"/>'
    yield f'<circle cx="{_x(mean)}" cy="{y}" r="4.5" fill="#2f67b1"/>'


def _x(points: float) -> float:
    first, last = ENDS
    return round(LEFT + (WIDTH - LEFT - 20) * (min(max(points, first), last) - first) / (last - first), 1)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'
