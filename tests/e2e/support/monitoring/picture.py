"""Draws the dashboard as SVG: each panel in its position, with its data, unit and thresholds. It supports only the kinds of panels
and the units that the dashboard uses; any other is an error."""

import re
from html import escape

COLUMN, ROW, GAP = 50, 30, 8  # pixels
SERIES = ("#3b7dd8", "#e0752d", "#4c9a4c", "#b04ab0", "#c4a000", "#2aa1a1", "#c0392b", "#7f6ab5", "#888888", "#8c6d46", "#d17fa8")
STATES = {"green": "#2e8b3d", "orange": "#d9822b", "red": "#c0392b"}
LETTER = 6.4  # pixels
VALUES_MAX = 6  # in a stat panel
POINTS = 60  # per line


def draw(dashboard, prometheus, start, end):
    """Draws the panels for a time range, with the data of `prometheus(query, at)` and `prometheus(query, from, to, step)`."""
    parts, height = [], 0
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        x, y, width, tall = place["x"] * COLUMN, place["y"] * ROW, place["w"] * COLUMN - GAP, place["h"] * ROW - GAP
        height = max(height, y + tall)
        drawing = "".join(KINDS[panel["type"]](panel, width, tall, prometheus, start, end))
        frame = (
            ""
            if panel["type"] == "row"
            else f'<rect width="{width}" height="{tall}" rx="3" fill="#fff" stroke="#ddd"/>'
            + text(8, 16, panel["title"], 'font-weight="bold"')
        )
        parts.append(f'<g transform="translate({x} {y})">{frame}{drawing}</g>')
    width = 24 * COLUMN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-GAP} {-GAP} {width + GAP} {height + 2 * GAP}" font-family="sans-serif" '
        f'font-size="11" fill="#222">\n<rect x="{-GAP}" y="{-GAP}" width="{width + GAP}" height="{height + 2 * GAP}" fill="#f4f5f5"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def row(panel, *_):
    yield text(4, 16, panel["title"], 'font-size="14" font-weight="bold"')


def stat(panel, width, tall, prometheus, _, end):
    values = [(name, value) for name, value, _ in found(panel, prometheus, end)][:VALUES_MAX]
    defaults = panel["fieldConfig"]["defaults"]
    for number, (name, value) in enumerate(values):
        shown, color = unit(value, defaults["unit"]), at_threshold(defaults, value)
        for mapping in defaults["mappings"]:
            if state := mapping["options"].get(f"{value:g}"):
                shown, color = state["text"], state["color"]
        middle = 30 + (tall - 30) * (number + 0.5) / len(values)
        size = min(30, width / len(shown) * 1.2, (tall - 30) / len(values) * 0.6)
        yield text(width / 2, middle + size / 6, shown, f'text-anchor="middle" font-size="{size:.0f}" fill="{STATES[color]}"')
        yield text(width / 2, middle + size / 6 + 16, name, 'text-anchor="middle" fill="#777"')


def timeseries(panel, width, tall, prometheus, start, end):
    defaults = panel["fieldConfig"]["defaults"]
    lines = found(panel, prometheus, start, end)
    if defaults["custom"]["stacking"]["mode"] == "normal":
        lines = stacked(lines)
    values = [value for _, _, points in lines for _, value in points]
    low, high = defaults.get("min", min(values, default=0)), defaults.get("max", max(values, default=0))
    high = high if high > low else low + 1
    left, right, top, bottom = 62, width - 10, 28, tall - 44
    across = lambda at: left + (at - start) / (end - start) * (right - left)  # noqa: E731
    down = lambda value: bottom - (min(value, high) - low) / (high - low) * (bottom - top)  # noqa: E731
    for part in (0, 1) if defaults["unit"] == "bool_yes_no" else (0, 0.5, 1):
        value = low + (high - low) * part
        yield f'<path d="M{left} {down(value):.0f}H{right}" stroke="#eee"/>' + text(
            left - 5, down(value) + 4, unit(value, defaults["unit"]), 'text-anchor="end" fill="#777"'
        )
    if defaults["custom"]["thresholdsStyle"]["mode"] == "dashed":
        for step in defaults["thresholds"]["steps"]:
            if step["value"] is not None and low <= step["value"] <= high:
                yield f'<path d="M{left} {down(step["value"]):.0f}H{right}" stroke="{STATES[step["color"]]}" stroke-dasharray="6 4"/>'
    for number, (_, _, points) in enumerate(lines):
        if points:
            drawn = " ".join(f"{across(at):.0f},{down(value):.0f}" for at, value in points)
            yield f'<polyline points="{drawn}" fill="none" stroke="{SERIES[number % len(SERIES)]}" stroke-width="1.5"/>'
    yield from legend([name for name, _, _ in lines], width, tall)


