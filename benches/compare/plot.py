"""Draws curves as SVG: both axes are logarithmic, and each curve has its name at the right."""

import math
from pathlib import Path

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 140, 40, 48
# The palette of Okabe and Ito, whose colours colour-blind readers can tell apart.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
LABEL_GAP, TICK_GAP = 14, 40


def write(path, title, x_title, y_title, curves):
    """Writes a plot. `curves` maps names to points (x, y), all above 0 and sorted by x."""
    xs = sorted({x for points in curves.values() for x, _ in points})
    ys = [y for points in curves.values() for _, y in points]
    y_low, y_high = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys)))
    x_at = scale(xs[0], xs[-1], LEFT, WIDTH - RIGHT)
    y_at = scale(y_low, y_high, HEIGHT - BOTTOM, TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="{title}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-weight="bold">{title}</text>',
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
