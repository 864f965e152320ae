"""What a person sees who starts the daemon on a terminal, here a pseudo-terminal: a coloured log, and a first command that works."""

import contextlib
import os
import pty
import re
import select
import socket
import subprocess
import termios
import time
from pathlib import Path

import pytest
from support import certificates
from support.conditions import TIMEOUT, expect
from support.daemon import Daemon, binary

pytestmark = pytest.mark.tools("setpriv")

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# The end of the hint is an empty line.
HINT = re.compile(r"(?:^|\n)\n((?:No keys|Keys on) .*?)\n\n", re.DOTALL)


class Terminal(contextlib.AbstractContextManager):
    """A daemon whose standard error is a terminal.

    colours: the variables that decide whether the log has colours"""

    def __init__(self, directory, *arguments, colours=None, **options):
        self.master, self.slave = pty.openpty()
        colours = {"TERM": "xterm", "NO_COLOR": "", **(colours or {})}
        stderr = os.fdopen(os.dup(self.slave), "wb")
        self.daemon = Daemon(directory, *arguments, environment=lambda *_: colours, stderr=stderr, ready=False, **options)
        self.written = ""

    def __enter__(self):
        self.daemon.__enter__()
        return self

    def __exit__(self, *error):
        self.daemon.__exit__(*error)
        os.close(self.slave)
        os.close(self.master)

    def until(self, pattern):
        """The first match of a pattern in what the daemon writes."""
        deadline = time.monotonic() + TIMEOUT
        while not (found := re.search(pattern, self.written)):
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"expected {pattern} on the terminal, found {self.written!r}"
            self.written += os.read(self.master, 65536).decode().replace("\r\n", "\n")
        return found

    def hint(self):
        """The lines of the hint: where the daemon listens, and the others by their first word."""
        listening, *lines = self.until(HINT)[1].split("\n")
        return listening, dict(re.fullmatch(r"(\w+): +(.*)", line).groups() for line in lines)


