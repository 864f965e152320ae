"""Matches the audit records of a daemon with the keys that its clients received.

A client that has the headers of a response knows the record's request ID. Each such response must have exactly one record with the same
token, address, length, format and so on; a streamed one also has exactly one that says `started`. A record that no client knows of is a
lost response, unless a hostile client left before it could read the headers.
"""

import collections
import threading

from support.soak.ledger import log_fields

COMPARED = ("token", "address", "proxy", "length", "count", "format", "alphabet", "unit", "credential")
# Lines of level WARN and ERROR that a run causes on purpose.
EXPECTED_LINES = (
    "connection closed by proxy-protocol",  # hostile clients
    "configuration reload refused",  # refused reloads
    "keeping the previous configuration",
    "TLS reload failed",
    "expires",  # the certificates are valid for a day
)


class Audit:
    def __init__(self, name, problems):
        self.name, self.problems, self.lock = name, problems, threading.Lock()
        self.reading = threading.Lock()
        self.expected, self.found, self.started = {}, {}, collections.Counter()
        self.excused = 0  # records of clients that left before they could read the headers
        self.files = []  # [path, offset]
        self.matched = 0

    def expect(self, identity, is_streamed, outcomes=("complete",), sent=(0, 1 << 62), **fields):
        """Expects a record. `identity` is its request ID, or the name of a credential."""
        expected = {name: str(value) for name, value in fields.items() if value is not None}
        with self.lock:
            if identity in self.expected:
                self.problems.add(f"{self.name}: two responses have the request ID {identity}")
            self.expected[identity] = (expected, is_streamed, outcomes, sent)

    def follow(self, path):
        """Reads the log at `path` from now on."""
        self.files.append([path, 0])

    def lines(self):
        """The complete new lines of all logs."""
        for entry in self.files:
            with open(entry[0], "rb") as file:
                file.seek(entry[1])
                data = file.read()
            end = data.rfind(b"\n") + 1
            entry[1] += end
            yield from data[:end].decode(errors="replace").splitlines()

    def read(self):
        """Reads new records and matches them."""
        with self.reading:
            self.match()

    def match(self):
        for line in self.lines():
            words = line.split(maxsplit=2)
            if len(words) < 3 or words[1] not in ("INFO", "WARN", "ERROR"):
                self.problems.add(f"{self.name}: an unexpected line in the log: {line[:300]}")
            elif words[2].startswith(("key issued ", "key stream started ")):
                self.record(log_fields(words[2]))
            elif words[1] != "INFO" and not any(each in words[2] for each in EXPECTED_LINES):
                self.problems.add(f"{self.name}: an unexpected line in the log: {line[:300]}")
        with self.lock:
            for identity in self.expected.keys() & self.found.keys():
                self.compare(identity, *self.expected.pop(identity), self.found.pop(identity))
                self.matched += 1

    def record(self, fields):
        identity = fields.get("credential") or fields["request_id"]
        with self.lock:
            if fields["outcome"] == "started":
                self.started[identity] += 1
            elif identity in self.found:
                self.problems.add(f"{self.name}: two audit records for {identity}")
            else:
                self.found[identity] = fields

    def compare(self, identity, expected, is_streamed, outcomes, sent, found):
        wrong = [
            f"{name}: expected {expected.get(name)}, found {found.get(name)}" for name in COMPARED if expected.get(name) != found.get(name)
        ]
        if found["outcome"] not in outcomes or not sent[0] <= int(found["sent"]) <= sent[1]:
            wrong.append(f"expected {' or '.join(outcomes)} and {sent} bytes, found {found['outcome']} and {found['sent']}")
        if (starts := self.started.pop(identity, 0)) != is_streamed:
            wrong.append(f"expected {int(is_streamed)} records of the start, found {starts}")
        if wrong:
            self.problems.add(f"{self.name}: the audit record {identity}: {'; '.join(wrong)}")

    def settle(self, is_excused):
        """Reports what is left unmatched once all clients are idle and all logs are written. `is_excused` gets the fields of a record that
        no client knows of, and returns whether its client may have left before it could read the headers."""
        self.read()
        with self.lock:
            for identity, (expected, *_) in self.expected.items():
                self.problems.add(f"{self.name}: no audit record of {identity}, whose key a client has: {expected}")
            for identity, fields in self.found.items():
                starts = self.started.pop(identity, 0)
                if is_excused(fields):
                    self.excused += 1
                else:
                    self.problems.add(f"{self.name}: an audit record of {identity}, of which no client knows ({starts} starts): {fields}")
            for identity in self.started:
                self.problems.add(f"{self.name}: a record of a started stream without its end: {identity}")
            self.expected, self.found, self.started = {}, {}, collections.Counter()
