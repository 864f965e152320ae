"""Conditions that tests state and wait for."""

import functools
import sys
import time

TIMEOUT = 60  # seconds; only a hang takes this long
STALL = 1  # seconds; how long an over-limit connection may take for its request (OVER_LIMIT_TIMEOUT in src/server/context.rs)


def expect(found, expected, what):
    """Fails with a message that names `what`, unless both values are equal."""
    assert found == expected, f"{what}: expected {expected!r}, found {found!r}"


def until(what, happens, timeout=TIMEOUT, interval=0.05):
    """Calls `happens` at each interval until it returns something true, and returns that.

    Tests wait with this instead of sleeping for a fixed time."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if result := happens():
            return result
        time.sleep(interval)
    raise AssertionError(f"timed out after {timeout} s waiting for {what}")


class Late(AssertionError):
    """Something failed, and the test has measured that it was late itself, or the machine was: the failure proves nothing."""


def repeated_if_late(test):
    """Repeats a test that raises Late, at most twice. A failure that is not due to a stall is still there then."""

    @functools.wraps(test)
    def repeated(**fixtures):
        for _ in range(2):
            try:
                return test(**fixtures)
            except Late as late:
                print(f"{test.__name__} is repeated: {late}", file=sys.stderr, flush=True)
        return test(**fixtures)

    return repeated


def retry_if_stalled(attempt):
    """Calls `attempt`, and returns its result. If it fails after more than STALL seconds, calls it again, at most twice.

    For what the daemon or `key-service health` gives up on after a second or two, and usually takes milliseconds: on a shared machine, each
    process may be stalled for longer. An attempt that fails within STALL is not repeated."""

    @repeated_if_late
    def timed_attempt():
        begin = time.monotonic()
        try:
            return attempt()
        except (AssertionError, ConnectionError) as error:
            if time.monotonic() - begin < STALL:
                raise
            raise Late(str(error)) from error

    return timed_attempt()