def shell(command, directory):
    done = subprocess.run(["sh", "-c", command], cwd=directory, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def tls(directory):
    certificates.self_signed(directory / "tls.key", directory / "tls.pem", names="DNS:localhost,IP:127.0.0.1")
    (directory / "tls.pem").chmod(0o644)
    return {"tls-cert": directory / "tls.pem", "tls-key": directory / "tls.key"}


def client_certificate(directory):
    options = ["-addext", "basicConstraints=critical,CA:FALSE"]
    certificates.self_signed(directory / "client.key", directory / "client.pem", "/CN=client", "DNS:client.example.org", *options)
    (directory / "client.pem").chmod(0o644)
    return {**tls(directory), "tls-client-ca": directory / "client.pem"}


def tokens(directory):
    token, line = shell(f"{binary()} token new --name a", directory).splitlines()
    (directory / "tokens").write_text(f"{line}\n")
    (directory / "tokens").chmod(0o600)
    (directory / "token.header").write_text(f"Authorization: Bearer {token}\n")
    return {"tokens-file": directory / "tokens"}


def unix(directory):
    return {"host": f"unix:{directory}/it's a socket"}


@pytest.mark.tools("curl", "openssl")
@pytest.mark.parametrize(
    ("settings", "page", "command"),
    [
        pytest.param(lambda _: {}, "http://127.0.0.1:PORT/", "curl 'http://127.0.0.1:PORT/key/32?format=hex'", id="loopback"),
        pytest.param(
            lambda _: {"host": "*"}, "http://localhost:PORT/", "curl 'http://localhost:PORT/key/32?format=hex'", id="every address"
        ),
        pytest.param(lambda _: {"host": "0.0.0.0"}, "http://localhost:PORT/", "curl 'http://localhost:PORT/key/32?format=hex'", id="IPv4"),
        pytest.param(lambda _: {"host": "::1"}, "http://[::1]:PORT/", "curl 'http://[::1]:PORT/key/32?format=hex'", id="IPv6"),
        pytest.param(lambda _: {"page": "false", "max-size": 8}, None, "curl 'http://127.0.0.1:PORT/key/8?format=hex'", id="small keys"),
        pytest.param(
            lambda _: {"log-level": "off"}, "http://127.0.0.1:PORT/", "curl 'http://127.0.0.1:PORT/key/32?format=hex'", id="no log"
        ),
        pytest.param(
            tls,
            "https://127.0.0.1:PORT/",
            "curl --cacert DIRECTORY/tls.pem 'https://127.0.0.1:PORT/key/32?format=hex'",
            id="TLS",
        ),
        pytest.param(
            client_certificate,
            "https://127.0.0.1:PORT/",
            "curl --cacert DIRECTORY/tls.pem --cert client.pem --key client.key 'https://127.0.0.1:PORT/key/32?format=hex'",
            id="client certificates",
        ),
        pytest.param(tokens, "http://127.0.0.1:PORT/", "curl -H @token.header 'http://127.0.0.1:PORT/key/32?format=hex'", id="tokens"),
        pytest.param(unix, None, r"curl --unix-socket 'DIRECTORY/it'\''s a socket' 'http://localhost/key/32?format=hex'", id="Unix socket"),
        pytest.param(
            lambda directory: {**unix(directory), **tokens(directory), "unix-trust": "true"},
            None,
            r"curl --unix-socket 'DIRECTORY/it'\''s a socket' 'http://localhost/key/32?format=hex'",
            id="trusted Unix socket",
        ),
        pytest.param(
            lambda directory: {**unix(directory), **tls(directory), **tokens(directory)},
            None,
            r"curl --unix-socket 'DIRECTORY/it'\''s a socket' -H @token.header 'http://localhost/key/32?format=hex'",
            id="Unix socket with tokens",
        ),
    ],
)
def test_printed_command_gets_a_key(settings, page, command, tmp_path):
    """the terminal shows where the daemon listens, the address of the page, and a command that works as it is printed"""
    settings = settings(tmp_path)
    with Terminal(tmp_path, settings=settings) as terminal:
        listening, hint = terminal.hint()
        port = next(iter(re.findall(r"Keys on \S*:(\d+);", listening)), "")

        def known(text):
            return text and text.replace("PORT", port).replace("DIRECTORY", str(tmp_path))

        expect((hint.get("Page"), hint["Try"]), (known(page), known(command)), "the page and the command")
        printed = shell(hint["Try"], tmp_path)
        assert re.fullmatch(f"[0-9a-f]{{{2 * settings.get('max-size', 32)}}}\n", printed), printed
        if page and "tls-cert" not in settings:
            assert "<html" in shell(f"curl -fsS -H 'Accept: text/html' '{hint['Page']}'", tmp_path)


def test_hint_names_an_inherited_socket(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as keys, Terminal(tmp_path, inherit=[keys], names="http") as terminal:
        address = "{}:{}".format(*keys.getsockname())
        listening, hint = terminal.hint()
        assert listening.startswith(f"Keys on {address}; metrics on "), listening
        expect(hint, {"Page": f"http://{address}/", "Try": f"curl 'http://{address}/key/32?format=hex'"}, "hint")


@pytest.mark.parametrize(
    ("colours", "coloured"),
    [
        ({}, True),
        ({"TERM": "xterm-256color", "NO_COLOR": ""}, True),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": "0"}, False),
        ({"TERM": "dumb"}, False),
        ({"TERM": ""}, False),
    ],
)
def test_log_is_coloured_where_the_user_wants_it(colours, coloured, tmp_path):
    with Terminal(tmp_path, colours=colours) as terminal:
        terminal.hint()
        written = terminal.written
    expect("\x1b[32m  INFO\x1b[0m ready: Keys on" in written, coloured, f"whether the level is green in {written!r}")
    expect("\x1b" in written, coloured, f"whether there are colours in {written!r}")
    assert re.match(r"\S+Z  INFO starting version=", COLOUR.sub("", written)), written


def test_other_outputs_have_neither_colours_nor_a_hint(tmp_path):
    """a file gets the lines of the log alone"""
    with Daemon(tmp_path, environment=lambda *_: {"TERM": "xterm", "NO_COLOR": ""}) as daemon:
        expect(daemon.status("/key/32"), 200, "status")
    lines = daemon.logged().splitlines()
    assert lines and all(re.match(r"\d{4}-\S+Z +(INFO|WARN) ", line) for line in lines), lines


def test_names_can_not_control_the_terminal(tmp_path):
    """an escape sequence in the name of a socket is shown, not executed"""
    path = f"{tmp_path}/\x1b[31m\r\x07'red"
    with Terminal(tmp_path, colours={"NO_COLOR": "1"}, settings={"host": f"unix:{path}"}) as terminal:
        hint = terminal.until(HINT)[1]
        assert Path(path).is_socket()
    assert r"\x1b[31m\x0d\x07" in hint, hint
    controls = set(re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", terminal.written))
    expect(controls, set(), f"control characters in {terminal.written!r}")


def test_stopped_terminal_stalls_no_request(tmp_path):
    """while a terminal is stopped (Ctrl-S), keys are served, and SIGTERM ends the daemon"""
    with Terminal(tmp_path, settings={"audit": "true"}) as terminal:
        listening, _ = terminal.hint()
        terminal.daemon.authority = re.search(r"Keys on ([0-9.:]+);", listening)[1]
        termios.tcflow(terminal.slave, termios.TCOOFF)
        for _ in range(100):
            expect(terminal.daemon.status("/key/32"), 200, "status")
