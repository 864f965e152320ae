"""The plots of growth in docs/, and their figures."""

import plot
from measure.growth import GROWTHS, growth
from tools import MB, ROOT

# name of the file, title, unit, figure of a Sample
FIGURES = [
    ("instructions", "User-mode instructions a request, by the number of each", "instructions", lambda sample: sample.instructions),
    ("cpu", "CPU time a request, by the number of each", "µs", lambda sample: sample.cpu),
    ("memory", "Resident memory, by the number of each", "MB", lambda sample: sample.resident / MB),
]


def draw(bench):
    """Measures and prints the growth, and plots each figure."""
    curves = {each.of: growth(bench, each) for each in GROWTHS}
    for of, curve in curves.items():
        for number, sample in curve:
            instructions = f"{sample.instructions:,.0f} instructions, " if sample.instructions else ""
            print(f"{of}, {number:,}: {instructions}{sample.cpu:.1f} µs, {sample.resident / MB:.1f} MB", flush=True)
    for name, title, unit, figure in FIGURES:
        # No peer in the plot of instructions, where it was not counted, nor in that of memory.
        shown = [each.of for each in GROWTHS if name == "cpu" or each.server == "key-service"]
        points = {of: [(number, figure(sample)) for number, sample in curves[of]] for of in shown}
        plot.write(ROOT / f"docs/benchmarks-growth-{name}.svg", title, "number", unit, points)
