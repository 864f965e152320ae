"""Runs the soak test.

    just soak MINUTES [--seed N] [--plot]
    PYTHONPATH=tests/e2e python3 -m support.soak --from target/soak/soak.json [--plot]

Tests the daemon in $KEY_SERVICE_BIN, or a new release build. Writes the results to target/soak/soak.json and a plot to
target/soak/soak.svg; with --plot, the plot is docs/soak.svg. Exits with 1 if anything was found wrong. --from only draws the plot of
earlier results.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

from support.daemon import REPOSITORY, binary, built
from support.soak import plot, run


def main():
    parser = argparse.ArgumentParser(prog="just soak", description="Runs the soak test.")
    parser.add_argument("minutes", type=float, nargs="?", help="how long the load lasts")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), help="of all random choices; printed")
    parser.add_argument("--plot", action="store_true", help="draw docs/soak.svg")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "target/soak", help="the directory of the results")
    parser.add_argument("--from", dest="file", type=Path, help="draw the plot of earlier results, and run nothing")
    options = parser.parse_args()
    if (options.minutes is None) == (options.file is None) or options.minutes is not None and not options.minutes > 0:
        parser.error("expected a number of minutes above 0, or --from FILE")
    picture = REPOSITORY / "docs/soak.svg" if options.plot else options.output / "soak.svg"
    if options.file:
        plot.draw(picture, json.loads(options.file.read_text()))
        return
    if "KEY_SERVICE_BIN" not in os.environ:
        os.environ["KEY_SERVICE_BIN"] = built("release")
    print(f"seed {options.seed}, {options.minutes:g} minutes, {binary()}", flush=True)
    finished = run.Run(options.minutes * 60, options.seed).run()
    file = run.save(finished, options.output)
    plot.draw(picture, json.loads(file.read_text()))
    print(f"{run.report(finished)}\nresults: {file}, plot: {picture}\nto repeat: just soak {options.minutes:g} --seed {options.seed}")
    sys.exit(finished.problems.count > 0)


if __name__ == "__main__":
    main()
