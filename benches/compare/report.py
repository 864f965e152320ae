"""The tables that are printed, and the figures as JSON."""

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from measure.bulk import bulk
from measure.instructions import instructions
from measure.latency import QUANTILES, SHARES, latency
from measure.load import load
from measure.memory import memory
from measure.system_calls import system_calls
from servers import MAIN_SERVERS, SERVERS
from tools import KIB, MB, MICROSECOND, ROOT, Failed, run

# Under callgrind, for a server that is very slow there.
REQUESTS = {"python": 240}


def print_rows(bench, rows, markdown):
    """Measures and prints each row. Returns the figures by name, without those of rows that could not be measured."""
    table = Table(["row", "key-service", "peer", "ratio", "bar", "", "what"], [22, 12, 27, 8, 10, 5, 0], markdown)
    figures = {}
    for row in rows:
        try:
            figures[row.name] = row.measure(bench)
        except Failed as failed:
            print(f"{row.name} is not measured: {failed}", file=sys.stderr)
            table.line([row.name, "not measured", "", "", "", "", row.what])
        else:
            table.line([*row.cells(figures[row.name]), row.what])
    return figures


def print_side_by_side(bench, markdown):
    """Prints the figures of every server, with the ratio to nginx in brackets. Returns them by title."""
    names = list(SERVERS)
    print()
    table = Table(["", *names], [34] + [21] * len(names), markdown)
    sides = {}

    def line(title, values, unit):
        sides[title] = {name: value / unit for name, value in values.items()}
        table.line(
            [title] + [f"{values[name] / unit:,.1f} ({values[name] / values['nginx']:.2f})" if name in values else "–" for name in names]
        )

    def median(samples):
        return {name: statistics.median(values) for name, values in samples.items()}

    line("instructions a request", {name: instructions(bench, name=name, requests=REQUESTS.get(name)) for name in names}, 1)
    line("CPU µs a request", median(load(bench, "cpu")), MICROSECOND)
    line("requests a second", median(load(bench, "rate")), 1)
    line("resident MB after load", median(load(bench, "resident")), MB)
    line("CPU µs, connection of its own", median(load(bench, "new connection")), MICROSECOND)
    line("1,000 requests a CPU s, ×16", median(load(bench, "pipelined")), 1000)
    line("resident MB before load", {name: memory(bench, name)[0] for name in MAIN_SERVERS}, MB)
    line("KiB an idle connection", {name: memory(bench, name)[1] for name in MAIN_SERVERS}, KIB)
    for share in SHARES:
        for quantile in QUANTILES:
            line(f"{quantile} µs, at {share:.0%} of nginx", median(latency(bench)[share, quantile]), MICROSECOND)
    rates = median(bulk(bench))
    sides["bulk MB a CPU s"] = {name: rate / MB for name, rate in rates.items()}
    print(
        "\n1 GiB, MB a second of CPU time (× /dev/urandom): "
        + ", ".join(f"{name} {rate / MB:,.0f} ({rate / rates['/dev/urandom']:.2f})" for name, rate in rates.items())
    )
    sides["system calls a request"] = system_calls(bench, "key-service")
    calls = sorted(system_calls(bench, "key-service").items(), key=lambda item: -item[1])
    print("\nSystem calls a request: " + ", ".join(f"{call} {n:.3f}" for call, n in calls if n >= 0.0005))
    return sides


class Table:
    """A table whose lines are printed one by one, aligned for a terminal or as Markdown."""

    def __init__(self, headings, widths, markdown):
        self.widths = widths
        self.markdown = markdown
        self.line(headings)
        if markdown:
            print("|---" * len(headings) + "|")

    def line(self, cells):
        if self.markdown:
            print("| " + " | ".join(cells) + " |", flush=True)
        else:
            print(" ".join(f"{cell:{width}}" for cell, width in zip(cells, self.widths, strict=False)).rstrip(), flush=True)


def as_json(rows, figures, sides):
    return {
        "machine": machine(),
        "commit": run(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip(),
        "rows": [
            {
                "name": row.name,
                "what": row.what,
                "unit": row.unit[0],
                "ours": figures[row.name].ours / row.unit[1],
                "peer": row.peer,
                "theirs": row.peer and figures[row.name].peer / row.unit[1],
                "value": figures[row.name].value,
                "sense": row.sense,
                "bar": row.bar,
                "ok": row.is_met(figures[row.name]),
            }
            for row in rows
            if row.name in figures
        ],
        "servers": sides or None,
    }


def machine():
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    nginx = subprocess.run(["nginx", "-v"], capture_output=True, text=True).stderr.strip().removeprefix("nginx version: ")
    return f"{model[1] if model else os.uname().machine}, Linux {os.uname().release}, {nginx}"
