"""What the clients of a daemon counted, and how each metric compares with it.

A count is sure if the client saw its cause, such as a response. It is possible if only the daemon knows, such as whether it had read a
request whose client then left. A counter has to lie between the sure counts and the sum of both. Nearly all counts are sure: a
well-behaved client never makes a possible one, except for a stream that overlaps a restart.
"""

import collections
import contextlib
import re
import threading

KEY_BUCKETS = (8, 16, 24, 32, 48, 64, 128, 256, 512, 1024, 4096, 65_536, 1 << 20, 1 << 24, 1 << 28, 1 << 30)

# metric: how it compares with what the clients counted, and why.
COUNTED = {
    "http_responses_total": "each response, by its status, scrapes included",
    "request_latency_seconds_count": "each response, by its route; also of a response that the client left, since its end is recorded",
    "http_rejections_total": "each refusal, by its status and detail; a connection that was closed without a response, by what was sent",
    "key_request_failures_total": "each 503 to a request for keys, by its detail",
    "key_length_bytes": "each key, by its length, not of HEAD; sum, count and every bucket",
    "key_bytes_total": "the bytes of each key before encoding, by format; of a response that the client left, at least what it received",
    "credentials_total": "each key from the credential socket; a connection from an address that is not systemd's is malformed",
    "tls_handshakes_total": "each connection over TLS with a response",
    "tls_handshake_failures_total": "each handshake that the client broke, by how it did",
    "proxy_protocol_errors_total": "each connection that was closed for its PROXY header, by what was sent",
    # These happen in no run: the limits are not reached, no descriptor is missing, and the log is a file.
    "accept_errors_total": "0",
    "http_idle_connections_closed_total": "0",
    "log_events_dropped_total": "0",
    "audit_records_dropped_total": "0",
    "log_write_errors_total": "0",
}
# Generator calls: at least one for each response with keys. How many chunks a streamed response has depends on its client.
AT_LEAST = {"generator_latency_seconds_count": "each response with keys"}
# metric: its value in a quiet moment, when no connection is open but that of the scrape.
QUIET = {
    "http_connections": 0,
    "http_requests_in_flight": 0,  # besides the scrape
    "generator_healthy": 1,
    "workers_healthy": 1,
    "config_last_reload_successful": 1,
    "tls_last_reload_successful": 1,
}
# Compared in service.py with the kernel's figures, the configuration or the certificate.
OTHERWISE = {
    "process_threads",
    "process_open_fds",
    "process_start_time_seconds",
    "process_resident_memory_bytes",
    "process_max_fds",
    "http_connections_limit",
    "tls_certificate_not_after_timestamp_seconds",
    "build_info",
}
# Measured by the daemon alone: no client can count them.
NOT_COMPARED = {
    "generator_latency_seconds_bucket",
    "generator_latency_seconds_sum",
    "request_latency_seconds_bucket",
    "request_latency_seconds_sum",
    "process_cpu_seconds_total",
    "process_virtual_memory_bytes",
    "cgroup_memory_usage_bytes",
    "cgroup_memory_limit_bytes",
}


def parse(text):
    """The series of an exposition, with their values."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            found[series] = float(value)
    return found


def name_of(series):
    name = series.partition("{")[0]
    return "key_length_bytes" if name.startswith("key_length_bytes_") else name


class Ledger:
    """The counts of one daemon, over all of its processes."""

    def __init__(self):
        self.lock = threading.Lock()
        self.sure, self.possible = collections.Counter(), collections.Counter()

    def add(self, series, count=1, is_sure=True):
        with self.lock:
            (self.sure if is_sure else self.possible)[series] += count

    def response(self, status, endpoint, is_sure=True):
        self.add(f'http_responses_total{{status_code="{status}"}}', 1)
        self.add(f'request_latency_seconds_count{{endpoint="{endpoint}"}}', 1, is_sure)

    def rejection(self, reason, is_key=False, is_sure=True):
        self.add(f'http_rejections_total{{reason="{reason}"}}', 1, is_sure)
        if is_key and reason in ("connections", "client_connections", "bulk", "generator", "draining"):
            self.add(f'key_request_failures_total{{reason="{reason}"}}', 1, is_sure)

    def keys(self, keys, is_sure=True, received=None):
        """Counts the keys of a response. `received` are the bytes of a raw key that its client has, if it left before the end."""
        key_bytes = f'key_bytes_total{{format="{keys.format}"}}'
        sure = keys.key_bytes if received is None else min(received, keys.key_bytes)
        self.add(key_bytes, sure, is_sure)
        self.add(key_bytes, keys.key_bytes - sure, False)
        for series in lengths(keys.length):
            self.add(series, keys.number * (keys.length if series.endswith("_sum") else 1), is_sure and (received is None or received > 0))
        self.add("generator_latency_seconds_count", 1, is_sure and (received is None or received > 0))

    def counted(self):
        """The sure counts until now."""
        with self.lock:
            return self.sure.copy()

    def doubt(self, before):
        """Makes the sure counts possible that are not in `before`."""
        with self.lock:
            added = self.sure - before
            self.sure -= added
            self.possible += added

    def problems(self, values):
        """A sentence for each series that differs from what was counted. `values` are the sums over all processes."""
        with self.lock:
            sure, possible = self.sure.copy(), self.possible.copy()
        for name in sorted(
            {name_of(series) for series in values} - COUNTED.keys() - AT_LEAST.keys() - QUIET.keys() - OTHERWISE - NOT_COMPARED
        ):
            yield f"{name}: nothing says how this metric compares with what the clients counted"
        for series in sorted(values.keys() | sure.keys()):
            found, low, high = values.get(series, 0), sure[series], sure[series] + possible[series]
            if name_of(series) in AT_LEAST:
                high = max(found, low)
            elif name_of(series) not in COUNTED:
                continue
            if not low <= found <= high:
                expected = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
                yield f"{series}: expected {expected}, which the clients counted, found {found:.0f}"

    def exact(self):
        """The number of series above 0 that are compared exactly, and of those within bounds."""
        with self.lock:
            series = [each for each in self.sure.keys() | self.possible.keys() if name_of(each) in COUNTED]
            bounded = sum(1 for each in series if self.possible[each])
        return len(series) - bounded, bounded


def lengths(length):
    """The series of key_length_bytes in which a key of this length counts."""
    yield from ("key_length_bytes_sum", "key_length_bytes_count", 'key_length_bytes_bucket{le="+Inf"}')
    yield from (f'key_length_bytes_bucket{{le="{each}"}}' for each in KEY_BUCKETS if length <= each)


class Problems:
    """What was found wrong, with its time. The run ends in failure if there is any."""

    SHOWN_MAX = 200

    def __init__(self):
        self.lock, self.found, self.count = threading.Lock(), [], 0

    def add(self, text):
        with self.lock:
            self.count += 1
            if len(self.found) < self.SHOWN_MAX:
                self.found.append(text)
                print(f"PROBLEM: {text}", flush=True)

    @contextlib.contextmanager
    def noted(self, what):
        """Notes an exception of the block as a problem, so that the run goes on."""
        try:
            yield
        except Exception as error:
            self.add(f"{what}: {type(error).__name__}: {error}")


def log_fields(line):
    return dict(re.findall(r'(\w+)="?([^" ]+)', line))
