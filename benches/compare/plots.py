"""The plots in docs/: the cost of a request by the size of its key, and by the number of connections."""

import plot
from measure.load import curves
from servers import nginx_constants
from tools import ROOT

SIZES = [16, 64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20]
CONNECTIONS = [1, 4, 16, 64, 256, 1024]
THREADS_MAX = 256  # connections to a server with a thread for each
SERVERS = ["key-service", "nginx", "bare hyper", "python"]


def draw(bench):
    """Plots the cost of a request against the size of its key and against the number of connections."""
    bench.nginx_constants = nginx_constants(bench.scratch, SIZES)
    by_size = curves(bench, SERVERS, SIZES, lambda size: {"path": f"/key/{size}", "connections": 16})
    plot.write(
        ROOT / "docs/benchmarks-key-size.svg", "CPU time a request, by the size of the key (16 connections)", "bytes a key", "µs", by_size
    )
    bench.nginx_constants = ""
    others, few = [name for name in SERVERS if name != "python"], [n for n in CONNECTIONS if n <= THREADS_MAX]
    by_connections = curves(bench, [*others, "raw loop"], CONNECTIONS, lambda n: {"connections": n})
    by_connections |= curves(bench, ["python"], few, lambda n: {"connections": n})
    plot.write(
        ROOT / "docs/benchmarks-connections.svg",
        "CPU time a request, by the number of connections (32-byte key)",
        "connections",
        "µs",
        by_connections,
    )
    for what, of_servers in [("bytes a key", by_size), ("connections", by_connections)]:
        for name, curve in of_servers.items():
            print(f"{name}, CPU µs by {what}: " + ", ".join(f"{x} {y:.1f}" for x, y in curve), flush=True)
