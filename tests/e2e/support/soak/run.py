"""The course of a run."""

import collections
import contextlib
import json
import os
import random
import ssl
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from support import peers
from support.conditions import until
from support.soak import clients, hostile
from support.soak.ledger import Problems
from support.soak.operator import Operator
from support.soak.service import Restarting, Steady

MIB = 1 << 20
BASELINE = 60  # seconds after which the first figures are taken, or a third of a shorter run
# Resident memory may grow by this much after the first minute. glibc's allocator keeps freed memory in arenas, one for each thread, and
# which chunks lie at their ends depends on the order of connections. A leak of 32 bytes a request would add more than twice as much in an
# hour of this load.
GROWTH_MAX = 8 * MIB
SAMPLE_INTERVAL = 1  # seconds
WINDOWS = 120  # of the plot
WINDOW_MIN = 2  # seconds
FINGERPRINTS_MAX = 5_000_000  # some 400 MB in the harness; later keys are compared with these and not remembered

HAPROXY = """
global
    maxconn 1000
defaults
    timeout connect 60s
    timeout client 60s
    timeout server 60s
    retries 0
listen tcp
    mode tcp
    bind 127.0.0.1:{tcp}
    server restarting {restarting} source {proxy} send-proxy-v2
listen http
    mode http
    bind 127.0.0.1:{http}
    option forwardfor
    # Each request has a connection and a handshake of its own, so that the harness can count them.
    option http-server-close
    server steady {steady} source {proxy} ssl verify none
"""


class Haproxy:
    """haproxy in front of both daemons."""

    def __init__(self, run):
        self.run = run

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(peers.HeldPort()) for _ in range(2)]
            self.tcp, self.http = (port.address for port in held)
            file = Path(self.run.directory) / "haproxy.cfg"
            addresses = {service.name: "{}:{}".format(*service.http) for service in self.run.services}
            file.write_text(HAPROXY.format(tcp=held[0].number, http=held[1].number, proxy=clients.PROXY, **addresses))
            with open(file.with_suffix(".log"), "wb") as log:
                process = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "TERM", "--", "haproxy", "-db", "-f", file], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            stack.callback(peers.stop_peer, process, "haproxy")
            until("haproxy to listen", lambda: process.poll() is None and all(map(listens, (self.tcp, self.http))))
            self.resources = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self.resources.__exit__(*error)


def listens(address):
    """Whether a socket listens at the address, without connecting to it (proc_pid_net(5))."""
    wanted = f"0100007F:{address[1]:04X}"
    return any(line.split()[1] == wanted and line.split()[3] == "0A" for line in Path("/proc/net/tcp").read_text().splitlines()[1:])