def heatmap(panel, width, tall, prometheus, start, end):
    """Draws buckets from the lowest up; a fuller bucket is darker. Buckets that are always empty are left out."""
    buckets = sorted(
        ((float(name.replace("+Inf", "inf")), dict(points)) for name, _, points in found(panel, prometheus, start, end)),
        key=lambda bucket: bucket[0],
    )
    rows, below = [], {}
    for bound, points in buckets:  # Prometheus' buckets are cumulative
        rows.append((bound, {at: value - below.get(at, 0) for at, value in points.items()}))
        below = points
    rows = [(bound, points) for bound, points in rows if max(points.values(), default=0) > 1e-9]
    most = max((value for _, points in rows for value in points.values()), default=1)
    left, right, top, bottom = 62, width - 10, 28, tall - 14
    tile = (bottom - top) / max(1, len(rows))
    for number, (bound, points) in enumerate(rows):
        y = bottom - (number + 1) * tile
        yield text(left - 5, y + tile / 2 + 4, unit(bound, panel["options"]["yAxis"]["unit"]), 'text-anchor="end" fill="#777"')
        for at, value in points.items():
            if value > 1e-9:
                x, wide = left + (at - start) / (end - start) * (right - left), (right - left) / POINTS
                place = f'x="{x:.0f}" y="{y:.0f}" width="{wide:.0f}" height="{tile - 1:.0f}"'
                yield f'<rect {place} fill="#e0752d" opacity="{(value / most) ** 0.5:.2f}"/>'


def table(panel, width, tall, prometheus, _, end):
    hidden = panel["transformations"][0]["options"]["excludeByName"]
    samples = [
        {name: value for name, value in sample["metric"].items() if name not in hidden}
        for sample in prometheus(panel["targets"][0]["expr"], end)
    ]
    names = sorted({name for sample in samples for name in sample})
    for number, line in enumerate([dict(zip(names, names, strict=True)), *samples]):
        for column, name in enumerate(names):
            yield text(8 + column * (width - 16) / len(names), 38 + 18 * number, line.get(name, ""), 'fill="#777"' if number == 0 else "")


KINDS = {"row": row, "stat": stat, "timeseries": timeseries, "heatmap": heatmap, "table": table}


def found(panel, prometheus, *when):
    """The series of a panel, each as (name, last value, points)."""
    step = [max(1, (when[1] - when[0]) / POINTS)] if len(when) == 2 else []
    lines = []
    for target in panel["targets"]:
        for series in prometheus(target["expr"], *when, *step):
            name = re.sub(r"{{(\w+)}}", lambda label, series=series: series["metric"].get(label[1], ""), target["legendFormat"]).strip()
            points = [(float(at), float(value)) for at, value in series.get("values") or [series["value"]] if value not in ("NaN", "+Inf")]
            if points or not step:
                lines.append((name, points[-1][1] if points else float("nan"), points))
    return lines


def stacked(lines):
    total, result = {}, []
    for name, last, points in lines:
        total |= {at: total.get(at, 0) + value for at, value in points}
        result.append((name, last, [(at, total[at]) for at, _ in points]))
    return result


def legend(names, width, tall):
    """Draws two lines with as many names as fit."""
    x, line = 8, 0
    for number, name in enumerate(names):
        name = name or "value"
        rest = f"and {len(names) - number} more"
        room = width - x - (0 if number == len(names) - 1 or line == 0 else LETTER * len(rest))
        if 20 + LETTER * len(name) > room and line == 0:
            x, line = 8, 1
        elif 20 + LETTER * len(name) > room:
            yield text(x, tall - 8, rest, 'fill="#555"')
            return
        yield f'<rect x="{x:.0f}" y="{tall - 30 + 16 * line}" width="10" height="4" fill="{SERIES[number % len(SERIES)]}"/>'
        yield text(x + 14, tall - 24 + 16 * line, name, 'fill="#555"')
        x += 24 + LETTER * len(name)


def at_threshold(defaults, value):
    steps = [step for step in defaults["thresholds"]["steps"] if step["value"] is None or value >= step["value"]]
    return steps[-1]["color"]


def unit(value, name):
    """Formats a value with its unit."""
    if value != value:
        return "no data"
    match name:
        case "percentunit":
            return f"{value * 100:.4g} %"
        case "s":
            for size, sign in ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs")):
                if abs(value) >= size:
                    return f"{value / size:.3g} {sign}"
            return "0 s"
        case "bytes" | "Bps":
            for size, sign in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")):
                if abs(value) >= size or size == 1:
                    return f"{value / size:.3g} {sign}" + ("/s" if name == "Bps" else "")
        case "reqps" | "ops":
            return f"{value:.3g} /s"
        case "bool_yes_no":
            return "yes" if value else "no"
        case "none" | "short":
            return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    raise ValueError(f"expected a unit that picture.py knows, found {name}")


def text(x, y, words, attributes=""):
    return f'<text x="{x:.0f}" y="{y:.0f}" {attributes}>{escape(words)}</text>'
