"""A short soak, with the load and the checks of `just soak`; and a mutant for each kind of fault that a soak has to detect."""

import contextlib
import json
import random
import signal
import socket
import sys

import pytest
from support.conditions import TIMEOUT, expect
from support.daemon import binary
from support.soak import __main__ as command
from support.soak import audit, catalogue, clients, ledger, operator, plot, run, service

pytestmark = pytest.mark.tools("haproxy", "openssl", "setpriv", "ss")

SECONDS = 60
MUTANT_SECONDS = 3


def test_a_minute_of_mixed_load_leaves_nothing_wrong(tmp_path, monkeypatch, capsys, figures):
    """`just soak 1` finds no lost response, no missing record, no metric that differs, no growth; it prints its seed, results and plot"""
    seed = random.SystemRandom().randrange(1 << 32)
    monkeypatch.setenv("KEY_SERVICE_BIN", binary())
    monkeypatch.setattr(sys, "argv", ["soak", str(SECONDS / 60), "--seed", str(seed), "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        command.main()
    output = capsys.readouterr().out
    expect(exit.value.code, 0, f"exit status\n{output}")
    assert output.startswith(f"seed {seed}, ") and f"to repeat: just soak {SECONDS / 60:g} --seed {seed}" in output, output
    document = json.loads((tmp_path / "soak.json").read_text())
    assert all(points for curves in document["curves"].values() for points in curves.values()), document["curves"]
    assert (tmp_path / "soak.svg").read_text().count("<polyline") == 6
    summary = document["summary"]
    for name in ("steady", "restarting"):
        assert summary[name]["series equal"] > 0 and summary[name]["audit records matched"] > 100, summary
    figures(plot.sentence(summary))


def test_an_earlier_result_is_drawn_again(tmp_path, monkeypatch):
    file = tmp_path / "soak.json"
    curves = {name: {"steady": [[0.5, 1.0], [1.5, 12.0]]} for name in plot.TITLES}
    file.write_text(json.dumps({"curves": curves, "marks": [[30, "restart"], [40, "reload"]], "summary": SUMMARY}))
    monkeypatch.setattr(sys, "argv", ["soak", "--from", str(file), "--output", str(tmp_path)])
    command.main()
    assert "60 minutes, 30 responses" in (tmp_path / "soak.svg").read_text()


SUMMARY = {
    "minutes": 60,
    "problems": 0,
    "actions": {"restart": 1},
    "steady": {"responses": 10, "keys": 5},
    "restarting": {"responses": 20, "keys": 5},
}


@pytest.mark.parametrize("arguments", [[], ["0"], ["1", "--from", "x"]])
def test_wrong_arguments_are_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["soak", *arguments])
    with pytest.raises(SystemExit) as exit:
        command.main()
    expect(exit.value.code, 2, "exit status")
    assert "expected a number of minutes above 0, or --from FILE" in capsys.readouterr().err


class Once:
    """Calls `change` with the result of the function that it replaces, for the first call whose result it accepts."""

    def __init__(self, change):
        self.change, self.is_done = change, False

    def __call__(self, result):
        if not self.is_done and (changed := self.change(result)) is not None:
            self.is_done = True
            return changed
        return result


def wrap(monkeypatch, owner, name, change):
    """Lets `change` replace the result of a function, after the function was called."""
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments, **more: change(function(*arguments, **more)))


def lost_response(monkeypatch):
    """One response never arrives."""
    once = Once(lambda response: "lost" if response and response[0] == 200 else None)
    wrap(monkeypatch, run.Run, "read_response", lambda response: None if once(response) == "lost" else response)
    return "lost: "


def truncated_response(monkeypatch):
    """One response lacks its last byte."""
    once = Once(lambda response: (*response[:2], response[2][:-1]) if response and response[2] else None)
    wrap(monkeypatch, clients.Answers, "next", once)
    return "expected a body of "


def edit_log(monkeypatch, edit):
    """Edits one record in a log, which is then read as several lines or none."""
    is_done = False

    def lines(original):
        nonlocal is_done
        for line in original:
            if not is_done and "key issued" in line and "token=hostile" not in line:
                is_done = True
                yield from edit(line)
            else:
                yield line

    wrap(monkeypatch, audit.Audit, "lines", lines)


def missing_record(monkeypatch):
    edit_log(monkeypatch, lambda line: [])
    return "no audit record of "


def repeated_record(monkeypatch):
    edit_log(monkeypatch, lambda line: [line, line])
    return "two audit records for "


def record_of_another_client(monkeypatch):
    edit_log(
        monkeypatch, lambda line: [line.replace("address=", "address=192.0.2.") if "address=" in line else line + " address=192.0.2.1"]
    )
    return "address: expected "


def record_that_says_aborted(monkeypatch):
    edit_log(monkeypatch, lambda line: [line.replace("outcome=complete", "outcome=aborted")])
    return "found aborted"


def panic_in_the_log(monkeypatch):
    edit_log(monkeypatch, lambda line: [line, "thread 'worker' panicked at src/main.rs:1:1:"])
    return "an unexpected line in the log"


def count_more(monkeypatch, series, count=1):
    def parse(found):
        found[series] = found.get(series, 0) + count
        return found

    wrap(monkeypatch, ledger, "parse", parse)


def response_counted_twice(monkeypatch):
    count_more(monkeypatch, 'http_responses_total{status_code="404"}')
    return 'http_responses_total{status_code="404"}: expected '


