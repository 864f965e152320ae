"""The check of instruction counts against gate.toml, for CI."""

import tomllib

from measure.instructions import instructions
from tools import HERE, PASSED, ROOT, SHORT


def check(bench):
    """Checks the ratio of instructions per request against gate.toml. Instruction counts are reproducible, unlike times."""
    path = HERE / "gate.toml"
    expected = tomllib.loads(path.read_text())
    ours, theirs = instructions(bench, "key-service"), instructions(bench, "nginx")
    ratio, ceiling, floor = ours / theirs, *(expected["ratio"] * (1 + sign * expected["tolerance"]) for sign in (1, -1))
    wanted = f"{expected['ratio']} ± {expected['tolerance']:.0%}"
    print(f"{ours:,.0f} instructions a request, nginx {theirs:,.0f}: ratio {ratio:.4f}, expected {wanted}")
    if ratio > ceiling:
        print(
            f"expected a ratio of at most {ceiling:.4f}. If the cost is justified, put {ratio:.4f} into {path.relative_to(ROOT)} "
            f"and state the reason in that commit"
        )
        return SHORT
    if ratio < floor:
        print(f"cheaper than expected: put {ratio:.4f} into {path.relative_to(ROOT)}, so that the gate keeps the gain")
    return PASSED