class Run:
    """A soak of `seconds`, with every random choice from `seed`."""

    def __init__(self, seconds, seed):
        self.seconds, self.seed = seconds, seed
        self.problems, self.gate, self.over = Problems(), clients.Gate(), threading.Event()
        self.lock = threading.Lock()
        self.fingerprints = set()
        self.window = max(WINDOW_MIN, seconds / WINDOWS)
        self.latencies = collections.defaultdict(list)  # (service, window): seconds of each request
        self.samples = []  # (time, service, generation, figures), several a window
        self.marks = []  # (time, what)
        self.quiet_figures = []  # (time, service, generation, figures)
        self.baseline = {}  # the figures after the first minute, by service
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.tls.check_hostname, self.tls.verify_mode = False, ssl.CERT_NONE

    @property
    def elapsed(self):
        return time.monotonic() - self.started

    def run(self):
        with contextlib.ExitStack() as stack:
            self.directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="key-service-soak-"))
            self.steady, self.restarting = self.services = Steady(self), Restarting(self)
            for service in self.services:
                stack.callback(service.close)
                service.start()
            self.haproxy = stack.enter_context(Haproxy(self))
            self.started = time.monotonic()
            threads = [*self.clients(), threading.Thread(target=self.sample, name="sampler", daemon=True)]
            stack.callback(self.end, threads)
            for thread in threads:
                thread.start()
            with self.problems.noted("the operator"):
                self.operate()
            self.over.set()
            with self.problems.noted("the comparison at the end"), self.quiet():
                self.verify()
                self.compare_with_baseline()
                self.gate.end()
                for service in self.services:
                    service.stop()
                    service.audit.settle(service.excuse)
        return self

    def clients(self):
        numbers = iter(range(2, 250))

        def address():
            return f"127.10.0.{next(numbers)}"

        restarting, steady = self.restarting, self.steady
        for route, service, tokens in [
            (clients.Route, restarting, ("web", "web", "limited", "slow")),
            (clients.ProxyHeader, restarting, ("web", "web")),
            (clients.Haproxy, restarting, ("web", "web")),
            (clients.Tls, steady, ("web", "web", "limited", "slow")),
            (clients.Forwarded, steady, ("web", "web")),
            (clients.HaproxyHttp, steady, ("web", "web")),
        ]:
            for number, token in enumerate(tokens):
                yield clients.Regular(self, route(self, service), token, f"{route.__name__}-{number}-{token}", address())
        yield clients.Units(self, steady, "units", None)
        for number in range(3):
            yield hostile.Plain(self, restarting, f"hostile-plain-{number}", address())
            yield hostile.Encrypted(self, steady, f"hostile-tls-{number}", address())

    def operate(self):
        """Acts at random moments until the time is over."""
        choice = random.Random(f"{self.seed} operator")
        operator, gap = Operator(self, choice), min(15.0, max(2.0, self.seconds / 30))
        baseline = min(BASELINE, self.seconds / 3)
        while self.elapsed < baseline:
            self.act(operator)
            self.over.wait(min(choice.expovariate(1 / gap), max(0.0, baseline - self.elapsed)))
        self.take_baseline()
        while self.elapsed < self.seconds:
            self.over.wait(min(choice.expovariate(1 / gap), max(0.0, self.seconds - self.elapsed)))
            self.act(operator)

    def take_baseline(self):
        with self.quiet():
            self.verify()
        self.baseline = dict(self.last_figures)

    def act(self, operator):
        begin = self.elapsed
        what, service = operator.act()
        self.marks.append((begin, what))
        self.log(f"{what} ({service.name}, {service.state()}), {self.elapsed - begin:.1f} s")

    def log(self, text):
        print(f"{self.elapsed:7.1f} s  {text}", flush=True)

    def quiet(self):
        return self.gate.closed(self.problems)

    def verify(self):
        """Compares both daemons in a quiet moment."""
        self.last_figures = {}
        for service in self.services:
            with self.problems.noted(f"{service.name}: a quiet moment"):
                figures = self.last_figures[service.name] = service.verify()
                self.quiet_figures.append((self.elapsed, service.name, service.generation, figures))
                self.log(f"quiet: {service.name}, {service.state()}: {shown(figures)}")

    def compare_with_baseline(self):
        """Compares the figures of every quiet moment with those after the first minute. Those of the daemon that restarts are of different
        processes, which must be alike."""
        for at, name, generation, figures in self.quiet_figures:
            base = self.baseline[name]
            for what in ("descriptors", "threads"):
                if figures[what] != base[what]:
                    self.problems.add(
                        f"{name}, process {generation}, after {at:.0f} s: expected {base[what]} {what}, found {figures[what]}"
                    )
            for what, growth in (("resident", GROWTH_MAX), ("kernel", 0)):
                if figures[what] > base[what] + growth:
                    self.problems.add(
                        f"{name}, process {generation}, after {at:.0f} s: expected at most {base[what] + growth} bytes ({what}), "
                        f"found {figures[what]}"
                    )

    def sample(self):
        """Records the figures of the processes once a second. A process may end meanwhile."""
        while not self.over.wait(SAMPLE_INTERVAL):
            for service in self.services:
                if service.epoch % 2 == 0:
                    with contextlib.suppress(OSError, TypeError):
                        pid = service.daemon.pid
                        figures = {"resident": service.daemon.resident("VmRSS"), "descriptors": len(os.listdir(f"/proc/{pid}/fd"))}
                        self.samples.append((self.elapsed, service.name, figures))
                with self.problems.noted(f"{service.name}: audit"):
                    service.audit.read()

    def end(self, threads):
        self.over.set()
        self.gate.end()
        for thread in threads:
            thread.join(2 * clients.TIMEOUT)

    def read_response(self, answers, wanted):
        """A complete response; None if the connection is closed before its first byte."""
        response = answers.next(has_body=not wanted.is_head)
        if response and not wanted.is_head:
            expected, found = int(response[1]["content-length"]), len(response[2])
            assert found == expected, f"expected a body of {expected} bytes, found {found} ({response[0]})"
        return response

    def latency(self, service, seconds):
        self.latencies[service.name, int(self.elapsed / self.window)].append(seconds)

    def unique(self, fingerprints):
        """Checks that no key was issued before."""
        with self.lock:
            for each in fingerprints:
                if each in self.fingerprints:
                    self.problems.add(f"a key was issued twice: fingerprint {each:x}")
                elif len(self.fingerprints) < FINGERPRINTS_MAX:
                    self.fingerprints.add(each)

    def curves(self):
        """For each panel of the plot, the curves of both daemons: (minutes, value)."""
        found = {"memory": {}, "descriptors": {}, "p99": {}}
        for service in self.services:
            windows = collections.defaultdict(list)
            for at, name, figures in self.samples:
                if name == service.name:
                    windows[int(at / self.window)].append(figures)
            middle = {number: (number + 0.5) * self.window / 60 for number in range(int(self.seconds / self.window) + 1)}
            by_window = [(middle[number], figures) for number, figures in sorted(windows.items()) if number in middle]
            found["memory"][service.name] = [(x, max(each["resident"] for each in figures) / 1e6) for x, figures in by_window]
            found["descriptors"][service.name] = [(x, max(each["descriptors"] for each in figures)) for x, figures in by_window]
            found["p99"][service.name] = [
                (middle[number], percentile(self.latencies[name, number], 0.99) * 1000)
                for name, number in sorted(self.latencies)
                if name == service.name and number in middle and len(self.latencies[name, number]) >= 20
            ]
        return found

    def summary(self):
        rows = {
            "minutes": round(self.seconds / 60, 2),
            "seed": self.seed,
            "problems": self.problems.count,
            "actions": dict(collections.Counter(what for _, what in self.marks)),
            "unique keys compared": len(self.fingerprints),
        }
        for service in self.services:
            exact, bounded = service.ledger.exact()
            figures = [figures for _, name, _, figures in self.quiet_figures if name == service.name]
            rows[service.name] = {
                **service.counted,
                "processes": service.generation,
                "processes that were stopped during their drain": len(service.stopped),
                "audit records matched": service.audit.matched,
                "audit records of clients that left before the headers": service.audit.excused,
                "series equal": exact,
                "series within bounds": bounded,
                "statuses": {
                    series.split('"')[1]: count
                    for series, count in sorted(service.ledger.sure.items())
                    if series.startswith("http_responses_total")
                },
                "after the first minute": self.baseline.get(service.name),
                "at the end": figures[-1] if figures else None,
            }
        return rows


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def shown(figures):
    return (
        f"{figures['resident'] / 1e6:.1f} MB resident, {figures['descriptors']} descriptors, {figures['threads']} threads, "
        f"{figures['kernel']} bytes in the kernel"
    )


def report(run):
    """The summary as text."""
    lines = []
    for name, value in run.summary().items():
        lines.append(f"{name}: {value}" if not isinstance(value, dict) else f"{name}:")
        lines += [f"    {key}: {each}" for key, each in value.items()] if isinstance(value, dict) else []
    return "\n".join([*lines, *(f"problem: {each}" for each in run.problems.found)])


def save(run, directory):
    directory.mkdir(parents=True, exist_ok=True)
    document = {"summary": run.summary(), "problems": run.problems.found, "curves": run.curves(), "marks": run.marks}
    file = directory / "soak.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    return file
