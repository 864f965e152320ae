"""Draws memory, descriptors and the p99 of a run over time."""

import importlib.util

from support.daemon import REPOSITORY

TITLES = {"memory": "resident memory, MB", "descriptors": "open descriptors", "p99": "p99 of short requests, ms"}
COLOURS = {"restart": "#d55e00", "renewal": "#009e73"}  # of the marks


def benches_plot():
    specification = importlib.util.spec_from_file_location("benches_plot", REPOSITORY / "benches/compare/plot.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def draw(path, document):
    """Draws the results that run.save has written."""
    panels = {TITLES[name]: curves for name, curves in document["curves"].items()}
    marks = [(at / 60, what) for at, what in document["marks"] if what in COLOURS]
    benches_plot().write_over_time(path, sentence(document["summary"]), "minutes", panels, marks, COLOURS, {TITLES["p99"]})


def sentence(summary):
    """What a run did, in one line."""
    daemons = [summary["steady"], summary["restarting"]]
    counts = [f"{sum(each[what] for each in daemons):,} {what}" for what in ("responses", "keys")]
    counts += [f"{summary['actions'].get(what, 0)} {what}s" for what in COLOURS]
    return f"{summary['minutes']:g} minutes, {', '.join(counts)}, {summary['problems']} problems"
