"""The check of instruction counts against gate.toml, for CI."""

import re
import tomllib

from kinds import BARRED
from measure.instructions import instructions
from tools import HERE, PASSED, ROOT, SHORT

PATH = HERE / "gate.toml"


def check(bench, update=False):
    """Compares each kind of request with gate.toml. `update` writes lower ratios to that file; only a person raises one."""
    nginx = instructions(bench, name="nginx")
    print(f"nginx: {nginx:,.0f} instructions a request", flush=True)
    ratios = {}
    for kind in BARRED:
        count = instructions(bench, kind)
        ratios[kind.name] = count / nginx
        print(f"{kind.name:10} {count:8,.0f}, ratio {count / nginx:.3f}", flush=True)
    text = PATH.read_text()
    errors, lower = compared(text, ratios)
    if lower and update:
        PATH.write_text(lower)
        print(f"{PATH.relative_to(ROOT)} has lower ratios now")
    elif lower:
        print(f"requests became cheaper. `--gate --update` writes this to {PATH.relative_to(ROOT)}, so that the gate keeps the gain:")
        print(lower)
    if errors:
        print(*errors, sep="\n")
        print(f"if the cost is justified, change {PATH.relative_to(ROOT)} and state the reason in that commit")
    return SHORT if errors else PASSED


def compared(text, ratios):
    """Compares ratios with the text of gate.toml. Returns the rows that exceed the tolerance, and a new text if there are rows that are
    cheaper by more than the tolerance."""
    settings = tomllib.loads(text)
    expected, tolerance = settings["rows"], settings["tolerance"]
    if set(expected) != set(ratios):
        return [f"expected the rows {', '.join(ratios)}, found {', '.join(expected)}"], None
    errors = [
        f"{name}: expected a ratio of at most {expected[name]} + {tolerance:.0%}, found {ratio:.3f}"
        for name, ratio in ratios.items()
        if ratio > expected[name] * (1 + tolerance)
    ]
    cheaper = {name: ratio for name, ratio in ratios.items() if ratio < expected[name] * (1 - tolerance)}
    lower = text
    for name, ratio in cheaper.items():
        lower = re.sub(rf"^{name} = .*$", f"{name} = {ratio:.3f}", lower, flags=re.MULTILINE)
    return errors, lower if cheaper else None
