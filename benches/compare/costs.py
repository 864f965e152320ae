"""What `--costs` prints: the cost of each kind of request and connection, for docs/scaling.md."""

from kinds import KINDS, RAW
from measure.instructions import instructions
from measure.load import of_kind
from measure.memory import IDLE_CONNECTIONS, of_idle
from report import Table, machine
from rows import amount, compare_with
from tools import KIB, MICROSECOND


def print_all(bench, markdown):
    """Prints the cost of each kind of request in instructions and CPU time, and the memory of an idle connection."""
    print(machine(), end="\n\n", flush=True)
    table = Table(["", "instructions", "× the first", "CPU time", "× the first", "a second of CPU time"], [52, 14, 12, 12, 12, 0], markdown)
    for kind in KINDS:
        count = instructions(bench, kind)
        cpu = compare_with(of_kind(bench, kind), "the first")
        table.line(
            [
                kind.what,
                f"{count:,.0f}",
                f"{count / instructions(bench, RAW):.2f}",
                amount(cpu.ours / MICROSECOND, "µs"),
                f"{cpu.value:.2f}",
                f"{1 / cpu.ours:,.0f}",
            ]
        )
    print(f"\nmemory of an idle connection, at {IDLE_CONNECTIONS:,}:")
    for title, tls in [("plain", ""), ("TLS", "P-256")]:
        own, kernel = of_idle(bench, tls)
        print(f"{title}: {own / KIB:.1f} KiB resident, {kernel / KIB:.1f} KiB in the kernel for this end of it")
