"""System calls per request, counted by strace."""

import functools
import re
import signal
import subprocess

from kinds import CONNECTIONS
from servers import Running
from tools import Failed, peers


@functools.cache
def system_calls(bench, name):
    """System calls per request, by name, with many connections ready at a time, as under load."""
    with Running(bench, name, environment={"KEYSERVICE_WORKERS": "1"}) as server:
        connections = [server.connect() for _ in range(CONNECTIONS)]
        for connection in connections:
            connection.ask()
        counts = bench.scratch / "strace.out"
        strace = subprocess.Popen(
            ["strace", "-f", "-c", "-U", "calls,name", "-o", counts, "-p", str(server.pid)], stderr=subprocess.PIPE, text=True
        )
        with peers.killed_after(strace, "strace"):
            if "attached" not in (message := strace.stderr.readline()):
                raise Failed(f"strace: {message}")
            rounds = bench.requests // CONNECTIONS
            for _ in range(rounds):
                for connection in connections:
                    connection.send()
                for connection in connections:
                    connection.receive()
            if not peers.stop_peer(strace, "strace", signal.SIGINT):
                raise Failed("strace wrote no counts")
        for connection in connections:
            connection.close()
    table = re.findall(r"^\s*(\d+) (\w+)$", counts.read_text(), re.MULTILINE)
    return {call: int(n) / (rounds * CONNECTIONS) for n, call in table if call != "total"}