def response_not_counted(monkeypatch):
    count_more(monkeypatch, 'http_responses_total{status_code="200"}', -1)
    return 'http_responses_total{status_code="200"}: expected '


def key_byte_counted_twice(monkeypatch):
    count_more(monkeypatch, 'key_bytes_total{format="base64url"}')
    return 'key_bytes_total{format="base64url"}: expected '


def dropped_record_counted(monkeypatch):
    count_more(monkeypatch, "audit_records_dropped_total")
    return "audit_records_dropped_total: expected 0"


def unknown_metric(monkeypatch):
    count_more(monkeypatch, "new_errors_total")
    return "new_errors_total: nothing says how this metric compares"


def stays_connected(monkeypatch, daemon, port):
    """After the load, a client connects, gets a response and stays."""
    operate, whole, kept = run.Run.operate, run.Run.run, contextlib.ExitStack()

    def operate_and_connect(started):
        operate(started)
        target = getattr(started, daemon)
        client = kept.enter_context(socket.create_connection(getattr(target, port), TIMEOUT))
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        expect(clients.Answers(client).next()[0], 200, "status")
        target.ledger.response(200, "/livez")

    def run_and_close(started):
        with kept:
            return whole(started)

    monkeypatch.setattr(run.Run, "operate", operate_and_connect)
    monkeypatch.setattr(run.Run, "run", run_and_close)


def leaked_descriptor(monkeypatch):
    """The daemon keeps a descriptor that its number of connections does not show: an idle connection to the port for metrics."""
    stays_connected(monkeypatch, "steady", "metrics")
    return " descriptors, found "


def open_connection(monkeypatch):
    monkeypatch.setattr(service, "CLOSE_TIMEOUT", 2)  # far below idle-timeout, which would close it
    stays_connected(monkeypatch, "restarting", "http")
    return "waiting for the connections to the restarting daemon to end"


def leaked_memory(monkeypatch):
    """Each look at the memory finds more than the one before."""
    grown = 0

    def figures(found):
        nonlocal grown
        grown += run.GROWTH_MAX
        return {**found, "resident": found["resident"] + grown}

    wrap(monkeypatch, service.Service, "figures", figures)
    return "bytes (resident)"


def repeated_key(monkeypatch):
    wrap(monkeypatch, catalogue, "fingerprints", lambda found: [1] if found else found)
    return "a key was issued twice"


def only(monkeypatch, action, daemon):
    """Lets the operator do nothing else, once before the baseline and once after it."""

    def operate(started):
        act, target = getattr(operator.Operator(started, random.Random(1)), action), getattr(started, daemon)
        act(target)
        started.take_baseline()
        act(target)

    monkeypatch.setattr(run.Run, "operate", operate)


def reload_without_effect(monkeypatch):
    only(monkeypatch, "rotate_token", "steady")
    original = service.Service.replace
    monkeypatch.setattr(service.Service, "replace", lambda self, name, text: self.daemon or original(self, name, text))
    return "a token after it was added: expected 200, found 401"


def removed_token_that_stays(monkeypatch):
    only(monkeypatch, "rotate_token", "restarting")
    monkeypatch.setattr(service.Service, "write_tokens", lambda self: stay(self))

    def stay(self):
        self.all_lines = {**getattr(self, "all_lines", {}), **self.lines}
        self.replace("tokens", "".join(f"{line}\n" for line in self.all_lines.values()))

    return "a token after its removal: expected 401, found 200"


def renewal_without_effect(monkeypatch):
    only(monkeypatch, "renew", "steady")
    wrap(monkeypatch, service.Steady, "served_certificate", lambda found: found.replace("A", "B", 1))
    return "the certificate after its renewal: expected "


def reload_that_removes_protection(monkeypatch):
    """A refused reload lets clients without a token in."""
    only(monkeypatch, "refuse", "restarting")
    original = service.Service.get
    monkeypatch.setattr(
        service.Service, "get", lambda self, token, **more: original(self, token, **more) if token else (200, original(self, token)[1])
    )
    return "a key without a token after a refused reload: expected 401, found 200"


def killed_process(monkeypatch):
    """The daemon ends without a drain."""
    only(monkeypatch, "restart", "restarting")
    original = service.Service.signal
    monkeypatch.setattr(
        service.Service, "signal", lambda self, number: original(self, signal.SIGKILL if number == signal.SIGTERM else number)
    )
    return "expected exit status 0, found -9"


MUTANTS = [
    lost_response,
    truncated_response,
    missing_record,
    repeated_record,
    record_of_another_client,
    record_that_says_aborted,
    panic_in_the_log,
    response_counted_twice,
    response_not_counted,
    key_byte_counted_twice,
    dropped_record_counted,
    unknown_metric,
    leaked_descriptor,
    open_connection,
    leaked_memory,
    repeated_key,
    reload_without_effect,
    removed_token_that_stays,
    renewal_without_effect,
    reload_that_removes_protection,
    killed_process,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_each_fault_is_detected(mutant, monkeypatch):
    """a soak that is broken in one way reports that fault"""
    monkeypatch.setattr(service, "SETTLE_TIMEOUT", 2)  # a fault does not go away
    expected = mutant(monkeypatch)
    found = run.Run(MUTANT_SECONDS, seed=1).run().problems.found
    assert any(expected in each for each in found), found
