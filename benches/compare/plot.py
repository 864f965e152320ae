"""Draws curves as SVG, each with its name at the right: on logarithmic axes, or over time on linear ones."""

import math
from pathlib import Path

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 140, 40, 48
# The palette of Okabe and Ito, whose colours colour-blind readers can tell apart.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
LABEL_GAP, TICK_GAP = 14, 40
PANEL_HEIGHT, PANEL_GAP = 150, 40


def write(path, title, x_title, y_title, curves):
    """Writes a plot. `curves` maps names to points (x, y), all above 0 and sorted by x."""
    xs = sorted({x for points in curves.values() for x, _ in points})
    ys = [y for points in curves.values() for _, y in points]
    y_low, y_high = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys)))
    x_at = scale(xs[0], xs[-1], LEFT, WIDTH - RIGHT)
    y_at = scale(y_low, y_high, HEIGHT - BOTTOM, TOP)

    parts = [
        *opening(title, HEIGHT),
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{x_title}</text>',
        f'<text x="{LEFT - 6}" y="{TOP - 6}" text-anchor="end">{y_title}</text>',
    ]
    labelled = -math.inf
    for x in xs:
        parts.append(f'<path d="M{x_at(x):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#eee"/>')
        if x_at(x) - labelled >= TICK_GAP:
            labelled = x_at(x)
            parts.append(f'<text x="{labelled:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(x)}</text>')
    for exponent in range(round(math.log10(y_low)), round(math.log10(y_high)) + 1):
        for step in (1, 2, 5):
            y = step * 10**exponent
            if y <= y_high:
                parts.append(
                    f'<path d="M{LEFT} {y_at(y):.1f}H{WIDTH - RIGHT}" stroke="{"#ccc" if step == 1 else "#eee"}"/>'
                    f'<text x="{LEFT - 6}" y="{y_at(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
                )
    labels = spread({name: y_at(points[-1][1]) for name, points in curves.items()})
    for (name, points), colour in zip(curves.items(), COLOURS, strict=False):
        width = 3 if name == "key-service" else 1.5
        line = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        parts += [f'<circle cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="{width}" fill="{colour}"/>' for x, y in points]
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{labels[name] + 4:.1f}" fill="{colour}">{name}</text>')
    Path(path).write_text("\n".join([*parts, "</svg>"]) + "\n")


def opening(title, height):
    """The first elements of a plot."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="{title}">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-weight="bold">{title}</text>',
    ]


def write_over_time(path, title, x_title, panels, marks, mark_colours, logarithmic=()):
    """Writes a plot of panels below each other, which share the axis of time. `panels` maps their titles to curves, each of which is
    points (x, y) sorted by x. `marks` are (x, kind); each is a line through all panels in the colour of its kind. The panels in
    `logarithmic` have such a vertical axis, and only values above 0."""
    height = TOP + len(panels) * (PANEL_HEIGHT + PANEL_GAP) + 24
    x_max = max((x for curves in panels.values() for points in curves.values() for x, _ in points), default=1)
    x_step, _ = ticks(x_max)
    right = WIDTH - RIGHT

    def x_at(x):
        return LEFT + (right - LEFT) * x / x_max

    parts = opening(title, height)
    for number, (kind, colour) in enumerate(mark_colours.items()):
        parts.append(f'<text x="{LEFT + 80 * number}" y="{height - 8}" fill="{colour}">| {kind}</text>')
    for number, (panel, curves) in enumerate(panels.items()):
        top = TOP + number * (PANEL_HEIGHT + PANEL_GAP) + 16
        bottom = top + PANEL_HEIGHT
        ys = [y for points in curves.values() for _, y in points] or [1]
        y_ticks, y_at = axis(ys, bottom, top, panel in logarithmic)
        parts.append(f'<text x="{LEFT}" y="{top - 6}">{panel}</text>')
        for x, kind in marks:
            parts.append(f'<path d="M{x_at(x):.1f} {top}V{bottom}" stroke="{mark_colours[kind]}" stroke-opacity="0.3"/>')
        for tick in y_ticks:
            y = y_at(tick)
            parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#eee"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for count in range(int(x_max / x_step) + 1):
            x = x_at(count * x_step)
            parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{count * x_step:g}</text>')
        ends = {name: y_at(points[-1][1]) for name, points in curves.items() if points}
        labels = spread(ends)
        for (name, points), colour in zip(curves.items(), COLOURS, strict=False):
            line = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            if points:
                parts.append(f'<text x="{right + 8}" y="{labels[name] + 4:.1f}" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{height - 8}" text-anchor="middle">{x_title}</text>')
    Path(path).write_text("\n".join([*parts, "</svg>"]) + "\n")


def axis(values, bottom, top, is_logarithmic):
    """The ticks of a vertical axis for `values`, and the function that maps a value to its coordinate."""
    if is_logarithmic:
        low = math.floor(math.log10(min(values)))
        high = max(low + 1, math.ceil(math.log10(max(values))))
        return [10.0**exponent for exponent in range(low, high + 1)], scale(10.0**low, 10.0**high, bottom, top)
    step, end = ticks(max(values))
    return [count * step for count in range(round(end / step) + 1)], lambda value: bottom + (top - bottom) * value / end


def ticks(highest):
    """The distance of the ticks of a linear axis from 0, which is 1, 2 or 5 times a power of ten, and the end of the axis."""
    least = max(highest, 1e-9) / 6
    power = 10 ** math.floor(math.log10(least))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= least)
    return step, step * math.ceil(max(highest, 1e-9) / step)


def scale(low, high, start, end):
    """A function that maps a number to its coordinate on a logarithmic axis."""
    return lambda number: start + (end - start) * math.log(number / low) / math.log(high / low)


def spread(positions):
    """Moves the positions of labels down where necessary, so that labels do not overlap."""
    moved, last = {}, -math.inf
    for name, position in sorted(positions.items(), key=lambda item: item[1]):
        last = moved[name] = max(position, last + LABEL_GAP)
    return moved


def short(number):
    """Formats 1024 as 1 Ki and 1048576 as 1 Mi, and other numbers unchanged."""
    for size, unit in [(1 << 20, "Mi"), (1 << 10, "Ki")]:
        if number >= size and number % size == 0:
            return f"{number // size} {unit}"
    return str(number)
